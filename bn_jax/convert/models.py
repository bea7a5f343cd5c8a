"""Whole models and attributes, from and to other libraries."""

import difflib
import importlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias
from zipfile import BadZipFile, ZipFile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bn_jax._paths import format_path

Library: TypeAlias = Literal["pytorch", "keras", "haiku", "equinox", "equinox-ema"]
Names: TypeAlias = Mapping[str, str] | Callable[[str], str] | None

# Haiku and Equinox divide an average by 1 - momentum**counter. Ours started from its initial value,
# so that there is nothing to divide: after so many steps the divisor is 1, and counting on is far
# from the end of int32.
_SETTLED = 10**9

# safetensors takes neither tensors of another memory format nor tied ones.
_STATE_DICT = "{k: v.contiguous().clone() for k, v in model.state_dict().items()}"


class _Layout(NamedTuple):
    """How a library lays out its arrays, and what it calls a norm's attributes.

    Attributes:
        norm: the keys there of `_NORM_LEAVES`, as far as there are any; ``{}`` is a layer's path.
        layer: the keys there of `_LAYER_LEAVES`.
        kernel: the axes of a kernel there: ``s`` all spatial ones, ``i`` those of the input, ``o``
            those of the output. Here they are ``sio``.
        transposed: those of a transposed convolution's.
        flips: whether a transposed convolution runs through its kernel the other way round.
        extras: keys of a norm's statistics without a place here, and what they are for averages
            taken here: a value, or the name of a leaf.
        attributes: the names there of a norm's momentum, epsilon, use_scale and use_bias.
        defaults: of a norm's attributes there.
        separator: between the parts of a layer's path.
        of_new: whether momentum is the weight of the new value there.
        running_var_ddof: of the running variance there.
        source: what to write there for the arrays of a model.
        needs_like: whether shapes there depend on more than our variables know.
    """

    norm: tuple[str, ...]
    layer: tuple[str, str, str]
    kernel: str
    transposed: str
    flips: bool
    extras: Mapping[str, Any]
    attributes: tuple[str, str, str, str]
    defaults: Mapping[str, Any]
    source: str
    separator: str = "."
    of_new: bool = False
    running_var_ddof: int = 0
    needs_like: bool = False


_NORM_LEAVES = ("scale", "bias", "mean", "var", "count")
_LAYER_LEAVES = ("kernel", "bias", "embedding")
_TRACKED = "{}.num_batches_tracked"
_COUNTER = "{}.batch_counter"
_PYTORCH = _Layout(
    norm=("{}.weight", "{}.bias", "{}.running_mean", "{}.running_var", _TRACKED),
    layer=("{}.weight", "{}.bias", "{}.weight"),
    kernel="ois",
    transposed="ios",
    flips=True,
    extras={_TRACKED: np.array(0, np.int64)},
    attributes=("momentum", "eps", "affine", "bias"),
    defaults=dict(momentum=0.1, eps=1e-5, affine=True, bias=True, track_running_stats=True),
    source="model.state_dict()",
    of_new=True,
    running_var_ddof=1,
)
_KERAS = _Layout(
    norm=("{}/gamma", "{}/beta", "{}/moving_mean", "{}/moving_variance"),
    layer=("{}/kernel", "{}/bias", "{}/embeddings"),
    kernel="sio",
    transposed="soi",
    flips=True,
    extras={},
    attributes=("momentum", "epsilon", "scale", "center"),
    defaults=dict(momentum=0.99, epsilon=1e-3, scale=True, center=True),
    source="{w.path: w.numpy() for w in model.weights}",
    separator="/",
)
_MEAN_EMA, _VAR_EMA = "state/{}/~/mean_ema/", "state/{}/~/var_ema/"
_HAIKU = _Layout(
    norm=("params/{}/scale", "params/{}/offset", _MEAN_EMA + "average", _VAR_EMA + "average"),
    layer=("params/{}/w", "params/{}/b", "params/{}/embeddings"),
    kernel="sio",
    transposed="soi",
    flips=False,
    extras={
        _MEAN_EMA + "hidden": "mean",
        _MEAN_EMA + "counter": np.array(_SETTLED, np.int32),
        _VAR_EMA + "hidden": "var",
        _VAR_EMA + "counter": np.array(_SETTLED, np.int32),
    },
    attributes=("decay_rate", "eps", "create_scale", "create_offset"),
    defaults=dict(eps=1e-5),
    source='{"params": params, "state": state}',
    separator="/",
    needs_like=True,
)
_EQUINOX = _Layout(
    norm=("{}.weight", "{}.bias", "{}.batch_state_index.0", "{}.batch_state_index.1"),
    layer=("{}.weight", "{}.bias", "{}.weight"),
    kernel="ois",
    transposed="ois",
    flips=False,
    extras={_COUNTER: np.array(_SETTLED, np.int32)},
    attributes=("momentum", "eps", "channelwise_affine", "channelwise_affine"),
    defaults=dict(momentum=0.99, eps=1e-5, channelwise_affine=True, mode="legacy"),
    source="its leaves by their path, as the docstring of bn_jax.convert makes them",
    needs_like=True,
)
_EQUINOX_EMA = _EQUINOX._replace(
    norm=("{}.weight", "{}.bias", "{}.ema_state_index.0", "{}.ema_state_index.1"),
    extras={"{}.ema_first_time_index": np.array(False)},
)
_LIBRARIES = {
    "pytorch": _PYTORCH,
    "keras": _KERAS,
    "haiku": _HAIKU,
    "equinox": _EQUINOX,
    "equinox-ema": _EQUINOX_EMA,
}


