"""The time of a whole training step on a CPU: the batch norm of bn_jax and Flax's.

``python -m benchmarks.step`` trains small and middle networks in float32 and in bfloat16, with
either batch norm and otherwise the same program. The steps run interleaved in one process, and each
continues from the state of the step before, as in training. It prints the table and writes
``step.json``. Both arms must agree on the first losses before anything is timed.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from rich.progress import Progress
from rich.table import Table

from benchmarks import report
from benchmarks.inference import Network
from benchmarks.startup import FLAX, NORMS, comparison, training_step
from benchmarks.timing import Timing, in_turns, keep_freed_memory
from bn_jax.lab.models import Norm, ResNet, ResNet18, apply_norm

ROUNDS = 30
# Before the timed steps. The running mean then is near the batch mean, as it is in most steps of a
# training, and the guard of the variance does not run.
WARM_UP = 20
MOMENTUM = 0.9
# The relative difference of the first losses, before the steps amplify rounding.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
COMPARED = 2


class MLP(nn.Module):
    """Dense layers with norm and ReLU, and a linear classifier.

    Attributes:
        norm: constructor of the norms.
        widths: features of the hidden layers.
        dtype: of the computation; parameters are float32.
    """

    norm: Norm
    widths: tuple[int, ...] = (256, 256, 256)
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits."""
        for index, width in enumerate(self.widths):
            x = nn.Dense(width, use_bias=False, dtype=self.dtype)(x)
            x = nn.relu(apply_norm(self.norm, x, train, None, self.dtype, f"norm{index}"))
        return nn.Dense(10, dtype=self.dtype)(x)


class Workload(NamedTuple):
    """A network to train.

    Attributes:
        network: its constructor and the shape of a batch.
        steps: how many steps are timed together; a short step alone is within the clock's noise.
    """

    network: Network
    steps: int = 1


WORKLOADS = {
    "MLP, 3 layers of 256, 256 rows": Workload(Network(MLP, (256, 64)), steps=10),
    "ResNet, 3 stages of 2 blocks, 32 images of 8x8": Workload(
        Network(partial(ResNet, 10, (2, 2, 2)), (32, 8, 8, 1)), steps=2
    ),
    "ResNet18, 16 images of 32x32": Workload(Network(partial(ResNet18, 10), (16, 32, 32, 3))),
}


class Training:
    """A training that continues with every call."""

    def __init__(self, workload: Workload, norm: Norm, dtype: str) -> None:
        """Draws the initial state and a batch, and compiles the step."""
        network = workload.network
        make = partial(network.make, dtype=jnp.dtype(dtype))
        program = training_step(network._replace(make=make), partial(norm, momentum=MOMENTUM))
        self.state, (images, labels) = jax.jit(program.make_arguments)()
        self.batch = images, jnp.arange(len(labels)) % 10
        # Without donation, a step allocates a second copy of the state.
        step = jax.jit(program.function, donate_argnums=0)
        self.step = step.lower(self.state, self.batch).compile()
        self.steps = workload.steps

    def advance(self) -> jax.Array:
        """Makes one step and returns its loss."""
        self.state, loss = self.step(self.state, self.batch)
        return loss

    def __call__(self) -> jax.Array:
        """Makes the steps that are timed together and returns the last loss."""
        for _ in range(self.steps - 1):
            self.advance()
        return self.advance()


def require_agreement(found: Mapping[str, list[float]], dtype: str) -> None:
    """Raises if the losses of an arm differ from those of Flax.

    Raises:
        AssertionError: the relative difference is larger than rounding explains.
    """
    for arm, losses in found.items():
        error = np.abs(np.asarray(losses) / np.asarray(found[FLAX]) - 1).max()
        if not error <= TOLERANCES[dtype]:
            raise AssertionError(
                f"{arm} and {FLAX} differ by {error:.1e} in the first losses in {dtype}: they do "
                "not make the same steps and cannot be compared."
            )


def measure(
    workload: Workload,
    dtype: str,
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Trains a network with either batch norm, interleaved.

    Args:
        workload: the network.
        dtype: of the computation; parameters are float32.
        rounds: how often the steps are timed.
        warm_up: how many steps are made before.
        advance: called after every round.

    Returns:
        The time of one step, by arm.
    """
    keep_freed_memory()
    trainings = {arm: Training(workload, norm, dtype) for arm, norm in NORMS.items()}
    require_agreement(
        {arm: [float(one.advance()) for _ in range(COMPARED)] for arm, one in trainings.items()},
        dtype,
    )
    for training in trainings.values():
        for _ in range(warm_up - COMPARED):
            training.advance()
    timings = in_turns(trainings, rounds, advance)
    return {arm: timing.scaled(1 / workload.steps) for arm, timing in timings.items()}


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns the figures of the JSON as a table."""
    rows = {
        f"{name}, {dtype}": by_arm
        for name, by_dtype in figures["steps"].items()
        for dtype, by_arm in by_dtype.items()
    }
    return [comparison("A training step", rows)]


def main() -> None:
    """Measures, writes the JSON and prints the table."""
    folder = report.parser("step", __doc__).parse_args().folder
    jax.config.update("jax_platforms", "cpu")
    found: dict[str, dict[str, Any]] = {name: {} for name in WORKLOADS}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=ROUNDS * len(WORKLOADS) * len(TOLERANCES))
        for name, dtype in product(WORKLOADS, TOLERANCES):
            progress.update(task, description=f"{name}, {dtype}")
            advance = partial(progress.advance, task)
            found[name][dtype] = measure(WORKLOADS[name], dtype, advance=advance)
    figures = {"rounds": ROUNDS, "warm_up": WARM_UP, "steps": found}
    report.finish("step", folder, ("flax", "optax"), figures, tables)


if __name__ == "__main__":
    main()
