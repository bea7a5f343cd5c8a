"""What the compilers of accelerators say of the norms; without these compilers the tests skip."""

import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import bn_jax as bn
from benchmarks import compiled, compilers, document, memory, placement, report, scale
from benchmarks.compiled import FLAX, NORMS, OURS, ROWS, Network, Row, floor, load, make_program
from benchmarks.compilers import (
    H200,
    V5E,
    Compiled,
    compile_for,
    mesh_of,
    missing,
    read,
    remembered,
)
from benchmarks.hlo import (
    MOVE,
    SUMS,
    Kernel,
    collectives,
    kernels,
    traffic,
)
from bn_jax.training import DATA_AXIS

COMMITTED = load(report.read("compiled"))
# Per-feature arrays, beside those of the size of the input.
SMALL = 0.1
# In these the H200 compiler writes the gradient before the activation, and reads it again.
OVER_FLAX = {
    Row(H200, compiled.LAYER_SHAPE, "bfloat16", *after) for after in compiled.AFTER_THE_NORM[2:]
}

# A kernel that fuses, one on chip alone, an asynchronous copy and slice, and a guard's branch.
PROGRAM = """\
HloModule written_by_hand, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %total = f32[] add(%a, %b)
}

%fused (p: bf16[100,8]) -> f32[8] {
  %p = bf16[100,8]{1,0} parameter(0)
  %wide = f32[100,8]{1,0} convert(%p)
  %zero = f32[] constant(0)
  ROOT %sum = f32[8]{0} reduce(%wide, %zero), dimensions={0}, to_apply=%add
}

%measure (q: bf16[100,8]) -> f32[8] {
  %q = bf16[100,8]{1,0} parameter(0)
  ROOT %again = f32[8]{0} fusion(%q), kind=kInput, calls=%fused
}

%keep (r: bf16[100,8]) -> f32[8] {
  %r = bf16[100,8]{1,0} parameter(0)
  ROOT %none = f32[8]{0} broadcast(%r), dimensions={}
}

ENTRY %main (x: bf16[100,8], k: f32[50]) -> f32[8] {
  %x = bf16[100,8]{1,0} parameter(0)
  %k = f32[50]{0} parameter(1)
  %near = bf16[100,8]{1,0:T(8,128)S(1)} copy(%x)
  %total = f32[8]{0:T(256)S(1)} fusion(%near), kind=kInput, calls=%fused
  %start = (f32[8]{0}, f32[8]{0:S(1)}, u32[]{:S(2)}) copy-start(%total)
  %done = f32[8]{0} copy-done(%start)
  %part-start = ((f32[50]{0}), f32[10]{0:S(1)}, s32[]{:S(2)}) slice-start(%k), slice={[0:10]}
  %part = f32[10]{0:S(1)} slice-done(%part-start)
  %given = pred[] constant(false)
  ROOT %out = f32[8]{0} conditional(%given, %x, %x), branch_computations={%keep, %measure}
}
"""


def test_kernels_are_counted_by_what_they_move_in_main_memory():
    assert kernels(PROGRAM) == [
        Kernel("copy", 1600, 0, ("bf16[100,8]", "bf16[100,8]"), 3200, MOVE),
        Kernel("fusion", 0, 0, ("bf16[100,8]", "f32[8]"), 1632, SUMS),
        Kernel("copy-start", 0, 32, ("f32[8]", "f32[8]"), 64, MOVE),
        Kernel("slice-start", 40, 0, ("f32[50]", "f32[10]"), 80, MOVE),
    ]
    assert traffic(PROGRAM) == 1672


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("convolutions", [0, 2])
def test_a_program_is_what_its_row_says(name, convolutions):
    row = Row("none", (2, 4, 4, 8), "bfloat16", "relu", True, convolutions)
    assert row.unit == 2 * 4 * 4 * 8 * 2
    program, shapes = make_program(row, NORMS[name])
    y, updated, gradients = jax.eval_shape(program, *shapes)
    assert (y.shape, y.dtype) == (row.shape, jnp.bfloat16)
    assert len(jax.tree.leaves(updated)) == 2 * max(1, convolutions)
    assert len(gradients) == (2 if convolutions else 3)
    assert len(jax.tree.leaves(gradients[0])) == (3 * convolutions if convolutions else 2)
    # For a CPU, norms have barriers of their own.
    text = jax.jit(program).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.convolution") == 3 * convolutions
    assert "optimization_barrier" in text
    x = jax.random.normal(jax.random.key(0), row.shape, jnp.bfloat16)
    network = Network(row, NORMS[name])
    variables = network.init(jax.random.key(1), x, x)
    output, _ = network.apply(variables, x, x, mutable="batch_stats")
    assert output.min() == 0 < output.max()


def test_the_names_of_rows():
    assert str(Row(V5E, (1,), "float32", "silu", True, 2)) == "2 x conv + norm + residual + silu"
    assert str(Row(H200, (1,), "float32")) == "norm"


def test_a_missing_compiler_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr(compilers, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["benchmark"])
    for chip, module in ((V5E, "libtpu"), (H200, "cuda")):
        with pytest.raises(SystemExit, match=rf"{module}.* not installed.*'\.\[bench\]'"):
            mesh_of(chip)
    for benchmark in (compiled, memory, placement, scale):
        with pytest.raises(SystemExit, match="libtpu"):
            benchmark.main()


