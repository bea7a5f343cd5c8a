"""The labelled data that claims train on: scikit-learn's digits, or a user's own."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from bn_jax.lab import data
from bn_jax.lab.datasets.array_checks import check_bytes

# Of ten classes; an accuracy that a claim on digits names is as far above it as `level` says.
CHANCE = 0.1
# Bytes that a pixel takes for every seed: in the parts, and in their copies on two devices.
BYTES_PER_PIXEL = 12


class Split(NamedTuple):
    """How many examples a quantity is about, for intervals about other data.

    Attributes:
        trained: the examples that a network was trained on; where nothing is trained, those that
            the sample leaves out.
        tested: the examples that it was tested on; where nothing is trained, the sample.
    """

    trained: int
    tested: int


class Labelled(NamedTuple):
    """Labelled images in the place of the digits.

    Attributes:
        dataset: all images and labels.
        num_classes: the number of classes.
        name: what the user calls it, for texts.
        sha256: of images, labels and names of classes; empty for the digits.
    """

    dataset: data.Dataset
    num_classes: int
    name: str
    sha256: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[H, W, C] of an image."""
        height, width, channels = self.dataset.x.shape[1:]
        return height, width, channels

    @property
    def split(self) -> Split:
        """The sizes of the training part and of the test part."""
        parts = self.labels_of_parts(0)
        return Split(len(parts.train.y), len(parts.test.y))

    def sample(self, number: int) -> Split:
        """Returns the sizes of a random sample, and of what it leaves out."""
        return Split(len(self.dataset.y) - number, number)

    def labels_of_parts(self, seed: int) -> data.Splits:
        """Returns the split of a seed with the labels in the place of the images."""
        labels: Any = self.dataset.y
        return data.split(data.Dataset(labels, labels), seed)

    def level(self, accuracy: float) -> float:
        """Returns the accuracy that is as far from chance to 1 as another is with ten classes.

        Chance is the share of the most frequent class.

        Args:
            accuracy: with ten classes of equal size.

        Example:
            >>> import numpy as np
            >>> from bn_jax.lab.data import Dataset
            >>> from bn_jax.lab.experiments.labelled import Labelled
            >>> coins = Dataset(np.zeros((4, 1, 1, 1), np.float32), np.array([0, 1, 0, 1]))
            >>> Labelled(coins, 2, "coins").level(0.55)
            0.75
        """
        counts = np.bincount(self.dataset.y)
        chance = float(counts.max() / counts.sum())
        return 1 - (1 - accuracy) / (1 - CHANCE) * (1 - chance)

    def describe(self) -> dict[str, Any]:
        """Returns what a record says of these data."""
        described = {
            "name": self.name,
            "examples": len(self.dataset.y),
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
        }
        return described | ({"sha256": self.sha256} if self.sha256 else {})

    def __str__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        examples = len(self.dataset.y)
        return f"{self.name} ({examples:,} images of {shape}, {self.num_classes} classes)"


@lru_cache(maxsize=1)
def digits() -> Labelled:
    """Loads scikit-learn's digits."""
    return Labelled(data.load_digits(), 10, "digits")


class Needs(NamedTuple):
    """What a claim needs of a data set, in the split of every seed.

    Attributes:
        trained: examples of the training part.
        classes: the number of classes.
        per_class: images of each class in the training part.
        per_class_tested: images of each class in the validation part and in the test part.
        features: pixels that vary.
        side: pixels of an image in either direction.
    """

    trained: int = 1
    classes: int = 2
    per_class: int = 0
    per_class_tested: int = 0
    features: int = 1
    side: int = 1

    def missing(self, labelled: Labelled, seeds: Sequence[int]) -> str | None:
        """Returns what a data set lacks, and what is expected; None: nothing.

        Args:
            labelled: the data set.
            seeds: of the splits.
        """
        x = labelled.dataset.x
        found = {
            "classes": (labelled.num_classes, self.classes),
            "training examples": (labelled.split.trained, self.trained),
            "pixels on the shorter side": (min(labelled.image_shape[:2]), self.side),
            "pixels that vary": (int((x.max(0) > x.min(0)).sum()), self.features),
        }
        if self.per_class:
            parts = [labelled.labels_of_parts(seed) for seed in seeds]

            def least(names: Sequence[str]) -> int:
                ys = [getattr(part, name).y for part in parts for name in names]
                return min(int(np.bincount(y, minlength=labelled.num_classes).min()) for y in ys)

            found["training examples in each class"] = least(["train"]), self.per_class
            found["validation and test examples in each class"] = (
                least(["validation", "test"]),
                self.per_class_tested,
            )
        return next(
            (
                f"received {present:,} {what}, expected at least {needed:,}"
                for what, (present, needed) in found.items()
                if present < needed
            ),
            None,
        )


def check_memory(labelled: Labelled, seeds: int) -> None:
    """Raises an error if the splits of all seeds cannot fit into the memory of this machine.

    Args:
        labelled: the data set.
        seeds: how many splits are made.

    Raises:
        ValueError: they do not fit.
    """
    needed = BYTES_PER_PIXEL * seeds * labelled.dataset.x.size
    check_bytes(needed, f"{seeds} splits of {labelled} need ")
