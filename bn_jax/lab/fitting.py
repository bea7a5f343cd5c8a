"""The training loop of `bn-jax train`: epochs over a dataset, with reports on the way."""

import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bn_jax import training
from bn_jax.lab.data import Dataset, batches
from bn_jax.training import Batch, Evaluation, TrainState
from bn_jax.training.classification import compile_evaluation, summarize

__all__ = [
    "Report",
    "abstract_state",
    "compile_programs",
    "fit",
    "make_optimizer",
    "make_schedule",
    "shard_dataset",
]


class Report(NamedTuple):
    """The progress of `fit` after `step` steps.

    Attributes:
        step: steps since the start.
        epoch: the number of the epoch, from 1.
        training: means over the steps since the previous report.
        validation: means over the validation part.
        examples: examples that `fit` has trained on since the start.
        seconds: their time, without compilation and evaluation.
    """

    step: int
    epoch: int
    training: Evaluation
    validation: Evaluation
    examples: int
    seconds: float


def make_schedule(learning_rate: float, total_steps: int) -> optax.Schedule:
    """Makes a schedule of a linear warm-up over a tenth of the steps, and a cosine after it.

    Args:
        learning_rate: the highest rate.
        total_steps: number of steps of the whole training, at least 1.

    Returns:
        A function from the number of steps taken to the rate of the next one.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=total_steps // 10,
        decay_steps=total_steps,
    )


def make_optimizer(learning_rate: float, total_steps: int) -> optax.GradientTransformation:
    """Makes SGD with Nesterov momentum 0.9, at the rates of `make_schedule`.

    Args:
        learning_rate: the highest rate.
        total_steps: number of steps of the whole training, at least 1.

    Returns:
        An Optax optimizer.
    """
    schedule = make_schedule(learning_rate, total_steps)
    return optax.sgd(schedule, momentum=0.9, nesterov=True)


def shard_dataset(dataset: Dataset, batch_size: int, mesh: Mesh) -> list[Batch]:
    """Puts every example of a dataset, in order, on the devices of a mesh.

    Args:
        dataset: the examples, the same in every process.
        batch_size: the size of every batch; the last is padded and masked.
        mesh: a mesh made by `bn_jax.training.make_mesh`.

    Returns:
        The batches for `bn_jax.training.evaluate`.

    Raises:
        ValueError: the number of devices does not divide `batch_size`.
    """
    rows = training.process_rows(batch_size, mesh)
    return [training.shard_batch(batch, mesh) for batch in batches(dataset, batch_size, rows=rows)]


def abstract_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: Sequence[int],
    mesh: Mesh,
) -> TrainState:
    """Returns what `bn_jax.training.create_state` returns, without values, so it compiles nothing.

    Args:
        model: as there.
        optimizer: as there.
        image_shape: as there.
        mesh: as there.

    Returns:
        The state, whose leaves are `jax.ShapeDtypeStruct` with their shardings.
    """
    shapes = jax.eval_shape(lambda: training.create_state(model, optimizer, image_shape, 0, mesh))
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), shapes
    )


def compile_programs(
    state: TrainState, train: Dataset, validation: Dataset, mesh: Mesh, batch_size: int
) -> None:
    """Compiles what `fit` runs, so that `fit` with these arguments starts at once.

    It may run in another thread, for the next model while one trains.

    Args:
        state: the state before training; its leaves may be `jax.ShapeDtypeStruct`.
        train: as for `fit`.
        validation: as for `fit`.
        mesh: as for `fit`.
        batch_size: as for `fit`.
    """
    _compile_train_step(state, train, mesh, batch_size)
    compile_evaluation(state, _first_batch(validation, mesh, batch_size))


def fit(
    state: TrainState,
    train: Dataset,
    validation: Dataset,
    mesh: Mesh,
    *,
    batch_size: int,
    epochs: int,
    seed: int | np.random.Generator,
    report_every: int = 5,
    after: Report | None = None,
) -> Iterator[tuple[TrainState, Report]]:
    """Trains a model, and evaluates it for every report.

    Args:
        state: the state before training, replicated over the mesh.
        train: the training part, the same in every process.
        validation: the part that the reports evaluate.
        mesh: the devices; their number divides `batch_size`.
        batch_size: examples in a step; the last batch of an epoch is padded and masked.
        epochs: passes over the training part.
        seed: of the order of the examples; or the generator itself, which an epoch advances before
            its first report.
        report_every: steps between two reports; the last step of an epoch also reports.
        after: the last report of an earlier epoch, to continue from its state and generator. None:
            start from the beginning.

    Yields:
        The state so far, and a report on it.
    """
    steps, past_epochs, examples, seconds = 0, 0, 0, 0.0
    if after is not None:
        steps, past_epochs = after.step, after.epoch
        examples, seconds = after.examples, after.seconds
    if past_epochs >= epochs:
        return
    step = _compile_train_step(state, train, mesh, batch_size)
    validation_batches = shard_dataset(validation, batch_size, mesh)
    rng = np.random.default_rng(seed)
    rows = training.process_rows(batch_size, mesh)
    for epoch in range(past_epochs + 1, epochs + 1):
        epoch_batches = batches(train, batch_size, rng, rows)
        while group := list(itertools.islice(epoch_batches, report_every)):
            start = time.perf_counter()
            state, trained = _take_steps(step, state, group, mesh)
            seconds += time.perf_counter() - start
            steps += len(group)
            examples += trained.examples
            validated = training.evaluate(state, validation_batches)
            yield state, Report(steps, epoch, trained, validated, examples, seconds)


def _compile_train_step(
    state: TrainState, train: Dataset, mesh: Mesh, batch_size: int
) -> jax.stages.Compiled:
    # JAX keeps the programs of a jitted function: compiled ahead, this one is there.
    return _train_step(mesh).lower(state, _first_batch(train, mesh, batch_size)).compile()


@functools.cache
def _train_step(mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(training.train_step, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _first_batch(dataset: Dataset, mesh: Mesh, batch_size: int) -> Batch:
    rows = training.process_rows(batch_size, mesh)
    return training.shard_batch(next(batches(dataset, batch_size, rows=rows)), mesh)


def _take_steps(
    step: jax.stages.Compiled, state: TrainState, group: Sequence[Batch], mesh: Mesh
) -> tuple[TrainState, Evaluation]:
    metrics = []
    for batch in group:
        state, batch_metrics = step(state, training.shard_batch(batch, mesh))
        metrics.append(batch_metrics)
    return state, summarize(metrics)
