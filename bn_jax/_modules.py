"""What Linen and NNX modules share: the norms without state, and checks of arguments."""

import operator
from typing import Any

import jax
from jax.typing import DTypeLike

from bn_jax._core.feature_norms import normalize_groups, normalize_instances, normalize_rows
from bn_jax._core.types import Options, Params


def number_of_domains(num_domains: Any) -> int:
    """Returns how many domains norms are split into."""
    number = operator.index(num_domains)
    if number < 1:
        raise ValueError(f"num_domains={num_domains}; expected an integer of at least 1.")
    return number


def feature_options(layer: Any, dtype: DTypeLike | None) -> Options:
    """Returns the configuration of a norm without running statistics, ours or Flax's."""
    return Options.of_module(layer, axis=getattr(layer, "feature_axes", -1), dtype=dtype)


def compute_layer_norm(
    layer: Any, params: Params, x: jax.Array, mask: jax.Array | None, dtype: DTypeLike | None
) -> jax.Array:
    """Computes `bn_jax.layer_norm` by the attributes of a layer, ours or Flax's."""
    options = feature_options(layer, dtype)
    return normalize_rows(options, params, x, mask, layer.reduction_axes)


def compute_rms_norm(
    layer: Any, params: Params, x: jax.Array, mask: jax.Array | None, dtype: DTypeLike | None
) -> jax.Array:
    """Computes `bn_jax.rms_norm` by the attributes of a layer, ours or Flax's."""
    options = feature_options(layer, dtype)
    return normalize_rows(options, params, x, mask, layer.reduction_axes, about_zero=True)


def compute_group_norm(
    layer: Any, params: Params, x: jax.Array, mask: jax.Array | None, dtype: DTypeLike | None
) -> jax.Array:
    """Computes `bn_jax.group_norm` by the attributes of a Linen layer, ours or Flax's."""
    options, axes = feature_options(layer, dtype), layer.reduction_axes
    return normalize_groups(options, params, x, mask, layer.num_groups, layer.group_size, axes)


def compute_instance_norm(
    layer: Any, params: Params, x: jax.Array, mask: jax.Array | None, dtype: DTypeLike | None
) -> jax.Array:
    """Computes `bn_jax.instance_norm` by the attributes of a layer, ours or Flax's."""
    return normalize_instances(feature_options(layer, dtype), params, x, mask)
