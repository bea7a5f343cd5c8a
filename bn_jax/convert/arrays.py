"""The two forms of a model: mappings of arrays of a library, and variables of Flax."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

# safetensors refuses tensors in another memory format, and tensors that share memory.
_STATE_DICT = "{k: v.contiguous().clone() for k, v in model.state_dict().items()}"
_COLLECTIONS = {"params", "batch_stats"}


def variables_of(tree: Any) -> Any:
    """Returns the parameters and running statistics of a model, or of a tree of its variables."""
    kept = nnx.Any(nnx.Param, nnx.BatchStat)
    if isinstance(tree, nnx.Module):
        return nnx.state(tree, kept)
    if isinstance(tree, nnx.State):
        # A pure state holds arrays without variables.
        return nnx.filter_state(
            tree, nnx.Any(kept, lambda _, leaf: not isinstance(leaf, nnx.Variable))
        )
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"the variables are a {type(tree).__name__}, expected those of Linen, a mapping of "
            "params and batch_stats, an nnx.Module, its nnx.State or pure dictionary"
        )
    known = set(tree) & _COLLECTIONS
    if known and not set(tree) <= _COLLECTIONS:
        raise ValueError(
            f"the variables have the collections {sorted(tree)}, expected "
            f"{sorted(_COLLECTIONS)}: pass {{name: variables[name] for name in {sorted(known)}}}"
        )
    return tree


def flatten(arrays: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, with ``/`` between the parts of a key."""
    flat: dict[str, Any] = {}
    for key, value in arrays.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the mappings of Haiku: collections of modules of arrays."""
    tree: dict[str, Any] = {"params": {}, "state": {}}
    for key, array in flat.items():
        collection, _, path = key.partition("/")
        module, _, name = path.rpartition("/")
        tree[collection].setdefault(module, {})[name] = array
    return tree


def as_array(key: str, value: Any) -> np.ndarray:
    """Returns a value as an array of NumPy; errors name its key."""
    kind = type(value).__name__
    try:
        array = np.asarray(value)
    except jax.errors.TracerArrayConversionError as error:
        raise TypeError(
            f"{key} is traced, expected an array: call bn_jax.convert outside of jit"
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"{key} is a {kind} that NumPy cannot take ({error}), expected an array"
        if type(value).__module__.partition(".")[0] == "torch":
            message += (
                ". A model of PyTorch goes through a file: safetensors.torch.save_file("
                f"{_STATE_DICT}, path), then load_safetensors(path)."
            )
        raise TypeError(message) from error
    if array.dtype == object:
        raise TypeError(f"{key} is a {kind}, expected an array")
    return array


def require_mapping(name: str, received: Any, source: str) -> None:
    """Raises a TypeError for an argument that is not a mapping; `source` is what to pass."""
    if not isinstance(received, Mapping):
        raise TypeError(
            f"{name} is a {type(received).__name__}, expected a mapping of arrays by their keys: "
            f"pass {source}"
        )
