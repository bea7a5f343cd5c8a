"""The norms in a traced program, found by what the equations compute."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from bn_jax._program.formulas import broadcast_root, formula_of
from bn_jax._program.obstacles import (
    leaves_after,
    selected_leaves,
    selected_norm,
    unknown_root,
    whitening_leaves,
)
from bn_jax._program.operations import Affine, as_affine_step
from bn_jax._program.primitives import MATRIX_ROOTS, ROOTS
from bn_jax._program.program import Equation, Program, parent_of


class Norm(NamedTuple):
    """A norm found in a program.

    Attributes:
        path: where its scale is; without a scale, its bias, or else its statistics. "" at the top.
        steps: the indices of its equations, each affine in the value before; empty where
            `obstacle` is not None.
        input: the value that it normalizes; with an obstacle, the first input of the equation.
        output: the value that it returns; with an obstacle, the first output of the equation.
        obstacle: None for a norm by known statistics; "input" for one that takes its statistics
            from its input; "selection" where an argument selects them; "whitening" for one that
            multiplies by a matrix; otherwise the name of the equation around it, such as "scan".
        kind: what it is, where that is no layer with a path, such as "a whitening norm".
    """

    path: str
    steps: tuple[int, ...]
    input: int
    output: int
    obstacle: str | None
    kind: str = ""


def find_norms(program: Program) -> tuple[Norm, ...]:
    """Finds the norms: where a value is multiplied by a factor with an inverse deviation in it.

    A norm by known statistics is a run of affine equations, one of which multiplies or divides by a
    known value that comes from variables through a root. It extends to both sides over the affine
    equations whose known values come from variables at the same path. A norm that normalizes by its
    input (in training, or a layer norm) has an obstacle, and so has one inside a scan or the like.
    """
    rooted = _rooted(program, ROOTS)
    matrices = _rooted(program, MATRIX_ROOTS)
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
        elif (root := unknown_root(program, equation)) is not None:
            norms.append(_by_unknown(program, index, root))
        elif leaves := selected_norm(program, equation, rooted):
            norms.append(_with_obstacle(equation, home_of(leaves), "selection", "a domain norm"))
        elif leaves := whitening_leaves(program, index, matrices):
            norms.append(_with_obstacle(equation, home_of(leaves), "whitening", "a whitening norm"))
        else:
            for norm in [norm for body in equation.bodies for norm in find_norms(body)]:
                obstacle = norm.obstacle or equation.name
                norms.append(_with_obstacle(equation, norm.path, obstacle, norm.kind))
    return tuple(norms)


def home_of(paths: Sequence[str]) -> str:
    """Returns where variables are: the path that their parents have in common.

    Of variables in a list, it is the path of the first; of those with nothing in common, too.
    """
    if not paths or _is_in_list(paths[0]):
        return paths[0] if paths else ""
    return parent_of(paths) or parent_of(paths[:1])


def _is_in_list(path: str) -> bool:
    return path.split("/")[-1].isdigit()


def _by_unknown(program: Program, index: int, root: int) -> Norm:
    """Returns the norm around an inverse root of something unknown."""
    equation = program.equations[index]
    selected = selected_leaves(program, root)
    if selected:
        return _with_obstacle(equation, home_of(selected), "selection", "a domain norm")
    leaves = leaves_after(program, index)
    return _with_obstacle(
        equation, home_of(leaves), "input", "" if leaves else "a norm without scale and bias"
    )


def _with_obstacle(equation: Equation, path: str, obstacle: str, kind: str) -> Norm:
    return Norm(path, (), equation.inputs[0], equation.outputs[0], obstacle, kind)


def _rooted(program: Program, roots: Collection[str]) -> set[int]:
    """Returns the known values that come from variables through one of these roots."""
    rooted: set[int] = set()
    for equation in program.equations:
        is_rooted = equation.name in roots or not rooted.isdisjoint(equation.inputs)
        rooted.update(value for value in equation.outputs if is_rooted and program.origins[value])
    return rooted


# --- norms by known statistics ------------------------------------------------------------------


def _extend(program: Program, affine: Mapping[int, Affine], taken: set[int], start: int) -> Norm:
    """Returns the norm around the equation that multiplies by the inverse deviation."""

    def run(next_index: Callable[[int], int | None], *, goes_back: bool) -> list[int]:
        """Follows affine steps, up to the last one that takes a variable of this norm."""
        passed: list[int] = []
        length = 0
        index = next_index(start)
        while index is not None and index in affine and index not in taken:
            subtracts = affine[index].kind in ("sub", "from")
            if not goes_back and subtracts and next_index(index) in taken:
                # The mean of the next norm.
                break
            may_be_mean = goes_back and subtracts and length == 0
            if not _belongs(program, affine[start], affine[index], may_be_mean):
                break
            passed.append(index)
            operand = affine[index].operand
            if operand is not None and program.origins[operand]:
                length = len(passed)
            index = next_index(index)
        return passed[:length]

    def before(index: int) -> int | None:
        value = affine[index].input
        return program.producers.get(value) if program.uses[value] == 1 else None

    def after(index: int) -> int | None:
        return program.only_consumer(program.equations[index].outputs[0])

    steps = (*reversed(run(before, goes_back=True)), start, *run(after, goes_back=False))
    path = _path_of(program, affine, steps, start)
    kind = ""
    if not path and not _is_whole(program, affine, steps):
        kind = f"a hand-written norm {formula_of(program, [affine[index] for index in steps])}"
    output = program.equations[steps[-1]].outputs[0]
    return Norm(path, steps, affine[steps[0]].input, output, None, kind)


def _belongs(program: Program, scaling: Affine, step: Affine, may_be_mean: bool) -> bool:
    """Returns whether an affine step can be one of the norm that a scaling is of.

    Its variables are where those of the scaling are. What is taken off right before the scaling is
    the mean, wherever it is. Variables at the top or in lists say nothing by where they are: of
    these, the step takes any that vary along the axes of the scaling.
    """
    leaves = _leaves_of(program, step)
    if not leaves:
        return True
    of_scaling = _leaves_of(program, scaling)
    homes = {*map(_parent, of_scaling), parent_of(of_scaling) or _parent(of_scaling[0])}
    at_home = {*map(_parent, leaves)} <= homes
    if at_home and all(map(_is_named, leaves)):
        return True
    is_anywhere = not any(map(_is_named, of_scaling))
    return (at_home or may_be_mean or is_anywhere) and _varies_within(program, step, scaling)


def _varies_within(program: Program, step: Affine, scaling: Affine) -> bool:
    """Returns whether the operand of a step varies along no other axes than that of a scaling."""
    assert step.operand is not None and scaling.operand is not None
    _, shape = broadcast_root(program, step.operand)
    _, of_scaling = broadcast_root(program, scaling.operand)
    if len(shape) != len(of_scaling):
        return not shape
    return all(size in (1, other) for size, other in zip(shape, of_scaling, strict=True))


def _path_of(
    program: Program, affine: Mapping[int, Affine], steps: Sequence[int], start: int
) -> str:
    """Returns the path of a norm.

    That is where all its variables are and no others, or else where its scale is, its bias, or its
    statistics.
    """
    leaves = [leaf for index in steps for leaf in _leaves_of(program, affine[index])]
    around = parent_of(leaves)
    others = [path for path in program.paths if path.startswith(f"{around}/")]
    if around and all(map(_is_named, leaves)) and {*others} <= {*leaves}:
        return around
    factors = [affine[index] for index in steps if affine[index].kind in ("mul", "div")]
    scales = [
        leaf
        for factor in factors
        if factor.operand is not None
        for leaf in _leaves_outside_roots(program, factor.operand)
    ]
    after = [affine[index] for index in steps if index > start]
    biases = [leaf for step in after for leaf in _leaves_of(program, step)]
    return home_of(scales or biases or leaves)


def _leaves_of(program: Program, step: Affine) -> tuple[str, ...]:
    return () if step.operand is None else program.leaf_paths(step.operand)


def _leaves_outside_roots(program: Program, value: int) -> tuple[str, ...]:
    """Returns the paths of the leaves that a known value depends on by more than roots of them."""
    equation = program.producer(value)
    if equation is None:
        return program.leaf_paths(value)
    if equation.name in ROOTS:
        return ()
    return tuple(
        leaf for operand in equation.inputs for leaf in _leaves_outside_roots(program, operand)
    )


def _is_whole(program: Program, affine: Mapping[int, Affine], steps: Sequence[int]) -> bool:
    """Returns whether the variables of a program are those of one norm: a layer by itself."""
    leaves = {leaf for index in steps for leaf in _leaves_of(program, affine[index])}
    return {*program.paths} - {"count"} <= leaves


def _parent(path: str) -> str:
    return parent_of([path])


def _is_named(path: str) -> bool:
    """Returns whether the place of a variable tells whose it is: it is in a module."""
    return "/" in path and not _is_in_list(path)
