"""Whole models, from and to other libraries."""

import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from bn_jax._paths import list_layers
from bn_jax.convert.arrays import as_array, flatten, require_mapping, unflatten, variables_of
from bn_jax.convert.dense import pack, unpack
from bn_jax.convert.domains import layers_by_domain, parts_of, stack, unstack
from bn_jax.convert.kernels import (
    as_transposed,
    fits,
    may_be_transposed,
    read,
    shape_in_library,
    write,
)
from bn_jax.convert.keys import Leaf, Names, at_layer, leaves_of, running_statistics
from bn_jax.convert.kinds import Kind, require_told
from bn_jax.convert.layouts import Layout, Library, layout_of
from bn_jax.convert.torchvision import resnet_names


def from_library(
    arrays: Mapping[str, Any],
    library: Library,
    *,
    like: Any,
    names: Names = None,
    transposed: str | Iterable[str] | None = None,
    dtype: DTypeLike | None = None,
    momentum: float = 0.99,
) -> Any:
    """Converts the arrays of another library's model into variables of Flax.

    Kernels become ``[*spatial, in, out]``, a depthwise kernel of Keras ``[*spatial, 1, out]``. A
    `DenseGeneral` takes the weight of a linear layer, reshaped, and the layers ``query``, ``key``,
    ``value`` and ``out`` of attention those of four linear layers, or the packed ``in_proj_weight``
    and ``out_proj`` of PyTorch's ``MultiheadAttention``. The stored averages of Equinox are divided
    by ``1 - momentum**counter``, as Equinox does in evaluation; Haiku stores them divided. A linear
    layer after a flattened image needs its inputs reordered by hand: channels come first in PyTorch
    and Equinox, last in Flax. A `DomainBatchNorm` takes the norms of a `ModuleList` of PyTorch, or
    of timm's `SplitBatchNorm2d`, whose own arrays are those of domain 0. Layers stacked by
    `flax.linen.scan` or `flax.linen.vmap` have no counterpart in other libraries. Unstack them
    first, with ``jax.tree.map(lambda a: a[i], stacked)`` for each if they are stacked along axis 0.

    Args:
        arrays: the arrays by their keys, as the docstring of `bn_jax.convert` describes: of NumPy
            or JAX, or anything that `numpy.asarray` takes, such as tensors of PyTorch on the host.
        library: the library that `arrays` come from.
        like: what to convert to: variables of Linen, an `nnx.Module`, its `nnx.State` or its pure
            dictionary, with arrays or the result of `jax.eval_shape`. A Linen norm made with
            ``attributes_from_library("pytorch", track_running_stats=False)`` has no
            ``batch_stats``; of a model of NNX with such norms pass ``nnx.state(model, nnx.Param)``.
        names: the path of each layer in the library by its path in Flax: a function, such as
            `resnet_names`, or a mapping of paths or of their beginnings, of which the longest
            counts. Other layers keep their path, with the library's separator for ``/``. The two
            convolutions of a SeparableConv of Keras have the paths ``"PATH/depthwise"`` and
            ``"PATH/pointwise"``.
        transposed: one or more glob patterns of the paths in Flax of `ConvTranspose` layers, and of
            no other convolutions: ``transposed=["decoder/up*"]``. Leave out layers with
            ``transpose_kernel=True``: their kernels of PyTorch or Keras are converted as those of
            any convolution. ``transposed=()`` states that there are none. An `nnx.Module` knows its
            layers, and these patterns add to them. None is an error for kernels that neither the
            shapes of the arrays nor a name such as ``Conv_0`` tell from transposed ones.
        dtype: the dtype of floating-point arrays; None keeps the dtypes of `arrays`. Running
            statistics are never narrower than in `like`, and a ``count`` keeps the dtype of `like`.
        momentum: the momentum of Equinox's norms in mode "batch"; ignored for other libraries.

    Returns:
        The tree of `like` (for an `nnx.Module` the state for `nnx.update`) with copies of the
        arrays as NumPy arrays: put them on a device once, with `jax.device_put`. A ``count``, the
        number of batches in a cumulative average, is float32 and exact up to 2**24.

    Raises:
        ValueError: keys are missing, unknown or have another shape, all listed in one message; two
            layers get the same name, or `names` names no layer; the library has no counterpart of
            something in `like`; or `transposed` is None where it decides.
        TypeError: something is not an array; `arrays`, `names` or `dtype` is of the wrong type, or
            `dtype` is real and an array complex.

    Warns:
        UserWarning: no training step has updated the running statistics in `arrays`: they are 0, or
            the counter of Haiku or Equinox is.

    Example:
        >>> import numpy as np, bn_jax as bn
        >>> weights = {"norm/gamma": np.full(2, 3.0), "norm/beta": np.zeros(2)}
        >>> like = {"params": {"norm": bn.init_params(2)}}
        >>> bn.convert.from_library(weights, "keras", like=like)["params"]["norm"]["scale"]
        array([3., 3.])
    """
    layout = layout_of(library)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"dtype={jnp.dtype(dtype)}, expected a floating-point or complex one, such as "
            "dtype=jnp.float32, or None"
        )
    require_mapping("arrays", arrays, layout.source)
    flat = {key: as_array(key, value) for key, value in flatten(arrays).items()}
    leaves = leaves_of(like, layout, names, transposed, _shapes(flat))
    flat = unpack(flat, [leaf.key for leaf in leaves])
    flat = stack(flat, parts_of(flat, leaves, layout))
    _require_agreement("arrays", leaves, flat, layout)
    if transposed is None and names is not resnet_names:  # a ResNet has no such layers
        _require_known_convolutions(leaves, layout, is_received=True)
    values = [read(leaf, flat, layout, momentum, dtype) for leaf in leaves]
    _warn_if_untrained(leaves, values, flat, layout)
    return jax.tree.unflatten(jax.tree.structure(variables_of(like)), values)


