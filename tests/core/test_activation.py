"""Batch norm with an activation and a residual is the composition, at no more cost."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    assert_close,
    define_batch_norm,
    make_state,
    standard_normal,
)

import bn_jax as bn

TRAIN: Any = partial(bn.batch_norm, use_running_average=False)
EVALUATE: Any = partial(bn.batch_norm, use_running_average=True)

pytestmark = pytest.mark.usefixtures("strict_promotion")

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
        with jax.disable_jit():
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
    # An array of the size of the features may be kept besides, of 1.6 MB in all.
    assert memory[0] <= memory[1] + 32 * 4
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
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < most
