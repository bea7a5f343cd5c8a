"""Runs experiments, and keeps what they find: JSON and a figure of each."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from bn_jax.experiments import EXPERIMENTS, figures
from bn_jax.experiments.verdicts import Experiment, Result, Setting
from bn_jax.runs import staged, write_json

PACKAGES = "bn-jax", "jax", "flax", "optax", "numpy"


def choose(names: Sequence[str]) -> list[Experiment]:
    """Finds experiments.

    Args:
        names: names or numbers of experiments, or "all".

    Returns:
        Each of them once, in the order of their numbers.

    Raises:
        ValueError: there is no such experiment, or none is named.
    """
    known = {str(one.number): one for one in EXPERIMENTS.values()} | EXPERIMENTS
    unknown = [name for name in names if name != "all" and name not in known]
    if unknown or not names:
        received = f"received {', '.join(unknown)}" if unknown else "received no name"
        raise ValueError(
            f"{received}, expected all, a number from 1 to {len(EXPERIMENTS)}, or names among "
            f"{', '.join(EXPERIMENTS)}; see them with --list"
        )
    chosen = set(EXPERIMENTS if "all" in names else (known[name].name for name in names))
    return [one for one in EXPERIMENTS.values() if one.name in chosen]


def reproduce(experiment: Experiment, setting: Setting, folder: Path) -> Result:
    """Runs an experiment, and writes what it finds to ``NAME.json`` and ``NAME.png``.

    Args:
        experiment: which.
        setting: how much is run.
        folder: made where it is missing.

    Returns:
        What was found.
    """
    began = time.perf_counter()
    result = experiment.run(setting)
    seconds = time.perf_counter() - began
    with staged(folder) as staging:
        path = staging / f"{experiment.name}.json"
        write_json(path, _described(experiment, setting, result, seconds))
        curves = json.loads(path.read_text())["curves"]
        figures.save(experiment, curves, staging / f"{experiment.name}.png")
    # Every experiment compiles programs of its own, which nothing else will call.
    jax.clear_caches()
    return result


def _described(
    experiment: Experiment, setting: Setting, result: Result, seconds: float
) -> dict[str, Any]:
    said = ("number", "name", "claim", "source", "published", "protocol", "limits")
    return {
        **{name: getattr(experiment, name) for name in said},
        "verdict": result.verdict,
        "criteria": [
            {**one._asdict(), "measured": one.measured._asdict(), "verdict": one.verdict}
            for one in result.criteria
        ],
        "reported": {name: one._asdict() for name, one in result.reported.items()},
        "seeds": setting.chosen.tolist(),
        "quick": setting.quick,
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "platform": jax.default_backend(),
        "curves": result.curves,
    }
