"""One table: every norm in every map in every nesting, differentiated from the outside.

JAX traces the rule of a `custom_jvp` without the axes of an enclosing `vmap`, and keeps what it has
traced: a derivative that fails alone can work after another call. So what must not depend on that
is tried after the caches are cleared, and in a process of its own. The reference is the definition
in double precision over all members that share statistics, in a loop where ours is in a `scan`.
"""

import functools
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nestings import (
    ALL,
    BOTH,
    DEEP,
    DERIVATIVES,
    MAPS,
    MAPS_OF_MAPS,
    MASKED,
    MEMBERS,
    NESTINGS,
    NORMS,
    TOLERANCE,
    arguments_of,
    by_definition,
    by_grad,
    by_hessian_vector,
    by_jvp,
    by_vmap,
    check,
    copied,
    in_scan,
    in_while,
    on_batch,
    vmap_around_shard_map,
    vmap_in_shard_map,
)
from support import assert_close, exact, quick
from test_variants import directions, loss_of

import bn_jax as bn

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


# --- the table ------------------------------------------------------------------------------------

SHORT = ("batch norm", "vmap with a name", True, ("checkpoint", "scan"))
# A norm with state, one without, and the one that JAX differentiates for the most part. The others
# share their moments with these, and are mapped by `vmap` alone.
IN_MAPS = ["batch norm", "layer norm", "whitening", "domains"]
CASES = [
    SHORT,
    *(("batch norm", kind, False, tuple(NESTINGS)) for kind in MAPS),
    *((norm, "shard_map", False, tuple(NESTINGS)) for norm in IN_MAPS[1:]),
    *((norm, "vmap with a name", norm in MASKED, tuple(NESTINGS)) for norm in NORMS),
    ("batch norm", "shard_map", True, tuple(NESTINGS)),
]


@pytest.mark.parametrize(("norm", "kind", "masked", "names"), quick(CASES, [SHORT]))
def test_every_nesting_is_the_definition(norm, kind, masked, names):
    build, sharing = MAPS[kind]
    nestings = {name: NESTINGS[name] for name in names}
    check(norm, build(on_batch(NORMS[norm].ours)), sharing, nestings, masked=masked)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        *(("batch norm", kind) for kind in ("vmap with a name", "pmap", "shard_map")),
        ("layer norm", "vmap with a name"),
        ("whitening", "vmap with a name"),
    ],
)
def test_nestings_in_nestings(norm, kind):
    build, sharing = MAPS[kind]
    check(norm, build(on_batch(NORMS[norm].ours)), sharing, DEEP, loops=False)


OF_LAYER_NORM = ["shard_map explicit", "vmap of vmap", "vmap in shard_map", "vmap in pmap"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        *(("batch norm", kind) for kind in MAPS_OF_MAPS),
        *(("layer norm", kind) for kind in OF_LAYER_NORM),
    ],
)
def test_maps_in_maps(norm, kind):
    build, sharing = MAPS_OF_MAPS[kind]
    nestings = {"scan of checkpoint": DEEP["scan of checkpoint"]}
    mapped = build(on_batch(NORMS[norm].ours))
    check(norm, mapped, sharing, nestings, masked=True, loops=False)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_is_differentiated_in_every_nesting(norm):
    """Only traced: that there is no error."""
    arguments = arguments_of(NORMS[norm])
    nested = in_scan(jax.checkpoint(jax.jit(by_vmap(on_batch(NORMS[norm].ours)))))
    jax.eval_shape(partial(by_hessian_vector, nested), *arguments)
    jax.eval_shape(partial(by_jvp, in_while(by_vmap(on_batch(NORMS[norm].ours)))), *arguments)


@pytest.mark.parametrize("build", [vmap_in_shard_map, vmap_around_shard_map])
def test_a_vmap_that_jax_cannot_sum_over_says_what_to_do(build):
    arguments = arguments_of(NORMS["batch norm"])
    names = BOTH, *BOTH
    for axis_name in names:
        mapped = build(on_batch(NORMS["batch norm"].ours), axis_name, check_vma=True)
        if (axis_name == "host") == (build is vmap_in_shard_map) and axis_name != BOTH:
            jax.eval_shape(mapped, *arguments)
            continue
        with pytest.raises(ValueError, match="check_vma=False"):
            jax.eval_shape(mapped, *arguments)
        # The advice.
        mapped = build(on_batch(NORMS["batch norm"].ours), axis_name, check_vma=False)
        jax.eval_shape(partial(by_grad, mapped), *arguments)


