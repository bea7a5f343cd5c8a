"""Masks for Optax: which parameters belong to a norm, and which are not to decay.

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
from typing import Any

import jax
from flax import nnx
from flax.core.meta import AxisMetadata

from bn_jax._paths import batch_stats_by_path, format_path


def no_weight_decay_mask(params: Any) -> Any:
    """Masks weight decay: False, no decay, for scale and bias of norms and for every other bias.

    True is where Optax decays, whatever the name suggests, so that this function is the ``mask``
    itself: ``optax.adamw(1e-3, weight_decay=1e-2, mask=bn_jax.optim.no_weight_decay_mask)``, and
    likewise that of `optax.add_decayed_weights`, `optax.lamb` and `optax.lion`.

    Norms are recognized as `norm_params_mask` does. A bias is any parameter of that name. The scale
    of `flax.linen.WeightNorm` is the length of a weight, no norm's, and decays.

    Args:
        params: parameters as of `norm_params_mask`.

    Returns:
        The tree of `params` with a bool for every parameter.

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
        of_affine=lambda path, affine: False,
        of_other=lambda path: _name(path) != "bias",
    )


def norm_params_mask(params: Any, batch_stats: Any = None) -> Any:
    """Masks norms: True for their scale and bias, False for every other parameter.

    A function to pass as the mask of `optax.masked`, or whose tree becomes labels::

        optax.chain(optimizer, optax.masked(optax.set_to_zero(), norm_params_mask))  # freezes them

        def labels(params):
            mask = norm_params_mask(params)
            return jax.tree.map(lambda is_norm: "norms" if is_norm else "rest", mask)

        optax.partition({"norms": optax.sgd(1e-2), "rest": optax.adamw(1e-3)}, labels)

    A norm is recognized by structure, whatever it is called and whoever wrote it: a mapping that
    holds the parameter ``scale`` and nothing else but possibly ``bias``. A lone ``bias`` is that of
    a norm if `batch_stats` has a ``mean`` and a ``var`` at its path or if its module's name has
    "norm" in it; a lone bias at the top level, if `batch_stats` says so.

    Args:
        params: parameters of Linen (mappings, frozen or not, boxed or not, stacked by a lifted
            transform or not) or of NNX (`nnx.state(model, nnx.Param)` or its pure dictionary).
        batch_stats: the running statistics beside `params`, or `nnx.state(model, nnx.BatchStat)`.

    Returns:
        The tree of `params` with a bool for every parameter; an `nnx.Variable` counts as one, since
        `nnx.Optimizer` hands Optax parameters with and without it.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> dense = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> bn.optim.norm_params_mask({"dense": dense, "norm": {"scale": jnp.ones(3)}})
        {'dense': {'bias': False, 'kernel': False}, 'norm': {'scale': True}}
    """
    running = batch_stats_by_path(batch_stats)

    def is_norm(path: tuple[Any, ...], affine: Mapping[str, Any]) -> bool:
        return "scale" in affine or format_path(path) in running or "norm" in _name(path).lower()

    return _mask(params, of_affine=is_norm, of_other=lambda path: False)


def _mask(
    params: Any,
    of_affine: Callable[[tuple[Any, ...], Mapping[str, Any]], bool],
    of_other: Callable[[tuple[Any, ...]], bool],
) -> Any:
    """Masks what holds a scale and a bias, or one of them alone, and every other parameter."""

    def mask(path: tuple[Any, ...], node: Any) -> Any:
        chosen = of_affine(path, node) if _is_affine(node) else of_other(path)
        return jax.tree.map(
            lambda _: chosen, node, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )

    return jax.tree.map_with_path(
        mask,
        params,
        is_leaf=lambda node: _is_affine(node) or isinstance(node, nnx.Variable | AxisMetadata),
    )


def _is_affine(node: Any) -> bool:
    if not isinstance(node, Mapping) or any(isinstance(one, Mapping) for one in node.values()):
        return False
    return set(node) <= {"scale", "bias"}


def _name(path: tuple[Any, ...]) -> str:
    return format_path(path[-1:])
