"""The formulas of the experiments on training, and the identity that claim 10 states."""

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.lab.experiments import (
    large_rates,
    smoothness,
)
from bn_jax.lab.experiments.selection import RateSweep
from bn_jax.lab.experiments.verdicts import Setting


def test_the_gradient_below_a_norm():
    identity = smoothness.check_formula(Setting(seeds=3))
    assert identity.error <= 1e-10
    assert ((identity.share > 0) & (identity.share < 1)).all()


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
