"""Unfinished runs: begun, locked, and read again to continue them."""

import contextlib
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from bn_jax.lab import checkpoints
from bn_jax.lab.data import NamedDataset, save_npz
from bn_jax.lab.errors import CommandError, print_warning
from bn_jax.lab.files import folders, locking, records
from bn_jax.lab.files.records import ARMS, Origin, Started
from bn_jax.lab.files.writing import made

__all__ = ["begin", "checkpoints_of", "hold", "kept", "newest_usable", "read"]


def checkpoints_of(folder: Path, arm: str) -> Path:
    """Returns the folder for the checkpoints of an arm.

    Args:
        folder: of the run.
        arm: one of `records.ARMS`.
    """
    return folder / "checkpoints" / arm.replace(" ", "-")


@contextlib.contextmanager
def begin(folder: Path, started: Started, dataset: NamedDataset | None = None) -> Iterator[None]:
    """Makes the folder of a run, and locks it. What cannot be begun leaves nothing.

    Args:
        folder: missing or empty.
        started: how the run was started.
        dataset: what to save as `data.npz`, if the data are not in a file yet.

    Yields:
        Nothing; the run is trained inside.

    Raises:
        CommandError: another process has begun a run there.
        OSError: the folder cannot be written.
    """
    checkpoints_folder = folder / "checkpoints"
    if checkpoints_folder.exists():
        raise CommandError(
            f"--out: another process has begun a run in {folder}, expected a new folder; choose "
            "another name"
        )
    with made(checkpoints_folder), locking.hold(checkpoints_folder, "--out"):
        try:
            if dataset is not None:
                save_npz(folder / "data.npz", *dataset)
            records.write_started(_config(folder), started)
        except OSError:
            (folder / "data.npz").unlink(missing_ok=True)
            shutil.rmtree(checkpoints_folder, ignore_errors=True)
            raise
        yield


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Locks an unfinished run.

    Args:
        folder: of the run.

    Yields:
        Nothing; the run is read and trained inside.

    Raises:
        CommandError: it is no unfinished run, or another process holds it.
    """
    _check(folder)
    with locking.hold(folder / "checkpoints", "--resume"):
        # Another process may have finished it just before.
        _check(folder)
        yield


def read(folder: Path) -> Started:
    """Reads how an unfinished run was started.

    Args:
        folder: of the run.

    Raises:
        CommandError: it is no unfinished run, or `checkpoints/config.json` is damaged.
    """
    _check(folder)
    try:
        return records.read_started(_config(folder))
    except (OSError, ValueError) as error:
        copies = _copies(folder)
        # Checkpoints of several runs do not say which of them was begun here.
        started, path = next(iter(copies.items())) if len(copies) == 1 else (None, None)
        if not isinstance(error, FileNotFoundError):
            fix = "start a new run"
            if started is not None:
                fix = f"remove the file to continue with the copy of it in {path}, or {fix}"
            raise CommandError(f"--resume: {error}; {fix}") from error
        if started is None:
            raise _refusal(folder, error) from error
    print_warning(f"{_config(folder)} is missing; the run continues with the copy of it in {path}")
    return started


def newest_usable(folder: Path, origin: Origin) -> Path | None:
    """Finds the checkpoint to continue from, and warns of each that is passed over.

    Args:
        folder: of the checkpoints of an arm.
        origin: of the training.

    Returns:
        The newest that is intact and of this training, or None: start from the beginning.
    """
    for path in checkpoints.positions(folder):
        if (reason := checkpoints.why_unusable(path, origin)) is None:
            return path
        print_warning(
            f"{path} {reason}; {origin.arm} continues from the previous checkpoint, or from the "
            "start if there is none"
        )
    return None


def kept(folder: Path) -> str:
    """Says which checkpoints an unfinished run has, and what it needs.

    Args:
        folder: of the run.
    """
    newest = {}
    for arm in ARMS:
        intact = filter(checkpoints.is_intact, checkpoints.positions(checkpoints_of(folder, arm)))
        if (path := next(intact, None)) is not None:
            newest[arm] = path.name
    if not newest:
        return "no checkpoint was kept; free space or mend the cause"
    saved = ", ".join(f"{arm} to epoch {epoch}" for arm, epoch in newest.items())
    return f"kept are the checkpoints of {saved}; free space or mend the cause"


def _config(folder: Path) -> Path:
    return folder / "checkpoints/config.json"


def _check(folder: Path) -> None:
    try:
        is_finished = (folder / "metrics.json").exists()
        if not is_finished:
            next((folder / "checkpoints").iterdir())
    except (OSError, StopIteration) as error:
        raise _refusal(folder, error) from error
    if is_finished:
        raise CommandError(
            f"--resume: {folder} is a finished run; evaluate it with bn-jax eval "
            f"{shlex.quote(str(folder))}, or start a new run"
        )


def _refusal(folder: Path, error: BaseException) -> CommandError:
    if not folders.is_unfinished(folder) and (found := folders.describe(folder)):
        return CommandError(f"--resume: {folder} {found}")
    return CommandError(
        f"--resume: {folder} is not an unfinished run ({type(error).__name__}: {error}), expected "
        "a folder with the checkpoints of bn-jax train; start a new run"
    )


def _copies(folder: Path) -> dict[Started, Path]:
    """Returns how the run was started, by the intact checkpoints, with one that says so."""
    copies: dict[Started, Path] = {}
    for arm in ARMS:
        for path in checkpoints.positions(checkpoints_of(folder, arm)):
            if (origin := checkpoints.origin_of(path)) is not None:
                copies.setdefault(origin.run, path)
    return copies
