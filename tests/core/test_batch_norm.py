import itertools
import json
from functools import partial
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    assert_close,
    define_affine,
    define_batch_norm,
    define_gradients,
    define_moments,
    differentiate,
    exact,
    standard_normal,
)

import bn_jax as bn
from bn_jax._core.batch_norm import start_measuring
from bn_jax._core.moments import CANCELLATION_THRESHOLD, Reduction, centred_moments

TRAIN = partial(bn.batch_norm, use_running_average=False)
EVALUATE = partial(bn.batch_norm, use_running_average=True)


pytestmark = pytest.mark.usefixtures("strict_promotion")


def make_state(features, present=("scale", "bias"), seed=100):
    params = {name: standard_normal(seed + number, features) for number, name in enumerate(present)}
    mean, var = standard_normal(seed + 8, features), standard_normal(seed + 9, features)
    return params, {"mean": mean, "var": jnp.abs(var) + 0.1}


def features_of(shape, axis):
    return tuple(shape[a] for a in sorted(a % len(shape) for a in np.atleast_1d(axis)))


# --- the definition ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape,axis",
    [((8, 3), -1), ((3, 8), 0), ((4, 5, 3), -1), ((4, 3, 5), 1), ((2, 4, 4, 3), 3),
     ((4, 3, 2), (1, 2)), ((4, 3, 2), (-1, 1)), ((6,), 0), ((6, 2), (0, 1))],
)  # fmt: skip
@pytest.mark.parametrize("present", [("scale", "bias"), ("scale",), ("bias",), ()])
def test_training_is_the_definition(shape, axis, present):
    x = standard_normal(0, shape) * 2 + 1
    params, stats = make_state(features_of(shape, axis), present)
    if len(features_of(shape, axis)) == len(shape):
        with pytest.raises(ValueError, match="one value per feature"):
            TRAIN(params, stats, x, axis=axis)
        return
    y, updated = TRAIN(params, stats, x, axis=axis)
    expected = define_batch_norm(params, stats, x, axis=axis)
    assert_close((y, updated), expected, dtype=jnp.float32)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("running_var_ddof", [0, 1])
def test_evaluation_after_several_steps(momentum, running_var_ddof):
    params, stats = make_state((3,))
    options = dict(momentum=momentum, epsilon=1e-3)
    expected = stats
    for step in range(5):
        x = standard_normal(step, (6, 2, 3)) * (step + 1) + step
        _, stats = TRAIN(params, stats, x, running_var_ddof=running_var_ddof, **options)
        _, expected = define_batch_norm(
            params, expected, x, running_var_ddof=running_var_ddof, **options
        )
    assert_close(stats, expected, dtype=jnp.float32)
    y, unchanged = EVALUATE(params, stats, x, epsilon=1e-3)
    assert_close(y, define_affine(x, *expected.values(), *params.values(), epsilon=1e-3))
    assert unchanged is stats


PYTORCH = json.loads((Path(__file__).parents[1] / "golden" / "pytorch.json").read_text())["cases"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("case", PYTORCH, ids=lambda case: f"{case['layer']} {case['momentum']}")
def test_agrees_with_pytorch_after_every_step(case, dtype):
    tolerance = {jnp.float32: 2e-6, jnp.float64: 1e-13}[dtype]
    momentum = None if case["momentum"] is None else 1 - case["momentum"]
    options = dict(axis=1, epsilon=case["epsilon"])

    def loss(params, stats, x):
        y, updated = TRAIN(
            params, stats, x, momentum=momentum, running_var_ddof=1, **options
        )  # fmt: skip
        return jnp.sum(jnp.sin(y)), (y, updated)

    with jax.enable_x64(dtype == jnp.float64):
        params = {name: jnp.asarray(case[name], dtype) for name in ("scale", "bias")}
        stats = bn.init_batch_stats(3, dtype=dtype, use_count=True)
        train = jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))
        for step in case["steps"]:
            x = jnp.asarray(step["x"], dtype)
            (of_params, of_x), (y, stats) = train(params, stats, x)
            found = {"y": y, "mean": stats["mean"], "var": stats["var"]}
            expected = {name: np.asarray(step[name]) for name in found}
            assert_close(found, expected, dtype=dtype, tolerance=tolerance)
            gradients = {name: np.asarray(value) for name, value in step["gradients"].items()}
            assert_close({**of_params, "x": of_x}, gradients, tolerance=10 * tolerance)
        assert (stats["count"] == case["num_batches_tracked"]).all()
        evaluated, _ = EVALUATE(params, stats, x, **options)
        assert_close(evaluated, np.asarray(case["evaluated"]), dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("masking", [None, "boolean", "weights"])
@pytest.mark.parametrize("what", ["x", "scale", "bias", "mean", "var"])
def test_gradients_are_those_of_the_definition(what, masking):
    x, (params, stats) = standard_normal(1, (5, 2, 3)) + 1, make_state((3,))
    mask = {
        None: None,
        "boolean": standard_normal(2, (5, 2, 1)) > -0.5,
        "weights": jnp.abs(standard_normal(2, (5, 1, 3))),
    }[masking]
    weights = np.asarray(standard_normal(3, x.shape))
    stats_weights = np.asarray(standard_normal(4, (2, 3)))

    def loss(module, function, value):
        given = {**params, **stats, "x": x, what: value}
        state = ({name: given[name] for name in names} for names in (params, stats))
        y, updated = function(*state, given["x"], mask=mask)
        stacked = module.stack([updated["mean"], updated["var"]])
        return module.sum(module.sin(y) * weights) + module.sum(stacked * stats_weights)

    value = {**params, **stats, "x": x}[what]
    expected = differentiate(partial(loss, np, define_batch_norm), value)
    for found in both_modes(partial(loss, jnp, TRAIN))(value):
        assert_close(found, expected)


def both_modes(loss):
    return jax.jit(lambda value: (jax.grad(loss)(value), jax.jacfwd(loss)(value)))


@pytest.mark.parametrize("shape", [(5, 2, 3), (5, 1, 1), (3,)])
@pytest.mark.parametrize("running_var_ddof", [0, 1])
def test_gradients_of_weights_are_those_of_the_definition(shape, running_var_ddof):
    x, (params, stats) = standard_normal(51, (5, 2, 3)) + 1, make_state((3,))
    weights = jnp.abs(standard_normal(52, shape)) + 0.5

    def loss(module, function, weights):
        y, updated = function(
            params, stats, x, mask=weights, running_var_ddof=running_var_ddof, momentum=0.5
        )
        return module.sum(module.sin(y)) + module.sum(module.sin(updated["var"]))

    expected = differentiate(partial(loss, np, define_batch_norm), weights)
    for found in both_modes(partial(loss, jnp, TRAIN))(weights):
        assert_close(found, expected)


def test_a_weight_of_zero_has_no_derivative_whatever_it_hides():
    x, (params, stats) = standard_normal(53, (5, 3)), make_state((3,))
    weights = jnp.array([1.0, 2.0, 0.0, 0.5, 0.0])[:, None]

    def loss(x, weights):
        y, updated = TRAIN(params, stats, x, mask=weights)
        return jnp.sum(jnp.where(weights > 0, jnp.sin(y), 0)) + jnp.sum(updated["var"])

    kept, gradient = jnp.array([0, 1, 3]), jax.jit(jax.grad(loss, argnums=(0, 1)))
    expected = gradient(x[kept], weights[kept])
    for hidden in (jnp.nan, jnp.inf, 3e38):
        of_x, of_weights = gradient(x.at[2].set(hidden), weights)
        assert_close((of_x[kept], of_weights[kept]), expected)
        assert (of_x[2] == 0).all()
        assert (of_weights[2] == 0).all()


def test_gradients_of_weights_meet_over_devices():
    x, (params, stats) = standard_normal(54, (4, 5, 3)), make_state((3,))
    weights = jnp.abs(standard_normal(55, (4, 5, 1))) + 0.5

    def loss(weights, x, **options):
        y, updated = TRAIN(params, stats, x, mask=weights, **options)
        return jnp.sum(jnp.sin(y)), updated["var"]

    def synchronized(weights):
        losses, var = jax.vmap(partial(loss, axis_name="data"), axis_name="data")(weights, x)
        return losses.sum() + var[0].sum()

    def whole(weights):
        total, var = loss(weights.reshape(20, 1), x.reshape(20, 3))
        return total + var.sum()

    found, expected = (jax.jit(jax.grad(loss))(weights) for loss in (synchronized, whole))
    assert_close(found, expected)


def test_gradients_in_evaluation_are_those_of_the_definition():
    x, (params, stats) = standard_normal(5, (5, 3)), make_state((3,))

    def loss(x, params, stats):
        return jnp.sum(jnp.sin(EVALUATE(params, stats, x)[0]))

    gradients = jax.grad(loss, argnums=(0, 1, 2))(x, params, stats)
    given = {"x": x, **stats, **params}
    computed = {"x": gradients[0], **gradients[1], **gradients[2]}
    for name, value in given.items():

        def define(value, name=name):
            return np.sum(np.sin(define_affine(**{**given, name: value})))

        assert_close(computed[name], differentiate(define, value))


def test_every_mode_of_differentiation_agrees_with_plain_autodiff():
    with jax.enable_x64(True):
        params, stats = (
            jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree) for tree in make_state((2,))
        )
        x = standard_normal(6, (4, 2), np.float64) + 3

        def plain(x, params):
            return jnp.sum(jnp.sin(define_batch_norm(params, stats, x, xp=jnp)[0]) ** 2)

        def ours(x, params):
            return jnp.sum(jnp.sin(TRAIN(params, stats, x)[0]) ** 2)

        modes = (
            jax.grad,
            jax.jacfwd,
            jax.hessian,
            lambda f, **k: jax.jacrev(jax.jacrev(f, **k), **k),
            lambda f, **k: jax.jacrev(jax.jacfwd(f, **k), **k),
            lambda f, **k: jax.grad(jax.checkpoint(f), **k),
        )
        derivatives = (
            jax.jit(lambda *state, f=f: [mode(f, argnums=(0, 1))(*state) for mode in modes])
            for f in (ours, plain)
        )
        for found, expected in zip(*(one(x, params) for one in derivatives), strict=True):
            assert_close(found, expected, dtype=jnp.float64, tolerance=1e-9)


