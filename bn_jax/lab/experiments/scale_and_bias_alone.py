"""Claim 15: a network learns if only the scale and bias of its norms are trained."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax._paths import format_path
from bn_jax.lab.experiments.figures import PERCENT, points
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM, ScannedMLP
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.selection import Chosen, Outcome, RateSweep
from bn_jax.lab.experiments.sweeps import (
    Digits,
    Part,
    State,
    Trial,
    accuracy,
    draw_trials,
    make_step,
    start,
    take,
    train,
)
from bn_jax.lab.experiments.verdicts import (
    Above,
    ChosenRate,
    Experiment,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
    Within,
)
from bn_jax.lab.models import ResNet
from bn_jax.optim import norm_params_mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = (
    "scale and bias",
    "random weights",
    "scale and bias, classifier too",
    "random weights, classifier too",
)
RATES = 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0
SMALL_SCALE = 0.01
# Twice chance, in percent: the largest class has 10.2 % of the digits.
CHANCE = 20.0
# A third of the scales, in percent, give or take 10 points.
THIRD = 23.0, 43.0
# The seeds on whose validation parts the rates of a network are chosen that trains step by step.
SEARCHED = 2


class Net(NamedTuple):
    """A network and how it is trained.

    Attributes:
        model: the network, with batch norm.
        shape: the shape of an example.
        arms: the number of `ARMS` that are trained.
        steps: the number of steps of each training.
        batch_size: the number of examples in each step.
        rates: the rates of the sweep.
        side_by_side: whether all trainings are one compiled program, and every seed has its best
            rate. Convolutions whose kernels differ from training to training are slow on a CPU:
            they run one training after another, step by step, with the rate that is best for the
            first seeds.
    """

    model: nn.Module
    shape: tuple[int, ...]
    arms: int
    steps: int
    batch_size: int
    rates: tuple[float, ...]
    side_by_side: bool


def nets(setting: Setting) -> dict[str, Net]:
    """Returns the networks by their names.

    Args:
        setting: the size of the run, and the data.
    """
    quick, classes = setting.quick, setting.num_classes
    image_shape = setting.labelled.image_shape
    dense = partial(
        Net,
        shape=(math.prod(image_shape),),
        arms=len(ARMS),
        steps=40 if quick else 250,
        batch_size=64,
        rates=RATES[:-1],
        side_by_side=True,
    )
    return {
        "MLP, depth 2": dense(ScannedMLP(2, 64, classes, BATCH_NORM), rates=RATES),
        "MLP, depth 8": dense(ScannedMLP(8, 64, classes, BATCH_NORM)),
        "CNN, depth 8": Net(
            ResNet(classes, stage_sizes=(1, 3), widths=(8, 8), norm=BATCH_NORM),
            shape=image_shape,
            arms=2,
            steps=12 if quick else 200,
            batch_size=32,
            rates=RATES[2:4] if quick else RATES[1:5],
            side_by_side=False,
        ),
    }


def masks(params: Any, key: jax.Array) -> Any:
    """Chooses what each arm trains.

    Args:
        params: the params of a network with norms and a "classifier".
        key: the key of the random choice.

    Returns:
        A tree like `params` with booleans [arms, ...]: the parameters of norms; as many randomly
        drawn weights of all other layers but the classifier; and both with the classifier.
    """
    of_norms = norm_params_mask(params)
    of_classifier = jax.tree.map_with_path(
        lambda path, _: "classifier" in format_path(path), params
    )
    whole = partial(jax.tree.map, lambda chosen, leaf: jnp.full(leaf.shape, chosen))
    norms, classifier = whole(of_norms, params), whole(of_classifier, params)
    drawn = draw_weights(norms, classifier, key)
    return jax.tree.map(lambda n, r, c: jnp.stack([n, r, n | c, r | c]), norms, drawn, classifier)


def draw_weights(norms: Any, classifier: Any, key: jax.Array) -> Any:
    """Draws as many weights as norms have parameters, outside of norms and classifier.

    Args:
        norms: booleans in the shapes of the parameters.
        classifier: the same.
        key: the key of the choice.

    Returns:
        Booleans of the same shapes.
    """
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.logical_or, norms, classifier))
    taken = jnp.concatenate([leaf.ravel() for leaf in leaves])
    count = sum(leaf.sum() for leaf in jax.tree.leaves(norms))
    order = jnp.where(taken, 2.0, jax.random.uniform(key, taken.shape)).argsort()
    drawn = jnp.zeros_like(taken).at[order].set(jnp.arange(taken.size) < count)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = jnp.split(drawn, ends)
    return jax.tree.unflatten(
        tree, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


def masked(mask: Any) -> optax.GradientTransformation:
    """Zeroes updates where a mask is False, element by element, which `optax.masked` cannot do."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, chosen: u * chosen, updates, mask)
    )


