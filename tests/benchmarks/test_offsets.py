import pytest

from benchmarks import report
from benchmarks.offsets import OFFSETS, error, tables

BOUND = 1e-5


@pytest.mark.parametrize("offset", [1.0, 1e4])
def test_ours_is_within_the_bound(offset):
    assert error("bn_jax", offset) < BOUND


def test_what_cancels_is_measured_as_wrong():
    assert error("Flax", 1.0) < BOUND
    assert error("Flax", 1e4) > 1


def test_the_committed_figures_are_those_that_the_page_describes():
    known = report.read("offsets")
    assert known["offsets"] == list(OFFSETS)
    of = known["errors"]
    assert list(of) == ["bn_jax", "Flax", "Haiku", "PyTorch"]
    assert max(of["bn_jax"]) < 1e-6
    before = OFFSETS.index(1e4)
    for name in ("Flax", "Haiku"):
        assert max(of[name][:before]) > 1
        assert of[name][before] > 1
    ours, pytorch, flax = (of[name][before:] for name in ("bn_jax", "PyTorch", "Flax"))
    for least, between, most in zip(ours, pytorch, flax, strict=True):
        assert least < between < most


def test_the_table_has_every_offset():
    (table,) = tables(report.read("offsets"))
    assert table.row_count == len(OFFSETS)
