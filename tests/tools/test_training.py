import contextlib
import dataclasses
import functools
import itertools
import re
import warnings
from types import SimpleNamespace
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.core import freeze
from flax.training import train_state
from support import all_reduces, assert_close

import bn_jax as bn
from bn_jax import linen, training
from bn_jax.lab import data, models
from bn_jax.lab.fitting import shard_dataset

pytestmark = pytest.mark.usefixtures("compile_quickly")

SIZE = 8
NORMS = {
    "none": None,
    "per device": functools.partial(linen.BatchNorm, momentum=0.9, virtual_batch_size=SIZE // 4),
    "synchronized": functools.partial(linen.BatchNorm, momentum=0.9),
}
MODELS = {
    name: models.ResNet(3, stage_sizes=(1,), widths=(4,), norm=norm) for name, norm in NORMS.items()
}
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
jitted_step = jax.jit(training.train_step)


def dataset(examples, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, examples).astype(np.int32)
    x = rng.standard_normal((examples, 4, 4, 1)) + y[:, None, None, None]
    return data.Dataset(x.astype(np.float32), y)


@functools.cache
def mesh(devices):
    assert len(jax.devices()) >= 4, "conftest.py asks for 4 devices"
    return training.make_mesh(jax.devices()[:devices])


@functools.cache
def initial_state(name, devices=1):
    return training.create_state(MODELS[name], OPTIMIZER, (4, 4, 1), 0, mesh(devices))


def variables(state):
    return {"params": state.params, "batch_stats": state.batch_stats}


def train(name, devices, examples=18):
    """One epoch; of 18 examples in batches of 8, the last leaves 3 of 4 devices without any."""
    state = initial_state(name, devices)
    for batch in data.batches(dataset(examples), SIZE):
        state, metrics = jitted_step(state, training.shard_batch(batch, mesh(devices)))
    return state, metrics


@pytest.mark.parametrize("name", ["none", "synchronized"])
def test_padding_changes_neither_loss_nor_gradient_nor_statistics(name):
    x, y = dataset(5)
    state = initial_state(name)
    padded = training.pad_batch(x, y, SIZE)
    disturbed = padded._replace(
        x=np.where(padded.mask[:, None, None, None], padded.x, 100),
        y=np.where(padded.mask, padded.y, 2).astype(np.int32),
    )
    expected, expected_metrics = jitted_step(state, training.pad_batch(x, y, 5))
    assert expected_metrics.examples == 5
    for batch in (padded, disturbed):
        actual, metrics = jitted_step(state, batch)
        assert_close(metrics.loss, expected_metrics.loss)
        assert metrics[1:] == expected_metrics[1:]
        # After one step of SGD the difference of the parameters is the gradient.
        gradient, expected_gradient = (
            jax.tree.map(lambda old, new: (old - new) / 0.1, state.params, new.params)
            for new in (actual, expected)
        )
        assert_close(gradient, expected_gradient, tolerance=1e-5)
        if name != "none":
            assert_close(actual.batch_stats, expected.batch_stats)


def test_loss_is_the_mean_cross_entropy_of_the_valid_examples():
    x, y = dataset(5)
    state = initial_state("none")
    logits = np.asarray(state.apply_fn({"params": state.params}, x, train=True), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(5), y]
    _, metrics = jitted_step(state, training.pad_batch(x, y, SIZE))
    np.testing.assert_allclose(metrics.loss, losses.sum(), rtol=1e-5)
    assert metrics.correct == (logits.argmax(-1) == y).sum()


def test_a_fully_masked_batch_moves_nothing():
    state = initial_state("synchronized")
    batch = training.pad_batch(*dataset(4), SIZE)._replace(mask=np.zeros(SIZE, bool))
    after, metrics = jitted_step(state, batch)
    assert_close(variables(after), variables(state), tolerance=1e-12)
    assert metrics == (0, 0, 0)


def test_synchronized_devices_train_as_one():
    one, one_metrics = train("synchronized", 1)
    four, four_metrics = train("synchronized", 4)
    assert (int(one.step), int(four.step)) == (3, 3)
    assert_close(variables(four), variables(one))
    assert_close(four_metrics.loss, one_metrics.loss)


def test_per_device_statistics_are_those_of_each_shard():
    one, _ = train("per device", 1)
    four, _ = train("per device", 4)
    assert_close(variables(four), variables(one))
    synchronized, _ = train("synchronized", 4)
    kernels = (state.params["classifier"]["kernel"] for state in (four, synchronized))
    assert not np.allclose(*kernels, atol=1e-4)


def test_a_step_keeps_types_and_placement():
    before = initial_state("synchronized", 4)
    after, _ = train("synchronized", 4)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype, old.weak_type) == (new.shape, new.dtype, new.weak_type)
        assert len(new.sharding.device_set) == 4 and new.sharding.is_fully_replicated
    batch = training.shard_batch(next(data.batches(dataset(8), SIZE)), mesh(4))
    assert {shard.data.shape for shard in batch.x.addressable_shards} == {(2, 4, 4, 1)}


