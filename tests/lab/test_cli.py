import csv
import errno
import functools
import importlib.metadata
import itertools
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support import COMMAND, TRAIN, bars, copy_of, environment, files, run_process
from test_logs import scalars_of

from bn_jax import linen, training
from bn_jax.lab import checkpoints, fitting, models, processes, runs, trainer
from bn_jax.lab.console import progress
from bn_jax.lab.training import results

RESULTS = {"checkpoint", "curves.png", "epochs.csv", "metrics.json", "test.npz"}


@pytest.fixture
def good(tmp_path):
    np.savez(tmp_path / "good.npz", **bars())


def test_train_prints_epochs_table_and_reloaded_checkpoint(trained):
    folder, printed = trained
    lines = printed.splitlines()
    for arm in runs.ARMS:
        for epoch in (1, 2):
            start = f"{arm}: epoch {epoch} of 2, loss "
            assert sum(line.startswith(start) for line in lines) == 1
        assert any(arm in line and "│" in line for line in lines)
    for header in ("test accuracy", "steps to 90%", "(checked every 5)", "per second"):
        assert header in printed
    metrics = json.loads((folder / "a/run/metrics.json").read_text())
    best = metrics["arms"][metrics["best_arm"]]
    assert lines[-3:] == [
        f"Best by validation accuracy: {metrics['best_arm']}",
        f"Checkpoint reloaded: {best['test_correct']} of 12 test answers correct, "
        f"the same as before saving ({best['test_accuracy']:.2%})",
        "Saved in a/run",
    ]


