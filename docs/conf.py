"""How Sphinx builds the documentation: ``make docs`` writes it to build/docs/html."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

import library  # noqa: E402
import public_names  # noqa: E402

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
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "citation",
    "docstrings",
    "mathml",
    "public_names",
    "repository_links",
    "signatures",
]
exclude_patterns = ["_build", "extensions", "notebooks/*.py"]
templates_path = ["_templates"]
# Only dashes: docstrings name shapes, such as [N, ...], and quote text in plain prose.
smartquotes_action = "D"
# A link to nowhere is a warning. `public_names` says which types are text instead.
nitpicky = True
# What a run was started with is a file format of the lab.
nitpick_ignore = [("py:class", "bn_jax.lab.files.records.Started")]

# Pages with code cells are executed while the site is built; a cell that fails, fails the build.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build/docs/cache" / library.digest())
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_merge_streams = True
# `make notebooks` executes these, and they are committed with their outputs.
nb_execution_excludepatterns = ["notebooks/*"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# The pages that include a file of the repository.
repository_pages = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}

# Every name in the `__all__` of these modules must be in the reference.
public_modules = [
    "bn_jax",
    *(f"bn_jax.{name}" for name in ("convert", "linen", "nnx", "optim", "remat", "training")),
    "bn_jax.lab",
    *(
        f"bn_jax.lab.{name}"
        for name in ("checkpoints", "data", "experiments", "figures", "fitting", "images", "models")
    ),
    *(f"bn_jax.lab.{name}" for name in ("prediction", "processes", "runs", "trainer")),
]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autosummary_generate = True
autosummary_filename_map = public_names.file_names(public_modules)
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = True
napoleon_custom_sections = [
    (f"Attributes beyond those of {of}", "params_style") for of in ("Flax", "BatchNorm")
]
python_maximum_signature_line_length = 88

# Of an example with prompts, the button copies what was typed.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "bn_jax"
html_static_path = ["_static"]
html_css_files = ["bn_jax.css"]
html_context = {"default_mode": "auto"}
html_math_renderer = "mathml"
html_favicon = "_static/logo.svg"
html_theme_options = {
    "logo": {"image_light": "_static/logo.svg", "image_dark": "_static/logo.svg", "text": "bn_jax"},
    # The search field of the sidebar is enough.
    "navbar_persistent": [],
    "show_toc_level": 2,
    "use_fullscreen_button": False,
}
