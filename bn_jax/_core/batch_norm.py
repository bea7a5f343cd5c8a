"""Batch normalization as a pure function of parameters, statistics and input."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, NamedTuple, NotRequired, TypeAlias, TypedDict, cast

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax._core.moments import (
    INPUT_NAME,
    MOMENTS_NAME,
    AxisName,
    CentredMoments,
    Moments,
    Reduction,
    as_floating,
    bound_axes,
    broadcastable_mask,
    canonical_axes,
    canonical_groups,
    centred_moments,
    make_reduction,
    mean_dtype,
    merge_centred,
    moments,
    named,
    split_axis,
    static_count,
    statistics_dtype,
    varying_axes,
)
from bn_jax._core.standardize import (
    Activation,
    Params,
    Transform,
    as_params,
    check_epsilon,
    check_features,
    make_normalizer,
    make_transform,
    output_dtype,
)

Correction: TypeAlias = Callable[[Transform, Transform], Transform]
"""Takes the transforms by the batch and by the running statistics to the one that is computed."""


class Measured(NamedTuple):
    """What calls have measured since `start_measuring`.

    Every array is floating-point and of the shape of the features, so that whatever stacks, splits
    and shards running statistics does the same to it.

    Attributes:
        count: how many values entered (the sum of their weights).
        mean: their mean, 0 where `count` is 0.
        var: their biased variance, 0 where `count` is 0.
        running_var_ddof: that of the layer, 0 where no call has measured.
        by_running: how many of the calls that measured normalized by the running statistics, alone
            or, as batch renorm in training, in part. What was measured behind such a call depends
            on them.
        by_batch: how many normalized by the statistics of the batch, alone or in part.
        residue: what rounding has left of the mean, which is ``mean + residue`` in higher
            precision: far from zero, variances cannot be merged without.
    """

    count: jax.Array  # type: ignore[assignment]
    mean: jax.Array
    var: jax.Array
    running_var_ddof: jax.Array
    by_running: jax.Array
    by_batch: jax.Array
    residue: jax.Array


class BatchStats(TypedDict):
    """The running statistics, each of the shape of the features.

    `count` is the number of batches that entered them; where it is kept, each update adds one.
    Where there is `measured`, batches are not averaged, but measured: see `batch_norm`.
    """

    mean: jax.Array
    var: jax.Array
    count: NotRequired[jax.Array]
    measured: NotRequired[Measured]


def init_params(
    features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    dtype: Any = jnp.float32,
) -> Params:
    """Returns ``{"scale": ones, "bias": zeros}`` of shape `features`.

    Args:
        features: the number of features, or their shape where the feature axes are several.
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
    shape = _feature_shape(features)
    params: Params = {}
    if use_scale:
        params["scale"] = jnp.ones(shape, dtype)
    if use_bias:
        params["bias"] = jnp.zeros(shape, dtype)
    return params


def init_batch_stats(
    features: int | Sequence[int], *, dtype: Any = jnp.float32, use_count: bool = False
) -> BatchStats:
    """Returns ``{"mean": zeros, "var": ones}`` of shape `features`.

    Args:
        features: the number of features, or their shape where the feature axes are several.
        dtype: the dtype of the statistics; for complex input that of the mean, and the variance
            is real.
        use_count: whether there is ``"count": zeros`` as well, the number of batches, which
            ``momentum=None`` needs. It is a float (exact to 2**24 batches), so that averaging
            ``batch_stats`` over devices does not change its type.

    Returns:
        The running statistics for `batch_norm`.

    Example:
        >>> import bn_jax as bn
        >>> bn.init_batch_stats(2)["var"]
        Array([1., 1.], dtype=float32)
    """
    shape = _feature_shape(features)
    batch_stats: BatchStats = {
        "mean": jnp.zeros(shape, dtype),
        "var": jnp.ones(shape, jnp.finfo(dtype).dtype),
    }
    if use_count:
        batch_stats["count"] = jnp.zeros(shape, statistics_dtype(dtype))
    return batch_stats


