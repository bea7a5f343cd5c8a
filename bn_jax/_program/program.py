"""The data of a traced program: its equations, its values, and what is known of them."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend.core import JaxprEqn

from bn_jax import _compat

# Values of a program are numbers. A tool may give names of another kind to further values.
Value: TypeAlias = Hashable

# The indices of the variables that a value depends on; None where it depends on an argument.
Origins: TypeAlias = frozenset[int] | None


class Equation(NamedTuple):
    """An operation of a program.

    Attributes:
        name: of the primitive.
        options: the primitive's parameters.
        inputs: the numbers of the values it takes.
        outputs: the numbers of the values it returns.
        source: the equation of JAX that it was read from.
        function: the name of the function that it calls, where that has its own derivative rule;
            otherwise the name of the primitive.
        bodies: the programs inside it, such as the body of a scan, where it was not read in place.
    """

    name: str
    options: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    source: JaxprEqn
    function: str
    bodies: "tuple[Program, ...]" = ()

    @property
    def has_effects(self) -> bool:
        """Whether it does more than compute its outputs, as printing does."""
        return bool(self.source.effects)

    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """Computes the outputs from the values of the inputs, differentiably."""
        return _compat.bind(self.source, values)


@dataclass(frozen=True, eq=False)
class Program:
    """A forward function, traced and flattened. Values are numbered from 0.

    Attributes:
        equations: in the order of execution, with the bodies of calls in their place.
        avals: the shape and dtype of each value.
        constants: the values that the program itself holds, by number.
        leaves: the numbers of the variables, in the order of `jax.tree.leaves`.
        paths: their paths, without the collection ("params", "batch_stats").
        arguments: the numbers of the leaves of the other arguments.
        outputs: the numbers of the values returned.
        tree: the structure of what is returned.
        origins: for each value that depends on no argument, the indices of the leaves that it
            depends on (none for a constant); None for a value that depends on an argument.
    """

    equations: tuple[Equation, ...]
    avals: tuple[Any, ...]
    constants: Mapping[int, Any]
    leaves: tuple[int, ...]
    paths: tuple[str, ...]
    arguments: tuple[int, ...]
    outputs: tuple[int, ...]
    tree: jax.tree_util.PyTreeDef | None
    origins: tuple[Origins, ...]

    @cached_property
    def producers(self) -> Mapping[int, int]:
        """The index of the equation that computes a value, by value."""
        equations = enumerate(self.equations)
        return {value: index for index, equation in equations for value in equation.outputs}

    @cached_property
    def consumers(self) -> Mapping[int, Sequence[int]]:
        """The indices of the equations that take a value, by value."""
        consumers: dict[int, list[int]] = {value: [] for value in range(len(self.avals))}
        for index, equation in enumerate(self.equations):
            for value in equation.inputs:
                consumers[value].append(index)
        return consumers

    @cached_property
    def uses(self) -> Mapping[int, int]:
        """How often each value is used, by equations or as an output."""
        taken = [value for equation in self.equations for value in equation.inputs]
        return Counter([*taken, *self.outputs])

    def is_known(self, value: int) -> bool:
        """Returns whether a value depends on variables and constants only."""
        return self.origins[value] is not None

    def leaf_paths(self, value: int) -> tuple[str, ...]:
        """Returns the paths of the leaves that a known value depends on."""
        return tuple(self.paths[leaf] for leaf in sorted(self.origins[value] or ()))

    def producer(self, value: int) -> Equation | None:
        """Returns the equation that computes a value; None for inputs and constants."""
        if value not in self.producers:
            return None
        return self.equations[self.producers[value]]

    def only_consumer(self, value: int) -> int | None:
        """Returns the index of the only equation that uses a value; None if there are more uses."""
        if self.uses[value] != 1 or not self.consumers[value]:
            return None
        return self.consumers[value][0]


def parent_of(paths: Sequence[str]) -> str:
    """Returns the path that the parents of these leaves have in common."""
    parents = [path.split("/")[:-1] for path in paths]
    if not parents:
        return ""
    common: list[str] = []
    for names in zip(*parents, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return "/".join(common)
