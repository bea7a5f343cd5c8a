import functools
import io
import json
import pickle
import re
import sys
import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from golden.convert_cases import CASES, abstract, arrays_of, assert_same
from golden.make_convert import CONV, GROUPED, UP, drawn, images
from support import assert_close, standard_normal

import bn_jax as bn
from bn_jax.convert.arrays import flatten
from bn_jax.lab import models

GOLDEN = Path(__file__).parents[1] / "golden"
NETS = [name for name in CASES if name.split()[-1].isdigit()]
EPSILON = {"keras": 1e-3}
NAMES = {"keras": {"": "net"}}


class Net(nn.Module):
    """The model of the golden file in Linen."""

    rank: int
    library: str = "pytorch"
    transpose_kernel: bool = False

    @nn.compact
    def __call__(self, x):
        rank, epsilon = self.rank, EPSILON.get(self.library, 1e-5)
        conv = functools.partial(nn.Conv, padding="VALID")
        x = conv(4, CONV[:rank], name="conv")(x)
        x = bn.linen.BatchNorm(use_running_average=True, epsilon=epsilon, name="norm")(x)
        x = conv(8, GROUPED[:rank], feature_group_count=4, name="grouped")(nn.relu(x))
        x = nn.ConvTranspose(
            *(5, UP[:rank], (2,) * rank, "VALID"),
            transpose_kernel=self.transpose_kernel,
            name="up",
        )(x)
        return nn.Dense(2, name="dense")(nn.relu(x).reshape(len(x), -1, 5).mean(1))


class NNXNet(nnx.Module):
    """The same model in NNX, for images."""

    def __init__(self, rngs):
        conv = functools.partial(nnx.Conv, padding="VALID", rngs=rngs)
        self.conv = conv(3, 4, CONV[:2])
        self.norm = bn.nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.grouped = conv(4, 8, GROUPED[:2], feature_group_count=4)
        self.up = nnx.ConvTranspose(8, 5, UP[:2], (2, 2), padding="VALID", rngs=rngs)
        self.dense = nnx.Linear(5, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.up(self.grouped(nnx.relu(self.norm(self.conv(x))))))
        return self.dense(self.dropout(x.reshape(len(x), -1, 5).mean(1)))


@functools.cache
def nnx_net():
    return NNXNet(nnx.Rngs(0))


@pytest.mark.parametrize(
    "name, transpose_kernel",
    # With transpose_kernel=True Flax reverses a kernel, which Equinox cannot.
    [(name, flag) for name in NETS for flag in (False, True) if not (flag and "equinox" in name)],
)
def test_every_layer_computes_the_same(name, transpose_kernel):
    library, rank = name.split()
    arrays, x = arrays_of(name), images(int(rank), 6)
    model = Net(int(rank), library, transpose_kernel)
    like = abstract(model, x)
    options = {"names": NAMES.get(library), "transposed": () if transpose_kernel else ("u*",)}
    variables = bn.convert.from_library(arrays, library, like=like, **options)
    assert_close(jax.jit(model.apply)(variables, x), np.array(CASES[name]["y"]))
    back = bn.convert.to_library(variables, library, like=arrays, **options)
    assert_same(back, arrays)
    assert list(back) == list(arrays)


@pytest.mark.parametrize("name", ["ResNet18", "ResNet50"])
def test_resnets_of_torchvision(name):
    arrays, x = arrays_of(name), images(2, 64)
    model = getattr(models, name)(10, padding="symmetric")
    like = abstract(model, x, train=False)
    names = bn.convert.resnet_names
    variables = bn.convert.from_library(arrays, "pytorch", like=like, names=names)
    logits = np.array(CASES[name]["y"])
    y = jax.jit(functools.partial(model.apply, train=False))(variables, x)
    assert_close(y / abs(logits).max(), logits / abs(logits).max())
    assert_same(bn.convert.to_library(variables, "pytorch", names=names, like=arrays), arrays)
    alone = bn.convert.to_library(variables, "pytorch", names=names)
    assert alone["bn1.num_batches_tracked"].dtype == np.int64
    zeroed = {k: np.zeros_like(a) if "batches" in k else a for k, a in arrays.items()}
    assert_same({key: alone[key] for key in arrays}, zeroed)
    assert len(alone) == len(arrays)


def haiku_net(rank, x, is_training):
    """The same model as `Net`, made of Haiku's modules."""
    hk = pytest.importorskip("haiku")
    conv = functools.partial(getattr(hk, f"Conv{rank}D"), padding="VALID")
    x = conv(4, CONV[:rank], name="conv")(x)
    x = hk.BatchNorm(True, True, 0.9, name="norm")(x, is_training)
    x = getattr(hk, f"DepthwiseConv{rank}D")(2, GROUPED[:rank], padding="VALID", name="grouped")(
        jax.nn.relu(x)
    )
    up = getattr(hk, f"Conv{rank}DTranspose")
    x = jax.nn.relu(up(5, UP[:rank], 2, padding="VALID", name="up")(x))
    return hk.Linear(2, name="dense")(x.reshape(len(x), -1, 5).mean(1))


def haiku_model(rank):
    """A model of Haiku as a function, images, and its arrays."""
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform_with_state(functools.partial(haiku_net, rank)))
    x = jnp.asarray(images(rank, 6))
    params, state = jax.eval_shape(lambda: model.init(jax.random.key(0), x, True))
    arrays = jax.tree.map_with_path(
        lambda path, leaf: jnp.asarray(drawn(str(path), leaf.shape, str(leaf.dtype))),
        {"params": params, "state": state},
    )
    return jax.jit(model.apply, static_argnums=3), x, arrays


