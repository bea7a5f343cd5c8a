"""What the experiments find about each sub-claim.

``python -m benchmarks.claims`` runs ``bn-jax reproduce all`` with 16 seeds, which takes about 25
minutes on 2 cores, prints the verdicts, and writes ``claims.json`` and ``claim_curves.json``.
Given a folder that ``bn-jax reproduce all`` has written, it reads that instead.
"""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks import report
from bn_jax.lab.experiments.statistics import Interval
from bn_jax.lab.experiments.verdicts import Verdict

# What is not kept of each claim. The curves, which only the pictures need, have their own file.
LEFT_OUT = "curves", "name", "versions", "platform"
CURVES = "claim_curves"
# Significant digits of the curves, more than a picture can show.
DIGITS = 4


def reproduce(folder: Path) -> Path:
    """Runs all experiments into a subfolder of a folder."""
    out = folder / "claims"
    command = [sys.executable, "-m", "bn_jax.lab.command", "reproduce", "all", "--out", str(out)]
    subprocess.run(command, check=True)
    return out


def collect(folder: Path) -> dict[str, Any]:
    """Reads the results of the experiments.

    Args:
        folder: written by ``bn-jax reproduce all``.

    Returns:
        For each claim, by number, the result without curves.

    Raises:
        ValueError: the claims have been run with different seeds.
    """
    records = _read(folder)
    seeds = {tuple(record["seeds"]) for record in records.values()}
    if len(seeds) != 1:
        raise ValueError(f"{folder} has claims with different seeds: {sorted(seeds)}")
    return {
        "seeds": list(seeds.pop()),
        "claims": {
            name: {key: value for key, value in record.items() if key not in (*LEFT_OUT, "seeds")}
            for name, record in records.items()
        },
    }


def collect_curves(folder: Path) -> dict[str, Any]:
    """Reads the curves of the experiments, with every seed, since pictures compare them in pairs.

    Args:
        folder: written by ``bn-jax reproduce all``.

    Returns:
        For each claim, by number, the curves of its picture, rounded to `DIGITS`.
    """
    return {name: rounded(record["curves"]) for name, record in _read(folder).items()}


def rounded(value: Any) -> Any:
    """Returns a value of JSON with all its numbers that are not integers rounded to `DIGITS`."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if not isinstance(value, float):
        return value
    short = float(f"{value:.{DIGITS}g}")
    # As many digits, without ".0".
    return int(short) if short.is_integer() and abs(short) < 10**DIGITS else short


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the JSON of every claim, by number."""
    records = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return dict(sorted(records.items(), key=lambda item: item[1]["number"]))


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns two tables: how many sub-claims of each claim have each verdict, and all of them."""
    counts = Table(title="Verdicts on the sub-claims of each claim", box=SIMPLE_HEAD)
    for column in ("claim", "source"):
        counts.add_column(column)
    ones = [one for claim in figures["claims"].values() for one in claim["sub_claims"]]
    occurring = [v for v in reversed(Verdict) if any(one["verdict"] == v for one in ones)]
    for verdict in occurring:
        counts.add_column(verdict.value, justify="right")
    parts = Table(
        title=f"Every sub-claim, with {len(figures['seeds'])} seeds: the setting that decided",
        box=SIMPLE_HEAD,
    )
    columns = ("", "statement", "quantity", "published", "bound", "measured", "verdict", "blocks")
    for column in columns:
        parts.add_column(column)
    for claim in figures["claims"].values():
        verdicts = [one["verdict"] for one in claim["sub_claims"]]
        counts.add_row(
            f"{claim['number']}. {claim['claim']}",
            claim["source"],
            *(str(verdicts.count(verdict) or "") for verdict in occurring),
        )
        for one in claim["sub_claims"]:
            parts.add_row(*map(_plain, _cells(one)))
    return [counts, parts]


def _cells(sub_claim: Mapping[str, Any]) -> list[str]:
    published = f"{sub_claim['published']} ({sub_claim['grade']})"
    return [
        sub_claim["key"],
        sub_claim["statement"],
        sub_claim["quantity"],
        published if sub_claim["published"] else "",
        sub_claim["bound"]["text"],
        _measured(sub_claim),
        sub_claim["verdict"],
        ", ".join(sub_claim["blocks"]),
    ]


def _measured(sub_claim: Mapping[str, Any]) -> str:
    """Returns what decided, as read from JSON, where null stands for not-a-number."""
    name = sub_claim["decisive"]
    measured = sub_claim["settings"][name]["measured"]
    ends = {end: math.nan if value is None else value for end, value in measured.items()}
    return f"{name}: {Interval(**ends)}" if name else str(Interval(**ends))


def _plain(text: str) -> str:
    """Escapes what would end a cell of a Markdown table."""
    return text.replace("|", "\\|")


def main() -> None:
    """Runs or reads the experiments, writes the JSON and prints the tables."""
    parser = report.parser("claims", __doc__)
    parser.add_argument("results", nargs="?", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        results = arguments.results or reproduce(Path(folder))
        figures, curves = collect(results), collect_curves(results)
    report.finish(
        "claims",
        arguments.folder,
        ("flax", "optax", "numpy", "scipy", "scikit-learn"),
        figures,
        tables,
    )
    report.write_compactly(CURVES, arguments.folder, curves)


if __name__ == "__main__":
    main()