def from_library(
    arrays: Mapping[str, Any],
    library: Library,
    *,
    like: Any,
    names: Names = None,
    transposed: str | Iterable[str] | None = None,
    dtype: Any = None,
    momentum: float = 0.99,
) -> Any:
    """Converts the arrays of another library's model into variables of Flax.

    Kernels become ``[*spatial, in, out]``; a depthwise one of Keras ``[*spatial, 1, out]``. The
    statistics of Equinox are divided by ``1 - momentum**counter``, as it does in evaluation; Haiku
    keeps them divided. A linear layer after a flattened image needs its inputs reordered by hand:
    channels come first in PyTorch and Equinox, last in Flax. Layers that `flax.linen.scan` or
    `flax.linen.vmap` stacked have no counterpart there: unstack them first, each by
    ``jax.tree.map(lambda a: a[i], stacked)`` where its layers are stacked along axis 0.

    Args:
        arrays: as the module's docstring says; NumPy, JAX, or whatever `numpy.asarray` takes, as
            tensors of PyTorch on the host.
        library: where they come from.
        like: what is expected: variables of Linen, an `nnx.Module`, its `nnx.State` or pure
            dictionary; arrays or what `jax.eval_shape` makes of them. A norm without running
            statistics has none here: leave out ``batch_stats``.
        names: the path of each layer there by that here, as a function (`resnet_names`) or a
            mapping of paths or of their beginnings, of which the longest counts. A layer that it
            does not name keeps its path, with ``.`` for ``/`` where the library has that.
        transposed: a glob, or several, of the paths here of `ConvTranspose` layers and of no other
            convolutions: ``transposed=["decoder/up*"]``. With ``transpose_kernel=True`` a kernel of
            PyTorch or Keras comes as of any convolution, and no glob may match: ``transposed=()``
            says that there is none. An `nnx.Module` knows its own, to which this adds.
        dtype: for floating-point arrays; None for those that they come with. Running statistics
            are never narrower than in `like`, and a ``count`` stays as it is there.
        momentum: of the norms of Equinox in mode "batch"; elsewhere it means nothing.

    Returns:
        The tree of `like` (of an `nnx.Module` the state for `nnx.update`) with the arrays copied,
        as NumPy's: put them on a device once, with `jax.device_put`. A ``count`` of batches, which
        cumulative averages have, is float32 and exact up to 2**24.

    Raises:
        ValueError: keys are missing, unknown or of another shape, all listed at once; two layers
            have one name, or `names` has one of no layer; the library has no word for what `like`
            holds; `transposed` is None where names that Linen gives say that there are some.
        TypeError: something is not an array; `arrays`, `names` or `dtype` is of another kind, or
            `dtype` is real and an array complex.

    Example:
        >>> import numpy as np, bn_jax as bn
        >>> weights = {"norm/gamma": np.full(2, 3.0), "norm/beta": np.zeros(2)}
        >>> like = {"params": {"norm": bn.init_params(2)}}
        >>> bn.convert.from_library(weights, "keras", like=like)["params"]["norm"]["scale"]
        array([3., 3.])
    """
    layout = _layout(library)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"dtype={jnp.dtype(dtype)}, expected a floating-point or complex one, such as "
            "dtype=jnp.float32, or None"
        )
    _require_mapping("arrays", arrays, layout.source)
    found = {key: _array(key, value) for key, value in _flatten(arrays).items()}
    entries = _entries(like, layout, names, transposed)
    like = _variables(like)
    _require_agreement("arrays", entries, found, layout)
    values = [_read(entry, found, layout, momentum, dtype) for entry in entries]
    return jax.tree.unflatten(jax.tree.structure(like), values)


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

    What `from_library` made comes back bit for bit if `like` is what it was made from. Without
    `like`, depthwise kernels for Keras stay ``(h, w, 1, out)``, where it has ``(h, w, in,
    multiplier)``. Layers that `flax.linen.scan` or `flax.linen.vmap` stacked have no counterpart
    there: unstack them first, each by ``jax.tree.map(lambda a: a[i], stacked)``.

    Args:
        variables: as `like` of `from_library`, with arrays.
        library: where they go.
        names: as of `from_library`, the same for both ways.
        transposed: as of `from_library`.
        like: the arrays that the model there has now; the result has their keys and shapes. Haiku
            and Equinox need it, since shapes there depend on more than ours do. It also gives what
            has no place here (``num_batches_tracked`` unless averages are cumulative, the counters
            of Haiku and Equinox) where a norm's statistics are still those in it. Without it, or
            for other statistics, that becomes 0 in PyTorch, and in Haiku and Equinox so high that
            their division by ``1 - momentum**counter`` divides by 1.
        momentum: as of `from_library`.

    Returns:
        The arrays by their keys there, copied, as NumPy's; for Haiku the mapping of ``params`` and
        ``state``.

    Raises:
        ValueError: as of `from_library`, about `like`; or it is missing; or a norm has a ``count``
            that the library cannot say.
        TypeError: as of `from_library`.

    Example:
        >>> import bn_jax as bn
        >>> variables = {"params": {"norm": bn.init_params(2)}}
        >>> sorted(bn.convert.to_library(variables, "pytorch", names={"norm": "bn1"}))
        ['bn1.bias', 'bn1.weight']
    """
    layout = _layout(library)
    entries = _entries(variables, layout, names, transposed)
    leaves = zip(entries, jax.tree.leaves(_variables(variables)), strict=True)
    written = {e.key: _write(e, _array(e.path, leaf), layout) for e, leaf in leaves}
    for place, averages in _averages(entries).items():
        for key, fresh in layout.extras.items():
            array = written[averages[fresh].key] if isinstance(fresh, str) else fresh
            written.setdefault(_full(key, place), array.copy())
    if like is not None:
        _require_mapping("like", like, layout.source)
        written = _as_in(_flatten(like), written, entries, layout, momentum)
    elif layout.needs_like:
        raise ValueError(
            f"like is missing: shapes of {library} depend on more than the variables here. Pass "
            "the arrays of the model there, as it was initialized or trained: like=arrays."
        )
    return _unflatten(written) if library == "haiku" else written


def resnet_names(layer: str) -> str:
    """Names the layers of `bn_jax.lab.models.ResNet18` to `ResNet152` as torchvision does.

    Args:
        layer: a path here.

    Returns:
        The path there.

    Example:
        >>> import bn_jax as bn
        >>> bn.convert.resnet_names("stage0_block1/ConvNorm_2/norm")
        'layer1.1.bn3'
        >>> bn.convert.resnet_names("stage3_block0/shortcut/conv")
        'layer4.0.downsample.0'
    """
    parts = re.fullmatch(r"stage(\d+)_block(\d+)/(ConvNorm_(\d+)|shortcut)/(conv|norm)", layer)
    if parts is None:
        fixed = {"stem/conv": "conv1", "stem/norm": "bn1", "classifier": "fc"}
        return fixed.get(layer, layer.replace("/", "."))
    stage, block, branch, index, kind = parts.groups()
    start = f"layer{int(stage) + 1}.{block}"
    if branch == "shortcut":
        return f"{start}.downsample.{0 if kind == 'conv' else 1}"
    return f"{start}.{'conv' if kind == 'conv' else 'bn'}{int(index) + 1}"


def attributes_from_library(library: Library, **attributes: Any) -> dict[str, Any]:
    """Translates the attributes of another library's batch norm to those of ours.

    `momentum` of PyTorch is the weight of the new value, everywhere else that of the old one, and
    its running variance is unbiased. Haiku and Equinox divide their averages by
    ``1 - momentum**counter``, so that after few steps they differ from ours. Axes, named or not,
    are those of the data and have no translation.

    Args:
        library: whose.
        attributes: arguments of its batch norm by name; what is left out has its default there.

    Returns:
        Attributes for `bn_jax.linen.BatchNorm` and `bn_jax.nnx.BatchNorm`.

    Raises:
        ValueError: an attribute is unknown or missing, or ours have no word for it.

    Example:
        >>> import bn_jax as bn
        >>> layer = bn.linen.BatchNorm(**bn.convert.attributes_from_library("pytorch"))
        >>> layer.momentum, layer.running_var_ddof
        (0.9, 1)
    """
    layout = _layout(library)
    _require_known(attributes, {*layout.attributes, *layout.defaults}, f"{library}'s batch norm")
    given = {**layout.defaults, **attributes}
    if missing := [name for name in layout.attributes if name not in given]:
        raise ValueError(f"attributes {missing} are missing, which {library} has no default for")
    if library == "equinox-ema" or given.get("mode", "batch") != "batch":
        raise ValueError(
            "Equinox's norm in mode 'ema' normalizes by running averages in training too, as "
            "does its default, 'legacy', expected mode='batch': our norm has no such mode. "
            "For evaluation alone translate mode='batch'."
        )
    momentum, epsilon, use_scale, use_bias = (given[name] for name in layout.attributes)
    tracked = given.get("track_running_stats", True)
    return {
        "momentum": _complement(momentum) if layout.of_new else momentum,
        "epsilon": epsilon,
        "use_scale": use_scale,
        "use_bias": use_bias and given.get("affine", True),
        "running_var_ddof": layout.running_var_ddof,
        **({} if tracked else {"use_running_average": False, "update_running_average": False}),
    }


def attributes_to_library(library: Library, **attributes: Any) -> dict[str, Any]:
    """Translates the attributes of our batch norm to those of another library's.

    Args:
        library: whose.
        attributes: `momentum`, `epsilon`, `use_scale`, `use_bias`, `running_var_ddof`,
            `use_running_average` and `update_running_average`, of which the last two say something
            of a layer there only where both are False; what is left out has its default here.

    Returns:
        Arguments of the batch norm there.

    Raises:
        ValueError: an attribute is unknown, or the library has no word for some of them.

    Example:
        >>> import bn_jax as bn
        >>> bn.convert.attributes_to_library("keras", momentum=0.9, use_bias=False)
        {'momentum': 0.9, 'epsilon': 1e-05, 'scale': True, 'center': False}
    """
    layout = _layout(library)
    ours = dict(momentum=0.99, epsilon=1e-5, use_scale=True, use_bias=True, running_var_ddof=0)
    switches = dict(use_running_average=None, update_running_average=None)
    _require_known(attributes, {*ours, *switches}, "bn_jax's BatchNorm")
    given = {**ours, **switches, **attributes}
    momentum, epsilon, use_scale, use_bias, ddof = (given[name] for name in ours)
    untracked = all(given[name] is False for name in switches)
    reasons = {
        f"running_var_ddof={ddof}, expected {layout.running_var_ddof}": (
            ddof != layout.running_var_ddof
        ),
        "momentum=None, expected a number": momentum is None and not layout.of_new,
        f"use_scale={use_scale} with use_bias={use_bias}, expected both or neither": (
            use_scale != use_bias and layout.attributes[2] == layout.attributes[3]
        ),
        "use_bias=True without use_scale=True": (
            use_bias and not use_scale and "affine" in layout.defaults
        ),
        "use_running_average=False with update_running_average=False": (
            untracked and "track_running_stats" not in layout.defaults
        ),
        "batches that are normalized in training by running averages": library == "equinox-ema",
    }
    if unsaid := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(f"{library}'s batch norm cannot say: {'; '.join(unsaid)}.")
    values = (_complement(momentum) if layout.of_new else momentum, epsilon, use_scale, use_bias)
    translated = dict(zip(layout.attributes, values, strict=True))
    if "affine" in layout.defaults and use_scale == use_bias:
        del translated["bias"]  # older versions of PyTorch have no such argument
    if "mode" in layout.defaults:
        translated["mode"] = "batch"
    return {**translated, **({"track_running_stats": False} if untracked else {})}


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Loads a file of arrays that is safe to load from anyone.

    Args:
        path: of a safetensors file.

    Returns:
        Its arrays by their keys, in the dtypes that it has, bfloat16 too.

    Raises:
        ValueError: the file is missing or damaged, is a pickle, which can run any code while it is
            loaded, or is something else.
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
            f"{path} is a pickle, which can run any code while it is loaded, expected safetensors. "
            "If you trust where it comes from, write it anew where PyTorch is installed; of a "
            "checkpoint of more, take its ['state_dict']:\n"
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
            "expected a sound file: fetch or write it again."
        ) from error


def save_safetensors(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Saves arrays as a safetensors file, which PyTorch, Keras and others load without any code.

    Args:
        path: of the file; what is there is replaced.
        arrays: by their keys, e.g. from `to_library`.

    Raises:
        ValueError: a value of `arrays` is a mapping, or a dtype has no place in the format.
        TypeError: `arrays` is no mapping of arrays.
        ImportError: safetensors is not installed.

    Example: see `load_safetensors`.
    """
    safetensors = _import_safetensors()
    _require_mapping("arrays", arrays, "model.state_dict() or to_library(variables, 'pytorch')")
    if nested := [key for key, value in arrays.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"arrays[{nested[0]!r}] is a mapping, expected arrays alone. Convert variables first: "
            "save_safetensors(path, to_library(variables, 'pytorch'))."
        )
    # The format has rows one after the other and the library takes memory as it lies.
    flat = {key: np.asarray(_array(key, value), order="C") for key, value in arrays.items()}
    try:
        safetensors.numpy.save_file(flat, path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"arrays cannot be saved as {path}: {error}") from error


