"""Checks of the command line's arguments that need neither JAX nor data."""

import datetime
import difflib
import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bn_jax.lab.errors import CommandError

__all__ = [
    "FOR_FILES_OF_RUNS",
    "FOR_SAVED_RUNS",
    "LARGEST",
    "are_distinct_names",
    "check_choice",
    "check_counts",
    "check_learning_rate",
    "check_range",
    "new_file",
    "new_folder",
    "new_picture",
    "require",
]

PICTURES = (".png", ".pdf", ".svg")
FOR_FILES_OF_RUNS = ("filelock", "pydantic", "safetensors")
FOR_SAVED_RUNS = ("rich", "orbax.checkpoint", "flatbuffers", *FOR_FILES_OF_RUNS)
# JAX and its runtime count devices, processes, examples and steps in int32.
LARGEST = 2**31 - 1
# The normal numbers of float32, in which the optimizer computes.
SMALLEST_RATE, LARGEST_RATE = 2.0**-126, 2.0**127


def are_distinct_names(names: Sequence[str]) -> bool:
    """Tells whether names can be printed and told apart: none is empty, equal, or a control."""
    return len(set(names)) == len(names) and all(n and n.isprintable() for n in names)


def require(*modules: str) -> None:
    """Raises an error if an optional package is not installed, or cannot be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise CommandError(
                f"{error.name} is not installed; install with pip install 'bn-jax[lab]'", code=1
            ) from error
        except Exception as error:
            # JAX reads its environment variables when it is imported.
            raise CommandError(
                f"{module} cannot be imported ({type(error).__name__}: {error}); check the "
                "environment variables that begin with JAX_, or install it anew",
                code=2 if isinstance(error, ValueError) else 1,
            ) from error


def check_counts(**options: int | None) -> None:
    """Raises an error if an option is given and is not a positive number that JAX can count."""
    for name, value in options.items():
        if value is not None:
            check_range(
                f"--{name.replace('_', '-')}",
                value,
                1,
                LARGEST,
                "choose one of these, or leave the option out for its default",
            )


def check_learning_rate(rate: float) -> None:
    """Raises an error if float32 makes zero, infinity or NaN of the learning rate."""
    if not SMALLEST_RATE <= rate <= LARGEST_RATE:
        raise CommandError(
            f"--learning-rate: received {rate}, expected a positive number that float32 holds, "
            f"{SMALLEST_RATE:.1e} to {LARGEST_RATE:.1e}; choose one, or leave the option out for "
            "its default"
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
        for path in (folder, *folder.parents):
            if path.is_symlink() and not path.exists():
                raise CommandError(
                    f"--out: {path} is a link to nothing, expected a new folder; choose another "
                    "name or remove it"
                )
        if folder.exists() and not folder.is_dir():
            raise CommandError(
                f"--out: {folder} is a file, expected a new folder; choose another name"
            )
        if folder.exists() and folder.samefile("."):
            raise CommandError(
                f"--out: received {folder}, the current folder, expected a new one; choose a name"
            )
        if folder.exists() and any(folder.iterdir()):
            raise CommandError(
                f"--out: {folder} exists and is not empty; choose another name or remove it"
            )
        _try_to_make(folder)
    # Of a name that is no UTF-8, of a loop of links.
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(
            f"--out: {folder} cannot be made ({_reason(error)}); choose another folder"
        ) from error
    return folder


def _try_to_make(folder: Path) -> None:
    """Makes a folder of this name inside of a temporary one, in the folder where it belongs."""
    str(folder).encode()
    path = folder.resolve()
    parent = next(parent for parent in (path, *path.parents) if parent.exists())
    with tempfile.TemporaryDirectory(prefix=".bn-jax-", dir=parent) as temporary:
        Path(temporary, path.relative_to(parent)).mkdir(parents=True, exist_ok=True)


def _reason(error: Exception) -> str:
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error)


def new_file(out: Path | None, default: Path) -> Path:
    """Returns the file for a result, which is missing and can be made in its folder.

    Args:
        out: the option --out.
        default: the file without that option.
    """
    file = out or default
    _check_new_file("--out", file)
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
    _check_new_file("--plot", path)


def _check_new_file(option: str, file: Path) -> None:
    """Raises an error unless a file is missing and can be made; makes it, and removes it again."""
    try:
        str(file).encode()
        file.open("x").close()
        file.unlink()
    except FileExistsError as error:
        raise CommandError(f"{option}: {file} exists; choose another name or remove it") from error
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{option}: {file} cannot be made ({_reason(error)}), expected a new file in a folder "
            "that exists and that you may write to; choose another"
        ) from error
