"""What a mask leaves out of batch norm, and what it keeps."""

import re
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    assert_close,
    define_affine,
    define_batch_norm,
    define_moments,
    features_of,
    make_state,
    quick,
    standard_normal,
)

import bn_jax as bn

TRAIN: Any = partial(bn.batch_norm, use_running_average=False)
EVALUATE: Any = partial(bn.batch_norm, use_running_average=True)
RENORM: Any = partial(bn.batch_renorm, use_running_average=False)
NORMALIZE: Any = bn.normalize_by_batch

pytestmark = pytest.mark.usefixtures("strict_promotion")


@pytest.mark.parametrize("poison", [0.0, np.nan, np.inf, 3e38])
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


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("poison", [0.0, np.nan])
def test_second_derivatives_of_the_masked_are_those_of_the_subset(outer, poison):
    x, (params, stats) = standard_normal(39, (6, 2)), make_state((2,))
    valid = np.array([1, 0, 1, 1, 0, 1], bool)

    def loss(params, x, mask):
        y, _ = TRAIN(params, stats, x, mask=mask)
        squares = jnp.sin(y) ** 2
        return jnp.sum(squares if mask is None else jnp.where(mask, squares, 0))

    def second(x, mask):
        by_both = outer(jax.grad(loss, (0, 1)), (0, 1))
        return jax.jit(by_both)(params, x, mask)

    mask = jnp.asarray(valid)[:, None]
    of_params, of_x = second(jnp.where(mask, x, poison), mask)
    expected_of_params, expected_of_x = second(x[valid], None)
    for name in ("scale", "bias"):
        assert_close(of_params[name][0], expected_of_params[name][0], tolerance=1e-4)
        by_x = of_params[name][1]
        assert_close(by_x[:, valid], expected_of_params[name][1], tolerance=1e-4)
        assert not by_x[:, ~valid].any()
    assert_close(of_x[1][valid][:, :, valid], expected_of_x[1], tolerance=1e-4)
    assert not of_x[1][~valid].any()


def test_a_gradient_penalty_does_not_meet_what_is_masked():
    x, (params, stats) = standard_normal(42, (6, 2)), make_state((2,))
    mask = jnp.array([True, False, True, True, False, True])[:, None]

    def loss(params, x):
        y, _ = TRAIN(params, stats, x, mask=mask)
        return jnp.sum(jnp.where(mask, jnp.sin(y) ** 2, 0))

    def penalty(x):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jax.grad(loss)(params, x)))

    found = jax.grad(penalty)(jnp.where(mask, x, jnp.nan))
    assert_close(found, jax.grad(penalty)(x), tolerance=1e-5)
    assert found.any()


@pytest.mark.parametrize("poison", [0.0, np.nan])
def test_vmap_of_the_masked(poison):
    x, (params, stats) = standard_normal(40, (2, 3, 6, 2)), make_state((2,))
    masks = standard_normal(41, (2, 3, 6, 1)) > -0.5
    poisoned = x.at[1, 1].set(jnp.where(masks[1, 1], x[1, 1], poison))

    def loss(params, x, mask):
        y, updated = TRAIN(params, stats, x, mask=mask)
        return jnp.sum(jnp.sin(jnp.where(mask, y, 0)) * jnp.arange(12.0).reshape(6, 2)), updated

    one = jax.value_and_grad(loss, (0, 1), has_aux=True)
    mapped = jax.vmap(jax.vmap(one, (None, 0, 0)), (None, 0, 0))
    found = jax.jit(mapped)(params, poisoned, masks)
    for index in np.ndindex(2, 3):
        expected = one(params, x[index], masks[index])
        chosen = jax.tree.map(lambda leaf, index=index: leaf[index], found)
        assert_close(chosen, expected, tolerance=1e-5)

    def total(params, x):
        return jnp.sum(jax.vmap(jax.vmap(loss, (None, 0, 0)), (None, 0, 0))(params, x, masks)[0])

    of_params, of_x = jax.jit(jax.grad(total, (0, 1)))(params, poisoned)
    by_example, expected_of_x = found[1]
    assert_close(of_params, jax.tree.map(lambda leaf: leaf.sum((0, 1)), by_example))
    assert_close(of_x, expected_of_x)


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
    params_kept, stats_kept = (
        {name: leaf[kept] for name, leaf in tree.items()} for tree in (params, stats)
    )
    expected = define_batch_norm(params_kept, stats_kept, x[:, kept])
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


