import subprocess

import pytest

from benchmarks import demo, report

COMMITTED = report.read("demo")


def test_a_command_is_measured_in_a_process_of_its_own(tmp_path):
    measured = demo.measure(["--help"], tmp_path)
    assert measured.cpu_seconds > 0 and measured.seconds > 0
    assert measured.programs == 0 and list(measured.phases.values()) == [0, 0, 0]
    with pytest.raises(subprocess.CalledProcessError):
        demo.measure(["no-command"], tmp_path)


def test_committed_figures():
    train, evaluate = (COMMITTED["commands"][name] for name in ("train", "eval"))
    # Of each arm its initialization and two steps, what makes a number of the first seed, and the
    # learning rates for epochs.csv.
    assert 9 <= train["programs"] <= 11 and evaluate["programs"] <= 2
    assert 0 < sum(evaluate["phases"].values()) < evaluate["seconds"] < train["seconds"]
    (table,) = demo.tables(COMMITTED)
    assert table.row_count == 2
