"""A process that watches the one which trains with others, and says in a line how it failed.

When a process of several is lost, JAX's runtime aborts the others from a thread of its own, and no
public API tells them before: `jax.distributed.initialize` takes no callback, a handler of Python's
`signal` waits for the main thread, which waits for the lost process, and with
`jax_enable_recoverability` a process that waits for a hung one is never told. Seen from outside, it
is a process that a signal ended. So the command forks before it imports JAX: the child trains; the
parent waits, forwards signals, and prints a line if the child fails. That covers each end that no
code inside can report: an abort, a crash, a lack of memory.

A process that cannot fork (on Windows, or because JAX is imported already) prints its errors
itself, and of an abort shows the runtime's own report alone.
"""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

from bn_jax.lab.errors import print_error, show_cursor, tell_parent

__all__ = ["supervise"]

FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP")
# A pipe holds this much without a reader; a process tells a few lines.
PIPE = 2**16


def supervise() -> None:
    """Continues in a child of this process, which then ends as the child does.

    Raises:
        SystemExit: in the parent, when the child has ended.
    """
    if not hasattr(os, "fork") or "jax" in sys.modules or threading.active_count() > 1:
        return
    from_child, to_parent = os.pipe()
    life_of_parent, held_by_parent = os.pipe()
    child = os.fork()
    if child:
        os.close(to_parent)
        os.close(life_of_parent)
        _end_as(child, from_child)
    os.close(from_child)
    os.close(held_by_parent)
    tell_parent(to_parent)
    threading.Thread(target=_end_with_parent, args=(life_of_parent,), daemon=True).start()


def _end_with_parent(life_of_parent: int) -> None:
    # Nothing is ever written there: reading returns once the parent has ended, in whatever way.
    os.read(life_of_parent, 1)
    os._exit(1)


def _end_as(child: int, from_child: int) -> NoReturn:
    """Waits for the child, and ends with its exit status, or with 1 if a signal ended it."""
    _forward_signals(child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0:
        # Without waiting for the end of the pipe, which a process of the child may hold.
        os.set_blocking(from_child, False)
        show_cursor()
        print_error(_describe(code, os.read(from_child, PIPE).decode()))
    sys.exit(1 if code < 0 else code)


def _forward_signals(child: int) -> None:
    """Sends a signal on to the child, and kills the child at the second one."""
    are_forwarded = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal are_forwarded
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL if are_forwarded else number)
        are_forwarded = True

    for name in FORWARDED:
        number = signal.Signals[name]
        # A process in the background of a shell, or under nohup, ignores some.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)


def _describe(code: int, told: str) -> str:
    """Returns the line about a child that failed."""
    last = {"advice": "nothing was saved"}
    last |= dict(line.split(" ", 1) for line in told.splitlines())
    if "error" in last:
        return last["error"]
    if code == -signal.SIGABRT and "aborted" in last:
        reason = last["aborted"]
    elif code < 0:
        reason = f"{signal.Signals(-code).name} ended this process"
    else:
        reason = "this process failed as reported above"
    return f"{reason}; {last['advice']}"
