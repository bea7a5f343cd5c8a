"""One table: every variant of every norm under every transform, against plain autodiff.

The reference is the definition in two passes, differentiated by JAX itself, in double precision.
"""

import functools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from domains import define_domains
from flax import nnx
from support import (
    assert_close,
    define_affine,
    define_batch_norm,
    define_evaluation,
    define_moments,
    define_standardized,
    quick,
    standard_normal,
)

import bn_jax as bn

TOLERANCE = 1e-8

pytestmark = pytest.mark.usefixtures("compile_quickly")


def define(
    params,
    stats,
    x,
    *,
    use_running_average=False,
    update_running_average=None,
    virtual_batch_size=None,
    activation=lambda y: y,
    residual=0.0,
    renorm=None,
    **options,
):
    """Batch norm from its definition, in jax.numpy without any rule of its own.

    `renorm` holds r_max and d_max, where it is batch renorm.
    """
    options = {"axis": -1, "epsilon": 1e-5, "mask": 1.0, **options}
    mask = jnp.broadcast_to(jnp.asarray(options.pop("mask"), jnp.float64), x.shape)
    if use_running_average:
        y = define_evaluation(params, stats, x, options["axis"], options["epsilon"], xp=jnp)
    else:
        groups = len(x) // (virtual_batch_size or len(x))
        normalize = partial(define_renorm, renorm) if renorm else define_training
        parts = zip(jnp.split(x, groups), jnp.split(mask, groups), strict=True)
        y = jnp.concatenate([normalize(params, stats, *part, **options) for part in parts])
    y = activation(y + residual)
    if update_running_average is None:
        update_running_average = not use_running_average
    if update_running_average:
        _, stats = define_batch_norm(params, stats, x, mask=mask, **options, xp=jnp)
    return y, stats


def define_training(params, stats, x, mask, **options):
    return define_batch_norm(params, stats, x, mask=mask, **options, xp=jnp)[0]


def define_renorm(renorm, params, stats, x, mask, *, axis, epsilon, **options):
    """Batch renorm over the last axis: r and d enter as constants."""
    r_max, d_max = renorm
    _, mean, var = define_moments(x, axis, mask, xp=jnp)
    deviation = jnp.sqrt(stats["var"] + epsilon)
    d = (mean - stats["mean"]) / deviation
    d = d * jnp.minimum(1, d_max / jnp.abs(d))
    r = jnp.clip(jnp.sqrt(var + epsilon) / deviation, 1 / r_max, r_max)
    r, d = jax.lax.stop_gradient((r, d))
    y = define_affine(x, mean, var, r, d, axis, epsilon, xp=jnp)
    return define_affine(y, jnp.zeros_like(d), jnp.ones_like(r), params.get("scale"),
                         params.get("bias"), axis, 0, xp=jnp)  # fmt: skip


def define_stateless(
    params,
    stats,
    x,
    *,
    reduction_axes=-1,
    feature_axes=-1,
    num_groups=None,
    epsilon=1e-6,
    mask=1.0,
    about_zero=False,
):
    """A norm without state from its definition; the statistics it is handed come back."""
    weights = jnp.broadcast_to(jnp.asarray(mask, jnp.float64), x.shape)
    axes = tuple(axis % x.ndim for axis in np.atleast_1d(reduction_axes))
    features = [size if axis in np.atleast_1d(feature_axes) % x.ndim else 1
                for axis, size in enumerate(x.shape)]  # fmt: skip
    grouped = x.shape
    if num_groups is not None:
        grouped = (*x.shape[:-1], num_groups, x.shape[-1] // num_groups)
        axes = (*(axis for axis in axes if axis != x.ndim - 1), x.ndim)
    y = define_standardized(
        x.reshape(grouped), axes, weights.reshape(grouped), epsilon, about_zero=about_zero, xp=jnp
    ).reshape(x.shape)
    y = y * params["scale"].reshape(features) if "scale" in params else y
    return y + params["bias"].reshape(features) if "bias" in params else y, stats


def define_whitening(params, stats, x, *, group_size, epsilon=1e-5):
    """Whitening of pairs with the cumulative average: the root of a 2 x 2 matrix is a formula."""
    mean = x.mean(0)
    parts = (x - mean[None]).reshape(len(x), -1, group_size)
    cov = jnp.einsum("ngi,ngj->gij", parts, parts) / len(x)
    matrix = cov + epsilon * jnp.eye(2)[None]
    trace = (matrix[:, 0, 0] + matrix[:, 1, 1])[:, None, None]
    volume = jnp.sqrt(matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] ** 2)[:, None, None]
    root = ((trace + volume) * jnp.eye(2)[None] - matrix) / (volume * jnp.sqrt(trace + 2 * volume))
    y = jnp.einsum("ngi,gij->ngj", parts, root).reshape(x.shape)
    y = y * params["scale"][None] + params["bias"][None]
    share = 1 / (stats["count"] + 1)
    of_mean, of_cov = jnp.repeat(share, group_size), share[:, None, None]
    return y, {
        "count": stats["count"] + 1,
        "mean": (1 - of_mean) * stats["mean"] + of_mean * mean,
        "cov": (1 - of_cov) * stats["cov"] + of_cov * cov,
    }


