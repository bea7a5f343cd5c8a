"""Single arrays, from and to another library: order of axes, shape, dtype, debiased averages."""

from collections.abc import Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from bn_jax.convert.keys import Leaf, at_layer
from bn_jax.convert.kinds import Kind
from bn_jax.convert.layouts import Layout


def read(
    leaf: Leaf,
    arrays: Mapping[str, np.ndarray],
    layout: Layout,
    momentum: float,
    dtype: DTypeLike | None = None,
) -> np.ndarray:
    """Returns a leaf for Flax from the arrays of a library."""
    array = arrays[leaf.key]
    if leaf.is_count:
        # One for a norm, or one for each of its domains.
        counts = array.reshape(array.shape + (1,) * (len(leaf.shape) - array.ndim))
        return np.array(np.broadcast_to(counts, leaf.shape), leaf.dtype)
    if leaf.is_kernel and array.shape == shape_in_library(leaf, layout):
        array = _flipped(array.transpose(_axes(leaf, layout)), leaf, layout)
    dtype = _dtype_in_flax(array.dtype, leaf, dtype)
    if layout.counter is not None and leaf.name in ("mean", "var"):
        counter = arrays.get(at_layer(layout.counter, leaf.layer))
        if counter is not None and counter > 0:
            array = array.astype(_promoted(array.dtype, dtype))
            array = array / array.dtype.type(1 - momentum ** int(counter))
    return np.array(array.reshape(leaf.shape), dtype, order="C")


def write(leaf: Leaf, array: np.ndarray, layout: Layout) -> np.ndarray:
    """Returns the array of a library for a leaf of Flax."""
    if leaf.is_count:
        rows = array.reshape(len(array) if leaf.by_domain else 1, -1)
        for row in rows:
            if (row != row[0]).any():
                raise ValueError(
                    f"{leaf.path} has the counts {np.unique(row).tolist()}, expected the same for "
                    "all features, as in PyTorch: features that met a batch that was not finite "
                    "lag behind."
                )
        return np.array(rows[:, 0].reshape(shape_in_library(leaf, layout)), np.int64)
    array = array.reshape(leaf.merged)
    if leaf.is_kernel:
        array = _flipped(array, leaf, layout).transpose(np.argsort(_axes(leaf, layout)))
    return np.array(array, order="C")


def shape_in_library(leaf: Leaf, layout: Layout) -> tuple[int, ...]:
    """Returns the shape of a leaf in another library, as far as the leaf determines it."""
    if leaf.is_count:
        return leaf.shape[:1] if leaf.by_domain else ()
    if not leaf.is_kernel:
        return leaf.merged
    return tuple(leaf.merged[axis] for axis in np.argsort(_axes(leaf, layout)))


def fits(shape: tuple[int, ...], leaf: Leaf, layout: Layout) -> bool:
    """Tells whether an array of this shape in another library can be a leaf in Flax."""
    if shape == shape_in_library(leaf, layout):
        return True
    if leaf.is_kernel:
        return _is_split_depthwise(shape, leaf, layout)
    # Haiku and Equinox have axes of size 1 around the features.
    wide, narrow = ([size for size in sizes if size != 1] for sizes in (shape, leaf.merged))
    return layout.needs_like and wide == narrow


def _is_split_depthwise(shape: tuple[int, ...], leaf: Leaf, layout: Layout) -> bool:
    """Tells whether a shape is that of a depthwise kernel in Keras, ``[*s, in, multiplier]``."""
    if layout.kernel != "sio" or leaf.is_transposed or leaf.merged[-2] != 1:
        return False
    is_same_window = len(shape) == len(leaf.merged) and shape[:-2] == leaf.merged[:-2]
    return is_same_window and prod(shape[-2:]) == leaf.merged[-1]


def as_transposed(leaf: Leaf) -> Leaf:
    """Returns the leaf as if its layer were a transposed convolution."""
    return leaf._replace(kind=Kind("ConvTranspose"))


def may_be_transposed(leaf: Leaf, layout: Layout, *, is_received: bool) -> bool:
    """Tells whether nothing decides between a convolution and a transposed one.

    The kernel is of unknown kind, and both have the shape that the library's array has, or that is
    not `is_received`.
    """
    if leaf.kind is None or leaf.kind.name != "unknown" or not leaf.is_kernel:
        return False
    if layout.transposed_kernel == layout.kernel or len(leaf.merged) == 2:
        return False
    other = as_transposed(leaf)
    return not is_received or shape_in_library(leaf, layout) == shape_in_library(other, layout)


def _axes(leaf: Leaf, layout: Layout) -> tuple[int, ...]:
    """Returns the axes of a library's kernel in the order of Flax."""
    order = layout.transposed_kernel if leaf.is_transposed else layout.kernel
    order = order.replace("s", "s" * (len(leaf.merged) - 2))
    spatial = (axis for axis, kind in enumerate(order) if kind == "s")
    return (*spatial, order.index("i"), order.index("o"))


def _flipped(kernel: np.ndarray, leaf: Leaf, layout: Layout) -> np.ndarray:
    """Reverses the spatial axes of a kernel in the order of Flax, where the library does."""
    if leaf.is_transposed and layout.flips_transposed:
        return np.flip(kernel, tuple(range(kernel.ndim - 2)))
    return kernel


def _dtype_in_flax(dtype: np.dtype[Any], leaf: Leaf, wanted: DTypeLike | None) -> np.dtype[Any]:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return dtype
    wanted = dtype if wanted is None else jnp.dtype(wanted)
    if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.issubdtype(
        wanted, jnp.complexfloating
    ):
        raise TypeError(
            f"dtype={wanted} is real and {leaf.key} is {dtype}, expected a complex dtype or None: "
            "imaginary parts would be lost."
        )
    return _promoted(wanted, leaf.dtype) if leaf.name in ("mean", "var") else wanted


def _promoted(first: np.dtype[Any], second: np.dtype[Any]) -> np.dtype[Any]:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(first, second)
