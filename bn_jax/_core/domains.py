"""Domains: tables with a row for each domain, spread over examples, and sums by domain.

A table has the rank of x, and domains in place of the examples: of ``x`` of shape [N, H, W, C],
tables are [D, 1, 1, C], or [1, 1, 1, C] for what the domains share. `spread` takes a row for every
example, [N, 1, 1, C]; `collect` adds what there is for each example into the row of its domain. One
is the transpose of the other. Both meet arrays with one value per example and feature, after the
sums over positions, so that x itself need not be read more often than without domains.

**By selection.** Both select along an axis of domains and sum: exact, whatever else is NaN. That
reads the arrays with one value per example and feature once for each domain, which is little where
an example has many positions.

**By product.** Where it has few, those arrays are as large as x. Then `spread` is a gather, and
`collect` a product with the one-hot matrix, in full precision. The product multiplies the NaN of
one domain by the zeros of the others, so that sums which are not finite are taken again, by
selection. The transpose of a gather adds rows one after the other, with an error that grows with
the batch. So in a derivative rule, of which reverse mode runs the transpose, each takes the form
whose transpose is the right one: `spread_change` is a product, and `collect_change` adds rows. In
reverse mode, a cotangent of one example that is not finite makes the derivatives by the parameters
of all domains so.

**In turn.** For a few domains of rows, a selection for each domain is cheaper than both where XLA
fuses it: on TPUs up to nine domains read x once together, on GPUs each of them does. XLA for CPUs
writes out what it selects before it sums it, but for the sums of `sum_together`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax._core.axes import split_axis
from bn_jax._core.blocks import spread_together

# Up to how many domains of rows are taken in turn, by platform: tables spread over examples, and
# sums of one array.
SPREAD_IN_TURN = {"tpu": 16}
COLLECTED_IN_TURN = {"tpu": 16, "cuda": 2}
# A function of domains, and of what has rows for them or for examples.
Way: TypeAlias = Callable[..., Any]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("index",),
    meta_fields=("number", "axis", "shares_statistics", "selects"),
)
@dataclass(frozen=True, kw_only=True)
class Domains:
    """The domain of every example.

    Attributes:
        index: integers of the rank of x, of size 1 on all axes but that of the examples, and there
            too where all examples are of one domain. An example with another index than 0 to
            ``number - 1`` is of no domain.
        number: how many domains there are.
        axis: the axis of the examples.
        shares_statistics: whether the statistics are those of all domains together.
        selects: whether rows are selected, instead of gathered and summed by products.
    """

    index: jax.Array
    number: int
    axis: int
    shares_statistics: bool
    selects: bool

    def tell_apart(self, axis: int) -> bool:
        """Tells whether examples along an axis may be of different domains."""
        return self.index.shape[axis] != 1

    def known(self) -> jax.Array:
        """Tells which examples are of a domain."""
        return (self.index >= 0) & (self.index < self.number)

    def split(self, axis: int, size: int, number: int | None) -> "Domains":
        """Returns the domains of examples that are divided into groups along a new axis."""
        index = split_axis(axis, size, self.index, number)
        return replace(self, index=index, axis=self.axis + 1, selects=True)

    def selecting(self) -> "Domains":
        """Returns the same domains, whose rows are selected."""
        return self if self.selects else replace(self, selects=True)

    def table_of(self, leaf: jax.Array, feature_axes: tuple[int, ...]) -> jax.Array:
        """Returns parameters or statistics, [*F] or [D, *F], as a table.

        Args:
            leaf: the parameters or statistics.
            feature_axes: the axes of the features in x, where no axis of groups is.
        """
        before = sum(axis < self.axis for axis in feature_axes)
        if leaf.ndim == len(feature_axes):
            leaf = jnp.expand_dims(leaf, before)
        else:
            leaf = jnp.moveaxis(leaf, 0, before)
        others = [a for a in range(self.index.ndim) if a not in (*feature_axes, self.axis)]
        return jnp.expand_dims(leaf, others)

    def leaf_of(self, table: jax.Array, feature_axes: tuple[int, ...]) -> jax.Array:
        """Returns a table as an array of shape [D, *F]."""
        others = [a for a in range(table.ndim) if a not in (*feature_axes, self.axis)]
        return jnp.moveaxis(lax.squeeze(table, others), sum(a < self.axis for a in feature_axes), 0)

    def by_platform(self, in_turn: Way, at_once: Way, most: Mapping[str, int]) -> Way:
        """Returns the way that is the cheapest where the program will run.

        Args:
            in_turn: takes the domains one after the other.
            at_once: does not.
            most: up to how many domains are taken in turn, by platform.
        """
        ways = {platform: in_turn for platform, number in most.items() if self.number <= number}
        return partial(lax.platform_dependent, default=at_once, **ways) if ways else at_once

    def is_mask(self) -> bool:
        """Tells whether there is one domain, of some of the examples."""
        return self.number == 1 and self.tell_apart(self.axis)

    def share(self, table: jax.Array) -> bool:
        """Tells whether a table has one row for all domains."""
        return table.ndim == 0 or table.shape[self.axis] == 1

    def are_of(self, number: int) -> jax.Array:
        """Tells which examples are of one domain."""
        return self.index == number

    def row_of(self, table: jax.Array, number: int) -> jax.Array:
        """Returns the row of one domain, or what the domains share."""
        if self.share(table):
            return table
        return lax.slice_in_dim(table, number, number + 1, axis=self.axis)

    def _index_in_bounds(self) -> jax.Array:
        """Returns the domains, [N], with `number` for none."""
        index = self.index.reshape(-1)
        return jnp.where((index >= 0) & (index < self.number), index, self.number)

    def _one_hot(self, dtype: jnp.dtype) -> jax.Array:
        numbers = jnp.arange(self.number, dtype=self.index.dtype)[None]
        return (self.index.reshape(-1, 1) == numbers).astype(dtype)

    def _are_members(self) -> jax.Array:
        """Tells which example is of which domain; domains are on the axis after the examples."""
        numbers = jnp.arange(self.number, dtype=self.index.dtype)
        after = self.index.ndim - self.axis - 1
        numbers = numbers.reshape((1,) * (self.axis + 1) + (self.number,) + (1,) * after)
        return jnp.expand_dims(self.index, self.axis + 1) == numbers


def own_moments(domains: Domains | None) -> Domains | None:
    """Returns the domains if each has its own moments, None where all share them."""
    return None if domains is None or domains.shares_statistics else domains


def spread(domains: Domains | None, table: jax.Array) -> jax.Array:
    """Returns the row of its domain for every example, zeros for an example of none."""
    if domains is None:
        return table
    if domains.selects or table.shape[domains.axis] != domains.number:
        rows = jnp.expand_dims(table, domains.axis)
        return _sum_along(domains.axis + 1, jnp.where(domains._are_members(), rows, 0))
    return domains.by_platform(_select_in_turn, _gather, SPREAD_IN_TURN)(domains, table)


def spread_change(domains: Domains, table: jax.Array) -> jax.Array:
    """Computes `spread`, so that its transpose sums as `collect` does."""
    if domains.selects or table.shape[domains.axis] != domains.number:
        return spread(domains, table)
    return domains.by_platform(_select_in_turn, _multiply_table, COLLECTED_IN_TURN)(domains, table)


def spread_changes(
    domains: Domains, like: jax.Array, first: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes `spread_change` of two tables for x, an array of the shape of `like`.

    One domain of some examples is a mask, so that the transpose takes both sums together.
    """
    if not domains.is_mask():
        return spread_change(domains, first), spread_change(domains, second)
    first, second = spread_together(like, first, second)
    known = domains.are_of(0)
    return jnp.where(known, first, 0), jnp.where(known, second, 0)


