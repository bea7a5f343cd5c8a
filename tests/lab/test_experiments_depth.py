"""The formulas behind the claims about depth, curvature and least squares, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.lab.experiments import decoupling, hessian
from bn_jax.lab.experiments.nets import MLP
from bn_jax.linen import BatchNorm


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
