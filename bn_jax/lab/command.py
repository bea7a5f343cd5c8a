"""The command `bn-jax`: train a small ResNet, and go on with what it has saved."""

import contextlib
import datetime
import functools
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from bn_jax import training
from bn_jax.lab import checkpoints, data, processes, runs
from bn_jax.lab.experiments import EXPERIMENTS, verdicts
from bn_jax.lab.experiments.reproduce import choose, reproduce_each
from bn_jax.lab.experiments.verdicts import Experiment, Interval, Setting
from bn_jax.lab.fitting import Report, fit, make_optimizer, shard_dataset
from bn_jax.lab.runs import ARMS

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(
        "bn-jax: error: typer is not installed; install with pip install 'bn-jax[demo]'"
    ) from missing

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

TARGET = 0.9
DEFAULT_BATCH_SIZE = 64
REPORT_EVERY = 5
ANEW = "anew"
WITH_RESUME = ("resume", "devices", "coordinator", "num_processes", "process_id")
FOR_SAVED_RUNS = ("orbax.checkpoint", "safetensors", "flatbuffers")
MOST_SEEDS = 1000
INTERRUPTED = 130
# Half of the time of small runs is compiling; at level 0 they run longer than that saves.
COMPILED_QUICKLY = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
LOST = "another process was lost, or JAX's runtime failed as it says above"

Show = Callable[[str, Report], None]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that train has written.")]

app = typer.Typer(
    help="Batch normalization for JAX and Flax, tried on real handwritten digits.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class Config(NamedTuple):
    """What the user chose for a run."""

    data: str | None
    devices: int
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int


class Problem(NamedTuple):
    """The parts of the data, standardized but for `test_images`, and how they were standardized."""

    splits: data.Splits
    test_images: data.FloatArray
    mean: float
    std: float
    num_classes: int
    sha256: str


class Launch(NamedTuple):
    """How many processes train, and, where no launcher tells JAX, where and which one this is."""

    processes: int
    coordinator: str | None = None
    process_id: int | None = None


class UnfinishedRun(NamedTuple):
    """What `checkpoints/config.json` tells: how the run was started, and its data in full."""

    config: Config
    data_file: Path | None
    data_sha256: str


class Result(NamedTuple):
    """A trained arm: its reports, its state after the last step, and its test evaluation."""

    reports: list[Report]
    state: training.TrainState
    test: training.Evaluation

    @property
    def steps_to_target(self) -> int | None:
        """Steps to the first report whose validation accuracy is at least `TARGET`."""
        reached = (r.step for r in self.reports if r.validation.accuracy >= TARGET)
        return next(reached, None)

    @property
    def examples_per_second(self) -> float:
        """Examples trained on in a second, without compilation and evaluation."""
        return self.reports[-1].examples / self.reports[-1].seconds


def main() -> NoReturn:
    """Runs the command line of this process.

    Raises:
        SystemExit: always; the code is 0, 1 for a failure, 2 for bad input, 130 for Ctrl-C.
    """
    try:
        code = typer.main.get_command(app).main(prog_name="bn-jax", standalone_mode=False)
    except typer.TyperException as error:
        _print_error(error.format_message())
        code = error.exit_code
    except runs.BadRunError as error:
        _print_error(str(error))
        code = 2
    except OSError as error:
        _print_error(f"{error}; nothing was saved")
        code = 1
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            _stop_for_lost_process(error, "nothing was saved")
        traceback.print_exc()
        code = 1
    if code == INTERRUPTED:
        _print_error("interrupted; nothing was saved")
    _exit(code)


def _exit(code: int) -> NoReturn:
    if code and jax.distributed.is_initialized():
        # An orderly exit waits until the other processes end too, and they wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _print_error(message: str) -> None:
    print("bn-jax: error:", " ".join(message.split()), file=sys.stderr, flush=True)


def _fail(message: str, code: int = 2) -> NoReturn:
    _print_error(message)
    raise typer.Exit(code)


_stopping = threading.Lock()


def _stop(message: str) -> NoReturn:
    # A lost process is noticed by a collective and by JAX's runtime, in two threads: one speaks.
    _stopping.acquire()
    _print_error(message)
    os._exit(1)


def _stop_for_lost_process(error: jax.errors.JaxRuntimeError, advice: str) -> NoReturn:
    _stop(f"another process was lost ({str(error).splitlines()[0]}); {advice}")


def _print_version(wanted: bool) -> None:
    if wanted:
        print("bn-jax", importlib.metadata.version("bn-jax"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def train(
    context: typer.Context,
    data_file: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE.npz",
            help="Arrays x, numbers [N, H, W] or [N, H, W, C], and y, integers [N] from 0. "
            "Default: scikit-learn's digits.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the results. Default: runs/<date-time>.")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(help="Devices to train on. Default: all; on a CPU 2 virtual ones."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 20,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Examples in a step, over all devices. Default: 64, or what the devices divide "
            "near it; fewer where the data are few."
        ),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of SGD.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the split, the parameters and the order.")] = 0,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Go on with the unfinished run in this folder, with its options; only --devices "
            "and those of several processes may be others.",
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where process 0 listens, to train with several processes. "
            "Default: one process, or what Open MPI, Slurm or Cloud TPU have launched.",
        ),
    ] = None,
    num_processes: Annotated[int | None, typer.Option(help="How many processes there are.")] = None,
    process_id: Annotated[
        int | None, typer.Option(help="Which one this is, from 0; process 0 prints and writes.")
    ] = None,
) -> None:
    """Train without norm, with per-device and with synchronized batch norm, and compare."""
    _check_positive(
        devices=devices,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        num_processes=num_processes,
    )
    if not 0 <= seed < 2**32:
        _fail(f"--seed: received {seed}, expected 0 to {2**32 - 1}; choose one of these")
    launch = _check_launch(coordinator, num_processes, process_id)
    if resume is not None:
        _check_given_alone(context)
        _resume(resume, devices, launch)
        return
    _require_for_training(data_file)
    folder = _checked_out(out)
    problem = _load(data_file, seed)
    mesh = _make_mesh(devices, problem, launch)
    chosen_batch_size = _choose_batch_size(batch_size, mesh.size, len(problem.splits.train.y))
    source = None if data_file is None else str(data_file)
    config = Config(source, mesh.size, epochs, chosen_batch_size, learning_rate, seed)
    folder = _agree(folder, config, problem, mesh, resumed=False)
    if jax.process_index() == 0:
        _begin(folder, config, problem)
    _run(folder, problem, config, mesh)


