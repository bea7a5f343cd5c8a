"""Claim 17: behind batch norm, the length of weights and their direction decouple."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bn_jax as bn
from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Interval,
    Result,
    Setting,
    exact,
    mean_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEATURES = 16
EXAMPLES = 256
CONDITIONS = 10, 100, 1000
NOISE = 0.1
# As good as none: added to a variance, it changes none of its digits.
EPSILON = 1e-300
# Further down, a distance consists of rounding.
FLOOR = 1e-16
IDENTITY = 1e-10


class Problem(NamedTuple):
    """Least squares: centred inputs [n, features], targets [n], the solution, its prediction."""

    x: Any
    y: Any
    best: Any


def make_problem(seed: int, condition: float) -> Problem:
    """Draws inputs whose covariance has the eigenvalues from `1 / condition` to 1, exactly.

    Args:
        seed: of inputs, targets and directions.
        condition: the largest eigenvalue over the smallest; between them in equal ratios.

    Returns:
        The problem, with the prediction of its solution, [n].
    """
    generator = np.random.default_rng([17, seed])
    x = generator.standard_normal((EXAMPLES, FEATURES))
    white = np.linalg.svd(x - x.mean(0), full_matrices=False)[0] * np.sqrt(EXAMPLES)
    rotation = np.linalg.qr(generator.standard_normal((FEATURES, FEATURES)))[0]
    x = white * np.sqrt(np.geomspace(1 / condition, 1, FEATURES)) @ rotation.T
    y = x @ generator.standard_normal(FEATURES) + NOISE * generator.standard_normal(EXAMPLES)
    y -= y.mean()
    return Problem(x, y, x @ np.linalg.lstsq(x, y)[0])


def normalized(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Returns what a linear unit gives after batch norm over all examples, [n]."""
    statistics = bn.init_batch_stats(1, dtype=x.dtype)
    z = (x @ weights)[:, None]
    return bn.batch_norm({}, statistics, z, use_running_average=False, epsilon=EPSILON)[0][:, 0]


def loss(weights: jax.Array, scale: Any, problem: Problem) -> jax.Array:
    """Returns half the mean square error of the unit with a scale."""
    return jnp.mean((scale * normalized(weights, problem.x) - problem.y) ** 2) / 2


def closed_form(weights: Any, scale: Any, problem: Problem) -> Any:
    """Returns the gradient of `loss` by the weights.

    With ``S = E[x x^T]``, ``u = E[x y]`` and ``s^2 = w^T S w``, it is
    ``scale / s (S w <u, w> / s^2 - u)``: what a linear unit's gradient has along the weights is
    missing, and with it the scale.
    """
    covariance = problem.x.T @ problem.x / EXAMPLES
    with_target = problem.x.T @ problem.y / EXAMPLES
    along = covariance @ weights
    variance = weights @ along
    along = along * (with_target @ weights) / variance
    return scale / jnp.sqrt(variance) * (along - with_target)


def descend(weights: jax.Array, problem: Problem, steps: int) -> dict[str, jax.Array]:
    """Descends with and without batch norm.

    With it, the scale is the best one for the weights, as the paper has it, and the learning rate
    ``w^T S w / (2 l_max |rho|)``, where ``rho``, the loss less its value at zero, is
    ``-scale^2 / 2``. The least squares themselves are descended with `1 / l_max`, that is 1.

    Args:
        weights: to start from, [features].
        problem: the data.
        steps: how many.

    Returns:
        The loss less its minimum before every step, [steps + 1], of both.
    """

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        direction, plain = carry
        unit = normalized(direction, problem.x)
        scale = jnp.mean(unit * problem.y)
        gradient = jax.grad(loss)(direction, scale, problem)
        rate = jnp.mean((problem.x @ direction) ** 2) / scale**2
        predicted = problem.x @ plain
        of_plain = problem.x.T @ (predicted - problem.y) / EXAMPLES
        # The residual of the solution is orthogonal to the inputs: no cancellation.
        distances = {
            "batch norm": jnp.mean((scale * unit - problem.best) ** 2) / 2,
            "no norm": jnp.mean((predicted - problem.best) ** 2) / 2,
        }
        return (direction - rate * gradient, plain - of_plain), distances

    return jax.lax.scan(step, (weights, weights), None, length=steps + 1)[1]


