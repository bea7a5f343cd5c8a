"""The norms without state: every example is normalized by the statistics of its own features.

They take their moments as ghost batch norm does, in two passes: the guard of the one-pass variance
would be one decision for all examples, and so a collective where these lie on several devices.
Where the features themselves are spread over `axis_name` there is a collective anyway, and a guard.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bn_jax._core.axes import Reduction, make_reduction, reshape_like, split_axis
from bn_jax._core.checkpoint_names import INPUT_NAME, named
from bn_jax._core.checks import (
    RowInputs,
    as_floating,
    as_mask,
    as_params,
    canonical_axes,
    check_features,
    make_row_inputs,
    size_of_groups,
    statistics_dtype,
)
from bn_jax._core.moments import (
    centred_moments,
    choose_method,
    name_moments,
)
from bn_jax._core.standardize import (
    learned_by,
    make_transform,
    standardize,
    standardize_by_moments,
)
from bn_jax._core.sums import (
    may_be_empty,
)
from bn_jax._core.types import (
    Axes,
    AxisIndexGroups,
    AxisName,
    Options,
    Params,
)


def layer_norm(
    params: Params,
    x: jax.Array,
    *,
    reduction_axes: Axes = -1,
    feature_axes: Axes = -1,
    epsilon: float | jax.Array = 1e-6,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    use_fast_variance: bool = True,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalizes every example over its features.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, `mean` and `var` over
    `reduction_axes`, as exact as in `bn_jax.batch_norm`.

    Args:
        params: ``{"scale": [*F], "bias": [*F]}``, either may be absent; ``*F`` are the sizes of
            `feature_axes` in ascending order.
        x: floating-point or complex array of any rank.
        reduction_axes: the axes that the statistics are taken over.
        feature_axes: the axes of scale and bias.
        epsilon: added to the variance.
        mask: boolean or weights, broadcastable to `x`: what enters the statistics; the rules are
            `bn_jax.batch_norm`'s. Where nothing does, `x` counts as already normalized: mean 0,
            variance 1.
        axis_name: the named axis or axes that the features are spread over, if any;
            `bn_jax.batch_norm` says what holds where nothing binds it.
        axis_index_groups: groups of indices of `axis_name`, each with its own statistics.
        use_fast_variance: False to guard the variance of bfloat16 input against cancellation;
            `bn_jax.moments` says what holds without. Other input is always guarded.
        dtype: the dtype of `y`; by default the promoted dtype of `x` and `params`.

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
    options = Options(
        axis=feature_axes,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        use_fast_variance=use_fast_variance,
        dtype=dtype,
    )
    return normalize_rows(options, params, as_floating("x", x), mask, reduction_axes)


def rms_norm(
    params: Params,
    x: jax.Array,
    *,
    reduction_axes: Axes = -1,
    feature_axes: Axes = -1,
    epsilon: float | jax.Array = 1e-6,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Divides every example by the root mean square of its features.

    ``y = x * rsqrt(mean(|x|**2) + epsilon) * scale + bias``, in one pass; a bias is unusual.
    Arguments, result and errors are as in `layer_norm`, without `use_fast_variance`: nothing is
    subtracted. In float32, squares of values beyond 1.8e19 are infinite, and `y` is then 0.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> y = bn.rms_norm(bn.init_params(2, use_bias=False), jnp.array([[1.0, 7.0]]))
        >>> bool(jnp.allclose(y, jnp.array([[0.2, 1.4]])))
        True

    Reference: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization",
    https://arxiv.org/abs/1910.07467.
    """
    options = Options(
        axis=feature_axes,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
    )
    x = as_floating("x", x)
    return normalize_rows(options, params, x, mask, reduction_axes, about_zero=True)


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
    axis_index_groups: AxisIndexGroups | None = None,
    use_fast_variance: bool = True,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalizes every example over each group of consecutive features, and over all positions.

    Formula, result, errors and the other arguments are as in `layer_norm`. `x` is [N, ..., C];
    scale and bias are of shape [C]. Give `num_groups`, which divides C, or `group_size`, the number
    of features in a group, and None for the other. `reduction_axes` must contain the last axis; by
    default they are all but the first (all of a single example [C]).

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
        >>> bn.group_norm(bn.init_params(4), x, num_groups=2).round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Reference: Wu & He 2018, "Group Normalization", https://arxiv.org/abs/1803.08494.
    """
    options = Options(
        axis=-1,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        use_fast_variance=use_fast_variance,
        dtype=dtype,
    )
    x = as_floating("x", x)
    return normalize_groups(options, params, x, mask, num_groups, group_size, reduction_axes)


def instance_norm(
    params: Params,
    x: jax.Array,
    *,
    feature_axes: Axes = -1,
    epsilon: float | jax.Array = 1e-6,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    use_fast_variance: bool = True,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalizes every feature of every example over its positions.

    Formula, result, errors and the other arguments are as in `layer_norm`. The statistics are taken
    over all axes but the feature axes and the first, the axis of the examples.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> x = jnp.array([[[1.0, 10.0], [3.0, 30.0]]])
        >>> bn.instance_norm(bn.init_params(2), x).round(3).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]

    Reference: Ulyanov et al. 2016, "Instance Normalization: The Missing Ingredient for Fast
    Stylization", https://arxiv.org/abs/1607.08022.
    """
    options = Options(
        axis=feature_axes,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        use_fast_variance=use_fast_variance,
        dtype=dtype,
    )
    return normalize_instances(options, params, as_floating("x", x), mask)


