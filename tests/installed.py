"""Whether a file that `make package` has built works where nothing else is installed.

    python tests/installed.py FILE FOLDER

FOLDER becomes an environment with FILE and what it requires, and is removed at the end. What the
command advises for a missing extra is run as it stands there.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

USE = """
import importlib.metadata, re, sys
import bn_jax as bn, jax.numpy as jnp
assert bn.__file__.startswith(sys.prefix), bn.__file__
x = jnp.array([[1.0], [3.0]])
y, _ = bn.batch_norm(
    bn.init_params(1), bn.init_batch_stats(1), x, use_running_average=False
)
assert abs(y - jnp.array([[-1.0], [1.0]])).max() < 1e-4
bn.linen.BatchNorm, bn.nnx.BatchNorm, bn.fold, bn.recalibrate, bn.training
text = importlib.metadata.metadata("bn-jax")["Description"]
assert "# bn_jax" in text and "What batch norm computes" in text
assert not re.search(r"\\]\\((?!\\w+:|#)", text), "a link that leads nowhere"
print(bn.__version__)
"""


def check(file: Path, folder: Path) -> None:
    """Installs `file` into a new environment in `folder`, uses it, and removes the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    # Neither the checkout nor what the caller has installed may be imported.
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    clean["PATH"] = f"{folder / 'bin'}:{clean['PATH']}"

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder, env=clean, text=True, capture_output=True)

    def must(*command: str) -> str:
        done = run(*command)
        assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    must("python", "-m", "pip", "install", "--quiet", str(file))
    version = must("python", "-c", USE)
    assert f"-{version}" in file.name, f"{file.name} says that it is {version}"
    must("python", "-m", "pip", "check")
    # Without the extra, the command is one line, and what the line says works here.
    refused = run("bn-jax")
    lines = (refused.stdout + refused.stderr).strip().splitlines()
    assert refused.returncode and len(lines) == 1, f"expected one line, got {lines}"
    advice = re.search(r"pip install '([^']+)'", lines[0])
    assert advice, f"no advice in {lines[0]!r}"
    if file.suffix == ".whl":
        must("python", "-m", "pip", "install", "--quiet", advice[1])
        assert "train" in must("bn-jax", "--help")
    print(f"{file.name} works; without its extra: {lines[0]}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    check(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
