"""What a folder is that is not a finished run, for whoever gives it as one."""

import difflib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

__all__ = ["describe"]

LISTED = 5


def describe(folder: Path) -> str | None:
    """Says what is there in the place of a finished run, and what to do.

    Args:
        folder: without `metrics.json`, or missing.

    Returns:
        What follows the folder's name in a message, or None if the folder holds nothing known.
    """
    if not os.path.lexists(folder):
        return f"does not exist, expected the folder of a run{_similar(folder)}"
    if not os.path.isdir(folder):
        return "is not a folder, expected the folder of a run; give the folder"
    if is_unfinished(folder):
        again = f"bn-jax train --resume {shlex.quote(str(folder))}"
        return f"is an unfinished run, expected a finished one; finish it with {again}"
    if (run := _run_around(folder)) is not None:
        return f"is a part of a run, expected its whole folder; give {shlex.quote(str(run))}"
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
    return os.path.isdir(folder / "checkpoints") and not is_finished(folder)


def is_finished(folder: Path) -> bool:
    """Tells whether a folder has the file that a run writes last."""
    return os.path.exists(folder / "metrics.json")


def _run_around(folder: Path) -> Path | None:
    around = list(folder.absolute().parents)[:3]
    return next((path for path in around if is_finished(path) or is_unfinished(path)), None)


def _claims(folder: Path) -> list[str]:
    from bn_jax.lab.experiments import EXPERIMENTS

    return [name for name in EXPERIMENTS if os.path.exists(folder / f"{name}.json")]


def _runs_in(folder: Path) -> list[str]:
    """Lists the runs in a folder; runs that are named by their date come with the newest first."""
    try:
        paths = sorted(folder.iterdir(), reverse=True)
    except OSError:
        return []
    finished = [shlex.quote(str(path)) for path in paths if is_finished(path)]
    unfinished = [f"{shlex.quote(str(p))} (unfinished)" for p in paths if is_unfinished(p)]
    return finished + unfinished


def _similar(folder: Path) -> str:
    present = [Path(name).name for name in _names(folder.parent)]
    close = difflib.get_close_matches(folder.name, present, n=1)
    return f"; did you mean {shlex.quote(str(folder.with_name(close[0])))}?" if close else ""


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if is_finished(path) or is_unfinished(path)]
    except OSError:
        return []


def _list(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
