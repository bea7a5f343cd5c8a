"""Flax NNX modules: variables and attributes; the arithmetic is in the pure functions."""

import inspect
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache, reduce
from math import prod
from types import MappingProxyType
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PromoteDtypeFn

from bn_jax._core.batch_norm import BatchStats, Correction, normalize_and_update
from bn_jax._core.batch_renorm import make_correction
from bn_jax._core.feature_norms import group_norm, instance_norm, layer_norm, rms_norm
from bn_jax._core.moments import AxisName, canonical_axes
from bn_jax._core.standardize import Activation, Params
from bn_jax._core.whitening import WhiteningStats, init_whitening_stats, whitening_norm

M = TypeVar("M")


class _RunningNorm(nnx.Module):
    """The switches of the layers with running statistics, and how they keep these."""

    num_features: int
    use_running_average: bool | None
    update_running_average: bool | None
    frozen: bool

    def _modes(
        self, use_running_average: bool | None, update_running_average: bool | None
    ) -> tuple[bool, bool]:
        """Returns whether the running statistics normalize, and whether they update."""
        if self.frozen:
            return True, False
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            kind = type(self).__name__
            raise ValueError(
                "use_running_average is None in the constructor and in the call of the "
                f"{kind} of {self.num_features} features. "
                f"Pass {kind}(..., use_running_average=False), or layer(x, "
                "use_running_average=False), or call model.train() or model.eval()."
            )
        if update_running_average is None:
            update_running_average = self.update_running_average
        if update_running_average is None:
            update_running_average = not use_running_average or hasattr(self, "measured")
        return use_running_average, update_running_average

    def _store(self, variables: dict[str, nnx.BatchStat[Any]], batch_stats: Any) -> None:
        try:
            for name, variable in variables.items():
                # Assigning to an item would cast the mean of complex input to the old real dtype.
                variable.set_value(jax.lax.stop_gradient(batch_stats[name]))
        except TraceContextError as error:
            raise TraceContextError(
                f"{type(self).__name__} updates its running statistics inside of a transform "
                "(nnx.jit, nnx.vmap, nnx.eval_shape, jax.grad, ...) that it was made outside of, "
                "and did not come in as an argument. Pass the model: nnx.eval_shape(lambda model, "
                "x: model(x), model, x); or leave the statistics alone: "
                "nnx.eval_shape(nnx.view(model, use_running_average=True), x)."
            ) from error


