"""Folded models compute what they did before, without a norm, with no more work than without."""

import gc
import re
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from support import assert_close, exact, standard_normal

import bn_jax as bn
from bn_jax._fold import FoldReport, kernels
from bn_jax._paths import format_path
from bn_jax.lab import models

pytestmark = pytest.mark.usefixtures("compile_quickly")

ours = partial(bn.linen.BatchNorm, use_running_average=True)
flax = partial(nn.BatchNorm, use_running_average=True)


def randomized(tree, seed=0):
    """Gives variables random values: variances positive, scales of either sign, some of them 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = format_path(path).removesuffix("/value").split("/")[-1]
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        values = rng.standard_normal(leaf.shape)
        if name == "var":
            values = np.exp(values)
        if name == "kernel":
            values = values / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        if name == "scale":
            values.reshape(-1)[::3] = 0
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map_with_path(draw, tree)


def initialized(model, x, **options):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, **options))
    return randomized(shapes)


def error_of(actual, expected):
    """The largest error relative to the largest value."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    actual, expected = exact(actual), exact(expected)
    assert np.isfinite(actual).all() and np.abs(expected).max() > 0
    return np.abs(actual - expected).max() / np.abs(expected).max()


def roots(compiled):
    """How many roots a compiled program holds."""
    return len(re.findall(r"(sqrt|power)\(", compiled.as_text()))


def doubled(x, axis=0):
    """Twice as many examples."""
    return jnp.concatenate([x, 1 - x], axis)


class Case(NamedTuple):
    """A model, and what is to become of its norms: paths of kernels, or texts of reasons."""

    forward: Callable[..., Any]
    variables: Any
    x: Any
    fates: tuple[str, ...]


def sequential(*layers, shape=(2, 6, 6, 4), fates=("layers_0/kernel",), norm=ours):
    model = nn.Sequential([norm() if layer == "norm" else layer for layer in layers])
    x = standard_normal(1, shape)
    return Case(model.apply, initialized(model, x), x, fates)


def dense_transposed():
    """The kernel on the left, features first."""

    def forward(variables, x):
        y = variables["params"]["w"] @ x
        return bn.batch_norm(
            variables["params"]["norm"],
            variables["batch_stats"]["norm"],
            y,
            use_running_average=True,
            axis=0,
        )[0]

    variables = {
        "params": {"w": jnp.ones((5, 4)), "norm": bn.init_params(5)},
        "batch_stats": {"norm": bn.init_batch_stats(5)},
    }
    return Case(forward, randomized(variables), standard_normal(1, (4, 3)), ("w",))


def channels_first():
    def forward(variables, x):
        kernel = variables["params"]["conv"]["kernel"]
        y = lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        y, _ = bn.batch_norm(
            variables["params"]["norm"],
            variables["batch_stats"]["norm"],
            y,
            use_running_average=True,
            axis=1,
        )
        return y

    variables = {
        "params": {"conv": {"kernel": jnp.ones((5, 4, 3, 3))}, "norm": bn.init_params(5)},
        "batch_stats": {"norm": bn.init_batch_stats(5)},
    }
    return Case(forward, randomized(variables), standard_normal(1, (2, 4, 6, 6)), ("conv/kernel",))


def by_hand(inverse_deviation):
    """Another's norm, in a mapping without collections."""

    def forward(variables, x):
        norm = variables["norm"]
        y = x @ variables["kernel"] + variables["bias"][None]
        y = (y - norm["mean"][None]) * inverse_deviation(norm["var"] + 1e-3)[None]
        return jax.nn.relu(y * norm["scale"][None] - norm["bias"][None])

    features = jnp.ones(5)
    norm = dict.fromkeys(("mean", "var", "scale", "bias"), features)
    variables = {"kernel": jnp.ones((4, 5)), "bias": features, "norm": norm}
    return Case(forward, randomized(variables), standard_normal(1, (3, 4)), ("kernel",))


def twice_by_hand():
    """Two norms in a row, the variables of both at the same path."""

    def forward(variables, x):
        for one in ("", "2"):
            mean, var, scale, bias = (variables[f"{name}{one}"][None] for name in names)
            x = (x - mean) * lax.rsqrt(var + 1e-3) * scale + bias
        return jnp.tanh(x)

    names = ("mean", "var", "scale", "bias")
    variables = randomized({f"{name}{one}": jnp.ones(4) for name in names for one in ("", "2")})
    variables = {k: jnp.abs(v) if k.startswith("var") else v for k, v in variables.items()}
    fates = ("its output goes to `sub`", "its output goes to `tanh`")
    return Case(forward, variables, standard_normal(1, (3, 4)), fates)


def spread_by_hand():
    """One number for each example, normalized for each feature by statistics of its own."""

    def forward(variables, x):
        return jnp.tanh((x - variables["mean"][None]) * lax.rsqrt(variables["var"][None]))

    variables = {"mean": jnp.ones(5), "var": jnp.ones(5)}
    fates = ("It broadcasts its input against its parameters",)
    return Case(forward, randomized(variables), standard_normal(1, (3, 1)), fates)


def divided_by_hand():
    def forward(variables, x):
        y = variables["mean"][None] - x @ variables["kernel"]
        return -y / jnp.sqrt(variables["var"] + 1e-3)[None]

    variables = {"kernel": jnp.ones((4, 5)), "mean": jnp.ones(5), "var": jnp.ones(5)}
    return Case(forward, randomized(variables), standard_normal(1, (3, 4)), ("kernel",))


def weight_normalized():
    """A kernel that is computed from two variables."""

    def forward(variables, x):
        params = variables["params"]
        length = jnp.sqrt(jnp.sum(params["dense"]["v"] ** 2, axis=0, keepdims=True))
        y = x @ (params["dense"]["v"] * (params["dense"]["g"][None] / length))
        return bn.batch_norm(
            params["norm"], variables["batch_stats"]["norm"], y, use_running_average=True
        )[0]

    variables = {
        "params": {"dense": {"v": jnp.ones((4, 5)), "g": jnp.ones(5)}, "norm": bn.init_params(5)},
        "batch_stats": {"norm": bn.init_batch_stats(5)},
    }
    return Case(forward, randomized(variables), standard_normal(1, (3, 4)), ("dense/kernel",))


class Shared(nn.Module):
    """One convolution, and a norm of its own for each of two inputs."""

    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(3, (3, 3), name="conv")
        return ours(name="one")(conv(x)) + 2 * ours(name="other")(conv(x[:, ::-1] ** 2))


class TwoConsumers(nn.Module):
    """A convolution whose result is used beside the norm."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(3, (3, 3), name="conv")(x)
        return ours(name="norm")(y) + jnp.tanh(y)


class TwoTargets(nn.Module):
    """A norm of an activation before two linear layers."""

    @nn.compact
    def __call__(self, x):
        x = ours(name="norm")(jnp.tanh(x))
        return nn.Conv(3, (2, 2), padding="VALID", name="conv")(x).sum() + nn.Dense(2)(x)


class AfterAddition(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(ours(name="norm")(nn.Conv(4, (3, 3))(x) + x))


class WithResidual(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3, 3), name="conv")(x)
        return ours(name="norm", activation=nn.relu)(y, residual=x)


class Stack(nn.Module):
    """Blocks in a scan."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.relu(ours(name="norm")(nn.Dense(4)(x))), None

        axes: dict[Any, int] = {"params": 0, "batch_stats": 0}
        scanned = nn.scan(Block, length=2, variable_axes=axes, split_rngs={"params": True})
        return scanned(name="blocks")(x, None)[0]


