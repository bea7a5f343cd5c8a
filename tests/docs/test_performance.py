"""The pictures of the page on performance show every committed figure that they are about."""

import json
import re
from pathlib import Path

import performance

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/performance.md").read_text()


def figures_of(name):
    return json.loads((performance.RESULTS / f"{name}.json").read_text())


class Drawn:
    """Keeps the figure that would be written."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(performance, "save_svg", self.keep)

    def keep(self, figure, path):
        (axes,) = figure.axes
        self.labels = [text.get_text() for text in figure.legends[0].get_texts()]
        self.lines = axes.get_lines()


def test_a_line_for_every_library_has_the_measured_errors(monkeypatch, tmp_path):
    figures, drawn = figures_of("numerics"), Drawn(monkeypatch)
    performance.save_accuracy(figures, tmp_path / "a.svg")
    contestants = {name for row in figures["rows"].values() for name in row}
    assert set(drawn.labels) == contestants
    lines = {line.get_label(): line for line in drawn.lines}
    for name in contestants:
        for offset, error in zip(*lines[name].get_data(), strict=True):
            row = "offset 1e6" if offset == 1e6 else f"offset {offset:.0f}"
            known = float(figures["rows"][row][name]["output"])
            assert error == known or (error != error and known != known)
    assert list(lines["bn_jax"].get_xdata()) == [0, 100, 1000, 10000, 100000, 1e6]


def test_a_dot_for_every_shape_is_our_time_over_that_of_flax(monkeypatch, tmp_path):
    figures, drawn = figures_of("layer"), Drawn(monkeypatch)
    performance.save_layers(figures, tmp_path / "l.svg")
    expected = [
        one["bn_jax.linen"]["quartiles"][1] / one["flax.linen"]["quartiles"][1]
        for by_dtype in figures["norms"].values()
        for by_shape in by_dtype.values()
        for by_direction in by_shape.values()
        for one in by_direction.values()
    ]
    dots = [x for line in drawn.lines if line.get_marker() == "o" for x in line.get_xdata()]
    assert sorted(dots) == sorted(expected)
    assert drawn.labels == ["forward", "forward + backward"]


def test_the_page_shows_the_pictures_and_says_what_they_show(tmp_path):
    performance.write_pictures(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    shown = re.findall(r"```\{image\} (\S+)\n:alt: \"(.+)\"", PAGE)
    assert {name for name, _ in shown} == names
    assert all(len(alternative) > 100 for _, alternative in shown)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    performance.write_pictures(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


# What needs no explanation: what is measured, and numbers of chips.
PLAIN = {"norm", "dtype", "direction", "chip", "program", "case", "1", "4", "16", "64", "256"}


def test_every_column_of_a_table_is_explained():
    """In the prose of its section."""
    explained = set()
    for part in re.split(r"\n## ", PAGE)[1:]:
        prose = re.sub(r"<!-- \w+(?: \d)? -->.*?<!-- end -->", "", part, flags=re.DOTALL).lower()
        for header in re.findall(r"\n\| (.*) \|\n\| :---", part):
            for column in header.split(" | ")[1:]:
                name = re.sub(r"(,? ?\b(ms|s|MB|GB))?( ?\(quartiles\))?$", "", column)
                assert name in PLAIN or name.lower() in prose, (part.split("\n")[0], column)
                explained.add(name)
    assert len(explained - PLAIN) > 25
