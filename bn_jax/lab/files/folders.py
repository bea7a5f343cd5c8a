"""What a folder is that is not a finished run, for whoever gives it as one."""

import difflib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from bn_jax.lab.console.choices import ARMS

__all__ = ["describe", "is_finished", "is_unfinished"]

LISTED = 5


def describe(folder: Path) -> str | None:
    """Says what is there in the place of a finished run, and what to do.

    Args:
        folder: without `metrics.json`, or missing.

    Returns:
        What follows the folder's name in a message, or None if the folder holds nothing known.
    """
    if not os.path.exists(folder):
        return f"does not exist, expected the folder of a run{_similar(folder)}"
    if is_unfinished(folder):
        again = f"bn-jax train --resume {shlex.quote(str(folder))}"
        return f"is an unfinished run, expected a finished one; finish it with {again}"
    if (run := _run_around(folder)) is not None:
        return f"is a part of a run, expected its whole folder; give {shlex.quote(str(run))}"
    if not os.path.isdir(folder):
        return "is a file, expected the folder of a run"
    if os.path.exists(folder / "model.json"):
        return (
            "is an exported model, expected a run; load it as its README.md shows, or give the run "
            "that was exported"
        )
    if os.path.exists(folder / "audit.json"):
        return "holds an audit, expected a run; give the run that was audited"
    if claims := _claims(folder):
        return (
            f"holds results of bn-jax reproduce ({_list(claims)}), expected a run of bn-jax train"
        )
    if inside := _runs_in(folder):
        return f"holds runs, expected one run; give one of {_list(inside)}"
    return None


def is_unfinished(folder: Path) -> bool:
    """Tells whether a folder is a run with checkpoints and without results."""
    begun = ("config.json", *(arm.replace(" ", "-") for arm in ARMS))
    found = any(os.path.exists(folder / "checkpoints" / name) for name in begun)
    return found and not is_finished(folder)


def is_finished(folder: Path) -> bool:
    """Tells whether a folder has the file that a run writes last."""
    return os.path.exists(folder / "metrics.json")


def _run_around(folder: Path) -> Path | None:
    named = folder.resolve() if folder.name in ("", "..") else folder
    return next((path for path in list(named.parents)[:3] if _is_run(path)), None)


def _is_run(folder: Path) -> bool:
    return is_finished(folder) or is_unfinished(folder)


def _claims(folder: Path) -> list[str]:
    from bn_jax.lab.experiments import EXPERIMENTS

    return [name for name in EXPERIMENTS if os.path.exists(folder / f"{name}.json")]


def _runs_in(folder: Path) -> list[str]:
    """Lists the runs in a folder, finished ones first."""
    paths = sorted(filter(_is_run, _present(folder)), key=is_finished, reverse=True)
    return [
        shlex.quote(str(path)) + ("" if is_finished(path) else " (unfinished)") for path in paths
    ]


def _similar(folder: Path) -> str:
    present = [path.name for path in _present(folder.parent) if _is_run(path)]
    close = difflib.get_close_matches(folder.name, present, n=1)
    return f"; did you mean {shlex.quote(str(folder.with_name(close[0])))}?" if close else ""


def _present(folder: Path) -> list[Path]:
    """Lists a folder in reverse order, so that the newest comes first of names that are dates."""
    try:
        return sorted(folder.iterdir(), reverse=True)
    except OSError:
        return []


def _list(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
