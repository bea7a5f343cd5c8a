"""The streams that the command prints to: any encoding, closed, on a full disk, without a reader.

A command does its work whatever becomes of what it prints. So nothing that it prints raises:
characters that the encoding lacks are spelled out, and what cannot be written is dropped.
"""

import contextlib
import errno
import io
import logging
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

from bn_jax.lab.errors import print_error

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["check_written", "is_animated", "prepare"]

MOST_COLUMNS = 10_000


class _Output(io.FileIO):
    """A descriptor to write to. What cannot be written is dropped, from the first failure on.

    Attributes:
        failure: why, if a write has failed.
    """

    failure: OSError | None = None

    def write(self, data: "ReadableBuffer", /) -> int:
        """Writes, or drops, all of the data."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while self.failure is None and len(rest):
            try:
                written = super().write(rest)
                if written is None:
                    # Another program has set the terminal not to block, and it is busy.
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
            except OSError as error:
                self.failure = error
        return size


def prepare() -> None:
    """Prepares the standard streams of this process, and sizes of the terminal that are not sizes.

    Streams that something else has put in their place, such as a test or a notebook, are left.
    """
    for name in ("COLUMNS", "LINES"):
        if not _is_size(os.environ.get(name, "1")):
            del os.environ[name]
    # Without a home, matplotlib says at length where it puts its cache instead.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        return
    _open_missing_descriptors()
    sys.stdout = _stream(sys.stdout, 1)
    sys.stderr = _stream(sys.stderr, 2)


def _is_size(text: str) -> bool:
    # Rich takes any digits of Unicode for a number, and any number for a width.
    return text.isascii() and text.isdecimal() and len(text) < 6 and 0 < int(text) <= MOST_COLUMNS


def _open_missing_descriptors() -> None:
    """Opens the descriptors 0 to 2 where they are closed, before a file gets their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest one that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _stream(old: TextIO | None, descriptor: int) -> TextIO:
    buffered = io.BufferedWriter(_Output(descriptor, "w", closefd=False))
    if not isinstance(old, io.TextIOWrapper):
        return io.TextIOWrapper(buffered, encoding="utf-8", errors="backslashreplace")
    old.flush()
    return io.TextIOWrapper(
        buffered,
        encoding=old.encoding,
        errors="backslashreplace",
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )


def is_animated() -> bool:
    """Tells whether there is a terminal, on one of the streams, that can move its cursor."""
    name = os.environ.get("TERM")
    if name in ("dumb", "unknown") or (not name and os.name == "posix"):
        return False
    return sys.stderr.isatty() or sys.stdout.isatty()


def check_written(code: int) -> int:
    """Writes what is buffered, and returns the exit status.

    Args:
        code: the status so far.

    Returns:
        1 for 0, with a message, if results could not be printed. A reader who has read enough, such
        as `head`, is no failure.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    output = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    failure = output.failure if isinstance(output, _Output) else None
    if failure is None or failure.errno == errno.EPIPE:
        return code
    print_error(f"standard output: results could not be printed ({failure.strerror})")
    return code or 1
