"""Training: steps that keep the statistics; over a mesh, exact whatever the padding and devices."""

import dataclasses
import itertools
import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bn_jax._audit.findings import is_initial
from bn_jax._core.moments import Moments, merge_moments
from bn_jax._paths import batch_stats_by_path, format_path, is_batch_stats
from bn_jax.lab.data import Batch, Dataset, batches

DATA_AXIS = "data"
# What a model updates in every part of a batch.
IN_PARTS = ["batch_stats", "batch_moments"]
# The states that may come of updates without statistics before somebody is told: who sets the
# statistics afterwards does so in the first one, or in the next few that a `tree.map` makes of it.
STATES_WITHOUT_STATISTICS = 10
KEEP_UPDATES = "state.apply_gradients(grads=grads, batch_stats=updates['batch_stats'])"

Apply: TypeAlias = Callable[..., Any]


class _DroppedUpdates:
    """A call of `apply_gradients` without statistics, and whether they have been set afterwards.

    It is part of the structure of the states that come of that call, through every transform. It
    equals None, so that they have the structure of other states and nothing is compiled again.
    """

    def __init__(self, file: str, line: int, layers: str) -> None:
        self.file, self.line, self.layers = file, line, layers
        self.states = 0
        self.settled = False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _DroppedUpdates)

    def __hash__(self) -> int:
        return hash(None)

    def count(self) -> None:
        """Counts a state of values, not of tracers."""
        self.states += 1
        if self.states == STATES_WITHOUT_STATISTICS and not self.settled:
            warnings.warn_explicit(
                f"apply_gradients(grads=...) leaves batch_stats of {self.layers} as they were, and "
                "nothing sets them afterwards: the updates that the model has returned are thrown "
                f"away, and evaluation uses old statistics. Write {KEEP_UPDATES}; or, where the "
                "statistics are to stay as they are, batch_stats=state.batch_stats.",
                UserWarning,
                self.file,
                self.line,
            )


def _replace(state: "TrainState", **updates: Any) -> "TrainState":
    """Returns the state with other attributes; statistics that are set are not dropped."""
    if "batch_stats" in updates:
        if state._dropped is not None:
            state._dropped.settled = True
        updates = {"_dropped": None, **updates}
    return dataclasses.replace(state, **updates)


class _SettlesUpdates:
    """Gives every subclass a `replace` that knows of dropped updates."""

    def __init_subclass__(cls, **options: Any) -> None:
        # flax.struct sets `replace` here, over what a class body defines.
        super().__init_subclass__(**options)
        cls.replace = _replace  # type: ignore[attr-defined]


class TrainState(_SettlesUpdates, train_state.TrainState):
    """Flax's train state with the `batch_stats` collection, which is `{}` for a model without.

    Whoever calls ``apply_gradients(grads=grads)`` without the statistics, and does not set them by
    ``replace(batch_stats=...)`` afterwards either, has thrown away what the model has returned of
    them, and is told so by a `UserWarning` at that line, once ten states have come of it. That
    costs nothing in compiled code, where no such state can be seen and none is compiled again.

    Attributes:
        batch_stats: the running statistics.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bn_jax as bn, bn_jax.training
        >>> model = bn.linen.BatchNorm(use_running_average=False, momentum=0.5)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> state = bn.training.TrainState.create(
        ...     apply_fn=model.apply, tx=optax.sgd(0.1), **model.init(jax.random.key(0), x)
        ... )
        >>> variables = {"params": state.params, "batch_stats": state.batch_stats}
        >>> y, updates = state.apply_fn(variables, x, mutable=["batch_stats"])
        >>> grads = jax.tree.map(jnp.zeros_like, state.params)
        >>> state = state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])
        >>> int(state.step), state.batch_stats["mean"].tolist()
        (1, [1.0])
    """

    batch_stats: Any
    _dropped: _DroppedUpdates | None = struct.field(
        pytree_node=False, default=None, repr=False, compare=False, kw_only=True
    )

    def __post_init__(self) -> None:
        if self._dropped is not None and _is_readable(self.batch_stats):
            self._dropped.count()

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """Takes a step of the optimizer.

        Args:
            grads: gradients, of the structure of `params`.
            **kwargs: other attributes to replace; the updated `batch_stats` among them.

        Returns:
            The state after the step.
        """
        state: TrainState = super().apply_gradients(grads=grads, **kwargs)
        if "batch_stats" in kwargs or not jax.tree.leaves(self.batch_stats):
            return state
        dropped = self._dropped
        if dropped is None or dropped.settled:
            call = traceback.extract_stack(limit=2)[0]
            nodes = jax.tree.leaves_with_path(self.batch_stats, is_leaf=is_batch_stats)
            layers = [_named(format_path(path)) for path, _ in nodes]
            dropped = _DroppedUpdates(call.filename, call.lineno or 0, _first_of(layers))
        return dataclasses.replace(state, _dropped=dropped)


