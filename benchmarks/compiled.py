"""Norms compiled for accelerators: bytes, memory and kernels, ours against Flax's.

``python -m benchmarks.compiled`` compiles single layers and blocks of convolutions, forward and
backward, for the TPUs v5e and v6e and for an H200, ahead of time and without an accelerator. It
prints the figures of the compiled programs and writes ``compiled.json``. Programs that this file
already holds are not compiled again.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

import bn_jax as bn
from benchmarks import report
from benchmarks.compilers import (
    H200,
    V5E,
    V6E,
    WHOLE,
    Compiled,
    identify,
    lower_for,
    mesh_of,
    missing,
    read,
    remembered,
)
from bn_jax.lab.models import Norm
from bn_jax.training import DATA_AXIS

FLAX, OURS = "flax.linen", "bn_jax"
NORMS: dict[str, Norm] = {FLAX: nn.BatchNorm, OURS: bn.linen.BatchNorm}


class Row(NamedTuple):
    """A program to compile.

    Attributes:
        chip: the accelerator.
        shape: of the input that each chip holds.
        dtype: of the input and of the output.
        activation: the name of a function of `flax.linen` after the norm, or "".
        residual: whether an array is added before the activation: the input of a block, or another
            array for a layer alone.
        convolutions: the number of blocks, each with a 3x3 convolution and a norm; 0 for the norm
            alone.
        chips: the number of chips that share the batch: 1 or 4.
    """

    chip: str
    shape: tuple[int, ...]
    dtype: str
    activation: str = ""
    residual: bool = False
    convolutions: int = 0
    chips: int = 1

    @property
    def unit(self) -> int:
        """The bytes of the input on one chip."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype).size * jnp.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        """Names the row."""
        parts = [f"{self.convolutions} x conv" * bool(self.convolutions), "norm"]
        parts += ["residual" * self.residual, self.activation]
        return " + ".join(filter(None, parts))


AFTER_THE_NORM = (("", False), ("relu", False), ("silu", False), ("relu", True))
LAYER_SHAPE = (65536, 256)
# Larger than the on-chip memory of a TPU, so that no array stays there between kernels.
BLOCK_SHAPE = (256, 32, 32, 256)
ROWS = [
    *(
        Row(H200, LAYER_SHAPE, dtype, *after)
        for dtype in ("float32", "bfloat16")
        for after in AFTER_THE_NORM
    ),
    *(
        Row(chip, BLOCK_SHAPE, "bfloat16", activation, residual, 0, chips)
        for chip in (V5E, V6E)
        for activation, residual, chips in (
            *(("", False, 1), ("relu", False, 1), ("relu", True, 1)),
            ("", False, 4),
        )
    ),
    *(
        Row(chip, BLOCK_SHAPE, "bfloat16", *after, convolutions=2)
        for chip in (V5E, V6E)
        for after in AFTER_THE_NORM[1:]
    ),
]


class Network(nn.Module):
    """The layer or the blocks of a row."""

    row: Row
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        """Computes the output of the last norm, after residual and activation."""
        after = getattr(nn, self.row.activation) if self.row.activation else lambda y: y
        for _ in range(self.row.convolutions):
            y = nn.Conv(x.shape[-1], (3, 3), use_bias=False, dtype=x.dtype)(x)
            y = self._normalize(y)
            x = after(y + x if self.row.residual else y)
        if self.row.convolutions:
            return x
        y = self._normalize(x)
        return after(y + residual if self.row.residual else y)

    def _normalize(self, x: jax.Array) -> jax.Array:
        return self.norm(use_running_average=False, dtype=x.dtype)(x)


def make_program(row: Row, norm: Norm) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns forward and backward pass of a row, and the shapes of its arguments.

    The backward pass begins after the output is complete, as in a network.
    """
    network = Network(row, norm)
    x = jax.ShapeDtypeStruct((row.shape[0] * row.chips, *row.shape[1:]), row.dtype)
    variables = jax.eval_shape(network.init, jax.random.key(0), x, x)
    adds_another = row.residual and not row.convolutions

    def forward_and_backward(variables: Any, x: Any, residual: Any, cotangent: Any) -> Any:
        def forward(params: Any, x: Any, residual: Any) -> Any:
            return network.apply(
                {**variables, "params": params}, x, residual, mutable="batch_stats"
            )

        y, pullback, updated = jax.vjp(forward, variables["params"], x, residual, has_aux=True)
        y, cotangent = jax.lax.optimization_barrier((y, cotangent))
        gradients = pullback(cotangent)
        return y, updated, gradients if adds_another else gradients[:2]

    return forward_and_backward, (variables, x, x, x)