class BatchNorm(_RunningNorm, nnx.BatchNorm):
    """Batch normalization with every argument, default and variable of `flax.nnx.BatchNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.batch_norm` computes it.
    ``scale`` and ``bias`` are `nnx.Param` of shape ``[num_features]`` in `param_dtype`, ``mean``
    and ``var`` are `nnx.BatchStat` in float32. No derivative flows into the updated statistics. A
    layer with an `nnx.BatchStat` ``measured`` as well, which holds a `bn_jax.Measured`, measures
    instead of averaging, in evaluation too, as `bn_jax.batch_norm` says.

    Args:
        num_features: the size of `axis`.
        use_running_average: True for evaluation, False for training; `train()` and `eval()` of any
            enclosing module set it.
        axis: the feature axis of the input.
        momentum: the weight of the old value in the running statistics; None for the cumulative
            average over all batches, whose ``count`` is then kept beside them.
        epsilon: added to the variance.
        dtype: the dtype of the result; by default that of input, statistics and parameters
            promoted, as in Flax. Statistics are always computed, kept and used in at least
            float32, where Flax casts them to `dtype`.
        param_dtype: the dtype of ``scale`` and ``bias``.
        use_bias: whether to add ``bias``.
        use_scale: whether to multiply by ``scale``.
        bias_init: initializer of ``bias``.
        scale_init: initializer of ``scale``.
        axis_name: the named axis to synchronize over; under `jit`, plain or sharded, where
            statistics are global, it changes nothing.
        axis_index_groups: groups of indices of `axis_name` with statistics of their own.
        use_fast_variance: accepted for compatibility; the one variance here is fast and safe.
        promote_dtype: as in Flax, called on ``(x, mean, var, scale, bias)``; of what another
            function than the default returns, the statistics are not used.
        rngs: the random streams for the initializers.
        bias_metadata: metadata of the ``bias`` variable.
        scale_metadata: metadata of the ``scale`` variable.
        activation: a function applied to the result.
        virtual_batch_size: statistics of their own for every that many consecutive examples.
        running_var_ddof: 1 for the unbiased running variance, as the paper and PyTorch have it.
        update_running_average: whether the running statistics update, after `eval()` too; None: if
            and only if the batch normalizes, or they are measured.
        train_params: False for ``scale`` and ``bias`` without a derivative. What an optimizer does
            without one, as weight decay, is not its business.
        frozen: True for running statistics that normalize and do not update, whatever the call,
            the other arguments or `train()` say. `freeze` sets it by path.

    Raises:
        ValueError: `use_running_average` is given nowhere, or `bn_jax.batch_norm` objects
            to the input.
        TraceContextError: in training, a transform that the layer is no argument of encloses the
            call: the update would be lost.

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
        return self._call(
            x, use_running_average, mask, residual, update_running_average, correction=None
        )

    def _call(
        self,
        x: jax.Array,
        use_running_average: bool | None,
        mask: jax.Array | None,
        residual: jax.Array | None,
        update_running_average: bool | None,
        correction: Correction | None,
    ) -> jax.Array:
        use_running_average, update = self._modes(use_running_average, update_running_average)
        variables = {"mean": self.mean, "var": self.var}
        if hasattr(self, "count"):
            variables["count"] = self.count
        batch_stats = cast(BatchStats, {name: one[...] for name, one in variables.items()})
        if hasattr(self, "measured"):
            variables["measured"] = self.measured
            batch_stats["measured"] = self.measured.get_value()
        statistics = (batch_stats["mean"], batch_stats["var"])
        x, params, dtype = _promoted(self, x, *statistics, residual=residual)
        if not self.train_params:
            params = jax.lax.stop_gradient(params)
        y, updated = normalize_and_update(
            params,
            batch_stats,
            x,
            correction,
            use_running_average=use_running_average,
            update_running_average=update,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            mask=mask,
            activation=self.activation,
            residual=residual,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            virtual_batch_size=self.virtual_batch_size,
            running_var_ddof=self.running_var_ddof,
            dtype=dtype,
            initializing=False,
        )
        if update:
            self._store(variables, updated)
        return y


class WhiteningNorm(_RunningNorm):
    """Whitening, with the arguments of `BatchNorm` that apply.

    ``y = (cov + epsilon * I)**(-1/2) @ (x - mean) * scale + bias``, as `bn_jax.whitening_norm`
    computes it. ``scale`` and ``bias`` are `nnx.Param` of shape ``[num_features]`` in
    `param_dtype`, ``mean`` and ``cov``, ``[groups, size, size]``, are `nnx.BatchStat` in float32.
    No derivative flows into the updated statistics. `freeze` freezes it as a batch norm.

    Args:
        num_features: the size of `axis`.
        use_running_average: True for evaluation, False for training; `train()` and `eval()` of any
            enclosing module set it.
        axis: the feature axis of the input.
        momentum: the weight of the old value in the running statistics; None for the cumulative
            average over all batches, whose ``count`` is then kept beside them.
        epsilon: added to the variances.
        iterations: of Newton's method; 5 whiten incompletely.
        group_size: so many consecutive features are whitened together; None for all.
        dtype: the dtype of the result; by default that of input and parameters promoted.
        param_dtype: the dtype of ``scale`` and ``bias``.
        use_bias: whether to add ``bias``.
        use_scale: whether to multiply by ``scale``.
        bias_init: initializer of ``bias``.
        scale_init: initializer of ``scale``.
        axis_name: the named axis or axes to synchronize over.
        axis_index_groups: groups of indices of `axis_name` with statistics of their own.
        update_running_average: whether the running statistics update, after `eval()` too; None: if
            and only if the batch whitens.
        train_params: False for ``scale`` and ``bias`` without a derivative.
        frozen: True for running statistics that whiten and do not update, whatever the call,
            the other arguments or `train()` say.
        rngs: the random streams for the initializers.

    Raises:
        ValueError: `use_running_average` is given nowhere, `group_size` does not divide
            `num_features`, or `bn_jax.whitening_norm` objects to the input.
        TraceContextError: as `BatchNorm` does.

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
        use_running_average, update = self._modes(use_running_average, update_running_average)
        names = [name for name in ("mean", "cov", "count") if hasattr(self, name)]
        variables = {name: getattr(self, name) for name in names}
        params = {
            name: getattr(self, name)[...] for name in ("scale", "bias") if hasattr(self, name)
        }
        y, updated = whitening_norm(
            cast(Params, params if self.train_params else jax.lax.stop_gradient(params)),
            cast(WhiteningStats, {name: one[...] for name, one in variables.items()}),
            x,
            use_running_average=use_running_average,
            update_running_average=update,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            iterations=self.iterations,
            group_size=self.group_size,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=self.dtype,
        )
        if update:
            self._store(variables, updated)
        return y