def of(model, *fates, shape=(2, 6, 6, 4)):
    x = standard_normal(1, shape)
    return Case(model.apply, initialized(model, x), x, fates)


def vmapped():
    case = sequential(nn.Conv(5, (3, 3)), "norm", nn.relu)
    x = standard_normal(1, (3, 2, 6, 6, 4))
    return case._replace(forward=jax.vmap(case.forward, in_axes=(None, 0)), x=x)


def ensemble(*layers, shape):
    """As many models as examples."""
    case = sequential(*layers, shape=shape)
    variables = randomized(jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), case.variables))
    return case._replace(forward=jax.vmap(case.forward, in_axes=(0, None)), variables=variables)


def nnx_model(norm):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(4, 5, (3, 3), rngs=rngs),
        norm(5, rngs=rngs),
        nnx.relu,
        nnx.Dropout(0.5, rngs=rngs),
        nnx.Linear(5, 3, rngs=rngs),
        norm(3, rngs=rngs),
    )
    nnx.update(model, randomized(nnx.state(model)))
    model.eval()
    fates = ("layers/0/kernel", "layers/4/kernel")
    return Case(lambda model, x: model(x), model, standard_normal(1, (2, 6, 6, 4)), fates)


def with_constants():
    """Constants that depend on the batch size, and a variable that is spread over the batch."""

    def forward(variables, x):
        params, stats = variables["params"], variables["batch_stats"]
        y = x @ params["kernel"] + jnp.arange(x.shape[0], dtype=x.dtype)[:, None]
        y, _ = bn.batch_norm(params["norm"], stats["norm"], y, use_running_average=True)
        return jnp.tanh(y) * jnp.broadcast_to(jnp.exp(params["logarithm"]), y.shape)

    variables = {
        "params": {"kernel": jnp.ones((4, 5)), "norm": bn.init_params(5), "logarithm": jnp.ones(5)},
        "batch_stats": {"norm": bn.init_batch_stats(5)},
    }
    return Case(
        forward, randomized(variables), standard_normal(1, (3, 4)), ("varies along more axes",)
    )


def in_complex_numbers():
    norm = partial(ours, param_dtype=jnp.complex64)
    model = nn.Sequential([nn.Dense(5, param_dtype=jnp.complex64), norm()])
    x = standard_normal(1, (3, 4), np.complex64)
    variables = initialized(model, x)
    params = jax.tree.map(lambda leaf: leaf * (0.6 + 0.8j), variables["params"])
    return Case(model.apply, {**variables, "params": params}, x, ("layers_0/kernel",))


class Branch(nn.Module):
    """A norm in a branch, and one that nothing depends on."""

    @nn.compact
    def __call__(self, x):
        norm, unused = ours(name="norm"), ours(name="unused")
        if self.is_initializing():
            return norm(x) + unused(x)
        unused(nn.relu(x))
        return nn.cond(x[0, 0] > 0, lambda self, x: norm(x), lambda self, x: x, self, x)


