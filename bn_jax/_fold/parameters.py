"""The parameters of a folded model, computed once, in double precision."""

from collections.abc import Hashable, Iterable, Sequence
from math import prod
from typing import Any, Literal, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from bn_jax._fold.chains import Chain, ChainStep, steps_of_norm
from bn_jax._fold.decisions import Before
from bn_jax._fold.features import Array, broadcast_root, moved, placed
from bn_jax._fold.kernels import kernel_root, widest_dtype
from bn_jax._program import (
    Equation,
    Linear,
    Norm,
    Program,
    in_double,
    inputs_of,
    recipe_of,
    run_steps,
    steps_to,
)
from bn_jax._program.primitives import CAST


class FoldedLayer(NamedTuple):
    """The parameters of a linear layer with its norms in them.

    Attributes:
        kernel: in the shape of the variable that the layer's kernel is a rearrangement of.
        bias: in the shape of the kernel's output dimensions.
    """

    kernel: Array
    bias: Array


class Known:
    """The values that depend on variables alone. Each is computed when it is first needed.

    Attributes:
        program: of `trace`.
        layers: the folded layers computed so far, by the index of their equation.
    """

    def __init__(self, program: Program, leaves: Sequence[Any]) -> None:
        self.program = program
        self.layers: dict[int, FoldedLayer] = {}
        self._values = inputs_of(program, [jnp.asarray(leaf) for leaf in leaves])

    def __getitem__(self, value: int) -> Any:
        run_steps(steps_to(self.program, [value], self._values), self._values)
        return self._values[value]

    def in_double(self, value: int) -> Array:
        """Returns a value on the host, in double precision."""
        return in_double(self[value])


class Source(Protocol):
    """How a parameter is computed."""

    def compute(self, known: Known) -> Any:
        """Returns the parameter: an array of NumPy in double precision, or a value as it is."""

    def recipe(self, program: Program, seen: dict[int, str]) -> Hashable:
        """Returns what two traces of a function must agree in to compute the same parameter."""


class StoredValue(NamedTuple):
    """A value that stays as the program has it."""

    value: int

    def compute(self, known: Known) -> Any:
        """Returns the value."""
        return known[self.value]

    def recipe(self, program: Program, seen: dict[int, str]) -> Hashable:
        """Returns the digest of how the program computes it."""
        return recipe_of(program, self.value, seen)


class NormParameter(NamedTuple):
    """A norm that stays as ``a x + b``: `a`, which is its scale, or `b`, its offset."""

    norm: Norm
    features: Array
    part: Literal["scale", "offset"]

    def compute(self, known: Known) -> Array:
        """Returns `a` or `b` by feature."""
        steps = steps_of_norm(known.program, self.norm, self.features)
        a, b = _compose(known, steps, self.features.size)
        if self.part == "scale":
            return a
        # `a` will be rounded to `wide`, and the error is multiplied by the input, so by the mean.
        # `b` makes up for it at the mean: there, -shift / sign, the steps before the scale give 0.
        first_scale = next(at for at, step in enumerate(steps) if step.kind in ("mul", "div"))
        sign, shift = _compose(known, steps[:first_scale], self.features.size)
        wide = widest_dtype(known.program, self.norm.steps)
        with np.errstate(over="ignore"):
            rounding = a - in_double(a.astype(wide))
        return np.where(np.isfinite(rounding), b - rounding * shift / sign, b)

    def recipe(self, program: Program, seen: dict[int, str]) -> Hashable:
        """Returns the digests of the steps of the norm."""
        return _recipe_of_steps(program, steps_of_norm(program, self.norm, self.features), seen)


class LayerParameter(NamedTuple):
    """The kernel or the bias of a linear layer with norms in it."""

    linear: Linear
    chain: Chain
    before: Before | None
    part: Literal["kernel", "bias"]

    def compute(self, known: Known) -> Array:
        """Returns the parameter. Kernel and bias of a layer are computed together."""
        index = self.linear.equation
        if index not in known.layers:
            known.layers[index] = _fold_layer(known, self.linear, self.chain, self.before)
        layer = known.layers[index]
        return layer.kernel if self.part == "kernel" else layer.bias

    def recipe(self, program: Program, seen: dict[int, str]) -> Hashable:
        """Returns the digests of the kernel and of the steps before and after the layer."""
        before: Hashable = None
        if self.before is not None:
            steps = steps_of_norm(program, self.before.norm, self.before.features)
            before = _recipe_of_steps(program, steps, seen)
        after = _recipe_of_steps(program, self.chain.steps, seen)
        kernel = recipe_of(program, self.linear.kernel, seen)
        return kernel, self.linear.kernel_outputs, before, after


def _recipe_of_steps(
    program: Program, steps: Iterable[ChainStep], seen: dict[int, str]
) -> Hashable:
    def recipe_of_operand(operand: int | None) -> Hashable:
        if operand is None:
            return None
        root, shape = broadcast_root(program, operand)
        return recipe_of(program, root, seen), shape

    return tuple(
        (step.kind, recipe_of_operand(step.operand), step.features.tobytes()) for step in steps
    )


