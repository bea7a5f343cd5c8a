"""The attributes of a batch norm, from and to other libraries."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from bn_jax.convert.layouts import Layout, Library, layout_of

# The defaults of bn_jax.linen.BatchNorm and bn_jax.nnx.BatchNorm.
_DEFAULTS: Mapping[str, Any] = dict(
    momentum=0.99,
    epsilon=1e-5,
    use_scale=True,
    use_bias=True,
    running_var_ddof=0,
    use_running_average=None,
    update_running_average=None,
)


def attributes_from_library(library: Library, **attributes: Any) -> dict[str, Any]:
    """Translates the attributes of another library's batch norm into those of `bn_jax`.

    In PyTorch `momentum` is the weight of the new value and the running variance is unbiased;
    everywhere else `momentum` is the weight of the old value. Haiku and Equinox divide their
    averages by ``1 - momentum**counter``, so that they differ from those of `bn_jax` after few
    steps. Axes, named or not, depend on the layout of the data and are not translated.

    Args:
        library: the library that the attributes come from.
        attributes: arguments of its batch norm by name; the others have their defaults there.

    Returns:
        Attributes for `bn_jax.linen.BatchNorm` and `bn_jax.nnx.BatchNorm`.

    Raises:
        ValueError: an attribute is unknown or missing, or has no counterpart in `bn_jax`.

    Example:
        >>> import bn_jax as bn
        >>> layer = bn.linen.BatchNorm(**bn.convert.attributes_from_library("pytorch"))
        >>> layer.momentum, layer.running_var_ddof
        (0.9, 1)
    """
    layout = layout_of(library)
    names = layout.attributes
    _require_known(attributes, {*names.values(), *layout.defaults}, f"{library}'s batch norm")
    values = {**layout.defaults, **attributes}
    if missing := [name for name in names.values() if name not in values]:
        raise ValueError(f"attributes {missing} are missing, which {library} has no default for")
    mode = values.get("mode", "batch")
    if mode != "batch":
        raise ValueError(
            f"mode={mode!r}, expected 'batch': in its modes 'ema' and 'legacy', the default, "
            "Equinox's norm normalizes by running averages in training too, which bn_jax does "
            "not. If the model is only evaluated here, pass mode='batch'."
        )
    translated = {ours: values[theirs] for ours, theirs in names.items()}
    translated["use_bias"] = translated["use_bias"] and values.get("affine", True)
    translated["running_var_ddof"] = layout.running_var_ddof
    if layout.momentum_weighs_new:
        translated["momentum"] = _complement(translated["momentum"])
    if not values.get("track_running_stats", True):
        translated |= {"use_running_average": False, "update_running_average": False}
    return translated


def attributes_to_library(library: Library, **attributes: Any) -> dict[str, Any]:
    """Translates the attributes of a batch norm of `bn_jax` into those of another library's.

    Args:
        library: the library to translate to.
        attributes: `momentum`, `epsilon`, `use_scale`, `use_bias`, `running_var_ddof`,
            `use_running_average` and `update_running_average`; the others have their defaults. The
            last two are translated only if both are False; otherwise they say how a layer is
            called, not what it is.

    Returns:
        Arguments of the library's batch norm.

    Raises:
        ValueError: an attribute is unknown, or has no counterpart in the library.

    Example:
        >>> import bn_jax as bn
        >>> bn.convert.attributes_to_library("keras", momentum=0.9, use_bias=False)
        {'momentum': 0.9, 'epsilon': 1e-05, 'scale': True, 'center': False}
    """
    layout = layout_of(library)
    _require_known(attributes, set(_DEFAULTS), "bn_jax's BatchNorm")
    values = {**_DEFAULTS, **attributes}
    obstacles = _obstacles(values, library, layout)
    if obstacles:
        raise ValueError(f"{library}'s batch norm does not support {'; '.join(obstacles)}.")
    if layout.momentum_weighs_new:
        values["momentum"] = _complement(values["momentum"])
    translated = {theirs: values[ours] for ours, theirs in layout.attributes.items()}
    if "affine" in layout.defaults and values["use_scale"] == values["use_bias"]:
        del translated["bias"]  # older versions of PyTorch have no such argument
    if "mode" in layout.defaults:
        translated["mode"] = "batch"
    if _is_untracked(values):
        translated["track_running_stats"] = False
    return translated


def _obstacles(values: Mapping[str, Any], library: Library, layout: Layout) -> list[str]:
    """Returns what a library's batch norm cannot be told."""
    use_scale, use_bias = values["use_scale"], values["use_bias"]
    ddof = values["running_var_ddof"]
    obstacles = []
    if ddof != layout.running_var_ddof:
        obstacles.append(f"running_var_ddof={ddof}, expected {layout.running_var_ddof}")
    if values["momentum"] is None and not layout.momentum_weighs_new:
        obstacles.append("momentum=None, expected a number")
    names = layout.attributes
    if use_scale != use_bias and names["use_scale"] == names["use_bias"]:
        obstacles.append(
            f"use_scale={use_scale} with use_bias={use_bias}, expected both or neither"
        )
    if use_bias and not use_scale and "affine" in layout.defaults:
        obstacles.append("use_bias=True without use_scale=True")
    if _is_untracked(values) and "track_running_stats" not in layout.defaults:
        obstacles.append("use_running_average=False with update_running_average=False")
    if library == "equinox-ema":
        obstacles.append("normalizing by the batch in training, expected 'equinox'")
    return obstacles


def _is_untracked(values: Mapping[str, Any]) -> bool:
    return values["use_running_average"] is False and values["update_running_average"] is False


def _complement(momentum: float | None) -> float | None:
    """Returns 1 - momentum as a decimal number: 0.1 for 0.9, where 1 - 0.9 is not 0.1."""
    return None if momentum is None else float(1 - Decimal(str(momentum)))


def _require_known(attributes: Mapping[str, Any], known: set[str], owner: str) -> None:
    if unknown := sorted(set(attributes) - known):
        raise ValueError(f"{owner} has the attributes {unknown}, expected some of {sorted(known)}")
