"""Batch renorm and its modules against float64 NumPy, and under the tools around a norm."""

import functools
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from support import (
    assert_close,
    define_affine,
    define_batch_norm,
    define_moments,
    differentiate,
    exact,
    far_from_initial,
)

import bn_jax as bn

pytestmark = pytest.mark.usefixtures("compile_quickly")

TRAIN = partial(bn.batch_renorm, use_running_average=False)
EPSILON = 1e-5
BOUNDS = {"default": (3.0, 5.0), "tight": (1.1, 0.2), "one-sided": (1.0, 5.0), "wide": (1e3, 1e3)}
STEPS = 3 * np.random.default_rng(0).standard_normal((3, 7, 4)) + np.array([0.0, 3, -1, 1e3])
MASKS = {
    "all": None,
    "masked": np.arange(7)[:, None] % 3 != 1,
    "weights": np.array([1, 0, 0.5, 2, 0, 1, 3.0])[:, None],
}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def make_state():
    params, stats = bn.init_params(4, dtype=jnp.float64), bn.init_batch_stats(4, dtype=jnp.float64)
    return far_from_initial(params), far_from_initial(stats)


def corrections(stats, mean, var, r_max, d_max):
    """r and d in float64, from the definition."""
    s = np.sqrt(exact(stats["var"]) + EPSILON)
    r = np.clip(np.sqrt(var + EPSILON) / s, 1 / r_max, r_max)
    return r, np.clip((mean - exact(stats["mean"])) / s, -d_max, d_max)


def define(params, stats, x, mask=None, r_max=3.0, d_max=5.0, r_and_d=None, **options):
    """Output and new running statistics; `r_and_d` holds them fixed."""
    _, mean, var = define_moments(x, -1, mask)
    r, d = r_and_d or corrections(stats, mean, var, r_max, d_max)
    normalized = define_affine(x, mean, var, r, d, epsilon=EPSILON)
    y = normalized * exact(params["scale"]) + exact(params["bias"])
    return y, define_batch_norm(params, stats, x, mask=mask, **options)[1]


@functools.cache
def compiled(**options):
    return jax.jit(partial(TRAIN, **options))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_steps_are_those_of_the_definition(bounds, mask):
    params, stats = make_state()
    expected_stats, mask = stats, MASKS[mask]
    valid = np.broadcast_to(True if mask is None else mask > 0, STEPS[0].shape)
    r_max, d_max = BOUNDS[bounds]
    bounded = set()
    for x in STEPS:
        y, stats = compiled(momentum=0.7, running_var_ddof=1)(
            params, stats, jnp.where(valid, x, jnp.nan), mask=mask, r_max=r_max, d_max=d_max
        )
        _, mean, var = define_moments(x, -1, mask)
        r, d = corrections(expected_stats, mean, var, r_max, d_max)
        bounded |= {*np.isin(r, (r_max, 1 / r_max)), *np.isin(np.abs(d), [d_max])}
        expected_y, expected_stats = define(
            params, expected_stats, x, mask, r_max, d_max, momentum=0.7, running_var_ddof=1
        )
        assert_close(y[valid], expected_y[valid], tolerance=1e-8)
        assert_close(stats, expected_stats)
    assert bounded == ({False} if bounds == "wide" else {True, False})


@pytest.mark.parametrize("bounds", ["tight", "wide"])
def test_gradients_are_those_with_r_and_d_held_fixed(bounds):
    """Without the stopped gradients, wide bounds would send none to x but through its own value."""
    params, stats = make_state()
    r_max, d_max = BOUNDS[bounds]
    x, weights = np.asarray(STEPS[0][:, :3]), np.cos(np.arange(21)).reshape(7, 3)
    params, stats = jax.tree.map(lambda leaf: leaf[:3], (params, stats))

    def loss(params, stats, x):
        y, _ = TRAIN(params, stats, x, r_max=r_max, d_max=d_max)
        return jnp.sum(jnp.sin(y) * weights)

    of_params, of_stats, of_x = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, stats, x)
    _, mean, var = define_moments(x)
    fixed = corrections(stats, mean, var, r_max, d_max)

    def by_definition(params, x):
        return np.sum(np.sin(define(params, stats, x, r_and_d=fixed)[0]) * weights)

    assert_close(of_x, differentiate(partial(by_definition, params), x), tolerance=1e-7)
    for name, found in of_params.items():
        expected = differentiate(lambda one, n=name: by_definition(params | {n: one}, x),
                                 params[name])  # fmt: skip
        assert_close(found, expected, tolerance=1e-7)
    assert all(np.all(leaf == 0) for leaf in of_stats.values())


