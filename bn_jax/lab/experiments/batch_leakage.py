"""Claim 14: with correlated groups in a batch, a network learns to use its neighbours."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from bn_jax.lab.experiments.figures import points
from bn_jax.lab.experiments.nets import MLP
from bn_jax.lab.experiments.selection import Chosen, Outcome, sweep_rates
from bn_jax.lab.experiments.sweeps import Part, Trial, accuracy, load_digits, train_trial
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Interval,
    Result,
    Setting,
    mean_interval,
)
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES, CLASSES_PER_GROUP, GROUP = 10, 2, 32
EACH = GROUP // CLASSES_PER_GROUP
WIDTHS = 64, 64
RATES = 0.03, 0.1, 0.3, 1.0
SORTED, SHUFFLED, SYNCHRONIZED = ARMS = (
    "per group, sorted",
    "per group, shuffled",
    "synchronized",
)
# The number of batches to test with.
TESTS = 20
# The arms whose gap should vanish by the claim.
CURED = SHUFFLED, SYNCHRONIZED


def make_model(arm: str) -> MLP:
    """Returns the network of an arm: with statistics per group, or over the whole batch."""
    size = None if arm == SYNCHRONIZED else GROUP
    return MLP(WIDTHS, norm=partial(BatchNorm, momentum=0.9, virtual_batch_size=size))


def draw_groups(labels: Any, steps: int, generator: np.random.Generator) -> npt.NDArray[np.int32]:
    """Draws batches that hold every class equally often, each class in one group only.

    Args:
        labels: [n].
        steps: the number of batches.
        generator: a generator of random numbers.

    Returns:
        Indices [steps, groups * GROUP], one group after the other; no example twice in a batch.
    """
    of_class = [np.flatnonzero(labels == label) for label in range(CLASSES)]

    def batch() -> Any:
        order = generator.permutation(CLASSES)
        return np.concatenate(
            [generator.choice(of_class[label], EACH, replace=False) for label in order]
        )

    return np.stack([batch() for _ in range(steps)]).astype(np.int32)


def arrange(arm: str, rows: Any, generator: np.random.Generator) -> Any:
    """Arranges batches as an arm has them: shuffled across their groups, or unchanged."""
    return generator.permuted(rows, axis=-1) if arm == SHUFFLED else rows


def train_arm(setting: Setting, arm: str, steps: int) -> Chosen[dict[str, Any]]:
    """Trains an arm at every rate, and tests it in both modes.

    Args:
        setting: the seeds, and the size of the run.
        arm: a name in `ARMS`.
        steps: the number of steps of each training.

    Returns:
        At the rate that is best for all seeds, accuracies in percent, [seeds]: on batches of the
        training and of the test part, drawn and arranged as in the arm's training, in training and
        in evaluation mode; and "validation", in evaluation mode.
    """
    digits = load_digits(setting.chosen)

    def draw_rows(part: Part, purpose: int, count: int) -> Any:
        generators = [np.random.default_rng([purpose, int(seed)]) for seed in setting.chosen]
        return np.stack(
            [
                arrange(arm, draw_groups(y, count, generator), generator)
                for y, generator in zip(part.y, generators, strict=True)
            ]
        )

    trials = Trial(setting.chosen, digits, draw_rows(digits.train, 0, steps))
    tests = {"train": draw_rows(digits.train, 1, TESTS), "test": draw_rows(digits.test, 2, TESTS)}
    run = partial(_train_once, make_model(arm))
    chosen = sweep_rates(run, RATES, trials, tests).best_for_all_seeds()
    return chosen._replace(measured={name: 100 * runs for name, runs in chosen.measured.items()})


def _train_once(
    model: MLP, rate: jax.Array, trial: Trial, tests: Mapping[str, jax.Array]
) -> Outcome[dict[str, jax.Array]]:
    trained = train_trial(model, optax.sgd(rate), trial)
    validation = accuracy(model, trained, trial.digits.validation)
    measured = {"validation": validation}
    for name, part in (("train", trial.digits.train), ("test", trial.digits.test)):
        batches = Part(part.x[tests[name]], part.y[tests[name]])
        by_batch = jax.lax.map(lambda batch: accuracy(model, trained, batch, train=True), batches)
        together = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batches)
        measured[f"{name}, training mode"] = jnp.mean(by_batch)
        measured[f"{name}, evaluation mode"] = accuracy(model, trained, together)
    return Outcome(validation, measured)


def mode_gap(accuracies: Mapping[str, Any], part: str) -> Any:
    """Returns the accuracy in training mode minus that in evaluation mode, [seeds]."""
    return accuracies[f"{part}, training mode"] - accuracies[f"{part}, evaluation mode"]


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    steps = 60 if setting.quick else 200
    chosen = {}
    for arm in ARMS:
        chosen[arm] = train_arm(setting, arm, steps)
        setting.advance(1 / len(ARMS))
    accuracies = {arm: of_arm.measured for arm, of_arm in chosen.items()}
    return Result(
        criteria=tuple(
            Criterion(
                f"accuracy in training minus evaluation mode, unseen digits, {arm} (points)",
                "vanishes",
                mean_interval(mode_gap(accuracies[arm], "test")),
                at_least=-1,
                at_most=1,
            )
            for arm in CURED
        ),
        curves={"accuracy": accuracies},
        reported=_reported(accuracies),
        rates={arm: of_arm.rate for arm, of_arm in chosen.items()},
    )


def _reported(accuracies: Mapping[str, Mapping[str, Any]]) -> dict[str, Interval]:
    synchronized = accuracies[SYNCHRONIZED]["test, evaluation mode"]
    in_training, in_evaluation = (
        accuracies[SORTED][f"test, {mode} mode"] - synchronized
        for mode in ("training", "evaluation")
    )
    return {
        f"accuracy in training minus evaluation mode, unseen digits, {SORTED} (points)": (
            mean_interval(mode_gap(accuracies[SORTED], "test"))
        ),
        **{
            f"the same of digits trained on, {arm} (points)": (
                mean_interval(mode_gap(accuracies[arm], "train"))
            )
            for arm in ARMS
        },
        "sorted in training mode minus synchronized in evaluation mode (points)": (
            mean_interval(in_training)
        ),
        "sorted minus synchronized, both in evaluation mode (points)": (
            mean_interval(in_evaluation)
        ),
    }


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the accuracy of each arm in both modes, and their difference on both parts."""
    levels, gaps = figure.subplots(1, 2)
    at = np.arange(len(ARMS))
    accuracies = [
        {name: np.asarray(runs) for name, runs in curves["accuracy"][arm].items()} for arm in ARMS
    ]
    for offset, mode in ((-0.1, "training mode"), (0.1, "evaluation mode")):
        points(levels, at + offset, [of_arm[f"test, {mode}"] for of_arm in accuracies], mode)
    for offset, part, label in ((-0.1, "test", "unseen digits"), (0.1, "train", "training digits")):
        points(gaps, at + offset, [mode_gap(of_arm, part) for of_arm in accuracies], label)
    gaps.axhspan(-1, 1, color="gray", alpha=0.15, linewidth=0, label="within 1 point")
    levels.set_ylabel("accuracy on unseen digits (%)")
    gaps.set_ylabel("training minus evaluation mode (points)")
    gaps.set_yscale("symlog", linthresh=1)
    for axes in (levels, gaps):
        axes.set_xticks(at, ARMS)
        axes.set_xlabel("statistics of a batch of five groups")
        axes.legend()


EXPERIMENT = Experiment(
    number=14,
    name="batch_leakage",
    claim="Correlated groups part training from evaluation; shuffling or synchronizing mends it",
    source="Wu & Johnson 2021",
    published="the gap between training and evaluation closes with either",
    protocol=(
        "MLP 64-64-64-10 on digits; batches of 160 with 16 of every class, in five groups "
        "(devices) of 32 with two classes each; statistics per group, per group after shuffling, "
        "or over the whole batch; accuracy on the same unseen digits, arranged as in training, in "
        "both modes"
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
