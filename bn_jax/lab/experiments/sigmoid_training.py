"""Claim 7: batch norm trains in fewer steps, and makes sigmoid units usable."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import MLP
from bn_jax.lab.experiments.sweeps import Part, draw_batches, load_digits, sweep, train
from bn_jax.lab.experiments.verdicts import (
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
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS, BATCH_SIZE = (100, 100, 100), 60
NORMS: Mapping[str, Norm | None] = {
    "batch norm": partial(BatchNorm, momentum=0.9),
    "no norm": None,
}
# Glorot's, and small random values that let every layer shrink what comes in.
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
        setting: the seeds.
        norm: of the network.
        steps: of each training, a multiple of `EVERY`.

    Returns:
        For each of `INITIALIZERS`, at the start and after every `EVERY` steps: "accuracy" on the
        validation part, [rates, seeds, points], and "inputs", the `QUANTILES` over that part of
        what comes into the first unit of the last hidden layer, [rates, seeds, points, 3].
    """
    digits = load_digits(setting.chosen)
    rows = draw_batches(setting.chosen, digits.train.x.shape[1], steps, BATCH_SIZE)
    models = [
        MLP(WIDTHS, norm=norm, activation=nn.sigmoid, kernel_init=initializer)
        for initializer in INITIALIZERS.values()
    ]

    def observe(part: Part, variables: Any) -> dict[str, jax.Array]:
        logits, sown = models[0].apply(variables, part.x, train=False, mutable=["intermediates"])
        inputs = sown["intermediates"]["preactivation"][-1][:, 0]
        right = (jnp.argmax(logits, -1) == part.y) & jnp.isfinite(logits).all(-1)
        return {
            "accuracy": jnp.mean(right.astype(jnp.float32)),
            "inputs": jnp.quantile(inputs, jnp.array(QUANTILES)),
        }

    def run(rate: Any, seed: Any, parts: Any, rows: Any) -> Any:
        key, example = jax.random.key(seed), parts.train.x[:1]
        initial = [model.init(key, example, train=False) for model in models]
        look = partial(observe, parts.validation)

        def from_one(variables: Any) -> Any:
            optimizer = optax.sgd(rate)
            return train(models[0], optimizer, variables, parts.train, rows, look, EVERY).observed

        return jax.vmap(from_one)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *initial))

    found = jax.tree.map(np.asarray, sweep(run, RATES, setting.chosen, digits, rows))
    return {
        name: {key: values[:, :, place] for key, values in found.items()}
        for place, name in enumerate(INITIALIZERS)
    }


def steps_to_goal(accuracies: Any) -> Any:
    """Counts the steps until the goal is first seen to be reached.

    Args:
        accuracies: at the start and after every `EVERY` steps, [..., points].

    Returns:
        [...]; where it is not reached, infinity.
    """
    reached = np.asarray(accuracies) >= GOAL
    return np.where(reached.any(-1), reached.argmax(-1) * EVERY, np.inf)


def compare(accuracies: Mapping[str, Any], horizon: int) -> tuple[Any, Any, dict[str, int]]:
    """Compares the arms from one initialization.

    Args:
        accuracies: of each arm, [rates, seeds, points].
        horizon: steps of each training, which count where an arm without norm does not arrive.

    Returns:
        The ratios of the steps without norm over those with, each at its best rate, and both at
        the rate that is best without, [seeds]; and the index of each arm's best rate, that of the
        best accuracies over training where none arrives. Not a number where the arm with norm does
        not arrive.
    """
    steps = {arm: steps_to_goal(values) for arm, values in accuracies.items()}
    counted = {arm: np.minimum(values, horizon) for arm, values in steps.items()}
    best = {
        arm: int(np.lexsort((-accuracies[arm].mean((1, 2)), np.log(values).mean(1)))[0])
        for arm, values in counted.items()
    }
    with_norm, without = NORMS
    slow = counted[without][best[without]]
    fast = np.where(np.isfinite(steps[with_norm]), steps[with_norm], np.nan)
    return slow / fast[best[with_norm]], slow / fast[best[without]], best


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    horizon = 200 if setting.quick else 1000
    by_arm = {}
    for arm, norm in NORMS.items():
        by_arm[arm] = train_arm(setting, norm, horizon)
        setting.advance(1 / len(NORMS))
    found = {name: {arm: by_arm[arm][name] for arm in NORMS} for name in INITIALIZERS}
    criteria: list[Criterion] = []
    reported: dict[str, Interval] = {}
    curves: dict[str, Any] = {}
    for name, arms in found.items():
        steps = {arm: steps_to_goal(values["accuracy"]) for arm, values in arms.items()}
        at_best, at_same, best = compare(
            {arm: values["accuracy"] for arm, values in arms.items()}, horizon
        )
        reported |= _reported(name, arms, steps, best)
        criteria += [
            Criterion(
                f"steps to 95 %, without over with, {which}, {name}",
                "14 on ImageNet",
                ratio_interval(ratio),
                at_least=1.0,
            )
            for which, ratio in {
                "best rate against best rate": at_best,
                "same rate, best without": at_same,
            }.items()
        ]
        curves |= {
            f"{arm}, {name}": {
                "accuracy": values["accuracy"][best[arm], :, :].T,
                "inputs": values["inputs"][best[arm], 0],
                "steps": np.minimum(steps[arm], horizon),
            }
            for arm, values in arms.items()
        }
    return Result(
        criteria=tuple(criteria),
        curves={"arms": curves, "rates": RATES, "horizon": horizon},
        reported=reported,
    )


