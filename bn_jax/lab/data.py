"""Labelled images: loaded, split, standardized, and cut into padded batches."""

import io
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bn_jax.lab.console.arguments import are_distinct_names
from bn_jax.lab.datasets.array_checks import (
    Array,
    FloatArray,
    IntArray,
    Sizes,
    check_bytes,
    check_images,
    check_labels,
    check_memory,
    check_not_swapped,
)
from bn_jax.lab.datasets.elements import read_element
from bn_jax.lab.files.reading import open_regular
from bn_jax.training import Batch, pad_batch

__all__ = [
    "Dataset",
    "FloatArray",
    "IntArray",
    "NamedDataset",
    "Splits",
    "batches",
    "check_class_names",
    "check_dataset",
    "from_iterable",
    "load_class_names",
    "load_digits",
    "load_images",
    "load_npz",
    "mean_and_std",
    "save_npz",
    "split",
    "standardize",
]

# What is to be written in the place of an array, in advice.
MEANINGS = {"x": "images", "y": "labels", "class_names": "names"}
# More examples than a dataset in memory has: a source that yields more may be endless.
ENDLESS = 2_000_000
# How NumPy's message about an array begins that would have to be unpickled.
OBJECTS = "Object arrays"


class Dataset(NamedTuple):
    """Labelled images.

    Attributes:
        x: images, float32 [N, H, W, C].
        y: labels, int32 [N].
    """

    x: FloatArray
    y: IntArray