def test_train_writes_the_run_and_nothing_else(trained):
    folder, _ = trained
    assert {path.name for path in folder.iterdir()} == {"a", "bars.npz"}
    assert {path.name for path in (folder / "a").iterdir()} == {"run"}
    run = folder / "a/run"
    assert {path.name for path in run.iterdir()} == RESULTS | {"tensorboard"}
    picture = (run / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.rstrip().endswith(b"IEND\xaeB`\x82")


def test_metrics(trained):
    folder, _ = trained
    metrics = json.loads((folder / "a/run/metrics.json").read_text())
    assert metrics["config"] == {
        "data": "bars.npz",
        "devices": 2,
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 0.05,
        "seed": 0,
        "arms": list(runs.ARMS),
        "model": "tiny",
    }
    assert metrics["versions"]["jax"] == jax.__version__
    assert metrics["data"]["examples"] == {"train": 42, "validation": 6, "test": 12}
    assert metrics["data"]["image_shape"] == [4, 4, 1]
    assert metrics["data"]["num_classes"] == 3
    assert list(metrics["arms"]) == list(runs.ARMS)
    finals = {}
    for arm, result in metrics["arms"].items():
        curves = result["curves"]
        # 42 examples are six batches of 8: reports after 5 and 6 steps of each epoch.
        assert curves["step"] == [5, 6, 11, 12]
        for name in ("loss", "validation_loss"):
            assert len(curves[name]) == 4 and min(curves[name]) > 0
        for name in ("accuracy", "validation_accuracy"):
            assert len(curves[name]) == 4 and 0 <= min(curves[name]) <= max(curves[name]) <= 1
        assert result["test_accuracy"] == result["test_correct"] / 12
        assert result["examples_per_second"] > 0
        points = zip(curves["step"], curves["validation_accuracy"], strict=True)
        reached = [step for step, accuracy in points if accuracy >= 0.9]
        assert result["steps_to_90_percent_validation_accuracy"] == (reached or [None])[0]
        finals[arm] = curves["validation_accuracy"][-1], -curves["validation_loss"][-1]
    assert metrics["best_arm"] == max(finals, key=finals.get)
    arms = [json.dumps(result["curves"]["loss"]) for result in metrics["arms"].values()]
    assert len(set(arms)) == 3, "the arms must differ"


def test_eval_repeats_the_test_accuracy_on_other_devices(trained, tmp_path):
    folder, _ = trained
    metrics = json.loads((folder / "a/run/metrics.json").read_text())
    best = metrics["arms"][metrics["best_arm"]]
    finished = run_process(["eval", folder / "a/run"], tmp_path, JAX_NUM_CPU_DEVICES="3")
    assert (finished.returncode, finished.stderr) == (0, "")
    expected = f"test accuracy {best['test_accuracy']:.2%} ({best['test_correct']} of 12 correct)\n"
    assert finished.stdout == expected


def test_eval_other_data(trained, command, tmp_path):
    folder, _ = trained
    np.savez(tmp_path / "other.npz", **bars(5, seed=1))
    code, out, err = command("eval", folder / "a/run", "--data", "other.npz")
    assert (code, err) == (0, "")
    correct = int(out.split("(")[1].split()[0])
    assert out == f"other.npz accuracy {correct / 5:.2%} ({correct} of 5 correct)\n"


def test_train_refuses_the_same_folder_again(trained, command):
    folder, _ = trained
    before = files(folder)
    code, out, err = command(*TRAIN, "--data", folder / "bars.npz", "--out", folder / "a/run")
    assert (code, out) == (2, "")
    assert err == (
        f"bn-jax: error: --out: {folder / 'a/run'} exists and is not empty; "
        "choose another name or remove it\n"
    )
    assert files(folder) == before


BAD_OPTIONS = {
    "epochs": (
        ["--epochs", "0"],
        "--epochs: received 0, expected 1 to 2147483647; choose one of these, or leave the",
    ),
    "epochs type": (["--epochs", "two"], "Invalid value for '--epochs': "),
    "devices": (["--devices", "-1"], "--devices: received -1, expected 1 to 2147483647;"),
    "batch size": (["--batch-size", "0"], "--batch-size: received 0, expected 1 to 2147483647;"),
    "seed": (["--seed", "-1"], "--seed: received -1, expected 0 to 4294967295; choose one"),
    "learning rate": (["--learning-rate", "0"], "--learning-rate: received 0.0, expected a"),
    "learning rate NaN": (["--learning-rate", "nan"], "--learning-rate: received nan, expected a"),
    "learning rate infinite": (["--learning-rate", "inf"], "--learning-rate: received inf, exp"),
    "unknown": (["--epoch", "3"], "No such option: --epoch (Possible options: --epochs)"),
    "log": (
        ["--log", "tensorbord"],
        "--log: received tensorbord, expected tensorboard; did you mean tensorboard?",
    ),
    "log of nothing": (["--log", "x"], "--log: received x, expected tensorboard; choose one of"),
    "indivisible": (
        ["--batch-size", "15"],
        "--batch-size: received 15, expected a multiple of the number of devices, 2, from 4 to ",
    ),
    "one example for each device": (
        ["--batch-size", "2"],
        "--batch-size: received 2, expected a multiple of the number of devices, 2, from 4 to ",
    ),
    "more examples in a batch than there are": (
        ["--batch-size", "1000000000"],
        "; use --batch-size ",
    ),
    "devices without number": (
        ["--devices", "99999"],
        " examples, expected at least one for each of 99999 devices; add examples or use --devices",
    ),
    "more devices than there are": (
        ["--devices", "8"],
        "--devices: received 8, expected at most the 4 cpu devices that JAX has; lower it",
    ),
    "more devices than examples": (
        ["--devices", "4", "--data", "few.npz"],
        "--data: received 3 examples, expected at least one for each of 4 devices; "
        "add examples or use --devices 3",
    ),
    "coordinator alone": (
        ["--coordinator", "127.0.0.1:1234"],
        "--num-processes and --process-id: missing; give --coordinator, --num-processes and "
        "--process-id together or none of them",
    ),
    "coordinator missing": (
        ["--num-processes", "2", "--process-id", "0"],
        "--coordinator: missing; give",
    ),
    "coordinator without port": (
        ["--coordinator", "127.0.0.1", "--num-processes", "2", "--process-id", "0"],
        "--coordinator: received 127.0.0.1, expected HOST:PORT, in ASCII, with a port from 1 to",
    ),
    "coordinator without host": (
        ["--coordinator", ":1234", "--num-processes", "2", "--process-id", "0"],
        "--coordinator: received :1234, expected HOST:PORT",
    ),
    "coordinator with a port too high": (
        ["--coordinator", "[::1]:65536", "--num-processes", "2", "--process-id", "0"],
        "--coordinator: received [::1]:65536, expected HOST:PORT",
    ),
    "no processes": (
        ["--coordinator", "127.0.0.1:1234", "--num-processes", "0", "--process-id", "0"],
        "--num-processes: received 0, expected 1 to 2147483647; start as many processes",
    ),
    "process beyond the last": (
        ["--coordinator", "127.0.0.1:1234", "--num-processes", "2", "--process-id", "2"],
        "--process-id: received 2, expected 0 to 1 for --num-processes 2; number the processes",
    ),
    "process before the first": (
        ["--coordinator", "127.0.0.1:1234", "--num-processes", "2", "--process-id", "-1"],
        "--process-id: received -1, expected 0 to 1",
    ),
    "devices that processes cannot share": (
        ["--coordinator", "[::1]:1", "--num-processes", "2", "--process-id", "1", "--devices", "3"],
        "--devices: received 3, expected a multiple of the 2 processes, which take equal numbers; "
        "use --devices 2",
    ),
    "out is a file": (["--out", "good.npz"], "--out: good.npz is a file, expected a new folder"),
    "out is not empty": (["--out", "full"], "--out: full exists and is not empty; choose another"),
    "out in a file": (["--out", "good.npz/a"], "--out: good.npz/a cannot be"),
    "out is too long": (
        ["--out", "n" * 300],
        "cannot be made (File name too long); choose another",
    ),
    "no data": (["--data", "no.npz"], "--data: no.npz does not exist; give the path of an .npz"),
    "data is a folder": (
        ["--data", "full"],
        "--data: full holds no folder, expected one folder for each class, with its images; move",
    ),
    "data is text": (["--data", "text.npz"], "--data: text.npz cannot be read as an .npz file"),
    "data without y": (["--data", "x.npz"], "--data: x.npz holds no array 'y', only ['x']"),
    "one class": (["--data", "zeros.npz"], "--data: array y holds only label 0, expected at least"),
    "constant": (
        ["--data", "constant.npz"],
        "--data: every pixel of x in the training part is 1.0",
    ),
    "two examples": (["--data", "two.npz"], "--data: received 2 examples, expected at least 3"),
    "NaN": (["--data", "nan.npz"], "--data: array x holds NaN, infinity or numbers beyond float32"),
}


@pytest.fixture
def bad_files(tmp_path, good):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "text.npz").write_text("1 2 3")
    arrays = bars()
    np.savez(tmp_path / "x.npz", x=arrays["x"])
    np.savez(tmp_path / "zeros.npz", x=arrays["x"], y=0 * arrays["y"])
    np.savez(tmp_path / "constant.npz", x=np.ones_like(arrays["x"]), y=arrays["y"])
    np.savez(tmp_path / "two.npz", x=arrays["x"][:2], y=arrays["y"][:2])
    np.savez(tmp_path / "few.npz", x=arrays["x"][:3], y=arrays["y"][:3])
    np.savez(tmp_path / "nan.npz", x=np.full_like(arrays["x"], np.nan), y=arrays["y"])


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_train_refuses(bad_files, tmp_path, command, options, message):
    before = files(tmp_path)
    defaults = [] if "--data" in options else ["--data", "good.npz"]
    code, out, err = command("train", *defaults, *options)
    assert (code, out) == (2, "")
    assert err.startswith("bn-jax: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert message in err
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("devices", "examples", "chosen"),
    [(1, 1257, 64), (2, 1257, 64), (3, 1257, 63), (40, 1257, 80), (2, 9, 10), (4, 3, 8)],
)
def test_the_default_batch_size_suits_devices_and_data(devices, examples, chosen):
    assert trainer.choose_batch_size(None, devices, examples) == chosen
    assert trainer.choose_batch_size(chosen, devices, examples) == chosen


