"""Claim 12: a batch's mean and standard deviation are noise, smaller for larger batches."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax._core.moments import moments
from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import MLP
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.sweeps import (
    Part,
    Trial,
    cross_entropy,
    draw_trials,
    init_model,
    loss_of,
    take,
    train,
)
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Interval,
    Result,
    Setting,
    mean_interval,
)
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = 4, 8, 16, 32, 64, 128
# The formula for the variance of the batch mean is exact at every size. That for the standard
# deviation is the first term of a series in 1 / M. For normal values it is 9 % too large at M = 4,
# 4 % at 8 and 2 % at 16.
FIRST_ORDER_FROM = 16
WIDTHS = 64, 64
BATCH_SIZE = 64
STEPS = 200
LEARNING_RATE = 0.1
# With momentum 0, the running statistics are those of the last batch.
MODELS = {
    size: MLP(WIDTHS, norm=partial(BatchNorm, momentum=0.0, virtual_batch_size=size))
    for size in (None, *SIZES)
}


class Noise(NamedTuple):
    """The noise of batches of several sizes, each [sizes]; of many seeds, [sizes, seeds].

    Attributes:
        mean: the variance of the batch's mean over its formula, averaged over features.
        deviation: the same of the batch's standard deviation.
        gap: the loss with the batch's statistics minus that with the population's.
    """

    mean: Any
    deviation: Any
    gap: Any


def measure(setting: Setting) -> dict[str, Noise]:
    """Draws batches with replacement for networks that do not change.

    The population is the training part. Normalized by its own statistics it is the same for every
    batch size, and values drawn from it with replacement are independent.

    Args:
        setting: the seeds, and the size of the run.

    Returns:
        The noise in a random and in a trained network.
    """
    trials = draw_trials(setting.chosen, STEPS, BATCH_SIZE)
    examples = 2**16 if setting.quick else 2**18
    measured = {}
    for name, variables in prepare_networks(trials)._asdict().items():
        setting.advance(0.1)
        runs = [
            _noise(
                _sizes(setting),
                examples,
                take(variables, index),
                take(trials.digits.train, index),
                seed,
            )
            for index, seed in enumerate(setting.chosen)
        ]
        setting.advance(0.4)
        measured[name] = jax.tree.map(
            lambda *leaves: np.stack(leaves, -1).astype(np.float64), *runs
        )
    return measured


def _sizes(setting: Setting) -> tuple[int, ...]:
    return SIZES[::2] if setting.quick else SIZES


class Networks(NamedTuple):
    """The variables of a random and of a trained network."""

    random: Any
    trained: Any


def prepare_networks(trials: Trial) -> Networks:
    """Trains networks, and gives their norms the statistics of the population.

    Args:
        trials: the trials of all seeds.

    Returns:
        The variables, with a leading axis [seeds].
    """
    model = MODELS[None]

    def prepare(trial: Trial) -> Networks:
        part = trial.digits.train
        variables = init_model(model, trial)
        trained = train(model, optax.sgd(LEARNING_RATE), variables, part, trial.batches).variables
        x, y = jnp.asarray(part.x), jnp.asarray(part.y)
        # In one batch of all examples, every norm measures the statistics of the population.
        return Networks(*(loss_of(model, network, x, y)[1] for network in (variables, trained)))

    return map_runs(prepare, trials)


@partial(jax.jit, static_argnums=(0, 1))
def _noise(
    sizes: tuple[int, ...], examples: int, variables: Any, part: Part, seed: jax.Array
) -> Noise:
    """Compares the noise of batches with the formulas.

    Args:
        sizes: the sizes of the batches.
        examples: the number of examples to draw; the same examples make the batches of all sizes.
        variables: the variables of a network, with the population's statistics.
        part: the population.
        seed: the seed of the batches.
    """
    x, y = jnp.asarray(part.x), jnp.asarray(part.y)
    _, sown = MODELS[None].apply(variables, x, train=False, mutable=["intermediates"])
    # What is sown are the outputs of the norms, affine functions of their inputs. That changes
    # neither ratio.
    population = jnp.concatenate(
        [sown["intermediates"]["preactivation"][layer] for layer in range(len(WIDTHS))], -1
    )
    rows = jax.random.randint(jax.random.key(seed), (examples,), 0, len(x))
    values = population[rows]
    # The gap needs fewer examples, for both of its losses are of the same examples.
    x, y = x[rows[: examples // 4]], y[rows[: examples // 4]]
    logits: Any = MODELS[None].apply(variables, x, train=False)
    quiet = cross_entropy(logits, y)

    def of_size(size: int) -> Noise:
        of_batches = moments(values.reshape(-1, size, values.shape[-1]), 1)
        of_mean, of_deviation = expected_variances(population, size)
        return Noise(
            jnp.mean(jnp.var(of_batches.mean, 0) / of_mean),
            jnp.mean(jnp.var(jnp.sqrt(of_batches.var), 0) / of_deviation),
            loss_of(MODELS[size], variables, x, y)[0] - quiet,
        )

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(of_size, sizes))


def expected_variances(population: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Computes the variances of the mean and of the standard deviation of a batch.

    ``var / M`` and, to the first order in ``1 / M``, ``(kurtosis + 2) var / (4 M)``.

    Args:
        population: all values, [n, features].
        size: M, the number of values that are drawn with replacement.

    Returns:
        Both variances, [features].
    """
    whole = moments(population, 0)
    kurtosis = jnp.mean((population - whole.mean[None]) ** 4, 0) / whole.var**2 - 3
    return whole.var / size, (kurtosis + 2) * whole.var / (4 * size)


