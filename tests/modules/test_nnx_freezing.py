"""Freezing the norms of an NNX model by path, and replacing Flax's by ours."""

from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from interfaces import Nnx, call, fill, params_of, stats_of
from support import (
    assert_close,
    define_batch_norm,
    define_evaluation,
    standard_normal,
)

import bn_jax as bn

OURS, FLAX = bn.nnx.BatchNorm, nnx.BatchNorm


def make(kind=OURS, **options):
    return Nnx(kind, **options).layer


# --- switches and paths ---------------------------------------------------------------------------


def test_a_view_has_switches_of_its_own():
    layer = make(update_running_average=False)
    view = bn.nnx.freeze(nnx.view(layer))
    assert (view.frozen, view.train_params, view.update_running_average) == (True, False, False)
    assert (layer.frozen, layer.train_params, layer.update_running_average) == (False, True, False)
    assert nnx.view(view, use_running_average=True).frozen
    assert view.mean is layer.mean


class Tree(nnx.Module):
    """Norms wherever a module can hold them, one of them in two places, and a cycle."""

    other: nnx.Module

    def __init__(self, kind, rngs):
        def norm():
            return kind(3, momentum=0.5, rngs=rngs)

        self.stem = norm()
        self.blocks = nnx.List([norm(), nnx.Dict(norm=norm(), again=self.stem)])
        self.chain = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), norm())
        self.pair = nnx.data((norm(), {"inner": norm()}))
        self.whole = self

    def __call__(self, x):
        for layer in (self.stem, self.blocks[0], self.blocks[1]["norm"], self.chain, self.pair[0]):
            x = jnp.sin(layer(x)) + 1
        return self.pair[1]["inner"](self.stem(x))


NORMS = {
    "stem": lambda tree: tree.stem,
    "blocks/0": lambda tree: tree.blocks[0],
    "blocks/1/norm": lambda tree: tree.blocks[1]["norm"],
    "chain/layers/1": lambda tree: tree.chain.layers[1],
    "pair/0": lambda tree: tree.pair[0],
    "pair/1/inner": lambda tree: tree.pair[1]["inner"],
}


def frozen_of(tree):
    return {path for path, find in NORMS.items() if find(tree).frozen}


@pytest.mark.parametrize(
    "patterns,expected",
    [
        ([], set(NORMS)),
        (["blocks"], {"stem", "blocks/0", "blocks/1/norm"}),
        (["blocks/1/again"], {"stem"}),
        (["chain/*", "pair/1"], {"chain/layers/1", "pair/1/inner"}),
        (["*/0", "stem"], {"blocks/0", "pair/0", "stem"}),
    ],
)
def test_freezing_by_path(patterns, expected):
    tree = Tree(OURS, nnx.Rngs(0))
    assert bn.nnx.freeze(tree, *patterns) is tree
    assert frozen_of(tree) == expected
    assert all(find(tree).train_params == (path not in expected) for path, find in NORMS.items())
    tree.eval()
    tree.train()
    assert frozen_of(nnx.merge(*nnx.split(tree))) == frozen_of(nnx.clone(tree)) == expected
    del tree.whole
    assert frozen_of(nnx.view(tree, use_running_average=False)) == expected
    kept = expected - {"stem"}
    if "stem" in expected:
        assert bn.nnx.unfreeze(tree, "s?em") is tree
        assert frozen_of(tree) == kept
        assert tree.stem.train_params
    bn.nnx.freeze(tree, train_params=True)
    assert frozen_of(tree) == set(NORMS)
    assert all(find(tree).train_params for find in NORMS.values())


def test_a_frozen_layer_is_not_what_was_compiled_before():
    x = standard_normal(83, (8, 3))
    model = nnx.Sequential(make(), make(momentum=0.5))
    step = nnx.jit(call)
    step(model, x)
    bn.nnx.freeze(model, "layers/0").train()
    params, stats = params_of(model.layers[0]), stats_of(model.layers[0])
    inner = define_evaluation(params, stats, x)
    expected = define_batch_norm(
        params_of(model.layers[1]), stats_of(model.layers[1]), inner, momentum=0.5
    )
    y = step(model, x)
    assert_close((y, stats_of(model.layers[1])), expected)
    chex.assert_trees_all_equal(stats_of(model.layers[0]), stats)


def test_what_cannot_be_frozen():
    tree = Tree(OURS, nnx.Rngs(0))
    for change in (bn.nnx.freeze, bn.nnx.unfreeze):
        message = (
            r"matches 'steam'; the batch norms have the paths \['blocks/0', 'blocks/1/again', "
        )
        with pytest.raises(ValueError, match=message):
            change(tree, "stem", "steam")
    assert frozen_of(tree) == set()
    with pytest.raises(TypeError, match=r"'layers/0' is a flax.*replace_norms\(model\) first"):
        bn.nnx.freeze(nnx.Sequential(make(FLAX)))


