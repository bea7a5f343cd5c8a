"""A step with our norms computes on no more bytes than with Flax's; where XLA keeps them varies."""

import jax
import pytest

from benchmarks import placement, report
from benchmarks.compilers import remembered
from benchmarks.hlo import (
    CONVOLUTION,
    CONVOLUTION_AND_SUMS,
    ELEMENTWISE,
    MOVE,
    SUMS,
    WORK,
)
from benchmarks.memory import FLAX, OURS, Sizes
from benchmarks.memory import load as load_memory
from benchmarks.placement import Work, load, measure, sort, tables, total
from bn_jax.training import make_mesh

FIGURES = report.read("placement")
COMMITTED = load(FIGURES)
SMALL = Sizes(examples=4, side=16, stage_sizes=(1,), widths=(4,), classes=3)

# A kernel of each kind; one array is on the chip, and a copy is joined from its slices.
PROGRAM = """\
HloModule written_by_hand, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %total = f32[] add(%a, %b)
}

%convolve (p: bf16[100,8], w: bf16[8,8]) -> bf16[100,8] {
  %p = bf16[100,8]{1,0} parameter(0)
  %w = bf16[8,8]{1,0} parameter(1)
  ROOT %y = bf16[100,8]{1,0} convolution(%p, %w), dim_labels=bf_io->bf
}

%convolve_and_sum (p2: bf16[100,8], w2: bf16[8,8]) -> (f32[8], bf16[100,8]) {
  %p2 = bf16[100,8]{1,0} parameter(0)
  %w2 = bf16[8,8]{1,0} parameter(1)
  %y2 = bf16[100,8]{1,0} convolution(%p2, %w2), dim_labels=bf_io->bf
  %zero2 = f32[] constant(0)
  %sum2 = f32[8]{0} reduce(%y2, %zero2), dimensions={0}, to_apply=%add
  ROOT %both = (f32[8]{0}, bf16[100,8]{1,0}) tuple(%sum2, %y2)
}

%sum (p3: bf16[100,8]) -> f32[8] {
  %p3 = bf16[100,8]{1,0} parameter(0)
  %zero3 = f32[] constant(0)
  ROOT %sum3 = f32[8]{0} reduce(%p3, %zero3), dimensions={0}, to_apply=%add
}

%scale (p4: bf16[100,8], s4: f32[8]) -> bf16[100,8] {
  %p4 = bf16[100,8]{1,0} parameter(0)
  %s4 = f32[8]{0} parameter(1)
  ROOT %y4 = bf16[100,8]{1,0} multiply(%p4, %s4)
}

ENTRY %main (x: bf16[100,8], w0: bf16[8,8]) -> bf16[100,8] {
  %x = bf16[100,8]{1,0} parameter(0)
  %w0 = bf16[8,8]{1,0} parameter(1)
  %y0 = bf16[100,8]{1,0:T(8,128)S(1)} fusion(%x, %w0), kind=kOutput, calls=%convolve
  %pair = (f32[8]{0}, bf16[100,8]{1,0}) fusion(%y0, %w0), kind=kOutput, calls=%convolve_and_sum
  %first = f32[8]{0} get-tuple-element(%pair), index=0
  %second = bf16[100,8]{1,0} get-tuple-element(%pair), index=1
  %third = f32[8]{0} fusion(%second), kind=kInput, calls=%sum
  %slice-start = ((bf16[100,8]{1,0}), bf16[50,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%second), slice={[0:50], [0:8]}
  %slice-done = bf16[50,8]{1,0:S(1)} slice-done(%slice-start)
  %joined = bf16[100,8]{1,0:S(1)} custom-call(%slice-done, %slice-done), custom_call_target="ConcatBitcast"
  ROOT %out = bf16[100,8]{1,0} fusion(%joined, %third), kind=kLoop, calls=%scale
}
"""  # noqa: E501


def test_kernels_are_sorted_by_what_they_contain():
    x, w, sums = 1600, 128, 32
    assert sort(PROGRAM) == {
        CONVOLUTION: Work(1, 2 * x + w, x + w),
        CONVOLUTION_AND_SUMS: Work(1, 2 * x + w + sums, x + w + sums),
        SUMS: Work(1, x + sums, x + sums),
        ELEMENTWISE: Work(1, 2 * x + sums, x + sums),
        MOVE: Work(2, 3 * x, x // 2),
    }
    assert [*sort(PROGRAM)] == [*WORK]


@pytest.mark.parametrize("examples", placement.EXAMPLES)
def test_ours_computes_on_no_more_bytes_than_flax(examples):
    found = COMMITTED[examples]
    ours, flax = (total(found[norm], with_copies=False).anywhere for norm in (OURS, FLAX))
    assert 0.99 * flax < ours <= flax
    for does in (CONVOLUTION, CONVOLUTION_AND_SUMS, ELEMENTWISE):
        one, other = found[OURS][does], found[FLAX][does]
        assert abs(one.anywhere / other.anywhere - 1) < 2e-4
    for does in (CONVOLUTION, CONVOLUTION_AND_SUMS, SUMS):
        assert found[OURS][does].kernels == found[FLAX][does].kernels


def test_where_xla_places_arrays_favours_neither():
    moved = {
        examples: [total(found[norm], with_copies=True).main for norm in (OURS, FLAX)]
        for examples, found in COMMITTED.items()
    }
    ratios = {examples: ours / flax for examples, (ours, flax) in moved.items()}
    assert min(ratios.values()) < 1 < max(ratios.values()) < 1.01


@pytest.mark.parametrize("norm", [OURS, FLAX])
def test_the_parts_add_up_to_the_bytes_of_the_step(norm):
    moved = load_memory(report.read("memory"))[placement.CHIP][norm].moved
    assert total(COMMITTED[Sizes().examples][norm], with_copies=True).main == moved


def test_the_committed_figures_are_complete():
    assert [*COMMITTED] == [*placement.EXAMPLES]
    assert {norm for found in COMMITTED.values() for norm in found} == {FLAX, OURS}
    assert len(remembered(FIGURES)) == 2 * len(placement.EXAMPLES)
    (table,) = tables(FIGURES)
    assert table.row_count == (len(WORK) + 2) * len(placement.EXAMPLES)


def test_a_small_network_is_sorted_and_not_compiled_again():
    mesh = make_mesh(jax.devices()[:1])
    found = measure(OURS, mesh, SMALL, {})
    work = load({"examples": {"4": {OURS: found}}})[4][OURS]
    assert sum(one.kernels for one in work.values()) > 0
    assert work[MOVE].kernels < sum(one.kernels for one in work.values())
    known = remembered(found)
    assert [*known] == [found["program"]]
    known[found["program"]] = {"known": 0}
    assert measure(OURS, mesh, SMALL, known) == {"known": 0, "program": found["program"]}
