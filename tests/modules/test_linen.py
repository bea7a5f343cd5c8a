import functools
import re
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    assert_close,
    define_affine,
    define_batch_norm,
    define_moments,
    define_steps,
    differentiate,
    far_from_initial,
    standard_normal,
)

import bn_jax as bn
from bn_jax._core.running import start_measuring

OURS, FLAX = bn.linen.BatchNorm, nn.BatchNorm


def make_loss(layer, mask=None):
    def loss(variables, x, use_running_average):
        y, updates = layer.apply(
            variables, x, use_running_average, mask=mask, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, updates["batch_stats"])

    return jax.jit(
        jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnames="use_running_average"
    )


DOUBLES = [
    (x_dtype, dtype, param_dtype)
    for x_dtype in (jnp.float32, jnp.float64, jnp.complex64, jnp.complex128)
    for dtype in (None, jnp.float32, jnp.float64, jnp.complex64)
    for param_dtype in (jnp.float32, jnp.float64, jnp.complex64)
    if (x_dtype, dtype, param_dtype) != (jnp.float32, None, jnp.float32)
]


def is_complex(*dtypes):
    return any(dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes)


@pytest.mark.parametrize(
    "x_dtype,dtype,param_dtype",
    [
        pytest.param(
            x_dtype,
            dtype,
            param_dtype,
            marks=() if dtype is None or param_dtype == jnp.float32 else pytest.mark.exhaustive,
        )
        for x_dtype, dtype, param_dtype in DOUBLES
    ],
)
def test_double_precision_and_complex_dtypes_agree_with_flax(x_dtype, dtype, param_dtype):
    with jax.enable_x64(True):
        x = standard_normal(10, (16, 3), x_dtype)
        options = dict(dtype=dtype, param_dtype=param_dtype, momentum=0.9)
        ours, flax = OURS(**options), FLAX(**options)
        if dtype is not None and not is_complex(dtype) and is_complex(x_dtype, param_dtype):
            # Flax drops the imaginary part, with a warning.
            with pytest.raises(TypeError, match="would discard the imaginary part"):
                ours.init(jax.random.key(0), x, use_running_average=False)
            return
        initial = ours.init(jax.random.key(0), x, use_running_average=False)
        theirs = flax.init(jax.random.key(0), x, use_running_average=False)
        assert_close(initial, theirs)
        chex.assert_trees_all_equal_dtypes(initial["params"], theirs["params"])
        # Flax's statistics have this type too, from the first update on.
        real = jnp.finfo(x_dtype).dtype
        types = {name: leaf.dtype for name, leaf in initial["batch_stats"].items()}
        assert types == {"mean": jnp.dtype(x_dtype), "var": jnp.dtype(real)}
        y, updates = ours.apply(initial, x, False, mutable=["batch_stats"])
        expected, expected_updates = flax.apply(theirs, x, False, mutable=["batch_stats"])
        chex.assert_trees_all_equal_dtypes(updates["batch_stats"], initial["batch_stats"])
        assert_close(updates, expected_updates, tolerance=2e-6)
        assert_close(y, expected, dtype=expected.dtype, tolerance=2e-6)
        trained = {**initial, **updates}
        assert_close(
            ours.apply(trained, x, True),
            flax.apply({**theirs, **expected_updates}, x, True),
            dtype=expected.dtype,
            tolerance=2e-6,
        )
        expected, expected_stats = define_batch_norm(
            initial["params"], initial["batch_stats"], x, momentum=0.9
        )
        precision = 1e-12 if real == jnp.float64 else None
        assert_close(updates["batch_stats"], expected_stats, tolerance=precision)
        if y.dtype in (jnp.float64, jnp.complex128):
            assert_close(y, expected, tolerance=precision)


def test_a_complex_derivative_is_that_of_flax():
    x = standard_normal(11, (16, 3), jnp.complex64) + (2 - 3j)

    def loss(x, layer):
        variables = layer.init(jax.random.key(0), x)
        y, _ = layer.apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(jnp.abs(y)) + y.real)

    found, expected = (jax.grad(loss)(x, kind(use_running_average=False)) for kind in (OURS, FLAX))
    assert_close(found, expected, dtype=jnp.complex64)


def test_the_cumulative_average_keeps_a_count():
    layer = OURS(momentum=None)
    xs = standard_normal(12, (4, 8, 3)) + 5
    variables = layer.init(jax.random.key(0), xs[0], use_running_average=False)
    assert_close(variables["batch_stats"], bn.init_batch_stats(3, use_count=True))
    expected = variables["batch_stats"]
    for x in xs:
        _, updates = layer.apply(variables, x, False, mutable=["batch_stats"])
        variables = {**variables, **updates}
        _, expected = define_batch_norm({}, expected, x, momentum=None)
    assert_close(variables["batch_stats"], expected)
    y = layer.apply(variables, xs[0], True)
    assert_close(
        y, define_affine(xs[0], expected["mean"], expected["var"], np.ones(3), np.zeros(3))
    )
    without_count = FLAX().init(jax.random.key(0), xs[0], use_running_average=False)
    assert_close(layer.apply(without_count, xs[0], True), FLAX().apply(without_count, xs[0], True))
    with pytest.raises(ValueError, match="momentum=None averages over all batches"):
        layer.apply(without_count, xs[0], False, mutable=["batch_stats"])


def test_a_momentum_goes_on_counting():
    x = standard_normal(13, (8, 3))
    variables = OURS(momentum=None).init(jax.random.key(0), x, use_running_average=False)
    _, updates = OURS(momentum=0.9).apply(variables, x, False, mutable=["batch_stats"])
    assert updates["batch_stats"]["count"].tolist() == [1, 1, 1]


def test_initializing_needs_no_axis_and_no_second_example():
    layer = OURS(use_running_average=False, axis_name="nowhere", virtual_batch_size=None)
    x = standard_normal(5, (1, 3))
    y, variables = layer.init_with_output(jax.random.key(0), x)
    chex.assert_trees_all_equal(variables["batch_stats"], bn.init_batch_stats(3))
    assert_close(y, np.zeros((1, 3)))


