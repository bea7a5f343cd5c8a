import errno
import functools
import os
import subprocess
import sys
import types

import chex
import contract
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from support import far_from_initial, small_disk

from bn_jax import linen, training
from bn_jax.lab import checkpoints, models
from bn_jax.lab.files.records import ARMS, Config, Origin, Started
from bn_jax.lab.fitting import Report

NORMS = {
    "none": None,
    "per device": functools.partial(linen.BatchNorm, virtual_batch_size=2),
    "synchronized": linen.BatchNorm,
}
OPTIMIZER = optax.sgd(optax.linear_schedule(0.1, 0, 9), momentum=0.9)


@pytest.fixture(scope="module", autouse=True)
def quickly(compile_quickly):
    yield


@functools.cache
def initial_state(norm, devices=1, optimizer=OPTIMIZER):
    model = models.ResNet(3, stage_sizes=(1,), widths=(4,), norm=NORMS[norm])
    mesh = training.make_mesh(jax.devices()[:devices])
    return training.create_state(model, optimizer, (4, 4, 1), 0, mesh)


def trained_state(norm, devices=1):
    """A state that differs from the initial one in every number."""
    return jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), initial_state(norm, devices))


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_variables_move_between_device_counts(tmp_path, norm):
    state = trained_state(norm, 4)
    checkpoints.save_variables(tmp_path / "checkpoint", state)
    for devices in (1, 2):
        initial = initial_state(norm, devices)
        kernel = initial.params["classifier"]["kernel"]
        shapes = jax.eval_shape(lambda state: state, initial)
        restored = checkpoints.restore_variables(tmp_path / "checkpoint", shapes, kernel.sharding)
        assert_same(restored.params, state.params)
        assert_same(restored.batch_stats, state.batch_stats)
        assert restored.params["classifier"]["kernel"].sharding == kernel.sharding


def test_variables_of_another_model_are_refused(tmp_path):
    checkpoints.save_variables(tmp_path / "checkpoint", initial_state("none"))
    other = initial_state("synchronized")
    with pytest.raises(ValueError, match=r"holds no array at \['batch_stats'.*expected float32"):
        checkpoints.restore_variables(tmp_path / "checkpoint", other, other.step.sharding)


ORIGIN = Origin(
    run=Started(
        config=Config(data=None, devices=1, epochs=20, batch_size=2, learning_rate=0.1, seed=0),
        data_file=None,
        data_sha256="0" * 64,
    ),
    arm=ARMS[2],
)


def position(epoch, norm="synchronized", devices=1):
    """Reports with a loss that JSON has no number for, and a generator in the midst."""
    rng = np.random.default_rng(epoch)
    rng.permutation(7)
    evaluation = training.Evaluation(float("inf"), 1 / 3, 1, 3)
    reports = [
        Report(2 * past, past, evaluation, evaluation, 6 * past, 0.1 * past)
        for past in range(1, epoch + 1)
    ]
    return checkpoints.Position(trained_state(norm, devices), rng, reports)


@pytest.mark.parametrize("norm", NORMS)
def test_a_position_is_restored_whole_on_other_devices(tmp_path, norm):
    saved = position(3, norm, devices=4)
    expected = np.random.default_rng(3)
    expected.permutation(7)
    checkpoints.save_position(tmp_path / "arm", saved, ORIGIN)
    initial = initial_state(norm, 2)
    restored = checkpoints.restore_position(tmp_path / "arm/3", initial)
    assert restored.reports == saved.reports
    assert restored.rng.permutation(50).tolist() == expected.permutation(50).tolist()
    for name in ("params", "batch_stats", "opt_state", "step"):
        assert_same(getattr(restored.state, name), getattr(saved.state, name))
    for leaf, placed in zip(jax.tree.leaves(restored.state), jax.tree.leaves(initial), strict=True):
        assert (leaf.sharding, leaf.dtype) == (placed.sharding, placed.dtype)


def test_the_two_newest_positions_are_kept(tmp_path):
    for epoch in (1, 2, 9, 10, 11):
        checkpoints.save_position(tmp_path, position(epoch), ORIGIN)
    assert checkpoints.positions(tmp_path) == [tmp_path / "11", tmp_path / "10"]
    assert {path.name for path in tmp_path.iterdir()} == {"10", "10.sha256", "11", "11.sha256"}
    assert all(map(checkpoints.is_intact, checkpoints.positions(tmp_path)))