def _resume(folder: Path, devices: int | None, launch: Launch) -> None:
    saved = _read_unfinished(folder)
    config = saved.config
    _require_for_training(saved.data_file)
    problem = _load(saved.data_file, config.seed)
    if problem.sha256 != saved.data_sha256:
        _fail(
            f"--resume: {saved.data_file or 'scikit-learn'} no longer holds the data of "
            f"{folder} (its SHA-256 is another); restore the data or train anew"
        )
    mesh = _make_mesh(devices or config.devices, problem, launch)
    if config.batch_size % mesh.size:
        _fail(
            f"--devices: received {mesh.size}, expected a divisor of the run's batch size, "
            f"{config.batch_size}; use --devices {config.devices} as before"
        )
    folder = _agree(folder, config, problem, mesh, resumed=True)
    _run(folder, problem, config, mesh)


def _run(folder: Path, problem: Problem, config: Config, mesh: Mesh) -> None:
    with _explained(folder):
        with _progress(_steps_per_epoch(problem, config), config.epochs) as show:
            results = {arm: _train_arm(arm, problem, config, mesh, folder, show) for arm in ARMS}
        if jax.process_index() == 0:
            _finish(folder, problem, config, results, mesh.local_mesh)
        jax.distributed.shutdown()


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    start = "go on" if jax.process_count() == 1 else "start every process again"
    advice = f"{start} with bn-jax train --resume {shlex.quote(str(folder))}"
    if jax.distributed.is_initialized():
        _explain_abort(f"{LOST}; {advice}")
    try:
        yield
    except KeyboardInterrupt:
        _print_error(f"interrupted; {advice}")
        _exit(130)
    except OSError as error:
        _fail(f"{error}; {advice}", code=1)
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        _stop_for_lost_process(error, advice)


def _explain_abort(message: str) -> None:
    processes.on_abort(functools.partial(_stop, message))


