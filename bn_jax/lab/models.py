"""Residual networks in Flax Linen, for small images and for ImageNet, with any norm or none.

A norm keeps the residual branches small beside what the shortcuts carry, the more so the deeper.
Without, SkipInit and Fixup start the branches at zero, which is enough to train deep networks.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bn_jax.linen import BatchNorm

Norm = Callable[..., nn.Module]
Padding = Literal["SAME", "symmetric"]
BranchInit = Literal["plain", "skipinit", "fixup"]


def fixup_normal(depth: int, layers: int) -> jax.nn.initializers.Initializer:
    """Returns Fixup's initializer of the kernels in a residual branch, all but the last, of zeros.

    He's normal distribution with ``depth ** (-1 / (2 * layers - 2))`` times its standard deviation.

    Args:
        depth: residual branches in the network, L in the paper.
        layers: kernels in a branch, m in the paper; at least 2.

    Returns:
        An initializer as those of `jax.nn.initializers`.

    Raises:
        ValueError: `depth` is under 1 or `layers` under 2.

    Example:
        >>> import jax
        >>> from bn_jax import models
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
            f"branch_init={branch_init!r} is there instead of norms, but norm={norm} is one: pass "
            "norm=None, or branch_init='plain'."
        )
    if branch_init == "fixup":
        return [fixup_normal(depth, layers)] * (layers - 1) + [nn.initializers.zeros]
    return [nn.initializers.he_normal()] * layers


