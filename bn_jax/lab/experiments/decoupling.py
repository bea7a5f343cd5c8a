"""Claim 17: before batch norm, the length of weights and their direction decouple."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import normalize_batch
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.statistics import Interval, mean_interval
from bn_jax.lab.experiments.verdicts import (
    Experiment,
    Identity,
    Published,
    Result,
    Setting,
    SubClaim,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEATURES = 16
EXAMPLES = 256
CONDITIONS = 10, 100, 1000
NOISE = 0.1
# A distance that is smaller relative to its start consists of rounding.
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
        seed: the seed of inputs, targets and directions.
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
    """Returns the output of a linear unit after batch norm over all examples, [n]."""
    return normalize_batch((x @ weights)[:, None])[:, 0]


def loss(weights: jax.Array, scale: Any, problem: Problem) -> jax.Array:
    """Returns half the mean square error of the normalized unit times a scale."""
    return jnp.mean((scale * normalized(weights, problem.x) - problem.y) ** 2) / 2


def closed_form(weights: Any, scale: Any, problem: Problem) -> Any:
    """Returns the gradient of `loss` by the weights.

    With ``S = E[x x^T]``, ``u = E[x y]`` and ``s^2 = w^T S w``, it is
    ``scale / s (S w <u, w> / s^2 - u)``. Unlike a linear unit's gradient, it has no part along the
    weights.
    """
    covariance = problem.x.T @ problem.x / EXAMPLES
    with_target = problem.x.T @ problem.y / EXAMPLES
    along = covariance @ weights
    variance = weights @ along
    along = along * (with_target @ weights) / variance
    return scale / jnp.sqrt(variance) * (along - with_target)


def descend(weights: jax.Array, problem: Problem, steps: int) -> dict[str, jax.Array]:
    """Descends with and without batch norm.

    With batch norm, as in the paper, the scale is the best for the weights, and the learning rate
    is ``w^T S w / (2 l_max |rho|)``, where ``rho``, the loss minus its value at zero, is
    ``-scale^2 / 2``. Without, the learning rate is ``1 / l_max``, that is 1.

    Args:
        weights: the initial weights, [features].
        problem: the data.
        steps: the number of steps.

    Returns:
        For both, the loss minus its minimum before every step, [steps + 1].
    """

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        direction, plain = carry
        unit = normalized(direction, problem.x)
        scale = jnp.mean(unit * problem.y)
        gradient = jax.grad(loss)(direction, scale, problem)
        rate = jnp.mean((problem.x @ direction) ** 2) / scale**2
        predicted = problem.x @ plain
        plain_gradient = problem.x.T @ (predicted - problem.y) / EXAMPLES
        # The residual of the solution is orthogonal to the inputs, so that the loss minus its
        # minimum is this mean square, without a subtraction that would cancel.
        distances = {
            "batch norm": jnp.mean((scale * unit - problem.best) ** 2) / 2,
            "no norm": jnp.mean((predicted - problem.best) ** 2) / 2,
        }
        return (direction - rate * gradient, plain - plain_gradient), distances

    return jax.lax.scan(step, (weights, weights), None, length=steps + 1)[1]


class Errors(NamedTuple):
    """Errors of the gradient for a scale of 1.

    Attributes:
        closed_form: the relative distance of the gradient from its closed form.
        cosine: the cosine of the angle between the gradient and the weights.
    """

    closed_form: Any
    cosine: Any


def errors(weights: jax.Array, problem: Problem) -> Errors:
    """Compares the gradient with its closed form, and its direction with that of the weights.

    Args:
        weights: [features].
        problem: the data.
    """
    gradient, expected = jax.grad(loss)(weights, 1.0, problem), closed_form(weights, 1.0, problem)
    norm = jnp.linalg.norm
    return Errors(
        norm(gradient - expected) / norm(expected),
        jnp.abs(gradient @ weights) / (norm(gradient) * norm(weights)),
    )


def contractions(distances: Any) -> Any:
    """Returns the factor of each step on the distance, not-a-number where it is rounding.

    Args:
        distances: [..., steps + 1].

    Returns:
        [..., steps].
    """
    measurable = distances[..., 1:] > FLOOR * distances[..., :1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(measurable, distances[..., 1:] / distances[..., :-1], np.nan)


def descend_all(setting: Setting, steps: int) -> tuple[dict[str, Any], Errors]:
    """Descends on problems of every condition and seed, in float64.

    Args:
        setting: the seeds, and the size of the run.
        steps: the number of steps of each descent.

    Returns:
        What `descend` and `errors` return, with leading axes [conditions, seeds].
    """
    problems = [
        [make_problem(seed, condition) for seed in setting.chosen] for condition in CONDITIONS
    ]
    shape = len(CONDITIONS), setting.seeds
    weights = np.stack(
        [np.random.default_rng([18, seed]).standard_normal(FEATURES) for seed in setting.chosen]
    )

    def both(weights: jax.Array, problem: Problem) -> tuple[dict[str, jax.Array], Errors]:
        return descend(weights, problem, steps), errors(weights, problem)

    with jax.enable_x64(True):
        stacked = jax.tree.map(
            lambda *leaves: np.stack(leaves),
            *(problem for of_condition in problems for problem in of_condition),
        )
        outcomes = map_runs(both, np.tile(weights, (len(CONDITIONS), 1)), stacked)
        return jax.tree.map(
            lambda leaf: np.asarray(leaf).reshape(*shape, *leaf.shape[1:]), outcomes
        )


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    steps = 200 if setting.quick else 1000
    distances, gradient_errors = descend_all(setting, steps)
    setting.advance(1)
    by_step = {arm: contractions(of_arm) for arm, of_arm in distances.items()}
    names = [f"condition {condition}" for condition in CONDITIONS]
    return Result(
        values={
            "17a": dict(zip(names, above_bound(by_step["batch norm"]), strict=True)),
            "17b": dict(zip(names, gradient_errors.closed_form, strict=True)),
            "17c": dict(zip(names, gradient_errors.cosine, strict=True)),
        },
        curves={
            "distance": {
                str(condition): {
                    arm: (of_arm[index] / of_arm[index][:, :1]).T[:: steps // 100]
                    for arm, of_arm in distances.items()
                }
                for index, condition in enumerate(CONDITIONS)
            },
            "steps": np.arange(steps + 1)[:: steps // 100],
        },
        reported=_reported(by_step),
    )


def above_bound(by_step: Any) -> Any:
    """Returns how far the slowest step is above the theorem's bound, relative to it.

    Args:
        by_step: contractions with batch norm, [conditions, seeds, steps].

    Returns:
        0 where every step is below the bound, [conditions, seeds].
    """
    bounds = (1 - 1 / np.array(CONDITIONS)) ** 2
    return np.maximum(np.nanmax(by_step, -1) / bounds[:, None] - 1, 0)


def _reported(by_step: Mapping[str, Any]) -> dict[str, Interval]:
    progress = {arm: -np.nanmean(np.log(of_arm), -1) for arm, of_arm in by_step.items()}
    ratios = progress["batch norm"] / progress["no norm"]
    return {
        f"logarithmic progress of a step, with over without batch norm, condition {condition}": (
            mean_interval(of_condition)
        )
        for condition, of_condition in zip(CONDITIONS, ratios, strict=True)
    }


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the descent to the minimum for every condition."""
    steps = np.asarray(curves["steps"])
    panels = figure.subplots(1, len(CONDITIONS))
    for axes, (condition, arms) in zip(panels, curves["distance"].items(), strict=True):
        for arm, runs in arms.items():
            band(axes, steps, np.log10(np.maximum(np.asarray(runs), FLOOR)), arm)
        bound = 2 * steps * np.log10(1 - 1 / float(condition))
        axes.plot(steps, np.maximum(bound, np.log10(FLOOR)), ":", color="gray", label="bound")
        axes.set(title=f"condition {condition}", xlabel="steps")
    panels[0].set_ylabel(r"$\log_{10}$ of loss minus minimum, over its start")
    panels[0].legend()


