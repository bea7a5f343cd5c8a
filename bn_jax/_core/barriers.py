"""What keeps programs for CPUs cheap: barriers, and conditions that `vmap` does not split."""

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

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


@custom_vmap
def of_any(predicate: jax.Array) -> jax.Array:
    """Returns a boolean; under `vmap`, whether it is true of any example.

    JAX turns a condition that differs between the examples of a `vmap` into both branches and a
    selection, which cannot be transposed.
    """
    return predicate


@of_any.def_vmap
def _of_any_example(
    axis_size: int, in_batched: list[bool], predicate: jax.Array
) -> tuple[jax.Array, bool]:
    del axis_size
    return of_any(jnp.any(predicate, 0) if in_batched[0] else predicate), False