@pytest.mark.parametrize("rank", [1, 3])
def test_haiku_there_and_back(rank):
    theirs, x, arrays = haiku_model(rank)
    model = Net(rank)
    options = {"transposed": ["up"]}
    variables = bn.convert.from_library(arrays, "haiku", like=abstract(model, x), **options)
    y, _ = theirs(arrays["params"], arrays["state"], x, False)
    assert_close(jax.jit(model.apply)(variables, x), y)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(variables))
    assert_same(bn.convert.to_library(variables, "haiku", like=arrays, **options), arrays)


def test_statistics_changed_in_flax_continue_in_haiku():
    theirs, x, arrays = haiku_model(1)
    variables = bn.convert.from_library(arrays, "haiku", like=abstract(Net(1), x), transposed="u*")
    changed = variables | {
        "batch_stats": jax.tree.map(lambda leaf: leaf + 1, variables["batch_stats"])
    }
    shapes = jax.eval_shape(lambda: arrays)
    for like in (arrays, shapes):
        back = bn.convert.to_library(changed, "haiku", like=like, transposed=["up"])
        y, _ = theirs(back["params"], back["state"], x, False)
        assert_close(jax.jit(Net(1).apply)(changed, x), y)
        _, state = theirs(back["params"], back["state"], x, True)
        _, old = theirs(arrays["params"], arrays["state"], x, True)
        batch = (
            old["norm/~/mean_ema"]["hidden"] - 0.9 * arrays["state"]["norm/~/mean_ema"]["hidden"]
        ) / 0.1
        expected = 0.9 * changed["batch_stats"]["norm"]["mean"] + 0.1 * batch.reshape(-1)
        assert_close(state["norm/~/mean_ema"]["average"].reshape(-1), expected)


@pytest.mark.parametrize("library, divisor", [("equinox", True), ("equinox-ema", False)])
def test_statistics_changed_in_flax_continue_in_equinox(library, divisor):
    arrays, x = arrays_of(f"{library} 1"), images(1, 6)
    options = {"transposed": ["up"]}
    variables = bn.convert.from_library(arrays, library, like=abstract(Net(1), x), **options)
    changed = jax.tree.map(lambda leaf: leaf + 1, variables)
    back = bn.convert.to_library(changed, library, like=arrays, **options)
    key = "norm.batch_state_index.0" if divisor else "norm.ema_state_index.0"
    assert_same(back[key], changed["batch_stats"]["norm"]["mean"])
    if divisor:
        assert np.float32(1) - np.float32(0.99) ** back["norm.batch_counter"] == 1
        assert back["norm.batch_counter"].dtype == np.int32
    else:
        assert not back["norm.ema_first_time_index"]
    again = bn.convert.from_library(back, library, like=variables, **options)
    assert_same(again, changed)


def test_averages_of_equinox_before_the_first_step_are_not_divided():
    arrays = arrays_of("equinox 1") | {"norm.batch_counter": np.array(0, np.int32)}
    like = abstract(Net(1), images(1, 6))
    with pytest.warns(UserWarning, match="no training step has updated .* of norm in arrays"):
        variables = bn.convert.from_library(arrays, "equinox", like=like, transposed=["up"])
    assert_same(variables["batch_stats"]["norm"]["var"], arrays["norm.batch_state_index.1"])


@pytest.mark.parametrize("momentum", [0.5, 0.99])
def test_averages_of_equinox_are_divided_as_it_does(momentum):
    arrays = arrays_of("equinox 1")
    like = abstract(Net(1), images(1, 6))
    options = {"transposed": ["up"], "momentum": momentum}
    variables = bn.convert.from_library(arrays, "equinox", like=like, **options)
    divided = np.float64(arrays["norm.batch_state_index.0"])
    divided = divided / (1 - momentum ** float(arrays["norm.batch_counter"]))
    assert_close(variables["batch_stats"]["norm"]["mean"], divided, dtype=np.float32)
    assert_same(bn.convert.to_library(variables, "equinox", like=arrays, **options), arrays)


def norm(*, scale=True, bias=True, stats=True, count=False):
    """Variables of one top-level norm of three features."""
    params = {"scale": standard_normal(0, (3,))} if scale else {}
    params |= {"bias": standard_normal(1, (3,))} if bias else {}
    tree = {"params": params} if params else {}
    if stats:
        tree["batch_stats"] = {"mean": standard_normal(2, (3,)), "var": jnp.ones(3)}
        tree["batch_stats"] |= {"count": jnp.full(3, 5.0)} if count else {}
    return tree


# The keys of scale, bias and statistics of a norm in each library.
NORM_KEYS = {
    "pytorch": ("weight", "bias", "running_mean running_var num_batches_tracked"),
    "keras": ("gamma", "beta", "moving_mean moving_variance"),
    "haiku": (
        "params/{}scale",
        "params/{}offset",
        "state/{0}~/mean_ema/average state/{0}~/var_ema/average state/{0}~/mean_ema/hidden "
        "state/{0}~/var_ema/hidden state/{0}~/mean_ema/counter state/{0}~/var_ema/counter",
    ),
    "equinox": ("weight", "bias", "batch_state_index.0 batch_state_index.1 batch_counter"),
    "equinox-ema": ("weight", "bias", "ema_state_index.0 ema_state_index.1 ema_first_time_index"),
}
SCALARS = ("num_batches_tracked", "counter", "ema_first_time_index")


def norm_structs(library, prefix, wanted):
    """The arrays of a norm of three features in a library, as shapes."""
    shape = (1, 1, 3) if library == "haiku" else (3,)
    keys = " ".join(
        keys for keys, is_wanted in zip(NORM_KEYS[library], wanted, strict=True) if is_wanted
    )
    keys = [key.format(prefix) if "{" in key else prefix + key for key in keys.split()]
    return {
        key: jax.ShapeDtypeStruct(() if key.endswith(SCALARS) else shape, np.float32)
        for key in keys
    }


