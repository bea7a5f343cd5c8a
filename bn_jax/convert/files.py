"""Files of arrays in the safetensors format, which run no code when they are loaded."""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np

from bn_jax.convert.arrays import as_array, require_mapping


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Loads arrays from a safetensors file, which is safe whoever wrote it.

    Args:
        path: the path of the file.

    Returns:
        The arrays by their keys, in the dtypes of the file, including bfloat16.

    Raises:
        ValueError: the file is missing or damaged, is a pickle, which can run any code when it is
            loaded, or has another format.
        ImportError: safetensors is not installed.

    Example:
        >>> import pathlib, tempfile, numpy as np, bn_jax as bn
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> bn.convert.save_safetensors(path, {"fc.bias": np.zeros(3)})
        >>> bn.convert.load_safetensors(path)
        {'fc.bias': array([0., 0., 0.])}
    """
    safetensors = _import_safetensors()
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is {'no file' if path.exists() else 'missing'}, expected a file")
    if _is_pickle(path):
        raise ValueError(
            f"{path} is a pickle, which can run any code when it is loaded, expected safetensors. "
            "If you trust its source, convert it where PyTorch is installed; of a checkpoint that "
            "holds more than weights, take ['state_dict']:\n"
            "  import torch, safetensors.torch\n"
            f"  arrays = torch.load({str(path)!r}, weights_only=True, map_location='cpu')\n"
            "  arrays = {k: v.contiguous().clone() for k, v in arrays.items()}\n"
            f"  safetensors.torch.save_file(arrays, {f'{path}.safetensors'!r})"
        )
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged, is not safetensors, or has a dtype that NumPy lacks ({error}), "
            "expected a sound file: download or write it again."
        ) from error


def save_safetensors(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Saves arrays as a safetensors file, which PyTorch, Keras and others can load.

    Args:
        path: the path of the file; an existing file is replaced.
        arrays: the arrays by their keys, for example from `to_library`.

    Raises:
        ValueError: a value of `arrays` is a mapping, or the format does not have the dtype of one.
        TypeError: `arrays` is not a mapping of arrays.
        ImportError: safetensors is not installed.

    Example:
        >>> import os, tempfile, jax.numpy as jnp, bn_jax as bn
        >>> path = os.path.join(tempfile.mkdtemp(), "norm.safetensors")
        >>> bn.convert.save_safetensors(path, {"weight": jnp.ones(2)})
        >>> bn.convert.load_safetensors(path)["weight"].tolist()
        [1.0, 1.0]
    """
    safetensors = _import_safetensors()
    require_mapping("arrays", arrays, "model.state_dict() or to_library(variables, 'pytorch')")
    if nested := [key for key, value in arrays.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"arrays[{nested[0]!r}] is a mapping, expected arrays alone. Convert variables first: "
            "save_safetensors(path, to_library(variables, 'pytorch'))."
        )
    # The library writes the memory as it is, and the format stores the last axis contiguously.
    flat = {key: np.asarray(as_array(key, value), order="C") for key, value in arrays.items()}
    try:
        safetensors.numpy.save_file(flat, path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"arrays cannot be saved as {path}: {error}") from error


def _import_safetensors() -> Any:
    try:
        importlib.import_module("safetensors.numpy")
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            "safetensors is not installed. Install it: pip install 'bn-jax[convert]'"
        ) from error


def _is_pickle(path: Path) -> bool:
    """Tells whether a file is a pickle by its content, and if that does not say, by its name."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors: the length of a JSON header in 8 bytes, then the header
        return False
    try:
        with ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except BadZipFile:
        # A pickle starts with the opcode PROTO and the number of its protocol.
        is_protocol = len(start) > 1 and start[0] == 0x80 and start[1] <= 5
        return is_protocol or path.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".pkl")
