"""Folded models compute what they did before, without a norm, with no more work than without."""

import gc
import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from support import assert_close, exact, standard_normal

import bn_jax as bn
from bn_jax import models

ours = partial(bn.linen.BatchNorm, use_running_average=True)
flax = partial(nn.BatchNorm, use_running_average=True)


def randomized(tree, seed=0):
    """Gives variables random values: variances positive, scales of either sign, some of them 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = bn.optim.path_of(path).removesuffix("/value").split("/")[-1]
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
    return len(re.findall(r"sqrt|power\(", compiled.as_text()))


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

        axes = {"params": 0, "batch_stats": 0}
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
        partial(bn.linen.BatchNorm, use_running_average=True, axis=(-2, -1))(),
        shape=(3, 5, 4),
    ),
    "dense, general, one axis": lambda: sequential(
        nn.DenseGeneral((2, 3), axis=(-2, -1)), "norm", shape=(3, 5, 4)
    ),
    "dense, batched": lambda: sequential(
        nn.DenseGeneral(5, axis=-1, batch_dims=(0,)),
        partial(bn.linen.BatchNorm, use_running_average=True, axis=(0, -1))(),
        shape=(3, 2, 4),
    ),
    "dense after flattening": lambda: sequential(
        nn.relu, "norm", lambda x: x.reshape(x.shape[0], -1), nn.Dense(5), fates=("layers_3/kernel",)
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
    "neither": lambda: sequential(
        nn.Dense(5), ours(use_bias=False, use_scale=False), shape=(3, 4)
    ),
    "frozen scale": lambda: sequential(nn.Dense(5), ours(train_params=False), shape=(3, 4)),
    "by hand": lambda: by_hand(lax.rsqrt),
    "by hand, power": lambda: by_hand(lambda var: var**-0.5),
    "by hand, divided": divided_by_hand,
    "two norms": lambda: sequential(
        nn.Dense(5), "norm", lambda x: 2 * x, "norm", shape=(3, 4), fates=("layers_0/kernel",) * 2
    ),
    "computed kernel": weight_normalized,
    "shared kernel": lambda: of(Shared(), "conv/kernel", "conv/kernel_1"),
    "activation": lambda: sequential(nn.Conv(5, (3, 3)), ours(activation=nn.relu)),
    "residual": lambda: of(WithResidual(), "conv/kernel"),
    "remat": lambda: of(nn.remat(AfterAddition)(), ADDITION),
    "two consumers": lambda: of(TwoConsumers(), "conv/kernel gives is used elsewhere"),
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
        fates=("tells apart what layers_0/kernel does not",),
    ),
    "scan": lambda: of(Stack(), "inside of a scan", shape=(2, 4)),
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
    "no norm": lambda: sequential(nn.Dense(5), nn.gelu, nn.Dense(2), fates=()),
}
KEEPS_A_ROOT = ("scan", "training", "layer norm", "RMS norm, no scale")


@pytest.mark.parametrize("name", CASES)
def test_folded_models_compute_the_same(name):
    forward, variables, x, fates = CASES[name]()
    folded = bn.fold(forward, variables, jax.eval_shape(lambda: x))
    assert len(folded.report) == len(fates), folded.report
    for norm, fate in zip(folded.report, fates, strict=True):
        assert fate == norm.into or (norm.into is None and fate in norm.reason), norm
        assert norm.reason is None or norm.reason.endswith(".")
    more = x if name == "dense, batched" else doubled(x, axis=int("left" in name))
    compiled = folded.apply.lower(folded.params, more).compile()
    expected = nnx.jit(forward)(variables, more)
    assert error_of(compiled(folded.params, more), expected) < 2e-6
    assert (roots(compiled) > 0) == (name in KEEPS_A_ROOT)