class Measured(NamedTuple):
    """What was measured of a training.

    Attributes:
        accuracy: the accuracy on the test part.
        small: the share of scales below `SMALL_SCALE`.
        count: the number of trained parameters.
    """

    accuracy: Any
    small: Any
    count: Any


class Run(NamedTuple):
    """One training.

    Attributes:
        arm: its place in `ARMS`.
        rate: the learning rate.
        trial: seed, examples and batches.
    """

    arm: Any
    rate: Any
    trial: Trial


def train_all(setting: Setting, net: Net) -> Chosen[Measured]:
    """Trains every arm.

    Args:
        setting: the seeds, and the size of the run.
        net: the network.

    Returns:
        The measurements at the best rates, [seeds, arms].
    """
    trials = draw_trials(setting, net.steps, net.batch_size)
    digits = Digits(
        *(Part(part.x.reshape(*part.x.shape[:2], *net.shape), part.y) for part in trials.digits)
    )
    trials = jax.device_put(trials._replace(digits=digits))
    if net.side_by_side:
        return train_grid(net, trials, range(len(net.rates)), setting.seeds).best_for_each_seed()
    searched = train_grid(net, trials, range(len(net.rates)), min(SEARCHED, setting.seeds))
    best = searched.validation.mean(1).argmax(0)
    return at_rates(net, trials, best)


def train_grid(net: Net, trials: Trial, rates: Sequence[int], seeds: int) -> RateSweep[Measured]:
    """Trains every arm with some rates and the first seeds.

    Args:
        net: the network.
        trials: of all seeds.
        rates: the places of the rates.
        seeds: the number of seeds.

    Returns:
        The outcomes, [rates, seeds, arms].
    """
    shape = net.arms, len(rates), seeds
    grid = np.stack(np.meshgrid(range(net.arms), rates, range(seeds), indexing="ij"), -1)
    outcomes = _train_each(net, trials, grid.reshape(-1, 3))

    def rates_first(leaf: Any) -> Any:
        """Returns [arms * rates * seeds] as [rates, seeds, arms]."""
        return np.moveaxis(np.asarray(leaf).reshape(shape), 0, -1)

    outcomes = jax.tree.map(rates_first, outcomes)
    return RateSweep(np.asarray(net.rates)[list(rates)], outcomes.validation, outcomes.measured)


def at_rates(net: Net, trials: Trial, best: Any) -> Chosen[Measured]:
    """Trains every arm and seed with the rate of the arm.

    Args:
        net: the network.
        trials: of all seeds.
        best: the place of the rate of each arm, [arms].
    """
    seeds = len(trials.seed)
    grid = [(arm, int(rate), seed) for seed in range(seeds) for arm, rate in enumerate(best)]
    outcomes = _train_each(net, trials, np.array(grid))
    measured = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(seeds, -1), outcomes.measured)
    at_edge = (best == 0) | (best == len(net.rates) - 1)
    every = (seeds, 1)
    rate = ChosenRate(np.tile(np.asarray(net.rates)[best], every), np.tile(at_edge, every))
    return Chosen(rate, measured)


