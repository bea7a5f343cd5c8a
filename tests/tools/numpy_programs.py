"""Traced programs, evaluated by NumPy in double precision: an oracle that compiles nothing.

Casts between floating-point dtypes are left out, so that what remains between two programs is what
their variables have been rounded to. Casts to integers and to floating point in 8 bits round.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

Array: TypeAlias = np.ndarray[Any, Any]


def run_in_numpy(function: Callable[..., jax.Array], *args: Any) -> Array:
    """Returns what a function of trees of arrays gives, traced and evaluated by NumPy."""
    closed = jax.make_jaxpr(function)(*args)
    (output,) = _run(
        closed.jaxpr, closed.consts, [_in_double(leaf) for leaf in jax.tree.leaves(args)]
    )
    return output


def run_equation(eqn: JaxprEqn, operands: Iterable[Any]) -> list[Array]:
    """Evaluates one equation of a traced program."""
    operands = [_in_double(operand) for operand in operands]
    body = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
    if body is not None:
        return _run(body.jaxpr, body.consts, operands)
    output = PRIMITIVES[eqn.primitive.name](*operands, **eqn.params)
    aval: Any = eqn.outvars[0].aval
    assert output.shape == aval.shape, eqn
    return [output]


def _in_double(value: Any) -> Array:
    array = np.asarray(value)
    if array.dtype == bool or np.issubdtype(array.dtype, np.integer):
        return array
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _run(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Array]) -> list[Array]:
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update(zip(jaxpr.constvars, map(_in_double, consts), strict=True))

    def read(atom: Any) -> Array:
        return _in_double(atom.val) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, run_equation(eqn, map(read, eqn.invars)), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _cast(x: Array, new_dtype: Any, **_: Any) -> Array:
    is_wide = jnp.issubdtype(new_dtype, jnp.inexact) and jnp.finfo(new_dtype).bits >= 16
    return _in_double(x if is_wide else x.astype(new_dtype))


def _broadcast(
    x: Array, shape: Sequence[int], broadcast_dimensions: Sequence[int], **_: Any
) -> Array:
    full = [1] * len(shape)
    for size, axis in zip(x.shape, broadcast_dimensions, strict=True):
        full[axis] = size
    return np.broadcast_to(x.reshape(full), shape)


def _dot(x: Array, y: Array, dimension_numbers: Any, **_: Any) -> Array:
    (summed_x, summed_y), (kept_x, kept_y) = dimension_numbers
    letters = iter("abcdefghijklmnop")
    of_x, of_y = [""] * x.ndim, [""] * y.ndim
    for one, other in [*zip(kept_x, kept_y, strict=True), *zip(summed_x, summed_y, strict=True)]:
        of_x[one] = of_y[other] = next(letters)
    of_x, of_y = ([letter or next(letters) for letter in operand] for operand in (of_x, of_y))
    result = [of_x[axis] for axis in kept_x]
    result += [one for axis, one in enumerate(of_x) if axis not in (*kept_x, *summed_x)]
    result += [one for axis, one in enumerate(of_y) if axis not in (*kept_y, *summed_y)]
    return np.einsum(f"{''.join(of_x)},{''.join(of_y)}->{''.join(result)}", x, y)


def _conv(
    x: Array,
    kernel: Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: Any,
    feature_group_count: int,
    **_: Any,
) -> Array:
    x, kernel = x.transpose(dimension_numbers[0]), kernel.transpose(dimension_numbers[1])
    (batch, features, *spatial), (outputs, inputs, *window) = x.shape, kernel.shape
    dilated = [(n - 1) * step + 1 for n, step in zip(spatial, lhs_dilation, strict=True)]
    full = [n + low + high for n, (low, high) in zip(dilated, padding, strict=True)]
    spread = np.zeros((batch, features, *dilated), x.dtype)
    spread[(slice(None), slice(None), *(slice(None, None, step) for step in lhs_dilation))] = x
    padded = np.pad(
        spread, [(0, 0), (0, 0), *((max(low, 0), max(high, 0)) for low, high in padding)]
    )
    cropped = (
        slice(max(-low, 0), max(-low, 0) + n) for (low, _), n in zip(padding, full, strict=True)
    )
    padded = padded[(slice(None), slice(None), *cropped)]
    reach = [(n - 1) * step + 1 for n, step in zip(window, rhs_dilation, strict=True)]
    sizes = [
        (n - far) // stride + 1 for n, far, stride in zip(full, reach, window_strides, strict=True)
    ]
    result = np.zeros((batch, outputs, *sizes), x.dtype)
    for number, place in product(range(outputs), product(*map(range, window))):
        first = number // (outputs // feature_group_count) * inputs
        starts = [p * step for p, step in zip(place, rhs_dilation, strict=True)]
        where = zip(starts, sizes, window_strides, strict=True)
        seen = padded[
            (
                slice(None),
                slice(first, first + inputs),
                *(slice(start, start + (n - 1) * step + 1, step) for start, n, step in where),
            )
        ]
        weights = kernel[number][(slice(None), *place)]
        result[:, number] += np.tensordot(weights, seen, (0, 1))
    return result.transpose(np.argsort(dimension_numbers[2]))


def _elementwise(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *operands, **_: function(*operands)


PRIMITIVES: dict[str, Callable[..., Array]] = {
    "abs": _elementwise(np.abs),
    "add": _elementwise(np.add),
    "div": _elementwise(np.divide),
    "name": lambda x, **_: x,
    "mul": _elementwise(np.multiply),
    "neg": _elementwise(np.negative),
    "pow": _elementwise(np.power),
    "rsqrt": _elementwise(lambda x: 1 / np.sqrt(x)),
    "sin": _elementwise(np.sin),
    "sqrt": _elementwise(np.sqrt),
    "sub": _elementwise(np.subtract),
    "tanh": _elementwise(np.tanh),
    "convert_element_type": _cast,
    "broadcast_in_dim": _broadcast,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "reshape": lambda x, new_sizes, **_: x.reshape(new_sizes),
    "rev": lambda x, dimensions, **_: np.flip(x, dimensions),
    "squeeze": lambda x, dimensions, **_: x.squeeze(dimensions),
    "transpose": lambda x, permutation, **_: x.transpose(permutation),
}
