"""Count, mean and variance of an array: masked, guarded against cancellation, merged exactly.

One pass over ``x`` collects ``sum(x - shift)`` and ``sum((x - shift)**2)`` around a ``shift`` that
does not depend on the batch (a batch norm passes its running mean). With ``delta`` the mean of
``x - shift``, the variance is ``mean((x - shift)**2) - delta**2``. The subtraction cancels when
``delta**2`` is large against the variance: both sums carry a relative rounding error ``e``, so the
variance carries ``e * (1 + 3 * delta**2 / var)``. Compilers sum in a tree, whose ``e`` grows with
the logarithm of the length; taking it as 2 ** -22, four roundings, ``delta**2 <= 10 * var`` bounds
the relative error of the variance by 31 * 2 ** -22 = 7.4e-6.

Where some feature exceeds that, or its squares overflow, and only then, `x` is measured again: the
mean around the mean that the first pass found, and then both sums around the mean so corrected. It
takes the two steps, for the first mean is off by its own rounding, ``e * |mean - shift|``. From a
feature with ``|mean - shift| <= 1e6`` standard deviations that leaves ``delta`` within 0.3 of one,
and one step would do. But against a spread far below the rounding of the mean, and against that of
a constant, which is zero, it would be large; the second step's mean is right to the last place of
`x`, so that the variance of a constant is zero.

So, for float32 input: the relative error of the variance is under 1e-5 at any mean up to 1e6
standard deviations from the shift, however far that is from zero, and at any length up to 1e7 (what
was measured). Two limits are those of the format. Squares under its smallest normal number vanish:
an absolute error of the variance of up to twice that, 2.4e-38. A variance beyond its largest number
is infinite, and so is a mean whose sum is: such a batch counts as not finite.

Groups that may lie on different devices (the norms without state, ghost batch norm) share no such
decision: they are measured twice always, around zero and around their own means. Their means are
within 1e7 standard deviations of zero, for no format resolves more.

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
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as extend_core
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

AxisName: TypeAlias = str | Sequence[str]
Sums: TypeAlias = tuple[jax.Array, ...]
Values = TypeVar("Values")

CANCELLATION_THRESHOLD = 10.0
CONSTANT_THRESHOLD = 2.0**-20
# A power of two, so that multiplying by it rounds nothing.
OVERFLOW_UNIT = 2.0**-40
# By these names policies of `jax.checkpoint` know what a norm is given and what it measures.
INPUT_NAME = "bn_jax.input"
MOMENTS_NAME = "bn_jax.moments"
_USE_NAME = "bn_jax.use"


class Moments(NamedTuple):
    """The count, mean and biased variance of a set of values, feature by feature.

    Of complex values, `mean` is complex and `var`, the mean of ``|x - mean|**2``, is real.

    Attributes:
        count: how many values entered (the sum of the weights, where the mask has weights); a
            scalar where it is the same for every feature, else as `mean`.
        mean: ``sum(w * x) / count``, 0 where `count` is 0.
        var: ``sum(w * |x - mean|**2) / count``, 0 where `count` is 0.
    """

    count: jax.Array  # type: ignore[assignment]
    mean: jax.Array
    var: jax.Array


class CentredMoments(NamedTuple):
    """Moments of the rank of x whose mean is the unevaluated sum ``shift + delta``."""

    count: jax.Array  # type: ignore[assignment]
    shift: jax.Array
    delta: jax.Array
    var: jax.Array


class Reduction(NamedTuple):
    """Which axes of the array, and which named axes of the program, the moments reduce over.

    Where `of_groups`, the other axes hold groups that no decision taken for all of them at once may
    tie together, for their devices would have to communicate about it. Where `about_zero`, the mean
    is taken to be zero, and so the variance is the mean square.
    """

    axes: tuple[int, ...]
    axis_names: tuple[str, ...] = ()
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    of_groups: bool = False
    about_zero: bool = False


def moments(
    x: jax.Array,
    axes: int | Sequence[int] | None = None,
    *,
    mask: jax.Array | None = None,
    shift: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Computes count, mean and biased variance over some axes, guarded against cancellation.

    ``mean = sum(w * x) / count``, ``var = sum(w * |x - mean|**2) / count``, ``count = sum(w)``,
    with ``w`` the mask (1 everywhere without one), summed over `axes` and over `axis_name`.

    Args:
        x: a floating-point or complex array. Half precision is accumulated in float32.
        axes: the axes to reduce over; all of them by default.
        mask: boolean or non-negative weights, broadcastable to `x`; what is zero or False does
            not enter, even if `x` is NaN there, and has no derivative.
        shift: a guess of the mean, of the shape of the result, the same on every device of
            `axis_name`; the better it is, the rarer is the second pass. Zero by default.
        axis_name: the named axis or axes (`shard_map`, `pmap`, `vmap`) to reduce over as well;
            `batch_norm` says what holds where none of these binds it.
        axis_index_groups: groups of indices of `axis_name`; each group has its own moments.

    Returns:
        `Moments` of `x` without the reduced axes, in float32 (float64 for double precision); the
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
    reduction = make_reduction(x, axes, axis_name, axis_index_groups)
    if mask is not None:
        mask = broadcastable_mask(mask, x.shape)
    kept_shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    dtype = mean_dtype(statistics_dtype(x.dtype), x.dtype)
    start = jnp.zeros(kept_shape, dtype) if shift is None else jnp.asarray(shift, dtype)
    found = centred_moments(reduction, x, mask, start.reshape(kept_shape))
    count = found.count.reshape(()) if found.count.size == 1 else found.count
    if count.ndim:
        count = lax.squeeze(jnp.broadcast_to(count, kept_shape), axes)
    mean = jnp.where(found.count > 0, found.shift + found.delta, 0)
    return Moments(count, lax.squeeze(mean, axes), lax.squeeze(found.var, axes))


def merge_moments(first: Moments, *others: Moments) -> Moments:
    """Merges the moments of disjoint sets into those of their union.

    Exact up to rounding, as if computed on the concatenation (Chan, Golub & LeVeque 1983):
    ``mean = sum(n_i * mean_i) / n`` and
    ``var = sum(n_i * (var_i + (mean_i - mean)**2)) / n`` with ``n = sum(n_i)``.
    A set whose count is 0 contributes nothing, whatever its mean and variance.

    Args:
        first: the moments of one set, each array a scalar or of shape ``[*F]``.
        *others: those of the other sets, of the same feature shape.

    Returns:
        The `Moments` of the union.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> x = jnp.arange(6.0)
        >>> merged = bn.merge_moments(bn.moments(x[:1]), bn.moments(x[1:]))
        >>> jnp.allclose(merged.var, bn.moments(x).var)
        Array(True, dtype=bool)
    """
    sets = (first, *others)
    feature_shape = jnp.broadcast_shapes(*(jnp.shape(leaf) for one in sets for leaf in one))
    counts_shape = jnp.broadcast_shapes(*(jnp.shape(one.count) for one in sets))
    count = jnp.stack([jnp.broadcast_to(one.count, counts_shape) for one in sets])
    mean, var = (
        jnp.stack([jnp.broadcast_to(leaf, feature_shape) for leaf in leaves])
        for leaves in zip(*((one.mean, one.var) for one in sets), strict=True)
    )
    if not counts_shape:
        count = count.reshape((len(sets),) + (1,) * len(feature_shape))
    merged = merge_along(0, CentredMoments(count, mean, jnp.zeros_like(mean), var))
    return merged._replace(count=merged.count.reshape(counts_shape))


def merge_along(axis: int, parts: CentredMoments) -> Moments:
    """Merges moments that are stacked along an axis; `merge_moments` says by which formula."""
    count, shift, delta, var = merge_centred(axis, parts)
    return Moments(count, shift + delta, var)


def merge_centred(axis: int, parts: CentredMoments) -> CentredMoments:
    """Merges as `merge_along` does, and leaves the mean the unevaluated sum ``shift + delta``."""
    counts_shape = list(parts.count.shape)
    counts_shape[axis] = parts.var.shape[axis]
    counts = jnp.broadcast_to(parts.count, counts_shape)
    present = counts > 0
    shift, delta, part_var = (jnp.where(present, leaf, 0) for leaf in parts[1:])
    count = jnp.sum(counts, axis, keepdims=True)
    total = jnp.sum(counts.astype(shift.dtype) * (shift + delta), axis, keepdims=True)
    # This estimate is off by some units in the last place of the mean, which sums around it tell.
    # Two sums after two, and so two collectives where the parts lie on several devices.
    divisor = jnp.where(count > 0, count, 1)
    estimate = total / divisor.astype(total.dtype)
    share = counts / divisor
    deviation = jnp.where(present, centre(shift, estimate, -delta), 0)
    error = jnp.sum(share.astype(deviation.dtype) * deviation, axis, keepdims=True)
    square = jnp.sum(share * (part_var + absolute_square(deviation)), axis, keepdims=True)
    var = jnp.maximum(square - absolute_square(error), 0)
    return CentredMoments(*(lax.squeeze(leaf, (axis,)) for leaf in (count, estimate, error, var)))


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
            `axis_name` (type-checked `shard_map` alone can tell, and then it is made so).

    Returns:
        `CentredMoments`; where nothing entered, `delta` and `var` are 0.
    """
    return _centred_moments(reduction, x, mask, shift)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _centred_moments(
    reduction: Reduction, x: jax.Array, mask: jax.Array | None, shift: jax.Array
) -> CentredMoments:
    shift = _common(reduction, shift)
    start = None if reduction.of_groups else shift
    total, square = _local_sums(reduction, shift.dtype, x, mask, start)
    if reduction.about_zero:
        count, square = _counted(reduction, x, mask, (square,))
        var = _divide(square, _divisor(reduction, x, mask, count))
        return CentredMoments(count, shift, jnp.zeros_like(var, shift.dtype), var)
    count, total, square = _counted(reduction, x, mask, (total, square))
    divisor = _divisor(reduction, x, mask, count)
    if reduction.of_groups:
        return _measure_groups(reduction, x, mask, shift, count, total, square)
    delta, var = _delta_and_var((total, square), divisor)
    refine = _agree(reduction, jnp.any(cancels(delta, var)))

    def measure_again(x: jax.Array, mask: jax.Array | None, shift: jax.Array) -> Sums:
        unit = jnp.where(jnp.isfinite(var), jnp.ones_like(var), OVERFLOW_UNIT)
        total, _ = _local_sums(reduction, shift.dtype, x, mask, shift)
        (total,) = _all_reduce(reduction, total)
        shift = shift + _divide(total, divisor)
        sums = _all_reduce(reduction, *_local_sums(reduction, shift.dtype, x, mask, shift, unit))
        delta, scaled_var = _delta_and_var(sums, divisor)
        return shift, delta / unit.astype(delta.dtype), scaled_var / lax.square(unit)

    def keep(x: jax.Array, mask: jax.Array | None, shift: jax.Array) -> Sums:
        return shift, delta, var

    # x goes in as it came: a float32 copy of a bfloat16 x would be materialised as an operand.
    shift = shift + jnp.where(refine, delta, 0)
    return CentredMoments(count, *lax.cond(refine, measure_again, keep, x, mask, shift))


