"""Small networks with any norm or none, for the experiments."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from bn_jax._core.batch_norm import batch_norm
from bn_jax._core.running import init_batch_stats
from bn_jax._core.types import Params
from bn_jax.lab.models import Norm, apply_norm
from bn_jax.linen import BatchNorm

Position = Literal["before", "after"]

BATCH_NORM: Norm = partial(BatchNorm, momentum=0.9)
WITH_AND_WITHOUT: Mapping[str, Norm | None] = {"batch norm": BATCH_NORM, "no norm": None}
# So small that adding it to a variance changes no digit, in float64 and in float32.
NO_EPSILON, NO_EPSILON_FLOAT32 = 1e-300, 1e-30


def normalize_batch(
    x: jax.Array, params: Params | None = None, epsilon: float | None = None
) -> jax.Array:
    """Applies a batch norm by the batch's statistics, which keeps no running statistics.

    Args:
        x: a batch, normalized over its first axis, [n, ...].
        params: scale and bias, [...]. None: neither.
        epsilon: added to the variance. None: so small that it changes no digit.

    Returns:
        The shape of `x`.
    """
    if epsilon is None:
        epsilon = NO_EPSILON if x.dtype == jnp.float64 else NO_EPSILON_FLOAT32
    return batch_norm(
        {} if params is None else params,
        init_batch_stats(x.shape[1:], dtype=x.dtype),
        x,
        use_running_average=False,
        axis=tuple(range(1, x.ndim)),
        epsilon=epsilon,
    )[0]


class MLP(nn.Module):
    """Dense layers, each with a norm and an activation, and a linear classifier.

    Attributes:
        widths: features of the hidden layers.
        num_classes: number of logits.
        norm: constructor of the norms, as of `bn_jax.lab.models.ConvNorm`, or None.
        activation: between the layers.
        position: whether the norm is before the activation or after it.
        kernel_init: the initializer of the hidden layers' kernels.
        dtype: the dtype of parameters and computation.
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

        The input of each activation is sown as ``preactivation`` into "intermediates".

        Args:
            x: [n, features].
            train: whether to use the batch's statistics, and update the running statistics.
            mask: booleans or weights [n] of the examples in the statistics; None: all are 1.

        Returns:
            Logits [n, num_classes].
        """
        param_dtype = jnp.float32 if self.dtype is None else self.dtype
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=param_dtype)
        mask = None if mask is None else mask[:, None]
        for index, width in enumerate(self.widths):
            # A norm right after the layer subtracts its bias again.
            use_bias = self.norm is None or self.position == "after"
            x = dense(width, use_bias, kernel_init=self.kernel_init, name=f"dense{index}")(x)
            if self.position == "before":
                x = self._normalized(x, train, mask, index)
            self.sow("intermediates", "preactivation", x)
            x = self.activation(x)
            if self.position == "after":
                x = self._normalized(x, train, mask, index)
        return dense(self.num_classes, name="classifier")(x)

    def _normalized(
        self, x: jax.Array, train: bool, mask: jax.Array | None, index: int
    ) -> jax.Array:
        norm = self.norm
        if norm is not None and self.dtype is not None:
            norm = partial(norm, param_dtype=self.dtype)
        return apply_norm(norm, x, train, mask, self.dtype, f"norm{index}")


class ScannedMLP(nn.Module):
    """An `MLP` with hidden layers of equal width, whose program does not grow with its depth.

    The parameters and statistics of the first hidden layer are under ``first``. Those of all others
    are stacked, [depth - 1, ...], under ``hidden``.

    Attributes:
        depth: the number of hidden layers.
        width: the features of each.
        num_classes: number of logits.
        norm: constructor of the norms, or None.
    """

    depth: int
    width: int = 32
    num_classes: int = 10
    norm: Norm | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits [n, num_classes] of [n, features].

        The inputs of the activations are sown, [depth, n, width], as ``preactivation``.
        """
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "noise": True},
            length=self.depth - 1,
        )
        x, first = _Layer(self.width, self.norm, train, name="first")(x)
        x, others = layers(self.width, self.norm, train, name="hidden")(x)
        self.sow("intermediates", "preactivation", jnp.concatenate([first[None], others]))
        return nn.Dense(self.num_classes, name="classifier")(x)


class _Layer(nn.Module):
    """A dense layer, its norm and ReLU."""

    width: int
    norm: Norm | None
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        dense = nn.Dense(
            self.width, self.norm is None, kernel_init=nn.initializers.he_normal(), name="dense"
        )
        before = apply_norm(self.norm, dense(x), self.train, None, None)
        return nn.relu(before), before
