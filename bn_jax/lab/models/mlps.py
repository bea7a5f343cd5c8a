"""Fully connected networks, plain and residual."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bn_jax.lab.models.branches import BranchInit, branch_kernels, classify, scale_branch, shift
from bn_jax.lab.models.layers import Norm, apply_norm

__all__ = ["MLP", "DenseBlock", "ResidualMLP"]


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
        return classify("plain", features, self.num_classes)


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
        shifted = partial(shift, self.branch_init, dtype=self.dtype)
        kernels = branch_kernels(self.branch_init, self.norm, self.depth, layers=2)
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
            y = dense(shifted(nn.relu(shifted(y))))
        return x + scale_branch(self.branch_init, y, self.dtype)


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
        x = nn.relu(shift(self.branch_init, x, self.dtype))
        features = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return classify(self.branch_init, features, self.num_classes)
