"""Bytes of norms by domain and of masks, relative to a batch norm on the same input.

``python -m benchmarks.domains`` compiles single norms, forward alone and with the backward pass,
for a CPU and, ahead of time and without the device, for an H200 and a TPU v5e. It prints the bytes
that the programs move and writes ``domains.json``. Programs that this file already holds are not
compiled again.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

import bn_jax as bn
from benchmarks import report
from benchmarks.compilers import (
    H200,
    V5E,
    identify,
    lower_for,
    mesh_of,
    missing,
    read,
    remembered,
)
from bn_jax.training import make_mesh

CPU = "CPU"
DTYPES = {CPU: ("float32",), H200: ("float32", "bfloat16"), V5E: ("bfloat16",)}
# Larger than the on-chip memory of a TPU, so that no array stays there between kernels.
SHAPES = {"images": (256, 32, 32, 256), "rows": (524288, 256)}
PASSES = "forward", "forward and backward"
PLAIN, MASK, FLAX, FLAX_MASK = "batch norm", "mask", "flax.linen", "flax.linen, mask"
# A domain that is known to be the only one; one for all examples; and domains of examples.
KNOWN, SCALAR = "known", "scalar"
DOMAINS = {KNOWN: 1, SCALAR: 4, "1": 1, "2": 2, "4": 4, "16": 16}
CASES = (PLAIN, MASK, FLAX, FLAX_MASK, *DOMAINS)
Norm = Callable[..., tuple[jax.Array, Any]]


class Row(NamedTuple):
    """What a program is compiled for: the chip, the input by name, and the dtype."""

    chip: str
    inputs: str
    dtype: str

    @property
    def unit(self) -> int:
        """The bytes of the input."""
        return jax.ShapeDtypeStruct(SHAPES[self.inputs], self.dtype).size * (
            jnp.dtype(self.dtype).itemsize
        )


ROWS = [Row(chip, inputs, dtype) for chip in DTYPES for inputs in SHAPES for dtype in DTYPES[chip]]


def make_program(
    case: str, shape: tuple[int, ...], dtype: str, passes: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a norm in training, and the shapes of its arguments.

    The backward pass begins after the output is complete, as in a network.
    """
    norm, features, others = _norm_of(case, shape, dtype)
    leaf, x = jax.ShapeDtypeStruct(features, jnp.float32), jax.ShapeDtypeStruct(shape, dtype)
    trees = {"scale": leaf, "bias": leaf}, {"mean": leaf, "var": leaf}
    if passes == PASSES[0]:
        return norm, (*trees, x, *others)

    def forward_and_backward(params: Any, stats: Any, x: Any, *rest: Any) -> Any:
        *others, cotangent = rest

        def forward(params: Any, x: Any) -> tuple[jax.Array, Any]:
            return norm(params, stats, x, *others)

        y, pullback, updated = jax.vjp(forward, params, x, has_aux=True)
        y, cotangent = jax.lax.optimization_barrier((y, cotangent))
        return y, updated, pullback(cotangent)

    return forward_and_backward, (*trees, x, *others, x)