def to_library(
    variables: Any,
    library: Library,
    *,
    names: Names = None,
    transposed: str | Iterable[str] | None = None,
    like: Mapping[str, Any] | None = None,
    momentum: float = 0.99,
) -> dict[str, Any]:
    """Converts variables of Flax into the arrays of another library's model.

    With the arrays that `from_library` converted as `like`, its result is converted back bit for
    bit. Without `like`, depthwise kernels for Keras stay ``[h, w, 1, out]``, where Keras has ``[h,
    w, in, multiplier]``; attention is four linear layers, never packed; and a scale alone is that
    of a RMSNormalization of Keras only if the name of its layer contains "rms". Layers stacked by
    `flax.linen.scan` or `flax.linen.vmap` have no counterpart in other libraries: unstack them
    first, as for `from_library`.

    Args:
        variables: the variables, as `like` of `from_library`, with arrays.
        library: the library to convert to.
        names: as in `from_library`, the same in both directions.
        transposed: as in `from_library`.
        like: the arrays that the library's model has now; the result has their keys and shapes.
            Haiku and Equinox need it, because their shapes depend on more than the variables of
            Flax know; so does a `DenseGeneral` that has no bias to tell its axes, and a
            `DomainBatchNorm`. It also supplies
            what Flax does not have (``num_batches_tracked`` unless averages are cumulative, the
            counters of Haiku and Equinox) for norms whose statistics have not changed since.
            Otherwise that is 0 in PyTorch, and so high in Haiku and Equinox that their division by
            ``1 - momentum**counter`` divides by 1.
        momentum: as in `from_library`.

    Returns:
        Copies of the arrays by their keys in the library, as NumPy arrays; for Haiku the mapping of
        ``params`` and ``state``.

    Raises:
        ValueError: as in `from_library`, about `like`; `like` is missing where the library needs
            it; or a norm has a ``count`` that the library cannot hold.
        TypeError: as in `from_library`.

    Example:
        >>> import bn_jax as bn
        >>> variables = {"params": {"norm": bn.init_params(2)}}
        >>> sorted(bn.convert.to_library(variables, "pytorch", names={"norm": "bn1"}))
        ['bn1.bias', 'bn1.weight']
    """
    layout = layout_of(library)
    flat = None
    if like is not None:
        require_mapping("like", like, layout.source)
        flat = flatten(like)
    leaves = leaves_of(
        variables, layout, names, transposed, None if flat is None else _shapes(flat)
    )
    if flat is None and layout.needs_like:
        raise ValueError(
            f"like is missing: shapes of {library} depend on more than the variables of Flax. Pass "
            "the arrays of the library's model, initialized or trained: like=arrays."
        )
    if flat is not None:
        flat = unpack(flat, [leaf.key for leaf in leaves])
        order, parts = list(flat), parts_of(flat, leaves, layout)
        flat = stack(flat, parts)
        _require_agreement("like", leaves, flat, layout)
    if transposed is None and names is not resnet_names:
        _require_known_convolutions(leaves, layout, is_received=flat is not None)
    if flat is None and not layout.keeps_dense_axes:
        _require_known_inputs(leaves)
    if flat is None and layout.domains:
        _require_no_domains(leaves)
    values = jax.tree.leaves(variables_of(variables))
    written = {
        leaf.key: write(leaf, as_array(leaf.path, value), layout)
        for leaf, value in zip(leaves, values, strict=True)
    }
    _add_extras(written, leaves, layout)
    if flat is not None:
        written = {key: _in_shape(written[key], np.shape(array)) for key, array in flat.items()}
        _keep_unchanged(written, flat, leaves, layout, momentum)
        written = unstack(written, parts)
        written = {key: written[key] for key in order}
    written = pack(written)
    return unflatten(written) if library == "haiku" else written


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(np.shape(array)) for key, array in arrays.items()}


