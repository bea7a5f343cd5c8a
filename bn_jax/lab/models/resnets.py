"""Residual networks in Flax Linen, for small images and for ImageNet, with any norm or none.

A norm keeps the residual branches small beside the shortcuts, the more so the deeper the network.
Without a norm, SkipInit and Fixup start the branches at zero, which suffices to train deep
networks.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bn_jax.linen import BatchNorm

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

Norm = Callable[..., nn.Module]
"""A constructor of norms, such as `bn_jax.linen.BatchNorm`, which takes `use_running_average`."""
Padding = Literal["SAME", "symmetric"]
"""Where padding goes: as in TensorFlow and Flax, or the same on both sides, as in PyTorch."""
BranchInit = Literal["plain", "skipinit", "fixup"]
"""How residual branches start: as any layer, or by SkipInit or Fixup in place of norms."""


def fixup_normal(depth: int, layers: int) -> jax.nn.initializers.Initializer:
    """Returns Fixup's initializer of all kernels in a residual branch but the last, which is zero.

    He's normal distribution with ``depth ** (-1 / (2 * layers - 2))`` times its standard deviation.

    Args:
        depth: residual branches in the network, L in the paper.
        layers: kernels in a branch, m in the paper; at least 2.

    Returns:
        An initializer like those in `jax.nn.initializers`.

    Raises:
        ValueError: `depth` is under 1 or `layers` under 2.

    Example:
        >>> import jax
        >>> from bn_jax.lab import models
        >>> kernel = models.fixup_normal(depth=16, layers=3)(jax.random.key(0), (200, 300))
        >>> round(float(kernel.std() / (2 / 200) ** 0.5), 2)  # 16 ** (-1 / 4)
        0.5

    Reference: Zhang et al. 2019, "Fixup Initialization: Residual Learning Without Normalization",
    https://arxiv.org/abs/1901.09321.
    """
    if depth < 1 or layers < 2:
        raise ValueError(
            f"depth={depth} and layers={layers}, expected depth of at least 1 and layers of at "
            "least 2: the last kernel of a branch is zero, and the others take this initializer."
        )
    return nn.initializers.variance_scaling(
        2 * depth ** (-1 / (layers - 1)), "fan_in", "truncated_normal"
    )


def _branch_kernels(
    branch_init: BranchInit, norm: Norm | None, depth: int, layers: int
) -> list[jax.nn.initializers.Initializer]:
    """Returns the initializer of each kernel in a residual branch."""
    if branch_init not in ("plain", "skipinit", "fixup"):
        raise ValueError(f"branch_init={branch_init!r}, expected 'plain', 'skipinit' or 'fixup'")
    if branch_init != "plain" and norm is not None:
        raise ValueError(
            f"branch_init={branch_init!r} is there instead of norms, but norm={norm} is given: "
            "pass norm=None, or branch_init='plain'."
        )
    if branch_init == "fixup":
        return [fixup_normal(depth, layers)] * (layers - 1) + [nn.initializers.zeros]
    return [nn.initializers.he_normal()] * layers


class Scalar(nn.Module):
    """One learned number for a whole array: ``x * scale`` or ``x + bias``.

    Attributes:
        kind: "scale" or "bias", the name of the parameter, of shape [].
        initial: its initial value.
        dtype: of the result. None: that to which input and parameter promote.
    """

    kind: Literal["scale", "bias"]
    initial: float
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies, or adds."""
        number: Any = self.param(self.kind, nn.initializers.constant(self.initial), ())
        x, number = nn.dtypes.promote_dtype(x, number, dtype=self.dtype)
        return x * number if self.kind == "scale" else x + number


