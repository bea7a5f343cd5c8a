"""The figures of the folded networks are those of the programs that they were read from."""

from functools import partial

import numpy as np
import pytest

from benchmarks import report
from benchmarks.inference import (
    FLAX,
    FOLDED,
    NETWORKS,
    UNFOLDED,
    WITHOUT,
    Network,
    load,
    make_table,
    measure,
)
from bn_jax.lab.models import ResNet

SMALL = Network(partial(ResNet, 3, (1, 1), (4, 6)), (2, 8, 8, 3))


@pytest.mark.parametrize("source", ["measured now", "committed"])
def test_a_folded_network_is_a_network_without_norms(source):
    advanced: list[int] = []
    found = (
        {"small": measure(SMALL, 3, partial(advanced.append, 1))}
        if source == "measured now"
        else load(report.read("inference"))
    )
    assert source == "committed" or len(advanced) == 3
    assert source == "measured now" or set(found) == set(NETWORKS)
    for name, arms in found.items():
        assert list(arms) == [WITHOUT, FOLDED, UNFOLDED, FLAX]
        without, folded, unfolded, flax = arms.values()
        for quantity in ("operations", "flops", "accessed", "roots"):
            one, other = getattr(folded, quantity), getattr(without, quantity)
            assert one == other < min(getattr(arm, quantity) for arm in (unfolded, flax))
        assert folded.roots == 0
        assert max(arm.error for arm in arms.values()) < 1e-5
        assert all(
            np.all(np.diff(arm.timing.quartiles) >= 0) and arm.timing.quartiles[0] > 0
            for arm in arms.values()
        )
        assert make_table(name, arms).row_count == 4
