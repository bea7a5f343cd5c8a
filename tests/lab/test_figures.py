"""What the notebooks and the documentation draw with."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from bn_jax.lab.figures import legend_below, quantile_band, ticks_at


def panels(number):
    figure = Figure(layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, number))


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_the_style_is_found_by_the_name_of_the_module():
    with plt.style.context("bn_jax.lab.figures"):
        assert plt.rcParams["figure.constrained_layout.use"]
        assert not plt.rcParams["legend.frameon"]


def test_a_quantile_band_holds_the_middle_share_of_the_values():
    _, (axes,) = panels(1)
    runs = np.arange(101.0) + np.array([[0], [10], [20]])
    quantile_band(axes, [1, 2, 3], runs, "values", share=0.8)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [50, 60, 70])
    corners = axes.collections[0].get_paths()[0].vertices
    of_first = corners[corners[:, 0] == 1, 1]
    np.testing.assert_allclose((of_first.min(), of_first.max()), (10, 90))


@pytest.mark.parametrize("share", [0, 1, 95])
def test_a_quantile_band_needs_a_share(share):
    _, (axes,) = panels(1)
    with pytest.raises(ValueError, match=f"share={share} must be between 0 and 1"):
        quantile_band(axes, [1], [[1.0, 2.0]], "values", share=share)


def test_a_legend_below_axes_is_below_their_data_and_labels():
    figure, (axes,) = panels(1)
    axes.plot([0, 1], [0, 1], label="a line")
    axes.set(xlabel="a quantity")
    legend_below(axes)
    figure.draw_without_rendering()
    top = axes.get_legend().get_window_extent().y1
    assert top <= axes.xaxis.get_tightbbox().y0
    assert texts(axes.get_legend()) == ["a line"]
    # The layout has made space for it.
    assert axes.get_legend().get_window_extent().y0 >= 0


def test_a_legend_below_a_figure_names_a_label_of_several_axes_once():
    figure, axes = panels(2)
    for panel in axes:
        panel.plot([0, 1], [0, 1], label="both")
    axes[1].plot([0, 1], [1, 0], label="one")
    legend_below(figure)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert texts(legend) == ["both", "one"]
    bottom = min(panel.get_tightbbox().y0 for panel in axes)
    assert 0 <= legend.get_window_extent().y0 < legend.get_window_extent().y1 <= bottom


@pytest.mark.parametrize("of_figure", [True, False])
def test_a_legend_of_nothing_is_an_error(of_figure):
    figure, (axes,) = panels(1)
    with pytest.raises(ValueError, match="draw something with a label"):
        legend_below(figure if of_figure else axes)


@pytest.mark.parametrize("along", ["x", "y"])
def test_ticks_are_at_the_values_alone(along):
    _, (axes,) = panels(1)
    axes.plot([4, 64], [4, 64])
    ticks_at(axes, [4, 16, 64], along=along)
    axis = axes.xaxis if along == "x" else axes.yaxis
    assert axis.get_scale() == "log"
    assert [text.get_text() for text in axis.get_ticklabels()] == ["4", "16", "64"]
    assert len(axis.get_ticklocs(minor=True)) == 0
