"""Networks in Flax Linen, for small images and for ImageNet, with any norm or none.

A norm keeps the residual branches small beside the shortcuts, the more so the deeper the network.
Without a norm, SkipInit and Fixup start the branches at zero, which suffices to train deep
networks.
"""

from bn_jax.lab.models.blocks import (
    BasicBlock,
    Block,
    Bottleneck,
    DepthwiseBlock,
    PlainBlock,
    PreActivationBlock,
    ResidualBlock,
)
from bn_jax.lab.models.branches import BranchInit, Scalar, fixup_normal
from bn_jax.lab.models.layers import ConvNorm, Norm, Padding, apply_norm
from bn_jax.lab.models.mlps import MLP, DenseBlock, ResidualMLP
from bn_jax.lab.models.resnets import ResNet, ResNet18, ResNet34, ResNet50, ResNet101, ResNet152

__all__ = [
    "MLP",
    "BasicBlock",
    "Block",
    "Bottleneck",
    "BranchInit",
    "ConvNorm",
    "DenseBlock",
    "DepthwiseBlock",
    "Norm",
    "Padding",
    "PlainBlock",
    "PreActivationBlock",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "ResNet101",
    "ResNet152",
    "ResidualBlock",
    "ResidualMLP",
    "Scalar",
    "apply_norm",
    "fixup_normal",
]
