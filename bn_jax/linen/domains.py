"""The Linen batch norm by domain, and checkpoints between it and plain batch norms."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bn_jax.linen.running import BatchNorm, call_batch_norm


class DomainBatchNorm(BatchNorm):
    """Batch normalization with statistics, parameters or both by domain.

    Every example is normalized as by a `BatchNorm` of its domain alone, as
    `bn_jax.domain_batch_norm` computes it. ``scale`` and ``bias``, and ``mean`` and ``var``, have a
    leading axis of `num_domains`. It has all attributes of `BatchNorm`, with their defaults.
    `split_batch_norms` makes its variables from those of a `BatchNorm`, and `select_domain` goes
    back.

    Attributes beyond those of BatchNorm:
        num_domains: how many domains there are.
        share_params: True for one ``scale`` and ``bias`` for all domains.
        share_stats: True for one ``mean`` and ``var``, of all examples together, as in conditional
            batch norm.

    Raises:
        ValueError: as in `BatchNorm`, or as in `bn_jax.domain_batch_norm`.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> layer = bn.linen.DomainBatchNorm(
        ...     num_domains=2, use_running_average=False, momentum=0.5
        ... )
        >>> x, domain = jnp.array([[1.0], [3.0], [10.0], [30.0]]), jnp.array([0, 0, 1, 1])
        >>> variables = layer.init(jax.random.key(0), x, domain)
        >>> y, updates = layer.apply(variables, x, domain, mutable=["batch_stats"])
        >>> y.round(3).tolist(), updates["batch_stats"]["mean"].tolist()
        ([[-1.0], [1.0], [-1.0], [1.0]], [[1.0], [10.0]])

    Reference: Chang et al. 2019, https://arxiv.org/abs/1906.03950.
    """

    num_domains: int = 2
    share_params: bool = False
    share_stats: bool = False

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        x: jax.Array,
        domain: jax.Array | int,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_running_average: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array that holds the features on `axis`.
            domain: integers of shape ``[N]``, an integer for the whole batch, or weights of shape
                ``[N, num_domains]``.
            use_running_average: True for evaluation, False for training; overrides None in the
                attribute of that name.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.
            residual: an array of the shape of `x`, added before the activation.
            update_running_average: overrides None in the attribute of that name.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return call_batch_norm(
            self,
            x,
            use_running_average,
            mask=mask,
            residual=residual,
            update_running_average=update_running_average,
            domain=domain,
        )


def split_batch_norms(
    variables: Mapping[str, Any],
    num_domains: int,
    *,
    share_params: bool = False,
    share_stats: bool = False,
) -> dict[str, Any]:
    """Returns the variables of a model with batch norms by domain from those of a plain model.

    Every domain starts from the statistics and parameters of the plain norm, so that the model
    computes the same for all domains.

    Args:
        variables: ``{"params": ..., "batch_stats": ...}`` of a model with `BatchNorm` layers, ours
            or Flax's.
        num_domains: how many domains the layers have.
        share_params: as the `DomainBatchNorm` layers have it.
        share_stats: as the `DomainBatchNorm` layers have it.

    Returns:
        New variables; what belongs to no batch norm is as it was.

    Raises:
        ValueError: `variables` have no batch norm.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> plain = bn.linen.BatchNorm(use_running_average=True)
        >>> variables = plain.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> split = bn.linen.split_batch_norms(variables, 2)
        >>> split["batch_stats"]["var"].shape, split["params"]["scale"].shape
        ((2, 3), (2, 3))
    """

    def repeat(leaf: Any) -> jax.Array:
        return jnp.repeat(jnp.asarray(leaf)[None], num_domains, axis=0)

    def split(name: str, leaf: Any) -> Any:
        shared = share_params if name in ("scale", "bias") else share_stats
        return leaf if shared else repeat(leaf)

    return _map_norms(split, variables)


def select_domain(variables: Mapping[str, Any], domain: int) -> dict[str, Any]:
    """Returns the variables of a plain model from those of one with batch norms by domain.

    The plain model computes what the other does for examples of this domain. So every tool for
    plain models, `bn_jax.fold` for example, works on one domain.

    Args:
        variables: ``{"params": ..., "batch_stats": ...}`` of a model with `DomainBatchNorm` layers,
            each over one feature axis. Layers without domains stay as they are.
        domain: the domain.

    Returns:
        New variables.

    Raises:
        ValueError: `variables` have no batch norm by domain, or not this domain.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> layer = bn.linen.DomainBatchNorm(num_domains=2, use_running_average=True)
        >>> x = jnp.ones((4, 3))
        >>> variables = layer.init(jax.random.key(0), x, 1)
        >>> plain = bn.linen.BatchNorm(use_running_average=True)
        >>> y = plain.apply(bn.linen.select_domain(variables, 1), x)
        >>> jnp.allclose(y, layer.apply(variables, x, 1))
        Array(True, dtype=bool)
    """
    numbers = set()

    def select(name: str, leaf: Any) -> Any:
        if jnp.ndim(leaf) != 2:
            return leaf
        numbers.add(len(leaf))
        return leaf[domain] if -len(leaf) <= domain < len(leaf) else leaf

    selected = _map_norms(select, variables)
    if not numbers or not 0 <= domain < min(numbers):
        raise ValueError(
            f"variables have batch norms of {sorted(numbers) or 'no'} domains, and domain={domain} "
            "was asked for; expected arrays of shape (D, features) in a batch norm, and a domain "
            "from 0 to D - 1."
        )
    return selected


def _map_norms(change: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Applies a function of name and array to what belongs to the batch norms of variables."""
    found = 0

    def visit(stats: Mapping[str, Any], params: Any) -> tuple[dict[str, Any], Any]:
        nonlocal found
        params = dict(params) if isinstance(params, Mapping) else params
        if "mean" in stats and "var" in stats:
            found += 1
            if isinstance(params, dict):
                for name in {"scale", "bias"} & set(params):
                    params[name] = jax.tree.map(lambda leaf, n=name: change(n, leaf), params[name])
            return {
                name: jax.tree.map(lambda leaf, n=name: change(n, leaf), value)
                for name, value in stats.items()
            }, params
        new = {}
        for name, child in stats.items():
            of_params = params.get(name) if isinstance(params, dict) else None
            new[name], changed = visit(child, of_params)
            if changed is not None and isinstance(params, dict):
                params[name] = changed
        return new, params

    stats, params = visit(variables.get("batch_stats", {}), variables.get("params", {}))
    if not found:
        raise ValueError(
            "variables have no batch norm, with mean and var in 'batch_stats'; expected "
            "{'params': ..., 'batch_stats': ...}, as init returns them."
        )
    return {**variables, "params": params, "batch_stats": stats}
