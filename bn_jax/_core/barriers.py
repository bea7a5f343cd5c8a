"""Barriers that keep XLA for CPUs from writing out what several loops share."""

from functools import partial
from typing import TypeVar

import jax
from jax import lax

from bn_jax._compat import varying_axes
from bn_jax._core.axes import vary_over

Values = TypeVar("Values")


def unshared(values: Values) -> Values:
    """Returns the values behind a barrier on a CPU, so that XLA does not share work on them.

    There, XLA writes out what two loops share, in float32.
    """
    # A barrier makes all of them vary over the same mesh axes, and so must the other branch.
    names: frozenset[str] = frozenset().union(*map(varying_axes, jax.tree.leaves(values)))
    return lax.platform_dependent(
        jax.tree.map(partial(vary_over, names), values),
        cpu=lax.optimization_barrier,
        default=lambda values: values,
    )
