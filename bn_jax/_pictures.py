"""Pictures of the norms of a model: a row for each, and panels side by side. matplotlib draws."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOOD = "#2f6690"
BAD = "#d1603d"
QUIET = "#8a8f94"
# In inches: what is around the rows, a row, and a row where there are many.
AROUND = 1.7
ROW = 0.24
NARROW_ROW = 0.16
MANY = 40
LONGEST_NAME = 44


class Panel(NamedTuple):
    """One quantity of all norms.

    Attributes:
        title: what is shown.
        label: the label of the axis, with the unit.
        draw: draws all rows into the axes; row `n` is at ``y = n``, from the top.
        width: the width, relative to that of other panels.
    """

    title: str
    label: str
    draw: "Callable[[Axes], None]"
    width: float = 1.0


def draw_rows(
    title: str,
    names: Sequence[str],
    panels: Sequence[Panel],
    notes: Mapping[int, str],
    legend: "Sequence[tuple[str, Mapping[str, object]]]" = (),
) -> "Figure":
    """Returns a figure with a row for each name.

    Args:
        title: the title of the figure.
        names: the name of each row.
        panels: what is drawn, from left to right.
        notes: text at the right of some rows, by their number.
        legend: labels below the panels, and the properties of the line or patch that each explains.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot() draws with matplotlib, which is not installed: pip install matplotlib.",
            name=error.name,
        ) from error
    rows = len(names)
    size = 8.5 if rows <= MANY else 6.5
    height = AROUND + rows * (ROW if rows <= MANY else NARROW_ROW)
    longest = max(map(len, notes.values()), default=0)
    figure = Figure(figsize=(9.5 + 0.06 * longest, height), layout="constrained")
    figure.suptitle(title, fontsize=10.5, x=0.01, ha="left")
    subplots = figure.subplots(
        1, len(panels), sharey=True, squeeze=False, width_ratios=[panel.width for panel in panels]
    )[0]
    for axes, panel in zip(subplots, panels, strict=True):
        panel.draw(axes)
        axes.set_title(panel.title, fontsize=9.5, loc="left")
        axes.set_xlabel(panel.label, fontsize=8.5)
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    subplots[0].set_ylim(rows - 0.4, -0.6)
    subplots[0].set_yticks(range(rows), [_shortened(name) for name in names], fontsize=size)
    for row, note in notes.items():
        subplots[-1].annotate(
            note, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=size,
            color=BAD, annotation_clip=False,
        )  # fmt: skip
    _add_legend(figure, legend)
    return figure


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def _add_legend(figure: "Figure", legend: "Sequence[tuple[str, Mapping[str, object]]]") -> None:
    from matplotlib.lines import Line2D

    if legend:
        handles = [Line2D([], [], label=label, **options) for label, options in legend]  # type: ignore[arg-type]
        figure.legend(
            handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8, frameon=False
        )


def say(axes: "Axes", row: int, text: str, *, color: str = QUIET) -> None:
    """Writes a text into a row, in the place of what there is not to draw."""
    axes.annotate(
        text, (0.5, row), xycoords=("axes fraction", "data"), ha="center", va="center", fontsize=7,
        color=color, bbox={"color": "white", "pad": 1}, zorder=4,
    )  # fmt: skip


# --- scales -------------------------------------------------------------------------------------


def scale_around_zero(axes: "Axes", values: np.ndarray, *, least: float) -> None:
    """Makes an axis for values around zero: linear for small ones, logarithmic beyond 1."""
    limit = 1.15 * max(_largest(np.abs(values)), least)
    if limit <= 4 * least:
        axes.set_xlim(-limit, limit)
        return
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(-limit, limit)
    exponents = _few(math.floor(math.log10(limit)), 3)
    ticks = [sign * 10**exponent for sign in (-1, 1) for exponent in exponents]
    axes.set_xticks([*ticks, 0], [f"{tick:g}" for tick in [*ticks, 0]])
    axes.minorticks_off()


def scale_from_zero(axes: "Axes", values: np.ndarray, *, least: float) -> float:
    """Makes an axis for values from zero on, and returns its end."""
    limit = 1.15 * max(_largest(values), least)
    if limit > 12 * least:
        axes.set_xscale("symlog", linthresh=least)
        start = round(math.log10(least))
        exponents = _few(math.floor(math.log10(limit)) - start, 4)
        ticks = [10.0 ** (start + exponent) for exponent in exponents]
        axes.set_xticks([0, *ticks], [f"{tick:g}" for tick in [0, *ticks]])
        axes.minorticks_off()
    axes.set_xlim(0, limit)
    return limit


def scale_of_factors(
    axes: "Axes", factors: np.ndarray, *, least: float, is_up_only: bool = False
) -> float:
    """Makes a logarithmic axis for factors, and returns its end."""
    logs = np.abs(np.log(factors[np.isfinite(factors) & (factors > 0)]))
    largest = math.exp(min(_largest(logs), 80.0))
    limit = 1.15 * max(largest, least)
    axes.set_xscale("log")
    if limit > 12:
        exponents = _few(math.floor(math.log10(limit)), 5 if is_up_only else 3)
        ups = [10.0**exponent for exponent in exponents[1:]]
    else:
        ups = [tick for tick in ((1.5, 2, 3) if limit < 4 else (2, 4, 8)) if tick <= limit]
    downs = [] if is_up_only else [1 / tick for tick in ups]
    labels = [f"1/{tick:g}" for tick in ups][: len(downs)] + ["1"] + [f"{tick:g}" for tick in ups]
    axes.set_xticks([*downs, 1, *ups], labels)
    axes.minorticks_off()
    axes.set_xlim(1 if is_up_only else 1 / limit, limit)
    return limit


def _largest(values: np.ndarray) -> float:
    return float(np.max(values[np.isfinite(values)], initial=0))


def _few(last: int, most: int) -> list[int]:
    """Returns exponents from 0 on, up to the last one, in equal steps, and at most so many."""
    return list(range(0, last + 1, max(1, -(-last // (most - 1)))))