# --- offsets and the guard --------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3, 1e4, 1e5, 1e6])
def test_output_at_any_offset(offset):
    x = standard_normal(7, (4096, 8)) + np.float32(offset)
    params, stats = bn.init_params(8), bn.init_batch_stats(8)
    y, updated = jax.jit(TRAIN)(params, stats, x)
    expected, expected_stats = define_batch_norm(params, stats, x)
    assert np.abs(y - expected).max() < 1e-5
    assert_close(updated, expected_stats)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_gradients_far_from_zero(offset):
    # Every output pulls upwards: what rounding takes from the mean would not cancel.
    x = standard_normal(7, (512, 8)) + np.float32(offset)
    params, stats = make_state(8)

    def pull(y):
        return y + 3

    def loss(params, x):
        y = bn.batch_norm(params, stats, x, use_running_average=False)[0]
        return jnp.sum(y**2 / 2 + 3 * y)

    d_params, d_x = define_gradients(params, x, None, pull)
    found = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    assert_close(found, (d_params, d_x), dtype=jnp.float32)


def test_flax_is_wrong_at_an_offset_of_1e4():
    x = standard_normal(7, (4096, 8)) + np.float32(1e4)
    layer = nn.BatchNorm(use_running_average=False)
    y, _ = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    expected, _ = define_batch_norm({}, bn.init_batch_stats(8), x)
    assert np.abs(y - expected).max() > 1000


@jax.jit
def shift_of(x, guess):
    return centred_moments(Reduction((0,)), x, None, guess[None]).shift


def guard_triggers(stats, x):
    return not (shift_of(x, stats["mean"]) == stats["mean"][None]).all()


def test_the_guard_rests_once_the_running_mean_is_near():
    x = standard_normal(8, (4096, 8)) + np.float32(1e4)
    params, stats = bn.init_params(8), bn.init_batch_stats(8)
    assert guard_triggers(stats, x)
    _, stats = TRAIN(params, stats, x, momentum=0.0)
    assert not guard_triggers(stats, x)


def test_with_the_cumulative_average_the_guard_rests_after_the_first_update():
    x, params = standard_normal(8, (4096, 8)) + np.float32(1e4), bn.init_params(8)
    stats = bn.init_batch_stats(8, use_count=True)
    assert guard_triggers(stats, x)
    _, stats = TRAIN(params, stats, x, momentum=None)
    assert not guard_triggers(stats, x)
    assert_close(stats["mean"], define_moments(x)[1], tolerance=1e-7)


