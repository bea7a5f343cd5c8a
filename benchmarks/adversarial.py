"""Inputs on which batch norms go wrong, with the true results in float64.

The benchmark and the tests both use the list `CASES`. Nothing is computed until `make` of a case is
called, so importing this module costs no memory.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

ROWS, FEATURES = 4096, 64
LONG_LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "long [1e7, 1]": ((10_000_000, 1), -1),
    "long [2, 5e6], axis 0": ((2, 5_000_000), 0),
    "long [64, 256, 256, 2]": ((64, 256, 256, 2), -1),
}


class Layer(NamedTuple):
    """How the batch norm is configured.

    Attributes:
        axis: the feature axis or axes.
        epsilon: added to the variance.
        dtype: of the output; None: the dtype of the input.
        axis_name: the name of the first axis of x and of the mask, if this is an axis of shards.
            Then `axis` must count from the end.
        virtual_batch_size: the number of rows in a group with separate statistics.
        use_fast_variance: False for a variance that is guarded in bfloat16 too.
    """

    axis: int | tuple[int, ...] = -1
    epsilon: float = 1e-5
    dtype: str | None = None
    axis_name: str | None = None
    virtual_batch_size: int | None = None
    use_fast_variance: bool = True

    def feature_axes(self, rank: int) -> tuple[int, ...]:
        """Returns the feature axes as nonnegative numbers in ascending order."""
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        return tuple(sorted(axis % rank for axis in axes))

    def reduction_axes(self, rank: int) -> tuple[int, ...]:
        """Returns all axes that are not feature axes."""
        features = self.feature_axes(rank)
        return tuple(axis for axis in range(rank) if axis not in features)

    def expand(self, values: Any, rank: int) -> Any:
        """Reshapes per-feature values to the rank of the input."""
        sizes = dict(zip(self.feature_axes(rank), values.shape, strict=True))
        return values.reshape([sizes.get(axis, 1) for axis in range(rank)])


FEATURES_LAST = Layer()
# The case on which bn_jax is only as exact as its input: bfloat16 has no guard by default.
UNGUARDED = "bfloat16, offset 300"


class Batch(NamedTuple):
    """The arrays of one training step. All but x and mask have the shape of the features."""

    x: Any
    mask: Any
    scale: Any
    bias: Any
    running_mean: Any
    running_var: Any


class Case(NamedTuple):
    """A named input, and the layer that takes it."""

    name: str
    make: Callable[[], Batch]
    layer: Layer = FEATURES_LAST


class Truth(NamedTuple):
    """The true results of a batch norm in float64: output and batch variance."""

    output: np.ndarray
    variance: np.ndarray


def truth(layer: Layer, batch: Batch) -> Truth:
    """Computes output and batch variance from the definition.

    If nothing is valid, the running statistics replace the statistics of the batch. Groups of rows
    must come without a mask; the variance is then still the variance of the whole batch.
    """
    x = np.asarray(batch.x, np.float64)
    mean, variance = _moments(layer, batch, x)
    per_feature = np.squeeze(variance, layer.reduction_axes(x.ndim))
    if layer.virtual_batch_size is None:
        return Truth(_normalize(layer, batch, x, mean, variance), per_feature)
    groups = np.split(x, len(x) // layer.virtual_batch_size)
    outputs = [_normalize(layer, batch, group, *_moments(layer, batch, group)) for group in groups]
    return Truth(np.concatenate(outputs), per_feature)


def _normalize(
    layer: Layer, batch: Batch, x: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> np.ndarray:
    scale, bias = (layer.expand(np.float64(leaf), x.ndim) for leaf in (batch.scale, batch.bias))
    y = x - mean
    y *= scale / np.sqrt(variance + layer.epsilon)
    y += bias
    return y


def _moments(layer: Layer, batch: Batch, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    axes = layer.reduction_axes(x.ndim)
    if batch.mask is None:
        return x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    weights = np.broadcast_to(np.float64(batch.mask), x.shape)
    values = np.where(weights > 0, x, 0)
    count = weights.sum(axes, keepdims=True)
    divisor = np.where(count > 0, count, 1)
    mean = (weights * values).sum(axes, keepdims=True) / divisor
    variance = (weights * (values - mean) ** 2).sum(axes, keepdims=True) / divisor
    running_mean, running_var = (
        layer.expand(np.float64(leaf), x.ndim) for leaf in (batch.running_mean, batch.running_var)
    )
    return np.where(count > 0, mean, running_mean), np.where(count > 0, variance, running_var)


def _short(number: float) -> str:
    return f"{number:g}".replace("e+0", "e")


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def _batch(
    x: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    layer: Layer = FEATURES_LAST,
    scale: float = 1.0,
    bias: float = 0.0,
    running_mean: float = 0.0,
    running_var: float = 1.0,
    dtype: Any = np.float32,
) -> Batch:
    features = [x.shape[axis] for axis in layer.feature_axes(x.ndim)]
    per_feature = (
        np.full(features, value, np.float32) for value in (scale, bias, running_mean, running_var)
    )
    return Batch(x.astype(dtype), mask, *per_feature)


def _normal(offset: float, sd: float = 1.0, rows: int = ROWS, **options: Any) -> Batch:
    return _batch(offset + sd * _noise(rows, FEATURES), **options)


def _offsets() -> Iterator[Case]:
    for offset in (0.0, 1e2, 1e3, 1e4, 1e5, 1e6, -1e6):
        yield Case(f"offset {_short(offset)}", partial(_normal, offset))
    for rows in (2, 17):
        yield Case(f"offset 1e6, {rows} rows", partial(_normal, 1e6, rows=rows))
    yield Case("offset 1000, sd 0.001", partial(_normal, 1e3, 1e-3))
    yield Case(
        "offset 1000, sd 0.001, epsilon 1e-12", partial(_normal, 1e3, 1e-3), Layer(epsilon=1e-12)
    )


def _running_means() -> Iterator[Case]:
    yield Case("running mean right, at 1e6", partial(_normal, 1e6, running_mean=1e6))
    yield Case("running mean 3.1 sd off", partial(_normal, 0.0, running_mean=3.1))
    yield Case("running mean 1e6 sd too high", partial(_normal, 0.0, running_mean=1e6))
    yield Case("running mean 1e6 sd too low", partial(_normal, 0.0, running_mean=-1e6))
    yield Case("offset 1e6, running mean -1e6", partial(_normal, 1e6, running_mean=-1e6))


def _long() -> Iterator[Case]:
    for name, (shape, axis) in LONG_LAYOUTS.items():
        for offset in (0.0, 3.1, 1e3):
            yield Case(
                f"{name}, offset {_short(offset)}",
                partial(_long_batch, shape, offset, Layer(axis)),
                Layer(axis),
            )


def _long_batch(shape: tuple[int, ...], offset: float, layer: Layer) -> Batch:
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    x += np.float32(offset)
    return _batch(x, layer=layer)


def _constant(value: float, rows: int = ROWS) -> Batch:
    return _batch(np.full((rows, FEATURES), value))


def _every_other_constant() -> Batch:
    x = 1e3 + _noise(ROWS, FEATURES)
    x[:, ::2] = 12345.678
    return _batch(x)


def _outlier(value: float) -> Batch:
    x = _noise(ROWS, FEATURES)
    x[ROWS // 3] = value
    return _batch(x)


def _extremes() -> Iterator[Case]:
    yield Case("constant at 12345.678", partial(_constant, 12345.678))
    yield Case("constant at 12345.678, 4097 rows", partial(_constant, 12345.678, 4097))
    yield Case("constant at 3e10, 100003 rows", partial(_constant, 3e10, 100_003))
    yield Case("constant beside varying features", _every_other_constant)
    yield Case("one outlier of 1e6", partial(_outlier, 1e6))
    yield Case("one outlier of 1e10", partial(_outlier, 1e10))
    yield Case("sd 1e-15", partial(_normal, 0.0, 1e-15))
    yield Case("sd 1e-15, epsilon 1e-36", partial(_normal, 0.0, 1e-15), Layer(epsilon=1e-36))
    yield Case("sd 1e-17", partial(_normal, 0.0, 1e-17))
    yield Case("denormal, sd 1e-40", partial(_normal, 0.0, 1e-40))
    yield Case("offset 0.001, sd 1e-9", partial(_normal, 1e-3, 1e-9))
    yield Case("sd 1e18", partial(_normal, 0.0, 1e18))
    yield Case("offset 1e18, sd 1e15", partial(_normal, 1e18, 1e15))
    yield Case("offset 1e20, sd 1e16", partial(_normal, 1e20, 1e16))


def _parameters() -> Iterator[Case]:
    yield Case("offset 10000, scale 100", partial(_normal, 1e4, scale=100.0))
    yield Case("offset 10000, scale -100", partial(_normal, 1e4, scale=-100.0))
    yield Case("offset 10000, scale -1, bias 3", partial(_normal, 1e4, scale=-1.0, bias=3.0))


def _masked(mask: np.ndarray, poison: float | None = None, **options: Any) -> Batch:
    x = _noise(ROWS, FEATURES)
    if poison is not None:
        x = np.where(mask, x, poison)
    return _batch(x, mask, **options)


def _masks() -> Iterator[Case]:
    rows = np.arange(ROWS)[:, None]
    features = np.arange(FEATURES)
    weights = np.abs(_noise(ROWS, FEATURES)).astype(np.float32)
    yield Case("mask with NaN behind it", partial(_masked, rows % 3 > 0, np.nan))
    yield Case("mask of its own per feature", partial(_masked, (rows + features) % 3 > 0))
    yield Case("weight per position", partial(_masked, weights))
    yield Case("one valid row", partial(_masked, rows == 7))
    yield Case("nothing valid", partial(_masked, rows < 0, running_mean=0.25, running_var=4.0))


def _halves() -> Iterator[Case]:
    layer = Layer(dtype="float32")
    guarded = layer._replace(use_fast_variance=False)
    for name, options in ((UNGUARDED, layer), (f"{UNGUARDED}, guarded", guarded)):
        yield Case(name, partial(_half, 300.0, 1.0, jnp.bfloat16), options)
    yield Case("float16, near 65504", partial(_half, 65000.0, 300.0, np.float16), layer)


def _half(offset: float, sd: float, dtype: Any) -> Batch:
    return _batch(np.minimum(offset + sd * _noise(ROWS, FEATURES), 65504.0), dtype=dtype)


def _shards() -> Iterator[Case]:
    layer = Layer(axis_name="shards")
    quarter_squares = np.arange(8.0).reshape(2, 4, 1) ** 2 / 4
    for name, valid_rows in (("5 of 8 rows valid", 5), ("one of them fully masked", 4)):
        mask = (np.arange(8) < valid_rows).reshape(2, 4, 1)
        yield Case(f"two shards, {name}", partial(_batch, quarter_squares, mask), layer)
    offsets = np.array([0.0, 1e3, 1e4, 1e5])[:, None, None]
    shards = _noise(4, 256, FEATURES) + offsets
    yield Case("four shards, offsets 0 to 100000", partial(_batch, shards), layer)


def _layouts() -> Iterator[Case]:
    for name, axis in (("NCHW", 1), ("features on two axes", (0, 2))):
        layer = Layer(axis)
        x = 1e4 + _noise(32, 16, 8, 8)
        yield Case(f"{name}, offset 10000", partial(_batch, x, layer=layer), layer)


def _ghost_groups() -> Iterator[Case]:
    x = _noise(ROWS, FEATURES)
    x[1024:2048] += 1e4
    yield Case("groups of 1024, one at 10000", partial(_batch, x), Layer(virtual_batch_size=1024))
    groups = Layer(virtual_batch_size=300)
    for offset, sd in ((1e6, 1.0), (0.0, 2e18)):
        make = partial(_normal, offset, sd, 3000)
        yield Case(f"groups of 300, offset {_short(offset)}, sd {_short(sd)}", make, groups)
    make = partial(_normal, 0.0, rows=3000, running_mean=1e10)
    yield Case("groups of 300, running mean 1e10 sd too high", make, groups)
    constant = np.full((3000, FEATURES), 3.3e10, np.float32)
    yield Case("groups of 300, constant at 3.3e10", partial(_batch, constant), groups)
    outlier = _noise(ROWS, FEATURES)
    outlier[7] = -1e10
    whole = Layer(virtual_batch_size=ROWS)
    yield Case("one group, one outlier of -1e10", partial(_batch, outlier), whole)


CASES: tuple[Case, ...] = (
    *_offsets(),
    *_running_means(),
    *_long(),
    *_extremes(),
    *_parameters(),
    *_masks(),
    *_halves(),
    *_shards(),
    *_layouts(),
    *_ghost_groups(),
)
