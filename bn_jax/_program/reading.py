"""A traced model as a flat program: which values are known before any input, and where norms are.

`trace` makes a `Program` of a forward function, `find_norms` the norms in it. Both look at the
equations alone, never at names of modules, so that ours, Flax's and hand-written norms are alike.

Example:
    >>> import jax, jax.numpy as jnp, bn_jax as bn
    >>> from bn_jax._program.reading import find_norms, trace
    >>> layer = bn.linen.BatchNorm(use_running_average=True)
    >>> x = jnp.ones((2, 3))
    >>> program = trace(layer.apply, layer.init(jax.random.key(0), x), x)
    >>> norm, = find_norms(program)
    >>> [program.equations[index].name for index in norm.steps]
    ['sub', 'sub', 'mul', 'add']
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun
from jax.extend.core import Literal as JaxprLiteral

from bn_jax._paths import format_path

Origins = frozenset[int] | None

# What a call equation hides is read in its place. Functions with a derivative of their own are
# opened only where a norm by known statistics is inside: what else they do keeps its derivative.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
WITH_DERIVATIVE = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_COLLECTIONS = ("params", "batch_stats")
MARKS = {"pvary", "pcast", "copy", "copy_p"}  # equations that change no number and no shape
_KEPT_VALUE = {"copy", "copy_p"}


class Equation(NamedTuple):
    """An operation of a program.

    Attributes:
        name: of the primitive.
        options: the primitive's parameters.
        inputs: the values it takes.
        outputs: the values it gives.
        source: the equation of JAX that it was read from.
        debug_info: of the function around it, which JAX asks for.
    """

    name: str
    options: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    source: JaxprEqn
    debug_info: Any


class Program(NamedTuple):
    """A forward function, traced and flattened. Values are numbers, counted from 0.

    Attributes:
        equations: in the order of execution, calls read in place.
        avals: the shape and dtype of each value.
        constants: the values that the program itself holds.
        leaves: the values of the variables, in the order of `jax.tree.leaves`.
        paths: their paths, without the collection ("params", "batch_stats").
        arguments: the values of the other arguments' leaves.
        outputs: the values returned.
        tree: the structure of what is returned.
        origins: for each value known before any argument is, the indices of the leaves that it
            depends on (none for a constant); None for a value that depends on an argument.
        producers: the index of the equation that gives a value.
        uses: how often each value is used, by equations or as an output.
        consumers: the indices of the equations that take a value.
    """

    equations: tuple[Equation, ...]
    avals: tuple[Any, ...]
    constants: Mapping[int, Any]
    leaves: tuple[int, ...]
    paths: tuple[str, ...]
    arguments: tuple[int, ...]
    outputs: tuple[int, ...]
    tree: Any
    origins: tuple[Origins, ...]
    producers: Mapping[int, int]
    uses: Mapping[int, int]
    consumers: Mapping[int, tuple[int, ...]]

    def is_known(self, value: int) -> bool:
        """Says whether a value depends on variables and constants only."""
        return self.origins[value] is not None

    def leaf_paths(self, value: int) -> tuple[str, ...]:
        """Returns the paths of the leaves that a known value depends on."""
        return tuple(self.paths[leaf] for leaf in sorted(self.origins[value] or ()))

    def producer(self, value: int) -> Equation | None:
        """Returns the equation that gives a value; None for arguments, leaves and constants."""
        return self.equations[self.producers[value]] if value in self.producers else None

    def only_consumer(self, value: int) -> int | None:
        """Returns the index of the equation that takes a value, where nothing else does."""
        return self.consumers[value][0] if self.uses[value] == 1 and self.consumers[value] else None


class Affine(NamedTuple):
    """What an equation does to its one unknown value, which every other value is known for.

    Attributes:
        kind: ``y = x + k``, ``x - k``, ``k - x``, ``x * k``, ``x / k``, ``-x`` or ``x`` in another
            dtype, in this order.
        input: the value `x`.
        operand: the value `k`, or None.
    """

    kind: Literal["add", "sub", "from", "mul", "div", "neg", "same"]
    input: int
    operand: int | None


class Linear(NamedTuple):
    """A convolution, or a product, of something unknown with a known kernel.

    Attributes:
        number: the index of the equation.
        data: the value that the kernel is applied to.
        kernel: the value of the kernel.
        outputs: the dimensions of the result that are the kernel's too, ascending.
        kernel_outputs: which dimensions of the kernel these are.
        inputs: the dimensions of the data that are the kernel's too.
        kernel_inputs: which dimensions of the kernel these are; of a grouped convolution, the
            kernel's is that of one group.
        groups: of a convolution; else 1.
        is_padded: whether some positions of the result meet zeros instead of data.
    """

    number: int
    data: int
    kernel: int
    outputs: tuple[int, ...]
    kernel_outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    kernel_inputs: tuple[int, ...]
    groups: int = 1
    is_padded: bool = False


class Norm(NamedTuple):
    """A norm found in a program.

    Attributes:
        path: where its variables are: what the paths of their parents have in common.
        steps: the indices of its equations, each affine in the value before; empty where
            `obstacle` is not None.
        input: the value that it normalizes; with an obstacle, what the equation found takes first.
        output: the value that it returns; with an obstacle, what the equation found gives first.
        obstacle: None for a norm by known statistics; "input" for one that takes its statistics
            from its input; otherwise the name of the equation that it is inside of ("scan").
    """

    path: str
    steps: tuple[int, ...]
    input: int
    output: int
    obstacle: str | None


def trace(forward: Callable[..., Any], variables: Any, *args: Any) -> Program:
    """Traces ``forward(variables, *args)`` on shapes and dtypes alone.

    Args:
        forward: the model; what it does with arrays may depend on their shapes only.
        variables: a tree of arrays, `jax.ShapeDtypeStruct` or an `nnx.State`.
        *args: further trees of these.

    Returns:
        The program, with the calls of `jax.jit`, `jax.checkpoint` and the like read in place, and
        without the names for policies of the latter.
        `jax.lax.scan`, `while_loop`, `cond` and `jax.shard_map` stay one equation each.
    """
    closed, shapes = jax.make_jaxpr(forward, return_shape=True)(variables, *args)
    paths = tuple(_leaf_path(keys) for keys, _ in jax.tree.leaves_with_path(variables))
    known = len(paths)
    origins: list[Origins] = [
        frozenset({index}) if index < known else None for index in range(len(closed.jaxpr.invars))
    ]
    return _read(closed, origins, paths, jax.tree.structure(shapes), known)


def evaluate(equation: Equation, values: Sequence[Any]) -> Sequence[Any]:
    """Computes the outputs of an equation from the values of its inputs, with its derivatives."""
    eqn = equation.source
    taken = {
        atom: value
        for atom, value in zip(eqn.invars, values, strict=True)
        if not isinstance(atom, JaxprLiteral)
    }
    alone = Jaxpr((), list(taken), eqn.outvars, [eqn], eqn.effects, debug_info=equation.debug_info)
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*taken.values())


def name_of(equation: Equation) -> str:
    """Returns the name of the function that an equation calls, or of its primitive."""
    if equation.name in WITH_DERIVATIVE:
        for jaxpr, _ in _jaxprs(equation.options):
            return jaxpr.debug_info.func_name
    return equation.name


def as_affine_step(program: Program, equation: Equation) -> Affine | None:
    """Reads an equation as an affine, elementwise function of its one unknown value, if it is."""
    unknown = [value for value in equation.inputs if not program.is_known(value)]
    if len(unknown) != 1 or len(equation.outputs) != 1:
        return None
    value, name = unknown[0], equation.name
    others = [other for other in equation.inputs if other != value]
    operand = others[0] if others else None
    is_first = equation.inputs[0] == value
    if name in ("add", "add_any"):
        return Affine("add", value, operand)
    if name == "sub":
        return Affine("sub" if is_first else "from", value, operand)
    if name == "mul":
        return Affine("mul", value, operand)
    if name == "div" and is_first:
        return Affine("div", value, operand)
    if name == "neg":
        return Affine("neg", value, None)
    if name in _KEPT_VALUE:
        return Affine("same", value, None)
    if name == "convert_element_type" and _keeps_numbers(program, equation):
        return Affine("same", value, None)
    return None


def as_linear(program: Program, index: int) -> Linear | None:
    """Reads the equation at an index as a linear layer with a known kernel, if it is one."""
    equation = program.equations[index]
    if equation.name == "conv_general_dilated":
        return _as_convolution(program, index, equation)
    if equation.name == "dot_general":
        return _as_product(program, index, equation)
    return None


def find_norms(program: Program) -> tuple[Norm, ...]:
    """Finds the norms: what is multiplied by something that an inverse deviation is a factor of.

    A norm by known statistics is a run of affine equations, one of which multiplies or divides by a
    known value that comes from variables through a root. It extends to both sides over the affine
    equations whose known values come from variables at the same path.

    Args:
        program: of `trace`.

    Returns:
        The norms in the order of the program. One that normalizes by its input (in training, or a
        layer norm), and one that is inside of a scan or the like, have an obstacle.
    """
    rooted = _rooted(program)
    found: list[Norm] = []
    for index, equation in enumerate(program.equations):
        step = as_affine_step(program, equation)
        if step is not None and _scales_by(rooted, step):
            claimed = {number for norm in found for number in norm.steps}
            found.append(_extend(program, rooted, claimed, index))
        elif _normalizes_by_unknown(program, equation):
            path = _affine_path_after(program, index)
            found.append(_found_at(equation, path, "input"))
        elif not all(program.is_known(value) for value in equation.outputs):
            inner = (norm for one in _inner_programs(program, equation) for norm in find_norms(one))
            for norm in inner:
                obstacle = norm.obstacle or equation.name
                found.append(_found_at(equation, norm.path, obstacle))
    return tuple(found)


def _found_at(equation: Equation, path: str, obstacle: str) -> Norm:
    return Norm(path, (), equation.inputs[0], equation.outputs[0], obstacle)


def recipe_of(program: Program, value: int, seen: dict[int, str]) -> str:
    """Returns a digest of how a known value is computed: from which leaves, by what.

    Args:
        program: of `trace`.
        value: one that is known.
        seen: the digests of values of this program, which is added to.
    """
    if value not in seen:
        recipe: tuple[Any, ...]
        equation = program.producer(value)
        if equation is not None and equation.name in MARKS:
            return recipe_of(program, equation.inputs[0], seen)
        if value in program.leaves:
            recipe = ("leaf", program.leaves.index(value))
        elif equation is None:
            recipe = ("constant", _bytes_of(program.constants[value]))
        else:
            inputs = [recipe_of(program, one, seen) for one in equation.inputs]
            position = equation.outputs.index(value)
            recipe = (equation.name, position, _plain_options(equation.options), inputs)
        seen[value] = sha256(repr(recipe).encode()).hexdigest()
    return seen[value]


def _bytes_of(value: Any) -> tuple[str, bytes]:
    dtype = jnp.result_type(value)
    is_plain = not jnp.issubdtype(dtype, jax.dtypes.extended)
    return str(dtype), np.asarray(value).tobytes() if is_plain else b""


def _plain_options(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns what tells options apart that two traces of the same function have."""
    return [
        (name, _plain(option)) for name, option in sorted(options.items()) if "sharding" not in name
    ]


