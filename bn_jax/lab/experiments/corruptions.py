"""Claim 4: statistics of corrupted inputs repair much of what the corruption breaks."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

import bn_jax as bn
from bn_jax.lab.experiments.digit_corruptions import (
    AFFINE,
    KINDS,
    MEDIUM,
    NOT_AFFINE,
    SEVERITIES,
    Corrupted,
    corrupt,
)
from bn_jax.lab.experiments.figures import PERCENT, band, means_and_errors
from bn_jax.lab.experiments.nets import BATCH_NORM, MLP, NO_EPSILON
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.selection import choose
from bn_jax.lab.experiments.statistics import relative_error
from bn_jax.lab.experiments.sweeps import (
    Part,
    State,
    Trial,
    init_model,
    load_digits,
    make_step,
    start,
    take,
    with_batches,
)
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    ChosenRate,
    Experiment,
    Identity,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
)
from bn_jax.lab.models import PlainBlock, ResNet
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = 64, 64
BATCH_SIZE = 64
RATE = 0.05
EXAMPLES = 8, 32, 128
PRIORS = 0, 16, 64, 256
# What mixing is compared with: the same few examples without prior.
FEW, PRIOR = EXAMPLES[0], PRIORS[1]
STREAM = 32
WAYS = "as trained", "adapted"
ENTROPY_STEPS = 20
ENTROPY_RATES = 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0
TOLERANCE = 1e-10


class Images(nn.Module):
    """A model of images whose input is rows of 64 pixels."""

    model: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits."""
        return self.model(x.reshape(-1, 8, 8, 1), train)


MODELS: dict[str, nn.Module] = {
    "MLP": MLP(WIDTHS, norm=BATCH_NORM),
    "CNN": Images(ResNet(10, stage_sizes=(1,), widths=(8,), block=PlainBlock, norm=BATCH_NORM)),
}


def train_all(model: nn.Module, setting: Setting, steps: int) -> Any:
    """Trains once for every seed; returns the variables, with a leading axis [seeds]."""
    trials = with_batches(setting, load_digits(setting.chosen), steps, BATCH_SIZE)
    optimizer = optax.sgd(RATE, momentum=0.9)

    @jax.jit
    def begin(trial: Trial) -> State:
        return start(optimizer, init_model(model, trial))

    # Convolutions inside a loop that XLA compiles for a CPU are several times slower.
    @jax.jit
    def step(state: State, part: Part, batch: Any) -> State:
        return make_step(model, optimizer, part)(state, batch)[0]

    trained = []
    for index in range(setting.seeds):
        trial = jax.device_put(take(trials, index))
        state = begin(trial)
        for batch in trials.batches[index]:
            state = step(state, trial.digits.train, batch)
        trained.append(jax.device_get(state.variables))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trained)


@lru_cache
def _forward(name: str) -> Callable[[Any, Any], Any]:
    """Returns a function that evaluates one of `MODELS` on sets with separate statistics."""

    def of_set(params: Any, batch_stats: Any, x: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        return MODELS[name].apply(variables, x, train=False, mutable=["batch_stats"])

    apply = jax.jit(jax.vmap(of_set, (None, 0, 0)))
    return lambda variables, x: apply(variables["params"], variables["batch_stats"], x)


def adapted_errors(
    name: str, variables: Any, x: Any, y: Any, prior: float | None
) -> npt.NDArray[np.float64]:
    """Evaluates models after mixing their statistics with those of the images.

    Args:
        name: a name in `MODELS`.
        variables: the variables of every seed, [seeds, ...].
        x: images in sets, each adapted to separately, [seeds, sets, n, 64].
        y: labels [seeds, sets, n].
        prior: the share of the old statistics; None: no adaptation.

    Returns:
        The share of wrong answers, [seeds, sets].
    """
    forward = _forward(name)

    def of_seed(variables: Any, x: Any, y: Any) -> Any:
        repeated = jax.tree.map(
            lambda leaf: np.repeat(leaf[None], len(x), 0), variables["batch_stats"]
        )
        adapted = {**variables, "batch_stats": repeated}
        if prior is not None:
            adapted["batch_stats"] = bn.recalibrate(forward, adapted, [x], prior=prior).batch_stats
        logits, _ = forward(adapted, x)
        return np.mean(np.argmax(logits, -1) != y, -1)

    return np.stack(
        [
            of_seed(take(variables, seed), images, labels)
            for seed, (images, labels) in enumerate(zip(x, y, strict=True))
        ]
    )


def affine_errors(variables: Any, x: Any) -> npt.NDArray[np.float64]:
    """Compares the answers to affinely corrupted images with those to clean ones, in float64.

    Norms use the statistics of the images, without epsilon.

    Args:
        variables: the variables of the MLP, [seeds, ...].
        x: images of every kind, [seeds, kinds, n, 64] float64.

    Returns:
        The largest differences of a logit, relative to the largest logit, [seeds].
    """
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        places = [0, *(KINDS.index(kind) for kind in AFFINE)]
        found = np.asarray(_exact_logits(variables, x[:, places]))
    return np.array([max(relative_error(one, clean) for one in affine) for clean, *affine in found])


@jax.jit
@partial(jax.vmap, in_axes=(0, 0))
@partial(jax.vmap, in_axes=(None, 0))
def _exact_logits(variables: Any, x: jax.Array) -> Any:
    """Returns logits [seeds, kinds, n, classes] by the statistics of each seed and kind."""
    model = MLP(WIDTHS, norm=partial(BatchNorm, epsilon=NO_EPSILON), dtype=jnp.float64)
    return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]


