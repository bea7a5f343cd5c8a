"""Claim 29: weight standardization and adaptive gradient clipping replace batch norm at depth."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import PERCENT, band
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM
from bn_jax.lab.experiments.residual_identity import (
    BATCH_SIZE,
    MOMENTUM,
    NARROW,
    POINTS,
    QUICK_STEPS,
    RATES,
    STEPS,
    TRAINED_DEPTH,
    usable_rates,
)
from bn_jax.lab.experiments.selection import sweep_accuracies
from bn_jax.lab.experiments.sweeps import MakeOptimizer, draw_trials
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

# The share of a branch, and the gain of ReLU: the output of a unit normal input has this deviation
# after the gain, about its mean.
ALPHA = 0.2
GAIN = float(np.sqrt(2 / (1 - 1 / np.pi)))
# A gradient is clipped where its norm is above this share of that of the weights, unit by unit.
CLIPPING = 0.1
# The networks at initialization.
WIDTH, DEPTH, EXAMPLES, NETWORKS = 64, 64, 128, 4
WITHIN = 0.1


class StandardizedDense(nn.Module):
    """A dense layer whose kernel has mean 0 and variance ``1 / inputs`` for every unit.

    Attributes:
        features: the number of units.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to [n, inputs]."""
        shape = x.shape[-1], self.features
        kernel: Any = self.param("kernel", nn.initializers.lecun_normal(), shape)
        gain: Any = self.param("gain", nn.initializers.ones, (self.features,))
        bias: Any = self.param("bias", nn.initializers.zeros, (self.features,))
        return x @ (standardize_weights(kernel) * gain[None]) + bias[None]


def standardize_weights(kernel: jax.Array) -> jax.Array:
    """Returns a kernel [inputs, units] with mean 0 and variance ``1 / inputs`` over its inputs."""
    kernel = kernel - jnp.mean(kernel, 0, keepdims=True)
    return kernel * jax.lax.rsqrt(jnp.sum(kernel**2, 0, keepdims=True) + 1e-8)


class NormalizerFreeMLP(nn.Module):
    """A residual MLP ``x + alpha * f(x / beta)`` without norm, where `beta` is known beforehand.

    ``beta^2 = 1 + l * alpha^2`` is the variance of `x` before block `l` = 0, 1, ... at the start.

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
        """Computes the logits [n, num_classes] of [n, features], and sows ``stream``."""
        blocks = nn.scan(
            _NormalizerFreeBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x = first = StandardizedDense(self.width, name="stem")(x)
        beta = jnp.sqrt(1 + ALPHA**2 * jnp.arange(self.depth, dtype=x.dtype))
        x, later = blocks(name="block")(x, beta)
        self.sow("intermediates", "stream", jnp.concatenate([first[None], later]))
        return nn.Dense(self.num_classes, name="classifier")(nn.relu(x))


class _NormalizerFreeBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, beta: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = x / beta
        for number in range(2):
            y = StandardizedDense(x.shape[-1], name=f"dense_{number}")(GAIN * nn.relu(y))
        x = x + ALPHA * y
        return x, x


def variances(seed: jax.Array) -> jax.Array:
    """Measures the variance of the features of random networks before each block.

    Args:
        seed: of the networks and of their white input.

    Returns:
        Over examples and features, the mean of `NETWORKS` networks, [depth + 1].
    """
    model = NormalizerFreeMLP(DEPTH, WIDTH, 10)

    def of_network(key: jax.Array) -> jax.Array:
        for_input, for_model = jax.random.split(key)
        x = jax.random.normal(for_input, (EXAMPLES, WIDTH))
        _, sown = model.apply(
            model.init(for_model, x, train=False), x, train=False, mutable=["intermediates"]
        )
        (stream,) = sown["intermediates"]["stream"]
        return jnp.mean(jnp.var(stream, 1), 1)

    return jnp.mean(jax.lax.map(of_network, jax.random.split(jax.random.key(seed), NETWORKS)), 0)


def expected_variances() -> Any:
    """Returns what `variances` is at infinite width, [depth + 1]."""
    return 1 + ALPHA**2 * np.arange(DEPTH + 1)


def _sgd(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(rate, MOMENTUM)


def _clipped_sgd(rate: Any) -> optax.GradientTransformation:
    return optax.chain(optax.adaptive_grad_clip(CLIPPING), optax.sgd(rate, MOMENTUM))


STANDARDIZED = NormalizerFreeMLP(TRAINED_DEPTH, NARROW, 10)
ARMS: Mapping[str, tuple[nn.Module, MakeOptimizer]] = {
    "batch norm": (ResidualMLP(TRAINED_DEPTH, NARROW, 10, norm=BATCH_NORM), _sgd),
    "standardized": (STANDARDIZED, _sgd),
    "standardized, clipped": (STANDARDIZED, _clipped_sgd),
}


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    measure = jax.jit(variances)
    found = np.stack([np.asarray(measure(seed), np.float64) for seed in setting.chosen])
    setting.advance(0.1)
    trials = draw_trials(setting, QUICK_STEPS if setting.quick else STEPS, BATCH_SIZE)
    rates = RATES[:: 2 if setting.quick else 1]
    swept = {}
    for arm, (of_digits, make_optimizer) in ARMS.items():
        model = of_digits.clone(num_classes=setting.num_classes)
        swept[arm] = sweep_accuracies(model, make_optimizer, rates, trials)
        setting.advance(0.3)
    best = {arm: of_arm.best_for_all_seeds() for arm, of_arm in swept.items()}
    accuracies = {arm: 100 * chosen.measured for arm, chosen in best.items()}
    usable = {arm: usable_rates(of_arm) for arm, of_arm in swept.items()}
    return Result(
        values={
            "29a": found[:, -1] / expected_variances()[-1],
            "29b": accuracies["standardized, clipped"] - accuracies["batch norm"],
            "29c": usable["standardized, clipped"].largest / usable["standardized"].largest,
            "29d": usable["standardized, clipped"].range / usable["batch norm"].range,
        },
        curves={
            "variance": found.T,
            "rates": rates,
            "accuracy": {arm: of_arm.measured for arm, of_arm in swept.items()},
        },
        series=[Series("29b", arm, "", values) for arm, values in accuracies.items()]
        + [Series("29c", arm, "", of_arm.largest) for arm, of_arm in usable.items()]
        + [Series("29d", arm, "", of_arm.range) for arm, of_arm in usable.items()],
        rates={arm: chosen.rate for arm, chosen in best.items()},
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws variances by block, and accuracies by rate."""
    by_block, by_rate = figure.subplots(1, 2)
    blocks = np.arange(DEPTH + 1)
    band(by_block, blocks, curves["variance"], "measured")
    gray = {"color": "gray", "linestyle": ":", "zorder": 3}
    by_block.plot(blocks, expected_variances(), label="1 + l alpha^2", **gray)
    by_block.set(xlabel="blocks l", ylabel="variance of the features at the start")
    by_block.legend()
    for arm in ARMS:
        values = 100 * np.asarray(curves["accuracy"][arm])
        band(by_rate, curves["rates"], values, arm, within=PERCENT)
    by_rate.set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)", ylim=(0, 102))
    by_rate.legend(loc="lower left")


EXPERIMENT = Experiment(
    number=29,
    name="normalizer_free",
    claim="Weight standardization and adaptive gradient clipping replace batch norm at depth",
    source="Brock et al. 2021a, 2021b",
    sub_claims=(
        SubClaim(
            "29a",
            "variance by block",
            "with standardized weights, the variance of the features after l blocks is "
            "1 + l alpha^2",
            f"variance after {DEPTH} blocks over that value",
            Within(1 - WITHIN, 1 + WITHIN),
            Published("1 + l alpha^2", "R"),
            f"ours: {100 * WITHIN:g} %, for finite width",
            scale="ratio",
        ),
        SubClaim(
            "29b",
            "as accurate",
            "standardized weights and clipped gradients train as well as batch norm",
            "test accuracy minus that with batch norm, each at its best rate (points)",
            Within(-POINTS, POINTS),
            Published("equal or better accuracy", "R"),
            f"ours: {POINTS:g} point",
            is_resplit=True,
        ),
        SubClaim(
            "29c",
            "clipping: larger rates",
            "adaptive gradient clipping makes larger rates usable",
            "largest usable rate, with clipping over without",
            Above(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "29d",
            "as many as batch norm",
            "with both, the range of usable rates is at least that of batch norm",
            "largest over smallest usable rate, over that of batch norm",
            Above(1.0, matters=0.5),
            reason="ours: half of the range would matter",
            scale="ratio",
            is_resplit=True,
        ),
    ),
    protocol=(
        f"residual MLPs of {TRAINED_DEPTH} blocks of width {NARROW} on digits, {STEPS} steps at 8 "
        f"rates from 3e-4 to 1, batches of {BATCH_SIZE}; alpha {ALPHA:g}, gradients clipped at "
        f"{CLIPPING:g} of the weights' norm; {DEPTH} blocks of width {WIDTH} at initialization"
    ),
    limits=(
        "Small batches of an easy task; the sources clip to train at batches of thousands, where "
        "rates are large."
    ),
    run=run,
    draw=draw,
    easy="The variance at the start: it is known beforehand, block by block.",
    hard="What clipping is for: it shows at rates and batches that are larger than ours.",
    data=Needs(trained=BATCH_SIZE),
)