@pytest.mark.parametrize(("name", "crosses"), [("per device", False), ("synchronized", True)])
def test_only_synchronized_statistics_cross_devices(name, crosses):
    def logits(state, batch):
        apply = functools.partial(state.apply_fn, train=True, mutable=["batch_stats"])
        return apply(variables(state), batch.x, mask=batch.mask)[0]

    batch = training.shard_batch(next(data.batches(dataset(8), SIZE)), mesh(4))
    compiled = jax.jit(logits).lower(initial_state(name, 4), batch).compile().as_text()
    assert "all-gather" not in compiled
    assert bool(all_reduces(compiled)) == crosses


def test_the_number_of_devices_must_divide_a_batch():
    batch = next(data.batches(dataset(6), 6))
    with pytest.raises(
        ValueError, match="batch has 6 examples, expected a multiple of the mesh's 4"
    ):
        training.shard_batch(batch, mesh(4))


def test_pad_batch_keeps_a_full_batch_and_refuses_a_longer_one():
    x, y = dataset(4)
    full = training.pad_batch(x, y, 4)
    assert full.mask.all()
    np.testing.assert_array_equal(full.x, x)
    with pytest.raises(ValueError, match="received 4 examples, expected at most batch_size = 3"):
        training.pad_batch(x, y, 3)


@pytest.mark.parametrize("devices", [1, 4])
def test_evaluation_does_not_depend_on_batches(devices):
    state, _ = train("synchronized", devices)
    x, y = dataset(13, seed=1)
    logits = state.apply_fn(variables(jax.device_get(state)), x, train=False)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    for size in (4, 8, 16):
        batches = shard_dataset(dataset(13, 1), size, mesh(devices))
        evaluation = training.evaluate(state, batches)
        assert (evaluation.correct, evaluation.examples) == ((logits.argmax(-1) == y).sum(), 13)
        assert evaluation.accuracy == evaluation.correct / 13
        np.testing.assert_allclose(evaluation.loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("owners", "start", "stop"), [([0, 0], 0, 12), ([0, 1], 0, 6), ([2, 2, 0], 8, 12)]
)
def test_a_process_feeds_the_rows_of_its_devices(owners, start, stop):
    devices = np.array([SimpleNamespace(process_index=owner) for owner in owners])
    mesh = SimpleNamespace(devices=devices, size=len(owners))
    assert training.process_rows(12, mesh) == slice(start, stop)


# --- micro-batches ----------------------------------------------------------------------------


class Layer(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x, mask):
        norm = linen.BatchNorm(momentum=0.9, use_running_average=not self.train)
        return nn.tanh(norm(nn.Dense(6)(x), mask=mask)), None


