"""Claim 8: batch norm allows larger learning rates."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import PERCENT, band
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import WITH_AND_WITHOUT, ScannedMLP
from bn_jax.lab.experiments.selection import (
    Outcome,
    RateSweep,
    choose,
    largest_rate,
    last_place,
    sweep_rates,
)
from bn_jax.lab.experiments.sweeps import (
    Part,
    Trial,
    accuracy,
    cross_entropy,
    draw_trials,
    init_model,
    sweep,
    train,
)
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    Experiment,
    Result,
    Series,
    Setting,
    SubClaim,
)
from bn_jax.lab.models import Norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, BATCH_SIZE = 24, 32
DEPTHS = 4, 8, 32
SHALLOW, DEEPER, DEEPEST = DEPTHS
RATES = np.geomspace(1e-2, 1e2, 9)
STEPS, EVERY, QUICK_STEPS = 300, 50, 100
# A rate is stable if its training ends with a validation accuracy of at least twice chance. A
# network that has diverged or died stays at chance, which is a tenth.
STABLE = 0.2
# How much smaller a matched small rate is than the largest rate that is stable without a norm.
SMALLER = 3
# Generalization is compared at equal losses on so many training examples, if it has been learned.
MEASURED, LEARNED = 256, 1.0
POINTS = 1.0
# Activations are followed from the initial weights, over a few steps at this rate.
LARGE_RATE, FEW_STEPS, FOLLOWED = 1.0, 3, 16
TENFOLD = 10.0
# What has overflowed.
HUGE = 1e30


def growth(setting: Setting, depth: int, norm: Norm | None) -> Any:
    """Follows the activations of a network over its first steps at a large rate.

    Args:
        setting: the seeds, and the size of the run.
        depth: the number of hidden layers.
        norm: the norm of the network.

    Returns:
        The root mean square of the input of each activation, before the first step and after each
        step, [seeds, steps + 1, layers].
    """
    model = ScannedMLP(depth, WIDTH, setting.num_classes, norm)

    def run(rate: jax.Array, trial: Trial) -> Any:
        part = trial.digits.train

        def observe(variables: Any) -> jax.Array:
            _, sown = model.apply(
                variables, part.x, train=True, mutable=["intermediates", "batch_stats"]
            )
            (inputs,) = sown["intermediates"]["preactivation"]
            return jnp.sqrt(jnp.mean(inputs**2, (1, 2)))

        variables = init_model(model, trial)
        return train(model, optax.sgd(rate), variables, part, trial.batches, observe).observed

    trials = draw_trials(setting, FEW_STEPS, BATCH_SIZE)
    return np.asarray(sweep(run, [LARGE_RATE], trials))[0]


def largest_stable(validation: Any, stable: float = STABLE) -> Any:
    """Finds the largest stable rate.

    Args:
        validation: accuracies, [rates, seeds].
        stable: the least accuracy of a stable rate.

    Returns:
        The index of that rate for each seed, [seeds]; -1 where no rate is stable.
    """
    return last_place(np.asarray(validation) >= stable)


class Curves(NamedTuple):
    """A training at every `EVERY` steps.

    Attributes:
        loss: on the first `MEASURED` training examples, [..., points].
        test: the accuracy on the test part, [..., points].
    """

    loss: Any
    test: Any


def train_arm(norm: Norm | None, depth: int, trials: Trial, num_classes: int) -> RateSweep[Curves]:
    """Trains a network at every rate and seed.

    Args:
        norm: the norm of the network.
        depth: the number of hidden layers.
        trials: the trials of all seeds.
        num_classes: the number of classes.

    Returns:
        The accuracies, and the course of each training, [rates, seeds, points].
    """
    model = ScannedMLP(depth, WIDTH, num_classes, norm)

    def run(rate: jax.Array, trial: Trial) -> Outcome[Curves]:
        digits = trial.digits
        measured = Part(digits.train.x[:MEASURED], digits.train.y[:MEASURED])

        def observe(variables: Any) -> Curves:
            logits, _ = model.apply(variables, measured.x, train=False, mutable=["batch_stats"])
            test = accuracy(model, variables, digits.test)
            return Curves(cross_entropy(logits, measured.y), test)

        variables = init_model(model, trial)
        trained = train(
            model, optax.sgd(rate), variables, digits.train, trial.batches, observe, EVERY
        )
        validation = accuracy(model, trained.variables, digits.validation)
        return Outcome(validation, trained.observed)

    return sweep_rates(run, RATES, trials)


def at_equal_loss(curves: Curves) -> Any:
    """Finds the test accuracies of some arms when their training losses were equal.

    Args:
        curves: of the arms, [arms, seeds, points].

    Returns:
        The accuracy of each arm when it first had the lowest loss that all arms reach, between
        two points interpolated by the logarithm of the loss, [arms, seeds]. NaN where that loss
        is above `LEARNED`.
    """
    losses = np.nan_to_num(np.asarray(curves.loss, np.float64), nan=HUGE, posinf=HUGE)
    tests = np.asarray(curves.test, np.float64)
    target = losses.min(-1).max(0)
    place = (losses <= target[..., None]).argmax(-1)
    before = np.maximum(place - 1, 0)

    def at(values: Any, index: Any) -> Any:
        return np.take_along_axis(values, index[..., None], -1)[..., 0]

    high, low = np.log(at(losses, before)), np.log(at(losses, place))
    share = np.where(high > low, (high - np.log(target)) / np.maximum(high - low, 1e-12), 1.0)
    found = at(tests, before) + share * (at(tests, place) - at(tests, before))
    return np.where(target <= LEARNED, found, np.nan)


class Comparison(NamedTuple):
    """The arms of one depth compared, [seeds].

    Attributes:
        ratios: the ratios of the largest stable rates, with norm over without; NaN where no rate
            is stable.
        at_least: the same, where no rate is stable without norm the least that it can be: as if
            the smallest rate were.
        gaps: the test accuracies at equal losses and the matched small rate, with norm minus
            without, in points; NaN where no rate is stable without, or the loss is too large.
    """

    ratios: Any
    at_least: Any
    gaps: Any


def compare(arms: Mapping[str, RateSweep[Curves]], stable: float = STABLE) -> Comparison:
    """Compares the arms of one depth.

    Args:
        arms: the trainings of each arm.
        stable: as of `largest_stable`.
    """
    largest = {arm: largest_stable(arms[arm].validation, stable) for arm in WITH_AND_WITHOUT}
    with_norm, without = largest["batch norm"], largest["no norm"]
    steps_down = round(np.log(SMALLER) / np.log(RATES[1] / RATES[0]))
    small = np.maximum(without - steps_down, 0)
    matched = [choose(RATES, small, arms[arm].measured).measured for arm in WITH_AND_WITHOUT]
    accuracies = at_equal_loss(jax.tree.map(lambda *leaves: np.stack(leaves), *matched))
    # Rates a decade apart are ten times as large, and not a rounding less.
    at_least = np.round(RATES[with_norm] / RATES[np.maximum(without, 0)], 9)
    at_least = np.where(with_norm < 0, np.nan, at_least)
    gaps = np.where(without < 0, np.nan, 100 * (accuracies[0] - accuracies[1]))
    return Comparison(np.where(without < 0, np.nan, at_least), at_least, gaps)


def explosion(activations: Any) -> Any:
    """Returns the largest root mean square of any layer after a step, over that before, [seeds].

    Args:
        activations: as of `growth`, [seeds, steps + 1, layers].
    """
    finite = np.nan_to_num(np.asarray(activations, np.float64), nan=HUGE, posinf=HUGE)
    return np.minimum(finite[:, 1:].max((1, 2)), HUGE) / finite[:, 0].max(-1)


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    activations = {arm: growth(setting, FOLLOWED, norm) for arm, norm in WITH_AND_WITHOUT.items()}
    setting.advance(0.1)
    trials = draw_trials(setting, QUICK_STEPS if setting.quick else STEPS, BATCH_SIZE)
    depths = (SHALLOW, DEEPER) if setting.quick else DEPTHS
    swept: dict[int, dict[str, RateSweep[Curves]]] = {depth: {} for depth in depths}
    for depth in depths:
        for arm, norm in WITH_AND_WITHOUT.items():
            swept[depth][arm] = train_arm(norm, depth, trials, setting.num_classes)
            setting.advance(0.9 * depth / (2 * sum(depths)))
    level = setting.level(STABLE)
    compared = {depth: compare(arms, level) for depth, arms in swept.items()}
    return Result(
        values={
            "8a": {f"depth {depth}": compared[depth].ratios for depth in (SHALLOW, DEEPER)},
            "8b": compared[depths[-1]].at_least / compared[SHALLOW].ratios,
            "8c": explosion(activations["no norm"]),
            "8d": compared[SHALLOW].gaps,
        },
        curves={
            "rates": RATES,
            "stable": level,
            "accuracy": {
                f"{arm}, depth {depth}": of_arm.measured.test[..., -1]
                for depth, arms in swept.items()
                for arm, of_arm in arms.items()
            },
            "activations": {arm: values[:, -1].T for arm, values in activations.items()},
            "start": {arm: values[:, 0].T for arm, values in activations.items()},
        },
        series=_series(swept, activations, level),
        rates={
            f"{arm}, depth {depth}": of_arm.best_for_each_seed().rate
            for depth, arms in swept.items()
            for arm, of_arm in arms.items()
        },
    )


def _series(
    swept: Mapping[int, Mapping[str, RateSweep[Curves]]],
    activations: Mapping[str, Any],
    level: float,
) -> list[Series]:
    """Returns the largest stable rates, where one is, and the growth of activations."""
    series = [Series("8c", arm, "", explosion(values)) for arm, values in activations.items()]
    for depth, arms in swept.items():
        for arm, of_arm in arms.items():
            stable = largest_rate(RATES, of_arm.validation >= level)
            series.append(Series("8a", arm, f"depth {depth}", stable))
            best = of_arm.best_for_each_seed().measured.test[..., -1]
            series.append(Series("8b", f"{arm}, accuracy at its best", f"depth {depth}", best))
    return series


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws accuracy by learning rate, and activations by layer after a few large steps."""
    by_rate, by_layer = figure.subplots(1, 2)
    depths = sorted({int(arm.rsplit(" ", 1)[1]) for arm in curves["accuracy"]})
    for name, values in curves["accuracy"].items():
        arm, depth = name.rsplit(", depth ", 1)
        band(
            by_rate,
            curves["rates"],
            100 * np.asarray(values, float),
            name,
            within=PERCENT,
            color=f"C{list(WITH_AND_WITHOUT).index(arm)}",
            linestyle=("-", "--", ":")[depths.index(int(depth))],
        )
    by_rate.axhline(100 * curves["stable"], color="gray", linewidth=0.8)
    by_rate.set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)", ylim=(0, 142))
    by_rate.set_yticks(range(0, 101, 20))
    by_rate.legend(fontsize="x-small", loc="upper center", ncols=2)
    for position, arm in enumerate(WITH_AND_WITHOUT):
        for key, style in {"start": ":", "activations": "-"}.items():
            values = np.asarray(curves[key][arm], float)
            when = "before training" if key == "start" else f"after {FEW_STEPS} steps"
            layers = np.arange(1, len(values) + 1)
            # One seed that overflows would hide all others.
            middle = np.median(np.nan_to_num(values, nan=HUGE, posinf=HUGE), -1)
            color, label = f"C{position}", f"{arm}, {when}"
            by_layer.plot(layers, middle, color=color, linestyle=style, label=label)
    by_layer.set(
        yscale="log",
        xlabel=f"layer of {FOLLOWED}",
        ylabel=f"root mean square of activations\nat rate {LARGE_RATE:g} (median)",
    )
    by_layer.legend(fontsize="small")


