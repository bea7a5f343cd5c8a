"""Claim 7: batch norm trains in fewer steps, and makes sigmoid units usable."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import PERCENT, band, points
from bn_jax.lab.experiments.nets import BATCH_NORM, MLP, WITH_AND_WITHOUT
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.selection import Chosen, choose, sweep_accuracies
from bn_jax.lab.experiments.sweeps import (
    Part,
    Trial,
    draw_trials,
    share_correct,
    sweep,
    train,
)
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    Experiment,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
)
from bn_jax.lab.models import Norm
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTHS, BATCH_SIZE = (100, 100, 100), 60
# Glorot's initializer, and small random values with which every layer shrinks its input.
INITIALIZERS = {
    "good initialization": nn.initializers.glorot_normal(),
    "poor initialization": nn.initializers.normal(0.01),
}
GOOD = {"good initialization": INITIALIZERS["good initialization"]}
RATES = 0.3, 1.0, 3.0, 10.0, 30.0
# The networks whose steps are counted: the activation, and the rates.
STEPPED: dict[str, tuple[Any, tuple[float, ...]]] = {
    "sigmoid": (nn.sigmoid, RATES),
    "ReLU": (nn.relu, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
}
GOAL = 0.95
EVERY = 5
QUANTILES = 0.15, 0.5, 0.85
# The networks of sigmoids that are hard to train: the widths of the layers, and the initializer.
HARD: dict[str, tuple[tuple[int, ...], Any]] = {
    "8 layers": ((32,) * 8, INITIALIZERS["good initialization"]),
    "3 layers, small weights": ((64,) * 3, INITIALIZERS["poor initialization"]),
}
HARD_RATES = 0.1, 0.3, 1.0, 3.0, 10.0, 30.0
ARMS: dict[str, Norm | None] = {
    "no norm": None,
    "normalized only": partial(BatchNorm, momentum=0.9, use_scale=False, use_bias=False),
    "with scale and bias": BATCH_NORM,
}
# The smallest gain of scale and bias that would matter, in points.
POINT = 1.0


def train_arm(
    setting: Setting,
    norm: Norm | None,
    steps: int,
    activation: Any = nn.sigmoid,
    rates: tuple[float, ...] = RATES,
    initializers: Mapping[str, Any] = INITIALIZERS,
) -> dict[str, dict[str, Any]]:
    """Trains from every initialization with every rate.

    Args:
        setting: the seeds, and the size of the run.
        norm: the norm of the network.
        steps: the number of steps of each training, a multiple of `EVERY`.
        activation: between the layers.
        rates: the learning rates.
        initializers: of the hidden layers' kernels, by name.

    Returns:
        For each of `initializers`, at the start and after every `EVERY` steps: "accuracy" on the
        validation part, [rates, seeds, points], "units", the `QUANTILES` over that part of the
        inputs of all units in the last hidden layer, [rates, seeds, points, 3, units], and
        "inputs", those of the first unit.
    """
    models = [
        MLP(WIDTHS, norm=norm, activation=activation, kernel_init=initializer)
        for initializer in initializers.values()
    ]

    def observe(part: Part, variables: Any) -> dict[str, jax.Array]:
        logits, sown = models[0].apply(variables, part.x, train=False, mutable=["intermediates"])
        inputs = sown["intermediates"]["preactivation"][-1]
        return {
            "accuracy": share_correct(logits, part.y),
            "units": jnp.quantile(inputs, jnp.array(QUANTILES), axis=0),
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
    observed = jax.tree.map(np.asarray, sweep(run, rates, trials))
    observed["inputs"] = observed["units"][..., 0]
    return {
        name: {key: values[:, :, place] for key, values in observed.items()}
        for place, name in enumerate(initializers)
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


class Stepped(NamedTuple):
    """Both arms of a network whose steps are counted.

    Attributes:
        comparison: of the arms.
        chosen: each arm at its best rate: "accuracy", "inputs", and "units".
        same: the arm with a norm at the rate that is best without.
        steps: of each arm, at most the horizon, [rates, seeds].
    """

    comparison: Comparison
    chosen: dict[str, Chosen[Any]]
    same: Chosen[Any]
    steps: dict[str, Any]


def count_steps(setting: Setting, network: str, horizon: int) -> Stepped:
    """Trains a network from a good initialization, with and without norm, and counts the steps.

    Args:
        setting: the seeds, and the size of the run.
        network: a name in `STEPPED`.
        horizon: the steps of each training.
    """
    activation, rates = STEPPED[network]
    arms = {
        arm: train_arm(setting, norm, horizon, activation, rates, GOOD)["good initialization"]
        for arm, norm in WITH_AND_WITHOUT.items()
    }
    comparison = compare({arm: values["accuracy"] for arm, values in arms.items()}, horizon)
    return Stepped(
        comparison,
        {arm: choose(rates, comparison.best[arm], values) for arm, values in arms.items()},
        choose(rates, comparison.best["no norm"], arms["batch norm"]),
        {
            arm: np.minimum(steps_to_goal(values["accuracy"]), horizon)
            for arm, values in arms.items()
        },
    )


def train_hard(setting: Setting) -> dict[str, dict[str, Chosen[Any]]]:
    """Trains the networks of `HARD`; returns their test accuracies in percent, by arm."""
    trials = draw_trials(setting.chosen, 60 if setting.quick else 300, BATCH_SIZE)
    trained: dict[str, dict[str, Chosen[Any]]] = {}
    for name, (widths, initializer) in HARD.items():
        trained[name] = {}
        for arm, norm in ARMS.items():
            model = MLP(widths, norm=norm, activation=nn.sigmoid, kernel_init=initializer)
            swept = sweep_accuracies(model, optax.sgd, HARD_RATES, trials).best_for_each_seed()
            trained[name][arm] = Chosen(swept.rate, 100 * swept.measured)
            setting.advance(0.5 / len(HARD) / len(ARMS))
    return trained


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    horizon = 150 if setting.quick else 600
    stepped = {}
    for network in STEPPED:
        stepped[network] = count_steps(setting, network, horizon)
        setting.advance(0.5 / len(STEPPED))
    sigmoid = stepped["sigmoid"]
    moved = {
        "each at its best rate": steadiness(sigmoid.chosen["batch norm"], sigmoid.chosen),
        "at the same rate": steadiness(sigmoid.same, sigmoid.chosen),
    }
    trained = train_hard(setting)
    return Result(
        values={
            "7a": {name: of_one.comparison.at_same for name, of_one in stepped.items()},
            "7b": _gains(trained, "no norm"),
            "7c": moved,
            "7d": {name: of_one.comparison.at_best for name, of_one in stepped.items()},
            "7e": _gains(trained, "normalized only"),
        },
        curves={
            "rates": {name: rates for name, (_, rates) in STEPPED.items()},
            "steps": {name: of_one.steps for name, of_one in stepped.items()},
            "inputs": {arm: chosen.measured["inputs"][0] for arm, chosen in sigmoid.chosen.items()},
            "hard": {
                name: {arm: chosen.measured for arm, chosen in arms.items()}
                for name, arms in trained.items()
            },
            "horizon": horizon,
        },
        series=[
            *(
                Series("7a", arm, f"{name}, rate {rate:g}", steps)
                for name, of_one in stepped.items()
                for arm, by_rate in of_one.steps.items()
                for rate, steps in zip(STEPPED[name][1], by_rate, strict=True)
            ),
            *(
                Series("7b", arm, name, chosen.measured)
                for name, arms in trained.items()
                for arm, chosen in arms.items()
            ),
        ],
        rates={
            f"{name}, {arm}": chosen.rate
            for name, of_one in stepped.items()
            for arm, chosen in of_one.chosen.items()
        }
        | {
            f"{name}, {arm}": chosen.rate
            for name, arms in trained.items()
            for arm, chosen in arms.items()
        },
    )


def _gains(trained: Mapping[str, Mapping[str, Chosen[Any]]], without: str) -> dict[str, Any]:
    """Returns how much more accurate the whole norm is than another arm, by network."""
    return {
        name: arms["with scale and bias"].measured - arms[without].measured
        for name, arms in trained.items()
    }


def steadiness(with_norm: Chosen[Any], chosen: Mapping[str, Chosen[Any]]) -> Any:
    """Returns how far units' inputs wander with a norm, over how far they do without, [seeds]."""
    distances = [
        wandering(np.moveaxis(arm.measured["units"], -1, 1))
        for arm in (with_norm, chosen["no norm"])
    ]
    return np.exp(np.mean(np.log(distances[0]) - np.log(distances[1]), 1))


