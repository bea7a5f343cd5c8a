"""Claims, what they say exactly, and what a measurement says about each of their parts.

A claim is a list of sub-claims, each a sentence that can be true or false by itself. Its bound is
fixed before anything runs: an `Identity` holds to rounding, `Above` and `Below` have the side that
the sentence is on, and `Within` is an equivalence. `judge` compares it with the values of all
seeds. A whole claim has no verdict.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from bn_jax.lab.experiments.labelled import Labelled, Needs, Split, digits
from bn_jax.lab.experiments.statistics import (
    CONFIDENCE,
    EQUIVALENCE_CONFIDENCE,
    MOST_SEEDS,
    Interval,
    exact,
    mean_interval,
    ratio_interval,
    seeds_needed,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK = 8


class Verdict(StrEnum):
    """What measurements say about a sub-claim, the worst first."""

    NOT_REPRODUCED = "not reproduced"
    NO_MEASUREMENT = "no measurement"
    INCONCLUSIVE = "inconclusive"
    NOT_TESTABLE = "not testable here"
    DIRECTION_ONLY = "direction only"
    REPRODUCED = "reproduced"
    EXACT = "exact"

    @property
    def is_decided(self) -> bool:
        """Whether the measurements were enough for a decision."""
        return self not in (self.NO_MEASUREMENT, self.INCONCLUSIVE, self.NOT_TESTABLE)


class Identity(NamedTuple):
    """The quantity, an error, is zero to rounding, with every seed.

    Attributes:
        tolerance: the largest size of an error that is rounding.
    """

    tolerance: float

    def __str__(self) -> str:
        return f"0 to {self.tolerance:g}"


class Above(NamedTuple):
    """The quantity is above a bound.

    Attributes:
        bound: what the quantity is without the claimed effect.
        size: the least value that reproduces the published size; None: only the direction is
            published.
        matters: the smallest value that would matter. If the quantity is shown to be below, the
            sub-claim is not reproduced. None: `bound`.
    """

    bound: float
    size: float | None = None
    matters: float | None = None

    def __str__(self) -> str:
        return f"> {self.bound:.4g}" + ("" if self.size is None else f", size {self.size:.4g}")


class Below(NamedTuple):
    """The quantity is below a bound; the attributes are those of `Above`, mirrored."""

    bound: float
    size: float | None = None
    matters: float | None = None

    def __str__(self) -> str:
        return f"< {self.bound:.4g}" + ("" if self.size is None else f", size {self.size:.4g}")


class Within(NamedTuple):
    """The quantity is between two bounds: an equivalence, by two one-sided tests at 5 %."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}"


class NotTestable(NamedTuple):
    """The small setting cannot decide the sub-claim.

    Attributes:
        reason: why.
    """

    reason: str

    def __str__(self) -> str:
        return "none"


Bound: TypeAlias = Identity | Above | Below | Within | NotTestable
Scale: TypeAlias = Literal["difference", "ratio"]


class Published(NamedTuple):
    """The figure of a source.

    Attributes:
        figure: the figure or formula; empty where the source gives none.
        grade: "V": seen in the source; "R": reported by others; "D": derived here; "": no figure.
    """

    figure: str = ""
    grade: Literal["V", "R", "D", ""] = ""

    def __str__(self) -> str:
        return f"{self.figure} ({self.grade})" if self.figure else ""


class SubClaim(NamedTuple):
    """A sentence that can be true or false by itself.

    Attributes:
        key: the number of the claim and a letter, such as "8a".
        label: a few words for tables and pictures, at most 24 characters.
        statement: the sentence.
        quantity: what is measured for each seed, with its unit.
        bound: what decides.
        published: the figure of the source.
        reason: where the bound is from, if it is not the sentence itself.
        scale: whether the quantity is a difference, whose mean counts, or a ratio, whose geometric
            mean counts.
        is_resplit: whether the seeds are random splits of one data set, so that the interval is
            about this data set, and a wider one is reported for others.
        is_of_digits: whether the bound is a figure about ten classes, which says nothing about
            other data.
    """

    key: str
    label: str
    statement: str
    quantity: str
    bound: Bound
    published: Published = Published()
    reason: str = ""
    scale: Scale = "difference"
    is_resplit: bool = False
    is_of_digits: bool = False


