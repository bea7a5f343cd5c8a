"""A benchmark replaces committed figures only with `--refresh`."""

import ast
import importlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import claims, layer, numerics, report

FOLDER = Path(report.__file__).parent
# The program of each benchmark: a file, or that of a folder.
FILES = [*FOLDER.glob("*.py"), *FOLDER.glob("*/__main__.py")]
PROGRAMS = {
    path.parent.name if path.stem == "__main__" else path.stem: path
    for path in FILES
    if "report.finish(" in path.read_text()
}
BENCHMARKS = sorted(PROGRAMS)
# They print or write nothing by themselves, or write pages.
OTHERS = {"__init__", "adversarial", "compilers", "document", "hlo", "losses", "report", "timing"}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Committed figures of which a test may lose some, and the folder for all other runs."""
    committed, measured = tmp_path / "results", tmp_path / "build" / "benchmarks"
    committed.mkdir()
    for path in report.RESULTS.glob("*.json"):
        (committed / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(report, "RESULTS", committed)
    monkeypatch.setattr(report, "MEASURED", measured)
    return committed, measured


@pytest.fixture
def small(monkeypatch):
    """Makes the whole benchmark `layer` small and leaves some libraries out."""
    sizes = (["RMSNorm"], ["float32"], [(4, 3)], ["haiku"])
    monkeypatch.setattr(layer, "measure", partial(layer.measure, *sizes, rounds=2))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(monkeypatch, benchmark, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{benchmark.__name__}.py", *arguments])
    benchmark.main()


def test_a_run_leaves_the_committed_figures_alone(folders, small, monkeypatch, capsys):
    committed, measured = folders
    before = contents(committed)
    run(monkeypatch, layer)
    assert contents(committed) == before
    assert [*contents(measured)] == ["layer.json"]
    found = json.loads((measured / "layer.json").read_text())
    assert [*found["norms"]] == ["RMSNorm"]
    assert found["command"] == "python -m benchmarks.layer"
    out = capsys.readouterr().out
    assert f"Written to {measured / 'layer.json'}" in out
    assert "RMSNorm" in out


def test_a_refresh_replaces_the_figures_of_its_benchmark(folders, small, monkeypatch, capsys):
    committed, measured = folders
    before = contents(committed)
    run(monkeypatch, layer, "--refresh")
    after = contents(committed)
    assert {name for name in after if after[name] != before[name]} == {"layer.json"}
    assert [*report.read("layer")["norms"]] == ["RMSNorm"]
    assert not measured.exists()
    assert f"Written to {committed / 'layer.json'}" in capsys.readouterr().out


def test_numbers_that_json_does_not_have_are_read_again(folders, monkeypatch):
    _, measured = folders
    rows = {"a case": {numerics.OURS: numerics.Errors(float("inf"), None, 0.5)}}
    monkeypatch.setattr(numerics, "measure_all", lambda: rows)
    run(monkeypatch, numerics)
    assert numerics.load(json.loads((measured / "numerics.json").read_text())) == rows


def test_what_another_run_compiled_is_known(folders):
    committed, measured = folders
    assert report.read_all("scale") == [report.read("scale")]
    report.finish("scale", measured, (), {"program": "a hash"}, lambda known: [])
    assert [one.get("program") for one in report.read_all("scale")] == [None, "a hash"]
    for path in (committed / "scale.json", measured / "scale.json"):
        path.unlink()
    assert report.read_all("scale") == []


def test_every_benchmark_writes_by_the_one_mechanism():
    assert {path.stem for path in FILES} - {"__main__"} == {*BENCHMARKS, *OTHERS} - {"zoo"}
    assert {path.parent.name for path in FILES} == {FOLDER.name, "zoo"}
    assert {path.stem for path in report.RESULTS.glob("*.json")} <= {*BENCHMARKS, claims.CURVES}
    for name in BENCHMARKS:
        tree = ast.parse(PROGRAMS[name].read_text())
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert names.isdisjoint({"RESULTS", "write_text", "write_bytes", "open", "dump"}), name
        assert {"parser", "finish"} <= names, name


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_option_is_explained_before_anything_is_measured(name, monkeypatch, capsys):
    module = ".".join(PROGRAMS[name].relative_to(FOLDER.parent).with_suffix("").parts)
    benchmark = importlib.import_module(module)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, benchmark, "--help")
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert shown.startswith(f"usage: python -m benchmarks.{name} ")
    assert "--refresh" in shown and (benchmark.__doc__ or "").splitlines()[0] in shown
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, benchmark, "--commit")
    assert ended.value.code == 2


def test_git_ignores_what_is_not_committed():
    repository = FOLDER.parent
    ignored = (repository / ".gitignore").read_text().splitlines()
    assert "build/" in ignored and repository / "build" in report.MEASURED.parents
    assert report.RESULTS == FOLDER / "results"
