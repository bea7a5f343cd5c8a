"""Every way of running on several devices gives the numbers of one."""

import functools
import itertools
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import DEVICES, automatic_mesh, explicit_mesh, sharded
from support import (
    assert_close,
    define_batch_norm,
    define_gradients,
    make_state,
    quick,
    standard_normal,
)

import bn_jax as bn
from benchmarks.hlo import collectives

TRAIN: Any = partial(bn.batch_norm, use_running_average=False)
EVALUATE: Any = partial(bn.batch_norm, use_running_average=True)

pytestmark = pytest.mark.usefixtures("strict_promotion")

GROUPS = 2


# --- regimes --------------------------------------------------------------------------------------


def differentiated(params, stats, x, weights, mask, **options):
    """Outputs, new statistics, and the gradients of a sum over the shard."""

    def loss(params, x):
        y, updated = TRAIN(params, stats, x, mask=mask, **options)
        kept = y if mask is None else jnp.where(mask.astype(bool), y, 0)
        return jnp.sum(jnp.sin(kept) * weights), (y, updated)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def synchronized(devices, subgroups, names=("data",)):
    """The options of a layer over all devices, or over each of the consecutive groups."""
    name = names[0] if len(names) == 1 else names
    groups = np.arange(devices).reshape(GROUPS, -1).tolist() if subgroups else None
    return dict(axis_name=name, axis_index_groups=groups)


# Each takes the layer's options and returns a function of state and batch, which compiles once for
# the shapes and dtypes that it gets.


def by_shard_map(make_mesh, check_vma, subgroups, *, features=None, **options):
    """Over a mesh whose axes but the one called `features` share the examples."""
    mesh = make_mesh()
    names = tuple(name for name in mesh.axis_names if name != features)
    devices = int(np.prod([mesh.shape[name] for name in names]))
    options |= synchronized(devices, subgroups, names)

    def shard(state, batch):
        (of_params, of_x), (y, updated) = differentiated(*state, *batch, **options)
        if not check_vma:
            of_params = jax.lax.psum(of_params, names)
        if subgroups:
            updated = stacked(updated)
        return (of_params, of_x), (y, updated)

    def spec_of(leaf):
        return P(names, *(None,) * (leaf.ndim - 2), features if leaf.shape[-1] > 1 else None)

    def specs_of(batch):
        return P(features), jax.tree.map(spec_of, batch)

    @jax.jit
    def mapped(state, batch):
        of_state, of_batch = in_specs = specs_of(batch)
        updated_spec = P(names, features) if subgroups else of_state
        return jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=((of_state, of_batch[0]), (of_batch[0], updated_spec)),
            check_vma=check_vma,
        )(state, batch)

    def run(state, batch):
        shardings = jax.tree.map(partial(NamedSharding, mesh), specs_of(batch))
        gradients, (y, updated) = mapped(*map(jax.device_put, (state, batch), shardings))
        return gradients, y, updated if subgroups else stacked(updated)

    return run


def stacked(updated):
    """With an axis for the copies of the state, of which there is one."""
    return jax.tree.map(lambda leaf: leaf[None], updated)


def by_jit(make_mesh, options_of, subgroups, **options):
    options |= options_of(subgroups)
    mesh = make_mesh()
    train = jax.jit(lambda state, batch: differentiated(*state, *batch, **options))

    def run(state, batch):
        with jax.set_mesh(mesh):
            placed = jax.device_put(batch, NamedSharding(mesh, P("data")))
            state = jax.device_put(state, NamedSharding(mesh, P()))
            gradients, (y, updated) = train(state, placed)
        return gradients, y, stacked(jax.tree.map(np.asarray, updated))

    return run


def with_the_axis(subgroups):
    return synchronized(DEVICES, subgroups)


