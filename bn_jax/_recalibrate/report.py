"""What a recalibration returns: new statistics, and a table of what changed."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from bn_jax._tables import as_html, as_text

_HEADER = ("norm", "mean moved by", "variance changed", "values")


class LayerChange(NamedTuple):
    """The change of the statistics of one norm.

    Attributes:
        path: its path in ``batch_stats``, joined by "/"; "" at the top level.
        mean: the largest change of a mean, in old standard deviations.
        var: the largest factor by which a variance changed, up or down; at least 1.
        values: the number of values of a feature, the smallest of the features that were measured;
            0 if none was.
        kept: the number of features that kept their statistics because no valid, finite value
            entered.
    """

    path: str
    mean: float
    var: float
    values: float
    kept: int


class Recalibration(NamedTuple):
    """The statistics that `recalibrate` measured; `print` shows a table of what changed.

    Attributes:
        batch_stats: the collection, in the structure and dtypes of the old one, but in at least
            float32; for an `nnx.Module` the `nnx.State` for ``nnx.update(model, ...)``.
        layers: the change of each norm, in the order of `batch_stats`.
        passes: the number of passes over the batches.
        settled: whether a further pass would change nothing beyond rounding.
    """

    batch_stats: Any
    layers: tuple[LayerChange, ...]
    passes: int
    settled: bool

    def __str__(self) -> str:
        return "\n".join([as_text(_HEADER, self._rows()), *self._sentences()])

    def __repr__(self) -> str:
        norms = f"{len(self.layers)} norms"
        return f"Recalibration({norms}, passes={self.passes}, settled={self.settled})"

    def _repr_html_(self) -> str:
        sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in self._sentences())
        return as_html(_HEADER, self._rows()) + sentences

    def _largest_first(self) -> list[LayerChange]:
        return sorted(
            self.layers, key=lambda layer: max(layer.mean, math.log(layer.var)), reverse=True
        )

    def _rows(self) -> Sequence[Sequence[str]]:
        return [
            (
                _name(layer),
                f"{layer.mean:.4g} std",
                f"{layer.var:.4g} times",
                f"{layer.values:.10g}",
            )
            for layer in self._largest_first()
        ]

    def _sentences(self) -> list[str]:
        sentences = [_about_kept(layer) for layer in self._largest_first() if layer.kept]
        if not self.settled:
            sentences.append(
                f"The statistics had not settled after passes={self.passes}: those of later norms "
                "would still change. Allow more passes."
            )
        return sentences


def _name(layer: LayerChange) -> str:
    return layer.path or "the top-level norm"


def _about_kept(layer: LayerChange) -> str:
    if layer.values == 0:
        return (
            f"{_name(layer)} has measured nothing and keeps its statistics: it is frozen or does "
            "not update, it is of a subclass, forward does not reach it, or every batch had no "
            "valid value or a value that was not finite."
        )
    return (
        f"{_name(layer)} keeps the statistics of {layer.kept} features, which no batch entered: a "
        "batch with no valid value, or with a single value that is not finite, does not enter."
    )
