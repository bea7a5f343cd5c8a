"""The command `bn-jax train`: starts or resumes a run, and trains its arms."""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bn_jax import training
from bn_jax.lab import checkpoints, fitting, launch, problem, processes, results, runs, watching
from bn_jax.lab.arguments import Launch, require
from bn_jax.lab.errors import CommandError
from bn_jax.lab.problem import Problem
from bn_jax.lab.progress import ShowReports
from bn_jax.lab.records import Config, Started
from bn_jax.lab.results import Result
from bn_jax.lab.watching import Wanted

__all__ = ["Request", "resume", "start"]

DEFAULT_BATCH_SIZE = 64
# The name of no checkpoint.
FROM_START = "start"


class Request(NamedTuple):
    """The options of a new run; the defaults of some depend on data and devices."""

    data_file: Path | None
    folder: Path
    devices: int | None
    epochs: int
    batch_size: int | None
    learning_rate: float
    seed: int


class Run(NamedTuple):
    """A run in progress.

    Attributes:
        folder: for checkpoints and results.
        problem: the data.
        config: the options.
        mesh: the devices.
    """

    folder: Path
    problem: Problem
    config: Config
    mesh: Mesh

    @property
    def steps_per_epoch(self) -> int:
        """The steps of an epoch; the last one may be on a padded batch."""
        return math.ceil(len(self.problem.splits.train.y) / self.config.batch_size)

    def checkpoints(self, arm: str) -> Path:
        """Returns the folder for the checkpoints of an arm."""
        return self.folder / "checkpoints" / arm.replace(" ", "-")


def start(request: Request, launched: Launch, wanted: Wanted) -> None:
    """Trains all arms, and saves a run.

    Args:
        request: the options.
        launched: the processes that train together.
        wanted: what is shown and recorded meanwhile.
    """
    _require_packages(request.data_file, wanted)
    loaded = problem.load(request.data_file, request.seed)
    mesh = launch.make_mesh(request.devices, loaded.examples, launched)
    config = Config(
        data=None if request.data_file is None else str(request.data_file),
        devices=mesh.size,
        epochs=request.epochs,
        batch_size=choose_batch_size(request.batch_size, mesh.size, len(loaded.splits.train.y)),
        learning_rate=request.learning_rate,
        seed=request.seed,
        arms=runs.ARMS,
        model="small",
    )
    run = _agree(Run(request.folder, loaded, config, mesh), is_resumed=False)
    if jax.process_index() == 0:
        _begin(run)
    _train(run, wanted)


def resume(folder: Path, devices: int | None, launched: Launch, wanted: Wanted) -> None:
    """Continues a run from its checkpoints, and finishes it.

    Args:
        folder: of the unfinished run.
        devices: to train on. None: as many as before.
        launched: the processes that train together.
        wanted: what is shown and recorded meanwhile; the log of the run continues in any case.
    """
    saved = _read_unfinished(folder)
    config = saved.config
    wanted = watching.continued(wanted, folder)
    data_file = None if saved.data_file is None else Path(saved.data_file)
    _require_packages(data_file, wanted)
    loaded = problem.load(data_file, config.seed)
    if loaded.sha256 != saved.data_sha256:
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
    _train(_agree(Run(folder, loaded, config, mesh), is_resumed=True), wanted)


def _require_packages(data_file: Path | None, wanted: Wanted) -> None:
    require("rich", "matplotlib", "orbax.checkpoint")
    if data_file is None:
        require("sklearn")
    if wanted.log:
        require("tensorboardX")


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


def choose_batch_size(received: int | None, devices: int, examples: int) -> int:
    """Returns the option --batch-size, or its default.

    Args:
        received: the option. None: about 64.
        devices: a divisor of the result.
        examples: of the training part.

    Raises:
        CommandError: `received` does not fit devices and data.
    """
    # A device with one example of 1x1 positions would have no variance to normalize by.
    least = 2 * devices
    most = max(least, math.ceil(examples / devices) * devices)
    wanted = DEFAULT_BATCH_SIZE if received is None else received
    nearest = min(max(least, wanted // devices * devices), most)
    if received is not None and received != nearest:
        raise CommandError(
            f"--batch-size: received {received}, expected a multiple of the number of devices, "
            f"{devices}, from {least} to {most} (for {examples} training examples); "
            f"use --batch-size {nearest}, or another --devices"
        )
    return nearest


def _begin(run: Run) -> None:
    data_file = run.config.data
    started = Started(
        config=run.config,
        data_file=None if data_file is None else str(Path(data_file).absolute()),
        data_sha256=run.problem.sha256,
    )
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "checkpoints/config.json").write_text(started.model_dump_json(indent=2) + "\n")


def _read_unfinished(folder: Path) -> Started:
    if (folder / "metrics.json").exists():
        raise CommandError(
            f"--resume: {folder} is a finished run; evaluate it with bn-jax eval, or start a new "
            "run"
        )
    try:
        started = json.loads((folder / "checkpoints/config.json").read_text())
        return Started.model_validate(started)
    except (OSError, ValueError, RecursionError) as error:
        raise CommandError(
            f"--resume: {folder} is not an unfinished run ({type(error).__name__}: {error}), "
            "expected a folder with the checkpoints of bn-jax train; start a new run"
        ) from error


def _train(run: Run, wanted: Wanted) -> None:
    with launch.explain_failures(run.folder):
        with watching.watch(run.folder, run.config, run.steps_per_epoch, wanted) as show:
            trained = {arm: train_arm(arm, run, show) for arm in run.config.arms}
        if jax.process_index() == 0:
            local = run.mesh.local_mesh
            results.finish(run.folder, run.problem, run.config, trained, local)
        jax.distributed.shutdown()


def train_arm(arm: str, run: Run, show: ShowReports) -> Result:
    """Trains an arm from its newest checkpoint to the end.

    Args:
        arm: one of `runs.ARMS`.
        run: the run; a checkpoint is saved in its folder after every epoch.
        show: called with the arm and all reports so far, after each of them.

    Returns:
        All reports, the last state and its test evaluation.
    """
    last = _last_position(arm, run)
    state, rng, reports = last.state, last.rng, last.reports
    if reports:
        show(arm, reports)
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
            checkpoints.save_position(run.checkpoints(arm), position)
        show(arm, reports)
    test = fitting.shard_dataset(run.problem.splits.test, run.config.batch_size, run.mesh)
    return Result(reports, state, training.evaluate(state, test))


def _last_position(arm: str, run: Run) -> checkpoints.Position:
    """Returns the newest intact checkpoint that process 0 finds, else the start."""
    config = run.config
    state = training.create_state(
        runs.make_model(arm, run.problem.num_classes, config.batch_size // config.devices),
        fitting.make_optimizer(config.learning_rate, config.epochs * run.steps_per_epoch),
        run.problem.test_images.shape[1:],
        config.seed,
        run.mesh,
    )
    folder = run.checkpoints(arm)
    newest = _newest_intact(folder, arm) if jax.process_index() == 0 else FROM_START
    newest = processes.from_first(newest)
    if newest == FROM_START:
        return checkpoints.Position(state, np.random.default_rng(config.seed), [])
    return checkpoints.restore_position(folder / newest, state)


def _newest_intact(folder: Path, arm: str) -> str:
    for path in checkpoints.positions(folder):
        if checkpoints.is_intact(path):
            return path.name
        print(
            f"bn-jax: warning: {path} is incomplete or damaged (its SHA-256 differs from the one "
            f"saved with it); {arm} continues from the previous checkpoint, or from the start if "
            "there is none",
            file=sys.stderr,
            flush=True,
        )
    return FROM_START
