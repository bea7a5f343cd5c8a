"""The API reference: which names it must hold, a directive for whole modules, and a check.

A public name is one that a module in ``public_modules`` of conf.py lists in its `__all__`. The
reference documents it under this name, although most of them are defined in private modules.
"""

import importlib
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

logger = logging.getLogger(__name__)

# --- which names there are ----------------------------------------------------------------------


def names_in(modules: Iterable[str]) -> list[str]:
    """Returns the full names of what modules export, but for other modules.

    A function or class that two modules export is named by the first, as `bn_jax.remat_policy`.
    """
    found: dict[str, Any] = {}
    for module in modules:
        for attribute in importlib.import_module(module).__all__:
            value = value_of(f"{module}.{attribute}")
            is_named = (inspect.isroutine(value) or inspect.isclass(value)) and any(
                value is other for other in found.values()
            )
            if not is_named and not isinstance(value, ModuleType):
                found[f"{module}.{attribute}"] = value
    return [*found]


def value_of(name: str) -> Any:
    """Returns the object with a full name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def file_names(modules: Iterable[str]) -> dict[str, str]:
    """Returns the files of names that another one equals but for its case, as Moments and moments.

    On a file system that ignores case, one page would overwrite the other. Lower case sorts last,
    so that functions keep their names.
    """
    taken: set[str] = set()
    renamed = {}
    for name in sorted(names_in(modules), reverse=True):
        if name.lower() in taken:
            renamed[name] = f"{name}-class"
        taken.add(name.lower())
    return renamed


def docstring_of(name: str) -> str:
    """Returns what the source says about a name; "" for what Python or a base class says."""
    value = value_of(name)
    if inspect.isclass(value) or inspect.isroutine(value):
        written = value.__doc__ or ""
        # What Python writes for a NamedTuple or a dataclass without a docstring.
        return "" if written.startswith(f"{value.__name__}(") else written
    return "\n".join(comment_of(name, value))


def comment_of(name: str, value: Any) -> list[str]:
    """Returns the lines after the assignment of a constant, in whichever module of its package."""
    package, attribute = name.partition(".")[0], name.rpartition(".")[2]
    for module in [*sys.modules]:
        is_inside = module == package or module.startswith(f"{package}.")
        if is_inside and vars(sys.modules[module]).get(attribute) is value:
            comments = ModuleAnalyzer.for_module(module).find_attr_docs()
            if ("", attribute) in comments:
                return comments["", attribute]
    return []


# --- what the reference holds -------------------------------------------------------------------


class PublicNames(SphinxDirective):
    """Documents a module, and each name of its `__all__` or, for other modules, of the content."""

    has_content = True
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Returns the nodes of the directives of autodoc."""
        module = self.arguments[0]
        lines = [] if self.content else [f".. automodule:: {module}", ""]
        for name in self.content or importlib.import_module(module).__all__:
            lines.extend([*_directive_for(f"{module}.{name}"), ""])
        return self.parse_text_to_nodes("\n".join(lines), offset=self.content_offset)


def _directive_for(name: str) -> list[str]:
    value = value_of(name)
    if inspect.isclass(value):
        kind = "exception" if issubclass(value, BaseException) else "class"
        return [f".. auto{kind}:: {name}", "   :members:", "   :special-members: __call__"]
    if inspect.isroutine(value):
        return [f".. autofunction:: {name}"]
    return [f".. autodata:: {name}", "   :no-value:"]


def remove_old_stubs(app: Sphinx) -> None:
    """Removes the pages that autosummary has written for names that are public no more."""
    files: dict[str, str] = app.config.autosummary_filename_map
    names = {files.get(name, name) for name in names_in(app.config.public_modules)}
    for page in Path(app.srcdir).glob("reference/generated/*.rst"):
        if page.stem not in names:
            page.unlink()


def check_coverage(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns of every public name without an entry in the reference, or without a docstring."""
    documented = env.domains.python_domain.objects
    modules = app.config.public_modules
    for name in [*modules, *names_in(modules)]:
        if name not in documented:
            logger.warning("%s is public, and not in the reference", name)
        elif name not in modules and name != "bn_jax.__version__" and not docstring_of(name):
            logger.warning("%s is public, and has no docstring", name)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Called by Sphinx."""
    app.setup_extension("sphinx.ext.autosummary")
    app.add_directive("public-names", PublicNames)
    app.add_config_value("public_modules", [], "env", list)
    # Before autosummary, which has the priority 500.
    app.connect("builder-inited", remove_old_stubs, priority=400)
    app.connect("env-check-consistency", check_coverage)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
