"""What is wrong with the batch norms of a model, found by running it on one batch.

`audit` runs the model once in training and once in evaluation, reads its program, and returns a row
for each batch norm and what is to be mended, with the numbers and the line to write.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax._audit.observations import (
    Attributes,
    Captured,
    Measurement,
    Model,
    Observations,
    Site,
    flat,
    is_variable,
    observe,
    value_of,
)
from bn_jax._paths import format_path
from bn_jax._program.reading import exact
from bn_jax.optim import norm_params_mask

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
# a thousand healthy layers, fewer than one has a feature that chance alone puts so far. More would
# hide little, for what matters (below) is usually dozens of standard errors away.
FAR_ERRORS = 4.0
# A shift of half a standard deviation, or a deviation off by the root of two, changes what an
# activation passes on; with less than that, models do not notice.
FAR_MEAN = 0.5
FAR_VAR = 2.0
# Dropout and lag shift many features. A lone one is a matter of the layers before it, whose running
# statistics are estimates too.
FAR_IN_EVALUATION = 0.2
# Of a feature whose distribution is not known; six is that of a double exponential one.
ASSUMED_KURTOSIS = 6.0
# That of nine independent normal values: in one batch of five, the variance is off by a factor of
# two or more. Wu & He 2018 show what batch norm loses with fewer.
LARGEST_VAR_ERROR = 0.5
# As a share of the layer's median scale, divided by the number of features. Scales that start at 0
# cross it again in training: of the smallest one in a layer, one in a thousand is under this.
DEAD_SCALE = 1e-3
# More than half of the values of a bounded activation; of the others more than a tenth of units
# that pass no gradient for any example, for a few of them are found in any network that is trained.
MOST_SATURATED_VALUES = 0.5
MOST_SATURATED_UNITS = 0.1
# What the running statistics have in common with their initial values, before it is told.
LEAST_INITIAL_SHARE = 0.02
INITIAL_SHARE_FIT = 0.02


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
            largest of the features; in training, or in evaluation where fewer features are far off.
        mean_errors: the same in standard errors.
        var_off: the factor between both variances, at least 1: the largest of the features.
        var_errors: that of the logarithms, in standard errors.
        var_error: the relative standard error of a variance by which training normalizes, for the
            median feature. ``1 + 2 / var_error**2`` independent normal values would have it.
        saturated: the share of what the activation after the norm does not pass a gradient on for:
            of values, if the activation is bounded, otherwise of units, for the whole batch.
        is_found: whether its calls are found in the program. Where they are, `saturated` is None
            if no activation follows directly; what a norm does for a mask stands between them.
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
    is_found: bool


class Audit(NamedTuple):
    """What `audit` returns; `str` of it is a table of the layers, and the findings.

    Attributes:
        layers: a row for each batch norm, in the order of the program where that is known.
        findings: what is wrong; empty for a healthy model.
        unexamined: the paths of whitening norms, of which nothing is known.
    """

    layers: tuple[Layer, ...]
    findings: tuple[Finding, ...]
    unexamined: tuple[str, ...] = ()

    def __str__(self) -> str:
        whitened = "\n".join(f"not examined: {one} (whitening)" for one in self.unexamined)
        return "\n\n".join(filter(None, (self.table(), self._sentences(), whitened)))

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
        lines = []
        for one, following in zip(self.findings, [*self.findings[1:], None], strict=True):
            lines.append(f"{one.kind}: {_named(one.path)}\n  {one.message}")
            if following is None or following.advice != one.advice:
                lines.append(f"  {one.advice}")
        return "\n".join(lines)


def audit(
    forward: Callable[..., Any],
    variables: Any,
    batch: Any,
    *,
    weight_decay_mask: Any = None,
) -> Audit:
    """Finds what is wrong with the batch norms of a model.

    The model runs once in training and once in evaluation, compiled, on a copy that measures
    instead of updating, and its program is read. Where a bias seems to be without effect, training
    runs once more with another one. Flax's batch norms are treated as ours. The kinds
    of findings:

    - "never updated": the running statistics are the initial ones.
    - "stale": they are far from those of the batch, both in training and in evaluation, by more
      than chance explains (positions of one example are not taken for independent) and by enough
      to matter. "differs in evaluation": in evaluation alone, and in more than a fifth of the
      features, as dropout does it.
    - "normalizes by the batch": evaluation does.
    - "not finite": parameters, running statistics, what a norm takes and what it returns.
    - "dead features": a scale near 0 where others are not, or a variance under epsilon. A layer
      all of whose scales are 0, as the last of a residual branch starts, is none.
    - "bias without effect": one that is added directly before the norm, which takes it away, and
      nowhere else. One that seems to be is not reported while another before it has an effect.
    - "weight decay": on scale or bias of a norm, given the mask.
    - "small batch": the variance that training normalizes by is a poor estimate.
    - "saturated": the activation after the norm, found in the program and differentiated, lets no
      gradient through: for most values (sigmoid, tanh), or for many units on the whole batch (ReLU
      and its like). A unit that few examples need may be missed in a small batch.
    - "redundant scale": the norm's output goes directly into linear operations only, which could
      hold scale and bias, or into another norm. Across a ReLU the scale could move on too; whether
      to is a matter of taste, and no finding.

    What depends on the program is unknown (None, "unknown") for norms inside of `jax.lax.scan` and
    the like, and for those that are not found in it. Standard errors count every example once for
    these, and where some values are masked.

    Args:
        forward: of Linen and plain functions, ``forward(variables, batch, train)`` returns
            ``(y, updates)`` in both modes, ``updates["batch_stats"]`` being the new statistics:
            ``lambda variables, x, train: model.apply(variables, x, train=train,
            mutable=["batch_stats"])``. Of NNX, ``forward(model, batch)``.
        variables: ``{"params": ..., "batch_stats": ...}``, or the `nnx.Module`. It is not changed.
        batch: a tree of arrays with examples along the first axis, as many as a training step
            takes, and not those that the last step has been taken on.
        weight_decay_mask: what is given to Optax as ``mask``: a tree (of which a leaf may stand for
            a whole branch) or a function of the parameters, True where weight decay applies. None:
            it is not looked at.

    Returns:
        An `Audit` of `layers` and `findings`; print it.

    Raises:
        ValueError: there is no batch norm, no example in the batch, `forward` does not return the
            updated statistics, or `weight_decay_mask` covers no parameter of a norm.
        TypeError: `variables` is neither a mapping nor a module.

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
    seen = observe(forward, variables, batch)
    layers = [_examine(seen, path) for path in _in_order(seen)]
    findings = [
        *_not_finite_leaves(seen.model),
        *_not_finite_values(layers),
        *_about_statistics(layers, seen.model.advice),
        *(finding for layer in layers for finding in _about_layer(layer)),
        *_decayed(seen.model, weight_decay_mask),
    ]
    return Audit(tuple(map(_row, layers)), tuple(findings), seen.model.whitened)


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
    trained: Measurement | None
    evaluated: Measurement | None
    captured: Captured | None
    wrong_input: np.ndarray
    sites: tuple[Site, ...]
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