def test_synchronized_is_flattened():
    x = standard_normal(6, (4, 5, 3))
    layer = OURS(use_running_average=False, axis_name="data")
    variables = layer.init(jax.random.key(0), x[0])
    train = partial(layer.apply, mutable=["batch_stats"])
    y, updates = jax.pmap(train, axis_name="data", in_axes=(None, 0))(variables, x)
    expected = define_batch_norm(variables["params"], variables["batch_stats"], x.reshape(20, 3))
    first = jax.tree.map(lambda leaf: leaf[0], updates["batch_stats"])
    assert_close((y.reshape(20, 3), first), expected)


def test_new_attributes_reach_the_core():
    x = standard_normal(7, (8, 3))
    options = dict(virtual_batch_size=4, running_var_ddof=1, activation=jax.nn.silu)
    layer = OURS(use_running_average=False, **options)
    variables = layer.init(jax.random.key(0), x)
    y, updates = layer.apply(variables, x, residual=x, mutable=["batch_stats"])
    expected, stats = bn.batch_norm(
        variables["params"], variables["batch_stats"], x,
        use_running_average=False, residual=x, **options,
    )  # fmt: skip
    chex.assert_trees_all_equal((y, updates["batch_stats"]), (expected, stats))


@pytest.mark.parametrize("nested", [False, True])
def test_missing_or_immutable_batch_stats(nested):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, use_running_average):
            return OURS(use_running_average, name="first_norm")(x)

    model = Model() if nested else OURS()
    where = "BatchNorm 'first_norm'" if nested else "the top-level BatchNorm"
    x = standard_normal(8, (6, 3))
    variables = model.init(jax.random.key(0), x, use_running_average=True)
    with pytest.raises(ValueError, match=f"batch_stats has nothing for {where}.*model.apply"):
        model.apply({"params": variables["params"]}, x, use_running_average=True)
    message = f"batch_stats is immutable, but {where} .*mutable=.*pass update_running_average=False"
    with pytest.raises(ValueError, match=message):
        model.apply(variables, x, use_running_average=False)
    model.apply(variables, x, use_running_average=True)


@pytest.mark.parametrize("nested", [False, True])
def test_the_mode_must_be_given_once(nested):
    class Model(nn.Module):
        norm: nn.Module

        @nn.compact
        def __call__(self, x, **modes):
            return self.norm.copy(name="first_norm")(x, **modes)

    def call(modes=None, **attributes):
        norm = OURS(**attributes)
        return (Model(norm) if nested else norm).init(jax.random.key(0), x, **modes or {})

    where = "BatchNorm 'first_norm'" if nested else "the top-level BatchNorm"
    x = standard_normal(9, (6, 3))
    fixes = (
        r"BatchNorm\(use_running_average=not train\)\(x\)",
        r"BatchNorm\(\)\(x, use_running_average=not train\)",
        r"model.apply\(variables, x, train=True",
    )
    for fix in fixes:
        with pytest.raises(ValueError, match=f"is None in attribute and call of {where}. .*{fix}"):
            call()
    for name in ("use_running_average", "update_running_average"):
        given = {"use_running_average": False} | {name: True}
        with pytest.raises(ValueError, match=f"{name}=True .* in the call of {where}: give it"):
            call({name: True}, **given)


def trained(layer, variables, x, **options):
    y, updates = layer.apply(variables, x, mutable=["batch_stats"], **options)
    return y, updates["batch_stats"]


def initialized(layer, x):
    variables = far_from_initial(layer.init(jax.random.key(0), x))
    return variables, variables["params"], variables["batch_stats"]


def shared_vmap(layer, variables, x):
    def mapped(function, name):
        return jax.vmap(function, in_axes=(None, 0), out_axes=(0, None), axis_name=name)

    return mapped(mapped(partial(trained, layer), "inner"), "outer")(variables, x)


def shared_lifted_vmap(layer, variables, x):
    shared = dict(variable_axes={"params": None, "batch_stats": None}, split_rngs={"params": False})
    inner = nn.vmap(OURS, axis_name="inner", **shared)
    outer = nn.vmap(inner, axis_name="outer", **shared)
    return trained(outer(layer.use_running_average, axis_name=layer.axis_name), variables, x)


@pytest.mark.parametrize(
    "mapped",
    [
        pytest.param(shared_lifted_vmap, id="google/flax#3319"),
        pytest.param(shared_vmap, id="dm-haiku#786 #788 #790 equinox#707"),
    ],
)
def test_vmap_inside_vmap_over_named_axes_is_one_batch(mapped):
    x = standard_normal(20, (4, 5, 3))
    layer = OURS(use_running_average=False, axis_name=("outer", "inner"))
    variables, params, stats = initialized(layer, x[0, 0])
    y, updated = jax.jit(partial(mapped, layer))(variables, x)
    expected = define_batch_norm(params, stats, x.reshape(20, 3))
    assert_close((y.reshape(20, 3), updated), expected)
    # Statistics that are shared over an axis that is not named have no single new value.
    with pytest.raises(ValueError, match="out_axes is None"):
        mapped(layer.clone(axis_name="inner"), variables, x)


@pytest.mark.parametrize("lifted", [False, True])
def test_vmap_inside_vmap_over_variables_is_an_ensemble(lifted):
    """dm-haiku#786, google/flax#3319."""
    x = standard_normal(21, (2, 3, 6, 4))
    layer = OURS(use_running_average=False)
    of_their_own = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
    ensemble = nn.vmap(nn.vmap(OURS, **of_their_own), **of_their_own)(use_running_average=False)
    variables = jax.tree.map(
        lambda leaf: leaf + standard_normal(22, leaf.shape) ** 2,
        ensemble.init(jax.random.key(0), x),
    )
    apply = partial(trained, ensemble) if lifted else jax.vmap(jax.vmap(partial(trained, layer)))
    y, updated = jax.jit(apply)(variables, x)
    for member in np.ndindex(2, 3):
        own, of_member = (
            jax.tree.map(lambda leaf, member=member: leaf[member], tree)
            for tree in (variables, updated)
        )
        expected = define_batch_norm(own["params"], own["batch_stats"], x[member])
        assert_close((y[member], of_member), expected)


