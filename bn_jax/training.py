"""Data-parallel training: one jitted step over a mesh, exact whatever the padding and devices."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bn_jax.data import Batch, Dataset, batches

DATA_AXIS = "data"


class TrainState(train_state.TrainState):
    """Flax's train state with the `batch_stats` collection, which is `{}` for a model without."""

    batch_stats: Any


class Metrics(NamedTuple):
    """Sums over the valid examples of one or more batches."""

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array


class Evaluation(NamedTuple):
    """Means over a dataset, and the numbers of correct answers and of examples."""

    loss: float
    accuracy: float
    correct: int
    examples: int


class Report(NamedTuple):
    """What `fit` has reached after `step` steps.

    `training` covers the steps since the report before. `examples` and `seconds` count training
    from the start of `fit`, without compilation and without evaluation.
    """

    step: int
    epoch: int
    training: Evaluation
    validation: Evaluation
    examples: int
    seconds: float


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of one axis, "data".

    Args:
        devices: the devices to use. None: all, of every process.

    Returns:
        A mesh over them, whose axis XLA partitions automatically.
    """
    return Mesh(np.array(jax.devices() if devices is None else devices), (DATA_AXIS,))


def process_rows(batch_size: int, mesh: Mesh) -> slice:
    """Says which rows of a batch lie on the devices of this process.

    Args:
        batch_size: examples in a batch, over all devices.
        mesh: a mesh made by `make_mesh`, in which the devices of a process follow one another.

    Returns:
        The rows that this process hands to `shard_batch`; all, where it is the only process.
    """
    mine = [device.process_index == jax.process_index() for device in mesh.devices.flat]
    start = mine.index(True)
    return slice(start * batch_size // mesh.size, (start + sum(mine)) * batch_size // mesh.size)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Splits the leading axis of a batch over the devices of a mesh.

    Args:
        batch: leaves [N, ...]; with several processes, the `process_rows` of this one.
        mesh: a mesh made by `make_mesh`.

    Returns:
        The batch on the devices; of all processes, where there are several.

    Raises:
        ValueError: the number of devices does not divide N.
    """
    devices = mesh.local_mesh.size
    if len(batch.y) % devices:
        raise ValueError(
            f"batch has {len(batch.y)} examples, expected a multiple of the mesh's {devices} "
            "devices; pad it with `pad_batch`"
        )
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return Batch(*(jax.make_array_from_process_local_data(sharding, leaf) for leaf in batch))


def shard_dataset(dataset: Dataset, batch_size: int, mesh: Mesh) -> list[Batch]:
    """Puts every example of a dataset, in order, on the devices of a mesh.

    Args:
        dataset: the examples, the same in every process.
        batch_size: the size of every batch; the last is padded and masked.
        mesh: a mesh made by `make_mesh`.

    Returns:
        The batches for `evaluate`.

    Raises:
        ValueError: the number of devices does not divide `batch_size`.
    """
    rows = process_rows(batch_size, mesh)
    return [shard_batch(batch, mesh) for batch in batches(dataset, batch_size, rows=rows)]


def make_optimizer(learning_rate: float, total_steps: int) -> optax.GradientTransformation:
    """Makes SGD with Nesterov momentum 0.9, a linear warm-up over a tenth of the steps, and cosine.

    Args:
        learning_rate: the highest rate.
        total_steps: number of steps of the whole training, at least 1.

    Returns:
        An Optax optimizer.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=total_steps // 10,
        decay_steps=total_steps,
    )
    return optax.sgd(schedule, momentum=0.9, nesterov=True)


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: Sequence[int],
    seed: int,
    mesh: Mesh,
) -> TrainState:
    """Initializes a model and its optimizer, replicated over a mesh.

    Args:
        model: a Linen module called as `model(x, train=..., mask=...)`.
        optimizer: an Optax optimizer.
        image_shape: [H, W, C] of one image.
        seed: of the initialization; it gives the same parameters on any mesh.
        mesh: a mesh made by `make_mesh`.

    Returns:
        The state before the first step.
    """

    def init() -> TrainState:
        images = jnp.zeros((1, *image_shape))
        variables = model.init(jax.random.key(seed), images, train=False)
        return TrainState.create(
            apply_fn=model.apply,
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            tx=optimizer,
        )

    return jax.jit(init, out_shardings=NamedSharding(mesh, PartitionSpec()))()


def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Takes one step on the mean cross-entropy over the valid examples of a batch.

    Args:
        state: the state before the step.
        batch: examples of which `batch.mask` are valid; the others enter neither the loss nor the
            statistics.

    Returns:
        The state after the step, and the metrics of the model before it.
    """

    def mean_loss(params: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch.x,
            train=True,
            mask=batch.mask,
            mutable=["batch_stats"],
        )
        metrics = _metrics(logits, batch)
        return metrics.loss / metrics.examples, (metrics, updates)

    gradients, (metrics, updates) = jax.grad(mean_loss, has_aux=True)(state.params)
    batch_stats = updates.get("batch_stats", {})
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats), metrics


