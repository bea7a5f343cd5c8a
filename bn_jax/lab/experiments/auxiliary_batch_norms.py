"""Claim 30: adversarial examples in training help with an auxiliary batch norm of their own."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from bn_jax.lab.experiments.adversarial_examples import attack
from bn_jax.lab.experiments.domain_nets import (
    FIRST,
    SECOND,
    Batch,
    DomainMLP,
    MakeBatch,
    accuracy_of,
    logits_of,
    of_each,
    train_by_domain,
)
from bn_jax.lab.experiments.figures import points
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.selection import Chosen, Outcome, sweep_rates
from bn_jax.lab.experiments.statistics import relative_error
from bn_jax.lab.experiments.sweeps import Digits, Part, Trial, cross_entropy, draw_trials
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    Experiment,
    Identity,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
    Within,
)
from bn_jax.lab.models import Norm
from bn_jax.linen import DomainBatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLEAN, ADVERSARIAL = FIRST, SECOND
BATCH_SIZE = 64
MOMENTUM = 0.9
RATES = 0.1, 0.3, 1.0, 3.0, 10.0
AUXILIARY_NORM = partial(DomainBatchNorm, num_domains=2, momentum=MOMENTUM)
ALONE, ONE, AUXILIARY = "clean images alone", "one batch norm", "auxiliary batch norm"
ARMS: Mapping[str, Norm] = {
    ALONE: BATCH_NORM,
    ONE: BATCH_NORM,
    AUXILIARY: AUXILIARY_NORM,
}
# Sizes of perturbations, the largest change of a pixel in shares of the range of all pixels.
CONTROL, WEAK, STRONG = SIZES = 0.0, 0.1, 0.3
DECIDING = WEAK, STRONG
# The number of steps of an attack, and the size of each in shares of the perturbation.
IN_TRAINING, IN_TESTS = (1, 1.0), (5, 0.3)
# What two running means of batches differ by at random, in deviations.
CHANCE = float(np.sqrt(2 * (1 - MOMENTUM) / (1 + MOMENTUM) / BATCH_SIZE))
# In points: a difference between arms that are to be equal.
EQUAL = 1.0
TOLERANCE = 1e-9
EXACT_STEPS = 20


def make_batches(
    model: DomainMLP, train: Part, size: Any, alone: bool
) -> tuple[MakeBatch, tuple[jax.Array, jax.Array]]:
    """Returns what makes the batches of a training.

    The adversarial examples are made with the parameters of the step, and with the auxiliary norm
    by the statistics of the attacked batch.

    Args:
        model: the network.
        train: the training part.
        size: of the perturbations, in shares of the range of pixels.
        alone: whether to leave the adversarial examples out.

    Returns:
        A function of the variables and of the indices of a batch, and the range of all pixels.
    """
    x, y = jnp.asarray(train.x), jnp.asarray(train.y)
    pixels = jnp.min(x), jnp.max(x)

    def make_batch(variables: Any, rows: jax.Array) -> Batch:
        clean = Part(x[rows], y[rows])
        if alone:
            return Batch(*clean, CLEAN)
        changed = attack(
            lambda x: logits_of(model, variables, x, ADVERSARIAL, train=True),
            clean,
            size * (pixels[1] - pixels[0]),
            pixels,
            *IN_TRAINING,
        )
        return Batch(
            jnp.concatenate([clean.x, changed]),
            jnp.concatenate([clean.y, clean.y]),
            jnp.repeat(jnp.array([CLEAN, ADVERSARIAL]), len(rows)),
        )

    return make_batch, pixels


def distance(batch_stats: Mapping[str, Any]) -> jax.Array:
    """Returns how far the running means of two domains lie apart, in deviations of the first.

    Args:
        batch_stats: of norms by domain.

    Returns:
        The root mean square over all features of all norms.
    """
    apart = [
        (of_norm["mean"][SECOND] - of_norm["mean"][FIRST]) ** 2 / of_norm["var"][FIRST]
        for of_norm in batch_stats.values()
    ]
    return jnp.sqrt(jnp.mean(jnp.concatenate(apart)))


def measure(
    model: DomainMLP, variables: Any, digits: Digits, size: Any, pixels: tuple[Any, Any]
) -> dict[str, jax.Array]:
    """Measures a trained network on the test part, by the statistics of either domain.

    Args:
        model: the network.
        variables: its params and batch_stats.
        digits: the examples.
        size: of the perturbations, in shares of the range of pixels.
        pixels: the range.

    Returns:
        Accuracies in percent and the loss. Each attack knows by which statistics it is tested.
    """
    test, span = digits.test, pixels[1] - pixels[0]
    found = {"loss": cross_entropy(logits_of(model, variables, test.x, CLEAN), test.y)}
    for name, domain in (("clean", CLEAN), ("adversarial", ADVERSARIAL)):
        logits = partial(logits_of, model, variables, domain=domain)
        attacked = attack(logits, test, size * span, pixels, *IN_TESTS)
        for kind, x in (("clean images", test.x), ("attacked images", attacked)):
            batch = Batch(x, test.y, domain)
            found[f"{kind}, {name} statistics"] = accuracy_of(model, variables, batch)
    return found


def train_arm(setting: Setting, trials: Trial, arm: str) -> dict[float, Chosen[dict[str, Any]]]:
    """Trains an arm at every rate, with adversarial examples of every size.

    Args:
        setting: the size of the run.
        trials: the trials of all seeds.
        arm: a name in `ARMS`.

    Returns:
        By size, what `measure` finds at the rate that is best for all seeds on the clean validation
        part, [seeds]. Without adversarial examples there is one training, measured under `CONTROL`.
    """
    model = DomainMLP(ARMS[arm], setting.num_classes)
    sizes = [CONTROL] if arm == ALONE else SIZES

    def run(rate: jax.Array, trial: Trial) -> Outcome[dict[str, jax.Array]]:
        digits = trial.digits

        def train_with(size: jax.Array) -> Outcome[dict[str, jax.Array]]:
            make_batch, pixels = make_batches(model, digits.train, size, arm == ALONE)
            features = digits.train.x.shape[-1]
            variables = train_by_domain(
                model, optax.sgd(rate), trial.seed, features, make_batch, trial.batches
            )
            validation = accuracy_of(model, variables, Batch(*digits.validation, CLEAN))
            found = measure(model, variables, digits, size, pixels)
            if arm == AUXILIARY:
                found["distance"] = distance(variables["batch_stats"])
            return Outcome(validation, found)

        return map_runs(train_with, jnp.asarray(sizes))

    rates = RATES[1:3] if setting.quick else RATES
    return of_each(sweep_rates(run, rates, trials), sizes)


def control_errors(
    setting: Setting, trials: Trial, size: Any = CONTROL, steps: int = EXACT_STEPS
) -> npt.NDArray[np.float64]:
    """Compares one norm with auxiliary statistics after a few steps, in float64.

    Scale and bias are shared. With adversarial examples of size 0, both domains have the same
    statistics, which are those of all examples, too.

    Args:
        setting: the data.
        trials: the trials of all seeds.
        size: of the perturbations, one for all seeds or [seeds].
        steps: the number of steps.

    Returns:
        The largest differences of a logit of the test part, relative to the largest logit, [seeds].
    """
    norms = BATCH_NORM, partial(AUXILIARY_NORM, share_params=True)
    sizes = np.broadcast_to(np.float64(size), setting.seeds)

    def logits_after(norm: Norm, trial: Trial, size: jax.Array) -> Any:
        model = DomainMLP(norm, setting.num_classes, dtype=jnp.float64)
        make_batch, _ = make_batches(model, trial.digits.train, size, alone=False)
        features = trial.digits.train.x.shape[-1]
        variables = train_by_domain(
            model, optax.sgd(0.1), trial.seed, features, make_batch, trial.batches[:steps]
        )
        return logits_of(model, variables, trial.digits.test.x, CLEAN)

    def exactly(leaf: Any) -> Any:
        return np.asarray(leaf, np.float64) if np.issubdtype(leaf.dtype, np.floating) else leaf

    with jax.enable_x64(True):
        one, own = (
            np.asarray(map_runs(partial(logits_after, norm), jax.tree.map(exactly, trials), sizes))
            for norm in norms
        )
    return np.array([relative_error(b, a) for a, b in zip(one, own, strict=True)])


Measured: TypeAlias = Mapping[str, Mapping[float, Mapping[str, Any]]]


def compare(measured: Measured) -> dict[str, Any]:
    """Returns the quantities of the sub-claims on trained networks, [seeds].

    Args:
        measured: by arm and size, what `measure` finds.
    """
    one, own, alone = measured[ONE], measured[AUXILIARY], measured[ALONE][CONTROL]
    clean, by_adversarial = "clean images, clean statistics", "clean images, adversarial statistics"
    robust, by_clean = (f"attacked images, {name} statistics" for name in ("adversarial", "clean"))

    def at_each(quantity: Callable[[float], Any]) -> dict[str, Any]:
        return {f"size {size:g}": quantity(size) for size in DECIDING}

    return {
        "30a": at_each(lambda size: one[size][clean] - alone[clean]),
        "30b": at_each(lambda size: own[size][clean] - one[size][clean]),
        "30c": at_each(lambda size: own[size]["loss"] / one[size]["loss"]),
        "30d": at_each(lambda size: own[size][clean] - alone[clean]),
        "30e": at_each(lambda size: own[size]["distance"]),
        "30f": at_each(lambda size: own[size][by_adversarial] - own[size][clean]),
        "30g": own[WEAK][robust] - own[WEAK][by_clean],
        "30i": own[CONTROL][clean] - one[CONTROL][clean],
    }


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    trials = draw_trials(setting, 60 if setting.quick else 300, BATCH_SIZE)
    chosen = {}
    for arm in ARMS:
        chosen[arm] = train_arm(setting, trials, arm)
        setting.advance(0.3)
    measured = {
        arm: {size: of_size.measured for size, of_size in of_arm.items()}
        for arm, of_arm in chosen.items()
    }
    exact = control_errors(setting, trials)
    return Result(
        values={**compare(measured), "30h": exact},
        curves={"sizes": SIZES, "accuracy": _curves(measured)},
        series=[
            Series("30b", arm, f"{name}, size {size:g}", values)
            for arm, of_arm in measured.items()
            for size, of_size in of_arm.items()
            for name, values in of_size.items()
        ],
        rates={
            arm if arm == ALONE else f"{arm}, size {size:g}": of_size.rate
            for arm, of_arm in chosen.items()
            for size, of_size in of_arm.items()
        },
    )


def _curves(measured: Measured) -> dict[str, Any]:
    """Returns accuracies [sizes, seeds] by the kind of images, arm and statistics."""
    lines = {
        ONE: (ONE, "clean"),
        f"{AUXILIARY}, clean statistics": (AUXILIARY, "clean"),
        f"{AUXILIARY}, adversarial statistics": (AUXILIARY, "adversarial"),
    }
    of_kinds = {
        kind: {
            label: [of_size[f"{kind}, {name} statistics"] for of_size in measured[arm].values()]
            for label, (arm, name) in lines.items()
        }
        for kind in ("clean images", "attacked images")
    }
    return {**of_kinds, ALONE: measured[ALONE][CONTROL]["clean images, clean statistics"]}


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the accuracy on clean and on attacked images by the size of the perturbation."""
    clean, attacked = figure.subplots(1, 2)
    at = np.arange(len(curves["sizes"]))
    for axes, kind in ((clean, "clean images"), (attacked, "attacked images")):
        lines = curves["accuracy"][kind].items()
        for shift, (label, values) in zip((-0.1, 0, 0.1), lines, strict=True):
            points(axes, at + shift, values, label)
        axes.set_xticks(at, [f"{100 * size:g}" for size in curves["sizes"]])
        axes.set(
            xlabel="largest change of a pixel (% of the range)",
            ylabel=f"test accuracy on {kind} (%)",
        )
    alone = np.mean(curves["accuracy"][ALONE])
    clean.axhline(alone, color="gray", linestyle=":", label=ALONE, zorder=0)
    attacked.set_ylim(-3, 102)
    clean.legend(loc="lower left")
    attacked.legend(loc="lower left")


