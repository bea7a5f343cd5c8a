"""Start-up time: import, tracing, lowering and compiling, and the overhead of a call.

``python -m benchmarks.startup`` imports in fresh processes. It builds the training step of a
ResNet-50 phase by phase with the batch norm of bn_jax and with Flax's, and clears all caches in
between. It calls the modules on an array so small that only the call takes time. It also counts
equations and operations, which do not depend on the machine. It prints all figures and writes
``startup.json``.
"""

import gc
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

import bn_jax as bn
from benchmarks import report
from benchmarks.inference import Network
from benchmarks.timing import Timing, in_turns
from bn_jax import training
from bn_jax.lab.models import Norm, ResNet50

IMPORT_ROUNDS = 5
STEP_ROUNDS = 3
CALL_ROUNDS = 30
OURS, FLAX = "bn_jax", "Flax"
NORMS: dict[str, Norm] = {OURS: bn.linen.BatchNorm, FLAX: nn.BatchNorm}
# What each arm imports, and what is imported before that.
IMPORTS = {
    "jax": ("jax", "sys"),
    FLAX: ("flax.linen, flax.nnx", "jax"),
    OURS: ("bn_jax", "flax.linen, flax.nnx"),
}
PHASES = ("trace", "lower", "compile")
TIMED_IMPORT = """
import time
import {before}
start = time.perf_counter(), time.process_time()
import {modules}
print(time.perf_counter() - start[0], time.process_time() - start[1])
"""
DTYPES = ("float32", "bfloat16")
SHAPE = (8, 64, 64, 3)
LAYER_SHAPE = (8, 16, 16, 64)
CALL_SHAPE = (2, 3)


class Program(NamedTuple):
    """A function, and a function that makes its arguments and works under `jax.eval_shape`."""

    function: Callable[..., Any]
    make_arguments: Callable[[], tuple[Any, ...]]


class Size(NamedTuple):
    """The size of a program before XLA sees it.

    Attributes:
        equations: of the jaxpr and of all nested jaxprs.
        operations: of the StableHLO module.
    """

    equations: int
    operations: int


class Built(NamedTuple):
    """The size of a program, and the time of every phase of building it."""

    size: Size
    phases: dict[str, Timing]