class Stack(nn.Module):
    """Norms of several kinds, the last ones under a lifted scan."""

    @nn.compact
    def __call__(self, x, train, mask=None):
        x = x.reshape(len(x), -1)
        mask = None if mask is None else mask[:, None]
        for options in ({"momentum": None}, {"running_var_ddof": 1}, {"use_scale": False}):
            norm = linen.BatchNorm(use_running_average=not train, **options)
            x = nn.tanh(norm(nn.Dense(6)(x), mask=mask))
        scanned = nn.scan(
            Layer,
            variable_axes=dict.fromkeys(
                ("params", "batch_stats", "batch_moments", "given_moments"), 0
            ),
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=3,
        )
        return nn.Dense(3)(scanned(train)(x, mask)[0])


ACCUMULATING = {
    "none": MODELS["none"],
    "residual network": MODELS["synchronized"],
    "stack": Stack(),
}
VALID = {
    "all": np.ones(16, bool),
    "the last padded": np.arange(16) < 13,
    "an empty micro-batch": np.arange(16) % 4 != 1,
}


def masked_batch(valid, order=slice(None)):
    x, y = dataset(16)
    x = np.where(valid[:, None, None, None], x, 100)
    return training.Batch(x[order], y[order], valid[order])


@functools.cache
def accumulated_step(**options):
    return jax.jit(functools.partial(training.accumulated_train_step, **options))


def accumulate(state, batch, micro_batches=4, **options):
    return accumulated_step(micro_batches=micro_batches, **options)(state, batch)


def fresh_state(model, devices=1):
    return training.create_state(model, OPTIMIZER, (4, 4, 1), 0, mesh(devices))


@pytest.mark.parametrize(
    ("model", "valid", "devices"),
    [
        *itertools.product(("none", "stack"), ("the last padded",), (1,)),
        *itertools.product(("residual network",), VALID, (1, 4)),
    ],
)
def test_statistics_of_the_whole_batch_make_the_step_of_the_whole_batch(model, valid, devices):
    state = fresh_state(ACCUMULATING[model], devices)
    batch = training.shard_batch(masked_batch(VALID[valid]), mesh(devices))
    expected, expected_metrics = jitted_step(state, batch)
    actual, metrics = accumulate(state, batch, whole_batch_statistics=True)
    assert_close(variables(actual), variables(expected))
    assert_close(actual.opt_state, expected.opt_state, tolerance=1e-5)
    assert_close(metrics.loss, expected_metrics.loss)
    assert metrics[1:] == expected_metrics[1:]
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)


class Mixed(nn.Module):
    """Norms of Flax's and ours."""

    @nn.compact
    def __call__(self, x, train, mask=None):
        x = x.reshape(len(x), -1)
        mask = None if mask is None else mask[:, None]
        for name, norm in {"a": nn.BatchNorm, "b": linen.BatchNorm, "c": linen.BatchNorm}.items():
            x = nn.tanh(norm(use_running_average=not train, name=name)(nn.Dense(3)(x), mask=mask))
        return x


def test_frozen_norms_have_no_part_in_a_batch():
    state = fresh_state(Mixed())
    state = state.replace(apply_fn=linen.freeze(state.apply_fn, "[ac]"))
    batch = masked_batch(VALID["the last padded"])
    expected, _ = jitted_step(state, batch)
    actual, _ = accumulate(state, batch, whole_batch_statistics=True)
    assert_close(variables(actual), variables(expected))
    for name, stats in actual.batch_stats.items():
        unchanged = np.array_equal(stats["mean"], state.batch_stats[name]["mean"])
        assert unchanged == (name != "b")


@pytest.mark.parametrize(
    ("model", "valid", "devices"),
    [
        ("none", "the last padded", 1),
        *itertools.product(("residual network",), VALID, (1, 4)),
    ],
)
def test_statistics_of_micro_batches_make_the_step_of_virtual_batches(model, valid, devices):
    state = fresh_state(ACCUMULATING[model], devices)
    batch = training.shard_batch(masked_batch(VALID[valid]), mesh(devices))
    actual, metrics = accumulate(state, batch)
    norm = functools.partial(linen.BatchNorm, momentum=0.9, virtual_batch_size=4)
    virtual = ACCUMULATING[model].clone(norm=norm if ACCUMULATING[model].norm else None)
    grouped = masked_batch(VALID[valid], np.arange(16).reshape(-1, 4).T.ravel())
    expected, expected_metrics = jitted_step(fresh_state(virtual), grouped)
    assert_close(*(jax.tree.map(np.asarray, variables(one)) for one in (actual, expected)))
    assert_close(float(metrics.loss), float(expected_metrics.loss), tolerance=1e-5)
    assert int(metrics.examples) == int(expected_metrics.examples) == VALID[valid].sum()