def _finish(
    folder: Path, problem: Problem, config: Config, results: dict[str, Result], mesh: Mesh
) -> None:
    best = max(ARMS, key=lambda arm: _rank(results[arm].reports[-1].validation))
    with _staged(folder) as staging:
        _write(staging, problem, config, results, best)
        reloaded = _evaluate_run(staging, None, mesh)
        if reloaded.correct != results[best].test.correct:
            raise RuntimeError(
                f"the reloaded checkpoint answers {reloaded.correct} test examples correctly, "
                f"expected {results[best].test.correct}"
            )
    _print_table(results)
    print(f"Best by validation accuracy: {best}")
    print(
        f"Checkpoint reloaded: {reloaded.correct} of {reloaded.examples} test answers correct, "
        f"the same as before saving ({reloaded.accuracy:.2%})"
    )
    print(f"Saved in {folder}")


@app.command("eval")
def evaluate(
    run: RunFolder,
    data_file: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE.npz",
            help="Arrays x and y as for train. Default: the run's own test part.",
        ),
    ] = None,
) -> None:
    """Evaluate the best arm of a saved run."""
    _require(*FOR_SAVED_RUNS)
    evaluation = _evaluate_run(run, data_file, _one_device())
    name = "test" if data_file is None else str(data_file)
    print(
        f"{name} accuracy {evaluation.accuracy:.2%} "
        f"({evaluation.correct} of {evaluation.examples} correct)"
    )


@app.command()
def recalibrate(
    run: RunFolder,
    data_file: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE.npz",
            help="Images of another domain, as for train, to measure the statistics of. "
            "Default: the run's own training part.",
        ),
    ] = None,
    prior: Annotated[
        float, typer.Option(help="Share of the old statistics in the new, from 0 to below 1.")
    ] = 0.0,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the result. Default: DIR-recalibrated.")
    ] = None,
) -> None:
    """Measure the running statistics of a saved run anew, exactly, over all training images."""
    if not 0 <= prior < 1:
        _fail(f"--prior: received {prior}, expected 0 to below 1; choose one of these")
    saved, folder = _read_for(run, out, "recalibrated")
    found, change = runs.recalibrate_run(
        saved, _one_device(), data_file, folder, prior=prior, progress=sys.stderr.isatty()
    )
    print(found)
    _print_change(change)
    _print_saved(folder)


@app.command()
def fold(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the result. Default: DIR-folded.")
    ] = None,
) -> None:
    """Fold the batch norms of a saved run into its convolutions, and export the program."""
    saved, folder = _read_for(run, out, "folded")
    folded, change = runs.fold_run(saved, _one_device(), folder)
    print(folded.report)
    _print_change(change)
    _print_saved(folder)


@app.command()
def audit(
    run: RunFolder,
    data_file: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE.npz",
            help="Images like those of the training, as for train. Default: the run's test part.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for audit.json. Default: DIR-audit.")
    ] = None,
) -> None:
    """Look for mistakes in the batch norms of a saved run, and say what to do about each."""
    saved, folder = _read_for(run, out, "audit")
    print(runs.audit_run(saved, _one_device(), data_file, folder))
    print(f"Saved in {folder}")


@app.command("reproduce")
def reproduce_claims(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME ... | all]", help="Names or numbers of claims, see --list."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Runs of each kind. Default: 8; with --quick 3.")
    ] = None,
    first_seed: Annotated[
        int, typer.Option(help="Of the runs; others repeat everything independently.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the results. Default: runs/<date-time>.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and smaller runs: much stays undecided.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            help="Claims that are tested at once. Default: 2 on a CPU with 2 cores, else 1."
        ),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Print the claims and exit.")] = False,
) -> None:
    """Test what is said about batch normalization, claim by claim."""
    _require("rich", "matplotlib", "sklearn")
    if show_list:
        _print_claims()
        return
    try:
        chosen = choose(names or [])
    except ValueError as error:
        _fail(f"NAME: {error}")
    setting = _checked_setting(seeds, first_seed, quick)
    if processes is not None and processes < 1:
        _fail(
            f"--processes: received {processes}, expected 1 or more; leave it out for the default"
        )
    folder = _checked_out(out)
    if quick:
        # Before JAX starts; the other processes get it from this one.
        os.environ["XLA_FLAGS"] = f"{COMPILED_QUICKLY} {os.environ.get('XLA_FLAGS', '')}"
    _print_results(_reproduce(chosen, setting, folder, processes or _default_processes()))
    print(f"Saved in {folder}, with what else was measured and a figure of each claim")


