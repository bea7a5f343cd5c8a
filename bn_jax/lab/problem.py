"""The data that a run learns: loaded, split and standardized."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from bn_jax.lab import data
from bn_jax.lab.errors import CommandError

__all__ = ["Problem", "load"]


class Problem(NamedTuple):
    """A dataset to learn.

    Attributes:
        splits: its parts, standardized.
        test_images: the images of the test part as they were.
        mean: the mean of the training part's pixels, by which all parts are standardized.
        std: their standard deviation.
        num_classes: number of classes.
        sha256: of the dataset.
    """

    splits: data.Splits
    test_images: data.FloatArray
    mean: float
    std: float
    num_classes: int
    sha256: str

    @property
    def examples(self) -> int:
        """The examples of all parts."""
        return sum(len(part.y) for part in self.splits)


def load(data_file: Path | None, seed: int) -> Problem:
    """Loads and splits a dataset, and standardizes its parts.

    Args:
        data_file: an `.npz` file. None: scikit-learn's digits.
        seed: of the split.

    Raises:
        CommandError: the data are not as `bn-jax train --help` describes them.
    """
    try:
        dataset = data.load_digits() if data_file is None else data.load_npz(data_file)
        splits = data.split(dataset, seed)
        mean, std = data.mean_and_std(splits.train)
    except ValueError as error:
        raise CommandError(f"--data: {error}") from error
    num_classes = int(dataset.y.max()) + 1
    if num_classes == 1:
        raise CommandError(
            "--data: array y holds only label 0, expected at least 2 classes; check the labels"
        )
    return Problem(
        splits=data.Splits(*(data.standardize(part, mean, std) for part in splits)),
        test_images=splits.test.x,
        mean=mean,
        std=std,
        num_classes=num_classes,
        sha256=_sha256(dataset),
    )


def _sha256(dataset: data.Dataset) -> str:
    shape = f"{dataset.x.shape}".encode()
    return hashlib.sha256(shape + dataset.x.tobytes() + dataset.y.tobytes()).hexdigest()
