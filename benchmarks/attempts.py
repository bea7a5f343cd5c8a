"""Attempts to bring norms to their floor on a GPU and to PyTorch's time on a CPU.

``python -m benchmarks.attempts`` compiles several versions of the same backward pass for an H200,
ahead of time. On the CPU it times the phases of norms, and several versions of the sums of the
first phase. It writes ``attempts.json``; `NOTES.md` has the conclusions. The versions are written
out here, without the package, because they differ in what XLA's heuristics see.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from benchmarks import layer, report
from benchmarks.compiled import AFTER_THE_NORM, LAYER_SHAPE, Row
from benchmarks.compilers import H200, compile_for, mesh_of, read
from benchmarks.timing import Timing, in_turns, keep_freed_memory

ROWS = [
    Row(H200, LAYER_SHAPE, dtype, *after)
    for dtype in ("float32", "bfloat16")
    for after in AFTER_THE_NORM
]


class Way(NamedTuple):
    """A way to write the backward pass.

    Attributes:
        sums: how the sums of the gradient g and of g * (x - mean) are computed. "two": two
            reductions. "one": one reduction with two results. "behind": two, the first after a
            barrier. "three": the gradient of the bias separately from the gradient of the mean.
        again: whether the gradient of x recomputes g after a barrier instead of sharing it.
        wide: whether the activation and its derivative are computed in float32.
    """

    sums: str = "two"
    again: bool = False
    wide: bool = False


WAYS = {
    "two sums": Way(),
    "one reduction of two results": Way("one"),
    "the first sum behind a barrier": Way("behind"),
    "bias and mean apart": Way("three"),
    "g computed again": Way(again=True),
    "g computed again, one reduction": Way("one", again=True),
    "activation in float32": Way(wide=True),
}


def make_program(row: Row, way: Way) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns forward and backward pass of a row, and the shapes of its arguments."""
    activation = getattr(nn, row.activation) if row.activation else lambda y: y

    def sums(g: jax.Array, deviation: jax.Array, slope: jax.Array) -> tuple[jax.Array, ...]:
        wide = g.astype(jnp.float32)
        if way.sums == "one":
            zero = jnp.float32(0)
            return lax.reduce(
                (wide, wide * deviation),
                (zero, zero),
                lambda a, b: (a[0] + b[0], a[1] + b[1]),
                (0,),
            )
        first = lax.optimization_barrier(g).astype(jnp.float32) if way.sums == "behind" else wide
        total = first.sum(0)
        scaled = (wide * slope).sum(0) / slope if way.sums == "three" else total
        return total, (wide * deviation).sum(0), scaled

    def forward_and_backward(
        x: Any, residual: Any, cotangent: Any, scale: Any, bias: Any
    ) -> tuple[Any, ...]:
        mean = x.astype(jnp.float32).mean(0)
        var = lax.square(x.astype(jnp.float32)).mean(0) - lax.square(mean)
        inverse = lax.rsqrt(var + 1e-5)

        def before(x: jax.Array, residual: jax.Array) -> jax.Array:
            y = (x.astype(jnp.float32) - mean) * (inverse * scale) + bias
            y = y if way.wide else y.astype(x.dtype)
            return y + residual.astype(y.dtype) if row.residual else y

        def gradient(x: jax.Array, residual: jax.Array, cotangent: jax.Array) -> jax.Array:
            y = before(x, residual)
            return jax.vjp(activation, y)[1](cotangent.astype(y.dtype))[0]

        y = activation(before(x, residual)).astype(x.dtype)
        y, cotangent = lax.optimization_barrier((y, cotangent))
        g = gradient(x, residual, cotangent)
        deviation = x.astype(jnp.float32) - mean
        found = sums(g, deviation, inverse * scale)
        if way.again:
            x, residual, cotangent, *found = lax.optimization_barrier(
                (x, residual, cotangent, *found)
            )
            g, deviation = gradient(x, residual, cotangent), x.astype(jnp.float32) - mean
        of_mean, of_var = found[-1] if len(found) == 3 else found[0], found[1]
        d_x = g.astype(jnp.float32) - of_mean / len(x) - deviation * of_var * inverse**2 / len(x)
        d_x = (d_x * inverse * scale).astype(x.dtype)
        return y, d_x, found[0], found[1], *((g,) if row.residual else ())

    x = jax.ShapeDtypeStruct(row.shape, row.dtype)
    feature = jax.ShapeDtypeStruct(row.shape[-1:], jnp.float32)
    return forward_and_backward, (x, x, x, feature, feature)


