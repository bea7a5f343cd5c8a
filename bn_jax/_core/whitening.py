"""Whitening as a pure function of parameters, statistics and input.

The inverse square root of a covariance ``A`` comes from the coupled Newton-Schulz iteration (Higham
2008, section 6.3), which needs nothing but products. From ``Y = A / c`` and ``Z = I``, ::

    T = (3 I - Z Y) / 2,    Y <- Y T,    Z <- T Z

take ``Y`` to ``sqrt(A / c)`` and ``Z`` to its inverse. In exact arithmetic that is the uncoupled
``Z <- (3 Z - Z**3 A / c) / 2`` of the papers. In float32, the uncoupled iteration diverges after it
has converged: every step multiplies the rounding error of ``Z A = A Z``. The coupled iteration
corrects in each step the product that it computes.

It converges where the eigenvalues of ``A / c`` are above 0 and under 3. It takes as many steps as
the smallest eigenvalue needs to grow to 1, each multiplying it by up to 9/4. So `c` should be a
tight bound of the largest eigenvalue that costs nothing: the Frobenius norm, where the papers have
the trace. It is smooth, never larger than the trace, and smaller by ``sqrt(size)`` for ``size``
equal eigenvalues. The same number of steps comes nearer to the limit, which is the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from bn_jax._core.axes import (
    Reduction,
    all_reduce,
    make_reduction,
    place_like,
    reshape_like,
    sharding_of_groups,
    split_axis,
    static_count,
)
from bn_jax._core.batch_norm import choose_mode
from bn_jax._core.checkpoint_names import INPUT_NAME, MOMENTS_NAME, named
from bn_jax._core.checks import (
    as_floating,
    as_mask,
    as_params,
    as_shape,
    canonical_axes,
    check_count_kept,
    check_tree,
    output_dtype,
    shapes_of,
    size_of_groups,
    statistics_dtype,
    warn_of_single_value,
)
from bn_jax._core.moments import (
    CentredMoments,
    centred_moments,
    choose_method,
    name_moments,
)
from bn_jax._core.running import Weight, average, weigh_batch
from bn_jax._core.sums import (
    centre,
    divide,
    divisor_of,
    keep_valid,
    weigh,
)
from bn_jax._core.types import (
    AxisIndexGroups,
    AxisName,
    Mode,
    Options,
    Params,
    WhiteningStats,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class WhiteningOptions(Options):
    """The configuration of a whitening norm, checked when it is made.

    Raises:
        ValueError: `iterations` is less than 1, or as `Options` does.
    """

    iterations: int = 5
    group_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(
                f"iterations={self.iterations} must be at least 1: 5 is usual, 20 whiten "
                "completely."
            )


def init_whitening_stats(
    features: int,
    *,
    group_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
    use_count: bool = False,
) -> WhiteningStats:
    """Returns a mean of zeros and covariances that are the identity.

    Args:
        features: the number of features.
        group_size: how many consecutive features are whitened together; None for all.
        dtype: the dtype of the statistics; half precision becomes float32.
        use_count: whether to add ``"count": zeros``, the number of batches, which ``momentum=None``
            needs.

    Returns:
        ``{"mean": [F], "cov": [groups, size, size]}`` for `whitening_norm`.

    Raises:
        ValueError: `group_size` does not divide `features`.

    Example:
        >>> import jax, bn_jax as bn
        >>> jax.tree.map(jax.numpy.shape, bn.init_whitening_stats(6, group_size=3))
        {'cov': (2, 3, 3), 'mean': (6,)}
    """
    (features,) = as_shape((features,))
    groups, size = _groups_of(features, group_size)
    dtype = statistics_dtype(dtype)
    identity = jnp.tile(jnp.eye(size, dtype=dtype)[None], (groups, 1, 1))
    batch_stats: WhiteningStats = {"mean": jnp.zeros(features, dtype), "cov": identity}
    if use_count:
        batch_stats["count"] = jnp.zeros(groups, dtype)
    return batch_stats


def whitening_norm(
    params: Params,
    batch_stats: WhiteningStats,
    x: jax.Array,
    *,
    use_running_average: bool,
    update_running_average: bool | None = None,
    axis: int = -1,
    momentum: float | jax.Array | None = 0.99,
    epsilon: float | jax.Array = 1e-5,
    iterations: int = 5,
    group_size: int | None = None,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    dtype: DTypeLike | None = None,
    initializing: bool = False,
) -> tuple[jax.Array, WhiteningStats]:
    """Whitens the features over the batch and updates the running statistics.

    ``y = (cov + epsilon * I)**(-1/2) @ (x - mean) * scale + bias``, with the symmetric root (ZCA),
    group by group. In training, `mean` and `cov` are those of the batch and ::

        new_mean = momentum * old_mean + (1 - momentum) * mean
        new_cov = momentum * old_cov + (1 - momentum) * cov

    In evaluation they are the running ones, and the root is computed from them: covariances of
    several batches have a mean that is a covariance, their inverse roots do not.

    The root comes from coupled Newton iterations on the matrix divided by its Frobenius norm. With
    few iterations, directions of small variance come out smaller than 1: one whose variance is `r`
    times that norm takes about ``3 + log(1 / r) / log(9 / 4)`` iterations. More change nothing. In
    float32 the covariance of the output is then the identity to about 1e-5 for a condition number
    of 1e3, and to 1e-4 for one of 1e4. Groups of one feature are batch norm after any number of
    iterations. The file ``bn_jax/_core/whitening.py`` explains the choice.

    The covariance is summed around the mean of the batch, in a second pass over `x`. So it does not
    cancel in any dtype, and there is no `use_fast_variance`.

    Args:
        params: ``{"scale": [F], "bias": [F]}``, either may be absent.
        batch_stats: ``{"mean": [F], "cov": [groups, size, size]}`` and optionally
            ``"count": [groups]``; see `init_whitening_stats`. With `axis_name` the mean must be the
            same on every device.
        x: floating-point array of any rank, not complex.
        use_running_average: True to whiten by the running statistics, False by the batch's.
        update_running_average: whether the batch updates the running statistics. None: if and only
            if it also whitens.
        axis: the feature axis.
        momentum: the weight of the old value in the running statistics. None for the cumulative
            average, every batch weighing the same; it needs ``batch_stats["count"]``.
        epsilon: added to the variances, the diagonal of the covariance.
        iterations: how many Newton iterations to take.
        group_size: how many consecutive features are whitened together; None for all. A group with
            at least as many features as the batch has values cannot become white.
        mask: boolean or weights, broadcastable to `x`, of size 1 on `axis`: what enters the
            statistics; the rules are `batch_norm`'s. Every position is still whitened. One that is
            masked and not finite becomes NaN in its group, and reaches nothing else and no
            derivative.
        axis_name: the named axis or axes to synchronize over, as in `batch_norm`, by two
            collectives.
        axis_index_groups: groups of indices of `axis_name`, each with its own statistics.
        dtype: the dtype of `y`; by default the promoted dtype of `x` and `params`. All else is
            computed in at least float32, with products in full precision.
        initializing: True while a model is initialized: no update, no synchronization, and no
            warning of one value per feature.

    Returns:
        `y`, of the shape of `x`, and the new `batch_stats` in the dtypes of the old, but in at
        least float32 (see `bn_jax.promote_batch_stats`); the old ones where there is no update. A
        group whose batch moments are not finite keeps its old values. Where nothing valid
        contributed, all groups do, and the running ones whiten.

    Raises:
        TypeError: `x` is integer, boolean or complex, or something else is complex.
        ValueError: an argument does not fit the others; the message says which and how to fix
            it.
        NameError: `axis_name` is not bound, but other axes are.

    Warns:
        UserWarning: there is one value per feature to train on, as in `batch_norm`. Then `y` is
            `bias` whatever `x` is, the gradient by `x` is 0, and the running covariances move
            towards 0.

    Where it differs from the papers: the iteration is coupled and starts from a matrix divided by
    its Frobenius norm. The papers average inverse roots, not covariances.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> params, batch_stats = bn.init_params(2), bn.init_whitening_stats(2)
        >>> x = jax.random.normal(jax.random.key(0), (100, 2)) @ jnp.array([[3.0, 1.0], [0.0, 1.0]])
        >>> y, batch_stats = bn.whitening_norm(
        ...     params, batch_stats, x, use_running_average=False, iterations=10
        ... )
        >>> (jnp.cov(y.T, bias=True).round(3) + 0.0).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Reference: Huang et al. 2018, "Decorrelated Batch Normalization",
    https://arxiv.org/abs/1804.08450; Huang et al. 2019, "Iterative Normalization: Beyond
    Standardization towards Efficient Whitening", https://arxiv.org/abs/1904.03441.
    """
    options = WhiteningOptions(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        iterations=iterations,
        group_size=group_size,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        dtype=dtype,
    )
    # No whitening is measured, whatever its statistics hold.
    mode = choose_mode({}, use_running_average, update_running_average, initializing)
    return run_whitening(options, mode, params, batch_stats, as_floating("x", x), mask)


def run_whitening(
    options: WhiteningOptions,
    mode: Mode,
    params: Params,
    batch_stats: WhiteningStats,
    x: jax.Array,
    mask: jax.Array | None,
) -> tuple[jax.Array, WhiteningStats]:
    """Computes `whitening_norm`."""
    inputs = _check_inputs(options, params, batch_stats, x, mask)
    if mode.update and options.momentum is None:
        check_count_kept(batch_stats, "init_whitening_stats")
    if mode.use_running_average:
        mean = inputs.expand(inputs.batch_stats["mean"])
        y = _whiten(inputs, _Centre(mean, jnp.zeros_like(mean)), inputs.running_cov())
        y = place_like(x, y)
        if not mode.update:
            return y, batch_stats
    batch = _measure(inputs, mode.initializing)
    if not mode.use_running_average:
        y = place_like(x, _whiten(inputs, batch.centre, batch.cov))
    return y, _update(inputs, batch) if mode.update else batch_stats


def inverse_square_root(matrices: jax.Array, iterations: int) -> jax.Array:
    """Returns the inverse square roots of symmetric positive definite matrices.

    Args:
        matrices: ``[groups, size, size]``, floating point.
        iterations: how many steps of the coupled Newton-Schulz iteration to take.

    Returns:
        ``[groups, size, size]``.

    Reference: Higham 2008, "Functions of Matrices", equation 6.35.
    """
    # In two divisions: squares of entries not yet divided by the trace may overflow.
    trace = jnp.trace(matrices, axis1=1, axis2=2)[:, None, None]
    unit = matrices / trace
    norm = jnp.sqrt(jnp.sum(lax.square(unit), (1, 2), keepdims=True))
    unit = unit / norm
    identity = jnp.eye(matrices.shape[1], dtype=matrices.dtype)[None]

    def step(_: Any, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        root, inverse = pair
        factor = 1.5 * identity - 0.5 * _product(inverse, root)
        return _product(root, factor), _product(factor, inverse)

    # The inverse is the identity before the first step, and equals its factor after it.
    first = 1.5 * identity - 0.5 * unit
    _, inverse = lax.fori_loop(1, iterations, step, (_product(unit, first), first))
    return inverse * lax.rsqrt(trace) * lax.rsqrt(norm)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


class _Inputs(NamedTuple):
    """The checked arguments of a call, and what follows from them.

    `axis` is the axis of the features, `size` how many of them make up a group, `y_dtype` the dtype
    of the result, and `real` the dtype that everything else is computed in.
    """

    options: WhiteningOptions
    params: Params
    batch_stats: WhiteningStats
    x: jax.Array
    mask: jax.Array | None
    axis: int
    size: int
    y_dtype: jnp.dtype
    real: jnp.dtype

    def expand(self, values: jax.Array) -> jax.Array:
        """Returns values of the features, which broadcast to `x`."""
        shape = tuple(size if axis == self.axis else 1 for axis, size in enumerate(self.x.shape))
        return values.astype(self.real).reshape(shape)

    def running_cov(self) -> jax.Array:
        """Returns the running covariances in the dtype to compute in."""
        return self.batch_stats["cov"].astype(self.real)


class _Centre(NamedTuple):
    """A mean of the rank of `x`, as the unevaluated sum ``shift + delta``, or as `shift` alone."""

    shift: jax.Array
    delta: jax.Array | None


class _Batch(NamedTuple):
    """The count of a batch, its mean and its covariances."""

    count: jax.Array  # type: ignore[assignment]
    centre: _Centre
    cov: jax.Array


def _check_inputs(
    options: WhiteningOptions,
    params: Params,
    batch_stats: WhiteningStats,
    x: jax.Array,
    mask: jax.Array | None,
) -> _Inputs:
    params = as_params(params)
    feature_axes = canonical_axes("axis", options.axis, x.ndim)
    if len(feature_axes) != 1:
        raise ValueError(
            f"axis={options.axis} has {len(feature_axes)} axes, expected one: reshape x of shape "
            f"{x.shape} so that one axis holds all features."
        )
    axis = feature_axes[0]
    stats = _statistics_of(batch_stats)
    _check_shapes(options, x.shape, x.shape[axis], params, stats)
    mask = _as_mask_of_examples(mask, x.shape, axis)
    _require_real(options, x, params, stats)
    y_dtype = output_dtype(options.dtype, x, params)
    return _Inputs(
        options=options,
        params=params,
        batch_stats=cast(WhiteningStats, stats),
        x=named(INPUT_NAME, _with_whole_features(x, axis)),
        mask=mask,
        axis=axis,
        size=_groups_of(x.shape[axis], options.group_size)[1],
        y_dtype=y_dtype,
        real=statistics_dtype(x.dtype, y_dtype),
    )


def _measure(inputs: _Inputs, initializing: bool) -> _Batch:
    """Measures a batch; where nothing entered, its moments are the running ones."""
    x, mask, options = inputs.x, inputs.mask, inputs.options
    reduced = tuple(axis for axis in range(x.ndim) if axis != inputs.axis)
    if initializing:
        reduction = make_reduction(x, reduced, None, None)
    else:
        reduction = make_reduction(x, reduced, options.axis_name, options.axis_index_groups)
        if static_count(reduction, x.shape) == 1:
            warn_of_single_value(options, x.shape, in_groups=False)
    reduction = reduction._replace(method=choose_method(x.dtype, options.use_fast_variance))
    running_mean = inputs.expand(inputs.batch_stats["mean"])
    shift = jnp.where(jnp.isfinite(running_mean), running_mean, 0)
    measured = name_moments(centred_moments(reduction, x, mask, shift), mask)
    cov = _covariance(reduction, x, mask, measured, inputs.axis, inputs.size)
    cov = named(MOMENTS_NAME, cov)
    count = measured.count.reshape(())
    cov = jnp.where(count > 0, cov, inputs.running_cov())
    return _Batch(count, _Centre(measured.shift, measured.delta), cov)


def _covariance(
    reduction: Reduction,
    x: jax.Array,
    mask: jax.Array | None,
    measured: CentredMoments,
    axis: int,
    size: int,
) -> jax.Array:
    """Computes the covariances between the features of each group, around the measured mean.

    ``cov = sum(w * outer(x - mean, x - mean)) / count``. In two passes over `x`, the mean's and
    this one: the product reads `x` anyhow, and what it sums is around the true mean, so that
    nothing cancels at any offset. JAX itself differentiates it.

    Args:
        reduction: what `measured` was reduced over: all axes but one.
        x: floating point.
        mask: None, boolean or weights, of the rank of `x` and of size 1 on `axis`.
        measured: the moments of `x`.
        axis: the axis of the features.
        size: how many consecutive features make up a group.

    Returns:
        An array ``[groups, size, size]`` in the dtype of the mean, zeros where nothing entered.
    """
    deviation = keep_valid(centre(x, measured.shift, measured.delta), mask)
    groups = split_axis(axis, size, deviation)
    weighted = split_axis(axis, size, weigh(deviation, mask))
    reduced = tuple(other for other in range(groups.ndim) if other not in (axis, axis + 1))
    products = lax.dot_general(
        weighted,
        groups,
        ((reduced, reduced), ((axis,), (axis,))),
        precision=lax.Precision.HIGHEST,
        out_sharding=sharding_of_groups(groups, axis),
    )
    (total,) = all_reduce(reduction, products)
    divisor = divisor_of(reduction, x, mask, measured.count)
    return divide(total, divisor if isinstance(divisor, float) else divisor.reshape(()))


def _whiten(inputs: _Inputs, mean: _Centre, cov: jax.Array) -> jax.Array:
    axis, mask, options = inputs.axis, inputs.mask, inputs.options
    split = partial(split_axis, axis, inputs.size)
    identity = jnp.eye(inputs.size, dtype=inputs.real)[None]
    root = inverse_square_root(
        cov + jnp.asarray(options.epsilon, inputs.real) * identity, options.iterations
    )
    examples = split(centre(inputs.x, mean.shift, mean.delta))
    usable = None
    if mask is not None:
        # NaN times a cotangent of zero would reach the derivatives of the root and of scale.
        finite = jnp.all(jnp.isfinite(examples), axis + 1, keepdims=True)
        usable = split(mask).astype(bool) | finite
        examples = jnp.where(usable, examples, 0)
    y = lax.dot_general(
        examples, root, (((axis + 1,), (2,)), ((axis,), (0,))), precision=lax.Precision.HIGHEST
    )
    y = jnp.moveaxis(y, (0, -1), (axis, axis + 1))
    if "scale" in inputs.params:
        y = y * split(inputs.expand(inputs.params["scale"]))
    if "bias" in inputs.params:
        y = y + split(inputs.expand(inputs.params["bias"]))
    if usable is not None:
        y = jnp.where(usable, y, jnp.nan)
    return reshape_like(jax.typeof(inputs.x), y).astype(inputs.y_dtype)


def _update(inputs: _Inputs, batch: _Batch) -> WhiteningStats:
    old = inputs.batch_stats
    averaged = _average_groups(inputs.size, weigh_batch(inputs.options.momentum), old, batch)
    return cast(WhiteningStats, averaged)


@partial(jax.jit, static_argnums=0)
def _average_groups(
    size: int, weight: Weight, old: WhiteningStats, batch: _Batch
) -> dict[str, jax.Array]:
    """Averages mean and covariance; a group enters with all that it has, or not at all."""
    groups, features = old["cov"].shape[0], old["mean"].shape
    in_groups = {**cast(dict[str, jax.Array], old), "mean": old["mean"].reshape(groups, size)}
    mean, rest = batch.centre
    mean = (mean if rest is None else mean + rest).reshape(groups, size)
    moments = {"mean": mean, "cov": batch.cov}
    new = average(weight, in_groups, moments, batch.count > 0, rank=1)
    return {**new, "mean": new["mean"].reshape(features)}


def _groups_of(features: int, group_size: int | None) -> tuple[int, int]:
    """Returns the number of groups and the features in each."""
    size = features if group_size is None else size_of_groups(features, None, group_size)
    if features == 0:
        size = 1
    return features // size, size


def _statistics_of(batch_stats: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns the statistics, or raises the ValueError that says what they should be."""
    init = "bn_jax.init_whitening_stats(features)"
    check_tree("batch_stats", batch_stats, init, {"scale", "bias"})
    known = {"mean", "cov", "count"}
    if not {"mean", "cov"} <= set(batch_stats) <= known:
        raise ValueError(
            f"batch_stats has {sorted(batch_stats)}; expected 'mean' and 'cov', and optionally "
            "'count'. Make a new one with bn_jax.init_whitening_stats(features, group_size=...)."
        )
    return {name: jnp.asarray(values) for name, values in batch_stats.items()}


