"""Progress of trainings and of experiments: bars on a terminal, else a line for each result."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from bn_jax.lab.tables import format_loss
from bn_jax.lab.terminal import is_animated

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

    from bn_jax.lab.experiments.verdicts import Experiment, Result
    from bn_jax.lab.fitting import Report

__all__ = ["ShowClaim", "ShowReports", "show_claims", "show_training"]

# Called with an arm and all reports on it so far.
ShowReports: TypeAlias = "Callable[[str, Sequence[Report]], None]"


class ShowClaim(Protocol):
    """Shows the progress of an experiment."""

    def __call__(
        self, experiment: "Experiment", share: float, result: "Result | None" = None, /
    ) -> None:
        """Shows that a share of an experiment was finished since the last call.

        Args:
            experiment: which.
            share: from 0 to 1.
            result: None until the experiment has ended.
        """


def _bars(*columns: "ProgressColumn") -> "Progress":
    from rich import progress
    from rich.console import Console

    console = Console(stderr=sys.stderr.isatty())
    return progress.Progress(*columns, progress.TimeElapsedColumn(), console=console)


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
    if not is_animated():
        yield functools.partial(_print_epoch, steps_per_epoch, epochs)
        return
    from rich import progress

    bars = _bars(
        progress.TextColumn("{task.description:23}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[reached]}"),
    )
    total = steps_per_epoch * epochs
    tasks = {arm: bars.add_task(arm, start=False, total=total, reached="") for arm in arms}
    with bars:
        yield lambda arm, reports: _move_bar(bars, tasks[arm], reports[-1])


def _move_bar(bars: "Progress", task: "TaskID", report: "Report") -> None:
    bars.start_task(task)
    bars.update(task, completed=report.step, reached=_reached(report))


def _print_epoch(steps_per_epoch: int, epochs: int, arm: str, reports: "Sequence[Report]") -> None:
    report = reports[-1]
    if report.step % steps_per_epoch == 0:
        print(f"{arm}: epoch {report.epoch} of {epochs}, {_reached(report)}", flush=True)


def _reached(report: "Report") -> str:
    return f"loss {format_loss(report.training.loss)}, validation accuracy {report.validation.accuracy:.2%}"


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
    if not is_animated():
        yield _print_verdict
        return
    from rich import progress

    bars = _bars(
        progress.TextColumn("{task.description:24}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[verdict]}"),
    )
    tasks = {
        experiment: bars.add_task(experiment.name, start=False, total=1.0, verdict="")
        for experiment in experiments
    }

    def show(experiment: "Experiment", share: float, result: "Result | None" = None) -> None:
        task = tasks[experiment]
        bars.start_task(task)
        bars.advance(task, share)
        if result is not None:
            bars.update(task, completed=1.0, verdict=result.verdict)
            bars.stop_task(task)

    with bars:
        yield show


def _print_verdict(experiment: "Experiment", share: float, result: "Result | None" = None) -> None:
    if result is not None:
        print(f"{experiment.number} {experiment.name}: {result.verdict}", flush=True)
