"""Domains: tables with a row for each domain, spread over examples, and sums by domain.

A table has the rank of x, and domains in place of the examples: of ``x`` of shape [N, H, W, C],
tables are [D, 1, 1, C], or [1, 1, 1, C] for what the domains share. `spread` takes a row for every
example, [N, 1, 1, C]; `collect` adds what there is for each example into the row of its domain. One
is the transpose of the other. Both meet arrays with one value per example and feature, after the
sums over positions, so that x itself is read as often as by a norm without domains.

Both select. A product with the one-hot matrix would multiply the NaN of one domain by the zeros of
another. The transpose of a gather adds rows one after the other: its error grows with the batch.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax._core.axes import split_axis


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("index",),
    meta_fields=("number", "axis", "shares_statistics"),
)
@dataclass(frozen=True, kw_only=True)
class Domains:
    """The domain of every example.

    Attributes:
        index: integers of the rank of x, of size 1 on all axes but that of the examples. An example
            with another index than 0 to ``number - 1`` is of no domain.
        number: how many domains there are.
        axis: the axis of the examples.
        shares_statistics: whether the statistics are those of all domains together.
    """

    index: jax.Array
    number: int
    axis: int
    shares_statistics: bool

    def known(self) -> jax.Array:
        """Tells which examples are of a domain."""
        return (self.index >= 0) & (self.index < self.number)

    def split(self, axis: int, size: int, number: int | None) -> "Domains":
        """Returns the domains of examples that are divided into groups along a new axis."""
        index = split_axis(axis, size, self.index, number)
        return replace(self, index=index, axis=self.axis + 1)

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
    rows = jnp.expand_dims(table, domains.axis)
    return _sum_along(domains.axis + 1, jnp.where(domains._are_members(), rows, 0))


def collect(domains: Domains, values: jax.Array) -> jax.Array:
    """Sums what there is for every example by domain."""
    values = jnp.expand_dims(values, domains.axis + 1)
    return _sum_along(domains.axis, jnp.where(domains._are_members(), values, 0))


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