ADDITION = "comes from `add`"
CASES: dict[str, Callable[[], Case]] = {
    "conv": lambda: sequential(nn.Conv(5, (3, 3)), "norm", nn.relu),
    "conv, no bias": lambda: sequential(nn.Conv(5, (3, 3), use_bias=False), "norm"),
    "conv, strided": lambda: sequential(nn.Conv(5, (3, 3), 2), "norm"),
    "conv, dilated": lambda: sequential(nn.Conv(5, (3, 3), kernel_dilation=2), "norm"),
    "conv, dilated input": lambda: sequential(
        nn.Conv(5, (3, 3), padding=((1, 2), (1, 2)), input_dilation=2), "norm"
    ),
    "conv, grouped": lambda: sequential(nn.Conv(6, (3, 3), feature_group_count=2), "norm"),
    "conv, depthwise": lambda: sequential(nn.Conv(8, (3, 3), feature_group_count=4), "norm"),
    "conv, one axis": lambda: sequential(nn.Conv(5, (3,)), "norm", shape=(2, 6, 4)),
    "conv, circular": lambda: sequential(nn.Conv(5, (3, 3), padding="CIRCULAR"), "norm"),
    "transposed": lambda: sequential(nn.ConvTranspose(5, (3, 3), (2, 2)), "norm"),
    "transposed, kernel too": lambda: sequential(
        nn.ConvTranspose(5, (3, 2), (2, 2), transpose_kernel=True), "norm"
    ),
    "dense": lambda: sequential(nn.Dense(5), "norm", shape=(3, 4)),
    "dense, many axes": lambda: sequential(nn.Dense(5), "norm", shape=(2, 3, 2, 4)),
    "dense, general": lambda: sequential(
        nn.DenseGeneral((2, 3), axis=(-2, -1)),
        partial(bn.linen.BatchNorm, use_running_average=True, axis=(-2, -1))(),  # type: ignore[arg-type]
        shape=(3, 5, 4),
    ),
    "dense, general, one axis": lambda: sequential(
        nn.DenseGeneral((2, 3), axis=(-2, -1)), "norm", shape=(3, 5, 4)
    ),
    "dense, batched": lambda: sequential(
        nn.DenseGeneral(5, axis=-1, batch_dims=(0,)),
        partial(bn.linen.BatchNorm, use_running_average=True, axis=(0, -1))(),  # type: ignore[arg-type]
        shape=(3, 2, 4),
    ),
    "dense after flattening": lambda: sequential(
        nn.relu,
        "norm",
        lambda x: x.reshape(x.shape[0], -1),
        nn.Dense(5),
        fates=("layers_3/kernel",),
    ),
    "flattened after": lambda: sequential(
        nn.Conv(5, (3, 3)), "norm", lambda x: x.reshape(x.shape[0], -1), nn.Dense(5)
    ),
    "dense, kernel on the left": dense_transposed,
    "moved before the norm": lambda: sequential(
        nn.Conv(5, (3, 3)),
        lambda x: jnp.moveaxis(x, -1, 1).reshape(x.shape[0], 5, -1)[:, None],
        bn.linen.BatchNorm(use_running_average=True, axis=2),
    ),
    "channels first": channels_first,
    "Flax's": lambda: sequential(nn.Conv(5, (3, 3)), "norm", nn.relu, norm=flax),
    "no scale": lambda: sequential(nn.Dense(5), ours(use_scale=False), shape=(3, 4)),
    "no bias": lambda: sequential(nn.Dense(5), ours(use_bias=False), shape=(3, 4)),
    "neither": lambda: sequential(nn.Dense(5), ours(use_bias=False, use_scale=False), shape=(3, 4)),
    "frozen scale": lambda: sequential(nn.Dense(5), ours(train_params=False), shape=(3, 4)),
    "by hand": lambda: by_hand(lax.rsqrt),
    "by hand, power": lambda: by_hand(lambda var: var**-0.5),
    "by hand, divided": divided_by_hand,
    "by hand, spread": spread_by_hand,
    "by hand, twice": twice_by_hand,
    "two norms": lambda: sequential(
        nn.Dense(5), "norm", lambda x: 2 * x, "norm", shape=(3, 4), fates=("layers_0/kernel",) * 2
    ),
    "computed kernel": weight_normalized,
    "shared kernel": lambda: of(Shared(), "conv/kernel", "conv/kernel_1"),
    "activation": lambda: sequential(nn.Conv(5, (3, 3)), ours(activation=nn.relu)),
    "residual": lambda: of(WithResidual(), "conv/kernel"),
    "remat": lambda: of(nn.remat(AfterAddition)(), ADDITION),
    "two consumers": lambda: of(TwoConsumers(), "output of conv/kernel is used elsewhere"),
    "after an addition": lambda: of(AfterAddition(), ADDITION),
    "alone": lambda: sequential("norm", fates=("Its input is an argument of the model",)),
    "returned": lambda: sequential(nn.relu, "norm", fates=("its output is returned",)),
    "before dense": lambda: sequential("norm", nn.Dense(5), fates=("layers_1/kernel",)),
    "before dense and norm": lambda: sequential(
        nn.relu, "norm", nn.Dense(5), "norm", fates=("layers_2/kernel",) * 2
    ),
    "before VALID": lambda: sequential(
        "norm", nn.Conv(5, (3, 2), padding="VALID"), fates=("layers_1/kernel",)
    ),
    "before VALID, no bias": lambda: sequential(
        "norm", nn.Conv(5, (3, 2), 2, padding="VALID", use_bias=False), fates=("layers_1/kernel",)
    ),
    "before VALID, grouped": lambda: sequential(
        "norm",
        nn.Conv(6, (3, 3), padding="VALID", feature_group_count=2),
        fates=("layers_1/kernel",),
    ),
    "before VALID, depthwise": lambda: sequential(
        "norm",
        nn.Conv(8, (3, 3), padding="VALID", feature_group_count=4),
        fates=("layers_1/kernel",),
    ),
    "before 1x1": lambda: sequential("norm", nn.Conv(5, (1, 1)), fates=("layers_1/kernel",)),
    "before SAME": lambda: sequential("norm", nn.Conv(5, (3, 3)), fates=("padding",)),
    "before transposed": lambda: sequential(
        "norm", nn.ConvTranspose(5, (2, 2), (2, 2), padding="VALID"), fates=("padding",)
    ),
    "before dilated": lambda: sequential(
        "norm", nn.Conv(5, (2, 2), padding=((0, 0), (0, 0)), input_dilation=2), fates=("padding",)
    ),
    "before general": lambda: sequential(
        "norm", nn.DenseGeneral(5, axis=(-2, -1)), shape=(3, 5, 4), fates=("layers_1/kernel",)
    ),
    "before two": lambda: of(TwoTargets(), "conv/kernel, Dense_0/kernel"),
    "before a ReLU": lambda: sequential(
        nn.tanh, "norm", nn.relu, nn.Dense(3), fates=("goes to `relu`",)
    ),
    "other axis": lambda: sequential(
        nn.Dense(5),
        bn.linen.BatchNorm(use_running_average=True, axis=1),
        shape=(3, 6, 4),
        fates=("varies along more axes than the features of layers_0/kernel",),
    ),
    "before dense, other axis": lambda: sequential(
        bn.linen.BatchNorm(use_running_average=True, axis=1),
        nn.Dense(5),
        shape=(3, 6, 4),
        fates=("applies the same kernel to several of its features",),
    ),
    "scan": lambda: of(Stack(), "inside a scan", shape=(2, 4)),
    "training": lambda: sequential(
        nn.Dense(5),
        ours(use_running_average=False, update_running_average=False),
        shape=(3, 4),
        fates=("normalizes by its input",),
    ),
    "layer norm": lambda: sequential(
        nn.Dense(5), nn.LayerNorm(), shape=(3, 4), fates=("normalizes by its input",)
    ),
    "RMS norm, no scale": lambda: sequential(
        nn.Dense(5), bn.linen.RMSNorm(use_scale=False), shape=(3, 4), fates=("by its input",)
    ),
    "vmapped": vmapped,
    "ensemble, dense": lambda: ensemble(nn.Dense(5), "norm", nn.relu, shape=(2, 4)),
    "ensemble, conv": lambda: ensemble(nn.Conv(5, (3, 3)), "norm", shape=(2, 6, 6, 4)),
    "NNX": lambda: nnx_model(bn.nnx.BatchNorm),
    "NNX, Flax's": lambda: nnx_model(nnx.BatchNorm),
    "constants": with_constants,
    "complex": in_complex_numbers,
    "branch": lambda: of(Branch(), "No output depends on it", "inside a cond", shape=(3, 4)),
    "no norm": lambda: sequential(nn.Dense(5), nn.gelu, nn.Dense(2), fates=()),
}
KEEPS_A_ROOT = ("branch", "scan", "training", "layer norm", "RMS norm, no scale")


@pytest.mark.parametrize("name", CASES)
def test_folded_models_compute_the_same(name):
    forward, variables, x, fates = CASES[name]()
    folded = bn.fold(forward, variables, jax.eval_shape(lambda: x))
    assert len(folded.report) == len(fates), folded.report
    for norm, fate in zip(folded.report, fates, strict=True):
        if norm.reason is None:
            assert fate == norm.into, norm
        else:
            assert norm.into is None and fate in norm.reason and norm.reason.endswith("."), norm
    more = x if name == "dense, batched" else doubled(x, axis=int("left" in name))
    compiled = folded.apply.lower(folded.params, more).compile()
    expected = nnx.jit(forward)(variables, more)
    assert error_of(compiled(folded.params, more), expected) < 2e-6
    assert (roots(compiled) > 0) == (name in KEEPS_A_ROOT)


Counts = tuple[int, int]
NETS: dict[str, tuple[dict[str, Any], Counts]] = {
    "plain": ({"block": models.PlainBlock}, (5, 0)),
    "basic": ({"block": models.BasicBlock}, (6, 0)),
    "bottleneck": ({"block": models.Bottleneck}, (9, 0)),
    "depthwise": ({"block": models.DepthwiseBlock}, (5, 0)),
    "ImageNet's stem": ({"block": models.BasicBlock, "stem": "7x7"}, (6, 0)),
    "pre-activation": ({"block": models.PreActivationBlock, "pre_activation": True}, (2, 3)),
}


def net_of(name, norm):
    return models.ResNet(10, (1, 1), (4, 6), norm=norm, **NETS[name][0])


