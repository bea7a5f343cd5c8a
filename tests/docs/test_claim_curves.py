"""Each claim's page has the claim's own picture, and it shows the committed curves."""

import copy
import functools
import itertools
import re
from pathlib import Path

import claim_curves
import claim_pages
import claims
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer

from bn_jax.lab.experiments import EXPERIMENTS

FIGURES = claims.read_figures()
CURVES = claims.read_curves()
SEEDS = len(FIGURES["seeds"])


class Read(dict):
    """A dictionary that knows which of its keys were read, as a tree of the same kind."""

    def __init__(self, content):
        super().__init__(
            {key: Read(one) if isinstance(one, dict) else one for key, one in content.items()}
        )
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def items(self):
        self.read |= {*self}
        return super().items()

    def values(self):
        self.read |= {*self}
        return super().values()

    def unread(self):
        below = ((key, one.unread()) for key, one in super().items() if isinstance(one, Read))
        return [*({*self} - self.read), *(f"{key}/{one}" for key, ones in below for one in ones)]


@functools.cache
def picture(name):
    """Returns the picture of a claim, and the curves from which it was drawn."""
    curves = Read(CURVES[name])
    return claim_curves.draw(name, curves), curves


def drawn(figure):
    """Returns all numbers of the lines, bars and images of a figure."""
    parts = [np.zeros(0)]
    for axes in figure.axes:
        parts += [np.ravel(line.get_data()) for line in axes.get_lines()]
        parts += [np.ravel(image.get_array()) for image in axes.images]
        bars = [one for one in axes.containers if isinstance(one, BarContainer)]
        parts += [np.array([bar.get_height() for bar in one]) for one in bars]
    return np.unique(np.concatenate([np.asarray(part, np.float64) for part in parts]))


def series_of(curves, path=""):
    """Yields all series of curves that have a value for every seed, with their paths."""
    for key, one in curves.items():
        where = f"{path}/{key}"
        if isinstance(one, dict):
            yield from series_of(one, where)
        elif not _has_text(one):
            values = np.asarray(one, np.float64)
            if values.ndim and values.shape[-1] == SEEDS:
                yield where, values


def _has_text(value):
    return isinstance(value, str) or (isinstance(value, list) and any(map(_has_text, value)))


def ways_to_draw(values):
    """Yields what a picture may show of a series: means or medians, in percent, as logarithms."""
    with np.errstate(all="ignore"):
        for scaled in (values, 100 * values, np.log10(values)):
            finite = np.isfinite(scaled).all(-1)
            yield scaled[finite].mean(-1).ravel()
            yield np.median(scaled, -1).ravel()
            yield np.nanmedian(scaled, -1).ravel()


def are_in(found, values):
    """Returns whether all finite values are among those found."""
    values = values[np.isfinite(values)]
    return values.size > 0 and all(np.isclose(found, value, rtol=1e-6).any() for value in values)


def hidden(curves, figure):
    """Returns the paths of the series that a figure does not show by themselves."""
    found = drawn(figure)
    return {
        where
        for where, values in series_of(curves)
        if not any(are_in(found, way) for way in ways_to_draw(values))
    }


# What a result has without drawing it.
UNREAD = {"batch_noise": ["random/gap"], "ghost_batches": ["small/validation"]}
# What is drawn, but not as a mean or median of the series alone.
COMBINED = {
    # Differences of the two modes, or from the largest ghosts.
    "batch_leakage": r"/accuracy/.*/(train|validation),.*",
    "ghost_batches": r"/(test|loss|small/.*)",
    # As many iterations as seeds.
    "whitening": r"/iterations",
    # Not below the smallest number that is drawn, and not above the largest.
    "decoupling": r"/distance/10/.*",
    "large_rates": r"/activations/no norm",
    # One of two curves of the same kind.
    "batch_noise": r"/random/gap",
}


def test_every_claim_has_its_curves():
    assert list(CURVES) == list(FIGURES["claims"]) == list(EXPERIMENTS)
    assert claims.CURVES.stat().st_size < 1e6


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_picture_of_a_claim_shows_the_committed_curves(name):
    figure, curves = picture(name)
    assert curves.unread() == UNREAD.get(name, [])
    unseen = hidden(CURVES[name], figure)
    assert len(unseen) < len(dict(series_of(CURVES[name]))) or name == "ghost_batches"
    assert all(re.fullmatch(COMBINED.get(name, ""), where) for where in unseen), unseen


