"""Where each norm of a program can go, decided by shapes and equations alone."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from bn_jax._fold.chains import Chain, ChainStep, follow, steps_of_norm
from bn_jax._fold.features import Array, moved
from bn_jax._fold.kernels import loses_imaginary, path_of, why_fixed
from bn_jax._program import Linear, Norm, Program, as_affine_step, as_linear, find_norms
from bn_jax._program.primitives import CAST, SHAPES


class Before(NamedTuple):
    """A norm before a linear layer.

    Attributes:
        steps: of the norm.
        passed: the indices of the changes of shape and dtype between norm and layer.
    """

    steps: tuple[ChainStep, ...]
    passed: tuple[int, ...]


class Decisions(NamedTuple):
    """Where the norms of a program go. Norms are numbered in the order of the program.

    Attributes:
        norms: all norms found.
        linears: the linear layers, by the index of their equation.
        chains: what follows a linear layer and goes into it, by the same index.
        before: the norm that goes into the linear layer after it, by the same index.
        homes: for each folded norm, the indices of the linear layers that it goes into.
        steps: of each norm that goes into the layers after it or becomes one multiplication and one
            addition.
        reasons: for each norm that is left, why.
    """

    norms: tuple[Norm, ...]
    linears: Mapping[int, Linear]
    chains: dict[int, Chain]
    before: dict[int, Before]
    homes: dict[int, list[int]]
    steps: dict[int, tuple[ChainStep, ...]]
    reasons: dict[int, str]


def decide(program: Program) -> Decisions:
    """Folds each norm into the linear layer before it, or else into those after it."""
    found = (as_linear(program, index) for index in range(len(program.equations)))
    linears = {linear.equation: linear for linear in found if linear is not None}
    decisions = Decisions(find_norms(program), linears, {}, {}, {}, {}, {})
    by_statistics = {
        number: norm for number, norm in enumerate(decisions.norms) if norm.obstacle is None
    }
    for index, linear in linears.items():
        if why_fixed(program, linear) is not None:
            continue
        chain = follow(program, linear, by_statistics.values())
        inside = [
            number for number, norm in by_statistics.items() if {*norm.steps} <= {*chain.passed}
        ]
        if inside:
            decisions.chains[index] = chain
            decisions.homes.update((number, [index]) for number in inside)
    for number, norm in enumerate(decisions.norms):
        if norm.obstacle is not None:
            decisions.reasons[number] = _reason_of_obstacle(norm.obstacle)
        elif number not in decisions.homes:
            _decide_backward(program, decisions, number)
    return decisions


def _decide_backward(program: Program, decisions: Decisions, number: int) -> None:
    """Folds a norm into the linear layers that it feeds, or notes why it is left."""
    norm = decisions.norms[number]
    steps = steps_of_norm(program, norm)
    if steps is None:
        decisions.reasons[number] = (
            "It broadcasts its input against its parameters, as under `nn.vmap` with one input for "
            "all members."
        )
        return
    decisions.steps[number] = steps
    targets, obstacle = _targets(program, decisions.linears, norm.output, steps[0].features, ())
    for index, passed in targets.items():
        obstacle = obstacle or _why_not_across(program, norm, decisions.linears[index], passed)
    if obstacle is not None:
        before = _why_not_before(program, decisions.linears, norm)
        decisions.reasons[number] = f"{before}, and {obstacle}."
        return
    decisions.homes[number] = list(targets)
    others = [other for other in decisions.norms if other is not norm]
    for index, passed in targets.items():
        decisions.before[index] = Before(steps, passed)
        if index not in decisions.chains:
            decisions.chains[index] = follow(program, decisions.linears[index], others)


def _targets(
    program: Program,
    linears: Mapping[int, Linear],
    value: int,
    features: Array,
    passed: tuple[int, ...],
) -> tuple[dict[int, tuple[int, ...]], str | None]:
    """Returns the linear layers that a value goes to, or why it cannot go into all of them.

    By the index of the layer these are the changes of shape and dtype on the way, after `passed`.
    """
    if program.uses[value] > len(program.consumers[value]):
        return {}, "its output is returned"
    targets: dict[int, tuple[int, ...]] = {}
    for index in program.consumers[value]:
        equation = program.equations[index]
        after = moved(program, equation, features, spreads=True)
        step = as_affine_step(program, equation)
        if step is not None and step.kind == "same":
            after = features
        if index in linears:
            obstacle = _why_not_into(program, linears[index], features)
            further = {index: passed}
        elif after is not None:
            output = equation.outputs[0]
            further, obstacle = _targets(program, linears, output, after, (*passed, index))
        else:
            further, obstacle = {}, f"its output goes to `{equation.function}`"
        if obstacle is not None:
            return {}, obstacle
        targets.update(further)
    return targets, None


# --- reasons, the ends of sentences -------------------------------------------------------------


def _reason_of_obstacle(obstacle: str) -> str:
    if obstacle == "input":
        return (
            "It normalizes by its input. If it has running statistics, evaluate the model with "
            "use_running_average=True."
        )
    if obstacle == "selection":
        return (
            "An argument of the model selects its statistics. Set that argument inside of forward, "
            "and fold once for each of its values."
        )
    if obstacle == "whitening":
        return "It mixes its features by a matrix, which is computed once and stays a product."
    return f"It is inside a {obstacle}, which stays as it is."


def _why_not_into(program: Program, linear: Linear, features: Array) -> str | None:
    """Returns why a norm with these features cannot go into the linear layer after it."""
    fixed = why_fixed(program, linear)
    if fixed is not None:
        return f"its output goes to {fixed}"
    if linear.is_padded:
        return (
            "its output goes to a convolution with padding, which would lack the bias at the border"
        )
    others = [size for axis, size in enumerate(features.shape) if axis not in linear.inputs]
    if any(size != 1 for size in others):
        return "the linear layer after it applies the same kernel to several of its features"
    return None


def _why_not_across(
    program: Program, norm: Norm, linear: Linear, passed: tuple[int, ...]
) -> str | None:
    """Returns why the kernel of the layer after a norm cannot take over its arithmetic."""
    if loses_imaginary(program, linear.kernel, norm.steps):
        return "the kernel after it is stored as real numbers, but its scale is complex"
    between = [program.equations[index].outputs[0] for index in passed]
    dtypes = [program.avals[value].dtype for value in (norm.output, *between, linear.data)]
    narrowest = min(dtypes, key=_digits)
    widest = max(_digits(dtypes[0]), _digits(program.avals[norm.input].dtype))
    is_half = _digits(dtypes[-1]) < _digits(jnp.float32)
    # A folded norm takes the mean off last, so that its input is rounded with the mean in it.
    if _digits(narrowest) < widest or is_half:
        return (
            f"the linear layer after it computes in {narrowest.name}, where its input "
            "would be rounded before its mean is taken off"
        )
    return None


def _digits(dtype: DTypeLike) -> int:
    return int(jnp.finfo(dtype).nmant)


def _why_not_before(program: Program, linears: Mapping[int, Linear], norm: Norm) -> str:
    """Returns why a norm is not folded into what is before it."""
    value, is_shared = norm.input, False
    while value in program.producers:
        is_shared = is_shared or program.uses[value] > 1
        index = program.producers[value]
        equation = program.equations[index]
        step = as_affine_step(program, equation)
        if index in linears:
            return _why_not_into_kernel_before(program, linears[index], norm, is_shared)
        if step is None and equation.name not in SHAPES | {CAST}:
            return (
                f"Its input comes from `{equation.function}`, not from a linear layer with known "
                "weights"
            )
        value = equation.inputs[0] if step is None else step.input
    return "Its input is an argument of the model"


def _why_not_into_kernel_before(
    program: Program, linear: Linear, norm: Norm, is_shared: bool
) -> str:
    fixed = why_fixed(program, linear)
    if fixed is not None:
        return f"Its input comes from {fixed}"
    kernel = path_of(program, linear.kernel, "kernel")
    if is_shared:
        return f"The output of {kernel} is used elsewhere too"
    if loses_imaginary(program, linear.kernel, norm.steps):
        return f"Its scale is complex, but {kernel} is stored as real numbers"
    return f"It, or a step before it, varies along more axes than the features of {kernel}"
