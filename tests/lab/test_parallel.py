"""Runs on several devices and in chunks are the runs one by one."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax.lab.experiments import nets, parallel, sweeps
from bn_jax.lab.experiments.parallel import Layout, make_program, map_runs

DEVICES = jax.devices()
pytestmark = pytest.mark.usefixtures("compile_quickly")
LAYOUTS = [
    (1, None, 1),
    (1, 8, 4),
    (3, 8, 4),
    (13, 3, 4),
    (13, 1, 3),
    (13, None, 2),
    (13, 8, 1),
    (16, 2, 4),
    (17, 8, 2),
]


def outcome(place, key, tree):
    noise = jax.random.normal(key, (3,))
    return {"noise": noise * tree["y"], "place": place}, jax.random.split(key)


@pytest.mark.parametrize(("number", "chunk", "devices"), LAYOUTS)
def test_every_run_is_made_once_and_in_its_place(number, chunk, devices):
    keys = jax.random.split(jax.random.key(0), number)
    places, tree = np.arange(number), {"y": np.linspace(1, 2, number, dtype=np.float32)}
    layout = Layout(DEVICES[:devices], chunk)
    found = map_runs(outcome, places, keys, tree, layout=layout)
    expected = jax.jit(jax.vmap(outcome))(places, keys, tree)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6),
        *(jax.tree.map(readable, values) for values in (found, expected)),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {
        leaf.dtype for leaf in jax.tree.leaves(expected)
    }
    assert all(leaf.devices() == {DEVICES[0]} for leaf in jax.tree.leaves(found))


def readable(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def train_small(rate, seed):
    """Trains a small network on random examples and returns the losses."""
    model = nets.MLP((4,), norm=nets.BATCH_NORM)
    part = sweeps.Part(jax.random.normal(jax.random.key(7), (12, 5)), jnp.arange(12) % 3)
    variables = model.init(jax.random.key(seed), part.x, train=False)
    rows = np.random.default_rng(0).integers(12, size=(6, 8))
    return sweeps.train(model, optax.sgd(rate), variables, part, rows).losses


def test_trainings_in_chunks_are_those_one_by_one():
    rates, seeds = np.array([0.01, 0.1, 1.0], np.float32), np.arange(3, dtype=np.int32)
    alone = jax.jit(train_small)
    expected = np.array([[alone(rate, seed) for seed in seeds] for rate in rates])
    program = make_program(sweeps.at_place(train_small, 3), 9, Layout(DEVICES[:2], 1))
    np.testing.assert_array_equal(np.asarray(program(rates, seeds))[:9], expected.reshape(9, -1))
    np.testing.assert_allclose(sweeps.sweep(train_small, rates, seeds), expected, rtol=2e-4)


def test_devices_do_not_wait_for_each_other():
    layout = Layout(DEVICES[:3], 2)
    compiled = make_program(lambda place, x: jnp.sin(x) * place, 13, layout).lower(1.0).compile()
    text = compiled.as_text()
    assert "num_partitions=3" in text
    for word in ("all-reduce", "all-gather", "all-to-all", "collective", "send", "recv"):
        assert f" {word}" not in text


@pytest.mark.parametrize("chunk", [None, 2])
def test_runs_inside_of_runs_and_of_transforms(chunk):
    x, y = np.arange(5.0, dtype=np.float32), np.arange(3.0, dtype=np.float32)
    layout = Layout(DEVICES[:2], chunk)

    def of_row(x):
        # The inner runs close over a value of the outer one.
        return map_runs(lambda y: jnp.sin(x * y), y, layout=layout)

    expected = np.sin(np.outer(x, y))
    for made in (map_runs(of_row, x, layout=layout), jax.jit(jax.vmap(of_row))(x)):
        np.testing.assert_allclose(made, expected, rtol=1e-6)
    slopes = jax.grad(lambda x: map_runs(jnp.sin, x, layout=layout).sum())(x)
    np.testing.assert_allclose(slopes, np.cos(x), rtol=1e-6)
    # A run that fails leaves no trace.
    with pytest.raises(ZeroDivisionError):
        map_runs(lambda x: 1 / 0, x, layout=layout)
    assert not parallel._is_in_run.get()


def test_results_of_runs_are_inputs_of_others():
    layout = Layout(DEVICES[:3], 2)
    once = map_runs(jnp.sin, np.arange(5.0, dtype=np.float32), layout=layout)
    twice = map_runs(jnp.cos, once, layout=layout)
    np.testing.assert_allclose(twice, np.cos(np.sin(np.arange(5.0))), rtol=1e-6)


@pytest.mark.parametrize(
    ("number", "chunk", "devices", "split"),
    [
        (256, 8, 2, (2, 16, 8)),
        (24, 8, 2, (2, 2, 6)),
        (10, 8, 2, (2, 1, 5)),
        (3, 8, 8, (3, 1, 1)),
        (100, None, 4, (4, 1, 25)),
        (7, 1, 2, (2, 4, 1)),
    ],
)
def test_the_split_leaves_hardly_a_place_over(number, chunk, devices, split):
    found = parallel._split(number, Layout([DEVICES[0]] * devices, chunk))
    assert found == split
    assert found.devices * found.chunks * found.width - number < found.devices * found.chunks


def test_a_cpu_takes_chunks_and_an_accelerator_all_runs(monkeypatch):
    assert parallel.choose_layout() == Layout(DEVICES, parallel.CPU_CHUNK)

    class Accelerator:
        platform = "gpu"

    devices = [Accelerator(), Accelerator()]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert parallel.choose_layout() == Layout(devices, None)


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
COUNT = """
import jax, os
import benchmarks.sweep, bn_jax.lab.commands.reproduction
from bn_jax.lab.experiments import parallel
{before}
parallel.request_devices()
print(jax.local_device_count(), os.environ.get("JAX_NUM_CPU_DEVICES"))
"""


@pytest.mark.parametrize(
    ("given", "before", "expected"),
    [
        ({}, "", f"{CORES} {CORES}"),
        ({"JAX_NUM_CPU_DEVICES": "3"}, "", "3 3"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, "", "5 None"),
        ({}, 'jax.config.update("jax_num_cpu_devices", 6)', "6 None"),
        pytest.param({}, "jax.devices()", "1 None", marks=pytest.mark.exhaustive),
    ],
)
def test_each_core_is_a_device_unless_the_user_has_chosen(given, before, expected):
    names = {"JAX_NUM_CPU_DEVICES", "XLA_FLAGS"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    found = subprocess.run(
        [sys.executable, "-c", COUNT.format(before=before)],
        env={**environment, **given, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == expected
