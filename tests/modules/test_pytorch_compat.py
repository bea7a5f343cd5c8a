"""The guide from PyTorch, row by row, by PyTorch's own numbers or NumPy."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import assert_close, define_batch_norm, define_standardized, standard_normal

import bn_jax as bn

ROOT = Path(__file__).parents[2]
GOLDEN = {
    (case["layer"], case["momentum"]): case
    for case in json.loads((ROOT / "tests" / "golden" / "pytorch.json").read_text())["cases"]
}
IMAGES, CUMULATIVE = GOLDEN["BatchNorm2d", 0.1], GOLDEN["BatchNorm2d", None]
STEPS = [jnp.asarray(step["x"], jnp.float32) for step in IMAGES["steps"]]
TRANSLATED: dict[str, Any] = dict(momentum=0.9, running_var_ddof=1, epsilon=1e-3, axis=1)
ROWS: dict[str, Callable[[], None]] = {}


def row(cell):
    """Registers the test of the row of the guide's table that has `cell` first."""

    def register(test):
        ROWS[cell] = test
        return test

    return register


def variables_of(case, step=None):
    """`state_dict()` under our names; initial statistics, or those after a step."""
    stats = {"mean": np.zeros(3), "var": np.ones(3)} if step is None else case["steps"][step]
    tree = {
        "params": {name: case[name] for name in ("scale", "bias")},
        "batch_stats": {name: stats[name] for name in ("mean", "var")},
    }
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float32),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, list),
    )


def train(case, variables=None, **options):
    """Outputs and last statistics of a Linen layer over the golden batches."""
    layer = bn.linen.BatchNorm(use_running_average=False, **{**TRANSLATED, **options})
    variables = variables_of(case) if variables is None else variables
    apply = jax.jit(partial(layer.apply, mutable=["batch_stats"]))
    outputs = []
    for x in STEPS:
        y, updates = apply(variables, x)
        variables = {**variables, **updates}
        outputs.append(y)
    return outputs, variables["batch_stats"]


def golden(case):
    last = case["steps"][-1]
    outputs = [np.asarray(step["y"]) for step in case["steps"]]
    return outputs, {name: np.asarray(last[name]) for name in ("mean", "var")}


def assert_differs(found, expected):
    with pytest.raises(AssertionError, match=r"error .* above"):
        assert_close(found, expected)


@row("`momentum=0.1`, the weight of the new")
def momentum():
    assert_close(train(IMAGES), golden(IMAGES))
    assert_differs(train(IMAGES, momentum=0.1), golden(IMAGES))


@row("`running_var` is unbiased")
def unbiased_running_variance():
    outputs, biased = train(IMAGES, running_var_ddof=0)
    expected, stats = golden(IMAGES)
    assert_close(outputs, expected)
    assert_differs(biased, stats)


@row("`eps`")
def epsilon():
    assert bn.linen.BatchNorm().epsilon == 1e-5
    for name in ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"):
        assert getattr(bn.linen, name)().epsilon == 1e-6
    assert_differs(train(IMAGES, epsilon=1e-2)[0], golden(IMAGES)[0])


@row("channels first, `[N, C, H, W]`")
def channels():
    outputs, _ = golden(IMAGES)
    layer = bn.linen.BatchNorm(**{**TRANSLATED, "axis": -1}, use_running_average=False)
    last = jnp.moveaxis(STEPS[0], 1, -1)
    y, _ = layer.apply(variables_of(IMAGES), last, mutable=["batch_stats"])
    assert_close(jnp.moveaxis(y, -1, 1), outputs[0])


@row("`model.train()`, `model.eval()`")
def modes():
    layer = bn.linen.BatchNorm(**TRANSLATED)
    trained = variables_of(IMAGES, -1)
    evaluated = layer.apply(trained, STEPS[-1], use_running_average=True)
    assert_close(evaluated, np.asarray(IMAGES["evaluated"]))
    twin = bn.nnx.BatchNorm(3, **TRANSLATED, rngs=nnx.Rngs(0))
    for name, value in (trained["params"] | variables_of(IMAGES)["batch_stats"]).items():
        getattr(twin, name)[...] = value
    twin.train()
    assert_close([twin(x) for x in STEPS], golden(IMAGES)[0])
    twin.eval()
    assert_close(twin(STEPS[-1]), np.asarray(IMAGES["evaluated"]))


@row("buffers change when the model is called")
def updates():
    variables = variables_of(IMAGES)
    layer = bn.linen.BatchNorm(use_running_average=False, **TRANSLATED)
    _, updates = layer.apply(variables, STEPS[0], mutable=["batch_stats"])
    assert_close(variables["batch_stats"], variables_of(IMAGES)["batch_stats"])
    assert_close(updates["batch_stats"], variables_of(IMAGES, 0)["batch_stats"])
    twin = bn.nnx.BatchNorm(3, **TRANSLATED, rngs=nnx.Rngs(0))
    twin(STEPS[0])
    assert_close(twin.mean[...], np.asarray(IMAGES["steps"][0]["mean"]))


