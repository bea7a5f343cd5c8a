"""The NNX batch norm by domain."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bn_jax.nnx.running import BatchNorm, call_batch_norm


class DomainBatchNorm(BatchNorm):
    """Batch normalization with statistics, parameters or both by domain.

    Every example is normalized as by a `BatchNorm` of its domain alone, as
    `bn_jax.domain_batch_norm` computes it. ``scale`` and ``bias``, and ``mean`` and ``var``, have
    the shape ``[num_domains, num_features]``. It has all arguments of `BatchNorm`, with their
    defaults.

    Args:
        num_features: the size of `axis`.
        num_domains: how many domains there are.
        share_params: True for one ``scale`` and ``bias`` for all domains.
        share_stats: True for one ``mean`` and ``var``, of all examples together, as in conditional
            batch norm.
        **options: the other arguments of `BatchNorm`; `rngs` is required.

    Raises:
        ValueError, TraceContextError: as in `BatchNorm`, or as in `bn_jax.domain_batch_norm`.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.DomainBatchNorm(1, 2, momentum=0.5, rngs=nnx.Rngs(0))
        >>> x, domain = jnp.array([[1.0], [3.0], [10.0], [30.0]]), jnp.array([0, 0, 1, 1])
        >>> layer(x, domain).round(3).tolist()
        [[-1.0], [1.0], [-1.0], [1.0]]
        >>> layer.mean[...].tolist()
        [[1.0], [10.0]]

    Reference: Chang et al. 2019, https://arxiv.org/abs/1906.03950.
    """

    def __init__(
        self,
        num_features: int,
        num_domains: int,
        *,
        share_params: bool = False,
        share_stats: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(num_features, rngs=rngs, **options)
        self.num_domains = num_domains
        self.share_params = share_params
        self.share_stats = share_stats
        shape = (num_domains, num_features)
        if not share_params:
            dtype = self.param_dtype
            ones = options.get("scale_init", jax.nn.initializers.ones)
            zeros = options.get("bias_init", jax.nn.initializers.zeros)
            for variable, init in (self.scale, ones), (self.bias, zeros):
                if variable is not None:
                    variable.set_value(init(rngs.params(), shape, dtype))
        if not share_stats:
            for name in {"mean", "var", "count"} & set(vars(self)):
                variable = getattr(self, name)
                variable.set_value(jnp.broadcast_to(variable.get_value(), shape))

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
            x: floating-point or complex array that holds `num_features` features on `axis`.
            domain: integers of shape ``[N]``, an integer for the whole batch, or weights of shape
                ``[N, num_domains]``.
            use_running_average: True for evaluation, False for training; overrides the attribute.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.
            residual: an array of the shape of `x`, added before the activation.
            update_running_average: overrides the attribute.

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
