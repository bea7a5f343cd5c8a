"""Whitening against its definition in float64: an eigendecomposition, by the function."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import assert_close, correlated, differentiate, exact, standard_normal

import bn_jax as bn
from bn_jax._core.whitening import inverse_square_root

TRAIN: Any = partial(bn.whitening_norm, use_running_average=False)
EVALUATE: Any = partial(bn.whitening_norm, use_running_average=True)
COMPLETE = 20

pytestmark = pytest.mark.usefixtures("strict_promotion", "compile_quickly")


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
    # Once so close, epsilon and rounding decide.
    assert all(after < before or before < 1e-3 for before, after in pairwise(distances))
    assert distances[-1] < 1e-3


def test_groups_of_one_feature_are_batch_norm():
    params, stats = make_state(size=1)
    x = correlated(0, (20, 6), offset=100.0)
    y, new = TRAIN(params, stats, x, group_size=1, iterations=1)
    per_feature: Any = {"mean": stats["mean"], "var": stats["cov"].reshape(6)}
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
    with jax.numpy_dtype_promotion("standard"):
        assert TRAIN(params, stats, x)[0].dtype == jnp.float32


def test_the_cumulative_average_weighs_every_batch_alike():
    params: dict[str, Any] = {}
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
    """The uncoupled iteration comes apart in float32 after some ten steps."""
    matrix = with_condition(condition)
    expected = define_root(exact(matrix))
    for iterations in (20, 50):
        root = exact(inverse_square_root(matrix, iterations))
        assert np.abs(root - expected).max() <= tolerance * np.abs(expected).max()


def iterate(matrix, iterations):
    """So many steps of the coupled Newton iteration, from the matrix over its Frobenius norm."""
    size = np.linalg.norm(matrix, axis=(-2, -1), keepdims=True)
    root, inverse = matrix / size, np.broadcast_to(np.eye(matrix.shape[-1]), matrix.shape)
    for _ in range(iterations):
        step = (3 * np.eye(matrix.shape[-1]) - inverse @ root) / 2
        root, inverse = root @ step, step @ inverse
    return inverse / np.sqrt(size)


@pytest.mark.parametrize("iterations", [1, 2, 5, 6])
def test_as_many_steps_are_taken_as_asked_for(iterations):
    """The smallest eigenvalue is far from 1 still, so that each step shows."""
    matrix = with_condition(1e4, 8)
    fewer, expected, more = (iterate(exact(matrix), iterations + by) for by in (-1, 0, 1))
    assert_close(inverse_square_root(matrix, iterations), expected, tolerance=1e-5)
    assert min(np.abs(other - expected).max() for other in (fewer, more)) > 0.1


@pytest.mark.parametrize("options", [{}, {"iterations": 6}], ids=["5 by default", "6"])
@pytest.mark.parametrize("use_running_average", [False, True])
def test_a_whitened_batch_has_had_as_many_steps_as_asked_for(use_running_average, options):
    params, stats = make_state(size=6)
    x = correlated(0, (40, 6)) * jnp.array([[1, 1, 1, 0.1, 0.1, 0.01]])
    if use_running_average:
        stats["mean"], stats["cov"] = (leaf.astype(jnp.float32) for leaf in define_cov(x, 6))
    y, _ = bn.whitening_norm(params, stats, x, use_running_average=use_running_average, **options)
    mean, cov = define_cov(x, 6)
    outputs = {
        number: (exact(x) - mean) @ iterate(cov + 1e-5 * np.eye(6), number)[0]
        * exact(params["scale"]) + exact(params["bias"])
        for number in (4, 5, 6, 7)
    }  # fmt: skip
    number = options.get("iterations", 5)
    assert_close(y, outputs[number], tolerance=2e-5)
    for other in (number - 1, number + 1):
        assert np.abs(outputs[other] - outputs[number]).max() > 0.01


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
def test_masked_equals_the_subset_whatever_is_masked(weighted):
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
    mean, cov = define_cov(x, 3, mask)
    expected = define_output(params, mean, cov, x)
    assert_close(y, expected, tolerance=3e-5)


@pytest.mark.parametrize("examples", [0, 12])
def test_a_batch_without_a_valid_value_leaves_the_statistics(examples):
    params, stats = make_state()
    x = correlated(0, (12, 6))[:examples]
    stats["count"] = jnp.ones(2)
    nothing = jnp.zeros((examples, 1), bool)
    y, updated = TRAIN(params, stats, x, group_size=3, mask=nothing, momentum=None)
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


# --- several devices ----------------------------------------------------------------------------


def differentiated(params, stats, x, mask, **options):
    def loss(params, x):
        y, updated = TRAIN(
            params, stats, x, group_size=3, iterations=COMPLETE, mask=mask, **options
        )
        return jnp.sum(jnp.sin(jnp.where(mask, y, 0))), (y, updated)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def by_shard_map(params, stats, x, mask):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        partial(differentiated, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=((P(), P("data")), (P("data"), P())),
    )
    return jax.jit(mapped)(params, stats, x, mask)


def by_pmap(params, stats, x, mask):
    split = [leaf.reshape(4, -1, *leaf.shape[1:]) for leaf in (x, mask)]
    mapped = jax.pmap(
        partial(differentiated, axis_name="data"), axis_name="data", in_axes=(None, None, 0, 0)
    )
    (of_params, of_x), (y, updated) = jax.tree.map(np.asarray, mapped(params, stats, *split))
    for leaf in jax.tree.leaves(updated):
        assert (leaf == leaf[:1]).all()
    return (
        (jax.tree.map(lambda leaf: leaf.sum(0), of_params), of_x.reshape(x.shape)),
        (y.reshape(x.shape), jax.tree.map(lambda leaf: leaf[0], updated)),
    )


def by_sharded_jit(kind, params, stats, x, mask):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        x, mask = jax.device_put((x, mask), NamedSharding(mesh, P("data")))
        params, stats = jax.device_put((params, stats), NamedSharding(mesh, P()))
        found = jax.jit(partial(differentiated, axis_name="data"))(params, stats, x, mask)
        return jax.tree.map(np.asarray, found)


REGIMES: dict[str, Any] = {
    "shard_map": by_shard_map,
    "pmap": by_pmap,
    "sharded jit": partial(by_sharded_jit, jax.sharding.AxisType.Auto),
    "explicit jit": partial(by_sharded_jit, jax.sharding.AxisType.Explicit),
}


on_one_device = jax.jit(differentiated)


@pytest.mark.parametrize("regime", REGIMES)
def test_sharded_equals_flattened_with_uneven_counts(regime):
    """One of the four devices has nothing valid, and the others have different counts."""
    params, stats = make_state()
    mask = (np.arange(20) % 5 < np.repeat([5, 0, 2, 4], 5))[:, None]
    x = correlated(0, (20, 6), offset=np.repeat([0.0, 9.0, 2.0, 3.0], 5)[:, None])
    x = jnp.where((np.arange(20) == 6)[:, None], jnp.nan, x)
    found = REGIMES[regime](params, stats, x, jnp.asarray(mask))
    expected = on_one_device(params, stats, x, jnp.asarray(mask))
    kept = mask[:, 0]

    def valid(result):
        gradients, (y, updated) = result
        return gradients, np.asarray(y)[kept], updated

    assert_close(valid(found), valid(expected))
    y, updated = define(params, stats, x[kept])
    assert_close(valid(found)[1:], (y[kept[kept]], updated), tolerance=3e-5)


def test_each_index_group_has_its_statistics():
    params, stats = make_state()
    x = correlated(0, (4, 10, 6))
    mapped = jax.pmap(
        partial(
            TRAIN, group_size=3, iterations=COMPLETE, axis_name="data",
            axis_index_groups=[[0, 1], [2, 3]],
        ),
        axis_name="data",
        in_axes=(None, None, 0),
    )  # fmt: skip
    y, updated = jax.tree.map(np.asarray, mapped(params, stats, x))
    for first in (0, 2):
        both = x[first : first + 2].reshape(20, 6)
        expected, expected_stats = define(params, stats, both)
        assert_close(y[first : first + 2].reshape(20, 6), expected, tolerance=3e-5)
        assert_close(jax.tree.map(lambda leaf, at=first: leaf[at], updated), expected_stats)


@pytest.mark.parametrize("kind", list(jax.sharding.AxisType)[:2])
def test_features_may_be_sharded(kind):
    """Groups that align with the shards of the features, that are larger, and that are not."""
    x = correlated(12, (32, 12))
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    for spec in (P("data", "model"), P(None, ("data", "model"))):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        for size in (2, 4, 12):
            params, stats = make_state(12, size)
            with jax.set_mesh(mesh):
                step = jax.jit(partial(TRAIN, group_size=size, iterations=COMPLETE))
                y, updated = step(params, stats, placed)
            expected, expected_stats = define(params, stats, x)
            assert_close(y, expected, dtype=jnp.float32, tolerance=1e-4)
            assert_close(updated, expected_stats)
            assert jax.typeof(y).sharding.spec == jax.typeof(placed).sharding.spec


# --- what bad input gets ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(x=jnp.ones((4, 5))), ValueError, r"x of shape \(4, 5\) has 5 features on axis=-1"),
        (dict(axis=0), ValueError, r"x of shape \(4, 6\) has 4 features on axis=0"),
        (dict(group_size=2), ValueError, r"\['cov'\] do not fit.*group_size=2"),
        (dict(group_size=4), ValueError, r"group_size=4 does not divide the 6 features"),
        (dict(x=jnp.ones((4, 6), int)), TypeError, "x has dtype int32"),
        (dict(x=jnp.ones((4, 6), complex)), TypeError, "x is complex64; expected a real"),
        (dict(dtype=jnp.complex64), TypeError, "dtype is complex64; expected a real"),
        (dict(mask=jnp.ones((3, 1))), ValueError, r"mask of shape \(3, 1\) does not broadcast"),
        (dict(mask=jnp.ones((4, 6))), ValueError, r"mask of shape \(4, 6\) differs between"),
        (dict(axis=2), ValueError, "axis=2 is out of range for x of rank 2"),
        (dict(axis=(0, 1)), ValueError, r"axis=\(0, 1\) has 2 axes, expected one"),
        (dict(momentum=1.5), ValueError, r"momentum=1.5 is outside \[0, 1\]"),
        (dict(momentum=None), ValueError, r"momentum=None .* use_count=True"),
        (dict(epsilon=0.0), ValueError, "epsilon=0.0 must be positive"),
        (dict(iterations=0), ValueError, "iterations=0 must be at least 1"),
        (dict(axis_index_groups=[[0]]), ValueError, "without axis_name"),
        (dict(batch_stats=bn.init_batch_stats(6)), ValueError, r"has \['mean', 'var'\]; expected"),
        (dict(params={"gain": jnp.ones(6)}), ValueError, r"unknown entries \['gain'\]"),
    ],
)  # fmt: skip
def test_bad_input_is_told(options, error, message):
    params, stats = make_state()
    given = dict(params=params, batch_stats=stats, x=jnp.ones((4, 6)), group_size=3) | options
    with pytest.raises(error, match=message):
        TRAIN(**given)


def test_an_unbound_axis_name_is_told():
    params, stats = make_state()
    mapped = jax.vmap(
        partial(TRAIN, params, stats, group_size=3, axis_name="dta"), axis_name="data"
    )
    with pytest.raises(NameError, match="axis_name='dta' is not bound"):
        mapped(jnp.ones((2, 4, 6)))


def test_initial_statistics_need_groups_that_fit():
    with pytest.raises(ValueError, match="group_size=4 does not divide the 6 features"):
        bn.init_whitening_stats(6, group_size=4)
