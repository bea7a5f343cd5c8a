import json
import sys

import pytest

from benchmarks import claims, report


def record(number, seeds=(0, 1), curves=None):
    settings = {
        "a": {"verdict": "inconclusive", "measured": {"estimate": 1.0, "low": -2.0, "high": 4.0}},
        "b": {"verdict": "reproduced", "measured": {"estimate": None, "low": None, "high": None}},
    }
    part = {
        "key": f"{number}a",
        "statement": "it |grows|",
        "quantity": "size",
        "published": "2",
        "grade": "V",
        "bound": {"kind": "above", "text": "> 0"},
        "verdict": "inconclusive",
        "blocks": ["inconclusive", "reproduced"],
        "decisive": "a",
        "settings": settings,
    }
    other = part | {"key": f"{number}b", "verdict": "exact", "published": "", "decisive": "b"}
    return {
        "number": number,
        "name": "x",
        "claim": "A claim",
        "source": "Somebody",
        "sub_claims": [part, other],
        "seeds": list(seeds),
        "curves": curves or {},
        "versions": {},
        "platform": "cpu",
    }


def cells(table):
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_a_row_for_every_claim_and_every_sub_claim(tmp_path):
    for name, number in (("zebra", 1), ("ant", 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record(number)))
    found = claims.collect(tmp_path)
    assert list(found["claims"]) == ["zebra", "ant"] and found["seeds"] == [0, 1]
    assert not {"curves", "seeds", "versions"} & set(found["claims"]["ant"])
    counts, parts = claims.tables(json.loads(json.dumps(found)))
    assert [column.header for column in counts.columns][2:4] == ["exact", "inconclusive"]
    assert cells(counts)[1][:4] == ("2. A claim", "Somebody", "1", "1")
    first, second = cells(parts)[:2]
    assert first == (
        *("1a", "it \\|grows\\|", "size", "2 (V)", "> 0"),
        *("a: 1 (-2 to 4)", "inconclusive", "inconclusive, reproduced"),
    )
    assert second[3:7] == ("", "> 0", "b: not finite", "exact")


def test_claims_with_other_seeds_are_not_mixed(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(record(1)))
    (tmp_path / "two.json").write_text(json.dumps(record(2, seeds=(100, 101))))
    with pytest.raises(ValueError, match="different seeds"):
        claims.collect(tmp_path)


def test_curves_are_kept_with_every_seed_and_four_digits(tmp_path, monkeypatch, capsys):
    curves = {
        "rates": [0.1, 1e-7, 123456.0, -0.000123456, 400.0],
        "steps": [1, 123456],
        "of arms": {"a": [[0.123456, None]], "b": [[99999.5, True]]},
        "text": ["1.23456"],
    }
    results = tmp_path / "results"
    results.mkdir()
    for name, number, found in (("zebra", 1, curves), ("ant", 2, {"y": [2.0]})):
        (results / f"{name}.json").write_text(json.dumps(record(number, curves=found)))
    monkeypatch.setattr(report, "MEASURED", tmp_path / "measured")
    monkeypatch.setattr(sys, "argv", ["claims", str(results)])
    claims.main()
    path = tmp_path / "measured/claim_curves.json"
    known = json.loads(path.read_text())
    assert list(known) == ["zebra", "ant"] and known["ant"] == {"y": [2]}
    assert known["zebra"] == {
        "rates": [0.1, 1e-7, 123500.0, -0.0001235, 400],
        "steps": [1, 123456],
        "of arms": {"a": [[0.1235, None]], "b": [[100000.0, True]]},
        "text": ["1.23456"],
    }
    # As short as it can be, and a line for every claim.
    assert path.read_text().splitlines()[2] == '"ant": {"y":[2]}'
    written = json.loads((tmp_path / "measured/claims.json").read_text())
    assert list(written["claims"]) == ["zebra", "ant"]
    assert f"Written to {path}" in capsys.readouterr().out
