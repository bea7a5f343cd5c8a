"""Saved runs that several files of tests share."""

import time

import numpy as np
import pytest
from support import TRAIN, bars, run_process


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
