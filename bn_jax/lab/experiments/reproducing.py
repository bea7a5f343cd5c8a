"""Running experiments, one after another or several at a time."""

import difflib
import multiprocessing
import signal
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, TypeAlias

import jax

from bn_jax.lab.experiments import EXPERIMENTS, extensions
from bn_jax.lab.experiments.extensions import load_file
from bn_jax.lab.experiments.verdicts import Experiment, Setting, ignore_progress
from bn_jax.lab.experiments.writing import Finished, write

POLL_SECONDS = 0.1
# Which experiment advanced, by its place in the list, and by what share.
_Shares: TypeAlias = "SimpleQueue[tuple[int, float]]"


def choose(names: Sequence[str]) -> list[Experiment]:
    """Finds experiments.

    Args:
        names: names or numbers of claims, paths of Python files that define one, or "all".

    Returns:
        Each of them once: those of this package in the order of their numbers, then all others.

    Raises:
        ValueError: a name or number is unknown, `names` is empty, or a file defines no claim.
    """
    experiments = extensions.known()
    by_number = {str(experiment.number): experiment for experiment in EXPERIMENTS.values()}
    named = {**by_number, **experiments}
    files = {name: load_file(Path(name)) for name in names if name.endswith(".py")}
    unknown = [name for name in names if name not in (*named, *files, "all")]
    if unknown or not names:
        received = f"received {', '.join(unknown)}" if unknown else "received no name"
        close = [difflib.get_close_matches(name, [*experiments, "all"], n=1) for name in unknown]
        meant = ", ".join(name for names in close for name in names)
        raise ValueError(
            f"{received}, expected all, a number from 1 to {len(EXPERIMENTS)}, a file such as "
            f"my_claim.py, or names among {', '.join(experiments)}; "
            f"{f'did you mean {meant}? ' if meant else ''}see them with --list"
        )
    every = set(experiments) if "all" in names else set()
    chosen = every | {named[name].name for name in names if name in named}
    return [one for one in experiments.values() if one.name in chosen] + list(files.values())


def reproduce(experiment: Experiment, setting: Setting, folder: Path) -> dict[str, Any]:
    """Runs an experiment, and writes its result as `writing.write` does.

    Args:
        experiment: the experiment.
        setting: the size of the run.
        folder: the folder to write into; created if it is missing.

    Returns:
        The contents of the JSON file.
    """
    return write(experiment, setting, folder, _run(experiment, setting))


def reproduce_each(
    experiments: Sequence[Experiment],
    setting: Setting,
    folder: Path,
    processes: int = 1,
    show: Callable[[Experiment, float], object] = lambda experiment, share: None,
) -> Generator[tuple[Experiment, dict[str, Any]]]:
    """Runs experiments as `reproduce` does, several at a time.

    Args:
        experiments: the experiments; each runs in one process from start to end.
        setting: the size of the runs; its `advance` is not called.
        folder: the folder to write into; created if it is missing.
        processes: the number of processes that run experiments. 1: this process runs them; else
            others do, and this process writes.
        show: called with the share of an experiment that was finished since the last call.

    Yields:
        Each experiment and the contents of its JSON file, in the order in which they end. Closing
        the iterator, or an exception, stops all processes.

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
    files = extensions.loaded_files()
    # The caller's `advance` need not be picklable; a worker has its own.
    sent = setting._replace(advance=ignore_progress)
    with ProcessPoolExecutor(processes, context, _start_worker, (shares, files)) as pool:
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
                    yield experiment, write(experiment, setting, folder, future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
                process.join()
            raise


def _start_worker(shares: _Shares, files: Sequence[Path]) -> None:
    # Ctrl-C reaches all processes of a terminal; the parent process stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker["shares"] = shares
    for path in files:
        load_file(path)


# A queue can only be passed to a worker when it starts; this is where the worker keeps it.
_worker: dict[str, _Shares] = {}


def _run_in_worker(index: int, experiment: Experiment, setting: Setting) -> Finished:
    def advance(share: float) -> None:
        _worker["shares"].put((index, share))

    return _run(experiment, setting._replace(advance=advance))


def _run(experiment: Experiment, setting: Setting) -> Finished:
    began = time.perf_counter()
    result = experiment.run(setting)
    seconds = time.perf_counter() - began
    # Every experiment compiles programs of its own, which nothing else will call.
    jax.clear_caches()
    return Finished(result, seconds)
