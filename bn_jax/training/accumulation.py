"""A training step on a batch that does not fit into memory: micro-batches, one after another."""

import math
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from bn_jax.training.classification import Metrics, measure
from bn_jax.training.sharding import Batch
from bn_jax.training.state import TrainState

__all__ = ["accumulated_train_step"]

Collections: TypeAlias = dict[str, Any]


class _Sums(NamedTuple):
    """The sums over one or more micro-batches.

    Attributes:
        metrics: those of the model.
        updates: ``batch_moments``, the moments of all norms, merged over the micro-batches; and
            ``batch_stats``, updated by these moments. A model without norms has neither.
    """

    metrics: Metrics
    updates: Collections

    @property
    def moments(self) -> Any:
        return self.updates.get("batch_moments", {})


def accumulated_train_step(
    state: TrainState,
    batch: Batch,
    micro_batches: int,
    *,
    whole_batch_statistics: bool = False,
) -> tuple[TrainState, Metrics]:
    """Takes the step of `train_step` over micro-batches, one after another in a `lax.scan`.

    Micro-batch k holds the examples k, k + micro_batches, ..., so that each of several devices has
    its share of every micro-batch. The gradient is that of the mean over all valid examples. The
    running statistics are updated once, by the merged moments of all micro-batches.

    By default, each micro-batch is normalized by its own statistics, as with
    ``virtual_batch_size`` in one batch. With `whole_batch_statistics`, all are normalized by the
    statistics of the whole batch, and loss, gradient and statistics are those of `train_step`. Both
    need the memory of one micro-batch. But the moments of a layer depend on those of the layers
    before it, so they are measured layer by layer: with L norms in a row, L more passes over the
    batch, forward and backward.

    Args:
        state: the state before the step; its batch norms are `bn_jax.linen.BatchNorm`.
        batch: the examples, valid where `batch.mask` is True, in any order.
        micro_batches: their number, a divisor of the number of examples.
        whole_batch_statistics: whether to normalize by the statistics of the whole batch.

    Returns:
        The state after the step, and the metrics of the model before it.

    Raises:
        ValueError: `micro_batches` does not divide the examples, or the model has running
            statistics whose moments it does not collect.

    Example:
        >>> import flax.linen as nn, jax, numpy as np, optax, bn_jax as bn
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train, mask=None):
        ...         return nn.Dense(2)(bn.linen.BatchNorm(not train, momentum=0.0)(x))
        >>> mesh = bn.training.make_mesh(jax.devices()[:1])
        >>> state = bn.training.create_state(Net(), optax.sgd(0.1), (1,), 0, mesh)
        >>> x, y = np.array([[1.0], [3.0], [5.0], [7.0]], "float32"), np.array([0, 1, 0, 1])
        >>> batch = bn.training.pad_batch(x, y, 4)
        >>> state, _ = bn.training.accumulated_train_step(state, batch, micro_batches=2)
        >>> state.batch_stats["BatchNorm_0"]["mean"].tolist()
        [4.0]
    """
    parts = _split_batch(batch, micro_batches)
    nothing = _sums_of_nothing(state, parts)
    examples = jnp.sum(batch.mask)
    if whole_batch_statistics:
        gradients, sums = _whole_batch_gradients(state, parts, nothing, examples)
    else:
        gradients, sums = _micro_batch_gradients(state, parts, nothing, examples)
    batch_stats = sums.updates.get("batch_stats", {})
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats), sums.metrics


