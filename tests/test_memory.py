"""The policies save the memory that they promise, for no reduction and no guard more."""

import jax
import pytest

from benchmarks import memory
from benchmarks.memory import FLAX, OURS, Sizes, arms, cells, measure, tables
from bn_jax.training import make_mesh

SMALL = Sizes(examples=4, side=16, stage_sizes=(1,), widths=(4,), classes=3)
KEPT = {keep: f"{OURS}, {where}: {keep}" for keep, where in memory.WHERE.items()}


def test_the_table_has_every_arm(live):
    plain, kept, bare = live
    found = dict.fromkeys(arms(), kept._asdict()) | {FLAX: plain._asdict(), OURS: bare._asdict()}
    (table,) = tables({"arms": found})
    assert table.row_count == len(arms())
    assert cells({FLAX: plain, OURS: plain}, OURS) == ["1.00"] * 3


@pytest.fixture(scope="module")
def live():
    mesh = make_mesh(jax.devices()[:1])
    plain, kept = arms()[OURS], arms()[KEPT["moments"]]
    bare = kept._replace(blocks=jax.checkpoint_policies.nothing_saveable)
    return [measure(arm, mesh, SMALL) for arm in (plain, kept, bare)]


def test_a_small_network_measures_every_batch_once_too(live):
    plain, kept, bare = live
    assert plain.guards == kept.guards == 5
    assert bare.guards == 5 + 4
    assert plain.flops < kept.flops < bare.flops
    assert all(one.temporary > 0 and one.moved > 0 for one in live)
