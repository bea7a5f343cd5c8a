"""A Sphinx extension that writes the pages of the claims before the site is built.

The pages, their pictures and the parts of ``claims/index.md`` come from the committed results,
``claims.json`` and ``claim_curves.json`` in ``benchmarks/results/``, and from ``statements.toml``
and ``sources.toml`` beside the index. Git ignores what is written. A file whose content stays the
same is left alone, so that Sphinx does not read it again.
"""

import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import claim_curves
import claim_pages
import claim_pictures

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.config import Config

DOCS = Path(__file__).parent.parent
RESULTS = DOCS.parent / "benchmarks/results/claims.json"
CURVES = RESULTS.with_name("claim_curves.json")
STATEMENTS = DOCS / "claims/statements.toml"
SOURCES = DOCS / "claims/sources.toml"
# Parts of the index, which are no pages.
PARTS = "claims/_*.md"


def read_figures() -> dict[str, Any]:
    """Returns the committed results of all claims."""
    figures: dict[str, Any] = json.loads(RESULTS.read_text())
    return figures


def read_curves() -> dict[str, Any]:
    """Returns the committed curves of all claims."""
    curves: dict[str, Any] = json.loads(CURVES.read_text())
    return curves


def read_statements() -> list[dict[str, Any]]:
    """Returns the statements of the source texts, with what checks each of them."""
    statements: list[dict[str, Any]] = tomllib.loads(STATEMENTS.read_text())["statement"]
    return statements


def read_sources() -> dict[str, list[str]]:
    """Returns the publications that claims name as their sources."""
    return tomllib.loads(SOURCES.read_text())


def write_pages(
    folder: Path,
    figures: Mapping[str, Any],
    statements: Sequence[Mapping[str, Any]],
    sources: Mapping[str, Sequence[str]],
    curves: Mapping[str, Any],
) -> None:
    """Writes a page and its pictures for every claim, and the parts of the index.

    Args:
        folder: the folder of the pages. What an earlier call wrote there, and is no claim any more,
            is removed.
        figures: the content of ``claims.json``.
        statements: the content of ``statements.toml``.
        sources: the content of ``sources.toml``.
        curves: the content of ``claim_curves.json``.
    """
    claims = figures["claims"]
    texts = {}
    for name, claim in claims.items():
        content = {"name": name, "claim": claim["claim"], "curves": curves[name]}
        path = folder / claim_pages.curves_file(name)
        draw_once(path, content, claim_curves.save_curves, *claim_curves.code_of(name))
        described = claim_curves.read_description(path)
        page = claim_pages.claim_page(name, figures, statements, sources, described)
        texts[f"{name}.md"] = page
    texts |= {
        "_overview.md": claim_pages.overview(figures),
        "_exceptions.md": claim_pages.exceptions(figures),
        "_forest.md": claim_pages.forest_figure(figures),
        "_statements.md": claim_pages.statements_index(claims, statements),
    }
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    code = Path(claim_pictures.__file__)
    for name, claim in claims.items():
        draw_once(folder / f"{name}.svg", claim, claim_pictures.save_claim, code)
    draw_once(folder / "forest.svg", list(claims.values()), claim_pictures.save_forest, code)
    for path in folder.glob("*.md"):
        if path.name not in texts and path.read_text().startswith(claim_pages.MADE):
            path.unlink()
            path.with_suffix(".svg").unlink(missing_ok=True)
            (folder / claim_pages.curves_file(path.stem)).unlink(missing_ok=True)


def draw_once(path: Path, content: Any, draw: Callable[[Any, Path], None], *code: Path) -> None:
    """Draws a picture, unless it is there and was drawn from the same content by the same code.

    Args:
        path: the path of the SVG file to write.
        content: what is drawn, as read from JSON.
        draw: draws it.
        *code: the files that define what `draw` draws.
    """
    parts = [*(file.read_bytes() for file in code), json.dumps(content).encode()]
    key = hashlib.sha256(b"".join(parts)).hexdigest()
    mark = f"<!-- {key} -->"
    if not path.exists() or not path.read_text().rstrip().endswith(mark):
        draw(content, path)
        with path.open("a") as file:
            file.write(f"{mark}\n")


def _write(app: "Sphinx") -> None:
    folder = Path(app.srcdir) / "claims"
    write_pages(folder, read_figures(), read_statements(), read_sources(), read_curves())


def _exclude(app: "Sphinx", config: "Config") -> None:
    config.exclude_patterns.append(PARTS)


def setup(app: "Sphinx") -> dict[str, Any]:
    """Adds the extension to Sphinx."""
    app.connect("config-inited", _exclude)
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
