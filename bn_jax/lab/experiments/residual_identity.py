"""Claim 9: batch norm makes residual blocks start near the identity."""

import itertools
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.sweeps import accuracy, draw_batches, load_digits, sweep, train
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Result,
    Setting,
    mean_interval,
)
from bn_jax.lab.models import ResidualMLP
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTHS = 64, 100
# Of the networks at initialization.
WIDTH = 64
FEATURES = 64
EXAMPLES = 128
NETWORKS = 8
# Of the networks that are trained.
NARROW = 16
BATCH_SIZE = 32
MOMENTUM = 0.9
ARMS: dict[str, dict[str, Any]] = {
    "batch norm": {"norm": partial(BatchNorm, momentum=0.9)},
    "no norm": {},
    "SkipInit": {"branch_init": "skipinit"},
    "Fixup": {"branch_init": "fixup"},
}
# Those that are compared at initialization: the others' branches are zero or nearly so.
AT_START = "batch norm", "no norm"
SLOPE = 0.95, 1.05
EXPONENT = -1.1, -0.9
WITHIN = 0.01


def second_moments(seed: jax.Array, arm: str, depth: int) -> tuple[jax.Array, jax.Array]:
    """Measures what flows through networks at initialization, of white input.

    Args:
        seed: of the networks and inputs.
        arm: of `ARMS`.
        depth: blocks.

    Returns:
        Second moments of what the blocks take and the last one gives, [depth + 1], and of the
        branches, [depth]; means over examples, features and `NETWORKS` networks.
    """
    model = ResidualMLP(depth, WIDTH, 10, **ARMS[arm])

    def of_network(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        for_input, for_model = jax.random.split(key)
        x = jax.random.normal(for_input, (EXAMPLES, FEATURES))
        variables = model.init(for_model, x, train=False)
        _, found = model.apply(variables, x, train=True, mutable=["intermediates", "batch_stats"])
        (stream,) = found["intermediates"]["stream"]
        return jnp.mean(stream**2, (1, 2)), jnp.mean(jnp.diff(stream, axis=0) ** 2, (1, 2))

    found = jax.vmap(of_network)(jax.random.split(jax.random.key(seed), NETWORKS))
    stream, branches = (jnp.mean(one, 0) for one in found)
    return stream, branches


def regress(x: Any, y: Any) -> Any:
    """Returns the slope of the least-squares line through every row.

    Args:
        x: [points].
        y: [rows, points].

    Returns:
        [rows].
    """
    return np.polynomial.polynomial.polyfit(x, np.transpose(y), 1)[1]


def train_arm(arm: str, depth: int, steps: int, rates: Any, setting: Setting) -> Any:
    """Trains with every rate.

    Args:
        arm: of `ARMS`.
        depth: blocks.
        steps: of each training.
        rates: of SGD with momentum.
        setting: the seeds.

    Returns:
        Accuracies on the validation and the test part, [2, rates, seeds].
    """
    model = ResidualMLP(depth, NARROW, 10, **ARMS[arm])
    digits = load_digits(setting.chosen)
    rows = draw_batches(setting.chosen, digits.train.x.shape[1], steps, BATCH_SIZE)

    def run(rate: Any, seed: Any, parts: Any, rows: Any) -> Any:
        variables = model.init(jax.random.key(seed), parts.train.x[:1], train=False)
        variables = {name: variables[name] for name in variables if name != "intermediates"}
        optimizer = optax.sgd(rate, MOMENTUM)
        trained = train(model, optimizer, variables, parts.train, rows).variables
        return [accuracy(model, trained, part) for part in (parts.validation, parts.test)]

    return np.asarray(sweep(run, rates, setting.chosen, digits, rows))


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    stream, branches = {}, {}
    for arm in AT_START:
        measure = jax.jit(partial(second_moments, arm=arm, depth=max(DEPTHS)))
        found = [measure(seed) for seed in setting.chosen]
        stream[arm], branches[arm] = (np.stack(one) for one in zip(*found, strict=True))
        setting.advance(0.15)
    shares = {arm: branches[arm] / stream[arm][:, 1:] for arm in AT_START}
    blocks = np.arange(max(DEPTHS) + 1)
    steps = 100 if setting.quick else 200
    rates = np.geomspace(0.01, 0.1, 2 if setting.quick else 3)
    trained = DEPTHS[:1] if setting.quick else DEPTHS
    accuracies: dict[str, dict[int, Any]] = {arm: {} for arm in ARMS}
    best: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
    for depth, arm in itertools.product(trained, ARMS):
        validation, test = train_arm(arm, depth, steps, rates, setting)
        index = int(validation.mean(-1).argmax())
        accuracies[arm][depth], best[arm][depth] = test[index], float(rates[index])
        setting.advance(0.7 / len(ARMS) / len(trained))

    def less(arm: str, depth: int) -> Any:
        return mean_interval(accuracies[arm][depth] - accuracies["batch norm"][depth])

    norm = stream["batch norm"], shares["batch norm"]
    return Result(
        criteria=(
            *(
                Criterion(
                    f"slope of E[x^2] by blocks, depth {one}",
                    "l + 1",
                    mean_interval(regress(blocks[: one + 1], norm[0][:, : one + 1])),
                    *SLOPE,
                )
                for one in DEPTHS
            ),
            *(
                Criterion(
                    f"exponent of the branch's share in l + 1, depth {one}",
                    "1 / (l + 1)",
                    mean_interval(
                        regress(np.log(blocks[1 : one + 1] + 1), np.log(norm[1][:, :one]))
                    ),
                    *EXPONENT,
                )
                for one in DEPTHS
            ),
            *(
                Criterion(
                    f"test accuracy without norm less that with batch norm, depth {depth}",
                    "fails",
                    less("no norm", depth),
                    at_most=-WITHIN,
                )
                for depth in trained
            ),
            *(
                Criterion(
                    f"test accuracy with {arm} less that with batch norm, depth {depth}",
                    "within a point",
                    less(arm, depth),
                    at_least=-WITHIN,
                )
                for arm, depth in itertools.product(("SkipInit", "Fixup"), trained)
            ),
        ),
        curves={
            "stream": {arm: np.log10(one.astype(np.float64)).T for arm, one in stream.items()},
            "share": {arm: np.log10(one.astype(np.float64)).T for arm, one in shares.items()},
            "accuracy": accuracies,
            "rates": best,
        },
        reported={
            "doublings of E[x^2] per block without norm": mean_interval(
                regress(blocks, np.log2(stream["no norm"].astype(np.float64)))
            ),
            **{
                f"test accuracy, {arm}, depth {depth}": mean_interval(one)
                for arm, of_arm in accuracies.items()
                for depth, one in of_arm.items()
            },
        },
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws second moments and shares block by block, and the accuracies."""
    by_block, of_branch, by_arm = figure.subplots(1, 3)
    blocks = np.arange(max(DEPTHS) + 1)
    for arm in AT_START:
        band(by_block, blocks, curves["stream"][arm], arm)
        band(of_branch, blocks[1:], curves["share"][arm], arm)
    gray = {"color": "gray", "linestyle": ":"}
    by_block.plot(blocks, np.log10(blocks + 1), label="l + 1, and 2^l", **gray)
    by_block.plot(blocks, blocks * np.log10(2), **gray)
    by_block.set(xlabel="blocks l", ylabel=r"$\log_{10} E[x^2]$")
    by_block.legend(frameon=False)
    of_branch.plot(blocks[1:], -np.log10(blocks[1:] + 1), label="1 / (l + 1)", **gray)
    of_branch.set(xlabel="block l", ylabel=r"$\log_{10}$ of the branch's share in $E[x^2]$")
    of_branch.legend(frameon=False)
    for index, arm in enumerate(ARMS):
        for place, (depth, values) in enumerate(curves["accuracy"][arm].items()):
            at = [index + 0.2 * place] * len(values)
            label = f"depth {depth}" if index == 0 else None
            marker = {"marker": "os"[place], "color": f"C{index}", "linestyle": "none"}
            by_arm.plot(at, 100 * np.asarray(values), alpha=0.5, label=label, **marker)
    by_arm.set_xticks(range(len(ARMS)), list(ARMS), rotation=20)
    by_arm.set_ylabel("test accuracy (%)")
    by_arm.legend(frameon=False)


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
        f"residual MLPs of width {WIDTH} at initialization, blocks 1 to {DEPTHS[0]} and to "
        f"{DEPTHS[1]}, white input; of width {NARROW} trained at both depths on digits, each arm "
        "at its best rate"
    ),
    limits=(
        "Trained for 200 steps, and narrow: what batch norm does for the generalization of large "
        "networks is not seen."
    ),
    run=run,
    draw=draw,
)
