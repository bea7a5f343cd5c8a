import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    assert_close,
    define_moments,
    differentiate,
    fuses_reductions,
    quick,
    standard_normal,
    written_out,
)

import bn_jax as bn
from bn_jax._core.axes import Reduction
from bn_jax._core.moments import CANCELLATION_THRESHOLD, cancels, centred_moments

pytestmark = pytest.mark.usefixtures("strict_promotion")


def relative_error_of_var(x, **arguments):
    found = jax.jit(partial(bn.moments, axes=0, **arguments))(x)
    _, _, var = define_moments(x)
    return np.abs(np.asarray(found.var, np.float64) / var - 1).max()


@pytest.mark.parametrize("axes", [0, -1, (0, 1), (0, 2), (-1, 0), None])
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_definition(axes, masked):
    x = standard_normal(0, (5, 6, 7)) * 3 + 2
    mask = standard_normal(1, (5, 6, 7)) > 0 if masked else None
    found = bn.moments(x, axes, mask=mask)
    reduced = range(3) if axes is None else np.atleast_1d(axes)
    kept = tuple(axis for axis in range(3) if axis not in [a % 3 for a in reduced])
    count, mean, var = define_moments(x, kept, mask)
    assert_close(jnp.broadcast_to(found.count, count.shape), count)
    assert_close((found.mean, found.var), (mean, var), dtype=jnp.float32)


@pytest.mark.parametrize("offset", [0.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, -1e6])
@pytest.mark.parametrize("rows", [2, 17, 4096])
def test_variance_at_any_offset(offset, rows):
    assert relative_error_of_var(standard_normal(2, (rows, 8)) + np.float32(offset)) < 1e-5


@pytest.mark.parametrize("shift", [1e6, -1e6, 3.0])
def test_variance_with_a_stale_shift(shift):
    x = standard_normal(3, (4096, 8))
    assert relative_error_of_var(x, shift=jnp.full(8, shift)) < 1e-5


@pytest.mark.parametrize("side", [0.98, 1.02])
def test_variance_on_both_sides_of_the_threshold(side):
    z = np.asarray(standard_normal(4, (4096, 64)))
    z = (z - z.mean(0)) / z.std(0)
    x = jnp.asarray(z + side * np.sqrt(CANCELLATION_THRESHOLD))
    zeros = jnp.zeros((1, 64))
    delta = jnp.mean(x, 0, keepdims=True)
    assert bool(cancels(delta, jnp.var(x, 0, keepdims=True)).all()) == (side > 1)
    kept_its_shift = (centred_moments(Reduction((0,)), x, None, zeros).shift == 0).all()
    assert kept_its_shift == (side < 1)
    assert relative_error_of_var(x) < 1e-5


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_constant_at_the_shift_asks_for_no_second_pass(value):
    found = centred_moments(
        Reduction((0,)), jnp.full((16, 2), value), None, jnp.full((1, 2), value)
    )
    assert not cancels(found.delta, found.var).any()
    assert (found.var == 0).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_feature_asks_for_no_second_pass(poison):
    x = standard_normal(21, (16, 2)).at[3, 1].set(poison)
    found = centred_moments(Reduction((0,)), x, None, jnp.full((1, 2), 0.25))
    assert (found.shift == 0.25).all()
    assert_close(found.var[0, :1], define_moments(x[:, :1])[2])
    assert not jnp.isfinite(found.var[0, 1])


def test_squares_that_overflow_are_measured_again():
    x = standard_normal(5, (256, 4)) * 1e16 + 1e20
    assert relative_error_of_var(x) < 1e-5


def test_a_constant_feature_has_variance_zero():
    x = jnp.full((1000, 3), 12345.678)
    found = bn.moments(x, 0)
    assert (found.var == 0).all()
    assert_close(found.mean, np.full(3, np.float32(12345.678)))


def test_no_variance_is_negative():
    constants = jnp.abs(standard_normal(26, (1, 4096))) + 1
    x = jnp.broadcast_to(constants, (7, 4096))
    found = centred_moments(Reduction((0,)), x, None, 3e8 * constants)
    assert (found.var >= 0).all()


