"""The standardization of the input, as the first operations of an exported program."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_MEAN, _MEAN_REST, _STD = "standardize/mean", "standardize/mean_rest", "standardize/std"


@dataclass(frozen=True)
class Standardization:
    """Subtracts a mean and divides by a deviation.

    Attributes:
        arrays: the mean and the deviation by name, in the rank of the input; empty: none.
    """

    arrays: dict[str, np.ndarray]

    def apply(self, params: Mapping[str, jax.Array], x: Any) -> Any:
        """Returns the standardized input, in its dtype, or as float32 if that is of integers."""
        if not self.arrays:
            return x
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
        mean, rest, std = params[_MEAN], params[_MEAN_REST], params[_STD]
        # Near the mean the first difference is exact. They are parameters and no constants, for
        # compilers add up constants.
        return ((x.astype(mean.dtype) - mean - rest) / std).astype(dtype)


def make_standardization(
    mean: ArrayLike | None, std: ArrayLike | None, args: tuple[Any, ...]
) -> Standardization:
    """Checks `mean` and `std` against the first of `args`, which are shapes.

    Raises:
        ValueError: they do not broadcast against an example, or are not finite or positive.
        TypeError: the first of `args` is not one array of real numbers.
    """
    if mean is None and std is None:
        return Standardization({})
    x = args[0]
    if not isinstance(x, jax.ShapeDtypeStruct) or not _is_real(x.dtype):
        received = x.dtype if isinstance(x, jax.ShapeDtypeStruct) else f"a {type(x).__name__}"
        raise TypeError(
            f"mean and std standardize the first of args, which is {received}, expected one array "
            "of real numbers: leave them out, and standardize in forward."
        )
    mean = _checked("mean", 0.0 if mean is None else mean, x.shape)
    std = _checked("std", 1.0 if std is None else std, x.shape)
    if not np.all(std > 0):
        raise ValueError(f"std is {std.min()} or less somewhere, expected positive numbers.")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rounded = mean.astype(dtype)
    rest = (mean - rounded).astype(dtype)
    return Standardization({_MEAN: rounded, _MEAN_REST: rest, _STD: std.astype(dtype)})


def _is_real(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))


def _checked(name: str, value: ArrayLike, shape: tuple[Any, ...]) -> np.ndarray:
    """Returns `mean` or `std` in float64, with as many axes as the input."""
    array = np.asarray(value, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} is not finite, expected finite numbers: check how it was made.")
    example = shape[1:]
    fits = array.ndim <= len(example) and all(
        size in (1, expected)
        for size, expected in zip(array.shape[::-1], example[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {array.shape}, which does not broadcast against an example, "
            f"{example}: pass a number, or an array of that shape or of sizes 1."
        )
    return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
