"""Batch norm by domain is a batch norm for each domain, on its part of the batch."""

import functools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from domains import define_domains
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import DEVICES, automatic_mesh, explicit_mesh
from support import assert_close, exact, standard_normal

import bn_jax as bn
from benchmarks.hlo import collectives
from bn_jax._core import domains as domains_file
from bn_jax._core.domains import Domains

TRAIN: Any = partial(bn.domain_batch_norm, use_running_average=False)

pytestmark = pytest.mark.usefixtures("compile_quickly")

IMAGES, ROWS = (12, 8, 8, 3), (24, 3)


def arguments_of(number, shape, dtype=np.float32, *, seed=0, absent=(), offset=0.0):
    """Parameters, statistics, input and domains; every domain that is not absent has examples."""
    rng = np.random.default_rng(seed)
    present = [d for d in range(number) if d not in absent]
    domain = rng.permutation(np.resize(present, shape[0]))
    leaves = [standard_normal(seed + n, (number, shape[-1]), dtype) for n in range(4)]
    params = {"scale": leaves[0], "bias": leaves[1]}
    stats = {"mean": leaves[2] + jnp.asarray(offset, dtype), "var": jnp.abs(leaves[3]) + 0.5}
    scale = jnp.asarray(1 + domain.reshape(-1, *(1,) * (len(shape) - 1)), dtype)
    x = standard_normal(seed + 5, shape, dtype) * scale + jnp.asarray(offset, dtype)
    return params, stats, x, jnp.asarray(domain, jnp.int32)


def with_gradients(function, params, stats, x, **options):
    """Outputs, new statistics, and derivatives in reverse and forward mode."""
    cotangent = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)

    def loss(params, x):
        y, updated = function(params, stats, x, **options)
        return jnp.sum(jnp.sin(y) * cotangent.astype(y.dtype)), (y, updated)

    def output(params, x):
        return function(params, stats, x, **options)[0]

    gradients, results = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    tangents = jax.tree.map(lambda leaf: jnp.cos(leaf), (params, x))
    return gradients, results, jax.jvp(output, (params, x), tangents)[1]


def ours(params, stats, x, *, domain, **options):
    return TRAIN(params, stats, x, domain, **options)


