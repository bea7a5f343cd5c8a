"""Checks of images and labels that arrive as arrays; each error says which fix works."""

import collections
import math
import os
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

__all__ = [
    "Array",
    "FloatArray",
    "IntArray",
    "Sizes",
    "check_bytes",
    "check_images",
    "check_labels",
    "check_memory",
    "check_not_swapped",
    "check_shape",
    "describe_shape",
]

FloatArray: TypeAlias = npt.NDArray[np.float32]
"""A NumPy array of float32."""
IntArray: TypeAlias = npt.NDArray[np.int32]
"""A NumPy array of int32."""
Array: TypeAlias = npt.NDArray[np.generic]

# What a float32 pixel takes in the dataset, in its three parts, and in the standardized parts.
BYTES_PER_PIXEL = 12
SIZES_LISTED = 5
# It numbers any labels, names too; so it is an advice that always works.
RENUMBER = "numpy.unique(y, return_inverse=True)[1]"


def check_not_swapped(x: Array, y: Array) -> None:
    """Raises an error if images are in the place of the labels.

    Args:
        x: the images, of any shape and dtype.
        y: the labels, of any shape and dtype.

    Raises:
        ValueError: they are swapped.
    """
    if x.ndim < 3 <= y.ndim:
        raise ValueError(
            f"array x has shape {x.shape} and array y {y.shape}, expected images in x and labels "
            "in y; swap them: numpy.savez(file, x=images, y=labels)"
        )


def check_images(x: Array) -> FloatArray:
    """Returns images as float32 with a channel axis.

    Args:
        x: real numbers [N, H, W] or [N, H, W, C].

    Returns:
        The images [N, H, W, C].

    Raises:
        ValueError: the shape or the dtype is another, or a number is not finite.
    """
    if x.ndim not in (3, 4) or x.size == 0:
        raise ValueError(
            f"array x has shape {x.shape}, expected non-empty [N, H, W] or [N, H, W, C]; "
            f"{_how_to_reshape(x.shape)}"
        )
    # JAX knows bfloat16, which NumPy has no kind for.
    if x.dtype.kind not in "iu" and not jnp.issubdtype(x.dtype, np.floating):
        raise ValueError(
            f"array x has dtype {_describe_dtype(x.dtype)}, expected real numbers; "
            f"{_how_to_cast_images(x.dtype)}"
        )
    with np.errstate(over="ignore"):
        images = x.astype(np.float32)
    is_finite = np.isfinite(images)
    if not is_finite.all():
        raise ValueError(
            "array x holds NaN, infinity or numbers beyond float32, expected finite numbers "
            f"({int(is_finite.size - is_finite.sum()):,} of {is_finite.size:,} are not, the first "
            f"in image {int(np.argmin(is_finite)) // math.prod(x.shape[1:])}); remove or replace "
            "them"
        )
    return images[..., None] if images.ndim == 3 else images


