"""The pictures of the claims' pages, drawn from the committed results alone."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bn_jax.lab.experiments import forest
from bn_jax.lab.experiments.figures import figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches. A phone shows a figure of this width with letters that can be read.
WIDTH, LEFT, RIGHT, EDGE = 4.2, 1.3, 0.15, 0.05
ROW, TITLE, TICKS, LINE, GAP = 0.19, 0.2, 0.2, 0.135, 0.16
# Letters in a line of a title, of the name of a setting, and of the name of a quantity.
TITLE_LETTERS, SETTING_LETTERS, QUANTITY_LETTERS = 58, 18, 58
# Logarithmic axes of a smaller range have the ticks of linear ones.
MOST_OF_LINEAR = 20
# Below the tolerance of an identity, errors of this share of it and less are drawn as one.
LEAST = 1e-9


class Panel(NamedTuple):
    """A sub-claim and the text of its panel, in lines."""

    sub_claim: Mapping[str, Any]
    title: list[str]
    names: list[str]
    quantity: list[str]

    @property
    def rows(self) -> float:
        """The height of the axes, in inches."""
        return sum(ROW + LINE * name.count("\n") for name in self.names)

    @property
    def height(self) -> float:
        """The height of the panel with all its text, in inches."""
        below = TICKS + LINE * len(self.quantity)
        return TITLE + LINE * (len(self.title) - 1) + self.rows + below + GAP


def save_claim(claim: Mapping[str, Any], path: Path) -> None:
    """Draws a panel for every sub-claim: each setting's interval beside the bound, in its unit.

    Args:
        claim: from ``claims.json``.
        path: the path of the SVG file to write.
    """
    panels = [_panel(one) for one in claim["sub_claims"]]
    height = sum(panel.height for panel in panels)
    figure = white_figure(height)
    top = height
    for panel in panels:
        head = TITLE + LINE * (len(panel.title) - 1)
        low = top - head - panel.rows
        place = (LEFT, low, WIDTH - LEFT - RIGHT, panel.rows)
        axes = figure.add_axes(
            (place[0] / WIDTH, place[1] / height, place[2] / WIDTH, place[3] / height)
        )
        figure.text(
            EDGE / WIDTH,
            (top - 0.02) / height,
            "\n".join(panel.title),
            va="top",
            fontsize=8,
            fontweight="bold",
            color=forest.color_of(panel.sub_claim),
            parse_math=False,
        )
        _draw_panel(axes, panel)
        top -= panel.height
    save_svg(figure, path)


def _panel(sub_claim: Mapping[str, Any]) -> Panel:
    title = f"{sub_claim['key']}  {sub_claim['label']}: {sub_claim['verdict']}"
    return Panel(
        sub_claim,
        textwrap.wrap(title, TITLE_LETTERS),
        [textwrap.fill(name, SETTING_LETTERS) for name, _ in settings_of(sub_claim)],
        textwrap.wrap(sub_claim["quantity"], QUANTITY_LETTERS),
    )


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    sub_claim, bound = panel.sub_claim, panel.sub_claim["bound"]
    is_identity = bound["kind"] == "identity"
    floor = bound["tolerance"] * LEAST if is_identity else None
    if is_identity or sub_claim["scale"] == "ratio":
        axes.set_xscale("log")
    places = _places(panel.names)
    for place, (_, one) in zip(places, settings_of(sub_claim), strict=True):
        measured, color = one["measured"], forest.color_of(one)
        if None in measured.values():
            axes.annotate("no measurement", (0.5, place), ("axes fraction", "data"), va="center")
            continue
        low, estimate, high = (
            measured[end] if floor is None else max(measured[end], floor)
            for end in ("low", "estimate", "high")
        )
        axes.plot((low, high), (place, place), color=color, linewidth=1.8)
        axes.plot(estimate, place, "o", color=color, markersize=4)
    _shade(axes, bound, floor)
    axes.set_ylim(panel.rows, 0)
    axes.set_yticks(places, panel.names, fontsize=7, parse_math=False)
    _set_ticks(axes, is_identity)
    axes.tick_params(axis="x", labelsize=7, length=2)
    axes.tick_params(axis="y", length=0)
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.annotate(
        "\n".join(panel.quantity),
        (1, 0),
        (0, -TICKS * 72),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=7,
        parse_math=False,
        annotation_clip=False,
    )


def settings_of(sub_claim: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the settings of a sub-claim of ``claims.json``, those with numbers in their order."""

    def key(item: tuple[str, Any]) -> list[tuple[float, str]]:
        parts = re.split(r"(\d+(?:\.\d+)?)", item[0])
        return [(float(part), "") if part[:1].isdigit() else (-1.0, part) for part in parts]

    return sorted(sub_claim["settings"].items(), key=key)


