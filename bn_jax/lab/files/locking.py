"""Locks of folders: two processes never write to one at the same time."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import filelock

from bn_jax.lab.errors import CommandError

__all__ = ["NAME", "hold"]

NAME = ".lock"


@contextlib.contextmanager
def hold(folder: Path, argument: str) -> Iterator[None]:
    """Keeps other processes from writing to a folder.

    The operating system ends the lock with the process, however that ends. The file of the lock
    stays: another process may just have opened it.

    Args:
        folder: exists.
        argument: of the command line, which an error names.

    Yields:
        Nothing; the folder is locked inside.

    Raises:
        CommandError: another process holds the lock, or the folder cannot be locked.
    """
    lock = filelock.FileLock(folder / NAME, timeout=0)
    try:
        with warnings.catch_warnings():
            # On a file system without locks, the library warns that it marks the folder instead.
            warnings.simplefilter("ignore")
            lock.acquire()
    except filelock.Timeout as error:
        raise CommandError(
            f"{argument}: {folder} is in use by another process, expected a folder that only this "
            "one writes to; wait until the other has ended, or choose another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise CommandError(
            f"{argument}: {folder} cannot be locked ({getattr(error, 'strerror', None) or error}), "
            "expected a folder that this process may write to; make it writable, or copy it to one "
            "that is"
        ) from error
    try:
        yield
    finally:
        lock.release()
