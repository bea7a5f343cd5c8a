"""A program exported with symbolic sizes equals the program that is compiled for the sizes called.

Batch and image sizes are symbolic: in training, in derivatives in both modes, and in updates. The
references are the definition in float64 NumPy, and the program compiled for the sizes.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import export
from support import (
    assert_close,
    define_affine,
    define_batch_norm,
    define_evaluation,
    define_moments,
    define_standardized,
    exact,
    quick,
    standard_normal,
)

import bn_jax as bn

# No factor of the batch: then no size of features is known to be under that of x.
FEATURES = 6
SYMBOLIC = "4*b, h, w"
SIZES = [(4, 2, 3), (12, 2, 1)]

pytestmark = pytest.mark.usefixtures("compile_quickly")

TRAIN = partial(bn.batch_norm, use_running_average=False)
RENORM = partial(bn.batch_renorm, use_running_average=False)
WHITEN = partial(bn.whitening_norm, use_running_average=False, iterations=30)
GROUPS: dict[str, Any] = {"axis_name": "devices", "axis_index_groups": [[0, 1], [2, 3]]}


def make_arguments(sizes, dtype="float32"):
    """Parameters, statistics, input and weights; these are zero for some examples."""
    x = (standard_normal(1, (*sizes, FEATURES)) * 2 + 3).astype(dtype)
    weights = np.random.default_rng(2).uniform(0.5, 2, (*sizes, 1))
    weights[1::3] = 0
    real = jnp.float64 if dtype == "float64" else jnp.float32
    arrays = [standard_normal(seed, FEATURES).astype(real) for seed in range(3, 7)]
    params = dict(zip(("scale", "bias"), arrays, strict=False))
    stats = {
        "mean": arrays[2],
        "var": jnp.abs(arrays[3]) + 0.1,
        "count": jnp.full(FEATURES, 2, real),
    }
    return params, stats, x, jnp.asarray(weights, real)


def export_with(function, sizes, arguments, constraints=()):
    """Exports a function of arguments of which those of rank 4 have these sizes before the last."""
    symbols = export.symbolic_shape(sizes, constraints=constraints)

    def shape(leaf):
        lead = symbols if leaf.ndim > 3 else leaf.shape[:-1]
        return jax.ShapeDtypeStruct((*lead, *leaf.shape[-1:]), leaf.dtype)

    return export.export(jax.jit(function))(*jax.tree.map(shape, arguments))


# --- the definitions ----------------------------------------------------------------------------


def define_ghost(groups_of, params, stats, x, mask=None):
    """Batch norm of `groups_of` consecutive examples, or of so many groups where negative."""
    mask = np.ones(x.shape) if mask is None else np.broadcast_to(mask, x.shape)
    number = -groups_of if groups_of < 0 else len(x) // groups_of
    parts = zip(np.split(np.asarray(x), number), np.split(mask, number), strict=True)
    normalized = []
    for part, part_mask in parts:
        y, _ = define_batch_norm(params, stats, part, mask=part_mask)
        normalized.append(y if part_mask.any() else define_evaluation(params, stats, part))
    return np.concatenate(normalized), define_batch_norm(params, stats, x, mask=mask)[1]


def define_renorm(params, stats, x, mask=None):
    _, mean, var = define_moments(x, -1, mask)
    deviation = np.sqrt(exact(stats["var"]) + 1e-5)
    r = np.clip(np.sqrt(var + 1e-5) / deviation, 1 / 3, 3)
    d = np.clip((mean - exact(stats["mean"])) / deviation, -5, 5)
    y = define_affine(x, mean, var, r, d)
    y = y * exact(params["scale"]) + exact(params["bias"])
    return y, define_batch_norm(params, stats, x, mask=mask)[1]


def define_whitening(params, stats, x, mask=None):
    """Whitening of pairs of features, whose running covariances were the identity."""
    _, mean, _ = define_moments(x, -1, mask)
    pairs = (exact(x) - mean).reshape(-1, 3, 2)
    weights = np.broadcast_to(1.0 if mask is None else mask, (*x.shape[:-1], 1)).reshape(-1)
    cov = np.einsum("n,ngi,ngj->gij", weights, pairs, pairs) / weights.sum()
    values, vectors = np.linalg.eigh(cov + 1e-5 * np.eye(2))
    root = np.einsum("gik,gk,gjk->gij", vectors, values**-0.5, vectors)
    y = np.einsum("ngi,gij->ngj", pairs, root).reshape(x.shape)
    share = 1 / 3
    return y * exact(params["scale"]) + exact(params["bias"]), {
        "mean": (1 - share) * exact(stats["mean"]) + share * mean,
        "cov": (1 - share) * np.eye(2) + share * cov,
        "count": np.full(3, 3.0),
    }


def define_rows(params, x, axes, mask=None, *, about_zero=False, groups=None):
    shape = x.shape if groups is None else (*x.shape[:-1], groups, x.shape[-1] // groups)
    weights = np.broadcast_to(1.0 if mask is None else mask, x.shape).reshape(shape)
    y = define_standardized(exact(x).reshape(shape), axes, weights, about_zero=about_zero)
    # Where nothing entered, x counts as already normalized.
    present = weights.sum(axes, keepdims=True) > 0
    y = np.where(present, y, exact(x).reshape(shape) / np.sqrt(1 + 1e-6)).reshape(x.shape)
    return y * exact(params["scale"]) + exact(params["bias"])


# --- the norms ----------------------------------------------------------------------------------


class Norm(NamedTuple):
    """A norm and its definition: functions of parameters, statistics, input and weights."""

    ours: Callable[..., Any]
    define: Callable[..., Any]


def whiten(params, stats, x, **options):
    cov = jnp.broadcast_to(jnp.eye(2, dtype=stats["var"].dtype), (3, 2, 2))
    stats = {"mean": stats["mean"], "cov": cov, "count": stats["count"][:3]}
    return WHITEN(params, stats, x, momentum=None, group_size=2, **options)


def merge_two(params, stats, x, weights):
    """The moments of two parts of a batch are merged, and update the running statistics."""
    y, first = bn.normalize_by_batch(params, stats, x, virtual_batch_size=2)
    second = bn.moments(2 * x, (0, 1, 2), mask=weights > 0)
    return y, bn.update_batch_stats(stats, bn.merge_moments(first, second), running_var_ddof=1)


def define_two(params, stats, x, weights):
    both = np.concatenate([exact(x), 2 * exact(x)])
    mask = np.concatenate([np.ones_like(weights), weights > 0])
    y, _ = define_ghost(2, params, stats, x)
    return y, define_batch_norm(params, stats, both, mask=mask, running_var_ddof=1)[1]


def measure(params, stats, x, weights):
    """A state that is measured by two calls, in evaluation and in training."""
    stats = bn.start_measuring(stats)
    _, stats = bn.batch_norm(params, stats, x, use_running_average=True)
    y, stats = TRAIN(params, stats, 2 * x, mask=weights)
    return y, stats["measured"][:3]


def define_measured(params, stats, x, weights):
    both, mask = np.concatenate([exact(x), 2 * exact(x)]), np.ones_like(weights)
    count, mean, var = define_moments(both, -1, np.concatenate([mask, weights]))
    return define_batch_norm(params, stats, 2 * exact(x), mask=weights)[0], (count, mean, var)


# fmt: off
NORMS = {
    "batch norm": Norm(
        lambda p, s, x, w: TRAIN(p, s, x), lambda p, s, x, w: define_batch_norm(p, s, x)
    ),
    "cumulative, unbiased": Norm(
        lambda p, s, x, w: TRAIN(p, s, x, momentum=None, running_var_ddof=1),
        lambda p, s, x, w: define_batch_norm(p, s, x, momentum=None, running_var_ddof=1),
    ),
    "weights": Norm(
        lambda p, s, x, w: TRAIN(p, s, x, mask=w),
        lambda p, s, x, w: define_batch_norm(p, s, x, mask=w),
    ),
    "a mask of positions": Norm(
        lambda p, s, x, w: TRAIN(p, s, x, mask=w[:1] == w[:1].max()),
        lambda p, s, x, w: define_batch_norm(p, s, x, mask=w[:1] == w[:1].max()),
    ),
    "a mask of features": Norm(
        lambda p, s, x, w: TRAIN(p, s, x, mask=(x > 1) & (w > 0)),
        lambda p, s, x, w: define_batch_norm(p, s, x, mask=(x > 1) & (w > 0)),
    ),
    "activation, residual": Norm(
        lambda p, s, x, w: TRAIN(p, s, x, activation=jax.nn.silu, residual=x, mask=w),
        lambda p, s, x, w: (
            (lambda y: y / (1 + np.exp(-y)))(define_batch_norm(p, s, x, mask=w)[0] + exact(x)),
            define_batch_norm(p, s, x, mask=w)[1],
        ),
    ),
    "ghost": Norm(
        lambda p, s, x, w: TRAIN(p, s, x, virtual_batch_size=4),
        lambda p, s, x, w: define_ghost(4, p, s, x),
    ),
    "ghost, weights": Norm(
        lambda p, s, x, w: TRAIN(p, s, x, virtual_batch_size=2, mask=w),
        lambda p, s, x, w: define_ghost(2, p, s, x, w),
    ),
    "groups": Norm(
        lambda p, s, x, w: TRAIN(p, s, x, **GROUPS),
        lambda p, s, x, w: define_ghost(-2, p, s, x),
    ),
    "groups, weights of examples": Norm(
        lambda p, s, x, w: TRAIN(p, s, x, mask=w[:, :1, :1], **GROUPS),
        lambda p, s, x, w: define_ghost(-2, p, s, x, w[:, :1, :1]),
    ),
    "first axis": Norm(
        lambda p, s, x, w: TRAIN(p, s, x.reshape(-1, FEATURES).T, axis=0),
        lambda p, s, x, w: define_batch_norm(p, s, x.reshape(-1, FEATURES).T, axis=0),
    ),
    "evaluation that updates": Norm(
        lambda p, s, x, w: bn.batch_norm(
            p, s, x, use_running_average=True, update_running_average=True, mask=w
        ),
        lambda p, s, x, w: (define_evaluation(p, s, x), define_batch_norm(p, s, x, mask=w)[1]),
    ),
    "batch renorm": Norm(
        lambda p, s, x, w: RENORM(p, s, x), lambda p, s, x, w: define_renorm(p, s, x)
    ),
    "batch renorm, weights": Norm(
        lambda p, s, x, w: RENORM(p, s, x, mask=w), lambda p, s, x, w: define_renorm(p, s, x, w)
    ),
    "merged moments": Norm(merge_two, define_two),
    "measured": Norm(measure, define_measured),
    "whitening": Norm(
        lambda p, s, x, w: whiten(p, s, x), lambda p, s, x, w: define_whitening(p, s, x)
    ),
    "whitening, weights": Norm(
        lambda p, s, x, w: whiten(p, s, x, mask=w),
        lambda p, s, x, w: define_whitening(p, s, x, w),
    ),
    "moments": Norm(
        lambda p, s, x, w: tuple(bn.moments(x)),
        lambda p, s, x, w: tuple(map(np.squeeze, define_moments(exact(x).reshape(-1, 1)))),
    ),
    "moments of positions": Norm(
        lambda p, s, x, w: tuple(bn.moments(x, (0, 3), mask=w)),
        lambda p, s, x, w: define_moments(x, (1, 2), w),
    ),
    "layer norm": Norm(
        lambda p, s, x, w: bn.layer_norm(p, x), lambda p, s, x, w: define_rows(p, x, -1)
    ),
    "layer norm of images": Norm(
        lambda p, s, x, w: bn.layer_norm(p, x, reduction_axes=(1, 2, 3)),
        lambda p, s, x, w: define_rows(p, x, (1, 2, 3)),
    ),
    "layer norm of images, weights": Norm(
        lambda p, s, x, w: bn.layer_norm(p, x, reduction_axes=(1, 2, 3), mask=w),
        lambda p, s, x, w: define_rows(p, x, (1, 2, 3), w),
    ),
    "rms norm of images": Norm(
        lambda p, s, x, w: bn.rms_norm(p, x, reduction_axes=(1, 2, 3)),
        lambda p, s, x, w: define_rows(p, x, (1, 2, 3), about_zero=True),
    ),
    "group norm": Norm(
        lambda p, s, x, w: bn.group_norm(p, x, num_groups=2),
        lambda p, s, x, w: define_rows(p, x, (1, 2, 4), groups=2),
    ),
    "group norm, weights": Norm(
        lambda p, s, x, w: bn.group_norm(p, x, num_groups=2, mask=w),
        lambda p, s, x, w: define_rows(p, x, (1, 2, 4), w, groups=2),
    ),
    "instance norm, weights": Norm(
        lambda p, s, x, w: bn.instance_norm(p, x, mask=w),
        lambda p, s, x, w: define_rows(p, x, (1, 2), w),
    ),
}
# fmt: on

# The norms whose programs the tests export together.
TOGETHER: dict[str, list[str]] = {
    "all": list(NORMS),
    "some": [
        "ghost, weights", "groups, weights of examples", "batch renorm, weights", "merged moments",
        "measured", "moments of positions", "layer norm of images, weights",
    ],
    "few": ["batch norm", "groups", "whitening", "layer norm"],
    **{name: [name] for name in NORMS},
}  # fmt: skip
OTHER_DTYPES = ["float64", "bfloat16", "float16"]
DERIVED = [
    ("float32", "few"),
    *(("float32", name) for name in NORMS),
    *((dtype, names) for dtype in OTHER_DTYPES for names in ("few", "some")),
]


def results_of(names, params, stats, x, weights):
    return {name: NORMS[name].ours(params, stats, x, weights) for name in names}


def with_derivatives(names, params, stats, x, weights):
    """The results, the gradients of a sum over all of them, and their change along a direction."""

    def results(params, x, weights):
        return results_of(names, params, stats, x, weights)

    def loss(*variables):
        leaves = jax.tree.leaves(results(*variables))
        return sum(jnp.sum(jnp.sin(leaf.astype(weights.dtype))) for leaf in leaves)

    variables = params, x, weights
    changes = jax.jvp(results, variables, jax.tree.map(jnp.cos, variables))
    return *changes, jax.grad(loss, (0, 1, 2))(*variables)


def assert_exported(exported, function, *arguments, tolerance=None):
    """The exported program agrees with the one compiled for these sizes, in dtypes too."""
    expected = jax.jit(function)(*arguments)
    actual = exported.call(*arguments)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    assert_close(actual, expected, tolerance=tolerance)


@pytest.mark.parametrize("names", quick(["some", "all"], ["some"]))
@pytest.mark.parametrize("dtype", quick(["float32", "float64", "float16"], ["float32"]))
def test_every_norm_is_its_definition(dtype, names):
    with jax.enable_x64(dtype == "float64"):
        function = partial(results_of, TOGETHER[names])
        exported = export_with(function, SYMBOLIC, make_arguments(SIZES[0], dtype))
        for arguments in [make_arguments(sizes, dtype) for sizes in SIZES]:
            actual = exported.call(*arguments)
            for name in TOGETHER[names]:
                defined = NORMS[name].define(*jax.tree.map(np.asarray, arguments))
                assert_close(actual[name], defined)


@pytest.mark.parametrize("dtype,names", quick(DERIVED, DERIVED[:1]))
def test_derivatives_are_those_of_the_sizes(dtype, names):
    with jax.enable_x64(dtype == "float64"):
        function = partial(with_derivatives, TOGETHER[names])
        exported = export_with(function, SYMBOLIC, make_arguments(SIZES[0], dtype))
        tolerance = {"float32": 5e-5, "bfloat16": 1e-3}.get(dtype)  # Symbolic sizes round apart.
        for sizes in SIZES[:1] if names == "few" else SIZES:
            assert_exported(exported, function, *make_arguments(sizes, dtype), tolerance=tolerance)


@pytest.mark.parametrize("name", quick(["ghost", "groups"], ["groups"]))
def test_a_batch_that_a_constraint_says_to_be_a_multiple(name):
    arguments = make_arguments((8, 1, 1))
    function = NORMS[name].ours
    exported = export_with(function, "m, h, w", arguments, ["mod(m, 4) == 0"])
    assert_close(exported.call(*arguments), NORMS[name].define(*arguments))


def test_the_count_is_no_product_of_integers():
    """JAX has sizes in int32: the product of three would overflow at batches that fit a device."""
    names = ["batch norm", "weights", "a mask of positions"]
    exported = export_with(partial(results_of, names), "b, h, w", make_arguments(SIZES[0]))
    assert not re.findall(r"stablehlo.multiply.*tensor<i32>", exported.mlir_module())


# --- modules ------------------------------------------------------------------------------------


class Net(nn.Module):
    """Norms of Flax, or of ours, one after another."""

    norms: tuple[nn.Module, ...]

    def __call__(self, x, train=True):
        for norm in self.norms:
            has_statistics = hasattr(norm, "use_running_average")
            x = jnp.tanh(norm(x, not train) if has_statistics else norm(x))
        return x


OURS = Net((
    bn.linen.BatchNorm(), bn.linen.BatchRenorm(virtual_batch_size=2), bn.linen.WhiteningNorm(),
    bn.linen.BatchNorm(momentum=None), bn.linen.LayerNorm(), bn.linen.RMSNorm(),
    bn.linen.GroupNorm(2), bn.linen.InstanceNorm(),
))  # fmt: skip
FLAXS = Net((nn.BatchNorm(), nn.LayerNorm(), nn.GroupNorm(2)))
LINEN = {
    "ours": (OURS, OURS.apply),
    "replaced": (FLAXS, bn.linen.replace_norms(FLAXS.apply)),
    "frozen": (OURS, bn.linen.freeze(OURS.apply, train_params=True)),
}


@pytest.mark.parametrize("name", quick(list(LINEN), ["replaced"]))
def test_a_training_step_of_linen_modules(name):
    model, apply = LINEN[name]
    variables = model.init(jax.random.key(0), make_arguments(SIZES[0])[2])

    def step(variables, x):
        # What a product of symbolic sizes may outgrow is compared by the policy.
        @partial(jax.checkpoint, policy=bn.remat_policy("narrow"))
        def loss(params):
            widened = x @ params["kernel"]
            collections = {**variables, "params": params["norms"]}
            y, updates = apply(collections, widened @ params["kernel"].T, mutable=["batch_stats"])
            return jnp.sum(y**2), updates

        params = {"norms": variables["params"], "kernel": jnp.eye(FEATURES, 12)}
        return jax.grad(loss, has_aux=True)(params)

    exported = export_with(step, SYMBOLIC, (variables, make_arguments(SIZES[0])[2]))
    for sizes in SIZES[1:]:
        # Norms in a row multiply the rounding of those before them.
        x = make_arguments(sizes)[2]
        assert_exported(exported, step, variables, x, tolerance=1e-4)


def make_nnx(name):
    norms: Any
    rngs, ours = nnx.Rngs(0), bn.nnx
    if name == "replaced":
        norms = nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm
        return ours.replace_norms(nnx.Sequential(*(norm(FEATURES, rngs=rngs) for norm in norms)))
    norms = (
        ours.BatchNorm, partial(ours.BatchRenorm, virtual_batch_size=2), ours.WhiteningNorm,
        ours.LayerNorm, ours.RMSNorm, partial(ours.GroupNorm, num_groups=2), ours.InstanceNorm,
    )  # fmt: skip
    model = nnx.Sequential(*(norm(FEATURES, rngs=rngs) for norm in norms))
    return ours.freeze(model, train_params=True) if name == "frozen" else model


@pytest.mark.parametrize("name", quick(["ours", "replaced", "frozen"], ["replaced"]))
def test_a_training_step_of_nnx_modules(name):
    definition, state = nnx.split(make_nnx(name))

    def step(state, x):
        model = nnx.merge(definition, state)
        gradients = nnx.grad(lambda model: jnp.sum(model(x) ** 3))(model)
        return jax.tree.leaves((gradients, nnx.state(model, nnx.BatchStat)))

    exported = export_with(step, SYMBOLIC, (state, make_arguments(SIZES[0])[2]))
    for sizes in SIZES[1:]:  # Little but rounding is left of these gradients.
        assert_exported(exported, step, state, make_arguments(sizes)[2], tolerance=1e-2)


def of_layer(layer, gradient, x):
    """Output and update of a layer in training, and a gradient."""
    variables = layer.init(jax.random.key(0), x)

    def call(x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    return (jax.grad(lambda x: jnp.sum(call(x)[0] ** 3)) if gradient else call)(x)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("norm", quick(["BatchNorm", "LayerNorm"], ["BatchNorm"]))
def test_ours_exports_where_flaxs_does(norm, gradient):
    """The case of jax#6973 and jax#24730: the change of one import keeps a program exportable."""
    options = {"use_running_average": False} if norm == "BatchNorm" else {}
    results = []
    for library in nn, bn.linen:
        function = partial(of_layer, getattr(library, norm)(**options), gradient)
        (batch,) = export.symbolic_shape("b")
        exported = export.export(jax.jit(function))(jax.ShapeDtypeStruct((batch, 6), jnp.float32))
        results.append(exported.call(3 + standard_normal(0, (8, 6))))
    assert_close(results[1], results[0], tolerance=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("whole_batch_statistics", [False, True])
def test_an_accumulated_step(whole_batch_statistics):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train, mask=None):
            mask = None if mask is None else mask[:, None]
            return nn.Dense(2)(bn.linen.BatchNorm(not train)(x, mask=mask))

    mesh = bn.training.make_mesh(jax.devices()[:1])
    state = bn.training.create_state(Model(), optax.sgd(0.1), (3,), 0, mesh)
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def step(variables, x, y, mask):
        new, metrics = bn.training.accumulated_train_step(
            state.replace(**variables), bn.training.Batch(x, y, mask), 2,
            whole_batch_statistics=whole_batch_statistics,
        )  # fmt: skip
        return new.params, new.batch_stats, metrics.loss

    (batch,) = export.symbolic_shape("2*b")
    shapes = (
        jax.ShapeDtypeStruct((batch, *rest), dtype)
        for rest, dtype in [((3,), jnp.float32), ((), jnp.int32), ((), jnp.bool_)]
    )
    exported = export.export(jax.jit(step))(jax.tree.map(jax.typeof, variables), *shapes)
    for size in 4, 8:
        arguments = standard_normal(1, (size, 3)), jnp.arange(size) % 2, jnp.arange(size) != 1
        assert_exported(exported, step, variables, *arguments)


