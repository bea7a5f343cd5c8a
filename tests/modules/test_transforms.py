"""Linen and NNX layers under the transforms of JAX and those that Flax lifts."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from interfaces import (
    INTERFACES,
    SCANS,
    SHARED,
    STACKED,
    Linen,
    Nnx,
    by_apply,
    by_jax_scan,
    call,
    for_both,
    scan_the_layer,
)
from jax.sharding import AxisType, PartitionSpec
from support import (
    assert_close,
    define_batch_norm,
    define_evaluation,
    define_moments,
    define_steps,
    differentiate,
    standard_normal,
)

import bn_jax as bn

every_interface = pytest.mark.parametrize("interface", INTERFACES.values(), ids=INTERFACES)


def every_way(ways):
    return pytest.mark.parametrize("interface,way", ways.values(), ids=ways)


def of_member(tree, index):
    return {name: leaf[index] for name, leaf in tree.items()}


# --- vmap ---------------------------------------------------------------------------------------


def nested_jax_vmap(layer, x):
    mapped = layer.pure()
    for name in ("inner", "outer"):
        mapped = jax.vmap(mapped, in_axes=(None, 0), out_axes=(0, None), axis_name=name)
    y, layer.state = jax.jit(mapped)(layer.state, x)
    return y


def nested_linen_vmap(layer, x):
    inner = nn.vmap(bn.linen.BatchNorm, axis_name="inner", **SHARED)
    outer = nn.vmap(inner, axis_name="outer", **SHARED)
    plain = layer.layer
    lifted = outer(plain.use_running_average, axis_name=plain.axis_name, momentum=plain.momentum)
    y, layer.state = jax.jit(layer.pure(lifted.apply))(layer.state, x)
    return y


def nested_nnx_vmap(layer, x):
    mapped = call
    for name in ("inner", "outer"):
        mapped = nnx.vmap(mapped, in_axes=(None, 0), axis_name=name)
    return nnx.jit(mapped)(layer.layer, x)


@every_way(
    {
        **for_both(**{"jax dm-haiku#786 #788 #790 equinox#707": nested_jax_vmap}),
        "linen google/flax#3319": (Linen, nested_linen_vmap),
        "nnx google/flax#4760": (Nnx, nested_nnx_vmap),
    }
)
def test_vmap_inside_vmap_over_named_axes_is_one_batch(interface, way):
    x = standard_normal(20, (4, 5, 3))
    layer = interface(axis_name=("outer", "inner"), momentum=0.5)
    expected = define_steps(layer.params, layer.stats, [x.reshape(20, 3)] * 2, momentum=0.5)
    y = [way(layer, x).reshape(20, 3) for _ in range(2)]
    assert_close((jnp.stack(y), layer.stats), expected)
    # Statistics that are shared over an axis that is not named have no single new value.
    with pytest.raises(ValueError, match="out_axes is None"):
        way(interface(axis_name="inner"), x)


def ensemble_by_jax(layer, x):
    y, layer.state = jax.jit(jax.vmap(jax.vmap(layer.pure())))(layer.state, x)
    return y


def ensemble_by_linen(layer, x):
    y, layer.state = jax.jit(layer.pure(layer.lifted(2).apply))(layer.state, x)
    return y


def ensemble_by_nnx(layer, x):
    return nnx.jit(nnx.vmap(nnx.vmap(call)))(layer.layer, x)


@every_way(
    {
        **for_both(**{"jax dm-haiku#786": ensemble_by_jax}),
        "linen google/flax#3319": (Linen, ensemble_by_linen),
        "nnx google/flax#4760": (Nnx, ensemble_by_nnx),
    }
)
def test_vmap_inside_vmap_over_variables_is_an_ensemble(interface, way):
    x = standard_normal(21, (2, 3, 6, 3))
    layers = interface.ensemble(2, 3)
    params, stats = layers.params, layers.stats
    y = way(layers, x)
    for member in np.ndindex(2, 3):
        expected = define_batch_norm(of_member(params, member), of_member(stats, member), x[member])
        assert_close((y[member], of_member(layers.stats, member)), expected)


# --- several devices ----------------------------------------------------------------------------


@every_interface
def test_synchronized_is_flattened(interface):
    x = standard_normal(6, (4, 5, 3))
    layer = interface(axis_name="data")
    expected = define_batch_norm(layer.params, layer.stats, x.reshape(20, 3))
    y, state = jax.pmap(layer.pure(), axis_name="data", in_axes=(None, 0))(layer.state, x)
    layer.state = jax.tree.map(lambda leaf: leaf[0], state)
    assert_close((y.reshape(20, 3), layer.stats), expected)


def shard_map_of_jax(layer, x):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        layer.pure(), mesh=mesh, in_specs=(whole, rows), out_specs=(rows, whole)
    )
    y, layer.state = jax.jit(sharded)(layer.state, x)
    return y


def shard_map_of_nnx(layer, x):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    sharded = nnx.shard_map(call, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)
    return nnx.jit(sharded)(layer.layer, x)


@every_way({**for_both(jax=shard_map_of_jax), "nnx": (Nnx, shard_map_of_nnx)})
def test_shard_map_is_flattened(interface, way):
    x = standard_normal(30, (8, 3))
    layer = interface(axis_name="data")
    expected = define_batch_norm(layer.params, layer.stats, x)
    assert_close((way(layer, x), layer.stats), expected)


# --- scan ---------------------------------------------------------------------------------------


@every_way(SCANS)
def test_scan_carries_the_statistics(interface, way):
    """google/flax#2052, #3602."""
    x = standard_normal(25, (5, 6, 3))
    layer = interface(momentum=0.5)
    expected = define_steps(layer.params, layer.stats, x, momentum=0.5)
    assert_close((way(layer, x), layer.stats), expected)
    evaluating = layer.evaluating()
    before = evaluating.stats
    y = define_evaluation(layer.params, before, x)
    assert_close(way(evaluating, x), y)
    chex.assert_trees_all_equal(evaluating.stats, before)


