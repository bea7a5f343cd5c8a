"""A model as a pure function of arrays, whatever it is written in.

Tools take a model as ``(forward, variables)``, as users write it:

- Linen: ``lambda variables, x: model.apply(variables, x, train=False)`` and what `model.init`
  returned;
- NNX: ``lambda model, x: model(x)`` and the module, which holds its arrays itself;
- plain functions: any function of a tree of arrays, and the tree.

`as_pure` turns each of them into a function of a tree of arrays.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx

from bn_jax._paths import batch_stats_by_path, format_path


@dataclass(frozen=True)
class PureForward:
    """A forward function without the arrays that it needs.

    ``pure(variables, *args)`` calls it with any arrays in the structure of the model's, and changes
    nothing. It can be traced, compiled and differentiated.

    Attributes:
        forward: as the user wrote it, a function of variables or of a module.
        graph: what an NNX module is beside its arrays; None for other models. It can be a static
            argument of `jax.jit`, unless the module holds something that has no hash.
    """

    forward: Callable[..., Any]
    graph: Any = None

    def __call__(self, variables: Any, *args: Any) -> Any:
        """Returns what `forward` returns with these variables."""
        return self.forward(self.bind(variables), *args)

    def bind(self, variables: Any) -> Any:
        """Returns the first argument of `forward`: the variables, or a new module with them."""
        if self.graph is None:
            return variables
        # Without the copy, what a call does to the module would be done to `variables`.
        return nnx.merge(self.graph, variables, copy=True)

    def in_mode(self, variables: Any, *, train: bool) -> "PureForward":
        """Returns the same with an NNX module in training or in evaluation.

        Other models learn their mode from an argument of `forward`, and are returned as they are.
        """
        if self.graph is None:
            return self
        module = self.bind(variables)
        if train:
            module.train()
        else:
            module.eval()
        return replace(self, graph=nnx.graphdef(module))

    def params(self, variables: Any) -> Any:
        """Returns the parameters among the variables, in the structure of these."""
        if self.graph is not None:
            return nnx.filter_state(variables, nnx.Param)
        return _collections(variables).get("params", {})

    def batch_stats(self, variables: Any) -> Any:
        """Returns the running statistics among the variables, in the structure of these."""
        if self.graph is not None:
            return nnx.filter_state(variables, nnx.BatchStat)
        return _collections(variables).get("batch_stats", {})

    def others(self, variables: Any) -> Any:
        """Returns the variables without the running statistics. `join` puts them together."""
        if self.graph is not None:
            return nnx.filter_state(variables, nnx.Not(nnx.BatchStat))
        collections = _collections(variables)
        return {name: tree for name, tree in collections.items() if name != "batch_stats"}

    def join(self, batch_stats: Any, others: Any) -> Any:
        """Returns variables, made of running statistics and of what `others` returned."""
        if self.graph is not None:
            return nnx.merge_state(others, batch_stats)
        return {**others, "batch_stats": batch_stats}

    def statistics(self, variables: Any) -> dict[int, str]:
        """Returns which leaves of the variables are the running mean or variance of a norm.

        The result has the path of the norm by the leaf's index in ``jax.tree.leaves(variables)``.
        """
        norms = batch_stats_by_path(self.batch_stats(variables))
        leaves = jax.tree.leaves_with_path(variables, is_leaf=is_variable)
        paths = {}
        for index, (keys, leaf) in enumerate(leaves):
            names = format_path(keys).split("/")
            if self.graph is None and names.pop(0) != "batch_stats":
                continue
            if self.graph is not None and not isinstance(leaf, nnx.BatchStat):
                continue
            path = "/".join(names[:-1])
            if path in norms and names[-1] in ("mean", "var"):
                paths[index] = path
        return paths


def as_pure(forward: Callable[..., Any], variables: Any) -> tuple[PureForward, Any]:
    """Returns a model as a pure function, and the variables to call it with.

    An `nnx.Module` stays as it is; its variables are an `nnx.State`.
    """
    if not isinstance(variables, nnx.Module):
        return PureForward(forward), variables
    graph, state = nnx.split(variables)
    return PureForward(forward, graph), state


def _collections(variables: Any) -> Mapping[str, Any]:
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables is a {type(variables).__name__}; expected an nnx.Module or a mapping "
            "{'params': params, 'batch_stats': batch_stats}: pass what model.init(...) returned, "
            "or of a train state {'params': state.params, 'batch_stats': state.batch_stats}."
        )
    return variables


def is_variable(node: Any) -> bool:
    """Returns whether a node of a tree is a variable of NNX."""
    return isinstance(node, nnx.Variable)


def value_of(node: Any) -> Any:
    """Returns the value of a variable of NNX, and anything else as it is."""
    return node.get_value() if isinstance(node, nnx.Variable) else node
