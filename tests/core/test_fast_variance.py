"""bfloat16 input without the guard: the error against what rounding to bfloat16 has cost."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    assert_close,
    conditionals,
    define_moments,
    define_standardized,
    exact,
    quick,
    standard_normal,
)

import bn_jax as bn

# In units of mean(h**2), with h half a unit in the last place of a value of bfloat16: what sums of
# a relative error of 2**-22 around zero lose of the variance. `_core/moments.py` derives it.
LOSS = 3 * 2.0**-22 / 2.0**-18
# In units of mean(h): the same sums' error of the mean.
LOSS_OF_MEAN = 2.0**-22 / 2.0**-9
RATIOS = (0.0, 1.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4)


def half_units(x):
    """Half a unit in the last place of every value of a bfloat16 array."""
    _, exponents = np.frexp(exact(x))
    return np.where(exact(x) == 0, 0, 2.0 ** (exponents - 9))


def far_from_zero(rows):
    """Features at every ratio of mean and standard deviation, of four distributions.

    The last are all but constant: the larger part of their values is equal.
    """
    rng = np.random.default_rng(rows)
    shape = (rows, 4)
    outlier = np.zeros(shape)
    outlier[rows // 3] = np.sqrt(rows)
    kinds = (
        rng.standard_normal(shape),
        rng.exponential(size=shape) - 1,
        rng.standard_normal(shape) * 10 * (rng.random(shape) < 0.01),
        outlier,
    )
    # The means lie anywhere between two powers of two, where the steps of bfloat16 change.
    means = [ratio * (1 + rng.random(4)) for ratio in RATIOS]
    features = [(values + mean) for values in kinds for mean in means]
    return jnp.asarray(np.concatenate(features, 1), jnp.bfloat16)


def weighted_mean(values, weights):
    return (weights * values).sum(0) / weights.sum(0)


def assert_within_rounding(found, x, mask=None):
    weights = np.broadcast_to(1.0 if mask is None else exact(mask), x.shape)
    _, mean, var = define_moments(x, mask=mask)
    half = half_units(x)
    lost = LOSS * weighted_mean(half**2, weights)
    assert (np.abs(exact(found.var) - var) <= lost).all()
    assert (np.abs(exact(found.mean) - mean) <= LOSS_OF_MEAN * weighted_mean(half, weights)).all()
    # The bound of the design: what moving every value by half a unit changes.
    assert (lost <= weighted_mean(2 * np.abs(exact(x) - mean) * half + half**2, weights)).all()


@pytest.mark.parametrize(
    ("rows", "masking"),
    quick(
        [
            (rows, masking)
            for rows in (64, 1000, 4096, 65_536, 262_144)
            for masking in (None, "boolean", "weights")
        ],
        [(64, None), (1000, "weights"), (4096, None)],
    ),
)
def test_the_error_is_within_the_rounding_of_the_input(rows, masking):
    x = far_from_zero(rows)
    mask = {
        None: None,
        "boolean": standard_normal(1, (rows, 1)) > -0.5,
        "weights": jnp.abs(standard_normal(2, (rows, 1))),
    }[masking]
    assert_within_rounding(jax.jit(partial(bn.moments, axes=0))(x, mask=mask), x, mask)
    # Around the values that are stored, the guard leaves what float32 leaves.
    guarded = jax.jit(partial(bn.moments, axes=0, use_fast_variance=False))(x, mask=mask)
    _, mean, var = define_moments(x, mask=mask)
    # The second term is the rounding of the float64 mean, all that a constant feature has there.
    assert (np.abs(exact(guarded.var) - var) <= 1e-5 * var + (2.0**-50 * mean) ** 2).all()
    assert_close(guarded.mean, mean, tolerance=1e-6)


def test_a_distant_shift_costs_nothing():
    # A running mean far from the data would cost digits that the input has.
    x = standard_normal(3, (4096, 4), jnp.bfloat16)
    stats = bn.init_batch_stats(4)
    stats["mean"] += 1e6
    assert_within_rounding(bn.moments(x, 0, shift=stats["mean"]), x)
    _, updated = bn.batch_norm({}, stats, x, use_running_average=False, momentum=0.0)
    _, mean, var = define_moments(x)
    assert_close(updated, {"mean": mean, "var": var})


@pytest.mark.parametrize("use_fast_variance", [False, True])
def test_float16_is_always_guarded(use_fast_variance):
    x = standard_normal(4, (4096, 4)) + jnp.array([[0.0, 30.0, 300.0, 3000.0]])
    x = x.astype(jnp.float16)
    found = bn.moments(x, 0, use_fast_variance=use_fast_variance)
    _, _, var = define_moments(x)
    assert np.abs(exact(found.var) / var - 1).max() < 1e-5


def test_only_the_guard_is_a_conditional():
    def number_of_conditionals(dtype, **options):
        x = jax.ShapeDtypeStruct((64, 4), dtype)
        moments = jax.jit(partial(bn.moments, axes=0, **options))
        return conditionals(moments.lower(x).compile().as_text())

    assert number_of_conditionals(jnp.bfloat16) == 0
    assert number_of_conditionals(jnp.bfloat16, use_fast_variance=False) == 1
    assert number_of_conditionals(jnp.float16) == 1


# --- every function with the keyword --------------------------------------------------------------

PARAMS, STATS = bn.init_params(4), bn.init_batch_stats(4)
# An example per column, so that the norms of an example have a column each too.
SHAPE, EPSILON = (64, 4), 1e-6


def batch_norm(function, **options):
    train = partial(function, use_running_average=False, momentum=0.0, epsilon=EPSILON, **options)
    return lambda x, **fast: train(PARAMS, STATS, x, **fast)[0]


def by_identity(x, **fast):
    """Batch norm with the parameters that make it the identity, taken from the same batch."""
    params = bn.identity_params(x, epsilon=EPSILON, **fast)
    return (x.astype(jnp.float32) - params["bias"][None]) / params["scale"][None]


NORMS: dict[str, Any] = {
    "batch_norm": batch_norm(bn.batch_norm),
    "ghost batch norm": batch_norm(bn.batch_norm, virtual_batch_size=64),
    "batch_renorm": batch_norm(bn.batch_renorm, r_max=1.0, d_max=0.0),
    "normalize_by_batch": lambda x, **fast: bn.normalize_by_batch(
        PARAMS, STATS, x, epsilon=EPSILON, **fast
    )[0],
    "identity_params": by_identity,
    "layer_norm": lambda x, **fast: bn.layer_norm({}, x.T, dtype=jnp.float32, **fast).T,
    "group_norm": lambda x, **fast: bn.group_norm(
        {}, x.reshape(1, 64, 4), num_groups=4, dtype=jnp.float32, **fast
    )[0],
    "instance_norm": lambda x, **fast: bn.instance_norm(
        {}, x.reshape(1, 64, 4), dtype=jnp.float32, **fast
    )[0],
}


def bound_of_output(x):
    """How far the output may be off where mean and variance are off by their bounds."""
    _, mean, var = define_moments(x)
    half = half_units(x)
    lost = LOSS * (half**2).mean(0)
    smallest = np.sqrt(np.maximum(var - lost, 0) + EPSILON)
    factor = 1 / smallest - 1 / np.sqrt(var + EPSILON)
    return np.abs(exact(x) - mean) * factor + LOSS_OF_MEAN * half.mean(0) / smallest


@pytest.mark.parametrize("name", NORMS)
def test_every_norm(name):
    # At a ratio of 300, bfloat16 still resolves the values.
    x = standard_normal(5, SHAPE) + jnp.array([[0.0, 30.0, 330.0, -480.0]])
    x = x.astype(jnp.bfloat16)
    expected = define_standardized(x, 0, epsilon=EPSILON)
    assert_close(NORMS[name](x, use_fast_variance=False), expected, dtype=jnp.float32)
    error = np.abs(exact(NORMS[name](x)) - expected)
    assert (error <= bound_of_output(x) + 1e-5 * np.maximum(1, np.abs(expected))).all()
    assert error[:, 2:].max() > 1e-4  # So the keyword has an effect.


# --- overflow -------------------------------------------------------------------------------------


def test_squares_that_overflow_count_as_not_finite():
    # One large value, and all of them.
    z = standard_normal(7, (64, 3))
    x = z.at[5, 1].set(3e19).at[:, 2].set(3e19 + 1e18 * z[:, 2]).astype(jnp.bfloat16)
    assert not jnp.isfinite(bn.moments(x, 0).var[1:]).any()
    initial = bn.init_batch_stats(3)
    train = partial(
        bn.batch_norm, bn.init_params(3), initial, x, use_running_average=False, momentum=0.0
    )
    _, mean, var = define_moments(x)
    _, updated = train()
    assert_close(
        updated, {"mean": np.where([1, 0, 0], mean, 0), "var": np.where([1, 0, 0], var, 1)}
    )
    # Flax keeps what has overflowed.
    layer = nn.BatchNorm(use_running_average=False, momentum=0.0)
    _, flax = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    assert not jnp.isfinite(flax["batch_stats"]["var"][1:]).any()
    # The guard measures again.
    y, guarded = train(use_fast_variance=False)
    assert_close(guarded, {"mean": mean, "var": var})
    assert_close(y, define_standardized(x, 0, epsilon=1e-5))