CASES: dict[str, Any] = {
    "1 domain": (1, IMAGES, {}),
    "2 domains": (2, IMAGES, {}),
    "2 domains of rows": (2, ROWS, {}),
    "5 domains": (5, IMAGES, {}),
    "16 domains of rows": (16, (48, 3), {}),
    "16 domains of images": (16, (32, 16, 16, 2), {}),
    "cumulative": (3, ROWS, {"momentum": None, "running_var_ddof": 1}),
    "weights": (3, ROWS, {"mask": np.arange(24)[:, None] % 4 / 2}),
    "boolean mask": (2, IMAGES, {"mask": np.arange(64).reshape(1, 8, 8, 1) % 3 > 0}),
    "ghost": (2, ROWS, {"virtual_batch_size": 8}),
    "ghost images": (2, IMAGES, {"virtual_batch_size": 4, "running_var_ddof": 1}),
    "activation": (2, ROWS, {"activation": jax.nn.silu}),
}


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_separate_norms_on_the_parts(case, absent):
    number, shape, options = CASES[case]
    with jax.enable_x64(True):
        lacking = (number // 2,) if absent and number > 1 else ()
        params, stats, x, domain = arguments_of(number, shape, np.float64, absent=lacking)
        if options.get("momentum", 0) is None:
            stats["count"] = jnp.full(stats["mean"].shape, 2.0)
        if absent and number == 1:
            domain = domain - (np.arange(len(domain)) % 3 == 0)
        found = jax.jit(partial(with_gradients, ours, **options))(params, stats, x, domain=domain)
        known = partial(define_domains, domain=np.asarray(domain), **options)
        expected = jax.jit(partial(with_gradients, known))(params, stats, x)
        assert_close(found, expected, tolerance=1e-9)


@pytest.mark.parametrize("shape", [IMAGES, ROWS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_bounds_of_batch_norm(shape, dtype):
    offset = 1e4 if dtype == "float32" else 0.0
    params, stats, x, domain = arguments_of(3, shape, np.float32, offset=offset, absent=(1,))
    x = x.astype(dtype)
    y, updated = jax.jit(TRAIN)(params, stats, x, domain)
    assert y.dtype == jnp.promote_types(dtype, jnp.float32)
    with jax.enable_x64(True):
        expected = define_domains(*map(to_double, (params, stats, x)), domain=np.asarray(domain))
    assert_close((y, updated), expected, tolerance=1e-5)
    assert jax.tree.leaves(updated)[0].dtype == jnp.float32


def to_double(tree):
    return jax.tree.map(lambda leaf: exact(leaf, jnp), tree)


@pytest.mark.parametrize("shape", [IMAGES, ROWS])
def test_conditional_batch_norm_shares_statistics(shape):
    with jax.enable_x64(True):
        params, stats, x, domain = arguments_of(3, shape, np.float64)
        stats = {name: leaf[0] for name, leaf in stats.items()}
        domain = domain.at[:2].set(-1)
        found = jax.jit(partial(with_gradients, ours))(params, stats, x, domain=domain)
        known = partial(define_domains, domain=np.asarray(domain))
        expected = jax.jit(partial(with_gradients, known))(params, stats, x)
        assert_close(found, expected, tolerance=1e-9)
        # All are normalized alike; what differs is learned.
        alike = {"bias": params["bias"]}
        y, _ = jax.jit(TRAIN)(alike, stats, x, domain)
        expected = define_domains(alike, stats, x, domain=np.asarray(domain))[0]
        assert_close(y, expected, tolerance=1e-9)


def test_shared_parameters_keep_statistics_apart():
    with jax.enable_x64(True):
        params, stats, x, domain = arguments_of(2, ROWS, np.float64)
        params = {"scale": params["scale"][0], "bias": params["bias"]}
        found = jax.jit(partial(with_gradients, ours))(params, stats, x, domain=domain)
        known = partial(define_domains, domain=np.asarray(domain))
        expected = jax.jit(partial(with_gradients, known))(params, stats, x)
        assert_close(found, expected, tolerance=1e-9)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [IMAGES, ROWS])
def test_evaluation_takes_the_statistics_of_the_domain(shape, shared):
    params, stats, x, domain = arguments_of(3, shape)
    if shared:
        stats = {name: leaf[0] for name, leaf in stats.items()}
    y, unchanged = bn.domain_batch_norm(params, stats, x, domain, use_running_average=True)
    for d in range(3):
        own: Any = {name: leaf[d] for name, leaf in params.items()}
        running: Any = stats if shared else {name: leaf[d] for name, leaf in stats.items()}
        part, _ = bn.batch_norm(own, running, x[domain == d], use_running_average=True)
        assert_close(y[domain == d], part)
    assert_close(unchanged, stats, tolerance=1e-30)


@pytest.mark.parametrize("shape", [IMAGES, ROWS])
def test_an_example_of_no_domain(shape):
    params, stats, x, domain = arguments_of(2, shape)
    domain = domain.at[0].set(-1).at[1].set(2)
    for training in (True, False):
        run = jax.jit(partial(bn.domain_batch_norm, use_running_average=not training))
        y, updated = run(params, stats, x.at[:2].set(1e9), domain)
        assert not y[:2].any()
        expected = run(params, stats, x[2:], domain[2:])
        assert_close((y[2:], updated), expected)


@pytest.mark.parametrize("poison", [0.0, np.nan, 3e38])
@pytest.mark.parametrize("shape", [IMAGES, ROWS])
def test_one_domain_and_examples_of_none(shape, poison):
    params, stats, x, domain = arguments_of(1, shape)
    absent = jnp.arange(len(x)) % 3 == 0
    domain = jnp.where(absent, -1, domain)
    x = jnp.where(absent.reshape(-1, *(1,) * (len(shape) - 1)), poison, x)
    y, updated = jax.jit(TRAIN)(params, stats, x, domain)
    own, running = jax.tree.map(lambda leaf: leaf[0], (params, stats))
    expected_y, expected = bn.batch_norm(own, running, x[~absent], use_running_average=False)
    assert_close(y[~absent], expected_y)
    assert_close({name: leaf[0] for name, leaf in updated.items()}, expected)
    assert np.isfinite(poison) == (not jnp.isnan(y[absent]).any())
    if poison == 0:
        assert not y[absent].any()


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e19])
@pytest.mark.parametrize("shape", [IMAGES, ROWS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_domain_that_is_not_finite_reaches_no_other(shape, poison, dtype):
    params, stats, x, domain = arguments_of(2, shape)
    x = x.astype(dtype)
    first = int(jnp.argmax(domain == 0))
    run = jax.jit(TRAIN)
    clean_y, clean = run(params, stats, x, domain)
    y, updated = run(params, stats, x.at[first].set(poison), domain)
    others = domain == 1
    assert_close(y[others], clean_y[others])
    assert_close([leaf[1] for leaf in updated.values()], [leaf[1] for leaf in clean.values()])
    if not np.isfinite(poison):
        assert_close([leaf[0] for leaf in updated.values()], [leaf[0] for leaf in stats.values()])

    def of_others(params, x):
        y, _ = TRAIN(params, stats, x, domain)
        # A cotangent that is not finite would reach all: it must not be made.
        return jnp.sum(jnp.sin(jnp.where(others.reshape(-1, *(1,) * (x.ndim - 1)), y, 0)))

    of_params, of_x = jax.grad(of_others, (0, 1))(params, x.at[first].set(poison))
    clean_params, clean_x = jax.grad(of_others, (0, 1))(params, x)
    assert_close(
        [leaf[1] for leaf in of_params.values()], [leaf[1] for leaf in clean_params.values()]
    )
    assert_close(of_x[others], clean_x[others], tolerance=1e-2 if dtype == "bfloat16" else 1e-5)


# --- weights --------------------------------------------------------------------------------------


def define_mixture(params, stats, x, weights):
    """``sum_d weight_d * y_d`` with moments by weights, in double precision."""
    y, updated = 0, {name: list[Any]() for name in stats}
    rank = (1,) * (x.ndim - 1)
    for d in range(weights.shape[1]):
        weight = weights[:, d].reshape(-1, *rank)
        own = {name: leaf[d] for name, leaf in params.items()}
        running = {name: leaf[d] for name, leaf in stats.items()}
        part, new = define_weighted(own, running, x, weight)
        y = y + weight * part
        for name in stats:
            updated[name].append(new[name])
    return y, {name: jnp.stack(leaves) for name, leaves in updated.items()}


def define_weighted(params, stats, x, weight):
    weight = jnp.broadcast_to(weight, x.shape)
    axes = tuple(range(x.ndim - 1))
    count = weight.sum(axes)
    mean = (weight * x).sum(axes) / count
    var = (weight * (x - mean) ** 2).sum(axes) / count
    y = (x - mean) / jnp.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    new = {"mean": 0.99 * stats["mean"] + 0.01 * mean, "var": 0.99 * stats["var"] + 0.01 * var}
    return y, new


@pytest.mark.parametrize("shape", [IMAGES, ROWS])
def test_weights_mix_domains(shape):
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        params, stats, x, _ = arguments_of(3, shape, np.float64)
        weights = jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(3), shape[0]))

        def loss(function, params, x, weights):
            y, updated = function(params, stats, x, weights)
            return jnp.sum(jnp.sin(y) * jnp.arange(shape[-1])), (y, updated)

        of_ours, of_definition = (
            jax.jit(jax.grad(partial(loss, function), (0, 1, 2), has_aux=True))(params, x, weights)
            for function in (TRAIN, define_mixture)
        )
        assert_close(of_ours, of_definition, tolerance=1e-9)


