"""Norms, maps, nestings and derivatives of `test_nesting.py`, and their definition."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from domains import define_domains
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import automatic_mesh, explicit_mesh
from support import assert_close, standard_normal
from test_variants import (
    TRAIN,
    Stateless,
    Variant,
    Whitening,
    by_domain,
    by_linen,
    by_nnx,
    define,
    define_whitening,
    directions,
    from_pairs,
    loss_of,
    renorm,
    without_gradient_of_updates,
)

import bn_jax as bn

TOLERANCE = 1e-8
MEMBERS = 4


# --- norms ----------------------------------------------------------------------------------------


def defined_over(**options):
    """The options of the definition, whose first axis is that of the members."""
    return {"defined": options}


def flattened(function):
    """Of members that share statistics: whitening is defined on rows."""

    def whole(params, stats, x):
        y, updated = function(params, stats, x.reshape(-1, x.shape[-1]))
        return y.reshape(x.shape), updated

    return whole


class Whole(Whitening):
    def __init__(self):
        super().__init__()
        self.reference = flattened(partial(define_whitening, group_size=2))


ROWS = {"shape": (3, 2), "features": (2,)}
# Of the examples of each member.
DOMAINS = np.array([0, 1, 1])


def define_domains_of_members(params, stats, x):
    return define_domains(params, stats, x, domain=np.tile(DOMAINS, len(x) // len(DOMAINS)))


NORMS = {
    "batch norm": Variant(**ROWS, momentum=None, running_var_ddof=1),
    "no parameters": Variant(**ROWS, present=()),
    "activation": Variant(**ROWS, activation=jax.nn.silu),
    "complex": Variant(
        from_pairs(partial(TRAIN, dtype=jnp.complex128)), from_pairs(define), **ROWS, pair=True
    ),
    "batch renorm": Variant(renorm, **ROWS, renorm=(1.2, 0.5)),
    "whitening": Whole(),
    "domains": Variant(
        partial(by_domain, domain=DOMAINS),
        flattened(define_domains_of_members),
        shape=(3, 2),
        features=(2, 2),
    ),
    "layer norm": Stateless(bn.layer_norm, **ROWS, **defined_over(reduction_axes=(0, -1))),
    "rms norm": Stateless(
        bn.rms_norm,
        **ROWS,
        present=("scale",),
        **defined_over(reduction_axes=(0, -1), about_zero=True),
    ),
    "group norm": Stateless(
        bn.group_norm,
        shape=(2, 3, 4),
        features=(4,),
        num_groups=2,
        **defined_over(reduction_axes=(0, 2, -1)),
    ),
    "instance norm": Stateless(
        bn.instance_norm, shape=(2, 3, 2), features=(2,), **defined_over(reduction_axes=(0, 2))
    ),
    "linen": Variant(by_linen, **ROWS),
    "nnx": Variant(by_nnx, without_gradient_of_updates(define), shape=(2, 3), features=(3,)),
}
# These take a mask whose last axis is that of the features, of size 1.
MASKED = ["batch norm", "activation", "batch renorm", "layer norm", "rms norm", "instance norm"]


# --- maps -----------------------------------------------------------------------------------------

ALL = [list(range(MEMBERS))]
EACH = [[member] for member in range(MEMBERS)]
PAIRS = [[0, 1], [2, 3]]
CROSSED = [[0, 2], [1, 3]]
INDEX_GROUPS = [[0, 3], [2, 1]]


def by_vmap(function, axis_name="data"):
    return jax.vmap(partial(function, axis_name=axis_name), (None, None, 0), axis_name=axis_name)


def by_pmap(function, axis_name="data"):
    return jax.pmap(
        partial(function, axis_name=axis_name), in_axes=(None, None, 0), axis_name=axis_name
    )


def each_of(function):
    """Of the one member of a shard, along a first axis of size 1."""

    def shard(params, stats, batch):
        results = function(params, stats, jax.tree.map(lambda leaf: leaf[0], batch))
        return jax.tree.map(lambda leaf: leaf[None], results)

    return shard


def by_shard_map(function, check_vma=True):
    return jax.shard_map(
        each_of(partial(function, axis_name="data")),
        mesh=automatic_mesh(),
        in_specs=(P(), P(), P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )


def by_explicit_shard_map(function):
    mesh = explicit_mesh()
    mapped = jax.shard_map(
        each_of(partial(function, axis_name="data")),
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=P("data"),
    )

    def run(*arguments):
        *state, batch = jax.sharding.reshard(arguments, NamedSharding(mesh, P()))
        sharded = jax.sharding.reshard(batch, NamedSharding(mesh, P("data")))
        return jax.sharding.reshard(mapped(*state, sharded), NamedSharding(mesh, P()))

    return run


def in_pairs(map_twice):
    """Of members in two rows of two."""

    def mapped(params, stats, batch):
        pairs = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), batch)
        results = map_twice(params, stats, pairs)
        return jax.tree.map(lambda leaf: leaf.reshape(MEMBERS, *leaf.shape[2:]), results)

    return mapped


def two_vmaps(function, outer="host", inner="chip", axis_name=("host", "chip")):
    """The outer one over the rows."""
    each = jax.vmap(partial(function, axis_name=axis_name), (None, None, 0), axis_name=inner)
    return in_pairs(jax.vmap(each, (None, None, 0), axis_name=outer))


def vmap_in_shard_map(function, axis_name, check_vma=False):
    each = jax.vmap(partial(function, axis_name=axis_name), (None, None, 0), axis_name="chip")
    mesh = automatic_mesh(host=2, idle=2)
    specs = {"in_specs": (P(), P(), P("host")), "out_specs": P("host"), "check_vma": check_vma}
    return in_pairs(jax.shard_map(each_of(each), mesh=mesh, **specs))


def vmap_around_shard_map(function, axis_name, check_vma=False):
    each = each_of(partial(function, axis_name=axis_name))
    mesh = automatic_mesh(chip=2, idle=2)
    specs = {"in_specs": (P(), P(), P("chip")), "out_specs": P("chip"), "check_vma": check_vma}
    inner = jax.shard_map(each, mesh=mesh, **specs)
    return in_pairs(jax.vmap(inner, (None, None, 0), axis_name="host"))


def vmap_in_pmap(function):
    each = jax.vmap(partial(function, axis_name=BOTH), (None, None, 0), axis_name="chip")
    return in_pairs(jax.pmap(each, in_axes=(None, None, 0), axis_name="host"))


def vmap_around_pmap(function):
    each = jax.pmap(partial(function, axis_name=BOTH), in_axes=(None, None, 0), axis_name="chip")
    return in_pairs(jax.vmap(each, (None, None, 0), axis_name="host"))


class Map(NamedTuple):
    """How the members are mapped over, and which of them share statistics."""

    build: Callable[[Any], Any]
    sharing: list[list[int]] = ALL


BOTH = ("host", "chip")

MAPS = {
    "vmap with a name": Map(by_vmap),
    "vmap without": Map(partial(by_vmap, axis_name=None), EACH),
    "pmap": Map(by_pmap),
    "shard_map": Map(by_shard_map),
}
MAPS_OF_MAPS = {
    "shard_map unchecked": Map(partial(by_shard_map, check_vma=False)),
    "shard_map explicit": Map(by_explicit_shard_map),
    "index groups in vmap": Map(
        lambda function: by_vmap(partial(function, axis_index_groups=INDEX_GROUPS)), INDEX_GROUPS
    ),
    "index groups in pmap": Map(
        lambda function: by_pmap(partial(function, axis_index_groups=INDEX_GROUPS)), INDEX_GROUPS
    ),
    "jit in vmap": Map(lambda function: by_vmap(jax.jit(function, static_argnames="axis_name"))),
    "checkpoint in vmap": Map(
        lambda function: by_vmap(
            lambda *a, axis_name: jax.checkpoint(partial(function, axis_name=axis_name))(*a)
        )
    ),
    "vmap of vmap": Map(two_vmaps),
    "vmap of vmap, the outer one": Map(partial(two_vmaps, axis_name="host"), CROSSED),
    "vmap without a name of vmap": Map(partial(two_vmaps, outer=None, axis_name="chip"), PAIRS),
    "vmap of vmap without a name": Map(partial(two_vmaps, inner=None, axis_name="host"), CROSSED),
    "vmap in shard_map": Map(partial(vmap_in_shard_map, axis_name=BOTH)),
    "vmap in shard_map, the vmap": Map(partial(vmap_in_shard_map, axis_name="chip"), PAIRS),
    "vmap in shard_map, the shard_map": Map(
        partial(vmap_in_shard_map, axis_name="host", check_vma=True), CROSSED
    ),
    "vmap in pmap": Map(vmap_in_pmap),
    "vmap around pmap": Map(vmap_around_pmap),
    "vmap around shard_map": Map(partial(vmap_around_shard_map, axis_name=BOTH)),
    "vmap around shard_map, the vmap": Map(
        partial(vmap_around_shard_map, axis_name="host"), CROSSED
    ),
    "vmap around shard_map, the shard_map": Map(
        partial(vmap_around_shard_map, axis_name="chip", check_vma=True), PAIRS
    ),
}


def by_definition(variant, sharing):
    """What every member gets, where those of each list share statistics."""
    order = np.argsort(np.concatenate(sharing))

    def whole(params, stats, batch):
        parts = []
        for members in sharing:
            part = jax.tree.map(lambda leaf, members=members: leaf[np.array(members)], batch)
            y, updated = on_batch(variant.reference)(params, stats, part)
            parts.append((y, jax.tree.map(partial(copied, len(members)), updated)))
        joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        return jax.tree.map(lambda leaf: leaf[order], joined)

    return whole


def copied(number, leaf):
    return jnp.broadcast_to(leaf, (number, *leaf.shape))


def on_batch(function):
    """Takes x and weights, or None, as one argument. A weight below 0.3 is zero and constant."""

    def run(params, stats, batch, **options):
        x, weights = batch
        if weights is not None:
            options["mask"] = jnp.where(weights > 0.3, weights, 0)
        return function(params, stats, x, **options)

    return run


# --- nestings -------------------------------------------------------------------------------------


def in_scan(mapped):
    """Two steps that carry the statistics, unrolled: what the loops below must equal."""

    def run(params, stats, batch):
        last, ys = lax.scan(
            lambda stats, batch: carried(mapped(params, stats, batch)), stats, two_steps(batch)
        )
        return ys, last

    return run


def carried(results):
    y, updated = results
    return jax.tree.map(lambda leaf: leaf.mean(0), updated), y


def two_steps(batch):
    return jax.tree.map(lambda leaf: jnp.stack([leaf, 0.7 * leaf + 0.3]), batch)


def in_cond(mapped):
    def run(params, stats, batch):
        def otherwise(params, stats, batch):
            return jax.tree.map(jnp.zeros_like, mapped(params, stats, batch))

        return lax.cond(jnp.sum(batch[0]) < 1e9, mapped, otherwise, params, stats, batch)

    return run


def in_while(mapped):
    """Of which there is forward mode alone."""

    def run(params, stats, batch):
        steps = two_steps(batch)
        stats, y = carried(mapped(params, stats, batch))

        def body(carry):
            number, stats, _ = carry
            step = jax.tree.map(lambda leaf: leaf[number], steps)
            return number + 1, *carried(mapped(params, stats, step))

        _, stats, y = lax.while_loop(lambda carry: carry[0] < 2, body, (1, stats, y))
        return y, stats

    return run


def unrolled(mapped):
    """Without a loop, what all steps return and the last statistics."""

    def run(params, stats, batch):
        ys, steps = [], two_steps(batch)
        for number in range(2):
            step = jax.tree.map(lambda leaf, number=number: leaf[number], steps)
            stats, y = carried(mapped(params, stats, step))
            ys.append(y)
        return jnp.stack(ys), stats

    return run


def the_last(function):
    def run(*arguments):
        ys, updated = function(*arguments)
        return ys[-1], updated

    return run


def same(mapped):
    return mapped


class Nesting(NamedTuple):
    """What is around a map, and the same without a transform for the definition."""

    build: Callable[[Any], Any]
    plain: Callable[[Any], Any] = same


NESTINGS = {
    "jit": Nesting(jax.jit),
    "checkpoint": Nesting(jax.checkpoint),
    "scan": Nesting(in_scan, unrolled),
    "cond": Nesting(in_cond),
}
DEEP = {
    "scan of checkpoint": Nesting(lambda mapped: in_scan(jax.checkpoint(mapped)), unrolled),
    "checkpoint of scan": Nesting(lambda mapped: jax.checkpoint(in_scan(mapped)), unrolled),
    "jit of cond of checkpoint": Nesting(lambda mapped: jax.jit(in_cond(jax.checkpoint(mapped)))),
    "scan of cond of jit": Nesting(lambda mapped: in_scan(in_cond(jax.jit(mapped))), unrolled),
}


# --- derivatives ----------------------------------------------------------------------------------


def by_jvp(function, *arguments):
    return jax.jvp(function, arguments, directions(arguments))


def by_grad(function, *arguments):
    return jax.grad(loss_of(function), argnums=(0, 1, 2))(*arguments)


def by_hessian_vector(function, *arguments):
    return by_jvp(partial(by_grad, function), *arguments)[1]


DERIVATIVES = {"grad": by_grad, "jvp": by_jvp, "hessian-vector": by_hessian_vector}


def in_body(derivative):
    """The derivative inside of a while loop, summed over two steps."""

    def run(mapped, params, stats, batch):
        steps = two_steps(batch)

        def step(number):
            return derivative(mapped, params, stats, jax.tree.map(lambda leaf: leaf[number], steps))

        def body(carry):
            number, total = carry
            return number + 1, jax.tree.map(jnp.add, total, step(number))

        return lax.while_loop(lambda carry: carry[0] < 2, body, (1, step(0)))[1]

    return run


def in_both_steps(derivative):
    def run(mapped, params, stats, batch):
        steps = two_steps(batch)
        first, second = (
            derivative(mapped, params, stats, jax.tree.map(lambda leaf, n=n: leaf[n], steps))
            for n in range(2)
        )
        return jax.tree.map(jnp.add, first, second)

    return run


def differentiate(nestings, mapped, arguments, *, loops=True, plain=False):
    """Every derivative of a map in every nesting, and, with `loops`, in and through `while`."""
    once: dict[Any, Any] = {}
    found = {}
    for name, nesting in nestings.items():
        build = nesting.plain if plain else nesting.build
        for kind, derivative in DERIVATIVES.items():
            # What is the same without a transform is differentiated once.
            if not plain or (build, kind) not in once:
                once[build, kind] = derivative(build(mapped), *arguments)
            found[name, kind] = once[build, kind]
    if not loops:
        return found
    for kind, derivative in DERIVATIVES.items():
        inside = (in_both_steps if plain else in_body)(derivative)
        found["while's body", kind] = inside(mapped, *arguments)
    through = the_last(unrolled(mapped)) if plain else in_while(mapped)
    return {**found, ("while", "jvp"): by_jvp(through, *arguments)}


def arguments_of(variant, sharing=ALL, *, masked=False, seed=70):
    params, stats, _ = variant.arguments(seed)
    x = variant.arguments(seed, (MEMBERS,))[2]
    weights = None
    if masked:
        # All of member 1 is left out, and something of others. A member that is alone is whole: the
        # definition has no moments of a row without a value.
        weights = jnp.abs(standard_normal(seed + 9, (*x.shape[:-1], 1), np.float64))
        weights = weights + 0.3 if [1] in sharing else weights.at[1].set(0)
    return params, stats, (x, weights)


@functools.cache
def expected_of(norm, sharing, masked, names, loops):
    variant, sharing = NORMS[norm], [list(members) for members in sharing]
    nestings = {name: (NESTINGS | DEEP)[name] for name in names}
    whole = by_definition(variant, sharing)
    run = jax.jit(partial(differentiate, nestings, whole, loops=loops, plain=True))
    return run(arguments_of(variant, sharing, masked=masked))


def check(norm, mapped, sharing, nestings, *, masked=False, loops=True):
    arguments = arguments_of(NORMS[norm], sharing, masked=masked)
    found = jax.jit(partial(differentiate, nestings, mapped, loops=loops))(arguments)
    expected = expected_of(norm, tuple(map(tuple, sharing)), masked, tuple(nestings), loops)
    assert found.keys() == expected.keys()
    for key in found:
        try:
            assert_close(jax.tree.map(np.asarray, found[key]), expected[key], tolerance=TOLERANCE)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error
