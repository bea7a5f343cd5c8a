"""The models that `bn-jax train` trains, with the norm of each arm."""

import functools

import flax.linen as nn

from bn_jax import linen
from bn_jax.lab import models
from bn_jax.lab.console.choices import NO_NORM, PER_DEVICE, SYNCHRONIZED

__all__ = ["choose_model", "make_model"]

# Of an image with fewer pixels on a side, the stem for ImageNet would leave few positions.
LEAST_FOR_LARGE_STEM = 64
# Of an image with fewer pixels on a side, a third stage would have 2x2 positions. There a
# convolution of 3x3 costs ten times its arithmetic on a CPU: XLA swaps image and kernel when the
# image is the smaller one, and has no fast routine for the result.
LEAST_FOR_THREE_STAGES = 9


def choose_model(image_shape: tuple[int, ...]) -> str:
    """Returns the model of a training that names none: one of `choices.MODELS`."""
    return "small" if min(image_shape[:2]) >= LEAST_FOR_THREE_STAGES else "tiny"


# Cached: a model that is made again, e.g. to reload it, runs the programs that are compiled.
@functools.cache
def make_model(
    arm: str, num_classes: int, per_device: int, model: str, image_shape: tuple[int, ...]
) -> nn.Module:
    """Makes the model of an arm.

    Args:
        arm: one of `choices.ARMS`.
        num_classes: number of logits.
        per_device: examples on each device, which per-device batch norm normalizes together.
        model: one of `choices.MODELS`. "small" is a residual network with three stages of two
            blocks, "tiny" one without the third. "mlp" is a `bn_jax.lab.models.MLP`. "resnet18"
            is `bn_jax.lab.models.ResNet18`, padded as PyTorch pads. For images with fewer than 64
            pixels on a side, its stem is the 3x3 convolution that keeps their size.
        image_shape: [H, W, C] of an image.

    Returns:
        A module called as ``model(x, train=..., mask=...)``.
    """
    norm = _norm(arm, per_device)
    if model == "mlp":
        return models.MLP(num_classes, norm=norm)
    if model == "small":
        return models.ResNet(num_classes, stage_sizes=(2, 2, 2), widths=(16, 32, 64), norm=norm)
    if model == "tiny":
        return models.ResNet(num_classes, stage_sizes=(2, 2), widths=(16, 32), norm=norm)
    stem = "7x7" if min(image_shape[:2]) >= LEAST_FOR_LARGE_STEM else "3x3"
    return models.ResNet18(num_classes, norm=norm, stem=stem, padding="symmetric")


def _norm(arm: str, per_device: int) -> models.Norm | None:
    norms: dict[str, models.Norm | None] = {
        NO_NORM: None,
        # Under sharded jit, consecutive examples lie on one device.
        PER_DEVICE: functools.partial(linen.BatchNorm, momentum=0.9, virtual_batch_size=per_device),
        SYNCHRONIZED: functools.partial(linen.BatchNorm, momentum=0.9),
    }
    return norms[arm]
