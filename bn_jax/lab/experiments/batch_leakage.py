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
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import MLP
from bn_jax.lab.experiments.selection import Chosen, Outcome, RateSweep, sweep_rates
from bn_jax.lab.experiments.sweeps import (
    Digits,
    Part,
    Trial,
    accuracy,
    load_parts,
    train_trial,
)
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    Experiment,
    Result,
    Series,
    Setting,
    SubClaim,
)
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 10
# A group has as many digits of one class as blank images, which have the digits' label.
PAIRS = 8
GROUP = 2 * PAIRS
# So many blanks of each label that a network cannot know them by heart.
BLANKS = 500
WIDTHS = 64, 64
RATES = 0.01, 0.03, 0.1, 0.3, 1.0
MOMENTUM = 0.9
SORTED, SHUFFLED, SYNCHRONIZED = ARMS = (
    "per group, sorted",
    "per group, shuffled",
    "synchronized",
)
MENDED = SHUFFLED, SYNCHRONIZED
# The number of batches to test with.
TESTS = 20
# In points: by so much training mode may be the better one where neighbours tell nothing.
NO_BETTER = 1.0
PARTS = "train", "validation", "test"
MODES = TRAINING, EVALUATION = "training mode", "evaluation mode"


def make_model(arm: str, num_classes: int) -> MLP:
    """Returns the network of an arm: with statistics per group, or over the whole batch."""
    size = None if arm == SYNCHRONIZED else GROUP
    return MLP(WIDTHS, num_classes, norm=partial(BatchNorm, momentum=0.9, virtual_batch_size=size))


def with_blanks(part: Part, purpose: int, seeds: Any, classes: int = CLASSES) -> Part:
    """Adds blank images of every label to the digits: pixels of independent noise.

    Args:
        part: the digits of every seed, x [seeds, n, features] and y [seeds, n].
        purpose: a number, for other noise than that of other parts.
        seeds: the seeds of the noise, [seeds].
        classes: the number of classes.

    Returns:
        The digits, then the blanks.
    """
    shape = classes * BLANKS, part.x.shape[-1]
    noise = [
        np.random.default_rng([purpose, int(seed)]).standard_normal(shape, np.float32)
        for seed in seeds
    ]
    labels = np.tile(np.repeat(np.arange(classes, dtype=part.y.dtype), BLANKS), (len(seeds), 1))
    return Part(np.concatenate([part.x, noise], 1), np.concatenate([part.y, labels], 1))


def draw_groups(
    labels: Any, steps: int, generator: np.random.Generator, classes: int = CLASSES
) -> npt.NDArray[np.int32]:
    """Draws batches of one group of each class.

    Args:
        labels: of the digits, then of the blanks, [n].
        steps: the number of batches.
        generator: a generator of random numbers.
        classes: the number of classes.

    Returns:
        Indices [steps, groups * GROUP], one group after the other; no image twice in a batch.
    """
    is_blank = np.arange(len(labels)) >= len(labels) - classes * BLANKS
    of_class = [
        [np.flatnonzero((labels == label) & which) for which in (~is_blank, is_blank)]
        for label in range(classes)
    ]

    def batch() -> Any:
        return np.concatenate(
            [
                generator.choice(images, PAIRS, replace=False)
                for label in generator.permutation(classes)
                for images in of_class[label]
            ]
        )

    return np.stack([batch() for _ in range(steps)]).astype(np.int32)


def arrange(arm: str, rows: Any, generator: np.random.Generator) -> Any:
    """Arranges batches as an arm has them: shuffled across their groups, or unchanged."""
    return generator.permuted(rows, axis=-1) if arm == SHUFFLED else rows


def train_arm(setting: Setting, arm: str, steps: int) -> RateSweep[dict[str, Any]]:
    """Trains an arm at every rate, and tests it in both modes.

    Args:
        setting: the seeds, and the size of the run.
        arm: a name in `ARMS`.
        steps: the number of steps of each training.

    Returns:
        Accuracies in percent, [rates, seeds], on batches of each part, drawn and arranged as in the
        arm's training, in training and in evaluation mode.
    """
    digits, classes = load_parts(setting), setting.num_classes
    parts = {
        name: with_blanks(getattr(digits, name), purpose, setting.chosen, classes)
        for purpose, name in enumerate(PARTS)
    }

    def draw_rows(name: str, purpose: int, count: int) -> Any:
        generators = [np.random.default_rng([purpose, int(seed)]) for seed in setting.chosen]
        return np.stack(
            [
                arrange(arm, draw_groups(y, count, generator, classes), generator)
                for y, generator in zip(parts[name].y, generators, strict=True)
            ]
        )

    trials = Trial(setting.chosen, Digits(**parts), draw_rows("train", 10, steps))
    tests = {name: draw_rows(name, 11 + index, TESTS) for index, name in enumerate(PARTS)}
    rates = RATES[2:] if setting.quick else RATES
    return sweep_rates(partial(_train_once, make_model(arm, classes)), rates, trials, tests)


def _train_once(
    model: MLP, rate: jax.Array, trial: Trial, tests: Mapping[str, jax.Array]
) -> Outcome[dict[str, jax.Array]]:
    trained = train_trial(model, optax.sgd(rate, momentum=MOMENTUM), trial)
    measured = {}
    for name in PARTS:
        part = getattr(trial.digits, name)
        batches = Part(part.x[tests[name]], part.y[tests[name]])
        by_batch = jax.lax.map(lambda batch: accuracy(model, trained, batch, train=True), batches)
        together = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batches)
        measured[f"{name}, {TRAINING}"] = 100 * jnp.mean(by_batch)
        measured[f"{name}, {EVALUATION}"] = 100 * accuracy(model, trained, together)
    return Outcome(measured[f"validation, {TRAINING}"], measured)


