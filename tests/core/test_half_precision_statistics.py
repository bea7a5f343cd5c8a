"""Running statistics that arrive in half precision: updates return at least float32.

In half precision, a running mean of 8 does not move towards 10 by a momentum of 0.99: the step,
0.02, is less than half a unit in the last place of bfloat16 there. A count stops at 256.
"""

from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from support import assert_close, exact, standard_normal

import bn_jax as bn
from bn_jax import training

HALVES = [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.exhaustive)]
FEATURES = 4
pytestmark = pytest.mark.usefixtures("compile_quickly")

X = standard_normal(0, (64, FEATURES)) * 3 + 10

TRAIN: Any = partial(bn.batch_norm, use_running_average=False)
RENORM: Any = partial(bn.batch_renorm, use_running_average=False)
WHITEN: Any = partial(bn.whitening_norm, use_running_average=False, group_size=2)


def halved(tree, half=jnp.bfloat16):
    """What one line of many programs does with all variables."""
    return jax.tree.map(lambda leaf: leaf.astype(half), tree)


def stalled(spread, *, counted=True):
    """Statistics that an update in half precision would leave as they are."""
    stats = {"mean": jnp.full(FEATURES, 8.0)}
    if spread == "var":
        stats |= {"var": jnp.full(FEATURES, 8.0)}
    else:
        stats |= {"cov": jnp.full((2, 2, 2), 8.0)}
    if counted:
        stats["count"] = jnp.full(FEATURES if spread == "var" else 2, 256.0)
    return stats


def define_spread(x, spread):
    """The variance, or the covariances of pairs of features, in double precision."""
    parts = exact(x) - exact(x).mean(0)
    if spread == "var":
        return np.square(parts).mean(0)
    pairs = parts.reshape(len(x), 2, 2)
    return np.einsum("ngi,ngj->gij", pairs, pairs) / len(x)


def define_update(stats, x, spread, momentum=0.99):
    """The running average in double precision."""
    weight = 1 / (exact(stats["count"])[0] + 1) if momentum is None else 1 - momentum
    moments = {"mean": exact(x).mean(0), spread: define_spread(x, spread)}
    new = {name: (1 - weight) * exact(stats[name]) + weight * moments[name] for name in moments}
    return new | ({"count": exact(stats["count"]) + 1} if "count" in stats else {})


# --- pure functions -------------------------------------------------------------------------------

NORMS = {"batch norm": (TRAIN, "var"), "renorm": (RENORM, "var"), "whitening": (WHITEN, "cov")}


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("momentum", [0.99, None])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", NORMS)
def test_an_update_is_that_of_double_precision(name, half, momentum):
    norm, spread = NORMS[name]
    old, x = halved(stalled(spread), half), X.astype(half)
    _, updated = norm({}, old, x, momentum=momentum)
    assert_close(updated, define_update(old, x, spread, momentum), dtype=jnp.float32)


def test_two_halves_of_a_call_update_as_the_call():
    old, x = halved(stalled("var")), X.astype(jnp.bfloat16)
    _, moments = bn.normalize_by_batch({}, old, x)
    for given in moments, halved(moments):
        updated = bn.update_batch_stats(old, given)
        assert_close(updated["count"], np.full(FEATURES, 257), dtype=jnp.float32)
    assert_close(bn.update_batch_stats(old, moments), define_update(old, x, "var"))


@pytest.mark.parametrize("half", HALVES)
def test_the_running_average_arrives(half):
    """In half precision it ends at 8.00 in bfloat16."""
    x, steps = X.astype(half), 3000
    stats = bn.promote_batch_stats(halved(bn.init_batch_stats(FEATURES, use_count=True), half))

    @jax.jit
    def train(stats):
        return jax.lax.fori_loop(0, steps, lambda _, stats: TRAIN({}, stats, x)[1], stats)

    found, left = train(stats), 0.99**steps
    expected = {
        "mean": (1 - left) * exact(x).mean(0),
        "var": left + (1 - left) * exact(x).var(0),
        "count": np.full(FEATURES, steps),
    }
    assert_close(found, expected, dtype=jnp.float32)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", NORMS)
