"""The command `bn-jax`: train a small ResNet, use what was saved, and test published claims.

Nothing is imported here but what parses a command line: JAX alone takes longer than `--help` may.
"""

import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from bn_jax.lab.console import terminal
from bn_jax.lab.console.arguments import (
    FOR_FILES_OF_RUNS,
    FOR_SAVED_RUNS,
    check_choice,
    check_counts,
    check_learning_rate,
    check_range,
    new_file,
    new_folder,
    new_picture,
    require,
)
from bn_jax.lab.console.choices import ARM_NAMES, MODELS
from bn_jax.lab.distributed.launchers import check_launch
from bn_jax.lab.distributed.supervision import supervise
from bn_jax.lab.errors import (
    INTERRUPTED,
    CommandError,
    is_distributed,
    leave,
    print_error,
    print_warning,
)

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(
        "bn-jax: error: typer is not installed; install with pip install 'bn-jax[lab]'"
    ) from missing

if TYPE_CHECKING:
    from bn_jax import Audit, Recalibration
    from bn_jax.training import Evaluation

# These records of a training are what --log names.
LOGS = ("tensorboard",)

__all__ = ["app", "main"]

WITH_RESUME = (
    "resume",
    "devices",
    "progress",
    "log",
    "coordinator",
    "num_processes",
    "process_id",
)
# Two thirds of the time of small runs are compiling; the last flag saves a quarter of it. At
# optimization level 0 they run longer than that saves. XLA ends a process with a flag that it does
# not know; the oldest and the newest JAX that are tested know these.
COMPILED_QUICKLY = (
    "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)

RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a finished run.")]
Picture = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        help="Also write the picture of the result to a new .png, .pdf or .svg file.",
    ),
]

app = typer.Typer(
    help="Batch normalization for JAX and Flax: train a small network on handwritten digits or "
    "your images, evaluate and convert it, and test published claims.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> NoReturn:
    """Runs the command line of this process.

    Raises:
        SystemExit: always; the code is 0, 1 for a failure, 2 for bad input, 130 for Ctrl-C.
    """
    try:
        code = typer.main.get_command(app).main(prog_name="bn-jax", standalone_mode=False)
        if code == INTERRUPTED:
            print_error("interrupted; nothing was saved")
    except typer.TyperException as error:
        print_error(error.format_message())
        code = error.exit_code
    except CommandError as error:
        print_error(str(error))
        code = error.code
    except OSError as error:
        print_error(f"{error}; nothing was saved")
        code = 1
    except Exception as error:
        if not is_distributed():
            raise
        from bn_jax.lab.distributed import launch

        launch.stop_if_lost(error, "nothing was saved")
        traceback.print_exc()
        code = 1
    leave(terminal.check_written(code))


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib import metadata

        print("bn-jax", metadata.version("bn-jax"))
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("help", hidden=True)
def show_help(
    context: typer.Context,
    command: Annotated[str | None, typer.Argument(metavar="[COMMAND]")] = None,
) -> None:
    """Print the help of a command, as its option --help does."""
    parent = context.parent
    assert parent is not None
    if command is None:
        print(parent.get_help())
        return
    # As if the command had been called: an unknown name gets the same answer.
    app_of_commands = typer.main.get_command(app)
    app_of_commands.main([command, "--help"], prog_name="bn-jax", standalone_mode=False)


@app.command()
def train(
    context: typer.Context,
    data_file: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="An .npz file of arrays x, numbers [N, H, W] or [N, H, W, C], and y, integers [N] "
            "from 0; or a folder with a subfolder of images of one size for each class. If some "
            "are in colour, grayscale ones become colour. Default: scikit-learn's digits.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the results. Default: runs/<date-time>.")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(help="Number of devices. Default: all; on a CPU, 2 virtual devices."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 20,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Examples in a step, over all devices. Default: 64, or a multiple of the number "
            "of devices near it; fewer for small data."
        ),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of SGD.")] = 0.1,
    seed: Annotated[
        int, typer.Option(help="Seed of the split, the parameters and the order of examples.")
    ] = 0,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"What to train: {', '.join(ARM_NAMES)}; give it once for each. Default: all.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="small, a ResNet of 3 stages; tiny, of 2 stages; resnet18, for images of less "
            "than 64 pixels with a 3x3 stem; or mlp, 2 dense layers of 256. Default: small, or "
            "tiny for images of less than 9 pixels.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Continue the unfinished run in this folder, with its options; only --devices "
            "and the options about processes may differ.",
        ),
    ] = None,
    progress: Annotated[
        bool,
        typer.Option(
            help="Show the progress: bars on a terminal, elsewhere a line for each epoch. Without "
            "it, only results are printed.",
        ),
    ] = True,
    log: Annotated[
        str | None,
        typer.Option(
            metavar="tensorboard",
            help="Also write scalars for TensorBoard, into DIR/tensorboard. A resumed run "
            "continues them.",
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Address of process 0, to train with several processes. "
            "Default: one process, or those that Open MPI, Slurm or Cloud TPU launched.",
        ),
    ] = None,
    num_processes: Annotated[int | None, typer.Option(help="Number of processes.")] = None,
    process_id: Annotated[
        int | None,
        typer.Option(help="Number of this process, from 0; process 0 prints and writes."),
    ] = None,
) -> None:
    """Train with and without batch norm, and compare.

    The same network is trained without norm, with per-device and with synchronized batch norm, or
    as --arm says.
    """
    check_counts(devices=devices, epochs=epochs, batch_size=batch_size)
    check_learning_rate(learning_rate)
    check_range("--seed", seed, 0, 2**32 - 1, "choose one of these")
    for name in arm or ():
        check_choice("--arm", name, list(ARM_NAMES))
    if model is not None:
        check_choice("--model", model, MODELS)
    launched = check_launch(coordinator, num_processes, process_id)
    if log is not None:
        check_choice("--log", log, LOGS)
    if resume is not None:
        _check_allowed_with_resume(context)
    folder = resume or new_folder(out)
    if launched.is_distributed:
        supervise()
    require(*FOR_FILES_OF_RUNS, "jax")
    from bn_jax.lab import trainer
    from bn_jax.lab.training import watching

    wanted = watching.Wanted(progress, log is not None)
    if resume is not None:
        trainer.resume(resume, devices, launched, wanted)
        return

    trainer.start(
        trainer.Request(
            data_file, folder, devices, epochs, batch_size, learning_rate, seed, arm, model
        ),
        launched,
        wanted,
    )


