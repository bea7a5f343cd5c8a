"""The `bn-jax` command and what it needs: data, models, the training loop, runs, experiments.

Importing it imports nothing else, so that the command starts at once; its modules are imported when
they are first used.
"""

from importlib import import_module
from types import ModuleType

__all__ = [
    "checkpoints",
    "data",
    "experiments",
    "figures",
    "fitting",
    "images",
    "models",
    "prediction",
    "processes",
    "runs",
    "trainer",
]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
