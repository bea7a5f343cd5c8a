"""Times functions interleaved in one process, so that disturbances affect all of them alike."""

import ctypes
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import quantiles
from typing import Any, NamedTuple, TypeVar

import jax

# glibc's option numbers: M_TRIM_THRESHOLD at its largest value, and M_MMAP_MAX for larger arrays.
_MALLOC_OPTIONS = {-1: 2**31 - 1, -4: 0}
Name = TypeVar("Name", bound=Hashable)
Quartiles = tuple[float, float, float]


class Timing(NamedTuple):
    """How long a function takes.

    Attributes:
        quartiles: of the wall-clock seconds.
        cpu_quartiles: of the CPU seconds, summed over all cores. Other programs on the machine
            disturb them less.
    """

    quartiles: Quartiles
    cpu_quartiles: Quartiles

    @property
    def median(self) -> float:
        """The median of the wall-clock seconds."""
        return self.quartiles[1]

    @classmethod
    def load(cls, known: Mapping[str, Sequence[float]]) -> "Timing":
        """Reads a timing of the JSON."""
        return cls(*map(tuple, known.values()))  # type: ignore[arg-type]

    def scaled(self, factor: float) -> "Timing":
        """Returns the timing of `factor` times as much work."""
        return Timing(*((factor * low, factor * mid, factor * high) for low, mid, high in self))


def seconds_of(function: Callable[[], Any]) -> tuple[float, float]:
    """Calls a function, waits for its result, and returns wall-clock and CPU seconds."""
    start = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    end = time.perf_counter(), time.process_time()
    return end[0] - start[0], end[1] - start[1]


def in_turns(
    functions: Mapping[Name, Callable[[], Any]],
    rounds: int,
    advance: Callable[[], object] = lambda: None,
    measure: Callable[[Callable[[], Any]], tuple[float, float]] = seconds_of,
) -> dict[Name, Timing]:
    """Calls every function once per round and waits for its result.

    Args:
        functions: by name. Compile and call them once before, unless that is to be measured.
        rounds: the number of rounds, at least 2.
        advance: called after every round.
        measure: calls a function and returns the seconds as `seconds_of` does.

    Returns:
        The `Timing` of each function.
    """
    seconds: dict[Name, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(measure(function))
        advance()
    return {
        name: Timing(*(_quartiles(one) for one in zip(*both, strict=True)))
        for name, both in seconds.items()
    }


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation; other C libraries are not changed.

    By default glibc returns large arrays to the system. The next call then allocates every page of
    its outputs again, which can take longer than the function that is timed.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for option, value in _MALLOC_OPTIONS.items():
            mallopt(option, value)


def _quartiles(values: Sequence[float]) -> Quartiles:
    low, median, high = quantiles(values, n=4)
    return low, median, high
