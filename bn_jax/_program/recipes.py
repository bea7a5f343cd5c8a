"""Digests of how the known values of a program are computed.

They tell whether two traces of a function, for arguments of different shapes, compute the same.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as JaxprLiteral

from bn_jax._program.primitives import MARKS
from bn_jax._program.program import Program


def recipe_of(program: Program, value: int, seen: dict[int, str]) -> str:
    """Returns a digest of how a known value is computed: from which leaves, by which equations.

    `seen` has the digests of values of this program so far; new ones are added.
    """
    if value not in seen:
        recipe: tuple[Any, ...]
        equation = program.producer(value)
        if equation is not None and equation.name in MARKS:
            return recipe_of(program, equation.inputs[0], seen)
        if value in program.leaves:
            recipe = ("leaf", program.leaves.index(value))
        elif equation is None:
            recipe = ("constant", _bytes_of(program.constants[value]))
        else:
            inputs = [recipe_of(program, operand, seen) for operand in equation.inputs]
            position = equation.outputs.index(value)
            recipe = (equation.name, position, _plain_options(equation.options), inputs)
        seen[value] = sha256(repr(recipe).encode()).hexdigest()
    return seen[value]


def _bytes_of(value: Any) -> tuple[str, bytes]:
    dtype = jnp.result_type(value)
    # Keys of random numbers have no bytes that NumPy could read.
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return str(dtype), b""
    return str(dtype), np.asarray(value).tobytes()


def _plain_options(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns what is the same for two equations that compute the same.

    Shardings differ where a function is traced inside `jax.shard_map`.
    """
    return [
        (name, _plain(option)) for name, option in sorted(options.items()) if "sharding" not in name
    ]


def _plain(option: Any) -> Any:
    if isinstance(option, tuple | list):
        return [_plain(part) for part in option]
    if isinstance(option, ClosedJaxpr):
        return _plain(option.jaxpr), [_bytes_of(constant) for constant in option.consts]
    if isinstance(option, Jaxpr):
        return [
            (
                eqn.primitive.name,
                _plain_options(eqn.params),
                [_bytes_of(atom.val) for atom in eqn.invars if isinstance(atom, JaxprLiteral)],
            )
            for eqn in option.eqns
        ]
    is_plain = option is None or isinstance(option, int | float | complex | str | np.dtype)
    return option if is_plain else type(option).__name__
