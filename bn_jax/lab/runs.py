"""Saved runs of `bn-jax train`: evaluated, recalibrated, folded, audited."""

import contextlib
import functools
import shutil
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bn_jax import convert, training
from bn_jax._audit import Audit, audit
from bn_jax._fold import Folded, fold
from bn_jax._recalibrate import Recalibration, recalibrate
from bn_jax.lab import checkpoints, data
from bn_jax.lab.console.advice import with_commands
from bn_jax.lab.datasets import problem
from bn_jax.lab.datasets.array_checks import check_shape
from bn_jax.lab.errors import CommandError, print_warning
from bn_jax.lab.files import folders, records
from bn_jax.lab.files.reading import MOST_BYTES, sha256_of_file, sha256_of_folder
from bn_jax.lab.files.records import ARMS, NO_NORM, PER_DEVICE, SYNCHRONIZED
from bn_jax.lab.files.writing import save_picture, staged, write_json
from bn_jax.lab.fitting import abstract_state, shard_dataset
from bn_jax.lab.training.arms import make_model
from bn_jax.training.classification import jitted_eval_step

__all__ = [
    "ARMS",
    "NO_NORM",
    "PER_DEVICE",
    "SYNCHRONIZED",
    "Change",
    "Figures",
    "FoldedRun",
    "RecalibratedRun",
    "SavedRun",
    "audit_run",
    "evaluate_run",
    "fold_model",
    "fold_run",
    "load_like",
    "load_raw",
    "make_model",
    "read_run",
    "recalibrate_run",
    "restore",
    "restore_with_norms",
]

TIMED_ROUNDS = 20
RESTORE = "copy the run again as bn-jax train saved it, or start a new one"


class SavedRun(NamedTuple):
    """The model and the inputs of the best arm of a run, as `metrics.json` records them.

    Attributes:
        folder: of the run.
        arm: the best arm, one of `ARMS`.
        image_shape: [H, W, C] of an image.
        num_classes: number of logits.
        class_names: the names of the classes in the order of the labels. None: they have none.
        mean: mean of the training part's pixels, by which images are standardized.
        std: their standard deviation.
        batch_size: examples in a training step, over all devices.
        devices: number of devices in training.
        seed: of the split.
        data_file: the user's file or folder as given, None for scikit-learn's digits.
        checkpoint_sha256: of the folder `checkpoint`.
        test_sha256: of `test.npz`; None in runs of version 0.2.0.
        is_folded: whether `checkpoint` holds a folded program instead of variables.
        model: one of `records.MODELS`.
    """

    folder: Path
    arm: str
    image_shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...] | None
    mean: float
    std: float
    batch_size: int
    devices: int
    seed: int
    data_file: Path | None
    checkpoint_sha256: str
    test_sha256: str | None
    is_folded: bool
    model: str


class Figures(NamedTuple):
    """The quality and the cost of a model.

    Attributes:
        evaluation: over a dataset.
        milliseconds: time for one batch, the median of `TIMED_ROUNDS`.
        parameters: how many numbers the model holds, running statistics included.
    """

    evaluation: training.Evaluation
    milliseconds: float
    parameters: int


class Change(NamedTuple):
    """A model before and after a change, measured on the same data and device."""

    before: Figures
    after: Figures


class RecalibratedRun(NamedTuple):
    """What `recalibrate_run` returns.

    Attributes:
        recalibration: the change in each layer.
        change: the model before and after, on the images given or on the test part.
    """

    recalibration: Recalibration
    change: Change


class FoldedRun(NamedTuple):
    """What `fold_run` returns.

    Attributes:
        folded: the result of `bn_jax.fold`.
        change: the model before and after, on the test part.
    """

    folded: Folded
    change: Change


def read_run(folder: Path) -> SavedRun:
    """Reads the facts about a saved run.

    Args:
        folder: of a run saved by `bn-jax train`.

    Raises:
        CommandError: the folder holds no such run.
    """
    try:
        metrics, _ = records.read_metrics(folder)
    except OSError as error:
        if not folders.is_finished(folder) and (found := folders.describe(folder)):
            raise CommandError(f"DIR: {folder} {found}") from error
        raise CommandError(
            f"DIR: {folder} is not a run ({type(error).__name__}: {error}), expected a folder "
            "saved by bn-jax train, with metrics.json"
        ) from error
    except ValueError as error:
        raise CommandError(f"DIR: {error}; {RESTORE}") from error
    config, facts = metrics.config, metrics.data
    return SavedRun(
        folder=folder,
        arm=metrics.best_arm,
        image_shape=facts.image_shape,
        num_classes=facts.num_classes,
        class_names=facts.class_names,
        mean=facts.mean,
        std=facts.std,
        batch_size=config.batch_size,
        devices=config.devices,
        seed=config.seed,
        data_file=None if config.data is None else Path(config.data),
        checkpoint_sha256=metrics.checkpoint_sha256,
        test_sha256=metrics.test_sha256,
        is_folded=metrics.folded is not None,
        model=config.model,
    )


