"""A sweep over learning rates and seeds, on all cores.

``python -m benchmarks.sweep`` trains a small network with batch norm on handwritten digits for
every learning rate and seed of a grid. JAX makes all runs as the experiments of the lab do, with
`bn_jax.lab.experiments.sweeps.sweep`; in one program with `jax.vmap`; and one after another with a
program that is compiled once. PyTorch makes one run after another. All
start from the same parameters and see the same batches. It compares the final losses, prints how
long each way takes, and writes ``sweep.json``.
"""

import gc
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

import bn_jax as bn
from benchmarks import report
from benchmarks.timing import Timing, in_turns
from bn_jax.lab.data import Dataset, load_digits, mean_and_std, standardize
from bn_jax.lab.experiments import parallel
from bn_jax.lab.experiments.sweeps import at_place
from bn_jax.lab.models import Norm

ROUNDS = 3
OURS = "bn_jax"
NORMS: dict[str, Norm] = {OURS: bn.linen.BatchNorm, "flax.linen": nn.BatchNorm}
SWEPT, VMAPPED, SEQUENTIAL = "sweep", "vmapped", "one after another"
WAYS = SWEPT, VMAPPED, SEQUENTIAL
TORCH = f"PyTorch, {SEQUENTIAL}"
# The relative difference of the final losses between the ways of JAX. Another order of summation
# changes a loss by some 1e-7. In a few runs, mostly at high rates, the steps amplify this by 1000.
TOLERANCE = 5e-3


class Sizes(NamedTuple):
    """The grid and the network.

    Attributes:
        rates: learning rates, from 0.001 to 0.3 in equal ratios.
        seeds: seeds of the initial parameters and of the batches.
        steps: number of steps of each run.
        examples: number of examples in each batch.
        width: number of features of both hidden layers.
        torch_runs: number of runs with PyTorch; its time is scaled up.
    """

    rates: int = 64
    seeds: int = 4
    steps: int = 100
    examples: int = 64
    width: int = 64
    torch_runs: int = 32

    @property
    def runs(self) -> int:
        """The number of runs."""
        return self.rates * self.seeds


class Measured(NamedTuple):
    """A way of making all runs.

    Attributes:
        runs: number of runs that were made.
        timing: of all runs, without compiling; scaled up if fewer were made.
        build: of tracing, lowering and compiling; None without a compiler.
        losses: the lowest and the highest final loss.
        difference: the largest relative difference of a final loss from the same run with the same
            norm one after another. PyTorch is compared with bn_jax.
    """

    runs: int
    timing: Timing
    build: Timing | None
    losses: tuple[float, float]
    difference: float


