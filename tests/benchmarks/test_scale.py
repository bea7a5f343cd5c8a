from pathlib import Path

import jax
import pytest
from support import all_reduces

from benchmarks import report, scale
from benchmarks.hlo import Collective, collectives
from benchmarks.scale import NO_NORM, SLICES, Program, Sizes, Traffic, load, measure_all
from bn_jax.training import make_mesh

SMALL = Sizes(examples=4, image_shape=(8, 8, 3), widths=(4,), layer_shape=(4, 4, 5))
DEVICES = (1, 2, 4)
SYNCHRONIZED = ["bn_jax, jit", "bn_jax, shard_map"]
COMMITTED = load(report.read("scale"))

# The forms that XLA has for accelerators: tiled layouts, combined operands, asynchronous pairs, and
# an asynchronous call of a computation. One of the branches calls another computation.
PROGRAM = """\
HloModule written_by_hand, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %total = f32[]{:T(128)} add(%a, %b)
}

%wrapped (p: bf16[2,3]) -> bf16[8,3] {
  %p = bf16[2,3]{1,0:T(2,128)(2,1)} parameter(0)
  ROOT %gathered = bf16[8,3]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=4, dimensions={0}
}

%called (q: f32[7]) -> f32[7] {
  %q = f32[7]{0:T(128)} parameter(0)
  ROOT %deep = f32[7]{0:T(128)} all-reduce(%q), channel_id=5, to_apply=%sum
}

%refine (r: f32[7]) -> f32[7] {
  %r = f32[7]{0:T(128)} parameter(0)
  %shallow = f32[7]{0:T(128)} all-reduce(%r), channel_id=6, to_apply=%sum
  ROOT %call = f32[7]{0:T(128)} call(%shallow), to_apply=%called
}

%keep (s: f32[7]) -> f32[7] {
  ROOT %s = f32[7]{0:T(128)} parameter(0)
}

ENTRY %main (x: f32[3,5], y: f32[7], z: bf16[2,3], again: pred[]) -> f32[7] {
  %x = f32[3,5]{1,0:T(4,128)} parameter(0)
  %y = f32[7]{0:T(128)S(1)} parameter(1)
  %z = bf16[2,3]{1,0:T(2,128)(2,1)} parameter(2)
  %again = pred[]{:T(512)} parameter(3)
  %both = (f32[3,5]{1,0:T(4,128)}, /*index=1*/f32[7]{0:T(128)S(1)}) all-reduce(%x, /*index=1*/%y), \
channel_id=1, to_apply=%sum
  %start = f32[7]{0:T(128)} all-reduce-start(%y), channel_id=2, to_apply=%sum
  %done = f32[7]{0:T(128)} all-reduce-done(%start)
  %gather-start = (bf16[2,3]{1,0}, bf16[8,3]{1,0}) all-gather-start(%z), dimensions={0}
  %gather-done = bf16[8,3]{1,0} all-gather-done(%gather-start)
  %wrapped-start = ((bf16[2,3]{1,0}), bf16[8,3]{1,0}, s32[]) async-start(%z), calls=%wrapped
  %wrapped-done = bf16[8,3]{1,0} async-done(%wrapped-start)
  %sent-start = (f32[7]{0}, f32[7]{0}, u32[], u32[]) collective-permute-start(%done), channel_id=7
  %sent = f32[7]{0} collective-permute-done(%sent-start)
  %agreed = pred[]{:T(512)} all-reduce(%again), channel_id=8, to_apply=%sum
  ROOT %out = f32[7]{0:T(128)} conditional(%agreed, %sent, %sent), \
branch_computations={%keep, %refine}
}
"""


def test_each_collective_is_read_once_by_its_operands():
    assert sorted(collectives(PROGRAM)) == sorted(
        [
            Collective("all-gather", 6, 12, False),
            Collective("all-gather", 6, 12, False),
            Collective("all-reduce", 22, 88, False),
            Collective("all-reduce", 7, 28, False),
            Collective("all-reduce", 1, 1, False),
            Collective("all-reduce", 7, 28, True),
            Collective("all-reduce", 7, 28, True),
            Collective("collective-permute", 7, 28, False),
        ]
    )
    assert sorted(all_reduces(PROGRAM)) == [1, 7, 22]


@pytest.fixture(scope="module")
def live():
    """What the same functions find with the CPU's compiler."""
    return measure_all([make_mesh(jax.devices()[:count]) for count in DEVICES], SMALL, {})


def every_arm(findings):
    return [*findings.steps.items(), *findings.layers.items()]


@pytest.mark.parametrize("arm", SYNCHRONIZED)
@pytest.mark.parametrize("devices", [2, 4])
def test_a_layer_has_one_all_reduce_forward_and_one_backward(live, arm, devices):
    program, features = live.layers[arm][devices], SMALL.layer_shape[-1]
    assert program.kinds == {"all-reduce": 2}
    assert program.always == Traffic(2, 4 * features + 1, 4 * (4 * features + 1))
    assert program.guarded == Traffic(2, 3 * features, 4 * 3 * features)


