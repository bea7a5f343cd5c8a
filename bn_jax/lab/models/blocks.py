"""The blocks of residual networks, and two without shortcuts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from bn_jax.lab.models.branches import BranchInit, branch_kernels, scale_branch, shift
from bn_jax.lab.models.layers import ConvNorm, Norm, Padding, apply_norm

__all__ = [
    "BasicBlock",
    "Block",
    "Bottleneck",
    "DepthwiseBlock",
    "PlainBlock",
    "PreActivationBlock",
    "ResidualBlock",
]


class Block(nn.Module):
    """The base of the blocks of a `ResNet`.

    Attributes:
        features: output channels; of a `Bottleneck`, a quarter of them.
        strides: of the first convolution over more than one position, and of the shortcut.
        norm: constructor of the norms, or None.
        dtype: see `ConvNorm`.
        padding: see `ConvNorm`.
    """

    features: int
    strides: tuple[int, int] = (1, 1)
    norm: Norm | None = None
    dtype: DTypeLike | None = None
    padding: Padding = "SAME"

    def conv_norm(
        self, features: int, kernel_size: tuple[int, int] = (3, 3), **attributes: Any
    ) -> ConvNorm:
        """Makes a convolution and its norm with the attributes of the block.

        Args:
            features: output channels.
            kernel_size: height and width of the kernel.
            **attributes: other attributes of `ConvNorm`.

        Returns:
            The module, a child of this module.
        """
        attributes.setdefault("norm", self.norm)
        return ConvNorm(features, kernel_size, dtype=self.dtype, padding=self.padding, **attributes)


class PlainBlock(Block):
    """Two 3x3 convolutions in a row (Simonyan & Zisserman 2015)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, H, W, C]; for arguments and result, see `ConvNorm`."""
        x = nn.relu(self.conv_norm(self.features, strides=self.strides)(x, train, mask))
        return nn.relu(self.conv_norm(self.features)(x, train, mask))


class DepthwiseBlock(Block):
    """A 3x3 convolution of each channel, then a 1x1 convolution (Howard et al. 2017)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, H, W, C]; for arguments and result, see `ConvNorm`."""
        channels = x.shape[-1]
        depthwise = self.conv_norm(channels, strides=self.strides, feature_group_count=channels)
        x = nn.relu(depthwise(x, train, mask))
        return nn.relu(self.conv_norm(self.features, (1, 1))(x, train, mask))


class ResidualBlock(Block):
    """The base of blocks with a shortcut, which is added to a residual branch.

    Attributes:
        branch_init: how the branch is initialized. "plain": by He's initialization. "skipinit": the
            same, times a learned scalar that starts at zero (De & Smith 2020). "fixup": by
            `fixup_normal`, with a last kernel of zeros, a learned scalar added before every
            convolution and activation instead of biases of channels, and a learned scalar that
            multiplies the result (Zhang et al. 2019). SkipInit and Fixup require ``norm=None``.
        depth: blocks in the network, for Fixup.
    """

    branch_init: BranchInit = "plain"
    depth: int = 1

    def conv_norm(
        self, features: int, kernel_size: tuple[int, int] = (3, 3), **attributes: Any
    ) -> ConvNorm:
        """Makes a convolution and its norm; see `Block`."""
        if self.branch_init == "fixup":
            attributes["use_bias"] = False
        return super().conv_norm(features, kernel_size, **attributes)

    def activate(self, x: jax.Array) -> jax.Array:
        """Applies ReLU to `x`, plus Fixup's scalar."""
        return nn.relu(shift(self.branch_init, x, self.dtype))

    def branch(
        self,
        x: jax.Array,
        layers: Sequence[Callable[..., ConvNorm]],
        train: bool,
        mask: jax.Array | None,
    ) -> jax.Array:
        """Applies the residual branch: convolutions, with ReLU between them.

        Args:
            x: the input of the first convolution.
            layers: constructors of the convolutions and their norms. The scale of the last norm
                starts at zero.
            train: see `ConvNorm`.
            mask: see `ConvNorm`.

        Returns:
            The array to add to the shortcut.
        """
        kernels = branch_kernels(self.branch_init, self.norm, self.depth, len(layers))
        last = len(layers) - 1
        for number, (layer, kernel_init) in enumerate(zip(layers, kernels, strict=True)):
            if number > 0:
                x = self.activate(x)
            scale_init = nn.initializers.zeros if number == last else None
            conv_norm = layer(kernel_init=kernel_init, norm_scale_init=scale_init)
            x = conv_norm(shift(self.branch_init, x, self.dtype), train, mask)
        return scale_branch(self.branch_init, x, self.dtype)

    def add_shortcut(
        self,
        x: jax.Array,
        y: jax.Array,
        train: bool,
        mask: jax.Array | None,
        conv_input: jax.Array | None = None,
        **attributes: Any,
    ) -> jax.Array:
        """Adds the shortcut to the residual branch.

        Args:
            x: the input of the block.
            y: the output of `branch`.
            train: see `ConvNorm`.
            mask: see `ConvNorm`.
            conv_input: the input of the shortcut's convolution. None: `x`.
            **attributes: of that convolution.

        Returns:
            The sum. The shortcut is `x`, or a convolution and its norm if strides or channels
            change, whatever the image.
        """
        if tuple(self.strides) != (1, 1) or x.shape[-1] != y.shape[-1]:
            conv_norm = self.conv_norm(
                y.shape[-1], (1, 1), strides=self.strides, name="shortcut", **attributes
            )
            conv_input = x if conv_input is None else conv_input
            x = conv_norm(shift(self.branch_init, conv_input, self.dtype), train, mask)
        return x + y


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 2).

    The last norm's scale starts at zero, so that the block starts as its shortcut.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, H, W, C]; for arguments and result, see `ConvNorm`."""
        layers = [
            partial(self.conv_norm, self.features, strides=self.strides),
            partial(self.conv_norm, self.features),
        ]
        y = self.branch(x, layers, train, mask)
        return self.activate(self.add_shortcut(x, y, train, mask))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al. 2016, figure 5).

    This is version 1.5: the 3x3 convolution has the strides (in version 1, the first one has them).
    The last norm's scale starts at zero, so that the block starts as its shortcut.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, H, W, C]; for arguments and result, see `ConvNorm`."""
        layers = [
            partial(self.conv_norm, self.features, (1, 1)),
            partial(self.conv_norm, self.features, strides=self.strides),
            partial(self.conv_norm, 4 * self.features, (1, 1)),
        ]
        y = self.branch(x, layers, train, mask)
        return self.activate(self.add_shortcut(x, y, train, mask))


class PreActivationBlock(ResidualBlock):
    """Norm, ReLU and a 3x3 convolution, twice, beside a shortcut (He et al. 2016b, figure 4e).

    The output of a block is a sum without norm and ReLU. They follow the last block of a `ResNet`
    with `pre_activation`.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, H, W, C]; for arguments and result, see `ConvNorm`."""
        activated = self.activate(apply_norm(self.norm, x, train, mask, self.dtype))
        use_bias = self.norm is None
        layers = [
            partial(self.conv_norm, self.features, strides=self.strides),
            partial(self.conv_norm, self.features, norm=None, use_bias=use_bias),
        ]
        y = self.branch(activated, layers, train, mask)
        return self.add_shortcut(
            x, y, train, mask, conv_input=activated, norm=None, use_bias=use_bias
        )