# --- alone, and in any order ----------------------------------------------------------------------


def by_linearize(function, *arguments):
    result, push = jax.linearize(function, *arguments)
    return result, push(*directions(arguments))


def by_vjp(function, *arguments):
    result, pull = jax.vjp(function, *arguments)
    return pull(directions(result))


def by_hessian(function, *arguments):
    params, stats, (x, weights) = arguments
    return jax.hessian(lambda x: loss_of(function)(params, stats, (x, weights)))(x)


CALLS: dict[str, Any] = {
    **DERIVATIVES,
    "linearize": by_linearize,
    "vjp": by_vjp,
    "hessian": by_hessian,
    "value": lambda function, *arguments: function(*arguments),
}
ORDERS = ["grad", "jvp", "linearize", "vjp", "hessian", "value grad", "jvp vjp", "vjp linearize"]


def call_in_order(norm, calls):
    """Calls a compiled map, and nothing around that, so that each derivative is JAX's first."""
    arguments = arguments_of(NORMS[norm])
    mapped = jax.jit(by_vmap(on_batch(NORMS[norm].ours)))
    whole = by_definition(NORMS[norm], ALL)
    found = {call: CALLS[call](mapped, *arguments) for call in calls.split()}
    expected = jax.jit(
        lambda *arguments: {call: CALLS[call](whole, *arguments) for call in calls.split()}
    )
    assert_close(found, expected(*arguments), tolerance=TOLERANCE)


@pytest.mark.parametrize("norm", quick(["batch norm", "layer norm"], ["batch norm"]))
@pytest.mark.parametrize("calls", quick(ORDERS, ["grad", "linearize", "jvp vjp"]))
def test_a_derivative_alone_and_after_others(norm, calls):
    jax.clear_caches()
    call_in_order(norm, calls)


