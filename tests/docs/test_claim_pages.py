"""The pages of the claims hold what the committed results hold, and nothing else."""

import copy
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import claim_curves
import claim_pages
import claim_pictures
import claims
import pytest

from bn_jax.lab.experiments import EXPERIMENTS, writing

ROOT = Path(__file__).parents[2]
FIGURES = claims.read_figures()
STATEMENTS = claims.read_statements()
SOURCES = claims.read_sources()
CURVES = claims.read_curves()
# What the picture of the curves shows, in place of the drawn one.
SEEN = 'Curves of "it"'
# One claim of a few sub-claims: identities, equivalences, sides, and several settings.
SMALL = "scale_invariance"
TWO = {**FIGURES, "claims": {name: FIGURES["claims"][name] for name in (SMALL, "decoupling")}}
ONE = [{"subject": "Scale", "who": "nobody", "says": "it is free", "sub_claims": ["1a"]}]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of pages, and how often a picture was drawn."""
    drawn = []

    def draw(content, path):
        drawn.append(path.name)
        path.write_text("<svg/>\n")

    monkeypatch.setattr(claim_pictures, "save_claim", draw)
    monkeypatch.setattr(claim_pictures, "save_forest", draw)
    monkeypatch.setattr(claim_curves, "save_curves", draw)
    (tmp_path / "index.md").write_text("# By hand\n")
    return tmp_path, drawn


def test_the_committed_results_are_those_of_the_experiments():
    """What is said and what decides; where a bound is written with fewer digits is no matter."""
    assert list(FIGURES["claims"]) == list(EXPERIMENTS)
    for name, experiment in EXPERIMENTS.items():
        assert experiment.run.__module__ == f"bn_jax.lab.experiments.{name}"
        now = json.loads(json.dumps(writing.without_results(experiment)))
        known = FIGURES["claims"][name]
        for text in ("number", "claim", "source", "protocol", "limits", "easy", "hard"):
            assert known[text] == now[text], (name, text)
        for before, after in zip(known["sub_claims"], now["sub_claims"], strict=True):
            for text in ("key", "statement", "quantity", "published", "grade", "reason", "scale"):
                assert before[text] == after[text], (before["key"], text)
            bounds = [{**one["bound"], "text": ""} for one in (before, after)]
            assert bounds[0] == bounds[1], before["key"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_page_has_every_sub_claim_with_its_figures(name):
    claim = FIGURES["claims"][name]
    page = claim_pages.claim_page(name, FIGURES, STATEMENTS, SOURCES, SEEN)
    assert page.startswith(claim_pages.MADE)
    for text in (claim["claim"], claim["source"], claim["limits"], claim["easy"], claim["hard"]):
        assert claim_pages.escape(text)[1:] in page
    for one in claim["sub_claims"]:
        details = page.split(f"({claim_pages.label(one['key'])})=")[1].split("\n## ")[0]
        details = details.split("\n(sub-claim")[0]
        assert claim_pages.escape(one["quantity"]) in details
        assert f"`{one['verdict']}`" in details
        rows = re.findall(r"^\| .* \|$", details, re.MULTILINE)[2:]
        assert len(rows) == len(one["settings"])
        for setting, found in one["settings"].items():
            estimate = f"{found['measured']['estimate']:.3g}"
            start = f"| {claim_pages.escape(setting)} | " if setting else "| "
            (row,) = [row for row in rows if row.startswith(f"{start}{estimate}")]
            assert f"| {found['verdict']} |" in row
            assert found["seeds_needed"] in row
    (row,) = re.findall(r"^\| \[.*\| 16 \|$", page.split("## Pictures")[0], re.MULTILINE)[:1]
    assert row.count("|") == 8


def test_what_markdown_would_read_is_escaped():
    assert claim_pages.escape("|w|^4 of `a_b` at E[x_1] < 2") == (
        r"\|w\|^4 of `a_b` at E\[x\_1\] \< 2"
    )


def test_what_is_not_reproduced_or_open_is_said_first():
    page = claim_pages.claim_page("hessian", FIGURES, STATEMENTS, SOURCES, SEEN)
    first = page.split("| sub-claim |")[0]
    assert "Not reproduced here\n" in first and "[16b](#sub-claim-16b)" in first
    assert "Not decided by these seeds" in first and "[16c](#sub-claim-16c)" in first
    assert "[16a]" not in first and "contradict each other" not in first
    figures = copy.deepcopy(TWO)
    figures["claims"][SMALL]["sub_claims"][0]["agree"] = False
    page = claim_pages.claim_page(SMALL, figures, STATEMENTS, SOURCES, SEEN)
    assert "The blocks of seeds contradict each other" in page.split("| sub-claim |")[0]
    assert "contradict each other in 1a." in claim_pages.overview(figures)


def test_rates_at_the_edge_of_the_grid_are_told():
    figures = copy.deepcopy(TWO)
    rates = figures["claims"][SMALL]["rates"]
    rates["an arm"] = {"value": [1.0, 2.0, 8.0], "at_edge": [True, True, False]}
    page = claim_pages.claim_page(SMALL, figures, STATEMENTS, SOURCES, SEEN)
    assert "| an arm | 2 (1 to 8) | 67 % |" in page
    assert "A wider grid might hold a better rate for: an arm." in page


def test_nothing_measured_has_a_page_and_a_picture(tmp_path):
    figures = copy.deepcopy(TWO)
    nothing = dict.fromkeys(("estimate", "low", "high"))
    for setting in figures["claims"][SMALL]["sub_claims"][0]["settings"].values():
        setting |= {"measured": nothing, "verdict": "no measurement"}
    figures["claims"][SMALL]["sub_claims"][0]["verdict"] = "no measurement"
    page = claim_pages.claim_page(SMALL, figures, STATEMENTS, SOURCES, SEEN)
    assert "| {bdg-dark}`no measurement` | 0 to 1e-10 | nothing |" in page
    claim_pictures.save_claim(figures["claims"][SMALL], tmp_path / "claim.svg")
    assert "no measurement" in (tmp_path / "claim.svg").read_text()


def test_a_picture_has_a_panel_for_every_sub_claim_and_is_the_same_every_time(tmp_path):
    claim = FIGURES["claims"][SMALL]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        claim_pictures.save_claim(claim, tmp_path / name / "claim.svg")
    first, second = ((tmp_path / name / "claim.svg").read_text() for name in ("one", "two"))
    assert first == second
    ids = [node.get("id") or "" for node in ElementTree.fromstring(first).iter()]
    assert sum(name.startswith("axes_") for name in ids) == len(claim["sub_claims"])
    described = claim_pictures.describe(claim)
    assert all(f"{one['key']}, {one['label']}: " in described for one in claim["sub_claims"])


def test_settings_with_numbers_are_in_their_order():
    settings: dict[str, dict] = {name: {} for name in ("m = 16", "m = 2", "net, 0.5", "m = 4")}
    order = [name for name, _ in claim_pictures.settings_of({"settings": settings})]
    assert order == ["m = 2", "m = 4", "m = 16", "net, 0.5"]


def test_pages_are_written_where_they_changed_and_removed_with_their_claim(site):
    folder, drawn = site
    claims.write_pages(folder, TWO, ONE, SOURCES, CURVES)
    pages = {"scale_invariance.md", "decoupling.md"}
    parts = {"_overview.md", "_exceptions.md", "_forest.md", "_statements.md"}
    assert {path.name for path in folder.glob("*.md")} == {"index.md", *pages, *parts}
    assert sorted(drawn) == [
        *("decoupling.svg", "decoupling_curves.svg", "forest.svg"),
        *("scale_invariance.svg", "scale_invariance_curves.svg"),
    ]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    claims.write_pages(folder, TWO, ONE, SOURCES, CURVES)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    one = {**TWO, "claims": {SMALL: TWO["claims"][SMALL] | {"easy": "Nothing"}}}
    claims.write_pages(folder, one, [], {}, CURVES)
    assert not (folder / "decoupling.md").exists() and not (folder / "decoupling.svg").exists()
    assert "Nothing." in (folder / "scale_invariance.md").read_text()
    assert not (folder / "decoupling_curves.svg").exists()
    assert drawn[5:] == ["scale_invariance.svg", "forest.svg"]
    assert (folder / "index.md").read_text() == "# By hand\n"


def test_the_overview_counts_every_verdict():
    text = claim_pages.overview(FIGURES)
    ones = [one for claim in FIGURES["claims"].values() for one in claim["sub_claims"]]
    for verdict in {one["verdict"] for one in ones}:
        count = sum(one["verdict"] == verdict for one in ones)
        assert f"`{count} {verdict}`" in text.splitlines()[2]
    assert all(f"]({name}.md)" in text and f" <{name}>\n" in text for name in EXPERIMENTS)


def test_the_index_includes_every_part():
    index = (ROOT / "docs/claims/index.md").read_text()
    parts = re.findall(r"\{include\} (\w+\.md)", index)
    assert parts == ["_overview.md", "_exceptions.md", "_forest.md", "_statements.md"]


# What a claim says of sources that are no publication.
NO_PUBLICATION = re.compile(r"(lectures|tutorials|proposed in)\b", re.IGNORECASE)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_source_of_a_claim_is_a_publication(name):
    claim = FIGURES["claims"][name]
    for part in claim["source"].split(";"):
        one = {"source": part.strip()}
        is_known = bool(claim_pages.cited(one, SOURCES))
        assert is_known != bool(NO_PUBLICATION.match(part.strip())), part
    section = claim_pages.claim_page(name, FIGURES, STATEMENTS, SOURCES, SEEN).split(
        "## Sources\n"
    )[1]
    listed = section.split("\n## ")[0].strip().splitlines()
    assert listed == [f"- {claim_pages.escape(one)}" for one in claim_pages.cited(claim, SOURCES)]


def test_every_publication_is_a_source_of_a_claim():
    made = [claim_pages.cited(claim, SOURCES) for claim in FIGURES["claims"].values()]
    known = {one for publications in SOURCES.values() for one in publications}
    assert {one for publications in made for one in publications} == known