def _check_allowed_with_resume(context: typer.Context) -> None:
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        is_given = source is not None and source.name == "COMMANDLINE"
        if is_given and parameter.name not in WITH_RESUME:
            raise CommandError(
                f"{parameter.opts[0]}: not allowed with --resume, which uses the options of the "
                "saved run; leave it out, or start a new run without --resume"
            )


@app.command("eval")
def evaluate(
    run: RunFolder,
    data_file: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Images and labels as for train. Default: the test part of the run.",
        ),
    ] = None,
) -> None:
    """Evaluate the best arm of a saved run."""
    require(*FOR_SAVED_RUNS)
    from bn_jax.lab import runs
    from bn_jax.lab.distributed import launch

    evaluation = runs.evaluate_run(runs.read_run(run), launch.one_device(), data_file)
    name = "test" if data_file is None else str(data_file)
    print(f"{name} accuracy {_show(evaluation)}")


def _show(evaluation: "Evaluation") -> str:
    return f"{evaluation.accuracy:.2%} ({evaluation.correct} of {evaluation.examples} correct)"


@app.command()
def predict(
    run: RunFolder,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES",
            help="Image files, folders of images, or .npz files with an array x as for train.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="New file for the probabilities of all classes."),
    ] = None,
) -> None:
    """Predict the classes of images by the best arm of a saved run."""
    require(*FOR_SAVED_RUNS)
    from bn_jax.lab import prediction, runs
    from bn_jax.lab.console import tables
    from bn_jax.lab.distributed import launch

    saved = runs.read_run(run)
    file_out = None if out is None else new_file(out, out)
    predictions = prediction.predict_files(saved, launch.one_device(), files)
    for line in predictions.warnings:
        print_warning(f"FILES: {line}")
    tables.print_predictions(predictions)
    if file_out is not None:
        prediction.write_csv(file_out, predictions)
        print(f"Saved in {file_out}")


