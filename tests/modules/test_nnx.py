import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx import bridge
from jax.sharding import AxisType, PartitionSpec
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

OURS, FLAX = bn.nnx.BatchNorm, nnx.BatchNorm


def fill(layer):
    """Gives the variables values far from the initial ones."""
    nnx.update(layer, far_from_initial(nnx.state(layer)))
    return layer


def outcome(layer, x, mask=None):
    """Output, gradients and state after one call."""

    def loss(layer, x):
        y = layer(x, mask=mask)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    gradients, y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    return nnx.to_pure_dict(gradients[0]), gradients[1], y, nnx.to_pure_dict(nnx.state(layer))


def test_statistics_are_not_cast_in_evaluation():
    mean = 300.7
    layer = OURS(3, dtype=jnp.bfloat16, use_running_average=True, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.full(3, mean)
    x = jnp.asarray(standard_normal(3, (64, 3)) + mean, jnp.bfloat16)
    expected = define_affine(x, np.full(3, np.float32(mean)), np.ones(3), np.ones(3), np.zeros(3))
    assert_close(layer(x), expected, dtype=jnp.bfloat16)
    theirs = FLAX(3, dtype=jnp.bfloat16, use_running_average=True, rngs=nnx.Rngs(0))
    theirs.mean[...] = jnp.full(3, mean)
    assert np.abs(np.float64(theirs(x)) - expected).max() > 0.5


def test_the_cumulative_average_keeps_a_count():
    layer = OURS(3, momentum=None, rngs=nnx.Rngs(0))
    expected = bn.init_batch_stats(3, use_count=True)
    for x in standard_normal(12, (4, 8, 3)) + 5:
        layer(x)
        _, expected = define_batch_norm({}, expected, x, momentum=None)
    stats = {name: getattr(layer, name)[...] for name in ("mean", "var", "count")}
    assert_close(stats, expected)
    assert not hasattr(OURS(3, rngs=nnx.Rngs(0)), "count")


def test_the_mean_of_complex_input_stays_complex():
    x = standard_normal(13, (16, 3), jnp.complex64) + (2 - 3j)
    layer = OURS(3, momentum=0.5, rngs=nnx.Rngs(0))
    y, stats = define_batch_norm(bn.init_params(3), bn.init_batch_stats(3), x, momentum=0.5)
    assert_close(layer(x), y, dtype=jnp.complex64)
    assert_close({"mean": layer.mean[...], "var": layer.var[...]}, stats)
    layer.eval()
    expected = define_affine(x, stats["mean"], stats["var"], np.ones(3), np.zeros(3))
    assert_close(layer(x), expected, dtype=jnp.complex64)


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.float64])
def test_double_precision_dtypes_agree_with_flax(x_dtype, param_dtype, dtype):
    with jax.enable_x64(True):
        x = standard_normal(14, (16, 3), x_dtype)
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        ours, flax = OURS(3, **options), FLAX(3, **options)
        # In training Flax's warns that it casts statistics of float64 to float32.
        evaluated = flax(x, use_running_average=True)
        assert_close(ours(x, use_running_average=True), evaluated, dtype=evaluated.dtype)
        found = ours(x)
        truth, stats = define_batch_norm(bn.init_params(3), bn.init_batch_stats(3), x)
        precise = x_dtype == found.dtype == jnp.float64
        assert_close(found, truth, dtype=evaluated.dtype, tolerance=1e-12 if precise else 2e-6)
        assert_close({"mean": ours.mean[...], "var": ours.var[...]}, stats, dtype=jnp.float32)


def test_the_input_is_not_rounded_to_dtype_first():
    x = standard_normal(10, (64, 3)) + 1000
    layer = OURS(3, dtype=jnp.bfloat16, momentum=0.0, rngs=nnx.Rngs(0))
    expected, stats = define_batch_norm(bn.init_params(3), bn.init_batch_stats(3), x, momentum=0.0)
    assert_close(layer(x), expected, dtype=jnp.bfloat16)
    assert_close({"mean": layer.mean[...], "var": layer.var[...]}, stats)


