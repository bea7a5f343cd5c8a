"""How the experiments' figures look."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bn_jax.lab.experiments.verdicts import Experiment


def save(experiment: "Experiment", curves: Mapping[str, Any], path: Path) -> None:
    """Draws the figure of an experiment.

    Args:
        experiment: whose.
        curves: of its result, as read from JSON.
        path: of the file to write; its suffix says in which format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    experiment.draw(figure, curves)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(experiment.claim, fontsize="medium")
    figure.savefig(path, dpi=130)


def band(axes: "Axes", x: Any, runs: Any, label: str, **options: Any) -> None:
    """Draws the mean over seeds and its 95 % interval.

    Args:
        axes: where.
        x: [points].
        runs: [points, seeds]; None, JSON's not-a-number, is left out.
        label: of the line.
        **options: of the line.
    """
    from bn_jax.lab.experiments.verdicts import mean_interval

    x, values = np.asarray(x), np.asarray(runs, np.float64)
    kept = np.isfinite(values).all(-1)
    intervals = np.array([mean_interval(one) for one in values[kept]]).reshape(-1, 3)
    (line,) = axes.plot(x[kept], intervals[:, 0], label=label, **options)
    axes.fill_between(
        x[kept], intervals[:, 1], intervals[:, 2], color=line.get_color(), alpha=0.2, linewidth=0
    )