def test_positions_of_nothing(tmp_path):
    assert checkpoints.positions(tmp_path / "none") == []


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_link(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "a byte of the arrays flipped": lambda path: flip(path / "state.safetensors"),
    "arrays cut": lambda path: (path / "state.safetensors").write_bytes(b""),
    "a file missing": lambda path: (path / "state.safetensors").unlink(),
    "a file too many": lambda path: (path / "more").touch(),
    "a pipe": lambda path: os.mkfifo(path / "more"),
    "a link out of it": lambda path: (path / "more").symlink_to("/dev/zero"),
    "a file for the folder": lambda path: path.rename(path.parent / "1.old") and path.touch(),
    "another position": lambda path: flip(path / "position.json"),
    "no SHA-256 yet": lambda path: path.with_suffix(".sha256").unlink(),
    "a SHA-256 that is no text": lambda path: path.with_suffix(".sha256").write_bytes(b"\xff" * 64),
    "a SHA-256 that never ends": lambda path: replace_by_link(path.with_suffix(".sha256")),
    "a folder for the SHA-256": lambda path: replace_by_folder(path.with_suffix(".sha256")),
    "half a SHA-256": lambda path: path.with_suffix(".sha256").write_text("0123"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_recognized_and_overwritten(tmp_path, damage):
    checkpoints.save_position(tmp_path, position(1), ORIGIN)
    assert checkpoints.is_intact(tmp_path / "1")
    damage(tmp_path / "1")
    assert not checkpoints.is_intact(tmp_path / "1")
    assert checkpoints.positions(tmp_path) == [tmp_path / "1"]
    checkpoints.save_position(tmp_path, position(1), ORIGIN)
    assert checkpoints.is_intact(tmp_path / "1")


# As if another process had taken the space since it was asked for.
FILLING = """
import sys, types
from pathlib import Path
import numpy as np
from bn_jax.lab import checkpoints
checkpoints._require_space = lambda *_: None
params = {str(i): np.random.default_rng(i).standard_normal((64, 64)) for i in range(20)}
try:
    checkpoints.save_variables(
        Path(sys.argv[1]), types.SimpleNamespace(params=params, batch_stats={})
    )
except OSError as error:
    print(error.errno)
"""


def test_a_disk_that_fills_while_orbax_writes_is_one_exception(tmp_path):
    with small_disk(tmp_path / "disk", "96k"):
        finished = subprocess.run(
            [sys.executable, "-W", "error", "-c", FILLING, tmp_path / "disk/checkpoint"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert (finished.stdout, finished.stderr) == (f"{errno.ENOSPC}\n", "")


# The arrays are read as another format: all at once, and the first failure closes the event loop.
UNREADABLE = """
import json, sys, time, types
from pathlib import Path
import jax, numpy as np
from bn_jax.lab import checkpoints
path = Path(sys.argv[1])
state = types.SimpleNamespace(params={str(i): np.ones(90000) for i in range(40)}, batch_stats={})
checkpoints.save_variables(path, state)
saved = json.loads((path / "_METADATA").read_text())
(path / "_METADATA").write_text(json.dumps(saved | {"use_zarr3": not saved["use_zarr3"]}))
try:
    checkpoints.restore_variables(path, state, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
except ValueError as error:
    print(error)
    time.sleep(1)  # for the threads that come too late
"""


def test_a_checkpoint_that_orbax_cannot_read_is_one_exception(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", UNREADABLE, tmp_path / "checkpoint"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.stdout == "it holds no array at ['params']['0'], expected float64 (90000,)\n"
    assert finished.stderr == ""


def test_other_faults_of_threads_are_still_told(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    for _ in range(3):
        with pytest.raises(KeyError), checkpoints._quiet():
            raise KeyError
    late = types.SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    other = types.SimpleNamespace(exc_value=RuntimeError("another"))
    sys.unraisablehook(late)
    sys.unraisablehook(other)
    assert told == [other]


def made_by(api, direction):
    """What each norm of Flax's or ours keeps, as its users save it; and the same, abstractly."""
    norms = [norm for norm in contract.NORMS.values() if norm.api == api]
    if api == "linen":
        kept = {norm.name: norm.init(norm.kinds[direction]) for norm in norms}
    else:
        kept = {norm.name: nnx.state(norm.make(norm.kinds[direction])) for norm in norms}
    return kept, jax.eval_shape(lambda: kept)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("saving", [0, 1], ids=["ours", "flax"])
def test_orbax_checkpoints_move_between_flax_and_ours(tmp_path, api, saving):
    """Those of msgpack are in tests/modules/test_flax_compat.py."""
    saved = far_from_initial(made_by(api, saving)[0])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "norms", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "norms", made_by(api, 1 - saving)[1])
    chex.assert_trees_all_equal(restored, saved, strict=True)
    assert len(restored) == 5
