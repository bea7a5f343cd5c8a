"""Claim 2: with batch norm, gradients explode with depth, at a rate that theory gives."""

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.lab.experiments.figures import band, points
from bn_jax.lab.experiments.nets import normalize_batch
from bn_jax.lab.experiments.verdicts import (
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

WIDTH = 512
DEPTH, QUICK_DEPTH = 14, 10
# The number of independent batches of each size: gradients through smaller batches vary more.
BATCHES = {4: 32, 8: 8, 16: 4, 32: 2, 64: 1}
# The networks without norm stand under this batch size, for their examples do not interact.
NO_NORM = 1
# For B of at most 5 the growth has no variance, so that its mean over the radius is measured.
INTEGRATED = 5
DRAWN = 4, 8, 64, NO_NORM
EXAMPLES = 64
# The number of layers next to the input and next to the output that are left out.
TRANSIENT = 3
WITHIN = 0.02
WITHOUT_NORM = 0.03


class Shape(NamedTuple):
    """The shape of a linear network with orthogonal weights."""

    width: int
    batch_size: int
    depth: int


# The theory of orthogonal weights needs a batch in which the features can be uncorrelated: more
# examples than features. WIDE is the other case.
NARROW, WIDE = Shape(8, 16, 200), Shape(512, 8, 10)
QUICK_WIDE = WIDE._replace(width=128)
NETWORKS, WIDE_NETWORKS = 16, 1
PER_LAYER = 0.01
# The error of the inverse of a matrix with condition number `c` is below (1 - 1 / c)^(2^steps).
NEWTON_STEPS = 12


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


def orthogonal_growth(batch_size: Any, width: Any) -> Any:
    """Returns the growth of `linear_growth` if the weights are orthogonal and the layer is wide.

    The squared deviation of a feature then has a beta instead of a chi squared distribution: it is
    the squared length of a part, of `B - 1` dimensions, of a unit vector of `width` dimensions.

    Args:
        batch_size: B > 3.
        width: the number of features, larger than B.

    Returns:
        ``(B - 2) / (B - 3) * (1 - 2 / width)``.
    """
    return linear_growth(batch_size) * (1 - 2 / width)


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


class Gradients(NamedTuple):
    """The gradients of random networks, from the output to the input.

    Attributes:
        squared: squared norms at the outputs of the layers, [..., depth, batches].
        growth: of the squared norm through each layer but the first, [..., depth - 1, batches].
    """

    squared: Any
    growth: Any


class _Probes(NamedTuple):
    """Zeros that are added to arrays of every layer: the gradient at them is that at the array."""

    mixed: Any
    output: Any


def radius_weights(x: jax.Array, mixed: jax.Array) -> jax.Array:
    """Returns weights that remove the radius of a feature from the mean of its gradient.

    Given the input of a layer with normal weights, a centred feature is ``z = L v``, where `v` is
    white and ``L L^T`` is the covariance `C` of the centred features. The output of a norm depends
    on the direction of `v` alone, and its squared derivative is proportional to ``1 / rho^2`` with
    ``rho^2 = |v|^2 = z^T C^-1 z``. The mean of ``1 / rho^2``, a chi squared variable with ``B - 1``
    degrees of freedom, is ``1 / (B - 3)``. So a squared gradient times ``rho^2 / (B - 3)`` is its
    mean over the radius. For B = 4, the squared gradient itself has no variance.

    Args:
        x: the layer's input, [B, features].
        mixed: the input times weights of variance ``1 / features``, [B, units].

    Returns:
        ``rho^2 / (B - 3)``, [units]; its mean is ``(B - 1) / (B - 3)``.
    """
    batch_size, features = x.shape
    x, z = (leaf - jnp.mean(leaf, 0, keepdims=True) for leaf in (x, mixed))
    # `z` has no part along the vector of ones, in whose direction the covariance is zero.
    inverse = _inverse(x @ x.T / features + 1 / batch_size)
    return jnp.sum(z * (inverse @ z), 0) / (batch_size - 3)


def _inverse(matrix: jax.Array) -> jax.Array:
    """Inverts a positive definite matrix of small condition number, by products alone."""
    identity = jnp.eye(len(matrix))
    # The largest sum of a row bounds the largest eigenvalue, so that Newton's method converges.
    start = identity / jnp.max(jnp.sum(jnp.abs(matrix), 1))

    def refine(_: Any, inverse: jax.Array) -> jax.Array:
        return inverse @ (2 * identity - matrix @ inverse)

    return jax.lax.fori_loop(0, NEWTON_STEPS, refine, start)


def measure_gradients(seed: jax.Array, depth: int) -> dict[int, Gradients]:
    """Measures the gradient at every layer of random networks with weights and no biases.

    All networks of a seed have the same weights; intervals are over seeds.

    Args:
        seed: the seed of weights, inputs and the gradients at the outputs.
        depth: the number of layers.

    Returns:
        For every batch size, gradients [depth, activations, batches]. For batches of up to
        `INTEGRATED`, the growth is a mean over the radius of each feature (see `radius_weights`).
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
        outputs, of_radii = {}, {}
        for size, of_size in x.items():
            mixed = of_size @ weights
            if NO_NORM < size <= INTEGRATED:
                of_radii[size] = _all_radius_weights(of_size, mixed)
            outputs[size] = _activate(mixed + probes[size].mixed) + probes[size].output
        return outputs, of_radii

    def network(probes: Any) -> Any:
        return jax.lax.scan(layer, white(keys[0]), (jax.random.split(keys[1], depth), probes))

    zeros = {size: jnp.zeros((depth, *shape)) for size, shape in shapes.items()}
    probes = {size: _Probes(of_size, of_size) for size, of_size in zeros.items()}
    _, pull, of_radii = jax.vjp(network, probes, has_aux=True)
    (gradients,) = pull(white(keys[2]))
    return {size: _growth(of_size, of_radii.get(size)) for size, of_size in gradients.items()}


def _all_radius_weights(x: jax.Array, mixed: jax.Array) -> jax.Array:
    """Returns the weights of all networks and batches, [activations, batches, WIDTH]."""
    x, mixed = jax.lax.stop_gradient((x, mixed))
    return jax.vmap(jax.vmap(radius_weights, (1, 1)), (1, 1))(x, mixed)


def _activate(mixed: jax.Array) -> jax.Array:
    """Applies a norm unless B is `NO_NORM`, and activations, [B, activations, batches, WIDTH]."""
    if len(mixed) == NO_NORM:
        gains = jnp.array([activation.gain for activation in ACTIVATIONS.values()])
        mixed *= gains[None, :, None, None]
    else:
        mixed = normalize_batch(mixed)
    activated = [
        activation.function(mixed[:, index])
        for index, activation in enumerate(ACTIVATIONS.values())
    ]
    return jnp.stack(activated, 1)


def _growth(gradients: _Probes, of_radii: jax.Array | None) -> Gradients:
    """Returns squared norms and their growth, from gradients [depth, B, ..., WIDTH]."""
    squared = jnp.sum(gradients.output**2, (1, -1))[::-1]
    if of_radii is None:
        return Gradients(squared, squared[1:] / squared[:-1])
    # Behind a wide layer, the gradient at its input has the squared norm of that at its sums.
    through = jnp.sum(gradients.mixed**2 * of_radii[:, None], (1, -1))[::-1]
    return Gradients(squared, through[:-1] / squared[:-1])


def gradients_in_linear_network(key: jax.Array, weights: jax.Array, batch_size: int) -> Gradients:
    """Measures the gradient in a linear network with batch norm.

    Args:
        key: of the white input and of the gradient at the output.
        weights: [depth, width, width].
        batch_size: the number of examples.

    Returns:
        Squared norms at the outputs of the layers, [depth], and their growth.
    """
    for_input, for_output = jax.random.split(key)
    size = batch_size, weights.shape[-1]

    def layer(x: jax.Array, given: Any) -> Any:
        kernel, probes = given
        return normalize_batch(x @ kernel) + probes, None

    def network(probes: jax.Array) -> jax.Array:
        return jax.lax.scan(layer, jax.random.normal(for_input, size), (weights, probes))[0]

    zeros = jnp.zeros((len(weights), *size))
    (gradients,) = jax.vjp(network, zeros)[1](jax.random.normal(for_output, size))
    return _growth(_Probes(None, gradients), None)


Arm = tuple[str, int]


def measure_all(setting: Setting, depth: int) -> dict[Arm, Gradients]:
    """Measures the gradients of all seeds.

    Args:
        setting: the seeds, and the size of the run.
        depth: the number of layers.

    Returns:
        For each activation and batch size, gradients [seeds, depth, batches].
    """
    measure = jax.jit(partial(measure_gradients, depth=depth))
    runs = []
    for seed in setting.chosen:
        runs.append(jax.tree.map(np.float64, measure(seed)))
        setting.advance(0.8 / len(setting.chosen))
    return {
        (name, size): Gradients(
            np.stack([of_seed[size].squared[:, index] for of_seed in runs]),
            np.stack([of_seed[size].growth[:, index] for of_seed in runs]),
        )
        for index, name in enumerate(ACTIVATIONS)
        for size in (*BATCHES, NO_NORM)
    }


def growth_per_layer(gradients: Gradients) -> Any:
    """Returns the mean growth through a layer far from input and output, [seeds].

    It is the mean of the ratios that theory gives; the mean of their logarithms is smaller.
    """
    return gradients.growth[:, TRANSIENT:-TRANSIENT].mean((1, 2))


def orthogonal(generator: np.random.Generator, draws: tuple[int, ...], width: int) -> Any:
    """Draws orthogonal matrices from the uniform distribution, [*draws, width, width]."""
    # NumPy's LAPACK: under JAX, calls from two devices at once can wait for each other.
    q, r = np.linalg.qr(generator.standard_normal((*draws, width, width)))
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def measure_orthogonal(setting: Setting, shape: Shape, networks: int) -> Gradients:
    """Measures linear networks with batch norm and orthogonal weights.

    Args:
        setting: the seeds, and the size of the run.
        shape: of the networks.
        networks: the number of networks of each seed.

    Returns:
        [seeds, networks, depth].
    """

    def of_seed(seed: Any) -> Gradients:
        key = jax.random.fold_in(jax.random.key(seed), shape.width)
        generator = np.random.default_rng([shape.width, seed])
        weights = orthogonal(generator, (networks, shape.depth), shape.width)
        found = measure(jax.random.split(key, networks), weights.astype(np.float32))
        return Gradients(*(np.asarray(leaf, np.float64) for leaf in found))

    measure = jax.jit(jax.vmap(partial(gradients_in_linear_network, batch_size=shape.batch_size)))
    runs = [of_seed(seed) for seed in setting.chosen]
    return Gradients(*map(np.stack, zip(*runs, strict=True)))


def total_growth(squared: Any) -> Any:
    """Returns the geometric mean of the growth per layer from the last layer to the first.

    Args:
        squared: squared norms [seeds, networks, depth].

    Returns:
        [seeds].
    """
    logarithms = np.log(squared[..., -1] / squared[..., 0]) / (squared.shape[-1] - 1)
    return np.exp(logarithms.mean(1))


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    gradients = measure_all(setting, QUICK_DEPTH if setting.quick else DEPTH)
    growth = {arm: growth_per_layer(of_arm) for arm, of_arm in gradients.items()}
    narrow = measure_orthogonal(setting, NARROW, NETWORKS)
    wide_shape = QUICK_WIDE if setting.quick else WIDE
    wide = measure_orthogonal(setting, wide_shape, WIDE_NETWORKS)
    wide_growth = wide.growth[..., TRANSIENT:-TRANSIENT].mean((1, 2))
    relative = {
        arm: np.log10(of_arm.squared.mean(-1) / of_arm.squared.mean(-1)[:, :1]).T
        for arm, of_arm in gradients.items()
    }
    over_theory = {
        name: {f"B = {size}": growth[name, size] / GROWTH[name](size) for size in BATCHES}
        for name in ACTIVATIONS
    }
    return Result(
        values={
            "2a": over_theory["linear"],
            "2b": over_theory["ReLU"],
            "2c": {name: growth[name, NO_NORM] for name in ACTIVATIONS},
            "2d": total_growth(narrow.squared),
            "2e": wide_growth / orthogonal_growth(wide_shape.batch_size, wide_shape.width),
            # What is left of a term in 1 / B: the limit of large batches.
            "2f": (2 * growth["ReLU", 64] - growth["ReLU", 32]) * (np.pi - 1) / np.pi,
        },
        curves={
            "squared norm": {
                f"{name}, {'no norm' if size == NO_NORM else f'B = {size}'}": relative[name, size]
                for name in ACTIVATIONS
                for size in DRAWN
            },
            "growth": {name: [growth[name, size] for size in BATCHES] for name in ACTIVATIONS},
            "orthogonal": np.log10(narrow.squared / narrow.squared[..., :1]).mean(1).T,
        },
        series=[
            Series(key, name, f"B = {size}", growth[name, size])
            for key, name in (("2a", "linear"), ("2b", "ReLU"))
            for size in BATCHES
        ],
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the gradients by layer, their growth by batch size, and orthogonal weights."""
    by_layer, by_size, orthogonal = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    for index, (arm, norms) in enumerate(curves["squared norm"].items()):
        color, line = f"C{index % len(DRAWN)}", "--" if arm.startswith("linear") else "-"
        band(by_layer, np.arange(len(norms)), norms, arm, linestyle=line, color=color)
    by_layer.set(
        xlabel="layers from the output", ylabel=r"$\log_{10}$ of the gradient's squared norm"
    )
    by_layer.legend(fontsize="x-small")
    sizes = np.geomspace(min(BATCHES), max(BATCHES), 100)
    for name, growth in curves["growth"].items():
        points(by_size, list(BATCHES), growth, name, markersize=4)
        by_size.plot(sizes, GROWTH[name](sizes), color="gray", linestyle=":", zorder=3)
    limit = np.pi / (np.pi - 1)
    by_size.axhline(limit, color="gray", linewidth=0.5)
    by_size.annotate(r"$\pi / (\pi - 1)$", (max(BATCHES), limit), va="top", ha="right")
    by_size.set(xscale="log", xlabel="batch size", ylabel="growth per layer (dotted: theory)")
    by_size.set_xticks(list(BATCHES), list(map(str, BATCHES)), minor=False)
    by_size.set_xticks([], minor=True)
    by_size.legend()
    layers = np.arange(NARROW.depth)
    band(orthogonal, layers, curves["orthogonal"], "orthogonal weights")
    theory = layers * np.log10(linear_growth(NARROW.batch_size))
    orthogonal.plot(layers, theory, color="gray", linestyle=":", label="normal weights: theory")
    orthogonal.set(
        xlabel="layers from the output",
        title=f"linear, {NARROW.width} features, B = {NARROW.batch_size}",
    )
    orthogonal.title.set_fontsize("small")
    orthogonal.legend(fontsize="x-small")


WITHIN_TEXT = f"ours: {100 * WITHIN:g} %, for finite width"
EXPERIMENT = Experiment(
    number=2,
    name="gradient_explosion",
    claim="Behind batch norm, gradients explode with depth",
    source="Yang et al. 2019; Joudaki et al. 2023; Meterez et al. 2024",
    sub_claims=(
        SubClaim(
            "2a",
            "growth, linear",
            "through a linear layer and a norm, a gradient's squared norm grows by (B - 2)/(B - 3)",
            "mean growth per layer over (B - 2) / (B - 3)",
            Within(1 - WITHIN, 1 + WITHIN),
            Published("(B - 2) / (B - 3)", "D"),
            WITHIN_TEXT,
            scale="ratio",
        ),
        SubClaim(
            "2b",
            "growth, ReLU",
            "with ReLU it grows by the factor of `relu_growth`",
            "mean growth per layer over the closed form",
            Within(1 - WITHIN, 1 + WITHIN),
            Published("closed form in B", "D"),
            WITHIN_TEXT,
            scale="ratio",
        ),
        SubClaim(
            "2c",
            "no growth without norm",
            "without norm, and with weights that keep second moments, it does not grow",
            "mean growth per layer",
            Within(1 - WITHOUT_NORM, 1 + WITHOUT_NORM),
            Published("1", "V"),
            f"ours: {100 * WITHOUT_NORM:g} %",
            scale="ratio",
        ),
        SubClaim(
            "2d",
            "orthogonal weights",
            "with orthogonal weights and more examples than features, it does not grow in linear "
            "networks",
            f"growth per layer over {NARROW.depth} layers, geometric mean",
            Within(1 - PER_LAYER, 1 + PER_LAYER),
            Published("bounded at any depth", "R"),
            f"ours: {100 * PER_LAYER:g} % per layer; normal weights: 7.7 %",
            scale="ratio",
        ),
        SubClaim(
            "2e",
            "orthogonal and wide",
            "with fewer examples than features, orthogonal weights explode as normal ones do",
            "mean growth per layer over (B - 2) / (B - 3) (1 - 2 / width)",
            Within(1 - WITHIN, 1 + WITHIN),
            Published("(B - 2) / (B - 3) (1 - 2 / width)", "D"),
            WITHIN_TEXT,
            scale="ratio",
        ),
        SubClaim(
            "2f",
            "ReLU, large batches",
            "with ReLU, the growth of large batches is pi / (pi - 1)",
            "growth per layer extrapolated from B = 32 and 64, over pi / (pi - 1)",
            Within(1 - WITHIN, 1 + WITHIN),
            Published("pi / (pi - 1)", "V"),
            WITHIN_TEXT,
            scale="ratio",
        ),
    ),
    protocol=(
        f"random networks of width {WIDTH} and depth {DEPTH}, white inputs, random gradients at "
        "the output; the mean ratio of squared norms through a layer, at B = 4 its mean over the "
        "radius of each feature by formula; without norm as control. Orthogonal weights: linear "
        f"networks with {NARROW.width} features, batches of {NARROW.batch_size} and "
        f"{NARROW.depth} layers, and with {WIDE.width}, {WIDE.batch_size} and {WIDE.depth}"
    ),
    limits=(
        "At initialization, and of gradients at activations. The growth is a mean: at B = 4 few "
        "features dominate it, and what a network typically shows is less."
    ),
    run=run,
    draw=draw,
    easy="All growth factors: they are those of the theory at every batch size.",
    hard=(
        "At B = 4 the squared gradient has no variance, and its mean needs the radius of the "
        "features integrated out. Orthogonal weights help only where a batch has more examples "
        "than a layer has features."
    ),
)