@row("`weight`, `bias`")
def parameters():
    layer = bn.linen.BatchNorm(use_running_average=False, **TRANSLATED)
    variables = layer.init(jax.random.key(0), STEPS[0])
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, variables_of(IMAGES))
    assert set(variables["params"]) == {"scale", "bias"}


@row("`running_mean`, `running_var`")
def statistics():
    layer = bn.linen.BatchNorm(use_running_average=True, **TRANSLATED)
    y = layer.apply(variables_of(IMAGES, -1), STEPS[-1])
    assert_close(y, np.asarray(IMAGES["evaluated"]))


@row("`momentum=None`, `num_batches_tracked`")
def cumulative():
    variables = variables_of(CUMULATIVE)
    variables["batch_stats"]["count"] = jnp.zeros(3)
    outputs, stats = train(CUMULATIVE, variables, momentum=None)
    assert stats.pop("count").tolist() == [CUMULATIVE["num_batches_tracked"]] * 3
    assert_close((outputs, stats), golden(CUMULATIVE))


@row("`affine=False`")
def without_parameters():
    layer = bn.linen.BatchNorm(use_scale=False, use_bias=False, use_running_average=False, axis=1)
    y, variables = layer.init_with_output(jax.random.key(0), STEPS[0])
    assert set(variables) == {"batch_stats"}
    assert_close(y, define_batch_norm({}, bn.init_batch_stats(3), STEPS[0], axis=1)[0])


@row("`track_running_stats=False`")
def without_running_statistics():
    variables, x = variables_of(IMAGES, -1), STEPS[0]
    layer = bn.linen.BatchNorm(use_running_average=False, **TRANSLATED)
    evaluated, _ = layer.apply(variables, x, mutable=["batch_stats"])
    assert_close(evaluated, golden(IMAGES)[0][0])


@row("`SyncBatchNorm`")
def synchronized():
    outputs, _ = golden(IMAGES)
    layer = bn.linen.BatchNorm(use_running_average=False, axis_name="data", **TRANSLATED)
    apply = partial(layer.apply, variables_of(IMAGES), mutable=["batch_stats"])
    shards = STEPS[0].reshape(2, 2, *STEPS[0].shape[1:])
    y, updates = jax.vmap(apply, axis_name="data", out_axes=(0, None))(shards)
    assert_close(y.reshape(STEPS[0].shape), outputs[0])
    assert_close(updates["batch_stats"], variables_of(IMAGES, 0)["batch_stats"])
    assert_close(jax.jit(apply)(STEPS[0])[0], outputs[0])


@row("a batch of one value per channel raises")
def one_value():
    with pytest.warns(UserWarning, match="the top-level BatchNorm has one value per feature"):
        train_one = bn.linen.BatchNorm(use_running_average=False, **TRANSLATED)
        train_one.apply(variables_of(IMAGES), STEPS[0][:1, :, :1, :1], mutable=["batch_stats"])


standardized = partial(define_standardized, epsilon=1e-5)


@row("`LayerNorm((5, 6))`")
def layer_norm():
    x = standard_normal(0, (2, 4, 5, 6))
    layer = bn.linen.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1), epsilon=1e-5)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    assert variables["params"]["scale"].shape == (5, 6)
    assert_close(y, standardized(x, (2, 3)))


@row("`GroupNorm(2, 6)`")
def group_norm():
    x = standard_normal(1, (2, 6, 5, 4))
    layer = bn.linen.GroupNorm(num_groups=2, epsilon=1e-5)
    y, _ = layer.init_with_output(jax.random.key(0), jnp.moveaxis(x, 1, -1))
    expected = standardized(x.reshape(2, 2, 3, 5, 4), (2, 3, 4)).reshape(x.shape)
    assert_close(jnp.moveaxis(y, -1, 1), expected)


@row("`InstanceNorm2d(6)`")
def instance_norm():
    x = standard_normal(2, (2, 6, 5, 4))
    layer = bn.linen.InstanceNorm(feature_axes=1, use_scale=False, use_bias=False, epsilon=1e-5)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    assert variables == {}
    assert_close(y, standardized(x, (2, 3)))


@pytest.mark.parametrize("test", ROWS.values(), ids=ROWS)
def test_row(test):
    test()


def test_the_guide_has_these_rows():
    page = (ROOT / "docs/guides/from_pytorch.md").read_text()
    table = page.split("## `torch.nn` and bn_jax, row by row\n")[1].split("\n## ")[0]
    _, *lines = re.findall(r"^\| (.*) \|$", table, re.MULTILINE)
    assert [line.split(" | ")[0] for line in lines] == list(ROWS)
