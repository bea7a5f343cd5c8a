"""Flax's tests of models with a norm, run with our norms.

`make flax-tests` runs this file as a program. It gets the source distribution of the installed
Flax, which has its tests, and starts pytest on the files that name a norm. There, this file is a
plugin: it puts our norms in the place of Flax's, leaves out the tests that name none, and expects
those to fail that show a deliberate change. With `--norms flax`, Flax's norms stay in place.
"""

import argparse
import ast
import functools
import inspect
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen
import flax.nnx
import pytest

import bn_jax as bn

ROOT = Path(__file__).parents[2]
NAMES = ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"]
# Flax's attention makes a LayerNorm where this argument is True.
NAMED = {*NAMES, "normalize_qk"}

# The tests that fail with our norms, by the item of the guide from Flax that says why.
LINEN = "tests/linen/linen_test.py::NormalizationTest::test"
DELIBERATE = {
    # 1e4 and 1e6 standard deviations from zero, against a reference in float32.
    "The mean is not rounded": [f"{LINEN}_instance_norm3", f"{LINEN}_layer_norm4"],
    "Errors have other texts": [f"{LINEN}_instance_norm_raise_error{case}" for case in range(4)],
}
REASONS = {test: title for title, tests in DELIBERATE.items() for test in tests}


def main() -> int:
    """Runs the tests with our norms, and those that fail once more with Flax's.

    Returns:
        0 if those fail that are listed, and no other that passes with Flax's norms.
    """
    parser = argparse.ArgumentParser(epilog="Other arguments are passed on to pytest.")
    parser.add_argument("--norms", choices=["ours", "flax"], default="ours")
    options, of_pytest = parser.parse_known_args()
    folder = fetch_tests()
    files = [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*_test.py"))
        if any(name in path.read_text() for name in NAMED)
    ]
    ran = run_pytest(folder, options.norms, [*of_pytest, *files])
    failed = {test for test, outcome in ran.items() if outcome == "failed"}
    if failed and options.norms == "ours":
        again = run_pytest(folder, "flax", [*of_pytest, *sorted(failed)])
        failed -= {test for test, outcome in again.items() if outcome == "failed"}
    absent = sorted(set(REASONS) - set(ran))
    for test in sorted(failed):
        print(f"Unlike what is listed in {__file__}: {test}")
    for test in absent:
        print(f"Listed in {__file__}, but not among the tests: {test}")
    return bool(failed or absent)


def fetch_tests() -> Path:
    """Returns the folder with the tests of the installed Flax; it stays in `build/`."""
    release = f"flax-{flax.__version__}"
    folder = ROOT / "build" / "flax-tests"
    if not (folder / release).exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=flax"]
        subprocess.run([*pip, "--dest", folder, f"flax=={flax.__version__}"], check=True)
        with tarfile.open(folder / f"{release}.tar.gz") as archive:
            # With the tests, the configuration of pytest, in which warnings are errors.
            wanted = (f"{release}/tests/", f"{release}/pyproject.toml")
            members = [member for member in archive if member.name.startswith(wanted)]
            archive.extractall(folder, members, filter="data")
    return folder / release


def run_pytest(folder: Path, norms: str, arguments: list[str]) -> dict[str, str]:
    """Returns the outcomes of the tests that were run, with this file as a plugin."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    with tempfile.TemporaryDirectory() as temporary:
        outcomes = Path(temporary) / "outcomes.json"
        plugin = ["-p", Path(__file__).stem, "--norms", norms, "--outcomes", str(outcomes)]
        command = [sys.executable, "-m", "pytest", "-q", *plugin, *arguments]
        code = subprocess.run(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": path}
        ).returncode
        # Otherwise some tests did not run.
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            sys.exit(code)
        return json.loads(outcomes.read_text())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--norms", choices=["ours", "flax"])
    parser.addoption("--outcomes", type=Path)


made: set[str] = set()


def pytest_configure(config: pytest.Config) -> None:
    """Puts our norms wherever Flax has its norms; the tests are imported later."""
    # The guide lists the warning; Flax's tests make it an error like any other.
    config.addinivalue_line("filterwarnings", "ignore:.*one value per feature to train on")
    ours = config.getoption("--norms") == "ours"
    for flax_api, our_api, method in (
        (flax.linen, bn.linen, "__post_init__"),
        (flax.nnx, bn.nnx, "__init__"),
    ):
        for name in NAMES:
            theirs = getattr(flax_api, name)
            norm = getattr(our_api, name) if ours else theirs
            record(norm, method)
            for module in list(sys.modules.values()):
                if module.__name__.startswith("flax.") and vars(module).get(name) is theirs:
                    setattr(module, name, norm)


def record(norm: Any, method: str) -> None:
    """Makes a class add its name to `made` whenever a norm of it is made."""
    original = getattr(norm, method)

    @functools.wraps(original)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        made.add(norm.__name__)
        original(self, *args, **kwargs)

    setattr(norm, method, recorded)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Leaves the tests that name a norm, and marks those that must fail."""
    kept = [item for item in items if names_a_norm(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in items:
        if config.getoption("--norms") == "ours" and item.nodeid in REASONS:
            item.add_marker(pytest.mark.xfail(reason=REASONS[item.nodeid], strict=True))


def names_a_norm(item: pytest.Function) -> bool:
    """Tells whether the source of a test names a norm, or what it refers to in its file does."""
    definitions = definitions_of(item.path)
    # A test with parameters wraps the function that is written in the file.
    found, seen = {inspect.unwrap(item.function).__name__}, set[str]()
    while found - seen:
        seen |= found
        found = found.union(*(definitions.get(name, set()) for name in found))
    return bool(found & NAMED)


@functools.cache
def definitions_of(path: Path) -> dict[str, set[str]]:
    """Returns what the classes, functions, methods and constants of a file refer to, by name."""
    definitions: dict[str, set[str]] = {}
    for node in ast.parse(path.read_text()).body:
        parts = [node, *node.body] if isinstance(node, ast.ClassDef) else [node]
        for part in parts:
            if isinstance(part, ast.Assign):
                names = set().union(*map(names_in, part.targets))
            else:
                names = {getattr(part, "name", "")}
            for name in names:
                definitions.setdefault(name, set()).update(names_in(part))
    return definitions


def names_in(tree: ast.AST) -> set[str]:
    """Returns the names of variables, attributes and arguments in a piece of source."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                names.add(name)
    return names


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    made.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    if call.when == "call":
        item.user_properties.append(("norms made", sorted(made)))
    return (yield)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Writes the outcomes of all tests, whichever process ran them, and says how many count."""
    outcomes, counted = {}, 0
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if getattr(report, "when", None) == "call" or outcome in ("skipped", "error"):
                outcomes[report.nodeid] = "failed" if outcome == "error" else outcome
                counted += bool(dict(report.user_properties).get("norms made"))
    config.getoption("--outcomes").write_text(json.dumps(outcomes))
    terminalreporter.write_line(
        f"{counted} of these tests make a norm of {config.getoption('--norms')}"
    )


if __name__ == "__main__":
    sys.exit(main())
