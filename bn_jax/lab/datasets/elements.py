"""Elements of an iterable of labelled images: one example or a batch, as any loader yields them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Element", "read_element"]

KEYS = (("x", "y"), ("image", "label"), ("images", "labels"))
EXPECTED = "(x, y), {'x': x, 'y': y} or {'image': x, 'label': y}, of one example or of a batch"


class Element(NamedTuple):
    """What an element holds, as a batch.

    Attributes:
        x: images [B, ...]; B may be 0 if all examples are masked.
        y: labels [B].
    """

    x: npt.NDArray[np.generic]
    y: npt.NDArray[np.generic]


def read_element(element: Any, number: int) -> Element:
    """Reads an element of an iterable.

    Args:
        element: a pair or a mapping of an image and its label, or of a batch of images and their
            labels. A batch may have a mask, as `bn_jax.training.Batch` has; examples that it
            excludes are left out.
        number: of the element in its iterable, from 0, for messages.

    Returns:
        Its images and labels.

    Raises:
        TypeError: the element is neither.
        ValueError: images and labels do not fit together.
    """
    image, label, mask = _parts_of(element, number)
    x, y = _as_array(image, "x", number), _as_array(label, "y", number)
    if y.ndim == 0:
        return Element(x[None], y[None])
    if y.ndim != 1 or x.ndim < 3 or len(x) != len(y):
        advice = "give an integer for an image, or a label for each image of a batch"
        raise ValueError(
            f"element {number} of source has x of shape {x.shape} and y of shape {y.shape}, "
            f"expected an image and one label, or as many images as labels; {advice}"
        )
    if mask is None:
        return Element(x, y)
    kept = np.asarray(mask, bool)
    if kept.shape != y.shape:
        raise ValueError(
            f"element {number} of source has a mask of shape {kept.shape}, expected {y.shape}, as "
            "its labels; give one value for each example"
        )
    return Element(x[kept], y[kept])


def _parts_of(element: Any, number: int) -> tuple[Any, Any, Any]:
    if isinstance(element, Mapping):
        for x, y in KEYS:
            if x in element and y in element:
                return element[x], element[y], element.get("mask")
        raise TypeError(
            f"element {number} of source has the keys {sorted(map(str, element))}, expected "
            f"{EXPECTED}; rename them"
        )
    if hasattr(element, "x") and hasattr(element, "y"):
        return element.x, element.y, getattr(element, "mask", None)
    if isinstance(element, tuple | list) and len(element) == 2:
        return element[0], element[1], None
    what = type(element).__name__
    if hasattr(element, "shape"):
        what = f"an array of shape {tuple(element.shape)}"
    elif isinstance(element, tuple | list):
        what = f"a {what} of {len(element)}"
    raise TypeError(
        f"element {number} of source is {what}, expected {EXPECTED}; for two arrays of all images "
        "and labels use Dataset(x, y), or zip(x, y)"
    )


def _as_array(value: Any, name: str, number: int) -> npt.NDArray[np.generic]:
    """Returns a part as a NumPy array; those of JAX, PyTorch and TensorFlow convert themselves."""
    where = f"{name} of element {number} of source"
    if hasattr(value, "getpixel"):
        from bn_jax.lab import images

        try:
            return images.pixels_of(value)
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error
    try:
        return np.asarray(value)
    except Exception as error:
        # Other libraries raise what they like, and lists may be ragged.
        raise ValueError(
            f"{where} is no array of numbers ({error}); convert it with numpy.asarray"
        ) from error
