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

import operator
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from bn_jax._core.axes import Reduction, reshape_like, vary_together
from bn_jax._core.blocks import spread_together
from bn_jax._core.checks import Inputs, RowInputs
from bn_jax._core.domains import Domains, own_moments, place, spread, spread_change, spread_changes
from bn_jax._core.moments import (
    CentredMoments,
    MomentChanges,
    measure,
    moment_changes,
    moments_rule,
    name_moments,
    unless_zero,
)
from bn_jax._core.sums import centre_by, keep_valid, unshared
from bn_jax._core.types import Activation, Transform


@partial(jax.jit, static_argnums=0)
def standardize(
    dtype: DTypeLike,
    x: jax.Array,
    mask: jax.Array | None,
    transform: Transform,
    domains: Domains | None = None,
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
        domains: the domains of the examples, where the transform holds tables.

    Returns:
        The array `y`, of the shape of `x`.
    """
    return _standardize(dtype, x, mask, transform, domains)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _standardize(
    dtype: DTypeLike,
    x: jax.Array,
    mask: jax.Array | None,
    transform: Transform,
    domains: Domains | None = None,
) -> jax.Array:
    return _apply(dtype, x, transform, domains)


def _apply(
    dtype: DTypeLike, x: jax.Array, transform: Transform, domains: Domains | None = None
) -> jax.Array:
    multiplier, bias = _multiplier(transform), transform.bias
    if domains is not None:
        multiplier = spread(domains, multiplier)
        bias = None if bias is None else spread(domains, bias)
    y = centre_by(domains, x, transform.shift, transform.delta) * multiplier
    return (y if bias is None else y + bias).astype(dtype)


@partial(_standardize.defjvp, symbolic_zeros=True)
def _standardize_jvp(
    dtype: DTypeLike, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    x, mask, transform, domains = primals
    dx, (d_shift, d_delta, d_var, *d_learned) = (
        unless_zero(tangents[0]),
        map(unless_zero, tangents[2]),
    )
    d_half_var = None if d_var is None else 0.5 * d_var
    change = Change(_sum_of(d_shift, d_delta), d_half_var, *d_learned)

    def differentiate(
        x: jax.Array,
        mask: jax.Array | None,
        transform: Transform,
        domains: Domains | None,
        dx: jax.Array | None,
        change: Change,
    ) -> jax.Array:
        alone, valid, shift, delta = unshared((x, mask, transform.shift, transform.delta))
        deviation = centre_by(domains, alone, shift, delta)
        usable = None if valid is None else _usable(deviation, valid, transform, domains)
        return _change_of_y(dtype, deviation, transform, dx, change, domains, usable)

    # Rematerialized, or a scan would keep the float32 deviation for the backward pass beside x.
    differentiate = jax.checkpoint(differentiate, prevent_cse=False)
    dy = differentiate(x, mask, transform, domains, dx, change)
    return standardize(dtype, x, mask, transform, domains), dy


class Change(NamedTuple):
    """The changes of the mean, half the variance, scale and bias; None where there is none."""

    mean: jax.Array | None
    half_var: jax.Array | None
    scale: jax.Array | None
    bias: jax.Array | None


class Learned(NamedTuple):
    """Scale and bias, of the rank of x, each None where there is none."""

    scale: jax.Array | None
    bias: jax.Array | None


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def standardize_by_moments(
    reduction: Reduction,
    dtype: DTypeLike,
    x: jax.Array,
    shift: jax.Array,
    learned: Learned,
    epsilon: jax.Array,
    domains: Domains | None = None,
) -> tuple[jax.Array, CentredMoments]:
    """Standardizes x by its moments, and differentiates both at once.

    `centred_moments` and `standardize` after each other compute the same. Their derivatives, one
    after the other, would read x twice, and round the two parts of that by x to the dtype of x
    before they are added.

    Args:
        reduction: what to reduce over, and how; no `vmap` binds its axes.
        dtype: the dtype of y.
        x: floating point or complex, not empty.
        shift: as in `centred_moments`.
        learned: scale and bias.
        epsilon: a scalar in the dtype of the variance.
        domains: the domains of the examples; what there is for each feature is in tables then.

    Returns:
        `y`, of the shape of x, and the moments.
    """
    measured_by = None if domains is None else own_moments(domains)
    measured = measure(reduction, x, None, shift, measured_by)
    transform = _transform_by(measured, learned, epsilon)
    return _apply(dtype, x, transform, domains), measured


@partial(standardize_by_moments.defjvp, symbolic_zeros=True)
def _standardize_by_moments_jvp(
    reduction: Reduction, dtype: DTypeLike, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[jax.Array, CentredMoments], tuple[jax.Array, CentredMoments]]:
    x, shift, learned, epsilon, domains = primals
    dx, _, d_learned, d_epsilon = tangents[:4]
    measured_by = None if domains is None else own_moments(domains)
    # One after the other, so that a policy that keeps the moments computes y alone again.
    measured = moments_rule(reduction, x, None, shift, measured_by)
    measured = name_moments(measured, None, measured_by)
    transform = _transform_by(measured, learned, epsilon)
    y = _standardize(dtype, x, None, transform, domains)

    def differentiate(
        x: jax.Array,
        measured: CentredMoments,
        learned: Learned,
        epsilon: jax.Array,
        domains: Domains | None,
        dx: jax.Array | None,
        d_learned: Learned,
        d_epsilon: jax.Array | None,
    ) -> tuple[jax.Array, MomentChanges]:
        centred_at = unshared((x, measured.shift, measured.delta))
        measured_by = None if domains is None else own_moments(domains)
        deviation = centre_by(measured_by, *centred_at)
        changes = moment_changes(reduction, deviation, None, measured, dx, None, measured_by)
        d_half_var = changes.half_var if d_epsilon is None else changes.half_var + 0.5 * d_epsilon
        change = Change(changes.mean, d_half_var, *d_learned)
        if domains is not None:
            measured, learned = unshared((measured, learned))
        transform = _transform_by(measured, learned, epsilon)
        # On a CPU the sums and the result each compute it; elsewhere they share it.
        deviation = centre_by(measured_by, *unshared(centred_at))
        return _change_of_y(dtype, deviation, transform, dx, change, domains), changes

    differentiate = jax.checkpoint(differentiate, prevent_cse=False)
    changes = (unless_zero(dx), Learned(*map(unless_zero, d_learned)), unless_zero(d_epsilon))
    dy, d_moments = differentiate(x, measured, learned, epsilon, domains, *changes)
    return (y, measured), (dy, d_moments.of(measured))


def _transform_by(measured: CentredMoments, learned: Learned, epsilon: jax.Array) -> Transform:
    return Transform(measured.shift, measured.delta, measured.var + epsilon, *learned)


def _change_of_y(
    dtype: DTypeLike,
    deviation: jax.Array,
    transform: Transform,
    dx: jax.Array | None,
    change: Change,
    domains: Domains | None = None,
    usable: jax.Array | None = None,
) -> jax.Array:
    """Returns dy, by the formulas at the head of this file.

    A mask may hide values whose y is not finite. There the cotangent may be NaN, and nothing of it
    may reach a sum.

    Args:
        dtype: the dtype of y.
        deviation: ``x - mean``.
        transform: the transform.
        dx: the change of x, or None.
        change: the changes of what the transform is made of.
        domains: the domains of the examples, where the transform holds tables.
        usable: where there is a mask, the values that have a derivative.
    """
    deviation = keep_valid(deviation, usable)
    if domains is None and _has_large_multiplier(transform, deviation):
        dy = _change_in_turn(deviation, transform, dx, change)
        return keep_valid(_as_change(dtype, deviation, dy), usable)
    # 1. What changes of the size of the features.
    multiplier = inverse_deviation = _inverse_deviation(transform)
    if transform.scale is not None:
        multiplier = multiplier * transform.scale
    relative = _relative_change(transform, change)
    slope = _sum_of(
        None if relative is None else multiplier * relative,
        None if change.scale is None else change.scale * inverse_deviation,
    )
    offset = _sum_of(None if change.mean is None else -multiplier * change.mean, change.bias)
    slope, offset = vary_together(deviation, slope, offset)
    # 2. It meets x.
    multiplier = spread(domains, multiplier)
    slope, offset = _spread_both(deviation, slope, offset, domains, is_masked=usable is not None)
    if domains is not None and not domains.selects:
        # The transpose sums over the examples of all domains, with zeros for those of others.
        deviation = jnp.where(jnp.isfinite(deviation), deviation, 0)
    dy = _sum_of(
        None if dx is None else multiplier * dx.astype(multiplier.dtype),
        None if slope is None else deviation * slope,
        offset,
    )
    return keep_valid(_as_change(dtype, deviation, dy), usable)


def _spread_both(
    deviation: jax.Array,
    slope: jax.Array | None,
    offset: jax.Array | None,
    domains: Domains | None,
    *,
    is_masked: bool,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns slope and offset for every example, or so that they broadcast to all of them."""
    if slope is not None and offset is not None:
        if domains is not None:
            return spread_changes(domains, deviation, slope, offset)
        if is_masked:
            return spread_together(deviation, slope, offset)
    if domains is None:
        return slope, offset
    slope, offset = (
        None if one is None else spread_change(domains, one) for one in (slope, offset)
    )
    return slope, offset


def _relative_change(transform: Transform, change: Change) -> jax.Array | None:
    """Returns the relative change of ``rsqrt(var + epsilon)``."""
    if change.half_var is None:
        return None
    relative = -change.half_var / transform.var_plus_epsilon
    return relative.astype(transform.shift.dtype)


def _change_in_turn(
    deviation: jax.Array, transform: Transform, dx: jax.Array | None, change: Change
) -> jax.Array | None:
    """Differentiates the normalization, and then scale and bias, as in a layer norm.

    The multiplier is as large as x, and so would be its change.
    """
    factor = _inverse_deviation(transform)
    offset = None if change.mean is None else -factor * change.mean
    relative, offset, d_scale, d_bias = vary_together(
        deviation, _relative_change(transform, change), offset, change.scale, change.bias
    )
    normalized = deviation * factor
    factor, scale = unshared((factor, transform.scale))
    dy = _sum_of(
        None if dx is None else factor * dx.astype(factor.dtype),
        None if relative is None else normalized * relative,
        offset,
    )
    if dy is not None and scale is not None:
        dy = dy * scale
    return _sum_of(dy, None if d_scale is None else normalized * d_scale, d_bias)


def _usable(
    deviation: jax.Array, mask: jax.Array, transform: Transform, domains: Domains | None
) -> jax.Array:
    """Tells which values are valid, or finite when they are normalized.

    Without the bias: what is the same as y, a GPU would share with the forward pass, and keep.
    """
    multiplier = spread(domains, _multiplier(transform))
    return mask.astype(bool) | jnp.isfinite(deviation * multiplier)


def _sum_of(*terms: jax.Array | None) -> jax.Array | None:
    """Sums what is there; None where nothing is."""
    present = [term for term in terms if term is not None]
    return reduce(operator.add, present) if present else None


def _as_change(dtype: DTypeLike, deviation: jax.Array, dy: jax.Array | None) -> jax.Array:
    if dy is None:
        return jnp.zeros_like(deviation, dtype)
    dy = dy.astype(dtype)
    return dy if dy.shape == deviation.shape else jnp.broadcast_to(dy, deviation.shape)


def _has_large_multiplier(transform: Transform, x: jax.Array) -> bool:
    """Tells whether scale and variance differ in shape and make a multiplier as large as x."""
    leaves = jax.tree.leaves(transform)
    # Of shapes, not of numbers of values: symbolic ones cannot be ordered.
    is_large = jnp.broadcast_shapes(*(leaf.shape for leaf in leaves)) == x.shape
    return is_large and all(leaf.shape != x.shape for leaf in leaves)


def _multiplier(transform: Transform) -> jax.Array:
    inverse_deviation = _inverse_deviation(transform)
    return inverse_deviation if transform.scale is None else inverse_deviation * transform.scale


def _inverse_deviation(transform: Transform) -> jax.Array:
    return lax.rsqrt(transform.var_plus_epsilon).astype(transform.shift.dtype)


def learned_by(inputs: Inputs | RowInputs, shape: tuple[int, ...]) -> Learned:
    """Returns scale and bias in `shape`, of the rank of x."""
    arrays = inputs.params.get("scale"), inputs.params.get("bias")
    dtype, axes = inputs.transform_dtype, inputs.feature_axes
    return Learned(
        *(
            None
            if array is None
            else array.astype(dtype).reshape(shape)
            if inputs.domains is None
            else place(inputs.domains, array.astype(dtype), axes, shape)
            for array in arrays
        )
    )


def make_transform(
    inputs: Inputs | RowInputs,
    shape: tuple[int, ...],
    shift: jax.Array,
    delta: jax.Array | None,
    var: jax.Array,
) -> Transform:
    """Returns the transform by these moments; scale and bias get `shape`, of the rank of x."""
    dtype = inputs.transform_dtype
    return Transform(
        shift.astype(dtype),
        None if delta is None else delta.astype(dtype),
        var + jnp.asarray(inputs.epsilon, var.dtype),
        *learned_by(inputs, shape),
    )


def normalize(
    inputs: Inputs,
    examples: jax.Array,
    mask: jax.Array | None,
    transform: Transform,
    domains: Domains | None = None,
) -> jax.Array:
    """Standardizes, adds the residual and applies the activation.

    Args:
        inputs: the checked arguments of the call.
        examples: its `x`, or that in groups of examples.
        mask: the mask of the examples, of their rank.
        transform: of the rank of the examples.
        domains: the domains of the examples, where the transform holds tables.

    Returns:
        `y`, of the shape of `x`.
    """

    def compute(
        examples: jax.Array,
        examples_mask: jax.Array | None,
        transform: Transform,
        domains: Domains | None,
    ) -> jax.Array:
        y = standardize(inputs.y_dtype, examples, examples_mask, transform, domains)
        return complete(inputs, y)

    if keeps_input_alone(inputs):
        compute = jax.checkpoint(compute, prevent_cse=False)
    return compute(examples, mask, transform, domains)


def keeps_input_alone(inputs: Inputs) -> bool:
    """Tells whether the activation is rematerialized, so that a scan keeps x alone.

    With a residual it would have to keep that too, of which a relu needs no more than a sign.
    """
    return inputs.activation is not None and inputs.residual is None


def complete(inputs: Inputs, y: jax.Array) -> jax.Array:
    """Gives standardized examples the shape of x, and adds the residual and the activation."""
    if y.shape != inputs.x.shape:
        y = reshape_like(jax.typeof(inputs.x), y)
    if inputs.activation is None and inputs.residual is None:
        # The derivative of `standardize` knows the mask.
        return y
    return finish(y, inputs.mask, inputs.activation, inputs.residual)


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
