"""What Ctrl-C does.

Python raises KeyboardInterrupt wherever the process is: inside of an import that then fails for
another reason, in a destructor that drops it, in a thread pool that prints a traceback of every
task. Checkpoints are intact wherever a process ends, so Ctrl-C ends it at once, with a line. Only
code that has something to remove asks for the exception.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from bn_jax.lab.errors import INTERRUPTED, print_interrupted

__all__ = ["as_exceptions", "end_at_once", "ignore"]


def end_at_once() -> None:
    """Has Ctrl-C end this process with one line, unless it is ignored, as in the background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def ignore() -> None:
    """Has this process, which is about to end, ignore Ctrl-C."""
    if signal.getsignal(signal.SIGINT) in (_end, signal.default_int_handler):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def as_exceptions() -> Iterator[None]:
    """Has Ctrl-C raise KeyboardInterrupt inside of a block, which removes what it has begun."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    print_interrupted()
    os._exit(INTERRUPTED)
