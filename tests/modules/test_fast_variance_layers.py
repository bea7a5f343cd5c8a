"""The attribute `use_fast_variance` of a layer reaches the measuring of bfloat16 input."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import assert_close, define_moments, define_standardized, exact, standard_normal

import bn_jax as bn

pytestmark = pytest.mark.usefixtures("compile_quickly")

# 64 values of each of four features, the same for every norm.
X = (standard_normal(0, (1, 64, 4)) + jnp.array([[[0.0, 30.0, 330.0, -480.0]]])).astype(
    jnp.bfloat16
)
EPSILON = 1e-6
EXPECTED = define_standardized(X, (0, 1), epsilon=EPSILON)
_, MEAN, VAR = define_moments(X)
TRAIN: dict[str, Any] = {"use_running_average": False, "momentum": 0.0}
NORMS: dict[str, dict[str, Any]] = {
    "BatchNorm": TRAIN,
    "BatchRenorm": {**TRAIN, "r_max": 1.0, "d_max": 0.0},
    "LayerNorm": {"reduction_axes": 1},
    "GroupNorm": {"num_groups": 4},
    "InstanceNorm": {},
}
OF_FLAX = [name for name in NORMS if name != "BatchRenorm"]


def linen(package, name, wrap=lambda apply: apply, **options):
    layer = getattr(package, name)(epsilon=EPSILON, **NORMS[name], **options)
    variables = layer.init(jax.random.key(0), X)
    return wrap(layer.apply)(variables, X, mutable=["batch_stats"])[0]


def of_nnx(package, name, wrap=lambda layer: layer, **options):
    kind = getattr(package, name)
    layer = kind(4, epsilon=EPSILON, rngs=nnx.Rngs(0), **NORMS[name], **options)
    return wrap(layer)(X)


def assert_attribute_matters(measure, expected):
    """What is measured is exact with the guard, and differs from that without."""
    assert_close(measure(use_fast_variance=False), expected)
    without = jax.tree.leaves(measure())
    errors = [
        np.abs(exact(one) - exact(other)).max()
        for one, other in zip(without, jax.tree.leaves(expected), strict=True)
    ]
    assert max(errors) > 1e-4, errors


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_every_layer(api, name):
    call = linen if api == "linen" else of_nnx
    assert_attribute_matters(partial(call, getattr(bn, api), name), EXPECTED)


@pytest.mark.parametrize("name", OF_FLAX)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_every_layer_of_flax_that_is_replaced(api, name):
    call, package = (linen, nn) if api == "linen" else (of_nnx, nnx)
    wrap = getattr(bn, api).replace_norms
    assert_attribute_matters(partial(call, package, name, wrap), EXPECTED)


@pytest.mark.parametrize("given", [False, True])
def test_parts_of_a_batch(given):
    """By moments that are collected, and by statistics that are passed in."""

    def measure(**options):
        layer = bn.linen.BatchNorm(epsilon=EPSILON, **TRAIN, **options)
        variables = layer.init(jax.random.key(0), X)
        if given:
            variables["given_moments"] = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
        _, updates = layer.apply(variables, X, mutable=["batch_stats", "batch_moments"])
        return {name: updates["batch_moments"][name] for name in ("mean", "var")}

    assert_attribute_matters(measure, {"mean": MEAN, "var": VAR})


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_recalibration(api):
    def measure(**options):
        if api == "linen":
            layer = bn.linen.BatchNorm(use_running_average=True, **options)
            forward = partial(layer.apply, mutable=["batch_stats"])
            model = layer.init(jax.random.key(0), X)
            found = bn.recalibrate(forward, model, [X]).batch_stats
        else:
            norm = bn.nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0), **options)
            found = bn.recalibrate(lambda model, x: model(x), norm, [X]).batch_stats
            found = nnx.to_pure_dict(found)
        return {name: found[name] for name in ("mean", "var")}

    assert_attribute_matters(measure, {"mean": MEAN, "var": VAR})
