"""What the pages compute with."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def digest() -> str:
    """Returns a name of the library and the committed figures as they are.

    The results of the pages' cells are kept under it, so that a page is executed again once what it
    computes with has changed.
    """
    read = [ROOT / "pyproject.toml"]
    read += sorted((ROOT / "bn_jax").rglob("*.py"))
    read += sorted((ROOT / "benchmarks/results").glob("*.json"))
    texts = b"\0".join(path.read_bytes() for path in read)
    return hashlib.sha256(texts).hexdigest()[:16]