ALONE = """
import sys
sys.path[:0] = [{tests!r}, {core!r}]
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)
from test_nesting import call_in_order
call_in_order({norm!r}, {calls!r})
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("norm", IN_MAPS)
def test_a_gradient_in_a_process_of_its_own(norm):
    core = Path(__file__).parent
    code = ALONE.format(tests=str(core.parent), core=str(core), norm=norm, calls="grad")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=core.parent.parent)


# --- modules --------------------------------------------------------------------------------------

MODULES: dict[str, Any] = {
    "linen": (bn.linen.BatchNorm, {"use_running_average": False}),
    "layer norm": (bn.linen.LayerNorm, {}),
    "rms norm": (bn.linen.RMSNorm, {}),
    "instance norm": (bn.linen.InstanceNorm, {}),
    "group norm": (bn.linen.GroupNorm, {"num_groups": 2}),
    "whitening": (
        bn.linen.WhiteningNorm,
        {"use_running_average": False, "iterations": 30, "group_size": 2, "momentum": None},
    ),
}


def by_linen_vmap(kind):
    """Statistics are broadcast: JAX accepts them only where the sums over the axis do not vary."""
    cls, options = MODULES[kind]
    layer = nn.vmap(
        cls,
        in_axes=0,
        out_axes=0,
        axis_name="data",
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
    )(axis_name="data", **options)

    def mapped(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        y, updates = layer.apply(variables, batch[0], mutable=["batch_stats"])
        return y, jax.tree.map(partial(copied, MEMBERS), updates.get("batch_stats", stats))

    return mapped


def by_nnx_vmap(params, stats, batch):
    layer = bn.nnx.BatchNorm(3, axis_name="data", rngs=nnx.Rngs(0))
    nnx.update(layer, {**params, **stats})
    axes = nnx.StateAxes([(nnx.Variable, None)])
    call = nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0), axis_name="data")
    y = call(layer, batch[0])
    updated = {"mean": layer.mean[...], "var": layer.var[...]}
    return y, jax.tree.map(partial(copied, MEMBERS), updated)


@pytest.mark.parametrize("kind", quick(MODULES, ["linen"]))
def test_vmap_of_linen(kind):
    nestings = {"checkpoint": NESTINGS["checkpoint"]}
    check(kind, by_linen_vmap(kind), ALL, nestings)


def test_vmap_of_nnx():
    check("nnx", by_nnx_vmap, ALL, {"checkpoint": NESTINGS["checkpoint"]})


# --- what is left out -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", quick(MASKED, ["batch norm"]))
@pytest.mark.parametrize("left_out", [[1], list(range(MEMBERS))], ids=["a member", "all"])
def test_nan_in_members_that_the_mask_leaves_out(norm, left_out):
    variant = NORMS[norm]
    params, stats, (x, _) = arguments_of(variant)
    kept = np.ones((MEMBERS, *variant.shape[:-1], 1), bool)
    kept[left_out] = False
    poisoned = jnp.where(kept, x, jnp.nan)

    def loss(function, params, x):
        y, updated = function(params, stats, x)
        return jnp.sum(jnp.sin(jnp.where(kept, y, 0))), updated

    @jax.jit
    def ours(params, stats, x):
        masked = jax.vmap(
            lambda x, mask: variant.ours(params, stats, x, mask=mask, axis_name="data"),
            axis_name="data",
        )
        return masked(x, jnp.asarray(kept))

    gradients, updated = jax.grad(partial(loss, ours), (0, 1), has_aux=True)(params, poisoned)
    members = [member for member in range(MEMBERS) if member not in left_out]
    expected = jax.tree.map(jnp.zeros_like, (params, x))
    new_stats = stats
    if members:
        whole = variant.reference
        few = jax.grad(lambda params, x: jnp.sum(jnp.sin(whole(params, stats, x)[0])), (0, 1))(
            params, x[np.array(members)]
        )
        expected = few[0], expected[1].at[np.array(members)].set(few[1])
        new_stats = whole(params, stats, x[np.array(members)])[1]
    assert_close(gradients, expected, tolerance=TOLERANCE)
    if variant.updates:
        new = jax.tree.map(partial(copied, MEMBERS), new_stats)
        assert_close(updated, new, tolerance=TOLERANCE)


# --- numbers --------------------------------------------------------------------------------------


def to(dtype, tree):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def far(x):
    return x + 1e4


def constant(x):
    """Of the first feature, at a value that sums round."""
    return x.at[..., 0].set(1e4 + 0.1)


def without_mean(function):
    """The sine of a mean that is far from zero is noise; the variance of a constant is not."""

    def run(*arguments):
        y, updated = function(*arguments)
        return y, {name: leaf for name, leaf in updated.items() if name in ("var", "cov")}

    return run


@functools.cache
def derivatives_without_mean(norm, of_ours):
    variant = NORMS[norm]
    whole = by_definition(variant, ALL)
    function = without_mean(jax.jit(by_vmap(on_batch(variant.ours))) if of_ours else whole)

    def derive(*arguments):
        return {name: one(function, *arguments) for name, one in DERIVATIVES.items()}

    return jax.jit(derive)


@pytest.mark.parametrize(
    ("dtype", "place", "bound"),
    [
        (jnp.float32, far, 2e-5),
        (jnp.float32, constant, 2e-5),
        pytest.param(jnp.bfloat16, jnp.array, 3e-2, marks=pytest.mark.exhaustive),
        # Of a constant, changes of y are hundreds of changes of x, and rounded to bfloat16.
        pytest.param(jnp.bfloat16, constant, 0.15, marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.parametrize(
    "norm",
    quick(
        ["batch norm", "batch renorm", "layer norm", "rms norm", "instance norm", "whitening"],
        ["batch norm"],
    ),
)
def test_far_from_zero_constant_and_in_half_precision(norm, dtype, place, bound):
    params, stats, (x, _) = arguments_of(NORMS[norm])
    x, params, stats = place(x).astype(dtype), to(dtype, params), to(jnp.float32, stats)
    found = derivatives_without_mean(norm, True)(params, stats, (x, None))
    exactly = to(jnp.float64, (params, stats, (x, None)))
    expected = derivatives_without_mean(norm, False)(*exactly)
    # Relative to the largest entry of an array, or to 1.
    errors = jax.tree.map(
        lambda one, other: (
            np.abs(exact(one) - exact(other)).max() / max(1, np.abs(exact(other)).max())
        ),
        found,
        expected,
    )
    assert max(jax.tree.leaves(errors)) < bound, errors