class _Entry(NamedTuple):
    """A leaf: its path, shape and dtype here, its name here, its layer's path and its key there."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    name: str
    place: str
    key: str
    is_transposed: bool
    is_count: bool


def _entries(
    variables: Any, layout: _Layout, names: Names, transposed: str | Iterable[str] | None
) -> list[_Entry]:
    """Says of every leaf, in the order of the tree, where it is there."""
    tree = _variables(variables)
    leaves = [(_parts(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
    is_linen = {parts[0] for parts, _ in leaves} <= {"params", "batch_stats"}
    layers = ["/".join(parts[is_linen:-1]) for parts, _ in leaves]
    siblings: dict[str, set[str]] = {layer: set() for layer in layers}
    for layer, (parts, _) in zip(layers, leaves, strict=True):
        siblings[layer].add(parts[-1])
    _require_names(names, set(layers))
    turned = _transposed(variables, transposed, _convolutions(layers, leaves), layout)
    entries: dict[str, _Entry] = {}
    for layer, (parts, leaf) in zip(layers, leaves, strict=True):
        path, name, place = "/".join(parts), parts[-1], _place(layer, names, layout.separator)
        key = _full(_key(name, siblings[layer], layout, path), place)
        if key in entries:
            raise ValueError(
                f"names takes both {entries[key].path} and {path} to {key}, expected a key each"
            )
        is_transposed = layer in turned and name == "kernel"
        is_count = _is_count(name, siblings[layer])
        shape = tuple(leaf.shape)
        entries[key] = _Entry(path, shape, leaf.dtype, name, place, key, is_transposed, is_count)
    return list(entries.values())


def _convolutions(layers: list[str], leaves: list[tuple[list[str], Any]]) -> set[str]:
    """Returns the layers that may be convolutions by the rank of their kernels."""
    return {
        layer
        for layer, (parts, leaf) in zip(layers, leaves, strict=True)
        if parts[-1] == "kernel" and len(leaf.shape) > 2
    }


def _transposed(
    variables: Any, said: str | Iterable[str] | None, convolutions: set[str], layout: _Layout
) -> set[str]:
    """Returns the transposed convolutions: those that are said, and those that a module knows."""
    if isinstance(variables, nnx.Module):
        found = {
            "/".join(map(str, path))
            for path, module in nnx.iter_modules(variables)
            if isinstance(module, nnx.ConvTranspose) and not module.transpose_kernel
        }
        return found | _matching(said or (), convolutions)
    if said is not None:
        return _matching(said, convolutions)
    is_called_so = re.compile(r"(.*/)?ConvTranspose_\d+").fullmatch
    unsaid = sorted(layer for layer in convolutions if is_called_so(layer))
    if unsaid and layout.transposed != layout.kernel:
        raise ValueError(
            f"transposed is None, but {unsaid} are transposed convolutions by their names: pass "
            f"transposed={unsaid}, without those that have transpose_kernel=True, or transposed=() "
            "if all of them have that."
        )
    return set()


def _matching(patterns: str | Iterable[str], convolutions: set[str]) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matching = {layer for layer in convolutions if fnmatchcase(layer, pattern)}
        if not matching:
            raise ValueError(
                f"transposed has {pattern!r}, expected globs of ConvTranspose layers among those "
                f"with a kernel of rank 3 or more, which are {sorted(convolutions)}"
            )
        found |= matching
    return found


def _is_count(name: str, siblings: set[str]) -> bool:
    """Says whether a leaf counts the batches of the averages beside it."""
    return name == "count" and {"mean", "var"} <= siblings


def _key(name: str, siblings: set[str], layout: _Layout, path: str) -> str:
    """Returns the key there of a leaf by its name here; a name of nobody's stays what it is."""
    is_norm = not siblings & {"kernel", "embedding"}
    names, keys = (_NORM_LEAVES, layout.norm) if is_norm else (_LAYER_LEAVES, layout.layer)
    known = dict(zip(names, keys, strict=False))
    is_count = _is_count(name, siblings)
    if is_count and name not in known:
        raise ValueError(
            f"{path} counts the batches of a cumulative average (momentum=None), which PyTorch "
            "alone has, expected mean and var alone: leave it out."
        )
    if not is_count:
        known.pop("count", None)
    module, separator, _ = layout.layer[1].rpartition(layout.separator)
    return known.get(name, module + separator + name)