class BatchRenorm(BatchNorm):
    """Batch renormalization, which looks in training as it will in evaluation.

    ``y = ((x - mean) * rsqrt(var + epsilon) * r + d) * scale + bias``, as `bn_jax.batch_renorm`
    computes it, which says what `r` and `d` are. All arguments of `BatchNorm` are here, with their
    defaults, and so are its variables.

    Args:
        num_features: the size of `axis`.
        r_max: the bound of `r`, at least 1.
        d_max: the bound of `d`, at least 0.
        **options: all other arguments of `BatchNorm`; `rngs` is required.

    Raises:
        ValueError, TraceContextError: as `BatchNorm` does, or `r_max` or `d_max` is too small.

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
            x: as of `BatchNorm`, and so are all that are not named here.
            use_running_average: True for evaluation, False for training.
            mask: what enters the statistics.
            residual: an array of the shape of `x`, added before the activation.
            update_running_average: whether the running statistics update.
            r_max: in the place of the attribute, for one that follows a schedule.
            d_max: in the place of the attribute.

        Returns:
            The normalized array, of the shape of `x`.
        """
        correction = make_correction(
            self.r_max if r_max is None else r_max, self.d_max if d_max is None else d_max
        )
        return self._call(
            x, use_running_average, mask, residual, update_running_average, correction
        )


class LayerNorm(nnx.LayerNorm):
    """Layer normalization with every argument, default and variable of `flax.nnx.LayerNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.layer_norm` computes it,
    with `mean` and `var` over `reduction_axes`. ``scale`` and ``bias`` are `nnx.Param` of shape
    ``[num_features]`` in `param_dtype`, the product of the sizes of `feature_axes`.

    Two arguments mean less than in Flax: `use_fast_variance`, since the one variance here is safe,
    and `dtype`, which is that of the result alone: statistics are of `x` as it came, in at least
    float32, unless a `promote_dtype` other than the default has changed it. `axis_name`, which the
    features may be spread over, changes nothing where nothing binds it.

    Raises:
        ValueError: `bn_jax.layer_norm` objects to the input.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> bn.nnx.LayerNorm(2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0]])).round(3).tolist()
        [[-1.0, 1.0]]

    Reference: Ba et al. 2016, https://arxiv.org/abs/1607.06450.
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array that holds the features on `feature_axes`.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.

        Returns:
            The normalized array, of the shape of `x`.
        """
        x, options = _prepared(self, x, mask, self.feature_axes)
        return layer_norm(
            x=x,
            reduction_axes=self.reduction_axes,
            feature_axes=self.feature_axes,
            **options,
        )


class RMSNorm(nnx.RMSNorm):
    """Root mean square normalization as `flax.nnx.RMSNorm` has it.

    ``y = x * rsqrt(mean(|x|**2) + epsilon) * scale``, as `bn_jax.rms_norm` computes it. Arguments
    and errors are those of `LayerNorm`, but there is no bias.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> bn.nnx.RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([[3.0, -3.0]])).round(3).tolist()
        [[1.0, -1.0]]

    Reference: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array that holds the features on `feature_axes`.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.

        Returns:
            The normalized array, of the shape of `x`.
        """
        x, options = _prepared(self, x, mask, self.feature_axes)
        return rms_norm(
            x=x,
            reduction_axes=self.reduction_axes,
            feature_axes=self.feature_axes,
            **options,
        )


