"""Claims from files whose code goes wrong: one line, and all other claims run."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support import COMMAND, environment, only_claims, reproduce

from bn_jax.lab.experiments import EXPERIMENTS, checking, failures, reproducing, statistics
from bn_jax.lab.experiments.labelled import Split
from bn_jax.lab.experiments.verdicts import (
    Above,
    ChosenRate,
    Experiment,
    Identity,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
    Within,
)

# The placeholder is line 6 of the file.
MINE = """
import sys
import numpy as np
from bn_jax.lab.experiments.verdicts import Experiment, Result, SubClaim, Above
def run(setting):
    {run}
    setting.advance(1.0)
    return Result(values={{"m1a": 1.0 + setting.chosen}}, curves={{"x": [1, 2]}})
def draw(figure, curves):
    {draw}
    figure.subplots().plot(curves["x"])
{more}
ONE = SubClaim("m1a", "mean", "the mean is positive", "mean", Above(0.0))
EXPERIMENT = Experiment(101, "mine", "A claim", "me", (ONE,), "none", "many", {name}, draw)
"""


def write(folder, run="pass", draw="pass", more="", name="run"):
    (folder / "mine.py").write_text(MINE.format(run=run, draw=draw, more=more, name=name))


def run_simple(setting):
    return Result({"1a": 1.0 + setting.chosen}, {"x": [1, 2]})


def draw_simple(figure, curves):
    figure.subplots().plot(curves["x"])


# Of other types than the fields have.
NUMBER: Any = 3
TEXT: Any = "X"
ONE = SubClaim("1a", "mean", "The mean is positive", "mean", Above(0.0))
SIMPLE = Experiment(
    1, "simple", "A claim", "me", (ONE,), "a protocol", "limits", run_simple, draw_simple
)


@pytest.fixture(autouse=True)
def simple(monkeypatch, tmp_path):
    only_claims(monkeypatch, SIMPLE)
    monkeypatch.chdir(tmp_path)


ODD = "class Odd(Exception):\n    def __str__(self): raise ValueError\n"
FAILURES = {
    "raises": ({"run": "1 / 0"}, "line 6: ZeroDivisionError: division by zero"),
    "raises deeper": ({"run": "np.linalg.inv(np.zeros((2, 2)))"}, "line 6: LinAlgError: Singular"),
    "ends the process": ({"run": "sys.exit(3)"}, "line 6: SystemExit: 3"),
    "ends it well": ({"run": "sys.exit()"}, "line 6: SystemExit"),
    "is interrupted by itself": ({"run": "raise GeneratorExit"}, "line 6: GeneratorExit"),
    "several lines": ({"run": r"raise ValueError('a\nb')"}, "line 6: ValueError: a b"),
    "in a partial function": (
        {"run": "1 / 0", "name": "__import__('functools').partial(run)"},
        "line 6: ZeroDivisionError",
    ),
    "in an object": (
        {
            "more": "class Run:\n    def __call__(self, setting):\n        return 1 / 0",
            "name": "Run()",
        },
        "line 14: ZeroDivisionError",
    ),
    "no message": ({"run": "raise Odd", "more": ODD}, r"line 6: Odd: \(its message cannot"),
    "share": ({"run": "setting.advance('x')"}, "line 6: ValueError: could not convert string"),
    "nothing": ({"run": "return None"}, "ValueError: what run returns is of type NoneType, exp"),
    "another key": (
        {"run": "return Result({'m1b': setting.chosen}, {})"},
        "ValueError: values has the key 'm1b', expected keys among m1a",
    ),
    "too few": (
        {"run": "return Result({'m1a': setting.chosen[1:]}, {})"},
        r"ValueError: values\['m1a'\] has the shape \(3,\), expected 4 real numbers",
    ),
    "texts": (
        {"run": "return Result({'m1a': list('abcd')}, {})"},
        r"ValueError: values\['m1a'\] is no array of numbers",
    ),
    "curves": (
        {"run": "return Result({'m1a': setting.chosen}, {'f': run})"},
        "ValueError: curves cannot be written as JSON",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_claim_that_fails_is_one_line_and_others_run(tmp_path, monkeypatch, capsys, case):
    placed, message = FAILURES[case]
    write(tmp_path, **placed)
    arguments = ("mine.py", "simple", "--seeds", 4, "--processes", 1, "--out", "found")
    assert reproduce(monkeypatch, *arguments) == 1
    printed = capsys.readouterr()
    expected = rf"bn-jax: error: mine.py[,:] {message}.*; the claim mine failed, the whole trace is"
    assert re.match(expected, printed.err) and printed.err.count("\n") == 1
    assert "Traceback" in (tmp_path / "found/mine.log").read_text()
    assert "1 simple: 1 of 1 reproduced\n" in printed.out and "101 mine: failed\n" in printed.out
    names = {path.name for path in (tmp_path / "found").iterdir()}
    assert names == {"mine.log", "simple.json", "simple.png", "values.csv", "forest.png"}


def test_other_processes_say_the_same(tmp_path, monkeypatch, capsys):
    write(tmp_path, run="print('before'); raise KeyboardInterrupt")
    # What a closure runs cannot be pickled: each process loads the file.
    (tmp_path / "other.py").write_text(
        MINE.format(run="pass", draw="pass", more="", name="lambda setting: run(setting)").replace(
            '"mine"', '"other"'
        )
    )
    arguments = ("mine.py", "other.py", "--seeds", 4, "--processes", 2, "--out", "found")
    assert reproduce(monkeypatch, *arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("bn-jax: error: mine.py, line 6: KeyboardInterrupt; the claim")
    assert printed.err.count("\n") == 1 and "101 other: 1 of 1 reproduced\n" in printed.out
    assert (tmp_path / "found/mine.log").read_text().startswith("before\nTraceback")


def test_what_cannot_be_sent_is_said(tmp_path):
    closure = SIMPLE._replace(run=lambda setting: run_simple(setting))
    ((_, outcome),) = reproducing.reproduce_each([closure], Setting(2), tmp_path, 2)
    assert outcome.record is None
    line = str(outcome.failure)
    assert line.startswith("it cannot be sent to another process (")
    assert "or use --processes 1; the claim simple failed" in line


def test_a_file_that_cannot_be_loaded_stops_no_other_claim(tmp_path, monkeypatch, capsys):
    write(tmp_path, more="(")
    arguments = ("mine.py", "simple", "--seeds", 4, "--processes", 1, "--out", "found")
    assert reproduce(monkeypatch, *arguments) == 1
    printed = capsys.readouterr()
    assert (
        printed.err
        == "bn-jax: error: mine.py, line 12: SyntaxError: '(' was never closed; mend it\n"
    )
    assert "1 simple: 1 of 1 reproduced\n" in printed.out


class Entry(NamedTuple):
    """An entry point of an installed package."""

    name: str = "broken"
    value: str = "package:EXPERIMENT"
    module: str = "package"

    def load(self):
        sys.exit(0)


def test_a_broken_package_stops_no_claim_of_others(monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Entry()])
    line = "the claim package:EXPERIMENT of an installed package cannot be loaded (SystemExit: 0); "
    assert reproduce(monkeypatch, "--list") == 0
    assert capsys.readouterr().err.startswith(f"bn-jax: warning: {line}")
    options = ("--seeds", 4, "--processes", 1, "--out")
    assert reproduce(monkeypatch, "simple", *options, "named") == 0
    assert capsys.readouterr().err == ""
    assert reproduce(monkeypatch, "all", *options, "all") == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"bn-jax: error: {line}") and printed.err.count("\n") == 1
    assert "1 simple: 1 of 1 reproduced\n" in printed.out
    assert reproduce(monkeypatch, "broken", *options, "broken") == 2
    assert capsys.readouterr().err.startswith(f"bn-jax: error: NAME: {line}")


def test_without_its_figure_the_results_of_a_claim_are_kept(tmp_path, monkeypatch, capsys):
    write(tmp_path, draw="curves['y']")
    assert reproduce(monkeypatch, "mine.py", "--seeds", 4, "--out", "found") == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("bn-jax: error: mine.py, line 10: KeyError: 'y'; its figure is m")
    assert printed.err.count("\n") == 1 and "1 sub-claims: 1 reproduced" in printed.out
    assert json.loads((tmp_path / "found/mine.json").read_text())["sub_claims"]
    with (tmp_path / "found/values.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    assert not (tmp_path / "found/mine.png").exists()
    assert "KeyError" in (tmp_path / "found/mine.log").read_text()


def test_what_a_claim_prints_is_in_its_log(tmp_path, monkeypatch, capsys):
    write(tmp_path, run="print('one'); print('two', file=sys.stderr)")
    assert reproduce(monkeypatch, "mine.py", "--processes", 1, "--out", "found") == 0
    printed = capsys.readouterr()
    expected = "bn-jax: warning: the claim mine printed 2 lines, which found/mine.log has\n"
    assert printed.err == expected and "one" not in printed.out
    assert (tmp_path / "found/mine.log").read_text() == "one\ntwo\n"


def test_texts_are_neither_markup_nor_formulas(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    text = (tmp_path / "mine.py").read_text()
    text = text.replace('"A claim"', r'"[/b] \U0001d53d $\\frac$"').replace(
        '"mean"', '"[/i] $_$"', 1
    )
    (tmp_path / "mine.py").write_text(text)
    assert reproduce(monkeypatch, "mine.py", "--processes", 1, "--out", "found") == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "m1a  [/i] $_$" in printed.out
    assert reproduce(monkeypatch, "--show", "mine.py", "--results", "found") == 0
    assert "[/b]" in capsys.readouterr().out
    monkeypatch.setitem(EXPERIMENTS, "simple", SIMPLE._replace(claim="[/b] $"))
    assert reproduce(monkeypatch, "--list") == 0
    assert "[/b] $" in capsys.readouterr().out


def test_not_a_number_is_no_measurement_and_no_failure(tmp_path, monkeypatch, capsys):
    write(tmp_path, run="return Result({'m1a': np.nan * setting.chosen}, {'x': [np.nan]})")
    assert reproduce(monkeypatch, "mine.py", "--processes", 1, "--out", "found") == 0
    printed = capsys.readouterr()
    assert "Without a measurement, NaN: m1a\n" in printed.out and printed.err == ""


def test_claims_of_one_name_do_not_overwrite_each_other(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    (tmp_path / "other.py").write_text((tmp_path / "mine.py").read_text())
    assert reproduce(monkeypatch, "mine.py", "other.py") == 2
    assert "two are named 'mine'" in capsys.readouterr().err
    # The same file twice is one claim.
    assert reproduce(monkeypatch, "mine.py", "mine.py", "--seeds", 4, "--out", "found") == 0


def test_show_is_about_one_claim(monkeypatch, capsys):
    monkeypatch.setitem(EXPERIMENTS, "second", SIMPLE._replace(number=2, name="second"))
    assert reproduce(monkeypatch, "--show", "all") == 2
    expected = "bn-jax: error: --show: received all, expected one claim; give its name\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "../mine"}, "name is '../mine', expected letters, digits"),
        ({"name": "forest"}, "name is 'forest', expected .* none of forest"),
        ({"claim": "\udcff"}, "surrogates not allowed"),
        ({"name": 3}, "name is of type int, expected str"),
        ({"number": "1"}, "number is of type str, expected int"),
        ({"run": None}, "run is None, expected a function"),
        ({"sub_claims": ()}, "sub_claims is empty"),
        ({"sub_claims": ONE}, "sub_claims.0. is of type str, expected SubClaim"),
        ({"sub_claims": [ONE, ONE]}, "keys 1a, 1a, expected different ones"),
        ({"sub_claims": [ONE._replace(bound=NUMBER)]}, "bound of '1a' is 3, expected one of Ident"),
        ({"sub_claims": [ONE._replace(label="x" * 25)]}, "label of '1a' has 25 characters"),
        ({"sub_claims": [ONE._replace(scale="ratio")]}, "bound of '1a' is 0.0, expected a positi"),
        ({"sub_claims": [ONE._replace(scale=TEXT)]}, "scale of '1a' is 'X', expected one of"),
        ({"sub_claims": [ONE._replace(bound=Within(2, 1))]}, "low of '1a' is 2, expected less tha"),
        (
            {"sub_claims": [ONE._replace(bound=Above(TEXT))]},
            "bound of '1a' is 'X', expected a fini",
        ),
        ({"sub_claims": [ONE._replace(bound=Identity(math.nan))]}, "tolerance of '1a' is nan"),
        ({"sub_claims": [ONE._replace(published=Published("1", TEXT))]}, "grade of '1a' is 'X'"),
        ({"data": True}, "data is of type bool, expected Needs"),
    ],
)
def test_a_claim_is_checked_when_it_is_loaded(changed, message):
    with pytest.raises(ValueError, match=message):
        checking.check_experiment(SIMPLE._replace(**changed))


GOOD = Result(
    {"1a": {"one": [1, 2], "two": np.array([1, 2], np.float32)}},
    {"x": np.arange(2)},
    [Series("1a", "arm", "", np.array([True, False]))],
    {"figure": statistics.exact(1.0)},
    {"arm": ChosenRate(np.float64(0.5), np.True_)},
    {"1a": Split(2, 3)},
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"values": [1, 2]}, "values is of type list, expected Mapping"),
        ({"values": {"1a": {}}}, "values.'1a'. is {}, expected arrays by the names of settings"),
        ({"values": {"1a": {"one": 1.0}}}, r"values.'1a'..'one'. has the shape \(\), expected 2"),
        ({"values": {"1a": [1j, 2]}}, "values.'1a'. is no array of numbers"),
        ({"curves": None}, "curves is of type NoneType, expected Mapping"),
        ({"series": ["1a"]}, "series.0. is of type str, expected Series"),
        ({"series": [Series("2a", "", "", [1, 2])]}, "series.0. has the key '2a', expected keys"),
        (
            {"series": [Series("1a", NUMBER, "", [1, 2])]},
            "arm of series.0. is of type int, expected st",
        ),
        ({"reported": {"x": 1.0}}, "reported.'x'. is of type float, expected Interval"),
        ({"rates": {"arm": 0.1}}, "rates.'arm'. is of type float, expected ChosenRate"),
        ({"splits": {"1a": (1, 2)}}, "splits.'1a'. is of type tuple, expected Split"),
    ],
)
def test_a_result_is_checked_when_it_is_returned(changed, message):
    with pytest.raises(ValueError, match=message):
        checking.check_result(SIMPLE, Setting(2), GOOD._replace(**changed))


def test_a_good_result_is_kept():
    good = GOOD._replace(curves={"x": np.arange(2), "none": None, "nan": math.nan})
    found = checking.check_result(SIMPLE, Setting(2), good)
    assert found.curves == {"x": [0, 1], "none": None, "nan": None}
    np.testing.assert_array_equal(found.values["1a"]["two"], [1, 2])
    assert found.values["1a"]["one"].dtype == np.float64


def test_what_is_printed_without_end_is_cut(monkeypatch):
    monkeypatch.setattr(failures, "MOST_PRINTED", 10)
    with failures.kept() as printed:
        for _ in range(9):
            print("abc")
    assert printed.getvalue() == "abc\nabc\nab"


def is_running(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_command(tmp_path, kill):
    endless = "import os, threading; open(str(os.getpid()), 'w').close(); threading.Event().wait()"
    write(tmp_path, run=endless)
    other = (tmp_path / "mine.py").read_text().replace("101", "102").replace('"mine"', '"other"')
    (tmp_path / "other.py").write_text(other.replace("m1a", "n1a"))
    command = subprocess.Popen(
        [*COMMAND, "reproduce", "mine.py", "other.py", "--processes", "2"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def workers():
        return [int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()]

    def wait_until(is_so):
        end = time.monotonic() + 120
        while not is_so() and time.monotonic() < end:
            time.sleep(0.1)
        assert is_so()

    try:
        wait_until(lambda: len(workers()) == 2)
        assert all(map(is_running, workers()))
        command.send_signal(kill)
        wait_until(lambda: not any(map(is_running, workers())))
    finally:
        command.kill()
        command.wait()
        for number in filter(is_running, workers()):
            os.kill(number, signal.SIGKILL)
