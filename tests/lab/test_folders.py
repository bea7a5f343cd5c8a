"""Folders that are no finished run: what a command says of them."""

import os

import pytest

from bn_jax.lab.files import folders


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


RUN = ("metrics.json", "checkpoint/d/1", "test.npz")
UNFINISHED = ("checkpoints/config.json", "epochs.csv")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs/2026-01-01", *RUN)
    make(tmp_path / "runs/2026-01-02", *UNFINISHED)
    make(tmp_path / "runs/2026-01-03", *RUN)
    make(tmp_path / "exported", "model.json", "model.stablehlo", "README.md")
    make(tmp_path / "audited", "audit.json", "audit.png")
    make(tmp_path / "claims", "whitening.json", "whitening.png", "hessian.json", "hessian.png")
    make(tmp_path / "a file", "x")
    make(tmp_path / "others", *(f"{number}/metrics.json" for number in range(9)))
    (tmp_path / "empty").mkdir()
    os.symlink("nowhere", tmp_path / "dangling")
    return tmp_path


CASES = {
    "runs/2026-01-02": "is an unfinished run, expected a finished one; finish it with bn-jax train "
    "--resume runs/2026-01-02",
    "runs": "holds runs, expected one run; give one of runs/2026-01-03, runs/2026-01-01, "
    "runs/2026-01-02 (unfinished)",
    "others": "holds runs, expected one run; give one of others/8, others/7, others/6, others/5, "
    "others/4 and 4 more",
    "runs/2026-01-01/checkpoint": "is a part of a run, expected its whole folder; give "
    "runs/2026-01-01",
    "runs/2026-01-01/checkpoint/d": "is a part of a run, expected its whole folder; give "
    "runs/2026-01-01",
    "runs/2026-01-02/checkpoints": "is a part of a run, expected its whole folder; give "
    "runs/2026-01-02",
    "exported": "is an exported model, expected a run; load it as its README.md shows, or give the "
    "run that was exported",
    "audited": "holds an audit, expected a run; give the run that was audited",
    "claims": "holds results of bn-jax reproduce (whitening, hessian), expected a run of bn-jax "
    "train",
    "a file/x": "is a file, expected the folder of a run",
    "runs/2026-01-01/metrics.json": "is a part of a run, expected its whole folder; give "
    "runs/2026-01-01",
    "runs/2026-01-04": "does not exist, expected the folder of a run; did you mean "
    "runs/2026-01-03?",
    "nothing": "does not exist, expected the folder of a run",
    "dangling": "does not exist, expected the folder of a run",
    "empty": None,
}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_called_what_it_is(home, name):
    found = folders.describe(type(home)(name))
    assert found == CASES[name]


def test_a_run_with_spaces_is_quoted(home):
    make(home / "my runs/a b", *UNFINISHED)
    assert folders.describe(type(home)("my runs/a b")).endswith("--resume 'my runs/a b'")
    assert folders.describe(type(home)("my runs")).endswith("one of 'my runs/a b' (unfinished)")


def test_a_finished_run_with_checkpoints_left_is_finished(home):
    """As a process leaves it that was killed before it removed them."""
    run = make(home / "killed", *RUN, *UNFINISHED)
    assert folders.is_finished(run) and not folders.is_unfinished(run)
