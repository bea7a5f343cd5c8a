"""``(x - mean) * rsqrt(var + epsilon) * scale + bias``, with its derivative derived by hand."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax.moments import centre, varying_axes


class Transform(NamedTuple):
    """What standardizing needs besides x, every array of the rank of x.

    The variance is real; the others are of one dtype, complex if `x` or a parameter is.

    Attributes:
        shift: the larger part of the mean.
        delta: the rest of the mean, kept apart so that no rounding of the mean is left in y.
        var_plus_epsilon: the variance plus epsilon.
        scale: the factor after normalization, or None for 1.
        bias: the summand after normalization, or None for 0.
    """

    shift: jax.Array
    delta: jax.Array
    var_plus_epsilon: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def standardize(
    dtype: Any, x: jax.Array, mask: jax.Array | None, transform: Transform
) -> jax.Array:
    """Computes ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``.

    The derivative is ``dy = multiplier * dx + (x - mean) * d multiplier + d offset``, where
    ``multiplier = scale * rsqrt(var + epsilon)`` and
    ``d offset = d bias - multiplier * d mean``: the two per-feature tangents are formed before
    they meet an array of the size of `x`, so that the transposed rule needs two reductions over
    the batch, ``sum(g)`` and ``sum(g * (x - mean))``, and one collective where x is sharded.

    Args:
        dtype: the dtype of the result.
        x: floating point or complex, of any rank.
        mask: None, or boolean or weights of the rank of `x`: a value of `x` that is not finite
            sends no derivative to the parameters where the mask is zero.
        transform: the moments, scale and bias.

    Returns:
        The array `y`, of the shape of `x`.
    """
    y = centre(x, transform.shift, transform.delta) * _multiplier(transform)
    return (y if transform.bias is None else y + transform.bias).astype(dtype)


@standardize.defjvp
def _standardize_jvp(
    dtype: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    x, mask, transform = primals
    dx, _, change = tangents
    multiplier = _multiplier(transform)
    relative = -0.5 * change.var_plus_epsilon / transform.var_plus_epsilon
    slope = multiplier * relative.astype(multiplier.dtype)
    if transform.scale is not None:
        slope = slope + change.scale * _inverse_deviation(transform)
    offset = -multiplier * (change.shift + change.delta)
    if transform.bias is not None:
        offset = offset + change.bias
    slope, offset = _vary_together(x, slope, offset)
    # Rematerialized, or a scan would keep the float32 deviation for the backward pass beside x.
    tangent = jax.checkpoint(partial(_tangent, dtype), prevent_cse=False)
    dy = tangent(x, mask, transform.shift, transform.delta, dx, multiplier, slope, offset)
    return standardize(dtype, x, mask, transform), dy


def _tangent(
    dtype: Any,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
    delta: jax.Array,
    dx: jax.Array,
    multiplier: jax.Array,
    slope: jax.Array,
    offset: jax.Array,
) -> jax.Array:
    deviation = centre(x, shift, delta)
    if mask is not None:
        deviation = jnp.where(mask.astype(bool) | jnp.isfinite(deviation), deviation, 0)
    dy = multiplier * dx.astype(multiplier.dtype) + deviation * slope + offset
    return dy.astype(dtype)


def _multiplier(transform: Transform) -> jax.Array:
    inverse_deviation = _inverse_deviation(transform)
    return inverse_deviation if transform.scale is None else inverse_deviation * transform.scale


def _inverse_deviation(transform: Transform) -> jax.Array:
    return lax.rsqrt(transform.var_plus_epsilon).astype(transform.delta.dtype)


def _vary_together(like: jax.Array, *values: jax.Array) -> tuple[jax.Array, ...]:
    """Marks per-feature values as varying over the mesh axes that `like` varies over.

    The transpose of that mark is a psum. Marking the stacked values makes it a single one, where
    JAX would insert one for each value as it meets `like`.
    """
    names = varying_axes(like)
    for value in values:
        names = names - varying_axes(value)
    if not names:
        return values
    shape = jnp.broadcast_shapes(*(value.shape for value in values))
    stacked = jnp.stack([jnp.broadcast_to(value, shape) for value in values])
    return tuple(lax.pcast(stacked, tuple(sorted(names)), to="varying"))
