"""Wall-clock time of batch norms on a GPU or TPU, compared with copying memory.

``python -m benchmarks.device`` runs a layer, a block of convolution, norm and ReLU, and the
training step of a ResNet-50 with the batch norm of bn_jax and with Flax's, on the first accelerator
that JAX finds. It writes ``device.json``. Layers of bn_jax are timed twice: with a running mean
near the batch mean, where the guard of the variance does not run, and with a distant running mean,
where it runs at every step. Without an accelerator it says so and writes nothing.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from benchmarks import report
from benchmarks.inference import Network
from benchmarks.startup import (
    FLAX,
    NORMS,
    OURS,
    Program,
    forward_and_backward,
    layer,
    training_step,
)
from benchmarks.timing import Timing, in_turns
from bn_jax.lab.models import Norm, ResNet50

ROUNDS = 20
# Calls per measurement, so that the device runs one call while the next is dispatched.
REPEATS = 10
STRUCK = f"{OURS}, guard strikes"
FAR_AWAY = 1e3
# The least number of arrays like x that move through memory: forward reads x twice and writes y,
# backward reads x and the cotangent twice and writes the gradient.
PASSES = 8


class Sizes(NamedTuple):
    """What runs.

    Attributes:
        layers: input shapes of the layers.
        block: input shape of the block.
        dtypes: of layers and block.
        network: of the training step.
        copied: number of float32 values to copy.
    """

    layers: tuple[tuple[int, ...], ...] = (
        (256, 56, 56, 64),
        (256, 14, 14, 256),
        (256, 7, 7, 2048),
        (65536, 512),
        (32, 128),
    )
    block: tuple[int, int, int, int] = (256, 56, 56, 64)
    dtypes: tuple[Any, ...] = (jnp.bfloat16, jnp.float32)
    network: Network = Network(partial(ResNet50, 1000, dtype=jnp.bfloat16), (128, 224, 224, 3))
    copied: int = 2**28


class Measured(NamedTuple):
    """An arm of a program: the time of a call, and its temporary memory in bytes."""

    timing: Timing
    temporary: int


class Case(NamedTuple):
    """The same work in every arm, and the least bytes that it moves, if they are known."""

    arms: dict[str, Program]
    moved: int | None = None


class Found(NamedTuple):
    """The measurements of a case."""

    arms: dict[str, Measured]
    moved: int | None


def struck(program: Program) -> Program:
    """Returns the program with running means so distant that the guard runs."""

    def make_arguments() -> tuple[Any, ...]:
        variables, *others = program.make_arguments()
        stats = {**variables["batch_stats"]}
        return {**variables, "batch_stats": {**stats, "mean": stats["mean"] + FAR_AWAY}}, *others

    return Program(program.function, make_arguments)


def block(norm: Norm, shape: tuple[int, int, int, int], dtype: Any) -> Program:
    """Returns convolution, norm and ReLU in training, forward and backward."""
    convolution = nn.Conv(shape[-1], (3, 3), use_bias=False, dtype=dtype)
    layers: list[Any] = [convolution, norm(use_running_average=False, dtype=dtype), nn.relu]
    return forward_and_backward(nn.Sequential(layers), shape, dtype)


def cases(sizes: Sizes) -> dict[str, Case]:
    """Returns all cases by name."""
    found = {}
    for dtype in map(jnp.dtype, sizes.dtypes):
        for shape in sizes.layers:
            arms = {arm: layer(norm, shape, dtype) for arm, norm in NORMS.items()}
            arms[STRUCK] = struck(arms[OURS])
            moved = PASSES * prod(shape) * dtype.itemsize
            found[f"layer {list(shape)}, {dtype}"] = Case(arms, moved)
        arms = {arm: block(norm, sizes.block, dtype) for arm, norm in NORMS.items()}
        found[f"block {list(sizes.block)}, {dtype}"] = Case(arms)
    steps = {arm: training_step(sizes.network, norm) for arm, norm in NORMS.items()}
    found[f"training step, images {list(sizes.network.shape)}"] = Case(steps)
    return found


def measure(
    arms: Mapping[str, Program],
    device: jax.Device,
    rounds: int,
    repeats: int,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Measured]:
    """Compiles the programs for a device and times them there, interleaved."""
    functions, temporary = {}, {}
    with jax.default_device(device):
        for arm, program in arms.items():
            arguments = jax.jit(program.make_arguments)()
            compiled = jax.jit(program.function).lower(*arguments).compile()
            memory: Any = compiled.memory_analysis()
            temporary[arm] = memory.temp_size_in_bytes
            functions[arm] = partial(repeated, partial(compiled, *arguments), repeats)
            jax.block_until_ready(functions[arm]())
        timings = in_turns(functions, rounds, advance)
    return {arm: Measured(timings[arm].scaled(1 / repeats), temporary[arm]) for arm in arms}


def repeated(function: Callable[[], Any], times: int) -> Any:
    """Calls a function `times` times and returns its last result."""
    for _ in range(times - 1):
        function()
    return function()


def bandwidth(device: jax.Device, numbers: int, rounds: int, repeats: int) -> float:
    """Returns the bytes per second that a device reads and writes in a copy."""
    copy = Program(lambda x: x + 1, lambda: (jnp.zeros(numbers),))
    found = measure({"copy": copy}, device, rounds, repeats)
    return 2 * 4 * numbers / found["copy"].timing.median


def measure_all(
    sizes: Sizes, device: jax.Device, rounds: int, repeats: int
) -> tuple[float, dict[str, Found]]:
    """Returns the bandwidth, and the measurements of all cases."""
    with Progress(transient=True) as progress:
        every = cases(sizes)
        task = progress.add_task("copy", total=rounds * len(every))
        copied = bandwidth(device, sizes.copied, rounds, repeats)
        found = {}
        for name, case in every.items():
            progress.update(task, description=name)
            advance = partial(progress.advance, task)
            found[name] = Found(measure(case.arms, device, rounds, repeats, advance), case.moved)
    return copied, found


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns the figures of the JSON as a table."""
    table = Table(
        title=f"{figures['device']}, which copies {figures['bandwidth'] / 1e9:.0f} GB/s; "
        "forward and backward",
        box=SIMPLE_HEAD,
    )
    for column in ("", "ms (quartiles)", f"over {FLAX}", "over the copying", "temporary MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, case in figures["cases"].items():
        for arm, one in case["arms"].items():
            median = one["timing"]["quartiles"][1]
            copying = case["moved"] and case["moved"] / figures["bandwidth"]
            table.add_row(
                f"{name}: {arm}",
                report.milliseconds(one["timing"]["quartiles"]),
                f"{median / case['arms'][FLAX]['timing']['quartiles'][1]:.2f}",
                f"{median / copying:.2f}" if copying else "-",
                f"{one['temporary'] / 1e6:.1f}",
            )
    return [table]


def main() -> None:
    """Measures, writes the JSON and prints the table, if there is an accelerator."""
    folder = report.parser("device", __doc__).parse_args().folder
    if jax.default_backend() not in ("gpu", "tpu"):
        print(f"skipped: JAX finds no GPU and no TPU here, but {jax.devices()[0].device_kind}")
        return
    device = jax.devices()[0]
    copied, found = measure_all(Sizes(), device, ROUNDS, REPEATS)
    figures = {
        "device": device.device_kind,
        "rounds": ROUNDS,
        "repeats": REPEATS,
        "bandwidth": copied,
        "cases": found,
    }
    report.finish("device", folder, ("flax", "optax"), figures, tables)


if __name__ == "__main__":
    main()
