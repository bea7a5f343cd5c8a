"""A traced forward function as data: its equations, the norms in it, and its evaluator.

- `as_pure`: a model of Linen, of NNX or of plain functions as a pure function of arrays;
- `trace`: such a function as a flat `Program`;
- `find_norms`, `as_affine_step`, `as_linear`: what its equations compute;
- `evaluate`: values of a program, computed from others.

Example:
    >>> import jax, jax.numpy as jnp, bn_jax as bn
    >>> from bn_jax._program import find_norms, trace
    >>> layer = bn.linen.BatchNorm(use_running_average=True)
    >>> x = jnp.ones((2, 3))
    >>> program = trace(layer.apply, layer.init(jax.random.key(0), x), x)
    >>> norm, = find_norms(program)
    >>> [program.equations[index].name for index in norm.steps]
    ['sub', 'mul', 'add']
"""

from bn_jax._program.evaluator import (
    Step,
    evaluate,
    in_double,
    inputs_of,
    run_steps,
    steps_to,
)
from bn_jax._program.formulas import broadcast_root
from bn_jax._program.forward import PureForward, as_pure, is_variable, value_of
from bn_jax._program.norms import Norm, find_norms
from bn_jax._program.operations import (
    Affine,
    Linear,
    as_affine_step,
    as_linear,
    holds_products,
)
from bn_jax._program.program import Equation, Program, Value, parent_of
from bn_jax._program.recipes import recipe_of
from bn_jax._program.tracing import jaxprs_in, trace

__all__ = [
    "Affine",
    "Equation",
    "Linear",
    "Norm",
    "Program",
    "PureForward",
    "Step",
    "Value",
    "as_affine_step",
    "as_linear",
    "as_pure",
    "broadcast_root",
    "evaluate",
    "find_norms",
    "holds_products",
    "in_double",
    "inputs_of",
    "is_variable",
    "jaxprs_in",
    "parent_of",
    "recipe_of",
    "run_steps",
    "steps_to",
    "trace",
    "value_of",
]
