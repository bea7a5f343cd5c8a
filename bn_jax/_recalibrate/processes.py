"""Several processes, as `jax.distributed.initialize` connects them.

Each has its own batches, measures them on its own devices and, after a pass, merges what it has
measured with the others. Or all compute together on global arrays; then all measure the same.
"""

import pickle
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bn_jax._paths import format_path


def is_global(tree: Any) -> bool:
    """Tells whether an array of a tree is partly on devices of other processes."""
    return any(
        isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        for leaf in jax.tree.leaves(tree)
    )


def as_local(tree: Any) -> Any:
    """Returns a tree with the copy that this process has of every array.

    Raises:
        ValueError: an array is split over several processes.
    """

    def copy_of(keys: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if not leaf.is_fully_replicated:
            raise ValueError(
                f"variables has {format_path(keys)} split over several processes, but batches "
                "yields arrays of this process alone; expected global arrays from all processes "
                "alike: jax.make_array_from_process_local_data(sharding, x). Or replicate the "
                "variables: jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))."
            )
        return leaf.addressable_data(0)

    return jax.tree.map_with_path(copy_of, tree)


def gather(value: Any) -> list[Any]:
    """Returns what every process passes, in the order of the processes; all must call it."""
    if jax.process_count() == 1:
        return [value]
    # As bytes, because JAX would round float64.
    sent = np.frombuffer(pickle.dumps(value), np.uint8)
    # The implementation moves scalars of its own.
    with jax.transfer_guard("allow"):
        lengths = multihost_utils.process_allgather(np.int32(sent.size)).reshape(-1)
        padded = np.pad(sent, (0, int(lengths.max()) - sent.size))
        rows = multihost_utils.process_allgather(padded)
    return [
        pickle.loads(row[:length].tobytes())  # what this function of another process has written
        for row, length in zip(rows, lengths, strict=True)
    ]
