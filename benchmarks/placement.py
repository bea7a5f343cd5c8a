"""Where a ResNet-50 training step reads and writes: in main memory, and in any memory.

``python -m benchmarks.placement`` compiles the step of `benchmarks.memory` in bfloat16 for a TPU
v5e, ahead of time and without a chip, with either batch norm. It sorts the kernels by what they do,
and adds up their bytes. XLA keeps some arrays in on-chip memory, where they cost no bytes of main
memory. What a norm does shows in the bytes in any memory. The command prints the table and writes
``placement.json``. Programs that this file already holds are not compiled again.
"""

from collections.abc import Mapping
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


def load(figures: Mapping[str, Any]) -> dict[str, dict[str, Work]]:
    """Reads the figures of the JSON by norm and kind of kernel."""
    return {
        norm: {does: Work(**found[does]) for does in WORK}
        for norm, found in figures["norms"].items()
    }


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns the figures as a table."""
    work = load(figures)
    table = Table(title="Megabytes of a step of ResNet-50 on the v5e", box=SIMPLE_HEAD)
    columns = ("in any memory", "in main memory")
    for column in ("kernels", *(f"{where}, {norm}" for where in columns for norm in (OURS, FLAX))):
        table.add_column(column, justify="right", no_wrap=True)
    nothing = Work(0, 0, 0)
    computed = {
        norm: sum((one for does, one in found.items() if does != MOVE), nothing)
        for norm, found in work.items()
    }
    moved = {norm: sum(found.values(), nothing) for norm, found in work.items()}
    rows = [(does, {norm: found[does] for norm, found in work.items()}) for does in WORK]
    rows[-1:-1] = [("all that compute", computed)]
    for name, by_norm in [*rows, ("all", moved)]:
        # A copy reads and writes an array for which another kernel counts already.
        anywhere = [
            f"{by_norm[norm].anywhere / 1e6:,.1f}" if name not in (MOVE, "all") else "-"
            for norm in (OURS, FLAX)
        ]
        main = [f"{by_norm[norm].main / 1e6:,.1f}" for norm in (OURS, FLAX)]
        table.add_row(name, *anywhere, *main)
    return [table]


def main() -> None:
    """Compiles, writes the JSON and prints the table."""
    folder = report.parser("placement", __doc__).parse_args().folder
    jax.config.update("jax_platforms", "cpu")
    sizes, known = Sizes(), remembered(report.read_all("placement"))
    mesh, found = mesh_of(CHIP), {}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=2)
        for norm in (FLAX, OURS):
            progress.update(task, description=norm)
            found[norm] = measure(norm, mesh, sizes, known)
            progress.advance(task)
    figures = {"chip": CHIP, "sizes": sizes._asdict(), "norms": found}
    report.finish("placement", folder, ("flax", "libtpu"), figures, tables)


if __name__ == "__main__":
    main()
