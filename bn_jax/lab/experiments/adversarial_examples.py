"""Claim 28: networks with batch norm are more vulnerable to small perturbations of their inputs."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import PERCENT, band
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import MLP, WITH_AND_WITHOUT
from bn_jax.lab.experiments.selection import Chosen, Outcome, sweep_rates
from bn_jax.lab.experiments.sweeps import (
    Part,
    Trial,
    accuracy,
    cross_entropy,
    draw_trials,
    share_correct,
    train_trial,
)
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    Experiment,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the input: logits [n, classes] of images [n, features].
Logits: TypeAlias = Callable[[jax.Array], jax.Array]

WIDTHS = 64, 64, 64
BATCH_SIZE = 64
RATES = 0.03, 0.1, 0.3, 1.0, 3.0
# Sizes of perturbations, the largest change of a pixel in shares of the range of all pixels.
SIZES = 0.0, 0.03, 0.06, 0.12
DECIDING = SIZES[2:]
# The number of steps of an attack, and the size of each in shares of the perturbation.
ATTACKS = {"FGSM": (1, 1.0), "PGD": (20, 0.15)}
# The standard deviation of noise, in shares of the range.
NOISE = 0.25
NORM, PLAIN = WITH_AND_WITHOUT
# In points: a loss of two digits.
DOUBLE_DIGIT = 10.0


def attack(
    logits: Logits, part: Part, size: Any, pixels: tuple[Any, Any], steps: int, step: float
) -> jax.Array:
    """Perturbs images by signed gradient steps that raise the loss.

    One step of the whole size is the fast gradient sign method (FGSM), many small ones are
    projected gradient descent (PGD), here from the clean images.

    Args:
        logits: the network.
        part: images [n, features] and labels [n].
        size: the largest change of a pixel.
        pixels: the least and the greatest value of a pixel.
        steps: the number of steps.
        step: the size of a step, in shares of `size`.

    Returns:
        The perturbed images.

    References: Goodfellow et al. 2015; Madry et al. 2018.
    """
    least = jnp.maximum(part.x - size, pixels[0])
    greatest = jnp.minimum(part.x + size, pixels[1])

    def move(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        gradient = jax.grad(lambda x: cross_entropy(logits(x), part.y))(x)
        return jnp.clip(x + step * size * jnp.sign(gradient), least, greatest), None

    return jax.lax.scan(move, jnp.asarray(part.x), None, length=steps)[0]


def train_arm(setting: Setting, arm: str) -> Chosen[dict[str, jax.Array]]:
    """Trains with or without norm at every rate, and attacks each network.

    Args:
        setting: the seeds, and the size of the run.
        arm: a name in `WITH_AND_WITHOUT`.

    Returns:
        Accuracies on the test part in percent, at the rate that is best for all seeds: under each
        of `ATTACKS`, [seeds, sizes], and with "noise", [seeds].
    """
    model = MLP(WIDTHS, setting.num_classes, norm=WITH_AND_WITHOUT[arm])

    def run(rate: jax.Array, trial: Trial) -> Outcome[dict[str, jax.Array]]:
        digits = trial.digits
        variables = train_trial(model, optax.sgd(rate), trial)
        pixels = jnp.min(digits.train.x), jnp.max(digits.train.x)
        span = pixels[1] - pixels[0]

        def logits(x: jax.Array) -> jax.Array:
            predicted: Any = model.apply(variables, x, train=False)
            return predicted

        def attacked(steps: int, step: float, size: jax.Array) -> jax.Array:
            x = attack(logits, digits.test, size * span, pixels, steps, step)
            return 100 * share_correct(logits(x), digits.test.y)

        found = {
            name: jax.lax.map(partial(attacked, *kind), jnp.asarray(SIZES))
            for name, kind in ATTACKS.items()
        }
        drawn = jax.random.normal(jax.random.key(trial.seed), digits.test.x.shape)
        noisy = digits.test.x + NOISE * span * drawn
        found["noise"] = 100 * share_correct(logits(noisy), digits.test.y)
        return Outcome(accuracy(model, variables, digits.validation), found)

    trials = draw_trials(setting, 100 if setting.quick else 400, BATCH_SIZE)
    return sweep_rates(run, RATES, trials).best_for_all_seeds()


def compare(accuracies: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the quantities of the sub-claims, with norm minus without, in points.

    Args:
        accuracies: what was measured with and without norm.
    """
    lost = {kind: accuracies[NORM][kind] - accuracies[PLAIN][kind] for kind in (*ATTACKS, "noise")}
    deciding = {f"size {size:g}": SIZES.index(size) for size in DECIDING}
    return {
        "28a": {name: lost["FGSM"][:, index] for name, index in deciding.items()},
        "28b": {name: lost["PGD"][:, index] for name, index in deciding.items()},
        "28c": lost["noise"],
        "28d": lost["FGSM"][:, 0],
    }


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    chosen = {}
    for arm in WITH_AND_WITHOUT:
        chosen[arm] = train_arm(setting, arm)
        setting.advance(1 / len(WITH_AND_WITHOUT))
    measured = {arm: of_arm.measured for arm, of_arm in chosen.items()}
    return Result(
        values=compare(measured),
        curves={
            "sizes": SIZES,
            "accuracy": {
                f"{arm}, {kind}": of_arm[kind].T
                for arm, of_arm in measured.items()
                for kind in ATTACKS
            },
        },
        series=[
            *(
                Series(key, arm, f"{kind}, size {size:g} (%)", values)
                for arm, of_arm in measured.items()
                for key, kind in zip(("28a", "28b"), ATTACKS, strict=True)
                for size, values in zip(SIZES, of_arm[kind].T, strict=True)
            ),
            *(Series("28c", arm, "noise (%)", of_arm["noise"]) for arm, of_arm in measured.items()),
        ],
        rates={arm: of_arm.rate for arm, of_arm in chosen.items()},
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws accuracy by the size of the perturbation."""
    for axes, kind in zip(figure.subplots(1, 2), ATTACKS, strict=True):
        for arm in WITH_AND_WITHOUT:
            values = curves["accuracy"][f"{arm}, {kind}"]
            band(axes, 100 * np.asarray(curves["sizes"]), values, arm, within=PERCENT, marker=".")
        axes.set(
            xlabel=f"{kind}: largest change of a pixel (% of the range)",
            ylabel="test accuracy (%)",
            ylim=(0, 102),
        )
        axes.legend(loc="lower left")


def _attack_claim(key: str, kind: str) -> SubClaim:
    return SubClaim(
        key,
        f"under {kind}",
        f"under the {kind} attack, networks with batch norm are less accurate than without",
        "test accuracy under attack, batch norm minus no norm (points)",
        Below(0.0, size=-DOUBLE_DIGIT),
        Published("lower by double-digit percentages", "V"),
        "the size: ten points are the least of two digits",
        is_resplit=True,
    )


EXPERIMENT = Experiment(
    number=28,
    name="adversarial_examples",
    claim="Networks with batch norm are more vulnerable to adversarial examples",
    source="Galloway et al. 2019; Benz et al. 2021",
    sub_claims=(
        _attack_claim("28a", "FGSM"),
        _attack_claim("28b", "PGD"),
        SubClaim(
            "28c",
            "with noise",
            "networks with batch norm are less accurate on noisy images than without",
            "test accuracy on noisy images, batch norm minus no norm (points)",
            Below(0.0, size=-DOUBLE_DIGIT),
            Published("lower by double-digit percentages", "V"),
            "the size: ten points are the least of two digits",
            is_resplit=True,
        ),
        SubClaim(
            "28d",
            "clean accuracy",
            "on clean images, networks with batch norm are more accurate than without",
            "test accuracy, batch norm minus no norm (points)",
            Above(0.0),
            is_resplit=True,
        ),
    ),
    protocol=(
        "MLP 64-64-64-64-10 on digits with and without batch norm, 400 steps with batches of 64, "
        "rates chosen on the clean validation part; attacks on the networks in evaluation mode, "
        "which change each pixel by at most 3 to 12 % of the range and know the weights: one step "
        f"(FGSM), or 20 steps from the clean image (PGD); Gaussian noise of {NOISE:.0%}"
    ),
    limits=(
        "64 pixels and one kind of network. Vulnerability grows with the number of inputs, and the "
        "published networks have thousands."
    ),
    run=run,
    draw=draw,
    easy="That the largest perturbations by PGD, and noise, hurt networks with batch norm more.",
    hard=(
        "That all attacks do: under FGSM, networks with batch norm are the more robust ones, and "
        "smaller perturbations by PGD show no difference."
    ),
    data=Needs(trained=BATCH_SIZE),
)
