"""How each library lays out its arrays: one description per library, as data."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

Library: TypeAlias = Literal["pytorch", "keras", "haiku", "equinox", "equinox-ema"]

# Haiku and Equinox divide an average by 1 - momentum**counter. Our averages start from initial
# values and need no division. After this many steps the divisor is 1, and the counter can still
# grow without reaching the end of int32.
SETTLED_COUNTER = 10**9


# By the name of a leaf in Flax, the template of its key; ``{}`` stands for the path of the layer.
Keys: TypeAlias = Mapping[str, str]


class Extra(NamedTuple):
    """A part of a norm's running statistics that Flax does not have."""

    key: str  # the template of its key
    fresh: np.ndarray | None = None  # its value for averages that were taken in Flax
    # The statistic that it repeats, where it has no value of its own.
    copy_of: Literal["mean", "var"] | None = None
    untrained: int | None = None  # its value before the first step, if no other means that


class Alternative(NamedTuple):
    """Another key that some layers of a library have, taken where the arrays have it."""

    name: str  # the name of the leaf in Flax
    key: str  # the template of its key; ``{parent}`` stands for the path around that of the layer
    layer: str = ""  # the last part of the layer's path in the library; empty: any


class NormsOfDomains(NamedTuple):
    """Where a library keeps the norms of several domains, which are one norm here."""

    # The template of the path of each norm after the first ones; ``{number}`` counts from 0.
    others: str
    first: tuple[str, ...] = ()  # the templates of the paths of the first norms


class Layout(NamedTuple):
    """How a library lays out its arrays, and what it calls the attributes of a batch norm."""

    # The keys of a norm's scale, bias and statistics, and of the slope of a PReLU; in PyTorch also
    # of the count of batches in a cumulative average.
    norm: Keys
    layer: Keys  # the keys of the kernel, bias and embedding of any other layer
    # The axes of a kernel: ``s`` all spatial axes, ``i`` the inputs, ``o`` the outputs. Flax has
    # ``sio``.
    kernel: str
    transposed_kernel: str  # the axes of the kernel of a transposed convolution
    # Whether a transposed convolution reads its kernel backwards, compared with Flax.
    flips_transposed: bool
    extras: tuple[Extra, ...]  # what a norm's statistics have beside mean and variance
    # By the name of a batch norm's attribute in Flax, its name in the library. It may have one name
    # for `use_scale` and `use_bias`.
    attributes: Mapping[str, str]
    defaults: Mapping[str, Any]  # the default values of a batch norm's attributes
    source: str  # the expression that gives the arrays of a model
    separator: str = "."  # the text between the parts of a layer's path
    # The template of the key of the number of steps, if the stored averages are still to be divided
    # by ``1 - momentum**counter``.
    counter: str | None = None
    momentum_weighs_new: bool = False  # whether momentum is the weight of the new value
    running_var_ddof: int = 0  # 1 if the running variance is unbiased, else 0
    needs_like: bool = False  # whether shapes depend on more than the variables of Flax know
    alternatives: tuple[Alternative, ...] = ()
    keeps_dense_axes: bool = False  # whether kernels of `DenseGeneral` have the axes that Flax has
    domains: tuple[NormsOfDomains, ...] = ()  # where the norms of several domains may be


_PYTORCH = Layout(
    norm=dict(
        scale="{}.weight",
        bias="{}.bias",
        mean="{}.running_mean",
        var="{}.running_var",
        count="{}.num_batches_tracked",
        negative_slope="{}.weight",
    ),
    layer=dict(kernel="{}.weight", bias="{}.bias", embedding="{}.weight"),
    kernel="ois",
    transposed_kernel="ios",
    flips_transposed=True,
    extras=(Extra("{}.num_batches_tracked", np.array(0, np.int64)),),
    attributes=dict(momentum="momentum", epsilon="eps", use_scale="affine", use_bias="bias"),
    defaults=dict(momentum=0.1, eps=1e-5, affine=True, bias=True, track_running_stats=True),
    source="model.state_dict()",
    momentum_weighs_new=True,
    running_var_ddof=1,
    domains=(
        NormsOfDomains("{}.aux_bn.{number}", ("{}",)),  # SplitBatchNorm2d of timm
        NormsOfDomains("{}.{number}"),  # ModuleList
    ),
)