def forward_and_backward(module: nn.Module, shape: tuple[int, ...], dtype: Any) -> Program:
    """Returns output, new statistics and gradients of a module whose only argument is x."""

    def run(variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> Any:
            return module.apply({**variables, "params": params}, x, mutable="batch_stats")

        y, pullback, updated = jax.vjp(forward, variables["params"], x, has_aux=True)
        return y, updated, pullback(cotangent)

    def make_arguments() -> tuple[Any, ...]:
        x, cotangent = jax.random.normal(jax.random.key(0), (2, *shape), dtype)
        return module.init(jax.random.key(1), x), x, cotangent

    return Program(run, make_arguments)


def layer(norm: Norm, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Program:
    """Returns a norm in training, forward and backward."""
    return forward_and_backward(norm(use_running_average=False, dtype=dtype), shape, dtype)


def training_step(network: Network, norm: Norm | None) -> Program:
    """Returns a step of SGD with momentum on the cross-entropy of a batch."""
    model = network.make(norm=norm)

    def loss(apply: training.Apply, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, labels = batch
        logits = apply(images, train=True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def make_arguments() -> tuple[Any, ...]:
        images = jax.random.normal(jax.random.key(0), network.shape)
        state = training.TrainState.create(
            apply_fn=model.apply,
            tx=optax.sgd(0.1, momentum=0.9),
            **model.init(jax.random.key(1), images, train=False),
        )
        return state, (images, jnp.zeros(len(images), jnp.int32))

    return Program(training.make_train_step(loss), make_arguments)


def import_seconds(modules: str, before: str) -> tuple[float, float]:
    """Imports modules in a fresh process after others; returns wall-clock and CPU seconds."""
    program = TIMED_IMPORT.format(modules=modules, before=before)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, cpu_seconds = map(float, done.stdout.split())
    return seconds, cpu_seconds


def measure_imports(rounds: int, advance: Callable[[], object]) -> dict[str, Timing]:
    """Times the imports interleaved."""
    functions = {arm: partial(import_seconds, *modules) for arm, modules in IMPORTS.items()}
    return in_turns(functions, rounds, advance, measure=lambda function: function())


def count_equations(jaxpr: Jaxpr) -> int:
    """Returns the number of equations of a jaxpr and of all nested jaxprs."""

    def inside(option: Any) -> int:
        if isinstance(option, (tuple, list)):
            return sum(map(inside, option))
        if isinstance(option, ClosedJaxpr):
            return count_equations(option.jaxpr)
        return count_equations(option) if isinstance(option, Jaxpr) else 0

    return sum(1 + sum(map(inside, equation.params.values())) for equation in jaxpr.eqns)


class _Build:
    """Builds a program phase by phase, without caches from earlier builds."""

    def __init__(self, program: Program) -> None:
        self.function = program.function
        self.arguments = jax.eval_shape(program.make_arguments)

    def forget(self) -> None:
        jax.clear_caches()
        gc.collect()

    def trace(self) -> None:
        self.traced = jax.jit(self.function).trace(*self.arguments)

    def lower(self) -> None:
        self.lowered = self.traced.lower()

    def compile(self) -> None:
        self.compiled = self.lowered.compile()

    def size(self) -> Size:
        operations = re.findall(r"\bstablehlo\.\w+", self.lowered.as_text())
        return Size(count_equations(self.traced.jaxpr.jaxpr), len(operations))


def measure_size(program: Program) -> Size:
    """Traces and lowers a program, and returns its size."""
    build = _Build(program)
    build.trace()
    build.lower()
    return build.size()


def measure_layers(dtype: str) -> dict[str, Size]:
    """Returns the size of a layer of every arm."""
    return {arm: measure_size(layer(norm, LAYER_SHAPE, dtype)) for arm, norm in NORMS.items()}


def measure_steps(network: Network, rounds: int, advance: Callable[[], object]) -> dict[str, Built]:
    """Builds the training step of a network with all arms interleaved."""
    builds = {arm: _Build(training_step(network, norm)) for arm, norm in NORMS.items()}
    functions = {
        f"{arm} {phase}": getattr(build, phase)
        for arm, build in builds.items()
        for phase in ("forget", *PHASES)
    }
    timings = in_turns(functions, rounds, advance)
    return {
        arm: Built(build.size(), {phase: timings[f"{arm} {phase}"] for phase in PHASES})
        for arm, build in builds.items()
    }


def calls(shape: tuple[int, ...]) -> dict[str, dict[str, Callable[[], Any]]]:
    """Returns calls of the modules in training, by kind and arm."""
    x = jnp.arange(2.0)[:, None] * jnp.ones(shape)
    compiled = nnx.jit(lambda module, x: module(x))
    found: dict[str, dict[str, Callable[[], Any]]] = {
        kind: {} for kind in ("nnx", "nnx, nnx.jit", "linen")
    }
    modules = {OURS: (bn.nnx, bn.linen), FLAX: (nnx, nn)}
    for arm, (of_nnx, of_linen) in modules.items():
        module = of_nnx.BatchNorm(shape[-1], rngs=nnx.Rngs(0))
        found["nnx"][arm] = partial(module, x)
        found["nnx, nnx.jit"][arm] = partial(compiled, module, x)
        linen = of_linen.BatchNorm(use_running_average=False)
        variables = linen.init(jax.random.key(0), x)
        found["linen"][arm] = partial(linen.apply, variables, x, mutable=["batch_stats"])
    return found


def measure_calls(shape: tuple[int, ...], rounds: int) -> dict[str, dict[str, Timing]]:
    """Times the calls interleaved, after a first call that compiles."""
    found = {}
    for kind, functions in calls(shape).items():
        for function in functions.values():
            function()
        found[kind] = in_turns(functions, rounds)
    return found


def comparison(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns timings as a table: milliseconds of both arms, and the ratio of ours to Flax's."""
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in ("", f"{OURS}, ms (quartiles)", f"{FLAX}, ms (quartiles)", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in rows.items():
        ours, flax = row[OURS]["quartiles"], row[FLAX]["quartiles"]
        cells = report.milliseconds(ours), report.milliseconds(flax), f"{ours[1] / flax[1]:.2f}"
        table.add_row(name, *cells)
    return table


def import_table(imports: Mapping[str, Any]) -> Table:
    """Returns the table of the imports, each after the modules that it needs."""
    table = Table(title="Imports in fresh processes", box=SIMPLE_HEAD)
    for column in ("", "ms (quartiles)", "CPU ms (quartiles)"):
        table.add_column(column, justify="right", no_wrap=True)
    for arm, timing in imports.items():
        modules, before = IMPORTS[arm]
        cells = map(report.milliseconds, (timing["quartiles"], timing["cpu_quartiles"]))
        table.add_row(f"import {modules}, after {before}", *cells)
    return table


def size_table(sizes: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns the table of the sizes of programs before XLA sees them."""
    table = Table(title="Before XLA: jaxpr equations / StableHLO operations", box=SIMPLE_HEAD)
    for column in ("", OURS, FLAX, "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, by_arm in sizes.items():
        ours, flax = (tuple(by_arm[arm].values()) for arm in (OURS, FLAX))
        cells = [" / ".join(f"{one:,}" for one in size) for size in (ours, flax)]
        ratio = " / ".join(f"{one / other:.2f}" for one, other in zip(ours, flax, strict=True))
        table.add_row(name, *cells, ratio)
    return table


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns the figures of the JSON as tables: imports, sizes, build phases, calls."""
    phases, sizes = {}, {}
    for dtype, steps in figures["steps"].items():
        for phase in PHASES:
            of_phase = {arm: step["phases"][phase] for arm, step in steps.items()}
            phases[f"{phase}, {dtype}"] = of_phase
        sizes[f"layer, forward and backward, {dtype}"] = figures["layers"][dtype]
        sizes[f"training step, {dtype}"] = {arm: step["size"] for arm, step in steps.items()}
    return [
        import_table(figures["imports"]),
        size_table(sizes),
        comparison("Building the training step of a ResNet-50", phases),
        comparison("A call in training on 2 examples of 3 features", figures["calls"]),
    ]


def main() -> None:
    """Measures, writes the JSON and prints the tables."""
    folder = report.parser("startup", __doc__).parse_args().folder
    jax.config.update("jax_platforms", "cpu")
    with Progress(transient=True) as progress:
        rounds = IMPORT_ROUNDS + STEP_ROUNDS * len(DTYPES)
        task = progress.add_task("calls", total=rounds)
        advance = partial(progress.advance, task)
        found_calls = measure_calls(CALL_SHAPE, CALL_ROUNDS)
        progress.update(task, description="imports")
        imports = measure_imports(IMPORT_ROUNDS, advance)
        progress.update(task, description="training step")
        steps = {
            dtype: measure_steps(
                Network(partial(ResNet50, 1000, dtype=dtype), SHAPE), STEP_ROUNDS, advance
            )
            for dtype in DTYPES
        }
    figures = {
        "rounds": {"imports": IMPORT_ROUNDS, "steps": STEP_ROUNDS, "calls": CALL_ROUNDS},
        "imports": imports,
        "layers": {dtype: measure_layers(dtype) for dtype in DTYPES},
        "steps": steps,
        "calls": found_calls,
    }
    report.finish("startup", folder, ("flax", "optax"), figures, tables)


if __name__ == "__main__":
    main()
