"""The figures of the zoo as data and as a table."""

from collections.abc import Mapping
from string import ascii_lowercase
from typing import Any, Literal, NamedTuple, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.zoo.expected import ABSENT, FAULTS, FINDINGS, LEFT, exception

Status: TypeAlias = Literal["pass", "absent", "fault"]

# What is checked, by the name of the check.
COLUMNS = {
    "ours": "ours in place",
    "fold": "fold",
    "names": "names in the fold",
    "recalibrate": "recalibrate",
    "audit": "audit",
    "convert": "convert",
    "masks": "masks",
    "freeze": "freeze",
    "remat": "remat",
    "export": "export",
    "ensemble": "ensemble",
}


class Cell(NamedTuple):
    """What a check found of a model.

    Attributes:
        status: "pass", "absent" where the check says nothing of the model, or "fault".
        text: the figures, or the reason.
    """

    status: Status
    text: str


class Row(NamedTuple):
    """A model and what the checks found.

    Attributes:
        package: its distribution on PyPI, with its version.
        library: what it is written in.
        norms: the number of its batch norms.
        cells: the result of each check, by its name.
    """

    package: str
    library: str
    norms: int
    cells: dict[str, Cell]


def expected_exception(check: str, name: str, library: str) -> Cell | None:
    """Returns the cell of a check that a model is not expected to pass."""
    if reason := exception(ABSENT, check, name, library):
        return Cell("absent", reason)
    if reason := exception(FAULTS, check, name, library):
        return Cell("fault", reason)
    return None


def load(known: Mapping[str, Any]) -> dict[str, Row]:
    """Reads the rows from the JSON."""
    return {
        name: Row(**{**row, "cells": {check: Cell(**cell) for check, cell in row["cells"].items()}})
        for name, row in known["models"].items()
    }


def tables(known: Mapping[str, Any]) -> list[Table]:
    """Returns the table of all models and checks, with the reasons as its caption."""
    rows = load(known)
    reasons: dict[str, str] = {}
    for row in rows.values():
        for cell in row.cells.values():
            if cell.status != "pass":
                reasons.setdefault(cell.text, ascii_lowercase[len(reasons)])
    table = Table(title="Models of other packages", box=SIMPLE_HEAD)
    for header in ("model", "package", "norms", *COLUMNS.values()):
        table.add_column(header)
    for name, row in rows.items():
        cells = (_text(row.cells[check], reasons) for check in COLUMNS)
        table.add_row(name, row.package, str(row.norms), *cells)
    explained = [f"- ({letter}) {reason}" for reason, letter in reasons.items()]
    table.caption = "\n".join([*explained, *_left(), *_found()])
    return [table]


def _left() -> list[str]:
    """Returns a line for each model of which `fold` leaves norms."""
    lines = []
    for name, counts in LEFT.items():
        parts = (f'{count} for "{reason}"' for reason, count in counts.items())
        lines.append(f"- {name}: `fold` leaves {', '.join(parts)}")
    return lines


def _found() -> list[str]:
    """Returns a line for each model in which `audit` finds something."""
    lines = []
    for name, paths in FINDINGS.items():
        parts = (f'"{kind}" at {len(where)} norms' for kind, where in paths.items())
        lines.append(f"- {name}: `audit` finds {', '.join(parts)}")
    return lines


def _text(cell: Cell, reasons: Mapping[str, str]) -> str:
    if cell.status == "pass":
        return cell.text
    return f"{'-' if cell.status == 'absent' else 'fault'} ({reasons[cell.text]})"
