"""The classes of images, as a saved run predicts them."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from bn_jax.lab import data, images, runs
from bn_jax.lab.datasets import problem
from bn_jax.lab.datasets.array_checks import FloatArray, check_shape
from bn_jax.lab.errors import CommandError
from bn_jax.lab.fitting import shard_dataset
from bn_jax.training import TrainState
from bn_jax.training.steps import apply_in_evaluation

__all__ = ["Predictions", "predict_files", "warn_of_range", "write_csv"]


class Predictions(NamedTuple):
    """What a run predicts for images.

    Attributes:
        names: of the images: a path, and behind it the number of an image in an .npz file.
        class_names: in the order of the labels; the labels themselves where classes have no names.
        probabilities: float64 [N, classes]; every row sums to 1.
        warnings: what looks like a mistake, a line for each.
    """

    names: list[str]
    class_names: tuple[str, ...]
    probabilities: npt.NDArray[np.float64]
    warnings: list[str]


def predict_files(saved: runs.SavedRun, mesh: Mesh, files: Sequence[Path]) -> Predictions:
    """Predicts the classes of images.

    Args:
        saved: the run.
        mesh: the devices to compute on.
        files: image files, folders of images, or .npz files with an array `x`.

    Raises:
        CommandError: a file cannot be read, or holds images of another shape than the run was
            trained on; or the run is damaged.
    """
    names, x = _read_files(saved, files)
    state = runs.restore(saved, mesh)
    dataset = data.Dataset(x, np.zeros(len(x), np.int32))
    logits = _compute_logits(
        state,
        data.standardize(dataset, saved.mean, saved.std),
        min(saved.batch_size, len(x)),
        mesh,
    )
    if not np.isfinite(logits).all():
        raise CommandError(
            f"DIR: the model in {saved.folder} returns NaN or infinity, so its training diverged; "
            "train it again with a lower --learning-rate"
        )
    class_names = saved.class_names or tuple(map(str, range(saved.num_classes)))
    warnings = [line for path in files for line in problem.describe_ignored(path)]
    warnings += warn_of_range(x, runs.load_raw(saved, None).x)
    return Predictions(names, class_names, _softmax(logits), warnings)


def _read_files(saved: runs.SavedRun, files: Sequence[Path]) -> tuple[list[str], FloatArray]:
    names: list[str] = []
    parts: list[FloatArray] = []
    try:
        listed = [path for file in files for path in _expand(file)]
        # Together, so that an error lists all their sizes.
        pictures = [path for path in listed if not _is_npz(path)]
        pixels = iter(images.read_images(pictures, saved.image_shape) if pictures else ())
        for path in listed:
            if _is_npz(path):
                parts.append(data.load_images(path))
                check_shape(parts[-1], saved.image_shape)
                names += [f"{path}[{number}]" for number in range(len(parts[-1]))]
            else:
                parts.append(next(pixels)[None])
                names.append(str(path))
    except ValueError as error:
        raise CommandError(f"FILES: {error}") from error
    return names, np.concatenate(parts)


def _expand(file: Path) -> list[Path]:
    return images.list_images(file) if os.path.isdir(file) else [file]


def _is_npz(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


def _compute_logits(
    state: TrainState, dataset: data.Dataset, batch_size: int, mesh: Mesh
) -> npt.NDArray[np.float64]:
    forward = jax.jit(lambda state, x: apply_in_evaluation(state)(x, train=False))
    logits = [
        np.asarray(forward(state, batch.x))[np.asarray(batch.mask)]
        for batch in shard_dataset(dataset, batch_size, mesh)
    ]
    return np.concatenate(logits).astype(np.float64)


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def warn_of_range(x: FloatArray, known: FloatArray) -> list[str]:
    """Describes pixels that lie far from those that a model knows.

    Args:
        x: images.
        known: images of the kind that the model was trained on.

    Returns:
        A line with what to do, if values lie outside the known range by more than half of its
        width, or all in its lowest tenth. Else nothing.
    """
    low, high = float(known.min()), float(known.max())
    least, most = float(x.min()), float(x.max())
    width = high - low
    is_near = low - width / 2 <= least and low + width / 10 < most <= high + width / 2
    if is_near:
        return []
    return [
        f"pixels are from {least:g} to {most:g}, but from {low:g} to {high:g} in the test part of "
        "the run: what is predicted may be wrong; scale the images alike, and give them in an "
        ".npz file with the array x"
    ]


def write_csv(path: Path, predictions: Predictions) -> None:
    """Writes all probabilities, an image in each row.

    Args:
        path: of a new file.
        predictions: what to write.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "class", *(f"p({name})" for name in predictions.class_names)])
    best = predictions.probabilities.argmax(axis=1)
    for name, label, row in zip(predictions.names, best, predictions.probabilities, strict=True):
        rows.writerow([name, predictions.class_names[label], *map(repr, row.tolist())])
    try:
        # A file's name may hold bytes that are no UTF-8.
        path.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape", newline="")
    except OSError:
        path.unlink(missing_ok=True)
        raise
