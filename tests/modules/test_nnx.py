"""What only an NNX layer has: modes to switch, graphs, closures, and bridges to Linen."""

import re
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx import bridge
from interfaces import Nnx, call, params_of, stats_of
from support import (
    assert_close,
    define_affine,
    define_batch_norm,
    define_evaluation,
    define_steps,
    standard_normal,
)

import bn_jax as bn

OURS, FLAX = bn.nnx.BatchNorm, nnx.BatchNorm


def make(kind=OURS, **options):
    return Nnx(kind, **options).layer


# --- dtypes and modes -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.float64])
def test_double_precision_dtypes_agree_with_flax(x_dtype, param_dtype, dtype):
    with jax.enable_x64(True):
        x = standard_normal(14, (16, 3), x_dtype)
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        ours, flax = OURS(3, **options), FLAX(3, **options)
        # In training Flax's warns that it casts statistics of float64 to float32.
        evaluated = flax(x, use_running_average=True)
        assert_close(ours(x, use_running_average=True), evaluated, dtype=evaluated.dtype)
        found = ours(x)
        truth, stats = define_batch_norm(bn.init_params(3), bn.init_batch_stats(3), x)
        precise = x_dtype == found.dtype == jnp.float64
        assert_close(found, truth, dtype=evaluated.dtype, tolerance=1e-12 if precise else 2e-6)
        assert_close({"mean": ours.mean[...], "var": ours.var[...]}, stats, dtype=jnp.float32)


def test_the_input_is_not_rounded_to_dtype_first():
    x = standard_normal(10, (64, 3)) + 1000
    layer = OURS(3, dtype=jnp.bfloat16, momentum=0.0, rngs=nnx.Rngs(0))
    expected, stats = define_batch_norm(bn.init_params(3), bn.init_batch_stats(3), x, momentum=0.0)
    assert_close(layer(x), expected, dtype=jnp.bfloat16)
    assert_close({"mean": layer.mean[...], "var": layer.var[...]}, stats)


def test_another_promote_dtype_is_called():
    def to_half(values: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
        return tuple(None if v is None else v.astype(jnp.float16) for v in values)

    x = standard_normal(8, (8, 3)) + 1000
    layer = OURS(3, promote_dtype=to_half, rngs=nnx.Rngs(0))
    expected, _ = define_batch_norm(
        bn.init_params(3), bn.init_batch_stats(3), x.astype(jnp.float16)
    )
    assert_close(layer(x), expected, dtype=jnp.float16)


def test_train_and_eval_switch_it():
    x, layer = standard_normal(4, (6, 3)), OURS(3, rngs=nnx.Rngs(0))
    layer.train()
    params, stats = bn.init_params(3), bn.init_batch_stats(3)
    y, expected_stats = define_batch_norm(params, stats, x)
    assert_close(layer(x), y)
    assert_close({"mean": layer.mean[...], "var": layer.var[...]}, expected_stats)
    layer.eval()
    assert_close(layer(x), define_evaluation(params, expected_stats, x))
    assert_close(layer(x, use_running_average=False), y)
    viewed = nnx.view(layer, use_running_average=False)
    assert_close(viewed(x), y)


def test_errors():
    layer = OURS(3, use_running_average=None, rngs=nnx.Rngs(0))
    x = standard_normal(9, (6, 3))
    message = r"use_running_average is None .* the BatchNorm of 3 features.* model.eval\(\)"
    with pytest.raises(ValueError, match=message):
        layer(x)
    with pytest.raises(ValueError, match=r"features of shape \(4,\) on axis=-1"):
        OURS(3, rngs=nnx.Rngs(0))(standard_normal(9, (6, 4)))
    with pytest.raises(NameError, match="axis_name='data' is not bound"):
        jax.vmap(OURS(3, axis_name="data", rngs=nnx.Rngs(0)), axis_name="batch")(x[:, None])


@pytest.mark.parametrize(
    "modes", [dict(use_running_average=False, update_running_average=False),
              dict(use_running_average=True), dict(use_running_average=True,
                                                   update_running_average=False)],
)  # fmt: skip
def test_a_call_without_update_writes_nothing(modes):
    """So that the layer need be no argument of a transform."""
    x, layer = standard_normal(80, (8, 3)) + 2, make(momentum=0.5)
    assert_close(jax.jit(lambda x: layer(x, **modes))(x), layer(x, **modes))


def test_training_mode_does_not_unfreeze():
    x, layer = standard_normal(82, (8, 3)), make(frozen=True)
    expected = define_evaluation(params_of(layer), stats_of(layer), x)
    layer.train()
    assert_close(layer(x), expected)


# --- transforms -----------------------------------------------------------------------------------


def test_jit_and_grad_update_the_statistics():
    x, layer = standard_normal(5, (6, 3)), OURS(3, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(layer, x):
        return nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 3))(layer, x)

    gradients = step(layer, x)
    assert set(nnx.to_pure_dict(gradients)) == {"scale", "bias"}
    _, expected = define_batch_norm(bn.init_params(3), bn.init_batch_stats(3), x)
    assert_close({"mean": layer.mean[...], "var": layer.var[...]}, expected)


