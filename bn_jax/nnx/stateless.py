"""Flax NNX modules without running statistics: parameters and attributes, no arithmetic."""

from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import DTypeLike

from bn_jax._core.checks import as_floating, canonical_axes
from bn_jax._core.feature_norms import normalize_groups
from bn_jax._core.types import Params
from bn_jax._modules import (
    compute_instance_norm,
    compute_layer_norm,
    compute_rms_norm,
    feature_options,
)


class Promoted(NamedTuple):
    """Input and parameters as `promote_dtype` leaves them, and the dtype of the result."""

    x: jax.Array
    params: Params
    dtype: DTypeLike


def params_of(layer: Any) -> Params:
    """Returns the values of scale and bias, as far as a layer has them."""
    params = {}
    for name in ("scale", "bias"):
        variable = getattr(layer, name, None)
        if variable is not None:
            params[name] = variable[...]
    return cast(Params, params)


def promote(
    layer: Any,
    x: jax.Array,
    *,
    statistics: Sequence[jax.Array] = (),
    residual: jax.Array | None = None,
) -> Promoted:
    """Promotes as a layer of Flax's does, but for the statistics, which stay as they are.

    Args:
        layer: the module.
        x: the input.
        statistics: what Flax's layer would promote with it.
        residual: None, or what is added to the result.

    Returns:
        Input and parameters, changed only by a `promote_dtype` other than the default.
    """
    params = params_of(layer)
    if layer.promote_dtype is not dtypes.promote_dtype:
        values = [params.get("scale"), params.get("bias")]
        x, *promoted = layer.promote_dtype((x, *statistics, *values), dtype=layer.dtype)
        statistics, (scale, bias) = promoted[: len(statistics)], promoted[len(statistics) :]
        named = {"scale": scale, "bias": bias}
        params = cast(Params, {name: named[name] for name in named if named[name] is not None})
    if layer.dtype is not None:
        return Promoted(x, params, layer.dtype)
    leaves = jax.tree.leaves((x, statistics, params, residual))
    dtype = reduce(jnp.promote_types, [jnp.asarray(leaf).dtype for leaf in leaves])
    return Promoted(x, params, dtype)


class _FeatureNorm(nnx.Module):
    """The call of the norms without running statistics; `_compute` is what computes it."""

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array that holds the features on `feature_axes`; of
                `GroupNorm` on the last axis.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return _call(self, x, mask)


def _call(layer: Any, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    promoted = promote(layer, as_floating("x", x))
    params = _in_features(layer, promoted.params, promoted.x)
    return cast(jax.Array, layer._compute(layer, params, promoted.x, mask, promoted.dtype))


def _in_features(layer: Any, params: Params, x: jax.Array) -> Params:
    """Gives parameters the shape of the features: a layer has one row for all feature axes."""
    axes = canonical_axes("feature_axes", getattr(layer, "feature_axes", -1), jnp.ndim(x))
    features = tuple(x.shape[axis] for axis in axes)
    if any(leaf.size != prod(features) for leaf in jax.tree.leaves(params)):
        return params  # The norm says what does not fit.
    return cast(Params, jax.tree.map(lambda leaf: leaf.reshape(features), params))


def _compute_group_norm(
    layer: Any, params: Params, x: jax.Array, mask: jax.Array | None, dtype: DTypeLike | None
) -> jax.Array:
    # Flax has made `num_groups` of `group_size` where that was given, and keeps both.
    options, axes = feature_options(layer, dtype), layer.reduction_axes
    return normalize_groups(options, params, x, mask, layer.num_groups, None, axes)


class LayerNorm(_FeatureNorm, nnx.LayerNorm):
    """Layer normalization with every argument, default and variable of `flax.nnx.LayerNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.layer_norm` computes it,
    with `mean` and `var` over `reduction_axes`. ``scale`` and ``bias`` are `nnx.Param` of shape
    ``[num_features]`` in `param_dtype`, the product of the sizes of `feature_axes`.

    Two arguments mean less than in Flax: `use_fast_variance`, where False guards the variance of
    bfloat16 input against cancellation (other input is always guarded; see `bn_jax.moments`), and
    `dtype`, which applies to the result alone: statistics are taken of `x` as it came, in at least
    float32, unless a `promote_dtype` other than the default has changed it. `axis_name`, which the
    features may be spread over, changes nothing where nothing binds it.

    Raises:
        ValueError: as in `bn_jax.layer_norm`.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> bn.nnx.LayerNorm(2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0]])).round(3).tolist()
        [[-1.0, 1.0]]

    Reference: Ba et al. 2016, https://arxiv.org/abs/1607.06450.
    """

    _compute = staticmethod(compute_layer_norm)


class RMSNorm(_FeatureNorm, nnx.RMSNorm):
    """Root mean square normalization as `flax.nnx.RMSNorm` has it.

    ``y = x * rsqrt(mean(|x|**2) + epsilon) * scale``, as `bn_jax.rms_norm` computes it. Arguments
    and errors are as in `LayerNorm`, but there is no bias, and `use_fast_variance` changes nothing:
    no mean is subtracted.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> bn.nnx.RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([[3.0, -3.0]])).round(3).tolist()
        [[1.0, -1.0]]

    Reference: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """

    _compute = staticmethod(compute_rms_norm)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; Flax's layer takes the mask by position too, in this one norm.

        Args:
            x: floating-point or complex array that holds the features on `feature_axes`.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return _call(self, x, mask)


class GroupNorm(_FeatureNorm, nnx.GroupNorm):
    """Group normalization with every argument and variable of `flax.nnx.GroupNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.group_norm` computes it,
    with `mean` and `var` over each group of features. One of `num_groups` and `group_size` is
    None. The other arguments, and the errors, are as in `LayerNorm`.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Reference: Wu & He 2018, https://arxiv.org/abs/1803.08494.
    """

    _compute = staticmethod(_compute_group_norm)


class InstanceNorm(_FeatureNorm, nnx.InstanceNorm):
    """Instance normalization with every argument and variable of `flax.nnx.InstanceNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.instance_norm` computes it,
    with `mean` and `var` over all axes but the first and the feature axes. Arguments and errors are
    as in `LayerNorm`.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.InstanceNorm(2, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[[1.0, 10.0], [3.0, 30.0]]])).round(3).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]

    Reference: Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022.
    """

    _compute = staticmethod(compute_instance_norm)
