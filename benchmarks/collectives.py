"""Reads from the text of a compiled program what its devices tell each other."""

import re
from math import prod
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
        kind: one of `KINDS`.
        elements: how many numbers each device puts in.
        bytes: how many bytes they take.
        guarded: whether it is in a branch of a conditional, and so runs only with that.
    """

    kind: str
    elements: int
    bytes: int
    guarded: bool


def collectives(compiled_text: str) -> list[Collective]:
    """Lists the collectives of a program, each once, whether asynchronous or not.

    Args:
        compiled_text: optimized HLO, ``compiled.as_text()``.

    Returns:
        The collectives in the order of the text; one in a loop counts once.
    """
    computations = _computations(compiled_text)
    guarded = _guarded(computations)
    matches = {
        computation: [match for line in lines if (match := _INSTRUCTION.match(line))]
        for computation, lines in computations.items()
    }
    found = []
    for computation, instructions in matches.items():
        types = {match[1]: match[2] for match in instructions}
        for match in instructions:
            # Of an asynchronous pair, `-start` has the operands and `-done` only ends it. The other
            # asynchronous form, async-start, calls a computation that holds the plain operation.
            kind = match[3].removesuffix("-start")
            if kind in KINDS:
                operands = _NAME.findall(re.split(r"\), \w+=", match[4])[0])
                arrays = [array for name in operands for array in _ARRAY.findall(types[name])]
                found.append(
                    Collective(
                        kind,
                        sum(_elements(shape) for _, shape in arrays),
                        sum(_elements(shape) * _itemsize(dtype) for dtype, shape in arrays),
                        computation in guarded,
                    )
                )
    return found


def _computations(compiled_text: str) -> dict[str, list[str]]:
    """Returns the lines of every computation."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in compiled_text.splitlines():
        if header := _COMPUTATION.match(line):
            lines = computations.setdefault(header[1], [])
        else:
            lines.append(line)
    return computations


def _guarded(computations: dict[str, list[str]]) -> set[str]:
    """Returns the computations that a conditional's branch is, or calls."""

    def called(lines: list[str]) -> set[str]:
        return {name for line in lines for name in _NAME.findall(line)} & set(computations)

    everything = [line for lines in computations.values() for line in lines]
    pending = called([line for line in everything if " conditional(" in line])
    guarded: set[str] = set()
    while pending:
        branch = pending.pop()
        guarded.add(branch)
        pending |= called(computations[branch]) - guarded
    return guarded


def _elements(shape: str) -> int:
    return prod(int(size) for size in shape.split(",") if size)


def _itemsize(dtype: str) -> int:
    """Returns the bytes of an element of ``f32``, ``bf16``, ``f8e4m3fn`` or ``pred``."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1
