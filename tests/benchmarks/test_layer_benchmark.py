"""What `benchmarks.layer` compares computes the same, and its tables say what was measured."""

import platform
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from support import assert_close, define_batch_norm, define_gradients

from benchmarks import layer, report
from benchmarks.layer import ARMS, BOTH, COPY, FLAX, FORWARD, NORMS, OURS, Case, Outputs
from benchmarks.timing import Timing, in_turns

SHAPE = (4, 3, 3, 6)
INSTALLED = [arm for arm in ARMS if arm not in layer.missing()]
CASES = [
    Case("BatchNorm", "bfloat16", SHAPE),
    Case("LayerNorm", "float32", SHAPE),
    Case("RMSNorm", "bfloat16", SHAPE),
]


def test_what_is_timed_is_the_definition():
    case = Case("BatchNorm", "float32", SHAPE)
    params, x, cotangent = batch = layer.draw(case)
    programs = ARMS[OURS].programs(case, batch)
    stats = {"mean": np.zeros(SHAPE[-1]), "var": np.ones(SHAPE[-1])}
    y, state = define_batch_norm(params, stats, x, momentum=layer.MOMENTUM)
    expected = Outputs(
        y, {"batch_stats": state}, *define_gradients(params, x, None, lambda y: cotangent)
    )
    assert_close(programs[BOTH](), expected, dtype=np.float32)
    assert_close(programs[FORWARD](), expected._replace(d_params=None, d_x=None), dtype=np.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.norm)
def test_every_library_agrees_and_is_timed(case):
    figures = layer.measure([case.norm], [case.dtype], [case.shape], rounds=2)
    arms = [arm for arm in INSTALLED if case.norm in ARMS[arm].norms]
    found = figures[case.norm][case.dtype][layer.named(case.shape)]
    assert {direction: list(timings) for direction, timings in found.items()} == {
        direction: [COPY, *arms] for direction in (FORWARD, BOTH)
    }
    assert layer.load({"norms": layer.as_json(figures)}) == figures


@pytest.mark.parametrize("arm", [arm for arm in INSTALLED if arm != OURS])
def test_the_new_running_statistics_are_returned(arm):
    case = Case("BatchNorm", "float32", (6, 4))
    batch = layer.draw(case)
    program = ARMS[arm].programs(case, batch)[FORWARD]
    update = (1 - layer.MOMENTUM) * batch.x.mean(0)
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(program().state)]
    assert any(leaf.shape == update.shape and np.allclose(leaf, update) for leaf in leaves)


@pytest.mark.parametrize(
    ("arm", "norm", "place", "found"),
    [
        ("torch", "LayerNorm", "y", 1.05),
        ("haiku", "LayerNorm", "y", np.nan),
        ("haiku", "LayerNorm", "d_x", 1.05),
        ("haiku", "LayerNorm", "d_params", 1.05),
        ("torch", "RMSNorm", "d_params", 1.05),
        ("torch", "LayerNorm", "d_params", 1.6),
        ("torch", "LayerNorm", "d_params", np.nan),
    ],
)
def test_what_computes_something_else_is_not_compared(arm, norm, place, found):
    right = Outputs(*(np.ones((1, 3), np.float32) for _ in Outputs._fields))
    right = right._replace(d_params=np.ones(3, np.float32))

    def compare(place, value):
        changed = getattr(right, place).copy()
        changed[..., -1] = value
        results = {OURS: right, arm: right._replace(**{place: changed})}
        programs: Any = {name: {BOTH: partial(Outputs, *one)} for name, one in results.items()}
        layer.require_agreement(Case(norm, "bfloat16", SHAPE), programs)

    compare("y", 1.005)
    if (arm, norm) == ("torch", "LayerNorm"):
        compare("d_params", 1.2)
    with pytest.raises(AssertionError, match=rf"{arm} and {OURS} differ by .* in forward \+ back"):
        compare(place, found)