def test_the_first_batch_of_the_cumulative_average_leaves_nothing_of_the_initial_values():
    x = standard_normal(45, (64, 3)) * 1e-6
    stats = {**make_state((3,))[1], "count": jnp.zeros(3)}
    _, updated = TRAIN({}, stats, x, momentum=None)
    _, mean, var = define_moments(x)
    np.testing.assert_allclose(updated["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(updated["var"], var, rtol=1e-5)


def test_the_cumulative_average_counts_what_entered_feature_by_feature():
    xs, stats = standard_normal(46, (5, 8, 3)), bn.init_batch_stats(3, use_count=True)
    poisoned = xs.at[1, 2, 0].set(jnp.nan).at[3, 0, 2].set(jnp.inf)
    for x in poisoned:
        _, stats = TRAIN({}, stats, x, momentum=None)
    entered = np.array([[0, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 4]], object)
    assert stats["count"].tolist() == [4, 5, 4]
    for feature, batches in enumerate(entered):
        moments = [define_moments(xs[batch, :, feature : feature + 1]) for batch in batches]
        mean, var = (np.mean([one[part] for one in moments]) for part in (1, 2))
        assert_close((stats["mean"][feature], stats["var"][feature]), (mean, var))


def test_the_millionth_batch_still_weighs_a_millionth():
    x = standard_normal(47, (64, 1)) * 100 + 1000
    stats = {"mean": jnp.zeros(1), "var": jnp.ones(1), "count": jnp.full(1, 1e6 - 1)}
    _, updated = TRAIN({}, stats, x, momentum=None)
    np.testing.assert_allclose(updated["mean"], define_moments(x)[1] / 1e6, rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999, 0.9999])
def test_the_running_mean_neither_lags_nor_drifts(momentum):
    offset = np.float32(12345.678)
    x, stats = jnp.full((4, 1), offset), bn.init_batch_stats(1)
    _, updated = TRAIN({}, stats, x, momentum=momentum)
    np.testing.assert_allclose(updated["mean"], (1 - momentum) * offset, rtol=1e-6)
    arrived = {"mean": jnp.full(1, offset), "var": jnp.zeros(1)}
    _, updated = TRAIN({}, arrived, x, momentum=momentum)
    chex.assert_trees_all_equal(updated, arrived)


def test_a_momentum_goes_on_counting():
    x, stats = standard_normal(48, (8, 3)), bn.init_batch_stats(3, use_count=True)
    for _ in range(3):
        _, stats = TRAIN({}, stats, x)
    assert stats["count"].tolist() == [3, 3, 3]


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_the_guard_rests_after_the_derived_number_of_updates(momentum):
    # After t updates from 0 the running mean is off by offset * momentum**t.
    offset = 1e4
    updates = np.log(np.sqrt(CANCELLATION_THRESHOLD) / offset) / np.log(momentum)
    x = standard_normal(9, (4096, 1)) + np.float32(offset)
    params, stats = bn.init_params(1), bn.init_batch_stats(1)
    step = jax.jit(partial(TRAIN, momentum=momentum))
    for _ in range(int(updates)):
        assert guard_triggers(stats, x)
        _, stats = step(params, stats, x)
    for _ in range(2):
        _, stats = step(params, stats, x)
    assert not guard_triggers(stats, x)


def test_a_running_mean_that_is_not_finite_does_not_spoil_the_output():
    x, params = standard_normal(10, (16, 2)), bn.init_params(2)
    stats = {"mean": jnp.array([jnp.nan, jnp.inf]), "var": jnp.ones(2)}
    assert_close(TRAIN(params, stats, x)[0], define_batch_norm(params, stats, x)[0])


# --- masks and state --------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_masked_is_the_subset(poison, dtype):
    x, (params, stats) = standard_normal(11, (8, 2, 3)) + 1, make_state((3,))
    valid = np.array([1, 1, 0, 1, 0, 0, 1, 1], bool)
    mask = jnp.asarray(valid.astype(dtype))[:, None, None]
    weights = standard_normal(12, x.shape)

    def loss(params, x, mask, weights):
        y, updated = TRAIN(params, stats, x, mask=mask)
        kept = y * weights if mask is None else jnp.where(mask.astype(bool), y * weights, 0)
        return jnp.sum(jnp.sin(kept)), (y, updated)

    differentiated = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    poisoned = jnp.where(mask.astype(bool), x, poison)
    (total, (y, updated)), (of_params, of_x) = differentiated(params, poisoned, mask, weights)
    subset = differentiated(params, x[valid], None, weights[valid])
    (expected, (expected_y, expected_stats)), (expected_of_params, expected_of_x) = subset
    assert_close(total, expected)
    assert_close(y[valid], expected_y)
    assert_close(updated, expected_stats)
    assert_close(of_params, expected_of_params)
    assert_close(of_x[valid], expected_of_x)
    assert (of_x[~valid] == 0).all()


def test_masked_is_the_subset_in_forward_mode():
    x, (params, stats) = standard_normal(37, (8, 3)).at[2].set(jnp.nan), make_state((3,))
    valid = np.arange(8) != 2
    dx = standard_normal(38, x.shape).at[2].set(jnp.inf)

    def push(rows, mask):
        train = partial(TRAIN, params, stats, mask=mask)
        _, (dy, updated) = jax.jvp(train, (x[rows],), (dx[rows],))
        return dy, updated

    dy, updated = jax.jit(partial(push, slice(None)))(valid[:, None])
    assert_close((dy[valid], updated), jax.jit(partial(push, valid))(None))


def test_every_position_is_normalized():
    x, (params, stats) = standard_normal(13, (6, 3)), make_state((3,))
    mask = jnp.array([True, True, True, True, False, False])[:, None]
    y, _ = TRAIN(params, stats, x, mask=mask)
    _, mean, var = define_moments(x, mask=mask)
    assert_close(y, define_affine(x, mean, var, **params))


def test_a_feature_with_nothing_valid_keeps_its_statistics():
    x, (params, stats) = standard_normal(14, (6, 3)).at[:, 1].set(jnp.nan), make_state((3,))
    mask = jnp.array([[True, False, True]])
    y, updated = TRAIN(params, stats, x, mask=mask)
    kept = jnp.array([0, 2])
    expected = define_batch_norm(
        *({name: leaf[kept] for name, leaf in tree.items()} for tree in (params, stats)),
        x[:, kept],
    )
    assert_close((y[:, kept], {n: leaf[kept] for n, leaf in updated.items()}), expected)
    for name in stats:
        assert updated[name][1] == stats[name][1]


@pytest.mark.parametrize(
    "shape", [(6, 1, 1, 1), (1, 2, 4, 1), (4, 1), (1, 1, 1, 3), (3,), (), (6, 2, 4, 3), (2, 1, 3)]
)
@pytest.mark.parametrize(
    ("weighted", "axis"),
    [
        (False, -1),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in ((True, -1), (False, 1), (True, 1), (False, (2, 3)), (True, (2, 3)))
        ),
    ],
)
def test_a_mask_broadcasts_from_any_side(shape, weighted, axis):
    x = standard_normal(39, (6, 2, 4, 3)) + 1
    weights = np.abs(standard_normal(40, shape)) + 0.1
    chosen = np.asarray(standard_normal(41, shape)) > -0.7
    # The first entry stays, so that no feature is left without any value for lack of luck.
    chosen = chosen | (np.arange(chosen.size).reshape(shape) == 0)
    mask = weights * chosen if weighted else chosen
    valid = np.broadcast_to(chosen, x.shape)
    params, stats = make_state(features_of(x.shape, axis))
    train = jax.jit(partial(TRAIN, axis=axis))
    y, updated = train(params, stats, jnp.where(valid, x, jnp.nan), mask=mask)
    count, mean, var = define_moments(x, axis, mask)
    some = count > 0
    expected, expected_stats = define_batch_norm(params, stats, x, axis=axis, mask=mask)
    for name, old in stats.items():
        assert_close(updated[name], np.where(some, expected_stats[name], old))
    mean, var = np.where(some, mean, stats["mean"]), np.where(some, var, stats["var"])
    expected = define_affine(x, mean, var, **params, axis=axis)
    assert_close(y[valid], expected[valid])


