"""Small networks with any norm or none, for the experiments."""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax

from bn_jax.models import Norm, apply_norm

Position = Literal["before", "after"]


class MLP(nn.Module):
    """Dense layers, each with a norm and an activation, and a linear classifier.

    Attributes:
        widths: features of the hidden layers.
        num_classes: number of logits.
        norm: constructor of the norms, as of `bn_jax.models.ConvNorm`, or None.
        activation: between the layers.
        position: whether the norm comes before the activation or after it.
        kernel_init: of the hidden layers' kernels.
        dtype: of parameters and computation.
    """

    widths: Sequence[int] = (64, 64, 64)
    num_classes: int = 10
    norm: Norm | None = None
    activation: Any = nn.relu
    position: Position = "before"
    kernel_init: jax.nn.initializers.Initializer = nn.initializers.he_normal()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Computes the logits.

        What comes into each activation is sown as ``preactivation`` into "intermediates".

        Args:
            x: [n, features].
            train: whether to normalize by the batch's statistics and update the running ones.
            mask: booleans or weights [n]: which examples enter the statistics. None: all.

        Returns:
            Logits [n, num_classes].
        """
        types = {} if self.dtype is None else {"dtype": self.dtype, "param_dtype": self.dtype}
        mask = None if mask is None else mask[:, None]
        for index, width in enumerate(self.widths):
            # A bias before a norm is cancelled by it.
            use_bias = self.norm is None or self.position == "after"
            dense = nn.Dense(
                width, use_bias, kernel_init=self.kernel_init, name=f"dense{index}", **types
            )
            x = dense(x)
            if self.position == "before":
                x = self._normalized(x, train, mask, index)
            self.sow("intermediates", "preactivation", x)
            x = self.activation(x)
            if self.position == "after":
                x = self._normalized(x, train, mask, index)
        return nn.Dense(self.num_classes, name="classifier", **types)(x)

    def _normalized(
        self, x: jax.Array, train: bool, mask: jax.Array | None, index: int
    ) -> jax.Array:
        types = {} if self.dtype is None else {"param_dtype": self.dtype}
        return apply_norm(self.norm, x, train, mask, self.dtype, f"norm{index}", **types)
