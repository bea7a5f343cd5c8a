"""The evidence on each norm: its running statistics beside those of the batch, and their errors."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from bn_jax._audit.calls import Calls
from bn_jax._audit.model import Attributes, leaves_by_path
from bn_jax._audit.observations import Measurement, Observations, flat
from bn_jax._audit.report import Layer
from bn_jax._audit.sites import Site

# Standard errors beyond sqrt(2 log F), the expected largest of F normal errors. Of a thousand
# healthy layers, fewer than one has a feature that is so far off by chance. A higher limit would
# hide little, because what matters (below) is usually dozens of standard errors away.
FAR_ERRORS = 4.0
# A shift of half a standard deviation, or a deviation off by a factor of sqrt(2), changes what an
# activation lets through. Less than that makes no difference to models.
FAR_MEAN = 0.5
FAR_VAR = 2.0
# The kurtosis that is assumed where it is unknown: that of a double exponential distribution.
ASSUMED_KURTOSIS = 6.0


class Noise(NamedTuple):
    """The standard errors of the statistics of one batch, by feature; of the variance relative."""

    mean: np.ndarray
    var: np.ndarray


class Distance(NamedTuple):
    """How far the running statistics are from measured ones, by feature."""

    mean: np.ndarray  # the difference of the means in standard deviations
    mean_errors: np.ndarray  # the same difference in standard errors
    log_var: np.ndarray  # the logarithm of the measured variance over the running variance
    var_errors: np.ndarray  # its absolute value in standard errors
    # Whether they are farther than chance explains, and enough to matter.
    is_mean_far: np.ndarray
    is_var_far: np.ndarray

    @property
    def is_far(self) -> np.ndarray:
        """Whether mean or variance is far off, by feature."""
        return self.is_mean_far | self.is_var_far


class Evidence(NamedTuple):
    """All that is known about one norm, with features flattened."""

    path: str  # the path of the norm in ``batch_stats``
    features: tuple[int, ...]  # the shape of its statistics
    is_initial: bool  # whether its running statistics are the initial ones
    mean: np.ndarray  # the running mean
    var: np.ndarray  # the running variance
    scale: np.ndarray | None
    epsilon: float
    trained: Measurement | None  # measurements in training, if there were values
    evaluated: Measurement | None  # measurements in evaluation, if there were values
    # What its calls in evaluation took and returned, if they are found in the program.
    calls: Calls | None
    has_bad_input: np.ndarray  # whether something that is not masked is not finite
    sites: tuple[Site, ...]  # its calls in the program
    in_training: Distance | None  # the distance from the statistics in training
    in_evaluation: Distance | None  # the distance from the statistics in evaluation
    # The relative standard error of the variance that training normalizes by.
    var_error: float | None
    # The number of examples in a ghost batch, if training normalizes by parts of the batch.
    ghost_size: int | None
    empty_domains: tuple[int, ...]  # the domains without a value in the batch

    @property
    def is_stale(self) -> bool:
        """Whether its statistics are far off both in training and in evaluation."""
        both = (self.in_training, self.in_evaluation)
        return all(distance is not None and distance.is_far.any() for distance in both)

    def feature(self, index: int) -> str:
        """Returns how a message calls a feature, after the word."""
        indices = np.unravel_index(index, self.features) if self.features else (0,)
        return str(indices[0]) if len(indices) == 1 else str(tuple(map(int, indices)))

    def list_features(self, chosen: np.ndarray) -> str:
        """Returns how a message calls some features: the first four, and how many there are."""
        indices = np.flatnonzero(chosen)
        names = ", ".join(map(self.feature, indices[:4])) + (", ..." if len(indices) > 4 else "")
        noun = "feature" if len(indices) == 1 else "features"
        return f"{noun} {names} ({len(indices)} of {chosen.size})"

    def as_layer(self) -> Layer:
        """Returns the row of the report."""
        distance = self.in_training or self.in_evaluation
        if distance and self.in_evaluation:
            # Only a norm that is far off in both modes is stale: show the mode that agrees more.
            distance = min(distance, self.in_evaluation, key=lambda each: each.is_far.sum())
        batch = self.trained or self.evaluated
        saturation = self.calls.saturation if self.calls else None
        layer = Layer(
            path=self.path,
            features=math.prod(self.features),
            values=None if batch is None else int(batch.values.max()),
            running_mean=self.mean.reshape(self.features),
            running_var=self.var.reshape(self.features),
            batch_mean=None if batch is None else batch.mean.reshape(self.features),
            batch_var=None if batch is None else batch.var.reshape(self.features),
            mean_off=None,
            mean_errors=None,
            var_off=None,
            var_errors=None,
            var_error=self.var_error,
            saturated=None if saturation is None else float(saturation.share),
            is_found=bool(self.sites),
        )
        if distance is None:
            return layer
        log_var = np.abs(distance.log_var)
        return layer._replace(
            mean_off=float(distance.mean.max()),
            mean_errors=float(distance.mean_errors[distance.mean.argmax()]),
            var_off=float(np.exp(log_var.max())),
            var_errors=float(distance.var_errors[log_var.argmax()]),
        )


def collect_evidence(observed: Observations) -> list[Evidence]:
    """Returns the evidence on every norm, in the order of the program as far as it is known."""
    in_program = [site.path for site in observed.sites]
    paths = dict.fromkeys([*in_program, *observed.model.norms])
    params = leaves_by_path(observed.model.params)
    return [
        _evidence_on(path, observed, params.get(f"{path}/scale" if path else "scale"))
        for path in paths
    ]


def is_initial(norm: Mapping[str, Any]) -> bool:
    """Tells whether no batch has entered the running statistics of a norm, boxed or not.

    Their `count` is 0 in every feature; without one, the means are 0 and the variances are 1, or
    0 as Equinox and Haiku initialize them.
    """
    if "count" in norm:
        (count,) = jax.device_get(jax.tree.leaves(norm["count"]))
        return not np.any(count)
    (mean,), (var,) = (jax.device_get(jax.tree.leaves(norm[name])) for name in ("mean", "var"))
    return not np.any(mean) and (bool(np.all(var == 1)) or not np.any(var))


def _evidence_on(path: str, observed: Observations, scale: Any) -> Evidence:
    norm = observed.model.norms[path]
    attributes = observed.attributes.get(path, Attributes())
    mean, var = flat(norm["mean"]), flat(norm["var"])
    calls = observed.calls.get(path)
    trained, evaluated = observed.trained.get(path), observed.evaluated.get(path)
    has_bad_input = _has_bad_input(trained, evaluated, calls, mean.size)
    empty_domains = _empty_domains(attributes.num_domains, trained, evaluated)
    if empty_domains:
        by_domain = has_bad_input.reshape(attributes.num_domains or 1, -1)
        by_domain[list(empty_domains)] = False
    trained, evaluated = _if_any_value(trained), _if_any_value(evaluated)
    noise = None if evaluated is None else _noise(evaluated, calls, observed.examples)

    def distance_from(measured: Measurement | None) -> Distance | None:
        if measured is None or noise is None:
            return None
        return _distance(mean, var, measured, noise, attributes.epsilon)

    # Statistics of 0 may also be those of an input that is 0 throughout.
    batch = trained or evaluated
    is_zero = batch is not None and not (var.any() or batch.mean.any() or batch.var.any())
    ghost_size = attributes.virtual_batch_size
    if ghost_size is not None and ghost_size >= observed.examples:
        ghost_size = None
    share = 1.0 if ghost_size is None else ghost_size / observed.examples
    return Evidence(
        path=path,
        features=np.shape(norm["mean"]),
        is_initial=is_initial(cast(Mapping[str, Any], norm)) and not is_zero,
        mean=mean,
        var=var,
        scale=None if scale is None else flat(scale),
        epsilon=attributes.epsilon,
        trained=trained,
        evaluated=evaluated,
        calls=calls,
        has_bad_input=has_bad_input,
        sites=tuple(site for site in observed.sites if site.path == path),
        in_training=distance_from(trained),
        in_evaluation=distance_from(evaluated),
        var_error=_var_error(evaluated, noise, share),
        ghost_size=ghost_size,
        empty_domains=empty_domains,
    )


def _empty_domains(
    number: int | None, trained: Measurement | None, evaluated: Measurement | None
) -> tuple[int, ...]:
    """Returns the domains of which the batch has no value, in none of the modes."""
    measured = [each.values.reshape(number, -1) for each in (trained, evaluated) if each and number]
    if not measured:
        return ()
    has_values = np.any([values.any(1) for values in measured], 0)
    return tuple(map(int, np.flatnonzero(~has_values)))


def _if_any_value(measured: Measurement | None) -> Measurement | None:
    return measured if measured is not None and measured.values.any() else None


# --- errors and distances -----------------------------------------------------------------------


def _noise(measured: Measurement, calls: Calls | None, examples: int) -> Noise:
    """Estimates how far the statistics of a batch are from those of all batches.

    Positions of an example resemble each other. So the mean of a batch is a mean of as many
    independent values as there are examples, and so is its variance. The errors are never less than
    those of independent values. Where examples cannot be told apart, or some are masked, they are
    those of one value per example.
    """
    independent = np.maximum(np.minimum(measured.values, examples), 1)
    mean_error = np.sqrt(measured.var / independent)
    var_error = np.sqrt((ASSUMED_KURTOSIS - 1) / independent)
    is_unmasked = calls is not None and np.all(measured.values == calls.values)
    if calls is not None and is_unmasked and len(calls.means) > 1:
        root = math.sqrt(len(calls.means))
        square = calls.squares.mean(0)
        mean_error = calls.means.std(0, ddof=1) / root
        spread = calls.squares.std(0, ddof=1) / root
        var_error = np.divide(spread, square, out=np.zeros_like(square), where=square > 0)
    return Noise(
        np.maximum(mean_error, np.sqrt(measured.var / np.maximum(measured.values, 1))),
        np.maximum(var_error, _least_var_error(measured.values)),
    )


def _least_var_error(values: np.ndarray) -> np.ndarray:
    """Returns the relative standard error of the variance of independent normal values."""
    return np.sqrt(2 / np.maximum(values - 1, 0.5))


def _distance(
    mean: np.ndarray, var: np.ndarray, measured: Measurement, noise: Noise, epsilon: float
) -> Distance:
    """Compares running statistics with measured ones.

    The difference has the noise of both. That of a running average is at most that of one batch
    with the running variance.
    """
    is_known = (measured.values > 0) & np.isfinite(mean) & np.isfinite(var) & (var >= 0)
    var = np.where(is_known, var, 1)
    difference = np.where(is_known, np.abs(measured.mean - mean), 0)
    deviation = np.sqrt(np.minimum(var, measured.var) + epsilon)
    log_var = np.where(is_known, np.log((measured.var + epsilon) / (var + epsilon)), 0)
    tiny = np.finfo(np.float64).tiny
    mean_errors = difference / np.maximum(noise.mean * np.sqrt(1 + np.exp(-log_var)), tiny)
    var_errors = np.abs(log_var) / (math.sqrt(2) * noise.var)
    limit = FAR_ERRORS + math.sqrt(2 * math.log(mean.size))
    in_deviations = difference / deviation
    # A feature that is constant in this batch may be one that few examples have.
    varies = measured.var > epsilon
    return Distance(
        mean=in_deviations,
        mean_errors=mean_errors,
        log_var=log_var,
        var_errors=var_errors,
        is_mean_far=(in_deviations >= FAR_MEAN) & (mean_errors >= limit),
        is_var_far=varies & (np.abs(log_var) >= math.log(FAR_VAR)) & (var_errors >= limit),
    )


def _var_error(measured: Measurement | None, noise: Noise | None, share: float) -> float | None:
    """Returns the relative standard error of a variance by which training normalizes.

    The `share` is that of the batch from which the variance is taken.
    """
    if measured is None or noise is None:
        return None
    varies = measured.var > 0
    if not varies.any():
        return None
    errors = np.maximum(noise.var / math.sqrt(share), _least_var_error(measured.values * share))
    return float(np.median(errors[varies]))


# --- input that is not finite -------------------------------------------------------------------


def _has_bad_input(
    trained: Measurement | None,
    evaluated: Measurement | None,
    calls: Calls | None,
    features: int,
) -> np.ndarray:
    """Tells for each feature whether something that is not masked is not finite.

    A norm measures no value of a feature that is not finite, but also none that is masked as a
    whole; the input, where it is known, tells both apart.
    """
    in_training = _without_values(trained, features)
    in_evaluation = _without_values(evaluated, features)
    if calls is None:
        return in_training | in_evaluation
    if evaluated is None or not evaluated.is_called:
        return in_training | ~calls.finite_input
    return in_evaluation & ~calls.finite_input | in_training & ~in_evaluation


def _without_values(measured: Measurement | None, features: int) -> np.ndarray:
    if measured is None or not measured.is_called:
        return np.zeros(features, bool)
    return np.asarray(measured.values == 0)
