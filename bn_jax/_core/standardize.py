"""``(x - mean) * rsqrt(var + epsilon) * scale + bias``, with its derivative derived by hand."""

from collections.abc import Callable, Mapping
from functools import partial, reduce
from math import prod
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, TypedDict, cast

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax._core.moments import centre, mean_dtype, unshared, varying_axes

Activation: TypeAlias = Callable[[jax.Array], jax.Array]


class Params(TypedDict, total=False):
    """The learned parameters, each of the shape of the features; either may be absent."""

    scale: jax.Array
    bias: jax.Array


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


@partial(jax.jit, static_argnums=0)
def standardize(
    dtype: Any, x: jax.Array, mask: jax.Array | None, transform: Transform
) -> jax.Array:
    """Computes ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``.

    The derivative is ``dy = multiplier * dx + (x - mean) * d multiplier + d offset``, where
    ``multiplier = scale * rsqrt(var + epsilon)`` and
    ``d offset = d bias - multiplier * d mean``: the two per-feature tangents are formed before
    they meet an array of the size of `x`, so that the transposed rule needs two reductions over
    the batch, ``sum(g)`` and ``sum(g * (x - mean))``, and one collective where x is sharded. Where
    the multiplier is as large as `x`, as in a layer norm, so would be its tangent: there the
    normalization is differentiated first, and scale and bias after it.

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
    dtype: Any, x: jax.Array, mask: jax.Array | None, transform: Transform
) -> jax.Array:
    y = centre(x, transform.shift, transform.delta) * _multiplier(transform)
    return (y if transform.bias is None else y + transform.bias).astype(dtype)


@_standardize.defjvp
def _standardize_jvp(
    dtype: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    x, mask, transform = primals
    dx, _, change = tangents
    relative = -0.5 * change.var_plus_epsilon / transform.var_plus_epsilon
    relative, d_mean = relative.astype(transform.delta.dtype), change.shift + change.delta
    in_turn = _has_large_multiplier(transform, x)
    if in_turn:
        multiplier = _inverse_deviation(transform)
        learned, tree = jax.tree.flatten((change.scale, change.bias))
        changes = _vary_together(x, relative, -multiplier * d_mean)
        changes += jax.tree.unflatten(tree, _vary_together(x, *learned))
    else:
        multiplier = _multiplier(transform)
        slope, offset = multiplier * relative, -multiplier * d_mean
        if transform.scale is not None:
            slope = slope + change.scale * _inverse_deviation(transform)
        if transform.bias is not None:
            offset = offset + change.bias
        changes = _vary_together(x, slope, offset)
    # Rematerialized, or a scan would keep the float32 deviation for the backward pass beside x.
    rule = jax.checkpoint(
        partial(_tangent_in_turn if in_turn else _tangent, dtype), prevent_cse=False
    )
    dy = rule(x, mask, transform, multiplier, dx, *changes)
    return standardize(dtype, x, mask, transform), dy


def _has_large_multiplier(transform: Transform, x: jax.Array) -> bool:
    """Tells whether scale and variance differ in shape and make a multiplier as large as x."""
    leaves = jax.tree.leaves(transform)
    size = prod(jnp.broadcast_shapes(*(leaf.shape for leaf in leaves)))
    return max(leaf.size for leaf in leaves) < size == x.size


def _tangent(
    dtype: Any,
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
    dtype: Any,
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
    """Returns ``x - mean``, where nothing enters zero instead of what is not finite."""
    deviation = centre(x, transform.shift, transform.delta)
    if mask is None:
        return deviation
    return jnp.where(mask.astype(bool) | jnp.isfinite(deviation), deviation, 0)


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
    names = varying_axes(like).difference(*map(varying_axes, values))
    if not names:
        return values
    shape = jnp.broadcast_shapes(*(value.shape for value in values))
    stacked = jnp.stack([jnp.broadcast_to(value, shape) for value in values])
    return tuple(lax.pcast(stacked, tuple(sorted(names)), to="varying"))


def make_transform(
    params: Params,
    shape: tuple[int, ...],
    shift: jax.Array,
    delta: jax.Array,
    var: jax.Array,
    epsilon: float | jax.Array,
) -> Transform:
    """Returns the transform by these moments; scale and bias get the shape, of the rank of x."""
    dtype = mean_dtype(var.dtype, delta.dtype, *(leaf.dtype for leaf in jax.tree.leaves(params)))
    own: Params = jax.tree.map(lambda leaf: leaf.astype(dtype).reshape(shape), params)
    return Transform(
        shift.astype(dtype),
        delta.astype(dtype),
        var + jnp.asarray(epsilon, var.dtype),
        own.get("scale"),
        own.get("bias"),
    )


def make_normalizer(
    dtype: Any,
    like: Any,
    mask: jax.Array | None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
) -> Callable[[jax.Array, jax.Array | None, Transform], jax.Array]:
    """Returns what takes examples, their mask and the transform to the output."""

    def normalize(examples: jax.Array, own_mask: jax.Array | None, by: Transform) -> jax.Array:
        y = reshape_like(like, standardize(dtype, examples, own_mask, by))
        return _finish(mask, activation, residual, y)

    # Rematerialized, a scan keeps x alone for the backward pass. With a residual it would have to
    # keep that too, of which a relu needs no more than a sign.
    if activation is None or residual is not None:
        return normalize
    return jax.checkpoint(normalize, prevent_cse=False)


def _finish(
    mask: jax.Array | None,
    activation: Activation | None,
    residual: jax.Array | None,
    y: jax.Array,
) -> jax.Array:
    """Adds the residual and applies the activation; a masked NaN has no derivative in them."""
    if residual is not None:
        y = y + residual.astype(y.dtype)
    if mask is None:
        return y if activation is None else activation(y)
    # The derivative of a NaN is NaN, and NaN times a cotangent of zero would reach the sums over
    # the batch: what is differentiated must not see it.
    usable = mask.astype(bool) | jnp.isfinite(y)
    if activation is None:
        return jnp.where(usable, y, lax.stop_gradient(y))
    unusable = lax.stop_gradient(activation(y))
    return jnp.where(usable, activation(jnp.where(usable, y, 0)), unusable)


def reshape_like(like: Any, values: jax.Array) -> jax.Array:
    """Returns `values` with shape and explicit sharding of `like`, the type of an array."""
    if values.shape == like.shape:
        return values
    explicit = any(names is not None for names in like.sharding.spec)
    return lax.reshape(values, like.shape, out_sharding=like.sharding if explicit else None)


def as_params(params: Mapping[str, Any]) -> Params:
    """Returns scale and bias as arrays, or raises the ValueError that says what else is there."""
    unknown = set(params) - {"scale", "bias"}
    if unknown:
        raise ValueError(
            f"params has the unknown entries {sorted(unknown)}; expected 'scale' and 'bias' or "
            "either: pass the parameters of this norm alone."
        )
    return cast(Params, {name: jnp.asarray(values) for name, values in params.items()})


def output_dtype(
    dtype: Any, x: jax.Array, params: Params, residual: jax.Array | None = None
) -> jnp.dtype:
    """Returns the dtype of y, or raises the TypeError that says why it cannot be that."""
    given = [leaf.dtype for leaf in jax.tree.leaves((x, params, residual))]
    if dtype is None:
        dtype = reduce(jnp.promote_types, given)
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"dtype={dtype.name} is not a floating-point dtype: pass for example "
            "dtype=jnp.float32, or None for that of x and params promoted."
        )
    if mean_dtype(dtype, *given) != dtype and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"dtype={dtype.name} would discard the imaginary part: x, params and residual have "
            f"the dtypes {[one.name for one in given]}. Pass dtype=jnp.complex64 or None."
        )
    return dtype


def check_features(
    name: str, given: Any, axes: tuple[int, ...], shape: tuple[int, ...], **trees: Mapping[str, Any]
) -> None:
    """Raises the ValueError that shows all shapes, where one is not that of the features."""
    features = tuple(shape[axis] for axis in axes)
    shapes = {
        tree: {leaf: jnp.shape(value) for leaf, value in leaves.items()}
        for tree, leaves in trees.items()
    }
    if any(own != features for leaves in shapes.values() for own in leaves.values()):
        raise ValueError(
            f"x of shape {shape} has features of shape {features} on {name}={given}, but "
            f"{' and '.join(f'{tree} has {leaves}' for tree, leaves in shapes.items())}. Pass the "
            "axis that holds the features, or make anew with "
            f"{' and '.join(f'bn_jax.init_{tree}({features})' for tree in trees)}."
        )


def check_epsilon(epsilon: Any) -> None:
    """Checks what is known while tracing; a traced epsilon is taken as it is."""
    if isinstance(epsilon, Real) and not float(epsilon) > 0:
        raise ValueError(f"epsilon={epsilon} must be positive: 1e-5 is usual.")
