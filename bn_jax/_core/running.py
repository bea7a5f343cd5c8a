"""Running statistics: their averages and counts, and the state that is measured instead.

Batch norm, batch renorm and whitening share `average`; the first two share all of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from bn_jax._core.axes import place_like
from bn_jax._core.checks import (
    as_shape,
    check_count_kept,
    mean_dtype,
    shapes_of,
    statistics_dtype,
    statistics_of,
)
from bn_jax._core.merging import merge_centred
from bn_jax._core.moments import CentredMoments
from bn_jax._core.types import (
    Axes,
    BatchStats,
    Measured,
    Moments,
    Options,
)

Tree = TypeVar("Tree")


def init_batch_stats(
    features: Axes, *, dtype: DTypeLike = jnp.float32, use_count: bool = False
) -> BatchStats:
    """Returns ``{"mean": zeros, "var": ones}`` of shape `features`.

    Args:
        features: the number of features, or their shape where there are several feature axes.
        dtype: the dtype of the statistics; half precision becomes float32. For complex input it is
            the dtype of the mean, and the variance is real.
        use_count: whether to add ``"count": zeros``, the number of batches, which ``momentum=None``
            needs. It is a float (exact up to 2**24 batches), so that averaging ``batch_stats`` over
            devices does not change its type.

    Returns:
        The running statistics for `batch_norm`.

    Example:
        >>> import bn_jax as bn
        >>> bn.init_batch_stats(2)["var"]
        Array([1., 1.], dtype=float32)
    """
    shape = as_shape(features)
    real = statistics_dtype(dtype)
    batch_stats: BatchStats = {
        "mean": jnp.zeros(shape, mean_dtype(real, dtype)),
        "var": jnp.ones(shape, real),
    }
    if use_count:
        batch_stats["count"] = jnp.zeros(shape, real)
    return batch_stats


def promote_batch_stats(tree: Tree) -> Tree:
    """Casts running statistics in half precision to float32, the dtype that updates return.

    An update in half precision would be lost: with a momentum of 0.99, the step is soon less than
    half a unit in the last place, and a count stops at 256 in bfloat16. So the first update
    returns float32 whatever it was passed. `lax.scan`, `while_loop` and `cond` need equal types
    before and after, and so do Flax's `nn.scan` and `nnx.scan`. Call this function first where the
    whole model has been cast to half precision, or loaded in it.

    Args:
        tree: running statistics, alone or in any tree: the collection ``batch_stats`` of a Linen
            model, or ``nnx.state(model, nnx.BatchStat)``.

    Returns:
        The same tree with every floating-point leaf of less than 32 bits in float32. Other leaves
        stay as they are.

    Raises:
        ValueError: `tree` holds ``params`` too.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> half = jax.tree.map(jnp.bfloat16, bn.init_batch_stats(1))
        >>> def step(batch_stats, x):
        ...     y, batch_stats = bn.batch_norm({}, batch_stats, x, use_running_average=False)
        ...     return batch_stats, y
        >>> batch_stats, _ = jax.lax.scan(step, bn.promote_batch_stats(half), jnp.ones((100, 2, 1)))
        >>> batch_stats["mean"].round(3)
        Array([0.634], dtype=float32)
    """
    if isinstance(tree, Mapping) and "params" in tree:
        raise ValueError(
            f"tree has {sorted(tree)}; expected running statistics alone, because every leaf in "
            "half precision is cast. Write promote_batch_stats(variables['batch_stats'])."
        )
    return cast(Tree, jax.tree.map(_promote, tree))


def _promote(leaf: Any) -> Any:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits >= 32:
        return leaf
    return leaf.astype(jnp.float32)


def update_batch_stats(
    batch_stats: BatchStats,
    moments: Moments,
    *,
    momentum: float | jax.Array | None = 0.99,
    running_var_ddof: int = 0,
    by_running: bool = False,
) -> BatchStats:
    """Updates the running statistics by the moments of a batch.

    With `n` the count, ``new_mean = momentum * old_mean + (1 - momentum) * mean`` and
    ``new_var = momentum * old_var + (1 - momentum) * var * n / (n - running_var_ddof)``. It is the
    second half of `batch_norm` in training; `normalize_by_batch` is the first. Between them,
    moments may be merged with `merge_moments`, so that several batches make one update. Where
    `batch_stats` holds `measured`, the moments are merged into it instead: see `batch_norm`.

    Args:
        batch_stats: ``{"mean": [*F], "var": [*F]}`` and optionally ``"count": [*F]`` and
            ``"measured"``.
        moments: of the batch, each of shape ``[*F]``; the count may be a scalar.
        momentum: the weight of the old value; None for the cumulative average.
        running_var_ddof: 0 for the biased running variance, 1 for the unbiased one.
        by_running: whether the running statistics normalized the batch; only `measured` records it.

    Returns:
        The new `batch_stats` in the dtypes of the old ones, but in at least float32 (see
        `promote_batch_stats`), and a real mean becomes complex where the batch's is. A feature
        whose moments are not finite, or whose count is no more than `running_var_ddof`, keeps its
        old values.

    Raises:
        ValueError: shapes, `momentum` or `running_var_ddof` do not fit.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> batch_stats = bn.init_batch_stats(1)
        >>> moments = bn.moments(jnp.array([[1.0], [3.0]]), axes=0)
        >>> bn.update_batch_stats(batch_stats, moments, momentum=0.5)["mean"].tolist()
        [1.0]

    Reference: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, Algorithm 2.
    """
    Options(momentum=momentum, running_var_ddof=running_var_ddof)  # Checks them.
    shapes = shapes_of(statistics_of(batch_stats))
    if momentum is None:
        check_count_kept(batch_stats, "init_batch_stats")
    count, mean, var = map(jnp.asarray, moments)
    shape = jnp.shape(batch_stats["mean"])
    fit = all(other == shape for other in shapes.values())
    if not (fit and shape == mean.shape == var.shape) or count.shape not in ((), shape):
        raise ValueError(
            f"moments of the shapes {tuple(map(jnp.shape, moments))} (count, mean, var) do not fit "
            f"batch_stats of the shapes {shapes}: take them over all axes but the features'."
        )
    centred = CentredMoments(count, mean, None, var)
    return _update_alone(running_var_ddof, by_running, weigh_batch(momentum), batch_stats, centred)


@partial(jax.jit, static_argnums=(0, 1))
def _update_alone(
    running_var_ddof: int,
    by_running: bool,
    weight: "Weight",
    batch_stats: BatchStats,
    batch: CentredMoments,
) -> BatchStats:
    return update(
        weight,
        running_var_ddof,
        batch_stats,
        batch,
        by_running=by_running,
        by_batch=not by_running,
    )


def update(
    weight: "Weight",
    running_var_ddof: int,
    batch_stats: BatchStats,
    batch: CentredMoments,
    *,
    by_running: bool,
    by_batch: bool,
) -> BatchStats:
    """Averages the batch into the running statistics, or merges it into what is measured.

    Args:
        weight: of the batch.
        running_var_ddof: 0 for the biased running variance, 1 for the unbiased one.
        batch_stats: the old running statistics.
        batch: the moments of the batch, in the shape of the features; the count may be a scalar.
        by_running: whether the running statistics normalized the batch, alone or in part.
        by_batch: whether its own statistics did.

    Returns:
        The new running statistics.
    """
    if "measured" in batch_stats:
        old = batch_stats["measured"]
        measured = _measure_too(old, batch, running_var_ddof, by_running, by_batch)
        return {**batch_stats, "measured": measured}
    return cast(BatchStats, _average_moments(running_var_ddof, weight, batch_stats, batch))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weight:
    """The weight of a batch in the running statistics: ``1 - momentum`` or ``1 / (count + 1)``.

    Attributes:
        value: the weight; None for the one that follows from the count.
        is_small: whether it is known to be less than a half; None where only the program can tell.
    """

    value: jax.Array | float | None
    is_small: bool | None = field(metadata={"static": True})


def weigh_batch(momentum: float | jax.Array | None) -> Weight:
    """Returns the weight of the next batch.

    Args:
        momentum: the weight of the old values, or None for the cumulative average.
    """
    if momentum is None:
        return Weight(None, None)
    if isinstance(momentum, Real):
        weight = 1 - float(momentum)
        return Weight(weight, weight < 0.5)
    return Weight(1 - jnp.asarray(momentum), None)


def _average_moments(
    running_var_ddof: int, weight: Weight, batch_stats: BatchStats, batch: CentredMoments
) -> dict[str, jax.Array]:
    var, degrees = batch.var, batch.count
    if running_var_ddof:
        degrees = degrees - running_var_ddof
        var = var * (batch.count / jnp.where(degrees > 0, degrees, 1)).astype(var.dtype)
    new = {"mean": batch.mean(), "var": var}
    return average(weight, cast(dict[str, jax.Array], batch_stats), new, degrees > 0, rank=var.ndim)


def average(
    weight: Weight,
    old: dict[str, jax.Array],
    batch: dict[str, jax.Array],
    enters: jax.Array,
    *,
    rank: int,
) -> dict[str, jax.Array]:
    """Returns the running statistics after a batch: ``(1 - weight) * old + weight * batch``.

    The first `rank` axes hold features or groups of features. Each of these enters with all of its
    values or not at all.

    Args:
        weight: its value is a scalar, or of `rank` axes, or follows from the count.
        old: the old values by name. Where there is a ``"count"``, of `rank` axes, it counts the
            batches that entered.
        batch: the values of the batch, of `rank` axes or more.
        enters: boolean, a scalar or of `rank` axes. False keeps the old value; so does a new one
            that would not be finite.
        rank: how many axes tell features or groups apart.

    Returns:
        The new values, in the dtypes of the old ones, but in at least float32, whether the batch
        enters or not.
    """
    # A step of the average, or of the count, may be less than half a unit of half precision.
    old = promote_batch_stats(old)
    share = jnp.asarray(1 / (old["count"] + 1) if weight.value is None else weight.value)
    # Without a weak type, which every product would have to convert.
    share = lax.convert_element_type(share, share.dtype)
    placed = {name: place_like(batch[name], old[name]) for name in batch}
    new = {}
    for name, values in batch.items():
        new[name] = _blend(share, weight.is_small, placed[name], values)
        finite = jnp.isfinite(new[name])
        further = tuple(range(rank, values.ndim))
        enters = enters & (jnp.all(finite, further) if further else finite)
    if "count" in old:
        placed["count"] = place_like(enters, old["count"])
        new["count"] = placed["count"] + 1
    return {name: _select(enters, new[name], placed[name]) for name in new}


def _select(enters: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    old = old.astype(new.dtype)
    if enters.ndim == new.ndim:
        return lax.select(enters, new, old)
    return jnp.where(jnp.expand_dims(enters, tuple(range(enters.ndim, new.ndim))), new, old)


def _blend(share: jax.Array, is_small: bool | None, old: jax.Array, new: jax.Array) -> jax.Array:
    """Returns the new running value, in the dtype that it is stored in."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(old.dtype, new.dtype)
    new, old_value = new.astype(dtype), old.astype(dtype)
    if share.ndim:
        share = place_like(new, jnp.expand_dims(share, tuple(range(share.ndim, new.ndim))))
    share = share.astype(dtype)
    # A step from the old value stays where it is once it has arrived, whatever the rounding of a
    # small weight; a sum of shares leaves nothing of the old value where the weight is 1.
    if is_small:
        blended = old_value + share * (new - old_value)
    else:
        blended = (1 - share) * old_value + share * new
    if is_small is None:
        blended = lax.select(share.real < 0.5, old_value + share * (new - old_value), blended)
    becomes_complex = jnp.iscomplexobj(new) and not jnp.iscomplexobj(old)
    return blended if becomes_complex else blended.astype(old.dtype)