def choose_in(mode: str, swept: RateSweep[dict[str, Any]]) -> Chosen[dict[str, Any]]:
    """Returns what was measured at the rate that is best for all seeds on validation in a mode."""
    in_mode = swept._replace(validation=swept.measured[f"validation, {mode}"])
    return in_mode.best_for_all_seeds()


def mode_gap(accuracies: Mapping[str, Any], part: str) -> Any:
    """Returns the accuracy in training mode minus that in evaluation mode, [seeds]."""
    return accuracies[f"{part}, {TRAINING}"] - accuracies[f"{part}, {EVALUATION}"]


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    swept = {}
    for arm in ARMS:
        swept[arm] = train_arm(setting, arm, 200 if setting.quick else 400)
        setting.advance(1 / len(ARMS))
    chosen = {arm: choose_in(TRAINING, of_arm) for arm, of_arm in swept.items()}
    usable = {arm: choose_in(EVALUATION, of_arm) for arm, of_arm in swept.items()}
    accuracies = {arm: of_arm.measured for arm, of_arm in chosen.items()}
    used = {arm: of_arm.measured[f"test, {EVALUATION}"] for arm, of_arm in usable.items()}
    return Result(
        values={
            "14a": mode_gap(accuracies[SORTED], "test"),
            "14b": {arm: mode_gap(accuracies[arm], "test") for arm in MENDED},
            "14c": {arm: used[arm] - used[SORTED] for arm in MENDED},
        },
        curves={"accuracy": accuracies},
        series=[
            Series("14a", arm, f"{name} (%)", values)
            for arm, of_arm in accuracies.items()
            for name, values in of_arm.items()
        ],
        rates={
            f"{arm}, best in {mode}": of_arm.rate
            for mode, of_mode in ((TRAINING, chosen), (EVALUATION, usable))
            for arm, of_arm in of_mode.items()
        },
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the accuracy of each arm in both modes, and their difference on both parts."""
    levels, gaps = figure.subplots(1, 2)
    at = np.arange(len(ARMS))
    accuracies = [
        {name: np.asarray(runs) for name, runs in curves["accuracy"][arm].items()} for arm in ARMS
    ]
    for offset, mode in zip((-0.1, 0.1), MODES, strict=True):
        points(levels, at + offset, [of_arm[f"test, {mode}"] for of_arm in accuracies], mode)
    for offset, part, label in ((-0.1, "test", "unseen images"), (0.1, "train", "training images")):
        points(gaps, at + offset, [mode_gap(of_arm, part) for of_arm in accuracies], label)
    gaps.axhline(0, color="gray", linestyle=":", zorder=3)
    levels.set(ylabel="accuracy on unseen images (%)", ylim=(0, 102))
    gaps.set_ylabel("training minus evaluation mode (points)")
    for axes in (levels, gaps):
        axes.set_xticks(at, ARMS)
        axes.set_xlabel("statistics of a batch of ten groups")
        axes.legend(loc="upper right")


EXPERIMENT = Experiment(
    number=14,
    name="batch_leakage",
    claim="Correlated groups part training from evaluation; shuffling or synchronizing mends it",
    source="Wu & Johnson 2021",
    sub_claims=(
        SubClaim(
            "14a",
            "neighbours tell",
            "where neighbours tell the label, a network is better in training than in evaluation "
            "mode",
            "accuracy on unseen images in training minus evaluation mode, sorted groups (points)",
            Above(0.0),
            is_resplit=True,
        ),
        SubClaim(
            "14b",
            "shuffled or synchronized",
            "with shuffled groups or synchronized statistics, training mode is no better",
            "accuracy on unseen images in training minus evaluation mode (points)",
            Below(NO_BETTER),
            reason=f"ours: {NO_BETTER:g} point; statistics of a group are noise too, which makes "
            "training mode the worse one",
            is_resplit=True,
        ),
        SubClaim(
            "14c",
            "better to use",
            "with shuffled groups or synchronized statistics, evaluation mode is more accurate",
            "accuracy on unseen images in evaluation mode minus that with sorted groups, each at "
            "the rate that is best in this mode (points)",
            Above(0.0),
            is_resplit=True,
        ),
    ),
    protocol=(
        "MLP 64-64-64-10, 400 steps with momentum 0.9; batches of 160 in ten groups (devices) of "
        "16, each with eight pairs of a digit and an image of noise, which has the digit's label, "
        "all of one class; statistics per group, per group after shuffling, or over the whole "
        "batch; accuracy on unseen digits and noise, arranged as in training, in both modes; rates "
        "chosen on validation, in training mode and for 14c in evaluation mode"
    ),
    limits=(
        "The published case is a detector's head, whose groups are the regions of one image. Here "
        "half of the images carry nothing themselves, so that no network can know more than half "
        "of the labels, and a tenth of the others, without its neighbours."
    ),
    run=run,
    draw=draw,
    easy="The gap, where neighbours tell, and both ways to mend it.",
    hard=(
        "A task in which neighbours tell, for a norm subtracts what is common to a group; and a "
        "network learns to read them only with large rates and many steps."
    ),
    data=Needs(per_class=PAIRS, per_class_tested=PAIRS),
)
