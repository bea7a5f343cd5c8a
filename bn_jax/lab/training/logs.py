"""What a run records while it trains: a row for each epoch, and scalars for TensorBoard.

Both are made of the reports so far, of which a resumed run has those of its checkpoint. So they are
complete, and name no step twice, however often a run was killed and resumed.
"""

import contextlib
import csv
import io
import itertools
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bn_jax.lab.errors import print_warning
from bn_jax.lab.fitting import Report

if TYPE_CHECKING:
    from tensorboardX import RecordWriter

__all__ = ["COLUMNS", "EpochTable", "TensorBoard"]

COLUMNS = (
    "arm",
    "epoch",
    "step",
    "training_loss",
    "training_accuracy",
    "validation_loss",
    "validation_accuracy",
    "examples",
    "seconds",
    "learning_rate",
)
EVENTS = "events.out.tfevents"


class EpochTable:
    """A file with a row for each arm and epoch, complete after every epoch.

    Losses and accuracies of training are means over the epoch, those of validation are measured at
    its end, where `examples` and `seconds` count from the start; the learning rate is that of its
    last step.
    """

    def __init__(self, path: Path, steps_per_epoch: int, rate: Callable[[int], float]) -> None:
        """Makes the table; the file is written from the first epoch on.

        Args:
            path: of the file; replaced if it exists.
            steps_per_epoch: of each arm.
            rate: the learning rate by the number of the step, from 1.
        """
        self._path = path
        self._steps_per_epoch = steps_per_epoch
        self._rate = rate
        self._rows: dict[str, list[str]] = {}

    def __call__(self, arm: str, reports: Sequence[Report]) -> None:
        """Adds the epochs that are new.

        Args:
            arm: which was trained.
            reports: all reports on it so far.

        Raises:
            OSError: the file cannot be written; it is as it was before.
        """
        if reports[-1].step % self._steps_per_epoch:
            return
        rows = self._rows.setdefault(arm, [])
        epochs = len(rows)
        new = itertools.takewhile(lambda report: report.epoch > epochs, reversed(reports))
        by_epoch = itertools.groupby(reversed(list(new)), key=lambda report: report.epoch)
        rows.extend(_as_line(self._row(arm, list(group))) for _, group in by_epoch)
        # Written aside, so that whoever follows it never reads half of it.
        part = self._path.with_name(f".{self._path.name}")
        lines = itertools.chain([_as_line(COLUMNS)], *self._rows.values())
        try:
            part.write_text("".join(lines), encoding="utf-8")
            part.replace(self._path)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def _row(self, arm: str, epoch: Sequence[Report]) -> tuple[object, ...]:
        last = epoch[-1]
        weights = np.array([float(report.training.examples) for report in epoch])
        weights /= weights.sum()
        return (
            arm,
            last.epoch,
            last.step,
            float(weights @ [report.training.loss for report in epoch]),
            float(weights @ [report.training.accuracy for report in epoch]),
            last.validation.loss,
            last.validation.accuracy,
            last.examples,
            last.seconds,
            self._rate(last.step),
        )


def _as_line(row: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue()


class TensorBoard:
    """Files of scalars that TensorBoard reads: a folder for each arm, which it shows as a run."""

    def __init__(self, folder: Path, rate: Callable[[int], float]) -> None:
        """Makes the files when there is something to write.

        Args:
            folder: of the folders.
            rate: the learning rate by the number of the step, from 1.
        """
        self._folder = folder
        self._rate = rate
        self._writers: dict[str, RecordWriter] = {}
        self._written: dict[str, int] = {}
        self._has_failed = False

    def __call__(self, arm: str, reports: Sequence[Report]) -> None:
        """Writes the reports that are new; the first time, all of them into a file of its own.

        A failure ends the log with a warning, but not the training.

        Args:
            arm: which was trained.
            reports: all reports on it so far.
        """
        if self._has_failed:
            return
        try:
            if arm not in self._writers:
                self._writers[arm] = _new_events(self._folder / arm.replace(" ", "-"))
            # The steps of an earlier process lie as far back as they took, without its pause.
            end = time.time() - reports[-1].seconds
            for report in reports[self._written.get(arm, 0) :]:
                _write(self._writers[arm], _scalars(report, self._rate), end + report.seconds)
            self._written[arm] = len(reports)
            self._writers[arm].flush()
        except OSError as error:
            self._has_failed = True
            print_warning(
                f"--log: {self._folder} cannot be written ({error.strerror}); the training "
                "continues without it, and --resume writes all of it again"
            )

    def close(self) -> None:
        """Closes the files."""
        for writer in self._writers.values():
            # What could not be written cannot be written now, and was reported.
            with contextlib.suppress(OSError):
                writer.close()


def _new_events(folder: Path) -> "RecordWriter":
    """Begins the file of an arm, in the place of those of an earlier process."""
    from tensorboardX import RecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{EVENTS}.*"):
        # Not removed: a TensorBoard that has read it would wait for it forever.
        os.truncate(old, 0)
    writer = RecordWriter(str(folder / f"{EVENTS}.{time.time():010.0f}.{socket.gethostname()}"))
    _write(writer, {"file_version": "brain.Event:2"}, time.time())
    # It drops what it has read before.
    _write(writer, {"step": 0, "session_log": {"status": "START"}}, time.time())
    return writer


def _scalars(report: Report, rate: Callable[[int], float]) -> dict[str, Any]:
    values = {
        "loss/training": report.training.loss,
        "loss/validation": report.validation.loss,
        "accuracy/training": report.training.accuracy,
        "accuracy/validation": report.validation.accuracy,
        "learning rate": rate(report.step),
    }
    listed = [{"tag": tag, "simple_value": value} for tag, value in values.items()]
    return {"step": report.step, "summary": {"value": listed}}


def _write(writer: "RecordWriter", event: dict[str, Any], seconds: float) -> None:
    from tensorboardX.proto.event_pb2 import Event

    writer.write(Event(wall_time=seconds, **event).SerializeToString())
