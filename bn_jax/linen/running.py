"""Flax Linen modules with running statistics: variables and attributes, no arithmetic.

To Flax, a module is one call: its methods are `__call__` alone, and what that does are functions.
They also run the call of a layer of Flax's, which `freeze` and `replace_norms` ask for.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import DenyList, in_filter
from flax.typing import Initializer
from jax.typing import DTypeLike

from bn_jax._core.batch_norm import run_norm, run_part
from bn_jax._core.batch_renorm import make_correction
from bn_jax._core.checks import (
    Inputs,
    as_floating,
    check_inputs,
    features_of,
    mean_dtype,
    statistics_dtype,
)
from bn_jax._core.domain_batch_norm import WEIGHTS_IN_PARTS, check_domain_inputs, run_mixture
from bn_jax._core.merging import merge_moments
from bn_jax._core.running import init_batch_stats, update_batch_stats
from bn_jax._core.types import (
    Activation,
    AxisName,
    BatchStats,
    Correction,
    Mode,
    Moments,
    Options,
    Params,
    WhiteningStats,
)
from bn_jax._core.whitening import WhiteningOptions, init_whitening_stats, run_whitening
from bn_jax.linen.frozen import rule_for, rules


class BatchNorm(nn.BatchNorm):
    """Batch normalization with every attribute, default and variable of `flax.linen.BatchNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.batch_norm` computes it.
    Parameters are ``scale`` and ``bias``, of the sizes of the feature axes, in `param_dtype`. The
    collection ``batch_stats`` holds ``mean`` and ``var`` in float32 (float64 for double precision;
    the mean of complex input is complex, where Flax's changes its dtype at the first update).
    Statistics in half precision become float32 at the first update; `bn_jax.promote_batch_stats`
    casts them before a scan. A checkpoint of Flax's layer loads into this one and the other way
    round. While initializing, nothing is updated and `axis_name` need not exist; nor need it under
    `jit`, plain or sharded, where statistics are global (`bn_jax.batch_norm` has the rule).

    Two more collections support splitting one batch over several calls, as
    `bn_jax.training.accumulated_train_step` does. Where ``batch_moments`` is named as mutable
    (``mutable=True`` does not name it), a training call merges its moments (``count``, ``mean``,
    ``var``) into the collection, and all of them update the running statistics. So, from the same
    old ``batch_stats``, the last call makes the one update by the whole batch. A layer that neither
    normalizes by the batch nor updates leaves only a ``count`` of 0 there. Where ``given_moments``
    is passed in, it normalizes a training call instead of the statistics of `x`.

    Where ``batch_stats`` holds ``measured``, the layer measures instead of averaging, as
    `bn_jax.batch_norm` says, and in evaluation too if they are mutable. `bn_jax.recalibrate` adds
    it.

    Under `nn.scan`, training needs ``variable_carry="batch_stats"`` and a mutable ``batch_stats``.
    `nn.scan` creates no carried variable: for initialization, and for evaluation with immutable
    ``batch_stats``, name it in ``variable_broadcast`` instead.

    Attributes beyond those of Flax:
        momentum: None for the cumulative average over all batches; ``batch_stats`` then holds
            their ``count`` as well.
        activation: a function applied to the result.
        virtual_batch_size: how many consecutive examples share statistics; None for all.
        running_var_ddof: 1 for the unbiased running variance, as in the paper and PyTorch.
        update_running_average: whether the running statistics update; None: if and only if the
            batch normalizes, or they are measured. Where it is False, ``batch_stats`` may be
            immutable. Where both attributes are False, the layer has no running statistics, as
            in PyTorch with ``track_running_stats=False``.
        train_params: False for ``scale`` and ``bias`` without a derivative. An optimizer may still
            change them, for example by weight decay.
        frozen: True for running statistics that normalize and do not update, whatever the call or
            the other attributes say. `freeze` sets it from outside, by path.

    Attributes that mean less than in Flax: `use_fast_variance`, where False guards the variance of
    bfloat16 input against cancellation (other input is always guarded; see `bn_jax.moments`), and
    `force_float32_reductions`, because statistics are always computed and stored in at least
    float32: where it is False, `param_dtype` is their dtype if that is wider.

    Raises:
        ValueError: ``batch_stats`` is missing or immutable, `use_running_average` is given nowhere
            or twice, or as in `bn_jax.batch_norm`.

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
        return call_batch_norm(
            self,
            x,
            use_running_average,
            mask=mask,
            residual=residual,
            update_running_average=update_running_average,
        )


class WhiteningNorm(nn.Module):
    """Whitening, with the attributes of `BatchNorm` that apply.

    ``y = (cov + epsilon * I)**(-1/2) @ (x - mean) * scale + bias``, as `bn_jax.whitening_norm`
    computes it. Parameters are ``scale`` and ``bias``, of the size of `axis`, in `param_dtype`. The
    collection ``batch_stats`` holds ``mean`` and ``cov``, [groups, size, size], in at least
    float32. While initializing, nothing is updated and `axis_name` need not exist. `freeze`
    freezes it like a batch norm.

    Attributes:
        use_running_average: True for evaluation, False for training, None to decide in the call.
        axis: the feature axis.
        momentum: the weight of the old value in the running statistics; None for the cumulative
            average over all batches; ``batch_stats`` then holds their ``count`` as well.
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
        update_running_average: whether the running statistics update; None: if and only if the
            batch whitens.
        train_params: False for ``scale`` and ``bias`` without a derivative.
        frozen: True for running statistics that whiten and do not update, whatever the call or the
            other attributes say.

    Raises:
        ValueError: ``batch_stats`` is missing or immutable, `use_running_average` is given nowhere
            or twice, or as in `bn_jax.whitening_norm`.

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
        return _call_whitening_norm(self, x, use_running_average, mask, update_running_average)


class BatchRenorm(BatchNorm):
    """Batch renormalization, which behaves in training as it will in evaluation.

    ``y = ((x - mean) * rsqrt(var + epsilon) * r + d) * scale + bias``, as `bn_jax.batch_renorm`
    computes it, which defines `r` and `d`. It has all attributes of `BatchNorm`, with their
    defaults, and its variables, so that a checkpoint moves between both.

    Attributes beyond those of BatchNorm:
        r_max: the bound of `r`, at least 1.
        d_max: the bound of `d`, at least 0.

    Raises:
        ValueError: as in `BatchNorm`, or `r_max` or `d_max` is too small.

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
            x: floating-point or complex array that holds the features on `axis`.
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
    layer: Any,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
    residual: jax.Array | None = None,
    update_running_average: bool | None = None,
    correction: Correction | None = None,
    domain: jax.Array | int | None = None,
) -> jax.Array:
    """Runs the call of a batch norm, ours or Flax's.

    Args:
        layer: the module, whose call has begun.
        x: floating-point or complex array that holds the features on `axis`.
        use_running_average: True for evaluation, False for training.
        mask: what enters the statistics.
        residual: an array to add before the activation.
        update_running_average: whether the running statistics update.
        correction: the correction of a relative of batch norm.
        domain: the domains of the examples, where the layer has domains.

    Returns:
        The normalized array, of the shape of `x`.
    """
    state = _frozen_state(layer)
    mode = _choose_mode(layer, state.frozen, use_running_average, update_running_average)
    is_untracked = correction is None and _is_untracked(layer, mode)
    if not is_untracked:
        _require_batch_stats(layer, mode.update)
    x = as_floating("x", x)
    features = features_of("axis", layer.axis, x)
    of_params = of_stats = features
    if domain is not None:
        by_domain = (layer.num_domains, *features)
        of_params = features if layer.share_params else by_domain
        of_stats = features if layer.share_stats else by_domain
    variables = {} if is_untracked else _batch_stats_of(layer, of_stats, x.dtype)
    params = make_params(layer, of_params)
    batch_stats: Any = {name: variable.value for name, variable in variables.items()}
    if is_untracked:
        batch_stats = init_batch_stats(of_stats)  # which nothing reads
    collects = _collects_moments(layer)
    options = Options.of_module(
        layer, correction=correction, describe_layer=partial(_describe, layer)
    )
    params = params if state.train_params else jax.lax.stop_gradient(params)
    given, mixture = (options, params, batch_stats, x), None
    if domain is None:
        inputs = check_inputs(*given, mask, residual)
    else:
        inputs, mixture = check_domain_inputs(mode, *given, domain, mask, residual)
    in_parts = collects or layer.has_variable("given_moments", "mean")
    if mixture is not None and in_parts:
        raise ValueError(WEIGHTS_IN_PARTS.format(_describe(layer)))
    if in_parts and (mode.update or not mode.use_running_average):
        y, updated = _train_on_a_part(layer, options, inputs, mode, collects)
    else:
        if collects and layer.is_mutable_collection("batch_stats"):
            layer.variable("batch_moments", "count", jnp.zeros, of_stats)
        run = run_norm if mixture is None else partial(run_mixture, mixture)
        y, updated = run(options, inputs, mode)
    if mode.update:
        new = cast(dict[str, Any], updated)
        for name, variable in variables.items():
            variable.value = new[name]
    return y


