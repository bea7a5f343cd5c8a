"""Claim 24: without norm, gradients vanish through saturating layers; behind batch norm, never."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import normalize_batch
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    Experiment,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
    Within,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTH, WIDTH, BATCH_SIZE = 10, 256, 128
# The number of layers next to the input and next to the output that are left out.
TRANSIENT = 3
WITHIN, WITHIN_EXPONENT, UNCHANGED = 0.05, 0.1, 0.01
GAINS = 1, 4, 8, 16, 32


class Activation(NamedTuple):
    """A function and its derivative, of NumPy or JAX arrays."""

    function: Callable[[Any], Any]
    slope: Callable[[Any], Any]


ACTIVATIONS = {
    "sigmoid": Activation(
        lambda x: (1 + jnp.tanh(x / 2)) / 2, lambda x: 1 / (4 * jnp.cosh(x / 2) ** 2)
    ),
    "tanh": Activation(jnp.tanh, lambda x: 1 - jnp.tanh(x) ** 2),
    "ReLU": Activation(jax.nn.relu, lambda x: (x > 0).astype(x.dtype)),
}


class Arm(NamedTuple):
    """A network of equal layers.

    Attributes:
        activation: a name in `ACTIVATIONS`.
        gain: the deviation of the weights times the root of the width; None: any, with batch norm.
    """

    activation: str
    gain: float | None

    def __str__(self) -> str:
        return f"{self.activation}, " + (
            "batch norm" if self.gain is None else f"gain {self.gain:g}"
        )


WITH_NORM = [Arm(name, None) for name in ACTIVATIONS]
# Saturating networks whose gradients vanish, and two whose gradients do not, or hardly.
VANISHING = [Arm("sigmoid", 1.0), Arm("sigmoid", 2.0), Arm("tanh", 0.5)]
OTHERS = [Arm("tanh", 1.0), Arm("tanh", 2.0)]
ARMS = [*WITH_NORM, *VANISHING, *OTHERS]


def gaussian_mean(function: Callable[[Any], Any], deviation: float) -> float:
    """Returns the mean of a function of a normal variable with mean 0, by quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(200)
    values = np.asarray(function(jnp.asarray(deviation * points, jnp.float32)), np.float64)
    return float(values @ weights / weights.sum())


