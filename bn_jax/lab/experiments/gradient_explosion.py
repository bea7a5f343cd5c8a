"""Claim 2: with batch norm, gradients explode with depth, at a rate that theory gives."""

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bn_jax as bn
from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import NO_EPSILON_FLOAT32
from bn_jax.lab.experiments.verdicts import Criterion, Experiment, Result, Setting, mean_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 1024
DEPTH, QUICK_DEPTH = 26, 12
# The number of independent batches of each size: smaller batches need more of them, for their
# 1 / variance has a heavier tail.
BATCHES = {4: 40, 6: 16, 8: 10, 16: 4, 32: 2, 64: 1}
# The networks without norm stand under this batch size, for their examples do not interact.
NO_NORM = 1
DRAWN = 4, 8, 64, NO_NORM
EXAMPLES = 64
# The number of layers next to the input and next to the output that are left out.
TRANSIENT = 3
WITHIN = 0.02


class Activation(NamedTuple):
    """A function between layers, and the gain of the weights that keeps the second moment."""

    function: Any
    gain: float


ACTIVATIONS = {
    "linear": Activation(lambda x: x, 1.0),
    "ReLU": Activation(jax.nn.relu, math.sqrt(2)),
}


def linear_growth(batch_size: Any) -> Any:
    """Returns the growth of a gradient's squared norm through a linear layer and a batch norm.

    ``(B - 2) / (B - 3)``. A centred feature is ``z = s u``. Here `u` is uniform on the unit sphere
    of the `B - 1` dimensions without mean. The length has ``s^2 = c chi^2(B - 1)``, where
    ``c = B / (B - 1)`` is the eigenvalue of the covariance ``B E[u u^T]`` of the previous norm's
    output. The norm's derivative is ``sqrt(B) / s (I - u u^T)``. On average its square multiplies
    the squared norm by ``B E[1 / s^2] (1 - 1 / (B - 1))``, where
    ``E[1 / chi^2(B - 1)] = 1 / (B - 3)``.

    Args:
        batch_size: B > 3; for smaller B the expectation is infinite.

    Returns:
        The growth per layer in the limit of infinite width.

    Example:
        >>> from bn_jax.lab.experiments.gradient_explosion import linear_growth
        >>> linear_growth(4.0)
        2.0

    Reference: Yang et al. 2019, https://arxiv.org/abs/1902.08129.
    """
    return (batch_size - 2) / (batch_size - 3)


def relu_growth(batch_size: Any) -> Any:
    """Returns the growth of a gradient's squared norm through a layer, a batch norm and a ReLU.

    Let `u` be as in `linear_growth`, and ``d`` be 1 where `u` is positive and 0 elsewhere. The
    gradient is masked by ``D = diag(d)``, loses its mean and its part along `u`, and is multiplied
    by ``sqrt(B) / s``. The incoming gradient has no mean and otherwise no preferred direction. So
    its squared norm grows by ``B E[1 / s^2] / (B - 1)`` times ::

        E tr((I - u u^T) G D G D G) = (B - 3) / 2 + 1 / B + (p + k) (B - 1) / B,   G = I - 1 1^T / B

    where two entries of `u`, correlated by ``r = -1 / (B - 1)``, are both positive with probability
    ``p = 1 / 4 + arcsin(r) / 2 pi``, and the product of their ReLUs is on average ``k / B``, with
    ``k = (sqrt(1 - r^2) + r (pi - arccos r)) / 2 pi``. The covariance after the ReLU has the
    eigenvalue ``1 / 2 - k``, so that ``E[1 / s^2] = 1 / ((1 / 2 - k) (B - 3))``.

    Args:
        batch_size: B > 3; for smaller B the expectation is infinite.

    Returns:
        The growth per layer in the limit of infinite width, ``pi / (pi - 1)`` for large B.

    Example:
        >>> from bn_jax.lab.experiments.gradient_explosion import relu_growth
        >>> round(float(relu_growth(1e6)), 4)
        1.4669

    Reference: Yang et al. 2019, https://arxiv.org/abs/1902.08129.
    """
    r = -1 / (batch_size - 1)
    both = 1 / 4 + np.arcsin(r) / (2 * np.pi)
    kernel = (np.sqrt(1 - r**2) + r * (np.pi - np.arccos(r))) / (2 * np.pi)
    trace = (batch_size - 3) / 2 + 1 / batch_size
    trace += (both + kernel) * (batch_size - 1) / batch_size
    return batch_size / ((1 / 2 - kernel) * (batch_size - 3) * (batch_size - 1)) * trace