@pytest.mark.parametrize("poison", quick([np.nan, np.inf], [np.nan]))
@pytest.mark.parametrize("where", ["x", "residual"])
@pytest.mark.parametrize("use_running_average", [False, True])
def test_masked_poison_does_not_meet_the_activation(use_running_average, where, poison):
    x, residual = standard_normal(60, (6, 3)), standard_normal(61, (6, 3))
    params, stats = make_state((3,))
    params["slope"] = jnp.float32(0.7)
    valid = np.arange(6) != 2

    def loss(params, x, residual, mask):
        slope = params["slope"]
        own: Any = {name: params[name] for name in ("scale", "bias")}
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
def test_masked_poison_does_not_come_back_from_later_layers(function):
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


# --- weights that are none ------------------------------------------------------------------------

# Every function that takes a mask, on x [4, 5, 6] and a mask of the same rank.
TAKES_MASKS: dict[str, Any] = {
    "batch_norm": lambda x, mask: TRAIN(*make_state((6,)), x, mask=mask),
    "ghosts": lambda x, mask: TRAIN(*make_state((6,)), x, mask=mask, virtual_batch_size=2),
    "evaluation": lambda x, mask: EVALUATE(*make_state((6,)), x, mask=mask),
    "batch_renorm": lambda x, mask: RENORM(*make_state((6,)), x, mask=mask),
    "normalize_by_batch": lambda x, mask: NORMALIZE(*make_state((6,)), x, mask=mask),
    "whitening_norm": lambda x, mask: bn.whitening_norm(
        {}, bn.init_whitening_stats(6), x, mask=mask, use_running_average=False
    ),
    "identity_params": lambda x, mask: bn.identity_params(x, mask=mask),
    "moments": lambda x, mask: bn.moments(x, (0, 1), mask=mask),
    "layer_norm": lambda x, mask: bn.layer_norm({}, x, mask=mask, reduction_axes=(0, 1, 2)),
    "rms_norm": lambda x, mask: bn.rms_norm({}, x, mask=mask, reduction_axes=(0, 1, 2)),
    "group_norm": lambda x, mask: bn.group_norm(
        {}, x, mask=mask, num_groups=2, reduction_axes=(0, 1, 2)
    ),
    "instance_norm": lambda x, mask: bn.instance_norm({}, x, mask=mask),
}
ADDITIVE = np.where(np.arange(4)[:, None, None] < 2, 0, -1e9).astype(np.float32)
NO_WEIGHTS: dict[str, tuple[Any, str]] = {
    "additive": (ADDITIVE, "mask has 2 weights that are negative or not finite, -1000000000.0 for"),
    "of NumPy": (np.float64(-1), "mask has 1 weights .* mask == 0 for an additive attention mask"),
    "NaN": (jnp.ones((4, 1, 1)).at[1].set(jnp.nan), "mask has 1 weights .*, nan for example"),
    "infinite": (jnp.full((4, 1, 1), jnp.inf, jnp.bfloat16), "mask has 4 weights .*, inf for"),
    "of integers": (jnp.arange(-1, 3)[:, None, None], "mask has 1 weights .*, -1 for example"),
    "a list": ([[[1.0]], [[-0.5]], [[1.0]], [[1.0]]], "mask has 1 weights .*, -0.5 for example"),
}


@pytest.mark.parametrize("case", NO_WEIGHTS)
def test_known_weights_are_finite_and_not_negative(case):
    mask, message = NO_WEIGHTS[case]
    for function in TAKES_MASKS.values():
        with pytest.raises(ValueError, match=message):
            function(jnp.ones((4, 5, 6)), mask)
    if case != "a list":
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda x: TAKES_MASKS["moments"](x, mask), jnp.ones((4, 5, 6)))