def test_train_and_eval_switch_it():
    x, layer = standard_normal(4, (6, 3)), OURS(3, rngs=nnx.Rngs(0))
    layer.train()
    params, stats = bn.init_params(3), bn.init_batch_stats(3)
    y, expected_stats = define_batch_norm(params, stats, x)
    assert_close(layer(x), y)
    assert_close({"mean": layer.mean[...], "var": layer.var[...]}, expected_stats)
    layer.eval()
    assert_close(layer(x), define_affine(x, *expected_stats.values(), *params.values()))
    assert_close(layer(x, use_running_average=False), y)
    viewed = nnx.view(layer, use_running_average=False)
    assert_close(viewed(x), y)


def test_jit_and_grad_update_the_statistics():
    x, layer = standard_normal(5, (6, 3)), OURS(3, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(layer, x):
        return nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 3))(layer, x)

    gradients = step(layer, x)
    assert set(nnx.to_pure_dict(gradients)) == {"scale", "bias"}
    _, expected = define_batch_norm(bn.init_params(3), bn.init_batch_stats(3), x)
    assert_close({"mean": layer.mean[...], "var": layer.var[...]}, expected)


def test_synchronized_is_flattened():
    x = standard_normal(6, (4, 5, 3))
    layer = OURS(3, axis_name="data", rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def train(state, x):
        layer = nnx.merge(graph, state)
        return layer(x), layer.mean[...]

    y, mean = jax.pmap(train, axis_name="data", in_axes=(None, 0))(state, x)
    expected, stats = define_batch_norm(bn.init_params(3), bn.init_batch_stats(3), x.reshape(20, 3))
    assert_close((y.reshape(20, 3), mean[0]), (expected, stats["mean"]))


def test_new_arguments_reach_the_core():
    x = standard_normal(7, (8, 3))
    options = dict(virtual_batch_size=4, running_var_ddof=1, activation=jax.nn.silu)
    layer = OURS(3, **options, rngs=nnx.Rngs(0))
    expected = bn.batch_norm(
        bn.init_params(3), bn.init_batch_stats(3), x,
        use_running_average=False, residual=x, **options,
    )  # fmt: skip
    y = layer(x, residual=x)
    chex.assert_trees_all_equal((y, {"mean": layer.mean[...], "var": layer.var[...]}), expected)


def test_a_promote_dtype_of_ones_own_is_called():
    def to_half(values, *, dtype):
        return tuple(None if v is None else v.astype(jnp.float16) for v in values)

    x = standard_normal(8, (8, 3)) + 1000
    layer = OURS(3, promote_dtype=to_half, rngs=nnx.Rngs(0))
    expected, _ = define_batch_norm(
        bn.init_params(3), bn.init_batch_stats(3), x.astype(jnp.float16)
    )
    assert_close(layer(x), expected, dtype=jnp.float16)


def test_errors():
    layer = OURS(3, use_running_average=None, rngs=nnx.Rngs(0))
    x = standard_normal(9, (6, 3))
    message = r"use_running_average is None .* the BatchNorm of 3 features.* model.eval\(\)"
    with pytest.raises(ValueError, match=message):
        layer(x)
    with pytest.raises(ValueError, match=r"features of shape \(4,\) on axis=-1"):
        OURS(3, rngs=nnx.Rngs(0))(standard_normal(9, (6, 4)))
    with pytest.raises(NameError, match="axis_name='data' is not bound"):
        jax.vmap(OURS(3, axis_name="data", rngs=nnx.Rngs(0)), axis_name="batch")(x[:, None])


def make(kind=OURS, **options):
    return fill(kind(3, rngs=nnx.Rngs(0), **options))


def call(layer, x):
    return layer(x)


def params_of(layer):
    """Copies, which a donation or an update leaves alone."""
    return {"scale": np.array(layer.scale[...]), "bias": np.array(layer.bias[...])}


def stats_of(layer):
    return {"mean": np.array(layer.mean[...]), "var": np.array(layer.var[...])}


def nested_nnx_vmap(layer, x):
    mapped = call
    for name in ("inner", "outer"):
        mapped = nnx.vmap(mapped, in_axes=(None, 0), axis_name=name)
    return nnx.jit(mapped)(layer, x)


def nested_jax_vmap(layer, x):
    graph, state = nnx.split(layer)

    def mapped(state, x):
        layer = nnx.merge(graph, state)
        return layer(x), nnx.state(layer)

    for name in ("inner", "outer"):
        mapped = jax.vmap(mapped, in_axes=(None, 0), out_axes=(0, None), axis_name=name)
    y, state = jax.jit(mapped)(state, x)
    nnx.update(layer, state)
    return y


@pytest.mark.parametrize(
    "mapped",
    [
        pytest.param(nested_nnx_vmap, id="google/flax#4760"),
        pytest.param(nested_jax_vmap, id="dm-haiku#786 #788 #790 equinox#707"),
    ],
)
def test_vmap_inside_vmap_over_named_axes_is_one_batch(mapped):
    x = standard_normal(20, (4, 5, 3))
    layer = make(axis_name=("outer", "inner"), momentum=0.5)
    expected = define_steps(params_of(layer), stats_of(layer), [x.reshape(20, 3)] * 2, momentum=0.5)
    y = [mapped(layer, x).reshape(20, 3) for _ in range(2)]
    assert_close((jnp.stack(y), stats_of(layer)), expected)
    # Statistics that are shared over an axis that is not named have no single new value.
    with pytest.raises(ValueError, match="out_axes is None"):
        mapped(make(axis_name="inner"), x)


def make_ensemble(*shape):
    def create(key):
        return OURS(3, scale_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(key))

    for _ in shape:
        create = nnx.vmap(create)
    return create(jax.random.split(jax.random.key(0), shape))


def test_vmap_inside_vmap_over_layers_is_an_ensemble():
    """google/flax#4760."""
    x = standard_normal(21, (2, 3, 6, 3))
    layers = make_ensemble(2, 3)
    params, stats = params_of(layers), stats_of(layers)
    y = nnx.jit(nnx.vmap(nnx.vmap(call)))(layers, x)
    for member in np.ndindex(2, 3):
        own_params, own_stats, updated = (
            {name: leaf[member] for name, leaf in tree.items()}
            for tree in (params, stats, stats_of(layers))
        )
        assert_close((y[member], updated), define_batch_norm(own_params, own_stats, x[member]))


def test_statistics_of_their_own_under_shared_parameters():
    """google/flax#4760."""
    x = standard_normal(22, (4, 6, 3))
    layer = make()
    params, stats = params_of(layer), stats_of(layer)
    for variable in (layer.mean, layer.var):
        variable.set_value(jnp.stack([variable[...]] * 4))
    axes = nnx.StateAxes({nnx.BatchStat: 0, ...: None})
    y = nnx.jit(nnx.vmap(call, in_axes=(axes, 0)))(layer, x)
    for member in range(4):
        updated = {name: leaf[member] for name, leaf in stats_of(layer).items()}
        assert_close((y[member], updated), define_batch_norm(params, stats, x[member]))


CLOSURES = {
    "nnx.eval_shape google/flax#4734": lambda layer, x: nnx.eval_shape(layer, x),
    "nnx.vmap google/flax#4760": lambda layer, x: nnx.vmap(lambda x: layer(x))(x),
    "nnx.jit": lambda layer, x: nnx.jit(layer)(x),
    "jax.grad": lambda layer, x: jax.jit(jax.grad(lambda x: jnp.sum(layer(x))))(x),
}


@pytest.mark.parametrize("closed", CLOSURES.values(), ids=CLOSURES)
def test_a_layer_that_is_no_argument_of_the_transform(closed):
    x = standard_normal(23, (5, 6, 3))
    layer = make()
    before = stats_of(layer)
    with pytest.raises(TraceContextError, match=r"Pass the model: .*use_running_average=True"):
        closed(layer, x)
    chex.assert_trees_all_equal(stats_of(layer), before)
    found = closed(nnx.view(layer, use_running_average=True), x)
    assert found.shape == x.shape
    with pytest.raises(TraceContextError, match="Cannot mutate BatchStat"):
        closed(make(FLAX), x)


@pytest.mark.parametrize(
    "evaluated",
    [
        lambda x: nnx.eval_shape(call, make(), x),
        lambda x: nnx.eval_shape(call, nnx.eval_shape(lambda: OURS(3, rngs=nnx.Rngs(0))), x),
        lambda x: nnx.eval_shape(lambda x: OURS(3, rngs=nnx.Rngs(0))(x), x),
    ],
    ids=["argument", "abstract argument", "made inside"],
)
def test_eval_shape_in_training(evaluated):
    """google/flax#4734."""
    x = jax.ShapeDtypeStruct((6, 3), jnp.bfloat16)
    assert evaluated(x) == jax.ShapeDtypeStruct((6, 3), jnp.float32)


def test_eval_shape_makes_a_layer_to_restore_into():
    """google/flax#4734."""
    x = standard_normal(24, (6, 3))
    saved = make()
    abstract = nnx.eval_shape(lambda: OURS(3, rngs=nnx.Rngs(0)))
    expected = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stats_of(saved)
    )
    found = {"mean": abstract.mean.get_value(), "var": abstract.var.get_value()}
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    restored = nnx.merge(nnx.graphdef(abstract), nnx.clone(nnx.state(saved)))
    y, updated = define_batch_norm(params_of(saved), stats_of(saved), x)
    assert_close((restored(x), stats_of(restored)), (y, updated))