def test_a_loss_on_a_masked_position_reaches_it_through_normalization_alone():
    x, (params, stats) = standard_normal(42, (6, 3)), make_state((3,))
    mask = jnp.array([True, True, False, True, True, True])[:, None]
    gradient = jax.grad(lambda x: TRAIN(params, stats, x, mask=mask)[0][2].sum())(x)
    _, _, var = define_moments(x, mask=mask)
    assert_close(gradient[2], params["scale"] / np.sqrt(var + 1e-5))
    ignoring = jax.grad(lambda x: TRAIN(params, stats, x, mask=mask)[0][3].sum())(x)
    assert (ignoring[2] == 0).all()
    assert (jnp.abs(ignoring[:2]) > 1e-3).any()


@pytest.mark.parametrize("rows", [0, 4])
def test_a_batch_with_nothing_valid(rows):
    x, (params, stats) = standard_normal(15, (rows, 3)), make_state((3,))
    y, updated = TRAIN(params, stats, x, mask=jnp.zeros((rows, 1), bool))
    chex.assert_trees_all_equal(updated, stats)
    assert y.shape == x.shape
    assert_close(y, EVALUATE(params, stats, x)[0])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("virtual_batch_size", [None, 4])
def test_a_poisoned_batch_does_not_poison_the_state(poison, virtual_batch_size):
    x, (params, stats) = standard_normal(16, (8, 3)), make_state((3,))
    _, clean = TRAIN(params, stats, x, virtual_batch_size=virtual_batch_size)
    _, updated = TRAIN(params, stats, x.at[5, 1].set(poison), virtual_batch_size=virtual_batch_size)
    for name in stats:
        assert updated[name][1] == stats[name][1]
        assert_close(updated[name][::2], clean[name][::2])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_what_overflows_where_it_is_stored_does_not_enter(dtype):
    x = standard_normal(43, (64, 2)) * jnp.array([[1.0, 1e20]])
    stats = bn.init_batch_stats(2, dtype=dtype)
    _, updated = TRAIN({}, stats, x, dtype=jnp.float32)
    assert updated["mean"][1] == 0
    assert updated["var"][1] == 1
    _, expected = define_batch_norm({}, stats, x[:, :1])
    for name, values in updated.items():
        assert_close(values[:1], expected[name][:1], dtype=dtype)


def test_a_mean_that_overflows_where_it_is_stored_does_not_enter():
    stats = bn.init_batch_stats(2, dtype=jnp.float16)
    x = standard_normal(62, (64, 2)) + 1e5
    chex.assert_trees_all_equal(TRAIN({}, stats, x, momentum=0.0, dtype=jnp.float32)[1], stats)


def test_statistics_in_double_precision_are_averaged_in_it():
    with jax.enable_x64(True):
        x, stats = standard_normal(44, (64, 3)), bn.init_batch_stats(3, dtype=jnp.float64)
        stats["mean"] = stats["mean"] + 1e-9
        _, updated = TRAIN({}, stats, x, momentum=1.0)
        chex.assert_trees_all_equal(updated, stats)
        _, updated = TRAIN({}, stats, x.at[0].set(jnp.nan))
        chex.assert_trees_all_equal(updated, stats)


def test_one_valid_value_has_no_unbiased_variance_and_updates_nothing():
    x, (params, stats) = standard_normal(17, (4, 3)), make_state((3,))
    mask = jnp.array([[True], [False], [False], [False]])
    _, updated = TRAIN(params, stats, x, mask=mask, running_var_ddof=1)
    chex.assert_trees_all_equal(updated, stats)
    _, updated = TRAIN(params, stats, x, mask=mask, running_var_ddof=0)
    assert_close(updated["mean"], 0.99 * np.float64(stats["mean"]) + 0.01 * np.float64(x[0]))


def test_the_state_keeps_its_type():
    x, (params, _) = standard_normal(18, (8, 3), jnp.bfloat16), make_state((3,))
    for dtype in (jnp.float32, jnp.bfloat16):
        stats = bn.init_batch_stats(3, dtype=dtype)
        _, updated = TRAIN(params, stats, x, dtype=jnp.bfloat16)
        chex.assert_trees_all_equal_shapes_and_dtypes(updated, stats)


def test_initializing_updates_and_synchronizes_nothing():
    params, stats = make_state((3,))
    for x in (standard_normal(19, (1, 3)), standard_normal(19, (6, 3))):
        y, updated = (
            TRAIN(params, stats, x, axis_name="unbound", virtual_batch_size=4, initializing=True)
            if len(x) == 1
            else TRAIN(params, stats, x, axis_name="unbound", initializing=True)
        )
        assert updated is stats
        assert_close(y, define_batch_norm(params, stats, x)[0])


# --- switches ---------------------------------------------------------------------------------

VALID = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)[:, None]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"axis": 0}, {"mask": VALID}, {"mask": VALID * 0.5}, {"virtual_batch_size": 4},
        {"mask": VALID, "virtual_batch_size": 4, "momentum": None, "running_var_ddof": 1},
    ],
    ids=" ".join,
)  # fmt: skip
def test_where_statistics_come_from_and_whether_they_update_are_two_switches(options):
    x, mask = standard_normal(90, (8, 8)) + 2, options.get("mask")
    poisoned = x if mask is None else jnp.where(mask > 0, x, jnp.nan)
    params, stats = make_state((8,))
    if "momentum" in options:
        stats["count"] = jnp.full(8, 3.0)
    by_batch, _ = TRAIN(params, stats, poisoned, **options)
    by_running = define_affine(
        x, stats["mean"], stats["var"], *params.values(), options.get("axis", -1)
    )
    known = {name: value for name, value in options.items() if name != "virtual_batch_size"}
    _, updated = define_batch_norm(params, stats, x, **known)
    valid = np.broadcast_to(True if mask is None else mask > 0, x.shape)
    for use_running_average, expected in ((False, by_batch[valid]), (True, by_running[valid])):
        switched = partial(
            bn.batch_norm, params, stats, poisoned,
            use_running_average=use_running_average, **options,
        )  # fmt: skip
        y, kept = switched(update_running_average=False)
        assert_close(y[valid], expected)
        assert kept is stats
        y, found = switched(update_running_average=True)
        assert_close((y[valid], found), (expected, updated))


def test_no_update_while_initializing():
    x, (params, stats) = standard_normal(91, (1, 3)), make_state((3,))
    switches = dict(update_running_average=True, initializing=True, momentum=None)
    for use_running_average in (False, True):
        _, kept = bn.batch_norm(
            params, stats, x, use_running_average=use_running_average, **switches
        )
        assert kept is stats


