"""Kernels that cannot hold their product with a norm: quantized, constant, or in float16."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import exact, standard_normal

import bn_jax as bn
from bn_jax._program import holds_products

pytestmark = pytest.mark.usefixtures("compile_quickly")


def normalize(variables, y, name="norm"):
    params, stats = variables["params"][name], variables["batch_stats"][name]
    return bn.batch_norm(params, stats, y, use_running_average=True)[0]


def with_norm(features, var=1.0, **params):
    """Variables of one norm, and other parameters."""
    stats = {"mean": standard_normal(7, features), "var": jnp.full(features, var)}
    norm = {"scale": standard_normal(8, features), "bias": standard_normal(9, features)}
    return {"params": {"norm": norm, **params}, "batch_stats": {"norm": stats}}


def assert_same(folded, forward, variables, x, tolerance=1e-6):
    actual, expected = folded.apply(folded.params, x), jax.jit(forward)(variables, x)
    assert actual.dtype == expected.dtype
    error = np.abs(exact(actual) - exact(expected)).max() / np.abs(exact(expected)).max()
    assert error < tolerance


def after_integers(variables, x):
    """A product of integers that gives floats."""
    kernel = variables["params"]["q"]
    return normalize(variables, jnp.matmul(x, kernel, preferred_element_type=jnp.float32))


def after_integers_summed(variables, x):
    """A product of integers that gives integers."""
    kernel = variables["params"]["q"]
    y = jnp.matmul(x, kernel, preferred_element_type=jnp.int32)
    return normalize(variables, y.astype(jnp.float32) * 0.02)


def after_codes(variables, x):
    """A product of floats with the codes of a kernel."""
    numbers = (((1,), (0,)), ((), ()))
    y = lax.dot_general(x, variables["params"]["q"], numbers, preferred_element_type=jnp.float32)
    return normalize(variables, y)


def after_rounding(variables, x):
    """A product with a kernel that the program itself rounds to codes."""
    codes = variables["params"]["q"].astype(jnp.float8_e5m2)
    numbers = (((1,), (0,)), ((), ()))
    return normalize(
        variables, lax.dot_general(x, codes, numbers, preferred_element_type=jnp.float32)
    )


INTEGERS = np.random.default_rng(0).integers(-127, 128, (4, 5))
LEFT = {
    "int8": (after_integers, jnp.int8, "int8"),
    "int8 to int32": (after_integers_summed, jnp.int8, "int8"),
    "uint4": (after_codes, jnp.uint4, "uint4"),
    "float8_e4m3fn": (after_codes, jnp.float8_e4m3fn, "float8_e4m3fn"),
    "float8_e5m2": (after_codes, jnp.float8_e5m2, "float8_e5m2"),
    "rounded to float8_e5m2": (after_rounding, jnp.float32, "float8_e5m2"),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_norm_after_a_quantized_kernel_is_left(name):
    forward, dtype, in_dtype = LEFT[name]
    values = INTEGERS % 16 if dtype == jnp.uint4 else INTEGERS
    variables = with_norm(5, var=1e4, q=jnp.asarray(values).astype(dtype))
    is_integer = forward in (after_integers, after_integers_summed)
    x = standard_normal(1, (3, 4)) * 50
    x = x.astype(jnp.int8) if is_integer else x
    folded = bn.fold(forward, variables, x)
    (norm,) = folded.report
    assert norm.into is None
    assert f"kernel q is in {in_dtype}, which cannot hold its product with a norm" in str(
        norm.reason
    )
    assert folded.params["q"].dtype == dtype
    assert_same(folded, forward, variables, x)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_a_quantized_kernel_that_the_program_casts_is_stored_as_cast(dtype):
    def forward(variables, x):
        return normalize(variables, x @ variables["params"]["dense"]["q"].astype(jnp.float32))

    variables = with_norm(5, dense={"q": jnp.asarray(INTEGERS).astype(dtype)})
    x = standard_normal(1, (3, 4))
    folded = bn.fold(forward, variables, x)
    assert [norm.into for norm in folded.report] == ["dense/kernel"]
    assert folded.params["dense"]["kernel"].dtype == jnp.float32
    assert_same(folded, forward, variables, x)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_a_norm_before_a_quantized_kernel_is_left(dtype):
    def forward(variables, x):
        numbers = (((1,), (0,)), ((), ()))
        y, kernel = normalize(variables, jnp.tanh(x)), variables["params"]["q"]
        return lax.dot_general(y, kernel, numbers, preferred_element_type=jnp.float32)

    variables = with_norm(4, q=jnp.asarray(INTEGERS).astype(dtype))
    x = standard_normal(1, (3, 4))
    folded = bn.fold(forward, variables, x)
    expected = f"its output goes to a linear layer whose kernel q is in {jnp.dtype(dtype).name}"
    assert expected in str(folded.report[0].reason)
    assert_same(folded, forward, variables, x)


def test_values_that_are_rounded_to_float8_before_a_norm_stay_so():
    def forward(variables, x):
        y = x @ variables["params"]["kernel"]
        return normalize(variables, y.astype(jnp.float8_e4m3fn).astype(jnp.float32))

    variables = with_norm(5, kernel=standard_normal(2, (4, 5)))
    x = standard_normal(1, (3, 4))
    folded = bn.fold(forward, variables, x)
    assert folded.report[0].into is None
    assert_same(folded, forward, variables, x)


def test_results_in_float8_are_not_those_of_a_norm():
    def forward(variables, x):
        kernel = variables["params"]["kernel"]
        y = jnp.matmul(x, kernel, preferred_element_type=jnp.float8_e5m2)
        return normalize(variables, y.astype(jnp.float32))

    variables = with_norm(5, kernel=standard_normal(2, (4, 5)))
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    assert "result is in float8_e5m2" in str(bn.fold(forward, variables, x).report[0].reason)


@pytest.mark.parametrize("is_before", [True, False])
def test_a_constant_kernel_is_no_parameter(is_before):
    constant = np.asarray(standard_normal(3, (4, 4)))

    def forward(variables, x):
        if is_before:
            return jnp.tanh(normalize(variables, jnp.tanh(x)) @ constant)
        return jnp.tanh(normalize(variables, x @ constant))

    variables = with_norm(4)
    x = standard_normal(1, (3, 4))
    folded = bn.fold(forward, variables, x)
    reason = str(folded.report[0].reason)
    assert "a linear layer whose kernel is a constant, not a variable" in reason
    assert jax.tree.map(jnp.shape, folded.params) == {"norm": {"bias": (4,), "scale": (4,)}}
    assert_same(folded, forward, variables, x)


def test_a_constant_kernel_may_depend_on_the_shapes():
    def forward(variables, x):
        mean = jnp.full(x.shape[1], 1 / x.shape[1])
        return jnp.einsum("nlf,l->nf", normalize(variables, jnp.tanh(x)), mean)

    variables = with_norm(4)
    x = standard_normal(1, (3, 6, 4))
    folded = bn.fold(forward, variables, x)
    assert_same(folded, forward, variables, x)
    assert_same(folded, forward, variables, x[:, :5])


def half(kernel, dtype=None):
    """A dense layer that computes in a dtype, and its norm."""

    def forward(variables, x):
        stored = variables["params"]["kernel"]
        compute = stored.dtype if dtype is None else dtype
        return normalize(
            variables, (x.astype(compute) @ stored.astype(compute)).astype(jnp.float32)
        )

    return forward, kernel


@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize("is_stored", [True, False])
def test_float16_that_loses_a_feature_is_an_error(size, is_stored):
    stored = jnp.float16 if is_stored else jnp.float32
    forward, kernel = half(jnp.ones((4, 5), stored), None if is_stored else jnp.float16)
    variables = with_norm(5, var=1.0, kernel=kernel)
    # One feature alone is lost.
    variables["params"]["norm"]["scale"] = jnp.ones(5).at[2].set(size)
    x = standard_normal(1, (3, 4))
    word = "large as 1e\\+06" if size > 1 else "small as 1e-06"
    fix = "fold the variables in float32" if is_stored else "compute in float32 or bfloat16"
    with pytest.raises(
        ValueError, match=f"'kernel' with its norm is as {word}, which float16.*{fix}"
    ):
        bn.fold(forward, variables, x)
    # What the error advises works.
    if is_stored:
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)
    else:
        forward, _ = half(kernel, jnp.bfloat16)
    folded = bn.fold(forward, variables, x)
    assert folded.report[0].into == "kernel"
    assert_same(folded, forward, variables, x, 1e-6 if is_stored else 2e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float16, 2e-3), (jnp.bfloat16, 1.6e-2)])
def test_kernels_in_half_precision_are_rounded_once_more(dtype, tolerance):
    forward, kernel = half(standard_normal(2, (64, 5), dtype))
    variables = with_norm(5, var=64.0, kernel=kernel)
    x = standard_normal(1, (32, 64))
    folded = bn.fold(forward, variables, x)
    assert folded.report[0].into == "kernel" and folded.params["kernel"].dtype == dtype
    assert_same(folded, forward, variables, x, tolerance)


def test_a_feature_that_is_off_is_no_error():
    forward, kernel = half(jnp.ones((4, 5), jnp.float16))
    variables = with_norm(5, kernel=kernel)
    variables["params"]["norm"]["scale"] = jnp.ones(5).at[2].set(0)
    x = standard_normal(1, (3, 4))
    assert_same(bn.fold(forward, variables, x), forward, variables, x, 2e-3)


def test_dtypes_that_hold_products():
    held = partial(map, lambda name: holds_products(jnp.dtype(name)))
    assert all(held(["bfloat16", "float16", "float32", "float64", "complex64"]))
    assert not any(held(["int8", "uint4", "bool", "int32", "float8_e4m3fn", "float8_e5m2"]))
    assert not any(held(["float4_e2m1fn", "float8_e8m0fnu"]))


def test_a_scale_that_float16_cannot_hold_is_an_error():
    def forward(norm, x):
        return jnp.tanh(x * lax.rsqrt(norm["var"]) * norm["scale"])

    norm = {"var": jnp.full((1, 4), 1e-3, jnp.float16), "scale": jnp.full((1, 4), 6e4, jnp.float16)}
    with pytest.raises(
        ValueError, match=r"'scale' with its norm is as large as 1\.9e\+06, which fl"
    ):
        bn.fold(forward, norm, jnp.ones((2, 4), jnp.float16))
    norm = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), norm)
    assert bn.fold(forward, norm, jnp.ones((2, 4))).report[0].into is None