def from_pairs(function):
    """A function of complex x as one of its real and imaginary part, and so for its results."""

    def real(params, stats, x, **options):
        stats = {**stats, "mean": jax.lax.complex(*jnp.moveaxis(stats["mean"], -1, 0))}
        y, updated = function(params, stats, jax.lax.complex(x[..., 0], x[..., 1]), **options)

        def split(values):
            return jnp.stack([values.real, values.imag], -1)

        return split(y), {**updated, "mean": split(updated["mean"])}

    return real


def by_linen(params, stats, x, axis_name=None, **options):
    layer = bn.linen.BatchNorm(use_running_average=False, axis_name=axis_name)
    y, updates = layer.apply({"params": params, "batch_stats": stats}, x, mutable="batch_stats")
    return y, updates["batch_stats"]


def by_nnx(params, stats, x, axis_name=None):
    layer = bn.nnx.BatchNorm(3, axis_name=axis_name, rngs=nnx.Rngs(0))
    nnx.update(layer, {**params, **stats})
    y = layer(x)
    return y, {"mean": layer.mean[...], "var": layer.var[...]}


def without_gradient_of_updates(function):
    def stopped(*state):
        y, updated = function(*state)
        return y, jax.lax.stop_gradient(updated)

    return stopped


def renorm(params, stats, x, *, renorm, **options):
    r_max, d_max = renorm
    return bn.batch_renorm(
        params, stats, x, use_running_average=False, r_max=r_max, d_max=d_max, **options
    )


def by_domain(params, stats, x, *, domain, **options):
    return bn.domain_batch_norm(params, stats, x, domain, use_running_average=False, **options)


TRAIN = partial(bn.batch_norm, use_running_average=False)
EVALUATE = partial(bn.batch_norm, use_running_average=True)


def strictly(function):
    """The function without any implicit promotion of dtypes in it."""

    def strict(*arguments, **options):
        with jax.numpy_dtype_promotion("strict"):
            return function(*arguments, **options)

    return strict


class Variant:
    """One way of calling a norm: ours, the reference, and arguments that fit both."""

    updates = True

    def __init__(
        self, ours=TRAIN, reference=define, *, shape=(6, 3), features=(3,), pair=False,
        present=("scale", "bias"), offset=0.0, mapped=True, **options,
    ):  # fmt: skip
        self.ours = strictly(partial(ours, **options))
        self.reference = partial(reference, **options)
        self.mapped = mapped
        self.shape = (*shape, 2) if pair else shape
        self.features, self.pair, self.present = features, pair, present
        self.offset, self.counts = offset, "momentum" in options

    def arguments(self, seed, lead=()):
        """Parameters, statistics and input, stacked along the axes `lead`."""
        mean = (*self.features, 2) if self.pair else self.features
        shapes = {"scale": self.features, "bias": self.features, "mean": mean}
        arrays = {
            name: standard_normal(seed + number, (*lead, *shape), np.float64)
            for number, (name, shape) in enumerate(shapes.items())
        }
        params = {name: arrays[name] for name in self.present}
        var = jnp.abs(standard_normal(seed + 3, (*lead, *self.features), np.float64)) + 0.1
        stats = {"mean": arrays["mean"], "var": var}
        if self.counts:
            stats["count"] = jnp.full((*lead, *self.features), 2, jnp.float64)
        x = standard_normal(seed + 4, (*lead, *self.shape), np.float64) + self.offset
        return params, stats, x


