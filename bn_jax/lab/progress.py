"""Progress of trainings and of experiments: bars on a terminal, else a line for each result."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

    from bn_jax.lab.experiments.verdicts import Experiment
    from bn_jax.lab.fitting import Report

__all__ = ["ShowClaim", "ShowReport", "show_claims", "show_training"]

ShowReport: TypeAlias = "Callable[[str, Report], None]"


class ShowClaim(Protocol):
    """Shows the progress of an experiment."""

    def __call__(
        self, experiment: "Experiment", share: float, record: Mapping[str, Any] | None = None, /
    ) -> None:
        """Shows that a share of an experiment was finished since the last call.

        Args:
            experiment: which.
            share: from 0 to 1.
            record: the contents of its JSON file; None until the experiment has ended.
        """


def _is_terminal() -> bool:
    return sys.stderr.isatty() or sys.stdout.isatty()


def _bars(*columns: "ProgressColumn") -> "Progress":
    from rich import progress
    from rich.console import Console

    console = Console(stderr=sys.stderr.isatty())
    return progress.Progress(*columns, progress.TimeElapsedColumn(), console=console)


@contextlib.contextmanager
def show_training(arms: Sequence[str], steps_per_epoch: int, epochs: int) -> Iterator[ShowReport]:
    """Shows the progress of each arm.

    Args:
        arms: what is trained.
        steps_per_epoch: of each arm.
        epochs: of each arm.

    Yields:
        A function to call with an arm and its latest report.
    """
    if not _is_terminal():
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
        yield lambda arm, report: _move_bar(bars, tasks[arm], report)


def _move_bar(bars: "Progress", task: "TaskID", report: "Report") -> None:
    bars.start_task(task)
    bars.update(task, completed=report.step, reached=_reached(report))


def _print_epoch(steps_per_epoch: int, epochs: int, arm: str, report: "Report") -> None:
    if report.step % steps_per_epoch == 0:
        print(f"{arm}: epoch {report.epoch} of {epochs}, {_reached(report)}", flush=True)


def _reached(report: "Report") -> str:
    return f"loss {report.training.loss:.4f}, validation accuracy {report.validation.accuracy:.2%}"


@contextlib.contextmanager
def show_claims(experiments: "Sequence[Experiment]") -> Iterator[ShowClaim]:
    """Shows the progress of each experiment; without a terminal, prints a line for every result.

    Args:
        experiments: what is run.

    Yields:
        A function to call as `ShowClaim` says.
    """
    if not _is_terminal():
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
    verdicts = [one["verdict"] for one in record["sub_claims"]]
    reproduced = sum(verdict in ("exact", "reproduced") for verdict in verdicts)
    return f"{reproduced} of {len(verdicts)} reproduced"
