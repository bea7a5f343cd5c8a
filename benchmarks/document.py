"""Rewrites the tables of `PAGES` from the committed JSON.

``python -m benchmarks.document`` replaces the text between ``<!-- NAME -->`` and ``<!-- end -->``
by the tables of ``benchmarks/results/NAME.json``. ``<!-- NAME 0 -->`` takes only the first table.
A module with `READS` makes its tables from the JSON files of several benchmarks. The prose is
written by hand.
"""

import re
from importlib import import_module
from pathlib import Path

from benchmarks import report

PAGES = [
    Path(__file__).parent / name for name in ("BENCHMARKS.md", "NOTES.md", "../docs/performance.md")
]
_PART = re.compile(r"<!-- (\w+)( \d)? -->\n.*?<!-- end -->", re.DOTALL)


def with_tables(page: str) -> str:
    """Returns the page with the tables of the committed figures."""
    return _PART.sub(lambda part: _tables(part[1], part[2] or ""), page)


def _tables(benchmark: str, chosen: str) -> str:
    module = import_module(f"benchmarks.{benchmark}")
    tables = module.tables(*map(report.read, getattr(module, "READS", [benchmark])))
    shown = "\n\n".join(
        f"{table.title}:\n\n{report.markdown(table)}" + f"\n\n{table.caption}" * bool(table.caption)
        for table in (tables if not chosen else [tables[int(chosen)]])
    )
    return f"<!-- {benchmark}{chosen} -->\n{shown}\n<!-- end -->"


def main() -> None:
    """Writes the pages."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main()
