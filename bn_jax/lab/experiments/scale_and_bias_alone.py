"""Claim 15: a network learns if only the scale and bias of its norms are trained."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax._paths import format_path
from bn_jax.lab.experiments.figures import points
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
    ChosenRate,
    Criterion,
    Experiment,
    Interval,
    Result,
    Setting,
    exact,
    mean_interval,
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
RATES = 0.01, 0.03, 0.1, 0.3, 1.0
SMALL_SCALE = 0.01


class Net(NamedTuple):
    """A network and how it is trained.

    Attributes:
        model: the network, with batch norm.
        shape: the shape of an example.
        arms: the number of `ARMS` that are trained.
        steps: the number of steps of each training.
        batch_size: the number of examples in each step.
        rates: the rates of the sweep.
        side_by_side: whether all trainings are one compiled program. Convolutions whose kernels
            differ from training to training are slow on a CPU: they run one training after another,
            step by step.
    """

    model: nn.Module
    shape: tuple[int, ...]
    arms: int
    steps: int
    batch_size: int
    rates: tuple[float, ...]
    side_by_side: bool


def nets(quick: bool) -> dict[str, Net]:
    """Returns the networks by their names.

    Args:
        quick: whether to train for fewer steps.
    """
    dense = partial(
        Net,
        shape=(64,),
        arms=len(ARMS),
        steps=40 if quick else 400,
        batch_size=64,
        rates=RATES,
        side_by_side=True,
    )
    convolutional = partial(
        Net,
        shape=(8, 8, 1),
        arms=2,
        steps=10 if quick else 100,
        batch_size=32,
        rates=RATES[1:4:2],
        side_by_side=False,
    )
    mlp = partial(ScannedMLP, width=64, norm=BATCH_NORM)
    resnet = partial(ResNet, 10, norm=BATCH_NORM)
    return {
        "MLP, depth 2": dense(mlp(2)),
        "MLP, depth 8": dense(mlp(8)),
        "CNN, depth 2": convolutional(resnet(stage_sizes=(1,), widths=(8,))),
        "CNN, depth 8": convolutional(resnet(stage_sizes=(1, 3), widths=(8, 8))),
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
    """Trains every arm at every rate.

    Args:
        setting: the seeds, and the size of the run.
        net: the network.

    Returns:
        The measurements at the best rate of each seed and arm, [seeds, arms].
    """
    trials = draw_trials(setting.chosen, net.steps, net.batch_size)
    digits = Digits(
        *(Part(part.x.reshape(*part.x.shape[:2], *net.shape), part.y) for part in trials.digits)
    )
    trials = jax.device_put(trials._replace(digits=digits))
    rates = jnp.asarray(net.rates)
    shape = net.arms, len(net.rates), setting.seeds

    def run_at(place: Any) -> Run:
        arm, rate, seed = place
        return Run(arm, rates[rate], take(trials, seed))

    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, len(shape))
    if net.side_by_side:
        outcomes = map_runs(lambda place: train_once(net.model, run_at(place)), grid)
    else:
        one_by_one = train_stepwise(net.model, [run_at(place) for place in grid])
        outcomes = jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one)

    def rates_first(leaf: Any) -> Any:
        """Returns [arms * rates * seeds] as [rates, seeds, arms]."""
        return np.moveaxis(np.asarray(leaf).reshape(shape), 0, -1)

    outcomes = jax.tree.map(rates_first, outcomes)
    swept = RateSweep(np.asarray(net.rates), outcomes.validation, outcomes.measured)
    return swept.best_for_each_seed()


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
    begun = jax.jit(partial(begin, model))
    ended = jax.jit(partial(finish, model))

    @jax.jit
    def step(state: State, rate: Any, mask: Any, part: Part, batch: Any) -> State:
        return make_step(model, make_optimizer(rate, mask), part)(state, batch)[0]

    outcomes = []
    for run in runs:
        digits = run.trial.digits
        variables, mask = begun(run)
        state = start(make_optimizer(run.rate, mask), variables)
        for batch in run.trial.batches:
            state = step(state, run.rate, mask, digits.train, batch)
        outcomes.append(jax.device_get(ended(state.variables, mask, digits)))
    return outcomes


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


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    chosen = {}
    for name, net in nets(setting.quick).items():
        chosen[name] = train_all(setting, net)
        setting.advance(0.25)
    reported: dict[str, Interval] = {}
    for name, of_net in chosen.items():
        reported |= _reported(name, of_net.measured)
    return Result(
        criteria=tuple(
            Criterion(
                f"test accuracy, {name}, scale and bias minus as many random weights",
                "better (ResNets, CIFAR-10 and ImageNet)",
                mean_interval(of_net.measured.accuracy[:, 0] - of_net.measured.accuracy[:, 1]),
                at_least=0.0,
            )
            for name, of_net in chosen.items()
        ),
        curves={
            "networks": {name: _curves(of_net.measured) for name, of_net in chosen.items()},
            "arms": ARMS,
        },
        reported=reported,
        rates={
            f"{name}, {arm}": ChosenRate(of_net.rate.value[:, place], of_net.rate.at_edge[:, place])
            for name, of_net in chosen.items()
            for place, arm in enumerate(ARMS[: of_net.rate.value.shape[1]])
        },
    )


def _curves(measured: Measured) -> dict[str, Any]:
    """Returns what was measured of each arm, [arms, seeds]."""
    return {
        "accuracy": measured.accuracy.T,
        "small": measured.small.T,
    }


def _reported(name: str, measured: Measured) -> dict[str, Interval]:
    reported = {f"{name}: parameters of norms": exact(measured.count[0, 0])}
    for place in range(measured.accuracy.shape[1]):
        where = f"{name}, {ARMS[place]}"
        accuracies, small = 100 * measured.accuracy[:, place], 100 * measured.small[:, place]
        reported[f"{where}: test accuracy (%)"] = mean_interval(accuracies)
        if ARMS[place].startswith("scale"):
            reported[f"{where}: |scale| < {SMALL_SCALE} (%)"] = mean_interval(small)
    return reported


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the accuracies of all arms, and their shares of small scales."""
    by_arm, small = figure.subplots(1, 2, width_ratios=(2, 1))
    names = list(curves["networks"])
    for place, arm in enumerate(curves["arms"]):
        trains_norms = arm.startswith("scale")
        for axes, key in ((by_arm, "accuracy"), (small, "small")):
            if key == "small" and not trains_norms:
                continue
            trained = [n for n in names if len(curves["networks"][n][key]) > place]
            points(
                axes,
                np.array([names.index(n) for n in trained]) + 0.12 * (place - 1.5),
                [100 * np.array(curves["networks"][n][key][place], float) for n in trained],
                arm,
                fmt="o" if trains_norms else "s",
                color=f"C{place}",
            )
    for axes in (by_arm, small):
        axes.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names])
    by_arm.axhline(10, color="gray", linestyle=":")
    by_arm.set(ylabel="test accuracy (%)", ylim=(0, 100))
    small.set(ylabel=f"scales below {SMALL_SCALE} in size (%)")
    by_arm.legend(fontsize="small")


EXPERIMENT = Experiment(
    number=15,
    name="scale_and_bias_alone",
    claim="Training scale and bias alone learns, and more than training as many other weights",
    source="Frankle, Schwab & Morcos 2020",
    published="ResNets 82 % (CIFAR-10), 32 % (ImageNet); about a third of the scales near zero",
    protocol=(
        "MLP of 2 and 8 layers of 64, ResNet of 2 and 8 convolutions in blocks of width 8, on "
        "digits; SGD with momentum, each arm at its best rate; all other parameters, the "
        "classifier's too, stay at their random initial values; scales start at 1"
    ),
    limits=(
        "The published figures are those of wide and deep networks after long training; here the "
        "networks have 48 to 1024 parameters in norms."
    ),
    run=run,
    draw=draw,
)
