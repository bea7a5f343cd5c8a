"""Batch normalization as a pure function of parameters, statistics and input.

A call of `batch_norm` in training takes four steps: `check_inputs`, `measure` (the moments of the
batch), `_normalize` and `running.update`. Code that merges moments between the steps (gradient
accumulation) calls the two halves, `normalize_by_batch` and `update_batch_stats`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bn_jax._core.axes import (
    Reduction,
    bound_axes,
    make_reduction,
    place_like,
    split_axis,
    static_count,
)
from bn_jax._core.checkpoint_names import MOMENTS_NAME, named
from bn_jax._core.checks import (
    Inputs,
    as_floating,
    as_shape,
    canonical_axes,
    check_count_kept,
    check_inputs,
    check_virtual_batch_size,
    examples_of_a_group,
    warn_of_single_value,
)
from bn_jax._core.moments import CentredMoments, centred_moments, merge_centred, moments
from bn_jax._core.running import update
from bn_jax._core.standardize import make_transform, normalize
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
    batch = moments(x, reduced, mask=mask, axis_name=axis_name)
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
    the variance stays under 1e-5 for float32 input at any offset that the input itself resolves:
    see `bn_jax.moments`. For complex `x`, the variance is the mean of ``|x - mean|**2``.

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

    Where it differs from `flax.linen.BatchNorm`: the variance does not cancel, devices are merged
    by their counts, an empty device or batch is no special case, and a batch that is not finite
    leaves the running statistics alone.

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
        dtype=dtype,
    )
    inputs = check_inputs(options, params, batch_stats, as_floating("x", x), mask, residual)
    mode = choose_mode(batch_stats, use_running_average, update_running_average, initializing)
    return run_norm(inputs, mode)


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


def run_norm(inputs: Inputs, mode: Mode) -> tuple[jax.Array, BatchStats]:
    """Computes `batch_norm` and, where the options have a correction, its relatives."""
    options, batch_stats = inputs.options, inputs.batch_stats
    if mode.update and options.momentum is None:
        check_count_kept(batch_stats, "init_batch_stats")
    if mode.use_running_average:
        y = _normalize_by(inputs, batch_stats)
        if not mode.update:
            return y, batch_stats
        # A state that is measured accepts any batch: nothing is normalized by the moments.
        moments = _merge_groups(measure(inputs, for_averages_only="measured" in batch_stats))
    else:
        batch = measure(inputs, initializing=mode.initializing)
        if not mode.update:
            return _normalize_by_batch(batch), batch_stats
        moments, y = _merge_groups(batch), _normalize_by_batch(batch)
    return y, update(
        options,
        batch_stats,
        moments,
        by_running=mode.use_running_average or options.correction is not None,
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
        dtype=dtype,
    )
    x = as_floating("x", x)
    inputs = check_inputs(options, params, batch_stats, x, mask, residual)
    batch = measure(inputs, initializing=initializing)
    return _normalize_by_batch(batch), _merge_groups(batch).rounded()


def run_part(
    inputs: Inputs, statistics: Mapping[str, jax.Array] | None
) -> tuple[jax.Array, Moments]:
    """Normalizes a part of a batch, and returns its moments.

    Args:
        inputs: the checked arguments of the call.
        statistics: the mean and the variance to normalize by, for example the whole batch's. None
            for the statistics of the part.

    Returns:
        `y`, of the shape of `x`, and the `Moments` of the part, of the shape of the features.
    """
    batch = measure(inputs)
    if statistics is None:
        y = _normalize_by_batch(batch)
    else:
        y = _normalize_by(inputs, statistics, inputs.options.correction)
    return y, _merge_groups(batch).rounded()


class Examples(NamedTuple):
    """The examples of a batch, in their groups.

    Attributes:
        x: the input; where there are groups, with the batch axis split into two.
        mask: None, or of the rank of `x`.
        reduction: what the moments are taken over.
        feature_shape: the shape in which per-feature arrays broadcast to `x`.
        group_axis: the axis of the groups, None where there are none.
    """

    x: jax.Array
    mask: jax.Array | None
    reduction: Reduction
    feature_shape: tuple[int, ...]
    group_axis: int | None = None


class Batch(NamedTuple):
    """A batch that has been measured.

    Attributes:
        inputs: the checked arguments of the call.
        examples: its examples in their groups.
        moments: their moments, of the rank of the examples.
        var: the variance to normalize by: the running one where nothing entered.
    """

    inputs: Inputs
    examples: Examples
    moments: CentredMoments
    var: jax.Array


def measure(
    inputs: Inputs, *, initializing: bool = False, for_averages_only: bool = False
) -> Batch:
    """Measures the moments of a batch, around the running mean.

    Args:
        inputs: the checked arguments of the call.
        initializing: True for no synchronization, no groups, and no warning.
        for_averages_only: True where nothing is normalized by the moments. Groups of examples would
            be merged afterwards, so that there are none then.

    Returns:
        The examples and their moments.
    """
    if initializing or for_averages_only:
        examples = _examples_together(inputs, synchronized=not initializing)
    else:
        examples = _examples_in_groups(inputs)
    x, mask, shape = examples.x, examples.mask, examples.feature_shape
    running_mean = jnp.asarray(inputs.batch_stats["mean"], inputs.mean_dtype).reshape(shape)
    start = jnp.where(jnp.isfinite(running_mean), running_mean, 0)
    measured = named(MOMENTS_NAME, centred_moments(examples.reduction, x, mask, start))
    var = measured.var
    if mask is not None or 0 in x.shape:
        running_var = jnp.asarray(inputs.batch_stats["var"], inputs.var_dtype).reshape(shape)
        var = jnp.where(measured.count > 0, var, place_like(var, running_var))
    return Batch(inputs, examples, measured, var)


def _examples_together(inputs: Inputs, *, synchronized: bool) -> Examples:
    """Returns all examples as one group, except for groups of devices under a named axis."""
    options, x, reduced = inputs.options, inputs.x, _reduced_axes(inputs)
    reduction = Reduction(reduced)
    if synchronized:
        groups = options.axis_index_groups if bound_axes(x, options.axis_name) else None
        reduction = make_reduction(x, reduced, options.axis_name, groups)
    return Examples(x, inputs.mask, reduction, _feature_shape(inputs))


def _examples_in_groups(inputs: Inputs) -> Examples:
    """Returns the examples with those in a group of their own that share statistics.

    Raises:
        ValueError: the groups do not divide the batch.
    """
    options, x, mask = inputs.options, inputs.x, inputs.mask
    reduced, shape = _reduced_axes(inputs), _feature_shape(inputs)
    size, number = options.virtual_batch_size, None
    if size is not None:
        check_virtual_batch_size(options, x.shape, reduced[0] if reduced else None)
    elif options.axis_index_groups is not None and not bound_axes(x, options.axis_name):
        size = examples_of_a_group(options, x.shape[reduced[0]] if reduced else 1)
        number = len(options.axis_index_groups)
    if size is None:
        reduction = make_reduction(x, reduced, options.axis_name, options.axis_index_groups)
        examples = Examples(x, mask, reduction, shape)
    else:
        # The groups take the place of the batch axis, and their examples lie along the next axis.
        # No other reduced axis comes before.
        batch_axis = reduced[0]
        examples = Examples(
            x=split_axis(batch_axis, size, x, number),
            mask=None if mask is None else split_axis(batch_axis, size, mask, number),
            reduction=Reduction(tuple([axis + 1 for axis in reduced]), of_groups=True),
            feature_shape=(*shape[:batch_axis], 1, *shape[batch_axis:]),
            group_axis=batch_axis,
        )
    if static_count(examples.reduction, examples.x.shape) == 1:
        warn_of_single_value(options, x.shape, in_groups=size is not None)
    return examples


def _reduced_axes(inputs: Inputs) -> tuple[int, ...]:
    return tuple([axis for axis in range(inputs.x.ndim) if axis not in inputs.feature_axes])


def _merge_groups(batch: Batch) -> CentredMoments:
    """Returns the moments of the whole batch, in the shape of the features."""
    merged, features = batch.moments, batch.inputs.features
    if batch.examples.group_axis is not None:
        merged = merge_centred(batch.examples.group_axis, merged)
    if merged.count.size == 1:
        count = merged.count.reshape(())
    else:
        count = jnp.broadcast_to(merged.count, merged.var.shape).reshape(features)
    return CentredMoments(
        count=count,
        shift=merged.shift.reshape(features),
        delta=merged.delta.reshape(features),
        var=merged.var.reshape(features),
    )


def _normalize_by_batch(batch: Batch) -> jax.Array:
    inputs, examples, measured = batch.inputs, batch.examples, batch.moments
    shape = examples.feature_shape
    transform = make_transform(inputs, shape, measured.shift, measured.delta, batch.var)
    correction = inputs.options.correction
    if correction is not None:
        transform = correction(transform, _transform_by(inputs, inputs.batch_stats, shape))
    return normalize(inputs, examples.x, examples.mask, transform)


def _normalize_by(
    inputs: Inputs, statistics: Mapping[str, Any], correction: Correction | None = None
) -> jax.Array:
    """Normalizes by statistics that do not depend on `x`."""
    shape = _feature_shape(inputs)
    transform = _transform_by(inputs, statistics, shape)
    if correction is not None:
        transform = correction(transform, _transform_by(inputs, inputs.batch_stats, shape))
    return normalize(inputs, inputs.x, inputs.mask, transform)


def _transform_by(
    inputs: Inputs, statistics: Mapping[str, Any], shape: tuple[int, ...]
) -> Transform:
    mean = jnp.asarray(statistics["mean"], inputs.mean_dtype).reshape(shape)
    var = jnp.asarray(statistics["var"], inputs.var_dtype).reshape(shape)
    return make_transform(inputs, shape, mean, jnp.zeros_like(mean), var)


def _feature_shape(inputs: Inputs) -> tuple[int, ...]:
    """Returns the shape in which per-feature arrays broadcast to `x`."""
    axes = inputs.feature_axes
    return tuple([size if axis in axes else 1 for axis, size in enumerate(inputs.x.shape)])
