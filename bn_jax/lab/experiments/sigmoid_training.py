"""Claim 7: batch norm trains in fewer steps, and makes sigmoid units usable."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import PERCENT, band, points
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM, MLP, WITH_AND_WITHOUT
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.selection import Chosen, Outcome, accuracies, choose, sweep_rates
from bn_jax.lab.experiments.step_two import norms_if
from bn_jax.lab.experiments.sweeps import (
    Part,
    Trial,
    draw_trials,
    init_model,
    share_correct,
    sweep,
    take,
    train,
    train_trial,
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTHS, BATCH_SIZE = (64, 64, 64), 60
# Glorot's deviation, and a small one with which every layer shrinks its input.
INITIALIZERS = "good initialization", "poor initialization"
SMALL = 0.01
RATES = 0.3, 1.0, 3.0, 10.0
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": nn.sigmoid,
    "ReLU": nn.relu,
}
# The rates of the networks whose steps are counted.
STEPPED: Mapping[str, tuple[float, ...]] = {
    "sigmoid": (0.3, 1.0, 3.0, 10.0),
    "ReLU": (0.03, 0.1, 0.3, 1.0, 3.0),
}
GOAL = 0.95
EVERY = 5
QUANTILES = 0.15, 0.5, 0.85
# How many units of the last hidden layer are followed.
UNITS = 8
# Networks of sigmoids that are hard to train.
DEEP = (32,) * 6
HARD = {"6 layers": "good initialization", "6 layers, small weights": "poor initialization"}
HARD_RATES = 0.03, 0.1, 0.3, 1.0, 3.0, 10.0
# The arms of these, by their norm and whether its scale and bias are trained.
ARMS: Mapping[str, tuple[Norm | None, bool]] = {
    "no norm": (None, True),
    "normalized only": (BATCH_NORM, False),
    "with scale and bias": (BATCH_NORM, True),
}
# The share of a norm's gain, in percent, below which sigmoids are not usable, and the smallest gain
# of scale and bias that would matter, in points.
USABLE, POINT = 50.0, 1.0


def train_arm(setting: Setting, norm: Norm | None, steps: int) -> dict[str, dict[str, Any]]:
    """Trains sigmoids from every initialization with every rate.

    Args:
        setting: the seeds, and the size of the run.
        norm: the norm of the network.
        steps: the number of steps of each training, a multiple of `EVERY`.

    Returns:
        For each of `INITIALIZERS` what `train_networks` returns, [rates, seeds, points, ...].
    """
    runs = [(0, place, rate) for place in range(len(INITIALIZERS)) for rate in RATES]
    observed = train_networks(setting, norm, steps, runs)
    return {
        name: {key: np.split(values, len(INITIALIZERS))[place] for key, values in observed.items()}
        for place, name in enumerate(INITIALIZERS)
    }


def train_networks(
    setting: Setting, norm: Norm | None, steps: int, runs: Sequence[tuple[int, int, float]]
) -> dict[str, Any]:
    """Trains networks in one compiled program.

    Args:
        setting: the seeds, and the size of the run.
        norm: the norm of the networks.
        steps: the number of steps of each training, a multiple of `EVERY`.
        runs: of each, its places in `ACTIVATIONS` and in `INITIALIZERS`, and its rate.

    Returns:
        At the start and after every `EVERY` steps: "accuracy" on the validation part,
        [runs, seeds, points], "units", the `QUANTILES` over that part of the inputs of `UNITS`
        units in the last hidden layer, [runs, seeds, points, 3, units], and "inputs", those of the
        first.
    """

    def observe(model: MLP, part: Part, variables: Any) -> dict[str, jax.Array]:
        logits, sown = model.apply(variables, part.x, train=False, mutable=["intermediates"])
        inputs = sown["intermediates"]["preactivation"][-1][:, :UNITS]
        return {
            "accuracy": share_correct(logits, part.y),
            "units": jnp.quantile(inputs, jnp.array(QUANTILES), axis=0),
        }

    def run(place: jax.Array, trial: Trial) -> Any:
        activation, initial, rate = place
        model = make_model(WIDTHS, norm, activation, initial, setting.num_classes)
        digits = trial.digits
        return train(
            model,
            optax.sgd(rate),
            init_model(model, trial),
            digits.train,
            trial.batches,
            observe=partial(observe, model, digits.validation),
            every=EVERY,
        ).observed

    trials = draw_trials(setting, steps, BATCH_SIZE)
    observed = jax.tree.map(np.asarray, sweep(run, np.array(runs), trials))
    return {**observed, "inputs": observed["units"][..., 0]}


def make_model(
    widths: tuple[int, ...],
    norm: Norm | None,
    activation: jax.Array,
    initial: jax.Array,
    num_classes: int = 10,
) -> MLP:
    """Returns a network whose activation and initializer are data, so that all are one program.

    Args:
        widths: of the hidden layers.
        norm: its norm.
        activation: the place in `ACTIVATIONS`.
        initial: the place in `INITIALIZERS`.
        num_classes: the number of logits.
    """

    def activate(x: jax.Array) -> jax.Array:
        sigmoid, relu = (of_one(x) for of_one in ACTIVATIONS.values())
        return jnp.where(activation == 0, sigmoid, relu)

    def initialize(
        key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        # Both initializers draw normal values.
        deviation = jnp.where(initial == 0, (2 / sum(shape)) ** 0.5, SMALL)
        return deviation * jax.random.normal(key, shape, dtype)

    return MLP(widths, num_classes, norm, activate, kernel_init=initialize)


def steps_to_goal(accuracies: Any) -> Any:
    """Counts the steps until an observation first reaches the goal.

    Args:
        accuracies: at the start and after every `EVERY` steps, [..., points].

    Returns:
        [...], at least 1, for easy data may be there at the start; infinity where the goal is not
        reached.
    """
    reached = np.asarray(accuracies) >= GOAL
    return np.where(reached.any(-1), np.maximum(reached.argmax(-1) * EVERY, 1), np.inf)


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


def count_steps(setting: Setting, horizon: int) -> dict[str, Stepped]:
    """Trains from a good initialization, with and without norm, and counts the steps.

    Args:
        setting: the seeds, and the size of the run.
        horizon: the steps of each training.

    Returns:
        By the names of `STEPPED`.
    """
    activations = list(ACTIVATIONS)
    runs = [(activations.index(name), 0, rate) for name in STEPPED for rate in STEPPED[name]]
    ends = np.cumsum([len(rates) for rates in STEPPED.values()])[:-1]
    arms = {}
    for arm, norm in WITH_AND_WITHOUT.items():
        observed = train_networks(setting, norm, horizon, runs)
        arms[arm] = {key: np.split(values, ends) for key, values in observed.items()}
        setting.advance(0.3)

    def of_network(place: int) -> Stepped:
        rates = list(STEPPED.values())[place]
        of_arms = {
            arm: {key: values[place] for key, values in of_arm.items()}
            for arm, of_arm in arms.items()
        }
        steps = {arm: steps_to_goal(values["accuracy"]) for arm, values in of_arms.items()}
        comparison = compare({arm: v["accuracy"] for arm, v in of_arms.items()}, horizon)
        return Stepped(
            comparison,
            {arm: choose(rates, comparison.best[arm], values) for arm, values in of_arms.items()},
            choose(rates, comparison.best["no norm"], of_arms["batch norm"]),
            {arm: np.minimum(values, horizon) for arm, values in steps.items()},
        )

    return {name: of_network(place) for place, name in enumerate(STEPPED)}


def train_hard(setting: Setting) -> dict[str, dict[str, Chosen[Any]]]:
    """Trains the networks of `HARD`; returns their test accuracies in percent, by arm."""
    trials = draw_trials(setting, 60 if setting.quick else 300, BATCH_SIZE)
    trained: dict[str, dict[str, Chosen[Any]]] = {name: {} for name in HARD}
    for norm in WITH_AND_WITHOUT.values():
        arms = {arm: step_two for arm, (of_arm, step_two) in ARMS.items() if of_arm is norm}
        chosen = _train_deep(norm, list(arms.values()), trials, setting.num_classes)
        for row, name in enumerate(HARD):
            for column, arm in enumerate(arms):
                rate, accuracy = take(chosen, slice(None), row, column)
                trained[name][arm] = Chosen(rate, 100 * accuracy)
        setting.advance(0.2)
    return trained


def _train_deep(
    norm: Norm | None, step_two: Sequence[bool], trials: Trial, num_classes: int
) -> Chosen[Any]:
    """Trains deep networks of sigmoids.

    Args:
        norm: their norm.
        step_two: for each arm whether scale and bias are trained.
        trials: of all seeds.
        num_classes: the number of classes.

    Returns:
        The test accuracies at the best rate of each seed, [seeds, networks of `HARD`, arms].
    """
    initials = [INITIALIZERS.index(initial) for initial in HARD.values()]
    places = np.array([(initial, trained) for initial in initials for trained in step_two], int)

    def run(rate: jax.Array, trial: Trial) -> Outcome[Any]:
        def of_one(place: jax.Array) -> Outcome[Any]:
            initial, is_trained = place
            model = make_model(DEEP, norm, jnp.zeros(()), initial, num_classes)
            optimizer = optax.sgd(rate)
            if norm is not None:
                optimizer = optax.chain(optimizer, norms_if(is_trained))
            return accuracies(model, train_trial(model, optimizer, trial), trial.digits)

        outcomes = map_runs(of_one, places.astype(np.int32))
        return jax.tree.map(lambda leaf: leaf.reshape(len(initials), -1), outcomes)

    return sweep_rates(run, HARD_RATES, trials).best_for_each_seed()


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    horizon = 100 if setting.quick else 400
    stepped = count_steps(setting, horizon)
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
            "7e": {
                name: 100 * (1 - _gains(trained, "normalized only")[name] / gain)
                for name, gain in _gains(trained, "no norm").items()
            },
            "7f": _gains(trained, "normalized only"),
        },
        curves={
            "rates": STEPPED,
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
                for rate, steps in zip(STEPPED[name], by_rate, strict=True)
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
    # Not-a-number where inputs have not moved.
    with np.errstate(divide="ignore", invalid="ignore"):
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
        by_arm.set_xticks(range(len(arms)), [arm.replace(" ", "\n") for arm in arms])
    by_arm.axhline(10, color="gray", linestyle=":")
    by_arm.set(ylabel="sigmoids: test accuracy (%)", ylim=PERCENT)
    by_arm.tick_params(axis="x", labelsize="small")
    by_arm.legend(fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1))


def _draw_inputs(axes: "Axes", steps: Any, inputs: Any, color: str) -> None:
    """Draws quantiles of a unit's input, [points, 3], the median thicker."""
    for quantile, values in zip(QUANTILES, np.asarray(inputs, float).T, strict=True):
        axes.plot(steps, values, color=color, linewidth=2 if quantile == 0.5 else 1)
    axes.set(xscale="symlog", xlabel="step", ylabel="15th, 50th, 85th percentile of input")


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
            Published("69.8 % with, chance without", "R"),
            is_resplit=True,
        ),
        SubClaim(
            "7c",
            "steadier inputs",
            "the median of a unit's input moves less over training with a norm",
            "range of the median in final widths, with over without, mean over 8 units",
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
            "without scale and bias, a norm leaves sigmoids in their linear regime, and unusable",
            "share of the gain of 7b that normalizing alone has (%)",
            Below(USABLE),
            Published("the linear regime of the sigmoid", "R"),
            f"ours: {USABLE:g} %, most of the gain is missing",
            is_resplit=True,
        ),
        SubClaim(
            "7f",
            "step two adds to it",
            "with scale and bias, the sigmoids of 7b become more accurate than normalized only",
            "test accuracy with scale and bias minus normalized only (points)",
            Above(0.0, matters=POINT),
            reason=f"ours: {POINT:g} point would matter",
            is_resplit=True,
        ),
    ),
    protocol=(
        "MLP 64-64-64-64-10 of sigmoid or ReLU units on digits, batches of 60, SGD at 4 or 5 "
        "rates, Glorot's deviation, at most 400 steps; sigmoids of 6 layers of 32, with Glorot's "
        "deviation or 0.01, after 300 steps at the best of 6 rates"
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
    hard="The factor 14, which has other causes too, and any need for scale and bias.",
    data=Needs(trained=BATCH_SIZE),
)
