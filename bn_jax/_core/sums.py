"""Sums over examples and positions, over all devices and by domain, with what they are sums of.

Arrays keep the rank of x, so that features on any axes need no extra code.
"""

from functools import partial
from math import prod
from typing import TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax._compat import varying_axes
from bn_jax._core.axes import Reduction, all_reduce, as_numbers, static_count, vary_over
from bn_jax._core.blocks import ROWS_TO_SUM, rows_of_a_block, sum_together
from bn_jax._core.checks import statistics_dtype
from bn_jax._core.domains import Domains, collect, collect_change, spread

Sums: TypeAlias = tuple[jax.Array, ...]
Values = TypeVar("Values")


def centre(x: jax.Array, shift: jax.Array, delta: jax.Array | None) -> jax.Array:
    """Returns ``x - (shift + delta)`` without rounding the sum."""
    deviation = x.astype(shift.dtype) - shift
    return deviation if delta is None else deviation - delta


def centre_by(
    domains: Domains | None, x: jax.Array, shift: jax.Array, delta: jax.Array | None
) -> jax.Array:
    """Returns ``x - (shift + delta)``, where there are domains by the rows of tables."""
    if domains is not None:
        shift = _spread_centre(domains, shift)
        delta = None if delta is None else _spread_centre(domains, delta)
    return centre(x, shift, delta)


def _spread_centre(domains: Domains, table: jax.Array) -> jax.Array:
    """Returns the row of each example, or what all examples share."""
    return table if domains.share(table) else spread(domains, table)


