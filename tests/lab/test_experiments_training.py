"""The formulas of the experiments on training, and the identity that claim 10 states."""

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.lab.experiments import (
<<<<<<< HEAD
    large_rates,
=======
    scale_and_bias_alone,
    sigmoid_training,
>>>>>>> h-depth
    smoothness,
)
from bn_jax.lab.experiments.verdicts import Setting


def test_the_gradient_below_a_norm():
    identity = smoothness.check_formula(Setting(seeds=3))
    assert identity.error <= 1e-10
    assert ((identity.share > 0) & (identity.share < 1)).all()


<<<<<<< HEAD
def test_the_largest_stable_rate_is_the_last_within_reach():
    accuracies = np.array([[0.9, 0.1, 0.1], [0.4, 0.5, 0.2], [0.7, 0.1, 0.1], [0.1, 0.1, 0.1]])
    np.testing.assert_array_equal(large_rates.largest_stable(accuracies), [2, 1, -1])


def test_arms_are_compared_at_a_tenth_of_the_rate_that_is_stable_without():
    places = np.arange(len(large_rates.RATES))
    validation = {arm: np.where(places <= last, 0.9, 0.1) for arm, last in ARMS_LAST.items()}
    swept = {
        arm: RateSweep(large_rates.RATES, values[:, None], (values - factor * places)[:, None])
        for (arm, values), factor in zip(validation.items(), (0.01, 0.02), strict=True)
    }
    comparison = large_rates.compare(swept)
    np.testing.assert_array_equal(comparison.ratios, [10])
    np.testing.assert_allclose(comparison.gaps, [0.02 - 0.01])
    swept["no norm"].validation[:] = 0.1
    comparison = large_rates.compare(swept)
    assert np.isnan(comparison.ratios).all() and np.isnan(comparison.gaps).all()


ARMS_LAST = {"batch norm": 7, "no norm": 4}
=======
def test_saturated_values_and_dead_units():
    inputs = jnp.array([[[3.0, -1.0], [-3.0, -2.0]], [[0.0, 1.0], [0.5, 0.0]]])
    assert step_two.useless_share("tanh", inputs) == pytest.approx(3 / 8)
    assert step_two.useless_share("ReLU", inputs) == pytest.approx(1 / 4)


def test_steps_until_the_goal_is_first_reached():
    accuracies = [[0.1, 0.96, 0.94, 0.99], [0.1, 0.2, 0.3, 0.949], [0.95, 0.1, 0.1, 0.1]]
    every = sigmoid_training.EVERY
    np.testing.assert_array_equal(sigmoid_training.steps_to_goal(accuracies), [every, np.inf, 0])


def test_an_arm_that_does_not_arrive_counts_with_all_its_steps():
    def reaching(*points):
        accuracies = np.tile(np.linspace(0, 0.5, 11), (len(points), 2, 1))
        for rate, seeds in enumerate(points):
            for seed, point in enumerate(seeds):
                accuracies[rate, seed, point:] = 0.99
        return accuracies

    every, never = sigmoid_training.EVERY, 99
    accuracies = {
        "batch norm": reaching((5, 10), (2, 3)),
        "no norm": reaching((8, never), (never, never)),
    }
    horizon = 10 * every
    comparison = sigmoid_training.compare(accuracies, horizon)
    assert comparison.best == {"batch norm": 1, "no norm": 0}
    np.testing.assert_allclose(comparison.at_best, [8 / 2, 10 / 3])
    np.testing.assert_allclose(comparison.at_same, [8 / 5, 10 / 10])
    accuracies["no norm"] = reaching((never, never), (never, never))
    accuracies["no norm"][1] += 0.1
    assert sigmoid_training.compare(accuracies, horizon).best["no norm"] == 1
    accuracies["batch norm"] = reaching((never, 10), (never, 3))
    assert np.isnan(sigmoid_training.compare(accuracies, horizon).at_best).any()


def test_wandering_is_in_final_widths():
    quantiles = np.array([[[0, 1.0, 2], [0, 3, 4], [1, 2, 5]]])
    np.testing.assert_allclose(sigmoid_training.wandering(quantiles), [2 / 4])
>>>>>>> h-depth


def test_covariate_shift_moves_the_layers_before_alone():
    layers = smoothness.DEPTH
    values = jnp.arange(1.0, layers)[:, None, None] * jnp.ones((1, 2, 2))
    before = {"first": jnp.ones(()), "hidden": values}
    after = jax.tree.map(lambda leaf: leaf + 0.5, before)
    mixed = smoothness.mix_layers(before, after)
    own = smoothness.covariate_shift(values, mixed["hidden"])
    np.testing.assert_array_equal(own.distance, 0)
    np.testing.assert_allclose(own.cosine, 1, rtol=1e-6)

    def sums(first, hidden):
        return first + jnp.cumsum(hidden, 0)

    found = smoothness.covariate_shift(
        sums(before["first"], values), jax.vmap(sums)(mixed["first"], mixed["hidden"])
    )
    expected = [0.5 * i / (1 + sum(range(1, i + 1))) for i in range(1, layers)]
    np.testing.assert_allclose(found.distance, expected, rtol=1e-5)


def test_smoothness_of_a_quadratic_is_its_curvature():
    before, rate, curvature = jnp.array([1.0, 2.0]), 0.1, 3.0
    after = before - rate * curvature * before
    gradients = curvature * smoothness.go_ahead(before, after)
    changes = smoothness.smoothness(gradients, rate)
    np.testing.assert_allclose(changes, [3 * 0.1 * max(smoothness.AHEAD), 3], rtol=1e-5)
