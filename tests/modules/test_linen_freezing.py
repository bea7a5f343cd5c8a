"""Freezing the norms of a Linen model by path, and replacing Flax's by ours."""

import functools
import re
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interfaces import STACKED
from support import (
    assert_close,
    define_affine,
    define_batch_norm,
    far_from_initial,
    standard_normal,
)

import bn_jax as bn
from bn_jax.linen.patching import norms_replaced

OURS, FLAX = bn.linen.BatchNorm, nn.BatchNorm
X = standard_normal(83, (8, 3)) + 1


def trained(layer, variables, x, **options):
    y, updates = layer.apply(variables, x, mutable=["batch_stats"], **options)
    return y, updates["batch_stats"]


def norm_of(block, name):
    if name in block.evaluated:
        return partial(OURS, use_running_average=True)
    return partial(block.kind, use_running_average=False)


class Block(nn.Module):
    """Two norms; those of which the name is among `evaluated` are ours and always evaluate."""

    kind: type
    evaluated: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(3)(x)
        for name in ("first", "second"):
            x = norm_of(self, name)(name=name)(jnp.sin(x) + 1)
        return x, None


class SetupBlock(nn.Module):
    kind: type
    evaluated: tuple[str, ...] = ()

    def setup(self):
        self.dense = nn.Dense(3, name="Dense_0")
        self.first, self.second = norm_of(self, "first")(), norm_of(self, "second")()

    def __call__(self, x, _=None):
        return self.second(jnp.sin(self.first(jnp.sin(self.dense(x)) + 1)) + 1), None


class Net(nn.Module):
    """Two blocks; the norms of the stem whose names are among `evaluated` always evaluate."""

    block: type
    kind: type
    evaluated: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x):
        x, _ = self.block(self.kind, self.evaluated, name="stem")(x)
        return self.block(self.kind, name="head")(x)[0]


BLOCKS = {
    "compact": Block,
    "setup": SetupBlock,
    "remat": nn.remat(Block),
    "scan": nn.scan(Block, length=2, **STACKED),
    "vmap": nn.vmap(SetupBlock, axis_size=2, in_axes=None, **STACKED),
    "vmap of remat": nn.vmap(nn.remat(Block), axis_size=2, in_axes=None, **STACKED),
}


@functools.cache
def net(block, kind):
    """A network, the same with an evaluating norm and with two, and shapes of the variables."""
    nets = [Net(BLOCKS[block], kind, names) for names in ((), ("first",), ("first", "second"))]
    return *nets, jax.eval_shape(nets[0].init, jax.random.key(0), X)


def program(apply, variables):
    """What is computed in training, as text."""
    step = jax.make_jaxpr(partial(apply, mutable=["batch_stats"]))
    return re.sub(" at 0x[0-9a-f]+", "", str(step(variables, X)))


# --- freezing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OURS, FLAX], ids=["ours", "flax"])
@pytest.mark.parametrize("block", BLOCKS)
def test_freezing_is_evaluation_in_training(block, kind):
    plain, first, both, variables = net(block, kind)
    trains = program(plain.apply, variables)
    for paths, expected in (
        (["stem/first"], first),
        (["st?m"], both),
        (["stem/f*", "s*/s*"], both),
    ):
        frozen = bn.linen.freeze(plain.apply, *paths, train_params=True)
        assert program(frozen, variables) == program(expected.apply, variables) != trains
    assert program(plain.apply, variables) == trains
    initial = jax.eval_shape(bn.linen.freeze(plain.init), jax.random.key(0), X)
    chex.assert_trees_all_equal(initial, variables)


def test_frozen_parameters_train_only_if_asked():
    class Small(nn.Module):
        evaluated: bool = False

        @nn.compact
        def __call__(self, x):
            return FLAX(False, name="last")(jnp.sin(FLAX(self.evaluated, name="norm")(x)))

    variables = far_from_initial(Small().init(jax.random.key(0), X))
    chex.assert_trees_all_equal(
        bn.linen.freeze(Small().init)(jax.random.key(0), X), Small().init(jax.random.key(0), X)
    )

    @partial(jax.jit, static_argnames="apply")
    def outcome(variables, apply):
        def loss(variables):
            y, updates = apply(variables, X, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, updates)

        return jax.grad(loss, has_aux=True)(variables)

    freeze = partial(bn.linen.freeze, Small().apply, "norm")
    frozen = [freeze(), freeze(train_params=True)]
    fixed, trains, (expected, aux) = (
        outcome(variables, apply) for apply in (*frozen, Small(evaluated=True).apply)
    )
    assert_close(trains, (expected, aux))
    of_frozen = expected["params"]["norm"]
    assert all(jnp.abs(leaf).max() > 0.01 for leaf in of_frozen.values())
    expected["params"]["norm"] = jax.tree.map(jnp.zeros_like, of_frozen)
    assert_close(fixed, (expected, aux))