def entropy_errors(
    model: nn.Module, variables: Any, x: Any, y: Any, rates: Any
) -> npt.NDArray[np.float64]:
    """Trains scale and bias to lower the entropy of the predictions, as TENT does.

    Args:
        model: the network, called with `x` and `train`.
        variables: the variables of every seed, [seeds, ...].
        x: images of every seed and kind, [seeds, kinds, n, 64].
        y: labels [seeds, kinds, n].
        rates: the learning rates of every kind, [rates, kinds].

    Returns:
        The share of wrong answers, [rates, seeds, kinds].
    """

    def logits_of(params: Any, variables: Any, x: jax.Array) -> jax.Array:
        adapted = {**variables, "params": params}
        return model.apply(adapted, x, train=True, mutable=["batch_stats"])[0]

    def entropy(params: Any, variables: Any, x: jax.Array) -> jax.Array:
        log_shares = jax.nn.log_softmax(logits_of(params, variables, x))
        return -jnp.mean(jnp.sum(jnp.exp(log_shares) * log_shares, -1))

    def adapt(variables: Any, x: jax.Array, y: jax.Array, rate: jax.Array) -> jax.Array:
        of_norms = bn.optim.norm_params_mask(variables["params"])

        def step(params: Any, _: None) -> tuple[Any, None]:
            gradients = jax.grad(entropy)(params, variables, x)
            moved = jax.tree.map(
                lambda leaf, gradient, is_norm: leaf - rate * gradient * is_norm,
                params,
                gradients,
                of_norms,
            )
            return moved, None

        params, _ = jax.lax.scan(step, variables["params"], None, length=ENTROPY_STEPS)
        return jnp.mean(jnp.argmax(logits_of(params, variables, x), -1) != y)

    def of_seed(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        def at(rates_of_kinds: jax.Array) -> Any:
            return map_runs(partial(adapt, variables), x, y, rates_of_kinds)

        return jax.lax.map(at, jnp.asarray(rates))

    return np.moveaxis(np.asarray(map_runs(of_seed, variables, x, y), np.float64), 1, 0)


def choose_entropy_rates(variables: Any, seeds: Any) -> dict[str, ChosenRate]:
    """Chooses a rate of `entropy_errors` for each severity, on corrupted validation images."""
    severities = [corrupt(seeds, index, "validation") for index in range(len(SEVERITIES))]
    x = np.concatenate([of_one.x[:, NOT_AFFINE] for of_one in severities], 1)
    y = np.broadcast_to(severities[0].y[:, None], x.shape[:3])
    rates = np.tile(np.array(ENTROPY_RATES)[:, None], x.shape[1])
    errors = entropy_errors(MODELS["MLP"], variables, x, y, rates)
    by_severity = np.split(errors.mean(1), len(SEVERITIES), 1)
    return {
        severity: choose(ENTROPY_RATES, of_one.mean(1).argmin(), of_one).rate
        for severity, of_one in zip(SEVERITIES, by_severity, strict=True)
    }


def in_sets(corrupted: Corrupted, size: int, ordered: bool = False) -> tuple[Any, Any]:
    """Cuts the first examples of every kind into sets.

    Args:
        corrupted: [seeds, kinds, n, 64].
        size: the number of examples in each set.
        ordered: whether to sort them by class first, as a stream of one class after another.

    Returns:
        Images [seeds, kinds * sets, size, 64] and labels [seeds, kinds * sets, size].
    """
    x, y = corrupted
    number = max(EXAMPLES) // size
    y = np.broadcast_to(y[:, None], x.shape[:3])[:, :, : number * size]
    x = x[:, :, : number * size]
    if ordered:
        order = np.argsort(y, -1, kind="stable")
        x, y = np.take_along_axis(x, order[..., None], 2), np.take_along_axis(y, order, 2)
    kinds = x.shape[1]
    return x.reshape(len(x), kinds * number, size, -1), y.reshape(len(x), kinds * number, size)


def _by_kind(errors: Any) -> Any:
    """Returns the mean over the sets of each kind, [seeds, kinds]."""
    return errors.reshape(len(errors), len(KINDS), -1).mean(-1)


def measure_grid(variables: Any, corrupted: Corrupted, sizes: Sequence[int]) -> Any:
    """Measures the mean error over the corruptions that are not affine, after adaptation.

    Args:
        variables: the variables of the MLP, [seeds, ...].
        corrupted: the images.
        sizes: n, the numbers of examples to adapt to at a time.

    Returns:
        The error for each of `sizes`, `PRIORS` and seeds, [n, N, seeds].
    """

    def error(size: int, prior: int) -> Any:
        x, y = in_sets(corrupted, size)
        errors = adapted_errors("MLP", variables, x, y, prior / (prior + size))
        return _by_kind(errors)[:, NOT_AFFINE].mean(-1)

    return np.asarray([[error(size, prior) for prior in PRIORS] for size in sizes])


class Measured(NamedTuple):
    """The shares of wrong answers at one severity, [seeds, kinds] each.

    Attributes:
        as_trained: by model, without adaptation.
        adapted: by model, with the statistics of all images of a kind.
        few: of the MLP, adapted to `FEW` examples at a time.
        mixed: the same with a prior.
        shuffled: of the MLP, adapted to `STREAM` examples at a time.
        by_class: the same, with the examples sorted by class.
        entropy: of the MLP, with scale and bias trained on entropy.
    """

    as_trained: dict[str, Any]
    adapted: dict[str, Any]
    few: Any
    mixed: Any
    shuffled: Any
    by_class: Any
    entropy: Any


def measure(corrupted: Corrupted, variables: Mapping[str, Any], entropy: Any) -> Measured:
    """Measures the errors of trained models in all arms.

    Args:
        corrupted: images and labels.
        variables: of each model, [seeds, ...].
        entropy: the errors of the arm of this name.
    """
    x = corrupted.x
    y = np.broadcast_to(corrupted.y[:, None], x.shape[:3])
    mlp = variables["MLP"]

    def whole(prior: float | None) -> dict[str, Any]:
        return {name: adapted_errors(name, variables[name], x, y, prior) for name in MODELS}

    def parts(size: int, prior: int = 0, ordered: bool = False) -> Any:
        sets = in_sets(corrupted, size, ordered)
        return _by_kind(adapted_errors("MLP", mlp, *sets, prior / (prior + size)))

    return Measured(
        as_trained=whole(None),
        adapted=whole(0.0),
        few=parts(FEW),
        mixed=parts(FEW, PRIOR),
        shuffled=parts(STREAM),
        by_class=parts(STREAM, ordered=True),
        entropy=entropy,
    )


def compare(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Returns the quantities of the sub-claims except for the exact one, [seeds].

    Args:
        measured: by severity.
    """

    def changed(new: str, old: str) -> dict[str, Any]:
        def errors(of_one: Measured, name: str) -> Any:
            found = getattr(of_one, name)
            return (found["MLP"] if name in ("as_trained", "adapted") else found)[:, NOT_AFFINE]

        return {
            severity: 100 * (errors(of_one, new) - errors(of_one, old)).mean(-1)
            for severity, of_one in measured.items()
        }

    return {
        "4a": {
            f"{name}, {severity}": reduction(of_one.as_trained[name], of_one.adapted[name])
            for severity, of_one in measured.items()
            for name in MODELS
        },
        "4c": changed("mixed", "few"),
        "4d": changed("entropy", "adapted"),
        "4e": changed("by_class", "shuffled"),
        "4f": changed("by_class", "as_trained"),
    }


def reduction(before: Any, after: Any) -> Any:
    """Returns the share of the error over corruptions that are not affine that is taken away.

    Args:
        before: errors [seeds, kinds].
        after: errors [seeds, kinds].
    """
    return 1 - after[:, NOT_AFFINE].mean(-1) / before[:, NOT_AFFINE].mean(-1)


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    sizes = EXAMPLES[:1] if setting.quick else EXAMPLES
    variables = {}
    for name, model in MODELS.items():
        variables[name] = train_all(model, setting, 60 if setting.quick else 200)
        setting.advance(0.25)
    mlp = variables["MLP"]
    exact = [corrupt(setting.chosen, index, dtype=np.float64) for index in range(len(SEVERITIES))]
    corrupted = [of_one._replace(x=of_one.x.astype(np.float32)) for of_one in exact]
    affine = {
        severity: affine_errors(mlp, of_one.x)
        for severity, of_one in zip(SEVERITIES, exact, strict=True)
    }
    rates = choose_entropy_rates(mlp, setting.chosen)
    x = np.concatenate([of_one.x for of_one in corrupted], 1)
    y = np.broadcast_to(corrupted[0].y[:, None], x.shape[:3])
    of_kinds = np.repeat([rate.value for rate in rates.values()], len(KINDS))
    entropy = entropy_errors(MODELS["MLP"], mlp, x, y, of_kinds[None])[0]
    setting.advance(0.1)
    measured = {}
    for severity, images, of_entropy in zip(
        SEVERITIES, corrupted, np.split(entropy, len(SEVERITIES), 1), strict=True
    ):
        measured[severity] = measure(images, variables, of_entropy)
        setting.advance(0.1)
    grid = measure_grid(mlp, corrupted[MEDIUM], sizes)
    setting.advance(0.1)
    return Result(
        values={"4b": affine, **compare(measured)},
        curves={
            "kinds": KINDS,
            "errors": {
                f"{name}, {way}": getattr(measured[SEVERITIES[MEDIUM]], field)[name]
                for name in MODELS
                for way, field in zip(WAYS, ("as_trained", "adapted"), strict=True)
            },
            "by severity": _by_severity(measured),
            "sizes": sizes,
            "grid": grid,
        },
        series=[
            series for severity, of_one in measured.items() for series in _series(severity, of_one)
        ],
        rates={f"entropy (TENT), {severity}": rate for severity, rate in rates.items()},
    )


def _arms(measured: Measured) -> dict[str, tuple[str, Any]]:
    """Returns the key of a sub-claim and the errors [seeds, kinds] of each arm."""
    return {
        **{f"{name}, as trained": ("4a", of_one) for name, of_one in measured.as_trained.items()},
        **{f"{name}, adapted": ("4a", of_one) for name, of_one in measured.adapted.items()},
        f"MLP, adapted to {FEW}": ("4c", measured.few),
        f"MLP, adapted to {FEW}, prior {PRIOR}": ("4c", measured.mixed),
        "MLP, adapted by entropy too": ("4d", measured.entropy),
        f"MLP, adapted to {STREAM}": ("4e", measured.shuffled),
        f"MLP, adapted to {STREAM} by class": ("4e", measured.by_class),
    }


def _series(severity: str, measured: Measured) -> list[Series]:
    return [
        Series(key, arm, f"{kind}, {severity}, error (%)", 100 * errors[:, index])
        for arm, (key, errors) in _arms(measured).items()
        for index, kind in enumerate(KINDS)
    ]


def _by_severity(measured: Mapping[str, Measured]) -> dict[str, list[Any]]:
    """Returns by arm of the MLP the mean error where it is not affine, [severities, seeds]."""
    arms = [arm for arm in _arms(measured[SEVERITIES[0]]) if arm.startswith("MLP")]
    return {
        arm: [_arms(of_one)[arm][1][:, NOT_AFFINE].mean(-1) for of_one in measured.values()]
        for arm in arms
    }


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the errors by corruption, by severity, and by number of examples and prior."""
    by_kind, by_severity, by_prior = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    positions = np.arange(len(curves["kinds"]))
    shifts = np.linspace(-0.3, 0.3, 4)
    labels = [f"{name}, {way}" for name in MODELS for way in WAYS]
    for shift, label in zip(shifts, labels, strict=True):
        errors = curves["errors"][label]
        means, bars = means_and_errors(100 * np.transpose(errors))
        by_kind.bar(positions + shift, means, 0.19, yerr=bars, label=label)
    by_kind.set_xticks(positions, curves["kinds"], rotation=40, ha="right")
    by_kind.set(
        ylabel=f"test error, {SEVERITIES[MEDIUM]} (%)", ylim=(0, 130), yticks=range(0, 101, 20)
    )
    for arm, errors in curves["by severity"].items():
        places = np.arange(len(SEVERITIES))
        band(by_severity, places, 100 * np.asarray(errors), arm, within=PERCENT, marker=".")
    by_severity.set_xticks(np.arange(len(SEVERITIES)), SEVERITIES)
    by_severity.set(ylabel="test error, not affine (%)", ylim=(0, 130), yticks=range(0, 101, 20))
    for size, errors in zip(curves["sizes"], curves["grid"], strict=True):
        values = 100 * np.asarray(errors)
        band(by_prior, np.arange(len(PRIORS)), values, f"n = {size}", within=PERCENT, marker=".")
    by_prior.set_xticks(np.arange(len(PRIORS)), [str(prior) for prior in PRIORS])
    by_prior.set(xlabel="pseudo-examples N from training")
    by_prior.set_ylabel(f"test error, not affine, {SEVERITIES[MEDIUM]} (%)")
    by_kind.legend(fontsize="x-small", ncols=2, loc="upper right")
    by_severity.legend(fontsize="xx-small", ncols=1, loc="upper left")
    by_prior.legend(fontsize="x-small")


def _change(key: str, label: str, statement: str, what: str, bound: Above | Below) -> SubClaim:
    return SubClaim(
        key,
        label,
        statement,
        f"change of the error of the MLP on corruptions that are not affine, {what} (points)",
        bound,
        is_resplit=True,
    )


EXPERIMENT = Experiment(
    number=4,
    name="corruptions",
    claim="Statistics of the corrupted inputs repair much of what a corruption breaks",
    source="Li et al. 2016 (AdaBN); Schneider et al. 2020; Wang et al. 2021 (TENT)",
    sub_claims=(
        SubClaim(
            "4a",
            "new statistics",
            "statistics of the corrupted images take away a part of the error",
            "share of the error on corruptions that are not affine that adaptation takes away",
            Above(0.0),
            Published("mCE 76.7 -> 62.2 (ImageNet-C)", "R"),
            is_resplit=True,
        ),
        SubClaim(
            "4b",
            "affine corruptions",
            "with statistics of the corrupted images, affine corruptions change nothing",
            "relative error of the logits of the MLP",
            Identity(TOLERANCE),
            Published("BN(a x + b) = BN(x)", "D"),
        ),
        _change(
            "4c",
            "mixing with few images",
            "where images are few, mixing their statistics with those of training is better",
            f"n = {FEW} at a time, N = {PRIOR} instead of 0",
            Below(0.0),
        ),
        _change(
            "4d",
            "entropy adds to it",
            "lowering the entropy of the predictions takes away more of the error",
            "TENT instead of new statistics alone",
            Below(0.0),
        )._replace(published=Published("49.9 -> 44.0 (ImageNet-C)", "R")),
        _change(
            "4e",
            "sorted by class",
            "adaptation is worse where images come sorted by class",
            f"{STREAM} at a time, sorted by class instead of shuffled",
            Above(0.0),
        ),
        _change(
            "4f",
            "sorted: worse than none",
            "where images come sorted by class, adaptation is worse than none",
            f"adapted to {STREAM} at a time, sorted by class, instead of as trained",
            Above(0.0),
        ),
    ),
    protocol=(
        "digits with ten corruptions, two of them affine, in three severities; MLP 64-64-64-10 and "
        "a small CNN, adapted to all test images at once; the MLP also to n = 8, 32, 128 at a time "
        "with N = 0 to 256, statistics (N m_s + n m_t) / (N + n), to images sorted by class, and "
        "with scale and bias trained on entropy in 20 steps, at the rate that is best on "
        "validation images of the same severity"
    ),
    limits=(
        "8x8 images have few corruptions that resemble ImageNet-C's. Affine corruptions vanish in "
        "the MLP alone: a convolution pads the images with zeros, which the corruption does not "
        "change."
    ),
    run=run,
    draw=draw,
    easy=(
        "Affine corruptions vanish to rounding, and new statistics help both networks at every "
        "severity."
    ),
    hard=("That entropy adds to it: by half a point or less, with a rate for each severity."),
)