def _with_whole_features(x: jax.Array, axis: int) -> jax.Array:
    """Gathers the features where they are sharded explicitly, which groups need not follow.

    Where the compiler decides (an automatic mesh), it decides here too.
    """
    sharding = jax.typeof(x).sharding
    if sharding.spec[axis] is None:
        return x
    spec = PartitionSpec(*sharding.spec[:axis], None, *sharding.spec[axis + 1 :])
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def _check_shapes(
    options: WhiteningOptions,
    shape: tuple[int, ...],
    features: int,
    params: Params,
    batch_stats: dict[str, jax.Array],
) -> None:
    of_params, of_stats = shapes_of(params), shapes_of(batch_stats)
    leaves = {**of_params, **of_stats}
    per_group = {"cov", "count"}
    wrong = [name for name in leaves if name not in per_group and leaves[name] != (features,)]
    if not wrong:
        groups, size = _groups_of(features, options.group_size)
        expected = {"cov": (groups, size, size), "count": (groups,)}
        wrong = [name for name in expected if leaves.get(name, expected[name]) != expected[name]]
    if wrong:
        raise ValueError(
            f"x of shape {shape} has {features} features on axis={options.axis}, with "
            f"group_size={options.group_size}, but params has {of_params} and batch_stats "
            f"has {of_stats}; {wrong} do not fit. Pass the axis that holds the "
            f"features, or make new trees with bn_jax.init_params({features}) and "
            f"bn_jax.init_whitening_stats({features}, group_size={options.group_size})."
        )


def _require_real(
    options: WhiteningOptions, x: jax.Array, params: Params, batch_stats: dict[str, jax.Array]
) -> None:
    leaves: dict[str, jax.Array] = {**cast(dict[str, jax.Array], params), **batch_stats}
    dtypes = {"x": x.dtype, "dtype": options.dtype, **{name: leaves[name].dtype for name in leaves}}
    for name, dtype in dtypes.items():
        if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"{name} is {jnp.dtype(dtype).name}; expected a real floating-point dtype. Whiten "
                "real and imaginary parts as separate features."
            )


def _as_mask_of_examples(
    mask: jax.Array | None, shape: tuple[int, ...], axis: int
) -> jax.Array | None:
    if mask is None:
        return None
    mask = as_mask(mask, shape)
    if mask.shape[axis] != 1:
        raise ValueError(
            f"mask of shape {mask.shape} differs between features, on axis {axis} of x of shape "
            f"{shape}: a covariance needs all features of a position or none. Pass a mask of size "
            "1 there."
        )
    return mask
