"""Claims from elsewhere: from a file, and from installed packages.

A file defines ``EXPERIMENT``, a `verdicts.Experiment`. A package names one by an entry point:

.. code-block:: toml

    [project.entry-points."bn_jax.claims"]
    my_claim = "my_package.my_claim:EXPERIMENT"
"""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bn_jax.lab.experiments import EXPERIMENTS, failures
from bn_jax.lab.experiments.checking import check_experiment
from bn_jax.lab.experiments.verdicts import Experiment

GROUP = "bn_jax.claims"
MODULE = "bn_jax_claim_"

_of_files: dict[Path, Experiment] = {}
_numbers: dict[Path, int] = {}


class Known(NamedTuple):
    """All claims.

    Attributes:
        claims: by name, those of this package first.
        broken: by the name of an entry point, why it names no claim, in one line.
    """

    claims: Mapping[str, Experiment]
    broken: Mapping[str, str]


def known() -> Known:
    """Returns the claims of this package, and those that installed packages add."""
    claims, broken = dict(EXPERIMENTS), {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        where = f"the claim {entry.value} of an installed package"
        try:
            experiment = check_experiment(entry.load())
            if experiment.name in claims:
                raise ValueError(f"name is {experiment.name!r}, as of another claim; rename it")
            claims[experiment.name] = experiment
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            spec = _spec(entry.module)
            failed = failures.describe(error, spec)
            broken[entry.name] = (
                f"{where} cannot be loaded ({failed.message}); mend or uninstall the package"
            )
    return Known(claims, broken)


def _spec(module: str) -> str | None:
    """Returns the path of a module of an installed package, if it has one."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return None if spec is None else spec.origin


def load_file(path: Path) -> Experiment:
    """Runs a file, and returns the claim that it defines.

    Args:
        path: a Python file with ``EXPERIMENT``.

    Raises:
        ValueError: the file is missing, raises an exception or ends the process, or defines no
            claim.
    """
    whole = Path(os.path.abspath(path))
    # Two files in different folders may have the same name.
    name = f"{MODULE}{_numbers.setdefault(whole, len(_numbers))}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path} is no Python file; give the path of one that defines EXPERIMENT")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        del sys.modules[name]
        raise ValueError(f"{failures.describe(error, str(path)).message}; mend it") from error
    if not hasattr(module, "EXPERIMENT"):
        raise ValueError(f"{path} defines no EXPERIMENT, expected a bn_jax.lab Experiment; add it")
    try:
        experiment = check_experiment(module.EXPERIMENT)
    except ValueError as error:
        raise ValueError(f"{path}: EXPERIMENT: {error}") from error
    _of_files[whole] = experiment
    return experiment


def path_of(experiment: Experiment) -> Path | None:
    """Returns the absolute path of the file that `load_file` has read a claim from, if any."""
    return next((path for path, loaded in _of_files.items() if loaded is experiment), None)
