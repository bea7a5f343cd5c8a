"""Batch norms by domain from their definition: separate batch norms on the parts of a batch."""

import jax.numpy as jnp
import numpy as np
from support import define_affine, define_batch_norm, define_moments, exact


def define_domains(params, stats, x, *, domain, mask=None, epsilon=1e-5, activation=None,
                   residual=0.0, virtual_batch_size=None, **options):  # fmt: skip
    """Separate norms on the parts; arrays of x's features alone are shared, and -1 is no domain.

    Examples lie along the first axis, and features along the last one.
    """
    weights = np.broadcast_to(1.0 if mask is None else np.asarray(mask), x.shape)
    size = virtual_batch_size or len(x)
    number = max(len(leaf) for leaf in (*params.values(), *stats.values()) if leaf.ndim == 2)
    shared = stats["mean"].ndim == 1
    y, updated = jnp.zeros_like(x), {name: exact(leaf, jnp) for name, leaf in stats.items()}
    known = np.asarray(domain) >= 0
    for d in range(number):
        own = {name: leaf if leaf.ndim == 1 else leaf[d] for name, leaf in params.items()}
        running = {name: leaf if shared else leaf[d] for name, leaf in stats.items()}
        for start in range(0, len(x), size):
            group = np.arange(start, start + size)
            rows = group[np.asarray(domain)[group] == d]
            of = group[known[group]] if shared else rows
            count, mean, var = define_moments(x[of], -1, weights[of], xp=jnp)
            mean = jnp.where(count > 0, mean, running["mean"])
            var = jnp.where(count > 0, var, running["var"])
            affine = own.get("scale"), own.get("bias")
            part = define_affine(x[rows], mean, var, *affine, epsilon=epsilon, xp=jnp)
            y = y.at[rows].set(part)
        rows = np.flatnonzero(known if shared else np.asarray(domain) == d)
        if weights[rows].sum() > options.get("running_var_ddof", 0):
            part = {"mask": weights[rows], "epsilon": epsilon, **options}
            _, new = define_batch_norm(own, running, x[rows], **part, xp=jnp)
            for name, leaf in new.items():
                updated[name] = leaf if shared else updated[name].at[d].set(leaf)
    y = y + residual
    return (y if activation is None else activation(y)), updated
