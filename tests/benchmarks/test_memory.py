"""The policies save the memory that they promise, for no reduction and no guard more."""

import re
from inspect import cleandoc

import jax
import pytest

import bn_jax as bn
from benchmarks import memory, report
from benchmarks.compilers import V5E, remembered
from benchmarks.memory import FLAX, OURS, Measured, Sizes, arms, cells, load, measure, tables
from bn_jax.training import make_mesh

SMALL = Sizes(examples=4, side=16, stage_sizes=(1,), widths=(4,), classes=3)
FIGURES = report.read("memory")
COMMITTED = load(FIGURES)
ON_V5E = COMMITTED[V5E]
KEPT = {keep: f"{OURS}, {where}: {keep}" for keep, where in memory.WHERE.items()}


def test_the_committed_figures_are_complete():
    assert {chip: list(found) for chip, found in COMMITTED.items()} == {
        chip: list(arms()) for chip in memory.CHIPS
    }
    assert len(remembered(FIGURES)) == sum(map(len, COMMITTED.values()))
    assert FIGURES["sizes"] == {
        name: list(one) if isinstance(one, tuple) else one
        for name, one in Sizes()._asdict().items()
    }
    (table,) = tables(FIGURES)
    assert table.row_count == sum(map(len, COMMITTED.values()))


def test_every_policy_takes_less_memory_than_flax():
    shares = {keep: ON_V5E[arm].temporary / ON_V5E[FLAX].temporary for keep, arm in KEPT.items()}
    assert shares["inputs"] <= 0.8
    assert shares["narrow"] <= 0.73
    assert shares["moments"] <= 0.5


@pytest.mark.parametrize("chip", memory.CHIPS)
def test_without_a_policy_a_step_takes_no_more_than_flax(chip):
    ours, flax = (COMMITTED[chip][arm] for arm in (OURS, FLAX))
    assert ours.temporary <= 1.001 * flax.temporary
    assert ours.moved <= 1.01 * flax.moved


def test_the_guards_cost_three_percent():
    guarded, flax = ON_V5E[f"{OURS}, guards"], ON_V5E[FLAX]
    assert guarded.guards == 53
    assert guarded.temporary <= 1.03 * flax.temporary
    assert guarded.moved <= 1.03 * flax.moved
    assert {one.guards for arm, one in ON_V5E.items() if one is not guarded} == {0}


def test_the_docstring_quotes_the_committed_figures():
    text = cleandoc(bn.remat_policy.__doc__ or "")
    _, head, body = re.split(r"^=[= ]+\n", text, flags=re.MULTILINE)[:3]
    header, *rows = [re.split(r"  +", line) for line in (head + body).splitlines()]
    assert header == ["keep", "around", "memory", "bytes", "operations"]
    names = {"loss": "the loss", "blocks": "every block"}
    assert rows == [
        [f'"{keep}"', names[where], *cells(ON_V5E, KEPT[keep])]
        for keep, where in memory.WHERE.items()
    ]
    assert f"without a policy these are {' and '.join(cells(ON_V5E, OURS)[:2])}." in text


@pytest.fixture(scope="module")
def live():
    mesh = make_mesh(jax.devices()[:1])
    # With guards, because these count how often a batch is measured.
    plain = arms()[f"{OURS}, guards"]
    kept = plain._replace(blocks=bn.remat_policy("moments"))
    bare = plain._replace(blocks=jax.checkpoint_policies.nothing_saveable)
    unguarded = arms()[OURS]
    return [measure(arm, mesh, SMALL, {}) for arm in (plain, kept, bare, unguarded)]


def test_a_small_network_measures_every_batch_once(live):
    plain, kept, bare, unguarded = (Measured(*map(one.get, Measured._fields)) for one in live)
    assert plain.guards == kept.guards == 5
    assert bare.guards == 5 + 4
    assert unguarded.guards == 0
    assert unguarded.flops < plain.flops < kept.flops < bare.flops
    for one in (plain, kept, bare, unguarded):
        assert min(one.temporary, one.moved, one.kernels) > 0


def test_what_has_been_compiled_is_not_compiled_again(live):
    mesh = make_mesh(jax.devices()[:1])
    known = {program: {"known": number} for number, program in enumerate(remembered(live))}
    assert len(known) == 4
    plain = arms()[f"{OURS}, guards"]
    assert measure(plain, mesh, SMALL, known) == {"known": 0, "program": live[0]["program"]}
    other = measure(plain, make_mesh(jax.devices()[:2]), SMALL, known)
    assert "known" not in other
