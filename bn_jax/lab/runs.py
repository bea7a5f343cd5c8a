"""Saved runs of `bn-jax train`, and what is made of them: recalibrated, folded, audited."""

import contextlib
import functools
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bn_jax import convert, linen, training
from bn_jax._audit.findings import Audit, audit
from bn_jax._fold.folding import Folded, fold
from bn_jax._recalibrate import Recalibration, recalibrate
from bn_jax.lab import checkpoints, data, models
from bn_jax.lab.fitting import shard_dataset

NO_NORM = "no normalization"
PER_DEVICE = "per-device batch norm"
SYNCHRONIZED = "synchronized batch norm"
ARMS = (NO_NORM, PER_DEVICE, SYNCHRONIZED)
TIMED_ROUNDS = 20


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
        is_folded: whether `checkpoint` holds a folded program instead of variables.
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
    is_folded: bool


class Figures(NamedTuple):
    """What a model answers and costs.

    Attributes:
        evaluation: over a dataset.
        milliseconds: that one batch takes, the median of some rounds.
        parameters: how many numbers it holds, running statistics included.
    """

    evaluation: training.Evaluation
    milliseconds: float
    parameters: int


class Change(NamedTuple):
    """A model before and after, side by side on the same data and device."""

    before: Figures
    after: Figures


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
            is_folded="folded" in metrics,
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
    if saved.is_folded:
        return _restore_folded(checkpoint, mesh)
    state = training.create_state(
        _model_of(saved), optax.identity(), saved.image_shape, seed=0, mesh=mesh
    )
    return checkpoints.restore_variables(checkpoint, state)


def recalibrate_run(
    saved: SavedRun,
    mesh: Mesh,
    data_file: Path | None,
    folder: Path,
    *,
    prior: float,
    progress: bool,
) -> tuple[Recalibration, Change]:
    """Measures the running statistics anew, and saves the run with them.

    Args:
        saved: the run.
        mesh: the devices to compute on.
        data_file: images of any domain; None for the run's own training part.
        folder: a new one for the result, which is a run itself.
        prior: the share of the old statistics in the new, as of `bn_jax.recalibrate`.
        progress: whether to show a bar.

    Returns:
        What has changed in each layer; and the model before and after, on the images of
        `data_file` or on the run's test part.

    Raises:
        BadRunError: the model has no batch norm, or the data are not there or not as they were.
    """
    state = _restore_with_norms(saved, mesh)
    judged = load_like(saved, data_file)
    images = _training_part(saved, judged) if data_file is None else judged
    model = _model_of(saved)

    def evaluate(variables: Any, batch: training.Batch) -> Any:
        options: dict[str, Any] = {"mask": batch.mask, "mutable": ["batch_stats"]}
        return model.apply(variables, batch.x, train=False, **options)

    found = recalibrate(
        evaluate,
        checkpoints.variables_of(state),
        shard_dataset(images, saved.batch_size, mesh),
        prior=prior,
        progress=progress,
    )
    recalibrated = state.replace(batch_stats=found.batch_stats)
    change = _compare(state, recalibrated, shard_dataset(judged, saved.batch_size, mesh))
    facts = {
        "data": str(data_file or saved.data_file or "scikit-learn's digits"),
        "examples": len(images.y),
        "prior": prior,
        "passes": found.passes,
        "layers": [layer._asdict() for layer in found.layers],
    }
    with _written(saved, folder, "recalibrated", facts, change) as checkpoint:
        checkpoints.save_variables(checkpoint, recalibrated)
    return found, change


