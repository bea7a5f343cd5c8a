"""What the norms take and return, and their configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, NamedTuple, NotRequired, Self, TypeAlias, TypedDict

import jax
from jax.typing import DTypeLike

Axes: TypeAlias = int | Sequence[int]
AxisName: TypeAlias = str | Sequence[str]
AxisIndexGroups: TypeAlias = Sequence[Sequence[int]]
Activation: TypeAlias = Callable[[jax.Array], jax.Array]


class Params(TypedDict, total=False):
    """The learned parameters, each of the shape of the features; either may be absent."""

    scale: jax.Array
    bias: jax.Array


class Moments(NamedTuple):
    """The count, mean and biased variance of a set of values, for every feature.

    For complex values, `mean` is complex, and `var`, the mean of ``|x - mean|**2``, is real.

    Attributes:
        count: how many values entered (the sum of the weights, where the mask has weights). A
            scalar where it is the same for every feature, else of the shape of `mean`.
        mean: ``sum(w * x) / count``; 0 where `count` is 0.
        var: ``sum(w * |x - mean|**2) / count``; 0 where `count` is 0.
    """

    count: jax.Array  # type: ignore[assignment]
    mean: jax.Array
    var: jax.Array


class Measured(NamedTuple):
    """What a norm has measured since `start_measuring`.

    Every array is floating-point and of the shape of the features, so that code that stacks, splits
    or shards running statistics treats it in the same way.

    Attributes:
        count: how many values entered (the sum of their weights).
        mean: their mean; 0 where `count` is 0.
        var: their biased variance; 0 where `count` is 0.
        running_var_ddof: the layer's `running_var_ddof`; 0 before the first call.
        by_running: how many of the calls normalized by the running statistics, alone or, as batch
            renorm does in training, in part. What later layers measured depends on them.
        by_batch: how many of the calls normalized by the statistics of the batch, alone or in part.
        left_out: how many values were left out, because the mean or variance of their call was not
            finite.
        residue: the rounding error of the mean, which is ``mean + residue`` in higher precision.
            Variances far from zero cannot be merged without it.
    """

    count: jax.Array  # type: ignore[assignment]
    mean: jax.Array
    var: jax.Array
    running_var_ddof: jax.Array
    by_running: jax.Array
    by_batch: jax.Array
    left_out: jax.Array
    residue: jax.Array


class BatchStats(TypedDict):
    """The running statistics of a batch norm, each of the shape of the features.

    `count` is the number of batches that entered them; where it is present, each update adds one.
    Where `measured` is present, batches are measured instead of averaged: see `batch_norm`.
    """

    mean: jax.Array
    var: jax.Array
    count: NotRequired[jax.Array]
    measured: NotRequired[Measured]


class WhiteningStats(TypedDict):
    """The running statistics of a whitening norm: a mean, and the covariance of each group.

    `mean` is of shape [F], `cov` of shape [groups, size, size]. `count`, of shape [groups], is the
    number of batches that entered them; where it is present, each update adds one.
    """

    mean: jax.Array
    cov: jax.Array
    count: NotRequired[jax.Array]


class Transform(NamedTuple):
    """What standardizing needs besides x, every array of the rank of x.

    The variance is real. The other arrays have one dtype, complex if `x` or a parameter is.

    Attributes:
        shift: the larger part of the mean.
        delta: the rest of the mean, kept apart so that no rounding of the mean is left in y. None
            where the mean is one number.
        var_plus_epsilon: the variance plus epsilon.
        scale: the factor after normalization, or None for 1.
        bias: the summand after normalization, or None for 0.
    """

    shift: jax.Array
    delta: jax.Array | None
    var_plus_epsilon: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None


Correction: TypeAlias = Callable[[Transform, Transform], Transform]
"""Maps the transforms by the batch and by the running statistics to the one to compute."""


def check_epsilon(epsilon: float | jax.Array) -> None:
    """Raises the ValueError for a number that is not positive; a traced one passes."""
    if isinstance(epsilon, Real) and not float(epsilon) > 0:
        raise ValueError(f"epsilon={epsilon} must be positive: 1e-5 is usual.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """The configuration of a norm, checked when it is made.

    Modules build it from their attributes, pure functions from their keywords; everything below
    takes it whole. `batch_norm` documents the fields. `momentum` and `epsilon` may be traced, and
    are then taken as they are.

    Raises:
        TypeError: `activation` is not a function.
        ValueError: a value is out of its range, or two options contradict each other.
    """

    axis: Axes = -1
    momentum: float | jax.Array | None = 0.99
    epsilon: float | jax.Array = 1e-5
    activation: Activation | None = None
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    virtual_batch_size: int | None = None
    running_var_ddof: int = 0
    dtype: DTypeLike | None = None
    correction: Correction | None = None
    use_fast_variance: bool = True
    # How a warning names the layer; a pure function has no name.
    describe_layer: Callable[[], str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.momentum, Real) and not 0 <= float(self.momentum) <= 1:
            raise ValueError(
                f"momentum={self.momentum} is outside [0, 1]: it is the weight of the old value, "
                "for example 0.9 or 0.99 (PyTorch's momentum is 1 minus this)."
            )
        check_epsilon(self.epsilon)
        if self.running_var_ddof not in (0, 1):
            raise ValueError(
                f"running_var_ddof={self.running_var_ddof} must be 0 (biased, as Flax) or 1 "
                "(unbiased, as the paper and PyTorch)."
            )
        if self.activation is not None and not callable(self.activation):
            raise TypeError(
                f"activation={self.activation!r} is not a function: pass for example jax.nn.relu."
            )

    @classmethod
    def of_module(cls, layer: Any, **others: Any) -> Self:
        """Returns the configuration that the attributes of a Flax module say.

        Args:
            layer: the module, ours or Flax's; what it has no attribute for has its default.
            **others: fields that an attribute of another name, or none, says.
        """
        for field in fields(cls):
            if field.name not in others and hasattr(layer, field.name):
                others[field.name] = getattr(layer, field.name)
        return cls(**others)


class Mode(NamedTuple):
    """How one call of a norm with running statistics is run.

    Attributes:
        use_running_average: whether the running statistics normalize, instead of the batch's.
        update: whether the batch updates the running statistics.
        initializing: whether a model is being initialized: nothing is synchronized or grouped
            then, and no single value is warned of.
    """

    use_running_average: bool
    update: bool
    initializing: bool = False
