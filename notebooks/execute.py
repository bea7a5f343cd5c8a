"""Executes a notebook from its first cell to its last; `--refresh` writes its new outputs.

An exception is a failure, and so is any text on standard error, where warnings go.
"""

import argparse
import base64
import io
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

# Nothing about the machine or the time, so that a file changes only if a result does.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SECONDS_A_CELL = 1800


def execute(path: Path) -> nbformat.NotebookNode:
    """Executes a notebook in its folder, with a kernel of this environment.

    Args:
        path: the `.ipynb` file, which is not changed.

    Returns:
        The notebook with its new outputs.

    Raises:
        CellExecutionError: a cell raised an exception.
        ValueError: a cell wrote to standard error.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=SECONDS_A_CELL,
        startup_timeout=SECONDS_A_CELL,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise ValueError(f"cell {cell.execution_count} wrote to stderr:\n{output.text}")
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = opaque(output.data["image/png"])
    return notebook


def opaque(picture: str) -> str:
    """Returns a PNG without its alpha channel, which makes it an eighth smaller.

    Args:
        picture: a PNG in base64, all of whose pixels are opaque.

    Returns:
        The same in base64.
    """
    written = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        image.convert("RGB").save(written, "png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def main() -> str | None:
    """Executes the notebook that the command line names.

    Returns:
        An error message, or None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--refresh", action="store_true", help="write the new outputs")
    arguments = parser.parse_args()
    # XLA's warning about slow compilation concerns the machine, not the notebook.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        notebook = execute(arguments.notebook)
    except (CellExecutionError, ValueError) as error:
        return f"{arguments.notebook}: {error}"
    if arguments.refresh:
        nbformat.write(notebook, arguments.notebook)
    print(f"{arguments.notebook}: every cell ran")
    return None


if __name__ == "__main__":
    sys.exit(main())
