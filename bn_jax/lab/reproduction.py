"""The command `bn-jax reproduce`: tests published claims by experiments."""

import contextlib
import math
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax

from bn_jax.lab import interrupts, launch, progress
from bn_jax.lab.arguments import check_range
from bn_jax.lab.errors import INTERRUPTED, CommandError
from bn_jax.lab.experiments import EXPERIMENTS
from bn_jax.lab.experiments.reproducing import choose, reproduce_each
from bn_jax.lab.experiments.verdicts import Experiment, Result, Setting

__all__ = ["EXPERIMENTS", "check_names", "check_setting", "default_processes", "reproduce"]

MOST_SEEDS = 1000


def check_names(names: Sequence[str]) -> list[Experiment]:
    """Returns the experiments with these names or numbers."""
    try:
        return choose(names)
    except ValueError as error:
        raise CommandError(f"NAME: {error}") from error


def check_setting(seeds: int | None, first_seed: int, quick: bool) -> Setting:
    """Returns how much is run, by default with 8 seeds, or with 3 if it has to be quick."""
    if seeds is None:
        seeds = 3 if quick else 8
    check_range("--seeds", seeds, 2, MOST_SEEDS, "an interval needs more than one run")
    check_range("--first-seed", first_seed, 0, 2**31 - MOST_SEEDS - 1, "choose one of these")
    return Setting(seeds, first_seed, quick)


def default_processes() -> int:
    """Compiling occupies one core; the memory of an accelerator is not to be shared."""
    launch.start_backend()
    return 2 if jax.default_backend() == "cpu" and (os.cpu_count() or 1) > 1 else 1


def reproduce(
    chosen: Sequence[Experiment], setting: Setting, folder: Path, processes: int
) -> dict[Experiment, Result]:
    """Runs experiments, and shows their progress.

    Args:
        chosen: the experiments.
        setting: how much is run.
        folder: for a JSON file and a figure of each.
        processes: how many experiments are run at the same time.

    Returns:
        The results in the order of `chosen`.

    Raises:
        CommandError: after Ctrl-C, or if a process died.
    """
    if processes == 1:
        launch.start_backend()
    results: dict[Experiment, Result] = {}
    try:
        with (
            # Its processes have to be ended.
            interrupts.as_exceptions(),
            progress.show_claims(chosen) as show,
            contextlib.closing(
                reproduce_each(chosen, setting, folder, min(processes, len(chosen)), show)
            ) as finished,
        ):
            for experiment, result in finished:
                results[experiment] = result
                show(experiment, math.inf, result)
    except KeyboardInterrupt as error:
        saved = f"{len(results)} of {len(chosen)} claims are in {folder}"
        raise CommandError(f"interrupted; {saved}", INTERRUPTED) from error
    except BrokenProcessPool as error:
        saved = f"{len(results)} of {len(chosen)} claims are in {folder}"
        raise CommandError(
            f"a process died, perhaps for lack of memory: try --processes 1; {saved}", code=1
        ) from error
    return {experiment: results[experiment] for experiment in chosen}
