"""What in a dataset looks like a mistake, in one line each."""

import collections
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from bn_jax.lab.data import Dataset, NamedDataset, Splits
from bn_jax.lab.datasets.array_checks import FloatArray, describe_shape

__all__ = ["FEW_EXAMPLES", "LARGE_SIDE", "find_oddities"]

# Of ten examples of a class, the test part gets two on average, and the validation part one.
FEW_EXAMPLES = 10
# A channel axis of files is at most this long: red, green, blue and alpha.
MOST_CHANNELS = 4
LARGE_SIDE = 256
# Copies between the parts count as a mistake from this share of the test part on.
LEAST_SHARE = 0.01
CLASSES_LISTED = 5


def find_oddities(named: NamedDataset, splits: Splits) -> tuple[str, ...]:
    """Describes what looks like a mistake in a dataset that can be learned.

    Args:
        named: all examples.
        splits: its parts, not standardized.

    Returns:
        Lines, each with what to do; empty if there is nothing.
    """
    found = [
        _describe_numbering(named),
        _describe_few(named),
        _describe_untrained(named, splits.train),
        _describe_axes(named.dataset.x),
        _describe_constant_channel(named.dataset.x),
        _describe_size(named.dataset.x),
        _describe_copies(splits),
        _describe_contradictions(named),
    ]
    return tuple(line for line in found if line is not None)


def _describe_numbering(named: NamedDataset) -> str | None:
    counts = np.bincount(named.dataset.y)
    empty = np.flatnonzero(counts == 0)
    if not empty.size:
        return None
    fix = (
        "an output of the network is wasted on each; number the classes without gaps, e.g. "
        "y = numpy.unique(y, return_inverse=True)[1]"
    )
    first = int(np.argmax(counts > 0))
    if first == empty.size:
        lower = "class 0 has" if first == 1 else f"classes 0 to {first - 1} have"
        return f"labels start at {first}, so {lower} no example: {fix}"
    return f"labels up to {len(counts) - 1} leave out {_list_labels(empty, named)}: {fix}"


def _describe_few(named: NamedDataset) -> str | None:
    counts = np.bincount(named.dataset.y)
    few = np.flatnonzero((counts > 0) & (counts < FEW_EXAMPLES))
    if not few.size:
        return None
    least = int(few[np.argmin(counts[few])])
    return (
        f"{few.size} of {np.count_nonzero(counts)} classes with fewer than {FEW_EXAMPLES} "
        f"examples, of which the test part gets 2 on average: {_list_labels(few, named)}; the "
        f"fewest, {counts[least]}, has {_name(least, named)}; add examples or join classes"
    )


def _describe_untrained(named: NamedDataset, train: Dataset) -> str | None:
    untrained = np.setdiff1d(named.dataset.y, train.y)
    if not untrained.size:
        return None
    return (
        "the training part has no example of class "
        f"{_list_labels(untrained, named)}, which cannot be learned; add examples or choose "
        "another --seed"
    )


def _describe_axes(x: FloatArray) -> str | None:
    _, height, width, channels = x.shape
    if height not in (1, 3, MOST_CHANNELS) or channels <= MOST_CHANNELS or width <= MOST_CHANNELS:
        return None
    return (
        f"images of {height} x {width} pixels with {channels} channels look as if they had "
        "their channels first, expected [N, H, W, C]; if so, x.transpose(0, 2, 3, 1)"
    )


def _describe_constant_channel(x: FloatArray) -> str | None:
    constant = [c for c in range(x.shape[3]) if (x[..., c] == x[0, 0, 0, c]).all()]
    if not constant or len(constant) == x.shape[3]:
        return None
    return (
        f"channel {constant[0]} of {x.shape[3]} is {x[0, 0, 0, constant[0]]:g} in every pixel, as "
        f"the alpha channel of opaque images; leave it out: numpy.delete(x, {constant}, axis=-1)"
    )


def _describe_size(x: FloatArray) -> str | None:
    height, width = x.shape[1:3]
    if height * width <= LARGE_SIDE**2:
        return None
    return (
        f"images have {describe_shape((height, width))} pixels, more than {LARGE_SIDE}x"
        f"{LARGE_SIDE}: a step takes long and much memory; make them smaller, or lower "
        "--batch-size"
    )


def _describe_copies(splits: Splits) -> str | None:
    known = set(_digests(splits.train.x))
    copies = sum(digest in known for digest in _digests(splits.test.x))
    if copies < LEAST_SHARE * len(splits.test.y) or not copies:
        return None
    return (
        f"{copies} of {len(splits.test.y)} test images are in the training part too, so the test "
        "accuracy says too much; remove copies, e.g. "
        "first = numpy.unique(x, axis=0, return_index=True)[1]; x, y = x[first], y[first]"
    )


def _describe_contradictions(named: NamedDataset) -> str | None:
    labels: dict[bytes, set[int]] = collections.defaultdict(set)
    for digest, label in zip(_digests(named.dataset.x), named.dataset.y.tolist(), strict=True):
        labels[digest].add(label)
    several = [found for found in labels.values() if len(found) > 1]
    if not several:
        return None
    example = " and ".join(_name(label, named) for label in sorted(several[0])[:2])
    return (
        f"{len(several)} images occur with different labels, e.g. {example}; check how y was "
        "written"
    )


def _digests(x: FloatArray) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in x]


def _list_labels(labels: npt.NDArray[np.integer[Any]], named: NamedDataset) -> str:
    listed = ", ".join(_name(int(label), named) for label in labels[:CLASSES_LISTED])
    more = len(labels) - CLASSES_LISTED
    return listed + (f" and {more} more" if more > 0 else "")


def _name(label: int, named: NamedDataset) -> str:
    names = named.class_names
    return str(label) if names is None else f"{label} ({names[label]})"