def errors(weights: jax.Array, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Compares the gradient with its closed form, and its direction with that of the weights.

    Args:
        weights: [features].
        problem: the data.

    Returns:
        The relative error, and the cosine between gradient and weights, for a scale of 1.
    """
    found, expected = jax.grad(loss)(weights, 1.0, problem), closed_form(weights, 1.0, problem)
    norm = jnp.linalg.norm
    return (
        norm(found - expected) / norm(expected),
        jnp.abs(found @ weights) / (norm(found) * norm(weights)),
    )


def contractions(distances: Any) -> Any:
    """Returns by what each step multiplies the distance, NaN where that is rounding.

    Args:
        distances: [..., steps + 1].

    Returns:
        [..., steps].
    """
    measurable = distances[..., 1:] > FLOOR * distances[..., :1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(measurable, distances[..., 1:] / distances[..., :-1], np.nan)


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    steps = 200 if setting.quick else 1000
    problems = [[make_problem(seed, one) for seed in setting.chosen] for one in CONDITIONS]
    weights = np.stack(
        [np.random.default_rng([18, seed]).standard_normal(FEATURES) for seed in setting.chosen]
    )

    def both(weights: jax.Array, problem: Problem) -> Any:
        return descend(weights, problem, steps), errors(weights, problem)

    with jax.enable_x64(True):
        stacked = jax.tree.map(
            lambda *leaves: np.stack(leaves).reshape(len(CONDITIONS), -1, *leaves[0].shape),
            *(problem for of_condition in problems for problem in of_condition),
        )
        program = jax.jit(jax.vmap(jax.vmap(both), (None, 0)))
        distances, found = jax.tree.map(np.asarray, program(weights, stacked))
    setting.advance(1)
    bound = (1 - 1 / np.array(CONDITIONS)) ** 2
    by_step = {arm: contractions(one) for arm, one in distances.items()}
    worst = np.nanmax(by_step["batch norm"], (1, 2)) / bound
    rates = {arm: -np.nanmean(np.log(one), -1) for arm, one in by_step.items()}
    return Result(
        criteria=(
            *(
                Criterion(
                    f"largest contraction of a step over the bound, condition {condition}",
                    f"{limit:.6g}",
                    exact(one),
                    at_most=1.0,
                )
                for condition, limit, one in zip(CONDITIONS, bound, worst, strict=True)
            ),
            Criterion(
                "gradient against its closed form",
                "equal",
                exact(found[0].max()),
                at_most=IDENTITY,
            ),
            Criterion(
                "cosine of gradient and weights", "0", exact(found[1].max()), at_most=IDENTITY
            ),
        ),
        curves={
            "distance": {
                str(condition): {
                    arm: (one[index] / one[index][:, :1]).T[:: steps // 100]
                    for arm, one in distances.items()
                }
                for index, condition in enumerate(CONDITIONS)
            },
            "steps": np.arange(steps + 1)[:: steps // 100],
        },
        reported=_reported(rates),
    )


def _reported(rates: Mapping[str, Any]) -> dict[str, Interval]:
    return {
        f"logarithmic progress of a step, with over without batch norm, condition {condition}": (
            mean_interval((rates["batch norm"] / rates["no norm"])[index])
        )
        for index, condition in enumerate(CONDITIONS)
    }


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the way to the minimum for every condition."""
    steps = np.asarray(curves["steps"])
    panels = figure.subplots(1, len(CONDITIONS))
    for axes, (condition, arms) in zip(panels, curves["distance"].items(), strict=True):
        for arm, runs in arms.items():
            band(axes, steps, np.log10(np.maximum(np.asarray(runs), FLOOR)), arm)
        bound = 2 * steps * np.log10(1 - 1 / float(condition))
        axes.plot(steps, np.maximum(bound, np.log10(FLOOR)), ":", color="gray", label="bound")
        axes.set(title=f"condition {condition}", xlabel="steps")
    panels[0].set_ylabel(r"$\log_{10}$ of loss less minimum, over its start")
    panels[0].legend(frameon=False)


EXPERIMENT = Experiment(
    number=17,
    name="decoupling",
    claim="Length and direction decouple, and least squares converge at a linear rate",
    source="Kohler et al. 2018",
    published="loss less minimum shrinks by (1 - l_min / l_max)^2 a step or more",
    protocol=(
        f"a linear unit of {FEATURES} features with batch norm over all {EXAMPLES} examples, "
        "condition 10 to 1000, float64; adaptive rate and best scale, as in the paper"
    ),
    limits=(
        "The rate needs the largest eigenvalue and the best scale in every step. What the bound "
        "promises, plain descent at 1 / l_max has too; the reported figures compare the two."
    ),
    run=run,
    draw=draw,
)
