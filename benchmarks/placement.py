"""Where a ResNet-50 training step reads and writes: in main memory, and in any memory.

``python -m benchmarks.placement`` compiles the step of `benchmarks.memory` in bfloat16 for a TPU
v5e, ahead of time and without a chip, with either batch norm and for two sizes of the batch. It
sorts the kernels by what they do, and adds up their bytes. XLA keeps some arrays in on-chip memory,
where they cost no bytes of main memory. What a norm does shows in the bytes in any memory. The
command prints the table and writes ``placement.json``. Programs that this file already holds are
not compiled again.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from benchmarks import report
from benchmarks.compilers import V5E, identify, lower_for, mesh_of, remembered
from benchmarks.hlo import MOVE, WORK, kernels
from benchmarks.memory import FLAX, OURS, Sizes, arms, make_step

CHIP = V5E
EXAMPLES = (96, 128)


class Work(NamedTuple):
    """What the kernels of one kind read and write.

    Attributes:
        kernels: how many there are.
        anywhere: bytes in any memory.
        main: bytes in main memory alone.
    """

    kernels: int
    anywhere: int
    main: int

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        """Adds the figures of other kernels."""
        return Work(*map(sum, zip(self, other, strict=True)))


def sort(compiled_text: str) -> dict[str, Work]:
    """Adds up what the kernels of a program read and write, by what they do.

    Args:
        compiled_text: optimized HLO, ``compiled.as_text()``.

    Returns:
        The sums, for each kind of `benchmarks.hlo.WORK`.
    """
    found = dict.fromkeys(WORK, Work(0, 0, 0))
    for kernel in kernels(compiled_text):
        found[kernel.does] += Work(1, kernel.anywhere, kernel.read + kernel.written)
    return found


def measure(norm: str, mesh: Mesh, sizes: Sizes, known: Mapping[str, Any]) -> dict[str, Any]:
    """Sorts the kernels of the step with a norm; compiles it only if it is not known yet."""
    lowered = lower_for(mesh, *make_step(arms()[norm], sizes))
    program = identify(mesh, lowered)
    if program in known:
        return {**known[program], "program": program}
    work = sort(lowered.compile().as_text() or "")
    return {**{does: one._asdict() for does, one in work.items()}, "program": program}


def load(figures: Mapping[str, Any]) -> dict[int, dict[str, dict[str, Work]]]:
    """Reads the figures of the JSON by number of examples, norm and kind of kernel."""
    return {
        int(examples): {
            norm: {does: Work(**found[does]) for does in WORK} for norm, found in by_norm.items()
        }
        for examples, by_norm in figures["examples"].items()
    }


def total(work: Mapping[str, Work], *, with_copies: bool) -> Work:
    """Adds up kernels of all kinds, or of those that compute."""
    parts = (one for does, one in work.items() if with_copies or does != MOVE)
    return sum(parts, Work(0, 0, 0))


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns the figures as a table."""
    table = Table(title="Megabytes of a step of ResNet-50 on the v5e", box=SIMPLE_HEAD)
    for column in ("images", "kernels"):
        table.add_column(column, justify="right", no_wrap=True)
    for memory in ("any memory", "main memory"):
        table.add_column(f"in {memory}, {OURS} / {FLAX}", justify="right", no_wrap=True)
        table.add_column("ratio", justify="right", no_wrap=True)
    for examples, by_norm in load(figures).items():
        ours, flax = by_norm[OURS], by_norm[FLAX]
        rows = {does: [ours[does], flax[does]] for does in WORK if does != MOVE}
        rows["all that compute"] = [total(one, with_copies=False) for one in (ours, flax)]
        rows[MOVE] = [ours[MOVE], flax[MOVE]]
        rows["all"] = [total(one, with_copies=True) for one in (ours, flax)]
        for name, both in rows.items():
            # A copy reads and writes an array for which another kernel counts already.
            anywhere = ["-", "-"] if name in (MOVE, "all") else _cells(one.anywhere for one in both)
            table.add_row(str(examples), name, *anywhere, *_cells(one.main for one in both))
    return [table]


def _cells(both: Iterable[int]) -> list[str]:
    one, other = both
    return [f"{one / 1e6:,.1f} / {other / 1e6:,.1f}", f"{one / other:.3f}"]


def main() -> None:
    """Compiles, writes the JSON and prints the table."""
    folder = report.parser("placement", __doc__).parse_args().folder
    jax.config.update("jax_platforms", "cpu")
    known, mesh = remembered(report.read_all("placement")), mesh_of(CHIP)
    found: dict[int, dict[str, Any]] = {examples: {} for examples in EXAMPLES}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=2 * len(EXAMPLES))
        for examples, by_norm in found.items():
            for norm in (FLAX, OURS):
                progress.update(task, description=f"{norm}, {examples} images")
                by_norm[norm] = measure(norm, mesh, Sizes(examples), known)
                progress.advance(task)
    sizes = Sizes()._asdict()
    del sizes["examples"]
    figures = {"chip": CHIP, "sizes": sizes, "examples": found}
    report.finish("placement", folder, ("flax", "libtpu"), figures, tables)


if __name__ == "__main__":
    main()
