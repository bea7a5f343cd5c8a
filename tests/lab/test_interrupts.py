"""Ctrl-C: a real signal to a real process, in every phase of a command."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import bars, make_small_resnet, numbers_of, run_command

from bn_jax.lab import command, runs
from bn_jax.lab.console import interrupts

TRAIN = (
    *("train", "--arm", "synchronized", "--epochs", "2", "--batch-size", "8", "--devices", "1"),
    *("--learning-rate", "0.05", "--data", "bars.npz", "--out", "run"),
)
# The command, which gets Ctrl-C when it is about to import a module, or to call a function of one.
# What a background shell starts inherits that SIGINT is ignored.
PROGRAM = """
import importlib.abc, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
module, function = sys.argv.pop(1), sys.argv.pop(1)

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == module and not function:
            interrupt()
        if name == "bn_jax.lab.trainer":
            sys.meta_path.remove(self)
            from bn_jax.lab import runs
            from support import make_small_resnet
            runs.make_model = make_small_resnet
            sys.meta_path.insert(0, self)
            if function:
                replace()

def replace():
    owner = importlib.import_module(module)
    before = getattr(owner, function)
    def interrupted(*given, **options):
        interrupt()
        return before(*given, **options)
    setattr(owner, function, interrupted)

sys.meta_path.insert(0, Interrupting())
from bn_jax.lab.__main__ import run
run()
"""
ADVICE = {False: "nothing was saved", True: "continue with bn-jax train --resume run"}


def interrupted(folder, module, function=""):
    root = Path(command.__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, module, function, *TRAIN],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


# Where Python would raise KeyboardInterrupt in an import, an extension's initialization included,
# which would report it as an ImportError.
IMPORTS = ["typer.main", "jax", "numpy._core.multiarray"]


@pytest.mark.parametrize("module", IMPORTS)
def test_ctrl_c_while_importing(tmp_path, module):
    np.savez(tmp_path / "bars.npz", **bars())
    finished = interrupted(tmp_path, module)
    assert finished.returncode == 130
    assert finished.stderr == "bn-jax: error: interrupted; nothing was saved\n"
    assert [path.name for path in tmp_path.iterdir()] == ["bars.npz"]


PHASES = {
    "loading": ("bn_jax.lab.datasets.problem", "load", False),
    "finding devices": ("bn_jax.lab.distributed.launch", "make_mesh", False),
    "compiling": ("bn_jax.lab.fitting", "compile_programs", True),
    "training": ("bn_jax.lab.fitting", "_take_steps", True),
    "saving": ("bn_jax.lab.checkpoints", "sha256_of_folder", True),
    "writing results": ("bn_jax.lab.training.results", "draw_curves", True),
    "printing results": ("bn_jax.lab.console.tables", "print_arms", True),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("module", "function", "has_begun"), PHASES.values(), ids=PHASES)
def test_ctrl_c_in_every_phase(tmp_path, monkeypatch, compile_quickly, module, function, has_begun):
    np.savez(tmp_path / "bars.npz", **bars())
    finished = interrupted(tmp_path, module, function)
    assert finished.returncode == 130, finished.stderr
    assert finished.stderr == f"bn-jax: error: interrupted; {ADVICE[has_begun]}\n"
    assert (tmp_path / "run").exists() == has_begun
    if not has_begun:
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "make_model", make_small_resnet)
    if (tmp_path / "run/metrics.json").exists():
        assert function == "print_arms"
    else:
        code, _, err = run_command("train", "--resume", "run")
        assert code == 0, err
    code, _, err = run_command(*TRAIN[:-1], "whole")
    assert (code, err) == (0, "")
    assert numbers_of(tmp_path / "run") == numbers_of(tmp_path / "whole")


def test_what_removes_its_beginnings_gets_an_exception():
    handler = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupts.end_at_once()
        at_once = signal.getsignal(signal.SIGINT)
        assert at_once is not signal.default_int_handler
        with pytest.raises(KeyboardInterrupt), interrupts.as_exceptions():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is at_once
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        interrupts.end_at_once()
        with interrupts.as_exceptions():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
