"""Batch norm against its definition: values, derivatives, dtypes, transforms, bad input."""

import itertools
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
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
    define_evaluation,
    differentiate,
    features_of,
    make_state,
    quick,
    standard_normal,
)

import bn_jax as bn

TRAIN: Any = partial(bn.batch_norm, use_running_average=False)
EVALUATE: Any = partial(bn.batch_norm, use_running_average=True)

pytestmark = pytest.mark.usefixtures("strict_promotion")


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape,axis",
    [((8, 3), -1), ((3, 8), 0), ((4, 5, 3), -1), ((4, 3, 5), 1), ((2, 4, 4, 3), 3),
     ((4, 3, 2), (1, 2)), ((4, 3, 2), (-1, 1)), ((6,), 0), ((6, 2), (0, 1))],
)  # fmt: skip
@pytest.mark.parametrize("present", ["scale bias", "scale", "bias", ""])
def test_training_is_the_definition(shape, axis, present):
    x = standard_normal(0, shape) * 2 + 1
    params, stats = make_state(features_of(shape, axis), present.split())
    one_value = len(features_of(shape, axis)) == len(shape)
    with pytest.warns(UserWarning, match="one value per") if one_value else nullcontext():
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
    assert_close(y, define_evaluation(params, expected, x, epsilon=1e-3))
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
def test_gradients_are_those_of_the_definition(masking):
    x, (params, stats) = standard_normal(1, (5, 2, 3)) + 1, make_state((3,))
    mask = {
        None: None,
        "boolean": standard_normal(2, (5, 2, 1)) > -0.5,
        "weights": jnp.abs(standard_normal(2, (5, 1, 3))),
    }[masking]
    weights = np.asarray(standard_normal(3, x.shape))
    stats_weights = np.asarray(standard_normal(4, (2, 3)))

    def loss(module, function, values):
        state = ({name: values[name] for name in names} for names in (params, stats))
        y, updated = function(*state, values["x"], mask=mask)
        stacked = module.stack([updated["mean"], updated["var"]])
        return module.sum(module.sin(y) * weights) + module.sum(stacked * stats_weights)

    values = {**params, **stats, "x": x}
    expected = {
        name: differentiate(
            lambda value, name=name: loss(np, define_batch_norm, {**values, name: value}), leaf
        )
        for name, leaf in values.items()
    }
    for found in both_modes(partial(loss, jnp, TRAIN))(values):
        assert_close(found, expected)


def both_modes(loss):
    return jax.jit(lambda value: (jax.grad(loss)(value), jax.jacfwd(loss)(value)))


@pytest.mark.parametrize(
    ("shape", "running_var_ddof"),
    quick(
        list(itertools.product([(5, 2, 3), (5, 1, 1), (3,)], [0, 1])),
        [((5, 2, 3), 0), ((5, 1, 1), 1), ((3,), 1)],
    ),
)
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


def test_a_weight_of_zero_has_no_derivative_whatever_the_value():
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


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_statistics_are_float32_whatever_the_input(dtype, offset):
    x, (params, stats) = standard_normal(20, (256, 3), dtype) + dtype(offset), make_state((3,))
    for function in (TRAIN, EVALUATE):
        y, updated = function(params, stats, x, dtype=dtype)
        assert y.dtype == dtype
        chex.assert_trees_all_equal_dtypes(updated, stats)
    # Without the guard, the error of bfloat16 has another bound: test_fast_variance.py.
    fast = dtype != jnp.bfloat16
    y, updated = TRAIN(params, stats, x, dtype=jnp.float32, use_fast_variance=fast)
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


# --- transforms -----------------------------------------------------------------------------------


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
def test_each_virtual_batch_is_a_batch(shape, axis, masked):
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


# --- the two halves of training -------------------------------------------------------------------


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
    shapes = r"shapes \(\(\), \(2, 3\), \(2, 3\)\) .* of the shapes \{'mean': \(3,\), 'var'"
    with pytest.raises(ValueError, match=shapes):
        bn.update_batch_stats(bn.init_batch_stats(3), moments)


# --- bad input ------------------------------------------------------------------------------------

X = np.ones((4, 3), np.float32)


BAD_INPUT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
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
    "virtual and synchronized": (
        dict(virtual_batch_size=2, axis_name="batch"), ValueError, "contradict each other",
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


# --- the identity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("axis", [-1, (0, 2)])
def test_identity_params(offset, masked, axis):
    x = standard_normal(0, (6, 5, 3)) * jnp.array([[[1.0, 20.0, 0.01]]]) + offset
    mask = standard_normal(1, (6, 5, 1)) > -0.5 if masked else None
    if mask is not None:
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