@pytest.mark.parametrize(
    "wanted",
    [
        (True, True, True),
        (True, False, True),
        (False, True, True),
        (False, False, True),
        (True, True, False),
    ],
)
@pytest.mark.parametrize("library", NORM_KEYS)
def test_a_norm_comes_back_bit_for_bit(library, wanted):
    tree = norm(**dict(zip(("scale", "bias", "stats"), wanted, strict=True)))
    separator = "/" if library in ("haiku", "keras") else "."
    for place in ("", "layer/bn"):
        prefix = place.replace("/", separator) + separator if place else ""
        names = {"": prefix[:-1]} if place else None
        if library == "haiku" and not place:
            continue  # in Haiku every array is in a module
        like = norm_structs(library, prefix, wanted)
        there = bn.convert.to_library(tree, library, names=names, like=like)
        flat = flatten(there)
        assert {key: array.shape for key, array in flat.items()} == {
            key: struct.shape for key, struct in like.items()
        }
        assert_same(bn.convert.from_library(there, library, like=tree, names=names), tree)


def test_a_cumulative_average_keeps_its_count():
    tree = norm(count=True)
    there = bn.convert.to_library(tree, "pytorch", names={"": "bn1"})
    assert there["bn1.num_batches_tracked"].shape == ()
    assert_same(there["bn1.num_batches_tracked"], np.array(5))
    here = bn.convert.from_library(there, "pytorch", like=tree, names={"": "bn1"})
    assert_same(here, tree)
    unlike = {**there, "bn1.num_batches_tracked": np.array(77)}
    assert_same(bn.convert.to_library(tree, "pytorch", names={"": "bn1"}, like=unlike), there)
    tree["batch_stats"]["count"] = jnp.arange(3.0)
    with pytest.raises(ValueError, match=r"batch_stats/count has the counts \[0\.0, 1\.0, 2\.0\]"):
        bn.convert.to_library(tree, "pytorch")


@pytest.mark.parametrize("library", ["keras", "haiku", "equinox"])
def test_no_other_library_counts_batches(library):
    with pytest.raises(ValueError, match=r"batch_stats/count counts the batches .* leave it out"):
        bn.convert.to_library(norm(count=True), library, names={"": "bn"})


def test_norms_without_state_embeddings_and_other_parameters():
    embedding = np.arange(6.0).reshape(3, 2)
    tree = {
        "params": {
            "LayerNorm_0": {"scale": np.ones((5, 6)), "bias": np.zeros((5, 6))},
            "Embed_0": {"embedding": embedding},
            "head": {"tokens": np.ones((2, 3, 4))},
        }
    }
    there = bn.convert.to_library(tree, "pytorch", names={"LayerNorm_0": "ln", "Embed_0": "e"})
    expected = {
        "e.weight": embedding,
        "ln.bias": np.zeros((5, 6)),
        "ln.weight": np.ones((5, 6)),
        "head.tokens": np.ones((2, 3, 4)),
    }
    assert_same(dict(sorted(there.items())), dict(sorted(expected.items())))


def test_the_longest_name_counts():
    tree = {"params": {"a": {"b": {"scale": np.ones(1)}, "bc": {"scale": np.ones(2)}}}}
    for names, expected in (
        ({"": "m"}, ["m.a.b.weight", "m.a.bc.weight"]),
        ({"": "m", "a/b": "x"}, ["x.weight", "m.a.bc.weight"]),
        ({"a": "y", "a/bc": ""}, ["y.b.weight", "weight"]),
        (str.upper, ["A/B.weight", "A/BC.weight"]),
        (None, ["a.b.weight", "a.bc.weight"]),
    ):
        assert list(bn.convert.to_library(tree, "pytorch", names=names)) == expected


def test_a_sequence_of_nnx_has_the_keys_of_a_sequence_of_pytorch():
    model = nnx.eval_shape(
        lambda: nnx.Sequential(
            nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)),
            nnx.relu,
            bn.nnx.BatchNorm(3, use_scale=False, use_bias=False, rngs=nnx.Rngs(0)),
        )
    )
    arrays = {
        "0.weight": np.arange(6.0).reshape(3, 2),
        "2.running_mean": np.zeros(3),
        "2.running_var": np.ones(3),
        "2.num_batches_tracked": np.array(3),
    }
    names = {"layers": ""}
    state = bn.convert.from_library(arrays, "pytorch", like=model, names=names)
    assert_same(state["layers"][0]["kernel"].get_value(), arrays["0.weight"].T)
    assert_same(bn.convert.to_library(state, "pytorch", names=names, like=arrays), arrays)


@pytest.mark.parametrize("form", ["module", "state", "state with rngs", "pure dictionary"])
def test_nnx(form):
    arrays, x = arrays_of("pytorch 2"), images(2, 6)
    model = nnx.clone(nnx_net())
    kept = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    like = {
        "module": model,
        "state": kept,
        "state with rngs": nnx.state(model),
        "pure dictionary": nnx.to_pure_dict(kept),
    }[form]
    options = {"transposed": ["up"]}
    converted = bn.convert.from_library(arrays, "pytorch", like=like, **options)
    assert jax.tree.structure(converted) == jax.tree.structure(
        like if form == "pure dictionary" else kept
    )
    nnx.update(model, jax.device_put(converted))
    y = nnx.jit(lambda model, x: model(x))(model, x)
    assert_close(y, np.array(CASES["pytorch 2"]["y"]))
    assert_same(bn.convert.to_library(converted, "pytorch", like=arrays, **options), arrays)
    assert_same(bn.convert.to_library(model, "pytorch", like=arrays, **options), arrays)
    assert_same(bn.convert.to_library(nnx.state(model), "pytorch", like=arrays, **options), arrays)


