"""Norms that are no affine steps by known values: what they normalize by, and their paths."""

from collections import deque
from collections.abc import Collection, Sequence, Set

import jax.numpy as jnp

from bn_jax._program.operations import as_linear
from bn_jax._program.primitives import (
    BETWEEN_ROOT_AND_VARIABLES,
    CAST,
    ELEMENTWISE,
    LAYOUT,
    PRODUCT,
    SHAPES,
)
from bn_jax._program.program import Equation, Program, parent_of


def unknown_root(program: Program, equation: Equation) -> int | None:
    """Returns the unknown value that an equation takes the inverse root of, or divides by.

    None for any other equation. Both make the output of a norm depend on more than variables.
    """
    if equation.name == "rsqrt":
        return None if program.is_known(equation.outputs[0]) else equation.inputs[0]
    if equation.name != "div" or program.is_known(equation.inputs[1]):
        return None
    divisor = program.producer(equation.inputs[1])
    while divisor is not None and divisor.name in ("broadcast_in_dim", "reshape"):
        divisor = program.producer(divisor.inputs[0])
    return divisor.inputs[0] if divisor is not None and divisor.name == "sqrt" else None


def selected_leaves(program: Program, value: int) -> tuple[str, ...]:
    """Returns the paths of the variables that a value is selected from by an argument.

    Empty where the value depends on an argument in any other way. A selection is an index, a slice,
    a choice, a sum of choices, or a product with numbers made of integers, such as a one-hot code;
    or one of these on each platform.
    """
    return tuple(path for known in _selected(program, value) for path in program.leaf_paths(known))


def selected_norm(program: Program, equation: Equation, rooted: Set[int]) -> tuple[str, ...]:
    """Returns the paths of the variables of a norm, if an equation is the scaling in one.

    It scales what a selected mean has been taken off by what is selected from known values that
    come through a root. Otherwise the result is empty.
    """
    if equation.name not in ("mul", "div") or any(map(program.is_known, equation.inputs)):
        return ()
    pairs = [tuple(equation.inputs)]
    if equation.name == "mul":
        pairs.append(pairs[0][::-1])
    for data, factor in pairs:
        if rooted.isdisjoint(known := _selected(program, factor)):
            continue
        before = _before_layout(program, data)
        if before is not None and before.name == "sub" and _selected(program, before.inputs[1]):
            return tuple(path for value in known for path in program.leaf_paths(value))
    return ()


def _before_layout(program: Program, value: int) -> Equation | None:
    """Returns the equation that makes a value, up to its layout."""
    equation = program.producer(value)
    while equation is not None and equation.name in LAYOUT:
        equation = program.producer(equation.inputs[0])
    return equation


def _selected(program: Program, value: int) -> tuple[int, ...]:
    """Returns the known values that a value is selected from, or none; see `selected_leaves`."""
    if program.is_known(value):
        return (value,) if program.origins[value] else ()
    equation = program.producer(value)
    if equation is None:
        return ()
    parts: Sequence[int] = equation.inputs
    if equation.name in ("gather", "dynamic_slice"):
        parts = equation.inputs[:1]
        if not program.is_known(parts[0]):
            return ()
    elif equation.name == "select_n":
        parts = equation.inputs[1:]
    elif equation.name == PRODUCT:
        parts = [one for one in equation.inputs if not _is_code(program, one)]
    elif equation.name == "reduce_sum":
        # A sum of anything else, as in the variance of an embedding, is no selection.
        chosen = _before_layout(program, equation.inputs[0])
        if chosen is None or chosen.name != "select_n":
            return ()
    elif equation.options.get("branches_platforms") is not None:
        # A choice of the platform, each branch of which selects.
        parts = [one for one in equation.inputs if program.is_known(one)]
        number = equation.outputs.index(value)
        if not all(_selected(body, body.outputs[number]) for body in equation.bodies):
            return ()
    elif equation.name not in ELEMENTWISE | LAYOUT:
        return ()
    found = [_selected(program, part) for part in parts if not _is_constant(program, part)]
    return tuple(known for values in found for known in values) if all(found) else ()


def _is_constant(program: Program, value: int) -> bool:
    return program.is_known(value) and not program.origins[value]


def _is_code(program: Program, value: int) -> bool:
    """Returns whether an unknown value is made of integers or truth values."""
    if program.is_known(value):
        return False
    equation = program.producer(value)
    while equation is not None and equation.name in LAYOUT:
        before = equation.inputs[0]
        if equation.name == CAST and not jnp.issubdtype(program.avals[before].dtype, jnp.inexact):
            return True
        equation = program.producer(before)
    return False


def whitening_leaves(program: Program, index: int, rooted: Collection[int]) -> tuple[str, ...]:
    """Returns the paths of the variables of a whitening norm, if an equation is its product.

    That multiplies what a mean has been taken off by as many features, with a matrix that comes
    through a root from a variable beside the mean. Otherwise the result is empty.
    """
    linear = as_linear(program, index)
    if linear is None or linear.kernel not in rooted:
        return ()
    shape = program.avals[linear.kernel].shape
    inputs = sorted(shape[axis] for axis in linear.kernel_inputs)
    if inputs != sorted(shape[axis] for axis in linear.kernel_outputs):
        return ()
    means = _subtracted_before(program, linear.data)
    paths = program.leaf_paths(linear.kernel)
    homes = {parent_of([path]) for path in means}
    return (*means, *paths) if homes & {parent_of([path]) for path in paths} else ()


def _subtracted_before(program: Program, value: int) -> tuple[str, ...]:
    """Returns the paths of what is taken off right before a value, up to changes of shape."""
    leaves: list[str] = []
    equation = program.producer(value)
    while equation is not None and equation.name in SHAPES | {CAST, "sub"}:
        if equation.name == "sub":
            leaves += program.leaf_paths(equation.inputs[1])
        equation = program.producer(equation.inputs[0])
    return tuple(leaves)


def leaves_after(program: Program, start: int) -> tuple[str, ...]:
    """Returns the paths of the first variables that the output of an equation is combined with."""
    ahead = deque([start])
    seen = {start}
    while ahead:
        equation = program.equations[ahead.popleft()]
        if equation.name not in BETWEEN_ROOT_AND_VARIABLES:
            continue
        leaves = [path for value in equation.inputs for path in program.leaf_paths(value)]
        if leaves:
            return tuple(leaves)
        for index in program.consumers[equation.outputs[0]]:
            if index not in seen:
                seen.add(index)
                ahead.append(index)
    return ()
