"""Whitening as a pure function of parameters, statistics and input.

The inverse square root of a covariance ``A`` comes from the coupled Newton-Schulz iteration (Higham
2008, section 6.3), which needs nothing but products. From ``Y = A / c`` and ``Z = I``, ::

    T = (3 I - Z Y) / 2,    Y <- Y T,    Z <- T Z

take ``Y`` to ``sqrt(A / c)`` and ``Z`` to its inverse. In exact arithmetic that is the uncoupled
``Z <- (3 Z - Z**3 A / c) / 2`` of the papers, which in float32 comes apart: once converged, it
multiplies what rounding has broken of ``Z A = A Z`` in every step. The coupled one corrects in each
step the product that it sees.

It converges where the eigenvalues of ``A / c`` are above 0 and under 3, in as many steps as the
smallest needs to grow to 1, each multiplying it by up to 9/4. So `c` is to be a bound of the
largest that is as tight as it can be had for nothing: the Frobenius norm, where the papers have the
trace. It is smooth, never larger than the trace, and of ``size`` equal eigenvalues smaller by
``sqrt(size)``. As many steps come nearer to the limit, which is the same.
"""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax._core.batch_norm import (
    average,
    check_averaging,
    check_values_per_feature,
)
from bn_jax._core.feature_norms import size_of_groups
from bn_jax._core.moments import (
    INPUT_NAME,
    MOMENTS_NAME,
    AxisName,
    as_floating,
    broadcastable_mask,
    canonical_axes,
    centre,
    centred_moments,
    covariance,
    make_reduction,
    named,
    split_axis,
    statistics_dtype,
)
from bn_jax._core.standardize import Params, as_params, check_epsilon, output_dtype, reshape_like


class WhiteningStats(TypedDict):
    """The running statistics: the mean, of shape [F], and the covariance of each group.

    `cov` is of shape [groups, size, size]. `count`, of shape [groups], is the number of batches
    that entered them; where it is kept, each update adds one.
    """

    mean: jax.Array
    cov: jax.Array
    count: NotRequired[jax.Array]


