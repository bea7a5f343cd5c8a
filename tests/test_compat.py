"""Each entry of `bn_jax/_compat.py` does what it says in the installed JAX."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import export
from jax.sharding import Mesh, PartitionSpec

from bn_jax import _compat

MESH = partial(Mesh, axis_names=("rows",))


def in_shard_map(function, x, spec):
    mesh = MESH(jax.devices()[:2])
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)(x)


def test_the_axes_of_vmap_are_listed():
    seen = []

    def note(x):
        seen.append(_compat.vmap_axes())
        return x

    note(1)
    inner = jax.vmap(note, axis_name="inner")
    jax.vmap(inner, axis_name="outer")(jnp.zeros((2, 3)))
    assert seen[0] == []
    assert set(seen[1]) == {"inner", "outer"}


def test_bound_axes_are_told_apart():
    seen = {}

    def note(kind, x):
        seen[kind] = [_compat.is_axis_bound(name) for name in ("rows", "columns")]
        return x

    note("alone", 1)
    jax.vmap(partial(note, "vmap"), axis_name="columns")(jnp.zeros(2))
    in_shard_map(partial(note, "shard_map"), jnp.zeros(2), PartitionSpec("rows"))
    assert seen == {"alone": [False, False], "vmap": [False, True], "shard_map": [True, False]}


def test_varying_axes_are_known_to_shard_map():
    seen = []

    def note(x):
        seen.append(_compat.varying_axes(x))
        return x

    note(jnp.zeros(2))
    in_shard_map(note, jnp.zeros(2), PartitionSpec("rows"))
    in_shard_map(note, jnp.zeros(2), PartitionSpec())
    assert seen == [frozenset(), frozenset({"rows"}), frozenset()]


def test_a_symbolic_size_that_cannot_be_compared_raises_the_error():
    def compare(x):
        with pytest.raises(_compat.InconclusiveDimensionOperation):
            bool(x.shape[0] > 3)
        return x

    shape = jax.ShapeDtypeStruct(export.symbolic_shape("n"), jnp.float32)
    export.export(jax.jit(compare))(shape)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.sin(x) * 2,
        jax.jit(lambda x: jnp.cumsum(x) + 1),
        lambda x: jax.lax.scan(lambda total, value: (total + value, total), 0.0, x),
        lambda x: jax.nn.relu(x),  # a custom derivative
        lambda x: jax.lax.cond(x[0] > 0, jnp.cos, jnp.sin, x),
    ],
)
def test_bind_computes_every_equation(function):
    x = jnp.array([0.5, -1.0, 2.0])
    closed = jax.make_jaxpr(function)(x)

    def run(x):
        values = dict(zip(closed.jaxpr.invars, [x], strict=True))
        values |= dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        for equation in closed.jaxpr.eqns:
            inputs = [
                atom.val if hasattr(atom, "val") else values[atom] for atom in equation.invars
            ]
            outputs = _compat.bind(equation, inputs)
            values |= dict(zip(equation.outvars, outputs, strict=True))
        return [values[variable] for variable in closed.jaxpr.outvars]

    total = lambda outputs: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(outputs))  # noqa: E731
    assert jnp.array_equal(total(run(x)), total(function(x)))
    expected = jax.grad(lambda x: total(function(x)))(x)
    assert jnp.array_equal(jax.grad(lambda x: total(run(x)))(x), expected)


class Switched(nnx.Module):
    """A module with a switch."""

    def __init__(self):
        self.switch = None

    def _set(self, switch=None):
        self.switch = switch

    set_view = _compat.as_set_view(_set, nnx.Dropout.set_view)


def test_a_view_sets_what_is_used_and_refuses_the_rest():
    module: Any = nnx.List([Switched(), nnx.Dropout(0.5)])
    view: Any = nnx.view(module, switch="on", deterministic=True)
    assert (view[0].switch, view[1].deterministic, module[0].switch) == ("on", True, None)
    with pytest.raises(ValueError, match="Unused keys found"):
        nnx.view(module, swich="on")