def scan_the_layer(layer, x):
    def step(layer, x):
        return layer, layer(x)

    return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(layer, x)[1]


def scan_the_statistics(layer, x):
    def step(layer, carry, x):
        return carry, layer(x)

    axes = nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None})
    return nnx.scan(step, in_axes=(axes, nnx.Carry, 0), out_axes=(nnx.Carry, 0))(layer, None, x)[1]


def scan_the_split_layer(layer, x):
    graph, params, state = nnx.split(layer, nnx.Param, ...)

    def step(state, x):
        layer = nnx.merge(graph, params, state)
        y = layer(x)
        return nnx.state(layer, nnx.BatchStat), y

    state, y = jax.lax.scan(step, state, x)
    nnx.update(layer, state)
    return y


@pytest.mark.parametrize("scan", [scan_the_layer, scan_the_statistics, scan_the_split_layer])
def test_scan_carries_the_statistics(scan):
    """google/flax#2052, #3602."""
    x = standard_normal(25, (5, 6, 3))
    layer = make(momentum=0.5)
    expected = define_steps(params_of(layer), stats_of(layer), x, momentum=0.5)
    assert_close((scan(layer, x), stats_of(layer)), expected)
    layer.eval()
    before = stats_of(layer)
    expected = define_affine(x, *before.values(), *params_of(layer).values())
    assert_close(scan(layer, x), expected)
    chex.assert_trees_all_equal(stats_of(layer), before)