def identity_params(
    x: jax.Array,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> Params:
    """Returns the parameters that make batch norm the identity on a batch.

    ``scale = sqrt(var + epsilon)``, ``bias = mean``: what training would have to find for the norm
    to change nothing, and so what to begin with where one is put into a trained network.

    Args:
        x: floating-point or complex array, the batch.
        axis: the feature axis or axes of `x`.
        epsilon: that of the norm.
        mask: boolean or non-negative weights, broadcastable to `x`, as the norm will have it.
        axis_name: the named axis or axes that the norm synchronizes over.

    Returns:
        ``{"scale": [*F], "bias": [*F]}`` in at least float32; of complex `x` the scale is real.

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
    check_epsilon(epsilon)
    x = as_floating("x", x)
    feature_axes = canonical_axes("axis", axis, x.ndim)
    reduced = [axis for axis in range(x.ndim) if axis not in feature_axes]
    found = moments(x, reduced, mask=mask, axis_name=axis_name)
    return {"scale": jnp.sqrt(found.var + epsilon), "bias": found.mean}


def start_measuring(batch_stats: BatchStats) -> BatchStats:
    """Returns `batch_stats` as a state that is measured: with `measured`, in which nothing is yet.

    `batch_norm` says what calls do with such a state.

    Args:
        batch_stats: ``{"mean": [*F], "var": [*F]}`` and on demand ``"count": [*F]``.

    Returns:
        The same statistics and `Measured`, in at least float32.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from bn_jax._core.batch_norm import start_measuring
        >>> batch_stats = start_measuring(bn.init_batch_stats(1))
        >>> for x in jnp.array([[1.0]]), jnp.array([[3.0], [8.0]]):
        ...     y, batch_stats = bn.batch_norm({}, batch_stats, x, use_running_average=True)
        >>> batch_stats["measured"].mean.tolist(), batch_stats["mean"].tolist()
        ([4.0], [0.0])
    """
    mean, var = jnp.asarray(batch_stats["mean"]), jnp.asarray(batch_stats["var"])
    dtype = statistics_dtype(mean.dtype, var.dtype)
    zeros = jnp.zeros_like(var, dtype)
    of_mean = jnp.zeros_like(mean, mean_dtype(dtype, mean.dtype))
    return {
        **batch_stats,
        "measured": Measured(zeros, of_mean, zeros, zeros, zeros, zeros, of_mean),
    }


def batch_norm(
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    *,
    use_running_average: bool,
    update_running_average: bool | None = None,
    axis: int | Sequence[int] = -1,
    momentum: float | jax.Array | None = 0.99,
    epsilon: float | jax.Array = 1e-5,
    mask: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    virtual_batch_size: int | None = None,
    running_var_ddof: int = 0,
    dtype: Any = None,
    initializing: bool = False,
) -> tuple[jax.Array, BatchStats]:
    """Normalizes every feature over the batch and updates the running statistics.

    ``y = activation((x - mean) * rsqrt(var + epsilon) * scale + bias + residual)``. In training,
    `mean` and `var` are those of the batch (Algorithm 1 of the paper) and, with `n` the number of
    values that entered, ::

        new_mean = momentum * old_mean + (1 - momentum) * mean
        new_var = momentum * old_var + (1 - momentum) * var * n / (n - running_var_ddof)

    In evaluation they are the running ones. Where the statistics come from and whether they update
    are two switches: `use_running_average` and `update_running_average`. The relative error of the
    variance stays under 1e-5 for float32 input at any offset that the input itself resolves: see
    `bn_jax.moments`. Of complex `x`, the variance is the mean of ``|x - mean|**2``.

    Where `batch_stats` holds `measured` (`start_measuring` puts it there), a call that would update
    does not average: `mean`, `var` and `count` stay as they are, and the moments of the batch are
    merged into `measured`, but those of a feature that are not finite. Evaluation measures too
    then, unless ``update_running_average=False``; one value per feature, and any virtual batch
    size, will do for that. So the state itself says whether it is measured, through every transform
    and every number of calls. `bn_jax.recalibrate` is made of this.

    Args:
        params: ``{"scale": [*F], "bias": [*F]}``, either may be absent.
        batch_stats: ``{"mean": [*F], "var": [*F]}`` and on demand ``"count": [*F]`` and
            ``"measured"``. With `axis_name` the mean must be the same on every device, as it is
            when every update comes from this function; only type-checked `shard_map` can tell where
            it is not, and then costs a collective more.
        x: floating-point or complex array of any rank.
        use_running_average: True to normalize by the running statistics, False by the batch's.
        update_running_average: whether the batch updates the running statistics. None: if and only
            if it also normalizes, or if there is `measured`. True beside
            ``use_running_average=True``: `y` is that of the old ones, through which no derivative
            reaches the batch's moments.
        axis: the feature axis or axes of `x`; ``*F`` are their sizes in ascending order.
        momentum: the weight of the old value in the running statistics (PyTorch's is its
            complement). None for the cumulative average, every batch weighing the same; it needs
            ``batch_stats["count"]``.
        epsilon: added to the variance.
        mask: boolean or non-negative weights, broadcastable to `x`: what enters the statistics.
            Every position is still normalized; NaN or infinity where the mask is zero reaches no
            other position, no statistic and no derivative.
        activation: an elementwise function applied to the result, `jax.nn.relu` for example.
        residual: an array of the shape of `x`, added before the activation.
        axis_name: the named axis or axes to synchronize over. Where `shard_map`, `pmap` or `vmap`
            binds the axis, statistics are summed over it. Under `jit` without these, plain or
            sharded, `x` is the whole batch and its statistics are global: there the name has
            nothing to add and changes nothing. What cannot be right is an error: an axis that
            is neither bound nor one of the mesh in use, while others are.
        axis_index_groups: groups of indices of `axis_name` with statistics of their own. Where
            nothing binds the axis and the groups are consecutive, the examples are divided
            into as many groups instead, as by `virtual_batch_size`.
        virtual_batch_size: statistics of their own for every that many consecutive examples
            (ghost batch norm, Hoffer et al. 2017). Examples lie along the first axis that is not a
            feature axis. The running statistics merge the groups by count.
        running_var_ddof: 0 for the biased running variance, as Flax has it; 1 for the unbiased
            one of Algorithm 2 of the paper, as PyTorch has it.
        dtype: the dtype of `y`; by default that of `x`, `params` and `residual` promoted.
        initializing: True while a model is initialized: no update, no synchronization, and a
            batch of one is allowed.

    Returns:
        `y`, of the shape of `x`, and the new `batch_stats` in the dtypes of the old (but a real
        mean becomes complex where `x` is). In evaluation they are the old ones. A feature whose
        batch moments are not finite, or to which no more than `running_var_ddof` valid values
        contributed, keeps its old ones; without a valid value it is normalized by them.

    Raises:
        TypeError: `x` is integer or boolean, or `dtype` is real where something is complex.
        ValueError: an argument does not fit the others; the message says which and how to mend
            it. Training on one value per feature is one such case: the output would be `bias`
            whatever the input.
        NameError: `axis_name` is not bound, but other axes are.

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
    return normalize_and_update(
        params,
        batch_stats,
        x,
        None,
        use_running_average=use_running_average,
        update_running_average=update_running_average,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        mask=mask,
        activation=activation,
        residual=residual,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        running_var_ddof=running_var_ddof,
        dtype=dtype,
        initializing=initializing,
    )


def normalize_and_update(
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    correction: Correction | None,
    *,
    use_running_average: bool,
    update_running_average: bool | None,
    axis: int | Sequence[int],
    momentum: float | jax.Array | None,
    epsilon: float | jax.Array,
    mask: jax.Array | None,
    activation: Activation | None,
    residual: jax.Array | None,
    axis_name: AxisName | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    virtual_batch_size: int | None,
    running_var_ddof: int,
    dtype: Any,
    initializing: bool,
) -> tuple[jax.Array, BatchStats]:
    """Computes `batch_norm`, in training with the correction of a relative of it.

    `correction` makes the transform by the batch that of the relative; None makes none. The other
    arguments, the result and the errors are those of `batch_norm`.
    """
    measuring = "measured" in batch_stats
    if update_running_average is None:
        update_running_average = measuring or not use_running_average
    update = update_running_average and not initializing
    check_averaging(momentum, running_var_ddof)
    if update:
        _check_count_kept(momentum, batch_stats)
    given = _prepare(params, batch_stats, x, axis, epsilon, mask, activation, residual, dtype)
    if use_running_average:
        y = given.normalize(given.x, given.mask, _by_running(given, batch_stats, epsilon))
    if update or not use_running_average:
        groups = axis_name, axis_index_groups, virtual_batch_size
        alone = measuring and use_running_average
        batch = _measure(given, batch_stats, axis, *groups, initializing, alone)
    if not use_running_average:
        y = _normalize_by_batch(given, batch, batch_stats, epsilon, correction)
    if not update:
        return y, batch_stats
    found = _merged(batch, jnp.shape(batch_stats["mean"]))
    if measuring:
        calls = use_running_average or correction is not None, not use_running_average
        return y, _measure_too(batch_stats, found, running_var_ddof, *calls)
    return y, update_batch_stats(
        batch_stats, _rounded(found), momentum=momentum, running_var_ddof=running_var_ddof
    )


def normalize_by_batch(
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    virtual_batch_size: int | None = None,
    dtype: Any = None,
    initializing: bool = False,
) -> tuple[jax.Array, Moments]:
    """Normalizes by the batch and returns its moments, which `update_batch_stats` takes.

    The first half of `batch_norm` in training, for who updates the running statistics otherwise
    than once in every call: once for several micro-batches, or not at all.

    Arguments and errors are those of `batch_norm`. Of `batch_stats`, the mean is only where the
    measuring starts, and both it and the variance normalize a feature to which nothing valid
    contributed.

    Returns:
        `y`, of the shape of `x`, and the `Moments` of the batch, each of the shape of the
        features (of virtual batches, merged); the count is a scalar where it is the same for all.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> params, batch_stats = bn.init_params(1), bn.init_batch_stats(1)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, moments = bn.normalize_by_batch(params, batch_stats, x)
        >>> y.round(3).tolist(), moments.mean.tolist()
        ([[-1.0], [1.0]], [2.0])

    Reference: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, Algorithm 1.
    """
    return normalize_by_moments(
        params,
        batch_stats,
        x,
        None,
        None,
        axis=axis,
        epsilon=epsilon,
        mask=mask,
        activation=activation,
        residual=residual,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        dtype=dtype,
        initializing=initializing,
    )


def normalize_by_moments(
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    moments: Mapping[str, jax.Array] | None,
    correction: Correction | None,
    *,
    axis: int | Sequence[int],
    epsilon: float | jax.Array,
    mask: jax.Array | None,
    activation: Activation | None,
    residual: jax.Array | None,
    axis_name: AxisName | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    virtual_batch_size: int | None,
    dtype: Any,
    initializing: bool = False,
) -> tuple[jax.Array, Moments]:
    """Computes `normalize_by_batch`, for a part of a batch and with the correction of a relative.

    `moments` are the mean and the variance to normalize by, those of the whole batch; None for
    those of `x`. `correction` is that of `normalize_and_update`. The other arguments, the result
    and the errors are those of `normalize_by_batch`.
    """
    given = _prepare(params, batch_stats, x, axis, epsilon, mask, activation, residual, dtype)
    groups = axis_name, axis_index_groups, virtual_batch_size
    batch = _measure(given, batch_stats, axis, *groups, initializing)
    if moments is None:
        y = _normalize_by_batch(given, batch, batch_stats, epsilon, correction)
    else:
        transform = _by_running(given, moments, epsilon)
        if correction is not None:
            transform = correction(transform, _by_running(given, batch_stats, epsilon))
        y = given.normalize(given.x, given.mask, transform)
    return y, _rounded(_merged(batch, jnp.shape(batch_stats["mean"])))


def update_batch_stats(
    batch_stats: BatchStats,
    moments: Moments,
    *,
    momentum: float | jax.Array | None = 0.99,
    running_var_ddof: int = 0,
    by_running: bool = False,
) -> BatchStats:
    """Updates the running statistics by the moments of a batch.

    With `n` the count, ``new_mean = momentum * old_mean + (1 - momentum) * mean`` and
    ``new_var = momentum * old_var + (1 - momentum) * var * n / (n - running_var_ddof)``. The second
    half of `batch_norm` in training; its first is `normalize_by_batch`. Between them, moments may
    be merged with `merge_moments`: then several batches make one update. Where `batch_stats` holds
    `measured`, the moments are merged into it instead: see `batch_norm`.

    Args:
        batch_stats: ``{"mean": [*F], "var": [*F]}`` and on demand ``"count": [*F]`` and
            ``"measured"``.
        moments: of the batch, each of shape ``[*F]``; the count may be a scalar.
        momentum: the weight of the old value; None for the cumulative average.
        running_var_ddof: 0 for the biased running variance, 1 for the unbiased one.
        by_running: whether the running statistics normalized the batch; only `measured` tells it.

    Returns:
        The new `batch_stats` in the dtypes of the old (but a real mean becomes complex where that
        of the batch is). A feature whose moments are not finite, or whose count is no more than
        `running_var_ddof`, keeps its old ones.

    Raises:
        ValueError: shapes, `momentum` or `running_var_ddof` do not fit.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> batch_stats = bn.init_batch_stats(1)
        >>> moments = bn.moments(jnp.array([[1.0], [3.0]]), axes=0)
        >>> bn.update_batch_stats(batch_stats, moments, momentum=0.5)["mean"].tolist()
        [1.0]

    Reference: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, Algorithm 2.
    """
    check_averaging(momentum, running_var_ddof)
    _check_count_kept(momentum, batch_stats)
    old = {name: jnp.asarray(values) for name, values in batch_stats.items() if name != "measured"}
    count, mean, var = map(jnp.asarray, moments)
    if not old["mean"].shape == mean.shape == var.shape or count.shape not in ((), mean.shape):
        raise ValueError(
            f"moments of the shapes {tuple(map(jnp.shape, moments))} (count, mean, var) do not fit "
            f"batch_stats of shape {old['mean'].shape}: take them over all axes but the features'."
        )
    if "measured" in batch_stats:
        found = CentredMoments(count, mean, jnp.zeros_like(mean), var)
        return _measure_too(batch_stats, found, running_var_ddof, by_running, not by_running)
    weight = 1 / (old["count"] + 1) if momentum is None else 1 - momentum
    by_step = weight < 0.5 if isinstance(weight, Real) else None
    batch = Moments(count, mean, var)
    new = _averaged(running_var_ddof, by_step, jnp.asarray(weight), old, batch)
    return cast(BatchStats, {**batch_stats, **new})


@partial(jax.jit, static_argnums=(0, 1))
def _averaged(
    running_var_ddof: int,
    by_step: bool | None,
    weight: jax.Array,
    old: dict[str, jax.Array],
    moments: Moments,
) -> dict[str, jax.Array]:
    """Averages the running statistics and a batch's moments, feature by feature."""
    count, mean, var = moments
    freedom = count - running_var_ddof
    if running_var_ddof:
        var = var * (count / jnp.where(freedom > 0, freedom, 1)).astype(var.dtype)
    new = {
        "mean": average(by_step, weight, old["mean"], mean),
        "var": average(by_step, weight, old["var"], var),
    }
    if "count" in old:
        new["count"] = placed_like(var, old["count"]) + 1
    enters = (freedom > 0) & jnp.isfinite(new["mean"]) & jnp.isfinite(new["var"])
    return {
        name: lax.select(enters, values, placed_like(values, old[name].astype(values.dtype)))
        for name, values in new.items()
    }


class _Layout(NamedTuple):
    """Where the features of an array are, and how per-feature arrays broadcast to it."""

    feature_axes: tuple[int, ...]
    reduction_axes: tuple[int, ...]
    expanded_shape: tuple[int, ...]
    dtype: Any
    mean_dtype: Any
    group_axis: int | None = None

    def expand(self, values: jax.Array, dtype: Any) -> jax.Array:
        return jnp.asarray(values, dtype).reshape(self.expanded_shape)


class _Prepared(NamedTuple):
    """Checked input, and what takes examples, their mask and a transform to the output."""

    layout: _Layout
    params: Params
    x: jax.Array
    mask: jax.Array | None
    normalize: Callable[[jax.Array, jax.Array | None, Transform], jax.Array]


def _prepare(
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    axis: int | Sequence[int],
    epsilon: float | jax.Array,
    mask: jax.Array | None,
    activation: Activation | None,
    residual: jax.Array | None,
    dtype: Any,
) -> _Prepared:
    x = named(INPUT_NAME, as_floating("x", x))
    params = as_params(params)
    known = _known(batch_stats)
    feature_axes = canonical_axes("axis", axis, x.ndim)
    check_features("axis", axis, feature_axes, x.shape, params=params, batch_stats=known)
    _check_mean_fits(batch_stats, x)
    check_epsilon(epsilon)
    _check_activation(activation)
    residual = None if residual is None else _as_residual(residual, x.shape)
    mask = None if mask is None else broadcastable_mask(mask, x.shape)
    dtype = output_dtype(dtype, x, params, residual)
    layout = _make_layout(x, feature_axes, dtype)
    normalize = make_normalizer(dtype, jax.typeof(x), mask, activation, residual)
    return _Prepared(layout, params, x, mask, normalize)


class _Batch(NamedTuple):
    """Examples in their groups, their moments, and the variance to normalize them by."""

    layout: _Layout
    examples: jax.Array
    mask: jax.Array | None
    found: CentredMoments
    var: jax.Array


def _measure(
    given: _Prepared,
    batch_stats: BatchStats,
    axis: int | Sequence[int],
    axis_name: AxisName | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    virtual_batch_size: int | None,
    initializing: bool,
    alone: bool = False,
) -> _Batch:
    """Measures the batch; `alone` where nothing will be normalized by what is found."""
    layout, _, x, mask, _ = given
    if initializing:
        axis_name = axis_index_groups = virtual_batch_size = None
    if alone:
        # Groups would be merged afterwards, but for those that a named axis keeps apart.
        axis_index_groups = axis_index_groups if bound_axes(x, axis_name) else None
        virtual_batch_size = None
    if virtual_batch_size is not None:
        _check_groups(layout, x.shape, virtual_batch_size, axis_name)
    elif axis_index_groups is not None and not bound_axes(x, axis_name):
        virtual_batch_size = _examples_of_a_group(layout, x.shape, axis_name, axis_index_groups)
    examples = x
    if virtual_batch_size is None:
        reduction = make_reduction(x, layout.reduction_axes, axis_name, axis_index_groups)
    else:
        layout, examples, mask = _split_groups(layout, x, mask, virtual_batch_size)
        reduction = Reduction(layout.reduction_axes, of_groups=True)
    if not (initializing or alone):
        check_values_per_feature(reduction, x.shape, examples.shape, axis)
    found, var = _batch_moments(layout, reduction, examples, mask, batch_stats)
    return _Batch(layout, examples, mask, found, var)


def _normalize_by_batch(
    given: _Prepared,
    batch: _Batch,
    batch_stats: BatchStats,
    epsilon: float | jax.Array,
    correction: Correction | None,
) -> jax.Array:
    layout, examples, mask, found, var = batch
    shape = layout.expanded_shape
    transform = make_transform(given.params, shape, found.shift, found.delta, var, epsilon)
    if correction is not None:
        in_groups = given._replace(layout=layout)
        transform = correction(transform, _by_running(in_groups, batch_stats, epsilon))
    return given.normalize(examples, mask, transform)


def _by_running(
    given: _Prepared, batch_stats: Mapping[str, Any], epsilon: float | jax.Array
) -> Transform:
    layout = given.layout
    mean = layout.expand(batch_stats["mean"], layout.mean_dtype)
    var = layout.expand(batch_stats["var"], layout.dtype)
    shape = layout.expanded_shape
    return make_transform(given.params, shape, mean, jnp.zeros_like(mean), var, epsilon)


def _make_layout(x: jax.Array, feature_axes: tuple[int, ...], dtype: Any) -> _Layout:
    real_dtype = statistics_dtype(x.dtype, dtype)
    return _Layout(
        feature_axes=feature_axes,
        reduction_axes=tuple(axis for axis in range(x.ndim) if axis not in feature_axes),
        expanded_shape=tuple(
            size if axis in feature_axes else 1 for axis, size in enumerate(x.shape)
        ),
        dtype=real_dtype,
        mean_dtype=mean_dtype(real_dtype, x.dtype),
    )


def _split_groups(
    layout: _Layout, x: jax.Array, mask: jax.Array | None, virtual_batch_size: int
) -> tuple[_Layout, jax.Array, jax.Array | None]:
    """Splits the batch axis into groups and examples of a group."""
    batch_axis = layout.reduction_axes[0]
    split = partial(split_axis, batch_axis, virtual_batch_size)
    groups = split(x)
    feature_axes = tuple(axis + (axis > batch_axis) for axis in layout.feature_axes)
    split_layout = layout._replace(
        feature_axes=feature_axes,
        reduction_axes=tuple(
            axis for axis in range(groups.ndim) if axis not in (*feature_axes, batch_axis)
        ),
        expanded_shape=(
            *layout.expanded_shape[:batch_axis],
            1,
            *layout.expanded_shape[batch_axis:],
        ),
        group_axis=batch_axis,
    )
    return split_layout, groups, None if mask is None else split(mask)


def _batch_moments(
    layout: _Layout,
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    batch_stats: BatchStats,
) -> tuple[CentredMoments, jax.Array]:
    """Returns the batch's moments, and the variance to normalize by.

    Where nothing entered, both the centre and that variance are the running ones.
    """
    running_mean = layout.expand(batch_stats["mean"], layout.mean_dtype)
    shift = jnp.where(jnp.isfinite(running_mean), running_mean, 0)
    found = named(MOMENTS_NAME, centred_moments(reduction, x, mask, shift))
    if mask is None and static_count(reduction, x.shape) > 0:
        return found, found.var
    running_var = placed_like(found.var, layout.expand(batch_stats["var"], layout.dtype))
    return found, jnp.where(found.count > 0, found.var, running_var)


def _merged(batch: _Batch, features: tuple[int, ...]) -> CentredMoments:
    """Returns the moments of the batch, all groups merged, in the shape of the features."""
    layout, found = batch.layout, batch.found
    if layout.group_axis is not None:
        found = merge_centred(layout.group_axis, found)
    count, *others = found
    if count.size == 1:
        count = count.reshape(())
    else:
        count = jnp.broadcast_to(count, found.var.shape).reshape(features)
    return CentredMoments(count, *(leaf.reshape(features) for leaf in others))


def _rounded(found: CentredMoments) -> Moments:
    return Moments(found.count, found.shift + found.delta, found.var)


def _measure_too(
    batch_stats: BatchStats,
    found: CentredMoments,
    running_var_ddof: int,
    by_running: bool,
    by_batch: bool,
) -> BatchStats:
    """Merges the moments of a batch into what has been measured, in the dtypes that this has."""
    measured = Measured(*(placed_like(found.var, leaf) for leaf in batch_stats["measured"]))
    real = measured.var.dtype
    dtype = mean_dtype(real, measured.mean.dtype, found.shift.dtype)
    sound = jnp.isfinite(found.shift + found.delta) & jnp.isfinite(found.var) & (found.count > 0)
    both = CentredMoments(
        jnp.stack([measured.count, jnp.where(sound, found.count.astype(real), 0)]),
        jnp.stack([measured.mean.astype(dtype), found.shift.astype(dtype)]),
        jnp.stack([measured.residue.astype(dtype), found.delta.astype(dtype)]),
        jnp.stack([measured.var, found.var.astype(real)]),
    )
    count, shift, delta, var = merge_centred(0, both)
    mean, residue = _two_sum(shift, delta)
    ddof = jnp.full_like(measured.running_var_ddof, running_var_ddof)
    calls = measured.by_running + float(by_running), measured.by_batch + float(by_batch)
    return {**batch_stats, "measured": Measured(count, mean, var, ddof, *calls, residue)}


def _two_sum(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded sum and, exactly, what rounding has left of it (Knuth)."""
    total = first + second
    of_second = total - first
    return total, (first - (total - of_second)) + (second - of_second)


def average(by_step: bool | None, weight: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Returns the new running value, in the dtype it is stored in."""
    dtype = mean_dtype(statistics_dtype(old.dtype, new.dtype), old.dtype, new.dtype)
    new = new.astype(dtype)
    old_value = placed_like(new, old.astype(dtype))
    share = weight.astype(dtype)
    # A step from the old value stays where it is once it has arrived, for any rounding of a small
    # weight; a sum of shares leaves nothing of the old value where the weight is 1.
    if by_step is None:
        share = placed_like(new, share)
        small = placed_like(new, weight) < 0.5
        average = jnp.where(small, _step(share, old_value, new), _mix(share, old_value, new))
    else:
        average = (_step if by_step else _mix)(share, old_value, new)
    becomes_complex = jnp.iscomplexobj(new) and not jnp.iscomplexobj(old)
    return average if becomes_complex else average.astype(old.dtype)


def _step(share: Any, old: jax.Array, new: jax.Array) -> jax.Array:
    return old + share * (new - old)


def _mix(share: Any, old: jax.Array, new: jax.Array) -> jax.Array:
    return (1 - share) * old + share * new


def placed_like(reference: jax.Array, values: jax.Array) -> jax.Array:
    """Returns `values` with shape and sharding type of `reference`, which a selection needs."""
    kind, wanted = jax.typeof(values), jax.typeof(reference)
    if (kind.shape, kind.sharding) == (wanted.shape, wanted.sharding) and varying_axes(
        values
    ) >= varying_axes(reference):
        return values
    return values + jnp.zeros_like(reference, dtype=values.dtype)


def _feature_shape(features: int | Sequence[int]) -> tuple[int, ...]:
    return (features,) if isinstance(features, int) else tuple(features)


def _known(batch_stats: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the statistics, or raises the ValueError that says which are missing."""
    missing = {"mean", "var"} - set(batch_stats)
    if missing:
        raise ValueError(
            f"batch_stats lacks {sorted(missing)}; it has {sorted(batch_stats)}. Make a new one "
            "with bn_jax.init_batch_stats(features)."
        )
    known = {name: batch_stats[name] for name in ("mean", "var", "count") if name in batch_stats}
    if "measured" not in batch_stats:
        return known
    measured = batch_stats["measured"]._asdict()
    return known | {f"measured.{name}": values for name, values in measured.items()}


def _check_mean_fits(batch_stats: BatchStats, x: jax.Array) -> None:
    if jnp.iscomplexobj(batch_stats["mean"]) and not jnp.iscomplexobj(x):
        raise TypeError(
            f"batch_stats has a complex mean, but x has dtype {x.dtype}: cast x to "
            "jnp.complex64, or make batch_stats with bn_jax.init_batch_stats(features)."
        )


def _check_count_kept(momentum: Any, batch_stats: Mapping[str, Any]) -> None:
    if momentum is None and not {"count", "measured"} & set(batch_stats):
        raise ValueError(
            f"momentum=None averages over all batches and needs their count, but batch_stats has "
            f"{sorted(batch_stats)}. Make it with bn_jax.init_batch_stats(features, "
            "use_count=True), or pass a momentum."
        )


def _check_activation(activation: Any) -> None:
    if activation is not None and not callable(activation):
        raise TypeError(
            f"activation={activation!r} is not a function: pass for example jax.nn.relu."
        )


def _as_residual(residual: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    residual = as_floating("residual", residual)
    if residual.shape != shape:
        raise ValueError(
            f"residual of shape {residual.shape} cannot be added to x of shape {shape}: expected "
            "the same shape. Broadcast it yourself."
        )
    return residual


def check_averaging(momentum: Any, running_var_ddof: int) -> None:
    """Checks what is known while tracing; a traced momentum is taken as it is."""
    if isinstance(momentum, Real) and not 0 <= float(momentum) <= 1:
        raise ValueError(
            f"momentum={momentum} is outside [0, 1]: it is the weight of the old value, 0.9 or "
            "0.99 for example (PyTorch's momentum is 1 minus this)."
        )
    if running_var_ddof not in (0, 1):
        raise ValueError(
            f"running_var_ddof={running_var_ddof} must be 0 (biased, as Flax) or 1 (unbiased, as "
            "the paper and PyTorch)."
        )


def _check_groups(
    layout: _Layout,
    shape: tuple[int, ...],
    virtual_batch_size: int,
    axis_name: AxisName | None,
) -> None:
    if axis_name is not None:
        raise ValueError(
            f"virtual_batch_size={virtual_batch_size} and axis_name={axis_name!r} contradict each "
            "other: statistics are either per group or synchronized. Leave one out."
        )
    if not layout.reduction_axes:
        raise ValueError(
            f"virtual_batch_size={virtual_batch_size} needs an axis of examples: x of shape "
            f"{shape} has feature axes only."
        )
    batch_size = shape[layout.reduction_axes[0]]
    if virtual_batch_size >= 1 and batch_size % virtual_batch_size == 0:
        return
    divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
    below = [size for size in divisors if size < virtual_batch_size][-1:]
    above = [size for size in divisors if size > virtual_batch_size][:1]
    raise ValueError(
        f"virtual_batch_size={virtual_batch_size} does not divide the batch of {batch_size} "
        f"examples. The nearest divisors are {below + above}."
    )


def _examples_of_a_group(
    layout: _Layout,
    shape: tuple[int, ...],
    axis_name: AxisName | None,
    axis_index_groups: Sequence[Sequence[int]],
) -> int:
    """Returns how many consecutive examples make up a group of devices."""
    groups = canonical_groups(axis_name, axis_index_groups)
    consecutive = [index for group in groups for index in sorted(group)]
    batch_size = shape[layout.reduction_axes[0]] if layout.reduction_axes else 1
    if consecutive != list(range(len(consecutive))) or batch_size % len(consecutive):
        raise ValueError(
            f"axis_index_groups={groups} cannot divide the {batch_size} examples of x, for nothing "
            f"binds axis_name={axis_name!r} here: expected groups of consecutive indices, and "
            f"examples for {len(consecutive)} devices of as many each. Mend these, or call inside "
            "of shard_map, pmap or vmap."
        )
    return batch_size // len(groups)


def check_values_per_feature(
    reduction: Reduction,
    shape: tuple[int, ...],
    examples_shape: tuple[int, ...],
    axis: int | Sequence[int],
) -> None:
    """Raises the ValueError that says what to do where there is one value per feature."""
    if static_count(reduction, examples_shape) == 1:
        raise ValueError(
            f"x of shape {shape} with axis={axis} has one value per feature to train on, so that "
            "y would have no derivative by x, and the variance be 0. Use a larger batch, "
            "synchronize over devices with axis_name, or evaluate with use_running_average=True "
            "and no update_running_average=True."
        )
