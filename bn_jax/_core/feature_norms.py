"""The norms without state: every example is normalized by the statistics of its own features.

They take their moments as ghost batch norm does, in two passes: the guard of the one-pass variance
would be one decision for all examples, and so a collective where these lie on several devices.
Where the features themselves are spread over `axis_name` there is one anyway, and a guard.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from bn_jax._core.moments import (
    INPUT_NAME,
    MOMENTS_NAME,
    AxisName,
    as_floating,
    broadcastable_mask,
    canonical_axes,
    centred_moments,
    make_reduction,
    mean_dtype,
    named,
    split_axis,
    statistics_dtype,
)
from bn_jax._core.standardize import (
    Params,
    as_params,
    check_epsilon,
    check_features,
    make_normalizer,
    make_transform,
    output_dtype,
    reshape_like,
)

Axes: TypeAlias = int | Sequence[int]


def layer_norm(
    params: Params,
    x: jax.Array,
    *,
    reduction_axes: Axes = -1,
    feature_axes: Axes = -1,
    epsilon: float | jax.Array = 1e-6,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Normalizes every example over its features.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, `mean` and `var` over
    `reduction_axes`, as exactly as those of `bn_jax.batch_norm`.

    Args:
        params: ``{"scale": [*F], "bias": [*F]}``, either may be absent; ``*F`` are the sizes of
            `feature_axes` in ascending order.
        x: floating-point or complex array of any rank.
        reduction_axes: the axes that the statistics are taken over.
        feature_axes: the axes of scale and bias.
        epsilon: added to the variance.
        mask: boolean or non-negative weights, broadcastable to `x`: what enters the statistics.
            Where nothing does, `x` counts as normalized already: mean 0, variance 1.
        axis_name: the named axis or axes that the features are spread over, if any; what holds
            where nothing binds it, `bn_jax.batch_norm` says.
        axis_index_groups: groups of indices of `axis_name` with statistics of their own.
        dtype: the dtype of `y`; by default that of `x` and `params` promoted.

    Returns:
        `y`, of the shape of `x`.

    Raises:
        TypeError: `x` is integer or boolean, or `dtype` is real where something is complex.
        ValueError: an argument does not fit the others; the message says which.
        NameError: `axis_name` is not bound, but other axes are.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> bn.layer_norm(bn.init_params(2), jnp.array([[1.0, 3.0]])).round(3).tolist()
        [[-1.0, 1.0]]

    Reference: Ba et al. 2016, "Layer Normalization", https://arxiv.org/abs/1607.06450.
    """
    options = (epsilon, mask, axis_name, axis_index_groups, dtype)
    return _normalize(params, x, reduction_axes, feature_axes, *options)


