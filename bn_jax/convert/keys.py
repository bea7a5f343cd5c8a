"""Where each array of a Flax model is found in another library: the key of every leaf."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from flax import nnx

from bn_jax._paths import format_path, matches_whole
from bn_jax.convert.arrays import variables_of
from bn_jax.convert.layouts import Layout

Names: TypeAlias = Mapping[str, str] | Callable[[str], str] | None
Globs: TypeAlias = str | Iterable[str]


class Leaf(NamedTuple):
    """An array of a Flax model, and its place in another library."""

    path: str  # where it is in Flax
    shape: tuple[int, ...]  # its shape in Flax
    dtype: np.dtype[Any]  # its dtype in Flax
    name: str  # its name in Flax, the last part of the path
    layer: str  # the path of its layer in the other library
    key: str  # its key in the other library
    is_transposed: bool  # whether it is the kernel of a transposed convolution
    is_count: bool  # whether it counts the batches of a cumulative average

    @property
    def is_kernel(self) -> bool:
        """Whether the order of its axes depends on the library."""
        return self.name == "kernel" and len(self.shape) > 1


class _Named(NamedTuple):
    """A leaf of a Flax model with its path, the path of its layer, and its name there."""

    path: str
    layer: str
    name: str
    array: Any


def leaves_of(variables: Any, layout: Layout, names: Names, transposed: Globs | None) -> list[Leaf]:
    """Returns the leaves of a model with their keys, in the order of the tree."""
    named = _named_leaves(variables_of(variables))
    siblings: dict[str, set[str]] = {}
    for leaf in named:
        siblings.setdefault(leaf.layer, set()).add(leaf.name)
    _check_names(names, set(siblings))
    transposed_layers = _transposed_layers(variables, transposed, named, layout)
    leaves: dict[str, Leaf] = {}
    for leaf in named:
        beside = siblings[leaf.layer]
        is_count = leaf.name == "count" and {"mean", "var"} <= beside
        layer = _layer_in_library(leaf.layer, names, layout.separator)
        key = at_layer(_key_template(leaf, beside, is_count, layout), layer)
        if key in leaves:
            raise ValueError(
                f"names takes both {leaves[key].path} and {leaf.path} to {key}, expected a key for "
                "each"
            )
        leaves[key] = Leaf(
            path=leaf.path,
            shape=tuple(leaf.array.shape),
            dtype=leaf.array.dtype,
            name=leaf.name,
            layer=layer,
            key=key,
            is_transposed=leaf.name == "kernel" and leaf.layer in transposed_layers,
            is_count=is_count,
        )
    return list(leaves.values())


def running_statistics(leaves: Iterable[Leaf]) -> dict[str, dict[str, Leaf]]:
    """Returns the running mean and variance of every norm, by layer and by name."""
    statistics: dict[str, dict[str, Leaf]] = {}
    for leaf in leaves:
        if leaf.name in ("mean", "var"):
            statistics.setdefault(leaf.layer, {})[leaf.name] = leaf
    return {layer: both for layer, both in statistics.items() if len(both) == 2}


def at_layer(template: str, layer: str) -> str:
    """Returns the key of a layer's array; the top-level layer has the path ``""``."""
    return template.format(layer) if layer else template.replace("{}.", "").replace("{}/", "")


def _named_leaves(tree: Any) -> list[_Named]:
    leaves = [(_parts(keys), leaf) for keys, leaf in jax.tree.leaves_with_path(tree)]
    # In Linen a path starts with the collection, which is no part of the layer's path.
    is_linen = {parts[0] for parts, _ in leaves} <= {"params", "batch_stats"}
    start = 1 if is_linen else 0
    return [
        _Named("/".join(parts), "/".join(parts[start:-1]), parts[-1], leaf)
        for parts, leaf in leaves
    ]


def _parts(keys: tuple[Any, ...]) -> tuple[str, ...]:
    # The value of an nnx.Variable, or of a box of Linen, is one attribute further in.
    if isinstance(keys[-1], jax.tree_util.GetAttrKey):
        keys = keys[:-1]
    return tuple(format_path((key,)) for key in keys)


