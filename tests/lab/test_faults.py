"""What happens to machines and people: full disks, and two commands on one folder."""

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import bars, copy_of, make_small_resnet, numbers_of, run_command, small_disk

from bn_jax.lab import checkpoints, runs
from bn_jax.lab.errors import CommandError
from bn_jax.lab.files import records, writing
from bn_jax.lab.training import unfinished

ROOT = Path(runs.__file__).parents[2]
ARMS = (runs.NO_NORM, runs.SYNCHRONIZED)
# The command as a process, but for the network, whose compiling would take the time.
PROGRAM = """
import functools
from support import make_small_resnet
from bn_jax.lab import runs
from bn_jax.lab.command import main
runs.make_model = functools.partial(make_small_resnet, width=24)
runs.ARMS = (runs.NO_NORM, runs.SYNCHRONIZED)
main()
"""


def start_process(*arguments):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_process(*arguments):
    process = start_process(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def home(tmp_path_factory, compile_quickly):
    """Data, and a run of two epochs that nothing happened to; its one arm is synchronized."""
    home = tmp_path_factory.mktemp("faults")
    np.savez(home / "bars.npz", **bars())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_model", make_small_resnet)
        patch.setattr(runs, "ARMS", ARMS[1:])
        code, _, err = run_command(*train(home, 2), "--out", home / "run")
        assert (code, err) == (0, "")
        yield home


def train(home, epochs):
    """The arguments of a training."""
    return "train", "--data", home / "bars.npz", "--batch-size", 8, "--epochs", epochs


def test_a_full_disk_is_one_line_and_the_run_resumes(home, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "make_model", functools.partial(make_small_resnet, width=24))
    with small_disk(tmp_path / "disk", "160k") as remount:
        run = tmp_path / "disk/a run"
        code, _, err = run_process(*train(home, 2), "--out", run)
        assert code == 1
        assert re.fullmatch(
            r"bn-jax: error: \[Errno 28\] No space left on device(: '.*')?; kept are the "
            "checkpoints of no normalization to epoch 1; free space or mend the cause; continue "
            f"with bn-jax train --resume '{re.escape(str(run))}'\n",
            err,
        ), err
        assert {path.name for path in run.iterdir()} == {"checkpoints", "epochs.csv"}
        remount("size=20m")
        code, _, err = run_command("train", "--resume", run)
        assert (code, err) == (0, "")


def is_one_line(err):
    return err.startswith("bn-jax: error: ") and err.count("\n") == 1 and "No space left" in err


SIZES = [4, 12, 24, 40, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384]


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(size, marks=[] if size in (12, 192) else pytest.mark.exhaustive)
        for size in SIZES
    ],
)
def test_a_disk_that_is_full_at_any_moment(home, tmp_path, size):
    """At the start, while an arm is trained, while the results are written."""
    with small_disk(tmp_path / "disk", f"{size}k") as remount:
        run = tmp_path / "disk/run"
        code, _, err = run_command(*train(home, 2), "--out", run)
        if code:
            assert code == 1 and is_one_line(err), err
        if "nothing was saved" in err:
            assert not run.exists()
            return
        if code:
            assert {path.name for path in run.iterdir()} <= {"checkpoints", "epochs.csv"}
            remount("size=20m")
            code, _, err = run_command("train", "--resume", run)
        assert (code, err) == (0, "")
        assert numbers_of(run) == numbers_of(home / "run")
        assert not [path for path in run.rglob("*") if path.name.startswith(".")]


COMMANDS = ("recalibrate", "fold", "audit", "export")


@pytest.mark.parametrize(
    ("size", "commands"),
    [
        (4, COMMANDS),
        *(pytest.param(k, COMMANDS, marks=pytest.mark.exhaustive) for k in (12, 24, 48, 128)),
    ],
)
def test_a_full_disk_leaves_no_half_result(home, tmp_path, size, commands):
    with small_disk(tmp_path / "disk", f"{size}k"):
        for command in commands:
            result = tmp_path / "disk" / command
            code, _, err = run_command(command, home / "run", "--out", result)
            if code == 0:
                assert err == "" and not [path for path in result.iterdir() if path.name[0] == "."]
                writing.remove(result)
                continue
            assert code == 1 and is_one_line(err), (command, err)
            assert list((tmp_path / "disk").iterdir()) == []