def test_groups_of_a_vmapped_axis():
    x = standard_normal(23, (4, 5, 3))
    ours, flax = (
        kind(use_running_average=False, axis_name="data", axis_index_groups=[[0, 2], [1, 3]])
        for kind in (OURS, FLAX)
    )
    variables, params, stats = initialized(ours, x[0])
    y, updated = jax.jit(jax.vmap(partial(trained, ours, variables), axis_name="data"))(x)
    for group in (np.array([0, 2]), np.array([1, 3])):
        expected, expected_stats = define_batch_norm(params, stats, x[group].reshape(10, 3))
        assert_close(y[group].reshape(10, 3), expected)
        for index in group:
            own = jax.tree.map(lambda leaf, index=index: leaf[index], updated)
            assert_close(own, expected_stats)
    with pytest.raises(NotImplementedError, match="axis_index_groups"):
        jax.vmap(partial(trained, flax, variables), axis_name="data")(x)


def lifted_scan(**how):
    def body(layer, carry, x):
        return carry, layer(x)

    return lambda layer, x: nn.scan(body, split_rngs={"params": False}, **how)(layer, None, x)[1]


# `nn.scan` can create no carried variable and return no immutable one, whatever the module. What
# it can create is a broadcast variable that does not depend on the data: our statistics are one
# while initializing.
CARRIED = lifted_scan(variable_broadcast="params", variable_carry="batch_stats")
BROADCAST = lifted_scan(variable_broadcast=["params", "batch_stats"])


def test_lifted_scan_carries_the_statistics():
    """google/flax#2052."""
    x = standard_normal(24, (5, 6, 3))
    layer = OURS(use_running_average=False, momentum=0.5)
    key = jax.random.key(0)
    created = nn.init(BROADCAST, layer)(key, x)
    chex.assert_trees_all_equal(created, layer.init(key, x[0]))
    variables = far_from_initial(created)
    y, updates = jax.jit(nn.apply(CARRIED, layer, mutable=["batch_stats"]))(variables, x)
    expected = define_steps(variables["params"], variables["batch_stats"], x, momentum=0.5)
    assert_close((y, updates["batch_stats"]), expected)
    with pytest.raises(TypeError, match="pytree structure"):
        nn.init(CARRIED, layer)(key, x)


def test_lifted_scan_in_evaluation():
    """google/flax#3602."""
    x = standard_normal(25, (5, 6, 3))
    layer = OURS(use_running_average=True)
    variables, params, stats = initialized(layer, x[0])
    y = nn.apply(BROADCAST, layer)(variables, x)
    assert_close(y, define_affine(x, *stats.values(), params["scale"], params["bias"]))
    carried = nn.apply(CARRIED, layer, mutable=["batch_stats"])(variables, x)
    chex.assert_trees_all_equal(carried, (y, {"batch_stats": stats}))
    with pytest.raises(TypeError, match="pytree structure"):
        nn.apply(CARRIED, layer)(variables, x)


def test_scan_inside_vmap_inside_grad():
    """equinox#237."""
    x = standard_normal(26, (4, 3, 2))
    layer = OURS(use_running_average=False, momentum=0.5, axis_name="data")
    _, params, stats = initialized(layer, x[0, 0])

    def loss(x):
        def step(batch_stats, x):
            y, batch_stats = trained(layer, {"params": params, "batch_stats": batch_stats}, x)
            return batch_stats, y

        scanned = jax.vmap(partial(jax.lax.scan, step, stats), axis_name="data", out_axes=(None, 1))
        batch_stats, y = scanned(x)
        return jnp.sum(jnp.sin(y)), batch_stats

    def defined_loss(x):
        return np.sum(np.sin(define_steps(params, stats, np.swapaxes(x, 0, 1))[0]))

    gradient, updated = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert_close(gradient, differentiate(defined_loss, x))
    assert_close(updated, define_steps(params, stats, jnp.swapaxes(x, 0, 1), momentum=0.5)[1])


class Deep(nn.Module):
    """A scan over four layers, each with variables of its own."""

    rematerialized: bool

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return jnp.sin(layer(x)), None

        if self.rematerialized:
            body = nn.remat(body, prevent_cse=False)
        lifted = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
        return nn.scan(body, length=4, **lifted)(OURS(use_running_average=False), x, None)[0]


def test_scan_over_layers_with_rematerialization_updates_once():
    """pytorch#96136."""
    x = standard_normal(27, (6, 3))
    models = [Deep(rematerialized) for rematerialized in (False, True)]
    variables = jax.tree.map(
        lambda leaf: leaf + standard_normal(28, leaf.shape) ** 2,
        models[0].init(jax.random.key(0), x),
    )

    def loss(model, variables):
        y, updates = model.apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(y**2), (y, updates["batch_stats"]["BatchNorm_0"])

    plain, rematerialized = (
        jax.jit(jax.grad(partial(loss, model), has_aux=True))(variables) for model in models
    )
    assert_close(rematerialized, plain)
    y, (_, (found, updated)) = x, plain
    for number in range(4):
        params, stats = (
            jax.tree.map(lambda leaf, number=number: leaf[number], collection["BatchNorm_0"])
            for collection in (variables["params"], variables["batch_stats"])
        )
        y, expected = define_batch_norm(params, stats, y)
        y = np.sin(y)
        assert_close(jax.tree.map(lambda leaf, number=number: leaf[number], updated), expected)
    assert_close(found, y)


