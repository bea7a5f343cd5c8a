"""Every example of a docstring and of the README runs, and what the README quotes is measured."""

import ast
import doctest
import inspect
import re
import typing
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import (
    SHIMS,
    assert_close,
    is_public,
    load_module,
    modules_of_the_package,
)

import bn_jax as bn
from benchmarks import report
from benchmarks.adversarial import UNGUARDED
from benchmarks.numerics import CONTESTANTS, OURS, cells, load
from bn_jax.lab import models

ROOT = Path(__file__).parent.parent
MODULES = modules_of_the_package()
# What users import; modules further down are implementation, which a package above them exports.
PUBLIC = [
    name
    for name in MODULES
    if is_public(name) and name.count(".") <= (2 if name.startswith("bn_jax.lab") else 1)
    if name.split(".")[-1] not in SHIMS or name.startswith("bn_jax.lab")
]

# --- docstrings ---------------------------------------------------------------------------------


def examples_written(path):
    """How many examples the docstrings of a file hold."""
    parser = doctest.DocTestParser()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return sum(
        len(parser.get_examples(ast.get_docstring(node) or ""))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, documented)
    )


WITH_EXAMPLES = [name for name in MODULES if ">>>" in MODULES[name].read_text()]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_every_docstring_example_runs(name):
    """Also one of a function that a decorator hides from `doctest`."""
    found = doctest.DocTestFinder().find(load_module(name))
    # A function compiled under a second name has its docstring twice.
    tests = {test.docstring: test for test in found}.values()
    runner = doctest.DocTestRunner()
    printed: list[str] = []
    for test in tests:
        runner.run(test, out=printed.append)
    outcome = runner.summarize(verbose=False)
    assert outcome.failed == 0, "".join(printed)
    assert outcome.attempted == examples_written(MODULES[name]) > 0


# --- what is exported ---------------------------------------------------------------------------


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_module_says_what_it_exports(module):
    module = load_module(module)
    assert module.__doc__
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        value = getattr(module, name)
        is_alias = typing.get_origin(value) is not None
        assert is_alias or inspect.getdoc(value) or not callable(value), name


def needs_example(module, name):
    """Functions and Flax modules are called; types and constants are looked up."""
    value = getattr(module, name)
    if typing.get_origin(value) is not None:
        return False
    if inspect.isclass(value):
        return issubclass(value, nn.Module | nnx.Module)
    return callable(value)


LIBRARY = [name for name in PUBLIC if not name.startswith("bn_jax.lab")]


@pytest.mark.parametrize("module", LIBRARY)
def test_every_public_function_has_an_example(module):
    module = load_module(module)
    assert [
        name
        for name in module.__all__
        if needs_example(module, name) and ">>> " not in getattr(module, name).__doc__
    ] == []


# --- the README ---------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def write_resnet50(path):
    """Kernels of zeros, and ones elsewhere, under the keys of torchvision."""
    like = jax.eval_shape(
        lambda: models.ResNet50(1000).init(jax.random.key(0), jnp.ones((1, 64, 64, 3)), train=False)
    )
    filled = jax.tree.map(lambda leaf: np.full(leaf.shape, leaf.ndim == 1, np.float32), like)
    names = bn.convert.resnet_names
    bn.convert.save_safetensors(path, bn.convert.to_library(filled, "pytorch", names=names))


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_examples_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(SNIPPETS) == README.count("```python")
    assert jax.device_count() == 4
    scope: dict[str, Any] = {"__name__": "readme"}
    exec(compile(SNIPPETS[number], "README.md", "exec"), scope)
    y = scope["y"].reshape(-1, scope["y"].shape[-1])
    assert jnp.isfinite(y).all()
    if "updates" in scope and "layer" in scope:
        # Synchronized: normalized by the statistics of the whole batch.
        assert_close(y.mean(0), jnp.zeros(3), tolerance=1e-5)
        assert_close(y.var(0), jnp.ones(3), tolerance=1e-4)


def test_the_guide_converts_a_resnet(tmp_path, monkeypatch):
    """The site cannot run this code, for it has no such file."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/guides/from_pytorch.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    write_resnet50("resnet50.safetensors")
    scope: dict[str, Any] = {"__name__": "guide"}
    exec(compile(snippet, "from_pytorch.md", "exec"), scope)
    assert scope["y"].shape == (1, 1000) and jnp.isfinite(scope["y"]).all()
    assert all((scope["back"][key] == array).all() for key, array in scope["arrays"].items())


def test_readme_quotes_the_measured_figures():
    measured = load(report.read("numerics"))
    table = README.split("The largest error of the output")[1].split("\n\n[")[0]
    header, _, *quoted = re.findall(r"^\| (.*) \|$", table, re.MULTILINE)
    assert header.split(" | ") == ["input", *CONTESTANTS]
    assert len(quoted) >= 5
    for line in quoted:
        case, *shown = line.split(" | ")
        assert shown == [cell.replace("|", "\\|") for cell in cells(measured[case])]
    assert [name for name, row in measured.items() if not row[OURS].within_bound()] == [UNGUARDED]


def test_the_readme_counts_the_claims():
    (number,) = re.findall(r"\[(\d+) of them\]\(docs/claims/index.md\)", README)
    assert int(number) == len(report.read("claims")["claims"])


def test_the_readme_links_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 20 and [link for link in links if not (ROOT / link).is_file()] == []
