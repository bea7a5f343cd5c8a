"""The names that torchvision gives to the layers of its residual networks."""

import re
from collections.abc import Callable, Sequence


def resnet_names(layer: str) -> str:
    """Returns torchvision's name of a layer of `bn_jax.lab.models.ResNet18` to `ResNet152`.

    With these names `transposed` need not be set: a ResNet has no transposed convolutions.

    Args:
        layer: the path of the layer in Flax.

    Returns:
        Its path in torchvision.

    Example:
        >>> import bn_jax as bn
        >>> bn.convert.resnet_names("stage0_block1/ConvNorm_2/norm")
        'layer1.1.bn3'
        >>> bn.convert.resnet_names("stage3_block0/shortcut/conv")
        'layer4.0.downsample.0'
    """
    parts = re.fullmatch(r"stage(\d+)_block(\d+)/(?:ConvNorm_(\d+)|shortcut)/(conv|norm)", layer)
    if parts is None:
        fixed = {"stem/conv": "conv1", "stem/norm": "bn1", "classifier": "fc"}
        return fixed.get(layer, layer.replace("/", "."))
    stage, block, index, kind = parts.groups()
    return _in_block(int(stage), int(block), index, kind)


def jax_resnet_names(stage_sizes: Sequence[int]) -> Callable[[str], str]:
    """Returns a function from the layers of a ResNet of jax-resnet to torchvision's names.

    That package numbers the blocks of all stages in one row, so that only the sizes of the stages
    tell where a layer is. The names serve its `ResNet18` to `ResNet152`, `WideResNet50` and
    `WideResNet101`, `ResNeXt50` and `ResNeXt101`, with Flax's norms or with `bn_jax.linen`'s.

    Args:
        stage_sizes: the number of blocks in each stage, as in ``jax_resnet.STAGE_SIZES[50]``.

    Returns:
        A function for the argument `names` of `from_library` and `to_library`.

    Example:
        >>> import bn_jax as bn
        >>> names = bn.convert.jax_resnet_names((3, 4, 6, 3))
        >>> names("layers_0/ConvBlock_0/Conv_0"), names("layers_5/ConvBlock_2/BatchNorm_0")
        ('conv1', 'layer2.0.bn3')
        >>> names("layers_5/ResNetSkipConnection_0/ConvBlock_0/Conv_0"), names("layers_19")
        ('layer2.0.downsample.0', 'fc')
    """
    blocks = [(stage, block) for stage, size in enumerate(stage_sizes) for block in range(size)]
    # The stem and its pooling come before the blocks, and the mean over positions after them.
    fixed = {
        "layers_0/ConvBlock_0/Conv_0": "conv1",
        "layers_0/ConvBlock_0/BatchNorm_0": "bn1",
        f"layers_{len(blocks) + 3}": "fc",
    }
    pattern = re.compile(
        r"layers_(\d+)/(?:ConvBlock_(\d+)|ResNetSkipConnection_0/ConvBlock_0)/(Conv|BatchNorm)_0"
    )

    def name_layer(layer: str) -> str:
        parts = pattern.fullmatch(layer)
        if layer in fixed or parts is None or not 0 <= int(parts[1]) - 2 < len(blocks):
            return fixed.get(layer, layer.replace("/", "."))
        number, index, kind = parts.groups()
        return _in_block(*blocks[int(number) - 2], index, kind)

    return name_layer


def _in_block(stage: int, block: int, index: str | None, kind: str) -> str:
    """Returns the name of a convolution or norm: that of the shortcut has no index."""
    is_conv = kind.lower() == "conv"
    start = f"layer{stage + 1}.{block}"
    if index is None:
        return f"{start}.downsample.{0 if is_conv else 1}"
    return f"{start}.{'conv' if is_conv else 'bn'}{int(index) + 1}"