def _plain(option: Any) -> Any:
    if isinstance(option, tuple | list):
        return [_plain(one) for one in option]
    if isinstance(option, ClosedJaxpr):
        return _plain(option.jaxpr), [_bytes_of(one) for one in option.consts]
    if isinstance(option, Jaxpr):
        return [
            (
                eqn.primitive.name,
                _plain_options(eqn.params),
                [_bytes_of(one.val) for one in eqn.invars if isinstance(one, JaxprLiteral)],
            )
            for eqn in option.eqns
        ]
    is_plain = option is None or isinstance(option, int | float | complex | str | np.dtype)
    return option if is_plain else type(option).__name__


def parent_of(paths: Sequence[str]) -> str:
    """Returns what the paths of the parents of these leaves have in common."""
    parents = [path.split("/")[:-1] for path in paths]
    if not parents:
        return ""
    common: list[str] = []
    for names in zip(*parents, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return "/".join(common)


def _as_convolution(program: Program, index: int, equation: Equation) -> Linear | None:
    data, kernel = equation.inputs
    options = equation.options
    is_plain = program.is_known(kernel) and not program.is_known(data)
    if not is_plain or options["batch_group_count"] > 1:
        return None
    data_spec, kernel_spec, out_spec = options["dimension_numbers"]
    return Linear(
        index,
        data,
        kernel,
        outputs=(out_spec[1],),
        kernel_outputs=(kernel_spec[0],),
        inputs=(data_spec[1],),
        kernel_inputs=(kernel_spec[1],),
        groups=options["feature_group_count"],
        is_padded=any(size != 0 for pair in options["padding"] for size in pair)
        or any(step != 1 for step in options["lhs_dilation"]),
    )


def _as_product(program: Program, index: int, equation: Equation) -> Linear | None:
    known = [program.is_known(value) for value in equation.inputs]
    if known not in ([False, True], [True, False]):
        return None
    side = known.index(True)
    contracted, batched = equation.options["dimension_numbers"]
    ranks = [len(program.avals[value].shape) for value in equation.inputs]
    free = [
        [one for one in range(ranks[at]) if one not in (*contracted[at], *batched[at])]
        for at in (0, 1)
    ]
    first = len(batched[0]) + (len(free[0]) if side == 1 else 0)
    return Linear(
        index,
        data=equation.inputs[1 - side],
        kernel=equation.inputs[side],
        outputs=(*range(len(batched[0])), *range(first, first + len(free[side]))),
        kernel_outputs=(*batched[side], *free[side]),
        inputs=(*contracted[1 - side], *batched[1 - side]),
        kernel_inputs=(*contracted[side], *batched[side]),
    )


def _read(
    closed: ClosedJaxpr,
    origins: list[Origins],
    paths: tuple[str, ...],
    tree: Any,
    leaves: int = 0,
) -> Program:
    """Reads a jaxpr, the first inputs of which are so many leaves of the variables."""
    reader = _Reader(closed.jaxpr.debug_info, paths)
    inputs = [
        reader.new(variable.aval, own)
        for variable, own in zip(closed.jaxpr.invars, origins, strict=True)
    ]
    outputs = reader.read(closed.jaxpr, closed.consts, inputs)
    equations = tuple(reader.equations)
    consumers: dict[int, list[int]] = {value: [] for value in range(len(reader.avals))}
    for index, equation in enumerate(equations):
        for value in equation.inputs:
            consumers[value].append(index)
    uses = Counter({value: len(indices) for value, indices in consumers.items()})
    uses.update(outputs)
    return Program(
        equations=equations,
        avals=tuple(reader.avals),
        constants=reader.constants,
        leaves=tuple(inputs[:leaves]),
        paths=paths,
        arguments=tuple(inputs[leaves:]),
        outputs=tuple(outputs),
        tree=tree,
        origins=tuple(reader.origins),
        producers={value: index for index, one in enumerate(equations) for value in one.outputs},
        uses=uses,
        consumers={value: tuple(indices) for value, indices in consumers.items()},
    )


class _Reader:
    """Collects equations while nested jaxprs are read; the same one read twice gives new values."""

    def __init__(self, debug_info: Any, paths: tuple[str, ...]) -> None:
        self.paths = paths
        self.debug_info = debug_info._replace(arg_names=None, result_paths=None)
        self.equations: list[Equation] = []
        self.avals: list[Any] = []
        self.origins: list[Origins] = []
        self.constants: dict[int, Any] = {}

    def new(self, aval: Any, origins: Origins) -> int:
        self.avals.append(aval)
        self.origins.append(origins)
        return len(self.avals) - 1

    def constant(self, value: Any, aval: Any) -> int:
        number = self.new(aval, frozenset())
        self.constants[number] = value
        return number

    def read(self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[int]) -> list[int]:
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, value in zip(jaxpr.constvars, consts, strict=True):
            known[variable] = self.constant(value, variable.aval)

        def number(atom: Any) -> int:
            if isinstance(atom, JaxprLiteral):
                return self.constant(atom.val, atom.aval)
            return known[atom]

        for eqn in jaxpr.eqns:
            operands = tuple(number(atom) for atom in eqn.invars)
            if eqn.primitive.name == "name":
                # What `jax.ad_checkpoint.checkpoint_name` returns is what it is given.
                outputs = list(operands)
            elif self._is_opened(eqn, operands):
                inner, inner_consts = next(_jaxprs(eqn.params))
                outputs = self.read(inner, inner_consts, operands)
            else:
                outputs = self._keep(eqn, operands)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [number(atom) for atom in jaxpr.outvars]

    def _is_opened(self, eqn: JaxprEqn, operands: tuple[int, ...]) -> bool:
        name = eqn.primitive.name
        if name in _CALLS:
            return True
        own = [self.origins[value] for value in operands]
        if name not in WITH_DERIVATIVE or None not in own or not any(own):
            return False
        jaxpr, consts = next(_jaxprs(eqn.params))
        inner = _read(ClosedJaxpr(jaxpr, consts), own, self.paths, None)
        return any(norm.obstacle is None for norm in find_norms(inner))

    def _keep(self, eqn: JaxprEqn, operands: tuple[int, ...]) -> list[int]:
        own = [self.origins[value] for value in operands]
        is_known = None not in own and not eqn.effects
        origins = frozenset().union(*(one or () for one in own)) if is_known else None
        outputs = [self.new(variable.aval, origins) for variable in eqn.outvars]
        name = eqn.primitive.name
        self.equations.append(
            Equation(name, eqn.params, operands, tuple(outputs), eqn, self.debug_info)
        )
        return outputs


def _jaxprs(options: Mapping[str, Any]) -> Iterator[tuple[Jaxpr, Sequence[Any]]]:
    """Yields the jaxprs among the parameters of a primitive, each with its constants."""
    for option in options.values():
        for one in option if isinstance(option, tuple | list) else (option,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr, one.consts
            elif isinstance(one, Jaxpr):
                yield one, ()


def _inner_programs(program: Program, equation: Equation) -> Iterator[Program]:
    """Reads the bodies of an equation that is left whole, with what is known of their inputs."""
    for jaxpr, consts in _jaxprs(equation.options):
        origins = _origins_inside(program, equation, len(jaxpr.invars))
        yield _read(ClosedJaxpr(jaxpr, consts), origins, program.paths, None)


def _origins_inside(program: Program, equation: Equation, count: int) -> list[Origins]:
    """Returns the origins of the inputs of a body; what a loop carries is unknown."""
    given = [program.origins[value] for value in equation.inputs]
    if equation.name == "while":
        skipped = equation.options["cond_nconsts"]
        constants = equation.options["body_nconsts"]
        given = [*given[skipped : skipped + constants], *[None] * (count - constants)]
    if equation.name == "cond":
        given = given[1:]
    if equation.name == "scan":
        constants, carried = equation.options["num_consts"], equation.options["num_carry"]
        given[constants : constants + carried] = [None] * carried
    return given if len(given) == count else [None] * count


def _rooted(program: Program) -> set[int]:
    """Returns the known values that come from variables through a root or another power."""
    rooted: set[int] = set()
    for equation in program.equations:
        is_root = equation.name in ("rsqrt", "sqrt", "pow")
        for value in equation.outputs:
            inherits = any(one in rooted for one in equation.inputs)
            if program.origins[value] and (is_root or inherits):
                rooted.add(value)
    return rooted


def _scales_by(rooted: set[int], step: Affine) -> bool:
    return step.kind in ("mul", "div") and step.operand in rooted


def _extend(program: Program, rooted: set[int], claimed: set[int], start: int) -> Norm:
    """Returns the norm around the equation that multiplies by the inverse deviation.

    What is `claimed`, the equations of the norms before, stays theirs.
    """
    scaling = as_affine_step(program, program.equations[start])
    assert scaling is not None and scaling.operand is not None
    leaves = program.leaf_paths(scaling.operand)
    path, homes = parent_of(leaves), {parent_of([leaf]) for leaf in leaves}

    def run(next_index: Callable[[int], int | None]) -> list[int]:
        """Follows affine steps, up to the last one that takes a variable of this norm."""
        passed: list[int] = []
        taken = 0
        index = next_index(start)
        while index is not None and index not in claimed:
            step = as_affine_step(program, program.equations[index])
            if step is None or _scales_by(rooted, step):
                break
            own = () if step.operand is None else program.leaf_paths(step.operand)
            if not {parent_of([leaf]) for leaf in own} <= homes | {path}:
                break
            passed.append(index)
            taken = len(passed) if own else taken
            index = next_index(index)
        return passed[:taken]

    def before(index: int) -> int | None:
        step = as_affine_step(program, program.equations[index])
        assert step is not None
        return program.producers.get(step.input) if program.uses[step.input] == 1 else None

    def after(index: int) -> int | None:
        return program.only_consumer(program.equations[index].outputs[0])

    steps = (*reversed(run(before)), start, *run(after))
    first = as_affine_step(program, program.equations[steps[0]])
    assert first is not None
    return Norm(path, steps, first.input, program.equations[steps[-1]].outputs[0], None)


def _normalizes_by_unknown(program: Program, equation: Equation) -> bool:
    """Says whether an equation takes or divides by the root of something unknown."""
    if equation.name == "rsqrt":
        return not program.is_known(equation.outputs[0])
    if equation.name != "div" or program.is_known(equation.inputs[1]):
        return False
    divisor = program.producer(equation.inputs[1])
    while divisor is not None and divisor.name in ("broadcast_in_dim", "reshape"):
        divisor = program.producer(divisor.inputs[0])
    return divisor is not None and divisor.name == "sqrt"


def _affine_path_after(program: Program, start: int) -> str:
    """Returns the path of the first variables that what an equation gives is combined with."""
    ahead = deque([start])
    seen = {start}
    while ahead:
        equation = program.equations[ahead.popleft()]
        leaves = [path for one in equation.inputs for path in program.leaf_paths(one)]
        if leaves:
            return parent_of(leaves)
        if equation.name not in _BETWEEN_ROOT_AND_VARIABLES:
            continue
        for index in program.consumers[equation.outputs[0]]:
            if index not in seen:
                seen.add(index)
                ahead.append(index)
    return ""


_BETWEEN_ROOT_AND_VARIABLES = {
    *("rsqrt", "mul", "div", "sub", "add", "convert_element_type", "broadcast_in_dim", "reshape"),
}


def _keeps_numbers(program: Program, equation: Equation) -> bool:
    """Says whether a change of dtype is one among reals, or among complex numbers, or widens."""
    given = program.avals[equation.inputs[0]].dtype
    wanted = program.avals[equation.outputs[0]].dtype
    if not jnp.issubdtype(given, jnp.inexact) or not jnp.issubdtype(wanted, jnp.inexact):
        return False
    is_complex = [jnp.issubdtype(one, jnp.complexfloating) for one in (given, wanted)]
    return is_complex != [True, False]


def _leaf_path(keys: tuple[Any, ...]) -> str:
    """Returns the path of a leaf without the collection, and without the key of what boxes it."""
    names = format_path(keys).split("/")
    if len(names) > 1 and names[0] in _COLLECTIONS:
        names = names[1:]
    if len(names) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value"):
        names = names[:-1]
    return "/".join(names)


def exact(value: Any) -> np.ndarray[Any, Any]:
    """Returns an array on the host, in double precision."""
    array = np.asarray(value)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def state_of(model: nnx.Module) -> tuple[Any, Any]:
    """Returns the definition and the state of a copy of an NNX model that evaluates."""
    copy = nnx.clone(model)
    copy.eval()
    return nnx.split(copy)
