"""epochs.csv and the files for TensorBoard, read by readers of their own."""

import csv
import math
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from support import TRAIN, bars, environment

from bn_jax import training
from bn_jax.lab import fitting
from bn_jax.lab.training import logs

STEPS = 6
# A group of five steps and one of one step; the epochs of 42 examples in batches of 8.
SIZES = ((5, 40), (1, 2))


def reports(epochs, loss=lambda step: 1 / step):
    """Reports of so many epochs, with losses that are exact in binary."""
    made, step, examples = [], 0, 0
    for epoch in range(1, epochs + 1):
        for steps, seen in SIZES:
            step, examples = step + steps, examples + seen
            trained = training.Evaluation(loss(step), 0.5, seen // 2, seen)
            validated = training.Evaluation(2 * loss(step), 0.25, 1, 4)
            made.append(fitting.Report(step, epoch, trained, validated, examples, step / 4))
    return made


def rate(step):
    return step / 8


def show_all(watcher, arm, made, after=0):
    """Calls as a training does: with what its checkpoint has, and then after each report."""
    for count in range(max(after, 1), len(made) + 1):
        watcher(arm, made[:count])


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_row_for_each_arm_and_epoch(tmp_path):
    table = logs.EpochTable(tmp_path / "epochs.csv", STEPS, rate)
    for arm in ("a, quoted", "b"):
        show_all(table, arm, reports(3))
    rows = rows_of(tmp_path / "epochs.csv")
    assert [(row["arm"], int(row["epoch"]), int(row["step"])) for row in rows] == [
        (arm, epoch, STEPS * epoch) for arm in ("a, quoted", "b") for epoch in (1, 2, 3)
    ]
    second = rows[1]
    assert math.isclose(float(second["training_loss"]), (40 / 11 + 2 / 12) / 42)
    assert float(second["training_accuracy"]) == pytest.approx(0.5)
    assert float(second["validation_loss"]) == 2 / 12
    assert float(second["validation_accuracy"]) == 0.25
    assert int(second["examples"]) == 84 and float(second["seconds"]) == 3
    assert float(second["learning_rate"]) == rate(12)
    assert [path.name for path in tmp_path.iterdir()] == ["epochs.csv"]


def test_the_table_is_complete_after_each_epoch_and_only_then(tmp_path):
    path = tmp_path / "epochs.csv"
    table = logs.EpochTable(path, STEPS, rate)
    made = reports(3)
    seen = []
    for count in range(1, len(made) + 1):
        table("a", made[:count])
        seen.append(len(rows_of(path)) if path.exists() else 0)
    assert seen == [0, 1, 1, 2, 2, 3]


def test_numbers_that_are_not_finite_are_read_as_such(tmp_path):
    values = {5: math.inf, 6: 4e18, 11: 1.0, 12: math.nan}
    table = logs.EpochTable(tmp_path / "epochs.csv", STEPS, rate)
    show_all(table, "a", reports(2, loss=values.get))
    first, second = rows_of(tmp_path / "epochs.csv")
    assert (first["training_loss"], second["training_loss"]) == ("inf", "nan")
    assert (first["validation_loss"], second["validation_loss"]) == ("8e+18", "nan")


# Each process of a run, by the reports that its checkpoint has and the number that it reaches.
LIVES = {
    "never killed": [(0, 8)],
    "killed within an epoch": [(0, 5), (4, 8)],
    "resumed from an older checkpoint": [(0, 8), (4, 8)],
    "from the start again": [(0, 7), (0, 8)],
    "killed often": [(0, 3), (2, 3), (2, 6), (4, 4), (4, 8), (8, 8)],
}


def live(life, make):
    """Lives the lives of a run of two arms, and returns what recorded each, not closed."""
    watchers = []
    for start, end in life:
        watchers.append(make())
        for arm in ("first arm", "second arm"):
            show_all(watchers[-1], arm, reports(4)[:end], after=start)
    return watchers


@pytest.mark.parametrize("life", LIVES.values(), ids=LIVES)
def test_no_row_is_lost_or_doubled(tmp_path, life):
    path = tmp_path / "epochs.csv"
    live(life, lambda: logs.EpochTable(path, STEPS, rate))
    assert [(row["arm"], int(row["epoch"])) for row in rows_of(path)] == [
        (arm, epoch) for arm in ("first arm", "second arm") for epoch in (1, 2, 3, 4)
    ]


def test_a_table_that_cannot_be_replaced_is_an_error_of_the_system(tmp_path):
    (tmp_path / "epochs.csv").mkdir()
    table = logs.EpochTable(tmp_path / "epochs.csv", STEPS, rate)
    with pytest.raises(OSError, match=r"epochs\.csv"):
        show_all(table, "a", reports(1))
    assert [path.name for path in tmp_path.iterdir()] == ["epochs.csv"]


# --- TensorBoard --------------------------------------------------------------------------------


def crc32c(data):
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def masked(data):
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records_of(path):
    """The records of a TFRecord file, whose checksums it checks."""
    data = path.read_bytes()
    while data:
        head, check = data[:8], struct.unpack("<I", data[8:12])[0]
        size = struct.unpack("<Q", head)[0]
        body = data[12 : 12 + size]
        assert check == masked(head)
        assert struct.unpack("<I", data[12 + size : 16 + size])[0] == masked(body)
        yield body
        data = data[16 + size :]


def varint(data, at):
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


def fields_of(message):
    """The fields of a protocol buffer by their numbers; of repeated ones, all."""
    fields, at = {}, 0
    while at < len(message):
        key, at = varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = varint(message, at)
        else:
            size, at = varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = message[at : at + size], at + size
        fields.setdefault(key >> 3, []).append(value)
    return fields


def scalars_of(folder):
    """All scalars of a folder of event files, as (tag, step, value), and the times of the steps."""
    found, times = [], {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for record in records_of(path):
            event = fields_of(record)
            step = event.get(2, [0])[0]
            for summary in event.get(5, []):
                times[step] = struct.unpack("<d", event[1][0])[0]
                for value in fields_of(summary)[1]:
                    parts = fields_of(value)
                    number = struct.unpack("<f", parts[2][0])[0]
                    found.append((parts[1][0].decode(), step, number))
    return found, times


def test_crc32c_is_that_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283


def test_scalars_of_each_report(tmp_path):
    log = logs.TensorBoard(tmp_path / "tensorboard", rate)
    made = reports(2)
    show_all(log, "no normalization", made)
    show_all(log, "b", made)
    log.close()
    assert {path.name for path in (tmp_path / "tensorboard").iterdir()} == {"no-normalization", "b"}
    found, times = scalars_of(tmp_path / "tensorboard/no-normalization")
    expected = {
        (tag, report.step, struct.unpack("<f", struct.pack("<f", value))[0])
        for report in made
        for tag, value in {
            "loss/training": report.training.loss,
            "loss/validation": report.validation.loss,
            "accuracy/training": 0.5,
            "accuracy/validation": 0.25,
            "learning rate": rate(report.step),
        }.items()
    }
    assert len(found) == len(expected) and set(found) == expected
    assert sorted(times) == [report.step for report in made]


def test_what_a_resumed_run_writes_again_lies_as_far_back_as_it_took(tmp_path):
    made = reports(4)
    log = logs.TensorBoard(tmp_path, rate)
    before = time.time()
    log("a", made)
    log.close()
    _, times = scalars_of(tmp_path / "a")
    assert 0 <= times[made[-1].step] - before < 60
    for report in made:
        past = times[made[-1].step] - times[report.step]
        assert past == pytest.approx(made[-1].seconds - report.seconds, abs=1e-5)


def test_losses_that_are_not_finite_are_written(tmp_path):
    values = {5: 4e18, 6: math.inf, 11: math.nan, 12: 1e300}
    log = logs.TensorBoard(tmp_path, rate)
    show_all(log, "a", reports(2, loss=values.get))
    log.close()
    losses = [value for tag, _, value in scalars_of(tmp_path / "a")[0] if tag == "loss/training"]
    assert losses[0] == pytest.approx(4e18) and losses[1] == math.inf
    assert math.isnan(losses[2]) and losses[3] == math.inf


@pytest.mark.parametrize("life", LIVES.values(), ids=LIVES)
def test_no_step_is_lost_or_doubled(tmp_path, life):
    # Processes that are killed close nothing.
    watchers = live(life, lambda: logs.TensorBoard(tmp_path, rate))
    for arm in ("first-arm", "second-arm"):
        found, times = scalars_of(tmp_path / arm)
        steps = [step for tag, step, _ in found if tag == "loss/training"]
        assert steps == [report.step for report in reports(4)]
        assert sorted(times.values()) == list(times.values())
    for watcher in watchers:
        watcher.close()


def test_a_log_that_cannot_be_written_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("")
    log = logs.TensorBoard(tmp_path / "tensorboard", rate)
    show_all(log, "a", reports(2))
    show_all(log, "b", reports(2))
    log.close()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"bn-jax: warning: --log: {tmp_path / 'tensorboard'} cannot be written (")


# --- a run that is killed -----------------------------------------------------------------------

# The command with a small network.
SMALL = """
from bn_jax.lab import command, runs

make_model = runs.make_model
runs.make_model = lambda *given: make_model(*given).clone(stage_sizes=(1,), widths=(4,))
command.main()
"""


@pytest.mark.exhaustive
def test_a_run_that_is_killed_again_and_again_records_each_epoch_once(tmp_path):
    np.savez(tmp_path / "bars.npz", **bars())
    small = [sys.executable, "-W", "error", "-c", SMALL]
    start = [*TRAIN, "--epochs", "4", "--data", "bars.npz", "--out", "run", "--log", "tensorboard"]
    arguments = start
    # The log is continued without being asked for.
    for lines in (2, 1, 4, None):
        process = subprocess.Popen(
            [*small, *arguments],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if lines is not None:
            for _ in range(lines):
                assert "epoch" in process.stdout.readline()
            process.kill()
        _, stderr = process.communicate(timeout=300)
        assert stderr == "" and process.returncode == (0 if lines is None else -9)
        arguments = ["train", "--resume", "run"]
    rows = rows_of(tmp_path / "run/epochs.csv")
    arms = ("no normalization", "per-device batch norm", "synchronized batch norm")
    assert [(row["arm"], int(row["epoch"])) for row in rows] == [
        (arm, epoch) for arm in arms for epoch in (1, 2, 3, 4)
    ]
    for arm in arms:
        found, _ = scalars_of(tmp_path / "run/tensorboard" / arm.replace(" ", "-"))
        steps = [step for tag, step, _ in found if tag == "loss/training"]
        assert steps == [5, 6, 11, 12, 17, 18, 23, 24]