def without_the_axis(subgroups):
    return dict(virtual_batch_size=ROWS // GROUPS if subgroups else None)


def by_nested_vmap(subgroups, **options):
    """Differentiated from the outside of a scan of a `vmap`."""
    options |= synchronized(DEVICES, subgroups)

    def loss(params, x, stats, weights, mask):
        train = jax.vmap(
            lambda x, mask: TRAIN(params, stats, x, mask=mask, **options), axis_name="data"
        )
        _, (ys, updates) = jax.lax.scan(
            lambda carry, x: (carry, train(x, mask)), None, x[None], length=1
        )
        y, updated = jax.tree.map(lambda leaf: leaf[0], (ys, updates))
        kept = jnp.where(mask.astype(bool), y, 0)
        return jnp.sum(jnp.sin(kept) * weights), (y, updated)

    differentiate = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    def run(state, batch):
        params, stats = state
        x, weights, mask = jax.tree.map(
            lambda leaf: leaf.reshape(DEVICES, -1, *leaf.shape[1:]), batch
        )
        (of_params, of_x), (y, updated) = differentiate(params, x, stats, weights, mask)
        join = partial(jax.tree.map, lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]))
        return (of_params, join(of_x)), join(y), updated

    return run


def on_one_device(subgroups, **options):
    train = jax.jit(partial(differentiated, **options, **with_the_axis(subgroups)))

    def run(state, batch):
        gradients, (y, updated) = train(*state, *batch)
        return gradients, y, stacked(updated)

    return run


def by_named_map(transform, subgroups, **options):
    options |= synchronized(DEVICES, subgroups)
    mapped = transform(
        lambda state, batch: differentiated(*state, *batch, **options),
        axis_name="data",
        in_axes=(None, 0),
    )

    def run(state, batch):
        split = jax.tree.map(lambda leaf: leaf.reshape(DEVICES, -1, *leaf.shape[1:]), batch)
        (of_params, of_x), (y, updated) = jax.tree.map(np.asarray, mapped(state, split))
        join = partial(jax.tree.map, lambda leaf: leaf.reshape(-1, *leaf.shape[2:]))
        return (jax.tree.map(lambda leaf: leaf.sum(0), of_params), join(of_x)), join(y), updated

    return run


REGIMES: dict[str, Any] = {
    "pmap": partial(by_named_map, jax.pmap),
    "vmap": partial(by_named_map, lambda *how, **named: jax.jit(jax.vmap(*how, **named))),
    "vmap in a scan, from the outside": by_nested_vmap,
    "shard_map": partial(by_shard_map, automatic_mesh, True),
    "shard_map unchecked": partial(by_shard_map, automatic_mesh, False),
    "shard_map explicit": partial(by_shard_map, explicit_mesh, True),
    "shard_map, two axes": partial(by_shard_map, partial(automatic_mesh, host=2, chip=2), True),
    "shard_map, features": partial(
        by_shard_map, partial(automatic_mesh, data=2, model=2), True, features="model"
    ),
    "jit": partial(by_jit, automatic_mesh, with_the_axis),
    "jit explicit": partial(by_jit, explicit_mesh, with_the_axis),
    "jit without axis_name": partial(by_jit, automatic_mesh, without_the_axis),
    "jit explicit without axis_name": partial(by_jit, explicit_mesh, without_the_axis),
    "one device": on_one_device,
}


@functools.cache
def in_regime(regime, subgroups, **options):
    return REGIMES[regime](subgroups, **options)


ROWS = 4 * DEVICES


DISTRIBUTIONS = {
    "even": None,
    "uneven": np.arange(ROWS) % 5 < 3,
    "masked": np.asarray(standard_normal(26, (ROWS, 2, 4))) > -0.5,
    "weights": np.abs(np.asarray(standard_normal(26, (ROWS, 2)))),
    "empty shard": np.arange(ROWS) // 4 != 2,
    "one shard": np.arange(ROWS) // 4 == 1,
}


IN_SUBGROUPS = ["pmap", "shard_map explicit", "jit without axis_name", "one device"]