def collect(domains: Domains, values: jax.Array) -> jax.Array:
    """Sums what there is for every example by domain."""
    if domains.selects or values.shape[domains.axis] == 1:
        values = jnp.expand_dims(values, domains.axis + 1)
        return _sum_along(domains.axis, jnp.where(domains._are_members(), values, 0))
    return domains.by_platform(_sum_in_turn, _multiply_values, COLLECTED_IN_TURN)(domains, values)


def collect_change(domains: Domains, values: jax.Array) -> jax.Array:
    """Computes `collect`, so that its transpose takes rows as `spread` does."""
    if domains.selects or values.shape[domains.axis] == 1:
        return collect(domains, values)
    return domains.by_platform(_sum_in_turn, _add_rows, COLLECTED_IN_TURN)(domains, values)


def _gather(domains: Domains, table: jax.Array) -> jax.Array:
    index = domains._index_in_bounds()
    return jnp.take(table, index, domains.axis, mode="fill", fill_value=0)


def _add_rows(domains: Domains, values: jax.Array) -> jax.Array:
    shape = list(values.shape)
    shape[domains.axis] = domains.number
    where = (slice(None),) * domains.axis + (domains._index_in_bounds(),)
    return jnp.zeros(shape, values.dtype).at[where].add(values, mode="drop")


def _select_in_turn(domains: Domains, table: jax.Array) -> jax.Array:
    rows = jnp.zeros((), table.dtype)
    for number in range(domains.number):
        rows = jnp.where(domains.are_of(number), domains.row_of(table, number), rows)
    return rows


def _sum_in_turn(domains: Domains, values: jax.Array) -> jax.Array:
    parts = [jnp.where(domains.are_of(number), values, 0) for number in range(domains.number)]
    sums = [jnp.sum(part, domains.axis, keepdims=True) for part in parts]
    return lax.concatenate(sums, domains.axis)


def _multiply_table(domains: Domains, table: jax.Array) -> jax.Array:
    return _multiply(domains._one_hot(table.dtype), 1, table, domains.axis)


def _multiply_values(domains: Domains, values: jax.Array) -> jax.Array:
    return _multiply(domains._one_hot(values.dtype), 0, values, domains.axis)


def _multiply(one_hot: jax.Array, contracted: int, values: jax.Array, axis: int) -> jax.Array:
    """Contracts an axis of values with the one-hot matrix, whose other axis takes its place."""
    dimensions = (((contracted,), (axis,)), ((), ()))
    product = lax.dot_general(one_hot, values, dimensions, precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(product, 0, axis)


def _sum_along(axis: int, values: jax.Array) -> jax.Array:
    return lax.reduce_sum(values, (axis,))


def place(
    domains: Domains | None,
    leaf: jax.Array,
    feature_axes: tuple[int, ...],
    shape: tuple[int, ...],
) -> jax.Array:
    """Returns parameters or statistics so that they broadcast to examples.

    Args:
        domains: the domains of the examples where they are not in groups, or None.
        leaf: of shape [*F], or [D, *F] where there are domains.
        feature_axes: the axes of the features in x.
        shape: the shape of what there is for each feature; one axis more than x where the examples
            are in groups.

    Returns:
        The leaf in `shape`, or a table of its rank.
    """
    if domains is None:
        return leaf.reshape(shape)
    table = domains.table_of(leaf, feature_axes)
    return table if table.ndim == len(shape) else jnp.expand_dims(table, domains.axis)
