"""Claim 6: inference needs the unbiased variance of the batches, m / (m - 1) times the biased."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from bn_jax._core.batch_norm import batch_norm
from bn_jax._core.running import init_batch_stats
from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Result,
    Setting,
    exact,
    mean_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = 2, 4, 8, 16, 32, 64
FEATURES = 64
MEAN, STD = 3.0, 2.0
# The arms, and what they subtract from the number of values.
DDOF = {"unbiased": 1, "biased": 0}


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


def standard_errors_off(ratios: Any, expected: Any) -> npt.NDArray[np.float64]:
    """Measures how far means are from their expected values.

    Args:
        ratios: independent values, [sizes, seeds, features].
        expected: their expected values, [sizes].

    Returns:
        The distance of each mean, in its standard errors, [sizes].
    """
    values = np.asarray(ratios, np.float64).reshape(len(ratios), -1)
    error = values.std(-1, ddof=1) / np.sqrt(values.shape[1])
    return np.abs(values.mean(-1) - expected) / error


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    ratios = running_variances(setting)
    setting.advance(1)
    sizes = np.asarray(_sizes(setting))
    expected = {arm: (sizes - 1 + ddof) / sizes for arm, ddof in DDOF.items()}
    return Result(
        criteria=tuple(
            Criterion(
                f"{arm}: mean running variance over the true one, largest distance from the "
                "formula over batch sizes (standard errors)",
                formula,
                exact(standard_errors_off(ratios[arm], expected[arm]).max()),
                at_most=3,
            )
            for arm, formula in (("unbiased", "1"), ("biased", "(m - 1) / m"))
        ),
        curves={
            "sizes": sizes,
            "ratio": {arm: values.mean(-1) for arm, values in ratios.items()},
            "formula": expected,
        },
        reported={
            f"{arm} running variance over the true one, m = {size}": mean_interval(runs.mean(-1))
            for arm, values in ratios.items()
            for size, runs in zip(sizes, values, strict=True)
            if size in (sizes[0], sizes[-1])
        },
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
    published="Var = m / (m - 1) E[s_B^2]; without the factor, (m - 1) / m of it",
    protocol=(
        "independent normal values, 64 features, batches of m = 2 to 64; cumulative averages of "
        "the same batches' variances with running_var_ddof 1 and 0"
    ),
    limits=(
        "Positions of one image are correlated: what comes out of a convolution has fewer "
        "independent values than m, and the factor corrects too little."
    ),
    run=run,
    draw=draw,
)