def _shift(branch_init: BranchInit, x: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """Adds Fixup's scalar, which it has before every weight layer and activation."""
    return Scalar("bias", 0.0, dtype)(x) if branch_init == "fixup" else x


def _scale_branch(branch_init: BranchInit, y: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """Multiplies a residual branch by the scalar of SkipInit or Fixup."""
    if branch_init == "plain":
        return y
    return Scalar("scale", 0.0 if branch_init == "skipinit" else 1.0, dtype)(y)


def _classify(branch_init: BranchInit, features: jax.Array, num_classes: int) -> jax.Array:
    kernel_init = nn.initializers.lecun_normal()
    if branch_init == "fixup":
        kernel_init = nn.initializers.zeros
    features = _shift(branch_init, features, None)
    return nn.Dense(num_classes, kernel_init=kernel_init, name="classifier")(features)


class ConvNorm(nn.Module):
    """A convolution followed by a norm.

    Attributes:
        features: output channels.
        kernel_size: height and width of the kernel.
        strides: strides along height and width.
        norm: constructor of the norm, or None. A norm with an attribute `use_running_average`
            normalizes by the batch, so it is called with the mask, and with
            ``use_running_average=not train`` if the attribute is None. Any other norm is called
            with the convolution's result alone.
        norm_scale_init: initializer of the norm's scale. None: that of `norm`.
        dtype: of the computation and the result. None: that to which input and parameters promote.
        padding: "SAME", or "symmetric" for equal padding on both sides, as in PyTorch. They differ
            if the strides do not divide the image.
        feature_group_count: groups of channels that are convolved separately.
        use_bias: whether the convolution has a bias. None: if and only if there is no norm.
        kernel_init: initializer of the kernel.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    norm: Norm | None = None
    norm_scale_init: jax.nn.initializers.Initializer | None = None
    dtype: DTypeLike | None = None
    padding: Padding = "SAME"
    feature_group_count: int = 1
    use_bias: bool | None = None
    kernel_init: jax.nn.initializers.Initializer = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Convolves and normalizes.

        Args:
            x: [N, H, W, C].
            train: whether to normalize by the batch's statistics and update the running ones.
            mask: broadcastable to the output; which values enter the statistics.

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
            kernel_init=self.kernel_init,
            name="conv",
        )(x)
        if self.norm_scale_init is None:
            return apply_norm(self.norm, x, train, mask, self.dtype)
        scale_init = self.norm_scale_init
        return apply_norm(self.norm, x, train, mask, self.dtype, scale_init=scale_init)


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
    dtype: DTypeLike | None,
    name: str = "norm",
    **attributes: Any,
) -> jax.Array:
    """Applies a norm as a child of the enclosing module; `ConvNorm` describes the call.

    Args:
        norm: its constructor, or None.
        x: the input.
        train: see `ConvNorm`.
        mask: see `ConvNorm`.
        dtype: see `ConvNorm`.
        name: of the module.
        **attributes: more attributes of the norm.

    Returns:
        The normalized array, or `x` if there is no norm.
    """
    if norm is None:
        return x
    if dtype is not None:
        attributes["dtype"] = dtype
    layer: Any = norm(name=name, **attributes)
    if not hasattr(layer, "use_running_average"):
        return layer(x)
    if layer.use_running_average is None:
        return layer(x, use_running_average=not train, mask=mask)
    return layer(x, mask=mask)


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
        return nn.relu(_shift(self.branch_init, x, self.dtype))

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
        kernels = _branch_kernels(self.branch_init, self.norm, self.depth, len(layers))
        last = len(layers) - 1
        for number, (layer, kernel_init) in enumerate(zip(layers, kernels, strict=True)):
            if number > 0:
                x = self.activate(x)
            scale_init = nn.initializers.zeros if number == last else None
            conv_norm = layer(kernel_init=kernel_init, norm_scale_init=scale_init)
            x = conv_norm(_shift(self.branch_init, x, self.dtype), train, mask)
        return _scale_branch(self.branch_init, x, self.dtype)

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
            x = conv_norm(_shift(self.branch_init, conv_input, self.dtype), train, mask)
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
            x = nn.relu(_shift(self.branch_init, x, self.dtype))
        features = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return _classify(self.branch_init, features, self.num_classes)

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


class MLP(nn.Module):
    """A fully connected network: dense layers, each followed by a norm and ReLU, and a classifier.

    Attributes:
        num_classes: number of logits.
        widths: features of the layers.
        norm: constructor of the norms as in `ResNet`, or None: layers with biases.
        dtype: see `ResNet`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bn_jax.lab import models
        >>> model, images = models.MLP(10, widths=(20,)), jnp.zeros((2, 8, 8, 1))
        >>> variables = model.init(jax.random.key(0), images, train=False)
        >>> model.apply(variables, images, train=False).shape
        (2, 10)
    """

    num_classes: int
    widths: Sequence[int] = (256, 256)
    norm: Norm | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Computes the logits.

        Args:
            x: [N, ...]; an example is read as one vector.
            train: whether to normalize by the batch's statistics and update the running ones.
            mask: booleans or weights [N]: which examples enter the statistics. None: all.

        Returns:
            Logits [N, num_classes].
        """
        mask = None if mask is None else jnp.asarray(mask)[:, None]
        x = x.reshape(x.shape[0], -1)
        for number, width in enumerate(self.widths):
            dense = nn.Dense(
                width,
                use_bias=self.norm is None,
                dtype=self.dtype,
                kernel_init=nn.initializers.he_normal(),
                name=f"dense_{number}",
            )
            x = nn.relu(apply_norm(self.norm, dense(x), train, mask, self.dtype, f"norm_{number}"))
        features = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return _classify("plain", features, self.num_classes)


class DenseBlock(nn.Module):
    """Norm, ReLU and a dense layer, twice, beside a shortcut.

    Attributes:
        features: of input and output.
        norm: see `ConvNorm`.
        dtype: see `ConvNorm`.
        branch_init: see `ResidualBlock`.
        depth: see `ResidualBlock`.
    """

    features: int
    norm: Norm | None = None
    dtype: DTypeLike | None = None
    branch_init: BranchInit = "plain"
    depth: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, features]; for arguments and result, see `ConvNorm`."""
        shift = partial(_shift, self.branch_init, dtype=self.dtype)
        kernels = _branch_kernels(self.branch_init, self.norm, self.depth, layers=2)
        use_bias = self.norm is None and self.branch_init != "fixup"
        y = x
        for number, kernel_init in enumerate(kernels):
            y = apply_norm(self.norm, y, train, mask, self.dtype, name=f"norm_{number}")
            dense = nn.Dense(
                self.features,
                use_bias,
                self.dtype,
                kernel_init=kernel_init,
                name=f"dense_{number}",
            )
            y = dense(shift(nn.relu(shift(y))))
        return x + _scale_branch(self.branch_init, y, self.dtype)


class ResidualMLP(nn.Module):
    """A fully connected residual network with pre-activation, whose blocks are one `nn.scan`.

    It has a dense layer from the input to `width` features, `depth` blocks (`DenseBlock`), a norm,
    ReLU and a linear classifier. For white input, the second moment after `l` blocks is initially
    about ``2**l`` without a norm, ``l + 1`` with batch norm, and 1 with SkipInit and Fixup.

    Attributes:
        depth: number of blocks. Only one is compiled; the variables of all are stacked on the first
            axis.
        width: features between the blocks.
        num_classes: number of logits.
        norm: constructor of the norms as in `ResNet`, or None.
        branch_init: see `ResNet`.
        dtype: see `ResNet`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bn_jax.lab import models
        >>> model = models.ResidualMLP(depth=5, width=256, num_classes=10)
        >>> x = jax.random.normal(jax.random.key(0), (64, 32))
        >>> variables = model.init(jax.random.key(1), x, train=False)
        >>> _, found = model.apply(variables, x, train=False, mutable=["intermediates"])
        >>> (stream,) = found["intermediates"]["stream"]
        >>> stream.shape
        (6, 64, 256)
        >>> moments = jnp.mean(stream**2, axis=(1, 2))
        >>> [round(float(later / earlier)) for earlier, later in zip(moments, moments[1:])]
        [2, 2, 2, 2, 2]

    Reference: De & Smith 2020, "Batch Normalization Biases Residual Blocks Towards the Identity
    Function in Deep Networks", https://arxiv.org/abs/2002.10444.
    """

    depth: int
    width: int
    num_classes: int
    norm: Norm | None = None
    branch_init: BranchInit = "plain"
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Computes the logits, and sows ``stream`` into the collection ``intermediates``.

        Args:
            x: [N, features].
            train: whether to normalize by the batch's statistics and update the running ones.
            mask: booleans or weights [N]: which examples enter the statistics. None: all.

        Returns:
            Logits [N, num_classes]. ``stream``, [depth + 1, N, width], holds the inputs of all
            blocks, and the output of the last.

        Raises:
            ValueError: `branch_init` is unknown, or not "plain" although there is a norm.
        """
        mask = None if mask is None else jnp.asarray(mask)[:, None]
        stem = nn.Dense(self.width, use_bias=self.norm is None, dtype=self.dtype, name="stem")
        x = first = stem(x)
        block = DenseBlock(
            self.width,
            norm=self.norm,
            dtype=self.dtype,
            branch_init=self.branch_init,
            depth=self.depth,
            name="block",
        )

        def apply_block(block: DenseBlock, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            y = block(x, train, mask)
            return y, y

        scan = nn.scan(
            apply_block, variable_axes={True: 0}, split_rngs={True: True}, length=self.depth
        )
        x, later = scan(block, x, None)
        self.sow("intermediates", "stream", jnp.concatenate([first[None], later]))
        x = apply_norm(self.norm, x, train, mask, self.dtype)
        x = nn.relu(_shift(self.branch_init, x, self.dtype))
        features = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return _classify(self.branch_init, features, self.num_classes)
