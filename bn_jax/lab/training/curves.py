"""The picture of a training: loss and accuracy of all arms over the steps. matplotlib draws."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bn_jax.lab.fitting import Report

__all__ = ["draw_curves"]

# Colors of Okabe and Ito, which color-blind people tell apart. The first is drawn widest and below
# the others, so that curves that coincide are all seen.
STYLES = (
    {"color": "#0072b2", "linewidth": 3.4, "linestyle": "-", "marker": "o", "markersize": 6.5},
    {"color": "#e69f00", "linewidth": 2.0, "linestyle": "-", "marker": "s", "markersize": 4.5},
    {"color": "#000000", "linewidth": 1.1, "linestyle": "--", "marker": "^", "markersize": 3.5},
)
# Points of a curve: of more reports, neighbors are averaged.
MOST_POINTS = 300
MOST_MARKERS = 12


class _Curve(NamedTuple):
    """The reports of an arm as arrays; what is not finite is NaN.

    Attributes:
        steps: the last step of each point.
        sizes: over how many steps each point averages the training loss.
        loss: of training.
        accuracy: of validation, in percent.
        diverged: the first step at which a loss was not finite, or None.
    """

    steps: np.ndarray
    sizes: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    diverged: int | None


def draw_curves(
    reports: "Mapping[str, Sequence[Report]]", *, title: str, target: float
) -> "Figure":
    """Draws training loss and validation accuracy.

    Args:
        reports: at least one of each arm.
        title: what was trained.
        target: an accuracy to mark with a line.

    Returns:
        The figure.
    """
    from matplotlib.figure import Figure

    points = max(map(len, reports.values()))
    together = math.ceil(points / MOST_POINTS)
    curves = {arm: _curve(given, together) for arm, given in reports.items()}
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    loss, accuracy = figure.subplots(1, 2)
    for number, (arm, curve) in enumerate(curves.items()):
        label = arm if curve.diverged is None else f"{arm} (diverged at step {curve.diverged:,})"
        style = _style(number, len(curve.steps), len(curves))
        loss.plot(curve.steps, curve.loss, label=label, **style)
        accuracy.plot(curve.steps, curve.accuracy, **style)
    _scale_loss(loss, np.concatenate([curve.loss for curve in curves.values()]))
    sizes = np.concatenate([curve.sizes for curve in curves.values()])
    loss.set_ylabel(f"training loss, {_averaging(sizes, together)}")
    of_reports = "" if together == 1 else f", mean of {together} reports"
    accuracy.set(ylim=(0, 101), ylabel=f"validation accuracy (%){of_reports}")
    _mark_target(accuracy, target)
    for axes in (loss, accuracy):
        _finish(axes, max(curve.steps[-1] for curve in curves.values()))
    # Below the axes, where no curve can be.
    figure.legend(loc="outside lower center", ncols=len(curves), fontsize=9, frameon=False)
    return figure


def _curve(reports: "Sequence[Report]", together: int) -> _Curve:
    starts = np.arange(0, len(reports), together)
    ends = np.array([report.step for report in reports])[
        np.minimum(starts + together, len(reports)) - 1
    ]
    examples = np.array([float(report.training.examples) for report in reports])
    loss = np.array([report.training.loss for report in reports])
    validation_loss = np.array([report.validation.loss for report in reports])
    accuracy = np.array([100 * report.validation.accuracy for report in reports])
    lost = np.flatnonzero(~(np.isfinite(loss) & np.isfinite(validation_loss)))
    loss[~np.isfinite(loss)] = np.nan
    return _Curve(
        steps=ends,
        sizes=np.diff(ends, prepend=0),
        loss=np.add.reduceat(loss * examples, starts) / np.add.reduceat(examples, starts),
        accuracy=np.add.reduceat(accuracy, starts) / np.diff(np.append(starts, len(reports))),
        diverged=reports[lost[0]].step if lost.size else None,
    )


def _style(number: int, points: int, arms: int) -> dict[str, object]:
    """Returns how the curve of an arm is drawn; the markers of the arms take turns."""
    every = max(1, points // MOST_MARKERS)
    offset = number * every // arms
    return {**STYLES[number % len(STYLES)], "markevery": (offset, every), "zorder": 2 + number}


def _averaging(sizes: np.ndarray, together: int) -> str:
    """Says over how many steps each point is a mean: the last of an epoch may have fewer."""
    most, least = int(sizes.max()), int(sizes.min())
    if most == least:
        return f"mean of {most} step{'s' * (most != 1)}"
    if together > 1:
        return f"mean of about {int(np.median(sizes))} steps"
    return f"mean of {most} steps (last of an epoch: {least})"


def _scale_loss(axes: "Axes", values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    if not finite.size:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite loss", transform=axes.transAxes, ha="center")
    elif finite.min() > 0 and finite.max() > 3 * finite.min():
        axes.set_yscale("log")


def _mark_target(axes: "Axes", target: float) -> None:
    axes.axhline(100 * target, color="gray", linewidth=1.0, linestyle=":", zorder=1)
    axes.annotate(
        f"{target:.0%}", (1.01, 100 * target), xycoords=("axes fraction", "data"), va="center",
        fontsize=8.5, color="dimgray", annotation_clip=False,
    )  # fmt: skip


def _finish(axes: "Axes", last_step: float) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("step")
    axes.set_xlim(0, 1.03 * last_step)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