def test_without_room_for_a_correction_it_is_batch_norm():
    params, stats = make_state()
    x, mask = STEPS[1], MASKS["masked"]

    def differentiated(norm, params, x, **options):
        (y, new), pull = jax.vjp(lambda p, x: norm(p, stats, x, mask=mask, **options), params, x)
        return y, new, pull((jnp.sin(y), jax.tree.map(jnp.zeros_like, new)))

    expected = jax.jit(partial(differentiated, partial(bn.batch_norm, use_running_average=False)))(
        params, x
    )
    for bounds in dict(r_max=1, d_max=0), dict(r_max=jnp.float32(1), d_max=jnp.int32(0)):
        found = jax.jit(partial(differentiated, TRAIN))(params, x, **bounds)
        assert_close(found, expected, tolerance=1e-12)
    found, expected = (
        norm(params, stats, x, use_running_average=True)[0]
        for norm in (bn.batch_renorm, bn.batch_norm)
    )
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("virtual_batch_size", [None, 2])
def test_where_nothing_is_clipped_training_gives_what_evaluation_does(virtual_batch_size):
    params, stats = make_state()
    x = STEPS[0][:6]
    options = dict(r_max=1e6, d_max=1e6, virtual_batch_size=virtual_batch_size)
    y, updated = compiled(**options)(params, stats, x)
    assert_close(y, bn.batch_norm(params, stats, x, use_running_average=True)[0], tolerance=1e-9)
    batch_norm = bn.batch_norm(params, stats, x, use_running_average=False)
    assert_close(updated, batch_norm[1])


def test_bounds_follow_a_schedule_in_one_program():
    params, stats = make_state()
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def train(bounds):
        return TRAIN(params, stats, STEPS[0], r_max=bounds, d_max=bounds - 1)

    for bounds in (1.0, 1.5, 2.0):
        expected = define(params, stats, STEPS[0], r_max=bounds, d_max=bounds - 1)
        assert_close(train(bounds), expected, tolerance=1e-8)


def test_nothing_valid_is_normalized_by_the_running_statistics():
    params, stats = make_state()
    x = jnp.where(jnp.arange(4) == 2, STEPS[0], jnp.nan)
    y, updated = compiled()(params, stats, x, mask=jnp.isfinite(x))
    evaluated, _ = bn.batch_norm(params, stats, STEPS[0], use_running_average=True)
    expected_y, expected = define(params, stats, STEPS[0])
    assert_close(y[:, 2], expected_y[:, 2])
    for name, leaf in updated.items():
        assert_close(leaf[2], expected[name][2])
        assert np.array_equal(np.delete(leaf, 2), np.delete(stats[name], 2))
    y, updated = compiled()(params, stats, STEPS[0], mask=jnp.zeros((7, 1), bool))
    assert_close(y, evaluated)
    assert all(np.array_equal(updated[name], stats[name]) for name in stats)


def test_a_batch_that_is_not_finite_leaves_its_feature_alone():
    params, stats = make_state()
    x = jnp.asarray(STEPS[0]).at[1, 3].set(jnp.inf)
    y, updated = compiled()(params, stats, x)
    expected_y, expected = define(params, stats, STEPS[0])
    assert_close(y[:, :3], expected_y[:, :3])
    for name in stats:
        assert updated[name][3] == stats[name][3]
        assert_close(updated[name][:3], expected[name][:3])


def test_two_values_send_no_derivative_to_the_input_but_to_the_scale():
    """The output of batch norm is -1 and 1 whatever the two values are."""
    params, stats = make_state()
    x, weights = STEPS[0][:2], np.array([[1.0], [3.0]])

    def loss(norm, params, x):
        return jnp.sum(weights * norm(params, stats, x, use_running_average=False)[0])

    for norm in bn.batch_norm, partial(bn.batch_renorm, r_max=1e3, d_max=1e3):
        differentiated = jax.grad(partial(loss, partial(norm, epsilon=1e-14)), argnums=(0, 1))
        of_params, of_x = jax.jit(differentiated)(params, x)
        # Without the cancellation it would be of the size of scale / (x[1] - x[0]).
        assert_close(of_x, np.zeros((2, 4)), tolerance=1e-9)
        by_batch = np.ptp(weights) * np.sign(x[1] - x[0])
        renormalized = define_affine(x, stats["mean"], stats["var"], epsilon=0)
        expected = by_batch if norm is bn.batch_norm else np.sum(weights * renormalized, 0)
        assert_close(of_params["scale"], expected, tolerance=1e-6)


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "r_max": (dict(r_max=0.5), r"r_max=0.5 must be at least 1"),
    "r_max is NaN": (dict(r_max=np.nan), r"r_max=nan must be at least 1"),
    "d_max": (dict(d_max=-1), r"d_max=-1 must not be negative"),
    "batch norm's own": (dict(momentum=2.0), r"momentum=2.0 is outside \[0, 1\]"),
    "features": (dict(axis=0), "has features of shape"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told(case):
    changed, text = BAD_INPUT[case]
    params, stats = make_state()
    with pytest.raises(ValueError, match=text):
        TRAIN(params, stats, **{"x": STEPS[0], **changed})


def test_an_unknown_axis_is_told():
    params, stats = make_state()
    with pytest.raises(NameError, match="axis_name='other' is not bound"):
        jax.vmap(lambda x: TRAIN(params, stats, x, axis_name="other"), axis_name="data")(STEPS)


MESH_AXIS = "data"


def on_devices(regime, function, x, mask):
    """`function` of all examples on four devices; its per-device results are the same on all."""
    if regime == "pmap":
        split = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), (x, mask))
        y, whole = jax.pmap(function, axis_name=MESH_AXIS)(*split)
        return y.reshape(x.shape), jax.tree.map(lambda leaf: leaf[3], whole)
    mesh, spec = jax.make_mesh((4,), (MESH_AXIS,)), PartitionSpec(MESH_AXIS)
    if regime == "shard_map":
        function = jax.shard_map(
            function, mesh=mesh, in_specs=spec, out_specs=(spec, PartitionSpec())
        )
    with jax.set_mesh(mesh):
        return jax.jit(function)(*jax.device_put((x, mask), NamedSharding(mesh, spec)))