class NamedDataset(NamedTuple):
    """Labelled images with the names of their classes.

    Attributes:
        dataset: the images and labels.
        class_names: in the order of the labels. None: the classes have no names.
    """

    dataset: Dataset
    class_names: tuple[str, ...] | None


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
            [N] from 0 to the number of classes minus one. Others are ignored.
        num_classes: number of classes. None: at most the number of examples.

    Returns:
        The dataset; `x` has a channel axis.

    Raises:
        ValueError: the file cannot be read, or an array is missing or not as described.
    """
    arrays = _read_arrays(path, ("x", "y"))
    return _check(arrays["x"], arrays["y"], num_classes)


def load_class_names(path: Path) -> tuple[str, ...] | None:
    """Loads the names of the classes from an `.npz` file.

    Args:
        path: a file that may have the array `class_names`, strings in the order of the labels.

    Returns:
        The names; None if the file has no such array.

    Raises:
        ValueError: the file cannot be read, or the array is not as described.
    """
    names = _read_arrays(path, (), ("class_names",)).get("class_names")
    if names is None:
        return None
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(
            f"array class_names has shape {names.shape} and dtype {names.dtype}, expected strings, "
            "one for each class; write it as numpy.array(['first', ...])"
        )
    return tuple(map(str, names))


def load_images(path: Path) -> FloatArray:
    """Loads images without labels from an `.npz` file.

    Args:
        path: a file with the array `x`, real numbers [N, H, W] or [N, H, W, C]. Others are ignored.

    Returns:
        The images, with a channel axis.

    Raises:
        ValueError: the file cannot be read, or `x` is missing or not as described.
    """
    return check_images(_read_arrays(path, ("x",))["x"])


def save_npz(path: Path, dataset: Dataset, class_names: Sequence[str] | None = None) -> None:
    """Saves a dataset as `load_npz` and `load_class_names` read it.

    Args:
        path: of the file, which ends in `.npz`.
        dataset: any images and labels.
        class_names: the names of the classes in the order of the labels.
    """
    names: dict[str, Any] = {}
    if class_names is not None:
        names["class_names"] = np.array(class_names)
    # NumPy leaves half a file, and complains of it later, where the disk is full.
    arrays = io.BytesIO()
    np.savez_compressed(arrays, x=dataset.x, y=dataset.y, **names)
    path.write_bytes(arrays.getvalue())


def _read_arrays(
    path: Path, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Array]:
    how = f"numpy.savez(file, {', '.join(f'{n}={MEANINGS[n]}' for n in required or optional)})"
    arrays = {}
    name = ""
    try:
        # Opened here, because NumPy does not close a file that is no zip archive.
        with open_regular(path) as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array without a name")
            members = file.zip.infolist() if file.zip else []
            check_bytes(sum(member.file_size for member in members))
            present = set(file.files)
            missing = sorted(set(required) - present)
            if not missing:
                for name in sorted(present & {*required, *optional}):
                    arrays[name] = np.asarray(file[name])
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give the path of an .npz file") from None
    except Exception as error:
        # The file may hold anything: zip, zlib, NumPy's header parser and the file system raise
        # errors of different types.
        if isinstance(error, ValueError) and str(error).startswith(OBJECTS):
            raise ValueError(
                f"array {name} of {path} holds Python objects, which are never unpickled, expected "
                "numbers; images of one size are joined by numpy.stack(images), and labels by "
                "numpy.array(labels)"
            ) from error
        raise ValueError(
            f"{path} cannot be read as an .npz file of numbers ({error}); write it with {how}"
        ) from error
    if missing:
        raise ValueError(
            f"{path} holds no array {' and no array '.join(map(repr, missing))}, only "
            f"{sorted(present)}; write it with {how}"
        )
    return arrays


def check_dataset(dataset: Dataset) -> Dataset:
    """Checks a dataset that was made from arrays, as `load_npz` checks a file.

    Args:
        dataset: images and labels, perhaps of other shapes and dtypes than `Dataset` says.

    Returns:
        The dataset as `Dataset` says.

    Raises:
        ValueError: an array is not as `load_npz` describes it.
    """
    return _check(np.asarray(dataset.x), np.asarray(dataset.y), None)


def _check(x: Array, y: Array, num_classes: int | None) -> Dataset:
    check_not_swapped(x, y)
    images = check_images(x)
    return Dataset(images, check_labels(y, images, num_classes))


def check_class_names(class_names: Sequence[str], dataset: Dataset) -> None:
    """Raises an error if names of classes do not fit a dataset, or cannot be printed.

    Args:
        class_names: in the order of the labels.
        dataset: whose labels they name.

    Raises:
        ValueError: a class has no name, or two have the same; or a name has control characters.
    """
    classes = int(dataset.y.max()) + 1
    if len(class_names) < classes:
        raise ValueError(
            f"class_names has {len(class_names)} names, expected {classes} or more, one for each "
            "class; add names"
        )
    if not are_distinct_names(class_names):
        raise ValueError(
            "class_names has equal or empty names, or control characters, expected a name for each "
            "class; rename them"
        )


def from_iterable(source: Iterable[Any], *, max_examples: int | None = None) -> Dataset:
    """Loads images and labels from any Python iterable: a Grain dataset, a generator, a loader.

    Args:
        source: yields examples or batches: ``(x, y)``, ``{"x": x, "y": y}`` or
            ``{"image": x, "label": y}``. An image is [H, W] or [H, W, C], a batch [B, H, W] or
            [B, H, W, C]; labels are integers from 0. Arrays may be those of any library that
            converts to NumPy. Examples that the ``mask`` of a batch excludes are left out.
        max_examples: the number of examples to take from the start of `source`, which may be
            endless. None: all of them.

    Returns:
        The dataset, in memory.

    Raises:
        TypeError: `source` is not iterable, or an element is nothing of the above.
        ValueError: `source` is empty, endless, or larger than the memory of this machine; images
            differ in size; or images or labels are not as described.

    Example:
        >>> import numpy as np
        >>> from bn_jax.lab import data
        >>> examples = [{"image": np.full((8, 8), i), "label": i % 2} for i in range(6)]
        >>> dataset = data.from_iterable(examples)
        >>> dataset.x.shape, dataset.y.tolist()
        ((6, 8, 8, 1), [0, 1, 0, 1, 0, 1])
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples is {max_examples}, expected at least 1; raise it")
    images: list[Array] = []
    labels: list[Array] = []
    sizes = Sizes()
    examples = 0
    for number, element in enumerate(_iterate(source, max_examples)):
        x, y = read_element(element, number)
        examples += len(y)
        if len(y) and sizes.add(x.shape[1:], f"element {number}", len(y)):
            images.append(x)
            labels.append(y)
            check_memory(examples, x.shape[1:])
        elif len(y):
            # The images of a second size are only counted.
            images.clear()
        if max_examples is None:
            _check_not_endless(max(examples, number + 1))
        elif examples >= max_examples:
            break
    if not examples:
        raise ValueError(
            "source yielded no example; an iterator can be read only once, so make a new one"
        )
    sizes.check_all_are(None)
    x, y = (np.concatenate(parts)[:max_examples] for parts in (images, labels))
    return _check(x, y, None)


def _iterate(source: Iterable[Any], max_examples: int | None) -> Iterator[Any]:
    if isinstance(source, str | bytes | os.PathLike | Mapping) or not isinstance(source, Iterable):
        raise TypeError(
            f"source is of type {type(source).__name__}, expected an iterable of examples or "
            "batches; for an .npz file use load_npz(path), for two arrays zip(x, y)"
        )
    # Grain gives an endless dataset the length sys.maxsize; the length of other loaders may be
    # unknown, which is a TypeError of `len`.
    if max_examples is None:
        _check_not_endless(operator.length_hint(source))
    return iter(source)


def _check_not_endless(examples: int) -> None:
    if examples > ENDLESS:
        raise ValueError(
            f"source yields more than {ENDLESS:,} examples and may be endless, expected a finite "
            "one; say how many to take with max_examples"
        )


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
