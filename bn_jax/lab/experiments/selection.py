"""Training at every rate of a grid, and choosing the rate on the validation part.

Every experiment that trains chooses its learning rates here. `sweep_rates` trains an arm at all
rates and seeds in one compiled program. `RateSweep` then chooses one rate for all seeds, or one for
each seed, and returns what was measured there. A choice says whether it is at the edge of the
grid, where a wider grid might hold a better rate.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import flax.linen as nn
import jax
import numpy as np

from bn_jax.lab.experiments.sweeps import (
    Digits,
    MakeOptimizer,
    Trial,
    accuracy,
    sweep,
    train_trial,
)
from bn_jax.lab.experiments.verdicts import ChosenRate

Measured = TypeVar("Measured")


class Outcome(NamedTuple, Generic[Measured]):
    """The result of one training.

    Attributes:
        validation: the accuracy on the validation part, by which rates are chosen.
        measured: a tree of whatever else was measured.
    """

    validation: Any
    measured: Measured


class Chosen(NamedTuple, Generic[Measured]):
    """A rate, or a rate for each seed, and what was measured there.

    Attributes:
        rate: the rate, and whether it is at the edge of the grid.
        measured: a tree of arrays [seeds, ...].
    """

    rate: ChosenRate
    measured: Measured


class RateSweep(NamedTuple, Generic[Measured]):
    """The trainings of one arm at every rate and seed.

    Attributes:
        rates: the grid, ascending, [rates].
        validation: accuracies on the validation part, [rates, seeds, ...]. Further axes are arms
            that were trained in the same program, each of which has a rate of its own.
        measured: a tree of arrays [rates, seeds, ...].
    """

    rates: Any
    validation: Any
    measured: Measured

    def best_for_all_seeds(self) -> Chosen[Measured]:
        """Chooses the rate with the best mean accuracy over the seeds."""
        means = np.asarray(self.validation, np.float64).mean(1)
        return choose(self.rates, means.argmax(0), self.measured)

    def best_for_each_seed(self) -> Chosen[Measured]:
        """Chooses the best rate of every seed."""
        return choose(self.rates, np.asarray(self.validation).argmax(0), self.measured)


def choose(rates: Any, index: Any, measured: Measured) -> Chosen[Measured]:
    """Returns what was measured at some rates of a grid.

    Args:
        rates: the grid, [rates].
        index: the place of the rate in the grid: a scalar, or integers [seeds, ...].
        measured: a tree of arrays [rates, seeds, ...].

    Returns:
        The rates, and the measurements without the axis of the grid.

    Example:
        >>> import numpy as np
        >>> from bn_jax.lab.experiments.selection import choose
        >>> accuracies = np.array([[0.5, 0.8], [0.9, 0.7], [0.1, 0.1]])
        >>> for_each_seed = choose([0.1, 1.0, 10.0], accuracies.argmax(0), accuracies)
        >>> for_each_seed.measured.tolist()
        [0.9, 0.8]
        >>> for_each_seed.rate.value.tolist(), for_each_seed.rate.at_edge.tolist()
        ([1.0, 0.1], [False, True])
    """
    rates, index = np.asarray(rates), np.asarray(index)

    def at_index(leaf: Any) -> Any:
        leaf = np.asarray(leaf)
        if index.ndim == 0:
            return leaf[index]
        places = index.reshape(1, *index.shape, *(1,) * (leaf.ndim - 1 - index.ndim))
        return np.take_along_axis(leaf, places, 0)[0]

    at_edge = (index == 0) | (index == len(rates) - 1)
    return Chosen(ChosenRate(rates[index], at_edge), jax.tree.map(at_index, measured))


def last_place(holds: Any) -> Any:
    """Returns the last place of the first axis where something holds; -1 where it does nowhere.

    Example:
        >>> from bn_jax.lab.experiments.selection import last_place
        >>> last_place([[True, False], [True, False], [False, False]]).tolist()
        [1, -1]
    """
    holds = np.asarray(holds)
    return np.where(holds.any(0), len(holds) - 1 - holds[::-1].argmax(0), -1)


def largest_rate(rates: Any, holds: Any) -> Any:
    """Returns the largest rate where something holds; not-a-number where it does at none.

    Args:
        rates: the grid, ascending, [rates].
        holds: booleans, [rates, ...].
    """
    place = last_place(holds)
    return np.where(place < 0, np.nan, np.asarray(rates)[place])


def sweep_rates(
    run: Callable[..., Outcome[Measured]], rates: Any, *of_seeds: Any
) -> RateSweep[Measured]:
    """Trains at every rate and seed in one compiled program.

    Args:
        run: called with a rate, and with each of `of_seeds` at one seed.
        rates: the grid, ascending, [rates].
        *of_seeds: arrays, or trees of arrays, with a leading axis [seeds, ...].

    Returns:
        The outcomes in float64, in which their differences and means are exact enough.
    """
    outcome = sweep(run, rates, *of_seeds)
    validation, measured = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tuple(outcome))
    return RateSweep(np.asarray(rates), validation, measured)


def sweep_accuracies(
    model: nn.Module, make_optimizer: MakeOptimizer, rates: Any, trials: Trial
) -> RateSweep[Any]:
    """Trains a model at every rate and seed, and measures its accuracy on the test part.

    Args:
        model: the network, called with `x` and `train`.
        make_optimizer: called with a rate.
        rates: the grid, ascending, [rates].
        trials: the trials of all seeds.

    Returns:
        The accuracies on the validation and on the test part, [rates, seeds] each.
    """

    def run(rate: jax.Array, trial: Trial) -> Outcome[jax.Array]:
        variables = train_trial(model, make_optimizer(rate), trial)
        return accuracies(model, variables, trial.digits)

    return sweep_rates(run, rates, trials)


def accuracies(model: nn.Module, variables: Any, digits: Digits) -> Outcome[jax.Array]:
    """Returns the accuracies of a trained model on the validation and on the test part."""
    return Outcome(
        accuracy(model, variables, digits.validation), accuracy(model, variables, digits.test)
    )
