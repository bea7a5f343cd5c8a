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

from bn_jax.lab.experiments import failures, figures
from bn_jax.lab.experiments.failures import Failed
from bn_jax.lab.experiments.labelled import Split
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
from bn_jax.lab.files.writing import staged, write_json

VALUES = "values.csv"
COLUMNS = "claim", "sub_claim", "arm", "setting", "seed", "value"
TEXTS = "number", "name", "claim", "source", "protocol", "limits", "easy", "hard"
PACKAGES = "bn-jax", "jax", "flax", "optax", "numpy", "scipy"


class Finished(NamedTuple):
    """The result of an experiment, how long it took, and what it printed."""

    result: Result
    seconds: float
    printed: str = ""


class Outcome(NamedTuple):
    """What became of an experiment.

    Attributes:
        record: the contents of its JSON file; None: it failed.
        failure: why it or its figure failed, in one line.
        warning: that it has printed something, in one line.
    """

    record: dict[str, Any] | None
    failure: str | None = None
    warning: str | None = None


def write(experiment: Experiment, setting: Setting, folder: Path, finished: Finished) -> Outcome:
    """Writes ``NAME.json`` and ``NAME.png``, and adds rows to `VALUES`.

    What the experiment has printed is in ``NAME.log``. If its figure cannot be drawn, the trace is
    there too.

    Args:
        experiment: the experiment.
        setting: the size of the run.
        folder: the folder to write into; created if it is missing.
        finished: what it has found.

    Returns:
        The contents of the JSON file, and what is to be said about it.
    """
    result = finished.result
    experiment = experiment.on(setting.data)
    findings = experiment.find(result)
    with staged(folder) as staging:
        path = staging / f"{experiment.name}.json"
        write_json(path, _as_json(experiment, setting, finished, findings))
        record: dict[str, Any] = json.loads(path.read_text())
        picture, printed = _draw(experiment, record)
        if not isinstance(picture, Failed):
            (staging / f"{experiment.name}.png").write_bytes(picture)
        rows = _rows(experiment, setting, findings, result)
        (staging / VALUES).write_text(_with_rows(folder, rows))
        log = folder / f"{experiment.name}.log"
        failure, printed = None, finished.printed + printed
        if isinstance(picture, Failed):
            failure = (
                f"{picture.message}; its figure is missing, its results are saved; "
                f"{_see_trace(experiment, log)}"
            )
            printed += picture.trace
        if printed:
            _write_log(staging / log.name, printed)
    return Outcome(record, failure, _describe_printed(experiment, finished.printed, log))


def write_failure(experiment: Experiment, folder: Path, failed: Failed) -> Outcome:
    """Writes ``NAME.log`` with the trace of an experiment that failed, and what it had printed.

    Args:
        experiment: the experiment.
        folder: the folder to write into; created if it is missing.
        failed: why.

    Returns:
        What is to be said about it.
    """
    log = folder / f"{experiment.name}.log"
    with staged(folder) as staging:
        _write_log(staging / log.name, failed.printed + failed.trace or f"{failed.message}\n")
    return Outcome(None, f"{failed.message}; {_see_trace(experiment, log)}")


def _write_log(path: Path, text: str) -> None:
    # A claim can print what no encoding has.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _see_trace(experiment: Experiment, log: Path) -> str:
    return f"the claim {experiment.name} failed, the whole trace is in {log}"


def _describe_printed(experiment: Experiment, printed: str, log: Path) -> str | None:
    lines = len(printed.splitlines())
    if not lines:
        return None
    what = "a line" if lines == 1 else f"{lines:,} lines"
    return f"the claim {experiment.name} printed {what}, which {log} has"


def _draw(experiment: Experiment, record: dict[str, Any]) -> tuple[bytes | Failed, str]:
    """Returns the figure, or why there is none, and what was printed in drawing it."""
    with failures.kept() as printed:
        try:
            return figures.render(experiment.draw, record), printed.getvalue()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failed = failures.describe(error, failures.file_of(experiment.draw))
            return failed, printed.getvalue()


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
        # Which data the figures are about; a claim without exchangeable data has none.
        "data": None if experiment.data is None else setting.labelled.describe(),
        "sub_claims": [
            _of_finding(finding, _split_of(finding, setting, result)) for finding in findings
        ],
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


def _split_of(finding: Finding, setting: Setting, result: Result) -> Split | None:
    """Returns how many examples the trials of a sub-claim have, if they are random splits."""
    if not finding.sub_claim.is_resplit:
        return None
    return result.splits.get(finding.sub_claim.key) or setting.labelled.split


def _of_finding(finding: Finding, split: Split | None) -> dict[str, Any]:
    return _of_sub_claim(finding.sub_claim) | {
        "verdict": finding.verdict,
        "blocks": list(finding.blocks),
        "agree": finding.agree,
        "decisive": finding.decisive[0],
        "split": None if split is None else split._asdict(),
        "settings": {
            name: {
                "verdict": judged.verdict,
                "measured": judged.measured._asdict(),
                "seeds_needed": describe_seeds(judged),
            }
            | _for_other_data(finding, name, split)
            for name, judged in finding.settings.items()
        },
    }


def _for_other_data(finding: Finding, name: str, split: Split | None) -> dict[str, Any]:
    """Returns the wider interval of a quantity over random splits of one data set."""
    if split is None:
        return {}
    values, sizes = finding.values[name], (split.tested, split.trained)
    if finding.sub_claim.scale == "difference":
        interval = corrected_interval(values, *sizes)
    else:
        # What is not positive is no measurement.
        with np.errstate(divide="ignore", invalid="ignore"):
            interval = Interval(*map(math.exp, corrected_interval(np.log(values), *sizes)))
    return {"for_other_data": interval._asdict()}
