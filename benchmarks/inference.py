"""What a folded network saves: evaluation of residual networks with norms, folded, and without.

``python -m benchmarks.inference`` measures every arm of every network on this machine's CPU, in
turns, and reads the compiled programs; it prints both and writes
``benchmarks/results/inference.json``. The folded network runs on the parameters that `bn_jax.fold`
made, the one without norms on the same ones: by its definition it computes the same.
"""

import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import bn_jax as bn
from bn_jax.models import Norm, ResNet, ResNet18

RESULTS = Path(__file__).parent / "results" / "inference.json"
ROUNDS = 50
WITHOUT, FOLDED, UNFOLDED, FLAX = "no norm", "folded", "bn_jax", "flax.linen"


class Network(NamedTuple):
    """A network to evaluate: how it is made with a norm or without, and its input."""

    make: Callable[..., nn.Module]
    shape: tuple[int, int, int, int]


class Measured(NamedTuple):
    """An arm of a network.

    Attributes:
        quartiles: of the seconds that an evaluation takes.
        cpu_quartiles: of the seconds that it occupies processors, all cores together, which other
            programs on the machine disturb less.
        operations: in the compiled program.
        roots: among them.
        flops: that it needs.
        accessed: bytes that it reads and writes.
        error: the largest difference from the network with norms of bn_jax, relative to the largest
            of its outputs.
    """

    quartiles: tuple[float, float, float]
    cpu_quartiles: tuple[float, float, float]
    operations: int
    roots: int
    flops: int
    accessed: int
    error: float


NETWORKS = {
    "ResNet, 3 stages of 2 blocks, 32 images of 8x8": Network(
        partial(ResNet, 10, (2, 2, 2)), (32, 8, 8, 1)
    ),
    "ResNet18, 8 images of 64x64": Network(partial(ResNet18, 1000), (8, 64, 64, 3)),
}


def randomized(variables: Any) -> Any:
    """Gives the variables values far from the initial ones: none is 0, every variance positive."""
    rng = np.random.default_rng(0)

    def draw(keys: Any, leaf: Any) -> jax.Array:
        values = rng.standard_normal(leaf.shape)
        if bn.optim.path_of(keys).endswith("kernel"):
            values /= np.sqrt(np.prod(leaf.shape[:-1]))
        if bn.optim.path_of(keys).endswith("var"):
            values = np.exp(values)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map_with_path(draw, variables)


def arms(network: Network) -> tuple[dict[str, Callable[..., Any]], dict[str, Any]]:
    """Returns the functions to evaluate, and the variables of each."""

    def evaluate(norm: Norm | None) -> Callable[..., Any]:
        return partial(network.make(norm=norm).apply, train=False)

    images = jnp.zeros(network.shape)
    model = network.make(norm=bn.linen.BatchNorm)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    variables = randomized(shapes)
    folded = bn.fold(evaluate(bn.linen.BatchNorm), variables, images)
    functions = {
        WITHOUT: evaluate(None),
        FOLDED: folded.apply,
        UNFOLDED: evaluate(bn.linen.BatchNorm),
        FLAX: evaluate(nn.BatchNorm),
    }
    given = {WITHOUT: {"params": folded.params}, FOLDED: folded.params}
    return functions, {**dict.fromkeys(functions, variables), **given}


def measure(network: Network, rounds: int, advance: Callable[[], None]) -> dict[str, Measured]:
    """Compiles every arm of a network and times them in turns."""
    functions, variables = arms(network)
    images = jax.random.normal(jax.random.key(1), network.shape)
    compiled = {
        arm: jax.jit(function).lower(variables[arm], images).compile()
        for arm, function in functions.items()
    }
    outputs = {arm: np.asarray(one(variables[arm], images)) for arm, one in compiled.items()}
    seconds: dict[str, list[tuple[float, float]]] = {arm: [] for arm in compiled}
    for _ in range(rounds):
        for arm, one in compiled.items():
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(one(variables[arm], images))
            end = time.perf_counter(), time.process_time()
            seconds[arm].append((end[0] - start[0], end[1] - start[1]))
        advance()
    return {
        arm: _read(one, seconds[arm], outputs[arm], outputs[UNFOLDED])
        for arm, one in compiled.items()
    }


def _read(
    compiled: Any, seconds: list[tuple[float, float]], output: Any, expected: Any
) -> Measured:
    operations = re.findall(r" ([a-z][\w-]*)\(", compiled.as_text())
    cost = compiled.cost_analysis()
    by_clock, by_processor = (_quartiles(one) for one in zip(*seconds, strict=True))
    return Measured(
        quartiles=by_clock,
        cpu_quartiles=by_processor,
        operations=len(operations),
        roots=sum("sqrt" in one for one in operations),
        flops=int(cost["flops"]),
        accessed=int(cost["bytes accessed"]),
        error=float(np.abs(output - expected).max() / np.abs(expected).max()),
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = quantiles(values, n=4)
    return low, median, high


def make_table(title: str, measured: Mapping[str, Measured]) -> Table:
    """Returns the arms of a network as a table."""
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in (
        "",
        "ms (quartiles)",
        "over no norm",
        "CPU ms",
        "operations",
        "roots",
        "MFLOP",
        "MB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for arm, one in measured.items():
        low, median, high = (1e3 * second for second in one.quartiles)
        table.add_row(
            arm,
            f"{median:.2f} ({low:.2f} to {high:.2f})",
            f"{one.quartiles[1] / measured[WITHOUT].quartiles[1]:.2f}",
            f"{1e3 * one.cpu_quartiles[1]:.2f}",
            str(one.operations),
            str(one.roots),
            f"{one.flops / 1e6:.1f}",
            f"{one.accessed / 1e6:.1f}",
        )
    return table


def report(found: Mapping[str, Mapping[str, Measured]]) -> dict[str, Any]:
    """Returns what the JSON holds: the figures, and how they came about."""
    return {
        "command": "python -m benchmarks.inference",
        "versions": {name: version(name) for name in ("bn-jax", "jax", "flax")},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "rounds": ROUNDS,
        "networks": {
            name: {arm: one._asdict() for arm, one in by_arm.items()}
            for name, by_arm in found.items()
        },
    }


def load(path: Path = RESULTS) -> dict[str, dict[str, Measured]]:
    """Reads the figures of a JSON that `report` made."""

    def measured(figures: dict[str, Any]) -> Measured:
        spread = {name: tuple(one) for name, one in figures.items() if isinstance(one, list)}
        fields: dict[str, Any] = {**figures, **spread}
        return Measured(**fields)

    known = json.loads(path.read_text())["networks"]
    return {
        name: {arm: measured(figures) for arm, figures in by_arm.items()}
        for name, by_arm in known.items()
    }


def main() -> None:
    """Measures, writes the JSON and prints the tables."""
    jax.config.update("jax_platforms", "cpu")
    found = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=ROUNDS * len(NETWORKS))
        for name, network in NETWORKS.items():
            progress.update(task, description=name)
            found[name] = measure(network, ROUNDS, partial(progress.advance, task))
    RESULTS.write_text(json.dumps(report(found), indent=2) + "\n")
    for name, measured in found.items():
        Console(width=120).print(make_table(name, measured))


if __name__ == "__main__":
    main()
