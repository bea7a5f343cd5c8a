"""Saved runs of `bn-jax train`: which model it was, its test part, and its variables."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import optax
from jax.sharding import Mesh

from bn_jax import checkpoints, data, linen, models, training

NO_NORM = "no normalization"
PER_DEVICE = "per-device batch norm"
SYNCHRONIZED = "synchronized batch norm"
ARMS = (NO_NORM, PER_DEVICE, SYNCHRONIZED)


class BadRunError(ValueError):
    """A folder or a file is not what a command needs; the message names the argument first."""


class SavedRun(NamedTuple):
    """What `metrics.json` tells about the best arm's model and inputs.

    Attributes:
        folder: of the run.
        arm: the one that was saved, of `ARMS`.
        image_shape: [H, W, C] of an image.
        num_classes: number of logits.
        mean: of the pixels of the training part; images are standardized by it.
        std: their standard deviation.
        batch_size: examples in a training step, over all devices.
        devices: that it was trained on.
        seed: of the split.
        data_file: the user's data as given, None for scikit-learn's digits.
        checkpoint_sha256: of the folder `checkpoint`.
    """

    folder: Path
    arm: str
    image_shape: tuple[int, ...]
    num_classes: int
    mean: float
    std: float
    batch_size: int
    devices: int
    seed: int
    data_file: Path | None
    checkpoint_sha256: str


def make_model(arm: str, num_classes: int, per_device: int) -> models.ResNet:
    """Makes the model of an arm.

    Args:
        arm: one of `ARMS`.
        num_classes: number of logits.
        per_device: examples on each device, of which per-device batch norm takes its statistics.

    Returns:
        A small residual network.
    """
    norms: dict[str, models.Norm | None] = {
        NO_NORM: None,
        # Under sharded jit, consecutive examples lie on one device.
        PER_DEVICE: functools.partial(linen.BatchNorm, momentum=0.9, virtual_batch_size=per_device),
        SYNCHRONIZED: functools.partial(linen.BatchNorm, momentum=0.9),
    }
    return models.ResNet(num_classes, stage_sizes=(2, 2, 2), norm=norms[arm])


def read_run(folder: Path) -> SavedRun:
    """Reads what is needed to go on with a saved run.

    Args:
        folder: what `bn-jax train` has saved.

    Returns:
        What `metrics.json` tells.

    Raises:
        BadRunError: it is no such folder.
    """
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        facts, config = metrics["data"], metrics["config"]
        return SavedRun(
            folder=folder,
            arm=ARMS[ARMS.index(metrics["best_arm"])],
            image_shape=tuple(map(int, facts["image_shape"])),
            num_classes=int(facts["num_classes"]),
            mean=float(facts["mean"]),
            std=float(facts["std"]),
            batch_size=int(config["batch_size"]),
            devices=int(config["devices"]),
            seed=int(config["seed"]),
            data_file=None if config["data"] is None else Path(config["data"]),
            checkpoint_sha256=str(metrics["checkpoint_sha256"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadRunError(
            f"DIR: {folder} is not a run ({type(error).__name__}: {error}), expected a folder that "
            "bn-jax train has saved, with metrics.json"
        ) from error


def load_like(saved: SavedRun, data_file: Path | None) -> data.Dataset:
    """Loads images for the model of a saved run.

    Args:
        saved: the run.
        data_file: an .npz file; None for the run's own test part.

    Returns:
        The dataset, standardized as the training part was.

    Raises:
        BadRunError: the images cannot be loaded, or are not of the shape that the run was trained
            on.
    """
    argument = "DIR" if data_file is None else "--data"
    try:
        dataset = data.load_npz(data_file or saved.folder / "test.npz", saved.num_classes)
    except ValueError as error:
        raise BadRunError(f"{argument}: {error}") from error
    if dataset.x.shape[1:] != saved.image_shape:
        raise BadRunError(
            f"{argument}: received images of shape {dataset.x.shape[1:]}, expected "
            f"{saved.image_shape} [H, W, C] as the run was trained on; resize them"
        )
    return data.standardize(dataset, saved.mean, saved.std)


def restore(saved: SavedRun, mesh: Mesh) -> training.TrainState:
    """Restores the model of a saved run.

    Args:
        saved: the run.
        mesh: the devices to put it on.

    Returns:
        A state with its parameters and statistics, and an optimizer that does nothing.

    Raises:
        BadRunError: the checkpoint is missing or damaged.
    """
    checkpoint = saved.folder / "checkpoint"
    # Checked first: where a file is damaged, Orbax's threads print tracebacks after it has failed.
    if checkpoints.sha256(checkpoint) != saved.checkpoint_sha256:
        raise BadRunError(
            f"DIR: {checkpoint} is missing or damaged (its SHA-256 is not the one in "
            "metrics.json), expected what bn-jax train has saved; copy the run anew or train again"
        )
    state = training.create_state(
        make_model(saved.arm, saved.num_classes, saved.batch_size // saved.devices),
        optax.identity(),
        saved.image_shape,
        seed=0,
        mesh=mesh,
    )
    return checkpoints.restore_variables(checkpoint, state)