def _how_to_reshape(shape: tuple[int, ...]) -> str:
    if len(shape) == 2 and shape[1] > 3:
        for channels in (1, 3):
            side = math.isqrt(shape[1] // channels)
            if channels * side * side == shape[1]:
                size = f"{side}, {side}" if channels == 1 else f"{side}, {side}, {channels}"
                first = f", or x.reshape(-1, {channels}, {side}, {side}).transpose(0, 2, 3, 1)"
                return f"reshape it, e.g. x.reshape(-1, {size})" + (first if channels > 1 else "")
    return "reshape it"


def _describe_dtype(dtype: np.dtype[np.generic]) -> str:
    if dtype.names:
        return f"records with the fields {', '.join(dtype.names)}"
    return str(dtype)


def _how_to_cast_images(dtype: np.dtype[np.generic]) -> str:
    if dtype.names:
        return "store the numbers alone, in one array"
    match dtype.kind:
        case "V":
            return (
                "NumPy stores bfloat16 and other dtypes that it lacks as raw bytes: cast before "
                "saving, x.astype('float32')"
            )
        case "O":
            return (
                "if images differ in size, bring them to one size, and then join them by "
                "numpy.stack(images)"
            )
        case "c":
            return "keep a real part or an absolute value, e.g. numpy.abs(x)"
    return "cast it, e.g. x.astype('float32')"


def check_labels(y: Array, x: Array, num_classes: int | None) -> IntArray:
    """Returns labels as int32.

    Args:
        y: integers [N] from 0.
        x: the images [N, ...].
        num_classes: number of classes. None: at most N.

    Returns:
        The labels [N].

    Raises:
        ValueError: the shape, the dtype or a value is another.
    """
    if y.shape != x.shape[:1]:
        raise ValueError(
            f"array y has shape {y.shape}, expected ({len(x)},), one label per image of x"
            f"{_how_to_reshape_labels(y, x)}"
        )
    if y.dtype.kind not in "iu":
        raise ValueError(
            f"array y has dtype {_describe_dtype(y.dtype)}, expected integers; "
            f"{_how_to_cast_labels(y)}"
        )
    limit = len(x) if num_classes is None else num_classes
    if y.min() < 0 or y.max() >= limit:
        reason = "examples" if num_classes is None else "classes"
        fix = f", e.g. y = {RENUMBER}" if num_classes is None else " as in training"
        raise ValueError(
            f"array y holds labels from {y.min()} to {y.max()}, expected 0 to {limit - 1} "
            f"({limit} {reason}); number the classes from 0{fix}"
        )
    return y.astype(np.int32)


def _how_to_reshape_labels(y: Array, x: Array) -> str:
    if y.size == len(x):
        return "; reshape it: y.reshape(-1)"
    if _is_one_hot(y) and len(y) == len(x):
        return ", not one-hot; convert them: numpy.argmax(y, axis=1)"
    if y.size == x.shape[-1] and y.ndim <= 2:
        return (
            f"; x seems to have its {y.size} images along the last axis: "
            "x = numpy.moveaxis(x, -1, 0)"
        )
    if y.ndim == 1:
        return f"; {'remove' if len(y) > len(x) else 'add'} labels"
    return "; write an array of one axis"


def _is_one_hot(y: Array) -> bool:
    if y.ndim != 2 or y.shape[1] < 2 or y.dtype.kind not in "biuf":
        return False
    return bool(((y == 0) | (y == 1)).all() and ((y != 0).sum(axis=1) == 1).all())


def _how_to_cast_labels(y: Array) -> str:
    if y.dtype.names:
        return "store the labels alone, in one array"
    match y.dtype.kind:
        case "b":
            return "cast it: y.astype('int32')"
        case "V":
            return "cast it before saving: y.astype('int32')"
        case "f":
            values = y.astype(np.float64)
            is_whole = np.isfinite(values) & (values == np.floor(values))
            if is_whole.all():
                return "cast it, e.g. y.astype('int32')"
            if not np.isfinite(values).all():
                return "it holds NaN or infinity: remove these examples"
            return (
                f"it holds {values[~is_whole][0]:g}, which is no number of a class: number the "
                f"classes, e.g. y = {RENUMBER}"
            )
    return f"number the classes, e.g. y = {RENUMBER}"


def check_shape(x: Array, expected: tuple[int, ...]) -> None:
    """Raises an error if images are not of the shape that a model takes.

    Args:
        x: the images [N, H, W, C].
        expected: [H, W, C].

    Raises:
        ValueError: the shape is another.
    """
    shape = x.shape[1:]
    if shape == expected:
        return
    fix = "resize them"
    if shape == (expected[2], *expected[:2]):
        fix = "they have their channels first: x.transpose(0, 2, 3, 1)"
    elif shape[:2] == expected[:2]:
        fix = "give images with as many channels"
    raise ValueError(
        f"received images of shape {shape}, expected {expected} [H, W, C] as the run was trained "
        f"on; {fix}"
    )


def check_memory(examples: int, shape: tuple[int, ...]) -> None:
    """Raises an error if a dataset cannot fit into the memory of this machine.

    Args:
        examples: number of images.
        shape: of one.

    Raises:
        ValueError: it does not fit.
    """
    needed = BYTES_PER_PIXEL * examples * math.prod(shape)
    check_bytes(needed, f"{examples:,} images of {describe_shape(shape)} need ")


def check_bytes(needed: int, what: str = "its arrays need ") -> None:
    """Raises an error if something cannot fit into the memory of this machine.

    Args:
        needed: number of bytes.
        what: needs them, for the message.

    Raises:
        ValueError: it does not fit.
    """
    present = _physical_memory()
    if present is not None and needed > present:
        raise ValueError(
            f"{what}{needed / 1e9:,.1f} GB of memory, expected at most the {present / 1e9:,.1f} GB "
            "of this machine; give fewer or smaller images"
        )


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def describe_shape(shape: tuple[int, ...]) -> str:
    """Returns a shape as text, such as ``32x48``: height, then width."""
    return "x".join(map(str, shape))


class Sizes:
    """Counts images by their size, to list them where they differ."""

    def __init__(self) -> None:
        self._counts: collections.Counter[tuple[int, ...]] = collections.Counter()
        self._first: dict[tuple[int, ...], str] = {}

    def add(self, size: tuple[int, ...], name: str, count: int = 1) -> bool:
        """Counts images.

        Args:
            size: [H, W] or [H, W, C].
            name: of an image of this size.
            count: how many there are.

        Returns:
            Whether all images so far are of one size.
        """
        self._counts[size] += count
        self._first.setdefault(size, name)
        return len(self._counts) == 1

    def __len__(self) -> int:
        return len(self._counts)

    def __str__(self) -> str:
        """Returns the sizes, the most frequent first, with their counts and an example of each."""
        parts = [
            f"{describe_shape(size)} ({count} images, e.g. {self._first[size]})"
            if count > 1
            else f"{describe_shape(size)} (1 image, {self._first[size]})"
            for size, count in self._counts.most_common(SIZES_LISTED)
        ]
        more = len(self) - SIZES_LISTED
        return ", ".join(parts) + (f" and {more} more sizes" if more > 0 else "")

    def check_all_are(self, expected: tuple[int, ...] | None) -> None:
        """Raises an error if images differ in size.

        Args:
            expected: the size that a model takes. None: any one.

        Raises:
            ValueError: there is another size, or there are several.
        """
        if len(self) == 1 and (expected is None or expected in self._counts):
            return
        wanted = "one" if expected is None else f"{describe_shape(expected)} as in training"
        raise ValueError(
            f"images have the size (height x width) {self}, expected {wanted}; resize or crop "
            "them, e.g. with PIL.ImageOps.fit(image, (width, height))"
        )