_KERAS = Layout(
    norm=dict(
        scale="{}/gamma",
        bias="{}/beta",
        mean="{}/moving_mean",
        var="{}/moving_variance",
        negative_slope="{}/alpha",
    ),
    layer=dict(kernel="{}/kernel", bias="{}/bias", embedding="{}/embeddings"),
    kernel="sio",
    transposed_kernel="soi",
    flips_transposed=True,
    extras=(),
    attributes=dict(momentum="momentum", epsilon="epsilon", use_scale="scale", use_bias="center"),
    defaults=dict(momentum=0.99, epsilon=1e-3, scale=True, center=True),
    source="{w.path: w.numpy() for w in model.weights}",
    separator="/",
    alternatives=(
        Alternative("scale", "{}/scale"),  # RMSNormalization
        Alternative("kernel", "{}_kernel", "depthwise"),  # SeparableConv
        Alternative("kernel", "{}_kernel", "pointwise"),
        Alternative("bias", "{parent}/bias", "pointwise"),
    ),
    keeps_dense_axes=True,
)

_HAIKU = Layout(
    norm=dict(
        scale="params/{}/scale",
        bias="params/{}/offset",
        mean="state/{}/~/mean_ema/average",
        var="state/{}/~/var_ema/average",
    ),
    layer=dict(kernel="params/{}/w", bias="params/{}/b", embedding="params/{}/embeddings"),
    kernel="sio",
    transposed_kernel="soi",
    flips_transposed=False,
    # `average` is `hidden` after the division, which the counter turns off.
    extras=(
        Extra("state/{}/~/mean_ema/hidden", copy_of="mean"),
        Extra("state/{}/~/mean_ema/counter", np.array(SETTLED_COUNTER, np.int32), untrained=0),
        Extra("state/{}/~/var_ema/hidden", copy_of="var"),
        Extra("state/{}/~/var_ema/counter", np.array(SETTLED_COUNTER, np.int32)),
    ),
    attributes=dict(
        momentum="decay_rate", epsilon="eps", use_scale="create_scale", use_bias="create_offset"
    ),
    defaults=dict(eps=1e-5),
    source='{"params": params, "state": state}',
    separator="/",
    needs_like=True,
)

_EQUINOX = Layout(
    norm=dict(
        scale="{}.weight",
        bias="{}.bias",
        mean="{}.batch_state_index.0",
        var="{}.batch_state_index.1",
    ),
    layer=dict(kernel="{}.weight", bias="{}.bias", embedding="{}.weight"),
    kernel="ois",
    transposed_kernel="ois",
    flips_transposed=False,
    extras=(Extra("{}.batch_counter", np.array(SETTLED_COUNTER, np.int32), untrained=0),),
    attributes=dict(
        momentum="momentum",
        epsilon="eps",
        use_scale="channelwise_affine",
        use_bias="channelwise_affine",
    ),
    defaults=dict(momentum=0.99, eps=1e-5, channelwise_affine=True, mode="legacy"),
    source="its leaves by their path, as the docstring of bn_jax.convert makes them",
    counter="{}.batch_counter",
    needs_like=True,
)

_EQUINOX_EMA = _EQUINOX._replace(
    norm={**_EQUINOX.norm, "mean": "{}.ema_state_index.0", "var": "{}.ema_state_index.1"},
    extras=(Extra("{}.ema_first_time_index", np.array(False)),),
    defaults={**_EQUINOX.defaults, "mode": "ema"},
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
