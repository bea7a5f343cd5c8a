"""What only a Linen layer has: collections, its errors, and variables in several calls."""

from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interfaces import BROADCAST, CARRIED, STACKED, lifted_scan
from support import (
    assert_close,
    define_batch_norm,
    define_evaluation,
    define_moments,
    define_steps,
    far_from_initial,
    standard_normal,
)

import bn_jax as bn
from bn_jax._core.running import start_measuring

OURS, FLAX = bn.linen.BatchNorm, nn.BatchNorm


def trained(layer, variables, x, **options):
    y, updates = layer.apply(variables, x, mutable=["batch_stats"], **options)
    return y, updates["batch_stats"]


def initialized(layer, x):
    variables = far_from_initial(layer.init(jax.random.key(0), x))
    return variables, variables["params"], variables["batch_stats"]


# --- dtypes ---------------------------------------------------------------------------------------


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


# --- statistics and modes -------------------------------------------------------------------------


def test_the_cumulative_average_needs_a_count_to_update():
    layer, x = OURS(momentum=None), standard_normal(12, (8, 3)) + 5
    without_count = FLAX().init(jax.random.key(0), x, use_running_average=False)
    assert_close(layer.apply(without_count, x, True), FLAX().apply(without_count, x, True))
    with pytest.raises(ValueError, match="momentum=None averages over all batches"):
        layer.apply(without_count, x, False, mutable=["batch_stats"])


def test_batches_are_counted_with_a_momentum_too():
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
    options: dict[str, Any] = dict(use_running_average=False, momentum=0.0, axis_name="data")
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


@pytest.mark.parametrize(
    "use,update", [(False, None), (False, False), (False, True), (True, None), (True, False),
                   (True, True)],
)  # fmt: skip
def test_an_update_needs_mutable_batch_stats(use, update):
    x, modes = standard_normal(80, (8, 3)) + 2, {"use_running_average": use}
    modes = modes if update is None else modes | {"update_running_average": update}
    layer = OURS(momentum=0.5)
    variables = far_from_initial(layer.init(jax.random.key(0), x, **modes))
    y, stats = trained(layer, variables, x, **modes)
    both = ["batch_stats", "batch_moments"]
    collected, updates = layer.apply(variables, x, mutable=both, **modes)
    assert_close((collected, updates["batch_stats"]), (y, stats))
    updates = (not use) if update is None else update
    if updates:
        with pytest.raises(ValueError, match="batch_stats is immutable"):
            layer.apply(variables, x, **modes)
    else:
        assert_close(layer.apply(variables, x, **modes), y)


@pytest.mark.parametrize(
    "modes", [{}, {"use_running_average": False}, {"update_running_average": True}]
)
def test_a_frozen_layer_is_initialized_as_others_are(modes):
    x = standard_normal(82, (8, 3))
    layer = OURS(use_running_average=False, update_running_average=True, frozen=True)
    variables = layer.init(jax.random.key(0), x, **modes)
    chex.assert_trees_all_equal(variables, OURS(True).init(jax.random.key(0), x))


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


# --- transforms -----------------------------------------------------------------------------------


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


def test_lifted_scan_creates_only_broadcast_statistics():
    """google/flax#2052."""
    x = standard_normal(24, (5, 6, 3))
    layer, key = OURS(use_running_average=False), jax.random.key(0)
    created = nn.init(BROADCAST, layer)(key, x)
    chex.assert_trees_all_equal(created, layer.init(key, x[0]))
    with pytest.raises(TypeError, match="pytree structure"):
        nn.init(CARRIED, layer)(key, x)


def test_lifted_scan_in_evaluation():
    """google/flax#3602."""
    x = standard_normal(25, (5, 6, 3))
    layer = OURS(use_running_average=True)
    variables, params, stats = initialized(layer, x[0])
    y = nn.apply(BROADCAST, layer)(variables, x)
    assert_close(y, define_evaluation(params, stats, x))
    carried = nn.apply(CARRIED, layer, mutable=["batch_stats"])(variables, x)
    chex.assert_trees_all_equal(carried, (y, {"batch_stats": stats}))
    with pytest.raises(TypeError, match="pytree structure"):
        nn.apply(CARRIED, layer)(variables, x)


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
    axes: Any = (1, -1)
    layer = OURS(use_running_average=False, axis_name="nowhere", axis=axes)
    x, key = jax.ShapeDtypeStruct((1, 4, 3), jnp.bfloat16), jax.random.key(0)
    init = layer.lazy_init if create == "lazy_init" else partial(jax.eval_shape, layer.init)
    expected = layer.init(key, jnp.ones(x.shape, x.dtype))
    chex.assert_trees_all_equal_shapes_and_dtypes(init(key, x), expected)


# --- a batch in several calls ---------------------------------------------------------------------


def in_parts(layer, variables, parts, **collections):
    """Calls the layer on every part, each time with the old running statistics."""
    updates: dict[str, Any] = {}
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


# --- lifted transforms of variables ---------------------------------------------------------------


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


# --- a state that is measured ---------------------------------------------------------------------


class Deep(nn.Module):
    """A scan over four layers, each with its own variables."""

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return jnp.sin(layer(x)), None

        return nn.scan(body, length=4, **STACKED)(OURS(use_running_average=False), x, None)[0]


def test_states_that_are_measured_are_stacked_as_others_are():
    x = standard_normal(71, (6, 3))
    variables = Deep().init(jax.random.key(0), x)
    state = start_measuring(variables["batch_stats"]["BatchNorm_0"])
    variables = {**variables, "batch_stats": {"BatchNorm_0": state}}
    _, updates = Deep().apply(variables, x, mutable=["batch_stats"])
    measured = updates["batch_stats"]["BatchNorm_0"]["measured"]
    for number in range(4):
        assert_close([leaf[number] for leaf in measured[:3]], list(define_moments(x)))
        x = np.sin(define_batch_norm({}, bn.init_batch_stats(3), x)[0])