def test_differences_are_those_of_the_committed_curves():
    of_ghosts = {key: np.asarray(CURVES["ghost_batches"][key]) for key in ("test", "loss")}
    found = drawn(picture("ghost_batches")[0])
    for key, values in of_ghosts.items():
        small = np.asarray(CURVES["ghost_batches"]["small"][key])
        assert are_in(found, (values - values[-1]).mean(-1))
        assert are_in(found, (small - values[-1]).mean(keepdims=True))
    found = drawn(picture("batch_leakage")[0])
    for runs in CURVES["batch_leakage"]["accuracy"].values():
        modes = (np.asarray(runs[f"train, {mode} mode"]) for mode in ("training", "evaluation"))
        training, evaluation = modes
        assert are_in(found, (training - evaluation).mean(keepdims=True))


def test_a_curve_that_is_missing_or_other_is_noticed():
    less = copy.deepcopy(CURVES["scale_invariance"])
    arm = next(iter(less["accuracy"]))
    del less["accuracy"][arm]
    figure = claim_curves.draw("scale_invariance", less)
    assert hidden(CURVES["scale_invariance"], figure) == {f"/accuracy/{arm}"}
    other = copy.deepcopy(CURVES["scale_invariance"])
    other["ratio"][3][0] *= 1.01
    figure = claim_curves.draw("scale_invariance", other)
    assert hidden(CURVES["scale_invariance"], figure) == {"/ratio"}
    del less["ratio"]
    with pytest.raises(KeyError, match="ratio"):
        claim_curves.draw("scale_invariance", less)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_text_alternative_names_all_that_is_drawn(name):
    claim = FIGURES["claims"][name]
    figure, _ = picture(name)
    described = claim_curves.describe(claim, figure)
    assert described.startswith(f"Curves of the claim: {claim['claim']}, in ")
    panels = claim_curves.panels_of(figure)
    assert described.count("Panel ") == len(panels)
    plain = re.sub(r"[^a-z0-9]", "", described.lower())
    for axes in panels:
        _, labels = axes.get_legend_handles_labels()
        named = labels if axes.get_legend() else []
        for label in (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(), *named):
            assert re.sub(r"[^a-z0-9]", "", label.lower()) in plain
        ticks = [tick.get_text() for tick in axes.get_yticklabels()]
        names = [tick for tick in ticks if re.match(r"[a-z]", tick, re.IGNORECASE)]
        assert all(re.sub(r"[^a-z0-9]", "", tick.lower()) in plain for tick in names)
    assert not re.search(r"[$\\{}\n]", described)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_legends_and_labels_of_ticks_cover_nothing(name):
    figure, _ = picture(name)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    panels = [axes.get_window_extent() for axes in claim_curves.panels_of(figure)]
    for axes in claim_curves.panels_of(figure):
        legend = axes.get_legend()
        if legend is not None:
            box = legend.get_window_extent(renderer)
            # One pixel for rounding.
            assert not any(box.padded(-1).overlaps(panel) for panel in panels)
            assert figure.bbox.padded(1).containsx(box.x1)
            assert figure.bbox.padded(1).containsy(box.y1)
        ticks = [tick for tick in axes.get_xticklabels() if tick.get_text()]
        ticks = [tick for tick in ticks if not tick.get_rotation()]
        boxes = [tick.get_window_extent(renderer) for tick in ticks]
        for left, right in itertools.pairwise(boxes):
            assert left.x1 < right.x0 or right.x1 < left.x0, axes.get_xlabel()
        # A map of an image has no ticks; else no panel relies on the labels of another one.
        if len(axes.get_yticks()):
            assert any(tick.get_text() for tick in axes.get_yticklabels()), axes.get_xlabel()


def test_a_page_shows_the_curves_before_the_intervals(tmp_path):
    name = "step_two"
    claim = FIGURES["claims"][name]
    path = tmp_path / claim_pages.curves_file(name)
    content = {"name": name, "claim": claim["claim"], "curves": CURVES[name]}
    for _ in range(2):
        claims.draw_once(path, content, claim_curves.save_curves, *claim_curves.code_of(name))
    described = claim_curves.read_description(path)
    assert described == claim_curves.describe(claim, claim_curves.draw(name, CURVES[name]))
    assert "|tanh| > 0.95" in described
    page = claim_pages.claim_page(name, FIGURES, [], {}, described)
    pictures = re.findall(r"```\{figure\} (\S+)\n:alt: \"(.*)\"\n", page)
    assert [file for file, _ in pictures] == [f"{name}_curves.svg", f"{name}.svg"]
    assert pictures[0][1] == described


def test_a_picture_is_drawn_again_where_its_experiment_changed(tmp_path):
    drawn_times = []

    def draw(content, path):
        drawn_times.append(content)
        path.write_text("<svg/>\n")

    code = tmp_path / "experiment.py"
    for text in ("first", "first", "second"):
        code.write_text(text)
        claims.draw_once(tmp_path / "a.svg", {}, draw, Path(claim_curves.__file__), code)
    assert len(drawn_times) == 2
    names = {path.name for path in claim_curves.code_of("step_two")}
    assert {"step_two.py", "claim_curves.py", "figures.py"} <= names