def test_frozen_and_boxed_variables_stay_so():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel_init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
            return nn.Dense(3, kernel_init=kernel_init, name="dense")(x)

    like = freeze(Boxed().init(jax.random.key(0), jnp.ones((1, 2))))
    arrays = {"dense.weight": np.arange(6.0).reshape(3, 2), "dense.bias": np.ones(3)}
    variables = bn.convert.from_library(arrays, "pytorch", like=like)
    assert jax.tree.structure(variables) == jax.tree.structure(like)
    kernel = variables["params"]["dense"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert_same(kernel.value, np.arange(6.0).reshape(3, 2).T)
    assert_same(bn.convert.to_library(variables, "pytorch", like=arrays), arrays)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes_stay_unless_asked(dtype):
    tree = norm(count=True)
    arrays = {
        key: np.asarray(value, np.int64 if "tracked" in key else jnp.dtype(dtype))
        for key, value in bn.convert.to_library(tree, "pytorch").items()
    }
    statistics = "float64" if dtype == "float64" else "float32"
    with jax.numpy_dtype_promotion("strict"):
        kept = bn.convert.from_library(arrays, "pytorch", like=tree)
    assert kept["params"]["scale"].dtype == dtype
    mean = arrays["running_mean"].astype(statistics)
    assert_same(kept["batch_stats"]["mean"], mean)
    assert_same(bn.convert.to_library(kept, "pytorch", like=arrays), arrays)
    cast = bn.convert.from_library(arrays, "pytorch", like=tree, dtype=jnp.float32)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(cast)} == {"float32"}
    assert_same(cast["params"]["scale"], arrays["weight"].astype(np.float32))


def test_statistics_are_never_narrower_than_in_flax():
    tree = norm(count=True)
    tree["batch_stats"]["count"] = jnp.full(3, 301.0)  # which bfloat16 lacks
    arrays = bn.convert.to_library(tree, "pytorch")
    half = bn.convert.from_library(arrays, "pytorch", like=tree, dtype=jnp.bfloat16)
    assert_same(half["batch_stats"], tree["batch_stats"])
    assert half["params"]["scale"].dtype == half["params"]["bias"].dtype == jnp.bfloat16
    narrow = tree | {"batch_stats": jax.tree.map(jnp.bfloat16, tree["batch_stats"])}
    half = bn.convert.from_library(arrays, "pytorch", like=narrow, dtype=jnp.bfloat16)
    assert half["batch_stats"]["var"].dtype == jnp.bfloat16


def test_averages_of_equinox_in_half_precision():
    arrays = {
        key: array.astype(jnp.bfloat16) if array.dtype == np.float32 else array
        for key, array in arrays_of("equinox 1").items()
    }
    like = abstract(Net(1), images(1, 6))
    variables = bn.convert.from_library(arrays, "equinox", like=like)
    mean = np.float32(arrays["norm.batch_state_index.0"])
    divided = mean / np.float32(1 - 0.99 ** int(arrays["norm.batch_counter"]))
    assert_same(variables["batch_stats"]["norm"]["mean"], divided)
    assert_same(bn.convert.to_library(variables, "equinox", like=arrays), arrays)


def test_results_share_no_memory_with_the_arguments():
    arrays = {"weight": np.ones((3, 2)), "bias": np.zeros(3)}
    like = {"params": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
    variables = bn.convert.from_library(arrays, "pytorch", like=like)
    back = bn.convert.to_library(variables, "pytorch")
    for array in arrays.values():
        array[...] = 9
    assert variables["params"]["kernel"].max() == 1
    for leaf in jax.tree.leaves(variables):
        assert leaf.flags.c_contiguous
        leaf[...] = 8
    assert back["weight"].max() == 1


def test_one_error_lists_all_disagreements():
    arrays = arrays_of("pytorch 2")
    arrays["norm.wieght"] = arrays.pop("norm.weight")
    arrays["extra"] = np.ones(7)
    arrays["dense.weight"] = np.ones((3, 5), np.float32)
    del arrays["norm.running_var"]
    like = abstract(Net(2), images(2, 6))
    expected = """arrays does not fit the variables of Flax.
missing from arrays, 2 in all:
  norm.running_var (4,) for batch_stats/norm/var
  norm.weight (4,) for params/norm/scale; did you mean norm.wieght?
unknown in arrays, 2 in all:
  norm.wieght (4,)
  extra (7,)
of another shape in arrays, 2 in all:
  dense.weight (3, 5), expected (2, 5) for params/dense/kernel
  up.weight (8, 5, 3, 2), expected (5, 8, 3, 2) for params/up/kernel, or transposed=['up']
Pass names={'path in Flax': 'path in the library'} or a function to say which layer is which, and \
transposed=['path in Flax'] to say which layers are ConvTranspose. Where no name of a layer helps, \
rename or remove the unknown keys of arrays yourself."""
    with pytest.raises(ValueError) as raised:
        bn.convert.from_library(arrays, "pytorch", like=like)
    assert str(raised.value) == expected
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)
    with pytest.raises(ValueError) as raised:
        bn.convert.to_library(variables, "pytorch", like=arrays)
    assert str(raised.value) == re.sub(r"\barrays\b", "like", expected)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_keys_of_a_wrapped_model(prefix):
    arrays = {"dense.weight": np.ones((3, 2)), "dense.bias": np.ones(3)}
    wrapped = {prefix + key: array for key, array in arrays.items()}
    like = {"params": {"dense": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}}
    told = f"Every key of arrays has {prefix!r} in front"
    with pytest.raises(ValueError, match=re.escape(told)):
        bn.convert.from_library(wrapped, "pytorch", like=like)
    with pytest.raises(ValueError, match="Every key of arrays has 'state_dict/' in front"):
        bn.convert.from_library({"state_dict": arrays, "epoch": 3}, "pytorch", like=like)
    # Only one key has it.
    partly = {"dense.weight": arrays["dense.weight"], f"{prefix}dense.bias": arrays["dense.bias"]}
    with pytest.raises(ValueError) as raised:
        bn.convert.from_library(partly, "pytorch", like=like)
    assert "in front" not in str(raised.value)
    # The advice.
    bn.convert.from_library(
        {key.removeprefix(prefix): array for key, array in wrapped.items()}, "pytorch", like=like
    )


