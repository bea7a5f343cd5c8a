"""Errors of the command line, and how a process ends."""

import os
import sys
from typing import NoReturn

__all__ = [
    "INTERRUPTED",
    "CommandError",
    "abort",
    "advise",
    "is_distributed",
    "leave",
    "print_error",
    "print_interrupted",
    "show_cursor",
    "tell_parent",
]

INTERRUPTED = 130

_advice = "nothing was saved"
# The pipe to a parent that prints the errors of this process, see `supervision`.
_to_parent: int | None = None


class CommandError(Exception):
    """A command cannot do what it was asked; `main` prints the message as one line.

    Attributes:
        code: exit status of the process: 1 for a failure, 2 for bad input, 130 for Ctrl-C.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def tell_parent(pipe: int) -> None:
    """Has the parent of this process print its errors once it has ended.

    So there is one line even if the runtime aborts the process while it reports an error.

    Args:
        pipe: the file descriptor of a pipe to the parent.
    """
    global _to_parent
    _to_parent = pipe


def advise(advice: str, aborted: str) -> None:
    """Says what is printed when something ends this process, now or later.

    Args:
        advice: how to continue; it replaces the last one.
        aborted: what has happened if JAX's runtime aborts the process, which its parent prints.
    """
    global _advice
    _advice = advice
    _tell("advice", advice)
    _tell("aborted", aborted)


def print_error(message: str) -> None:
    """Prints a message as one line of the error stream."""
    line = " ".join(message.split())
    if not _tell("error", line):
        print("bn-jax: error:", line, file=sys.stderr, flush=True)


def print_interrupted() -> None:
    """Prints the line about Ctrl-C; to be called by a handler of the signal."""
    show_cursor()
    line = f"interrupted; {_advice}"
    if not _tell("error", line):
        # Not through sys.stderr, which the handler may have interrupted.
        os.write(2, f"bn-jax: error: {line}\n".encode(errors="backslashreplace"))


def show_cursor() -> None:
    """Shows the cursor of a terminal, which a progress bar hides, on a new line."""
    if sys.stderr.isatty() and os.environ.get("TERM") not in (None, "dumb"):
        os.write(2, b"\x1b[?25h\n")


def _tell(kind: str, line: str) -> bool:
    if _to_parent is None:
        return False
    os.write(_to_parent, f"{kind} {line}\n".encode(errors="backslashreplace"))
    return True


def is_distributed() -> bool:
    """Tells whether this process is connected with others. Does not import JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def leave(code: int) -> NoReturn:
    """Ends the process; after a failure, without waiting for the other processes.

    An orderly exit waits until all connected processes end, and they wait for this one.
    """
    if code and is_distributed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def abort(message: str) -> NoReturn:
    """Prints an error and ends the process at once, before JAX's runtime aborts it."""
    print_error(message)
    os._exit(1)
