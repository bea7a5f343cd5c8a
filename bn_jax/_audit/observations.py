"""What one batch shows of every batch norm of a model, in training and in evaluation.

`observe` measures the statistics of the batch in both modes, finds the calls of batch norms in the
program of evaluation, and summarizes what they take, what they give and what becomes of it.
`bn_jax.audit` judges.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bn_jax import linen as bn_linen
from bn_jax import nnx as bn_nnx
from bn_jax._core.types import BatchStats, Measured
from bn_jax._paths import batch_stats_by_path, format_path, whitening_paths
from bn_jax._program.reading import (
    WITH_DERIVATIVE,
    Equation,
    Norm,
    Program,
    as_affine_step,
    as_linear,
    evaluate,
    exact,
    find_norms,
    trace,
)
from bn_jax._recalibrate import measure, updated

# Where a bounded activation counts as flat, as a share of its steepest, and one with a single flat
# side, whose other side may rise as slowly as a leaky ReLU does.
FLAT_BOUNDED = 0.05
FLAT_ONE_SIDED = 1e-3
DEFAULT_EPSILON = 1e-5
# Within what a mean counts as moved by 1, relative to the values; in half precision it is more.
MOVED_BY_ONE = 1e-4
LINE = "lambda variables, x, train: model.apply(variables, x, train=train, mutable=['batch_stats'])"

# Symmetric; the points next to 0 are for steps that a factor has made steep.
_SLOPE_POINTS = (-30.0, -3.0, -1.5, -0.5, -0.01, 0.0, 0.01, 0.5, 1.5, 3.0, 30.0)


class Observations(NamedTuple):
    """What `observe` returns.

    Attributes:
        model: what was observed.
        sites: the calls of batch norms in the program of evaluation, in its order.
        trained: what was measured in training, by path, features flattened.
        evaluated: the same in evaluation.
        captured: what the calls in evaluation took and gave, by path.
        attributes: of the layers, by path, where they are known.
        examples: how many the batch has.
    """

    model: "Model"
    sites: tuple["Site", ...]
    trained: "dict[str, Measurement]"
    evaluated: "dict[str, Measurement]"
    captured: "dict[str, Captured]"
    attributes: "dict[str, Attributes]"
    examples: int


def observe(forward: Callable[..., Any], variables: Any, batch: Any) -> Observations:
    """Runs a model once in training and once in evaluation on one batch, and reads its program.

    Arguments and errors are those of `bn_jax.audit`.
    """
    examples = _number_of_examples(batch)
    model = _adapt(forward, variables)
    if not model.norms:
        raise ValueError(
            "variables hold no batch norm, nothing with a mean and a var in batch_stats: pass all "
            "of what init returned, {'params': params, 'batch_stats': batch_stats}, or the module."
        )
    attributes = dict(model.attributes)
    with (
        bn_linen.patching.norms_replaced(),
        nn.intercept_methods(_record(attributes)),
        _observing(object()),
    ):
        program = trace(model.evaluate, model.variables, batch)
        sites = _find_sites(program, model)
        (trained, evaluated, shifted), summaries = _run(program, model, batch, sites)
    sites = [_with_bias_checked(program, site, trained, shifted) for site in sites]
    captured = _captured(program, sites, summaries)
    return Observations(model, tuple(sites), trained, evaluated, captured, attributes, examples)


# --- models -------------------------------------------------------------------------------------

# What a forward function compiled before would not call its modules again for `_record`.
_observing = jax.make_user_context(None)


class Attributes(NamedTuple):
    """What a layer says of itself, beyond its variables."""

    epsilon: float = DEFAULT_EPSILON
    virtual_batch_size: int | None = None


class Model(NamedTuple):
    """A model of Linen, of plain functions or of NNX.

    Attributes:
        variables: a tree of arrays.
        params: of these the parameters.
        norms: the running statistics by path.
        statistics: the path of the norm for those leaves of `variables` that are its statistics.
        evaluate: ``evaluate(variables, batch)`` returns the output in evaluation.
        measure: ``measure(variables, batch, train)`` returns what is measured, by path.
        attributes: of the layers, as far as they are known without a call.
        advice: the line that recalibrates.
        whitened: the paths of whitening norms.
    """

    variables: Any
    params: Any
    norms: dict[str, BatchStats]
    statistics: dict[int, str]
    evaluate: Callable[[Any, Any], Any]
    measure: Callable[[Any, Any, bool], dict[str, Measured]]
    attributes: dict[str, Attributes]
    advice: str
    whitened: tuple[str, ...]


def _adapt(forward: Callable[..., Any], variables: Any) -> Model:
    if isinstance(variables, nnx.Module):
        return _adapt_nnx(forward, variables)
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables is a {type(variables).__name__}, expected a mapping "
            "{'params': params, 'batch_stats': batch_stats} or an nnx.Module: pass what "
            "model.init(...) returned, or of a train state "
            "{'params': state.params, 'batch_stats': state.batch_stats}."
        )
    return _adapt_functions(forward, nn.meta.unbox(dict(variables)))


def _adapt_functions(forward: Callable[..., Any], variables: dict[str, Any]) -> Model:
    statistics = {}
    for index, (keys, _) in enumerate(jax.tree.leaves_with_path(variables)):
        collection, *inside = format_path(keys).split("/")
        if collection == "batch_stats" and inside[-1] in ("mean", "var"):
            statistics[index] = "/".join(inside[:-1])

    def evaluate_model(variables: Any, batch: Any) -> Any:
        returned = forward(variables, batch, False)
        updated(returned, LINE)
        return returned[0]

    return Model(
        variables=variables,
        params=variables.get("params", {}),
        norms=_running(variables.get("batch_stats", {})),
        statistics=statistics,
        evaluate=evaluate_model,
        measure=partial(measure, forward, line=LINE),
        attributes={},
        advice=(
            "batch_stats = bn.recalibrate(lambda variables, x: model.apply(variables, x, "
            "train=False, mutable=['batch_stats']), variables, batches).batch_stats"
        ),
        whitened=tuple(whitening_paths(variables.get("batch_stats", {}))),
    )


def _adapt_nnx(forward: Callable[..., Any], model: nnx.Module) -> Model:
    copy = bn_nnx.replace_norms(nnx.clone(model))
    copy.eval()
    definition, state = nnx.split(copy)
    norms = _running(nnx.state(copy, nnx.BatchStat))
    statistics = {}
    for index, (keys, leaf) in enumerate(jax.tree.leaves_with_path(state, is_leaf=is_variable)):
        path, _, name = format_path(keys).rpartition("/")
        if isinstance(leaf, nnx.BatchStat) and path in norms and name in ("mean", "var"):
            statistics[index] = path
    attributes = {
        "/".join(map(str, keys)): _attributes_of(layer)
        for keys, layer in nnx.iter_graph(copy)
        if isinstance(layer, nnx.BatchNorm)
    }
    copy.train()
    in_training = nnx.graphdef(copy)

    def measure_in_mode(state: Any, batch: Any, train: bool) -> dict[str, Measured]:
        called = nnx.merge(in_training if train else definition, state)
        return measure(forward, called, batch, line=LINE)

    return Model(
        variables=state,
        params=nnx.state(copy, nnx.Param),
        norms=norms,
        statistics=statistics,
        evaluate=lambda state, batch: forward(nnx.merge(definition, state), batch),
        measure=measure_in_mode,
        attributes=attributes,
        advice=(
            "nnx.update(model, bn.recalibrate(lambda model, x: model(x), model, "
            "batches).batch_stats), after model.eval()"
        ),
        whitened=tuple(whitening_paths(nnx.state(copy, nnx.BatchStat))),
    )


def is_variable(node: Any) -> bool:
    """Says whether a node of a tree is a variable of NNX."""
    return isinstance(node, nnx.Variable)


def _running(batch_stats: Any) -> dict[str, BatchStats]:
    """Returns the statistics of every norm by path, as arrays."""
    return {
        path: cast(BatchStats, {name: value_of(node[name]) for name in node})
        for path, node in batch_stats_by_path(batch_stats).items()
    }


def value_of(node: Any) -> Any:
    """Returns the value of a variable of NNX, and anything else as it is."""
    return node.get_value() if isinstance(node, nnx.Variable) else node


def _attributes_of(layer: Any) -> Attributes:
    return Attributes(layer.epsilon, getattr(layer, "virtual_batch_size", None))


def _record(attributes: dict[str, Attributes]) -> Callable[..., Any]:
    """Returns an interceptor of Linen's calls that notes the attributes of batch norms."""

    def note(
        next_call: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        if isinstance(context.module, nn.BatchNorm):
            attributes["/".join(context.module.path)] = _attributes_of(context.module)
        return next_call(*args, **kwargs)

    return note


def _number_of_examples(batch: Any) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    sizes = [shape[0] for shape in shapes if shape]
    if not sizes or 0 in sizes:
        raise ValueError(
            f"batch has no examples, its arrays have the shapes {shapes}: pass one batch as in "
            "training, examples along the first axis."
        )
    return int(sizes[0])


# --- what is measured ---------------------------------------------------------------------------


class Measurement(NamedTuple):
    """What one norm measured; `bn_jax.Measured` on the host, in double precision."""

    values: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    by_running: np.ndarray
    by_batch: np.ndarray


class Site(NamedTuple):
    """A call of a batch norm in the program of evaluation.

    Attributes:
        path: of the norm in ``batch_stats``.
        steps: the indices of its equations.
        input: the value it takes.
        output: the value it returns.
        axes: the feature axes.
        params: the paths of its scale and bias.
        bias: the path of the bias directly before it, which is used before norms only, or None.
        activation: the equations after it that are a function of its output element by element,
            and what they give; None where there is no one such value, or nothing but affine steps.
        takers: the paths of what takes the output directly, or None if something does that is
            neither a linear operation by a parameter nor another batch norm.
    """

    path: str
    steps: tuple[int, ...]
    input: int
    output: int
    axes: tuple[int, ...]
    params: tuple[str, ...]
    bias: str | None
    activation: tuple[tuple[int, ...], int] | None
    takers: tuple[str, ...] | None


class Captured(NamedTuple):
    """Of the calls of one norm in evaluation, every array of features flattened.

    Attributes:
        values: how many values of each feature there are.
        means: the mean of each example, [N, F].
        squares: the mean square of each example around the mean of all of them, [N, F].
        finite_input: whether all that a feature takes is finite, [F].
        finite_output: whether all that it gives is finite, [F].
        slopes: the steepness of the activation at `_SLOPE_POINTS`, the largest of all units.
        flat_values: the share of values where it is under `FLAT_BOUNDED` of the steepest.
        flat_units: the share of units where it is under `FLAT_ONE_SIDED` of that for all values.
    """

    values: int
    means: np.ndarray
    squares: np.ndarray
    finite_input: np.ndarray
    finite_output: np.ndarray
    slopes: np.ndarray | None
    flat_values: float | None
    flat_units: float | None

    def saturated(self) -> tuple[bool, float] | None:
        """Returns whether the activation is bounded, and the share that is flat; None without.

        One that is steep on a single side of 0, as ReLU6 is, counts as not bounded: half of its
        values are flat by design.
        """
        if self.slopes is None or self.flat_values is None or self.flat_units is None:
            return None
        steep = dict(
            zip(_SLOPE_POINTS, self.slopes >= FLAT_BOUNDED * self.slopes.max(), strict=True)
        )
        is_bounded = not (steep[-30.0] or steep[30.0])
        has_two_sides = steep[-0.01] and steep[0.01] and steep[-0.5] == steep[0.5]
        if is_bounded and has_two_sides:
            return True, self.flat_values
        return False, self.flat_units


def _run(
    program: Program, model: Model, batch: Any, sites: Sequence[Site]
) -> tuple[list[dict[str, Measurement]], list[dict[str, Any]]]:
    """Runs all that is to be known in one compiled function, which computes nothing twice.

    What is measured is that of training, of evaluation, and of training with the biases of the
    sites larger by 1.
    """
    biases = {program.paths.index(site.bias) for site in sites if site.bias is not None}

    @jax.jit
    def run(variables: Any, batch: Any) -> Any:
        leaves, arguments = jax.tree.leaves(variables), jax.tree.leaves(batch)
        values = _values(program, leaves, arguments, _wanted(program, sites))
        measured = [model.measure(variables, batch, train) for train in (True, False)]
        shifted = [leaf + 1 if index in biases else leaf for index, leaf in enumerate(leaves)]
        changed = jax.tree.unflatten(jax.tree.structure(variables), shifted)
        measured.append(model.measure(changed, batch, True) if biases else {})
        return measured, [_summary(program, site, values) for site in sites]

    measured, summaries = jax.device_get(run(model.variables, batch))
    found = [
        {
            path: Measurement(
                values=flat(one.count),
                mean=flat(one.mean) + flat(one.residue),
                var=flat(one.var),
                by_running=flat(one.by_running),
                by_batch=flat(one.by_batch),
            )
            for path, one in own.items()
        }
        for own in measured
    ]
    return found, summaries


def _with_bias_checked(
    program: Program,
    site: Site,
    trained: Mapping[str, Measurement],
    shifted: Mapping[str, Measurement],
) -> Site:
    """Forgets a bias that does more in training than to move the mean, as before dropout."""
    if site.bias is None or site.path not in trained or site.path not in shifted:
        return site._replace(bias=None)
    before, after = trained[site.path], shifted[site.path]
    dtype = jnp.promote_types(program.avals[site.input].dtype, jnp.bfloat16)
    spread = np.sqrt(before.var)
    # Sums of rounded values are rounded by the size of these.
    tolerance = max(MOVED_BY_ONE, 4 * float(jnp.finfo(dtype).eps)) * (
        1 + np.abs(before.mean) + spread
    )
    moved = np.abs(np.abs(after.mean - before.mean) - 1) <= tolerance
    same = np.abs(np.sqrt(after.var) - spread) <= tolerance
    is_alone = bool(np.all((moved & same) | (before.values == 0)))
    return site if is_alone else site._replace(bias=None)


def flat(values: Any) -> np.ndarray:
    """Returns an array of features as a vector in double precision."""
    return exact(values).reshape(-1)


def _captured(
    program: Program, sites: Sequence[Site], summaries: Sequence[dict[str, Any]]
) -> dict[str, Captured]:
    calls: dict[str, list[Captured]] = {}
    for site, summary in zip(sites, summaries, strict=True):
        values = math.prod(program.avals[site.input].shape) // summary["means"].shape[1]
        doubled: dict[str, Any] = {name: exact(summary[name]) for name in ("means", "squares")}
        calls.setdefault(site.path, []).append(Captured(values, **{**summary, **doubled}))
    return {path: _together(own) for path, own in calls.items()}


def _together(calls: Sequence[Captured]) -> Captured:
    """Takes several calls for one: the examples of all of them, and the worst activation."""
    if len(calls) == 1:
        return calls[0]
    means = np.concatenate([one.means for one in calls])
    active = [one for one in calls if one.flat_values is not None]
    worst = max(active, key=lambda one: cast(float, one.flat_values), default=calls[0])
    return worst._replace(
        values=sum(one.values for one in calls),
        means=means,
        squares=np.concatenate([_around(one, means.mean(0)) for one in calls]),
        finite_input=np.all([one.finite_input for one in calls], axis=0),
        finite_output=np.all([one.finite_output for one in calls], axis=0),
    )


def _around(call: Captured, centre: np.ndarray) -> np.ndarray:
    """Returns the mean squares around another centre than the mean of the call."""
    own = call.means.mean(0)
    shift = own - centre
    crossed = 2 * np.real((call.means - own) * np.conj(shift))
    moved: np.ndarray = call.squares + crossed + np.abs(shift) ** 2
    return moved


def _wanted(program: Program, sites: Sequence[Site]) -> set[int]:
    wanted = {value for site in sites for value in (site.input, site.output)}
    for site in sites:
        for index in site.activation[0] if site.activation else ():
            wanted.update(one for one in program.equations[index].inputs if program.is_known(one))
    return wanted


def _values(
    program: Program, leaves: Sequence[Any], arguments: Sequence[Any], wanted: set[int]
) -> dict[int, Any]:
    """Runs the part of a program that some of its values need."""
    needed: set[int] = set()
    ahead = list(wanted)
    while ahead:
        index = program.producers.get(ahead.pop())
        if index is not None and index not in needed:
            needed.add(index)
            ahead.extend(program.equations[index].inputs)
    values = dict(program.constants)
    values.update(zip(program.leaves, leaves, strict=True))
    values.update(zip(program.arguments, arguments, strict=True))
    for index in sorted(needed):
        equation = program.equations[index]
        outputs = evaluate(equation, [values[one] for one in equation.inputs])
        values.update(zip(equation.outputs, outputs, strict=True))
    return values


def _summary(program: Program, site: Site, values: dict[int, Any]) -> dict[str, Any]:
    """Returns the fields of `Captured` but the number of values."""
    x = _as_examples(values[site.input], site.axes)
    y = _as_examples(values[site.output], site.axes)
    means = jnp.mean(x, axis=1)
    centre = jnp.mean(means, axis=0).reshape(1, 1, -1)
    squares = jnp.mean(jnp.abs(x - centre) ** 2, axis=1)
    activation = {"slopes": None, "flat_values": None, "flat_units": None}
    if site.activation is not None:
        activation = _flatness(program, site, values)
    return {
        "means": means,
        "squares": squares,
        "finite_input": jnp.all(jnp.isfinite(x), axis=(0, 1)),
        "finite_output": jnp.all(jnp.isfinite(y), axis=(0, 1)),
        **activation,
    }


def _as_examples(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns an array as examples, their positions and their features, in at least float32."""
    others = tuple(axis for axis in range(x.ndim) if axis not in axes)
    moved = jnp.transpose(x, (*others, *axes))
    examples = x.shape[others[0]] if others else 1
    features = math.prod(x.shape[axis] for axis in axes)
    return moved.reshape(examples, -1, features).astype(jnp.promote_types(x.dtype, jnp.float32))


def _flatness(program: Program, site: Site, values: dict[int, Any]) -> dict[str, Any]:
    """Differentiates the activation after a norm."""
    assert site.activation is not None
    indices, end = site.activation

    def activate(y: jax.Array) -> Any:
        own = {**values, site.output: y}
        for index in indices:
            equation = program.equations[index]
            outputs = evaluate(equation, [own[one] for one in equation.inputs])
            own.update(zip(equation.outputs, outputs, strict=True))
        return own[end]

    def steepness(y: jax.Array) -> jax.Array:
        # In reverse, which activations with a derivative of their own may have alone.
        out, pull = jax.vjp(activate, y)
        return jnp.abs(pull(jnp.ones_like(out))[0]).astype(jnp.float32)

    y = values[site.output]
    points = jnp.asarray(_SLOPE_POINTS, y.dtype)
    slopes = jax.lax.map(lambda point: jnp.max(steepness(jnp.full_like(y, point))), points)
    relative = _as_examples(steepness(y), site.axes) / jnp.max(slopes)
    return {
        "slopes": slopes,
        "flat_values": jnp.mean(relative < FLAT_BOUNDED),
        "flat_units": jnp.mean(jnp.all(relative < FLAT_ONE_SIDED, axis=(0, 1))),
    }


# --- where the norms are in the program ---------------------------------------------------------

_COPIES = {"convert_element_type", "copy"}
_ELEMENTWISE = {
    *("abs", "add", "add_any", "and", "asinh", "atan", "cbrt", "ceil", "clamp", "copy", "cos"),
    *("convert_element_type", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2"),
    *("expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic"),
    *("lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rsqrt", "select_n", "sign"),
    *("sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor"),
}


def _find_sites(program: Program, model: Model) -> list[Site]:
    """Returns the calls of batch norms that are found in the program, in its order."""
    found = []
    for norm in find_norms(program):
        steps = _own_steps(program, norm, model.statistics)
        if steps:
            found.append((steps, _norm_of(program, steps, model.statistics)))
    starts = {steps[0]: path for steps, path in found}
    fed: dict[str, set[int]] = {}
    for steps, path in found:
        own = _fed_directly(program, program.equations[steps[-1]].outputs[0])
        fed[path] = fed.get(path, set()) | own
    taken = {index for steps, _ in found for index in steps}
    sites = []
    for steps, path in found:
        axes = sorted(set().union(*(_operand_axes(program, index) for index in steps)))
        first = as_affine_step(program, program.equations[steps[0]])
        assert first is not None
        features = math.prod(program.avals[first.input].shape[axis] for axis in axes)
        if features != np.size(model.norms[path]["mean"]):
            continue
        output = program.equations[steps[-1]].outputs[0]
        sites.append(
            Site(
                path=path,
                steps=steps,
                input=first.input,
                output=output,
                axes=tuple(axes),
                params=_params_of(program, steps, model.statistics),
                bias=None,
                activation=_activation_after(program, output, taken),
                takers=_takers(program, output, starts, fed[path]),
            )
        )
    return _with_biases(program, sites, taken)


def _with_biases(program: Program, sites: Sequence[Site], taken: set[int]) -> list[Site]:
    """Notes the biases that are added directly before norms, and used nowhere else."""
    added = [_bias_before(program, site.input, site.axes, taken) for site in sites]
    indices = {one[0] for one in added if one is not None}
    return [
        site._replace(bias=program.paths[one[1]])
        if one is not None and _uses_of(program, one[1]) <= indices
        else site
        for site, one in zip(sites, added, strict=True)
    ]


def _uses_of(program: Program, leaf: int) -> set[int]:
    """Returns the equations in which a leaf of the variables meets data; -1 for an output."""
    uses = {
        index
        for index, equation in enumerate(program.equations)
        if any(leaf in (program.origins[value] or ()) for value in equation.inputs)
        and not all(program.is_known(value) for value in equation.outputs)
    }
    is_returned = any(leaf in (program.origins[value] or ()) for value in program.outputs)
    return uses | {-1} if is_returned else uses


def _fed_directly(program: Program, value: int) -> set[int]:
    """Returns the equations that take a value, in whatever dtype."""
    fed = set(program.consumers[value])
    for index in program.consumers[value]:
        equation = program.equations[index]
        if equation.name in _COPIES:
            fed |= _fed_directly(program, equation.outputs[0])
    return fed


def _own_steps(program: Program, norm: Norm, statistics: Mapping[int, str]) -> tuple[int, ...]:
    """Returns the steps from the first that takes a running statistic."""
    for number, index in enumerate(norm.steps):
        if _statistics_in(program, index, statistics):
            return norm.steps[number:]
    return ()


def _statistics_in(program: Program, index: int, statistics: Mapping[int, str]) -> list[str]:
    origins = [program.origins[value] or () for value in program.equations[index].inputs]
    return [statistics[leaf] for own in origins for leaf in sorted(own) if leaf in statistics]


def _norm_of(program: Program, steps: Sequence[int], statistics: Mapping[int, str]) -> str:
    return next(path for index in steps for path in _statistics_in(program, index, statistics))


def _params_of(
    program: Program, steps: Sequence[int], statistics: Mapping[int, str]
) -> tuple[str, ...]:
    leaves: set[int] = set()
    for index in steps:
        leaves.update(*(program.origins[value] or () for value in program.equations[index].inputs))
    return tuple(program.paths[leaf] for leaf in sorted(leaves - set(statistics)))


def _operand_axes(program: Program, index: int) -> set[int]:
    step = as_affine_step(program, program.equations[index])
    if step is None or step.operand is None or not program.origins[step.operand]:
        return set()
    return _varying_axes(program, step.operand)


def _varying_axes(program: Program, value: int) -> set[int]:
    """Returns the axes along which a known value is more than one repeated."""
    producer = program.producer(value)
    if producer is not None and producer.name == "broadcast_in_dim":
        places = producer.options["broadcast_dimensions"]
        return {places[axis] for axis in _varying_axes(program, producer.inputs[0])}
    return {axis for axis, size in enumerate(program.avals[value].shape) if size > 1}


def _bias_before(
    program: Program, value: int, axes: Sequence[int], taken: set[int]
) -> tuple[int, int] | None:
    """Returns the equation and the leaf that is added directly before a norm.

    It varies with features alone.
    """
    features: set[int] | None = set(axes)
    while features is not None and program.uses[value] == 1 and value in program.producers:
        index = program.producers[value]
        equation = program.equations[index]
        step = as_affine_step(program, equation)
        if step is None or step.kind == "same":
            features = _axes_before(program, equation, features)
            value = equation.inputs[0]
            continue
        if step.operand is None or step.kind not in ("add", "sub") or index in taken:
            return None
        leaves = tuple(program.origins[step.operand] or ())
        is_bias = len(leaves) == 1 and _varying_axes(program, step.operand) <= features
        return (index, leaves[0]) if is_bias else None
    return None


def _axes_before(program: Program, equation: Equation, axes: set[int]) -> set[int] | None:
    """Returns where these axes were before an equation that moves them; None for any other."""
    before, after = (program.avals[ends[0]].shape for ends in (equation.inputs, equation.outputs))
    if equation.name in _COPIES:
        return axes
    if equation.name == "transpose":
        return {equation.options["permutation"][axis] for axis in axes}
    if equation.name == "reshape" and axes <= {len(after) - 1} and before[-1:] == after[-1:]:
        return {len(before) - 1} if axes else set()
    return None


def _takers(
    program: Program, value: int, starts: Mapping[int, str], fed: set[int]
) -> tuple[str, ...] | None:
    """Returns the kernels and norms that take a value, if nothing else does.

    A kernel counts if all of its uses are among those that are `fed` by the norm.
    """
    if program.uses[value] != len(program.consumers[value]):
        return None
    takers: list[str] = []
    for index in program.consumers[value]:
        equation = program.equations[index]
        known = [leaf for one in equation.inputs for leaf in program.origins[one] or ()]
        is_own = all(_uses_of(program, leaf) <= fed for leaf in known)
        if index in starts:
            takers.append(starts[index])
        elif known and is_own and as_linear(program, index) is not None:
            takers.extend(program.paths[leaf] for leaf in sorted(known))
        elif equation.name in _COPIES:
            further = _takers(program, equation.outputs[0], starts, fed)
            if further is None:
                return None
            takers.extend(further)
        else:
            return None
    return tuple(takers) or None


def _activation_after(
    program: Program, start: int, taken: set[int]
) -> tuple[tuple[int, ...], int] | None:
    """Finds the one value that is an elementwise, not affine function of another."""
    shape = program.avals[start].shape
    inside, indices = {start}, []
    for index in range(program.producers[start] + 1, len(program.equations)):
        equation = program.equations[index]
        unknown = {one for one in equation.inputs if not program.is_known(one)}
        if not unknown or not unknown <= inside or index in taken:
            continue
        if _is_elementwise(equation) and program.avals[equation.outputs[0]].shape == shape:
            inside.add(equation.outputs[0])
            indices.append(index)
    used_inside = [one for index in indices for one in program.equations[index].inputs]
    ends = [one for one in inside if program.uses[one] > used_inside.count(one)]
    if len(ends) != 1 or ends[0] == start:
        return None
    affine = all(as_affine_step(program, program.equations[index]) for index in indices)
    dtypes = [program.avals[value].dtype for value in (start, ends[0])]
    is_real = all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
    return (tuple(indices), ends[0]) if is_real and not affine else None


def _is_elementwise(equation: Equation) -> bool:
    return len(equation.outputs) == 1 and _maps_elements(equation.name, equation.options)


def _maps_elements(name: str, options: Mapping[str, Any]) -> bool:
    if name in _ELEMENTWISE:
        return True
    if name not in WITH_DERIVATIVE | {"jit", "pjit", "closed_call"}:
        return False
    inner = [options[key] for key in ("call_jaxpr", "fun_jaxpr", "jaxpr") if key in options]
    return bool(inner) and all(
        _maps_elements(eqn.primitive.name, eqn.params)
        or (eqn.primitive.name == "broadcast_in_dim" and not eqn.invars[0].aval.shape)
        for eqn in inner[0].eqns
    )
