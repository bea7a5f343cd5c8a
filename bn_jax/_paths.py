"""Paths in trees and models: as text, matched by glob patterns, and those of the norms.

A path is text with `/` between its parts, as Flax writes the names of modules: `stage0/norm`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax


def format_path(keys: tuple[Any, ...]) -> str:
    """Returns the path of a node of a tree, a tuple of keys as JAX gives it, as text."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def matches(pattern: str, path: str) -> bool:
    """Tells whether a glob pattern matches a path, or that of a module around it.

    ``*`` also matches ``/``, as in `fnmatch`. The module around all others has the path ``""``.
    """
    return any(fnmatchcase(around, pattern) for around in _enclosing(path))


def matches_whole(pattern: str, path: str) -> bool:
    """Tells whether a glob pattern matches a path itself, whatever is around it."""
    return fnmatchcase(path, pattern)


def matched(patterns: Iterable[str], path: str) -> set[str]:
    """Returns those of the patterns that match a path, or that of a module around it."""
    return {pattern for pattern in patterns if matches(pattern, path)}


def _enclosing(path: str) -> Iterator[str]:
    yield ""
    parts = path.split("/")
    for length in range(1, len(parts) + 1):
        yield "/".join(parts[:length])


def is_batch_stats(node: Any) -> bool:
    """Tells whether a node of a tree holds the running statistics of one batch norm."""
    return isinstance(node, Mapping) and {"mean", "var"} <= set(node)


def is_whitening_stats(node: Any) -> bool:
    """Tells whether a node of a tree holds the running statistics of one whitening norm."""
    return isinstance(node, Mapping) and {"mean", "cov"} <= set(node)


def batch_stats_by_path(tree: Any) -> dict[str, Any]:
    """Returns the running statistics of every batch norm in a tree, by the norm's path."""
    nodes = jax.tree.leaves_with_path(tree, is_leaf=is_batch_stats)
    return {format_path(keys): node for keys, node in nodes if is_batch_stats(node)}


def whitening_paths(tree: Any) -> list[str]:
    """Returns the paths of the whitening norms whose running statistics are in a tree."""
    nodes = jax.tree.leaves_with_path(tree, is_leaf=is_whitening_stats)
    return [format_path(keys) for keys, node in nodes if is_whitening_stats(node)]


def list_layers(paths: Sequence[str]) -> str:
    """Returns the first paths of a list as text, and the number of the others."""
    names = [path or "the top-level norm" for path in paths]
    text = ", ".join(names[:3])
    return f"{text} and {len(names) - 3} more" if len(names) > 3 else text