def test_the_last_function_made_decides():
    plain, first, both, variables = net("compact", OURS)
    unfreeze, freeze = bn.linen.unfreeze, partial(bn.linen.freeze, train_params=True)
    for apply, expected in {
        unfreeze(freeze(plain.apply, "stem"), "stem/second"): first,
        unfreeze(freeze(plain.apply)): plain,
        unfreeze(freeze(plain.apply), "head"): both,
        freeze(bn.linen.freeze(plain.apply, "stem/*"), "stem"): both,
        freeze(unfreeze(freeze(plain.apply)), "stem/first"): first,
    }.items():
        assert program(apply, variables) == program(expected.apply, variables)


def test_unfreezing_leaves_attributes_as_they_are():
    layer = OURS(frozen=True)
    variables = far_from_initial(layer.init(jax.random.key(0), X))
    y = layer.apply(variables, X)
    assert_close(bn.linen.unfreeze(layer.apply)(variables, X), y)


def test_what_was_compiled_before_is_not_taken_for_the_frozen_model():
    layer = OURS(use_running_average=False)
    variables = far_from_initial(layer.init(jax.random.key(0), X))
    jitted = jax.jit(partial(layer.apply, mutable=["batch_stats"]))
    frozen = bn.linen.freeze(jitted)
    expected = define_affine(
        X, *variables["batch_stats"].values(), *(variables["params"][n] for n in ("scale", "bias"))
    )
    before = jitted(variables, X)
    for _ in range(2):
        assert_close(frozen(variables, X), (expected, {"batch_stats": variables["batch_stats"]}))
        chex.assert_trees_all_equal(jitted(variables, X), before)


def test_freezing_what_nn_jit_has_compiled():
    model, expected = nn.jit(Block)(FLAX), nn.jit(Block)(OURS, ("first", "second"))
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    before = program(model.apply, variables)
    frozen = bn.linen.freeze(model.apply, train_params=True)
    for _ in range(2):
        assert program(frozen, variables) == program(expected.apply, variables) != before
        assert program(model.apply, variables) == before
    with pytest.raises(ValueError, match=r"cannot tell the norms of several JitBlock apart"):
        program(bn.linen.freeze(model.apply, "first"), variables)


def test_paths_that_match_no_norm():
    plain, _, _, variables = net("compact", OURS)
    for change in (bn.linen.freeze, bn.linen.unfreeze):
        message = (
            r"whose path matches \['stam', 'x/\*'\]; .* \['head/first', 'head/second', 'stem/first'"
        )
        with pytest.raises(ValueError, match=message):
            program(change(plain.apply, "stam", "stem", "x/*"), variables)


WRAPPERS = [bn.linen.freeze, bn.linen.unfreeze, bn.linen.replace_norms]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_a_model_without_norms(wrap):
    dense = nn.Dense(3)
    variables = dense.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"^apply called no .*norm.*: pass a|Pass a function that"):
        wrap(dense.apply)(variables, X)
    for patterns in (["layer"], ["*"]) if wrap is not bn.linen.replace_norms else ():
        with pytest.raises(ValueError, match=r"^apply called no batch norm, .*such as model.apply"):
            wrap(dense.apply, *patterns)(variables, X)


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_what_is_no_function(wrap):
    layer = FLAX(use_running_average=True)
    for apply, message in {
        layer: "apply has type BatchNorm, a module, .*: pass model.apply",
        nnx.BatchNorm(3, rngs=nnx.Rngs(0)): "BatchNorm, an nnx.Module, .* bn_jax.nnx has functions",
        3: "apply has type int, expected a function: pass model.apply",
    }.items():
        with pytest.raises(TypeError, match=message):
            wrap(apply)


class Derived(nn.BatchNorm):
    """A subclass of a user."""


