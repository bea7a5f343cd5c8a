"""Claim 8: batch norm allows larger learning rates."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import ScannedMLP
from bn_jax.lab.experiments.sweeps import accuracy, draw_batches, load_digits, sweep, train
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
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, BATCH_SIZE = 32, 64
DEPTHS = 4, 8, 16
NORMS: Mapping[str, Norm | None] = {
    "batch norm": partial(BatchNorm, momentum=0.9),
    "no norm": None,
}
RATES = np.geomspace(1e-2, 1e2, 13)
# A rate is stable if its training ends with at least half of the validation part right: chance is
# a tenth, and a network that has diverged or died stays there.
STABLE = 0.5
# A matched small rate is that much smaller than the largest one that is stable without a norm.
SMALLER = 10
# Activations are followed at the network's own initial weights, over a few steps of this rate.
LARGE_RATE, FEW_STEPS = 1.0, 3


def accuracies(setting: Setting, depth: int, norm: Norm | None, steps: int) -> Any:
    """Trains with every rate.

    Args:
        setting: the seeds.
        depth: of the network, in hidden layers.
        norm: of the network.
        steps: of each training.

    Returns:
        The accuracies on the validation and the test part, [2, rates, seeds].
    """
    digits = load_digits(setting.chosen)
    rows = draw_batches(setting.chosen, digits.train.x.shape[1], steps, BATCH_SIZE)
    model = ScannedMLP(depth, WIDTH, norm=norm)

    def run(rate: Any, seed: Any, parts: Any, rows: Any) -> Any:
        variables = model.init(jax.random.key(seed), parts.train.x[:1], train=False)
        trained = train(model, optax.sgd(rate), variables, parts.train, rows).variables
        return [accuracy(model, trained, part) for part in (parts.validation, parts.test)]

    return np.asarray(sweep(run, RATES, setting.chosen, digits, rows))


def growth(setting: Setting, depth: int, norm: Norm | None) -> Any:
    """Follows the activations of a network over its first steps at a large rate.

    Args:
        setting: the seeds.
        depth: of the network, in hidden layers.
        norm: of the network.

    Returns:
        The root mean square of what comes into each activation, before the first step and after
        each, [seeds, steps + 1, layers].
    """
    digits = load_digits(setting.chosen)
    rows = draw_batches(setting.chosen, digits.train.x.shape[1], FEW_STEPS, BATCH_SIZE)
    model = ScannedMLP(depth, WIDTH, norm=norm)

    def run(rate: Any, seed: Any, part: Any, rows: Any) -> Any:
        def observe(variables: Any) -> jax.Array:
            _, sown = model.apply(
                variables, part.x, train=True, mutable=["intermediates", "batch_stats"]
            )
            (inputs,) = sown["intermediates"]["preactivation"]
            return jnp.sqrt(jnp.mean(inputs**2, (1, 2)))

        variables = model.init(jax.random.key(seed), part.x[:1], train=False)
        return train(model, optax.sgd(rate), variables, part, rows, observe).observed

    return np.asarray(sweep(run, [LARGE_RATE], setting.chosen, digits.train, rows))[0]


def largest_stable(validation: Any) -> Any:
    """Finds the largest rate whose training ends within reach.

    Args:
        validation: accuracies, [rates, seeds].

    Returns:
        The index of that rate for each seed, [seeds]; -1 where no rate is stable.
    """
    stable = np.asarray(validation) >= STABLE
    last = len(stable) - 1 - stable[::-1].argmax(0)
    return np.where(stable.any(0), last, -1)


def compare(found: Mapping[str, Any]) -> tuple[Any, Any]:
    """Compares the arms at one depth.

    Args:
        found: the accuracies of each arm, [2, rates, seeds].

    Returns:
        The ratios of the largest stable rates, with norm over without, and the gaps of the test
        accuracies at the matched small rate, [seeds] each; not a number where no rate is stable.
    """
    with_norm, without = (largest_stable(found[arm][0]) for arm in NORMS)
    steps_down = round(np.log(SMALLER) / np.log(RATES[1] / RATES[0]))
    small = np.maximum(without - steps_down, 0)[None]
    tests = (np.take_along_axis(found[arm][1], small, 0)[0] for arm in NORMS)
    missing = (with_norm < 0) | (without < 0)
    gaps = np.subtract(*tests)
    # Rates a decade apart are ten times as large, and not a rounding less.
    ratios = np.round(RATES[with_norm] / RATES[without], 9)
    return np.where(missing, np.nan, ratios), np.where(missing, np.nan, gaps)


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    steps = 60 if setting.quick else 500
    depths = DEPTHS[:2] if setting.quick else DEPTHS
    activations = {arm: growth(setting, depths[-1], norm) for arm, norm in NORMS.items()}
    setting.advance(0.1)
    found: dict[int, dict[str, Any]] = {depth: {} for depth in depths}
    for depth in depths:
        for arm, norm in NORMS.items():
            found[depth][arm] = accuracies(setting, depth, norm, steps)
            setting.advance(0.9 * depth / (2 * sum(depths)))
    criteria = []
    for depth in depths:
        ratios, gaps = compare(found[depth])
        criteria += [
            Criterion(
                f"largest stable rate, depth {depth}, with norm over without",
                "large rates diverge without",
                ratio_interval(ratios),
                at_least=10.0,
            ),
            Criterion(
                f"test accuracy at a matched small rate, depth {depth}, with minus without",
                "no difference",
                mean_interval(gaps),
                -0.01,
                0.01,
            ),
        ]
    return Result(
        criteria=tuple(criteria),
        curves={
            "rates": RATES,
            "accuracy": {
                f"{arm}, depth {depth}": values[1]
                for depth, arms in found.items()
                for arm, values in arms.items()
            },
            "activations": {arm: values[:, -1].T for arm, values in activations.items()},
            "start": {arm: values[:, 0].T for arm, values in activations.items()},
        },
        reported=_reported(found, activations),
    )


def _reported(found: Any, activations: Any) -> dict[str, Interval]:
    gains = {
        f"accuracy at the best rate of each, depth {depth}, with minus without (points)": (
            mean_interval(100 * np.subtract(*(_at_best(arms[arm]) for arm in NORMS)))
        )
        for depth, arms in found.items()
    }
    grown = {
        f"activations of the last layer over the first, {arm}, after {step} steps at rate "
        f"{LARGE_RATE:g}": ratio_interval(values[:, step, -1] / values[:, step, 0])
        for arm, values in activations.items()
        for step in (0, 1)
    }
    return gains | grown


def _at_best(accuracies: Any) -> Any:
    validation, test = accuracies
    return np.take_along_axis(test, validation.argmax(0)[None], 0)[0]


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
            color=f"C{list(NORMS).index(arm)}",
            linestyle=("-", "--", ":")[depths.index(int(depth))],
        )
    by_rate.axhline(100 * STABLE, color="gray", linewidth=0.8)
    by_rate.set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)")
    by_rate.legend(frameon=False, fontsize="small")
    for position, arm in enumerate(NORMS):
        for key, style in {"start": ":", "activations": "-"}.items():
            values = np.asarray(curves[key][arm], float)
            when = "at first" if key == "start" else f"after {FEW_STEPS} steps"
            layers = np.arange(1, len(values) + 1)
            band(by_layer, layers, values, f"{arm}, {when}", color=f"C{position}", linestyle=style)
    by_layer.set(
        yscale="log",
        xlabel="layer",
        ylabel=f"root mean square of activations\nat rate {LARGE_RATE:g}",
    )
    by_layer.legend(frameon=False, fontsize="small")


EXPERIMENT = Experiment(
    number=8,
    name="large_rates",
    claim="Batch norm allows rates ten times as large, and trains no better at equal small rates",
    source="Bjorck et al. 2018",
    published="without, large rates diverge and activations grow with depth; no figure",
    protocol=(
        "MLP of 4, 8 and 16 layers of 32 ReLU units on digits, SGD at 13 rates from 1e-2 to 1e2; "
        "stable: at least half of the validation part right in the end; small: a tenth of the "
        "largest rate that is stable without a norm"
    ),
    limits=(
        "Where the largest rate of the sweep is stable, the ratio is a lower bound. How long it "
        "trains decides what a small rate is; without residual connections a deep network without "
        "a norm is hard to train at any rate."
    ),
    run=run,
    draw=draw,
)
