"""Docstrings in the reference: names in single backticks as links, and sections that fit."""

import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
from flax import nnx
from public_names import comment_of, names_in
from signatures import readable, shorten, signature_of
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

# Text in single backticks that is no part of a literal, a role or a link.
IN_BACKTICKS = re.compile(r"(?<![`:\w])`([^`\n<>]+)`(?![`_])")
# The docstring of a constant or property is prose, of which napoleon takes what is before a colon
# for a type. Here it is kept meanwhile, by the name of the object.
_before_napoleon: dict[str, list[str]] = {}


# All public names, found once.
_names: set[str] = set()


def find_names(app: Sphinx) -> None:
    """Before anything is read: the names that docstrings can link to."""
    _names.clear()
    _names.update(names_in(app.config.public_modules))


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
    for position, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[position] = IN_BACKTICKS.sub(
                lambda found: link(found[1], name, own, _names, app.config.public_modules), line
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


def setup(app: Sphinx) -> ExtensionMetadata:
    """Called by Sphinx."""
    app.setup_extension("public_names")
    app.connect("builder-inited", find_names)
    # Before and after napoleon, which has the priority 500.
    app.connect("autodoc-process-docstring", process_docstring, priority=400)
    app.connect("autodoc-process-docstring", process_types, priority=600)
    app.connect("autodoc-skip-member", skip_member)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