@pytest.mark.parametrize("regime", ["pmap", "shard_map", "sharded jit"])
def test_n_devices_give_the_numbers_of_one(regime):
    """With a device that has nothing valid, and values in the gradient of x that are not."""
    params, stats = make_state()
    x = STEPS.reshape(-1, 4)[:16]
    mask = (np.arange(16) // 4 != 2)[:, None] & (np.arange(16)[:, None] % 5 != 0)
    x = jnp.where(mask, x, jnp.nan)

    def train(x, mask, **options):
        def normalize(x):
            return TRAIN(params, stats, x, mask=mask, r_max=1.5, d_max=0.5, **options)

        y, pull, new = jax.vjp(normalize, x, has_aux=True)
        (of_x,) = pull(jnp.where(mask, jnp.cos(y), 0))
        return jnp.where(mask, y + of_x, of_x), new

    expected = jax.jit(train)(x, mask)
    found = on_devices(regime, partial(train, axis_name=MESH_AXIS), x, jnp.asarray(mask))
    assert_close(jax.tree.map(np.asarray, found), expected)
    assert_close(expected[1], define(params, stats, np.where(mask, x, 0), mask)[1])


class Net(nn.Module):
    """Two norms, the second behind the first; `bounds` are handed to the calls."""

    norm: type = bn.linen.BatchRenorm
    options: tuple = ()

    @nn.compact
    def __call__(self, x, train, mask=None, **bounds):
        x = x.reshape(len(x), -1)
        bounds |= {} if mask is None else {"mask": mask[:, None]}
        options = dict(self.options, use_running_average=not train)
        x = nn.tanh(self.norm(name="norm_0", **options)(nn.Dense(3, name="dense_0")(x), **bounds))
        return self.norm(name="norm_1", **options)(nn.Dense(3, name="dense_1")(x), **bounds)


X = STEPS[0]


@functools.cache
def variables_of_net():
    variables = jax.jit(partial(Net().init, train=False))(jax.random.key(0), X)
    return variables | {"batch_stats": far_from_initial(variables["batch_stats"])}


def linen_layer(attributes, x, **call):
    layer = bn.linen.BatchRenorm(use_running_average=False, param_dtype=x.dtype, **attributes)
    params, stats = make_state()
    y, updates = layer.apply(
        {"params": params, "batch_stats": stats}, x, mutable="batch_stats", **call
    )
    return y, updates["batch_stats"]


def nnx_layer(attributes, x, **call):
    layer = bn.nnx.BatchRenorm(4, rngs=nnx.Rngs(0), **attributes)
    params, stats = make_state()
    nnx.update(layer, {**params, **stats})
    y = layer(x, **call)
    return y, {"mean": layer.mean[...], "var": layer.var[...]}


@pytest.mark.parametrize("layer", [linen_layer, nnx_layer])
def test_layers_are_the_function(layer):
    state, mask = make_state(), MASKS["masked"]
    options = dict(momentum=0.6, epsilon=1e-3, activation=jax.nn.relu)
    for attributes, call, bounds in (
        (dict(), dict(), (3.0, 5.0)),
        (dict(r_max=1.5, d_max=0.5), dict(), (1.5, 0.5)),
        (dict(r_max=1.5), dict(r_max=1.2, d_max=jnp.float32(0.25)), (1.2, 0.25)),
    ):
        found = jax.jit(partial(layer, attributes | options))(X, mask=mask, residual=X, **call)
        r_max, d_max = bounds
        expected = compiled(r_max=r_max, d_max=d_max, **options)(*state, X, mask=mask, residual=X)
        assert_close(found, expected)
    with pytest.raises(ValueError, match="r_max=0 must be"):
        layer({}, X, r_max=0)


def test_a_model_moves_between_batch_norm_and_batch_renorm():
    variables = variables_of_net()
    like = jax.eval_shape(partial(Net(bn.linen.BatchNorm).init, train=False), jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, like)
    by_batch_norm, by_renorm = (
        Net(norm).apply(variables, X, train=False) for norm in (bn.linen.BatchNorm, Net.norm)
    )
    chex.assert_trees_all_equal(by_batch_norm, by_renorm)
    masks = [bn.optim.norm_params_mask(one["params"]) for one in (variables, like)]
    assert masks[0] == masks[1] and masks[0]["norm_0"] == {"scale": True, "bias": True}


def test_freezing_and_replacing():
    variables = variables_of_net()
    frozen = bn.linen.freeze(Net().apply, "norm_0", "norm_1")
    y, updates = frozen(variables, X, train=True, mutable="batch_stats")
    assert_close(y, Net().apply(variables, X, train=False))
    assert_close(updates["batch_stats"], variables["batch_stats"])
    apply = jax.jit(partial(Net().apply, train=True, mutable="batch_stats"))
    replaced = bn.linen.replace_norms(apply)(variables, X)
    assert_close(replaced, apply(variables, X))
    layer = bn.nnx.BatchRenorm(4, r_max=2.0, rngs=nnx.Rngs(0))
    assert type(bn.nnx.replace_norms(layer)) is bn.nnx.BatchRenorm
    bn.nnx.freeze(layer).train()
    assert_close(layer(X), X / np.sqrt(1 + EPSILON))


@pytest.mark.parametrize("train", [False, True])
def test_recalibrated_statistics_reproduce_themselves(train):
    """In training too the second norm depends on the running statistics of the first."""

    def forward(variables, x):
        return Net().apply(variables, x, train=train, mutable=["batch_stats"])

    found = bn.recalibrate(forward, variables_of_net(), [X[:3], X[3:]])
    assert found.passes == 2
    settled = variables_of_net() | {"batch_stats": found.batch_stats}
    again = bn.recalibrate(forward, settled, [X[:3], X[3:]], passes=1)
    assert_close(again.batch_stats, found.batch_stats)
    inputs = X @ exact(settled["params"]["dense_0"]["kernel"])
    _, mean, var = define_moments(inputs)
    assert_close(found.batch_stats["norm_0"], {"mean": mean, "var": var}, tolerance=1e-6)


def test_evaluation_folds():
    forward = partial(Net().apply, train=False)
    folded = bn.fold(forward, variables_of_net(), X)
    assert all("norm" not in path for path in map(str, jax.tree.leaves(folded.params)))
    assert_close(folded.apply(folded.params, X), forward(variables_of_net(), X), tolerance=1e-5)


def test_audit_sees_its_norms():
    def forward(variables, x, train):
        return Net().apply(variables, x, train=train, mutable=["batch_stats"])

    variables = jax.jit(partial(Net().init, train=False))(jax.random.key(0), X)
    found = bn.audit(forward, variables, X)
    assert {one.path for one in found.findings} >= {"norm_0", "norm_1"}


def test_parts_of_a_batch():
    """By their own moments they are ghost batches; by those of the whole, they are the whole."""
    params, stats = make_state()
    bounds: dict[str, Any] = dict(r_max=1.5, d_max=0.5)
    parts = X[:3], X[3:6]
    layer = bn.linen.BatchRenorm(use_running_average=False, **bounds)

    @jax.jit
    def apply(collections, x):
        variables = {"params": params, "batch_stats": stats, **collections}
        return layer.apply(variables, x, mutable=["batch_stats", "batch_moments"])

    def over_parts(given):
        outputs, reached = (
            [],
            {"batch_moments": {n: jnp.zeros(4) for n in ("count", "mean", "var")}},
        )
        for part in parts:
            collected = {"batch_moments": reached["batch_moments"]}
            y, reached = apply({"given_moments": given, **collected}, part)
            outputs.append(y)
        return np.concatenate(outputs), reached

    y, reached = over_parts({})
    ghost, updated = compiled(virtual_batch_size=3, **bounds)(params, stats, X[:6])
    assert_close(y, ghost)
    assert_close(reached["batch_stats"], updated)
    y, reached = over_parts(reached["batch_moments"])
    whole, updated = compiled(**bounds)(params, stats, X[:6])
    assert_close(y, whole)
    assert_close(reached["batch_stats"], updated)