def test_an_update_that_is_skipped_has_the_type_of_the_others(name, half):
    norm, spread = NORMS[name]
    old, x = halved(stalled(spread), half), X.astype(half)
    empty = jnp.zeros((len(x), 1), bool)
    for skipped in norm({}, old, x * jnp.nan), norm({}, old, x, mask=empty):
        chex.assert_trees_all_equal(skipped[1], bn.promote_batch_stats(old), strict=True)
    poisoned = norm({}, old, x.at[0, 0].set(jnp.inf))[1]
    chex.assert_trees_all_equal_dtypes(poisoned, bn.promote_batch_stats(old))


def test_wider_statistics_keep_their_types():
    with jax.enable_x64(True):
        for dtype in (jnp.float64, jnp.complex64, jnp.complex128):
            stats = bn.init_batch_stats(FEATURES, dtype=dtype, use_count=True)
            assert stats["mean"].dtype == dtype
            assert bn.promote_batch_stats(stats)["mean"] is stats["mean"]
            updated = TRAIN({}, stats, X.astype(dtype))[1]
            chex.assert_trees_all_equal_shapes_and_dtypes(updated, stats)
        complex_mean = TRAIN({}, halved(bn.init_batch_stats(FEATURES)), X.astype(jnp.complex64))[1]
        assert complex_mean["mean"].dtype == jnp.complex64
        assert complex_mean["var"].dtype == jnp.float32


@pytest.mark.parametrize("half", HALVES)
def test_new_statistics_are_never_in_half_precision(half):
    made: list[Any] = [
        bn.init_batch_stats(2, dtype=half, use_count=True),
        bn.init_whitening_stats(2, dtype=half, use_count=True),
    ]
    for options in ({}, dict(force_float32_reductions=False, param_dtype=half)):
        layer = bn.linen.BatchNorm(use_running_average=False, momentum=None, **options)
        variables = layer.init(jax.random.key(0), X.astype(half))
        made.append(variables["batch_stats"])
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("use_running_average", [True, False])
def test_what_is_measured_is_counted_in_float32(use_running_average):
    old, x = stalled("var"), X.astype(jnp.bfloat16)
    state = halved(bn.start_measuring(old))
    for _ in range(5):
        _, state = bn.batch_norm({}, state, x, use_running_average=use_running_average)
    measured = state.pop("measured")
    chex.assert_trees_all_equal(state, halved(old), strict=True)
    expected = np.full(FEATURES, 320), exact(x).mean(0), exact(x).var(0)
    assert_close(tuple(measured[:3]), expected, dtype=jnp.float32)


# --- a carried state ------------------------------------------------------------------------------


def step(stats, x):
    y, stats = TRAIN({}, stats, x)
    return stats, y


CARRIED = {
    "scan": lambda stats, xs: jax.lax.scan(step, stats, xs)[0],
    "fori_loop": lambda stats, xs: jax.lax.fori_loop(
        0, len(xs), lambda index, stats: step(stats, xs[index])[0], stats
    ),
    "while_loop": lambda stats, xs: jax.lax.while_loop(
        lambda stats: stats["count"][0] < 256 + len(xs),
        lambda stats: step(stats, xs[0])[0],
        stats,
    ),
    "cond": lambda stats, xs: jax.lax.cond(
        xs.max() > 1e6,
        lambda stats: stats,
        lambda stats: step(step(stats, xs[0])[0], xs[1])[0],
        stats,
    ),
}


@pytest.mark.parametrize("name", CARRIED)
def test_a_promoted_state_keeps_its_type_as_a_carry(name):
    old, xs = halved(stalled("var")), jnp.stack([X, X]).astype(jnp.bfloat16)
    with pytest.raises(TypeError, match="float32"):
        CARRIED[name](old, xs)
    found = CARRIED[name](bn.promote_batch_stats(old), xs)
    expected = define_update(define_update(old, xs[0], "var"), xs[1], "var")
    assert_close(found, expected, dtype=jnp.float32)