def _train_each(net: Net, trials: Trial, grid: Any) -> Outcome[Measured]:
    """Makes the trainings of a grid of the places of arm, rate and seed, [runs, 3]."""
    rates = jnp.asarray(net.rates)

    def run_at(place: Any) -> Run:
        arm, rate, seed = place
        return Run(arm, rates[rate], take(trials, seed))

    if net.side_by_side:
        return map_runs(lambda place: train_once(net.model, run_at(place)), grid)
    one_by_one = train_stepwise(net.model, [run_at(place) for place in grid])
    return jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one)


def train_once(model: nn.Module, run: Run) -> Outcome[Measured]:
    """Trains the parameters of an arm.

    Args:
        model: the network.
        run: the training.
    """
    digits = run.trial.digits
    variables, mask = begin(model, run)
    optimizer = make_optimizer(run.rate, mask)
    trained = train(model, optimizer, variables, digits.train, run.trial.batches).variables
    return finish(model, trained, mask, digits)


def train_stepwise(model: nn.Module, runs: Sequence[Run]) -> list[Outcome[Measured]]:
    """Trains as `train_once` does, with a call for every step.

    Convolutions inside a loop that XLA compiles for a CPU are several times slower.

    Args:
        model: the network.
        runs: the trainings.
    """
    outcomes = []
    for run in runs:
        digits = run.trial.digits
        variables, mask = _begin(model, run)
        state = start(make_optimizer(run.rate, mask), variables)
        for batch in run.trial.batches:
            state = _step(model, state, run.rate, mask, digits.train, batch)
        outcomes.append(jax.device_get(_finish(model, state.variables, mask, digits)))
    return outcomes


@partial(jax.jit, static_argnums=0)
def _step(model: nn.Module, state: State, rate: Any, mask: Any, part: Part, batch: Any) -> State:
    return make_step(model, make_optimizer(rate, mask), part)(state, batch)[0]


def begin(model: nn.Module, run: Run) -> tuple[Any, Any]:
    """Returns the initial variables of a network, and the mask of what the arm trains."""
    of_network, of_mask = jax.random.split(jax.random.key(run.trial.seed))
    variables = model.init(of_network, run.trial.digits.train.x[:1], train=False)
    # Residual blocks start their last scale at 0. The weights of a branch would have no gradient.
    params = jax.tree.map_with_path(
        lambda path, leaf: jnp.ones_like(leaf) if format_path(path).endswith("scale") else leaf,
        variables["params"],
    )
    mask = take(masks(params, of_mask), run.arm)
    return {**variables, "params": params}, mask


def make_optimizer(rate: Any, mask: Any) -> optax.GradientTransformation:
    """Returns an optimizer that trains the parameters of a mask."""
    return optax.chain(optax.sgd(rate, momentum=0.9), masked(mask))


def finish(model: nn.Module, trained: Any, mask: Any, digits: Digits) -> Outcome[Measured]:
    """Measures trained variables."""
    scales = [
        jnp.abs(leaf).ravel()
        for path, leaf in jax.tree.leaves_with_path(trained["params"])
        if format_path(path).endswith("scale")
    ]
    measured = Measured(
        accuracy=accuracy(model, trained, digits.test),
        small=jnp.mean(jnp.concatenate(scales) < SMALL_SCALE),
        count=sum(leaf.sum() for leaf in jax.tree.leaves(mask)),
    )
    return Outcome(accuracy(model, trained, digits.validation), measured)