def test_what_the_message_advises_is_the_boolean_mask():
    x, state = standard_normal(50, (4, 5, 6)) + 5, make_state((6,))
    assert_close(TRAIN(*state, x, mask=ADDITIVE == 0), TRAIN(*state, x, mask=ADDITIVE > -1))


def test_a_complex_mask_is_an_error():
    with pytest.raises(TypeError, match="mask has dtype complex64; expected booleans or real"):
        bn.moments(jnp.ones(3), mask=jnp.ones(3, complex))


@pytest.mark.parametrize(
    "function", quick(list(TAKES_MASKS), ["batch_norm", "whitening_norm", "layer_norm"])
)
def test_traced_weights_that_are_none_count_as_zero(function):
    x, call = standard_normal(51, (4, 5, 6)) + 5, TAKES_MASKS[function]
    weights = jnp.asarray([1.0, -1.0, 2.0, jnp.nan, 0.5])[None, :, None]
    usable = jnp.asarray([1.0, 0.0, 2.0, 0.0, 0.5])[None, :, None]

    def loss(x, mask):
        out = call(x, mask)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    others = jnp.where(jnp.isnan(weights), jnp.inf, jnp.where(weights < 0, -1e9, weights))
    expected = run(x, usable)
    assert jnp.abs(expected[1][1]).max() > 1e-3 or function == "evaluation"
    for mask in (weights, others):
        chex.assert_trees_all_equal(run(x, mask), expected)
    assert (expected[1][1][0, jnp.array([1, 3])] == 0).all()
    integers = jnp.asarray([1, -1, 2, -7, 0])[None, :, None]
    found, wanted = (jax.jit(call)(x, mask) for mask in (integers, jnp.maximum(integers, 0)))
    chex.assert_trees_all_equal(found, wanted)


def test_boolean_masks_and_their_checks_cost_nothing():
    def selections(mask):
        return str(jax.make_jaxpr(TAKES_MASKS["moments"])(jnp.ones((4, 5, 6)), mask)).count(
            "is_finite"
        )

    mask = jnp.ones((4, 1, 1))
    assert selections(mask) == selections(mask.astype(bool)) + 1


# --- which axes are meant -------------------------------------------------------------------------


def test_a_mask_of_fewer_axes_broadcasts_by_its_last():
    x = standard_normal(52, (3, 4, 5))
    mask = standard_normal(53, (4, 5)) > 0
    assert_close(bn.moments(x, mask=mask), bn.moments(x, mask=mask[None]))
    with pytest.raises(
        ValueError, match=r"mask of shape \(3, 4\) does not broadcast to x of shape"
    ):
        bn.moments(x, mask=jnp.ones((3, 4), bool))


@pytest.mark.parametrize("shape", [(6, 6), (6,)])
def test_a_mask_that_fits_the_first_and_the_last_axes_is_an_error(shape):
    x, mask = standard_normal(54, (6, 6, 6)), standard_normal(55, shape) > 0
    message = rf"mask of shape {re.escape(str(shape))} fits the first and the last axes of x of"
    for call in TAKES_MASKS.values() if len(shape) == 2 else [lambda x, m: bn.moments(x, mask=m)]:
        with pytest.raises(ValueError, match=message) as caught:
            call(x, mask)
    # What it advises, done.
    advised = re.findall(r"mask(\[.*?\])", str(caught.value))
    leading, trailing = (eval(f"mask{index}", {"mask": mask}) for index in advised)
    rank = 3 - len(shape)
    assert_close(
        [bn.moments(x, mask=one) for one in (leading, trailing)],
        [bn.moments(x, mask=jnp.expand_dims(mask, axes)) for axes in
         (tuple(range(len(shape), 3)), tuple(range(rank)))],
    )  # fmt: skip
    # No two ways: a scalar, and sizes of one.
    bn.moments(x, mask=jnp.ones((), bool))
    bn.moments(x[:1], mask=jnp.ones((1,), bool))


def test_a_mask_that_leaves_one_value_is_no_error():
    x, (params, stats) = standard_normal(33, (4, 3)), make_state((3,))
    mask = jnp.array([[False], [True], [False], [False]])
    y, _ = TRAIN(params, stats, x, mask=mask)
    assert_close(y[1], params["bias"])
