"""The policies save the memory that they promise, for no reduction and no guard more."""

import re
from inspect import cleandoc

import jax
import pytest

import bn_jax as bn
from benchmarks import memory, report
from benchmarks.memory import FLAX, OURS, Measured, Sizes, arms, cells, load, measure, tables
from bn_jax.training import make_mesh

SMALL = Sizes(examples=4, side=16, stage_sizes=(1,), widths=(4,), classes=3)
FIGURES = report.read("memory")
COMMITTED = load(FIGURES)
KEPT = {keep: f"{OURS}, {where}: {keep}" for keep, where in memory.WHERE.items()}


def test_the_committed_figures_are_complete():
    assert list(COMMITTED) == list(arms())
    assert FIGURES["sizes"] == {
        name: list(one) if isinstance(one, tuple) else one
        for name, one in Sizes()._asdict().items()
    }
    assert all(isinstance(one, Measured) for one in COMMITTED.values())


def test_every_policy_takes_less_memory_than_flax():
    shares = {
        keep: COMMITTED[arm].temporary / COMMITTED[FLAX].temporary for keep, arm in KEPT.items()
    }
    assert max(shares.values()) <= 0.8
    assert max(shares["narrow"], shares["moments"]) <= 0.73
    assert shares["moments"] <= 0.5


def test_no_policy_measures_a_batch_twice():
    guards = COMMITTED[OURS].guards
    assert guards == 53
    assert [COMMITTED[arm].guards for arm in KEPT.values()] == [guards] * len(KEPT)


def test_the_docstring_quotes_the_committed_figures():
    table = re.findall(r"^ *\| (.*) \|$", cleandoc(bn.remat_policy.__doc__), re.MULTILINE)
    header, _, *rows = [[cell.strip() for cell in line.split("|")] for line in table]
    assert header == ["keep", "around", "memory", "bytes", "operations"]
    names = {"loss": "the loss", "blocks": "every block"}
    assert rows == [
        [f'"{keep}"', names[where], *cells(COMMITTED, KEPT[keep])]
        for keep, where in memory.WHERE.items()
    ]


def test_the_table_has_every_arm():
    (table,) = tables(FIGURES)
    assert table.row_count == len(arms())


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


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"libtpu.* not installed.*'\.\[bench\]'"):
        memory.main()