def measure(row: Row, way: Way) -> float:
    """Returns the bytes that a version moves, in units of the input."""
    return read(compile_for(mesh_of(row.chip), *make_program(row, way))).moved / row.unit


def plain_sums(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of `x` and of ``x * y`` over all axes but the features, without a shift."""
    axes = tuple(range(x.ndim - 1))
    return x.sum(axes), (x * y).sum(axes)


# Each phase needs the result of an earlier one, so no two phases can share a pass over memory. The
# exception is the last two sums of a layer norm, over rows and over columns: XLA needs two passes.
PHASES: dict[str, dict[str, tuple[Callable[..., Any], str]]] = {
    "BatchNorm": {
        "sums": (lambda x: plain_sums(x, x), "x"),
        "map": (lambda x, a, b: a * x + b, "xab"),
        "sums of the gradient": (plain_sums, "gx"),
        "map of the gradient": (lambda g, x, a, b, c: a * g + b * x + c, "gxabc"),
    },
    "LayerNorm": {
        "sums": (lambda x: (x.sum(-1), (x * x).sum(-1)), "x"),
        "map": (lambda x, m, r, a, b: (x - m) * r * a + b, "xmrab"),
        "sums of the gradient": (lambda g, x, a: ((g * a).sum(-1), (g * a * x).sum(-1)), "gxa"),
        "sums for the parameters": (lambda g, x, r: plain_sums(g, r * x), "gxr"),
        "map of the gradient": (lambda g, x, a, m, r: g * a * r + x * m + r, "gxamr"),
    },
}
ALL_PHASES = "all phases"


def time_phases(norm: str, shape: layer.Shape) -> dict[str, Timing]:
    """Times the phases of a norm in float32, together with whole layers.

    Args:
        norm: one of `PHASES`.
        shape: of x, features last.

    Returns:
        The timings of its phases, of our layer and of PyTorch's.
    """
    case = layer.Case(norm, "float32", shape)
    batch = layer.draw(case)
    arrays = {"x": batch.x, "g": batch.cotangent, "a": batch.params["scale"]}
    arrays |= dict.fromkeys("bc", batch.params["bias"])
    arrays = jax.device_put(arrays | dict.fromkeys("mr", batch.x[..., :1]))
    programs: dict[str, Callable[[], Any]] = {
        name: partial(jax.jit(phase), *(arrays[name] for name in names))
        for name, (phase, names) in PHASES[norm].items()
    }
    for arm, of_arm in layer.programs_of(case, (layer.OURS, "torch")).items():
        programs |= {f"{direction}, {arm}": program for direction, program in of_arm.items()}
    pause = partial(time.sleep, layer.PAUSE)
    return in_turns(programs, 3 * layer.ROUNDS, pause, layer.after_itself)


def _around(shift: jax.Array | None, x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if shift is None else x.astype(jnp.float32) - shift


def _total(shift: jax.Array | None, x: jax.Array) -> jax.Array:
    return _around(shift, x).sum(tuple(range(x.ndim - 1)))


def _square(shift: jax.Array | None, x: jax.Array) -> jax.Array:
    return lax.square(_around(shift, x)).sum(tuple(range(x.ndim - 1)))


def _apart(shift: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _total(shift, x), _square(*lax.optimization_barrier((shift, x)))


def _in_branches(shift: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    always = lax.optimization_barrier(jnp.array(True))
    total, square = (lax.cond(always, one, one, shift, x) for one in (_total, _square))
    return total, square


# The sum and the sum of squares. The shift makes the variance exact.
SUMS: dict[str, Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]] = {
    "around zero": lambda shift, x: (_total(None, x), _square(None, x)),
    "around the shift": lambda shift, x: (_total(shift, x), _square(shift, x)),
    "in branches": _in_branches,
    "apart": _apart,
    "squares alone": lambda shift, x: (
        _total(None, x),
        _square(*lax.optimization_barrier((shift, x))),
    ),
}


def time_sums(shape: layer.Shape, dtype: str) -> dict[str, Timing]:
    """Times several versions of the sums of a forward pass.

    Args:
        shape: of x, features last.
        dtype: of x.

    Returns:
        The timings of `SUMS`.
    """
    batch = layer.draw(layer.Case("BatchNorm", dtype, shape))
    arrays = jax.device_put((batch.params["bias"], batch.x))
    programs = {name: partial(jax.jit(way), *arrays) for name, way in SUMS.items()}
    return in_turns(programs, 3 * layer.ROUNDS, measure=layer.after_itself)


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns the tables of the backward passes, of the sums, and of the phases of each norm."""
    return [
        _ways_table(figures["ways"]),
        _sums_table(figures["sums"]),
        *(_phases_table(norm, figures["phases"][norm]) for norm in PHASES),
    ]


def _ways_table(ways: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title="Bytes moved on the H200, in units of the input", box=SIMPLE_HEAD)
    table.add_column("way", no_wrap=True)
    for program in next(iter(ways.values())):
        table.add_column(program, justify="right")
    for way, moved in ways.items():
        table.add_row(way, *(f"{one:.2f}" for one in moved.values()))
    return table


def _phases_table(norm: str, by_shape: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=f"{norm}: milliseconds on a CPU, float32", box=SIMPLE_HEAD)
    layers = [f"{layer.BOTH}, {arm}" for arm in ("torch", layer.OURS)]
    columns = [*PHASES[norm], ALL_PHASES, *layers]
    for column in ("shape", *columns, f"{ALL_PHASES} / torch"):
        table.add_column(column, justify="right")
    for shape, timings in by_shape.items():
        median = {name: Timing.load(one).median for name, one in timings.items()}
        median[ALL_PHASES] = sum(median[name] for name in PHASES[norm])
        ratio = median[ALL_PHASES] / median[layers[0]]
        table.add_row(shape, *(f"{1e3 * median[one]:.2f}" for one in columns), f"{ratio:.2f}")
    return table


def _sums_table(by_case: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=f"Sums on a CPU, relative to the sums {next(iter(SUMS))}", box=SIMPLE_HEAD)
    for column in ("case", *SUMS):
        table.add_column(column, justify="right")
    for case, timings in by_case.items():
        medians = [Timing.load(timings[name]).median for name in SUMS]
        table.add_row(case, *(f"{median / medians[0]:.2f}" for median in medians))
    return table


def main() -> None:
    """Times, compiles, writes the JSON and prints the tables."""
    folder = report.parser("attempts", __doc__).parse_args().folder
    jax.config.update("jax_platforms", "cpu")
    keep_freed_memory()
    ways: dict[str, dict[str, float]] = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("timing", total=len(layer.SHAPES) + len(WAYS) * len(ROWS))
        phases: dict[str, dict[str, Any]] = {norm: {} for norm in PHASES}
        sums = {}
        for shape in layer.SHAPES:
            for norm, by_shape in phases.items():
                by_shape[layer.named(shape)] = time_phases(norm, shape)
            progress.advance(task)
            for dtype in ("float32", "bfloat16"):
                sums[f"{dtype}, {layer.named(shape)}"] = time_sums(shape, dtype)
        for name, way in WAYS.items():
            progress.update(task, description=name)
            ways[name] = {}
            for row in ROWS:
                ways[name][f"{row.dtype}, {row}"] = measure(row, way)
                progress.advance(task)
    figures = {"phases": phases, "sums": sums, "ways": ways}
    report.finish("attempts", folder, ("flax", "jax-cuda13-plugin", "torch"), figures, tables)


if __name__ == "__main__":
    main()
