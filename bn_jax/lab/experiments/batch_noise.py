"""Claim 12: a batch's mean and standard deviation are noise, the less the larger the batch."""

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
from bn_jax.lab.experiments.sweeps import (
    Part,
    cross_entropy,
    draw_batches,
    load_digits,
    loss_of,
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
# The variance of the batch mean is exact at every size. That of the standard deviation is the
# first term of a series in 1 / M: of normal values 9 % too large at M = 4, 4 % at 8, 2 % at 16.
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
    """What batches of some sizes add, each [sizes]; with runs, [sizes, seeds].

    Attributes:
        mean: the variance of the batch's mean over its formula, a mean over features.
        deviation: that of the batch's standard deviation.
        gap: the loss by the batch's statistics minus that by the population's.
    """

    mean: Any
    deviation: Any
    gap: Any


def measure(setting: Setting) -> dict[str, Noise]:
    """Draws batches with replacement for networks that stay as they are.

    The population is the training part. By its own statistics it is the same for every batch size,
    and values drawn from it with replacement are independent.

    Args:
        setting: the seeds.

    Returns:
        The noise in a random and in a trained network.
    """
    digits = load_digits(setting.chosen)
    sizes = _sizes(setting)
    examples = 2**16 if setting.quick else 2**18
    found = {}
    for name, variables in networks(setting).items():
        setting.advance(0.1)
        runs = []
        for at, seed in enumerate(setting.chosen):
            one, part = jax.tree.map(lambda leaf, at=at: leaf[at], (variables, digits.train))
            runs.append(_noise(sizes, examples, one, part, seed))
        setting.advance(0.4)
        found[name] = jax.tree.map(lambda *ones: np.stack(ones, -1).astype(np.float64), *runs)
    return found


def _sizes(setting: Setting) -> tuple[int, ...]:
    return SIZES[::2] if setting.quick else SIZES


def networks(setting: Setting) -> dict[str, Any]:
    """Returns variables of a random and of a trained network, with the population's statistics.

    Args:
        setting: the seeds.

    Returns:
        Of each network its variables, with a leading axis [seeds].
    """
    digits = load_digits(setting.chosen)
    rows = draw_batches(setting.chosen, digits.train.x.shape[1], STEPS, BATCH_SIZE)
    model = MODELS[None]

    def prepare(seed: jax.Array, part: Part, rows: jax.Array) -> dict[str, Any]:
        variables = model.init(jax.random.key(seed), part.x[:1], train=False)
        trained = train(model, optax.sgd(LEARNING_RATE), variables, part, rows).variables
        whole = jnp.asarray(part.x), jnp.asarray(part.y)
        # One batch of all of it: every norm has the population's statistics.
        return {
            name: loss_of(model, one, *whole)[1]
            for name, one in (("random", variables), ("trained", trained))
        }

    found: dict[str, Any] = jax.jit(jax.vmap(prepare))(setting.chosen, digits.train, rows)
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _noise(
    sizes: tuple[int, ...], examples: int, variables: Any, part: Part, seed: jax.Array
) -> Noise:
    """Compares the noise of batches with the formulas.

    Args:
        sizes: of the batches.
        examples: how many are drawn; the same ones make the batches of all sizes.
        variables: of a network, with the population's statistics.
        part: the population.
        seed: of the batches.
    """
    x, y = map(jnp.asarray, part)
    _, sown = MODELS[None].apply(variables, x, train=False, mutable=["intermediates"])
    # Affine functions of what the norms take, which changes neither ratio.
    population = jnp.concatenate(
        [sown["intermediates"]["preactivation"][layer] for layer in range(len(WIDTHS))], -1
    )
    rows = jax.random.randint(jax.random.key(seed), (examples,), 0, len(x))
    values = population[rows]
    # The gap needs fewer: with and without noise, it is taken on the same examples.
    x, y = x[rows[: examples // 4]], y[rows[: examples // 4]]
    logits: Any = MODELS[None].apply(variables, x, train=False)
    quiet = cross_entropy(logits, y)

    def of_size(size: int) -> Noise:
        found = moments(values.reshape(-1, size, values.shape[-1]), 1)
        of_mean, of_deviation = expected_variances(population, size)
        return Noise(
            jnp.mean(jnp.var(found.mean, 0) / of_mean),
            jnp.mean(jnp.var(jnp.sqrt(found.var), 0) / of_deviation),
            loss_of(MODELS[size], variables, x, y)[0] - quiet,
        )

    return Noise(*(jnp.stack(ones) for ones in zip(*map(of_size, sizes), strict=True)))


def expected_variances(population: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Computes the variances of the mean and of the standard deviation of a batch.

    ``var / M`` and, to the first order in ``1 / M``, ``(kurtosis + 2) var / (4 M)``.

    Args:
        population: all values, [n, features].
        size: M, how many of them are drawn with replacement.

    Returns:
        Both variances, [features].
    """
    _, mean, var = moments(population, 0)
    kurtosis = jnp.mean((population - mean[None]) ** 4, 0) / var**2 - 3
    return var / size, (kurtosis + 2) * var / (4 * size)


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
    """Returns the interval, of those of all sizes, whose estimate is the farthest from 1."""
    return max((mean_interval(one) for one in ratios), key=lambda one: abs(one.estimate - 1))


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    found = measure(setting)
    sizes = np.asarray(_sizes(setting))
    asymptotic = sizes >= FIRST_ORDER_FROM
    criteria = []
    for name, of in found.items():
        worst_mean = _farthest(of.mean)
        worst_deviation = _farthest(of.deviation[asymptotic])
        formula = "(kurtosis + 2) s^2 / 4M"
        criteria += [
            Criterion(
                f"Var(m_B) over s^2 / M, {name} net, farthest from 1 of all M",
                "1",
                worst_mean,
                0.95,
                1.05,
            ),
            Criterion(
                f"Var(s_B) over {formula}, {name} net, farthest from 1 of M >= {FIRST_ORDER_FROM}",
                "1",
                worst_deviation,
                0.95,
                1.05,
            ),
        ]
    gaps = found["trained"].gap
    criteria.append(
        Criterion(
            "exponent of M in the loss by batch statistics minus that by the population's",
            "-1",
            mean_interval(slope(sizes, gaps)),
            -1.2,
            -0.8,
        )
    )
    return Result(
        criteria=tuple(criteria),
        curves={"sizes": sizes, **{name: of._asdict() for name, of in found.items()}},
        reported={
            **{
                f"Var(s_B) over the formula, {name} net, M = {size}": mean_interval(ratios)
                for name, of in found.items()
                for size, ratios in zip(sizes, of.deviation, strict=True)
            },
            **{
                f"exponent of the loss gap from M = {first} on": mean_interval(
                    slope(sizes[sizes >= first], gaps[sizes >= first])
                )
                for first in (FIRST_ORDER_FROM, sizes[-2])
            },
            f"M times the loss gap, M = {sizes[-1]}": mean_interval(sizes[-1] * gaps[-1]),
        },
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the ratios to the formulas and the loss gap by batch size."""
    ratios, gaps = figure.subplots(1, 2)
    sizes = np.asarray(curves["sizes"])
    for name, line in (("trained", "-"), ("random", "--")):
        for color, what in enumerate(("mean", "deviation")):
            label, values = f"batch {what}, {name} net", curves[name][what]
            band(ratios, sizes, values, label, color=f"C{color}", linestyle=line, marker=".")
    ratios.axhspan(0.95, 1.05, color="gray", alpha=0.15, linewidth=0, label="within 5 %")
    ratios.axhline(1, color="gray", linestyle=":")
    band(gaps, sizes, curves["trained"]["gap"], "trained net", marker=".")
    start = np.mean(curves["trained"]["gap"][-1])
    gaps.plot(sizes, start * sizes[-1] / sizes, color="gray", linestyle=":", label="1 / M")
    for axes in (ratios, gaps):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("examples per batch, M")
        axes.legend(frameon=False)
    ratios.set_ylabel("variance over its formula")
    gaps.set_yscale("log")
    gaps.set_ylabel("loss by batch minus by population (nats)")


EXPERIMENT = Experiment(
    number=12,
    name="batch_noise",
    claim="Batch statistics are noise of a known size, which regularizes by an amount in 1 / M",
    source="Luo et al. 2018; Teye et al. 2018",
    published="Var(m_B) = s^2 / M; Var(s_B) = (kurtosis + 2) s^2 / 4M; the regularizer in 1 / M",
    protocol=(
        "MLP 64-64-64-10, as initialized and after 200 steps on digits, then frozen; batches of "
        "M = 4 to 128 drawn with replacement; ratios are means over 128 inputs of units"
    ),
    limits=(
        "The loss gap shows that there is noise, not that it helps to generalize. The formula for "
        f"s_B is of first order in 1 / M and is held to its bound from M = {FIRST_ORDER_FROM} on; "
        "the ratios at smaller M are reported. Batches without replacement have less noise."
    ),
    run=run,
    draw=draw,
)