class Stateless(Variant):
    """A norm without state: it hands back the statistics that it is handed."""

    updates = False

    def __init__(
        self, norm, *, mapped=False, defined=(), wrapped=lambda function: function, **rest
    ):
        def ours(params, stats, x, **options):
            return norm(params, x, **options), stats

        reference = partial(define_stateless, **dict(defined))
        super().__init__(wrapped(ours), wrapped(reference), mapped=mapped, **rest)


class Whitening(Variant):
    """Whitening in two groups of two features, whose inverse roots have converged."""

    def __init__(self, **options):
        ours = partial(bn.whitening_norm, use_running_average=False, iterations=30, momentum=None)
        super().__init__(
            ours, define_whitening, shape=(6, 4), features=(4,), group_size=2, **options
        )

    def arguments(self, seed, lead=()):
        params, stats, x = super().arguments(seed, lead)
        root = standard_normal(seed + 5, (*lead, 2, 2, 2), np.float64)
        cov = root @ jnp.swapaxes(root, -1, -2)
        return (
            params,
            {"mean": stats["mean"], "cov": cov, "count": jnp.full((*lead, 2), 2, jnp.float64)},
            x,
        )


RNG = np.random.default_rng(0)
WEIGHTS = RNG.uniform(0.1, 2, (6, 1)) * np.array([1, 1, 0, 1, 1, 1])[:, None]
RESIDUAL = RNG.standard_normal((6, 3))

# fmt: off
VARIANTS = {
    "plain": Variant(),
    "no parameters": Variant(present=()),
    "evaluation": Variant(EVALUATE, partial(define, use_running_average=True)),
    "evaluation that updates": Variant(
        EVALUATE,
        partial(define, use_running_average=True),
        update_running_average=True,
        momentum=None,
    ),
    "several feature axes": Variant(shape=(4, 3, 2), features=(3, 2), axis=(1, 2)),
    "first axis": Variant(shape=(3, 6), axis=0, mapped=False),
    "boolean mask": Variant(mask=WEIGHTS > 0, mapped=False),
    "weights": Variant(mask=WEIGHTS, mapped=False),
    "ghost": Variant(virtual_batch_size=3, mapped=False),
    "cumulative unbiased": Variant(momentum=None, running_var_ddof=1),
    "guard triggers": Variant(offset=1e3),
    "activation": Variant(activation=jax.nn.silu),
    "activation and residual": Variant(
        activation=jax.nn.relu, residual=RESIDUAL, mask=WEIGHTS > 0, mapped=False
    ),
    "complex": Variant(
        from_pairs(partial(TRAIN, dtype=jnp.complex128)), from_pairs(define), pair=True
    ),
    "batch renorm": Variant(
        renorm, renorm=(1.2, 0.5), mask=WEIGHTS, virtual_batch_size=3, activation=jax.nn.silu,
        mapped=False,
    ),
    "batch renorm unbounded": Variant(renorm, renorm=(1e3, 1e3), present=(), offset=1e3),
    "complex batch renorm": Variant(
        from_pairs(partial(renorm, dtype=jnp.complex128)), from_pairs(define), pair=True,
        renorm=(1.2, 0.5),
    ),
    "layer norm": Stateless(
        bn.layer_norm, shape=(6, 4), features=(4,),
        mask=RNG.uniform(0, 2, (6, 4)) * (np.arange(4) != 2),
    ),
    "layer norm over examples": Stateless(
        bn.layer_norm, reduction_axes=(0, 1), offset=1e3, mapped=True
    ),
    "layer norm of several feature axes": Stateless(
        bn.layer_norm, shape=(3, 2, 4), features=(2, 4), reduction_axes=(-1, 1),
        feature_axes=(1, 2), offset=1e3,
    ),
    "complex layer norm": Stateless(
        partial(bn.layer_norm, dtype=jnp.complex128), wrapped=from_pairs, pair=True
    ),
    "rms norm": Stateless(bn.rms_norm, defined={"about_zero": True}, mask=WEIGHTS + 0.1),
    "rms norm over examples": Stateless(
        bn.rms_norm, defined={"about_zero": True}, reduction_axes=(0, 1), present=("scale",),
        mapped=True,
    ),
    "group norm": Stateless(
        bn.group_norm, defined={"reduction_axes": (1, 2)}, shape=(3, 5, 4), features=(4,),
        num_groups=2, mask=RNG.uniform(0, 2, (1, 5, 4)) * (np.arange(5) > 1)[:, None],
    ),
    "instance norm": Stateless(
        bn.instance_norm, defined={"reduction_axes": 1}, shape=(3, 5, 2), features=(2,),
        epsilon=1e-3, present=("bias",),
    ),
    "domains": Variant(
        by_domain, define_domains, features=(2, 3), domain=np.array([0, 1, 0, 1, 1, 0]),
        mapped=False,
    ),
    "domains of images": Variant(
        by_domain, define_domains, shape=(4, 8, 4, 2), features=(2, 2), mapped=False,
        domain=np.array([0, 1, 1, 0]), offset=1e3, activation=jax.nn.silu, momentum=None,
    ),
    "whitening": Whitening(offset=1e3),
    "linen": Variant(by_linen),
    "nnx": Variant(by_nnx, without_gradient_of_updates(define)),
}
# fmt: on


