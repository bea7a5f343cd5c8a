"""The command `bn-jax reproduce`: tests published claims by experiments."""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bn_jax.lab.console import interrupts, progress
from bn_jax.lab.console.arguments import check_range
from bn_jax.lab.data import NamedDataset
from bn_jax.lab.datasets import problem
from bn_jax.lab.distributed import launch
from bn_jax.lab.errors import INTERRUPTED, CommandError
from bn_jax.lab.experiments import extensions, failures, forest, labelled, writing
from bn_jax.lab.experiments.labelled import Labelled
from bn_jax.lab.experiments.reproducing import Choice, choose, reproduce_each
from bn_jax.lab.experiments.verdicts import Experiment, Setting
from bn_jax.lab.experiments.writing import Outcome
from bn_jax.lab.files.reading import MOST_BYTES, read_json
from bn_jax.lab.files.writing import staged

__all__ = [
    "Reproduced",
    "check_names",
    "check_setting",
    "choose_on",
    "default_processes",
    "known",
    "load_data",
    "read",
    "reproduce",
]

MOST_SEEDS = 1000


class Reproduced(NamedTuple):
    """What a command has found.

    Attributes:
        records: the contents of the claims' JSON files.
        warnings: lines about claims that ran.
        failures: lines about claims, or their figures, that failed.
    """

    records: list[Mapping[str, Any]]
    warnings: list[str]
    failures: list[str]


def known() -> Choice:
    """Returns all claims, those of installed packages too, and which packages are broken."""
    claims, broken = extensions.known()
    return Choice(list(claims.values()), list(broken.values()))


def check_names(names: Sequence[str]) -> Choice:
    """Returns the experiments with these names or numbers, and which files are broken.

    Raises:
        CommandError: a name is unknown, or all of them are of something broken.
    """
    try:
        choice = choose(names)
    except ValueError as error:
        raise CommandError(f"NAME: {error}") from error
    if not choice.experiments:
        raise CommandError(f"NAME: {'; '.join(choice.broken)}")
    return choice


def load_data(path: Path, setting: Setting) -> tuple[Labelled, Sequence[str]]:
    """Loads the data in the place of the digits, as `bn-jax train --data` does.

    Args:
        path: an `.npz` file, or a folder with a subfolder of images for each class.
        setting: the seeds of the splits.

    Returns:
        The data, and what in them looks like a mistake, a line for each.

    Raises:
        CommandError: they are not as described, or too large.
    """
    try:
        named: NamedDataset = problem.load_labelled(path)
        checked = problem.load(named, setting.first_seed)
        loaded = Labelled(named.dataset, checked.num_classes, str(path), checked.sha256)
        labelled.check_memory(loaded, setting.seeds)
        return loaded, (*problem.describe_ignored(path), *checked.oddities)
    except ValueError as error:
        raise CommandError(f"--data: {error}") from error


def choose_on(choice: Choice, setting: Setting) -> tuple[list[Experiment], list[str]]:
    """Chooses the claims that can be tested on the data of a setting.

    Args:
        choice: the claims. Those that "all" stands for are left out where the data do not fit.
        setting: with data.

    Returns:
        The claims, and what is left out, in lines.

    Raises:
        CommandError: a claim that is named does not train on data, or needs more of them; or none
            is left.
    """
    assert setting.data is not None
    without = [one.name for one in choice.experiments if one.data is None]
    if refused := [name for name in without if name in choice.named]:
        with_data = [one.name for one in known().experiments if one.data is not None]
        raise CommandError(
            f"--data: received with {', '.join(refused)}, which trains on no data or only on the "
            f"digits, expected claims among {', '.join(with_data)}; leave out one of both"
        )
    lines = []
    if without:
        lines.append(
            f"--data does not concern {', '.join(without)}, which train on no data or only on the "
            "digits; they are left out"
        )
    kept = []
    for one in choice.experiments:
        lacks = (
            None if one.data is None else one.data.missing(setting.data, setting.chosen.tolist())
        )
        if lacks is not None and one.name in choice.named:
            raise CommandError(
                f"--data: {setting.data.name}: {lacks}, for the claim {one.name}; give more data, "
                "or leave the claim out"
            )
        if lacks is not None:
            lines.append(f"--data: {lacks}, for the claim {one.name}; it is left out")
        elif one.data is not None:
            kept.append(one)
    if not kept:
        raise CommandError(f"--data: no claim can be tested on {setting.data}; give more data")
    return kept, lines


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
) -> Reproduced:
    """Runs experiments, shows their progress, and draws all sub-claims into ``forest.png``.

    Args:
        chosen: the experiments.
        setting: how much is run.
        folder: for a JSON file and a figure of each, and their values.
        processes: how many experiments are run at the same time.
        shows_progress: whether bars or lines show how far they are.

    Returns:
        The contents of their JSON files, in the order of `chosen`, and what failed.

    Raises:
        CommandError: after Ctrl-C, or if a process died.
    """
    if processes == 1:
        launch.start_backend()
    outcomes: dict[str, Outcome] = {}
    try:
        with (
            # Its processes have to be ended.
            interrupts.as_exceptions(),
            progress.show_claims(chosen, is_wanted=shows_progress) as show,
            contextlib.closing(
                reproduce_each(chosen, setting, folder, min(processes, len(chosen)), show)
            ) as finished,
        ):
            for experiment, outcome in finished:
                outcomes[experiment.name] = outcome
                show(experiment, math.inf, outcome.record or {})
    except KeyboardInterrupt as error:
        saved = f"{_count_saved(outcomes)} of {len(chosen)} claims are in {folder}"
        raise CommandError(f"interrupted; {saved}", INTERRUPTED) from error
    except BrokenProcessPool as error:
        saved = f"{_count_saved(outcomes)} of {len(chosen)} claims are in {folder}"
        raise CommandError(
            f"a process died, perhaps for lack of memory: try --processes 1; {saved}", code=1
        ) from error
    in_order = [outcomes[experiment.name] for experiment in chosen]
    records = [outcome.record for outcome in in_order if outcome.record is not None]
    if records:
        # Matplotlib warns of characters in texts of users that its font lacks.
        with staged(folder) as staging, failures.kept():
            forest.save(records, staging / "forest.png")
    return Reproduced(
        list(records),
        [outcome.warning for outcome in in_order if outcome.warning is not None],
        [outcome.failure for outcome in in_order if outcome.failure is not None],
    )


def _count_saved(outcomes: Mapping[str, Outcome]) -> int:
    return sum(outcome.record is not None for outcome in outcomes.values())


def read(name: str, folder: Path | None) -> dict[str, Any]:
    """Returns what a folder of results holds on a claim, or what the claim says without results.

    Args:
        name: the name or number of a claim.
        folder: with results; None: without.

    Raises:
        CommandError: there is no such claim or no such result.
    """
    experiments = check_names([name]).experiments
    if len(experiments) > 1:
        raise CommandError(f"--show: received {name}, expected one claim; give its name")
    (experiment,) = experiments
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
