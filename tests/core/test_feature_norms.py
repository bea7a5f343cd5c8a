from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    assert_close,
    define_gradients,
    define_standardized,
    exact,
    standard_normal,
)

import bn_jax as bn

NORMS: dict[str, Any] = {
    "layer": (bn.layer_norm, (2,)),
    "layer over positions": (partial(bn.layer_norm, reduction_axes=(1, 2)), (1, 2)),
    "group": (partial(bn.group_norm, num_groups=1), (1, 2)),
    "instance": (bn.instance_norm, (1,)),
}
PARAMS = {"scale": standard_normal(0, (64,)), "bias": standard_normal(1, (64,))}


def define(x, axes, mask=None):
    """`axes` are those that the statistics are taken over."""
    normalized = define_standardized(x, axes, mask)
    return normalized * np.asarray(PARAMS["scale"]) + np.asarray(PARAMS["bias"])


@pytest.mark.parametrize(
    ("offset", "spread"), [(0, 1), (3, 1), (1e4, 1), (1e6, 1), (-1e20, 1e16), (0, 1e-12), (0, 1e18)]
)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_the_definition_at_any_offset(name, jit, offset, spread):
    norm, axes = NORMS[name]
    x = standard_normal(2, (3, 32, 64)) * np.float32(spread) + np.float32(offset)
    # Each example has an offset of its own, and so has no guess of the mean in common.
    x = x * jnp.array([1.0, -1.0, 0.25])[:, None, None]
    y = (jax.jit(norm) if jit else norm)(PARAMS, x)
    assert_close(y, define(x, axes))


@pytest.mark.parametrize("offset", [0, 1e4, 1e6])
def test_gradients_of_a_layer_norm_far_from_zero(offset):
    x, cotangent = (standard_normal(seed, (32, 64)) for seed in (10, 11))
    x = x + np.float32(offset)
    _, pull = jax.vjp(bn.layer_norm, PARAMS, x)
    d_params, d_x = pull(cotangent)
    # A layer norm of rows is a batch norm of columns, but for scale and bias.
    plain = {"scale": np.ones(32), "bias": np.zeros(32)}
    through = (exact(cotangent) * exact(PARAMS["scale"])).T
    _, expected = define_gradients(plain, x.T, None, lambda y: through, epsilon=1e-6)
    assert_close(d_x, expected.T)
    of_scale = (exact(cotangent) * define_standardized(x, 1)).sum(0)
    assert_close(d_params, {"scale": of_scale, "bias": exact(cotangent).sum(0)})


@pytest.mark.parametrize("value", [0.0, -7.3, 3e10, 1e30])
@pytest.mark.parametrize("name", NORMS)
def test_a_constant_gives_the_bias(name, value):
    # Sizes whose inverse, and so the mean, is rounded.
    params = jax.tree.map(lambda leaf: leaf[:49], PARAMS)
    y = NORMS[name][0](params, jnp.full((2, 41, 49), value, jnp.float32))
    assert_close(y, np.broadcast_to(params["bias"], y.shape))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", NORMS)
def test_half_precision_is_measured_in_float32(name, dtype):
    norm, axes = NORMS[name]
    x = (standard_normal(3, (2, 32, 64)) + 100).astype(dtype)
    # Without the guard, the error of bfloat16 has another bound: test_fast_variance.py.
    norm = partial(norm, use_fast_variance=dtype != jnp.bfloat16)
    assert_close(norm(PARAMS, x), define(x, axes), dtype=jnp.float32)
    assert_close(norm(PARAMS, x, dtype=dtype), define(x, axes), dtype=dtype)


