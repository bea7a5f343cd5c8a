"""The directive ``citation``, which shows CITATION.cff as BibTeX and as a reference."""

from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

FILE = Path(__file__).parents[2] / "CITATION.cff"


def as_bibtex(citation: dict[str, Any]) -> str:
    """Returns the BibTeX entry of what a citation file describes."""
    authors = " and ".join(name_of(author) for author in citation["authors"])
    year = str(citation["date-released"])[:4]
    fields = {
        # Braces keep capitals, and the name of a group in one piece.
        "title": f"{{{citation['title']}}}",
        "author": authors,
        "year": year,
        "version": citation["version"],
        "license": citation["license"],
    }
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@software{{bn_jax{year},\n{lines}\n}}"


def name_of(author: dict[str, str]) -> str:
    """Returns the name of a person or of an entity."""
    if "name" in author:
        return f"{{{author['name']}}}"
    return f"{author['family-names']}, {author['given-names']}"


class Citation(SphinxDirective):
    """Shows CITATION.cff as BibTeX."""

    def run(self) -> list[nodes.Node]:
        """Returns a literal block, which gets a copy button."""
        self.env.note_dependency(str(FILE))
        bibtex = as_bibtex(yaml.safe_load(FILE.read_text()))
        return [nodes.literal_block(bibtex, bibtex, language="bibtex")]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Called by Sphinx."""
    app.add_directive("citation", Citation)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
