"""The running statistics of a model: never updated, or kept by each device."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax._audit import is_initial
from bn_jax._core.merging import merge_moments
from bn_jax._core.running import promote_batch_stats
from bn_jax._core.types import Moments
from bn_jax._paths import batch_stats_by_path, is_batch_stats, list_layers

__all__ = ["sync_batch_stats", "warn_if_never_updated"]

KEEP_UPDATES = "state.apply_gradients(grads=grads, batch_stats=updates['batch_stats'])"
# What a norm does in evaluation, by its initial variance. Equinox and Haiku start with 0.
_EFFECTS = {1: "does not normalize", 0: "multiplies by 1 / sqrt(epsilon)"}


def warn_if_never_updated(batch_stats: Any) -> None:
    """Warns about norms whose running statistics still have their initial values.

    These are a mean of 0 and a variance of 1 in every feature, or a ``count`` of 0. In evaluation,
    such a norm returns its input nearly unchanged. In Equinox and Haiku the initial variance is 0,
    by which a norm multiplies its input by ``1 / sqrt(epsilon)``. `evaluate` and the steps of
    `make_eval_step` call this function.

    Args:
        batch_stats: the collection of Linen, or ``nnx.state(model, nnx.BatchStat)``, with values
            instead of tracers.

    Raises:
        ValueError: `batch_stats` is being traced, or is on devices of other processes.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn, bn_jax.training
        >>> batch_stats = {"norm": bn.init_batch_stats(3)}
        >>> batch_stats["norm"]["mean"] += 1.0
        >>> bn.training.warn_if_never_updated(batch_stats)
    """
    if not is_readable(batch_stats):
        raise ValueError(
            "batch_stats holds no values that this process can read, expected arrays outside of "
            "any transform: call warn_if_never_updated(state.batch_stats) before the function "
            "under jax.jit, not in it"
        )
    warn_of_initial(batch_stats, stacklevel=3)


def warn_of_initial(batch_stats: Any, stacklevel: int) -> None:
    """Warns as `warn_if_never_updated` does; `batch_stats` must be readable."""
    values = jax.device_get(batch_stats_by_path(batch_stats))
    initial = {path: norm for path, norm in values.items() if is_initial(dict(norm))}
    for var, effect in _EFFECTS.items():
        paths = [path for path, norm in initial.items() if _initial_var(norm) == var]
        if paths:
            warnings.warn(
                f"batch_stats of {list_layers(paths)} are still the initial ones (mean 0, var "
                f"{var}): no training step has updated them, and evaluation {effect}. In training, "
                "call the model with use_running_average=False (often train=True) and "
                f"mutable=['batch_stats'], and keep the updates: {KEEP_UPDATES}; or use a step "
                "made by bn_jax.training.make_train_step. In NNX, call model.train() before "
                "training.",
                UserWarning,
                stacklevel,
            )


def _initial_var(norm: Mapping[str, Any]) -> int:
    return 1 if any(np.any(leaf) for leaf in jax.tree.leaves(norm["var"])) else 0


def is_readable(tree: Any) -> bool:
    """Tells whether all leaves are arrays whose values this process can read."""
    return all(map(_is_readable_leaf, jax.tree.leaves(tree)))


def _is_readable_leaf(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return False
    if isinstance(leaf, jax.Array):
        return leaf.is_fully_addressable or leaf.is_fully_replicated
    return isinstance(leaf, np.ndarray)


def sync_batch_stats(batch_stats: Any) -> Any:
    """Merges the running statistics that every device has kept for itself.

    They are merged as exactly as `bn_jax.merge_moments` merges moments: the variance of the means
    is part of the merged variance. All devices have equal weights, or those of their batch
    ``count`` if the statistics have one.

    Args:
        batch_stats: the collection with the devices on the first axis of every leaf, as `pmap` and
            `vmap` return it, and `shard_map` with ``out_specs`` that name the axis.

    Returns:
        The collection without that axis, in at least float32.

    Raises:
        ValueError: the collection holds the state of a layer that is no batch norm.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn, bn_jax.training
        >>> kept = {"norm": {"mean": jnp.array([[1.0], [3.0]]), "var": jnp.ones((2, 1))}}
        >>> merged = bn.training.sync_batch_stats(kept)
        >>> merged["norm"]["mean"].tolist(), merged["norm"]["var"].tolist()
        ([2.0], [2.0])
    """
    promoted = promote_batch_stats(batch_stats)
    return jax.tree.map(_merge_devices, promoted, is_leaf=is_batch_stats)


def _merge_devices(norm: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    if not is_batch_stats(norm):
        raise ValueError(
            f"batch_stats holds {type(norm).__name__} outside of a batch norm, expected mappings "
            "with mean and var: merge the state of other layers separately"
        )
    count = norm.get("count", jnp.ones_like(norm["var"]))
    devices = zip(count, norm["mean"], norm["var"], strict=True)
    merged = merge_moments(*(Moments(*device) for device in devices))._asdict()
    return {name: merged[name].astype(leaf.dtype) for name, leaf in norm.items()}
