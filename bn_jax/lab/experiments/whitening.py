"""Claim 11: whitening needs no eigendecomposition; a few Newton iterations are enough."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bn_jax as bn
from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import BATCH_NORM, MLP
from bn_jax.lab.experiments.selection import Chosen, sweep_accuracies
from bn_jax.lab.experiments.sweeps import draw_trials, load_digits
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Interval,
    Result,
    Setting,
    exact,
    mean_interval,
)
from bn_jax.lab.models import Norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEATURES = 32
ITERATIONS = 16
PUBLISHED_ITERATIONS = 5
EPSILON = 1e-8
CLOSE = 1e-3
WIDTH = 32
BATCH_SIZE = 256
RATES = 0.03, 0.1, 0.3
NORMS: dict[str, Norm] = {
    "whitening": partial(bn.linen.WhiteningNorm, momentum=0.9),
    "batch norm": BATCH_NORM,
}


def choose_features(images: Any) -> Any:
    """Returns the 32 pixels that vary most, [n, 32]."""
    return images[:, np.sort(np.argsort(images.var(0))[-FEATURES:])]


def distance(covariance: jax.Array) -> jax.Array:
    """Returns the root mean square distance of the eigenvalues from 1."""
    size = covariance.shape[-1]
    return jnp.linalg.norm(covariance - jnp.eye(size)) / size**0.5


def _covariance(x: jax.Array) -> jax.Array:
    centred = x - x.mean(0)
    return jnp.matmul(centred.T, centred, precision="highest") / len(x)


def coupled(x: jax.Array, iterations: int) -> jax.Array:
    """Measures how far from white the output of `bn_jax.whitening_norm` is.

    Args:
        x: [n, features].
        iterations: the number of iterations of Newton's method.

    Returns:
        The `distance`, a scalar.
    """
    batch_stats = bn.init_whitening_stats(FEATURES)
    y, _ = bn.whitening_norm(
        bn.init_params(FEATURES),
        batch_stats,
        x,
        use_running_average=False,
        epsilon=EPSILON,
        iterations=iterations,
    )
    return distance(_covariance(y))


def uncoupled(x: jax.Array) -> jax.Array:
    """Follows the papers' iteration, ``Z <- (3 Z - Z^3 A) / 2`` with A of trace 1.

    Args:
        x: [n, features].

    Returns:
        The distance after each of `ITERATIONS` iterations, [16].
    """
    covariance = _covariance(x) + EPSILON * jnp.eye(FEATURES)
    trace = jnp.trace(covariance)
    multiply = partial(jnp.matmul, precision="highest")

    def step(root: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        cube = multiply(multiply(root, root), root)
        root = (3 * root - multiply(cube, covariance / trace)) / 2
        white = multiply(x - x.mean(0), root) / jnp.sqrt(trace)
        return root, distance(_covariance(white))

    return jax.lax.scan(step, jnp.eye(FEATURES), None, length=ITERATIONS)[1]


def train_each(setting: Setting, steps: int) -> dict[str, Chosen[Any]]:
    """Trains one hidden layer with each norm and rate.

    Args:
        setting: the seeds, and the size of the run.
        steps: the number of steps of each training.

    Returns:
        For each norm the test accuracy at the best rate of each seed, [seeds].
    """
    trials = draw_trials(setting.chosen, steps, BATCH_SIZE)
    chosen = {}
    for arm, norm in NORMS.items():
        swept = sweep_accuracies(MLP((WIDTH,), norm=norm), optax.sgd, RATES, trials)
        chosen[arm] = swept.best_for_each_seed()
        setting.advance(0.3)
    return chosen


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    digits = load_digits(setting.chosen)
    x = jnp.asarray(np.stack([choose_features(images) for images in digits.train.x]))
    counts = np.arange(1, ITERATIONS + 1)
    by_count = jax.vmap(lambda x: jnp.stack([coupled(x, n) for n in counts.tolist()]), out_axes=1)
    ours = np.asarray(jax.jit(by_count)(x))
    papers = np.asarray(jax.jit(jax.vmap(uncoupled))(x)).T
    setting.advance(0.4)
    # At smaller distances, rounding decides whether they fall.
    falling = np.where(ours[:-1] > CLOSE, ours[1:] / ours[:-1], 0)
    trained = train_each(setting, 60 if setting.quick else 150)
    gained = trained["whitening"].measured - trained["batch norm"].measured
    return Result(
        criteria=(
            Criterion(
                f"largest ratio of distances after T + 1 and T iterations, above {CLOSE:g}",
                "falls",
                exact(falling.max()),
                at_most=1.0,
            ),
            Criterion(
                f"distance of the covariance from the identity after {ITERATIONS} iterations",
                f"T = {PUBLISHED_ITERATIONS} is enough",
                Interval(float(ours[-1].mean()), float(ours[-1].min()), float(ours[-1].max())),
                at_most=CLOSE,
            ),
        ),
        curves={"iterations": counts, "coupled": ours, "uncoupled": papers},
        reported={
            f"distance after {PUBLISHED_ITERATIONS} iterations": mean_interval(
                ours[PUBLISHED_ITERATIONS - 1]
            ),
            "iterations after which the uncoupled iteration is nearest": mean_interval(
                counts[np.nanargmin(papers, 0)]
            ),
            "test accuracy, whitening minus batch norm (points)": mean_interval(100 * gained),
        },
        rates={arm: of_arm.rate for arm, of_arm in trained.items()},
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the distance by the number of iterations."""
    axes = figure.subplots()
    band(axes, curves["iterations"], curves["coupled"], "coupled iteration, float32")
    runs = np.asarray(curves["uncoupled"], np.float64)
    axes.plot(
        curves["iterations"], np.median(runs, 1), label="uncoupled iteration, float32 (median)"
    )
    axes.axhline(CLOSE, color="gray", linestyle=":", label="criterion")
    axes.axvline(PUBLISHED_ITERATIONS, color="gray", linewidth=0.8, label="published T")
    axes.set(
        yscale="log",
        ylim=(1e-5, 1e2),
        xlabel="iterations T",
        ylabel="distance of the covariance from the identity",
    )
    axes.legend()


EXPERIMENT = Experiment(
    number=11,
    name="whitening",
    claim="Newton iterations whiten as an eigendecomposition does",
    source="Desjardins et al. 2015; Huang et al. 2018, 2019 (IterNorm)",
    published="T = 5 iterations (reported)",
    protocol=(
        "the 32 pixels of digits that vary most, 1259 examples, float32; T = 1 to 16, beside the "
        "papers' uncoupled iteration; one hidden layer trained with either norm"
    ),
    limits="One layer of fixed data: what whitening is worth in a deep network is not tested.",
    run=run,
    draw=draw,
)