def _fold_layer(known: Known, linear: Linear, chain: Chain, before: Before | None) -> FoldedLayer:
    """Multiplies the kernel by what is before and after it, and adds up the bias."""
    root, layout = kernel_root(known.program, linear.kernel)
    stored = known.in_double(root)
    # The kernel that the layer sees, as positions in the variable, to find the way back.
    positions = _rearranged(np.arange(stored.size).reshape(stored.shape), layout)
    kernel = stored.reshape(-1)[positions]
    sizes = [kernel.shape[dimension] for dimension in linear.kernel_outputs]
    bias = np.zeros(prod(sizes))
    if before is not None:
        kernel, bias = _multiply_inputs(known, linear, before, kernel)
    a, b = _compose(known, chain.steps, prod(sizes))
    kernel = kernel * placed(a.reshape(sizes), linear.kernel_outputs, kernel.ndim)
    folded = np.empty(stored.size, kernel.dtype)
    folded[positions.reshape(-1)] = kernel.reshape(-1)
    return FoldedLayer(folded.reshape(stored.shape), (a * bias + b).reshape(sizes))


def _rearranged(positions: Array, layout: Sequence[Equation]) -> Array:
    """Returns where each number of a rearranged kernel was before."""
    for equation in layout:
        if equation.name != CAST:
            (output,) = equation.run([jnp.asarray(positions)])
            positions = np.asarray(output)
    return positions


def _multiply_inputs(
    known: Known, linear: Linear, before: Before, kernel: Array
) -> tuple[Array, Array]:
    """Returns the kernel after a norm of its input, and what that norm adds to each output."""
    program = known.program
    steps = steps_of_norm(program, before.norm, before.features)
    a, b = (
        _onto_kernel(linear, program.avals[linear.data].shape, kernel, values)
        for values in (
            _moved_to_layer(program, before, values)
            for values in _compose(known, steps, before.features.size)
        )
    )
    summed = tuple(axis for axis in range(kernel.ndim) if axis not in linear.kernel_outputs)
    added = (kernel * b).sum(summed)
    # The sum has the output dimensions in the kernel's order, the bias in that of the result.
    order = np.argsort(np.argsort(np.asarray(linear.kernel_outputs)))
    return kernel * a, added.transpose(order).reshape(-1)


def _moved_to_layer(program: Program, before: Before, values: Array) -> Array:
    """Returns values by feature of a norm, by position of the input of the layer after it."""
    values = values.reshape(before.features.shape)
    for index in before.passed:
        after = moved(program, program.equations[index], values, spreads=True)
        # Anything but a change of shape is a change of dtype.
        values = values if after is None else after
    return values


def _onto_kernel(linear: Linear, shape: Sequence[int], kernel: Array, values: Array) -> Array:
    """Returns values by position of the data as factors of the kernel that it meets."""
    sizes = [shape[axis] for axis in linear.inputs]
    free = [axis for axis in range(len(shape)) if axis not in linear.inputs]
    full = [shape[axis] if axis in linear.inputs else 1 for axis in range(len(shape))]
    values = np.broadcast_to(values, full).transpose((*linear.inputs, *free)).reshape(sizes)
    if linear.groups == 1:
        return placed(values, linear.kernel_inputs, kernel.ndim)
    # The outputs of a group see the inputs of that group alone.
    outputs = kernel.shape[linear.kernel_outputs[0]]
    rows = np.repeat(values.reshape(linear.groups, -1), outputs // linear.groups, axis=0)
    return placed(rows, (*linear.kernel_outputs, *linear.kernel_inputs), kernel.ndim)


def _compose(known: Known, steps: Sequence[ChainStep], features: int) -> tuple[Array, Array]:
    """Returns `a` and `b` of ``y = a x + b`` by feature, in double precision."""
    a, b = np.ones(features), np.zeros(features)
    for step in steps:
        value = _operand_by_feature(known, step, features)
        if step.kind == "add":
            b = b + value
        elif step.kind == "sub":
            b = b - value
        elif step.kind == "from":
            a, b = -a, value - b
        elif step.kind == "mul":
            a, b = a * value, b * value
        elif step.kind == "div":
            a, b = a / value, b / value
        elif step.kind == "neg":
            a, b = -a, -b
    return a, b


def _operand_by_feature(known: Known, step: ChainStep, features: int) -> Array:
    """Returns the operand of a step by feature; zeros where it has none."""
    if step.operand is None:
        return np.zeros(features)
    root, shape = broadcast_root(known.program, step.operand)
    operand = known.in_double(root).reshape(shape)
    values = np.empty(features, operand.dtype)
    values[step.features.reshape(-1)] = np.broadcast_to(operand, step.features.shape).reshape(-1)
    return values
