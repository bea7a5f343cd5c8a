"""The extensions of the documentation: what the reference must hold, and what it shows."""

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import SHIMS, is_public, modules_of_the_package

import bn_jax as bn

pytest.importorskip("sphinx")

import citation
import docstrings
import mathml
import public_names
import repository_links
import signatures
from docutils import nodes
from sphinx.pycode import ModuleAnalyzer
from sphinx.testing.util import SphinxTestApp

DOCS = Path(__file__).parents[2] / "docs"
# napoleon, of Sphinx 9.
pytestmark = pytest.mark.filterwarnings("ignore:The mapping interface for autodoc")

TOY = '''
"""A module."""

from typing import NamedTuple

import jax
from jax.typing import DTypeLike

__all__ = ["LIMIT", "Pair", "double"]

LIMIT = 3
"""The largest: 3."""


class Pair(NamedTuple):
    """Two arrays.

    Attributes:
        left: the first.
        right: the second.
    """

    left: jax.Array
    right: jax.Array


def double(x: jax.Array, LIMIT: int = LIMIT, dtype: DTypeLike | None = None) -> Pair:
    """Doubles, as `bn_jax.moments` does not; see `Pair`, and `LIMIT` of this call.

    Args:
        x: an array.
        dtype: of the result.
    """
'''
PAGE = ".. public-names:: toy\n"
CONFIG = {
    "extensions": [
        "sphinx.ext.autodoc",
        "sphinx.ext.napoleon",
        "public_names",
        "docstrings",
        "signatures",
    ],
    "autodoc_typehints": "description",
    "autodoc_typehints_description_target": "documented",
    "napoleon_attr_annotations": True,
    "nitpicky": True,
    "public_modules": ["toy"],
}


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds a site of one page about a module `toy`; returns its text and the warnings."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/conf.py").touch()
    ModuleAnalyzer.cache.clear()

    def build(module=TOY, page=PAGE):
        (tmp_path / "toy.py").write_text(module)
        (tmp_path / "source/index.rst").write_text(f"A page\n======\n\n{page}")
        app = SphinxTestApp("text", tmp_path / "source", confoverrides=CONFIG)
        try:
            app.build()
            warnings = re.sub(r"\x1b\[[\d;]*m", "", app.warning.getvalue())
            return (app.outdir / "index.txt").read_text(), warnings
        finally:
            app.cleanup()

    yield build
    sys.modules.pop("toy", None)


def test_a_complete_reference_has_no_warning(build):
    text, warnings = build(TOY.replace("`bn_jax.moments`", "nothing"))
    assert warnings == ""
    assert "toy.LIMIT" in text and "The largest: 3." in text
    assert "toy.double(x, LIMIT=3, dtype=None)" in text
    assert "**x** (*jax.Array*)" in text and "**dtype** (*DTypeLike** | **None*)" in text
    assert "left: jax.Array" in text


@pytest.mark.parametrize(
    ("missing", "warning"),
    [
        ('"""The largest: 3."""', "toy.LIMIT is public, and has no docstring"),
        (TOY[TOY.index('    """Two') : TOY.index("    left: jax")], "toy.Pair is public, and has"),
        (TOY[TOY.index('    """Doubles') :], "toy.double is public, and has no docstring"),
    ],
)
def test_a_name_without_a_docstring_is_a_warning(build, missing, warning):
    module = TOY.replace(missing, "    pass\n" if missing.endswith(TOY[-20:]) else "")
    assert warning in build(module)[1]


def test_a_name_without_an_entry_is_a_warning(build):
    warnings = build(page=".. automodule:: toy\n\n.. autofunction:: toy.double\n")[1]
    assert "toy.LIMIT is public, and not in the reference" in warnings
    assert "toy.Pair is public, and not in the reference" in warnings
    assert "toy.double is public" not in warnings


def test_pages_of_names_that_are_gone_are_removed(build, tmp_path):
    stubs = tmp_path / "source/reference/generated"
    stubs.mkdir(parents=True)
    for name in ("toy.double", "toy.halve"):
        (stubs / f"{name}.rst").write_text(":orphan:\n")
    build()
    assert [page.name for page in stubs.iterdir()] == ["toy.double.rst"]


def test_a_link_to_nothing_is_a_warning(build):
    warnings = build(TOY.replace("bn_jax.moments", "bn_jax.momentz"))[1]
    assert "reference target not found: bn_jax.momentz" in warnings


# --- what docstrings become ---------------------------------------------------------------------

NAMES = {"bn_jax.moments", "bn_jax.freeze", "bn_jax.linen.freeze", "bn_jax.audit"}


