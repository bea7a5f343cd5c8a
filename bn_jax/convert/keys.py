"""Where each array of a Flax model is found in another library: the key of every leaf."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from bn_jax._paths import format_path
from bn_jax.convert.arrays import variables_of
from bn_jax.convert.dense import merge_axes, packed_keys
from bn_jax.convert.kinds import Globs, Kind, Shape, kinds_of
from bn_jax.convert.layouts import Layout

Names: TypeAlias = Mapping[str, str] | Callable[[str], str] | None


class Leaf(NamedTuple):
    """An array of a Flax model, and its place in another library."""

    path: str  # where it is in Flax
    shape: tuple[int, ...]  # its shape in Flax
    dtype: np.dtype[Any]  # its dtype in Flax
    name: str  # its name in Flax, the last part of the path
    module: str  # the path of its layer in Flax
    layer: str  # the path of its layer in the other library
    key: str  # its key in the other library
    # Its shape in Flax, with the inputs and outputs of a `DenseGeneral` merged to an axis each, as
    # far as the library merges them.
    merged: tuple[int, ...]
    kind: Kind | None  # of its layer, if that has a kernel of rank 3 or more
    is_count: bool  # whether it counts the batches of a cumulative average

    @property
    def is_kernel(self) -> bool:
        """Whether the order of its axes depends on the library."""
        return self.name == "kernel" and len(self.merged) > 1

    @property
    def by_domain(self) -> bool:
        """Whether it is a running statistic with more than one axis, the first of domains."""
        return (self.name in ("mean", "var") or self.is_count) and len(self.shape) > 1

    @property
    def is_transposed(self) -> bool:
        """Whether it is the kernel of a transposed convolution."""
        return self.is_kernel and self.kind is not None and self.kind.name == "ConvTranspose"


class _Named(NamedTuple):
    """A leaf of a Flax model with its path, the path of its layer, and its name there."""

    path: str
    layer: str
    name: str
    array: Any


def leaves_of(
    variables: Any,
    layout: Layout,
    names: Names,
    transposed: Globs | None,
    received: Mapping[str, Shape] | None,
) -> list[Leaf]:
    """Returns the leaves of a model with their keys, in the order of the tree.

    The shapes of the arrays that the library has, where they are `received`, decide between the
    forms that a layer may have there.
    """
    named = _named_leaves(variables_of(variables))
    layers: dict[str, dict[str, Any]] = {}
    for leaf in named:
        layers.setdefault(leaf.layer, {})[leaf.name] = leaf.array
    _check_names(names, set(layers))
    kinds = kinds_of(variables, layers, transposed)
    paths = {layer: _layer_in_library(layer, names, layout.separator) for layer in layers}
    packed = packed_keys(layers, paths, received or {})
    shapes = received or {}
    leaves: dict[str, Leaf] = {}
    for leaf in named:
        beside, layer = set(layers[leaf.layer]), paths[leaf.layer]
        key = packed.get((leaf.layer, leaf.name)) or _key_of(leaf, beside, layer, layout, received)
        if key in leaves:
            raise ValueError(
                f"names takes both {leaves[key].path} and {leaf.path} to {key}, expected a key for "
                "each"
            )
        shape, kind = tuple(leaf.array.shape), kinds.get(leaf.layer)
        leaves[key] = Leaf(
            path=leaf.path,
            shape=shape,
            dtype=leaf.array.dtype,
            name=leaf.name,
            module=leaf.layer,
            layer=layer,
            key=key,
            merged=merge_axes(leaf.name, shape, kind, layout, shapes.get(key)),
            kind=kind,
            is_count=_is_count(leaf, beside),
        )
    return list(leaves.values())


def running_statistics(leaves: Iterable[Leaf]) -> dict[str, dict[str, Leaf]]:
    """Returns the running mean and variance of every norm, by layer and by name."""
    statistics: dict[str, dict[str, Leaf]] = {}
    for leaf in leaves:
        if leaf.name in ("mean", "var"):
            statistics.setdefault(leaf.layer, {})[leaf.name] = leaf
    return {layer: both for layer, both in statistics.items() if len(both) == 2}


def at_layer(template: str, layer: str, parent: str = "") -> str:
    """Returns the key of a layer's array; the top-level layer has the path ``""``."""
    for name, path in (("{}", layer), ("{parent}", parent)):
        if not path:
            template = template.replace(f"{name}.", "").replace(f"{name}/", "")
        template = template.replace(name, path)
    return template


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


def _key_of(
    leaf: _Named,
    siblings: set[str],
    layer: str,
    layout: Layout,
    received: Mapping[str, Shape] | None,
) -> str:
    """Returns the key of a leaf: the usual one, or another that the library has."""
    key = at_layer(_key_template(leaf, siblings, layout), layer)
    parent, _, last = layer.rpartition(layout.separator)
    others = [
        at_layer(other.key, layer, parent)
        for other in layout.alternatives
        if other.name == leaf.name and other.layer in ("", last)
    ]
    if received is None:
        is_root_mean_square = siblings == {"scale"} and "rms" in f"{leaf.layer} {layer}".lower()
        return others[0] if is_root_mean_square and others else key
    if key in received:
        return key
    return next((other for other in others if other in received), key)


def _key_template(leaf: _Named, siblings: set[str], layout: Layout) -> str:
    """Returns the template of a leaf's key; an unknown parameter keeps its name."""
    templates = layout.layer if siblings & {"kernel", "embedding"} else layout.norm
    is_count = _is_count(leaf, siblings)
    if is_count and "count" not in templates:
        raise ValueError(
            f"{leaf.path} counts the batches of a cumulative average (momentum=None), which only "
            "PyTorch has, expected mean and var alone: leave it out."
        )
    if leaf.name in templates and (leaf.name != "count" or is_count):
        return templates[leaf.name]
    module, separator, _ = layout.layer["bias"].rpartition(layout.separator)
    return module + separator + leaf.name


def _is_count(leaf: _Named, siblings: set[str]) -> bool:
    return leaf.name == "count" and {"mean", "var"} <= siblings


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
