"""Residual networks in Flax Linen, for small images and for ImageNet, with any norm or none."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bn_jax.linen import BatchNorm

Norm = Callable[..., nn.Module]


class ConvNorm(nn.Module):
    """A convolution followed by a norm; without a norm, the convolution has a bias.

    Attributes:
        features: output channels.
        kernel_size: height and width of the kernel.
        strides: strides along height and width.
        norm: constructor of the norm, or None. A norm with an attribute `use_running_average` takes
            its statistics from the batch; it is given the mask, and whether to train unless that
            attribute says so. Any other norm is applied to the convolution's result alone.
        norm_scale_init: initializer of the norm's scale.
        dtype: of the computation and the result; None for that of input and parameters promoted.
        padding: of the convolution.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    norm: Norm | None = None
    norm_scale_init: jax.nn.initializers.Initializer = nn.initializers.ones
    dtype: Any = None
    padding: str | Sequence[tuple[int, int]] = "SAME"

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
            self.padding,
            use_bias=self.norm is None,
            dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(),
            name="conv",
        )(x)
        if self.norm is None:
            return x
        attributes = {} if self.dtype is None else {"dtype": self.dtype}
        norm: Any = self.norm(scale_init=self.norm_scale_init, name="norm", **attributes)
        options: dict[str, Any] = {}
        if hasattr(norm, "use_running_average"):
            options["mask"] = mask
            if norm.use_running_average is None:
                options["use_running_average"] = not train
        y: jax.Array = norm(x, **options)
        return y


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 2).

    The last norm's scale starts at zero, so that the block starts as its shortcut.

    Attributes:
        features: output channels.
        strides: strides of the first convolution and of the shortcut.
        norm: constructor of the norms, or None.
        dtype: see `ConvNorm`.
    """

    features: int
    strides: tuple[int, int] = (1, 1)
    norm: Norm | None = None
    dtype: Any = None

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
        conv_norm = partial(ConvNorm, norm=self.norm, dtype=self.dtype)
        y = nn.relu(conv_norm(self.features, strides=self.strides)(x, train, mask))
        y = conv_norm(self.features, norm_scale_init=nn.initializers.zeros)(y, train, mask)
        if x.shape != y.shape:
            shortcut = conv_norm(self.features, (1, 1), self.strides, name="shortcut")
            x = shortcut(x, train, mask)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al. 2016, figure 5).

    Of version 1.5: the strides are those of the 3x3 convolution (version 1 has them in the first).
    The last norm's scale starts at zero, so that the block starts as its shortcut.

    Attributes:
        features: channels of the 3x3 convolution, a quarter of the output's.
        strides: strides of the 3x3 convolution and of the shortcut.
        norm: constructor of the norms, or None.
        dtype: see `ConvNorm`.
    """

    features: int
    strides: tuple[int, int] = (1, 1)
    norm: Norm | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block.

        Args:
            x: [N, H, W, C].
            train: see `ConvNorm`.
            mask: see `ConvNorm`.

        Returns:
            [N, H', W', 4 * features].
        """
        conv_norm = partial(ConvNorm, norm=self.norm, dtype=self.dtype)
        y = nn.relu(conv_norm(self.features, (1, 1))(x, train, mask))
        y = nn.relu(conv_norm(self.features, strides=self.strides)(y, train, mask))
        last = conv_norm(4 * self.features, (1, 1), norm_scale_init=nn.initializers.zeros)
        y = last(y, train, mask)
        if x.shape != y.shape:
            shortcut = conv_norm(4 * self.features, (1, 1), self.strides, name="shortcut")
            x = shortcut(x, train, mask)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network (He et al. 2016).

    A stem, stages of blocks of which each after the first halves the image, the mean over
    positions, and a linear classifier. `ResNet18`, `ResNet34`, `ResNet50`, `ResNet101` and
    `ResNet152` are those for ImageNet, version 1.5, with batch norm unless `norm` is given.

    Attributes:
        num_classes: number of logits.
        stage_sizes: blocks in each stage.
        widths: channels of each stage.
        block: constructor of a block, `BasicBlock` or `Bottleneck`.
        norm: constructor of the norms, any of Flax's or ours, e.g.
            `functools.partial(bn_jax.linen.BatchNorm, momentum=0.9)` or `flax.linen.LayerNorm`; or
            None: convolutions with biases and no norm.
        stem: "3x3", a convolution that keeps the size of small images, or "7x7", one that halves
            it before a maximum over 3x3 positions halves it again.
        dtype: of the computation; None for that of images and parameters promoted. Parameters and
            logits are in at least float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bn_jax import models
        >>> model, images = models.ResNet18(1000), jnp.zeros((1, 64, 64, 3))
        >>> shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        11689512

    Reference: He et al. 2016, "Deep Residual Learning for Image Recognition",
    https://arxiv.org/abs/1512.03385.
    """

    num_classes: int
    stage_sizes: Sequence[int] = (1, 1, 1)
    widths: Sequence[int] = (16, 32, 64)
    block: Callable[..., Any] = BasicBlock
    norm: Norm | None = None
    stem: Literal["3x3", "7x7"] = "3x3"
    dtype: Any = None

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
            ValueError: `stage_sizes` and `widths` differ in length, or `stem` is none of the two.
        """
        if len(self.stage_sizes) != len(self.widths):
            raise ValueError(
                f"widths has {len(self.widths)} entries, expected {len(self.stage_sizes)}, one "
                f"for each of stage_sizes = {tuple(self.stage_sizes)}"
            )
        if mask is not None:
            mask = mask[:, None, None, None]
        x = self._stem(x, train, mask)
        for stage, (blocks, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True)):
            for index in range(blocks):
                strides = (2, 2) if stage > 0 and index == 0 else (1, 1)
                name = f"stage{stage}_block{index}"
                block = self.block(width, strides, self.norm, self.dtype, name=name)
                x = block(x, train, mask)
        features = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return nn.Dense(self.num_classes, name="classifier")(features)

    def _stem(self, x: jax.Array, train: bool, mask: jax.Array | None) -> jax.Array:
        conv_norm = partial(ConvNorm, self.widths[0], norm=self.norm, dtype=self.dtype, name="stem")
        if self.stem == "3x3":
            return nn.relu(conv_norm()(x, train, mask))
        if self.stem == "7x7":
            halving = conv_norm((7, 7), (2, 2), padding=((3, 3), (3, 3)))
            x = nn.relu(halving(x, train, mask))
            return nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        raise ValueError(f"stem={self.stem!r}, expected '3x3' or '7x7'")


_ImageNet = partial(
    ResNet, widths=(64, 128, 256, 512), norm=partial(BatchNorm, momentum=0.9), stem="7x7"
)
ResNet18 = partial(_ImageNet, stage_sizes=(2, 2, 2, 2))
ResNet34 = partial(_ImageNet, stage_sizes=(3, 4, 6, 3))
ResNet50 = partial(_ImageNet, stage_sizes=(3, 4, 6, 3), block=Bottleneck)
ResNet101 = partial(_ImageNet, stage_sizes=(3, 4, 23, 3), block=Bottleneck)
ResNet152 = partial(_ImageNet, stage_sizes=(3, 8, 36, 3), block=Bottleneck)
