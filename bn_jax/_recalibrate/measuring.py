"""One batch: a forward function in which every batch norm measures its input."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias, cast
from weakref import WeakKeyDictionary, ref

import jax
import jax.numpy as jnp
from flax import nnx

from bn_jax._core.running import start_measuring
from bn_jax._core.types import BatchStats, Measured
from bn_jax._paths import batch_stats_by_path, format_path, is_batch_stats
from bn_jax._program import PureForward
from bn_jax.linen.patching import norms_replaced
from bn_jax.nnx import BatchNorm
from bn_jax.nnx.patching import replace_norms_in_place

Forward: TypeAlias = Callable[[Any, Any], Any]

# More random numbers than a module of NNX draws in a batch.
DRAWS_PER_BATCH = 2**16
LINE = (
    "lambda variables, batch: model.apply(variables, batch, train=False, mutable=['batch_stats'])"
)


def measure(
    pure: PureForward, variables: Any, batch: Any, *, line: str = LINE
) -> dict[str, Measured]:
    """Calls a model in which every batch norm measures, and returns what they measured, by path.

    Norms that are not called have measured nothing. `line` is a correct forward function, for the
    error of one that returns no updated statistics.
    """
    if pure.graph is not None:
        return _measure_module(pure.forward, pure.bind(variables), batch)

    def start(node: Any) -> Any:
        if not is_batch_stats(node):
            return node
        return {**node, "measured": start_measuring(statistics_in(node))["measured"]}

    marked = jax.tree.map(start, variables["batch_stats"], is_leaf=is_batch_stats)
    with norms_replaced():
        returned = pure({**variables, "batch_stats": marked}, batch)
    return _measured_in(require_updates(returned, line))


def _measure_module(forward: Forward, module: nnx.Module, batch: Any) -> dict[str, Measured]:
    replace_norms_in_place(module)
    for _, layer in nnx.iter_graph(module):
        if isinstance(layer, BatchNorm):
            batch_stats: BatchStats = {"mean": layer.mean[...], "var": layer.var[...]}
            layer.measured = nnx.BatchStat(start_measuring(batch_stats)["measured"])
    forward(module, batch)
    return _measured_in(nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))


def _measured_in(batch_stats: Any) -> dict[str, Measured]:
    return {
        path: node["measured"]
        for path, node in batch_stats_by_path(batch_stats).items()
        if "measured" in node
    }


def statistics_in(node: Any) -> Any:
    """Returns the statistics of a norm without their boxes or variables, by name."""
    return {format_path(path[:1]): leaf for path, leaf in jax.tree.leaves_with_path(node)}


def require_updates(returned: Any, line: str) -> Any:
    """Returns the statistics in the ``(y, updates)`` that a forward function returned.

    `line` is a correct forward function, for the error if it returned anything else.
    """
    received = "an array" if isinstance(returned, jax.Array) else f"a {type(returned).__name__}"
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        updates = returned[1]
        if "batch_stats" in updates:
            return updates["batch_stats"]
        received = f"(y, updates) with the collections {sorted(updates)} in updates"
    raise ValueError(
        f"forward returned {received}, expected (y, updates) with the new statistics in "
        f"updates['batch_stats']. Write forward = {line}"
    )


# --- the compiled step --------------------------------------------------------------------------

_Step: TypeAlias = Callable[..., dict[str, Measured]]

# A step stays compiled as long as its forward function lives.
_steps: WeakKeyDictionary[Forward, _Step] = WeakKeyDictionary()


def prepare(pure: PureForward, others: Any) -> Callable[..., dict[str, Measured]]:
    """Returns the compiled function that measures one batch.

    It takes running statistics, the batch and its number. `others` are the variables of the model
    without the running statistics.
    """
    try:
        hash(pure.graph)
    except TypeError:
        # A graph that holds a dict or a list cannot be a static argument.
        step = jax.jit(partial(_step(lambda: pure.forward), pure.graph))
        return partial(step, others)
    return partial(_step_of(pure.forward), pure.graph, others)


def _step_of(forward: Forward) -> _Step:
    """Returns the compiled step of a forward function, which the caller keeps alive."""
    try:
        if forward in _steps:
            return _steps[forward]
        reference = ref(forward)
    except TypeError:
        # A function without a hash or weak references is compiled again each time.
        return jax.jit(_step(lambda: forward), static_argnums=0)
    _steps[forward] = jax.jit(_step(cast(Callable[[], Forward], reference)), static_argnums=0)
    return _steps[forward]


def _step(reference: Callable[[], Forward]) -> _Step:
    # The reference is weak, or else the step would keep its forward function in `_steps` forever.
    def step(
        graph: Any, others: Any, batch_stats: Any, batch: Any, number: jax.Array
    ) -> dict[str, Measured]:
        pure = PureForward(reference(), graph)
        if graph is not None:
            others = _with_draws_advanced(others, number)
        return measure(pure, pure.join(batch_stats, others), batch)

    return step


def _with_draws_advanced(variables: Any, number: jax.Array) -> Any:
    """Advances counters of random numbers, so that every batch draws others.

    Each batch starts from the same variables.
    """
    advanced = jax.tree.map(
        lambda count: count + jnp.asarray(number * DRAWS_PER_BATCH, count.dtype),
        nnx.filter_state(variables, nnx.RngCount),
    )
    return nnx.merge_state(variables, advanced)
