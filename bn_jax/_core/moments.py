"""Count, mean and variance of an array: masked, guarded against cancellation, merged exactly.

One pass over ``x`` collects ``sum(x - shift)`` and ``sum((x - shift)**2)`` around a ``shift`` that
does not depend on the batch (a batch norm passes its running mean). With ``delta`` the mean of
``x - shift``, the variance is ``mean((x - shift)**2) - delta**2``. The subtraction cancels when
``delta**2`` is large against the variance: both sums carry a relative rounding error ``e``, so the
variance carries ``e * (1 + 3 * delta**2 / var)``. Compilers sum in a tree, whose ``e`` grows with
the logarithm of the length. With ``e = 2 ** -22``, four roundings, ``delta**2 <= 10 * var`` bounds
the relative error of the variance by 31 * 2 ** -22 = 7.4e-6.

Where some feature exceeds that, or its squares overflow, and only then, `x` is measured again: the
mean around the mean that the first pass found, and then both sums around the mean so corrected. It
takes the two steps, because the first mean is off by its own rounding, ``e * |mean - shift|``. For
a feature with ``|mean - shift| <= 1e6`` standard deviations that leaves ``delta`` within 0.3 of
one, and one step would do. But against a spread far below the rounding of the mean, and against
that of a constant, which is zero, it would be large. The second step's mean is right to the last
place of `x`, so that the variance of a constant is zero.

So, for float32 input: the relative error of the variance is under 1e-5 at any mean up to 1e6
standard deviations from the shift, however far that is from zero, and at any length up to 1e7 (what
was measured). Two limits come from the format. Squares under its smallest normal number vanish:
an absolute error of the variance of up to twice that, 2.4e-38. A variance beyond its largest number
is infinite, and so is a mean whose sum is: such a batch counts as not finite.

Groups that may lie on different devices (the norms without state, ghost batch norm) cannot share
such a decision: they are always measured twice, around zero and around their own means. Their means
are within 1e7 standard deviations of zero, because no format resolves more.

The centre stays the unevaluated sum ``shift + delta``: rounding it to one float would leave half a
unit in the last place of the mean (5e-4 at a mean of 1e4) in every output.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from bn_jax._compat import varying_axes
from bn_jax._core.axes import (
    Reduction,
    agree,
    all_reduce,
    as_numbers,
    make_common,
    make_reduction,
    sharding_of_groups,
    split_axis,
    static_count,
    vary_over,
)
from bn_jax._core.checkpoint_names import MOMENTS_NAME, named
from bn_jax._core.checks import (
    as_floating,
    as_mask,
    canonical_axes,
    mean_dtype,
    statistics_dtype,
)
from bn_jax._core.types import (
    AxisIndexGroups,
    AxisName,
    Moments,
)

Sums: TypeAlias = tuple[jax.Array, ...]
Values = TypeVar("Values")

# How many variances `delta**2` may be before x is measured again; the derivation is above.
CANCELLATION_THRESHOLD = 10.0
# A variance this small against `delta**2` is the rounding of a constant.
CONSTANT_THRESHOLD = 2.0**-20
# What squares that overflow are measured in. A power of two: multiplying by it rounds nothing.
OVERFLOW_UNIT = 2.0**-40


class CentredMoments(NamedTuple):
    """Moments of the rank of x whose mean is the unevaluated sum ``shift + delta``."""

    count: jax.Array  # type: ignore[assignment]
    shift: jax.Array
    delta: jax.Array
    var: jax.Array

    def rounded(self) -> Moments:
        """Returns the moments with the mean as one number."""
        return Moments(self.count, self.shift + self.delta, self.var)


def moments(
    x: jax.Array,
    axes: int | Sequence[int] | None = None,
    *,
    mask: jax.Array | None = None,
    shift: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> Moments:
    """Computes count, mean and biased variance over some axes, guarded against cancellation.

    ``mean = sum(w * x) / count``, ``var = sum(w * |x - mean|**2) / count``, ``count = sum(w)``,
    with ``w`` the mask (1 everywhere without one), summed over `axes` and over `axis_name`.

    The sums are taken in one pass around `shift`: ``var = mean((x - shift)**2) - delta**2`` with
    ``delta = mean(x - shift)``. That subtraction loses digits where ``delta**2`` is large against
    the variance. Where some feature has ``delta**2 > 10 * var``, `x` is measured again around the
    mean. So the relative error of the variance of float32 input is under 1e-5 for any mean up to
    1e6 standard deviations from `shift`. The file ``bn_jax/_core/moments.py`` derives the bound.

    Args:
        x: a floating-point or complex array. Half precision is accumulated in float32.
        axes: the axes to reduce over; all of them by default.
        mask: boolean or weights, broadcastable to `x`. Where it is zero or False, values do not
            enter, even if `x` is NaN there, and have no derivative. A weight that is negative or
            not finite is an error where it is known, and counts as 0 where it is traced;
            `batch_norm` has the rules.
        shift: a guess of the mean, of the shape of the result, the same on every device of
            `axis_name`. The better it is, the rarer is the second pass. Zero by default.
        axis_name: the named axis or axes (`shard_map`, `pmap`, `vmap`) to reduce over as well.
            `batch_norm` says what holds where none of these binds it.
        axis_index_groups: groups of indices of `axis_name`; each group has its own moments.

    Returns:
        `Moments` of `x` without the reduced axes, in float32 (float64 for double precision). The
        mean of complex `x` is complex.

    Raises:
        TypeError: `x` is integer or boolean.
        ValueError: `axes` or `mask` do not fit `x`, or there are `axis_index_groups` of an axis
            that is not bound.
        NameError: `axis_name` is not bound, but other axes are.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> m = bn.moments(jnp.array([[1.0, 5.0], [3.0, 5.0]]), axes=0)
        >>> m.count, m.mean, m.var
        (Array(2., dtype=float32), Array([2., 5.], dtype=float32), Array([1., 0.], dtype=float32))
    """
    x = as_floating("x", x)
    axes = canonical_axes("axes", tuple(range(x.ndim)) if axes is None else axes, x.ndim)
    mask = None if mask is None else as_mask(mask, x.shape)
    reduction = make_reduction(x, axes, axis_name, axis_index_groups)
    kept_shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    dtype = mean_dtype(statistics_dtype(x.dtype), x.dtype)
    start = jnp.zeros(kept_shape, dtype) if shift is None else jnp.asarray(shift, dtype)
    measured = centred_moments(reduction, x, mask, start.reshape(kept_shape))
    count = measured.count.reshape(()) if measured.count.size == 1 else measured.count
    if count.ndim:
        count = lax.squeeze(jnp.broadcast_to(count, kept_shape), axes)
    mean = jnp.where(measured.count > 0, measured.shift + measured.delta, 0)
    return Moments(count, lax.squeeze(mean, axes), lax.squeeze(measured.var, axes))


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
    delta = jnp.where(present, parts.delta, 0)
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
    merged = CentredMoments(count, estimate, error, var)
    return CentredMoments(*(lax.squeeze(leaf, (axis,)) for leaf in merged))


@partial(jax.jit, static_argnums=0)
def centred_moments(
    reduction: Reduction, x: jax.Array, mask: jax.Array | None, shift: jax.Array
) -> CentredMoments:
    """Computes guarded moments; every array keeps the rank of `x`.

    In reverse and in forward mode the derivative is ``d mean = mean(dx)`` and
    ``d var = 2 * mean(real(dx * conj(x - mean)))``. A change of the weights adds
    ``sum(dw * (x - mean)) / count`` and ``sum(dw * (|x - mean|**2 - var)) / count``. All of
    ``d mean`` is carried by `delta`; `shift` is a constant.

    Args:
        reduction: what to reduce over.
        x: floating point or complex.
        mask: None, boolean or weights, of the rank of `x`.
        shift: of the rank of `x`, in the dtype of the mean, the same on every device of
            `axis_name` (only type-checked `shard_map` can tell, and then it is made so).

    Returns:
        `CentredMoments`; where nothing entered, `delta` and `var` are 0.
    """
    # Compiled as one function, so that an eager call does not compile the guard's branches again,
    # and norms of one shape are traced, differentiated and lowered once.
    return _centred_moments(reduction, x, mask, shift)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _centred_moments(
    reduction: Reduction, x: jax.Array, mask: jax.Array | None, shift: jax.Array
) -> CentredMoments:
    shift = make_common(reduction, shift)
    # 1. One pass over x, around the shift; groups begin around zero.
    start = None if reduction.of_groups else shift
    total, square = _local_sums(reduction, shift.dtype, x, mask, start)
    if reduction.about_zero:
        count, square = _counted(reduction, x, mask, (square,))
        var = _divide(square, _divisor(reduction, x, mask, count))
        return CentredMoments(count, shift, jnp.zeros_like(var, shift.dtype), var)
    count, total, square = _counted(reduction, x, mask, (total, square))
    divisor = _divisor(reduction, x, mask, count)
    if reduction.of_groups:
        first = _GroupSums(count, total, square, divisor)
        return _measure_groups(reduction, x, mask, shift, first)
    delta, var = _delta_and_var((total, square), divisor)
    # 2. The guard: one predicate for all features. It comes from sums over all devices, so that
    # every device takes the same branch.
    refine = agree(reduction, jnp.any(cancels(delta, var)))

    def measure_again(x: jax.Array, mask: jax.Array | None, shift: jax.Array) -> Sums:
        unit = jnp.where(jnp.isfinite(var), jnp.ones_like(var), OVERFLOW_UNIT)
        # 3. The mean around the first mean, which removes the rounding of the first sum ...
        total, _ = _local_sums(reduction, shift.dtype, x, mask, shift)
        (total,) = all_reduce(reduction, total)
        shift = shift + _divide(total, divisor)
        # 4. ... and both sums around the mean so corrected.
        sums = all_reduce(reduction, *_local_sums(reduction, shift.dtype, x, mask, shift, unit))
        delta, scaled_var = _delta_and_var(sums, divisor)
        return shift, delta / unit.astype(delta.dtype), scaled_var / lax.square(unit)

    def keep(x: jax.Array, mask: jax.Array | None, shift: jax.Array) -> Sums:
        return shift, delta, var

    # x goes in as it came: a float32 copy of a bfloat16 x would be materialised as an operand.
    shift = shift + jnp.where(refine, delta, 0)
    return CentredMoments(count, *lax.cond(refine, measure_again, keep, x, mask, shift))


class _GroupSums(NamedTuple):
    """The sums of values and of squares of every group, around zero."""

    count: jax.Array  # type: ignore[assignment]
    total: jax.Array
    square: jax.Array
    divisor: jax.Array | float


def _measure_groups(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
    first: _GroupSums,
) -> CentredMoments:
    """Measures groups around their own means, without a guard.

    The guard is one predicate for all groups, and so a collective where these lie on several
    devices. The centre of a group in which nothing is valid is the given shift.
    """
    shift = jnp.where(first.count > 0, _divide(first.total, first.divisor), shift)
    unit = jnp.where(jnp.isfinite(first.square), jnp.ones_like(first.square), OVERFLOW_UNIT)
    sums = _local_sums(reduction, shift.dtype, x, mask, shift, unit)
    delta, var = _delta_and_var(sums, first.divisor)
    # The mean is off by its own rounding, e * |mean|. For a constant that is all there is: then the
    # variance is the rounding of delta, and the sum of shift and delta rounds to the constant.
    constant = var <= CONSTANT_THRESHOLD * absolute_square(delta)
    delta, var = delta / unit.astype(delta.dtype), var / lax.square(unit)
    shift = shift + jnp.where(constant, delta, 0)
    delta, var = jnp.where(constant, 0, delta), jnp.where(constant, 0, var)
    return CentredMoments(first.count, shift, delta, var)


@partial(_centred_moments.defjvp, symbolic_zeros=True)
def _centred_moments_jvp(
    reduction: Reduction, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[CentredMoments, CentredMoments]:
    """Differentiates the moments by what they are, not by how they were computed.

    The guard, the shift and the second pass are means to the same end, so that none of them is
    differentiated. What is left are two sums over the batch, and one collective, of which the
    transpose in reverse mode is no sum at all.
    """
    x, mask, shift = primals
    dx, d_mask = map(_unless_zero, tangents[:2])
    measured = named(MOMENTS_NAME, centred_moments(reduction, x, mask, shift))
    # 1. This device's sums of d(x) and of d(|x - mean|**2). Rematerialized, or a scan would keep
    # the float32 deviation for the backward pass beside x.
    changes = jax.checkpoint(partial(_local_changes, reduction), prevent_cse=False)
    # 2. All devices' sums, in one collective.
    totals = all_reduce(reduction, *changes(x, mask, measured, dx, d_mask))
    d_count = jnp.zeros_like(measured.count) if d_mask is None else totals[2]
    # 3. Divided by the count, which is a constant but for the weights. How the count changes the
    # two means is in the sums already: they were taken of deviations.
    divisor = _divisor(reduction, x, mask, measured.count)
    d_mean, d_var = (_divide(total, divisor) for total in totals[:2])
    if reduction.about_zero:
        d_mean = jnp.zeros_like(measured.delta)
    d_shift = jnp.zeros_like(measured.shift)
    return measured, CentredMoments(d_count, d_shift, d_mean, d_var)


def _unless_zero(tangent: Any) -> jax.Array | None:
    """Returns a tangent, or None where it is zero or its primal has none."""
    absent = isinstance(tangent, SymbolicZero) or tangent is None
    return None if absent or tangent.dtype == jax.dtypes.float0 else tangent


def _local_changes(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    measured: CentredMoments,
    dx: jax.Array | None,
    d_mask: jax.Array | None,
) -> Sums:
    """Sums the changes of count * mean, of count * var and, with `d_mask`, of count."""
    deviation = _keep(centre(x, measured.shift, measured.delta), mask)
    of_mean, of_var = jnp.zeros_like(deviation), jnp.zeros_like(deviation.real)
    if dx is not None:
        weighted = _weigh(_keep(dx.astype(deviation.dtype), mask), mask)
        of_mean = weighted
        of_var = 2 * jnp.real(weighted * jnp.conj(deviation))
    if mask is None or d_mask is None:
        return _sum(reduction, of_mean), _sum(reduction, of_var)
    d_weight = _keep(d_mask.astype(of_var.dtype), mask)
    of_mean += d_weight.astype(deviation.dtype) * deviation
    of_var += d_weight * (absolute_square(deviation) - measured.var)
    d_count = _local_count(reduction, d_weight, x.shape)
    return _sum(reduction, of_mean), _sum(reduction, of_var), d_count


def covariance(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    measured: CentredMoments,
    axis: int,
    size: int,
) -> jax.Array:
    """Computes the covariances between the features of each group, around the measured mean.

    ``cov = sum(w * outer(x - mean, x - mean)) / count``. In two passes over `x`, the mean's and
    this one: the product reads `x` anyhow, and what it sums is around the true mean, so that
    nothing cancels at any offset. JAX itself differentiates it.

    Args:
        reduction: what `measured` was reduced over: all axes but one.
        x: floating point.
        mask: None, boolean or weights, of the rank of `x` and of size 1 on `axis`.
        measured: the moments of `x`.
        axis: the axis of the features.
        size: how many consecutive features make up a group.

    Returns:
        An array ``[groups, size, size]`` in the dtype of the mean, zeros where nothing entered.
    """
    deviation = _keep(centre(x, measured.shift, measured.delta), mask)
    groups = split_axis(axis, size, deviation)
    weighted = split_axis(axis, size, _weigh(deviation, mask))
    reduced = tuple(other for other in range(groups.ndim) if other not in (axis, axis + 1))
    products = lax.dot_general(
        weighted,
        groups,
        ((reduced, reduced), ((axis,), (axis,))),
        precision=lax.Precision.HIGHEST,
        out_sharding=sharding_of_groups(groups, axis),
    )
    (total,) = all_reduce(reduction, products)
    divisor = _divisor(reduction, x, mask, measured.count)
    return _divide(total, divisor if isinstance(divisor, float) else divisor.reshape(()))


def centre(x: jax.Array, shift: jax.Array, delta: jax.Array) -> jax.Array:
    """Returns ``x - (shift + delta)`` without rounding the sum."""
    return (x.astype(shift.dtype) - shift) - delta


def cancels(delta: jax.Array, var: jax.Array) -> jax.Array:
    """Tells where the variance has lost its digits, so that x must be measured again.

    Also true where the squares overflowed although the values did not. False for a feature that
    is NaN or infinite: measuring again would not help it.
    """
    kept = absolute_square(delta) <= CANCELLATION_THRESHOLD * var
    return jnp.isfinite(delta) & ~(kept & jnp.isfinite(var))


def absolute_square(values: jax.Array) -> jax.Array:
    """Returns ``|values|**2``, real."""
    if jnp.iscomplexobj(values):
        return lax.square(values.real) + lax.square(values.imag)
    return lax.square(values)


def _delta_and_var(sums: Sums, divisor: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    delta, mean_square = (_divide(total, divisor) for total in sums)
    return delta, jnp.maximum(mean_square - absolute_square(delta), 0)


def _counted(
    reduction: Reduction, x: jax.Array, mask: jax.Array | None, sums: Sums
) -> tuple[jax.Array, ...]:
    """Returns the count and the sums over all devices."""
    dtype = statistics_dtype(sums[0].dtype)
    if mask is None:
        number = static_count(reduction, x.shape)
        if not isinstance(number, int):
            number = static_count(reduction, as_numbers(x.shape, dtype))
        return jnp.full((1,) * x.ndim, number, dtype), *all_reduce(reduction, *sums)
    return all_reduce(reduction, _local_count(reduction, mask.astype(dtype), x.shape), *sums)


def _divisor(
    reduction: Reduction, x: jax.Array, mask: jax.Array | None, count: jax.Array
) -> jax.Array | float:
    """Returns the count, or 1 where nothing entered; a Python number where it is static."""
    number = static_count(reduction, x.shape)
    if mask is None and isinstance(number, int):
        return float(max(1, number))
    return jnp.where(count > 0, count, 1)


def _divide(total: jax.Array, divisor: jax.Array | float) -> jax.Array:
    return total / (divisor if isinstance(divisor, float) else divisor.astype(total.dtype))


def _local_sums(
    reduction: Reduction,
    dtype: jnp.dtype,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array | None,
    unit: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sums deviations from the shift, or from zero, and their squares, in units."""

    def deviation(
        x: jax.Array, mask: jax.Array | None, shift: jax.Array | None, unit: jax.Array | None
    ) -> jax.Array:
        values = x.astype(dtype) if shift is None else x.astype(dtype) - shift
        kept = _keep(values, mask)
        return kept if unit is None else kept * unit.astype(dtype)

    of_total = unshared((x, mask, shift, unit))
    of_square = unshared(of_total)
    total = _weigh(deviation(*of_total), of_total[1])
    square = _weigh(absolute_square(deviation(*of_square)), of_square[1])
    return _sum(reduction, total), _sum(reduction, square)


