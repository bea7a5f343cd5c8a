"""Runs of two processes with two devices each: real processes, and real losses of them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import bars, make_small_resnet, numbers_of, run_command

from bn_jax.lab import checkpoints, processes, runs

ROOT = Path(runs.__file__).parents[2]
# Training and data for which no ReLU is within rounding of its kink: there, the last digits of a
# sum over devices decide over a gradient.
TRAIN = (
    *("train", "--arm", "synchronized", "--epochs", "2", "--batch-size", "16", "--devices", "4"),
    *("--learning-rate", "0.05", "--seed", "1", "--data", "bars.npz", "--out"),
)
POSITIONS = "checkpoints/synchronized-batch-norm"
# The command, with a small network, for starting and compiling are what takes the time; and with a
# fault, "WHAT WHEN". All of that is in the child, which imports JAX; the parent is as it is.
PROGRAM = """
import os, signal, sys, time
from bn_jax.lab import command
from bn_jax.lab.__main__ import run

supervise = command.supervise

def fail(what):
    if what == "parent":
        os.kill(os.getppid(), signal.SIGKILL)
    elif what in ("SIGTERM", "SIGINT"):
        os.kill(os.getppid(), signal.Signals[what])
    else:
        os.kill(os.getpid(), signal.Signals[what])
    time.sleep(600)

def fail_when(module, name, what, before=lambda *given: True):
    function = getattr(module, name)
    def failing(*given, **options):
        if before(*given):
            fail(what)
        return function(*given, **options)
    setattr(module, name, failing)

def supervise_and_patch():
    supervise()
    from pathlib import Path
    from support import make_small_resnet
    from bn_jax.lab import checkpoints, fitting, processes, runs
    from bn_jax.lab.training import results
    runs.make_model = make_small_resnet
    Path(f"{os.getppid()}.child").write_text(str(os.getpid()))
    what, when = os.environ.get("FAULT", "nothing never").split()
    if when == "connected":
        fail_when(processes, "from_first", what)
    if when == "training":
        epochs = []
        fail_when(fitting, "_take_steps", what, lambda *_: epochs.append(1) or len(epochs) == 4)
    if when == "saving":
        # The files of the second position are there, but for the seal.
        fail_when(checkpoints, "sha256_of_folder", what, lambda path: path.name == "2")
    if when == "finishing":
        fail_when(results, "write", what)

command.supervise = supervise_and_patch
run()
"""
# Gloo prints its connections itself, piece by piece from several threads at once, with ranks and
# line ends between these pieces.
GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : "
)
LOST = "bn-jax: error: another process was lost"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    np.savez(folder / "bars.npz", **bars(120))
    return folder


def start(folder, *arguments, fault="nothing never"):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    # Compiling is most of the time that these small runs take: with little optimization, and once.
    environment = {
        "PYTHONPATH": path,
        "FAULT": fault,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, *map(str, arguments)],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(folder, *arguments, faults=("nothing never",) * 2, others=((), ())):
    shared = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id")
    return [
        start(folder, *arguments, *shared, number, *other, fault=fault)
        for number, (fault, other) in enumerate(zip(faults, others, strict=True))
    ]


def finish(started):
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


def error_of(finished, code):
    """The one line of the command, after what the runtime itself may have reported."""
    assert finished[0] == code, finished
    assert "Traceback" not in finished[2], finished[2]
    (line,) = (line for line in finished[2].splitlines() if line.startswith("bn-jax: "))
    assert finished[2].endswith(line + "\n")
    return line


@pytest.fixture(scope="module")
def two(folder):
    finished = finish(start_two(folder, *TRAIN, "two"))
    assert [code for code, _, _ in finished] == [0, 0], finished
    return finished


def run_here(folder, *arguments, warning=""):
    """Runs the command in this process, which has 4 devices, with the same network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_model", make_small_resnet)
        patch.chdir(folder)
        code, out, err = run_command(*arguments)
    assert code == 0 and err.startswith(warning) and bool(err) == bool(warning), err
    return out.splitlines()


def assert_same_training(actual, expected):
    actual, expected = numbers_of(actual), numbers_of(expected)
    for name, arm in expected["arms"].items():
        curves, expected_curves = actual["arms"][name].pop("curves"), arm.pop("curves")
        assert curves.keys() == expected_curves.keys()
        for curve, values in expected_curves.items():
            np.testing.assert_allclose(curves[curve], values, rtol=1e-3, atol=1e-5)
    assert actual == expected


@pytest.fixture(scope="module")
def one(folder, compile_quickly):
    """The lines of a run in one process, to which nothing happens."""
    return run_here(folder, *TRAIN, "one")


def test_a_run_resumes_in_one_process_after_the_loss_of_one_of_two(folder, one):
    started = start_two(folder, *TRAIN, "lost", faults=("nothing never", "SIGKILL training"))
    survivor, victim = finish(started)
    advice = "; start every process again with bn-jax train --resume lost"
    assert error_of(survivor, 1).startswith(LOST) and error_of(survivor, 1).endswith(advice)
    assert error_of(victim, 1) == f"bn-jax: error: SIGKILL ended this process{advice}"
    assert [path.name for path in checkpoints.positions(folder / "lost" / POSITIONS)] == ["1"]
    lines = run_here(folder, "train", "--resume", "lost")
    assert [line.split(", loss")[0] for line in lines if ": epoch " in line] == [
        f"synchronized batch norm: epoch {epoch} of 2" for epoch in (1, 2)
    ]
    assert_same_training(folder / "lost", folder / "one")


