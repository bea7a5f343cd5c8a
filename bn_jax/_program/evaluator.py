"""The evaluator of traced programs: computes some values of a program from others.

`evaluate` serves both the parameters of a folded model, computed from variables alone, and what an
audit observes inside a model. `steps_to` and `run_steps` are its two halves: a tool can replace
equations by steps of its own between them.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from bn_jax._program.program import Program, Value


class Step(Protocol):
    """A computation, from the values of its inputs to those of its outputs.

    An `Equation` is a step.
    """

    @property
    def inputs(self) -> Sequence[Value]:
        """The values it takes."""

    @property
    def outputs(self) -> Sequence[Value]:
        """The values it computes."""

    def run(self, values: Sequence[Any], /) -> Sequence[Any]:
        """Computes the outputs from the values of the inputs."""


def evaluate(
    program: Program, values: Mapping[Value, Any], wanted: Iterable[Value]
) -> dict[Value, Any]:
    """Computes the wanted values of a program from others, and nothing that they do not need.

    Any value can be among those to start from, also one inside the program. The result has these
    values, the constants, the wanted values, and all that were computed on the way.
    """
    computed = inputs_of(program)
    computed.update(values)
    run_steps(steps_to(program, wanted, computed), computed)
    return computed


def inputs_of(
    program: Program,
    leaves: Sequence[Any] | None = None,
    arguments: Sequence[Any] | None = None,
) -> dict[Value, Any]:
    """Returns the values that an evaluation starts from, by number.

    These are the constants, and the leaves of the variables and of the other arguments where they
    are known.
    """
    values: dict[Value, Any] = dict(program.constants.items())
    if leaves is not None:
        values.update(zip(program.leaves, leaves, strict=True))
    if arguments is not None:
        values.update(zip(program.arguments, arguments, strict=True))
    return values


def steps_to(
    program: Program,
    wanted: Iterable[Value],
    given: Container[Value],
    *,
    replaced: Mapping[int, Step] | None = None,
    always: Iterable[int] = (),
) -> tuple[Step, ...]:
    """Returns the steps that compute the wanted values from the given ones, in program order.

    A step of `replaced` takes the place of the equation at its index. It may compute what a later
    equation did, which is then not run either. The equations `always` are run in any case, such as
    those that print.
    """
    replaced = replaced or {}
    producers: dict[Value, int] = dict(program.producers.items())
    producers.update((value, index) for index, step in replaced.items() for value in step.outputs)

    def step_at(index: int) -> Step:
        return replaced[index] if index in replaced else program.equations[index]

    needed = set(always)
    ahead = [*wanted, *(value for index in needed for value in step_at(index).inputs)]
    while ahead:
        value = ahead.pop()
        if value in given or value not in producers or producers[value] in needed:
            continue
        needed.add(producers[value])
        ahead.extend(step_at(producers[value]).inputs)
    return tuple(step_at(index) for index in sorted(needed))


def run_steps(steps: Iterable[Step], values: dict[Value, Any]) -> None:
    """Runs steps in order, and adds what they compute to the values."""
    for step in steps:
        outputs = step.run([values[value] for value in step.inputs])
        values.update(zip(step.outputs, outputs, strict=True))


def in_double(value: Any) -> np.ndarray[Any, Any]:
    """Returns an array on the host, in float64 or complex128."""
    # The transfer is explicit, so that `jax.transfer_guard` allows it.
    array = np.asarray(jax.device_get(value))
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
