"""The calls of a norm in evaluation: their inputs and outputs, and the activation after them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax._audit.sites import Site
from bn_jax._program import Program, Value, evaluate, in_double

# An activation is flat where it has less than this share of its largest slope. One that is flat on
# one side only may rise as slowly on the other as a leaky ReLU does.
FLAT_BOUNDED = 0.05
FLAT_ONE_SIDED = 1e-3

# Symmetric. The points next to 0 are for activations that a factor has made steep.
_SLOPE_POINTS = (-30.0, -3.0, -1.5, -0.5, -0.01, 0.0, 0.01, 0.5, 1.5, 3.0, 30.0)


class Saturation(NamedTuple):
    """How much of what an activation returns passes no gradient back."""

    # Whether the activation is flat on both sides. One that is steep on one side of 0 only, as
    # ReLU6 is, does not count: half of its values are flat by design.
    is_bounded: Any
    flat_values: Any  # the share of values where the slope is under `FLAT_BOUNDED` of the largest
    flat_units: Any  # the share of units where it is under `FLAT_ONE_SIDED` of it for all values

    @property
    def share(self) -> Any:
        """The share of values of a bounded activation, of units of any other."""
        return self.flat_values if self.is_bounded else self.flat_units


class Calls(NamedTuple):
    """Inputs and outputs of the calls of a norm in evaluation, with features flattened."""

    values: int  # the number of values of each feature
    means: Any  # the mean of each example, [N, F]
    squares: Any  # the mean square of each example around the mean of all of them, [N, F]
    finite_input: Any  # whether all inputs of a feature are finite, [F]
    finite_output: Any  # whether all outputs of a feature are finite, [F]
    saturation: Saturation | None  # of the activation after the norm, if there is one


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
        saturation=_saturation(program, site, values),
    )


def _as_examples(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns an array as ``[examples, positions, features]``, in at least float32."""
    others = tuple(axis for axis in range(x.ndim) if axis not in axes)
    moved = jnp.transpose(x, (*others, *axes))
    examples = x.shape[others[0]] if others else 1
    features = math.prod(x.shape[axis] for axis in axes)
    return moved.reshape(examples, -1, features).astype(jnp.promote_types(x.dtype, jnp.float32))


def _saturation(program: Program, site: Site, values: Mapping[Value, Any]) -> Saturation | None:
    """Differentiates the activation after a norm, if there is one."""
    activation = site.activation
    if activation is None:
        return None
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
    largest = jax.lax.map(lambda point: jnp.max(slope(jnp.full_like(y, point))), points)
    is_steep = dict(zip(_SLOPE_POINTS, largest >= FLAT_BOUNDED * jnp.max(largest), strict=True))
    is_flat_outside = ~(is_steep[-30.0] | is_steep[30.0])
    has_two_sides = is_steep[-0.01] & is_steep[0.01] & (is_steep[-0.5] == is_steep[0.5])
    relative = _as_examples(slope(y), site.axes) / jnp.max(largest)
    return Saturation(
        is_bounded=is_flat_outside & has_two_sides,
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
    saturations = [call.saturation for call in calls if call.saturation is not None]
    return Calls(
        values=sum(call.values for call in calls),
        means=means,
        squares=np.concatenate([_squares_around(call, means.mean(0)) for call in calls]),
        finite_input=np.all([call.finite_input for call in calls], axis=0),
        finite_output=np.all([call.finite_output for call in calls], axis=0),
        saturation=max(saturations, key=lambda each: float(each.flat_values), default=None),
    )


def _squares_around(call: Calls, center: np.ndarray) -> np.ndarray:
    """Returns the mean squares around another center than the mean of the call."""
    mean = call.means.mean(0)
    shift = mean - center
    cross_terms = 2 * np.real((call.means - mean) * np.conj(shift))
    squares: np.ndarray = call.squares + cross_terms + np.abs(shift) ** 2
    return squares
