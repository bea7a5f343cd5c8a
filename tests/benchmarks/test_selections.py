"""The ways to sum what is selected, and what of them is committed."""

import operator

import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, exact, standard_normal

from benchmarks import domains, layer, report, selections
from benchmarks.compilers import H200, ROOMY_H200, V5E
from benchmarks.domains import CPU, FLAX, MASK, PASSES, PLAIN
from benchmarks.selections import DTYPES, MASKS, NUMBERS, WAYS, measure, ratios, tables, time_masks

FIGURES = report.read("selections")
PRODUCTS, EACH, IN_ONE, IN_BLOCKS, COMPLEX, OVER_AXES = WAYS


@pytest.mark.parametrize("way", WAYS)
def test_a_way_computes_the_sums_of_each_domain(way):
    x, shift = standard_normal(0, (2048, 3)), standard_normal(1, (4, 3))
    domain = np.random.default_rng(2).integers(0, 4, 2048)
    deviation = exact(x) - exact(shift)[domain]
    expected = [
        np.stack([values[domain == number].sum(0) for number in range(4)])
        for values in (deviation, deviation**2)
    ]
    found = WAYS[way](x, jnp.asarray(domain), shift)
    both = found if way == PRODUCTS else [jnp.stack(found[part::2]) for part in (0, 1)]
    assert_close(both, [jnp.asarray(one, jnp.float32) for one in expected])


def test_the_committed_figures_are_complete():
    assert list(FIGURES["ways"]) == list(DTYPES)
    for by_way in FIGURES["ways"].values():
        assert list(by_way) == list(WAYS)
        assert all(list(moved) == list(map(str, NUMBERS)) for moved in by_way.values())
    cases = [f"{dtype}, {layer.named(s)}" for dtype in layer.TOLERANCES for s in layer.SHAPES]
    assert list(FIGURES["masks"]) == cases
    assert [table.row_count for table in tables(FIGURES)] == [len(DTYPES) * len(WAYS), len(cases)]


def test_what_the_notes_say_of_the_ways():
    cpu, h200, roomy, v5e = (FIGURES["ways"][chip] for chip in (CPU, H200, ROOMY_H200, V5E))
    # Only sums of several arrays are fused with selections on a CPU.
    assert cpu[EACH]["1"] > 3.9 and cpu[IN_BLOCKS]["1"] < 1.3 and cpu[COMPLEX]["1"] < 2.3
    # On an H200 each domain reads x once, but for the shared memory of a kernel.
    for number in NUMBERS[:-1]:
        assert abs(h200[EACH][str(number)] - number) < 0.1
        assert roomy[EACH][str(number)] < 1.1
    assert h200[IN_ONE]["16"] is None and h200[OVER_AXES]["16"] < 1.2
    # A TPU reads x once for up to nine domains.
    assert v5e[EACH]["4"] < 1.1 < 1.9 < v5e[EACH]["16"] < 2.1


@pytest.mark.parametrize("case", FIGURES["masks"])
def test_a_mask_takes_no_longer_than_with_flax(case):
    assert all(map(operator.le, ratios(FIGURES["masks"][case], MASK),
                   ratios(FIGURES["masks"][case], domains.FLAX_MASK)))  # fmt: skip


def test_a_way_compiles_as_committed():
    for way in (EACH, IN_BLOCKS):
        found = measure(CPU, WAYS[way], 2)
        assert abs(found - FIGURES["ways"][CPU][way]["2"]) < 0.05


def test_masks_are_timed():
    timings = time_masks((64, 3), "bfloat16", rounds=2)
    assert list(timings) == [f"{case}, {passes}" for case in MASKS for passes in PASSES]
    loaded = {name: timing._asdict() for name, timing in timings.items()}
    assert ratios(loaded, FLAX) == [1, 1]
    assert all(ratio > 0 for ratio in ratios(loaded, PLAIN))
    assert selections.tables({"masks": {"a case": loaded}, "ways": {}})[1].row_count == 1
