"""The parameters of a folded model, computed once, in double precision."""

from collections.abc import Hashable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from bn_jax._fold.chains import Chain, ChainStep
from bn_jax._fold.decisions import Before
from bn_jax._fold.features import Array, moved, placed
from bn_jax._fold.kernels import dtypes_of_kernel, kernel_root, path_of
from bn_jax._program import (
    Equation,
    Linear,
    Program,
    broadcast_root,
    evaluate,
    in_double,
    inputs_of,
    recipe_of,
)
from bn_jax._program.primitives import CAST


class Known:
    """The values that depend on variables alone. Each is computed when it is first needed."""

    def __init__(self, program: Program, leaves: Sequence[Any]) -> None:
        self.program = program
        self._values = inputs_of(program, [jnp.asarray(leaf) for leaf in leaves])

    def __getitem__(self, value: int) -> Any:
        self._values = evaluate(self.program, self._values, [value])
        return self._values[value]


class StoredValue(NamedTuple):
    """A value that stays as the program has it."""

    value: int

    def compute(self, known: Known) -> Sequence[Any]:
        """Returns the value."""
        return [known[self.value]]

    def recipe(self, program: Program, seen: dict[int, str]) -> Hashable:
        """Returns the digest of how the program computes it."""
        return recipe_of(program, self.value, seen)


class ScaleAndOffset(NamedTuple):
    """`a` and `b` of a norm that stays as ``a x + b``, where `a` is stored in the dtype `wide`."""

    steps: tuple[ChainStep, ...]
    wide: np.dtype[Any]

    def compute(self, known: Known) -> Sequence[Array]:
        """Returns `a` and `b` by feature."""
        size = self.steps[0].features.size
        a, b = _compose(known, self.steps, size)
        # `a` will be rounded to `wide`, and the error is multiplied by the input, so by the mean.
        # `b` makes up for it at the mean: there, -shift / sign, the steps before the scale give 0.
        first_scale = next(at for at, step in enumerate(self.steps) if step.kind in ("mul", "div"))
        sign, shift = _compose(known, self.steps[:first_scale], size)
        with np.errstate(over="ignore", invalid="ignore"):
            rounding = a - in_double(a.astype(self.wide))
            corrected = b - rounding * shift / sign
        return a, np.where(np.isfinite(rounding), corrected, b)

    def recipe(self, program: Program, seen: dict[int, str]) -> Hashable:
        """Returns the digests of the steps of the norm."""
        return _recipe_of_steps(program, self.steps, seen)


class KernelAndBias(NamedTuple):
    """The kernel, and the bias if there is one, of a linear layer with norms in it."""

    linear: Linear
    chain: Chain
    before: Before | None

    @property
    def has_bias(self) -> bool:
        """Whether a norm before the layer or a step after it adds something."""
        adds = any(step.kind in ("add", "sub", "from") for step in self.chain.steps)
        return adds or self.before is not None

    def compute(self, known: Known) -> Sequence[Array]:
        """Multiplies the kernel by what is before and after it, and adds up the bias.

        The kernel has the shape of the variable that it is a rearrangement of, the bias that of the
        kernel's output dimensions.
        """
        outputs = self.linear.kernel_outputs
        root, layout = kernel_root(known.program, self.linear.kernel)
        stored = in_double(known[root])
        # The kernel that the layer sees, as positions in the variable, to find the way back.
        positions = _rearranged(np.arange(stored.size).reshape(stored.shape), layout)
        kernel = stored.reshape(-1)[positions]
        sizes = [kernel.shape[dimension] for dimension in outputs]
        bias = np.zeros(prod(sizes))
        if self.before is not None:
            kernel, bias = _multiply_inputs(known, self.linear, self.before, kernel)
        a, b = _compose(known, self.chain.steps, prod(sizes))
        kernel = kernel * placed(a.reshape(sizes), outputs, kernel.ndim)
        _check_digits(known.program, self.linear, kernel)
        folded = np.empty(stored.size, kernel.dtype)
        folded[positions.reshape(-1)] = kernel.reshape(-1)
        folded = folded.reshape(stored.shape)
        return [folded, (a * bias + b).reshape(sizes)] if self.has_bias else [folded]

    def recipe(self, program: Program, seen: dict[int, str]) -> Hashable:
        """Returns the digests of the kernel and of the steps before and after the layer."""
        before: Hashable = None
        if self.before is not None:
            before = _recipe_of_steps(program, self.before.steps, seen)
        after = _recipe_of_steps(program, self.chain.steps, seen)
        kernel = recipe_of(program, self.linear.kernel, seen)
        return kernel, self.linear.kernel_outputs, before, after


# How parameters that belong together are computed. `compute` returns them, as arrays of NumPy in
# double precision or as the values that they are. `recipe` returns what two traces of a function
# must agree in to compute the same parameters.
Source: TypeAlias = StoredValue | ScaleAndOffset | KernelAndBias


def _recipe_of_steps(
    program: Program, steps: Iterable[ChainStep], seen: dict[int, str]
) -> Hashable:
    recipes = []
    for step in steps:
        operand: Hashable = None
        if step.operand is not None:
            root, shape = broadcast_root(program, step.operand)
            operand = recipe_of(program, root, seen), shape
        recipes.append((step.kind, operand, step.features.tobytes()))
    return tuple(recipes)


def _check_digits(program: Program, linear: Linear, kernel: Array) -> None:
    """Raises where float16, in which a kernel is stored or applied, loses one of its features.

    Small numbers have fewer digits in float16. A feature needs as many as bfloat16 has.
    """
    others = tuple(axis for axis in range(kernel.ndim) if axis not in linear.kernel_outputs)
    largest = np.abs(kernel).max(others, initial=0)
    stored, *computed = dtypes_of_kernel(program, linear.kernel)
    if np.float16 not in (stored, *computed):
        return
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = in_double(kernel.real.astype(np.float16))
        lost = np.abs(rounded - kernel.real).max(others, initial=0)
    is_lost = lost > float(jnp.finfo(jnp.bfloat16).eps) * largest
    if not is_lost.any():
        return
    fix = "let its layer compute in float32 or bfloat16."
    if stored == np.float16:
        fix = (
            "fold the variables in float32, "
            "jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)."
        )
    extreme = largest[is_lost].flat[0]
    raise ValueError(
        f"{path_of(program, linear.kernel, 'kernel')!r} with its norm is as "
        f"{'large' if extreme > 1 else 'small'} as {extreme:.3g}, which float16 cannot hold: {fix}"
    )


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
    data_shape = program.avals[linear.data].shape
    a, b = (
        _onto_kernel(linear, data_shape, kernel, _moved_to_layer(program, before, values))
        for values in _compose(known, before.steps, before.steps[0].features.size)
    )
    summed = tuple(axis for axis in range(kernel.ndim) if axis not in linear.kernel_outputs)
    added = (kernel * b).sum(summed)
    # The sum has the output dimensions in the kernel's order, the bias in that of the result.
    order = np.argsort(np.argsort(np.asarray(linear.kernel_outputs)))
    return kernel * a, added.transpose(order).reshape(-1)


def _moved_to_layer(program: Program, before: Before, values: Array) -> Array:
    """Returns values by feature of a norm, by position of the input of the layer after it."""
    values = values.reshape(before.steps[0].features.shape)
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
    operand = in_double(known[root]).reshape(shape)
    values = np.empty(features, operand.dtype)
    values[step.features.reshape(-1)] = np.broadcast_to(operand, step.features.shape).reshape(-1)
    return values
