"""Claim 20: scale and bias without normalizing give the same functions and other dynamics."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.lab.experiments import high_order_effects, large_rates, scale_invariance
from bn_jax.lab.experiments.figures import PERCENT, band
from bn_jax.lab.experiments.high_order_effects import change, init_network, network
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM, MLP
from bn_jax.lab.experiments.selection import largest_rate, sweep_accuracies
from bn_jax.lab.experiments.statistics import relative_error
from bn_jax.lab.experiments.sweeps import cross_entropy, draw_trials, load_parts
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    Experiment,
    Identity,
    Result,
    Series,
    Setting,
    SubClaim,
    Within,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The networks of the identity: hidden layers, examples, and the deviation of the scales' logarithm.
LAYERS, EXAMPLES, SPREAD = 4, 64, 0.3
TOLERANCE = 1e-10
RATE, DIFFERENT = 0.01, 0.1
# The networks that are trained: hidden layers, and after how many steps their speed is compared.
DEPTH, FEW_STEPS = 8, 50
TWOFOLD, POINTS = 2.0, 1.0


class Affine(nn.Module):
    """``x * scale + bias`` with a scale and a bias for each feature, in the place of a norm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies it to [n, features]."""
        features = x.shape[-1]
        scale: Any = self.param("scale", nn.initializers.ones, (features,))
        bias: Any = self.param("bias", nn.initializers.zeros, (features,))
        return x * scale[None] + bias[None]


ARMS: Mapping[str, Any] = {"batch norm": BATCH_NORM, "affine only": Affine, "no norm": None}


class Folded(NamedTuple):
    """A network with scales and biases compared with the one into which they are folded.

    Attributes:
        error: of the logits, relative.
        distance: of the first-order changes of the logits by a gradient step of each, over the
            norm of the larger one.
    """

    error: Any
    distance: Any


def fold(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Folds the scales of `high_order_effects.network` into the kernels before them."""
    scale = params["scale"]
    return {
        **params,
        "first": params["first"] * scale[:1],
        "kernel": params["kernel"] * scale[1:, None],
        "scale": jnp.ones_like(scale),
    }


def compare_folded(seed: jax.Array, x: jax.Array, y: jax.Array, num_classes: int = 10) -> Folded:
    """Compares a random network with its folded one.

    Args:
        seed: of its parameters.
        x: examples [n, features], float64.
        y: their labels.
        num_classes: the number of logits.
    """
    for_params, *for_affine = jax.random.split(jax.random.key(seed), 3)
    params: Any = jax.tree.map(jnp.float64, init_network(for_params, x.shape[-1], num_classes))
    shape = params["scale"].shape
    params["scale"] = jnp.exp(SPREAD * jax.random.normal(for_affine[0], shape, x.dtype))
    params["bias"] = SPREAD * jax.random.normal(for_affine[1], shape, x.dtype)

    def step(params: Any, arm: str) -> tuple[jax.Array, jax.Array]:
        logits_of = partial(network, x=x, depth=LAYERS, layer=high_order_effects.ARMS[arm])
        gradient = jax.grad(lambda params: cross_entropy(logits_of(params), y))(params)
        update = jax.tree.map(lambda leaf: -RATE * leaf, gradient)
        return logits_of(params), change(logits_of, params, update).first

    logits, first = step(params, "affine only")
    folded, first_folded = step(fold(params), "no norm")
    larger = jnp.maximum(jnp.linalg.norm(first), jnp.linalg.norm(first_folded))
    return Folded(relative_error(logits, folded), jnp.linalg.norm(first - first_folded) / larger)


def compare_all_folded(setting: Setting) -> Folded:
    """Compares the networks of all seeds, [seeds]."""
    with jax.enable_x64(True):
        train = load_parts(setting).train
        x, y = train.x[:, :EXAMPLES].astype(np.float64), train.y[:, :EXAMPLES]
        compare = partial(compare_folded, num_classes=setting.num_classes)
        return Folded(*map(np.asarray, jax.jit(jax.vmap(compare))(setting.chosen, x, y)))


