"""The error of the variance against the offset of the input, for the figure of the documentation.

``python -m benchmarks.offsets`` prints the table and writes ``offsets.json``. Each layer takes one
training step on float32 input ``offset + N(0, 1)``, from running statistics of mean 0 and variance
1. With momentum 0, its new running variance is the variance of the batch. The truth is computed in
float64 from the stored values.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table

from benchmarks import report
from benchmarks.adversarial import Batch, Layer
from benchmarks.numerics import OURS, compiled

ROWS, FEATURES, SEEDS = 4096, 64, 3
OFFSETS = tuple(float(offset) for offset in np.logspace(0, 6, 13).round(2))
# What the legend calls the layers, and what `benchmarks.numerics` does.
JAX_LAYERS = {"bn_jax": OURS, "Flax": "flax.linen", "Haiku": "haiku"}
PYTORCH = "PyTorch"


def make(offset: float, seed: int) -> Batch:
    """Returns the arrays of one training step."""
    noise = np.random.default_rng(seed).standard_normal((ROWS, FEATURES))
    zeros, ones = np.zeros(FEATURES, np.float32), np.ones(FEATURES, np.float32)
    return Batch((offset + noise).astype(np.float32), None, ones, zeros, zeros, ones)


def variance_of(name: str, batch: Batch) -> np.ndarray:
    """Returns the variance of the batch, as a layer takes it."""
    if name == PYTORCH:
        return _pytorch(batch)
    return np.asarray(compiled(JAX_LAYERS[name], Layer())(batch)[1], np.float64)


def _pytorch(batch: Batch) -> np.ndarray:
    import torch

    layer = torch.nn.BatchNorm1d(FEATURES, momentum=1.0)
    layer(torch.from_numpy(batch.x))
    # PyTorch stores the unbiased variance.
    return layer.running_var.double().numpy() * (ROWS - 1) / ROWS


def error(name: str, offset: float) -> float:
    """Returns the largest relative error of the variance, over features and seeds."""
    errors = []
    for seed in range(SEEDS):
        batch = make(offset, seed)
        truth = batch.x.astype(np.float64).var(0)
        errors.append(float((np.abs(variance_of(name, batch) - truth) / truth).max()))
    return max(errors)


def installed_layers() -> tuple[str, ...]:
    """Returns the names of all layers whose package is installed."""
    packages = {"Haiku": "haiku", PYTORCH: "torch"}
    known = (*JAX_LAYERS, PYTORCH)
    return tuple(name for name in known if name not in packages or find_spec(packages[name]))


def tables(known: Mapping[str, Any]) -> list[Table]:
    """Returns the figures of the JSON as a table."""
    table = Table(
        title="Largest relative error of the variance, by the offset in standard deviations",
        box=SIMPLE_HEAD,
    )
    table.add_column("offset", justify="right")
    for name in known["errors"]:
        table.add_column(name, justify="right")
    for number, offset in enumerate(known["offsets"]):
        table.add_row(f"{offset:,g}", *(f"{of[number]:.1e}" for of in known["errors"].values()))
    return [table]


def main() -> None:
    """Measures, writes the JSON and prints the table."""
    folder = report.parser("offsets", __doc__).parse_args().folder
    errors = {
        name: [error(name, offset) for offset in OFFSETS]
        for name in track(installed_layers(), transient=True)
    }
    figures = {
        "rows": ROWS,
        "features": FEATURES,
        "seeds": SEEDS,
        "offsets": OFFSETS,
        "errors": errors,
    }
    report.finish("offsets", folder, ("flax", "numpy", "dm-haiku", "torch"), figures, tables)


if __name__ == "__main__":
    main()