def _difference(
    key: str, label: str, statement: str, quantity: str, bound: Above | Below
) -> SubClaim:
    return SubClaim(key, label, statement, f"{quantity} (points)", bound, is_resplit=True)


EXPERIMENT = Experiment(
    number=30,
    name="auxiliary_batch_norms",
    claim="Adversarial examples in training help, if they have an auxiliary batch norm",
    source="Xie et al. 2020",
    sub_claims=(
        _difference(
            "30a",
            "one norm hurts",
            "with one batch norm for both, adversarial examples in training cost clean accuracy",
            "test accuracy on clean images, one batch norm minus training on clean images alone",
            Below(0.0),
        ),
        _difference(
            "30b",
            "auxiliary beats one",
            "with an auxiliary batch norm, clean accuracy is higher than with one",
            "test accuracy on clean images, auxiliary minus one batch norm",
            Above(0.0),
        ),
        SubClaim(
            "30c",
            "lower clean loss",
            "with an auxiliary batch norm, the loss on clean images is lower than with one",
            "test loss on clean images, auxiliary over one batch norm",
            Below(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        _difference(
            "30d",
            "auxiliary beats none",
            "with an auxiliary batch norm, clean accuracy is higher than without adversarial "
            "examples",
            "test accuracy on clean images, auxiliary batch norm minus training on clean images "
            "alone",
            Above(0.0),
        )._replace(published=Published("+0.7 points (ImageNet, EfficientNet-B7)", "V")),
        SubClaim(
            "30e",
            "statistics lie apart",
            "the running means of clean and of adversarial examples lie apart",
            "distance of the running means, root mean square over all features (deviations)",
            Above(CHANCE),
            reason="ours: what the running means of two sets of batches of 64 differ by at random",
            is_resplit=True,
        ),
        _difference(
            "30f",
            "the wrong statistics",
            "by the statistics of adversarial examples, clean images are classified worse",
            "test accuracy on clean images, by adversarial minus by clean statistics",
            Below(0.0),
        ),
        _difference(
            "30g",
            "robust statistics",
            "under attack, the statistics of adversarial examples are the better ones",
            f"test accuracy on attacked images, adversarial minus clean statistics, size {WEAK:g}",
            Above(0.0),
        ),
        SubClaim(
            "30h",
            "control: exact",
            "with adversarial examples of size 0, auxiliary statistics change nothing",
            f"relative error of the logits after {EXACT_STEPS} steps, shared scale and bias, in "
            "float64",
            Identity(TOLERANCE),
            Published("0", "D"),
        ),
        SubClaim(
            "30i",
            "control: trained",
            "with adversarial examples of size 0, an auxiliary batch norm is as accurate as one",
            "test accuracy on clean images, auxiliary minus one batch norm, size 0 (points)",
            Within(-EQUAL, EQUAL),
            reason=f"ours: {EQUAL:g} point",
            is_resplit=True,
        ),
    ),
    protocol=(
        "MLP 64-64-64-10 on digits, 300 steps; each batch holds 64 clean images and the same 64 "
        "after one signed gradient step (FGSM) of 10 or 30 % of the range of pixels, made in this "
        "step through the auxiliary norm; one batch norm for all 128, or one for the clean and an "
        "auxiliary one for the adversarial images, with statistics, scale and bias of their own; "
        "clean images are tested with the clean norm; attacks in tests take 5 steps and know the "
        "weights and statistics; rates chosen on the clean validation part"
    ),
    limits=(
        "Small networks and images. The published gain is on ImageNet and grows with the network; "
        "the published attacks are far weaker, 4 of 255 levels, and take several steps."
    ),
    run=run,
    draw=draw,
    easy=(
        "The auxiliary batch norm is better than one norm for both at either size, above all in "
        "the loss. Clean and adversarial images each need the statistics of their own kind."
    ),
    hard=(
        "The harm of one norm and the gain over clean images alone do not appear at the same size. "
        "With changes of 10 %, one norm shows no harm, and the auxiliary norm gains. With changes "
        "of 30 %, one norm does harm; the auxiliary norm avoids it, and shows no gain."
    ),
    data=Needs(trained=BATCH_SIZE),
)