def growth_without_norm(activation: Activation, gain: float) -> float:
    """Returns the growth of a gradient's squared norm through a layer, at infinite width.

    ``gain^2 E[slope(z)^2]``, where the variance `q` of `z` is that which a layer keeps:
    ``q = gain^2 E[function(z)^2]``.

    Reference: Schoenholz et al. 2017, "Deep Information Propagation",
    https://arxiv.org/abs/1611.01232.
    """
    variance = 1.0
    for _ in range(DEPTH // 2):
        second = gaussian_mean(lambda z: activation.function(z) ** 2, math.sqrt(variance))
        variance = gain**2 * second
    return gain**2 * gaussian_mean(lambda z: activation.slope(z) ** 2, math.sqrt(variance))


def growth_with_norm(activation: Activation) -> float:
    """Returns the growth of a gradient's squared norm through a layer and a norm.

    ``E[slope(z)^2] / Var[function(z)]`` for a standard normal `z`, at infinite width and batch
    size, whatever the gain. By Poincare's inequality it is at least 1 for every activation, and 1
    for linear functions alone.

    Example:
        >>> from bn_jax.lab.experiments.vanishing_gradients import ACTIVATIONS, growth_with_norm
        >>> round(growth_with_norm(ACTIVATIONS["tanh"]), 2)
        1.18
    """
    mean = gaussian_mean(activation.function, 1.0)
    variance = gaussian_mean(lambda z: activation.function(z) ** 2, 1.0) - mean**2
    return gaussian_mean(lambda z: activation.slope(z) ** 2, 1.0) / variance


@jax.jit
def squared_gradients(seed: jax.Array) -> jax.Array:
    """Measures the gradient at every layer of random networks with white input.

    Args:
        seed: of weights, inputs and the gradients at the outputs.

    Returns:
        Squared norms at the outputs of the layers, from the output to the input, [arms, depth].
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = len(ARMS), BATCH_SIZE, WIDTH

    def layer(x: jax.Array, given: Any) -> tuple[jax.Array, None]:
        key, probes = given
        mixed = x @ (jax.random.normal(key, (WIDTH, WIDTH)) / math.sqrt(WIDTH))
        outputs = [_apply(arm, mixed[index]) for index, arm in enumerate(ARMS)]
        return jnp.stack(outputs) + probes, None

    def network(probes: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(jax.random.normal(keys[0], shape[1:]), shape)
        return jax.lax.scan(layer, x, (jax.random.split(keys[1], DEPTH), probes))[0]

    # The gradient at a zero that is added to an array is the gradient at that array.
    zeros = jnp.zeros((DEPTH, *shape))
    (gradients,) = jax.vjp(network, zeros)[1](jax.random.normal(keys[2], shape))
    return jnp.sum(gradients**2, (2, 3))[::-1].T


def _apply(arm: Arm, mixed: jax.Array) -> jax.Array:
    function = ACTIVATIONS[arm.activation].function
    return function(normalize_batch(mixed) if arm.gain is None else arm.gain * mixed)


@jax.jit
def tanh_slopes(seed: jax.Array) -> jax.Array:
    """Measures the mean squared slope of tanh in a layer at each of `GAINS`.

    Args:
        seed: of weights and white input.

    Returns:
        Without and with batch norm, [2, gains].
    """
    for_weights, for_input = jax.random.split(jax.random.key(seed))
    weights = jax.random.normal(for_weights, (WIDTH, WIDTH)) / math.sqrt(WIDTH)
    mixed = jax.random.normal(for_input, (BATCH_SIZE, WIDTH)) @ weights
    slope = ACTIVATIONS["tanh"].slope

    def of_gain(gain: jax.Array) -> jax.Array:
        inputs = (gain * mixed, normalize_batch(gain * mixed))
        return jnp.stack([jnp.mean(slope(x) ** 2) for x in inputs])

    return jax.vmap(of_gain, out_axes=1)(jnp.asarray(GAINS, jnp.float32))


def growth_per_layer(squared: Any) -> Any:
    """Returns the mean ratio from layer to layer of squared norms [seeds, depth], [seeds]."""
    inner = squared[:, TRANSIENT:-TRANSIENT]
    return (inner[:, 1:] / inner[:, :-1]).mean(1)


def theory(arm: Arm) -> float:
    """Returns the growth per layer of an arm at infinite width."""
    activation = ACTIVATIONS[arm.activation]
    if arm.gain is None:
        return growth_with_norm(activation)
    return growth_without_norm(activation, arm.gain)


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    squared, slopes = [], []
    for seed in setting.chosen:
        squared.append(np.asarray(squared_gradients(seed), np.float64))
        slopes.append(np.asarray(tanh_slopes(seed), np.float64))
        setting.advance(1 / setting.seeds)
    by_arm = dict(zip(ARMS, np.stack(squared, 1), strict=True))
    growth = {arm: growth_per_layer(of_arm) for arm, of_arm in by_arm.items()}
    without, with_norm = np.stack(slopes, 1)
    # The gain is the deviation of the input of tanh.
    exponent = np.polynomial.polynomial.polyfit(np.log(GAINS[1:]), np.log(without[:, 1:]).T, 1)[1]
    return Result(
        values={
            "24a": {str(arm): growth[arm] for arm in VANISHING},
            "24b": {str(arm): growth[arm] / theory(arm) for arm in (*VANISHING, *OTHERS)},
            "24c": {str(arm): growth[arm] for arm in WITH_NORM},
            "24d": {str(arm): growth[arm] / theory(arm) for arm in WITH_NORM},
            "24e": exponent,
            "24f": with_norm[:, -1] / with_norm[:, 0],
        },
        curves={
            "squared norm": {
                str(arm): np.log10(of_arm / of_arm[:, :1]).T for arm, of_arm in by_arm.items()
            },
            "slope": {"no norm": without.T, "batch norm": with_norm.T},
        },
        series=[Series("24d", str(arm), "growth per layer", growth[arm]) for arm in ARMS],
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the gradients by layer, and the slope of tanh by the deviation of its input."""
    by_layer, by_gain = figure.subplots(1, 2)
    layers = np.arange(DEPTH)
    for arm in ARMS:
        values = curves["squared norm"][str(arm)]
        line = "-" if arm in WITH_NORM else "--"
        color = f"C{list(ACTIVATIONS).index(arm.activation)}"
        band(by_layer, layers, values, str(arm), linestyle=line, color=color)
        by_layer.plot(layers, layers * np.log10(theory(arm)), color="gray", linestyle=":", zorder=3)
    by_layer.plot([], [], color="gray", linestyle=":", label="theory")
    by_layer.set(
        xlabel="layers from the output", ylabel=r"$\log_{10}$ of the gradient's squared norm"
    )
    by_layer.legend(fontsize="x-small", loc="lower left")
    for arm, values in curves["slope"].items():
        band(by_gain, GAINS, values, arm, marker=".")
    gains = np.asarray(GAINS[1:], np.float64)
    limit = 4 / 3 / math.sqrt(2 * math.pi) / gains
    by_gain.plot(gains, limit, color="gray", linestyle=":", zorder=3, label="theory")
    by_gain.set(
        xscale="log",
        yscale="log",
        xlabel="deviation of the weighted sum",
        ylabel="mean squared slope of tanh",
    )
    by_gain.legend()


WITHIN_TEXT = f"ours: {100 * WITHIN:g} %, for finite width and batches"
EXPERIMENT = Experiment(
    number=24,
    name="vanishing_gradients",
    claim="Gradients vanish through saturating layers, and behind batch norm they cannot",
    source="Ioffe & Szegedy 2015; Schoenholz et al. 2017; Yang et al. 2019",
    sub_claims=(
        SubClaim(
            "24a",
            "they vanish without",
            "without norm, gradients shrink with every layer of sigmoids, and of tanh at small "
            "gains",
            "growth of the squared norm per layer",
            Below(1.0),
            scale="ratio",
        ),
        SubClaim(
            "24b",
            "at the rate of theory",
            "without norm, the squared norm grows by gain^2 E[slope^2]",
            "growth per layer over that value",
            Within(1 - WITHIN, 1 + WITHIN),
            Published("gain^2 E[slope^2]", "R"),
            WITHIN_TEXT,
            scale="ratio",
        ),
        SubClaim(
            "24c",
            "not behind a norm",
            "with batch norm, gradients do not shrink with depth, whatever the activation",
            "growth of the squared norm per layer",
            Above(1.0),
            Published("at least 1, by Poincare's inequality", "D"),
            scale="ratio",
        ),
        SubClaim(
            "24d",
            "growth behind a norm",
            "with batch norm, the squared norm grows by E[slope^2] / Var[activation]",
            "growth per layer over that value",
            Within(1 - WITHIN, 1 + WITHIN),
            Published("E[slope^2] / Var[activation]", "D"),
            WITHIN_TEXT,
            scale="ratio",
        ),
        SubClaim(
            "24e",
            "slope of tanh",
            "the mean squared slope of tanh falls as 1 over the deviation of its input",
            f"exponent over deviations {GAINS[1]} to {GAINS[-1]}",
            Within(-1 - WITHIN_EXPONENT, -1 + WITHIN_EXPONENT),
            Published("-1", "D"),
            "ours: a tenth",
        ),
        SubClaim(
            "24f",
            "slope behind a norm",
            "behind a norm, it does not depend on the size of the weights",
            f"mean squared slope at gain {GAINS[-1]} over that at gain {GAINS[0]}",
            Within(1 - UNCHANGED, 1 + UNCHANGED),
            Published("1", "D"),
            f"ours: {100 * UNCHANGED:g} %",
            scale="ratio",
        ),
    ),
    protocol=(
        f"random networks of width {WIDTH} and depth {DEPTH}, batches of {BATCH_SIZE}, white "
        "input, random gradients at the output; sigmoid, tanh and ReLU with batch norm, sigmoid at "
        "gains 1 and 2 and tanh at 0.5, 1 and 2 without; one layer of tanh at gains 1 to 32"
    ),
    limits=(
        "At initialization. That gradients do not vanish does not say that they are useful: behind "
        "batch norm they explode instead, which claim 2 measures."
    ),
    run=run,
    draw=draw,
    easy="All growth factors: they follow from the activation alone.",
    hard="Nothing here; whether such networks train is another question.",
)
