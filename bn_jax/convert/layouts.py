"""How each library lays out its arrays: one description per library, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

__all__ = [
    "LAYOUTS",
    "AttributeNames",
    "Extra",
    "LayerKeys",
    "Layout",
    "Library",
    "NormKeys",
    "layout_of",
]

Library: TypeAlias = Literal["pytorch", "keras", "haiku", "equinox", "equinox-ema"]

# Haiku and Equinox divide an average by 1 - momentum**counter. Our averages start from initial
# values and need no division. After this many steps the divisor is 1, and the counter can still
# grow without reaching the end of int32.
SETTLED_COUNTER = 10**9


@dataclass(frozen=True)
class NormKeys:
    """Templates of the keys of a norm; ``{}`` stands for the path of the layer.

    Attributes:
        scale: the key of the scale.
        bias: the key of the bias.
        mean: the key of the running mean.
        var: the key of the running variance.
        count: the key of the number of batches in a cumulative average; None if there is none.
    """

    scale: str
    bias: str
    mean: str
    var: str
    count: str | None = None


@dataclass(frozen=True)
class LayerKeys:
    """Templates of the keys of any other layer.

    Attributes:
        kernel: the key of the kernel.
        bias: the key of the bias.
        embedding: the key of an embedding table.
    """

    kernel: str
    bias: str
    embedding: str


class Extra(NamedTuple):
    """A part of a norm's running statistics that Flax does not have.

    Attributes:
        key: the template of its key.
        fresh: its value for averages that were taken in Flax.
        copy_of: the statistic that it repeats, where it has no value of its own.
    """

    key: str
    fresh: np.ndarray | None = None
    copy_of: Literal["mean", "var"] | None = None


class AttributeNames(NamedTuple):
    """The names of a batch norm's attributes, by what Flax calls them.

    Attributes:
        momentum: the name of `momentum`.
        epsilon: the name of `epsilon`.
        use_scale: the name of `use_scale`.
        use_bias: the name of `use_bias`, which may be that of `use_scale`.
    """

    momentum: str
    epsilon: str
    use_scale: str
    use_bias: str


class Layout(NamedTuple):
    """How a library lays out its arrays, and what it calls the attributes of a batch norm.

    Attributes:
        norm: the keys of a norm.
        layer: the keys of the other layers.
        kernel: the axes of a kernel: ``s`` all spatial axes, ``i`` the inputs, ``o`` the outputs.
            Flax has ``sio``.
        transposed_kernel: the axes of the kernel of a transposed convolution.
        flips_transposed: whether a transposed convolution reads its kernel backwards, compared
            with Flax.
        extras: what a norm's statistics have beside mean and variance.
        attributes: the names of a batch norm's attributes.
        defaults: the default values of a batch norm's attributes.
        source: the expression that gives the arrays of a model.
        separator: the text between the parts of a layer's path.
        counter: the template of the key of the number of steps, if the stored averages are still
            to be divided by ``1 - momentum**counter``.
        momentum_weighs_new: whether momentum is the weight of the new value.
        running_var_ddof: 1 if the running variance is unbiased, else 0.
        needs_like: whether shapes depend on more than the variables of Flax know.
    """

    norm: NormKeys
    layer: LayerKeys
    kernel: str
    transposed_kernel: str
    flips_transposed: bool
    extras: tuple[Extra, ...]
    attributes: AttributeNames
    defaults: Mapping[str, Any]
    source: str
    separator: str = "."
    counter: str | None = None
    momentum_weighs_new: bool = False
    running_var_ddof: int = 0
    needs_like: bool = False


_PYTORCH = Layout(
    norm=NormKeys(
        scale="{}.weight",
        bias="{}.bias",
        mean="{}.running_mean",
        var="{}.running_var",
        count="{}.num_batches_tracked",
    ),
    layer=LayerKeys(kernel="{}.weight", bias="{}.bias", embedding="{}.weight"),
    kernel="ois",
    transposed_kernel="ios",
    flips_transposed=True,
    extras=(Extra("{}.num_batches_tracked", np.array(0, np.int64)),),
    attributes=AttributeNames("momentum", "eps", "affine", "bias"),
    defaults=dict(momentum=0.1, eps=1e-5, affine=True, bias=True, track_running_stats=True),
    source="model.state_dict()",
    momentum_weighs_new=True,
    running_var_ddof=1,
)

_KERAS = Layout(
    norm=NormKeys(
        scale="{}/gamma", bias="{}/beta", mean="{}/moving_mean", var="{}/moving_variance"
    ),
    layer=LayerKeys(kernel="{}/kernel", bias="{}/bias", embedding="{}/embeddings"),
    kernel="sio",
    transposed_kernel="soi",
    flips_transposed=True,
    extras=(),
    attributes=AttributeNames("momentum", "epsilon", "scale", "center"),
    defaults=dict(momentum=0.99, epsilon=1e-3, scale=True, center=True),
    source="{w.path: w.numpy() for w in model.weights}",
    separator="/",
)

_HAIKU = Layout(
    norm=NormKeys(
        scale="params/{}/scale",
        bias="params/{}/offset",
        mean="state/{}/~/mean_ema/average",
        var="state/{}/~/var_ema/average",
    ),
    layer=LayerKeys(kernel="params/{}/w", bias="params/{}/b", embedding="params/{}/embeddings"),
    kernel="sio",
    transposed_kernel="soi",
    flips_transposed=False,
    # `average` is `hidden` after the division, which the counter turns off.
    extras=(
        Extra("state/{}/~/mean_ema/hidden", copy_of="mean"),
        Extra("state/{}/~/mean_ema/counter", np.array(SETTLED_COUNTER, np.int32)),
        Extra("state/{}/~/var_ema/hidden", copy_of="var"),
        Extra("state/{}/~/var_ema/counter", np.array(SETTLED_COUNTER, np.int32)),
    ),
    attributes=AttributeNames("decay_rate", "eps", "create_scale", "create_offset"),
    defaults=dict(eps=1e-5),
    source='{"params": params, "state": state}',
    separator="/",
    needs_like=True,
)

_EQUINOX = Layout(
    norm=NormKeys(
        scale="{}.weight",
        bias="{}.bias",
        mean="{}.batch_state_index.0",
        var="{}.batch_state_index.1",
    ),
    layer=LayerKeys(kernel="{}.weight", bias="{}.bias", embedding="{}.weight"),
    kernel="ois",
    transposed_kernel="ois",
    flips_transposed=False,
    extras=(Extra("{}.batch_counter", np.array(SETTLED_COUNTER, np.int32)),),
    attributes=AttributeNames("momentum", "eps", "channelwise_affine", "channelwise_affine"),
    defaults=dict(momentum=0.99, eps=1e-5, channelwise_affine=True, mode="legacy"),
    source="its leaves by their path, as the docstring of bn_jax.convert makes them",
    counter="{}.batch_counter",
    needs_like=True,
)

_EQUINOX_EMA = _EQUINOX._replace(
    norm=replace(_EQUINOX.norm, mean="{}.ema_state_index.0", var="{}.ema_state_index.1"),
    extras=(Extra("{}.ema_first_time_index", np.array(False)),),
    counter=None,
)

LAYOUTS = {
    "pytorch": _PYTORCH,
    "keras": _KERAS,
    "haiku": _HAIKU,
    "equinox": _EQUINOX,
    "equinox-ema": _EQUINOX_EMA,
}


def layout_of(library: str) -> Layout:
    """Returns the layout of a library; the error for an unknown one lists all."""
    if library not in LAYOUTS:
        raise ValueError(f"library={library!r}, expected one of {sorted(LAYOUTS)}")
    return LAYOUTS[library]