def test_scan_inside_vmap_inside_grad():
    """equinox#237."""
    x = standard_normal(26, (4, 2, 3))
    layer = make(axis_name="data", momentum=0.5)
    params, stats = params_of(layer), stats_of(layer)
    mapped = nnx.vmap(scan_the_layer, in_axes=(None, 0), out_axes=1, axis_name="data")

    def loss(layer, x):
        return jnp.sum(jnp.sin(mapped(layer, x)))

    def defined_loss(scale):
        steps = define_steps({**params, "scale": scale}, stats, np.swapaxes(x, 0, 1), momentum=0.5)
        return np.sum(np.sin(steps[0]))

    gradient = nnx.jit(nnx.grad(loss))(layer, x)
    assert_close(gradient["scale"][...], differentiate(defined_loss, params["scale"]))
    expected = define_steps(params, stats, np.swapaxes(x, 0, 1), momentum=0.5)[1]
    assert_close(stats_of(layer), expected)


@pytest.mark.parametrize("rematerialized", [False, True], ids=["plain", "remat pytorch#96136"])
def test_scan_over_layers_updates_each_once(rematerialized):
    x = standard_normal(27, (6, 3))
    layers = make_ensemble(4)
    params, stats = params_of(layers), stats_of(layers)

    def body(x, layer):
        return jnp.sin(layer(x))

    deep = nnx.scan(
        nnx.remat(body) if rematerialized else body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )

    def define(scales):
        y, updated = x, []
        for number, scale in enumerate(scales):
            own = {name: leaf[number] for name, leaf in stats.items()}
            y, own = define_batch_norm({"scale": scale, "bias": np.zeros(3)}, own, y)
            y = np.sin(y)
            updated.append(own)
        return np.sum(y**2), updated

    gradient = nnx.jit(nnx.grad(lambda layers, x: jnp.sum(deep(x, layers) ** 2)))(layers, x)
    assert_close(
        gradient["scale"][...], differentiate(lambda scales: define(scales)[0], params["scale"])
    )
    for number, expected in enumerate(define(params["scale"])[1]):
        assert_close({name: leaf[number] for name, leaf in stats_of(layers).items()}, expected)


