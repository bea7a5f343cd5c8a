"""The audited model: a pure function in both modes, its norms, and what they say of themselves."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr

from bn_jax._core.types import BatchStats
from bn_jax._paths import batch_stats_by_path, format_path, whitening_paths
from bn_jax._program import PureForward, as_pure, is_variable, jaxprs_in, value_of
from bn_jax._recalibrate.measuring import require_updates
from bn_jax.nnx.patching import replace_norms_in_place

DEFAULT_EPSILON = 1e-5
# The first part of the names that `note_attributes` gives.
NOTE = "bn_jax.attributes:"
LINE = "lambda variables, x, train: model.apply(variables, x, train=train, mutable=['batch_stats'])"
_ADVICE_FOR_FUNCTIONS = (
    "batch_stats = bn.recalibrate(lambda variables, x: model.apply(variables, x, "
    "train=False, mutable=['batch_stats']), variables, batches).batch_stats"
)
_ADVICE_FOR_MODULES = (
    "nnx.update(model, bn.recalibrate(lambda model, x: model(x), model, "
    "batches).batch_stats), after model.eval()"
)


class Attributes(NamedTuple):
    """Attributes of a layer that are not among its variables."""

    epsilon: float = DEFAULT_EPSILON
    virtual_batch_size: int | None = None
    # How many domains have statistics of their own; None without domains.
    num_domains: int | None = None


@dataclass(frozen=True)
class Model:
    """A model of Linen, of plain functions or of NNX."""

    training: PureForward  # the model in training, called as ``training(variables, batch)``
    evaluation: PureForward  # the model in evaluation
    variables: Any
    norms: dict[str, BatchStats]  # the running statistics of each norm, by path
    # The attributes of the norms of a module, by path. Those of Linen are known in their calls.
    attributes: dict[str, Attributes]
    whitening: tuple[str, ...]  # the paths of whitening norms

    @property
    def params(self) -> Any:
        """The parameters among the variables."""
        return self.evaluation.params(self.variables)

    @property
    def batch_stats(self) -> Any:
        """The running statistics among the variables."""
        return self.evaluation.batch_stats(self.variables)

    @property
    def advice(self) -> str:
        """The line that recalibrates the model."""
        if self.evaluation.graph is None:
            return _ADVICE_FOR_FUNCTIONS
        return _ADVICE_FOR_MODULES

    def evaluate(self, variables: Any, batch: Any) -> Any:
        """Returns the output in evaluation."""
        returned = self.evaluation(variables, batch)
        if self.evaluation.graph is not None:
            return returned
        require_updates(returned, LINE)
        return returned[0]


def model_of(forward: Callable[..., Any], variables: Any) -> Model:
    """Returns the model; a module is copied, with norms that can measure."""
    attributes = {}
    if isinstance(variables, nnx.Module):
        variables = nnx.clone(variables)
        replace_norms_in_place(variables)
        attributes = {
            "/".join(map(str, keys)): attributes_of(layer)
            for keys, layer in nnx.iter_graph(variables)
            if isinstance(layer, nnx.BatchNorm)
        }
    elif isinstance(variables, Mapping):
        variables = nn.meta.unbox(dict(variables))
    pure, arrays = as_pure(forward, variables)
    batch_stats = pure.batch_stats(arrays)
    norms = {
        path: cast(BatchStats, {name: value_of(node[name]) for name in node})
        for path, node in batch_stats_by_path(batch_stats).items()
    }
    if not norms:
        raise ValueError(
            "variables hold no batch norm, nothing with a mean and a var in batch_stats: pass all "
            "that init returned, {'params': params, 'batch_stats': batch_stats}, or the module."
        )
    if pure.graph is None:
        training = PureForward(lambda variables, batch: forward(variables, batch, True))
        evaluation = PureForward(lambda variables, batch: forward(variables, batch, False))
    else:
        training = pure.in_mode(arrays, train=True)
        evaluation = pure.in_mode(arrays, train=False)
    return Model(
        training=training,
        evaluation=evaluation,
        variables=arrays,
        norms=norms,
        attributes=attributes,
        whitening=tuple(whitening_paths(batch_stats)),
    )


def attributes_of(layer: Any) -> Attributes:
    """Returns the attributes of a batch norm of this library or of Flax."""
    try:
        epsilon = float(layer.epsilon)
    except jax.errors.ConcretizationTypeError:
        epsilon = DEFAULT_EPSILON  # it is computed by the model
    num_domains = None if getattr(layer, "share_stats", True) else layer.num_domains
    return Attributes(epsilon, getattr(layer, "virtual_batch_size", None), num_domains)


def note_attributes(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Names the output of a batch norm of Linen by its path and attributes, in the traced program.

    It intercepts the calls of modules. What an earlier audit has compiled is not traced again, so
    that no call would be seen, but its program keeps the names.
    """
    y = next_call(*args, **kwargs)
    layer = context.module
    if not isinstance(layer, nn.BatchNorm) or context.method_name != "__call__":
        return y
    note = NOTE + json.dumps(["/".join(layer.path), *attributes_of(layer)])
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, note), y)


def noted_attributes(jaxpr: Jaxpr) -> dict[str, Attributes]:
    """Returns the attributes that are noted in a program and its bodies, by the norm's path."""
    found: dict[str, Attributes] = {}
    for equation in jaxpr.eqns:
        name = str(equation.params.get("name"))
        if name.startswith(NOTE):
            path, *attributes = json.loads(name.removeprefix(NOTE))
            found[path] = Attributes(*attributes)
        for body, _ in jaxprs_in(equation.params):
            found |= noted_attributes(body)
    return found


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths; of variables of NNX, the values."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_variable)
    return {format_path(keys): value_of(leaf) for keys, leaf in leaves}
