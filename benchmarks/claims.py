"""The verdicts of the experiments about the claims, repeated with other seeds.

``python -m benchmarks.claims`` runs ``bn-jax reproduce all`` with the seeds from 0 and from 100 on,
prints the verdicts, and writes ``claims.json``. Each run takes a quarter of an hour. Given two
folders that ``bn-jax reproduce all`` has written, it reads them instead.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks import report
from bn_jax.lab.experiments.verdicts import Interval

FIRST_SEEDS = 0, 100
KEPT = ("number", "claim", "source", "published", "limits", "verdict", "criteria", "reported")


def reproduce(folder: Path) -> list[Path]:
    """Runs all experiments with each of `FIRST_SEEDS`, into subfolders of a folder."""
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
        For each claim, by number, the result with the first seeds, without curves, and under
        `others` the verdicts and measured figures with the other seeds.

    Raises:
        ValueError: a folder has other seeds than expected.
    """
    runs = [
        {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        for folder in folders
    ]
    for first, run in zip(FIRST_SEEDS, runs, strict=True):
        if {result["seeds"][0] for result in run.values()} != {first}:
            raise ValueError(f"a claim has other seeds than those from {first} on")
    results, repeated = runs
    by_number = sorted(results, key=lambda name: results[name]["number"])
    return {
        "first_seeds": FIRST_SEEDS,
        "seeds": len(results[by_number[0]]["seeds"]),
        "claims": {name: _beside(results[name], repeated[name]) for name in by_number},
    }


def _beside(result: Mapping[str, Any], repeated: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a result, and the verdicts and figures of its repetition."""
    return {key: result[key] for key in KEPT} | {
        "seconds": [result["seconds"], repeated["seconds"]],
        "others": {
            "verdict": repeated["verdict"],
            "criteria": [
                {key: criterion[key] for key in ("measured", "verdict")}
                for criterion in repeated["criteria"]
            ],
        },
    }


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns two tables: the verdict of each claim, and the figures of each criterion."""
    first, second = (f"seeds from {seed}" for seed in figures["first_seeds"])
    verdicts = Table(title=f"Verdicts with two sets of {figures['seeds']} seeds", box=SIMPLE_HEAD)
    for column in ("claim", "source", first, second):
        verdicts.add_column(column)
    measured = Table(
        title="Measured figures: estimate and 95 % interval, with both sets of seeds",
        box=SIMPLE_HEAD,
    )
    for column in ("claim", "measured", "published", first, "verdict", second, "verdict"):
        measured.add_column(column)
    for claim in figures["claims"].values():
        verdicts.add_row(
            f"{claim['number']}. {claim['claim']}",
            claim["source"],
            claim["verdict"],
            claim["others"]["verdict"],
        )
        for row in _measured_rows(claim):
            measured.add_row(*row)
    return [verdicts, measured]


def _measured_rows(claim: Mapping[str, Any]) -> Iterator[list[str]]:
    for criterion, other in zip(claim["criteria"], claim["others"]["criteria"], strict=True):
        yield [
            str(claim["number"]),
            _plain(criterion["name"]),
            _plain(criterion["published"]),
            _interval(criterion["measured"]),
            criterion["verdict"],
            _interval(other["measured"]),
            other["verdict"],
        ]


def _plain(text: str) -> str:
    """Escapes what would end a cell of a Markdown table."""
    return text.replace("|", "\\|")


def _interval(measured: Mapping[str, float | None]) -> str:
    """Returns an interval as text, as read from JSON, where null stands for not-a-number."""
    ends = {name: math.nan if value is None else value for name, value in measured.items()}
    return str(Interval(**ends))


def main() -> None:
    """Runs or reads the experiments, writes the JSON and prints the tables."""
    parser = report.parser("claims", __doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        figures = collect(arguments.folders or reproduce(Path(folder)))
    report.finish(
        "claims",
        arguments.folder,
        ("flax", "optax", "numpy", "scipy", "scikit-learn"),
        figures,
        tables,
    )


if __name__ == "__main__":
    main()
