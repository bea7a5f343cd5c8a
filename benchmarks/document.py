"""Writes the tables of `BENCHMARKS.md` and `NOTES.md` anew from the JSON of every benchmark.

``python -m benchmarks.document`` replaces what stands between ``<!-- NAME -->`` and
``<!-- end -->`` by the tables of ``benchmarks/results/NAME.json``. The prose is written by hand.
"""

import re
from importlib import import_module
from pathlib import Path

from benchmarks import report

PAGES = [Path(__file__).parent / name for name in ("BENCHMARKS.md", "NOTES.md")]
_PART = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def with_tables(page: str) -> str:
    """Returns the page with the tables of the committed figures."""
    return _PART.sub(lambda part: _tables(part[1]), page)


def _tables(benchmark: str) -> str:
    tables = import_module(f"benchmarks.{benchmark}").tables(report.read(benchmark))
    shown = "\n\n".join(
        f"{table.title}:\n\n{report.markdown(table)}" + f"\n\n{table.caption}" * bool(table.caption)
        for table in tables
    )
    return f"<!-- {benchmark} -->\n{shown}\n<!-- end -->"


def main() -> None:
    """Writes the pages."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main()