def wandering(inputs: Any) -> Any:
    """Measures how far the median of a unit's input moves over training.

    Args:
        inputs: its 15th, 50th and 85th percentile during training, [..., points, 3].

    Returns:
        The range of the median over the final distance of the outer percentiles, [...].
    """
    low, median, high = np.moveaxis(np.asarray(inputs), -1, 0)
    return np.ptp(median, axis=-1) / (high - low)[..., -1]


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws steps by rate, a unit's input over training, and what hard networks reach."""
    by_rate, *inputs, by_arm = figure.subplots(1, 4)
    horizon, colors = curves["horizon"], dict(zip(WITH_AND_WITHOUT, ("C0", "C1"), strict=True))
    for name, style in zip(STEPPED, ("-", "--"), strict=True):
        for arm, color in colors.items():
            steps = curves["steps"][name][arm]
            label, rates = f"{name}, {arm}", curves["rates"][name]
            band(by_rate, rates, steps, label, color=color, linestyle=style, within=(1, horizon))
    by_rate.set(
        xscale="log",
        yscale="log",
        ylim=(EVERY, 1.2 * horizon),
        xlabel="learning rate",
        ylabel=f"steps to {100 * GOAL:g} % (at most {horizon})",
    )
    by_rate.legend(fontsize="xx-small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    for axes, (arm, color) in zip(inputs, colors.items(), strict=True):
        values = curves["inputs"][arm]
        _draw_inputs(axes, EVERY * np.arange(len(values)), values, color)
        axes.set(xlim=(0, horizon))
        axes.set_title(f"a sigmoid of the last layer,\n{arm}", fontsize="small")
    for place, (name, arms) in enumerate(curves["hard"].items()):
        positions = np.arange(len(arms)) + 0.1 * place
        points(
            by_arm, positions, np.asarray(list(arms.values()), float), name, color=f"C{place + 2}"
        )
        by_arm.set_xticks(range(len(arms)), [arm.replace(" ", "\n", 1) for arm in arms])
    by_arm.axhline(10, color="gray", linestyle=":")
    by_arm.set(ylabel="sigmoids: test accuracy (%)", ylim=PERCENT)
    by_arm.tick_params(axis="x", labelsize="small")
    by_arm.legend(fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1))


