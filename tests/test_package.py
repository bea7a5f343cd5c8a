"""The tree of DESIGN.md: layers, names, sizes, and what an import loads."""

import ast
import subprocess
import sys

import pytest
from support import (
    PACKAGE,
    SHIMS,
    is_public,
    load_module,
    modules_of_the_package,
)
from tiers import EVERY

import bn_jax as bn

ROOT = PACKAGE.parent
MODULES = modules_of_the_package()

# From the bottom to the top: a room, which is a file or folder of the package, imports rooms of
# lower layers and itself.
LAYERS = [
    {"_compat", "_moved", "_paths", "_pictures", "_tables", "_transfers"},
    {"_core"},
    {"_modules"},
    {"linen", "nnx"},
    {"_program", "_fold", "_audit", "_recalibrate", "_export", "convert", "optim", "remat"},
    {"training"},
    # What `import bn_jax` gives, and with it whoever imports that.
    {"bn_jax"},
    {"lab"},
    {*SHIMS},
]
LAYER_OF = {room: number for number, layer in enumerate(LAYERS) for room in layer}
# Here rooms may also import one another, as long as none comes back to itself.
TOOLS = LAYERS[LAYER_OF["_program"]]


def room_of(name):
    """`_core` for `bn_jax._core.moments`; `bn_jax` for the package itself."""
    return name.split(".")[1] if "." in name else name


def imports_of(path):
    """The full names of what a file imports, anywhere in it but for the type checker alone."""
    names: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported_by(path):
    """The rooms of the package that a file imports; a name that is no room is of the surface."""
    ours = [name for name in imports_of(path) if name.split(".")[0] == "bn_jax"]
    rooms = {room_of(name) for name in ours}
    return {room if room in LAYER_OF else "bn_jax" for room in rooms}


# --- layers -------------------------------------------------------------------------------------


def test_every_room_has_a_layer():
    rooms = {room_of(name) for name in MODULES}
    assert rooms <= set(LAYER_OF)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downwards(name):
    room = room_of(name)
    for other in rooms_imported_by(MODULES[name]) - {room}:
        if not {room, other} <= TOOLS:
            assert LAYER_OF[other] < LAYER_OF[room], f"{name} imports {other}"


def test_no_tool_comes_back_to_itself():
    imported: dict[str, set[str]] = {room: set() for room in TOOLS}
    for name, path in MODULES.items():
        if room_of(name) in TOOLS:
            imported[room_of(name)] |= rooms_imported_by(path) & TOOLS - {room_of(name)}
    while imported:
        free = {room for room, others in imported.items() if not others & set(imported)}
        assert free, f"a cycle among {imported}"
        imported = {room: others for room, others in imported.items() if room not in free}


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) == "_core"])
def test_the_core_imports_jax_alone(name):
    for imported in imports_of(MODULES[name]):
        top = imported.split(".")[0]
        allowed = top == "jax" or top in sys.stdlib_module_names
        assert allowed or room_of(imported) in ("_core", "_compat"), f"{name} imports {imported}"


def test_nothing_private_of_jax_is_imported():
    private = ".".join(["jax", "_src"])
    files = [path for folder in ("bn_jax", "benchmarks", "tests") for path in
             (ROOT / folder).rglob("*.py")]  # fmt: skip
    assert len(files) > len(MODULES)
    assert [str(path) for path in files if private in path.read_text()] == []


# --- names and sizes ----------------------------------------------------------------------------


def test_the_surface_is_named_and_documented():
    for name in bn.__all__:
        assert getattr(bn, name).__doc__, name
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    classes = [node for node in source.body if isinstance(node, ast.ClassDef)]
    assert classes == []


@pytest.mark.parametrize("name", MODULES)
def test_the_path_of_a_module_leads_to_it(name):
    """So that `import bn_jax.x as m` and `help(bn_jax.x)` mean the module."""
    module = load_module(name)
    found = bn
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    assert found is module


def test_no_public_module_has_the_name_of_a_public_function():
    exported = {
        name
        for module in filter(is_public, MODULES)
        for name in getattr(load_module(module), "__all__", ())
        if callable(getattr(load_module(module), name))
    }
    assert {"batch_norm", "fold", "from_library"} <= exported
    assert exported & {name.split(".")[-1] for name in MODULES if is_public(name)} == set()


LIBRARY = [name for name in MODULES if room_of(name) != "lab"]


@pytest.mark.parametrize("name", LIBRARY)
def test_no_file_of_the_library_is_long(name):
    assert len(MODULES[name].read_text().splitlines()) <= 600


# --- what an import loads -----------------------------------------------------------------------


def run(program):
    """What a program prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


IMPORT_THE_CORE = f"""
import importlib, sys
for name in {[name for name in MODULES if room_of(name) == "_core"]!r}:
    importlib.import_module(name)
print(sorted({{"chex", "flax", "optax"}} & set(sys.modules)))
"""


def test_the_core_loads_without_flax():
    assert run(IMPORT_THE_CORE) == "[]"


OPTIONAL = (
    "matplotlib",
    "sklearn",
    "typer",
    "orbax",
    "rich",
    "safetensors",
    "flatbuffers",
    "pydantic",
    "filelock",
)

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
for name in bn_jax.__all__:
    getattr(bn_jax, name)
print(sorted({{name.split(".")[0] for name in set(sys.modules) - before}} - {{"jax"}}))
"""


def test_the_whole_surface_needs_nothing_optional():
    assert run(IMPORT_ALONE) == "['bn_jax']"


# --- tiers --------------------------------------------------------------------------------------


def test_the_table_of_the_quick_tier_names_tests_that_exist():
    for name in EVERY:
        file, test = name.split("::")
        functions = [
            node.name
            for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
            if isinstance(node, ast.FunctionDef)
        ]
        assert test in functions, name
