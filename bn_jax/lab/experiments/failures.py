"""What goes wrong in the code of a claim, as one line, with the whole trace for a file."""

import contextlib
import functools
import inspect
import io
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

MOST_CHARACTERS = 300
# What a claim prints beyond this is dropped.
MOST_PRINTED = 1_000_000


class Failed(NamedTuple):
    """A claim that raised an exception, or returned something that is no result.

    Attributes:
        message: one line: the file, the line, and what the exception says.
        trace: of the exception.
        printed: what the claim had printed until then.
    """

    message: str
    trace: str = ""
    printed: str = ""


def describe(error: BaseException, file: str | None) -> Failed:
    """Describes an exception in the code of a user.

    Args:
        error: the exception.
        file: the path of that code; None: it has none.
    """
    return Failed(
        f"{_place(error, file)}{_message(error)}", "".join(traceback.format_exception(error))
    )


def file_of(function: Callable[..., Any]) -> str | None:
    """Returns the path of the file that defines a function, a partial function or an object."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        # An object that is called as a function.
        code = getattr(getattr(type(function), "__call__", None), "__code__", None)  # noqa: B004
    return None if code is None else code.co_filename


def _place(error: BaseException, file: str | None) -> str:
    if file is None:
        return ""
    line = None
    if isinstance(error, SyntaxError) and _is_same(error.filename, file):
        line = error.lineno
    for frame in traceback.extract_tb(error.__traceback__):
        if _is_same(frame.filename, file):
            line = frame.lineno
    return f"{shorten(file)}: " if line is None else f"{shorten(file)}, line {line}: "


def _is_same(first: str | None, second: str) -> bool:
    return first is not None and os.path.abspath(first) == os.path.abspath(second)


def shorten(file: str) -> str:
    """Returns a path relative to the current folder if it is inside."""
    path = Path(os.path.abspath(file))
    with contextlib.suppress(ValueError, OSError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _message(error: BaseException) -> str:
    try:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:
        text = "(its message cannot be printed)"
    line = " ".join(text.split())
    if len(line) > MOST_CHARACTERS:
        line = f"{line[:MOST_CHARACTERS]}..."
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


class _Printed(io.StringIO):
    """A text stream that keeps only the start of what is written."""

    def write(self, text: str, /) -> int:
        """Keeps the text if there is room."""
        super().write(text[: max(0, MOST_PRINTED - self.tell())])
        return len(text)


@contextlib.contextmanager
def kept() -> Iterator[io.StringIO]:
    """Keeps what Python code prints, so that it is not mixed with bars and tables.

    Yields:
        A stream with all of it.
    """
    stream = _Printed()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield stream
