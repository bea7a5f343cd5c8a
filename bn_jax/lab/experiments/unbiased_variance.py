"""Claim 6: inference needs the unbiased variance of the batches, m / (m - 1) times the biased."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax._core.batch_norm import batch_norm
from bn_jax._core.running import init_batch_stats
from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import MLP
from bn_jax.lab.experiments.selection import sweep_accuracies
from bn_jax.lab.experiments.sweeps import draw_trials
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
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = 2, 4, 8, 16, 32, 64
FEATURES = 64
MEAN, STD = 3.0, 2.0
WITHIN = 0.01
# The arms, and what they subtract from the number of values.
DDOF = {"unbiased": 1, "biased": 0}
# The networks that are trained, with batches so small that the factor is large.
SMALL = 2, 4, 8
WIDTHS = 64, 64
MOMENTUM = 0.99
RATES = 0.01, 0.03, 0.1


def running_variances(setting: Setting) -> dict[str, Any]:
    """Averages the variances of many batches of independent normal values.

    Args:
        setting: the seeds, and the size of the run.

    Returns:
        For each arm, the running variances over the true variance, [sizes, seeds, features].
    """
    batches = 500 if setting.quick else 2000
    averages = [_average(setting.chosen, size, batches) for size in _sizes(setting)]
    return {
        arm: np.stack([np.asarray(of_size[arm], np.float64) for of_size in averages]) / STD**2
        for arm in DDOF
    }


def _sizes(setting: Setting) -> tuple[int, ...]:
    return SIZES[::2] if setting.quick else SIZES


@partial(jax.jit, static_argnums=(1, 2))
def _average(seeds: jax.Array, size: int, batches: int) -> dict[str, jax.Array]:
    """Returns each arm's running variance after batches of one size, all of equal weight."""
    features = len(seeds), FEATURES
    start = {arm: init_batch_stats(features, use_count=True) for arm in DDOF}

    def draw_features(seed: jax.Array, batch: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), size), batch)
        return MEAN + STD * jax.random.normal(key, (size, FEATURES))

    def update(batch_stats: Any, batch: jax.Array) -> tuple[Any, None]:
        x = jax.vmap(draw_features, (0, None), 1)(seeds, batch)

        def update_arm(arm: str, ddof: int) -> Any:
            _, updated = batch_norm(
                {},
                batch_stats[arm],
                x,
                use_running_average=False,
                axis=(1, 2),
                momentum=None,
                running_var_ddof=ddof,
            )
            return updated

        return {arm: update_arm(arm, ddof) for arm, ddof in DDOF.items()}, None

    batch_stats, _ = jax.lax.scan(update, start, jnp.arange(batches))
    return {arm: of_arm["var"] for arm, of_arm in batch_stats.items()}


