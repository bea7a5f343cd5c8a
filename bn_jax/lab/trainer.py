"""The command `bn-jax train`: starts or resumes a run, and trains its arms."""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bn_jax import training
from bn_jax.lab import (
    checkpoints,
    fitting,
    launch,
    problem,
    processes,
    progress,
    results,
    runs,
    unfinished,
)
from bn_jax.lab.ahead import prepare_ahead
from bn_jax.lab.arguments import LARGEST, require
from bn_jax.lab.choices import ARM_NAMES, ARMS
from bn_jax.lab.errors import CommandError, advise
from bn_jax.lab.launchers import Launch
from bn_jax.lab.problem import Problem
from bn_jax.lab.progress import ShowReport
from bn_jax.lab.records import Config, Origin, Started, batch_sizes
from bn_jax.lab.results import Result

__all__ = ["Request", "resume", "start"]

DEFAULT_BATCH_SIZE = 64
# The name of no checkpoint.
FROM_START = "start"
SUCCESS = "done"


class Request(NamedTuple):
    """The options of a new run; the defaults of some depend on data and devices."""

    data_file: Path | None
    folder: Path
    devices: int | None
    epochs: int
    batch_size: int | None
    learning_rate: float
    seed: int
    arms: Sequence[str] | None
    model: str


class Run(NamedTuple):
    """A run in progress.

    Attributes:
        folder: for checkpoints and results.
        problem: the data.
        started: how it was started.
        mesh: the devices.
    """

    folder: Path
    problem: Problem
    started: Started
    mesh: Mesh

    @property
    def config(self) -> Config:
        """The options."""
        return self.started.config

    @property
    def steps_per_epoch(self) -> int:
        """The steps of an epoch; the last one may be on a padded batch."""
        return math.ceil(len(self.problem.splits.train.y) / self.config.batch_size)

    def checkpoints(self, arm: str) -> Path:
        """Returns the folder for the checkpoints of an arm."""
        return unfinished.checkpoints_of(self.folder, arm)

    def origin(self, arm: str) -> Origin:
        """Returns where the checkpoints of an arm come from."""
        return Origin(run=self.started, arm=arm)


def start(request: Request, launched: Launch) -> None:
    """Trains all arms, and saves a run.

    Args:
        request: the options.
        launched: the processes that train together.
    """
    _require_packages(request.data_file)
    loaded = problem.load(request.data_file, request.seed)
    mesh = launch.make_mesh(request.devices, loaded.examples, launched)
    config = Config(
        data=None if request.data_file is None else str(request.data_file),
        devices=mesh.size,
        epochs=request.epochs,
        batch_size=choose_batch_size(request.batch_size, mesh.size, len(loaded.splits.train.y)),
        learning_rate=request.learning_rate,
        seed=request.seed,
        arms=choose_arms(request.arms),
        model=request.model,
    )
    started = Started(
        config=config,
        data_file=None if config.data is None else str(Path(config.data).absolute()),
        data_sha256=loaded.sha256,
    )
    run = Run(request.folder, loaded, started, mesh)
    _check_steps(run)
    run = _agree(run, is_resumed=False)
    with contextlib.ExitStack() as held:
        _do_first(lambda: held.enter_context(unfinished.begin(run.folder, run.started)))
        _train(run)


def resume(folder: Path, devices: int | None, launched: Launch) -> None:
    """Continues a run from its checkpoints, and finishes it.

    Args:
        folder: of the unfinished run.
        devices: to train on. None: as many as before.
        launched: the processes that train together.
    """
    with contextlib.ExitStack() as held:
        # Where several processes meet, the first one locks the folder after that.
        if launched.processes == 1:
            held.enter_context(unfinished.hold(folder))
        run = _agree(_resumed(folder, devices, launched), is_resumed=True)
        if launched.processes > 1:
            _do_first(lambda: held.enter_context(unfinished.hold(run.folder)))
        _train(run)


def _resumed(folder: Path, devices: int | None, launched: Launch) -> Run:
    started = unfinished.read(folder)
    config = started.config
    data_file = None if started.data_file is None else Path(started.data_file)
    _require_packages(data_file)
    loaded = problem.load(data_file, config.seed)
    if loaded.sha256 != started.data_sha256:
        raise CommandError(
            f"--resume: {data_file or 'scikit-learn'} no longer holds the data of "
            f"{folder} (its SHA-256 differs); restore the data or start a new run"
        )
    mesh = launch.make_mesh(devices or config.devices, loaded.examples, launched)
    if config.batch_size % mesh.size:
        raise CommandError(
            f"--devices: received {mesh.size}, expected a divisor of the run's batch size, "
            f"{config.batch_size}; use --devices {config.devices} as before"
        )
    return Run(folder, loaded, started, mesh)


def _require_packages(data_file: Path | None) -> None:
    require("rich", "matplotlib", "orbax.checkpoint")
    if data_file is None:
        require("sklearn")


def _agree(run: Run, *, is_resumed: bool) -> Run:
    """Checks that all processes have the same options, and gives them the folder of process 0."""
    folder = launch.agree(
        run.folder,
        {
            "--resume": is_resumed,
            "--data": run.problem.sha256,
            "--devices": run.mesh.size,
            "--epochs": run.config.epochs,
            "--batch-size": run.config.batch_size,
            "--learning-rate": run.config.learning_rate,
            "--seed": run.config.seed,
            "--arm": list(run.config.arms),
            "--model": run.config.model,
        },
    )
    return run._replace(folder=folder)


