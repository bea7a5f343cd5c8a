"""How Sphinx builds the documentation: ``make docs`` writes it to build/docs/html."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "bn_jax"
author = "the bn_jax authors"
copyright = f"2026, {author}"
release = version_of("bn-jax")
version = ".".join(release.split(".")[:2])

extensions = [
    "claims",
    "performance",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "notebooks/*.py"]
nitpicky = True

# Pages with code cells are executed while the site is built; a cell that fails, fails the build.
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent.parent / "build/docs/cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_merge_streams = True
# `make notebooks` executes these, and they are committed with their outputs.
nb_execution_excludepatterns = ["notebooks/*"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autosummary_generate = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "sphinx_book_theme"
html_title = "bn_jax"
html_static_path = ["_static"]
html_theme_options = {"show_toc_level": 2}