@pytest.mark.parametrize(
    "transform",
    [
        nn.remat,
        nn.jit,
        lambda layer: nn.jit(nn.remat(layer)),
        partial(nn.remat, policy=jax.checkpoint_policies.everything_saveable),
    ],
    ids=["remat pytorch#96136", "jit", "jit remat", "remat saving everything"],
)
def test_lifted_transforms_update_once(transform):
    x = standard_normal(29, (5, 6, 3))
    layer = transform(OURS)(use_running_average=False, axis_name="data")
    variables, params, stats = initialized(layer, x[0])

    def loss(variables):
        apply = jax.vmap(partial(trained, layer, variables), axis_name="data", out_axes=(0, None))
        y, updated = apply(x)
        return jnp.sum(jnp.sin(y)), updated

    def defined_loss(scale):
        changed = {**params, "scale": scale}
        return np.sum(np.sin(define_batch_norm(changed, stats, x.reshape(30, 3))[0]))

    gradient, updated = jax.jit(jax.grad(loss, has_aux=True))(variables)
    assert_close(updated, define_batch_norm(params, stats, x.reshape(30, 3))[1])
    assert_close(gradient["params"]["scale"], differentiate(defined_loss, params["scale"]))


@pytest.mark.parametrize("taken", [False, True])
def test_a_branch_updates_only_if_taken(taken):
    x = standard_normal(30, (6, 3))
    layer = OURS(use_running_average=False)
    variables, params, stats = initialized(layer, x)

    def branch(layer, taken, x):
        return nn.cond(taken, lambda layer, x: layer(x), lambda layer, x: x, layer, x)

    found = nn.apply(branch, layer, mutable=["batch_stats"])(variables, taken, x)
    y, updated = define_batch_norm(params, stats, x) if taken else (x, stats)
    assert_close(found, (y, {"batch_stats": updated}))


def test_a_reused_layer_with_a_named_axis():
    """google/flax#1250, #2606."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, use_running_average=False):
            norm = OURS(use_running_average, axis_name="data", momentum=0.5, name="norm")
            return norm(norm(x))

    x = standard_normal(31, (6, 3))
    model = Twice()
    variables = far_from_initial(model.init(jax.random.key(0), x[0]))
    y, updated = jax.jit(jax.vmap(partial(trained, model, variables), axis_name="data"))(x)
    params, stats = (variables[name]["norm"] for name in ("params", "batch_stats"))
    expected, once = define_batch_norm(params, stats, x, momentum=0.5)
    expected, twice = define_batch_norm(params, once, expected, momentum=0.5)
    assert_close((y, jax.tree.map(lambda leaf: leaf[0], updated["norm"])), (expected, twice))
    model.apply(variables, x, use_running_average=True)
    whole, by_jit = trained(model, variables, x.reshape(-1, 3))
    assert_close((whole.reshape(x.shape), by_jit["norm"]), (expected, twice))


@pytest.mark.parametrize("create", ["eval_shape", "lazy_init"])
def test_abstract_initialization(create):
    layer = OURS(use_running_average=False, axis_name="nowhere", axis=(1, -1))
    x, key = jax.ShapeDtypeStruct((1, 4, 3), jnp.bfloat16), jax.random.key(0)
    init = layer.lazy_init if create == "lazy_init" else partial(jax.eval_shape, layer.init)
    expected = layer.init(key, jnp.ones(x.shape, x.dtype))
    chex.assert_trees_all_equal_shapes_and_dtypes(init(key, x), expected)


def test_a_donated_state_is_updated_in_one_compilation():
    x = standard_normal(32, (4, 6, 3))
    layer = OURS(use_running_average=False, momentum=0.5)
    _, params, stats = initialized(layer, x[0])
    expected, expected_stats = define_steps(
        *jax.tree.map(np.array, (params, stats)), x, momentum=0.5
    )

    def step(batch_stats, x):
        return trained(layer, {"params": params, "batch_stats": batch_stats}, x)

    step = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0)
    donated = stats
    for one, y in zip(x, expected, strict=True):
        found, stats = step(stats, one)
        assert_close(found, y)
    assert_close(stats, expected_stats)
    assert all(leaf.is_deleted() for leaf in donated.values())


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param((5, 3, 1, 2), id="google/flax#2417"),
        pytest.param((5, 3, 1, 0), id="pytorch#74944"),
    ],
)
def test_uneven_batches_are_merged_by_count(counts):
    x = np.array(standard_normal(33, (4, 5, 3))) + np.arange(4, dtype=np.float32)[:, None, None]
    valid = np.arange(5)[None] < np.array(counts)[:, None]
    x[~valid] = np.nan
    options = dict(use_running_average=False, momentum=0.0, axis_name="data")
    variables, params, stats = initialized(OURS(**options), x[0])

    def train(layer):
        apply = partial(trained, layer, variables)
        mapped = jax.pmap(lambda x, mask: apply(x, mask=mask), axis_name="data")
        y, updated = mapped(x, valid[..., None])
        return np.asarray(y), jax.tree.map(lambda leaf: leaf[0], updated)

    y, updated = train(OURS(**options))
    expected, expected_stats = define_batch_norm(params, stats, x[valid], momentum=0.0)
    assert_close((y[valid], updated), (expected, expected_stats))
    _, theirs = train(FLAX(**options))
    assert not np.abs(theirs["mean"] - expected_stats["mean"]).max() < 0.1


def test_an_empty_batch_changes_nothing():
    """pytorch#74944."""
    x = jnp.zeros((0, 3))
    ours, flax = OURS(use_running_average=False), FLAX(use_running_average=False)
    variables, _, stats = initialized(ours, jnp.zeros((2, 3)))

    def loss(variables, x):
        y, updated = trained(ours, variables, x)
        return jnp.sum(y), (y, updated)

    gradient, (y, updated) = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, x)
    assert y.shape == x.shape
    chex.assert_trees_all_equal(updated, stats)
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, (variables, x)))
    assert np.isnan(trained(flax, variables, x)[1]["var"]).all()


