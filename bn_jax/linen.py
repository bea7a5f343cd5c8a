"""Flax Linen modules: variables and attributes; the arithmetic is in the pure functions."""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from bn_jax.batch_norm import (
    Activation,
    BatchStats,
    Params,
    batch_norm,
    init_batch_stats,
    normalize_by_batch,
    update_batch_stats,
)
from bn_jax.moments import (
    Moments,
    as_floating,
    canonical_axes,
    mean_dtype,
    merge_moments,
    statistics_dtype,
)


class BatchNorm(nn.BatchNorm):
    """Batch normalization with every attribute, default and variable of `flax.linen.BatchNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.batch_norm` computes it.
    Parameters are ``scale`` and ``bias``, of the sizes of the feature axes, in `param_dtype`; the
    collection ``batch_stats`` holds ``mean`` and ``var`` in float32 (float64 for double precision;
    the mean of complex input is complex: Flax's changes its dtype at the first update). A
    checkpoint of Flax's layer loads into this one and the other way round. While initializing,
    nothing is updated and `axis_name` need not exist; nor need it under `jit`, plain or sharded,
    where statistics are global (`bn_jax.batch_norm` has the rule).

    Two more collections serve who spreads a batch over several calls, as
    `bn_jax.training.accumulated_train_step` does. Where ``batch_moments`` is mutable, a training
    call merges its moments (``count``, ``mean``, ``var``) into what is there, and the running
    statistics are updated by all of them: from the same old ``batch_stats``, the last call makes
    the one update by the whole. Where ``given_moments`` is passed in, a training call normalizes by
    these instead of by those of `x`.

    Under `nn.scan`, training needs ``variable_carry="batch_stats"`` and a mutable ``batch_stats``.
    `nn.scan` creates no carried variable: initialize, and evaluate immutable ``batch_stats``, with
    it among ``variable_broadcast`` instead.

    Attributes beyond Flax's:
        momentum: None for the cumulative average over all batches; ``batch_stats`` then holds
            their ``count`` as well.
        activation: a function applied to the result.
        virtual_batch_size: statistics of their own for every that many consecutive examples.
        running_var_ddof: 1 for the unbiased running variance, as the paper and PyTorch have it.

    Attributes that mean less than in Flax: `use_fast_variance`, since the one variance here is
    both fast and safe, and `force_float32_reductions`, which only chooses the dtype that
    ``batch_stats`` is stored in, since statistics are always computed in at least float32.

    Raises:
        ValueError: ``batch_stats`` is missing or immutable, or `bn_jax.batch_norm` objects.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> layer = bn.linen.BatchNorm(use_running_average=False, momentum=0.5)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        >>> y.round(3).tolist(), updates["batch_stats"]["mean"].tolist()
        ([[-1.0], [1.0]], [1.0])

    Reference: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """

    momentum: float | None = 0.99  # type: ignore[assignment]
    activation: Activation | None = None
    virtual_batch_size: int | None = None
    running_var_ddof: int = 0

    @nn.compact
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
            x: floating-point or complex array that holds the features on `axis`.
            use_running_average: True for evaluation, False for training; overrides None in the
                attribute of that name.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.
            residual: an array of the shape of `x`, added before the activation.

        Returns:
            The normalized array, of the shape of `x`.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        self._require_batch_stats(use_running_average)
        x = as_floating("x", x)
        axes = canonical_axes("axis", self.axis, x.ndim)
        features = tuple(x.shape[axis] for axis in axes)
        variables = self._variables(features, x.dtype)
        params: Params = {}
        if self.use_scale:
            params["scale"] = self.param("scale", self.scale_init, features, self.param_dtype)
        if self.use_bias:
            params["bias"] = self.param("bias", self.bias_init, features, self.param_dtype)
        batch_stats = cast(BatchStats, {name: one.value for name, one in variables.items()})
        options: dict[str, Any] = {
            "axis": self.axis,
            "epsilon": self.epsilon,
            "mask": mask,
            "activation": self.activation,
            "residual": residual,
            "axis_name": self.axis_name,
            "axis_index_groups": self.axis_index_groups,
            "virtual_batch_size": self.virtual_batch_size,
            "dtype": self.dtype,
        }
        if not use_running_average and self._spreads_a_batch():
            y, updated = self._train_on_a_part(params, batch_stats, x, options)
        else:
            y, updated = batch_norm(
                params,
                batch_stats,
                x,
                use_running_average=use_running_average,
                momentum=self.momentum,
                running_var_ddof=self.running_var_ddof,
                initializing=self.is_initializing(),
                **options,
            )
        if not use_running_average:
            for name, variable in variables.items():
                variable.value = cast(dict[str, jax.Array], updated)[name]
        return y

    def _spreads_a_batch(self) -> bool:
        collects = self.is_mutable_collection("batch_moments") and not self.is_initializing()
        return collects or self.has_variable("given_moments", "mean")

    def _train_on_a_part(
        self, params: Params, batch_stats: BatchStats, x: jax.Array, options: dict[str, Any]
    ) -> tuple[jax.Array, BatchStats]:
        y, found = normalize_by_batch(params, batch_stats, x, **options)
        if self.has_variable("given_moments", "mean"):
            given: Any = {
                name: self.get_variable("given_moments", name) for name in ("mean", "var")
            }
            y, _ = batch_norm(params, given, x, use_running_average=True, **options)
        if self.is_mutable_collection("batch_moments"):
            collected = {
                name: self.variable("batch_moments", name, jnp.zeros_like, like)
                for name, like in {"count": found.var, "mean": found.mean, "var": found.var}.items()
            }
            found = merge_moments(Moments(**{n: c.value for n, c in collected.items()}), found)
            for name, variable in collected.items():
                variable.value = getattr(found, name)
        return y, update_batch_stats(
            batch_stats, found, momentum=self.momentum, running_var_ddof=self.running_var_ddof
        )

    def _variables(self, features: tuple[int, ...], x_dtype: Any) -> dict[str, nn.Variable[Any]]:
        known = self.has_variable("batch_stats", "mean")
        counted = self.has_variable("batch_stats", "count")
        real = statistics_dtype(x_dtype) if self.force_float32_reductions else self.param_dtype
        use_count = counted or (self.momentum is None and not known)
        dtype = mean_dtype(jnp.dtype(real), x_dtype)

        def initial(name: str) -> jax.Array:
            made = init_batch_stats(features, dtype=dtype, use_count=use_count)
            return cast(dict[str, jax.Array], made)[name]

        names = ("mean", "var", "count") if use_count else ("mean", "var")
        return {name: self.variable("batch_stats", name, initial, name) for name in names}

    def _require_batch_stats(self, use_running_average: bool) -> None:
        if self.is_mutable_collection("batch_stats"):
            return
        layer = f"BatchNorm {'/'.join(self.path)!r}" if self.path else "the top-level BatchNorm"
        if not self.has_variable("batch_stats", "mean"):
            raise ValueError(
                f"batch_stats has nothing for {layer}. Pass what init returned: "
                "model.apply({'params': params, 'batch_stats': batch_stats}, x). Name batch_stats "
                "also where a lifted transform encloses the layer, for example "
                "nn.scan(..., variable_carry='batch_stats') or "
                "nn.vmap(..., variable_axes={'params': 0, 'batch_stats': 0}), and in "
                "init(..., mutable=[...]) where that is given."
            )
        if not use_running_average and not self.is_initializing():
            raise ValueError(
                f"batch_stats is immutable, but {layer} has use_running_average=False "
                "and updates it. In training write: "
                "y, updates = model.apply(variables, x, mutable=['batch_stats']); "
                "in evaluation pass use_running_average=True."
            )
