"""Exported models, loaded and called."""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from bn_jax._export.files import PROGRAM, read_folder
from bn_jax._paths import format_path

_64_BITS = ("int64", "uint64", "float64", "complex128")


@dataclass(frozen=True, eq=False, repr=False)
class ExportedModel:
    """An exported model, which is called with its input.

    Attributes:
        program: what `jax.export.deserialize` returns; ``program.call(params, *args)``.
        params: its arrays by name, as in ``params.npz``.
        class_names: the names of the classes, in the order of the logits; None if there are none.
    """

    program: export.Exported
    params: dict[str, jax.Array]
    class_names: tuple[str, ...] | None

    def __call__(self, *args: Any) -> Any:
        """Returns the output of the model.

        Args:
            *args: arrays like those that it was exported for, of any batch size.

        Raises:
            ValueError: a shape is another, or sizes of the batch differ.
            TypeError: a dtype is another; or there are more or fewer `args`, or other trees.
        """
        expected = self.inputs
        trees: list[Any] = [jax.tree.structure(one) for one in (args, expected)]
        if trees[0] != trees[1]:
            raise TypeError(f"args have the structure {trees[0]}, expected {trees[1]}.")
        sizes: dict[str, int] = {}
        leaves = jax.tree.leaves_with_path(args)
        for (keys, leaf), shape in zip(leaves, jax.tree.leaves(expected), strict=True):
            _check_input(f"args[{format_path(keys)}]", leaf, shape, sizes)
        return self._call(self.params, *args)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The shapes and dtypes of the input, as a tree of `jax.ShapeDtypeStruct`."""
        return inputs_of(self.program)

    @functools.cached_property
    def _call(self) -> Any:
        return jax.jit(self.program.call)

    def __repr__(self) -> str:
        inputs = ", ".join(describe(leaf) for leaf in jax.tree.leaves(self.inputs))
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        return f"ExportedModel({inputs}{classes}, for {', '.join(self.program.platforms)})"


def load_exported(folder: str | os.PathLike[str]) -> ExportedModel:
    """Loads a model that `export_model` or ``bn-jax export`` has written.

    Args:
        folder: of the model.

    Returns:
        A function of the model's input. Its shape and dtype are checked in every call.

    Raises:
        ValueError: the folder is missing or holds no exported model; a file is missing or damaged;
            or the model is in double precision, which `jax_enable_x64` has to allow.
        ImportError: flatbuffers is not installed.

    Example:
        >>> import pathlib, tempfile, jax.numpy as jnp, bn_jax as bn
        >>> folder = pathlib.Path(tempfile.mkdtemp(), "model")
        >>> model = bn.export_model(folder, lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((1, 3)))
        >>> bn.load_exported(folder)(jnp.ones((5, 3))).shape
        (5, 2)
    """
    folder = Path(folder)
    contents = read_folder(folder)
    program = _deserialize(contents.program, folder)
    if needs_x64(program) and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise ValueError(
            f"the model in {folder} computes in double precision: first call "
            'jax.config.update("jax_enable_x64", True).'
        )
    params = {name: jnp.asarray(array) for name, array in contents.arrays.items()}
    return ExportedModel(program, params, contents.class_names)


def inputs_of(program: export.Exported) -> tuple[Any, ...]:
    """Returns the shapes and dtypes of a program's input without the parameters."""
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in program.in_avals]
    (_, *args), _ = jax.tree.unflatten(program.in_tree, shapes)
    return tuple(args)


def needs_x64(program: export.Exported) -> bool:
    """Tells whether a program takes or returns 64-bit numbers."""
    avals = (*program.in_avals, *program.out_avals)
    return any(str(aval.dtype) in _64_BITS for aval in avals)


def describe(leaf: jax.ShapeDtypeStruct) -> str:
    """Returns a dtype and a shape as text, such as ``float32[batch, 8]``."""
    return f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"


def _deserialize(content: bytes, folder: Path) -> export.Exported:
    try:
        return export.deserialize(bytearray(content))
    except ImportError as error:
        raise ImportError(
            "flatbuffers, by which jax.export reads programs, is not installed. Install it: "
            "pip install 'bn-jax[export]'"
        ) from error
    except Exception as error:
        # The file is as it was written; so it is the format that this JAX does not read.
        raise ValueError(
            f"{folder / PROGRAM} cannot be read by JAX {jax.__version__} ({error}): use a JAX not "
            "older than the one that exported it, or export the model again."
        ) from error


def _check_input(
    name: str, leaf: Any, expected: jax.ShapeDtypeStruct, sizes: dict[str, int]
) -> None:
    """Raises an error for an array of another shape or dtype; `sizes` has the symbolic ones."""
    shape = np.shape(leaf)
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype if hasattr(leaf, "dtype") else type(leaf))
    if dtype != expected.dtype:
        raise TypeError(
            f"{name} has dtype {dtype}, expected {expected.dtype}: cast it, for example "
            f"x.astype({str(expected.dtype)!r})."
        )
    fits = len(shape) == len(expected.shape) and all(
        size == wanted if isinstance(wanted, int) else size > 0
        for size, wanted in zip(shape, expected.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {shape}, expected {describe(expected)}: reshape or resize it."
        )
    for size, wanted in _symbolic(shape, expected.shape):
        if sizes.setdefault(wanted, size) != size:
            raise ValueError(
                f"{name} has shape {shape}, in which {wanted} is {size}, expected "
                f"{sizes[wanted]}, as in the args before it."
            )


def _symbolic(shape: tuple[int, ...], expected: tuple[Any, ...]) -> Iterator[tuple[int, str]]:
    for size, wanted in zip(shape, expected, strict=True):
        if not isinstance(wanted, int):
            yield size, str(wanted)
