"""Sums of what masks and domains select: ways to write them, and the time of masks on a CPU.

``python -m benchmarks.selections`` compiles the sums of a batch norm by domain, of deviations and
of their squares, in several ways for a CPU and, ahead of time and without the device, for an H200
and a TPU v5e. The H200 is also compiled for as if each kernel had all of the shared memory that the
chip can give to one. On the CPU, batch norms are timed with and without a mask, ours and Flax's. It
writes ``selections.json``; `NOTES.md` has the conclusions. The ways are written out here, without
the package.
"""

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from benchmarks import domains, layer, report
from benchmarks.compilers import H200, ROOMY_H200, V5E, lower_for, missing, read
from benchmarks.domains import CPU, FLAX, FLAX_MASK, MASK, PASSES, PLAIN, mesh_for
from benchmarks.timing import Timing, in_turns, keep_freed_memory

SHAPE = (524288, 256)
NUMBERS = (1, 2, 4, 16)
DTYPES = {CPU: "float32", H200: "float32", ROOMY_H200: "float32", V5E: "bfloat16"}
MASKS = PLAIN, MASK, FLAX, FLAX_MASK
Sums: TypeAlias = list[jax.Array]
# Takes x, the domains and their shifts, and returns the sums of each domain.
Way: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], Sums]


def _by_product(x: jax.Array, domain: jax.Array, shift: jax.Array) -> Sums:
    one_hot = (domain[:, None] == jnp.arange(len(shift))[None]).astype(jnp.float32)
    deviation = x.astype(jnp.float32) - jnp.take(shift, domain, 0, mode="clip")
    dimensions = (((0,), (0,)), ((), ()))
    multiply = partial(lax.dot_general, one_hot, dimension_numbers=dimensions, precision="highest")
    return [multiply(deviation), multiply(lax.square(deviation))]


def _selected(x: jax.Array, domain: jax.Array, shift: jax.Array) -> Sums:
    """Returns deviations and squares, for each domain with zeros in the rows of the others."""
    selected: Sums = []
    for number in range(len(shift)):
        deviation = x.astype(jnp.float32) - shift[number][None]
        deviation = jnp.where(domain[:, None] == number, deviation, 0)
        selected += [deviation, lax.square(deviation)]
    return selected


def _each(x: jax.Array, domain: jax.Array, shift: jax.Array) -> Sums:
    return [part.sum(0) for part in _selected(x, domain, shift)]


def _reduce(values: Sums, *axes: int) -> Sums:
    zeros = tuple([jnp.zeros((), part.dtype) for part in values])
    return lax.reduce(tuple(values), zeros, lambda *two: tuple(map(operator.add, *two)), axes)


def _in_one(x: jax.Array, domain: jax.Array, shift: jax.Array) -> Sums:
    return _reduce(_selected(x, domain, shift), 0)


def _in_blocks(rows: int, arrays: int, x: jax.Array, domain: jax.Array, shift: jax.Array) -> Sums:
    blocks = [part.reshape(-1, rows, x.shape[1]) for part in _selected(x, domain, shift)]
    some = range(0, len(blocks), arrays)
    sums = [part for first in some for part in _reduce(blocks[first : first + arrays], 1)]
    return [part.sum(0) for part in sums]


def _over_three_axes(x: jax.Array, domain: jax.Array, shift: jax.Array) -> Sums:
    """Reduces axes apart from each other, which XLA for GPUs does without shared memory."""
    shape = -1, 8, 2, 8, 2, 8, x.shape[1]
    sums = _reduce([part.reshape(shape) for part in _selected(x, domain, shift)], 1, 3, 5)
    return [part.sum((0, 1, 2)) for part in sums]


def _complex(rows: int, x: jax.Array, domain: jax.Array, shift: jax.Array) -> Sums:
    selected = _selected(x, domain, shift)
    pairs = map(lax.complex, selected[::2], selected[1::2])
    sums = [pair.reshape(-1, rows, x.shape[1]).sum(1) for pair in pairs]
    return [part(one).sum(0) for one in sums for part in (lax.real, lax.imag)]


WAYS: dict[str, Way] = {
    "products with the one-hot matrix": _by_product,
    "a sum for each array": _each,
    "one reduction": _in_one,
    "reductions of 4 arrays, blocks of 16 rows": partial(_in_blocks, 16, 4),
    "complex sums, blocks of 8 rows": partial(_complex, 8),
    "one reduction over three axes of 8 rows": _over_three_axes,
}


