"""Signatures as users call them, and types by the names that users import."""

import builtins
import collections.abc
import importlib
import inspect
import re
import typing
from typing import Any

import flax.linen as nn
import flax.typing
from docutils import nodes
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.typing import ExtensionMetadata, stringify_annotation

# The build needs no network, so that types of these packages are text instead of links.
EXTERNAL = {
    *(
        "Axes",
        "Figure",
        "Image",
        "PIL",
        "collections",
        "flax",
        "jax",
        "matplotlib",
        "nn",
        "nnx",
        "np",
    ),
    *("numpy", "optax", "os", "pathlib"),
}
# Type variables have no entry anywhere.
TYPE_VARIABLES = {"M", "P", "R", "Tree"}


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


def setup(app: Sphinx) -> ExtensionMetadata:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", process_signature)
    app.connect("missing-reference", resolve_external)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