def _in_order(seen: Observations) -> list[str]:
    return list(dict.fromkeys([*(site.path for site in seen.sites), *seen.model.norms]))


def _examine(seen: Observations, path: str) -> _Examined:
    norm, own = seen.model.norms[path], seen.attributes.get(path, Attributes())
    mean, var = flat(norm["mean"]), flat(norm["var"])
    in_both = seen.trained.get(path), seen.evaluated.get(path)
    trained, evaluated = (one if one and one.values.any() else None for one in in_both)
    captured = seen.captured.get(path)
    noise = None if evaluated is None else _noise(evaluated, captured, seen.examples)
    off = partial(_off, mean, var, noise, own.epsilon)
    scale = _by_path(seen.model.params).get(tuple(filter(None, [*path.split("/"), "scale"])))
    size = own.virtual_batch_size
    group = (size, seen.examples) if size is not None and size < seen.examples else None
    return _Examined(
        path=path,
        features=np.shape(norm["mean"]),
        initial=is_initial(cast(Mapping[str, Any], norm)),
        mean=mean,
        var=var,
        scale=None if scale is None else flat(scale),
        epsilon=own.epsilon,
        trained=trained,
        evaluated=evaluated,
        captured=captured,
        wrong_input=_wrong_input(*in_both, captured, mean.size),
        sites=tuple(site for site in seen.sites if site.path == path),
        in_training=off(trained),
        in_evaluation=off(evaluated),
        var_error=_var_error(evaluated, noise, group),
        group=group,
    )


