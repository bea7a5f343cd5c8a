"""Errors of the command line, and how a process ends."""

import os
import sys
import threading
from typing import NoReturn

__all__ = [
    "INTERRUPTED",
    "CommandError",
    "abort",
    "is_distributed",
    "leave",
    "print_error",
    "print_warning",
]

INTERRUPTED = 130

_aborting = threading.Lock()


class CommandError(Exception):
    """A command cannot do what it was asked; `main` prints the message as one line.

    Attributes:
        code: exit status of the process: 1 for a failure, 2 for bad input, 130 for Ctrl-C.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def print_error(message: str) -> None:
    """Prints a message as one line of the error stream."""
    print("bn-jax: error:", " ".join(message.split()), file=sys.stderr, flush=True)


def print_warning(message: str) -> None:
    """Prints a message as one line of the error stream; the command goes on."""
    print("bn-jax: warning:", " ".join(message.split()), file=sys.stderr, flush=True)


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
    """Prints an error and ends the process at once.

    When another process is lost, a collective and JAX's runtime notice it in two threads: only the
    first prints.
    """
    _aborting.acquire()
    print_error(message)
    os._exit(1)