def _counted(
    reduction: Reduction, x: jax.Array, mask: jax.Array | None, sums: Sums
) -> tuple[jax.Array, ...]:
    """Returns the count and the sums over all devices."""
    dtype = statistics_dtype(sums[0].dtype)
    if mask is None:
        count = jnp.full((1,) * x.ndim, static_count(reduction, x.shape), dtype)
        return count, *_all_reduce(reduction, *sums)
    return _all_reduce(reduction, _local_count(reduction, mask.astype(dtype), x.shape), *sums)


def _measure_groups(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
    count: jax.Array,
    total: jax.Array,
    square: jax.Array,
) -> CentredMoments:
    """Measures around the groups' own means; `total` and `square` are the sums around zero.

    The centre of a group in which nothing is valid is the given shift.

    The guard is one predicate for all groups, and so a collective where they lie on several
    devices.
    """
    divisor = _divisor(reduction, x, mask, count)
    shift = jnp.where(count > 0, _divide(total, divisor), shift)
    unit = jnp.where(jnp.isfinite(square), jnp.ones_like(square), OVERFLOW_UNIT)
    sums = _local_sums(reduction, shift.dtype, x, mask, shift, unit)
    delta, var = _delta_and_var(sums, divisor)
    # The mean is off by its own rounding, e * |mean|. Of a constant that is all there is: then the
    # variance is the rounding of delta, and the sum of shift and delta rounds to the constant.
    constant = var <= CONSTANT_THRESHOLD * absolute_square(delta)
    delta, var = delta / unit.astype(delta.dtype), var / lax.square(unit)
    shift = shift + jnp.where(constant, delta, 0)
    return CentredMoments(count, shift, *(jnp.where(constant, 0, one) for one in (delta, var)))


