"""Claim 15: a network learns where nothing but the scale and bias of its norms is trained."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax._paths import format_path
from bn_jax.lab.experiments.nets import ScannedMLP
from bn_jax.lab.experiments.sweeps import (
    Digits,
    Part,
    accuracy,
    draw_batches,
    load_digits,
    make_step,
    start,
    train,
)
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Interval,
    Result,
    Setting,
    exact,
    mean_interval,
)
from bn_jax.lab.models import ResNet
from bn_jax.linen import BatchNorm
from bn_jax.optim import norm_params_mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NORM = partial(BatchNorm, momentum=0.9)
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
        model: with batch norm.
        shape: of an example.
        arms: how many of `ARMS` are trained.
        steps: of each training.
        batch_size: of each step.
        rates: of the sweep.
        side_by_side: whether all runs are one batch of work. Convolutions whose kernels differ from
            run to run are slow on a CPU: they are made one after another, step by step.
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
        quick: whether fewer steps will do.
    """
    dense = partial(Net, shape=(64,), arms=len(ARMS), batch_size=64, rates=RATES, side_by_side=True)
    convolutional = partial(
        Net, shape=(8, 8, 1), arms=2, batch_size=32, rates=RATES[1:4:2], side_by_side=False
    )
    mlp = partial(ScannedMLP, width=64, norm=NORM)
    resnet = partial(ResNet, 10, norm=NORM)
    return {
        "MLP, depth 2": dense(mlp(2), steps=40 if quick else 400),
        "MLP, depth 8": dense(mlp(8), steps=40 if quick else 400),
        "CNN, depth 2": convolutional(
            resnet(stage_sizes=(1,), widths=(8,)), steps=10 if quick else 100
        ),
        "CNN, depth 8": convolutional(
            resnet(stage_sizes=(1, 3), widths=(8, 8)), steps=10 if quick else 100
        ),
    }


def masks(params: Any, key: jax.Array) -> Any:
    """Chooses what each arm trains.

    Args:
        params: of a network with norms and a "classifier".
        key: of the random choice.

    Returns:
        A tree as `params` with booleans [arms, ...]: those of norms; as many weights of all other
        layers but the classifier, drawn at random; and both with the classifier.
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
    """Draws as many parameters as belong to norms from those of neither norms nor classifier.

    Args:
        norms: booleans of the shapes of the parameters.
        classifier: likewise.
        key: of the choice.

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
    """Makes updates zero where a mask is False, element by element, which `optax.masked` cannot."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, chosen: u * chosen, updates, mask)
    )


def train_all(setting: Setting, net: Net) -> dict[str, Any]:
    """Trains every arm with every rate.

    Args:
        setting: the seeds.
        net: the network.

    Returns:
        At each arm's rate that is best on the validation part, [arms, seeds]: "accuracy" on the
        test part, "small", the share of scales below `SMALL_SCALE`, and "rate"; and "counts", of
        the parameters that an arm trains, [arms].
    """
    digits = load_digits(setting.chosen)
    digits = Digits(*(Part(p.x.reshape(*p.x.shape[:2], *net.shape), p.y) for p in digits))
    rows = draw_batches(setting.chosen, digits.train.x.shape[1], net.steps, net.batch_size)
    grid = np.stack(
        np.meshgrid(
            np.arange(net.arms),
            np.arange(len(net.rates)),
            np.arange(setting.seeds),
            indexing="ij",
        )
    ).reshape(3, -1)

    def given(place: Any) -> tuple[Any, ...]:
        arm, rate, seed = place
        parts, batches, number = jax.tree.map(
            lambda leaf: jnp.asarray(leaf)[seed], (digits, rows, setting.chosen)
        )
        return arm, jnp.asarray(net.rates)[rate], number, parts, batches

    if net.side_by_side:
        found = jax.jit(jax.vmap(lambda place: train_once(net.model, *given(place))))(grid.T)
    else:
        trained = train_stepwise(net.model, [given(place) for place in grid.T])
        found = {name: np.stack([one[name] for one in trained]) for name in trained[0]}
    shape = net.arms, len(net.rates), setting.seeds
    found = {name: np.asarray(values).reshape(shape) for name, values in found.items()}
    best = found["validation"].argmax(1)
    chosen = {
        name: np.take_along_axis(found[name], best[:, None], 1)[:, 0] for name in ("test", "small")
    }
    return {
        "accuracy": chosen["test"],
        "small": chosen["small"],
        "rate": np.array(net.rates)[best],
        "counts": found["count"][:, 0, 0],
    }


def train_once(
    model: nn.Module, arm: Any, rate: Any, seed: Any, parts: Digits, rows: Any
) -> dict[str, jax.Array]:
    """Trains what an arm trains of a network.

    Args:
        model: the network.
        arm: its place in `ARMS`.
        rate: of the learning.
        seed: of the network and of what is drawn.
        parts: the data.
        rows: which examples enter each step, [steps, n].

    Returns:
        Accuracies "validation" and "test", the share of scales that are "small", and the "count" of
        parameters that were trained.
    """
    variables, mask = begin(model, arm, seed, parts.train)
    trained = train(model, make_optimizer(rate, mask), variables, parts.train, rows).variables
    return finish(model, trained, mask, parts)


def train_stepwise(model: nn.Module, runs: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Trains as `train_once`, every step a call of its own.

    Convolutions inside a loop that XLA compiles for a CPU are several times slower.

    Args:
        model: the network.
        runs: the other arguments of `train_once`.

    Returns:
        What it returns, for each run.
    """
    begun = jax.jit(partial(begin, model))
    ended = jax.jit(partial(finish, model))

    @jax.jit
    def step(carry: Any, rate: Any, mask: Any, part: Part, batch: Any) -> Any:
        return make_step(model, make_optimizer(rate, mask), part)(carry, batch)[0]

    found = []
    for arm, rate, seed, parts, rows in runs:
        variables, mask = begun(arm, seed, parts.train)
        carry = start(make_optimizer(rate, mask), variables)
        for batch in rows:
            carry = step(carry, rate, mask, parts.train, batch)
        found.append(jax.device_get(ended(carry[0], mask, parts)))
    return found