def test_the_variance_far_from_zero():
    """google/flax#1491."""
    x = 1000 + 0.01 * standard_normal(34, (512, 3))
    ours, flax = (kind(use_running_average=False, momentum=0.0) for kind in (OURS, FLAX))
    variables, params, stats = initialized(ours, x)
    expected = define_batch_norm(params, stats, x, momentum=0.0)
    assert_close(trained(ours, variables, x), expected)
    assert np.abs(trained(flax, variables, x)[0] - expected[0]).max() > 1


def test_a_transform_that_leaves_batch_stats_out():
    """google/flax#2279."""
    x = standard_normal(35, (5, 6, 3))
    layer = OURS(use_running_average=False)
    forgetful = lifted_scan(variable_broadcast="params")
    variables = layer.init(jax.random.key(0), x[0])
    message = "batch_stats has nothing for .* variable_carry='batch_stats'"
    with pytest.raises(ValueError, match=message):
        nn.init(forgetful, layer)(jax.random.key(0), x)
    with pytest.raises(ValueError, match=message):
        nn.apply(forgetful, layer, mutable=["batch_stats"])(variables, x)
    with pytest.raises(ValueError, match=message):
        layer.init(jax.random.key(0), x, mutable=["params"])


# --- a batch in several calls -----------------------------------------------------------------


def in_parts(layer, variables, parts, **collections):
    """Calls the layer on every part, each time with the old running statistics."""
    updates = {}
    for x, mask in parts:
        given = {"batch_moments": updates["batch_moments"]} if updates else {}
        y, updates = layer.apply(
            {**variables, **given, **collections},
            x,
            mask=mask,
            mutable=["batch_stats", "batch_moments"],
        )
    return y, updates


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"running_var_ddof": 1}, {"axis": 0}])
def test_moments_of_several_calls_make_one_update(options):
    layer = OURS(use_running_average=False, **{"momentum": 0.5, **options})
    x, batch_axis = standard_normal(70, (12, 12)) + 3, 1 if options == {"axis": 0} else 0
    mask = jnp.expand_dims(jnp.arange(12) % 5 < 3, 1 - batch_axis)
    variables = layer.init(jax.random.key(0), x)
    assert set(variables) == {"params", "batch_stats"}
    whole, expected = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    parts = zip(*(jnp.split(one, [2, 7], batch_axis) for one in (x, mask)), strict=True)
    _, updates = in_parts(layer, variables, parts)
    assert_close(updates["batch_stats"], expected["batch_stats"])
    count, mean, var = define_moments(x, layer.axis, mask)
    assert_close(updates["batch_moments"], {"count": count, "mean": mean, "var": var})
    y, _ = layer.apply(
        {**variables, "given_moments": updates["batch_moments"]}, x, mutable=["batch_stats"]
    )
    assert_close(y, whole)


def test_all_mutable_is_not_asking_for_moments():
    """A second step would go on from the moments of the first."""
    layer, x = OURS(use_running_average=False, momentum=0.5), standard_normal(72, (2, 6, 3))
    variables = layer.init(jax.random.key(0), x[0])
    _, expected = define_steps(variables["params"], variables["batch_stats"], x, momentum=0.5)
    for one in x:
        _, variables = layer.apply(variables, one, mutable=True)
    assert set(variables) == {"params", "batch_stats"}
    assert_close(variables["batch_stats"], expected)


def test_given_moments_serve_training_alone():
    layer, x = OURS(momentum=0.5), standard_normal(71, (6, 3))
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    given = {"given_moments": {"mean": jnp.full(3, 7.0), "var": jnp.full(3, 4.0)}}
    y, updates = layer.apply(
        {**variables, **given}, x, use_running_average=False, mutable=["batch_stats"]
    )
    assert_close(y, (np.asarray(x, np.float64) - 7) / np.sqrt(4 + 1e-5))
    _, expected = define_batch_norm(variables["params"], variables["batch_stats"], x, momentum=0.5)
    assert_close(updates["batch_stats"], expected)
    for mutable in (False, ["batch_moments"]):
        found = layer.apply({**variables, **given}, x, use_running_average=True, mutable=mutable)
        evaluated, collected = found if mutable else (found, {})
        assert_close(evaluated, layer.apply(variables, x, use_running_average=True))
        assert collected == {}


# --- switches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use,update,in_call",
    [
        (False, None, True), (False, False, False), (False, True, True),
        (True, None, False), (True, False, True), (True, True, False),
    ],
)  # fmt: skip
def test_where_statistics_come_from_and_whether_they_update(use, update, in_call):
    modes = dict(use_running_average=use, update_running_average=update)
    layer, given = (OURS(momentum=0.5), modes) if in_call else (OURS(momentum=0.5, **modes), {})
    x = standard_normal(80, (8, 3)) + 2
    variables = far_from_initial(layer.init(jax.random.key(0), x, **given))
    params, stats = variables["params"], variables["batch_stats"]
    y, updated = define_batch_norm(params, stats, x, momentum=0.5)
    if use:
        y = define_affine(x, *stats.values(), params["scale"], params["bias"])
    updates = (not use) if update is None else update
    found = trained(layer, variables, x, **given)
    assert_close(found, (y, updated if updates else stats))
    collected = layer.apply(variables, x, mutable=["batch_stats", "batch_moments"], **given)
    assert_close((collected[0], collected[1]["batch_stats"]), found)
    if updates:
        with pytest.raises(ValueError, match="batch_stats is immutable"):
            layer.apply(variables, x, **given)
    else:
        assert_close(layer.apply(variables, x, **given), y)


@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"use_bias": False}])
def test_parameters_that_do_not_train(options):
    x = standard_normal(81, (8, 3))
    trains, fixed = (OURS(**options, train_params=train_params) for train_params in (True, False))
    variables = far_from_initial(trains.init(jax.random.key(0), x, use_running_average=False))
    (expected, of_x), outcome = make_loss(trains)(variables, x, False)
    (found, found_of_x), found_outcome = make_loss(fixed)(variables, x, False)
    assert_close((found_of_x, found_outcome), (of_x, outcome))
    chex.assert_trees_all_equal(found["params"], jax.tree.map(jnp.zeros_like, variables["params"]))
    assert all(jnp.abs(leaf).max() > 0.01 for leaf in expected["params"].values())


