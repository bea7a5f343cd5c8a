"""How far each batch norm is from float64 where batch norms go wrong.

``python -m benchmarks.numerics`` prints tables and writes ``benchmarks/results/numerics.json``.
"""

import json
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import bn_jax as bn

RESULTS = Path(__file__).parent / "results" / "numerics.json"
OFFSETS = (0.0, 1e2, 1e3, 1e4, 1e5, 1e6)
ROWS, FEATURES = 4096, 64
SHARDS = np.arange(8, dtype=np.float32).reshape(2, 4, 1) ** 2 / 4


def _linen(kind: Callable[..., nn.Module], x: jax.Array, **options: Any) -> jax.Array:
    layer = kind(use_running_average=False, **options)
    variables = layer.init(jax.random.key(0), x)
    return layer.apply(variables, x, mutable=["batch_stats"])[0]


def _nnx(kind: Callable[..., Callable[..., jax.Array]], x: jax.Array) -> jax.Array:
    return kind(x.shape[-1], rngs=nnx.Rngs(0))(x)


CONTESTANTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "bn_jax": partial(_linen, bn.linen.BatchNorm),
    "flax.linen": partial(_linen, nn.BatchNorm),
    "flax.linen two-pass": partial(_linen, nn.BatchNorm, use_fast_variance=False),
    "flax.nnx": partial(_nnx, nnx.BatchNorm),
}


def output_error(function: Callable[[jax.Array], jax.Array], offset: float) -> float:
    """Returns the largest error of the output for ``offset + N(0, 1)`` in float32."""
    noise = np.random.default_rng(0).standard_normal((ROWS, FEATURES))
    x = (noise + offset).astype(np.float32)
    exact = np.float64(x)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    return float(np.abs(np.float64(function(jnp.asarray(x))) - expected).max())


def synchronized_mean(kind: Callable[..., nn.Module], valid: np.ndarray) -> float | None:
    """Trains one step on two shards of four masked rows.

    Returns:
        The mean that the statistics were updated with, or None where it or an output is NaN.
    """
    layer = kind(use_running_average=False, axis_name="data", momentum=0.0)
    variables = layer.init(jax.random.key(0), SHARDS[0])

    def train(x: jax.Array, mask: jax.Array) -> Any:
        return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

    mapped = jax.vmap(train, axis_name="data")
    y, updates = mapped(jnp.asarray(SHARDS), jnp.asarray(valid.reshape(SHARDS.shape)))
    mean = updates["batch_stats"]["mean"][0, 0]
    return float(mean) if jnp.isfinite(mean) & jnp.isfinite(y).all() else None


def measure() -> dict[str, Any]:
    """Returns every figure of the tables, with versions and the command."""
    masks = {
        "5 of 8 rows valid": np.array([1, 1, 1, 1, 1, 0, 0, 0], bool),
        "one shard fully masked": np.array([1, 1, 1, 1, 0, 0, 0, 0], bool),
    }
    return {
        "command": "python -m benchmarks.numerics",
        "versions": {name: version(name) for name in ("bn-jax", "jax", "flax", "numpy")},
        "machine": f"{platform.machine()}, {jax.default_backend()}",
        "offset": {
            name: {f"{offset:g}": output_error(function, offset) for offset in OFFSETS}
            for name, function in CONTESTANTS.items()
        },
        "masked shards": {
            case: {
                "true mean": float(SHARDS.ravel()[valid].mean()),
                "bn_jax": synchronized_mean(bn.linen.BatchNorm, valid),
                "flax.linen": synchronized_mean(nn.BatchNorm, valid),
            }
            for case, valid in masks.items()
        },
    }


def show(found: dict[str, Any]) -> None:
    """Prints the tables."""
    console = Console()
    table = Table(title=f"Largest output error, x = offset + N(0, 1), {ROWS} rows, float32")
    table.add_column("offset", justify="right")
    for name in found["offset"]:
        table.add_column(name, justify="right")
    for offset in found["offset"]["bn_jax"]:
        row = (f"{errors[offset]:.1e}" for errors in found["offset"].values())
        table.add_row(offset, *row)
    console.print(table)
    table = Table(title="Synchronized over 2 devices of 4 rows")
    for column in ("case", "true mean", "bn_jax", "flax.linen"):
        table.add_column(column, justify="right")
    for case, row in found["masked shards"].items():
        table.add_row(case, *("NaN" if mean is None else f"{mean:.3f}" for mean in row.values()))
    console.print(table)


def main() -> None:
    """Measures, writes the JSON and prints the tables."""
    found = measure()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    show(found)


if __name__ == "__main__":
    main()