def _places(names: Sequence[str]) -> list[float]:
    """Returns the middle of each setting's row, in inches from the top."""
    places, top = [], 0.0
    for name in names:
        height = ROW + LINE * name.count("\n")
        places.append(top + height / 2)
        top += height
    return places


def _set_ticks(axes: "Axes", is_identity: bool) -> None:
    """Chooses ticks that do not overlap, and plain ones where ratios span no power of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    left, right = axes.get_xlim()
    if axes.get_xscale() == "log" and (is_identity or right / left > MOST_OF_LINEAR):
        return
    ticks = MaxNLocator(nbins=5).tick_values(left, right)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if left <= tick <= right]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, place: f"{tick:.6g}"))


def _shade(axes: "Axes", bound: Mapping[str, Any], floor: float | None) -> None:
    """Shades where the sub-claim is true, and darker where the published size is reached."""
    edges = [
        bound[name]
        for name in ("tolerance", "low", "high", "bound", "size", "matters")
        if bound.get(name) is not None
    ]
    if floor is not None:
        edges.append(floor)
    for edge in edges:
        # Moves the limits of the axes, so that they hold every bound.
        axes.plot(edge, 0, alpha=0)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right)
    match bound["kind"]:
        case "identity":
            spans = [(left, bound["tolerance"])]
        case "within":
            spans = [(bound["low"], bound["high"])]
        case "above":
            spans = [(edge, right) for edge in (bound["bound"], bound["size"]) if edge is not None]
        case "below":
            spans = [(left, edge) for edge in (bound["bound"], bound["size"]) if edge is not None]
        case _:
            spans = []
    for low, high in spans:
        axes.axvspan(low, high, color="C0", alpha=0.13, linewidth=0)
    if bound.get("matters") is not None:
        axes.axvline(bound["matters"], color="gray", linewidth=0.8, linestyle="--")


def save_forest(claims: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a row for every sub-claim of all claims, each on a scale of its own.

    Args:
        claims: from ``claims.json``, in the order of their numbers.
        path: the path of the SVG file to write.
    """
    from matplotlib.lines import Line2D

    ones = [one for claim in claims for one in claim["sub_claims"]]
    row, top, bottom, left = 0.155, 0.5, 0.35, 1.85
    height = top + row * len(ones) + bottom
    figure = white_figure(height)
    axes = figure.add_axes(
        (left / WIDTH, bottom / height, (WIDTH - left - RIGHT) / WIDTH, row * len(ones) / height)
    )
    places = iter(range(len(ones)))
    for claim in claims:
        for one in claim["sub_claims"]:
            forest.draw_interval(axes, next(places), one)
        axes.axhline(_last(claims, claim) + 0.5, color="gray", linewidth=0.4)
    labels = [f"{one['label']}  {one['key']}" for one in ones]
    axes.set_yticks(range(len(ones)), labels, fontsize=7, parse_math=False)
    for text, one in zip(axes.get_yticklabels(), ones, strict=True):
        text.set_color(forest.color_of(one))
    edge = forest.FARTHEST + 0.2
    axes.set(xlim=(-edge, edge), ylim=(len(ones) - 0.4, -0.6), xticks=[])
    axes.axvline(0, color="gray", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("at the line: no effect; to the right: as claimed", fontsize=7)
    occurring = {one["verdict"]: forest.color_of(one) for one in ones}
    handles = [
        Line2D([], [], color=color, marker="o", label=name) for name, color in occurring.items()
    ]
    figure.legend(handles=handles, loc="upper center", ncols=3, fontsize=7, frameon=False)
    save_svg(figure, path)


def _last(claims: Sequence[Mapping[str, Any]], claim: Mapping[str, Any]) -> int:
    """Returns the row of the last sub-claim of a claim."""
    before = [one for one in claims if one["number"] <= claim["number"]]
    return sum(len(one["sub_claims"]) for one in before) - 1


def describe(claim: Mapping[str, Any]) -> str:
    """Returns what the picture of a claim shows, for those who do not see it."""
    parts = [
        f"{one['key']}, {one['label']}: {figure_of(one) or 'nothing measured'}, "
        f"bound {one['bound']['text']}, {one['verdict']}"
        for one in claim["sub_claims"]
    ]
    return f"Intervals of the sub-claims beside their bounds. {'; '.join(parts)}."


def white_figure(height: float) -> "Figure":
    """Returns an empty figure of the width of all pictures, readable in dark mode."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), facecolor="white")


def save_svg(figure: "Figure", path: Path, description: str = "") -> None:
    """Writes a figure so that the same content gives the same file."""
    import matplotlib

    metadata = {"Date": None, **({"Description": description} if description else {})}
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata=metadata)
