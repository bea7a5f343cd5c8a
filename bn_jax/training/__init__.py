"""Training: steps that keep the statistics; over a mesh, exact whatever the padding and devices."""

from typing import Any

from bn_jax import _moved
from bn_jax.training.accumulation import accumulated_train_step
from bn_jax.training.classification import (
    Evaluation,
    Metrics,
    create_state,
    eval_step,
    evaluate,
    train_step,
)
from bn_jax.training.sharding import (
    DATA_AXIS,
    Batch,
    make_mesh,
    pad_batch,
    process_rows,
    shard_batch,
)
from bn_jax.training.state import TrainState
from bn_jax.training.statistics import sync_batch_stats, warn_if_never_updated
from bn_jax.training.steps import Apply, make_eval_step, make_train_step

__all__ = [
    "DATA_AXIS",
    "Apply",
    "Batch",
    "Evaluation",
    "Metrics",
    "TrainState",
    "accumulated_train_step",
    "create_state",
    "eval_step",
    "evaluate",
    "make_eval_step",
    "make_mesh",
    "make_train_step",
    "pad_batch",
    "process_rows",
    "shard_batch",
    "sync_batch_stats",
    "train_step",
    "warn_if_never_updated",
]


_MOVED = dict.fromkeys(("Report", "fit", "make_optimizer", "shard_dataset"), "bn_jax.lab.fitting")


def __getattr__(name: str) -> Any:
    return _moved.attribute(__name__, name, _MOVED)