class Net(nn.Module):
    """Two hidden layers with norms."""

    norm: Norm
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits."""
        for _ in range(2):
            normalize = self.norm(use_running_average=not train, momentum=0.9)
            x = nn.relu(normalize(nn.Dense(self.width)(x)))
        return nn.Dense(10)(x)


class Task(NamedTuple):
    """Examples [N, 64], their labels, and the rows of each batch [seeds, steps, n]."""

    x: Any
    y: Any
    rows: Any


def make_task(dataset: Dataset, sizes: Sizes) -> Task:
    """Standardizes images and draws the batches."""
    images, labels = standardize(dataset, *mean_and_std(dataset))
    shape = sizes.seeds, sizes.steps, sizes.examples
    rows = np.random.default_rng(0).integers(len(labels), size=shape)
    return Task(images.reshape(len(images), -1), labels, rows.astype(np.int32))


def grid(sizes: Sizes) -> list[tuple[float, int]]:
    """Returns the learning rate and the seed of each run."""
    rates = np.geomspace(1e-3, 0.3, sizes.rates).astype(np.float32)
    return [(float(rate), seed) for rate in rates for seed in range(sizes.seeds)]


def initial(norm: Norm, sizes: Sizes, task: Task, seed: Any) -> Any:
    """Returns the initial variables of a run."""
    return Net(norm, sizes.width).init(jax.random.key(seed), task.x[:1], train=False)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean loss of the examples."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def train(norm: Norm, sizes: Sizes, task: Task, rate: jax.Array, seed: jax.Array) -> jax.Array:
    """Makes one run, and returns the loss of all examples in evaluation mode."""
    model = Net(norm, sizes.width)
    x, y, rows = map(jnp.asarray, task)

    def step(variables: Any, batch: jax.Array) -> tuple[Any, None]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            given = {**variables, "params": params}
            logits, updated = model.apply(given, x[batch], train=True, mutable=["batch_stats"])
            return cross_entropy(logits, y[batch]), updated

        gradients, updated = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda one, by: one - rate * by, variables["params"], gradients)
        return {"params": params, **updated}, None

    variables, _ = jax.lax.scan(step, initial(norm, sizes, task, seed), rows[seed])
    logits: Any = model.apply(variables, x, train=False)
    return cross_entropy(logits, y)


class _Build:
    """Builds the program of a way of JAX, without caches, and makes the runs."""

    def __init__(self, norm: Norm, way: str, sizes: Sizes, task: Task) -> None:
        self.way = way
        self.sizes = sizes
        self.run = partial(train, norm, sizes, task)
        rates, seeds = zip(*grid(sizes), strict=True)
        self.runs = jnp.asarray(rates, jnp.float32), jnp.asarray(seeds, jnp.int32)
        self.each = list(zip(*self.runs, strict=True))
        self.axes = np.asarray(rates[:: sizes.seeds], np.float32), np.arange(sizes.seeds)

    def forget(self) -> None:
        jax.clear_caches()
        gc.collect()

    def build(self) -> None:
        if self.way == SWEPT:
            run = at_place(self.run, self.sizes.seeds)
            program = parallel.make_program(run, self.sizes.runs, parallel.choose_layout())
            self.compiled = program.lower(*self.axes).compile()
        elif self.way == VMAPPED:
            self.compiled = jax.jit(jax.vmap(self.run)).lower(*self.runs).compile()
        else:
            self.compiled = jax.jit(self.run).lower(*self.each[0]).compile()

    def __call__(self) -> Any:
        if self.way == SWEPT:
            return np.asarray(self.compiled(*self.axes))[: self.sizes.runs]
        if self.way == VMAPPED:
            return self.compiled(*self.runs)
        return [self.compiled(*one) for one in self.each]


def torch_runs(sizes: Sizes) -> list[tuple[float, int]]:
    """Returns the runs that PyTorch makes, spread over the grid."""
    runs = grid(sizes)
    return [runs[i * len(runs) // sizes.torch_runs] for i in range(sizes.torch_runs)]


def torch_train(sizes: Sizes, task: Task, variables: Any, rate: float, seed: int) -> float:
    """Makes one run with PyTorch."""
    import torch

    layers: list[Any] = []
    width = task.x.shape[1]
    for out in (sizes.width, sizes.width):
        layers += [torch.nn.Linear(width, out), torch.nn.BatchNorm1d(out), torch.nn.ReLU()]
        width = out
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, 10))
    for index, linear in enumerate(one for one in model if isinstance(one, torch.nn.Linear)):
        dense = variables["params"][f"Dense_{index}"]
        linear.weight.data = torch.tensor(np.array(dense["kernel"]).T.copy())
        linear.bias.data = torch.tensor(np.array(dense["bias"]))
    x, y, rows = torch.tensor(task.x), torch.tensor(task.y).long(), torch.tensor(task.rows[seed])
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for batch in rows:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(x), y))


def make_torch(sizes: Sizes, task: Task) -> Callable[[], list[float]]:
    """Returns a function that makes PyTorch's runs."""
    make = jax.jit(partial(initial, NORMS[OURS], sizes, task))
    variables = [jax.tree.map(np.asarray, make(seed)) for seed in range(sizes.seeds)]
    return lambda: [
        torch_train(sizes, task, variables[seed], rate, seed) for rate, seed in torch_runs(sizes)
    ]


