"""Results as tables on the terminal, which Rich fits to its width."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from bn_jax.lab.experiments.verdicts import Experiment
    from bn_jax.lab.results import Result
    from bn_jax.lab.runs import Change, Figures

__all__ = ["print_arms", "print_change", "print_claims"]


def print_arms(results: "Mapping[str, Result]") -> None:
    """Prints the results of a training, an arm in each row."""
    from bn_jax.lab.results import REPORT_EVERY, TARGET

    table = _table(
        "arm",
        "test accuracy",
        f"steps to {TARGET:.0%}\nvalidation accuracy\n(checked every {REPORT_EVERY})",
        "examples\nper second",
    )
    for arm, result in results.items():
        table.add_row(
            arm,
            f"{result.test.accuracy:.2%}",
            str(result.steps_to_target or "never"),
            f"{result.examples_per_second:,.0f}",
        )
    _print(table)


def print_change(change: "Change") -> None:
    """Prints a model before and after, in two columns."""
    table = _table("", *change._fields)
    rows: dict[str, Callable[[Figures], str]] = {
        "accuracy": lambda figures: f"{figures.evaluation.accuracy:.2%}",
        "loss": lambda figures: f"{figures.evaluation.loss:.4f}",
        "milliseconds per batch": lambda figures: f"{figures.milliseconds:.2f}",
        "parameters": lambda figures: f"{figures.parameters:,}",
    }
    for name, show in rows.items():
        table.add_row(name, show(change.before), show(change.after))
    _print(table)


def _table(first: str, *others: str) -> "Table":
    """Makes a table with a column of names and columns of numbers."""
    from rich.table import Table

    table = Table()
    table.add_column(first, no_wrap=True)
    for header in others:
        table.add_column(header, justify="right")
    return table


def print_claims(experiments: "Iterable[Experiment]") -> None:
    """Prints the claims that can be tested."""
    from rich.table import Table

    table = Table("", "name", "claim", "source")
    for experiment in experiments:
        table.add_row(str(experiment.number), experiment.name, experiment.claim, experiment.source)
    _print(table)


def _print(table: "Table") -> None:
    from rich.console import Console

    Console().print(table)