EXPERIMENT = Experiment(
    number=8,
    name="large_rates",
    claim="Batch norm allows larger learning rates, and generalizes no better at equal small ones",
    source="Bjorck et al. 2018",
    sub_claims=(
        SubClaim(
            "8a",
            "larger stable rates",
            "the largest stable learning rate is larger with batch norm",
            "largest stable rate, with norm over without",
            Above(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "8b",
            "the more the deeper",
            "the ratio of these rates grows with depth",
            f"the ratio at depth {DEEPEST} over that at depth {SHALLOW}",
            Above(1.0),
            reason="where no rate trains without a norm, the smallest rate stands for it",
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "8c",
            "activations explode",
            "without norm, activations explode in a few steps at a large rate",
            f"largest root mean square of a layer within {FEW_STEPS} steps at rate {LARGE_RATE:g}, "
            f"over that before, depth {FOLLOWED}",
            Above(1.0, size=TENFOLD),
            reason=f"ours: {TENFOLD:g} times",
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "8d",
            "small rates: no better",
            "at equal small rates and equal training loss, batch norm generalizes no better",
            f"test accuracy, with norm minus without, depth {SHALLOW} (points)",
            Below(POINTS),
            reason=f"ours: less than {POINTS:g} point better",
            is_resplit=True,
        ),
    ),
    protocol=(
        f"MLP of 4, 8 and 32 layers of {WIDTH} ReLU units on digits, {STEPS} steps of SGD at 9 "
        "rates from 1e-2 to 1e2; a rate is stable if the validation accuracy ends at twice chance "
        f"or more; the matched small rate is 1 / {SMALLER} of the largest stable one without norm"
    ),
    limits=(
        "Where the largest rate of the sweep is stable, the ratio is a lower bound. How long it "
        "trains decides what a small rate is. At depth 32, without residual connections, neither "
        "arm learns much in so few steps: a rate is stable where it learns at all."
    ),
    run=run,
    draw=draw,
    easy="That larger rates are stable, the more so the deeper, and that activations explode.",
    hard=(
        "The size of the ratio: no figure is published, and ours depends on depth. Networks that "
        "no rate trains without a norm give a lower bound only."
    ),
    data=Needs(trained=BATCH_SIZE),
)
