"""The picture of a recalibration."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from support import quick
from test_audit_output import assert_readable, labels_of, segments

from bn_jax._recalibrate import LayerChange, Recalibration

pytest.importorskip("matplotlib")


def test_the_picture_holds_the_changes():
    layers = (
        LayerChange("first", 0.5, 3.0, 100.0, 0, 0.0, 0),
        LayerChange("kept", 0.0, 1.0, 0.0, 4, 0.0, 0),
        LayerChange("healed", math.inf, math.inf, 100.0, 2, 50.0, 1),
        LayerChange("", 0.25, 1.5, 50.0, 0, 50.0, 1),
    )
    figure: Any = Recalibration({}, layers, 2, False, 3).plot()
    title = (
        "Recalibration of 4 batch norms over 3 batches, not settled: largest change of a feature"
    )
    assert figure.get_suptitle() == title
    means, variances = figure.axes
    assert labels_of(means) == ["first", "kept", "healed", "the top level"]
    lines, points, infinite = means.collections
    assert segments(lines) == [[0, 0.5], [0, 0.25]]
    assert points.get_offsets().tolist() == [[0.5, 0], [0.25, 3]]
    assert segments(infinite) == [[0, means.get_xlim()[1]]]
    lines, points, _ = variances.collections
    assert segments(lines) == [[1, 3], [1, 1.5]]
    assert points.get_offsets().tolist() == [[3, 0], [1.5, 3]]
    assert [text.get_text() for text in means.texts] == [
        "measured nothing, keeps its statistics",
        "infinite: the old value was 0 or not finite",
    ]
    assert [text.get_text() for text in variances.texts[2:]] == [
        "1 of 3 batches left out, 2 features kept",
        "1 of 3 batches left out",
    ]


SIZES = list(itertools.product([1, 100], [1e-4, 1.0, 1e2, 1e5]))


@pytest.mark.parametrize(("norms", "scale"), quick(SIZES, [(1, 1e-4)]))
def test_the_picture_is_readable(norms, scale):
    changes = scale * np.linspace(1, 2, norms)
    layers = tuple(
        LayerChange(f"stage{number}/block/norm", change, 1 + change, 9.0, 1, 0.0, 0)
        for number, change in enumerate(changes)
    )
    assert_readable(Recalibration({}, layers, 1, True, 1).plot())