def test_a_subclass_is_left_alone():
    x = 1e4 + X
    layer = Derived(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(
        TypeError, match=r"'' is a Derived, .*derive it from bn_jax.linen.BatchNorm"
    ):
        bn.linen.freeze(layer.apply)(variables, x, mutable=["batch_stats"])
    with norms_replaced():
        chex.assert_trees_all_equal(*(trained(layer, variables, x) for _ in range(2)))
        found = trained(layer, variables, x)
    chex.assert_trees_all_equal(found, trained(layer, variables, x))


# --- migration ------------------------------------------------------------------------------------


# Every layer that is replaced, with what it needs to be given.
REPLACED: dict[Any, dict[str, Any]] = {
    FLAX: dict(use_running_average=False),
    nn.LayerNorm: {},
    nn.RMSNorm: {},
    nn.GroupNorm: dict(num_groups=1),
    nn.InstanceNorm: {},
}


def test_every_layer_of_flax_with_a_namesake_here_is_replaced():
    named = [name for name in vars(bn.linen) if name.endswith("Norm")]
    namesakes = {getattr(nn, name) for name in named if hasattr(nn, name)}
    assert set(REPLACED) == namesakes


@pytest.mark.parametrize("kind", REPLACED, ids=lambda kind: kind.__name__)
def test_replaced_norms_are_ours(kind):
    ours, key = getattr(bn.linen, kind.__name__), jax.random.key(0)
    variables = kind(**REPLACED[kind]).init(key, X)
    for lift in (lambda one: one, nn.remat, nn.jit):
        model, expected = (lift(one)(**REPLACED[kind]) for one in (kind, ours))
        outside, inside = (program(one.apply, variables) for one in (model, expected))
        with norms_replaced():
            assert program(model.apply, variables) == inside != outside
            chex.assert_trees_all_equal(model.init(key, X), variables)
        assert program(model.apply, variables) == outside
        decorated = bn.linen.replace_norms(model.apply)
        assert program(decorated, variables) == inside


def test_what_calls_no_norm():
    replace, dense = bn.linen.replace_norms, nn.Dense(3)
    variables = dense.init(jax.random.key(0), X)
    message = r"apply called no norm .*: no nn.BatchNorm, .*, only Dense\. Pass a function that "
    for apply in (jax.jit(dense.apply), lambda *args: dense.apply(*args)):
        replaced = replace(apply)
        with pytest.warns(UserWarning, match=message) as warned:
            replaced(variables, X)
        assert warned[0].filename == __file__
        replaced(variables, X)  # Not again.
    with pytest.warns(UserWarning, match=message):
        replace(dense.apply)(variables, X, method=dense.__call__)
    derived = Derived(use_running_average=False)
    with pytest.raises(ValueError, match=r"only Derived.* must derive from bn_jax.linen's"):
        replace(derived.init)(jax.random.key(0), X)
    # A norm of ours is one, whether it is replaced or not.
    own = type("Own", (bn.linen.LayerNorm,), {})
    for layer in (OURS(True), bn.linen.WhiteningNorm(use_running_average=True), own()):
        jax.eval_shape(replace(layer.init), jax.random.key(0), X)


class Compiled(nn.Module):
    """A module whose call is compiled."""

    kind: Any

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return self.kind()(x)


def test_norms_in_what_was_compiled_before_are_not_missed():
    key, bare = jax.random.key(0), partial(FLAX, use_running_average=True, use_scale=False)
    layers = [
        nn.jit(nn.Sequential)([bare()]),
        nn.Sequential([Compiled(bare)]),
        nn.Sequential([Compiled(nn.LayerNorm)]),
    ]
    calls: list[Any] = [(model.apply, (model.init(key, X),)) for model in layers]
    calls.append((jax.jit(partial(layers[0].apply, calls[0][1][0])), ()))  # Hides its variables.
    for apply, variables in 2 * calls:
        bn.linen.replace_norms(apply)(*variables, X)


def test_replacing_and_freezing_all_norms():
    layer = FLAX(use_running_average=False)
    variables = layer.init(jax.random.key(0), X)
    for apply in (
        bn.linen.freeze(bn.linen.replace_norms(layer.apply)),
        bn.linen.replace_norms(bn.linen.freeze(layer.apply)),
    ):
        _, updates = apply(variables, X, mutable=["batch_stats"])
        chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])
    model = nn.Sequential([nn.Dense(3), layer])
    variables = model.init(jax.random.key(0), X)
    closed = bn.linen.replace_norms(lambda x: model.apply(variables, x))
    bn.linen.freeze(closed)(X)


def test_replacing_in_what_was_compiled_before():
    layer, x = FLAX(use_running_average=False), 1e4 + X
    variables = layer.init(jax.random.key(0), x)
    call = jax.jit(partial(layer.apply, mutable=["batch_stats"]))
    outside = call(variables, x)
    expected, stats = define_batch_norm(variables["params"], variables["batch_stats"], x)
    with norms_replaced():
        assert_close(call(variables, x), (expected, {"batch_stats": stats}))
    chex.assert_trees_all_equal(call(variables, x), outside)
    assert np.abs(outside[0] - expected).max() > 0.01


def test_replacing_is_invisible():
    model, key = Block(FLAX), jax.random.key(0)
    variables = model.init(key, X)

    def look():
        captured = model.apply(variables, X, capture_intermediates=True, mutable=True)
        return jax.tree.map(jnp.shape, captured), model.tabulate(key, X)

    bound = FLAX(use_running_average=True).bind(FLAX(True).init(key, X))
    expected = look()
    with norms_replaced(), norms_replaced():
        assert look() == expected
        bound(X)
    assert type(bound) is FLAX


def test_replacing_and_freezing():
    plain, _, _, variables = net("compact", FLAX)
    _, first, _, _ = net("compact", OURS)
    expected = program(first.apply, variables)
    freeze = partial(bn.linen.freeze, train_params=True)
    with norms_replaced():
        assert program(freeze(plain.apply, "stem/first"), variables) == expected
    replaced = bn.linen.replace_norms(plain.apply)
    assert program(freeze(replaced, "stem/first"), variables) == expected