@pytest.mark.parametrize(
    "modes", [{}, {"use_running_average": False}, {"update_running_average": True}]
)
def test_frozen_whatever_the_call_says(modes):
    x = standard_normal(82, (8, 3))
    layer = OURS(use_running_average=False, update_running_average=True, frozen=True)
    variables = layer.init(jax.random.key(0), x, **modes)
    chex.assert_trees_all_equal(variables, OURS(True).init(jax.random.key(0), x))
    variables = far_from_initial(variables)
    params, stats = variables["params"], variables["batch_stats"]
    y = define_affine(x, *stats.values(), params["scale"], params["bias"])
    assert_close(layer.apply(variables, x, **modes), y)
    assert_close(trained(layer, variables, x, **modes), (y, stats))


# --- freezing by path -------------------------------------------------------------------------


def norm_of(block, name):
    if name in block.evaluated:
        return partial(OURS, use_running_average=True)
    return partial(block.kind, use_running_average=False)


class Block(nn.Module):
    """Two norms; those of which the name is among `evaluated` are ours and always evaluate."""

    kind: type
    evaluated: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(3)(x)
        for name in ("first", "second"):
            x = norm_of(self, name)(name=name)(jnp.sin(x) + 1)
        return x, None


class SetupBlock(nn.Module):
    kind: type
    evaluated: tuple[str, ...] = ()

    def setup(self):
        self.dense = nn.Dense(3, name="Dense_0")
        self.first, self.second = norm_of(self, "first")(), norm_of(self, "second")()

    def __call__(self, x, _=None):
        return self.second(jnp.sin(self.first(jnp.sin(self.dense(x)) + 1)) + 1), None


class Net(nn.Module):
    """Two blocks; the norms of the stem whose names are among `evaluated` always evaluate."""

    block: type
    kind: type
    evaluated: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x):
        x, _ = self.block(self.kind, self.evaluated, name="stem")(x)
        return self.block(self.kind, name="head")(x)[0]


OF_THEIR_OWN = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
BLOCKS = {
    "compact": Block,
    "setup": SetupBlock,
    "remat": nn.remat(Block),
    "scan": nn.scan(Block, length=2, **OF_THEIR_OWN),
    "vmap": nn.vmap(SetupBlock, axis_size=2, in_axes=None, **OF_THEIR_OWN),
    "vmap of remat": nn.vmap(nn.remat(Block), axis_size=2, in_axes=None, **OF_THEIR_OWN),
}
X = standard_normal(83, (8, 3)) + 1


@functools.cache
def net(block, kind):
    """A network, the same with an evaluating norm and with two, and shapes of the variables."""
    nets = [Net(BLOCKS[block], kind, names) for names in ((), ("first",), ("first", "second"))]
    return *nets, jax.eval_shape(nets[0].init, jax.random.key(0), X)


def program(apply, variables):
    """What is computed in training, as text."""
    step = jax.make_jaxpr(partial(apply, mutable=["batch_stats"]))
    return re.sub(" at 0x[0-9a-f]+", "", str(step(variables, X)))


@pytest.mark.parametrize("kind", [OURS, FLAX], ids=["ours", "flax"])
@pytest.mark.parametrize("block", BLOCKS)
def test_freezing_is_evaluation_in_training(block, kind):
    plain, first, both, variables = net(block, kind)
    trains = program(plain.apply, variables)
    for paths, expected in (
        (["stem/first"], first),
        (["st?m"], both),
        (["stem/f*", "s*/s*"], both),
    ):
        frozen = bn.linen.freeze(plain.apply, *paths, train_params=True)
        assert program(frozen, variables) == program(expected.apply, variables) != trains
    assert program(plain.apply, variables) == trains
    initial = jax.eval_shape(bn.linen.freeze(plain.init), jax.random.key(0), X)
    chex.assert_trees_all_equal(initial, variables)


def test_frozen_parameters_train_only_if_asked():
    class Small(nn.Module):
        evaluated: bool = False

        @nn.compact
        def __call__(self, x):
            return FLAX(False, name="last")(jnp.sin(FLAX(self.evaluated, name="norm")(x)))

    variables = far_from_initial(Small().init(jax.random.key(0), X))
    chex.assert_trees_all_equal(
        bn.linen.freeze(Small().init)(jax.random.key(0), X), Small().init(jax.random.key(0), X)
    )

    @partial(jax.jit, static_argnames="apply")
    def outcome(variables, apply):
        def loss(variables):
            y, updates = apply(variables, X, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, updates)

        return jax.grad(loss, has_aux=True)(variables)

    freeze = partial(bn.linen.freeze, Small().apply, "norm")
    frozen = [freeze(), freeze(train_params=True)]
    fixed, trains, (expected, aux) = (
        outcome(variables, apply) for apply in (*frozen, Small(evaluated=True).apply)
    )
    assert_close(trains, (expected, aux))
    of_frozen = expected["params"]["norm"]
    assert all(jnp.abs(leaf).max() > 0.01 for leaf in of_frozen.values())
    expected["params"]["norm"] = jax.tree.map(jnp.zeros_like, of_frozen)
    assert_close(fixed, (expected, aux))


def test_the_last_function_made_decides():
    plain, first, both, variables = net("compact", OURS)
    unfreeze, freeze = bn.linen.unfreeze, partial(bn.linen.freeze, train_params=True)
    for apply, expected in {
        unfreeze(freeze(plain.apply, "stem"), "stem/second"): first,
        unfreeze(freeze(plain.apply)): plain,
        unfreeze(freeze(plain.apply), "head"): both,
        freeze(bn.linen.freeze(plain.apply, "stem/*"), "stem"): both,
        freeze(unfreeze(freeze(plain.apply)), "stem/first"): first,
    }.items():
        assert program(apply, variables) == program(expected.apply, variables)


