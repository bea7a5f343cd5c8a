"""Flax NNX modules with running statistics: variables and attributes, no arithmetic.

To Flax, a module is one call: its methods are `__init__` and `__call__`, and what these do are
functions.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PromoteDtypeFn

from bn_jax._core.batch_norm import run_norm
from bn_jax._core.batch_renorm import make_correction
from bn_jax._core.checks import as_floating, check_inputs
from bn_jax._core.domain_batch_norm import check_domain_inputs, run_domain_norm
from bn_jax._core.running import promote_batch_stats
from bn_jax._core.types import (
    Activation,
    AxisName,
    BatchStats,
    Correction,
    Mode,
    Options,
    WhiteningStats,
)
from bn_jax._core.whitening import WhiteningOptions, init_whitening_stats, run_whitening
from bn_jax.nnx.stateless import params_of, promote


class RunningNorm(nnx.Module):
    """What `freeze` and `unfreeze` work on: the norms with running statistics.

    Attributes:
        frozen: True for running statistics that normalize and do not update.
        train_params: False for ``scale`` and ``bias`` without a derivative.
    """

    frozen: bool
    train_params: bool


class BatchNorm(RunningNorm, nnx.BatchNorm):
    """Batch normalization with every argument, default and variable of `flax.nnx.BatchNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.batch_norm` computes it.
    ``scale`` and ``bias`` are `nnx.Param` of shape ``[num_features]`` in `param_dtype`, ``mean``
    and ``var`` are `nnx.BatchStat` in float32. If the whole model has been cast to half precision,
    they become float32 again at the first update; `bn_jax.promote_batch_stats` casts them before a
    scan. No derivative flows into the updated statistics. A layer with an `nnx.BatchStat`
    ``measured``, which holds a `bn_jax.Measured`, measures instead of averaging, in evaluation too,
    as `bn_jax.batch_norm` says.

    Args:
        num_features: the size of `axis`.
        use_running_average: True for evaluation, False for training; `train()` and `eval()` of any
            enclosing module set it.
        axis: the feature axis of the input.
        momentum: the weight of the old value in the running statistics; None for the cumulative
            average over all batches, whose ``count`` is then stored as well.
        epsilon: added to the variance.
        dtype: the dtype of the result; by default the promoted dtype of input, statistics and
            parameters, as in Flax; statistics that the call updates count as float32 at least.
            Statistics are always computed, kept and used in at least float32, where Flax casts them
            to `dtype`.
        param_dtype: the dtype of ``scale`` and ``bias``.
        use_bias: whether to add ``bias``.
        use_scale: whether to multiply by ``scale``.
        bias_init: initializer of ``bias``.
        scale_init: initializer of ``scale``.
        axis_name: the named axis to synchronize over; under `jit`, plain or sharded, where
            statistics are global, it changes nothing.
        axis_index_groups: groups of indices of `axis_name`, each with its own statistics.
        use_fast_variance: False to guard the variance of bfloat16 input against cancellation;
            `bn_jax.moments` says what holds without. Other input is always guarded.
        promote_dtype: as in Flax, called on ``(x, mean, var, scale, bias)``. The statistics that a
            function other than the default returns are not used.
        rngs: the random streams for the initializers.
        bias_metadata: metadata of the ``bias`` variable.
        scale_metadata: metadata of the ``scale`` variable.
        activation: a function applied to the result.
        virtual_batch_size: how many consecutive examples share statistics; None for all.
        running_var_ddof: 1 for the unbiased running variance, as in the paper and PyTorch.
        update_running_average: whether the running statistics update, after `eval()` too; None: if
            and only if the batch normalizes, or they are measured.
        train_params: False for ``scale`` and ``bias`` without a derivative. An optimizer may still
            change them, for example by weight decay.
        frozen: True for running statistics that normalize and do not update, whatever the call,
            the other arguments or `train()` say. `freeze` sets it by path.

    Raises:
        ValueError: `use_running_average` is given nowhere, or as in `bn_jax.batch_norm`.
        TraceContextError: in training, a transform encloses the call and the layer is not one of
            its arguments: the update would be lost.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0], [3.0]])).round(3).tolist()
        [[-1.0], [1.0]]
        >>> layer.mean[...].tolist()
        [1.0]

    Reference: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """

    measured: nnx.BatchStat[Any]

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = jax.nn.initializers.zeros,
        scale_init: Initializer = jax.nn.initializers.ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        activation: Activation | None = None,
        virtual_batch_size: int | None = None,
        running_var_ddof: int = 0,
        update_running_average: bool | None = None,
        train_params: bool = True,
        frozen: bool = False,
    ) -> None:
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,  # type: ignore[arg-type]
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        if momentum is None:
            self.count = nnx.BatchStat(jnp.zeros(num_features, jnp.float32))
        self.activation = activation
        self.virtual_batch_size = virtual_batch_size
        self.running_var_ddof = running_var_ddof
        self.update_running_average = update_running_average
        self.train_params = train_params
        self.frozen = frozen

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_running_average: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array that holds `num_features` features on `axis`.
            use_running_average: True for evaluation, False for training; overrides the attribute.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.
            residual: an array of the shape of `x`, added before the activation.
            update_running_average: overrides the attribute.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return call_batch_norm(
            self,
            x,
            use_running_average,
            mask=mask,
            residual=residual,
            update_running_average=update_running_average,
        )


class WhiteningNorm(RunningNorm):
    """Whitening, with the arguments of `BatchNorm` that apply.

    ``y = (cov + epsilon * I)**(-1/2) @ (x - mean) * scale + bias``, as `bn_jax.whitening_norm`
    computes it. ``scale`` and ``bias`` are `nnx.Param` of shape ``[num_features]`` in
    `param_dtype`, ``mean`` and ``cov``, ``[groups, size, size]``, are `nnx.BatchStat` in float32.
    No derivative flows into the updated statistics. `freeze` freezes it like a batch norm.

    Args:
        num_features: the size of `axis`.
        use_running_average: True for evaluation, False for training; `train()` and `eval()` of any
            enclosing module set it.
        axis: the feature axis of the input.
        momentum: the weight of the old value in the running statistics; None for the cumulative
            average over all batches, whose ``count`` is then stored as well.
        epsilon: added to the variances.
        iterations: how many Newton iterations to take; 5 whiten incompletely.
        group_size: how many consecutive features are whitened together; None for all.
        dtype: the dtype of the result; by default the promoted dtype of input and parameters.
        param_dtype: the dtype of ``scale`` and ``bias``.
        use_bias: whether to add ``bias``.
        use_scale: whether to multiply by ``scale``.
        bias_init: initializer of ``bias``.
        scale_init: initializer of ``scale``.
        axis_name: the named axis or axes to synchronize over.
        axis_index_groups: groups of indices of `axis_name`, each with its own statistics.
        update_running_average: whether the running statistics update, after `eval()` too; None: if
            and only if the batch whitens.
        train_params: False for ``scale`` and ``bias`` without a derivative.
        frozen: True for running statistics that whiten and do not update, whatever the call,
            the other arguments or `train()` say.
        rngs: the random streams for the initializers.

    Raises:
        ValueError: `use_running_average` is given nowhere, `group_size` does not divide
            `num_features`, or as in `bn_jax.whitening_norm`.
        TraceContextError: as in `BatchNorm`.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.WhiteningNorm(2, iterations=10, rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (100, 2)) @ jnp.array([[3.0, 1.0], [0.0, 1.0]])
        >>> (jnp.cov(layer(x).T, bias=True).round(3) + 0.0).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Reference: Huang et al. 2019, https://arxiv.org/abs/1904.03441.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        iterations: int = 5,
        group_size: int | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = jax.nn.initializers.zeros,
        scale_init: Initializer = jax.nn.initializers.ones,
        axis_name: AxisName | None = None,
        axis_index_groups: Any = None,
        update_running_average: bool | None = None,
        train_params: bool = True,
        frozen: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.iterations = iterations
        self.group_size = group_size
        self.dtype = dtype
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.update_running_average = update_running_average
        self.train_params = train_params
        self.frozen = frozen
        use_count = momentum is None
        made = init_whitening_stats(num_features, group_size=group_size, use_count=use_count)
        self.mean = nnx.BatchStat(made["mean"])
        self.cov = nnx.BatchStat(made["cov"])
        if use_count:
            self.count = nnx.BatchStat(made["count"])
        if use_scale:
            self.scale = nnx.Param(scale_init(rngs.params(), (num_features,), param_dtype))
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (num_features,), param_dtype))

    # What `nnx.view` calls.
    set_view = nnx.BatchNorm.set_view

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_running_average: bool | None = None,
    ) -> jax.Array:
        """Whitens `x`.

        Args:
            x: floating-point array that holds `num_features` features on `axis`.
            use_running_average: True for evaluation, False for training; overrides the attribute.
            mask: boolean or weights, of size 1 on `axis` and broadcastable to `x`: what enters the
                statistics.
            update_running_average: overrides the attribute.

        Returns:
            The whitened array, of the shape of `x`.
        """
        mode = _choose_mode(self, use_running_average, update_running_average)
        variables = _batch_stats_of(self, "mean", "cov", "count")
        params = params_of(self)
        y, updated = run_whitening(
            WhiteningOptions.of_module(self, describe_layer=partial(_describe, self)),
            mode,
            params if self.train_params else jax.lax.stop_gradient(params),
            cast(WhiteningStats, {name: variables[name].get_value() for name in variables}),
            as_floating("x", x),
            mask,
        )
        if mode.update:
            _store(self, variables, updated)
        return y


