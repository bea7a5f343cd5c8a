import csv
import functools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from support import assert_close, only_claims, reproduce

from bn_jax import linen
from bn_jax.lab import command as cli
from bn_jax.lab.commands import reproduction
from bn_jax.lab.experiments import (
    EXPERIMENTS,
    corruptions,
    figures,
    nets,
    parallel,
    reproducing,
    scale_invariance,
    selection,
    small_batches,
    statistics,
    sweeps,
    verdicts,
)
from bn_jax.lab.experiments.verdicts import (
    Above,
    Experiment,
    NotTestable,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
    Within,
)

GRADES = {"V", "R", "D"}


def test_every_claim_has_an_experiment():
    numbers = [one.number for one in EXPERIMENTS.values()]
    assert numbers == sorted(set(numbers))
    folder = Path(cli.__file__).parent / "experiments"
    shared = {"__init__", "extensions", "figures", "forest", "nets", "parallel", "reproducing"}
    shared |= {"selection", "statistics", "sweeps", "verdicts", "writing"}
    shared |= {"digit_corruptions", "domain_nets", "expressive_power", "labelled", "checking"}
    shared |= {"failures"}
    assert {path.stem for path in folder.glob("*.py")} - shared == set(EXPERIMENTS)
    for name, one in EXPERIMENTS.items():
        assert one.name == name and one.run.__module__ == f"bn_jax.lab.experiments.{name}"
        assert all((one.claim, one.source, one.protocol, one.limits, one.easy, one.hard))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_sub_claim_is_a_sentence_with_a_bound(name):
    one = EXPERIMENTS[name]
    letters = "abcdefghijklmnopqrstuvwxyz"[: len(one.sub_claims)]
    assert [part.key for part in one.sub_claims] == [f"{one.number}{x}" for x in letters]
    for part in one.sub_claims:
        assert part.statement and part.quantity and 0 < len(part.label) <= 24
        assert bool(part.published.figure) == (part.published.grade in GRADES)
        if isinstance(part.bound, Within) or getattr(part.bound, "size", None) is not None:
            assert part.reason or part.published.figure


def run_tiny(setting):
    setting.advance(0.5)
    values = setting.chosen + (0.25 if setting.quick else 0.5)
    return Result(
        {"1a": values, "1b": {"half": values / 2, "whole": -values}},
        {"values": values, "none": math.nan},
        [Series("1b", "an arm", "half", values / 4)],
        {"first": statistics.exact(values[0])},
        {"arm": verdicts.ChosenRate(np.float64(0.5), np.True_)},
    )


def draw_tiny(figure, curves):
    assert curves["none"] is None
    figure.subplots().plot(curves["values"])


TINY = Experiment(
    1,
    "tiny",
    "A claim",
    "Somebody 2026",
    (
        SubClaim("1a", "mean", "The mean is positive", "mean", Above(0.0), is_resplit=True),
        SubClaim("1b", "same", "It is 5", "it", Within(0.0, 9.0), Published("5", "R"), "ours"),
        SubClaim("1c", "more", "It is more", "it", NotTestable("it is not here")),
    ),
    "a protocol",
    "some limits",
    run_tiny,
    draw_tiny,
)


@pytest.fixture
def tiny(monkeypatch):
    only_claims(monkeypatch, TINY, TINY._replace(number=2, name="other"))