@pytest.mark.parametrize(
    ("text", "inside", "becomes"),
    [
        ("moments", "bn_jax.batch_norm", ":py:obj:`moments <bn_jax.moments>`"),
        ("moments()", "bn_jax.batch_norm", ":py:obj:`moments() <bn_jax.moments>`"),
        ("bn_jax.moments", "bn_jax.linen.X", ":py:obj:`bn_jax.moments <bn_jax.moments>`"),
        # The nearest of a name comes first, a parameter before all, and nothing links to itself.
        ("freeze", "bn_jax.linen.X", ":py:obj:`freeze <bn_jax.linen.freeze>`"),
        ("freeze", "bn_jax.fold", ":py:obj:`freeze <bn_jax.freeze>`"),
        ("audit", "bn_jax.fold", "``audit``"),
        ("moments", "bn_jax.moments", "``moments``"),
        ("jax.Array", "bn_jax.moments", "``jax.Array``"),
    ],
)
def test_names_in_backticks_become_links(text, inside, becomes):
    assert docstrings.link(text, inside, {"audit"}, NAMES, ["bn_jax"]) == becomes


def test_signatures_are_those_that_users_call():
    linen = signatures.signature_of(bn.linen.BatchNorm).parameters
    assert "frozen" in linen and not {"parent", "name"} & linen.keys()
    nnx = signatures.signature_of(bn.nnx.BatchNorm).parameters
    assert "num_features" in nnx and not {"self", "args", "kwargs"} & nnx.keys()
    assert repr(signatures.as_written(nnx["bias_init"].default)) == "zeros"


def test_types_are_named_as_users_import_them():
    found = signatures.signature_of(bn.moments)
    assert signatures.readable(found.return_annotation) == "bn_jax.Moments"
    assert signatures.readable(found.parameters["x"].annotation) == "jax.Array"
    activation = signatures.signature_of(bn.linen.BatchNorm).parameters["activation"]
    assert signatures.readable(activation.annotation) == "Callable[[jax.Array], jax.Array] | None"
    assert signatures.shorten("optax._src.base.X") == "optax.X"


def test_no_page_overwrites_another_where_case_is_ignored():
    files = public_names.file_names(["bn_jax"])
    assert files["bn_jax.Moments"] == "bn_jax.Moments-class" and "bn_jax.moments" not in files
    names = public_names.names_in(["bn_jax"])
    written = [files.get(name, name).lower() for name in names]
    assert len(set(written)) == len(names) >= 40


# --- the reference itself -----------------------------------------------------------------------


def test_what_two_modules_export_has_one_entry():
    names = public_names.names_in(["bn_jax", "bn_jax.remat"])
    assert "bn_jax.remat_policy" in names and "bn_jax.remat.remat_policy" not in names


def modules_of_the_reference():
    return runpy.run_path(str(DOCS / "conf.py"))["public_modules"]


def test_the_reference_holds_what_users_import():
    """Every public module of the library, and those of the lab that it names."""
    modules = modules_of_the_reference()
    library = {
        name
        for name in modules_of_the_package()
        if is_public(name) and name.count(".") <= 1 and name.split(".")[-1] not in SHIMS
    }
    assert set(modules) == library | {f"bn_jax.lab.{name}" for name in bn.lab.__all__}


# --- other extensions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "holds"),
    [
        (r"\tfrac12", "<mfrac"),
        (r"\frac{1}{2}", "<mfrac"),
        (r"\Big(x\big)", "<mo"),
        (r"1, \dots, n", "<mo"),
        (r"\begin{align*} a &= b \\ c &= d \end{align*}", "<mtable"),
    ],
)
def test_formulas_become_mathml(formula, holds):
    written = mathml.convert(nodes.math("", formula), as_block=False)
    assert written.startswith("<math") and holds in written


def test_an_unknown_formula_is_a_warning(monkeypatch):
    warnings = []
    monkeypatch.setattr(mathml.logger, "warning", lambda *args, **_: warnings.append(args))
    assert mathml.convert(nodes.math("", r"\nosuch"), as_block=False) == ""
    assert len(warnings) == 1 and r"\nosuch" in warnings[0][1]


def test_the_citation_is_that_of_the_repository():
    authors = [{"family-names": "Doe", "given-names": "Jane"}, {"name": "The team"}]
    about = {"title": "T", "authors": authors, "date-released": "2026-11-29", "version": "1.2"}
    bibtex = citation.as_bibtex({**about, "license": "MIT"})
    assert bibtex.startswith("@software{bn_jax2026,\n")
    assert "  author = {Doe, Jane and {The team}},\n" in bibtex
    assert "  version = {1.2},\n" in bibtex


def test_links_of_included_files_lead_to_pages():
    pages = {"CHANGELOG.md": "changelog.md"}
    app: Any = SimpleNamespace(srcdir=DOCS, config=SimpleNamespace(repository_pages=pages))
    text = "[a](CHANGELOG.md#b) [c](src/d.py) [e](https://f.g/h) ![i](j.png) [k](#l)"
    content = [text]
    repository_links.follow(app, Path("../CONTRIBUTING.md"), "contributing", content)
    assert content == ["[a](changelog.md#b) c [e](https://f.g/h) ![i](j.png) [k](#l)"]
    # What lies among the pages is no file of the repository's root.
    content = [text]
    repository_links.follow(app, Path("guides/part.md"), "guides/x", content)
    assert content == [text]
