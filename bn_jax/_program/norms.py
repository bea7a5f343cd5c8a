"""The norms in a traced program, found by what the equations compute."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from bn_jax._program.operations import Affine, as_affine_step
from bn_jax._program.primitives import BETWEEN_ROOT_AND_VARIABLES, ROOTS
from bn_jax._program.program import Equation, Program, parent_of


class Norm(NamedTuple):
    """A norm found in a program.

    Attributes:
        path: where its variables are: what the paths of their parents have in common.
        steps: the indices of its equations, each affine in the value before; empty where
            `obstacle` is not None.
        input: the value that it normalizes; with an obstacle, the first input of the equation.
        output: the value that it returns; with an obstacle, the first output of the equation.
        obstacle: None for a norm by known statistics; "input" for one that takes its statistics
            from its input; otherwise the name of the equation around it, such as "scan".
    """

    path: str
    steps: tuple[int, ...]
    input: int
    output: int
    obstacle: str | None


def find_norms(program: Program) -> tuple[Norm, ...]:
    """Finds the norms: where a value is multiplied by a factor with an inverse deviation in it.

    A norm by known statistics is a run of affine equations, one of which multiplies or divides by a
    known value that comes from variables through a root. It extends to both sides over the affine
    equations whose known values come from variables at the same path.

    Args:
        program: of `trace`.

    Returns:
        The norms in the order of the program. One that normalizes by its input (in training, or a
        layer norm), and one that is inside a scan or the like, have an obstacle.
    """
    rooted = _rooted(program)
    norms: list[Norm] = []
    claimed: set[int] = set()
    for index, equation in enumerate(program.equations):
        step = as_affine_step(program, equation)
        if step is not None and _scales_by(rooted, step):
            norms.append(_extend(program, rooted, claimed, index))
            claimed.update(norms[-1].steps)
        elif _normalizes_by_unknown(program, equation):
            norms.append(_with_obstacle(equation, _affine_path_after(program, index), "input"))
        else:
            inside = [norm for body in equation.bodies for norm in find_norms(body)]
            for norm in inside:
                norms.append(_with_obstacle(equation, norm.path, norm.obstacle or equation.name))
    return tuple(norms)


def _with_obstacle(equation: Equation, path: str, obstacle: str) -> Norm:
    return Norm(path, (), equation.inputs[0], equation.outputs[0], obstacle)


def _rooted(program: Program) -> set[int]:
    """Returns the known values that come from variables through a root or another power."""
    rooted: set[int] = set()
    for equation in program.equations:
        is_rooted = equation.name in ROOTS or not rooted.isdisjoint(equation.inputs)
        rooted.update(value for value in equation.outputs if is_rooted and program.origins[value])
    return rooted


def _scales_by(rooted: set[int], step: Affine) -> bool:
    return step.kind in ("mul", "div") and step.operand in rooted


def _extend(program: Program, rooted: set[int], claimed: set[int], start: int) -> Norm:
    """Returns the norm around the equation that multiplies by the inverse deviation.

    It leaves out `claimed`, the equations of the norms before it.
    """
    scaling = _affine_step_at(program, start)
    assert scaling.operand is not None
    leaves = program.leaf_paths(scaling.operand)
    path = parent_of(leaves)
    homes = {path, *(parent_of([leaf]) for leaf in leaves)}

    def run(next_index: Callable[[int], int | None]) -> list[int]:
        """Follows affine steps, up to the last one that takes a variable of this norm."""
        passed: list[int] = []
        taken = 0
        index = next_index(start)
        while index is not None and index not in claimed:
            step = as_affine_step(program, program.equations[index])
            if step is None or _scales_by(rooted, step):
                break
            variables = () if step.operand is None else program.leaf_paths(step.operand)
            if not {parent_of([leaf]) for leaf in variables} <= homes:
                break
            passed.append(index)
            if variables:
                taken = len(passed)
            index = next_index(index)
        return passed[:taken]

    def before(index: int) -> int | None:
        value = _affine_step_at(program, index).input
        return program.producers.get(value) if program.uses[value] == 1 else None

    def after(index: int) -> int | None:
        return program.only_consumer(program.equations[index].outputs[0])

    steps = (*reversed(run(before)), start, *run(after))
    first = _affine_step_at(program, steps[0])
    return Norm(path, steps, first.input, program.equations[steps[-1]].outputs[0], None)


def _affine_step_at(program: Program, index: int) -> Affine:
    """Returns an equation that is known to be affine as a step."""
    step = as_affine_step(program, program.equations[index])
    assert step is not None
    return step


def _normalizes_by_unknown(program: Program, equation: Equation) -> bool:
    """Returns whether an equation takes an inverse root of something unknown or divides by a root.

    Both make the output of a norm depend on statistics of its input.
    """
    if equation.name == "rsqrt":
        return not program.is_known(equation.outputs[0])
    if equation.name != "div" or program.is_known(equation.inputs[1]):
        return False
    divisor = program.producer(equation.inputs[1])
    while divisor is not None and divisor.name in ("broadcast_in_dim", "reshape"):
        divisor = program.producer(divisor.inputs[0])
    return divisor is not None and divisor.name == "sqrt"


def _affine_path_after(program: Program, start: int) -> str:
    """Returns the path of the first variables that the output of an equation is combined with."""
    ahead = deque([start])
    seen = {start}
    while ahead:
        equation = program.equations[ahead.popleft()]
        leaves = [path for value in equation.inputs for path in program.leaf_paths(value)]
        if leaves:
            return parent_of(leaves)
        if equation.name not in BETWEEN_ROOT_AND_VARIABLES:
            continue
        for index in program.consumers[equation.outputs[0]]:
            if index not in seen:
                seen.add(index)
                ahead.append(index)
    return ""
