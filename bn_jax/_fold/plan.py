"""The folded program: its steps, its parameters by path, and how each parameter is computed."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from bn_jax._fold.decisions import Decisions, decide
from bn_jax._fold.features import Array
from bn_jax._fold.kernels import kernel_root, path_of, widest_dtype
from bn_jax._fold.parameters import LayerParameter, NormParameter, Source, StoredValue
from bn_jax._fold.report import FoldedNorm, FoldReport
from bn_jax._program import Equation, Linear, Norm, Program, Step, Value, steps_to
from bn_jax._program.primitives import LAYOUT, SHAPES


class Key(NamedTuple):
    """The value of a parameter that is in no program before it is folded.

    Attributes:
        owner: of a kernel or its bias the index of the equation of the linear layer; of a scale or
            an offset the number of the norm.
        part: which parameter it is.
    """

    owner: int
    part: Literal["kernel", "bias", "scale", "offset"]


class Entry(NamedTuple):
    """A parameter of the folded program.

    Attributes:
        path: where it is in the tree of parameters.
        shape: of the array.
        dtype: of the array.
        source: how it is computed.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    source: Source


class Signature(NamedTuple):
    """What must be the same for all arguments of a folded model.

    Attributes:
        parameters: path, shape and dtype of each, and how it is computed.
        report: what became of each norm.
    """

    parameters: tuple[tuple[str, Hashable], ...]
    report: FoldReport


class Plan(NamedTuple):
    """The folded program.

    Attributes:
        program: as it was traced.
        steps: of the folded program, in order.
        entries: the parameters: by number those that are values of the program, by `Key` others.
        report: what became of each norm.
    """

    program: Program
    steps: tuple[Step, ...]
    entries: Mapping[Value, Entry]
    report: FoldReport

    def signature(self) -> Signature:
        """Returns what must be the same for all arguments."""
        seen: dict[int, str] = {}
        parameters = []
        for entry in self.entries.values():
            recipe = entry.source.recipe(self.program, seen)
            parameters.append((entry.path, (entry.shape, entry.dtype, recipe)))
        return Signature(tuple(parameters), self.report)


def make_plan(program: Program) -> Plan:
    """Returns the folded program of a traced forward function."""
    decisions = decide(program)
    steps = _live_steps(program, decisions)
    entries = _name_entries(program, decisions, steps)
    return Plan(program, steps, entries, _report(decisions, entries))


