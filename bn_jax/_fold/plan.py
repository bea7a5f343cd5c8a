"""The folded program: its steps, its parameters by path, and how each parameter is computed."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from bn_jax._fold.decisions import Decisions, decide
from bn_jax._fold.features import placed
from bn_jax._fold.kernels import kernel_root, path_of, widest_dtype
from bn_jax._fold.parameters import KernelAndBias, ScaleAndOffset, Source, StoredValue
from bn_jax._fold.report import FoldedNorm, FoldReport
from bn_jax._program import Equation, Program, Step, Value, steps_to
from bn_jax._program.primitives import LAYOUT, SHAPES


class Key(NamedTuple):
    """The value of a parameter that is in no program before it is folded.

    The owner of a kernel or its bias is the index of the linear layer's equation, that of a scale
    or an offset the number of the norm.
    """

    owner: int
    part: Literal["kernel", "bias", "scale", "offset"]


class Entry(NamedTuple):
    """A parameter of the folded program: its path in the tree, its shape and its dtype."""

    path: str
    shape: tuple[int, ...]
    dtype: Any


class Group(NamedTuple):
    """Parameters that are computed together.

    Attributes:
        source: how they are computed.
        entries: the parameters in the order of what `source` returns: by number those that are
            values of the program, by `Key` others.
    """

    source: Source
    entries: Mapping[Value, Entry]


class FoldedStep(NamedTuple):
    """A step that takes the place of equations of the program.

    Attributes:
        inputs: the values it takes.
        outputs: the value it computes.
        function: computes the output from the inputs.
        group: the parameters among its inputs; None if there are none.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value]
    function: Callable[..., Any]
    group: Group | None = None

    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """Computes the output from the values of the inputs."""
        return [self.function(*values)]


class Signature(NamedTuple):
    """What must be the same for all arguments of a folded model.

    These are the path, shape and dtype of each parameter, how it is computed, and the report.
    """

    parameters: tuple[tuple[str, Hashable], ...]
    report: FoldReport


class Plan(NamedTuple):
    """The folded program.

    Attributes:
        program: as it was traced.
        steps: of the folded program, in order.
        groups: the parameters.
        report: what became of each norm.
    """

    program: Program
    steps: tuple[Step, ...]
    groups: tuple[Group, ...]
    report: FoldReport

    @property
    def entries(self) -> dict[Value, Entry]:
        """All parameters, by their values."""
        return {value: entry for group in self.groups for value, entry in group.entries.items()}

    def signature(self) -> Signature:
        """Returns what must be the same for all arguments."""
        seen: dict[int, str] = {}
        parameters = []
        for group in self.groups:
            recipe = group.source.recipe(self.program, seen)
            for entry in group.entries.values():
                parameters.append((entry.path, (entry.shape, entry.dtype, recipe)))
        return Signature(tuple(parameters), self.report)


def make_plan(program: Program) -> Plan:
    """Returns the folded program of a traced forward function."""
    decisions = decide(program)
    steps = _live_steps(program, decisions)
    groups = _name_parameters(program, steps)
    return Plan(program, steps, groups, _report(decisions, groups))


# --- steps --------------------------------------------------------------------------------------


def _live_steps(program: Program, decisions: Decisions) -> tuple[Step, ...]:
    """Returns the steps that outputs depend on. Values that are computed when folding have none."""
    replaced: dict[int, Step] = {
        index: _layer_step(program, decisions, index) for index in decisions.chains
    }
    for number in decisions.steps:
        first = decisions.norms[number].steps[0]
        replaced[first] = _step_of_norm(program, decisions, number)
    given = {
        *program.constants,
        *program.arguments,
        *(
            value
            for equation in program.equations
            for value in equation.outputs
            if program.is_known(value) and not _stays(program, equation)
        ),
    }
    printing = [index for index, equation in enumerate(program.equations) if equation.has_effects]
    return steps_to(program, program.outputs, given, replaced=replaced, always=printing)


def _stays(program: Program, equation: Equation) -> bool:
    """Returns whether a known equation stays in the folded program.

    Equations of constants do, since they may depend on the batch size. So do changes of layout:
    parameters have the shapes and dtypes of the variables that they come from.
    """
    return equation.name in LAYOUT or not program.origins[equation.outputs[0]]


def _layer_step(program: Program, decisions: Decisions, index: int) -> FoldedStep:
    """Returns a linear layer with norms in it, its bias, and the changes of shape after it."""
    linear, chain = decisions.linears[index], decisions.chains[index]
    equation = program.equations[index]
    _, layout = kernel_root(program, linear.kernel)
    passed = [program.equations[number] for number in chain.passed]
    reshapes = [reshape for reshape in passed if reshape.name in SHAPES]
    # The bias is added in the widest dtype of what the layer replaces.
    wide = widest_dtype(program, (index, *chain.passed))
    dtype = program.avals[chain.output].dtype

    def apply(data: Any, kernel: Any, bias: Any = None) -> Any:
        for rearrangement in layout:
            (kernel,) = rearrangement.run([kernel])
        operands = {linear.data: data, linear.kernel: kernel}
        (y,) = equation.run([operands[value] for value in equation.inputs])
        if bias is not None:
            y = y.astype(wide) + placed(bias.astype(wide), linear.outputs, y.ndim)
        y = y.astype(dtype)
        for reshape in reshapes:
            (y,) = reshape.run([y])
        return y

    source = KernelAndBias(linear, chain, decisions.before.get(index))
    group = Group(source, _entries_of_layer(program, source, wide))
    return FoldedStep((linear.data, *group.entries), (chain.output,), apply, group)


