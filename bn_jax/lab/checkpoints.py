"""Checkpoints: written and read by one process, with a SHA-256 that reveals damage.

The model of a finished run is saved with Orbax, for others to read. The positions of a training are
safetensors: written in this thread, they fail with one exception, and Orbax's fail in several
threads, which print.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Sharding

from bn_jax.lab.files import records
from bn_jax.lab.files.reading import MOST_BYTES, read_bytes, sha256_of_folder
from bn_jax.lab.files.records import Origin
from bn_jax.lab.files.writing import remove
from bn_jax.lab.fitting import Report
from bn_jax.training import Evaluation, TrainState

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

__all__ = [
    "Position",
    "is_intact",
    "origin_of",
    "positions",
    "restore_position",
    "restore_variables",
    "save_position",
    "save_variables",
    "variables_of",
    "why_unusable",
]

# The newest positions that are kept: if the last is damaged, a training resumes from the other.
KEPT = 2
# What Orbax writes beside the arrays, at most.
BYTES_OF_ORBAX = 2**17
BYTES_OF_ORBAX_FOR_ARRAY = 2**11
ARRAYS = "state.safetensors"


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

    Raises:
        OSError: the folder cannot be written, e.g. because the disk is full.
    """
    arrays = jax.device_get(variables_of(state))
    _require_space(path.parent, jax.tree.leaves(arrays))
    with _one_exception(path), _checkpointer() as checkpointer:
        checkpointer.save(path.absolute(), arrays)


def restore_variables(path: Path, state: TrainState, sharding: Sharding) -> TrainState:
    """Restores params and batch_stats that `save_variables` saved, on any number of devices.

    Args:
        path: the checkpoint's folder.
        state: a state of the same model; its shapes and dtypes suffice. Values that were saved in
            another floating-point dtype, such as half precision, are cast.
        sharding: where to put the values.

    Returns:
        `state` with the saved values.

    Raises:
        ValueError: the checkpoint belongs to another model.
    """
    expected = variables_of(state)
    with _quiet(), _checkpointer() as checkpointer:
        saved = checkpointer.metadata(path.absolute())
        # Older versions of Orbax return the metadata of the tree itself.
        saved = getattr(saved, "item_metadata", saved)
        wanted, found = _by_path(expected), {} if saved is None else _by_path(saved.tree)
        _check_same(
            wanted, {path: _as_cast(leaf, wanted.get(path)) for path, leaf in found.items()}
        )
        values = checkpointer.restore(path.absolute(), jax.tree.map(_shape_of, expected))
    return state.replace(**jax.tree.map(lambda value: _placed(value, sharding), values))


def save_position(folder: Path, position: Position, origin: Origin) -> None:
    """Saves the position of a training, and deletes all but the newest positions in the folder.

    The SHA-256 of the files is written last, so a position without it is incomplete.

    Args:
        folder: of the positions of this training; made if it is missing.
        position: at the end of an epoch.
        origin: the run and the arm.

    Raises:
        OSError: the position cannot be written, e.g. because the disk is full. Older ones stay.
    """
    path = folder / str(position.reports[-1].epoch)
    _delete(path)
    arrays = {
        key: np.asarray(value)
        for key, value in _by_path(jax.device_get(_training_variables(position.state))).items()
    }
    saved = {
        "origin": origin.model_dump(mode="json"),
        "rng": position.rng.bit_generator.state,
        "reports": position.reports,
    }
    try:
        path.mkdir(parents=True)
        (path / ARRAYS).write_bytes(safetensors.numpy.save(arrays))
        (path / "position.json").write_text(json.dumps(saved))
        _seal(path).write_text(sha256_of_folder(path))
    except OSError as error:
        # Half a position is of no use, and takes space.
        with contextlib.suppress(OSError):
            _delete(path)
        raise OSError(error.errno, error.strerror, str(path)) from error
    for old in positions(folder)[KEPT:]:
        _delete(old)


def positions(folder: Path) -> list[Path]:
    """Lists the positions that `save_position` saved, complete or not.

    Args:
        folder: of the positions, or a missing one.

    Returns:
        Their folders, the newest first.
    """
    saved = [path for path in folder.glob("*") if path.name.isascii() and path.name.isdecimal()]
    return sorted(saved, key=lambda path: int(path.name), reverse=True)


def is_intact(path: Path) -> bool:
    """Tells whether a position is as it was saved, by its SHA-256.

    Args:
        path: one of `positions`.
    """
    try:
        return read_bytes(_seal(path), 64) == sha256_of_folder(path).encode()
    except (OSError, ValueError):
        return False


def origin_of(path: Path) -> Origin | None:
    """Returns where a position comes from, or None if it is not as it was saved.

    Args:
        path: one of `positions`.
    """
    if not is_intact(path):
        return None
    try:
        return records.read_position(path / "position.json").origin
    except (OSError, ValueError):
        return None


