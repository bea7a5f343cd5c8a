"""A model of the zoo: what the checks need to know of it, whatever it is written in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Library: TypeAlias = Literal["Linen", "NNX", "Haiku", "Keras", "Equinox"]
SIZE, CHANNELS, CLASSES = 32, 3, 5
EXAMPLES = 24
# How the data set is split: neither batch nor their number matters to exact statistics.
SPLIT = 10


class Functional(NamedTuple):
    """A model as pure functions.

    Attributes:
        params: what is trained.
        statistics: the running statistics and whatever else a call updates.
        train: ``train(params, statistics, batch)`` returns the output and the new statistics.
        evaluate: ``evaluate(params, statistics, batch)`` returns the output.
    """

    params: Any
    statistics: Any
    train: Callable[[Any, Any, Any], tuple[Any, Any]]
    evaluate: Callable[[Any, Any, Any], Any]


@dataclass(frozen=True, eq=False)
class Specimen:
    """A model that nobody here wrote, with running statistics that fit its weights.

    Attributes:
        name: what it is called in the tables.
        package: its distribution on PyPI.
        library: what it is written in.
        model: as pure functions; its norms are its own.
        forward: ``forward(variables, batch)`` evaluates it, as a user of `bn_jax.fold` writes it.
        variables: all its arrays, as that user has them; an `nnx.Module` itself.
        norms: the paths of its batch norms among its variables, in its own library's terms.
        other_norms: those of its norms without running statistics.
        data: all examples, a tuple of arrays.
        native: the object that tools of Flax take: the `apply` of a Linen model as
            ``native(variables, batch, train)``, or an `nnx.Module`. None for other libraries.
        ours: the same with our norms in place; None for other libraries.
        exact: the statistics of the data set, in float64; None for other libraries.
        double: the same for arrays in float64; None where its library has no such model.
        trains_where_mutable: whether it returns no statistics in evaluation.
        members: how many models `nn.vmap` has stacked.
    """

    name: str
    package: str
    library: Library
    model: Functional
    forward: Callable[[Any, Any], Any]
    variables: Any
    norms: frozenset[str]
    other_norms: frozenset[str]
    data: tuple[jax.Array, ...]
    native: Any = None
    ours: Functional | None = None
    exact: Any = None
    double: Functional | None = None
    trains_where_mutable: bool = False
    members: int = 0

    @property
    def batches(self) -> list[tuple[jax.Array, ...]]:
        """The data set in two batches of different sizes."""
        first = tuple(array[:SPLIT] for array in self.data)
        return [first, tuple(array[SPLIT:] for array in self.data)]


class Entry(NamedTuple):
    """A model that is not made yet.

    Attributes:
        library: what it is written in.
        make: makes the specimen; imports its package.
    """

    library: Library
    make: Callable[[], Specimen]


def images(seed: int = 0) -> tuple[jax.Array, ...]:
    """Returns random images."""
    shape = (EXAMPLES, SIZE, SIZE, CHANNELS)
    return (jax.random.normal(jax.random.key(seed), shape),)


def path_of(keys: tuple[Any, ...]) -> str:
    """Returns the path of an array; the value of a variable of NNX is one key further in."""
    return jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value")


def perturbed(params: Any) -> Any:
    """Returns parameters in which no scale is one or zero, and no bias zero."""
    generator = np.random.default_rng(0)

    def perturb(keys: tuple[Any, ...], leaf: Any) -> Any:
        name = path_of(keys).split("/")[-1]
        shape, dtype = np.shape(leaf), jnp.result_type(leaf)
        if name in ("scale", "gamma") or (name == "weight" and leaf.ndim == 1):
            return jnp.asarray(generator.uniform(0.6, 1.4, shape), dtype)
        if name in ("bias", "beta", "offset", "b"):
            return jnp.asarray(0.3 * generator.standard_normal(shape), dtype)
        return leaf

    return jax.tree.map_with_path(perturb, params)


def rounded(tree: Any, like: Any) -> Any:
    """Returns a tree in the dtypes of another."""
    return jax.tree.map(lambda leaf, old: jnp.asarray(np.asarray(leaf), old.dtype), tree, like)


def in_double(tree: Any) -> Any:
    """Returns a tree with its floating-point leaves in float64; within `jax.enable_x64` alone."""

    def widen(leaf: Any) -> Any:
        is_floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(np.asarray(leaf), jnp.float64) if is_floating else leaf

    return jax.tree.map(widen, tree)


def population_statistics(model: Functional, data: Any) -> Any:
    """Returns the exact statistics of every norm over a data set, as they come of the definition.

    In one batch of all the data, every norm normalizes by the statistics of the data set. The
    running averages are linear in the old ones: from two calls follow momentum and batch.
    """
    train = jax.jit(model.train)

    def updated(value: float) -> Any:
        old = jax.tree.map(lambda leaf: filled(leaf, value), model.statistics)
        return train(model.params, old, data)[1]

    def solve(old: Any, from_zero: Any, from_one: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(old), jnp.floating):
            return old
        momentum = from_one - from_zero
        return from_zero / (1 - momentum)

    return jax.tree.map(solve, model.statistics, updated(0), updated(1))


def filled(leaf: Any, value: float) -> Any:
    """Returns an array full of a value; an array of integers stays as it is."""
    is_floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jnp.full_like(leaf, value) if is_floating else leaf