@pytest.mark.parametrize("processes", [1, 2])
def test_reproduce_writes_json_and_a_figure_for_each_claim(
    tiny, tmp_path, monkeypatch, capsys, processes
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ("other", "1", "tiny", "--seeds", 4, "--first-seed", 10, "--out", "found")
    assert reproduce(monkeypatch, *arguments, "--processes", processes) == 0
    names = {path.name for path in (tmp_path / "found").iterdir()}
    pictures = {"tiny.png", "other.png", "forest.png"}
    assert names == {"tiny.json", "other.json", "values.csv", *pictures}
    found = json.loads((tmp_path / "found/tiny.json").read_text())
    assert found["seeds"] == [10, 11, 12, 13] and not found["quick"]
    mean, same, more = found["sub_claims"]
    assert mean["verdict"] == "reproduced" and mean["decisive"] == "" and mean["blocks"] == []
    assert mean["settings"][""]["measured"]["estimate"] == 12.0
    other_data = mean["settings"][""]["for_other_data"]
    assert other_data["low"] < mean["settings"][""]["measured"]["low"]
    assert same["verdict"] == "not reproduced" and same["decisive"] == "whole"
    assert {name: of["verdict"] for name, of in same["settings"].items()} == {
        "half": "reproduced",
        "whole": "not reproduced",
    }
    assert "for_other_data" not in same["settings"]["half"]
    assert same["bound"] == {"kind": "within", "text": "0 to 9", "low": 0, "high": 9}
    assert (same["published"], same["grade"], same["reason"]) == ("5", "R", "ours")
    assert more["verdict"] == "not testable here"
    assert found["curves"] == {"values": [10.5, 11.5, 12.5, 13.5], "none": None}
    assert found["reported"]["first"]["estimate"] == 10.5
    assert found["rates"] == {"arm": {"value": 0.5, "at_edge": True}}
    for picture in pictures:
        assert (tmp_path / "found" / picture).read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "found/values.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["claim"] == "tiny"]
    assert len(rows) == 4 * 4
    assert {"claim": "tiny", "sub_claim": "1a", "arm": "", "setting": ""}.items() <= rows[0].items()
    assert [(row["seed"], row["value"]) for row in rows[:2]] == [("10", "10.5"), ("11", "11.5")]
    arm = {(row["setting"], row["value"]) for row in rows if row["arm"] == "an arm"}
    assert arm == {("half", str(x / 4)) for x in (10.5, 11.5, 12.5, 13.5)}
    printed = capsys.readouterr()
    assert printed.err == ""
    if processes == 1:
        assert printed.out.startswith("1 tiny: 1 of 3 reproduced\n2 other: 1 of 3")
    first = sorted(printed.out.splitlines()[:2])
    assert first == ["1 tiny: 1 of 3 reproduced", "2 other: 1 of 3 reproduced"]
    for text in ("1a", "mean", "> 0", "12 [9.95, 14.1]", "-12 [-13.5, -10.5]*", "Saved in found"):
        assert text in printed.out
    assert "Intervals are of 95 % over 4 seeds" in printed.out
    assert "Contradict their source here: 1b, 1b\n" in printed.out


def test_a_line_for_every_sub_claim_fits_80_columns(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for seeds in (2, 16):
        arguments = ("1", "--seeds", seeds, "--out", tmp_path / f"found{seeds}")
        assert reproduce(monkeypatch, *arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith("1") and line[1] in "abc" for line in lines) == 3
        assert max(map(len, lines[1:6])) <= 80
    # Both blocks decide alike, and the other claim has not run.
    found = json.loads((tmp_path / "found16/tiny.json").read_text())
    assert found["sub_claims"][0]["blocks"] == ["reproduced"] * 2


def test_show_prints_all_about_a_claim_before_and_after_it_ran(tiny, tmp_path, monkeypatch, capsys):
    assert reproduce(monkeypatch, "--show", "tiny") == 0
    printed = capsys.readouterr().out
    for text in ("1 tiny: A claim (Somebody 2026)", "1a: The mean", "5 (R)", "some limits"):
        assert text in printed
    reproducing.reproduce(TINY, Setting(4, 10), tmp_path)
    assert reproduce(monkeypatch, "--show", "1", "--results", tmp_path) == 0
    printed = capsys.readouterr().out
    for text in (
        "1b not reproduced: It is 5",
        "whole: -12 (",
        "; for other data 12 (",
        "bound: ours",
    ):
        assert text in printed


def test_show_needs_a_claim_and_its_results(tiny, tmp_path, monkeypatch, capsys):
    for content in (None, "{}", "[", "[1]", '{"name": "other"}'):
        if content is not None:
            (tmp_path / "tiny.json").write_text(content)
        assert reproduce(monkeypatch, "--show", "tiny", "--results", tmp_path) == 2
        assert "tiny.json cannot be read (" in capsys.readouterr().err
    assert reproduce(monkeypatch, "--results", tmp_path) == 2
    assert "--results: needs --show NAME" in capsys.readouterr().err
    assert reproduce(monkeypatch, "--show", "nothing") == 2


def test_the_command_asks_for_a_device_per_core_before_jax_starts(tiny, tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(parallel, "request_devices", lambda: asked.append("devices"))
    count = reproduction.default_processes
    monkeypatch.setattr(
        reproduction, "default_processes", lambda: asked.append("processes") or count()
    )
    nothing = reproduction.Reproduced([], [], [])
    monkeypatch.setattr(reproduction, "reproduce", lambda *given, **options: nothing)
    assert reproduce(monkeypatch, "all", "--out", tmp_path / "found") == 0
    assert asked == ["devices", "processes"]
    assert reproduce(monkeypatch, "--list") == 0
    assert len(asked) == 2


def test_the_verdict_changes_no_exit_code(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    failing = TINY._replace(
        run=lambda setting: Result({"1a": -setting.chosen - 9.0}, {"none": None, "values": [1]})
    )
    monkeypatch.setitem(EXPERIMENTS, "tiny", failing)
    arguments = ("all", "--quick", "--processes", 1, "--out", tmp_path / "found")
    assert reproduce(monkeypatch, *arguments) == 0
    (mean, same, _) = json.loads((tmp_path / "found/tiny.json").read_text())["sub_claims"]
    assert mean["verdict"] == "not reproduced"
    # What an experiment does not return was not measured.
    assert same["verdict"] == "no measurement"
    assert json.loads((tmp_path / "found/other.json").read_text())["seeds"] == [0, 1, 2]
    assert os.environ["XLA_FLAGS"] == f"{cli.COMPILED_QUICKLY} --mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"NAME: received no name, expected all, a number from 1 to 2, a file such as .*tiny"),
        (("tinny",), r"NAME: received tinny, expected all,.*see them with --list"),
        (("all", "--seeds", 1), r"--seeds: received 1, expected 2 to 1000; an interval needs more"),
        (("all", "--first-seed", -1), r"--first-seed: received -1, expected 0 to"),
        (("all", "--processes", 0), r"--processes: received 0, expected 1 or more; leave it out"),
        (("all", "--out", "here"), r"--out: here exists and is not empty; choose another"),
    ],
)
def test_bad_input_is_said_in_one_line(tiny, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/file").touch()
    assert reproduce(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"bn-jax: error: {message}.*\n", printed.err)
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_list_names_every_claim(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert reproduce(monkeypatch, "--list") == 0
    printed = capsys.readouterr().out
    for one in EXPERIMENTS.values():
        assert re.search(rf"{one.number} .*{one.name}", printed)


def test_what_was_found_before_an_interruption_is_kept(tiny, tmp_path, monkeypatch, capsys):
    def interrupt(setting):
        raise KeyboardInterrupt

    monkeypatch.setitem(EXPERIMENTS, "other", EXPERIMENTS["other"]._replace(run=interrupt))
    arguments = ("all", "--processes", 1, "--out", tmp_path / "found")
    assert reproduce(monkeypatch, *arguments) == 130
    names = {path.name for path in (tmp_path / "found").iterdir()}
    assert names == {"tiny.json", "tiny.png", "values.csv"}
    assert "interrupted; 1 of 2 claims are in" in capsys.readouterr().err


def run_in_quick_process(setting):
    assert setting.quick
    for _ in range(4):
        setting.advance(0.25)
    return run_tiny(setting)


def run_for_ever(setting):
    setting.advance(0.25)
    threading.Event().wait()


def run_to_death(setting):
    os._exit(1)


def test_processes_run_alike_show_how_far_they_are_and_are_stopped(tmp_path):
    quick = TINY._replace(run=run_in_quick_process)
    endless = TINY._replace(number=2, name="endless", run=run_for_ever)
    shown = []
    found = reproducing.reproduce_each(
        [endless, quick], Setting(2, 7, True), tmp_path, 2, lambda *given: shown.append(given)
    )
    experiment, outcome = next(found)
    record = outcome.record
    assert experiment == quick and record["reported"]["first"]["estimate"] == 7.25
    assert sum(share for one, share in shown if one == quick) == 1.5
    assert json.loads((tmp_path / "tiny.json").read_text())["seeds"] == [7, 8]
    found.close()
    assert not multiprocessing.active_children()


def test_a_process_that_dies_is_said(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(EXPERIMENTS, "other", EXPERIMENTS["other"]._replace(run=run_to_death))
    arguments = ("all", "--processes", 2, "--out", tmp_path / "found")
    assert reproduce(monkeypatch, *arguments) == 1
    assert (
        "a process died, perhaps for lack of memory: try --processes 1; " in capsys.readouterr().err
    )


def test_bands_leave_out_what_is_not_finite():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    figures.band(axes, [1, 2, 3], [[1.0, 2.0], [None, 1.0], [3.0, 5.0]], "line")
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 1.5], [3, 4]])


def test_names_and_numbers_choose_each_claim_once(tiny):
    chosen = reproducing.choose(["2", "tiny", "other", "2"])
    assert [one.name for one in chosen.experiments] == ["tiny", "other"]
    assert chosen.named == {"tiny", "other"}
    assert reproducing.choose(["all"]) == (list(EXPERIMENTS.values()), [], frozenset())
    assert Setting(3, 5).chosen.tolist() == [5, 6, 7]


def test_the_scale_of_weights_before_a_norm_changes_nothing_but_the_gradients_scale():
    errors = scale_invariance.identities(Setting(2))
    for of_seeds in errors:
        assert of_seeds.shape == (2,) and (of_seeds > 0).all() and (of_seeds < 1e-10).all()


def test_padded_batches_train_as_the_smaller_ones():
    digits = sweeps.load_digits(np.arange(1))
    part = sweeps.Part(digits.train.x[0], digits.train.y[0])
    model = nets.MLP((8,), norm=linen.BatchNorm)
    variables = model.init(jax.random.key(0), part.x[:1], train=False)
    rows = sweeps.draw_batches(np.arange(1), 1259, 3, 5)[0]
    padded = np.pad(rows, [(0, 0), (0, 4)], constant_values=-1)
    run = functools.partial(sweeps.train, model, optax.sgd(0.1), variables, part)
    expected, found = run(rows), run(padded, padded=True)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), found, expected)