# --- keys ---------------------------------------------------------------------------------------


def _key_template(leaf: _Named, siblings: set[str], is_count: bool, layout: Layout) -> str:
    """Returns the template of a leaf's key; an unknown parameter keeps its name."""
    templates = layout.layer if siblings & {"kernel", "embedding"} else layout.norm
    if is_count and "count" not in templates:
        raise ValueError(
            f"{leaf.path} counts the batches of a cumulative average (momentum=None), which only "
            "PyTorch has, expected mean and var alone: leave it out."
        )
    if leaf.name in templates and (leaf.name != "count" or is_count):
        return templates[leaf.name]
    module, separator, _ = layout.layer["bias"].rpartition(layout.separator)
    return module + separator + leaf.name


# --- the names of layers ------------------------------------------------------------------------


def _check_names(names: Names, layers: set[str]) -> None:
    if names is None or callable(names):
        return
    if not isinstance(names, Mapping):
        raise TypeError(
            f"names is a {type(names).__name__}, expected a mapping from paths in Flax to paths in "
            "the other library, a function of a path in Flax, or None"
        )
    if wrong := {start: path for start, path in names.items() if not isinstance(path, str)}:
        raise TypeError(f"names has {wrong}, expected paths in the other library, of type str")
    starts = {"", *layers}
    for layer in layers:
        starts.update(layer[: slash.start()] for slash in re.finditer("/", layer))
    if unknown := [start for start in names if start not in starts]:
        raise ValueError(
            f"names has {unknown}, expected paths of layers in Flax or beginnings of them; the "
            f"layers are {sorted(layers)}"
        )


def _layer_in_library(layer: str, names: Names, separator: str) -> str:
    """Returns the path of a layer in the other library."""
    if callable(names):
        path = names(layer)
        if not isinstance(path, str):
            raise TypeError(
                f"names({layer!r}) is {path!r}, expected a str, the path in the other library: for "
                f"layers that keep their path, return layer.replace('/', {separator!r})"
            )
        return path
    for start in sorted(names or (), key=len, reverse=True):
        if start in ("", layer) or layer.startswith(start + "/"):
            rest = layer.removeprefix(start).strip("/").replace("/", separator)
            return separator.join(part for part in ((names or {})[start], rest) if part)
    return layer.replace("/", separator)


# --- transposed convolutions --------------------------------------------------------------------


def _transposed_layers(
    variables: Any, transposed: Globs | None, named: Iterable[_Named], layout: Layout
) -> set[str]:
    """Returns the transposed convolutions: by the argument, and by the types in an NNX module."""
    # A kernel of rank 3 or more may be that of a convolution.
    convolutions = {
        leaf.layer for leaf in named if leaf.name == "kernel" and len(leaf.array.shape) > 2
    }
    if isinstance(variables, nnx.Module):
        by_type = {
            "/".join(map(str, path))
            for path, module in nnx.iter_modules(variables)
            if isinstance(module, nnx.ConvTranspose) and not module.transpose_kernel
        }
        return by_type | _matched_layers(transposed or (), convolutions)
    if transposed is not None:
        return _matched_layers(transposed, convolutions)
    is_default_name = re.compile(r"(.*/)?ConvTranspose_\d+").fullmatch
    suspects = sorted(layer for layer in convolutions if is_default_name(layer))
    if suspects and layout.transposed_kernel != layout.kernel:
        raise ValueError(
            f"transposed is None, but {suspects} are transposed convolutions by their names: pass "
            f"transposed={suspects}, without those that have transpose_kernel=True, or "
            "transposed=() if all of them have that."
        )
    return set()


def _matched_layers(globs: Globs, convolutions: set[str]) -> set[str]:
    matched: set[str] = set()
    for pattern in [globs] if isinstance(globs, str) else globs:
        # A module around a convolution does not count: it may hold others, not transposed.
        layers = {layer for layer in convolutions if matches_whole(pattern, layer)}
        if not layers:
            raise ValueError(
                f"transposed has {pattern!r}, expected globs of ConvTranspose layers among those "
                f"with a kernel of rank 3 or more, which are {sorted(convolutions)}"
            )
        matched |= layers
    return matched
