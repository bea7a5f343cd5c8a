"""Flax Linen modules: variables and attributes; the arithmetic is in the pure functions."""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from bn_jax.batch_norm import (
    BatchStats,
    batch_norm,
    init_batch_stats,
    normalize_by_batch,
    update_batch_stats,
)
from bn_jax.feature_norms import group_norm, instance_norm, layer_norm, rms_norm
from bn_jax.moments import (
    Moments,
    as_floating,
    canonical_axes,
    mean_dtype,
    merge_moments,
    statistics_dtype,
)
from bn_jax.standardize import Activation, Params


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
        params = _make_params(self, features)
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


class LayerNorm(nn.LayerNorm):
    """Layer normalization with every attribute, default and parameter of `flax.linen.LayerNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.layer_norm` computes it,
    with `mean` and `var` over `reduction_axes`. ``scale`` and ``bias`` are of the sizes of
    `feature_axes`, in `param_dtype`. A checkpoint of Flax's layer loads into this one and the other
    way round.

    Attributes that mean less than in Flax: `use_fast_variance`, since the one variance here is
    safe, and `force_float32_reductions`, since statistics are always computed in at least float32.
    `axis_name`, which the features may be spread over, changes nothing where nothing binds it.

    Raises:
        ValueError: `bn_jax.layer_norm` objects to the input.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> y, _ = bn.linen.LayerNorm().init_with_output(jax.random.key(0), jnp.array([[1.0, 3.0]]))
        >>> y.round(3).tolist()
        [[-1.0, 1.0]]

    Reference: Ba et al. 2016, https://arxiv.org/abs/1607.06450.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array that holds the features on `feature_axes`.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return layer_norm(
            _make_params(self, _features(self.feature_axes, x)),
            x,
            reduction_axes=self.reduction_axes,
            feature_axes=self.feature_axes,
            **_options(self, mask),
        )


class RMSNorm(nn.RMSNorm):
    """Root mean square normalization as `flax.linen.RMSNorm` has it.

    ``y = x * rsqrt(mean(|x|**2) + epsilon) * scale``, as `bn_jax.rms_norm` computes it. Attributes
    and errors are those of `LayerNorm`, but there is no bias.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> y, _ = bn.linen.RMSNorm().init_with_output(jax.random.key(0), jnp.array([[3.0, -3.0]]))
        >>> y.round(3).tolist()
        [[1.0, -1.0]]

    Reference: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array that holds the features on `feature_axes`.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return rms_norm(
            _make_params(self, _features(self.feature_axes, x)),
            x,
            reduction_axes=self.reduction_axes,
            feature_axes=self.feature_axes,
            **_options(self, mask),
        )


class GroupNorm(nn.GroupNorm):
    """Group normalization with every attribute and parameter of `flax.linen.GroupNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.group_norm` computes it,
    with `mean` and `var` over each group of features. Of `num_groups` and `group_size` one is None.
    The other attributes, and the errors, are those of `LayerNorm`.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> layer = bn.linen.GroupNorm(num_groups=2)
        >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
        >>> layer.init_with_output(jax.random.key(0), x)[0].round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Reference: Wu & He 2018, https://arxiv.org/abs/1803.08494.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array [N, ..., C].
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return group_norm(
            _make_params(self, _features(-1, x)),
            x,
            num_groups=self.num_groups,
            group_size=self.group_size,
            reduction_axes=self.reduction_axes,
            **_options(self, mask),
        )


class InstanceNorm(nn.InstanceNorm):
    """Instance normalization with every attribute and parameter of `flax.linen.InstanceNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.instance_norm` computes it,
    with `mean` and `var` over all axes but the first and the feature axes. The attributes and
    errors are those of `LayerNorm`.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> x = jnp.array([[[1.0, 10.0], [3.0, 30.0]]])
        >>> y, _ = bn.linen.InstanceNorm().init_with_output(jax.random.key(0), x)
        >>> y.round(3).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]

    Reference: Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array of examples [N, ...].
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return instance_norm(
            _make_params(self, _features(self.feature_axes, x)),
            x,
            feature_axes=self.feature_axes,
            **_options(self, mask),
        )


def _features(axes: Any, x: jax.Array) -> tuple[int, ...]:
    return tuple(x.shape[axis] for axis in canonical_axes("feature_axes", axes, jnp.ndim(x)))


def _make_params(layer: Any, features: tuple[int, ...]) -> Params:
    params: Params = {}
    if layer.use_scale:
        params["scale"] = layer.param("scale", layer.scale_init, features, layer.param_dtype)
    if getattr(layer, "use_bias", False):
        params["bias"] = layer.param("bias", layer.bias_init, features, layer.param_dtype)
    return params


def _options(layer: Any, mask: jax.Array | None) -> dict[str, Any]:
    names = ("epsilon", "axis_name", "axis_index_groups", "dtype")
    return {"mask": mask, **{name: getattr(layer, name) for name in names}}
