"""What a claim and its result must be, so that a mistake in either is said where it was made."""

import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from bn_jax.lab.experiments.labelled import Needs, Split
from bn_jax.lab.experiments.statistics import Interval
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    ChosenRate,
    Experiment,
    Identity,
    NotTestable,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
    Within,
)
from bn_jax.lab.files.writing import to_json

BOUNDS = Identity, Above, Below, Within, NotTestable
TEXTS = "name", "claim", "source", "protocol", "limits", "easy", "hard"
SCALES = "difference", "ratio"
GRADES = "V", "R", "D", ""
# Files of their own in the folder of results, and a word of the command line.
RESERVED = "forest", "values", "all"
LONGEST_LABEL = 24

Kind = TypeVar("Kind")


def check_experiment(experiment: Any) -> Experiment:
    """Checks a claim.

    Args:
        experiment: the claim.

    Returns:
        The claim, with its sub-claims as a tuple.

    Raises:
        ValueError: a field is not as `Experiment` says.
    """
    experiment = _of_kind(experiment, "it", Experiment)
    for name in TEXTS:
        _text(getattr(experiment, name), name)
    if not re.fullmatch(r"\w[\w-]*", experiment.name) or experiment.name in RESERVED:
        raise ValueError(
            f"name is {experiment.name!r}, expected letters, digits, _ and -, and none of "
            f"{', '.join(RESERVED)}; rename it"
        )
    _of_kind(experiment.number, "number", int)
    for name in ("run", "draw"):
        if not callable(getattr(experiment, name)):
            raise ValueError(f"{name} is {getattr(experiment, name)!r}, expected a function")
    if experiment.data is not None:
        _of_kind(experiment.data, "data", Needs)
    ones = _of_kind(experiment.sub_claims, "sub_claims", tuple | list)
    if not ones:
        raise ValueError("sub_claims is empty, expected a SubClaim or more; write what is claimed")
    for place, one in enumerate(ones):
        _check_sub_claim(_of_kind(one, f"sub_claims[{place}]", SubClaim))
    keys = [one.key for one in ones]
    if len(set(keys)) < len(keys):
        raise ValueError(f"sub_claims have the keys {', '.join(keys)}, expected different ones")
    return experiment._replace(sub_claims=tuple(ones))


def _check_sub_claim(one: SubClaim) -> None:
    of = f"of {one.key!r}"
    for name in ("key", "label", "statement", "quantity", "reason"):
        _text(getattr(one, name), f"{name} {of}")
    if not 0 < len(one.label) <= LONGEST_LABEL:
        raise ValueError(
            f"label {of} has {len(one.label)} characters, expected 1 to {LONGEST_LABEL}; shorten it"
        )
    if not isinstance(one.bound, BOUNDS):
        names = ", ".join(bound.__name__ for bound in BOUNDS)
        raise ValueError(f"bound {of} is {one.bound!r}, expected one of {names}; make one")
    if one.scale not in SCALES:
        raise ValueError(f"scale {of} is {one.scale!r}, expected one of {', '.join(SCALES)}")
    _of_kind(one.published, f"published {of}", Published)
    _text(one.published.figure, f"published figure {of}")
    if one.published.grade not in GRADES:
        raise ValueError(f"grade {of} is {one.published.grade!r}, expected V, R, D or nothing")
    if not isinstance(one.bound, NotTestable):
        _check_figures(one, of)


def _check_figures(one: SubClaim, of: str) -> None:
    """Checks the figures of a bound."""
    for name, figure in one.bound._asdict().items():
        if figure is None and name in ("size", "matters"):
            continue
        is_number = isinstance(figure, numbers.Real) and math.isfinite(figure)
        if not is_number or (one.scale == "ratio" and figure <= 0):
            expected = "a positive number" if one.scale == "ratio" else "a finite number"
            raise ValueError(f"{name} {of} is {figure!r}, expected {expected}")
    if isinstance(one.bound, Within) and one.bound.low >= one.bound.high:
        raise ValueError(f"low {of} is {one.bound.low}, expected less than {one.bound.high}")


def check_result(experiment: Experiment, setting: Setting, result: Any) -> Result:
    """Checks what a claim has returned.

    Args:
        experiment: the claim.
        setting: of the run.
        result: what `run` has returned.

    Returns:
        The result with values as float64 arrays, and with curves as JSON holds them.

    Raises:
        ValueError: a field is not as `Result` says.
    """
    result = _of_kind(result, "what run returns", Result)
    keys = [one.key for one in experiment.sub_claims]

    def check_key(key: Any, name: str) -> None:
        if key not in keys:
            raise ValueError(f"{name} has the key {key!r}, expected keys among {', '.join(keys)}")

    def array(values: Any, name: str) -> Any:
        return _check_values(values, name, setting.seeds)

    values: dict[str, Any] = {}
    for key, given in _of_kind(result.values, "values", Mapping).items():
        check_key(key, "values")
        name = f"values[{key!r}]"
        if isinstance(given, Mapping):
            if not given:
                raise ValueError(f"{name} is {given!r}, expected arrays by the names of settings")
            for one in given:
                _text(one, f"the setting {one!r} of {name}")
            values[key] = {one: array(x, f"{name}[{one!r}]") for one, x in given.items()}
        else:
            values[key] = array(given, name)
    series = []
    for place, one in enumerate(_of_kind(result.series, "series", Sequence)):
        name = f"series[{place}]"
        _of_kind(one, name, Series)
        check_key(one.key, name)
        _text(one.arm, f"arm of {name}")
        _text(one.setting, f"setting of {name}")
        series.append(one._replace(values=array(one.values, f"values of {name}")))
    for field, kind in (("reported", Interval), ("rates", ChosenRate), ("splits", Split)):
        for key, one in _of_kind(getattr(result, field), field, Mapping).items():
            _of_kind(one, f"{field}[{key!r}]", kind)
            _to_json(one._asdict(), f"{field}[{key!r}]")
    for key in result.splits:
        check_key(key, "splits")
    curves = _to_json(_of_kind(result.curves, "curves", Mapping), "curves")
    return result._replace(values=values, series=series, curves=curves)


def _check_values(values: Any, name: str, seeds: int) -> Any:
    expected = f"{seeds} real numbers, one for each seed"
    try:
        found = np.asarray(values)
        if found.dtype.kind not in "biuf":
            found = found.astype(np.float64, casting="safe")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is no array of numbers ({error}), expected {expected}") from error
    if found.shape != (seeds,):
        raise ValueError(f"{name} has the shape {found.shape}, expected {expected}")
    return found.astype(np.float64)


def _to_json(value: Any, name: str) -> Any:
    try:
        return json.loads(to_json(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be written as JSON ({error}), expected numbers, texts, lists, arrays "
            "and mappings of them by text"
        ) from error


def _text(value: Any, name: str) -> None:
    """Raises a ValueError if a value is no text that a file can hold."""
    _of_kind(value, name, str).encode()


def _of_kind(value: Any, name: str, kind: Any) -> Any:
    """Returns a value, or raises a ValueError if it is of another kind."""
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    expected = " or ".join(one.__name__ for one in getattr(kind, "__args__", (kind,)))
    raise ValueError(f"{name} is of type {type(value).__name__}, expected {expected}")
