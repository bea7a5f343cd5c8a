import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close

import bn_jax as bn
from benchmarks.numerics import CONTESTANTS, OURS, cells, load
from bn_jax.lab import models

ROOT = Path(__file__).parent.parent
FLOORS = {
    "_compat": 0,
    "_paths": 0,
    "_tables": 0,
    "_core": 1,
    "linen": 2,
    "nnx": 2,
    "_program": 3,
    "_recalibrate": 3,
    "_fold": 3,
    "_audit": 3,
    "convert": 3,
    "optim": 3,
    "remat": 3,
    "training": 5,
    "lab": 5,
}
OPTIONAL = ("matplotlib", "sklearn", "typer", "orbax", "rich", "safetensors", "flatbuffers")

# Flax itself imports rich, so what must not be importable is all that Flax, optax, chex and JAX do
# not need: they are imported first, then every import of anything else fails.
IMPORT_ALONE = f"""
import sys
import chex, flax.linen, flax.nnx, jax, optax

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ImportError(name)

before = set(sys.modules)
for name in list(sys.modules):
    if name.split(".")[0] in {OPTIONAL!r}:
        del sys.modules[name]
sys.meta_path.insert(0, Refuse())
import bn_jax
bn_jax.linen.BatchNorm, bn_jax.nnx.BatchNorm, bn_jax.batch_norm
print(sorted({{name.split(".")[0] for name in set(sys.modules) - before}} - {{"jax"}}))
"""


def test_import_needs_nothing_optional():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['bn_jax']"


def imported_by(path):
    """The rooms of bn_jax and the top-level packages that a file imports anywhere."""
    rooms, packages = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, *rest = name.split(".")
            if top == "bn_jax" and rest:
                rooms.add(rest[0])
            elif top not in sys.stdlib_module_names and top != "bn_jax":
                packages.add(top)
    return rooms, packages


def files_of(room):
    """The file of a room, or those of a folder."""
    folder = ROOT / "bn_jax" / room
    return sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_every_room_has_a_floor():
    rooms = {path.stem for path in (ROOT / "bn_jax").glob("*.py")} - {"__init__"}
    rooms |= {path.parent.name for path in (ROOT / "bn_jax").glob("*/*.py")}
    assert rooms == set(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_floors_import_downward(room):
    for path in files_of(room):
        rooms, packages = imported_by(path)
        for other in rooms & set(FLOORS):
            assert FLOORS[other] <= FLOORS[room], f"{path.name} imports {other}"
        if FLOORS[room] <= 1:
            assert packages <= {"jax", "chex"}
        assert "jax._src" not in path.read_text()


def test_the_public_surface_is_named_and_documented():
    for name in bn.__all__:
        assert getattr(bn, name).__doc__, name
    source = ast.parse((ROOT / "bn_jax" / "__init__.py").read_text())
    defined = [node for node in source.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert defined == []


@pytest.mark.parametrize("room", FLOORS)
def test_docstring_examples(room):
    module = importlib.import_module(f"bn_jax.{room}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", [name for name in bn.__all__ if name.islower()])
def test_public_functions_have_examples(name):
    documented = getattr(bn, name)
    documented = getattr(documented, "BatchNorm", documented)
    assert ">>> " in documented.__doc__


README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def write_resnet50(path):
    """Zeros under the keys of torchvision."""
    like = jax.eval_shape(
        lambda: models.ResNet50(1000).init(jax.random.key(0), jnp.ones((1, 64, 64, 3)), train=False)
    )
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)
    names = bn.convert.resnet_names
    bn.convert.save_safetensors(path, bn.convert.to_library(zeros, "pytorch", names=names))


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_examples_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "resnet50.safetensors" in SNIPPETS[number]:
        write_resnet50("resnet50.safetensors")
    assert len(SNIPPETS) == README.count("```python")
    assert jax.device_count() == 4
    scope = {"__name__": "readme"}
    exec(compile(SNIPPETS[number], "README.md", "exec"), scope)
    y = scope["y"].reshape(-1, scope["y"].shape[-1])
    assert jnp.isfinite(y).all()
    if "updates" in scope and "layer" in scope:
        # Synchronized: normalized by the statistics of the whole batch.
        assert_close(y.mean(0), jnp.zeros(3), tolerance=1e-5)
        assert_close(y.var(0), jnp.ones(3), tolerance=1e-4)


def test_readme_quotes_the_measured_figures():
    measured = load()
    section = README.split("## Numerical accuracy")[1].split("\n## ")[0]
    header, _, *quoted = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    assert header.split(" | ") == ["input", *CONTESTANTS]
    assert len(quoted) >= 10
    for line in quoted:
        case, *shown = line.split(" | ")
        assert shown == [cell.replace("|", "\\|") for cell in cells(measured[case])]
    assert all(row[OURS].within_bound() for row in measured.values())
    assert f"in all of its {len(measured)} inputs" in section
