"""What several devices say to each other, counted in compiled programs."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import DEVICES, automatic_mesh, explicit_mesh
from support import (
    all_reduces,
    assert_close,
    conditionals,
    define_batch_norm,
    make_state,
    quick,
    standard_normal,
)

import bn_jax as bn
from benchmarks.hlo import collectives

TRAIN: Any = partial(bn.batch_norm, use_running_average=False)
EVALUATE: Any = partial(bn.batch_norm, use_running_average=True)

pytestmark = pytest.mark.usefixtures("strict_promotion")

FEATURES = 5


OVER_DATA = P("data")


def compile_over(mesh, function, *shapes, mapped=False, out_specs=OVER_DATA):
    """Compiled HLO, of arguments of which the first axis is sharded."""
    if mapped:
        in_specs = (P("data"),) * len(shapes)
        function = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    sharding = NamedSharding(mesh, P("data"))
    arguments = [
        jax.ShapeDtypeStruct(shape, bool if shape[-1] == 1 else jnp.float32, sharding=sharding)
        for shape in shapes
    ]
    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(*arguments).compile().as_text() or ""
    assert {one.kind for one in collectives(text)} <= {"all-reduce"}
    return text


X_SHAPE, MASK_SHAPE = (16, 2, FEATURES), (16, 1, 1)


def passes(masked, **options):
    """A layer's forward and backward pass and evaluation, as functions of x and mask."""
    params, stats = make_state((FEATURES,))

    def forward(x, mask):
        return TRAIN(params, stats, x, mask=mask if masked else None, **options)

    def backward(x, mask, cotangent):
        return jax.vjp(lambda x: forward(x, mask)[0], x)[1](cotangent)[0]

    def evaluate(x):
        return EVALUATE(params, stats, x, **options)[0]

    return forward, backward, evaluate


@pytest.mark.parametrize("make_mesh", [automatic_mesh, explicit_mesh])
@pytest.mark.parametrize("regime", ["shard_map", "jit"])
@pytest.mark.parametrize("masked", [False, True])
def test_one_all_reduce_forward_and_one_backward(regime, make_mesh, masked):
    forward, backward, evaluate = passes(masked, axis_name="data")
    compiled = partial(compile_over, make_mesh(), mapped=regime == "shard_map")
    text = compiled(forward, X_SHAPE, MASK_SHAPE, out_specs=(P("data"), P()))
    assert conditionals(text) == 1
    assert all_reduces(text) == [2 * FEATURES + masked]
    # Under jit the compiler moves what does not depend on the forward pass into its collective.
    sizes = all_reduces(compiled(backward, X_SHAPE, MASK_SHAPE, X_SHAPE))
    assert len(sizes) == 2
    assert sum(sizes) == 4 * FEATURES + masked
    assert all_reduces(compiled(evaluate, X_SHAPE)) == []


@pytest.mark.parametrize("make_mesh", [automatic_mesh, explicit_mesh])
@pytest.mark.parametrize("groups_per_device", quick([1, 2], [2]))
@pytest.mark.parametrize("masked", quick([False, True], [True]))
def test_groups_aligned_with_the_shards_need_no_collective(make_mesh, groups_per_device, masked):
    size = X_SHAPE[0] // DEVICES // groups_per_device
    forward, backward, evaluate = passes(masked, virtual_batch_size=size)
    compiled = partial(compile_over, make_mesh())
    output = compiled(lambda x, mask: forward(x, mask)[0], X_SHAPE, MASK_SHAPE)
    assert conditionals(output) == 0
    assert all_reduces(output) == []
    assert all_reduces(compiled(backward, X_SHAPE, MASK_SHAPE, X_SHAPE)) == []
    assert all_reduces(compiled(evaluate, X_SHAPE)) == []
    # One state for all groups is a sum over all devices; nothing else waits for it.
    sizes = all_reduces(compiled(forward, X_SHAPE, MASK_SHAPE))
    assert sizes == [FEATURES + masked, 2 * FEATURES]


def test_a_batch_is_measured_only_where_it_is_needed():
    (params, stats), compiled = make_state((FEATURES,)), partial(compile_over, automatic_mesh())
    groups = partial(TRAIN, params, stats, virtual_batch_size=X_SHAPE[0] // DEVICES)
    assert all_reduces(compiled(partial(groups, update_running_average=False), X_SHAPE)) == []
    text = compiled(partial(EVALUATE, params, stats, update_running_average=True), X_SHAPE)
    assert all_reduces(text) == [2 * FEATURES]
    assert conditionals(text) == 1
    evaluate = partial(EVALUATE, params, stats)
    assert all_reduces(compiled(evaluate, X_SHAPE)) == []
    assert "reduce" not in str(jax.make_jaxpr(evaluate)(jnp.ones(X_SHAPE)))


@pytest.mark.parametrize("size", [2, 3, 4, 6, 12])
def test_groups_not_aligned_with_the_shards(size):
    x, state = standard_normal(62, (12, 3)), make_state((3,))
    train = jax.jit(partial(TRAIN, *state, virtual_batch_size=size))
    assert_close(train(jax.device_put(x, NamedSharding(explicit_mesh(), P("data")))), train(x))


def test_a_state_for_each_device_needs_no_collective():
    params, stats = make_state((FEATURES,))
    x = standard_normal(60, (DEVICES, 8, FEATURES)) + 10 * jnp.arange(4.0)[:, None, None]
    mesh = automatic_mesh()

    def train(x):
        return jax.vmap(partial(TRAIN, params, stats))(x)

    assert all_reduces(compile_over(mesh, train, x.shape)) == []
    y, updated = jax.jit(train)(jax.device_put(x, NamedSharding(mesh, P("data"))))
    for number in range(DEVICES):
        own = y[number], jax.tree.map(lambda leaf, number=number: leaf[number], updated)
        assert_close(own, define_batch_norm(params, stats, x[number]))


def test_the_derivative_asks_for_one_collective():
    params, stats = make_state((3,))

    def gradients(params, x):
        def loss(params, x):
            return jnp.sum(jnp.sin(TRAIN(params, stats, x, axis_name="data")[0]))

        return jax.grad(loss, argnums=(0, 1))(params, x)

    mapped = jax.shard_map(
        gradients, mesh=automatic_mesh(), in_specs=(P(), P("data")), out_specs=(P(), P("data"))
    )
    # Forward, two in the guard's branch, and backward; scale and bias need none of their own.
    program = str(jax.make_jaxpr(mapped)(params, standard_normal(39, (8, 3))))
    assert len(re.findall(r"= psum\w*\[", program)) == 4