# --- what cannot be decided ---------------------------------------------------------------------


# The call, the sizes of x, and what its error says.
REFUSED: dict[str, tuple[Callable[..., Any], str, str]] = {
    "ghost": (
        lambda x: TRAIN({}, bn.init_batch_stats(6), x, virtual_batch_size=4),
        "b, 6",
        r"virtual_batch_size=4 needs a multiple of 4 examples, .* symbolic, b, .* 4\*b examples",
    ),
    "ghost batch renorm": (
        lambda x: RENORM({}, bn.init_batch_stats(6), x, virtual_batch_size=4),
        "6*b + 2, 6",
        r"virtual_batch_size=4 needs .* symbolic, 6\*b \+ 2, .* 24\*b \+ 8 examples",
    ),
    "no batch": (
        lambda x: TRAIN({}, bn.init_batch_stats(6), x, virtual_batch_size=0),
        "b, 6",
        r"virtual_batch_size=0 .* nearest divisors are \[1\]",
    ),
    "groups of devices": (
        lambda x: TRAIN({}, bn.init_batch_stats(6), x, **GROUPS),
        "2*b, 6",
        r"axis_index_groups=\(\(0, 1\), \(2, 3\)\) needs a multiple of 4 .* 8\*b examples",
    ),
    "groups of features": (
        lambda x: bn.group_norm({}, x, num_groups=4),
        "b, c",
        r"num_groups=4 needs a multiple of 4 features, .* symbolic, c, .* 4\*c features",
    ),
    "features in a group": (
        lambda x: bn.group_norm({}, x, num_groups=None, group_size=3),
        "b, c",
        r"group_size=3 needs a multiple of 3 features, .* symbolic, c, .* 3\*c features",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_be_a_multiple_is_an_error_whose_advice_works(name):
    call, sizes, message = REFUSED[name]

    def export_for(sizes):
        shape = jax.ShapeDtypeStruct(export.symbolic_shape(sizes), jnp.float32)
        return export.export(jax.jit(call))(shape)

    with pytest.raises(ValueError, match=message) as error:
        export_for(sizes)
    advice = re.search(r"export with (.*) (examples|features)\.", str(error.value))
    if advice is None:
        assert name == "no batch"
        return
    advised, kind = advice.groups()
    batch, features = sizes.split(", ")
    export_for(f"{advised}, {features}" if kind == "examples" else f"{batch}, {advised}")


def test_a_mapped_axis_of_symbolic_size_has_no_name():
    """JAX itself has no sum over it; what the error advises are the statistics of all batches."""
    batches, size = export.symbolic_shape("n, b")
    shape = jax.ShapeDtypeStruct((batches, size, 6), jnp.float32)
    train = partial(TRAIN, {}, bn.init_batch_stats(6))
    named = jax.vmap(partial(train, axis_name="batches"), axis_name="batches")
    with pytest.raises(
        ValueError, match=r"axis_name='batches' is bound by a vmap .* symbolic size"
    ):
        export.export(jax.jit(named))(shape)
    x = standard_normal(0, (2, 3, 6))
    exported = export.export(jax.jit(train))(shape)
    y, stats = jax.jit(named)(x)
    assert_close(exported.call(x), (y, jax.tree.map(lambda leaf: leaf[0], stats)))


def test_a_size_that_may_be_zero_is_taken_as_the_usual_case():
    """As ``b - 1`` may be: such a batch leaves the running statistics as they were."""
    arguments = make_arguments((1, 2, 1))
    function = NORMS["batch norm"].ours
    exported = export_with(function, "b - 1, h, w", arguments)
    assert_close(exported.call(*arguments), NORMS["batch norm"].define(*arguments))
    params, stats, x, weights = arguments
    y, updated = exported.call(params, stats, x[:0], weights[:0])
    assert y.shape == (0, 2, 1, FEATURES)
    chex.assert_trees_all_equal(updated, stats)


@pytest.mark.exhaustive
def test_symbolic_features():
    """The sizes of features may be symbolic too, where the parameters are made for them."""

    def run(x):
        features = x.shape[-1:]
        params, stats = bn.init_params(features), bn.init_batch_stats(features)
        whitening = bn.init_whitening_stats(features[0] // 2)
        return jax.grad(lambda x: jnp.sum(bn.layer_norm(params, x, reduction_axes=(0, 1)) ** 3))(
            x
        ), (
            TRAIN(params, stats, x, mask=x > -1),
            WHITEN({}, whitening, x[:, ::2]),
            bn.group_norm(params, x, num_groups=2),
        )

    exported = export.export(jax.jit(run))(
        jax.ShapeDtypeStruct(export.symbolic_shape("b, 2*c"), jnp.float32)
    )
    assert_exported(exported, run, standard_normal(3, (9, 4)))
