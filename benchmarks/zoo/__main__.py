"""What the tools of bn_jax do with models of other packages.

``python -m benchmarks.zoo`` makes every check on every model, in a process for each core, prints
the table and writes ``zoo.json``.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from rich.progress import track

from benchmarks import report
from benchmarks.zoo.measuring import MODELS, measure_alone
from benchmarks.zoo.table import tables


def main() -> None:
    """Checks all models, prints the table and writes its figures."""
    folder = report.parser("zoo", __doc__).parse_args().folder
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        # What a process of its own runs may not lie in the module that is run.
        found = track(pool.map(measure_alone, MODELS), "models", total=len(MODELS))
        rows = dict(zip(MODELS, found, strict=True))
    report.finish("zoo", folder, ("jaxlib", "flax", "optax"), {"models": rows}, tables)


if __name__ == "__main__":
    main()
