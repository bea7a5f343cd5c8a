"""The cost of norms in evaluation: residual networks with norms, folded, and without norms.

``python -m benchmarks.inference`` times every arm of every network on the CPU, interleaved, and
reads the compiled programs. It prints both and writes ``inference.json``. The folded network and
the network without norms use the same parameters, made by `bn_jax.fold`, so they compute the same
function.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

import bn_jax as bn
from benchmarks import report
from benchmarks.timing import Timing, in_turns
from bn_jax._paths import format_path
from bn_jax.lab.models import Norm, ResNet, ResNet18

ROUNDS = 50
WITHOUT, FOLDED, UNFOLDED, FLAX = "no norm", "folded", "bn_jax", "flax.linen"


class Network(NamedTuple):
    """A network to evaluate: its constructor, which takes a norm or None, and its input shape."""

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]


class Measured(NamedTuple):
    """An arm of a network.

    Attributes:
        timing: of one evaluation.
        operations: number of operations in the compiled program.
        roots: how many of them are square roots.
        flops: floating-point operations.
        accessed: bytes that the program reads and writes.
        error: the largest difference from the outputs of the network with norms of bn_jax, relative
            to the largest of these outputs.
    """

    timing: Timing
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
    """Draws variables far from their initial values: none is 0, every variance is positive."""
    rng = np.random.default_rng(0)

    def draw(keys: Any, leaf: Any) -> jax.Array:
        values = rng.standard_normal(leaf.shape)
        if format_path(keys).endswith("kernel"):
            values /= np.sqrt(np.prod(leaf.shape[:-1]))
        if format_path(keys).endswith("var"):
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
    functions: dict[str, Callable[..., Any]] = {
        WITHOUT: evaluate(None),
        FOLDED: folded.apply,
        UNFOLDED: evaluate(bn.linen.BatchNorm),
        FLAX: evaluate(nn.BatchNorm),
    }
    given = {WITHOUT: {"params": folded.params}, FOLDED: folded.params}
    return functions, {**dict.fromkeys(functions, variables), **given}


def measure(network: Network, rounds: int, advance: Callable[[], None]) -> dict[str, Measured]:
    """Compiles every arm of a network and times the arms interleaved."""
    functions, variables = arms(network)
    images = jax.random.normal(jax.random.key(1), network.shape)
    compiled = {
        arm: jax.jit(function).lower(variables[arm], images).compile()
        for arm, function in functions.items()
    }
    outputs = {arm: np.asarray(one(variables[arm], images)) for arm, one in compiled.items()}
    timings = in_turns(
        {arm: partial(one, variables[arm], images) for arm, one in compiled.items()},
        rounds,
        advance,
    )
    return {
        arm: _read(one, timings[arm], outputs[arm], outputs[UNFOLDED])
        for arm, one in compiled.items()
    }


def _read(compiled: Any, timing: Timing, output: Any, expected: Any) -> Measured:
    operations = re.findall(r" ([a-z][\w-]*)\(", compiled.as_text())
    cost = compiled.cost_analysis()
    return Measured(
        timing=timing,
        operations=len(operations),
        roots=sum("sqrt" in one for one in operations),
        flops=int(cost["flops"]),
        accessed=int(cost["bytes accessed"]),
        error=float(np.abs(output - expected).max() / np.abs(expected).max()),
    )


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
        table.add_row(
            arm,
            report.milliseconds(one.timing.quartiles),
            f"{one.timing.median / measured[WITHOUT].timing.median:.2f}",
            f"{1e3 * one.timing.cpu_quartiles[1]:.2f}",
            str(one.operations),
            str(one.roots),
            f"{one.flops / 1e6:.1f}",
            f"{one.accessed / 1e6:.1f}",
        )
    return table


def load(figures: Mapping[str, Any]) -> dict[str, dict[str, Measured]]:
    """Reads the figures of the JSON."""
    return {
        name: {
            arm: Measured(**{**one, "timing": Timing.load(one["timing"])})
            for arm, one in by_arm.items()
        }
        for name, by_arm in figures["networks"].items()
    }


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns the figures as one table for each network."""
    return [make_table(name, measured) for name, measured in load(figures).items()]


def main() -> None:
    """Measures, writes the JSON and prints the tables."""
    folder = report.parser("inference", __doc__).parse_args().folder
    jax.config.update("jax_platforms", "cpu")
    found = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=ROUNDS * len(NETWORKS))
        for name, network in NETWORKS.items():
            progress.update(task, description=name)
            found[name] = measure(network, ROUNDS, partial(progress.advance, task))
    report.finish("inference", folder, ("flax",), {"rounds": ROUNDS, "networks": found}, tables)


if __name__ == "__main__":
    main()
