"""Which kind of layer has a kernel of three or more axes: they look alike in Flax.

A convolution has ``[*window, in, out]``, a transposed one too, and a `DenseGeneral` has ``[*in,
*out]``. An `nnx.Module` knows its layers. In variables alone, the names that Linen gives and the
shapes of the arrays tell some of them. What they do not tell is asked for, never guessed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from flax import nnx

from bn_jax._paths import list_layers, matches_whole

Globs: TypeAlias = str | Iterable[str]
Shape: TypeAlias = tuple[int, ...]

PROJECTIONS = ("query", "key", "value")


class Kind(NamedTuple):
    """The kind of a layer, as far as it is known."""

    name: Literal["Conv", "ConvTranspose", "DenseGeneral", "unknown"]
    # How many axes of the kernel of a `DenseGeneral` are inputs, if that is known.
    inputs: int | None = None


def kinds_of(
    variables: Any, layers: Mapping[str, Mapping[str, Any]], transposed: Globs | None
) -> dict[str, Kind]:
    """Returns the kind of every layer with a kernel of three or more axes.

    Args:
        variables: the model, or a tree of its variables.
        layers: the arrays of each layer by their names, by the path of the layer.
        transposed: the argument of `from_library`.
    """
    shapes = {
        path: tuple(arrays["kernel"].shape)
        for path, arrays in layers.items()
        if "kernel" in arrays and len(arrays["kernel"].shape) > 2
    }
    kinds = _kinds_by_type(variables) if isinstance(variables, nnx.Module) else {}
    kinds = {path: kind for path, kind in kinds.items() if path in shapes}
    for path, shape in shapes.items():
        dense = None if path in kinds else _as_dense(path, shape, layers)
        if dense is not None:
            kinds[path] = dense
    convolutions = {
        path for path in shapes if path not in kinds or kinds[path].name != "DenseGeneral"
    }
    for path in _matched_layers(transposed or (), convolutions):
        kinds[path] = Kind("ConvTranspose")
    for path in convolutions - set(kinds):
        is_named = re.fullmatch(r"(.*/)?Conv_\d+", path)
        kinds[path] = Kind("Conv" if is_named else "unknown")
    return kinds


def attentions(layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the paths of the attention layers, with a ``/`` at the end if they have a name."""
    return [
        path.removesuffix("query")
        for path in layers
        if path.rpartition("/")[2] == "query" and _is_attention(path.removesuffix("query"), layers)
    ]


def _is_attention(prefix: str, layers: Mapping[str, Mapping[str, Any]]) -> bool:
    """Tells whether the layers with a prefix are those of a `MultiHeadDotProductAttention`."""
    children = [layers.get(prefix + name, {}) for name in (*PROJECTIONS, "out")]
    if not all("kernel" in child and len(child["kernel"].shape) == 3 for child in children):
        return False
    *inward, out = (tuple(child["kernel"].shape) for child in children)
    return inward[0][1:] == out[:2] and all(shape[2] == out[1] for shape in inward)


def _as_dense(path: str, shape: Shape, layers: Mapping[str, Mapping[str, Any]]) -> Kind | None:
    """Returns the kind of a layer that is a `DenseGeneral` by bias, name or siblings."""
    prefix, _, name = path.rpartition("/")
    bias = layers[path].get("bias")
    if bias is not None and len(bias.shape) > 1:
        inputs = len(shape) - len(bias.shape)
        # Other layers with such a bias, as those of batched axes, are no matrix.
        is_matrix = inputs > 0 and shape[inputs:] == tuple(bias.shape)
        return Kind("DenseGeneral", inputs if is_matrix else None)
    if name in (*PROJECTIONS, "out") and _is_attention(prefix and f"{prefix}/", layers):
        return Kind("DenseGeneral", 2 if name == "out" else 1)
    if re.fullmatch(r"DenseGeneral_\d+", name):
        return Kind("DenseGeneral", None if bias is None else len(shape) - 1)
    return None


def _kinds_by_type(model: nnx.Module) -> dict[str, Kind]:
    kinds = {}
    for keys, module in nnx.iter_modules(model):
        path = "/".join(map(str, keys))
        if isinstance(module, nnx.ConvTranspose) and not module.transpose_kernel:
            kinds[path] = Kind("ConvTranspose")
        elif isinstance(module, nnx.Conv | nnx.ConvTranspose):
            kinds[path] = Kind("Conv")
        elif isinstance(module, nnx.LinearGeneral) and not module.batch_axis:
            kinds[path] = Kind("DenseGeneral", len(module.in_features))
    return kinds


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


def require_told(layers: list[str], *, has_arrays: bool) -> None:
    """Raises an error that asks which of these layers, of unknown kind, are transposed."""
    is_default_name = re.compile(r"(.*/)?ConvTranspose_\d+").fullmatch
    if suspects := sorted(filter(is_default_name, layers)):
        others = [layer for layer in layers if layer not in suspects]
        also = f" Add those of {list_layers(others)} that are ConvTranspose too." if others else ""
        raise ValueError(
            f"transposed is None, but {suspects} are transposed convolutions by their names: pass "
            f"transposed={suspects}, without those that have transpose_kernel=True, or "
            f"transposed=() if all of them have that.{also}"
        )
    if layers:
        message = (
            f"transposed is None, and no shape or name tells whether {list_layers(layers)} are "
            "Conv or ConvTranspose, whose kernels are laid out differently: pass transposed=() if "
            "none is a ConvTranspose, or the paths of all that are, for example "
            f"transposed={layers[:1]}."
        )
        if not has_arrays:
            message += " If one is a DenseGeneral, pass like= too, whose shapes tell."
        raise ValueError(message)
