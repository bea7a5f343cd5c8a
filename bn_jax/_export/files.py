"""The folder of an exported model: written whole or not at all, and checked for damage."""

import hashlib
import io
import json
import shutil
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROGRAM, PARAMS, FACTS, README = "model.stablehlo", "params.npz", "model.json", "README.md"
# What model.json seals.
FILES = (PROGRAM, PARAMS)
FORMAT = 1


@dataclass(frozen=True)
class Contents:
    """What the folder of an exported model holds."""

    program: bytes
    arrays: Mapping[str, np.ndarray]
    class_names: tuple[str, ...] | None
    readme: str


def check_folder(folder: Path) -> None:
    """Raises a ValueError if a folder holds anything already, or is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder {folder} is a file, expected a new folder: choose another name.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder {folder} exists and is not empty: choose another or remove it.")


def write_folder(folder: Path, contents: Contents) -> None:
    """Writes the folder of an exported model, whole or not at all.

    Raises:
        ValueError: it cannot be written.
    """
    arrays = _npz(contents.arrays)
    facts = {
        "format": FORMAT,
        "class_names": contents.class_names,
        "sha256": {PROGRAM: _sha256(contents.program), PARAMS: _sha256(arrays)},
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
        staging.mkdir()
        try:
            (staging / PROGRAM).write_bytes(contents.program)
            (staging / PARAMS).write_bytes(arrays)
            (staging / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            (staging / README).write_text(contents.readme, encoding="utf-8")
            staging.replace(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise ValueError(
            f"folder {folder} cannot be written ({_reason(error)}): choose another folder."
        ) from error


def read_folder(folder: Path) -> Contents:
    """Reads what `write_folder` has written, but for the README.

    Raises:
        ValueError: the folder holds no exported model, or a file is missing or damaged.
    """
    facts = _read_facts(folder)
    program, arrays = (_read_intact(folder / name, facts["sha256"][name]) for name in FILES)
    names = facts["class_names"]
    with np.load(io.BytesIO(arrays), allow_pickle=False) as archive:
        params = dict(archive)
    return Contents(program, params, None if names is None else tuple(names), readme="")


def _read_facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if {"format", "class_names", "sha256"} - set(facts) or set(facts["sha256"]) != set(FILES):
            raise ValueError("it lacks facts")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"folder {folder} is not an exported model ({FACTS}: {_reason(error)}), expected one "
            "written by bn_jax.export_model or bn-jax export."
        ) from error
    if facts["format"] != FORMAT:
        raise ValueError(
            f"folder {folder} has format {facts['format']}, expected {FORMAT}: load it with the "
            "bn_jax that wrote it, or export the model again."
        )
    return facts


def _read_intact(path: Path, sha256: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({_reason(error)}): copy or export the model again."
        ) from error
    if _sha256(content) != sha256:
        raise ValueError(
            f"{path} is damaged (its SHA-256 is not the one in {FACTS}): copy or export the model "
            "again."
        )
    return content


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns an .npz file; `numpy.savez` does not take every name."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array, order="C"), allow_pickle=False)
    return stream.getvalue()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
