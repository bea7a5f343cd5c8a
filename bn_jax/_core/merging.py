"""Merging moments of disjoint sets: micro-batches, groups of examples, what was measured before."""

import jax.numpy as jnp
from jax import lax

from bn_jax._core.moments import (
    CentredMoments,
)
from bn_jax._core.sums import (
    absolute_square,
    centre,
)
from bn_jax._core.types import Moments


def merge_moments(first: Moments, *others: Moments) -> Moments:
    """Merges the moments of disjoint sets into the moments of their union.

    Exact up to rounding, as if computed on the concatenation (Chan, Golub & LeVeque 1983):
    ``mean = sum(n_i * mean_i) / n`` and
    ``var = sum(n_i * (var_i + (mean_i - mean)**2)) / n`` with ``n = sum(n_i)``.
    A set whose count is 0 contributes nothing, whatever its mean and variance.

    Args:
        first: the moments of one set, each array of shape ``[*F]``; the count may be a scalar.
        *others: the moments of the other sets, of the same feature shape.

    Returns:
        The `Moments` of the union.

    Raises:
        ValueError: means and variances differ in shape, or a count is neither a scalar nor of it.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> x = jnp.arange(6.0)
        >>> merged = bn.merge_moments(bn.moments(x[:1]), bn.moments(x[1:]))
        >>> jnp.allclose(merged.var, bn.moments(x).var)
        Array(True, dtype=bool)
    """
    sets = (first, *others)
    feature_shape = jnp.shape(first.mean)
    for part in sets:
        of_count, of_mean, of_var = map(jnp.shape, part)
        if not of_mean == of_var == feature_shape or of_count not in ((), feature_shape):
            raise ValueError(
                f"moments of the shapes {[tuple(map(jnp.shape, part)) for part in sets]} (count, "
                "mean, var) cannot be merged: expected one shape for all, or a scalar count. "
                "Take them over the same axes, or broadcast them yourself."
            )
    counts_shape = jnp.broadcast_shapes(*(jnp.shape(part.count) for part in sets))
    count = jnp.stack([jnp.broadcast_to(part.count, counts_shape) for part in sets])
    mean = jnp.stack([jnp.broadcast_to(part.mean, feature_shape) for part in sets])
    var = jnp.stack([jnp.broadcast_to(part.var, feature_shape) for part in sets])
    if not counts_shape:
        count = count.reshape((len(sets),) + (1,) * len(feature_shape))
    merged = merge_centred(0, CentredMoments(count, mean, jnp.zeros_like(mean), var)).rounded()
    return merged._replace(count=merged.count.reshape(counts_shape))


def merge_centred(axis: int, parts: CentredMoments) -> CentredMoments:
    """Merges moments that are stacked along an axis; `merge_moments` has the formula."""
    counts_shape = list(parts.count.shape)
    counts_shape[axis] = parts.var.shape[axis]
    counts = jnp.broadcast_to(parts.count, counts_shape)
    present = counts > 0
    shift = jnp.where(present, parts.shift, 0)
    delta = jnp.zeros_like(shift) if parts.delta is None else jnp.where(present, parts.delta, 0)
    part_var = jnp.where(present, parts.var, 0)
    count = jnp.sum(counts, axis, keepdims=True)
    total = jnp.sum(counts.astype(shift.dtype) * (shift + delta), axis, keepdims=True)
    # This estimate is off by some units in the last place of the mean, which sums around it find.
    # Two sums after two, and so two collectives where the parts lie on several devices.
    divisor = jnp.where(count > 0, count, 1)
    estimate = total / divisor.astype(total.dtype)
    share = counts / divisor
    deviation = jnp.where(present, centre(shift, estimate, -delta), 0)
    error = jnp.sum(share.astype(deviation.dtype) * deviation, axis, keepdims=True)
    square = jnp.sum(share * (part_var + absolute_square(deviation)), axis, keepdims=True)
    var = jnp.maximum(square - absolute_square(error), 0)
    return CentredMoments(*(lax.squeeze(leaf, (axis,)) for leaf in (count, estimate, error, var)))