def centre_apart(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns ``x - shift`` in a way that XLA does not recognize as the same.

    On a CPU, XLA writes out what two loops share, even `shift` broadcast to the size of x. It does
    not see that ``x - shift`` and ``x + (-shift)`` are equal. A conversion has no such twin, and is
    kept apart by a barrier.
    """
    if x.dtype != shift.dtype:
        x = unshared(x)
    return x.astype(shift.dtype) + (-shift)


def absolute_square(values: jax.Array) -> jax.Array:
    """Returns ``|values|**2``, real."""
    if jnp.iscomplexobj(values):
        return lax.square(values.real) + lax.square(values.imag)
    return lax.square(values)


def counted(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    sums: Sums,
    domains: Domains | None = None,
) -> tuple[jax.Array, ...]:
    """Returns the count and the sums over all devices."""
    dtype = statistics_dtype(sums[0].dtype)
    if mask is not None:
        count = local_count(reduction, mask.astype(dtype), x.shape, domains)
    elif domains is not None:
        count = local_count(reduction, jnp.ones((1,) * x.ndim, dtype), x.shape, domains)
    else:
        return count_of(reduction, x), *all_reduce(reduction, *sums)
    return all_reduce(reduction, count, *sums)


def count_of(reduction: Reduction, x: jax.Array) -> jax.Array:
    """Returns the count of all values of x, of its rank."""
    dtype, number = statistics_dtype(x.dtype), static_count(reduction, x.shape)
    if not isinstance(number, int):
        number = static_count(reduction, as_numbers(x.shape, dtype))
    return jnp.full((1,) * x.ndim, number, dtype)


def divisor_of(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    count: jax.Array,
    domains: Domains | None = None,
) -> jax.Array | float:
    """Returns the count, or 1 where nothing entered; a Python number where it is static."""
    number = static_count(reduction, x.shape)
    if mask is None and domains is None and isinstance(number, int):
        return float(max(1, number))
    return jnp.where(count > 0, count, 1)


def divide(total: jax.Array, divisor: jax.Array | float) -> jax.Array:
    return total / (divisor if isinstance(divisor, float) else divisor.astype(total.dtype))


def local_sums(
    reduction: Reduction,
    dtype: jnp.dtype,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array | None,
    domains: Domains | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sums deviations from the shift, or from zero, and their squares.

    Args:
        reduction: what to sum over.
        dtype: of the sums.
        x: the values.
        mask: the mask, or None.
        shift: the shift, a table where there are domains; None for zero.
        domains: the domains, for sums of each, or None.
    """
    if shift is None:
        shift = jnp.zeros((), dtype)
    if domains is not None and _is_mask(reduction, x, domains):
        mask, domains = restrict(mask, domains.known()), None
    if domains is not None and not domains.selects:
        in_turn, at_once = (partial(way, reduction) for way in (_sum_in_turn, _sum_by_product))
        ways = domains.by_platform(in_turn, at_once, _most_in_turn(reduction, x))
        return cast(tuple[jax.Array, jax.Array], ways(domains, x, mask, shift))
    if mask is not None and domains is None:
        total, square = sum_together(reduction.axes, *_select(x, mask, shift))
        return total, square
    start = unshared(x) if x.dtype != dtype else x
    if domains is not None:
        shift = _spread_centre(domains, shift)
    total, square = centre(start, shift, None), absolute_square(centre_apart(start, shift))
    if mask is not None:
        total, square = (weigh(keep_valid(part, mask), mask) for part in (total, square))
    return sum_over(reduction, total, domains), sum_over(reduction, square, domains)


def _is_mask(reduction: Reduction, x: jax.Array, domains: Domains) -> bool:
    """Tells whether one domain is summed as a mask, and not after sums over positions."""
    rows_or_blocks = reduction.axes == (domains.axis,) or _has_blocks(reduction, x)
    return domains.is_mask() and rows_or_blocks


def _has_blocks(reduction: Reduction, x: jax.Array) -> bool:
    return rows_of_a_block(reduction.axes, x, ROWS_TO_SUM) is not None


def _most_in_turn(reduction: Reduction, x: jax.Array) -> dict[str, int]:
    """Returns up to how many domains are summed in turn, by platform.

    On a GPU, each domain reads x once, where products write and read two arrays in float32. On a
    CPU, a loop takes two domains.
    """
    most = {"tpu": 16, "cuda": 16 // x.dtype.itemsize}
    return most | {"cpu": 4} if _has_blocks(reduction, x) else most


def _sum_by_product(
    reduction: Reduction,
    domains: Domains,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sums deviations and squares of all domains, by the ways of `collect`."""
    total, square = _select(x, mask, _spread_centre(domains, shift))
    return sum_over(reduction, total, domains), sum_over(reduction, square, domains)


def _sum_in_turn(
    reduction: Reduction,
    domains: Domains,
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Sums deviations and squares of one domain after the other, as if the others were masked."""
    selected: list[jax.Array] = []
    for number in range(domains.number):
        of_domain = restrict(mask, domains.are_of(number))
        selected += _select(x, of_domain, domains.row_of(shift, number))
    sums = sum_together(reduction.axes, *selected)
    totals, squares = (lax.concatenate(sums[part::2], domains.axis) for part in (0, 1))
    return totals, squares


def _select(x: jax.Array, mask: jax.Array | None, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns weighted deviations and their weighted squares, 0 where the mask is."""
    deviation = keep_valid(centre(x, shift, None), mask)
    return weigh(deviation, mask), weigh(absolute_square(deviation), mask)


def unshared(values: Values) -> Values:
    """Returns the values behind a barrier on a CPU, so that XLA does not share work on them.

    There, XLA writes out what two loops share, in float32.
    """
    # A barrier makes all of them vary over the same mesh axes, and so must the other branch.
    names: frozenset[str] = frozenset().union(*map(varying_axes, jax.tree.leaves(values)))
    return lax.platform_dependent(
        jax.tree.map(partial(vary_over, names), values),
        cpu=lax.optimization_barrier,
        default=lambda values: values,
    )


def local_count(
    reduction: Reduction, mask: jax.Array, shape: tuple[int, ...], domains: Domains | None = None
) -> jax.Array:
    """Sums the weights, to size 1 along every feature axis where the mask has size 1."""
    sizes = as_numbers(shape, mask.dtype)
    # Domains count their examples, also where the mask is the same for all.
    unseen_axes = [
        axis
        for axis in reduction.axes
        if mask.shape[axis] == 1 and (domains is None or not domains.tell_apart(axis))
    ]
    # A float: as an integer, more than 2**31 positions would not fit into the int32 of JAX.
    unseen = prod((sizes[axis] for axis in unseen_axes), start=1.0)
    return sum_over(reduction, mask, domains) * unseen


def sum_over(reduction: Reduction, values: jax.Array, domains: Domains | None = None) -> jax.Array:
    """Sums over the reduced axes, which stay with size 1, or by domain, which gives a table."""
    if domains is None:
        return lax.expand_dims(lax.reduce_sum(values, reduction.axes), reduction.axes)
    return collect(domains, _sum_over_positions(reduction, values, domains))


def sum_changes(
    reduction: Reduction, values: jax.Array, domains: Domains | None = None
) -> jax.Array:
    """Computes `sum_over` by domain in a rule for derivatives."""
    assert domains is not None
    return collect_change(domains, _sum_over_positions(reduction, values, domains))


def _sum_over_positions(reduction: Reduction, values: jax.Array, domains: Domains) -> jax.Array:
    positions = tuple([axis for axis in reduction.axes if not domains.tell_apart(axis)])
    return sum_over(reduction._replace(axes=positions), values)


def keep_valid(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Zeroes what the mask leaves out, by selection: a product would keep its NaN."""
    return values if mask is None else jnp.where(mask.astype(bool), values, 0)


def restrict(mask: jax.Array | None, weights: jax.Array) -> jax.Array:
    """Returns the mask times weights or booleans of the same rank."""
    if mask is None:
        return weights
    if weights.dtype == jnp.bool_:
        return jnp.where(weights, mask, jnp.zeros_like(mask))
    if mask.dtype == jnp.bool_:
        return jnp.where(mask, weights, 0)
    dtype = jnp.promote_types(mask.dtype, weights.dtype)
    return mask.astype(dtype) * weights.astype(dtype)


def weigh(values: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None or mask.dtype == jnp.bool_:
        return values
    return values * mask.astype(values.dtype)


def may_be_empty(x: jax.Array, mask: jax.Array | None, domains: Domains | None = None) -> bool:
    """Tells whether there may be features to which nothing enters."""
    return mask is not None or 0 in x.shape or domains is not None


def where_counted(
    mask: jax.Array | None,
    x: jax.Array,
    count: jax.Array,
    mean: jax.Array,
    otherwise: jax.Array,
    domains: Domains | None = None,
) -> jax.Array:
    """Selects the mean where something entered; only masks, domains and no values prevent that."""
    return jnp.where(count > 0, mean, otherwise) if may_be_empty(x, mask, domains) else mean