def test_one_micro_batch_is_the_batch():
    state, batch = initial_state("synchronized"), masked_batch(VALID["the last padded"])
    expected, _ = jitted_step(state, batch)
    for whole in (False, True):
        actual, _ = accumulate(state, batch, micro_batches=1, whole_batch_statistics=whole)
        assert_close(variables(actual), variables(expected))


@pytest.mark.parametrize("whole_batch_statistics", [False, True])
def test_accumulating_needs_the_memory_of_a_micro_batch(whole_batch_statistics):
    state = initial_state("synchronized")
    batch = training.pad_batch(*dataset(1024), 1024)

    def memory(step, *arguments):
        return jax.jit(step).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    step = functools.partial(
        training.accumulated_train_step,
        micro_batches=16,
        whole_batch_statistics=whole_batch_statistics,
    )
    assert memory(step, state, batch) < memory(training.train_step, state, batch) / 8


def test_accumulation_of_what_does_not_fit():
    state, batch = initial_state("synchronized"), masked_batch(VALID["all"])
    for micro_batches in (0, 3):
        message = f"micro_batches={micro_batches} does not divide the 16 examples of batch"
        with pytest.raises(ValueError, match=message):
            training.accumulated_train_step(state, batch, micro_batches)
    state = fresh_state(MODELS["synchronized"].clone(norm=nn.BatchNorm))
    with pytest.raises(ValueError, match=r"batch_stats\['stage.*collects no batch_moments: use"):
        training.accumulated_train_step(state, batch, 4)


# --- per-device statistics --------------------------------------------------------------------


@pytest.mark.parametrize("counted", [False, True])
def test_statistics_of_devices_are_merged_as_moments(counted):
    mean, var = np.array([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]]), np.array([[1.0, 2.0]] * 3)
    count = np.array([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    stats = {"mean": mean, "var": var} | ({"count": count} if counted else {})
    weights = count / count.sum(0) if counted else 1 / 3
    merged_mean = (weights * mean).sum(0)
    expected = {
        "mean": merged_mean,
        "var": (weights * (var + (mean - merged_mean) ** 2)).sum(0),
    } | ({"count": count.sum(0)} if counted else {})
    kept = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), {"block": {"norm": stats}})
    merged = training.sync_batch_stats(kept)
    assert_close(merged, {"block": {"norm": expected}}, dtype=jnp.float32)


def test_statistics_of_pmap_are_merged():
    layer = linen.BatchNorm(use_running_average=False, momentum=0.0)
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (4, 5, 3)), jnp.float32)
    initial = layer.init(jax.random.key(0), x[0])
    _, updates = jax.pmap(lambda x: layer.apply(initial, x, mutable=["batch_stats"]))(x)
    merged = training.sync_batch_stats(updates["batch_stats"])
    whole = np.asarray(x, np.float64).reshape(20, 3)
    assert_close(merged, {"mean": whole.mean(0), "var": whole.var(0)})


def test_other_statistics_are_not_merged():
    with pytest.raises(ValueError, match=r"holds ArrayImpl outside of a batch norm, expected"):
        training.sync_batch_stats({"norm": {"sigma": jnp.ones((2, 3))}})


# --- statistics that get lost -----------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_reported_yet(monkeypatch):
    monkeypatch.setattr(training.state, "_omissions", {})
    monkeypatch.setattr(training.state, "_reported", set())


class Small(nn.Module):
    """A norm of Flax's and one of ours, and dropout."""

    @nn.compact
    def __call__(self, x, train, rate=0.0):
        x = nn.BatchNorm(use_running_average=not train, name="theirs")(nn.Dense(3)(x))
        x = nn.Dropout(rate, deterministic=not train)(x)
        return linen.BatchNorm(use_running_average=not train, name="ours")(x)


