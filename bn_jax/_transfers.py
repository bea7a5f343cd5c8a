"""Explicit transfers between host and devices, which `jax.transfer_guard("disallow")` allows."""

from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding


def fetch(tree: Any) -> Any:
    """Returns a tree of arrays on the host; arrays split over several processes are gathered."""

    def fetch_leaf(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                # The implementation moves scalars of its own.
                with jax.transfer_guard("allow"):
                    return multihost_utils.process_allgather(leaf, tiled=True)
            leaf = leaf.addressable_data(0)
        return jax.device_get(leaf)

    return jax.tree.map(fetch_leaf, tree)


def devices_of(tree: Any) -> Sharding | None:
    """Returns the devices to which arrays are committed, each with a whole copy; None if none is.

    This is where `jax.jit` would put whatever is passed beside these arrays.
    """
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, jax.Array) or not leaf.committed:
            continue
        if isinstance(leaf.sharding, NamedSharding):
            return NamedSharding(leaf.sharding.mesh, PartitionSpec())
        if isinstance(leaf.sharding, SingleDeviceSharding):
            return leaf.sharding
    return None


def put(tree: Any, devices: Sharding | None) -> Any:
    """Returns a tree with its arrays on devices; what is committed to any stays there."""

    def put_leaf(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return leaf if leaf.committed or devices is None else jax.device_put(leaf, devices)
        if isinstance(leaf, np.ndarray | np.generic | bool | int | float | complex):
            return jax.device_put(leaf, devices)
        return leaf

    return jax.tree.map(put_leaf, tree)


def place_like(values: Any, old: Any) -> Any:
    """Returns arrays of the host on the devices of old ones, in the structure of these."""

    def place(array: np.ndarray[Any, Any], leaf: Any) -> jax.Array:
        is_committed = isinstance(leaf, jax.Array) and leaf.committed
        placed = jax.device_put(array, leaf.sharding if is_committed else None)
        return cast(jax.Array, placed)

    return jax.tree.map(place, values, old)