@pytest.mark.parametrize("shared", [False, True])
def test_one_hot_weights_are_domains(shared):
    params, stats, x, domain = arguments_of(3, IMAGES, absent=(1,))
    if shared:
        stats = {name: leaf[0] for name, leaf in stats.items()}
    options = {
        "activation": jax.nn.relu,
        "residual": x,
        "mask": jnp.arange(12).reshape(12, 1, 1, 1) > 2,
    }
    expected = TRAIN(params, stats, x, domain, **options)
    assert_close(TRAIN(params, stats, x, jax.nn.one_hot(domain, 3), **options), expected)
    assert_close(
        TRAIN(params, stats, x, domain[:, None] == jnp.arange(3)[None], **options), expected
    )


# --- calls ----------------------------------------------------------------------------------------


def test_one_domain_for_the_batch():
    params, stats, x, _ = arguments_of(3, ROWS)
    expected = TRAIN(params, stats, x, jnp.full(len(x), 2))
    assert_close(TRAIN(params, stats, x, 2), expected)
    assert_close(jax.jit(TRAIN)(params, stats, x, 2), expected)
    assert_close(jax.jit(TRAIN)(params, stats, x, jnp.int32(2)), expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [None, 8])
def test_a_traced_domain_for_the_batch(shared, size):
    params, stats, x, _ = arguments_of(3, ROWS)
    stats = {name: leaf[0] for name, leaf in stats.items()} if shared else stats
    options = {"virtual_batch_size": size, "mask": jnp.arange(24)[:, None] % 5 > 0}
    run = jax.jit(partial(with_gradients, ours, **options))
    for one in (1, -1):
        found = run(params, stats, x, domain=jnp.int32(one))
        assert_close(found, run(params, stats, x, domain=jnp.full(len(x), one)))
    (_, (y, updated), _) = found
    assert not y.any()
    assert_close(updated, stats, tolerance=1e-30)