class Judged(NamedTuple):
    """What the values of a quantity say about a bound.

    Attributes:
        verdict: the verdict.
        measured: the estimate and the interval that decided.
        seeds_needed: how many seeds would decide it if the estimate were right; None: more than
            1,000, or it is decided.
    """

    verdict: Verdict
    measured: Interval
    seeds_needed: int | None = None


def judge(bound: Bound, values: Any, scale: Scale = "difference") -> Judged:
    """Decides by the values of a quantity.

    The interval of a side is of 95 %, two-sided, so that a side is shown at 2.5 %.

    Args:
        bound: what decides.
        values: the quantity, one value for each seed, [seeds].
        scale: see `SubClaim`.

    Returns:
        The verdict. Values that are not finite, and ratios that are not positive, are no
        measurement.

    Example:
        >>> from bn_jax.lab.experiments.verdicts import Above, Within, judge
        >>> judge(Above(0.0), [1.0, 2.0, 1.5]).verdict.value
        'reproduced'
        >>> judge(Above(0.0, size=5.0), [1.0, 2.0, 1.5]).verdict.value
        'direction only'
        >>> undecided = judge(Within(-1.0, 1.0), [0.5, 1.5, 0.1])
        >>> undecided.verdict.value, undecided.seeds_needed
        ('inconclusive', 38)
    """
    values = np.asarray(values, np.float64)
    if isinstance(bound, NotTestable):
        return Judged(Verdict.NOT_TESTABLE, exact(math.nan))
    if not np.isfinite(values).all() or (scale == "ratio" and not (values > 0).all()):
        return Judged(Verdict.NO_MEASUREMENT, exact(math.nan))
    if isinstance(bound, Identity):
        worst = np.abs(values).max()
        is_exact = worst <= bound.tolerance
        return Judged(Verdict.EXACT if is_exact else Verdict.NOT_REPRODUCED, exact(worst))
    if isinstance(bound, Within):
        return _judge_equivalence(bound, values, scale)
    return _judge_side(bound, values, scale)


def _interval(values: Any, scale: Scale, confidence: float) -> Interval:
    return (ratio_interval if scale == "ratio" else mean_interval)(values, confidence)


def _judge_equivalence(bound: Within, values: Any, scale: Scale) -> Judged:
    measured = _interval(values, scale, EQUIVALENCE_CONFIDENCE)
    if bound.low <= measured.low and measured.high <= bound.high:
        return Judged(Verdict.REPRODUCED, measured)
    if measured.high < bound.low or measured.low > bound.high:
        return Judged(Verdict.NOT_REPRODUCED, measured)
    needed = _seeds_needed(
        values, measured.estimate, (bound.low, bound.high), scale, EQUIVALENCE_CONFIDENCE
    )
    return Judged(Verdict.INCONCLUSIVE, measured, needed)


def _judge_side(bound: Above | Below, values: Any, scale: Scale) -> Judged:
    measured = _interval(values, scale, CONFIDENCE)
    # Mirrored, a bound from above is a bound from below.
    sign = 1 if isinstance(bound, Above) else -1
    low, high = sorted((sign * measured.low, sign * measured.high))
    size = bound.bound if bound.size is None else bound.size
    matters = bound.bound if bound.matters is None else bound.matters
    if high < sign * matters or high <= sign * bound.bound:
        return Judged(Verdict.NOT_REPRODUCED, measured)
    if low > sign * bound.bound and low >= sign * size:
        return Judged(Verdict.REPRODUCED, measured)
    needed = _seeds_needed(
        values, measured.estimate, (bound.bound, size, matters), scale, CONFIDENCE
    )
    if low > sign * bound.bound:
        is_smaller = high < sign * size
        return Judged(Verdict.DIRECTION_ONLY, measured, None if is_smaller else needed)
    return Judged(Verdict.INCONCLUSIVE, measured, needed)


