"""Claim 27: batch norm makes the representations of a batch orthogonal; without it, they align."""

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.gradient_explosion import ACTIVATIONS
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

# Cosines between examples whose inputs are almost parallel, in linear networks.
WIDTHS = 64, 256, 1024
EXAMPLES, DEPTH = 32, 16
PARALLEL = 0.9
EXPONENT, WITHIN_EXPONENT = -0.5, 0.1
HALVED = PARALLEL / 2
# The effective rank of a batch as large as the width; its growth with the width.
WIDTH, DEEP = 64, 64
RANK_WIDTHS = 16, WIDTH, 256
ORDER = 0.5
COLLAPSED = 2.0


def forward(seed: jax.Array, x: jax.Array, depth: int, activation: str, *, normalize: bool) -> Any:
    """Returns the representations of a batch in a random network.

    Args:
        seed: of the weights.
        x: the input [n, width].
        depth: the number of layers.
        activation: a name in `gradient_explosion.ACTIVATIONS`.
        normalize: whether a batch norm is behind each matrix; if not, weights keep second moments.

    Returns:
        What follows the norms, or the matrices, [depth, n, width]. The activation is before the
        next matrix.
    """
    width = x.shape[-1]
    function, gain = ACTIVATIONS[activation]

    def layer(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jax.random.normal(key, (width, width)) * (gain / math.sqrt(width))
        x = x @ weights
        if normalize:
            x = normalize_batch(x)
        return function(x), x

    return jax.lax.scan(layer, x, jax.random.split(jax.random.key(seed), depth))[1]


def mean_cosine(x: jax.Array, *, centred: bool) -> jax.Array:
    """Returns the mean absolute cosine between different examples of [..., n, width].

    Args:
        x: the examples.
        centred: whether they add up to zero. Then the mean cosine of examples that are otherwise
            independent is ``-1 / (n - 1)``, which is subtracted.
    """
    size = x.shape[-2]
    unit = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    cosines = unit @ jnp.swapaxes(unit, -1, -2) + (1 / (size - 1) if centred else 0)
    cosines = jnp.abs(cosines)
    of_others = jnp.sum(cosines, (-1, -2)) - jnp.trace(cosines, axis1=-2, axis2=-1)
    return of_others / (size * (size - 1))


def effective_rank(x: jax.Array) -> jax.Array:
    """Returns the effective rank of the Gram matrix `M` of [..., n, width].

    ``tr(M)^2 / |M|^2``: `r` for `r` equal eigenvalues, at most the rank.
    """
    gram = x @ jnp.swapaxes(x, -1, -2)
    # The trace first: squares of large activations could overflow.
    gram = gram / jnp.trace(gram, axis1=-1, axis2=-2)[..., None, None]
    return 1 / jnp.sum(gram**2, (-1, -2))


@partial(jax.jit, static_argnums=1)
def measure_cosines(seed: jax.Array, width: int) -> jax.Array:
    """Measures cosines in a linear network with batch norm, of the input and all layers.

    Returns:
        [depth + 1].
    """
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), width))
    common = jax.random.normal(keys[0], (1, width))
    own = jax.random.normal(keys[1], (EXAMPLES, width))
    x = math.sqrt(PARALLEL) * common + math.sqrt(1 - PARALLEL) * own
    layers = forward(seed, x, DEPTH, "linear", normalize=True)
    first = mean_cosine(x, centred=False)
    return jnp.concatenate([first[None], mean_cosine(layers, centred=True)])


