"""Count, mean and variance of an array: masked, guarded against cancellation, merged exactly.

**Guarded.** One pass over ``x`` collects ``sum(x - shift)`` and ``sum((x - shift)**2)`` around a
``shift`` that does not depend on the batch (a batch norm passes its running mean). With ``delta``
the mean of ``x - shift``, the variance is ``mean((x - shift)**2) - delta**2``. The subtraction
cancels when ``delta**2`` is large against the variance: both sums carry a relative rounding error
``e``, so the variance carries ``e * (1 + 3 * delta**2 / var)``. Compilers sum in a tree, whose
``e`` grows with the logarithm of the length. With ``e = 2 ** -22``, four roundings,
``delta**2 <= 10 * var`` bounds the relative error of the variance by 31 * 2 ** -22 = 7.4e-6. Where
some feature exceeds that, or its squares overflow, and only then, `x` is measured twice.

**Twice.** The mean, from sums around zero, and then both sums around that mean. It is off by its
rounding, ``e * |mean|``, which is within 0.3 standard deviations for ``|mean| <= 1e6`` of them, and
within 4 for all that float32 resolves. So the same formula holds with a small ``delta``. Only for a
constant is ``delta**2`` large against the variance, which is zero then: the variance found is the
rounding of ``delta``, is recognized as such, and becomes zero. This needs no decision. Groups that
may lie on different devices (the norms without state, ghost batch norm) are always measured so: a
decision for all of them would be a collective. So are values under a `vmap` that binds the axis to
synchronize over, where the definition must differentiate itself: `centred_moments` says why.

**Once.** bfloat16 input is summed around zero, in float32, without a guard. It has itself been
rounded, by up to half a unit in the last place, ``h >= 2 ** -9 * |x|``. Moving every value by `h`,
up or down, changes the variance by up to ``2 * mean(|x - mean| * h) + mean(h**2)``, of which the
second term is at least ``2 ** -18 * mean(x**2)``. Sums around zero cost ``3 * e * mean(x**2)``, at
most 3/16 of that term, whatever the mean and the distribution (measured: 0.06, for 64 to 262,144
values and ``|mean| / sd`` up to 1e4). So the error is within what the input itself is uncertain by.
float16 resolves eight times as much: there the same sums would cost up to 12 times ``mean(h**2)``,
so it is guarded. Around a distant running mean they would lose digits that the input has, so the
shift is zero. ``use_fast_variance=False`` brings the guard, for a bound relative to the variance of
the stored values.

So, for float32 input: the relative error of the variance is under 1e-5 at any mean up to 1e6
standard deviations from the shift, however far that is from zero, and at any length up to 1e7 (what
was measured). Two limits come from the format. Squares under its smallest normal number vanish: an
absolute error of the variance of up to twice that, 2.4e-38, or that times the number of values
where `x` is measured twice. A variance beyond its largest number is infinite, and so is a mean
whose sum is: such a batch counts as not finite. In sums taken once, squares themselves overflow:
with a value beyond 1.8e19 the variance is not finite.

The centre stays the unevaluated sum ``shift + delta``: rounding it to one float would leave half a
unit in the last place of the mean (5e-4 at a mean of 1e4) in every output.
"""