def test_a_missing_counter_is_missing():
    arrays = arrays_of("equinox 1")
    del arrays["norm.batch_counter"]
    with pytest.raises(ValueError, match=r"1 in all:\n  norm.batch_counter \(\) for the averages"):
        bn.convert.from_library(
            arrays, "equinox", like=abstract(Net(1), images(1, 6)), transposed=["up"]
        )


def test_the_mode_of_equinox_must_fit():
    arrays = arrays_of("equinox-ema 1")
    like = abstract(Net(1), images(1, 6))
    hint = r"norm.batch_state_index.0 .*; did you mean norm.ema_state_index.0\?"
    with pytest.raises(ValueError, match=hint):
        bn.convert.from_library(arrays, "equinox", like=like, transposed=["up"])


@pytest.mark.parametrize("shape", [(3, 3, 2, 4), (3, 3, 1, 8), (3, 3, 4, 2)])
def test_only_a_depthwise_kernel_of_keras_is_reshaped(shape):
    like = {"params": {"kernel": jnp.ones((3, 3, 1, 8))}}
    arrays = {"kernel": np.arange(72.0).reshape(shape)}
    variables = bn.convert.from_library(arrays, "keras", like=like)
    assert_same(variables["params"]["kernel"], arrays["kernel"].reshape(3, 3, 1, 8))
    with pytest.raises(ValueError, match=r"weight .*, expected \(8, 1, 3, 3\) for params/kernel"):
        bn.convert.from_library({"weight": arrays["kernel"]}, "pytorch", like=like)
    with pytest.raises(ValueError, match=r"kernel \(72,\), expected \(3, 3, 1, 8\)"):
        bn.convert.from_library({"kernel": arrays["kernel"].reshape(-1)}, "keras", like=like)


def net_with_default_names():
    """Variables with the default names of Linen."""
    kernel = standard_normal(0, (3, 2, 4, 4))
    return {
        "params": {
            "Conv_0": {"kernel": kernel},
            "ConvTranspose_0": {"kernel": kernel},
            "a": {"ConvTranspose_12": {"kernel": kernel}},
        }
    }


def test_transposed_convolutions_are_named():
    tree = net_with_default_names()
    kernel = tree["params"]["Conv_0"]["kernel"]
    none = bn.convert.to_library(tree, "pytorch", transposed=())
    assert_same(none["ConvTranspose_0.weight"], none["Conv_0.weight"])
    assert_same(none["Conv_0.weight"], kernel.transpose(3, 2, 0, 1))
    some = bn.convert.to_library(tree, "pytorch", transposed="*ConvTranspose_12")
    assert_same(some["ConvTranspose_0.weight"], none["Conv_0.weight"])
    turned = kernel[::-1, ::-1].transpose(2, 3, 0, 1)
    assert_same(some["a.ConvTranspose_12.weight"], turned)
    like = {key: np.zeros((4, 4, 3, 2)) for key in none}
    alike = bn.convert.to_library(
        tree, "equinox", like=like
    )  # Equinox keeps the order of all kernels
    assert_same(alike, none)


class Decoder(nnx.Module):
    """One layer of each kind, with as many inputs as outputs."""

    def __init__(self, rngs):
        shape = 4, 4, (3, 2)
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.up = nnx.ConvTranspose(*shape, rngs=rngs)
        self.plain = nnx.ConvTranspose(*shape, transpose_kernel=True, rngs=rngs)
        self.layers = nnx.List([nnx.Conv(*shape, rngs=rngs), nnx.ConvTranspose(*shape, rngs=rngs)])


def test_a_glob_of_transposed_convolutions_leaves_linear_layers_alone():
    up, dense = standard_normal(0, (3, 2, 4, 4)), standard_normal(1, (4, 4))
    tree = {"params": {"decoder": {"up": {"kernel": up}, "linear": {"kernel": dense}}}}
    for transposed in ("decoder/*", ["decoder/up"]):
        there = bn.convert.to_library(tree, "pytorch", transposed=transposed)
        assert_same(there["decoder.linear.weight"], dense.T)
        assert_same(there["decoder.up.weight"], up[::-1, ::-1].transpose(2, 3, 0, 1))
        like = jax.eval_shape(lambda: tree)
        here = bn.convert.from_library(there, "pytorch", like=like, transposed=transposed)
        assert_same(here, tree)


def test_a_module_knows_its_transposed_convolutions():
    decoder = Decoder(nnx.Rngs(0))
    globs = ["up", "layers/1"]
    state = nnx.state(decoder)
    expected = bn.convert.to_library(state, "pytorch", transposed=globs)
    unlike = bn.convert.to_library(state, "pytorch", transposed=())
    assert not np.array_equal(unlike["up.weight"], expected["up.weight"])
    assert_same(unlike["plain.weight"], expected["plain.weight"])
    for transposed in (None, (), ["up"]):
        options = {"transposed": transposed}
        assert_same(bn.convert.to_library(decoder, "pytorch", **options), expected)
        here = bn.convert.from_library(expected, "pytorch", like=decoder, **options)
        assert_same(here, state)
    more = bn.convert.to_library(decoder, "pytorch", transposed="plain")
    turned = decoder.plain.kernel.get_value()[::-1, ::-1].transpose(2, 3, 0, 1)
    assert_same(more["plain.weight"], turned)