@pytest.mark.parametrize(
    ("regime", "subgroups"),
    quick(
        list(itertools.product(REGIMES, [False, True])),
        [*((regime, False) for regime in REGIMES), *((regime, True) for regime in IN_SUBGROUPS)],
    ),
)
@pytest.mark.parametrize(
    ("distribution", "offset"),
    [
        ("uneven", 0.0),
        ("one shard", 1e4),
        *(
            pytest.param(name, offset, marks=pytest.mark.exhaustive)
            for name in DISTRIBUTIONS
            for offset in ((0.0, 1e4) if name == "even" else (0.0,) if name != "uneven" else ())
        ),
    ],
)
def test_n_devices_give_the_numbers_of_one(regime, distribution, offset, subgroups):
    assert len(jax.devices()) >= DEVICES
    x, state = standard_normal(27, (ROWS, 2, 4)) + np.float32(offset), make_state((4,))
    weights, mask = standard_normal(28, x.shape), DISTRIBUTIONS[distribution]
    run = in_regime(regime, subgroups)
    if mask is None:
        found = run(state, (x, weights, jnp.ones((ROWS, 1, 1), bool)))
    else:
        mask = mask.reshape(mask.shape + (1,) * (3 - mask.ndim))
        x = jnp.where(mask > 0, x, jnp.nan)
        found = run(state, (x, weights, jnp.asarray(mask)))
    (of_params, of_x), y, updated = jax.tree.map(np.asarray, found)
    valid = np.broadcast_to(True if mask is None else mask > 0, x.shape)
    expected = expect(state, np.asarray(x), np.asarray(weights), mask, GROUPS if subgroups else 1)
    assert_close(y[valid], expected["y"][valid])
    assert_close((of_params, of_x), expected["gradients"], tolerance=2e-5)
    copies = len(updated["mean"])
    for copy in range(copies):
        group = copy * GROUPS // copies if subgroups and copies > 1 else -1
        own = jax.tree.map(lambda leaf, copy=copy: leaf[copy], updated)
        assert_close(own, expected["updated"][group])


def expect(state, x, weights, mask, groups):
    """By the definition: output, gradients, and the new statistics of each group and of all."""
    masks = [None] * groups if mask is None else np.split(mask, groups)
    outputs, updates, gradients = [], [], []
    for own, own_mask, pull in zip(
        np.split(x, groups), masks, map(pull_by, np.split(weights, groups)), strict=True
    ):
        y, updated = train_by_definition(state, own, own_mask)
        outputs.append(y)
        updates.append(updated)
        gradients.append(define_gradients(state[0], own, own_mask, pull))
    of_params, of_x = zip(*gradients, strict=True)
    return {
        "y": np.concatenate(outputs),
        "updated": [*updates, train_by_definition(state, x, mask)[1]],
        "gradients": (jax.tree.map(lambda *leaves: sum(leaves), *of_params), np.concatenate(of_x)),
    }


def train_by_definition(state, x, mask):
    """A batch without a valid example leaves the statistics as they were."""
    if mask is not None and not mask.any():
        return np.full(x.shape, np.nan), state[1]
    params, stats = state
    return define_batch_norm(params, stats, x, mask=mask)


def pull_by(weights):
    return lambda y: np.cos(y) * weights


@pytest.mark.parametrize(
    ("momentum", "poison"),
    [
        (0.9, np.nan),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in ((0.9, np.inf), (None, np.nan), (None, np.inf))
        ),
    ],
)
@pytest.mark.parametrize(
    "regime", quick(REGIMES, ["pmap", "shard_map", "jit explicit", "one device"])
)
def test_poison_on_one_device_does_not_poison_the_state(regime, momentum, poison):
    x, (params, stats) = standard_normal(49, (ROWS, 4)), make_state((4,))
    stats["count"] = jnp.full(4, 2.0)
    batch = x.at[5, 1].set(poison), standard_normal(50, x.shape), jnp.ones((len(x), 1), bool)
    found = in_regime(regime, False, momentum=momentum)((params, stats), batch)
    _, y, updated = jax.tree.map(np.asarray, found)
    updated = jax.tree.map(lambda leaf: leaf[-1], updated)
    expected_y, expected = define_batch_norm(params, stats, x, momentum=momentum)
    clean = np.array([0, 2, 3])
    assert_close(y[:, clean], expected_y[:, clean])
    for name, old in stats.items():
        assert updated[name][1] == old[1]
        assert_close(updated[name][clean], expected[name][clean])


