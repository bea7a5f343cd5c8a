"""What a recalibration returns: new statistics, and a table of what changed."""

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from bn_jax._tables import as_html, as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Norms that a sentence lists; a value that is not finite reaches all norms after it.
MOST_LISTED = 4
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
        left_out: the number of values of a feature that were left out because their batch had a
            value that was not finite, the largest of the features.
        batches_left_out: the number of batches of which values were left out.
    """

    path: str
    mean: float
    var: float
    values: float
    kept: int
    left_out: float
    batches_left_out: int


class Recalibration(NamedTuple):
    """The statistics that `recalibrate` measured; `print` and `plot` show what changed.

    Attributes:
        batch_stats: the collection, in the structure and dtypes of the old one, but in at least
            float32; for an `nnx.Module` the `nnx.State` for ``nnx.update(model, ...)``.
        layers: the change of each norm, in the order of `batch_stats`.
        passes: the number of passes over the batches.
        settled: whether a further pass would change nothing beyond rounding.
        batches: the number of batches in a pass, of all processes.
    """

    batch_stats: Any
    layers: tuple[LayerChange, ...]
    passes: int
    settled: bool
    batches: int

    def __str__(self) -> str:
        return "\n".join([as_text(_HEADER, self._rows()), *self._sentences()])

    def __repr__(self) -> str:
        norms = f"{len(self.layers)} norms"
        return f"Recalibration({norms}, passes={self.passes}, settled={self.settled})"

    def _repr_html_(self) -> str:
        sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in self._sentences())
        return as_html(_HEADER, self._rows()) + sentences

    def plot(self) -> "Figure":
        """Draws how far the statistics of each norm moved, a row for each, in their order.

        Returns:
            A matplotlib figure; ``figure.savefig("recalibration.png")`` writes it.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from bn_jax._recalibrate.picture import draw

        return draw(self)

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
        sentences += self._about_left_out()
        if not self.settled:
            sentences.append(
                f"The statistics had not settled after passes={self.passes}: those of later norms "
                "would still change. Allow more passes."
            )
        return sentences

    def _about_left_out(self) -> list[str]:
        """Returns a sentence for each group of norms that left out equally many batches."""
        groups: dict[int, list[LayerChange]] = {}
        for layer in self.layers:
            if layer.batches_left_out:
                groups.setdefault(layer.batches_left_out, []).append(layer)
        if not groups:
            return []
        sentences = [
            f"{batches} of {self.batches} batches "
            f"{'was' if batches == 1 else 'were'} left out of {_listed_norms(layers)}."
            for batches, layers in sorted(groups.items())
        ]
        return [
            *sentences,
            "Their mean or variance was not finite: one such value keeps all values of its batch "
            "out of the feature. Remove these examples from the data, or mask them.",
        ]


def _listed_norms(layers: Sequence[LayerChange]) -> str:
    """Returns the first norms with the number of values they left out, and how many more."""
    listed = [f"{_name(layer)} ({_of_values(layer)})" for layer in layers[:MOST_LISTED]]
    if more := len(layers) - len(listed):
        listed.append(f"{more} more norm{'s' if more > 1 else ''}")
    return ", ".join(listed)


def _of_values(layer: LayerChange) -> str:
    return f"{layer.left_out:.10g} values of a feature"


def _name(layer: LayerChange) -> str:
    return layer.path or "the top-level norm"


def _about_kept(layer: LayerChange) -> str:
    features = f"{layer.kept} feature{'s' if layer.kept > 1 else ''}"
    if layer.values > 0:
        return (
            f"{_name(layer)} keeps the statistics of {features}, which no batch entered: a batch "
            "with no valid value, or with a single value that is not finite, does not enter."
        )
    if layer.batches_left_out:
        reason = "every batch had a value that was not finite, or no valid value"
    else:
        reason = (
            "it is frozen or does not update, it is of a subclass, forward does not reach it, or "
            "no batch had a valid value"
        )
    return f"{_name(layer)} has measured nothing and keeps its statistics: {reason}."
