"""Claim 7: batch norm trains in fewer steps, and makes sigmoid units usable."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import MLP, WITH_AND_WITHOUT
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.selection import Chosen, choose
from bn_jax.lab.experiments.sweeps import (
    Part,
    Trial,
    draw_trials,
    share_correct,
    sweep,
    train,
)
from bn_jax.lab.experiments.verdicts import (
    ChosenRate,
    Criterion,
    Experiment,
    Interval,
    Result,
    Setting,
    exact,
    mean_interval,
    ratio_interval,
)
from bn_jax.lab.models import Norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTHS, BATCH_SIZE = (100, 100, 100), 60
# Glorot's initializer, and small random values with which every layer shrinks its input.
INITIALIZERS = {
    "good initialization": nn.initializers.glorot_normal(),
    "poor initialization": nn.initializers.normal(0.01),
}
RATES = 0.3, 1.0, 3.0, 10.0
GOAL = 0.95
EVERY = 5
QUANTILES = 0.15, 0.5, 0.85


def train_arm(setting: Setting, norm: Norm | None, steps: int) -> dict[str, dict[str, Any]]:
    """Trains from every initialization with every rate.

    Args:
        setting: the seeds, and the size of the run.
        norm: the norm of the network.
        steps: the number of steps of each training, a multiple of `EVERY`.

    Returns:
        For each of `INITIALIZERS`, at the start and after every `EVERY` steps: "accuracy" on the
        validation part, [rates, seeds, points], and "inputs", the `QUANTILES` over that part of the
        input of the first unit in the last hidden layer, [rates, seeds, points, 3].
    """
    models = [
        MLP(WIDTHS, norm=norm, activation=nn.sigmoid, kernel_init=initializer)
        for initializer in INITIALIZERS.values()
    ]

    def observe(part: Part, variables: Any) -> dict[str, jax.Array]:
        logits, sown = models[0].apply(variables, part.x, train=False, mutable=["intermediates"])
        inputs = sown["intermediates"]["preactivation"][-1][:, 0]
        return {
            "accuracy": share_correct(logits, part.y),
            "inputs": jnp.quantile(inputs, jnp.array(QUANTILES)),
        }

    def run(rate: jax.Array, trial: Trial) -> Any:
        digits = trial.digits
        key, example = jax.random.key(trial.seed), digits.train.x[:1]
        initial = [model.init(key, example, train=False) for model in models]

        def train_from(variables: Any) -> Any:
            return train(
                models[0],
                optax.sgd(rate),
                variables,
                digits.train,
                trial.batches,
                observe=partial(observe, digits.validation),
                every=EVERY,
            ).observed

        return map_runs(train_from, jax.tree.map(lambda *leaves: jnp.stack(leaves), *initial))

    trials = draw_trials(setting.chosen, steps, BATCH_SIZE)
    observed = jax.tree.map(np.asarray, sweep(run, RATES, trials))
    return {
        name: {key: values[:, :, place] for key, values in observed.items()}
        for place, name in enumerate(INITIALIZERS)
    }


def steps_to_goal(accuracies: Any) -> Any:
    """Counts the steps until an observation first reaches the goal.

    Args:
        accuracies: at the start and after every `EVERY` steps, [..., points].

    Returns:
        [...]; infinity where the goal is not reached.
    """
    reached = np.asarray(accuracies) >= GOAL
    return np.where(reached.any(-1), reached.argmax(-1) * EVERY, np.inf)


class Comparison(NamedTuple):
    """Both arms compared from one initialization.

    Attributes:
        at_best: the steps without norm over those with, each arm at its best rate, [seeds].
        at_same: the same, both arms at the rate that is best without norm, [seeds].
        best: the index of the best rate of each arm.
    """

    at_best: Any
    at_same: Any
    best: dict[str, int]


def best_rate(accuracies: Any, horizon: int) -> int:
    """Returns the index of the rate with which training reaches the goal in the fewest steps.

    Args:
        accuracies: [rates, seeds, points].
        horizon: the steps of each training, which count where it does not reach the goal.

    Returns:
        The index of the smallest geometric mean of steps; between equals, of the largest mean
        accuracy over training.
    """
    counted = np.minimum(steps_to_goal(accuracies), horizon)
    return int(np.lexsort((-accuracies.mean((1, 2)), np.log(counted).mean(1)))[0])


def compare(accuracies: Mapping[str, Any], horizon: int) -> Comparison:
    """Compares the arms from one initialization.

    Args:
        accuracies: the accuracies of each arm, [rates, seeds, points].
        horizon: the steps of each training, which count where an arm without norm does not reach
            the goal.

    Returns:
        The comparison; its ratios are not-a-number where the arm with norm does not reach the goal.
    """
    best = {arm: best_rate(values, horizon) for arm, values in accuracies.items()}
    steps = {arm: steps_to_goal(values) for arm, values in accuracies.items()}
    slow = np.minimum(steps["no norm"], horizon)[best["no norm"]]
    fast = np.where(np.isfinite(steps["batch norm"]), steps["batch norm"], np.nan)
    return Comparison(slow / fast[best["batch norm"]], slow / fast[best["no norm"]], best)


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    horizon = 200 if setting.quick else 1000
    trained = {}
    for arm, norm in WITH_AND_WITHOUT.items():
        trained[arm] = train_arm(setting, norm, horizon)
        setting.advance(1 / len(WITH_AND_WITHOUT))
    criteria: list[Criterion] = []
    reported: dict[str, Interval] = {}
    curves: dict[str, Any] = {}
    rates: dict[str, ChosenRate] = {}
    for initial in INITIALIZERS:
        arms = {arm: trained[arm][initial] for arm in WITH_AND_WITHOUT}
        comparison = compare({arm: values["accuracy"] for arm, values in arms.items()}, horizon)
        criteria += _criteria(initial, comparison)
        for arm, values in arms.items():
            name = f"{arm}, {initial}"
            steps = steps_to_goal(values["accuracy"])
            chosen = choose(RATES, comparison.best[arm], {**values, "steps": steps})
            reported |= _reported(name, chosen, steps)
            rates[name] = chosen.rate
            curves[name] = {
                "accuracy": chosen.measured["accuracy"].T,
                "inputs": chosen.measured["inputs"][0],
                "steps": np.minimum(steps, horizon),
            }
    return Result(
        criteria=tuple(criteria),
        curves={"arms": curves, "rates": RATES, "horizon": horizon},
        reported=reported,
        rates=rates,
    )


def _criteria(initial: str, comparison: Comparison) -> list[Criterion]:
    ratios = {
        "best rate against best rate": comparison.at_best,
        "same rate, best without": comparison.at_same,
    }
    return [
        Criterion(
            f"steps to 95 %, without over with, {which}, {initial}",
            "14 on ImageNet",
            ratio_interval(ratio),
            at_least=1.0,
        )
        for which, ratio in ratios.items()
    ]


def _reported(name: str, chosen: Chosen[dict[str, Any]], steps: Any) -> dict[str, Interval]:
    """Reports figures of an arm and initialization.

    Args:
        name: the names of both.
        chosen: the measurements at the best rate.
        steps: the number of steps to the goal at every rate, [rates, seeds].
    """
    arrived = np.isfinite(chosen.measured["steps"]).mean()
    return {
        f"{name}: best rate": exact(chosen.rate.value),
        f"{name}: share of trainings at it that arrive (%)": exact(100 * arrived),
        f"{name}: rates at which all arrive": exact(np.isfinite(steps).all(1).sum()),
        f"{name}: how far the median of a unit's input wanders, in its final widths": (
            mean_interval(wandering(chosen.measured["inputs"]))
        ),
    }


def wandering(inputs: Any) -> Any:
    """Measures how far the median of a unit's input moves over training.

    Args:
        inputs: its 15th, 50th and 85th percentile during training, [seeds, points, 3].

    Returns:
        The range of the median over the final distance of the outer percentiles, [seeds].
    """
    low, median, high = np.moveaxis(np.asarray(inputs), -1, 0)
    return np.ptp(median, axis=-1) / (high - low)[:, -1]


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws steps by rate, accuracies at the best rates, and a unit's input over training."""
    by_rate, by_step, *inputs = figure.subplots(1, 4)
    horizon = curves["horizon"]
    for name, arm in curves["arms"].items():
        color = "C0" if name.startswith("batch norm") else "C1"
        style = "-" if "good" in name else "--"
        band(by_rate, curves["rates"], arm["steps"], name, color=color, linestyle=style)
        accuracy = 100 * np.asarray(arm["accuracy"], float)
        steps = EVERY * np.arange(len(accuracy))
        band(by_step, steps, accuracy, name, color=color, linestyle=style)
        if "good" in name:
            axes = inputs.pop(0)
            _draw_inputs(axes, steps, arm["inputs"], color)
            axes.set(xlim=(0, horizon), title=f"{name},\none unit of the last layer")
            axes.title.set_fontsize("small")
    by_rate.set(
        xscale="log",
        yscale="log",
        ylim=(EVERY, 2 * horizon),
        xlabel="learning rate",
        ylabel=f"steps to {100 * GOAL:g} % (at most {horizon})",
    )
    by_step.axhline(100 * GOAL, color="gray", linestyle=":")
    by_step.set(
        xscale="symlog",
        xlim=(0, horizon),
        ylim=(0, 100),
        xlabel="step at the best rate",
        ylabel="validation accuracy (%)",
    )
    by_rate.legend(fontsize="x-small")


