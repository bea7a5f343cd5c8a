"""Flax Linen modules without running statistics: parameters and attributes, no arithmetic."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from bn_jax._core.checks import as_floating, features_of
from bn_jax._modules import (
    compute_group_norm,
    compute_instance_norm,
    compute_layer_norm,
    compute_rms_norm,
)
from bn_jax.linen.running import make_params


def call_feature_norm(
    compute: Callable[..., jax.Array], layer: Any, x: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """Runs the call of a layer, ours or Flax's, by the function that computes it."""
    x = as_floating("x", x)
    features = features_of("feature_axes", getattr(layer, "feature_axes", -1), x)
    return compute(layer, make_params(layer, features), x, mask, layer.dtype)


class _FeatureNorm(nn.Module):
    """The call of the norms without running statistics; `_compute` is what computes it."""

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array that holds the features on `feature_axes`; of
                `GroupNorm` on the last axis.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return call_feature_norm(type(self)._compute, self, x, mask=mask)  # type: ignore[attr-defined]


class LayerNorm(_FeatureNorm, nn.LayerNorm):
    """Layer normalization with every attribute, default and parameter of `flax.linen.LayerNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.layer_norm` computes it,
    with `mean` and `var` over `reduction_axes`. ``scale`` and ``bias`` are of the sizes of
    `feature_axes`, in `param_dtype`. A checkpoint of Flax's layer loads into this one and the other
    way round.

    Attributes that mean less than in Flax: `use_fast_variance`, where False guards the variance of
    bfloat16 input against cancellation (other input is always guarded; see `bn_jax.moments`), and
    `force_float32_reductions`, because statistics are always computed in at least float32.
    `axis_name`, which the features may be spread over, changes nothing where nothing binds it.

    Raises:
        ValueError: as in `bn_jax.layer_norm`.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> y, _ = bn.linen.LayerNorm().init_with_output(jax.random.key(0), jnp.array([[1.0, 3.0]]))
        >>> y.round(3).tolist()
        [[-1.0, 1.0]]

    Reference: Ba et al. 2016, https://arxiv.org/abs/1607.06450.
    """

    _compute = staticmethod(compute_layer_norm)


class RMSNorm(_FeatureNorm, nn.RMSNorm):
    """Root mean square normalization as `flax.linen.RMSNorm` has it.

    ``y = x * rsqrt(mean(|x|**2) + epsilon) * scale``, as `bn_jax.rms_norm` computes it. Attributes
    and errors are as in `LayerNorm`, but there is no bias, and `use_fast_variance` changes nothing:
    no mean is subtracted.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> y, _ = bn.linen.RMSNorm().init_with_output(jax.random.key(0), jnp.array([[3.0, -3.0]]))
        >>> y.round(3).tolist()
        [[1.0, -1.0]]

    Reference: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """

    _compute = staticmethod(compute_rms_norm)


class GroupNorm(_FeatureNorm, nn.GroupNorm):
    """Group normalization with every attribute and parameter of `flax.linen.GroupNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.group_norm` computes it,
    with `mean` and `var` over each group of features. One of `num_groups` and `group_size` is
    None. The other attributes, and the errors, are as in `LayerNorm`.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> layer = bn.linen.GroupNorm(num_groups=2)
        >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
        >>> layer.init_with_output(jax.random.key(0), x)[0].round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    Reference: Wu & He 2018, https://arxiv.org/abs/1803.08494.
    """

    _compute = staticmethod(compute_group_norm)


class InstanceNorm(_FeatureNorm, nn.InstanceNorm):
    """Instance normalization with every attribute and parameter of `flax.linen.InstanceNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.instance_norm` computes it,
    with `mean` and `var` over all axes but the first and the feature axes. Attributes and
    errors are as in `LayerNorm`.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> x = jnp.array([[[1.0, 10.0], [3.0, 30.0]]])
        >>> y, _ = bn.linen.InstanceNorm().init_with_output(jax.random.key(0), x)
        >>> y.round(3).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]

    Reference: Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022.
    """

    _compute = staticmethod(compute_instance_norm)