@pytest.mark.parametrize(
    "regime,state_spec",
    [("shard_map", P("model")), ("jit explicit", P("model")), ("jit explicit", P())],
)
def test_features_sharded_as_well(regime, state_spec):
    # The guard triggers for the features of one half of the devices only.
    x, (params, stats) = standard_normal(36, (8, 6)).at[:, :3].add(1e4), make_state((6,))
    expected = define_batch_norm(params, stats, x)
    x_spec = P("data", "model")
    if regime == "jit explicit":
        mesh = jax.make_mesh((2, 2), ("data", "model"))
        with jax.set_mesh(mesh):
            state = jax.device_put((params, stats), NamedSharding(mesh, state_spec))
            x = jax.device_put(x, NamedSharding(mesh, x_spec))
            found = jax.jit(lambda state, x: TRAIN(*state, x))(state, x)
    else:
        mesh = automatic_mesh(data=2, model=2)
        train = jax.shard_map(
            partial(TRAIN, axis_name="data"),
            mesh=mesh,
            in_specs=(state_spec, state_spec, x_spec),
            out_specs=(x_spec, state_spec),
        )
        found = jax.jit(train)(params, stats, x)
    assert_close(jax.tree.map(np.asarray, found), expected)


def test_statistics_that_differ_between_devices_are_synchronized_too():
    x, params = standard_normal(34, (4 * DEVICES, 3)) + 2, make_state((3,))[0]
    stats = {"mean": standard_normal(35, (DEVICES, 3)) * 3, "var": jnp.ones((DEVICES, 3))}
    train = jax.shard_map(
        lambda stats, x: TRAIN(params, {n: s[0] for n, s in stats.items()}, x, axis_name="data"),
        mesh=automatic_mesh(),
        in_specs=P("data"),
        out_specs=(P("data"), P("data")),
    )
    y, updated = jax.jit(train)(stats, x)
    assert_close(y, define_batch_norm(params, bn.init_batch_stats(3), x)[0])
    for number in range(DEVICES):
        own = {name: leaf[number] for name, leaf in stats.items()}
        expected = define_batch_norm(params, own, x)[1]
        assert_close({n: leaf.reshape(DEVICES, 3)[number] for n, leaf in updated.items()}, expected)


@pytest.mark.parametrize("transform", [jax.pmap, jax.vmap, "shard_map"])
def test_index_groups(transform):
    groups = [[0, 3], [2, 1]]
    x, (params, stats) = standard_normal(29, (DEVICES, 5, 3)), make_state((3,))
    train = partial(TRAIN, axis_name="data", axis_index_groups=groups)
    if transform == "shard_map":
        mesh = automatic_mesh()
        mapped = jax.shard_map(
            lambda x: jax.tree.map(lambda leaf: leaf[None], train(params, stats, x[0])),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
        )
        y, updated = jax.jit(mapped)(jax.device_put(x, NamedSharding(mesh, P("data"))))
    else:
        y, updated = transform(partial(train, params, stats), axis_name="data")(x)
    for group in groups:
        members = jnp.array(group)
        expected_y, expected_stats = define_batch_norm(params, stats, x[members].reshape(10, 3))
        assert_close(y[members].reshape(10, 3), expected_y)
        for member in group:
            assert_close(jax.tree.map(lambda leaf, m=member: leaf[m], updated), expected_stats)


# --- norms without state --------------------------------------------------------------------------

# Flax's layer, ours as a function, and the axes of x that the mesh axes "data" and "model" share.
STATELESS: dict[str, Any] = {
    "layer": (nn.LayerNorm(), bn.layer_norm, P("data", None, "model")),
    "rms": (nn.RMSNorm(), bn.rms_norm, P("data", None, "model")),
    "group": (
        nn.GroupNorm(num_groups=4),
        partial(bn.group_norm, num_groups=4),
        P("data", "model", None),
    ),
    "instance": (nn.InstanceNorm(), bn.instance_norm, P("data", "model", None)),
}


