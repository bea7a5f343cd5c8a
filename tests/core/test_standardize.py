import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    assert_close,
    define_affine,
    differentiate,
    exact,
    fuses_reductions,
    standard_normal,
    written_out,
)

import bn_jax as bn
from bn_jax._core.standardize import standardize
from bn_jax._core.types import Transform

SHAPE = (4, 3)
# As of a batch norm, and of a layer norm, whose multiplier is as large as x.
STATISTICS = [(1, 3), (4, 1)]


pytestmark = pytest.mark.usefixtures("strict_promotion")


def make_transform(present=("scale", "bias"), statistics=(1, 3)):
    scale, bias = (standard_normal(seed, (1, 3)) for seed in (1, 2))
    var = jnp.abs(standard_normal(3, statistics)) + 0.1
    return Transform(
        shift=standard_normal(0, statistics),
        delta=jnp.zeros(statistics),
        var_plus_epsilon=var,
        scale=scale if "scale" in present else None,
        bias=bias if "bias" in present else None,
    )


def define(x, shift, delta, var_plus_epsilon, scale, bias):
    """By features, or by rows as in a layer norm, whose scale and bias are of the features."""
    mean, axis = exact(shift) + exact(delta), -1 if len(shift) == 1 else 0
    y = define_affine(x, mean, var_plus_epsilon, axis=axis, epsilon=0)
    return define_affine(y, np.zeros(3), np.ones(3), scale, bias, epsilon=0)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("present", [(), ("scale",), ("bias",), ("scale", "bias")])
def test_value_and_derivatives_are_those_of_the_definition(present, statistics):
    x, weights = standard_normal(4, SHAPE), standard_normal(5, SHAPE)
    transform = make_transform(present, statistics)
    assert_close(standardize(jnp.float32, x, None, transform), define(x, *transform))

    def loss(x, transform):
        return jnp.vdot(jnp.sin(standardize(jnp.float32, x, None, transform)), weights)

    gradients = jax.grad(loss, argnums=(0, 1))(x, transform)
    arguments = {"x": x, **transform._asdict()}
    computed = {"x": gradients[0], **gradients[1]._asdict()}
    for name, value in arguments.items():
        if value is None:
            assert computed[name] is None
            continue

        def with_value(value, name=name):
            return np.vdot(np.sin(define(**{**arguments, name: value})), np.float64(weights))

        assert_close(computed[name], differentiate(with_value, value))


@pytest.mark.parametrize("statistics", STATISTICS)
def test_forward_and_reverse_agree(statistics):
    x, dx, cotangent = (standard_normal(seed, SHAPE) for seed in (6, 7, 8))
    transform = make_transform(statistics=statistics)
    change = jax.tree.map(jnp.cos, transform)

    def function(x, transform):
        return standardize(jnp.float32, x, None, transform)

    _, tangent = jax.jvp(function, (x, transform), (dx, change))
    _, pull = jax.vjp(function, x, transform)
    pulled = jax.tree.leaves(pull(cotangent))
    inner = sum(
        float(jnp.vdot(a, b)) for a, b in zip(pulled, jax.tree.leaves((dx, change)), strict=True)
    )
    np.testing.assert_allclose(float(jnp.vdot(tangent, cotangent)), inner, rtol=1e-5)


def test_a_large_mean_leaves_no_rounding():
    mean = np.float64(12345.678901)
    shift = jnp.full((1, 3), np.float32(mean))
    delta = jnp.full((1, 3), np.float32(mean - np.float64(np.float32(mean))))
    x = standard_normal(9, SHAPE) + np.float32(mean)
    transform = Transform(shift, delta, jnp.ones((1, 3)), None, None)
    y = standardize(jnp.float32, x, None, transform)
    assert_close(y, np.float64(x) - mean, tolerance=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_result_is_rounded_once(dtype):
    x = standard_normal(10, SHAPE, dtype)
    transform = make_transform()
    y = standardize(dtype, x, None, transform)
    expected = jnp.asarray(define(x.astype(jnp.float32), *transform), jnp.float32).astype(dtype)
    assert y.dtype == dtype
    assert (y == expected).mean() > 0.9
    assert_close(y, expected)


def in_rows(transform, rows):
    """The transform of some rows of x."""
    return jax.tree.map(lambda leaf: leaf[rows] if len(leaf) > 1 else leaf, transform)


@pytest.mark.parametrize("statistics", STATISTICS)
def test_what_is_masked_and_not_finite_reaches_no_parameter(statistics):
    x = standard_normal(11, SHAPE).at[2].set(jnp.nan)
    mask = jnp.array([[True], [True], [False], [True]])

    def loss(transform, mask):
        y = standardize(jnp.float32, x, mask, transform)
        return jnp.sum(jnp.where(mask, y, 0))

    transform = make_transform(statistics=statistics)
    rows = jnp.array([0, 1, 3])

    def loss_of_rows(transform):
        return jnp.sum(standardize(jnp.float32, x[rows], None, in_rows(transform, rows)))

    expected = jax.grad(loss_of_rows)(transform)
    assert_close(jax.grad(loss)(transform, mask), expected)
    unmasked = jax.grad(loss)(transform, jnp.ones((4, 1), bool))
    assert jnp.isnan(unmasked.scale).all()


@fuses_reductions
@pytest.mark.parametrize(
    ("dtype", "made"), [("float32", ["f32", "f32"]), ("bfloat16", ["bf16", "bf16", "f32"])]
)
def test_a_cpu_writes_out_the_results_and_in_half_precision_the_converted_cotangent(dtype, made):
    x = jax.ShapeDtypeStruct((512, 48), dtype)
    batch_stats = bn.init_batch_stats(48)

    def forward_and_backward(params, x, cotangent):
        def forward(params, x):
            return bn.batch_norm(params, batch_stats, x, use_running_average=False, dtype=dtype)

        y, pull, batch_stats_after = jax.vjp(forward, params, x, has_aux=True)
        return y, batch_stats_after, pull(cotangent)

    program = jax.jit(forward_and_backward).lower(bn.init_params(48), x, x).compile().as_text()
    assert written_out(program, x.shape) == made


@fuses_reductions
@pytest.mark.parametrize(("norm", "made"), [(bn.layer_norm, 4), (bn.rms_norm, 3)])
def test_a_norm_of_rows_writes_out_deviations_and_what_is_normalized_alone(norm, made):
    x = jax.ShapeDtypeStruct((32, 28, 28, 128), jnp.float32)

    def forward_and_backward(params, x, cotangent):
        y, pull = jax.vjp(norm, params, x)
        return y, pull(cotangent)

    program = jax.jit(forward_and_backward).lower(bn.init_params(128), x, x).compile().as_text()
    assert written_out(program, x.shape) == ["f32"] * made
