"""What an equation does to an input that depends on an argument: affine steps, linear layers."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from bn_jax._program.primitives import CAST, CONVOLUTION, COPIES, PRODUCT
from bn_jax._program.program import Equation, Program


class Affine(NamedTuple):
    """An affine, elementwise step: what an equation does to its only unknown input.

    Attributes:
        kind: ``y = x + k``, ``x - k``, ``k - x``, ``x * k``, ``x / k``, ``-x`` or ``x`` in another
            dtype, in this order.
        input: the value `x`.
        operand: the known value `k`, or None.
    """

    kind: Literal["add", "sub", "from", "mul", "div", "neg", "same"]
    input: int
    operand: int | None


class Linear(NamedTuple):
    """A convolution, or a product, of something unknown with a known kernel.

    Attributes:
        equation: its index in the program.
        data: the value that the kernel is applied to.
        kernel: the value of the kernel.
        outputs: the dimensions of the result that come from the kernel, ascending.
        kernel_outputs: the corresponding dimensions of the kernel.
        inputs: the dimensions of the data that meet dimensions of the kernel.
        kernel_inputs: the corresponding dimensions of the kernel; in a grouped convolution the
            kernel has the size of one group there.
        groups: of a convolution; otherwise 1.
        is_padded: whether some positions of the result meet zeros instead of data.
    """

    equation: int
    data: int
    kernel: int
    outputs: tuple[int, ...]
    kernel_outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    kernel_inputs: tuple[int, ...]
    groups: int = 1
    is_padded: bool = False


def holds_products(dtype: DTypeLike) -> bool:
    """Returns whether a dtype is floating point with the digits of bfloat16 or more.

    Integers, and floating point in 8 bits or fewer, store the codes of a quantization: a code times
    a factor has to be rounded to another code, or is none at all.
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        return False
    return bool(jnp.finfo(dtype).nmant >= jnp.finfo(jnp.bfloat16).nmant)


def as_affine_step(program: Program, equation: Equation) -> Affine | None:
    """Returns an equation as an affine, elementwise step; None if it is anything else.

    All of its inputs but one must be known.
    """
    unknown = [value for value in equation.inputs if not program.is_known(value)]
    if len(unknown) != 1 or len(equation.outputs) != 1:
        return None
    value, name = unknown[0], equation.name
    operand = next((other for other in equation.inputs if other != value), None)
    is_first = equation.inputs[0] == value
    if name in ("add", "add_any"):
        return Affine("add", value, operand)
    if name == "sub":
        return Affine("sub" if is_first else "from", value, operand)
    if name == "mul":
        return Affine("mul", value, operand)
    if name == "div" and is_first:
        return Affine("div", value, operand)
    if name == "neg":
        return Affine("neg", value, None)
    if name in COPIES or (name == CAST and _keeps_numbers(program, equation)):
        return Affine("same", value, None)
    return None


def as_linear(program: Program, index: int) -> Linear | None:
    """Returns the equation at an index as a linear layer with a known kernel, if it is one."""
    equation = program.equations[index]
    if equation.name == CONVOLUTION:
        return _as_convolution(program, index, equation)
    if equation.name == PRODUCT:
        return _as_product(program, index, equation)
    return None


def _as_convolution(program: Program, index: int, equation: Equation) -> Linear | None:
    data, kernel = equation.inputs
    options = equation.options
    is_plain = program.is_known(kernel) and not program.is_known(data)
    if not is_plain or options["batch_group_count"] > 1:
        return None
    data_spec, kernel_spec, out_spec = options["dimension_numbers"]
    return Linear(
        index,
        data,
        kernel,
        outputs=(out_spec[1],),
        kernel_outputs=(kernel_spec[0],),
        inputs=(data_spec[1],),
        kernel_inputs=(kernel_spec[1],),
        groups=options["feature_group_count"],
        is_padded=any(size != 0 for pair in options["padding"] for size in pair)
        or any(step != 1 for step in options["lhs_dilation"]),
    )


def _as_product(program: Program, index: int, equation: Equation) -> Linear | None:
    known = [program.is_known(value) for value in equation.inputs]
    if known not in ([False, True], [True, False]):
        return None
    side = known.index(True)
    contracted, batched = equation.options["dimension_numbers"]
    ranks = [len(program.avals[value].shape) for value in equation.inputs]
    free = [
        [axis for axis in range(ranks[at]) if axis not in (*contracted[at], *batched[at])]
        for at in (0, 1)
    ]
    # The result has the batched dimensions first, then the free ones of the left, then the right.
    first = len(batched[0])
    if side == 1:
        first += len(free[0])
    return Linear(
        index,
        data=equation.inputs[1 - side],
        kernel=equation.inputs[side],
        outputs=(*range(len(batched[0])), *range(first, first + len(free[side]))),
        kernel_outputs=(*batched[side], *free[side]),
        inputs=(*contracted[1 - side], *batched[1 - side]),
        kernel_inputs=(*contracted[side], *batched[side]),
    )


def _keeps_numbers(program: Program, equation: Equation) -> bool:
    """Returns whether a cast keeps real and imaginary parts, up to rounding to half precision."""
    before = program.avals[equation.inputs[0]].dtype
    after = program.avals[equation.outputs[0]].dtype
    if not jnp.issubdtype(before, jnp.inexact) or not holds_products(after):
        return False
    was_complex = jnp.issubdtype(before, jnp.complexfloating)
    return not was_complex or bool(jnp.issubdtype(after, jnp.complexfloating))