@functools.cache
def stateless_case(name):
    layer, ours, spec = STATELESS[name]
    x, weights = standard_normal(60, (4, 6, 8)), standard_normal(61, (4, 6, 8))
    params = make_state((8,))[0]
    if name == "rms":
        params = {"scale": params["scale"]}

    def loss(norm, params, x, weights):
        y = norm(params, x)
        return jnp.sum(jnp.sin(y) * weights), y

    flax = lambda params, x: layer.apply({"params": params}, x)  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):
        differentiate = jax.jit(jax.grad(partial(loss, flax), (0, 1), has_aux=True))
        expected = differentiate(params, x, weights)
    return partial(loss, ours), (params, x, weights), spec, expected


@pytest.mark.parametrize(
    ("make_mesh", "mapped"),
    quick(
        list(itertools.product([automatic_mesh, explicit_mesh], [False, True])),
        [(automatic_mesh, False), (explicit_mesh, True)],
    ),
)
@pytest.mark.parametrize("name", STATELESS)
def test_a_norm_without_state_on_many_devices(name, mapped, make_mesh):
    loss, (params, x, weights), spec, expected = stateless_case(name)
    mesh = make_mesh(data=2, model=2)
    of_params = P("model" if spec[2] else None)
    step = jax.grad(loss, (0, 1), has_aux=True)
    if mapped:
        ours = STATELESS[name][1]
        step = jax.grad(partial(loss.func, partial(ours, axis_name="model")), (0, 1), has_aux=True)
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(of_params, spec, spec),
            out_specs=((of_params, spec), spec),
        )
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(leaf, NamedSharding(mesh, own))
            for leaf, own in ((params, of_params), (x, spec), (weights, spec))
        ]
        found = jax.jit(step)(*placed)
    assert_close(jax.tree.map(np.asarray, found), expected, tolerance=1e-5)


@pytest.mark.parametrize("mapped", [False, True], ids=["jit", "shard_map"])
@pytest.mark.parametrize("name", STATELESS)
def test_examples_on_several_devices_share_only_the_gradients_of_params(name, mapped):
    loss, (params, x, weights), _, _ = stateless_case(name)
    mesh = automatic_mesh()
    step = jax.grad(loss, (0, 1), has_aux=True)
    if mapped:
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=((P(), P("data")), P("data")),
        )
    placed = jax.device_put((x, weights), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(params, *placed).compile().as_text() or ""
    found = collectives(text)
    assert {one.kind for one in found} == {"all-reduce"}
    assert sum(one.elements for one in found) == sum(leaf.size for leaf in params.values())
    assert len(found) == 1


# --- modules --------------------------------------------------------------------------------------


def linen_call(layer):
    variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))

    def train(x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    return train


def nnx_call(layer):
    definition, state = nnx.split(layer)

    def train(x):
        merged = nnx.merge(definition, state, copy=True)
        y = merged(x)
        return y, {"batch_stats": {"mean": merged.mean[...], "var": merged.var[...]}}

    return train


MODULES = {
    "linen": lambda: linen_call(bn.linen.BatchNorm(use_running_average=False, axis_name="data")),
    "nnx": lambda: nnx_call(bn.nnx.BatchNorm(3, axis_name="data", rngs=nnx.Rngs(0))),
}


@pytest.mark.parametrize("kind", MODULES)
def test_one_module_runs_in_every_regime(kind):
    train, x = MODULES[kind](), standard_normal(61, (8, 3)) + 3
    split = x.reshape(DEVICES, 2, 3)
    y, updated = define_batch_norm(bn.init_params(3), bn.init_batch_stats(3), x)
    mesh = automatic_mesh()
    whole = dict(mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P()))
    for found in (
        train(x),
        jax.jit(train)(x),
        jax.jit(train)(sharded(x, mesh)),
        jax.jit(train)(sharded(x, explicit_mesh())),
        jax.jit(jax.shard_map(train, **whole))(x),
    ):
        assert_close(jax.tree.map(np.asarray, found), (y, {"batch_stats": updated}))
    for transform in (jax.pmap, jax.vmap):
        found = transform(train, axis_name="data")(split)
        for device in range(DEVICES):
            own = jax.tree.map(lambda leaf, device=device: np.asarray(leaf)[device], found)
            assert_close(own, (y.reshape(split.shape)[device], {"batch_stats": updated}))