def _require_known_convolutions(leaves: list[Leaf], layout: Layout, *, is_received: bool) -> None:
    """Raises an error for kernels that nothing tells from transposed ones."""
    unclear = [
        leaf.module for leaf in leaves if may_be_transposed(leaf, layout, is_received=is_received)
    ]
    require_told(unclear, has_arrays=is_received)


def _require_known_inputs(leaves: list[Leaf]) -> None:
    for leaf in leaves:
        if leaf.is_kernel and leaf.kind == Kind("DenseGeneral"):
            raise ValueError(
                f"like is missing: nothing else tells which axes of {leaf.path} {leaf.shape}, of a "
                "DenseGeneral, are its inputs. Pass the arrays of the library's model, "
                "initialized or trained: like=arrays."
            )


def _require_no_domains(leaves: list[Leaf]) -> None:
    for mean in layers_by_domain(leaves).values():
        raise ValueError(
            f"like is missing: nothing else tells where the norms of the domains of {mean.module}, "
            f"with a mean of shape {mean.shape}, are in the library: in a list, or in a "
            "SplitBatchNorm2d. Pass the arrays of the library's model, initialized or trained: "
            "like=arrays."
        )


def _in_shape(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    # What is new for each norm is new for each of its domains.
    return array.reshape(shape) if array.ndim else np.broadcast_to(array, shape).copy()


def _warn_if_untrained(
    leaves: list[Leaf], values: list[np.ndarray], arrays: Mapping[str, np.ndarray], layout: Layout
) -> None:
    """Warns of norms whose averages no training step of the library has entered.

    Equinox and Haiku start averages with 0. After its initialization a model of Haiku's has those
    of the first batch, with a counter of 0.
    """
    by_key = {leaf.key: value for leaf, value in zip(leaves, values, strict=True)}
    counters = [extra for extra in layout.extras if extra.untrained is not None]
    untrained = []
    for layer, statistics in running_statistics(leaves).items():
        is_zero = not any(np.any(by_key[leaf.key]) for leaf in statistics.values())
        counts = [
            arrays.get(at_layer(extra.key, layer), 1) == extra.untrained for extra in counters
        ]
        if is_zero or any(map(np.all, counts)):
            untrained.append(statistics["mean"].module)
    if untrained:
        warnings.warn(
            f"no training step has updated the running statistics of {list_layers(untrained)} in "
            "arrays, and evaluation does not normalize by them. Convert model and state after "
            "training, or measure the statistics: bn_jax.recalibrate(forward, variables, "
            "batches).batch_stats.",
            UserWarning,
            stacklevel=3,
        )


def _add_extras(written: dict[str, np.ndarray], leaves: list[Leaf], layout: Layout) -> None:
    """Adds what the library's running statistics have beside mean and variance."""
    for layer, statistics in running_statistics(leaves).items():
        for extra in layout.extras:
            if extra.copy_of is not None:
                array = written[statistics[extra.copy_of].key]
            else:
                array = np.asarray(extra.fresh)
            # The count of a cumulative average is written already.
            written.setdefault(at_layer(extra.key, layer), array.copy())


def _keep_unchanged(
    written: dict[str, np.ndarray],
    like: Mapping[str, Any],
    leaves: list[Leaf],
    layout: Layout,
    momentum: float,
) -> None:
    """Restores the statistics of `like`, extras included, of norms that have not changed.

    Debiased averages are rounded, so that multiplying them back would not give the same bits.
    """
    arrays = {
        key: as_array(key, value)
        for key, value in like.items()
        if not isinstance(value, jax.ShapeDtypeStruct)
    }
    from_flax = {leaf.key for leaf in leaves}
    for layer, statistics in running_statistics(leaves).items():
        keys = {leaf.key for leaf in statistics.values()}
        if not keys <= set(arrays):
            continue
        converted = {leaf: read(leaf, arrays, layout, momentum) for leaf in statistics.values()}
        if all(_is_same(array, written[leaf.key]) for leaf, array in converted.items()):
            keys |= {at_layer(extra.key, layer) for extra in layout.extras} - from_flax
            for key in keys & set(arrays):
                written[key] = arrays[key].copy()


def _is_same(first: np.ndarray, second: np.ndarray) -> bool:
    return first.dtype == second.dtype and first.tobytes() == second.tobytes()


# --- keys and shapes that do not fit ------------------------------------------------------------


def _require_agreement(
    name: str, leaves: list[Leaf], received: Mapping[str, Any], layout: Layout
) -> None:
    """Raises one error for all keys of the argument `name` that do not fit the leaves."""
    expected = {leaf.key: f"{shape_in_library(leaf, layout)} for {leaf.path}" for leaf in leaves}
    norms = running_statistics(leaves)
    optional = {at_layer(extra.key, norm) for extra in layout.extras for norm in norms}
    if layout.counter is not None:
        for norm in norms:
            expected[at_layer(layout.counter, norm)] = "() for the averages"
    shapes = {key: tuple(np.shape(array)) for key, array in received.items()}
    unknown = [key for key in shapes if key not in expected and key not in optional]
    missing = [key for key in expected if key not in shapes]
    misshaped = [
        leaf for leaf in leaves if leaf.key in shapes and not fits(shapes[leaf.key], leaf, layout)
    ]
    if not (unknown or missing or misshaped):
        return
    lines = [f"{name} does not fit the variables of Flax."]
    none_fits = missing and len(missing) == len(expected)
    if none_fits and (prefix := _prefix_of(missing, set(unknown))):
        lines.append(
            f"Every key of {name} has {prefix!r} in front, as where a model is wrapped in another "
            f"or saved inside of a larger tree: pass {name} without it."
        )
    statistics = {leaf.key for leaf in leaves if leaf.name in ("mean", "var", "count")}
    if missing and "track_running_stats" in layout.defaults and statistics.issuperset(missing):
        lines.append(
            "Norms without running statistics in PyTorch have none here either, made with "
            "attributes_from_library('pytorch', track_running_stats=False)."
        )
    if any(shapes[leaf.key] == leaf.merged[1:] for leaf in misshaped if leaf.by_domain):
        lines.append(
            "A norm without domains is no DomainBatchNorm: convert into variables of the model "
            "without domains, and split them by split_batch_norms."
        )
    if missing:
        lines.append(f"missing from {name}, {len(missing)} in all:")
        lines += [f"  {key} {expected[key]}{_hint(key, unknown)}" for key in missing]
    if unknown:
        lines.append(f"unknown in {name}, {len(unknown)} in all:")
        lines += [f"  {key} {shapes[key]}" for key in unknown]
    if misshaped:
        lines.append(f"of another shape in {name}, {len(misshaped)} in all:")
        lines += [
            f"  {leaf.key} {shapes[leaf.key]}, expected {expected[leaf.key]}"
            + _transposed_hint(shapes[leaf.key], leaf, layout)
            for leaf in misshaped
        ]
    lines.append(
        "Pass names={'path in Flax': 'path in the library'} or a function to say which layer is "
        "which, and transposed=['path in Flax'] to say which layers are ConvTranspose. Where no "
        f"name of a layer helps, rename or remove the unknown keys of {name} yourself."
    )
    raise ValueError("\n".join(lines))


def _prefix_of(missing: list[str], unknown: set[str]) -> str | None:
    """Returns what all missing keys have in front among the unknown ones; None if nothing."""
    prefixes = [key.removesuffix(missing[0]) for key in unknown if key.endswith(missing[0])]
    found = [one for one in prefixes if unknown.issuperset(one + key for key in missing)]
    return found[0] if found else None


def _transposed_hint(shape: tuple[int, ...], leaf: Leaf, layout: Layout) -> str:
    is_unknown = leaf.is_kernel and leaf.kind is not None and leaf.kind.name != "ConvTranspose"
    if is_unknown and fits(shape, as_transposed(leaf), layout):
        return f", or transposed=[{leaf.module!r}]"
    return ""


def _hint(key: str, candidates: list[str]) -> str:
    # Comparing every pair takes long; where hundreds of keys are unknown, the names are wrong.
    near = difflib.get_close_matches(key, candidates[:100], n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""
