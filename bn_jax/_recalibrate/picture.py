"""The picture of a recalibration: how far the statistics of each norm moved."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bn_jax._pictures import (
    BAD,
    GOOD,
    Panel,
    draw_rows,
    say,
    scale_from_zero,
    scale_of_factors,
)
from bn_jax._recalibrate.report import LayerChange, Recalibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(result: Recalibration) -> "Figure":
    """Returns the figure of `Recalibration.plot`."""
    layers = result.layers
    notes = {row: note for row, x in enumerate(layers) if (note := _note(x, result.batches))}

    def draw_means(axes: "Axes") -> None:
        moved = np.array([layer.mean for layer in layers])
        end = scale_from_zero(axes, moved, least=0.1)
        _draw_changes(axes, layers, moved, 0, end)

    def draw_variances(axes: "Axes") -> None:
        factors = np.array([layer.var for layer in layers])
        end = scale_of_factors(axes, factors, least=2, is_up_only=True)
        _draw_changes(axes, layers, factors, 1, end)

    panels = [
        Panel("Mean moved by", "old standard deviations", draw_means),
        Panel("Variance changed", "factor, up or down", draw_variances),
    ]
    names = [layer.path or "the top level" for layer in layers]
    return draw_rows(_title(result), names, panels, notes)


def _title(result: Recalibration) -> str:
    norms = len(result.layers)
    settled = "" if result.settled else ", not settled"
    return (
        f"Recalibration of {norms} batch norm{'s' * (norms != 1)} over "
        f"{result.batches} batch{'es' * (result.batches != 1)}{settled}: "
        "largest change of a feature"
    )


def _note(layer: LayerChange, batches: int) -> str:
    notes = []
    if layer.batches_left_out:
        notes.append(f"{layer.batches_left_out} of {batches} batches left out")
    if layer.kept and layer.values:
        notes.append(f"{layer.kept} feature{'s' * (layer.kept > 1)} kept")
    return ", ".join(notes)


def _draw_changes(
    axes: "Axes", layers: Sequence[LayerChange], values: np.ndarray, start: float, end: float
) -> None:
    """Draws a line from no change to the change of each norm."""
    measured = np.array([layer.values > 0 for layer in layers], bool)
    finite = measured & np.isfinite(values)
    rows = np.arange(len(layers))
    axes.hlines(rows[finite], start, values[finite], colors=GOOD, linewidth=1.5)
    axes.scatter(values[finite], rows[finite], c=GOOD, s=18, zorder=3, clip_on=False)
    for row in rows[~measured]:
        say(axes, row, "measured nothing, keeps its statistics")
    for row in rows[measured & ~finite]:
        axes.hlines(row, start, end, colors=BAD, linewidth=1.5, linestyles="dotted")
        say(axes, row, "infinite: the old value was 0 or not finite", color=BAD)
