"""Residual networks for small images and for ImageNet."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bn_jax.lab.models.blocks import BasicBlock, Bottleneck
from bn_jax.lab.models.branches import BranchInit, classify, shift
from bn_jax.lab.models.layers import ConvNorm, Norm, Padding, apply_norm, conv_padding
from bn_jax.linen import BatchNorm

__all__ = ["ResNet", "ResNet18", "ResNet34", "ResNet50", "ResNet101", "ResNet152"]


class ResNet(nn.Module):
    """A residual network (He et al. 2016).

    It has a stem, stages of blocks, the mean over positions, and a linear classifier. Every stage
    after the first halves the image. `ResNet18`, `ResNet34`, `ResNet50`, `ResNet101` and
    `ResNet152` are the networks for ImageNet, version 1.5, with batch norm unless `norm` is given.

    Attributes:
        num_classes: number of logits.
        stage_sizes: blocks in each stage.
        widths: channels of each stage.
        block: constructor of a block: `BasicBlock`, `Bottleneck`, `PreActivationBlock`, or without
            shortcuts `PlainBlock` or `DepthwiseBlock`.
        norm: constructor of the norms of Flax or bn_jax, e.g.
            `functools.partial(bn_jax.linen.BatchNorm, momentum=0.9)` or `flax.linen.LayerNorm`.
            None: convolutions with biases and without norm.
        stem: "3x3", a convolution that keeps the size of small images; or "7x7", a convolution that
            halves it, before a maximum over 3x3 positions halves it again.
        dtype: of the computation. None: that to which images and parameters promote. Parameters
            and logits are in at least float32.
        padding: of the convolutions and the maximum: "SAME", or "symmetric" as in PyTorch, which
            its weights need (see `ConvNorm`). The 7x7 convolution is always padded symmetrically.
        pre_activation: whether the blocks begin with their norm, as `PreActivationBlock` does. Then
            the last block is followed by a norm, and the stem is not.
        branch_init: how the residual branches of a network without norm are initialized: "plain",
            "skipinit" or "fixup" (see `ResidualBlock`). With Fixup the classifier starts at zero;
            the stem and the classifier keep their biases.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bn_jax.lab import models
        >>> model, images = models.ResNet18(1000), jnp.zeros((1, 64, 64, 3))
        >>> shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        11689512

    Reference: He et al. 2016, "Deep Residual Learning for Image Recognition",
    https://arxiv.org/abs/1512.03385. For SkipInit: De & Smith 2020, "Batch Normalization Biases
    Residual Blocks Towards the Identity Function in Deep Networks",
    https://arxiv.org/abs/2002.10444. For Fixup, see `fixup_normal`.
    """

    num_classes: int
    stage_sizes: Sequence[int] = (1, 1, 1)
    widths: Sequence[int] = (16, 32, 64)
    block: Callable[..., Any] = BasicBlock
    norm: Norm | None = None
    stem: Literal["3x3", "7x7"] = "3x3"
    dtype: DTypeLike | None = None
    padding: Padding = "SAME"
    pre_activation: bool = False
    branch_init: BranchInit = "plain"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Computes the logits.

        Args:
            x: images [N, H, W, C].
            train: whether to normalize by the batch's statistics and update the running ones.
            mask: booleans or weights [N]: which examples enter the statistics. None: all.

        Returns:
            Logits [N, num_classes].

        Raises:
            ValueError: `stage_sizes` and `widths` differ in length, `stem` is unknown, or
                `branch_init` does not fit `block` or `norm`.
        """
        if len(self.stage_sizes) != len(self.widths):
            raise ValueError(
                f"widths has {len(self.widths)} entries, expected {len(self.stage_sizes)}, one "
                f"for each of stage_sizes = {tuple(self.stage_sizes)}"
            )
        if mask is not None:
            mask = jnp.asarray(mask)[:, None, None, None]
        x = self._stem(x, train, mask)
        make_block = _block_constructor(self)
        for stage, (blocks, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True)):
            for index in range(blocks):
                strides = (2, 2) if stage > 0 and index == 0 else (1, 1)
                block = make_block(width, strides, name=f"stage{stage}_block{index}")
                x = block(x, train, mask)
        if self.pre_activation:
            x = apply_norm(self.norm, x, train, mask, self.dtype)
            x = nn.relu(shift(self.branch_init, x, self.dtype))
        features = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return classify(self.branch_init, features, self.num_classes)

    def _stem(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        activation = (lambda y: y) if self.pre_activation else nn.relu
        conv_norm = partial(
            ConvNorm,
            self.widths[0],
            norm=None if self.pre_activation else self.norm,
            use_bias=self.norm is None,
            dtype=self.dtype,
            name="stem",
        )
        if self.stem == "3x3":
            return activation(conv_norm(padding=self.padding)(x, train, mask))
        if self.stem == "7x7":
            halving = conv_norm((7, 7), (2, 2), padding="symmetric")
            padding = conv_padding(self.padding, (3, 3))
            return nn.max_pool(
                activation(halving(x, train, mask)), (3, 3), strides=(2, 2), padding=padding
            )
        raise ValueError(f"stem={self.stem!r}, expected '3x3' or '7x7'")


def _block_constructor(model: ResNet) -> Callable[..., Any]:
    constructor = partial(model.block, norm=model.norm, dtype=model.dtype, padding=model.padding)
    if model.branch_init == "plain":
        return constructor
    if "branch_init" not in inspect.signature(model.block).parameters:
        raise ValueError(
            f"branch_init={model.branch_init!r} starts residual branches, but "
            f"block={model.block} has none: pass a block with a shortcut such as "
            "bn_jax.lab.models.BasicBlock, or branch_init='plain'."
        )
    return partial(constructor, branch_init=model.branch_init, depth=sum(model.stage_sizes))


_ImageNet = partial(
    ResNet, widths=(64, 128, 256, 512), norm=partial(BatchNorm, momentum=0.9), stem="7x7"
)
ResNet18 = partial(_ImageNet, stage_sizes=(2, 2, 2, 2))
"""ResNet-18 for ImageNet: `ResNet` with 2, 2, 2 and 2 of `BasicBlock`."""
ResNet34 = partial(_ImageNet, stage_sizes=(3, 4, 6, 3))
"""ResNet-34 for ImageNet: `ResNet` with 3, 4, 6 and 3 of `BasicBlock`."""
ResNet50 = partial(_ImageNet, stage_sizes=(3, 4, 6, 3), block=Bottleneck)
"""ResNet-50 for ImageNet: `ResNet` with 3, 4, 6 and 3 of `Bottleneck`."""
ResNet101 = partial(_ImageNet, stage_sizes=(3, 4, 23, 3), block=Bottleneck)
"""ResNet-101 for ImageNet: `ResNet` with 3, 4, 23 and 3 of `Bottleneck`."""
ResNet152 = partial(_ImageNet, stage_sizes=(3, 8, 36, 3), block=Bottleneck)
"""ResNet-152 for ImageNet: `ResNet` with 3, 8, 36 and 3 of `Bottleneck`."""