@pytest.mark.parametrize("name", NETS)
def test_every_norm_of_our_models_that_follows_a_convolution_is_folded(name):
    net = net_of(name, nn.BatchNorm if name == "basic" else bn.linen.BatchNorm)
    x = standard_normal(1, (2, 8, 8, 3))
    variables = initialized(net, x, train=False)
    forward = partial(net.apply, train=False)
    folded = bn.fold(forward, variables, x)
    into = [norm.into for norm in folded.report if norm.into]
    assert (len(into), len(folded.report) - len(into)) == NETS[name][1]
    for norm in folded.report:
        assert norm.into in (None, norm.path.removesuffix("norm") + "conv/kernel")
    compiled = folded.apply.lower(folded.params, x).compile()
    assert roots(compiled) == 0
    assert error_of(compiled(folded.params, x), jax.jit(forward)(variables, x)) < 1e-5
    if name != "pre-activation":
        bare = partial(net_of(name, None).apply, train=False)
        expected = jax.jit(bare)({"params": folded.params}, x)
        assert error_of(compiled(folded.params, x), expected) < 1e-6


@pytest.mark.parametrize("name", ["basic", "depthwise"])
def test_a_folded_net_does_no_more_work_than_one_without_norms(name):
    x = standard_normal(1, (2, 8, 8, 3))
    net, bare = net_of(name, bn.linen.BatchNorm), net_of(name, None)
    variables = initialized(net, x, train=False)
    folded = bn.fold(partial(net.apply, train=False), variables, x)
    apply_bare = jax.jit(partial(bare.apply, train=False))
    given = {"params": folded.params}, x
    programs = [
        folded.apply.lower(folded.params, x).compile(),
        apply_bare.lower(*given).compile(),
        jax.jit(partial(net.apply, train=False)).lower(variables, x).compile(),
    ]
    operations = [Counter(re.findall(r" ([a-z][\w-]*)\(", str(one.as_text()))) for one in programs]
    costs: list[Any] = [one.cost_analysis() for one in programs]
    assert operations[0] == operations[1] != operations[2]
    for quantity in ("flops", "bytes accessed"):
        assert costs[0][quantity] == costs[1][quantity] < costs[2][quantity]


def small(dtype=None):
    """A model, its variables, an input and the folded model."""
    model = nn.Sequential(
        [nn.Conv(5, (3, 3), dtype=dtype), ours(dtype=dtype), nn.relu, nn.Dense(3, dtype=dtype)]
    )
    x = standard_normal(1, (4, 6, 6, 4), dtype or np.float32)
    variables = initialized(model, x)
    return model.apply, variables, x, bn.fold(model.apply, variables, x)


def test_parameters_have_the_paths_shapes_and_dtypes_of_the_variables():
    _, variables, _, folded = small()
    left = {name: variables["params"][name] for name in ("layers_0", "layers_3")}
    assert jax.tree.map(jnp.shape, folded.params) == jax.tree.map(jnp.shape, left)
    assert_close(folded.params["layers_3"], left["layers_3"], tolerance=1e-12)
    names = {
        "shared kernel": {"conv/bias", "conv/bias_1", "conv/kernel", "conv/kernel_1"},
        "computed kernel": {"dense/bias", "dense/kernel"},
        "transposed, kernel too": {"layers_0/bias", "layers_0/kernel"},
        "after an addition": {"Conv_0/bias", "Conv_0/kernel", "norm/bias", "norm/scale"},
        "alone": {"layers_0/bias", "layers_0/scale"},
        "dense, kernel on the left": {"w", "w_bias"},
        "constants": {"kernel", "logarithm_exp", "norm/bias", "norm/scale"},
        "by hand": {"bias", "kernel"},
        "two consumers": {"conv/bias", "conv/kernel", "norm/bias", "norm/scale"},
    }
    for name, expected in names.items():
        case = CASES[name]()
        params = bn.fold(*case[:3]).params
        found = {format_path(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
        assert set(found) == expected
        if name == "transposed, kernel too":
            kernel = case.variables["params"]["layers_0"]["kernel"]
            assert found["layers_0/kernel"].shape == kernel.shape


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtypes(dtype):
    forward, variables, x, folded = small(dtype)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(folded.params))
    forward = jax.jit(forward)
    y = folded.apply(folded.params, x)
    assert error_of(y, forward(variables, x)) < {jnp.bfloat16: 2e-2, jnp.float16: 2e-3}[dtype]
    narrow_after = sequential(
        nn.Dense(5, dtype=dtype), ours(dtype=dtype), lambda y: 2 * y, shape=(3, 4)
    )
    doubled_after = bn.fold(*narrow_after[:3])
    y = doubled_after.apply(doubled_after.params, narrow_after.x)
    assert y.dtype == dtype and doubled_after.params["layers_0"]["bias"].dtype == jnp.float32
    halves = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    folded = bn.fold(forward, halves, x)
    assert folded.params["layers_0"]["kernel"].dtype == dtype
    assert error_of(folded.apply(folded.params, x), forward(halves, x)) < 4e-2


def test_kernels_that_overflow_are_an_error():
    case = sequential(nn.Dense(5), "norm", shape=(3, 4))
    case.variables["params"]["layers_0"]["kernel"] = jnp.ones((4, 5), jnp.float16)
    case.variables["params"]["layers_1"]["scale"] = jnp.full(5, 1e6)
    case.variables["batch_stats"]["layers_1"]["var"] = jnp.ones(5)
    with pytest.raises(ValueError, match=r"'layers_0/kernel'.*as large as 1e\+06, which float16"):
        bn.fold(*case[:3])


def test_derivatives_are_those_of_the_model():
    forward, variables, x, folded = small()
    # Where scale and bias are 0, a ReLU is at its kink, and its derivative is 0 by definition.
    bias = variables["params"]["layers_1"]["bias"].at[::3].set(0)
    variables["params"]["layers_1"]["bias"] = bias
    variables["batch_stats"]["layers_1"]["mean"] = jnp.zeros(5)
    variables["params"]["layers_0"]["bias"] = jnp.zeros(5)
    folded = bn.fold(forward, variables, x)

    def loss(function, variables, x):
        return jnp.sum(jnp.sin(function(variables, x)))

    grads = jax.jit(jax.grad(partial(loss, folded.apply), argnums=(0, 1)))(folded.params, x)
    expected = jax.jit(jax.grad(partial(loss, forward), argnums=1))(variables, x)
    assert error_of(grads[1], expected) < 1e-5
    bare = nn.Sequential([nn.Conv(5, (3, 3)), lambda x: x, nn.relu, nn.Dense(3)])
    expected = jax.jit(jax.grad(partial(loss, bare.apply)))({"params": folded.params}, x)
    assert_close(grads[0], expected["params"])
    of_bias = grads[0]["layers_0"]["bias"]
    assert of_bias[0] == of_bias[3] == 0 and jnp.any(of_bias != 0)


def test_transforms():
    forward, variables, x, folded = small()
    expected = forward(variables, x)
    vmapped = jax.vmap(folded.apply, in_axes=(None, 0))(folded.params, x[:, None])
    assert error_of(vmapped[:, 0], expected) < 2e-6
    axes = jax.tree.map(lambda _: 0, folded.params)
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), folded.params)
    assert error_of(jax.vmap(folded.apply, (axes, None))(params, x)[0], expected) < 2e-6
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    specs = (PartitionSpec(), spec)
    sharded = jax.jit(jax.shard_map(folded.apply, mesh=mesh, in_specs=specs, out_specs=spec))
    assert error_of(sharded(folded.params, x), expected) < 2e-6
    assert (
        error_of(folded.apply(folded.params, x[:, :4, 1:]), forward(variables, x[:, :4, 1:])) < 2e-6
    )