def why_unusable(path: Path, origin: Origin) -> str | None:
    """Tells why a position cannot resume a training.

    Args:
        path: one of `positions`.
        origin: of the training.

    Returns:
        The reason, or None if it can.
    """
    if not is_intact(path):
        return "is incomplete or damaged (its SHA-256 differs from the one saved with it)"
    try:
        saved = records.read_position(path / "position.json")
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    if saved.origin.arm != origin.arm:
        return f"is of another arm, {saved.origin.arm}"
    if saved.origin.run != origin.run:
        return "is of another run, whose options or data differ"
    if str(saved.reports[-1][1]) != path.name:
        return f"is of another epoch, {saved.reports[-1][1]}"
    return None


def restore_position(path: Path, state: TrainState) -> Position:
    """Restores a position, on any number of devices.

    Args:
        path: one of `positions`, of which `why_unusable` says nothing.
        state: a state of the same model and optimizer, e.g. newly created.

    Returns:
        The position, with its state on the devices of `state`.

    Raises:
        ValueError: the position belongs to another model or optimizer.
        OSError: it cannot be read.
    """
    saved = records.read_position(path / "position.json")
    rng = np.random.default_rng()
    rng.bit_generator.state = saved.rng.model_dump()
    variables = _training_variables(state)
    try:
        arrays = safetensors.numpy.load(read_bytes(path / ARRAYS, MOST_BYTES))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path / ARRAYS} cannot be read ({error})") from error
    _check_same(_by_path(variables), arrays)
    leaves, structure = jax.tree.flatten(variables)
    values = [
        _placed(arrays[key], leaf.sharding)
        for key, leaf in zip(_by_path(variables), leaves, strict=True)
    ]
    return Position(
        state.replace(**jax.tree.unflatten(structure, values)),
        rng,
        [_read_report(fields) for fields in saved.reports],
    )


def _read_report(fields: Sequence[Any]) -> Report:
    """Returns a report that was saved as JSON, which has lists instead of named tuples."""
    report = Report(*fields)
    return report._replace(
        training=Evaluation(*report.training), validation=Evaluation(*report.validation)
    )


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _delete(path: Path) -> None:
    remove(_seal(path))
    remove(path)


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


def _by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, in the order of `jax.tree.leaves`."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _check_same(expected: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises a ValueError if arrays have other paths, shapes or dtypes than expected."""

    def described(arrays: Mapping[str, Any], path: str) -> str:
        return f"{arrays[path].dtype} {tuple(arrays[path].shape)}" if path in arrays else "no array"

    for path in {**expected, **saved}:
        received, wanted = described(saved, path), described(expected, path)
        if received != wanted:
            raise ValueError(f"it holds {received} at {path}, expected {wanted}")


def _as_cast(leaf: Any, wanted: Any) -> Any:
    """Returns a saved array's shape, and its dtype once Orbax has cast it to what is asked for."""

    def is_floating(array: Any) -> bool:
        return array is not None and jnp.issubdtype(array.dtype, jnp.floating)

    is_cast = is_floating(leaf) and is_floating(wanted)
    return jax.ShapeDtypeStruct(leaf.shape, wanted.dtype if is_cast else leaf.dtype)


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _placed(value: Any, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_process_local_data(sharding, value, value.shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's threads from printing what they also raise here, with up to 195 lines."""
    before, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    if getattr(hook, "func", None) is not _pass_over_closed_loops:
        sys.unraisablehook = functools.partial(_pass_over_closed_loops, hook)
    try:
        yield
        # After a failure it stays, for the threads that still read or write.
        sys.unraisablehook = hook
    finally:
        logging.disable(before)


def _pass_over_closed_loops(hook: Callable[[Any], object], unraisable: Any) -> None:
    """Calls a hook of Python unless a thread of Orbax came too late for its event loop."""
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        hook(unraisable)


@contextlib.contextmanager
def _one_exception(path: Path) -> Iterator[None]:
    """Turns what Orbax raises where it cannot write into an OSError."""
    try:
        with _quiet():
            yield
    except Exception as error:
        reason = str(error).splitlines()[0]
        code = errno.ENOSPC if "RESOURCE_EXHAUSTED" in reason else getattr(error, "errno", None)
        raise OSError(code or errno.EIO, f"cannot be written ({reason})", str(path)) from error


def _require_space(folder: Path, arrays: Sequence[Any]) -> None:
    """Raises an OSError if there is no space for arrays in Orbax's format.

    Orbax's threads print tracebacks where they cannot write, some even after it has raised.
    """
    size = BYTES_OF_ORBAX + sum(array.nbytes + BYTES_OF_ORBAX_FOR_ARRAY for array in arrays)
    is_full = shutil.disk_usage(folder).free < size
    if hasattr(os, "posix_fallocate"):
        # Asks the file system itself, which knows quotas; not every one can tell.
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                is_full = is_full or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if is_full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _checkpointer() -> "ocp.StandardCheckpointer":
    import orbax.checkpoint as ocp

    # Otherwise Orbax waits until every process saves or restores.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)
