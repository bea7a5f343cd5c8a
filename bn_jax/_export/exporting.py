"""Exporting a model: its forward function as a program of named arrays, and the folder."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.typing import ArrayLike

from bn_jax._export.arrays import StoredArrays, store_arrays
from bn_jax._export.files import Contents, check_folder, write_folder
from bn_jax._export.loading import ExportedModel, load_exported
from bn_jax._export.readme import write_readme
from bn_jax._export.standardizing import Standardization, make_standardization
from bn_jax._program import as_pure

PLATFORMS = ("cpu", "cuda", "tpu")


def export_model(
    folder: str | os.PathLike[str],
    forward: Callable[..., Any],
    variables: Any,
    *args: Any,
    mean: ArrayLike | None = None,
    std: ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
    symbolic_batch: bool = True,
    platforms: Sequence[str] = PLATFORMS,
) -> ExportedModel:
    """Writes a model to a folder that runs wherever JAX and NumPy do, without this library.

    The folder holds:

    - ``model.stablehlo``: the program, serialized by `jax.export`;
    - ``params.npz``: its parameters by their paths, in the dtypes of the variables (bfloat16 and
      float8, which NumPy lacks, as their bits);
    - ``model.json``: the names of the classes, and what reveals damage;
    - ``README.md``: the lines that load and call it.

    Given `mean` and `std`, the program standardizes its input itself, ``(x - mean) / std``, so that
    it takes the pixels of the camera or the file. The difference is exact where `x` is near `mean`:
    at a mean of 1e6 deviations no digit is lost but those that `x` has lost already.

    Args:
        folder: a new or empty folder.
        forward: ``forward(variables, *args)`` evaluates the model, for example
            ``lambda variables, x: model.apply(variables, x, train=False)``, or `Folded.apply`. For
            an NNX model, ``forward(model, *args)``. It returns arrays, in tuples, lists and dicts.
        variables: ``{"params": ..., "batch_stats": ...}`` or any other tree of arrays; or an
            `nnx.Module`, which is exported in evaluation and stays as it is.
        *args: arrays or `jax.ShapeDtypeStruct`, in tuples, lists and dicts: examples of shape and
            dtype. Shapes may have symbolic sizes of `jax.export.symbolic_shape`.
        mean: subtracted from the first of `args`. A number, or an array that broadcasts against an
            example, such as a mean for each channel.
        std: what the difference is divided by, as `mean`.
        class_names: the names of the classes, in the order of the logits.
        symbolic_batch: whether the first size of every array in `args` is that of the batch, and
            may be any number in a call. It has no effect if `args` have symbolic sizes already.
        platforms: where the program can run, as of `jax.export.export`.

    Returns:
        The model as `load_exported` reads it from the folder.

    Raises:
        ValueError: the folder exists and is not empty, or cannot be made; `mean` or `std` does not
            broadcast, or is not finite or positive; there are not as many `class_names` as outputs.
        TypeError: there are no `args`, or a leaf of `variables` is no array.
        ImportError: flatbuffers is not installed.

    Example:
        >>> import pathlib, tempfile, flax.linen as nn, jax, jax.numpy as jnp, bn_jax as bn
        >>> model = nn.Sequential([nn.Dense(3), bn.linen.BatchNorm(use_running_average=True)])
        >>> x = jnp.ones((2, 4))
        >>> variables = model.init(jax.random.key(0), x)
        >>> folder = pathlib.Path(tempfile.mkdtemp(), "classifier")
        >>> exported = bn.export_model(folder, model.apply, variables, x, mean=1.0, std=2.0)
        >>> exported
        ExportedModel(float32[batch, 4], for cpu, cuda, tpu)
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'model.json', 'model.stablehlo', 'params.npz']
        >>> y = bn.load_exported(folder)(x)
        >>> bool(jnp.allclose(y, model.apply(variables, (x - 1) / 2)))
        True
    """
    folder = Path(folder)
    check_folder(folder)
    names = _checked_names(class_names)
    shapes = _with_symbolic_batch(jax.tree.map(_shape_of, args), symbolic_batch)
    standardization = make_standardization(mean, std, shapes)
    pure, variables = as_pure(forward, variables)
    stored = store_arrays(variables)
    program = _make_program(pure.in_mode(variables, train=False), stored, standardization)
    arrays = stored.arrays | standardization.arrays
    exported = _export(program, arrays, shapes, tuple(platforms), symbolic_batch)
    _check_number(names, exported)
    readme = write_readme(folder.name, exported, names, standardization)
    write_folder(folder, Contents(_serialize(exported), arrays, names, readme))
    return load_exported(folder)


def _make_program(
    forward: Callable[..., Any], stored: StoredArrays, standardization: Standardization
) -> Callable[..., Any]:
    """Returns the model as a function of the arrays in ``params.npz`` and of raw input."""

    def program(params: dict[str, jax.Array], *args: Any) -> Any:
        first, *others = args
        return forward(stored.restore(params), standardization.apply(params, first), *others)

    return program


def _export(
    program: Callable[..., Any],
    arrays: dict[str, np.ndarray],
    args: tuple[Any, ...],
    platforms: tuple[str, ...],
    symbolic_batch: bool,
) -> export.Exported:
    params = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}
    try:
        return export.export(jax.jit(program), platforms=platforms)(params, *args)
    except Exception as error:
        if symbolic_batch:
            error.add_note(
                "bn_jax.export_model traced the model with a batch of symbolic size. If it needs "
                "to know the size, pass symbolic_batch=False: the program then takes the batch "
                "size of args alone."
            )
        raise


def _serialize(exported: export.Exported) -> bytes:
    try:
        return bytes(exported.serialize())
    except (ImportError, ModuleNotFoundError) as error:
        raise ImportError(
            "flatbuffers, by which jax.export writes programs, is not installed. Install it: "
            "pip install 'bn-jax[export]'"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"forward takes or returns a tree that jax.export cannot write ({error}): let it take "
            "and return arrays, in tuples, lists and dicts alone."
        ) from error


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    aval = jax.typeof(jnp.asarray(leaf))
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _with_symbolic_batch(args: tuple[Any, ...], symbolic_batch: bool) -> tuple[Any, ...]:
    """Returns the shapes with one symbolic size in the place of every first one."""
    if not args:
        raise TypeError("args are missing: pass an example of the input, such as a batch.")
    sizes = [size for leaf in jax.tree.leaves(args) for size in leaf.shape]
    if not symbolic_batch or any(export.is_symbolic_dim(size) for size in sizes):
        return args
    (batch,) = export.symbolic_shape("batch")
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:])[: leaf.ndim], leaf.dtype), args
    )


def _check_number(names: tuple[str, ...] | None, exported: export.Exported) -> None:
    """Raises if there are not as many names as logits, where the program returns one array."""
    if names is None or len(exported.out_avals) != 1:
        return
    shape = exported.out_avals[0].shape
    if shape and isinstance(shape[-1], int) and shape[-1] != len(names):
        raise ValueError(
            f"class_names has {len(names)} names, expected {shape[-1]}, one for each output of the "
            "model."
        )


def _checked_names(class_names: Sequence[str] | None) -> tuple[str, ...] | None:
    if class_names is None:
        return None
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise TypeError(f"class_names is {class_names!r}, expected a list of strings.")
    return tuple(class_names)
