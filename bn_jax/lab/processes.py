"""Several processes that train together, on JAX's distributed runtime."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from bn_jax.lab.distributed.launchers import has_launcher

__all__ = ["CONNECTION_TIMEOUT", "connect", "disconnect", "from_first", "gather"]

CONNECTION_TIMEOUT = 60
"""How many seconds `connect` waits for the other processes."""
HEARTBEAT_TIMEOUT = 20


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process with the others, before JAX initializes its devices.

    All arguments are None if a launcher provides them.

    Args:
        coordinator: `HOST:PORT` of process 0.
        num_processes: number of processes.
        process_id: number of this process, from 0.

    Raises:
        ValueError: JAX finds no launcher in the environment.
        RuntimeError: JAX has initialized its devices already.
    """
    # Else JAX catches SIGTERM, for a synchronization that a training may then ask for.
    jax.config.update("jax_enable_preemption_service", False)
    # A launcher also says which devices are for which process of a machine. Without one, JAX would
    # ask Kubernetes or a cloud, and warn, for what the arguments say already.
    is_complete = coordinator is not None and not has_launcher(os.environ)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        cluster_detection_method="deactivate" if is_complete else None,
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


def gather(value: bool) -> list[bool]:
    """Returns the values of all processes, in their order."""
    return np.atleast_1d(multihost_utils.process_allgather(np.bool_(value))).tolist()


def disconnect() -> None:
    """Disconnects all processes, so that none of them takes another for lost when it ends.

    Every process has to call it. One that is not connected does nothing.
    """
    jax.distributed.shutdown()