def train_kernels(setting: Setting) -> Any:
    """Trains the kernels before `Affine` at the large rates of claim 1.

    Returns:
        The test accuracies, [rates, seeds].
    """
    low, high = scale_invariance.LARGE_RATES
    rates = np.geomspace(low, high, 2 if setting.quick else 5)
    steps = 60 if setting.quick else 400
    trials = draw_trials(setting, steps, scale_invariance.BATCH_SIZE)
    model = MLP(scale_invariance.WIDTHS, setting.num_classes, norm=Affine)
    others = scale_invariance.SWEPT["kernels before a norm"]
    return sweep_accuracies(model, scale_invariance.make_optimizer(others), rates, trials).measured


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    folded = compare_all_folded(setting)
    at_large_rates = train_kernels(setting)
    setting.advance(0.2)
    steps = large_rates.QUICK_STEPS if setting.quick else large_rates.STEPS
    trials = draw_trials(setting, steps, large_rates.BATCH_SIZE)
    swept, stable = {}, {}
    for arm, norm in ARMS.items():
        swept[arm] = large_rates.train_arm(norm, DEPTH, trials, setting.num_classes)
        is_stable = swept[arm].validation >= setting.level(large_rates.STABLE)
        stable[arm] = largest_rate(swept[arm].rates, is_stable)
        setting.advance(0.2)
    best = {arm: of_arm.best_for_each_seed() for arm, of_arm in swept.items()}
    tests = {arm: 100 * chosen.measured.test for arm, chosen in best.items()}
    few = FEW_STEPS // large_rates.EVERY
    measured = high_order_effects.measure_networks(setting, ("affine only", "no norm"))
    failing = {
        arm: high_order_effects.failing_rate(step.decrease) for arm, step in measured.items()
    }
    return Result(
        values={
            "20a": folded.error,
            "20b": folded.distance,
            "20c": at_large_rates.max(0),
            "20d": stable["batch norm"] / stable["affine only"],
            "20e": stable["affine only"] / stable["no norm"],
            "20f": tests["affine only"][:, -1] - tests["no norm"][:, -1],
            "20g": tests["batch norm"][:, few] - tests["affine only"][:, few],
            "20h": {
                f"depth {depth}": failing["affine only"][index] / failing["no norm"][index]
                for index, depth in enumerate(high_order_effects.DEPTHS)
            },
        },
        curves={
            "rates": large_rates.RATES,
            "accuracy": {arm: of_arm.measured.test[..., -1] for arm, of_arm in swept.items()},
            "steps": np.arange(tests["no norm"].shape[1]) * large_rates.EVERY,
            "course": {arm: of_arm.T for arm, of_arm in tests.items()},
        },
        series=[Series("20d", arm, "largest stable rate", of_arm) for arm, of_arm in stable.items()]
        + [Series("20f", arm, "at its best rate", of_arm[:, -1]) for arm, of_arm in tests.items()],
        rates={arm: chosen.rate for arm, chosen in best.items()},
        splits={
            "20b": setting.labelled.sample(EXAMPLES),
            "20h": setting.labelled.sample(high_order_effects.BATCH_SIZE),
        },
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws accuracy by learning rate, and its course at the best rates."""
    by_rate, by_step = figure.subplots(1, 2)
    for arm in ARMS:
        values = 100 * np.asarray(curves["accuracy"][arm])
        band(by_rate, curves["rates"], values, arm, within=PERCENT)
        course = curves["course"][arm]
        band(by_step, curves["steps"], course, arm, within=PERCENT, marker=".")
    by_rate.set(
        xscale="log",
        xlabel="learning rate",
        ylabel=f"test accuracy (%), depth {DEPTH}",
        ylim=(0, 102),
    )
    by_rate.legend(fontsize="small", loc="upper right", bbox_to_anchor=(1, 0.9))
    by_step.set(xlabel="steps, each at its best rate", ylabel="test accuracy (%)", ylim=(0, 102))
    by_step.legend(fontsize="small", loc="lower right")


RATES_TEXT = scale_invariance.RATES_TEXT
EXPERIMENT = Experiment(
    number=20,
    name="affine_only",
    claim="Scale and bias without normalizing give the same functions, and train as if not there",
    source="proposed in texts on batch norm; Goodfellow et al. 2016, section 8.7.1",
    sub_claims=(
        SubClaim(
            "20a",
            "the same functions",
            "with scale and bias a network computes what it computes without, at other kernels",
            "relative error of the logits",
            Identity(TOLERANCE),
        ),
        SubClaim(
            "20b",
            "other dynamics",
            "a gradient step changes that function otherwise than the same step at those kernels",
            "distance of the first-order changes of the logits, over the larger one",
            Above(DIFFERENT),
            reason=f"ours: {100 * DIFFERENT:g} %",
            is_resplit=True,
        ),
        SubClaim(
            "20c",
            "not any rate",
            "the kernels before scale and bias do not train at the rates at which those before a "
            "norm do",
            f"test accuracy at the best of the rates {RATES_TEXT} of these kernels",
            Below(scale_invariance.CHANCE),
            reason=f"ours: {100 * scale_invariance.CHANCE:g} %, twice chance",
            is_resplit=True,
            is_of_digits=True,
        ),
        SubClaim(
            "20d",
            "a norm: larger rates",
            "the largest stable learning rate is larger with batch norm than with scale and bias",
            f"largest stable rate, batch norm over affine only, depth {DEPTH}",
            Above(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "20e",
            "affine: the same rates",
            "with scale and bias, the largest stable learning rate is that without",
            f"largest stable rate, affine only over no norm, depth {DEPTH}",
            Within(1 / TWOFOLD, TWOFOLD),
            reason=f"ours: a factor of {TWOFOLD:g}",
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "20f",
            "no better accuracy",
            "with scale and bias, a deep network trains no better than without",
            f"test accuracy, affine only minus no norm, depth {DEPTH}, each at its best rate "
            "(points)",
            Below(POINTS),
            reason=f"ours: less than {POINTS:g} point better",
            is_resplit=True,
        ),
        SubClaim(
            "20g",
            "a norm: fewer steps",
            "early in training, batch norm is ahead of scale and bias",
            f"test accuracy after {FEW_STEPS} steps, batch norm minus affine only (points)",
            Above(0.0),
            is_resplit=True,
        ),
        SubClaim(
            "20h",
            "high orders remain",
            "with scale and bias, the first-order prediction of the loss fails by half at the "
            "rate at which it does without",
            "that rate, affine only over no norm",
            Within(1 / TWOFOLD, TWOFOLD),
            reason=f"ours: a factor of {TWOFOLD:g}",
            scale="ratio",
            is_resplit=True,
        ),
    ),
    protocol=(
        "the arm without normalization in claims 1, 8 and 19: random scales and biases folded into "
        f"kernels, in float64; kernels of MLP 64-64-64-10 at rates {RATES_TEXT}; MLP of {DEPTH} "
        f"layers at 9 rates from 1e-2 to 1e2, {large_rates.STEPS} steps; the loss along the "
        "gradient at the start of MLPs of 2 to 16 layers"
    ),
    limits=(
        "Scales start at 1, so that at first the arms differ by the gradients of scales alone. "
        "Long training, in which scales move far, is not seen."
    ),
    run=run,
    draw=draw,
    easy="That the functions are the same, and that a step is not.",
    hard="Nobody published a figure: all bounds are ours.",
    data=Needs(trained=high_order_effects.BATCH_SIZE),
)