CHANGES = [bn.nnx.freeze, bn.nnx.unfreeze, bn.nnx.replace_norms]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_models_without_norms(change):
    linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    for model in (linear, [linear], nnx.Sequential(linear)):
        with pytest.raises(ValueError, match=r"^model has no .*norm.* Pass the model that holds"):
            change(model)
    if change is not bn.nnx.replace_norms:
        with pytest.raises(ValueError, match="such as LayerNorm, have nothing to freeze"):
            change(nnx.LayerNorm(3, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_no_model(change):
    message = "model has type BatchNorm, of flax.linen, .*: bn_jax.linen has functions of the same"
    with pytest.raises(TypeError, match=message):
        change(nn.BatchNorm())
    state = nnx.state(make())
    for model in (3, None, jnp.ones(3), {"scale": jnp.ones(3)}, state, [nn.BatchNorm()], FLAX):
        message = f"model has type {type(model).__name__}, expected an nnx.Module, or a tree of"
        with pytest.raises(TypeError, match=message):
            change(model)


# --- migration ------------------------------------------------------------------------------------


# Every layer that is replaced, with its first argument and what is given beside it.
REPLACED: dict[Any, tuple[tuple[int, ...], dict[str, Any]]] = {
    FLAX: ((3,), {"momentum": 0.5}),
    nnx.LayerNorm: ((3,), {}),
    nnx.RMSNorm: ((3,), {}),
    nnx.GroupNorm: ((3,), {"num_groups": 1}),
    nnx.InstanceNorm: ((3,), {}),
}


def test_every_layer_of_flax_with_a_namesake_here_is_replaced():
    named = [name for name in vars(bn.nnx) if name.endswith("Norm")]
    namesakes = {getattr(nnx, name) for name in named if hasattr(nnx, name)}
    assert set(REPLACED) == namesakes


@pytest.mark.parametrize("kind", REPLACED, ids=lambda kind: kind.__name__)
def test_a_replaced_norm_is_ours(kind):
    sizes, options = REPLACED[kind]
    ours = getattr(bn.nnx, kind.__name__)
    made, replaced, theirs = (
        fill(one(*sizes, **options, rngs=nnx.Rngs(0))) for one in (ours, kind, kind)
    )
    step, x = nnx.jit(call), 1e4 + standard_normal(84, (4, 4, 3))
    before = step(replaced, x)
    nnx.update(replaced, nnx.clone(nnx.state(made)))
    variables = {name: getattr(replaced, name) for name in nnx.state(replaced)}
    assert bn.nnx.replace_norms(replaced) is replaced
    assert type(replaced) is ours
    assert all(getattr(replaced, name) is one for name, one in variables.items())
    # One graph, and so what is compiled for the one is for the other.
    assert nnx.graphdef(replaced) == nnx.graphdef(made) != nnx.graphdef(theirs)
    assert_close(step(replaced, x), step(made, x))
    assert_close(nnx.to_pure_dict(nnx.state(replaced)), nnx.to_pure_dict(nnx.state(made)))
    # The mean square alone does not cancel.
    assert (jnp.abs(before - step(made, x)).max() > 0.01) == (kind is not nnx.RMSNorm)


class Derived(nnx.BatchNorm):
    """A subclass of a user."""


def test_replacing_twice_and_what_is_not_replaced():
    for layer in (make(), bn.nnx.WhiteningNorm(3, rngs=nnx.Rngs(0))):
        kind = type(layer)
        assert type(bn.nnx.replace_norms(bn.nnx.replace_norms(layer))) is kind
    with pytest.raises(ValueError, match=r"; Derived must derive from the norms of bn_jax.nnx"):
        bn.nnx.replace_norms(nnx.List([Derived(3, rngs=nnx.Rngs(0))]))


def test_replacing_in_a_model():
    x = standard_normal(85, (8, 3)) + 1
    tree, theirs = Tree(FLAX, nnx.Rngs(0)), Tree(FLAX, nnx.Rngs(0))
    optimizer, expected = (
        nnx.Optimizer(one, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param) for one in (tree, theirs)
    )
    tree.other = Derived(3, rngs=nnx.Rngs(0))
    assert bn.nnx.replace_norms(tree) is tree
    assert {type(find(tree)) for find in NORMS.values()} == {OURS}
    assert tree.blocks[1]["again"] is tree.stem
    assert type(tree.other) is Derived
    del tree.other

    @nnx.jit
    def step(model, optimizer):
        gradient = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
        optimizer.update(model, gradient)

    step(tree, optimizer)
    step(theirs, expected)
    assert_close(nnx.to_pure_dict(nnx.state(tree)), nnx.to_pure_dict(nnx.state(theirs)))