def _require_names(names: Names, layers: set[str]) -> None:
    if names is None or callable(names):
        return
    if not isinstance(names, Mapping):
        raise TypeError(
            f"names is a {type(names).__name__}, expected a mapping of paths here to paths there, "
            "a function of a path here, or None"
        )
    if wrong := {start: place for start, place in names.items() if not isinstance(place, str)}:
        raise TypeError(f"names has {wrong}, expected paths there, of type str")
    starts = {
        "",
        *layers,
        *(layer[: at.start()] for layer in layers for at in re.finditer("/", layer)),
    }
    if unknown := [start for start in names if start not in starts]:
        raise ValueError(
            f"names has {unknown}, expected layers here or beginnings of their paths, of which the "
            f"layers are {sorted(layers)}"
        )


def _place(layer: str, names: Names, separator: str) -> str:
    """Returns the path of a layer there."""
    if callable(names):
        place = names(layer)
        if not isinstance(place, str):
            raise TypeError(
                f"names({layer!r}) is {place!r}, expected a str, the path there: return what it "
                f"shall not name as layer.replace('/', {separator!r})"
            )
        return place
    for start in sorted(names or (), key=len, reverse=True):
        if start in ("", layer) or layer.startswith(start + "/"):
            rest = layer.removeprefix(start).strip("/").replace("/", separator)
            return separator.join(part for part in ((names or {})[start], rest) if part)
    return layer.replace("/", separator)