@pytest.mark.parametrize("outer", [lambda function: function, nnx.jit], ids=["eager", "jit"])
def test_remat_updates_once(outer):
    """pytorch#96136."""
    x = standard_normal(28, (6, 3))
    layer = make()
    params, stats = params_of(layer), stats_of(layer)
    rematerialized = nnx.remat(lambda layer, x: jnp.sin(layer(x)))
    gradient = outer(nnx.grad(lambda layer, x: jnp.sum(rematerialized(layer, x))))(layer, x)
    assert_close(stats_of(layer), define_batch_norm(params, stats, x)[1])

    def defined_loss(scale):
        return np.sum(np.sin(define_batch_norm({**params, "scale": scale}, stats, x)[0]))

    assert_close(gradient["scale"][...], differentiate(defined_loss, params["scale"]))


@pytest.mark.parametrize("taken", [False, True])
def test_a_branch_updates_only_if_taken(taken):
    x = standard_normal(29, (6, 3))
    layer = make()
    stats = stats_of(layer)
    y, updated = define_batch_norm(params_of(layer), stats, x) if taken else (x, stats)
    found = nnx.cond(taken, call, lambda layer, x: x, layer, x)
    assert_close((found, stats_of(layer)), (y, updated))


def test_shard_map_is_flattened():
    x = standard_normal(30, (8, 3))
    layer = make(axis_name="data")
    expected = define_batch_norm(params_of(layer), stats_of(layer), x)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("data")
    sharded = nnx.shard_map(call, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)
    assert_close((nnx.jit(sharded)(layer, x), stats_of(layer)), expected)


def test_a_donated_layer_is_updated_in_one_compilation():
    x = standard_normal(31, (4, 6, 3))
    layer = make(momentum=0.5)
    donated = layer.mean.get_value()
    expected = define_steps(params_of(layer), stats_of(layer), x, momentum=0.5)
    step = nnx.jit(chex.assert_max_traces(call, n=1), donate_argnums=0)
    y = [step(layer, one) for one in x]
    assert_close((jnp.stack(y), stats_of(layer)), expected)
    assert donated.is_deleted()


def test_an_empty_batch_changes_nothing():
    """pytorch#74944."""
    ours, flax = make(), make(FLAX)
    before = stats_of(ours)
    assert ours(jnp.zeros((0, 3))).shape == (0, 3)
    chex.assert_trees_all_equal(stats_of(ours), before)
    flax(jnp.zeros((0, 3)))
    assert np.isnan(stats_of(flax)["mean"]).all()


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
    layer = make(momentum=0.5, **({} if in_call else modes))
    x = standard_normal(80, (8, 3)) + 2
    params, stats = params_of(layer), stats_of(layer)
    y, updated = define_batch_norm(params, stats, x, momentum=0.5)
    if use:
        y = define_affine(x, *stats.values(), *params.values())
    updates = (not use) if update is None else update
    assert_close(layer(x, **(modes if in_call else {})), y)
    assert_close(stats_of(layer), updated if updates else stats)
    if not updates:
        # Nothing is written, so that the layer need be no argument of a transform.
        assert_close(jax.jit(lambda x: layer(x, **(modes if in_call else {})))(x), y)


