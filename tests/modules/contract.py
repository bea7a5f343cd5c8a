"""The table of the compatibility contract: a row for each of Flax's ten norms and ours."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import define_standardized, standard_normal

import bn_jax as bn

SHAPE = (4, 3, 5, 6)
X = standard_normal(0, SHAPE)
MASK = standard_normal(1, SHAPE) > -1
FLAX = {"linen": nn, "nnx": nnx}
OURS = {"linen": bn.linen, "nnx": bn.nnx}


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """A row of the contract: one of Flax's modules, and ours of the same name.

    Attributes:
        required: what the tests construct it with.
        attributes: all of Flax's, so that a new one is looked at before it is inherited.
        added: our attributes beyond Flax's.
        variables: the shape of every variable.
        axes: attributes that choose axes and groups; the first two are tested with a mask as well.
        variants: other attributes.
        reduced: the axes that the statistics are over, of `X` with its groups on an axis.
    """

    api: str
    name: str
    required: dict[str, Any]
    attributes: set[str]
    variables: dict[str, Any]
    axes: list[dict[str, Any]]
    variants: list[dict[str, Any]]
    reduced: tuple[int, ...]
    added: set[str] = dataclasses.field(default_factory=set)

    @property
    def ours(self) -> Any:
        return getattr(OURS[self.api], self.name)

    @property
    def flax(self) -> Any:
        return getattr(FLAX[self.api], self.name)

    @property
    def kinds(self) -> tuple[Any, Any]:
        return self.ours, self.flax

    def make(self, kind, **options):
        how = {"rngs": nnx.Rngs(0)} if self.api == "nnx" else {}
        return kind(**{**self.required, **options, **how})

    def init(self, kind, x=X, **options):
        """The initial variables as plain nested dictionaries."""
        layer = self.make(kind, **options)
        if self.api == "linen":
            return layer.init(jax.random.key(0), x)
        return nnx.to_pure_dict(nnx.state(layer))

    def call(self, kind, variables, x, mask=None, **options):
        """The output and the new variables, as a function of the old."""
        layer = self.make(kind, **options)
        if self.api == "linen":
            y, updates = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
            return y, {**variables, **updates}
        state = nnx.state(layer)
        nnx.replace_by_pure_dict(state, variables)
        nnx.update(layer, state)
        y = layer(x, mask=mask)
        return y, nnx.to_pure_dict(nnx.state(layer))

    def outcome(self, kind, variables, x, mask=None, **options):
        """The gradients in variables and x, the output, and the new variables."""

        def loss(variables, x):
            y, updated = self.call(kind, variables, x, mask, **options)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, updated)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, x)

    def define(self, x, mask=None):
        """The output of the initial layer in float64, from the definition."""
        shape = x.shape
        weight = np.broadcast_to(1.0 if mask is None else mask, shape)
        if self.name == "GroupNorm":
            x, weight = (values.reshape(*shape[:-1], 2, 3) for values in (x, weight))
        epsilon = 1e-5 if self.name == "BatchNorm" else 1e-6
        return define_standardized(
            x, self.reduced, weight, epsilon, about_zero=self.name == "RMSNorm"
        ).reshape(shape)


SCALE = {
    "epsilon", "dtype", "param_dtype", "use_scale", "scale_init", "axis_name", "axis_index_groups",
    "use_fast_variance",
}  # fmt: skip
BIAS = {"use_bias", "bias_init"}
OF_API = {
    "linen": {"force_float32_reductions", "parent", "name"},
    "nnx": {"num_features", "promote_dtype", "rngs", "scale_metadata"},
}
NORMAL, UNIFORM = nn.initializers.normal(), nn.initializers.uniform()


def promote_and_double(values, *, dtype):
    """In place of a promotion, what shows whether and on what it was called."""
    return tuple(None if one is None else 2 * one for one in values)


OFTEN: list[dict[str, Any]] = [
    {"epsilon": 1e-2, "use_fast_variance": False},
    {"use_scale": False},
]
WITH_BIAS: list[dict[str, Any]] = [
    {"use_bias": False, "scale_init": NORMAL},
    {"use_scale": False, "use_bias": False},
]
OFTEN_OF_API: dict[str, list[dict[str, Any]]] = {
    "linen": [
        {"force_float32_reductions": False},
        {"scale_init": nn.with_partitioning(NORMAL, ("model",)), "param_dtype": jnp.bfloat16},
    ],
    "nnx": [{"promote_dtype": promote_and_double}, {"scale_metadata": {"note": "kept"}}],
}
BATCH: list[dict[str, Any]] = [{}, {"use_running_average": True}, {"momentum": 0.5}]
BATCH_OF_API: dict[str, list[dict[str, Any]]] = {
    "linen": [{"axis": 1}, {"axis": 0}, {"axis": (1, 2)}, {"axis": (-1, 1)}],
    "nnx": [{"axis": 1, "num_features": 3}, {"axis": 0, "num_features": 4}],
}
LAYER: list[dict[str, Any]] = [
    {}, {"reduction_axes": [1, 2]}, {"reduction_axes": (1, 2, 3)}, {"reduction_axes": (-1, 0)},
    {"reduction_axes": 1, "use_fast_variance": False},
]  # fmt: skip
LAYER_OF_API: dict[str, list[dict[str, Any]]] = {
    "linen": [
        {"feature_axes": 1}, {"reduction_axes": (2, 3), "feature_axes": (2, 3)},
        {"feature_axes": (-1, 1)},
    ],
    "nnx": [
        {"feature_axes": 1, "num_features": 3},
        {"reduction_axes": (2, 3), "feature_axes": (2, 3), "num_features": 30},
    ],
}  # fmt: skip
GROUP: list[dict[str, Any]] = [
    {}, {"num_groups": None, "group_size": 2}, {"num_groups": 1}, {"num_groups": 6},
    {"reduction_axes": (1, 2, 3)},
]  # fmt: skip
GROUP_OF_API: dict[str, list[dict[str, Any]]] = {
    "linen": [
        {"reduction_axes": (2, 3)},
        {"reduction_axes": (-1,), "use_fast_variance": False},
        {"reduction_axes": (0, 3)},
    ],
    "nnx": [],
}
INSTANCE_OF_API: dict[str, list[dict[str, Any]]] = {
    "linen": [{}, {"feature_axes": 1}, {"feature_axes": (1, -1)}],
    "nnx": [{}, {"feature_axes": 1, "num_features": 3}],
}


def rows(api):
    """The five norms of one of Flax's two interfaces."""
    features = {"num_features": 6} if api == "nnx" else {}
    with_bias = {"bias_metadata"} | BIAS if api == "nnx" else BIAS
    shared, scale, bias = SCALE | OF_API[api], {"scale": (6,)}, {"bias": (6,)}
    stats = {"mean": (6,), "var": (6,)}

    def variables(params, stats=None):
        if api == "nnx":
            return {**params, **(stats or {})}
        return {"params": params, **({} if stats is None else {"batch_stats": stats})}

    often = OFTEN + OFTEN_OF_API[api]
    bias_of_api = {"bias_metadata": {"note": "kept"}} if api == "nnx" else {}
    variants = [*often, *WITH_BIAS, {"bias_init": UNIFORM, **bias_of_api}]
    return [
        Norm(
            api, "BatchNorm", {"use_running_average": False, **features},
            shared | with_bias | {"use_running_average", "axis", "momentum"},
            variables({**scale, **bias}, stats), BATCH + BATCH_OF_API[api], variants,
            reduced=(0, 1, 2),
            added={
                "activation", "virtual_batch_size", "running_var_ddof", "update_running_average",
                "train_params", "frozen",
            },
        ),
        Norm(
            api, "LayerNorm", features, shared | with_bias | {"reduction_axes", "feature_axes"},
            variables({**scale, **bias}), LAYER + LAYER_OF_API[api], variants, reduced=(3,),
        ),
        Norm(
            api, "RMSNorm", features, shared | {"reduction_axes", "feature_axes"},
            variables(scale), LAYER + LAYER_OF_API[api], often, reduced=(3,),
        ),
        Norm(
            api, "GroupNorm", {"num_groups": 2, **features},
            shared | with_bias | {"num_groups", "group_size", "reduction_axes"},
            variables({**scale, **bias}), GROUP + GROUP_OF_API[api], variants,
            reduced=(1, 2, 4),
        ),
        Norm(
            api, "InstanceNorm", features, shared | with_bias | {"feature_axes"},
            variables({**scale, **bias}), INSTANCE_OF_API[api], variants, reduced=(1, 2),
        ),
    ]  # fmt: skip


NORMS = {f"{norm.api}.{norm.name}": norm for norm in rows("linen") + rows("nnx")}


def written(options):
    return ", ".join(f"{name}={getattr(v, '__name__', v)}" for name, v in options.items())


every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
