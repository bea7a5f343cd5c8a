"""Residual networks in Flax Linen, for small images and for ImageNet, with any norm or none."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bn_jax.linen import BatchNorm

Norm = Callable[..., nn.Module]
Padding = Literal["SAME", "symmetric"]


class ConvNorm(nn.Module):
    """A convolution followed by a norm.

    Attributes:
        features: output channels.
        kernel_size: height and width of the kernel.
        strides: strides along height and width.
        norm: constructor of the norm, or None. A norm with an attribute `use_running_average` takes
            its statistics from the batch; it is given the mask, and whether to train unless that
            attribute says so. Any other norm is applied to the convolution's result alone.
        norm_scale_init: initializer of the norm's scale; None for that of `norm`.
        dtype: of the computation and the result; None for that of input and parameters promoted.
        padding: "SAME", or "symmetric" for as much on either side, as PyTorch pads. They differ
            where strides leave something over.
        feature_group_count: groups of channels that are convolved apart.
        use_bias: whether the convolution has a bias; None: if and only if there is no norm.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    norm: Norm | None = None
    norm_scale_init: jax.nn.initializers.Initializer | None = None
    dtype: Any = None
    padding: Padding = "SAME"
    feature_group_count: int = 1
    use_bias: bool | None = None

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
            _conv_padding(self.padding, self.kernel_size),
            feature_group_count=self.feature_group_count,
            use_bias=self.norm is None if self.use_bias is None else self.use_bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(),
            name="conv",
        )(x)
        of_scale = {} if self.norm_scale_init is None else {"scale_init": self.norm_scale_init}
        return apply_norm(self.norm, x, train, mask, self.dtype, **of_scale)


def _conv_padding(padding: Padding, kernel_size: Sequence[int]) -> str | list[tuple[int, int]]:
    if padding == "SAME":
        return padding
    if padding == "symmetric":
        return [((size - 1) // 2, (size - 1) // 2) for size in kernel_size]
    raise ValueError(f"padding={padding!r}, expected 'SAME' or 'symmetric'")


def apply_norm(
    norm: Norm | None,
    x: jax.Array,
    train: bool,
    mask: jax.Array | None,
    dtype: Any,
    **attributes: Any,
) -> jax.Array:
    """Applies a norm, a child of the enclosing module; `ConvNorm` says how it is called.

    Args:
        norm: its constructor; None: `x` is returned as it is.
        x: what is normalized.
        train: see `ConvNorm`.
        mask: see `ConvNorm`.
        dtype: see `ConvNorm`.
        **attributes: of the norm; its name is "norm" unless given.

    Returns:
        The normalized array.
    """
    if norm is None:
        return x
    if dtype is not None:
        attributes["dtype"] = dtype
    layer: Any = norm(**{"name": "norm", **attributes})
    options: dict[str, Any] = {}
    if hasattr(layer, "use_running_average"):
        options["mask"] = mask
        if layer.use_running_average is None:
            options["use_running_average"] = not train
    y: jax.Array = layer(x, **options)
    return y


class Block(nn.Module):
    """What the blocks of a `ResNet` are made with.

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
    dtype: Any = None
    padding: Padding = "SAME"

    def conv_norm(
        self, features: int, kernel_size: tuple[int, int] = (3, 3), **options: Any
    ) -> ConvNorm:
        """Makes a convolution and its norm as the attributes say.

        Args:
            features: output channels.
            kernel_size: height and width of the kernel.
            **options: other attributes of `ConvNorm`.

        Returns:
            The module, a child of this one.
        """
        common = {"dtype": self.dtype, "padding": self.padding}
        return ConvNorm(features, kernel_size, **{"norm": self.norm, **common, **options})

    def changes_shape(self, x: jax.Array, y: jax.Array) -> bool:
        """Says whether the shortcut needs a convolution: by strides and channels, for any image."""
        return tuple(self.strides) != (1, 1) or x.shape[-1] != y.shape[-1]

    def add_shortcut(
        self, x: jax.Array, y: jax.Array, train: bool, mask: jax.Array | None
    ) -> jax.Array:
        """Adds what came in to what the convolutions made of it.

        Args:
            x: the input of the block.
            y: the output of the convolutions.
            train: see `ConvNorm`.
            mask: see `ConvNorm`.

        Returns:
            The sum; where strides or channels change, `x` goes through a convolution and its norm.
        """
        if self.changes_shape(x, y):
            shortcut = self.conv_norm(y.shape[-1], (1, 1), strides=self.strides, name="shortcut")
            x = shortcut(x, train, mask)
        return x + y


class PlainBlock(Block):
    """Two 3x3 convolutions, one after another (Simonyan & Zisserman 2015)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, H, W, C]; arguments and result as of `ConvNorm`."""
        x = nn.relu(self.conv_norm(self.features, strides=self.strides)(x, train, mask))
        return nn.relu(self.conv_norm(self.features)(x, train, mask))


class DepthwiseBlock(Block):
    """A 3x3 convolution of each channel alone, then a 1x1 convolution (Howard et al. 2017)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, H, W, C]; arguments and result as of `ConvNorm`."""
        channels = x.shape[-1]
        depthwise = self.conv_norm(channels, strides=self.strides, feature_group_count=channels)
        x = nn.relu(depthwise(x, train, mask))
        return nn.relu(self.conv_norm(self.features, (1, 1))(x, train, mask))


class BasicBlock(Block):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 2).

    The last norm's scale starts at zero, so that the block starts as its shortcut.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, H, W, C]; arguments and result as of `ConvNorm`."""
        y = nn.relu(self.conv_norm(self.features, strides=self.strides)(x, train, mask))
        last = self.conv_norm(self.features, norm_scale_init=nn.initializers.zeros)
        return nn.relu(self.add_shortcut(x, last(y, train, mask), train, mask))


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al. 2016, figure 5).

    Of version 1.5: the strides are those of the 3x3 convolution (version 1 has them in the first).
    The last norm's scale starts at zero, so that the block starts as its shortcut.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, H, W, C]; arguments and result as of `ConvNorm`."""
        y = nn.relu(self.conv_norm(self.features, (1, 1))(x, train, mask))
        y = nn.relu(self.conv_norm(self.features, strides=self.strides)(y, train, mask))
        last = self.conv_norm(4 * self.features, (1, 1), norm_scale_init=nn.initializers.zeros)
        return nn.relu(self.add_shortcut(x, last(y, train, mask), train, mask))