def test_a_whitening_state_keeps_its_type_as_a_carry():
    old, xs = halved(stalled("cov")), jnp.stack([X, X]).astype(jnp.bfloat16)
    found, _ = jax.lax.scan(
        lambda stats, x: WHITEN({}, stats, x)[::-1], bn.promote_batch_stats(old), xs
    )
    expected = define_update(define_update(old, xs[0], "cov"), xs[1], "cov")
    assert_close(found, expected, dtype=jnp.float32)


def test_promotion_changes_half_precision_alone():
    key = jax.random.key(0)
    tree = {
        "norm": halved(stalled("var")),
        "numpy": [np.ones(2, jnp.bfloat16), np.ones(2, np.float64)],
        "other": (jnp.ones(2), jnp.arange(2), jnp.ones(2, bool), key, 1.0, None),
    }
    found = bn.promote_batch_stats(tree)
    chex.assert_trees_all_equal_structs(found, tree)
    assert {leaf.dtype for leaf in found["norm"].values()} == {jnp.dtype(jnp.float32)}
    assert [leaf.dtype for leaf in found["numpy"]] == [np.float32, np.float64]
    assert all(one is other for one, other in zip(found["other"], tree["other"], strict=True))
    abstract = jax.eval_shape(bn.promote_batch_stats, tree["norm"])
    assert abstract["mean"].dtype == jnp.float32


def test_promotion_refuses_parameters():
    variables = halved({"params": bn.init_params(2), "batch_stats": bn.init_batch_stats(2)})
    with pytest.raises(ValueError, match=r"tree has \['batch_stats', 'params'\].*batch_stats'\]"):
        bn.promote_batch_stats(variables)
    assert bn.promote_batch_stats(variables["batch_stats"])["var"].dtype == jnp.float32


# --- Flax -----------------------------------------------------------------------------------------

LAYERS = {
    "batch norm": ("BatchNorm", "var", {}),
    "renorm": ("BatchRenorm", "var", {}),
    "whitening": ("WhiteningNorm", "cov", {"group_size": 2}),
}


def linen_layer(name):
    kind, spread, options = LAYERS[name]
    return getattr(bn.linen, kind)(use_running_average=False, **options), spread


def nnx_layer(name, **others):
    kind, spread, options = LAYERS[name]
    return getattr(bn.nnx, kind)(FEATURES, rngs=nnx.Rngs(0), **options, **others), spread


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", LAYERS)
def test_linen_layers_promote(name, half):
    (layer, spread), x = linen_layer(name), X.astype(half)
    variables = halved({"params": bn.init_params(FEATURES), "batch_stats": stalled(spread)}, half)
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    assert y.dtype == half
    expected = define_update(variables["batch_stats"], x, spread)
    assert_close(updates["batch_stats"], expected, dtype=jnp.float32)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", LAYERS)
def test_nnx_layers_promote(name, half):
    (layer, spread), x = nnx_layer(name), X.astype(half)
    old = halved(stalled(spread, counted=False), half)
    nnx.update(layer, halved(nnx.state(layer), half))
    nnx.update(layer, nnx.State(jax.tree.map(nnx.BatchStat, old)))
    assert layer(x, use_running_average=True).dtype == half
    first = layer(x)
    found = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
    assert_close(found, define_update(old, x, spread), dtype=jnp.float32)
    assert layer(x).dtype == first.dtype


def test_replaced_norms_of_flax_promote():
    model = nn.BatchNorm(use_running_average=False)
    variables = halved({"params": bn.init_params(FEATURES), "batch_stats": stalled("var")})
    apply = bn.linen.replace_norms(model.apply)
    _, updates = apply(variables, X.astype(jnp.bfloat16), mutable=["batch_stats"])
    expected = define_update(variables["batch_stats"], X.astype(jnp.bfloat16), "var")
    assert_close(updates["batch_stats"], expected, dtype=jnp.float32)


