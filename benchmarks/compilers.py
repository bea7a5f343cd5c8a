"""The compilers of accelerators, which need no accelerator: programs are compiled ahead of time.

libtpu compiles for every TPU, and JAX's CUDA plugin for the GPU that a text describes, convolutions
aside: their code is cuDNN's, which this machine lacks.
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
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")
WHOLE = PartitionSpec()
INSTALL = "python -m pip install --editable '.[bench]'"
# libtpu asks the machine which chip it has, unless it is told, and wants to be alone.
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


class Compiled(NamedTuple):
    """What a program that was compiled for an accelerator says of itself.

    Attributes:
        moved: bytes that its kernels read from main memory and write to it, branches of guards
            left out.
        counted: bytes by the compiler's own account, branches and on-chip memory included; 0 where
            it gives none.
        temporary: bytes of main memory beside arguments and results.
        kernels: how many there are outside of branches.
        collectives: how many there are outside of branches.
    """

    moved: int
    counted: int
    temporary: int
    kernels: int
    collectives: int


def missing(chip: str) -> str | None:
    """Says what to install to compile for a chip, or nothing where it is there."""
    module = "jax_plugins.xla_cuda13" if chip == H200 else "libtpu"
    try:
        found = find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is not None:
        return None
    return (
        f"{module}, the compiler for {chip}, is not installed (Linux has it; no accelerator is "
        f"needed). Install it with: {INSTALL}"
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
        if chip == H200:
            topology = topologies.get_topology_desc(
                platform="cuda", topology_name="", topology="1x1x1", target_config=_H200
            )
        else:
            host = [1, 1, 1] if layout == "1x1" else [2, 2, 1]
            topology = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{chip}:{layout}", chips_per_host_bounds=host
            )
    return make_mesh(topology.devices)


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps JAX from reporting that there is no GPU, and no cuDNN, for its plugin."""
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
        mesh: of the devices to run on.
        function: of arrays.
        shapes: of its arguments.
        given: how each argument is split, or None where every device holds them all whole.
        returned: how the results are split, for all of them or by their structure.

    Returns:
        The program before the compiler.
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
    """Compiles a function of arrays that every device of the mesh holds whole."""
    return lower_for(mesh, function, shapes).compile()


def identify(mesh: Mesh, lowered: jax.stages.Lowered) -> str:
    """Returns what stands for a program, the devices that it is for, and the compiler."""
    devices = mesh.devices.size, mesh.devices.flat[0].device_kind
    text = f"{devices} {report.versions(COMPILERS)} {lowered.as_text()}"
    return sha256(text.encode()).hexdigest()


def remembered(figures: Any) -> dict[str, Mapping[str, Any]]:
    """Returns what the JSON of a benchmark holds of every program, by what `identify` returns.

    What a compiler says is deterministic: as long as neither it nor the program changes, nothing
    needs to be compiled again.
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
