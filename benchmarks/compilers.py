"""Compilers for accelerators. They compile ahead of time and need no accelerator.

libtpu compiles for every TPU. JAX's CUDA plugin compiles for a GPU that is described by a text,
except for convolutions, which need cuDNN.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import report
from benchmarks.hlo import collectives, kernels
from bn_jax.training import make_mesh

V5E, V6E, H200 = "v5e", "v6e", "H200"
# An H200 whose kernels may use all the shared memory that the chip can give to one.
ROOMY_H200 = "H200, 227 KB of shared memory"
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")
WHOLE = PartitionSpec()
INSTALL = "python -m pip install --editable '.[bench]'"
# Without these, libtpu asks the machine for its chip and refuses to load twice.
_WITHOUT_A_CHIP = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "H200"
"""
_GPUS = {
    H200: _H200,
    ROOMY_H200: _H200.replace("shared_memory_per_block: 49152", "shared_memory_per_block: 232448"),
}


class Compiled(NamedTuple):
    """The figures of a program compiled for an accelerator.

    Attributes:
        moved: bytes that its kernels read from main memory and write to it, without the branches of
            guards.
        counted: bytes as the compiler counts them, with branches and on-chip memory; 0 if it does
            not report them.
        temporary: bytes of main memory in addition to arguments and results.
        kernels: number of kernels outside of branches.
        collectives: number of collectives outside of branches.
    """

    moved: int
    counted: int
    temporary: int
    kernels: int
    collectives: int


def missing(chip: str) -> str | None:
    """Says what to install to compile for a chip, or returns None if it is installed."""
    module = "jax_plugins.xla_cuda13" if chip in _GPUS else "libtpu"
    try:
        found = find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is not None:
        return None
    return (
        f"{module}, the compiler for {chip}, is not installed (it runs on Linux and needs no "
        f"accelerator). Install it with: {INSTALL}"
    )


def mesh_of(chip: str, layout: str = "1x1") -> Mesh:
    """Returns a mesh over chips that need not exist.

    Args:
        chip: `V5E`, `V6E` or `H200`.
        layout: of a slice of TPUs.

    Returns:
        The mesh, with the axis of `bn_jax.training`.

    Raises:
        SystemExit: the compiler is not installed.
    """
    if (message := missing(chip)) is not None:
        raise SystemExit(message)
    os.environ.update(_WITHOUT_A_CHIP)
    with _silent():
        if chip in _GPUS:
            topology = topologies.get_topology_desc(
                platform="cuda", topology_name="", topology="1x1x1", target_config=_GPUS[chip]
            )
        else:
            host = [1, 1, 1] if layout == "1x1" else [2, 2, 1]
            topology = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{chip}:{layout}", chips_per_host_bounds=host
            )
    return make_mesh(topology.devices)


@contextmanager
def _silent() -> Iterator[None]:
    """Suppresses JAX's messages that its plugin finds no GPU and no cuDNN."""
    logger = logging.getLogger("jax")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def lower_for(
    mesh: Mesh,
    function: Callable[..., Any],
    shapes: tuple[Any, ...],
    given: tuple[PartitionSpec, ...] | None = None,
    returned: Any = WHOLE,
) -> jax.stages.Lowered:
    """Lowers a function.

    Args:
        mesh: the devices.
        function: a function of arrays.
        shapes: of its arguments.
        given: how each argument is split; None: every device holds all arguments whole.
        returned: how the results are split, for all results or in their structure.

    Returns:
        The lowered program.
    """
    places = given or (WHOLE,) * len(shapes)
    arguments = [
        jax.tree.map(
            lambda leaf, place=place: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, place)
            ),
            argument,
        )
        for argument, place in zip(shapes, places, strict=True)
    ]
    results = jax.tree.map(lambda place: NamedSharding(mesh, place), returned)
    return jax.jit(function, out_shardings=results).lower(*arguments)


def compile_for(
    mesh: Mesh, function: Callable[..., Any], shapes: tuple[Any, ...]
) -> jax.stages.Compiled:
    """Compiles a function whose arguments every device of the mesh holds whole."""
    return lower_for(mesh, function, shapes).compile()


def identify(mesh: Mesh, lowered: jax.stages.Lowered) -> str:
    """Returns a hash of a program, its devices and its compiler."""
    devices = mesh.devices.size, mesh.devices.flat[0].device_kind
    text = f"{devices} {report.versions(COMPILERS)} {lowered.as_text()}"
    return sha256(text.encode()).hexdigest()


def remembered(figures: Any) -> dict[str, Mapping[str, Any]]:
    """Returns the figures that the JSON of a benchmark holds, by the hash of `identify`.

    Compilers are deterministic. If neither the compiler nor the program has changed, nothing needs
    to be compiled again.
    """
    if not isinstance(figures, dict | list):
        return {}
    parts = figures.values() if isinstance(figures, dict) else figures
    known = {program: one for part in parts for program, one in remembered(part).items()}
    if isinstance(figures, dict) and "program" in figures:
        known[figures["program"]] = {k: v for k, v in figures.items() if k != "program"}
    return known


def read(compiled: jax.stages.Compiled) -> Compiled:
    """Reads a compiled program."""
    text = compiled.as_text() or ""
    found = kernels(text)
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis() or {}
    return Compiled(
        moved=sum(kernel.read + kernel.written for kernel in found),
        counted=int(cost.get("bytes accessed", 0)),
        temporary=memory.temp_size_in_bytes,
        kernels=len(found),
        collectives=sum(not one.guarded for one in collectives(text)),
    )