@partial(_centred_moments.defjvp, symbolic_zeros=True)
def _centred_moments_jvp(
    reduction: Reduction, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[CentredMoments, CentredMoments]:
    x, mask, shift = primals
    dx, d_mask = map(_unless_zero, tangents[:2])
    found = named(MOMENTS_NAME, centred_moments(reduction, x, mask, shift))
    # Rematerialized, or a scan would keep the float32 deviation for the backward pass beside x.
    changes = jax.checkpoint(partial(_local_changes, reduction), prevent_cse=False)
    totals = _all_reduce(reduction, *changes(x, mask, found, dx, d_mask))
    d_count = jnp.zeros_like(found.count) if d_mask is None else totals[2]
    divisor = _divisor(reduction, x, mask, found.count)
    d_mean, d_var = (_divide(total, divisor) for total in totals[:2])
    if reduction.about_zero:
        d_mean = jnp.zeros_like(found.delta)
    return found, CentredMoments(d_count, jnp.zeros_like(found.shift), d_mean, d_var)


def covariance(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    found: CentredMoments,
    axis: int,
    size: int,
) -> jax.Array:
    """Computes the covariances between the features of each group, around the mean that was found.

    ``cov = sum(w * outer(x - mean, x - mean)) / count``. In two passes over `x`, the mean's and
    this: the product reads `x` anyhow, and what it sums is around the true mean, so that nothing
    cancels at any offset. Differentiated by JAX itself.

    Args:
        reduction: what `found` was reduced over: all axes but one.
        x: floating point.
        mask: None, boolean or weights, of the rank of `x` and of size 1 on `axis`.
        found: the moments of `x`.
        axis: the axis of the features.
        size: how many consecutive features make up a group.

    Returns:
        An array ``[groups, size, size]`` in the dtype of the mean, zeros where nothing entered.
    """
    deviation = _keep(centre(x, found.shift, found.delta), mask)
    groups, weighted = (split_axis(axis, size, one) for one in (deviation, _weigh(deviation, mask)))
    reduced = tuple(one for one in range(groups.ndim) if one not in (axis, axis + 1))
    products = lax.dot_general(
        weighted,
        groups,
        ((reduced, reduced), ((axis,), (axis,))),
        precision=lax.Precision.HIGHEST,
        out_sharding=_sharding_of_groups(groups, axis),
    )
    (total,) = _all_reduce(reduction, products)
    divisor = _divisor(reduction, x, mask, found.count)
    return _divide(total, divisor if isinstance(divisor, float) else divisor.reshape(()))


def _sharding_of_groups(groups: jax.Array, axis: int) -> NamedSharding | None:
    """Where explicitly sharded axes are summed over, JAX asks where the sums shall be."""
    sharding = jax.typeof(groups).sharding
    if all(names is None for names in sharding.spec):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[axis], None, None))


