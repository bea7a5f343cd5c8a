"""What became of each norm of a folded model, as data, as text and as HTML."""

from typing import NamedTuple

from bn_jax._tables import as_html, as_text


class FoldedNorm(NamedTuple):
    """What became of a norm.

    Attributes:
        path: of its scale, or else of its bias or statistics; "" at the top of the tree.
        into: the paths of the kernels that it went into, or None.
        reason: why it was left, a whole sentence; None where it was not.
        kind: what it is, where that is no batch norm with a path: "a whitening norm", "a domain
            norm", "a norm without scale and bias", or "a hand-written norm" with its formula.
    """

    path: str
    into: str | None
    reason: str | None
    kind: str = ""

    @property
    def name(self) -> str:
        """The path and the kind; of a layer by itself, "the top-level norm"."""
        return ", ".join(part for part in (self.path, self.kind) if part) or "the top-level norm"


class FoldReport(tuple[FoldedNorm, ...]):
    """What became of each norm, in the order of the program. `print` shows it as a table."""

    __slots__ = ()

    def table(self) -> str:
        """Returns a line for each norm: its path, and what it went into or why it was left."""
        return as_text((), self._rows()) if self else "There is no norm."

    def summary(self) -> str:
        """Returns how many of the norms were folded."""
        if not self:
            return "no norms"
        folded = sum(norm.into is not None for norm in self)
        return f"{folded} of {len(self)} norms folded"

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"FoldReport({self.summary()})"

    def _repr_html_(self) -> str:
        return as_html(("norm", "result"), self._rows(), self.summary())

    def _rows(self) -> list[tuple[str, str]]:
        return [
            (
                norm.name,
                f"into {norm.into}" if norm.into else f"left: {norm.reason}",
            )
            for norm in self
        ]
