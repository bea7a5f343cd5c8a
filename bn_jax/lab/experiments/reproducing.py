"""Running experiments, one after another or several at a time."""

import difflib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax

from bn_jax.lab.experiments import EXPERIMENTS, extensions, failures
from bn_jax.lab.experiments.checking import check_result
from bn_jax.lab.experiments.extensions import load_file
from bn_jax.lab.experiments.failures import Failed
from bn_jax.lab.experiments.verdicts import Experiment, Setting, ignore_progress
from bn_jax.lab.experiments.writing import Finished, Outcome, write, write_failure

POLL_SECONDS = 0.1
# Which experiment advanced, by its place in the list, and by what share.
_Shares: TypeAlias = "SimpleQueue[tuple[int, float]]"


class Choice(NamedTuple):
    """What the names of a command line stand for.

    Attributes:
        experiments: each claim once.
        broken: why a file or a package that was named defines no claim, in a line each.
        named: the names of the claims that were named one by one, not by "all".
    """

    experiments: list[Experiment]
    broken: list[str]
    named: frozenset[str] = frozenset()


def choose(names: Sequence[str]) -> Choice:
    """Finds experiments.

    Args:
        names: names or numbers of claims, paths of Python files that define one, or "all".

    Returns:
        Each of them once: those of this package in the order of their numbers, then all others.

    Raises:
        ValueError: a name or number is unknown, `names` is empty, or two files define claims of
            one name.
    """
    experiments, broken_packages = extensions.known()
    by_number = {str(experiment.number): experiment for experiment in EXPERIMENTS.values()}
    named = {**by_number, **experiments}
    files = [name for name in names if name.endswith(".py")]
    unknown = [name for name in names if name not in (*named, *files, *broken_packages, "all")]
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
    one_by_one = {named[name].name for name in names if name in named}
    chosen = every | one_by_one
    broken = [why for name, why in broken_packages.items() if every or name in names]
    of_files = []
    for name in dict.fromkeys(files):
        try:
            of_files.append(load_file(Path(name)))
        except ValueError as error:
            broken.append(str(error))
    found = [one for one in experiments.values() if one.name in chosen] + of_files
    all_names = [one.name for one in found]
    for one in of_files:
        if all_names.count(one.name) > 1:
            raise ValueError(
                f"{len(all_names)} claims were chosen, and two are named {one.name!r}, as their "
                "files of results would be; rename one"
            )
    return Choice(found, broken, frozenset((*one_by_one, *(one.name for one in of_files))))


def reproduce(experiment: Experiment, setting: Setting, folder: Path) -> Outcome:
    """Runs an experiment, and writes its result as `writing.write` does.

    Args:
        experiment: the experiment.
        setting: the size of the run.
        folder: the folder to write into; created if it is missing.

    Returns:
        The contents of the JSON file, or why there is none.
    """
    return _write(experiment, setting, folder, _run(experiment, setting))


def _write(
    experiment: Experiment, setting: Setting, folder: Path, finished: Finished | Failed
) -> Outcome:
    if isinstance(finished, Failed):
        return write_failure(experiment, folder, finished)
    return write(experiment, setting, folder, finished)


def reproduce_each(
    experiments: Sequence[Experiment],
    setting: Setting,
    folder: Path,
    processes: int = 1,
    show: Callable[[Experiment, float], object] = lambda experiment, share: None,
) -> Generator[tuple[Experiment, Outcome]]:
    """Runs experiments as `reproduce` does, several at a time.

    Args:
        experiments: the experiments; each runs in one process from start to end.
        setting: the size of the runs; its `advance` is not called.
        folder: the folder to write into; created if it is missing.
        processes: the number of processes that run experiments. 1: this process runs them; else
            others do, and this process writes.
        show: called with the share of an experiment that was finished since the last call.

    Yields:
        Each experiment and its outcome, in the order in which they end. Closing the iterator, or an
        exception, stops all processes.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a process died.
    """
    if processes == 1:
        for experiment in experiments:
            here = setting._replace(advance=_checked(partial(show, experiment)))
            yield experiment, reproduce(experiment, here, folder)
        return
    context = multiprocessing.get_context("spawn")
    shares: _Shares = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    # The caller's `advance` need not be picklable; a worker has its own.
    sent = setting._replace(advance=ignore_progress)
    with ProcessPoolExecutor(processes, context, _start_worker, (shares, sent)) as pool:
        try:
            running = {
                pool.submit(_run_in_worker, index, _sent(experiment)): experiment
                for index, experiment in enumerate(experiments)
            }
            while running:
                ended, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                while not shares.empty():
                    index, share = shares.get()
                    show(experiments[index], share)
                for future in ended:
                    experiment = running.pop(future)
                    yield experiment, _write(experiment, setting, folder, _result_of(future))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
                # The pool joins it too, and the system tells only one of both that it has ended.
                while process.is_alive():
                    process.join(POLL_SECONDS)
            raise


def _sent(experiment: Experiment) -> Experiment | Path | Failed:
    """Returns what another process finds an experiment by."""
    path = extensions.path_of(experiment)
    if path is not None:
        return path
    try:
        pickle.dumps(experiment)
    except Exception as error:
        failed = failures.describe(error, None)
        return failed._replace(
            message=f"it cannot be sent to another process ({failed.message}); define its "
            "functions with def at the top of its module, or use --processes 1"
        )
    return experiment


def _result_of(future: "Future[Finished | Failed]") -> Finished | Failed:
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        return failures.describe(error, None)


def _start_worker(shares: _Shares, setting: Setting) -> None:
    # Ctrl-C reaches all processes of a terminal; the parent process stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker["shares"], _worker["setting"] = shares, setting


def _end_with_parent() -> None:
    """Ends this process once its parent has been killed, which nothing else tells a claim."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


# A queue can only be passed to a worker when it starts; this is where the worker keeps it.
_worker: dict[str, Any] = {}


def _run_in_worker(index: int, sent: Experiment | Path | Failed) -> Finished | Failed:
    shares: _Shares = _worker["shares"]
    setting: Setting = _worker["setting"]
    if isinstance(sent, Failed):
        return sent
    if isinstance(sent, Path):
        try:
            # What it prints when it is loaded, the first process has printed.
            with failures.kept():
                sent = load_file(sent)
        except ValueError as error:
            return failures.describe(error, None)
    return _run(sent, setting._replace(advance=_checked(lambda share: shares.put((index, share)))))


def _checked(show: Callable[[float], object]) -> Callable[[float], object]:
    """Checks a share where a claim tells it, before a bar or a queue has it."""

    def advance(share: float) -> None:
        share = float(share)
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}, expected 0 to 1, what was finished since the last")
        show(share)

    return advance


def _run(experiment: Experiment, setting: Setting) -> Finished | Failed:
    """Runs an experiment; whatever its code does but end the process or hang becomes a line."""
    began = time.perf_counter()
    with failures.kept() as printed:
        try:
            result = check_result(experiment, setting, experiment.run(setting))
            # Raises what judging raises.
            experiment.on(setting.data).find(result)
        except BaseException as error:
            # Workers ignore Ctrl-C, so that there this comes from the claim.
            if isinstance(error, KeyboardInterrupt) and multiprocessing.parent_process() is None:
                raise
            failed = failures.describe(error, failures.file_of(experiment.run))
            return failed._replace(printed=printed.getvalue())
    seconds = time.perf_counter() - began
    # Every experiment compiles programs of its own, which nothing else will call.
    jax.clear_caches()
    return Finished(result, seconds, printed.getvalue())
