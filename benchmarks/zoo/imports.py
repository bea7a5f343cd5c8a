"""Imports of packages that want more than their models need, or an older JAX.

A stand-in takes the place of a module whose names are used only in annotations, as base classes or
in code that the zoo does not call. So sbx-rl and jaxnn are imported without PyTorch.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import jax

# What each package imports beside JAX, Flax and what is installed with them.
UNUSED = {
    "jaxnn": ("PIL", "huggingface_hub", "torch", "torchvision"),
    "sbx": ("gymnasium", "stable_baselines3", "tensorflow_probability", "torch"),
}


def load(name: str) -> Any:
    """Imports a module of one of the packages."""
    # Keras reads it when it is imported.
    os.environ.setdefault("KERAS_BACKEND", "jax")
    with _stand_ins(UNUSED.get(name.split(".")[0], ())), _names_of_older_versions():
        return import_module(name)


@contextmanager
def _names_of_older_versions() -> Iterator[None]:
    """Gives JAX back `jax.random.KeyArray`, which flaim 0.0.5 has in annotations."""
    if hasattr(jax.random, "KeyArray"):
        yield
        return
    setattr(jax.random, "KeyArray", jax.Array)  # noqa: B010
    try:
        yield
    finally:
        delattr(jax.random, "KeyArray")


@contextmanager
def _stand_ins(roots: tuple[str, ...]) -> Iterator[None]:
    finder = _Finder(roots)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        # Nobody else may take them for the real modules.
        for name in finder.made:
            sys.modules.pop(name, None)


class _AnyName(type):
    """A class with any attribute."""

    def __getattr__(cls, name: str) -> Any:
        return _any_name(name)


def _any_name(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _AnyName(name, (), {})


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _any_name(name)


class _Finder(MetaPathFinder, Loader):
    def __init__(self, roots: tuple[str, ...]) -> None:
        self.roots = roots
        self.made: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        is_unused = name.split(".")[0] in self.roots
        return ModuleSpec(name, self, is_package=True) if is_unused else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self.made.append(spec.name)
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
