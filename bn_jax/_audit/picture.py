"""The picture of an audit: running statistics beside those of the batch, and saturation."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bn_jax._audit.evidence import FAR_MEAN, FAR_VAR
from bn_jax._audit.report import Audit, Layer
from bn_jax._pictures import (
    BAD,
    GOOD,
    QUIET,
    Panel,
    draw_rows,
    say,
    scale_around_zero,
    scale_of_factors,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What a norm adds to a variance; a difference below it makes no difference.
EPSILON = 1e-5
OF_STATISTICS = {"never updated", "stale", "differs in evaluation", "not finite"}


def draw(audit: Audit) -> "Figure":
    """Returns the figure of `Audit.plot`."""
    kinds = _kinds_by_path(audit)
    layers = audit.layers
    notes = {row: ", ".join(kinds[x.path]) for row, x in enumerate(layers) if x.path in kinds}
    off = [BAD if OF_STATISTICS & set(kinds.get(x.path, ())) else GOOD for x in layers]
    saturated = [BAD if "saturated" in kinds.get(x.path, ()) else GOOD for x in layers]
    means = [_mean_differences(layer) for layer in layers]
    factors = [_variance_factors(layer) for layer in layers]

    def draw_means(axes: "Axes") -> None:
        _shade(axes, -FAR_MEAN, FAR_MEAN)
        scale_around_zero(axes, _joined(means), least=1)
        _draw_spreads(axes, means, off)

    def draw_factors(axes: "Axes") -> None:
        _shade(axes, 1 / FAR_VAR, FAR_VAR)
        scale_of_factors(axes, _joined(factors), least=4)
        _draw_spreads(axes, factors, off)

    panels = [
        Panel("Running mean minus batch mean", "standard deviations", draw_means),
        Panel("Running variance / batch variance", "factor", draw_factors),
        Panel(
            "Saturated",
            "% without gradient",
            lambda axes: _draw_shares(axes, layers, saturated),
            0.5,
        ),
    ]
    legend = (
        ("all features", {"color": GOOD, "linewidth": 1}),
        ("middle half", {"color": GOOD, "linewidth": 4}),
        ("median", {"color": GOOD, "marker": "o", "linestyle": "", "markersize": 4}),
        ("with a finding", {"color": BAD, "linewidth": 4}),
        ("too little to matter", {"color": QUIET, "alpha": 0.3, "linewidth": 8}),
    )
    names = [layer.path or "the top level" for layer in layers]
    return draw_rows(_title(audit), names, panels, notes, legend)


def _title(audit: Audit) -> str:
    norms, findings = len(audit.layers), len(audit.findings)
    return (
        f"Audit of {norms} batch norm{'s' * (norms != 1)}: "
        f"{findings or 'no'} finding{'s' * (findings != 1)}"
    )


def _kinds_by_path(audit: Audit) -> Mapping[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for finding in audit.findings:
        known = kinds.setdefault(finding.path, [])
        if finding.kind not in known:
            known.append(finding.kind)
    return kinds


def _mean_differences(layer: Layer) -> np.ndarray | None:
    """Returns running means minus the batch's, in standard deviations; None if not measured."""
    if layer.batch_mean is None or layer.batch_var is None:
        return None
    difference = np.asarray(layer.running_mean - layer.batch_mean)
    if np.iscomplexobj(difference):
        difference = np.abs(difference)
    with np.errstate(invalid="ignore"):
        deviation = np.sqrt(np.minimum(layer.running_var, layer.batch_var) + EPSILON)
        return np.asarray(difference / deviation).reshape(-1)


def _variance_factors(layer: Layer) -> np.ndarray | None:
    if layer.batch_var is None:
        return None
    with np.errstate(invalid="ignore"):
        return np.asarray((layer.running_var + EPSILON) / (layer.batch_var + EPSILON)).reshape(-1)


def _joined(rows: Sequence[np.ndarray | None]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(row for row in rows if row is not None)])


def _shade(axes: "Axes", low: float, high: float) -> None:
    """Marks the differences that are too small for a finding."""
    axes.axvspan(low, high, color=QUIET, alpha=0.15, linewidth=0)


def _draw_spreads(axes: "Axes", rows: Sequence[np.ndarray | None], colors: Sequence[str]) -> None:
    """Draws the range, the quartiles and the median of the values of every row."""
    drawn, summaries = [], []
    for row, values in enumerate(rows):
        finite = values[np.isfinite(values)] if values is not None else np.zeros(0)
        if finite.size:
            drawn.append(row)
            summaries.append(np.quantile(finite, (0, 0.25, 0.5, 0.75, 1)))
        elif values is None:
            say(axes, row, "not measured")
        else:
            say(axes, row, "not finite", color=BAD)
    if not drawn:
        return
    least, low, median, high, most = np.array(summaries).T
    chosen = [colors[row] for row in drawn]
    axes.hlines(drawn, least, most, colors=chosen, linewidth=1)
    axes.hlines(drawn, low, high, colors=chosen, linewidth=4)
    axes.scatter(median, drawn, c=chosen, s=22, zorder=3, edgecolors="white", linewidths=0.8)


def _draw_shares(axes: "Axes", layers: Sequence[Layer], colors: Sequence[str]) -> None:
    rows = [row for row, layer in enumerate(layers) if layer.saturated is not None]
    shares = [100 * (layer.saturated or 0) for layer in layers if layer.saturated is not None]
    axes.barh(rows, shares, height=0.6, color=[colors[row] for row in rows])
    for row, layer in enumerate(layers):
        if layer.saturated is None:
            say(axes, row, "no activation" if layer.is_found else "unknown")
    axes.set_xlim(0, 100)
