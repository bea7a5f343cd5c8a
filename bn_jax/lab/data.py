"""Labelled images: loading, splitting, standardizing, and padded batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bn_jax.training import Batch, pad_batch

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


class Dataset(NamedTuple):
    """Images `x`, float32 [N, H, W, C], and their labels `y`, int32 [N]."""

    x: FloatArray
    y: IntArray


class Splits(NamedTuple):
    """Three disjoint parts that cover a dataset."""

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
        num_classes: how many classes there are. None: as many as examples at most.

    Returns:
        The dataset; `x` has a channel axis.

    Raises:
        ValueError: the file cannot be read, or an array is missing or is not as described.
    """
    arrays = _read_arrays(path)
    x = _checked_images(arrays["x"])
    return Dataset(x, _checked_labels(arrays["y"], len(x), num_classes))


def _read_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    arrays = {}
    try:
        # NumPy leaves a file that it opens itself open when it is not a zip archive.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array without a name")
            missing = {"x", "y"} - set(file.files)
            if not missing:
                arrays = {name: np.asarray(file[name]) for name in ("x", "y")}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give the path of an .npz file") from None
    except Exception as error:
        # The bytes are anybody's: zip, zlib, NumPy's header parser and the file system each
        # raise their own kinds.
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
            f"received {examples} examples, expected at least 3, one each to train, validate and "
            "test; add examples"
        )
    order = np.random.default_rng(seed).permutation(examples)
    validation, test = max(1, examples // 10), max(1, examples // 5)
    parts = np.split(order, [examples - validation - test, examples - test])
    return Splits(*(Dataset(dataset.x[part], dataset.y[part]) for part in parts))


def mean_and_std(dataset: Dataset) -> tuple[float, float]:
    """Computes the mean and standard deviation over all pixels and channels.

    Args:
        dataset: the training part, so that nothing of the other parts leaks into the inputs.

    Returns:
        Two Python floats.

    Raises:
        ValueError: all pixels are equal.
    """
    std = float(dataset.x.std(dtype=np.float64))
    if std == 0:
        raise ValueError(
            f"every pixel of x in the training part is {dataset.x.flat[0]}, expected images that "
            "differ; check how x was written"
        )
    return float(dataset.x.mean(dtype=np.float64)), std


def standardize(dataset: Dataset, mean: float, std: float) -> Dataset:
    """Subtracts `mean` from the images and divides them by `std`.

    Args:
        dataset: any images.
        mean: a scalar.
        std: a positive scalar.

    Returns:
        The dataset with new images and the same labels.
    """
    # In float64: in float32 an x of mean 1e6 and std 1 would lose its digits in the subtraction.
    return dataset._replace(x=((dataset.x.astype(np.float64) - mean) / std).astype(np.float32))


def batches(
    dataset: Dataset,
    batch_size: int,
    rng: np.random.Generator | None = None,
    rows: slice = slice(None),
) -> Iterator[Batch]:
    """Yields every example exactly once, in batches of one size.

    Args:
        dataset: the examples.
        batch_size: the size of every batch; the last is padded by `pad_batch`.
        rng: shuffles the examples. None: they come in order.
        rows: the part of every batch to make, where other processes make the rest.

    Yields:
        The `rows` of batches of `batch_size`.
    """
    examples = len(dataset.y)
    order = np.arange(examples) if rng is None else rng.permutation(examples)
    size = len(range(batch_size)[rows])
    for start in range(0, examples, batch_size):
        index = order[start : start + batch_size][rows]
        yield pad_batch(dataset.x[index], dataset.y[index], size)
