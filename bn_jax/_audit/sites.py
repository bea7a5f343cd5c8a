"""The calls of batch norms in a traced program, and what is before and after each of them."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bn_jax._program import Equation, Program, as_affine_step, as_linear, find_norms
from bn_jax._program.primitives import COPIES_AND_CASTS, ELEMENTWISE, WITH_DERIVATIVE


class Activation(NamedTuple):
    """What is computed from the output of a norm element by element.

    `output` is the value that it returns, `inputs` are the known values that it takes.
    """

    output: int
    inputs: tuple[int, ...]


class Site(NamedTuple):
    """A call of a batch norm in the program of evaluation."""

    path: str  # the path of the norm in ``batch_stats``
    input: int  # the value that it takes
    output: int  # the value that it returns
    axes: tuple[int, ...]  # the feature axes
    params: tuple[str, ...]  # the paths of its scale and bias
    # The path of a bias that is added directly before norms and used nowhere else, or None.
    bias: str | None
    # The activation after it; None if there is none, or more than one value depends on the output,
    # or only affine steps follow.
    activation: Activation | None
    # The paths of the kernels and norms that take the output, or None if anything else takes it.
    takers: tuple[str, ...] | None


class _Call(NamedTuple):
    """The equations of a call, from the first that takes a running statistic."""

    path: str
    steps: tuple[int, ...]
    output: int


def find_sites(
    program: Program, norms: Mapping[str, Mapping[str, Any]], statistics: Mapping[int, str]
) -> list[Site]:
    """Returns the calls of batch norms that are found in the program of evaluation, in its order.

    `norms` are the running statistics by path; `statistics` is the path of the norm for each leaf
    of the variables that is a running mean or variance.
    """
    calls = _find_calls(program, statistics)
    starts = {call.steps[0]: call.path for call in calls}
    claimed = {index for call in calls for index in call.steps}
    fed: dict[str, set[int]] = {}
    for call in calls:
        fed.setdefault(call.path, set()).update(_fed_directly(program, call.output))
    sites = []
    for call in calls:
        first = as_affine_step(program, program.equations[call.steps[0]])
        assert first is not None
        axes = sorted(set().union(*(_operand_axes(program, index) for index in call.steps)))
        features = math.prod(program.avals[first.input].shape[axis] for axis in axes)
        if features != np.size(norms[call.path]["mean"]):
            continue
        leaves = {leaf for index in call.steps for leaf in _leaves_in(program, index)}
        sites.append(
            Site(
                path=call.path,
                input=first.input,
                output=call.output,
                axes=tuple(axes),
                params=tuple(program.paths[leaf] for leaf in sorted(leaves - set(statistics))),
                bias=None,
                activation=_activation_after(program, call.output, claimed),
                takers=_takers(program, call.output, starts, fed[call.path]),
            )
        )
    return _with_biases(program, sites, claimed)


# --- calls --------------------------------------------------------------------------------------


def _find_calls(program: Program, statistics: Mapping[int, str]) -> list[_Call]:
    calls = []
    for norm in find_norms(program):
        for number, index in enumerate(norm.steps):
            paths = [statistics[leaf] for leaf in _leaves_in(program, index) if leaf in statistics]
            if paths:
                output = program.equations[norm.steps[-1]].outputs[0]
                calls.append(_Call(paths[0], norm.steps[number:], output))
                break
    return calls


def _leaves_in(program: Program, index: int) -> list[int]:
    """Returns the leaves of the variables that the inputs of an equation depend on."""
    inputs = program.equations[index].inputs
    return [leaf for value in inputs for leaf in sorted(program.origins[value] or ())]


def _operand_axes(program: Program, index: int) -> set[int]:
    step = as_affine_step(program, program.equations[index])
    if step is None or step.operand is None or not program.origins[step.operand]:
        return set()
    return _varying_axes(program, step.operand)


def _varying_axes(program: Program, value: int) -> set[int]:
    """Returns the axes along which a known value is not one element repeated."""
    producer = program.producer(value)
    if producer is not None and producer.name == "broadcast_in_dim":
        dimensions = producer.options["broadcast_dimensions"]
        return {dimensions[axis] for axis in _varying_axes(program, producer.inputs[0])}
    return {axis for axis, size in enumerate(program.avals[value].shape) if size > 1}


# --- before a norm ------------------------------------------------------------------------------


class _AddedBias(NamedTuple):
    """A bias that is added directly before a norm."""

    equation: int
    leaf: int


def _with_biases(program: Program, sites: Sequence[Site], claimed: set[int]) -> list[Site]:
    """Notes the biases that are added directly before norms, and used nowhere else."""
    added = [_bias_before(program, site.input, site.axes, claimed) for site in sites]
    additions = {bias.equation for bias in added if bias is not None}
    return [
        site._replace(bias=program.paths[bias.leaf])
        if bias is not None and _is_used_only_in(program, bias.leaf, additions)
        else site
        for site, bias in zip(sites, added, strict=True)
    ]


def _bias_before(
    program: Program, value: int, axes: Sequence[int], claimed: set[int]
) -> _AddedBias | None:
    """Returns the bias that is added directly before a norm, and varies with features alone."""
    features: set[int] | None = set(axes)
    while features is not None and program.uses[value] == 1 and value in program.producers:
        index = program.producers[value]
        equation = program.equations[index]
        step = as_affine_step(program, equation)
        if step is None or step.kind == "same":
            features = _axes_before(program, equation, features)
            value = equation.inputs[0]
            continue
        if step.operand is None or step.kind not in ("add", "sub") or index in claimed:
            return None
        leaves = tuple(program.origins[step.operand] or ())
        is_bias = len(leaves) == 1 and _varying_axes(program, step.operand) <= features
        return _AddedBias(index, leaves[0]) if is_bias else None
    return None


def _axes_before(program: Program, equation: Equation, axes: set[int]) -> set[int] | None:
    """Returns where these axes were before an equation that moves them; None for any other."""
    before, after = (program.avals[ends[0]].shape for ends in (equation.inputs, equation.outputs))
    if equation.name in COPIES_AND_CASTS:
        return axes
    if equation.name == "transpose":
        return {equation.options["permutation"][axis] for axis in axes}
    if equation.name == "reshape" and axes <= {len(after) - 1} and before[-1:] == after[-1:]:
        return {len(before) - 1} if axes else set()
    return None


def _is_used_only_in(program: Program, leaf: int, equations: Collection[int]) -> bool:
    """Tells whether a leaf of the variables meets data in these equations alone."""
    if any(leaf in (program.origins[value] or ()) for value in program.outputs):
        return False
    return all(
        index in equations or all(program.is_known(value) for value in equation.outputs)
        for index, equation in enumerate(program.equations)
        if any(leaf in (program.origins[value] or ()) for value in equation.inputs)
    )


# --- after a norm -------------------------------------------------------------------------------


def _fed_directly(program: Program, value: int) -> set[int]:
    """Returns the equations that take a value, in any dtype."""
    fed = set(program.consumers[value])
    for index in program.consumers[value]:
        equation = program.equations[index]
        if equation.name in COPIES_AND_CASTS:
            fed |= _fed_directly(program, equation.outputs[0])
    return fed


def _takers(
    program: Program, value: int, starts: Mapping[int, str], fed: set[int]
) -> tuple[str, ...] | None:
    """Returns the paths of the kernels and norms that take a value, if nothing else does.

    A kernel counts if it is used only in equations that are `fed` by the norm.
    """
    if program.uses[value] != len(program.consumers[value]):
        return None  # the model returns the value
    takers: list[str] = []
    for index in program.consumers[value]:
        equation = program.equations[index]
        leaves = _leaves_in(program, index)
        if index in starts:
            takers.append(starts[index])
        elif (
            leaves
            and as_linear(program, index) is not None
            and all(_is_used_only_in(program, leaf, fed) for leaf in leaves)
        ):
            takers += [program.paths[leaf] for leaf in sorted(leaves)]
        elif equation.name in COPIES_AND_CASTS:
            further = _takers(program, equation.outputs[0], starts, fed)
            if further is None:
                return None
            takers += further
        else:
            return None
    return tuple(takers) or None


def _activation_after(program: Program, start: int, claimed: set[int]) -> Activation | None:
    """Finds the only value that is an elementwise, not affine function of another."""
    shape = program.avals[start].shape
    inside, indices = {start}, []
    for index in range(program.producers[start] + 1, len(program.equations)):
        equation = program.equations[index]
        unknown = {value for value in equation.inputs if not program.is_known(value)}
        if not unknown or not unknown <= inside or index in claimed:
            continue
        if _is_elementwise(program, equation) and program.avals[equation.outputs[0]].shape == shape:
            inside.add(equation.outputs[0])
            indices.append(index)
    taken = [value for index in indices for value in program.equations[index].inputs]
    ends = [value for value in inside if program.uses[value] > taken.count(value)]
    if len(ends) != 1 or ends[0] == start:
        return None
    dtypes = [program.avals[value].dtype for value in (start, ends[0])]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return None
    if all(as_affine_step(program, program.equations[index]) for index in indices):
        return None
    return Activation(ends[0], tuple(value for value in taken if program.is_known(value)))


def _is_elementwise(program: Program, equation: Equation) -> bool:
    if len(equation.outputs) != 1:
        return False
    if equation.name in ELEMENTWISE:
        return True
    if equation.name == "broadcast_in_dim":
        return not program.avals[equation.inputs[0]].shape
    if equation.name not in WITH_DERIVATIVE or not equation.bodies:
        return False
    body = equation.bodies[0]
    return all(_is_elementwise(body, inner) for inner in body.equations)
