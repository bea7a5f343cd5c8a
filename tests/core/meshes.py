"""Meshes over the four devices that the tests have."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DEVICES = 4


def automatic_mesh(**axes):
    axes = axes or {"data": DEVICES}
    return Mesh(np.array(jax.devices()[:DEVICES]).reshape(*axes.values()), tuple(axes))


def explicit_mesh(**axes):
    axes = axes or {"data": DEVICES}
    return jax.make_mesh(tuple(axes.values()), tuple(axes))


def sharded(x, mesh):
    return jax.device_put(x, NamedSharding(mesh, P("data")))