def _averages(entries: list[_Entry]) -> dict[str, dict[str, _Entry]]:
    """Returns the running statistics by the path of their norm there and their name here."""
    found: dict[str, dict[str, _Entry]] = {}
    for entry in entries:
        if entry.name in ("mean", "var"):
            found.setdefault(entry.place, {})[entry.name] = entry
    return {place: averages for place, averages in found.items() if len(averages) == 2}


def _read(
    entry: _Entry,
    found: Mapping[str, np.ndarray],
    layout: _Layout,
    momentum: float,
    dtype: Any = None,
) -> np.ndarray:
    """Takes a leaf from the arrays of a library."""
    array = found[entry.key]
    if entry.is_count:
        return np.full(entry.shape, array, entry.dtype)
    if _is_kernel(entry) and array.shape == _shape_there(entry, layout):
        array = _flipped(array.transpose(_axes(entry, layout)), entry, layout)
    dtype = _dtype_here(array.dtype, entry, dtype)
    counter = found.get(_full(_COUNTER, entry.place))
    if entry.name in ("mean", "var") and counter is not None and counter > 0:
        array = array.astype(_promoted(array.dtype, dtype))
        array = array / array.dtype.type(1 - momentum ** int(counter))
    return np.array(array.reshape(entry.shape), dtype, order="C")