def test_separate_statistics_under_shared_parameters():
    """google/flax#4760."""
    x = standard_normal(22, (4, 6, 3))
    layer = make()
    params, stats = params_of(layer), stats_of(layer)
    for variable in (layer.mean, layer.var):
        variable.set_value(jnp.stack([variable[...]] * 4))
    filters: dict[Any, Any] = {nnx.BatchStat: 0, ...: None}
    axes = nnx.StateAxes(filters)
    y = nnx.jit(nnx.vmap(call, in_axes=(axes, 0)))(layer, x)
    for member in range(4):
        updated = {name: leaf[member] for name, leaf in stats_of(layer).items()}
        assert_close((y[member], updated), define_batch_norm(params, stats, x[member]))


CLOSURES = {
    "nnx.eval_shape google/flax#4734": lambda layer, x: nnx.eval_shape(layer, x),
    "nnx.vmap google/flax#4760": lambda layer, x: nnx.vmap(lambda x: layer(x))(x),
    "nnx.jit": lambda layer, x: nnx.jit(layer)(x),
    "jax.jit": lambda layer, x: jax.jit(layer)(x),
    "jax.eval_shape": lambda layer, x: jax.eval_shape(layer, x),
    "jax.vmap": lambda layer, x: jax.vmap(lambda x: layer(x))(x),
    "jax.grad numpyro#2067": lambda layer, x: jax.grad(lambda x: jnp.sum(layer(x)))(x),
    "jit of grad": lambda layer, x: jax.jit(jax.grad(lambda x: jnp.sum(layer(x))))(x),
}


@pytest.mark.parametrize("kind", [OURS, bn.nnx.WhiteningNorm])
@pytest.mark.parametrize("closed", CLOSURES.values(), ids=CLOSURES)
def test_a_layer_that_is_no_argument_of_the_transform(closed, kind):
    x = standard_normal(23, (5, 6, 3))
    layer = kind(3, rngs=nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
    message = rf"^the {kind.__name__} of 3 features .* Pass the model: .*use_running_average=True"
    with pytest.raises(TraceContextError, match=message):
        closed(layer, x)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)), before)
    viewed = nnx.view(layer, use_running_average=True)
    assert closed(viewed, x).shape == x.shape
    layer.eval()
    assert closed(layer, x).shape == x.shape
    layer.train()
    still = partial(layer, update_running_average=False)
    assert closed(still, x).shape == x.shape
    if kind is OURS:
        with pytest.raises(TraceContextError, match="Cannot mutate BatchStat"):
            closed(make(FLAX), x)


