"""The rule of `axis_name`: which name is an error where, and which one changes nothing."""

import re
from functools import partial
from typing import Any

import chex
import jax
import pytest
from jax.sharding import PartitionSpec as P
from meshes import DEVICES, automatic_mesh, explicit_mesh, sharded
from support import (
    assert_close,
    make_state,
    standard_normal,
)

import bn_jax as bn

TRAIN: Any = partial(bn.batch_norm, use_running_average=False)
EVALUATE: Any = partial(bn.batch_norm, use_running_average=True)

pytestmark = pytest.mark.usefixtures("strict_promotion")


def call(x, axis_name, **options):
    params, stats = make_state((x.shape[-1],))
    return TRAIN(params, stats, x, axis_name=axis_name, **options)[0]


def under_set_mesh(function, x):
    with jax.set_mesh(automatic_mesh()):
        return jax.jit(function)(x)


def under_partial_shard_map(function, x):
    mesh = automatic_mesh(data=2, model=2)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
    )
    return jax.jit(mapped)(x)


def under_shard_map(function, x):
    return jax.shard_map(function, mesh=automatic_mesh(), in_specs=P("data"), out_specs=P("data"))(
        x
    )


def under_pmap(function, x):
    return jax.pmap(function, axis_name="data")(x[:DEVICES, None])


def under_vmap(function, x):
    return jax.vmap(function, axis_name="data")(x[:, None])


def under_jit_of_vmap_of_jit(function, x):
    return jax.jit(partial(under_vmap, jax.jit(function)))(x)


def sharded_over(make_mesh, transform, function, x):
    return transform(function)(sharded(x, make_mesh()))


KNOWN_AXES: dict[str, Any] = {
    "shard_map": (under_shard_map, "data", "model"),
    "partial shard_map": (under_partial_shard_map, "data", "nowhere"),
    "partial shard_map, partitioned axis": (under_partial_shard_map, "model", "nowhere"),
    "pmap": (under_pmap, "data", "batch"),
    "vmap": (under_vmap, "data", "batch"),
    "jit of vmap of jit": (under_jit_of_vmap_of_jit, "data", "batch"),
    "jit, mesh set": (under_set_mesh, "data", "batch"),
    "jit, mesh of x": (partial(sharded_over, automatic_mesh, jax.jit), "data", "batch"),
    "jit, explicit mesh of x": (partial(sharded_over, explicit_mesh, jax.jit), "data", "batch"),
    "no jit, mesh of x": (partial(sharded_over, automatic_mesh, lambda f: f), "data", "batch"),
}


@pytest.mark.parametrize("place", KNOWN_AXES)
def test_a_misspelt_axis_is_an_error_wherever_another_is_known(place):
    run, right, wrong = KNOWN_AXES[place]
    x = standard_normal(31, (8, 3))
    run(partial(call, axis_name=right), x)
    listed = re.escape(f"'{'data' if right == 'model' else right}'")
    message = f"axis_name='{wrong}' is not bound by .*{listed}.*Spell it as .*axis_name=None"
    with pytest.raises(NameError, match=message):
        run(partial(call, axis_name=wrong), x)
    with pytest.raises(NameError, match=f"axis_name='{wrong}' is not bound"):
        run(lambda x: bn.moments(x, axis_name=wrong).mean, x)
    # Neither evaluation nor initialization asks for the axis.
    run(partial(call, axis_name=wrong, initializing=True), x)
    run(partial(call, axis_name=wrong, use_running_average=True), x)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap, jax.checkpoint])
def test_where_no_axis_is_known_the_name_changes_nothing(transform):
    x = standard_normal(31, (4, 8, 3))
    named, unnamed = (transform(partial(call, axis_name=name))(x) for name in ("data", None))
    chex.assert_trees_all_equal(named, unnamed)
    named, unnamed = (
        transform(partial(bn.moments, axes=0, axis_name=name))(x) for name in ("data", None)
    )
    chex.assert_trees_all_equal(named, unnamed)


def test_an_axis_of_the_compiler_beside_a_bound_one():
    x = standard_normal(32, (8, 3))
    y = under_partial_shard_map(partial(call, axis_name=("data", "model")), x)
    assert_close(y, call(x, None))


BAD_GROUPS = {
    "of several sizes": (
        [[0], [1, 2, 3]],
        "must be groups of one size that hold each index from 0",
    ),
    "of too many devices": (
        [[0, 1, 2], [3, 4, 5]],
        "hold 6 indices, expected those of axis_name='data', 0 to 3",
    ),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_groups_that_do_not_fit(case):
    groups, message = BAD_GROUPS[case]
    with pytest.raises(ValueError, match=message):
        under_shard_map(
            partial(call, axis_name="data", axis_index_groups=groups), standard_normal(31, (8, 3))
        )


def test_groups_where_nothing_binds_the_axis():
    x = standard_normal(31, (8, 3))
    divided = partial(call, x, "data")
    assert_close(divided(axis_index_groups=[[1, 0], [3, 2]]), call(x, None, virtual_batch_size=4))
    for groups in ([[0, 2], [1, 3]], [[0, 1, 2], [3, 4, 5]]):
        with pytest.raises(
            ValueError, match=r"cannot divide the 8 examples of x, since nothing binds"
        ):
            divided(axis_index_groups=groups)
    with pytest.raises(ValueError, match=r"divide axis_name='data', which nothing binds here"):
        bn.moments(x, axis_name="data", axis_index_groups=[[0, 1], [2, 3]])
    with pytest.raises(ValueError, match=r"was given without axis_name"):
        call(x, None, axis_index_groups=[[0, 1], [2, 3]])