def test_the_committed_figures_are_complete():
    assert list(COMMITTED) == ROWS
    assert all(list(arms) == [FLAX, OURS] for arms in COMMITTED.values())
    tables = compiled.tables(report.read("compiled"))
    assert sum(table.row_count for table in tables) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.chips} {row.chip} {row.dtype} {row}")
def test_ours_moves_no_more_than_flax(row):
    flax, ours = (COMMITTED[row][name] for name in (FLAX, OURS))
    # Weights of some percent of a unit are sometimes fetched once more.
    assert (ours.moved <= 1.001 * flax.moved) == (row not in OVER_FLAX)
    assert ours.moved <= flax.moved + (1 + SMALL) * row.unit
    assert ours.temporary <= 1.01 * flax.temporary + SMALL * row.unit
    assert ours.collectives == flax.collectives == (2 if row.chips > 1 else 0)
    if row.chip != H200 and not row.convolutions:
        assert ours.moved <= (floor(row) + SMALL) * row.unit


def test_programs_of_the_committed_figures_are_known():
    known = remembered(report.read("compiled"))
    assert len(known) == len(ROWS) * len(NORMS)
    assert Compiled(**next(iter(known.values()))) == next(iter(COMMITTED.values()))[FLAX]


@pytest.mark.parametrize("page", document.PAGES, ids=lambda page: page.name)
def test_the_pages_show_the_committed_figures(page):
    text = page.read_text()
    assert text.count("<!-- end -->") == len(re.findall(r"<!-- (?!end)\w+(?: \d)? -->", text)) > 0
    assert document.with_tables(text) == text
    assert document.with_tables(text.replace("| H200 |", "| other |")) == text


def chip(name):
    if (message := missing(name)) is not None:
        assert "BN_JAX_COMPILERS" not in os.environ, message
        pytest.skip(message)
    return mesh_of(name)


def on(mesh, row, norm):
    return compile_for(mesh, *make_program(row, norm))


@pytest.mark.parametrize("row", [row for row in ROWS if row.chip == H200], ids=str)
def test_a_layer_on_the_h200_is_as_committed(row):
    mesh = chip(H200)
    found = {name: on(mesh, row, norm) for name, norm in NORMS.items()}
    units = {name: read(one).moved / row.unit for name, one in found.items()}
    if not row.activation and not row.residual:
        assert units[OURS] < floor(row) + SMALL
    assert units[OURS] <= units[FLAX] + (row in OVER_FLAX)
    for name, one in units.items():
        assert abs(one - COMMITTED[row][name].moved / row.unit) < SMALL
    if row.dtype == "bfloat16":
        shape = ",".join(map(str, row.shape))
        types = {one for kernel in kernels(found[OURS].as_text()) for one in kernel.types}
        assert f"bf16[{shape}]" in types
        assert f"f32[{shape}]" not in types


def test_blocks_on_the_v5e_move_no_more_than_with_flax():
    mesh = chip(V5E)
    row = Row(V5E, compiled.BLOCK_SHAPE, "bfloat16", "relu", convolutions=1)
    found = {name: on(mesh, row, norm) for name, norm in NORMS.items()}
    flax, ours = (read(found[name]) for name in (FLAX, OURS))
    assert ours.moved <= 1.001 * flax.moved
    assert ours.temporary <= 1.01 * flax.temporary + SMALL * row.unit
    shape = ",".join(map(str, row.shape))
    types = {one for kernel in kernels(found[OURS].as_text()) for one in kernel.types}
    assert f"f32[{shape}]" not in types


def test_a_layer_over_four_v5e_is_as_committed():
    chip(V5E)
    (row,) = (row for row in ROWS if row.chip == V5E and row.chips > 1)
    found = compiled.measure(row, NORMS[OURS], {})
    del found["program"]
    assert Compiled(**found) == COMMITTED[row][OURS]


@pytest.mark.parametrize("evaluates", [True, False], ids=["evaluation", "ghost"])
def test_these_have_no_collective_on_four_chips(evaluates):
    chip(V5E)
    mesh = mesh_of(V5E, "2x2")
    x = jax.ShapeDtypeStruct((32, 16, 128), jnp.bfloat16)
    ghost = None if evaluates else x.shape[0] // mesh.size
    module = bn.linen.BatchNorm(use_running_average=evaluates, virtual_batch_size=ghost)
    variables = jax.eval_shape(partial(module.init, jax.random.key(0)), x)
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (DATA_AXIS,)))

    def output_and_gradient(variables, x, cotangent):
        def forward(x):
            return module.apply(variables, x, mutable="batch_stats")[0]

        y, pullback = jax.vjp(forward, x)
        return y, pullback(cotangent)

    def placed(tree, sharding):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    given = placed(variables, whole), placed(x, split), placed(x.update(dtype=jnp.float32), split)
    lowered = jax.jit(output_and_gradient, out_shardings=split).lower(*given)
    assert collectives(lowered.compile().as_text() or "") == []
