"""The former names of `bn_jax._program`, until the tools that import them have changed."""

from collections.abc import Sequence
from typing import Any

from bn_jax._program.evaluator import in_double as exact
from bn_jax._program.norms import Norm, find_norms
from bn_jax._program.operations import as_affine_step, as_linear
from bn_jax._program.primitives import WITH_DERIVATIVE
from bn_jax._program.program import Equation, Program
from bn_jax._program.tracing import trace

__all__ = [
    "WITH_DERIVATIVE",
    "Equation",
    "Norm",
    "Program",
    "as_affine_step",
    "as_linear",
    "evaluate",
    "exact",
    "find_norms",
    "trace",
]


def evaluate(equation: Equation, values: Sequence[Any]) -> Sequence[Any]:
    """Computes the outputs of an equation from the values of its inputs."""
    return equation.run(values)
