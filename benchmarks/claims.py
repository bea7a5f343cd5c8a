"""The verdicts of the experiments on the published claims, with two sets of seeds.

``python -m benchmarks.claims`` runs ``bn-jax reproduce all`` for the seeds from 0 and for the seeds
from 100, prints the verdicts, and writes ``benchmarks/results/claims.json``. Each of the two runs
takes a quarter of an hour. Two folders that ``bn-jax reproduce all`` has written can be passed
instead.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks import report

FIRST_SEEDS = 0, 100
KEPT = ("number", "claim", "source", "published", "limits", "verdict", "criteria", "reported")


def reproduce(folder: Path) -> list[Path]:
    """Runs all experiments for each of `FIRST_SEEDS`, into subfolders of `folder`."""
    folders = [folder / f"from {first}" for first in FIRST_SEEDS]
    for first, out in zip(FIRST_SEEDS, folders, strict=True):
        command = [sys.executable, "-m", "bn_jax.lab.command", "reproduce", "all", "--first-seed"]
        subprocess.run([*command, str(first), "--out", str(out)], check=True)
    return folders


def collect(folders: Sequence[Path]) -> dict[str, Any]:
    """Reads the results of the experiments.

    Args:
        folders: written by ``bn-jax reproduce all``, one for each of `FIRST_SEEDS`.

    Returns:
        The results of each claim with the first seeds, without curves, ordered by number. `others`
        holds the verdict and the measured figures with the other seeds.

    Raises:
        ValueError: a folder has other seeds than `FIRST_SEEDS` says.
    """
    runs = [
        {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        for folder in folders
    ]
    for first, run in zip(FIRST_SEEDS, runs, strict=True):
        if {found["seeds"][0] for found in run.values()} != {first}:
            raise ValueError(f"a claim has other seeds than the seeds from {first}")
    claims = {}
    for name, found in sorted(runs[0].items(), key=lambda one: one[1]["number"]):
        other = runs[1][name]
        claims[name] = {key: found[key] for key in KEPT} | {
            "seconds": [found["seconds"], other["seconds"]],
            "others": {
                "verdict": other["verdict"],
                "criteria": [
                    {key: one[key] for key in ("measured", "verdict")} for one in other["criteria"]
                ],
            },
        }
    return {"first_seeds": FIRST_SEEDS, "seeds": len(found["seeds"]), "claims": claims}


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns a table of the verdicts and a table of the measured figures."""
    first, second = (f"seeds from {one}" for one in figures["first_seeds"])
    verdicts = Table(title=f"Verdicts with two sets of {figures['seeds']} seeds", box=SIMPLE_HEAD)
    for column in ("claim", "source", first, second):
        verdicts.add_column(column)
    measured = Table(
        title="Measured figures: estimate and 95 % interval, with both sets of seeds",
        box=SIMPLE_HEAD,
    )
    for column in ("claim", "measured", "published", first, "verdict", second, "verdict"):
        measured.add_column(column)
    for one in figures["claims"].values():
        verdicts.add_row(
            f"{one['number']}. {one['claim']}",
            one["source"],
            one["verdict"],
            one["others"]["verdict"],
        )
        for criterion, other in zip(one["criteria"], one["others"]["criteria"], strict=True):
            cells = (
                cell for this in (criterion, other) for cell in (_shown(this), this["verdict"])
            )
            name, published = (_plain(criterion[key]) for key in ("name", "published"))
            measured.add_row(str(one["number"]), name, published, *cells)
    return [verdicts, measured]


def _plain(text: str) -> str:
    """Escapes what would end a cell of a Markdown table."""
    return text.replace("|", "\\|")


def _shown(criterion: Mapping[str, Any]) -> str:
    figures = [criterion["measured"][key] for key in ("estimate", "low", "high")]
    if None in figures:
        return "not finite"
    estimate, low, high = (f"{figure:.3g}" for figure in figures)
    return estimate if low == high else f"{estimate} ({low} to {high})"


def main() -> None:
    """Runs or reads the experiments, writes the JSON and prints the tables."""
    with TemporaryDirectory() as folder:
        given = [Path(one) for one in sys.argv[1:]]
        found = collect(given or reproduce(Path(folder)))
    report.write("claims", ("flax", "optax", "numpy", "scipy", "scikit-learn"), found)
    report.show(tables(report.read("claims")))


if __name__ == "__main__":
    main()
