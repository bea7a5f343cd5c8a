"""Flax NNX modules, and functions that patch NNX models from outside."""

from bn_jax.nnx.domains import DomainBatchNorm, select_domain, split_batch_norms
from bn_jax.nnx.patching import freeze, replace_norms, unfreeze
from bn_jax.nnx.running import BatchNorm, BatchRenorm, WhiteningNorm
from bn_jax.nnx.stateless import GroupNorm, InstanceNorm, LayerNorm, RMSNorm

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "DomainBatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "WhiteningNorm",
    "freeze",
    "replace_norms",
    "select_domain",
    "split_batch_norms",
    "unfreeze",
]
