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
from bn_jax.lab import checkpoints, fitting, processes, runs
from bn_jax.lab.console.arguments import LARGEST, new_folder, require
from bn_jax.lab.console.choices import ARM_NAMES, ARMS
from bn_jax.lab.console.progress import ShowReports
from bn_jax.lab.data import Dataset, NamedDataset
from bn_jax.lab.datasets import problem
from bn_jax.lab.datasets.problem import Problem
from bn_jax.lab.distributed import launch
from bn_jax.lab.distributed.launchers import Launch
from bn_jax.lab.errors import CommandError, advise, print_warning
from bn_jax.lab.files.records import Config, Origin, Started, batch_sizes
from bn_jax.lab.training import results, unfinished, watching
from bn_jax.lab.training.ahead import prepare_ahead
from bn_jax.lab.training.arms import choose_model
from bn_jax.lab.training.results import Result
from bn_jax.lab.training.watching import Wanted

__all__ = ["Request", "resume", "start"]

ALONE = Launch(1)
DEFAULT_BATCH_SIZE = 64
# The name of no checkpoint.
FROM_START = "start"
SUCCESS = "done"


class Request(NamedTuple):
    """The options of a new run; the defaults of some depend on data and devices.

    Attributes:
        data: an `.npz` file, a folder of images, or a dataset, which is saved with the run as
            `data.npz`; see `problem.load`.
        folder: new, for the run.
        arms: names of `choices.ARM_NAMES`. None: all.
        model: one of `choices.MODELS`. None: `arms.choose_model` chooses.
    """

    data: problem.Source
    folder: Path
    devices: int | None = None
    epochs: int = 20
    batch_size: int | None = None
    learning_rate: float = 0.1
    seed: int = 0
    arms: Sequence[str] | None = None
    model: str | None = None

    @property
    def data_file(self) -> Path | None:
        """The file of the data, from which a run is resumed."""
        if self.data is None or isinstance(self.data, Path):
            return self.data
        return self.folder.absolute() / "data.npz"

    @property
    def named_dataset(self) -> NamedDataset | None:
        """The data, if they are not in a file yet."""
        if isinstance(self.data, Dataset):
            return NamedDataset(self.data, None)
        return self.data if isinstance(self.data, NamedDataset) else None


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


def start(request: Request, launched: Launch = ALONE, wanted: Wanted = watching.DEFAULT) -> None:
    """Trains all arms, and saves a run.

    Args:
        request: the options.
        launched: the processes that train together.
        wanted: what is shown and recorded meanwhile.

    Raises:
        CommandError: an option or the data cannot be used.
    """
    # The command has checked it before it imported this module; other callers have not.
    new_folder(request.folder)
    _require_packages(request.data, wanted)
    loaded = problem.load(request.data, request.seed)
    mesh = launch.make_mesh(request.devices, loaded.examples, launched)
    config = Config(
        data=None if request.data_file is None else str(request.data_file),
        devices=mesh.size,
        epochs=request.epochs,
        batch_size=choose_batch_size(request.batch_size, mesh.size, len(loaded.splits.train.y)),
        learning_rate=request.learning_rate,
        seed=request.seed,
        arms=choose_arms(request.arms),
        model=request.model or choose_model(loaded.splits.train.x.shape[1:]),
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
        _do_first(lambda: held.enter_context(_begin(run, request.named_dataset)))
        _train(run, wanted)


def _begin(run: Run, dataset: NamedDataset | None) -> contextlib.AbstractContextManager[None]:
    for line in run.problem.oddities:
        print_warning(f"--data: {line}")
    return unfinished.begin(run.folder, run.started, dataset)


def resume(folder: Path, devices: int | None, launched: Launch, wanted: Wanted) -> None:
    """Continues a run from its checkpoints, and finishes it.

    Args:
        folder: of the unfinished run.
        devices: to train on. None: as many as before.
        launched: the processes that train together.
        wanted: what is shown and recorded meanwhile; the log of the run continues in any case.
    """
    wanted = watching.continued(wanted, folder)
    with contextlib.ExitStack() as held:
        # Where several processes meet, the first one locks the folder after that.
        if launched.processes == 1:
            held.enter_context(unfinished.hold(folder))
        run = _agree(_resumed(folder, devices, launched, wanted), is_resumed=True)
        if launched.processes > 1:
            _do_first(lambda: held.enter_context(unfinished.hold(run.folder)))
        _train(run, wanted)


def _resumed(folder: Path, devices: int | None, launched: Launch, wanted: Wanted) -> Run:
    started = unfinished.read(folder)
    config = started.config
    data_file = None if started.data_file is None else Path(started.data_file)
    _require_packages(data_file, wanted)
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
    least, most = batch_sizes(config.devices, len(loaded.splits.train.y))
    if not least <= config.batch_size <= most:
        raise CommandError(
            f"--resume: the run in {folder} has batches of {config.batch_size}, expected {least} "
            f"to {most} for its data; start a new run"
        )
    run = Run(folder, loaded, started, mesh)
    _check_steps(run)
    return run


def _require_packages(source: problem.Source, wanted: Wanted) -> None:
    require("rich", "matplotlib", "orbax.checkpoint")
    if source is None:
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


def _train(run: Run, wanted: Wanted) -> None:
    with launch.explain_failures(run.folder):
        try:
            with watching.watch(run.folder, run.config, run.steps_per_epoch, wanted) as show:
                trained = {arm: train_arm(arm, run, last, show) for arm, last in _prepared(run)}
            if jax.process_index() == 0:
                local = run.mesh.local_mesh
                results.finish(run.folder, run.problem, run.config, trained, local)
                advise(f"{run.folder} is complete, see bn-jax eval", launch.LOST)
        except OSError as error:
            raise OSError(f"{error}; {unfinished.kept(run.folder)}") from error
        processes.disconnect()


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


def train_arm(arm: str, run: Run, last: checkpoints.Position, show: ShowReports) -> Result:
    """Trains an arm to the end.

    Args:
        arm: one of `runs.ARMS`.
        run: the run; a checkpoint is saved in its folder after every epoch.
        last: where to continue.
        show: called with the arm and all reports so far, after each of them.

    Returns:
        All reports, the last state and its test evaluation.
    """
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
            checkpoints.save_position(run.checkpoints(arm), position, run.origin(arm))
        show(arm, reports)
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