def load_like(saved: SavedRun, data_file: Path | None) -> data.Dataset:
    """Loads images for the model of a saved run.

    Args:
        saved: the run.
        data_file: an .npz file or a folder of images; None for the test part of the run.

    Returns:
        The dataset, standardized as the training part was.

    Raises:
        CommandError: the images cannot be loaded, or are not of the shape that the run was trained
            on.
    """
    return data.standardize(load_raw(saved, data_file), saved.mean, saved.std)


def load_raw(saved: SavedRun, data_file: Path | None) -> data.Dataset:
    """Loads images for the model of a saved run, and does not standardize them.

    Args:
        saved: the run.
        data_file: an .npz file or a folder of images; None for the test part of the run.

    Raises:
        CommandError: see `load_like`.
    """
    argument = "DIR" if data_file is None else "--data"
    if data_file is None:
        _check_test_part(saved)
    try:
        dataset, _ = problem.load_labelled(data_file or saved.folder / "test.npz", saved)
        check_shape(dataset.x, saved.image_shape)
        ignored = problem.describe_ignored(data_file)
    except ValueError as error:
        raise CommandError(f"{argument}: {error}") from error
    for line in ignored:
        print_warning(f"{argument}: {line}")
    return dataset


def _check_test_part(saved: SavedRun) -> None:
    path = saved.folder / "test.npz"
    try:
        sha256 = sha256_of_file(path)
        _check_uncompressed(path)
    except FileNotFoundError as error:
        raise CommandError(f"DIR: {path} does not exist; {RESTORE}") from error
    except (OSError, ValueError) as error:
        raise CommandError(f"DIR: {error}; {RESTORE}") from error
    if saved.test_sha256 not in (sha256, None):
        raise CommandError(
            f"DIR: {path} is damaged (its SHA-256 is not the one in metrics.json); {RESTORE}"
        )


def _check_uncompressed(path: Path) -> None:
    """Raises a ValueError if the arrays of an .npz file would fill the memory."""
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > MOST_BYTES:
            raise ValueError(f"{path} holds {size:,} bytes, expected at most {MOST_BYTES:,}")


def restore(saved: SavedRun, mesh: Mesh) -> training.TrainState:
    """Restores the model of a saved run.

    Args:
        saved: the run.
        mesh: the devices to put it on.

    Returns:
        A state with its parameters and statistics, and an optimizer without effect.

    Raises:
        CommandError: the checkpoint is missing or damaged.
    """
    checkpoint = saved.folder / "checkpoint"
    # Checked first: what reads the files is not made for damaged ones.
    try:
        is_intact = sha256_of_folder(checkpoint) == saved.checkpoint_sha256
    except (OSError, ValueError) as error:
        raise CommandError(f"DIR: {error}; {RESTORE}") from error
    if not is_intact:
        raise CommandError(
            f"DIR: {checkpoint} is missing or damaged (its SHA-256 is not the one in "
            "metrics.json), expected the files saved by bn-jax train; copy the run again or start "
            "a new one"
        )
    try:
        if saved.is_folded:
            return _restore_folded(checkpoint, mesh)
        # Only its shapes: arrays of what metrics.json says may not fit into memory.
        state = abstract_state(_model_of(saved), optax.identity(), saved.image_shape, mesh)
        replicated = NamedSharding(mesh, PartitionSpec())
        return checkpoints.restore_variables(checkpoint, state, replicated).replace(step=0)
    except Exception as error:
        # Files that were sealed like this may hold anything, for which libraries raise anything.
        raise CommandError(
            f"DIR: {checkpoint} does not hold the model that metrics.json describes "
            f"({type(error).__name__}: {error}), {saved.model} of the arm {saved.arm!r} with "
            f"{saved.num_classes} classes and images {saved.image_shape}; {RESTORE}"
        ) from error


def evaluate_run(saved: SavedRun, mesh: Mesh, data_file: Path | None) -> training.Evaluation:
    """Evaluates the model of a run.

    Args:
        saved: the run.
        mesh: the devices to compute on.
        data_file: an .npz file or a folder of images; None for the test part of the run.

    Raises:
        CommandError: see `load_like` and `restore`.
    """
    dataset = load_like(saved, data_file)
    state = restore(saved, mesh)
    return training.evaluate(state, shard_dataset(dataset, saved.batch_size, mesh))


