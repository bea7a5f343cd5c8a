"""Masks for Optax: which parameters belong to norms, and which should not decay.

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

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from flax import nnx
from flax.core.meta import AxisMetadata

from bn_jax._paths import batch_stats_by_path, format_path

__all__ = ["no_weight_decay_mask", "norm_params_mask"]

# Keys of a node of a tree, as JAX gives them.
_Keys: TypeAlias = tuple[Any, ...]
# What holds `scale`, `bias` or both, and nothing else.
_Affine: TypeAlias = Mapping[str, Any]


def no_weight_decay_mask(params: Any) -> Any:
    """Masks weight decay: False (no decay) for scale and bias of norms and for all other biases.

    As Optax expects, True is where weights decay. Pass the function itself as ``mask``:
    ``optax.adamw(1e-3, weight_decay=1e-2, mask=bn_jax.optim.no_weight_decay_mask)``. It also works
    with `optax.add_decayed_weights`, `optax.lamb` and `optax.lion`.

    Norms are recognized as in `norm_params_mask`. A bias is any parameter of that name. The scale
    of `flax.linen.WeightNorm` is the length of a weight and not part of a norm, so it decays.

    Args:
        params: the parameters, as in `norm_params_mask`.

    Returns:
        The tree of `params`, with a bool for each parameter.

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
    return _mask(
        params,
        of_affine=lambda keys, affine: False,
        of_other=lambda keys: _name(keys) != "bias",
    )


def norm_params_mask(params: Any, batch_stats: Any = None) -> Any:
    """Masks norms: True for their scale and bias, False for every other parameter.

    Pass it as the mask of `optax.masked`, or make labels of its tree::

        optax.chain(optimizer, optax.masked(optax.set_to_zero(), norm_params_mask))  # freezes them

        def labels(params):
            mask = norm_params_mask(params)
            return jax.tree.map(lambda is_norm: "norms" if is_norm else "rest", mask)

        optax.partition({"norms": optax.sgd(1e-2), "rest": optax.adamw(1e-3)}, labels)

    A norm is recognized by its structure, not by its name or class: a mapping that holds the
    parameter ``scale`` and nothing else except ``bias``. A mapping that holds ``bias`` alone is a
    norm if `batch_stats` has a ``mean`` and a ``var`` at its path, or if the name of its module
    contains "norm".

    Args:
        params: the parameters of a Linen model (mappings, possibly frozen, boxed, or stacked by a
            lifted transform) or of an NNX model (`nnx.state(model, nnx.Param)` or its pure
            dictionary).
        batch_stats: the running statistics of the model, or `nnx.state(model, nnx.BatchStat)`.

    Returns:
        The tree of `params`, with a bool for each parameter. A bool replaces a whole
        `nnx.Variable`, because `nnx.Optimizer` passes parameters to Optax with and without it.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> dense = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> bn.optim.norm_params_mask({"dense": dense, "norm": {"scale": jnp.ones(3)}})
        {'dense': {'bias': False, 'kernel': False}, 'norm': {'scale': True}}
    """
    running = batch_stats_by_path(batch_stats)

    def is_norm(keys: _Keys, affine: _Affine) -> bool:
        return "scale" in affine or format_path(keys) in running or "norm" in _name(keys).lower()

    return _mask(params, of_affine=is_norm, of_other=lambda keys: False)


def _mask(
    params: Any,
    of_affine: Callable[[_Keys, _Affine], bool],
    of_other: Callable[[_Keys], bool],
) -> Any:
    """Returns the tree of `params` with a bool for each parameter, by what holds it."""

    def mask(keys: _Keys, node: Any) -> Any:
        is_chosen = of_affine(keys, node) if _is_affine(node) else of_other(keys)
        return jax.tree.map(lambda _: is_chosen, node, is_leaf=_is_variable)

    def is_node(node: Any) -> bool:
        return _is_affine(node) or _is_variable(node) or isinstance(node, AxisMetadata)

    return jax.tree.map_with_path(mask, params, is_leaf=is_node)


def _is_affine(node: Any) -> bool:
    if not isinstance(node, Mapping) or any(isinstance(leaf, Mapping) for leaf in node.values()):
        return False
    return set(node) <= {"scale", "bias"}


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _name(keys: _Keys) -> str:
    return format_path(keys[-1:])