@jax.jit
def measure_ranks(seed: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Measures effective ranks of batches of `WIDTH` examples, from orthogonal inputs on.

    Returns:
        By activation, without and with batch norm, [depth + 1].
    """
    x = math.sqrt(WIDTH) * jnp.eye(WIDTH)

    def ranks(activation: str, normalize: bool) -> jax.Array:
        layers = forward(seed, x, DEEP, activation, normalize=normalize)
        return effective_rank(jnp.concatenate([x[None], layers]))

    return {
        name: {"no norm": ranks(name, False), "batch norm": ranks(name, True)}
        for name in ACTIVATIONS
    }


@partial(jax.jit, static_argnums=1)
def last_ranks(seed: jax.Array, width: int) -> jax.Array:
    """Measures the last effective rank of a batch of `width` examples with batch norm.

    Returns:
        [activations].
    """
    x = math.sqrt(width) * jnp.eye(width)
    last = [forward(seed, x, DEEP, name, normalize=True)[-1] for name in ACTIVATIONS]
    return effective_rank(jnp.stack(last))


def exponents(widths: tuple[int, ...], values: Any) -> Any:
    """Returns the power of the width that values [widths, seeds] grow with, [seeds]."""
    return np.polynomial.polynomial.polyfit(np.log(widths), np.log(values), 1)[1]


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    cosines = {
        width: np.stack([np.asarray(measure_cosines(s, width), np.float64) for s in setting.chosen])
        for width in WIDTHS
    }
    setting.advance(0.6)
    of_seeds = [jax.tree.map(np.float64, measure_ranks(seed)) for seed in setting.chosen]
    ranks: Any = jax.tree.map(lambda *leaves: np.stack(leaves), *of_seeds)
    at_end = {width: of_width[:, -1] for width, of_width in cosines.items()}
    by_width = np.array(
        [[np.asarray(last_ranks(s, width)) for s in setting.chosen] for width in RANK_WIDTHS],
        np.float64,
    )
    return Result(
        values={
            "27a": {f"width {width}": of_width for width, of_width in at_end.items()},
            "27b": exponents(WIDTHS, np.stack(list(at_end.values()))),
            "27c": {name: ranks[name]["no norm"][:, -1] for name in ACTIVATIONS},
            "27d": {
                name: exponents(RANK_WIDTHS, by_width[..., index])
                for index, name in enumerate(ACTIVATIONS)
            },
        },
        curves={
            "cosine": {str(width): of_width.T for width, of_width in cosines.items()},
            "rank": {
                f"{name}, {arm}": of_arm.T
                for name, by_arm in ranks.items()
                for arm, of_arm in by_arm.items()
            },
        },
        series=[
            Series("27d", name, f"rank at width {width}", by_width[place, :, index])
            for index, name in enumerate(ACTIVATIONS)
            for place, width in enumerate(RANK_WIDTHS)
        ],
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws cosines and effective ranks by layer."""
    cosine, rank = figure.subplots(1, 2)
    for width in WIDTHS:
        band(cosine, np.arange(DEPTH + 1), curves["cosine"][str(width)], f"width {width}")
    cosine.set(yscale="log", xlabel="layer", ylabel="mean |cos| between examples, linear")
    cosine.legend()
    for index, name in enumerate(ACTIVATIONS):
        for arm, line in (("batch norm", "-"), ("no norm", "--")):
            values, label = curves["rank"][f"{name}, {arm}"], f"{name}, {arm}"
            color = f"C{index}"
            band(rank, np.arange(DEEP + 1), values, label, linestyle=line, color=color)
    rank.axhline(math.sqrt(WIDTH), color="gray", linestyle=":", label="root of the width")
    rank.set(yscale="log", xlabel="layer", ylabel=f"effective rank of {WIDTH} examples")
    rank.legend(fontsize="small", loc="center right", bbox_to_anchor=(1, 0.74))


EXPERIMENT = Experiment(
    number=27,
    name="orthogonal_representations",
    claim="Batch norm makes representations orthogonal; without it, their rank collapses",
    source="Daneshmand et al. 2020, 2021",
    sub_claims=(
        SubClaim(
            "27a",
            "parallel inputs part",
            "in linear networks with batch norm, almost parallel inputs become almost orthogonal",
            f"mean absolute cosine between examples at depth {DEPTH}, less that of centring",
            Below(HALVED),
            reason="ours: half that of the inputs",
        ),
        SubClaim(
            "27b",
            "as 1 / sqrt(width)",
            "what is left of the cosine falls as 1 over the square root of the width",
            f"exponent over widths {WIDTHS[0]} to {WIDTHS[-1]}",
            Within(EXPONENT - WITHIN_EXPONENT, EXPONENT + WITHIN_EXPONENT),
            Published("-1/2", "R"),
            "ours: a tenth",
        ),
        SubClaim(
            "27c",
            "rank collapses without",
            "without norm, the rank of a batch collapses to one with depth",
            f"effective rank of {WIDTH} examples at depth {DEEP}, width {WIDTH}",
            Below(COLLAPSED),
            Published("1", "R"),
            f"ours: an effective rank below {COLLAPSED:g}",
            scale="ratio",
        ),
        SubClaim(
            "27d",
            "rank is kept with",
            "with batch norm, the rank grows at least as the square root of the width",
            f"exponent of the effective rank at depth {DEEP}, widths {RANK_WIDTHS[0]} to "
            f"{RANK_WIDTHS[-1]}, as many examples",
            Above(ORDER - WITHIN_EXPONENT),
            Published("at least 1/2", "R"),
            "ours: less a tenth",
        ),
    ),
    protocol=(
        f"random linear networks with batch norm, {EXAMPLES} examples with cosine {PARALLEL:g}, "
        f"widths 64, 256 and 1024; random linear and ReLU networks of width {WIDTH} and depth "
        f"{DEEP} with and without batch norm, {WIDTH} orthogonal inputs; with batch norm also "
        f"widths {RANK_WIDTHS[0]} and {RANK_WIDTHS[-1]}"
    ),
    limits=(
        "At initialization. The sources normalize without subtracting means; here the examples of "
        "a batch add up to zero, which alone makes cosines of -1 / (n - 1)."
    ),
    run=run,
    draw=draw,
    easy="Both directions: cosines fall and ranks are kept with a norm, and collapse without.",
    hard="A rank is not an accuracy: whether it matters for training is not asked here.",
)
