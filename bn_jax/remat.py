"""Policies for `jax.checkpoint`: what a network with norms keeps for its backward pass."""

from collections.abc import Callable
from math import prod
from typing import Any, Literal, get_args

import jax

from bn_jax.moments import INPUT_NAME, MOMENTS_NAME

Keep = Literal["inputs", "moments", "narrow", "offload"]


def remat_policy(keep: Keep = "inputs") -> Callable[..., Any]:
    """Returns the policy that keeps each norm's moments, and what else is named.

    For `jax.checkpoint`, `flax.linen.remat` and `flax.nnx.remat`. The backward pass repeats no
    reduction, no collective and no guard of a norm, whatever is kept; running statistics update
    once. All norms of this package follow it, batch norms and those without state; those of others
    have none of these names and are recomputed whole.
    """
    if keep not in get_args(Keep):
        raise ValueError(f"keep={keep!r}, expected one of {get_args(Keep)}.")
    policies = jax.checkpoint_policies
    if keep == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[MOMENTS_NAME],
            names_which_can_be_offloaded=[INPUT_NAME],
            offload_src="device",
            offload_dst="pinned_host",
        )
    if keep == "inputs":
        return policies.save_only_these_names(INPUT_NAME, MOMENTS_NAME)
    moments = policies.save_only_these_names(MOMENTS_NAME)
    return moments if keep == "moments" else policies.save_from_both_policies(moments, _is_narrow)


def _is_narrow(primitive: Any, *operands: Any, **options: Any) -> bool:
    """Says whether a convolution or a product gives no more values than it takes."""
    if primitive.name not in ("conv_general_dilated", "dot_general"):
        return False
    output, _ = primitive.abstract_eval(*operands, **options)
    return prod(output.shape) <= max(prod(operand.shape) for operand in operands)