def scan_in_vmap_of_jax(layer, x):
    def scanned(state, x):
        inner = type(layer)(axis_name="data", momentum=0.5)
        inner.state = state
        y = by_jax_scan(inner, x)
        return y, inner.state

    mapped = jax.vmap(scanned, in_axes=(None, 0), out_axes=(1, None), axis_name="data")
    y, layer.state = mapped(layer.state, x)
    return y


def scan_in_vmap_of_nnx(layer, x):
    def scanned(layer, x):
        return scan_the_layer(Nnx.of(layer), x)

    return nnx.vmap(scanned, in_axes=(None, 0), out_axes=1, axis_name="data")(layer.layer, x)


@every_way({**for_both(jax=scan_in_vmap_of_jax), "nnx": (Nnx, scan_in_vmap_of_nnx)})
def test_scan_inside_vmap_inside_grad(interface, way):
    """equinox#237."""
    x = standard_normal(26, (4, 2, 3))
    layer = interface(axis_name="data", momentum=0.5)
    params, stats = layer.params, layer.stats

    def defined_loss(name, value):
        changed = {**params, "x": x, name: value}
        batches = np.swapaxes(changed["x"], 0, 1)
        return np.sum(np.sin(define_steps(changed, stats, batches, momentum=0.5)[0]))

    of_params, of_x, _ = layer.gradient(way, x)
    assert_close(of_x, differentiate(partial(defined_loss, "x"), x))
    expected = differentiate(partial(defined_loss, "scale"), params["scale"])
    assert_close(of_params["scale"], expected)
    expected = define_steps(params, stats, np.swapaxes(x, 0, 1), momentum=0.5)[1]
    assert_close(layer.stats, expected)


def deep_linen(remat, layers, x):
    def body(layer, x, _):
        return jnp.sin(layer(x)), None

    body = partial(nn.remat, prevent_cse=False)(body) if remat else body

    def deep(layer, x):
        return nn.scan(body, length=4, **STACKED)(layer, x, None)[0]

    return by_apply(deep, layers, x)


def deep_nnx(remat, layers, x):
    def body(x, layer):
        return jnp.sin(layer(x))

    body = nnx.remat(body) if remat else body
    return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers.layer)


