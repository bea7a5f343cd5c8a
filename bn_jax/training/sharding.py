"""Batches of labelled examples: padded to one size, masked, and split over a mesh of devices."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ["DATA_AXIS", "Batch", "make_mesh", "pad_batch", "process_rows", "shard_batch"]

DATA_AXIS = "data"
"""The mesh axis of `make_mesh`, and so the `axis_name` of a norm that is synchronized over it."""


class Batch(NamedTuple):
    """Inputs, labels, and which of the examples are real.

    The leaves are NumPy arrays where batches are made, and of the type `jax.Array` on devices.

    Attributes:
        x: inputs, [N, ...].
        y: labels, integers [N].
        mask: booleans [N], False on padding.
    """

    x: npt.NDArray[Any] | jax.Array
    y: npt.NDArray[Any] | jax.Array
    mask: npt.NDArray[np.bool_] | jax.Array


def pad_batch(x: npt.NDArray[Any], y: npt.NDArray[Any], batch_size: int) -> Batch:
    """Pads examples with zeros to `batch_size` and masks the padding.

    Args:
        x: inputs [n, ...].
        y: labels [n].
        batch_size: the size of the result, at least n.

    Returns:
        A batch of `batch_size` examples, the first n of them real.

    Raises:
        ValueError: there are more than `batch_size` examples.

    Example:
        >>> import numpy as np, bn_jax as bn, bn_jax.training
        >>> bn.training.pad_batch(np.ones((2, 3)), np.array([1, 0]), 4).mask.tolist()
        [True, True, False, False]
    """
    padding = batch_size - len(y)
    if padding < 0:
        raise ValueError(
            f"received {len(y)} examples, expected at most batch_size = {batch_size}; "
            "split them into several batches"
        )
    return Batch(
        x=np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)),
        y=np.pad(y, (0, padding)),
        mask=np.arange(batch_size) < len(y),
    )


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of one axis, "data".

    Args:
        devices: the devices to use. None: all devices of all processes.

    Returns:
        A mesh over them, whose axis XLA partitions automatically.

    Example:
        >>> import jax, bn_jax as bn, bn_jax.training
        >>> bn.training.make_mesh(jax.devices()[:1]).axis_names
        ('data',)
    """
    return Mesh(np.array(jax.devices() if devices is None else devices), (DATA_AXIS,))


def process_rows(batch_size: int, mesh: Mesh) -> slice:
    """Returns which rows of a batch belong on the devices of this process.

    Args:
        batch_size: examples in a batch, over all devices.
        mesh: a mesh made by `make_mesh`, in which the devices of a process are consecutive.

    Returns:
        The rows that this process passes to `shard_batch`; all rows if it is the only process.

    Example:
        >>> import bn_jax as bn, bn_jax.training
        >>> bn.training.process_rows(64, bn.training.make_mesh())
        slice(0, 64, None)
    """
    is_local = [device.process_index == jax.process_index() for device in mesh.devices.flat]
    start = is_local.index(True)
    stop = start + is_local.count(True)
    return slice(start * batch_size // mesh.size, stop * batch_size // mesh.size)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Splits the leading axis of a batch over the devices of a mesh.

    Args:
        batch: leaves [N, ...]; with several processes, the `process_rows` of this process.
        mesh: a mesh made by `make_mesh`.

    Returns:
        The batch on the devices of all processes.

    Raises:
        ValueError: the number of devices does not divide N.

    Example:
        >>> import jax, numpy as np, bn_jax as bn, bn_jax.training
        >>> batch = bn.training.pad_batch(np.ones((3, 2)), np.zeros(3, int), 4)
        >>> bn.training.shard_batch(batch, bn.training.make_mesh(jax.devices()[:1])).x.shape
        (4, 2)
    """
    devices = mesh.local_mesh.size
    if len(batch.y) % devices:
        raise ValueError(
            f"batch has {len(batch.y)} examples, expected a multiple of the mesh's {devices} "
            "devices; pad it with bn_jax.training.pad_batch"
        )
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return Batch(*(jax.make_array_from_process_local_data(sharding, leaf) for leaf in batch))
