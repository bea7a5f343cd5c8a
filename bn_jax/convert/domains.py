"""Norms of several domains: one norm here, one for each domain in PyTorch.

There, they are the children of a list, or a norm with others inside, as in timm's
`SplitBatchNorm2d`. Their arrays are stacked under the keys that one norm would have.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from bn_jax.convert.keys import Leaf, at_layer, running_statistics
from bn_jax.convert.layouts import Layout, NormsOfDomains

# The keys of the arrays of all domains, by the key of the stacked array.
Parts: TypeAlias = Mapping[str, Sequence[str]]


def parts_of(keys: Iterable[str], leaves: Iterable[Leaf], layout: Layout) -> Parts:
    """Returns which arrays of a library belong together, as those of the domains of one norm.

    Args:
        keys: of the arrays of the library.
        leaves: the leaves of the Flax model.
        layout: the library.
    """
    keys = set(keys)
    templates = [*layout.norm.values(), *(extra.key for extra in layout.extras)]
    parts: dict[str, Sequence[str]] = {}
    for layer in layers_by_domain(leaves):
        norms = _norms_at(layer, keys, layout)
        for template in templates if norms else ():
            of_domains = [at_layer(template, norm) for norm in norms]
            if keys.issuperset(of_domains):
                parts[at_layer(template, layer)] = of_domains
    return parts


def layers_by_domain(leaves: Iterable[Leaf]) -> dict[str, Leaf]:
    """Returns the means of the norms with statistics by domain, by the layers in the library."""
    statistics = running_statistics(leaves)
    return {layer: both["mean"] for layer, both in statistics.items() if both["mean"].by_domain}


def _norms_at(layer: str, keys: set[str], layout: Layout) -> list[str]:
    """Returns the paths of the norms of all domains in a library, or none."""
    for form in layout.domains:
        norms: list[str] = []
        while at_layer(layout.norm["mean"], path := _path_of(form, len(norms), layer)) in keys:
            norms.append(path)
        if len(norms) > len(form.first):
            return norms
    return []


def _path_of(form: NormsOfDomains, domain: int, layer: str) -> str:
    if domain < len(form.first):
        return at_layer(form.first[domain], layer)
    number = str(domain - len(form.first))
    return at_layer(form.others, layer).replace("{number}", number)


def stack(arrays: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    """Returns the arrays of a library with those of the domains of a norm stacked."""
    stacked = {}
    for key, keys in parts.items():
        if len({np.shape(arrays[of_domain]) for of_domain in keys}) == 1:
            stacked[key] = _stack([arrays[of_domain] for of_domain in keys])
    taken = {of_domain for key in stacked for of_domain in parts[key]}
    return {key: array for key, array in arrays.items() if key not in taken} | stacked


def _stack(arrays: Sequence[Any]) -> Any:
    first = arrays[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(arrays), *first.shape), first.dtype)
    return np.stack([np.asarray(array) for array in arrays])


def unstack(arrays: Mapping[str, np.ndarray], parts: Parts) -> dict[str, np.ndarray]:
    """Returns the arrays of a library with an array for each domain, the inverse of `stack`."""
    unstacked: dict[str, np.ndarray] = {}
    for key, array in arrays.items():
        if key in parts:
            rows = [np.array(row, order="C") for row in array]
            unstacked |= dict(zip(parts[key], rows, strict=True))
        else:
            unstacked[key] = array
    return unstacked
