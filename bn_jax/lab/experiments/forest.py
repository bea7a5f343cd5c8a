"""The picture of all claims: a row for every sub-claim, its interval beside its bound.

Sub-claims have different units, so each row has its own scale, on which the claimed side is the
right one. For a side, 0 is the bound and 1 the size that reproduces the source, or else the
smallest that would matter. For an equivalence and an identity, -1 and 1 are the bounds.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bn_jax.lab.experiments.figures import decisive, figure_of
from bn_jax.lab.experiments.statistics import Interval
from bn_jax.lab.experiments.verdicts import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    Verdict.EXACT: "C0",
    Verdict.REPRODUCED: "C0",
    Verdict.DIRECTION_ONLY: "C2",
    Verdict.INCONCLUSIVE: "C7",
    Verdict.NOT_REPRODUCED: "C3",
}
# Inches of a row.
ROW = 0.19
# What is farther from 0 is drawn here.
FARTHEST = 4.0


class Row(NamedTuple):
    """A sub-claim on its own scale.

    Attributes:
        interval: the estimate and its interval.
        reproduced: the range in which the sub-claim is reproduced.
    """

    interval: Interval
    reproduced: tuple[float, float]


def scale(sub_claim: Mapping[str, Any]) -> Row | None:
    """Puts a sub-claim of a JSON file on its own scale; None if nothing was measured.

    Example:
        >>> from bn_jax.lab.experiments.forest import scale
        >>> measured = {"estimate": 6.0, "low": 5.0, "high": 8.0}
        >>> one = {
        ...     "scale": "difference",
        ...     "bound": {"kind": "below", "bound": 10.0, "size": 5.0, "matters": None},
        ...     "settings": {"": {"measured": measured}},
        ...     "decisive": "",
        ... }
        >>> scale(one)
        Row(interval=Interval(estimate=0.8, low=0.4, high=1.0), reproduced=(1.0, 4.0))
    """
    measured = decisive(sub_claim)["measured"]
    if None in measured.values():
        return None
    transform = math.log if sub_claim["scale"] == "ratio" else float
    values = [transform(measured[end]) for end in ("estimate", "low", "high")]
    bound = sub_claim["bound"]
    match bound["kind"]:
        case "identity":
            zero, one, least = 0.0, bound["tolerance"], -1.0
        case "within":
            low, high = transform(bound["low"]), transform(bound["high"])
            zero, one, least = (low + high) / 2, high, -1.0
        case side:
            zero = transform(bound["bound"])
            size = bound["matters"] if bound["size"] is None else bound["size"]
            # Without a size, the interval fills half of the row.
            farthest = max(abs(value - zero) for value in values) or 1.0
            one = zero + (-farthest / 2 if side == "below" else farthest / 2)
            one = one if size is None or size == bound["bound"] else transform(size)
            least = 0.0 if bound["size"] is None else 1.0
    scaled = [max(-FARTHEST, min(FARTHEST, (value - zero) / (one - zero))) for value in values]
    most = FARTHEST if least >= 0 else 1.0
    return Row(Interval(scaled[0], min(scaled), max(scaled)), (least, most))


def save(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a row for every sub-claim.

    Args:
        records: the contents of the claims' JSON files.
        path: the path of the file to write; its suffix gives the format.
    """
    from matplotlib.figure import Figure

    rows = [(record, one) for record in records for one in record["sub_claims"]]
    figure = Figure(figsize=(10, 1.2 + ROW * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (_, one) in enumerate(rows):
        _draw_row(axes, place, one)
    labels = [f"{one['label']}  {one['key']}" for _, one in rows]
    axes.set_yticks(range(len(rows)), labels, parse_math=False)
    axes.set(xlim=(-FARTHEST - 0.2, FARTHEST + 0.2), ylim=(len(rows) - 0.4, -0.6), xticks=[])
    axes.axvline(0, color="gray", linewidth=0.6)
    axes.set_xlabel("no effect is at the line, the claimed side on the right; shaded: reproduced")
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle("Every sub-claim on a scale of its own", fontsize="medium")
    figure.savefig(path, dpi=130)


def draw_interval(axes: "Axes", place: int, sub_claim: Mapping[str, Any]) -> None:
    """Draws a sub-claim's interval over the range in which it is reproduced.

    Args:
        axes: with the scale of `scale` along x.
        place: of the row along y.
        sub_claim: from a JSON file; nothing is drawn if nothing was measured.
    """
    row = scale(sub_claim)
    if row is None:
        return
    color = color_of(sub_claim)
    low, high = row.reproduced
    axes.barh(place, high - low, 0.8, low, color="C0", alpha=0.12, linewidth=0)
    axes.plot(row.interval[1:], (place, place), color=color, linewidth=1.5)
    axes.plot(row.interval.estimate, place, "o", color=color, markersize=4)


def color_of(sub_claim: Mapping[str, Any]) -> str:
    """Returns the color of the verdict on a sub-claim of a JSON file."""
    return COLORS.get(Verdict(sub_claim["verdict"]), "black")


def _draw_row(axes: "Axes", place: int, sub_claim: Mapping[str, Any]) -> None:
    draw_interval(axes, place, sub_claim)
    figure = figure_of(sub_claim)
    axes.annotate(
        f"{figure}, {sub_claim['verdict']}" if figure else sub_claim["verdict"],
        (1.01, place),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=6.5,
        color=color_of(sub_claim),
        annotation_clip=False,
        parse_math=False,
    )
