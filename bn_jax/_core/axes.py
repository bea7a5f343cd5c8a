"""Named axes, devices and sharding: what is bound, sums over devices, and axes split into groups.

`bound_axes` is the one place that decides what an `axis_name` means where a norm is called.
"""

from math import prod
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bn_jax._compat import InconclusiveDimensionOperation, is_axis_bound, varying_axes, vmap_axes
from bn_jax._core.types import AxisIndexGroups, AxisName

Method: TypeAlias = Literal["guarded", "twice", "once", "mean_square"]


class Reduction(NamedTuple):
    """Which axes of an array, and which named axes of the program, moments are taken over, and how.

    It is hashable, so that compiled functions take it as a static argument. `moments.py` says what
    the methods compute, and what each guarantees.

    Attributes:
        axes: the axes of the array.
        axis_names: the named axes that a `shard_map`, `pmap` or `vmap` binds.
        axis_index_groups: groups of indices of these with moments of their own.
        method: "guarded" for one pass around a shift, and two more where that cancels; "twice" for
            two passes always; "once" for one pass around zero; "mean_square" for a mean of zero.
        is_mapped: whether a `vmap` binds one of the named axes.
    """

    axes: tuple[int, ...]
    axis_names: tuple[str, ...] = ()
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    method: Method = "guarded"
    is_mapped: bool = False


def make_reduction(
    x: jax.Array,
    axes: tuple[int, ...],
    axis_name: AxisName | None,
    axis_index_groups: AxisIndexGroups | None,
) -> Reduction:
    """Returns the reduction over some axes of `x` and those of the named axes that are bound.

    Raises:
        NameError: `axis_name` is not bound, but other axes are.
        ValueError: `axis_index_groups` do not divide `axis_name`, or nothing binds it. Or JAX
            cannot sum over an axis of a `vmap` that is beside a type-checked `shard_map`.
    """
    names = () if axis_name is None else bound_axes(x, axis_name)
    is_mapped = not set(names) <= set(_manual_mesh_axes())
    if is_mapped:
        _check_sums_of_vmap(axis_name)
    if axis_index_groups is None:
        return Reduction(axes, names, is_mapped=is_mapped)
    groups = canonical_groups(axis_name, axis_index_groups)
    if not names:
        raise ValueError(
            f"axis_index_groups={groups} divide axis_name={axis_name!r}, which nothing binds here: "
            "call inside of the shard_map, pmap or vmap that does, or pass each group its own x."
        )
    members = sum(map(len, groups))
    if members != _size_of(names):
        raise ValueError(
            f"axis_index_groups={groups} hold {members} indices, expected those of "
            f"axis_name={axis_name!r}, 0 to {_size_of(names) - 1}."
        )
    return Reduction(axes, names, groups, is_mapped=is_mapped)


def _check_sums_of_vmap(axis_name: AxisName | None) -> None:
    """Raises a ValueError where JAX has no collectives over the axes of a `vmap`."""
    mesh_axes = _manual_mesh_axes()
    # Only where types are checked does the mark change the type.
    if mesh_axes and varying_axes(vary_over(frozenset(mesh_axes), jnp.zeros(()))):
        raise ValueError(
            f"axis_name={axis_name!r} has an axis that a vmap binds, inside or around a shard_map "
            f"over {mesh_axes} that checks types, where JAX cannot sum over it: pass "
            "check_vma=False to the shard_map, or make the axis one of its mesh."
        )