EXPERIMENT = Experiment(
    number=17,
    name="decoupling",
    claim="Length and direction decouple, and least squares converge at a linear rate",
    source="Kohler et al. 2018",
    sub_claims=(
        SubClaim(
            "17a",
            "linear rate",
            "in every step the loss less its minimum shrinks by (1 - l_min / l_max)^2 or more",
            "the slowest step over the bound, less 1, if it is above",
            Identity(IDENTITY),
            Published("(1 - l_min / l_max)^2", "V"),
        ),
        SubClaim(
            "17b",
            "gradient in closed form",
            "the gradient of the normalized unit has the closed form of the paper",
            "relative distance of the gradient from it",
            Identity(IDENTITY),
        ),
        SubClaim(
            "17c",
            "gradient orthogonal to w",
            "the gradient has no part along the weights",
            "cosine of the angle between gradient and weights",
            Identity(IDENTITY),
            Published("0", "V"),
        ),
    ),
    protocol=(
        f"a linear unit of {FEATURES} features with batch norm over all {EXAMPLES} examples, "
        "condition 10 to 1000, float64; adaptive rate and best scale as in the paper"
    ),
    limits=(
        "The rate needs the largest eigenvalue and the best scale in every step. What the bound "
        "promises, plain descent at 1 / l_max has too; the reported figures compare the two."
    ),
    run=run,
    draw=draw,
    easy="All of it: the theorem is about a case that can be computed to rounding.",
    hard="The rate that the theorem needs is one that nobody knows in practice.",
)