def _checked_setting(seeds: int | None, first_seed: int, quick: bool) -> Setting:
    seeds = (3 if quick else 8) if seeds is None else seeds
    if not 2 <= seeds <= MOST_SEEDS:
        _fail(
            f"--seeds: received {seeds}, expected 2 to {MOST_SEEDS}; an interval needs more than "
            "one run"
        )
    if not 0 <= first_seed < 2**31 - MOST_SEEDS:
        _fail(
            f"--first-seed: received {first_seed}, expected 0 to {2**31 - MOST_SEEDS - 1}; choose "
            "one of these"
        )
    return Setting(seeds, first_seed, quick)


def _default_processes() -> int:
    """Compiling occupies one core; the memory of an accelerator is not to be shared."""
    return 2 if jax.default_backend() == "cpu" and (os.cpu_count() or 1) > 1 else 1


def _reproduce(
    chosen: list[Experiment], setting: Setting, folder: Path, processes: int
) -> dict[Experiment, verdicts.Result]:
    results: dict[Experiment, verdicts.Result] = {}
    try:
        with (
            _claims_progress(chosen) as show,
            contextlib.closing(
                reproduce_each(chosen, setting, folder, min(processes, len(chosen)), show)
            ) as found,
        ):
            for experiment, result in found:
                results[experiment] = result
                show(experiment, math.inf, result)
    except KeyboardInterrupt:
        cause, code = "interrupted", INTERRUPTED
    except BrokenProcessPool:
        cause, code = "a process died, of lack of memory? try --processes 1", 1
    else:
        return {one: results[one] for one in chosen}
    _print_error(f"{cause}; {len(results)} of {len(chosen)} claims are in {folder}")
    _exit(code)


@contextlib.contextmanager
def _claims_progress(chosen: list[Experiment]) -> Iterator[Callable[..., None]]:
    """Gives what is called with an experiment, the share that was done, and in the end its result.

    Without a terminal a line is printed for every result.
    """
    if not (sys.stderr.isatty() or sys.stdout.isatty()):
        yield _print_verdict
        return
    from rich import console, progress

    bar = progress.Progress(
        progress.TextColumn("{task.description:24}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[verdict]}"),
        progress.TimeElapsedColumn(),
        console=console.Console(stderr=sys.stderr.isatty()),
    )
    tasks = {one: bar.add_task(one.name, start=False, total=1.0, verdict="") for one in chosen}

    def show(experiment: Experiment, share: float, result: verdicts.Result | None = None) -> None:
        bar.start_task(tasks[experiment])
        bar.advance(tasks[experiment], share)
        if result is not None:
            bar.update(tasks[experiment], completed=1.0, verdict=result.verdict)
            bar.stop_task(tasks[experiment])

    with bar:
        yield show


def _print_verdict(
    experiment: Experiment, share: float, result: verdicts.Result | None = None
) -> None:
    if result is not None:
        print(f"{experiment.number} {experiment.name}: {result.verdict}", flush=True)


def _print_claims() -> None:
    from rich import console, table

    columns = table.Table("", "name", "claim", "source")
    for one in EXPERIMENTS.values():
        columns.add_row(str(one.number), one.name, one.claim, one.source)
    console.Console().print(columns)


def _print_results(results: dict[Experiment, verdicts.Result]) -> None:
    from rich import console, table

    columns = table.Table("claim", "source", "published", "measured", "verdict", show_lines=True)
    for experiment, result in results.items():
        columns.add_row(
            f"{experiment.number} {experiment.name}: {experiment.claim}",
            experiment.source,
            experiment.published,
            "",
            f"[bold]{result.verdict}[/bold]",
        )
        for one in result.criteria:
            columns.add_row(one.name, "", one.published, _shown(one.measured), one.verdict)
    console.Console().print(columns)


def _shown(measured: Interval) -> str:
    estimate, low, high = measured
    if low == estimate == high:
        return f"{estimate:.3g}"
    return f"{estimate:.3g} ({low:.3g} to {high:.3g})"