def test_linen_scans_need_promoted_statistics():
    xs = jnp.stack([X, X]).astype(jnp.bfloat16)

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, xs):
            def body(layer, carry, x):
                return carry, layer(x)

            scan = nn.scan(body, variable_broadcast="params", variable_carry="batch_stats",
                           split_rngs={"params": False})  # fmt: skip
            return scan(bn.linen.BatchNorm(use_running_average=False, name="norm"), None, xs)[1]

    stats = halved(stalled("var"))
    variables = {"params": {"norm": halved(bn.init_params(FEATURES))}}

    def run(stats):
        apply = partial(Scanned().apply, mutable=["batch_stats"])
        return jax.jit(apply)(variables | {"batch_stats": {"norm": stats}}, xs)

    with pytest.raises(TypeError, match="float32"):
        run(stats)
    y, updates = run(bn.promote_batch_stats(stats))
    assert y.dtype == jnp.bfloat16
    expected = define_update(define_update(stats, xs[0], "var"), xs[1], "var")
    assert_close(updates["batch_stats"]["norm"], expected, dtype=jnp.float32)


def test_nnx_scans_need_promoted_statistics_and_jit_does_not():
    xs, old = jnp.stack([X, X]).astype(jnp.bfloat16), halved(stalled("var", counted=False))

    @nnx.jit
    def train(layer, xs):
        scanned = nnx.scan(
            lambda layer, x: (layer, layer(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)
        )
        return scanned(layer, xs)[1]

    def made():
        layer, _ = nnx_layer("batch norm")
        nnx.update(layer, nnx.State(jax.tree.map(nnx.BatchStat, old)))
        return layer

    def statistics(layer):
        return nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    with pytest.raises(TypeError, match="float32"):
        train(made(), xs)
    layer, by_jit = made(), made()
    nnx.update(layer, bn.promote_batch_stats(nnx.state(layer, nnx.BatchStat)))
    train(layer, xs)
    step = nnx.jit(lambda layer, x: layer(x))
    for x in xs:
        step(by_jit, x)
    expected = define_update(define_update(old, xs[0], "var"), xs[1], "var")
    for found in layer, by_jit:
        assert_close(statistics(found), expected, dtype=jnp.float32)


# --- training, and what is done to a model afterwards ---------------------------------------------


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train, mask=None):
        norm = bn.linen.BatchNorm(use_running_average=not train, name="norm")
        y = norm(x, mask=None if mask is None else mask[:, None])
        return nn.Dense(3, dtype=x.dtype)(y)


def half_state():
    model = Model()
    variables = halved(model.init(jax.random.key(0), X, train=False))
    return training.TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats={"norm": halved(stalled("var", counted=False))},
        tx=optax.sgd(0.1),
    )


def forward(variables, x):
    return Model().apply(variables, x, train=False, mutable=["batch_stats"])


@pytest.mark.parametrize("whole_batch_statistics", [True, False])
def test_accumulated_steps_promote(whole_batch_statistics):
    state, x = half_state(), X.astype(jnp.bfloat16)
    batch = training.Batch(x, jnp.zeros(len(x), int), jnp.ones(len(x), bool))
    step = jax.jit(
        partial(
            training.accumulated_train_step,
            micro_batches=2,
            whole_batch_statistics=whole_batch_statistics,
        )
    )
    old = state.batch_stats["norm"]
    state, _ = step(state, batch)
    assert_close(state.batch_stats["norm"], define_update(old, x, "var"), dtype=jnp.float32)


