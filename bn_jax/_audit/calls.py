"""The calls of a norm in evaluation: their inputs and outputs, and the activation after them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax._audit.sites import Activation, Site
from bn_jax._program import Program, Value, evaluate, in_double

# An activation is flat where it has less than this share of its largest slope. One that is flat on
# one side only may rise as slowly on the other as a leaky ReLU does.
FLAT_BOUNDED = 0.05
FLAT_ONE_SIDED = 1e-3

# Symmetric. The points next to 0 are for activations that a factor has made steep.
_SLOPE_POINTS = (-30.0, -3.0, -1.5, -0.5, -0.01, 0.0, 0.01, 0.5, 1.5, 3.0, 30.0)


class Slopes(NamedTuple):
    """The slopes of an activation.

    Attributes:
        at_points: the largest absolute slope of all units at each of `_SLOPE_POINTS`.
        flat_values: the share of values where it is under `FLAT_BOUNDED` of the largest slope.
        flat_units: the share of units where it is under `FLAT_ONE_SIDED` of it for all values.
    """

    at_points: Any
    flat_values: Any
    flat_units: Any


class Saturation(NamedTuple):
    """How much of what an activation returns passes no gradient back.

    It is the share of values if the activation is bounded, flat on both sides; otherwise of units.
    """

    is_bounded: bool
    share: float


class Calls(NamedTuple):
    """Inputs and outputs of the calls of a norm in evaluation, with features flattened.

    Attributes:
        values: the number of values of each feature.
        means: the mean of each example, [N, F].
        squares: the mean square of each example around the mean of all of them, [N, F].
        finite_input: whether all inputs of a feature are finite, [F].
        finite_output: whether all outputs of a feature are finite, [F].
        slopes: the slopes of the activation after the norm, if there is one.
    """

    values: int
    means: Any
    squares: Any
    finite_input: Any
    finite_output: Any
    slopes: Slopes | None

    def saturation(self) -> Saturation | None:
        """Returns how far the activation is saturated; None without an activation.

        An activation that is steep on one side of 0 only, as ReLU6 is, does not count as bounded:
        half of its values are flat by design.
        """
        if self.slopes is None:
            return None
        is_steep = self.slopes.at_points >= FLAT_BOUNDED * self.slopes.at_points.max()
        steep = dict(zip(_SLOPE_POINTS, is_steep, strict=True))
        is_bounded = not (steep[-30.0] or steep[30.0])
        has_two_sides = steep[-0.01] and steep[0.01] and steep[-0.5] == steep[0.5]
        if is_bounded and has_two_sides:
            return Saturation(True, self.slopes.flat_values)
        return Saturation(False, self.slopes.flat_units)


# --- on the device ------------------------------------------------------------------------------


def wanted_values(sites: Iterable[Site]) -> set[int]:
    """Returns the values of the program that `summarize` needs."""
    wanted: set[int] = set()
    for site in sites:
        wanted |= {site.input, site.output}
        if site.activation is not None:
            wanted.update(site.activation.inputs)
    return wanted


def summarize(program: Program, site: Site, values: Mapping[Value, Any]) -> Calls:
    """Returns a summary of one call, from the values of the program."""
    x = _as_examples(values[site.input], site.axes)
    y = _as_examples(values[site.output], site.axes)
    means = jnp.mean(x, axis=1)
    center = jnp.mean(means, axis=0).reshape(1, 1, -1)
    return Calls(
        values=x.shape[0] * x.shape[1],
        means=means,
        squares=jnp.mean(jnp.abs(x - center) ** 2, axis=1),
        finite_input=jnp.all(jnp.isfinite(x), axis=(0, 1)),
        finite_output=jnp.all(jnp.isfinite(y), axis=(0, 1)),
        slopes=None if site.activation is None else _slopes(program, site, site.activation, values),
    )


def _as_examples(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns an array as ``[examples, positions, features]``, in at least float32."""
    others = tuple(axis for axis in range(x.ndim) if axis not in axes)
    moved = jnp.transpose(x, (*others, *axes))
    examples = x.shape[others[0]] if others else 1
    features = math.prod(x.shape[axis] for axis in axes)
    return moved.reshape(examples, -1, features).astype(jnp.promote_types(x.dtype, jnp.float32))


def _slopes(
    program: Program, site: Site, activation: Activation, values: Mapping[Value, Any]
) -> Slopes:
    """Differentiates the activation after a norm."""
    known: dict[Value, Any] = {value: values[value] for value in activation.inputs}

    def activate(y: jax.Array) -> jax.Array:
        computed = evaluate(program, {**known, site.output: y}, [activation.output])
        return cast(jax.Array, computed[activation.output])

    def slope(y: jax.Array) -> jax.Array:
        # Reverse mode, because an activation may have a derivative rule for that alone.
        out, pull = jax.vjp(activate, y)
        return jnp.abs(pull(jnp.ones_like(out))[0]).astype(jnp.float32)

    y = values[site.output]
    points = jnp.asarray(_SLOPE_POINTS, y.dtype)
    at_points = jax.lax.map(lambda point: jnp.max(slope(jnp.full_like(y, point))), points)
    relative = _as_examples(slope(y), site.axes) / jnp.max(at_points)
    return Slopes(
        at_points=at_points,
        flat_values=jnp.mean(relative < FLAT_BOUNDED),
        flat_units=jnp.mean(jnp.all(relative < FLAT_ONE_SIDED, axis=(0, 1))),
    )


# --- on the host --------------------------------------------------------------------------------


def gather(sites: Sequence[Site], summaries: Sequence[Calls]) -> dict[str, Calls]:
    """Returns the calls of each norm together, by path."""
    calls: dict[str, list[Calls]] = {}
    for site, summary in zip(sites, summaries, strict=True):
        in_double_precision = summary._replace(
            means=in_double(summary.means), squares=in_double(summary.squares)
        )
        calls.setdefault(site.path, []).append(in_double_precision)
    return {path: _together(each) for path, each in calls.items()}


def _together(calls: Sequence[Calls]) -> Calls:
    """Returns several calls as one: all their examples, and the most saturated activation."""
    if len(calls) == 1:
        return calls[0]
    means = np.concatenate([call.means for call in calls])
    slopes = [call.slopes for call in calls if call.slopes is not None]
    return Calls(
        values=sum(call.values for call in calls),
        means=means,
        squares=np.concatenate([_squares_around(call, means.mean(0)) for call in calls]),
        finite_input=np.all([call.finite_input for call in calls], axis=0),
        finite_output=np.all([call.finite_output for call in calls], axis=0),
        slopes=max(slopes, key=lambda each: float(each.flat_values), default=None),
    )


def _squares_around(call: Calls, center: np.ndarray) -> np.ndarray:
    """Returns the mean squares around another center than the mean of the call."""
    mean = call.means.mean(0)
    shift = mean - center
    cross_terms = 2 * np.real((call.means - mean) * np.conj(shift))
    squares: np.ndarray = call.squares + cross_terms + np.abs(shift) ** 2
    return squares
