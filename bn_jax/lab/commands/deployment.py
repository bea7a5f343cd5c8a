"""Saved runs, exported: folders that classify raw images without this library."""

import errno
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bn_jax import training
from bn_jax._export import ExportedModel, export_model, load_exported
from bn_jax.lab import checkpoints, runs
from bn_jax.lab.errors import CommandError
from bn_jax.lab.fitting import shard_dataset

__all__ = ["ExportedRun", "export_run", "read_class_names"]


class ExportedRun(NamedTuple):
    """What `export_run` returns.

    Attributes:
        exported: the model, loaded from its folder.
        run: the evaluation of the run on its test part.
        evaluation: that of the exported model on the same images, as they are.
    """

    exported: ExportedModel
    run: training.Evaluation
    evaluation: training.Evaluation


def export_run(
    saved: runs.SavedRun,
    mesh: Mesh,
    folder: Path,
    *,
    fold: bool,
    class_names: list[str] | None,
) -> ExportedRun:
    """Exports the model of a run, which then takes images as they are, and evaluates it.

    Args:
        saved: the run.
        mesh: the devices to compute on.
        folder: a new folder for the model; see `bn_jax.export_model`.
        fold: whether to fold the batch norms first.
        class_names: one for each class. None: those of the run, if it has any.

    Raises:
        CommandError: the run is damaged, has no batch norm to fold, or has another number of
            classes; or the folder cannot be written.
    """
    state = runs.restore_with_norms(saved, mesh) if fold else runs.restore(saved, mesh)
    images = runs.load_raw(saved, None)
    before = training.evaluate(
        state, shard_dataset(runs.load_like(saved, None), saved.batch_size, mesh)
    )
    if fold:
        folded = runs.fold_model(saved, state)
        forward, variables = folded.apply, folded.params
    else:
        forward, variables = _forward_of(state), checkpoints.variables_of(state)
    x = jax.ShapeDtypeStruct((saved.batch_size, *saved.image_shape), jnp.float32)
    try:
        export_model(
            folder,
            forward,
            variables,
            x,
            mean=saved.mean,
            std=saved.std,
            class_names=class_names or saved.class_names,
        )
    except ValueError as error:
        # Not every folder would be refused: the disk is full.
        is_full = getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        raise CommandError(f"--out: {error}", code=1 if is_full else 2) from error
    exported = load_exported(folder)
    after = training.evaluate(_state_of(exported), shard_dataset(images, saved.batch_size, mesh))
    return ExportedRun(exported, before, after)


def read_class_names(path: Path, num_classes: int) -> list[str]:
    """Reads the names of the classes from a text file, a name in each line.

    Args:
        path: of the file, in UTF-8.
        num_classes: how many names it has to hold.

    Raises:
        CommandError: it cannot be read or holds more or fewer names.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise CommandError(
            f"--class-names: {path} cannot be read ({error}); give a text file with a name in "
            "each line"
        ) from error
    names = [name for name in names if name]
    if len(names) != num_classes:
        raise CommandError(
            f"--class-names: {path} holds {len(names)} names, expected {num_classes}, one for each "
            "class in the order of the labels; add or remove lines"
        )
    return names


def _forward_of(state: training.TrainState) -> Any:
    return lambda variables, x: state.apply_fn(variables, x, train=False)


def _state_of(exported: ExportedModel) -> training.TrainState:
    """Returns an exported model as `training.evaluate` takes models."""
    return training.TrainState.create(
        apply_fn=lambda variables, x, train: exported(x),
        params={},
        batch_stats={},
        tx=optax.identity(),
    )