def test_a_count_of_something_else_and_a_mean_alone_are_plain_parameters():
    tree = {"params": {"a": {"count": np.ones(3)}, "b": {"mean": np.arange(2.0)}}}
    for library in ("pytorch", "keras"):
        there = bn.convert.to_library(tree, library)
        assert_same(next(iter(there.values())), np.ones(3))
        assert len(there) == 2  # a mean alone has no count of batches
        assert_same(bn.convert.from_library(there, library, like=tree), tree)


ERRORS = {
    "library": (
        lambda: bn.convert.to_library(norm(), "torch"),
        "library='torch', expected one of .*'pytorch'",
    ),
    "names": (
        lambda: bn.convert.to_library(
            {"params": {"a": {"bias": np.ones(1)}, "b": {"bias": np.ones(1)}}},
            "pytorch",
            names={"a": "fc", "b": "fc"},
        ),
        "names takes both params/a/bias and params/b/bias to fc.bias, expected a key for each",
    ),
    "names of no layer": (
        lambda: bn.convert.to_library(
            net_with_default_names(), "pytorch", names={"a": "b", "a/Conv": "c"}
        ),
        r"names has \['a/Conv'\], expected paths of layers in Flax or beginnings of them; "
        r"the layers are \['ConvTranspose_0', 'Conv_0', 'a/",
    ),
    "transposed": (
        lambda: bn.convert.to_library(
            {"params": {"up": {"kernel": np.ones((2, 2, 2))}}}, "pytorch", transposed=["ip"]
        ),
        r"transposed has 'ip', expected globs of ConvTranspose .* which are \['up'\]",
    ),
    "transposed of a module around a convolution": (
        lambda: bn.convert.to_library(net_with_default_names(), "pytorch", transposed=["a"]),
        r"transposed has 'a', expected globs of ConvTranspose .* 'a/ConvTranspose_12'\]",
    ),
    "transposed of dense layers": (
        lambda: bn.convert.to_library(
            {"params": {"fc": {"kernel": np.ones((2, 2))}}}, "pytorch", transposed="fc"
        ),
        r"transposed has 'fc', expected globs of ConvTranspose .* which are \[\]",
    ),
    "transposed is not said": (
        lambda: bn.convert.to_library(net_with_default_names(), "pytorch"),
        r"transposed is None, but \['ConvTranspose_0', 'a/ConvTranspose_12'\] are .* pass "
        r"transposed=\['ConvTranspose_0', 'a/ConvTranspose_12'\], without .* transposed=\(\)",
    ),
    "collections": (
        lambda: bn.convert.to_library({"params": {}, "cache": {}}, "pytorch"),
        r"collections \['cache', 'params'\], expected .*: variables\[name\] .* in \['params'\]}",
    ),
    "like": (
        lambda: bn.convert.to_library(norm(), "haiku"),
        "like is missing: shapes of haiku .* Pass the arrays of the library's model",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


class Unreadable:
    """A value that NumPy cannot convert."""

    shape = (3,)

    def __array__(self, dtype=None, copy=None):
        raise TypeError("unsupported ScalarType BFloat16")


class Tensor(Unreadable):
    """Like a tensor of PyTorch in bfloat16 or on another device."""

    __module__ = "torch.nn"


@pytest.mark.parametrize(
    "value, message",
    [
        (
            Tensor(),
            r"weight is a Tensor that NumPy cannot take .*BFloat16.* file: safetensors.*\{k: "
            r"v.contiguous\(\).clone\(\) for k, v in model.state_dict\(\).items\(\)\}, path\), "
            "then load_safetensors",
        ),
        (
            Unreadable(),
            r"weight is a Unreadable that NumPy cannot take \(.*BFloat16\), expected an array$",
        ),
        (None, "weight is a NoneType, expected an array"),
    ],
)
def test_values_that_are_not_arrays_are_named(value, message):
    with pytest.raises(TypeError, match=message):
        bn.convert.from_library(
            {"weight": value}, "pytorch", like={"params": {"scale": np.ones(3)}}
        )


def test_tracers_are_told_from_other_values():
    like = {"params": {"scale": np.ones(3)}}
    message = "weight is traced, expected an array: call bn_jax.convert outside of jit"
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda a: bn.convert.from_library({"weight": a}, "pytorch", like=like))(jnp.ones(3))


def weight_like(dtype, received=np.float32):
    like = {"params": {"scale": np.ones(3)}}
    return bn.convert.from_library(
        {"weight": np.ones(3, received)}, "pytorch", like=like, dtype=dtype
    )


NOT_A_MAPPING = "is a (list|ndarray|tuple), expected a mapping of arrays by their keys: pass "
KINDS = {
    "arrays of pytorch": (
        lambda: bn.convert.from_library([np.ones(3)], "pytorch", like=norm()),
        f"arrays {NOT_A_MAPPING}" + r"model.state_dict\(\)$",
    ),
    "like of keras": (
        lambda: bn.convert.to_library(norm(), "keras", like=[np.ones(3)]),
        f"like {NOT_A_MAPPING}" + r"\{w.path: w.numpy\(\) for w in model.weights\}$",
    ),
    "arrays of haiku": (
        lambda: bn.convert.from_library(({}, {}), "haiku", like=norm()),
        f"arrays {NOT_A_MAPPING}" + r"\{\"params\": params, \"state\": state\}$",
    ),
    "arrays of equinox": (
        lambda: bn.convert.from_library([np.ones(3)], "equinox-ema", like=norm()),
        f"arrays {NOT_A_MAPPING}its leaves by their path, as the docstring of bn_jax.convert",
    ),
    "names": (
        lambda: bn.convert.to_library(norm(), "pytorch", names="bn1"),
        "names is a str, expected a mapping from paths in Flax to paths in the other library",
    ),
    "names has": (
        lambda: bn.convert.to_library(norm(), "pytorch", names={"": None}),
        "names has {'': None}, expected paths in the other library, of type str",
    ),
    "names returns": (
        lambda: bn.convert.to_library(
            net_with_default_names(), "equinox", names={"Conv_0": "c"}.get
        ),
        r"names\('ConvTranspose_0'\) is None, expected a str.*layer.replace\('/', '.'\)",
    ),
    "dtype": (lambda: weight_like(np.int8), "dtype=int8, expected a floating-point or complex one"),
    "complex": (
        lambda: weight_like(jnp.float32, np.complex64),
        "dtype=float32 is real and weight is complex64, expected a complex dtype or None",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_errors_about_kinds(name):
    call, message = KINDS[name]
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    "dtype, received, expected",
    [
        (None, np.complex64, np.complex64),
        (np.complex64, np.float32, np.complex64),
        (jnp.bfloat16, np.int32, np.int32),
        (float, np.float16, np.float64),
    ],
)
def test_dtypes_of_parameters(dtype, received, expected):
    assert weight_like(dtype, received)["params"]["scale"].dtype == expected


TRANSLATED = [
    (
        "pytorch",
        {},
        dict(momentum=0.9, epsilon=1e-5, use_scale=True, use_bias=True, running_var_ddof=1),
    ),
    (
        "pytorch",
        dict(momentum=None, eps=1e-3, affine=False, track_running_stats=False),
        dict(momentum=None, epsilon=1e-3, use_scale=False, use_bias=False, running_var_ddof=1)
        | dict(use_running_average=False, update_running_average=False),
    ),
    (
        "pytorch",
        dict(momentum=0.003, eps=1e-5, affine=True, bias=False),
        dict(momentum=0.997, epsilon=1e-5, use_scale=True, use_bias=False, running_var_ddof=1),
    ),
    (
        "keras",
        {},
        dict(momentum=0.99, epsilon=1e-3, use_scale=True, use_bias=True, running_var_ddof=0),
    ),
    (
        "keras",
        dict(momentum=0.9, epsilon=1e-5, scale=False, center=True),
        dict(momentum=0.9, epsilon=1e-5, use_scale=False, use_bias=True, running_var_ddof=0),
    ),
    (
        "haiku",
        dict(decay_rate=0.9, eps=1e-4, create_scale=True, create_offset=False),
        dict(momentum=0.9, epsilon=1e-4, use_scale=True, use_bias=False, running_var_ddof=0),
    ),
    (
        "equinox",
        dict(mode="batch"),
        dict(momentum=0.99, epsilon=1e-5, use_scale=True, use_bias=True, running_var_ddof=0),
    ),
    (
        "equinox",
        dict(momentum=0.5, eps=1e-5, channelwise_affine=False, mode="batch"),
        dict(momentum=0.5, epsilon=1e-5, use_scale=False, use_bias=False, running_var_ddof=0),
    ),
]


@pytest.mark.parametrize("library, theirs, ours", TRANSLATED)
def test_attributes_there_and_back(library, theirs, ours):
    assert bn.convert.attributes_from_library(library, **theirs) == ours
    back = bn.convert.attributes_to_library(library, **ours)
    assert theirs.items() <= back.items()
    assert bn.convert.attributes_from_library(library, **back) == ours
    assert bn.linen.BatchNorm(**ours).epsilon == ours["epsilon"]
    assert bn.nnx.BatchNorm(3, **ours, rngs=nnx.Rngs(0)).epsilon == ours["epsilon"]


@pytest.mark.parametrize("case", json.loads((GOLDEN / "pytorch.json").read_text())["cases"])
def test_translated_attributes_train_as_pytorch_does(case):
    attributes = bn.convert.attributes_from_library(
        "pytorch", momentum=case["momentum"], eps=case["epsilon"]
    )
    axis = 1 if case["layer"] == "BatchNorm2d" else -1
    layer = bn.linen.BatchNorm(**attributes, axis=axis)
    steps = [jnp.asarray(step["x"], jnp.float32) for step in case["steps"]]
    variables = layer.init(jax.random.key(0), steps[0], use_running_average=True)
    train = functools.partial(layer.apply, use_running_average=False, mutable=["batch_stats"])
    for x in steps:
        _, updates = jax.jit(train)(variables, x)
        variables |= updates
    there = bn.convert.to_library(variables, "pytorch")
    expected = {key: np.array(case["steps"][-1][key]) for key in ("mean", "var")}
    assert_close({key: there[f"running_{key}"] for key in expected}, expected)
    counted = case["num_batches_tracked"] if case["momentum"] is None else 0
    assert there["num_batches_tracked"] == counted


def test_translated_attributes_normalize_as_haiku_does():
    hk = pytest.importorskip("haiku")
    theirs = dict(create_scale=True, create_offset=False, decay_rate=0.9, eps=0.1)
    model = hk.transform_with_state(lambda x, train: hk.BatchNorm(**theirs, name="norm")(x, train))
    x = jnp.asarray(images(1, 6))
    params, state = jax.jit(model.init, static_argnums=2)(None, x, True)
    expected, _ = jax.jit(model.apply, static_argnums=4)(params, state, None, x, True)
    layer = bn.linen.BatchNorm(
        **bn.convert.attributes_from_library("haiku", **theirs), use_running_average=False
    )
    y, _ = layer.apply({"params": {"scale": jnp.ones(3)}}, x, mutable=["batch_stats"])
    assert_close(y, expected)


@pytest.mark.parametrize(
    "library, ours, message",
    [
        ("pytorch", {}, "running_var_ddof=0, expected 1"),
        ("keras", dict(running_var_ddof=1), "running_var_ddof=1, expected 0"),
        ("haiku", dict(momentum=None), "momentum=None, expected a number"),
        ("equinox", dict(use_bias=False), "use_scale=True with use_bias=False, expected both or"),
        ("pytorch", dict(running_var_ddof=1, use_scale=False), "use_bias=True without use_scale"),
        (
            "keras",
            dict(use_running_average=False, update_running_average=False, momentum=None),
            "momentum=None, .*; use_running_average=False with update_running_average=False",
        ),
        (
            "equinox-ema",
            {},
            "equinox-ema's batch norm does not support normalizing by the batch in training",
        ),
        ("keras", dict(axis=1), r"attributes \['axis'\], expected some of \['epsilon', 'momentum'"),
    ],
)
def test_attributes_that_a_library_does_not_support(library, ours, message):
    with pytest.raises(ValueError, match=message):
        bn.convert.attributes_to_library(library, **ours)


@pytest.mark.parametrize(
    "library, theirs, message",
    [
        ("equinox", {}, "mode='legacy', expected 'batch': .*'legacy', the default, .*in training"),
        ("equinox", dict(mode="ema"), "mode='ema', expected 'batch': in its modes 'ema' and"),
        ("equinox-ema", {}, "mode='ema', expected 'batch': .* evaluated here, pass mode='batch'"),
        ("haiku", dict(decay_rate=0.9), r"\['create_scale', 'create_offset'\] are missing"),
        ("keras", dict(renorm=True), r"attributes \['renorm'\], expected some of \['center'"),
    ],
)
def test_attributes_that_bn_jax_does_not_support(library, theirs, message):
    with pytest.raises(ValueError, match=message):
        bn.convert.attributes_from_library(library, **theirs)


def test_safetensors_there_and_back(tmp_path):
    pytest.importorskip("safetensors")
    arrays = {
        "half": standard_normal(0, (2, 3), jnp.bfloat16),
        "turned": np.arange(6.0).reshape(2, 3).T,
        "backwards": np.arange(3)[::-1],
        "scalar": np.array(7, np.int64),
        "none": np.zeros((0, 3), np.float16),
        "flags": np.array([True, False]),
    }
    bn.convert.save_safetensors(tmp_path / "a.safetensors", arrays)
    loaded = bn.convert.load_safetensors(str(tmp_path / "a.safetensors"))
    assert_same(loaded, {key: np.asarray(array) for key, array in arrays.items()})
    assert loaded["half"].dtype == jnp.bfloat16


class Harmful:
    """Runs code when a pickle of it is loaded."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


def zipped(name):
    """A file as `torch.save` writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, pickle.dumps(Harmful()))
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content",
    [
        ("innocent.safetensors", pickle.dumps(Harmful())),
        ("old.safetensors", pickle.dumps(Harmful(), protocol=2)),
        ("new.safetensors", zipped("archive/data.pkl")),
        ("text.pkl", pickle.dumps(Harmful(), protocol=0)),
        *[(f"model{suffix}", b"") for suffix in (".pt", ".pth", ".bin", ".ckpt", ".PKL")],
    ],
)
def test_pickles_are_refused(tmp_path, name, content):
    pytest.importorskip("safetensors")
    path = tmp_path / name
    path.write_bytes(content)
    file = re.escape(str(path))
    fix = rf"import torch, safetensors.torch\n  arrays = torch.load\('{file}', weights_only=True"
    with pytest.raises(ValueError, match=rf"is a pickle, which can run any code(.|\n)*{fix}"):
        bn.convert.load_safetensors(path)