@every_way(
    {
        f"{interface.api} {name}": (interface, partial(way, remat))
        for interface, way in ((Linen, deep_linen), (Nnx, deep_nnx))
        for name, remat in {"plain": False, "remat pytorch#96136": True}.items()
    }
)
def test_scan_over_layers_updates_each_once(interface, way):
    x = standard_normal(27, (6, 3))
    layers = interface.ensemble(4)
    params, stats = layers.params, layers.stats

    def define(scales):
        y, updated = x, []
        for number, scale in enumerate(scales):
            own = {**of_member(params, number), "scale": scale}
            y, new = define_batch_norm(own, of_member(stats, number), y)
            y = np.sin(y)
            updated.append(new)
        return y, updated

    of_params, _, found = layers.gradient(way, x)
    expected = differentiate(lambda scales: np.sum(np.sin(define(scales)[0])), params["scale"])
    assert_close(of_params["scale"], expected)
    y, updated = define(params["scale"])
    assert_close(found, y)
    for number, of_layer in enumerate(updated):
        assert_close(of_member(layers.stats, number), of_layer)


# --- rematerialization, branches, donation ------------------------------------------------------


def of_a_lifted_class(transform):
    """The layer of a transformed class, over a mapped axis."""

    def way(layer, x):
        lifted = transform(bn.linen.BatchNorm)(use_running_average=False, axis_name="data")
        pure = layer.pure(lifted.apply)
        mapped = jax.vmap(pure, in_axes=(None, 0), out_axes=(0, None), axis_name="data")
        y, layer.state = mapped(layer.state, x)
        return y

    return way


REMATERIALIZED = {
    "linen remat pytorch#96136": (Linen, of_a_lifted_class(nn.remat)),
    "linen jit": (Linen, of_a_lifted_class(nn.jit)),
    "linen jit remat": (Linen, of_a_lifted_class(lambda layer: nn.jit(nn.remat(layer)))),
    "linen remat saving everything": (
        Linen,
        of_a_lifted_class(partial(nn.remat, policy=jax.checkpoint_policies.everything_saveable)),
    ),
    "nnx remat pytorch#96136": (Nnx, lambda layer, x: nnx.remat(call)(layer.layer, x)),
}


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@every_way(REMATERIALIZED)
def test_lifted_transforms_update_once(interface, way, jit):
    x = standard_normal(29, (5, 6, 3))
    layer = interface()
    params, stats = layer.params, layer.stats

    def defined_loss(scale):
        return np.sum(np.sin(define_batch_norm({**params, "scale": scale}, stats, x)[0]))

    of_params, _, _ = layer.gradient(way, x, jit=jit)
    assert_close(layer.stats, define_batch_norm(params, stats, x)[1])
    assert_close(of_params["scale"], differentiate(defined_loss, params["scale"]))


def branch_of_linen(taken, layer, x):
    def branch(layer, x):
        return nn.cond(taken, call, lambda layer, x: x, layer, x)

    return by_apply(branch, layer, x)


def branch_of_nnx(taken, layer, x):
    return nnx.cond(taken, call, lambda layer, x: x, layer.layer, x)


@pytest.mark.parametrize("taken", [False, True])
@every_way({"linen": (Linen, branch_of_linen), "nnx": (Nnx, branch_of_nnx)})
def test_a_branch_updates_only_if_taken(interface, way, taken):
    x = standard_normal(30, (6, 3))
    layer = interface()
    params, stats = layer.params, layer.stats
    expected = define_batch_norm(params, stats, x) if taken else (x, stats)
    assert_close((way(taken, layer, x), layer.stats), expected)


def donated_to_jax(layer):
    """A step that takes the state of the layer away, and what it took."""
    step = jax.jit(chex.assert_max_traces(layer.pure(), n=1), donate_argnums=0)
    # Not even an initial value that is a constant may be shared.
    layer.state = jax.tree.map(jnp.copy, layer.state)

    def call(x):
        y, layer.state = step(layer.state, x)
        return y

    return call, jax.tree.leaves(layer.state)


def donated_to_nnx(layer):
    step = nnx.jit(chex.assert_max_traces(call, n=1), donate_argnums=0)
    return partial(step, layer.layer), [layer.layer.mean.get_value(), layer.layer.var.get_value()]


@every_way({**for_both(jax=donated_to_jax), "nnx": (Nnx, donated_to_nnx)})
def test_a_donated_state_is_updated_in_one_compilation(interface, way):
    x = standard_normal(32, (4, 6, 3))
    layer = interface(momentum=0.5)
    expected = define_steps(layer.params, layer.stats, x, momentum=0.5)
    chex.clear_trace_counter()
    step, donated = way(layer)
    y = [step(batch) for batch in x]
    assert_close((jnp.stack(y), layer.stats), expected)
    assert len(donated) >= 2
    assert all(leaf.is_deleted() for leaf in donated)


