"""Flax Linen modules: variables and attributes; the arithmetic is in the pure functions."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, ParamSpec, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from bn_jax._core.batch_norm import (
    BatchStats,
    Correction,
    init_batch_stats,
    normalize_and_update,
    normalize_by_moments,
    update_batch_stats,
)
from bn_jax._core.batch_renorm import make_correction
from bn_jax._core.feature_norms import group_norm, instance_norm, layer_norm, rms_norm
from bn_jax._core.moments import (
    AxisName,
    Moments,
    as_floating,
    canonical_axes,
    mean_dtype,
    merge_moments,
    statistics_dtype,
)
from bn_jax._core.standardize import Activation, Params
from bn_jax._core.whitening import WhiteningStats, init_whitening_stats, whitening_norm


class _RunningNorm(nn.Module):
    """The switches of the layers with running statistics, and what their messages call them."""

    def _modes(
        self, use_running_average: bool | None, update_running_average: bool | None
    ) -> tuple[bool, bool]:
        """Returns whether the running statistics normalize, and whether they update."""
        use = self._given_once("use_running_average", use_running_average)
        update = self._given_once("update_running_average", update_running_average)
        if use is None:
            kind = type(self).__name__
            raise ValueError(
                f"use_running_average is None in attribute and call of {self._called()}. "
                f"Write {kind}(use_running_average=not train)(x), or "
                f"{kind}()(x, use_running_average=not train), or, where the model hands it on, "
                "model.apply(variables, x, train=True, mutable=['batch_stats'])."
            )
        return use, (not use or self._measures()) if update is None else update

    def _measures(self) -> bool:
        """Says whether evaluation measures: the state asks for it, and can take it."""
        asked = self.has_variable("batch_stats", "measured")
        return asked and self.is_mutable_collection("batch_stats")

    def _given_once(self, name: str, in_call: bool | None) -> bool | None:
        in_attribute: bool | None = getattr(self, name)
        if in_attribute is None or in_call is None:
            return in_call if in_attribute is None else in_attribute
        raise ValueError(
            f"{name}={in_attribute} in the attribute and {name}={in_call} in the call of "
            f"{self._called()}: give it once. What a call is to decide, leave out of the "
            f"attributes: {type(self).__name__}()(x, {name}={in_call})."
        )

    def _called(self) -> str:
        kind = type(self).__name__
        return f"{kind} {'/'.join(self.path)!r}" if self.path else f"the top-level {kind}"

    def _require_batch_stats(self, update: bool) -> None:
        if self.is_mutable_collection("batch_stats"):
            return
        layer = self._called()
        if not self.has_variable("batch_stats", "mean"):
            raise ValueError(
                f"batch_stats has nothing for {layer}. Pass what init returned: "
                "model.apply({'params': params, 'batch_stats': batch_stats}, x). Name batch_stats "
                "also where a lifted transform encloses the layer, for example "
                "nn.scan(..., variable_carry='batch_stats') or "
                "nn.vmap(..., variable_axes={'params': 0, 'batch_stats': 0}), and in "
                "init(..., mutable=[...]) where that is given."
            )
        if update and not self.is_initializing():
            raise ValueError(
                f"batch_stats is immutable, but {layer} has use_running_average=False or "
                "update_running_average=True, and updates it. In training write: "
                "y, updates = model.apply(variables, x, mutable=['batch_stats']); "
                "in evaluation pass use_running_average=True; to normalize by the batch and leave "
                "the statistics alone pass update_running_average=False."
            )


class BatchNorm(_RunningNorm, nn.BatchNorm):
    """Batch normalization with every attribute, default and variable of `flax.linen.BatchNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.batch_norm` computes it.
    Parameters are ``scale`` and ``bias``, of the sizes of the feature axes, in `param_dtype`; the
    collection ``batch_stats`` holds ``mean`` and ``var`` in float32 (float64 for double precision;
    the mean of complex input is complex: Flax's changes its dtype at the first update). A
    checkpoint of Flax's layer loads into this one and the other way round. While initializing,
    nothing is updated and `axis_name` need not exist; nor need it under `jit`, plain or sharded,
    where statistics are global (`bn_jax.batch_norm` has the rule).

    Two more collections serve who spreads a batch over several calls, as
    `bn_jax.training.accumulated_train_step` does. Where ``batch_moments`` is named as mutable
    (``mutable=True`` does not name it), a training call merges its moments (``count``, ``mean``,
    ``var``) into what is there, and the running statistics are updated by all of them: from the
    same old ``batch_stats``, the last call makes the one update by the whole. A layer that neither
    normalizes by the batch nor updates leaves a ``count`` of 0 there, and nothing else. Where
    ``given_moments`` is passed in, a training call normalizes by these instead of by those of `x`.

    A layer in whose ``batch_stats`` there is ``measured`` measures instead of averaging, and where
    they are mutable in evaluation too, as `bn_jax.batch_norm` says; `bn_jax.recalibrate` puts it
    there.

    Under `nn.scan`, training needs ``variable_carry="batch_stats"`` and a mutable ``batch_stats``.
    `nn.scan` creates no carried variable: initialize, and evaluate immutable ``batch_stats``, with
    it among ``variable_broadcast`` instead.

    Attributes beyond Flax's:
        momentum: None for the cumulative average over all batches; ``batch_stats`` then holds
            their ``count`` as well.
        activation: a function applied to the result.
        virtual_batch_size: statistics of their own for every that many consecutive examples.
        running_var_ddof: 1 for the unbiased running variance, as the paper and PyTorch have it.
        update_running_average: whether the running statistics update; None: if and only if the
            batch normalizes, or they are measured. Where it is False, ``batch_stats`` may be
            immutable.
        train_params: False for ``scale`` and ``bias`` without a derivative. What an optimizer does
            without one, as weight decay, is not its business.
        frozen: True for running statistics that normalize and do not update, whatever the call or
            the other attributes say. `freeze` says it from outside, by path.

    Attributes that mean less than in Flax: `use_fast_variance`, since the one variance here is
    both fast and safe, and `force_float32_reductions`, which only chooses the dtype that
    ``batch_stats`` is stored in, since statistics are always computed in at least float32.

    Raises:
        ValueError: ``batch_stats`` is missing or immutable, `use_running_average` is given nowhere
            or twice, or `bn_jax.batch_norm` objects.

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
    update_running_average: bool | None = None
    train_params: bool = True
    frozen: bool = False

    @nn.compact
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
            x: floating-point or complex array that holds the features on `axis`.
            use_running_average: True for evaluation, False for training; overrides None in the
                attribute of that name.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.
            residual: an array of the shape of `x`, added before the activation.
            update_running_average: overrides None in the attribute of that name.

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
        frozen, train_params = _switches(self)
        use_running_average, update = (
            (True, False) if frozen else self._modes(use_running_average, update_running_average)
        )
        self._require_batch_stats(update)
        x = as_floating("x", x)
        features = _features("axis", self.axis, x)
        variables = self._variables(features, x.dtype)
        params = _make_params(self, features)
        if not train_params:
            params = jax.lax.stop_gradient(params)
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
        if (update or not use_running_average) and self._spreads_a_batch():
            y, updated = self._train_on_a_part(
                params, batch_stats, x, correction, use_running_average, options
            )
        else:
            if self.is_mutable_collection("batch_stats") and self._collects():
                self.variable("batch_moments", "count", jnp.zeros, features)
            y, updated = normalize_and_update(
                params,
                batch_stats,
                x,
                correction,
                use_running_average=use_running_average,
                update_running_average=update,
                momentum=self.momentum,
                running_var_ddof=self.running_var_ddof,
                initializing=self.is_initializing(),
                **options,
            )
        if update:
            for name, variable in variables.items():
                variable.value = cast(dict[str, jax.Array], updated)[name]
        return y

    def _spreads_a_batch(self) -> bool:
        return self._collects() or self.has_variable("given_moments", "mean")

    def _collects(self) -> bool:
        # Who says mutable=True asks for what a model of Flax's has, not for this collection.
        asked = not self.is_mutable_collection("a collection that nobody names")
        return asked and self.is_mutable_collection("batch_moments") and not self.is_initializing()

    def _train_on_a_part(
        self,
        params: Params,
        batch_stats: BatchStats,
        x: jax.Array,
        correction: Correction | None,
        use_running_average: bool,
        options: dict[str, Any],
    ) -> tuple[jax.Array, BatchStats]:
        given: Any = batch_stats if use_running_average else None
        if given is None and self.has_variable("given_moments", "mean"):
            given = {name: self.get_variable("given_moments", name) for name in ("mean", "var")}
        y, found = normalize_by_moments(params, batch_stats, x, given, correction, **options)
        if self._collects():
            collected = {
                name: self.variable("batch_moments", name, jnp.zeros_like, like)
                for name, like in {"count": found.var, "mean": found.mean, "var": found.var}.items()
            }
            found = merge_moments(Moments(**{n: c.value for n, c in collected.items()}), found)
            for name, variable in collected.items():
                variable.value = getattr(found, name)
        return y, update_batch_stats(
            batch_stats,
            found,
            momentum=self.momentum,
            running_var_ddof=self.running_var_ddof,
            by_running=use_running_average,
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

        names = ["mean", "var"] + ["count"] * use_count
        names += ["measured"] * self.has_variable("batch_stats", "measured")
        return {name: self.variable("batch_stats", name, initial, name) for name in names}


class WhiteningNorm(_RunningNorm):
    """Whitening, with the attributes of `BatchNorm` that apply.

    ``y = (cov + epsilon * I)**(-1/2) @ (x - mean) * scale + bias``, as `bn_jax.whitening_norm`
    computes it. Parameters are ``scale`` and ``bias``, of the size of `axis`, in `param_dtype`; the
    collection ``batch_stats`` holds ``mean`` and ``cov``, [groups, size, size], in at least
    float32. While initializing, nothing is updated and `axis_name` need not exist. `freeze` freezes
    it as a batch norm.

    Attributes:
        use_running_average: True for evaluation, False for training, None: the call says it.
        axis: the feature axis.
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
        update_running_average: whether the running statistics update; None: if and only if the
            batch whitens.
        train_params: False for ``scale`` and ``bias`` without a derivative.
        frozen: True for running statistics that whiten and do not update, whatever the call or the
            other attributes say.

    Raises:
        ValueError: ``batch_stats`` is missing or immutable, `use_running_average` is given nowhere
            or twice, or `bn_jax.whitening_norm` objects.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> layer = bn.linen.WhiteningNorm(use_running_average=False, iterations=10)
        >>> x = jax.random.normal(jax.random.key(0), (100, 2)) @ jnp.array([[3.0, 1.0], [0.0, 1.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        >>> (jnp.cov(y.T, bias=True).round(3) + 0.0).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Reference: Huang et al. 2019, https://arxiv.org/abs/1904.03441.
    """

    use_running_average: bool | None = None
    axis: int = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    iterations: int = 5
    group_size: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    update_running_average: bool | None = None
    train_params: bool = True
    frozen: bool = False

    @nn.compact
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
            x: floating-point array that holds the features on `axis`.
            use_running_average: True for evaluation, False for training; overrides None in the
                attribute of that name.
            mask: boolean or weights, of size 1 on `axis` and broadcastable to `x`: what enters the
                statistics.
            update_running_average: overrides None in the attribute of that name.

        Returns:
            The whitened array, of the shape of `x`.
        """
        frozen, train_params = _switches(self)
        use_running_average, update = (
            (True, False) if frozen else self._modes(use_running_average, update_running_average)
        )
        self._require_batch_stats(update)
        x = as_floating("x", x)
        features = _features("axis", self.axis, x)
        variables = self._variables(features[0], x.dtype)
        params = _make_params(self, features)
        y, updated = whitening_norm(
            params if train_params else jax.lax.stop_gradient(params),
            cast(WhiteningStats, {name: one.value for name, one in variables.items()}),
            x,
            use_running_average=use_running_average,
            update_running_average=update,
            axis=self.axis,
            momentum=self.momentum,
            iterations=self.iterations,
            group_size=self.group_size,
            initializing=self.is_initializing(),
            **_options(self, mask),
        )
        if update:
            for name, variable in variables.items():
                variable.value = cast(dict[str, jax.Array], updated)[name]
        return y

    def _variables(self, features: int, x_dtype: Any) -> dict[str, nn.Variable[Any]]:
        known = self.has_variable("batch_stats", "mean")
        counted = self.has_variable("batch_stats", "count")
        use_count = counted or (self.momentum is None and not known)
        made = init_whitening_stats(
            features,
            group_size=self.group_size,
            dtype=statistics_dtype(x_dtype),
            use_count=use_count,
        )
        return {
            name: self.variable("batch_stats", name, lambda value=value: value)
            for name, value in cast(dict[str, jax.Array], made).items()
        }


class BatchRenorm(BatchNorm):
    """Batch renormalization, which looks in training as it will in evaluation.

    ``y = ((x - mean) * rsqrt(var + epsilon) * r + d) * scale + bias``, as `bn_jax.batch_renorm`
    computes it, which says what `r` and `d` are. All attributes of `BatchNorm` are here, with their
    defaults, and so are its variables, so that a checkpoint moves between both.

    Attributes beyond `BatchNorm`'s:
        r_max: the bound of `r`, at least 1.
        d_max: the bound of `d`, at least 0.

    Raises:
        ValueError: as `BatchNorm` does, or `r_max` or `d_max` is too small.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> layer = bn.linen.BatchRenorm(use_running_average=False)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, _ = layer.apply(variables, x, r_max=1.5, mutable=["batch_stats"])
        >>> y.round(2).tolist()
        [[1.0], [3.0]]

    Reference: Ioffe 2017, https://arxiv.org/abs/1702.03275.
    """

    r_max: float = 3.0
    d_max: float = 5.0

    @nn.compact
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
            _make_params(self, _features("feature_axes", self.feature_axes, x)),
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
            _make_params(self, _features("feature_axes", self.feature_axes, x)),
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
            _make_params(self, _features("feature_axes", -1, x)),
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
            _make_params(self, _features("feature_axes", self.feature_axes, x)),
            x,
            feature_axes=self.feature_axes,
            **_options(self, mask),
        )


def _features(name: str, axes: Any, x: jax.Array) -> tuple[int, ...]:
    return tuple(x.shape[axis] for axis in canonical_axes(name, axes, jnp.ndim(x)))


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


P = ParamSpec("P")
R = TypeVar("R")


def freeze(apply: Callable[P, R], *paths: str, train_params: bool = False) -> Callable[P, R]:
    """Returns `apply` with its batch norms frozen: running statistics that do not update.

    Of Flax's batch norms as well as of ours, those whose path matches one of `paths`, or lies in a
    module whose path does, evaluate in training too. Variables keep their names, shapes and
    initial values. Nothing compiled before is mistaken for what the returned function does, be it
    `jax.jit` or `nn.jit` that compiled it; a train state recompiles after
    ``state = state.replace(apply_fn=bn.linen.freeze(state.apply_fn, "stage0*"))``.

    Args:
        apply: ``model.apply``, ``model.init``, ``state.apply_fn`` or any other function in which
            Flax modules are called.
        *paths: glob patterns (`fnmatch`; ``*`` also matches ``/``) of module paths joined by
            ``/``, as they are in the variables. None given: every batch norm.
        train_params: whether ``scale`` and ``bias`` have a derivative all the same.

    Returns:
        A function called like `apply`. Of several around each other the last one that was made
        decides, where its paths match; see `unfreeze`.

    Raises:
        ValueError: when called, a pattern matches no batch norm; the message lists those there are.
            Or there are paths, and a class made by `nn.jit`: it computes all its modules with the
            same attributes by the trace of the first. (`nn.jit` as a decorator of a method does so
            too, and cannot be told.)
        TypeError: when called, a pattern matches a user's subclass of `flax.linen.BatchNorm`,
            which may do anything: derive it from `bn_jax.linen.BatchNorm`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, bn_jax as bn
        >>> model = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=False)])
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = model.init(jax.random.key(0), x)
        >>> frozen = bn.linen.freeze(model.apply, "layers_1")
        >>> y, updates = frozen(variables, x, mutable=["batch_stats"])
        >>> updates["batch_stats"]["layers_1"]["mean"].tolist()
        [0.0, 0.0]
    """
    return _ruled(apply, paths, frozen=True, train_params=train_params)


def unfreeze(apply: Callable[P, R], *paths: str) -> Callable[P, R]:
    """Takes back what `freeze` did to the batch norms on some paths.

    They are again what their own attributes say.

    Args:
        apply: what `freeze` returned.
        *paths: as for `freeze`.

    Returns:
        A function called like `apply`.

    Raises:
        ValueError: as for `freeze`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, bn_jax as bn
        >>> layer = bn.linen.BatchNorm(use_running_average=False, momentum=0.5)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> thawed = bn.linen.unfreeze(bn.linen.freeze(layer.apply))
        >>> y, updates = thawed(variables, x, mutable=["batch_stats"])
        >>> updates["batch_stats"]["mean"].tolist()
        [1.0]
    """
    return _ruled(apply, paths, frozen=False, train_params=True)


@contextmanager
def replace_norms() -> Iterator[None]:
    """Makes Flax models compute their norms with the layers of this module.

    Wherever a layer of Flax's is called inside, `flax.linen.BatchNorm` and every other that has a
    namesake here, ours computes in its place, with its attributes, its variables and its path. So
    `init`, `apply` and `tabulate` of a model that knows nothing of bn_jax, and all that it is saved
    to and loaded from, stay as they are. Subclasses are left alone: what they do is theirs.

    What was compiled outside is compiled again inside and the other way round, by `jax.jit` and by
    `nn.jit`. As any context manager made by `contextlib.contextmanager`, it also decorates
    functions.

    Yields:
        Nothing.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, bn_jax as bn
        >>> layer, x = nn.BatchNorm(use_running_average=False), jnp.array([[1e4 - 1], [1e4 + 1]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> with bn.linen.replace_norms():
        ...     y, _ = layer.apply(variables, x, mutable=["batch_stats"])
        >>> y.round(3).tolist()
        [[-1.0], [1.0]]
    """
    with _replacing(True), nn.intercept_methods(_call_ours):
        yield


@dataclasses.dataclass(eq=False)
class _Rule:
    """What `freeze` or `unfreeze` says, and what of it has been seen to matter."""

    paths: tuple[str, ...]
    frozen: bool
    train_params: bool
    unmatched: set[str]
    norms: set[str] = dataclasses.field(default_factory=set)

    def covers(self, path: tuple[str, ...]) -> bool:
        around = ["/".join(path[:length]) for length in range(len(path) + 1)]
        matched = {
            pattern for pattern in self.paths if any(fnmatchcase(one, pattern) for one in around)
        }
        self.norms.add(around[-1])
        self.unmatched -= matched
        return bool(matched)

    def require_matches(self) -> None:
        if self.unmatched:
            raise ValueError(
                f"No batch norm was called whose path matches {sorted(self.unmatched)}; those "
                f"called have the paths {sorted(self.norms)}. Pass patterns of these, or of "
                "modules around them."
            )


# JAX compiles anew what it has compiled under another value of these.
_rules = jax.make_user_context(())
_replacing = jax.make_user_context(False)


def _ruled(
    apply: Callable[P, R], paths: tuple[str, ...], *, frozen: bool, train_params: bool
) -> Callable[P, R]:
    paths = paths or ("*",)
    rule = _Rule(paths, frozen, train_params, set(paths))

    @functools.wraps(apply)
    def ruled(*args: P.args, **kwargs: P.kwargs) -> R:
        with _rules((*_rules.value, rule)), nn.intercept_methods(_call_frozen):
            result = apply(*args, **kwargs)
        rule.require_matches()
        return result

    return ruled


def _rule_for(module: nn.Module) -> _Rule | None:
    """Returns the outermost rule that covers a norm; all of them take note of it."""
    covering = [rule for rule in _rules.value if rule.covers(module.path)]
    return covering[0] if covering else None


def _switches(layer: "BatchNorm | WhiteningNorm") -> tuple[bool, bool]:
    """Returns whether a layer is frozen, and whether its parameters train."""
    rule = _rule_for(layer)
    if rule is None or not rule.frozen:
        return layer.frozen, layer.train_params
    return True, rule.train_params


@functools.cache
def _replacements() -> dict[type[nn.Module], type[nn.Module]]:
    """Returns the classes of this module by those of Flax that have the same name."""
    named = {name: one for name, one in globals().items() if isinstance(one, type)}
    return {
        getattr(nn, name): cast(type[nn.Module], ours)
        for name, ours in named.items()
        if issubclass(ours, getattr(nn, name, ()))
    }


def _call_ours(
    next_call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    theirs = type(context.module)
    ours = _replacements().get(theirs)
    if ours is None or context.method_name != "__call__":
        return next_call(*args, **kwargs)
    # The call of Flax's layer has begun: within it, the layer is ours, so that it is one call in
    # what Linen captures and tabulates, and names and random numbers are those of its scope.
    context.module.__class__ = ours
    try:
        return cast(Any, ours).__call__.__wrapped__(context.module, *args, **kwargs)
    finally:
        context.module.__class__ = theirs


def _call_frozen(
    next_call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    module = context.module
    kind, (base, *_) = type(module).__name__, type(module).__bases__
    if kind == f"Jit{base.__name__}" and any(rule.paths != ("*",) for rule in _rules.value):
        raise ValueError(
            f"Paths cannot tell the norms of several {kind} apart, for nn.jit "
            "computes all modules of one class and with the same attributes by the trace of the "
            "first: freeze without paths, give the norms the attribute frozen=True, or compile the "
            "whole step with jax.jit instead of its modules with nn.jit."
        )
    of_flax = isinstance(module, nn.BatchNorm) and not isinstance(module, BatchNorm)
    rule = _rule_for(module) if of_flax and context.method_name == "__call__" else None
    if rule is None or not rule.frozen:
        return next_call(*args, **kwargs)
    if type(module) is not nn.BatchNorm:
        raise TypeError(
            f"{'/'.join(module.path)!r} is a {type(module).__name__}, a subclass of "
            "flax.linen.BatchNorm, and may do with its statistics what it likes: derive it from "
            "bn_jax.linen.BatchNorm, or freeze other paths."
        )
    return _call_ours(next_call, args, kwargs, context)