def _read_for(run: Path, out: Path | None, suffix: str) -> tuple[runs.SavedRun, Path]:
    """Returns the run, and the new folder beside it or where the user wants it."""
    _require("rich", *FOR_SAVED_RUNS)
    named = run if run.name not in ("", "..") else run.resolve()
    return runs.read_run(run), _checked_out(out or named.with_name(f"{named.name}-{suffix}"))


def _one_device() -> Mesh:
    return training.make_mesh(jax.devices()[:1])


def _print_saved(folder: Path) -> None:
    print(f"Saved in {folder}; evaluate it with bn-jax eval {shlex.quote(str(folder))}")


def _print_change(change: runs.Change) -> None:
    from rich import console, table

    columns = table.Table()
    columns.add_column("", no_wrap=True)
    for header in change._fields:
        columns.add_column(header, justify="right")
    rows: dict[str, Callable[[runs.Figures], str]] = {
        "accuracy": lambda one: f"{one.evaluation.accuracy:.2%}",
        "loss": lambda one: f"{one.evaluation.loss:.4f}",
        "milliseconds a batch": lambda one: f"{one.milliseconds:.2f}",
        "parameters": lambda one: f"{one.parameters:,}",
    }
    for name, show in rows.items():
        columns.add_row(name, *map(show, change))
    console.Console().print(columns)


def _require_for_training(data_file: Path | None) -> None:
    _require("rich", "matplotlib", "orbax.checkpoint", *([] if data_file else ["sklearn"]))