def named(name: str, values: Values) -> Values:
    """Gives arrays the name by which a policy of `jax.checkpoint` keeps them.

    The second name is one that no policy keeps, so that what uses the arrays in the backward pass
    does not lie under the first: every nested `jax.checkpoint` would keep them once more.

    Args:
        name: `INPUT_NAME` or `MOMENTS_NAME`.
        values: a tree of arrays.

    Returns:
        The same values.
    """
    return checkpoint_name(checkpoint_name(values, name), _USE_NAME)


def _unless_zero(tangent: Any) -> jax.Array | None:
    """Returns a tangent, or None where it is zero or what it belongs to has none."""
    absent = isinstance(tangent, SymbolicZero) or tangent is None
    return None if absent or tangent.dtype == jax.dtypes.float0 else tangent


def _local_changes(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    found: CentredMoments,
    dx: jax.Array | None,
    d_mask: jax.Array | None,
) -> Sums:
    """Sums the changes of count * mean, of count * var and, with `d_mask`, of count."""
    deviation = _keep(centre(x, found.shift, found.delta), mask)
    of_mean, of_var = jnp.zeros_like(deviation), jnp.zeros_like(deviation.real)
    if dx is not None:
        weighted = _weigh(_keep(dx.astype(deviation.dtype), mask), mask)
        of_mean = weighted
        of_var = 2 * jnp.real(weighted * jnp.conj(deviation))
    if mask is None or d_mask is None:
        return _sum(reduction, of_mean), _sum(reduction, of_var)
    d_weight = _keep(d_mask.astype(of_var.dtype), mask)
    of_mean += d_weight.astype(deviation.dtype) * deviation
    of_var += d_weight * (absolute_square(deviation) - found.var)
    d_count = _local_count(reduction, d_weight, x.shape)
    return _sum(reduction, of_mean), _sum(reduction, of_var), d_count


