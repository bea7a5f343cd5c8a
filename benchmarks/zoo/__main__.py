"""What the tools of bn_jax do with models of other packages.

``python -m benchmarks.zoo`` makes every check on every model, in a process for each core, prints
the table and writes ``zoo.json``.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
from rich.progress import track

from benchmarks import report
from benchmarks.zoo.measuring import MODELS, measure
from benchmarks.zoo.table import tables


def main() -> None:
    """Checks all models, prints the table and writes its figures."""
    folder = report.parser("zoo", __doc__).parse_args().folder
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = dict(
            zip(MODELS, track(pool.map(_row, MODELS), "models", total=len(MODELS)), strict=True)
        )
    report.finish("zoo", folder, ("jaxlib", "flax", "optax"), {"models": rows}, tables)


def _row(name: str) -> dict[str, Any]:
    # The time goes into compiling.
    jax.config.update("jax_disable_most_optimizations", True)
    row = measure(name)
    return {**row._asdict(), "cells": {check: cell._asdict() for check, cell in row.cells.items()}}


if __name__ == "__main__":
    main()