def fold_run(saved: SavedRun, mesh: Mesh, folder: Path) -> tuple[Folded, Change]:
    """Folds the batch norms of a run into its convolutions, and saves program and parameters.

    Args:
        saved: the run.
        mesh: the devices to compute on.
        folder: a new one for the result, of which `restore` makes a state again. Its `checkpoint`
            holds `model.stablehlo`, which `jax.export.deserialize` reads, for any number of images
            and for CPU, CUDA and TPU, and its parameters in `params.safetensors`.

    Returns:
        What `bn_jax.fold` has made; and the model before and after, on the run's test part.

    Raises:
        BadRunError: the model has no batch norm.
    """
    state = _restore_with_norms(saved, mesh)
    model = _model_of(saved)
    folded = fold(
        lambda variables, x: model.apply(variables, x, train=False),
        checkpoints.variables_of(state),
        jnp.zeros((saved.batch_size, *saved.image_shape)),
    )
    test_batches = shard_dataset(load_like(saved, None), saved.batch_size, mesh)
    change = _compare(state, _folded_state(folded.apply, folded.params, mesh), test_batches)
    facts = {"norms": [norm._asdict() for norm in folded.report]}
    with _written(saved, folder, "folded", facts, change) as checkpoint:
        checkpoint.mkdir()
        (checkpoint / "model.stablehlo").write_bytes(_export(folded, saved.image_shape))
        flat = traverse_util.flatten_dict(jax.device_get(folded.params), sep="/")
        convert.save_safetensors(checkpoint / "params.safetensors", flat)
    return folded, change


def audit_run(saved: SavedRun, mesh: Mesh, data_file: Path | None, folder: Path) -> Audit:
    """Audits the model of a run on one batch of the size that it was trained with.

    Args:
        saved: the run.
        mesh: the devices to compute on.
        data_file: images like those that it was trained on; None for the run's test part.
        folder: a new one for `audit.json`.

    Returns:
        What `bn_jax.audit` has found.

    Raises:
        BadRunError: the model has no batch norm, or the images are not as described.
    """
    state = _restore_with_norms(saved, mesh)
    images = load_like(saved, data_file)
    argument = "DIR" if data_file is None else "--data"
    examples = _audited_examples(saved, len(images.y), argument)
    batch = shard_dataset(images, examples, mesh)[0]
    # Without the mask, which hides nothing here, but the activations from the audit.
    forward = functools.partial(_model_of(saved).apply, mutable=["batch_stats"])
    found = audit(forward, checkpoints.variables_of(state), batch.x)
    with staged(folder) as staging:
        write_json(
            staging / "audit.json",
            {
                "run": str(saved.folder),
                "findings": [finding._asdict() for finding in found.findings],
                "layers": [layer._asdict() for layer in found.layers],
            },
        )
    return found


def _audited_examples(saved: SavedRun, present: int, argument: str) -> int:
    """Returns the size of a batch as in training, as far as there are images."""
    share = saved.batch_size // saved.devices if saved.arm == PER_DEVICE else 2
    examples = min(saved.batch_size, present) // share * share
    if examples == 0:
        raise BadRunError(
            f"{argument}: received {present} images, expected at least {share}, as many as a "
            "norm's statistics need; give more with --data"
        )
    return examples


def _model_of(saved: SavedRun) -> models.ResNet:
    return make_model(saved.arm, saved.num_classes, saved.batch_size // saved.devices)


def _restore_with_norms(saved: SavedRun, mesh: Mesh) -> training.TrainState:
    if saved.is_folded or saved.arm == NO_NORM:
        how = "has been folded" if saved.is_folded else f"is that of the arm {saved.arm!r}"
        raise BadRunError(
            f"DIR: the model in {saved.folder} {how} and has no batch norm, expected one that has; "
            "give a run whose best arm has batch norm, e.g. of more epochs"
        )
    return restore(saved, mesh)


def _restore_folded(checkpoint: Path, mesh: Mesh) -> training.TrainState:
    exported = jax.export.deserialize(bytearray((checkpoint / "model.stablehlo").read_bytes()))
    flat = convert.load_safetensors(checkpoint / "params.safetensors")
    return _folded_state(exported.call, traverse_util.unflatten_dict(flat, sep="/"), mesh)


def _folded_state(
    apply: Callable[[Any, jax.Array], jax.Array], params: Any, mesh: Mesh
) -> training.TrainState:
    return training.TrainState.create(
        apply_fn=lambda variables, x, train: apply(variables["params"], x),
        params=jax.device_put(params, NamedSharding(mesh, PartitionSpec())),
        batch_stats={},
        tx=optax.identity(),
    )


def _export(folded: Folded, image_shape: tuple[int, ...]) -> bytes:
    (examples,) = jax.export.symbolic_shape("examples")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), folded.params)
    images = jax.ShapeDtypeStruct((examples, *image_shape), jnp.float32)
    export = jax.export.export(jax.jit(folded.apply), platforms=("cpu", "cuda", "tpu"))
    return bytes(export(shapes, images).serialize())


