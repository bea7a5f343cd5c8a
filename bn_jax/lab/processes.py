"""Several processes that train together, on JAX's distributed runtime."""

import ctypes
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["CONNECTION_TIMEOUT", "connect", "from_first", "launched_processes", "on_abort"]

CONNECTION_TIMEOUT = 60
HEARTBEAT_TIMEOUT = 20

# The C code that calls a handler holds no reference to it.
_abort_handlers: list[Any] = []


def launched_processes() -> int:
    """Returns how many processes were launched together, if JAX recognizes the launcher.

    Returns:
        The number that Open MPI, Slurm's `srun` or Cloud TPU sets in the environment, or 1.
    """
    for variable in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if (number := os.environ.get(variable, "")).isdecimal():
            return int(number)
    return 1 + os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",")


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process with the others, before JAX initializes its devices.

    All arguments are None if a launcher provides them.

    Args:
        coordinator: `HOST:PORT` of process 0.
        num_processes: number of processes.
        process_id: number of this process, from 0.

    Raises:
        ValueError: JAX finds no launcher in the environment.
        OSError: process 0 cannot listen at its port.
        RuntimeError: JAX has initialized its devices already.
    """
    if coordinator is not None and process_id == 0:
        # JAX's runtime ends with a segmentation fault if it cannot listen.
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=CONNECTION_TIMEOUT,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
    )


def from_first(text: str) -> str:
    """Sends a string from process 0 to all processes.

    Args:
        text: at least one character; ignored in all processes but process 0.

    Returns:
        The string of process 0, in every process.
    """
    encoded = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(encoded.size)))
    sent = multihost_utils.broadcast_one_to_all(np.resize(encoded, length))
    return np.asarray(sent).tobytes().decode()


def on_abort(stop: Callable[[], object]) -> None:
    """Registers a function to call when JAX's runtime aborts this process.

    It does so when another process is lost.

    Args:
        stop: ends the process by `os._exit`; it replaces the function of an earlier call.
    """

    # The runtime aborts from another thread. A handler of Python's `signal` waits for the main
    # thread, and the process would end before it runs.
    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_: int) -> None:
        stop()

    _abort_handlers.append(handler)
    ctypes.pythonapi.PyOS_setsig(signal.SIGABRT, handler)