class Scalar(nn.Module):
    """One learned number for a whole array: ``x * scale`` or ``x + bias``.

    Attributes:
        kind: "scale" or "bias", the name of the parameter, of shape [].
        initial: its initial value.
        dtype: of the result; None for that of input and parameter promoted.
    """

    kind: Literal["scale", "bias"]
    initial: float
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies, or adds."""
        number: Any = self.param(self.kind, nn.initializers.constant(self.initial), ())
        x, number = nn.dtypes.promote_dtype(x, number, dtype=self.dtype)
        return x * number if self.kind == "scale" else x + number


def _shift(branch_init: BranchInit, x: jax.Array, dtype: Any) -> jax.Array:
    """Adds what Fixup adds before every weight layer and activation."""
    return Scalar("bias", 0.0, dtype)(x) if branch_init == "fixup" else x


def _scale_branch(branch_init: BranchInit, y: jax.Array, dtype: Any) -> jax.Array:
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
        norm: constructor of the norm, or None. A norm with an attribute `use_running_average` takes
            its statistics from the batch; it is given the mask, and whether to train unless that
            attribute says so. Any other norm is applied to the convolution's result alone.
        norm_scale_init: initializer of the norm's scale; None for that of `norm`.
        dtype: of the computation and the result; None for that of input and parameters promoted.
        padding: "SAME", or "symmetric" for as much on either side, as PyTorch pads. They differ
            where strides leave something over.
        feature_group_count: groups of channels that are convolved apart.
        use_bias: whether the convolution has a bias; None: if and only if there is no norm.
        kernel_init: initializer of the kernel.
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
    kernel_init: jax.nn.initializers.Initializer = nn.initializers.he_normal()

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
            kernel_init=self.kernel_init,
            name="conv",
        )(x)
        of_scale: dict[str, Any] = (
            {} if self.norm_scale_init is None else {"scale_init": self.norm_scale_init}
        )
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
    name: str = "norm",
    **attributes: Any,
) -> jax.Array:
    """Applies a norm, a child of the enclosing module; `ConvNorm` says how it is called.

    Args:
        norm: its constructor; None: `x` is returned as it is.
        x: what is normalized.
        train: see `ConvNorm`.
        mask: see `ConvNorm`.
        dtype: see `ConvNorm`.
        name: of the module.
        **attributes: of the norm.

    Returns:
        The normalized array.
    """
    if norm is None:
        return x
    if dtype is not None:
        attributes["dtype"] = dtype
    layer: Any = norm(name=name, **attributes)
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


class ResidualBlock(Block):
    """What blocks with a shortcut are made with.

    Attributes:
        branch_init: how what is beside the shortcut starts. "plain": from He's initialization.
            "skipinit": the same, times a learned scalar that starts at zero (De & Smith 2020).
            "fixup": `fixup_normal`, the last kernel zero, a learned scalar that is added before
            every convolution and activation instead of biases of channels, and one that multiplies
            the end (Zhang et al. 2019). The latter two are without norm.
        depth: blocks in the network, for Fixup.
    """

    branch_init: BranchInit = "plain"
    depth: int = 1

    def conv_norm(
        self, features: int, kernel_size: tuple[int, int] = (3, 3), **options: Any
    ) -> ConvNorm:
        """Makes a convolution and its norm; see `Block`."""
        if self.branch_init == "fixup":
            options["use_bias"] = False
        return super().conv_norm(features, kernel_size, **options)

    def activate(self, x: jax.Array) -> jax.Array:
        """Applies ReLU, to `x` and Fixup's scalar."""
        return nn.relu(_shift(self.branch_init, x, self.dtype))

    def branch(
        self,
        x: jax.Array,
        layers: Sequence[Callable[..., ConvNorm]],
        train: bool,
        mask: jax.Array | None,
    ) -> jax.Array:
        """Applies what is beside the shortcut: convolutions, with ReLU between.

        Args:
            x: what the first convolution takes.
            layers: `conv_norm` with its arguments. The scale of the last norm starts at zero.
            train: see `ConvNorm`.
            mask: see `ConvNorm`.

        Returns:
            What is to be added to the shortcut.
        """
        kernels = _branch_kernels(self.branch_init, self.norm, self.depth, len(layers))
        options: list[dict[str, Any]] = [{"kernel_init": one} for one in kernels]
        options[-1]["norm_scale_init"] = nn.initializers.zeros
        for number, (layer, own) in enumerate(zip(layers, options, strict=True)):
            x = self.activate(x) if number > 0 else x
            x = layer(**own)(_shift(self.branch_init, x, self.dtype), train, mask)
        return _scale_branch(self.branch_init, x, self.dtype)

    def add_shortcut(
        self,
        x: jax.Array,
        y: jax.Array,
        train: bool,
        mask: jax.Array | None,
        taken: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """Adds what came in to what the convolutions made of it.

        Args:
            x: the input of the block.
            y: the output of `branch`.
            train: see `ConvNorm`.
            mask: see `ConvNorm`.
            taken: what the convolution of the shortcut takes; None for `x`.
            **options: of that convolution.

        Returns:
            The sum. Where strides or channels change, whatever the image, `x` is replaced by a
            convolution and its norm.
        """
        if tuple(self.strides) != (1, 1) or x.shape[-1] != y.shape[-1]:
            shortcut = self.conv_norm(
                y.shape[-1], (1, 1), strides=self.strides, name="shortcut", **options
            )
            taken = x if taken is None else taken
            x = shortcut(_shift(self.branch_init, taken, self.dtype), train, mask)
        return x + y


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 2).

    The last norm's scale starts at zero, so that the block starts as its shortcut.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, H, W, C]; arguments and result as of `ConvNorm`."""
        layers = [
            partial(self.conv_norm, self.features, strides=self.strides),
            partial(self.conv_norm, self.features),
        ]
        y = self.branch(x, layers, train, mask)
        return self.activate(self.add_shortcut(x, y, train, mask))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al. 2016, figure 5).

    Of version 1.5: the strides are those of the 3x3 convolution (version 1 has them in the first).
    The last norm's scale starts at zero, so that the block starts as its shortcut.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, H, W, C]; arguments and result as of `ConvNorm`."""
        layers = [
            partial(self.conv_norm, self.features, (1, 1)),
            partial(self.conv_norm, self.features, strides=self.strides),
            partial(self.conv_norm, 4 * self.features, (1, 1)),
        ]
        y = self.branch(x, layers, train, mask)
        return self.activate(self.add_shortcut(x, y, train, mask))