def _reported(name: str, arms: Any, steps: Any, best: Any) -> dict[str, Interval]:
    reported: dict[str, Interval] = {}
    for arm in arms:
        where = f"{arm}, {name}"
        inputs = arms[arm]["inputs"][best[arm]]
        reported |= {
            f"{where}: best rate": exact(RATES[best[arm]]),
            f"{where}: share of trainings at it that arrive (%)": exact(
                100 * np.isfinite(steps[arm][best[arm]]).mean()
            ),
            f"{where}: rates at which all arrive": exact(np.isfinite(steps[arm]).all(1).sum()),
            f"{where}: how far the median of a unit's input wanders, in its final widths": (
                mean_interval(wandering(inputs))
            ),
        }
    return reported


def wandering(inputs: Any) -> Any:
    """Measures how far the median of a unit's input moves over training.

    Args:
        inputs: its 15th, 50th and 85th percentile along training, [seeds, points, 3].

    Returns:
        The range of the median over the final distance of the outer percentiles, [seeds].
    """
    low, median, high = np.moveaxis(np.asarray(inputs), -1, 0)
    return np.ptp(median, axis=-1) / (high - low)[:, -1]


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws steps by rate, accuracies at the best rates, and a unit's input over training."""
    by_rate, by_step, *inputs = figure.subplots(1, 4)
    for name, arm in curves["arms"].items():
        color = f"C{[name.startswith(one) for one in NORMS].index(True)}"
        style = "-" if "good" in name else "--"
        band(by_rate, curves["rates"], arm["steps"], name, color=color, linestyle=style)
        accuracy = 100 * np.asarray(arm["accuracy"], float)
        steps = EVERY * np.arange(len(accuracy))
        band(by_step, steps, accuracy, name, color=color, linestyle=style)
        if "good" in name:
            axes = inputs.pop(0)
            quantiles = np.asarray(arm["inputs"], float)
            for quantile, values in zip(QUANTILES, quantiles.T, strict=True):
                width = 2 if quantile == 0.5 else 1
                axes.plot(steps, values, color=color, linewidth=width)
            axes.set(
                xscale="symlog",
                xlim=(0, curves["horizon"]),
                xlabel="step",
                title=f"{name},\none unit of the last layer",
                ylabel="15th, 50th and 85th percentile of its input",
            )
            axes.title.set_fontsize("small")
    by_rate.set(
        xscale="log",
        yscale="log",
        ylim=(EVERY, 2 * curves["horizon"]),
        xlabel="learning rate",
        ylabel=f"steps to {100 * GOAL:g} % (at most {curves['horizon']})",
    )
    by_step.axhline(100 * GOAL, color="gray", linestyle=":")
    by_step.set(
        xscale="symlog",
        xlim=(0, curves["horizon"]),
        ylim=(0, 100),
        xlabel="step at the best rate",
        ylabel="validation accuracy (%)",
    )
    by_rate.legend(frameon=False, fontsize="x-small")


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
