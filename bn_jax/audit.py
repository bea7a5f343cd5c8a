"""What is wrong with the batch norms of a model, found by running it on one batch.

`audit` runs the model once in training and once in evaluation, reads its program, and returns a row
for each batch norm and what is to be mended, with the numbers and the line to write.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bn_jax import linen as bn_linen
from bn_jax import nnx as bn_nnx
from bn_jax.batch_norm import BatchStats, Measured, start_measuring
from bn_jax.optim import is_running, norm_params_mask, path_of
from bn_jax.programs import (
    Equation,
    Norm,
    Program,
    as_affine_step,
    evaluate,
    find_norms,
    trace,
)

Kind: TypeAlias = Literal[
    "never updated",
    "stale",
    "differs in evaluation",
    "normalizes by the batch",
    "not finite",
    "dead features",
    "bias without effect",
    "weight decay",
    "small batch",
    "saturated",
    "redundant scale",
]

# Standard errors beyond what the largest of F normal errors is expected to be, `sqrt(2 log F)`: of
# a thousand healthy layers, fewer than one has a feature that chance alone puts so far.
FAR_ERRORS = 4.0
# A shift of half a standard deviation, or a scale off by the root of two, changes what an
# activation passes on; less than that a model does not notice (momentum 0.9 leaves as much).
FAR_MEAN = 0.5
FAR_VAR = 2.0
# Of a feature whose distribution is not known; six is that of a double exponential one.
ASSUMED_KURTOSIS = 6.0
# The estimated variance is within a factor of two three times out of four; the values of eight
# independent examples that are normal. Batch norm's loss below that many is in Wu & He 2018.
LARGEST_VAR_ERROR = 0.5
# Weight decay takes a scale that no gradient holds through this within a few thousand steps, and
# training alone takes none there.
DEAD_SCALE = 1e-3
# Where a bounded activation counts as flat, as a share of its steepest, and one with a single flat
# side, whose other side may rise as slowly as a leaky ReLU does.
FLAT_BOUNDED = 0.05
FLAT_ONE_SIDED = 1e-3
# More than half of the values of a bounded activation; of the others more than a tenth of units
# that pass no gradient for any example, for a few of them are found in any network that is trained.
MOST_SATURATED_VALUES = 0.5
MOST_SATURATED_UNITS = 0.1
# What the running statistics have in common with their initial values, before it is told.
LEAST_INITIAL_SHARE = 0.02
INITIAL_SHARE_FIT = 0.02
DEFAULT_EPSILON = 1e-5

_SLOPE_POINTS = (-30.0, -3.0, -1.5, -0.5, 0.0, 0.5, 1.5, 3.0, 30.0)


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
        kind: "never updated", "stale", "differs in evaluation", "normalizes by the batch", "not
            finite", "dead features", "bias without effect", "weight decay", "small batch",
            "saturated" or "redundant scale".
        path: of the norm in ``batch_stats``, joined by "/", "" for a norm at the top level; or of a
            parameter that is no norm's.
        message: what is the case, with its numbers.
        advice: what to do about it, with the line to write.
    """

    kind: Kind
    path: str
    message: str
    advice: str


class Layer(NamedTuple):
    """What was measured of one batch norm; None where it is not known.

    Attributes:
        path: in ``batch_stats``, joined by "/", "" for a norm at the top level.
        features: how many.
        values: how many values of each feature the batch has.
        running_mean: the running mean, ``[*F]``.
        running_var: the running variance.
        batch_mean: the mean of the batch in training.
        batch_var: its variance in training.
        mean_off: how far the running mean is from that of the batch, in standard deviations: the
            largest of the features. In training or in evaluation, whichever is nearer.
        mean_errors: the same in standard errors.
        var_off: the factor between both variances, at least 1: the largest of the features.
        var_errors: that of the logarithms, in standard errors.
        var_error: the relative standard error of a variance by which training normalizes, for the
            median feature. ``1 + 2 / var_error**2`` independent normal values would have it.
        saturated: the share of what the activation after the norm does not pass a gradient on for:
            of values, if the activation is bounded, otherwise of units, for the whole batch.
    """

    path: str
    features: int
    values: int | None
    running_mean: np.ndarray
    running_var: np.ndarray
    batch_mean: np.ndarray | None
    batch_var: np.ndarray | None
    mean_off: float | None
    mean_errors: float | None
    var_off: float | None
    var_errors: float | None
    var_error: float | None
    saturated: float | None


