"""Corruptions of the digits, in several severities."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from bn_jax.lab import data


def _for_each(filter_image: Callable[[Any, float], Any]) -> Callable[[Any, Any, float], Any]:
    def apply(x: Any, generator: Any, strength: float) -> Any:
        return np.stack([filter_image(image, strength) for image in x])

    return apply


def _with_impulses(x: Any, generator: Any, share: float) -> Any:
    replaced = np.where(generator.random(x.shape) < 0.5, 0.0, 16.0)
    return np.where(generator.random(x.shape) < share, replaced, x)


def _with_a_hole(x: Any, generator: Any, side: int) -> Any:
    x = x.copy()
    for image, row, column in zip(x, *generator.integers(0, 9 - side, (2, len(x))), strict=True):
        image[row : row + side, column : column + side] = 0
    return x


def _coarse(image: Any, share: float) -> Any:
    """Mixes an image with itself in pixels of twice the size."""
    large = np.kron(image.reshape(4, 2, 4, 2).mean((1, 3)), np.ones((2, 2)))
    return share * large + (1 - share) * image


class Corruption(NamedTuple):
    """A corruption of images [n, 8, 8] with pixels from 0 to 16.

    Attributes:
        apply: called with images, a generator of random numbers, and a strength.
        strengths: for each of `SEVERITIES`.
    """

    apply: Callable[[Any, Any, Any], Any]
    strengths: tuple[float, float, float]


SEVERITIES = "mild", "medium", "strong"
MEDIUM = SEVERITIES.index("medium")
# The first two corruptions are affine: the first norm cancels them.
AFFINE = "contrast", "brightness"
CORRUPTIONS = {
    "contrast": Corruption(lambda x, generator, factor: factor * x, (0.6, 0.3, 0.1)),
    "brightness": Corruption(lambda x, generator, more: x + more, (4, 8, 16)),
    "noise": Corruption(lambda x, generator, std: x + generator.normal(0, std, x.shape), (3, 5, 8)),
    "impulses": Corruption(_with_impulses, (0.08, 0.15, 0.3)),
    "blur": Corruption(_for_each(ndimage.gaussian_filter), (0.6, 0.9, 1.3)),
    "large pixels": Corruption(_for_each(_coarse), (0.6, 0.8, 1.0)),
    "rotation": Corruption(
        _for_each(partial(ndimage.rotate, reshape=False, order=1)), (15, 25, 35)
    ),
    "shift": Corruption(
        _for_each(lambda image, rows: ndimage.shift(image, (rows, 0), order=1)), (0.5, 1, 1.5)
    ),
    "saturation": Corruption(
        lambda x, generator, factor: np.minimum(factor * x, 16) ** 0.5 * 4, (1.5, 2, 4)
    ),
    "holes": Corruption(_with_a_hole, (2, 3, 4)),
}


class Corrupted(NamedTuple):
    """A part of the digits of every seed, clean and with every corruption.

    Attributes:
        x: images, [seeds, kinds, n, 64].
        y: labels, [seeds, n].
    """

    x: Any
    y: Any


KINDS = "clean", *CORRUPTIONS
NOT_AFFINE = [index for index, kind in enumerate(KINDS) if kind not in ("clean", *AFFINE)]


def corrupt(
    seeds: Any, severity: int = MEDIUM, part: str = "test", dtype: npt.DTypeLike = np.float32
) -> Corrupted:
    """Corrupts a part of the digits, and standardizes it like the clean images.

    Args:
        seeds: the seeds of the splits and of the corruptions, [seeds].
        severity: a place in `SEVERITIES`.
        part: the name of the part.
        dtype: of the images.

    Returns:
        Images of each of `KINDS`, and labels.
    """
    dataset = data.load_digits()
    of_seeds, labels = [], []
    for seed in seeds.tolist():
        split = data.split(dataset, seed)
        mean, std = data.mean_and_std(split.train)
        clean: data.Dataset = getattr(split, part)
        images = clean.x[..., 0].astype(np.float64)
        corrupted = [
            apply(images, np.random.default_rng([4, seed]), strengths[severity])
            for apply, strengths in CORRUPTIONS.values()
        ]
        of_seeds.append((np.stack([images, *corrupted]) - mean) / std)
        labels.append(clean.y)
    x = np.stack(of_seeds).astype(dtype)
    return Corrupted(x.reshape(*x.shape[:3], -1), np.stack(labels))
