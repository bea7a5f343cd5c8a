"""What an audit returns: a row for each norm, the findings, and both as tables."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from bn_jax._tables import as_html, as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind: TypeAlias = Literal[
    "never updated",
    "stale",
    "differs in evaluation",
    "normalizes by the batch",
    "not finite",
    "dead features",
    "bias without effect",
    "weight decay",
    "small batch",
    "domain without examples",
    "saturated",
    "redundant scale",
]

_HEADER = (
    *("layer", "features", "values", "mean off", "in s.e.", "var off", "in s.e."),
    *("var error", "saturated"),
)


# What the columns of the table are, for the text and for HTML.
_COLUMNS = (
    ("values", "of a feature in the batch"),
    ("mean off", "largest distance of a running mean from the batch's, in standard deviations"),
    ("var off", "largest factor between a running variance and the batch's"),
    ("in s.e.", "the distance before it, of the variances in logarithms, in standard errors"),
    ("var error", "relative standard error of a variance that training normalizes by"),
    ("saturated", "share of the activation after the norm that passes no gradient (-: none there)"),
)


class Finding(NamedTuple):
    """A fault of a model.

    Attributes:
        kind: "never updated", "stale", "differs in evaluation", "normalizes by the batch", "not
            finite", "dead features", "bias without effect", "weight decay", "small batch",
            "domain without examples", "saturated" or "redundant scale".
        path: the path of the norm in ``batch_stats``, joined by "/", "" for a norm at the top
            level; or the path of a parameter that belongs to no norm.
        message: the fault, with its numbers.
        advice: how to repair it, with the line to write.
    """

    kind: Kind
    path: str
    message: str
    advice: str


class Layer(NamedTuple):
    """Measurements of one batch norm; None where something is unknown.

    Attributes:
        path: the path in ``batch_stats``, joined by "/", "" for a norm at the top level.
        features: the number of features.
        values: the number of values of each feature in the batch.
        running_mean: the running mean, ``[*F]``.
        running_var: the running variance, ``[*F]``.
        batch_mean: the mean of the batch in training, ``[*F]``.
        batch_var: the variance of the batch in training, ``[*F]``.
        mean_off: the distance of the running mean from the mean of the batch, in standard
            deviations: the largest of all features, in training, or in evaluation where fewer
            features are far off.
        mean_errors: the same distance in standard errors.
        var_off: the factor between both variances, at least 1: the largest of all features.
        var_errors: the distance of the logarithms of both variances, in standard errors.
        var_error: the relative standard error of a variance that training normalizes by, for the
            median feature: that of ``1 + 2 / var_error**2`` independent normal values.
        saturated: how much of what the activation after the norm returns passes no gradient back:
            the share of values if the activation is bounded, otherwise the share of units that are
            flat for the whole batch.
        is_found: whether the calls of the norm are found in the program. If they are, `saturated`
            is None if no activation follows directly. Operations for a mask count as something
            between norm and activation.
    """

    path: str
    features: int
    values: int | None
    running_mean: np.ndarray
    running_var: np.ndarray
    batch_mean: np.ndarray | None
    batch_var: np.ndarray | None
    mean_off: float | None
    mean_errors: float | None
    var_off: float | None
    var_errors: float | None
    var_error: float | None
    saturated: float | None
    is_found: bool


class Audit(NamedTuple):
    """The result of `bn_jax.audit`: `print` shows a table and the findings, `plot` a picture.

    Attributes:
        layers: a row for each batch norm, in the order of the program as far as that is known.
        findings: the faults; empty for a healthy model.
        unexamined: the paths of whitening norms, which are not examined.
    """

    layers: tuple[Layer, ...]
    findings: tuple[Finding, ...]
    unexamined: tuple[str, ...] = ()

    def __str__(self) -> str:
        table = f"{self.table()}\n\n{as_text((), _COLUMNS)}"
        return "\n\n".join(filter(None, (table, self._sentences(), *self._about_unexamined())))

    def _about_unexamined(self) -> list[str]:
        return [f"not examined: {path} (whitening)" for path in self.unexamined]

    def __repr__(self) -> str:
        return f"Audit({len(self.layers)} norms, {len(self.findings)} findings)"

    def _repr_html_(self) -> str:
        columns = "; ".join(": ".join(column) for column in _COLUMNS)
        lines = [f"{columns}.", *self._about_unexamined()]
        layers = as_html(_HEADER, self._rows()) + "".join(
            f"<p>{escape(line)}</p>" for line in lines
        )
        if not self.findings:
            return f"{layers}<p>No findings.</p>"
        rows = [(each.kind, named(each.path), each.message, each.advice) for each in self.findings]
        return layers + as_html(("finding", "norm", "message", "advice"), rows)

    def table(self) -> str:
        """Returns the layers as aligned text; `Layer` describes the columns."""
        return as_text(_HEADER, self._rows(), numeric=True)

    def plot(self) -> "Figure":
        """Draws the running statistics beside those of the batch, and what is saturated.

        Every norm is a row, in the order of `layers`. Two panels show how far its running means and
        variances are from those of the batch in training, one the share of the activation after it
        that passes no gradient back. The kinds of its findings are beside it.

        Returns:
            A matplotlib figure; ``figure.savefig("audit.png")`` writes it.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from bn_jax._audit.picture import draw

        return draw(self)

    def _rows(self) -> Sequence[Sequence[str]]:
        return [_cells(layer) for layer in self.layers]

    def _sentences(self) -> str:
        if not self.findings:
            return "No findings."
        lines = []
        for number, finding in enumerate(self.findings):
            lines.append(f"{finding.kind}: {named(finding.path)}\n  {finding.message}")
            # Advice for several norms in a row is printed once, after the last of them.
            following = self.findings[number + 1 : number + 2]
            if not following or following[0].advice != finding.advice:
                lines.append(f"  {finding.advice}")
        return "\n".join(lines)


def named(path: str) -> str:
    """Returns how a message calls the norm at a path."""
    return repr(path) if path else "the top-level norm"


def _cells(layer: Layer) -> tuple[str, ...]:
    off = (layer.mean_off, layer.mean_errors, layer.var_off, layer.var_errors, layer.var_error)
    saturated = "-" if layer.is_found else "unknown"
    if layer.saturated is not None:
        saturated = f"{layer.saturated:.2g}"
    return (
        layer.path or "the top level",
        str(layer.features),
        "unknown" if layer.values is None else str(layer.values),
        *("unknown" if number is None else f"{number:.2g}" for number in off),
        saturated,
    )