@app.command()
def recalibrate(
    run: RunFolder,
    data_file: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Images of another domain, as for train, to measure the statistics on. "
            "Default: the training part of the run.",
        ),
    ] = None,
    prior: Annotated[
        float, typer.Option(help="Weight of the old statistics, from 0 to below 1.")
    ] = 0.0,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the result. Default: DIR-recalibrated.")
    ] = None,
    picture: Picture = None,
    progress: Annotated[
        bool | None,
        typer.Option(
            help="Show a bar for each pass, or a line where there is no terminal. "
            "Default: on a terminal."
        ),
    ] = None,
) -> None:
    """Recompute the running statistics of a saved run.

    They become the exact statistics of all training images, or of the images of --data.
    """
    if not 0 <= prior < 1:
        raise CommandError(f"--prior: received {prior}, expected 0 to below 1; choose one of these")
    require(*FOR_SAVED_RUNS, "matplotlib")
    from bn_jax.lab import runs
    from bn_jax.lab.console import tables
    from bn_jax.lab.distributed import launch

    saved = runs.read_run(run)
    folder = new_folder(out, _beside(run, "recalibrated"))
    new_picture(picture)
    result = runs.recalibrate_run(
        saved,
        launch.one_device(),
        data_file,
        folder,
        prior=prior,
        progress=sys.stderr.isatty() if progress is None else progress,
    )
    print(result.recalibration)
    _draw(result.recalibration, picture)
    tables.print_change(result.change)
    _print_saved(folder)


@app.command()
def fold(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the result. Default: DIR-folded.")
    ] = None,
) -> None:
    """Fold the batch norms of a saved run into its convolutions.

    The program is exported for CPU, CUDA and TPU, with its parameters.
    """
    require(*FOR_SAVED_RUNS)
    from bn_jax.lab import runs
    from bn_jax.lab.console import tables
    from bn_jax.lab.distributed import launch

    saved = runs.read_run(run)
    folder = new_folder(out, _beside(run, "folded"))
    result = runs.fold_run(saved, launch.one_device(), folder)
    print(result.folded.report)
    tables.print_change(result.change)
    _print_saved(folder)


@app.command()
def export(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the model. Default: DIR-exported.")
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Fold the batch norms into the convolutions first.")
    ] = False,
    class_names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.txt",
            help="Names of the classes in the order of the labels, one a line. Default: those of "
            "the folder that the run was trained on.",
        ),
    ] = None,
) -> None:
    """Export a saved run to a folder that runs without bn_jax.

    It holds the program for CPU, CUDA and TPU, which takes images as they are in the data, its
    parameters, and a README with the lines that load and call it.
    """
    require(*FOR_SAVED_RUNS)
    from bn_jax.lab import runs
    from bn_jax.lab.commands import deployment
    from bn_jax.lab.distributed import launch

    saved = runs.read_run(run)
    names = None
    if class_names is not None:
        names = deployment.read_class_names(class_names, saved.num_classes)
    folder = new_folder(out, _beside(run, "exported"))
    result = deployment.export_run(saved, launch.one_device(), folder, fold=fold, class_names=names)
    print(f"test accuracy of the run: {_show(result.run)}")
    print(f"test accuracy of the exported model, on raw images: {_show(result.evaluation)}")
    print(f"Saved in {folder}; its README.md shows how to load and call it")


@app.command()
def audit(
    run: RunFolder,
    data_file: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Images like the training images, as for train. "
            "Default: the test part of the run.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the result. Default: DIR-audit.")
    ] = None,
    picture: Picture = None,
) -> None:
    """Find mistakes in the batch norms of a saved run.

    Each is reported with advice.
    """
    require(*FOR_SAVED_RUNS, "matplotlib")
    from bn_jax.lab import runs
    from bn_jax.lab.distributed import launch

    saved = runs.read_run(run)
    folder = new_folder(out, _beside(run, "audit"))
    new_picture(picture)
    found = runs.audit_run(saved, launch.one_device(), data_file, folder)
    print(found)
    _draw(found, picture)
    print(f"Saved in {folder}")