@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"use_bias": False}])
def test_parameters_that_do_not_train(options):
    x = standard_normal(81, (8, 3))
    trains, fixed = (outcome(make(train_params=one, **options), x) for one in (True, False))
    assert_close(fixed[1:], trains[1:])
    assert all(np.abs(leaf).max() > 0.01 for leaf in trains[0].values())
    chex.assert_trees_all_equal(fixed[0], jax.tree.map(jnp.zeros_like, trains[0]))


def test_frozen_whatever_is_said():
    x = standard_normal(82, (8, 3))
    layer = make(frozen=True, update_running_average=True)
    stats = stats_of(layer)
    y = define_affine(x, *stats.values(), *params_of(layer).values())
    layer.train()
    assert_close(layer(x), y)
    assert_close(layer(x, use_running_average=False, update_running_average=True), y)
    assert_close(make(frozen=True, use_running_average=None)(x), y)
    chex.assert_trees_all_equal(stats_of(layer), stats)


def test_a_view_has_switches_of_its_own():
    layer = make(update_running_average=False)
    view = bn.nnx.freeze(nnx.view(layer))
    assert (view.frozen, view.train_params, view.update_running_average) == (True, False, False)
    assert (layer.frozen, layer.train_params, layer.update_running_average) == (False, True, False)
    assert nnx.view(view, use_running_average=True).frozen
    assert view.mean is layer.mean


# --- freezing by path, and migration ----------------------------------------------------------


class Tree(nnx.Module):
    """Norms wherever a module can hold them, one of them in two places, and a cycle."""

    def __init__(self, kind, rngs):
        def norm():
            return kind(3, momentum=0.5, rngs=rngs)

        self.stem = norm()
        self.blocks = nnx.List([norm(), nnx.Dict(norm=norm(), again=self.stem)])
        self.chain = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), norm())
        self.pair = nnx.data((norm(), {"inner": norm()}))
        self.whole = self

    def __call__(self, x):
        for layer in (self.stem, self.blocks[0], self.blocks[1]["norm"], self.chain, self.pair[0]):
            x = jnp.sin(layer(x)) + 1
        return self.pair[1]["inner"](self.stem(x))


NORMS = {
    "stem": lambda tree: tree.stem,
    "blocks/0": lambda tree: tree.blocks[0],
    "blocks/1/norm": lambda tree: tree.blocks[1]["norm"],
    "chain/layers/1": lambda tree: tree.chain.layers[1],
    "pair/0": lambda tree: tree.pair[0],
    "pair/1/inner": lambda tree: tree.pair[1]["inner"],
}


def frozen_of(tree):
    return {path for path, find in NORMS.items() if find(tree).frozen}


@pytest.mark.parametrize(
    "patterns,expected",
    [
        ([], set(NORMS)),
        (["blocks"], {"stem", "blocks/0", "blocks/1/norm"}),
        (["blocks/1/again"], {"stem"}),
        (["chain/*", "pair/1"], {"chain/layers/1", "pair/1/inner"}),
        (["*/0", "stem"], {"blocks/0", "pair/0", "stem"}),
    ],
)
def test_freezing_by_path(patterns, expected):
    tree = Tree(OURS, nnx.Rngs(0))
    assert bn.nnx.freeze(tree, *patterns) is tree
    assert frozen_of(tree) == expected
    assert all(find(tree).train_params == (path not in expected) for path, find in NORMS.items())
    tree.eval()
    tree.train()
    assert frozen_of(nnx.merge(*nnx.split(tree))) == frozen_of(nnx.clone(tree)) == expected
    del tree.whole
    assert frozen_of(nnx.view(tree, use_running_average=False)) == expected
    kept = expected - {"stem"}
    if "stem" in expected:
        assert bn.nnx.unfreeze(tree, "s?em") is tree
        assert frozen_of(tree) == kept
        assert tree.stem.train_params
    bn.nnx.freeze(tree, train_params=True)
    assert frozen_of(tree) == set(NORMS)
    assert all(find(tree).train_params for find in NORMS.values())