def test_batches_of_an_epoch_hold_every_example_once():
    rows = sweeps.draw_batches(np.array([3, 4]), 20, 7, 6)
    assert rows.shape == (2, 7, 6)
    for of_seed in rows:
        for epoch in (of_seed[:3], of_seed[3:6]):
            assert len(set(epoch.ravel())) == 18 and set(epoch.ravel()) <= set(range(20))
    assert not np.array_equal(rows[0], rows[1])
    again = sweeps.draw_batches(np.array([4]), 20, 7, 6)
    np.testing.assert_array_equal(again[0], rows[1])


RATES = (0.1, 1.0, 10.0)
# [rates, seeds]: the second rate has the best mean, the first the best and the third the least bad
# seed; the first seed is best at the second rate, the second seed at the first.
VALIDATION = np.array([[0.2, 1.0], [0.95, 0.45], [0.5, 0.5]])


def test_one_rate_for_all_seeds_has_the_best_mean_on_the_validation_part():
    measured = {"test": 10 * VALIDATION, "curve": np.arange(24).reshape(3, 2, 4)}
    chosen = selection.RateSweep(RATES, VALIDATION, measured).best_for_all_seeds()
    assert chosen.rate == (1.0, False)
    np.testing.assert_array_equal(chosen.measured["test"], [9.5, 4.5])
    np.testing.assert_array_equal(chosen.measured["curve"], [[8, 9, 10, 11], [12, 13, 14, 15]])