SMALL = Small()
INPUT = jnp.asarray(np.random.default_rng(0).normal(2, 3, (8, 2)), jnp.float32)


class FlaxState(train_state.TrainState):
    batch_stats: Any


class OwnState(training.TrainState):
    """What a user makes of it: a field more, without a default."""

    own: Any


def small_state(kind=training.TrainState, model=SMALL, **fields):
    variables = model.init(jax.random.key(0), INPUT, train=False)
    fields = {"batch_stats": {}, "tx": OPTIMIZER} | fields | variables
    return kind.create(apply_fn=model.apply, **fields)


def small_loss(params, state, x):
    variables = {"params": params, "batch_stats": state.batch_stats}
    y, updates = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
    return jnp.mean(jnp.sin(y)), updates.get("batch_stats", {})


small_gradients = jax.jit(jax.grad(small_loss, has_aux=True))


def keep(state, x):
    gradients, updated = small_gradients(state.params, state, x)
    return state.apply_gradients(grads=gradients, batch_stats=updated)


def keep_in_two_lines(state, x):
    gradients, updated = small_gradients(state.params, state, x)
    state = state.apply_gradients(grads=gradients)
    return state.replace(batch_stats=updated)


def keep_later(state, x):
    gradients, updated = small_gradients(state.params, state, x)
    state = state.apply_gradients(grads=gradients).replace(opt_state=state.opt_state)
    state = jax.tree.map(lambda leaf: leaf + 0, state)
    state = jax.lax.cond(True, lambda state: state, lambda state: state, state)
    return state.replace(batch_stats=updated, step=state.step)


def keep_after_compiled_update(state, x):
    gradients, updated = small_gradients(state.params, state, x)
    return compiled_update(state, gradients).replace(batch_stats=updated)


compiled_update = jax.jit(lambda state, gradients: state.apply_gradients(grads=gradients))


def mean_to_keep(state, x):
    gradients, _ = small_gradients(state.params, state, x)
    return state.apply_gradients(grads=gradients, batch_stats=state.batch_stats)


def drop(state, x):
    gradients, _ = small_gradients(state.params, state, x)
    return state.apply_gradients(grads=gradients)


def drop_in_a_scan(state, x):
    state = state.replace(step=jnp.asarray(state.step))
    return jax.lax.scan(lambda state, x: (drop(state, x), None), state, x[None])[0]


def compile_again(step):
    """What is compiled twice is traced once, and tells once."""
    return jax.jit(lambda state, x: step(state, x))


def take_steps(step, state, steps=25):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            state = step(state, INPUT)
    return state, caught


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "step", [keep, keep_in_two_lines, keep_later, keep_after_compiled_update, mean_to_keep]
)
def test_kept_statistics_are_no_reason_to_warn(step, compiled):
    _, caught = take_steps(compile_again(step) if compiled else step, small_state())
    assert caught == []
    assert training.state._omissions == {}


def test_states_without_values_are_not_counted():
    state = drop(small_state(), INPUT)
    for _ in range(25):
        jax.eval_shape(lambda state: state.replace(step=0), state)


@pytest.mark.parametrize(
    "make",
    [lambda: drop, *(functools.partial(compile_again, step) for step in (drop, drop_in_a_scan))],
    ids=["as it is", "compiled", "scanned"],
)
@pytest.mark.parametrize("fields", [{}, {"kind": OwnState, "own": 0}], ids=["ours", "a subclass"])
def test_dropped_statistics_are_told_once_at_their_line(make, fields):
    state, caught = take_steps(make(), small_state(**fields))
    (warning,) = caught
    assert warning.category is UserWarning
    assert warning.filename == __file__
    assert warning.lineno == drop.__code__.co_firstlineno + 2
    assert "batch_stats of ours, theirs as they were" in str(warning.message)
    fix = "Write state.apply_gradients(grads=grads, batch_stats=updates['batch_stats']); or"
    assert fix in str(warning.message)
    assert "batch_stats=state.batch_stats." in str(warning.message)
    assert state.step == 25
    assert_close(state.batch_stats, small_state().batch_stats)


