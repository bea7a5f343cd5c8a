import dataclasses
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from support import assert_close, define_batch_norm, far_from_initial, standard_normal

import bn_jax as bn

OURS, FLAX = bn.linen.BatchNorm, nn.BatchNorm


def make_loss(layer, mask=None):
    def loss(variables, x, use_running_average):
        y, updates = layer.apply(
            variables, x, use_running_average, mask=mask, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, updates["batch_stats"])

    return jax.jit(
        jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnames="use_running_average"
    )


def test_attributes_and_defaults_are_those_of_flax():
    own = {field.name: field.default for field in dataclasses.fields(OURS)}
    theirs = {field.name: field.default for field in dataclasses.fields(FLAX)}
    assert {name: own[name] for name in theirs} == theirs
    assert set(own) - set(theirs) == {"activation", "virtual_batch_size", "running_var_ddof"}
    assert OURS.__name__ == FLAX.__name__
    # A new attribute of Flax's must be looked at here before it is inherited.
    assert set(theirs) - {"parent", "name"} == {
        "use_running_average", "axis", "momentum", "epsilon", "dtype", "param_dtype", "use_bias",
        "use_scale", "bias_init", "scale_init", "axis_name", "axis_index_groups",
        "use_fast_variance", "force_float32_reductions",
    }  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {}, {"axis": 1}, {"axis": (1, 2)}, {"axis": 0}, {"use_scale": False}, {"use_bias": False},
        {"use_scale": False, "use_bias": False}, {"momentum": 0.5, "epsilon": 1e-2},
        {"use_fast_variance": False}, {"force_float32_reductions": False},
        {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.uniform()},
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_flax(options, use_running_average, masked):
    x = standard_normal(0, (16, 4, 3))
    mask = standard_normal(1, (16, 4, 3)) > -1 if masked else None
    ours, flax = OURS(**options), FLAX(**options)
    key = jax.random.key(0)
    variables = [layer.init(key, x, use_running_average=False) for layer in (ours, flax)]
    chex.assert_trees_all_equal(*variables)
    found, expected = (
        make_loss(layer, mask)(far_from_initial(variables[0]), x, use_running_average)
        for layer in (ours, flax)
    )
    chex.assert_trees_all_equal_dtypes(found, expected)
    assert_close(found, expected)


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_running_average", [False, True])
def test_dtypes_agree_with_flax(x_dtype, dtype, param_dtype, use_running_average):
    x = standard_normal(2, (16, 3), x_dtype)
    options = dict(dtype=dtype, param_dtype=param_dtype)
    ours, flax = OURS(**options), FLAX(**options)
    variables = flax.init(jax.random.key(0), x, use_running_average=False)
    chex.assert_trees_all_equal(
        variables, ours.init(jax.random.key(0), x, use_running_average=False)
    )
    (_, found), (_, expected) = (
        make_loss(layer)(far_from_initial(variables), x, use_running_average)
        for layer in (ours, flax)
    )
    chex.assert_trees_all_equal_dtypes(found, expected)
    assert_close(found, expected)


def test_a_checkpoint_moves_either_way():
    x = standard_normal(3, (6, 3))
    ours, flax = (layer(use_running_average=True) for layer in (OURS, FLAX))
    variables = far_from_initial(flax.init(jax.random.key(0), x))
    for source, target in ((flax, ours), (ours, flax)):
        stored = serialization.to_bytes(variables)
        loaded = serialization.from_bytes(target.init(jax.random.key(1), x), stored)
        chex.assert_trees_all_equal(loaded, variables)
        assert_close(target.apply(loaded, x), source.apply(variables, x))


def test_inside_a_model_the_variables_have_flax_names():
    class Model(nn.Module):
        norm: type

        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = self.norm(use_running_average=False)(nn.Dense(4)(x))
            return x

    x = standard_normal(4, (6, 3))
    ours, flax = (Model(norm).init(jax.random.key(0), x) for norm in (OURS, FLAX))
    chex.assert_trees_all_equal(ours, flax)


def test_initializing_needs_no_axis_and_no_second_example():
    layer = OURS(use_running_average=False, axis_name="nowhere", virtual_batch_size=None)
    x = standard_normal(5, (1, 3))
    y, variables = layer.init_with_output(jax.random.key(0), x)
    chex.assert_trees_all_equal(variables["batch_stats"], bn.init_batch_stats(3))
    assert_close(y, np.zeros((1, 3)))


def test_synchronized_is_flattened():
    x = standard_normal(6, (4, 5, 3))
    layer = OURS(use_running_average=False, axis_name="data")
    variables = layer.init(jax.random.key(0), x[0])
    train = partial(layer.apply, mutable=["batch_stats"])
    y, updates = jax.pmap(train, axis_name="data", in_axes=(None, 0))(variables, x)
    expected = define_batch_norm(variables["params"], variables["batch_stats"], x.reshape(20, 3))
    first = jax.tree.map(lambda leaf: leaf[0], updates["batch_stats"])
    assert_close((y.reshape(20, 3), first), expected)


def test_new_attributes_reach_the_core():
    x = standard_normal(7, (8, 3))
    layer = OURS(use_running_average=False, virtual_batch_size=4, running_var_ddof=1)
    variables = layer.init(jax.random.key(0), x)
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    expected, stats = bn.batch_norm(
        variables["params"], variables["batch_stats"], x,
        use_running_average=False, virtual_batch_size=4, running_var_ddof=1,
    )  # fmt: skip
    chex.assert_trees_all_equal((y, updates["batch_stats"]), (expected, stats))


@pytest.mark.parametrize("nested", [False, True])
def test_missing_or_immutable_batch_stats(nested):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, use_running_average):
            return OURS(use_running_average, name="first_norm")(x)

    model = Model() if nested else OURS()
    where = "BatchNorm 'first_norm'" if nested else "the top-level BatchNorm"
    x = standard_normal(8, (6, 3))
    variables = model.init(jax.random.key(0), x, use_running_average=True)
    with pytest.raises(ValueError, match=f"batch_stats has nothing for {where}.*model.apply"):
        model.apply({"params": variables["params"]}, x, use_running_average=True)
    with pytest.raises(ValueError, match=f"batch_stats is immutable, but {where} .*mutable="):
        model.apply(variables, x, use_running_average=False)
    model.apply(variables, x, use_running_average=True)


def test_use_running_average_must_be_given_once():
    x = standard_normal(9, (6, 3))
    with pytest.raises(ValueError, match="use_running_average"):
        OURS().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="use_running_average"):
        OURS(use_running_average=True).init(jax.random.key(0), x, use_running_average=True)
