"""What the properties of batch norm are tested with, and how near a result has to be."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from support import (
    assert_close,
    define_batch_norm,
    define_evaluation,
    define_moments,
    exact,
    expand,
)

# --- what is drawn ----------------------------------------------------------------------------

DTYPES = ("float32", "bfloat16", "float16")
MASKINGS = (None, "boolean", "weights")
LARGEST_FLOAT16 = 65504.0

seeds = st.integers(0, 2**32 - 1)
epsilons = st.sampled_from([1e-5, 1e-8, 1e-3, 1.0])
# Values of float32: of another number, the complement of its rounding is not its complement.
momenta = st.sampled_from([0.5, 0.0, 1.0]) | st.floats(0, 1, width=32)
freedoms = st.integers(0, 1)
powers_of_two = st.integers(-8, 8).map(lambda exponent: 2.0**exponent)


@dataclass(frozen=True)
class Configuration:
    """What hypothesis draws and shrinks; the numbers follow from the seed."""

    shape: tuple[int, ...]
    axis: int | tuple[int, ...]
    dtype: str
    spread: float
    offset: float
    stale_offset: float
    masking: str | None
    mask_shape: tuple[int, ...]
    seed: int

    @property
    def feature_axes(self):
        return tuple(sorted(axis % len(self.shape) for axis in np.atleast_1d(self.axis).tolist()))

    @property
    def reduced_axes(self):
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.feature_axes)

    @property
    def features(self):
        return tuple(self.shape[axis] for axis in self.feature_axes)

    @property
    def shape_by_position(self):
        """The shape of x with size 1 along the features."""
        return tuple(
            1 if axis in self.feature_axes else size for axis, size in enumerate(self.shape)
        )

    @property
    def values_per_feature(self):
        return math.prod(self.shape[axis] for axis in self.reduced_axes)

    def generator(self, purpose):
        return np.random.default_rng([self.seed, *purpose.encode()])

    def expand(self, values):
        return expand(values, self.axis, self.shape)

    def flatten(self, values):
        """Gives values of the shape of x the shape [positions, *features]."""
        moved = np.transpose(np.asarray(values), self.reduced_axes + self.feature_axes)
        return moved.reshape(-1, *self.features)

    def make_x(self, purpose="x"):
        rng = self.generator(purpose)
        offset = self.expand(rng.uniform(-1, 1, self.features)) * self.offset
        x = (rng.standard_normal(self.shape) + offset) * self.spread
        if self.dtype == "float16":
            x = np.clip(x, -LARGEST_FLOAT16, LARGEST_FLOAT16)
        return x.astype(jnp.dtype(self.dtype))

    def make_cotangent(self):
        return self.generator("cotangent").standard_normal(self.shape).astype(np.float32)

    def make_mask(self):
        if self.masking is None:
            return None
        rng = self.generator("mask")
        valid = rng.random(self.mask_shape) < 0.6
        # Quarters, which float32 sums exactly.
        weights = rng.integers(1, 9, self.mask_shape) / 4
        return (valid * weights).astype(np.float32) if self.masking == "weights" else valid

    def make_params(self, present=("scale", "bias")):
        rng = self.generator("params")
        drawn = dict(zip(("scale", "bias"), rng.standard_normal((2, *self.features)), strict=True))
        drawn["scale"] *= rng.integers(0, 4, self.features)
        return {name: drawn[name].astype(np.float32) for name in present}

    def make_stats(self):
        rng = self.generator("stats")
        mean = rng.standard_normal(self.features) * self.stale_offset * self.spread
        var = (rng.random(self.features) + 0.1) * self.spread**2
        return {"mean": mean.astype(np.float32), "var": var.astype(np.float32)}


@st.composite
def layouts(draw, ranks):
    rank = draw(st.integers(*ranks))
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank)))
    number = draw(st.integers(1, 2 if rank > 2 else 1))
    chosen = draw(st.permutations(range(rank)))[:number]
    axis = tuple(position - rank if draw(st.booleans()) else position for position in chosen)
    return shape, axis if number > 1 else axis[0]


@st.composite
def mask_shapes(draw, shape):
    kept = tuple(size if draw(st.booleans()) else 1 for size in shape)
    leading_ones = next((position for position, size in enumerate(kept) if size > 1), len(kept))
    return kept[draw(st.integers(0, leading_ones)) :]


@st.composite
def configurations(draw, *, ranks=(2, 4), layout=None, dtypes=DTYPES, maskings=MASKINGS):
    shape, axis = layout or draw(layouts(ranks))
    offsets = st.just(0.0) | st.integers(0, 6).map(lambda digits: 10.0**digits)
    return Configuration(
        shape=shape,
        axis=axis,
        dtype=draw(st.sampled_from(dtypes)),
        spread=draw(st.sampled_from([1.0, 1e-3, 1e3])),
        offset=draw(offsets),
        stale_offset=draw(offsets),
        masking=draw(st.sampled_from(maskings)),
        mask_shape=draw(mask_shapes(shape)),
        seed=draw(seeds),
    )


trainable = configurations().filter(lambda drawn: drawn.values_per_feature > 1)


# Few enough that the properties below share what they compile.
LAYOUTS = [
    ((4, 3), -1),
    ((3, 5), 0),
    ((2, 3, 4), 1),
    ((3, 1, 2), -1),
    ((2, 2, 3), (2, 0)),
    ((1, 4, 3), 0),
    ((2, 3, 2, 2), -1),
    ((3, 2, 1, 2), (1, -1)),
]


@st.composite
def few_layouts(draw, *, dtypes=("float32", "bfloat16"), maskings=MASKINGS):
    """Configurations of `LAYOUTS`, with a mask for every value or for every position."""
    shape, axis = draw(st.sampled_from(LAYOUTS))
    drawn = draw(configurations(layout=(shape, axis), dtypes=dtypes, maskings=maskings))
    return replace(drawn, mask_shape=draw(st.sampled_from([drawn.shape_by_position, shape])))


# --- what is expected -------------------------------------------------------------------------


def define_training(params, stats, x, *, axis, epsilon, mask=None, running_var_ddof=0, **options):
    """The definition, where a feature without enough finite values keeps its statistics."""
    count, mean, var = define_moments(x, axis, mask)
    options.update(axis=axis, epsilon=epsilon, mask=mask, running_var_ddof=running_var_ddof)
    with np.errstate(invalid="ignore", divide="ignore"):
        y, updated = define_batch_norm(params, stats, x, **options)
    by_running = define_evaluation(params, stats, x, axis=axis, epsilon=epsilon)
    y = np.where(expand(count, axis, x.shape) > 0, y, by_running)
    enters = (count > running_var_ddof) & np.isfinite(mean) & np.isfinite(var)
    kept = {name: np.where(enters, updated[name], exact(stats[name])) for name in stats}
    return y, kept


def assert_near(actual, expected, unit, *, tolerance=1e-5, slack=0.0):
    """``|actual - expected| <= tolerance * unit + slack``, both finite."""
    bound = np.maximum(unit + slack / tolerance, np.finfo(np.float32).tiny)
    assert_close(exact(actual) / bound, exact(expected) / bound, tolerance=tolerance)


def output_unit(configuration, params, expected):
    scale = params.get("scale", np.ones(configuration.features))
    return np.maximum(np.maximum(1, np.abs(expected)), np.abs(configuration.expand(scale)))


def rounding(dtype):
    return 0.0 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps) / 2


def assert_stats(actual, expected, mean_unit, **bounds):
    assert sorted(actual) == sorted(expected)
    assert {leaf.dtype for leaf in actual.values()} == {jnp.dtype(jnp.float32)}
    assert_near(actual["mean"], expected["mean"], mean_unit)
    assert_near(actual["var"], expected["var"], expected["var"], **bounds)


def mean_unit(stats, moments):
    """The size of what is averaged, to which the rounding of the running mean is relative."""
    _, mean, var = moments
    return np.maximum(np.abs(exact(stats["mean"])), np.abs(mean) + np.sqrt(var))


def merging_error(moments):
    """How far the variance between parts may be off, for their means are rounded to float32."""
    _, mean, var = moments
    error = np.abs(mean) * 2.0**-22
    return 2 * np.sqrt(var) * error + error**2


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