def loss_of(function):
    """A scalar that depends on every entry of the results, and on each differently."""

    def loss(*arguments):
        leaves = jax.tree.leaves(function(*arguments))
        return sum(
            jnp.vdot(jnp.sin(leaf), jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape))
            for leaf in leaves
        )

    return loss


def output_of(function):
    return lambda *arguments: function(*arguments)[0]


def directions(arguments):
    return jax.tree.map(
        lambda leaf: jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype),
        arguments,
    )


def by_vjp(function, *arguments):
    result, pull = jax.vjp(function, *arguments)
    return result, pull(directions(result))


def by_linearize(function, *arguments):
    result, push = jax.linearize(function, *arguments)
    return result, push(*directions(arguments))


def by_forward_over_reverse(function, *arguments):
    gradient = jax.grad(loss_of(function), argnums=(0, 1, 2))
    return jax.jvp(gradient, arguments, directions(arguments))


def by_reverse_over_reverse(function, *arguments):
    gradient = jax.grad(loss_of(function), argnums=(0, 1, 2))
    return by_vjp(gradient, *arguments)


def by_reverse_over_forward(function, *arguments):
    def forward(*arguments):
        return jax.jvp(function, arguments, directions(arguments))

    return by_vjp(forward, *arguments)


DERIVATIVES = {
    "value": lambda f, *a: f(*a),
    "grad": lambda f, *a: jax.grad(loss_of(f), argnums=(0, 1, 2))(*a),
    "grad of jit": lambda f, *a: jax.grad(jax.jit(loss_of(f)), argnums=(0, 1, 2))(*a),
    "vjp": by_vjp,
    "jvp": lambda f, *a: jax.jvp(f, a, directions(a)),
    "linearize": by_linearize,
    "jacfwd": lambda f, *a: jax.jacfwd(f, argnums=(0, 1, 2))(*a),
    "jacrev": lambda f, *a: jax.jacrev(f, argnums=(0, 1, 2))(*a),
    "hessian": lambda f, *a: jax.hessian(loss_of(f), argnums=(0, 2))(*a),
    "forward over reverse": by_forward_over_reverse,
    "reverse over reverse": by_reverse_over_reverse,
    "reverse over forward": by_reverse_over_forward,
    "checkpoint": lambda f, *a: jax.grad(jax.checkpoint(loss_of(f)), argnums=(0, 1, 2))(*a),
    "jvp of jit of checkpoint": lambda f, *a: jax.jvp(jax.jit(jax.checkpoint(f)), a, directions(a)),
}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@functools.cache
def derivatives(name, of_ours):
    """What every transform gives, by one program."""
    function = VARIANTS[name].ours if of_ours else VARIANTS[name].reference

    def derive(*arguments):
        return {key: transform(function, *arguments) for key, transform in DERIVATIVES.items()}

    return jax.jit(derive)(*VARIANTS[name].arguments(0))


# Every variant is differentiated below; these by every transform in the quick tier as well.
DIFFERENTIATED = ("guard triggers", "batch renorm")


@pytest.mark.parametrize("transform", DERIVATIVES)
@pytest.mark.parametrize("name", quick(VARIANTS, DIFFERENTIATED))
def test_derivatives_agree(name, transform):
    found, expected = (derivatives(name, of_ours)[transform] for of_ours in (True, False))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    assert_close(found, expected, tolerance=TOLERANCE)