def _draw_inputs(axes: "Axes", steps: Any, inputs: Any, color: str) -> None:
    """Draws quantiles of a unit's input, [points, 3], the median thicker."""
    for quantile, values in zip(QUANTILES, np.asarray(inputs, float).T, strict=True):
        axes.plot(steps, values, color=color, linewidth=2 if quantile == 0.5 else 1)
    axes.set(xscale="symlog", xlabel="step", ylabel="15th, 50th and 85th percentile of its input")


EXPERIMENT = Experiment(
    number=7,
    name="sigmoid_training",
    claim="Batch norm trains in fewer steps, and makes sigmoid units usable",
    source="Ioffe & Szegedy 2015, section 4 and table of figure 3",
    sub_claims=(
        SubClaim(
            "7a",
            "fewer steps, same rate",
            "at the rate that is best without a norm, a norm reaches the goal in fewer steps",
            f"steps to {100 * GOAL:g} % validation accuracy, without over with",
            Above(1.0, size=2.3),
            Published("2.3: 31.0 M to 13.3 M", "V"),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "7b",
            "sigmoids usable",
            "networks of sigmoids that are hard to train become more accurate with a norm",
            "test accuracy with a norm minus without (points)",
            Above(0.0),
            Published("69.8 % with, chance without", "V"),
            is_resplit=True,
        ),
        SubClaim(
            "7c",
            "steadier inputs",
            "the median of a unit's input moves less over training with a norm",
            "range of the median in final widths, with over without, mean over the last layer",
            Below(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "7d",
            "fewer steps, best rates",
            "each at its best rate, a norm reaches the goal in fewer steps",
            f"steps to {100 * GOAL:g} % validation accuracy, without over with",
            Above(1.0, size=31.0 / 2.1),
            Published("14: 31.0 M to 2.1 M, at 5 times the rate and with other changes", "V"),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "7e",
            "not without step two",
            "the sigmoids of 7b need the norm's scale and bias",
            "test accuracy with scale and bias minus normalized only (points)",
            Above(0.0, matters=POINT),
            Published("the linear regime of the sigmoid", "V"),
            f"ours: {POINT:g} point would matter",
            is_resplit=True,
        ),
    ),
    protocol=(
        "MLP 64-100-100-100-10 of sigmoid or ReLU units on digits, batches of 60, SGD at 5 or 6 "
        "rates, Glorot's initialization, at most 600 steps; sigmoids of 8 layers of 32, and of 3 "
        "layers of 64 with weights of deviation 0.01, after 300 steps at the best of 6 rates"
    ),
    limits=(
        "A training without norm that does not arrive counts with all of its steps, so that its "
        "ratio is a lower bound. One rate for all seeds is chosen by the steps that are compared. "
        "Digits are small and learned soon: the published factors are those of Inception on "
        "ImageNet, where 14 includes weaker regularization and other changes."
    ),
    run=run,
    draw=draw,
    easy="That sigmoids which stay at chance without a norm train with it.",
    hard="The published factors: they belong to one network, one data set and one goal.",
)