from collections.abc import Sequence
from functools import partial
from math import ceil, log2
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from bn_jax._compat import varying_axes
from bn_jax._core.axes import (
    Method,
    Reduction,
    all_reduce,
    any_group,
    make_common,
    make_reduction,
    place_like,
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
from bn_jax._core.domains import Domains, spread
from bn_jax._core.sums import (
    Sums,
    absolute_square,
    centre,
    centre_by,
    counted,
    divide,
    divisor_of,
    keep_valid,
    local_count,
    local_sums,
    sum_changes,
    sum_over,
    weigh,
    where_counted,
)
from bn_jax._core.types import (
    AxisIndexGroups,
    AxisName,
    Moments,
)

# How many variances `delta**2` may be before x is measured again; the derivation is above.
CANCELLATION_THRESHOLD = 10.0
# A variance this small against `delta**2` is the rounding of a constant.
CONSTANT_THRESHOLD = 2.0**-20
# What deviations are measured in where the number of values is symbolic, and what means are large.
SMALL_UNIT, LARGE_MEAN = 2.0**-12, 2.0**60


class CentredMoments(NamedTuple):
    """Moments of the rank of x whose mean is the unevaluated sum ``shift + delta``.

    `delta` is None where the mean is one number.
    """

    count: jax.Array  # type: ignore[assignment]
    shift: jax.Array
    delta: jax.Array | None
    var: jax.Array

    def mean(self) -> jax.Array:
        """Returns the mean as one number."""
        return self.shift if self.delta is None else self.shift + self.delta

    def rounded(self) -> Moments:
        """Returns the moments with the mean as one number."""
        return Moments(self.count, self.mean(), self.var)


def moments(
    x: jax.Array,
    axes: int | Sequence[int] | None = None,
    *,
    mask: jax.Array | None = None,
    shift: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    use_fast_variance: bool = True,
) -> Moments:
    """Computes count, mean and biased variance over some axes, guarded against cancellation.

    ``mean = sum(w * x) / count``, ``var = sum(w * |x - mean|**2) / count``, ``count = sum(w)``,
    with ``w`` the mask (1 everywhere without one), summed over `axes` and over `axis_name`.

    The sums are taken in one pass around `shift`: ``var = mean((x - shift)**2) - delta**2`` with
    ``delta = mean(x - shift)``. That subtraction loses digits where ``delta**2`` is large against
    the variance. Where some feature has ``delta**2 > 10 * var``, `x` is measured again around the
    mean. So the relative error of the variance of float32 input is under 1e-5 for any mean up to
    1e6 standard deviations from `shift`.

    bfloat16 input is summed around zero and not guarded. The error of its variance is less than
    what moving every value by half a unit in its last place, `h`, can change: at most a fifth of
    ``mean(h**2)``. Squares of values beyond 1.8e19 overflow, so that the variance is not finite, as
    in Flax. To a batch norm, such a batch counts as not finite: the running statistics keep their
    old values. ``use_fast_variance=False`` guards bfloat16 input too, against both. The file
    ``bn_jax/_core/moments.py`` derives the bounds.

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
        use_fast_variance: False to guard bfloat16 input too, so that the bound of float32 holds
            for its stored values. Other input is always guarded.

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
    reduction = reduction._replace(method=choose_method(x.dtype, use_fast_variance))
    kept_shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    dtype = mean_dtype(statistics_dtype(x.dtype), x.dtype)
    start = jnp.zeros(kept_shape, dtype) if shift is None else jnp.asarray(shift, dtype)
    measured = centred_moments(reduction, x, mask, start.reshape(kept_shape))
    count = measured.count.reshape(()) if measured.count.size == 1 else measured.count
    if count.ndim:
        count = lax.squeeze(jnp.broadcast_to(count, kept_shape), axes)
    mean = jnp.where(measured.count > 0, measured.mean(), 0)
    return Moments(count, lax.squeeze(mean, axes), lax.squeeze(measured.var, axes))


def choose_method(dtype: DTypeLike, use_fast_variance: bool, *, lie_apart: bool = False) -> Method:
    """Returns how to measure x of this dtype.

    Args:
        dtype: of x.
        use_fast_variance: False to guard bfloat16 too.
        lie_apart: whether there are groups that may lie on different devices.
    """
    if dtype == jnp.bfloat16 and use_fast_variance:
        return "once"
    return "twice" if lie_apart else "guarded"


@partial(jax.jit, static_argnums=0)
def centred_moments(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
    domains: Domains | None = None,
) -> CentredMoments:
    """Computes moments; every array keeps the rank of `x`.

    In reverse and in forward mode the derivative is ``d mean = mean(dx)`` and
    ``d var = 2 * mean(real(dx * conj(x - mean)))``. A change of the weights adds
    ``sum(dw * (x - mean)) / count`` and ``sum(dw * (|x - mean|**2 - var)) / count``. All of
    ``d mean`` is carried by `delta` (by `shift` where there is none); elsewhere `shift` is a
    constant.

    JAX traces a custom rule without the axes of the `vmap`s around it, so that a rule may not sum
    over them. Where one binds the axis, `x` is measured twice, and JAX differentiates that.

    Args:
        reduction: what to reduce over, and how.
        x: floating point or complex.
        mask: None, boolean or weights, of the rank of `x`.
        shift: of the rank of `x`, in the dtype of the mean, the same on every device of
            `axis_name` (only type-checked `shard_map` can tell, and then it is made so).
        domains: the domains of the examples, each with its own moments; `shift` and what is
            returned are tables then.

    Returns:
        `CentredMoments`; where nothing entered, the mean is `shift` and `var` is 0.
    """
    # Compiled as one function, so that an eager call does not compile the guard's branches again,
    # and norms of one shape are traced, differentiated and lowered once.
    if reduction.is_mapped:
        return measure(reduction, x, mask, shift, domains)
    return moments_rule(reduction, x, mask, shift, domains)


def measure(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
    domains: Domains | None = None,
) -> CentredMoments:
    """Computes `centred_moments` without the rule for their derivative."""
    shift = make_common(reduction, shift)
    if reduction.method == "mean_square":
        return _measure_mean_square(reduction, x, mask, shift)
    if reduction.method == "twice" or reduction.is_mapped:
        return _measure_twice(reduction, x, mask, shift, domains)
    around = None if reduction.method == "once" else shift
    sums = local_sums(reduction, shift.dtype, x, mask, around, domains)
    count, total, square = counted(reduction, x, mask, sums, domains)
    divisor = divisor_of(reduction, x, mask, count, domains)
    delta, mean_square = divide(total, divisor), divide(square, divisor)
    var = jnp.maximum(mean_square - absolute_square(delta), 0)
    if reduction.method == "once":
        centre_of_all = where_counted(mask, x, count, delta, shift, domains)
        return CentredMoments(count, centre_of_all, None, var)
    # One predicate for all features. It comes from sums over all devices, so that every device
    # takes the same branch.
    unsure = cancels(delta, var)
    if domains is not None and not domains.selects:
        # A value that is not finite may belong to another domain.
        unsure |= ~(jnp.isfinite(delta) & jnp.isfinite(var))
        domains = domains.selecting()
    refine = any_group(reduction, lax.reduce_or(unsure, tuple(range(x.ndim))))

    def keep(
        x: jax.Array, mask: jax.Array | None, shift: jax.Array, domains: Domains | None
    ) -> Sums:
        return shift, delta, var

    def measure_again(
        x: jax.Array, mask: jax.Array | None, shift: jax.Array, domains: Domains | None
    ) -> Sums:
        again = _measure_twice(reduction, x, mask, shift, domains, count)
        return again.shift, cast(jax.Array, again.delta), again.var

    # What the branches return must have one shape, and lie on the devices in one way.
    shift = place_like(delta, vary_over(varying_axes(delta), shift))
    # x goes in as it came: a float32 copy of a float16 x would be materialised as an operand.
    return CentredMoments(count, *lax.cond(refine, measure_again, keep, x, mask, shift, domains))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def moments_rule(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
    domains: Domains | None = None,
) -> CentredMoments:
    """Computes `centred_moments` with the rule for their derivative."""
    return measure(reduction, x, mask, shift, domains)


def _measure_mean_square(
    reduction: Reduction, x: jax.Array, mask: jax.Array | None, shift: jax.Array
) -> CentredMoments:
    squares = weigh(absolute_square(keep_valid(x.astype(shift.dtype), mask)), mask)
    count, square = counted(reduction, x, mask, (sum_over(reduction, squares),))
    var = divide(square, divisor_of(reduction, x, mask, count))
    return CentredMoments(count, shift, None, var)


def _measure_twice(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
    domains: Domains | None,
    count: jax.Array | None = None,
) -> CentredMoments:
    """Measures around the mean, and counts if that has not been done.

    Where nothing is valid, the centre is the given shift.

    JAX can differentiate it: what rounding alone makes different from zero is replaced by its
    value, and not by a constant.
    """
    values = weigh(keep_valid(x.astype(shift.dtype), mask), mask)
    if count is None:
        count, total = counted(reduction, x, mask, (sum_over(reduction, values, domains),), domains)
    else:
        (total,) = all_reduce(reduction, sum_over(reduction, values, domains))
    divisor = divisor_of(reduction, x, mask, count, domains)
    mean = where_counted(mask, x, count, divide(total, divisor), shift, domains)
    unit = _unit_of_squares(static_count(reduction, x.shape), mean)
    of_example, unit_of_example = mean, unit
    if domains is not None:
        of_example, unit_of_example = spread(domains, mean), spread(domains, unit)
    deviation = keep_valid(centre(x, of_example, None), mask)
    squares = absolute_square(deviation * unit_of_example.astype(deviation.dtype))
    sums = [sum_over(reduction, weigh(part, mask), domains) for part in (deviation, squares)]
    total, square = all_reduce(reduction, *sums)
    delta = divide(total, divisor)
    delta_square = absolute_square(delta * unit.astype(delta.dtype))
    var = divide(square, divisor) - delta_square
    # The mean is off by its rounding, e * |mean|. For a constant that is all there is: then the
    # variance is the rounding of delta, and the sum of shift and delta rounds to the constant.
    is_constant, zeros = var <= CONSTANT_THRESHOLD * delta_square, jnp.zeros_like(var)
    rounding = lax.select(is_constant, delta, zeros.astype(delta.dtype))
    var -= lax.stop_gradient(lax.select(is_constant, var, zeros))
    return CentredMoments(count, mean + rounding, delta - rounding, var / lax.square(unit))


def _unit_of_squares(number: Any, mean: jax.Array) -> jax.Array:
    """Returns a power of two, by which multiplying rounds nothing, to measure deviations in.

    A sum of squares overflows before their mean does, and so do the squares of the rounding of a
    large mean. In this unit they do not.
    """
    usual = 2.0 ** -ceil(log2(max(number, 1)) / 2) if isinstance(number, int) else SMALL_UNIT
    size = jnp.abs(mean)
    return jnp.where(size > LARGE_MEAN, jnp.full_like(size, 1 / LARGE_MEAN), usual)


def name_moments(
    measured: CentredMoments, mask: jax.Array | None, domains: Domains | None = None
) -> CentredMoments:
    """Names moments for policies of `jax.checkpoint`, but for a count that is known."""
    if mask is not None or domains is not None:
        return named(MOMENTS_NAME, measured)
    centre = named(MOMENTS_NAME, (measured.shift, measured.delta, measured.var))
    return CentredMoments(measured.count, *centre)


@partial(moments_rule.defjvp, symbolic_zeros=True)
def _moments_rule_jvp(
    reduction: Reduction, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[CentredMoments, CentredMoments]:
    x, mask, shift, domains = primals
    dx, d_mask = map(unless_zero, tangents[:2])
    measured = name_moments(moments_rule(reduction, x, mask, shift, domains), mask, domains)

    def differentiate(
        x: jax.Array,
        mask: jax.Array | None,
        domains: Domains | None,
        measured: CentredMoments,
        dx: jax.Array | None,
        d_mask: jax.Array | None,
    ) -> MomentChanges:
        deviation = centre_by(domains, x, measured.shift, measured.delta)
        return moment_changes(reduction, deviation, mask, measured, dx, d_mask, domains)

    # Rematerialized, or a scan would keep the float32 deviation for the backward pass beside x.
    differentiate = jax.checkpoint(differentiate, prevent_cse=False)
    changes = differentiate(x, mask, domains, measured, dx, d_mask)
    return measured, changes.of(measured)


def unless_zero(tangent: Any) -> jax.Array | None:
    """Returns a tangent, or None where it is zero or its primal has none."""
    absent = isinstance(tangent, SymbolicZero) or tangent is None
    return None if absent or tangent.dtype == jax.dtypes.float0 else tangent


class MomentChanges(NamedTuple):
    """The changes of the moments, None where there is none."""

    mean: jax.Array | None
    half_var: jax.Array
    count: jax.Array | None  # type: ignore[assignment]

    def of(self, measured: CentredMoments) -> CentredMoments:
        """Returns the changes of the arrays of `measured`."""
        changes = jax.tree.map(jnp.zeros_like, measured)._replace(var=2 * self.half_var)
        if self.count is not None:
            changes = changes._replace(count=self.count)
        if self.mean is None:
            return changes
        if measured.delta is None:
            return changes._replace(shift=self.mean)
        return changes._replace(delta=self.mean)


def moment_changes(
    reduction: Reduction,
    deviation: jax.Array,
    mask: jax.Array | None,
    measured: CentredMoments,
    dx: jax.Array | None,
    d_mask: jax.Array | None,
    domains: Domains | None = None,
) -> MomentChanges:
    """Differentiates the moments by what they are, not by how they were computed.

    The guard, the shift and the second pass are means to the same end, so that none of them is
    differentiated. What is left are two sums over the batch, and one collective, of which the
    transpose in reverse mode is no sum at all.

    Args:
        reduction: as in `centred_moments`, which has the formulas.
        deviation: ``x - mean``.
        mask: as in `centred_moments`.
        measured: the moments.
        dx: the change of x, or None.
        d_mask: the change of the weights, or None.
        domains: as in `centred_moments`.

    Returns:
        The changes.
    """
    deviation = keep_valid(deviation, mask)
    # 1. This device's sums of count * d(mean) and, since a square has two equal factors, of half of
    # count * d(var).
    if dx is None:
        of_mean, of_var = jnp.zeros_like(deviation), jnp.zeros_like(deviation.real)
    else:
        of_mean = weigh(keep_valid(dx.astype(deviation.dtype), mask), mask)
        of_var = _real_product(of_mean, deviation)
    add = sum_over if domains is None else sum_changes
    sums = [add(reduction, part, domains) for part in (of_mean, of_var)]
    if mask is not None and d_mask is not None:
        d_weight = keep_valid(d_mask.astype(of_var.dtype), mask)
        of_weights = 0.5 * (absolute_square(deviation) - spread(domains, measured.var))
        d_mean = d_weight.astype(deviation.dtype) * deviation
        sums[0] += add(reduction, d_mean, domains)
        sums[1] += add(reduction, d_weight * of_weights, domains)
        sums.append(local_count(reduction, d_weight, deviation.shape, domains))
    # 2. All devices' sums, in one collective.
    totals = all_reduce(reduction, *sums)
    # 3. Divided by the count, which is a constant but for the weights. How the count changes the
    # two means is in the sums already: they were taken of deviations.
    divisor = divisor_of(reduction, deviation, mask, measured.count, domains)
    return MomentChanges(
        mean=None if reduction.method == "mean_square" else divide(totals[0], divisor),
        half_var=divide(totals[1], divisor),
        count=totals[2] if len(totals) > 2 else None,
    )


def _real_product(first: jax.Array, second: jax.Array) -> jax.Array:
    product = first * jnp.conj(second)
    return product.real if jnp.iscomplexobj(product) else product


def cancels(delta: jax.Array, var: jax.Array) -> jax.Array:
    """Tells where the variance has lost its digits, so that x must be measured again.

    Also true where the squares overflowed although the values did not. False for a feature that
    is NaN or infinite: measuring again would not help it.
    """
    kept = absolute_square(delta) <= CANCELLATION_THRESHOLD * var
    return jnp.isfinite(delta) & ~(kept & (var < jnp.inf))
