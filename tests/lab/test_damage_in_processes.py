"""Runs that were really killed and really damaged, in processes of their own."""

import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from support import COMMAND, bars, copy_of, environment, files, run_process

OPTIONS = ("--model", "mlp", "--arm", "none", "--batch-size", "8", "--devices", "1")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run whose process was killed once it had two checkpoints."""
    folder = tmp_path_factory.mktemp("killed")
    np.savez(folder / "bars.npz", **bars())
    arguments = ("train", *OPTIONS, "--data", "bars.npz", "--epochs", "150", "--out", "run")
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    positions = folder / "run/checkpoints/no-normalization"
    end = time.monotonic() + 120
    while len(list(positions.glob("*.sha256"))) < 2 and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    return folder / "run"


def seals(run):
    """The seals of the checkpoints, the newest first."""
    found = (run / "checkpoints/no-normalization").glob("*.sha256")
    return sorted(found, key=lambda path: int(path.stem), reverse=True)


def edit(path, old, new):
    content = path.read_bytes()
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new, 1))


def assert_one_line(finished, start):
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith(f"bn-jax: error: {start}")
    assert finished.stderr.count("\n") == 1


def test_a_damaged_seal_falls_back_to_the_checkpoint_before_it(killed, tmp_path):
    run = copy_of(killed, tmp_path / "run")
    shutil.copy(killed.parent / "bars.npz", tmp_path)
    newest = seals(run)[0]
    newest.write_bytes(b"\xff" + newest.read_bytes()[1:])
    finished = run_process(["train", "--resume", "run", "--no-progress"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.startswith("bn-jax: warning: ")
    assert newest.stem in finished.stderr and finished.stderr.count("\n") == 1
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["config"]["epochs"] == 150
    assert run_process(["eval", "run"], tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"seed": 0', b'"seed": 8'),
        (b'"learning_rate": 0.1', b'"learning_rate": 8.1'),
        (b'"epochs": 150', b'"epochs": 1e400'),
    ],
)
def test_a_damaged_configuration_is_one_line(killed, tmp_path, old, new):
    run = copy_of(killed, tmp_path / "run")
    edit(run / "checkpoints/config.json", old, new)
    before = files(run)
    assert_one_line(run_process(["train", "--resume", "run"], tmp_path), "--resume: ")
    assert files(run) == before


def test_a_damaged_metric_is_one_line(trained, tmp_path):
    run = copy_of(trained[0] / "a/run", tmp_path / "run")
    edit(run / "metrics.json", b'"devices": 2', b'"devices": 0')
    finished = run_process(["eval", "run"], tmp_path)
    assert_one_line(finished, "DIR: run/metrics.json: ")
    assert "devices" in finished.stderr
