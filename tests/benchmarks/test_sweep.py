"""All ways of making the runs make the same ones, and the committed figures are of these ways."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import report, sweep
from benchmarks.sweep import NORMS, OURS, SEQUENTIAL, TORCH, VMAPPED, WAYS, Sizes
from benchmarks.timing import Timing
from bn_jax.lab.data import load_digits

SMALL = Sizes(rates=3, seeds=2, steps=5, examples=8, width=4, torch_runs=2)
COMMITTED = report.read("sweep")


@pytest.fixture(scope="module")
def task():
    return sweep.make_task(load_digits(), SMALL)


def test_the_runs_are_a_grid():
    runs = sweep.grid(SMALL)
    assert len(set(runs)) == SMALL.runs == 6
    np.testing.assert_allclose([rate for rate, _ in runs[::2]], [1e-3, 3e-4**0.5, 0.3], rtol=1e-6)
    assert set(sweep.torch_runs(SMALL)) < set(runs)
    assert len(set(sweep.torch_runs(Sizes()))) == Sizes().torch_runs


def test_a_run_trains(task):
    sizes = SMALL._replace(steps=40, width=32)
    task = sweep.make_task(load_digits(), sizes)
    slow, fast = (
        float(sweep.train(NORMS[OURS], sizes, task, jnp.float32(rate), jnp.int32(0)))
        for rate in (1e-3, 0.3)
    )
    assert fast < 0.7 < 0.5 * slow


def test_all_ways_of_jax_agree_about_every_run(task):
    advanced: list[Any] = []
    measured = sweep.measure(SMALL, task, 2, partial(advanced.append, 1))
    arms = [f"{name}, {way}" for name in NORMS for way in WAYS]
    assert list(measured)[: len(arms)] == arms and len(advanced) == 4
    for arm in arms:
        one = measured[arm]
        assert one.runs == SMALL.runs
        assert one.difference <= sweep.TOLERANCE
        assert 0 < one.losses[0] < 0.99 * one.losses[1]
        assert one.build is not None and one.build.median > 0
        assert one.timing is not None and one.timing.median > 0


def test_runs_that_differ_are_an_error():
    losses = {f"{OURS}, {way}": np.ones(SMALL.runs) for way in WAYS}
    assert sweep.difference(f"{OURS}, {VMAPPED}", losses, SMALL) == 0
    for wrong in (1.01, np.nan):
        losses[f"{OURS}, {VMAPPED}"] = np.array([wrong, 1, 1, 1, 1, 1])
        with pytest.raises(ValueError, match="vmapped: a final loss is off by"):
            sweep.difference(f"{OURS}, {VMAPPED}", losses, SMALL)


def test_pytorch_is_compared_with_the_runs_that_it_makes():
    every = np.arange(1.0, 7)
    losses = {f"{OURS}, {SEQUENTIAL}": every, TORCH: np.array([1.0, 5.0])}
    assert sweep.torch_runs(SMALL) == [sweep.grid(SMALL)[0], sweep.grid(SMALL)[3]]
    assert sweep.difference(TORCH, losses, SMALL) == 0.25


def test_a_part_of_the_runs_is_scaled_up():
    timing = Timing((1, 2, 3), (4, 5, 6)).scaled(10)
    assert timing == Timing((10, 20, 30), (40, 50, 60))


def test_all_seeds_have_batches_of_their_own(task):
    assert task.rows.shape == (2, 5, 8)
    assert not np.array_equal(*task.rows)
    assert task.x.shape[1] == 64 and abs(float(jnp.std(task.x)) - 1) < 1e-3


def test_the_committed_figures_are_complete():
    assert Sizes(**COMMITTED["sizes"]) == Sizes()
    assert COMMITTED["tolerance"] == sweep.TOLERANCE
    arms = COMMITTED["arms"]
    assert list(arms) == [*(f"{name}, {way}" for name in NORMS for way in WAYS), TORCH]
    for arm, one in arms.items():
        assert 0 < one["timing"]["quartiles"][0] <= one["timing"]["quartiles"][2]
        assert one["runs"] == (Sizes().torch_runs if arm == TORCH else Sizes().runs)
        assert arm == TORCH or one["difference"] <= sweep.TOLERANCE
        assert (one["build"] is None) == (arm == TORCH)


def test_the_table_says_what_is_scaled_up():
    (table,) = sweep.tables(COMMITTED)
    assert table.row_count == len(COMMITTED["arms"])
    text = report.markdown(table)
    assert text.count("scaled up") == 1
    assert f"| {TORCH} (scaled up from {Sizes().torch_runs} runs) |" in text
