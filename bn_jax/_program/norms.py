"""The norms in a traced program, found by what the equations compute."""

from collections import deque
from collections.abc import Callable, Mapping
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
    equations whose known values come from variables at the same path. A norm that normalizes by its
    input (in training, or a layer norm) has an obstacle, and so has one inside a scan or the like.
    """
    rooted = _rooted(program)
    affine: dict[int, Affine] = {}
    scalings: set[int] = set()
    for index, equation in enumerate(program.equations):
        step = as_affine_step(program, equation)
        if step is not None:
            affine[index] = step
            if step.kind in ("mul", "div") and step.operand in rooted:
                scalings.add(index)
    norms: list[Norm] = []
    # A norm extends neither over the scaling of another norm nor over an equation of one.
    taken = set(scalings)
    for index, equation in enumerate(program.equations):
        if index in scalings:
            norms.append(_extend(program, affine, taken, index))
            taken.update(norms[-1].steps)
        elif _normalizes_by_unknown(program, equation):
            norms.append(_with_obstacle(equation, _affine_path_after(program, index), "input"))
        else:
            for norm in [norm for body in equation.bodies for norm in find_norms(body)]:
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


def _extend(program: Program, affine: Mapping[int, Affine], taken: set[int], start: int) -> Norm:
    """Returns the norm around the equation that multiplies by the inverse deviation."""

    def variables_of(index: int) -> tuple[str, ...]:
        operand = affine[index].operand
        return () if operand is None else program.leaf_paths(operand)

    path = parent_of(variables_of(start))
    homes = {path, *(parent_of([leaf]) for leaf in variables_of(start))}

    def run(next_index: Callable[[int], int | None]) -> list[int]:
        """Follows affine steps, up to the last one that takes a variable of this norm."""
        passed: list[int] = []
        length = 0
        index = next_index(start)
        while index is not None and index in affine and index not in taken:
            variables = variables_of(index)
            if not {parent_of([leaf]) for leaf in variables} <= homes:
                break
            passed.append(index)
            if variables:
                length = len(passed)
            index = next_index(index)
        return passed[:length]

    def before(index: int) -> int | None:
        value = affine[index].input
        return program.producers.get(value) if program.uses[value] == 1 else None

    def after(index: int) -> int | None:
        return program.only_consumer(program.equations[index].outputs[0])

    steps = (*reversed(run(before)), start, *run(after))
    output = program.equations[steps[-1]].outputs[0]
    return Norm(path, steps, affine[steps[0]].input, output, None)


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
