"""What `benchmarks.step` times is a training, the same with either norm."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import report, step
from benchmarks.inference import Network
from benchmarks.startup import FLAX, NORMS, OURS
from benchmarks.step import MLP, Training, Workload

SHAPE = (8, 5)
SMALL = Workload(Network(partial(MLP, widths=(4,)), SHAPE), steps=3)
COMMITTED = report.read("step")


@pytest.mark.parametrize("dtype", step.TOLERANCES)
def test_both_norms_make_the_same_steps_and_are_timed(dtype):
    advanced: list[Any] = []
    timings = step.measure(SMALL, dtype, 2, 4, partial(advanced.append, 1))
    assert list(timings) == [OURS, FLAX] and len(advanced) == 2


def test_a_training_continues_and_computes_in_its_dtype():
    training = Training(SMALL, NORMS[OURS], "bfloat16")
    first = float(training.advance())
    last = [float(training()) for _ in range(10)][-1]
    assert int(training.state.step) == 31
    assert last < 0.9 * first
    leaves = jax.tree.leaves(training.state.params)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    text = training.step.as_text() or ""
    assert "bf16[" in text
    assert "bf16[" not in (Training(SMALL, NORMS[OURS], "float32").step.as_text() or "")


@pytest.mark.parametrize("wrong", [1.01, np.nan])
def test_norms_that_make_other_steps_are_not_compared(wrong):
    found = {OURS: [2.0, 1.0], FLAX: [2.0, 1.00001]}
    step.require_agreement(found, "float32")
    step.require_agreement({**found, OURS: [2.0, 1.01]}, "bfloat16")
    with pytest.raises(AssertionError, match=r"bn_jax and Flax differ by .* in float32"):
        step.require_agreement({**found, OURS: [2.0, wrong]}, "float32")


def test_the_committed_figures_are_complete():
    assert COMMITTED["rounds"] == step.ROUNDS and COMMITTED["warm_up"] == step.WARM_UP
    assert list(COMMITTED["steps"]) == list(step.WORKLOADS)
    for by_dtype in COMMITTED["steps"].values():
        assert list(by_dtype) == list(step.TOLERANCES)
        for by_arm in by_dtype.values():
            assert list(by_arm) == [OURS, FLAX]
            assert all(0 < one["quartiles"][0] <= one["quartiles"][2] for one in by_arm.values())


def test_the_table_has_the_ratio_of_every_step():
    def timed(seconds):
        return {"quartiles": [seconds] * 3, "cpu_quartiles": [seconds] * 3}

    steps = {"a network": {"float32": {OURS: timed(0.001), FLAX: timed(0.002)}}}
    (table,) = step.tables({"steps": steps})
    assert report.markdown(table).splitlines()[-1] == (
        "| a network, float32 | 1.00 (1.00 to 1.00) | 2.00 (2.00 to 2.00) | 0.50 |"
    )