@pytest.mark.parametrize("name", [*NORMS, "rms"])
def test_what_the_mask_leaves_out_reaches_nothing(name):
    norm, axes = {**NORMS, "rms": (bn.rms_norm, (2,))}[name]
    x, mask = standard_normal(4, (3, 8, 64)), standard_normal(5, (3, 8, 64)) > -0.5
    # The last example has nothing valid.
    mask = mask & (jnp.arange(3) < 2)[:, None, None]
    poisoned = jnp.where(mask, x, jnp.nan)

    def loss(params, x):
        return jnp.sum(jnp.where(mask, jnp.sin(norm(params, x, mask=mask)), 0))

    for found, expected in zip(
        jax.grad(loss, (0, 1))(PARAMS, poisoned), jax.grad(loss, (0, 1))(PARAMS, x), strict=True
    ):
        assert_close(found, expected)
    y = norm(PARAMS, x, mask=mask)
    scale, bias = np.asarray(PARAMS["scale"]), np.asarray(PARAMS["bias"])
    # It counts as normalized.
    assert_close(y[2], np.asarray(x[2]) * scale + bias)
    if name == "rms":
        normalized = define_standardized(x[:2], 2, mask[:2], about_zero=True)
        assert_close(y[:2], normalized * scale + bias)
    else:
        assert_close(y[:2], define(x[:2], axes, mask[:2]))


@pytest.mark.parametrize("norm", [bn.layer_norm, bn.rms_norm, bn.group_norm, bn.instance_norm])
def test_the_dtype_of_the_result_is_that_of_x_and_params_promoted(norm):
    x = jnp.ones((2, 3, 64), jnp.bfloat16)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    assert norm(half, x).dtype == jnp.bfloat16
    assert norm(PARAMS, x).dtype == norm(half, x, dtype=jnp.float32).dtype == jnp.float32


X = jnp.ones((2, 3, 4))
FOUR = bn.init_params(4)
ERRORS: dict[str, Any] = {
    "integers": (bn.layer_norm, FOUR, X.astype(int), {}, TypeError, "x has dtype int32"),
    "features": (
        bn.layer_norm, bn.init_params(3), X, {}, ValueError,
        r"x of shape \(2, 3, 4\) has features of shape \(4,\) on feature_axes=-1, but params has "
        r"{'scale': \(3,\), 'bias': \(3,\)}.*make new trees with bn_jax.init_params\(\(4,\)\)",
    ),
    "features of groups": (
        bn.group_norm, bn.init_params(3), X, {"num_groups": 2}, ValueError,
        r"features of shape \(4,\) on feature_axes=-1, but params",
    ),
    "entries": (
        bn.rms_norm, {"kernel": X}, X, {}, ValueError, r"params has the unknown entries \['kernel'"
    ),
    "axes": (
        bn.layer_norm, FOUR, X, {"reduction_axes": 3}, ValueError, "reduction_axes=3 is out of"
    ),
    "axes twice": (
        bn.layer_norm, FOUR, X, {"reduction_axes": (2, -1)}, ValueError, "more than once"
    ),
    "epsilon": (bn.rms_norm, FOUR, X, {"epsilon": 0.0}, ValueError, "epsilon=0.0 must be positive"),
    "mask": (
        bn.layer_norm, FOUR, X, {"mask": jnp.ones(3)}, ValueError, r"mask of shape \(3,\) does not"
    ),
    "dtype": (bn.layer_norm, FOUR, X, {"dtype": jnp.int32}, TypeError, "dtype=int32 is not a"),
    "groups without an axis": (
        bn.layer_norm, FOUR, X, {"axis_index_groups": [[0]]}, ValueError, "without axis_name"
    ),
    "default of 32 groups": (
        bn.group_norm, FOUR, X, {}, ValueError,
        r"num_groups=32 does not divide the 4 features of x: pass one of \[1, 2, 4\]",
    ),
    "group size": (
        bn.group_norm, FOUR, X, {"num_groups": None, "group_size": 3}, ValueError,
        "group_size=3 does not divide the 4 features",
    ),
    "number and size of groups": (
        bn.group_norm, FOUR, X, {"group_size": 2}, ValueError,
        "num_groups=32 and group_size=2: give one of them",
    ),
    "neither": (
        bn.group_norm, FOUR, X, {"num_groups": None}, ValueError, "num_groups=None and group_size="
    ),
    "groups beside the axes": (
        bn.group_norm, FOUR, X, {"num_groups": 2, "reduction_axes": (1,)}, ValueError,
        r"reduction_axes=\(1,\) lacks the last axis of x of shape \(2, 3, 4\).*add -1",
    ),
    "the examples' axis": (
        bn.instance_norm, FOUR, X, {"feature_axes": (0, 2)}, ValueError,
        r"feature_axes=\(0, 2\) has the first axis of x of shape \(2, 3, 4\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    norm, params, x, options, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        norm(params, x, **options)