def rms_norm(
    params: Params,
    x: jax.Array,
    *,
    reduction_axes: Axes = -1,
    feature_axes: Axes = -1,
    epsilon: float | jax.Array = 1e-6,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Divides every example by the root mean square of its features.

    ``y = x * rsqrt(mean(|x|**2) + epsilon) * scale + bias``, in one pass; a bias is not usual.
    Arguments, result and errors are those of `layer_norm`. Squares of what is beyond 1.8e19, in
    float32, are infinite, and `y` is 0 then.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> y = bn.rms_norm(bn.init_params(2, use_bias=False), jnp.array([[1.0, 7.0]]))
        >>> bool(jnp.allclose(y, jnp.array([[0.2, 1.4]])))
        True

    Reference: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization",
    https://arxiv.org/abs/1910.07467.
    """
    options = (epsilon, mask, axis_name, axis_index_groups, dtype)
    return _normalize(params, x, reduction_axes, feature_axes, *options, about_zero=True)


def group_norm(
    params: Params,
    x: jax.Array,
    *,
    num_groups: int | None = 32,
    group_size: int | None = None,
    reduction_axes: Axes | None = None,
    epsilon: float | jax.Array = 1e-6,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Normalizes every example over each group of consecutive features, and over all positions.

    Formula, result, errors and the other arguments are those of `layer_norm`. `x` is [N, ..., C];
    scale and bias are of shape [C]. Of `num_groups`, which divides C, and `group_size`, the number
    of features in a group, one is None. `reduction_axes`, the last among them, are by default all
    but the first (of a single example [C], all).

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
        >>> bn.group_norm(bn.init_params(4), x, num_groups=2).round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Reference: Wu & He 2018, "Group Normalization", https://arxiv.org/abs/1803.08494.
    """
    x, params = as_floating("x", x), as_params(params)
    last = x.ndim - 1
    axes = (*range(1, x.ndim - 1), -1) if reduction_axes is None else reduction_axes
    reduced = canonical_axes("reduction_axes", axes, x.ndim)
    if last not in reduced:
        raise ValueError(
            f"reduction_axes={reduction_axes} lacks the last axis of x of shape {x.shape}, which "
            "holds the groups of features: add -1."
        )
    check_features("feature_axes", -1, (last,), x.shape, params=params)
    size = size_of_groups(x.shape[last], num_groups, group_size)
    mask = None if mask is None else split_axis(last, size, broadcastable_mask(mask, x.shape))
    groups = jax.tree.map(partial(split_axis, 0, size), params)
    options = (epsilon, mask, axis_name, axis_index_groups, dtype)
    axes, features = (*reduced[:-1], last + 1), (last, last + 1)
    return reshape_like(
        jax.typeof(x), _normalize(groups, split_axis(last, size, x), axes, features, *options)
    )


def instance_norm(
    params: Params,
    x: jax.Array,
    *,
    feature_axes: Axes = -1,
    epsilon: float | jax.Array = 1e-6,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Normalizes every feature of every example over its positions.

    Formula, result, errors and the other arguments are those of `layer_norm`. The statistics are
    taken over all axes but the feature axes and the first, that of the examples.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> x = jnp.array([[[1.0, 10.0], [3.0, 30.0]]])
        >>> bn.instance_norm(bn.init_params(2), x).round(3).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]

    Reference: Ulyanov et al. 2016, "Instance Normalization: The Missing Ingredient for Fast
    Stylization", https://arxiv.org/abs/1607.08022.
    """
    x = as_floating("x", x)
    features = canonical_axes("feature_axes", feature_axes, x.ndim)
    if 0 in features:
        raise ValueError(
            f"feature_axes={feature_axes} has the first axis of x of shape {x.shape}, that of the "
            "examples: leave it out."
        )
    reduced = tuple(axis for axis in range(1, x.ndim) if axis not in features)
    options = (epsilon, mask, axis_name, axis_index_groups, dtype)
    return _normalize(params, x, reduced, features, *options)


def _normalize(
    params: Params,
    x: jax.Array,
    reduction_axes: Axes,
    feature_axes: Axes,
    epsilon: float | jax.Array,
    mask: jax.Array | None,
    axis_name: AxisName | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    dtype: Any,
    about_zero: bool = False,
) -> jax.Array:
    x, params = named(INPUT_NAME, as_floating("x", x)), as_params(params)
    check_epsilon(epsilon)
    reduced = canonical_axes("reduction_axes", reduction_axes, x.ndim)
    features = canonical_axes("feature_axes", feature_axes, x.ndim)
    check_features("feature_axes", feature_axes, features, x.shape, params=params)
    mask = None if mask is None else broadcastable_mask(mask, x.shape)
    dtype = output_dtype(dtype, x, params)
    real_dtype = statistics_dtype(x.dtype, dtype)
    reduction = make_reduction(x, reduced, axis_name, axis_index_groups)
    reduction = reduction._replace(of_groups=not reduction.axis_names, about_zero=about_zero)
    start = jnp.zeros((1,) * x.ndim, mean_dtype(real_dtype, x.dtype))
    found = named(MOMENTS_NAME, centred_moments(reduction, x, mask, start))
    var = jnp.where(found.count > 0, found.var, 1)
    shape = tuple(size if axis in features else 1 for axis, size in enumerate(x.shape))
    transform = make_transform(params, shape, found.shift, found.delta, var, epsilon)
    return make_normalizer(dtype, jax.typeof(x), mask)(x, mask, transform)


def size_of_groups(features: int, num_groups: int | None, group_size: int | None) -> int:
    """Returns how many features make up a group, or raises the ValueError that says which can."""
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            f"num_groups={num_groups} and group_size={group_size}: give one of them, and None for "
            "the other (num_groups=None where group_size is given, for it is 32 otherwise)."
        )
    name, number = ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
    if number is None or number < 1 or features % number:
        raise ValueError(
            f"{name}={number} does not divide the {features} features of x: pass one of "
            f"{[divisor for divisor in range(1, features + 1) if features % divisor == 0]}."
        )
    return features // number if group_size is None else number
