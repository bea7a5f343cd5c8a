"""The process of the command `bn-jax`, from its first import to its end."""

import os
import sys
from typing import NoReturn

from bn_jax.lab.console import interrupts, terminal

__all__ = ["run"]


def run() -> NoReturn:
    """Runs the command line of this process, and ends it.

    Raises:
        SystemExit: after success.
    """
    terminal.prepare()
    interrupts.end_at_once()
    from bn_jax.lab.command import main

    try:
        main()
    except SystemExit as end:
        interrupts.ignore()
        if end.code:
            # An orderly end waits for threads of JAX and Orbax, which may still work, and crash.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise


if __name__ == "__main__":
    run()