def test_each_seed_and_arm_has_its_best_rate_on_the_validation_part():
    # A second arm, in the same program, that is best at the largest rate.
    validation = np.stack([VALIDATION, VALIDATION[::-1] / 2], -1)
    curves = np.arange(48).reshape(3, 2, 2, 4)
    swept = selection.RateSweep(RATES, validation, {"test": validation, "curve": curves})
    chosen = swept.best_for_each_seed()
    np.testing.assert_array_equal(chosen.rate.value, [[1.0, 1.0], [0.1, 10.0]])
    np.testing.assert_array_equal(chosen.rate.at_edge, [[False, False], [True, True]])
    np.testing.assert_array_equal(chosen.measured["test"], [[0.95, 0.475], [1.0, 0.5]])
    expected = [[curves[1, 0, 0], curves[1, 0, 1]], [curves[0, 1, 0], curves[2, 1, 1]]]
    np.testing.assert_array_equal(chosen.measured["curve"], expected)


def test_a_sweep_trains_at_every_rate_from_every_seed():
    trials = sweeps.draw_trials(Setting(2, 3), steps=20, batch_size=32)
    model = nets.MLP((8,), norm=nets.BATCH_NORM)
    swept = selection.sweep_accuracies(model, optax.sgd, (1e-6, 0.3), trials)
    assert swept.validation.shape == swept.measured.shape == (2, 2)
    assert swept.validation.dtype == swept.measured.dtype == np.float64
    assert (swept.validation[1] > swept.validation[0] + 0.3).all()
    trial = sweeps.take(trials, 1)
    trained = sweeps.train_trial(model, optax.sgd(0.3), trial)
    validation, test = (
        float(sweeps.accuracy(model, trained, part))
        for part in (trial.digits.validation, trial.digits.test)
    )
    assert abs(validation - test) > 0.02
    assert swept.validation[1, 1] == pytest.approx(validation, abs=0.01)
    assert swept.measured[1, 1] == pytest.approx(test, abs=0.01)


