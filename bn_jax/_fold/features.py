"""Which feature each position of an array belongs to, and where features go as shapes change.

The features of an array are an integer array of the same rank. It has size 1 along the axes that no
feature depends on, such as the batch, so that neither their sizes nor symbols for them matter.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np

from bn_jax import _compat
from bn_jax._program import Equation, Program
from bn_jax._program.primitives import SHAPES

Array: TypeAlias = np.ndarray[Any, Any]


def placed(values: Array, dimensions: Sequence[int], rank: int) -> Array:
    """Returns values as an array of another rank, with their axes at the given dimensions."""
    order = np.argsort(np.asarray(dimensions, int))
    shape = [1] * rank
    for axis, dimension in enumerate(dimensions):
        shape[dimension] = values.shape[axis]
    return values.transpose(order).reshape(shape)


def moved(
    program: Program, equation: Equation, values: Array, *, spreads: bool = False
) -> Array | None:
    """Returns values by position, of size 1 along free axes, after a change of shape.

    None where the equation is no change of shape, or where a reshape joins free axes with others.
    With `spreads`, the values are repeated along those free axes instead.
    """
    if equation.name not in SHAPES:
        return None
    if equation.name == "transpose":
        return values.transpose(equation.options["permutation"])
    if equation.name == "squeeze":
        return values.squeeze(equation.options["dimensions"])
    before = program.avals[equation.inputs[0]].shape
    after = program.avals[equation.outputs[0]].shape
    if equation.name == "broadcast_in_dim":
        return placed(values, equation.options["broadcast_dimensions"], len(after))
    if equation.options["dimensions"] is not None:
        return None
    return _reshaped(before, after, values, spreads)


def _reshaped(
    before: Sequence[int], after: Sequence[int], values: Array, spreads: bool
) -> Array | None:
    groups = _common_factors(before, after)
    if groups is None:
        return None
    shape: list[int] = []
    for old_axes, new_axes in groups:
        longer = [axis for axis in old_axes if before[axis] != 1]
        free = [axis for axis in longer if values.shape[axis] == 1]
        if len(free) == len(longer):
            shape += [1] * len(new_axes)
            continue
        if free and not spreads:
            return None
        for axis in free:
            values = np.repeat(values, before[axis], axis=axis)
        shape += [after[axis] for axis in new_axes]
    return values.reshape(shape)


def _common_factors(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]] | None:
    """Returns the smallest runs of axes of two shapes that have the same number of positions."""
    groups: list[tuple[list[int], list[int]]] = []
    old_start, new_start = 0, 0
    while old_start < len(before) or new_start < len(after):
        old_end = min(old_start + 1, len(before))
        new_end = min(new_start + 1, len(after))
        while (old := prod(before[old_start:old_end])) != (new := prod(after[new_start:new_end])):
            extends_old = old_end < len(before) and _may_be_smaller(old, new)
            extends_new = new_end < len(after) and _may_be_smaller(new, old)
            if not extends_old and not extends_new:
                return None
            if extends_old:
                old_end += 1
            if extends_new:
                new_end += 1
        groups.append((list(range(old_start, old_end)), list(range(new_start, new_end))))
        old_start, new_start = old_end, new_end
    return groups


def _may_be_smaller(size: int, other: int) -> bool:
    """Returns whether a size is smaller than another for some values of the symbols in them."""
    try:
        return size < other
    except _compat.InconclusiveDimensionOperation:
        return bool(size % other != 0)
