"""Batch normalization for JAX and Flax: right where others are wrong, over a norm's whole life."""

from bn_jax import convert, linen, nnx, optim
from bn_jax._audit.findings import Audit, Finding, audit
from bn_jax._core.batch_norm import (
    BatchStats,
    Measured,
    batch_norm,
    identity_params,
    init_batch_stats,
    init_params,
    normalize_by_batch,
    update_batch_stats,
)
from bn_jax._core.batch_renorm import batch_renorm
from bn_jax._core.feature_norms import group_norm, instance_norm, layer_norm, rms_norm
from bn_jax._core.moments import Moments, merge_moments, moments
from bn_jax._core.standardize import Params
from bn_jax._core.whitening import WhiteningStats, init_whitening_stats, whitening_norm
from bn_jax._fold import FoldedNorm, absorb_scale, as_affine, fold
from bn_jax._recalibrate import LayerChange, Recalibration, recalibrate
from bn_jax.remat import remat_policy

__all__ = [
    "Audit",
    "BatchStats",
    "Finding",
    "FoldedNorm",
    "LayerChange",
    "Measured",
    "Moments",
    "Params",
    "Recalibration",
    "WhiteningStats",
    "absorb_scale",
    "as_affine",
    "audit",
    "batch_norm",
    "batch_renorm",
    "convert",
    "fold",
    "group_norm",
    "identity_params",
    "init_batch_stats",
    "init_params",
    "init_whitening_stats",
    "instance_norm",
    "layer_norm",
    "linen",
    "merge_moments",
    "moments",
    "nnx",
    "normalize_by_batch",
    "optim",
    "recalibrate",
    "remat_policy",
    "rms_norm",
    "update_batch_stats",
    "whitening_norm",
]