def _seeds_needed(
    values: Any, estimate: float, bounds: Sequence[float], scale: Scale, confidence: float
) -> int | None:
    """Returns how many seeds would tell the estimate from the nearest of some bounds."""
    if scale == "ratio":
        values, estimate = np.log(values), math.log(estimate)
        bounds = [math.log(bound) for bound in bounds if bound > 0]
    nearest = min(abs(estimate - bound) for bound in bounds)
    return seeds_needed(values, nearest, confidence)


class ChosenRate(NamedTuple):
    """A learning rate that was chosen from a grid, or one for each seed.

    Attributes:
        value: a scalar, or [seeds, ...].
        at_edge: whether the rate is the smallest or the largest of its grid, shaped as `value`.
            A wider grid might hold a better rate.
    """

    value: Any
    at_edge: Any


class Series(NamedTuple):
    """The values of one arm in one setting.

    Attributes:
        key: of the sub-claim.
        arm: the arm.
        setting: the setting; empty if there is one.
        values: one for each seed, [seeds].
    """

    key: str
    arm: str
    setting: str
    values: Any


class Result(NamedTuple):
    """The result of an experiment.

    Attributes:
        values: by the key of each sub-claim, the values of its quantity, [seeds]: an array, or a
            mapping of arrays by setting, in all of which the sub-claim is to be true.
        curves: the content of its figure: numbers, texts, lists, arrays and mappings of them.
        series: the values of single arms.
        reported: figures without a bound.
        rates: the learning rates that were chosen on the validation part, by arm.
        splits: by the key of a sub-claim over random splits, how many examples its trials have,
            `Trial.split`; left out where they have all of the training and of the test part.
    """

    values: Mapping[str, Any]
    curves: Mapping[str, Any]
    series: Sequence[Series] = ()
    reported: Mapping[str, Interval] = {}
    rates: Mapping[str, ChosenRate] = {}
    splits: Mapping[str, Split] = {}


class Finding(NamedTuple):
    """What the measurements say about a sub-claim.

    Attributes:
        sub_claim: the sub-claim.
        settings: by setting, what its values say.
        values: by setting, [seeds].
        blocks: the verdict of each block of 8 seeds alone; empty with fewer than two blocks.
    """

    sub_claim: SubClaim
    settings: Mapping[str, Judged]
    values: Mapping[str, Any]
    blocks: Sequence[Verdict]

    @property
    def verdict(self) -> Verdict:
        """The verdict: in several settings, the worst."""
        return _worst(judged.verdict for judged in self.settings.values())

    @property
    def decisive(self) -> tuple[str, Judged]:
        """The setting with the worst verdict, and what its values say."""
        return next(item for item in self.settings.items() if item[1].verdict == self.verdict)

    @property
    def agree(self) -> bool:
        """Whether no block contradicts another: one reproduces the sub-claim, one does not."""
        decided = {verdict for verdict in self.blocks if verdict.is_decided}
        return Verdict.NOT_REPRODUCED not in decided or len(decided) == 1


def _worst(verdicts: Any) -> Verdict:
    """Returns the first verdict in the order of `Verdict`."""
    found = set(verdicts)
    return next(verdict for verdict in Verdict if verdict in found)


def find(sub_claim: SubClaim, values: Any) -> Finding:
    """Judges a sub-claim.

    Args:
        sub_claim: the sub-claim.
        values: as in `Result.values`; None for what was not measured.
    """
    if values is None:
        values = np.array([math.nan])
    if not isinstance(values, Mapping):
        values = {"": values}
    by_setting = {setting: np.asarray(of_one, np.float64) for setting, of_one in values.items()}

    def judge_all(seeds: slice) -> dict[str, Judged]:
        return {
            setting: judge(sub_claim.bound, of_one[seeds], sub_claim.scale)
            for setting, of_one in by_setting.items()
        }

    seeds = min(map(len, by_setting.values()))
    starts = range(0, seeds - seeds % BLOCK, BLOCK) if seeds >= 2 * BLOCK else ()
    blocks = [judge_all(slice(start, start + BLOCK)) for start in starts]
    return Finding(
        sub_claim,
        judge_all(slice(None)),
        by_setting,
        [_worst(judged.verdict for judged in block.values()) for block in blocks],
    )


