"""Results as tables on the terminal, which Rich fits to its width."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from bn_jax.lab.experiments.verdicts import Experiment
    from bn_jax.lab.prediction import Predictions
    from bn_jax.lab.runs import Change, Figures
    from bn_jax.lab.training.results import Result

__all__ = [
    "format_loss",
    "print_arms",
    "print_change",
    "print_claims",
    "print_predictions",
    "print_table",
]

PREDICTIONS_SHOWN = 50
# A column of text that is narrower reads badly.
NARROWEST = 16


def format_loss(loss: float) -> str:
    """Returns a loss as text: with four decimals, or with four digits where these say nothing."""
    is_plain = loss == 0 or 1e-3 <= abs(loss) < 1e6
    return f"{loss:.4f}" if is_plain else f"{loss:.4g}"


def print_arms(results: "Mapping[str, Result]") -> None:
    """Prints the results of a training, an arm in each row."""
    from bn_jax.lab.training.results import REPORT_EVERY, TARGET

    table = _numbers(
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
    print_table(table)


def print_change(change: "Change") -> None:
    """Prints a model before and after, in two columns."""
    table = _numbers("", *change._fields)
    rows: dict[str, Callable[[Figures], str]] = {
        "accuracy": lambda figures: f"{figures.evaluation.accuracy:.2%}",
        "loss": lambda figures: format_loss(figures.evaluation.loss),
        "milliseconds per batch": lambda figures: f"{figures.milliseconds:.2f}",
        "parameters": lambda figures: f"{figures.parameters:,}",
    }
    for name, show in rows.items():
        table.add_row(name, show(change.before), show(change.after))
    print_table(table)


def print_claims(experiments: "Iterable[Experiment]") -> None:
    """Prints the claims that can be tested."""
    from rich.markup import escape

    table = _texts("", "name", "claim", "source", wrapped=("claim", "source"))
    for experiment in experiments:
        texts = experiment.name, experiment.claim, experiment.source
        table.add_row(str(experiment.number), *map(escape, texts))
    print_table(table)


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
    print_table(table)
    more = len(predictions.names) - PREDICTIONS_SHOWN
    if more > 0:
        print(f"and {more:,} more images; --out FILE.csv writes all")


def _literal(text: str) -> "Text":
    """Returns a name without markup, in which bytes that are no text are replaced."""
    from rich.text import Text

    return Text(text.encode(errors="surrogateescape").decode(errors="replace"))


def _numbers(first: str, *others: str) -> "Table":
    """Makes a table with a column of names and columns of numbers."""
    from rich.table import Table

    table = Table()
    table.add_column(first, no_wrap=True)
    for header in others:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _texts(*headers: str, wrapped: Sequence[str]) -> "Table":
    """Makes a table with columns of text, some of which wrap."""
    from rich.table import Table

    table = Table()
    for header in headers:
        if header in wrapped:
            table.add_column(header, min_width=NARROWEST, overflow="fold")
        else:
            table.add_column(header, no_wrap=True)
    return table


def print_table(table: "Table") -> None:
    """Prints a table, or where it is too wide for the terminal, its rows as paragraphs."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.text import Text

    headers = [str(column.header) for column in table.columns]
    rows = [
        [Text.from_markup(str(cell)).plain for cell in row]
        for row in zip(*(column.cells for column in table.columns), strict=True)
    ]
    for number, column in enumerate(table.columns):
        if column.no_wrap:
            texts = [headers[number], *(row[number] for row in rows)]
            lines = "\n".join(texts).split("\n")
            column.min_width = max(Text(line).cell_len for line in lines)
    console = Console()
    unlimited = console.options.update(width=1_000_000)
    if Measurement.get(console, unlimited, table).minimum <= console.width:
        console.print(table)
        return
    for first, *others in rows:
        print(first)
        for header, cell in zip(headers[1:], others, strict=True):
            if cell:
                print(f"  {' '.join(header.split())}: {cell}")
