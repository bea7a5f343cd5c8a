"""To Flax, a module of ours is one call, as its own is: what its tools show of it."""

import contextlib
import dataclasses
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import bn_jax as bn

KINDS = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
X = jnp.ones((4, 3, 6)) * jnp.arange(4.0)[:, None, None]


class Block(nn.Module):
    library: object
    kind: str

    @nn.compact
    def __call__(self, x):
        options = {"num_groups": 2} if self.kind == "GroupNorm" else {}
        if self.kind == "BatchNorm":
            options["use_running_average"] = True
        return getattr(self.library, self.kind)(**options)(x)


class Net(nn.Module):
    library: object
    kind: str
    times: int = 2

    @nn.compact
    def __call__(self, x):
        block = Block(self.library, self.kind)
        for _ in range(self.times):
            x = block(x)
        return nn.Dense(2)(x)


def ours(kind):
    return Net(bn.linen, kind)


def flaxs(kind):
    return Net(nn, kind)


def alone(function):
    return function


WAYS = {
    "ours": (ours, alone),
    "replaced": (flaxs, bn.linen.replace_norms),
    "frozen": (flaxs, bn.linen.freeze),
}


@pytest.fixture(
    params=[(way, kind) for way in WAYS for kind in KINDS if way != "frozen"]
    + [("frozen", "BatchNorm")]
)
def pair(request):
    """A model of Flax's, ours, and what to wrap its functions with."""
    way, kind = request.param
    make, wrap = WAYS[way]
    return flaxs(kind), make(kind), wrap


def shown(table):
    """A table without the number of operations, which differs, and the widths that follow."""
    lines = [re.sub(r"[│┃]", "|", line) for line in table.splitlines()]
    return [[cell.strip() for cell in line.split("|")[:-3]] for line in lines if "|" in line]


@pytest.mark.parametrize(("show_repeated", "flops"), [(False, False), (True, True)])
def test_tabulate_shows_the_same_rows(pair, show_repeated, flops):
    theirs, model, wrap = pair
    options = {
        "show_repeated": show_repeated,
        "compute_flops": flops,
        "compute_vjp_flops": flops,
        "console_kwargs": {"width": 300, "force_terminal": False},
    }
    expected = theirs.tabulate(jax.random.key(0), X, **options)
    found = wrap(model.tabulate)(jax.random.key(0), X, **options)
    columns = slice(None, -2) if flops else slice(None)
    rows = lambda table: [row[columns] for row in shown(table)]  # noqa: E731
    assert rows(found) == rows(expected)
    assert any(KIND in str(rows(found)) for KIND in KINDS)


def test_captured_intermediates_have_the_same_names(pair):
    theirs, model, wrap = pair
    variables = theirs.init(jax.random.key(0), X)
    options = {"capture_intermediates": True, "mutable": ["intermediates"]}
    _, expected = theirs.apply(variables, X, **options)
    _, found = wrap(model.apply)(variables, X, **options)
    chex.assert_trees_all_equal_structs(found, expected)
    assert len(jax.tree.leaves(found)) >= 4


def test_interceptors_see_the_same_calls(pair):
    theirs, model, wrap = pair
    variables = theirs.init(jax.random.key(0), X)

    def calls(apply):
        seen = []

        def note(next_call, args, kwargs, context):
            seen.append((type(context.module).__name__, context.module.path, context.method_name))
            return next_call(*args, **kwargs)

        with nn.intercept_methods(note):
            apply(variables, X)
        return seen

    found = calls(wrap(model.apply))
    assert found == calls(theirs.apply)
    assert sum(name in KINDS for name, _, _ in found) == 2


@pytest.mark.parametrize("kind", [*KINDS, "BatchRenorm", "WhiteningNorm"])
def test_the_call_is_the_only_method(kind):
    layer = getattr(bn.linen, kind)
    methods = {
        name
        for cls in layer.__mro__
        if cls.__module__.startswith("bn_jax")
        for name, value in vars(cls).items()
        if callable(value) and not isinstance(value, staticmethod | type)
    } - {attribute.name for attribute in dataclasses.fields(layer)}
    assert {name for name in methods if not name.startswith("__")} == set()
    assert "__call__" in methods


def test_the_context_manager_is_deprecated():
    with pytest.warns(DeprecationWarning, match=r"replace_norms\(model.apply\)"):
        context = bn.linen.replace_norms()
    assert isinstance(context, contextlib.AbstractContextManager)
    x = jnp.array([[1e4 - 1], [1e4 + 1]])
    layer = nn.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    with context:
        y, _ = layer.apply(variables, x, mutable=["batch_stats"])
    assert jnp.allclose(y, jnp.array([[-1.0], [1.0]]), atol=1e-3)