def test_two_processes_train_as_one(folder, two, one):
    (_, first_lines, _), (_, second_lines, _) = two
    assert second_lines == []
    for printed in (one, first_lines):
        assert sum(": epoch " in line for line in printed) == 2
    assert numbers_of(folder / "two")["config"]["devices"] == 4
    assert_same_training(folder / "two", folder / "one")


def test_process_0_alone_writes(folder, two):
    results = {path.name for path in (folder / "two").iterdir()}
    assert {"checkpoint", "epochs.csv", "metrics.json", "test.npz"} <= results
    assert "checkpoints" not in results


# --- faults, each at another moment, and resumed on other processes and devices ------------------

# Of the victim: its exit status, and what its line begins with; None if it cannot print.
FAULTS = {
    "SIGKILL": (1, "SIGKILL ended this process"),
    "parent": (-signal.SIGKILL, None),
    "SIGTERM": (1, "SIGTERM ended this process"),
    "SIGINT": (130, "interrupted"),
    "SIGSTOP": (1, "another process was lost"),
}
# What happens when to which process, and the devices of the process that resumes; None: two
# processes with two devices each, as before.
CASES = [
    ("parent", "connected", 1, 0),
    ("SIGKILL", "training", 0, 4),
    ("SIGINT", "training", 0, 1),
    ("SIGSTOP", "training", 1, 4),
    ("SIGKILL", "saving", 0, 2),
    ("SIGTERM", "finishing", 0, None),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("what", "when", "victim", "devices"), CASES)
def test_a_lost_process_ends_the_other_in_bounded_time(folder, two, what, when, victim, devices):
    out = f"{what}-{when}-{victim}"
    faults = ["nothing never"] * 2
    faults[victim] = f"{what} {when}"
    started = start_two(folder, *TRAIN, out, faults=faults)
    begun = time.monotonic()
    (survivor,) = finish([started[1 - victim]])
    # Starting, compiling and the heartbeats that a hung process misses.
    assert time.monotonic() - begun < 120
    advice = "; nothing was saved"
    if when != "connected":
        advice = f"; start every process again with bn-jax train --resume {out}"
    line = error_of(survivor, 1)
    assert line.startswith(LOST) and line.endswith(advice), line
    if what == "SIGSTOP":
        child = int((folder / f"{started[victim].pid}.child").read_text())
        os.kill(child, signal.SIGCONT)
    (lost,) = finish([started[victim]])
    code, reason = FAULTS[what]
    if reason is None:
        assert (lost[0], lost[2]) == (code, "")
    else:
        line = error_of(lost, code)
        assert line.startswith(f"bn-jax: error: {reason}") and line.endswith(advice), line
    if when == "connected":
        assert not (folder / out).exists()
        return
    if devices is None:
        (code, _, err), second = finish(start_two(folder, "train", "--resume", out))
        assert (code, err) == (0, "") and second == (0, [], "")
        assert numbers_of(folder / out) == numbers_of(folder / "two")
    else:
        half = f"bn-jax: warning: {out}/{POSITIONS}/2 is incomplete" if when == "saving" else ""
        run_here(folder, "train", "--resume", out, "--devices", devices, warning=half)
        assert_same_training(folder / out, folder / "two")


# The options of process 1, and what the lines of both begin with.
OTHERS = [
    (
        ("--epochs", 3),
        "process 1 received other options, expected the same; start every process with",
        "--epochs: received 3, process 0 2, expected the same; start every process with",
    ),
    (
        ("--devices", 8),
        "--devices: the 2 processes have 2, 4 devices, expected as many in each; start",
        "--devices: the 2 processes have 2, 4 devices, expected as many in each; start",
    ),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("other", "first", "second"), OTHERS)
def test_all_processes_refuse_other_options(folder, other, first, second):
    finished = finish(start_two(folder, *TRAIN, "other", others=((), other)))
    for ended, message in zip(finished, (first, second), strict=True):
        assert error_of(ended, 2).startswith(f"bn-jax: error: {message}")
    assert not (folder / "other").exists()


@pytest.mark.exhaustive
def test_a_process_does_not_wait_for_ever_for_the_others(folder):
    address = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2)
    begun = time.monotonic()
    (finished,) = finish([start(folder, *TRAIN, "alone", *address, "--process-id", 1)])
    assert time.monotonic() - begun < processes.CONNECTION_TIMEOUT + 60
    line = error_of(finished, 1)
    assert line.startswith("bn-jax: error: the 2 processes did not connect within 60 seconds; st")
    assert line.endswith("; nothing was saved")
    assert not (folder / "alone").exists()


@pytest.mark.exhaustive
def test_one_process_with_a_coordinator(folder, two, monkeypatch):
    # JAX would look for the others there, and warn that it lacks a package for that.
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    address = ("--coordinator", f"[::1]:{free_port()}", "--num-processes", 1, "--process-id", 0)
    ((code, _, err),) = finish([start(folder, *TRAIN, "single", *address)])
    assert (code, err) == (0, "")
    assert_same_training(folder / "single", folder / "two")


def test_one_process_sends_to_itself():
    assert processes.from_first("two wörds") == "two wörds"
    assert processes.gather(True) == [True]
