import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import (
    assert_close,
    define_affine,
    define_batch_norm,
    far_from_initial,
    standard_normal,
)

import bn_jax as bn

OURS, FLAX = bn.nnx.BatchNorm, nnx.BatchNorm


def fill(layer):
    """Gives the variables values far from the initial ones."""
    nnx.update(layer, far_from_initial(nnx.state(layer)))
    return layer


def outcome(layer, x, mask=None):
    """Output, gradients and state after one call."""

    def loss(layer, x):
        y = layer(x, mask=mask)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    gradients, y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    return nnx.to_pure_dict(gradients[0]), gradients[1], y, nnx.to_pure_dict(nnx.state(layer))


def test_arguments_and_defaults_are_those_of_flax():
    own, theirs = (inspect.signature(kind.__init__).parameters for kind in (OURS, FLAX))
    for name, parameter in theirs.items():
        assert own[name].default == parameter.default, name
        assert own[name].kind == parameter.kind, name
    assert set(own) - set(theirs) == {"activation", "virtual_batch_size", "running_var_ddof"}


@pytest.mark.parametrize(
    "options",
    [
        {}, {"axis": 1, "num_features": 4}, {"use_scale": False}, {"use_bias": False},
        {"use_scale": False, "use_bias": False}, {"momentum": 0.5, "epsilon": 1e-2},
        {"use_fast_variance": False}, {"scale_init": nnx.initializers.normal()},
        {"scale_metadata": {"note": "kept"}},
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_flax(options, use_running_average, masked):
    x = standard_normal(0, (16, 4, 3))
    mask = standard_normal(1, (16, 4, 3)) > -1 if masked else None
    options = {"num_features": 3, "use_running_average": use_running_average, **options}
    layers = [kind(**options, rngs=nnx.Rngs(0)) for kind in (OURS, FLAX)]
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(layer)) for layer in layers))
    found, expected = (outcome(fill(layer), x, mask) for layer in layers)
    chex.assert_trees_all_equal_dtypes(found, expected)
    assert_close(found, expected)


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_dtypes_agree_with_flax(x_dtype, dtype, param_dtype, use_running_average, affine):
    x = standard_normal(2, (16, 3), x_dtype)
    options = dict(
        dtype=dtype, param_dtype=param_dtype, use_running_average=use_running_average,
        use_scale=affine, use_bias=affine,
    )  # fmt: skip
    layers = [fill(kind(3, **options, rngs=nnx.Rngs(0))) for kind in (OURS, FLAX)]
    (_, _, y, _), (_, _, expected, _) = (outcome(layer, x) for layer in layers)
    assert y.dtype == expected.dtype
    # Flax rounds x and the statistics to bfloat16 first; what that costs is 2 ** -8 of each.
    assert_close(y, expected, tolerance=0.05 if dtype == jnp.bfloat16 else None)


def test_statistics_are_not_cast_in_evaluation():
    mean = 300.7
    layer = OURS(3, dtype=jnp.bfloat16, use_running_average=True, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.full(3, mean)
    x = jnp.asarray(standard_normal(3, (64, 3)) + mean, jnp.bfloat16)
    expected = define_affine(x, np.full(3, np.float32(mean)), np.ones(3), np.ones(3), np.zeros(3))
    assert_close(layer(x), expected, dtype=jnp.bfloat16)
    theirs = FLAX(3, dtype=jnp.bfloat16, use_running_average=True, rngs=nnx.Rngs(0))
    theirs.mean[...] = jnp.full(3, mean)
    assert np.abs(np.float64(theirs(x)) - expected).max() > 0.5


def test_the_input_is_not_rounded_to_dtype_first():
    x = standard_normal(10, (64, 3)) + 1000
    layer = OURS(3, dtype=jnp.bfloat16, momentum=0.0, rngs=nnx.Rngs(0))
    expected, stats = define_batch_norm(bn.init_params(3), bn.init_batch_stats(3), x, momentum=0.0)
    assert_close(layer(x), expected, dtype=jnp.bfloat16)
    assert_close({"mean": layer.mean[...], "var": layer.var[...]}, stats)


def test_train_and_eval_switch_it():
    x, layer = standard_normal(4, (6, 3)), OURS(3, rngs=nnx.Rngs(0))
    layer.train()
    params, stats = bn.init_params(3), bn.init_batch_stats(3)
    y, expected_stats = define_batch_norm(params, stats, x)
    assert_close(layer(x), y)
    assert_close({"mean": layer.mean[...], "var": layer.var[...]}, expected_stats)
    layer.eval()
    assert_close(layer(x), define_affine(x, *expected_stats.values(), *params.values()))
    assert_close(layer(x, use_running_average=False), y)
    viewed = nnx.view(layer, use_running_average=False)
    assert_close(viewed(x), y)


def test_jit_and_grad_update_the_statistics():
    x, layer = standard_normal(5, (6, 3)), OURS(3, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(layer, x):
        return nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 3))(layer, x)

    gradients = step(layer, x)
    assert set(nnx.to_pure_dict(gradients)) == {"scale", "bias"}
    _, expected = define_batch_norm(bn.init_params(3), bn.init_batch_stats(3), x)
    assert_close({"mean": layer.mean[...], "var": layer.var[...]}, expected)


def test_synchronized_is_flattened():
    x = standard_normal(6, (4, 5, 3))
    layer = OURS(3, axis_name="data", rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def train(state, x):
        layer = nnx.merge(graph, state)
        return layer(x), layer.mean[...]

    y, mean = jax.pmap(train, axis_name="data", in_axes=(None, 0))(state, x)
    expected, stats = define_batch_norm(bn.init_params(3), bn.init_batch_stats(3), x.reshape(20, 3))
    assert_close((y.reshape(20, 3), mean[0]), (expected, stats["mean"]))


def test_new_arguments_reach_the_core():
    x = standard_normal(7, (8, 3))
    options = dict(virtual_batch_size=4, running_var_ddof=1)
    layer = OURS(3, **options, rngs=nnx.Rngs(0))
    expected = bn.batch_norm(
        bn.init_params(3), bn.init_batch_stats(3), x, use_running_average=False, **options
    )
    y = layer(x)
    chex.assert_trees_all_equal((y, {"mean": layer.mean[...], "var": layer.var[...]}), expected)


def test_a_promote_dtype_of_ones_own_is_called():
    def to_half(values, *, dtype):
        return tuple(None if v is None else v.astype(jnp.float16) for v in values)

    x = standard_normal(8, (8, 3)) + 1000
    layer = OURS(3, promote_dtype=to_half, rngs=nnx.Rngs(0))
    expected, _ = define_batch_norm(
        bn.init_params(3), bn.init_batch_stats(3), x.astype(jnp.float16)
    )
    assert_close(layer(x), expected, dtype=jnp.float16)


def test_errors():
    layer = OURS(3, use_running_average=None, rngs=nnx.Rngs(0))
    x = standard_normal(9, (6, 3))
    with pytest.raises(ValueError, match=r"use_running_average is None .* model.eval\(\)"):
        layer(x)
    with pytest.raises(ValueError, match=r"features of shape \(4,\) on axis=-1"):
        OURS(3, rngs=nnx.Rngs(0))(standard_normal(9, (6, 4)))
    with pytest.raises(NameError, match="axis_name='data' is not bound"):
        partial(OURS(3, axis_name="data", rngs=nnx.Rngs(0)))(x)