def _split_batch(batch: Batch, micro_batches: int) -> Batch:
    """Returns the micro-batches on a new first axis of every leaf."""
    examples = batch.y.shape[0]
    if micro_batches < 1 or examples % micro_batches != 0:
        advice = "choose a divisor, or pad the batch with bn_jax.training.pad_batch"
        if micro_batches > 1 and not isinstance(examples, int):
            advice = f"the number is symbolic, so export with {micro_batches * examples} examples"
        raise ValueError(
            f"micro_batches={micro_batches} does not divide the {examples} examples of batch: "
            f"{advice}"
        )
    size = examples // micro_batches

    def split(leaf: jax.Array) -> jax.Array:
        return jnp.swapaxes(leaf.reshape(size, micro_batches, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def _apply_to_part(state: TrainState, params: Any, part: Batch, collections: Collections) -> _Sums:
    logits, updates = state.apply_fn(
        {"params": params, "batch_stats": state.batch_stats, **collections},
        part.x,
        train=True,
        mask=part.mask,
        mutable=["batch_stats", "batch_moments"],
    )
    return _Sums(measure(logits, part), updates)


def _sums_of_nothing(state: TrainState, parts: Batch) -> _Sums:
    """Returns zero metrics, the moments of no example, and the statistics as they are."""
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(lambda: _apply_to_part(state, state.params, first, {}))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    _check_collected(state.batch_stats, zeros.moments)
    if not jax.tree.leaves(zeros.moments):
        return zeros
    # In the dtypes that an update returns, as the scan over the parts needs.
    batch_stats = jax.tree.map(
        lambda leaf, updated: leaf.astype(updated.dtype),
        state.batch_stats,
        zeros.updates["batch_stats"],
    )
    return zeros._replace(updates={**zeros.updates, "batch_stats": batch_stats})


def _check_collected(batch_stats: Any, moments: Any) -> None:
    """Raises an error if a layer has running statistics but no moments."""
    norms = {path[:-1] for path, _ in jax.tree.leaves_with_path(moments)}
    for path, _ in jax.tree.leaves_with_path(batch_stats):
        if path[:-1] not in norms:
            raise ValueError(
                f"batch_stats{jax.tree_util.keystr(path)} belongs to a layer that collects no "
                "batch_moments: use bn_jax.linen.BatchNorm, and name batch_moments where a lifted "
                "transform encloses it, as batch_stats is named there"
            )


def _add_part(
    state: TrainState, params: Any, sums: _Sums, part: Batch, given: Collections
) -> tuple[jax.Array, _Sums]:
    """Returns the sum of the losses in a micro-batch, and all sums so far."""
    collections = dict(given)
    if "batch_moments" in sums.updates:
        collections["batch_moments"] = sums.moments
    of_part = _apply_to_part(state, params, part, collections)
    metrics = jax.tree.map(jnp.add, sums.metrics, of_part.metrics)
    # The model itself has added its moments to those that it was given.
    return of_part.metrics.loss, _Sums(metrics, of_part.updates)


def _micro_batch_gradients(
    state: TrainState, parts: Batch, nothing: _Sums, examples: jax.Array
) -> tuple[Any, _Sums]:
    def add_part(carry: tuple[Any, _Sums], part: Batch) -> tuple[tuple[Any, _Sums], None]:
        gradients, sums = carry
        loss = partial(_add_part, state, sums=sums, part=part, given={})
        of_part, sums = jax.grad(loss, has_aux=True)(state.params)
        return (jax.tree.map(jnp.add, gradients, of_part), sums), None

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (total, sums), _ = jax.lax.scan(add_part, (zeros, nothing), parts)
    return jax.tree.map(lambda leaf: leaf / examples.astype(leaf.dtype), total), sums


def _whole_batch_gradients(
    state: TrainState, parts: Batch, nothing: _Sums, examples: jax.Array
) -> tuple[Any, _Sums]:
    # Rematerialized: the backward pass keeps moments only, and recomputes part by part.
    @jax.checkpoint
    def over_parts(params: Any, given: Collections) -> _Sums:
        @jax.checkpoint
        def add_part(sums: _Sums, part: Batch) -> tuple[_Sums, None]:
            _, sums = _add_part(state, params, sums, part, given)
            return sums, None

        sums, _ = jax.lax.scan(add_part, nothing, parts)
        return sums

    def mean_loss(params: Any) -> tuple[jax.Array, _Sums]:
        def measure_again(sums: _Sums, _: None) -> tuple[_Sums, None]:
            return over_parts(params, {"given_moments": sums.moments}), None

        # A norm's moments are right once the norms before it normalize by the right ones: after
        # the n-th pass, those of the first n norms on any path. One more pass computes the loss.
        first = over_parts(params, {})
        passes = max(1, _number_of_norms(first.moments))
        sums, _ = jax.lax.scan(measure_again, first, length=passes)
        return sums.metrics.loss / examples, sums

    return jax.grad(mean_loss, has_aux=True)(state.params)


def _number_of_norms(moments: Any) -> int:
    """Counts the means [features]; under a lifted scan, those of several norms are stacked."""
    means = [leaf for path, leaf in jax.tree.leaves_with_path(moments) if path[-1].key == "mean"]
    return sum(math.prod(mean.shape[:-1]) for mean in means)