class Audit(NamedTuple):
    """What `audit` returns; `str` of it is a table of the layers, and the findings.

    Attributes:
        layers: a row for each batch norm, in the order of the program where that is known.
        findings: what is wrong; empty for a healthy model.
    """

    layers: tuple[Layer, ...]
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self._sentences()}"

    def table(self) -> str:
        """Returns the layers as aligned text; `Layer` says what the columns are."""
        header = ("layer", "features", "values", "mean off", "in s.e.", "var off", "in s.e.")
        rows = [(*header, "var error", "saturated"), *map(_cells, self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )

    def _sentences(self) -> str:
        if not self.findings:
            return "No findings."
        return "\n".join(
            f"{one.kind}: {_named(one.path)}\n  {one.message}\n  {one.advice}"
            for one in self.findings
        )


def audit(
    forward: Callable[..., Any],
    variables: Any,
    batch: Any,
    *,
    weight_decay_mask: Any = None,
) -> Audit:
    """Finds what is wrong with the batch norms of a model.

    The model runs once in training and once in evaluation, compiled, on a copy that measures
    instead of updating, and its program is read. Flax's batch norms are treated as ours. The kinds
    of findings:

    - "never updated": the running statistics are the initial ones.
    - "stale": they are far from those of the batch, both in training and in evaluation, by more
      than chance explains (positions of one example are not taken for independent) and by enough
      to matter. "differs in evaluation": in evaluation alone, as dropout does it.
    - "normalizes by the batch": evaluation does.
    - "not finite": parameters, running statistics, what a norm takes and what it returns.
    - "dead features": a scale near 0 where others are not, or a variance under epsilon. A layer
      all of whose scales are 0, as the last of a residual branch starts, is none.
    - "bias without effect": one that is added directly before the norm, which takes it away.
    - "weight decay": on scale or bias of a norm, given the mask.
    - "small batch": the variance that training normalizes by is a poor estimate.
    - "saturated": the activation after the norm, found in the program and differentiated, lets no
      gradient through: for most values (sigmoid, tanh), or for many units on the whole batch (ReLU
      and its like). A unit that few examples need may be missed in a small batch.
    - "redundant scale": the norm's output goes directly into linear operations only, which could
      hold scale and bias, or into another norm. Across a ReLU the scale could move on too; whether
      to is a matter of taste, and no finding.

    What depends on the program is unknown (None, "unknown") for norms inside of `jax.lax.scan` and
    the like, and for those that are not found in it; standard errors then count every example once.

    Args:
        forward: of Linen and plain functions, ``forward(variables, batch, train)`` returns ``(y,
            updates)`` in both modes, and ``updates["batch_stats"]`` are the new statistics: ``lambda
            variables, x, train: model.apply(variables, x, train=train, mutable=["batch_stats"])``.
            Of NNX, ``forward(model, batch)``.
        variables: ``{"params": ..., "batch_stats": ...}``, or the `nnx.Module`. It is not changed.
        batch: a tree of arrays with examples along the first axis, as many as a training step
            takes, and not those that the last step has been taken on.
        weight_decay_mask: what is given to Optax as ``mask``: a tree (of which a leaf may stand for
            a whole branch) or a function of the parameters, True where weight decay applies. None:
            it is not looked at.

    Returns:
        An `Audit` of `layers` and `findings`; print it.

    Raises:
        ValueError: there is no batch norm, no example in the batch, or `forward` does not return
            the updated statistics.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), bn.nnx.BatchNorm(3, rngs=rngs))
        >>> x = jax.random.normal(jax.random.key(0), (64, 4))
        >>> [(one.kind, one.path) for one in bn.audit(lambda model, x: model(x), model, x).findings]
        [('never updated', 'layers/1'), ('bias without effect', 'layers/1')]

    Reference: Wu & He 2018, "Group Normalization", https://arxiv.org/abs/1803.08494 (small
    batches); Li et al. 2019, https://arxiv.org/abs/1801.05134 (dropout and running variances).
    """
    examples = _number_of_examples(batch)
    model = _adapt(forward, variables)
    if not model.norms:
        raise ValueError(
            "variables hold no batch norm, nothing with a mean and a var in batch_stats: pass all "
            "of what init returned, {'params': params, 'batch_stats': batch_stats}, or the module."
        )
    attributes: dict[str, _Attributes] = dict(model.attributes)
    with bn_linen.replace_norms(), nn.intercept_methods(_record(attributes)), _auditing(object()):
        program = trace(model.evaluate, model.variables, batch)
        sites = _find_sites(program, model)
        trained = _measure(model, batch, True)
        evaluated = _measure(model, batch, False)
    captured = _capture(program, model, batch, sites)
    layers = [
        _examine(model, path, trained, evaluated, sites, captured, attributes, examples)
        for path in _in_order(model.norms, sites)
    ]
    findings = [
        *_not_finite_leaves(model),
        *_not_finite_values(layers),
        *_about_statistics(layers, model.advice),
        *(finding for layer in layers for finding in _about_layer(layer)),
        *_decayed(model, weight_decay_mask),
    ]
    return Audit(tuple(map(_row, layers)), tuple(findings))


def is_initial(norm: Mapping[str, Any]) -> bool:
    """Says whether running statistics are those that no batch has entered.

    Args:
        norm: ``mean``, ``var`` and on demand ``count`` of one norm, each one array, boxed or not.

    Returns:
        True for a `count` of 0 in every feature; without one, for means of 0 and variances of 1.
    """
    (mean,), (var,) = (jax.tree.leaves(norm[name]) for name in ("mean", "var"))
    if "count" in norm:
        (count,) = jax.tree.leaves(norm["count"])
        return not np.any(count)
    return not np.any(mean) and bool(np.all(var == 1))


# --- models -------------------------------------------------------------------------------------

# What a forward function compiled before would not call its modules again for `_record`.
_auditing = jax.make_user_context(None)


class _Attributes(NamedTuple):
    """What a layer says of itself, beyond its variables."""

    epsilon: float = DEFAULT_EPSILON
    virtual_batch_size: int | None = None


class _Model(NamedTuple):
    """A model of Linen, of plain functions or of NNX.

    Attributes:
        variables: a tree of arrays.
        params: of these the parameters.
        norms: the running statistics by path.
        statistics: the path of the norm for those leaves of `variables` that are its statistics.
        evaluate: ``evaluate(variables, batch)`` returns the output in evaluation.
        measuring: `variables` with the state that is measured.
        measure: ``measure(measuring, batch, train)`` returns what is measured, by path.
        attributes: of the layers, as far as they are known without a call.
        advice: the line that recalibrates.
    """

    variables: Any
    params: Any
    norms: dict[str, BatchStats]
    statistics: dict[int, str]
    evaluate: Callable[[Any, Any], Any]
    measuring: Any
    measure: Callable[[Any, Any, bool], dict[str, Measured]]
    attributes: dict[str, _Attributes]
    advice: str


def _adapt(forward: Callable[..., Any], variables: Any) -> _Model:
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


def _adapt_functions(forward: Callable[..., Any], variables: dict[str, Any]) -> _Model:
    batch_stats = variables.get("batch_stats", {})
    started = jax.tree.map(
        lambda node: start_measuring(node) if is_running(node) else node,
        batch_stats,
        is_leaf=is_running,
    )

    def measure(measuring: Any, batch: Any, train: bool) -> dict[str, Measured]:
        returned = forward(measuring, batch, train)
        return _measured_in(_updated_statistics(returned, train))

    statistics = {}
    for index, (keys, _) in enumerate(jax.tree.leaves_with_path(variables)):
        collection, *inside = path_of(keys).split("/")
        if collection == "batch_stats" and inside[-1] in ("mean", "var"):
            statistics[index] = "/".join(inside[:-1])
    return _Model(
        variables=variables,
        params=variables.get("params", {}),
        norms=_running(batch_stats),
        statistics=statistics,
        evaluate=lambda variables, batch: forward(variables, batch, False)[0],
        measuring={**variables, "batch_stats": started},
        measure=measure,
        attributes={},
        advice=(
            "batch_stats = bn.recalibrate(lambda variables, x: model.apply(variables, x, "
            "train=False, mutable=['batch_stats']), variables, batches).batch_stats"
        ),
    )


def _updated_statistics(returned: Any, train: bool) -> Any:
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        updates = returned[1]
        if "batch_stats" in updates:
            return updates["batch_stats"]
        found = f"(y, updates) with the collections {sorted(updates)} in updates"
    else:
        found = f"a {type(returned).__name__}"
    raise ValueError(
        f"forward(variables, batch, {train}) returned {found}, expected (y, updates) with the "
        "statistics in updates['batch_stats'], in both modes. Write bn.audit(lambda variables, x, "
        "train: model.apply(variables, x, train=train, mutable=['batch_stats']), variables, x)."
    )


def _adapt_nnx(forward: Callable[..., Any], model: nnx.Module) -> _Model:
    copy = bn_nnx.replace_norms(nnx.clone(model))
    copy.eval()
    definition, state = nnx.split(copy)
    is_variable = partial(_is_instance, nnx.Variable)
    norms = _running(nnx.state(copy, nnx.BatchStat))
    statistics = {}
    for index, (keys, leaf) in enumerate(jax.tree.leaves_with_path(state, is_leaf=is_variable)):
        path, _, name = path_of(keys).rpartition("/")
        if isinstance(leaf, nnx.BatchStat) and path in norms and name in ("mean", "var"):
            statistics[index] = path
    attributes = {}
    for keys, layer in nnx.iter_graph(copy):
        if isinstance(layer, nnx.BatchNorm):
            attributes["/".join(map(str, keys))] = _attributes_of(layer)
            initial = start_measuring({"mean": layer.mean[...], "var": layer.var[...]})
            layer.measured = nnx.BatchStat(initial["measured"])
    definitions = {False: nnx.graphdef(copy)}
    copy.train()
    definitions[True], measuring = nnx.split(copy)

    def measure(measuring: Any, batch: Any, train: bool) -> dict[str, Measured]:
        called = nnx.merge(definitions[train], measuring)
        forward(called, batch)
        return _measured_in(nnx.state(called, nnx.BatchStat))

    return _Model(
        variables=state,
        params=nnx.state(copy, nnx.Param),
        norms=norms,
        statistics=statistics,
        evaluate=lambda state, batch: forward(nnx.merge(definition, state), batch),
        measuring=measuring,
        measure=measure,
        attributes=attributes,
        advice=(
            "nnx.update(model, bn.recalibrate(lambda model, x: model(x), model, "
            "batches).batch_stats), after model.eval()"
        ),
    )


def _is_instance(kind: type, node: Any) -> bool:
    return isinstance(node, kind)


def _running(batch_stats: Any) -> dict[str, BatchStats]:
    """Returns the statistics of every norm by path, as arrays."""
    return {
        path_of(keys): cast(BatchStats, {name: _value(node[name]) for name in node})
        for keys, node in jax.tree.leaves_with_path(batch_stats, is_leaf=is_running)
        if is_running(node)
    }


def _measured_in(batch_stats: Any) -> dict[str, Measured]:
    return {
        path: node["measured"] for path, node in _running(batch_stats).items() if "measured" in node
    }


def _value(node: Any) -> Any:
    return node.get_value() if isinstance(node, nnx.Variable) else node


def _attributes_of(layer: Any) -> _Attributes:
    return _Attributes(layer.epsilon, getattr(layer, "virtual_batch_size", None))


def _record(attributes: dict[str, _Attributes]) -> Callable[..., Any]:
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


class _Site(NamedTuple):
    """A call of a batch norm in the program of evaluation.

    Attributes:
        path: of the norm in ``batch_stats``.
        steps: the indices of its equations.
        input: the value it takes.
        output: the value it returns.
        axes: the feature axes.
        params: the paths of its scale and bias.
        bias: the path of the bias directly before it, or None.
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


class _Captured(NamedTuple):
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
        """Returns whether the activation is bounded, and the share that is flat; None without."""
        if self.slopes is None or self.flat_values is None or self.flat_units is None:
            return None
        steepest = self.slopes.max()
        flat = [slope < FLAT_BOUNDED * steepest for slope in (self.slopes[0], self.slopes[-1])]
        return (True, self.flat_values) if all(flat) else (False, self.flat_units)


def _measure(model: _Model, batch: Any, train: bool) -> dict[str, Measured]:
    compiled = jax.jit(model.measure, static_argnums=2)
    measured: dict[str, Measured] = jax.device_get(compiled(model.measuring, batch, train))
    return {path: Measured(*map(_flat, one)) for path, one in measured.items()}


def _flat(values: Any) -> np.ndarray:
    values = np.asarray(values).reshape(-1)
    return values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)


def _capture(
    program: Program, model: _Model, batch: Any, sites: Sequence[_Site]
) -> dict[str, _Captured]:
    def summaries(leaves: list[Any], arguments: list[Any]) -> list[Any]:
        values = _values(program, leaves, arguments, _wanted(program, sites))
        return [_summary(program, site, values) for site in sites]

    compiled = jax.jit(summaries)
    found = jax.device_get(compiled(jax.tree.leaves(model.variables), jax.tree.leaves(batch)))
    calls: dict[str, list[_Captured]] = {}
    for site, one in zip(sites, found, strict=True):
        values = math.prod(program.avals[site.input].shape) // one["means"].shape[1]
        calls.setdefault(site.path, []).append(_Captured(values, **one))
    return {path: _together(own) for path, own in calls.items()}


def _together(calls: Sequence[_Captured]) -> _Captured:
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


def _around(call: _Captured, centre: np.ndarray) -> np.ndarray:
    """Returns the mean squares around another centre than the mean of the call."""
    own = call.means.mean(0)
    shift = own - centre
    crossed = 2 * np.real((call.means - own) * np.conj(shift))
    moved: np.ndarray = call.squares + crossed + np.abs(shift) ** 2
    return moved


def _wanted(program: Program, sites: Sequence[_Site]) -> set[int]:
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


def _summary(program: Program, site: _Site, values: dict[int, Any]) -> dict[str, Any]:
    """Returns the fields of `_Captured` but the number of values."""
    x = _as_examples(values[site.input], site.axes)
    y = _as_examples(values[site.output], site.axes)
    means = jnp.mean(x, axis=1)
    squares = jnp.mean(jnp.abs(x - jnp.mean(means, axis=0)) ** 2, axis=1)
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


def _flatness(program: Program, site: _Site, values: dict[int, Any]) -> dict[str, Any]:
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
        return jnp.abs(jax.jvp(activate, (y,), (jnp.ones_like(y),))[1]).astype(jnp.float32)

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

_LINEAR = {"conv_general_dilated", "dot_general"}
_WITH_DERIVATIVE = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_ELEMENTWISE = {
    *("abs", "add", "add_any", "and", "asinh", "atan", "cbrt", "ceil", "clamp", "copy", "cos"),
    *("convert_element_type", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2"),
    *("expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic"),
    *("lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rsqrt", "select_n", "sign"),
    *("sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor"),
}


def _find_sites(program: Program, model: _Model) -> list[_Site]:
    """Returns the calls of batch norms that are found in the program, in its order."""
    found = []
    for norm in find_norms(program):
        steps = _own_steps(program, norm, model.statistics)
        if steps:
            found.append((steps, _norm_of(program, steps, model.statistics)))
    starts = {steps[0]: path for steps, path in found}
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
            _Site(
                path=path,
                steps=steps,
                input=first.input,
                output=output,
                axes=tuple(axes),
                params=_params_of(program, steps, model.statistics),
                bias=_bias_before(program, first.input, tuple(axes), taken),
                activation=_activation_after(program, output, taken),
                takers=_takers(program, output, starts),
            )
        )
    return sites


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


def _bias_before(program: Program, value: int, axes: Sequence[int], taken: set[int]) -> str | None:
    """Returns the path of what is added directly before a norm, and varies with features alone."""
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
        leaves = program.leaf_paths(step.operand)
        is_bias = len(leaves) == 1 and _varying_axes(program, step.operand) <= features
        return leaves[0] if is_bias else None
    return None


def _axes_before(program: Program, equation: Equation, axes: set[int]) -> set[int] | None:
    """Returns where these axes are in what an equation has moved, None if it does more than that."""
    before, after = (program.avals[ends[0]].shape for ends in (equation.inputs, equation.outputs))
    if equation.name in ("convert_element_type", "copy"):
        return axes
    if equation.name == "transpose":
        return {equation.options["permutation"][axis] for axis in axes}
    if equation.name == "reshape" and axes <= {len(after) - 1} and before[-1:] == after[-1:]:
        return {len(before) - 1} if axes else set()
    return None


def _takers(program: Program, value: int, starts: Mapping[int, str]) -> tuple[str, ...] | None:
    """Returns the kernels and norms that take a value, if nothing else does."""
    if program.uses[value] != len(program.consumers[value]):
        return None
    takers: list[str] = []
    for index in program.consumers[value]:
        equation = program.equations[index]
        known = [leaf for one in equation.inputs for leaf in program.leaf_paths(one)]
        if index in starts:
            takers.append(starts[index])
        elif equation.name in _LINEAR and known and equation.inputs.count(value) == 1:
            takers.extend(known)
        elif equation.name in ("convert_element_type", "copy"):
            further = _takers(program, equation.outputs[0], starts)
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
    is_real = jnp.issubdtype(program.avals[ends[0]].dtype, jnp.floating)
    return (tuple(indices), ends[0]) if is_real and not affine else None


def _is_elementwise(equation: Equation) -> bool:
    return len(equation.outputs) == 1 and _maps_elements(equation.name, equation.options)


def _maps_elements(name: str, options: Mapping[str, Any]) -> bool:
    if name in _ELEMENTWISE:
        return True
    if name not in _WITH_DERIVATIVE | {"jit", "pjit", "closed_call"}:
        return False
    inner = [options[key] for key in ("call_jaxpr", "fun_jaxpr", "jaxpr") if key in options]
    return bool(inner) and all(
        _maps_elements(eqn.primitive.name, eqn.params)
        or (eqn.primitive.name == "broadcast_in_dim" and not eqn.invars[0].aval.shape)
        for eqn in inner[0].eqns
    )


# --- what it says -------------------------------------------------------------------------------


class _Noise(NamedTuple):
    """Standard errors of the mean, and relative ones of the variance, by feature."""

    mean: np.ndarray
    var: np.ndarray


class _Off(NamedTuple):
    """How far the running statistics are from measured ones, by feature.

    Attributes:
        mean: the difference of the means in standard deviations.
        mean_errors: the same in standard errors.
        var: the logarithm of the factor between the variances, positive if the running is smaller.
        var_errors: the same in standard errors, positive.
        far: whether one of them is more than chance, and matters.
    """

    mean: np.ndarray
    mean_errors: np.ndarray
    var: np.ndarray
    var_errors: np.ndarray
    far: np.ndarray


class _Examined(NamedTuple):
    """All that is known of one norm; features flattened."""

    path: str
    features: tuple[int, ...]
    initial: bool
    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray | None
    epsilon: float
    trained: Measured | None
    evaluated: Measured | None
    captured: _Captured | None
    sites: tuple[_Site, ...]
    in_training: _Off | None
    in_evaluation: _Off | None
    var_error: float | None
    group: tuple[int, int] | None

    def feature(self, index: int) -> str:
        """Returns what a feature is called in a message."""
        place = np.unravel_index(index, self.features) if self.features else ()
        return str(place[0]) if len(place) == 1 else str(tuple(map(int, place)))

    def list_features(self, chosen: np.ndarray) -> str:
        """Returns what some features are called: the first few of them, and how many."""
        indices = np.flatnonzero(chosen)
        named = ", ".join(map(self.feature, indices[:4])) + (", ..." if len(indices) > 4 else "")
        noun = "feature" if len(indices) == 1 else "features"
        return f"{noun} {named} ({len(indices)} of {chosen.size})"


def _in_order(norms: Mapping[str, Any], sites: Sequence[_Site]) -> list[str]:
    return list(dict.fromkeys([*(site.path for site in sites), *norms]))


def _examine(
    model: _Model,
    path: str,
    trained: Mapping[str, Measured],
    evaluated: Mapping[str, Measured],
    sites: Sequence[_Site],
    captured: Mapping[str, _Captured],
    attributes: Mapping[str, _Attributes],
    examples: int,
) -> _Examined:
    norm, own = model.norms[path], attributes.get(path, _Attributes())
    mean, var = _flat(norm["mean"]), _flat(norm["var"])
    in_training, in_evaluation = (
        one[path] if path in one and one[path].count.any() else None for one in (trained, evaluated)
    )
    found = captured.get(path)
    if found is not None:
        found = found._replace(means=_exact(found.means), squares=_exact(found.squares))
    noise = None if in_evaluation is None else _noise(in_evaluation, found, examples)
    off = partial(_off, mean, var, noise, own.epsilon)
    scale = _by_path(model.params).get(tuple(filter(None, [*path.split("/"), "scale"])))
    size = own.virtual_batch_size
    group = (size, examples) if size is not None and size < examples else None
    return _Examined(
        path=path,
        features=np.shape(norm["mean"]),
        initial=is_initial(cast(Mapping[str, Any], norm)),
        mean=mean,
        var=var,
        scale=None if scale is None else _flat(scale),
        epsilon=own.epsilon,
        trained=in_training,
        evaluated=in_evaluation,
        captured=found,
        sites=tuple(site for site in sites if site.path == path),
        in_training=off(in_training),
        in_evaluation=off(in_evaluation),
        var_error=_var_error(in_evaluation, noise, group),
        group=group,
    )


def _exact(values: np.ndarray) -> np.ndarray:
    return values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)


def _noise(measured: Measured, captured: _Captured | None, examples: int) -> _Noise:
    """Estimates how far the statistics of a batch are from those of all batches.

    Positions of one example resemble each other: the mean of a batch is one of as many independent
    values as there are examples, and so is its variance. No better than if all values were
    independent; where the examples are not known apart, or some are masked, no better than one
    value for each example.
    """
    count, _, var = measured[:3]
    independent = np.maximum(np.minimum(count, examples), 1)
    error_of_mean = np.sqrt(var / independent)
    error_of_var = np.sqrt((ASSUMED_KURTOSIS - 1) / independent)
    if captured is not None and len(captured.means) > 1 and np.all(count == captured.values):
        root = math.sqrt(len(captured.means))
        square = captured.squares.mean(0)
        error_of_mean = captured.means.std(0, ddof=1) / root
        spread = captured.squares.std(0, ddof=1) / root
        error_of_var = np.divide(spread, square, out=np.zeros_like(square), where=square > 0)
    freedom = np.maximum(count - 1, 0.5)
    return _Noise(
        np.maximum(error_of_mean, np.sqrt(var / np.maximum(count, 1))),
        np.maximum(error_of_var, np.sqrt(2 / freedom)),
    )


def _off(
    mean: np.ndarray,
    var: np.ndarray,
    noise: _Noise | None,
    epsilon: float,
    measured: Measured | None,
) -> _Off | None:
    """Compares the running statistics with measured ones.

    The difference has the noise of both. A running average has at most that of one batch.
    """
    if measured is None or noise is None:
        return None
    known = (measured.count > 0) & np.isfinite(mean) & np.isfinite(var) & (var >= 0)
    var = np.where(known, var, 1)
    difference = np.where(known, np.abs(measured.mean - mean), 0)
    deviation = np.sqrt(np.minimum(var, measured.var) + epsilon)
    ratio = np.where(known, np.log((measured.var + epsilon) / (var + epsilon)), 0)
    tiny = np.finfo(np.float64).tiny
    mean_errors = difference / np.maximum(math.sqrt(2) * noise.mean, tiny)
    var_errors = np.abs(ratio) / (math.sqrt(2) * noise.var)
    limit = FAR_ERRORS + math.sqrt(2 * math.log(mean.size))
    share = difference / deviation
    far = (share >= FAR_MEAN) & (mean_errors >= limit)
    # A feature that is constant in the batch may be one that few examples have.
    varies = measured.var > epsilon
    far |= varies & (np.abs(ratio) >= math.log(FAR_VAR)) & (var_errors >= limit)
    return _Off(share, mean_errors, ratio, var_errors, far)


def _var_error(
    measured: Measured | None, noise: _Noise | None, group: tuple[int, int] | None
) -> float | None:
    """Returns the relative standard error of the variance of a batch, or of a ghost batch."""
    if measured is None or noise is None:
        return None
    varies = measured.var > 0
    if not varies.any():
        return None
    share = 1 if group is None else group[0] / group[1]
    freedom = np.maximum(measured.count * share - 1, 0.5)
    errors = np.maximum(noise.var / math.sqrt(share), np.sqrt(2 / freedom))
    return float(np.median(errors[varies]))


def _row(layer: _Examined) -> Layer:
    off = layer.in_training or layer.in_evaluation
    if off and layer.in_evaluation and layer.in_evaluation.far.sum() < off.far.sum():
        off = layer.in_evaluation
    batch = layer.trained or layer.evaluated
    flat = layer.captured.saturated() if layer.captured else None
    return Layer(
        path=layer.path,
        features=math.prod(layer.features),
        values=None if batch is None else int(batch.count.max()),
        running_mean=layer.mean.reshape(layer.features),
        running_var=layer.var.reshape(layer.features),
        batch_mean=None if batch is None else batch.mean.reshape(layer.features),
        batch_var=None if batch is None else batch.var.reshape(layer.features),
        mean_off=None if off is None else float(off.mean.max()),
        mean_errors=None if off is None else float(off.mean_errors[off.mean.argmax()]),
        var_off=None if off is None else float(np.exp(np.abs(off.var).max())),
        var_errors=None if off is None else float(off.var_errors[np.abs(off.var).argmax()]),
        var_error=layer.var_error,
        saturated=None if flat is None else flat[1],
    )


def _cells(layer: Layer) -> tuple[str, ...]:
    numbers = (
        layer.mean_off,
        layer.mean_errors,
        layer.var_off,
        layer.var_errors,
        layer.var_error,
        layer.saturated,
    )
    counts = (str(layer.features), "unknown" if layer.values is None else str(layer.values))
    shown = ("unknown" if one is None else f"{one:.2g}" for one in numbers)
    return (layer.path or "the top level", *counts, *shown)


def _named(path: str) -> str:
    return repr(path) if path else "the top-level norm"


# --- findings -----------------------------------------------------------------------------------


def _not_finite_leaves(model: _Model) -> Iterator[Finding]:
    is_variable = partial(_is_instance, nnx.Variable)
    for keys, leaf in jax.tree.leaves_with_path(model.variables, is_leaf=is_variable):
        leaf = _value(leaf)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        wrong = ~np.isfinite(np.asarray(leaf, _host_dtype(leaf)))
        if wrong.any():
            path = path_of(keys)
            shown = path.removeprefix("params/").removeprefix("batch_stats/")
            home = shown.rpartition("/")[0]
            yield Finding(
                "not finite",
                home if home in model.norms and shown.count("/") else shown,
                f"{path} holds {wrong.sum()} values of {wrong.size} that are NaN or infinite.",
                "Go back to a checkpoint before that. bn.batch_norm keeps what is not finite out "
                "of the running statistics; that of other libraries may have let it in.",
            )


def _host_dtype(leaf: Any) -> Any:
    return np.complex128 if jnp.iscomplexobj(leaf) else np.float64


def _not_finite_values(layers: Sequence[_Examined]) -> Iterator[Finding]:
    """Reports the first norm that takes what is not finite, and those that make it themselves."""
    bad = [(layer, wrong) for layer in layers if (wrong := _bad_inputs(layer)).any()]
    for layer, wrong in bad[:1]:
        yield Finding(
            "not finite",
            layer.path,
            f"What it takes is not finite in {layer.list_features(wrong)}"
            + (f", and so is what {len(bad) - 1} norms after it take." if bad[1:] else "."),
            "Look at what comes before it, and at the batch: jax.config.update('jax_debug_nans', "
            "True) stops where it begins. Positions that hold no data belong under mask=.",
        )
    for layer in layers:
        found = layer.captured
        if found is not None and (wrong := found.finite_input & ~found.finite_output).any():
            yield Finding(
                "not finite",
                layer.path,
                f"What it returns is not finite in {layer.list_features(wrong)}, though what it "
                "takes is.",
                "Its scale, bias or running statistics are not finite or too large for the dtype "
                "of the result: restore them, or pass dtype=jnp.float32.",
            )


def _bad_inputs(layer: _Examined) -> np.ndarray:
    """Says of which features something that is not masked is not finite."""
    nothing = np.zeros(layer.mean.size, bool)
    in_training = nothing if layer.trained is None else layer.trained.count == 0
    if layer.evaluated is not None:
        bad: np.ndarray = (layer.evaluated.count == 0) | in_training
        return bad
    return in_training if layer.captured is None else in_training | ~layer.captured.finite_input


def _about_statistics(layers: Sequence[_Examined], recalibrate: str) -> Iterator[Finding]:
    initial = [layer for layer in layers if layer.initial]
    stale = [layer for layer in layers if not layer.initial and _is_stale(layer)]
    for layer in initial:
        yield Finding(
            "never updated",
            layer.path,
            "Its running statistics are the initial ones, mean 0 and variance 1"
            f"{_batch_beside(layer)}: evaluation does not normalize.",
            "Train with train=True and keep what the model returns (in NNX call model.train()), "
            f"or measure them: {recalibrate}",
        )
    for layer in stale:
        yield Finding("stale", layer.path, _about_stale(layer), _about_recalibration(recalibrate))
    if initial or stale:
        return
    for layer in layers:
        if layer.in_evaluation is not None and layer.in_evaluation.far.any():
            yield Finding(
                "differs in evaluation",
                layer.path,
                "Its running statistics are those of training, but in evaluation "
                + _about_off(layer, layer.in_evaluation),
                "Something before it behaves differently in evaluation, as dropout does, or a "
                f"running average lags. Measure in evaluation: {recalibrate}",
            )


def _is_stale(layer: _Examined) -> bool:
    both = [layer.in_training, layer.in_evaluation]
    return all(off is not None and off.far.any() for off in both)


def _batch_beside(layer: _Examined) -> str:
    batch = layer.trained or layer.evaluated
    if batch is None:
        return ""
    return f"; those of the batch are {np.abs(batch.mean).max():.3g} at most and {_span(batch.var)}"


def _span(var: np.ndarray) -> str:
    return f"{var.min():.3g} to {var.max():.3g}" if var.size > 1 else f"{var[0]:.3g}"


def _about_stale(layer: _Examined) -> str:
    assert layer.in_training is not None and layer.trained is not None
    message = "Its running statistics are not those of the batch: " + _about_off(
        layer, layer.in_training
    )
    share = _initial_share(layer)
    if share is None:
        return message
    return (
        f"{message} They are those of the batch with {share:.0%} of the initial mean 0 and "
        "variance 1 in them: too few updates for the momentum."
    )


def _about_recalibration(recalibrate: str) -> str:
    return (
        "Parameters, data or preprocessing have changed since the statistics were taken, or they "
        f"were updated too seldom. Measure them again: {recalibrate}"
    )


def _about_off(layer: _Examined, off: _Off) -> str:
    measured = layer.trained if off is layer.in_training else layer.evaluated
    assert measured is not None
    chosen = np.where(off.far, np.maximum(off.mean / FAR_MEAN, np.abs(off.var)), 0)
    worst = int(chosen.argmax())
    factor = math.exp(abs(off.var[worst]))
    return (
        f"in {layer.list_features(off.far)}. The mean of feature {layer.feature(worst)} is "
        f"{measured.mean[worst]:.3g}, not {layer.mean[worst]:.3g}, which is "
        f"{off.mean[worst]:.2g} standard deviations or {off.mean_errors[worst]:.2g} standard "
        f"errors; its variance is {measured.var[worst]:.3g}, not {layer.var[worst]:.3g}, a factor "
        f"of {factor:.2g} or {off.var_errors[worst]:.2g} standard errors."
    )


def _initial_share(layer: _Examined) -> float | None:
    """Returns how much of their initial values the running statistics have in them, if it fits.

    By least squares in ``mean = (1 - share) * batch_mean``, ``var - 1 = (1 - share) * (batch_var -
    1)``.
    """
    if layer.trained is None or layer.mean.size < 4:
        return None
    given = np.concatenate([np.real(layer.trained.mean), layer.trained.var - 1])
    kept = np.concatenate([np.real(layer.mean), layer.var - 1])
    entered = float(given @ kept / max(given @ given, np.finfo(np.float64).tiny))
    unexplained = np.sum((kept - entered * given) ** 2)
    fits = unexplained <= INITIAL_SHARE_FIT * np.sum(kept**2)
    return 1 - entered if fits and LEAST_INITIAL_SHARE < 1 - entered < 1 else None


def _about_layer(layer: _Examined) -> Iterator[Finding]:
    yield from _normalizing_by_batch(layer)
    yield from _dead_features(layer)
    yield from _useless_bias(layer)
    yield from _small_batch(layer)
    yield from _saturated(layer)
    yield from _redundant(layer)


def _normalizing_by_batch(layer: _Examined) -> Iterator[Finding]:
    if layer.evaluated is not None and not layer.evaluated.by_running.any():
        yield Finding(
            "normalizes by the batch",
            layer.path,
            "Evaluation normalizes by the batch: what the model makes of an example depends on the "
            "others in the batch.",
            "Hand the mode on to the layer: BatchNorm(use_running_average=not train)(x); in NNX "
            "leave use_running_average out of the call, so that model.eval() sets it.",
        )


def _dead_features(layer: _Examined) -> Iterator[Finding]:
    if layer.scale is not None and layer.scale.size == layer.mean.size:
        size = np.abs(layer.scale)
        usual = np.median(size)
        dead = size < DEAD_SCALE * min(usual, 1)
        if dead.any():
            yield Finding(
                "dead features",
                layer.path,
                f"The scale of {layer.list_features(dead)} is {size[dead].max():.2g} at most, "
                f"against a median of {usual:.2g}: nothing but the bias goes on.",
                "Keep weight decay from scales (mask=bn.optim.no_weight_decay_mask), and set these "
                "to 1 again, or remove the features.",
            )
    batch = layer.evaluated
    seen = layer.var if batch is None else np.where(batch.count > 0, batch.var, np.inf)
    dead = (layer.var < layer.epsilon) & (seen < layer.epsilon)
    if dead.any():
        yield Finding(
            "dead features",
            layer.path,
            f"The variance of {layer.list_features(dead)} is {layer.var[dead].max():.2g} at most, "
            f"under epsilon={layer.epsilon:.2g}: they are as good as constant.",
            "Find out why what comes before is constant (weights that decayed, dead units), or "
            "scale it up; epsilon is not to be what normalizes.",
        )


def _useless_bias(layer: _Examined) -> Iterator[Finding]:
    trains = layer.trained is not None and not layer.trained.by_running.any()
    biases = {site.bias for site in layer.sites if site.bias is not None}
    for bias in sorted(biases) if trains else ():
        yield Finding(
            "bias without effect",
            layer.path,
            f"The bias {bias!r} directly before it has no effect: the mean takes it away.",
            "Make the layer before it with use_bias=False; to keep outputs of evaluation as they "
            "are, subtract the bias from the running mean.",
        )


def _small_batch(layer: _Examined) -> Iterator[Finding]:
    if layer.var_error is None or layer.var_error <= LARGEST_VAR_ERROR:
        return
    of = "the batch" if layer.group is None else f"each ghost batch of {layer.group[0]} examples"
    values = 1 + 2 / layer.var_error**2
    yield Finding(
        "small batch",
        layer.path,
        f"The variance of {of} is as uncertain as that of {values:.1f} independent values, "
        f"{layer.var_error:.0%} of itself.",
        "Train with a larger batch, synchronize over devices with axis_name='data', or use "
        "GroupNorm. (If training takes more examples than you passed, pass as many.)",
    )


def _saturated(layer: _Examined) -> Iterator[Finding]:
    flat = layer.captured.saturated() if layer.captured is not None else None
    if flat is None:
        return
    is_bounded, share = flat
    if share <= (MOST_SATURATED_VALUES if is_bounded else MOST_SATURATED_UNITS):
        return
    what = (
        f"{share:.0%} of the values after it are where the activation is flat"
        if is_bounded
        else f"{share:.0%} of the units after it are zero or flat for the whole batch"
    )
    yield Finding(
        "saturated",
        layer.path,
        f"{what}, so that no gradient comes back.",
        "Look at its scale and bias and at the learning rate: they have moved what was mean 0 and "
        "variance 1. Stale running statistics do it too.",
    )


def _redundant(layer: _Examined) -> Iterator[Finding]:
    taken = [site.takers for site in layer.sites if site.params]
    if not taken or len(taken) < len(layer.sites) or None in taken:
        return
    takers = sorted({path for one in taken for path in one or ()})
    params = sorted({path for site in layer.sites for path in site.params})
    yield Finding(
        "redundant scale",
        layer.path,
        f"{_listed(params)} can be left out: what it returns goes directly into "
        f"{_listed(map(_named, takers))} alone, which can do the same.",
        "Make it with use_scale=False, use_bias=False (the bias may go only if what follows has "
        "one and no padding); a trained model can be folded with bn.fold.",
    )


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _decayed(model: _Model, mask: Any) -> Iterator[Finding]:
    if mask is None:
        return
    decays = _by_path(mask(model.params) if callable(mask) else mask)
    norm_params = _by_path(norm_params_mask(model.params, _statistics_of(model)))
    found: dict[str, list[str]] = {}
    for path, of_norm in norm_params.items():
        around = [decays[path[:end]] for end in range(len(path), -1, -1) if path[:end] in decays]
        if of_norm and around and around[0]:
            found.setdefault("/".join(path[:-1]), []).append(path[-1])
    for home, names in found.items():
        yield Finding(
            "weight decay",
            home,
            f"Weight decay applies to its {_listed(names)}.",
            "Pass the mask that leaves them out: optax.adamw(..., "
            "mask=bn.optim.no_weight_decay_mask).",
        )


def _statistics_of(model: _Model) -> dict[str, Any]:
    """Returns the running statistics as a nested mapping."""
    nested: dict[str, Any] = {}
    for path, norm in model.norms.items():
        node = nested
        for name in filter(None, path.split("/")):
            node = node.setdefault(name, {})
        node.update(norm)
    return nested


def _by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    """Returns the leaves of a tree, of variables the values, by their paths."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=partial(_is_instance, nnx.Variable))
    return {tuple(filter(None, path_of(keys).split("/"))): _value(leaf) for keys, leaf in leaves}
