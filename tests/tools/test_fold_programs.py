"""Random programs compute the same when their norms are folded."""

import jax
import numpy as np
import pytest
from numpy_programs import run_equation, run_in_numpy
from random_programs import RandomProgram, write_program
from support import exact, quick

import bn_jax as bn
from bn_jax import _compat

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture
def in_numpy(monkeypatch):
    """Lets `fold` compute with variables in NumPy, where nothing is compiled."""
    bind = _compat.bind

    def bind_or_run(eqn, values):
        is_traced = any(isinstance(value, jax.core.Tracer) for value in values)
        return bind(eqn, values) if is_traced else run_equation(eqn, values)

    monkeypatch.setattr(_compat, "bind", bind_or_run)


def fold(program: RandomProgram) -> bn.Folded:
    """Folds a program, and checks what has become of each norm."""
    folded = bn.fold(program.forward, program.variables, jax.eval_shape(lambda: program.x))
    story = f"{program.text}\n{folded.report}"
    assert len(folded.report) == len(program.fates), story
    for norm, fate in zip(folded.report, program.fates, strict=True):
        assert fate in (norm.into is not None, None), story
    return folded


def check(program: RandomProgram, folded: bn.Folded, actual: np.ndarray, expected: np.ndarray):
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / max(1, np.abs(expected).max())
    assert error < program.tolerance, f"{error}\n{program.text}\n{folded.report}"


@pytest.mark.parametrize("seed", quick(range(500), range(40)))
def test_a_random_program_computes_the_same(seed, in_numpy):
    program = write_program(seed)
    folded = fold(program)
    actual = run_in_numpy(folded.apply, folded.params, program.x)
    expected = run_in_numpy(program.forward, program.variables, program.x)
    check(program, folded, actual, expected)


@pytest.mark.parametrize("seed", quick(range(500, 540), range(500, 504)))
def test_a_random_program_computes_the_same_when_compiled(seed):
    program = write_program(seed)
    folded = fold(program)

    @jax.jit
    def both(params, variables, x):
        return folded.apply(params, x), program.forward(variables, x)

    actual, expected = both(folded.params, program.variables, program.x)
    assert actual.dtype == expected.dtype
    check(program, folded, exact(actual), exact(expected))
