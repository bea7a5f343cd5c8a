"""Running experiments, and writing the JSON and the figure of each."""

import difflib
import importlib.metadata
import json
import multiprocessing
import platform
import signal
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax

from bn_jax.lab.experiments import EXPERIMENTS, figures
from bn_jax.lab.experiments.verdicts import Experiment, Result, Setting, ignore_progress
from bn_jax.lab.writing import staged, write_json

PACKAGES = "bn-jax", "jax", "flax", "optax", "numpy"
POLL_SECONDS = 0.1
# Which experiment advanced, by its place in the list, and by what share.
_Shares: TypeAlias = "SimpleQueue[tuple[int, float]]"


class _Finished(NamedTuple):
    """The result of an experiment, and how long it took."""

    result: Result
    seconds: float


def choose(names: Sequence[str]) -> list[Experiment]:
    """Finds experiments by their names or numbers.

    Args:
        names: names or numbers of experiments, or "all".

    Returns:
        Each of them once, in the order of their numbers.

    Raises:
        ValueError: a name or number is unknown, or `names` is empty.
    """
    by_number = {str(experiment.number): experiment for experiment in EXPERIMENTS.values()}
    known = by_number | EXPERIMENTS
    unknown = [name for name in names if name != "all" and name not in known]
    if unknown or not names:
        received = f"received {', '.join(unknown)}" if unknown else "received no name"
        close = [difflib.get_close_matches(name, [*EXPERIMENTS, "all"], n=1) for name in unknown]
        meant = ", ".join(name for names in close for name in names)
        raise ValueError(
            f"{received}, expected all, a number from 1 to {len(EXPERIMENTS)}, or names among "
            f"{', '.join(EXPERIMENTS)}; {f'did you mean {meant}? ' if meant else ''}see them with "
            "--list"
        )
    chosen = set(EXPERIMENTS if "all" in names else (known[name].name for name in names))
    return [experiment for experiment in EXPERIMENTS.values() if experiment.name in chosen]


def reproduce(experiment: Experiment, setting: Setting, folder: Path) -> Result:
    """Runs an experiment, and writes its result to ``NAME.json`` and ``NAME.png``.

    Args:
        experiment: the experiment.
        setting: the size of the run.
        folder: the folder to write into; created if it is missing.

    Returns:
        The result.
    """
    finished = _run(experiment, setting)
    _write(experiment, setting, folder, finished)
    return finished.result


def reproduce_each(
    experiments: Sequence[Experiment],
    setting: Setting,
    folder: Path,
    processes: int = 1,
    show: Callable[[Experiment, float], object] = lambda experiment, share: None,
) -> Generator[tuple[Experiment, Result]]:
    """Runs experiments as `reproduce` does, several at a time.

    Args:
        experiments: the experiments; each runs in one process from start to end.
        setting: the size of the runs; its `advance` is not called.
        folder: the folder to write into; created if it is missing.
        processes: the number of processes that run experiments. 1: this process runs them; else
            others do, and this process writes.
        show: called with the share of an experiment that was finished since the last call.

    Yields:
        Each experiment and its result, in the order in which they end. Closing the iterator, or an
        exception, stops all processes.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a process died.
    """
    if processes == 1:
        for experiment in experiments:
            here = setting._replace(advance=partial(show, experiment))
            yield experiment, reproduce(experiment, here, folder)
        return
    context = multiprocessing.get_context("spawn")
    shares: _Shares = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    # The caller's `advance` need not be picklable; a worker has its own.
    sent = setting._replace(advance=ignore_progress)
    with ProcessPoolExecutor(processes, context, _start_worker, (shares,)) as pool:
        try:
            running = {
                pool.submit(_run_in_worker, index, experiment, sent): experiment
                for index, experiment in enumerate(experiments)
            }
            while running:
                ended, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                while not shares.empty():
                    index, share = shares.get()
                    show(experiments[index], share)
                for future in ended:
                    experiment = running.pop(future)
                    finished = future.result()
                    _write(experiment, setting, folder, finished)
                    yield experiment, finished.result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
                process.join()
            raise


def _start_worker(shares: _Shares) -> None:
    # Ctrl-C reaches all processes of a terminal; the parent process stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker["shares"] = shares


# A queue can only be passed to a worker when it starts; this is where the worker keeps it.
_worker: dict[str, _Shares] = {}


def _run_in_worker(index: int, experiment: Experiment, setting: Setting) -> _Finished:
    def advance(share: float) -> None:
        _worker["shares"].put((index, share))

    return _run(experiment, setting._replace(advance=advance))


def _run(experiment: Experiment, setting: Setting) -> _Finished:
    began = time.perf_counter()
    result = experiment.run(setting)
    seconds = time.perf_counter() - began
    # Every experiment compiles programs of its own, which nothing else will call.
    jax.clear_caches()
    return _Finished(result, seconds)


def _write(experiment: Experiment, setting: Setting, folder: Path, finished: _Finished) -> None:
    with staged(folder) as staging:
        path = staging / f"{experiment.name}.json"
        write_json(path, _as_json(experiment, setting, finished))
        curves = json.loads(path.read_text())["curves"]
        figures.save(experiment, curves, staging / f"{experiment.name}.png")


def _as_json(experiment: Experiment, setting: Setting, finished: _Finished) -> dict[str, Any]:
    texts = ("number", "name", "claim", "source", "published", "protocol", "limits")
    result = finished.result
    return {
        **{name: getattr(experiment, name) for name in texts},
        "verdict": result.verdict,
        "criteria": [
            {
                **criterion._asdict(),
                "measured": criterion.measured._asdict(),
                "verdict": criterion.verdict,
            }
            for criterion in result.criteria
        ],
        "reported": {name: interval._asdict() for name, interval in result.reported.items()},
        "rates": {arm: rate._asdict() for arm, rate in result.rates.items()},
        "seeds": setting.chosen.tolist(),
        "quick": setting.quick,
        "seconds": round(finished.seconds, 1),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "platform": jax.default_backend(),
        "curves": result.curves,
    }