def test_an_update_in_evaluation_is_checked_as_in_training():
    params, stats = make_state((3,))
    update = partial(EVALUATE, params, stats, update_running_average=True)
    with pytest.raises(ValueError, match=r"one value per feature .* no update_running_average"):
        update(X[:1])
    with pytest.raises(ValueError, match="momentum=None averages over all batches"):
        update(X, momentum=None)
    with pytest.raises(NameError, match="axis_name='data' is not bound"):
        jax.vmap(partial(update, axis_name="data"), axis_name="batch")(X[:, None])
    still = partial(TRAIN, params, stats, X, update_running_average=False)
    assert_close(still(momentum=None)[0], define_batch_norm(params, stats, X)[0])


# --- activation and residual ------------------------------------------------------------------

ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu, "none": None}


def compose(params, stats, x, residual=None, activation=None, **options):
    y, updated = bn.batch_norm(params, stats, x, **options)
    y = y if residual is None else y + residual.astype(y.dtype)
    return (y if activation is None else activation(y)), updated


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual_are_the_composition(activation, added, use_running_average, dtype):
    x, (params, stats) = standard_normal(56, (6, 3), dtype), make_state((3,))
    residual = standard_normal(57, x.shape, dtype) if added else None
    options = dict(
        activation=ACTIVATIONS[activation], use_running_average=use_running_average, dtype=dtype
    )

    def value_and_gradients(function):
        def loss(params, x, residual):
            y, updated = function(params, stats, x, residual=residual, **options)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, updated)

        argnums = (0, 1, 2) if added else (0, 1)
        # Op by op: compiled as a whole, bfloat16 is not rounded where the other rounds it.
        return jax.grad(loss, argnums, has_aux=True)(params, x, residual)

    found, expected = value_and_gradients(bn.batch_norm), value_and_gradients(compose)
    chex.assert_trees_all_equal_dtypes(found, expected)
    assert_close(found, expected)


def test_activation_and_residual_are_those_of_the_definition():
    x, residual = standard_normal(58, (6, 3)), standard_normal(59, (6, 3))
    params, stats = make_state((3,))
    y, updated = TRAIN(params, stats, x, activation=jax.nn.relu, residual=residual)
    expected, expected_stats = define_batch_norm(params, stats, x)
    expected = np.maximum(expected + np.asarray(residual), 0)
    assert_close((y, updated), (expected, expected_stats), dtype=jnp.float32)
    grouped, _ = TRAIN(
        params, stats, x, activation=jax.nn.relu, residual=residual, virtual_batch_size=3
    )
    halves = [define_batch_norm(params, stats, half)[0] for half in (x[:3], x[3:])]
    assert_close(grouped, np.maximum(np.concatenate(halves) + np.asarray(residual), 0))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["x", "residual"])
@pytest.mark.parametrize("use_running_average", [False, True])
def test_poison_behind_a_mask_does_not_meet_the_activation(use_running_average, where, poison):
    x, residual = standard_normal(60, (6, 3)), standard_normal(61, (6, 3))
    params, stats = make_state((3,))
    params["slope"] = jnp.float32(0.7)
    valid = np.arange(6) != 2

    def loss(params, x, residual, mask):
        slope = params["slope"]
        own = {name: params[name] for name in ("scale", "bias")}
        y, _ = bn.batch_norm(
            own, stats, x, mask=mask, residual=residual, use_running_average=use_running_average,
            activation=lambda y: y * jax.nn.sigmoid(slope * y),
        )  # fmt: skip
        return jnp.sum(jnp.where(mask, jnp.sin(y), 0))

    poisoned = {"x": x, "residual": residual}
    poisoned[where] = poisoned[where].at[2].set(poison)
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    found = gradient(params, *poisoned.values(), jnp.asarray(valid)[:, None])
    expected = gradient(params, x[valid], residual[valid], jnp.ones((5, 1), bool))
    assert_close(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert_close(one[valid], other)
        assert (one[2] == 0).all()


@pytest.mark.parametrize("function", [TRAIN, EVALUATE], ids=["training", "evaluation"])
def test_poison_behind_a_mask_does_not_come_back_from_what_follows(function):
    x, (params, stats) = standard_normal(64, (6, 3)), make_state((3,))
    valid = np.arange(6) != 2

    def loss(params, x, mask):
        y, _ = function(params, stats, x, mask=mask)
        return jnp.sum(jnp.where(mask, jax.nn.silu(y), 0))

    gradient = jax.grad(loss, argnums=(0, 1))
    of_params, of_x = gradient(params, x.at[2].set(jnp.nan), jnp.asarray(valid)[:, None])
    expected = gradient(params, x[valid], jnp.ones((5, 1), bool))
    assert_close((of_params, of_x[valid]), expected)


@pytest.mark.parametrize("activation", [None, jax.nn.silu])
def test_poison_that_is_not_masked_shows_in_the_gradient(activation):
    x, (params, stats) = standard_normal(63, (6, 3)).at[2, 1].set(jnp.nan), make_state((3,))

    def loss(params, mask):
        y, _ = EVALUATE(params, stats, x, mask=mask, activation=activation)
        return jnp.sum(jnp.sin(y))

    of_bias = jax.grad(loss)(params, jnp.ones((6, 1), bool))["bias"]
    assert jnp.isnan(of_bias).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("activation", "added"),
    [
        ("silu", True),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (("relu", False), ("relu", True), ("silu", False))
        ),
    ],
)
@pytest.mark.parametrize("scanned", [False, True])
def test_activation_and_residual_cost_no_more_than_the_composition(
    activation, added, dtype, scanned
):
    x, (params, stats) = jax.ShapeDtypeStruct((64, 14, 14, 32), dtype), make_state((32,))
    options = dict(activation=ACTIVATIONS[activation], use_running_average=False, dtype=dtype)

    def compile_gradients(function):
        def layer(params, x):
            return function(params, stats, x, residual=x if added else None, **options)

        def loss(params, x):
            if not scanned:
                y, updated = layer(params, x)
                return jnp.sum(jnp.square(y.astype(jnp.float32))), updated
            y, updated = jax.lax.scan(lambda x, _: layer(params, x), x, length=4)
            return jnp.sum(jnp.square(y.astype(jnp.float32))), updated

        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jit(gradient).lower(params, x).compile()

    ours, composed = (compile_gradients(function) for function in (bn.batch_norm, compose))
    memory = [one.memory_analysis().temp_size_in_bytes for one in (ours, composed)]
    traffic = [one.cost_analysis()["bytes accessed"] for one in (ours, composed)]
    assert memory[0] <= memory[1]
    assert traffic[0] <= traffic[1]


