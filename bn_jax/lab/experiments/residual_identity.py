"""Claim 9: batch norm makes residual blocks start near the identity."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import BATCH_NORM
from bn_jax.lab.experiments.selection import Chosen, sweep_accuracies
from bn_jax.lab.experiments.sweeps import draw_trials
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Interval,
    Result,
    Setting,
    mean_interval,
)
from bn_jax.lab.models import ResidualMLP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTHS = 64, 100
# The networks at initialization.
WIDTH = 64
FEATURES = 64
EXAMPLES = 128
NETWORKS = 8
# The networks that are trained.
NARROW = 16
BATCH_SIZE = 32
MOMENTUM = 0.9
# Called with the number of blocks, the width and the number of classes.
ARMS: Mapping[str, Callable[[int, int, int], ResidualMLP]] = {
    "batch norm": partial(ResidualMLP, norm=BATCH_NORM),
    "no norm": ResidualMLP,
    "SkipInit": partial(ResidualMLP, branch_init="skipinit"),
    "Fixup": partial(ResidualMLP, branch_init="fixup"),
}
# The arms that are compared at initialization. The branches of the others start at or near zero.
AT_START = "batch norm", "no norm"
WITHIN = 0.01


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
        stream, branches = map(np.stack, zip(*map(measure, setting.chosen), strict=True))
        measured[arm] = AtStart(stream, branches / stream[:, 1:])
        setting.advance(0.15)
    return measured


def train_each(setting: Setting, depths: Sequence[int]) -> dict[str, dict[int, Chosen[Any]]]:
    """Trains every arm at every depth and rate.

    Args:
        setting: the seeds, and the size of the run.
        depths: the numbers of blocks.

    Returns:
        For each arm and depth the test accuracies at the rate that is best for all seeds, [seeds].
    """
    trials = draw_trials(setting.chosen, 100 if setting.quick else 200, BATCH_SIZE)
    rates = np.geomspace(0.01, 0.1, 2 if setting.quick else 3)
    chosen: dict[str, dict[int, Chosen[Any]]] = {arm: {} for arm in ARMS}
    for depth, arm in itertools.product(depths, ARMS):
        model = ARMS[arm](depth, NARROW, 10)
        swept = sweep_accuracies(model, partial(optax.sgd, momentum=MOMENTUM), rates, trials)
        chosen[arm][depth] = swept.best_for_all_seeds()
        setting.advance(0.7 / len(ARMS) / len(depths))
    return chosen


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    at_start = measure_at_start(setting)
    trained = train_each(setting, DEPTHS[:1] if setting.quick else DEPTHS)
    accuracies = {
        arm: {depth: chosen.measured for depth, chosen in by_depth.items()}
        for arm, by_depth in trained.items()
    }
    return Result(
        criteria=(*_criteria_at_start(at_start["batch norm"]), *_criteria_trained(accuracies)),
        curves={
            "stream": {
                arm: np.log10(of_arm.stream.astype(np.float64)).T
                for arm, of_arm in at_start.items()
            },
            "share": {
                arm: np.log10(of_arm.share.astype(np.float64)).T for arm, of_arm in at_start.items()
            },
            "accuracy": accuracies,
        },
        reported=_reported(at_start["no norm"], accuracies),
        rates={
            f"{arm}, depth {depth}": chosen.rate
            for arm, by_depth in trained.items()
            for depth, chosen in by_depth.items()
        },
    )


def _criteria_at_start(norm: AtStart) -> list[Criterion]:
    blocks = np.arange(max(DEPTHS) + 1)
    slopes = [
        Criterion(
            f"slope of E[x^2] by blocks, depth {depth}",
            "l + 1",
            mean_interval(regress(blocks[: depth + 1], norm.stream[:, : depth + 1])),
            at_least=0.95,
            at_most=1.05,
        )
        for depth in DEPTHS
    ]
    exponents = [
        Criterion(
            f"exponent of the branch's share in l + 1, depth {depth}",
            "1 / (l + 1)",
            mean_interval(
                regress(np.log(blocks[1 : depth + 1] + 1), np.log(norm.share[:, :depth]))
            ),
            at_least=-1.1,
            at_most=-0.9,
        )
        for depth in DEPTHS
    ]
    return slopes + exponents


def _criteria_trained(accuracies: Mapping[str, Mapping[int, Any]]) -> list[Criterion]:
    def minus_norm(arm: str, depth: int) -> Interval:
        return mean_interval(accuracies[arm][depth] - accuracies["batch norm"][depth])

    depths = list(accuracies["batch norm"])
    worse = [
        Criterion(
            f"test accuracy without norm less that with batch norm, depth {depth}",
            "fails",
            minus_norm("no norm", depth),
            at_most=-WITHIN,
        )
        for depth in depths
    ]
    no_worse = [
        Criterion(
            f"test accuracy with {arm} less that with batch norm, depth {depth}",
            "within a point",
            minus_norm(arm, depth),
            at_least=-WITHIN,
        )
        for arm, depth in itertools.product(("SkipInit", "Fixup"), depths)
    ]
    return worse + no_worse


def _reported(no_norm: AtStart, accuracies: Mapping[str, Mapping[int, Any]]) -> dict[str, Interval]:
    blocks = np.arange(max(DEPTHS) + 1)
    doublings = regress(blocks, np.log2(no_norm.stream.astype(np.float64)))
    return {
        "doublings of E[x^2] per block without norm": mean_interval(doublings),
        **{
            f"test accuracy, {arm}, depth {depth}": mean_interval(of_depth)
            for arm, by_depth in accuracies.items()
            for depth, of_depth in by_depth.items()
        },
    }


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws second moments and shares by block, and the accuracies."""
    by_block, of_branch, by_arm = figure.subplots(1, 3)
    blocks = np.arange(max(DEPTHS) + 1)
    for arm in AT_START:
        band(by_block, blocks, curves["stream"][arm], arm)
        band(of_branch, blocks[1:], curves["share"][arm], arm)
    gray = {"color": "gray", "linestyle": ":"}
    by_block.plot(blocks, np.log10(blocks + 1), label="l + 1, and 2^l", **gray)
    by_block.plot(blocks, blocks * np.log10(2), **gray)
    by_block.set(xlabel="blocks l", ylabel=r"$\log_{10} E[x^2]$")
    by_block.legend()
    of_branch.plot(blocks[1:], -np.log10(blocks[1:] + 1), label="1 / (l + 1)", **gray)
    of_branch.set(xlabel="block l", ylabel=r"$\log_{10}$ of the branch's share in $E[x^2]$")
    of_branch.legend()
    for index, arm in enumerate(ARMS):
        for place, (depth, values) in enumerate(curves["accuracy"][arm].items()):
            by_arm.plot(
                [index + 0.2 * place] * len(values),
                100 * np.asarray(values),
                alpha=0.5,
                label=f"depth {depth}" if index == 0 else None,
                marker="os"[place],
                color=f"C{index}",
                linestyle="none",
            )
    by_arm.set_xticks(range(len(ARMS)), list(ARMS), rotation=20)
    by_arm.set_ylabel("test accuracy (%)")
    by_arm.legend()


EXPERIMENT = Experiment(
    number=9,
    name="residual_identity",
    claim="Batch norm makes residual blocks start near the identity",
    source="De & Smith 2020; Zhang et al. 2019",
    published=(
        "E[x^2] after l blocks is 2^l without norm and l + 1 with batch norm, the branch's share "
        "1 / (l + 1); SkipInit and Fixup train as well"
    ),
    protocol=(
        f"residual MLPs of width {WIDTH} at initialization, blocks 1 to {DEPTHS[0]} and 1 to "
        f"{DEPTHS[1]}, white input; residual MLPs of width {NARROW} trained on digits at both "
        "depths, each arm at its best rate"
    ),
    limits=(
        "Trained for 200 steps, and narrow: what batch norm does for the generalization of large "
        "networks is not seen."
    ),
    run=run,
    draw=draw,
)
