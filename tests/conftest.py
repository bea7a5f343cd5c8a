import collections
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support import TRAIN, bars, run_process
from tiers import EVERY

FOLDER = Path(__file__).parent

# What these need is not there otherwise: `make zoo`, `make browser`.
collect_ignore = [
    folder
    for folder, name in {"zoo": "BN_JAX_ZOO", "site": "BN_JAX_BROWSER"}.items()
    if not os.environ.get(name)
]

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Compiles what is the same program once, whichever test or process of a test asks for it.

    Each worker of pytest-xdist has a cache of its own: JAX does not write to it atomically.
    """
    # A shell starts what runs in its background so that it, and all that it starts, ignores Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    for name, value in {
        "jax_compilation_cache_dir": folder.name,
        "jax_persistent_cache_min_compile_time_secs": 0,
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Puts cases into the exhaustive tier, and leaves no file out of the quick one."""
    cases: collections.Counter[str] = collections.Counter()
    for item in items:
        test = f"{item.path.relative_to(FOLDER)}::{item.originalname}"
        every = EVERY.get(test, 1)
        if every == 0 or cases[test] % every:
            item.add_marker("exhaustive")
        cases[test] += 1
    if any("::" in argument for argument in config.args):
        return
    quick = {item.path for item in items if item.get_closest_marker("exhaustive") is None}
    without = sorted({str(item.path) for item in items if item.path not in quick})
    if without:
        raise pytest.UsageError(f"no test of {without} is in the quick tier: make one so")


@pytest.fixture(scope="module")
def compile_quickly():
    """For tests in which compiling takes the time, and nothing depends on how well it is done."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process and folder, and returns its code and streams."""
    # With devices in place, --devices can only choose among the four of conftest.py.
    assert len(jax.devices()) == 4
    monkeypatch.chdir(tmp_path)

    from bn_jax.lab.command import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bn-jax", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, request):
    """A real run on the user's own data, in a process of its own: its folder, and what it printed.

    The first worker of pytest-xdist that needs it trains it for all.
    """
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent
    folder, printed = shared / "trained", shared / "trained.out"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + 300
        while not printed.exists() and time.monotonic() < end:
            time.sleep(0.2)
        return folder, printed.read_text()
    np.savez(folder / "bars.npz", **bars())
    options = ["--data", "bars.npz", "--out", "a/run", "--log", "tensorboard"]
    finished = run_process([*TRAIN, *options], folder)
    assert (finished.returncode, finished.stderr) == (0, "")
    part = printed.with_suffix(".part")
    part.write_text(finished.stdout)
    part.rename(printed)
    return folder, finished.stdout
