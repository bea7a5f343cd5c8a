"""Flax Linen modules."""

from bn_jax.linen.running import (
    BatchNorm,
    BatchRenorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
    WhiteningNorm,
    freeze,
    replace_norms,
    unfreeze,
)

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "WhiteningNorm",
    "freeze",
    "replace_norms",
    "unfreeze",
]