def begin(model: nn.Module, arm: Any, seed: Any, part: Part) -> tuple[Any, Any]:
    """Returns the initial variables of a network, and what an arm trains of it."""
    of_network, of_mask = jax.random.split(jax.random.key(seed))
    variables = model.init(of_network, part.x[:1], train=False)
    # The residual blocks' own zeros would keep weights of a branch without any gradient.
    params = jax.tree.map_with_path(
        lambda path, leaf: jnp.ones_like(leaf) if format_path(path).endswith("scale") else leaf,
        variables["params"],
    )
    mask = jax.tree.map(lambda leaf: leaf[arm], masks(params, of_mask))
    return {**variables, "params": params}, mask


def make_optimizer(rate: Any, mask: Any) -> optax.GradientTransformation:
    """Returns what trains the parameters of a mask."""
    return optax.chain(optax.sgd(rate, momentum=0.9), masked(mask))


def finish(model: nn.Module, trained: Any, mask: Any, parts: Digits) -> dict[str, jax.Array]:
    """Returns what `train_once` does, of trained variables."""
    scales = [
        jnp.abs(leaf).ravel()
        for path, leaf in jax.tree.leaves_with_path(trained["params"])
        if format_path(path).endswith("scale")
    ]
    return {
        "validation": accuracy(model, trained, parts.validation),
        "test": accuracy(model, trained, parts.test),
        "small": jnp.mean(jnp.concatenate(scales) < SMALL_SCALE),
        "count": sum(leaf.sum() for leaf in jax.tree.leaves(mask)),
    }


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    found = {}
    for name, net in nets(setting.quick).items():
        found[name] = train_all(setting, net)
        setting.advance(0.25)
    return Result(
        criteria=tuple(
            Criterion(
                f"test accuracy, {name}, scale and bias minus as many random weights",
                "better (ResNets, CIFAR-10 and ImageNet)",
                mean_interval(values["accuracy"][0] - values["accuracy"][1]),
                at_least=0.0,
            )
            for name, values in found.items()
        ),
        curves={"found": found, "arms": ARMS},
        reported={key: one for name in found for key, one in _reported(name, found[name]).items()},
    )


def _reported(name: str, values: Mapping[str, Any]) -> dict[str, Interval]:
    reported = {f"{name}: parameters of norms": exact(values["counts"][0])}
    for place in range(len(values["accuracy"])):
        where = f"{name}, {ARMS[place]}"
        reported[f"{where}: test accuracy (%)"] = mean_interval(100 * values["accuracy"][place])
        if ARMS[place].startswith("scale"):
            small = mean_interval(100 * values["small"][place])
            reported[f"{where}: |scale| < {SMALL_SCALE} (%)"] = small
    return reported


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the accuracies of all arms, and the shares of small scales."""
    by_arm, small = figure.subplots(1, 2, width_ratios=(2, 1))
    names = list(curves["found"])
    for place, arm in enumerate(curves["arms"]):
        for axes, key in ((by_arm, "accuracy"), (small, "small")):
            if key == "small" and not arm.startswith("scale"):
                continue
            kept = [n for n in names if len(curves["found"][n][key]) > place]
            values = np.array([curves["found"][n][key][place] for n in kept], float)
            estimate, low, high = np.array([mean_interval(100 * one) for one in values]).T
            axes.errorbar(
                np.array([names.index(n) for n in kept]) + 0.12 * (place - 1.5),
                estimate,
                [estimate - low, high - estimate],
                fmt="o" if arm.startswith("scale") else "s",
                capsize=3,
                color=f"C{place}",
                label=arm,
            )
    for axes in (by_arm, small):
        axes.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names])
    by_arm.axhline(10, color="gray", linestyle=":")
    by_arm.set(ylabel="test accuracy (%)", ylim=(0, 100))
    small.set(ylabel=f"scales below {SMALL_SCALE} in size (%)")
    by_arm.legend(frameon=False, fontsize="small")


EXPERIMENT = Experiment(
    number=15,
    name="scale_and_bias_alone",
    claim="Training scale and bias alone learns, and more than training as many other weights",
    source="Frankle, Schwab & Morcos 2020",
    published="ResNets 82 % (CIFAR-10), 32 % (ImageNet); about a third of the scales near zero",
    protocol=(
        "MLP of 2 and 8 layers of 64, ResNet of 2 and 8 convolutions in blocks of width 8, on "
        "digits; SGD with momentum, each arm at its best rate; everything else stays at its random "
        "initial value, the classifier too; scales start at 1"
    ),
    limits=(
        "The published figures are those of wide and deep networks after long training; here the "
        "networks have 48 to 1024 parameters in norms."
    ),
    run=run,
    draw=draw,
)