@app.command()
def convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A safetensors file of a library's weights.")
    ],
    library: Annotated[
        str, typer.Option(help="pytorch, keras, haiku, equinox or equinox-ema.")
    ] = "pytorch",
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A safetensors file of the variables of your Flax model, as initialized, with "
            "keys such as params/Dense_0/kernel. Default: the model is a ResNet-18, 34, 50, 101 "
            "or 152 of torchvision.",
        ),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="The path of each layer in the library by its path in Flax. "
            "Default: the same paths.",
        ),
    ] = None,
    transposed: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Paths in Flax of ConvTranspose layers; give it once for each. "
            "'' says that there are none.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New file for the result. Default: FILE-flax.safetensors.")
    ] = None,
) -> None:
    """Convert the weights of another library into variables of Flax.

    Reads a safetensors file of a library's weights, and writes the variables of a Flax model to
    another one, in which parts of a path are joined by slashes: params/Dense_0/kernel.
    """
    require("jax", "safetensors")
    if not file.name:
        raise CommandError(f"FILE: received {file}, expected a safetensors file; give its path")
    file_out = new_file(out, file.with_name(f"{file.stem}-flax.safetensors"))
    from bn_jax.lab.commands import converting

    converted = converting.convert_file(
        file, file_out, library=library, like_file=like, names_file=names, transposed=transposed
    )
    for message in converted.warnings:
        print_warning(message)
    print(f"{converted.model}: {converted.arrays} arrays, {converted.numbers:,} numbers")
    print(
        f"Saved in {file_out}; read it with flax.traverse_util.unflatten_dict("
        f"bn_jax.convert.load_safetensors({str(file_out)!r}), sep='/')"
    )


def _draw(result: "Audit | Recalibration", picture: Path | None) -> None:
    if picture is not None:
        result.plot().savefig(picture, dpi=150)


def _beside(run: Path, suffix: str) -> Path:
    """Returns the default folder for what is made of a run."""
    named = run.resolve() if run.name in ("", "..") else run
    return named.with_name(f"{named.name}-{suffix}")


def _print_saved(folder: Path) -> None:
    print(f"Saved in {folder}; evaluate it with bn-jax eval {shlex.quote(str(folder))}")


@app.command()
def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME ... | all]",
            help="Names or numbers of claims, see --list, or Python files that define one.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Runs of each kind. Default: 16; with --quick 3.")
    ] = None,
    first_seed: Annotated[
        int, typer.Option(help="Seed of the first run; other seeds repeat all independently.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the results. Default: runs/<date-time>.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Fewer and smaller runs: many stay inconclusive."),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Your images in the place of the digits, as of bn-jax train --data, for the "
            "claims that train on a data set.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="Claims that are tested at the same time. Default: 2 on a CPU with 2 cores, "
            "else 1."
        ),
    ] = None,
    progress: Annotated[
        bool,
        typer.Option(
            help="Show the progress: bars on a terminal, elsewhere a line for each claim. Without "
            "it, only results are printed.",
        ),
    ] = True,
    show_list: Annotated[bool, typer.Option("--list", help="Print the claims and exit.")] = False,
    show: Annotated[
        str | None, typer.Option(metavar="NAME", help="Print all about one claim and exit.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --show, the results in the folder of a past run."),
    ] = None,
) -> None:
    """Test published claims about batch normalization."""
    require("jax", "rich", "matplotlib", "sklearn", "filelock")
    from bn_jax.lab.commands import findings, reproduction
    from bn_jax.lab.console import tables
    from bn_jax.lab.experiments import parallel

    if show_list:
        known = reproduction.known()
        tables.print_claims(known.experiments)
        for line in known.broken:
            print_warning(line)
        return
    if show is not None:
        findings.print_claim(reproduction.read(show, results))
        return
    if results is not None:
        raise CommandError("--results: needs --show NAME, the claim to print; give it")
    choice = reproduction.check_names(names or [])
    chosen = choice.experiments
    setting = reproduction.check_setting(seeds, first_seed, quick)
    if processes is not None and processes < 1:
        raise CommandError(
            f"--processes: received {processes}, expected 1 or more; leave it out for the default"
        )
    folder = new_folder(out)
    if data is not None:
        loaded, oddities = reproduction.load_data(data, setting)
        setting = setting._replace(data=loaded)
        chosen, left_out = reproduction.choose_on(choice, setting)
        for line in (*oddities, *left_out):
            print_warning(line)
    # Both before JAX starts its backend; other processes inherit them from this one.
    parallel.request_devices()
    if quick:
        os.environ["XLA_FLAGS"] = f"{COMPILED_QUICKLY} {os.environ.get('XLA_FLAGS', '')}"
    if processes is None:
        processes = reproduction.default_processes()
    found = reproduction.reproduce(chosen, setting, folder, processes, shows_progress=progress)
    if found.records:
        findings.print_findings(found.records)
        print(
            f"Saved in {folder}: all measurements and a figure of each claim, and forest.png of all"
        )
    for line in found.warnings:
        print_warning(line)
    failures = [*choice.broken, *found.failures]
    for line in failures:
        print_error(line)
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    from bn_jax.lab.__main__ import run

    run()