def measure(chip: str, way: Way, number: int, shape: tuple[int, int] = SHAPE) -> float | None:
    """Returns the bytes that the sums of some domains move, in units of x.

    None if that takes more memory than the chip has, of any kind.
    """
    x = jax.ShapeDtypeStruct(shape, DTYPES[chip])
    domain = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    shift = jax.ShapeDtypeStruct((number, *shape[1:]), jnp.float32)
    lowered = lower_for(mesh_for(chip), way, (x, domain, shift))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if any(text in str(error) for text in ("too much shared data", "RESOURCE_EXHAUSTED")):
            return None
        raise
    return read(compiled).moved / (x.size * x.dtype.itemsize)


def _draw(shape: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    key = jax.random.key(seed)
    if shape.dtype == bool:
        return jax.random.bernoulli(key, 0.75, shape.shape)
    return jax.random.normal(key, shape.shape, shape.dtype)


def time_masks(shape: layer.Shape, dtype: str, rounds: int) -> dict[str, Timing]:
    """Times batch norms with and without a mask, by case and passes."""
    programs: dict[str, Callable[[], Any]] = {}
    for case in MASKS:
        for passes in PASSES:
            function, (params, stats, *shapes) = domains.make_program(case, shape, dtype, passes)
            ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), (params, stats))
            drawn = [_draw(one, seed) for seed, one in enumerate(shapes)]
            programs[f"{case}, {passes}"] = partial(jax.jit(function), *ones, *drawn)
    return in_turns(programs, rounds, measure=layer.after_itself)


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns the tables of the bytes of each way, and of the time of masks."""
    ways = Table(title="Bytes of sums by domain, in units of the input", box=SIMPLE_HEAD)
    for column in ("chip", "way", *map(str, NUMBERS)):
        is_figure = column.isdigit()
        ways.add_column(column, justify="right" if is_figure else "default", no_wrap=True)
    for chip, by_way in figures["ways"].items():
        for way, moved in by_way.items():
            units = [moved[str(number)] for number in NUMBERS]
            ways.add_row(chip, way, *("-" if one is None else f"{one:.2f}" for one in units))
    masks = Table(title=f"Time on a CPU, relative to {FLAX} without a mask", box=SIMPLE_HEAD)
    for column in ("case", *MASKS):
        masks.add_column(column, justify="right", no_wrap=True)
    for case, timings in figures["masks"].items():
        masks.add_row(case, *(" / ".join(f"{r:.2f}" for r in ratios(timings, c)) for c in MASKS))
    return [ways, masks]


def ratios(timings: Mapping[str, Any], case: str) -> list[float]:
    """Returns the time of a case over that of Flax's batch norm without a mask, by passes."""
    median = {name: Timing.load(timing).median for name, timing in timings.items()}
    return [median[f"{case}, {passes}"] / median[f"{FLAX}, {passes}"] for passes in PASSES]


def main() -> None:
    """Times, compiles, writes the JSON and prints the tables."""
    folder = report.parser("selections", __doc__).parse_args().folder
    jax.config.update("jax_platforms", "cpu")
    for message in filter(None, map(missing, (V5E, H200))):
        raise SystemExit(message)
    keep_freed_memory()
    masks: dict[str, Any] = {}
    ways: dict[str, dict[str, Any]] = {}
    with Progress(transient=True) as progress:
        cases = [(dtype, shape) for dtype in layer.TOLERANCES for shape in layer.SHAPES]
        task = progress.add_task("timing", total=len(cases) + len(DTYPES) * len(WAYS))
        for dtype, shape in cases:
            timings = time_masks(shape, dtype, 3 * layer.ROUNDS)
            masks[f"{dtype}, {layer.named(shape)}"] = {n: t._asdict() for n, t in timings.items()}
            progress.advance(task)
        for chip in DTYPES:
            ways[chip] = {}
            for name, way in WAYS.items():
                progress.update(task, description=f"{chip}: {name}")
                ways[chip][name] = {str(number): measure(chip, way, number) for number in NUMBERS}
                progress.advance(task)
    figures = {"masks": masks, "ways": ways}
    report.finish("selections", folder, ("flax", "libtpu", "jax-cuda13-plugin"), figures, tables)


if __name__ == "__main__":
    main()
