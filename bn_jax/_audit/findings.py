"""The findings of an audit: one function for each kind, in the order of `FINDERS`."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax._audit.evidence import FAR_VAR, Distance, Evidence
from bn_jax._audit.model import Model, leaves_by_path
from bn_jax._audit.report import Finding, named
from bn_jax._paths import format_path
from bn_jax._program import in_double, is_variable, value_of
from bn_jax.optim import norm_params_mask

# The share of features that dropout or lag shift at least. A single feature depends on the layers
# before it, whose running statistics are estimates too.
FAR_IN_EVALUATION = 0.2
# The error of nine independent normal values: in one batch of five, the variance is off by a factor
# of two or more. Wu & He 2018 show what batch norm loses with fewer.
LARGEST_VAR_ERROR = 0.5
# As a share of the median scale of a layer, divided by the number of features. Scales that start at
# 0 cross it again in training: of the smallest scales of layers, one in a thousand is below this.
DEAD_SCALE = 1e-3
# More than half of the values, for a bounded activation. For others more than a tenth of the units
# that pass no gradient for any example, because every trained network has a few of them.
MOST_SATURATED_VALUES = 0.5
MOST_SATURATED_UNITS = 0.1
# The least share of initial values in the running statistics that is reported, and how much of the
# statistics may be left unexplained by it.
LEAST_INITIAL_SHARE = 0.02
INITIAL_SHARE_FIT = 0.02


class Case(NamedTuple):
    """What the findings are about: a model, the evidence on its norms, and the mask for Optax."""

    model: Model
    norms: list[Evidence]
    weight_decay_mask: Any


# --- not finite ---------------------------------------------------------------------------------


def not_finite_variables(case: Case) -> Iterator[Finding]:
    """Finds parameters and running statistics that are not finite."""
    leaves = jax.tree.leaves_with_path(case.model.variables, is_leaf=is_variable)
    for keys, variable in leaves:
        leaf = value_of(variable)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        is_bad = ~np.isfinite(in_double(leaf))
        if is_bad.any():
            path = format_path(keys)
            inside = path.removeprefix("params/").removeprefix("batch_stats/")
            owner = inside.rpartition("/")[0]
            yield Finding(
                "not finite",
                owner if owner in case.model.norms and inside.count("/") else inside,
                f"{path}: {is_bad.sum()} of {is_bad.size} values are NaN or infinite.",
                "Restore a checkpoint from before that. bn.batch_norm keeps values that are not "
                "finite out of the running statistics; other libraries may have let them in.",
            )


def not_finite_inputs(case: Case) -> Iterator[Finding]:
    """Finds the first norm whose input is not finite."""
    affected = [norm for norm in case.norms if norm.has_bad_input.any()]
    if not affected:
        return
    first = affected[0]
    features = first.list_features(first.has_bad_input)
    if first.calls is None:
        message = f"No input value is valid and finite in {features}, unless the mask leaves none."
    else:
        message = f"Its input is not finite in {features}."
    if affected[1:]:
        message += f" The same holds for {_counted(len(affected) - 1, 'norm')} after it."
    yield Finding(
        "not finite",
        first.path,
        message,
        "Look at the layers before it, and at the batch: jax.config.update('jax_debug_nans', "
        "True) stops where it begins. Pass positions without data as mask=.",
    )


def not_finite_outputs(case: Case) -> Iterator[Finding]:
    """Finds norms whose output is not finite although their input is."""
    for norm in case.norms:
        if norm.calls is None:
            continue
        is_bad = norm.calls.finite_input & ~norm.calls.finite_output
        if is_bad.any():
            yield Finding(
                "not finite",
                norm.path,
                f"Its output is not finite in {norm.list_features(is_bad)}, though its input is.",
                "Its scale, bias or running statistics are not finite or too large for the dtype "
                "of the result: restore them, or pass dtype=jnp.float32.",
            )


# --- running statistics -------------------------------------------------------------------------


def never_updated(case: Case) -> Iterator[Finding]:
    """Finds norms whose running statistics are the initial ones."""
    for norm in case.norms:
        if norm.is_initial:
            unfreeze = " (if it is frozen, unfreeze it first)" if norm.trained is None else ""
            yield Finding(
                "never updated",
                norm.path,
                f"{_about_initial(norm)}.",
                "Train with train=True and keep the updates that the model returns (in NNX call "
                f"model.train()), or measure them{unfreeze}: {case.model.advice}",
            )


def stale(case: Case) -> Iterator[Finding]:
    """Finds norms whose running statistics are far from the batch's in both modes."""
    for norm in case.norms:
        if norm.is_stale and not norm.is_initial:
            yield Finding(
                "stale",
                norm.path,
                _about_stale(norm),
                "Parameters, data or preprocessing have changed since the statistics were measured,"
                f" or there were too few updates. Measure them again: {case.model.advice}",
            )


