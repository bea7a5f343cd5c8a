"""Files that anything may have happened to, read so that none hangs or exhausts this process."""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "MOST_BYTES",
    "open_regular",
    "read_bytes",
    "read_json",
    "sha256_of_file",
    "sha256_of_folder",
]

# Far more than what is trained here writes, and still read in seconds.
MOST_BYTES = 2**32
MOST_FILES = 10_000
BLOCK = 2**20

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file to read.

    Args:
        path: of the file, or of a link to it.

    Yields:
        The open file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is a folder, a pipe or a device.
    """
    # Asked before it is opened, which has effects on some devices, and of what was opened.
    _check_regular(path, path.stat())
    # Without O_NONBLOCK, opening a pipe waits for someone to write to it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        _check_regular(path, os.fstat(file.fileno()))
        yield file


def read_bytes(path: Path, most: int) -> bytes:
    """Reads a regular file.

    Args:
        path: of the file.
        most: the bytes that it may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, or larger.
    """
    with open_regular(path) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, most)
        content = file.read(most + 1) or b""
    _check_size(path, len(content), most)
    return content


def read_json(path: Path, most: int) -> Any:
    """Reads a JSON file in which no key is given twice.

    Args:
        path: of the file.
        most: the bytes that it may have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file, or larger.
    """
    content = read_bytes(path, most)
    try:
        return json.loads(content.decode(), object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError(f"{path} cannot be read as JSON (it is nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"key {name!r} is given twice")
        values[name] = value
    return values


def sha256_of_file(path: Path) -> str:
    """Computes the SHA-256 of a regular file.

    Args:
        path: of the file.

    Returns:
        The digest, in hexadecimal.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, or too large for a file of a run.
    """
    digest = hashlib.sha256()
    _update(digest, path, MOST_BYTES)
    return digest.hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """Computes the SHA-256 of the names and contents of all files that are not hidden.

    Args:
        folder: any folder; a missing one counts as empty.

    Returns:
        The digest, in hexadecimal.

    Raises:
        OSError: a file cannot be read.
        ValueError: there is something else than regular files and folders, or more of them than a
            run has. Links are not followed: they may lead out of the folder.
    """
    digest, left = hashlib.sha256(), MOST_BYTES
    for path in _files(folder):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        left -= _update(digest, path, left)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder, followlinks=False):
        found += [Path(parent, name) for name in names + folders if not name.startswith(".")]
        if len(found) > MOST_FILES:
            raise ValueError(f"{folder} holds more than {MOST_FILES:,} files")
    files = []
    for path in sorted(found):
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            _check_regular(path, status)
            files.append(path)
    return files


def _update(digest: "hashlib._Hash", path: Path, most: int) -> int:
    """Adds a file to a digest, and returns its size."""
    size = 0
    with open_regular(path) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, most)
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
            _check_size(path, size, most)
    return size


def _check_size(path: Path, size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"{path} has more than {most:,} bytes, expected a file of a run")


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise ValueError(f"{path} is {kind}, expected a regular file")