def test_the_only_domain_costs_no_selection():
    params, stats, x, _ = arguments_of(1, IMAGES)
    known = partial(TRAIN, domain=np.zeros(12, int))
    found = str(jax.make_jaxpr(known)(params, stats, x))
    # What tells examples apart has an axis of their size.
    assert not re.search(r"(bool|pred)\[12,", found)
    assert re.search(r"bool\[12,", str(jax.make_jaxpr(TRAIN)(params, stats, x, jnp.zeros(12, int))))


WAYS_OF_ROWS = {
    "rows": ((domains_file._gather, domains_file._multiply_table), domains_file._select_in_turn),
    "sums": ((domains_file._add_rows, domains_file._multiply_values), domains_file._sum_in_turn),
}


@pytest.mark.parametrize("way", WAYS_OF_ROWS)
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_in_turn_are_rows_at_once(way, axis):
    """Programs for a TPU take the one way, those for a CPU the other."""
    index = jnp.expand_dims(jnp.array([0, 2, -1, 1, 2, 3, 0]), 1 - axis)
    domains = Domains(index=index, number=3, axis=axis, shares_statistics=False, selects=False)
    at_once, in_turn = WAYS_OF_ROWS[way]
    given = standard_normal(3, (3 if way == "rows" else 7, 4))
    given = given if axis == 0 else given.T
    for other in at_once:
        expected, pull = jax.vjp(partial(other, domains), given)
        found, pull_in_turn = jax.vjp(partial(in_turn, domains), given)
        assert_close(found, expected)
        assert_close(pull_in_turn(jnp.cos(found)), pull(jnp.cos(found)))


