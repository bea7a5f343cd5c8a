"""The formulas behind the claims about depth, curvature and least squares, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax as bn
from bn_jax.lab.experiments import decoupling, gradient_explosion, hessian
from bn_jax.lab.experiments.nets import MLP
from bn_jax.linen import BatchNorm


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


def test_gradients_at_every_layer_of_a_network_are_those_at_its_activations(monkeypatch):
    monkeypatch.setattr(gradient_explosion, "WIDTH", 3)
    monkeypatch.setattr(gradient_explosion, "BATCHES", {})
    monkeypatch.setattr(gradient_explosion, "EXAMPLES", 2)
    found = gradient_explosion.squared_gradients(jnp.int32(5), depth=2)
    keys = jax.random.split(jax.random.key(5), 3)
    (shape,) = {(1, 2, 2, 3)}
    output = jax.random.normal(jax.random.fold_in(keys[2], gradient_explosion.NO_NORM), shape)
    weights = jax.random.normal(jax.random.split(keys[1], 2)[1], (3, 3)) / np.sqrt(3)
    at_output = np.sum(np.square(output), (0, 3))
    linear = np.sum(np.square(np.asarray(output)[0, 0] @ np.asarray(weights).T), -1)
    np.testing.assert_allclose(found[gradient_explosion.NO_NORM][0], at_output, rtol=1e-5)
    np.testing.assert_allclose(found[gradient_explosion.NO_NORM][1, 0], linear, rtol=1e-5)


def test_the_gradient_behind_a_norm_has_no_part_along_the_weights():
    problem = decoupling.make_problem(seed=3, condition=10)
    eigenvalues = np.linalg.eigvalsh(np.cov(problem.x.T, bias=True))
    np.testing.assert_allclose(eigenvalues[[0, -1]], [0.1, 1], rtol=1e-12)
    weights = np.random.default_rng(1).standard_normal(decoupling.FEATURES)
    with jax.enable_x64(True):
        errors = jax.tree.map(float, jax.jit(decoupling.errors)(weights, problem))
    assert errors.closed_form < decoupling.IDENTITY
    assert errors.cosine < decoupling.IDENTITY


def test_contractions_end_where_distances_are_rounding():
    found = decoupling.contractions(np.array([1.0, 0.5, 1e-17, 1e-17]))
    np.testing.assert_array_equal(found, [0.5, np.nan, np.nan])


def test_largest_eigenvalues_are_those_of_the_dense_matrix():
    matrix = np.random.default_rng(0).standard_normal((100, 100))
    matrix += matrix.T
    values, vectors = hessian.largest_eigenvalues(lambda vector: matrix @ vector, 100, 5, seed=0)
    expected = np.linalg.eigvalsh(matrix)[::-1][:5]
    np.testing.assert_allclose(values, expected, rtol=hessian.TOLERANCE)
    residual = matrix @ vectors - vectors * values
    assert np.abs(residual).max() < 10 * hessian.TOLERANCE * expected[0]


def test_products_are_those_of_the_mean_over_batches_with_their_own_statistics():
    model = MLP((3,), num_classes=2, norm=BatchNorm, activation=jnp.tanh)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 4, 64)).astype(np.float32)
    y = np.array([[0, 1, 1, 0], [1, 0, 1, 1]])
    params = model.init(jax.random.key(0), x[0], train=False)["params"]
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    direction = generator.standard_normal(flat.shape)

    def loss(flat):
        params = jax.tree.map(np.float64, jax.device_get(unravel(jnp.asarray(flat, jnp.float32))))
        total = 0.0
        for of_batch, labels in zip(x.astype(np.float64), y, strict=True):
            z = of_batch @ params["dense0"]["kernel"]
            z = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)
            z = np.tanh(z * params["norm0"]["scale"] + params["norm0"]["bias"])
            logits = z @ params["classifier"]["kernel"] + params["classifier"]["bias"]
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            total -= logits[np.arange(4), labels].mean() / 2
        return total

    gradient, product = hessian.make_products(model, params)
    step = 1e-2
    slope = (loss(flat + step * direction) - loss(flat - step * direction)) / (2 * step)
    np.testing.assert_allclose(gradient(flat, x, y) @ direction, slope, rtol=2e-2)
    ends = [gradient(flat + sign * step * direction, x, y) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    found = product(flat, x, y, direction.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=3e-2 * np.abs(expected).max())