def unshared(values: Values) -> Values:
    """Returns the values behind a barrier on a CPU, so that XLA does not share work on them.

    There, XLA fuses the operand of one reduction into it, such as ``x - shift``, but writes it out,
    in float32, where two reductions or one and something else share it.
    """
    # A barrier makes all of them vary over the same mesh axes, and so must the other branch.
    names: frozenset[str] = frozenset().union(*map(varying_axes, jax.tree.leaves(values)))
    return lax.platform_dependent(
        jax.tree.map(partial(vary_over, names), values),
        cpu=lax.optimization_barrier,
        default=lambda values: values,
    )


def _local_count(reduction: Reduction, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums the weights, to size 1 along every feature axis where the mask has size 1."""
    sizes = as_numbers(shape, mask.dtype)
    # A float: as an integer, more than 2**31 positions would not fit into the int32 of JAX.
    unseen = prod((sizes[axis] for axis in reduction.axes if mask.shape[axis] == 1), start=1.0)
    return _sum(reduction, mask) * unseen


def _sum(reduction: Reduction, values: jax.Array) -> jax.Array:
    return jnp.sum(values, reduction.axes, keepdims=True)


def _keep(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Zeroes what the mask leaves out, by selection: a product would keep its NaN."""
    return values if mask is None else jnp.where(mask.astype(bool), values, 0)


def _weigh(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None or mask.dtype == jnp.bool_:
        return values
    return values * mask.astype(values.dtype)