class BatchRenorm(BatchNorm):
    """Batch renormalization, which behaves in training as it will in evaluation.

    ``y = ((x - mean) * rsqrt(var + epsilon) * r + d) * scale + bias``, as `bn_jax.batch_renorm`
    computes it, which defines `r` and `d`. It has all arguments of `BatchNorm`, with their
    defaults, and its variables.

    Args:
        num_features: the size of `axis`.
        r_max: the bound of `r`, at least 1.
        d_max: the bound of `d`, at least 0.
        **options: the other arguments of `BatchNorm`; `rngs` is required.

    Raises:
        ValueError, TraceContextError: as in `BatchNorm`, or `r_max` or `d_max` is too small.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.BatchRenorm(1, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0], [3.0]])).round(2).tolist()
        [[1.0], [3.0]]

    Reference: Ioffe 2017, https://arxiv.org/abs/1702.03275.
    """

    def __init__(
        self, num_features: int, *, r_max: float = 3.0, d_max: float = 5.0, **options: Any
    ) -> None:
        super().__init__(num_features, **options)
        self.r_max = r_max
        self.d_max = d_max

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_running_average: bool | None = None,
        r_max: float | jax.Array | None = None,
        d_max: float | jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array that holds `num_features` features on `axis`.
            use_running_average: True for evaluation, False for training.
            mask: what enters the statistics.
            residual: an array of the shape of `x`, added before the activation.
            update_running_average: whether the running statistics update.
            r_max: overrides the attribute, for a bound that follows a schedule.
            d_max: overrides the attribute.

        Returns:
            The normalized array, of the shape of `x`.
        """
        correction = make_correction(
            self.r_max if r_max is None else r_max, self.d_max if d_max is None else d_max
        )
        return call_batch_norm(
            self,
            x,
            use_running_average,
            mask=mask,
            residual=residual,
            update_running_average=update_running_average,
            correction=correction,
        )


def call_batch_norm(
    layer: BatchNorm,
    x: jax.Array,
    use_running_average: bool | None,
    *,
    mask: jax.Array | None,
    residual: jax.Array | None,
    update_running_average: bool | None,
    correction: Correction | None = None,
    domain: jax.Array | int | None = None,
) -> jax.Array:
    """Runs the call of a batch norm, with `domain` where the layer has domains."""
    mode = _choose_mode(layer, use_running_average, update_running_average)
    variables = _batch_stats_of(layer, "mean", "var", "count", "measured")
    batch_stats = cast(BatchStats, {name: variables[name].get_value() for name in variables})
    x = as_floating("x", x)
    statistics = batch_stats["mean"], batch_stats["var"]
    if mode.update:
        # So y has one dtype, before the update that makes them float32 and after it.
        statistics = promote_batch_stats(statistics)
    promoted = promote(layer, x, statistics=statistics, residual=residual)
    params = promoted.params
    options = Options.of_module(
        layer,
        dtype=promoted.dtype,
        correction=correction,
        describe_layer=partial(_describe, layer),
    )
    params = params if layer.train_params else jax.lax.stop_gradient(params)
    if domain is None:
        inputs = check_inputs(options, params, batch_stats, promoted.x, mask, residual)
        y, updated = run_norm(options, inputs, mode)
    else:
        given = (options, params, batch_stats, promoted.x)
        inputs, mixture = check_domain_inputs(mode, *given, domain, mask, residual)
        y, updated = run_domain_norm(options, mode, inputs, mixture)
    if mode.update:
        _store(layer, variables, updated)
    return y


def _choose_mode(
    layer: Any, use_running_average: bool | None, update_running_average: bool | None
) -> Mode:
    """Returns how a call runs, by its arguments or else the attributes of the layer."""
    if layer.frozen:
        return Mode(use_running_average=True, update=False)
    use, update = use_running_average, update_running_average
    use = layer.use_running_average if use is None else use
    if not isinstance(use, bool | None) and jnp.result_type(use) != jnp.bool_:
        raise TypeError(
            f"use_running_average of {_describe(layer)} is {use}, expected True, False or None. "
            "Domains are for bn_jax.nnx.DomainBatchNorm: where the model hands them on, leave its "
            "norms as they are, and call model(x, 1) for one domain."
        )
    update = layer.update_running_average if update is None else update
    if use is None:
        kind = type(layer).__name__
        raise ValueError(
            "use_running_average is None in the constructor and in the call of "
            f"{_describe(layer)}. "
            f"Pass {kind}(..., use_running_average=False), or layer(x, "
            "use_running_average=False), or call model.train() or model.eval()."
        )
    return Mode(use, not use or hasattr(layer, "measured") if update is None else update)


def _describe(layer: Any) -> str:
    return f"the {type(layer).__name__} of {layer.num_features} features"


def _batch_stats_of(layer: nnx.Module, *names: str) -> dict[str, nnx.BatchStat[Any]]:
    """Returns those of the variables that a layer has."""
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def _store(layer: nnx.Module, variables: dict[str, nnx.BatchStat[Any]], batch_stats: Any) -> None:
    try:
        for name, variable in variables.items():
            # Assigning to an item would cast the mean of complex input to the old real dtype.
            variable.set_value(jax.lax.stop_gradient(batch_stats[name]))
    except TraceContextError as error:
        raise TraceContextError(
            f"{_describe(layer)} updates its running statistics inside of a transform that does "
            "not take the model and hand it back, so that the update would be lost. Pass the "
            "model: nnx.grad(lambda model, x: model(x).sum(), argnums=1)(model, x) instead of a "
            "closure or jax.grad, nnx.jit(lambda model, x: model(x))(model, x) instead of "
            "nnx.jit(model) or jax.jit, nnx.eval_shape(lambda model, x: model(x), model, x), and, "
            "for a layer with axis_name='batch', nnx.vmap(lambda model, x: model(x), "
            "in_axes=(None, 0), axis_name='batch')(model, x); where transforms are nested, to "
            "each of them. Or leave the statistics alone: layer(x, update_running_average=False), "
            "model.eval(), or nnx.view(model, use_running_average=True)."
        ) from error