def test_export_with_any_batch_size():
    forward, variables, x, folded = small()
    (size,) = jax.export.symbolic_shape("n")
    given = jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(folded.apply))(folded.params, given)
    y = exported.call(folded.params, doubled(x))
    assert error_of(y, forward(variables, doubled(x))) < 2e-6
    assert "rsqrt" not in exported.mlir_module()


def swapped(x):
    """Exchanges the first two sizes by a reshape, so that their order is unknown if symbolic."""
    return x.reshape(x.shape[1], x.shape[0], x.shape[2])


def joined(x):
    """Makes one axis of the first two."""
    return x.reshape(-1, x.shape[2])


@pytest.mark.parametrize("reshape", [swapped, joined])
def test_reshapes_of_symbolic_sizes(reshape):
    case = sequential(nn.Dense(5), reshape, ours(), shape=(2, 3, 4))
    height, width = jax.export.symbolic_shape("h, w")
    symbolic = jax.ShapeDtypeStruct((height, width, 4), np.float32)
    folded = bn.fold(case.forward, case.variables, symbolic)
    assert [norm.into for norm in folded.report] == ["layers_0/kernel"]
    assert bn.fold(case.forward, case.variables, case.x).report == folded.report
    exported = jax.export.export(folded.apply)(folded.params, symbolic)
    x = standard_normal(2, (3, 2, 4))
    assert error_of(exported.call(folded.params, x), case.forward(case.variables, x)) < 2e-6


def test_a_reshape_of_symbolic_sizes_that_may_mix_features_is_in_the_way():
    case = sequential(nn.Dense(6), lambda x: x.reshape(-1, 3), ours(), shape=(2, 4))
    (size,) = jax.export.symbolic_shape("n")
    given = jax.ShapeDtypeStruct((size, 4), np.float32)
    folded = bn.fold(case.forward, case.variables, given)
    assert [norm.into for norm in folded.report] == [None]
    exported = jax.export.export(folded.apply)(folded.params, given)
    actual = exported.call(folded.params, case.x)
    assert error_of(actual, case.forward(case.variables, case.x)) < 2e-6


def test_nothing_of_the_variables_is_kept():
    model = nn.Sequential([nn.Conv(5, (3, 3)), ours(), nn.relu, nn.Dense(3)])
    x = standard_normal(1, (4, 6, 6, 4))
    variables = initialized(model, x)
    kept = [weakref.ref(leaf) for leaf in jax.tree.leaves(variables)]
    before = jax.tree.map(np.asarray, variables)
    folded = bn.fold(model.apply, variables, x)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, variables))
    params = jax.tree.map(jnp.array, folded.params)
    apply = folded.apply
    del variables, before, folded
    gc.collect()
    assert [one() for one in kept] == [None] * len(kept)
    assert jnp.isfinite(apply(params, x)).all()


def test_an_nnx_model_is_left_as_it_is():
    model = CASES["NNX"]().variables
    model.train()
    x = standard_normal(1, (2, 6, 6, 4))
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param, nnx.BatchStat))
    folded = bn.fold(lambda model, x: model(x), model, x)
    assert model.layers[1].use_running_average is False
    after = nnx.state(model, nnx.Param, nnx.BatchStat)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    model.eval()
    assert error_of(folded.apply(folded.params, x), model(x)) < 2e-6


def test_the_report_is_a_table():
    case = CASES["two consumers"]()
    report = bn.fold(*case[:3]).report
    assert str(report) == (
        "norm  left: The output of conv/kernel is used elsewhere too, and its output goes to `add`."
    )
    assert str(bn.fold(*CASES["no norm"]()[:3]).report) == "There is no norm."
    x = jnp.ones((2, 3))
    layer = ours()
    report = bn.fold(layer.apply, layer.init(jax.random.key(0), x), x).report
    assert str(report).startswith("the top-level norm  left: Its input is an argument")


def test_a_folded_model_shows_a_line_and_in_a_notebook_a_table():
    folded = small()[-1]
    assert repr(folded) == "Folded(1 of 1 norms folded, 203 parameters in 4 arrays)"
    assert repr(folded.report) == "FoldReport(1 of 1 norms folded)"
    expected = "<tr><td>layers_1</td><td>into layers_0/kernel</td></tr>"
    assert expected in folded._repr_html_() == folded.report._repr_html_()
    assert "<caption>1 of 1 norms folded</caption>" in folded._repr_html_()
    report = bn.fold(*CASES["two consumers"]()[:3]).report
    assert repr(report) == "FoldReport(0 of 1 norms folded)"
    assert "used elsewhere too" in report._repr_html_()
    assert repr(FoldReport()) == "FoldReport(no norms)"


def test_folding_under_a_transform_is_an_error():
    forward, variables, x, _ = small()
    with pytest.raises(TypeError, match=r"variables are traced.*outside of jax\.jit"):
        jax.jit(lambda variables: bn.fold(forward, variables, x).params)(variables)