def init_whitening_stats(
    features: int,
    *,
    group_size: int | None = None,
    dtype: Any = jnp.float32,
    use_count: bool = False,
) -> WhiteningStats:
    """Returns a mean of zeros and covariances that are the identity.

    Args:
        features: the number of features.
        group_size: how many of them are whitened together; None for all.
        dtype: the dtype of the statistics.
        use_count: whether there is ``"count": zeros`` as well, the number of batches, which
            ``momentum=None`` needs.

    Returns:
        ``{"mean": [F], "cov": [groups, size, size]}`` for `whitening_norm`.

    Raises:
        ValueError: `group_size` does not divide `features`.

    Example:
        >>> import jax, bn_jax as bn
        >>> jax.tree.map(jax.numpy.shape, bn.init_whitening_stats(6, group_size=3))
        {'cov': (2, 3, 3), 'mean': (6,)}
    """
    groups, size = _groups_of(features, group_size)
    identity = jnp.tile(jnp.eye(size, dtype=dtype)[None], (groups, 1, 1))
    batch_stats: WhiteningStats = {"mean": jnp.zeros(features, dtype), "cov": identity}
    if use_count:
        batch_stats["count"] = jnp.zeros(groups, statistics_dtype(dtype))
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
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: Any = None,
    initializing: bool = False,
) -> tuple[jax.Array, WhiteningStats]:
    """Whitens the features over the batch and updates the running statistics.

    ``y = (cov + epsilon * I)**(-1/2) @ (x - mean) * scale + bias``, the root being the symmetric
    one (ZCA), group by group. In training, `mean` and `cov` are those of the batch and ::

        new_mean = momentum * old_mean + (1 - momentum) * mean
        new_cov = momentum * old_cov + (1 - momentum) * cov

    In evaluation they are the running ones, and the root is computed from them: covariances of
    several batches have a mean that is a covariance, their inverse roots do not.

    The root is that of so many coupled Newton iterations on the matrix divided by its Frobenius
    norm; `bn_jax.whitening` says why. Few of them leave the directions of small variance smaller
    than 1: one whose variance is `r` times that norm takes about
    ``3 + log(1 / r) / log(9 / 4)``. More change nothing. In float32 the covariance of the output
    is then the identity to about 1e-5 for a condition number of 1e3, and 1e-4 for one of 1e4.
    Groups of one feature are batch norm after any number of iterations.

    Args:
        params: ``{"scale": [F], "bias": [F]}``, either may be absent.
        batch_stats: ``{"mean": [F], "cov": [groups, size, size]}`` and on demand
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
        iterations: of Newton's method.
        group_size: so many consecutive features are whitened together; None for all. A group with
            no fewer features than the batch has values cannot be white.
        mask: boolean or non-negative weights, broadcastable to `x`, of size 1 on `axis`: what
            enters the statistics. Every position is still whitened; one that is not finite, and
            masked, becomes NaN in its group and reaches nothing else, and no derivative.
        axis_name: the named axis or axes to synchronize over, as of `batch_norm`; there are
            two collectives.
        axis_index_groups: groups of indices of `axis_name` with statistics of their own.
        dtype: the dtype of `y`; by default that of `x` and `params` promoted. All else is computed
            in at least float32, products in full precision.
        initializing: True while a model is initialized: no update, no synchronization, and a
            batch of one is allowed.

    Returns:
        `y`, of the shape of `x`, and the new `batch_stats` in the dtypes of the old; the old ones
        where there is no update. A group whose batch moments are not finite keeps its old ones, and
        so do all where nothing valid contributed; the running ones whiten then.

    Raises:
        TypeError: `x` is integer, boolean or complex, or something else is complex.
        ValueError: an argument does not fit the others; the message says which and how to mend
            it. Training on one value per feature is one such case.
        NameError: `axis_name` is not bound, but other axes are.

    Where it differs from the papers: the iteration is coupled and starts from a matrix divided by
    its Frobenius norm; they average inverse roots, not covariances.

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
    update = not use_running_average if update_running_average is None else update_running_average
    update = update and not initializing
    check_averaging(momentum, 0)
    if update:
        _check_count_kept(momentum, batch_stats)
    _check_iterations(iterations)
    given = _prepare(params, batch_stats, x, axis, epsilon, group_size, mask, dtype)
    if use_running_average:
        mean = given.expand(given.batch_stats["mean"])
        moments = _Moments(mean, jnp.zeros_like(mean), given.running_cov())
    if update or not use_running_average:
        names = (None, None) if initializing else (axis_name, axis_index_groups)
        found, batch = _measure(given, *names, initializing)
        moments = moments if use_running_average else batch
    y = _whiten(given, moments, epsilon, iterations)
    return y, _updated(given, momentum, found, batch) if update else batch_stats


def inverse_square_root(matrices: jax.Array, iterations: int) -> jax.Array:
    """Returns the inverse square roots of symmetric positive definite matrices.

    Args:
        matrices: ``[groups, size, size]``, floating point.
        iterations: how many steps of the coupled Newton-Schulz iteration.

    Returns:
        ``[groups, size, size]``.

    Reference: Higham 2008, "Functions of Matrices", equation 6.35.
    """
    # In two divisions, for the squares of what is not divided by the trace may overflow.
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


class _Given(NamedTuple):
    """Checked input; `real` is the dtype to compute in."""

    params: Params
    batch_stats: WhiteningStats
    x: jax.Array
    mask: jax.Array | None
    axis: int
    size: int
    dtype: Any
    real: Any

    def expand(self, values: jax.Array) -> jax.Array:
        """Returns values of the features, which broadcast to `x`."""
        shape = tuple(size if axis == self.axis else 1 for axis, size in enumerate(self.x.shape))
        return values.astype(self.real).reshape(shape)

    def running_cov(self) -> jax.Array:
        return self.batch_stats["cov"].astype(self.real)


class _Moments(NamedTuple):
    """What to whiten by: the mean, unevaluated and of the rank of `x`, and the covariances."""

    shift: jax.Array
    delta: jax.Array
    cov: jax.Array


def _prepare(
    params: Params,
    batch_stats: WhiteningStats,
    x: jax.Array,
    axis: int,
    epsilon: float | jax.Array,
    group_size: int | None,
    mask: jax.Array | None,
    dtype: Any,
) -> _Given:
    x, params = named(INPUT_NAME, as_floating("x", x)), as_params(params)
    feature_axes = canonical_axes("axis", axis, x.ndim)
    if len(feature_axes) != 1:
        raise ValueError(
            f"axis={axis} has {len(feature_axes)} axes, expected one: reshape x of shape {x.shape} "
            "so that one axis holds all features."
        )
    (feature_axis,) = feature_axes
    stats = _known(batch_stats)
    _check_shapes(axis, x.shape, x.shape[feature_axis], group_size, params, stats)
    check_epsilon(epsilon)
    mask = None if mask is None else _mask_of_examples(mask, x.shape, feature_axis)
    _require_real(x, params, stats, dtype)
    dtype = output_dtype(dtype, x, params)
    _, size = _groups_of(x.shape[feature_axis], group_size)
    real = statistics_dtype(x.dtype, dtype)
    return _Given(params, cast(WhiteningStats, stats), x, mask, feature_axis, size, dtype, real)


def _measure(
    given: _Given,
    axis_name: AxisName | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    initializing: bool,
) -> tuple[jax.Array, _Moments]:
    """Returns the count, and the moments of the batch; where nothing entered, the running ones."""
    x, mask = given.x, given.mask
    reduced = tuple(axis for axis in range(x.ndim) if axis != given.axis)
    reduction = make_reduction(x, reduced, axis_name, axis_index_groups)
    if not initializing:
        check_values_per_feature(reduction, x.shape, x.shape, given.axis)
    running_mean = given.expand(given.batch_stats["mean"])
    shift = jnp.where(jnp.isfinite(running_mean), running_mean, 0)
    found = named(MOMENTS_NAME, centred_moments(reduction, x, mask, shift))
    cov = covariance(reduction, x, mask, found, given.axis, given.size)
    cov = named(MOMENTS_NAME, cov)
    count = found.count.reshape(())
    return count, _Moments(found.shift, found.delta, jnp.where(count > 0, cov, given.running_cov()))


def _whiten(
    given: _Given, moments: _Moments, epsilon: float | jax.Array, iterations: int
) -> jax.Array:
    axis, mask = given.axis, given.mask
    identity = jnp.eye(given.size, dtype=given.real)[None]
    root = inverse_square_root(
        moments.cov + jnp.asarray(epsilon, given.real) * identity, iterations
    )
    examples = split_axis(axis, given.size, centre(given.x, moments.shift, moments.delta))
    usable = None
    if mask is not None:
        # NaN times a cotangent of zero would reach the derivatives of the root and of scale.
        finite = jnp.all(jnp.isfinite(examples), axis + 1, keepdims=True)
        usable = split_axis(axis, given.size, mask).astype(bool) | finite
        examples = jnp.where(usable, examples, 0)
    y = lax.dot_general(
        examples, root, (((axis + 1,), (2,)), ((axis,), (0,))), precision=lax.Precision.HIGHEST
    )
    y = jnp.moveaxis(y, (0, -1), (axis, axis + 1))
    own = {
        name: split_axis(axis, given.size, given.expand(values))
        for name, values in _leaves(given.params)
    }
    y = y * own["scale"] if "scale" in own else y
    y = y + own["bias"] if "bias" in own else y
    if usable is not None:
        y = jnp.where(usable, y, jnp.nan)
    return reshape_like(jax.typeof(given.x), y).astype(given.dtype)


def _updated(
    given: _Given, momentum: float | jax.Array | None, count: jax.Array, batch: _Moments
) -> WhiteningStats:
    old = given.batch_stats
    groups = len(old["cov"])
    weight = 1 / (old["count"] + 1) if momentum is None else 1 - momentum
    by_step = weight < 0.5 if isinstance(weight, Real) else None

    def averaged(old: jax.Array, new: jax.Array) -> jax.Array:
        share = jnp.asarray(weight)
        share = share.reshape(share.shape + (1,) * (new.ndim - 1) if share.ndim else ())
        return average(by_step, share, old, new)

    old_mean = old["mean"].reshape(groups, given.size)
    mean = averaged(old_mean, (batch.shift + batch.delta).reshape(groups, given.size))
    cov = averaged(old["cov"], batch.cov)
    finite = jnp.all(jnp.isfinite(mean), 1) & jnp.all(jnp.isfinite(cov), (1, 2))
    enters = (count > 0) & finite
    new: dict[str, Any] = {
        "mean": jnp.where(enters[:, None], mean, old_mean).reshape(old["mean"].shape),
        "cov": jnp.where(enters[:, None, None], cov, old["cov"]),
    }
    if "count" in old:
        new["count"] = old["count"] + enters.astype(old["count"].dtype)
    return cast(WhiteningStats, new)


def _groups_of(features: int, group_size: int | None) -> tuple[int, int]:
    """Returns the number of groups and the features in each."""
    size = features if group_size is None else size_of_groups(features, None, group_size)
    return features // max(1, size), size


def _known(batch_stats: Any) -> dict[str, jax.Array]:
    """Returns the statistics, or raises the ValueError that says what they should be."""
    known = {"mean", "cov", "count"}
    if not {"mean", "cov"} <= set(batch_stats) <= known:
        raise ValueError(
            f"batch_stats has {sorted(batch_stats)}; expected 'mean' and 'cov', and on demand "
            "'count'. Make a new one with bn_jax.init_whitening_stats(features, group_size=...)."
        )
    return {name: jnp.asarray(batch_stats[name]) for name in batch_stats}


def _leaves(tree: Mapping[str, Any]) -> list[tuple[str, jax.Array]]:
    return list(tree.items())


def _check_shapes(
    axis: int,
    shape: tuple[int, ...],
    features: int,
    group_size: int | None,
    params: Params,
    batch_stats: dict[str, jax.Array],
) -> None:
    given = [*_leaves(params), *_leaves(batch_stats)]
    wrong = [
        name for name, leaf in given if name not in ("cov", "count") and leaf.shape != (features,)
    ]
    if not wrong:
        groups, size = _groups_of(features, group_size)
        expected = {"cov": (groups, size, size), "count": (groups,)}
        wrong = [name for name, leaf in given if leaf.shape != expected.get(name, leaf.shape)]
    if wrong:
        shapes = [
            {name: leaf.shape for name, leaf in _leaves(tree)} for tree in (params, batch_stats)
        ]
        raise ValueError(
            f"x of shape {shape} has {features} features on axis={axis}, with "
            f"group_size={group_size}, but params has {shapes[0]} and batch_stats has "
            f"{shapes[1]}; {wrong} do not fit. Pass the axis that holds the features, or make anew "
            f"with bn_jax.init_params({features}) and "
            f"bn_jax.init_whitening_stats({features}, group_size={group_size})."
        )


def _require_real(
    x: jax.Array, params: Params, batch_stats: dict[str, jax.Array], dtype: Any
) -> None:
    dtypes = {name: leaf.dtype for name, leaf in [*_leaves(params), *_leaves(batch_stats)]}
    for name, own in {"x": x.dtype, "dtype": dtype, **dtypes}.items():
        if own is not None and jnp.issubdtype(own, jnp.complexfloating):
            raise TypeError(
                f"{name} is {jnp.dtype(own).name}; expected a real floating-point dtype. Whiten "
                "real and imaginary parts as features of their own."
            )


def _mask_of_examples(mask: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    mask = broadcastable_mask(mask, shape)
    if mask.shape[axis] != 1:
        raise ValueError(
            f"mask of shape {mask.shape} differs between features, on axis {axis} of x of shape "
            f"{shape}: a covariance needs all features of a position or none. Pass a mask of size "
            "1 there."
        )
    return mask


def _check_count_kept(momentum: Any, batch_stats: WhiteningStats) -> None:
    if momentum is None and "count" not in batch_stats:
        raise ValueError(
            "momentum=None averages over all batches and needs their count, but batch_stats has "
            f"{sorted(batch_stats)}. Make it with bn_jax.init_whitening_stats(features, "
            "use_count=True), or pass a momentum."
        )


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(
            f"iterations={iterations} must be at least 1: 5 is usual, 20 whiten completely."
        )
