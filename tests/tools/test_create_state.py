"""The state before the first step: `create_state`, and what `evaluate` compiles for it."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled_programs
from support import assert_close

from bn_jax import linen, training
from bn_jax.lab import models
from bn_jax.lab.fitting import abstract_state

SHAPE = (4, 4, 1)
NORM = functools.partial(linen.BatchNorm, momentum=0.9)
MODELS = {
    "residual": models.ResNet(3, stage_sizes=(1,), widths=(4,), norm=NORM),
    "no norm": models.MLP(3, widths=(8, 6)),
    "per device": models.MLP(3, widths=(8, 6), norm=functools.partial(NORM, virtual_batch_size=4)),
}


@functools.cache
def mesh(devices):
    return training.make_mesh(jax.devices()[:devices])


def create(model, optimizer=None, devices=2):
    return training.create_state(model, optimizer or optax.adam(0.1), SHAPE, 3, mesh(devices))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_it_has_the_values_of_init_on_any_mesh(model):
    expected = model.init(jax.random.key(3), jnp.zeros((1, *SHAPE)), train=False)
    for devices in (1, 4):
        state = create(model, devices=devices)
        assert_close(state.params, expected["params"], tolerance=1e-6)
        chex.assert_trees_all_equal(state.batch_stats, expected.get("batch_stats", {}))
        chex.assert_trees_all_equal(state.opt_state, optax.adam(0.1).init(expected["params"]))
        assert int(state.step) == 0
        for leaf in jax.tree.leaves(state):
            assert leaf.sharding.is_fully_replicated and len(leaf.devices()) == devices


def test_it_may_be_called_in_a_program_and_for_its_shapes():
    model, optimizer = MODELS["no norm"], optax.sgd(0.1)
    create_it = functools.partial(create, model, optimizer)
    expected = create_it()
    assert_close(jax.jit(create_it)().params, expected.params, tolerance=1e-6)
    with compiled_programs() as programs:
        abstract = abstract_state(model, optimizer, SHAPE, mesh(2))
    assert programs == {}
    chex.assert_trees_all_equal_structs(abstract, expected)
    for shape, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(expected), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        assert shape.sharding == leaf.sharding


def test_a_parameter_may_depend_on_values():
    class Centred(nn.Module):
        @nn.compact
        def __call__(self, x, train, mask=None):
            centre = self.param("centre", lambda key: jnp.mean(x) + 1)
            return nn.Dense(3)(x.reshape(len(x), -1) - centre)

    assert float(create(Centred()).params["centre"]) == 1


def test_evaluate_compiles_one_program_for_a_model_whatever_its_optimizer():
    model = MODELS["no norm"]
    states = [create(model, optimizer) for optimizer in (optax.sgd(0.1), optax.adam(0.1))]
    x = np.random.default_rng(0).standard_normal((8, *SHAPE)).astype(np.float32)
    batch = training.shard_batch(training.pad_batch(x, np.arange(8) % 3, 8), mesh(2))
    with compiled_programs() as programs:
        first, second = (training.evaluate(state, [batch, batch]) for state in states)
    assert first == second and first.examples == 16
    assert programs == {"jit(_measure_model)": 1}
    metrics = [jax.device_get(training.eval_step(state, batch)) for state in states]
    assert_close(first.loss * 16, 2 * metrics[0].loss, tolerance=1e-5)
    assert first.correct == 2 * metrics[0].correct == 2 * metrics[1].correct
