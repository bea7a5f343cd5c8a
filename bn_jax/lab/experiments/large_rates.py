"""Claim 8: batch norm allows larger learning rates."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import WITH_AND_WITHOUT, ScannedMLP
from bn_jax.lab.experiments.selection import RateSweep, choose, sweep_accuracies
from bn_jax.lab.experiments.sweeps import Trial, draw_trials, init_model, sweep, train
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Interval,
    Result,
    Setting,
    mean_interval,
    ratio_interval,
)
from bn_jax.lab.models import Norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, BATCH_SIZE = 32, 64
DEPTHS = 4, 8, 16
RATES = np.geomspace(1e-2, 1e2, 13)
# A rate is stable if its training ends with a validation accuracy of at least a half. Chance is a
# tenth, where a network that has diverged or died stays.
STABLE = 0.5
# How much smaller a matched small rate is than the largest rate that is stable without a norm.
SMALLER = 10
# Activations are followed from the initial weights, over a few steps at this rate.
LARGE_RATE, FEW_STEPS = 1.0, 3


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
    model = ScannedMLP(depth, WIDTH, norm=norm)

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

    trials = draw_trials(setting.chosen, FEW_STEPS, BATCH_SIZE)
    return np.asarray(sweep(run, [LARGE_RATE], trials))[0]


def largest_stable(validation: Any) -> Any:
    """Finds the largest stable rate.

    Args:
        validation: accuracies, [rates, seeds].

    Returns:
        The index of that rate for each seed, [seeds]; -1 where no rate is stable.
    """
    stable = np.asarray(validation) >= STABLE
    last = len(stable) - 1 - stable[::-1].argmax(0)
    return np.where(stable.any(0), last, -1)


class Comparison(NamedTuple):
    """The arms of one depth compared, [seeds]; not-a-number where no rate is stable.

    Attributes:
        ratios: the ratios of the largest stable rates, with norm over without.
        gaps: the test accuracies at the matched small rate, with norm minus without.
    """

    ratios: Any
    gaps: Any


def compare(arms: Mapping[str, RateSweep[Any]]) -> Comparison:
    """Compares the arms of one depth.

    Args:
        arms: the trainings of each arm, with the accuracies on the test part.
    """
    with_norm, without = arms["batch norm"], arms["no norm"]
    largest_with = largest_stable(with_norm.validation)
    largest_without = largest_stable(without.validation)
    steps_down = round(np.log(SMALLER) / np.log(RATES[1] / RATES[0]))
    small = np.maximum(largest_without - steps_down, 0)
    tests = [choose(arm.rates, small, arm.measured).measured for arm in (with_norm, without)]
    # Rates a decade apart are ten times as large, and not a rounding less.
    ratios = np.round(RATES[largest_with] / RATES[largest_without], 9)
    no_rate = (largest_with < 0) | (largest_without < 0)
    return Comparison(
        ratios=np.where(no_rate, np.nan, ratios),
        gaps=np.where(no_rate, np.nan, tests[0] - tests[1]),
    )


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    steps = 60 if setting.quick else 500
    depths = DEPTHS[:2] if setting.quick else DEPTHS
    activations = {arm: growth(setting, depths[-1], norm) for arm, norm in WITH_AND_WITHOUT.items()}
    setting.advance(0.1)
    swept: dict[int, dict[str, RateSweep[Any]]] = {depth: {} for depth in depths}
    for depth in depths:
        trials = draw_trials(setting.chosen, steps, BATCH_SIZE)
        for arm, norm in WITH_AND_WITHOUT.items():
            model = ScannedMLP(depth, WIDTH, norm=norm)
            swept[depth][arm] = sweep_accuracies(model, optax.sgd, RATES, trials)
            setting.advance(0.9 * depth / (2 * sum(depths)))
    return Result(
        criteria=tuple(
            criterion for depth in depths for criterion in _criteria(depth, compare(swept[depth]))
        ),
        curves={
            "rates": RATES,
            "accuracy": {
                f"{arm}, depth {depth}": of_arm.measured
                for depth, arms in swept.items()
                for arm, of_arm in arms.items()
            },
            "activations": {arm: values[:, -1].T for arm, values in activations.items()},
            "start": {arm: values[:, 0].T for arm, values in activations.items()},
        },
        reported=_reported(swept, activations),
        rates={
            f"{arm}, depth {depth}": of_arm.best_for_each_seed().rate
            for depth, arms in swept.items()
            for arm, of_arm in arms.items()
        },
    )


def _criteria(depth: int, comparison: Comparison) -> tuple[Criterion, Criterion]:
    return (
        Criterion(
            f"largest stable rate, depth {depth}, with norm over without",
            "large rates diverge without",
            ratio_interval(comparison.ratios),
            at_least=10.0,
        ),
        Criterion(
            f"test accuracy at a matched small rate, depth {depth}, with minus without",
            "no difference",
            mean_interval(comparison.gaps),
            at_least=-0.01,
            at_most=0.01,
        ),
    )


def _reported(
    swept: Mapping[int, Mapping[str, RateSweep[Any]]], activations: Mapping[str, Any]
) -> dict[str, Interval]:
    reported = {}
    for depth, arms in swept.items():
        with_norm, without = (
            arms[arm].best_for_each_seed().measured for arm in ("batch norm", "no norm")
        )
        name = f"accuracy at the best rate of each, depth {depth}, with minus without (points)"
        reported[name] = mean_interval(100 * (with_norm - without))
    for arm, values in activations.items():
        for step in (0, 1):
            name = (
                f"activations of the last layer over the first, {arm}, after {step} steps at rate "
                f"{LARGE_RATE:g}"
            )
            reported[name] = ratio_interval(values[:, step, -1] / values[:, step, 0])
    return reported


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
            color=f"C{list(WITH_AND_WITHOUT).index(arm)}",
            linestyle=("-", "--", ":")[depths.index(int(depth))],
        )
    by_rate.axhline(100 * STABLE, color="gray", linewidth=0.8)
    by_rate.set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)")
    by_rate.legend(fontsize="small")
    for position, arm in enumerate(WITH_AND_WITHOUT):
        for key, style in {"start": ":", "activations": "-"}.items():
            values = np.asarray(curves[key][arm], float)
            when = "before training" if key == "start" else f"after {FEW_STEPS} steps"
            layers = np.arange(1, len(values) + 1)
            band(by_layer, layers, values, f"{arm}, {when}", color=f"C{position}", linestyle=style)
    by_layer.set(
        yscale="log",
        xlabel="layer",
        ylabel=f"root mean square of activations\nat rate {LARGE_RATE:g}",
    )
    by_layer.legend(fontsize="small")


EXPERIMENT = Experiment(
    number=8,
    name="large_rates",
    claim="Batch norm allows rates ten times as large, and trains no better at equal small rates",
    source="Bjorck et al. 2018",
    published="without, large rates diverge and activations grow with depth; no figure",
    protocol=(
        "MLP of 4, 8 and 16 layers of 32 ReLU units on digits, SGD at 13 rates from 1e-2 to 1e2; a "
        "rate is stable if the validation accuracy ends at a half or more; the matched small rate "
        "is a tenth of the largest rate that is stable without a norm"
    ),
    limits=(
        "Where the largest rate of the sweep is stable, the ratio is a lower bound. How long it "
        "trains decides what a small rate is; without residual connections a deep network without "
        "a norm is hard to train at any rate."
    ),
    run=run,
    draw=draw,
)