def test_dropped_statistics_as_an_error():
    step, state = compile_again(drop), small_state()
    with pytest.raises(UserWarning, match="batch_stats of ours, theirs as they were"):
        for _ in range(25):
            state = step(state, INPUT)


def test_every_line_is_told_once():
    take_steps(drop, small_state())
    assert take_steps(drop, small_state())[1] == []
    assert take_steps(drop_in_a_scan, small_state())[1] == []
    drop_elsewhere = compile_again(lambda state, x: state.apply_gradients(grads=state.params))
    assert len(take_steps(drop_elsewhere, small_state())[1]) == 1


@pytest.fixture
def other_state():
    """A state whose layers have other names than those of `SMALL`."""
    model = linen.BatchNorm(use_running_average=False)
    return training.TrainState.create(
        apply_fn=model.apply, tx=OPTIMIZER, **model.init(jax.random.key(0), INPUT)
    )


def test_states_of_other_models_are_not_counted(other_state):
    drop(small_state(), INPUT)
    for step in range(25):
        other_state.replace(step=step)


def drop_beside(other):
    def step(state, x):
        other.replace(batch_stats=other.batch_stats)
        return drop(state, x)

    return step


def test_statistics_kept_of_other_models_hide_nothing(other_state):
    """Those of a model with the same layers do, as the docstring says."""
    assert take_steps(drop_beside(small_state()), small_state())[1] == []
    assert len(take_steps(drop_beside(other_state), small_state())[1]) == 1


class NoNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_without_norms_drops_nothing(compiled):
    step = compile_again(drop) if compiled else drop
    assert take_steps(step, small_state(model=NoNorm()))[1] == []


def test_a_state_is_to_others_what_flax_has():
    theirs, ours = small_state(FlaxState), drop(small_state(), INPUT)
    assert isinstance(ours, train_state.TrainState)
    saved = serialization.to_state_dict(ours)
    assert saved.keys() == serialization.to_state_dict(theirs).keys()
    fields, expected = (
        [field.name for field in dataclasses.fields(kind)] for kind in (type(ours), FlaxState)
    )
    assert fields == expected
    restored = serialization.from_state_dict(theirs, saved)
    assert_close(variables(restored), variables(ours))
    restored = serialization.from_bytes(small_state(), serialization.to_bytes(ours))
    assert_close(variables(restored), variables(ours))


@pytest.mark.parametrize("step", [drop, keep_in_two_lines])
def test_looking_for_dropped_statistics_costs_nothing(step):
    traced = []

    def counted(state, x):
        traced.append(0)
        return step(state, x)

    compiled, before = jax.jit(counted), small_state()
    state = before
    for _ in range(3):
        state = compiled(state, INPUT)
    assert len(traced) == 1
    assert jax.tree.structure(state) == jax.tree.structure(before)
    ours, theirs = (
        jax.jit(step).lower(small_state(kind), INPUT).as_text()
        for kind in (training.TrainState, FlaxState)
    )
    assert ours == theirs


# --- steps made for any model -----------------------------------------------------------------


def sines(apply, x):
    return jnp.mean(jnp.sin(apply(x, train=True)))


@pytest.mark.parametrize("kind", [training.TrainState, FlaxState])
def test_a_made_step_is_the_step_by_hand(kind):
    made, hand = jax.jit(training.make_train_step(sines)), jax.jit(keep)
    state = expected = small_state(kind)
    for _ in range(3):
        loss, _ = small_loss(state.params, state, INPUT)
        state, value = made(state, INPUT)
        expected = hand(expected, INPUT)
        assert_close(value, loss)
    assert_close(variables(state), variables(expected))
    assert_close(state.opt_state, expected.opt_state)
    assert state.step == 3