def _is_readable(tree: Any) -> bool:
    """Says whether all leaves are arrays whose values this process can read."""

    def is_readable(leaf: Any) -> bool:
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            return isinstance(leaf, np.ndarray)
        return leaf.is_fully_addressable or leaf.is_fully_replicated

    return all(is_readable(leaf) for leaf in jax.tree.leaves(tree))


def _named(path: str) -> str:
    return path or "the top-level norm"


def _first_of(layers: Sequence[str]) -> str:
    named, others = ", ".join(layers[:3]), len(layers) - 3
    return f"{named} and {others} more" if others > 0 else named


class Metrics(NamedTuple):
    """Sums over the valid examples of one or more batches."""

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array


# The metrics of a batch or some of its parts, and what the model has updated in them.
_Reached: TypeAlias = tuple[Metrics, dict[str, Any]]


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


def make_train_step(
    loss: Callable[[Apply, Any], Any],
    *,
    has_aux: bool = False,
    rngs: Mapping[str, jax.Array] | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Any]]:
    """Makes a training step of a Linen model that cannot drop the running statistics.

    Args:
        loss: called as ``loss(apply, batch)``, where ``apply(*args, **kwargs)`` is the model with
            parameters and statistics in place, ``batch_stats`` being mutable. It returns a scalar.
            A second call of the model goes on from the statistics that the first one has left. A
            transform belongs into the model (`nn.remat`, `nn.vmap`) or around the step, not
            between loss and ``apply``.
        has_aux: whether the loss returns a pair instead, of the scalar and anything.
        rngs: keys by the names of the model's random streams, e.g. ``{"dropout": key}``. The n-th
            call of the model in a step, from 0, gets
            ``jax.random.fold_in(jax.random.fold_in(key, state.step), n)``.

    Returns:
        A pure function to compile with `jax.jit`: ``step(state, batch)`` returns the state after
        the step, and what the loss has returned.

    Raises:
        TypeError: `rngs` is not a mapping.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bn_jax as bn, bn_jax.training
        >>> model = bn.linen.BatchNorm(momentum=0.5)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> state = bn.training.TrainState.create(
        ...     apply_fn=model.apply, tx=optax.sgd(0.1), **model.init(jax.random.key(0), x, True)
        ... )
        >>> def loss(apply, x):
        ...     return jnp.mean(apply(x, use_running_average=False) ** 2)
        >>> step = jax.jit(bn.training.make_train_step(loss))
        >>> state, value = step(state, x)
        >>> state.batch_stats["mean"].tolist()
        [1.0]
    """
    if rngs is not None and not isinstance(rngs, Mapping):
        raise TypeError(
            f"rngs is of type {type(rngs).__name__}, expected keys by name: "
            "make_train_step(loss, rngs={'dropout': key})"
        )

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        def differentiated(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
            model = _InTraining(state, params, rngs or {})
            found = loss(model, batch)
            return found[0] if has_aux else found, (found, model.batch_stats)

        gradients, (found, batch_stats) = jax.grad(differentiated, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradients, batch_stats=batch_stats), found

    return step


class _InTraining:
    """A model that keeps the statistics that its calls return."""

    def __init__(self, state: TrainState, params: Any, rngs: Mapping[str, jax.Array]) -> None:
        self.state, self.params, self.batch_stats = state, params, state.batch_stats
        self.keys = {name: jax.random.fold_in(key, state.step) for name, key in rngs.items()}
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.keys:
            rngs = {name: jax.random.fold_in(key, self.calls) for name, key in self.keys.items()}
            kwargs = {"rngs": rngs, **kwargs}
        variables = {"params": self.params, "batch_stats": self.batch_stats}
        y, updates = self.state.apply_fn(variables, *args, mutable=["batch_stats"], **kwargs)
        self.batch_stats = updates.get("batch_stats", self.batch_stats)
        self.calls += 1
        return y


def make_eval_step(metrics: Callable[[Apply, Any], Any]) -> Callable[[TrainState, Any], Any]:
    """Makes an evaluation step of a Linen model, with the running statistics as they are.

    Args:
        metrics: called as ``metrics(apply, batch)``, where ``apply(*args, **kwargs)`` is the model
            with parameters and statistics in place; it returns a tree of arrays.

    Returns:
        ``step(state, batch)``, which returns what `metrics` does. It is compiled already, because
        it looks at the statistics before: the first time that it is called with values, it warns as
        `warn_if_never_updated`. In a function under `jax.jit` there are no values to look at.

    Example:
        >>> import jax, jax.numpy as jnp, optax, bn_jax as bn, bn_jax.training
        >>> model = bn.linen.BatchNorm(use_running_average=True)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> state = bn.training.TrainState.create(
        ...     apply_fn=model.apply, tx=optax.sgd(0.1), **model.init(jax.random.key(0), x)
        ... )
        >>> state = state.replace(batch_stats={"mean": jnp.full(1, 2.0), "var": jnp.ones(1)})
        >>> step = bn.training.make_eval_step(lambda apply, x: jnp.mean(apply(x)))
        >>> step(state, x).item()
        0.0
    """
    compiled = jax.jit(lambda state, batch: metrics(_in_evaluation(state), batch))
    unchecked = True

    def step(state: TrainState, batch: Any) -> Any:
        nonlocal unchecked
        if unchecked and _is_readable(state.batch_stats):
            unchecked = False
            _warn_of_initial(state.batch_stats, stacklevel=3)
        return compiled(state, batch)

    return step


def _in_evaluation(state: TrainState) -> Apply:
    return partial(state.apply_fn, {"params": state.params, "batch_stats": state.batch_stats})


def warn_if_never_updated(batch_stats: Any) -> None:
    """Warns about norms whose running statistics are still the initial ones.

    These are a mean of 0 and a variance of 1 in every feature, or a ``count`` of 0. A norm that is
    evaluated with them passes its input on as it is. `evaluate` and the steps that `make_eval_step`
    makes call this.

    Args:
        batch_stats: the collection of Linen, or ``nnx.state(model, nnx.BatchStat)``; the values,
            not what stands for them while a function is compiled.

    Raises:
        ValueError: `batch_stats` is being traced, or lies in other processes.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn, bn_jax.training
        >>> batch_stats = {"norm": bn.init_batch_stats(3)}
        >>> batch_stats["norm"]["mean"] += 1.0
        >>> bn.training.warn_if_never_updated(batch_stats)
    """
    if not _is_readable(batch_stats):
        raise ValueError(
            "batch_stats holds no values that this process can read, expected arrays outside of "
            "any transform: call warn_if_never_updated(state.batch_stats) before the function "
            "under jax.jit, not in it"
        )
    _warn_of_initial(batch_stats, stacklevel=3)


def _warn_of_initial(batch_stats: Any, stacklevel: int) -> None:
    norms = batch_stats_by_path(batch_stats)
    values = jax.device_get({_named(path): dict(node) for path, node in norms.items()})
    if initial := [path for path, norm in values.items() if is_initial(norm)]:
        warnings.warn(
            f"batch_stats of {_first_of(initial)} are still the initial ones (mean 0, var 1): no "
            "training step has updated them, and evaluation does not normalize. In training call "
            "the model with use_running_average=False (often train=True) and "
            f"mutable=['batch_stats'], and keep what it returns: {KEEP_UPDATES}; or take the step "
            "that bn_jax.training.make_train_step makes. In NNX call model.train() before.",
            UserWarning,
            stacklevel,
        )


def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Takes one step on the mean cross-entropy over the valid examples of a batch.

    Args:
        state: the state before the step.
        batch: examples of which `batch.mask` are valid; the others enter neither the loss nor the
            statistics.

    Returns:
        The state after the step, and the metrics of the model before it.
    """
    state, (_, metrics) = make_train_step(_mean_loss, has_aux=True)(state, batch)
    return state, metrics


def _mean_loss(apply: Apply, batch: Batch) -> tuple[jax.Array, Metrics]:
    metrics = _metrics(apply(batch.x, train=True, mask=batch.mask), batch)
    return metrics.loss / metrics.examples, metrics


def accumulated_train_step(
    state: TrainState,
    batch: Batch,
    micro_batches: int,
    *,
    whole_batch_statistics: bool = False,
) -> tuple[TrainState, Metrics]:
    """Takes the step of `train_step` over micro-batches, one after another in a `lax.scan`.

    Micro-batch k holds the examples k, k + micro_batches, ...: on several devices, each has its
    share of every micro-batch. The gradient is that of the mean over all valid examples, and the
    running statistics are updated once, by the moments of all micro-batches merged.

    By default each micro-batch is normalized by its own statistics, as one batch with
    ``virtual_batch_size`` does; memory is that of one micro-batch. With `whole_batch_statistics`
    all are normalized by those of the whole batch, and loss, gradient and statistics are those of
    `train_step` on it, at the memory of one micro-batch too, but not at its price: the moments of
    a layer take those of the layers before it, so that they are measured layer after layer. With L
    norms in a row that is L passes over the batch before the one that counts, forward, and as many
    backward.

    Args:
        state: the state before the step; its batch norms are `bn_jax.linen.BatchNorm`.
        batch: examples of which `batch.mask` are valid, however these are distributed.
        micro_batches: their number, which divides that of the examples.
        whole_batch_statistics: whether to normalize by the statistics of the whole batch.

    Returns:
        The state after the step, and the metrics of the model before it.

    Raises:
        ValueError: `micro_batches` does not divide the examples, or the model has running
            statistics whose moments it does not collect.
    """
    parts = _split_batch(batch, micro_batches)
    start = _before_the_parts(state, parts)
    examples = jnp.sum(batch.mask)
    take = _whole_batch_gradients if whole_batch_statistics else _micro_batch_gradients
    gradients, (metrics, updates) = take(state, parts, start, examples)
    batch_stats = updates.get("batch_stats", {})
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats), metrics


def _train_on_part(
    state: TrainState, params: Any, part: Batch, collections: dict[str, Any]
) -> tuple[jax.Array, _Reached]:
    """Returns the sum of the losses; the metrics, and what the model has updated."""
    logits, updates = state.apply_fn(
        {"params": params, "batch_stats": state.batch_stats, **collections},
        part.x,
        train=True,
        mask=part.mask,
        mutable=IN_PARTS,
    )
    metrics = _metrics(logits, part)
    return metrics.loss, (metrics, updates)


def _split_batch(batch: Batch, micro_batches: int) -> Batch:
    examples = len(batch.y)
    if micro_batches < 1 or examples % micro_batches:
        raise ValueError(
            f"micro_batches={micro_batches} does not divide the {examples} examples of batch: "
            "choose a divisor, or pad the batch with `pad_batch`"
        )

    def split(leaf: jax.Array) -> jax.Array:
        return jnp.swapaxes(leaf.reshape(-1, micro_batches, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def _before_the_parts(state: TrainState, parts: Batch) -> _Reached:
    """Returns no metrics, the moments of nothing, and the statistics as they are."""
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    _, reached = jax.eval_shape(lambda: _train_on_part(state, state.params, first, {}))
    metrics, updates = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), reached)
    norms = {path[:-1] for path, _ in jax.tree.leaves_with_path(updates.get("batch_moments", {}))}
    for path, _ in jax.tree.leaves_with_path(state.batch_stats):
        if path[:-1] not in norms:
            raise ValueError(
                f"batch_stats{jax.tree_util.keystr(path)} belongs to a layer that collects no "
                "batch_moments: use bn_jax.linen.BatchNorm, and name batch_moments where a lifted "
                "transform encloses it, as batch_stats is named there"
            )
    return metrics, updates | ({"batch_stats": state.batch_stats} if norms else {})


def _add_part(
    state: TrainState, params: Any, given: dict[str, Any], reached: _Reached, part: Batch
) -> tuple[jax.Array, _Reached]:
    metrics, updates = reached
    moments = {name: found for name, found in updates.items() if name == "batch_moments"}
    loss, (of_part, updates) = _train_on_part(state, params, part, moments | given)
    return loss, (jax.tree.map(jnp.add, metrics, of_part), updates)


def _micro_batch_gradients(
    state: TrainState, parts: Batch, start: _Reached, examples: jax.Array
) -> tuple[Any, _Reached]:
    def add_part(carry: tuple[Any, _Reached], part: Batch) -> tuple[tuple[Any, _Reached], None]:
        gradients, reached = carry
        of_part, reached = jax.grad(
            lambda params: _add_part(state, params, {}, reached, part), has_aux=True
        )(state.params)
        return (jax.tree.map(jnp.add, gradients, of_part), reached), None

    nothing = jax.tree.map(jnp.zeros_like, state.params)
    (total, reached), _ = jax.lax.scan(add_part, (nothing, start), parts)
    return jax.tree.map(lambda leaf: leaf / examples.astype(leaf.dtype), total), reached


def _whole_batch_gradients(
    state: TrainState, parts: Batch, start: _Reached, examples: jax.Array
) -> tuple[Any, _Reached]:
    # Rematerialized: the backward pass keeps moments only, and recomputes part by part.
    @jax.checkpoint
    def over_parts(params: Any, given: dict[str, Any]) -> _Reached:
        @jax.checkpoint
        def add_part(reached: _Reached, part: Batch) -> tuple[_Reached, None]:
            return _add_part(state, params, given, reached, part)[1], None

        return jax.lax.scan(add_part, start, parts)[0]

    def mean_loss(params: Any) -> tuple[jax.Array, _Reached]:
        # A pass finds the moments of the norms that had the right ones before them: after the
        # n-th, the first n on any path are those of the whole batch.
        def given(updates: dict[str, Any]) -> dict[str, Any]:
            return {"given_moments": updates.get("batch_moments", {})}

        updates, _ = jax.lax.scan(
            lambda updates, _: (over_parts(params, given(updates))[1], None),
            over_parts(params, {})[1],
            length=max(0, _number_of_norms(start) - 1),
        )
        metrics, updates = over_parts(params, given(updates))
        return metrics.loss / examples, (metrics, updates)

    return jax.grad(mean_loss, has_aux=True)(state.params)


def _number_of_norms(reached: _Reached) -> int:
    """A norm that has a part in the batch has one mean; those under a lifted scan are stacked."""
    moments = jax.tree.leaves_with_path(reached[1].get("batch_moments", {}))
    return sum(math.prod(leaf.shape[:-1]) for path, leaf in moments if path[-1].key == "mean")


def sync_batch_stats(batch_stats: Any) -> Any:
    """Merges running statistics that every device has kept for itself into those of all.

    As exactly as `bn_jax.merge_moments` merges moments: the variance of the means is part of the
    merged variance. Devices count alike, or by the ``count`` of their batches where they keep it.

    Args:
        batch_stats: the collection, the first axis of every leaf being the device; `pmap` and
            `vmap` return it so, and `shard_map` does with ``out_specs`` that name the axis.

    Returns:
        The collection of one device, without that axis.

    Raises:
        ValueError: something in it is not the state of a batch norm.

    Example:
        >>> import jax.numpy as jnp, bn_jax.training
        >>> kept = {"norm": {"mean": jnp.array([[1.0], [3.0]]), "var": jnp.ones((2, 1))}}
        >>> merged = bn_jax.training.sync_batch_stats(kept)
        >>> merged["norm"]["mean"].tolist(), merged["norm"]["var"].tolist()
        ([2.0], [2.0])
    """

    def merge(node: Any) -> Any:
        if not is_batch_stats(node):
            raise ValueError(
                f"batch_stats holds {type(node).__name__} outside of a batch norm, expected "
                "mappings with mean and var: merge the state of other layers apart"
            )
        count = node.get("count", jnp.ones_like(node["var"]))
        devices = [Moments(*one) for one in zip(count, node["mean"], node["var"], strict=True)]
        merged = merge_moments(*devices)._asdict()
        return {name: merged[name].astype(leaf.dtype) for name, leaf in node.items()}

    return jax.tree.map(merge, batch_stats, is_leaf=is_batch_stats)


def eval_step(state: TrainState, batch: Batch) -> Metrics:
    """Computes the metrics of a batch with the running statistics.

    Args:
        state: the model's state.
        batch: examples of which `batch.mask` are valid.

    Returns:
        The metrics over the valid examples.
    """
    return _metrics(_in_evaluation(state)(batch.x, train=False), batch)


def _metrics(logits: jax.Array, batch: Batch) -> Metrics:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
    return Metrics(
        loss=jnp.sum(losses, where=batch.mask),
        correct=jnp.sum(jnp.argmax(logits, axis=-1) == batch.y, where=batch.mask),
        examples=jnp.sum(batch.mask),
    )


_jitted_eval_step = jax.jit(eval_step)


def evaluate(state: TrainState, sharded_batches: Iterable[Batch]) -> Evaluation:
    """Evaluates a model on a dataset, and warns where its running statistics are the initial ones.

    Args:
        state: the model's state.
        sharded_batches: at least one batch, on the devices that hold the state.

    Returns:
        The means over all valid examples.
    """
    if _is_readable(state.batch_stats):
        _warn_of_initial(state.batch_stats, stacklevel=3)
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
