"""Reads the memory traffic and the collectives of a compiled program from its text."""

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
CONVOLUTION, CONVOLUTION_AND_SUMS, SUMS = "convolution", "convolution and sums", "sums"
ELEMENTWISE, MOVE = "elementwise", "copies between memories"
# What kernels do, by what they contain. Anything else, such as max pooling, counts as elementwise.
WORK = (CONVOLUTION, CONVOLUTION_AND_SUMS, SUMS, ELEMENTWISE, MOVE)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")
# Operations that only name, group or end something. They move no data themselves.
_FREE = {
    "after-all",
    "async-done",
    "async-update",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "optimization-barrier",
    "parameter",
    "tuple",
    "while",
}


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
        kind: one of `KINDS`.
        elements: number of values that each device contributes.
        bytes: size of these values.
        guarded: whether it is in a branch of a conditional and runs only with this branch.
    """

    kind: str
    elements: int
    bytes: int
    guarded: bool


def collectives(compiled_text: str) -> list[Collective]:
    """Lists the collectives of a program. An asynchronous collective counts once.

    Args:
        compiled_text: optimized HLO, ``compiled.as_text()``.

    Returns:
        The collectives in the order of the text. A collective in a loop counts once.
    """
    computations = _computations(compiled_text)
    guarded = _guarded(computations)
    found = []
    for computation, lines in computations.items():
        instructions = _instructions(lines)
        for instruction in instructions.values():
            # In an asynchronous pair, `-start` has the operands and `-done` only ends it. The other
            # asynchronous form, async-start, calls a computation that holds the plain operation.
            kind = instruction.kind.removesuffix("-start")
            if kind in KINDS:
                arrays = [
                    array
                    for name in instruction.operands
                    for array in _arrays(instructions[name].type)
                ]
                elements, size = (sum(each) for each in zip(*arrays, strict=True))
                found.append(Collective(kind, elements, size, computation in guarded))
    return found


class Kernel(NamedTuple):
    """An operation that a device runs as one piece.

    Attributes:
        kind: the operation, ``fusion`` for several.
        read: bytes that it reads from main memory.
        written: bytes that it writes to main memory.
        types: the arrays that it reads and writes, in any memory.
        anywhere: bytes that it reads and writes, in any memory.
        does: what it computes, one of `WORK`.
    """

    kind: str
    read: int
    written: int
    types: tuple[str, ...]
    anywhere: int
    does: str


def kernels(compiled_text: str) -> list[Kernel]:
    """Lists the kernels that run if no guard does: no branches of conditionals.

    Args:
        compiled_text: optimized HLO, ``compiled.as_text()``.

    Returns:
        The kernels in the order of the text. A kernel in a loop counts once. Operands count whole,
        except for a slice, where only the slice counts.
    """
    computations = _computations(compiled_text)
    inside = _guarded(computations) | _fused(computations)
    found = []
    for computation, lines in computations.items():
        if computation in inside:
            continue
        instructions = _instructions(lines)
        called = _called(lines)
        for name, instruction in instructions.items():
            kind = instruction.kind
            if kind in _FREE or kind.endswith("-done"):
                continue
            operands = [instructions[operand].type for operand in instruction.operands]
            written = instruction.type
            if kind.endswith("-start"):
                # The result of a start also names its operand.
                written = _split_tuple(written)[0 if kind == "copy-start" else 1]
            read = sum(map(_main_memory, operands))
            read_anywhere = sum(map(_all_memory, operands))
            if kind in ("slice", "slice-start", "dynamic-slice"):
                read, read_anywhere = (
                    min(size, _all_memory(written)) for size in (read, read_anywhere)
                )
            types = tuple(one for text in (*operands, written) for one in _types(text))
            contents = {kind} | _kinds(computations.get(called.get(name, ""), []))
            found.append(
                Kernel(
                    kind,
                    read,
                    _main_memory(written),
                    types,
                    read_anywhere + _all_memory(written),
                    _work(kind, contents),
                )
            )
    return found


def _work(kind: str, contents: set[str]) -> str:
    """Returns what a kernel of this kind does, one of `WORK`."""
    # The custom call joins the slices of an array that was copied in slices.
    if kind in ("copy", "copy-start", "slice-start", "custom-call"):
        return MOVE
    sums = "reduce" in contents
    if "convolution" in contents:
        return CONVOLUTION_AND_SUMS if sums else CONVOLUTION
    return SUMS if sums else ELEMENTWISE


def traffic(compiled_text: str) -> int:
    """Returns the bytes that all `kernels` read from and write to main memory."""
    return sum(kernel.read + kernel.written for kernel in kernels(compiled_text))


class _Instruction(NamedTuple):
    type: str
    kind: str
    operands: tuple[str, ...]


def _instructions(lines: list[str]) -> dict[str, _Instruction]:
    """Returns the instructions of a computation by name."""
    matches = [match for line in lines if (match := _INSTRUCTION.match(line))]
    return {
        match[1]: _Instruction(
            match[2], match[3], tuple(_NAME.findall(re.split(r"\), \w+=", match[4])[0]))
        )
        for match in matches
    }


def _split_tuple(text: str) -> list[str]:
    """Returns the types of the elements of a tuple; nested tuples are flattened."""
    return [match[0] for match in _ARRAY.finditer(text)]


def _types(text: str) -> list[str]:
    return [f"{dtype}[{shape}]" for dtype, shape, _ in _ARRAY.findall(text)]


def _arrays(text: str) -> list[tuple[int, int]]:
    """Returns the number of elements and the bytes of every array in a type."""
    return [
        (_elements(shape), _elements(shape) * _itemsize(dtype))
        for dtype, shape, _ in _ARRAY.findall(text)
    ]


def _called(lines: list[str]) -> dict[str, str]:
    """Returns the computation that each fusion of a computation runs."""
    return {
        match[1]: fused[1]
        for line in lines
        if (match := _INSTRUCTION.match(line)) and (fused := re.search(r"calls=%([\w.\-]+)", line))
    }


def _kinds(lines: list[str]) -> set[str]:
    return {match[3] for line in lines if (match := _INSTRUCTION.match(line))}


def _all_memory(text: str) -> int:
    return sum(size for _, size in _arrays(text))


def _main_memory(text: str) -> int:
    """Returns the bytes of the arrays in a type that are in main memory."""
    return sum(
        _elements(shape) * _itemsize(dtype)
        for dtype, shape, layout in _ARRAY.findall(text)
        if not _ON_CHIP.search(layout)
    )


def _fused(computations: dict[str, list[str]]) -> set[str]:
    """Returns the computations that are part of a kernel: fusion bodies and reducers."""
    pattern = re.compile(r"(?:to_apply|calls|called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
    return {
        name
        for lines in computations.values()
        for line in lines
        if (match := _INSTRUCTION.match(line)) and match[3] not in ("call", "async-start")
        for called in pattern.findall(line)
        for name in _NAME.findall(called)
    }


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
    """Returns the branches of conditionals and all computations that they call."""

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
    """Returns the bytes of one element of a dtype such as ``f32``, ``bf16`` or ``pred``."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1