def derive(names, function, *arguments):
    """What several transforms give, for one program of them."""
    return {name: DERIVATIVES[name](function, *arguments) for name in names}


@functools.cache
def reference_of(name, *transforms):
    return jax.jit(partial(derive, transforms, VARIANTS[name].reference))


ONCE = ("value", "grad", "jvp")


@pytest.mark.parametrize("lead", [pytest.param((3,), marks=pytest.mark.exhaustive), (2, 3)])
@pytest.mark.parametrize("name", VARIANTS)
def test_vmap_is_a_loop(name, lead):
    """Nested as well: google/flax#4760 and #3319 fail there."""
    variant = VARIANTS[name]
    arguments = variant.arguments(10, lead)
    mapped = partial(derive, ONCE, variant.ours)
    for _ in lead:
        mapped = jax.vmap(mapped)
    found = jax.tree.map(np.asarray, jax.jit(mapped)(*arguments))
    arguments = jax.tree.map(np.asarray, arguments)
    for index in np.ndindex(lead):
        own, picked = (
            jax.tree.map(lambda leaf, index=index: leaf[index], tree) for tree in (arguments, found)
        )
        assert_close(picked, reference_of(name, *ONCE)(*own), tolerance=TOLERANCE)


MAPPED = [name for name, variant in VARIANTS.items() if variant.mapped]


@pytest.mark.parametrize(
    "name",
    quick(
        MAPPED,
        [
            "guard triggers",
            "batch renorm unbounded",
            "layer norm over examples",
            "whitening",
            "nnx",
        ],
    ),
)
def test_vmap_with_an_axis_name_is_the_whole_batch(name):
    variant = VARIANTS[name]
    params, stats, x = variant.arguments(20)
    parts = x.reshape(2, -1, *x.shape[1:])

    def ours(params, stats, x):
        y, updated = jax.vmap(
            partial(variant.ours, axis_name="data"), (None, None, 0), (0, None), axis_name="data"
        )(params, stats, x.reshape(parts.shape))
        return y.reshape(x.shape), updated

    # What is around a `vmap` first: JAX remembers a derivative from a call that is not.
    transforms = ("checkpoint", "grad of jit", "jvp of jit of checkpoint", "grad", "jvp", "hessian")
    jax.clear_caches()
    found = jax.jit(partial(derive, transforms, ours))(params, stats, x)
    expected = reference_of(name, *transforms)(params, stats, x)
    assert_close(found, expected, tolerance=TOLERANCE)


UPDATING = [name for name, variant in VARIANTS.items() if variant.updates]


@pytest.mark.parametrize(
    "name",
    quick(UPDATING, ["cumulative unbiased", "batch renorm", "whitening", "linen", "nnx"]),
)
def test_scan_is_a_loop(name):
    variant = VARIANTS[name]
    params, stats, _ = variant.arguments(30)
    xs = variant.arguments(40, (3,))[2]

    def by_scan(function, params, stats, xs):
        def step(stats, x):
            y, stats = function(params, stats, x)
            return stats, y

        last, ys = jax.lax.scan(step, stats, xs)
        return ys, last

    def by_loop(function, params, stats, xs):
        ys = []
        for x in xs:
            y, stats = function(params, stats, x)
            ys.append(y)
        return jnp.stack(ys), stats

    found, expected = (
        jax.jit(partial(derive, ONCE, function))(params, stats, xs)
        for function in (partial(by_scan, variant.ours), partial(by_loop, variant.reference))
    )
    assert_close(found, expected, tolerance=TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_are_known_and_the_second_step_compiles_nothing_and_reuses_the_state(name):
    variant = VARIANTS[name]
    params, stats, x = variant.arguments(60)
    known = jax.eval_shape(variant.ours, *jax.eval_shape(lambda: (params, stats, x)))
    chex.assert_trees_all_equal_shapes_and_dtypes(known[1], stats)
    define = reference_of(name, *ONCE)
    _, expected_stats = define(params, stats, x)["value"]
    expected = define(params, expected_stats, x)["value"]
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(lambda *state: variant.ours(*state), n=1)
    step = jax.jit(counted, donate_argnums=1)
    stats = jax.tree.map(jnp.copy, stats)
    y, updated = step(params, stats, x)
    chex.assert_trees_all_equal_shapes_and_dtypes((y, updated), known)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stats))
    assert_close(step(params, updated, x), expected, tolerance=TOLERANCE)
