"""Training and evaluation of a classifier: cross-entropy over the valid examples of a batch."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bn_jax.training.sharding import Batch
from bn_jax.training.state import TrainState
from bn_jax.training.statistics import is_readable, warn_of_initial
from bn_jax.training.steps import Apply, make_train_step

__all__ = ["Evaluation", "Metrics", "create_state", "eval_step", "evaluate", "train_step"]


class Metrics(NamedTuple):
    """Sums over the valid examples of one or more batches.

    Attributes:
        loss: sum of the cross-entropies.
        correct: number of correct answers.
        examples: number of valid examples.
    """

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array


class Evaluation(NamedTuple):
    """Means over a dataset.

    Attributes:
        loss: mean cross-entropy.
        accuracy: share of correct answers.
        correct: number of correct answers.
        examples: number of examples.
    """

    loss: float
    accuracy: float
    correct: int
    examples: int


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: Sequence[int],
    seed: int,
    mesh: Mesh,
) -> TrainState:
    """Initializes a model and its optimizer, replicated over a mesh.

    Args:
        model: a Linen module called as ``model(x, train=..., mask=...)``.
        optimizer: an Optax optimizer.
        image_shape: [H, W, C] of one image.
        seed: of the initialization, which gives the same parameters on any mesh.
        mesh: a mesh made by `make_mesh`.

    Returns:
        The state before the first step.

    Example:
        >>> import flax.linen as nn, jax, numpy as np, optax, bn_jax as bn
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train, mask=None):
        ...         return nn.Dense(2)(bn.linen.BatchNorm(not train)(x))
        >>> mesh = bn.training.make_mesh(jax.devices()[:1])
        >>> state = bn.training.create_state(Net(), optax.sgd(0.1), (1,), 0, mesh)
        >>> int(state.step), sorted(state.batch_stats)
        (0, ['BatchNorm_0'])
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

    return _run_once(init, mesh)


def _run_once(function: Callable[[], TrainState], mesh: Mesh) -> TrainState:
    """Calls a function under `jit`, and replicates its result over a mesh.

    XLA's CPU compiler optimizes random numbers for three times as long at its default level, to the
    same values. An enclosing program is compiled by its own options.
    """
    options = None
    is_traced = isinstance(jnp.zeros(()), jax.core.Tracer)
    is_optimized = not (is_traced or jax.config.read("jax_disable_most_optimizations"))
    if is_optimized and all(device.platform == "cpu" for device in mesh.devices.flat):
        options = {"xla_backend_optimization_level": 1}
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(function, out_shardings=replicated, compiler_options=options)()


def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Takes one step on the mean cross-entropy over the valid examples of a batch.

    Args:
        state: the state before the step, of a model called as ``model(x, train=..., mask=...)``.
        batch: the examples. Those that `batch.mask` excludes change neither the loss nor the
            statistics.

    Returns:
        The state after the step, and the metrics of the model before it.

    Example:
        >>> import flax.linen as nn, jax, numpy as np, optax, bn_jax as bn, bn_jax.training
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train, mask=None):
        ...         mask = None if mask is None else mask[:, None]
        ...         return nn.Dense(2)(bn.linen.BatchNorm(not train, momentum=0.5)(x, mask=mask))
        >>> mesh = bn.training.make_mesh(jax.devices()[:1])
        >>> state = bn.training.create_state(Net(), optax.sgd(0.1), (1,), 0, mesh)
        >>> batch = bn.training.pad_batch(np.array([[1.0], [3.0]], "float32"), np.array([0, 1]), 4)
        >>> state, metrics = jax.jit(bn.training.train_step)(state, batch)
        >>> int(metrics.examples), state.batch_stats["BatchNorm_0"]["mean"].tolist()
        (2, [1.0])
        >>> bn.training.evaluate(state, [batch]).examples
        2
    """
    state, returned = make_train_step(_mean_loss, has_aux=True)(state, batch)
    _, metrics = returned
    return state, metrics


def _mean_loss(apply: Apply, batch: Batch) -> tuple[jax.Array, Metrics]:
    metrics = measure(apply(batch.x, train=True, mask=batch.mask), batch)
    return metrics.loss / metrics.examples, metrics


def measure(logits: jax.Array, batch: Batch) -> Metrics:
    """Returns the metrics of logits [N, classes] over the valid examples of a batch."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
    return Metrics(
        loss=jnp.sum(losses, where=batch.mask),
        correct=jnp.sum(jnp.argmax(logits, axis=-1) == batch.y, where=batch.mask),
        examples=jnp.sum(batch.mask),
    )


