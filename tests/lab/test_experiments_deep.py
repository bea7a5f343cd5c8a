"""The formulas and protocols behind the claims about deep networks, against NumPy and scipy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats
from scipy.spatial.distance import pdist
from support import exact

import bn_jax as bn
from bn_jax.lab.experiments import (
    affine_only,
    gradient_explosion,
    high_order_effects,
    large_rates,
    normalizer_free,
    orthogonal_representations,
    residual_identity,
    vanishing_gradients,
)
from bn_jax.lab.experiments.selection import RateSweep


@pytest.mark.parametrize("name", ["linear", "ReLU"])
def test_gradients_grow_through_a_layer_as_theory_says(name):
    batch_size, features = 8, 100_000
    generator = np.random.default_rng(0)
    function = gradient_explosion.ACTIVATIONS[name].function

    def layer(x):
        statistics = bn.init_batch_stats(features)
        x, _ = bn.batch_norm({}, statistics, x, use_running_average=False, epsilon=1e-30)
        return function(x)

    white = generator.standard_normal((2, batch_size, features)).astype(np.float32)
    # What the layer before gives, as the features of one layer that weights have mixed.
    covariance = np.cov(layer(white[0]), bias=True)
    centred = np.eye(batch_size) - 1 / batch_size
    spread = np.trace(centred @ covariance @ centred) / (batch_size - 1)
    gradient = white[1] - white[1].mean(0)
    _, pull = jax.vjp(layer, np.sqrt(spread) * white[0])
    found = np.sum(np.square(pull(gradient)[0])) / np.sum(gradient**2)
    assert found == pytest.approx(gradient_explosion.GROWTH[name](batch_size), rel=0.02)


def test_orthogonal_weights_leave_a_beta_distribution():
    batch_size, width = 8, 40
    length = stats.beta((batch_size - 1) / 2, (width - batch_size + 1) / 2)
    inverse = length.expect(lambda x: 1 / x)
    expected = (batch_size - 1) / width * inverse * (1 - 1 / (batch_size - 1))
    assert gradient_explosion.orthogonal_growth(batch_size, width) == pytest.approx(expected)


def test_growth_is_a_mean_over_the_radius(monkeypatch):
    batch_size, width = 5, 6
    monkeypatch.setattr(gradient_explosion, "WIDTH", width)
    monkeypatch.setattr(gradient_explosion, "BATCHES", {batch_size: 1})
    monkeypatch.setattr(gradient_explosion, "EXAMPLES", 2)
    measured = gradient_explosion.measure_gradients(jnp.int32(5), depth=2)
    found, without = measured[batch_size], measured[gradient_explosion.NO_NORM]
    keys = jax.random.split(jax.random.key(5), 3)
    shape = (batch_size, 2, 1, width)
    x, output = (
        exact(jax.random.normal(jax.random.fold_in(key, batch_size), shape))[:, 0, 0]
        for key in (keys[0], keys[2])
    )
    weights = [
        exact(jax.random.normal(key, (width, width))) / np.sqrt(width)
        for key in jax.random.split(keys[1], 2)
    ]
    x = x @ weights[0]
    x = (x - x.mean(0)) / x.std(0)
    z = x @ weights[1]
    x, z = x - x.mean(0), z - z.mean(0)
    deviation = z.std(0)
    unit = z / deviation
    gradient = output - output.mean(0) - unit * (output * unit).mean(0)
    squared = np.sum((gradient / deviation) ** 2, 0)
    radius = np.einsum("if,ij,jf->f", z, np.linalg.pinv(x @ x.T / width, hermitian=True), z)
    expected = np.sum(squared * radius / (batch_size - 3)) / np.sum(output**2)
    np.testing.assert_allclose(found.growth[0, 0, 0], expected, rtol=1e-3)
    below = (gradient / deviation) @ weights[1].T
    norms = [np.sum(output**2), np.sum(below**2)]
    np.testing.assert_allclose(found.squared[:, 0, 0], norms, rtol=1e-4)
    np.testing.assert_allclose(without.growth, without.squared[1:] / without.squared[:-1])


def test_orthogonal_matrices_are_drawn_uniformly():
    found = gradient_explosion.orthogonal(np.random.default_rng(0), (2000, 2), 3)
    products = found @ np.swapaxes(found, -1, -2)
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(3), products.shape), atol=1e-12)
    # Uniform directions in three dimensions have uniform coordinates.
    for place in np.ndindex(3, 3):
        assert stats.kstest(found[:, 0, *place], stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_total_growth_is_a_geometric_mean():
    squared = np.array([[[1.0, 7.0, 4.0], [1.0, 0.1, 9.0]]])
    np.testing.assert_allclose(gradient_explosion.total_growth(squared), [6**0.5])


def test_the_chain_of_weights_changes_as_its_polynomial():
    depth = 4
    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, jax.jit(high_order_effects.measure_chain)(3, depth))
        keys = jax.random.split(jax.random.key(3))
        weights = np.asarray(jax.random.normal(keys[0], (high_order_effects.DEEP,), jnp.float64))
        x = np.asarray(jax.random.normal(keys[1], (high_order_effects.EXAMPLES,), jnp.float64))
    weights = 1 + high_order_effects.SPREAD * weights[:depth]
    gradient = weights.prod() ** 2 / weights * np.mean(x**2)
    # The coefficients of the product of all (w_i + g_i t), from the constant on.
    coefficients = np.poly(-gradient / weights)[:0:-1]
    polynomial = np.array([1.0])
    for weight, slope in zip(weights, gradient, strict=True):
        polynomial = np.convolve(polynomial, [weight, slope])
    assert len(coefficients) == depth
    formula = high_order_effects.second_order_formula(jnp.asarray(weights), jnp.asarray(gradient))
    assert float(formula) == pytest.approx(polynomial[2], rel=1e-5)
    for step, beyond in zip(high_order_effects.STEPS, found.without, strict=True):
        powers = (-step) ** np.arange(depth + 1)
        expected = abs((polynomial * powers)[2:].sum() / (polynomial[1] * step))
        assert beyond == pytest.approx(expected, rel=1e-9)
    assert found.second <= high_order_effects.TOLERANCE
    assert found.with_norm.max() <= high_order_effects.TOLERANCE


def test_where_the_prediction_fails_by_half():
    grid = high_order_effects.GRID
    ratio = grid[1] / grid[0]
    at = 0.03
    # Linear in the logarithm of the rate between two points of the grid.
    linear = 0.5 - np.log(grid / at) / np.log(ratio)
    never, at_once, overflows = np.ones_like(grid), np.zeros_like(grid), linear.copy()
    overflows[grid > 2 * at] = np.nan
    found = high_order_effects.failing_rate(np.stack([linear, never, at_once, overflows]))
    np.testing.assert_allclose(found, [at, np.nan, np.nan, at], rtol=1e-6)


def test_the_network_of_traced_depth_uses_its_first_layers():
    generator = np.random.default_rng(0)
    params = high_order_effects.init_network(jax.random.key(0), 64)
    shape = params["scale"].shape
    params["scale"] = jnp.asarray(np.exp(generator.normal(0, 0.3, shape)), jnp.float32)
    params["bias"] += 0.1
    x = generator.standard_normal((5, 64)).astype(np.float32)
    network = jax.jit(high_order_effects.network, static_argnums=3)
    for arm, layer in high_order_effects.ARMS.items():
        given = exact(x)
        for index, kernel in enumerate([params["first"], *params["kernel"][:2]]):
            given = given @ exact(kernel)
            if arm == "batch norm":
                given = (given - given.mean(0)) / np.sqrt(given.var(0) + 1e-5)
            if arm != "no norm":
                given = given * exact(params["scale"][index])
            given = np.maximum(given + exact(params["bias"][index]), 0)
        expected = given @ exact(params["classifier"])
        found = network(params, x, 3, layer)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
        if arm == "affine only":
            folded = network(affine_only.fold(params), x, 3, high_order_effects.ARMS["no norm"])
            np.testing.assert_allclose(folded, expected, rtol=1e-3, atol=1e-3)


def test_the_largest_stable_rate_is_the_last_within_reach():
    accuracies = np.array([[0.9, 0.1, 0.1], [0.15, 0.5, 0.15], [0.7, 0.1, 0.1], [0.1, 0.1, 0.1]])
    np.testing.assert_array_equal(large_rates.largest_stable(accuracies), [2, 1, -1])


def test_accuracies_at_equal_losses():
    # The first arm reaches a loss of 0.25 at its last point, the second between its points.
    losses = [[[2.0, 1.0, 0.25]], [[2.0, 0.5, 0.125]]]
    tests = [[[0.1, 0.4, 0.7]], [[0.1, 0.5, 0.9]]]
    found = large_rates.at_equal_loss(large_rates.Curves(np.array(losses), np.array(tests)))
    np.testing.assert_allclose(found, [[0.7], [0.7]])
    high = large_rates.Curves(np.full((2, 1, 3), 1.5), np.array(tests))
    assert np.isnan(large_rates.at_equal_loss(high)).all()


def test_arms_are_compared_below_the_rate_that_is_stable_without():
    rates = large_rates.RATES
    places = np.arange(len(rates))
    small = 3
    swept = {}
    for arm, last in {"batch norm": 7, "no norm": 4}.items():
        losses = np.tile([2.0, 0.5], (len(rates), 1, 1))
        tests = np.zeros((len(rates), 1, 2))
        tests[small] = 0.8 if arm == "batch norm" else 0.7
        validation = np.where(places <= last, 0.9, 0.1)[:, None]
        swept[arm] = RateSweep(rates, validation, large_rates.Curves(losses, tests))
    comparison = large_rates.compare(swept)
    np.testing.assert_allclose(comparison.ratios, [10**1.5])
    np.testing.assert_allclose(comparison.at_least, [10**1.5])
    np.testing.assert_allclose(comparison.gaps, [10])
    swept["no norm"].validation[:] = 0.1
    comparison = large_rates.compare(swept)
    assert np.isnan(comparison.ratios).all() and np.isnan(comparison.gaps).all()
    np.testing.assert_allclose(comparison.at_least, [10**3.5])
    swept["batch norm"].validation[:] = 0.1
    assert np.isnan(large_rates.compare(swept).at_least).all()


def test_activations_that_overflow_have_exploded():
    activations = np.ones((3, 2, 2))
    activations[:, 1] = [[4.0, 2.0], [0.5, np.nan], [np.inf, 1.0]]
    found = large_rates.explosion(activations)
    np.testing.assert_allclose(found, [4.0, large_rates.HUGE, large_rates.HUGE])


def test_usable_rates_are_near_the_best():
    validation = np.array([[0.5, 0.9], [0.96, 0.1], [0.98, 0.1], [0.94, 0.1]])
    swept = RateSweep([1.0, 2.0, 4.0, 8.0], validation, None)
    usable = residual_identity.usable_rates(swept)
    np.testing.assert_allclose(usable.smallest, [2, 1])
    np.testing.assert_allclose(usable.largest, [8, 1])
    np.testing.assert_allclose(usable.range, [4, 1])


def test_branches_whose_scale_is_zero_are_identities_that_learn():
    model = residual_identity.ZeroScaleMLP(3, 4, 2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 64)), jnp.float32)
    params = model.init(jax.random.key(0), x, train=False)["params"]
    stats = {"batch_stats": model.init(jax.random.key(0), x, train=False)["batch_stats"]}

    def loss(params):
        logits, _ = model.apply({"params": params, **stats}, x, train=True, mutable="batch_stats")
        return jnp.sum(logits[:, 0] * x[:, 0]), logits

    gradients, logits = jax.grad(loss, has_aux=True)(params)
    stream = exact(x) @ exact(params["stem"]["kernel"])
    stream = (stream - stream.mean(0)) / np.sqrt(stream.var(0) + 1e-5)
    expected = np.maximum(stream, 0) @ exact(params["classifier"]["kernel"])
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert (np.abs(gradients["block"]["norm_1"]["scale"]).max(-1) > 0).all()


def test_a_block_without_norm():
    model = normalizer_free.NormalizerFreeMLP(2, 4, 3)
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    variables = model.init(jax.random.key(0), x, train=False)
    _, sown = model.apply(variables, x, train=False, mutable=["intermediates"])
    (stream,) = sown["intermediates"]["stream"]

    def kernel(params, *index):
        values = exact(params["kernel"])[index]
        return stats.zscore(values, 0) / np.sqrt(len(values))

    expected = exact(x) @ kernel(variables["params"]["stem"])
    np.testing.assert_allclose(stream[0], expected, rtol=1e-4, atol=1e-5)
    for block in range(2):
        y = expected / np.sqrt(1 + block * 0.2**2)
        for layer in ("dense_0", "dense_1"):
            relu = np.maximum(y, 0) * np.sqrt(2 / (1 - 1 / np.pi))
            y = relu @ kernel(variables["params"]["block"][layer], block)
        expected = expected + 0.2 * y
        np.testing.assert_allclose(stream[block + 1], expected, rtol=1e-4, atol=1e-5)


def test_scale_and_bias_in_the_place_of_a_norm():
    variables = {"params": {"scale": jnp.array([2.0, 3.0]), "bias": jnp.array([1.0, -1.0])}}
    applied: Any = affine_only.Affine().apply(variables, jnp.array([[1.0, 1.0], [0.0, 2.0]]))
    np.testing.assert_array_equal(applied, [[3, 2], [1, 5]])


def test_cosines_and_effective_ranks():
    x = np.random.default_rng(0).standard_normal((2, 5, 8))
    cosines = np.stack([1 - pdist(one, "cosine") for one in x])
    found = orthogonal_representations.mean_cosine(jnp.asarray(x), centred=False)
    np.testing.assert_allclose(found, np.abs(cosines).mean(-1), rtol=1e-5)
    found = orthogonal_representations.mean_cosine(jnp.asarray(x), centred=True)
    np.testing.assert_allclose(found, np.abs(cosines + 1 / 4).mean(-1), rtol=1e-5)
    squares = np.linalg.svd(x, compute_uv=False) ** 2
    expected = squares.sum(-1) ** 2 / (squares**2).sum(-1)
    found = orthogonal_representations.effective_rank(jnp.asarray(1e15 * x))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_growth_behind_a_norm_is_at_least_that_of_a_linear_function():
    relu, tanh = (vanishing_gradients.ACTIVATIONS[name] for name in ("ReLU", "tanh"))
    found = vanishing_gradients.growth_with_norm(relu)
    assert found == pytest.approx(np.pi / (np.pi - 1), rel=0.01)

    def mean(function):
        return integrate.quad(lambda z: function(z) * stats.norm.pdf(z), -12, 12)[0]

    expected = mean(lambda z: np.cosh(z) ** -4.0) / mean(lambda z: np.tanh(z) ** 2)
    assert vanishing_gradients.growth_with_norm(tanh) == pytest.approx(expected, rel=1e-4)
    linear = vanishing_gradients.Activation(lambda x: 3 * x, lambda x: 3 * jnp.ones_like(x))
    assert vanishing_gradients.growth_with_norm(linear) == pytest.approx(1, rel=1e-4)


def test_growth_without_norm_is_that_at_the_variance_a_layer_keeps():
    gain = 1.5
    sigmoid = vanishing_gradients.ACTIVATIONS["sigmoid"]

    def mean(function, variance):
        def weighted(z):
            return function(np.sqrt(variance) * z) * stats.norm.pdf(z)

        return integrate.quad(weighted, -12, 12)[0]

    def logistic(x):
        return 1 / (1 + np.exp(-x))

    variance = 1.0
    for _ in range(50):
        variance = gain**2 * mean(lambda x: logistic(x) ** 2, variance)
    slope = mean(lambda x: (logistic(x) * logistic(-x)) ** 2, variance)
    found = vanishing_gradients.growth_without_norm(sigmoid, gain)
    assert found == pytest.approx(gain**2 * slope, rel=1e-3)
