"""All batches together: merged measurements, the statistics made of them, and their agreement.

Everything here is computed on the host in double precision.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from bn_jax._core.checks import statistics_dtype
from bn_jax._core.types import Measured
from bn_jax._paths import batch_stats_by_path, format_path, is_batch_stats
from bn_jax._program import in_double
from bn_jax._recalibrate.measuring import statistics_in
from bn_jax._recalibrate.report import LayerChange

Array: TypeAlias = npt.NDArray[Any]
# The statistics of a norm, by name.
Statistics: TypeAlias = Mapping[str, Any]
# What norms have measured, by path.
Pools: TypeAlias = dict[str, Measured]

# Two passes agree if statistics differ by at most so many roundings.
ROUNDINGS = 8


class Passed(NamedTuple):
    """What a pass over the batches has measured.

    Attributes:
        pools: all measurements of each norm together, by path.
        batches: the number of batches.
        left_out: of how many batches values were left out, by path, where of any.
        entered: how many batches had values of each feature, by path.
    """

    pools: Pools
    batches: int
    left_out: Mapping[str, int]
    entered: Mapping[str, Array]

    def with_batch(self, measured: Pools) -> "Passed":
        """Returns the same with the measurements of a further batch, which are on the host."""
        left_out = {path: 1 for path, norm in measured.items() if np.any(norm.left_out)}
        entered = {path: np.asarray(norm.count > 0, int) for path, norm in measured.items()}
        return merge([self, Passed(pooled({}, measured), 1, left_out, entered)])


NOTHING = Passed({}, 0, {}, {})


def merge(parts: Iterable[Passed]) -> Passed:
    """Returns what parts of the batches have measured together."""
    pools: Pools = {}
    left_out: Counter[str] = Counter()
    entered: dict[str, Array] = {}
    batches = 0
    for part in parts:
        pools = pooled(pools, part.pools)
        left_out.update(part.left_out)
        entered |= {path: entered.get(path, 0) + number for path, number in part.entered.items()}
        batches += part.batches
    return Passed(pools, batches, dict(left_out), entered)


def pooled(pools: Pools, measured: Pools) -> Pools:
    """Returns the pools with further measurements.

    They are merged in double precision: a float32 count stops counting at 2**24.
    """
    doubled = {path: as_double(norm) for path, norm in measured.items()}
    return pools | {
        path: _merge(pools[path], norm) if path in pools else norm for path, norm in doubled.items()
    }


def as_double(measured: Measured) -> Measured:
    """Returns a measurement in double precision, with the residue in the mean."""
    doubled: Measured = jax.tree.map(in_double, measured)
    return doubled._replace(mean=doubled.mean + doubled.residue, residue=0 * doubled.residue)


def _merge(first: Measured, second: Measured) -> Measured:
    maximum: Any = np.maximum
    count = first.count + second.count
    share = second.count / np.where(count > 0, count, 1)
    difference = second.mean - first.mean
    between = share * (1 - share) * np.abs(difference) ** 2
    return Measured(
        count=count,
        mean=first.mean + share * difference,
        var=(1 - share) * first.var + share * second.var + between,
        running_var_ddof=maximum(first.running_var_ddof, second.running_var_ddof),
        by_running=maximum(first.by_running, second.by_running),
        by_batch=maximum(first.by_batch, second.by_batch),
        left_out=first.left_out + second.left_out,
        residue=first.residue,
    )


def passes_needed(pools: Pools) -> float:
    """Returns how many passes make all statistics exact.

    One where all batches were normalized by their own statistics, otherwise one for every norm. The
    input of a norm's second call depends on its own statistics: infinitely many.
    """
    if not any(np.any(norm.by_running) for norm in pools.values()):
        return 1
    if any(np.any(norm.by_running > 1) for norm in pools.values()):
        return math.inf
    called = (norm for norm in pools.values() if np.any(norm.count) or np.any(norm.by_running))
    # Norms under a lifted transform are stacked along the first axes.
    return sum(math.prod(norm.mean.shape[:-1]) for norm in called)


# --- new statistics -----------------------------------------------------------------------------


def replace_statistics(batch_stats: Any, passed: Passed, initial: Any, prior: float) -> Any:
    """Returns the collection with new statistics of each norm, wherever a batch entered.

    `passed` is what batches measured with `batch_stats`. Of the statistics before the first pass,
    `initial`, the new ones keep the share `prior`. All are on the host.
    """

    def replace(path: Any, node: Any, initial_node: Any) -> Any:
        pool = passed.pools.get(format_path(path))
        if not is_batch_stats(node) or pool is None:
            return node
        entered = passed.entered[format_path(path)]
        new = _mixed(_population(pool), statistics_in(initial_node), entered, prior)

        def choose(keys: Any, old: Any) -> Any:
            name = format_path(keys[:1])
            if name not in new:
                return old
            chosen = np.where(_enters(pool), new[name], in_double(old))
            return _rounded(format_path((*path, *keys)), chosen, old)

        return jax.tree.map_with_path(choose, node)

    return jax.tree.map_with_path(replace, batch_stats, initial, is_leaf=is_batch_stats)


def _mixed(measured: Statistics, initial: Statistics, entered: Array, prior: float) -> Statistics:
    """Returns measured and initial statistics mixed by their shares, and the new count."""
    old = {name: in_double(initial[name]) for name in measured}
    is_usable = np.isfinite(old["mean"]) & np.isfinite(old["var"])
    share = np.where(is_usable, prior, 0.0)
    mixed = {
        name: share * np.where(is_usable, old[name], 0) + (1 - share) * new
        for name, new in measured.items()
    }
    return mixed | {"count": entered / (1 - share)}


def _population(pool: Measured) -> Statistics:
    freedom = pool.count - pool.running_var_ddof
    unbiased = pool.var * pool.count / np.where(freedom > 0, freedom, 1)
    return {"mean": pool.mean, "var": unbiased}


def _enters(pool: Measured) -> Array:
    return np.asarray(pool.count > pool.running_var_ddof)


def _rounded(path: str, values: Array, old: Any) -> Array:
    """Returns values in the dtype of the old ones, or raises where that cannot hold them."""
    dtype = old.dtype
    if np.iscomplexobj(values) and not jnp.iscomplexobj(old):
        dtype = np.result_type(statistics_dtype(dtype), np.complex64)
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    overflows = np.isfinite(values) & ~np.isfinite(rounded)
    if overflows.any():
        raise ValueError(
            f"batch_stats/{path} would be as large as {np.abs(values[overflows]).max():.3g}, which "
            f"{np.dtype(dtype).name} cannot hold: scale the input of the norm down, or recalibrate "
            "with running statistics in float64, jax.config.update('jax_enable_x64', True)."
        )
    return rounded


# --- agreement ----------------------------------------------------------------------------------


def agree(before: Any, after: Any) -> bool:
    """Tells whether two collections are the same up to rounding."""
    new = batch_stats_by_path(after)
    return all(
        _is_close(statistics_in(node), statistics_in(new[path]))
        for path, node in batch_stats_by_path(before).items()
    )


def is_measured_again(first: Measured, second: Measured) -> bool:
    """Tells whether two measurements of a norm agree, if there are any values."""
    if not np.any(first.count) or not np.array_equal(first.count, second.count):
        return False
    return _is_close(first._asdict(), second._asdict())


def _is_close(before: Statistics, after: Statistics) -> bool:
    tolerance = ROUNDINGS * jnp.finfo(statistics_dtype(after["var"].dtype)).eps
    old_mean, old_var = in_double(before["mean"]), in_double(before["var"])
    new_mean, new_var = in_double(after["mean"]), in_double(after["var"])
    with np.errstate(invalid="ignore"):
        scale = np.abs(new_mean) + np.sqrt(new_var)
        is_same_mean = np.abs(new_mean - old_mean) <= tolerance * scale
        is_same_var = np.abs(new_var - old_var) <= tolerance * new_var
    return bool(is_same_mean.all() and is_same_var.all())


# --- changes ------------------------------------------------------------------------------------


def changes(before: Any, after: Any, passed: Passed) -> Iterator[LayerChange]:
    """Yields the change of each norm between two collections."""
    new = batch_stats_by_path(after)
    for path, node in batch_stats_by_path(before).items():
        old = statistics_in(node)
        pool = passed.pools.get(path)
        enters = np.zeros(()) if pool is None else _enters(pool)
        is_measured = np.broadcast_to(enters, np.shape(old["var"])).astype(bool)
        mean, var = _moved(old, statistics_in(new[path]))
        yield LayerChange(
            path=path,
            mean=float(np.max(mean, initial=0, where=is_measured)),
            var=float(np.max(var, initial=1, where=is_measured)),
            values=float(np.min(pool.count[is_measured])) if pool and is_measured.any() else 0.0,
            kept=int(np.sum(~is_measured)),
            left_out=0.0 if pool is None else float(np.max(pool.left_out, initial=0)),
            batches_left_out=passed.left_out.get(path, 0),
        )


def _moved(before: Statistics, after: Statistics) -> tuple[Array, Array]:
    """Returns the changes of means in old standard deviations, and the factors of variances."""
    old_mean, old_var = in_double(before["mean"]), in_double(before["var"])
    new_mean, new_var = in_double(after["mean"]), in_double(after["var"])
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.abs(new_mean - old_mean)
        mean = np.where(distance == 0, 0, distance / np.sqrt(old_var))
        factor = new_var / old_var
        var = np.where(new_var == old_var, 1, np.maximum(factor, 1 / factor))
    return np.where(np.isnan(mean), math.inf, mean), np.where(np.isnan(var), math.inf, var)
