"""Writes and reads the JSON of a benchmark, and prints its tables."""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
TABLE_WIDTH = 160


def write(benchmark: str, packages: Iterable[str], figures: dict[str, Any]) -> Path:
    """Writes the figures of a benchmark, with the command, the versions and the machine.

    Args:
        benchmark: the name of its module.
        packages: whose versions matter; a package that is not installed is left out.
        figures: the rest of the JSON; a named tuple becomes an object.

    Returns:
        The path of the JSON.
    """
    path = RESULTS / f"{benchmark}.json"
    known = {
        "command": f"python -m benchmarks.{benchmark}",
        "versions": versions(("bn-jax", "jax", *packages)),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        **_as_json(figures),
    }
    path.write_text(json.dumps(known, indent=2) + "\n")
    return path


def read(benchmark: str) -> dict[str, Any]:
    """Reads what `write` wrote."""
    return json.loads((RESULTS / f"{benchmark}.json").read_text())


def read_if_there(benchmark: str) -> dict[str, Any]:
    """Reads what `write` wrote, or returns an empty dictionary if there is no file yet."""
    return read(benchmark) if (RESULTS / f"{benchmark}.json").exists() else {}


def show(tables: Iterable[Table]) -> None:
    """Prints tables at full width."""
    for table in tables:
        Console(width=TABLE_WIDTH).print(table)


def milliseconds(quartiles: Sequence[float]) -> str:
    """Returns the median of seconds as milliseconds, and the other quartiles in parentheses."""
    low, median, high = (f"{1e3 * second:,.2f}" for second in quartiles)
    return f"{median} ({low} to {high})"


def markdown(table: Table) -> str:
    """Returns a table as Markdown: the first column left-aligned, the others right-aligned."""
    rows = [[str(column.header) for column in table.columns]]
    rows.append([":---", *["---:"] * (len(table.columns) - 1)])
    rows.extend(
        [list(map(str, row)) for row in zip(*(c.cells for c in table.columns), strict=True)]
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _as_json(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _as_json(one) for name, one in value.items()}
    return value


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of the packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