def canonical_groups(
    axis_name: AxisName | None, axis_index_groups: AxisIndexGroups
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


def bound_axes(x: jax.Array, axis_name: AxisName | None) -> tuple[str, ...]:
    """Returns the named axes to sum over: those that a `shard_map`, `pmap` or `vmap` binds.

    The other names are left out where `x` is the whole array: where they are axes of the mesh in
    use that the compiler partitions, or where no axis is known at all, as under plain `jit`.

    Raises:
        NameError: other axes are known, so that the name must be wrong.
        ValueError: the size of the axis is symbolic.
    """
    if axis_name is None:
        return ()
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    try:
        bound = tuple(name for name in names if is_axis_bound(name))
    except InconclusiveDimensionOperation:
        raise ValueError(
            f"axis_name={axis_name!r} is bound by a vmap over an axis of symbolic size, over which "
            "JAX cannot sum: export with a number for that size, or reshape the axis into the "
            "batch instead of mapping over it, without axis_name."
        ) from None
    if bound == names:
        return bound
    others, in_use = list(dict.fromkeys([*_manual_mesh_axes(), *vmap_axes()])), _mesh_axes(x)
    for name in names:
        if name not in (*bound, *in_use) and (others or in_use):
            raise NameError(
                f"axis_name={name!r} is not bound by any enclosing shard_map, pmap or vmap "
                f"(bound: {others}), nor is it an axis of the mesh in use (its axes: {in_use}). "
                "Spell it as the map or the mesh does, or leave it out (axis_name=None): under "
                "jit without any of these, statistics are global anyway."
            )
    return bound


def _mesh_axes(x: jax.Array) -> list[str]:
    """Returns the axes of the mesh in use; along one that is not bound, arrays are whole."""
    meshes = (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh)
    return list(dict.fromkeys(name for mesh in meshes for name in mesh.axis_names))


def _manual_mesh_axes() -> list[str]:
    """Returns the axes that an enclosing `shard_map` or `pmap` binds."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types or (), strict=True)
    return [name for name, kind in kinds if kind == AxisType.Manual]


def _size_of(names: tuple[str, ...]) -> int:
    size = 1
    for name in names:
        size *= lax.axis_size(name)
    return size


def static_count(reduction: Reduction, shape: tuple[int, ...]) -> int:
    """Returns how many values of each feature a reduction covers on all devices, mask aside.

    Under `jax.export` it is symbolic where a reduced size is.
    """
    count = 1
    for axis in reduction.axes:
        count *= shape[axis]
    if reduction.axis_index_groups is not None:
        return count * len(reduction.axis_index_groups[0])
    return count * _size_of(reduction.axis_names) if reduction.axis_names else count


def as_numbers(sizes: tuple[int, ...], dtype: jnp.dtype) -> tuple[Any, ...]:
    """Returns sizes of axes, the symbolic ones as values of a floating-point dtype.

    JAX computes with symbolic sizes in int32, in which the product of several may overflow.
    """
    return tuple(size if isinstance(size, int) else jnp.asarray(size, dtype) for size in sizes)


def all_reduce(reduction: Reduction, *totals: jax.Array) -> tuple[jax.Array, ...]:
    """Sums arrays over the named axes, all of them in one collective."""
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
    # vmap and type-checked shard_map have no psum over groups: each group gets a row of a plain
    # psum.
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    numbers = jnp.asarray([group_of[index] for index in range(len(group_of))])
    mine = numbers[lax.axis_index(names)]
    rows = jnp.where(jnp.arange(len(groups))[:, None] == mine, flat[None], 0)
    return lax.psum(rows, names)[mine]


def any_group(reduction: Reduction, predicate: jax.Array) -> jax.Array:
    """Tells whether a predicate is true of any group, for a collective in a branch may span all.

    Without groups, it comes from sums over all devices, so that every device has the same.
    """
    if reduction.axis_index_groups is None:
        return predicate
    return lax.pmax(predicate.astype(jnp.int32), reduction.axis_names) > 0


def make_common(reduction: Reduction, values: jax.Array) -> jax.Array:
    """Averages values over the devices where type-checked `shard_map` says that they differ."""
    differing = varying_axes(values).intersection(reduction.axis_names)
    return lax.pmean(values, tuple(sorted(differing))) if differing else values


def vary_over(names: frozenset[str], values: jax.Array) -> jax.Array:
    """Marks values as varying over mesh axes, as operands that meet must be."""
    missing = names - varying_axes(values)
    return lax.pcast(values, tuple(sorted(missing)), to="varying") if missing else values


def vary_together(like: jax.Array, *values: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """Marks per-feature values as varying over the mesh axes that `like` varies over.

    The transpose of that mark is a psum. Marking the stacked values makes it a single one, where
    JAX would insert one for each value as it meets `like`.
    """
    present = [value for value in values if value is not None]
    names = varying_axes(like).difference(*map(varying_axes, present))
    if not names or not present:
        return values
    shape = jnp.broadcast_shapes(*(value.shape for value in present))
    stacked = jnp.stack([jnp.broadcast_to(value, shape) for value in present])
    marked = iter(vary_over(names, stacked))
    return tuple(None if value is None else next(marked) for value in values)


def place_like(reference: jax.Array, values: jax.Array) -> jax.Array:
    """Gives values the shape and the explicit sharding of `reference`, as a selection needs."""
    wanted = jax.typeof(reference)
    if values.shape != wanted.shape:
        values = jnp.broadcast_to(values, wanted.shape)
    explicit = set(wanted.sharding.spec) - {None}
    if explicit and jax.typeof(values).sharding != wanted.sharding:
        values = jax.sharding.reshard(values, wanted.sharding)
    return values


def _explicit_sharding(kind: Any) -> NamedSharding | None:
    """Returns the sharding of the type of an array, None where it is not explicit on any axis."""
    return kind.sharding if set(kind.sharding.spec) - {None} else None


def is_explicit(values: jax.Array) -> bool:
    """Tells whether an array is sharded explicitly on some axis."""
    return _explicit_sharding(jax.typeof(values)) is not None


def reshape_like(kind: Any, values: jax.Array) -> jax.Array:
    """Gives values the shape and the explicit sharding of the type of an array."""
    if values.shape == kind.shape:
        return values
    return lax.reshape(values, kind.shape, out_sharding=_explicit_sharding(kind))


def split_axis(axis: int, size: int, values: jax.Array, number: int | None = None) -> jax.Array:
    """Splits an axis into groups of `size`; an axis of length 1, to broadcast, into two of them.

    Args:
        axis: the axis to split.
        size: how many values make up a group.
        values: the array.
        number: how many groups there are, where that is known besides. JAX cannot always divide one
            symbolic size by another.
    """
    length = values.shape[axis]
    pair = (1, 1) if length == 1 else (length // size if number is None else number, size)
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


def sharding_of_groups(groups: jax.Array, axis: int) -> NamedSharding | None:
    """Returns where sums over all axes but those of groups shall be; JAX asks for explicit axes."""
    sharding = _explicit_sharding(jax.typeof(groups))
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[axis], None, None))