def _draw_inputs(axes: "Axes", steps: Any, inputs: Any, color: str) -> None:
    """Draws quantiles of a unit's input, [points, 3], the median thicker."""
    for quantile, values in zip(QUANTILES, np.asarray(inputs, float).T, strict=True):
        axes.plot(steps, values, color=color, linewidth=2 if quantile == 0.5 else 1)
    axes.set(xscale="symlog", xlabel="step", ylabel="15th, 50th and 85th percentile of its input")


EXPERIMENT = Experiment(
    number=7,
    name="sigmoid_training",
    claim="Batch norm trains in fewer steps, and makes sigmoid units usable",
    source="Ioffe & Szegedy 2015",
    published="14 times fewer steps to the same accuracy on ImageNet (31.0 M to 2.1 M)",
    protocol=(
        "MLP 64-100-100-100-10 of sigmoid units on digits, batches of 60, SGD at 4 rates from 0.3 "
        "to 10, Glorot's initialization and deviation 0.01; steps to 95 % validation accuracy"
    ),
    limits=(
        "A training without norm that does not arrive counts with all of its steps, so that its "
        "ratio is a lower bound. Rates are chosen by the steps that are compared. Digits are small "
        "and learned soon: the published factor is that of another network on ImageNet."
    ),
    run=run,
    draw=draw,
)
