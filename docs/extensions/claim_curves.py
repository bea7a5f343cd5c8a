"""The own picture of each claim, drawn by its experiment from the committed curves."""

import html
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import claim_pictures
import matplotlib
from claim_pictures import WIDTH
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from matplotlib.transforms import ScaledTranslation

from bn_jax.lab.experiments import EXPERIMENTS, figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches: a panel with its labels, a line of a legend, a title, and what a legend has for its text.
PANEL, LINE, TITLE, LEGEND = 2.5, 0.15, 0.2, 3.3
# Inches: a letter of a legend, and the handle beside its text.
LETTER, HANDLE = 0.058, 0.5
# Letters in a line of a label, and of all labels of ticks beside each other.
Y_LETTERS, X_LETTERS, TICK_LETTERS = 36, 54, 50
LETTERS = 8


class Column(Figure):
    """A figure whose panels are below each other, where an experiment asks for a row of them."""

    def subplots(self, nrows: int = 1, ncols: int = 1, **options: Any) -> Any:
        """Makes the panels; their widths relative to each other have no meaning in a column."""
        options.pop("width_ratios", None)
        return super().subplots(max(nrows, ncols), 1, **options)


def draw(name: str, curves: Mapping[str, Any]) -> Figure:
    """Draws the picture of a claim, for a narrow page: panels in a column, legends off the data.

    Args:
        name: the name of the claim.
        curves: from ``claim_curves.json``.
    """
    with matplotlib.rc_context({"font.size": LETTERS, "legend.frameon": False}):
        figure = Column(layout="constrained", facecolor="white")
        EXPERIMENTS[name].draw(figure, curves)
        _fit_labels(figure)
        height = sum(PANEL + _move_legend(axes) for axes in panels_of(figure))
        figure.set_size_inches(WIDTH, height)
    for axes in panels_of(figure):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def panels_of(figure: Figure) -> "list[Axes]":
    """Returns the axes of a figure that are no color bars."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def _fit_labels(figure: Figure) -> None:
    """Breaks long labels, and repeats what a panel has from the one that would be left of it."""
    names: Sequence[str] = ()
    for axes in figure.axes:
        axes.set_ylabel(_wrap(axes.get_ylabel(), Y_LETTERS))
        axes.set_xlabel(_wrap(axes.get_xlabel(), X_LETTERS))
        own = _tick_names(axes.yaxis)
        if own and not any(own):
            axes.set_yticks(axes.get_yticks(), names)
        elif own:
            names = own
        ticks = _tick_names(axes.xaxis)
        longest = sum(max(map(len, tick.split("\n"))) for tick in ticks)
        if longest > TICK_LETTERS:
            axes.set_xticks(axes.get_xticks(), ticks, rotation=40, ha="right")


def _wrap(label: str, letters: int) -> str:
    return "\n".join(
        textwrap.fill(line, letters, break_on_hyphens=False) for line in label.split("\n")
    )


def _tick_names(axis: Any) -> Sequence[str]:
    """Returns the labels of ticks that were set; none, if matplotlib chooses the ticks."""
    if not isinstance(axis.get_major_locator(), FixedLocator):
        return []
    labels: list[str] = axis.get_major_formatter().format_ticks(axis.get_majorticklocs())
    return labels


def _move_legend(axes: "Axes") -> float:
    """Puts a legend above its axes.

    Args:
        axes: with or without a legend.

    Returns:
        The height of the legend and of the title below it, in inches.
    """
    title = TITLE if axes.get_title() else 0.0
    if axes.get_legend() is None:
        return title
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(3, int(LEGEND / (LETTER * max(map(len, labels)) + HANDLE))))
    up = ScaledTranslation(0, title, axes.figure.dpi_scale_trans)
    axes.legend(
        handles,
        labels,
        ncols=columns,
        fontsize=7,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        bbox_transform=axes.transAxes + up,
        borderaxespad=0.2,
        columnspacing=1.2,
    )
    return title + LINE * -(-len(labels) // columns)


def describe(claim: Mapping[str, Any], figure: Figure) -> str:
    """Returns what the picture of a claim shows, for those who do not see it.

    Args:
        claim: from ``claims.json``.
        figure: from `draw`.
    """
    panels = panels_of(figure)
    counted = "1 panel" if len(panels) == 1 else f"{len(panels)} panels"
    parts = [f"Curves of the claim: {claim['claim']}, in {counted}"]
    for place, axes in enumerate(panels, 1):
        title = f" ({_plain(axes.get_title())})" if axes.get_title() else ""
        labels = [_plain(text) for text in (axes.get_ylabel(), axes.get_xlabel()) if text]
        shown = (
            f"Panel {place}{title}: {' by '.join(labels)}" if labels else f"Panel {place}{title}"
        )
        legend = axes.get_legend()
        named = [_plain(text.get_text()) for text in legend.get_texts()] if legend else []
        ticks = (name for axis in (axes.xaxis, axes.yaxis) for name in _tick_names(axis))
        words = [_plain(name) for name in ticks if re.match("[^0-9]*[a-z]", name, re.IGNORECASE)]
        shown += f", for {'; '.join(named)}" if named else ""
        parts.append(f"{shown}, at {'; '.join(words)}" if words else shown)
    return f"{'. '.join(parts)}."


def _plain(text: str) -> str:
    """Returns a label without the markup of formulas."""
    return re.sub(r"[$\\{}]", "", text).replace("log_10", "log10").replace("\n", " ")


def save_curves(content: Mapping[str, Any], path: Path) -> None:
    """Draws the picture of a claim into a file that holds its text alternative, too.

    Args:
        content: the claim's ``name``, its ``claim`` of ``claims.json``, and its ``curves``.
        path: the path of the SVG file to write.
    """
    figure = draw(content["name"], content["curves"])
    claim_pictures.save_svg(figure, path, describe(content, figure))


def read_description(path: Path) -> str:
    """Returns the text alternative of a picture that `save_curves` has written."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", path.read_text(), re.DOTALL)
    return html.unescape(found[1]) if found else ""


def code_of(name: str) -> Sequence[Path]:
    """Returns the files that decide how the picture of a claim looks."""
    of_claim = sys.modules[EXPERIMENTS[name].draw.__module__].__file__
    files = __file__, claim_pictures.__file__, figures.__file__, of_claim
    return [Path(file) for file in files if file]