# --- a state that is measured -------------------------------------------------------------------


def call_twice(layer, x):
    return jnp.concatenate([layer(half) for half in jnp.split(x, 2)])


def in_halves(scan):
    def way(layer, x):
        return scan(layer, jnp.stack(jnp.split(x, 2))).reshape(x.shape)

    return way


def call_the_layer_of_flax(layer, x):
    plain = nn.BatchNorm(use_running_average=layer.layer.use_running_average)
    y, layer.state = layer.pure(bn.linen.replace_norms(plain.apply))(layer.state, x)
    return y


def call_with_everything_mutable(layer, x):
    y, layer.state = layer.layer.apply(layer.state, x, mutable=True)
    return y


def call_collecting_moments(layer, x):
    mutable = ["batch_stats", "batch_moments"]
    y, updates = layer.layer.apply(layer.state, x, mutable=mutable)
    layer.state = {**layer.state, "batch_stats": updates["batch_stats"]}
    return y


def call_twice_in_one_apply(layer, x):
    def twice(module, x):
        return jnp.concatenate([module(half) for half in jnp.split(x, 2)])

    return by_apply(twice, layer, x)


MEASURING = {
    **for_both(**{"one call": call, "two calls": call_twice}),
    "linen two calls of one apply": (Linen, call_twice_in_one_apply),
    "linen lifted scan": (Linen, in_halves(SCANS["linen lifted"][1])),
    "nnx scan": (Nnx, in_halves(scan_the_layer)),
    "linen everything mutable": (Linen, call_with_everything_mutable),
    "linen Flax's layer": (Linen, call_the_layer_of_flax),
    "linen accumulated": (Linen, call_collecting_moments),
    "nnx jit": (Nnx, lambda layer, x: nnx.jit(call)(layer.layer, x)),
}


@pytest.mark.parametrize("use_running_average", [True, False])
@every_way(MEASURING)
def test_a_state_that_is_measured(interface, way, use_running_average, request):
    x = standard_normal(60, (8, 3)) * 2 + 1
    layer = interface(use_running_average=use_running_average)
    params, stats = layer.params, layer.stats
    layer.start_measuring()
    y = way(layer, x)
    calls = 2 if "two calls" in request.node.name or "scan" in request.node.name else 1
    expected = [*define_moments(x), np.zeros(3), np.full(3, calls * use_running_average)]
    assert_close(list(layer.measured[:5]), expected)
    chex.assert_trees_all_equal(layer.stats, stats)
    if use_running_average:
        assert_close(y, define_evaluation(params, stats, x))


ENSEMBLE = {
    "linen": (Linen, lambda layers, x: call_lifted(layers, x)),
    "nnx": (Nnx, lambda layers, x: nnx.vmap(call)(layers.layer, x)),
}


def call_lifted(layers, x):
    lifted = layers.lifted(1).clone(use_running_average=True)
    y, layers.state = layers.pure(lifted.apply)(layers.state, x)
    return y


@every_way(ENSEMBLE)
def test_an_ensemble_measures(interface, way):
    x = standard_normal(61, (4, 6, 3))
    layers = interface.ensemble(4).start_measuring().evaluating()
    way(layers, x)
    for number in range(4):
        measured = [leaf[number] for leaf in layers.measured[:3]]
        assert_close(measured, list(define_moments(x[number])))


@every_interface
@pytest.mark.parametrize(
    "options",
    [
        {"use_running_average": True, "update_running_average": False},
        {"use_running_average": False, "update_running_average": False},
        {"use_running_average": False, "frozen": True},
    ],
    ids=["evaluation", "training", "frozen"],
)
def test_calls_that_measure_nothing(interface, options):
    x = standard_normal(62, (4, 3))
    layer = interface(**options).start_measuring()
    before = jax.tree.map(np.array, layer.state)
    evaluated = define_evaluation(layer.params, layer.stats, x)
    y = layer(x)
    chex.assert_trees_all_equal(jax.tree.map(np.array, layer.state), before)
    if options["use_running_average"] or "frozen" in options:
        assert_close(y, evaluated)
