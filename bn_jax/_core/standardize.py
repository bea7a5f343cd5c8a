"""``(x - mean) * rsqrt(var + epsilon) * scale + bias``, with its derivative derived by hand.

With ``m = scale * rsqrt(var + epsilon)``, the output is ``y = m * (x - mean) + bias``, and ::

    dy = m * dx + (x - mean) * dm + (dbias - m * dmean)
    dm = m * (-0.5 * dvar / (var + epsilon)) + dscale * rsqrt(var + epsilon)

`dm` and the last term have the shape of the features. Forming them before they meet an array of the
size of `x` leaves two reductions over the batch to the transposed rule, ``sum(g)`` and
``sum(g * (x - mean))``, and one collective where `x` is sharded. JAX's own derivative would keep
``x - mean`` and its normalized form, both of the size of `x`, for the backward pass; this one keeps
`x` alone and computes the deviation again.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from bn_jax._core.axes import reshape_like, vary_together
from bn_jax._core.checks import Inputs, RowInputs
from bn_jax._core.moments import centre, unshared
from bn_jax._core.types import Activation, Transform


@partial(jax.jit, static_argnums=0)
def standardize(
    dtype: DTypeLike, x: jax.Array, mask: jax.Array | None, transform: Transform
) -> jax.Array:
    """Computes ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``.

    Where scale and variance differ in shape and their product is as large as `x`, as in a layer
    norm, the normalization is differentiated first, and scale and bias after it.

    Args:
        dtype: the dtype of the result.
        x: floating point or complex, of any rank.
        mask: None, or boolean or weights of the rank of `x`: a value of `x` that is not finite
            sends no derivative to the parameters where the mask is zero.
        transform: the moments, scale and bias.

    Returns:
        The array `y`, of the shape of `x`.
    """
    return _standardize(dtype, x, mask, transform)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _standardize(
    dtype: DTypeLike, x: jax.Array, mask: jax.Array | None, transform: Transform
) -> jax.Array:
    y = centre(x, transform.shift, transform.delta) * _multiplier(transform)
    return (y if transform.bias is None else y + transform.bias).astype(dtype)


@_standardize.defjvp
def _standardize_jvp(
    dtype: DTypeLike, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    x, mask, transform = primals
    dx, _, change = tangents
    # 1. The relative change of rsqrt(var + epsilon), and the change of the mean.
    relative = -0.5 * change.var_plus_epsilon / transform.var_plus_epsilon
    relative, d_mean = relative.astype(transform.delta.dtype), change.shift + change.delta
    # 2. The changes of the size of the features. Where the multiplier is as large as x, so would be
    # its change: then those of the normalization and of scale and bias stay apart.
    multiplier_is_large = _has_large_multiplier(transform, x)
    if multiplier_is_large:
        factor = _inverse_deviation(transform)
        learned, tree = jax.tree.flatten((change.scale, change.bias))
        changes = vary_together(x, relative, -factor * d_mean)
        changes += jax.tree.unflatten(tree, vary_together(x, *learned))
    else:
        factor = _multiplier(transform)
        slope, offset = factor * relative, -factor * d_mean
        if transform.scale is not None:
            slope = slope + change.scale * _inverse_deviation(transform)
        if transform.bias is not None:
            offset = offset + change.bias
        changes = vary_together(x, slope, offset)
    # 3. They meet x. Rematerialized, or a scan would keep the float32 deviation for the backward
    # pass beside x.
    rule = _tangent_in_turn if multiplier_is_large else _tangent
    dy = jax.checkpoint(partial(rule, dtype), prevent_cse=False)(
        x, mask, transform, factor, dx, *changes
    )
    return standardize(dtype, x, mask, transform), dy


def _has_large_multiplier(transform: Transform, x: jax.Array) -> bool:
    """Tells whether scale and variance differ in shape and make a multiplier as large as x."""
    leaves = jax.tree.leaves(transform)
    # Of shapes, not of numbers of values: symbolic ones cannot be ordered.
    is_large = jnp.broadcast_shapes(*(leaf.shape for leaf in leaves)) == x.shape
    return is_large and all(leaf.shape != x.shape for leaf in leaves)


def _tangent(
    dtype: DTypeLike,
    x: jax.Array,
    mask: jax.Array | None,
    transform: Transform,
    multiplier: jax.Array,
    dx: jax.Array,
    slope: jax.Array,
    offset: jax.Array,
) -> jax.Array:
    deviation = _deviation(*unshared((x, mask, transform)))
    dy = multiplier * dx.astype(multiplier.dtype) + deviation * slope + offset
    return dy.astype(dtype)


def _tangent_in_turn(
    dtype: DTypeLike,
    x: jax.Array,
    mask: jax.Array | None,
    transform: Transform,
    inverse_deviation: jax.Array,
    dx: jax.Array,
    relative: jax.Array,
    offset: jax.Array,
    d_scale: jax.Array | None,
    d_bias: jax.Array | None,
) -> jax.Array:
    """Differentiates the normalization, and then scale and bias, as in a layer norm."""
    normalized = _deviation(x, mask, transform) * inverse_deviation
    factor, scale = unshared((inverse_deviation, transform.scale))
    dy = factor * dx.astype(offset.dtype) + normalized * relative + offset
    if scale is not None and d_scale is not None:
        dy = dy * scale + normalized * d_scale
    if d_bias is not None:
        dy = dy + d_bias
    return dy.astype(dtype)


def _deviation(x: jax.Array, mask: jax.Array | None, transform: Transform) -> jax.Array:
    """Returns ``x - mean``, with zero for what is masked and not finite."""
    deviation = centre(x, transform.shift, transform.delta)
    if mask is None:
        return deviation
    return jnp.where(mask.astype(bool) | jnp.isfinite(deviation), deviation, 0)


def _multiplier(transform: Transform) -> jax.Array:
    inverse_deviation = _inverse_deviation(transform)
    return inverse_deviation if transform.scale is None else inverse_deviation * transform.scale


def _inverse_deviation(transform: Transform) -> jax.Array:
    return lax.rsqrt(transform.var_plus_epsilon).astype(transform.delta.dtype)


def make_transform(
    inputs: Inputs | RowInputs,
    shape: tuple[int, ...],
    shift: jax.Array,
    delta: jax.Array,
    var: jax.Array,
) -> Transform:
    """Returns the transform by these moments; scale and bias get `shape`, of the rank of x."""
    dtype, epsilon = inputs.transform_dtype, inputs.options.epsilon
    scale, bias = inputs.params.get("scale"), inputs.params.get("bias")
    return Transform(
        shift=shift.astype(dtype),
        delta=delta.astype(dtype),
        var_plus_epsilon=var + jnp.asarray(epsilon, var.dtype),
        scale=None if scale is None else scale.astype(dtype).reshape(shape),
        bias=None if bias is None else bias.astype(dtype).reshape(shape),
    )


def normalize(
    inputs: Inputs, examples: jax.Array, mask: jax.Array | None, transform: Transform
) -> jax.Array:
    """Standardizes, adds the residual and applies the activation.

    Args:
        inputs: the checked arguments of the call.
        examples: its `x`, or that in groups of examples.
        mask: the mask of the examples, of their rank.
        transform: of the rank of the examples.

    Returns:
        `y`, of the shape of `x`.
    """
    activation, residual = inputs.options.activation, inputs.residual

    def compute(
        examples: jax.Array, examples_mask: jax.Array | None, transform: Transform
    ) -> jax.Array:
        y = standardize(inputs.y_dtype, examples, examples_mask, transform)
        if y.shape != inputs.x.shape:
            y = reshape_like(jax.typeof(inputs.x), y)
        return finish(y, inputs.mask, activation, residual)

    # Rematerialized, a scan keeps x alone for the backward pass. With a residual it would have to
    # keep that too, of which a relu needs no more than a sign.
    if activation is not None and residual is None:
        compute = jax.checkpoint(compute, prevent_cse=False)
    return compute(examples, mask, transform)


def finish(
    y: jax.Array,
    mask: jax.Array | None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Adds the residual and applies the activation, so that a masked NaN has no derivative.

    The derivative of a NaN is NaN, and NaN times a cotangent of zero would reach the sums over the
    batch. So what is differentiated must not see it.

    Args:
        y: the normalized array.
        mask: None, or boolean or weights of the rank of `y`.
        activation: an elementwise function, or None.
        residual: an array of the shape of `y`, or None.

    Returns:
        ``activation(y + residual)``.
    """
    if residual is not None:
        y = y + residual.astype(y.dtype)
    if mask is None:
        return y if activation is None else activation(y)
    usable = mask.astype(bool) | jnp.isfinite(y)
    if activation is None:
        return jnp.where(usable, y, lax.stop_gradient(y))
    unusable = lax.stop_gradient(activation(y))
    return jnp.where(usable, activation(jnp.where(usable, y, 0)), unusable)