def measure(
    sizes: Sizes, task: Task, rounds: int, advance: Callable[[], object]
) -> dict[str, Measured]:
    """Builds and makes all runs in every way, interleaved.

    Raises:
        ValueError: the ways of JAX disagree on a run.
    """
    builds = {
        f"{name}, {way}": _Build(norm, way, sizes, task)
        for name, norm in NORMS.items()
        for way in WAYS
    }
    phases = {
        f"{arm}: {phase}": getattr(one, phase)
        for arm, one in builds.items()
        for phase in ("forget", "build")
    }
    built = in_turns(phases, rounds, advance)
    functions: dict[str, Callable[[], Any]] = dict(builds)
    if find_spec("torch") is not None:
        functions[TORCH] = make_torch(sizes, task)
    losses = {arm: np.asarray(function(), np.float64) for arm, function in functions.items()}
    timings = in_turns(functions, rounds, advance)
    return {
        arm: Measured(
            runs=len(losses[arm]),
            timing=timings[arm].scaled(sizes.runs / len(losses[arm])),
            build=built.get(f"{arm}: build"),
            losses=(losses[arm].min(), losses[arm].max()),
            difference=difference(arm, losses, sizes),
        )
        for arm in functions
    }


def difference(arm: str, losses: Mapping[str, Any], sizes: Sizes) -> float:
    """Returns the largest relative difference of the losses of an arm from the expected ones.

    Raises:
        ValueError: for an arm of JAX, the difference is more than `TOLERANCE`.
    """
    if arm == TORCH:
        expected = dict(zip(grid(sizes), losses[f"{OURS}, {SEQUENTIAL}"], strict=True))
        reference = np.array([expected[run] for run in torch_runs(sizes)])
    else:
        reference = losses[f"{arm.split(', ')[0]}, {SEQUENTIAL}"]
    found = float(np.abs(losses[arm] / reference - 1).max())
    if arm != TORCH and not found <= TOLERANCE:
        raise ValueError(f"{arm}: a final loss is off by {found}, expected {TOLERANCE} at most")
    return found


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns the figures of the JSON as a table."""
    sizes = Sizes(**figures["sizes"])
    title = (
        f"{sizes.runs} runs ({sizes.rates} learning rates, {sizes.seeds} seeds) of {sizes.steps} "
        f"steps on {sizes.examples} examples"
    )
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in ("", "s (quartiles)", "ms per run", "times sweep", "build, s", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    fastest = figures["arms"][f"{OURS}, {SWEPT}"]["timing"]["quartiles"][1]
    for arm, one in figures["arms"].items():
        low, median, high = one["timing"]["quartiles"]
        part = "" if one["runs"] == sizes.runs else f" (scaled up from {one['runs']} runs)"
        table.add_row(
            arm + part,
            f"{median:.2f} ({low:.2f} to {high:.2f})",
            f"{1e3 * median / sizes.runs:.1f}",
            f"{median / fastest:.2f}",
            f"{one['build']['quartiles'][1]:.2f}" if one["build"] else "-",
            f"{one['difference']:.0e}",
        )
    return [table]


def main() -> None:
    """Measures, writes the JSON and prints the table."""
    folder = report.parser("sweep", __doc__).parse_args().folder
    jax.config.update("jax_platforms", "cpu")
    parallel.request_devices()
    sizes = Sizes()
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=2 * ROUNDS)
        advance = partial(progress.advance, task)
        arms = measure(sizes, make_task(load_digits(), sizes), ROUNDS, advance)
    figures = {"rounds": ROUNDS, "sizes": sizes, "tolerance": TOLERANCE, "arms": arms}
    report.finish("sweep", folder, ("flax", "optax", "scikit-learn", "torch"), figures, tables)
    if TORCH not in arms:
        print("PyTorch was left out. Install it with: python -m pip install torch")


if __name__ == "__main__":
    main()
