"""Tables of strings as aligned text, and as HTML for notebooks."""

from collections.abc import Sequence
from html import escape
from typing import TypeAlias

Row: TypeAlias = Sequence[str]


def as_text(header: Row, rows: Sequence[Row], *, numeric: bool = False) -> str:
    """Returns the rows as lines of aligned text.

    Args:
        header: the titles of the columns; empty for a table without titles.
        rows: the cells, as many in each row as there are columns.
        numeric: whether all columns but the first are aligned to the right.

    Returns:
        The lines, without spaces at their ends.
    """
    lines = [header, *rows] if header else list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_as_line(line, widths, numeric) for line in lines)


def _as_line(row: Row, widths: Sequence[int], numeric: bool) -> str:
    first, *others = zip(row, widths, strict=True)
    cells = [str.ljust(*first)]
    cells += [cell.rjust(width) if numeric else cell.ljust(width) for cell, width in others]
    return "  ".join(cells).rstrip()


def as_html(header: Row, rows: Sequence[Row], caption: str = "") -> str:
    """Returns the rows as an HTML table, which is what Jupyter shows of an object.

    Args:
        header: the titles of the columns.
        rows: the cells, as text: what means something in HTML is escaped.
        caption: a line above the table.

    Returns:
        A `table` element.
    """
    lines = [f"<caption>{escape(caption)}</caption>"] if caption else []
    lines.append(f"<thead><tr>{_as_cells('th', header)}</tr></thead>")
    lines += [f"<tr>{_as_cells('td', row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _as_cells(tag: str, row: Row) -> str:
    return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