def test_what_the_message_advises_updates_the_statistics():
    x = standard_normal(23, (5, 6, 3))
    with pytest.raises(TraceContextError) as caught:
        jax.jit(make())(x)
    advised = re.findall(r"nnx\.(?:grad|jit|vmap)\(lambda.*?\)\(model, x\)", str(caught.value))
    assert [line.split("(")[0] for line in advised] == ["nnx.grad", "nnx.jit", "nnx.vmap"]
    layer = make(axis_name="batch")
    expected = make()
    expected(x)
    for line in advised:
        model = nnx.clone(layer)
        found = eval(line, {"nnx": nnx, "model": model, "x": x})
        assert found.shape == x.shape
        assert_close(stats_of(model), stats_of(expected))
    shape = re.search(r"nnx\.eval_shape\(.*?model, x\)", str(caught.value))
    assert shape and eval(shape[0], {"nnx": nnx, "model": layer, "x": x}).shape == x.shape


@pytest.mark.parametrize(
    "evaluated",
    [
        lambda x: nnx.eval_shape(call, make(), x),
        lambda x: nnx.eval_shape(call, nnx.eval_shape(lambda: OURS(3, rngs=nnx.Rngs(0))), x),
        lambda x: nnx.eval_shape(lambda x: OURS(3, rngs=nnx.Rngs(0))(x), x),
    ],
    ids=["argument", "abstract argument", "made inside"],
)
def test_eval_shape_in_training(evaluated):
    """google/flax#4734."""
    x = jax.ShapeDtypeStruct((6, 3), jnp.bfloat16)
    assert evaluated(x) == jax.ShapeDtypeStruct((6, 3), jnp.float32)


def test_eval_shape_makes_a_layer_to_restore_into():
    """google/flax#4734."""
    x = standard_normal(24, (6, 3))
    saved = make()
    abstract = nnx.eval_shape(lambda: OURS(3, rngs=nnx.Rngs(0)))
    expected = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stats_of(saved)
    )
    found = {"mean": abstract.mean.get_value(), "var": abstract.var.get_value()}
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    restored = nnx.merge(nnx.graphdef(abstract), nnx.clone(nnx.state(saved)))
    y, updated = define_batch_norm(params_of(saved), stats_of(saved), x)
    assert_close((restored(x), stats_of(restored)), (y, updated))


# --- bridges --------------------------------------------------------------------------------------


class FromLinen:
    """Our Linen layer as an NNX module."""

    def __init__(self, x):
        layer = bn.linen.BatchNorm(momentum=0.5)
        self.layer = bridge.lazy_init(
            bridge.ToNNX(layer, rngs=nnx.Rngs(0)), x, use_running_average=True
        )

    def train(self, x):
        return self.layer(x, use_running_average=False, mutable=["batch_stats"])

    def evaluate(self, x):
        return self.layer(x, use_running_average=True)

    def stats(self):
        return stats_of(self.layer)


class ToLinen:
    """Our NNX layer as a Linen module."""

    def __init__(self, x):
        self.layer = bridge.to_linen(OURS, 3, momentum=0.5)
        self.variables = self.layer.init(jax.random.key(0), x, use_running_average=True)

    def train(self, x):
        y, updates = self.layer.apply(self.variables, x, mutable=["batch_stats"])
        self.variables = {**self.variables, **updates}
        return y

    def evaluate(self, x):
        return self.layer.apply(self.variables, x, use_running_average=True)

    def stats(self):
        return self.variables["batch_stats"]


@pytest.mark.parametrize("kind", [FromLinen, ToLinen])
def test_bridges_keep_the_statistics(kind):
    xs = standard_normal(86, (2, 8, 3)) + 1
    layer = kind(xs[0])
    chex.assert_trees_all_equal(dict(layer.stats()), dict(bn.init_batch_stats(3)))
    expected, stats = define_steps(bn.init_params(3), bn.init_batch_stats(3), xs, momentum=0.5)
    assert_close(jnp.stack([layer.train(x) for x in xs]), expected)
    assert_close(dict(layer.stats()), stats)
    y = define_affine(xs[0], stats["mean"], stats["var"], np.ones(3), np.zeros(3))
    assert_close(layer.evaluate(xs[0]), y)
    assert_close(dict(layer.stats()), stats)
