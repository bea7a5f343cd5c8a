"""Properties of batch norm that hold for whatever hypothesis draws."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import (
    DTYPES,
    assert_equal,
    assert_near,
    assert_stats,
    configurations,
    define_training,
    epsilons,
    few_layouts,
    freedoms,
    mean_unit,
    merging_error,
    momenta,
    output_unit,
    powers_of_two,
    rounding,
    seeds,
    trainable,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import define_evaluation, define_moments, exact

import bn_jax as bn

settings.register_profile(
    "reproducible",
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
)
settings.load_profile("reproducible")

STATIC = ("axis", "axes", "virtual_batch_size", "running_var_ddof", "dtype")


def compiled(function):
    """Compiles a function from NumPy to NumPy: JAX would compile each step in between as well."""
    known = set(inspect.signature(function).parameters)
    jitted = jax.jit(function, static_argnames=known.intersection(STATIC))
    return lambda *args, **kwargs: jax.tree.map(np.asarray, jitted(*args, **kwargs))


TRAIN = partial(bn.batch_norm, use_running_average=False)


def differentiate_training(params, stats, x, cotangent, axis, **options):
    """The output, the new statistics, and the derivatives of the output by params and x."""

    def train(params, x):
        guarded = dict(axis=axis, dtype=jnp.float32, use_fast_variance=False)
        return TRAIN(params, stats, x, **guarded, **options)

    y, pull, updated = jax.vjp(train, params, x, has_aux=True)
    return y, updated, pull(cotangent.astype(y.dtype))


def differentiate_projection(kernel, u, cotangent, epsilon):
    stats = bn.init_batch_stats(kernel.shape[-1])

    def layer(kernel):
        y, _ = bn.batch_norm({}, stats, u @ kernel, use_running_average=False, epsilon=epsilon)
        return y

    y, pull = jax.vjp(layer, kernel)
    return y, *pull(cotangent)


# With the guard for bfloat16 too: the bound without it has tests in `test_fast_variance.py`.
train = compiled(partial(TRAIN, use_fast_variance=False))
evaluate = compiled(partial(bn.batch_norm, use_running_average=True))
train_and_differentiate = compiled(differentiate_training)
project_and_differentiate = compiled(differentiate_projection)
measure = compiled(partial(bn.moments, use_fast_variance=False))
merge = compiled(bn.merge_moments)


# --- equality with the definition -------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* has one value per feature to train on:UserWarning")
@settings(max_examples=50)
@given(
    configurations(ranks=(1, 4)),
    st.sampled_from([("scale", "bias"), ("scale",), ("bias",), ()]),
    st.sampled_from([None, *DTYPES]),
    epsilons,
    momenta,
    freedoms,
)
def test_training_is_the_definition(
    configuration, present, output_dtype, epsilon, momentum, running_var_ddof
):
    params, stats = configuration.make_params(present), configuration.make_stats()
    x, mask, axis = configuration.make_x(), configuration.make_mask(), configuration.axis
    options = dict(axis=axis, epsilon=epsilon, momentum=momentum, mask=mask)
    options["running_var_ddof"] = running_var_ddof
    y, updated = train(params, stats, x, dtype=output_dtype, **options)
    expected, expected_stats = define_training(params, stats, x, **options)
    assert y.dtype == (output_dtype or (jnp.float32 if present else x.dtype))
    usable = np.abs(expected) < float(jnp.finfo(y.dtype).max)
    unit = output_unit(configuration, params, expected)
    found, expected = (np.where(usable, exact(values), 0) for values in (y, expected))
    assert_near(found, expected, unit, tolerance=1e-5 + rounding(y.dtype))
    assert_stats(updated, expected_stats, mean_unit(stats, define_moments(x, axis, mask)))


@given(configurations(ranks=(1, 4)), st.booleans(), st.data())
def test_moments_are_the_definition(configuration, shifted, data):
    rank = len(configuration.shape)
    axes = tuple(data.draw(st.permutations(range(rank)))[: data.draw(st.integers(0, rank))])
    kept = tuple(axis for axis in range(rank) if axis not in axes)
    x, mask = configuration.make_x(), configuration.make_mask()
    count, mean, var = define_moments(x, kept, mask)
    guess = configuration.generator("guess").standard_normal(mean.shape)
    guess = np.float32(guess * configuration.stale_offset * configuration.spread)
    found = measure(x, axes, mask=mask, shift=guess if shifted else None)
    assert_equal(np.broadcast_to(found.count, count.shape), count)
    assert_near(found.mean, mean, np.abs(mean) + np.sqrt(var))
    assert_near(found.var, var, var)


@given(configurations(), epsilons)
def test_evaluation_is_the_definition_and_idempotent(configuration, epsilon):
    params, stats = configuration.make_params(), configuration.make_stats()
    x, options = configuration.make_x(), dict(axis=configuration.axis, epsilon=epsilon)
    y, unchanged = evaluate(params, stats, x, **options)
    expected = define_evaluation(params, stats, x, **options)
    assert_near(y, expected, output_unit(configuration, params, expected))
    assert_equal(unchanged, stats)
    assert_equal(evaluate(params, unchanged, x, **options), (y, stats))
    other = configuration.generator("other").random(configuration.shape) < 0.5
    disturbed, _ = evaluate(params, stats, np.where(other, x.dtype.type(np.nan), x), **options)
    assert_equal(np.where(other, 0, disturbed), np.where(other, 0, y))


@pytest.mark.exhaustive
@given(few_layouts(), epsilons)
def test_moments_of_the_batch_normalize_in_evaluation_and_undo_it_as_parameters(
    configuration, epsilon
):
    params, stats = configuration.make_params(), configuration.make_stats()
    x, cotangent = configuration.make_x(), configuration.make_cotangent()
    options = dict(axis=configuration.axis, mask=configuration.make_mask(), epsilon=epsilon)
    options["momentum"] = 0.0
    y, own, _ = train_and_differentiate(params, stats, x, cotangent, **options)
    evaluated, _ = evaluate(params, own, x, axis=configuration.axis, epsilon=epsilon)
    scale, mean, var = map(configuration.expand, (params["scale"], own["mean"], own["var"]))
    slack = np.abs(scale * mean / np.sqrt(var + epsilon)) * 2.0**-24
    assert_near(evaluated, y, output_unit(configuration, params, exact(y)), slack=slack)
    undoing = {"scale": np.sqrt(own["var"] + np.float32(epsilon)), "bias": own["mean"]}
    identity, *_ = train_and_differentiate(undoing, stats, x, cotangent, **options)
    unit = np.abs(exact(x)) + configuration.expand(undoing["scale"]) + np.abs(mean)
    assert_near(identity, x, unit)


# --- invariance -------------------------------------------------------------------------------


@given(few_layouts(), powers_of_two, st.sampled_from([1, -1]), epsilons)
def test_scaling_input_and_epsilon_scales_nothing_else(configuration, size, sign, epsilon):
    factor = size * sign
    params, stats = configuration.make_params(), configuration.make_stats()
    params["bias"] = np.zeros_like(params["bias"])
    x, cotangent = configuration.make_x(), configuration.make_cotangent()
    options = dict(axis=configuration.axis, mask=configuration.make_mask(), momentum=0.5)
    y, updated, (of_params, of_x) = train_and_differentiate(
        params, stats, x, cotangent, epsilon=epsilon, **options
    )
    scaled_x = (x * factor).astype(x.dtype)
    scaled_stats = {"mean": stats["mean"] * factor, "var": stats["var"] * factor**2}
    scaled_y, scaled_updated, (scaled_of_params, scaled_of_x) = train_and_differentiate(
        params, scaled_stats, scaled_x, cotangent * sign, epsilon=epsilon * factor**2, **options
    )
    assert_equal(scaled_y, y * sign)
    expected = {"mean": updated["mean"] * factor, "var": updated["var"] * factor**2}
    assert_equal(scaled_updated, expected)
    assert_equal(scaled_of_params["scale"], of_params["scale"])
    assert_equal(exact(scaled_of_x) * factor, exact(of_x))


@given(
    st.sampled_from([4, 9]),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2]),
    powers_of_two,
    seeds,
)
def test_the_scale_of_a_kernel_only_divides_its_gradient(rows, inputs, outputs, factor, seed):
    rng = np.random.default_rng(seed)
    u, kernel, cotangent = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((rows, inputs), (inputs, outputs), (rows, outputs))
    )
    y, gradient = project_and_differentiate(kernel, u, cotangent, 1e-20)
    scaled_kernel = np.float32(factor) * kernel
    scaled_y, scaled_gradient = project_and_differentiate(scaled_kernel, u, cotangent, 1e-20)
    assert_near(scaled_y, y, 1)
    deviation = define_moments(exact(u) @ exact(kernel))[2] ** 0.5
    unit = np.abs(exact(u)).T @ np.abs(exact(cotangent)) / deviation
    assert_near(scaled_gradient * factor, gradient, unit)
    along = np.sum(exact(kernel) * exact(gradient), 0)
    assert_near(along, np.zeros(outputs), np.sum(np.abs(exact(kernel)) * unit, 0))


def make_shifted(configuration, present):
    """Integers, and the same plus a summand for each feature that the dtype holds exactly."""
    rng = configuration.generator("shift")
    small = rng.integers(-8, 9, configuration.shape)
    largest = 2 ** jnp.finfo(configuration.dtype).nmant - 8
    summand = rng.integers(-largest, largest + 1, configuration.features) * present
    shifted = small + configuration.expand(summand)
    return *(values.astype(jnp.dtype(configuration.dtype)) for values in (small, shifted)), summand


def gradient_unit(configuration, params, x, mask, epsilon, cotangent):
    """The sizes, summed over a feature, of what adds up to the derivative by x."""
    _, mean, var = map(configuration.expand, define_moments(x, configuration.axis, mask))
    deviation = np.sqrt(var + epsilon)
    terms = np.abs(cotangent) * (1 + np.abs(exact(x) - mean) / deviation)
    terms = terms * np.abs(configuration.expand(params["scale"])) / deviation
    return terms.sum(configuration.reduced_axes)


@given(few_layouts(), epsilons, momenta)
def test_shifting_input_shifts_the_running_mean_alone(configuration, epsilon, momentum):
    params, stats = configuration.make_params(), configuration.make_stats()
    mask, axis = configuration.make_mask(), configuration.axis
    present = define_moments(np.zeros(configuration.shape), axis, mask)[0] > 0
    x, shifted_x, summand = make_shifted(configuration, present)
    options = dict(axis=axis, mask=mask, epsilon=epsilon, momentum=momentum)
    cotangent = configuration.make_cotangent()
    y, updated, _ = train_and_differentiate(params, stats, x, cotangent, **options)
    shifted_y, shifted, (_, of_x) = train_and_differentiate(
        params, stats, shifted_x, cotangent, **options
    )
    assert_near(shifted_y, y, output_unit(configuration, params, exact(y)), tolerance=2e-5)
    moved = {
        "mean": exact(updated["mean"]) + (1 - momentum) * summand,
        "var": exact(updated["var"]),
    }
    unit = mean_unit(stats, define_moments(shifted_x, axis, mask))
    assert_stats(shifted, moved, unit, tolerance=2e-5)
    total = exact(of_x).sum(configuration.reduced_axes) * present
    unit = gradient_unit(configuration, params, x, mask, epsilon, cotangent)
    tolerance = 1e-5 + rounding(x.dtype)
    assert_near(total, np.zeros_like(total), unit, tolerance=tolerance)


def permute(values, orders):
    """Reorders along the trailing axes, except those of size 1."""
    for axis in range(-values.ndim, 0):
        if values.shape[axis] > 1:
            values = np.take(values, orders[axis], axis)
    return values


@given(few_layouts(), epsilons)
def test_permuting_input_permutes_output(configuration, epsilon):
    params, stats = configuration.make_params(), configuration.make_stats()
    x, mask = configuration.make_x(), configuration.make_mask()
    rng = configuration.generator("orders")
    orders = [rng.permutation(size) for size in configuration.shape]
    of_features = [orders[axis] for axis in configuration.feature_axes]
    permuted_params, permuted_stats = (
        {name: permute(leaf, of_features) for name, leaf in tree.items()}
        for tree in (params, stats)
    )
    options = dict(axis=configuration.axis, epsilon=epsilon, momentum=0.5)
    cotangent = configuration.make_cotangent()
    y, updated, _ = train_and_differentiate(params, stats, x, cotangent, mask=mask, **options)
    permuted_mask = None if mask is None else permute(mask, orders)
    permuted_y, permuted, _ = train_and_differentiate(
        permuted_params,
        permuted_stats,
        permute(x, orders),
        permute(cotangent, orders),
        mask=permuted_mask,
        **options,
    )
    expected = permute(y, orders)
    unit = output_unit(configuration, permuted_params, exact(expected))
    assert_near(permuted_y, expected, unit, tolerance=2e-5)
    moments = define_moments(x, configuration.axis, mask)
    unit = permute(mean_unit(stats, moments), of_features)
    expected = {name: permute(leaf, of_features) for name, leaf in updated.items()}
    assert_stats(permuted, expected, exact(unit), tolerance=2e-5)


@given(few_layouts(), epsilons)
def test_the_sign_of_the_parameters_is_the_sign_of_the_output(configuration, epsilon):
    params, stats = configuration.make_params(), configuration.make_stats()
    x, cotangent = configuration.make_x(), configuration.make_cotangent()
    options = dict(axis=configuration.axis, epsilon=epsilon, mask=configuration.make_mask())
    options["momentum"] = 0.5
    y, updated, (of_params, of_x) = train_and_differentiate(params, stats, x, cotangent, **options)
    opposite = {name: -leaf for name, leaf in params.items()}
    found = train_and_differentiate(opposite, stats, x, cotangent, **options)
    assert_equal(found, (-y, updated, (of_params, -of_x)))


@given(few_layouts(), epsilons)
def test_a_scale_of_zero_leaves_the_bias(configuration, epsilon):
    params, stats = configuration.make_params(), configuration.make_stats()
    params["scale"] = np.zeros_like(params["scale"])
    x, cotangent = configuration.make_x(), configuration.make_cotangent()
    options = dict(axis=configuration.axis, epsilon=epsilon, mask=configuration.make_mask())
    options["momentum"] = 0.5
    y, _, (of_params, of_x) = train_and_differentiate(params, stats, x, cotangent, **options)
    bias = configuration.expand(params["bias"])
    assert_equal(y, np.broadcast_to(bias, configuration.shape))
    assert_equal(of_x, np.zeros(configuration.shape))
    plain = {"scale": np.ones_like(params["bias"]), "bias": np.zeros_like(params["bias"])}
    normalized, *_ = train_and_differentiate(plain, stats, x, cotangent, **options)
    products = exact(cotangent) * exact(normalized)
    total, size = (
        values.sum(configuration.reduced_axes) for values in (products, np.abs(products))
    )
    assert_near(of_params["scale"], total, size)


# --- parts and wholes -------------------------------------------------------------------------


@pytest.mark.exhaustive
@given(few_layouts(dtypes=DTYPES), st.lists(st.floats(0, 1), max_size=3), st.booleans())
def test_merged_moments_are_those_of_the_whole(configuration, cuts, nested):
    x, mask, axes = configuration.make_x(), configuration.make_mask(), configuration.reduced_axes
    rows = configuration.shape[axes[0]]
    bounds = [round(cut * rows) for cut in sorted(cuts)]
    whole_mask = np.broadcast_to(True if mask is None else mask, x.shape)
    parts = [
        measure(part, axes, mask=None if mask is None else part_mask)
        for part, part_mask in zip(
            *(np.split(values, bounds, axes[0]) for values in (x, whole_mask)), strict=True
        )
    ]
    merged = merge(parts[0], merge(*parts[1:])) if nested and len(parts) > 1 else merge(*parts)
    moments = define_moments(x, configuration.axis, mask)
    count, mean, var = moments
    assert_equal(np.broadcast_to(merged.count, count.shape), count)
    assert_near(merged.mean, mean, np.abs(mean) + np.sqrt(var))
    assert_near(merged.var, var, var, slack=merging_error(moments))


@pytest.mark.exhaustive
@given(trainable, st.integers(0, 4), epsilons, momenta, freedoms)
def test_each_ghost_group_is_a_batch(configuration, choice, epsilon, momentum, running_var_ddof):
    params, stats = configuration.make_params(), configuration.make_stats()
    x, mask, axis = configuration.make_x(), configuration.make_mask(), configuration.axis
    batch_axis = configuration.reduced_axes[0]
    rows = configuration.shape[batch_axis]
    divisors = [size for size in range(1, rows + 1) if rows % size == 0]
    size = divisors[choice % len(divisors)]
    assume(configuration.values_per_feature * size > rows)
    options = dict(axis=axis, epsilon=epsilon, momentum=momentum, running_var_ddof=running_var_ddof)
    y, updated = train(params, stats, x, mask=mask, virtual_batch_size=size, **options)
    whole_mask = np.broadcast_to(1.0 if mask is None else mask, x.shape)
    groups = (np.split(values, rows // size, batch_axis) for values in (x, whole_mask))
    expected = [
        define_training(params, stats, group, mask=group_mask, **options)[0]
        for group, group_mask in zip(*groups, strict=True)
    ]
    whole = np.concatenate(expected, batch_axis)
    assert_near(y, whole, output_unit(configuration, params, whole))
    moments = define_moments(x, axis, mask)
    _, expected_stats = define_training(params, stats, x, mask=mask, **options)
    slack = 2 * merging_error(moments)
    assert_stats(updated, expected_stats, mean_unit(stats, moments), slack=slack)


POISONS = [np.nan, np.inf, -np.inf, 3e38, -3e38]


def hide(configuration, x, mask):
    """Replaces what the mask leaves out."""
    poison = configuration.generator("poison").choice(POISONS, configuration.shape)
    with np.errstate(over="ignore"):
        poison = poison.astype(np.float32).astype(x.dtype)
    return np.where(np.broadcast_to(mask, x.shape).astype(bool), x, poison)


@given(few_layouts(dtypes=DTYPES, maskings=("boolean", "weights")), epsilons)
def test_masked_values_have_no_effect(configuration, epsilon):
    params, stats = configuration.make_params(), configuration.make_stats()
    x, mask = configuration.make_x(), configuration.make_mask()
    valid = np.broadcast_to(mask, x.shape).astype(bool)
    cotangent = np.where(valid, configuration.make_cotangent(), 0)
    options = dict(axis=configuration.axis, epsilon=epsilon, mask=mask, momentum=0.5)
    y, *others = train_and_differentiate(params, stats, x, cotangent, **options)
    hidden = hide(configuration, x, mask)
    found_y, *found = train_and_differentiate(params, stats, hidden, cotangent, **options)
    assert_equal(np.where(valid, found_y, 0), np.where(valid, y, 0))
    assert_equal(found, others)
    _, (_, of_x) = found
    assert_equal(np.where(valid, 0, of_x), np.zeros(configuration.shape))


def make_repeats(configuration, largest):
    """How often each position enters; at least two do."""
    rng = configuration.generator("repeats")
    repeats = rng.integers(0, largest + 1, configuration.values_per_feature)
    repeats[rng.permutation(repeats.size)[:2]] = rng.integers(1, largest + 1, 2)
    return repeats


@pytest.mark.exhaustive
@given(few_layouts(dtypes=DTYPES), st.integers(1, 4), epsilons, momenta, freedoms)
def test_weights_are_repetitions_and_zero_is_absence(
    configuration, largest, epsilon, momentum, running_var_ddof
):
    params, stats = configuration.make_params(), configuration.make_stats()
    repeats = make_repeats(configuration, largest)
    mask = repeats.reshape(configuration.shape_by_position)
    mask = mask.astype(np.float32 if largest > 1 else bool)
    x = hide(configuration, configuration.make_x(), mask)
    repeated = np.repeat(configuration.flatten(x), repeats, 0)
    options = dict(epsilon=epsilon, momentum=momentum, running_var_ddof=running_var_ddof)
    y, updated = train(params, stats, x, mask=mask, axis=configuration.axis, **options)
    feature_axes = tuple(range(1, repeated.ndim))
    expected, expected_stats = train(params, stats, repeated, axis=feature_axes, **options)
    found = np.repeat(configuration.flatten(y), repeats, 0)
    unit = np.maximum(np.maximum(1, np.abs(exact(expected))), np.abs(exact(params["scale"])))
    assert_near(found, expected, unit, tolerance=2e-5)
    expected_stats = {name: exact(leaf) for name, leaf in expected_stats.items()}
    unit = mean_unit(stats, define_moments(repeated, feature_axes))
    assert_stats(updated, expected_stats, unit, tolerance=2e-5)


# --- the running statistics -------------------------------------------------------------------


def steps(largest):
    kinds = st.sampled_from(["valid", "poisoned", "nothing valid"])
    return st.lists(kinds, min_size=1, max_size=largest)


def make_step(configuration, number, kind):
    x = configuration.make_x(f"step {number}")
    if kind == "poisoned":
        rng = configuration.generator(f"poison {number}")
        position = tuple(rng.integers(0, configuration.shape))
        x[position] = rng.choice([np.nan, np.inf, -np.inf])
    return x, np.asarray(kind != "nothing valid")


@pytest.mark.exhaustive
@given(trainable, steps(5), momenta | st.none(), st.booleans(), freedoms)
def test_running_statistics_after_any_steps(
    configuration, kinds, momentum, use_count, running_var_ddof
):
    params = configuration.make_params()
    stats = expected = configuration.make_stats()
    if momentum is None or use_count:
        stats = expected = bn.init_batch_stats(configuration.features, use_count=True)
    unit = np.zeros(configuration.features)
    for number, kind in enumerate(kinds):
        x, mask = make_step(configuration, number, kind)
        options = dict(axis=configuration.axis, mask=mask, momentum=momentum)
        options.update(running_var_ddof=running_var_ddof, epsilon=1e-5)
        _, stats = train(params, stats, x, **options)
        with np.errstate(invalid="ignore"):
            _, expected = define_training(params, expected, x, **options)
            unit = np.fmax(unit, mean_unit(expected, define_moments(x, configuration.axis, mask)))
    assert_stats(stats, expected, unit)


@pytest.mark.exhaustive
@given(
    trainable,
    st.sampled_from(DTYPES),
    steps(2),
    momenta | st.none(),
    st.booleans(),
)
def test_batch_stats_keep_their_type(configuration, dtype, kinds, momentum, use_count):
    params = configuration.make_params()
    use_count = use_count or momentum is None
    stats = bn.init_batch_stats(configuration.features, dtype=dtype, use_count=use_count)
    types = jax.eval_shape(lambda leaves: leaves, stats)
    for number, kind in enumerate(kinds):
        x, mask = make_step(configuration, number, kind)
        options = dict(axis=configuration.axis, mask=mask, momentum=momentum)
        assert jax.eval_shape(partial(TRAIN, **options), params, stats, x)[1] == types
        _, stats = train(params, stats, x, **options)
        assert all(np.isfinite(exact(leaf)).all() for leaf in stats.values())
