"""Relative errors of trees of arrays, and the assertions about them."""

from typing import Any

import jax
import numpy as np


def relative_error(actual: Any, expected: Any, *, whole: bool = False) -> float:
    """Returns the largest difference of two trees, relative to the largest value.

    Args:
        actual: a tree of arrays.
        expected: a tree of the same structure.
        whole: whether that is the largest value of the whole tree, not of each array.
    """
    require_structure(actual, expected)
    leaves = [
        (np.asarray(one, np.float64), np.asarray(other, np.float64))
        for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    ]
    assert leaves, "nothing to compare"
    for one, other in leaves:
        assert one.shape == other.shape, f"shape {one.shape}, expected {other.shape}"
        assert np.isfinite(one).all() and np.isfinite(other).all(), "a value is not finite"
    sizes = [np.abs(other).max(initial=0) for _, other in leaves]
    return max(
        float(np.abs(one - other).max(initial=0) / ((max(sizes) if whole else size) or 1))
        for (one, other), size in zip(leaves, sizes, strict=True)
    )


def require(error: float, bound: float, what: str) -> float:
    """Asserts that an error is within its bound, and returns it."""
    assert error <= bound, f"{what} differ by {error:.2g}, expected at most {bound:.0e}"
    return error


def require_structure(actual: Any, expected: Any) -> None:
    """Asserts that two trees have the same structure."""
    structure: Any = jax.tree.structure(expected)
    received: Any = jax.tree.structure(actual)
    assert received == structure, "another structure"
