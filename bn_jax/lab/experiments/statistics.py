"""The statistics of the claims: intervals over seeds, and how many seeds a decision would take.

A claim is measured once for each seed. The values are independent, so that a mean has a Student t
interval; a ratio has one on the logarithmic scale. Arms of a comparison share their seeds, so that
the values are paired: differences or ratios, seed by seed.

scipy computes the distributions.
"""

import bisect
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
# Two one-sided tests at 5 % show an equivalence: the 90 % interval is within the bounds.
EQUIVALENCE_CONFIDENCE = 0.90
POWER = 0.8
MOST_SEEDS = 1000


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval; all equal if it has no error."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        if not all(map(math.isfinite, self)):
            return "not finite"
        estimate, low, high = (f"{figure:.3g}" for figure in self)
        return estimate if self.low == self.high else f"{estimate} ({low} to {high})"


def exact(value: Any) -> Interval:
    """Returns the interval of a figure without error."""
    return Interval(float(value), float(value), float(value))


def relative_error(measured: Any, expected: Any) -> Any:
    """Returns the largest absolute difference of two arrays, over the largest expected value."""
    return abs(measured - expected).max() / abs(expected).max()


def mean_interval(values: Any, confidence: float = CONFIDENCE) -> Interval:
    """Estimates a mean by Student's distribution.

    Args:
        values: independent values, one for each seed, [seeds]; for a paired comparison, the
            differences.
        confidence: how often such intervals cover the true mean.

    Returns:
        The mean and its interval; not finite if a value is not.

    Example:
        >>> from bn_jax.lab.experiments.statistics import mean_interval
        >>> print(mean_interval([1.0, 2.0, 3.0, 4.0]))
        2.5 (0.446 to 4.55)
    """
    values = np.asarray(values, np.float64)
    return _interval(values, 1 / len(values), confidence)


def ratio_interval(values: Any, confidence: float = CONFIDENCE) -> Interval:
    """Estimates a geometric mean, for instance of ratios paired by seed.

    Args:
        values: positive, one for each seed, [seeds].
        confidence: as of `mean_interval`.

    Returns:
        The geometric mean and its interval.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.log(np.asarray(values, np.float64))
    return Interval(*map(math.exp, mean_interval(logarithms, confidence)))


def corrected_interval(values: Any, tested: int, trained: int) -> Interval:
    """Estimates a mean over random splits of one data set, as an estimate for other data.

    The training parts of the splits overlap, so that their results are not independent, and
    `mean_interval` is about this data set alone. The corrected variance of the mean is
    ``s^2 (1 / n + tested / trained)`` instead of ``s^2 / n``.

    Args:
        values: one for each split, [seeds].
        tested: the examples of a test part.
        trained: the examples of a training part.

    Returns:
        The mean and its 95 % interval.

    Reference: Nadeau & Bengio 2003, "Inference for the Generalization Error", Machine Learning 52.
    """
    values = np.asarray(values, np.float64)
    return _interval(values, 1 / len(values) + tested / trained, CONFIDENCE)


def _interval(values: npt.NDArray[np.float64], share: float, confidence: float) -> Interval:
    """Returns the interval of a mean whose variance is `share` times that of a value."""
    from scipy import stats

    mean = values.mean()
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1)
    half *= math.sqrt(share)
    return Interval(float(mean), float(mean - half), float(mean + half))


def seeds_needed(values: Any, distance: float, confidence: float = CONFIDENCE) -> int | None:
    """Returns how many seeds it takes to tell a mean from a bound.

    Args:
        values: values of this kind, one for each seed, [seeds]; their deviation counts.
        distance: from the true mean to the bound.
        confidence: of the interval that must not reach the bound.

    Returns:
        The smallest number of seeds with which the interval is clear of the bound in 80 % of all
        repetitions, by the noncentral t distribution; None: more than 1,000.

    Example:
        >>> import numpy as np
        >>> from bn_jax.lab.experiments.statistics import seeds_needed
        >>> values = np.array([-1.0, 1.0]) / np.sqrt(2)  # Their deviation is 1.
        >>> seeds_needed(values, distance=1.0)
        10
        >>> seeds_needed(values, distance=0.01) is None
        True
    """
    from scipy import stats

    deviation = np.asarray(values, np.float64).std(ddof=1)
    if not math.isfinite(deviation) or distance == 0:
        return None
    if deviation == 0:
        return 2

    def decides(seeds: int) -> bool:
        critical = stats.t.ppf((1 + confidence) / 2, seeds - 1)
        # The noncentral distribution of a large shift underflows; its power is 1.
        shift = min(abs(distance) / deviation * math.sqrt(seeds), 30.0)
        return bool(stats.nct.sf(critical, seeds - 1, shift) >= POWER)

    # The power grows with the number of seeds.
    found = bisect.bisect_left(range(2, MOST_SEEDS + 1), True, key=decides)
    return found + 2 if found + 2 <= MOST_SEEDS else None
