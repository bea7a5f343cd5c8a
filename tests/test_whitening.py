"""Whitening against its definition in float64: an eigendecomposition, by function and modules."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, differentiate, exact, standard_normal

import bn_jax as bn
from bn_jax.whitening import inverse_square_root

TRAIN = partial(bn.whitening_norm, use_running_average=False)
EVALUATE = partial(bn.whitening_norm, use_running_average=True)
COMPLETE = 20

pytestmark = pytest.mark.usefixtures("strict_promotion")


# --- the definition -----------------------------------------------------------------------------


def define_cov(x, size, mask=None):
    """The covariance of each group of the last axis' features, weighted, in float64."""
    x = exact(x).reshape(-1, x.shape[-1])
    weights = np.ones(len(x)) if mask is None else np.asarray(mask, np.float64).reshape(-1)
    x = np.where(weights[:, None] > 0, x, 0)
    mean = weights @ x / weights.sum()
    groups = (x - mean).reshape(len(x), -1, size)
    return mean, np.einsum("n,ngi,ngj->gij", weights, groups, groups) / weights.sum()


def define_root(cov):
    values, vectors = np.linalg.eigh(cov)
    return np.einsum("gik,gk,gjk->gij", vectors, values**-0.5, vectors)


def define_output(params, mean, cov, x, epsilon=1e-5):
    groups, size, _ = cov.shape
    root = define_root(cov + epsilon * np.eye(size))
    deviation = (exact(x) - exact(mean)).reshape(*x.shape[:-1], groups, size)
    y = np.einsum("...gj,gij->...gi", deviation, root).reshape(x.shape)
    return y * exact(params["scale"]) + exact(params["bias"])


def define(params, stats, x, *, momentum=0.99, mask=None, epsilon=1e-5):
    """Whitening in training: output and new running statistics."""
    mean, cov = define_cov(x, stats["cov"].shape[-1], mask)
    y = define_output(params, mean, cov, x, epsilon)
    new = {"mean": mean, "cov": cov}
    return y, {
        name: momentum * exact(stats[name]) + (1 - momentum) * new[name] for name in ("mean", "cov")
    }


def make_state(features=6, size=3, seed=100):
    params = {"scale": standard_normal(seed, features), "bias": standard_normal(seed + 1, features)}
    stats = bn.init_whitening_stats(features, group_size=size)
    return params, {"mean": standard_normal(seed + 2, features), "cov": 2 * stats["cov"]}


def correlated(seed, shape, offset=0.0):
    """Values whose covariance has a condition number of some ten."""
    features = shape[-1]
    mixing = np.eye(features) + 0.3 * np.random.default_rng(features).standard_normal(
        (features, features)
    )
    return jnp.asarray(exact(standard_normal(seed, shape)) @ mixing + offset, jnp.float32)


# --- output and state ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 6])
def test_steps_equal_the_definition(size):
    params, stats = make_state(size=size)
    step = jax.jit(partial(TRAIN, group_size=size, iterations=COMPLETE, momentum=0.7))
    expected_stats = stats
    for seed in range(3):
        x = correlated(seed, (4, 10, 6), offset=seed)
        y, stats = step(params, stats, x)
        expected, expected_stats = define(params, expected_stats, x, momentum=0.7)
        assert_close(y, expected, dtype=jnp.float32, tolerance=3e-5)
        assert_close(stats, expected_stats, dtype=jnp.float32)
    y, kept = EVALUATE(params, stats, x, group_size=size, iterations=COMPLETE)
    assert_close(y, define_output(params, stats["mean"], exact(stats["cov"]), x), tolerance=3e-5)
    assert kept is stats
    y, new = EVALUATE(
        params, stats, x, group_size=size, iterations=COMPLETE, update_running_average=True
    )
    assert_close(y, define_output(params, stats["mean"], exact(stats["cov"]), x), tolerance=3e-5)
    assert_close(new, define(params, stats, x)[1])


def test_the_output_is_white():
    x = correlated(0, (500, 32))
    y, _ = TRAIN({}, bn.init_whitening_stats(32), x, iterations=COMPLETE)
    assert_close(define_cov(y, 32)[1][0], np.eye(32), tolerance=1e-4)