def test_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(layer, "find_spec", lambda name: name in ("bn_jax", "flax") or None)
    assert layer.missing() == {
        "haiku": "python -m pip install --editable '.[bench]'",
        "equinox": "python -m pip install --editable '.[bench]'",
        "keras": "python -m pip install --editable '.[bench]'",
        "torch": "python -m pip install torch",
    }
    found = layer.measure(["RMSNorm"], ["float32"], [(4, 3)], ["haiku"], rounds=2)
    assert list(found["RMSNorm"]["float32"]["4x3"][BOTH]) == [COPY, OURS, FLAX]


def timing(milliseconds):
    return Timing(*(((milliseconds / 1e3,) * 3,) * 2))


def test_the_tables_are_what_was_measured():
    def timings(ours, flax, haiku):
        named = {COPY: 1.0, OURS: ours, "bn_jax.nnx": 0.1, FLAX: flax, "haiku": haiku}
        return {arm: timing(milliseconds) for arm, milliseconds in named.items()}

    by_shape = {
        "4x3": {FORWARD: timings(2, 4, 3), BOTH: timings(8, 2, 16)},
        "5x3": {FORWARD: timings(8, 4, 16), BOTH: timings(8, 2, 16)},
    }
    headline, table = layer.tables({"norms": layer.as_json({"BatchNorm": {"float32": by_shape}})})
    assert report.markdown(headline).splitlines()[2:] == [
        "| BatchNorm | float32 | forward | 1.15 (2.00) | 1.00 (2.00) | 2.67 (5.33) |",
        "| BatchNorm | float32 | forward + backward | 4.00 (4.00) | 4.00 (4.00) | 2.00 (2.00) |",
    ]
    assert report.markdown(table).splitlines()[:5:2] == [
        "| dtype | shape | direction | bn_jax.linen ms | bn_jax.nnx | flax.linen | haiku | limit |",
        "| float32 | 4x3 | forward | 2.000 | 0.05 | 2.00 | 1.50 | 0.75 |",
        "| float32 | 5x3 | forward | 8.000 | 0.01 | 0.50 | 2.00 | 0.19 |",
    ]


def test_the_committed_figures_are_complete():
    known = report.read("layer")
    assert known["rounds"] == layer.ROUNDS
    figures = layer.load(known)
    assert list(figures) == list(NORMS)
    for norm, by_dtype in figures.items():
        assert list(by_dtype) == list(layer.TOLERANCES)
        arms = [COPY, *(name for name, arm in ARMS.items() if norm in arm.norms)]
        for by_shape in by_dtype.values():
            assert list(by_shape) == list(map(layer.named, layer.SHAPES))
        for *_, timings in layer.rows(figures, norm):
            assert list(timings) == arms
            for one in timings.values():
                assert 0 < one.quartiles[0] <= one.median <= one.quartiles[2]
    shown = [table.row_count for table in layer.tables(known)]
    assert shown == [len(NORMS) * 2 * 2, *[2 * len(layer.SHAPES) * 2] * len(NORMS)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not asked")
def test_freed_memory_is_kept():
    script = """
import ctypes, resource
from benchmarks.timing import keep_freed_memory

libc = ctypes.CDLL(None)
malloc = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(("malloc", libc))
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [malloc(2**26) for _ in range(4)]
    for array in arrays:
        libc.memset(array, 1, 2**26)
    for array in reversed(arrays):
        libc.free(array)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([faults() for _ in range(3)][-1])
keep_freed_memory()
print([faults() for _ in range(3)][-1])
"""
    returned, kept = map(int, subprocess.check_output([sys.executable, "-c", script]).split())
    pages = 4 * 2**26 / 2**12
    assert kept < 0.01 * pages < 0.5 * pages < returned


def test_a_program_is_timed_after_itself():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = in_turns(functions, 2, lambda: calls.append("round"), layer.after_itself)
    assert calls == ["a", "a", "b", "b", "round"] * 2
    assert list(found) == ["a", "b"]
