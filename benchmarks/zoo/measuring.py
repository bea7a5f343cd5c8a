"""All checks of one model."""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import jax

from benchmarks.zoo.checks import CHECKS
from benchmarks.zoo.flax_models import FLAX_MODELS
from benchmarks.zoo.other_models import OTHER_MODELS
from benchmarks.zoo.specimens import Entry, Specimen
from benchmarks.zoo.table import Cell, Row, expected_exception

MODELS: Mapping[str, Entry] = {**FLAX_MODELS, **OTHER_MODELS}


@cache
def specimen(name: str) -> Specimen:
    """Returns a model of the zoo, which is made once."""
    return MODELS[name].make()


def measure(name: str) -> Row:
    """Makes all checks of a model that it is expected to pass."""
    model = specimen(name)
    cells = {
        check: expected_exception(check, name, model.library) or Cell("pass", make(model))
        for check, make in CHECKS.items()
    }
    package = f"{model.package} {version(model.package)}"
    return Row(package, model.library, len(model.norms), cells)


def measure_alone(name: str) -> dict[str, Any]:
    """Returns `measure` as a tree for JSON, in a process that does nothing else."""
    # The time goes into compiling.
    jax.config.update("jax_disable_most_optimizations", True)
    row = measure(name)
    return {**row._asdict(), "cells": {check: cell._asdict() for check, cell in row.cells.items()}}