def describe_seeds(judged: Judged) -> str:
    """Returns how many seeds would decide, as text; empty if it is decided."""
    if judged.verdict not in (Verdict.INCONCLUSIVE, Verdict.DIRECTION_ONLY):
        return ""
    if judged.verdict == Verdict.INCONCLUSIVE and judged.seeds_needed is None:
        return f"more than {MOST_SEEDS:,}"
    return "" if judged.seeds_needed is None else f"about {judged.seeds_needed}"


def ignore_progress(share: float) -> None:
    """Does nothing with the share of an experiment that was finished."""


class Setting(NamedTuple):
    """The size of a run.

    Attributes:
        seeds: the number of runs of each kind; intervals are over them.
        first_seed: the first seed of these runs; other seeds give an independent repetition.
        quick: whether to make fewer and smaller runs.
        advance: called with the share of the experiment that was finished since the last call.
        data: the data in the place of the digits; None: the digits.
    """

    seeds: int = 16
    first_seed: int = 0
    quick: bool = False
    advance: Callable[[float], object] = ignore_progress
    data: Labelled | None = None

    @property
    def chosen(self) -> npt.NDArray[np.int32]:
        """The seeds, [seeds]."""
        return np.arange(self.first_seed, self.first_seed + self.seeds, dtype=np.int32)

    @property
    def labelled(self) -> Labelled:
        """The data: the user's, or the digits."""
        return digits() if self.data is None else self.data

    @property
    def num_classes(self) -> int:
        """The number of classes of the data."""
        return self.labelled.num_classes

    def level(self, accuracy: float) -> float:
        """Returns what an accuracy on the digits is on these data, see `Labelled.level`."""
        return accuracy if self.data is None else self.data.level(accuracy)


class Experiment(NamedTuple):
    """A claim and the program that tests it.

    Attributes:
        number: the number of the claim.
        name: the name of the experiment on the command line.
        claim: the claim in one sentence.
        source: the papers that make the claim.
        sub_claims: its parts, in the order of their letters.
        protocol: what is run.
        limits: what the small setting cannot show.
        run: makes all runs, and returns values for each sub-claim that can be tested.
        draw: draws the curves of a result, as read from JSON.
        easy: what of the claim was easy to reproduce.
        hard: what was not.
        data: what `run` needs of the data of the setting, which it trains on; None: it uses none,
            or nothing but the digits.
    """

    number: int
    name: str
    claim: str
    source: str
    sub_claims: tuple[SubClaim, ...]
    protocol: str
    limits: str
    run: Callable[[Setting], Result]
    draw: Callable[["Figure", Mapping[str, Any]], None]
    easy: str = ""
    hard: str = ""
    data: Needs | None = None

    def on(self, labelled: Labelled | None) -> "Experiment":
        """Returns the claim as it is tested on other data than the digits.

        The protocol names them. Bounds that are figures about ten classes are left out.

        Args:
            labelled: the data; None: the digits.
        """
        if labelled is None:
            return self
        return self._replace(
            sub_claims=tuple(map(_without_bound_of_digits, self.sub_claims)),
            protocol=f"on {labelled} in the place of the digits: {self.protocol}",
        )

    def find(self, result: Result) -> list[Finding]:
        """Judges each sub-claim by a result."""
        return [find(one, result.values.get(one.key)) for one in self.sub_claims]


def _without_bound_of_digits(one: SubClaim) -> SubClaim:
    if not one.is_of_digits:
        return one
    reason = f"the bound, {one.bound}, is about the ten classes of the digits"
    return one._replace(bound=NotTestable(reason), reason=reason)
