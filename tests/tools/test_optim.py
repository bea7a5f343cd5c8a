import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.core.meta import unbox
from flax.training import train_state
from flax.traverse_util import unflatten_dict
from support import assert_close, far_from_initial

import bn_jax as bn

LINEN_NORMS = (
    nn.BatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm,
)
NNX_NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)


def boxed(kind, **options):
    """A norm whose scale is in an `nn.Partitioned`."""
    return kind(scale_init=nn.with_partitioning(nn.initializers.ones, (None,)), **options)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.LayerNorm(name="second")(nn.Dense(4, name="first")(x)), None


class Conditional(nn.Module):
    """Layers that are called scale and bias."""

    @nn.compact
    def __call__(self, x):
        return x * nn.Dense(4, name="scale")(x) + nn.Dense(4, name="bias")(x)


class Scaled(nn.Module):
    """A dense layer with a scale."""

    @nn.compact
    def __call__(self, x):
        parameters = {"kernel": (4, 4), "scale": (1, 1, 4), "bias": (1, 1, 4)}
        kernel, scale, bias = (
            self.param(name, nn.with_partitioning(nn.initializers.ones, (None,)), shape)
            for name, shape in parameters.items()
        )
        return x @ kernel * scale + bias


class Net(nn.Module):
    """Every norm of Flax, under names that do not say so, beside layers that look like norms."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 4)(tokens)
        x = nn.BatchNorm(use_running_average=False, name="a")(x)
        x = bn.linen.BatchNorm(use_running_average=False, use_bias=False, name="b")(x)
        x = nn.LayerNorm(name="c")(nn.Conv(4, (1,))(x))
        x = nn.RMSNorm(name="d")(x)
        x = nn.GroupNorm(num_groups=2, name="e")(x)
        x = boxed(nn.InstanceNorm, name="f")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, normalize_qk=True)(x)
        x = nn.WeightNorm(nn.Dense(4, name="length"))(x)
        x = nn.SpectralNorm(nn.Dense(4, name="bounded"))(x, update_stats=True)
        x = Scaled()(Conditional()(x))
        x = x * self.param("scale", nn.initializers.ones, (1, 1, 4))
        lifted = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Layer, length=3, **lifted)(name="scanned")(x, None)
        members = nn.vmap(nn.LayerNorm, in_axes=None, axis_size=2, **lifted)
        return members(name="members")(x)


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.second = nnx.LayerNorm(4, rngs=rngs)


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.layers = nnx.List(
            [
                nnx.Linear(4, 4, rngs=rngs),
                nnx.BatchNorm(4, rngs=rngs),
                bn.nnx.BatchNorm(4, use_bias=False, rngs=rngs),
                nnx.LayerNorm(4, rngs=rngs),
                nnx.RMSNorm(4, rngs=rngs),
                nnx.GroupNorm(4, num_groups=2, rngs=rngs),
                nnx.InstanceNorm(4, rngs=rngs),
            ]
        )
        self.attention = nnx.MultiHeadAttention(2, 4, 4, normalize_qk=True, decode=False, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(4))
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(NNXBlock))(rngs)


TOKENS = jnp.arange(10).reshape(2, 5) % 5


@functools.cache
def linen_net():
    """Variables far from their initial values, and the paths of the norms."""
    norms = set()

    def note(call, arguments, keywords, context):
        if isinstance(context.module, LINEN_NORMS):
            norms.add("/".join(context.module.path))
        return call(*arguments, **keywords)

    with nn.intercept_methods(note):
        variables = jax.jit(Net().init)(jax.random.key(0), TOKENS)
    norms.discard("")  # The path of a module inside a lifted transform.
    return far_from_initial(variables), norms


def nnx_net():
    model = NNXNet()
    nnx.update(model, far_from_initial(nnx.state(model, nnx.Param)))
    norms = {
        "/".join(map(str, path))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, NNX_NORMS)
    }
    return model, norms


def flat(tree):
    """Leaves by their path, without their boxes."""
    leaves = jax.tree.leaves_with_path(tree)
    parts = ((jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves)
    return {path.removesuffix("/value"): leaf for path, leaf in parts}


def parent(path):
    return path.rpartition("/")[0]


def linen_params(form):
    params = linen_net()[0]["params"]
    return {"boxed": lambda tree: tree, "plain": unbox, "frozen": freeze}[form](params)


def nnx_params(form):
    model, _ = nnx_net()
    state = nnx.state(model, nnx.Param)
    return {"state": lambda tree: tree, "pure": nnx.to_pure_dict}[form](state)


TREES = {
    **{form: (linen_params, linen_net) for form in ("boxed", "plain", "frozen")},
    **{form: (nnx_params, nnx_net) for form in ("state", "pure")},
}


@pytest.mark.parametrize("form", TREES)
def test_norms_are_recognized_by_structure(form):
    make, net = TREES[form]
    params, (_, norms) = make(form), net()
    assert len(norms) == (10 if net is linen_net else 9)
    values, mask = flat(params), flat(bn.optim.norm_params_mask(params))
    assert mask == {path: parent(path) in norms for path in values}
    decays = flat(bn.optim.no_weight_decay_mask(params))
    assert decays == {
        path: parent(path) not in norms and not path.endswith("bias") for path in values
    }
    others = {path for path, decayed in decays.items() if decayed}
    assert "scale" in others and any(path.endswith("embedding") for path in others)
    if net is linen_net:
        assert "WeightNorm_0/length/kernel/scale" in others
        assert "Conditional_0/scale/kernel" in others
        assert "Scaled_0/scale" in others


@pytest.mark.parametrize("form", ["boxed", "plain", "frozen", "pure"])
def test_a_mask_has_the_structure_of_the_parameters(form):
    params = TREES[form][0](form)
    for mask in (bn.optim.norm_params_mask(params), bn.optim.no_weight_decay_mask(params)):
        assert jax.tree.structure(mask) == jax.tree.structure(params)
        assert {type(leaf) for leaf in jax.tree.leaves(mask)} == {bool}


def test_a_norm_at_the_top():
    x = jnp.ones((4, 3))
    for layer in (nn.LayerNorm(), bn.linen.BatchNorm(use_running_average=False)):
        params = layer.init(jax.random.key(0), x)["params"]
        assert bn.optim.norm_params_mask(params) == {"scale": True, "bias": True}
        assert bn.optim.no_weight_decay_mask(params) == {"scale": False, "bias": False}
    state = nnx.state(bn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Param)
    assert flat(bn.optim.norm_params_mask(state)) == {"scale": True, "bias": True}


def test_parameters_without_norms():
    params = nn.Dense(3).init(jax.random.key(0), jnp.ones((4, 3)))["params"]
    no_norm = pytest.warns(UserWarning, match=r"params hold no norm: none of its 2 .*'bias', 'k")
    with no_norm:
        assert bn.optim.norm_params_mask(params) == {"kernel": False, "bias": False}
    with no_norm:
        assert bn.optim.no_weight_decay_mask(params) == {"kernel": True, "bias": False}
    for mask in (bn.optim.norm_params_mask, bn.optim.no_weight_decay_mask):
        assert mask({}) == {}
        # Optax has taken out the norms.
        mask({"dense": params, "norm": optax.MaskedNode()})
    with pytest.warns(
        UserWarning, match=r"none of its 5 parameters, '0', '1', '2', '3', \.\.\., is "
    ):
        assert bn.optim.no_weight_decay_mask(5 * [jnp.ones(3)]) == 5 * [True]
    with pytest.warns(UserWarning, match="none of its 1 parameters"):
        assert bn.optim.no_weight_decay_mask(jnp.ones(3)) is True
    # There is a norm, though without parameters.
    stats = {"norm": bn.init_batch_stats(3)}
    assert not any(jax.tree.leaves(bn.optim.norm_params_mask({"dense": params}, stats)))


def test_the_warning_points_at_the_call():
    with pytest.warns(UserWarning) as warned:
        bn.optim.norm_params_mask([jnp.ones(3)])
        bn.optim.no_weight_decay_mask([jnp.ones(3)])
    assert [one.filename for one in warned] == 2 * [__file__]


class Shifted(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("a", "input_norm"):
            x = bn.linen.BatchNorm(use_running_average=False, use_scale=False, name=name)(x)
        return x + self.param("bias", nn.initializers.zeros, (1, 3))


def test_a_bias_alone_belongs_to_a_norm_by_its_statistics_or_name():
    variables = Shifted().init(jax.random.key(0), jnp.ones((4, 3)))
    params, batch_stats = variables["params"], variables["batch_stats"]

    def expected(by_structure):
        return {"a": {"bias": by_structure}, "input_norm": {"bias": True}, "bias": False}

    assert bn.optim.norm_params_mask(params) == expected(False)
    assert bn.optim.norm_params_mask(params, batch_stats) == expected(True)
    assert not any(jax.tree.leaves(bn.optim.no_weight_decay_mask(params)))
    # At the top there is no name.
    params, batch_stats = params["a"], batch_stats["a"]
    with pytest.warns(UserWarning, match="no norm"):
        assert bn.optim.norm_params_mask(params) == {"bias": False}
    assert bn.optim.norm_params_mask(params, batch_stats) == {"bias": True}
    model = nnx.Dict(a=bn.nnx.BatchNorm(3, use_scale=False, rngs=nnx.Rngs(0)))
    params, batch_stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    with pytest.warns(UserWarning, match="no norm"):
        assert flat(bn.optim.norm_params_mask(params)) == {"a/bias": False}
    assert flat(bn.optim.norm_params_mask(params, batch_stats)) == {"a/bias": True}


# --- other libraries --------------------------------------------------------------------------


def haiku_net(x):
    """Every norm of Haiku, under names that do not say so, beside layers that look like norms."""
    hk = pytest.importorskip("haiku")
    norms = [
        hk.BatchNorm(True, True, 0.9, name="a"),
        hk.BatchNorm(False, True, 0.9, name="b"),
        hk.LayerNorm(-1, True, True, name="c"),
        hk.LayerNorm(-1, True, False, name="d"),
        hk.RMSNorm(-1, name="e"),
        hk.GroupNorm(1, name="f"),
        hk.InstanceNorm(True, True, name="g"),
    ]
    for norm in norms:
        x = hk.Linear(4, name=f"{norm.name}_linear")(x)
        options = {"is_training": True} if isinstance(norm, hk.BatchNorm) else {}
        x = norm(x, **options)
    x = hk.Bias(name="shift")(hk.Conv1D(4, 1, name="conv", data_format="NCW")(x))
    x = hk.Conv2DTranspose(4, 1, name="block", with_bias=False)(x[None])[0]
    x = x * hk.get_parameter("scale", (1, 1, 4), init=jnp.ones)
    return hk.LSTM(4)(x[0], hk.LSTM(4).initial_state(4))[0]


def test_norms_of_haiku():
    hk = pytest.importorskip("haiku")
    model = hk.transform_with_state(haiku_net)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((4, 4, 4)))
    norms = {path for path in params if path in tuple("abcdefg")}
    assert len(norms) == 7 and params["conv"]["b"].shape == (4, 1)
    values = {(path, name) for path, node in params.items() for name in node}
    mask, decays = bn.optim.norm_params_mask(params), bn.optim.no_weight_decay_mask(params)
    assert mask == {p: dict.fromkeys(node, p in norms) for p, node in params.items()}
    decaying = {(path, name) for path, name in values if decays[path][name]}
    assert decaying == {(path, name) for path, name in values if name[0] == "w"} | {("~", "scale")}
    assert sum(name == "b" for _, name in values) == 10


def shaped(**shapes):
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


# What `equinox.filter(layer, equinox.is_inexact_array)` holds, of Equinox 0.13.8.
EQUINOX_NORMS = {
    "layer": shaped(weight=(3,), bias=(3,)),
    "image": shaped(weight=(3, 4, 4), bias=(3, 4, 4)),
    "stacked": shaped(weight=(5, 3), bias=(5, 3)),
    "rms": shaped(weight=(3,)),
    "image_norm": shaped(weight=(3, 4, 4)),
}
EQUINOX_OTHERS = {
    "square": shaped(weight=(3, 3), bias=(3,)),
    "of_scalar": shaped(weight=(3, 1), bias=(3,)),
    "to_scalar": shaped(weight=(1, 3), bias=(1,)),
    "scalar": shaped(weight=(1, 1), bias=(1,)),
    "stacked_linear": shaped(weight=(5, 3, 3), bias=(5, 3)),
    "without_bias": shaped(weight=(3, 3)),
    "conv": shaped(weight=(3, 3, 1), bias=(3, 1)),
    "gru": shaped(weight_ih=(9, 3), weight_hh=(9, 3), bias=(9,), bias_n=(3,)),
    "weight_norm": {"layer": shaped(weight=(3, 3), bias=(3,)), "g": jnp.ones((3, 1))},
    "prelu": {"negative_slope": jnp.ones(())},
}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["shape"]
)
@dataclasses.dataclass
class Attributes:
    """A layer whose parameters are attributes, as in Equinox."""

    weight: Any
    bias: Any = None
    shape: Any = None


def as_attributes(node):
    if isinstance(node, dict) and "weight" in node and set(node) <= {"weight", "bias"}:
        return Attributes(**node)
    return {k: as_attributes(v) for k, v in node.items()} if isinstance(node, dict) else node


@pytest.mark.parametrize("form", ["attributes", "mappings", "PyTorch's keys"])
def test_norms_of_equinox_and_pytorch(form):
    tree = {"norms": EQUINOX_NORMS, "others": EQUINOX_OTHERS}
    if form == "attributes":
        tree = as_attributes(tree)
        assert isinstance(tree["norms"]["layer"], Attributes)
    if form == "PyTorch's keys":
        tree = {path.replace("/", "."): leaf for path, leaf in flat(tree).items()}
    mask, decays = (
        {path.replace(".", "/"): value for path, value in flat(mask(tree)).items()}
        for mask in (bn.optim.norm_params_mask, bn.optim.no_weight_decay_mask)
    )
    assert mask == {path: path.startswith("norms") for path in mask}
    expected = {p: not p.startswith("norms") and not p.endswith(("bias", "bias_n")) for p in decays}
    assert decays == expected and sum(expected.values()) == 12


def test_leaves_that_are_no_arrays_are_no_parameters():
    tree = {"layer": {"weight": jnp.ones(3), "bias": jnp.ones(3), "axis_name": "batch"}}
    mask = {"layer": {"weight": True, "bias": True, "axis_name": False}}
    assert bn.optim.norm_params_mask(tree) == mask


# The paths of `model.weights`, of Keras 3.15.1.
KERAS = shaped(
    **{
        "net/conv2d/kernel": (3, 3, 3, 3),
        "net/conv2d/bias": (3,),
        "net/batch_normalization/gamma": (3,),
        "net/batch_normalization/beta": (3,),
        "net/batch_normalization/moving_mean": (3,),
        "net/batch_normalization/moving_variance": (3,),
        "net/without_scale/beta": (3,),
        "net/without_scale/moving_mean": (3,),
        "net/without_scale/moving_variance": (3,),
        "net/layer_normalization/gamma": (3,),
        "net/rms_normalization/scale": (3,),
        "net/group_normalization/gamma": (3,),
        "net/group_normalization/beta": (3,),
        "net/separable_conv2d/depthwise_kernel": (3, 3, 3, 1),
        "net/separable_conv2d/pointwise_kernel": (1, 1, 3, 3),
        "net/separable_conv2d/bias": (3,),
        "net/p_re_lu/alpha": (4, 4, 3),
    }
)


@pytest.mark.parametrize("form", ["paths", "nested"])
def test_norms_of_keras(form):
    tree = KERAS if form == "paths" else unflatten_dict(KERAS, sep="/")
    mask, decays = flat(bn.optim.norm_params_mask(tree)), flat(bn.optim.no_weight_decay_mask(tree))
    assert mask == {path: path.endswith(("gamma", "beta", "scale")) for path in KERAS}
    assert decays == {path: path.endswith(("kernel", "alpha")) for path in KERAS}


# --- steps of Optax ---------------------------------------------------------------------------


def linen_step(optimizer, gradient=1.0):
    """The paths of norms, and the parameters before and after a step on equal gradients."""
    variables, norms = linen_net()
    state = train_state.TrainState.create(apply_fn=None, params=variables["params"], tx=optimizer)
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), state.params)
    after = jax.jit(lambda state: state.apply_gradients(grads=gradients))(state)
    return norms, flat(state.params), flat(after.params)


def nnx_step(optimizer, gradient=1.0):
    model, norms = nnx_net()
    before = flat(jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    holder = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(model, holder):
        gradients = nnx.grad(
            lambda model: sum(
                gradient * jnp.sum(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))
            )
        )(model)
        holder.update(model, gradients)

    step(model, holder)
    return norms, before, flat(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


STEPS = pytest.mark.parametrize("step", [linen_step, nnx_step])


@STEPS
@pytest.mark.parametrize(
    "make",
    [
        lambda mask: optax.adamw(0.1, weight_decay=0.5, mask=mask),
        lambda mask: optax.chain(optax.add_decayed_weights(0.5, mask), optax.sgd(0.1)),
    ],
    ids=["adamw", "add_decayed_weights"],
)
def test_norms_and_biases_do_not_decay(step, make):
    norms, before, after = step(make(bn.optim.no_weight_decay_mask), gradient=0.0)
    for path, old in before.items():
        if parent(path) in norms or path.endswith("bias"):
            np.testing.assert_array_equal(after[path], old, err_msg=path)
        else:
            assert_close(after[path], 0.95 * np.asarray(old, np.float64))
            assert not np.array_equal(after[path], old)


@STEPS
def test_norms_are_frozen(step):
    optimizer = optax.chain(
        optax.adamw(0.1, weight_decay=0.5),
        optax.masked(optax.set_to_zero(), bn.optim.norm_params_mask),
    )
    norms, before, after = step(optimizer)
    for path, old in before.items():
        if parent(path) in norms:
            np.testing.assert_array_equal(after[path], old, err_msg=path)
        else:
            assert np.all(after[path] != old), path


def labels(params):
    mask = bn.optim.norm_params_mask(params)
    return jax.tree.map(lambda is_norm: "norms" if is_norm else "rest", mask)


@STEPS
def test_norms_can_have_another_learning_rate(step):
    # The inner mask sees only the rest: norms are replaced by optax.MaskedNode.
    rest = optax.chain(
        optax.add_decayed_weights(0.5, bn.optim.no_weight_decay_mask), optax.sgd(0.1)
    )
    optimizer = optax.partition({"norms": optax.sgd(0.25), "rest": rest}, labels)
    norms, before, after = step(optimizer)
    for path, old in before.items():
        old = np.asarray(old, np.float64)
        if parent(path) in norms:
            expected = old - 0.25
        else:
            expected = old - 0.1 * (1 + (0 if path.endswith("bias") else 0.5) * old)
        assert_close(after[path], expected, tolerance=1e-6)


@STEPS
def test_a_mask_made_beforehand(step):
    params = {
        linen_step: linen_net()[0]["params"],
        nnx_step: nnx.state(nnx_net()[0], nnx.Param),
    }[step]
    mask = bn.optim.norm_params_mask(params)
    norms, before, after = step(optax.masked(optax.set_to_zero(), mask))
    for path, old in before.items():
        expected = old if parent(path) in norms else old + 1
        np.testing.assert_array_equal(after[path], expected, err_msg=path)
