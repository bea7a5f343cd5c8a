"""The data that a run learns: loaded, split and standardized."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple, Protocol

from bn_jax.lab import data, images, oddities
from bn_jax.lab.errors import CommandError

__all__ = ["Problem", "load", "load_labelled"]


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


def load(source: Path | data.Dataset | None, seed: int) -> Problem:
    """Loads and splits a dataset, and standardizes its parts.

    Args:
        source: an `.npz` file, a folder with a subfolder of images for each class, or a dataset.
            None: scikit-learn's digits.
        seed: of the split.

    Raises:
        CommandError: the data are not as `bn-jax train --help` describes them.
    """
    try:
        if isinstance(source, data.Dataset):
            dataset = data.check_dataset(source)
        else:
            dataset = load_labelled(source)
        splits = data.split(dataset, seed)
        mean, std = data.mean_and_std(splits.train)
        ignored = _describe_ignored(source)
    except ValueError as error:
        raise CommandError(f"--data: {error}") from error
    num_classes = int(dataset.y.max()) + 1
    if dataset.class_names is not None:
        num_classes = len(dataset.class_names)
    if num_classes == 1:
        raise CommandError(
            "--data: array y holds only label 0, expected at least 2 classes; check the labels"
        )
    found = () if source is None else oddities.find_oddities(dataset, splits)
    return Problem(
        splits=data.Splits(*(data.standardize(part, mean, std) for part in splits)),
        test_images=splits.test.x,
        mean=mean,
        std=std,
        num_classes=num_classes,
        class_names=dataset.class_names,
        sha256=_sha256(dataset),
        oddities=(*ignored, *found),
    )


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


def load_labelled(path: Path | None, model: Trained | None = None) -> data.Dataset:
    """Loads what the option --data names.

    Args:
        path: an `.npz` file, or a folder with a subfolder of images for each class. None:
            scikit-learn's digits.
        model: for which the images are. None: it is still to be trained.

    Raises:
        ValueError: the data are not as described.
    """
    if path is None:
        return data.load_digits()
    if not os.path.isdir(path):
        return data.load_npz(path, None if model is None else model.num_classes)
    if model is None:
        return images.load_folder(path)
    names = model.class_names or [str(label) for label in range(model.num_classes)]
    return images.load_folder(path, names, model.image_shape)


def _describe_ignored(source: Path | data.Dataset | None) -> list[str]:
    if not isinstance(source, Path) or not os.path.isdir(source):
        return []
    ignored = images.describe_ignored(source)
    return [] if ignored is None else [ignored]


def _sha256(dataset: data.Dataset) -> str:
    digest = hashlib.sha256(f"{dataset.x.shape}".encode())
    digest.update(dataset.x.tobytes())
    digest.update(dataset.y.tobytes())
    if dataset.class_names is not None:
        digest.update(json.dumps(dataset.class_names).encode())
    return digest.hexdigest()
