"""The measurements of an accelerator work, here on a CPU and small."""

import sys
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import device, report
from benchmarks.device import STRUCK, Sizes
from benchmarks.inference import Network
from benchmarks.startup import FLAX, NORMS, OURS, Program, layer
from benchmarks.sweep import Net

IMAGE: Any = (4, 5)
SMALL = Sizes(
    layers=((6, 5),),
    block=(2, 4, 4, 3),
    dtypes=(np.float32,),
    network=Network(partial(Net, width=4), IMAGE),
    copied=16,
)


@pytest.fixture(scope="module")
def measured():
    # Not the first device: what is measured is where it was asked for.
    return device.measure_all(SMALL, jax.devices()[1], rounds=2, repeats=2)


def test_every_case_is_measured_in_every_arm(measured):
    copied, found = measured
    assert copied > 0
    assert list(found) == list(device.cases(SMALL))
    assert len(found) == len(SMALL.layers) + 2
    assert len(device.cases(Sizes())) == 2 * (len(Sizes().layers) + 1) + 1
    for name, one in found.items():
        assert list(one.arms) == [*NORMS, *([STRUCK] if "layer" in name else [])]
        assert all(arm.timing.median > 0 for arm in one.arms.values())
    assert device.cases(Sizes())["layer [32, 128], bfloat16"].moved == 8 * 32 * 128 * 2
    assert found["layer [6, 5], float32"].moved == 8 * 30 * 4


def test_the_table_has_every_arm_of_every_case(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    copied, found = measured
    figures = {"device": "small", "bandwidth": copied, "cases": found}
    report.finish("device", tmp_path, (), figures, device.tables)
    (table,) = device.tables(report.read("device"))
    assert table.row_count == sum(len(one.arms) for one in found.values())


def test_programs_run_where_they_are_asked_to():
    where = []
    program = Program(lambda x: x + 1, lambda: (jax.numpy.ones(3),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "repeated", lambda function, times: where.append(function()))
        device.measure({"one": program}, jax.devices()[2], rounds=2, repeats=1)
    assert {one.device for one in where} == {jax.devices()[2]}


def test_a_call_is_repeated():
    calls = []

    def count():
        calls.append(0)
        return len(calls)

    assert device.repeated(count, 3) == 3


@pytest.mark.parametrize("strikes", [False, True])
def test_the_guard_strikes_where_it_is_said_to(strikes):
    program = layer(NORMS[OURS], (64, 5))
    program = device.struck(program) if strikes else program
    variables, x, _ = program.make_arguments()
    delta = variables["batch_stats"]["mean"] - np.mean(x, axis=0)
    assert np.all(np.square(delta) > 10 * np.var(x, axis=0)) == strikes
    assert np.any(np.square(delta) > 10 * np.var(x, axis=0)) == strikes


def test_a_block_is_a_convolution_a_norm_and_a_relu():
    program = device.block(NORMS[FLAX], (2, 4, 4, 3), np.float32)
    variables, *_ = jax.eval_shape(program.make_arguments)
    shapes = {name: set(layer) for name, layer in variables["params"].items()}
    assert list(shapes.values()) == [{"kernel"}, {"scale", "bias"}]
    y, *_ = jax.jit(program.function)(*program.make_arguments())
    assert y.min() == 0 < y.max()


def test_without_an_accelerator_nothing_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "MEASURED", tmp_path)
    monkeypatch.setattr(sys, "argv", ["device"])
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(device, "Sizes", lambda: SMALL)
    device.main()
    assert capsys.readouterr().out.startswith("skipped: ")
    assert not list(tmp_path.iterdir())
