"""Every statement of the source texts is checked by something that exists."""

import ast
import json
import tomllib
from functools import cache
from pathlib import Path

import pytest

from bn_jax.lab.experiments import EXPERIMENTS

ROOT = Path(__file__).parents[2]
STATEMENTS = tomllib.loads((ROOT / "docs/claims/statements.toml").read_text())["statement"]
KEYS = {
    one.key: experiment.number
    for experiment in EXPERIMENTS.values()
    for one in experiment.sub_claims
}
FIELDS = {"subject", "who", "says", "sub_claims", "notebooks", "tests"}


@cache
def headings(notebook):
    cells = json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("#")]
    return {line.lstrip("#").strip() for line in lines}


@cache
def functions_of(path):
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda one: one["says"][:40])
def test_a_statement_has_checks_which_exist(statement):
    assert set(statement) <= FIELDS
    assert all(statement[name].strip() for name in ("subject", "who", "says"))
    keys = statement.get("sub_claims", [])
    notebooks, tests = statement.get("notebooks", []), statement.get("tests", [])
    assert keys or notebooks or tests
    assert [key for key in keys if key not in KEYS] == []
    for place in notebooks:
        name, heading = place.split("#")
        assert heading in headings(name), place
    for place in tests:
        path, name = place.split("::")
        assert path.startswith("tests/") and name.startswith("test_")
        assert name in functions_of(path), place


def test_nothing_is_said_twice():
    said = [one["says"] for one in STATEMENTS]
    assert len(said) == len(set(said)) > 40
    for one in STATEMENTS:
        for name in ("sub_claims", "notebooks", "tests"):
            places = one.get(name, [])
            assert len(places) == len(set(places)), one["says"]


def test_every_sub_claim_is_named_by_a_statement():
    named = {key for one in STATEMENTS for key in one["sub_claims"]}
    assert sorted(set(KEYS) - named) == []
    assert {KEYS[key] for key in named} == {one.number for one in EXPERIMENTS.values()}
