"""Masks for Optax: which parameters belong to norms, and which should not decay.

They read names and shapes, not classes, and know those of Flax, Haiku, Keras, Equinox and PyTorch.

Example:
    >>> import jax, jax.numpy as jnp, optax, bn_jax as bn
    >>> optimizer = optax.adamw(0.1, weight_decay=0.5, mask=bn.optim.no_weight_decay_mask)
    >>> params = {"dense": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}, "norm": bn.init_params(1)}
    >>> gradients = jax.tree.map(jnp.zeros_like, params)
    >>> updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    >>> jax.tree.map(lambda leaf: round(leaf.item(), 3) + 0.0, updates["dense"])
    {'bias': 0.0, 'kernel': -0.05}
    >>> updates["norm"]["scale"].item() == 0.0
    True
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from flax import nnx
from flax.core.meta import AxisMetadata

from bn_jax._paths import batch_stats_by_path, format_path

__all__ = ["no_weight_decay_mask", "norm_params_mask"]

_Shape: TypeAlias = tuple[int, ...]

# What a norm holds: in Flax, Haiku and Keras. No other layer of theirs holds only these.
_AFFINE = (
    {"scale", "bias"},
    {"scale", "offset"},
    {"gamma", "beta"},
)
# Equinox and PyTorch call the parameters of a norm as those of a linear layer.
_WEIGHT = {"weight", "bias"}
_STATISTICS = {
    "moving_mean",
    "moving_variance",
    "running_mean",
    "running_var",
    "num_batches_tracked",
}

# What holds parameters and is no module: `flax.linen.WeightNorm` calls the length of a kernel
# `dense/kernel/scale`, and Haiku calls parameters outside of modules `~/scale`.
_NO_MODULES = {"kernel", "embedding", "bias", "~"}


def no_weight_decay_mask(params: Any) -> Any:
    """Masks weight decay: False (no decay) for scale and bias of norms and for all other biases.

    As Optax expects, True is where weights decay. Pass the function itself as ``mask``:
    ``optax.adamw(1e-3, weight_decay=1e-2, mask=bn_jax.optim.no_weight_decay_mask)``. It also works
    with `optax.add_decayed_weights`, `optax.lamb` and `optax.lion`.

    Norms are recognized as in `norm_params_mask`. A bias is any parameter called ``bias`` or
    ``bias_...``, and Haiku's ``b``: alone, beside a ``w``, or of at most one axis. Running
    statistics among the parameters do not decay. The scale of `flax.linen.WeightNorm` is the length
    of a weight and not part of a norm, so it decays.

    Args:
        params: the parameters, as in `norm_params_mask`.

    Returns:
        The tree of `params`, with a bool for each parameter.

    Warns:
        UserWarning: as `norm_params_mask`.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> dense = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> mask = bn.optim.no_weight_decay_mask({"dense": dense, "norm": bn.init_params(3)})
        >>> mask["dense"]
        {'bias': False, 'kernel': True}
        >>> mask["norm"]
        {'bias': False, 'scale': False}

    Reference: "no bias decay" in He et al. 2019, https://arxiv.org/abs/1812.01187.
    """
    layers = _layers_of(params)
    of_norms = _norm_params(layers, set())
    _warn_without_norms(params, bool(of_norms))

    def decays(path: str, name: str) -> bool:
        is_other = (path, name) not in of_norms and name not in _STATISTICS
        return is_other and not layers[path].is_bias(name)

    return _mask(params, decays)


def norm_params_mask(params: Any, batch_stats: Any = None) -> Any:
    """Masks norms: True for their scale and bias, False for every other parameter.

    Pass it as the mask of `optax.masked`, or make labels of its tree::

        optax.chain(optimizer, optax.masked(optax.set_to_zero(), norm_params_mask))  # freezes them

        def labels(params):
            mask = norm_params_mask(params)
            return jax.tree.map(lambda is_norm: "norms" if is_norm else "rest", mask)

        optax.partition({"norms": optax.sgd(1e-2), "rest": optax.adamw(1e-3)}, labels)

    A norm is recognized by the names and shapes of its parameters, not by its own name or class.
    They are alone in their module, and they are one of:

    - ``scale``, with ``bias`` (Flax) or ``offset`` (Haiku) or without;
    - ``gamma`` and ``beta``, or one of them (Keras);
    - ``weight`` and ``bias`` of the same shape, or a ``weight`` of one axis (Equinox, PyTorch);
      the weight of a linear layer has more axes than its bias;
    - ``offset`` alone; ``bias`` alone if `batch_stats` has a ``mean`` and a ``var`` at its path.

    Where these leave it open, the name of a module decides: ``bias`` alone, or a ``weight`` of
    several axes alone, belong to a norm if the name contains "norm".

    Args:
        params: a tree of parameters with these names: of a Linen model (mappings, possibly frozen,
            boxed, or stacked by a lifted transform), of an NNX model (`nnx.state(model, nnx.Param)`
            or its pure dictionary), of Haiku, of Keras or PyTorch (``{path: array}``, with ``/`` or
            ``.`` between the parts of a path), or an Equinox model (``eqx.filter(model,
            eqx.is_inexact_array)``).
        batch_stats: the running statistics of the model, or `nnx.state(model, nnx.BatchStat)`.

    Returns:
        The tree of `params`, with a bool for each parameter. A bool replaces a whole
        `nnx.Variable`, because `nnx.Optimizer` passes parameters to Optax with and without it.

    Warns:
        UserWarning: `params` hold parameters, but none of a norm, and `batch_stats` none either.
            (Not where Optax has masked a part of them.)

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> dense = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> bn.optim.norm_params_mask({"dense": dense, "norm": {"scale": jnp.ones(3)}})
        {'dense': {'bias': False, 'kernel': False}, 'norm': {'scale': True}}
        >>> haiku = {"linear": {"w": jnp.ones((2, 3))}, "layer_norm": {"offset": jnp.zeros(3)}}
        >>> bn.optim.norm_params_mask(haiku)
        {'layer_norm': {'offset': True}, 'linear': {'w': False}}
    """
    running = set(batch_stats_by_path(batch_stats))
    of_norms = _norm_params(_layers_of(params), running)
    _warn_without_norms(params, bool(of_norms or running))
    return _mask(params, lambda path, name: (path, name) in of_norms)


@dataclass
class _Layer:
    """What a module holds.

    Attributes:
        path: of the module.
        shapes: of its parameters; None for other leaves, which an unfiltered Equinox model has.
        inner: the names of the modules in it.
    """

    path: str
    shapes: dict[str, _Shape | None] = field(default_factory=dict)
    inner: set[str] = field(default_factory=set)

    @property
    def params(self) -> set[str]:
        """The names of the parameters, without those of running statistics."""
        return {name for name, shape in self.shapes.items() if shape is not None} - _STATISTICS

    def is_norm(self, running: set[str]) -> bool:
        """Tells whether the parameters are those of a norm; `running` has paths of statistics."""
        names = self.params
        own_name = _split(self.path)[1]
        if self.inner or not names or own_name in _NO_MODULES:
            return False
        is_called_norm = "norm" in own_name.lower()
        if names == {"bias"}:
            return self.path in running or is_called_norm
        if names == _WEIGHT:
            return self.shapes["weight"] == self.shapes["bias"]
        if names == {"weight"}:
            return len(self.shapes["weight"] or ()) == 1 or is_called_norm
        return any(names <= affine for affine in _AFFINE)

    def is_bias(self, name: str) -> bool:
        """Tells whether a parameter is a bias, of any layer."""
        if name == "b":  # Haiku's; in other trees a matrix may be called so.
            of_linear = any(other.startswith("w") for other in self.shapes)
            return of_linear or len(self.shapes) == 1 or len(self.shapes[name] or ()) <= 1
        return name == "bias" or name.startswith("bias_")


# Between the names of a path: Haiku, Keras and PyTorch write whole paths as keys.
_NAMES = re.compile("[/.]")


def _split(path: str) -> tuple[str, str]:
    """Returns the path of the module around a node, and the name of the node in it."""
    *_, name = _NAMES.split(path)
    return path[: -len(name) - 1], name


def _layers_of(params: Any) -> dict[str, _Layer]:
    """Returns the modules of a tree of parameters, by their paths."""
    layers: dict[str, _Layer] = {}

    def at(path: str) -> _Layer:
        return layers.setdefault(path, _Layer(path))

    for keys, leaf in jax.tree.leaves_with_path(params, is_leaf=_is_parameter):
        path, name = _split(format_path(keys))
        at(path).shapes[name] = _shape(leaf)
        while path:
            path, name = _split(path)
            at(path).inner.add(name)
    return layers


def _norm_params(layers: dict[str, _Layer], running: set[str]) -> set[tuple[str, str]]:
    """Returns the parameters of norms, each as the path of its module and its name."""
    norms = [layer for layer in layers.values() if layer.is_norm(running)]
    return {(norm.path, name) for norm in norms for name in norm.params}


def _mask(params: Any, is_chosen: Callable[[str, str], bool]) -> Any:
    """Returns the tree of `params` with a bool for each parameter, by its module and its name."""

    def mask(keys: tuple[Any, ...], node: Any) -> Any:
        chosen = is_chosen(*_split(format_path(keys)))
        return jax.tree.map(lambda _: chosen, node, is_leaf=_is_variable)

    return jax.tree.map_with_path(mask, params, is_leaf=_is_parameter)


def _warn_without_norms(params: Any, has_norms: bool) -> None:
    """Warns of parameters without a norm, unless Optax has taken some out."""
    leaves = jax.tree.leaves(params, is_leaf=_is_masked)
    if has_norms or not leaves or any(map(_is_masked, leaves)):
        return
    paths = [format_path(keys) for keys, _ in jax.tree.leaves_with_path(params)]
    shown = ", ".join(map(repr, paths[:4])) + (", ..." if len(paths) > 4 else "")
    warnings.warn(
        f"params hold no norm: none of its {len(paths)} parameters, {shown}, is recognized as the "
        "scale or bias of one. Pass the whole tree of parameters with the names that the layers "
        "gave them (scale and bias, scale and offset, gamma and beta, or weight and bias), or "
        "leave the mask out if the model has no norm.",
        stacklevel=3,
    )


def _shape(leaf: Any) -> _Shape | None:
    """Returns the shape of the array in a parameter; None if there is none."""
    if _is_masked(leaf):
        return ()
    arrays = jax.tree.leaves(leaf)
    is_numeric = arrays and (hasattr(arrays[0], "shape") or isinstance(arrays[0], float))
    return tuple(np.shape(arrays[0])) if is_numeric else None


def _is_parameter(node: Any) -> bool:
    return _is_variable(node) or isinstance(node, AxisMetadata) or _is_masked(node)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