def test_more_iterations_are_nearer_to_white():
    x = correlated(0, (500, 32))
    stats = bn.init_whitening_stats(32)
    distances = [
        np.linalg.norm(define_cov(TRAIN({}, stats, x, iterations=number)[0], 32)[1] - np.eye(32))
        for number in (1, 3, 5, 7, 9, 11)
    ]
    assert all(after < before for before, after in pairwise(distances))
    assert distances[-1] < 1e-3


def test_groups_of_one_feature_are_batch_norm():
    params, stats = make_state(size=1)
    x = correlated(0, (20, 6), offset=100.0)
    y, new = TRAIN(params, stats, x, group_size=1, iterations=1)
    per_feature = {"mean": stats["mean"], "var": stats["cov"].reshape(6)}
    expected, expected_stats = bn.batch_norm(params, per_feature, x, use_running_average=False)
    assert_close(y, expected)
    assert_close(new["cov"].reshape(6), expected_stats["var"])
    assert_close(new["mean"], expected_stats["mean"])


def test_the_feature_axis_may_be_any():
    params, stats = make_state()
    x = correlated(0, (5, 4, 6))
    expected = TRAIN(params, stats, x, group_size=3)
    for axis in (0, 1):
        y, new = TRAIN(params, stats, jnp.moveaxis(x, -1, axis), group_size=3, axis=axis)
        assert_close((jnp.moveaxis(y, axis, -1), new), expected)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_offsets_do_not_destroy_the_covariance(offset):
    x = correlated(0, (400, 6), offset=offset)
    params, stats = make_state(size=6)
    y, new = TRAIN(params, stats, x, iterations=COMPLETE, momentum=0.0)
    expected, expected_stats = define(params, stats, x, momentum=0.0)
    assert_close(y, expected, tolerance=2e-5)
    assert_close(new["cov"], expected_stats["cov"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    params, stats = make_state(size=6)
    x = correlated(0, (50, 6), offset=5.0).astype(dtype)
    y, new = TRAIN(params, stats, x, iterations=COMPLETE, dtype=jnp.float32)
    expected, expected_stats = define(params, stats, x)
    assert_close(y, expected, dtype=jnp.float32, tolerance=3e-5)
    assert_close(new, expected_stats, dtype=jnp.float32)
    own = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    assert TRAIN(own, stats, x)[0].dtype == dtype
    assert TRAIN(params, stats, x)[0].dtype == jnp.float32


def test_the_cumulative_average_weighs_every_batch_alike():
    params = {}
    stats = bn.init_whitening_stats(6, group_size=3, use_count=True)
    covs = []
    for seed in range(3):
        x = correlated(seed, (20, 6))
        _, stats = TRAIN(params, stats, x, group_size=3, momentum=None)
        covs.append(define_cov(x, 3)[1])
    assert_close(stats["cov"], np.mean(covs, 0))
    assert stats["count"].tolist() == [3, 3]


# --- the inverse square root --------------------------------------------------------------------


def with_condition(condition, size=32):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    matrix = (basis * np.geomspace(1 / condition, 1, size)) @ basis.T
    return jnp.asarray((matrix + matrix.T)[None] / 2, jnp.float32)


@pytest.mark.parametrize(("condition", "tolerance"), [(1e2, 1e-5), (1e3, 2e-5), (1e4, 1e-4)])
def test_the_root_is_exact_and_stays_so(condition, tolerance):
    """The uncoupled iteration is off by 5e2 after 15 steps for the first of these."""
    matrix = with_condition(condition)
    expected = define_root(exact(matrix))
    for iterations in (20, 50):
        root = exact(inverse_square_root(matrix, iterations))
        assert np.abs(root - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_root_is_found_at_any_magnitude(factor):
    matrix = with_condition(10.0, 4)
    expected = exact(inverse_square_root(matrix, COMPLETE))
    root = exact(inverse_square_root(matrix * factor, COMPLETE)) * np.sqrt(factor)
    assert_close(root, expected, tolerance=1e-5)


# --- derivatives --------------------------------------------------------------------------------


def test_gradients_equal_finite_differences():
    params, stats = make_state(4, 2)
    x = correlated(0, (7, 4))
    weights = np.random.default_rng(1).standard_normal(x.shape)

    def loss(params, x):
        y, _ = TRAIN(params, stats, x, group_size=2, iterations=COMPLETE)
        return jnp.sum(jnp.sin(y) * weights.astype(jnp.float32))

    of_params, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

    def defined(name, values):
        changed = {**params, "x": x, name: values}
        return np.sum(np.sin(define(changed, stats, changed["x"])[0]) * weights)

    assert_close(of_x, differentiate(partial(defined, "x"), x), tolerance=1e-4)
    for name, gradient in of_params.items():
        expected = differentiate(partial(defined, name), params[name])
        assert_close(gradient, expected, tolerance=1e-4)


# --- masks and what is not finite ---------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_masked_equals_the_subset_whatever_is_behind_the_mask(weighted):
    params, stats = make_state()
    x = correlated(0, (12, 6))
    kept = np.arange(12) % 4 != 1
    weights = np.random.default_rng(0).uniform(0.5, 2, 12) if weighted else np.ones(12)
    mask = jnp.asarray((weights * kept)[:, None], jnp.float32) if weighted else kept[:, None]
    poisoned = jnp.where(kept[:, None], x, jnp.nan)

    @jax.jit
    def differentiated(params, x, mask):
        def loss(params, x):
            y, updated = TRAIN(params, stats, x, group_size=3, iterations=COMPLETE, mask=mask)
            return jnp.sum(jnp.sin(jnp.where(mask.astype(bool), y, 0))), (y, updated)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (of_params, of_x), (y, updated) = differentiated(params, poisoned, mask)
    rest = (x[kept], None if mask.dtype == bool else mask[kept])
    expected, expected_stats = define(params, stats, *rest[:1], mask=rest[1])
    assert_close(y[kept], expected, tolerance=3e-5)
    assert np.isnan(y[~kept]).all()
    assert_close(updated, expected_stats)
    ones = jnp.ones((len(rest[0]), 1)) if rest[1] is None else rest[1]
    (of_params_there, of_x_there), _ = differentiated(params, rest[0], ones)
    assert_close(of_params, of_params_there)
    assert_close(of_x[kept], of_x_there)
    assert not of_x[~kept].any()


def test_a_masked_position_is_whitened_too():
    params, stats = make_state()
    x = correlated(0, (12, 6))
    mask = np.arange(12)[:, None] != 5
    y, _ = TRAIN(params, stats, x, group_size=3, iterations=COMPLETE, mask=mask)
    expected = define_output(params, *define_cov(x, 3, mask), x)
    assert_close(y, expected, tolerance=3e-5)


@pytest.mark.parametrize("examples", [0, 12])
def test_a_batch_without_a_valid_value_leaves_the_statistics(examples):
    params, stats = make_state()
    x = correlated(0, (12, 6))[:examples]
    y, updated = TRAIN(params, stats, x, group_size=3, mask=jnp.zeros((examples, 1), bool))
    assert_close(updated, stats, tolerance=1e-12)
    assert_close(y, EVALUATE(params, stats, x, group_size=3)[0])


def test_a_group_that_is_not_finite_keeps_its_statistics():
    params, stats = make_state()
    stats["count"] = jnp.zeros(2)
    x = correlated(0, (12, 6)).at[3, 1].set(jnp.inf)
    _, updated = TRAIN(params, stats, x, group_size=3, momentum=None)
    own = {"mean": stats["mean"][3:], "cov": stats["cov"][1:]}
    new = define({} | {"scale": jnp.ones(3), "bias": jnp.zeros(3)}, own, x[:, 3:], momentum=0)[1]
    assert_close(updated["mean"][:3], stats["mean"][:3])
    assert_close(updated["cov"][0], stats["cov"][0])
    assert_close(updated["mean"][3:], new["mean"])
    assert_close(updated["cov"][1:], new["cov"])
    assert updated["count"].tolist() == [0, 1]
