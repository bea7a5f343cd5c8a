"""Batch normalization as a pure function of parameters, statistics and input.

A call of `batch_norm` in training takes four steps: `check_inputs`, `lay_out` (what the moments are
taken over), normalizing by the batch, and `running.update`. The last two are one compiled function.
Code that merges moments between them (gradient accumulation) calls the two halves,
`normalize_by_batch` and `update_batch_stats`.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from bn_jax._core.axes import place_like
from bn_jax._core.checkpoint_names import INPUT_NAME, named
from bn_jax._core.checks import (
    Inputs,
    as_floating,
    as_shape,
    canonical_axes,
    check_count_kept,
    check_inputs,
)
from bn_jax._core.domains import own_moments, place
from bn_jax._core.layout import Examples, Layout, arrange, feature_shape_of, lay_out
from bn_jax._core.merging import merge_centred
from bn_jax._core.moments import (
    CentredMoments,
    centred_moments,
    moments,
    name_moments,
)
from bn_jax._core.running import Weight, update, weigh_batch
from bn_jax._core.standardize import (
    complete,
    keeps_input_alone,
    learned_by,
    make_transform,
    normalize,
    standardize_by_moments,
)
from bn_jax._core.sums import (
    count_of,
    may_be_empty,
)
from bn_jax._core.types import (
    Activation,
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    Correction,
    Mode,
    Moments,
    Options,
    Params,
    Transform,
)


def init_params(
    features: Axes,
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """Returns ``{"scale": ones, "bias": zeros}`` of shape `features`.

    Args:
        features: the number of features, or their shape where there are several feature axes.
        use_scale: whether there is a scale.
        use_bias: whether there is a bias.
        dtype: the dtype of the parameters.

    Returns:
        The parameters for `batch_norm`.

    Example:
        >>> import bn_jax as bn
        >>> bn.init_params(2)["scale"]
        Array([1., 1.], dtype=float32)
    """
    shape = as_shape(features)
    params: Params = {}
    if use_scale:
        params["scale"] = jnp.ones(shape, dtype)
    if use_bias:
        params["bias"] = jnp.zeros(shape, dtype)
    return params


def identity_params(
    x: jax.Array,
    *,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    use_fast_variance: bool = True,
) -> Params:
    """Returns the parameters that make batch norm the identity on a batch.

    ``scale = sqrt(var + epsilon)``, ``bias = mean``: training would have to find these for the norm
    to change nothing. Begin with them where a norm is inserted into a trained network.

    Args:
        x: floating-point or complex array, the batch.
        axis: the feature axis or axes of `x`.
        epsilon: the norm's epsilon.
        mask: boolean or weights, as the norm will have it; `batch_norm` says which.
        axis_name: the named axis or axes that the norm synchronizes over.
        use_fast_variance: as the norm will have it.

    Returns:
        ``{"scale": [*F], "bias": [*F]}`` in at least float32; for complex `x` the scale is real.

    Raises:
        TypeError, ValueError, NameError: as `batch_norm` does.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> x = jnp.array([[1.0], [3.0], [8.0]])
        >>> params, batch_stats = bn.identity_params(x), bn.init_batch_stats(1)
        >>> bn.batch_norm(params, batch_stats, x, use_running_average=False)[0].round(4).tolist()
        [[1.0], [3.0], [8.0]]

    Reference: Ioffe & Szegedy 2015, section 3, https://arxiv.org/abs/1502.03167.
    """
    options = Options(axis=axis, epsilon=epsilon)
    x = as_floating("x", x)
    feature_axes = canonical_axes("axis", options.axis, x.ndim)
    reduced = [axis for axis in range(x.ndim) if axis not in feature_axes]
    batch = moments(x, reduced, mask=mask, axis_name=axis_name, use_fast_variance=use_fast_variance)
    return {"scale": jnp.sqrt(batch.var + epsilon), "bias": batch.mean}


def batch_norm(
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    *,
    use_running_average: bool,
    update_running_average: bool | None = None,
    axis: Axes = -1,
    momentum: float | jax.Array | None = 0.99,
    epsilon: float | jax.Array = 1e-5,
    mask: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    virtual_batch_size: int | None = None,
    running_var_ddof: int = 0,
    use_fast_variance: bool = True,
    dtype: DTypeLike | None = None,
    initializing: bool = False,
) -> tuple[jax.Array, BatchStats]:
    """Normalizes every feature over the batch and updates the running statistics.

    ``y = activation((x - mean) * rsqrt(var + epsilon) * scale + bias + residual)``. In training,
    `mean` and `var` are those of the batch (Algorithm 1 of the paper) and, with `n` the number of
    values that entered, ::

        new_mean = momentum * old_mean + (1 - momentum) * mean
        new_var = momentum * old_var + (1 - momentum) * var * n / (n - running_var_ddof)

    In evaluation they are the running ones. Two switches say where the statistics come from and
    whether they update: `use_running_average` and `update_running_average`. The relative error of
    the variance stays under 1e-5 for float32 input at any offset that the input itself resolves,
    and for bfloat16 input with ``use_fast_variance=False``: see `bn_jax.moments`. For complex `x`,
    the variance is the mean of ``|x - mean|**2``.

    Where `batch_stats` holds `measured` (`start_measuring` adds it), a call that would update does
    not average. `mean`, `var` and `count` stay as they are, and the moments of the batch are merged
    into `measured`, except for features whose moments are not finite. Evaluation measures too
    then, unless ``update_running_average=False``, and accepts one value per feature and any virtual
    batch size for that. So the state itself says whether it is measured, through every transform
    and any number of calls. `bn_jax.recalibrate` is built on this.

    Args:
        params: ``{"scale": [*F], "bias": [*F]}``, either may be absent.
        batch_stats: ``{"mean": [*F], "var": [*F]}`` and optionally ``"count": [*F]`` and
            ``"measured"``. With `axis_name` the mean must be the same on every device, as it is
            when every update comes from this function. Only type-checked `shard_map` can tell where
            it is not, and then costs one collective more.
        x: floating-point or complex array of any rank.
        use_running_average: True to normalize by the running statistics, False by the batch's.
        update_running_average: whether the batch updates the running statistics. None: if and only
            if it also normalizes, or if there is `measured`. With True and
            ``use_running_average=True``, the old statistics normalize, and no derivative reaches
            the batch's moments.
        axis: the feature axis or axes of `x`; ``*F`` are their sizes in ascending order.
        momentum: the weight of the old value in the running statistics (PyTorch's is its
            complement). None for the cumulative average, every batch weighing the same; it needs
            ``batch_stats["count"]``.
        epsilon: added to the variance.
        mask: boolean or weights, broadcastable to `x` by its last axes: what enters the statistics.
            A weight is finite and not negative: another is an error where it is known, and counts
            as 0 where it is traced. A mask of fewer axes than `x` that fits its first axes as well
            is an error: write ``mask[..., None]``. Every position is still normalized. NaN or
            infinity where the mask is zero reaches no other position, no statistic and no
            derivative.
        activation: an elementwise function applied to the result, `jax.nn.relu` for example.
        residual: an array of the shape of `x`, added before the activation.
        axis_name: the named axis or axes to synchronize over. Where `shard_map`, `pmap` or `vmap`
            binds the axis, statistics are summed over it. Under `jit` without these, plain or
            sharded, `x` is the whole batch and its statistics are global: there the name changes
            nothing. A name that is neither bound nor an axis of the mesh in use, while other names
            are, cannot be right and is an error.
        axis_index_groups: groups of indices of `axis_name`, each with its own statistics. Where
            nothing binds the axis and the groups are consecutive, the examples are divided
            into as many groups instead, as by `virtual_batch_size`.
        virtual_batch_size: how many consecutive examples share statistics (ghost batch norm, Hoffer
            et al. 2017); None for all. Examples lie along the first axis that is not a feature
            axis. The running statistics merge the groups by count. Under `jax.export` with a
            symbolic batch, the batch must be a known multiple: ``"4*b"`` for groups of 4.
        running_var_ddof: 0 for the biased running variance, as in Flax; 1 for the unbiased one of
            Algorithm 2 of the paper, as in PyTorch.
        use_fast_variance: False to guard the variance of bfloat16 input against cancellation;
            `bn_jax.moments` says what holds without. Other input is always guarded.
        dtype: the dtype of `y`; by default the promoted dtype of `x`, `params` and `residual`.
        initializing: True while a model is initialized: no update, no synchronization, and no
            warning of one value per feature.

    Returns:
        `y`, of the shape of `x`, and the new `batch_stats` in the dtypes of the old, but in at
        least float32, and a real mean becomes complex where `x` is. In evaluation they are the old
        ones. A feature whose batch moments are not finite, or to which no more than
        `running_var_ddof` valid values contributed, keeps its old values. A feature without a valid
        value is normalized by them. A carry of `lax.scan` must have the dtypes of the result from
        the start: `bn_jax.promote_batch_stats` casts a state in half precision.

    Raises:
        TypeError: `x` is integer or boolean, or `dtype` is real where something is complex.
        ValueError: an argument does not fit the others; the message says which and how to fix
            it.
        NameError: `axis_name` is not bound, but other axes are.

    Warns:
        UserWarning: there is one value per feature to train on (by the shape of `x` and the size of
            `axis_name`; values of a mask are not looked at). Then `y` is `bias` whatever `x` is,
            the gradient by `x` is 0, and the running variance moves towards 0 (with
            ``running_var_ddof=1``, the running statistics stay as they are). A virtual batch of one
            example is such a case too; its running variance is that between the examples.

    Where it differs from `flax.linen.BatchNorm`: the variance does not cancel (of bfloat16 input,
    with ``use_fast_variance=False``), devices are merged by their counts, an empty device or batch
    is no special case, and a batch that is not finite leaves the running statistics alone.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> params, batch_stats = bn.init_params(1), bn.init_batch_stats(1)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, batch_stats = bn.batch_norm(
        ...     params, batch_stats, x, use_running_average=False, momentum=0.5
        ... )
        >>> y.round(3).tolist(), batch_stats["mean"].tolist()
        ([[-1.0], [1.0]], [1.0])

    Reference: Ioffe & Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by
    Reducing Internal Covariate Shift", https://arxiv.org/abs/1502.03167.
    """
    options = Options(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        activation=activation,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        running_var_ddof=running_var_ddof,
        use_fast_variance=use_fast_variance,
        dtype=dtype,
    )
    inputs = check_inputs(options, params, batch_stats, as_floating("x", x), mask, residual)
    mode = choose_mode(batch_stats, use_running_average, update_running_average, initializing)
    return run_norm(options, inputs, mode)


def choose_mode(
    batch_stats: Mapping[str, object],
    use_running_average: bool,
    update_running_average: bool | None,
    initializing: bool,
) -> Mode:
    """Returns how a call runs: by default it updates in training, and where it is measured."""
    if update_running_average is None:
        update_running_average = not use_running_average or "measured" in batch_stats
    return Mode(use_running_average, update_running_average and not initializing, initializing)


def run_norm(options: Options, inputs: Inputs, mode: Mode) -> tuple[jax.Array, BatchStats]:
    """Computes `batch_norm` and, where there is a correction, its relatives.

    All that depends on where the call is made (named axes, meshes) is decided here, and the rest
    compiled as one function. So an eager call is one program, and norms of one shape are traced,
    differentiated and lowered once.
    """
    layout = None
    if mode.update or not mode.use_running_average:
        if mode.update and options.momentum is None:
            check_count_kept(inputs.batch_stats, "init_batch_stats")
        # A state that is measured accepts any batch: nothing is normalized by the moments.
        is_measured = mode.use_running_average and "measured" in inputs.batch_stats
        layout = lay_out(options, inputs, mode.initializing, for_averages_only=is_measured)
    weight = weigh_batch(options.momentum)
    y, updated = _run(mode, layout, options.running_var_ddof, inputs, weight)
    return y, inputs.batch_stats if updated is None else updated


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    mode: Mode, layout: Layout | None, running_var_ddof: int, inputs: Inputs, weight: Weight
) -> tuple[jax.Array, BatchStats | None]:
    inputs = replace(inputs, x=named(INPUT_NAME, inputs.x))
    batch_stats = inputs.batch_stats
    if layout is None:
        return _normalize_by(inputs, batch_stats), None
    if mode.use_running_average:
        y = _normalize_by(inputs, batch_stats)
        measured = measure_batch(layout, inputs)
    else:
        y, measured = _normalize_by_batch(layout, inputs)
    if not mode.update:
        return y, None
    return y, update(
        weight,
        running_var_ddof,
        batch_stats,
        _merge_groups(layout, inputs, measured),
        by_running=mode.use_running_average or inputs.correction is not None,
        by_batch=not mode.use_running_average,
    )


def normalize_by_batch(
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    *,
    axis: Axes = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    virtual_batch_size: int | None = None,
    use_fast_variance: bool = True,
    dtype: DTypeLike | None = None,
    initializing: bool = False,
) -> tuple[jax.Array, Moments]:
    """Normalizes by the batch and returns its moments, which `update_batch_stats` takes.

    The first half of `batch_norm` in training, for callers that update the running statistics
    themselves: once for several micro-batches, or not at all.

    Arguments and errors are as in `batch_norm`. The mean in `batch_stats` is where measuring
    starts; mean and variance normalize a feature to which nothing valid contributed.

    Returns:
        `y`, of the shape of `x`, and the `Moments` of the batch, each of the shape of the
        features (virtual batches merged). The count is a scalar where it is the same for all.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> params, batch_stats = bn.init_params(1), bn.init_batch_stats(1)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, moments = bn.normalize_by_batch(params, batch_stats, x)
        >>> y.round(3).tolist(), moments.mean.tolist()
        ([[-1.0], [1.0]], [2.0])

    Reference: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, Algorithm 1.
    """
    options = Options(
        axis=axis,
        epsilon=epsilon,
        activation=activation,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        use_fast_variance=use_fast_variance,
        dtype=dtype,
    )
    inputs = check_inputs(options, params, batch_stats, as_floating("x", x), mask, residual)
    layout = lay_out(options, inputs, initializing)
    return _run_part(layout, inputs, None)


def run_part(
    options: Options, inputs: Inputs, statistics: Mapping[str, jax.Array] | None
) -> tuple[jax.Array, Moments]:
    """Normalizes a part of a batch, and returns its moments.

    Args:
        options: the configuration of the norm.
        inputs: the checked arguments of the call.
        statistics: the mean and the variance to normalize by, for example the whole batch's. None
            for the statistics of the part.

    Returns:
        `y`, of the shape of `x`, and the `Moments` of the part, of the shape of the features.
    """
    return _run_part(lay_out(options, inputs), inputs, statistics)


@partial(jax.jit, static_argnums=0)
def _run_part(
    layout: Layout, inputs: Inputs, statistics: Mapping[str, jax.Array] | None
) -> tuple[jax.Array, Moments]:
    inputs = replace(inputs, x=named(INPUT_NAME, inputs.x))
    if statistics is None:
        y, measured = _normalize_by_batch(layout, inputs)
    else:
        y = _normalize_by(inputs, statistics, inputs.correction)
        measured = measure_batch(layout, inputs)
    return y, _merge_groups(layout, inputs, measured).rounded()


def _start(layout: Layout, inputs: Inputs, examples: Examples) -> jax.Array:
    """Returns where measuring starts, and what the mean is where nothing entered."""
    domains = examples.domains_of_moments
    if layout.reduction.method != "guarded" and not may_be_empty(inputs.x, inputs.mask, domains):
        return jnp.zeros((1,) * examples.x.ndim, inputs.mean_dtype)
    mean = jnp.asarray(inputs.batch_stats["mean"], inputs.mean_dtype)
    if inputs.domains is None:
        mean = mean.reshape(examples.feature_shape)
    else:
        mean = place(inputs.domains, mean, inputs.feature_axes, examples.feature_shape)
    return lax.select(jnp.isfinite(mean), mean, jnp.zeros_like(mean))


def measure_batch(layout: Layout, inputs: Inputs) -> CentredMoments:
    """Measures the moments of the examples in their groups, around the running mean."""
    return _measure_examples(layout, inputs, arrange(layout, inputs))


def _measure_examples(layout: Layout, inputs: Inputs, examples: Examples) -> CentredMoments:
    start = _start(layout, inputs, examples)
    domains = examples.domains_of_moments
    measured = centred_moments(layout.reduction, examples.x, examples.mask, start, domains)
    return name_moments(measured, examples.mask, domains)


def _normalize_by_batch(layout: Layout, inputs: Inputs) -> tuple[jax.Array, CentredMoments]:
    """Normalizes by the moments of the batch, and returns these."""
    examples = arrange(layout, inputs)
    if _is_plain(layout, inputs):
        y, measured = standardize_by_moments(
            layout.reduction,
            inputs.y_dtype,
            examples.x,
            _start(layout, inputs, examples),
            learned_by(inputs, examples.feature_shape),
            jnp.asarray(inputs.epsilon, inputs.var_dtype),
            examples.domains,
        )
        if examples.domains_of_moments is None:
            measured = measured._replace(count=count_of(layout.reduction, examples.x))
        return complete(inputs, y), measured
    measured = _measure_examples(layout, inputs, examples)
    transform = _transform_by_batch(inputs, examples, measured)
    y = normalize(inputs, examples.x, examples.mask, transform, examples.domains)
    return y, measured


def _is_plain(layout: Layout, inputs: Inputs) -> bool:
    """Tells whether nothing comes between the moments and the normalization by them."""
    return (
        not layout.reduction.is_mapped
        and not may_be_empty(inputs.x, inputs.mask)
        and inputs.correction is None
        and not keeps_input_alone(inputs)
        and inputs.transform_dtype == inputs.mean_dtype
    )


def _running_var(inputs: Inputs, examples: Examples) -> jax.Array:
    running_var = jnp.asarray(inputs.batch_stats["var"], inputs.var_dtype)
    return place(inputs.domains, running_var, inputs.feature_axes, examples.feature_shape)


def _transform_by_batch(inputs: Inputs, examples: Examples, measured: CentredMoments) -> Transform:
    var, shape = measured.var, examples.feature_shape
    if may_be_empty(inputs.x, inputs.mask, examples.domains_of_moments):
        running_var = _running_var(inputs, examples)
        var = jnp.where(measured.count > 0, var, place_like(var, running_var))
    transform = make_transform(inputs, shape, measured.shift, measured.delta, var)
    if inputs.correction is None:
        return transform
    return inputs.correction(transform, _transform_by(inputs, inputs.batch_stats, shape))


def _normalize_by(
    inputs: Inputs, statistics: Mapping[str, Any], correction: Correction | None = None
) -> jax.Array:
    """Normalizes by statistics that do not depend on `x`."""
    shape = feature_shape_of(inputs)
    transform = _transform_by(inputs, statistics, shape)
    if correction is not None:
        transform = correction(transform, _transform_by(inputs, inputs.batch_stats, shape))
    return normalize(inputs, inputs.x, inputs.mask, transform, inputs.domains)


def _transform_by(
    inputs: Inputs, statistics: Mapping[str, Any], shape: tuple[int, ...]
) -> Transform:
    mean = jnp.asarray(statistics["mean"], inputs.mean_dtype)
    var = jnp.asarray(statistics["var"], inputs.var_dtype)
    placed = partial(place, inputs.domains, feature_axes=inputs.feature_axes, shape=shape)
    return make_transform(inputs, shape, placed(mean), None, placed(var))


def _merge_groups(layout: Layout, inputs: Inputs, measured: CentredMoments) -> CentredMoments:
    """Returns the moments of the whole batch, in the shape of the features."""
    if layout.group_axis is not None:
        measured = merge_centred(layout.group_axis, measured)
    domains = None if inputs.domains is None else own_moments(inputs.domains)
    if domains is None:
        leaf_of = partial(jnp.reshape, shape=inputs.features)
    else:
        leaf_of = partial(domains.leaf_of, feature_axes=inputs.feature_axes)
    if measured.count.size == 1:
        count = measured.count.reshape(())
    else:
        count = leaf_of(jnp.broadcast_to(measured.count, measured.var.shape))
    return CentredMoments(
        count=count,
        shift=leaf_of(measured.shift),
        delta=None if measured.delta is None else leaf_of(measured.delta),
        var=leaf_of(measured.var),
    )
