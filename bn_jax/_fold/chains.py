"""The equations after a linear layer that can go into its kernel and bias."""

from collections.abc import Collection
from math import prod
from typing import NamedTuple

import numpy as np

from bn_jax._fold.features import Array, moved, placed
from bn_jax._fold.kernels import loses_imaginary
from bn_jax._program import (
    Affine,
    Equation,
    Linear,
    Norm,
    Program,
    as_affine_step,
    broadcast_root,
)


class ChainStep(NamedTuple):
    """An affine step on features.

    Attributes:
        kind: as of `Affine`.
        operand: the known value, or None.
        features: the feature of each position of the step's input.
    """

    kind: str
    operand: int | None
    features: Array


class Chain(NamedTuple):
    """Equations that follow a value, each the only consumer of the value before.

    Attributes:
        steps: the affine ones among them.
        passed: the indices of all of them; those that are no steps change the shape.
        output: the value that the last one returns.
        features: the feature of each position of the output.
    """

    steps: tuple[ChainStep, ...]
    passed: tuple[int, ...]
    output: int
    features: Array


def follow(program: Program, linear: Linear, norms: Collection[Norm]) -> Chain:
    """Returns the longest chain after a linear layer that cuts no norm in two.

    After its last norm it contains steps by variables only.
    """
    chain = best = _start(program, linear)
    comes_from_variables = True
    while (index := program.only_consumer(chain.output)) is not None:
        extended = _extended(program, chain, index)
        if extended is None or loses_imaginary(program, linear.kernel, [index]):
            break
        chain = extended
        step = as_affine_step(program, program.equations[index])
        if step is None or step.kind == "same":
            continue
        # After the last norm a constant stays in the program: it may depend on the batch size.
        is_constant = step.operand is not None and not program.origins[step.operand]
        ends_norm = any(index == norm.steps[-1] for norm in norms if norm.steps)
        comes_from_variables = ends_norm or (comes_from_variables and not is_constant)
        if comes_from_variables and not any(_cuts(chain, norm) for norm in norms):
            best = chain
    return best


def steps_of_norm(program: Program, norm: Norm) -> tuple[ChainStep, ...] | None:
    """Returns the steps of a norm on the features of its input; None if it changes the shape.

    Its features are all positions along the axes that any of its operands varies along.
    """
    input_shape = program.avals[norm.input].shape
    shape = (1,) * len(input_shape)
    steps: list[Affine] = []
    for index in norm.steps:
        equation = program.equations[index]
        step = as_affine_step(program, equation)
        if step is None or program.avals[equation.outputs[0]].shape != input_shape:
            return None
        if step.operand is not None:
            _, operand_shape = broadcast_root(program, step.operand)
            shape = np.broadcast_shapes(shape, operand_shape)
        steps.append(step)
    features = np.arange(prod(shape)).reshape(shape)
    return tuple(ChainStep(step.kind, step.operand, features) for step in steps)


def _start(program: Program, linear: Linear) -> Chain:
    """Returns the empty chain, whose features are the output dimensions of the kernel."""
    shape = program.avals[linear.kernel].shape
    sizes = [shape[dimension] for dimension in linear.kernel_outputs]
    output = program.equations[linear.equation].outputs[0]
    rank = len(program.avals[output].shape)
    features = placed(np.arange(prod(sizes)).reshape(sizes), linear.outputs, rank)
    return Chain((), (), output, features)


def _extended(program: Program, chain: Chain, index: int) -> Chain | None:
    """Returns a chain with one more equation; None if that can be no part of it."""
    equation = program.equations[index]
    step = as_affine_step(program, equation)
    steps, features = chain.steps, chain.features
    if step is None:
        after = moved(program, equation, features)
        if after is None:
            return None
        features = after
    elif _fits(program, equation, step, features):
        steps = (*steps, ChainStep(step.kind, step.operand, features))
    else:
        return None
    return Chain(steps, (*chain.passed, index), equation.outputs[0], features)


def _fits(program: Program, equation: Equation, step: Affine, features: Array) -> bool:
    """Returns whether the known operand varies along the axes of the features only."""
    if program.avals[equation.outputs[0]].shape != program.avals[step.input].shape:
        return False
    if step.operand is None:
        return True
    _, shape = broadcast_root(program, step.operand)
    if not shape:
        return True
    return len(shape) == features.ndim and all(
        size in (1, known) for size, known in zip(shape, features.shape, strict=True)
    )


def _cuts(chain: Chain, norm: Norm) -> bool:
    """Returns whether a part of a norm's steps is in a chain."""
    outside = set(norm.steps) - set(chain.passed)
    return 0 < len(outside) < len(norm.steps)
