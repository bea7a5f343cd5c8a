"""The formula of a norm, as text, and the values that its operands are broadcasts of."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax._program.operations import Affine
from bn_jax._program.primitives import LAYOUT, MARKS
from bn_jax._program.program import Program

_BINARY = {"add": "+", "add_any": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**"}


def broadcast_root(program: Program, value: int) -> tuple[int, tuple[int, ...]]:
    """Returns the value that a known value is a broadcast of, and its shape at the same rank."""
    shape = program.avals[value].shape
    equation = program.producer(value)
    if equation is not None and equation.name in MARKS:
        return broadcast_root(program, equation.inputs[0])
    if equation is None or equation.name != "broadcast_in_dim":
        return value, shape
    root, inner = broadcast_root(program, equation.inputs[0])
    outer = [1] * len(shape)
    for size, dimension in zip(inner, equation.options["broadcast_dimensions"], strict=True):
        outer[dimension] = size
    return root, tuple(outer)


def formula_of(program: Program, steps: Sequence[Affine]) -> str:
    """Returns affine steps as a formula: ``(x - mean) * rsqrt(var + 0.001)``.

    Variables have the last part of their paths as names.
    """
    text, is_sum = "x", False
    for step in steps:
        operand = "" if step.operand is None else _term(program, step.operand)
        whole = f"({text})" if is_sum else text
        if step.kind in ("mul", "div"):
            text, is_sum = f"{whole} {_BINARY[step.kind]} {operand}", False
        elif step.kind in ("add", "sub"):
            text, is_sum = f"{text} {_BINARY[step.kind]} {operand}", True
        elif step.kind == "from":
            text, is_sum = f"{operand} - {whole}", True
        elif step.kind == "neg":
            text, is_sum = f"-{whole}", False
    return text


def _term(program: Program, value: int) -> str:
    """Returns a known value as a name, a number, a call, or a sum or product in parentheses."""
    equation = program.producer(value)
    if value in program.constants:
        return _number(program.constants[value])
    if equation is None:
        return program.leaf_paths(value)[0].split("/")[-1]
    if equation.name in LAYOUT:
        return _term(program, equation.inputs[0])
    operands = [_term(program, operand) for operand in equation.inputs]
    if equation.name == "integer_pow":
        return f"{operands[0]}**{equation.options['y']}"
    if equation.name in _BINARY:
        return f"({operands[0]} {_BINARY[equation.name]} {operands[1]})"
    # A sum in a call needs no parentheses of its own.
    bare = [one[1:-1] if one.startswith("(") and one.endswith(")") else one for one in operands]
    return f"{equation.name}({', '.join(bare)})"


def _number(constant: object) -> str:
    if jnp.issubdtype(jnp.result_type(constant), jax.dtypes.extended):
        return "..."
    array = np.asarray(constant)
    return f"{array.item():.4g}" if array.size == 1 else "constant"
