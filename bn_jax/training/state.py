"""A train state with running statistics, which warns where their updates are thrown away."""

import dataclasses
import traceback
import warnings
from typing import Any

import jax
from flax.training import train_state

from bn_jax._paths import format_path, is_batch_stats, list_layers
from bn_jax.training.statistics import KEEP_UPDATES, is_readable

__all__ = ["TrainState"]

# A program may set the statistics some statements after the gradients, and every statement and
# every `jax.tree.map` in between can make another state.
STATES_BEFORE_WARNING = 10


@dataclasses.dataclass
class _Omission:
    """A call of `apply_gradients` without statistics, and how many states have been made since."""

    layers: list[str]
    states: int = 0


# By file and line of the call. The state itself cannot carry this record: whatever it carries
# through a transform is part of its tree, and another tree is compiled again.
_omissions: dict[tuple[str, int], _Omission] = {}
_reported: set[tuple[str, int]] = set()


def _replace(state: "TrainState", **updates: Any) -> "TrainState":
    if "batch_stats" in updates:
        _settle(updates["batch_stats"])
    return dataclasses.replace(state, **updates)


class _ReplaceInSubclasses:
    """Gives `TrainState` and every subclass a `replace` that notices new statistics.

    `flax.struct` sets `replace` on each new class, over any that the class or its base defines.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.replace = _replace  # type: ignore[attr-defined]


class TrainState(_ReplaceInSubclasses, train_state.TrainState):
    """Flax's train state with the `batch_stats` collection, ``{}`` for a model without one.

    ``apply_gradients(grads=grads)`` leaves the statistics as they are. If no
    ``replace(batch_stats=...)`` follows, the updates that the model returned are thrown away, and a
    `UserWarning` at the line of the call says so. It comes once for every such line in a process,
    when ten more states with the same layers have been made outside of transforms. Compiled
    programs are those of Flax's state, and nothing is compiled twice.

    Only the names of the layers are compared: while two states of the same model are trained, one
    whose statistics are set hides another whose statistics are not.

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

    def __post_init__(self) -> None:
        if _omissions and is_readable(self.batch_stats):
            _count_state(self.batch_stats)

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """Takes a step of the optimizer.

        Args:
            grads: gradients, of the structure of `params`.
            **kwargs: other attributes to replace, the updated `batch_stats` among them.
                ``batch_stats=state.batch_stats`` keeps the old ones without a warning.

        Returns:
            The state after the step.
        """
        state: TrainState = super().apply_gradients(grads=grads, **kwargs)
        if "batch_stats" not in kwargs and jax.tree.leaves(self.batch_stats):
            call = traceback.extract_stack(limit=2)[0]
            _note_omission((call.filename, call.lineno or 0), self.batch_stats)
        return state


def _layers(batch_stats: Any) -> list[str]:
    nodes = jax.tree.leaves_with_path(batch_stats, is_leaf=is_batch_stats)
    return [format_path(path) for path, _ in nodes]


def _note_omission(line: tuple[str, int], batch_stats: Any) -> None:
    if line not in _reported and line not in _omissions:
        _omissions[line] = _Omission(_layers(batch_stats))


def _settle(batch_stats: Any) -> None:
    """Forgets the omissions in the layers whose statistics are being set."""
    layers = _layers(batch_stats) if _omissions else []
    for line in [line for line, omission in _omissions.items() if omission.layers == layers]:
        del _omissions[line]


def _count_state(batch_stats: Any) -> None:
    layers = _layers(batch_stats)
    for line, omission in list(_omissions.items()):
        if omission.layers != layers:
            continue
        omission.states += 1
        if omission.states == STATES_BEFORE_WARNING:
            del _omissions[line]
            _reported.add(line)
            _warn(line, layers)


def _warn(line: tuple[str, int], layers: list[str]) -> None:
    file, number = line
    warnings.warn_explicit(
        f"apply_gradients(grads=...) leaves batch_stats of {list_layers(layers)} as they were, and "
        "nothing sets them afterwards: the updates that the model has returned are thrown away, "
        f"and evaluation uses old statistics. Write {KEEP_UPDATES}; or, where the statistics are "
        "to stay as they are, batch_stats=state.batch_stats.",
        UserWarning,
        file,
        number,
    )