def recalibrate_run(
    saved: SavedRun,
    mesh: Mesh,
    data_file: Path | None,
    folder: Path,
    *,
    prior: float,
    progress: bool,
) -> RecalibratedRun:
    """Recomputes the running statistics, and saves a run with them.

    Args:
        saved: the run.
        mesh: the devices to compute on.
        data_file: images of any domain; None for the training part of the run.
        folder: a new folder for the result, which is a run itself.
        prior: the weight of the old statistics, as of `bn_jax.recalibrate`.
        progress: whether to show a bar.

    Raises:
        CommandError: the model has no batch norm, or the data are missing or have changed.
    """
    state = restore_with_norms(saved, mesh)
    evaluated = load_like(saved, data_file)
    images = _training_part(saved, evaluated) if data_file is None else evaluated
    model = _model_of(saved)

    def forward(variables: Any, batch: training.Batch) -> Any:
        return model.apply(
            variables, batch.x, train=False, mask=batch.mask, mutable=["batch_stats"]
        )

    recalibration = recalibrate(
        forward,
        checkpoints.variables_of(state),
        shard_dataset(images, saved.batch_size, mesh),
        prior=prior,
        progress=progress,
    )
    recalibrated = state.replace(batch_stats=recalibration.batch_stats)
    change = _compare(state, recalibrated, shard_dataset(evaluated, saved.batch_size, mesh))
    facts = {
        "data": str(data_file or saved.data_file or "scikit-learn's digits"),
        "examples": len(images.y),
        "prior": prior,
        "passes": recalibration.passes,
        "layers": [layer._asdict() for layer in recalibration.layers],
    }
    with _written(saved, folder, "recalibrated", facts, change) as checkpoint:
        checkpoints.save_variables(checkpoint, recalibrated)
        save_picture(recalibration.plot(), checkpoint.with_name("recalibration.png"))
    return RecalibratedRun(recalibration, change)


def fold_run(saved: SavedRun, mesh: Mesh, folder: Path) -> FoldedRun:
    """Folds the batch norms of a run into its convolutions, and saves program and parameters.

    Args:
        saved: the run.
        mesh: the devices to compute on.
        folder: a new folder for the result, which is a run itself. Its `checkpoint` holds the
            program in `model.stablehlo`, which `jax.export.deserialize` reads, for any number of
            images and for CPU, CUDA and TPU, and the parameters in `params.safetensors`.

    Raises:
        CommandError: the model has no batch norm.
    """
    state = restore_with_norms(saved, mesh)
    folded = fold_model(saved, state)
    test_batches = shard_dataset(load_like(saved, None), saved.batch_size, mesh)
    change = _compare(state, _folded_state(folded.apply, folded.params, mesh), test_batches)
    facts = {"norms": [norm._asdict() for norm in folded.report]}
    with _written(saved, folder, "folded", facts, change) as checkpoint:
        checkpoint.mkdir()
        (checkpoint / "model.stablehlo").write_bytes(_export(folded, saved.image_shape))
        flat = traverse_util.flatten_dict(jax.device_get(folded.params), sep="/")
        try:
            convert.save_safetensors(checkpoint / "params.safetensors", flat)
        except ValueError as error:
            raise OSError(str(error)) from error
    return FoldedRun(folded, change)


def fold_model(saved: SavedRun, state: training.TrainState) -> Folded:
    """Folds the batch norms of a run's model, whose state `restore_with_norms` returned."""
    model = _model_of(saved)
    return fold(
        lambda variables, x: model.apply(variables, x, train=False),
        checkpoints.variables_of(state),
        jnp.zeros((saved.batch_size, *saved.image_shape)),
    )


def audit_run(saved: SavedRun, mesh: Mesh, data_file: Path | None, folder: Path) -> Audit:
    """Audits the model of a run on one batch of the size that it was trained with.

    Args:
        saved: the run.
        mesh: the devices to compute on.
        data_file: images like those in training; None for the test part of the run.
        folder: a new folder for `audit.json` and `audit.png`.

    Returns:
        The result of `bn_jax.audit`, whose advice is commands instead of lines of Python.

    Raises:
        CommandError: the model has no batch norm, or there are too few or no such images.
    """
    state = restore_with_norms(saved, mesh)
    images = load_like(saved, data_file)
    argument = "DIR" if data_file is None else "--data"
    examples = _audited_examples(saved, len(images.y), argument)
    batch = shard_dataset(images, examples, mesh)[0]
    # Nothing is masked; a mask would keep the audit from seeing the activations.
    forward = functools.partial(_model_of(saved).apply, mutable=["batch_stats"])
    result = with_commands(
        audit(forward, checkpoints.variables_of(state), batch.x), saved.folder, data_file
    )
    with staged(folder, new=True) as staging:
        save_picture(result.plot(), staging / "audit.png")
        write_json(
            staging / "audit.json",
            {
                "run": str(saved.folder),
                "findings": [finding._asdict() for finding in result.findings],
                "layers": [layer._asdict() for layer in result.layers],
            },
        )
    return result