GROWTH = {"linear": linear_growth, "ReLU": relu_growth}


def squared_gradients(seed: jax.Array, depth: int) -> Any:
    """Measures the gradient at every layer of random networks with weights and no biases.

    All networks of a seed have the same weights; intervals are over seeds.

    Args:
        seed: the seed of weights, inputs and the gradients at the outputs.
        depth: the number of layers.

    Returns:
        For every batch size, squared norms [depth, activations, batches], from the output to the
        input.
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {
        size: (size, len(ACTIVATIONS), count, WIDTH)
        for size, count in {**BATCHES, NO_NORM: EXAMPLES}.items()
    }

    def white(key: jax.Array) -> dict[int, jax.Array]:
        return {
            size: jax.random.normal(jax.random.fold_in(key, size), shape)
            for size, shape in shapes.items()
        }

    def layer(x: Any, key_and_probes: Any) -> Any:
        key, probes = key_and_probes
        weights = jax.random.normal(key, (WIDTH, WIDTH)) / math.sqrt(WIDTH)
        return {size: _apply_layer(weights, x[size]) + probes[size] for size in x}, None

    def network(probes: Any) -> Any:
        x, _ = jax.lax.scan(layer, white(keys[0]), (jax.random.split(keys[1], depth), probes))
        return x

    # Zeros are added to the output of every layer. The gradient at them is that at the output.
    probes = {size: jnp.zeros((depth, *shape)) for size, shape in shapes.items()}
    (gradients,) = jax.vjp(network, probes)[1](white(keys[2]))
    return {size: jnp.sum(of_size**2, (1, 4))[::-1] for size, of_size in gradients.items()}


def _apply_layer(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Applies weights, a norm unless B is `NO_NORM`, and activations.

    Args:
        weights: [WIDTH, WIDTH].
        x: [B, activations, batches, WIDTH].
    """
    x = x @ weights
    if len(x) == NO_NORM:
        gains = jnp.array([activation.gain for activation in ACTIVATIONS.values()])
        x *= gains[None, :, None, None]
    else:
        statistics = bn.init_batch_stats(x.shape[1:])
        x, _ = bn.batch_norm(
            {}, statistics, x, use_running_average=False, axis=(1, 2, 3), epsilon=NO_EPSILON_FLOAT32
        )
    activated = [
        activation.function(x[:, index]) for index, activation in enumerate(ACTIVATIONS.values())
    ]
    return jnp.stack(activated, 1)


Arm = tuple[str, int]


def measure_all(setting: Setting, depth: int) -> dict[Arm, Any]:
    """Measures the squared norms of gradients of all seeds.

    Args:
        setting: the seeds, and the size of the run.
        depth: the number of layers.

    Returns:
        For each activation and batch size, squared norms [seeds, depth, batches].
    """
    measure = jax.jit(partial(squared_gradients, depth=depth))
    runs = []
    for seed in setting.chosen:
        runs.append(jax.tree.map(np.float64, measure(seed)))
        setting.advance(1 / len(setting.chosen))
    return {
        (name, size): np.stack([of_seed[size][:, index] for of_seed in runs])
        for index, name in enumerate(ACTIVATIONS)
        for size in (*BATCHES, NO_NORM)
    }


def growth_per_layer(squared_norms: Any) -> Any:
    """Returns the mean ratio from layer to layer of squared norms [seeds, depth, batches].

    It is the mean of the ratios that theory gives; the mean of their logarithms is smaller.
    """
    inner = squared_norms[:, TRANSIENT:-TRANSIENT]
    return (inner[:, 1:] / inner[:, :-1]).mean((1, 2))


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    squared_norms = measure_all(setting, QUICK_DEPTH if setting.quick else DEPTH)
    growth = {arm: growth_per_layer(of_arm) for arm, of_arm in squared_norms.items()}
    relative = {
        arm: np.log10(of_arm.mean(-1) / of_arm.mean(-1)[:, :1]).T
        for arm, of_arm in squared_norms.items()
    }
    return Result(
        criteria=_criteria(growth),
        curves={
            "squared norm": {
                f"{name}, {'no norm' if size == NO_NORM else f'B = {size}'}": relative[name, size]
                for name in ACTIVATIONS
                for size in DRAWN
            },
            "growth": {name: [growth[name, size] for size in BATCHES] for name in ACTIVATIONS},
        },
        reported={
            f"growth per layer, {name}, B = {size}": mean_interval(growth[name, size])
            for name in ACTIVATIONS
            for size in BATCHES
        },
    )


def _criteria(growth: Mapping[Arm, Any]) -> tuple[Criterion, ...]:
    with_norm = (
        Criterion(
            f"growth per layer over theory, {name}, B = {size}",
            f"{GROWTH[name](size):.4g}",
            mean_interval(growth[name, size] / GROWTH[name](size)),
            at_least=1 - WITHIN,
            at_most=1 + WITHIN,
        )
        for name in ACTIVATIONS
        for size in BATCHES
    )
    without = (
        Criterion(
            f"growth per layer without norm, {name}",
            "1",
            mean_interval(growth[name, NO_NORM]),
            at_least=0.97,
            at_most=1.03,
        )
        for name in ACTIVATIONS
    )
    return (*with_norm, *without)


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the gradients by layer, and their growth by batch size."""
    by_layer, by_size = figure.subplots(1, 2)
    for index, (arm, norms) in enumerate(curves["squared norm"].items()):
        color, line = f"C{index % len(DRAWN)}", "--" if arm.startswith("linear") else "-"
        band(by_layer, np.arange(len(norms)), norms, arm, linestyle=line, color=color)
    by_layer.set(
        xlabel="layers from the output", ylabel=r"$\log_{10}$ of the gradient's squared norm"
    )
    by_layer.legend(fontsize="small")
    sizes = np.geomspace(min(BATCHES), max(BATCHES), 100)
    for name, growth in curves["growth"].items():
        by_size.plot(sizes, GROWTH[name](sizes), color="gray", linestyle=":")
        band(by_size, list(BATCHES), growth, name, marker="o", linestyle="none")
    limit = np.pi / (np.pi - 1)
    by_size.axhline(limit, color="gray", linewidth=0.5)
    by_size.annotate(r"$\pi / (\pi - 1)$", (min(BATCHES), limit), va="top")
    by_size.set(xscale="log", xlabel="batch size", ylabel="growth per layer (dotted: theory)")
    by_size.set_xticks(list(BATCHES), list(map(str, BATCHES)), minor=False)
    by_size.set_xticks([], minor=True)
    by_size.legend()


EXPERIMENT = Experiment(
    number=2,
    name="gradient_explosion",
    claim="Behind batch norm, gradients explode with depth",
    source="Yang et al. 2019",
    published="(B - 2) / (B - 3) per layer for linear networks, towards pi / (pi - 1) for ReLU",
    protocol=(
        f"random networks of width {WIDTH} and depth {DEPTH}, white inputs, random gradients at "
        "the output; the mean ratio of squared norms from layer to layer, without norm as control"
    ),
    limits=(
        "At initialization, and of gradients at activations. At B = 4 the growth has no variance: "
        "few features dominate, and what a network typically shows is less than the mean."
    ),
    run=run,
    draw=draw,
)