def _noise(measured: Measurement, captured: Captured | None, examples: int) -> _Noise:
    """Estimates how far the statistics of a batch are from those of all batches.

    Positions of one example resemble each other: the mean of a batch is one of as many independent
    values as there are examples, and so is its variance. No better than if all values were
    independent; where the examples are not known apart, or some are masked, no better than one
    value for each example.
    """
    count, var = measured.values, measured.var
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
    measured: Measurement | None,
) -> _Off | None:
    """Compares the running statistics with measured ones.

    The difference has the noise of both. A running average has at most that of one batch of its
    own variance.
    """
    if measured is None or noise is None:
        return None
    known = (measured.values > 0) & np.isfinite(mean) & np.isfinite(var) & (var >= 0)
    var = np.where(known, var, 1)
    difference = np.where(known, np.abs(measured.mean - mean), 0)
    deviation = np.sqrt(np.minimum(var, measured.var) + epsilon)
    ratio = np.where(known, np.log((measured.var + epsilon) / (var + epsilon)), 0)
    tiny = np.finfo(np.float64).tiny
    mean_errors = difference / np.maximum(noise.mean * np.sqrt(1 + np.exp(-ratio)), tiny)
    var_errors = np.abs(ratio) / (math.sqrt(2) * noise.var)
    limit = FAR_ERRORS + math.sqrt(2 * math.log(mean.size))
    share = difference / deviation
    far = (share >= FAR_MEAN) & (mean_errors >= limit)
    # A feature that is constant in the batch may be one that few examples have.
    varies = measured.var > epsilon
    far |= varies & (np.abs(ratio) >= math.log(FAR_VAR)) & (var_errors >= limit)
    return _Off(share, mean_errors, ratio, var_errors, far)


def _var_error(
    measured: Measurement | None, noise: _Noise | None, group: tuple[int, int] | None
) -> float | None:
    """Returns the relative standard error of the variance of a batch, or of a ghost batch."""
    if measured is None or noise is None:
        return None
    varies = measured.var > 0
    if not varies.any():
        return None
    share = 1 if group is None else group[0] / group[1]
    freedom = np.maximum(measured.values * share - 1, 0.5)
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
        values=None if batch is None else int(batch.values.max()),
        running_mean=layer.mean.reshape(layer.features),
        running_var=layer.var.reshape(layer.features),
        batch_mean=None if batch is None else batch.mean.reshape(layer.features),
        batch_var=None if batch is None else batch.var.reshape(layer.features),
        mean_off=None if off is None else float(off.mean.max()),
        mean_errors=None if off is None else float(off.mean_errors[off.mean.argmax()]),
        var_off=None if off is None else float(np.exp(np.abs(off.var).max())),
        var_errors=None if off is None else float(off.var_errors[np.abs(off.var).argmax()]),
        var_error=layer.var_error,
        saturated=None if flat is None else float(flat[1]),
        is_found=bool(layer.sites),
    )


def _cells(layer: Layer) -> tuple[str, ...]:
    counts = (str(layer.features), "unknown" if layer.values is None else str(layer.values))
    off = (layer.mean_off, layer.mean_errors, layer.var_off, layer.var_errors, layer.var_error)
    shown = ("unknown" if one is None else f"{one:.2g}" for one in off)
    saturated = "-" if layer.is_found else "unknown"
    if layer.saturated is not None:
        saturated = f"{layer.saturated:.2g}"
    return (layer.path or "the top level", *counts, *shown, saturated)


def _named(path: str) -> str:
    return repr(path) if path else "the top-level norm"


# --- findings -----------------------------------------------------------------------------------


def _not_finite_leaves(model: Model) -> Iterator[Finding]:
    for keys, leaf in jax.tree.leaves_with_path(model.variables, is_leaf=is_variable):
        leaf = value_of(leaf)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        wrong = ~np.isfinite(exact(leaf))
        if wrong.any():
            path = format_path(keys)
            shown = path.removeprefix("params/").removeprefix("batch_stats/")
            home = shown.rpartition("/")[0]
            yield Finding(
                "not finite",
                home if home in model.norms and shown.count("/") else shown,
                f"{path} holds {wrong.sum()} values of {wrong.size} that are NaN or infinite.",
                "Go back to a checkpoint before that. bn.batch_norm keeps what is not finite out "
                "of the running statistics; that of other libraries may have let it in.",
            )