def centre(x: jax.Array, shift: jax.Array, delta: jax.Array) -> jax.Array:
    """Returns ``x - (shift + delta)`` without rounding the sum."""
    return (x.astype(shift.dtype) - shift) - delta


def cancels(delta: jax.Array, var: jax.Array) -> jax.Array:
    """Tells where the variance has lost its digits, so that measuring again is due.

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


def statistics_dtype(*dtypes: Any) -> jnp.dtype:
    """Returns the real dtype that statistics of these dtypes are computed in: at least float32."""
    real = (jnp.finfo(dtype).dtype for dtype in (jnp.float32, *dtypes))
    return max(real, key=lambda dtype: dtype.itemsize)


def mean_dtype(dtype: jnp.dtype, *dtypes: Any) -> jnp.dtype:
    """Returns the statistics' real dtype, or its complex one where any of the others is complex."""
    if any(jnp.issubdtype(other, jnp.complexfloating) for other in dtypes):
        return jnp.dtype(jnp.complex128 if dtype.itemsize == 8 else jnp.complex64)
    return dtype


def _delta_and_var(sums: Sums, divisor: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    delta, mean_square = (_divide(total, divisor) for total in sums)
    return delta, jnp.maximum(mean_square - absolute_square(delta), 0)


def _divisor(
    reduction: Reduction, x: jax.Array, mask: jax.Array | None, count: jax.Array
) -> jax.Array | float:
    """Returns the count, or 1 where nothing entered; a known number where there is no mask."""
    if mask is None:
        return float(max(1, static_count(reduction, x.shape)))
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
    """Returns the values; on a CPU, XLA takes them for others than those that were given.

    There it fuses what enters one reduction, but writes out, in float32, what enters two, or one
    and something else, such as ``x - shift``.
    """
    # A barrier makes all of them vary over the same mesh axes, and so must the other branch.
    names = frozenset().union(*map(varying_axes, jax.tree.leaves(values)))
    return lax.platform_dependent(
        jax.tree.map(partial(_vary_over, names), values),
        cpu=lax.optimization_barrier,
        default=lambda values: values,
    )


def _vary_over(names: frozenset[str], values: jax.Array) -> jax.Array:
    missing = names - varying_axes(values)
    return lax.pcast(values, tuple(sorted(missing)), to="varying") if missing else values


def _local_count(reduction: Reduction, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The sum of the weights, of size 1 along every feature axis where the mask has size 1."""
    unseen = prod(shape[axis] for axis in reduction.axes if mask.shape[axis] == 1)
    return _sum(reduction, mask) * unseen


def static_count(reduction: Reduction, shape: tuple[int, ...]) -> int:
    """Returns how many values a feature has over the whole reduction, mask aside."""
    count = prod(shape[axis] for axis in reduction.axes)
    if reduction.axis_index_groups is not None:
        return count * len(reduction.axis_index_groups[0])
    return count * _named_axes_size(reduction.axis_names)


def _sum(reduction: Reduction, values: jax.Array) -> jax.Array:
    return jnp.sum(values, reduction.axes, keepdims=True)


def _keep(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Zeroes what the mask leaves out, by selection: a product would keep its NaN."""
    return values if mask is None else jnp.where(mask.astype(bool), values, 0)


def _weigh(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None or mask.dtype == jnp.bool_:
        return values
    return values * mask.astype(values.dtype)


def _all_reduce(reduction: Reduction, *totals: jax.Array) -> Sums:
    """Sums over the named axis, all arrays in one collective."""
    if not reduction.axis_names:
        return totals
    flat, unravel = ravel_pytree(tuple(map(_as_pair, totals)))
    summed = unravel(_sum_over_devices(reduction, flat))
    return tuple(map(_from_pair, summed, totals))


def _as_pair(total: jax.Array) -> jax.Array:
    """Stacks real and imaginary part, so that all totals of a collective have one dtype."""
    return jnp.stack([total.real, total.imag]) if jnp.iscomplexobj(total) else total


def _from_pair(pair: jax.Array, like: jax.Array) -> jax.Array:
    return lax.complex(*pair) if jnp.iscomplexobj(like) else pair


def _sum_over_devices(reduction: Reduction, flat: jax.Array) -> jax.Array:
    names, groups = reduction.axis_names, reduction.axis_index_groups
    if groups is None:
        return lax.psum(flat, names)
    if set(names) <= set(_manual_mesh_axes()):
        try:
            return lax.psum(flat, names, axis_index_groups=groups)
        except NotImplementedError:
            pass
    # vmap and type-checked shard_map have no psum of groups: every group gets a row of a plain
    # one.
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    numbers = jnp.asarray([group_of[index] for index in range(len(group_of))])
    mine = numbers[lax.axis_index(names)]
    rows = jnp.where(jnp.arange(len(groups))[:, None] == mine, flat[None], 0)
    return lax.psum(rows, names)[mine]


def _common(reduction: Reduction, shift: jax.Array) -> jax.Array:
    """Makes the shift the same on every device where type-checked shard_map says it is not."""
    differing = tuple(sorted(varying_axes(shift).intersection(reduction.axis_names)))
    return lax.pmean(shift, differing) if differing else shift


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Returns the mesh axes that x varies over, as far as type-checked shard_map knows."""
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(kind.vma)


def _agree(reduction: Reduction, refine: jax.Array) -> jax.Array:
    """Makes all groups take the same branch, for the collective in it may span them all."""
    if reduction.axis_index_groups is None:
        return refine
    return lax.pmax(refine.astype(jnp.int32), reduction.axis_names) > 0


def _named_axes_size(names: tuple[str, ...]) -> int:
    return prod(lax.axis_size(name) for name in names)


def bound_axes(x: jax.Array, axis_name: AxisName | None) -> tuple[str, ...]:
    """Returns those of the axes that shard_map, pmap or vmap bind: the ones to sum over.

    The others are left out where `x` is the whole array: where they are axes of the mesh in use
    that the compiler partitions, or where no axis is known at all, as under plain `jit`.

    Raises:
        NameError: other axes are known, so that the name must be wrong.
    """
    if axis_name is None:
        return ()
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    bound = tuple(name for name in names if _is_bound(name))
    others, in_use = _listed_axes(), _mesh_axes(x)
    for name in names:
        if name not in (*bound, *in_use) and (others or in_use):
            raise NameError(
                f"axis_name={name!r} is not bound by any enclosing shard_map, pmap or vmap "
                f"(bound: {others}), nor is it an axis of the mesh in use (its axes: {in_use}). "
                "Spell it as the map or the mesh does, or leave it out (axis_name=None): under "
                "jit without any of these, statistics are global anyway."
            )
    return bound


def _is_bound(name: str) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def _listed_axes() -> list[str]:
    """The axes that an enclosing shard_map, pmap or vmap binds.

    No supported function of JAX lists the axes of a vmap. Should this one go, a misspelt axis_name
    under vmap would be taken for one that nothing binds.
    """
    name = "unsafe_get_axis_names_DO_NOT_USE"
    # Older JAX has it in the second place.
    home = extend_core if hasattr(extend_core, name) else jax.core
    return list(dict.fromkeys([*_manual_mesh_axes(), *getattr(home, name, list)()]))


def _mesh_axes(x: jax.Array) -> list[str]:
    """The axes of the mesh in use; along one that is not bound, arrays are whole."""
    meshes = (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh)
    return list(dict.fromkeys(name for mesh in meshes for name in mesh.axis_names))


def _manual_mesh_axes() -> list[str]:
    """The axes that an enclosing shard_map or pmap binds."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = mesh.axis_types or ()
    return [
        name
        for name, kind in zip(mesh.axis_names, kinds, strict=True)
        if kind == jax.sharding.AxisType.Manual
    ]


def split_axis(axis: int, size: int, values: jax.Array) -> jax.Array:
    """Splits an axis into groups of `size`; an axis that is to be broadcast into two of them."""
    length = values.shape[axis]
    pair = (1, 1) if length == 1 else (length // size, size)
    shape = (*values.shape[:axis], *pair, *values.shape[axis + 1 :])
    sharding = jax.typeof(values).sharding
    names = sharding.spec[axis]
    if names is None:
        return values.reshape(shape)
    # An explicitly sharded axis: whole groups on each shard, or a part of every group, or all.
    shards = prod(sharding.mesh.shape[name] for name in jax.tree.leaves(names))
    choices = (pair[0], (names, None)), (pair[1], (None, names)), (0, (None, None))
    placed = next(place for divided, place in choices if divided % shards == 0)
    spec = PartitionSpec(*sharding.spec[:axis], *placed, *sharding.spec[axis + 1 :])
    return lax.reshape(values, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def make_reduction(
    x: jax.Array,
    axes: tuple[int, ...],
    axis_name: AxisName | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> Reduction:
    """Checks the named axes and returns the hashable description of a reduction."""
    names = bound_axes(x, axis_name)
    if axis_index_groups is None:
        return Reduction(axes, names)
    groups = canonical_groups(axis_name, axis_index_groups)
    if not names:
        raise ValueError(
            f"axis_index_groups={groups} divide axis_name={axis_name!r}, which nothing binds here: "
            "call inside of the shard_map, pmap or vmap that does, or pass each group its own x."
        )
    members = sum(map(len, groups))
    if members != _named_axes_size(names):
        raise ValueError(
            f"axis_index_groups={groups} hold {members} indices, expected those of "
            f"axis_name={axis_name!r}, 0 to {_named_axes_size(names) - 1}."
        )
    return Reduction(axes, names, groups)


def canonical_groups(
    axis_name: AxisName | None, axis_index_groups: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Returns the groups as tuples, or raises the ValueError that says what is wrong with them."""
    groups = tuple(tuple(int(index) for index in group) for group in axis_index_groups)
    if axis_name is None:
        raise ValueError(
            f"axis_index_groups={groups} was given without axis_name: pass the axis_name that "
            "the groups divide, or leave axis_index_groups out."
        )
    members = sorted(index for group in groups for index in group)
    if members != list(range(len(members))) or len({len(group) for group in groups}) != 1:
        raise ValueError(
            f"axis_index_groups={groups} must be groups of one size that hold each index from 0 "
            f"to the size of axis_name={axis_name!r} minus 1 once."
        )
    return groups


def as_floating(name: str, x: jax.Array) -> jax.Array:
    """Returns `x` as a JAX array, or raises the TypeError that says what to cast."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected a floating-point dtype. Cast it yourself, "
            f"for example {name}.astype(jnp.float32): which dtype is your choice."
        )
    return x


def canonical_axes(name: str, axes: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """Returns sorted non-negative axes, or raises the ValueError that names the rank."""
    received = (axes,) if isinstance(axes, int) else tuple(axes)
    canonical = sorted(axis + rank if axis < 0 else axis for axis in received)
    if any(axis < 0 or axis >= rank for axis in canonical):
        raise ValueError(
            f"{name}={axes} is out of range for x of rank {rank}: expected values from {-rank} to "
            f"{rank - 1}."
        )
    if len(set(canonical)) != len(canonical):
        raise ValueError(
            f"{name}={axes} names an axis of x (rank {rank}) more than once: list each axis once."
        )
    return tuple(canonical)


def broadcastable_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the mask with the rank of x, or raises the ValueError that shows both shapes."""
    mask = jnp.asarray(mask)
    rank_difference = len(shape) - mask.ndim
    padded = (1,) * rank_difference + mask.shape
    if rank_difference < 0 or any(
        own not in (1, size) for own, size in zip(padded, shape, strict=True)
    ):
        raise ValueError(
            f"mask of shape {mask.shape} does not broadcast to x of shape {shape}: give it "
            "trailing axes of size 1, for example mask[:, None] for one value per example."
        )
    return mask.reshape(padded)