def test_the_mask_is_a_weight():
    x, weights = standard_normal(6, (6, 3)), jnp.array([1.0, 2.0, 0.0, 3.0, 1.0, 0.0])[:, None]
    repeated = jnp.repeat(x, jnp.array([1, 2, 0, 3, 1, 0]), axis=0)
    assert_close(bn.moments(x, 0, mask=weights), bn.moments(repeated, 0))
    assert_close(bn.moments(x, 0, mask=weights * 0.5)[1:], bn.moments(repeated, 0)[1:])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_what_is_masked_does_not_enter(poison, dtype):
    x, mask = standard_normal(7, (8, 3)), jnp.array([1, 0, 1, 1, 0, 1, 1, 1], dtype)[:, None]
    poisoned = jnp.where(mask.astype(bool), x, poison)
    assert_close(bn.moments(poisoned, 0, mask=mask), bn.moments(x[mask[:, 0].astype(bool)], 0))


def test_nothing_valid_counts_zero():
    x = jnp.full((4, 2), jnp.nan)
    found = bn.moments(x, 0, mask=jnp.zeros((4, 1), bool))
    assert_close(found, bn.Moments(jnp.zeros(()), jnp.zeros(2), jnp.zeros(2)))
    shifted = bn.moments(x, 0, mask=jnp.zeros((4, 1), bool), shift=jnp.ones(2))
    assert_close(shifted, found)
    per_feature = bn.moments(jnp.ones((4, 2)), 0, mask=jnp.array([[True, False]]))
    assert_close(per_feature, bn.Moments(jnp.array([4, 0]), jnp.array([1, 0]), jnp.zeros(2)))
    assert_close(bn.moments(jnp.zeros((0, 2)), 0), found)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("sizes", [(5, 5), (1, 9), (3, 0, 7), (2, 2, 2, 4)])
def test_merged_is_concatenated(sizes, offset):
    x = standard_normal(8, (sum(sizes), 4)) + np.float32(offset)
    parts = jnp.split(x, np.cumsum(sizes)[:-1].tolist())
    merged = bn.merge_moments(*(bn.moments(part, 0) for part in parts))
    count, mean, var = define_moments(x)
    assert_close(merged.count, count[0])
    # The parts' means are rounded to float32, so the spread between them is known to that.
    between = max(1e-5, 4 * offset * 2**-24)
    assert_close((merged.mean, merged.var), (mean, var), tolerance=between)


def test_merging_ignores_what_an_empty_set_holds():
    full = bn.moments(standard_normal(9, (6, 3)), 0)
    empty = bn.Moments(jnp.zeros(()), jnp.full(3, jnp.nan), jnp.full(3, jnp.inf))
    assert_close(bn.merge_moments(empty, full), full)
    assert_close(bn.merge_moments(full, empty), full)


def test_merging_equal_means_is_exact():
    mean = jnp.linspace(1e3, 1e6, 257)
    parts = [bn.Moments(jnp.float32(count), mean, jnp.zeros(257)) for count in range(1, 8)]
    merged = bn.merge_moments(*parts)
    assert (merged.mean == mean).all()
    assert (merged.var == 0).all()


def test_merging_takes_counts_per_feature():
    x, mask = standard_normal(10, (9, 3)), standard_normal(11, (9, 3)) > 0
    parts = [bn.moments(x[rows], 0, mask=mask[rows]) for rows in (slice(0, 4), slice(4, 9))]
    assert_close(bn.merge_moments(*parts), bn.Moments(*define_moments(x, mask=mask)))


@pytest.mark.parametrize("masked", [False, True])
def test_derivative_is_that_of_the_definition(masked):
    x, dx = standard_normal(12, (6, 3)) + 3, standard_normal(13, (6, 3))
    mask = standard_normal(14, (6, 3)) + 1.0 if masked else None
    mask = None if mask is None else jnp.maximum(mask, 0)

    def mean_and_var(x):
        found = bn.moments(x, 0, mask=mask)
        return found.mean, found.var

    _, forward = jax.jvp(mean_and_var, (x,), (dx,))
    step = 1e-5
    _, *above = define_moments(np.float64(x) + step * np.float64(dx), mask=mask)
    _, *below = define_moments(np.float64(x) - step * np.float64(dx), mask=mask)
    expected = tuple((a - b) / (2 * step) for a, b in zip(above, below, strict=True))
    assert_close(forward, expected)
    _, pull = jax.vjp(mean_and_var, x)
    cotangent = standard_normal(15, (3,)), standard_normal(16, (3,))
    (reverse,) = pull(cotangent)
    inner = sum(float(jnp.vdot(a, b)) for a, b in zip(cotangent, forward, strict=True))
    np.testing.assert_allclose(float(jnp.vdot(reverse, dx)), inner, rtol=1e-5)