def lower(mesh: Mesh, row: Row, norm: Norm) -> jax.stages.Lowered:
    """Returns the program of a row for a mesh, with the batch split over its devices."""
    split = PartitionSpec(DATA_AXIS) if row.chips > 1 else WHOLE
    inputs = (split,) * (2 if row.residual and not row.convolutions else 1)
    given, returned = (WHOLE, split, split, split), (split, WHOLE, (WHOLE, *inputs))
    return lower_for(mesh, *make_program(row, norm), given, returned)


def measure(row: Row, norm: Norm, known: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a row with a norm; compiles it only if its program is not known yet."""
    mesh = mesh_of(row.chip, "1x1" if row.chips == 1 else "2x2")
    lowered = lower(mesh, row, norm)
    program = identify(mesh, lowered)
    found = known[program] if program in known else read(lowered.compile())._asdict()
    return {**found, "program": program}


def measure_all(rows: Iterable[Row], known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Measures rows with every norm, with a progress bar."""
    rows, found = list(rows), []
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(rows) * len(NORMS))
        for row in rows:
            arms = {}
            for name, norm in NORMS.items():
                progress.update(task, description=f"{row.chip}: {row}, {name}")
                arms[name] = measure(row, norm, known)
                progress.advance(task)
            found.append({"row": row._asdict(), "arms": arms})
    return found


def load(figures: Mapping[str, Any]) -> dict[Row, dict[str, Compiled]]:
    """Reads the figures of the JSON."""
    return {
        Row(**{**one["row"], "shape": tuple(one["row"]["shape"])}): {
            name: Compiled(*map(arm.get, Compiled._fields)) for name, arm in one["arms"].items()
        }
        for one in figures["rows"]
    }


def floor(row: Row) -> int:
    """Returns how often a single layer must at least read and write arrays like the input.

    The forward pass takes two reads and one write. The backward pass takes two reads for the sums,
    two for the gradient, and one write. A residual is read in each of these passes but the first,
    and its gradient is written. Storing the gradient before the activation saves nothing unless
    there is a residual, where it is written anyway.
    """
    return 11 if row.residual else 8


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns the figures as tables, with both norms in each cell."""
    return [
        _table("A layer, forward and backward: bytes in units of the input", figures, 0),
        _table("Blocks of convolution and norm: bytes in units of the input", figures, 1),
    ]


def _table(title: str, figures: Mapping[str, Any], least: int) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in ("chip", "dtype", "program", "floor", "moved", "temporary", "counted", "kernels"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("collectives", justify="right", no_wrap=True)
    for row, arms in load(figures).items():
        if bool(row.convolutions) != bool(least):
            continue
        flax, ours = arms[FLAX], arms[OURS]

        def both(quantity: str, flax: Any = flax, ours: Any = ours, unit: int = row.unit) -> str:
            one, other = (getattr(arm, quantity) / unit for arm in (ours, flax))
            return f"{one:.2f} / {other:.2f}" if other else "-"

        table.add_row(
            row.chip if row.chips == 1 else f"{row.chips} x {row.chip}",
            row.dtype,
            str(row),
            "-" if row.convolutions else str(floor(row)),
            both("moved"),
            both("temporary"),
            both("counted"),
            f"{ours.kernels} / {flax.kernels}",
            f"{ours.collectives} / {flax.collectives}",
        )
    return table


def main() -> None:
    """Compiles, writes the JSON and prints the tables."""
    folder = report.parser("compiled", __doc__).parse_args().folder
    jax.config.update("jax_platforms", "cpu")
    for message in filter(None, map(missing, (V5E, H200))):
        raise SystemExit(message)
    figures = {"rows": measure_all(ROWS, remembered(report.read_all("compiled")))}
    report.finish("compiled", folder, ("flax", "libtpu", "jax-cuda13-plugin"), figures, tables)


if __name__ == "__main__":
    main()