def _call_whitening_norm(
    layer: WhiteningNorm,
    x: jax.Array,
    use_running_average: bool | None,
    mask: jax.Array | None,
    update_running_average: bool | None,
) -> jax.Array:
    state = _frozen_state(layer)
    mode = _choose_mode(layer, state.frozen, use_running_average, update_running_average)
    _require_batch_stats(layer, mode.update)
    x = as_floating("x", x)
    features = features_of("axis", layer.axis, x)
    variables = _whitening_stats_of(layer, features[0], x.dtype)
    params = make_params(layer, features)
    y, updated = run_whitening(
        WhiteningOptions.of_module(layer, describe_layer=partial(_describe, layer)),
        mode,
        params if state.train_params else jax.lax.stop_gradient(params),
        cast(WhiteningStats, {name: variable.value for name, variable in variables.items()}),
        x,
        mask,
    )
    if mode.update:
        new = cast(dict[str, Any], updated)
        for name, variable in variables.items():
            variable.value = new[name]
    return y


def make_params(layer: Any, features: tuple[int, ...]) -> Params:
    """Returns scale and bias of a layer, ours or Flax's, as far as it has them."""
    params: Params = {}
    if layer.use_scale:
        params["scale"] = layer.param("scale", layer.scale_init, features, layer.param_dtype)
    if getattr(layer, "use_bias", False):
        params["bias"] = layer.param("bias", layer.bias_init, features, layer.param_dtype)
    return params