def test_other_parameters_are_an_error():
    _, _, x, folded = small()
    params = {"layers_0": folded.params["layers_0"], "layers_3": {"kernel": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match=r"'layers_3/kernel': \(2, 3\).*'layers_3/bias': \(3,\)"):
        folded.apply(params, x)


def test_another_program_is_an_error():
    case = CASES["dense"]()

    def forward(variables, x):
        y = case.forward(variables, x)
        return y if x.shape[0] < 5 else y @ variables["params"]["layers_0"]["kernel"].T

    folded = bn.fold(forward, case.variables, case.x)
    with pytest.raises(ValueError, match=r"another program.*\[\(6, 4\)\].*bn_jax\.fold"):
        folded.apply(folded.params, doubled(case.x))


def of_dense(function):
    """A function of what a dense layer and a norm give, and of a vector, with the variables."""
    model = nn.Sequential([nn.Dense(5), ours()])
    x = standard_normal(1, (1, 6, 4))
    variables = initialized(model, x)

    def forward(variables, x):
        vector = variables["params"]["layers_0"]["bias"][None, None]
        return function(partial(model.apply, variables), variables, vector, x)

    return forward, variables, x


def test_constants_of_the_shapes_stay_in_the_program():
    def function(apply, variables, vector, x):
        return apply(x) / x.shape[1] + (1.0 + jnp.arange(x.shape[0]))[:, None, None]

    forward, variables, x = of_dense(function)
    folded = bn.fold(forward, variables, x)
    assert folded.report[0].into == "layers_0/kernel"
    x = standard_normal(2, (3, 7, 4))
    assert error_of(folded.apply(folded.params, x), forward(variables, x)) < 2e-6


def divided_before_the_norm(apply, variables, vector, x):
    y = (x @ variables["params"]["layers_0"]["kernel"]) / x.shape[1]
    return ours().apply({name: one["layers_1"] for name, one in variables.items()}, y)


DEPENDING_ON_SHAPES = {
    "before the norm": divided_before_the_norm,
    "after the norm": lambda apply, _, vector, x: apply(x) * jnp.tanh(vector / x.shape[1]),
    "apart": lambda apply, _, vector, x: jnp.tanh(apply(x)) * jnp.tanh(vector / x.shape[1]),
    "in a call": lambda apply, _, vector, x: (
        jnp.tanh(apply(x)) * jax.nn.silu(jax.nn.relu6(vector * x.shape[1]))
    ),
    "in a power": lambda apply, _, vector, x: jnp.tanh(apply(x)) * vector ** x.shape[1],
}


@pytest.mark.parametrize("name", DEPENDING_ON_SHAPES)
def test_parameters_that_depend_on_the_shapes_are_an_error(name):
    forward, variables, x = of_dense(DEPENDING_ON_SHAPES[name])
    folded = bn.fold(forward, variables, x)
    more = doubled(x)
    assert error_of(folded.apply(folded.params, more), forward(variables, more)) < 2e-6
    with pytest.raises(ValueError, match=r"another program.*the parameters \['layers_0/[kb]"):
        folded.apply(folded.params, x[:, :5])


def far_from_zero(*layers, dtype=np.float32):
    """Models of data whose mean is large beside their deviation."""
    case = sequential(*layers, shape=(64, 4))
    x = (100 + exact(case.x)).astype(dtype)
    stats = jax.tree.leaves_with_path(case.variables["batch_stats"])
    name = next(path[0].key for path, _ in stats)
    norm = {"mean": exact(x).mean(0), "var": exact(x).var(0)}
    norm = jax.tree.map(jnp.float32, norm)
    variables = {**case.variables, "batch_stats": {name: norm}}
    return case._replace(variables=variables, x=jnp.asarray(x))


@pytest.mark.parametrize(
    ("layers", "dtype"),
    [
        ((ours(), nn.Dense(5, dtype=jnp.bfloat16)), np.float32),
        ((ours(dtype=jnp.bfloat16), nn.Dense(5)), np.float32),
        ((ours(dtype=jnp.float32), nn.Dense(5, dtype=jnp.bfloat16)), jnp.bfloat16),
        ((ours(), nn.Dense(5, dtype=jnp.float16)), np.float16),
    ],
)
def test_a_norm_before_a_layer_in_half_precision_is_left(layers, dtype):
    forward, variables, x, _ = far_from_zero(*layers, dtype=dtype)
    folded = bn.fold(forward, variables, x)
    name = "float16" if dtype == np.float16 else "bfloat16"
    reason = f"the linear layer after it computes in {name}, where its input would be rounded"
    assert reason in str(folded.report[0].reason)
    half = error_of(folded.apply(folded.params, x), jax.jit(forward)(variables, x))
    assert half < 2e-2


def test_a_norm_by_hand_in_half_precision_is_left():
    def forward(variables, x):
        norm = variables["norm"]
        return ((x - norm["mean"]) * lax.rsqrt(norm["var"])) @ variables["kernel"]

    norm = {"mean": jnp.ones((1, 4)), "var": jnp.ones((1, 4))}
    variables = {"norm": norm, "kernel": jnp.ones((4, 5))}
    for dtype, into in ((jnp.bfloat16, None), (jnp.float32, "kernel")):
        halves = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), variables)
        assert bn.fold(forward, halves, jnp.ones((3, 4), dtype)).report[0].into == into


def test_the_offset_of_a_norm_that_is_left_is_that_of_its_rounded_scale():
    names = ("mean", "var", "scale", "bias")
    norm = {name: standard_normal(seed, (1, 64)) for seed, name in enumerate(names)}
    norm = {**norm, "mean": norm["mean"] + 4096, "var": jnp.exp(norm["var"])}

    def forward(norm, x):
        return (x - norm["mean"]) * lax.rsqrt(norm["var"]) * norm["scale"] + norm["bias"]

    params = bn.fold(forward, norm, norm["mean"]).params
    a, b = exact(params["scale"]), exact(params["bias"])
    at_mean = a * exact(norm["mean"])[0] + b
    assert np.all(
        np.abs(at_mean - exact(norm["bias"])[0]) <= np.spacing(np.abs(params["bias"])) / 2
    )


@pytest.mark.parametrize("is_before", [True, False])
def test_a_complex_norm_beside_a_real_kernel_is_left(is_before):
    norm, dense = ours(param_dtype=jnp.complex64), nn.Dense(5, dtype=jnp.complex64)
    model = nn.Sequential([norm, dense] if is_before else [dense, norm])
    x = standard_normal(1, (3, 4), np.complex64)
    variables = initialized(model, x)
    path = f"layers_{int(not is_before)}"
    scale = variables["params"][path]["scale"]
    params = {**variables["params"]}
    params[path] = {**params[path], "scale": scale + 1j}
    variables = {**variables, "params": params}
    folded = bn.fold(model.apply, variables, x)
    assert "stored as real numbers" in str(folded.report[0].reason)
    assert error_of(folded.apply(folded.params, x), model.apply(variables, x)) < 2e-6


def test_a_real_norm_of_complex_numbers_goes_into_a_real_kernel():
    model = nn.Sequential([nn.Dense(5, dtype=jnp.complex64), ours()])
    x = standard_normal(1, (3, 4), np.complex64)
    variables = initialized(model, x)
    folded = bn.fold(model.apply, variables, x)
    assert folded.report[0].into == "layers_0/kernel"
    assert folded.params["layers_0"]["kernel"].dtype == jnp.float32
    assert error_of(folded.apply(folded.params, x), model.apply(variables, x)) < 2e-6


@pytest.mark.parametrize("unit, fate", [(1, "into kernel"), (1j, "stored as real numbers")])
def test_a_complex_constant_in_a_norm_may_hold_real_numbers(unit, fate):
    def forward(variables, x):
        y = x @ variables["kernel"].astype(jnp.complex64) - variables["mean"]
        return y * lax.rsqrt(variables["var"]) * factors + variables["bias"]

    factors = (unit * np.arange(1, 6)).astype(np.complex64)[None]
    variables = {name: jnp.full((1, 5), 2.0) for name in ("mean", "var", "bias")}
    variables["kernel"] = standard_normal(1, (4, 5), np.float32)
    x = standard_normal(2, (3, 4), np.complex64)
    folded = bn.fold(forward, variables, x)
    assert fate in str(folded.report)
    assert error_of(folded.apply(folded.params, x), forward(variables, x)) < 2e-6