def _dtype_here(dtype: Any, entry: _Entry, wanted: Any) -> Any:
    """Returns the dtype that an array of another gets here."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return dtype
    wanted = dtype if wanted is None else jnp.dtype(wanted)
    if jnp.issubdtype(dtype, jnp.complexfloating) > jnp.issubdtype(wanted, jnp.complexfloating):
        raise TypeError(
            f"dtype={wanted} is real and {entry.key} is {dtype}, expected a complex dtype or None: "
            "imaginary parts would be lost."
        )
    return _promoted(wanted, entry.dtype) if entry.name in ("mean", "var") else wanted


def _promoted(one: Any, other: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, other)


def _write(entry: _Entry, array: np.ndarray, layout: _Layout) -> np.ndarray:
    """Makes of a leaf the array of a library."""
    if entry.is_count:
        counts = np.unique(array)
        if len(counts) > 1:
            raise ValueError(
                f"{entry.path} has the counts {counts.tolist()}, expected one for all features, as "
                "PyTorch has it: features that met a batch that was not finite lag behind."
            )
        return np.array(counts[0], np.int64)
    if _is_kernel(entry):
        there = np.argsort(_axes(entry, layout))
        array = _flipped(array, entry, layout).transpose(there)
    return np.array(array, order="C")


def _as_in(
    like: Mapping[str, Any],
    written: Mapping[str, np.ndarray],
    entries: list[_Entry],
    layout: _Layout,
    momentum: float,
) -> dict[str, np.ndarray]:
    """Returns what was written with the keys and shapes of `like`, and its unchanged statistics."""
    _require_agreement("like", entries, like, layout)
    result = {key: written[key].reshape(np.shape(array)) for key, array in like.items()}
    theirs = {
        key: _array(key, value)
        for key, value in like.items()
        if not isinstance(value, jax.ShapeDtypeStruct)
    }
    ours = {entry.key for entry in entries}
    for place, averages in _averages(entries).items():
        keys = {entry.key for entry in averages.values()}
        if keys <= set(theirs) and all(
            _same(_read(entry, theirs, layout, momentum), written[entry.key])
            for entry in averages.values()
        ):
            keys |= {_full(key, place) for key in layout.extras} - ours
            result |= {key: theirs[key].copy() for key in keys & set(theirs)}
    return result


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def _is_kernel(entry: _Entry) -> bool:
    return entry.name == "kernel" and len(entry.shape) > 1


def _axes(entry: _Entry, layout: _Layout) -> tuple[int, ...]:
    """Returns where a kernel there has its axes, in the order that they have here."""
    order = layout.transposed if entry.is_transposed else layout.kernel
    order = order.replace("s", "s" * (len(entry.shape) - 2))
    spatial = (axis for axis, kind in enumerate(order) if kind == "s")
    return (*spatial, order.index("i"), order.index("o"))


def _flipped(kernel: np.ndarray, entry: _Entry, layout: _Layout) -> np.ndarray:
    if entry.is_transposed and layout.flips:
        return kernel[(slice(None, None, -1),) * (kernel.ndim - 2)]
    return kernel


def _shape_there(entry: _Entry, layout: _Layout) -> tuple[int, ...]:
    if entry.is_count:
        return ()
    if not _is_kernel(entry):
        return entry.shape
    return tuple(entry.shape[axis] for axis in np.argsort(_axes(entry, layout)))


def _fits(shape: tuple[int, ...], entry: _Entry, layout: _Layout) -> bool:
    """Says whether an array there can be a leaf here."""
    if shape == _shape_there(entry, layout):
        return True
    if _is_kernel(entry):
        # In Keras the output of a depthwise convolution is split: by input, then by multiplier.
        may_split = layout.kernel == "sio" and not entry.is_transposed and entry.shape[-2] == 1
        same = (len(shape), shape[:-2]) == (len(entry.shape), entry.shape[:-2])
        return may_split and same and prod(shape[-2:]) == entry.shape[-1]
    wide, narrow = ([size for size in sizes if size != 1] for sizes in (shape, entry.shape))
    return layout.needs_like and wide == narrow


def _require_agreement(
    name: str, entries: list[_Entry], received: Mapping[str, Any], layout: _Layout
) -> None:
    """Raises one error for all keys of the argument `name` that are not as the leaves here."""
    expected = {e.key: f"{_shape_there(e, layout)} for {e.path}" for e in entries}
    places = _averages(entries)
    extras = {_full(key, place) for key in layout.extras for place in places} - set(expected)
    expected |= {key: "() for the averages" for key in extras if key.endswith(_COUNTER[2:])}
    shapes = {key: tuple(np.shape(array)) for key, array in received.items()}
    unknown = [key for key in shapes if key not in expected and key not in extras]
    missing = [key for key in expected if key not in shapes]
    misshaped = [e.key for e in entries if e.key in shapes and not _fits(shapes[e.key], e, layout)]
    if not (unknown or missing or misshaped):
        return
    lines = [f"{name} is not what the variables here are in the other library."]
    lines += [f"missing from {name}, {len(missing)} in all:"] * bool(missing)
    lines += [f"  {key} {expected[key]}{_hint(key, unknown)}" for key in missing]
    lines += [f"unknown in {name}, {len(unknown)} in all:"] * bool(unknown)
    lines += [f"  {key} {shapes[key]}" for key in unknown]
    lines += [f"of another shape in {name}, {len(misshaped)} in all:"] * bool(misshaped)
    lines += [f"  {key} {shapes[key]}, expected {expected[key]}" for key in misshaped]
    lines += [
        "Say with names={'path here': 'path there'} or a function which layer is which, and with "
        "transposed=['path here'] which are ConvTranspose; leave out or rename what is unknown in "
        f"{name} yourself where no name of a layer can say it."
    ]
    raise ValueError("\n".join(lines))


def _hint(key: str, among: list[str]) -> str:
    # Similarity of every pair takes long: where hundreds of keys are unknown, names are wrong.
    near = difflib.get_close_matches(key, among[:100], n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def _layout(library: str) -> _Layout:
    if library not in _LIBRARIES:
        raise ValueError(f"library={library!r}, expected one of {sorted(_LIBRARIES)}")
    return _LIBRARIES[library]


def _variables(tree: Any) -> Any:
    """Returns parameters and running statistics of a model or of its variables."""
    kept = nnx.Any(nnx.Param, nnx.BatchStat)
    if isinstance(tree, nnx.Module):
        return nnx.state(tree, kept)
    if isinstance(tree, nnx.State):
        return nnx.filter_state(tree, nnx.Any(kept, _is_no_variable))
    known = {"params", "batch_stats"}
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"the variables are a {type(tree).__name__}, expected those of Linen, a mapping of "
            "params and batch_stats, an nnx.Module, its nnx.State or pure dictionary"
        )
    if set(tree) & known and not set(tree) <= known:
        raise ValueError(
            f"the variables have the collections {sorted(tree)}, expected {sorted(known)}: pass "
            f"{{name: variables[name] for name in {sorted(set(tree) & known)}}}"
        )
    return tree


def _is_no_variable(_: tuple[Any, ...], leaf: Any) -> bool:
    return not isinstance(leaf, nnx.Variable)


def _parts(path: tuple[Any, ...]) -> list[str]:
    # An nnx.Variable or a box of Linen's has its value as an attribute.
    inside = isinstance(path[-1], jax.tree_util.GetAttrKey)
    return [format_path((key,)) for key in (path[:-1] if inside else path)]


def _full(key: str, place: str) -> str:
    """Returns a key of a layer at a path there, also of the top-level layer."""
    return key.format(place) if place else key.replace("{}.", "").replace("{}/", "")


def _flatten(arrays: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in arrays.items():
        nested = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{key}/") if nested else {f"{prefix}{key}": value}
    return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what Haiku has: collections of modules of arrays."""
    tree: dict[str, Any] = {"params": {}, "state": {}}
    for key, array in flat.items():
        collection, _, path = key.partition("/")
        module, _, name = path.rpartition("/")
        tree[collection].setdefault(module, {})[name] = array
    return tree


