"""The kernels of linear layers: the variables they come from, their dtypes and their paths."""

from collections.abc import Iterable
from functools import reduce
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from bn_jax._program import (
    Equation,
    Linear,
    Program,
    as_affine_step,
    holds_products,
    parent_of,
)
from bn_jax._program.primitives import KEEPS_REALS, LAYOUT


def kernel_root(program: Program, value: int) -> tuple[int, tuple[Equation, ...]]:
    """Returns the value that a kernel is a rearrangement of, and the equations between them.

    Casts are among these, but none of a quantized kernel: that is stored in the dtype of the cast.
    """
    layout: list[Equation] = []
    while (equation := program.producer(value)) is not None and equation.name in LAYOUT:
        before, after = program.avals[equation.inputs[0]], program.avals[value]
        if prod(before.shape) != prod(after.shape) or not holds_products(before.dtype):
            break
        layout.append(equation)
        value = equation.inputs[0]
    return value, tuple(reversed(layout))


def dtypes_of_kernel(program: Program, kernel: int) -> list[np.dtype[Any]]:
    """Returns the dtype that a kernel is stored in, and those that it is cast to."""
    root, layout = kernel_root(program, kernel)
    return [program.avals[value].dtype for value in (root, *(one.outputs[0] for one in layout))]


def why_fixed(program: Program, linear: Linear) -> str | None:
    """Returns what a linear layer is whose kernel cannot be multiplied; None if it can be."""
    root, _ = kernel_root(program, linear.kernel)
    if not program.origins[root]:
        return "a linear layer whose kernel is a constant, not a variable"
    result = program.avals[program.equations[linear.equation].outputs[0]].dtype
    for dtype in dtypes_of_kernel(program, linear.kernel):
        if not holds_products(dtype):
            path = path_of(program, root, "kernel")
            return (
                f"a linear layer whose kernel {path} is in {dtype.name}, which cannot hold its "
                "product with a norm"
            )
    if not holds_products(result):
        return f"a linear layer whose result is in {result.name}, which cannot hold that of a norm"
    return None


def loses_imaginary(program: Program, kernel: int, indices: Iterable[int]) -> bool:
    """Returns whether one of these affine steps is complex, but the kernel is stored as real."""
    dtypes = dtypes_of_kernel(program, kernel)
    if all(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return False
    steps = (as_affine_step(program, program.equations[index]) for index in indices)
    return any(
        may_be_complex(program, step.operand)
        for step in steps
        if step is not None and step.operand is not None and step.kind in ("mul", "div")
    )


def may_be_complex(program: Program, value: int) -> bool:
    """Returns whether a known value is complex, and not real numbers in a complex dtype."""
    equation = program.producer(value)
    if not _is_complex(program, value):
        return False
    if value in program.constants:
        return bool(np.any(np.imag(program.constants[value])))
    if equation is None or equation.name not in LAYOUT | KEEPS_REALS:
        return True
    return any(may_be_complex(program, operand) for operand in equation.inputs)


def _is_complex(program: Program, value: int) -> bool:
    return bool(jnp.issubdtype(program.avals[value].dtype, jnp.complexfloating))


def widest_dtype(program: Program, indices: Iterable[int]) -> np.dtype[Any]:
    """Returns the dtype that holds the outputs of all of these equations."""
    dtypes = [program.avals[program.equations[index].outputs[0]].dtype for index in indices]
    return reduce(jnp.promote_types, dtypes)


def path_of(program: Program, value: int, default: str | None = None) -> str:
    """Returns the path of a leaf; for a computed value, a path made of what it is computed from.

    `default` is the last part of the path of a computed value. Without it, that is the names of the
    leaves that the value comes from, and of the primitive that computes it.
    """
    if value in program.leaves:
        return program.paths[program.leaves.index(value)] or "variables"
    paths = program.leaf_paths(value)
    if default is None:
        names = list(dict.fromkeys(path.split("/")[-1] for path in paths))
        equation = program.producer(value)
        if equation is not None:
            names.append(equation.name)
        default = "_".join(names)
    parent = parent_of(paths)
    return f"{parent}/{default}" if parent else default