def eval_step(state: TrainState, batch: Batch) -> Metrics:
    """Computes the metrics of a batch with the running statistics.

    Args:
        state: the model's state.
        batch: examples of which `batch.mask` are valid.

    Returns:
        The metrics over the valid examples.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return _metrics(state.apply_fn(variables, batch.x, train=False), batch)


def _metrics(logits: jax.Array, batch: Batch) -> Metrics:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
    return Metrics(
        loss=jnp.sum(losses, where=batch.mask),
        correct=jnp.sum(jnp.argmax(logits, axis=-1) == batch.y, where=batch.mask),
        examples=jnp.sum(batch.mask),
    )


_jitted_eval_step = jax.jit(eval_step)


def evaluate(state: TrainState, sharded_batches: Iterable[Batch]) -> Evaluation:
    """Evaluates a model on a dataset.

    Args:
        state: the model's state.
        sharded_batches: at least one batch, on the devices that hold the state.

    Returns:
        The means over all valid examples.
    """
    return _summary([_jitted_eval_step(state, batch) for batch in sharded_batches])


def _summary(metrics: Sequence[Metrics]) -> Evaluation:
    loss, correct, examples = (sum(sums) for sums in zip(*jax.device_get(metrics), strict=True))
    return Evaluation(
        float(loss / examples), float(correct / examples), int(correct), int(examples)
    )


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
    """Trains a model; each report also evaluates it.

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
        after: the last report of an epoch, to go on after it from its state and generator. None:
            from the start.

    Yields:
        The state so far and a report on it.
    """
    step = _compile_train_step(state, train, mesh, batch_size)
    validation_batches = shard_dataset(validation, batch_size, mesh)
    rng = np.random.default_rng(seed)
    rows = process_rows(batch_size, mesh)
    steps, past_epochs, examples, seconds = (
        (after.step, after.epoch, after.examples, after.seconds) if after else (0, 0, 0, 0.0)
    )
    for epoch in range(past_epochs + 1, epochs + 1):
        epoch_batches = batches(train, batch_size, rng, rows)
        while group := list(itertools.islice(epoch_batches, report_every)):
            start = time.perf_counter()
            state, training = _take_steps(step, state, group, mesh)
            seconds += time.perf_counter() - start
            steps += len(group)
            examples += training.examples
            validated = evaluate(state, validation_batches)
            yield state, Report(steps, epoch, training, validated, examples, seconds)


def _compile_train_step(
    state: TrainState, train: Dataset, mesh: Mesh, batch_size: int
) -> jax.stages.Compiled:
    rows = process_rows(batch_size, mesh)
    batch = shard_batch(next(batches(train, batch_size, rows=rows)), mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(train_step, out_shardings=replicated).lower(state, batch).compile()


def _take_steps(
    step: jax.stages.Compiled, state: TrainState, group: Sequence[Batch], mesh: Mesh
) -> tuple[TrainState, Evaluation]:
    metrics = []
    for batch in group:
        state, batch_metrics = step(state, shard_batch(batch, mesh))
        metrics.append(batch_metrics)
    return state, _summary(metrics)
