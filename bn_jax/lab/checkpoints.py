"""Checkpoints: written and read by one process, with a SHA-256 that reveals damage."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from bn_jax.lab.fitting import Report
from bn_jax.training import Evaluation, TrainState

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

__all__ = [
    "Position",
    "is_intact",
    "positions",
    "restore_position",
    "restore_variables",
    "save_position",
    "save_variables",
    "sha256",
    "variables_of",
]

# The newest positions that are kept: if the last is damaged, a training resumes from the other.
KEPT = 2


class Position(NamedTuple):
    """What a training needs at the end of an epoch to continue later.

    Attributes:
        state: the model and the optimizer.
        rng: the generator of the order of examples.
        reports: all reports so far.
    """

    state: TrainState
    rng: np.random.Generator
    reports: list[Report]


def save_variables(path: Path, state: TrainState) -> None:
    """Saves params and batch_stats with Orbax.

    Args:
        path: a new folder.
        state: the model's state, replicated over its devices.
    """
    _save(path, variables_of(state))


def restore_variables(path: Path, state: TrainState) -> TrainState:
    """Restores params and batch_stats that `save_variables` saved, on any number of devices.

    Args:
        path: the checkpoint's folder.
        state: a state of the same model, e.g. newly created.

    Returns:
        `state` with the saved values, on the same devices.

    Raises:
        ValueError: the checkpoint belongs to another model.
    """
    return state.replace(**_restore(path, variables_of(state)))


def save_position(folder: Path, position: Position) -> None:
    """Saves the position of a training, and deletes all but the newest positions in the folder.

    The SHA-256 of the files is written last, so a position without it is incomplete.

    Args:
        folder: of the positions of this training; made if it is missing.
        position: at the end of an epoch.
    """
    path = folder / str(position.reports[-1].epoch)
    _delete(path)
    _save(path / "state", _training_variables(position.state))
    saved = {"rng": position.rng.bit_generator.state, "reports": position.reports}
    (path / "position.json").write_text(json.dumps(saved))
    _seal(path).write_text(sha256(path))
    for old in positions(folder)[KEPT:]:
        _delete(old)


def positions(folder: Path) -> list[Path]:
    """Lists the positions that `save_position` saved, complete or not.

    Args:
        folder: of the positions, or a missing one.

    Returns:
        Their folders, the newest first.
    """
    saved = [path for path in folder.glob("*") if path.name.isdecimal()]
    return sorted(saved, key=lambda path: int(path.name), reverse=True)


def is_intact(path: Path) -> bool:
    """Tells whether a position is as it was saved, by its SHA-256.

    Args:
        path: one of `positions`.

    Returns:
        Whether to restore it. From damaged files, Orbax's threads print tracebacks.
    """
    return _seal(path).is_file() and _seal(path).read_text() == sha256(path)


def restore_position(path: Path, state: TrainState) -> Position:
    """Restores a position, on any number of devices.

    Args:
        path: one of `positions`, intact.
        state: a state of the same model and optimizer, e.g. newly created.

    Returns:
        The position, with its state on the devices of `state`.
    """
    saved = json.loads((path / "position.json").read_text())
    rng = np.random.default_rng()
    rng.bit_generator.state = saved["rng"]
    return Position(
        state.replace(**_restore(path / "state", _training_variables(state))),
        rng,
        [_read_report(fields) for fields in saved["reports"]],
    )


def sha256(folder: Path) -> str:
    """Computes the SHA-256 of the names and contents of all files that are not hidden.

    Args:
        folder: any folder; a missing one counts as empty.

    Returns:
        The digest, in hexadecimal.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("[!.]*")):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _read_report(fields: Sequence[Any]) -> Report:
    """Returns a report that was saved as JSON, which has lists instead of named tuples."""
    report = Report(*fields)
    return report._replace(
        training=Evaluation(*report.training), validation=Evaluation(*report.validation)
    )


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _delete(path: Path) -> None:
    _seal(path).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)


def variables_of(state: TrainState) -> dict[str, Any]:
    """Returns the variables of a model, which `save_variables` saves.

    Args:
        state: the model's state.

    Returns:
        ``{"params": ..., "batch_stats": ...}``.
    """
    return {"params": state.params, "batch_stats": state.batch_stats}


def _training_variables(state: TrainState) -> dict[str, Any]:
    return variables_of(state) | {"opt_state": state.opt_state, "step": state.step}


def _save(path: Path, tree: Any) -> None:
    with _checkpointer() as checkpointer:
        checkpointer.save(path.absolute(), jax.device_get(tree))


def _restore(path: Path, tree: Any) -> Any:
    on_host = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    with _checkpointer() as checkpointer:
        values = checkpointer.restore(path.absolute(), on_host)
    return jax.tree.map(
        lambda leaf, value: jax.make_array_from_process_local_data(
            leaf.sharding, value, leaf.shape
        ),
        tree,
        values,
    )


def _checkpointer() -> "ocp.StandardCheckpointer":
    import orbax.checkpoint as ocp

    # Otherwise Orbax waits until every process saves or restores.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)