def test_unfreezing_leaves_attributes_as_they_are():
    layer = OURS(frozen=True)
    variables = far_from_initial(layer.init(jax.random.key(0), X))
    y = layer.apply(variables, X)
    assert_close(bn.linen.unfreeze(layer.apply)(variables, X), y)


def test_what_was_compiled_before_is_not_taken_for_the_frozen_model():
    layer = OURS(use_running_average=False)
    variables = far_from_initial(layer.init(jax.random.key(0), X))
    jitted = jax.jit(partial(layer.apply, mutable=["batch_stats"]))
    frozen = bn.linen.freeze(jitted)
    expected = define_affine(
        X, *variables["batch_stats"].values(), *(variables["params"][n] for n in ("scale", "bias"))
    )
    before = jitted(variables, X)
    for _ in range(2):
        assert_close(frozen(variables, X), (expected, {"batch_stats": variables["batch_stats"]}))
        chex.assert_trees_all_equal(jitted(variables, X), before)


def test_freezing_what_nn_jit_has_compiled():
    model, expected = nn.jit(Block)(FLAX), nn.jit(Block)(OURS, ("first", "second"))
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    before = program(model.apply, variables)
    frozen = bn.linen.freeze(model.apply, train_params=True)
    for _ in range(2):
        assert program(frozen, variables) == program(expected.apply, variables) != before
        assert program(model.apply, variables) == before
    with pytest.raises(ValueError, match=r"cannot tell the norms of several JitBlock apart"):
        program(bn.linen.freeze(model.apply, "first"), variables)


def test_paths_that_match_no_norm():
    plain, _, _, variables = net("compact", OURS)
    for change in (bn.linen.freeze, bn.linen.unfreeze):
        message = (
            r"whose path matches \['stam', 'x/\*'\]; .* \['head/first', 'head/second', 'stem/first'"
        )
        with pytest.raises(ValueError, match=message):
            program(change(plain.apply, "stam", "stem", "x/*"), variables)
    dense = nn.Dense(3)
    with pytest.raises(ValueError, match=r"matches \['\*'\]; those called have the paths \[\]"):
        bn.linen.freeze(dense.apply)(dense.init(jax.random.key(0), X), X)


class Derived(FLAX):
    """A user's own."""


def test_a_subclass_is_left_alone():
    x = 1e4 + X
    layer = Derived(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(
        TypeError, match=r"'' is a Derived, .*derive it from bn_jax.linen.BatchNorm"
    ):
        bn.linen.freeze(layer.apply)(variables, x, mutable=["batch_stats"])
    with bn.linen.replace_norms():
        chex.assert_trees_all_equal(*(trained(layer, variables, x) for _ in range(2)))
        found = trained(layer, variables, x)
    chex.assert_trees_all_equal(found, trained(layer, variables, x))


# --- migration --------------------------------------------------------------------------------

# Every layer that is replaced, with what it needs to be given.
REPLACED = {
    FLAX: dict(use_running_average=False),
    nn.LayerNorm: {},
    nn.RMSNorm: {},
    nn.GroupNorm: dict(num_groups=1),
    nn.InstanceNorm: {},
}


def test_every_layer_of_flax_with_a_namesake_here_is_replaced():
    named = [name for name in vars(bn.linen) if name.endswith("Norm")]
    namesakes = {getattr(nn, name) for name in named if hasattr(nn, name)}
    assert set(REPLACED) == namesakes


@pytest.mark.parametrize("kind", REPLACED, ids=lambda kind: kind.__name__)
def test_replaced_norms_are_ours(kind):
    ours, key = getattr(bn.linen, kind.__name__), jax.random.key(0)
    variables = kind(**REPLACED[kind]).init(key, X)
    for lift in (lambda one: one, nn.remat, nn.jit):
        model, expected = (lift(one)(**REPLACED[kind]) for one in (kind, ours))
        outside, inside = (program(one.apply, variables) for one in (model, expected))
        with bn.linen.replace_norms():
            assert program(model.apply, variables) == inside != outside
            chex.assert_trees_all_equal(model.init(key, X), variables)
        assert program(model.apply, variables) == outside
        decorated = bn.linen.replace_norms()(model.apply)
        assert program(decorated, variables) == inside


def test_replacing_in_what_was_compiled_before():
    layer, x = FLAX(use_running_average=False), 1e4 + X
    variables = layer.init(jax.random.key(0), x)
    call = jax.jit(partial(layer.apply, mutable=["batch_stats"]))
    outside = call(variables, x)
    expected, stats = define_batch_norm(variables["params"], variables["batch_stats"], x)
    with bn.linen.replace_norms():
        assert_close(call(variables, x), (expected, {"batch_stats": stats}))
    chex.assert_trees_all_equal(call(variables, x), outside)
    assert np.abs(outside[0] - expected).max() > 0.01


def test_replacing_is_invisible():
    model, key = Block(FLAX), jax.random.key(0)
    variables = model.init(key, X)

    def look():
        captured = model.apply(variables, X, capture_intermediates=True, mutable=True)
        return jax.tree.map(jnp.shape, captured), model.tabulate(key, X)

    bound = FLAX(use_running_average=True).bind(FLAX(True).init(key, X))
    expected = look()
    with bn.linen.replace_norms(), bn.linen.replace_norms():
        assert look() == expected
        bound(X)
    assert type(bound) is FLAX


def test_replacing_and_freezing():
    plain, _, _, variables = net("compact", FLAX)
    _, first, _, _ = net("compact", OURS)
    expected = program(first.apply, variables)
    freeze = partial(bn.linen.freeze, train_params=True)
    with bn.linen.replace_norms():
        assert program(freeze(plain.apply, "stem/first"), variables) == expected
    replaced = bn.linen.replace_norms()(plain.apply)
    assert program(freeze(replaced, "stem/first"), variables) == expected


# --- lifted transforms of variables -----------------------------------------------------------


class InLogarithms(nn.Module):
    """A norm whose scale is kept as a logarithm."""

    @nn.compact
    def __call__(self, x):
        inward, outward = (partial(jax.tree.map, function) for function in (jnp.exp, jnp.log))
        kind = nn.map_variables(OURS, "params", inward, outward, init=self.is_initializing())
        return kind(use_running_average=False, use_bias=False, name="norm")(x)


def test_mapped_variables():
    x = standard_normal(87, (8, 3)) + 1
    variables = InLogarithms().init(jax.random.key(0), x)
    assert_close(variables["params"]["norm"], {"scale": jnp.zeros(3)})
    variables["params"]["norm"]["scale"] = jnp.array([0.0, 1.0, -1.0])
    y, updated = trained(InLogarithms(), variables, x)
    params = {"scale": np.exp([0.0, 1.0, -1.0])}
    expected = define_batch_norm(params, bn.init_batch_stats(3), x)
    assert_close((y, updated["norm"]), expected)


class Shared(nn.Module):
    """A norm that lives in the scope of the module around it, beside a parameter of that."""

    def setup(self):
        self.norm = OURS(use_running_average=False)
        nn.share_scope(self, self.norm)

    @nn.compact
    def __call__(self, x):
        return self.norm(x) + self.param("shift", nn.initializers.ones, (1, 3))


def test_a_shared_scope():
    x = standard_normal(88, (8, 3))
    model = nn.Sequential([Shared()])
    variables = model.init(jax.random.key(0), x)
    assert set(variables["params"]["layers_0"]) == {"shift", "scale", "bias"}
    assert set(variables["batch_stats"]["layers_0"]) == {"mean", "var"}
    y, updates = trained(model, variables, x)
    expected, stats = define_batch_norm(bn.init_params(3), bn.init_batch_stats(3), x)
    assert_close((y, updates["layers_0"]), (expected + 1, stats))
    frozen = bn.linen.freeze(model.apply, "layers_0")
    y, updates = frozen(variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])