def test_an_imaginary_part_is_never_dropped(monkeypatch):
    monkeypatch.setattr(kernels, "may_be_complex", lambda program, value: False)
    norm, dense = ours(param_dtype=jnp.complex64), nn.Dense(5, dtype=jnp.complex64)
    model = nn.Sequential([dense, norm])
    x = standard_normal(1, (3, 4), np.complex64)
    variables = jax.tree.map(
        lambda leaf: leaf * 1j if leaf.dtype == x.dtype else leaf, initialized(model, x)
    )
    with pytest.raises(ValueError, match=r"'layers_0/kernel' with its norm is complex, which fl"):
        bn.fold(model.apply, variables, x)


@pytest.mark.parametrize("ordered", [False, True])
def test_what_is_printed_stays(ordered, capfd):
    case = CASES["dense"]()

    def forward(variables, x):
        jax.debug.print("nothing known", ordered=ordered)
        y = case.forward(variables, x)
        jax.debug.print("at {}", y[0, 0] * 0 + 7, ordered=ordered)
        return y

    folded = bn.fold(forward, case.variables, case.x)
    assert folded.report[0].into == "layers_0/kernel"
    jax.block_until_ready(folded.apply(folded.params, case.x))
    jax.effects_barrier()
    printed = capfd.readouterr().out
    assert "nothing known" in printed and "at 7.0" in printed


class Affine(NamedTuple):
    """Variables at attributes."""

    kernel: Any
    bias: Any


def test_variables_at_attributes_have_paths():
    variables = {
        "dense": Affine(standard_normal(1, (4, 5)), standard_normal(2, 5)),
        "norm": {"mean": standard_normal(3, 5), "var": jnp.ones(5)},
        "more": Affine(standard_normal(4, 5), standard_normal(5, 5)),
    }

    def forward(variables, x):
        dense, norm = variables["dense"], variables["norm"]
        y = x @ dense.kernel + dense.bias[None]
        y = (y - norm["mean"][None]) * lax.rsqrt(norm["var"])[None]
        return jnp.tanh(y) * variables["more"].kernel[None] + variables["more"].bias[None]

    x = standard_normal(6, (3, 4))
    folded = bn.fold(forward, variables, x)
    both = {"kernel", "bias"}
    assert {name: set(one) for name, one in folded.params.items()} == {"dense": both, "more": both}
    assert error_of(folded.apply(folded.params, x), forward(variables, x)) < 2e-6


def test_a_path_inside_of_another_is_taken():
    variables = {"a": {"sin": {"b": jnp.ones(3)}, "c": standard_normal(1, 3)}}

    def forward(variables, x):
        a = variables["a"]
        return x * a["sin"]["b"] + jnp.sin(a["c"])

    x = standard_normal(2, 3)
    variables["a"]["c_sin"] = {"b": variables["a"].pop("sin")["b"]}

    def renamed(variables, x):
        a = variables["a"]
        return forward({"a": {"sin": a["c_sin"], "c": a["c"]}}, x)

    folded = bn.fold(renamed, variables, x)
    assert set(folded.params["a"]) == {"c_sin", "c_sin_1"}
    assert error_of(folded.apply(folded.params, x), renamed(variables, x)) < 2e-6


def test_a_norm_beside_an_array_of_its_path_gets_another():
    norm = {"mean": standard_normal(1, (1, 5)), "var": jnp.ones((1, 5))}
    variables = {"params": {"norm": standard_normal(2, (1, 5))}, "batch_stats": {"norm": norm}}

    def forward(variables, x):
        norm = variables["batch_stats"]["norm"]
        y = (jnp.sin(x) - norm["mean"]) * lax.rsqrt(norm["var"])
        return jnp.tanh(y) * variables["params"]["norm"]

    x = standard_normal(3, (2, 5))
    folded = bn.fold(forward, variables, x)
    assert set(folded.params) == {"norm", "norm_1"}
    assert error_of(folded.apply(folded.params, x), forward(variables, x)) < 2e-6


def test_a_parameter_that_is_tiled_over_the_batch_stays():
    case = CASES["dense"]()

    def forward(variables, x):
        tiled = jnp.tile(variables["params"]["layers_1"]["bias"][None], (x.shape[0], 1))
        return jnp.tanh(case.forward(variables, x)) * tiled

    folded = bn.fold(forward, case.variables, case.x)
    more = doubled(case.x)
    assert error_of(folded.apply(folded.params, more), forward(case.variables, more)) < 2e-6


def test_a_switch_among_the_arguments_is_an_error():
    case = CASES["dense"]()
    with pytest.raises(TypeError, match=r"args\[1\]\['train'\] is False.*lambda variables, x: mo"):
        bn.fold(case.forward, case.variables, case.x, {"train": False})


@jax.custom_vjp
def rounded_to(x, step):
    return jnp.round(x / step) * step


rounded_to.defvjp(
    lambda x, step: (rounded_to(x, step), step), lambda step, g: (g, jnp.zeros_like(step))
)


def test_a_function_of_a_variable_keeps_its_derivative():
    case = CASES["dense"]()
    variables = {**case.variables, "step": jnp.float32(0.3)}

    def forward(variables, x):
        model = {name: variables[name] for name in case.variables}
        return rounded_to(case.forward(model, x), variables["step"])

    folded = bn.fold(forward, variables, case.x)
    assert folded.report[0].into == "layers_0/kernel"
    grad = jax.grad(lambda x: folded.apply(folded.params, x).sum())(case.x)
    assert error_of(grad, jax.grad(lambda x: forward(variables, x).sum())(case.x)) < 2e-6


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("leaves", [("scale", "bias"), ("scale",), ("bias",), ()])
def test_as_affine_is_the_definition(leaves, offset):
    values = {
        name: standard_normal(seed, 64) for seed, name in enumerate(("scale", "bias", "mean"))
    }
    params = {name: values[name] for name in leaves}
    stats = {"mean": values["mean"] + offset, "var": jnp.exp(standard_normal(3, 64) * 4)}
    a, b = jax.jit(bn.as_affine)(params, stats, epsilon=1e-3)
    assert a.dtype == b.dtype == jnp.float32
    scale, bias = (exact(params.get(name, 1.0 - at)) for at, name in enumerate(("scale", "bias")))
    factor = scale / np.sqrt(exact(stats["var"]) + 1e-3)
    assert np.all(np.abs(a - factor) <= 2e-7 * np.abs(factor))
    # However much cancels, b is the bias of the a that is returned, but for its own rounding.
    expected = bias - exact(a) * exact(stats["mean"])
    assert np.all(np.abs(b - expected) <= 2.0**-24 * np.abs(expected))


def test_as_affine_cancels_nothing():
    a = 1 / np.sqrt(exact(np.float32(3.0)))
    mean = jnp.array([12345.678])
    bias = (jnp.float32(a) * mean).astype(jnp.float32)
    stats: bn.BatchStats = {"mean": mean, "var": jnp.array([3.0])}
    own_a, b = bn.as_affine({"bias": bias}, stats, epsilon=1e-20)
    expected = exact(bias) - exact(own_a) * exact(mean)
    assert expected != 0
    assert_close(b / expected, np.ones(1), tolerance=1e-6)


