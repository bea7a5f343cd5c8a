"""Batches large enough for sums over blocks of rows, which a CPU takes in one loop."""

import math
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
from support import (
    all_reduces,
    assert_close,
    define_batch_norm,
    define_gradients,
    exact,
    fuses_reductions,
    make_state,
    quick,
    standard_normal,
    written_out,
)

import bn_jax as bn
from benchmarks.hlo import collectives
from bn_jax._core.axes import Reduction
from bn_jax._core.blocks import ROWS_TO_SPREAD, ROWS_TO_SUM, rows_of_a_block, spread_together
from bn_jax._core.moments import measure

TRAIN: Any = partial(bn.batch_norm, use_running_average=False)
BY_DOMAIN: Any = partial(bn.domain_batch_norm, use_running_average=False)

ROWS, IMAGES, LONG = (1024, 3), (4, 2, 8, 3), (3, 15, 3)
SHAPES = {"rows": ROWS, "images": IMAGES, "odd": LONG}
KINDS = ("examples", "values", "weights")


def mask_of(kind, shape, seed=1):
    rng = np.random.default_rng(seed)
    if kind == "weights":
        return rng.integers(0, 4, (*shape[:-1], 1)) / np.float32(2)
    kept = shape if kind == "values" else (shape[0], *(1 for _ in shape[1:]))
    return (rng.random(kept) < 0.6) | (np.arange(shape[0]) == 0).reshape(-1, *(1,) * len(kept[1:]))


def hide(x, mask, poison):
    return jnp.where(jnp.asarray(mask) > 0, x, jnp.asarray(poison, x.dtype))


