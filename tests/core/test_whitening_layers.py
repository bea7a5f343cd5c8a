"""Whitening by modules, and under the tools around a norm."""

import functools
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from support import assert_close, correlated

import bn_jax as bn

TRAIN: Any = partial(bn.whitening_norm, use_running_average=False)
EVALUATE: Any = partial(bn.whitening_norm, use_running_average=True)
COMPLETE = 20

pytestmark = pytest.mark.usefixtures("strict_promotion", "compile_quickly")


# --- modules ------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = dict(momentum=0.7, iterations=COMPLETE, group_size=3, epsilon=1e-3)


def two_steps(options, **rest):
    """What the function makes of two batches in training, and of the second in evaluation."""
    params, stats = bn.init_params(6), bn.init_whitening_stats(6, group_size=3, **rest)
    ys = []
    for x in batches():
        y, stats = TRAIN(params, stats, x, **options)
        ys.append(y)
    return ys, stats, EVALUATE(params, stats, x, **options)[0]


def batches():
    return [correlated(seed, (10, 6), offset=seed) for seed in range(2)]


def run_linen(options):
    layer = bn.linen.WhiteningNorm(**options)
    variables = layer.init(jax.random.key(0), batches()[0][:1], use_running_average=False)
    ys = []
    for x in batches():
        y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, **updates}
        ys.append(y)
    return ys, variables["batch_stats"], layer.apply(variables, x, use_running_average=True)


def run_nnx(options):
    layer = bn.nnx.WhiteningNorm(6, **options, rngs=nnx.Rngs(0))
    ys = [layer(x) for x in batches()]
    layer.eval()
    y = layer(batches()[1])
    return ys, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)), y


@pytest.mark.parametrize("run", [run_linen, run_nnx])
@pytest.mark.parametrize("momentum", [0.7, None])
def test_modules_compute_what_the_function_does(run, momentum):
    options = OPTIONS | {"momentum": momentum}
    assert_close(run(options), two_steps(options, use_count=momentum is None), tolerance=1e-12)


def test_modules_take_masks_and_switches():
    x, mask = batches()[1], jnp.arange(10)[:, None] < 7
    layer = bn.linen.WhiteningNorm(**OPTIONS, use_running_average=False, use_bias=False)
    variables = layer.init(jax.random.key(0), x)
    assert set(variables["params"]) == {"scale"}
    y, updates = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    start = bn.init_whitening_stats(6, group_size=3)
    expected, stats = TRAIN({}, start, x, mask=mask, **OPTIONS)
    assert_close((y, updates["batch_stats"]), (expected, stats))
    ours = bn.nnx.WhiteningNorm(6, **OPTIONS, use_scale=False, rngs=nnx.Rngs(0))
    assert_close(ours(x, mask=mask, update_running_average=False), expected)
    assert_close(nnx.to_pure_dict(nnx.state(ours, nnx.BatchStat)), start)


def test_linen_says_what_is_missing():
    layer, x = bn.linen.WhiteningNorm(), batches()[0]
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    with pytest.raises(ValueError, match=r"WhiteningNorm\(use_running_average=not train\)"):
        layer.apply(variables, x)
    with pytest.raises(ValueError, match="batch_stats is immutable, but the top-level Whitening"):
        layer.apply(variables, x, use_running_average=False)
    with pytest.raises(ValueError, match="batch_stats has nothing for the top-level WhiteningNorm"):
        layer.apply({"params": variables["params"]}, x, use_running_average=True)


def test_whitening_is_frozen_as_batch_norms_are():
    x = batches()[1]
    layer = bn.linen.WhiteningNorm(**OPTIONS, use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    y, updates = bn.linen.freeze(layer.apply)(variables, x, mutable=["batch_stats"])
    expected = layer.clone(use_running_average=True).apply(variables, x)
    assert_close((y, updates["batch_stats"]), (expected, variables["batch_stats"]))
    ours = bn.nnx.freeze(bn.nnx.WhiteningNorm(6, **OPTIONS, rngs=nnx.Rngs(0)))
    ours.train()
    assert_close(ours(x), expected)
    assert_close(ours.mean[...], variables["batch_stats"]["mean"])


# --- tools around it ----------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = bn.linen.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        x = bn.linen.WhiteningNorm(use_running_average=not train, group_size=3)(nn.Dense(6)(x))
        return bn.linen.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))


@functools.cache
def net():
    """A model, with statistics that two batches have entered, as a function of `audit`'s form."""
    x = batches()[0]
    variables = Net().init(jax.random.key(0), x, train=False)

    def forward(variables, x, train):
        return Net().apply(variables, x, train=train, mutable=["batch_stats"])

    for _ in range(2):
        variables |= forward(variables, x, True)[1]
    return variables, forward


def test_recalibrate_refuses_what_it_does_not_measure():
    variables, forward = net()
    with pytest.raises(ValueError, match=r"whitening norms, \['WhiteningNorm_0'\].*momentum=None"):
        bn.recalibrate(partial(forward, train=False), variables, batches())
    model = bn.nnx.WhiteningNorm(6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="whitening norms"):
        bn.recalibrate(lambda model, x: model(x), model, batches())


def test_fold_keeps_the_output():
    x = batches()[0]
    variables, forward = net()
    folded = bn.fold(lambda variables, x: forward(variables, x, False)[0], variables, x)
    expected = forward(variables, x, False)[0]
    assert_close(folded.apply(folded.params, x), expected)
    assert [one.path for one in folded.report if one.into] == ["BatchNorm_0", "BatchNorm_1"]


def test_audit_says_what_it_did_not_examine():
    variables, forward = net()
    with jax.numpy_dtype_promotion("standard"):
        found = bn.audit(forward, variables, batches()[0])
    assert [layer.path for layer in found.layers] == ["BatchNorm_0", "BatchNorm_1"]
    assert found.unexamined == ("WhiteningNorm_0",)
    assert "not examined: WhiteningNorm_0 (whitening)" in str(found)


def test_as_affine_refuses_a_covariance():
    whitening: Any = bn.init_whitening_stats(6)
    with pytest.raises(ValueError, match=r"batch_stats lacks \['var'\]"):
        bn.as_affine({}, whitening)
