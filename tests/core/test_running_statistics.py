"""The running statistics of batch norm: what enters them, and the guard that rests on them."""

from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    assert_close,
    define_batch_norm,
    define_evaluation,
    define_gradients,
    define_moments,
    exact,
    make_state,
    standard_normal,
)

import bn_jax as bn
from bn_jax._core.axes import Reduction
from bn_jax._core.moments import CANCELLATION_THRESHOLD, centred_moments
from bn_jax._core.running import start_measuring

TRAIN: Any = partial(bn.batch_norm, use_running_average=False)
EVALUATE: Any = partial(bn.batch_norm, use_running_average=True)

pytestmark = pytest.mark.usefixtures("strict_promotion")


X = np.ones((4, 3), np.float32)


# --- offsets and the guard ------------------------------------------------------------------------


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


# --- averages -------------------------------------------------------------------------------------


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


def test_batches_are_counted_with_a_momentum_too():
    x, stats = standard_normal(48, (8, 3)), bn.init_batch_stats(3, use_count=True)
    for _ in range(3):
        _, stats = TRAIN({}, stats, x)
    assert stats["count"].tolist() == [3, 3, 3]


# --- what does not enter --------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("virtual_batch_size", [None, 4])
def test_a_poisoned_batch_does_not_poison_the_state(poison, virtual_batch_size):
    x, (params, stats) = standard_normal(16, (8, 3)), make_state((3,))
    _, clean = TRAIN(params, stats, x, virtual_batch_size=virtual_batch_size)
    _, updated = TRAIN(params, stats, x.at[5, 1].set(poison), virtual_batch_size=virtual_batch_size)
    for name in stats:
        assert updated[name][1] == stats[name][1]
        assert_close(updated[name][::2], clean[name][::2])


def test_what_overflows_where_it_is_stored_does_not_enter():
    x = standard_normal(43, (64, 2)) * jnp.array([[1.0, 1e20]])
    stats = bn.init_batch_stats(2)
    _, updated = TRAIN({}, stats, x)
    assert updated["mean"][1] == 0
    assert updated["var"][1] == 1
    _, expected = define_batch_norm({}, stats, x[:, :1])
    for name, values in updated.items():
        assert_close(values[:1], expected[name][:1])


def test_a_mean_that_overflows_where_it_is_stored_does_not_enter():
    with jax.enable_x64(True):
        stats = bn.init_batch_stats(2)
        x = exact(standard_normal(62, (64, 2))) + 1e39
        chex.assert_trees_all_equal(TRAIN({}, stats, x, momentum=0.0)[1], stats)


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
    params, _ = make_state((3,))
    for x_dtype in (jnp.bfloat16, jnp.complex64):
        x, stats = standard_normal(18, (8, 3), x_dtype), bn.init_batch_stats(3, dtype=x_dtype)
        assert stats["var"].dtype == jnp.float32
        _, updated = TRAIN(params, stats, x, dtype=x_dtype)
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


# --- switches -------------------------------------------------------------------------------------

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
    by_running = define_evaluation(params, stats, x, options.get("axis", -1))
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
    switches: dict[str, Any] = dict(update_running_average=True, initializing=True, momentum=None)
    for use_running_average in (False, True):
        _, kept = bn.batch_norm(
            params, stats, x, use_running_average=use_running_average, **switches
        )
        assert kept is stats


def test_an_update_in_evaluation_is_checked_as_in_training():
    params, stats = make_state((3,))
    update = partial(EVALUATE, params, stats, update_running_average=True)
    with pytest.warns(UserWarning, match=r"one value per feature .* no update_running_average"):
        update(X[:1])
    with pytest.raises(ValueError, match="momentum=None averages over all batches"):
        update(X, momentum=None)
    with pytest.raises(NameError, match="axis_name='data' is not bound"):
        jax.vmap(partial(update, axis_name="data"), axis_name="batch")(X[:, None])
    still = partial(TRAIN, params, stats, X, update_running_average=False)
    assert_close(still(momentum=None)[0], define_batch_norm(params, stats, X)[0])


# --- a state that is measured ---------------------------------------------------------------------

MEASURING: dict[str, dict[str, Any]] = {
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
    call: Any = partial(bn.batch_norm, use_running_average=use_running_average, **options)
    params, stats = make_state(3)
    batches = [standard_normal(seed, (size, 3)) * 2 + 5 for seed, size in enumerate([4, 6])]
    masks: list[Any] = [
        standard_normal(9 + seed, x.shape) > -0.5 if masked else None
        for seed, x in enumerate(batches)
    ]
    state = start_measuring(stats)
    for x, mask in zip(batches, masks, strict=True):
        y, state = call(params, state, x, mask=mask)
        expected, _ = call(params, stats, x, mask=mask, update_running_average=False)
        assert_close(y, expected)
    mask = np.concatenate(masks) if masked else None
    count, mean, var = define_moments(np.concatenate(batches), -1, mask)
    ddof = np.full(3, options.get("running_var_ddof", 0))
    calls = (np.full(3, len(batches) * by) for by in (use_running_average, not use_running_average))
    measured = [count, mean, var, ddof, *calls]
    assert_close(list(state.pop("measured")[:6]), measured, dtype=jnp.float32)
    chex.assert_trees_all_equal(state, stats)


def test_only_a_call_that_would_update_measures():
    params, stats = make_state(3)
    state, x = start_measuring(stats), standard_normal(0, (4, 3))
    cases: list[tuple[bool, dict[str, Any]]] = [
        (True, dict(update_running_average=False)),
        (False, dict(update_running_average=False)),
        (True, dict(initializing=True)),
        (False, dict(initializing=True)),
    ]
    for use, options in cases:
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
    _, state = EVALUATE(params, state, x[:1])  # without a warning
    for rows, kept in (x[1:4], dict(virtual_batch_size=2)), (x[4:], options):
        with pytest.raises(ValueError, match=r"(does not|cannot) divide"):
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


def test_statistics_that_have_arrived_stay_to_the_bit():
    values = jnp.abs(standard_normal(90, (1000,))) + 0.1
    batch_stats: bn.BatchStats = {"mean": values, "var": values}
    moments = bn.Moments(jnp.ones(()), values, values)
    found = bn.update_batch_stats(batch_stats, moments, momentum=0.99)
    chex.assert_trees_all_equal(found, batch_stats)
    # A sum of shares is off by a rounding for some of them.
    assert (values * jnp.float32(0.99) + values * jnp.float32(0.01) != values).any()


def test_a_weight_of_one_leaves_nothing_of_the_old_value():
    old: bn.BatchStats = {"mean": jnp.full(2, 1e8), "var": jnp.full(2, 1e8)}
    batch = bn.Moments(jnp.ones(()), jnp.array([0.1, 0.3]), jnp.array([0.1, 0.3]))
    found = bn.update_batch_stats(old, batch, momentum=0.0)
    chex.assert_trees_all_equal(found, {"mean": batch.mean, "var": batch.var})