def differs_in_evaluation(case: Case) -> Iterator[Finding]:
    """Finds norms whose running statistics are far from the batch's in evaluation alone."""
    if any(norm.is_initial or norm.is_stale for norm in case.norms):
        # Norms after these take another input in evaluation for that reason.
        return
    for norm in case.norms:
        distance = norm.in_evaluation
        if distance is not None and distance.is_far.mean() > FAR_IN_EVALUATION:
            yield Finding(
                "differs in evaluation",
                norm.path,
                "In training its running statistics are those of the batch, in evaluation they are "
                f"not. {_about_distance(norm, distance)}",
                "Something before it behaves differently in evaluation, as dropout does, or a "
                f"running average lags. Measure in evaluation: {case.model.advice}",
            )


def _about_initial(norm: Evidence) -> str:
    batch = _batch_beside(norm)
    initial = "Its running statistics are the initial ones, mean 0 and variance"
    if not np.any(norm.mean) and np.all(norm.var == 1):
        return f"{initial} 1{batch}: evaluation does not normalize"
    if not np.any(norm.mean) and not np.any(norm.var):
        return (
            f"{initial} 0, as of a model of Equinox or Haiku that was not trained{batch}: "
            f"evaluation multiplies by {norm.epsilon**-0.5:.3g}, 1 / sqrt(epsilon)"
        )
    return f"No batch has entered its running statistics: their count is 0{batch}"


def _batch_beside(norm: Evidence) -> str:
    batch = norm.trained or norm.evaluated
    if batch is None:
        return ""
    mean, var = (values[batch.values > 0] for values in (np.abs(batch.mean), batch.var))
    if mean.size == 1:
        return f", those of the batch are {batch.mean[batch.values > 0][0]:.3g} and {var[0]:.3g}"
    return (
        f", the batch has means of up to {mean.max():.3g} and variances of {var.min():.3g} to "
        f"{var.max():.3g}"
    )


def _about_stale(norm: Evidence) -> str:
    assert norm.in_training is not None
    message = _about_distance(norm, norm.in_training)
    share = _initial_share(norm)
    if share is not None:
        return (
            f"{message} They are those of the batch with {share:.0%} of the initial mean 0 and "
            "variance 1 in them: too few updates for the momentum."
        )
    if _are_deviations(norm):
        return (
            f"{message} All are the square roots of the batch's: standard deviations in the place "
            "of variances."
        )
    return message


def _about_distance(norm: Evidence, distance: Distance) -> str:
    """Returns a sentence for the means that are far off, and one for the variances."""
    measured = norm.trained if distance is norm.in_training else norm.evaluated
    assert measured is not None
    sentences = []
    if distance.is_mean_far.any():
        worst = _worst(distance.is_mean_far, distance.mean)
        sentences.append(
            f"Its running means {_far_in(norm, distance.is_mean_far, worst)} "
            f"{norm.mean[worst]:.3g}, not {measured.mean[worst]:.3g}, which is "
            f"{distance.mean[worst]:.2g} standard deviations or "
            f"{distance.mean_errors[worst]:.2g} standard errors."
        )
    if distance.is_var_far.any():
        worst = _worst(distance.is_var_far, np.abs(distance.log_var))
        factor = math.exp(abs(distance.log_var[worst]))
        sentences.append(
            f"Its running variances {_far_in(norm, distance.is_var_far, worst)} "
            f"{norm.var[worst]:.3g}, not {measured.var[worst]:.3g}, a factor of {factor:.2g} or "
            f"{distance.var_errors[worst]:.2g} standard errors."
        )
    return " ".join(sentences)


def _far_in(norm: Evidence, is_far: np.ndarray, worst: int) -> str:
    subject = f"feature {norm.feature(worst)}" if is_far.sum() > 1 else "it"
    return f"are far from the batch's in {norm.list_features(is_far)}: {subject} has"


def _worst(is_far: np.ndarray, severity: np.ndarray) -> int:
    return int(np.where(is_far, severity, -1).argmax())


def _are_deviations(norm: Evidence) -> bool:
    """Tells whether the running variances are standard deviations, as some converters store them.

    Their squares are those of the batch in every feature, which says something only if they differ.
    """
    batch = norm.trained
    if batch is None or not np.all(norm.var > 0):
        return False
    is_known = batch.var > norm.epsilon
    if not is_known.any():
        return False
    running, measured = np.log(norm.var[is_known]), np.log(batch.var[is_known])
    differ = np.ptp(running) > 2 * math.log(FAR_VAR)
    return bool(differ and np.all(np.abs(2 * running - measured) < math.log(FAR_VAR)))


