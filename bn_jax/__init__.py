"""Batch normalization for JAX and Flax: right where others are wrong, over a norm's whole life."""

from bn_jax import linen, nnx, optim
from bn_jax.batch_norm import (
    BatchStats,
    Params,
    batch_norm,
    init_batch_stats,
    init_params,
    normalize_by_batch,
    update_batch_stats,
)
from bn_jax.moments import Moments, merge_moments, moments

__all__ = [
    "BatchStats",
    "Moments",
    "Params",
    "batch_norm",
    "init_batch_stats",
    "init_params",
    "linen",
    "merge_moments",
    "moments",
    "nnx",
    "normalize_by_batch",
    "optim",
    "update_batch_stats",
]