class _FrozenState(NamedTuple):
    """Whether a norm is frozen, and whether its parameters train."""

    frozen: bool
    train_params: bool


def _frozen_state(layer: nn.Module) -> _FrozenState:
    """Returns what the rules, or else the attributes of a norm, say about it."""
    rule = rule_for(layer) if rules.value else None
    if rule is None or not rule.frozen:
        # Flax's norms have neither attribute.
        frozen, train_params = getattr(layer, "frozen", False), getattr(layer, "train_params", True)
        return _FrozenState(frozen, train_params)
    return _FrozenState(True, rule.train_params)


def _choose_mode(
    layer: nn.Module,
    frozen: bool,
    use_running_average: bool | None,
    update_running_average: bool | None,
) -> Mode:
    """Returns how a call runs, by its arguments and the attributes of the layer."""
    if frozen:
        return Mode(use_running_average=True, update=False)
    use = _value_given_once(layer, "use_running_average", use_running_average)
    update = _value_given_once(layer, "update_running_average", update_running_average)
    if use is None:
        kind = type(layer).__name__
        raise ValueError(
            f"use_running_average is None in attribute and call of {_describe(layer)}. "
            f"Write {kind}(use_running_average=not train)(x), or "
            f"{kind}()(x, use_running_average=not train), or, where the model hands it on, "
            "model.apply(variables, x, train=True, mutable=['batch_stats'])."
        )
    initializing = layer.is_initializing()
    if update is None:
        # Evaluation measures where the state asks for it, and can take it.
        measures = layer.has_variable("batch_stats", "measured")
        update = not use or (measures and layer.is_mutable_collection("batch_stats"))
    return Mode(use, update and not initializing, initializing)


def _value_given_once(layer: nn.Module, name: str, in_call: bool | None) -> bool | None:
    in_attribute: bool | None = getattr(layer, name, None)
    if in_attribute is None or in_call is None:
        return in_call if in_attribute is None else in_attribute
    raise ValueError(
        f"{name}={in_attribute} in the attribute and {name}={in_call} in the call of "
        f"{_describe(layer)}: give it once. To decide it in the call, leave it out of the "
        f"attributes: {type(layer).__name__}()(x, {name}={in_call})."
    )


def _describe(layer: nn.Module) -> str:
    kind = type(layer).__name__
    return f"{kind} {'/'.join(layer.path)!r}" if layer.path else f"the top-level {kind}"


def _is_untracked(layer: Any, mode: Mode) -> bool:
    """Tells whether a call needs no running statistics, and has none.

    While initializing, nothing is updated: there the attributes must rule out every later use.
    """
    if mode.use_running_average or mode.update or layer.has_variable("batch_stats", "mean"):
        return False
    never_updates = getattr(layer, "update_running_average", None) is False
    return not mode.initializing or (layer.use_running_average is False and never_updates)


