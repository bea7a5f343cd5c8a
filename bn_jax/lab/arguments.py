"""Checks of the command line's arguments that need neither JAX nor data."""

import datetime
import difflib
import importlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bn_jax.lab.errors import CommandError

__all__ = [
    "FOR_SAVED_RUNS",
    "Launch",
    "check_choice",
    "check_launch",
    "check_positive",
    "check_range",
    "new_file",
    "new_folder",
    "new_picture",
    "require",
]

PICTURES = (".png", ".pdf", ".svg")
FOR_SAVED_RUNS = ("rich", "orbax.checkpoint", "safetensors", "flatbuffers")


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


def require(*modules: str) -> None:
    """Raises an error if an optional package is not installed."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise CommandError(
                f"{error.name} is not installed; install with pip install 'bn-jax[lab]'", code=1
            ) from error


def check_positive(**options: float | None) -> None:
    """Raises an error if an option is given and is not a positive finite number."""
    for name, value in options.items():
        if value is not None and not 0 < value < math.inf:
            raise CommandError(
                f"--{name.replace('_', '-')}: received {value}, expected a positive finite number; "
                "choose one, or leave the option out for its default"
            )


def check_range(option: str, value: int, least: int, most: int, reason: str) -> None:
    """Raises an error if an integer is not from `least` to `most`."""
    if not least <= value <= most:
        raise CommandError(f"{option}: received {value}, expected {least} to {most}; {reason}")


def check_choice(option: str, received: str, choices: Sequence[str]) -> None:
    """Raises an error if a word is none of those to choose from."""
    if received not in choices:
        close = difflib.get_close_matches(received, choices, n=1)
        raise CommandError(
            f"{option}: received {received}, expected {' or '.join(choices)}; "
            + (f"did you mean {close[0]}?" if close else "choose one of these")
        )


def check_launch(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Launch:
    """Combines the three options about processes, or what the environment says without them."""
    options = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    missing = [option for option, value in options.items() if value is None]
    if len(missing) == len(options):
        return Launch(_launched_processes())
    if coordinator is None or num_processes is None or process_id is None:
        raise CommandError(
            f"{' and '.join(missing)}: missing; give {', '.join(options)} together or none of them"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise CommandError(
            f"--coordinator: received {coordinator}, expected HOST:PORT with a port from 1 to "
            f"{2**16 - 1}; give the address of process 0, e.g. 127.0.0.1:1234"
        )
    if not 0 <= process_id < num_processes:
        raise CommandError(
            f"--process-id: received {process_id}, expected 0 to {num_processes - 1} for "
            f"--num-processes {num_processes}; number the processes from 0"
        )
    return Launch(num_processes, coordinator, process_id)


def _launched_processes() -> int:
    from bn_jax.lab import processes

    launched = processes.launched_processes()
    if launched == 1 and "JAX_COORDINATOR_ADDRESS" in os.environ:
        raise CommandError(
            "JAX_COORDINATOR_ADDRESS is set, expected also a launcher that tells JAX the number "
            "of processes; give --coordinator, --num-processes and --process-id, or unset it"
        )
    return launched


def new_folder(out: Path | None, default: Path | None = None) -> Path:
    """Returns the folder for results, which is missing or empty and can be made.

    Args:
        out: the option --out.
        default: the folder without that option. None: named by date and time, in `runs`.
    """
    folder = out or default
    if folder is None:
        folder = Path("runs", datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    try:
        if folder.exists() and not folder.is_dir():
            raise CommandError(
                f"--out: {folder} is a file, expected a new folder; choose another name"
            )
        if folder.exists() and any(folder.iterdir()):
            raise CommandError(
                f"--out: {folder} exists and is not empty; choose another name or remove it"
            )
        parent = _existing_parent(folder)
    except OSError as error:
        raise CommandError(
            f"--out: {folder} cannot be used ({error.strerror}); choose another folder"
        ) from error
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise CommandError(f"--out: {folder} cannot be made in {parent}; choose another folder")
    return folder


def new_file(out: Path | None, default: Path) -> Path:
    """Returns the file for a result, which is missing and can be made in its folder.

    Args:
        out: the option --out.
        default: the file without that option.
    """
    file = out or default
    if not _is_in_reach("--out", file):
        raise CommandError(
            f"--out: {file} cannot be made in {file.parent}; choose a folder that exists and that "
            "you may write to"
        )
    return file


def new_picture(path: Path | None) -> None:
    """Raises an error if the option --plot is given and no figure can be written there."""
    if path is None:
        return
    require("matplotlib")
    if path.suffix not in PICTURES:
        raise CommandError(
            f"--plot: received {path}, expected a file name that ends in {', '.join(PICTURES)}; "
            "choose one of these"
        )
    if not _is_in_reach("--plot", path):
        raise CommandError(f"--plot: {path} cannot be written there; choose another folder")


def _is_in_reach(option: str, file: Path) -> bool:
    """Tells whether the folder of a new file can be written to; raises if the file exists."""
    try:
        if file.exists() or file.is_symlink():
            raise CommandError(f"{option}: {file} exists; choose another name or remove it")
        return file.parent.is_dir() and os.access(file.parent, os.W_OK | os.X_OK)
    except OSError as error:
        raise CommandError(
            f"{option}: {file} cannot be used ({error.strerror}); choose another file"
        ) from error


def _existing_parent(folder: Path) -> Path:
    return next(parent for parent in folder.absolute().parents if parent.exists())