def _require(*modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            _fail(f"{error.name} is not installed; install with pip install 'bn-jax[demo]'", code=1)


def _check_positive(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not 0 < value < math.inf:
            _fail(
                f"--{name.replace('_', '-')}: received {value}, expected a positive finite number; "
                "choose one, or leave the option out for its default"
            )


def _check_launch(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Launch:
    options = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    missing = [option for option, value in options.items() if value is None]
    if coordinator is None or num_processes is None or process_id is None:
        if len(missing) < len(options):
            _fail(f"{' and '.join(missing)}: missing; give {', '.join(options)} together or none")
        return Launch(_launched_processes())
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        _fail(
            f"--coordinator: received {coordinator}, expected HOST:PORT with a port from 1 to "
            f"{2**16 - 1}; give the address of process 0, e.g. 127.0.0.1:1234"
        )
    if not 0 <= process_id < num_processes:
        _fail(
            f"--process-id: received {process_id}, expected 0 to {num_processes - 1} for "
            f"--num-processes {num_processes}; number the processes from 0"
        )
    return Launch(num_processes, coordinator, process_id)


def _launched_processes() -> int:
    launched = processes.launched_processes()
    if launched == 1 and "JAX_COORDINATOR_ADDRESS" in os.environ:
        _fail(
            "JAX_COORDINATOR_ADDRESS is set, expected also a launcher that tells JAX the number "
            "of processes; give --coordinator, --num-processes and --process-id, or unset it"
        )
    return launched


def _connect(launch: Launch) -> None:
    seconds = processes.CONNECTION_TIMEOUT
    _explain_abort(
        f"the {launch.processes} processes have not all met within {seconds} seconds; start all "
        "of them, with the same --coordinator and --num-processes; nothing was saved"
    )
    number = None if launch.coordinator is None else launch.processes
    try:
        processes.connect(launch.coordinator, number, launch.process_id)
    except (ValueError, RuntimeError, OSError) as error:
        _fail(
            f"JAX cannot connect the processes ({error}); check --coordinator, which process 0 "
            "listens at, or give it with --num-processes and --process-id",
            code=1,
        )
    _explain_abort(f"{LOST}; nothing was saved")


def _agree(folder: Path, config: Config, problem: Problem, mesh: Mesh, *, resumed: bool) -> Path:
    """Ends a process that was started with other options than process 0; returns its folder."""
    own = {
        "--resume": resumed,
        "--data": problem.sha256,
        "--devices": mesh.size,
        "--epochs": config.epochs,
        "--batch-size": config.batch_size,
        "--learning-rate": config.learning_rate,
        "--seed": config.seed,
    }
    first = json.loads(processes.from_first(json.dumps({"--out": str(folder)} | own)))
    for option, value in own.items():
        if value != first[option]:
            _fail(
                f"{option}: received {value}, process 0 {first[option]}, expected the same; "
                "start every process with the options of process 0"
            )
    return Path(first["--out"])


def _begin(folder: Path, config: Config, problem: Problem) -> None:
    data_file = None if config.data is None else str(Path(config.data).absolute())
    started = {
        "config": config._asdict(),
        "data_file": data_file,
        "data_sha256": problem.sha256,
    }
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/config.json").write_text(json.dumps(started, indent=2) + "\n")


def _check_given_alone(context: typer.Context) -> None:
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name))
        if given is None or given.name != "COMMANDLINE" or parameter.name in WITH_RESUME:
            continue
        _fail(
            f"{parameter.opts[0]}: given with --resume, which goes on with the run's own; leave "
            "it out, or train anew without --resume"
        )


def _read_unfinished(folder: Path) -> UnfinishedRun:
    if (folder / "metrics.json").exists():
        _fail(f"--resume: {folder} is a finished run; see it with bn-jax eval, or train anew")
    try:
        started = json.loads((folder / "checkpoints/config.json").read_text())
        config = started["config"]
        return UnfinishedRun(
            Config(
                data=None if config["data"] is None else str(config["data"]),
                devices=int(config["devices"]),
                epochs=int(config["epochs"]),
                batch_size=int(config["batch_size"]),
                learning_rate=float(config["learning_rate"]),
                seed=int(config["seed"]),
            ),
            None if started["data_file"] is None else Path(started["data_file"]),
            str(started["data_sha256"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _fail(
            f"--resume: {folder} is not an unfinished run ({type(error).__name__}: {error}), "
            "expected a folder with checkpoints that bn-jax train has left; train anew"
        )


def _checked_out(out: Path | None) -> Path:
    folder = out or Path("runs", datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    try:
        if folder.exists() and not folder.is_dir():
            _fail(f"--out: {folder} is a file, expected a new folder; choose another name")
        if folder.exists() and any(folder.iterdir()):
            _fail(f"--out: {folder} exists and is not empty; choose another name or remove it")
        parent = _existing_parent(folder)
    except OSError as error:
        _fail(f"--out: {folder} cannot be used ({error.strerror}); choose another folder")
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        _fail(f"--out: {folder} cannot be made in {parent}; choose another folder")
    return folder


def _existing_parent(folder: Path) -> Path:
    return next(parent for parent in folder.absolute().parents if parent.exists())


def _load(data_file: Path | None, seed: int) -> Problem:
    try:
        dataset = data.load_digits() if data_file is None else data.load_npz(data_file)
        splits = data.split(dataset, seed)
        mean, std = data.mean_and_std(splits.train)
    except ValueError as error:
        _fail(f"--data: {error}")
    num_classes = int(dataset.y.max()) + 1
    if num_classes == 1:
        _fail("--data: array y holds only label 0, expected at least 2 classes; check the labels")
    standardized = data.Splits(*(data.standardize(part, mean, std) for part in splits))
    return Problem(standardized, splits.test.x, mean, std, num_classes, _sha256(dataset))


def _sha256(dataset: data.Dataset) -> str:
    return hashlib.sha256(
        f"{dataset.x.shape}".encode() + dataset.x.tobytes() + dataset.y.tobytes()
    ).hexdigest()


def _make_mesh(devices: int | None, problem: Problem, launch: Launch) -> Mesh:
    number = launch.processes
    if devices is not None and devices % number:
        _fail(
            f"--devices: received {devices}, expected a multiple of the {number} processes, which "
            f"take as many each; use --devices {max(1, devices // number) * number}"
        )
    examples = sum(len(part.y) for part in problem.splits)
    _check_enough_examples(examples, devices or number)
    if number > 1 or launch.coordinator is not None:
        _connect(launch)
    # Once JAX has its devices their number is fixed, and the check below answers.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", 2 if devices is None else devices // number)
    present = [jax.local_devices(process_index=process) for process in range(number)]
    most = min(map(len, present))
    default = 2 if jax.default_backend() == "cpu" else most
    share = default if devices is None else devices // number
    if share > most:
        _fail(
            f"--devices: received {share * number}, expected at most the {most * number} "
            f"{jax.default_backend()} devices that JAX has; lower it"
        )
    _check_enough_examples(examples, share * number)
    return training.make_mesh([device for own in present for device in own[:share]])


def _check_enough_examples(examples: int, devices: int) -> None:
    if examples < devices:
        _fail(
            f"--data: received {examples} examples, expected at least one for each of {devices} "
            f"devices; add examples or use --devices {examples}"
        )


def _choose_batch_size(received: int | None, devices: int, examples: int) -> int:
    # A device with one example of 1x1 positions would have no variance to normalize by.
    least = 2 * devices
    most = max(least, math.ceil(examples / devices) * devices)
    if received is None:
        return min(max(least, DEFAULT_BATCH_SIZE // devices * devices), most)
    if received % devices or not least <= received <= most:
        nearest = min(max(least, received // devices * devices), most)
        _fail(
            f"--batch-size: received {received}, expected a multiple of the number of devices, "
            f"{devices}, from {least} to {most} (for {examples} training examples); "
            f"use --batch-size {nearest}, or another --devices"
        )
    return received


def _steps_per_epoch(problem: Problem, config: Config) -> int:
    return math.ceil(len(problem.splits.train.y) / config.batch_size)


def _train_arm(
    arm: str, problem: Problem, config: Config, mesh: Mesh, folder: Path, show: Show
) -> Result:
    train, validation, test = problem.splits
    steps_per_epoch = _steps_per_epoch(problem, config)
    positions = folder / "checkpoints" / arm.replace(" ", "-")
    state, rng, reports = _last_position(positions, arm, problem, config, mesh)
    if reports:
        show(arm, reports[-1])
    for reached in fit(
        state,
        train,
        validation,
        mesh,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=rng,
        report_every=REPORT_EVERY,
        after=reports[-1] if reports else None,
    ):
        state, report = reached
        reports.append(report)
        if report.step % steps_per_epoch == 0 and jax.process_index() == 0:
            checkpoints.save_position(positions, checkpoints.Position(state, rng, reports))
        show(arm, report)
    test_batches = shard_dataset(test, config.batch_size, mesh)
    return Result(reports, state, training.evaluate(state, test_batches))


def _last_position(
    folder: Path, arm: str, problem: Problem, config: Config, mesh: Mesh
) -> checkpoints.Position:
    state = training.create_state(
        runs.make_model(arm, problem.num_classes, config.batch_size // config.devices),
        make_optimizer(
            config.learning_rate, config.epochs * _steps_per_epoch(problem, config)
        ),
        problem.test_images.shape[1:],
        config.seed,
        mesh,
    )
    newest = processes.from_first(_newest_intact(folder, arm) if jax.process_index() == 0 else ANEW)
    if newest == ANEW:
        return checkpoints.Position(state, np.random.default_rng(config.seed), [])
    return checkpoints.restore_position(folder / newest, state)


def _newest_intact(folder: Path, arm: str) -> str:
    for path in checkpoints.positions(folder):
        if checkpoints.is_intact(path):
            return path.name
        print(
            f"bn-jax: warning: {path} is torn or damaged (its SHA-256 is not the one saved beside "
            f"it); {arm} goes on from the checkpoint before it, or anew where there is none",
            file=sys.stderr,
            flush=True,
        )
    return ANEW


def _rank(evaluation: training.Evaluation) -> tuple[float, float]:
    loss = evaluation.loss if math.isfinite(evaluation.loss) else math.inf
    return evaluation.accuracy, -loss


@contextlib.contextmanager
def _progress(steps_per_epoch: int, epochs: int) -> Iterator[Show]:
    if jax.process_index() > 0:
        yield lambda arm, report: None
        return
    if not (sys.stderr.isatty() or sys.stdout.isatty()):
        yield functools.partial(_print_epoch, steps_per_epoch, epochs)
        return
    from rich import console, progress

    bar = progress.Progress(
        progress.TextColumn("{task.description:23}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[reached]}"),
        progress.TimeElapsedColumn(),
        console=console.Console(stderr=sys.stderr.isatty()),
    )
    total = steps_per_epoch * epochs
    tasks = {arm: bar.add_task(arm, start=False, total=total, reached="") for arm in ARMS}
    with bar:
        yield lambda arm, report: _move_bar(bar, tasks[arm], report)


def _move_bar(bar: "Progress", task: "TaskID", report: Report) -> None:
    bar.start_task(task)
    bar.update(task, completed=report.step, reached=_reached(report))


def _print_epoch(steps_per_epoch: int, epochs: int, arm: str, report: Report) -> None:
    if report.step % steps_per_epoch == 0:
        print(f"{arm}: epoch {report.epoch} of {epochs}, {_reached(report)}", flush=True)


def _reached(report: Report) -> str:
    return f"loss {report.training.loss:.4f}, validation accuracy {report.validation.accuracy:.2%}"


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Gives a folder for the results; they replace the checkpoints when all of them are there."""
    with runs.staged(folder) as staging:
        yield staging
    shutil.rmtree(folder / "checkpoints")


def _write(
    folder: Path, problem: Problem, config: Config, results: dict[str, Result], best: str
) -> None:
    checkpoints.save_variables(folder / "checkpoint", results[best].state)
    _plot(results, folder / "curves.png")
    # As the user would write it, so that eval reads both alike and needs no other file.
    np.savez_compressed(folder / "test.npz", x=problem.test_images, y=problem.splits.test.y)
    metrics = _metrics(problem, config, results, best)
    metrics["checkpoint_sha256"] = checkpoints.sha256(folder / "checkpoint")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def _metrics(
    problem: Problem, config: Config, results: dict[str, Result], best: str
) -> dict[str, Any]:
    packages = ("bn-jax", "jax", "flax", "optax", "numpy")
    return {
        "config": config._asdict(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "platform": jax.default_backend(),
        "data": {
            "examples": {k: len(part.y) for k, part in problem.splits._asdict().items()},
            "image_shape": problem.test_images.shape[1:],
            "num_classes": problem.num_classes,
            "mean": problem.mean,
            "std": problem.std,
        },
        "arms": {arm: _arm_metrics(result) for arm, result in results.items()},
        "best_arm": best,
    }


def _arm_metrics(result: Result) -> dict[str, Any]:
    reports = result.reports
    return {
        "test_accuracy": result.test.accuracy,
        "test_correct": result.test.correct,
        "steps_to_90_percent_validation_accuracy": result.steps_to_target,
        "examples_per_second": result.examples_per_second,
        "curves": {
            "step": [report.step for report in reports],
            "loss": [_finite(report.training.loss) for report in reports],
            "accuracy": [report.training.accuracy for report in reports],
            "validation_loss": [_finite(report.validation.loss) for report in reports],
            "validation_accuracy": [report.validation.accuracy for report in reports],
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plot(results: dict[str, Result], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for arm, result in results.items():
        steps = [report.step for report in result.reports]
        loss.plot(steps, [report.training.loss for report in result.reports], label=arm)
        accuracy.plot(steps, [100 * r.validation.accuracy for r in result.reports], label=arm)
    loss.set(yscale="log", ylabel=f"training loss, mean of {REPORT_EVERY} steps")
    accuracy.set(ylim=(0, 101), ylabel="validation accuracy (%)")
    accuracy.axhline(100 * TARGET, color="gray", linewidth=0.8, linestyle=":")
    for axes in (loss, accuracy):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def _evaluate_run(run: Path, data_file: Path | None, mesh: Mesh) -> training.Evaluation:
    saved = runs.read_run(run)
    dataset = runs.load_like(saved, data_file)
    state = runs.restore(saved, mesh)
    return training.evaluate(state, shard_dataset(dataset, saved.batch_size, mesh))


def _print_table(results: dict[str, Result]) -> None:
    from rich import console, table

    columns = table.Table()
    columns.add_column("arm", no_wrap=True)
    for header in (
        "test accuracy",
        f"steps to {TARGET:.0%}\nvalidation accuracy\n(checked every {REPORT_EVERY})",
        "examples\nper second",
    ):
        columns.add_column(header, justify="right")
    for arm, result in results.items():
        columns.add_row(
            arm,
            f"{result.test.accuracy:.2%}",
            str(result.steps_to_target or "never"),
            f"{result.examples_per_second:,.0f}",
        )
    console.Console().print(columns)


if __name__ == "__main__":
    main()
