"""What a training finds: its record, and the folder of a finished run."""

import contextlib
import importlib.metadata
import json
import math
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from bn_jax import training
from bn_jax.lab import checkpoints, runs
from bn_jax.lab.console import tables
from bn_jax.lab.console.choices import MODEL_NAMES
from bn_jax.lab.data import Dataset, save_npz
from bn_jax.lab.datasets.problem import Problem
from bn_jax.lab.files import records
from bn_jax.lab.files.reading import sha256_of_file, sha256_of_folder
from bn_jax.lab.files.records import Config
from bn_jax.lab.files.writing import save_picture, staged
from bn_jax.lab.fitting import Report
from bn_jax.lab.training.curves import draw_curves

__all__ = [
    "TARGET",
    "Result",
    "finish",
    "name_training",
    "rank",
    "replace_checkpoints",
    "write",
]

TARGET = 0.9
REPORT_EVERY = 5


class Result(NamedTuple):
    """A trained arm.

    Attributes:
        reports: in the order of the steps.
        state: after the last step.
        test: means over the test part.
    """

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
        """Examples per second in the second half of the training, without evaluation.

        In the first half, the next arm may be compiled on the same processor.
        """
        *_, last = self.reports
        middle = self.reports[(len(self.reports) - 1) // 2]
        if middle is last:
            return last.examples / last.seconds
        return (last.examples - middle.examples) / (last.seconds - middle.seconds)


def rank(evaluation: training.Evaluation) -> tuple[float, float]:
    """Returns a key that sorts evaluations from worst to best: by accuracy, then by loss."""
    loss = evaluation.loss if math.isfinite(evaluation.loss) else math.inf
    return evaluation.accuracy, -loss


def finish(
    folder: Path, problem: Problem, config: Config, results: dict[str, Result], mesh: Mesh
) -> None:
    """Saves a run, reloads and evaluates the best arm, and prints all results."""
    best = max(results, key=lambda arm: rank(results[arm].reports[-1].validation))
    with replace_checkpoints(folder) as staging:
        write(staging, problem, config, results, best)
        reloaded = runs.evaluate_run(runs.read_run(staging), mesh, None)
        if reloaded.correct != results[best].test.correct:
            raise RuntimeError(
                f"the reloaded checkpoint answers {reloaded.correct} test examples correctly, "
                f"expected {results[best].test.correct}"
            )
    tables.print_arms(results)
    how = "Best by validation accuracy" if len(results) > 1 else "The only arm"
    print(f"{how}: {best}")
    print(
        f"Checkpoint reloaded: {reloaded.correct} of {reloaded.examples} test answers correct, "
        f"the same as before saving ({reloaded.accuracy:.2%})"
    )
    print(f"Saved in {folder}")


@contextlib.contextmanager
def replace_checkpoints(folder: Path) -> Iterator[Path]:
    """Stages results, which replace the checkpoints of an unfinished run once they are complete.

    Args:
        folder: of the run.

    Yields:
        A folder for the results.
    """
    with staged(folder) as staging:
        yield staging
    shutil.rmtree(folder / "checkpoints")


def write(
    folder: Path, problem: Problem, config: Config, results: dict[str, Result], best: str
) -> None:
    """Writes the files of a finished run.

    Args:
        folder: exists.
        problem: the data.
        config: the options.
        results: by arm.
        best: the arm whose checkpoint is saved.
    """
    checkpoints.save_variables(folder / "checkpoint", results[best].state)
    reports = {arm: result.reports for arm, result in results.items()}
    picture = draw_curves(reports, title=name_training(config), target=TARGET)
    save_picture(picture, folder / "curves.png")
    # In the format of the user's files, so that eval reads both alike and needs no other file.
    save_npz(folder / "test.npz", Dataset(problem.test_images, problem.splits.test.y))
    metrics = _metrics(problem, config)
    metrics["arms"] = {arm: arm_metrics(result) for arm, result in results.items()}
    metrics["best_arm"] = best
    metrics["checkpoint_sha256"] = sha256_of_folder(folder / "checkpoint")
    metrics["test_sha256"] = sha256_of_file(folder / "test.npz")
    sealed = records.seal_metrics(metrics)
    (folder / "metrics.json").write_text(json.dumps(sealed, indent=2, allow_nan=False) + "\n")


def _metrics(problem: Problem, config: Config) -> dict[str, Any]:
    packages = ("bn-jax", "jax", "flax", "optax", "numpy")
    return {
        "config": config.as_json(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "platform": jax.default_backend(),
        "data": {
            "examples": {name: len(part.y) for name, part in problem.splits._asdict().items()},
            "image_shape": problem.test_images.shape[1:],
            "num_classes": problem.num_classes,
            "class_names": problem.class_names,
            "mean": problem.mean,
            "std": problem.std,
        },
    }


def arm_metrics(result: Result) -> dict[str, Any]:
    """Returns what `metrics.json` records of an arm; numbers that are not finite become null."""
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


def name_training(config: Config) -> str:
    """Says what was trained, for the picture."""
    data = "scikit-learn's digits" if config.data is None else Path(config.data).name
    devices = f"{config.devices} device{'s' * (config.devices != 1)}"
    return f"{MODEL_NAMES[config.model]} on {data}, batches of {config.batch_size} on {devices}"
