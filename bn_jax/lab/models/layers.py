"""A convolution with its norm, and any norm or none in a model."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
from jax.typing import DTypeLike

__all__ = ["ConvNorm", "Norm", "Padding", "apply_norm", "conv_padding"]

Norm = Callable[..., nn.Module]
"""A constructor of norms, such as `bn_jax.linen.BatchNorm`, which takes `use_running_average`."""
Padding = Literal["SAME", "symmetric"]
"""Where padding goes: as in TensorFlow and Flax, or the same on both sides, as in PyTorch."""


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
            conv_padding(self.padding, self.kernel_size),
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


def conv_padding(padding: Padding, kernel_size: Sequence[int]) -> str | list[tuple[int, int]]:
    """Returns the padding of a convolution or a maximum, as Flax takes it."""
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
