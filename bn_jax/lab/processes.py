"""Several processes that train together on JAX's distributed runtime."""

import ctypes
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

CONNECTION_TIMEOUT = 60
HEARTBEAT_TIMEOUT = 20

# The C code that calls a handler holds no reference to it.
_abort_handlers: list[Any] = []


def launched_processes() -> int:
    """Says how many processes were launched together, where JAX recognizes the launcher.

    Returns:
        The number that Open MPI, Slurm's `srun` or Cloud TPU names in the environment, or 1.
    """
    for variable in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if (number := os.environ.get(variable, "")).isdecimal():
            return int(number)
    return 1 + os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",")


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process with the others, before JAX has looked for its devices.

    Args:
        coordinator: `HOST:PORT` of process 0. None, as the two others: as the launcher says.
        num_processes: how many processes there are.
        process_id: which one this is, from 0.

    Raises:
        ValueError: JAX finds no launcher in the environment.
        OSError: process 0 cannot listen at its port.
        RuntimeError: JAX has looked for its devices already.
    """
    if coordinator is not None and process_id == 0:
        # Where it cannot listen, JAX's runtime ends with a segmentation fault.
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=CONNECTION_TIMEOUT,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
    )


def from_first(text: str) -> str:
    """Sends a text of process 0 to all.

    Args:
        text: at least one character; only that of process 0 counts.

    Returns:
        The text of process 0, in every process.
    """
    encoded = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(encoded.size)))
    sent = multihost_utils.broadcast_one_to_all(np.resize(encoded, length))
    return np.asarray(sent).tobytes().decode()


def on_abort(stop: Callable[[], object]) -> None:
    """Has a function called when JAX's runtime aborts this process, as it does for a lost one.

    Args:
        stop: ends the process by `os._exit`; it replaces the function of an earlier call.
    """

    # The runtime aborts from a thread of its own. A handler of Python's `signal` waits for the main
    # thread, and the process would be gone before.
    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_: int) -> None:
        stop()

    _abort_handlers.append(handler)
    ctypes.pythonapi.PyOS_setsig(signal.SIGABRT, handler)