def test_calls_of_one_loss_chain_the_statistics():
    def loss(apply, x):
        first = apply(x, train=True)
        return jnp.mean(jnp.sin(first + apply(2 * x, train=True)))

    state = small_state()
    after, _ = jax.jit(training.make_train_step(loss))(state, INPUT)
    _, once = small_loss(state.params, state, INPUT)
    _, twice = small_loss(state.params, state.replace(batch_stats=once), 2 * INPUT)
    assert_close(after.batch_stats, twice)


def test_a_loss_with_aux():
    def loss(apply, x):
        y = apply(x, train=True)
        return jnp.mean(jnp.sin(y)), {"y": y}

    state = small_state()
    after, (value, aux) = training.make_train_step(loss, has_aux=True)(state, INPUT)
    expected, _ = training.make_train_step(sines)(state, INPUT)
    assert_close(variables(after), variables(expected))
    assert_close(value, jnp.mean(jnp.sin(aux["y"])))


def test_random_streams_differ_by_step_and_by_call():
    def loss(apply, x):
        views = [apply(x, train=True, rate=0.5) for _ in range(2)]
        return jnp.mean(jnp.sin(views[0])), views

    key = jax.random.key(7)
    step = training.make_train_step(loss, has_aux=True, rngs={"dropout": key})
    state = small_state()
    seen = []
    for number in range(2):
        before = state
        state, (_, views) = step(state, INPUT)
        seen += views
        stats = before.batch_stats
        for call, view in enumerate(views):
            rngs = {"dropout": jax.random.fold_in(jax.random.fold_in(key, number), call)}
            given = {"params": before.params, "batch_stats": stats}
            options = {"train": True, "rate": 0.5, "mutable": ["batch_stats"], "rngs": rngs}
            expected, updates = SMALL.apply(given, INPUT, **options)
            stats = updates["batch_stats"]
            assert_close(view, expected)
    for one, other in itertools.combinations(seen, 2):
        assert not np.allclose(one, other, atol=1e-2)


def test_random_streams_have_names():
    with pytest.raises(TypeError, match=r"rngs is of type .*, expected keys by name: make_train"):
        training.make_train_step(sines, rngs=jax.random.key(0))


def test_made_steps_of_a_model_without_norms():
    state = small_state(model=NoNorm())
    after, value = jax.jit(training.make_train_step(sines))(state, INPUT)
    expected = mean_to_keep(state, INPUT)
    assert_close(after.params, expected.params)
    assert after.batch_stats == {}
    evaluate = training.make_eval_step(lambda apply, x: jnp.mean(jnp.sin(apply(x, train=False))))
    assert_close(evaluate(state, INPUT), value)


def logits(apply, x):
    return apply(x, train=False)


def test_a_made_evaluation_uses_the_running_statistics():
    state = keep(small_state(), INPUT)
    expected = SMALL.apply(variables(state), INPUT, train=False)
    step = training.make_eval_step(logits)
    assert_close(step(state, INPUT), expected)
    assert_close(jax.jit(step)(state, INPUT), expected)
    # Statistics are an argument, not a constant of what has been compiled.
    state = keep(state, INPUT)
    assert_close(step(state, INPUT), SMALL.apply(variables(state), INPUT, train=False))


def test_a_made_evaluation_does_not_train():
    model = linen.BatchNorm(momentum=0.9)
    state = training.TrainState.create(
        apply_fn=model.apply, tx=OPTIMIZER, **model.init(jax.random.key(0), INPUT, True)
    )
    state = state.replace(batch_stats=jax.tree.map(lambda leaf: leaf + 1, state.batch_stats))
    step = training.make_eval_step(lambda apply, x: apply(x, use_running_average=False))
    with pytest.raises(ValueError, match="batch_stats is immutable, but the top-level BatchNorm"):
        step(state, INPUT)


# --- statistics that were never updated -------------------------------------------------------

NEVER = r"batch_stats of {} are still the initial ones \(mean 0, var 1\): no training step has"


