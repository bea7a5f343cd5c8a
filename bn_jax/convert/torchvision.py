"""The names that torchvision gives to the layers of its models."""

import re


def resnet_names(layer: str) -> str:
    """Returns torchvision's name of a layer of `bn_jax.lab.models.ResNet18` to `ResNet152`.

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
    parts = re.fullmatch(r"stage(\d+)_block(\d+)/(ConvNorm_(\d+)|shortcut)/(conv|norm)", layer)
    if parts is None:
        fixed = {"stem/conv": "conv1", "stem/norm": "bn1", "classifier": "fc"}
        return fixed.get(layer, layer.replace("/", "."))
    stage, block, branch, index, kind = parts.groups()
    start = f"layer{int(stage) + 1}.{block}"
    if branch == "shortcut":
        return f"{start}.downsample.{0 if kind == 'conv' else 1}"
    return f"{start}.{'conv' if kind == 'conv' else 'bn'}{int(index) + 1}"