def test_training_steps_promote_and_scan_a_promoted_state():
    state, x = half_state(), X.astype(jnp.bfloat16)
    batch = training.Batch(x, jnp.zeros(len(x), int), jnp.ones(len(x), bool))
    old = state.batch_stats["norm"]
    once, _ = jax.jit(training.train_step)(state, batch)
    assert_close(once.batch_stats["norm"], define_update(old, x, "var"), dtype=jnp.float32)
    state = state.replace(batch_stats=bn.promote_batch_stats(state.batch_stats))
    twice, _ = jax.lax.scan(
        lambda state, _: training.train_step(state, batch), state, None, length=2
    )
    expected = define_update(define_update(old, x, "var"), x, "var")
    assert_close(twice.batch_stats["norm"], expected, dtype=jnp.float32)


def test_recalibration_returns_at_least_float32():
    state, x = half_state(), X.astype(jnp.bfloat16)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    found = bn.recalibrate(forward, variables, [x[:16], x[16:]]).batch_stats["norm"]
    expected = {"mean": exact(x).mean(0), "var": exact(x).var(0)}
    assert_close(found, expected, dtype=jnp.float32)


def test_the_statistics_of_devices_are_merged_in_at_least_float32():
    stats = stalled("var")
    kept = {"norm": {name: jnp.stack([stats[name], 1.5 * stats[name]]) for name in stats}}
    kept = halved(kept)
    found = training.sync_batch_stats(kept)["norm"]
    mean = (256 * 8 + 384 * 12) / 640
    var = (256 * (8 + (mean - 8) ** 2) + 384 * (12 + (mean - 12) ** 2)) / 640
    expected = {name: np.full(FEATURES, value) for name, value in
                {"count": 640, "mean": mean, "var": var}.items()}  # fmt: skip
    assert_close(found, expected, dtype=jnp.float32)


# --- checkpoints in half precision ----------------------------------------------------------------


def through_bytes(saved, target, folder):
    return serialization.from_bytes(target, serialization.to_bytes(saved))


def through_state_dict(saved, target, folder):
    return serialization.from_state_dict(target, serialization.to_state_dict(saved))


def through_orbax(saved, target, folder):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "variables", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "variables", target)


def through_safetensors(saved, target, folder):
    pytest.importorskip("safetensors")
    path = folder / "variables.safetensors"
    bn.convert.save_safetensors(path, bn.convert.to_library(saved, "pytorch"))
    return bn.convert.from_library(bn.convert.load_safetensors(path), "pytorch", like=target)


CHECKPOINTS = [through_bytes, through_state_dict, through_orbax, through_safetensors]


@pytest.mark.parametrize("load", CHECKPOINTS)
def test_a_checkpoint_in_half_precision_is_trained_further(load, tmp_path):
    layer = bn.linen.BatchNorm(use_running_average=False, momentum=None)
    x = X.astype(jnp.bfloat16)
    saved = halved({"params": bn.init_params(FEATURES), "batch_stats": stalled("var")})
    for target in layer.init(jax.random.key(0), X), saved:
        folder = tmp_path / str(target["batch_stats"]["var"].dtype)
        folder.mkdir()
        loaded = load(saved, target, folder)
        chex.assert_trees_all_equal(bn.promote_batch_stats(loaded["batch_stats"]),
                                    bn.promote_batch_stats(saved["batch_stats"]))  # fmt: skip
        _, updates = layer.apply(loaded, x, mutable=["batch_stats"])
        expected = define_update(saved["batch_stats"], x, "var", momentum=None)
        assert_close(updates["batch_stats"], expected, dtype=jnp.float32)


def test_variables_of_the_lab_in_half_precision_are_restored(tmp_path):
    checkpoints = pytest.importorskip("bn_jax.lab.checkpoints")
    state = half_state()
    checkpoints.save_variables(tmp_path / "half", state)
    wide = state.replace(batch_stats=bn.promote_batch_stats(state.batch_stats))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for target in state, wide:
        found = checkpoints.restore_variables(tmp_path / "half", target, here)
        chex.assert_trees_all_equal(found.batch_stats, target.batch_stats, strict=True)
