"""What Linen and NNX layers do alike: attributes, switches, statistics."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interfaces import INTERFACES, call
from support import (
    assert_close,
    define_affine,
    define_batch_norm,
    define_evaluation,
    standard_normal,
)

import bn_jax as bn

pytestmark = pytest.mark.parametrize("interface", INTERFACES.values(), ids=INTERFACES)

PLAIN = {"params": bn.init_params(3), "batch_stats": bn.init_batch_stats(3)}


def differentiated(interface, x, **options):
    """Gradients, output and statistics after one call."""
    layer = interface(**options)
    return *layer.gradient(call, x), layer.stats


def test_the_cumulative_average_keeps_a_count(interface):
    layer = interface(momentum=None, fresh=True)
    expected = bn.init_batch_stats(3, use_count=True)
    assert_close(layer.stats, expected)
    xs = standard_normal(12, (4, 8, 3)) + 5
    for x in xs:
        layer(x)
        _, expected = define_batch_norm({}, expected, x, momentum=None)
    assert_close(layer.stats, expected)
    evaluated = layer.evaluating()(xs[0])
    assert_close(evaluated, define_affine(xs[0], expected["mean"], expected["var"]))
    assert "count" not in interface(fresh=True).stats


def test_the_variance_far_from_zero(interface):
    """google/flax#1491."""
    x = 1000 + 0.01 * standard_normal(34, (512, 3))
    ours, flax = (interface(kind, momentum=0.0) for kind in (interface.ours, interface.flax))
    expected, stats = define_batch_norm(ours.params, ours.stats, x, momentum=0.0)
    assert_close((ours(x), ours.stats), (expected, stats))
    assert np.abs(flax(x) - expected).max() > 1


def test_complex_input_has_a_complex_mean(interface):
    x = standard_normal(13, (16, 3), jnp.complex64) + (2 - 3j)
    layer = interface(momentum=0.5, fresh=True, x_dtype=x.dtype)
    y, stats = define_batch_norm(PLAIN["params"], PLAIN["batch_stats"], x, momentum=0.5)
    assert_close(layer(x), y, dtype=jnp.complex64)
    assert_close(layer.stats, stats)
    expected = define_affine(x, stats["mean"], stats["var"])
    assert_close(layer.evaluating()(x), expected, dtype=jnp.complex64)


def test_new_attributes_reach_the_core(interface):
    x = standard_normal(7, (8, 3))
    options: dict[str, Any] = dict(virtual_batch_size=4, running_var_ddof=1, activation=jax.nn.silu)
    layer = interface(**options)
    expected = bn.batch_norm(
        layer.params, layer.stats, x, use_running_average=False, residual=x, **options
    )
    y = layer(x, residual=x)
    chex.assert_trees_all_equal((y, layer.stats), expected)


def test_an_empty_batch_changes_nothing(interface):
    """pytorch#74944."""
    x = jnp.zeros((0, 3))
    ours, flax = (interface(kind) for kind in (interface.ours, interface.flax))
    params, stats = ours.params, ours.stats
    of_params, of_x, y = ours.gradient(call, x, jit=False)
    assert y.shape == of_x.shape == x.shape
    chex.assert_trees_all_equal(of_params, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(ours.stats, stats)
    flax(x)
    assert all(np.isnan(leaf).all() for leaf in flax.stats.values())


# --- switches -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use,update,in_call",
    [
        (False, None, True), (False, False, False), (False, True, True),
        (True, None, False), (True, False, True), (True, True, False),
    ],
)  # fmt: skip
def test_where_statistics_come_from_and_whether_they_update(interface, use, update, in_call):
    modes = dict(use_running_average=use, update_running_average=update)
    unset = dict(use_running_average=None, update_running_average=None)
    layer = interface(momentum=0.5, **(unset if in_call else modes))
    x = standard_normal(80, (8, 3)) + 2
    has_none = interface.api == "linen" and not (use or update or update is None or in_call)
    assert has_none == (not layer.stats)
    params, stats = layer.params, layer.stats or bn.init_batch_stats(3)
    y, updated = define_batch_norm(params, stats, x, momentum=0.5)
    if use:
        y = define_evaluation(params, stats, x)
    updates = (not use) if update is None else update
    assert_close(layer(x, **(modes if in_call else {})), y)
    if not has_none:
        assert_close(layer.stats, updated if updates else stats)


@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"use_bias": False}])
def test_parameters_that_do_not_train(interface, options):
    x = standard_normal(81, (8, 3))
    trains, fixed = (
        differentiated(interface, x, train_params=train_params, **options)
        for train_params in (True, False)
    )
    assert_close(fixed[1:], trains[1:])
    assert all(np.abs(leaf).max() > 0.01 for leaf in trains[0].values())
    assert len(trains[0]) == 2 - len(options)
    chex.assert_trees_all_equal(fixed[0], jax.tree.map(jnp.zeros_like, trains[0]))


@pytest.mark.parametrize(
    "modes",
    [
        {},
        {"use_running_average": False},
        {"update_running_average": True},
        {"use_running_average": False, "update_running_average": True},
    ],
)
def test_frozen_whatever_the_call_says(interface, modes):
    x = standard_normal(82, (8, 3))
    layer = interface(frozen=True, update_running_average=True)
    stats = layer.stats
    assert_close(layer(x, **modes), define_evaluation(layer.params, stats, x))
    chex.assert_trees_all_equal(layer.stats, stats)


def test_a_frozen_layer_needs_no_mode(interface):
    x = standard_normal(82, (8, 3))
    layer = interface(frozen=True, use_running_average=None)
    assert_close(layer(x), define_evaluation(layer.params, layer.stats, x))