@jax.jit
def differentiated(params, stats, x, mask):
    def loss(params, x):
        y, updated = TRAIN(params, stats, x, mask=mask)
        return jnp.sum(jnp.sin(jnp.where(mask > 0, y, 0))), (y, updated)

    gradients, results = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return *results, *gradients


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", quick([0.0, 1e4], [0.0]))
def test_masked_is_the_definition(shape, kind, offset):
    (params, stats), x = make_state((3,)), standard_normal(3, SHAPES[shape]) + np.float32(offset)
    mask = mask_of(kind, x.shape)
    y, updated, of_params, of_x = differentiated(params, stats, hide(x, mask, np.nan), mask)
    expected, new = define_batch_norm(params, stats, x, mask=mask)
    seen = np.broadcast_to(mask, x.shape) > 0
    assert_close(np.asarray(y)[seen], expected[seen])
    assert_close(updated, new)
    expected_of_params, expected_of_x = define_gradients(params, x, mask, np.cos)
    tolerance = 2e-5 if offset == 0 else 1e-4
    assert_close((of_params, of_x), (expected_of_params, expected_of_x), tolerance=tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64"])
@pytest.mark.parametrize("kind", quick(KINDS, KINDS[1:]))
def test_moments_of_other_dtypes(dtype, kind):
    (_, stats), x = make_state((3,)), standard_normal(4, ROWS, dtype)
    mask, stats = mask_of(kind, ROWS), {**stats, "mean": stats["mean"].astype(x.dtype)}
    stats["mean"] = stats["mean"] if dtype == "complex64" else stats["mean"].astype("float32")
    _, updated = jax.jit(partial(TRAIN, {}))(stats, hide(x, mask, np.inf), mask=mask)
    _, expected = define_batch_norm({}, stats, x, mask=mask)
    assert_close(updated, expected, tolerance=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_hidden_does_not_change_a_bit(shape):
    (params, stats), x = make_state((3,)), standard_normal(5, SHAPES[shape])
    mask = mask_of("values", x.shape)
    *expected, of_x = differentiated(params, stats, hide(x, mask, 0), mask)
    for poison in (np.nan, np.inf, 3e38):
        y, *found, of_poisoned = differentiated(params, stats, hide(x, mask, poison), mask)
        assert (np.asarray(y)[mask] == np.asarray(expected[0])[mask]).all()
        for one, other in zip(*map(jax.tree.leaves, (found, expected[1:])), strict=True):
            assert (one == other).all()
        assert (of_poisoned == of_x).all()


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("shape", quick(SHAPES, ["rows"]))
def test_every_order_and_direction_of_derivatives(shape):
    """Against JAX's derivatives of the definition, in double precision."""
    with jax.enable_x64(True):
        params, stats = jax.tree.map(partial(exact, xp=jnp), make_state((3,)))
        x, dx = (standard_normal(seed, SHAPES[shape], np.float64) for seed in (6, 7))
        mask = jnp.asarray(mask_of("examples", x.shape))

        def push(train):
            def loss(params, x):
                y, updated = train(params, stats, x, mask=mask)
                return jnp.sum(jnp.where(mask, jnp.sin(y), 0)) + jnp.sum(updated["var"] ** 2)

            tangents = jax.tree.map(jnp.cos, params), dx
            first = jax.grad(loss, (0, 1))
            return (
                jax.jvp(first, (params, x), tangents),
                jax.grad(
                    lambda x: jnp.sum(
                        jnp.sin(first(params, x)[1]) + first(params, x)[0]["scale"][0]
                    )
                )(x),
                jax.jvp(loss, (params, x), tangents),
            )

        expected = jax.jit(partial(push, partial(define_batch_norm, xp=jnp)))()
        assert_close(jax.jit(partial(push, TRAIN))(), expected, tolerance=1e-8)


@pytest.mark.parametrize("method", ["guarded", "once"])
def test_the_sums_themselves_have_derivatives(method):
    """JAX may drop the rule for a derivative, and differentiate what it finds."""
    x, mask = standard_normal(8, ROWS), jnp.asarray(mask_of("examples", ROWS))
    reduction, shift = Reduction((0,), method=method), jnp.zeros((1, 3))

    def total(mean, var):
        return jnp.sum(jnp.sin(mean) + var**2)

    @jax.jit
    def found(x):
        measured = measure(reduction, x, mask, shift)
        return total(measured.mean(), measured.var)

    @jax.jit
    def expected(x):
        count = jnp.sum(mask)
        mean = jnp.sum(jnp.where(mask, x, 0), 0, keepdims=True) / count
        return total(mean, jnp.sum(jnp.where(mask, (x - mean) ** 2, 0), 0, keepdims=True) / count)

    assert_close(jax.grad(found)(x), jax.grad(expected)(x), tolerance=1e-6)
    dx = jnp.cos(x)
    assert_close(jax.jvp(found, (x,), (dx,)), jax.jvp(expected, (x,), (dx,)), tolerance=1e-5)


def test_vmap():
    (params, stats), x = make_state((3,)), standard_normal(9, (2, *ROWS))
    masks = np.stack([mask_of("examples", ROWS, seed) for seed in (1, 2)])
    found = jax.jit(jax.vmap(differentiated, (None, None, 0, 0)))(params, stats, x, masks)
    for index in range(2):
        expected = differentiated(params, stats, x[index], masks[index])
        assert_close(jax.tree.map(lambda leaf, i=index: leaf[i], found), expected)


# --- domains ------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", quick([False, True], [True]))
@pytest.mark.parametrize("number", quick([1, 2, 3, 4, 5], [1, 3]))
def test_domains_of_rows_are_separate_norms(number, masked):
    with jax.enable_x64(True):
        leaves = [standard_normal(seed, (number, 3), np.float64) for seed in range(4)]
        params = {"scale": leaves[0], "bias": leaves[1]}
        stats = {"mean": leaves[2], "var": jnp.abs(leaves[3]) + 0.5}
        x = standard_normal(5, ROWS, np.float64)
        # Some examples of no domain, and none of the second domain.
        domain = np.random.default_rng(6).integers(-1, number, ROWS[0])
        domain[domain == 1] = 0
        options = {"mask": mask_of("weights", ROWS)} if masked else {}
        weights = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)

        def all_of(train, domain):
            def loss(params, x):
                y, updated = train(params, stats, x, domain=domain, **options)
                return jnp.sum(jnp.sin(y) * weights), (y, updated)

            return jax.grad(loss, (0, 1), has_aux=True)(params, x)

        expected = jax.jit(partial(all_of, define_domains, domain))()
        found = jax.jit(partial(all_of, BY_DOMAIN))(jnp.asarray(domain))
        assert_close(found, expected, tolerance=1e-9)


def test_one_domain_of_images_is_a_mask():
    (params, stats), x = make_state((1, 3)), standard_normal(7, IMAGES)
    domain = jnp.array([0, 1, 0, -1])
    mask = (domain == 0)[:, None, None, None]

    def gradients(train, x, *given, **options):
        def loss(params, x):
            y, updated = train(params, stats, x, *given, **options)
            return jnp.sum(jnp.where(mask, jnp.sin(y), 0)), updated

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    def masked(params, stats, x):
        own = [jax.tree.map(lambda leaf: leaf[0], tree) for tree in (params, stats)]
        y, updated = TRAIN(*own, x, mask=mask)
        return y, jax.tree.map(lambda leaf: leaf[None], updated)

    found = jax.jit(partial(gradients, BY_DOMAIN))
    expected = jax.jit(partial(gradients, masked))(x)
    assert_close(found(x, domain), expected, tolerance=1e-5)
    (of_params, _), updated = found(hide(x, mask, np.nan), domain)
    assert_close((of_params, updated), (expected[0][0], expected[1]), tolerance=1e-5)


# --- compiled programs ----------------------------------------------------------------------------


def passes(number=None):
    """Forward, and forward and backward, as functions of x, a mask or domains, and a cotangent."""
    params, stats = make_state((3,) if number is None else (number, 3))

    def forward(x, which):
        if number is None:
            return TRAIN(params, stats, x, mask=which, axis_name="data")
        return BY_DOMAIN(params, stats, x, which, axis_name="data")

    def backward(x, which, cotangent):
        y, pull = jax.vjp(lambda x: forward(x, which)[0], x)
        return y, pull(jax.lax.optimization_barrier((y, cotangent))[1])[0]

    return forward, backward


def kind_of(number, shape):
    """A mask or domains of all examples."""
    if number is None:
        return jax.ShapeDtypeStruct((shape[0], *(1 for _ in shape[1:])), bool)
    return jax.ShapeDtypeStruct(shape[:1], jnp.int32)


@fuses_reductions
@pytest.mark.parametrize("number", [None, 1])
@pytest.mark.parametrize("shape", [(4096, 3), (16, 8, 8, 3)])
def test_nothing_of_the_size_of_x_is_written_but_the_results(shape, number):
    _, backward = passes(number)
    x, which = jax.ShapeDtypeStruct(shape, jnp.float32), kind_of(number, shape)
    text = jax.jit(backward).lower(x, which, x).compile().as_text() or ""
    sizes = {x.shape, (shape[0], 1, *shape[1:]), (math.prod(shape[:-1]), 3)}
    assert [kind for size in sizes for kind in written_out(text, size)] == ["f32", "f32"]


@pytest.mark.parametrize("make_mesh", [automatic_mesh, explicit_mesh])
@pytest.mark.parametrize("regime", ["shard_map", "jit"])
@pytest.mark.parametrize("number", quick([None, 1, 2, 3], [None, 2]))
def test_one_all_reduce_forward_and_one_backward(regime, make_mesh, number):
    forward, backward = passes(number)
    mesh, specs = make_mesh(), (P("data"), P("data"), P("data"))
    if regime == "shard_map":
        forward = jax.shard_map(forward, mesh=mesh, in_specs=specs[:2], out_specs=(P("data"), P()))
        backward = jax.shard_map(backward, mesh=mesh, in_specs=specs, out_specs=specs[:2])
    x = jax.ShapeDtypeStruct((1024 * DEVICES, 3), jnp.float32)
    given = [
        jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=NamedSharding(mesh, P("data")))
        for one in (x, kind_of(number, x.shape), x)
    ]
    with jax.set_mesh(mesh):
        texts = [
            jax.jit(function).lower(*given[:arguments]).compile().as_text() or ""
            for function, arguments in ((forward, 2), (backward, 3))
        ]
    assert {one.kind for text in texts for one in collectives(text)} == {"all-reduce"}
    assert [len(all_reduces(text)) for text in texts] == [1, 2]


