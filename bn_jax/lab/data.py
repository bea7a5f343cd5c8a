"""Labelled images: loaded, split, standardized, and cut into padded batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bn_jax.training import Batch, pad_batch

__all__ = [
    "Dataset",
    "FloatArray",
    "IntArray",
    "Splits",
    "batches",
    "load_digits",
    "load_npz",
    "mean_and_std",
    "split",
    "standardize",
]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


class Dataset(NamedTuple):
    """Labelled images.

    Attributes:
        x: images, float32 [N, H, W, C].
        y: labels, int32 [N].
    """

    x: FloatArray
    y: IntArray


class Splits(NamedTuple):
    """The three parts of a dataset; each example is in exactly one of them."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load_digits() -> Dataset:
    """Loads scikit-learn's handwritten digits: 1,797 images [8, 8, 1], pixels 0 to 16, 10 classes.

    Returns:
        The dataset, in scikit-learn's order.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    return Dataset(
        np.asarray(digits.images[..., None], np.float32), np.asarray(digits.target, np.int32)
    )


def load_npz(path: Path, num_classes: int | None = None) -> Dataset:
    """Loads images and labels from an `.npz` file.

    Args:
        path: a file with the arrays `x`, real numbers [N, H, W] or [N, H, W, C], and `y`, integers
            [N] from 0 to the number of classes minus one.
        num_classes: number of classes. None: at most the number of examples.

    Returns:
        The dataset; `x` has a channel axis.

    Raises:
        ValueError: the file cannot be read, or an array is missing or not as described.
    """
    arrays = _read_arrays(path)
    x = _checked_images(arrays["x"])
    return Dataset(x, _checked_labels(arrays["y"], len(x), num_classes))


def _read_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    arrays = {}
    try:
        # Opened here, because NumPy does not close a file that is no zip archive.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array without a name")
            missing = {"x", "y"} - set(file.files)
            if not missing:
                arrays = {name: np.asarray(file[name]) for name in ("x", "y")}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give the path of an .npz file") from None
    except Exception as error:
        # The file may hold anything: zip, zlib, NumPy's header parser and the file system raise
        # errors of different types.
        raise ValueError(
            f"{path} cannot be read as an .npz file of numbers ({error}); "
            "write it with numpy.savez(file, x=images, y=labels)"
        ) from error
    if missing:
        raise ValueError(
            f"{path} holds no array {' and no array '.join(map(repr, sorted(missing)))}, only "
            f"{sorted(file.files)}; write it with numpy.savez(file, x=images, y=labels)"
        )
    return arrays


def _checked_images(x: npt.NDArray[np.generic]) -> FloatArray:
    if x.ndim not in (3, 4) or x.size == 0:
        raise ValueError(
            f"array x has shape {x.shape}, expected non-empty [N, H, W] or [N, H, W, C]; reshape it"
        )
    if x.dtype.kind not in "iuf":
        raise ValueError(
            f"array x has dtype {x.dtype}, expected real numbers; cast it, e.g. x.astype('float32')"
        )
    with np.errstate(over="ignore"):
        images = x.astype(np.float32)
    if not np.isfinite(images).all():
        raise ValueError(
            "array x holds NaN, infinity or numbers beyond float32, expected finite numbers; "
            "remove or replace them"
        )
    return images[..., None] if images.ndim == 3 else images


def _checked_labels(y: npt.NDArray[np.generic], examples: int, num_classes: int | None) -> IntArray:
    if y.shape != (examples,):
        raise ValueError(
            f"array y has shape {y.shape}, expected ({examples},), one label per image of x"
        )
    if y.dtype.kind not in "iu":
        raise ValueError(
            f"array y has dtype {y.dtype}, expected integers; cast it, e.g. y.astype('int32')"
        )
    limit = examples if num_classes is None else num_classes
    if y.min() < 0 or y.max() >= limit:
        reason = "examples" if num_classes is None else "classes"
        raise ValueError(
            f"array y holds labels from {y.min()} to {y.max()}, expected 0 to {limit - 1} "
            f"({limit} {reason}); number the classes from 0"
        )
    return y.astype(np.int32)


def split(dataset: Dataset, seed: int) -> Splits:
    """Splits a dataset at random into 70 % training, 10 % validation and 20 % test.

    Args:
        dataset: at least 3 examples.
        seed: the same seed and number of examples give the same parts.

    Returns:
        The three parts; none is empty, and every example is in exactly one.

    Raises:
        ValueError: there are fewer than 3 examples.
    """
    examples = len(dataset.y)
    if examples < 3:
        raise ValueError(
            f"received {examples} examples, expected at least 3, for training, validation and "
            "test; add examples"
        )
    order = np.random.default_rng(seed).permutation(examples)
    validation, test = max(1, examples // 10), max(1, examples // 5)
    parts = np.split(order, [examples - validation - test, examples - test])
    return Splits(*(Dataset(dataset.x[part], dataset.y[part]) for part in parts))


def mean_and_std(dataset: Dataset) -> tuple[float, float]:
    """Computes the mean and standard deviation over all pixels and channels.

    Args:
        dataset: the training part, so that the inputs do not depend on the other parts.

    Returns:
        Two Python floats.

    Raises:
        ValueError: all pixels are equal.
    """
    std = float(dataset.x.std(dtype=np.float64))
    if std == 0:
        raise ValueError(
            f"every pixel of x in the training part is {dataset.x.flat[0]}, expected different "
            "images; check how x was written"
        )
    return float(dataset.x.mean(dtype=np.float64)), std


def standardize(dataset: Dataset, mean: float, std: float) -> Dataset:
    """Subtracts `mean` from the images and divides them by `std`.

    Args:
        dataset: any images.
        mean: a scalar.
        std: a positive scalar.

    Returns:
        A dataset of standardized images with the same labels.
    """
    # In float64, because the subtraction would leave no digits of a float32 x of mean 1e6, std 1.
    return dataset._replace(x=((dataset.x.astype(np.float64) - mean) / std).astype(np.float32))


def batches(
    dataset: Dataset,
    batch_size: int,
    rng: np.random.Generator | None = None,
    rows: slice = slice(None),
) -> Iterator[Batch]:
    """Yields every example exactly once, in batches of equal size.

    Args:
        dataset: the examples.
        batch_size: the size of every batch; the last is padded and masked.
        rng: shuffles the examples. None: they stay in order.
        rows: the rows of every batch that this process needs (see `bn_jax.training.process_rows`).

    Yields:
        The `rows` of batches of `batch_size`.
    """
    examples = len(dataset.y)
    order = np.arange(examples) if rng is None else rng.permutation(examples)
    size = len(range(batch_size)[rows])
    for start in range(0, examples, batch_size):
        index = order[start : start + batch_size][rows]
        yield pad_batch(dataset.x[index], dataset.y[index], size)
