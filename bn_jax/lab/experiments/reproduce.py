"""Runs experiments, and keeps what they find: JSON and a figure of each."""

import importlib.metadata
import json
import multiprocessing
import platform
import signal
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import jax

from bn_jax.lab.experiments import EXPERIMENTS, figures
from bn_jax.lab.experiments.verdicts import Experiment, Result, Setting
from bn_jax.lab.runs import staged, write_json

PACKAGES = "bn-jax", "jax", "flax", "optax", "numpy"
POLL_SECONDS = 0.1


def choose(names: Sequence[str]) -> list[Experiment]:
    """Finds experiments.

    Args:
        names: names or numbers of experiments, or "all".

    Returns:
        Each of them once, in the order of their numbers.

    Raises:
        ValueError: there is no such experiment, or none is named.
    """
    known = {str(one.number): one for one in EXPERIMENTS.values()} | EXPERIMENTS
    unknown = [name for name in names if name != "all" and name not in known]
    if unknown or not names:
        received = f"received {', '.join(unknown)}" if unknown else "received no name"
        raise ValueError(
            f"{received}, expected all, a number from 1 to {len(EXPERIMENTS)}, or names among "
            f"{', '.join(EXPERIMENTS)}; see them with --list"
        )
    chosen = set(EXPERIMENTS if "all" in names else (known[name].name for name in names))
    return [one for one in EXPERIMENTS.values() if one.name in chosen]


def reproduce(experiment: Experiment, setting: Setting, folder: Path) -> Result:
    """Runs an experiment, and writes what it finds to ``NAME.json`` and ``NAME.png``.

    Args:
        experiment: which.
        setting: how much is run.
        folder: made where it is missing.

    Returns:
        What was found.
    """
    return _write(experiment, setting, folder, *_run(experiment, setting))


def reproduce_each(
    experiments: Sequence[Experiment],
    setting: Setting,
    folder: Path,
    processes: int = 1,
    show: Callable[[Experiment, float], object] = lambda experiment, share: None,
) -> Generator[tuple[Experiment, Result]]:
    """Runs experiments as `reproduce` does, some of them at the same time.

    Args:
        experiments: which; each is a process's work from its start to its end.
        setting: how much is run; its `advance` is not called.
        folder: made where it is missing.
        processes: how many work. 1: this one, else others, and this one writes.
        show: is called with the share of an experiment that was finished since the last call.

    Yields:
        Each experiment and what was found, as they end. All is stopped where the iterator is closed
        or an exception is raised.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a process died.
    """
    if processes == 1:
        for experiment in experiments:
            yield (
                experiment,
                reproduce(experiment, setting._replace(advance=partial(show, experiment)), folder),
            )
        return
    context = multiprocessing.get_context("spawn")
    shares = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    # Whatever `advance` is, it need not be what can be sent to another process.
    sent = setting[:3]
    with ProcessPoolExecutor(processes, context, _start_worker, (shares,)) as pool:
        try:
            running = {
                pool.submit(_work, index, one, sent): one for index, one in enumerate(experiments)
            }
            while running:
                finished, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                while not shares.empty():
                    index, share = shares.get()
                    show(experiments[index], share)
                for one in finished:
                    experiment = running.pop(one)
                    yield experiment, _write(experiment, setting, folder, *one.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
                process.join()
            raise


def _start_worker(shares: Any) -> None:
    # Ctrl-C reaches all processes of a terminal; the one that has started the others stops them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker["shares"] = shares


_worker: dict[str, Any] = {}


def _work(index: int, experiment: Experiment, sent: tuple[int, int, bool]) -> tuple[Result, float]:
    def advance(share: float) -> None:
        _worker["shares"].put((index, share))

    return _run(experiment, Setting(*sent, advance))


def _run(experiment: Experiment, setting: Setting) -> tuple[Result, float]:
    """Returns what was found, and the seconds it took."""
    began = time.perf_counter()
    result = experiment.run(setting)
    seconds = time.perf_counter() - began
    # Every experiment compiles programs of its own, which nothing else will call.
    jax.clear_caches()
    return result, seconds


def _write(
    experiment: Experiment, setting: Setting, folder: Path, result: Result, seconds: float
) -> Result:
    with staged(folder) as staging:
        path = staging / f"{experiment.name}.json"
        write_json(path, _described(experiment, setting, result, seconds))
        curves = json.loads(path.read_text())["curves"]
        figures.save(experiment, curves, staging / f"{experiment.name}.png")
    return result


def _described(
    experiment: Experiment, setting: Setting, result: Result, seconds: float
) -> dict[str, Any]:
    said = ("number", "name", "claim", "source", "published", "protocol", "limits")
    return {
        **{name: getattr(experiment, name) for name in said},
        "verdict": result.verdict,
        "criteria": [
            {**one._asdict(), "measured": one.measured._asdict(), "verdict": one.verdict}
            for one in result.criteria
        ],
        "reported": {name: one._asdict() for name, one in result.reported.items()},
        "seeds": setting.chosen.tolist(),
        "quick": setting.quick,
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "platform": jax.default_backend(),
        "curves": result.curves,
    }