def _not_finite_values(layers: Sequence[_Examined]) -> Iterator[Finding]:
    """Reports the first norm that takes what is not finite, and those that make it themselves."""
    bad = [layer for layer in layers if layer.wrong_input.any()]
    for layer in bad[:1]:
        features = layer.list_features(layer.wrong_input)
        yield Finding(
            "not finite",
            layer.path,
            (
                f"No value that it takes is valid and finite in {features}, unless the mask leaves "
                "none"
                if layer.captured is None
                else f"What it takes is not finite in {features}"
            )
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


def _wrong_input(
    trained: Measurement | None,
    evaluated: Measurement | None,
    captured: Captured | None,
    features: int,
) -> np.ndarray:
    """Says of which features something that is not masked is not finite.

    Where the input is not known, what is masked as a whole cannot be told apart.
    """
    in_training, in_evaluation = (_without_values(one, features) for one in (trained, evaluated))
    if captured is None:
        return in_training | in_evaluation
    if evaluated is None or not _is_called(evaluated):
        return in_training | ~captured.finite_input
    return in_evaluation & ~captured.finite_input | in_training & ~in_evaluation


def _without_values(measured: Measurement | None, features: int) -> np.ndarray:
    if measured is None or not _is_called(measured):
        return np.zeros(features, bool)
    return np.asarray(measured.values == 0)


def _is_called(measured: Measurement) -> bool:
    return bool(measured.values.any() or measured.by_running.any())


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
            f"or measure them{_unless_frozen(layer)}: {recalibrate}",
        )
    for layer in stale:
        yield Finding("stale", layer.path, _about_stale(layer), _about_recalibration(recalibrate))
    if initial or stale:
        return
    for layer in layers:
        if layer.in_evaluation is not None and layer.in_evaluation.far.mean() > FAR_IN_EVALUATION:
            yield Finding(
                "differs in evaluation",
                layer.path,
                "In training its running statistics are those of the batch, in evaluation far from "
                "them " + _about_off(layer, layer.in_evaluation),
                "Something before it behaves differently in evaluation, as dropout does, or a "
                f"running average lags. Measure in evaluation: {recalibrate}",
            )


def _is_stale(layer: _Examined) -> bool:
    both = [layer.in_training, layer.in_evaluation]
    return all(off is not None and off.far.any() for off in both)


def _unless_frozen(layer: _Examined) -> str:
    return " (if it is frozen, unfreeze it first)" if layer.trained is None else ""


def _batch_beside(layer: _Examined) -> str:
    batch = layer.trained or layer.evaluated
    if batch is None:
        return ""
    largest = np.abs(batch.mean).max()
    return f" (the batch has means of up to {largest:.3g} and variances of {_span(batch.var)})"


def _span(var: np.ndarray) -> str:
    return f"{var.min():.3g} to {var.max():.3g}" if var.size > 1 else f"{var[0]:.3g}"


def _about_stale(layer: _Examined) -> str:
    assert layer.in_training is not None and layer.trained is not None
    message = (
        f"Its running statistics are far from the batch's {_about_off(layer, layer.in_training)}"
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
    if layer.evaluated is not None and layer.evaluated.by_batch.any():
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
        dead = size < DEAD_SCALE / size.size * min(usual, 1)
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
    seen = layer.var if batch is None else np.where(batch.values > 0, batch.var, np.inf)
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
    trains = layer.trained is not None and layer.trained.by_batch.any()
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
    advice = (
        "Train with a larger batch, synchronize over devices with axis_name='data', or use "
        "GroupNorm. (If training takes more examples than you passed, pass as many.)"
        if layer.group is None
        else "Raise virtual_batch_size or leave it out, or use GroupNorm."
    )
    yield Finding(
        "small batch",
        layer.path,
        f"The variance of {of} is as uncertain as that of {values:.1f} independent values, "
        f"{layer.var_error:.0%} of itself.",
        advice,
    )


def _saturated(layer: _Examined) -> Iterator[Finding]:
    found = layer.captured
    flat = None if found is None or not found.finite_output.all() else found.saturated()
    # Where evaluation does not normalize, training may yet.
    if flat is None or layer.initial or _is_stale(layer):
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
        "variance 1.",
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


def _decayed(model: Model, mask: Any) -> Iterator[Finding]:
    if mask is None:
        return
    decays = _by_path(mask(model.params) if callable(mask) else mask)
    norm_params = _by_path(norm_params_mask(model.params, _statistics_of(model)))
    expected = [path for path, of_norm in norm_params.items() if of_norm]
    found: dict[str, list[str]] = {}
    covered = False
    for path in expected:
        around = [decays[path[:end]] for end in range(len(path), -1, -1) if path[:end] in decays]
        covered = covered or bool(around)
        if around and around[0]:
            found.setdefault("/".join(path[:-1]), []).append(path[-1])
    if expected and not covered:
        raise ValueError(
            f"weight_decay_mask covers no parameter of a norm: expected leaves at "
            f"{_listed(map('/'.join, expected))} or around them, received "
            f"{_listed(map('/'.join, decays)) if decays else 'none'}. Pass a tree in the structure "
            "of params, or a function of them: weight_decay_mask=bn.optim.no_weight_decay_mask."
        )
    for home, names in found.items():
        yield Finding(
            "weight decay",
            home,
            f"Weight decay applies to its {_listed(names)}.",
            "Pass the mask that leaves them out: optax.adamw(..., "
            "mask=bn.optim.no_weight_decay_mask).",
        )


def _statistics_of(model: Model) -> dict[str, Any]:
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
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_variable)
    return {
        tuple(filter(None, format_path(keys).split("/"))): value_of(leaf) for keys, leaf in leaves
    }
