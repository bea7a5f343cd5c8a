"""Experiments, their results, and what a result says about a claim."""

import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIDENCE = 0.95


class Verdict(StrEnum):
    """What an interval says about a claim."""

    HOLDS = "holds"
    FAILS = "fails"
    UNDECIDED = "undecided"


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % confidence interval; all equal if it is exact."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        if not all(map(math.isfinite, self)):
            return "not finite"
        estimate, low, high = (f"{figure:.3g}" for figure in self)
        return estimate if low == high else f"{estimate} ({low} to {high})"


class ChosenRate(NamedTuple):
    """A learning rate that was chosen from a grid, or one for each seed.

    Attributes:
        value: a scalar, or [seeds, ...].
        at_edge: whether the rate is the smallest or the largest of its grid, shaped as `value`.
            A wider grid might hold a better rate.
    """

    value: Any
    at_edge: Any


class Criterion(NamedTuple):
    """A measurable part of a claim.

    Attributes:
        name: what was measured, with its unit.
        published: the figure or the formula of the source.
        measured: our figure.
        at_least: the claim's lower bound.
        at_most: the claim's upper bound.
    """

    name: str
    published: str
    measured: Interval
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def verdict(self) -> Verdict:
        """Holds if the whole interval is within the bounds, fails if all of it is outside."""
        low, high = self.measured.low, self.measured.high
        if self.at_least <= low and high <= self.at_most:
            return Verdict.HOLDS
        if high < self.at_least or low > self.at_most or math.isnan(low + high):
            return Verdict.FAILS
        return Verdict.UNDECIDED


class Result(NamedTuple):
    """The result of an experiment.

    Attributes:
        criteria: the tested parts of the claim.
        curves: the content of its figure: numbers, texts, lists, arrays and mappings of them.
        reported: figures without a bound.
        rates: the learning rates that were chosen on the validation part, by arm.
    """

    criteria: tuple[Criterion, ...]
    curves: Mapping[str, Any]
    reported: Mapping[str, Interval] = {}
    rates: Mapping[str, ChosenRate] = {}

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the criteria: fails, then undecided, then holds."""
        verdicts = {criterion.verdict for criterion in self.criteria}
        worst_first = (Verdict.FAILS, Verdict.UNDECIDED, Verdict.HOLDS)
        return next(verdict for verdict in worst_first if verdict in verdicts)


def ignore_progress(share: float) -> None:
    """Does nothing with the share of an experiment that was finished."""


class Setting(NamedTuple):
    """The size of a run.

    Attributes:
        seeds: the number of runs of each kind; intervals are over them.
        first_seed: the first seed of these runs; other seeds give an independent repetition.
        quick: whether to make fewer and smaller runs.
        advance: called with the share of the experiment that was finished since the last call.
    """

    seeds: int = 8
    first_seed: int = 0
    quick: bool = False
    advance: Callable[[float], object] = ignore_progress

    @property
    def chosen(self) -> npt.NDArray[np.int32]:
        """The seeds, [seeds]."""
        return np.arange(self.first_seed, self.first_seed + self.seeds, dtype=np.int32)


class Experiment(NamedTuple):
    """A claim and the program that tests it.

    Attributes:
        number: the number of the claim.
        name: the name of the experiment on the command line.
        claim: the claim in one sentence.
        source: the papers that make the claim.
        published: their figure or formula.
        protocol: what is run.
        limits: what the small setting cannot show.
        run: makes all runs.
        draw: draws the curves of a result, as read from JSON.
    """

    number: int
    name: str
    claim: str
    source: str
    published: str
    protocol: str
    limits: str
    run: Callable[[Setting], Result]
    draw: Callable[["Figure", Mapping[str, Any]], None]


def exact(value: Any) -> Interval:
    """Returns the interval of a figure without error."""
    return Interval(float(value), float(value), float(value))


def relative_error(measured: Any, expected: Any) -> Any:
    """Returns the largest absolute difference of two arrays, over the largest expected value."""
    return abs(measured - expected).max() / abs(expected).max()


def mean_interval(values: Any) -> Interval:
    """Estimates a mean by Student's distribution.

    Args:
        values: independent values, one for each seed, [seeds]; for a paired comparison, the
            differences.

    Returns:
        The mean and its interval; not finite if a value is not.
    """
    from scipy import stats

    values = np.asarray(values, np.float64)
    mean = values.mean()
    error = values.std(ddof=1) / math.sqrt(len(values))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * error
    return Interval(float(mean), float(mean - half), float(mean + half))


def ratio_interval(values: Any) -> Interval:
    """Estimates a geometric mean, for instance of ratios paired by seed.

    Args:
        values: positive, one for each seed, [seeds].

    Returns:
        The geometric mean and its interval.
    """
    return Interval(*map(math.exp, mean_interval(np.log(values))))
