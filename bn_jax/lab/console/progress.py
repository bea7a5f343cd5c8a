"""Progress of trainings and of experiments: bars on a terminal, else a line for each result."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from bn_jax.lab.console.tables import format_loss
from bn_jax.lab.console.terminal import is_animated

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, TaskID

    from bn_jax.lab.experiments.verdicts import Experiment
    from bn_jax.lab.fitting import Report

__all__ = ["ShowClaim", "ShowReports", "show_claims", "show_training"]

# What a bar takes with the texts beside it.
LEAST_COLUMNS = 76

# Called with an arm and all reports on it so far.
ShowReports: TypeAlias = "Callable[[str, Sequence[Report]], None]"


class ShowClaim(Protocol):
    """Shows the progress of an experiment."""

    def __call__(
        self, experiment: "Experiment", share: float, record: Mapping[str, Any] | None = None, /
    ) -> None:
        """Shows that a share of an experiment was finished since the last call.

        Args:
            experiment: which.
            share: from 0 to 1.
            record: the contents of its JSON file, or nothing in it if the experiment failed; None
                until it has ended.
        """


def _console() -> "Console | None":
    """Returns the terminal for bars, or None without one or where they have no room."""
    if not is_animated():
        return None
    from rich.console import Console

    # Named here, because what a claim prints is redirected while it runs.
    console = Console(file=sys.stderr if sys.stderr.isatty() else sys.stdout)
    return console if console.width >= LEAST_COLUMNS else None


def _bars(console: "Console", description: str, result: str) -> "Progress":
    """Makes bars with a description before them, and with their share, result and time behind."""
    from rich import progress
    from rich.table import Column

    def text(template: str) -> "ProgressColumn":
        return progress.TextColumn(template, table_column=Column(no_wrap=True))

    return progress.Progress(
        text(description),
        progress.BarColumn(),
        text("{task.percentage:>3.0f}%"),
        text(result),
        progress.TimeElapsedColumn(table_column=Column(no_wrap=True)),
        console=console,
    )


@contextlib.contextmanager
def show_training(arms: Sequence[str], steps_per_epoch: int, epochs: int) -> Iterator[ShowReports]:
    """Shows the progress of each arm.

    Args:
        arms: what is trained.
        steps_per_epoch: of each arm.
        epochs: of each arm.

    Yields:
        A function to call with an arm and all reports on it so far.
    """
    console = _console()
    if console is None:
        yield functools.partial(_print_epoch, steps_per_epoch, epochs)
        return
    bars = _bars(console, "{task.description:23}", "{task.fields[reached]}")
    total = steps_per_epoch * epochs
    tasks = {arm: bars.add_task(arm, start=False, total=total, reached="") for arm in arms}
    with bars:
        yield lambda arm, reports: _move_bar(bars, tasks[arm], reports[-1])


def _move_bar(bars: "Progress", task: "TaskID", report: "Report") -> None:
    bars.start_task(task)
    # Short enough for a terminal of 80 columns.
    reached = _reached(report).replace("validation", "val.")
    bars.update(task, completed=report.step, reached=reached)


def _print_epoch(steps_per_epoch: int, epochs: int, arm: str, reports: "Sequence[Report]") -> None:
    report = reports[-1]
    if report.step % steps_per_epoch == 0:
        print(f"{arm}: epoch {report.epoch} of {epochs}, {_reached(report)}", flush=True)


def _reached(report: "Report") -> str:
    loss, accuracy = format_loss(report.training.loss), report.validation.accuracy
    return f"loss {loss}, validation accuracy {accuracy:.2%}"


@contextlib.contextmanager
def show_claims(experiments: "Sequence[Experiment]", *, is_wanted: bool) -> Iterator[ShowClaim]:
    """Shows the progress of each experiment; without a terminal, prints a line for every result.

    Args:
        experiments: what is run.
        is_wanted: whether to show anything.

    Yields:
        A function to call as `ShowClaim` says.
    """
    if not is_wanted:
        yield lambda experiment, share, result=None: None
        return
    console = _console()
    if console is None:
        yield _print_verdict
        return
    bars = _bars(console, "{task.description:24}", "{task.fields[verdict]}")
    tasks = {
        experiment: bars.add_task(experiment.name, start=False, total=1.0, verdict="")
        for experiment in experiments
    }

    def show(
        experiment: "Experiment", share: float, record: Mapping[str, Any] | None = None
    ) -> None:
        task = tasks[experiment]
        bars.start_task(task)
        bars.advance(task, share)
        if record is not None:
            bars.update(task, completed=1.0, verdict=_count(record))
            bars.stop_task(task)

    with bars:
        yield show


def _print_verdict(
    experiment: "Experiment", share: float, record: Mapping[str, Any] | None = None
) -> None:
    if record is not None:
        print(f"{experiment.number} {experiment.name}: {_count(record)}", flush=True)


def _count(record: Mapping[str, Any]) -> str:
    """Returns how many of the sub-claims of a JSON file were reproduced."""
    if not record:
        return "failed"
    verdicts = [one["verdict"] for one in record["sub_claims"]]
    reproduced = sum(verdict in ("exact", "reproduced") for verdict in verdicts)
    return f"{reproduced} of {len(verdicts)} reproduced"
