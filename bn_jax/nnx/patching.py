"""Patching NNX models from outside, in place: `freeze`, `unfreeze`, `replace_norms`."""

import inspect
from collections.abc import Iterator
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax import nnx

from bn_jax._paths import matches
from bn_jax.nnx.running import BatchNorm, RunningNorm, WhiteningNorm
from bn_jax.nnx.stateless import GroupNorm, InstanceNorm, LayerNorm, RMSNorm

M = TypeVar("M")

_REPLACEMENTS: dict[type[nnx.Module], type[nnx.Module]] = {
    nnx.BatchNorm: BatchNorm,
    nnx.LayerNorm: LayerNorm,
    nnx.RMSNorm: RMSNorm,
    nnx.GroupNorm: GroupNorm,
    nnx.InstanceNorm: InstanceNorm,
}
# The norms of this library, with the classes that users derive from them.
_OURS: tuple[type[nnx.Module], ...] = (*_REPLACEMENTS.values(), WhiteningNorm)


def freeze(model: M, *paths: str, train_params: bool = False) -> M:
    """Freezes batch norms in place: running statistics that normalize and do not update.

    Unlike `eval()`, it survives ``model.train()``. To leave the model as it is, freeze a view:
    ``bn_jax.nnx.freeze(nnx.view(model))`` has switches of its own and the same variables.

    Args:
        model: a module, or a tree of them.
        *paths: glob patterns (`fnmatch`; ``*`` also matches ``/``) of the layers' paths in the
            model, or of modules around them, joined by ``/``: ``"stage0/*"``, ``"layers/1"``. For a
            layer in several places, any of its paths counts. Without any: every batch norm.
        train_params: whether ``scale`` and ``bias`` still have a derivative.

    Returns:
        The model.

    Raises:
        ValueError: a pattern matches no batch norm, or there is none; the message lists the paths.
        TypeError: a pattern matches a batch norm of Flax's: call `replace_norms` first. Or `model`
            holds no NNX module.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> bn.nnx.freeze(layer).train()
        >>> layer(jnp.array([[0.0], [1.0]])).round(3).tolist(), layer.mean[...].tolist()
        ([[0.0], [1.0]], [0.0])
    """
    for layer in _running_norms(model, paths):
        layer.frozen, layer.train_params = True, train_params
    return model


def unfreeze(model: M, *paths: str) -> M:
    """Undoes `freeze` in place: ``frozen=False`` and ``train_params=True``.

    Args:
        model: a module, or a tree of them.
        *paths: as for `freeze`.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: as in `freeze`.

    Example:
        >>> import bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.BatchNorm(1, frozen=True, rngs=nnx.Rngs(0))
        >>> bn.nnx.unfreeze(layer).frozen
        False
    """
    for layer in _running_norms(model, paths):
        layer.frozen, layer.train_params = False, True
    return model


def replace_norms(model: M) -> M:
    """Replaces Flax's norms in a model by ours, in place, and returns the model.

    Every layer of a class of Flax's with a namesake here becomes one of that class. It stays the
    same object with the same variables, wherever and however often it occurs, so that an
    `nnx.Optimizer` made before continues to work. Subclasses are left alone: they may do anything.

    Args:
        model: a module, or a tree of them.

    Returns:
        The model.

    Raises:
        ValueError: the model has no norm of Flax's or of this library.
        TypeError: `model` holds no NNX module.

    Example:
        >>> import bn_jax as bn
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> isinstance(bn.nnx.replace_norms(model).layers[0], bn.nnx.BatchNorm)
        True
    """
    _require_modules(model)
    if not replace_norms_in_place(model):
        raise ValueError(
            "model has no norm that can be replaced: no "
            f"{', '.join(f'nnx.{kind.__name__}' for kind in _REPLACEMENTS)}, and no norm of "
            f"bn_jax.nnx{_subclasses_in(model)}. Pass the model that holds the norms."
        )
    return model


def replace_norms_in_place(model: Any) -> bool:
    """Does what `replace_norms` does, and tells whether the model has norms."""
    has_norms = False
    for _, layer in nnx.iter_graph(model):
        ours = _REPLACEMENTS.get(type(layer))
        has_norms |= ours is not None or isinstance(layer, _OURS)
        if ours is not None:
            become(layer, ours)
    return has_norms


