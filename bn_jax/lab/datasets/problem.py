"""The data that a run learns: loaded, split and standardized."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from bn_jax.lab import data, images
from bn_jax.lab.datasets import oddities
from bn_jax.lab.errors import CommandError

__all__ = ["Problem", "Source", "Trained", "describe_ignored", "load", "load_labelled"]


Source: TypeAlias = Path | data.Dataset | data.NamedDataset | None


class Problem(NamedTuple):
    """A dataset to learn.

    Attributes:
        splits: its parts, standardized.
        test_images: the images of the test part as they were.
        mean: the mean of the training part's pixels, by which all parts are standardized.
        std: their standard deviation.
        num_classes: number of classes.
        class_names: their names in the order of the labels. None: they have none.
        sha256: of the dataset.
        oddities: what looks like a mistake, a line for each.
    """

    splits: data.Splits
    test_images: data.FloatArray
    mean: float
    std: float
    num_classes: int
    class_names: tuple[str, ...] | None
    sha256: str
    oddities: tuple[str, ...]

    @property
    def examples(self) -> int:
        """The examples of all parts."""
        return sum(len(part.y) for part in self.splits)


def load(source: Source, seed: int) -> Problem:
    """Loads and splits a dataset, and standardizes its parts.

    Args:
        source: an `.npz` file, a folder with a subfolder of images for each class, or a dataset,
            perhaps with the names of its classes. None: scikit-learn's digits.
        seed: of the split.

    Raises:
        CommandError: the data are not as `bn-jax train --help` describes them.
    """
    try:
        named = _load_checked(source)
        dataset, class_names = named
        splits = data.split(dataset, seed)
        mean, std = data.mean_and_std(splits.train)
        ignored = describe_ignored(source)
    except ValueError as error:
        raise CommandError(f"--data: {error}") from error
    num_classes = int(dataset.y.max()) + 1
    if class_names is not None:
        num_classes = len(class_names)
    if num_classes == 1:
        raise CommandError(
            "--data: array y holds only label 0, expected at least 2 classes; check the labels"
        )
    found = () if source is None else oddities.find_oddities(named, splits)
    return Problem(
        splits=data.Splits(*(data.standardize(part, mean, std) for part in splits)),
        test_images=splits.test.x,
        mean=mean,
        std=std,
        num_classes=num_classes,
        class_names=class_names,
        sha256=_sha256(named),
        oddities=(*ignored, *found),
    )


def _load_checked(source: Source) -> data.NamedDataset:
    if isinstance(source, data.Dataset):
        named = data.NamedDataset(data.check_dataset(source), None)
    elif isinstance(source, data.NamedDataset):
        named = source._replace(dataset=data.check_dataset(source.dataset))
    else:
        named = load_labelled(source)
    if named.class_names is not None:
        data.check_class_names(named.class_names, named.dataset)
    return named


class Trained(Protocol):
    """What a model says of its images; a class without a name is named by its label."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Their names in the order of the labels."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """[H, W, C] of an image."""


def load_labelled(path: Path | None, model: Trained | None = None) -> data.NamedDataset:
    """Loads what the option --data names.

    Args:
        path: an `.npz` file, or a folder with a subfolder of images for each class. None:
            scikit-learn's digits.
        model: for which the images are. None: it is still to be trained.

    Raises:
        ValueError: the data are not as described.
    """
    if path is None:
        return data.NamedDataset(data.load_digits(), None)
    if not os.path.isdir(path):
        dataset = data.load_npz(path, None if model is None else model.num_classes)
        names = data.load_class_names(path)
        _check_same_names(names, None if model is None else model.class_names)
        return data.NamedDataset(dataset, names)
    if model is None:
        return images.load_folder(path)
    classes = model.class_names or [str(label) for label in range(model.num_classes)]
    return images.load_folder(path, classes, model.image_shape)


def _check_same_names(names: tuple[str, ...] | None, known: tuple[str, ...] | None) -> None:
    if names is not None and known is not None and names != known:
        raise ValueError(
            f"array class_names is {list(names)}, expected {list(known)} as in training; number "
            "the labels as the run does, or leave class_names out if they are so"
        )


def describe_ignored(source: Source) -> list[str]:
    """Describes the files of a folder that were ignored, in a line, or in none.

    Args:
        source: as for `load`.
    """
    if not isinstance(source, Path) or not os.path.isdir(source):
        return []
    ignored = images.describe_ignored(source)
    return [] if ignored is None else [ignored]


def _sha256(named: data.NamedDataset) -> str:
    dataset, class_names = named
    digest = hashlib.sha256(f"{dataset.x.shape}".encode())
    digest.update(dataset.x.tobytes())
    digest.update(dataset.y.tobytes())
    if class_names is not None:
        digest.update(json.dumps(class_names).encode())
    return digest.hexdigest()
