"""The check of `bn_jax.convert`: there and back without a bit lost, by rules written down here."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import bn_jax as bn
from benchmarks.zoo.errors import relative_error, require, require_structure
from benchmarks.zoo.specimens import Specimen, path_of

# Of an average that is divided once.
ROUNDING = 1e-6

# The name of an array in Flax by its name in another library.
_KERAS = {
    "kernel": "kernel",
    "bias": "bias",
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
}


def convert(specimen: Specimen) -> str:
    """Converts the arrays of a model to another library and back."""
    if specimen.library in ("Linen", "NNX"):
        return _from_flax(specimen)
    arrays_of = {"Haiku": _haiku, "Keras": _keras, "Equinox": _equinox}[specimen.library]
    arrays, expected = arrays_of(specimen)
    library: Any = specimen.library.lower()
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), expected)
    # No layer is transposed, which neither the shape of a square kernel nor its name tells.
    found = bn.convert.from_library(arrays, library, like=like, transposed=())
    require(relative_error(found, expected), ROUNDING, "arrays in Flax")
    _require_same(bn.convert.to_library(found, library, like=arrays, transposed=()), arrays)
    return f"{len(jax.tree.leaves(found))} arrays"


def _require_same(actual: Any, expected: Any) -> None:
    require_structure(actual, expected)
    for (keys, one), other in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert np.array_equal(np.asarray(one), np.asarray(other)), jax.tree_util.keystr(keys)


# --- from Flax and back -------------------------------------------------------------------------


def _from_flax(specimen: Specimen) -> str:
    """To PyTorch, whose keys and layouts are known, and to Keras."""
    for variables in _members(specimen):
        named = _leaves_by_path(variables)
        arrays = bn.convert.to_library(variables, "pytorch")
        counts = {key for key in arrays if key.endswith(".num_batches_tracked")}
        assert len(counts) == len(specimen.norms)
        expected = dict(_in_pytorch(path, leaf) for path, leaf in named.items())
        _require_same({key: arrays[key] for key in arrays.keys() - counts}, expected)
        for library in ("pytorch", "keras"):
            arrays = bn.convert.to_library(variables, library)
            back = bn.convert.from_library(arrays, library, like=variables)
            _require_same(_leaves_by_path(back), named)
    return f"{len(named)} arrays"


def _members(specimen: Specimen) -> list[Any]:
    """Returns the variables of a model, or those of each member that `nn.vmap` has stacked."""
    if not specimen.members:
        return [specimen.variables]
    return [
        jax.tree.map(lambda leaf, at=member: leaf[at], _without_settings(specimen.variables))
        for member in range(specimen.members)
    ]


def _without_settings(variables: Any) -> Any:
    """Returns variables whose running statistics are mean and variance alone."""
    flat = flatten_dict(variables)
    is_kept = lambda path: path[0] == "params" or path[-1] in ("mean", "var")  # noqa: E731
    return unflatten_dict({path: leaf for path, leaf in flat.items() if is_kept(path)})


def _leaves_by_path(variables: Any) -> dict[str, Any]:
    if isinstance(variables, nnx.Module):
        variables = nnx.state(variables, (nnx.Param, nnx.BatchStat))
    leaves = jax.tree.leaves_with_path(variables)
    return {
        path_of(keys).removeprefix("params/").removeprefix("batch_stats/"): leaf
        for keys, leaf in leaves
    }


def _in_pytorch(path: str, leaf: Any) -> tuple[str, Any]:
    """Returns the key and the array that PyTorch has for one of Flax."""
    layer, _, name = path.replace("/", ".").rpartition(".")
    if name == "kernel":
        leaf = np.moveaxis(leaf, (-1, -2), (0, 1)) if leaf.ndim > 1 else leaf
    new = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    return f"{layer}.{new.get(name, name)}", leaf


# --- to Flax and back ---------------------------------------------------------------------------


def _haiku(specimen: Specimen) -> tuple[Any, Any]:
    """Returns the arrays of Haiku, and what Flax has for them."""
    arrays = specimen.variables
    in_flax: dict[tuple[str, ...], Any] = {}
    for layer, leaves in arrays["params"].items():
        path = tuple(layer.split("/"))
        if "scale" in leaves:
            in_flax["params", *path, "scale"] = leaves["scale"].reshape(-1)
            in_flax["params", *path, "bias"] = leaves["offset"].reshape(-1)
            for ours in ("mean", "var"):
                average = arrays["state"][f"{layer}/~/{ours}_ema"]["average"]
                in_flax["batch_stats", *path, ours] = average.reshape(-1)
        else:
            in_flax.update(
                {
                    ("params", *path, {"w": "kernel", "b": "bias"}[name]): leaf
                    for name, leaf in leaves.items()
                }
            )
    return arrays, unflatten_dict(in_flax)


def _keras(specimen: Specimen) -> tuple[Any, Any]:
    """Returns the arrays of Keras, and what Flax has for them."""
    arrays, in_flax = {}, {}
    for path, leaf in specimen.variables.items():
        *layer, name = path.split("/")
        if name not in _KERAS:  # of the input, and counters of random numbers
            continue
        arrays[path] = np.asarray(leaf)
        kind = "batch_stats" if name.startswith("moving") else "params"
        if name == "kernel" and _is_depthwise(layer[-1]):
            height, width, inputs, multiplier = leaf.shape
            leaf = leaf.reshape(height, width, 1, inputs * multiplier)
        in_flax[(kind, *layer, _KERAS[name])] = leaf
    return arrays, unflatten_dict(in_flax)


def _is_depthwise(layer: str) -> bool:
    return "depthwise" in layer or layer.endswith("dwconv")


def _equinox(specimen: Specimen) -> tuple[Any, Any]:
    """Returns the arrays of Equinox, as the docstring of `convert` has them, and those of Flax."""
    import equinox as eqx

    params, state = specimen.variables["params"], specimen.variables["state"]
    is_norm = lambda node: isinstance(node, eqx.nn.BatchNorm)  # noqa: E731
    is_index = lambda node: isinstance(node, eqx.nn.StateIndex)  # noqa: E731
    whole = jax.tree.map(
        lambda node: state.get(node) if is_index(node) else node, params, is_leaf=is_index
    )
    leaves = jax.tree.leaves_with_path(eqx.filter(whole, eqx.is_array))
    arrays = {jax.tree_util.keystr(keys, simple=True, separator="."): leaf for keys, leaf in leaves}
    norms = [
        jax.tree_util.keystr(keys, simple=True, separator=".")
        for keys, node in jax.tree.leaves_with_path(params, is_leaf=is_norm)
        if is_norm(node)
    ]
    in_flax: dict[tuple[str, ...], Any] = {}
    for key, leaf in arrays.items():
        layer, _, name = key.rpartition(".")
        if layer in norms and name in ("weight", "bias"):
            in_flax["params", *layer.split("."), {"weight": "scale"}.get(name, name)] = leaf
        elif name == "weight":
            in_flax["params", *layer.split("."), "kernel"] = np.moveaxis(leaf, (0, 1), (-1, -2))
        elif name == "bias":
            in_flax["params", *layer.split("."), "bias"] = np.asarray(leaf).reshape(-1)
    for layer in norms:
        # The averages of a single step, divided as Equinox does in evaluation.
        divisor = 1 - 0.99 ** int(arrays[f"{layer}.batch_counter"])
        for index, ours in enumerate(("mean", "var")):
            average = np.asarray(arrays[f"{layer}.batch_state_index.{index}"])
            in_flax["batch_stats", *layer.split("."), ours] = (average / divisor).astype(np.float32)
    return arrays, unflatten_dict(in_flax)