# Up to how many domains of rows a program takes in turn, for the sums of its forward pass and for
# those of its backward pass.
MOST_IN_TURN = {
    ("cpu", 32): (1, 1),
    ("cpu", 1024): (4, 1),
    ("cuda", 32): (4, 2),
    ("tpu", 32): (16, 16),
}


@pytest.mark.parametrize(("platform", "rows"), MOST_IN_TURN)
def test_a_program_takes_rows_in_turn_where_that_is_cheap(platform, rows):
    def gradient(params, stats, x, domain):
        return jax.grad(lambda params: jnp.sum(TRAIN(params, stats, x, domain)[0]))(params)

    def products(function, number):
        traced = jax.jit(function).trace(*arguments_of(number, (rows, 3)))
        lowered = traced.lower(lowering_platforms=(platform,))
        return lowered.as_text().count("stablehlo.dot_general")

    forward, backward = MOST_IN_TURN[platform, rows]
    for number in {forward, forward + 1, backward, backward + 1}:
        expected = 2 * (number > forward)
        assert products(TRAIN, number) == expected
        assert products(gradient, number) == expected + 2 * (number > backward)


@pytest.mark.parametrize(
    "axis, shape", [(1, (6, 3, 4)), (0, (3, 6)), ((0, 2), (2, 6, 3)), ((1, 2), (6, 2, 3))]
)
def test_features_on_any_axes(axis, shape):
    axes = np.atleast_1d(axis)
    features = tuple(shape[a] for a in axes)
    examples = next(a for a in range(len(shape)) if a not in axes)
    x = standard_normal(0, shape)
    params = {
        "scale": standard_normal(1, (2, *features)),
        "bias": standard_normal(2, (2, *features)),
    }
    stats: Any = bn.init_batch_stats((2, *features))
    domain = jnp.arange(6) % 2
    y, updated = TRAIN(params, stats, x, domain, axis=axis)
    for d in range(2):
        own, running = jax.tree.map(lambda leaf, d=d: leaf[d], (params, stats))
        part = jnp.take(x, jnp.flatnonzero(domain == d), examples)
        expected, new = bn.batch_norm(own, running, part, use_running_average=False, axis=axis)
        assert_close(jnp.take(y, jnp.flatnonzero(domain == d), examples), expected)
        assert_close({name: leaf[d] for name, leaf in updated.items()}, new)


def test_measuring_is_by_domain():
    params, stats, x, domain = arguments_of(3, ROWS, absent=(1,))
    state: Any = bn.start_measuring(stats)
    for part in (slice(0, 10), slice(10, 24)):
        _, state = bn.domain_batch_norm(
            params, state, x[part], domain[part], use_running_average=True
        )
    measured = state["measured"]
    for d in (0, 2):
        expected = bn.moments(x[domain == d], 0)
        assert_close((measured.mean[d], measured.var[d]), (expected.mean, expected.var))
    assert not measured.count[1].any()


def test_a_half_precision_state_is_promoted():
    params, stats, x, domain = arguments_of(2, ROWS)
    half = jax.tree.map(jnp.bfloat16, stats)
    _, updated = TRAIN(params, half, x, domain)
    _, expected = TRAIN(params, bn.promote_batch_stats(half), x, domain)
    assert_close(updated, expected, dtype=jnp.float32)


def bad(**changes):
    params, stats, x, domain = arguments_of(2, ROWS)
    return {"params": params, "batch_stats": stats, "x": x, "domain": domain, **changes}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"domain": jnp.full(24, 2)}, ValueError, r"domain has 24 values outside of 0 to 1, 2 for"),
        ({"domain": -1}, ValueError, r"domain has 1 values outside of 0 to 1, -1 for example"),
        ({"domain": jnp.zeros(5, int)}, ValueError, r"domain of shape \(5,\) .* fit x with 24"),
        ({"domain": jnp.zeros((24, 3))}, ValueError, r"\(24, 3\) .* weights of shape \(24, 2\)"),
        ({"domain": jnp.zeros(24)}, TypeError, r"domain has dtype float32 .*; expected integers"),
        ({"domain": -jnp.ones((24, 2))}, ValueError, "weights that are negative or not finite"),
        ({"batch_stats": bn.init_batch_stats((3, 3))}, ValueError, "with one D, and all"),
        ({"batch_stats": bn.init_batch_stats((2, 4))}, ValueError, r"\(3,\) on axis=-1, but"),
        (
            {"params": {}, "batch_stats": bn.init_batch_stats(3)}, ValueError,
            r"nothing has a leading axis of domains.*bn_jax.batch_norm",
        ),
        (
            {"axis": (0, 1), "params": {}, "batch_stats": bn.init_batch_stats((2, 24, 3))},
            ValueError, "has feature axes only",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(changes, error, message):
    with pytest.raises(error, match=re.compile(message, re.S)):
        TRAIN(**bad(**changes))


# --- devices --------------------------------------------------------------------------------------


def on_devices(params, stats, x, domain, **options):
    """Gradients of the sum over the shard, outputs and statistics."""

    def loss(params, x):
        y, updated = TRAIN(params, stats, x, domain, **options)
        return weighted(y), (y, updated)

    return jax.grad(loss, (0, 1), has_aux=True)(params, x)


def weighted(y):
    """A sum that depends on each feature differently."""
    weights = jnp.arange(1, y.shape[-1] + 1, dtype=y.dtype)
    return jnp.sum(jnp.sin(y) * weights.reshape((1,) * (y.ndim - 1) + (-1,)))


# The second domain is on one device only, and the third nowhere.
UNEVEN = np.array([0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, -1, 0, -1])
UNEVEN[8:12] = 0


def by_shard_map(check_vma, params, stats, x, domain):
    def shard(params, stats, x, domain):
        (of_params, of_x), results = on_devices(params, stats, x, domain, axis_name="data")
        if not check_vma:
            of_params = jax.lax.psum(of_params, "data")
        return (of_params, of_x), results

    data = P("data")
    return jax.jit(
        jax.shard_map(
            shard,
            mesh=automatic_mesh(),
            in_specs=(P(), P(), data, data),
            out_specs=((P(), data), (data, P())),
            check_vma=check_vma,
        )
    )(params, stats, x, domain)


def by_map(mapping, params, stats, x, domain):
    in_shards = [leaf.reshape(DEVICES, -1, *leaf.shape[1:]) for leaf in (x, domain)]

    def shard(params, stats, x, domain):
        (of_params, of_x), results = on_devices(params, stats, x, domain, axis_name="data")
        return (jax.lax.psum(of_params, "data"), of_x), results

    if mapping is jax.vmap:
        # Under vmap a sum of the losses is differentiated, from outside.
        def loss(params, x):
            function = jax.vmap(
                lambda x, domain: TRAIN(params, stats, x, domain, axis_name="data"),
                axis_name="data",
            )
            y, updated = function(x, in_shards[1])
            return weighted(y), (y, updated)

        found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, in_shards[0])
        (of_params, of_x), (y, updated) = found
        updated = {name: leaf[0] for name, leaf in updated.items()}
    else:
        mapped = jax.pmap(shard, "data", in_axes=(None, None, 0, 0))
        (of_params, of_x), (y, updated) = mapped(params, stats, *in_shards)
        of_params, updated = jax.tree.map(lambda leaf: leaf[0], (of_params, updated))
    return (of_params, of_x.reshape(x.shape)), (y.reshape(x.shape), updated)


def by_jit(make_mesh, params, stats, x, domain):
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        placed = jax.device_put((x, domain), NamedSharding(mesh, P("data")))
        whole = jax.device_put((params, stats), NamedSharding(mesh, P()))
        return jax.tree.map(np.asarray, jax.jit(on_devices)(*whole, *placed))


WAYS = {
    "shard_map": partial(by_shard_map, True),
    "shard_map without types": partial(by_shard_map, False),
    "pmap": partial(by_map, jax.pmap),
    "vmap": partial(by_map, jax.vmap),
    "sharded jit": partial(by_jit, automatic_mesh),
    "explicit mesh": partial(by_jit, explicit_mesh),
}


@pytest.mark.parametrize("shape", [(16, 3), (16, 8, 8, 2)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_devices_are_one_batch(way, shared, shape):
    number = 3 if shape == (16, 3) else 4
    params, stats, x, _ = arguments_of(number, shape)
    if shared:
        stats = {name: leaf[0] for name, leaf in stats.items()}
    domain = jnp.asarray(UNEVEN, jnp.int32)
    found = WAYS[way](params, stats, x, domain)
    expected = jax.jit(on_devices)(params, stats, x, domain)
    assert_close(jax.tree.map(np.asarray, found), expected, tolerance=2e-5)


@pytest.mark.parametrize("shape", [(16, 3), (16, 8, 8, 2)])
def test_one_collective_forward_and_one_backward(shape):
    params, stats, x, _ = arguments_of(2, shape)
    domain = jnp.asarray(np.arange(16) % 2, jnp.int32)
    data, whole = P("data"), P()

    def forward(params, stats, x, domain):
        return TRAIN(params, stats, x, domain, axis_name="data")

    def compiled(function, out_specs):
        mapped = jax.shard_map(
            function,
            mesh=automatic_mesh(),
            in_specs=(whole, whole, data, data),
            out_specs=out_specs,
        )
        text: Any = jax.jit(mapped).lower(params, stats, x, domain).compile().as_text()
        return [one.kind for one in collectives(text) if not one.guarded]

    assert compiled(forward, (data, whole)) == ["all-reduce"]

    def gradient(params, stats, x, domain):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(forward(a[0], stats, a[1], domain)[0])), (0, 1))(
            params, x
        )

    assert compiled(gradient, (whole, data)) == ["all-reduce"] * 2


@pytest.mark.parametrize(("shape", "sizes"), [(ROWS, "n"), (IMAGES, "n, h, w")])
@pytest.mark.parametrize("number", [1, 3])
def test_symbolic_sizes_are_exported(number, shape, sizes):
    params, stats, x, domain = arguments_of(number, shape)
    shapes = jax.eval_shape(lambda: (params, stats))
    symbols = jax.export.symbolic_shape(sizes)
    specs = [
        jax.ShapeDtypeStruct((*symbols, 3), x.dtype),
        jax.ShapeDtypeStruct(symbols[:1], jnp.int32),
    ]

    def differentiated(params, stats, x, domain):
        return with_gradients(ours, params, stats, x, domain=domain)

    exported = jax.export.export(jax.jit(differentiated))(*shapes, *specs)
    found = exported.call(params, stats, x, domain)
    assert_close(found, differentiated(params, stats, x, domain))


def test_reading_by_the_program_of_one_domain():
    """With one domain, a program reads and writes no more than that of `batch_norm`."""
    params, stats, x, domain = arguments_of(1, (32, 14, 14, 64))
    plain = jax.tree.map(lambda leaf: leaf[0], (params, stats))
    run = functools.partial(bn.batch_norm, use_running_average=False)

    def bytes_of(function, *arguments):
        def step(params, stats, x, *domain):
            y, pull = jax.vjp(lambda p, x: function(p, stats, x, *domain)[0], params, x)
            return y, pull(y)

        cost: Any = jax.jit(step).lower(*arguments).compile().cost_analysis()
        return cost["bytes accessed"]

    ratio = bytes_of(TRAIN, params, stats, x, domain) / bytes_of(run, *plain, x)
    assert ratio <= 1.05