@contextlib.contextmanager
def warns(*layers):
    """Exactly one warning, of these layers and at a line of this file; without any, none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert len(caught) == bool(layers)
    for warning in caught:
        assert re.match(NEVER.format(", ".join(layers)), str(warning.message))
        assert "state.apply_gradients(grads=grads, batch_stats=updates[" in str(warning.message)
        assert (warning.category, warning.filename) == (UserWarning, __file__)


def norm(mean=(0, 0), var=(1, 1), **count):
    stats = {"mean": mean, "var": var} | count
    return {name: jnp.asarray(value, jnp.float32) for name, value in stats.items()}


@pytest.mark.parametrize(
    ("batch_stats", "layers"),
    [
        ({}, []),
        (norm(), ["the top-level norm"]),
        ({"a": {"b": norm()}}, ["a/b"]),
        ({"a": {"b": norm()}, "c": norm((0, 1)), "d": norm()}, ["a/b", "d"]),
        ({"a": norm((0, 1e-9))}, []),
        ({"a": norm(var=(1, 0.99))}, []),
        ({"a": norm((0, 0), (1, 1), count=(1, 1))}, []),
        ({"a": norm((0, 0), (1, 1), count=(0, 0))}, ["a"]),
        ({str(n): norm() for n in range(5)}, ["0", "1", "2 and 2 more"]),
        ({"a": {"layer/kernel/sigma": jnp.ones(()), "layer/kernel/u": jnp.zeros(3)}}, []),
        (freeze({"a": norm()}), ["a"]),
        ({"a": {name: nn.Partitioned(leaf, (None,)) for name, leaf in norm().items()}}, ["a"]),
        ({"a": {name: np.asarray(leaf) for name, leaf in norm().items()}}, ["a"]),
        ({"a": {name: jnp.stack([leaf] * 2) for name, leaf in norm().items()}}, ["a"]),
    ],
)
def test_statistics_never_updated_are_told(batch_stats, layers):
    with warns(*layers):
        training.warn_if_never_updated(batch_stats)


def test_statistics_of_nnx_never_updated_are_told():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(bn.nnx.BatchNorm(2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))
    with warns("layers/0", "layers/1"):
        training.warn_if_never_updated(nnx.state(model, nnx.BatchStat))
    model(INPUT)
    # The first hands on a mean of zero and a variance of one, to a rounding.
    model.layers[1](INPUT)
    with warns():
        training.warn_if_never_updated(nnx.state(model, nnx.BatchStat))


def test_what_init_returns_was_never_updated_and_what_a_step_returns_was():
    with warns("ours", "theirs"):
        training.warn_if_never_updated(small_state().batch_stats)
    with warns():
        training.warn_if_never_updated(keep(small_state(), INPUT).batch_stats)


def test_statistics_that_cannot_be_read(monkeypatch):
    message = "batch_stats holds no values that this process can read, expected arrays outside of"
    stats = {"a": norm()}
    with pytest.raises(ValueError, match=message):
        jax.jit(training.warn_if_never_updated)(stats)
    with pytest.raises(ValueError, match=message):
        training.warn_if_never_updated(jax.eval_shape(lambda: stats))
    # As where they lie in other processes.
    monkeypatch.setattr(type(INPUT), "is_fully_addressable", False)
    monkeypatch.setattr(type(INPUT), "is_fully_replicated", False)
    with pytest.raises(ValueError, match=message):
        training.warn_if_never_updated(stats)


def test_a_made_evaluation_tells_once():
    initial, step = small_state(), training.make_eval_step(logits)
    with warns():
        compiled = jax.jit(step)(initial, INPUT)
    with warns("ours", "theirs"):
        found = [step(initial, INPUT) for _ in range(3)]
    assert_close(found, [compiled] * 3)
    step = training.make_eval_step(logits)
    with warns():
        step(keep(initial, INPUT), INPUT)


@pytest.mark.parametrize(("name", "layers"), [("none", []), ("synchronized", ["stage0_block0/"])])
def test_evaluate_tells_every_time(name, layers):
    batches = shard_dataset(dataset(8), SIZE, mesh(1))
    for _ in range(2):
        with warns(*(f"{layer}ConvNorm_0/norm.*" for layer in layers)):
            training.evaluate(initial_state(name), batches)
