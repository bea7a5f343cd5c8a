"""Devices and connected processes of a training, and what a user is told when one is lost."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from bn_jax import training
from bn_jax.lab import processes
from bn_jax.lab.distributed.launchers import Launch
from bn_jax.lab.errors import INTERRUPTED, CommandError, abort, advise, is_distributed

__all__ = ["agree", "explain_failures", "make_mesh", "one_device", "start_backend", "stop_if_lost"]

# XLA runs the virtual devices of a CPU on a pool of this many threads, and ends the process if more
# devices wait for each other in a collective.
MOST_CPU_DEVICES = 256
LOST = "another process was lost, or JAX's runtime failed as reported above"


def one_device() -> Mesh:
    """Makes a mesh of the first device."""
    start_backend()
    return training.make_mesh(jax.devices()[:1])


def start_backend() -> None:
    """Has JAX find its devices.

    Raises:
        CommandError: there are none, or not those that the environment names.
    """
    try:
        jax.devices()
    except Exception as error:
        chosen = os.environ.get("JAX_PLATFORMS")
        setting = "JAX_PLATFORMS is not set" if chosen is None else f"JAX_PLATFORMS is {chosen}"
        raise CommandError(
            f"JAX finds no devices ({type(error).__name__}: {error}); {setting}: choose a "
            "platform that this machine has, e.g. JAX_PLATFORMS=cpu",
            code=1 if chosen is None else 2,
        ) from error


def make_mesh(devices: int | None, examples: int, launch: Launch) -> Mesh:
    """Connects the processes, if there are several, and makes a mesh of their devices.

    Args:
        devices: how many in all. None: all; on a CPU, 2 virtual devices in each process.
        examples: the size of the dataset, at least one for each device.
        launch: the processes.

    Returns:
        A mesh with as many devices of each process.

    Raises:
        CommandError: there are not as many devices or examples, or no connection.
    """
    if devices is not None and devices % launch.processes:
        nearest = max(1, devices // launch.processes) * launch.processes
        raise CommandError(
            f"--devices: received {devices}, expected a multiple of the {launch.processes} "
            f"processes, which take equal numbers; use --devices {nearest}"
        )
    share = None if devices is None else devices // launch.processes
    _check_enough_examples(examples, share or 1, launch.processes)
    if launch.is_distributed:
        _connect(launch)
    # Once JAX has its devices their number is fixed, and the check below answers.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", share or 2)
    start_backend()
    if jax.process_count() != launch.processes:
        raise CommandError(
            f"JAX connected {jax.process_count()} processes where the environment names "
            f"{launch.processes}; give --coordinator, --num-processes and --process-id"
        )
    present = [jax.local_devices(process_index=index) for index in range(launch.processes)]
    _check_equal_numbers([len(local) for local in present])
    most = len(present[0])
    if share is None:
        share = 2 if jax.default_backend() == "cpu" else most
    if share > MOST_CPU_DEVICES and jax.default_backend() == "cpu":
        raise CommandError(
            f"--devices: received {share * launch.processes}, expected at most {MOST_CPU_DEVICES} "
            "virtual devices in each process on a CPU; lower it"
        )
    if share > most:
        raise CommandError(
            f"--devices: received {share * launch.processes}, expected at most the "
            f"{most * launch.processes} {jax.default_backend()} devices that JAX has; lower it"
        )
    _check_enough_examples(examples, share, launch.processes)
    return training.make_mesh([device for local in present for device in local[:share]])


def _check_enough_examples(examples: int, share: int, processes: int) -> None:
    devices = share * processes
    if examples >= devices:
        return
    fewer = f"use --devices {examples // processes * processes}"
    if examples < processes:
        fewer = f"start at most {examples} processes"
    raise CommandError(
        f"--data: received {examples} examples, expected at least one for each of {devices} "
        f"devices; add examples or {fewer}"
    )


def _check_equal_numbers(devices: list[int]) -> None:
    if len(set(devices)) == 1:
        return
    processes.disconnect()
    numbers = ", ".join(map(str, devices))
    raise CommandError(
        f"--devices: the {len(devices)} processes have {numbers} devices, expected as many in "
        "each; start every process with the options of process 0, on machines with as many"
    )


def _connect(launch: Launch) -> None:
    advise(
        "nothing was saved",
        f"the {launch.processes} processes did not connect within {processes.CONNECTION_TIMEOUT} "
        "seconds; start all of them, each with a --process-id of its own and all with the same "
        "--coordinator and --num-processes",
    )
    number = None if launch.coordinator is None else launch.processes
    try:
        processes.connect(launch.coordinator, number, launch.process_id)
    except Exception as error:
        raise CommandError(
            f"JAX cannot connect the processes ({error}); check --coordinator, the address of "
            "process 0, or give it with --num-processes and --process-id",
            code=1,
        ) from error
    advise("nothing was saved", LOST)


def agree(folder: Path, options: Mapping[str, object]) -> Path:
    """Compares the options of all processes.

    Args:
        folder: for the results, as this process would name it.
        options: values that must be the same in all processes.

    Returns:
        The folder of process 0.

    Raises:
        CommandError: in every process, if a value of one differs from that of process 0.
    """
    first = json.loads(processes.from_first(json.dumps({"--out": str(folder)} | dict(options))))
    different = [option for option, value in options.items() if value != first[option]]
    differs = processes.gather(bool(different))
    differing = [str(index) for index, is_other in enumerate(differs) if is_other]
    if not differing:
        return Path(first["--out"])
    processes.disconnect()
    if different:
        option = different[0]
        what = f"{option}: received {options[option]}, process 0 {first[option]}"
    else:
        what = f"process {', '.join(differing)} received other options"
    raise CommandError(
        f"{what}, expected the same; start every process with the options of process 0"
    )


@contextlib.contextmanager
def explain_failures(folder: Path) -> Iterator[None]:
    """Turns failures of a training into one line that says how to continue.

    Args:
        folder: the folder of the run, which has the checkpoints.

    Yields:
        Nothing; the training runs inside.
    """
    start = "continue" if jax.process_count() == 1 else "start every process again"
    advice = f"{start} with bn-jax train --resume {shlex.quote(str(folder))}"
    advise(advice, LOST)
    try:
        yield
    except KeyboardInterrupt as error:
        raise CommandError(f"interrupted; {advice}", INTERRUPTED) from error
    except OSError as error:
        raise CommandError(f"{error}; {advice}", code=1) from error
    except jax.errors.JaxRuntimeError as error:
        stop_if_lost(error, advice)
        raise


def stop_if_lost(error: Exception, advice: str) -> None:
    """Ends this process at once if an error comes from the loss of another process."""
    if is_distributed() and isinstance(error, jax.errors.JaxRuntimeError):
        abort(f"another process was lost ({str(error).splitlines()[0]}); {advice}")
