"""The identities and measures of claims 10, 11 and 17, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.lab.experiments import decoupling, smoothness, whitening
from bn_jax.lab.experiments.verdicts import Setting


def test_the_gradient_below_a_norm():
    identity = smoothness.check_formula(Setting(seeds=3))
    assert identity.error.shape == (3,) and (identity.error <= 1e-10).all()
    assert ((identity.share > 0) & (identity.share < 1)).all()


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


def test_whitening_is_compared_with_what_numpy_whitens():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 200, whitening.FEATURES))
    x *= np.geomspace(1, 3, whitening.FEATURES)
    found = whitening.distance_from_eigen(x)
    assert found.shape == (2,) and (found < whitening.TOLERANCE).all()
    white, scaled = whitening.condition_numbers(jnp.asarray(x, jnp.float32))
    correlations = [np.corrcoef(of_seed.T) for of_seed in x]
    np.testing.assert_allclose(scaled, np.linalg.cond(correlations), rtol=1e-2)
    assert (white >= 1).all() and (white < scaled).all()


def test_a_step_is_held_to_the_bound_of_its_condition():
    bounds = (1 - 1 / np.array(decoupling.CONDITIONS)) ** 2
    steps = np.stack([bounds, 0.9 * bounds], 1)[:, None] * np.ones((1, 2, 1))
    np.testing.assert_array_equal(decoupling.above_bound(steps), 0)
    steps[1, 1, 0] *= 1.01
    steps[2, 0, 1] = np.nan
    expected = np.array([[0, 0], [0, 0.01], [0, 0]])
    np.testing.assert_allclose(decoupling.above_bound(steps), expected, atol=1e-12)
