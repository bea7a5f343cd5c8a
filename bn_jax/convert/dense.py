"""Layers of many axes that other libraries keep as one matrix: `DenseGeneral` and attention.

PyTorch's `MultiheadAttention` packs query, key and value into one array of three times the rows.
Its parts have keys here that no library has: ``attention.in_proj_weight[query]``.
"""

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import jax
import numpy as np

from bn_jax.convert.kinds import PROJECTIONS, Kind, Shape, attentions
from bn_jax.convert.layouts import Layout


def merge_axes(
    name: str, shape: Shape, kind: Kind | None, layout: Layout, received: Shape | None
) -> Shape:
    """Returns the shape of a leaf of Flax with the axes merged that a library has as one.

    Args:
        name: the name of the leaf.
        shape: its shape.
        kind: the kind of its layer.
        layout: the library.
        received: the shape of its array in the library, if that is known.
    """
    if name == "negative_slope":
        return _merge_slope(shape, received)
    if kind is None or kind.name not in ("DenseGeneral", "unknown"):
        return shape
    if layout.keeps_dense_axes and (received is None or len(received) == len(shape)):
        return shape
    if name == "bias":
        return (prod(shape),) if len(shape) > 1 else shape
    if name != "kernel":
        return shape
    matrices = [(prod(shape[:axis]), prod(shape[axis:])) for axis in range(1, len(shape))]
    if received is not None and len(received) == 2:
        # Of four axes or more, a kernel of unknown kind is more likely that of a convolution.
        wanted = received[::-1] if layout.kernel.startswith("o") else received
        if wanted in matrices and (kind.name == "DenseGeneral" or len(shape) == 3):
            return wanted
    return shape if kind.inputs is None else matrices[kind.inputs - 1]


def _merge_slope(shape: Shape, received: Shape | None) -> Shape:
    """Returns the shape of the slope of a PReLU, which has axes of size 1 in other libraries."""
    wide, narrow = ([size for size in sizes if size != 1] for sizes in (received or (), shape))
    if received is not None and wide == narrow:
        return received
    return shape or (1,)


# --- packed attention ---------------------------------------------------------------------------


def packed_keys(
    layers: Mapping[str, Mapping[str, Any]],
    paths: Mapping[str, str],
    received: Mapping[str, Shape],
) -> dict[tuple[str, str], str]:
    """Returns the keys of the arrays of attention that PyTorch has packed, by layer and name.

    Args:
        layers: the arrays of each layer in Flax, by its path.
        paths: the path in the library, by that in Flax.
        received: the shapes of the library's arrays.
    """
    keys = {}
    for inside in attentions(layers):
        query = paths[f"{inside}query"]
        start = query.removesuffix("query")
        names = (*PROJECTIONS, "out")
        if any(paths[inside + name] != start + name for name in names):
            continue
        is_separate = f"{start}q_proj_weight" in received
        if not is_separate and f"{start}in_proj_weight" not in received:
            continue
        for name in PROJECTIONS:
            weight = f"{name[0]}_proj_weight" if is_separate else f"in_proj_weight[{name}]"
            keys[inside + name, "kernel"] = start + weight
            keys[inside + name, "bias"] = f"{start}in_proj_bias[{name}]"
        keys[f"{inside}out", "kernel"] = f"{start}out_proj.weight"
        keys[f"{inside}out", "bias"] = f"{start}out_proj.bias"
    return keys


def unpack(arrays: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Returns the arrays of a library with packed ones split into the parts among `keys`."""
    wanted = {key.partition("[")[0] for key in keys if _is_part(key)}
    unpacked: dict[str, Any] = {}
    for key, array in arrays.items():
        rows = np.shape(array)[:1]
        if key in wanted and rows and rows[0] % len(PROJECTIONS) == 0:
            unpacked |= {
                f"{key}[{name}]": part
                for name, part in zip(PROJECTIONS, _thirds(array), strict=True)
            }
        else:
            unpacked[key] = array
    return unpacked


def pack(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays of a library with parts joined, the inverse of `unpack`."""
    packed: dict[str, np.ndarray] = {}
    for key, array in arrays.items():
        whole = key.partition("[")[0]
        if not _is_part(key):
            packed[key] = array
        elif whole not in packed:
            packed[whole] = np.concatenate([arrays[f"{whole}[{name}]"] for name in PROJECTIONS])
    return packed


def _is_part(key: str) -> bool:
    return re.search(r"in_proj_(weight|bias)\[(query|key|value)\]$", key) is not None


def _thirds(array: Any) -> list[Any]:
    if isinstance(array, jax.ShapeDtypeStruct):
        part = jax.ShapeDtypeStruct((array.shape[0] // 3, *array.shape[1:]), array.dtype)
        return [part] * 3
    return np.split(np.asarray(array), 3)
