"""Tables of the pages Install and Versions, read from ``pyproject.toml``."""

import tomllib
from pathlib import Path

from IPython.display import Markdown

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
NAMES = {"jax": "JAX", "flax": "Flax", "optax": "Optax", "chex": "Chex"}
# JAX brings jaxlib of the right version.
IMPLIED = {"jaxlib"}
# Who needs an extra, and for what. An extra without a line here fails the build.
PURPOSES = {
    "convert": "reading and writing safetensors files of weights",
    "export": "`bn.export_model` and `bn.load_exported`",
    "lab": "the command `bn-jax` and `bn_jax.lab`: data, models, saved runs, claims",
    "demo": "the old name of `lab`",
    "notebooks": "running the notebooks",
    "docs": "building this documentation",
    "test": "running the tests and linters",
    "bench": "repeating the benchmarks, with the compilers for TPU and GPU",
    "zoo": "testing models of other packages",
}


def bounds() -> dict[str, str]:
    """Returns the oldest supported version of Python and of each required package, by name."""
    required = dict(line.split(">=") for line in PROJECT["dependencies"])
    return {
        "Python": PROJECT["requires-python"].removeprefix(">="),
        **{NAMES[name]: oldest for name, oldest in required.items() if name not in IMPLIED},
    }


def versions_table() -> Markdown:
    """Returns the oldest supported versions as a table."""
    rows = [f"| {name} | {oldest} |" for name, oldest in bounds().items()]
    return Markdown("\n".join(["| | oldest supported version |", "|---|---|", *rows]))


def extras_table() -> Markdown:
    """Returns what each extra is for, as a table."""
    extras = PROJECT["optional-dependencies"]
    if unexplained := extras.keys() ^ PURPOSES.keys():
        raise ValueError(f"PURPOSES and the extras of pyproject.toml differ in {unexplained}")
    rows = [f"| `{name}` | {purpose} |" for name, purpose in PURPOSES.items()]
    return Markdown("\n".join(["| extra | needed for |", "|---|---|", *rows]))