def eval_step(state: TrainState, batch: Batch) -> Metrics:
    """Computes the metrics of a batch with the running statistics.

    Args:
        state: the model's state.
        batch: the examples, those that `batch.mask` excludes being ignored.

    Returns:
        The metrics over the valid examples.

    Example:
        >>> import flax.linen as nn, jax, numpy as np, optax, bn_jax as bn
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train, mask=None):
        ...         return nn.Dense(2)(bn.linen.BatchNorm(not train)(x))
        >>> mesh = bn.training.make_mesh(jax.devices()[:1])
        >>> state = bn.training.create_state(Net(), optax.sgd(0.1), (1,), 0, mesh)
        >>> x, y = np.array([[1.0], [3.0]], "float32"), np.array([0, 1])
        >>> batch = bn.training.pad_batch(x, y, 4)
        >>> int(bn.training.eval_step(state, batch).examples)
        2
    """
    return _measure_model(state.apply_fn, _variables_of(state), batch)


def _measure_model(apply_fn: Callable[..., Any], variables: Any, batch: Batch) -> Metrics:
    return measure(apply_fn(variables, batch.x, train=False), batch)


def _variables_of(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "batch_stats": state.batch_stats}


# Of the model alone: a state with another optimizer needs no other program.
_jitted_measure_model = jax.jit(_measure_model, static_argnums=0)


def jitted_eval_step(state: TrainState, batch: Batch) -> Metrics:
    """Computes what `eval_step` does, in the program that `evaluate` runs."""
    return _jitted_measure_model(state.apply_fn, _variables_of(state), batch)


def evaluate(state: TrainState, sharded_batches: Iterable[Batch]) -> Evaluation:
    """Evaluates a model on a dataset.

    Warns as `warn_if_never_updated` does.

    Args:
        state: the model's state.
        sharded_batches: at least one batch, on the devices that hold the state.

    Returns:
        The means over all valid examples.

    Example:
        >>> import flax.linen as nn, jax, numpy as np, optax, bn_jax as bn
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train, mask=None):
        ...         return nn.Dense(2)(bn.linen.BatchNorm(not train)(x))
        >>> mesh = bn.training.make_mesh(jax.devices()[:1])
        >>> state = bn.training.create_state(Net(), optax.sgd(0.1), (1,), 0, mesh)
        >>> x, y = np.array([[1.0], [3.0]], "float32"), np.array([0, 1])
        >>> batch = bn.training.pad_batch(x, y, 4)
        >>> state, _ = bn.training.train_step(state, batch)
        >>> bn.training.evaluate(state, [batch, batch]).examples
        4
    """
    if is_readable(state.batch_stats):
        warn_of_initial(state.batch_stats, stacklevel=3)
    return summarize([jitted_eval_step(state, batch) for batch in sharded_batches])


def compile_evaluation(state: TrainState, batch: Batch) -> None:
    """Compiles the program of `evaluate` for states and batches of these shapes and shardings.

    Args:
        state: the model's state; leaves may be `jax.ShapeDtypeStruct`.
        batch: like the batches to evaluate; leaves as above.
    """
    _jitted_measure_model.lower(state.apply_fn, _variables_of(state), batch).compile()


def summarize(metrics: Sequence[Metrics]) -> Evaluation:
    """Returns the means over all examples of several batches."""
    on_host = jax.device_get(metrics)
    examples = sum(batch.examples for batch in on_host)
    correct = sum(batch.correct for batch in on_host)
    loss = sum(batch.loss for batch in on_host)
    return Evaluation(
        loss=float(loss / examples),
        accuracy=float(correct / examples),
        correct=int(correct),
        examples=int(examples),
    )
