"""The figures of the experiments: their look, and means over seeds with their intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bn_jax.lab.experiments.verdicts import Experiment, mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save(experiment: Experiment, curves: Mapping[str, Any], path: Path) -> None:
    """Draws the figure of an experiment.

    Args:
        experiment: the experiment.
        curves: the curves of its result, as read from JSON.
        path: the path of the file to write; its suffix gives the format.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    with matplotlib.rc_context({"legend.frameon": False}):
        experiment.draw(figure, curves)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(experiment.claim, fontsize="medium")
    figure.savefig(path, dpi=130)


def means_and_errors(
    runs: Any,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns means over seeds, and their distances from the ends of their 95 % intervals.

    Args:
        runs: [points, seeds]; None, JSON's not-a-number, gives not-a-number.

    Returns:
        The means, [points], and the distances down and up, [2, points].
    """
    intervals = [mean_interval(values) for values in np.asarray(runs, np.float64)]
    means = np.array([interval.estimate for interval in intervals])
    low = np.array([interval.low for interval in intervals])
    high = np.array([interval.high for interval in intervals])
    return means, np.array([means - low, high - means])


def band(axes: "Axes", x: Any, runs: Any, label: str, **options: Any) -> None:
    """Draws a line through means over seeds, and a band of their 95 % intervals.

    Args:
        axes: the axes to draw into.
        x: [points].
        runs: [points, seeds]; a point with None, JSON's not-a-number, is left out.
        label: the label of the line.
        **options: further options, for `Axes.plot`.
    """
    x, values = np.asarray(x), np.asarray(runs, np.float64)
    kept = np.isfinite(values).all(-1)
    means, errors = means_and_errors(values[kept])
    (line,) = axes.plot(x[kept], means, label=label, **options)
    low, high = means - errors[0], means + errors[1]
    axes.fill_between(x[kept], low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def points(
    axes: "Axes",
    positions: Any,
    runs: Any,
    label: str | None = None,
    *,
    horizontal: bool = False,
    **options: Any,
) -> None:
    """Draws means over seeds as points, with bars for their 95 % intervals.

    Args:
        axes: the axes to draw into.
        positions: the positions along the other axis, [points].
        runs: [points, seeds].
        label: the label of the points.
        horizontal: whether values are along x and positions along y.
        **options: further options, for `Axes.errorbar`.
    """
    means, errors = means_and_errors(runs)
    options = {"fmt": "o", "capsize": 3, **options}
    if horizontal:
        axes.errorbar(means, positions, xerr=errors, label=label, **options)
    else:
        axes.errorbar(positions, means, yerr=errors, label=label, **options)