def choose_arms(received: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the arms that the option --arm names, in the order of all arms; all without it."""
    if not received:
        return runs.ARMS
    named = {ARM_NAMES[name] for name in received}
    return tuple(arm for arm in ARMS if arm in named)


def _check_steps(run: Run) -> None:
    """Raises an error if the counters of the steps, int32 as in Optax, would overflow."""
    most = LARGEST // run.steps_per_epoch
    if run.config.epochs > most:
        raise CommandError(
            f"--epochs: received {run.config.epochs}, expected at most {most}, since "
            f"{run.steps_per_epoch} steps in each make more than {LARGEST} otherwise; lower it"
        )


def choose_batch_size(received: int | None, devices: int, examples: int) -> int:
    """Returns the option --batch-size, or its default.

    Args:
        received: the option. None: about 64.
        devices: a divisor of the result.
        examples: of the training part.

    Raises:
        CommandError: `received` does not fit devices and data.
    """
    least, most = batch_sizes(devices, examples)
    wanted = DEFAULT_BATCH_SIZE if received is None else received
    nearest = min(max(least, wanted // devices * devices), most)
    if received is not None and received != nearest:
        raise CommandError(
            f"--batch-size: received {received}, expected a multiple of the number of devices, "
            f"{devices}, from {least} to {most} (for {examples} training examples); "
            f"use --batch-size {nearest}, or another --devices"
        )
    return nearest


def _do_first(action: Callable[[], object]) -> None:
    """Acts in process 0. If that fails, all processes raise its error."""
    failure = ""
    if jax.process_index() == 0:
        try:
            action()
        except CommandError as error:
            failure = json.dumps([str(error), error.code])
        except OSError as error:
            failure = json.dumps([f"{error}; nothing was saved", 1])
    outcome = processes.from_first(failure or SUCCESS)
    if outcome != SUCCESS:
        message, code = json.loads(outcome)
        processes.disconnect()
        raise CommandError(message, code)


def _train(run: Run) -> None:
    with launch.explain_failures(run.folder):
        try:
            with _progress(run) as show:
                trained = {arm: train_arm(arm, run, last, show) for arm, last in _prepared(run)}
            if jax.process_index() == 0:
                local = run.mesh.local_mesh
                results.finish(run.folder, run.problem, run.config, trained, local)
        except OSError as error:
            raise OSError(f"{error}; {unfinished.kept(run.folder)}") from error
        advise(f"{run.folder} is complete, see bn-jax eval", launch.LOST)
        processes.disconnect()


def _progress(run: Run) -> contextlib.AbstractContextManager[ShowReport]:
    if jax.process_index() == 0:
        return progress.show_training(run.config.arms, run.steps_per_epoch, run.config.epochs)
    return contextlib.nullcontext(lambda arm, report: None)


def _prepared(run: Run) -> Iterator[tuple[str, checkpoints.Position]]:
    """Yields each arm and where it continues, with what it runs compiled."""
    prepare = functools.partial(_prepare_arm, run)
    if jax.process_count() == 1:
        return prepare_ahead(prepare, run.config.arms)
    # Processes must communicate in the same order, which threads do not keep.
    return ((arm, prepare(arm)) for arm in run.config.arms)


def _prepare_arm(run: Run, arm: str) -> checkpoints.Position:
    last = _last_position(arm, run)
    if not last.reports or last.reports[-1].epoch < run.config.epochs:
        parts = run.problem.splits
        fitting.compile_programs(
            last.state, parts.train, parts.validation, run.mesh, run.config.batch_size
        )
    return last


def train_arm(arm: str, run: Run, last: checkpoints.Position, show: ShowReport) -> Result:
    """Trains an arm to the end.

    Args:
        arm: one of `runs.ARMS`.
        run: the run; a checkpoint is saved in its folder after every epoch.
        last: where to continue.
        show: called with the arm and each report.

    Returns:
        All reports, the last state and its test evaluation.
    """
    state, rng, reports = last.state, last.rng, last.reports
    if reports:
        show(arm, reports[-1])
    for reached, report in fitting.fit(
        last.state,
        run.problem.splits.train,
        run.problem.splits.validation,
        run.mesh,
        batch_size=run.config.batch_size,
        epochs=run.config.epochs,
        seed=rng,
        report_every=results.REPORT_EVERY,
        after=reports[-1] if reports else None,
    ):
        state = reached
        reports.append(report)
        if report.step % run.steps_per_epoch == 0 and jax.process_index() == 0:
            position = checkpoints.Position(state, rng, reports)
            checkpoints.save_position(run.checkpoints(arm), position, run.origin(arm))
        show(arm, report)
    test = fitting.shard_dataset(run.problem.splits.test, run.config.batch_size, run.mesh)
    return Result(reports, state, training.evaluate(state, test))


def _last_position(arm: str, run: Run) -> checkpoints.Position:
    """Returns the newest intact checkpoint that process 0 finds, else the start."""
    config, image_shape = run.config, run.problem.test_images.shape[1:]
    per_device = config.batch_size // config.devices
    model = runs.make_model(arm, run.problem.num_classes, per_device, config.model, image_shape)
    steps = config.epochs * run.steps_per_epoch
    optimizer = fitting.make_optimizer(config.learning_rate, steps)
    newest = None
    if jax.process_index() == 0:
        newest = unfinished.newest_usable(run.checkpoints(arm), run.origin(arm))
    name = processes.from_first(FROM_START if newest is None else newest.name)
    if name == FROM_START:
        state = training.create_state(model, optimizer, image_shape, config.seed, run.mesh)
        return checkpoints.Position(state, np.random.default_rng(config.seed), [])
    state = fitting.abstract_state(model, optimizer, image_shape, run.mesh)
    path = run.checkpoints(arm) / name
    try:
        return checkpoints.restore_position(path, state)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"--resume: {path} cannot be restored ({error}); remove it to continue from the "
            "previous checkpoint"
        ) from error