# --- steps --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerStep:
    """A linear layer with norms in it, its bias, and the changes of shape after it."""

    linear: Linear
    equation: Equation
    layout: tuple[Equation, ...]
    reshapes: tuple[Equation, ...]
    has_bias: bool
    wide: np.dtype[Any]
    dtype: np.dtype[Any]
    output: int

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The data, the kernel as it is stored, and the bias if there is one."""
        index = self.linear.equation
        if self.has_bias:
            return self.linear.data, Key(index, "kernel"), Key(index, "bias")
        return self.linear.data, Key(index, "kernel")

    @property
    def outputs(self) -> tuple[Value, ...]:
        """The output of the last equation that the layer replaces."""
        return (self.output,)

    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """Applies the layer, and adds the bias in the widest dtype of what it replaces."""
        data, kernel, *biases = values
        for equation in self.layout:
            (kernel,) = equation.run([kernel])
        operands = {self.linear.data: data, self.linear.kernel: kernel}
        (y,) = self.equation.run([operands[value] for value in self.equation.inputs])
        for bias in biases:
            shape = [1] * y.ndim
            for dimension in self.linear.outputs:
                shape[dimension] = y.shape[dimension]
            y = y.astype(self.wide) + bias.astype(self.wide).reshape(shape)
        y = y.astype(self.dtype)
        for equation in self.reshapes:
            (y,) = equation.run([y])
        return [y]


@dataclass(frozen=True)
class NormStep:
    """A norm that is left as one multiplication and one addition."""

    number: int
    norm: Norm
    features: Array
    wide: np.dtype[Any]
    dtype: np.dtype[Any]

    @property
    def inputs(self) -> tuple[Value, ...]:
        """What the norm takes, its scale and its offset."""
        return self.norm.input, Key(self.number, "scale"), Key(self.number, "offset")

    @property
    def outputs(self) -> tuple[Value, ...]:
        """What the norm returned."""
        return (self.norm.output,)

    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """Multiplies and adds in the widest dtype of the norm."""
        x, scale, offset = values
        a, b = (array.astype(self.wide).reshape(self.features.shape) for array in (scale, offset))
        return [(x.astype(self.wide) * a + b).astype(self.dtype)]


@dataclass(frozen=True)
class PassingStep:
    """What stands in the place of a norm that went into the layers after it: a cast."""

    norm: Norm
    dtype: np.dtype[Any]

    @property
    def inputs(self) -> tuple[Value, ...]:
        """What the norm took."""
        return (self.norm.input,)

    @property
    def outputs(self) -> tuple[Value, ...]:
        """What the norm returned."""
        return (self.norm.output,)

    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """Casts."""
        return [values[0].astype(self.dtype)]


def _live_steps(program: Program, decisions: Decisions) -> tuple[Step, ...]:
    """Returns the steps that outputs depend on. Values that are computed when folding have none."""
    replaced: dict[int, Step] = {
        index: _layer_step(program, decisions, index) for index in decisions.chains
    }
    for number, features in decisions.features.items():
        norm = decisions.norms[number]
        dtype = program.avals[norm.output].dtype
        if number in decisions.homes:
            replaced[norm.steps[0]] = PassingStep(norm, dtype)
        else:
            wide = widest_dtype(program, norm.steps)
            replaced[norm.steps[0]] = NormStep(number, norm, features, wide, dtype)
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


def _layer_step(program: Program, decisions: Decisions, index: int) -> LayerStep:
    linear, chain = decisions.linears[index], decisions.chains[index]
    _, layout = kernel_root(program, linear.kernel)
    passed = [program.equations[number] for number in chain.passed]
    adds = any(step.kind in ("add", "sub", "from") for step in chain.steps)
    return LayerStep(
        linear=linear,
        equation=program.equations[index],
        layout=layout,
        reshapes=tuple(equation for equation in passed if equation.name in SHAPES),
        has_bias=adds or index in decisions.before,
        wide=widest_dtype(program, (index, *chain.passed)),
        dtype=program.avals[chain.output].dtype,
        output=chain.output,
    )


# --- parameters ---------------------------------------------------------------------------------


def _name_entries(
    program: Program, decisions: Decisions, steps: Sequence[Step]
) -> dict[Value, Entry]:
    """Names the parameters that the steps take; variables that are left alone choose first."""
    computed = {value for step in steps for value in step.outputs}
    computed.update(program.constants, program.arguments)
    used = {*program.outputs, *(value for step in steps for value in step.inputs)} - computed
    stored = [value for value in used if isinstance(value, int)]
    entries: dict[Value, Entry] = {}
    for value in sorted(stored, key=lambda value: (value not in program.leaves, value)):
        aval = program.avals[value]
        entry = Entry(path_of(program, value), aval.shape, aval.dtype, StoredValue(value))
        _add_entries(entries, {value: entry})
    for step in steps:
        if isinstance(step, LayerStep):
            _add_entries(entries, _entries_of_layer(program, decisions, step))
        elif isinstance(step, NormStep):
            _add_entries(entries, _entries_of_norm(step))
    return entries


def _entries_of_norm(step: NormStep) -> dict[Value, Entry]:
    shape = tuple(size for size in step.features.shape if size != 1) or (1,)
    prefix = f"{step.norm.path}/" if step.norm.path else ""
    scale = NormParameter(step.norm, step.features, "scale")
    offset = NormParameter(step.norm, step.features, "offset")
    return {
        Key(step.number, "scale"): Entry(f"{prefix}scale", shape, step.wide, scale),
        Key(step.number, "offset"): Entry(f"{prefix}bias", shape, step.wide, offset),
    }


def _entries_of_layer(
    program: Program, decisions: Decisions, step: LayerStep
) -> dict[Value, Entry]:
    linear, index = step.linear, step.linear.equation
    chain, before = decisions.chains[index], decisions.before.get(index)
    root, _ = kernel_root(program, linear.kernel)
    path = path_of(program, root, "kernel")
    aval = program.avals[root]
    kernel = LayerParameter(linear, chain, before, "kernel")
    entries: dict[Value, Entry] = {
        Key(index, "kernel"): Entry(path, aval.shape, aval.dtype, kernel)
    }
    if step.has_bias:
        *parents, name = path.split("/")
        bias_path = "/".join([*parents, "bias" if name == "kernel" else f"{name}_bias"])
        kernel_shape = program.avals[linear.kernel].shape
        shape = tuple(kernel_shape[dimension] for dimension in linear.kernel_outputs)
        bias = LayerParameter(linear, chain, before, "bias")
        entries[Key(index, "bias")] = Entry(bias_path, shape, step.wide, bias)
    return entries


def _add_entries(entries: dict[Value, Entry], new: Mapping[Value, Entry]) -> None:
    """Adds entries under paths that are free. All of the new ones get the same number.

    A path is not free if an entry has the same path, or one inside or around it. The number goes
    after the path; where the path is inside that of an entry, after its first name.
    """
    taken = [f"{entry.path}/" for entry in entries.values()]
    paths = [entry.path for entry in new.values()]
    is_inside = any(path.startswith(prefix) for path in paths for prefix in taken)
    renamed, number = paths, 0
    while any(
        f"{path}/".startswith(prefix) or prefix.startswith(f"{path}/")
        for path in renamed
        for prefix in taken
    ):
        number += 1
        renamed = [_numbered(path, number, first=is_inside) for path in paths]
    for (key, entry), path in zip(new.items(), renamed, strict=True):
        entries[key] = entry._replace(path=path)


def _numbered(path: str, number: int, *, first: bool) -> str:
    if not first:
        return f"{path}_{number}"
    name, *rest = path.split("/")
    return "/".join([f"{name}_{number}", *rest])


def _report(decisions: Decisions, entries: Mapping[Value, Entry]) -> FoldReport:
    rows = []
    for number, norm in enumerate(decisions.norms):
        into, reason = None, decisions.reasons.get(number)
        if reason is None:
            keys = [Key(home, "kernel") for home in decisions.homes[number]]
            into = ", ".join(entries[key].path for key in keys if key in entries) or None
            reason = None if into else "No output depends on it."
        rows.append(FoldedNorm(norm.path, into, reason))
    return FoldReport(rows)