def test_more_devices_mean_no_more_collectives(live):
    for name, programs in every_arm(live):
        two, four = (programs[devices] for devices in (2, 4))
        assert (two.kinds, two.always, two.guarded) == (four.kinds, four.always, four.guarded), name
        assert two.memory == four.memory, name
        assert set(two.kinds) <= {"all-reduce"}, name


def test_one_device_has_none_under_jit(live):
    for name, programs in every_arm(live):
        if "shard_map" not in name:
            assert programs[1].always == programs[1].guarded == Traffic(0, 0, 0), name


def test_a_norm_adds_collectives_to_a_step(live):
    assert live.norm_layers == 3
    assert live.norm_features == 3 * 4
    operations, size = scale.per_layer(live, "bn_jax", 4)
    assert 0 < operations <= 2
    assert 0 < size <= 4 * (4 * live.norm_features + 1) / live.norm_layers
    assert live.steps["bn_jax"][4].guarded.operations == 2 * live.norm_layers
    assert scale.per_layer(live, NO_NORM, 4) == (0, 0)


def test_memory_is_that_of_one_device(live):
    values = SMALL.examples * 4 * 4 * 5
    variables = 4 * 4 * SMALL.layer_shape[-1]
    for programs in live.layers.values():
        for program in programs.values():
            # x and the cotangent in bfloat16, the mask, and scale, bias, mean and variance.
            assert program.arguments == 2 * 2 * values + SMALL.examples + variables
            assert program.memory == program.arguments + program.outputs + program.temporary


def test_what_is_written_is_read_again_and_not_compiled_again(live, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.finish("scale", tmp_path, (), {"chip": "none", **live._asdict()}, lambda known: [])
    figures = report.read("scale")
    assert load(figures) == live

    def compile_nothing(lowered):
        raise AssertionError("this program is known")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_nothing)
    one = measure_all([make_mesh(jax.devices()[:1])], SMALL, scale.known_programs(figures))
    for now, then in ((one.steps, live.steps), (one.layers, live.layers)):
        assert now == {arm: {1: programs[1]} for arm, programs in then.items()}
    with pytest.raises(AssertionError, match="this program is known"):
        measure_all([make_mesh(jax.devices()[:3])], SMALL, scale.known_programs(figures))


def test_the_committed_figures_are_complete():
    assert list(COMMITTED.steps) == list(scale.arms(1))
    assert list(COMMITTED.layers) == list(scale.single_layers(1))
    for _, programs in every_arm(COMMITTED):
        assert list(programs) == list(SLICES)
        assert all(isinstance(program, Program) for program in programs.values())
    assert COMMITTED.sizes == Sizes()


def test_collectives_do_not_grow_from_4_devices_to_256():
    for name, programs in every_arm(COMMITTED):
        four, *others = (program for devices, program in programs.items() if devices > 1)
        for other in others:
            assert other.kinds == four.kinds, name
            assert (other.always, other.guarded) == (four.always, four.guarded), name


def test_memory_does_not_grow_from_4_devices_to_256():
    for name, programs in every_arm(COMMITTED):
        for devices in (16, 64, 256):
            assert programs[devices].memory <= 1.01 * programs[4].memory, name


@pytest.mark.parametrize("arm", SYNCHRONIZED)
def test_a_layer_on_256_devices_has_one_all_reduce_forward_and_one_backward(arm):
    program, features = COMMITTED.layers[arm][256], Sizes().layer_shape[-1]
    assert program.kinds == {"all-reduce": 2}
    assert program.always == Traffic(2, 4 * features + 1, 4 * (4 * features + 1))


def test_the_tables_have_every_arm():
    layers, steps = scale.tables(report.read("scale"))
    assert [layers.row_count, steps.row_count] == [len(COMMITTED.layers), len(COMMITTED.steps)]
    for table in (layers, steps):
        assert [column.header for column in table.columns] == ["chips", *map(str, SLICES)]


def test_what_the_page_says_of_the_committed_figures():
    page = (Path(__file__).parents[2] / "docs/performance.md").read_text()
    section = page.split("## Scaling with the number of devices")[1].split("\n## ")[0]
    assert f"{Sizes().examples} examples" in section
    assert f"{Sizes().layer_shape[-1]} features, forward and backward" in section
    assert (
        f"{COMMITTED.norm_layers} norm layers, of {COMMITTED.norm_features:,} features" in section
    )
    kinds = {kind for _, arm in every_arm(COMMITTED) for one in arm.values() for kind in one.kinds}
    assert ("All collectives are all-reduces" in section) == (kinds == {"all-reduce"})