@pytest.mark.parametrize("activation", [None, jax.nn.silu])
def test_a_scan_keeps_the_input_alone_for_the_backward_pass(activation):
    layers, x = 8, jax.ShapeDtypeStruct((64, 14, 14, 32), jnp.float32)
    params, stats = make_state((32,))

    def loss(x):
        def layer(x, _):
            return TRAIN(params, stats, x, activation=activation)

        return jnp.sum(jax.lax.scan(layer, x, length=layers)[0])

    compiled = jax.jit(jax.grad(loss)).lower(x).compile()
    at_work_in_one_layer = 5
    most = (layers + at_work_in_one_layer) * x.size * x.dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < most


# --- dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_statistics_are_float32_whatever_the_input(dtype, offset):
    x, (params, stats) = standard_normal(20, (256, 3), dtype) + dtype(offset), make_state((3,))
    for function in (TRAIN, EVALUATE):
        y, updated = function(params, stats, x, dtype=dtype)
        assert y.dtype == dtype
        chex.assert_trees_all_equal_dtypes(updated, stats)
    y, updated = TRAIN(params, stats, x, dtype=jnp.float32)
    assert_close((y, updated), define_batch_norm(params, stats, x), dtype=jnp.float32)


def test_the_default_dtype_is_promoted():
    x, (params, stats) = standard_normal(21, (8, 3), jnp.bfloat16), make_state((3,))
    with jax.numpy_dtype_promotion("standard"):
        assert TRAIN(params, stats, x)[0].dtype == jnp.float32
    assert TRAIN({}, stats, x)[0].dtype == jnp.bfloat16


def test_large_float16_does_not_overflow():
    x = jnp.asarray(standard_normal(22, (256, 3)) * 5000, jnp.float16).at[0].set(65504)
    params, stats = bn.init_params(3), bn.init_batch_stats(3)
    y, updated = TRAIN(params, stats, x, dtype=jnp.float32)
    assert_close((y, updated), define_batch_norm(params, stats, x))


# --- transforms -------------------------------------------------------------------------------


def test_vmap_is_a_loop():
    x, (params, stats) = standard_normal(23, (2, 3, 8, 4)), make_state((4,))
    # One of the six cancels, so that under vmap both branches of the guard are taken.
    x = x.at[1, 2].add(1e4)
    mapped = jax.jit(jax.vmap(jax.vmap(TRAIN, (None, None, 0)), (None, None, 0)))(params, stats, x)
    for i, j in itertools.product(range(2), range(3)):
        one = jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], mapped)
        assert_close(one, define_batch_norm(params, stats, x[i, j]))


def test_scan_is_a_loop_and_compiles_once():
    xs, (params, stats) = standard_normal(24, (5, 8, 3)), make_state((3,))

    def step(stats, x):
        y, stats = TRAIN(params, stats, x)
        return stats, y

    scanned, ys = jax.lax.scan(step, stats, xs)
    traced_once = jax.jit(chex.assert_max_traces(lambda *state: TRAIN(*state), n=1))
    for x, y in zip(xs, ys, strict=True):
        expected, stats = traced_once(params, stats, x)
        assert_close(y, expected)
    assert_close(scanned, stats)


def test_momentum_and_epsilon_may_be_traced():
    x, (params, stats) = standard_normal(25, (8, 3)), make_state((3,))
    momenta, epsilons = jnp.array([0.0, 0.5]), jnp.array([1e-3, 1e-1])
    swept = jax.vmap(lambda m, e: TRAIN(params, stats, x, momentum=m, epsilon=e))(momenta, epsilons)
    for number, (momentum, epsilon) in enumerate(zip(momenta, epsilons, strict=True)):
        one = jax.tree.map(lambda leaf, number=number: leaf[number], swept)
        expected = define_batch_norm(
            params, stats, x, momentum=float(momentum), epsilon=float(epsilon)
        )
        assert_close(one, expected)


