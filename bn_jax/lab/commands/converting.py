"""Files of another library's weights, converted for `bn-jax convert`."""

import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bn_jax import convert, linen
from bn_jax.convert.layouts import LAYOUTS, Library
from bn_jax.lab import models
from bn_jax.lab.errors import CommandError

__all__ = ["Converted", "convert_file"]

# Disagreements of each kind that an error lists; a wrong model has hundreds.
LISTED = 4
RESNETS = ("ResNet18", "ResNet34", "ResNet50", "ResNet101", "ResNet152")


class Converted(NamedTuple):
    """What `convert_file` has written.

    Attributes:
        model: what the variables are those of.
        arrays: how many there are.
        numbers: how many numbers they hold.
        warnings: what the conversion warns of.
    """

    model: str
    arrays: int
    numbers: int
    warnings: list[str]


class _Target(NamedTuple):
    """A Flax model to convert to: what it is called, its variables, the names of its layers."""

    model: str
    like: Any
    names: Any


def convert_file(
    file: Path,
    out: Path,
    *,
    library: str,
    like_file: Path | None,
    names_file: Path | None,
    transposed: list[str] | None,
) -> Converted:
    """Converts the weights in a file, and saves the variables of Flax.

    Args:
        file: a safetensors file of the library's arrays.
        out: the new file.
        library: one of those of `bn_jax.convert.from_library`.
        like_file: a safetensors file of variables of the Flax model, by path; None for the ResNet
            of `bn_jax.lab.models` that has the layers of a torchvision ResNet.
        names_file: a JSON file, the argument `names` of `from_library`.
        transposed: that argument of `from_library`, where ``[""]`` means none.

    Raises:
        CommandError: a file is missing, damaged or of another kind, or the weights do not fit.
    """
    if library not in LAYOUTS:
        raise CommandError(f"--library: received {library}, expected one of {', '.join(LAYOUTS)}")
    arrays = _load("FILE", file)
    if like_file is None:
        target = _torchvision_resnet(file, arrays, library, names_file)
    else:
        like = _read_like(like_file)
        target = _Target(f"The variables of {like_file}", like, _read_names(names_file))
    globs = None if transposed is None else [glob for glob in transposed if glob]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            variables = convert.from_library(
                arrays,
                cast(Library, library),
                like=target.like,
                names=target.names,
                transposed=globs,
            )
        except (ValueError, TypeError) as error:
            raise CommandError(
                f"FILE: {file} cannot be converted: {_shortened(str(error))} Here, names= is "
                "--names FILE.json, and transposed= is --transposed PATH, or --transposed '' for ()"
            ) from error
    flat = traverse_util.flatten_dict(variables, sep="/")
    _save(out, flat)
    return Converted(
        model=target.model,
        arrays=len(flat),
        numbers=sum(array.size for array in flat.values()),
        warnings=[str(warning.message) for warning in caught],
    )


def _load(argument: str, path: Path) -> dict[str, np.ndarray]:
    try:
        # The library would wait at a pipe, and read a device for ever.
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a pipe or a device, expected a safetensors file")
        return convert.load_safetensors(path)
    except (ValueError, OSError) as error:
        # The lines of code in an error stay code on one line.
        message = str(error).replace(":\n", ": ").replace("\n", "; ")
        raise CommandError(f"{argument}: {message}") from error


def _read_like(path: Path) -> dict[str, Any]:
    flat = _load("--like", path)
    for key in flat:
        if inside := [other for other in flat if other.startswith(f"{key}/")]:
            raise CommandError(
                f"--like: {path} has {inside[0]} inside of an array, expected the variables of a "
                f"model, in which {key} is either an array or a module"
            )
    return traverse_util.unflatten_dict(flat, sep="/")


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file that is complete or missing."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        convert.save_safetensors(part, arrays)
        part.replace(path)
    except ValueError as error:
        raise CommandError(f"--out: {error}; nothing was saved", code=1) from error
    finally:
        part.unlink(missing_ok=True)


def _read_names(file: Path | None) -> dict[str, str] | None:
    if file is None:
        return None
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CommandError(
            f"--names: {file} cannot be read as JSON ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CommandError(
            f'--names: {file} holds no mapping of strings, expected {{"path in Flax": "path in '
            'the library"}'
        )
    return names


def _torchvision_resnet(
    file: Path, arrays: Mapping[str, np.ndarray], library: str, names_file: Path | None
) -> _Target:
    """Returns the ResNet of `bn_jax.lab.models` whose layers a state dict of torchvision has."""
    name = _name_resnet(arrays) if library == "pytorch" and names_file is None else None
    if name is None:
        raise CommandError(
            f"FILE: the arrays of {file} are not those of a ResNet-18, 34, 50, 101 or 152 of "
            "torchvision, which is expected without --like, --names and --library; give the "
            "variables of your Flax model with --like: bn_jax.convert.save_safetensors(path, "
            "flax.traverse_util.flatten_dict(variables, sep='/'))"
        )
    classes = len(arrays["fc.weight"])
    norm = functools.partial(linen.BatchNorm, **convert.attributes_from_library("pytorch"))
    model = getattr(models, name)(classes, norm=norm, padding="symmetric")
    init = functools.partial(model.init, jax.random.key(0), train=False)
    return _Target(
        f"bn_jax.lab.models.{name}({classes}, padding='symmetric')",
        jax.eval_shape(init, jnp.zeros((1, 32, 32, 3))),
        convert.resnet_names,
    )


def _name_resnet(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Returns which of `RESNETS` has the blocks that the keys name, if any."""
    keys = (re.match(r"layer([0-9]{1,3})\.([0-9]{1,3})\.", key) for key in arrays)
    blocks = {(int(found[1]), int(found[2])) for found in keys if found}
    stages = sorted({stage for stage, _ in blocks})
    sizes = tuple(sum(stage == one for one, _ in blocks) for stage in stages)
    block = models.Bottleneck if "layer1.0.conv3.weight" in arrays else models.BasicBlock
    if np.ndim(arrays.get("fc.weight", 0)) != 2:
        return None
    for name in RESNETS:
        model = getattr(models, name)(1)
        if (model.stage_sizes, model.block) == (sizes, block):
            return name
    return None


def _shortened(message: str) -> str:
    """Returns a message as one line, with only the first of the lines that each list has."""
    kept: list[str] = []
    listed = 0
    for line in message.splitlines():
        listed = listed + 1 if line.startswith("  ") else 0
        if listed <= LISTED:
            kept.append(line)
        elif listed == LISTED + 1:
            kept.append("  ...")
    text = "\n".join(kept).replace(":\n  ", ": ").replace("\n  ", ", ")
    return text.replace(".\n", ". ").replace("\n", ". ")