def _array(key: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except jax.errors.TracerArrayConversionError as error:
        raise TypeError(
            f"{key} is traced, expected an array: call bn_jax.convert outside of jit"
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        advice = (
            ". A model of PyTorch goes through a file: safetensors.torch.save_file("
            f"{_STATE_DICT}, path), then load_safetensors(path)."
        )
        is_of_pytorch = type(value).__module__.partition(".")[0] == "torch"
        raise TypeError(
            f"{key} is a {type(value).__name__} that NumPy cannot take ({error}), expected an array"
            + advice * is_of_pytorch
        ) from error
    if array.dtype == object:
        raise TypeError(f"{key} is a {type(value).__name__}, expected an array")
    return array


def _complement(momentum: float | None) -> float | None:
    """Returns 1 - momentum as one would write it: of 0.9, 0.1, which 1 - 0.9 is not."""
    return None if momentum is None else float(1 - Decimal(str(momentum)))


def _require_mapping(name: str, received: Any, source: str) -> None:
    if not isinstance(received, Mapping):
        raise TypeError(
            f"{name} is a {type(received).__name__}, expected a mapping of arrays by their keys: "
            f"pass {source}"
        )


def _require_known(attributes: Mapping[str, Any], known: set[str], whose: str) -> None:
    if unknown := sorted(set(attributes) - known):
        raise ValueError(f"{whose} has the attributes {unknown}, expected some of {sorted(known)}")


def _import_safetensors() -> Any:
    try:
        importlib.import_module("safetensors.numpy")
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            "safetensors is not installed. Install it: pip install 'bn-jax[convert]'"
        ) from error


def _is_pickle(path: Path) -> bool:
    """Says whether a file is a pickle, by its content, or else by its name."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors: the length of a header in 8 bytes, then the header
        return False
    try:
        with ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except BadZipFile:
        is_opcode = len(start) > 1 and start[0] == 0x80 and start[1] <= 5
        return is_opcode or path.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".pkl")