def train_each(setting: Setting) -> dict[int, dict[str, Any]]:
    """Trains with small batches, and tests with either running variance.

    Training does not read the running variance, so both arms have the same weights.

    Args:
        setting: the seeds, and the size of the run.

    Returns:
        By batch size and arm, the test accuracies at the rate that is best for all seeds, [seeds].
    """
    steps = 100 if setting.quick else 600
    accuracies: dict[int, dict[str, Any]] = {}
    for size in SMALL:
        trials = draw_trials(setting.chosen, steps, size)
        swept = {}
        for arm, ddof in DDOF.items():
            norm = partial(BatchNorm, momentum=MOMENTUM, running_var_ddof=ddof)
            swept[arm] = sweep_accuracies(MLP(WIDTHS, norm=norm), optax.sgd, RATES, trials)
            setting.advance(0.8 / len(SMALL) / len(DDOF))
        best = int(swept["unbiased"].validation.mean(1).argmax())
        accuracies[size] = {arm: of_arm.measured[best] for arm, of_arm in swept.items()}
    return accuracies


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    ratios = running_variances(setting)
    setting.advance(0.2)
    accuracies = train_each(setting)
    sizes = np.asarray(_sizes(setting))
    expected = {arm: (sizes - 1 + ddof) / sizes for arm, ddof in DDOF.items()}
    means = {
        arm: dict(zip((f"m = {size}" for size in sizes), values.mean(-1), strict=True))
        for arm, values in ratios.items()
    }
    return Result(
        values={
            "6a": means["unbiased"],
            "6b": {
                name: values * size / (size - 1)
                for (name, values), size in zip(means["biased"].items(), sizes, strict=True)
            },
            "6c": {
                f"m = {size}": 100 * (of_size["unbiased"] - of_size["biased"])
                for size, of_size in accuracies.items()
            },
        },
        curves={
            "sizes": sizes,
            "ratio": {arm: values.mean(-1) for arm, values in ratios.items()},
            "formula": expected,
        },
        series=[
            Series("6c", arm, f"m = {size}", 100 * values)
            for size, of_size in accuracies.items()
            for arm, values in of_size.items()
        ],
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the ratio by batch size, and its distance from the formula."""
    by_size, distance = figure.subplots(1, 2)
    sizes = np.asarray(curves["sizes"])
    for arm, ratios in curves["ratio"].items():
        band(by_size, sizes, ratios, arm, marker="o", linestyle="none")
        by_size.plot(sizes, curves["formula"][arm], color="gray", linestyle=":")
    by_size.plot([], [], color="gray", linestyle=":", label="formula")
    # Both arms have the same batches, and the same distance relative to their formulas.
    formula = np.asarray(curves["formula"]["biased"])[:, None]
    relative = 100 * (np.asarray(curves["ratio"]["biased"]) / formula - 1)
    band(distance, sizes, relative, "either arm", marker="o")
    distance.axhline(0, color="gray", linestyle=":")
    for axes in (by_size, distance):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("values per batch and feature, m")
        axes.legend()
    by_size.set_ylabel("mean running variance over the true variance")
    distance.set_ylabel("distance from the formula (%)")


EXPERIMENT = Experiment(
    number=6,
    name="unbiased_variance",
    claim="Inference needs m / (m - 1) times the mean of the batches' biased variances",
    source="Ioffe & Szegedy 2015, Algorithm 2",
    sub_claims=(
        SubClaim(
            "6a",
            "with m / (m - 1)",
            "the mean of m / (m - 1) s_B^2 over batches is the variance",
            "mean running variance with the factor, over the true variance",
            Within(1 - WITHIN, 1 + WITHIN),
            Published("Var = m / (m - 1) E[s_B^2]", "V"),
            f"ours: {100 * WITHIN:g} %",
            scale="ratio",
        ),
        SubClaim(
            "6b",
            "without the factor",
            "without the factor, the running variance is (m - 1) / m of the variance",
            "mean running variance without the factor, over (m - 1) / m of the true variance",
            Within(1 - WITHIN, 1 + WITHIN),
            Published("(m - 1) / m", "D"),
            f"ours: {100 * WITHIN:g} %",
            scale="ratio",
        ),
        SubClaim(
            "6c",
            "it matters at m = 2 to 8",
            "a network that is trained with small batches is more accurate with the factor",
            "test accuracy with the factor minus without (points)",
            Above(0.0),
            is_resplit=True,
        ),
    ),
    protocol=(
        "independent normal values, 64 features, batches of m = 2 to 64; cumulative averages of "
        "the same batches' variances with running_var_ddof 1 and 0; MLP 64-64-64-10 on digits, 600 "
        "steps with batches of 2 to 8, tested with both"
    ),
    limits=(
        "Positions of one image are correlated: what comes out of a convolution has fewer "
        "independent values than m, and the factor corrects too little."
    ),
    run=run,
    draw=draw,
    easy="The factor itself.",
    hard="That it matters can be seen only where batches are too small to be used.",
)
