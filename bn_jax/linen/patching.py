"""Patching Linen models from outside: `freeze`, `unfreeze`, `replace_norms`."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar, overload

import flax.linen as nn
import jax

from bn_jax._modules import (
    compute_group_norm,
    compute_instance_norm,
    compute_layer_norm,
    compute_rms_norm,
)
from bn_jax.linen.frozen import Rule, rule_for, rules
from bn_jax.linen.running import BatchNorm, call_batch_norm
from bn_jax.linen.stateless import call_feature_norm

P = ParamSpec("P")
R = TypeVar("R")

# What computes in the place of the call of a layer of Flax's.
_CALLS: dict[type[nn.Module], Callable[..., jax.Array]] = {
    nn.BatchNorm: call_batch_norm,
    nn.LayerNorm: functools.partial(call_feature_norm, compute_layer_norm),
    nn.RMSNorm: functools.partial(call_feature_norm, compute_rms_norm),
    nn.GroupNorm: functools.partial(call_feature_norm, compute_group_norm),
    nn.InstanceNorm: functools.partial(call_feature_norm, compute_instance_norm),
}


def freeze(apply: Callable[P, R], *paths: str, train_params: bool = False) -> Callable[P, R]:
    """Returns `apply` with its batch norms frozen: running statistics that do not update.

    Batch norms, Flax's as well as ours, whose path matches one of `paths`, or lies in a module
    whose path does, run in evaluation mode during training too. Variables keep their names, shapes
    and initial values. What `jax.jit` or `nn.jit` compiled before is compiled again; so a train
    state recompiles after
    ``state = state.replace(apply_fn=bn.linen.freeze(state.apply_fn, "stage0*"))``.

    Args:
        apply: ``model.apply``, ``model.init``, ``state.apply_fn`` or any other function in which
            Flax modules are called.
        *paths: glob patterns (`fnmatch`; ``*`` also matches ``/``) of module paths joined by
            ``/``, as they are in the variables. Without any: every batch norm.
        train_params: whether ``scale`` and ``bias`` still have a derivative.

    Returns:
        A function called like `apply`. Where several enclose each other and match a norm, the one
        made last decides; see `unfreeze`.

    Raises:
        ValueError: when called, a pattern matches no batch norm; the message lists the paths.
            Or there are paths and a class made by `nn.jit`, which computes all its modules with the
            same attributes by the trace of the first. (`nn.jit` as a decorator of a method does so
            too, and cannot be detected.)
        TypeError: when called, a pattern matches a user's subclass of `flax.linen.BatchNorm`,
            which may do anything: derive it from `bn_jax.linen.BatchNorm`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, bn_jax as bn
        >>> model = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=False)])
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = model.init(jax.random.key(0), x)
        >>> frozen = bn.linen.freeze(model.apply, "layers_1")
        >>> y, updates = frozen(variables, x, mutable=["batch_stats"])
        >>> updates["batch_stats"]["layers_1"]["mean"].tolist()
        [0.0, 0.0]
    """
    return _ruled(apply, paths, frozen=True, train_params=train_params)


def unfreeze(apply: Callable[P, R], *paths: str) -> Callable[P, R]:
    """Undoes `freeze` for the batch norms on some paths.

    They follow their own attributes again.

    Args:
        apply: what `freeze` returned.
        *paths: as for `freeze`.

    Returns:
        A function called like `apply`.

    Raises:
        ValueError: as for `freeze`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, bn_jax as bn
        >>> layer = bn.linen.BatchNorm(use_running_average=False, momentum=0.5)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> thawed = bn.linen.unfreeze(bn.linen.freeze(layer.apply))
        >>> y, updates = thawed(variables, x, mutable=["batch_stats"])
        >>> updates["batch_stats"]["mean"].tolist()
        [1.0]
    """
    return _ruled(apply, paths, frozen=False, train_params=True)


def _ruled(
    apply: Callable[P, R], paths: tuple[str, ...], *, frozen: bool, train_params: bool
) -> Callable[P, R]:
    paths = paths or ("*",)
    rule = Rule(paths, frozen, train_params, set(paths))

    @functools.wraps(apply)
    def ruled(*args: P.args, **kwargs: P.kwargs) -> R:
        with rules((*rules.value, rule)), nn.intercept_methods(_call_frozen):
            result = apply(*args, **kwargs)
        rule.require_matches()
        return result

    return ruled


@overload
def replace_norms(apply: Callable[P, R]) -> Callable[P, R]: ...
@overload
def replace_norms() -> Any: ...
def replace_norms(apply: Callable[..., Any] | None = None) -> Any:
    """Returns `apply` with Flax's norms computed by the layers of this module.

    Wherever `flax.linen.BatchNorm`, or another layer of Flax's that has a namesake here, is called
    in it, ours computes, with that layer's attributes, variables and path. So `init`, `apply` and
    `tabulate` of a model that knows nothing of bn_jax, and its checkpoints, stay as they are.
    Subclasses are left alone: they may do anything.

    What was compiled outside is compiled again inside and the other way round, by `jax.jit` and by
    `nn.jit`.

    Args:
        apply: ``model.apply``, ``model.init``, ``state.apply_fn`` or any other function in which
            Flax modules are called, as for `freeze`.

    Returns:
        A function called like `apply`.

    Deprecated: without an argument it returns a context manager that does the same for all calls
    inside. Pass the function instead.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, bn_jax as bn
        >>> layer, x = nn.BatchNorm(use_running_average=False), jnp.array([[1e4 - 1], [1e4 + 1]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, _ = bn.linen.replace_norms(layer.apply)(variables, x, mutable=["batch_stats"])
        >>> y.round(3).tolist()
        [[-1.0], [1.0]]
    """
    if apply is None:
        warnings.warn(
            "replace_norms() as a context manager is deprecated: wrap the function that calls the "
            "model, bn_jax.linen.replace_norms(model.apply)(...).",
            DeprecationWarning,
            stacklevel=2,
        )
        return norms_replaced()

    @functools.wraps(apply)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        with norms_replaced():
            return apply(*args, **kwargs)

    return replaced


# JAX compiles again what it has compiled under another value of this context.
_replacing = jax.make_user_context(False)


@contextmanager
def norms_replaced() -> Iterator[None]:
    """Computes Flax's norms by ours inside; see `replace_norms`."""
    with _replacing(True), nn.intercept_methods(_call_ours):
        yield


def _call_ours(
    next_call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    ours = _CALLS.get(type(context.module))
    if ours is None or context.method_name != "__call__":
        return next_call(*args, **kwargs)
    # The call of Flax's layer has begun, and ours computes within it: so it is one call in what
    # Linen captures and tabulates, and names and random numbers are those of its scope.
    return ours(context.module, *args, **kwargs)


def _call_frozen(
    next_call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    module = context.module
    kind, (base, *_) = type(module).__name__, type(module).__bases__
    if kind == f"Jit{base.__name__}" and any(rule.paths != ("*",) for rule in rules.value):
        raise ValueError(
            f"Paths cannot tell the norms of several {kind} apart, because nn.jit "
            "computes all modules of one class and with the same attributes by the trace of the "
            "first: freeze without paths, give the norms the attribute frozen=True, or compile the "
            "whole step with jax.jit instead of its modules with nn.jit."
        )
    of_flax = isinstance(module, nn.BatchNorm) and not isinstance(module, BatchNorm)
    rule = rule_for(module) if of_flax and context.method_name == "__call__" else None
    if rule is None or not rule.frozen:
        return next_call(*args, **kwargs)
    if type(module) is not nn.BatchNorm:
        raise TypeError(
            f"{'/'.join(module.path)!r} is a {type(module).__name__}, a subclass of "
            "flax.linen.BatchNorm, which may do anything with its statistics: derive it from "
            "bn_jax.linen.BatchNorm, or freeze other paths."
        )
    return _call_ours(next_call, args, kwargs, context)
