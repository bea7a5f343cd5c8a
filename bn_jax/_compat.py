"""What is unstable in JAX or Flax and has no other way: one entry each, with the reason.

Each has a test in `tests/test_compat.py`, so that a release that changes one is noticed there.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
from jax import lax
from jax.extend import core as extend_core

# Raised where sizes cannot be compared, because a symbolic one decides. JAX 0.9 has it in
# `jax.core`, from which later releases remove it.
InconclusiveDimensionOperation: type[Exception] = getattr(
    jax.errors, "InconclusiveDimensionOperation", None
) or getattr(jax.core, "InconclusiveDimensionOperation")  # noqa: B009


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


def bind(equation: extend_core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Computes the outputs of a traced equation from the values of its inputs, differentiably.

    The parameters of a call hold its body as a jaxpr, and `bind` wants it as a function.
    `get_bind_params` of the primitive translates; JAX 0.9 returns the functions apart. Modes such
    as `jax.threefry_partitionable`, and the names of scopes for profilers, are those of the trace.
    """
    primitive = equation.primitive
    translated = primitive.get_bind_params(equation.params)
    functions, params = translated if isinstance(translated, tuple) else ((), translated)
    with equation.ctx.manager, jax.named_scope(str(equation.source_info.name_stack)):
        outputs = primitive.bind(*functions, *values, **params)
    return list(outputs) if primitive.multiple_results else [outputs]


def as_set_view(function: Callable[..., None], original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the method `set_view` of an NNX module, as the installed Flax calls it.

    Flax 0.12.4 passes all keywords of `nnx.view`, and wants those back that are not used. Later
    releases pass what the signature names.

    Args:
        function: takes the module, and keywords that it uses.
        original: `set_view` of a module of Flax's.
    """
    kinds = {parameter.kind for parameter in inspect.signature(original).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        return function
    used = set(inspect.signature(function).parameters)

    @wraps(function)
    def set_view(module: Any, **keywords: Any) -> dict[str, Any]:
        function(module, **{name: keywords[name] for name in used & set(keywords)})
        return {name: keywords[name] for name in keywords if name not in used}

    return set_view
