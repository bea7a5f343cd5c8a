"""The errors of batch norms against float64, on inputs where batch norms go wrong.

``python -m benchmarks.numerics`` prints the table and writes ``numerics.json``. Each layer takes
one jit-compiled training step on each of `benchmarks.adversarial.CASES`. With momentum 0, its new
running variance is the variance of the batch.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import bn_jax as bn
from benchmarks import report
from benchmarks.adversarial import CASES, Batch, Case, Layer, truth

BOUND = 1e-5
# Squares under float32's smallest normal number vanish, both from the mean square and from the
# square of the mean.
UNDERFLOW = 2 * float(np.finfo(np.float32).tiny)
TINY_VARIANCE = UNDERFLOW / BOUND
OURS = "bn_jax"


class Errors(NamedTuple):
    """The largest errors of one layer on one case.

    Attributes:
        output: relative to the largest of 1, ``|scale|`` and the true output.
        variance: relative to the true variance; None if every true variance is under
            `TINY_VARIANCE`.
        tiny_variance: absolute, where the true variance is under `TINY_VARIANCE`; None if no true
            variance is so small.
    """

    output: float
    variance: float | None
    tiny_variance: float | None

    def within_bound(self) -> bool:
        """Tells whether every error is under its bound. NaN is not."""
        relative = (self.output, 0.0 if self.variance is None else self.variance)
        absolute = 0.0 if self.tiny_variance is None else self.tiny_variance
        return all(error < BOUND for error in relative) and absolute < UNDERFLOW

    def __str__(self) -> str:
        """Shows the errors of output and variance; an absolute error is between bars."""
        figures = [_short(self.output)]
        if self.variance is not None:
            figures.append(_short(self.variance))
        if self.tiny_variance is not None:
            figures.append(f"|{_short(self.tiny_variance)}|")
        return " / ".join(figures)


def _short(error: float) -> str:
    """Formats a number with one digit and the exponent."""
    if not np.isfinite(error) or error == 0:
        return "NaN" if np.isnan(error) else f"{error:g}"
    digit, exponent = f"{error:.0e}".split("e")
    return f"{digit}e{int(exponent)}"


class Contestant(NamedTuple):
    """A layer to measure.

    Attributes:
        train: maps the configuration and the arrays to the output and the batch variance.
        lacks: the features that it has no argument for or is without, as `needs` names them.
    """

    train: Callable[[Layer, Batch], tuple[jax.Array, jax.Array]]
    lacks: frozenset[str] = frozenset()


def needs(case: Case, batch: Batch) -> frozenset[str]:
    """Names the features that a layer must support for this case."""
    needed = {
        "mask": batch.mask is not None and batch.mask.dtype == bool,
        "weights": batch.mask is not None and batch.mask.dtype != bool,
        "output dtype": case.layer.dtype is not None,
        "several feature axes": not isinstance(case.layer.axis, int),
        "groups of rows": case.layer.virtual_batch_size is not None,
        "guard of bfloat16": not case.layer.use_fast_variance,
    }
    return frozenset(name for name, is_needed in needed.items() if is_needed)


def _linen(
    kind: Callable[..., nn.Module], layer: Layer, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    module = kind(
        use_running_average=False,
        axis=layer.axis,
        momentum=0.0,
        epsilon=layer.epsilon,
        dtype=layer.dtype,
        axis_name=layer.axis_name,
    )
    variables = {
        "params": {"scale": batch.scale, "bias": batch.bias},
        "batch_stats": {"mean": batch.running_mean, "var": batch.running_var},
    }
    y, updates = module.apply(variables, batch.x, mask=batch.mask, mutable=["batch_stats"])
    return y, updates["batch_stats"]["var"]


def _ours(layer: Layer, batch: Batch) -> tuple[jax.Array, jax.Array]:
    kind = partial(
        bn.linen.BatchNorm,
        virtual_batch_size=layer.virtual_batch_size,
        use_fast_variance=layer.use_fast_variance,
    )
    return _linen(kind, layer, batch)


def _nnx(layer: Layer, batch: Batch) -> tuple[jax.Array, jax.Array]:
    assert isinstance(layer.axis, int)
    module = nnx.BatchNorm(
        batch.scale.size,
        axis=layer.axis,
        momentum=0.0,
        epsilon=layer.epsilon,
        dtype=layer.dtype,
        axis_name=layer.axis_name,
        scale_init=lambda *_: batch.scale,
        bias_init=lambda *_: batch.bias,
        rngs=nnx.Rngs(0),
    )
    module.mean[...], module.var[...] = batch.running_mean, batch.running_var
    y = module(batch.x, mask=batch.mask)
    return y, module.var[...]


def _haiku(layer: Layer, batch: Batch) -> tuple[jax.Array, jax.Array]:
    import haiku

    rank = batch.x.ndim

    def train(x: jax.Array) -> jax.Array:
        module = haiku.BatchNorm(
            create_scale=False,
            create_offset=False,
            decay_rate=0.0,
            eps=layer.epsilon,
            axis=layer.reduction_axes(rank),
            cross_replica_axis=layer.axis_name,
        )
        scale, offset = (layer.expand(leaf, rank) for leaf in (batch.scale, batch.bias))
        return module(x, is_training=True, scale=scale, offset=offset)

    transformed = haiku.transform_with_state(train)
    trained: Any = transformed.apply(*transformed.init(None, batch.x), None, batch.x)
    y, state = trained
    return y, state["batch_norm/~/var_ema"]["average"].reshape(batch.scale.shape)


FLAX_LACKS = frozenset({"weights", "groups of rows"})
FAST_LACKS = FLAX_LACKS | {"guard of bfloat16"}
CONTESTANTS: dict[str, Contestant] = {
    OURS: Contestant(_ours),
    "flax.linen": Contestant(partial(_linen, nn.BatchNorm), FAST_LACKS),
    "flax.linen two-pass": Contestant(
        partial(_linen, partial(nn.BatchNorm, use_fast_variance=False)), FLAX_LACKS
    ),
    "flax.nnx": Contestant(_nnx, FAST_LACKS | {"several feature axes"}),
    "haiku": Contestant(_haiku, FAST_LACKS | {"mask", "output dtype"}),
}


@lru_cache
def compiled(contestant: str, layer: Layer) -> Callable[[Batch], tuple[jax.Array, jax.Array]]:
    """Returns the compiled training step of a contestant, mapped over shards if there are some."""
    train = partial(CONTESTANTS[contestant].train, layer)
    if layer.axis_name is not None:
        in_axes = Batch(x=0, mask=0, scale=None, bias=None, running_mean=None, running_var=None)
        train = jax.vmap(train, in_axes=(in_axes,), axis_name=layer.axis_name)
    return jax.jit(train)


def measure(case: Case, contestants: tuple[str, ...] = (OURS,)) -> dict[str, Errors]:
    """Returns the errors on one case, for every contestant that supports it."""
    batch = case.make()
    output, variance = truth(case.layer, batch)
    smallest_unit = np.maximum(1, np.abs(case.layer.expand(batch.scale, output.ndim)))
    found = {}
    for name in contestants:
        if CONTESTANTS[name].lacks.isdisjoint(needs(case, batch)):
            found_output, found_variance = compiled(name, case.layer)(batch)
            found[name] = Errors(
                _output_error(np.asarray(found_output), output, smallest_unit),
                *_variance_errors(np.asarray(found_variance), variance),
            )
    return found


def _output_error(found: np.ndarray, output: np.ndarray, smallest_unit: np.ndarray) -> float:
    """Returns the largest error where the true output is finite; masked values may be NaN."""
    unit = np.abs(output)
    np.maximum(unit, smallest_unit, out=unit)
    error = output - found
    np.abs(error, out=error)
    error /= unit
    return float(error[np.isfinite(output)].max())


def _variance_errors(found: np.ndarray, variance: np.ndarray) -> tuple[float | None, float | None]:
    """Returns the relative error of variances that are not tiny, the absolute error of others."""
    error = np.abs(found - variance)
    variance = np.broadcast_to(variance, error.shape)
    tiny = variance < TINY_VARIANCE
    return (
        float((error[~tiny] / variance[~tiny]).max()) if not tiny.all() else None,
        float(error[tiny].max()) if tiny.any() else None,
    )


def installed_contestants() -> tuple[str, ...]:
    """Returns the names of all contestants whose package is installed."""
    return tuple(name for name in CONTESTANTS if name != "haiku" or find_spec("haiku"))


def measure_all() -> dict[str, dict[str, Errors]]:
    """Returns the errors of all contestants on all cases, with a progress bar."""
    contestants = installed_contestants()
    rows = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(CASES))
        for case in CASES:
            progress.update(task, description=escape(case.name))
            rows[case.name] = measure(case, contestants)
            progress.advance(task)
    return rows


def _as_json(errors: Errors) -> dict[str, float | str]:
    """Omits None and writes numbers that JSON does not have as strings."""
    return {
        name: error if np.isfinite(error) else str(error)
        for name, error in errors._asdict().items()
        if error is not None
    }


def load(known: Mapping[str, Any]) -> dict[str, dict[str, Errors]]:
    """Reads the figures of the JSON."""

    def errors(figures: dict[str, float | str]) -> Errors:
        known = {name: float(figure) for name, figure in figures.items()}
        return Errors(known["output"], known.get("variance"), known.get("tiny_variance"))

    return {
        case: {name: errors(figures) for name, figures in row.items()}
        for case, row in known["rows"].items()
    }


def tables(known: Mapping[str, Any]) -> list[Table]:
    """Returns the figures of the JSON as a table."""
    return [make_table(load(known))]


def make_table(rows: dict[str, dict[str, Errors]]) -> Table:
    """Returns the rows as a table, with errors over the bound in red."""
    table = Table(
        title="Largest error against float64: output / variance",
        caption=(
            f"Bound: {_short(BOUND)}; errors over it are red or bold. If the true variance is "
            f"under {_short(TINY_VARIANCE)}, its error is |absolute| and its bound is "
            f"{_short(UNDERFLOW)}, because smaller squares vanish. Inputs on which errors are over "
            f"the bound, of {len(rows)}: {_over(rows)}."
        ),
        box=SIMPLE_HEAD,
    )
    table.add_column("input", no_wrap=True)
    for name in CONTESTANTS:
        table.add_column(name, justify="right", no_wrap=True)
    for case, row in rows.items():
        shown = zip(cells(row), CONTESTANTS, strict=True)
        table.add_row(escape(case), *(_coloured(cell, row.get(name)) for cell, name in shown))
    return table


def _over(rows: Mapping[str, Mapping[str, Errors]]) -> str:
    """Returns for each contestant on how many of its inputs it is over the bound."""
    counts = []
    for name in CONTESTANTS:
        errors = [row[name] for row in rows.values() if name in row]
        over = sum(not one.within_bound() for one in errors)
        counts.append(f"{name} {over}" + (f" of {len(errors)}" if len(errors) < len(rows) else ""))
    return ", ".join(counts)


def cells(row: dict[str, Errors]) -> list[str]:
    """Returns the cells of a row, with a dash for a contestant that does not support the case."""
    return [str(row[name]) if name in row else "-" for name in CONTESTANTS]


def _coloured(cell: str, errors: Errors | None) -> str:
    return cell if errors is None or errors.within_bound() else f"[red]{cell}[/red]"


def main() -> None:
    """Measures, writes the JSON and prints the table."""
    folder = report.parser("numerics", __doc__).parse_args().folder
    figures = {
        "bound": {"output": BOUND, "variance": BOUND, "tiny_variance": UNDERFLOW},
        "rows": {
            case: {name: _as_json(errors) for name, errors in row.items()}
            for case, row in measure_all().items()
        },
    }
    report.finish("numerics", folder, ("flax", "numpy", "dm-haiku"), figures, tables)


if __name__ == "__main__":
    main()