def start_measuring(batch_stats: BatchStats) -> BatchStats:
    """Returns `batch_stats` as a state that is measured: with an empty `measured`.

    `batch_norm` says what calls do with such a state.

    Args:
        batch_stats: ``{"mean": [*F], "var": [*F]}`` and optionally ``"count": [*F]``.

    Returns:
        The same statistics and `Measured`, in at least float32.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> batch_stats = bn.start_measuring(bn.init_batch_stats(1))
        >>> for x in jnp.array([[1.0]]), jnp.array([[3.0], [8.0]]):
        ...     y, batch_stats = bn.batch_norm({}, batch_stats, x, use_running_average=True)
        >>> batch_stats["measured"].mean.tolist(), batch_stats["mean"].tolist()
        ([4.0], [0.0])
    """
    mean, var = jnp.asarray(batch_stats["mean"]), jnp.asarray(batch_stats["var"])
    dtype = statistics_dtype(mean.dtype, var.dtype)
    zeros = jnp.zeros_like(var, dtype)
    zero_mean = jnp.zeros_like(mean, mean_dtype(dtype, mean.dtype))
    measured = Measured(
        count=zeros,
        mean=zero_mean,
        var=zeros,
        running_var_ddof=zeros,
        by_running=zeros,
        by_batch=zeros,
        left_out=zeros,
        residue=zero_mean,
    )
    return {**batch_stats, "measured": measured}


