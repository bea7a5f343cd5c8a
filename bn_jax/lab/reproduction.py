"""The command `bn-jax reproduce`: tests published claims by experiments."""

import contextlib
import math
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax

from bn_jax.lab import interrupts, launch, progress
from bn_jax.lab.arguments import check_range
from bn_jax.lab.errors import INTERRUPTED, CommandError
from bn_jax.lab.experiments import extensions, forest, writing
from bn_jax.lab.experiments.reproducing import choose, reproduce_each
from bn_jax.lab.experiments.verdicts import Experiment, Setting
from bn_jax.lab.reading import MOST_BYTES, read_json
from bn_jax.lab.writing import staged

__all__ = ["check_names", "check_setting", "default_processes", "known", "read", "reproduce"]

MOST_SEEDS = 1000


def known() -> list[Experiment]:
    """Returns all claims, those of installed packages too."""
    try:
        return list(extensions.known().values())
    except ValueError as error:
        raise CommandError(str(error), code=1) from error


def check_names(names: Sequence[str]) -> list[Experiment]:
    """Returns the experiments with these names or numbers."""
    try:
        return choose(names)
    except ValueError as error:
        raise CommandError(f"NAME: {error}") from error


def check_setting(seeds: int | None, first_seed: int, quick: bool) -> Setting:
    """Returns how much is run, by default with 16 seeds, or with 3 if it has to be quick."""
    if seeds is None:
        seeds = 3 if quick else 16
    check_range("--seeds", seeds, 2, MOST_SEEDS, "an interval needs more than one run")
    check_range("--first-seed", first_seed, 0, 2**31 - MOST_SEEDS - 1, "choose one of these")
    return Setting(seeds, first_seed, quick)


def default_processes() -> int:
    """Compiling occupies one core; the memory of an accelerator is not to be shared."""
    launch.start_backend()
    return 2 if jax.default_backend() == "cpu" and (os.cpu_count() or 1) > 1 else 1


def reproduce(
    chosen: Sequence[Experiment],
    setting: Setting,
    folder: Path,
    processes: int,
    *,
    shows_progress: bool = True,
) -> list[dict[str, Any]]:
    """Runs experiments, shows their progress, and draws all sub-claims into ``forest.png``.

    Args:
        chosen: the experiments.
        setting: how much is run.
        folder: for a JSON file and a figure of each, and their values.
        processes: how many experiments are run at the same time.
        shows_progress: whether bars or lines show how far they are.

    Returns:
        The contents of their JSON files, in the order of `chosen`.

    Raises:
        CommandError: after Ctrl-C, or if a process died.
    """
    if processes == 1:
        launch.start_backend()
    records: dict[str, dict[str, Any]] = {}
    try:
        with (
            # Its processes have to be ended.
            interrupts.as_exceptions(),
            progress.show_claims(chosen, is_wanted=shows_progress) as show,
            contextlib.closing(
                reproduce_each(chosen, setting, folder, min(processes, len(chosen)), show)
            ) as finished,
        ):
            for experiment, record in finished:
                records[experiment.name] = record
                show(experiment, math.inf, record)
    except KeyboardInterrupt as error:
        saved = f"{len(records)} of {len(chosen)} claims are in {folder}"
        raise CommandError(f"interrupted; {saved}", INTERRUPTED) from error
    except BrokenProcessPool as error:
        saved = f"{len(records)} of {len(chosen)} claims are in {folder}"
        raise CommandError(
            f"a process died, perhaps for lack of memory: try --processes 1; {saved}", code=1
        ) from error
    in_order = [records[experiment.name] for experiment in chosen]
    with staged(folder) as staging:
        forest.save(in_order, staging / "forest.png")
    return in_order


def read(name: str, folder: Path | None) -> dict[str, Any]:
    """Returns what a folder of results holds on a claim, or what the claim says without results.

    Args:
        name: the name or number of a claim.
        folder: with results; None: without.

    Raises:
        CommandError: there is no such claim or no such result.
    """
    (experiment,) = check_names([name])
    if folder is None:
        return writing.without_results(experiment)
    path = folder / f"{experiment.name}.json"
    try:
        record: dict[str, Any] = read_json(path, MOST_BYTES)
        if record["name"] == experiment.name and "sub_claims" in record:
            return record
        raise ValueError("it holds no sub-claims")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"--results: {path} cannot be read ({type(error).__name__}: {error}), expected what "
            "bn-jax reproduce has written; give its folder, or leave the option out"
        ) from error
