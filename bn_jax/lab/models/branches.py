"""How residual branches start: as any layer, or by SkipInit or Fixup in place of norms."""

from typing import Any, Literal

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from bn_jax.lab.models.layers import Norm

__all__ = [
    "BranchInit",
    "Scalar",
    "branch_kernels",
    "classify",
    "fixup_normal",
    "scale_branch",
    "shift",
]

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


def branch_kernels(
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


def shift(branch_init: BranchInit, x: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """Adds Fixup's scalar, which it has before every weight layer and activation."""
    return Scalar("bias", 0.0, dtype)(x) if branch_init == "fixup" else x


def scale_branch(branch_init: BranchInit, y: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """Multiplies a residual branch by the scalar of SkipInit or Fixup."""
    if branch_init == "plain":
        return y
    return Scalar("scale", 0.0 if branch_init == "skipinit" else 1.0, dtype)(y)


def classify(branch_init: BranchInit, features: jax.Array, num_classes: int) -> jax.Array:
    """Applies the linear classifier; with Fixup it starts at zero."""
    kernel_init = nn.initializers.lecun_normal()
    if branch_init == "fixup":
        kernel_init = nn.initializers.zeros
    features = shift(branch_init, features, None)
    return nn.Dense(num_classes, kernel_init=kernel_init, name="classifier")(features)
