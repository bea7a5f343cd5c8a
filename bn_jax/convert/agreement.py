"""Checks that arrays of a library and leaves of Flax agree; one error lists all that do not."""

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bn_jax.convert.kernels import fits, shape_in_library
from bn_jax.convert.keys import Leaf, at_layer, running_statistics
from bn_jax.convert.layouts import Layout

__all__ = ["require_agreement"]


def require_agreement(
    name: str, leaves: list[Leaf], received: Mapping[str, Any], layout: Layout
) -> None:
    """Raises one error for all keys of the argument `name` that do not fit the leaves."""
    expected = {leaf.key: f"{shape_in_library(leaf, layout)} for {leaf.path}" for leaf in leaves}
    norms = running_statistics(leaves)
    optional = {at_layer(extra.key, norm) for extra in layout.extras for norm in norms}
    if layout.counter is not None:
        for norm in norms:
            expected[at_layer(layout.counter, norm)] = "() for the averages"
    shapes = {key: tuple(np.shape(array)) for key, array in received.items()}
    unknown = [key for key in shapes if key not in expected and key not in optional]
    missing = [key for key in expected if key not in shapes]
    misshaped = [
        leaf.key
        for leaf in leaves
        if leaf.key in shapes and not fits(shapes[leaf.key], leaf, layout)
    ]
    if not (unknown or missing or misshaped):
        return
    lines = [f"{name} does not fit the variables of Flax."]
    if missing:
        lines.append(f"missing from {name}, {len(missing)} in all:")
        lines += [f"  {key} {expected[key]}{_hint(key, unknown)}" for key in missing]
    if unknown:
        lines.append(f"unknown in {name}, {len(unknown)} in all:")
        lines += [f"  {key} {shapes[key]}" for key in unknown]
    if misshaped:
        lines.append(f"of another shape in {name}, {len(misshaped)} in all:")
        lines += [f"  {key} {shapes[key]}, expected {expected[key]}" for key in misshaped]
    lines.append(
        "Pass names={'path in Flax': 'path in the library'} or a function to say which layer is "
        "which, and transposed=['path in Flax'] to say which layers are ConvTranspose. Where no "
        f"name of a layer helps, rename or remove the unknown keys of {name} yourself."
    )
    raise ValueError("\n".join(lines))


def _hint(key: str, candidates: list[str]) -> str:
    # Comparing every pair takes long; where hundreds of keys are unknown, the names are wrong.
    near = difflib.get_close_matches(key, candidates[:100], n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""
