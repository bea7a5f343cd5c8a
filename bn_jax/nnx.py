"""Flax NNX modules: variables and attributes; the arithmetic is in the pure functions."""

from collections.abc import Mapping
from functools import reduce
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PromoteDtypeFn

from bn_jax.batch_norm import Activation, BatchStats, Params, batch_norm


class BatchNorm(nnx.BatchNorm):
    """Batch normalization with every argument, default and variable of `flax.nnx.BatchNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.batch_norm` computes it.
    ``scale`` and ``bias`` are `nnx.Param` of shape ``[num_features]`` in `param_dtype`, ``mean``
    and ``var`` are `nnx.BatchStat` in float32. No derivative flows into the updated statistics.

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

    Raises:
        ValueError: `bn_jax.batch_norm` objects to the input.
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

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array that holds `num_features` features on `axis`.
            use_running_average: True for evaluation, False for training; overrides the attribute.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.
            residual: an array of the shape of `x`, added before the activation.

        Returns:
            The normalized array, of the shape of `x`.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "use_running_average is None in the constructor and in the call of BatchNorm. "
                "Pass nnx.BatchNorm(..., use_running_average=False), or layer(x, "
                "use_running_average=False), or call model.train() or model.eval()."
            )
        variables = {"mean": self.mean, "var": self.var}
        if hasattr(self, "count"):
            variables["count"] = self.count
        batch_stats = cast(BatchStats, {name: one[...] for name, one in variables.items()})
        x, params, dtype = self._promoted(x, residual, batch_stats)
        y, updated = batch_norm(
            params,
            batch_stats,
            x,
            use_running_average=use_running_average,
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
        )
        if not use_running_average:
            self._store(variables, updated)
        return y

    def _store(self, variables: dict[str, nnx.BatchStat[Any]], batch_stats: BatchStats) -> None:
        new = cast(dict[str, jax.Array], batch_stats)
        try:
            for name, variable in variables.items():
                # Assigning to an item would cast the mean of complex input to the old real dtype.
                variable.set_value(jax.lax.stop_gradient(new[name]))
        except TraceContextError as error:
            raise TraceContextError(
                "BatchNorm updates its running statistics inside of a transform (nnx.jit, "
                "nnx.vmap, nnx.eval_shape, jax.grad, ...) that it was made outside of, and did not "
                "come in as an argument. Pass the model: nnx.eval_shape(lambda model, x: model(x), "
                "model, x); or leave the statistics alone: "
                "nnx.eval_shape(nnx.view(model, use_running_average=True), x)."
            ) from error

    def _promoted(
        self, x: jax.Array, residual: jax.Array | None, batch_stats: BatchStats
    ) -> tuple[jax.Array, Params, Dtype]:
        """Returns input and parameters, promoted on demand only, and the dtype of the result."""
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        mean, var = batch_stats["mean"], batch_stats["var"]
        if self.promote_dtype is not dtypes.promote_dtype:
            x, mean, var, scale, bias = self.promote_dtype(
                (x, mean, var, scale, bias), dtype=self.dtype
            )
        params: Params = {}
        if scale is not None:
            params["scale"] = scale
        if bias is not None:
            params["bias"] = bias
        if self.dtype is not None:
            return x, params, self.dtype
        given = jax.tree.leaves((x, mean, var, params, residual))
        return x, params, reduce(jnp.promote_types, (jnp.asarray(one).dtype for one in given))