def test_as_affine_of_other_dtypes():
    params: bn.Params = {
        "scale": jnp.ones(2, jnp.bfloat16),
        "bias": jnp.zeros(2, jnp.bfloat16),
    }
    stats: bn.BatchStats = {"mean": jnp.array([1 + 2j, 3j]), "var": jnp.array([3.0, 1.0])}
    a, b = bn.as_affine(params, stats, epsilon=1e-9)
    assert a.dtype == b.dtype == jnp.complex64
    assert_close(b, -exact(stats["mean"]) / np.sqrt([3.0, 1.0]), tolerance=1e-6)
    stats = {"mean": jnp.ones(2, jnp.bfloat16), "var": jnp.ones(2, jnp.bfloat16)}
    a, b = bn.as_affine(params, stats)
    assert a.dtype == b.dtype == jnp.float32
    a, b = bn.as_affine({"scale": jnp.array([1j, 2.0])}, stats)
    assert a.dtype == b.dtype == jnp.complex64


@pytest.mark.parametrize(
    ("params", "batch_stats", "epsilon", "message"),
    [
        ({"gamma": jnp.ones(2)}, {}, 1e-5, r"unknown entries \['gamma'\]"),
        ({}, {"mean": jnp.ones(2)}, 1e-5, r"batch_stats lacks \['var'\]; it has \['mean'\]"),
        ({"scale": jnp.ones(3)}, bn.init_batch_stats(2), 1e-5, r"'scale': \(3,\).*'mean': \(2,\)"),
        ({}, bn.init_batch_stats(2), 0.0, r"epsilon=0.0 must be positive"),
    ],
)
def test_as_affine_objects(params, batch_stats, epsilon, message):
    with pytest.raises(ValueError, match=message):
        bn.as_affine(params, batch_stats, epsilon=epsilon)


def leaky(x):
    return jax.nn.leaky_relu(x, 0.1)


@pytest.mark.parametrize("activation", [jax.nn.relu, leaky, None])
def test_absorbing_keeps_the_function(activation):
    function = activation or (lambda x: x)
    scale = jnp.array([-2.0, 0.0, 0.5, 1e-3, -30.0])
    params: bn.Params = {"scale": scale, "bias": standard_normal(0, 5)}
    stats = randomized(bn.init_batch_stats(5))
    x = standard_normal(1, (7, 5))

    def outputs(params, kernel, apply):
        normalized, _ = bn.batch_norm(params, stats, x, use_running_average=True)
        return exact(apply(function(normalized), kernel))

    def flattened(y, kernel):
        return y.reshape(1, -1) @ kernel

    def depthwise(y, kernel):
        features = kernel.shape[-1]
        dimensions = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            y[None], kernel, (1,), "VALID", dimension_numbers=dimensions, feature_group_count=5
        ).reshape(-1, features)

    products = {
        jnp.matmul: ((5, 3), -2),
        lambda y, kernel: y @ kernel.T: ((3, 5), 1),
        flattened: ((35, 3), 0),
        depthwise: ((3, 1, 10), -1),
    }
    for apply, (shape, axis) in products.items():
        kernel = standard_normal(2, shape)
        new, absorbed = bn.absorb_scale(params, kernel, axis=axis, activation=activation)
        expected = [0.0, 1.0] if activation is None else [-1.0, 0.0, 1.0]
        assert sorted(set(new["scale"].tolist())) == expected
        assert new["bias"][1] == params["bias"][1]
        actual, expected = outputs(new, absorbed, apply), outputs(params, kernel, apply)
        assert np.abs(actual - expected).max() <= 2e-6 * np.abs(expected).max()


def test_absorbing_leaves_what_would_overflow_and_keeps_dtypes():
    params: bn.Params = {"scale": jnp.array([1e-30, 2.0]), "bias": jnp.array([1e30, 1.0])}
    new, kernel = bn.absorb_scale(params, jnp.ones((2, 3), jnp.bfloat16))
    assert_close(new, {"scale": jnp.array([1e-30, 1.0]), "bias": jnp.array([1e30, 0.5])})
    assert kernel.dtype == jnp.bfloat16 and new["scale"].dtype == jnp.float32
    assert kernel[:, 0].tolist() == [1.0, 2.0]
    new, _ = bn.absorb_scale({"scale": jnp.array([-2.0])}, jnp.ones((1, 1)))
    assert new == {"scale": jnp.array([-1.0])}


def clipped(x):
    return jnp.clip(x, 0, 127)


def above_a_threshold(x):
    return jnp.where(jnp.abs(x) > 1e-3, x, 0)


NOT_HOMOGENEOUS = [jax.nn.gelu, jax.nn.relu6, jnp.tanh, jax.nn.elu, clipped, above_a_threshold]


def test_absorbing_under_jit():
    params = {"scale": jnp.array([-2.0, 0.5])}
    absorb = jax.jit(lambda params, kernel: bn.absorb_scale(params, kernel))
    assert_close(absorb(params, jnp.ones((2, 1)))[1], jnp.array([[2.0], [0.5]]))


@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.leaky_relu])
def test_absorbing_under_transformations(activation):
    def absorbed(scale):
        kernel = jnp.ones((scale.size, 1))
        return bn.absorb_scale({"scale": scale}, kernel, activation=activation)[1].sum()

    scale = jnp.array([[-2.0, 0.5], [3.0, -1.0]])
    magnitude, slope = (
        (scale, jnp.ones_like(scale)) if activation is None else (jnp.abs(scale), jnp.sign(scale))
    )
    assert_close(jax.jit(absorbed)(scale[0]), magnitude[0].sum())
    assert_close(jax.jit(jax.vmap(absorbed))(scale), magnitude.sum(-1))
    assert_close(jax.vmap(jax.grad(absorbed))(scale), slope)


@pytest.mark.parametrize("activation", NOT_HOMOGENEOUS)
def test_absorbing_across_what_does_not_scale_is_an_error(activation):
    with pytest.raises(ValueError, match=r"does not scale with its input: activation\(.*relu"):
        bn.absorb_scale(bn.init_params(2), jnp.ones((2, 2)), activation=activation)


@pytest.mark.parametrize(
    ("params", "shape", "axis", "message"),
    [
        ({"bias": jnp.ones(2)}, (2, 2), -2, "params has no 'scale'"),
        (bn.init_params(2), (3, 2), -2, r"shape \(3, 2\) has 3 inputs on axis=-2, no multiple"),
        (bn.init_params(2), (2, 2), 2, r"axis=2 of a kernel of shape \(2, 2\)"),
        (bn.init_params(4), (3, 3, 2, 8), -1, r"axis=-1 of a kernel.*other grouped convolutions"),
        ({"scale": 1j * jnp.ones(2)}, (2, 2), -2, "scale is complex64.*kernel in float32 cannot"),
        (bn.init_params((2, 2)), (2, 2), 0, r"a scale of shape \(2, 2\): expected a scale \[F\]"),
    ],
)
def test_absorbing_objects(params, shape, axis, message):
    with pytest.raises(ValueError, match=message):
        bn.absorb_scale(params, jnp.ones(shape), axis=axis)
