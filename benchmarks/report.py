"""Writes and reads the JSON of a benchmark, and prints its tables.

A benchmark writes to ``build/benchmarks/``, which git ignores. Only with the option ``--refresh``
does it replace the committed figures in ``benchmarks/results/``.
"""

import argparse
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
MEASURED = Path(__file__).parent.parent / "build" / "benchmarks"
TABLE_WIDTH = 160


def parser(benchmark: str, description: str | None) -> argparse.ArgumentParser:
    """Returns the parser of a benchmark's command line.

    Parse before measuring, so that a wrong option is an error at once.

    Args:
        benchmark: the name of its module.
        description: its docstring.

    Returns:
        A parser whose result has a `folder` for `finish`: `RESULTS` with the option ``--refresh``,
        else `MEASURED`.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--refresh",
        dest="folder",
        action="store_const",
        const=RESULTS,
        default=MEASURED,
        help="replace the committed figures in benchmarks/results/",
    )
    return made


def finish(
    benchmark: str,
    folder: Path,
    packages: Iterable[str],
    figures: Mapping[str, Any],
    tables: Callable[[dict[str, Any]], Iterable[Table]],
) -> None:
    """Writes the JSON of a benchmark, prints its tables, and says where the JSON is.

    The JSON also has the command, the versions and the machine.

    Args:
        benchmark: the name of its module.
        folder: the folder for the JSON, from the command line; created if it is missing.
        packages: whose versions matter; a package that is not installed is left out.
        figures: the rest of the JSON; a named tuple becomes an object.
        tables: makes the tables from what the JSON holds.
    """
    path = folder / f"{benchmark}.json"
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
    text = json.dumps(known, indent=2) + "\n"
    show(tables(json.loads(text)))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"Written to {path}")


def write_compactly(name: str, folder: Path, records: Mapping[str, Any]) -> None:
    """Writes much data of a benchmark into a JSON file of its own, one record a line.

    Args:
        name: the name of the file, without its ending.
        folder: the folder of the benchmark's JSON.
        records: what becomes one object.
    """
    path = folder / f"{name}.json"
    lines = (
        f"{json.dumps(key)}: {json.dumps(record, separators=(',', ':'))}"
        for key, record in records.items()
    )
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"Written to {path}")


def read(benchmark: str) -> dict[str, Any]:
    """Reads the committed figures of a benchmark."""
    return json.loads((RESULTS / f"{benchmark}.json").read_text())


def read_all(benchmark: str) -> list[dict[str, Any]]:
    """Reads the committed figures, and those of a run without ``--refresh`` where there is one."""
    paths = [folder / f"{benchmark}.json" for folder in (RESULTS, MEASURED)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def show(tables: Iterable[Table]) -> None:
    """Prints tables at full width."""
    for table in tables:
        Console(width=TABLE_WIDTH).print(table)


def milliseconds(quartiles: Sequence[float]) -> str:
    """Returns the median of seconds as milliseconds, and the other quartiles in parentheses."""
    low, median, high = (f"{1e3 * second:,.2f}" for second in quartiles)
    return f"{median} ({low} to {high})"


def markdown(table: Table) -> str:
    """Returns a table as Markdown, with figures on the right.

    The first column and those with the justification "default" are text, on the left. What is red
    on a terminal is bold.
    """
    rows = [[str(column.header) for column in table.columns]]
    is_text = [column.justify == "default" for column in table.columns]
    rows.append([":---", *(":---" if one else "---:" for one in is_text[1:])])
    rows.extend(
        [list(map(str, row)) for row in zip(*(c.cells for c in table.columns), strict=True)]
    )
    return "\n".join(f"| {' | '.join(map(_as_markdown, row))} |" for row in rows)


def _as_markdown(cell: str) -> str:
    """Replaces the markup of `rich` that tables use; bars of an absolute error end no cell."""
    if cell.startswith("[red]"):
        cell = cell.replace("[red]", "**").replace("[/red]", "**")
    return re.sub(r"(?<!\\)\|", r"\\|", cell)


def _as_json(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
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