# --- a state that is measured -------------------------------------------------------------------


class Twice(nn.Module):
    """One layer, called on both halves of the batch."""

    norm: nn.BatchNorm

    def __call__(self, x):
        return jnp.concatenate([self.norm(half) for half in jnp.split(x, 2)])


def over_two_parts(layer):
    return lambda variables, x, mutable: nn.apply(CARRIED, layer, mutable=mutable)(
        variables, jnp.stack(jnp.split(x, 2))
    )


MEASURED = {
    "one call": lambda layer: layer.apply,
    "two calls": lambda layer: Twice(layer).apply,
    "lifted scan": over_two_parts,
    "everything mutable": lambda layer: layer.apply,
    "Flax's layer": lambda layer: bn.linen.replace_norms()(
        FLAX(use_running_average=layer.use_running_average).apply
    ),
    "accumulated": lambda layer: (
        lambda variables, x, mutable: layer.apply(variables, x, mutable=[*mutable, "batch_moments"])
    ),
}


@pytest.mark.parametrize("use_running_average", [True, False])
@pytest.mark.parametrize("way", MEASURED)
def test_a_state_that_is_measured(way, use_running_average):
    x = standard_normal(70, (8, 3)) * 2 + 1
    layer = OURS(use_running_average=use_running_average)
    stats = far_from_initial(bn.init_batch_stats(3))
    path = (lambda tree: {"norm": tree}) if way == "two calls" else lambda tree: tree
    variables = {
        "params": path(bn.init_params(3)),
        "batch_stats": path(start_measuring(stats)),
    }
    mutable = True if way == "everything mutable" else ["batch_stats"]
    y, updates = MEASURED[way](layer)(variables, x, mutable=mutable)
    updated = updates["batch_stats"]
    updated = dict(updated["norm"] if way == "two calls" else updated)
    ones, zeros = np.ones(3), np.zeros(3)
    calls = 2 if way in ("two calls", "lifted scan") else 1
    expected = [*define_moments(x), zeros, ones * calls * use_running_average]
    assert_close(list(updated.pop("measured")[:5]), expected)
    chex.assert_trees_all_equal(updated, stats)
    if use_running_average:
        assert_close(y.reshape(x.shape), define_affine(x, *stats.values(), ones, zeros))


@pytest.mark.parametrize("stacked", ["vmap", "scan over layers"])
def test_states_that_are_measured_are_stacked_as_others_are(stacked):
    x = standard_normal(71, (4, 6, 3))
    if stacked == "vmap":
        lifted = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
        model, path = nn.vmap(OURS, **lifted)(use_running_average=True), lambda tree: tree
    else:
        model, x, path = Deep(True), x[0], lambda tree: tree["BatchNorm_0"]
    variables = model.init(jax.random.key(0), x)
    state = start_measuring(path(variables["batch_stats"]))
    nested = state if stacked == "vmap" else {"BatchNorm_0": state}
    _, updates = model.apply({**variables, "batch_stats": nested}, x, mutable=["batch_stats"])
    measured = path(updates["batch_stats"])["measured"]
    for number in range(4):
        rows = x[number] if stacked == "vmap" else x
        assert_close([leaf[number] for leaf in measured[:3]], list(define_moments(rows)))
        x = x if stacked == "vmap" else np.sin(define_batch_norm({}, bn.init_batch_stats(3), x)[0])


def test_which_calls_leave_a_state_that_is_measured_alone():
    x = standard_normal(72, (4, 3))
    state = start_measuring(far_from_initial(bn.init_batch_stats(3)))
    variables = {"params": bn.init_params(3), "batch_stats": state}
    evaluated = OURS(use_running_average=True).apply(variables, x)
    for layer in (
        OURS(use_running_average=True, update_running_average=False),
        OURS(use_running_average=False, update_running_average=False),
        OURS(use_running_average=False, frozen=True),
    ):
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        chex.assert_trees_all_equal(updates, {"batch_stats": state})
    chex.assert_trees_all_equal(y, evaluated)
