"""How many processes train together: what the options say, or a launcher in the environment.

JAX is not imported here, so that a process can still fork (see `supervision`).
"""

import os
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from bn_jax.lab.console.arguments import LARGEST, check_range
from bn_jax.lab.errors import CommandError

__all__ = ["Launch", "check_launch", "has_launcher", "launched_processes"]

OPTIONS = "--coordinator, --num-processes and --process-id"
# The variables by which `jax.distributed.initialize` counts processes, in the order in which it
# looks for Open MPI and Slurm. `srun` sets the number of a step; within a job, but outside of a
# step, there is one process.
PROCESS_COUNTS = ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
# The variables for Cloud TPU: a list of hosts for each slice. The first that is set counts.
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
TPU_SLICES = "MEGASCALE_NUM_SLICES"
# Launchers that `jax.distributed.initialize` does not recognize by itself: MPICH, Intel MPI.
UNKNOWN_COUNTS = ("PMI_SIZE",)
# gRPC crashes the process on ports that it cannot read, such as Unicode digits.
ADDRESS = re.compile(r"(?P<host>\[[!-Z^-~]+\]|[!-9;-Z^-~]+):(?P<port>[0-9]{1,5})")


class Launch(NamedTuple):
    """How many processes train together.

    Attributes:
        processes: their number.
        coordinator: `HOST:PORT` of process 0. None: the launcher of the processes tells JAX.
        process_id: the number of this process, from 0. None: as above.
    """

    processes: int
    coordinator: str | None = None
    process_id: int | None = None

    @property
    def is_distributed(self) -> bool:
        """Whether this process connects with others, be it alone in their group."""
        return self.processes > 1 or self.coordinator is not None


def check_launch(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Launch:
    """Combines the three options about processes, or what the environment says without them."""
    for variable in ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"):
        if variable in os.environ:
            _check_address(variable, os.environ[variable])
    options = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    missing = [option for option, value in options.items() if value is None]
    if len(missing) == len(options):
        return Launch(_check_environment())
    if coordinator is None or num_processes is None or process_id is None:
        raise CommandError(
            f"{' and '.join(missing)}: missing; give {OPTIONS} together or none of them"
        )
    check_range("--num-processes", num_processes, 1, LARGEST, "start as many processes")
    if not 0 <= process_id < num_processes:
        raise CommandError(
            f"--process-id: received {process_id}, expected 0 to {num_processes - 1} for "
            f"--num-processes {num_processes}; number the processes from 0"
        )
    port = _check_address("--coordinator", coordinator)
    if process_id == 0:
        _check_listening(coordinator, port)
    return Launch(num_processes, coordinator, process_id)


def _check_environment() -> int:
    launched = launched_processes(os.environ)
    if launched == 1 and "JAX_COORDINATOR_ADDRESS" in os.environ:
        raise CommandError(
            "JAX_COORDINATOR_ADDRESS is set, expected also a launcher that tells JAX the number "
            f"of processes; give {OPTIONS}, or unset it"
        )
    return launched


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Tells whether the environment is that of a launcher that JAX recognizes."""
    return any(environment.get(variable) for variable in (*PROCESS_COUNTS, *TPU_HOSTS))


def launched_processes(environment: Mapping[str, str]) -> int:
    """Returns how many processes were launched together, if JAX recognizes the launcher.

    Kubernetes keeps the number in its API, and `mpi4py` has to be chosen in code: under both, and
    under other launchers, the options say it.

    Args:
        environment: the variables of this process.

    Returns:
        The number that Open MPI, Slurm's `srun` or Cloud TPU sets in the environment, or 1.

    Raises:
        CommandError: a variable is no number, or is set by a launcher that JAX does not recognize.
    """
    for variable in PROCESS_COUNTS:
        if environment.get(variable):
            return _read_count(environment, variable)
    for variable in TPU_HOSTS:
        if environment.get(variable):
            slices = _read_count(environment, TPU_SLICES) if environment.get(TPU_SLICES) else 1
            return slices * len(environment[variable].split(","))
    for variable in UNKNOWN_COUNTS:
        if environment.get(variable) and _read_count(environment, variable) > 1:
            raise CommandError(
                f"{variable} is {environment[variable]}, set by a launcher that JAX does not "
                f"recognize; give {OPTIONS}, or unset it to train with one process"
            )
    return 1


def _read_count(environment: Mapping[str, str], variable: str) -> int:
    text = environment[variable]
    # `int` also takes Unicode digits, signs, spaces and underscores.
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and 0 < int(text) <= LARGEST):
        raise CommandError(
            f"{variable}: received {text!r}, expected a number from 1 to {LARGEST}, as a launcher "
            f"of processes sets it; unset it, or give {OPTIONS}"
        )
    return int(text)


def _check_address(option: str, address: str) -> int:
    """Returns the port of an address whose host resolves."""
    parts = ADDRESS.fullmatch(address)
    if parts is None or not 0 < int(parts["port"]) < 2**16:
        raise CommandError(
            f"{option}: received {address}, expected HOST:PORT, in ASCII, with a port from 1 to "
            f"{2**16 - 1}; give the address of process 0, e.g. 127.0.0.1:1234 or [::1]:1234"
        )
    host, port = parts["host"].strip("[]"), int(parts["port"])
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CommandError(
            f"{option}: received {address}, whose host {host} cannot be found ({reason}), "
            "expected a name or an IP address that this machine resolves; give that of process 0"
        ) from error
    return port


def _check_listening(coordinator: str, port: int) -> None:
    """Raises an error if process 0 cannot listen, at which JAX's runtime would crash."""
    try:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", port))
        server.close()
    except OSError as error:
        raise CommandError(
            f"--coordinator: received {coordinator}, but process 0 cannot listen at port {port} "
            f"({os.strerror(error.errno or 0)}), expected a free port; choose another"
        ) from error
