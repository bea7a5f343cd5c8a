"""The API reference: links and types of docstrings, and a check that no public name is missing.

A public name is one that a module in ``public_modules`` of conf.py lists in its `__all__`. The
reference documents it under this name, although most of them are defined in private modules.
"""

import builtins
import collections.abc
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import flax.typing
from docutils import nodes
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata, stringify_annotation

logger = logging.getLogger(__name__)

# The build needs no network, so that types of these packages are text instead of links.
EXTERNAL = {
    *("Figure", "Image", "PIL", "collections", "flax", "jax", "matplotlib", "nn", "nnx", "np"),
    *("numpy", "optax", "os", "pathlib"),
}
# Type variables have no entry anywhere.
TYPE_VARIABLES = {"M", "P", "R", "Tree"}

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


# --- docstrings ---------------------------------------------------------------------------------

# Text in single backticks that is no part of a literal, a role or a link.
IN_BACKTICKS = re.compile(r"(?<![`:\w])`([^`\n<>]+)`(?![`_])")
# The docstring of a constant or property is prose, of which napoleon takes what is before a colon
# for a type. Here it is kept meanwhile, by the name of the object.
_before_napoleon: dict[str, list[str]] = {}


def process_docstring(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Before napoleon: sections that fit the kind of object, and links for names in backticks."""
    if what in ("data", "type"):
        lines[:] = comment_of(name, obj) or lines
    if inspect.isclass(obj):
        if issubclass(obj, nn.Module):
            # Linen makes the arguments of the constructor of them.
            lines[:] = ["Args:" if line == "Attributes:" else line for line in lines]
        elif "Attributes:" not in lines:
            lines.extend(["", *list_fields(obj)])
    own = parameters_of(obj)
    names = set(names_in(app.config.public_modules))
    for position, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[position] = IN_BACKTICKS.sub(
                lambda found: link(found[1], name, own, names, app.config.public_modules), line
            )
    if what in ("attribute", "data", "property", "type"):
        _before_napoleon[name] = [*lines]


def link(text: str, inside: str, own: set[str], names: set[str], modules: list[str]) -> str:
    """Returns reStructuredText for `text`: a link if it is a public name, a literal otherwise.

    Args:
        text: what is in backticks.
        inside: the full name of the object whose docstring it is in.
        own: names of its parameters, which come before public names.
        names: all public names.
        modules: all public modules.
    """
    called = text.removesuffix("()")
    if called not in own:
        scopes = inside.split(".")
        candidates = [called, *(".".join([*scopes[:end], called]) for end in (3, 2, 1))]
        for found in candidates:
            if found != inside and (found in names or found in modules):
                return f":py:obj:`{text} <{found}>`"
        if called.startswith("bn_jax."):
            # Either a member of a class, or a mistake, which Sphinx reports.
            return f":py:obj:`{text} <{called}>`"
    return f"``{text}``"


def parameters_of(obj: Any) -> set[str]:
    """Returns the names of the parameters of a function or class."""
    if not callable(obj):
        return set()
    try:
        return set(signature_of(obj).parameters)
    except (TypeError, ValueError):
        return set()


def list_fields(record: type) -> Iterator[str]:
    """Yields an attribute directive for each field of a record, whose docstring lists none."""
    is_record = (
        typing.is_typeddict(record)
        or hasattr(record, "_fields")
        or hasattr(record, "__dataclass_fields__")
    )
    if is_record and not issubclass(record, nnx.Module):
        for field, annotation in inspect.get_annotations(record).items():
            if not field.startswith("_"):
                yield from (f".. attribute:: {field}", f"   :type: {readable(annotation)}", "")


def process_types(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """After napoleon: types beside the names of attributes, and none that it made of prose."""
    lines[:] = _before_napoleon.pop(name, lines)
    attribute = 0
    for position, line in enumerate(lines):
        if line.startswith(".. attribute:: "):
            attribute = position
        elif line.startswith("   :type: ") and position > attribute + 1:
            # From the end of the description to the options of the directive.
            lines[position] = ""
            lines[attribute] += f"\n   :type: {shorten(line.removeprefix('   :type: '))}"
    lines[:] = "\n".join(lines).split("\n")


def skip_member(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leaves out the fields of a NamedTuple, which its docstring describes."""
    is_field = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    return True if is_field else None


# --- signatures and types -----------------------------------------------------------------------


def signature_of(obj: Any) -> inspect.Signature:
    """Returns the signature as users call it.

    The metaclass of NNX hides that of `__init__`. Linen adds `parent` and `name` to all modules.
    """
    if inspect.isclass(obj) and issubclass(obj, nnx.Module):
        found = inspect.signature(obj.__init__)
        return found.replace(parameters=[*found.parameters.values()][1:])
    found = inspect.signature(obj)
    if inspect.isclass(obj) and issubclass(obj, nn.Module):
        ours = [each for name, each in found.parameters.items() if name not in ("parent", "name")]
        return found.replace(parameters=ours)
    return found


def process_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, args: str | None, returned: Any
) -> tuple[str, None] | None:
    """Writes the signature without types, and the types as users write them, for the fields."""
    if args is None or what not in ("class", "function", "method"):
        return None
    try:
        found = signature_of(obj)
    except (TypeError, ValueError):
        return None
    if what == "class" and typing.is_typeddict(obj):
        return "", None
    annotations = {
        each.name: readable(each.annotation)
        for each in found.parameters.values()
        if each.annotation is not each.empty
    }
    if found.return_annotation is not found.empty and what != "class":
        annotations["return"] = readable(found.return_annotation)
    app.env.current_document.autodoc_annotations[name] = annotations
    shown = [
        each.replace(annotation=each.empty, default=as_written(each.default))
        for each in found.parameters.values()
    ]
    if what == "method" and shown and shown[0].name == "self":
        shown = shown[1:]
    return str(inspect.Signature(shown)), None