@pytest.mark.parametrize(
    ("offset", "masked"),
    quick(
        list(itertools.product([0, 1e4 - 3e4j], [False, True])), [(0, True), (1e4 - 3e4j, False)]
    ),
)
def test_complex_moments_are_those_of_the_definition(offset, masked):
    x = standard_normal(22, (20, 3), jnp.complex64) + np.complex64(offset)
    mask = jnp.abs(standard_normal(23, (20, 1))) if masked else None
    _, mean, var = define_moments(x, mask=mask)
    found = bn.moments(x, 0, mask=mask)
    assert_close(found.mean, mean, dtype=jnp.complex64)
    assert_close(found.var, var, dtype=jnp.float32)
    parts = x.reshape(4, 5, 3)
    weights = None if mask is None else mask.reshape(4, 5, 1)
    synchronized = jax.vmap(
        lambda x, mask: bn.moments(x, 0, mask=mask, axis_name="data"), axis_name="data"
    )(parts, weights)
    assert_close(jax.tree.map(lambda leaf: leaf[1], synchronized), found)
    split = [
        bn.moments(x[rows], 0, mask=None if mask is None else mask[rows])
        for rows in (slice(0, 8), slice(8, 20))
    ]
    merged = bn.merge_moments(*split)
    assert_close((merged.mean, merged.var), (mean, var), tolerance=max(1e-5, 1e-7 * abs(offset)))


def test_a_complex_derivative_is_that_of_the_definition():
    x = standard_normal(24, (6, 2), jnp.complex64) + np.complex64(3 - 2j)
    weights = jnp.abs(standard_normal(25, (6, 1))) + 0.5

    def loss(module, mean, var):
        return module.sum(module.sin(mean.real) + module.cos(mean.imag) + module.sin(var))

    def of_ours(parts):
        found = bn.moments(jax.lax.complex(parts[0], parts[1]), 0, mask=weights)
        return loss(jnp, found.mean, found.var)

    def of_definition(parts):
        return loss(np, *define_moments(parts[0] + 1j * parts[1], mask=weights)[1:])

    parts = jnp.stack([x.real, x.imag])
    expected = differentiate(of_definition, parts)
    for mode in (jax.grad, jax.jacfwd):
        assert_close(jax.jit(mode(of_ours))(parts), expected)


def test_half_precision_is_summed_in_float32():
    x = jnp.full((4096, 2), 60000.0, jnp.float16).at[::2].set(65504)
    found = bn.moments(x, 0)
    _, mean, var = define_moments(x)
    assert_close((found.mean, found.var), (mean, var), dtype=jnp.float32)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = standard_normal(17, (100, 3), np.float64) + 1e3
        found = bn.moments(x, 0)
        _, mean, var = define_moments(x)
        assert_close((found.mean, found.var), (mean, var), dtype=jnp.float64)


def test_named_axis_merges_by_count():
    x, mask = standard_normal(18, (4, 5, 3)) + 3, standard_normal(19, (4, 5, 1)) > 0
    mask = mask.at[2].set(False)
    synchronized = jax.vmap(
        lambda x, mask: bn.moments(x, 0, mask=mask, axis_name="data"), axis_name="data"
    )(x, mask)
    whole = bn.moments(x.reshape(20, 3), 0, mask=mask.reshape(20, 1))
    assert_close(jax.tree.map(lambda leaf: leaf[3], synchronized), whole)


@pytest.mark.parametrize("mean", [1234567.0, 0.1, -3.3e10])
def test_what_is_equal_in_all_parts_is_so_in_their_union(mean):
    part = bn.Moments(*(jnp.asarray(value, jnp.float32) for value in (3, mean, 0)))
    merged = bn.merge_moments(*[part] * 301)
    assert merged.count == 903
    assert merged.mean == part.mean
    assert merged.var <= 1e-5 * np.square(np.spacing(np.abs(part.mean)))