def _measure_too(
    old: Measured, batch: CentredMoments, running_var_ddof: int, by_running: bool, by_batch: bool
) -> Measured:
    """Merges the moments of a batch into what has been measured, in at least float32."""
    old = Measured(*(place_like(batch.var, leaf) for leaf in promote_batch_stats(old)))
    real = old.var.dtype
    dtype = mean_dtype(real, old.mean.dtype, batch.shift.dtype)
    delta = jnp.zeros_like(batch.shift) if batch.delta is None else batch.delta
    sound = jnp.isfinite(batch.mean()) & jnp.isfinite(batch.var) & (batch.count > 0)
    count = batch.count.astype(real)
    both = CentredMoments(
        jnp.stack([old.count, jnp.where(sound, count, 0)]),
        jnp.stack([old.mean.astype(dtype), batch.shift.astype(dtype)]),
        jnp.stack([old.residue.astype(dtype), delta.astype(dtype)]),
        jnp.stack([old.var, batch.var.astype(real)]),
    )
    merged = merge_centred(0, both)
    mean, residue = _two_sum(merged.shift, cast(jax.Array, merged.delta))
    return Measured(
        count=merged.count,
        mean=mean,
        var=merged.var,
        running_var_ddof=jnp.full_like(old.running_var_ddof, running_var_ddof),
        by_running=old.by_running + float(by_running),
        by_batch=old.by_batch + float(by_batch),
        left_out=old.left_out + jnp.where(sound, 0, count),
        residue=residue,
    )


def _two_sum(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded sum and, exactly, its rounding error (Knuth)."""
    total = first + second
    of_second = total - first
    return total, (first - (total - of_second)) + (second - of_second)
