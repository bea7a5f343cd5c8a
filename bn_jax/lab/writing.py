"""Results of commands, written whole or not at all."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bn_jax.lab import interrupts, locking
from bn_jax.lab.errors import CommandError

__all__ = ["remove", "staged", "write_json"]


@contextlib.contextmanager
def staged(folder: Path, *, new: bool = False) -> Iterator[Path]:
    """Stages results: they are moved to their folder once they are complete.

    Args:
        folder: where the results belong. It is made if it is missing, and removed again if an
            exception leaves it empty.
        new: whether the folder must hold nothing yet, as `--out` promises. Another process may
            have filled it since that was checked.

    Yields:
        An empty folder to write to.

    Raises:
        CommandError: another process is writing results to the folder, or has filled it.
    """
    staging = folder / ".results"
    existed = folder.exists()
    staging.mkdir(parents=True, exist_ok=True)
    try:
        with interrupts.as_exceptions(), locking.hold(staging, "--out"):
            try:
                if new and any(path != staging for path in folder.iterdir()):
                    raise CommandError(
                        f"--out: another process has filled {folder}, expected a new folder; "
                        "choose another name"
                    )
                for path in _results(staging):
                    remove(path)
                yield staging
                # metrics.json is the last, for it marks a run as finished.
                for path in sorted(_results(staging), key=lambda path: path.name == "metrics.json"):
                    if (folder / path.name).is_dir():
                        remove(folder / path.name)
                    path.replace(folder / path.name)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        # What another process has locked is not empty.
        with contextlib.suppress(OSError):
            staging.rmdir()
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _results(staging: Path) -> list[Path]:
    return [path for path in staging.iterdir() if path.name != locking.NAME]


def remove(path: Path) -> None:
    """Removes whatever is at a path, if anything is; a link, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a tree of numbers, strings and arrays as JSON.

    Args:
        path: of the file.
        value: the tree; numbers that are not finite become null.
    """
    path.write_text(json.dumps(jax.tree.map(_plain, value), indent=2, allow_nan=False) + "\n")


def _plain(leaf: Any) -> Any:
    """Returns a leaf as JSON can hold it, with None for numbers that are not finite."""
    plain = np.asarray(leaf).tolist() if hasattr(leaf, "dtype") else leaf
    if isinstance(plain, list):
        return [_plain(item) for item in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain
