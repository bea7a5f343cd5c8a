"""What is unstable in JAX or Flax and has no other way: one entry each, with the reason.

Each has a test in `tests/test_compat.py`, so that a release that changes one is noticed there.
"""

import jax
from jax import lax
from jax.extend import core as extend_core


def vmap_axes() -> list[str]:
    """Returns the names of the axes that enclosing `vmap`s bind.

    No supported function of JAX lists them. Without this one, a misspelt `axis_name` under `vmap`
    would be taken for one that nothing binds.
    """
    name = "unsafe_get_axis_names_DO_NOT_USE"
    # JAX 0.9 has it in `jax.core`.
    home = extend_core if hasattr(extend_core, name) else jax.core
    return list(getattr(home, name, list)())


def is_axis_bound(name: str) -> bool:
    """Tells whether an enclosing `shard_map`, `pmap` or `vmap` binds an axis of this name.

    JAX answers the question by raising or not.
    """
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Returns the mesh axes that `x` varies over, as far as type-checked `shard_map` knows.

    JAX 0.9 calls the attribute of an array's type `vma`, later releases `manual_axis_type`.
    """
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(kind.vma)
