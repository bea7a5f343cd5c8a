"""The files of a claim's result: its JSON, its values in a table for all claims, and its figure."""

import csv
import importlib.metadata
import io
import json
import math
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bn_jax.lab.experiments import figures
from bn_jax.lab.experiments.statistics import Interval, corrected_interval
from bn_jax.lab.experiments.verdicts import (
    Experiment,
    Finding,
    Result,
    Series,
    Setting,
    SubClaim,
    describe_seeds,
)
from bn_jax.lab.writing import staged, write_json

VALUES = "values.csv"
COLUMNS = "claim", "sub_claim", "arm", "setting", "seed", "value"
TEXTS = "number", "name", "claim", "source", "protocol", "limits", "easy", "hard"
PACKAGES = "bn-jax", "jax", "flax", "optax", "numpy", "scipy"
# Of the test and the training part of the digits, for intervals about other data sets.
TESTED, TRAINED = 359, 1259


class Finished(NamedTuple):
    """The result of an experiment, and how long it took."""

    result: Result
    seconds: float


def write(
    experiment: Experiment, setting: Setting, folder: Path, finished: Finished
) -> dict[str, Any]:
    """Writes ``NAME.json`` and ``NAME.png``, and adds rows to `VALUES`.

    Args:
        experiment: the experiment.
        setting: the size of the run.
        folder: the folder to write into; created if it is missing.
        finished: what it has found.

    Returns:
        The contents of the JSON file.
    """
    result = finished.result
    findings = experiment.find(result)
    with staged(folder) as staging:
        path = staging / f"{experiment.name}.json"
        write_json(path, _as_json(experiment, setting, finished, findings))
        record: dict[str, Any] = json.loads(path.read_text())
        figures.save(experiment.draw, record, staging / f"{experiment.name}.png")
        rows = _rows(experiment, setting, findings, result)
        (staging / VALUES).write_text(_with_rows(folder, rows))
    return record


def _with_rows(folder: Path, rows: Iterator[tuple[Any, ...]]) -> str:
    """Returns the table of a folder with further rows."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    if (folder / VALUES).exists():
        text.write((folder / VALUES).read_text())
    else:
        table.writerow(COLUMNS)
    table.writerows(rows)
    return text.getvalue()


def _rows(
    experiment: Experiment, setting: Setting, findings: Sequence[Finding], result: Result
) -> Iterator[tuple[Any, ...]]:
    """Yields a row for every value: of the sub-claims' quantities, and of single arms."""
    quantities = (
        Series(finding.sub_claim.key, "", name, values)
        for finding in findings
        if finding.sub_claim.key in result.values
        for name, values in finding.values.items()
    )
    for key, arm, name, values in (*quantities, *result.series):
        for seed, value in zip(setting.chosen.tolist(), values, strict=False):
            yield experiment.name, key, arm, name, seed, float(value)


def without_results(experiment: Experiment) -> dict[str, Any]:
    """Returns the part of the JSON file that is known before anything runs."""
    texts = {name: getattr(experiment, name) for name in TEXTS}
    return texts | {"sub_claims": [_of_sub_claim(one) for one in experiment.sub_claims]}


def _as_json(
    experiment: Experiment, setting: Setting, finished: Finished, findings: list[Finding]
) -> dict[str, Any]:
    result = finished.result
    return {
        **{name: getattr(experiment, name) for name in TEXTS},
        "sub_claims": [_of_finding(finding) for finding in findings],
        "reported": {name: interval._asdict() for name, interval in result.reported.items()},
        "rates": {arm: rate._asdict() for arm, rate in result.rates.items()},
        "seeds": setting.chosen.tolist(),
        "quick": setting.quick,
        "seconds": round(finished.seconds, 1),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "platform": jax.default_backend(),
        "curves": result.curves,
    }


def _of_sub_claim(one: SubClaim) -> dict[str, Any]:
    return {
        "key": one.key,
        "label": one.label,
        "statement": one.statement,
        "quantity": one.quantity,
        "published": one.published.figure,
        "grade": one.published.grade,
        "bound": {"kind": type(one.bound).__name__.lower(), "text": str(one.bound)}
        | one.bound._asdict(),
        "reason": one.reason,
        "scale": one.scale,
    }


def _of_finding(finding: Finding) -> dict[str, Any]:
    return _of_sub_claim(finding.sub_claim) | {
        "verdict": finding.verdict,
        "blocks": list(finding.blocks),
        "agree": finding.agree,
        "decisive": finding.decisive[0],
        "settings": {
            name: {
                "verdict": judged.verdict,
                "measured": judged.measured._asdict(),
                "seeds_needed": describe_seeds(judged),
            }
            | _for_other_data(finding, name)
            for name, judged in finding.settings.items()
        },
    }


def _for_other_data(finding: Finding, name: str) -> dict[str, Any]:
    """Returns the wider interval of a quantity over random splits of the digits."""
    if not finding.sub_claim.is_resplit:
        return {}
    values = finding.values[name]
    if finding.sub_claim.scale == "difference":
        interval = corrected_interval(values, TESTED, TRAINED)
    else:
        interval = Interval(*map(math.exp, corrected_interval(np.log(values), TESTED, TRAINED)))
    return {"for_other_data": interval._asdict()}
