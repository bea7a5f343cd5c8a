"""The command `bn-jax train`: starts or resumes a run, and trains its arms."""

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bn_jax import training
from bn_jax.lab import checkpoints, fitting, launch, problem, processes, progress, results, runs
from bn_jax.lab.arguments import Launch, require
from bn_jax.lab.errors import CommandError
from bn_jax.lab.problem import Problem
from bn_jax.lab.progress import ShowReport
from bn_jax.lab.results import Config, Result

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


class UnfinishedRun(NamedTuple):
    """The contents of `checkpoints/config.json`.

    Attributes:
        config: how the run was started.
        data_file: the absolute path of its data; None for scikit-learn's digits.
        data_sha256: of its data.
    """

    config: Config
    data_file: Path | None
    data_sha256: str


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
    )
    folder = _agree(request.folder, config, loaded, mesh, is_resumed=False)
    if jax.process_index() == 0:
        _begin(folder, config, loaded)
    _train(folder, loaded, config, mesh)


def resume(folder: Path, devices: int | None, launched: Launch) -> None:
    """Continues a run from its checkpoints, and finishes it.

    Args:
        folder: of the unfinished run.
        devices: to train on. None: as many as before.
        launched: the processes that train together.
    """
    saved = _read_unfinished(folder)
    config = saved.config
    _require_packages(saved.data_file)
    loaded = problem.load(saved.data_file, config.seed)
    if loaded.sha256 != saved.data_sha256:
        raise CommandError(
            f"--resume: {saved.data_file or 'scikit-learn'} no longer holds the data of "
            f"{folder} (its SHA-256 differs); restore the data or start a new run"
        )
    mesh = launch.make_mesh(devices or config.devices, loaded.examples, launched)
    if config.batch_size % mesh.size:
        raise CommandError(
            f"--devices: received {mesh.size}, expected a divisor of the run's batch size, "
            f"{config.batch_size}; use --devices {config.devices} as before"
        )
    folder = _agree(folder, config, loaded, mesh, is_resumed=True)
    _train(folder, loaded, config, mesh)


def _require_packages(data_file: Path | None) -> None:
    require("rich", "matplotlib", "orbax.checkpoint")
    if data_file is None:
        require("sklearn")


def _agree(folder: Path, config: Config, loaded: Problem, mesh: Mesh, *, is_resumed: bool) -> Path:
    return launch.agree(
        folder,
        {
            "--resume": is_resumed,
            "--data": loaded.sha256,
            "--devices": mesh.size,
            "--epochs": config.epochs,
            "--batch-size": config.batch_size,
            "--learning-rate": config.learning_rate,
            "--seed": config.seed,
        },
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


def _begin(folder: Path, config: Config, loaded: Problem) -> None:
    started = {
        "config": config._asdict(),
        "data_file": None if config.data is None else str(Path(config.data).absolute()),
        "data_sha256": loaded.sha256,
    }
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/config.json").write_text(json.dumps(started, indent=2) + "\n")


def _read_unfinished(folder: Path) -> UnfinishedRun:
    if (folder / "metrics.json").exists():
        raise CommandError(
            f"--resume: {folder} is a finished run; evaluate it with bn-jax eval, or start a new "
            "run"
        )
    try:
        started = json.loads((folder / "checkpoints/config.json").read_text())
        config = started["config"]
        return UnfinishedRun(
            config=Config(
                data=None if config["data"] is None else str(config["data"]),
                devices=int(config["devices"]),
                epochs=int(config["epochs"]),
                batch_size=int(config["batch_size"]),
                learning_rate=float(config["learning_rate"]),
                seed=int(config["seed"]),
            ),
            data_file=None if started["data_file"] is None else Path(started["data_file"]),
            data_sha256=str(started["data_sha256"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CommandError(
            f"--resume: {folder} is not an unfinished run ({type(error).__name__}: {error}), "
            "expected a folder with the checkpoints of bn-jax train; start a new run"
        ) from error


def _train(folder: Path, loaded: Problem, config: Config, mesh: Mesh) -> None:
    with launch.explain_failures(folder):
        with _progress(config.steps_per_epoch(loaded), config.epochs) as show:
            trained = {arm: train_arm(arm, loaded, config, mesh, folder, show) for arm in runs.ARMS}
        if jax.process_index() == 0:
            results.finish(folder, loaded, config, trained, mesh.local_mesh)
        jax.distributed.shutdown()


def _progress(steps_per_epoch: int, epochs: int) -> contextlib.AbstractContextManager[ShowReport]:
    if jax.process_index() == 0:
        return progress.training(runs.ARMS, steps_per_epoch, epochs)
    return contextlib.nullcontext(lambda arm, report: None)


def train_arm(
    arm: str, loaded: Problem, config: Config, mesh: Mesh, folder: Path, show: ShowReport
) -> Result:
    """Trains an arm from its newest checkpoint to the end.

    Args:
        arm: one of `runs.ARMS`.
        loaded: the data.
        config: the options of the run.
        mesh: the devices.
        folder: of the run; a checkpoint is saved there after every epoch.
        show: called with the arm and each report.

    Returns:
        All reports, the last state and its test evaluation.
    """
    positions = folder / "checkpoints" / arm.replace(" ", "-")
    last = _last_position(positions, arm, loaded, config, mesh)
    state, rng, reports = last.state, last.rng, last.reports
    if reports:
        show(arm, reports[-1])
    for reached, report in fitting.fit(
        last.state,
        loaded.splits.train,
        loaded.splits.validation,
        mesh,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=rng,
        report_every=results.REPORT_EVERY,
        after=reports[-1] if reports else None,
    ):
        state = reached
        reports.append(report)
        if report.step % config.steps_per_epoch(loaded) == 0 and jax.process_index() == 0:
            checkpoints.save_position(positions, checkpoints.Position(state, rng, reports))
        show(arm, report)
    test_batches = fitting.shard_dataset(loaded.splits.test, config.batch_size, mesh)
    return Result(reports, state, training.evaluate(state, test_batches))


def _last_position(
    folder: Path, arm: str, loaded: Problem, config: Config, mesh: Mesh
) -> checkpoints.Position:
    """Returns the newest intact checkpoint that process 0 finds, else the start."""
    total_steps = config.epochs * config.steps_per_epoch(loaded)
    state = training.create_state(
        runs.make_model(arm, loaded.num_classes, config.batch_size // config.devices),
        fitting.make_optimizer(config.learning_rate, total_steps),
        loaded.test_images.shape[1:],
        config.seed,
        mesh,
    )
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
