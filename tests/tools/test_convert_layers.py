"""Layers that look alike, or that other libraries store in several forms."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.convert_cases import CASES, abstract, arrays_of, assert_same
from golden.make_convert import images, sequences
from support import assert_close, standard_normal

import bn_jax as bn

ATTENTION = ["attention packed", "attention packed, no bias", "attention of three sizes"]


def shapes_of(arrays):
    return {key: jax.ShapeDtypeStruct(array.shape, array.dtype) for key, array in arrays.items()}


# --- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_pytorch_computes_the_same(name):
    case, arrays = CASES[name], arrays_of(name)
    inputs = sequences(case["sizes"])
    model = nn.MultiHeadDotProductAttention(
        2, qkv_features=8, use_bias="in_proj_bias" in arrays, out_features=8
    )
    variables = bn.convert.from_library(arrays, "pytorch", like=abstract(model, *inputs))
    y = jax.jit(model.apply)(variables, *inputs)
    assert_close(y, np.array(case["y"]))
    for like in (arrays, shapes_of(arrays)):
        back = bn.convert.to_library(variables, "pytorch", like=like)
        assert_same(back, arrays)
        assert list(back) == list(arrays)


@pytest.mark.parametrize("name", ["", "self_attn"])
def test_attention_of_nnx_is_packed_under_any_name(name):
    arrays = arrays_of("attention packed")
    if name:
        arrays = {f"block.{name}.{key}": array for key, array in arrays.items()}
    x = sequences((8, 8, 8))[0]
    attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    model = nnx.Dict(attention=attention) if name else attention
    options = {"names": {"attention": f"block.{name}"}} if name else {}
    nnx.update(model, bn.convert.from_library(arrays, "pytorch", like=model, **options))
    # The same weights as Linen, whose outputs are PyTorch's.
    linen = nn.MultiHeadDotProductAttention(2)
    like = abstract(linen, x)
    expected = linen.apply(
        bn.convert.from_library(arrays_of("attention packed"), "pytorch", like=like), x
    )
    assert_close(attention(x), expected)
    state = nnx.state(model, nnx.Param)
    for variables in (model, state):
        assert_same(bn.convert.to_library(variables, "pytorch", like=arrays, **options), arrays)


def as_matrix(kernel, inputs):
    """The weight of a linear layer of PyTorch, by definition."""
    return kernel.reshape(int(np.prod(kernel.shape[:inputs])), -1).T


@pytest.mark.parametrize("use_bias", [True, False])
def test_attention_without_packed_arrays_is_four_linear_layers(use_bias):
    x = jnp.ones((2, 5, 8))
    model = nn.MultiHeadDotProductAttention(2, qkv_features=6, use_bias=use_bias)
    variables = {"params": {"mha": model.init(jax.random.key(0), x)["params"]}}
    variables = jax.tree.map(lambda leaf: standard_normal(leaf.size, leaf.shape), variables)
    names = {"mha": "attention", "mha/out": "attention.output"}
    arrays = bn.convert.to_library(variables, "pytorch", names=names)
    expected = {}
    for name, leaves in variables["params"]["mha"].items():
        layer = {"out": "output"}.get(name, name)
        inputs = 2 if name == "out" else 1
        expected[f"attention.{layer}.weight"] = as_matrix(leaves["kernel"], inputs)
        if use_bias:
            expected[f"attention.{layer}.bias"] = leaves["bias"].reshape(-1)
    assert_same(dict(sorted(arrays.items())), dict(sorted(expected.items())))
    like = jax.eval_shape(lambda: variables)
    assert_same(
        bn.convert.from_library(arrays, "pytorch", like=like, names=names),
        jax.tree.map(np.asarray, variables),
    )
    # Keras keeps the axes of heads.
    there = bn.convert.to_library(variables, "keras", names=names)
    assert_same(there["attention/query/kernel"], variables["params"]["mha"]["query"]["kernel"])
    # A linear layer of Haiku's attention has them merged, with inputs first.
    structs = {
        "params": {
            name: {"w": np.zeros(as_matrix(leaves["kernel"], 2 if name == "out" else 1).T.shape)}
            | ({"b": np.zeros(leaves["bias"].size)} if use_bias else {})
            for name, leaves in variables["params"]["mha"].items()
        },
        "state": {},
    }
    there = bn.convert.to_library(variables["params"]["mha"], "haiku", like=structs)
    assert_same(there["params"]["query"]["w"], expected["attention.query.weight"].T)


def test_one_error_names_the_parts_of_packed_arrays():
    arrays = arrays_of("attention packed")
    arrays["in_proj_weight"] = arrays["in_proj_weight"][:21]
    like = abstract(nn.MultiHeadDotProductAttention(2), jnp.ones((1, 3, 8)))
    message = r"in_proj_weight\[key\] \(7, 8\), expected \(8, 8\) for params/key/kernel"
    with pytest.raises(ValueError, match=message):
        bn.convert.from_library(arrays, "pytorch", like=like)
    arrays["in_proj_weight"] = arrays["in_proj_weight"][:20]
    message = r"missing(.|\n)*in_proj_weight\[key\] \(8, 8\)(.|\n)*unknown.*\n  in_proj_weight \(20"
    with pytest.raises(ValueError, match=message):
        bn.convert.from_library(arrays, "pytorch", like=like)


# --- DenseGeneral -------------------------------------------------------------------------------

DENSE = {
    # attributes, and the shape of one example
    "one to two": (dict(features=(2, 3)), (4,)),
    "two to one": (dict(features=4, axis=(-2, -1)), (2, 3)),
    "two to two": (dict(features=(5, 2), axis=(-2, -1)), (2, 3)),
    "three to one": (dict(features=4, axis=(-3, -2, -1)), (2, 3, 2)),
}


class Project(nn.Module):
    """One `DenseGeneral`."""

    layer: str
    attributes: dict

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral(**self.attributes, name=self.layer)(x)


def dense(name, layer, use_bias):
    """A `DenseGeneral`, its input, drawn variables, and its weight in PyTorch by definition."""
    attributes, shape = DENSE[name]
    model = Project(layer, attributes | {"use_bias": use_bias})
    x = np.asarray(standard_normal(3, (2, *shape)))
    like = abstract(model, x)
    variables = jax.tree.map(lambda leaf: np.asarray(standard_normal(leaf.size, leaf.shape)), like)
    (leaves,) = variables["params"].values()
    return model, x, variables, as_matrix(leaves["kernel"], len(shape))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("layer", ["DenseGeneral_0", "project"])
@pytest.mark.parametrize("name", DENSE)
def test_a_dense_general_is_a_linear_layer(name, layer, use_bias):
    model, x, variables, weight = dense(name, layer, use_bias)
    arrays = {f"{layer}.weight": weight}
    (leaves,) = variables["params"].values()
    if use_bias:
        arrays[f"{layer}.bias"] = leaves["bias"].reshape(-1)
    shown_by_bias = use_bias and leaves["bias"].ndim > 1
    known = layer == "DenseGeneral_0" or shown_by_bias
    like = jax.eval_shape(lambda: variables)
    if leaves["kernel"].ndim > 3 and not known:
        with pytest.raises(ValueError, match=r"of another shape"):
            bn.convert.from_library(arrays, "pytorch", like=like)
        return
    for transposed in (None, ()):
        options = {"like": like, "transposed": transposed}
        here = bn.convert.from_library(arrays, "pytorch", **options)
        assert_same(here, variables)
    expected = x.reshape(2, -1) @ weight.T + arrays.get(f"{layer}.bias", 0)
    assert_close(model.apply(here, x).reshape(2, -1), expected)
    assert_same(bn.convert.to_library(variables, "pytorch", like=arrays), arrays)
    if shown_by_bias or (known and use_bias):
        assert_same(bn.convert.to_library(variables, "pytorch"), arrays)
    else:
        message = "like is missing: nothing else tells which axes" if known else "pass like= too"
        with pytest.raises(ValueError, match=message):
            bn.convert.to_library(variables, "pytorch")


def test_a_linear_general_of_nnx_knows_its_axes():
    model = nnx.Dict(
        a=nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), use_bias=False, rngs=nnx.Rngs(0)),
        b=nnx.Conv(2, 4, (3,), rngs=nnx.Rngs(0)),
    )
    arrays = bn.convert.to_library(model, "pytorch")
    assert_same(arrays["a.weight"], np.asarray(as_matrix(model.a.kernel.get_value(), 2)))
    assert arrays["b.weight"].shape == (4, 2, 3)


def test_batched_axes_have_no_linear_layer():
    model = nn.DenseGeneral((3, 2), axis=-1, batch_dims=(0,))
    variables = {"params": {"a": model.init(jax.random.key(0), jnp.ones((2, 5, 4)))["params"]}}
    with pytest.raises(ValueError, match=r"which axes of params/a/kernel .* are its inputs"):
        bn.convert.to_library(variables, "pytorch")


# --- transposed convolutions --------------------------------------------------------------------


def layer_of(inputs, outputs, name="up"):
    kernel = np.arange(3.0 * 2 * inputs * outputs).reshape(3, 2, inputs, outputs)
    return {"params": {name: {"kernel": kernel, "bias": np.zeros(outputs)}}}


# The kernel of a transposed convolution in each library, by definition of its layout.
TURNED = {
    "pytorch": lambda kernel: kernel[::-1, ::-1].transpose(2, 3, 0, 1),
    "keras": lambda kernel: kernel[::-1, ::-1].transpose(0, 1, 3, 2),
    "haiku": lambda kernel: kernel.transpose(0, 1, 3, 2),
}
PLAIN = {
    "pytorch": lambda kernel: kernel.transpose(3, 2, 0, 1),
    "keras": lambda kernel: kernel,
    "haiku": lambda kernel: kernel,
}
KEYS = {
    "pytorch": ("up.weight", "up.bias"),
    "keras": ("up/kernel", "up/bias"),
    "haiku": ("params/up/w", "params/up/b"),
}


def arrays_like(library, kernel, bias):
    return dict(zip(KEYS[library], (kernel, bias), strict=True))


@pytest.mark.parametrize("library", TURNED)
def test_a_forgotten_transposed_convolution_is_asked_about(library):
    like = layer_of(4, 4)
    kernel, bias = like["params"]["up"]["kernel"], like["params"]["up"]["bias"]
    for layouts, advice in ((TURNED, ["up"]), (PLAIN, ())):
        arrays = arrays_like(library, layouts[library](kernel), bias)
        for call in (
            functools.partial(bn.convert.from_library, arrays, library, like=like),
            functools.partial(bn.convert.to_library, like, library, like=arrays),
        ):
            with pytest.raises(ValueError, match=r"tells whether up are Conv or ConvTranspose"):
                call()
        here = bn.convert.from_library(arrays, library, like=like, transposed=advice)
        assert_same(here, like)


@pytest.mark.parametrize("library", TURNED)
def test_a_forgotten_transposed_convolution_is_noticed_from_shapes(library):
    like = layer_of(4, 5)
    kernel, bias = like["params"]["up"]["kernel"], like["params"]["up"]["bias"]
    turned = arrays_like(library, TURNED[library](kernel), bias)
    with pytest.raises(ValueError) as raised:
        bn.convert.from_library(turned, library, like=like)
    advice = re.search(r"for params/up/kernel, or transposed=(\['up'\])\n", str(raised.value))
    assert advice
    here = bn.convert.from_library(turned, library, like=like, transposed=["up"])
    assert_same(here, like)
    plain = arrays_like(library, PLAIN[library](kernel), bias)
    assert_same(bn.convert.from_library(plain, library, like=like), like)


def test_what_is_known_is_not_asked_about():
    arrays = bn.convert.to_library(layer_of(4, 4, "Conv_0"), "pytorch")
    assert arrays["Conv_0.weight"].shape == (4, 4, 3, 2)
    model = nnx.Dict(up=nnx.ConvTranspose(4, 4, (3, 2), rngs=nnx.Rngs(0)))
    assert len(bn.convert.to_library(model, "pytorch")) == 2
    with pytest.raises(ValueError, match="tells whether up are Conv"):
        bn.convert.to_library(nnx.state(model), "pytorch")
    # Equinox lays out both alike.
    arrays = {"up.weight": np.ones((4, 4, 3, 2)), "up.bias": np.ones((4, 1, 1))}
    assert bn.convert.from_library(arrays, "equinox", like=layer_of(4, 4))
    # Without the library's arrays no shape tells.
    with pytest.raises(ValueError, match=r"tells whether up are .* DenseGeneral, pass like= too"):
        bn.convert.to_library(layer_of(4, 5), "pytorch")


def test_names_of_others_are_asked_about_beside_default_names():
    both = {"params": layer_of(4, 4)["params"] | layer_of(4, 4, "ConvTranspose_0")["params"]}
    message = r"transposed=\['ConvTranspose_0'\], without .* Add those of up that are ConvTranspose"
    with pytest.raises(ValueError, match=message):
        bn.convert.to_library(both, "pytorch")


# --- Keras --------------------------------------------------------------------------------------


class KerasLayers(nn.Module):
    """The model of the golden file in Linen."""

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, padding="VALID")
        x = conv(6, (3, 2), feature_group_count=3, use_bias=False, name="depthwise")(x)
        x = conv(6, (1, 1), name="pointwise")(x)
        x = nn.PReLU(name="prelu")(x)
        x = nn.RMSNorm(epsilon=1e-3, name="root_mean_square")(x)
        return nn.LayerNorm(use_bias=False, epsilon=1e-3, name="norm")(x)


def test_layers_of_keras_compute_the_same():
    arrays, x = arrays_of("keras layers"), images(2, 5)
    model = KerasLayers()
    names = {"": "net"} | {part: f"net/separable/{part}" for part in ("depthwise", "pointwise")}
    options = {"names": names, "transposed": ()}
    like = abstract(model, x)
    variables = bn.convert.from_library(arrays, "keras", like=like, **options)
    assert_close(jax.jit(model.apply)(variables, x), np.array(CASES["keras layers"]["y"]))
    for shapes in (arrays, shapes_of(arrays)):
        back = bn.convert.to_library(variables, "keras", like=shapes, **options)
        assert_same(back, arrays)
        assert list(back) == list(arrays)


@pytest.mark.parametrize("path, key", [("RMSNorm_0", "scale"), ("rms", "scale"), ("norm", "gamma")])
def test_names_tell_the_root_mean_square_norm_of_keras(path, key):
    variables = {"params": {path: {"scale": np.full(5, 2.0)}}}
    arrays = bn.convert.to_library(variables, "keras")
    assert list(arrays) == [f"{path}/{key}"]
    assert_same(bn.convert.from_library(arrays, "keras", like=variables), variables)
    # The arrays of the library decide, whatever the name.
    for other in ("scale", "gamma"):
        arrays = {f"{path}/{other}": np.full(5, 2.0)}
        assert_same(bn.convert.from_library(arrays, "keras", like=variables), variables)
        assert_same(bn.convert.to_library(variables, "keras", like=arrays), arrays)
    # A norm with a bias has its scale in gamma.
    variables["params"][path]["bias"] = np.zeros(5)
    assert f"{path}/gamma" in bn.convert.to_library(variables, "keras")


@pytest.mark.parametrize(
    "library, key, shape, flax_shape",
    [
        ("pytorch", "prelu.weight", (1,), ()),
        ("pytorch", "prelu.weight", (3,), (3,)),
        ("keras", "prelu/alpha", (1, 1, 1), ()),
        ("keras", "prelu/alpha", (1, 1, 3), (3,)),
        ("equinox", "prelu.negative_slope", (), ()),
    ],
)
def test_the_slope_of_a_prelu(library, key, shape, flax_shape):
    variables = {"params": {"prelu": {"negative_slope": np.full(flax_shape, 0.3)}}}
    arrays = {key: np.full(shape, 0.3)}
    assert_same(bn.convert.from_library(arrays, library, like=variables), variables)
    assert_same(bn.convert.to_library(variables, library, like=arrays), arrays)
    if library == "pytorch":
        assert_same(bn.convert.to_library(variables, library), arrays)


def test_a_slope_for_each_position_has_no_counterpart():
    variables = {"params": {"prelu": {"negative_slope": np.array(0.3)}}}
    with pytest.raises(ValueError, match=r"prelu/alpha \(2, 2, 3\), expected \(1,\)"):
        bn.convert.from_library({"prelu/alpha": np.ones((2, 2, 3))}, "keras", like=variables)