def _require_batch_stats(layer: nn.Module, update: bool) -> None:
    if layer.is_mutable_collection("batch_stats"):
        return
    if not layer.has_variable("batch_stats", "mean"):
        raise ValueError(
            f"batch_stats has nothing for {_describe(layer)}. Pass what init returned: "
            "model.apply({'params': params, 'batch_stats': batch_stats}, x). Name batch_stats "
            "also where a lifted transform encloses the layer, for example "
            "nn.scan(..., variable_carry='batch_stats') or "
            "nn.vmap(..., variable_axes={'params': 0, 'batch_stats': 0}), and in "
            "init(..., mutable=[...]) where that is given."
        )
    if update:
        raise ValueError(
            f"batch_stats is immutable, but {_describe(layer)} has use_running_average=False or "
            "update_running_average=True, and updates it. In training write: "
            "y, updates = model.apply(variables, x, mutable=['batch_stats']); "
            "in evaluation pass use_running_average=True; to normalize by the batch and leave "
            "the statistics alone pass update_running_average=False."
        )


def _batch_stats_of(
    layer: Any, features: tuple[int, ...], x_dtype: DTypeLike
) -> dict[str, nn.Variable[Any]]:
    """Returns the variables of a batch norm's running statistics, which it may make."""
    names = ["mean", "var"]
    known = layer.has_variable("batch_stats", "mean")
    counts = layer.momentum is None and not known
    if counts or layer.has_variable("batch_stats", "count"):
        names.append("count")
    if layer.has_variable("batch_stats", "measured"):
        names.append("measured")

    def initial(name: str) -> jax.Array:
        real = layer.param_dtype
        if layer.force_float32_reductions:
            real = statistics_dtype(x_dtype)
        dtype = mean_dtype(jnp.dtype(real), x_dtype)
        statistics = init_batch_stats(features, dtype=dtype, use_count=True)
        return cast(dict[str, jax.Array], statistics)[name]

    return {name: layer.variable("batch_stats", name, initial, name) for name in names}


def _whitening_stats_of(
    layer: WhiteningNorm, features: int, x_dtype: DTypeLike
) -> dict[str, nn.Variable[Any]]:
    names = ["mean", "cov"]
    counts = layer.momentum is None and not layer.has_variable("batch_stats", "mean")
    if counts or layer.has_variable("batch_stats", "count"):
        names.append("count")

    def initial(name: str) -> jax.Array:
        statistics = init_whitening_stats(
            features,
            group_size=layer.group_size,
            dtype=statistics_dtype(x_dtype),
            use_count=True,
        )
        return cast(dict[str, jax.Array], statistics)[name]

    return {name: layer.variable("batch_stats", name, initial, name) for name in names}


def _collects_moments(layer: nn.Module) -> bool:
    """Tells whether the call names ``batch_moments`` as mutable.

    ``mutable=True`` and what is left of it by a `DenyList` do not name it: they ask for what a
    model of Flax's has.
    """
    scope = layer.scope
    if scope is None or layer.is_initializing() or isinstance(scope.mutable, bool | DenyList):
        return False
    return in_filter(scope.mutable, "batch_moments")


def _train_on_a_part(
    layer: Any, options: Options, inputs: Inputs, mode: Mode, collects: bool
) -> tuple[jax.Array, BatchStats]:
    """Trains on a part of a batch: by statistics that are passed in, and with moments merged."""
    statistics: Any = None
    if mode.use_running_average:
        statistics = inputs.batch_stats
    elif layer.has_variable("given_moments", "mean"):
        names = ("mean", "var")
        statistics = {name: layer.get_variable("given_moments", name) for name in names}
    y, moments = run_part(options, inputs, statistics)
    if collects:
        moments = _merge_into_collection(layer, moments)
    return y, update_batch_stats(
        inputs.batch_stats,
        moments,
        momentum=options.momentum,
        running_var_ddof=options.running_var_ddof,
        by_running=mode.use_running_average,
    )


def _merge_into_collection(layer: nn.Module, moments: Moments) -> Moments:
    """Merges moments into the collection ``batch_moments``, and returns all that is there."""
    zeros = {"count": moments.var, "mean": moments.mean, "var": moments.var}
    variables = {
        name: layer.variable("batch_moments", name, jnp.zeros_like, like)
        for name, like in zeros.items()
    }
    collected = Moments(**{name: variable.value for name, variable in variables.items()})
    merged = merge_moments(collected, moments)
    for name, variable in variables.items():
        variable.value = getattr(merged, name)
    return merged
