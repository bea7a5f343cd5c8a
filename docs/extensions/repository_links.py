"""Links of the repository's own pages, CHANGELOG.md and CONTRIBUTING.md, where docs include them.

There, a link to another file of the repository leads to the page that includes this file.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

# [text](path), without a scheme, an anchor of the page itself, or a picture.
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def follow(app: Sphinx, path: Path, document: str, content: list[str]) -> None:
    """Replaces links in what is included; a file without a page becomes plain text."""
    if (Path(app.srcdir) / path).resolve().parent == Path(app.srcdir).parent:
        pages: dict[str, str] = app.config.repository_pages
        content[0] = LINK.sub(
            lambda link: (
                f"[{link[1]}]({pages[link[2]]}{link[3] or ''})" if link[2] in pages else link[1]
            ),
            content[0],
        )


def setup(app: Sphinx) -> ExtensionMetadata:
    """Called by Sphinx."""
    app.add_config_value("repository_pages", {}, "env", dict)
    app.connect("include-read", follow)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