def test_a_frozen_layer_is_not_what_was_compiled_before():
    x = standard_normal(83, (8, 3))
    model = nnx.Sequential(make(), make(momentum=0.5))
    step = nnx.jit(call)
    step(model, x)
    bn.nnx.freeze(model, "layers/0").train()
    params, stats = params_of(model.layers[0]), stats_of(model.layers[0])
    inner = define_affine(x, *stats.values(), *params.values())
    expected = define_batch_norm(
        params_of(model.layers[1]), stats_of(model.layers[1]), inner, momentum=0.5
    )
    y = step(model, x)
    assert_close((y, stats_of(model.layers[1])), expected)
    chex.assert_trees_all_equal(stats_of(model.layers[0]), stats)


def test_what_cannot_be_frozen():
    tree = Tree(OURS, nnx.Rngs(0))
    for change in (bn.nnx.freeze, bn.nnx.unfreeze):
        message = (
            r"matches 'steam'; those there are have the paths \['blocks/0', 'blocks/1/again', "
        )
        with pytest.raises(ValueError, match=message):
            change(tree, "stem", "steam")
    assert frozen_of(tree) == set()
    with pytest.raises(TypeError, match=r"'layers/0' is a flax.*replace_norms\(model\) first"):
        bn.nnx.freeze(nnx.Sequential(make(FLAX)))


# Every layer that is replaced, with its first argument and what is given beside it.
REPLACED = {
    FLAX: ((3,), {"momentum": 0.5}),
    nnx.LayerNorm: ((3,), {}),
    nnx.RMSNorm: ((3,), {}),
    nnx.GroupNorm: ((3,), {"num_groups": 1}),
    nnx.InstanceNorm: ((3,), {}),
}


def test_every_layer_of_flax_with_a_namesake_here_is_replaced():
    named = [name for name in vars(bn.nnx) if name.endswith("Norm")]
    namesakes = {getattr(nnx, name) for name in named if hasattr(nnx, name)}
    assert set(REPLACED) == namesakes


@pytest.mark.parametrize("kind", REPLACED, ids=lambda kind: kind.__name__)
def test_a_replaced_norm_is_ours(kind):
    sizes, options = REPLACED[kind]
    ours = getattr(bn.nnx, kind.__name__)
    made, replaced, theirs = (
        fill(one(*sizes, **options, rngs=nnx.Rngs(0))) for one in (ours, kind, kind)
    )
    step, x = nnx.jit(call), 1e4 + standard_normal(84, (4, 4, 3))
    before = step(replaced, x)
    nnx.update(replaced, nnx.clone(nnx.state(made)))
    variables = {name: getattr(replaced, name) for name in nnx.state(replaced)}
    assert bn.nnx.replace_norms(replaced) is replaced
    assert type(replaced) is ours
    assert all(getattr(replaced, name) is one for name, one in variables.items())
    # One graph, and so what is compiled for the one is for the other.
    assert nnx.graphdef(replaced) == nnx.graphdef(made) != nnx.graphdef(theirs)
    assert_close(step(replaced, x), step(made, x))
    assert_close(nnx.to_pure_dict(nnx.state(replaced)), nnx.to_pure_dict(nnx.state(made)))
    # The mean square alone does not cancel.
    assert (jnp.abs(before - step(made, x)).max() > 0.01) == (kind is not nnx.RMSNorm)


class Derived(FLAX):
    """A user's own."""


def test_replacing_in_a_model():
    x = standard_normal(85, (8, 3)) + 1
    tree, theirs = Tree(FLAX, nnx.Rngs(0)), Tree(FLAX, nnx.Rngs(0))
    optimizer, expected = (
        nnx.Optimizer(one, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param) for one in (tree, theirs)
    )
    tree.own = Derived(3, rngs=nnx.Rngs(0))
    assert bn.nnx.replace_norms(tree) is tree
    assert {type(find(tree)) for find in NORMS.values()} == {OURS}
    assert tree.blocks[1]["again"] is tree.stem
    assert type(tree.own) is Derived
    del tree.own

    @nnx.jit
    def step(model, optimizer):
        gradient = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
        optimizer.update(model, gradient)

    step(tree, optimizer)
    step(theirs, expected)
    assert_close(nnx.to_pure_dict(nnx.state(tree)), nnx.to_pure_dict(nnx.state(theirs)))