def _initial_share(norm: Evidence) -> float | None:
    """Returns the share of initial values in the running statistics, if that explains them.

    It solves ``mean = (1 - share) * batch_mean``, ``var - 1 = (1 - share) * (batch_var - 1)`` by
    least squares.
    """
    if norm.trained is None or norm.mean.size < 4:
        return None
    batch = np.concatenate([np.real(norm.trained.mean), norm.trained.var - 1])
    running = np.concatenate([np.real(norm.mean), norm.var - 1])
    weight = float(batch @ running / max(batch @ batch, np.finfo(np.float64).tiny))
    unexplained = np.sum((running - weight * batch) ** 2)
    fits = unexplained <= INITIAL_SHARE_FIT * np.sum(running**2)
    return 1 - weight if fits and LEAST_INITIAL_SHARE < 1 - weight < 1 else None


# --- one norm -----------------------------------------------------------------------------------


def normalizes_by_batch(norm: Evidence) -> Iterator[Finding]:
    """Finds a norm that uses statistics of the batch in evaluation."""
    if norm.evaluated is not None and norm.evaluated.by_batch.any():
        yield Finding(
            "normalizes by the batch",
            norm.path,
            "Evaluation normalizes by the batch: the output for an example depends on the other "
            "examples in the batch.",
            "Pass the mode to the layer: BatchNorm(use_running_average=not train)(x); in NNX "
            "leave use_running_average out of the call, so that model.eval() sets it.",
        )


def dead_scales(norm: Evidence) -> Iterator[Finding]:
    """Finds scales near 0 where others are not.

    A layer all of whose scales are 0, as the last of a residual branch starts, is healthy.
    """
    if norm.scale is None or norm.scale.size != norm.mean.size:
        return
    size = np.abs(norm.scale)
    median = np.median(size)
    is_dead = size < DEAD_SCALE / size.size * min(median, 1)
    if is_dead.any():
        yield Finding(
            "dead features",
            norm.path,
            f"The scale of {norm.list_features(is_dead)} is {size[is_dead].max():.2g} at most, "
            f"against a median of {median:.2g}: only the bias is passed on.",
            "Exclude scales from weight decay (mask=bn.optim.no_weight_decay_mask), and set these "
            "to 1 again, or remove the features.",
        )


def constant_features(norm: Evidence) -> Iterator[Finding]:
    """Finds variances under epsilon, in the running statistics and in the batch."""
    batch_var = norm.var
    if norm.evaluated is not None:
        batch_var = np.where(norm.evaluated.values > 0, norm.evaluated.var, np.inf)
    is_constant = (norm.var < norm.epsilon) & (batch_var < norm.epsilon)
    if is_constant.any():
        yield Finding(
            "dead features",
            norm.path,
            f"The variance of {norm.list_features(is_constant)} is "
            f"{norm.var[is_constant].max():.2g} at most, under epsilon={norm.epsilon:.2g}: "
            "practically constant.",
            "Find out why the input is constant (weights that decayed, dead units), or scale it "
            "up; epsilon should not determine the normalization.",
        )


def bias_without_effect(norm: Evidence) -> Iterator[Finding]:
    """Finds a bias that is added directly before a norm."""
    if norm.trained is None or not norm.trained.by_batch.any():
        return
    for bias in sorted({site.bias for site in norm.sites if site.bias is not None}):
        yield Finding(
            "bias without effect",
            norm.path,
            f"The bias {bias!r} directly before it has no effect: the norm subtracts the mean.",
            "Make the layer before it with use_bias=False; to keep outputs of evaluation as they "
            "are, subtract the bias from the running mean.",
        )


def small_batch(norm: Evidence) -> Iterator[Finding]:
    """Finds a norm whose variance in training is a poor estimate."""
    if norm.var_error is None or norm.var_error <= LARGEST_VAR_ERROR:
        return
    if norm.ghost_size is None:
        batch = "the batch"
        advice = (
            "Train with a larger batch, synchronize over devices with axis_name='data', or use "
            "GroupNorm. (If training takes more examples than you passed, pass as many.)"
        )
    else:
        batch = f"each ghost batch of {norm.ghost_size} examples"
        advice = "Raise virtual_batch_size or leave it out, or use GroupNorm."
    values = 1 + 2 / norm.var_error**2
    yield Finding(
        "small batch",
        norm.path,
        f"The variance of {batch} is as uncertain as that of {values:.1f} independent values, "
        f"{norm.var_error:.0%} of itself.",
        advice,
    )


