"""Claim 14: groups that are correlated within a batch let the network use its neighbours."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from bn_jax.lab.experiments.nets import MLP
from bn_jax.lab.experiments.sweeps import Digits, Part, accuracy, load_digits, train
from bn_jax.lab.experiments.verdicts import Criterion, Experiment, Result, Setting, mean_interval
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASSES, CLASSES_PER_GROUP, GROUP = 10, 2, 32
EACH = GROUP // CLASSES_PER_GROUP
WIDTHS = 64, 64
RATES = 0.03, 0.1, 0.3, 1.0
ARMS = "per group, sorted", "per group, shuffled", "synchronized"
PER_GROUP, OVER_ALL = (
    MLP(WIDTHS, norm=partial(BatchNorm, momentum=0.9, virtual_batch_size=size))
    for size in (GROUP, None)
)
# Batches to test with.
TESTS = 20
# Those whose gap the claim says to vanish.
CURED = ARMS[1:]


def draw_groups(labels: Any, steps: int, generator: np.random.Generator) -> npt.NDArray[np.int32]:
    """Draws batches that hold every class equally often, each class in one group only.

    Args:
        labels: [n].
        steps: how many batches.
        generator: of the numbers.

    Returns:
        Indices [steps, groups * GROUP], one group after the other; no example twice in a batch.
    """
    of_class = [np.flatnonzero(labels == one) for one in range(CLASSES)]

    def batch() -> Any:
        order = generator.permutation(CLASSES)
        return np.concatenate(
            [generator.choice(of_class[one], EACH, replace=False) for one in order]
        )

    return np.stack([batch() for _ in range(steps)]).astype(np.int32)


def arranged(arm: str, rows: Any, generator: np.random.Generator) -> Any:
    """Returns the same batches as an arm has them: shuffled across their groups, or as they are."""
    return generator.permuted(rows, axis=-1) if arm == "per group, shuffled" else rows


def accuracies(setting: Setting, arm: str, steps: int) -> dict[str, Any]:
    """Trains one arm with every rate, and tests it in both modes.

    Args:
        setting: the seeds.
        arm: one of `ARMS`.
        steps: of each training.

    Returns:
        Shares of right answers [rates, seeds]: on the validation part in evaluation mode, and on
        batches of the training and the test part, drawn and arranged as the arm's, in training and
        in evaluation mode.
    """
    digits = load_digits(setting.chosen)

    def draw_rows(part: Part, purpose: int, count: int) -> Any:
        generators = [np.random.default_rng([purpose, int(seed)]) for seed in setting.chosen]
        pairs = zip(part.y, generators, strict=True)
        return np.stack([arranged(arm, draw_groups(y, count, one), one) for y, one in pairs])

    tests = {"train": draw_rows(digits.train, 1, TESTS), "test": draw_rows(digits.test, 2, TESTS)}
    rows = draw_rows(digits.train, 0, steps)
    model = OVER_ALL if arm == "synchronized" else PER_GROUP
    found = _outcomes(model, jnp.asarray(RATES), setting.chosen, digits, rows, tests)
    return jax.tree.map(lambda one: np.asarray(one, np.float64), found)


@partial(jax.jit, static_argnums=0)
def _outcomes(
    model: MLP, rates: jax.Array, seeds: jax.Array, digits: Digits, rows: Any, tests: Any
) -> dict[str, jax.Array]:
    """Returns what `accuracies` does; two arms have the same program."""

    def run(rate: Any, seed: Any, parts: Digits, rows: Any, tests: Any) -> dict[str, jax.Array]:
        variables = model.init(jax.random.key(seed), parts.train.x[:1], train=False)
        trained = train(model, optax.sgd(rate), variables, parts.train, rows).variables
        found = {"validation": accuracy(model, trained, parts.validation)}
        for name, part in (("train", parts.train), ("test", parts.test)):
            batches = Part(part.x[tests[name]], part.y[tests[name]])
            each = jax.lax.map(lambda one: accuracy(model, trained, one, train=True), batches)
            together = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batches)
            found[f"{name}, training mode"] = jnp.mean(each)
            found[f"{name}, evaluation mode"] = accuracy(model, trained, together)
        return found

    of_seeds = jax.vmap(run, (None, 0, 0, 0, 0))
    return jax.vmap(of_seeds, (0, None, None, None, None))(rates, seeds, digits, rows, tests)


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    steps = 60 if setting.quick else 200
    best = {}
    for arm in ARMS:
        found = accuracies(setting, arm, steps)
        setting.advance(1 / len(ARMS))
        rate = int(found["validation"].mean(1).argmax())
        best[arm] = {name: 100 * one[rate] for name, one in found.items()}

    def gap(arm: str, part: str) -> Any:
        return best[arm][f"{part}, training mode"] - best[arm][f"{part}, evaluation mode"]

    sorted_arm, synchronized = best[ARMS[0]], best[ARMS[2]]
    return Result(
        criteria=tuple(
            Criterion(
                f"accuracy in training minus evaluation mode, unseen digits, {arm} (points)",
                "vanishes",
                mean_interval(gap(arm, "test")),
                -1,
                1,
            )
            for arm in CURED
        ),
        curves={"accuracy": best},
        reported={
            f"accuracy in training minus evaluation mode, unseen digits, {ARMS[0]} (points)": (
                mean_interval(gap(ARMS[0], "test"))
            ),
            **{
                f"the same of digits trained on, {arm} (points)": mean_interval(gap(arm, "train"))
                for arm in ARMS
            },
            "sorted in training mode minus synchronized in evaluation mode (points)": (
                mean_interval(
                    sorted_arm["test, training mode"] - synchronized["test, evaluation mode"]
                )
            ),
            "sorted minus synchronized, both in evaluation mode (points)": (
                mean_interval(
                    sorted_arm["test, evaluation mode"] - synchronized["test, evaluation mode"]
                )
            ),
        },
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the accuracy of each arm in both modes, and their difference on both parts."""
    levels, gaps = figure.subplots(1, 2)
    at = np.arange(len(ARMS))
    found = [
        {name: np.asarray(one) for name, one in curves["accuracy"][arm].items()} for arm in ARMS
    ]
    for offset, mode in zip((-0.1, 0.1), ("training mode", "evaluation mode"), strict=True):
        _points(levels, at + offset, [one[f"test, {mode}"] for one in found], mode)
    for offset, (part, label) in zip(
        (-0.1, 0.1), (("test", "unseen digits"), ("train", "digits trained on")), strict=True
    ):
        differences = [
            one[f"{part}, training mode"] - one[f"{part}, evaluation mode"] for one in found
        ]
        _points(gaps, at + offset, differences, label)
    gaps.axhspan(-1, 1, color="gray", alpha=0.15, linewidth=0, label="within 1 point")
    levels.set_ylabel("accuracy on unseen digits (%)")
    gaps.set_ylabel("training minus evaluation mode (points)")
    gaps.set_yscale("symlog", linthresh=1)
    for axes in (levels, gaps):
        axes.set_xticks(at, ARMS)
        axes.set_xlabel("statistics of a batch of five groups")
        axes.legend(frameon=False)


def _points(axes: "Axes", x: Any, runs: Any, label: str) -> None:
    """Draws means over seeds and their intervals; runs: [points, seeds]."""
    mean, low, high = np.array([mean_interval(one) for one in runs]).T
    axes.errorbar(x, mean, (mean - low, high - mean), None, "o", capsize=3, label=label)


EXPERIMENT = Experiment(
    number=14,
    name="batch_leakage",
    claim="Correlated groups part training from evaluation; shuffling or synchronizing mends it",
    source="Wu & Johnson 2021",
    published="the gap between training and evaluation closes with either",
    protocol=(
        "MLP 64-64-64-10 on digits; batches of 160 with 16 of every class, in five groups "
        "(devices) of 32 with two classes each; statistics per group, per group after shuffling, "
        "or over all; "
        "accuracy on the same unseen digits, arranged as in training, in both modes"
    ),
    limits=(
        "The published case is a detector's head, whose groups are the regions of one image, and "
        "which does better in training by knowing its neighbours. Here groups share classes, which "
        "is cruder: statistics of a sorted group also take away what its classes have in common, "
        "and where training mode is the worse one, that is more than what neighbours tell."
    ),
    run=run,
    draw=draw,
)