def test_safetensors_that_look_like_a_pickle_are_loaded(tmp_path):
    pytest.importorskip("safetensors")
    for length in range(600, 720, 8):
        path = tmp_path / f"{length}.bin"
        bn.convert.save_safetensors(path, {"k" * (length - 56): np.ones(1, np.float32)})
        assert len(bn.convert.load_safetensors(path)) == 1
        if path.read_bytes()[:2] == b"\x80\x02":
            return
    raise AssertionError("no header of 0x280 bytes")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged, is not safetensors"),
        (lambda path: path.write_bytes(b"{" + path.read_bytes()[1:]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged, is not safetensors"),
        (lambda path: path.write_bytes(zipped("x.npy")), "is damaged, is not safetensors"),
        (lambda path: path.unlink(), "is missing, expected a file"),
        (lambda path: (path.unlink(), path.mkdir()), "is no file, expected a file"),
    ],
)
def test_damaged_and_missing_files(tmp_path, change, message):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    bn.convert.save_safetensors(path, {"x": np.ones(3)})
    change(path)
    with pytest.raises(ValueError, match=rf"model.safetensors {message}"):
        bn.convert.load_safetensors(path)


def test_arrays_that_cannot_be_saved(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=r"arrays\['params'\] is a mapping.*to_library\(variables"):
        bn.convert.save_safetensors(path, norm())
    with pytest.raises(ValueError, match=r"arrays cannot be saved as .*model.safetensors: .*dtype"):
        bn.convert.save_safetensors(path, {"x": np.ones(2, np.complex128)})
    assert not path.exists()


def test_safetensors_is_optional(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (
        bn.convert.load_safetensors,
        functools.partial(bn.convert.save_safetensors, arrays={}),
    ):
        with pytest.raises(ImportError, match=r"pip install 'bn-jax\[convert\]'"):
            call(tmp_path / "model.safetensors")


def test_variables_must_be_a_tree():
    with pytest.raises(TypeError, match="variables are a Net, expected those of Linen"):
        bn.convert.to_library(Net(1), "pytorch")
