"""Several sums in one loop, where XLA for CPUs would take each sum by itself.

XLA for CPUs hands the sum of an array to a library, with the arithmetic before it, but no
selections: what a mask selects is written first, and read again. The sum of several arrays at once,
or of complex numbers, it compiles itself, with all that they are computed from. That loop is fast
if it sums blocks of a few rows, with features next to each other in memory. The sums of the blocks
go to the library.

`sum_together` takes such sums. The sums of a backward pass are the transpose of spreading what
there is for each feature over the examples. `spread_together` spreads two arrays as the real and
the imaginary part of one, so that JAX takes both sums in one loop.
"""

import operator
from collections.abc import Sequence
from typing import TypeAlias, cast

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax._core.axes import is_explicit, split_axis

# The most rows of a block, in both directions, and arrays that one loop sums: with more, XLA does
# not vectorize it.
ROWS_TO_SUM, ROWS_TO_SPREAD, ARRAYS_OF_A_LOOP = 16, 8, 4
Arrays: TypeAlias = tuple[jax.Array, ...]


def sum_together(axes: Sequence[int], *values: jax.Array) -> Arrays:
    """Sums arrays of one shape over some axes, on a CPU in one loop where that can be.

    Args:
        axes: the axes to sum over, which stay with size 1.
        values: arrays that are computed from the same ones.

    Returns:
        The sum of each array.
    """

    def apart(*values: jax.Array) -> Arrays:
        return tuple([jnp.sum(part, tuple(axes), keepdims=True) for part in values])

    rows = rows_of_a_block(axes, values[0], ROWS_TO_SUM)
    if rows is None:
        return apart(*values)

    def in_blocks(*values: jax.Array) -> Arrays:
        blocks = [split_axis(max(axes), rows, part) for part in values]
        some = range(0, len(blocks), ARRAYS_OF_A_LOOP)
        sums = [_sum_blocks(max(axes), blocks[i : i + ARRAYS_OF_A_LOOP]) for i in some]
        return apart(*(part for parts in sums for part in parts))

    return cast(Arrays, lax.platform_dependent(*values, cpu=in_blocks, default=apart))


def _sum_blocks(axis: int, blocks: Sequence[jax.Array]) -> Arrays:
    zeros = tuple([jnp.zeros((), part.dtype) for part in blocks])

    def add(first: Arrays, second: Arrays) -> Arrays:
        return tuple(map(operator.add, first, second))

    return tuple(lax.reduce(tuple(blocks), zeros, add, (axis + 1,)))


def spread_together(
    like: jax.Array, first: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Lets two arrays broadcast to x so that, on a CPU, the transpose sums both in one loop.

    Args:
        like: an array of the shape of x.
        first: of the rank of x, real, with size 1 on the axes to spread over.
        second: as `first`.

    Returns:
        The two arrays, in the shape of x where that is of use.
    """
    kinds = {(part.shape, part.dtype) for part in (first, second)}
    axes = [axis for axis in range(like.ndim) if first.shape[axis] == 1]
    rows = rows_of_a_block(axes, like, ROWS_TO_SPREAD)
    if rows is None or len(kinds) > 1 or jnp.iscomplexobj(first):
        return first, second
    shape, axis = like.shape, max(axes)

    def in_blocks(first: jax.Array, second: jax.Array) -> Arrays:
        of_block = (*shape[:axis], shape[axis] // rows, 1, *shape[axis + 1 :])
        parts = [
            jnp.broadcast_to(jnp.expand_dims(part, axis), of_block) for part in (first, second)
        ]
        in_block = (*of_block[: axis + 1], rows, *of_block[axis + 2 :])
        both = jnp.broadcast_to(lax.complex(*parts), in_block).reshape(shape)
        return lax.real(both), lax.imag(both)

    def apart(*values: jax.Array) -> Arrays:
        return tuple([jnp.broadcast_to(part, shape) for part in values])

    both = lax.platform_dependent(first, second, cpu=in_blocks, default=apart)
    return cast(tuple[jax.Array, jax.Array], both)


def rows_of_a_block(axes: Sequence[int], x: jax.Array, most: int) -> int | None:
    """Returns how many values along the last of the axes to sum over make a block, None for none.

    A block on two devices would be moved, and how the compiler splits an array is not known. Up to
    64 devices that share the examples evenly hold whole blocks if there is a multiple of 64 blocks.
    The first axis is that of the examples. Others are hardly ever split.
    """
    axis = max(axes, default=x.ndim)
    if axis >= x.ndim - 1 or not isinstance(x.shape[axis], int) or is_explicit(x):
        return None
    if axis == 0:
        return None if x.shape[0] % (64 * most) else most
    return next((rows for rows in range(most, 3, -1) if x.shape[axis] % rows == 0), None)
