"""Patching Linen models from outside: `freeze`, `unfreeze`, `replace_norms`."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar, overload

import flax.linen as nn
import jax
from flax import nnx

from bn_jax._modules import (
    compute_group_norm,
    compute_instance_norm,
    compute_layer_norm,
    compute_rms_norm,
)
from bn_jax._paths import format_path
from bn_jax.linen.frozen import Rule, rule_for, rules
from bn_jax.linen.running import BatchNorm, WhiteningNorm, call_batch_norm
from bn_jax.linen.stateless import GroupNorm, InstanceNorm, LayerNorm, RMSNorm, call_feature_norm

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
_OURS = (BatchNorm, WhiteningNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm)


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
        ValueError: when called, a pattern matches no batch norm, or there is none; the message
            lists the paths. Or there are paths and a class made by `nn.jit`, which computes all
            its modules with the same attributes by the trace of the first. (`nn.jit` as a decorator
            of a method does so too, and cannot be detected.)
        TypeError: `apply` is a module or no function. When called, a pattern matches a user's
            subclass of `flax.linen.BatchNorm`, which may do anything: derive it from
            `bn_jax.linen.BatchNorm`.

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
        ValueError, TypeError: as for `freeze`.

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
    _require_function(apply)
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

    Raises:
        TypeError: `apply` is a module or no function.
        ValueError: `apply` is a method of a module, such as ``model.apply``, and its first call
            calls no norm of Flax's or of this library.

    Warns:
        UserWarning: `apply` is another function, and its first call calls modules, but no norm.

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

    _require_function(apply)
    is_first_call = True

    @functools.wraps(apply)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_first_call
        # Where `freeze` is around, it calls the norms itself, and raises if there are none.
        if not is_first_call or rules.value:
            with norms_replaced():
                return apply(*args, **kwargs)
        calls: list[nn.Module] = []
        with nn.intercept_methods(functools.partial(_note_call, calls)), norms_replaced():
            result = apply(*args, **kwargs)
        if calls and not _has_norm(calls, (args, kwargs, result)):
            is_model = isinstance(getattr(apply, "__self__", None), nn.Module)
            _complain(calls, is_certain=is_model and "method" not in kwargs)
        is_first_call = False
        return result

    return replaced


def _require_function(apply: Any) -> None:
    """Raises the TypeError for an `apply` that is a module, or cannot be called."""
    received = f"apply has type {type(apply).__name__}"
    if isinstance(apply, nnx.Module):
        raise TypeError(
            f"{received}, an nnx.Module, expected a function such as model.apply: bn_jax.nnx has "
            "functions of the same names, which take the module."
        )
    if isinstance(apply, nn.Module):
        raise TypeError(f"{received}, a module, expected a function: pass model.apply.")
    if not callable(apply):
        raise TypeError(
            f"{received}, expected a function: pass model.apply, or a function in which Flax "
            "modules are called."
        )


def _note_call(
    calls: list[nn.Module],
    next_call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    calls.append(context.module)
    return next_call(*args, **kwargs)


def _has_norm(calls: list[nn.Module], values: Any) -> bool:
    """Tells whether a norm of Flax's or ours was called, or may have been.

    What `nn.jit` or `jax.jit` has compiled before does not call its modules again. Then the
    variables, among the values that a function receives and returns, show that there is a norm.
    """
    kinds = {type(module) for module in calls}
    if any(kind in _CALLS or issubclass(kind, _OURS) for kind in kinds):
        return True
    if any(issubclass(kind, tuple(_CALLS)) and not _is_made_by_jit(kind) for kind in kinds):
        return False  # A class of a user, to whom the variables belong.
    paths = [format_path(keys).split("/") for keys, _ in jax.tree.leaves_with_path(values)]
    return any("batch_stats" in path or "scale" in path[-1:] for path in paths)


def _is_made_by_jit(kind: type[nn.Module]) -> bool:
    return kind.__name__ == f"Jit{kind.__bases__[0].__name__}"


def _complain(calls: list[nn.Module], *, is_certain: bool) -> None:
    kinds = sorted({type(module).__name__ for module in calls})
    message = (
        "apply called no norm that can be replaced: no "
        f"{', '.join(f'nn.{kind.__name__}' for kind in _CALLS)}, and no norm of bn_jax.linen, only "
        f"{', '.join(kinds)}. Pass a function that calls norms; subclasses of Flax's must derive "
        "from bn_jax.linen's instead."
    )
    if is_certain:
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


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
    if _is_made_by_jit(type(module)) and any(rule.paths != ("*",) for rule in rules.value):
        raise ValueError(
            f"Paths cannot tell the norms of several {type(module).__name__} apart, because nn.jit "
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