def test_eval_shape():
    x, (params, stats) = jax.ShapeDtypeStruct((8, 4, 3), jnp.float32), make_state((3,))
    y, updated = jax.eval_shape(TRAIN, params, stats, x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    chex.assert_trees_all_equal_shapes_and_dtypes(updated, stats)


def test_export_to_every_platform():
    x, (params, stats) = standard_normal(26, (8, 3)), make_state((3,))
    step = jax.jit(lambda params, stats, x: jax.grad(
        lambda x: jnp.sum(TRAIN(params, stats, x)[0] ** 3))(x))  # fmt: skip
    exported = jax.export.export(step, platforms=["cpu", "cuda", "tpu"])(params, stats, x)
    assert_close(exported.call(params, stats, x), step(params, stats, x))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape,axis", [((12, 2, 3), -1), ((3, 12), 0), ((12, 3, 2), (1, 2))])
def test_virtual_batches_are_batches_of_their_own(shape, axis, masked):
    x, (params, stats) = standard_normal(30, shape), make_state(features_of(shape, axis))
    batch_axis = 1 if axis == 0 else 0
    valid = np.array([1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0], bool) if masked else np.ones(12, bool)
    mask_shape = [12 if a == batch_axis else 1 for a in range(len(shape))]
    mask = jnp.asarray(valid).reshape(mask_shape) if masked else None
    train = jax.jit(partial(TRAIN, axis=axis, virtual_batch_size=4))
    y, updated = train(params, stats, x, mask=mask)
    x, y = np.asarray(x), np.asarray(y)
    for number in range(3):
        rows = np.arange(4 * number, 4 * number + 4)
        rows = rows[valid[rows]]
        if len(rows):
            subset = np.take(x, rows, batch_axis)
            expected, _ = define_batch_norm(params, stats, subset, axis=axis)
            assert_close(np.take(y, rows, batch_axis), expected)
    everything = np.take(x, np.flatnonzero(valid), batch_axis)
    assert_close(updated, define_batch_norm(params, stats, everything, axis=axis)[1])


# --- the two halves of training ---------------------------------------------------------------


@pytest.mark.parametrize("virtual_batch_size", [None, 4])
@pytest.mark.parametrize("momentum,running_var_ddof", [(0.9, 1), (None, 0)])
def test_several_batches_make_one_update(virtual_batch_size, momentum, running_var_ddof):
    x, (params, stats) = standard_normal(56, (16, 2, 3)) + 5, make_state((3,))
    mask = jnp.asarray(np.arange(16) % 5 < 3)[:, None, None]
    stats["count"] = jnp.full(3, 2.0)
    options = dict(momentum=momentum, running_var_ddof=running_var_ddof)
    half = jax.jit(
        partial(bn.normalize_by_batch, params, stats, virtual_batch_size=virtual_batch_size)
    )
    outputs, parts = zip(
        *(half(part, mask=own) for part, own in ((x[:4], mask[:4]), (x[4:], mask[4:]))), strict=True
    )
    merged = bn.merge_moments(*parts)
    updated = bn.update_batch_stats(stats, merged, **options)
    valid = np.arange(16) % 5 < 3
    assert_close(updated, define_batch_norm(params, stats, x[valid], **options)[1])
    if virtual_batch_size is None:
        expected, _ = define_batch_norm(params, stats, x[4:][valid[4:]])
        assert_close(outputs[1][valid[4:]], expected)


def test_moments_that_do_not_fit_the_statistics():
    moments = bn.moments(standard_normal(57, (4, 2, 3)), 0)
    with pytest.raises(ValueError, match=r"shapes \(\(\), \(2, 3\), \(2, 3\)\) .* of shape \(3,\)"):
        bn.update_batch_stats(bn.init_batch_stats(3), moments)


# --- bad input --------------------------------------------------------------------------------

X = np.ones((4, 3), np.float32)

BAD_INPUT = {
    "features": (
        dict(x=np.ones((4, 5), np.float32)), ValueError,
        r"x of shape \(4, 5\) has features of shape \(5,\) on axis=-1, but params has "
        r"\{'bias': \(3,\), 'scale': \(3,\)\} and batch_stats has \{'mean': \(3,\), 'var': "
        r"\(3,\)\}",
    ),
    "integer": (dict(x=np.ones((4, 3), np.int32)), TypeError, "x has dtype int32; .*Cast it"),
    "boolean": (dict(x=np.ones((4, 3), bool)), TypeError, "x has dtype bool; .*Cast it"),
    "mask": (
        dict(mask=np.ones(4, bool)), ValueError,
        r"mask of shape \(4,\) does not broadcast to x of shape \(4, 3\)",
    ),
    "mask of higher rank": (
        dict(mask=np.ones((1, 4, 3), bool)), ValueError,
        r"mask of shape \(1, 4, 3\) does not broadcast to x of shape \(4, 3\)",
    ),
    "axis out of range": (dict(axis=2), ValueError, "axis=2 is out of range for x of rank 2"),
    "axis repeated": (
        dict(axis=(1, -1)), ValueError, r"axis=\(1, -1\) names an axis of x \(rank 2\) more than",
    ),
    "virtual_batch_size": (
        dict(virtual_batch_size=3), ValueError,
        r"virtual_batch_size=3 does not divide the batch of 4 examples. The nearest divisors are "
        r"\[2, 4\]",
    ),
    "virtual_batch_size zero": (
        dict(virtual_batch_size=0), ValueError, r"The nearest divisors are \[1\]",
    ),
    "virtual batches of one": (dict(virtual_batch_size=1), ValueError, "one value per feature"),
    "virtual and synchronized": (
        dict(virtual_batch_size=2, axis_name="batch"), ValueError, "contradict each other",
    ),
    "one value": (
        dict(x=X[:1]), ValueError,
        r"x of shape \(1, 3\) with axis=-1 has one value per feature to train on, so that y would "
        "have no derivative by x",
    ),
    "momentum": (dict(momentum=1.1), ValueError, r"momentum=1.1 is outside \[0, 1\]"),
    "negative momentum": (dict(momentum=-0.1), ValueError, r"momentum=-0.1 is outside \[0, 1\]"),
    "epsilon": (dict(epsilon=0.0), ValueError, "epsilon=0.0 must be positive"),
    "running_var_ddof": (dict(running_var_ddof=2), ValueError, "running_var_ddof=2 must be 0"),
    "momentum without a count": (
        dict(momentum=None), ValueError,
        r"momentum=None averages over all batches .* batch_stats has \['mean', 'var'\].*use_count",
    ),
    "residual": (
        dict(residual=np.ones((4, 1), np.float32)), ValueError,
        r"residual of shape \(4, 1\) cannot be added to x of shape \(4, 3\)",
    ),
    "integer residual": (
        dict(residual=np.ones((4, 3), np.int32)), TypeError, "residual has dtype int32; .*Cast it",
    ),
    "activation": (
        dict(activation="relu"), TypeError, "activation='relu' is not a function: .*jax.nn.relu",
    ),
    "real dtype of complex x": (
        dict(x=np.ones((4, 3), np.complex64), dtype=jnp.float32), TypeError,
        r"dtype=float32 would discard the imaginary part: .*\['complex64', 'float32', 'float32'\]",
    ),
    "complex mean of real x": (
        dict(batch_stats=bn.init_batch_stats(3, dtype=jnp.complex64)), TypeError,
        r"batch_stats has a complex mean, but x has dtype float32",
    ),
    "count": (
        dict(batch_stats={**bn.init_batch_stats(3), "count": np.zeros((), np.float32)}), ValueError,
        r"batch_stats has \{'mean': \(3,\), 'var': \(3,\), 'count': \(\)\}",
    ),
    "dtype": (dict(dtype=jnp.int32), TypeError, "dtype=int32 is not a floating-point dtype"),
    "params": (
        dict(params={"gamma": np.ones(3, np.float32)}), ValueError,
        r"params has the unknown entries \['gamma'\]",
    ),
    "batch_stats": (
        dict(batch_stats={"mean": np.ones(3, np.float32)}), ValueError,
        r"batch_stats lacks \['var'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    changes, error, message = BAD_INPUT[case]
    arguments = {
        "params": bn.init_params(3), "batch_stats": bn.init_batch_stats(3), "x": X, **changes
    }  # fmt: skip
    with pytest.raises(error, match=message):
        jax.eval_shape(partial(TRAIN, **{k: v for k, v in arguments.items() if k in changes}), **{
            k: v for k, v in arguments.items() if k not in changes})  # fmt: skip


def test_one_value_per_device_is_enough_when_synchronized():
    x, (params, stats) = standard_normal(32, (4, 1, 3)), make_state((3,))
    y, _ = jax.vmap(partial(TRAIN, params, stats, axis_name="data"), axis_name="data")(x)
    assert_close(y[:, 0], define_batch_norm(params, stats, x[:, 0])[0])


def test_a_mask_that_leaves_one_value_is_no_error():
    x, (params, stats) = standard_normal(33, (4, 3)), make_state((3,))
    mask = jnp.array([[False], [True], [False], [False]])
    y, _ = TRAIN(params, stats, x, mask=mask)
    assert_close(y[1], params["bias"])


# --- a state that is measured -------------------------------------------------------------------


MEASURING = {
    "plain": {},
    "unbiased": dict(running_var_ddof=1),
    "cumulative, without the count that averaging needs": dict(momentum=None),
    "ghost groups": dict(virtual_batch_size=2),
    "ghost groups by index": dict(axis_name="data", axis_index_groups=[[0], [1]]),
}


@pytest.mark.parametrize("use_running_average", [True, False])
@pytest.mark.parametrize("name", MEASURING)
def test_batches_are_measured_instead_of_averaged(use_running_average, name):
    options, masked = MEASURING[name], name != "plain"
    call = partial(bn.batch_norm, use_running_average=use_running_average, **options)
    params, stats = make_state(3)
    batches = [standard_normal(seed, (size, 3)) * 2 + 5 for seed, size in enumerate([4, 6])]
    masks = [standard_normal(9 + seed, x.shape) > -0.5 if masked else None for seed, x in
             enumerate(batches)]  # fmt: skip
    state = start_measuring(stats)
    for x, mask in zip(batches, masks, strict=True):
        y, state = call(params, state, x, mask=mask)
        expected, _ = call(params, stats, x, mask=mask, update_running_average=False)
        assert_close(y, expected)
    mask = np.concatenate(masks) if masked else None
    count, mean, var = define_moments(np.concatenate(batches), -1, mask)
    ddof = np.full(3, options.get("running_var_ddof", 0))
    calls = (np.full(3, len(batches) * by) for by in (use_running_average, not use_running_average))
    expected = [count, mean, var, ddof, *calls]
    assert_close(list(state.pop("measured")[:6]), expected, dtype=jnp.float32)
    chex.assert_trees_all_equal(state, stats)


def test_only_a_call_that_would_update_measures():
    params, stats = make_state(3)
    state, x = start_measuring(stats), standard_normal(0, (4, 3))
    for use, options in (
        (True, dict(update_running_average=False)),
        (False, dict(update_running_average=False)),
        (True, dict(initializing=True)),
        (False, dict(initializing=True)),
    ):
        _, after = bn.batch_norm(params, state, x, use_running_average=use, **options)
        chex.assert_trees_all_equal(after, state)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_batches_far_from_zero_are_measured_to_the_last_place(offset):
    """The mean of a batch, rounded, is up to 0.03 standard deviations off at the farther one."""
    batches = [standard_normal(seed, (size, 3)) + offset for seed, size in enumerate([40, 24, 64])]
    state = start_measuring(bn.init_batch_stats(3))
    for x in batches:
        _, state = EVALUATE({}, state, x)
    count, mean, var, *_, residue = state["measured"]
    expected = define_moments(np.concatenate(batches))
    assert_close((count, mean, var), expected, tolerance=1e-6)
    difference = exact(mean) + exact(residue) - expected[1]
    assert np.abs(difference).max() < 1e-5


@pytest.mark.parametrize("poison", [np.nan, np.inf, "nothing valid"])
def test_only_features_with_finite_moments_are_measured(poison):
    params, stats = make_state(3)
    state = start_measuring(stats)
    x, more = standard_normal(0, (4, 3)), standard_normal(1, (6, 3))
    mask = jnp.ones((6, 3), bool)
    if poison == "nothing valid":
        mask = mask.at[:, 1].set(False)
    else:
        more = more.at[2, 1].set(poison)
    for batch, chosen in (more, mask), (x, None), (more, mask):
        _, state = EVALUATE(params, state, batch, mask=chosen)
    with np.errstate(invalid="ignore"):
        count, mean, var = define_moments(np.concatenate([more, x, more]))
    count[1], mean[1], var[1] = (found[1] for found in define_moments(x))
    assert_close(state["measured"][:3], (count, mean, var))


def test_evaluation_measures_what_training_refuses():
    params, stats = make_state(3)
    state, x = start_measuring(stats), standard_normal(0, (7, 3))
    options = dict(axis_name="data", axis_index_groups=[[0], [1]])
    for rows, kept in (x[:1], {}), (x[1:4], dict(virtual_batch_size=2)), (x[4:], options):
        with pytest.raises(ValueError, match=r"one value per feature|(does not|cannot) divide"):
            TRAIN(params, state, rows, **kept)
        _, state = EVALUATE(params, state, rows, **kept)
    assert_close(state["measured"][:3], define_moments(x))


@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.complex64])
def test_what_is_measured_keeps_its_type_through_a_scan(x_dtype):
    state = start_measuring(bn.init_batch_stats(3, dtype=x_dtype))
    x = (standard_normal(0, (4, 5, 3), x_dtype) + 2).astype(x_dtype)

    def step(state, x):
        y, state = EVALUATE({}, state, x)
        return state, y

    after, _ = jax.jit(lambda state, x: jax.lax.scan(step, state, x))(state, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    found = after["measured"]
    assert found.var.dtype == jnp.float32
    assert_close(found[:3], define_moments(x.reshape(-1, 3)))


def test_devices_measure_the_whole_batch():
    params, stats = make_state(3)
    x = standard_normal(0, (4, 2, 3))

    def call(state, x, axis_index_groups=None):
        return EVALUATE(
            params, state, x, axis_name="data", axis_index_groups=axis_index_groups
        )[1]  # fmt: skip

    def mapped(call):
        return jax.jit(jax.vmap(call, in_axes=(None, 0), axis_name="data"))

    together = mapped(call)(start_measuring(stats), x)["measured"]
    pairs = partial(call, axis_index_groups=[[0, 1], [2, 3]])
    apart = mapped(pairs)(start_measuring(stats), x)["measured"]
    for device in range(4):
        of_device = [leaf[device] for leaf in together[:3]]
        assert_close(of_device, list(define_moments(x.reshape(-1, 3))))
        group = x[:2] if device < 2 else x[2:]
        of_device = [leaf[device] for leaf in apart[:3]]
        assert_close(of_device, list(define_moments(group.reshape(-1, 3))))


def test_what_is_measured_has_the_shape_of_the_features():
    state = {
        **bn.init_batch_stats(3),
        "measured": start_measuring(bn.init_batch_stats(2))["measured"],
    }
    with pytest.raises(ValueError, match=r"'measured.count': \(2,\)"):
        EVALUATE({}, state, jnp.ones((2, 3)))


# --- the identity -------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("axis", [-1, (0, 2)])
def test_identity_params(offset, masked, axis):
    x = standard_normal(0, (6, 5, 3)) * jnp.array([[[1.0, 20.0, 0.01]]]) + offset
    mask = standard_normal(1, (6, 5, 1)) > -0.5 if masked else None
    if masked:
        poisoned = jnp.where(mask, x, jnp.nan)
        chex.assert_trees_all_equal(
            bn.identity_params(poisoned, axis=axis, mask=mask),
            bn.identity_params(x, axis=axis, mask=mask),
        )
    params = bn.identity_params(x, axis=axis, epsilon=1e-3, mask=mask)
    features = features_of(x.shape, axis)
    y, _ = TRAIN(params, bn.init_batch_stats(features), x, axis=axis, epsilon=1e-3, mask=mask)
    assert_close(y, x, dtype=jnp.float32, tolerance=1e-6)


def test_identity_params_over_devices_and_of_other_dtypes():
    x = standard_normal(0, (4, 6, 3), jnp.bfloat16)

    def call(x):
        params = bn.identity_params(x, axis_name="data")
        return TRAIN(params, bn.init_batch_stats(3), x, axis_name="data", dtype=jnp.float32)[0]

    y = jax.jit(jax.vmap(call, axis_name="data"))(x)
    assert_close(y, x.astype(jnp.float32), tolerance=1e-6)
    params = bn.identity_params(standard_normal(0, (6, 3), jnp.complex64))
    assert (params["scale"].dtype, params["bias"].dtype) == (jnp.float32, jnp.complex64)
    with pytest.raises(ValueError, match="epsilon=0 must be positive"):
        bn.identity_params(x, epsilon=0)