def test_a_second_process_is_refused(home, tmp_path):
    run = tmp_path / "run"
    first = start_process(*train(home, 1_000_000), "--out", run)
    try:
        for _ in range(3):
            assert first.stdout.readline().startswith("no normalization: epoch "), first.stderr
        before = [path.name for path in run.iterdir()]
        code, out, err = run_process("train", "--resume", run)
        assert (code, out) == (2, "")
        assert err == (
            f"bn-jax: error: --resume: {run / 'checkpoints'} is in use by another process, "
            "expected a folder that only this one writes to; wait until the other has ended, or "
            "choose another folder\n"
        )
        assert first.poll() is None and before == [path.name for path in run.iterdir()]
        assert first.stdout.readline().startswith("no normalization: epoch ")
    finally:
        # As the system does where memory is short: the process cannot unlock anything.
        first.send_signal(signal.SIGKILL)
        first.communicate()
    with unfinished.hold(run):
        started = unfinished.read(run)
        origin = records.Origin(run=started, arm=runs.NO_NORM)
        folder = unfinished.checkpoints_of(run, runs.NO_NORM)
        # Killed in the midst of saving, at most the newest is incomplete.
        reasons = [checkpoints.why_unusable(path, origin) for path in checkpoints.positions(folder)]
        assert None in reasons[:2]


def started_somewhere():
    config = records.Config(data=None, devices=1, epochs=1, batch_size=2, learning_rate=0.1, seed=0)
    return records.Started(config=config, data_file=None, data_sha256="0" * 64)


@pytest.mark.parametrize("exists", [False, True])
def test_of_two_trainings_into_one_folder_the_second_is_refused(tmp_path, exists):
    folder = tmp_path / "run"
    if exists:
        folder.mkdir()
    with unfinished.begin(folder, started_somewhere()):
        before = sorted(folder.rglob("*"))
        with (
            pytest.raises(CommandError, match=r"--out: another process has begun a run in .*run, "),
            unfinished.begin(folder, started_somewhere()),
        ):
            pass
        assert sorted(folder.rglob("*")) == before
    with unfinished.hold(folder):
        assert unfinished.read(folder) == started_somewhere()


def test_of_two_results_for_one_folder_the_second_is_refused(tmp_path):
    folder = tmp_path / "new"
    with writing.staged(folder, new=True) as staging:
        (staging / "file").write_text("of the first")
        with (
            pytest.raises(CommandError, match=r"--out: .*is in use by another process"),
            writing.staged(folder, new=True),
        ):
            pass
        assert (staging / "file").exists()
    assert (folder / "file").read_text() == "of the first"
    with (
        pytest.raises(CommandError, match=r"--out: another process has filled .*; choose another"),
        writing.staged(folder, new=True),
    ):
        pass
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as remount:
        run = tmp_path / "disk/run"
        with unfinished.begin(run, started_somewhere()):
            pass
        remount("ro")
        with pytest.raises(CommandError) as caught, unfinished.hold(run):
            pass
        copied = copy_of(run, tmp_path / "run")
    assert str(caught.value) == (
        f"--resume: {run / 'checkpoints'} cannot be locked (Read-only file system), expected a "
        "folder that this process may write to; make it writable, or copy it to one that is"
    )
    # The advice, followed.
    with unfinished.hold(copied):
        assert unfinished.read(copied) == started_somewhere()


def test_a_lock_is_no_trap(tmp_path):
    """What may lie where the lock belongs."""
    with unfinished.begin(tmp_path / "run", started_somewhere()):
        pass
    lock = tmp_path / "run/checkpoints/.lock"
    for make in (
        os.mkfifo,
        os.mkdir,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("nothing"),
        lambda path: path.write_text("of somebody else"),
    ):
        writing.remove(lock)
        make(lock)
        signal.alarm(20)
        with contextlib.suppress(CommandError), unfinished.hold(tmp_path / "run"):
            pass
        signal.alarm(0)
    assert lock.read_text() == "of somebody else"