def slope(sizes: Any, gaps: Any) -> Any:
    """Fits a power law.

    Args:
        sizes: [sizes].
        gaps: positive, [sizes, seeds].

    Returns:
        The exponents, [seeds].
    """
    return np.polyfit(np.log(sizes), np.log(gaps), 1)[0]


def _farthest(ratios: Any) -> Interval:
    """Returns the interval whose estimate is the farthest from 1, of ratios [sizes, seeds]."""
    return max(map(mean_interval, ratios), key=lambda interval: abs(interval.estimate - 1))


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    measured = measure(setting)
    sizes = np.asarray(_sizes(setting))
    gaps = measured["trained"].gap
    return Result(
        criteria=(
            *(
                criterion
                for name, noise in measured.items()
                for criterion in _criteria(name, noise, sizes)
            ),
            Criterion(
                "exponent of M in the loss by batch statistics minus that by the population's",
                "-1",
                mean_interval(slope(sizes, gaps)),
                at_least=-1.2,
                at_most=-0.8,
            ),
        ),
        curves={"sizes": sizes, **{name: noise._asdict() for name, noise in measured.items()}},
        reported=_reported(measured, sizes),
    )


def _criteria(name: str, noise: Noise, sizes: Any) -> tuple[Criterion, Criterion]:
    """Compares the noise in a network with the formulas.

    Args:
        name: the name of the network.
        noise: the noise for all sizes and seeds.
        sizes: the sizes of the batches.
    """
    formula = "(kurtosis + 2) s^2 / 4M"
    return (
        Criterion(
            f"Var(m_B) over s^2 / M, {name} net, farthest from 1 of all M",
            "1",
            _farthest(noise.mean),
            at_least=0.95,
            at_most=1.05,
        ),
        Criterion(
            f"Var(s_B) over {formula}, {name} net, farthest from 1 of M >= {FIRST_ORDER_FROM}",
            "1",
            _farthest(noise.deviation[sizes >= FIRST_ORDER_FROM]),
            at_least=0.95,
            at_most=1.05,
        ),
    )


def _reported(measured: Mapping[str, Noise], sizes: Any) -> dict[str, Interval]:
    gaps = measured["trained"].gap
    return {
        **{
            f"Var(s_B) over the formula, {name} net, M = {size}": mean_interval(ratios)
            for name, noise in measured.items()
            for size, ratios in zip(sizes, noise.deviation, strict=True)
        },
        **{
            f"exponent of the loss gap from M = {first} on": mean_interval(
                slope(sizes[sizes >= first], gaps[sizes >= first])
            )
            for first in (FIRST_ORDER_FROM, sizes[-2])
        },
        f"M times the loss gap, M = {sizes[-1]}": mean_interval(sizes[-1] * gaps[-1]),
    }


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the ratios to the formulas and the loss gap by batch size."""
    ratios, gaps = figure.subplots(1, 2)
    sizes = np.asarray(curves["sizes"])
    for name, line in (("trained", "-"), ("random", "--")):
        for color, what in (("C0", "mean"), ("C1", "deviation")):
            label, values = f"batch {what}, {name} net", curves[name][what]
            band(ratios, sizes, values, label, color=color, linestyle=line, marker=".")
    ratios.axhspan(0.95, 1.05, color="gray", alpha=0.15, linewidth=0, label="within 5 %")
    ratios.axhline(1, color="gray", linestyle=":")
    band(gaps, sizes, curves["trained"]["gap"], "trained net", marker=".")
    smallest = np.mean(curves["trained"]["gap"][-1])
    gaps.plot(sizes, smallest * sizes[-1] / sizes, color="gray", linestyle=":", label="1 / M")
    for axes in (ratios, gaps):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("examples per batch, M")
        axes.legend()
    ratios.set_ylabel("variance over its formula")
    gaps.set_yscale("log")
    gaps.set_ylabel("loss with the batch's statistics\nminus with the population's (nats)")


EXPERIMENT = Experiment(
    number=12,
    name="batch_noise",
    claim="Batch statistics are noise of a known size, which regularizes by an amount in 1 / M",
    source="Luo et al. 2018; Teye et al. 2018",
    published="Var(m_B) = s^2 / M; Var(s_B) = (kurtosis + 2) s^2 / 4M; the regularizer in 1 / M",
    protocol=(
        "MLP 64-64-64-10, as initialized and after 200 steps on digits, then frozen; batches of "
        "M = 4 to 128 drawn with replacement; ratios are means over the inputs of 128 units"
    ),
    limits=(
        "The loss gap shows that there is noise, not that it helps to generalize. The formula for "
        f"s_B is of first order in 1 / M and is held to its bound from M = {FIRST_ORDER_FROM} on; "
        "the ratios at smaller M are reported. Batches without replacement have less noise."
    ),
    run=run,
    draw=draw,
)