def _subclasses_in(model: Any) -> str:
    """Returns what to say about the subclasses of Flax's norms in a model, if there are any."""
    derived = {
        type(layer).__name__
        for _, layer in nnx.iter_graph(model)
        if isinstance(layer, tuple(_REPLACEMENTS))
    }
    if not derived:
        return ""
    return f"; {', '.join(sorted(derived))} must derive from the norms of bn_jax.nnx, not Flax's"


def become(layer: nnx.Module, ours: type[nnx.Module]) -> None:
    """Makes a layer of Flax's one of ours.

    The object must stay the same: containers, other layers that share it and an `nnx.Optimizer`
    refer to it, and NNX has no interceptor that could compute its call differently.
    """
    known = inspect.signature(type(layer).__init__).parameters
    object.__setattr__(layer, "__class__", ours)
    for name, parameter in inspect.signature(ours.__init__).parameters.items():
        if name not in known:
            setattr(layer, name, parameter.default)


def _running_norms(model: Any, patterns: tuple[str, ...]) -> list[RunningNorm]:
    """Returns the norms with statistics of which a path, or one around it, matches a pattern."""
    about_none = (
        "expected an nnx.Module, or a tree of them, with a BatchNorm, BatchRenorm or WhiteningNorm "
        "in it. Pass the model that holds the norms; norms without running statistics, such as "
        "LayerNorm, have nothing to freeze."
    )
    norms: list[RunningNorm] = []
    for path, layer in find_norms(model, patterns, (nnx.BatchNorm, WhiteningNorm), about_none):
        if not isinstance(layer, RunningNorm):
            raise TypeError(
                f"{path!r} is a {type(layer).__module__}.{type(layer).__name__}, "
                "which cannot be frozen: call bn_jax.nnx.replace_norms(model) first; derive "
                "your own classes from bn_jax.nnx.BatchNorm."
            )
        norms.append(layer)
    return norms


def find_norms(
    model: Any, patterns: tuple[str, ...], kinds: tuple[type, ...], about_none: str
) -> list[tuple[str, Any]]:
    """Returns the norms of some kinds, with their paths, that glob patterns match.

    Args:
        model: a module, or a tree of them.
        patterns: of paths of norms, or of modules around them; none for every norm.
        kinds: the classes.
        about_none: what the error for a model without such norms says to do.
    """
    _require_modules(model)
    layers = [(path, node) for path, node in _nodes(model) if isinstance(node, kinds)]
    if not layers:
        raise ValueError(f"model has no batch norm: {about_none}")
    found: list[tuple[str, Any]] = []
    for pattern in patterns or ("*",):
        matching = [(path, layer) for path, layer in layers if matches(pattern, path)]
        if not matching:
            raise ValueError(
                f"No batch norm has a path that matches {pattern!r}; the batch norms have the "
                f"paths {sorted({path for path, _ in layers})}. Pass patterns of these, "
                "or of modules around them."
            )
        found += matching
    return found


def _require_modules(model: Any) -> None:
    """Raises the TypeError for a model that holds no NNX module."""
    if isinstance(model, nn.Module):
        raise TypeError(
            f"model has type {type(model).__name__}, of flax.linen, expected an nnx.Module: "
            "bn_jax.linen has functions of the same names, which take model.apply."
        )
    if not any(isinstance(node, nnx.Module) for _, node in nnx.iter_graph(model)):
        raise TypeError(
            f"model has type {type(model).__name__}, expected an nnx.Module, or a tree of them: "
            "pass the module itself, not its variables, its state or its output."
        )


def _nodes(node: Any, path: str = "", around: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields the nodes of a model, once for each of their paths; a cycle once around."""
    if isinstance(node, nnx.Variable) or any(node is parent for parent in around):
        return
    yield path, node
    children = jax.tree.leaves_with_path(
        node, is_leaf=lambda keys, _: bool(keys), is_leaf_takes_path=True
    )
    for keys, child in children:
        if keys:
            name = jax.tree_util.keystr(keys, simple=True)
            yield from _nodes(child, f"{path}/{name}" if path else name, (*around, node))
