"""curves.png: what is in the picture, down to its pixels."""

import io
import itertools
import math

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from bn_jax import training
from bn_jax.lab import fitting, runs
from bn_jax.lab.files import records
from bn_jax.lab.training import curves, results

GROUPS = (5, 5, 3)


def reports(count, loss=lambda step: 2.0 / step, groups=GROUPS):
    made, step = [], 0
    for number in range(count):
        size = groups[number % len(groups)]
        step += size
        evaluation = training.Evaluation(loss(step), 1 - 1 / (step + 1), 1, 8 * size)
        made.append(fitting.Report(step, 1 + number // 3, evaluation, evaluation, 8 * step, 1.0))
    return made


def draw(given, title="a title"):
    return curves.draw_curves(given, title=title, target=0.9)


def pixels(figure):
    file = io.BytesIO()
    figure.savefig(file, dpi=150)
    file.seek(0)
    image = imread(file)[..., :3]
    # Without the legend below.
    return image[: int(0.8 * len(image))]


def lines_of(figure):
    """The lines of both panels by arm."""
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    loss, accuracy = figure.axes
    drawn = {}
    for axes in (loss, accuracy):
        lines = [line for line in axes.lines if line.get_marker() != "None"]
        drawn[axes] = dict(zip(legend, lines, strict=True))
    return drawn[loss], drawn[accuracy]


def test_a_title_the_target_and_the_averages_are_named():
    figure = draw({arm: reports(6) for arm in runs.ARMS}, title="MLP on bars.npz")
    loss, accuracy = figure.axes
    assert figure.get_suptitle() == "MLP on bars.npz"
    assert [text.get_text() for text in accuracy.texts] == ["90%"]
    assert loss.get_ylabel() == "training loss, mean of 5 steps (last of an epoch: 3)"
    assert accuracy.get_ylabel() == "validation accuracy (%)"
    assert [axes.get_xlabel() for axes in figure.axes] == ["step", "step"]
    target = [line for line in accuracy.lines if line.get_marker() == "None"]
    assert [set(line.get_ydata()) for line in target] == [{90.0}]


@pytest.mark.parametrize(
    ("groups", "count", "name"),
    [
        ((5,), 4, "mean of 5 steps"),
        ((1,), 4, "mean of 1 step"),
        ((5, 1), 4, "mean of 5 steps (last of an epoch: 1)"),
        ((5,), 3000, "mean of 50 steps"),
        ((5, 1), 3001, "mean of about 31 steps"),
    ],
)
def test_the_average_is_named_as_it_is(groups, count, name):
    figure = draw({"a": reports(count, groups=groups)})
    assert figure.axes[0].get_ylabel() == f"training loss, {name}"


def test_many_reports_are_averaged_by_their_examples():
    made = reports(1000, groups=(5, 1))
    loss, accuracy = lines_of(draw({"a": made}))
    together = math.ceil(1000 / curves.MOST_POINTS)
    assert len(loss["a"].get_xdata()) == math.ceil(1000 / together)
    first = made[:together]
    weights = [report.training.examples for report in first]
    means = np.average([report.training.loss for report in first], weights=weights)
    assert loss["a"].get_ydata()[0] == pytest.approx(means)
    accuracies = [100 * report.validation.accuracy for report in first]
    assert accuracy["a"].get_ydata()[0] == pytest.approx(np.mean(accuracies))
    assert loss["a"].get_xdata()[-1] == made[-1].step


def test_few_reports_are_drawn_as_they_are():
    made = reports(7)
    loss, accuracy = lines_of(draw({"a": made}))
    assert list(loss["a"].get_xdata()) == [report.step for report in made]
    np.testing.assert_allclose(loss["a"].get_ydata(), [r.training.loss for r in made], rtol=1e-12)
    assert list(accuracy["a"].get_ydata()) == [100 * r.validation.accuracy for r in made]


def of_color(image, color):
    """How many pixels have a color, at full strength."""
    wanted = np.array(matplotlib.colors.to_rgb(color))
    return int((np.abs(image - wanted).max(-1) < 0.1).sum())


@pytest.mark.parametrize("count", [1, 4, 1000])
def test_curves_that_coincide_are_all_seen(count):
    """Black is also the color of text: there, more pixels than without the third arm."""
    same = reports(count)
    without = pixels(draw({arm: same for arm in runs.ARMS[:2]}))
    image = pixels(draw({arm: same for arm in runs.ARMS}))
    blue, orange, black = (style["color"] for style in curves.STYLES)
    counts = [
        of_color(image, blue),
        of_color(image, orange),
        of_color(image, black) - of_color(without, black),
    ]
    assert min(counts) > (50 if count == 1 else 500), counts


def test_arms_differ_without_color():
    styles = [
        {name: style[name] for name in ("linewidth", "linestyle", "marker")}
        for style in curves.STYLES
    ]
    for name in ("linewidth", "marker"):
        assert len({style[name] for style in styles}) == len(runs.ARMS)


def test_colors_are_told_apart_by_the_color_blind():
    """By lightness alone, as in print without colors."""
    lightness = sorted(
        np.dot(matplotlib.colors.to_rgb(style["color"]), (0.2126, 0.7152, 0.0722))
        for style in curves.STYLES
    )
    assert min(np.diff(lightness)) > 0.2


def test_an_arm_that_diverged_is_named():
    made = reports(6, loss=lambda step: math.nan if step > 10 else 10.0**step)
    late = [
        report._replace(validation=report.validation._replace(loss=math.inf))
        if report.step == 26
        else report
        for report in reports(6)
    ]
    figure = draw({"a": made, "b": reports(6), "c": late})
    loss, _ = lines_of(figure)
    assert list(loss) == ["a (diverged at step 13)", "b", "c (diverged at step 26)"]
    assert np.isfinite(loss["a (diverged at step 13)"].get_ydata()).sum() == 2
    assert figure.axes[0].get_yscale() == "log"


LOSSES = {
    "positive": (lambda step: 2.0 / step, "log"),
    "huge": (lambda step: 4e18 if step > 10 else 1.0, "log"),
    "zero at the end": (lambda step: max(0.0, 10.0 - step), "linear"),
    "nearly constant": (lambda step: 2.3 + 0.001 * step, "linear"),
    "never finite": (lambda step: math.nan, "linear"),
    "infinite": (lambda step: math.inf, "linear"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_scale_suits_the_losses(name):
    loss, scale = LOSSES[name]
    for count in (1, 6):
        figure = draw({"a": reports(count, loss=loss)})
        FigureCanvasAgg(figure).draw()
        assert figure.axes[0].get_yscale() == (scale if count > 1 else "linear")


@pytest.mark.parametrize("count", [1, 2, 30, 10_000])
def test_axes_are_readable_for_any_number_of_reports(count):
    figure = draw({arm: reports(count) for arm in runs.ARMS})
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        labels = [label for label in axes.get_xticklabels() if label.get_text()]
        assert 2 <= len(labels) <= 8
        assert all(float(label.get_text().replace(",", "")).is_integer() for label in labels)
        boxes = [label.get_window_extent() for label in labels]
        assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))
        assert axes.get_xlim()[1] >= reports(count)[-1].step
    # The legend is below what is drawn.
    legend = figure.legends[0].get_window_extent()
    assert all(axes.xaxis.label.get_window_extent().y0 >= legend.y1 for axes in figure.axes)


TITLES = {
    "MLP on scikit-learn's digits, batches of 64 on 1 device": {
        "data": None, "devices": 1, "batch_size": 64, "model": "mlp",
    },
    "Small ResNet on bars.npz, batches of 8 on 2 devices": {
        "data": "some/folder/bars.npz", "devices": 2, "batch_size": 8,
    },
    "ResNet-18 on photos, batches of 8 on 4 devices": {
        "data": "photos/", "devices": 4, "batch_size": 8, "model": "resnet18",
    },
}  # fmt: skip


@pytest.mark.parametrize("title", TITLES)
def test_the_title_says_what_was_trained(title):
    config = records.Config(epochs=1, learning_rate=0.1, seed=0, **TITLES[title])
    assert results.name_training(config) == title


def test_every_model_has_a_name():
    assert set(results.MODEL_NAMES) == set(records.MODELS)
