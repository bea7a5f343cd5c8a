"""Training and evaluation steps for any Linen model and loss, which keep the running statistics."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax

from bn_jax.training.state import TrainState
from bn_jax.training.statistics import is_readable, warn_of_initial

__all__ = ["Apply", "make_eval_step", "make_train_step"]

Apply: TypeAlias = Callable[..., Any]
"""The model that a loss gets: ``apply(*args, **kwargs)``, with parameters and statistics bound."""


def make_train_step(
    loss: Callable[[Apply, Any], Any],
    *,
    has_aux: bool = False,
    rngs: Mapping[str, jax.Array] | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Any]]:
    """Makes a training step of a Linen model that cannot drop the running statistics.

    Args:
        loss: called as ``loss(apply, batch)``, where ``apply(*args, **kwargs)`` is the model with
            its parameters and statistics, ``batch_stats`` being mutable. It returns a scalar. A
            second call of the model continues from the statistics that the first call returned.
            Transforms belong in the model (`nn.remat`, `nn.vmap`) or around the step, not between
            the loss and ``apply``.
        has_aux: whether the loss returns a pair, of the scalar and of anything else.
        rngs: keys by the names of the model's random streams, e.g. ``{"dropout": key}``. The n-th
            call of the model in a step, from 0, gets
            ``jax.random.fold_in(jax.random.fold_in(key, state.step), n)``.

    Returns:
        A pure function to compile with `jax.jit`: ``step(state, batch)`` returns the state after
        the step, and what the loss returned.

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
        def compute_loss(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
            apply = _ApplyInTraining(state, params, rngs or {})
            returned = loss(apply, batch)
            value = returned[0] if has_aux else returned
            return value, (returned, apply.batch_stats)

        gradients, aux = jax.grad(compute_loss, has_aux=True)(state.params)
        returned, batch_stats = aux
        return state.apply_gradients(grads=gradients, batch_stats=batch_stats), returned

    return step


class _ApplyInTraining:
    """Applies the model of a state, and passes the statistics from each call to the next.

    Attributes:
        batch_stats: the statistics after the last call.
    """

    def __init__(self, state: TrainState, params: Any, rngs: Mapping[str, jax.Array]) -> None:
        self.batch_stats = state.batch_stats
        self._apply_fn = state.apply_fn
        self._params = params
        self._keys = {name: jax.random.fold_in(key, state.step) for name, key in rngs.items()}
        self._calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._keys:
            rngs = {name: jax.random.fold_in(key, self._calls) for name, key in self._keys.items()}
            kwargs = {"rngs": rngs, **kwargs}
        variables = {"params": self._params, "batch_stats": self.batch_stats}
        y, updates = self._apply_fn(variables, *args, mutable=["batch_stats"], **kwargs)
        # A model without norms returns no such collection.
        self.batch_stats = updates.get("batch_stats", self.batch_stats)
        self._calls += 1
        return y


def make_eval_step(metrics: Callable[[Apply, Any], Any]) -> Callable[[TrainState, Any], Any]:
    """Makes an evaluation step of a Linen model, which uses the running statistics.

    Args:
        metrics: called as ``metrics(apply, batch)``, where ``apply(*args, **kwargs)`` is the model
            with its parameters and statistics; it returns a tree of arrays.

    Returns:
        ``step(state, batch)``, which returns the result of `metrics`. It is compiled already,
        because it inspects the statistics first: the first call with values warns as
        `warn_if_never_updated` does. In a function under `jax.jit` there are no values to inspect.

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
    compiled = jax.jit(lambda state, batch: metrics(apply_in_evaluation(state), batch))
    is_checked = False

    def step(state: TrainState, batch: Any) -> Any:
        nonlocal is_checked
        if not is_checked and is_readable(state.batch_stats):
            is_checked = True
            warn_of_initial(state.batch_stats, stacklevel=3)
        return compiled(state, batch)

    return step


def apply_in_evaluation(state: TrainState) -> Apply:
    """Returns the model of a state with its parameters and statistics, none of them mutable."""
    return partial(state.apply_fn, {"params": state.params, "batch_stats": state.batch_stats})
