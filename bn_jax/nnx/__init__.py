"""Flax NNX modules."""

from bn_jax.nnx.running import (
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
