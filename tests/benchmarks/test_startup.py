"""What is built is what is counted and timed, and the committed figures are of these programs."""

import subprocess
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import report, startup
from benchmarks.inference import Network
from benchmarks.startup import DTYPES, FLAX, IMPORTS, NORMS, OURS, PHASES
from benchmarks.sweep import Net

IMAGE: Any = (4, 5)
SMALL = Network(partial(Net, width=4), IMAGE)
COMMITTED = report.read("startup")


def test_nested_equations_count():
    def function(x):
        return jax.lax.cond(x > 0, lambda x: jnp.sin(x) + 1, lambda x: x, x)

    # The comparison, the index of the branch, the conditional, and two in a branch.
    assert startup.count_equations(jax.make_jaxpr(function)(1.0).jaxpr) == 5


def test_a_size_is_that_of_the_program():
    program = startup.Program(lambda x: jnp.sin(x) + x, lambda: (jnp.ones(3),))
    assert startup.measure_size(program) == startup.Size(equations=2, operations=2)


def test_every_phase_is_done_anew():
    traces = []

    def function(x):
        traces.append(0)
        return x + 1

    build = startup._Build(startup.Program(function, lambda: (1.0,)))
    executables = set()
    for _ in range(2):
        for phase in ("forget", *PHASES):
            getattr(build, phase)()
        executables.add(build.compiled)
    assert len(traces) == len(executables) == 2


def test_the_training_step_is_built_in_turns():
    advanced: list[Any] = []
    found = startup.measure_steps(SMALL, 2, partial(advanced.append, 1))
    assert list(found) == [OURS, FLAX] and len(advanced) == 2
    for one in found.values():
        assert list(one.phases) == list(PHASES)
        assert all(timing.median > 0 for timing in one.phases.values())


@pytest.mark.parametrize("arm", NORMS)
def test_the_training_step_trains(arm):
    program = startup.training_step(SMALL, NORMS[arm])
    state, batch = jax.jit(program.make_arguments)()
    step = jax.jit(program.function)
    losses = []
    for _ in range(20):
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(state.batch_stats))


def test_both_layers_compute_the_same():
    found = {}
    for arm, norm in NORMS.items():
        program = startup.layer(norm, (4, 3, 5))
        arguments = jax.jit(program.make_arguments)()
        found[arm] = jax.tree.leaves(jax.jit(program.function)(*arguments))
    assert len(found[OURS]) == 6  # y, mean, var, and the gradients of scale, bias and x
    for ours, flax in zip(found[OURS], found[FLAX], strict=True):
        np.testing.assert_allclose(ours, flax, atol=1e-5)
    y, mean, _, _, _, dx = found[OURS]
    assert np.all(mean != 0)
    np.testing.assert_allclose(np.sum([y, dx], axis=(1, 2)), 0, atol=1e-5)


def test_every_call_trains():
    for functions in startup.calls((2, 3)).values():
        assert list(functions) == [OURS, FLAX]
        ours, flax = (jax.tree.leaves(functions[arm]()) for arm in (OURS, FLAX))
        for one, other in zip(ours, flax, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
        np.testing.assert_allclose(ours[0], [[-1.0] * 3, [1.0] * 3], atol=1e-3)


def test_calls_are_timed_when_compiled(monkeypatch):
    called: list[Any] = []
    functions = {arm: partial(called.append, arm) for arm in NORMS}
    monkeypatch.setattr(startup, "calls", lambda shape: {"one kind": functions})
    found = startup.measure_calls((2, 3), 4)
    assert {kind: list(by_arm) for kind, by_arm in found.items()} == {"one kind": [OURS, FLAX]}
    assert called == [OURS, FLAX] * 5  # once to compile


def test_imports_are_timed_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(startup, "IMPORTS", {"json": ("json", "sys"), "csv": ("csv", "json")})
    found = startup.measure_imports(2, lambda: None)
    assert list(found) == ["json", "csv"]
    assert all(timing.cpu_quartiles[1] > 0 for timing in found.values())
    with pytest.raises(subprocess.CalledProcessError):
        startup.import_seconds("json", "nothing_of_this_name")


def test_the_committed_figures_are_complete():
    assert list(COMMITTED["imports"]) == list(IMPORTS)
    assert list(COMMITTED["layers"]) == list(COMMITTED["steps"]) == list(DTYPES)
    assert list(COMMITTED["calls"]) == list(startup.calls((2, 3)))
    steps = []
    for dtype in DTYPES:
        assert list(COMMITTED["layers"][dtype]) == list(COMMITTED["steps"][dtype]) == list(NORMS)
        steps += COMMITTED["steps"][dtype].values()
    for step in steps:
        assert list(step["phases"]) == list(PHASES)
    timings = [
        *COMMITTED["imports"].values(),
        *(timing for step in steps for timing in step["phases"].values()),
        *(timing for by_arm in COMMITTED["calls"].values() for timing in by_arm.values()),
    ]
    assert len(timings) == 3 + 2 * 2 * 3 + 3 * 2
    for timing in timings:
        assert 0 < timing["quartiles"][0] <= timing["quartiles"][1] <= timing["quartiles"][2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_layer_is_no_larger_than_the_committed_one(dtype):
    versions = {name: version(name) for name in ("jax", "flax")}
    if versions.items() <= COMMITTED["versions"].items():
        found = startup.measure_layers(dtype)[OURS]
        committed = startup.Size(**COMMITTED["layers"][dtype][OURS])
        assert found.equations <= committed.equations
        assert found.operations <= committed.operations


def test_the_tables_have_every_figure():
    imports, sizes, phases, calls = startup.tables(COMMITTED)
    assert imports.row_count == len(IMPORTS)
    assert sizes.row_count == 2 * len(DTYPES)
    assert phases.row_count == len(PHASES) * len(DTYPES)
    assert calls.row_count == len(COMMITTED["calls"])
    assert f"{COMMITTED['layers']['float32'][OURS]['equations']} / " in report.markdown(sizes)
    assert "| import bn_jax, after flax.linen, flax.nnx |" in report.markdown(imports)