class PreActivationBlock(Block):
    """Norm, ReLU and a 3x3 convolution, twice, beside a shortcut (He et al. 2016b, figure 4e).

    What the blocks hand on is a sum without norm and ReLU: `ResNet` has them after its last block
    where `pre_activation` is True.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, H, W, C]; arguments and result as of `ConvNorm`."""
        activated = nn.relu(apply_norm(self.norm, x, train, mask, self.dtype))
        first = self.conv_norm(self.features, strides=self.strides)
        y = nn.relu(first(activated, train, mask))
        bare = partial(self.conv_norm, self.features, norm=None, use_bias=self.norm is None)
        y = bare()(y, train, mask)
        if self.changes_shape(x, y):
            x = bare((1, 1), strides=self.strides, name="shortcut")(activated, train, mask)
        return x + y


class ResNet(nn.Module):
    """A residual network (He et al. 2016).

    A stem, stages of blocks of which each after the first halves the image, the mean over
    positions, and a linear classifier. `ResNet18`, `ResNet34`, `ResNet50`, `ResNet101` and
    `ResNet152` are those for ImageNet, version 1.5, with batch norm unless `norm` is given.

    Attributes:
        num_classes: number of logits.
        stage_sizes: blocks in each stage.
        widths: channels of each stage.
        block: constructor of a block: `BasicBlock`, `Bottleneck`, `PreActivationBlock`, or without
            shortcuts `PlainBlock` or `DepthwiseBlock`.
        norm: constructor of the norms, any of Flax's or ours, e.g.
            `functools.partial(bn_jax.linen.BatchNorm, momentum=0.9)` or `flax.linen.LayerNorm`; or
            None: convolutions with biases and no norm.
        stem: "3x3", a convolution that keeps the size of small images, or "7x7", one that halves
            it before a maximum over 3x3 positions halves it again.
        dtype: of the computation; None for that of images and parameters promoted. Parameters and
            logits are in at least float32.
        padding: of convolutions and the maximum, but for the 7x7 convolution, which is always
            padded symmetrically: "SAME", or "symmetric" as in PyTorch, whose weights need it (see
            `ConvNorm`).
        pre_activation: whether the blocks begin with their norm, as `PreActivationBlock` does: then
            none follows the stem, and one follows the last block.

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
    padding: Padding = "SAME"
    pre_activation: bool = False

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
            mask = jnp.asarray(mask)[:, None, None, None]
        x = self._stem(x, train, mask)
        for stage, (blocks, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True)):
            for index in range(blocks):
                strides = (2, 2) if stage > 0 and index == 0 else (1, 1)
                name = f"stage{stage}_block{index}"
                common = {"norm": self.norm, "dtype": self.dtype, "padding": self.padding}
                x = self.block(width, strides, **common, name=name)(x, train, mask)
        if self.pre_activation:
            x = nn.relu(apply_norm(self.norm, x, train, mask, self.dtype))
        features = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return nn.Dense(self.num_classes, name="classifier")(features)

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
            padding = _conv_padding(self.padding, (3, 3))
            return nn.max_pool(
                activation(halving(x, train, mask)), (3, 3), strides=(2, 2), padding=padding
            )
        raise ValueError(f"stem={self.stem!r}, expected '3x3' or '7x7'")


_ImageNet = partial(
    ResNet, widths=(64, 128, 256, 512), norm=partial(BatchNorm, momentum=0.9), stem="7x7"
)
ResNet18 = partial(_ImageNet, stage_sizes=(2, 2, 2, 2))
ResNet34 = partial(_ImageNet, stage_sizes=(3, 4, 6, 3))
ResNet50 = partial(_ImageNet, stage_sizes=(3, 4, 6, 3), block=Bottleneck)
ResNet101 = partial(_ImageNet, stage_sizes=(3, 4, 23, 3), block=Bottleneck)
ResNet152 = partial(_ImageNet, stage_sizes=(3, 8, 36, 3), block=Bottleneck)
