"""Formulas as MathML, which browsers show without a script, a font or a network.

Sphinx's other ways load MathJax from another host, or need LaTeX to build. docutils brings the
converter; what it does not know is an error of the build.
"""

import re

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)

# What docutils has under another spelling: fractions of two digits without braces, brackets of a
# size but no side, dots, and equations below one another.
SPELLINGS = (
    (re.compile(r"\\([dt]?frac)(\d)(\d)"), r"\\\1{\2}{\3}"),
    (re.compile(r"\\([bB]igg?)(?![a-zA-Z])"), r"\\\1l"),
    (re.compile(r"\\dots(?![a-zA-Z])"), r"\\ldots"),
    (re.compile(r"\\(begin|end)\{align\*?\}"), r"\\\1{aligned}"),
)


def convert(node: nodes.math | nodes.math_block, *, as_block: bool) -> str:
    """Returns MathML for a formula, and warns of one that cannot be converted."""
    formula = node.astext()
    for spelling, known in SPELLINGS:
        formula = spelling.sub(known, formula)
    try:
        mathml: str = latex2mathml.tex2mathml(formula, as_block=as_block)
    except MathError as error:
        logger.warning("the formula %r: %s", node.astext(), error, location=node)
        return ""
    return mathml


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    """Writes a formula within a line."""
    self.body.append(convert(node, as_block=False))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Writes a formula of its own line, which scrolls if it is wider than the page."""
    self.body.append(self.starttag(node, "div", CLASS="math-block"))
    self.body.append(convert(node, as_block=True))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