# --- bridges ----------------------------------------------------------------------------------


class FromLinen:
    """Our Linen layer as an NNX module."""

    def __init__(self, x):
        layer = bn.linen.BatchNorm(momentum=0.5)
        self.layer = bridge.lazy_init(
            bridge.ToNNX(layer, rngs=nnx.Rngs(0)), x, use_running_average=True
        )

    def train(self, x):
        return self.layer(x, use_running_average=False, mutable=["batch_stats"])

    def evaluate(self, x):
        return self.layer(x, use_running_average=True)

    def stats(self):
        return stats_of(self.layer)


class ToLinen:
    """Our NNX layer as a Linen module."""

    def __init__(self, x):
        self.layer = bridge.to_linen(OURS, 3, momentum=0.5)
        self.variables = self.layer.init(jax.random.key(0), x, use_running_average=True)

    def train(self, x):
        y, updates = self.layer.apply(self.variables, x, mutable=["batch_stats"])
        self.variables = {**self.variables, **updates}
        return y

    def evaluate(self, x):
        return self.layer.apply(self.variables, x, use_running_average=True)

    def stats(self):
        return self.variables["batch_stats"]


@pytest.mark.parametrize("kind", [FromLinen, ToLinen])
def test_bridges_keep_the_statistics(kind):
    xs = standard_normal(86, (2, 8, 3)) + 1
    layer = kind(xs[0])
    chex.assert_trees_all_equal(dict(layer.stats()), dict(bn.init_batch_stats(3)))
    expected, stats = define_steps(bn.init_params(3), bn.init_batch_stats(3), xs, momentum=0.5)
    assert_close(jnp.stack([layer.train(x) for x in xs]), expected)
    assert_close(dict(layer.stats()), stats)
    y = define_affine(xs[0], stats["mean"], stats["var"], np.ones(3), np.zeros(3))
    assert_close(layer.evaluate(xs[0]), y)
    assert_close(dict(layer.stats()), stats)


# --- a state that is measured -------------------------------------------------------------------


def to_be_measured(layer):
    layer.measured = nnx.BatchStat(start_measuring(stats_of(layer))["measured"])
    return layer


def call_twice(layer, x):
    return jnp.concatenate([layer(half) for half in jnp.split(x, 2)])


def scan_halves(layer, x):
    return scan_the_layer(layer, jnp.stack(jnp.split(x, 2))).reshape(x.shape)


@pytest.mark.parametrize("use_running_average", [True, False])
@pytest.mark.parametrize("way", [nnx.jit(call), call_twice, scan_halves])
def test_a_layer_that_measures(way, use_running_average):
    x = standard_normal(60, (8, 3)) * 2 + 1
    layer = to_be_measured(make(use_running_average=use_running_average))
    params, stats = params_of(layer), stats_of(layer)
    y = way(layer, x)
    calls = 2 if way in (call_twice, scan_halves) else 1
    expected = [*define_moments(x), np.zeros(3), np.full(3, calls * use_running_average)]
    assert_close(list(layer.measured.get_value()[:5]), expected)
    chex.assert_trees_all_equal(stats_of(layer), stats)
    if use_running_average:
        assert_close(y, define_affine(x, *stats.values(), *params.values()))


def test_an_ensemble_measures():
    x = standard_normal(61, (4, 6, 3))
    layers = to_be_measured(make_ensemble(4))
    layers.eval()
    nnx.vmap(call)(layers, x)
    for number in range(4):
        own = [leaf[number] for leaf in layers.measured.get_value()[:3]]
        assert_close(own, list(define_moments(x[number])))


def test_which_calls_measure_nothing():
    layer, x = to_be_measured(make()), standard_normal(62, (4, 3))
    before = nnx.to_pure_dict(nnx.state(layer))
    layer(x, update_running_average=False)
    layer.eval()
    layer(x, update_running_average=False)
    bn.nnx.freeze(layer).train()
    layer(x)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(layer)), before)
