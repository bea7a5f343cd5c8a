"""A Sphinx extension that draws the pictures of the page on performance from its figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import claims
import numpy as np
from claim_pictures import save_svg, white_figure

if TYPE_CHECKING:
    from sphinx.application import Sphinx

RESULTS = claims.RESULTS.parent
OURS, FLAX = "bn_jax.linen", "flax.linen"
# Whoever is drawn, with marker and line; equal errors lie on top of each other.
CONTESTANTS = {
    "flax.linen": ("s", "-"),
    "flax.nnx": ("x", ":"),
    "haiku": ("^", "--"),
    "flax.linen two-pass": ("v", "-"),
    "bn_jax": ("o", "-"),
}
DIRECTIONS = {"forward": "C3", "forward + backward": "C0"}


def write_pictures(folder: Path) -> None:
    """Draws the pictures, unless they are there and were drawn from the same figures."""
    pictures = {
        "performance_accuracy.svg": ("numerics", save_accuracy),
        "performance_layers.svg": ("layer", save_layers),
    }
    for file, (benchmark, draw) in pictures.items():
        figures = json.loads((RESULTS / f"{benchmark}.json").read_text())
        claims.draw_once(folder / file, figures, draw, Path(__file__))


def save_accuracy(figures: Mapping[str, Any], path: Path) -> None:
    """Draws the error of the output by the offset of the input.

    Args:
        figures: the content of ``numerics.json``.
        path: the path of the SVG file to write.
    """
    by_offset = {
        float(name.removeprefix("offset ")): row
        for name, row in figures["rows"].items()
        if name.startswith("offset ") and "," not in name
    }
    offsets = sorted(offset for offset in by_offset if offset >= 0)
    figure = white_figure(3.3)
    axes = figure.add_axes((0.14, 0.14, 0.82, 0.7))
    for name, (marker, line) in CONTESTANTS.items():
        errors = [by_offset[offset].get(name, {}).get("output") for offset in offsets]
        values = [np.nan if error is None else float(error) for error in errors]
        axes.plot(offsets, values, line, marker=marker, markersize=4, label=name)
    axes.axhline(figures["bound"]["output"], color="gray", linewidth=0.8, linestyle="--")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(-0.2, 2 * offsets[-1])
    axes.set_yscale("log")
    axes.set_xlabel("offset of the input, in standard deviations", fontsize=8)
    axes.set_ylabel("largest error of the output", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="upper center", ncols=3, fontsize=7, frameon=False)
    save_svg(figure, path)


def save_layers(figures: Mapping[str, Any], path: Path) -> None:
    """Draws our time over Flax's, a dot for each shape.

    Args:
        figures: the content of ``layer.json``.
        path: the path of the SVG file to write.
    """
    cases = [(norm, dtype) for norm, by_dtype in figures["norms"].items() for dtype in by_dtype]
    figure = white_figure(0.9 + 0.42 * len(cases))
    axes = figure.add_axes((0.33, 0.16, 0.63, 0.72))
    for place, (norm, dtype) in enumerate(cases):
        for side, (direction, color) in enumerate(DIRECTIONS.items()):
            arms = [one[direction] for one in figures["norms"][norm][dtype].values()]
            ratios = [one[OURS]["quartiles"][1] / one[FLAX]["quartiles"][1] for one in arms]
            height = place + (-0.17 if side == 0 else 0.17)
            axes.plot(ratios, [height] * len(ratios), "o", color=color, alpha=0.5, markersize=4)
            mean = float(np.exp(np.mean(np.log(ratios))))
            label = direction if place == 0 else None
            axes.plot(mean, height, "|", color=color, markersize=11, label=label)
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(cases)), [f"{norm}, {dtype}" for norm, dtype in cases], fontsize=7)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("time of bn_jax / time of Flax; left of the line: bn_jax is faster", fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="upper center", ncols=2, fontsize=7, frameon=False)
    save_svg(figure, path)


def _write(app: "Sphinx") -> None:
    write_pictures(Path(app.srcdir))
    app.add_css_file("figures.css")


def setup(app: "Sphinx") -> dict[str, Any]:
    """Adds the extension to Sphinx."""
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
