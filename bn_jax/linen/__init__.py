"""Flax Linen modules, and functions that patch Linen models from outside."""

from bn_jax.linen.domains import DomainBatchNorm, select_domain, split_batch_norms
from bn_jax.linen.patching import freeze, replace_norms, unfreeze
from bn_jax.linen.running import BatchNorm, BatchRenorm, WhiteningNorm
from bn_jax.linen.stateless import GroupNorm, InstanceNorm, LayerNorm, RMSNorm

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
