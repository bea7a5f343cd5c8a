"""Claim 9: batch norm makes residual blocks start near the identity."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import PERCENT, band
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM
from bn_jax.lab.experiments.selection import RateSweep, largest_rate, sweep_accuracies
from bn_jax.lab.experiments.sweeps import draw_trials
from bn_jax.lab.experiments.verdicts import (
    Above,
    Experiment,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
    Within,
)
from bn_jax.lab.models import ResidualMLP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The networks at initialization.
DEPTHS = 64, 100
WIDTH = 64
FEATURES = 64
EXAMPLES = 128
NETWORKS = 8
# The networks that are trained.
TRAINED_DEPTH, NARROW = 16, 16
BATCH_SIZE = 32
MOMENTUM = 0.9
STEPS, QUICK_STEPS = 500, 60
RATES = np.geomspace(3e-4, 1, 8)
# Without norm the activations are 2^8 as large after 16 blocks, and only small rates may train.
RATES_WITHOUT = np.geomspace(1e-6, 1e-1, 6)
# Called with the number of blocks, the width and the number of classes.
ARMS: Mapping[str, Callable[[int, int, int], ResidualMLP]] = {
    "batch norm": partial(ResidualMLP, norm=BATCH_NORM),
    "no norm": ResidualMLP,
    "SkipInit": partial(ResidualMLP, branch_init="skipinit"),
    "Fixup": partial(ResidualMLP, branch_init="fixup"),
}
# The arms that are compared at initialization. The branches of the others start at or near zero.
AT_START = "batch norm", "no norm"
WITHOUT_NORM = "SkipInit", "Fixup"
# Equivalence of accuracies, in points, and how far below the best rate a rate is usable.
POINTS, USABLE = 1.0, 0.05
UNTRAINED = 50.0


class ZeroScaleMLP(nn.Module):
    """A residual MLP with a norm at the end of each branch, whose scale starts at zero.

    Attributes:
        depth: the number of blocks.
        width: features between the blocks.
        num_classes: the number of logits.
    """

    depth: int
    width: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits [n, num_classes] of [n, features]."""
        blocks = nn.scan(
            _ZeroScaleBlock,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x = nn.Dense(self.width, name="stem")(x)
        x, _ = blocks(train, name="block")(x)
        x = nn.relu(BATCH_NORM(use_running_average=not train, name="norm")(x))
        return nn.Dense(self.num_classes, name="classifier")(x)


class _ZeroScaleBlock(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        dense = partial(
            nn.Dense, x.shape[-1], use_bias=False, kernel_init=nn.initializers.he_normal()
        )
        norm = partial(BATCH_NORM, use_running_average=not self.train)
        y = nn.relu(norm(name="norm_0")(dense(name="dense_0")(x)))
        zero = nn.initializers.zeros
        return x + norm(scale_init=zero, name="norm_1")(dense(name="dense_1")(y)), None


TRAINED: Mapping[str, Callable[[int, int, int], nn.Module]] = {
    **ARMS,
    "zero scale": ZeroScaleMLP,
}


def second_moments(seed: jax.Array, arm: str, depth: int) -> tuple[jax.Array, jax.Array]:
    """Measures the activations of networks at initialization, for white input.

    Args:
        seed: the seed of the networks and inputs.
        arm: a name in `ARMS`.
        depth: the number of blocks.

    Returns:
        Second moments of the inputs of the blocks and of the last output, [depth + 1], and of the
        branches, [depth]; means over examples, features and `NETWORKS` networks.
    """
    model = ARMS[arm](depth, WIDTH, 10)

    def of_network(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        for_input, for_model = jax.random.split(key)
        x = jax.random.normal(for_input, (EXAMPLES, FEATURES))
        variables = model.init(for_model, x, train=False)
        _, sown = model.apply(variables, x, train=True, mutable=["intermediates", "batch_stats"])
        (stream,) = sown["intermediates"]["stream"]
        return jnp.mean(stream**2, (1, 2)), jnp.mean(jnp.diff(stream, axis=0) ** 2, (1, 2))

    stream, branches = jax.vmap(of_network)(jax.random.split(jax.random.key(seed), NETWORKS))
    return jnp.mean(stream, 0), jnp.mean(branches, 0)


def regress(x: Any, y: Any) -> Any:
    """Returns the slope of the least-squares line through every row.

    Args:
        x: [points].
        y: [rows, points].

    Returns:
        [rows].
    """
    return np.polynomial.polynomial.polyfit(x, np.transpose(y), 1)[1]


class AtStart(NamedTuple):
    """The activations of an arm at initialization.

    Attributes:
        stream: second moments of the inputs of the blocks and of the last output,
            [seeds, depth + 1].
        share: the second moment of each branch over that of its block's output, [seeds, depth].
    """

    stream: Any
    share: Any


def measure_at_start(setting: Setting) -> dict[str, AtStart]:
    """Measures the arms of `AT_START` at the largest depth."""
    measured = {}
    for arm in AT_START:
        measure = jax.jit(partial(second_moments, arm=arm, depth=max(DEPTHS)))
        runs = (jax.tree.map(np.float64, measure(seed)) for seed in setting.chosen)
        stream, branches = map(np.stack, zip(*runs, strict=True))
        measured[arm] = AtStart(stream, branches / stream[:, 1:])
        setting.advance(0.15)
    return measured


def growth_per_block(stream: Any) -> Any:
    """Returns the mean ratio of the second moments [seeds, depth + 1] of successive blocks."""
    return (stream[:, 1:] / stream[:, :-1]).mean(1)


def train_each(setting: Setting) -> dict[str, RateSweep[Any]]:
    """Trains every arm at every rate, and measures the test accuracies, [rates, seeds]."""
    trials = draw_trials(setting, QUICK_STEPS if setting.quick else STEPS, BATCH_SIZE)
    every = 2 if setting.quick else 1
    swept = {}
    for arm, make in TRAINED.items():
        rates = (RATES_WITHOUT if arm == "no norm" else RATES)[::every]
        model = make(TRAINED_DEPTH, NARROW, setting.num_classes)
        optimizer = partial(optax.sgd, momentum=MOMENTUM)
        swept[arm] = sweep_accuracies(model, optimizer, rates, trials)
        setting.advance(0.7 / len(TRAINED))
    return swept


class Usable(NamedTuple):
    """The usable rates of each seed, [seeds]."""

    smallest: Any
    largest: Any

    @property
    def range(self) -> Any:
        """The largest over the smallest."""
        return self.largest / self.smallest


def usable_rates(swept: RateSweep[Any]) -> Usable:
    """Finds the usable rates.

    A rate is usable if its validation accuracy is at most `USABLE` below that of the best rate.
    """
    validation = np.asarray(swept.validation)
    usable = validation >= validation.max(0) - USABLE
    rates = np.asarray(swept.rates)
    return Usable(rates[usable.argmax(0)], largest_rate(rates, usable))


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    at_start = measure_at_start(setting)
    swept = train_each(setting)
    best = {arm: of_arm.best_for_all_seeds() for arm, of_arm in swept.items()}
    accuracies = {arm: 100 * chosen.measured for arm, chosen in best.items()}
    ranges = {arm: usable_rates(of_arm).range for arm, of_arm in swept.items()}
    norm = at_start["batch norm"]
    blocks = np.arange(max(DEPTHS) + 1)
    return Result(
        values={
            "9a": {
                f"batch norm, depth {depth}": regress(
                    blocks[: depth + 1], norm.stream[:, : depth + 1]
                )
                for depth in DEPTHS
            }
            | {"no norm": growth_per_block(at_start["no norm"].stream) / 2},
            "9b": {
                f"depth {depth}": regress(
                    np.log(blocks[1 : depth + 1] + 1), np.log(norm.share[:, :depth])
                )
                for depth in DEPTHS
            },
            "9c": accuracies["batch norm"] - accuracies["no norm"],
            "9d": accuracies["SkipInit"] - accuracies["batch norm"],
            "9e": {arm: ranges["batch norm"] / ranges[arm] for arm in WITHOUT_NORM},
            "9f": accuracies["zero scale"] - accuracies["batch norm"],
            "9g": accuracies["Fixup"] - accuracies["batch norm"],
        },
        curves={
            "stream": {arm: np.log10(of_arm.stream).T for arm, of_arm in at_start.items()},
            "share": {arm: np.log10(of_arm.share).T for arm, of_arm in at_start.items()},
            "rates": {arm: of_arm.rates for arm, of_arm in swept.items()},
            "accuracy": {arm: of_arm.measured for arm, of_arm in swept.items()},
        },
        series=[Series("9d", arm, "", values) for arm, values in accuracies.items()]
        + [Series("9e", arm, "", values) for arm, values in ranges.items()],
        rates={arm: chosen.rate for arm, chosen in best.items()},
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws second moments and shares by block, and the accuracies by rate."""
    by_block, of_branch, by_rate = figure.subplots(1, 3)
    blocks = np.arange(max(DEPTHS) + 1)
    for arm in AT_START:
        band(by_block, blocks, curves["stream"][arm], arm)
        band(of_branch, blocks[1:], curves["share"][arm], arm)
    gray = {"color": "gray", "linestyle": ":", "zorder": 3}
    by_block.plot(blocks, np.log10(blocks + 1), label="l + 1, and 2^l", **gray)
    by_block.plot(blocks, blocks * np.log10(2), **gray)
    by_block.set(xlabel="blocks l", ylabel=r"$\log_{10} E[x^2]$")
    by_block.legend()
    of_branch.plot(blocks[1:], -np.log10(blocks[1:] + 1), label="1 / (l + 1)", **gray)
    of_branch.set(xlabel="block l", ylabel=r"$\log_{10}$ of the branch's share in $E[x^2]$")
    of_branch.legend(loc="center right", bbox_to_anchor=(1, 0.6))
    for index, arm in enumerate(TRAINED):
        values = 100 * np.asarray(curves["accuracy"][arm])
        band(by_rate, curves["rates"][arm], values, arm, within=PERCENT, color=f"C{index}")
    by_rate.set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)", ylim=(0, 102))
    by_rate.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0, 0.9))


EXPERIMENT = Experiment(
    number=9,
    name="residual_identity",
    claim="Batch norm makes residual blocks start near the identity",
    source="De & Smith 2020; Zhang et al. 2019; Goyal et al. 2017",
    sub_claims=(
        SubClaim(
            "9a",
            "second moments",
            "after l blocks, E[x^2] is l + 1 with batch norm and 2^l without",
            "slope in l with batch norm; growth per block over 2 without",
            Within(0.95, 1.05),
            Published("l + 1, 2^l", "V"),
            "ours: 5 %, for finite width and batches",
            scale="ratio",
        ),
        SubClaim(
            "9b",
            "share of the branch",
            "with batch norm, the share of the branch in E[x^2] is 1 / (l + 1)",
            "exponent of the share as a power of l + 1",
            Within(-1.1, -0.9),
            Published("-1", "V"),
            "ours: a tenth",
        ),
        SubClaim(
            "9c",
            "trains where none does",
            "with batch norm, a residual network trains at a depth at which it does not without",
            f"test accuracy with minus without, depth {TRAINED_DEPTH}, each at its best rate "
            "(points)",
            Above(0.0, size=UNTRAINED),
            reason=f"ours: {UNTRAINED:g} points, so that one trains and one does not",
            is_resplit=True,
        ),
        SubClaim(
            "9d",
            "SkipInit",
            "with SkipInit, a network trains as well as with batch norm",
            "test accuracy minus that with batch norm, each at its best rate (points)",
            Within(-POINTS, POINTS),
            Published("comparable accuracy", "V"),
            f"ours: {POINTS:g} point",
            is_resplit=True,
        ),
        SubClaim(
            "9e",
            "wider range of rates",
            "the range of usable rates is wider with batch norm",
            "largest over smallest usable rate, over that of the other arm",
            Above(1.0),
            reason=f"ours: usable is within {100 * USABLE:g} points of the best rate",
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "9f",
            "zero scale",
            "a norm at the end of each branch whose scale starts at zero trains as well",
            "test accuracy minus that with batch norm, each at its best rate (points)",
            Within(-POINTS, POINTS),
            reason=f"ours: {POINTS:g} point",
            is_resplit=True,
        ),
        SubClaim(
            "9g",
            "Fixup",
            "with Fixup, a network trains as well as with batch norm",
            "test accuracy minus that with batch norm, each at its best rate (points)",
            Within(-POINTS, POINTS),
            Published("comparable accuracy", "V"),
            f"ours: {POINTS:g} point",
            is_resplit=True,
        ),
    ),
    protocol=(
        f"residual MLPs of width {WIDTH} at initialization, blocks 1 to {DEPTHS[0]} and 1 to "
        f"{DEPTHS[1]}, white input; residual MLPs of {TRAINED_DEPTH} blocks of width {NARROW} "
        f"trained on digits, {STEPS} steps at 8 rates from 3e-4 to 1, without norm from 1e-6 to "
        "0.1, each arm at its best rate"
    ),
    limits=(
        "Narrow networks and an easy task: what batch norm does for the generalization of large "
        "networks is not seen."
    ),
    run=run,
    draw=draw,
    easy="Second moments and shares at initialization: they follow the theory block by block.",
    hard=(
        "Equal accuracy to a point: short training measures speed, and arms have to be compared "
        "after they have converged."
    ),
    data=Needs(trained=BATCH_SIZE),
)
