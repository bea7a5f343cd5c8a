"""Names that have moved: the old name works for one more release, and warns with the new name.

New names are text, because files below `bn_jax.lab` import nothing from it.
"""

import importlib
import pkgutil
import sys
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any


def stand_in(old: str, new: str) -> None:
    """Puts a module, with all of its submodules, in the place of the old one that calls this.

    Args:
        old: the name of the old module, `__name__` where this is called.
        new: the name of the new module.
    """
    # Whoever imports the old module: Python skips the frames of the import itself.
    _warn(old, new, stacklevel=4)
    sys.modules[old] = module = importlib.import_module(new)
    for name in _submodules(module):
        # Python would otherwise load the same file a second time, under the old name.
        sys.modules[f"{old}.{name}"] = importlib.import_module(f"{new}.{name}")


def _submodules(module: ModuleType) -> list[str]:
    return [found.name for found in pkgutil.iter_modules(getattr(module, "__path__", []))]


def attribute(module: str, name: str, moved: Mapping[str, str]) -> Any:
    """Serves as the `__getattr__` of a module some of whose attributes have moved.

    Args:
        module: the name of the module.
        name: the attribute asked for.
        moved: the modules in which the moved attributes are now, by attribute.

    Returns:
        The attribute, after a `DeprecationWarning`.

    Raises:
        AttributeError: it is none of those that moved.
    """
    if name not in moved:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(f"{module}.{name}", f"{moved[name]}.{name}", stacklevel=4)
    return getattr(importlib.import_module(moved[name]), name)


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(
        f"{old} has moved to {new}, and the old name will be removed in the next release",
        DeprecationWarning,
        stacklevel,
    )