def _training_part(saved: SavedRun, test: data.Dataset) -> data.Dataset:
    """Loads what the run was trained on, which is known by its test part."""
    fix = "give images to measure the statistics of with --data"
    try:
        if saved.data_file is None:
            dataset = data.load_digits()
        else:
            dataset = data.load_npz(saved.data_file, saved.num_classes)
        splits = data.split(dataset, saved.seed)
    except ValueError as error:
        raise BadRunError(
            f"DIR: what {saved.folder} was trained on cannot be loaded ({error}); {fix}"
        ) from error
    if not np.array_equal(data.standardize(splits.test, saved.mean, saved.std).x, test.x):
        raise BadRunError(
            f"DIR: {saved.data_file or 'scikit-learn'} no longer holds what {saved.folder} was "
            f"trained on (its test part is another); restore it, or {fix}"
        )
    return data.standardize(splits.train, saved.mean, saved.std)


def _compare(
    before: training.TrainState, after: training.TrainState, batches: list[training.Batch]
) -> Change:
    states = (before, after)
    evaluations = [training.evaluate(state, batches) for state in states]
    step = jax.jit(training.eval_step)
    seconds: tuple[list[float], list[float]] = ([], [])
    # In turns, so that what else the machine does slows both alike; the first round compiles.
    for _ in range(TIMED_ROUNDS + 1):
        for state, own in zip(states, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(step(state, batches[0]))
            own.append(time.perf_counter() - start)
    return Change(
        *(
            Figures(evaluation, 1000 * statistics.median(own[1:]), _parameters(state))
            for evaluation, own, state in zip(evaluations, seconds, states, strict=True)
        )
    )


def _parameters(state: training.TrainState) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(checkpoints.variables_of(state)))


@contextlib.contextmanager
def _written(
    saved: SavedRun, folder: Path, how: str, facts: dict[str, Any], change: Change
) -> Iterator[Path]:
    """Gives the path of a checkpoint to write; around it `folder` becomes a run like `saved`."""
    metrics = json.loads((saved.folder / "metrics.json").read_text())
    figures = {
        when: {
            "accuracy": one.evaluation.accuracy,
            "milliseconds": one.milliseconds,
            "parameters": one.parameters,
        }
        for when, one in change._asdict().items()
    }
    with staged(folder) as staging:
        yield staging / "checkpoint"
        shutil.copyfile(saved.folder / "test.npz", staging / "test.npz")
        metrics["checkpoint_sha256"] = checkpoints.sha256(staging / "checkpoint")
        metrics[how] = {"run": str(saved.folder), **facts, **figures}
        write_json(staging / "metrics.json", metrics)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Gives a folder for results, which come into the wanted one when all of them are there.

    Args:
        folder: made where it is missing, and taken away again if nothing comes into it.

    Yields:
        A folder in it.
    """
    staging = folder / ".results"
    existed = folder.exists()
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        # By metrics.json a finished run is known.
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "metrics.json"):
            if (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Writes numbers, texts, arrays and trees of them as JSON.

    Args:
        path: of the file.
        value: what is not finite in it becomes null.
    """
    path.write_text(json.dumps(jax.tree.map(_plain, value), indent=2, allow_nan=False) + "\n")


def _plain(leaf: Any) -> Any:
    """Returns what JSON has for a number, an array or a text; None where it is not finite."""
    plain = np.asarray(leaf).tolist() if hasattr(leaf, "dtype") else leaf
    if isinstance(plain, list):
        return [_plain(one) for one in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain
