"""A Linen and an NNX layer with the same handles, so that a test is written once for both.

A layer here is an object with state, as in NNX: a call in training updates its statistics. What a
transform does with it is written as a function of a layer and a batch, a way: `layer.gradient`
differentiates one, and the tables below hold those that are the same for both interfaces and those
of the transforms that Flax lifts.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from support import far_from_initial, standard_normal

import bn_jax as bn
from bn_jax._core.running import start_measuring

FEATURES = 3


def copied(tree):
    """Copies, which a donation or an update leaves alone."""
    return jax.tree.map(np.array, tree)


def total(y):
    """A scalar that every output enters."""
    return jnp.sum(jnp.sin(y.astype(jnp.float32)))


class Linen:
    """A Linen layer together with its variables."""

    api = "linen"
    ours: ClassVar[Any] = bn.linen.BatchNorm
    flax: ClassVar[Any] = nn.BatchNorm

    def __init__(self, kind=bn.linen.BatchNorm, *, fresh=False, x_dtype=jnp.float32, **options):
        self.layer = kind(**{"use_running_average": False, **options})
        unset = self.layer.use_running_average is None
        mode = {"use_running_average": True} if unset else {}
        x = jnp.ones((2, FEATURES), x_dtype)
        self.state = self.layer.init(jax.random.key(0), x, **mode)
        if not fresh:
            self.state = far_from_initial(self.state)

    @classmethod
    def ensemble(cls, *shape):
        """A layer for each index, each with its own variables."""
        members = copy.copy(cls())
        lifted = members.lifted(len(shape))
        variables = lifted.init(jax.random.key(0), jnp.ones((*shape, 2, FEATURES)))
        members.state = jax.tree.map(
            lambda leaf: leaf + standard_normal(28, leaf.shape) ** 2, variables
        )
        return members

    def lifted(self, depth):
        kind = bn.linen.BatchNorm
        for _ in range(depth):
            kind = nn.vmap(kind, **STACKED)
        return kind(use_running_average=False)

    def __call__(self, x, **call):
        y, self.state = self.pure()(self.state, x, **call)
        return y

    def pure(self, apply=None):
        """The layer as a function of its state and a batch to an output and the new state."""
        apply = apply or self.layer.apply

        def call(variables, x, **options):
            y, updates = apply(variables, x, mutable=["batch_stats"], **options)
            return y, {**variables, **updates}

        return call

    @property
    def params(self):
        return copied(self.state.get("params", {}))

    @property
    def stats(self):
        stats = copied(self.state.get("batch_stats", {}))
        return {name: stats[name] for name in ("mean", "var", "count") if name in stats}

    @property
    def measured(self):
        return self.state["batch_stats"]["measured"]

    def start_measuring(self):
        # A norm that neither reads nor updates statistics is initialized without them.
        stats = self.state.get("batch_stats") or bn.init_batch_stats(self.params["scale"].size)
        self.state = {**self.state, "batch_stats": start_measuring(stats)}
        return self

    def evaluating(self):
        evaluating = copy.copy(self)
        evaluating.layer = self.layer.clone(use_running_average=True)
        return evaluating

    def gradient(self, way, x, *, jit=True):
        """The derivatives of `total` by params and by x, and the output; updates the statistics."""

        def loss(params, x):
            inner = copy.copy(self)
            inner.state = {**self.state, "params": params}
            y = way(inner, x)
            return total(y), (y, inner.state)

        differentiate = jax.grad(loss, argnums=(0, 1), has_aux=True)
        differentiate = jax.jit(differentiate) if jit else differentiate
        gradients, (y, self.state) = differentiate(self.state["params"], x)
        return *gradients, y


def fill(layer):
    """Gives the variables of an NNX layer values far from the initial ones."""
    nnx.update(layer, far_from_initial(nnx.state(layer)))
    return layer


def params_of(layer):
    """The parameters of an NNX layer, copied."""
    present = {name: getattr(layer, name) for name in ("scale", "bias")}
    return {name: np.array(leaf[...]) for name, leaf in present.items() if leaf is not None}


def stats_of(layer):
    """The running statistics of an NNX layer, copied."""
    names = [name for name in ("mean", "var", "count") if hasattr(layer, name)]
    return {name: np.array(getattr(layer, name)[...]) for name in names}


class Nnx:
    """An NNX layer."""

    api = "nnx"
    ours: ClassVar[Any] = bn.nnx.BatchNorm
    flax: ClassVar[Any] = nnx.BatchNorm

    def __init__(self, kind=bn.nnx.BatchNorm, *, fresh=False, x_dtype=jnp.float32, **options):
        # Its variables do not depend on the input, as Linen's do.
        del x_dtype
        options = {"use_running_average": False, **options}
        self.layer = kind(FEATURES, rngs=nnx.Rngs(0), **options)
        if not fresh:
            fill(self.layer)

    @classmethod
    def of(cls, layer):
        """A layer that is there already."""
        wrapped = cls.__new__(cls)
        wrapped.layer = layer
        return wrapped

    @classmethod
    def ensemble(cls, *shape):
        """A layer for each index, each with its own variables."""

        def create(key):
            scale_init = nnx.initializers.normal(1.0)
            return bn.nnx.BatchNorm(FEATURES, scale_init=scale_init, rngs=nnx.Rngs(key))

        for _ in shape:
            create = nnx.vmap(create)
        return cls.of(create(jax.random.split(jax.random.key(0), shape)))

    def __call__(self, x, **call):
        return self.layer(x, **call)

    @property
    def state(self):
        return nnx.state(self.layer)

    @state.setter
    def state(self, state):
        nnx.update(self.layer, state)

    def pure(self):
        """The layer as a function of its state and a batch to an output and the new state."""
        graph = nnx.graphdef(self.layer)

        def call(state, x, **options):
            layer = nnx.merge(graph, state, copy=True)
            return layer(x, **options), nnx.state(layer)

        return call

    @property
    def params(self):
        return params_of(self.layer)

    @property
    def stats(self):
        return stats_of(self.layer)

    @property
    def measured(self):
        return self.layer.measured.get_value()

    def start_measuring(self):
        self.layer.measured = nnx.BatchStat(start_measuring(self.stats)["measured"])
        return self

    def evaluating(self):
        return self.of(nnx.view(self.layer, use_running_average=True))

    def gradient(self, way, x, *, jit=True):
        """The derivatives of `total` by params and by x, and the output; updates the statistics."""

        def loss(layer, x):
            y = way(self.of(layer), x)
            return total(y), y

        differentiate = nnx.grad(loss, argnums=(0, 1), has_aux=True)
        differentiate = nnx.jit(differentiate) if jit else differentiate
        (of_params, of_x), y = differentiate(self.layer, x)
        return nnx.to_pure_dict(of_params), of_x, y


INTERFACES = {"linen": Linen, "nnx": Nnx}

# --- ways ---------------------------------------------------------------------------------------

Way = Callable[..., Any]


def call(layer, x):
    return layer(x)


def for_both(**ways: Way) -> dict[str, tuple[Any, Way]]:
    """The same way with either interface."""
    return {
        f"{api} {name}": (interface, way)
        for api, interface in INTERFACES.items()
        for name, way in ways.items()
    }


# The lifted transforms of Linen: variables of their own, stacked, and variables that are shared.
STACKED: dict[str, Any] = dict(
    variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}
)
SHARED: dict[str, Any] = dict(
    variable_axes={"params": None, "batch_stats": None}, split_rngs={"params": False}
)


def lifted_scan(**how):
    def body(layer, carry, x):
        return carry, layer(x)

    return lambda layer, x: nn.scan(body, split_rngs={"params": False}, **how)(layer, None, x)[1]


# `nn.scan` can create no carried variable and return no immutable one, whatever the module. What
# it can create is a broadcast variable that does not depend on the data: our statistics are one
# while initializing.
CARRIED = lifted_scan(variable_broadcast="params", variable_carry="batch_stats")
BROADCAST = lifted_scan(variable_broadcast=["params", "batch_stats"])


def by_apply(function, layer, x):
    """Calls a function of a bound Linen module."""

    def apply(variables, x, mutable):
        return nn.apply(function, layer.layer, mutable=mutable)(variables, x)

    y, layer.state = layer.pure(apply)(layer.state, x)
    return y


def by_jax_scan(layer, x):
    call = layer.pure()

    def step(state, x):
        y, state = call(state, x)
        return state, y

    layer.state, y = jax.lax.scan(step, layer.state, x)
    return y


def scan_the_layer(layer, x):
    def step(layer, x):
        return layer, layer(x)

    return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(layer.layer, x)[1]


def scan_the_statistics(layer, x):
    def step(layer, carry, x):
        return carry, layer(x)

    filters: dict[Any, Any] = {nnx.BatchStat: nnx.Carry, ...: None}
    axes = nnx.StateAxes(filters)
    scanned = nnx.scan(step, in_axes=(axes, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return scanned(layer.layer, None, x)[1]


def scan_the_split_layer(layer, x):
    parts: Any = nnx.split(layer.layer, nnx.Param, ...)
    graph, params, state = parts

    def step(state, x):
        merged = nnx.merge(graph, params, state)
        y = merged(x)
        return nnx.state(merged, nnx.BatchStat), y

    layer.state, y = jax.lax.scan(step, state, x)
    return y


SCANS: dict[str, tuple[Any, Way]] = {
    **for_both(jax=by_jax_scan),
    "linen lifted": (Linen, partial(by_apply, CARRIED)),
    "nnx layer": (Nnx, scan_the_layer),
    "nnx statistics": (Nnx, scan_the_statistics),
    "nnx split": (Nnx, scan_the_split_layer),
}
