"""The code in the tabs of the landing page and of the quickstart runs, and does what it says."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"
TABS = re.compile(r"^:::+\{tab-item\} ([\w ]+)$|^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SETS = re.compile(r"^:{4,5}\{tab-set\}$.*?^:{4,5}$", re.DOTALL | re.MULTILINE)


def code_of(page, tab):
    """The Python that one reader pastes: what stands outside of tabs, and in one tab."""
    text = (DOCS / page).read_text()
    found, current = [], None
    sets = [match.span() for match in SETS.finditer(text)]
    for match in TABS.finditer(text):
        if match[1]:
            current = match[1]
        elif not any(start < match.start() < end for start, end in sets) or current == tab:
            found.append(match[2])
    return found


def run(page, tab):
    scope = {"__name__": "page"}
    for number, block in enumerate(code_of(page, tab)):
        exec(compile(block, f"{page}, {tab}, block {number}", "exec"), scope)
    return scope


@pytest.mark.parametrize("tab", ["Linen", "NNX"])
def test_the_quickstart_runs(tab, capsys):
    assert len(code_of("quickstart.md", tab)) == 5
    scope = run("quickstart.md", tab)
    assert scope["accuracy"] > 0.96
    assert scope["value"] < 0.1
    printed = capsys.readouterr().out
    reports = re.findall(r"^```text\n(.*?)^```$", (DOCS / "quickstart.md").read_text(), re.M | re.S)
    assert reports[tab == "NNX"] in printed
    assert abs(scope["same"] - scope["logits"]).max() < 1e-4
    assert "norm" not in str(list(scope["folded"].params)).lower()


def test_the_landing_page_in_linen():
    scope = run("index.md", "Linen")
    assert set(scope["variables"]["params"]) == {"Dense_0", "BatchNorm_0", "Dense_1"}
    assert jnp.abs(scope["updates"]["batch_stats"]["BatchNorm_0"]["mean"]).max() > 0


def test_the_landing_page_in_nnx():
    scope = run("index.md", "NNX")
    assert jnp.abs(scope["norm"].mean[...]).max() > 0
    assert scope["norm"].use_running_average


def test_the_landing_page_in_pure_functions():
    scope = run("index.md", "Pure functions")
    # One update from mean 0 with momentum 0.99.
    np.testing.assert_allclose(scope["batch_stats"]["mean"], 0.01 * scope["x"].mean(0), rtol=1e-5)
    assert jnp.isfinite(scope["y"]).all()