def _norm_of(
    case: str, shape: tuple[int, ...], dtype: str
) -> tuple[Norm, tuple[int, ...], tuple[Any, ...]]:
    """Returns a function, the shape of its features, and the shapes of its further arguments."""
    examples, features = shape[0], shape[-1:]
    mask = jax.ShapeDtypeStruct((examples, *(1 for _ in shape[1:])), bool)
    masks = (mask,) if case in (MASK, FLAX_MASK) else ()
    if case in (FLAX, FLAX_MASK):
        layer = nn.BatchNorm(use_running_average=False, dtype=dtype)

        def of_flax(params: Any, stats: Any, x: Any, *mask: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": stats}
            options: Any = dict(zip(["mask"], mask, strict=False))
            return cast(Any, layer.apply(variables, x, mutable="batch_stats", **options))

        return of_flax, features, masks
    if case in (PLAIN, MASK):

        def of_batch(params: Any, stats: Any, x: Any, mask: Any = None) -> tuple[jax.Array, Any]:
            return bn.batch_norm(
                params, stats, x, mask=mask, use_running_average=False, dtype=dtype
            )

        return of_batch, features, masks

    def by_domain(params: Any, stats: Any, x: Any, domain: Any = 0) -> tuple[jax.Array, Any]:
        return bn.domain_batch_norm(
            params, stats, x, domain, use_running_average=False, dtype=dtype
        )

    of_examples = () if case == SCALAR else (examples,)
    index = () if case == KNOWN else (jax.ShapeDtypeStruct(of_examples, jnp.int32),)
    return by_domain, (DOMAINS[case], *features), index


def mesh_for(chip: str) -> Mesh:
    """Returns one device: this machine's CPU, or an accelerator that need not exist."""
    return make_mesh(jax.devices("cpu")[:1]) if chip == CPU else mesh_of(chip)


def measure(row: Row, case: str, passes: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the bytes of a program; compiles it only if it is not known yet."""
    mesh = mesh_for(row.chip)
    lowered = lower_for(mesh, *make_program(case, SHAPES[row.inputs], row.dtype, passes))
    program = identify(mesh, lowered)
    if program in known:
        return {**known[program], "program": program}
    found = read(lowered.compile())
    return {"moved": found.moved, "temporary": found.temporary, "program": program}


def measure_all(known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Measures all rows, with a progress bar."""
    found = []
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(ROWS) * len(CASES) * len(PASSES))
        for row in ROWS:
            cases: dict[str, Any] = {}
            for case in CASES:
                progress.update(task, description=f"{' '.join(row)}: {case}")
                cases[case] = {passes: measure(row, case, passes, known) for passes in PASSES}
                progress.advance(task, len(PASSES))
            found.append({"row": row._asdict(), "cases": cases})
    return found


def load(figures: Mapping[str, Any]) -> dict[Row, dict[str, dict[str, float]]]:
    """Reads the bytes by row, case and passes, in units of the input."""
    rows = {}
    for one in figures["rows"]:
        row = Row(**one["row"])
        rows[row] = {
            case: {passes: found[passes]["moved"] / row.unit for passes in PASSES}
            for case, found in one["cases"].items()
        }
    return rows


def ratio(cases: Mapping[str, Mapping[str, float]], case: str, passes: str) -> float:
    """Returns the bytes of a case over those of a batch norm of ours."""
    return cases[case][passes] / cases[PLAIN][passes]


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns the figures as tables, with both kinds of passes in each cell."""
    masks = Table(title="Bytes of a batch norm, in units of the input", box=SIMPLE_HEAD)
    domains = Table(title="Bytes of domains, relative to a batch norm", box=SIMPLE_HEAD)
    headers = {masks: (PLAIN, MASK, FLAX, FLAX_MASK), domains: tuple(DOMAINS)}
    for table, cases in headers.items():
        for column in Row._fields:
            table.add_column(column, justify="default", no_wrap=True)
        for case in cases:
            table.add_column(case, justify="right", no_wrap=True)
    for row, found in load(figures).items():
        units = (
            " / ".join(f"{found[case][passes]:.2f}" for passes in PASSES) for case in headers[masks]
        )
        masks.add_row(*row, *units)
        ratios = (
            " / ".join(f"{ratio(found, case, passes):.2f}" for passes in PASSES) for case in DOMAINS
        )
        domains.add_row(*row, *ratios)
    return [masks, domains]


def main() -> None:
    """Compiles, writes the JSON and prints the tables."""
    folder = report.parser("domains", __doc__).parse_args().folder
    jax.config.update("jax_platforms", "cpu")
    for message in filter(None, map(missing, (V5E, H200))):
        raise SystemExit(message)
    figures = {"rows": measure_all(remembered(report.read_all("domains")))}
    report.finish("domains", folder, ("flax", "libtpu", "jax-cuda13-plugin"), figures, tables)


if __name__ == "__main__":
    main()
