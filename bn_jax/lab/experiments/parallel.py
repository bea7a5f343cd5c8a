"""Many runs of one program: spread over the devices, and some side by side on each of them.

On a CPU, two things make many small trainings slow. The operations of one training are too small
for several cores, so one device, which is what JAX makes of a CPU, leaves cores idle. And with
`jax.vmap` over all trainings, the arrays of a step no longer fit into the caches. Here each core is
a device, and a device makes its runs in chunks. On 2 cores this takes 0.42 of the time of one run
after another, where one vmapped program takes 1.07. On an accelerator, a device makes all of its
runs at once.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "runs"
# The fastest of 1 (0.49 of one run after another), 2, 4, 8 (0.42), 16, 32 (0.62) on two devices.
CPU_CHUNK = 8
_FLAG = "--xla_force_host_platform_device_count"
# While a run is traced: where the runs of a nested call cannot be spread once more.
_is_in_run = ContextVar("_is_in_run", default=False)


class Layout(NamedTuple):
    """Where runs are made.

    Attributes:
        devices: the devices that share the runs.
        chunk: the largest number of runs that a device makes at once, vmapped; None: all of its
            runs.
    """

    devices: Sequence[jax.Device]
    chunk: int | None


class _Split(NamedTuple):
    """The share of each device: chunks one after another, each of `width` runs at once."""

    devices: int
    chunks: int
    width: int


def request_devices() -> None:
    """Asks JAX for as many CPU devices as this process has cores.

    Call it before JAX is used. If the user has chosen a number, by ``JAX_NUM_CPU_DEVICES``,
    ``jax_num_cpu_devices`` or ``XLA_FLAGS``, or if JAX has its devices already, nothing changes.
    Processes that are started later make the same devices. Other platforms keep theirs.

    Example:
        >>> from bn_jax.lab.experiments import parallel
        >>> parallel.request_devices()
    """
    config: Any = jax.config
    if config.jax_num_cpu_devices > 0 or _FLAG in os.environ.get("XLA_FLAGS", ""):
        return
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):
        config.update("jax_num_cpu_devices", cores)
        os.environ["JAX_NUM_CPU_DEVICES"] = str(cores)


def choose_layout() -> Layout:
    """Returns the layout for this process: all devices, in chunks of `CPU_CHUNK` on a CPU."""
    devices = jax.local_devices()
    return Layout(devices, CPU_CHUNK if devices[0].platform == "cpu" else None)


def map_runs(run: Callable[..., Any], *of_runs: Any, layout: Layout | None = None) -> Any:
    """Returns what ``jax.vmap(run)(*of_runs)`` returns, made on all devices.

    Args:
        run: called with each of `of_runs` at one run.
        *of_runs: arrays, typed keys, or trees of them, with a leading axis [runs, ...].
        layout: see `run_each`.

    Returns:
        What `run` returns, with a leading axis [runs].

    Example:
        >>> import numpy as np
        >>> from bn_jax.lab.experiments.parallel import map_runs
        >>> map_runs(lambda x, tree: x * tree["y"], np.arange(3.0), {"y": np.ones(3)}).tolist()
        [0.0, 1.0, 2.0]
    """

    def at_place(place: jax.Array, *of_runs: Any) -> Any:
        return run(*jax.tree.map(lambda leaf: leaf[place], of_runs))

    number = jax.tree.leaves(of_runs)[0].shape[0]
    return run_each(at_place, number, *of_runs, layout=layout)


def run_each(
    run: Callable[..., Any], number: int, *inputs: Any, layout: Layout | None = None
) -> Any:
    """Makes runs that differ by their number alone.

    A call inside of `run`, or under a transform, makes its runs where it is: on a CPU one after
    another, for the outer runs are side by side already.

    Args:
        run: called with a number from 0 to ``number - 1``, an int32 scalar, and with `inputs`.
        number: how many runs there are, at least 1.
        *inputs: arrays, typed keys, or trees of them, the same for all runs.
        layout: where the runs are made. None: that of `choose_layout`.

    Returns:
        What `run` returns, with a leading axis [number], on the first device.
    """
    layout = layout or choose_layout()
    leaves = jax.tree.leaves(inputs)
    if _is_in_run.get() or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        chunk = 1 if layout.devices[0].platform == "cpu" else layout.chunk
        split = _split(number, Layout(layout.devices[:1], chunk))
        inputs = jax.tree.map(jnp.asarray, inputs)
        return _trim(_make_share(run, number, split, 0, inputs), number)
    inputs = jax.device_put(inputs, _replicated(layout, number))
    outputs = make_program(run, number, layout)(*inputs)
    # Outside of the program, where it needs no collective: on a CPU, a collective that waits too
    # long for the slowest device ends the process.
    return _trim(jax.device_put(outputs, layout.devices[0]), number)


def make_program(run: Callable[..., Any], number: int, layout: Layout) -> Any:
    """Returns the compiled function of `run_each`.

    Args:
        run: see `run_each`.
        number: see `run_each`.
        layout: see `run_each`.

    Returns:
        A function of `inputs`, made by `jax.jit`. Its results have a leading axis that is split
        over the devices. The first `number` of its places are the runs; the others repeat the last.
    """
    split = _split(number, layout)

    def on_device(*inputs: Any) -> Any:
        first = jax.lax.axis_index(AXIS) * (split.chunks * split.width)
        return _make_share(run, number, split, first, inputs)

    return jax.jit(
        jax.shard_map(
            on_device,
            mesh=_replicated(layout, number).mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(AXIS),
            # The carry of a scan in `run` may begin as a constant, the same on all devices.
            check_vma=False,
        )
    )


def _split(number: int, layout: Layout) -> _Split:
    """Splits runs evenly, so that hardly any place is left over."""
    devices = min(number, len(layout.devices))
    share = -(-number // devices)
    chunks = -(-share // (layout.chunk or share))
    return _Split(devices, chunks, -(-share // chunks))


def _replicated(layout: Layout, number: int) -> NamedSharding:
    devices = layout.devices[: _split(number, layout).devices]
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())


def _make_share(
    run: Callable[..., Any], number: int, split: _Split, first: Any, inputs: tuple[Any, ...]
) -> Any:
    """Makes the runs of one device, from the number `first` on."""
    places = first + jnp.arange(split.chunks * split.width, dtype=jnp.int32)
    places = jnp.minimum(places, number - 1)

    def at_place(place: jax.Array) -> Any:
        token = _is_in_run.set(True)
        try:
            return run(place, *inputs)
        finally:
            _is_in_run.reset(token)

    if split.width == 1:
        return jax.lax.map(at_place, places)
    if split.chunks == 1:
        return jax.vmap(at_place)(places)
    outputs = jax.lax.map(jax.vmap(at_place), places.reshape(split.chunks, split.width))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)


def _trim(outputs: Any, number: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[:number], outputs)
