"""Batch renormalization: batch norm that behaves in training as it will in evaluation."""

from numbers import Real

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from bn_jax._core.batch_norm import choose_mode, run_norm
from bn_jax._core.checks import as_floating, check_inputs
from bn_jax._core.types import (
    Activation,
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    Correction,
    Options,
    Params,
    Transform,
)


def batch_renorm(
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    *,
    use_running_average: bool,
    update_running_average: bool | None = None,
    r_max: float | jax.Array = 3.0,
    d_max: float | jax.Array = 5.0,
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
    """Normalizes by the batch, corrected towards the running statistics within bounds.

    In training, with `mean` and `var` of the batch, ::

        y = ((x - mean) * rsqrt(var + epsilon) * r + d) * scale + bias
        r = clip(sqrt(var + epsilon) / sqrt(running_var + epsilon), 1 / r_max, r_max)
        d = clip((mean - running_mean) / sqrt(running_var + epsilon), -d_max, d_max)

    and `r` and `d` are constants to every derivative. The running statistics are the ones before
    the update, which is `batch_norm`'s. Where nothing is clipped, `y` equals the output of
    evaluation, however small the batch or alike its examples. ``r_max=1, d_max=0`` is batch norm;
    the paper begins with these, and lets them grow to 3 and 5 once the running statistics have
    settled. Evaluation is as in `batch_norm`. For complex `x`, `d` is complex with
    ``|d| <= d_max``.

    The correction changes what the next layers and the gradient of `scale` see. The derivative by
    `x` is batch norm's times `r`. So two values per feature still send back none (but for
    `epsilon`). Training on one value is warned of here too, although `y` depends on it through `d`:
    nothing below trains, and the running variance moves towards 0.

    Args:
        params: as in `batch_norm`.
        batch_stats: as in `batch_norm`: a state can move between both norms.
        x: floating-point or complex array of any rank.
        use_running_average: True for evaluation.
        update_running_average: whether the batch updates the running statistics.
        r_max: the bound of the ratio of the standard deviations, at least 1. It may be traced, to
            follow a schedule.
        d_max: the bound of the distance between the means, in running standard deviations, at least
            0. It may be traced.
        axis: the feature axis or axes of `x`.
        momentum: the weight of the old value in the running statistics, or None.
        epsilon: added to both variances.
        mask: what enters the statistics. A feature to which nothing valid contributed is normalized
            by the running statistics, for which `r` is 1 and `d` is 0.
        activation: an elementwise function applied to the result.
        residual: an array of the shape of `x`, added before the activation.
        axis_name: the named axis or axes to synchronize over.
        axis_index_groups: groups of indices of `axis_name`, each with its `r` and `d`.
        virtual_batch_size: how many consecutive examples share statistics, `r` and `d`.
        running_var_ddof: 1 for the unbiased running variance.
        use_fast_variance: False to guard the variance of bfloat16 input against cancellation.
        dtype: the dtype of `y`.
        initializing: True while a model is initialized.

    Returns:
        `y`, of the shape of `x`, and the new `batch_stats`, as `batch_norm` returns them.

    Raises:
        TypeError: as in `batch_norm`.
        ValueError: `r_max` is less than 1, `d_max` less than 0, or as in `batch_norm`.
        NameError: `axis_name` is not bound, but other axes are.

    Warns:
        UserWarning: there is one value per feature to train on, as in `batch_norm`.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> params, batch_stats = bn.init_params(1), bn.init_batch_stats(1)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, batch_stats = bn.batch_renorm(params, batch_stats, x, use_running_average=False)
        >>> y.round(2).tolist(), batch_stats["mean"].round(2)
        ([[1.0], [3.0]], Array([0.02], dtype=float32))

    Reference: Ioffe 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models", https://arxiv.org/abs/1702.03275.
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
        correction=make_correction(r_max, d_max),
    )
    inputs = check_inputs(options, params, batch_stats, as_floating("x", x), mask, residual)
    mode = choose_mode(batch_stats, use_running_average, update_running_average, initializing)
    return run_norm(options, inputs, mode)


def make_correction(r_max: float | jax.Array, d_max: float | jax.Array) -> Correction:
    """Returns the correction that turns batch norm into batch renorm.

    Args:
        r_max: as in `batch_renorm`.
        d_max: as in `batch_renorm`.

    Returns:
        A `Correction`.

    Raises:
        ValueError: a bound that is known while tracing is too small.
    """
    if isinstance(r_max, Real) and not float(r_max) >= 1:
        raise ValueError(
            f"r_max={r_max} must be at least 1: it bounds the ratio of the batch's standard "
            "deviation to the running one from above, and its inverse from below. Pass 3.0, or "
            "1.0 for no correction."
        )
    if isinstance(d_max, Real) and not float(d_max) >= 0:
        raise ValueError(
            f"d_max={d_max} must not be negative: it bounds the distance of the batch's mean from "
            "the running mean. Pass 5.0, or 0.0 for no correction."
        )
    return jax.tree_util.Partial(_correct, r_max, d_max)


def _correct(
    r_max: float | jax.Array, d_max: float | jax.Array, batch: Transform, running: Transform
) -> Transform:
    """Puts r and d into scale and bias, whose derivatives are then right by themselves."""
    dtype = batch.var_plus_epsilon.dtype
    largest = jnp.asarray(r_max, dtype)
    deviation = jnp.sqrt(running.var_plus_epsilon)
    r = jnp.clip(jnp.sqrt(batch.var_plus_epsilon) / deviation, 1 / largest, largest)
    # The large parts of two means that are far from zero cancel exactly before the rest is added.
    distance = batch.shift - running.shift
    if batch.delta is not None:
        distance += batch.delta
    d = _clip_size(distance / deviation.astype(distance.dtype), jnp.asarray(d_max, dtype))
    r, d = lax.stop_gradient((r.astype(d.dtype), d))
    if batch.scale is not None:
        r, d = batch.scale * r, batch.scale * d
    return batch._replace(scale=r, bias=d if batch.bias is None else batch.bias + d)


def _clip_size(values: jax.Array, largest: jax.Array) -> jax.Array:
    if not jnp.iscomplexobj(values):
        return jnp.clip(values, -largest, largest)
    size = jnp.abs(values)
    return values * jnp.where(size > largest, largest / size, 1).astype(values.dtype)