def test_each_index_group_has_its_moments():
    x = standard_normal(20, (4, 5, 3))
    grouped = jax.vmap(
        lambda x: bn.moments(x, 0, axis_name="data", axis_index_groups=[[0, 2], [3, 1]]),
        axis_name="data",
    )(x)
    for members in ([0, 2], [3, 1]):
        expected = bn.moments(x[jnp.array(members)].reshape(10, 3), 0)
        for member in members:
            assert_close(jax.tree.map(lambda leaf, m=member: leaf[m], grouped), expected)


@pytest.mark.parametrize(
    ("dtype", "masked"),
    quick(
        list(itertools.product(["float32", "bfloat16"], [False, True])),
        [("float32", True), ("bfloat16", False)],
    ),
)
def test_sums_under_vmap_are_the_same_sums(dtype, masked):
    x = (standard_normal(40, (3, 64, 5)) * 2 + 1).astype(dtype)
    mask = standard_normal(41, (3, 64, 1)) > 0 if masked else None
    count, mean, var = define_moments(x, (0, 2), mask)
    found = jax.jit(jax.vmap(partial(bn.moments, axes=0)))(x, mask=mask)
    assert_close(jnp.broadcast_to(found.count[:, None], mean.shape), count)
    assert_close((found.mean, found.var), (mean, var))
    # The guard would mend a wrong sum: it must find nothing to do.
    zeros = jnp.zeros((1, 5))
    kept = centred_moments(Reduction((0,)), x[0], None if mask is None else mask[0], zeros)
    assert (kept.shift == 0).all()

    def total(x):
        found = jax.vmap(partial(bn.moments, axes=0))(x, mask=mask)
        return jnp.sum(found.mean) + jnp.sum(jnp.sin(found.var))

    weights = np.ones(x.shape) if mask is None else np.broadcast_to(mask, x.shape)
    mean, var, count = mean[:, None], var[:, None], weights.sum(1, keepdims=True)
    deviation = np.asarray(x, np.float64) - mean
    expected = weights / count * (1 + 2 * np.cos(var) * deviation)
    assert_close(jax.jit(jax.grad(total))(x), expected, dtype=dtype)


@fuses_reductions
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_writes_out_nothing_of_the_size_of_the_batch(dtype):
    x = jax.ShapeDtypeStruct((512, 48), dtype)
    program = jax.jit(partial(bn.moments, axes=0)).lower(x).compile().as_text()
    assert written_out(program, x.shape) == []


def test_an_eager_call_compiles_nothing_the_second_time():
    compiled = []
    x, other, shorter = (standard_normal(42 + rows, (rows, 3)) for rows in (6, 6, 5))
    bn.moments(x, 0)

    def note(event: str, duration_secs: float, **names: str | int) -> None:
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        bn.moments(other, 0)
        assert not [event for event in compiled if "backend_compile" in event]
        bn.moments(shorter, 0)
        assert [event for event in compiled if "backend_compile" in event]
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_errors_of_input():
    x = jnp.ones((4, 3))
    with pytest.raises(TypeError, match=r"x has dtype int32; expected a floating-point dtype"):
        bn.moments(jnp.ones((4, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"axes=2 is out of range for x of rank 2"):
        bn.moments(x, 2)
    with pytest.raises(ValueError, match=r"axes=\(0, -2\) names an axis of x \(rank 2\) more than"):
        bn.moments(x, (0, -2))
    with pytest.raises(ValueError, match=r"mask of shape \(4,\) does not broadcast to x of shape"):
        bn.moments(x, mask=jnp.ones(4, bool))
    with pytest.raises(ValueError, match=r"axis_index_groups=\(\(0, 1\),\) was given without axis"):
        bn.moments(x, axis_index_groups=[[0, 1]])
    with pytest.raises(ValueError, match=r"must be groups of one size that hold each index from 0"):
        jax.vmap(
            lambda x: bn.moments(x, axis_name="data", axis_index_groups=[[0], [1, 2, 3]]),
            axis_name="data",
        )(x)
