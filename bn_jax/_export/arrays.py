"""The arrays of a model by name, in dtypes that NumPy's files have."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bn_jax._paths import format_path


@dataclass(frozen=True)
class _Kind:
    """What an array is beside its bits: the dtype, or the implementation of random keys."""

    dtype: Any
    key_impl: Any = None


@dataclass(frozen=True)
class StoredArrays:
    """The leaves of a tree as a file holds them.

    Attributes:
        arrays: the leaves by their paths. Dtypes that NumPy lacks are stored as their bits, and
            keys of random numbers as their data.
        kinds: what to make of each.
        treedef: the structure of the tree.
    """

    arrays: dict[str, np.ndarray]
    kinds: dict[str, _Kind]
    treedef: Any

    def restore(self, params: dict[str, jax.Array]) -> Any:
        """Returns the tree, of arrays under the names of `arrays`."""
        leaves = [_restore(params[name], kind) for name, kind in self.kinds.items()]
        return jax.tree.unflatten(self.treedef, leaves)


def store_arrays(tree: Any) -> StoredArrays:
    """Returns the leaves of a tree as a file can hold them.

    Raises:
        TypeError: a leaf is traced, is no array, or has less than 8 bits.
        ValueError: two leaves have one path.
    """
    leaves, treedef = jax.tree.flatten_with_path(tree)
    arrays, kinds = {}, {}
    for keys, leaf in leaves:
        name = format_path(keys) or "variables"
        if isinstance(tree, nnx.State):
            name = name.removesuffix("/value")
        if name in arrays:
            raise ValueError(f"variables hold two arrays at {name!r}: rename one.")
        arrays[name], kinds[name] = _store(name, leaf)
    return StoredArrays(arrays, kinds, treedef)


def _store(name: str, leaf: Any) -> tuple[np.ndarray, _Kind]:
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError("variables are traced: call export_model outside of jax.jit.")
    try:
        array = jnp.asarray(leaf)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"variables hold a {type(leaf).__name__} at {name!r}, expected arrays: take it out, "
            "for example by a function that closes over it."
        ) from error
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(array))
        return data, _Kind(data.dtype, jax.random.key_impl(array))
    plain = np.asarray(array)
    if plain.dtype.isbuiltin == 1:
        return plain, _Kind(plain.dtype)
    info = jnp.finfo if jnp.issubdtype(plain.dtype, jnp.floating) else jnp.iinfo
    if info(plain.dtype).bits != 8 * plain.dtype.itemsize:
        raise TypeError(
            f"variables hold an array of dtype {plain.dtype} at {name!r}, which has less than 8 "
            "bits: cast it to int8 or float8, and back in forward."
        )
    return plain.view(f"uint{8 * plain.dtype.itemsize}"), _Kind(plain.dtype)


def _restore(stored: jax.Array, kind: _Kind) -> jax.Array:
    if kind.key_impl is not None:
        return jax.random.wrap_key_data(stored, impl=kind.key_impl)
    if stored.dtype == kind.dtype:
        return stored
    return jax.lax.bitcast_convert_type(stored, kind.dtype)