def test_only_a_cpu_spreads_two_arrays_as_one():
    _, backward = passes()
    x = jax.ShapeDtypeStruct(ROWS, jnp.float32)
    traced = jax.jit(backward).trace(x, kind_of(None, ROWS), x)
    texts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert {platform: "complex<" in text for platform, text in texts.items()} == {
        "cpu": True, "cuda": False, "tpu": False
    }  # fmt: skip


def test_rows_of_a_block():
    def rows(shape, axes, most=ROWS_TO_SUM):
        return rows_of_a_block(axes, jnp.zeros(shape), most)

    assert rows(ROWS, (0,)) == 16
    assert rows(ROWS, (0,), ROWS_TO_SPREAD) == 8
    # With fewer rows, 64 devices could not hold whole blocks.
    assert rows((512, 3), (0,)) is None
    assert rows((512, 3), (0,), ROWS_TO_SPREAD) == 8
    assert rows(IMAGES, (0, 1, 2)) == 8
    assert rows(LONG, (0, 1)) == 15
    assert rows((2, 56, 56, 3), (0, 1, 2)) == 14
    assert rows((2, 13, 3), (0, 1), ROWS_TO_SPREAD) is None
    # Features come first, or there are none.
    assert rows((3, 1024), (1,)) is None
    assert rows((1024,), (0,)) is None
    assert rows(ROWS, ()) is None


def test_arrays_that_do_not_go_together_are_spread_apart():
    x = jnp.zeros(ROWS)
    one, other = jnp.ones((1, 3)), jnp.ones((1, 1))
    for first, second in ((one, other), (one, one + 0j), (one + 0j, one + 0j)):
        found = spread_together(x, first, second)
        assert found[0] is first and found[1] is second