def normalize_rows(
    options: Options,
    params: Params,
    x: jax.Array,
    mask: jax.Array | None,
    reduction_axes: Axes,
    *,
    about_zero: bool = False,
) -> jax.Array:
    """Computes `layer_norm`, or `rms_norm` about zero; `options.axis` is `feature_axes`.

    As in the following functions, `x` has been checked by `as_floating`.
    """
    params = as_params(params)
    reduced = canonical_axes("reduction_axes", reduction_axes, x.ndim)
    features = canonical_axes("feature_axes", options.axis, x.ndim)
    check_features("feature_axes", options.axis, features, x.shape, params=params)
    mask = None if mask is None else as_mask(mask, x.shape)
    reduction = _lay_out(options, x, reduced, about_zero=about_zero)
    return _normalize(reduction, make_row_inputs(options, params, x, mask, features))


def normalize_groups(
    options: Options,
    params: Params,
    x: jax.Array,
    mask: jax.Array | None,
    num_groups: int | None,
    group_size: int | None,
    reduction_axes: Axes | None,
) -> jax.Array:
    """Computes `group_norm`."""
    params = as_params(params)
    last = x.ndim - 1
    axes = (*range(1, x.ndim - 1), -1) if reduction_axes is None else reduction_axes
    reduced = canonical_axes("reduction_axes", axes, x.ndim)
    if last not in reduced:
        raise ValueError(
            f"reduction_axes={reduction_axes} lacks the last axis of x of shape {x.shape}, which "
            "holds the groups of features: add -1."
        )
    check_features("feature_axes", -1, (last,), x.shape, params=params)
    mask = None if mask is None else as_mask(mask, x.shape)
    size = size_of_groups(x.shape[last], num_groups, group_size)
    # The features of a group lie along an axis after the groups, and are reduced.
    in_groups = make_row_inputs(
        options,
        params=jax.tree.map(partial(split_axis, 0, size), params),
        x=split_axis(last, size, x),
        mask=None if mask is None else split_axis(last, size, mask),
        feature_axes=(last, last + 1),
    )
    reduction = _lay_out(options, in_groups.x, (*reduced[:-1], last + 1))
    return reshape_like(jax.typeof(x), _normalize(reduction, in_groups))


def normalize_instances(
    options: Options, params: Params, x: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Computes `instance_norm`; `options.axis` is `feature_axes`."""
    rank, shape = x.ndim, x.shape
    features = canonical_axes("feature_axes", options.axis, rank)
    if 0 in features:
        raise ValueError(
            f"feature_axes={options.axis} has the first axis of x of shape {shape}, the axis of "
            "the examples: leave it out."
        )
    reduced = tuple(axis for axis in range(1, rank) if axis not in features)
    return normalize_rows(options, params, x, mask, reduced)


def _lay_out(
    options: Options, x: jax.Array, axes: tuple[int, ...], *, about_zero: bool = False
) -> Reduction:
    """Decides how moments are taken over some axes of `x`."""
    reduction = make_reduction(x, axes, options.axis_name, options.axis_index_groups)
    if about_zero:
        return reduction._replace(method="mean_square")
    # Without a named axis, examples may lie on several devices, and a guard would be a collective.
    method = choose_method(x.dtype, options.use_fast_variance, lie_apart=not reduction.axis_names)
    return reduction._replace(method=method)


@partial(jax.jit, static_argnums=0)
def _normalize(reduction: Reduction, rows: RowInputs) -> jax.Array:
    x, mask = named(INPUT_NAME, rows.x), rows.mask
    shape = tuple(size if axis in rows.feature_axes else 1 for axis, size in enumerate(x.shape))
    start = jnp.zeros((1,) * x.ndim, rows.mean_dtype)
    is_plain = not may_be_empty(x, mask) and not reduction.is_mapped
    if is_plain and rows.transform_dtype == rows.mean_dtype:
        epsilon = jnp.asarray(rows.epsilon, statistics_dtype(rows.mean_dtype))
        learned = learned_by(rows, shape)
        return standardize_by_moments(reduction, rows.y_dtype, x, start, learned, epsilon)[0]
    measured = name_moments(centred_moments(reduction, x, mask, start), mask)
    var = jnp.where(measured.count > 0, measured.var, 1)
    transform = make_transform(rows, shape, measured.shift, measured.delta, var)
    return standardize(rows.y_dtype, x, mask, transform)
