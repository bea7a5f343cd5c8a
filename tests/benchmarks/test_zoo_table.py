"""The committed table of the zoo has every model and check, and nothing that is not expected."""

import pytest

from benchmarks import report
from benchmarks.zoo.checks import CHECKS
from benchmarks.zoo.expected import ABSENT, FAULTS, FINDINGS, LEFT
from benchmarks.zoo.measuring import MODELS
from benchmarks.zoo.table import COLUMNS, expected_exception, load, tables

COMMITTED = load(report.read("zoo"))


def test_every_model_has_every_check():
    assert [*COMMITTED] == [*MODELS]
    assert [*COLUMNS] == [*CHECKS]
    assert all([*row.cells] == [*CHECKS] for row in COMMITTED.values())
    assert len(MODELS) >= 12
    assert len({row.package for row in COMMITTED.values()}) >= 7


@pytest.mark.parametrize("name", MODELS)
def test_what_does_not_pass_is_expected(name):
    library = MODELS[name].library
    for check, cell in COMMITTED[name].cells.items():
        expected = expected_exception(check, name, library)
        assert (cell.status, cell if expected else None) == (
            ("pass", None) if expected is None else (expected.status, expected)
        )


def test_every_exception_is_of_a_model():
    names = {*MODELS} | {entry.library for entry in MODELS.values()}
    for table in (ABSENT, FAULTS):
        assert set(table) <= set(CHECKS)
        assert {name for of_check in table.values() for name in of_check} <= names
    assert {*LEFT, *FINDINGS} <= set(MODELS)


def test_the_table_explains_what_does_not_pass():
    (table,) = tables(report.read("zoo"))
    reasons = {
        c.text for row in COMMITTED.values() for c in row.cells.values() if c.status != "pass"
    }
    assert all(f" {reason}" in str(table.caption) for reason in reasons)
    assert table.row_count == len(MODELS)
