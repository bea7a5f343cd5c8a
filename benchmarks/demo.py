"""The demo: `bn-jax train` with its defaults, and `bn-jax eval` of the run, in fresh processes.

``python -m benchmarks.demo`` measures the wall-clock time and the CPU time of each command, what of
it went into tracing, lowering and compiling, and counts the programs. It prints all figures and
writes ``demo.json``. Programs are compiled while others run, so the compiler's seconds overlap.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks import report

PHASES = {
    "trace": "/jax/core/compile/jaxpr_trace_duration",
    "lower": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compile": "/jax/core/compile/backend_compile_duration",
}
# Runs the command whose arguments follow a file, which gets a line for each event of JAX.
RECORDED = """
import json, sys
import jax
file = open(sys.argv.pop(1), "a", buffering=1)
def record(event, seconds, **_):
    file.write(json.dumps([event, seconds]) + chr(10))
jax.monitoring.register_event_duration_secs_listener(record)
from bn_jax.lab.command import main
main()
"""


class Measured(NamedTuple):
    """What a command took.

    Attributes:
        seconds: of wall clock.
        cpu_seconds: summed over all cores. Other programs on the machine disturb them less.
        phases: wall-clock seconds of tracing, lowering and compiling, summed over all programs.
        programs: how many were compiled.
    """

    seconds: float
    cpu_seconds: float
    phases: dict[str, float]
    programs: int


def measure(arguments: Sequence[str], folder: Path) -> Measured:
    """Runs a command in a fresh process.

    Args:
        arguments: of `bn-jax`.
        folder: to run in.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as events:
        start, cpu_start = time.perf_counter(), _children_seconds()
        subprocess.run(
            [sys.executable, "-c", RECORDED, events.name, *arguments],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        seconds, cpu_seconds = time.perf_counter() - start, _children_seconds() - cpu_start
        recorded = [json.loads(line) for line in events]
    by_phase = {
        phase: [taken for name, taken in recorded if name == event]
        for phase, event in PHASES.items()
    }
    return Measured(
        seconds,
        cpu_seconds,
        {phase: sum(taken) for phase, taken in by_phase.items()},
        len(by_phase["compile"]),
    )


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns the figures of the JSON as a table, a command in each row."""
    table = Table(title="Commands in fresh processes", box=SIMPLE_HEAD)
    headers = ("", "seconds", "CPU seconds", *(f"{phase}, s" for phase in PHASES), "programs")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for command, of_command in figures["commands"].items():
        phases = (f"{of_command['phases'][phase]:.1f}" for phase in PHASES)
        table.add_row(
            f"bn-jax {command}",
            f"{of_command['seconds']:.1f}",
            f"{of_command['cpu_seconds']:.1f}",
            *phases,
            str(of_command["programs"]),
        )
    return [table]


def main() -> None:
    """Measures, writes the JSON and prints the table."""
    folder = report.parser("demo", __doc__).parse_args().folder
    with tempfile.TemporaryDirectory() as home:
        commands = {
            "train": measure(["train", "--out", "run"], Path(home)),
            "eval": measure(["eval", "run"], Path(home)),
        }
    packages = ("flax", "optax", "orbax-checkpoint")
    figures = {"commands": {name: found._asdict() for name, found in commands.items()}}
    report.finish("demo", folder, packages, figures, tables)


if __name__ == "__main__":
    main()
