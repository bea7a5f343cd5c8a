"""The names by which policies of `jax.checkpoint` recognize a norm's input and moments."""

from typing import TypeVar

from jax.ad_checkpoint import checkpoint_name

INPUT_NAME = "bn_jax.input"
MOMENTS_NAME = "bn_jax.moments"
_USE_NAME = "bn_jax.use"

Values = TypeVar("Values")


def named(name: str, values: Values) -> Values:
    """Names arrays for `jax.checkpoint`.

    They get a second name, which no policy keeps. Without it, what uses the arrays in the backward
    pass would lie under the first name, and every nested `jax.checkpoint` would keep them again.

    Args:
        name: `INPUT_NAME` or `MOMENTS_NAME`.
        values: a tree of arrays.

    Returns:
        The same values.
    """
    return checkpoint_name(checkpoint_name(values, name), _USE_NAME)
