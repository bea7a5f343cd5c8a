"""Results of commands, written whole or not at all."""

import contextlib
import io
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bn_jax.lab.console import interrupts
from bn_jax.lab.errors import CommandError
from bn_jax.lab.files import locking

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["made", "remove", "save_picture", "staged", "to_json", "write_json"]


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
    with interrupts.as_exceptions(), made(staging), locking.hold(staging, "--out"):
        try:
            if new and any(path != staging for path in folder.iterdir()):
                raise CommandError(
                    f"--out: another process has filled {folder}, expected a new folder; choose "
                    "another name"
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


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes a folder with those around it, and removes again what an exception leaves empty.

    Args:
        folder: may exist.

    Yields:
        Nothing; the folder exists inside.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            # What another process writes to is not empty.
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _results(staging: Path) -> list[Path]:
    return [path for path in staging.iterdir() if path.name != locking.NAME]


def remove(path: Path) -> None:
    """Removes whatever is at a path, if anything is; a link, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_picture(figure: "Figure", path: Path) -> None:
    """Writes a picture as PNG, or an error of the system says why it could not.

    Args:
        figure: what is drawn.
        path: of the file.
    """
    # Matplotlib leaves half a picture where the disk is full.
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    path.write_bytes(picture.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Writes a tree of numbers, strings and arrays as JSON.

    Args:
        path: of the file.
        value: the tree; numbers that are not finite become null.
    """
    path.write_text(to_json(value))


def to_json(value: Any) -> str:
    """Returns a tree as `write_json` writes it.

    Args:
        value: see `write_json`.

    Raises:
        TypeError: JSON cannot hold a leaf, or the keys of a mapping cannot be sorted.
    """
    return json.dumps(jax.tree.map(_plain, value), indent=2, allow_nan=False) + "\n"


def _plain(leaf: Any) -> Any:
    """Returns a leaf as JSON can hold it, with None for numbers that are not finite."""
    plain = np.asarray(leaf).tolist() if hasattr(leaf, "dtype") else leaf
    if isinstance(plain, list):
        return [_plain(item) for item in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain
