"""Checkpoints: written and read by one process, and recognized when they are damaged."""

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

KEPT = 2


class Position(NamedTuple):
    """All that a training at the end of an epoch needs to go on: also its reports so far."""

    state: TrainState
    rng: np.random.Generator
    reports: list[Report]


def save_variables(path: Path, state: TrainState) -> None:
    """Saves params and batch_stats with Orbax.

    Args:
        path: a folder that does not exist yet.
        state: the model's state, replicated over its devices.
    """
    _save(path, variables_of(state))


def restore_variables(path: Path, state: TrainState) -> TrainState:
    """Restores params and batch_stats that `save_variables` saved, on any number of devices.

    Args:
        path: the checkpoint's folder.
        state: a state of the same model, e.g. newly created.

    Returns:
        `state` with the saved values, on the devices that it was on.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    return state.replace(**_restore(path, variables_of(state)))


def save_position(folder: Path, position: Position) -> None:
    """Saves where a training stands, and deletes all but the newest positions of the folder.

    The SHA-256 of the files is written last, so that a position saved in part is none.

    Args:
        folder: of the positions of this training; made where it is missing.
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
    """Lists the positions that `save_position` has saved, also in part.

    Args:
        folder: of the positions; it need not exist.

    Returns:
        Their folders, the newest first.
    """
    saved = [path for path in folder.glob("*") if path.name.isdecimal()]
    return sorted(saved, key=lambda path: int(path.name), reverse=True)


def is_intact(path: Path) -> bool:
    """Says whether a position is what was saved, by its SHA-256.

    Args:
        path: one of `positions`.

    Returns:
        Whether it may be restored. Orbax's threads print tracebacks where a file is damaged.
    """
    return _seal(path).is_file() and _seal(path).read_text() == sha256(path)


def restore_position(path: Path, state: TrainState) -> Position:
    """Restores a position, on any number of devices.

    Args:
        path: one of `positions`, intact.
        state: a state of the same model and optimizer, e.g. newly created.

    Returns:
        The position, its state on the devices that `state` was on.
    """
    saved = json.loads((path / "position.json").read_text())
    rng = np.random.default_rng()
    rng.bit_generator.state = saved["rng"]
    return Position(
        state.replace(**_restore(path / "state", _training_variables(state))),
        rng,
        [_report(*fields) for fields in saved["reports"]],
    )


def sha256(folder: Path) -> str:
    """Computes the SHA-256 of the names and contents of all files that are not hidden.

    Args:
        folder: any; a missing one counts as empty.

    Returns:
        The digest, in hexadecimal.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("[!.]*")):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _report(
    step: int,
    epoch: int,
    training: Sequence[Any],
    validation: Sequence[Any],
    examples: int,
    seconds: float,
) -> Report:
    return Report(step, epoch, Evaluation(*training), Evaluation(*validation), examples, seconds)


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _delete(path: Path) -> None:
    _seal(path).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)


def variables_of(state: TrainState) -> dict[str, Any]:
    """Returns what a model is applied to, and what `save_variables` saves.

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

    # Otherwise Orbax waits until every process has come to save or restore too.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)