def _entries_of_layer(program: Program, source: KernelAndBias, wide: Any) -> dict[Value, Entry]:
    linear = source.linear
    root, _ = kernel_root(program, linear.kernel)
    aval = program.avals[root]
    path = path_of(program, root, "kernel")
    entries: dict[Value, Entry] = {
        Key(linear.equation, "kernel"): Entry(path, aval.shape, aval.dtype)
    }
    if source.has_bias:
        *parents, name = path.split("/")
        bias_path = "/".join([*parents, "bias" if name == "kernel" else f"{name}_bias"])
        kernel_shape = program.avals[linear.kernel].shape
        shape = tuple(kernel_shape[dimension] for dimension in linear.kernel_outputs)
        entries[Key(linear.equation, "bias")] = Entry(bias_path, shape, wide)
    return entries


def _step_of_norm(program: Program, decisions: Decisions, number: int) -> FoldedStep:
    """Returns what stands in the place of a norm that is in no layer before it.

    Where the norm goes into the layers after it, that is a cast. Otherwise it is one multiplication
    and one addition, in the widest dtype of the norm.
    """
    norm, steps = decisions.norms[number], decisions.steps[number]
    wide = widest_dtype(program, norm.steps)
    dtype = program.avals[norm.output].dtype
    by_feature = steps[0].features.shape

    def cast(x: Any) -> Any:
        return x.astype(dtype)

    def multiply_and_add(x: Any, scale: Any, offset: Any) -> Any:
        a, b = (array.astype(wide).reshape(by_feature) for array in (scale, offset))
        return (x.astype(wide) * a + b).astype(dtype)

    if number in decisions.homes:
        return FoldedStep((norm.input,), (norm.output,), cast)
    shape = tuple(size for size in by_feature if size != 1) or (1,)
    prefix = f"{norm.path}/" if norm.path else ""
    entries: dict[Value, Entry] = {
        Key(number, "scale"): Entry(f"{prefix}scale", shape, wide),
        Key(number, "offset"): Entry(f"{prefix}bias", shape, wide),
    }
    group = Group(ScaleAndOffset(steps, wide), entries)
    return FoldedStep((norm.input, *entries), (norm.output,), multiply_and_add, group)


# --- parameters ---------------------------------------------------------------------------------


def _name_parameters(program: Program, steps: Sequence[Step]) -> tuple[Group, ...]:
    """Names the parameters that the steps take; variables that are left alone choose first."""
    computed = {value for step in steps for value in step.outputs}
    computed.update(program.constants, program.arguments)
    used = {*program.outputs, *(value for step in steps for value in step.inputs)} - computed
    stored = [value for value in used if isinstance(value, int)]
    groups = []
    for value in sorted(stored, key=lambda value: (value not in program.leaves, value)):
        aval = program.avals[value]
        entry = Entry(path_of(program, value), aval.shape, aval.dtype)
        groups.append(Group(StoredValue(value), {value: entry}))
    groups += [step.group for step in steps if isinstance(step, FoldedStep) and step.group]
    taken: list[str] = []
    named = []
    for group in groups:
        paths = _free_paths([entry.path for entry in group.entries.values()], taken)
        taken += paths
        entries = {
            value: entry._replace(path=path)
            for (value, entry), path in zip(group.entries.items(), paths, strict=True)
        }
        named.append(Group(group.source, entries))
    return tuple(named)


def _free_paths(paths: Sequence[str], taken: Sequence[str]) -> Sequence[str]:
    """Returns paths that are free: these, or these with the same number in all of them.

    A path is not free if it is taken, or one inside or around it is. The number goes after the
    path; where the path is inside one that is taken, after its first name.
    """

    def is_inside(path: str, other: str) -> bool:
        return path.startswith(f"{other}/")

    after_first = any(is_inside(path, other) for path in paths for other in taken)
    free, number = paths, 0
    while any(
        path == other or is_inside(path, other) or is_inside(other, path)
        for path in free
        for other in taken
    ):
        number += 1
        free = [_numbered(path, number, first=after_first) for path in paths]
    return free


def _numbered(path: str, number: int, *, first: bool) -> str:
    if not first:
        return f"{path}_{number}"
    name, *rest = path.split("/")
    return "/".join([f"{name}_{number}", *rest])


def _report(decisions: Decisions, groups: Sequence[Group]) -> FoldReport:
    paths = {value: entry.path for group in groups for value, entry in group.entries.items()}
    rows = []
    for number, norm in enumerate(decisions.norms):
        into, reason = None, decisions.reasons.get(number)
        if reason is None:
            keys = [Key(home, "kernel") for home in decisions.homes[number]]
            into = ", ".join(paths[key] for key in keys if key in paths) or None
            reason = None if into else "No output depends on it."
        rows.append(FoldedNorm(norm.path, into, reason, norm.kind))
    return FoldReport(rows)
