import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bn_jax.lab import checkpoints, processes
from bn_jax.lab import command as cli

# Training and data for which no ReLU is within rounding of its kink: there, the last digits of a
# sum over devices decide over a gradient.
TRAIN = (
    *("train", "--epochs", "2", "--batch-size", "16", "--learning-rate", "0.05"),
    *("--seed", "1", "--data", "bars.npz"),
)
# The command with a smaller network, for starting and compiling are what takes the time.
SMALL = """
import itertools, os, signal, sys
from bn_jax.lab import command as cli, fitting, runs

make_model = runs.make_model
runs.make_model = lambda *given: make_model(*given).clone(stage_sizes=(1, 1), widths=(4, 6))
"""
COMMAND = ("-W", "error", "-c", f"{SMALL}\ncli.main()")
# The same, in which a process is killed within the second epoch of an arm.
KILLED = f"""{SMALL}
victim, arm = sys.argv.pop(1), int(sys.argv.pop(1))
fit, calls = fitting.fit, itertools.count(1)

def fit_until_killed(*arguments, **options):
    call = next(calls)
    for reached in fit(*arguments, **options):
        if (call, reached[1].step) == (arm, 11) and victim == sys.argv[-1]:
            os.kill(os.getpid(), signal.SIGKILL)
        yield reached

fitting.fit = fit_until_killed
cli.main()
"""
# Gloo prints its connections itself, piece by piece from several threads at once, with ranks and
# line ends between these pieces.
GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : "
)
CURVES = ("loss", "accuracy", "validation_loss", "validation_accuracy")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = rng.normal(0, 0.1, (120, 4, 4))
    x[y == 0, 1] += 1
    x[y == 1, :, 1] += 1
    np.savez(folder / "bars.npz", x=x, y=y)
    return folder


def start(folder, arguments):
    # Compiling is most of the time that these small runs take: with little optimization, and once.
    environment = {
        "PYTHONPATH": str(Path(cli.__file__).parents[2]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*started):
    """Waits for processes; returns the code, the lines printed and the errors of each."""
    finished = []
    try:
        for process in started:
            out, err = process.communicate(timeout=170)
            printed = GLOO.sub("", out).splitlines()
            lines = [line for line in printed if line.strip("0123456789 ")]
            finished.append((process.returncode, lines, err))
    finally:
        for process in started:
            process.kill()
    return finished


def run_two(folder, *arguments, program=COMMAND):
    shared = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id")
    return finish(*(start(folder, [*program, *arguments, *shared, i]) for i in range(2)))


def numbers(run):
    metrics = json.loads((run / "metrics.json").read_text())
    for arm in metrics["arms"].values():
        assert arm.pop("examples_per_second") > 0
    del metrics["checkpoint_sha256"]
    return metrics


@pytest.fixture(scope="module")
def two(folder):
    finished = run_two(folder, *TRAIN, "--devices", 4, "--out", "two")
    assert [code for code, _, _ in finished] == [0, 0], finished
    return finished


def test_two_processes_train_as_one(folder, two):
    arguments = (*TRAIN, "--devices", 4, "--out", "one")
    ((code, lines, err),) = finish(start(folder, [*COMMAND, *arguments]))
    assert (code, err) == (0, "")
    (_, first_lines, _), (_, second_lines, _) = two
    assert second_lines == []
    for printed in (lines, first_lines):
        assert sum(": epoch " in line for line in printed) == 6
    expected, actual = numbers(folder / "one"), numbers(folder / "two")
    assert actual["config"]["devices"] == 4
    for name, arm in expected["arms"].items():
        curves, expected_curves = actual["arms"][name].pop("curves"), arm.pop("curves")
        assert curves["step"] == expected_curves["step"]
        for curve in CURVES:
            np.testing.assert_allclose(curves[curve], expected_curves[curve], rtol=1e-3, atol=1e-5)
    assert actual == expected


def test_process_0_alone_writes(folder, two):
    assert {path.name for path in (folder / "two").iterdir()} == {
        "checkpoint",
        "curves.png",
        "metrics.json",
        "test.npz",
    }


def run_killed(folder, victim, arm):
    """Returns the survivor's line of error and the positions saved, per arm."""
    out = f"killed{victim}"
    arguments = (victim, arm, *TRAIN, "--devices", 4, "--out", out)
    finished = run_two(folder, *arguments, program=("-W", "error", "-c", KILLED))
    assert finished[victim][0] == -signal.SIGKILL
    code, _, err = finished[1 - victim]
    assert code == 1 and "Traceback" not in err, err
    (error,) = (line for line in err.splitlines() if line.startswith("bn-jax: "))
    return error, {
        path.name: [position.name for position in checkpoints.positions(path)]
        for path in (folder / out / "checkpoints").iterdir()
        if path.is_dir()
    }


def test_the_loss_of_process_0_stops_the_others(folder):
    error, positions = run_killed(folder, victim=0, arm=1)
    assert error.startswith("bn-jax: error: another process was lost")
    assert error.endswith("; start every process again with bn-jax train --resume killed0")
    assert positions == {"no-normalization": ["1"]}


def test_a_run_resumes_after_the_loss_of_process_1(folder, two):
    error, positions = run_killed(folder, victim=1, arm=2)
    assert error.startswith("bn-jax: error: another process was lost")
    assert error.endswith("; start every process again with bn-jax train --resume killed1")
    assert positions == {"no-normalization": ["2", "1"], "per-device-batch-norm": ["1"]}
    (code, lines, err), second = run_two(folder, "train", "--resume", "killed1")
    assert (code, err) == (0, "") and second == (0, [], "")
    assert [line.split(", loss")[0] for line in lines if ": epoch " in line] == [
        "no normalization: epoch 2 of 2",
        *(f"per-device batch norm: epoch {epoch} of 2" for epoch in (1, 2)),
        *(f"synchronized batch norm: epoch {epoch} of 2" for epoch in (1, 2)),
    ]
    assert numbers(folder / "killed1") == numbers(folder / "two")


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"SLURM_NTASKS": "4"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
    ],
)
def test_launchers_that_jax_recognizes(monkeypatch, variables, number):
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes.launched_processes() == number


def test_one_process_sends_to_itself():
    assert processes.from_first("two wörds") == "two wörds"
