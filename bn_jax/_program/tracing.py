"""A forward function, traced and read into a flat program.

`trace` makes a `Program` of a forward function. It looks at the equations alone, never at names of
modules, so that layers of this library, of Flax and written by hand are alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.extend.core import Literal as JaxprLiteral

from bn_jax._paths import format_path
from bn_jax._program.norms import find_norms
from bn_jax._program.primitives import CALLS, WITH_DERIVATIVE
from bn_jax._program.program import Equation, Origins, Program

_COLLECTIONS = ("params", "batch_stats")


def trace(forward: Callable[..., Any], variables: Any, *args: Any) -> Program:
    """Traces ``forward(variables, *args)`` on shapes and dtypes alone.

    The bodies of `jax.jit`, `jax.checkpoint` and the like take the place of their calls, and names
    for policies of `jax.checkpoint` are left out. `jax.lax.scan`, `while_loop`, `cond` and
    `jax.shard_map` stay one equation each.
    """
    closed, shapes = jax.make_jaxpr(forward, return_shape=True)(variables, *args)
    paths = tuple(_leaf_path(keys) for keys, _ in jax.tree.leaves_with_path(variables))
    origins: list[Origins] = [frozenset({index}) for index in range(len(paths))]
    origins += [None] * (len(closed.jaxpr.invars) - len(paths))
    return _read(
        closed.jaxpr, closed.consts, origins, paths, jax.tree.structure(shapes), len(paths)
    )


def _leaf_path(keys: tuple[Any, ...]) -> str:
    """Returns the path of a leaf without the collection, and without the key of a box around it."""
    names = format_path(keys).split("/")
    if len(names) > 1 and names[0] in _COLLECTIONS:
        names = names[1:]
    if len(names) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value"):
        names = names[:-1]
    return "/".join(names)


def _read(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    origins: Sequence[Origins],
    paths: tuple[str, ...],
    tree: jax.tree_util.PyTreeDef | None = None,
    leaves: int = 0,
) -> Program:
    """Reads a jaxpr. Its first inputs are the leaves of the variables, as many as `leaves`."""
    reader = _Reader(paths)
    inputs = [
        reader.new(variable.aval, known)
        for variable, known in zip(jaxpr.invars, origins, strict=True)
    ]
    outputs = reader.read(jaxpr, consts, inputs)
    return Program(
        equations=tuple(reader.equations),
        avals=tuple(reader.avals),
        constants=reader.constants,
        leaves=tuple(inputs[:leaves]),
        paths=paths,
        arguments=tuple(inputs[leaves:]),
        outputs=tuple(outputs),
        tree=tree,
        origins=tuple(reader.origins),
    )


class _Reader:
    """Collects the equations of nested jaxprs. A jaxpr that is called twice is read twice."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.paths = paths
        self.equations: list[Equation] = []
        self.avals: list[Any] = []
        self.origins: list[Origins] = []
        self.constants: dict[int, Any] = {}

    def new(self, aval: Any, origins: Origins) -> int:
        """Adds a value."""
        self.avals.append(aval)
        self.origins.append(origins)
        return len(self.avals) - 1

    def constant(self, value: Any, aval: Any) -> int:
        """Adds a value that the program holds."""
        number = self.new(aval, frozenset())
        self.constants[number] = value
        return number

    def read(self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[int]) -> list[int]:
        """Adds the equations of a jaxpr, and returns the numbers of its outputs."""
        numbers = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, value in zip(jaxpr.constvars, consts, strict=True):
            numbers[variable] = self.constant(value, variable.aval)

        def number_of(atom: Any) -> int:
            if isinstance(atom, JaxprLiteral):
                return self.constant(atom.val, atom.aval)
            return numbers[atom]

        for eqn in jaxpr.eqns:
            outputs = self._add(eqn, tuple(number_of(atom) for atom in eqn.invars))
            numbers.update(zip(eqn.outvars, outputs, strict=True))
        return [number_of(atom) for atom in jaxpr.outvars]

    def _add(self, eqn: JaxprEqn, inputs: tuple[int, ...]) -> Sequence[int]:
        """Adds an equation, or those of its body, and returns the numbers of its outputs."""
        name = eqn.primitive.name
        if name == "name":
            # `jax.ad_checkpoint.checkpoint_name` returns its input.
            return inputs
        if name in CALLS:
            return self._read_body(eqn, inputs)
        origins = [self.origins[value] for value in inputs]
        known = [leaves for leaves in origins if leaves is not None]
        is_known = len(known) == len(origins) and not eqn.effects
        bodies = () if is_known or not eqn.outvars else self._bodies(eqn, origins)
        function = name
        if name in WITH_DERIVATIVE:
            # The body of a function with a derivative rule replaces it only where a norm by known
            # statistics is inside. Anything else such a function does keeps its rule.
            norms = (norm for body in bodies for norm in find_norms(body))
            if any(known) and any(norm.obstacle is None for norm in norms):
                return self._read_body(eqn, inputs)
            body, _ = next(jaxprs_in(eqn.params))
            function = str(body.debug_info.func_name)
        of_outputs = frozenset[int]().union(*known) if is_known else None
        outputs = tuple(self.new(variable.aval, of_outputs) for variable in eqn.outvars)
        self.equations.append(Equation(name, eqn.params, inputs, outputs, eqn, function, bodies))
        return outputs

    def _read_body(self, eqn: JaxprEqn, inputs: Sequence[int]) -> Sequence[int]:
        body, consts = next(jaxprs_in(eqn.params))
        return self.read(body, consts, inputs)

    def _bodies(self, eqn: JaxprEqn, origins: Sequence[Origins]) -> tuple[Program, ...]:
        return tuple(
            _read(jaxpr, consts, _origins_inside(eqn, origins, len(jaxpr.invars)), self.paths)
            for jaxpr, consts in jaxprs_in(eqn.params)
        )


def jaxprs_in(options: Mapping[str, Any]) -> Iterator[tuple[Jaxpr, Sequence[Any]]]:
    """Yields the jaxprs among the parameters of a primitive, each with its constants."""
    for option in options.values():
        for part in option if isinstance(option, tuple | list) else (option,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr, part.consts
            elif isinstance(part, Jaxpr):
                yield part, ()


def _origins_inside(eqn: JaxprEqn, origins: Sequence[Origins], count: int) -> list[Origins]:
    """Returns the origins of the inputs of a body; what a loop carries counts as unknown."""
    name, options, inside = eqn.primitive.name, eqn.params, list(origins)
    if name == "while":
        # The inputs are the constants of the condition, those of the body, and what is carried.
        skipped, constants = options["cond_nconsts"], options["body_nconsts"]
        inside = [*inside[skipped : skipped + constants], *[None] * (count - constants)]
    if name == "cond":
        inside = inside[1:]
    if name == "scan":
        constants, carried = options["num_consts"], options["num_carry"]
        inside[constants : constants + carried] = [None] * carried
    return inside if len(inside) == count else [None] * count
