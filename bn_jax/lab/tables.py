"""Results as tables on the terminal, which Rich fits to its width."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from bn_jax.lab.experiments.verdicts import Experiment, Interval
    from bn_jax.lab.experiments.verdicts import Result as Verdicts
    from bn_jax.lab.prediction import Predictions
    from bn_jax.lab.results import Result
    from bn_jax.lab.runs import Change, Figures

__all__ = [
    "print_arms",
    "print_change",
    "print_claims",
    "print_predictions",
    "print_verdicts",
]

PREDICTIONS_SHOWN = 50


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


def print_predictions(predictions: "Predictions") -> None:
    """Prints the two most probable classes of each image, of the first ones if there are many."""
    from rich.table import Table

    table = Table()
    table.add_column("image", overflow="fold")
    for header in ("class", "probability", "next class", "probability"):
        table.add_column(header, justify="right" if header == "probability" else "left")
    rows = zip(predictions.names, predictions.probabilities, strict=True)
    for name, row in itertools.islice(rows, PREDICTIONS_SHOWN):
        first, second = row.argsort()[::-1][:2]
        cells = [name]
        for label in (first, second):
            cells += [predictions.class_names[label], f"{row[label]:.1%}"]
        table.add_row(*map(_literal, cells))
    _print(table)
    more = len(predictions.names) - PREDICTIONS_SHOWN
    if more > 0:
        print(f"and {more:,} more images; --out FILE.csv writes all")


def _literal(text: str) -> "Text":
    """Returns a name without markup, in which bytes that are no text are replaced."""
    from rich.text import Text

    return Text(text.encode(errors="surrogateescape").decode(errors="replace"))


def print_verdicts(results: "Mapping[Experiment, Verdicts]") -> None:
    """Prints what was measured for each claim, and the verdicts."""
    from rich.table import Table

    table = Table("claim", "source", "published", "measured", "verdict", show_lines=True)
    for experiment, result in results.items():
        table.add_row(
            f"{experiment.number} {experiment.name}: {experiment.claim}",
            experiment.source,
            experiment.published,
            "",
            f"[bold]{result.verdict}[/bold]",
        )
        for criterion in result.criteria:
            table.add_row(
                criterion.name,
                "",
                criterion.published,
                _format_interval(criterion.measured),
                criterion.verdict,
            )
    _print(table)


def _format_interval(measured: "Interval") -> str:
    if measured.low == measured.estimate == measured.high:
        return f"{measured.estimate:.3g}"
    return f"{measured.estimate:.3g} ({measured.low:.3g} to {measured.high:.3g})"


def _print(table: "Table") -> None:
    from rich.console import Console

    Console().print(table)
