"""How much plumbing a call of a module goes through; the functions are counted, not timed.

A call of a shape that has been traced goes through the checks, and into a compiled function. The
first call traces that function too. Before a norm was one compiled function, the first call went
through 185 calls, with 71 changes of file; a later one through 54, with 12.
``python tests/modules/test_plumbing.py`` prints the counts.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bn_jax as bn

PACKAGE = str(Path(bn.__file__).parent)
# What a method would have as `self`.
RECEIVERS = {"self", "cls", "layer"}


@dataclass
class Plumbing:
    """What a profiler saw of our functions."""

    files: list[str] = field(default_factory=list)
    handed_on: int = 0

    def note(self, frame, event, argument):
        """Counts a call; `sys.setprofile` takes it."""
        code, caller = frame.f_code, frame.f_back
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        self.files.append(code.co_filename)
        if caller is not None and caller.f_code.co_filename.startswith(PACKAGE):
            mine, theirs = arguments_of(frame), arguments_of(caller)
            shared = (mine.keys() & theirs.keys()) - RECEIVERS
            self.handed_on += sum(mine[name] is theirs[name] for name in shared)

    @property
    def calls(self):
        """How many calls there were of our functions."""
        return len(self.files)

    @property
    def changes_of_file(self):
        """How often a call was in another file than the one before."""
        return sum(one != other for one, other in zip(["", *self.files], self.files, strict=False))


def arguments_of(frame):
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return {name: frame.f_locals[name] for name in names if name in frame.f_locals}


def count(call):
    plumbing = Plumbing()
    sys.setprofile(plumbing.note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return plumbing


def linen_call(x):
    layer = bn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    return lambda: layer.apply(variables, x, mutable=["batch_stats"])


def nnx_call(x):
    layer = bn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    return lambda: layer(x)


@pytest.mark.parametrize("make_call", [linen_call, nnx_call])
def test_a_training_call_goes_through_few_functions(make_call):
    call = make_call(jnp.arange(32.0).reshape(8, 4))
    jax.clear_caches()
    first, later = count(call), count(call)
    assert 100 < first.calls <= 155
    assert 30 < first.changes_of_file <= 70
    assert 50 < first.handed_on <= 118
    assert 30 < later.calls <= 54
    assert 5 < later.changes_of_file <= 12
    assert 5 < later.handed_on <= 25


if __name__ == "__main__":
    for make_call in (linen_call, nnx_call):
        call = make_call(jnp.arange(32.0).reshape(8, 4))
        jax.clear_caches()
        for when in ("first", "second"):
            plumbing = count(call)
            print(
                f"{make_call.__name__}, {when} call: {plumbing.calls} calls, "
                f"{plumbing.changes_of_file} changes of file, {plumbing.handed_on} handed on"
            )
