"""A forward function, traced and read into a flat program.

`trace` makes a `Program` of a forward function. It looks at the equations alone, never at names of
modules, so that layers of this library, of Flax and written by hand are alike.

Example:
    >>> import jax, jax.numpy as jnp, bn_jax as bn
    >>> from bn_jax._program import find_norms, trace
    >>> layer = bn.linen.BatchNorm(use_running_average=True)
    >>> x = jnp.ones((2, 3))
    >>> program = trace(layer.apply, layer.init(jax.random.key(0), x), x)
    >>> norm, = find_norms(program)
    >>> [program.equations[index].name for index in norm.steps]
    ['sub', 'sub', 'mul', 'add']
"""

from collections import Counter
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

    Args:
        forward: the model; what it does with arrays may depend on their shapes only.
        variables: a tree of arrays, `jax.ShapeDtypeStruct` or an `nnx.State`.
        *args: further trees of these.

    Returns:
        The program, with the bodies of `jax.jit`, `jax.checkpoint` and the like in place of their
        calls, and without the names that policies of `jax.checkpoint` use.
        `jax.lax.scan`, `while_loop`, `cond` and `jax.shard_map` stay one equation each.
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
    consumers: dict[int, list[int]] = {value: [] for value in range(len(reader.avals))}
    for index, equation in enumerate(reader.equations):
        for value in equation.inputs:
            consumers[value].append(index)
    uses = Counter({value: len(indices) for value, indices in consumers.items()})
    uses.update(outputs)
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
        producers={
            value: index
            for index, equation in enumerate(reader.equations)
            for value in equation.outputs
        },
        uses=uses,
        consumers={value: tuple(indices) for value, indices in consumers.items()},
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
            body, consts = next(_jaxprs(eqn.params))
            return self.read(body, consts, inputs)
        origins = [self.origins[value] for value in inputs]
        is_known = None not in origins and not eqn.effects
        has_bodies = bool(eqn.outvars) and not is_known
        bodies = tuple(self._bodies(eqn, origins)) if has_bodies else ()
        # The body of a function with a derivative rule replaces it only where a norm by known
        # statistics is inside. Anything else such a function does keeps its rule.
        if name in WITH_DERIVATIVE and any(origins) and _has_norm(bodies):
            body, consts = next(_jaxprs(eqn.params))
            return self.read(body, consts, inputs)
        of_outputs = _union(origins) if is_known else None
        outputs = tuple(self.new(variable.aval, of_outputs) for variable in eqn.outvars)
        function = _function_of(eqn) if name in WITH_DERIVATIVE else name
        self.equations.append(Equation(name, eqn.params, inputs, outputs, eqn, function, bodies))
        return outputs

    def _bodies(self, eqn: JaxprEqn, origins: Sequence[Origins]) -> Iterator[Program]:
        for jaxpr, consts in _jaxprs(eqn.params):
            inside = _origins_inside(eqn, origins, len(jaxpr.invars))
            yield _read(jaxpr, consts, inside, self.paths)


def _has_norm(programs: Sequence[Program]) -> bool:
    return any(norm.obstacle is None for program in programs for norm in find_norms(program))


def _union(origins: Sequence[Origins]) -> Origins:
    return frozenset().union(*(leaves or () for leaves in origins))


def _function_of(eqn: JaxprEqn) -> str:
    """Returns the name of the called function, which has a derivative rule."""
    for jaxpr, _ in _jaxprs(eqn.params):
        return str(jaxpr.debug_info.func_name)
    return str(eqn.primitive.name)


def _jaxprs(options: Mapping[str, Any]) -> Iterator[tuple[Jaxpr, Sequence[Any]]]:
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
