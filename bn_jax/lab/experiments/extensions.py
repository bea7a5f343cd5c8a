"""Claims from elsewhere: from a file, and from installed packages.

A file defines ``EXPERIMENT``, a `verdicts.Experiment`. A package names one by an entry point:

.. code-block:: toml

    [project.entry-points."bn_jax.claims"]
    my_claim = "my_package.my_claim:EXPERIMENT"
"""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

from bn_jax.lab.experiments import EXPERIMENTS
from bn_jax.lab.experiments.verdicts import Experiment

GROUP = "bn_jax.claims"
MODULE = "bn_jax_claim_"


def known() -> Mapping[str, Experiment]:
    """Returns the claims of this package, and those that installed packages add, by name.

    Raises:
        ValueError: an entry point is no experiment, or has the name of another.
    """
    claims = dict(EXPERIMENTS)
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            experiment = entry.load()
        except Exception as error:
            raise ValueError(
                f"the claim {entry.value} of an installed package cannot be loaded "
                f"({type(error).__name__}: {error}); mend or uninstall the package"
            ) from error
        _check(experiment, f"the entry point {entry.value}")
        if experiment.name in claims:
            raise ValueError(
                f"the entry point {entry.value} names its claim {experiment.name!r}, as another "
                "claim is named; rename it"
            )
        claims[experiment.name] = experiment
    return claims


def load_file(path: Path) -> Experiment:
    """Runs a file, and returns the claim that it defines.

    The module stays in `sys.modules`, so that other processes that load the same file can
    exchange its objects with this one.

    Args:
        path: a Python file with ``EXPERIMENT``.

    Raises:
        ValueError: the file is missing, raises an exception, or defines no experiment.
    """
    name = f"{MODULE}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path} is no Python file; give the path of one that defines EXPERIMENT")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} raises {type(error).__name__}: {error}; mend it") from error
    if not hasattr(module, "EXPERIMENT"):
        raise ValueError(f"{path} defines no EXPERIMENT, expected a bn_jax.lab Experiment; add it")
    experiment: Experiment = module.EXPERIMENT
    _check(experiment, f"EXPERIMENT in {path}")
    return experiment


def loaded_files() -> list[Path]:
    """Returns the files that `load_file` has run in this process."""
    modules = [module for name, module in sys.modules.items() if name.startswith(MODULE)]
    return [Path(str(module.__file__)) for module in modules]


def _check(experiment: object, where: str) -> None:
    if not isinstance(experiment, Experiment):
        raise ValueError(
            f"{where} is of type {type(experiment).__name__}, expected "
            "bn_jax.lab.experiments.verdicts.Experiment; make one"
        )
