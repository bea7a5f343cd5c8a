"""Intervals, verdicts and the number of seeds, against scipy and simulation."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from bn_jax.lab.experiments import forest, statistics, verdicts
from bn_jax.lab.experiments.statistics import Interval
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    Finding,
    Identity,
    NotTestable,
    SubClaim,
    Verdict,
    Within,
    find,
    judge,
)

EXACT, REPRODUCED = Verdict.EXACT, Verdict.REPRODUCED
DIRECTION, NOT = Verdict.DIRECTION_ONLY, Verdict.NOT_REPRODUCED
INCONCLUSIVE, NOTHING = Verdict.INCONCLUSIVE, Verdict.NO_MEASUREMENT


def values_with(estimate, half, confidence=0.95, seeds=16):
    """Returns values whose interval is from `estimate - half` to `estimate + half`."""
    values = np.random.default_rng(0).normal(size=seeds)
    values = (values - values.mean()) / values.std(ddof=1)
    error = half / stats.t.ppf((1 + confidence) / 2, seeds - 1) * math.sqrt(seeds)
    return estimate + error * values


def test_intervals_cover_the_truth_as_often_as_they_say():
    values = np.random.default_rng(0).normal(3, 2, (2000, 5))
    found = [statistics.mean_interval(one) for one in values]
    covered = np.mean([one.low <= 3 <= one.high for one in found])
    assert abs(covered - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 2000)
    expected = stats.t.interval(0.95, 4, values[0].mean(), stats.sem(values[0]))
    np.testing.assert_allclose(found[0][1:], expected)
    narrow = stats.t.interval(0.9, 4, values[0].mean(), stats.sem(values[0]))
    np.testing.assert_allclose(statistics.mean_interval(values[0], 0.9)[1:], narrow)
    ratio = statistics.ratio_interval(np.exp(values[0]))
    np.testing.assert_allclose(np.log(ratio), found[0])


def test_intervals_corrected_for_overlap_cover_the_truth_where_plain_ones_do_not():
    # Splits of one data set: what two splits share is the correlation tested / (tested + trained).
    tested, trained, seeds = 1, 3, 10
    generator = np.random.default_rng(0)
    shared = generator.normal(size=(1500, 1)) * math.sqrt(tested / (tested + trained))
    own = generator.normal(size=(1500, seeds)) * math.sqrt(trained / (tested + trained))
    corrected = [statistics.corrected_interval(one, tested, trained) for one in shared + own]
    plain = [statistics.mean_interval(one) for one in shared + own]
    covered = np.mean([one.low <= 0 <= one.high for one in corrected])
    assert abs(covered - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 1500)
    assert np.mean([one.low <= 0 <= one.high for one in plain]) < 0.75


@pytest.mark.parametrize("distance", [0.5, 1.5])
def test_so_many_seeds_decide_in_four_of_five_repetitions(distance):
    needed = statistics.seeds_needed(values_with(0, 1), distance) or 0
    deviation = values_with(0, 1).std(ddof=1)
    generator = np.random.default_rng(1)

    def share_that_decides(seeds):
        values = generator.normal(distance, deviation, (4000, seeds))
        result = stats.ttest_1samp(values, 0, axis=1)
        return np.mean((result.pvalue < 0.05) & (result.statistic > 0))

    assert share_that_decides(needed) > 0.8 - 0.02
    assert share_that_decides(needed - 1) < 0.8 + 0.02


def test_what_hardly_differs_from_a_bound_needs_more_seeds_than_anyone_runs():
    assert statistics.seeds_needed(values_with(0, 1), 1e-4) is None
    assert statistics.seeds_needed(values_with(0, 1), 0.0) is None
    assert statistics.seeds_needed([1.0, 1.0], 0.5) == 2
    assert statistics.seeds_needed(values_with(0, 1e-6), 1.0) == 2


@pytest.mark.parametrize(
    ("bound", "estimate", "half", "verdict"),
    [
        # The direction is all that is published.
        (Above(0.0), 1.0, 0.9, REPRODUCED),
        (Above(0.0), 1.0, 1.1, INCONCLUSIVE),
        (Above(0.0), -1.0, 0.9, NOT),
        (Below(0.0), -1.0, 0.9, REPRODUCED),
        (Below(0.0), 1.0, 0.9, NOT),
        # A size is published: 2.
        (Above(0.0, size=2.0), 3.0, 0.9, REPRODUCED),
        (Above(0.0, size=2.0), 2.0, 0.9, DIRECTION),
        (Above(0.0, size=2.0), 1.0, 0.9, DIRECTION),
        (Above(0.0, size=2.0), 1.0, 1.1, INCONCLUSIVE),
        (Below(0.0, size=-2.0), -3.0, 0.9, REPRODUCED),
        (Below(0.0, size=-2.0), -1.0, 0.9, DIRECTION),
        # Less than 0.5 would not matter, on either side of 0.
        (Above(0.0, matters=0.5), 0.2, 0.1, NOT),
        (Above(0.0, matters=0.5), 0.4, 0.2, REPRODUCED),
        (Above(0.0, matters=0.5), 0.3, 0.4, INCONCLUSIVE),
        (Below(0.0, matters=-0.5), -0.2, 0.25, NOT),
        (Identity(1e-3), 5e-4, 1e-4, EXACT),
        (Identity(1e-3), 2e-3, 1e-4, NOT),
        (Above(0.0), math.nan, 1.0, NOTHING),
        (Within(-1.0, 1.0), math.inf, 1.0, NOTHING),
        (NotTestable("too small"), 0.0, 1.0, Verdict.NOT_TESTABLE),
    ],
)
def test_a_bound_decides_on_its_own_side(bound, estimate, half, verdict):
    judged = judge(bound, values_with(estimate, half))
    assert judged.verdict == verdict
    if verdict == INCONCLUSIVE:
        assert judged.seeds_needed is not None and judged.seeds_needed > 16


@pytest.mark.parametrize(
    ("estimate", "half", "verdict"),
    [
        (0.0, 0.9, REPRODUCED),
        (0.5, 0.4, REPRODUCED),
        (0.5, 0.6, INCONCLUSIVE),
        (1.5, 0.6, INCONCLUSIVE),
        (1.5, 0.4, NOT),
        (-1.5, 0.4, NOT),
    ],
)
def test_an_equivalence_is_two_one_sided_tests(estimate, half, verdict):
    values = values_with(estimate, half, confidence=0.9)
    assert judge(Within(-1.0, 1.0), values).verdict == verdict
    above = stats.ttest_1samp(values, -1.0, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 1.0, alternative="less").pvalue
    assert (max(above, below) < 0.05) == (verdict == REPRODUCED)


def test_ratios_are_judged_by_their_logarithms():
    values = np.exp(values_with(math.log(2), math.log(1.9)))
    judged = judge(Above(1.0), values, "ratio")
    assert judged.verdict == REPRODUCED
    np.testing.assert_allclose(judged.measured, [2, 2 / 1.9, 2 * 1.9])
    assert judge(Above(1.0), [0.0, 1.0, 2.0], "ratio").verdict == NOTHING


def test_values_that_are_equal_and_equal_to_the_bound():
    assert judge(Above(0.0), [0.0] * 4).verdict == NOT
    assert judge(Above(0.0, size=1.0), [1.0] * 4).verdict == REPRODUCED
    assert judge(Within(0.0, 0.0), [0.0] * 4).verdict == REPRODUCED


def claim(bound=None, **options):
    return SubClaim("1a", "label", "statement", "quantity", bound or Above(0.0), **options)


def test_a_sub_claim_holds_in_all_of_its_settings_or_not():
    good, unclear, bad = values_with(1, 0.5), values_with(0.5, 1), values_with(-1, 0.5)
    assert find(claim(), {"a": good, "b": good}).verdict == REPRODUCED
    found = find(claim(), {"a": good, "b": unclear})
    assert found.verdict == INCONCLUSIVE and found.decisive[0] == "b"
    assert find(claim(), {"a": good, "b": unclear, "c": bad}).decisive[0] == "c"
    assert find(claim(), good).decisive[0] == ""
    assert find(claim(NotTestable("why")), None).verdict == Verdict.NOT_TESTABLE


def test_blocks_of_eight_seeds_are_judged_alone():
    good, bad = values_with(1, 0.5, seeds=8), values_with(-1, 0.5, seeds=8)
    assert find(claim(), good).blocks == []
    same, apart = find(claim(), np.tile(good, 2)), find(claim(), np.concatenate([good, bad]))
    assert same.blocks == [REPRODUCED, REPRODUCED] and same.agree
    assert apart.blocks == [REPRODUCED, NOT] and not apart.agree
    assert len(find(claim(), np.tile(good, 3)[:20]).blocks) == 2
    either = Finding(claim(), {}, {}, [REPRODUCED, INCONCLUSIVE])
    assert either.agree and Finding(claim(), {}, {}, [NOT, INCONCLUSIVE]).agree


@pytest.mark.parametrize(
    ("bound", "scale", "interval", "expected", "reproduced"),
    [
        (Above(1.0, size=3.0), "difference", (2, 1, 5), (0.5, 0, 2), (1, 4)),
        (Below(1.0, size=-1.0), "difference", (0, -2, 1), (0.5, 0, 1.5), (1, 4)),
        (Above(0.0), "difference", (1, -1, 2), (1, -1, 2), (0, 4)),
        (Above(1.0, size=100.0), "ratio", (10, 1, 1e9), (0.5, 0, 4), (1, 4)),
        (Within(2.0, 4.0), "difference", (3.5, 3, 5), (0.5, 0, 2), (-1, 1)),
        (Within(0.5, 2.0), "ratio", (1, 0.25, 2), (0, -2, 1), (-1, 1)),
        (Identity(2.0), "difference", (1, 1, 1), (0.5, 0.5, 0.5), (-1, 1)),
    ],
)
def test_rows_of_the_forest_have_the_claimed_side_on_the_right(
    bound, scale, interval, expected, reproduced
):
    bound = {"kind": type(bound).__name__.lower()} | bound._asdict()
    measured = Interval(*map(float, interval))._asdict()
    row = forest.scale(
        {
            "scale": scale,
            "bound": json.loads(json.dumps(bound)),
            "settings": {"": {"measured": measured}},
            "decisive": "",
        }
    )
    assert row is not None
    np.testing.assert_allclose(row.interval, expected, atol=1e-12)
    assert row.reproduced == reproduced


def test_how_many_seeds_is_said_where_it_would_help():
    def text(verdict, needed):
        return verdicts.describe_seeds(verdicts.Judged(verdict, Interval(0, 0, 0), needed))

    assert text(INCONCLUSIVE, 30) == "about 30"
    assert text(INCONCLUSIVE, None) == "more than 1,000"
    assert text(DIRECTION, 30) == "about 30" and text(DIRECTION, None) == ""
    assert text(REPRODUCED, None) == text(NOT, None) == ""