class _Written:
    """A default with the text that the source has for it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def as_written(default: Any) -> Any:
    """Returns what prints as the default in the source; a plain `repr` may hold an address."""
    if default is inspect.Parameter.empty:
        return default
    if callable(default) and hasattr(default, "__name__"):
        return _Written(default.__name__)
    text = re.sub(r"^mappingproxy\((.*)\)$", r"\1", repr(default))
    return _Written("..." if " at 0x" in text or text.startswith("<") else text)


def readable(annotation: Any) -> str:
    """Returns an annotation as a user would write it."""
    return shorten(stringify_annotation(annotation, "fully-qualified-except-typing"))


# An annotation is a value when it gets here, so that an alias has become what it stands for.
_ALIASES = {
    stringify_annotation(flax.typing.Dtype): "DTypeLike",
    stringify_annotation(DTypeLike): "DTypeLike",
    stringify_annotation(ArrayLike): "ArrayLike",
    stringify_annotation(flax.typing.Initializer): "Initializer",
    "jaxlib._jax.Sharding": "jax.sharding.Sharding",
    "jax.jaxlib._jax.": "jax.",
    "jaxlib._jax.": "jax.",
    "jax._src.sharding_impls.": "jax.sharding.",
    "jax._src.mesh.": "jax.sharding.",
    "jax._src.": "jax.",
    "flax.linen.module.": "flax.linen.",
    "flax.nnx.module.": "flax.nnx.",
    "flax.nnx.rnglib.": "flax.nnx.",
    "flax.nnx.statelib.": "flax.nnx.",
    "flax.nnx.variablelib.": "flax.nnx.",
    "PIL.Image.Image": "PIL.Image",
}
_ND_ARRAY = re.compile(r"numpy\.ndarray\[tuple\[(?:Any|int), \.\.\.\], numpy\.dtype\[([\w.]+)\]\]")
# Where other packages define what they export one level up.
_PRIVATE = re.compile(r"\b(?!bn_jax)(\w+(?:\.[a-z]\w*)*)\._\w+(?:\.\w+)*\.(?=[A-Z])")
# A type's name says what it is without these modules.
_TOLD_BY_NAME = re.compile(
    r"\b(?:collections\.abc|datetime|flax\.typing|pathlib|types|typing)\.(?=[A-Z])"
)


def shorten(annotation: str) -> str:
    """Returns the text of an annotation with the names that users know."""
    for private, public in _ALIASES.items():
        annotation = annotation.replace(private, public)
    annotation = annotation.replace("[[...]", "[...")
    annotation = _ND_ARRAY.sub(r"NDArray[\1]", annotation)
    annotation = _PRIVATE.sub(r"\1.", annotation)
    annotation = re.sub(r"\bbn_jax(?:\.\w+)+", lambda found: _public_name(found[0]), annotation)
    return _TOLD_BY_NAME.sub("", annotation)


def _public_name(private: str) -> str:
    """Returns the shortest public name of a class that is named by where it is defined."""
    module, _, name = private.rpartition(".")
    if name in TYPE_VARIABLES:
        return name
    parents = module.split(".")
    for end in range(1, len(parents) + 1):
        parent = ".".join(parents[:end])
        if "._" in parent:
            break
        # Looking a name up in an old module would warn that it has moved.
        if name in getattr(importlib.import_module(parent), "__all__", ()):
            return f"{parent}.{name}"
    return private


# --- a whole module -----------------------------------------------------------------------------


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


# --- links and coverage -------------------------------------------------------------------------

_BARE = {*dir(builtins), *dir(typing), *dir(collections.abc), *_ALIASES.values(), *TYPE_VARIABLES}
_BARE |= {"NDArray", "Path", "PromoteDtypeFn", "TraceContextError"}


def resolve_external(
    app: Sphinx, env: BuildEnvironment, node: nodes.Element, content: nodes.Element
) -> nodes.Element | None:
    """Makes types of Python and of other packages text, since nothing here links to them."""
    target = node.get("reftarget", "").lstrip("~")
    if node.get("refdomain") == "py" and (
        target.partition(".")[0] in EXTERNAL
        or target in _BARE
        or target.rpartition(".")[2] in TYPE_VARIABLES
    ):
        return content
    return None


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
    # autosummary and napoleon have the priority 500.
    app.connect("builder-inited", remove_old_stubs, priority=400)
    app.connect("autodoc-process-docstring", process_docstring, priority=400)
    app.connect("autodoc-process-docstring", process_types, priority=600)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("missing-reference", resolve_external)
    app.connect("env-check-consistency", check_coverage)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
