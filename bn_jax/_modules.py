"""What Linen and NNX modules share: the norms without state, and the domain of a whole batch."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bn_jax._core.checks import Inputs
from bn_jax._core.domain_batch_norm import Mixture, check_domain_inputs
from bn_jax._core.feature_norms import normalize_groups, normalize_instances, normalize_rows
from bn_jax._core.types import BatchStats, Mode, Options, Params


def domain_inputs(
    mode: Mode,
    options: Options,
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    domain: Any,
    mask: jax.Array | None,
    residual: jax.Array | None,
) -> tuple[Inputs, Mixture | None]:
    """Returns what `check_domain_inputs` does, or less where one domain evaluates alone.

    If a known domain is that of the whole batch, and nothing updates, the inputs are those of a
    plain batch norm with the rows of this domain: nothing is spread over examples, and `fold` finds
    an affine function of each feature.
    """
    inputs, mixture = check_domain_inputs(options, params, batch_stats, x, domain, mask, residual)
    is_one = mixture is None and jnp.ndim(domain) == 0
    if not is_one or isinstance(domain, jax.core.Tracer) or mode.update:
        return inputs, mixture
    if not mode.use_running_average or not getattr(domain, "is_fully_addressable", True):
        return inputs, mixture
    rank, index = len(inputs.feature_axes), int(domain)
    row = partial(jax.tree.map, lambda leaf: leaf[index] if jnp.ndim(leaf) > rank else leaf)
    rows = {"params": row(inputs.params), "batch_stats": row(inputs.batch_stats)}
    return replace(inputs, domains=None, **rows), None


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