_begin = jax.jit(begin, static_argnums=0)
_finish = jax.jit(finish, static_argnums=0)


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    chosen = {}
    for name, net in nets(setting).items():
        chosen[name] = train_all(setting, net)
        setting.advance(1 / 3)
    accuracies = {name: 100 * of_net.measured.accuracy for name, of_net in chosen.items()}
    small = {name: 100 * of_net.measured.small[:, 0] for name, of_net in chosen.items()}
    return Result(
        values={
            "15a": {name: values[:, 0] for name, values in accuracies.items()},
            "15b": {name: values[:, 0] - values[:, 1] for name, values in accuracies.items()},
            "15c": small,
            "15d": {
                name: values[:, 2] - values[:, 3]
                for name, values in accuracies.items()
                if values.shape[1] == len(ARMS)
            },
        },
        curves={
            "accuracy": {name: values.T for name, values in accuracies.items()},
            "small": small,
            "count": {name: of_net.measured.count[0, 0] for name, of_net in chosen.items()},
            "arms": ARMS,
        },
        series=[
            Series("15a", arm, name, of_arm)
            for name, values in accuracies.items()
            for arm, of_arm in zip(ARMS, values.T, strict=False)
        ],
        rates={
            f"{name}, {arm}": ChosenRate(of_net.rate.value[:, place], of_net.rate.at_edge[:, place])
            for name, of_net in chosen.items()
            for place, arm in enumerate(ARMS[: of_net.rate.value.shape[1]])
        },
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the accuracies of all arms, and the shares of small scales."""
    by_arm, small = figure.subplots(1, 2, width_ratios=(2, 1))
    names = list(curves["accuracy"])
    for place, arm in enumerate(curves["arms"]):
        trained = [name for name in names if len(curves["accuracy"][name]) > place]
        points(
            by_arm,
            np.array([names.index(name) for name in trained]) + 0.12 * (place - 1.5),
            np.asarray([curves["accuracy"][name][place] for name in trained], float),
            arm,
            fmt="o" if arm.startswith("scale") else "s",
            color=f"C{place}",
        )
    points(small, range(len(names)), [np.asarray(curves["small"][name], float) for name in names])
    labels = [f"{name}:\n{round(curves['count'][name])} parameters" for name in names]
    for axes in (by_arm, small):
        axes.set_xticks(range(len(names)), labels, fontsize="x-small")
    by_arm.axhline(10, color="gray", linestyle=":", zorder=5)
    by_arm.set(ylabel="test accuracy (%)", ylim=PERCENT)
    by_arm.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    small.axhspan(*THIRD, color="gray", alpha=0.2, linewidth=0)
    small.set(ylabel=f"scales below {SMALL_SCALE} in size (%)", ylim=(-1, None))


EXPERIMENT = Experiment(
    number=15,
    name="scale_and_bias_alone",
    claim="Training scale and bias alone learns, and more than training as many other weights",
    source="Frankle, Schwab & Morcos 2021",
    sub_claims=(
        SubClaim(
            "15a",
            "alone they learn",
            "with all other parameters random and fixed, scale and bias alone learn",
            "test accuracy (%)",
            Above(CHANCE),
            Published("82 % on CIFAR-10, 32 % (top 5) on ImageNet", "V"),
            f"ours: {CHANCE:g} %, twice chance",
            is_resplit=True,
            is_of_digits=True,
        ),
        SubClaim(
            "15b",
            "more than other weights",
            "scale and bias alone learn more than as many random weights of the other layers",
            "test accuracy, scale and bias minus random weights (points)",
            Above(0.0),
            Published("far higher", "V"),
            is_resplit=True,
        ),
        SubClaim(
            "15c",
            "a third near zero",
            "about a third of the scales are near zero after training",
            f"share of scales below {SMALL_SCALE} in size (%)",
            Within(*THIRD),
            Published("around a third", "V"),
            "ours: a third, give or take 10 points",
            is_resplit=True,
        ),
        SubClaim(
            "15d",
            "with the classifier too",
            "so they do where the classifier is trained as well",
            "test accuracy, scale, bias and classifier minus random weights and classifier "
            "(points)",
            Above(0.0),
            is_resplit=True,
        ),
    ),
    protocol=(
        "MLP of 2 and 8 layers of 64, 250 steps, and ResNet of 8 convolutions in blocks of width "
        "8, 200 steps, on digits; SGD with momentum, each arm at its best of 4 to 7 rates; all "
        "other parameters, the classifier's too, stay at their random initial values; scales "
        "start at 1"
    ),
    limits=(
        "The published figures are those of wide and deep networks after long training; here the "
        "networks have 160 to 1024 parameters in norms, and scales that start at 1 are not driven "
        "to zero by weight decay."
    ),
    run=run,
    draw=draw,
    easy="That scale and bias alone learn, and in deep networks more than other weights.",
    hard="A third of the scales near zero: in these short runs hardly any scale is.",
    data=Needs(trained=64),
)