class PreActivationBlock(ResidualBlock):
    """Norm, ReLU and a 3x3 convolution, twice, beside a shortcut (He et al. 2016b, figure 4e).

    What the blocks hand on is a sum without norm and ReLU: `ResNet` has them after its last block
    where `pre_activation` is True.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, H, W, C]; arguments and result as of `ConvNorm`."""
        activated = self.activate(apply_norm(self.norm, x, train, mask, self.dtype))
        bare: dict[str, Any] = {"norm": None, "use_bias": self.norm is None}
        layers = [
            partial(self.conv_norm, self.features, strides=self.strides),
            partial(self.conv_norm, self.features, **bare),
        ]
        y = self.branch(activated, layers, train, mask)
        return self.add_shortcut(x, y, train, mask, taken=activated, **bare)


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
        branch_init: how the residual branches of a network without norm start: "plain", "skipinit"
            or "fixup", as `ResidualBlock` says. With Fixup the classifier starts at zero; the
            biases of the stem and the classifier remain.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bn_jax import models
        >>> model, images = models.ResNet18(1000), jnp.zeros((1, 64, 64, 3))
        >>> shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        11689512

    Reference: He et al. 2016, "Deep Residual Learning for Image Recognition",
    https://arxiv.org/abs/1512.03385. For SkipInit: De & Smith 2020, "Batch Normalization Biases
    Residual Blocks Towards the Identity Function in Deep Networks",
    https://arxiv.org/abs/2002.10444. For Fixup: see `fixup_normal`.
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
            ValueError: `stage_sizes` and `widths` differ in length, `stem` is none of the two, or
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
        common = {"norm": self.norm, "dtype": self.dtype, "padding": self.padding}
        if self.branch_init != "plain":
            if "branch_init" not in inspect.signature(self.block).parameters:
                raise ValueError(
                    f"branch_init={self.branch_init!r} starts residual branches, but "
                    f"block={self.block} has none: pass a block with a shortcut such as "
                    "bn_jax.lab.models.BasicBlock, or branch_init='plain'."
                )
            common |= {"branch_init": self.branch_init, "depth": sum(self.stage_sizes)}
        for stage, (blocks, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True)):
            for index in range(blocks):
                strides = (2, 2) if stage > 0 and index == 0 else (1, 1)
                name = f"stage{stage}_block{index}"
                x = self.block(width, strides, **common, name=name)(x, train, mask)
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


_ImageNet = partial(
    ResNet, widths=(64, 128, 256, 512), norm=partial(BatchNorm, momentum=0.9), stem="7x7"
)
ResNet18 = partial(_ImageNet, stage_sizes=(2, 2, 2, 2))
ResNet34 = partial(_ImageNet, stage_sizes=(3, 4, 6, 3))
ResNet50 = partial(_ImageNet, stage_sizes=(3, 4, 6, 3), block=Bottleneck)
ResNet101 = partial(_ImageNet, stage_sizes=(3, 4, 23, 3), block=Bottleneck)
ResNet152 = partial(_ImageNet, stage_sizes=(3, 8, 36, 3), block=Bottleneck)


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
    dtype: Any = None
    branch_init: BranchInit = "plain"
    depth: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Applies the block to [N, features]; arguments and result as of `ConvNorm`."""
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
    """A fully connected residual network with pre-activation, the blocks as one scan.

    A dense layer from the input to `width` features, `depth` times `DenseBlock`, a norm, ReLU and a
    linear classifier. Of white input the second moment after `l` blocks is about ``2**l`` at the
    start without a norm, ``l + 1`` with batch norm, and 1 with SkipInit and Fixup.

    Attributes:
        depth: blocks. However many, one is compiled; the variables are stacked on the first axis.
        width: features between the blocks.
        num_classes: number of logits.
        norm: constructor of the norms, as of `ResNet`; or None.
        branch_init: see `ResNet`.
        dtype: see `ResNet`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bn_jax import models
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
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Computes the logits, and sows ``stream`` into the collection ``intermediates``.

        Args:
            x: [N, features].
            train: whether to normalize by the batch's statistics and update the running ones.
            mask: booleans or weights [N]: which examples enter the statistics. None: all.

        Returns:
            Logits [N, num_classes]. ``stream``, [depth + 1, N, width], is what the blocks take and
            the last one gives.

        Raises:
            ValueError: `branch_init` is none of the three, or not "plain" in spite of a norm.
        """
        mask = None if mask is None else jnp.asarray(mask)[:, None]
        x = first = nn.Dense(self.width, self.norm is None, self.dtype, name="stem")(x)

        common = (self.width, self.norm, self.dtype, self.branch_init, self.depth)

        def apply_block(block: DenseBlock, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            y = block(x, train, mask)
            return y, y

        scan = nn.scan(
            apply_block, variable_axes={True: 0}, split_rngs={True: True}, length=self.depth
        )
        x, later = scan(DenseBlock(*common, name="block"), x, None)
        self.sow("intermediates", "stream", jnp.concatenate([first[None], later]))
        x = apply_norm(self.norm, x, train, mask, self.dtype)
        x = nn.relu(_shift(self.branch_init, x, self.dtype))
        features = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return _classify(self.branch_init, features, self.num_classes)
