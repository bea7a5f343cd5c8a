"""The figures of the experiments, and what the notebooks draw with: see `bn_jax.lab.figures`."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bn_jax.lab.experiments.statistics import Interval, mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# In inches: a line of a footer, and the ticks and the label below an axes.
LINE, LABELS_BELOW = 0.17, 0.42
PERCENT = 0.0, 100.0


def render(draw: "Callable[[Figure, Mapping[str, Any]], None]", record: Mapping[str, Any]) -> bytes:
    """Draws the figure of a claim, with what was found in its footer.

    Args:
        draw: draws the curves.
        record: the contents of the claim's JSON file.

    Returns:
        A picture as PNG.
    """
    import matplotlib
    from matplotlib.figure import Figure

    lines = [describe(one) for one in record["sub_claims"]]
    height = 4 + LINE * (len(lines) + 1)
    figure = Figure(figsize=(10, height), layout="constrained")
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=(4, height - 4))
    panels, footer = parts.ravel()
    with matplotlib.rc_context({"legend.frameon": False}):
        draw(panels, record["curves"])
    for axes in panels.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels.suptitle(f"{record['number']}. {record['claim']}", fontsize="medium", parse_math=False)
    data = record.get("data") or {}
    on = f"; on {data['name']} in the place of the digits" if "sha256" in data else ""
    text = "\n".join([f"{record['source']}; {len(record['seeds'])} seeds{on}", *lines])
    footer.text(0.01, 1, text, va="top", fontsize=7, parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    return picture.getvalue()


def describe(sub_claim: Mapping[str, Any]) -> str:
    """Returns a line on a sub-claim of a JSON file: its key, verdict, figure and bound."""
    measured = figure_of(sub_claim)
    found = f": {measured}, bound {sub_claim['bound']['text']}" if measured else ""
    return f"{sub_claim['key']} {sub_claim['verdict']}. {sub_claim['label']}{found}"


def decisive(sub_claim: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns what a JSON file holds on the setting that decided a sub-claim."""
    setting: Mapping[str, Any] = sub_claim["settings"][sub_claim["decisive"]]
    return setting


def figure_of(sub_claim: Mapping[str, Any]) -> str:
    """Returns the estimate and interval that decided a sub-claim of a JSON file, as text."""
    measured = decisive(sub_claim)["measured"]
    if None in measured.values():
        return ""
    setting = f"{sub_claim['decisive']}: " if sub_claim["decisive"] else ""
    return f"{setting}{Interval(**measured)}"


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


def band(
    axes: "Axes",
    x: Any,
    runs: Any,
    label: str,
    *,
    within: tuple[float, float] = (-np.inf, np.inf),
    **options: Any,
) -> None:
    """Draws a line through means over seeds, and a band of their 95 % intervals.

    Args:
        axes: the axes to draw into.
        x: [points].
        runs: [points, seeds]; a point with None, JSON's not-a-number, is left out.
        label: the label of the line.
        within: where the band ends, such as 0 and 100 for percentages.
        **options: further options, for `Axes.plot`.
    """
    x, values = np.asarray(x), np.asarray(runs, np.float64)
    kept = np.isfinite(values).all(-1)
    means, errors = means_and_errors(values[kept])
    (line,) = axes.plot(x[kept], means, label=label, **options)
    low, high = np.clip(means - errors[0], *within), np.clip(means + errors[1], *within)
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


def quantile_band(
    axes: "Axes", x: Any, runs: Any, label: str, *, share: float = 0.95, **options: Any
) -> None:
    """Draws a line through medians, and a band with the middle `share` of the values.

    Where `band` says how well a mean is known, this says how far single values are apart.

    Args:
        axes: the axes to draw into.
        x: [points].
        runs: [points, values].
        label: the label of the line.
        share: of the values that are in the band.
        **options: further options, for `Axes.plot`.

    Raises:
        ValueError: `share` is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} must be between 0 and 1, such as 0.95 for 95 %.")
    outside = (1 - share) / 2
    low, middle, high = np.quantile(
        np.asarray(runs, np.float64), (outside, 0.5, 1 - outside), axis=1
    )
    (line,) = axes.plot(x, middle, label=label, **options)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.25, linewidth=0)


def legend_below(target: "Axes | Figure", *, ncols: int = 4, **options: Any) -> None:
    """Puts a legend below an axes, or one for all axes below a figure, off the data.

    Space is made for it by a constrained layout, which the notebooks' style has.

    Args:
        target: the axes or the figure. A label that several axes of a figure have is named once.
        ncols: the largest number of entries beside each other.
        **options: further options, for `Axes.legend` or `Figure.legend`.

    Raises:
        ValueError: nothing that is drawn has a label.
    """
    from matplotlib.axes import Axes
    from matplotlib.transforms import ScaledTranslation

    panels = [target] if isinstance(target, Axes) else target.axes
    entries: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        raise ValueError("nothing to put into a legend: draw something with a label= before.")
    options |= {"handles": list(entries.values()), "labels": list(entries)}
    options["ncols"] = min(ncols, len(entries))
    if not isinstance(target, Axes):
        target.legend(loc="outside lower center", **options)
        return
    # In inches, since the labels below an axes have the same height whatever that of the axes is.
    down = ScaledTranslation(0, -LABELS_BELOW, target.figure.dpi_scale_trans)
    place = target.transAxes + down
    target.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=place, **options)


def ticks_at(axes: "Axes", values: Sequence[Any], *, along: str = "x", base: float = 10) -> None:
    """Makes an axis logarithmic, with ticks at these values alone.

    Args:
        axes: the axes.
        values: where the ticks are, positive; each is its own label.
        along: "x" or "y".
        base: of the logarithm.
    """
    getattr(axes, f"set_{along}scale")("log", base=base)
    set_ticks = getattr(axes, f"set_{along}ticks")
    set_ticks(values, [f"{value:g}" for value in values])
    set_ticks([], minor=True)