class GroupNorm(nnx.GroupNorm):
    """Group normalization with every argument and variable of `flax.nnx.GroupNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.group_norm` computes it,
    with `mean` and `var` over each group of features. Of `num_groups` and `group_size` one is None.
    The other arguments, and the errors, are those of `LayerNorm`.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Reference: Wu & He 2018, https://arxiv.org/abs/1803.08494.
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array [N, ..., num_features].
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.

        Returns:
            The normalized array, of the shape of `x`.
        """
        x, options = _prepared(self, x, mask, -1)
        return group_norm(
            x=x, num_groups=self.num_groups, reduction_axes=self.reduction_axes, **options
        )


class InstanceNorm(nnx.InstanceNorm):
    """Instance normalization with every argument and variable of `flax.nnx.InstanceNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.instance_norm` computes it,
    with `mean` and `var` over all axes but the first and the feature axes. Arguments and errors are
    those of `LayerNorm`.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.InstanceNorm(2, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[[1.0, 10.0], [3.0, 30.0]]])).round(3).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]

    Reference: Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022.
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array of examples [N, ...].
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.

        Returns:
            The normalized array, of the shape of `x`.
        """
        x, options = _prepared(self, x, mask, self.feature_axes)
        return instance_norm(x=x, feature_axes=self.feature_axes, **options)


