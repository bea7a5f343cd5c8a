"""What an experiment is, what it finds, and what that says about a claim."""

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
    """An estimate and the ends of its 95 % confidence interval; of exact figures all are equal."""

    estimate: float
    low: float
    high: float


class Criterion(NamedTuple):
    """One measurable part of a claim.

    Attributes:
        name: what was measured, with its unit.
        published: the figure or the formula of the source.
        measured: the figure found.
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
        _, low, high = self.measured
        if self.at_least <= low and high <= self.at_most:
            return Verdict.HOLDS
        if high < self.at_least or low > self.at_most or math.isnan(low + high):
            return Verdict.FAILS
        return Verdict.UNDECIDED


class Result(NamedTuple):
    """What an experiment found.

    Attributes:
        criteria: the parts of the claim that were tested.
        curves: what its figure shows: numbers, texts, lists, arrays and mappings of them.
        reported: figures that the claim sets no bound for.
    """

    criteria: tuple[Criterion, ...]
    curves: Mapping[str, Any]
    reported: Mapping[str, Interval] = {}

    @property
    def verdict(self) -> Verdict:
        """The worst of the criteria: fails, undecided, holds."""
        found = {criterion.verdict for criterion in self.criteria}
        return next(
            one for one in (Verdict.FAILS, Verdict.UNDECIDED, Verdict.HOLDS) if one in found
        )


class Setting(NamedTuple):
    """How much is run.

    Attributes:
        seeds: how many runs of each kind; intervals are over them.
        first_seed: of these runs; others give an independent repetition.
        quick: whether fewer and smaller runs will do.
        advance: called with the share of the experiment that was finished since the last call.
    """

    seeds: int = 8
    first_seed: int = 0
    quick: bool = False
    advance: Callable[[float], object] = lambda share: None

    @property
    def chosen(self) -> npt.NDArray[np.int32]:
        """The seeds, [seeds]."""
        return np.arange(self.first_seed, self.first_seed + self.seeds, dtype=np.int32)


class Experiment(NamedTuple):
    """A claim and the program that tests it.

    Attributes:
        number: of the claim.
        name: by which it is run.
        claim: in one sentence.
        source: who says so.
        published: the figure or the formula that they give.
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
    """Returns the interval of a figure that has no error."""
    return Interval(float(value), float(value), float(value))


def mean_interval(values: Any) -> Interval:
    """Estimates a mean by Student's distribution.

    Args:
        values: independent ones, one for each seed, [seeds]; for a paired comparison, differences.

    Returns:
        The mean and its interval; if a value is not finite, neither are they.
    """
    from scipy import stats

    values = np.asarray(values, np.float64)
    mean = values.mean()
    error = values.std(ddof=1) / math.sqrt(len(values))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * error
    return Interval(float(mean), float(mean - half), float(mean + half))


def ratio_interval(values: Any) -> Interval:
    """Estimates a geometric mean, as of ratios paired by seed.

    Args:
        values: positive, one for each seed, [seeds].

    Returns:
        The geometric mean and its interval.
    """
    return Interval(*(math.exp(one) for one in mean_interval(np.log(values))))
