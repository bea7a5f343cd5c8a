"""Small real models in Flax Linen."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Norm = Callable[..., nn.Module]


class ConvNorm(nn.Module):
    """A convolution followed by a norm; without a norm, the convolution has a bias.

    Attributes:
        features: output channels.
        kernel_size: height and width of the kernel.
        strides: strides along height and width.
        norm: constructor of the norm, or None.
        norm_scale_init: initializer of the norm's scale.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    norm: Norm | None = None
    norm_scale_init: jax.nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Convolves and normalizes.

        Args:
            x: [N, H, W, C].
            train: whether to normalize by the batch's statistics and update the running ones.
            mask: broadcastable to the output; what enters the statistics.

        Returns:
            [N, H', W', features].
        """
        x = nn.Conv(
            self.features,
            self.kernel_size,
            self.strides,
            use_bias=self.norm is None,
            kernel_init=nn.initializers.he_normal(),
            name="conv",
        )(x)
        if self.norm is None:
            return x
        norm = self.norm(scale_init=self.norm_scale_init, name="norm")
        y: jax.Array = norm(x, use_running_average=not train, mask=mask)
        return y


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 2).

    The last norm's scale starts at zero, so that the block starts as its shortcut.

    Attributes:
        features: output channels.
        strides: strides of the first convolution and of the shortcut.
        norm: constructor of the norms, or None.
    """

    features: int
    strides: tuple[int, int] = (1, 1)
    norm: Norm | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block.

        Args:
            x: [N, H, W, C].
            train: see `ConvNorm`.
            mask: see `ConvNorm`.

        Returns:
            [N, H', W', features].
        """
        y = ConvNorm(self.features, strides=self.strides, norm=self.norm)(x, train, mask)
        y = ConvNorm(self.features, norm=self.norm, norm_scale_init=nn.initializers.zeros)(
            nn.relu(y), train, mask
        )
        if x.shape != y.shape:
            x = ConvNorm(self.features, (1, 1), self.strides, self.norm, name="shortcut")(
                x, train, mask
            )
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network for small images (He et al. 2016).

    A 3x3 stem, stages of blocks of which each after the first halves the image, the mean over
    positions, and a linear classifier.

    Attributes:
        num_classes: number of logits.
        stage_sizes: blocks in each stage.
        widths: channels of each stage.
        block: constructor of a block.
        norm: constructor of the norms, e.g. `functools.partial(bn_jax.linen.BatchNorm,
            momentum=0.9)`, or None: convolutions with biases and no norm.
    """

    num_classes: int
    stage_sizes: Sequence[int] = (1, 1, 1)
    widths: Sequence[int] = (16, 32, 64)
    block: Callable[..., Any] = BasicBlock
    norm: Norm | None = None

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
            ValueError: `stage_sizes` and `widths` differ in length.
        """
        if len(self.stage_sizes) != len(self.widths):
            raise ValueError(
                f"widths has {len(self.widths)} entries, expected {len(self.stage_sizes)}, one "
                f"for each of stage_sizes = {tuple(self.stage_sizes)}"
            )
        if mask is not None:
            mask = mask[:, None, None, None]
        x = nn.relu(ConvNorm(self.widths[0], norm=self.norm, name="stem")(x, train, mask))
        for stage, (blocks, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True)):
            for index in range(blocks):
                strides = (2, 2) if stage > 0 and index == 0 else (1, 1)
                x = self.block(width, strides, self.norm, name=f"stage{stage}_block{index}")(
                    x, train, mask
                )
        return nn.Dense(self.num_classes, name="classifier")(jnp.mean(x, axis=(1, 2)))