def test_eval_refuses(trained, command, tmp_path):
    run = trained[0] / "a/run"
    np.savez(tmp_path / "large.npz", x=np.zeros((3, 9, 9)), y=[0, 1, 2])
    np.savez(tmp_path / "label.npz", x=np.zeros((3, 4, 4)), y=[0, 1, 3])
    unfinished(tmp_path / "begun")
    (tmp_path / "empty").mkdir()
    (copy_of(run, tmp_path / "json") / "metrics.json").write_text("{")
    (copy_of(run, tmp_path / "keys") / "metrics.json").write_text('{"best_arm": "none"}')
    (copy_of(run, tmp_path / "no test") / "test.npz").unlink()
    (copy_of(run, tmp_path / "no checkpoint") / "checkpoint").rename(tmp_path / "checkpoint")
    (copy_of(run, tmp_path / "damaged") / "checkpoint/manifest.ocdbt").write_bytes(b"0")
    cases = {
        ("no run",): "DIR: no run does not exist, expected the folder of a run",
        ("large.npz",): "DIR: large.npz is a file, expected the folder of a run",
        ("begun",): "DIR: begun is an unfinished run, expected a finished one; finish it with "
        "bn-jax train --resume begun",
        (run.parent,): f"DIR: {run.parent} holds runs, expected one run; give one of {run}",
        (run / "checkpoint",): f"DIR: {run / 'checkpoint'} is a part of a run, expected its whole",
        ("empty",): "DIR: empty is not a run (FileNotFoundError",
        ("json",): "DIR: json/metrics.json cannot be read as JSON (Expecting property name",
        ("keys",): "DIR: keys/metrics.json: config is missing; copy the run again as bn-jax",
        ("no test",): "DIR: no test/test.npz does not exist",
        ("no checkpoint",): "DIR: no checkpoint/checkpoint is missing or damaged (its",
        ("damaged",): "DIR: damaged/checkpoint is missing or damaged (its",
        (run, "--data", "no.npz"): "--data: no.npz does not exist; give the path",
        (run, "--data", "large.npz"): "--data: received images of shape (9, 9, 1), expected "
        "(4, 4, 1) [H, W, C] as the run was trained on; resize them",
        (run, "--data", "label.npz"): "--data: array y holds labels from 0 to 3, expected 0 to 2 "
        "(3 classes); number the classes from 0",
        (): "Missing argument 'DIR'.",
    }
    before = files(tmp_path)
    for arguments, message in cases.items():
        code, out, err = command("eval", *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith(f"bn-jax: error: {message}"), arguments
        assert err.count("\n") == 1, arguments
    assert files(tmp_path) == before


def unfinished(folder):
    (folder / "checkpoints/arm").mkdir(parents=True)
    (folder / "checkpoints/config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(errno.ENOSPC, "disk full")])
def test_a_failure_while_saving_leaves_the_checkpoints_alone(tmp_path, failure):
    run = unfinished(tmp_path / "run")
    before = files(run / "checkpoints")
    with pytest.raises((KeyboardInterrupt, OSError)), results.replace_checkpoints(run) as folder:
        (folder / "metrics.json").write_text("{")
        raise failure
    assert [path.name for path in run.iterdir()] == ["checkpoints"]
    assert files(run / "checkpoints") == before


def test_results_replace_the_checkpoints(tmp_path):
    run = unfinished(tmp_path / "run")
    # As a process leaves it that was killed while the results were moved.
    (run / "checkpoint/old").mkdir(parents=True)
    (run / ".results/old").mkdir(parents=True)
    with results.replace_checkpoints(run) as folder:
        (folder / "checkpoint").mkdir()
        (folder / "metrics.json").write_text("{}")
        assert not (run / "metrics.json").exists()
    assert {str(path.relative_to(run)) for path in run.rglob("*")} == {"checkpoint", "metrics.json"}


def report(step, loss):
    evaluation = training.Evaluation(loss, accuracy=0.5, correct=1, examples=2)
    return fitting.Report(
        step, step, evaluation, evaluation, examples=8 * step, seconds=float(step)
    )


def test_a_diverged_arm_is_reported():
    reports = [report(1, math.nan), report(2, math.inf)]
    result = results.Result(reports, None, reports[-1].validation)
    metrics = json.loads(json.dumps(results.arm_metrics(result), allow_nan=False))
    assert metrics["curves"]["loss"] == metrics["curves"]["validation_loss"] == [None, None]
    assert metrics["steps_to_90_percent_validation_accuracy"] is None
    assert results.rank(report(1, math.nan).validation) < results.rank(report(1, 2.0).validation)


def test_a_terminal_gets_a_progress_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with progress.show_training(runs.ARMS, 2, 5) as show:
        show(runs.PER_DEVICE, [report(5, 0.5), report(10, 0.25)])
    out, err = capsys.readouterr()
    assert out == ""
    assert runs.PER_DEVICE in err and "100%" in err and "\x1b[" in err
    assert "loss 0.2500, val. accuracy 50.00%" in err


# What a background shell starts inherits that SIGINT is ignored.
HEED_SIGINT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_ctrl_c(good, tmp_path):
    train = [*COMMAND, *TRAIN, "--data", "good.npz", "--epochs", "10000", "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-c", HEED_SIGINT, *train],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("no normalization: epoch 1 of 10000, loss ")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "bn-jax: error: interrupted; continue with bn-jax train --resume run\n"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", "epochs.csv"}
    positions = checkpoints.positions(tmp_path / "run/checkpoints/no-normalization")
    assert any(map(checkpoints.is_intact, positions))


@pytest.fixture
def small(monkeypatch):
    """A network that compiles fast, for the tests of what surrounds it."""

    def make_model(arm, num_classes, *_):
        norm = None if arm == runs.NO_NORM else functools.partial(linen.BatchNorm, momentum=0.9)
        return models.ResNet(num_classes, stage_sizes=(1,), widths=(4,), norm=norm)

    monkeypatch.setattr(runs, "make_model", make_model)
    monkeypatch.setattr(runs, "ARMS", (runs.NO_NORM, runs.SYNCHRONIZED))
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


LONG = (*TRAIN, "--epochs", "4", "--data", "good.npz", "--out", "run", "--log", "tensorboard")


def interrupt(monkeypatch, step):
    """Has Ctrl-C come after this step, in the midst of an epoch, of the second arm."""
    fit, calls = fitting.fit, itertools.count(1)

    def interrupted_fit(*arguments, **options):
        call = next(calls)
        for reached in fit(*arguments, **options):
            if (call, reached[1].step) == (2, step):
                raise KeyboardInterrupt
            yield reached

    monkeypatch.setattr(fitting, "fit", interrupted_fit)


def numbers(run):
    """The metrics but for what depends on the clock."""
    metrics = json.loads((run / "metrics.json").read_text())
    for arm in metrics["arms"].values():
        assert arm.pop("examples_per_second") > 0
    # Orbax writes the time into its files.
    del metrics["checkpoint_sha256"], metrics["sha256"]
    return metrics


def recorded(run):
    """What epochs.csv and the files for TensorBoard record, but for the clock and the losses."""
    with (run / "epochs.csv").open(newline="") as file:
        rows = [
            [row[name] for name in ("arm", "epoch", "step", "examples", "learning_rate")]
            for row in csv.DictReader(file)
        ]
    folders = sorted((run / "tensorboard").iterdir())
    return rows, {
        folder.name: [(tag, step) for tag, step, _ in scalars_of(folder)[0]] for folder in folders
    }


@pytest.fixture
def uninterrupted(good, small, command, tmp_path):
    code, out, err = command(*LONG, "--no-progress")
    assert (code, err) == (0, "")
    assert "epoch" not in out and out.endswith("Saved in run\n")
    return numbers((tmp_path / "run").rename(tmp_path / "uninterrupted"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_all(arm):
    for path in checkpoints.positions(arm):
        flip(path / "position.json")


# What is left of the arm's checkpoints after epoch 2 and 3, and where it goes on.
DAMAGES = {
    "none": (lambda arm: None, [], 3),
    "flipped": (lambda arm: flip(arm / "3/state.safetensors"), ["3"], 2),
    "torn": (lambda arm: (arm / "3.sha256").unlink(), ["3"], 2),
    "all": (flip_all, ["3", "2"], 0),
}


def test_resumed_runs_end_as_uninterrupted_ones(uninterrupted, command, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt(patch, step=23)
        code, _, err = command(*LONG)
    assert code == 130
    assert err == "bn-jax: error: interrupted; continue with bn-jax train --resume run\n"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"checkpoints", "epochs.csv", "tensorboard"}
    for name, (damage, skipped, epoch) in DAMAGES.items():
        run = copy_of(tmp_path / "run", tmp_path / name)
        damage(run / "checkpoints/synchronized-batch-norm")
        code, out, err = command("train", "--resume", name)
        assert code == 0
        warnings = [
            f"bn-jax: warning: {name}/checkpoints/synchronized-batch-norm/{number} is incomplete "
            "or damaged (its SHA-256 differs from the one saved with it); synchronized batch norm "
            "continues from the previous checkpoint, or from the start if there is none"
            for number in skipped
        ]
        assert err.splitlines() == warnings
        shown = [line for line in out.splitlines() if line.startswith("synchronized batch norm: ")]
        assert len(shown) == 4 - max(epoch - 1, 0)
        assert numbers(run) == uninterrupted
        assert {path.name for path in run.iterdir()} == RESULTS | {"tensorboard"}
        assert recorded(run) == recorded(tmp_path / "uninterrupted")


def test_a_run_resumes_on_other_devices(uninterrupted, command, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt(patch, step=11)
        assert command(*LONG)[0] == 130
    code, _, err = command("train", "--resume", "run", "--devices", "4")
    assert (code, err) == (0, "")
    resumed = numbers(tmp_path / "run")
    assert resumed["config"] == uninterrupted["config"]
    rows, scalars = recorded(tmp_path / "run")
    assert (rows, scalars) == recorded(tmp_path / "uninterrupted")
    assert [row[:3] for row in rows] == [
        [arm, str(epoch), str(6 * epoch)] for arm in runs.ARMS for epoch in (1, 2, 3, 4)
    ]
    # Five scalars of each of two reports in each epoch.
    assert [len(steps) for steps in scalars.values()] == [5 * 2 * 4] * len(runs.ARMS)
    for name, arm in uninterrupted["arms"].items():
        for curve, values in arm["curves"].items():
            np.testing.assert_allclose(resumed["arms"][name]["curves"][curve], values, rtol=1e-3)


def test_resume_refuses(good, small, command, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt(patch, step=5)
        assert command(*LONG)[0] == 130
    finished = copy_of(tmp_path / "run", tmp_path / "finished")
    (finished / "metrics.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    config = Path("checkpoints/config.json")
    (copy_of(tmp_path / "run", tmp_path / "json") / config).write_text("{")
    (copy_of(tmp_path / "run", tmp_path / "keys") / config).write_text('{"config": {}}')
    types = copy_of(tmp_path / "run", tmp_path / "types") / config
    types.write_text(types.read_text().replace('"seed": 0', '"seed": "zero"'))
    cases = {
        ("finished",): "--resume: finished is a finished run; evaluate it with bn-jax eval "
        "finished, or start a new run",
        ("empty",): "--resume: empty is not an unfinished run (FileNotFoundError: ",
        ("none",): "--resume: none does not exist, expected the folder of a run",
        ("good.npz",): "--resume: good.npz is a file, expected the folder of a run",
        (
            ".",
        ): "--resume: . holds runs, expected one run; give one of finished, types (unfinished)",
        ("json",): "--resume: json/checkpoints/config.json cannot be read as JSON (",
        (
            "keys",
        ): "--resume: keys/checkpoints/config.json: config.data is missing; remove the file",
        (
            "types",
        ): "--resume: types/checkpoints/config.json: config.seed: received 'zero', expected ",
        (
            "run",
            "--epochs",
            "4",
        ): "--epochs: not allowed with --resume, which uses the options of the saved",
        (
            "run",
            "--data",
            "good.npz",
        ): "--data: not allowed with --resume, which uses the options of",
        (
            "run",
            "--out",
            "run",
        ): "--out: not allowed with --resume, which uses the options of the saved",
        ("run", "--devices", "3"): "--devices: received 3, expected a divisor of the run's batch "
        "size, 8; use --devices 2 as before",
    }
    before = files(tmp_path)
    for arguments, message in cases.items():
        code, out, err = command("train", "--resume", *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith(f"bn-jax: error: {message}"), arguments
        assert err.count("\n") == 1, arguments
    assert files(tmp_path) == before
    np.savez(tmp_path / "good.npz", **bars(seed=1))
    code, out, err = command("train", "--resume", "run")
    assert (code, out) == (2, "")
    assert err == (
        f"bn-jax: error: --resume: {tmp_path / 'good.npz'} no longer holds the data of run (its "
        "SHA-256 differs); restore the data or start a new run\n"
    )
    (tmp_path / "good.npz").unlink()
    code, _, err = command("train", "--resume", "run")
    assert code == 2
    assert err.startswith(f"bn-jax: error: --data: {tmp_path / 'good.npz'} does not exist; give")


@pytest.mark.parametrize(
    ("module", "options"),
    [
        *((name, ["--data", "good.npz"]) for name in ("rich", "matplotlib", "filelock")),
        ("sklearn", []),
        ("tensorboardX", ["--data", "good.npz", "--log", "tensorboard"]),
    ],
)
def test_missing_extra(good, command, monkeypatch, module, options):
    monkeypatch.setitem(sys.modules, module, None)
    code, out, err = command("train", *options)
    assert (code, out) == (1, "")
    assert err == (
        f"bn-jax: error: {module} is not installed; install with pip install 'bn-jax[lab]'\n"
    )


DRAWING = [("recalibrate", "matplotlib"), ("audit", "matplotlib")]


@pytest.mark.parametrize(
    ("name", "module"),
    DRAWING
    + [
        (name, module)
        for name in ("eval", "recalibrate", "fold", "export", "audit")
        for module in ("orbax.checkpoint", "safetensors", "flatbuffers")
    ],
)
def test_missing_extra_for_saved_runs(command, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    code, out, err = command(name, "run")
    assert (code, out) == (1, "")
    assert err == (
        f"bn-jax: error: {module} is not installed; install with pip install 'bn-jax[lab]'\n"
    )


def test_missing_typer():
    program = "import sys; sys.modules['typer'] = None; from bn_jax.lab.command import main"
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 1
    assert finished.stderr == (
        "bn-jax: error: typer is not installed; install with pip install 'bn-jax[lab]'\n"
    )


HEAVY = ("jax", "flax", "optax", "orbax", "sklearn", "matplotlib", "numpy", "scipy", "rich")
# The command in a fresh process, which then prints what it has imported of these.
IMPORTING = f"""
import sys
from bn_jax.lab.command import main
try:
    main()
finally:
    print(sorted(set({HEAVY!r}) & sys.modules.keys()), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("--version",)])
def test_help_imports_nothing_heavy(arguments):
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORTING, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (finished.returncode, finished.stderr) == (0, "[]\n")
    assert finished.stdout


def test_version(command):
    version = importlib.metadata.version("bn-jax")
    assert command("--version") == (0, f"bn-jax {version}\n", "")


def test_help_and_usage(command):
    code, out, err = command("train", "--help")
    assert (code, err) == (0, "")
    for option in ("--data", "--out", "--devices", "--epochs", "--batch-size", "--learning-rate"):
        assert option in out
    _, overview, _ = command("--help")
    assert command() == command("help") == (0, overview, "")
    assert command("help", "train") == (0, out, "")
    for names in (("trian",), ("help", "trian")):
        assert command(*names) == (
            2,
            "",
            "bn-jax: error: No such command 'trian'. Did you mean 'train'?\n",
        )


def test_a_coordinator_without_launcher_is_refused(command, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    code, out, err = command("train")
    assert (code, out) == (2, "")
    assert err == (
        "bn-jax: error: JAX_COORDINATOR_ADDRESS is set, expected also a launcher that tells JAX "
        "the number of processes; give --coordinator, --num-processes and --process-id, or unset "
        "it\n"
    )


def test_processes_that_cannot_connect(good, command, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    code, out, err = command("train", "--data", "good.npz")
    assert (code, out) == (1, "")
    # The devices of this process are in place already.
    assert err.startswith("bn-jax: error: JAX cannot connect the processes (jax.distributed.init")
    assert err.count("\n") == 1


def test_processes_must_have_the_same_options(good, command, monkeypatch, tmp_path):
    before = files(tmp_path)

    def from_first(text):
        return json.dumps(json.loads(text) | {"--epochs": 3})

    monkeypatch.setattr(processes, "from_first", from_first)
    code, out, err = command("train", "--data", "good.npz", "--epochs", "2")
    assert (code, out) == (2, "")
    assert err == (
        "bn-jax: error: --epochs: received 2, process 0 3, expected the same; start every process "
        "with the options of process 0\n"
    )
    assert files(tmp_path) == before