def domain_without_examples(norm: Evidence) -> Iterator[Finding]:
    """Finds the domains of a norm of which the batch has no example."""
    if not norm.empty_domains:
        return
    domains = ", ".join(map(str, norm.empty_domains))
    noun = "domain" if len(norm.empty_domains) == 1 else "domains"
    yield Finding(
        "domain without examples",
        norm.path,
        f"The batch has no example of {noun} {domains}, whose statistics were not examined.",
        "Pass a batch with examples of every domain. If training has none either, the statistics "
        "stay those that the domain started from: copy another domain's with split_batch_norms.",
    )


def saturated(norm: Evidence) -> Iterator[Finding]:
    """Finds a norm after which an activation passes no gradient back."""
    if norm.calls is None or not norm.calls.finite_output.all():
        return
    saturation = norm.calls.saturation
    # With statistics that are wrong, evaluation does not normalize, but training may.
    if saturation is None or norm.is_initial or norm.is_stale:
        return
    limit = MOST_SATURATED_VALUES if saturation.is_bounded else MOST_SATURATED_UNITS
    if saturation.share <= limit:
        return
    if saturation.is_bounded:
        what = f"{saturation.share:.0%} of the values after it are where the activation is flat"
    else:
        what = f"{saturation.share:.0%} of the units after it are zero or flat for the whole batch"
    yield Finding(
        "saturated",
        norm.path,
        f"{what}, so that no gradient comes back.",
        "Look at its scale and bias and at the learning rate: they have moved the mean of 0 and "
        "the variance of 1.",
    )


def redundant_scale(norm: Evidence) -> Iterator[Finding]:
    """Finds a scale and bias that all consumers of the output could hold."""
    if not norm.sites or any(site.takers is None or not site.params for site in norm.sites):
        return
    takers = sorted({path for site in norm.sites for path in site.takers or ()})
    params = sorted({path for site in norm.sites for path in site.params})
    yield Finding(
        "redundant scale",
        norm.path,
        f"{_listed(params)} can be left out: its output goes directly and only into "
        f"{_listed(map(named, takers))}, which can do the same.",
        "Make it with use_scale=False, use_bias=False (keep the bias if the next layer has none "
        "or pads its input); a trained model can be folded with bn.fold.",
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


# --- weight decay -------------------------------------------------------------------------------


def weight_decay(case: Case) -> Iterator[Finding]:
    """Finds scales and biases of norms to which weight decay applies, by the mask for Optax."""
    mask = case.weight_decay_mask
    if mask is None:
        return
    decays = leaves_by_path(mask(case.model.params) if callable(mask) else mask)
    is_of_norm = leaves_by_path(norm_params_mask(case.model.params, case.model.batch_stats))
    norm_params = [path for path, of_norm in is_of_norm.items() if of_norm]
    applies = {path: _at_or_around(path, decays) for path in norm_params}
    if norm_params and all(decay is None for decay in applies.values()):
        raise ValueError(
            f"weight_decay_mask covers no parameter of a norm: expected leaves at "
            f"{_listed(norm_params)} or around them, received "
            f"{_listed(decays) if decays else 'none'}. Pass a tree in the structure "
            "of params, or a function of them: weight_decay_mask=bn.optim.no_weight_decay_mask."
        )
    decaying: dict[str, list[str]] = {}
    for path, decay in applies.items():
        if decay:
            norm, _, name = path.rpartition("/")
            decaying.setdefault(norm, []).append(name)
    for norm, names in decaying.items():
        yield Finding(
            "weight decay",
            norm,
            f"Weight decay applies to its {_listed(names)}.",
            "Pass the mask that excludes them: optax.adamw(..., "
            "mask=bn.optim.no_weight_decay_mask).",
        )


def _at_or_around(path: str, leaves: Mapping[str, Any]) -> Any:
    """Returns the leaf at a path, or the nearest one around it; None where there is none."""
    while path not in leaves and path:
        path = path.rpartition("/")[0]
    return leaves.get(path)


# The findings come in this order. The next kind is one row more, and one name in `report.Kind`.
# The norms are examined one after another, each for all kinds of `NORM_FINDERS`.
NORM_FINDERS: tuple[Callable[[Evidence], Iterator[Finding]], ...] = (
    normalizes_by_batch,
    dead_scales,
    constant_features,
    bias_without_effect,
    small_batch,
    domain_without_examples,
    saturated,
    redundant_scale,
)


def faults_of_single_norms(case: Case) -> Iterator[Finding]:
    """Finds the kinds of `NORM_FINDERS` in each norm."""
    for norm in case.norms:
        for find in NORM_FINDERS:
            yield from find(norm)


FINDERS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    not_finite_variables,
    not_finite_inputs,
    not_finite_outputs,
    never_updated,
    stale,
    differs_in_evaluation,
    faults_of_single_norms,
    weight_decay,
)