def _prepared(
    layer: Any, x: jax.Array, mask: jax.Array | None, feature_axes: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """Returns the input, and the arguments that all norms without state share."""
    x, params, dtype = _promoted(layer, x)
    axes = canonical_axes("feature_axes", feature_axes, jnp.ndim(x))
    features = tuple(x.shape[axis] for axis in axes)

    def as_features(values: jax.Array) -> jax.Array:
        # A layer has one row of features for all of their axes; what does not fit is told later.
        return values.reshape(features) if values.size == prod(features) else values

    names = ("epsilon", "axis_name", "axis_index_groups")
    return x, {
        "params": jax.tree.map(as_features, params),
        "mask": mask,
        "dtype": dtype,
        **{name: getattr(layer, name) for name in names},
    }


def _promoted(
    layer: Any, x: jax.Array, *statistics: jax.Array, residual: jax.Array | None = None
) -> tuple[jax.Array, Params, Dtype]:
    """Returns input and parameters, promoted on demand only, and the dtype of the result."""
    names = [name for name in ("scale", "bias") if hasattr(layer, name)]
    variables = [getattr(layer, name) for name in names]
    values = [None if variable is None else variable[...] for variable in variables]
    if layer.promote_dtype is not dtypes.promote_dtype:
        x, *promoted = layer.promote_dtype((x, *statistics, *values), dtype=layer.dtype)
        statistics, values = tuple(promoted[: len(statistics)]), promoted[len(statistics) :]
    named = zip(names, values, strict=True)
    params = cast(Params, {name: value for name, value in named if value is not None})
    if layer.dtype is not None:
        return x, params, layer.dtype
    given = jax.tree.leaves((x, statistics, params, residual))
    return x, params, reduce(jnp.promote_types, (jnp.asarray(one).dtype for one in given))


def freeze(model: M, *paths: str, train_params: bool = False) -> M:
    """Freezes batch norms in place: running statistics that normalize and do not update.

    Unlike `eval()`, it survives ``model.train()``. To leave the model as it is, freeze a view:
    ``bn_jax.nnx.freeze(nnx.view(model))`` has switches of its own and the same variables.

    Args:
        model: a module, or a tree of them.
        *paths: glob patterns (`fnmatch`; ``*`` also matches ``/``) of the layers' paths in the
            model, or of modules around them, joined by ``/``: ``"stage0/*"``, ``"layers/1"``. Of a
            layer that is in several places, any path counts. None given: every batch norm.
        train_params: whether ``scale`` and ``bias`` have a derivative all the same.

    Returns:
        The model.

    Raises:
        ValueError: a pattern matches no batch norm; the message lists those there are.
        TypeError: a pattern matches a batch norm of Flax's: call `replace_norms` first.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> bn.nnx.freeze(layer).train()
        >>> layer(jnp.array([[0.0], [1.0]])).round(3).tolist(), layer.mean[...].tolist()
        ([[0.0], [1.0]], [0.0])
    """
    for layer in _batch_norms(model, paths):
        layer.frozen, layer.train_params = True, train_params
    return model


def unfreeze(model: M, *paths: str) -> M:
    """Takes back in place what `freeze` did: ``frozen=False`` and ``train_params=True``.

    Args:
        model: a module, or a tree of them.
        *paths: as for `freeze`.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: as `freeze` does.

    Example:
        >>> import bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.BatchNorm(1, frozen=True, rngs=nnx.Rngs(0))
        >>> bn.nnx.unfreeze(layer).frozen
        False
    """
    for layer in _batch_norms(model, paths):
        layer.frozen, layer.train_params = False, True
    return model


def replace_norms(model: M) -> M:
    """Makes the norms of a model ours, in place.

    Every layer in it that is of one of Flax's classes with a namesake here becomes of ours: the
    same object, wherever it stands and however often, with the same variables, so that an
    `nnx.Optimizer` made before goes on. Subclasses are left alone: what they do is theirs.

    Args:
        model: a module, or a tree of them.

    Returns:
        The model.

    Example:
        >>> import bn_jax as bn
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> isinstance(bn.nnx.replace_norms(model).layers[0], bn.nnx.BatchNorm)
        True
    """
    replacements = _replacements()
    for _, layer in nnx.iter_graph(model):
        ours = replacements.get(type(layer))
        if ours is None:
            continue
        known = inspect.signature(type(layer).__init__).parameters
        object.__setattr__(layer, "__class__", ours)
        for name, parameter in inspect.signature(ours.__init__).parameters.items():
            if name not in known:
                setattr(layer, name, parameter.default)
    return model


@cache
def _replacements() -> dict[type[nnx.Module], type[nnx.Module]]:
    """Returns the classes of this module by those of Flax that have the same name."""
    named = {name: one for name, one in globals().items() if isinstance(one, type)}
    return {
        getattr(nnx, name): cast(type[nnx.Module], ours)
        for name, ours in named.items()
        if issubclass(ours, getattr(nnx, name, ()))
    }


def _batch_norms(model: Any, patterns: tuple[str, ...]) -> list[BatchNorm | WhiteningNorm]:
    """Returns the norms with statistics of which a path, or one around it, matches a pattern."""
    kinds = (nnx.BatchNorm, WhiteningNorm)
    layers = [(path, layer) for path, layer in _nodes(model) if isinstance(layer, kinds)]
    found: list[BatchNorm | WhiteningNorm] = []
    for pattern in patterns or ("*",):
        matching = [
            (path, layer)
            for path, layer in layers
            if any(fnmatchcase("/".join(path[:end]), pattern) for end in range(len(path) + 1))
        ]
        if not matching:
            raise ValueError(
                f"No batch norm has a path that matches {pattern!r}; those there are have the "
                f"paths {sorted({'/'.join(path) for path, _ in layers})}. Pass patterns of these, "
                "or of modules around them."
            )
        for path, layer in matching:
            if not isinstance(layer, _RunningNorm):
                raise TypeError(
                    f"{'/'.join(path)!r} is a {type(layer).__module__}.{type(layer).__name__}, "
                    "which cannot be frozen: call bn_jax.nnx.replace_norms(model) first; derive a "
                    "class of your own from bn_jax.nnx.BatchNorm."
                )
            found.append(layer)
    return found


def _nodes(
    node: Any, path: tuple[str, ...] = (), around: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields what a model is made of, once for each of its paths; a cycle once around."""
    if isinstance(node, nnx.Variable) or any(node is one for one in around):
        return
    yield path, node
    children = jax.tree.leaves_with_path(
        node, is_leaf=lambda keys, _: bool(keys), is_leaf_takes_path=True
    )
    for keys, child in children:
        if keys:
            name = jax.tree_util.keystr(keys, simple=True)
            yield from _nodes(child, (*path, name), (*around, node))