def _audited_examples(saved: SavedRun, present: int, argument: str) -> int:
    """Returns the batch size of training, or less if there are fewer images."""
    # Per-device batch norm takes its statistics of whole shares; a variance needs two images.
    share = saved.batch_size // saved.devices if saved.arm == PER_DEVICE else 2
    examples = min(saved.batch_size, present) // share * share
    if examples == 0:
        raise CommandError(
            f"{argument}: received {present} images, expected at least {share}, which the "
            "statistics of a norm need; give more with --data"
        )
    return examples


def _model_of(saved: SavedRun) -> nn.Module:
    per_device = saved.batch_size // saved.devices
    return make_model(saved.arm, saved.num_classes, per_device, saved.model, saved.image_shape)


def restore_with_norms(saved: SavedRun, mesh: Mesh) -> training.TrainState:
    """Restores the model of a saved run as `restore`; one without batch norm is a CommandError."""
    if saved.is_folded or saved.arm == NO_NORM:
        reason = "was folded" if saved.is_folded else f"is of the arm {saved.arm!r}"
        raise CommandError(
            f"DIR: the model in {saved.folder} {reason} and has no batch norm, expected a model "
            "with batch norm; give a run whose best arm has batch norm, e.g. one of bn-jax train "
            "--arm synchronized"
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
    """Loads the training part of a run again; its test part shows whether the data are the same."""
    fix = "give images to measure the statistics on with --data"
    try:
        dataset, _ = problem.load_labelled(saved.data_file, saved)
        splits = data.split(dataset, saved.seed)
    except ValueError as error:
        raise CommandError(
            f"DIR: the training data of {saved.folder} cannot be loaded ({error}); {fix}"
        ) from error
    if not np.array_equal(data.standardize(splits.test, saved.mean, saved.std).x, test.x):
        raise CommandError(
            f"DIR: {saved.data_file or 'scikit-learn'} no longer holds the training data of "
            f"{saved.folder} (its test part differs); restore it, or {fix}"
        )
    return data.standardize(splits.train, saved.mean, saved.std)


def _compare(
    before: training.TrainState, after: training.TrainState, batches: list[training.Batch]
) -> Change:
    def seconds(state: training.TrainState) -> float:
        start = time.perf_counter()
        jax.block_until_ready(jitted_eval_step(state, batches[0]))
        return time.perf_counter() - start

    # Interleaved, so that other work of the machine slows both alike.
    rounds = [(seconds(before), seconds(after)) for _ in range(TIMED_ROUNDS + 1)]
    # The first round compiles.
    seconds_before, seconds_after = zip(*rounds[1:], strict=True)
    return Change(
        _figures(before, batches, seconds_before), _figures(after, batches, seconds_after)
    )


def _figures(
    state: training.TrainState, batches: list[training.Batch], seconds: Sequence[float]
) -> Figures:
    return Figures(
        evaluation=training.evaluate(state, batches),
        milliseconds=1000 * statistics.median(seconds),
        parameters=_parameters(state),
    )


def _parameters(state: training.TrainState) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(checkpoints.variables_of(state)))


@contextlib.contextmanager
def _written(
    saved: SavedRun, folder: Path, how: str, facts: dict[str, Any], change: Change
) -> Iterator[Path]:
    """Yields the path of a checkpoint to write, and then makes `folder` a run like `saved`."""
    _, metrics = records.read_metrics(saved.folder)
    figures = {
        when: {
            "accuracy": measured.evaluation.accuracy,
            "milliseconds": measured.milliseconds,
            "parameters": measured.parameters,
        }
        for when, measured in change._asdict().items()
    }
    with staged(folder, new=True) as staging:
        yield staging / "checkpoint"
        shutil.copyfile(saved.folder / "test.npz", staging / "test.npz")
        metrics["checkpoint_sha256"] = sha256_of_folder(staging / "checkpoint")
        metrics["test_sha256"] = sha256_of_file(staging / "test.npz")
        metrics[how] = {"run": str(saved.folder), **facts, **figures}
        write_json(staging / "metrics.json", records.seal_metrics(metrics))
