"""The committed notebooks: run in order, with outputs for people. `make notebooks` runs them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 700_000
# Of a POSIX system or of Windows; not a web address, and not the path of a variable.
ABSOLUTE = re.compile(r"(?<![\w./:])/(?:home|Users|root|tmp|work|usr|opt|mnt)/|\b[A-Z]:\\+Users")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text())


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


def texts(notebook):
    """What people read: all cells, and the outputs that are text."""
    for cell in notebook["cells"]:
        yield "".join(cell["source"])
    for output in outputs(notebook):
        yield "".join(output.get("text", ()))
        yield "".join(output.get("data", {}).get("text/plain", ()))


def test_there_are_notebooks_which_the_readme_lists():
    readme = (ROOT / "README.md").read_text()
    listed = re.findall(r"\]\((notebooks/\w+\.ipynb)\)", readme)
    assert listed == [path.relative_to(ROOT).as_posix() for path in NOTEBOOKS] != []


def test_every_cell_was_executed_once_in_order(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


def test_outputs_hold_no_error_and_no_warning(notebook):
    found = outputs(notebook)
    assert not [output for output in found if output["output_type"] == "error"]
    assert not [output for output in found if output.get("name") == "stderr"]


def test_there_is_a_title_and_a_figure(notebook):
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown" and "".join(first["source"]).startswith("# ")
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_what_is_said_is_asserted(notebook):
    assert any("assert " in "".join(cell["source"]) for cell in code_cells(notebook))


def test_the_first_code_cell_installs_where_the_library_is_missing(notebook):
    source = "".join(code_cells(notebook)[0]["source"])
    lines = source.splitlines()
    assert 'if importlib.util.find_spec("bn_jax") is None:' in lines
    assert lines[-1] == '    %pip install --quiet "bn-jax[lab]"'
    # The other cells must not depend on the folder: there, a notebook lies alone.
    assert not re.search(r"mplstyle|open\(", "".join(map(str, code_cells(notebook)[1:])))


def test_every_figure_has_a_text_alternative(notebook):
    for cell in code_cells(notebook):
        shown = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert len(shown) <= 1
        assert bool(shown) == bool(cell["metadata"])
        if shown:
            alternative = cell["metadata"]["mystnb"]["image"]["alt"]
            assert alternative.endswith(".") and len(alternative.split()) > 10


def test_no_legend_is_inside_of_axes(notebook):
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    assert not [source for source in sources if re.search(r"\.legend\(", source)]


def test_nothing_of_a_machine_is_committed(notebook):
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell["metadata"].keys() <= {"mystnb"} for cell in notebook["cells"])
    assert not [text for text in texts(notebook) if ABSOLUTE.search(text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_size(path):
    assert path.stat().st_size < LARGEST