def test_points_show_means_and_intervals():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    runs = [[1.0, 2.0, 4.0], [3.0, 5.0, 5.0]]
    figures.points(axes, [0, 1], runs, "arm")
    figures.points(axes, [0, 1], runs, "across", horizontal=True)
    intervals = [statistics.mean_interval(values) for values in runs]
    upright, across = axes.containers
    for place, (line, interval) in enumerate(
        zip(upright[2][0].get_segments(), intervals, strict=True)
    ):
        np.testing.assert_allclose(line, [[place, interval.low], [place, interval.high]])
    for place, (line, interval) in enumerate(
        zip(across[2][0].get_segments(), intervals, strict=True)
    ):
        np.testing.assert_allclose(line, [[interval.low, place], [interval.high, place]])
    assert [container.get_label() for container in axes.containers] == ["arm", "across"]


def test_small_batches_hold_few_classes_and_padding():
    labels = np.arange(500)[None] % 10
    rows = small_batches.draw(np.array([0]), labels, 3)[0]
    for of_setting, batches in zip(rows, small_batches.SETTINGS, strict=True):
        for row in of_setting:
            kept = row[row >= 0]
            assert len(set(kept)) == len(kept) == batches.size
            assert len(set(labels[0, kept])) <= batches.classes


def test_a_stream_is_sorted_by_class_within_each_kind():
    corrupted = corruptions.Corrupted(np.zeros((1, 11, 128, 64)), np.arange(128)[None] % 10)
    images, labels = corruptions.in_sets(corrupted, 32, ordered=True)
    assert images.shape == (1, 44, 32, 64) and labels.shape == (1, 44, 32)
    assert (np.diff(labels[0, :4].ravel()) >= 0).all()


# The example of the documentation.
MINE = (Path(__file__).parents[2] / "docs/claims/my_claim.py").read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_claim_in_a_file(tiny, tmp_path, monkeypatch, capsys, processes):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    arguments = ("mine.py", "tiny", "--seeds", 8, "--processes", processes, "--out", "found")
    assert reproduce(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert "101 largest_value: 2 of 2 reproduced\n" in printed
    assert (tmp_path / "found/largest_value.png").exists()
    assert reproduce(monkeypatch, "--show", "mine.py", "--results", "found") == 0
    assert "m1b reproduced: of more values, none reaches sqrt(n - 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mine.py is no Python file"),
        ("\nimport nothing_like_it", "mine.py, line 2: ModuleNotFoundError: No module named"),
        ("x = 1", "mine.py defines no EXPERIMENT"),
        ("EXPERIMENT = 1", "mine.py: EXPERIMENT: it is of type int, expected Experiment"),
        ("x = 1\n(", "mine.py, line 2: SyntaxError: '(' was never closed; mend it"),
        ("import sys\nsys.exit()", "mine.py, line 2: SystemExit; mend it"),
    ],
)
def test_a_file_without_a_claim_is_said_in_one_line(
    tiny, tmp_path, monkeypatch, capsys, content, message
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    assert reproduce(monkeypatch, "mine.py") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bn-jax: error: NAME: {message}") and error.count("\n") == 1


def test_installed_packages_add_claims(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    metadata = tmp_path / "mine-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[bn_jax.claims]\nmine = mine:EXPERIMENT\n")
    program = (
        "from bn_jax.lab.experiments import EXPERIMENTS, extensions, reproducing\n"
        "assert list(extensions.known().claims) == [*EXPERIMENTS, 'largest_value']\n"
        "assert reproducing.choose(['all']).experiments[-1].number == 101\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[2])])
    subprocess.run(
        [sys.executable, "-c", program], check=True, env=os.environ | {"PYTHONPATH": path}
    )
