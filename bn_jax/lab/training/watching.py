"""What is shown and recorded of a training while it runs, by process 0."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from bn_jax.lab import fitting
from bn_jax.lab.console import progress
from bn_jax.lab.console.progress import ShowReports
from bn_jax.lab.files.records import Config
from bn_jax.lab.fitting import Report
from bn_jax.lab.training import logs

__all__ = ["DEFAULT", "EPOCHS", "LOG", "Wanted", "continued", "watch"]

EPOCHS = "epochs.csv"
LOG = "tensorboard"


class Wanted(NamedTuple):
    """What a user wants to see of a training.

    Attributes:
        progress: bars or lines.
        log: files for TensorBoard.
    """

    progress: bool = True
    log: bool = False


DEFAULT = Wanted()


def continued(wanted: Wanted, folder: Path) -> Wanted:
    """Returns what is wanted of a resumed run: the log that it has is continued."""
    return wanted._replace(log=wanted.log or (folder / LOG).is_dir())


@contextlib.contextmanager
def watch(
    folder: Path, config: Config, steps_per_epoch: int, wanted: Wanted
) -> Iterator[ShowReports]:
    """Shows the progress of each arm, and writes `epochs.csv` and what else is wanted.

    Args:
        folder: of the run.
        config: of the run.
        steps_per_epoch: of each arm.
        wanted: by the user.

    Yields:
        A function to call with an arm and all reports on it so far.
    """
    if jax.process_index() != 0:
        yield lambda arm, reports: None
        return
    schedule = fitting.make_schedule(config.learning_rate, config.epochs * steps_per_epoch)
    # Before the training starts, which does not wait for it then.
    compiled = jax.jit(schedule).lower(np.int32(0)).compile()

    def rate(step: int) -> float:
        return float(compiled(np.int32(step - 1)))

    watchers: list[ShowReports] = [logs.EpochTable(folder / EPOCHS, steps_per_epoch, rate)]
    with contextlib.ExitStack() as stack:
        if wanted.log:
            log = logs.TensorBoard(folder / LOG, rate)
            stack.callback(log.close)
            watchers.append(log)
        if wanted.progress:
            shown = progress.show_training(config.arms, steps_per_epoch, config.epochs)
            watchers.append(stack.enter_context(shown))

        def show(arm: str, reports: Sequence[Report]) -> None:
            for watcher in watchers:
                watcher(arm, reports)

        yield show
