"""What arguments must be: dtypes, axes, masks, shapes. Every message is written here or in `types`.

A message names the argument, what was received, what was expected, and the fix.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, ClassVar, NoReturn, cast

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from bn_jax._core.axes import canonical_groups
from bn_jax._core.domains import Domains
from bn_jax._core.types import (
    Activation,
    Axes,
    BatchStats,
    Correction,
    Options,
    Params,
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "params",
        "batch_stats",
        "x",
        "mask",
        "residual",
        "epsilon",
        "correction",
        "domains",
    ),
    meta_fields=(
        "activation",
        "feature_axes",
        "y_dtype",
        "var_dtype",
        "mean_dtype",
        "transform_dtype",
    ),
)
@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The checked arguments of a norm with running statistics, and what follows from them.

    Compiled functions take it whole: its arrays and numbers are traced, and the rest is static.

    Attributes:
        params: scale and bias, as arrays of the shape of the features.
        batch_stats: the running statistics as they were passed.
        x: the input.
        mask: None, or of the rank of `x`.
        residual: None, or an array of the shape of `x`.
        epsilon: what is added to the variance.
        correction: the correction of a relative of batch norm, or None.
        activation: the activation, or None.
        feature_axes: the axes of the features, ascending.
        y_dtype: the dtype of the result.
        var_dtype: the real dtype that statistics are computed in.
        mean_dtype: the dtype of the mean, complex if `x` is.
        transform_dtype: the dtype of the mean, scale and bias together, complex if one of them is.
        domains: the domains of the examples, where parameters or statistics have an axis of them.
    """

    params: Params
    batch_stats: BatchStats
    x: jax.Array
    mask: jax.Array | None
    residual: jax.Array | None
    epsilon: float | jax.Array
    correction: Correction | None
    activation: Activation | None
    feature_axes: tuple[int, ...]
    y_dtype: jnp.dtype
    var_dtype: jnp.dtype
    mean_dtype: jnp.dtype
    transform_dtype: jnp.dtype
    domains: Domains | None = None

    @property
    def features(self) -> tuple[int, ...]:
        """The sizes of the feature axes, the shape of what there is for each feature."""
        return tuple([self.x.shape[axis] for axis in self.feature_axes])


def check_inputs(
    options: Options,
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    mask: jax.Array | None,
    residual: jax.Array | None,
) -> Inputs:
    """Checks the arguments of a call of a batch norm; `batch_norm` says what they must be.

    `x` has been checked by `as_floating`: modules need its dtype before they have `params`.

    Raises:
        TypeError: `residual` is integer or boolean, or something is complex that may not be.
        ValueError: shapes do not fit, or entries are missing or unknown.
    """
    params = as_params(params)
    feature_axes = canonical_axes("axis", options.axis, x.ndim)
    known = statistics_of(batch_stats)
    check_features("axis", options.axis, feature_axes, x.shape, params=params, batch_stats=known)
    if jnp.iscomplexobj(batch_stats["mean"]) and not jnp.iscomplexobj(x):
        raise TypeError(
            f"batch_stats has a complex mean, but x has dtype {x.dtype}: cast x to "
            "jnp.complex64, or make batch_stats with bn_jax.init_batch_stats(features)."
        )
    residual = None if residual is None else _as_residual(residual, x.shape)
    y_dtype = output_dtype(options.dtype, x, params, residual)
    var_dtype = statistics_dtype(x.dtype, y_dtype)
    return Inputs(
        params=params,
        batch_stats=batch_stats,
        mask=None if mask is None else as_mask(mask, x.shape),
        residual=residual,
        epsilon=options.epsilon,
        correction=options.correction,
        activation=options.activation,
        feature_axes=feature_axes,
        y_dtype=y_dtype,
        var_dtype=var_dtype,
        mean_dtype=mean_dtype(var_dtype, x.dtype),
        transform_dtype=mean_dtype(var_dtype, x.dtype, *_dtypes_of(params)),
        x=x,
    )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "x", "mask", "epsilon"),
    meta_fields=("feature_axes", "y_dtype", "mean_dtype", "transform_dtype"),
)
@dataclass(frozen=True, kw_only=True)
class RowInputs:
    """The checked arguments of a norm without state, and what follows from them.

    Compiled functions take it whole: its arrays and numbers are traced, and the rest is static.

    Attributes:
        params: scale and bias, as arrays of the shape of the features.
        x: the input.
        mask: None, or of the rank of `x`.
        epsilon: what is added to the variance.
        feature_axes: the axes of scale and bias.
        y_dtype: the dtype of the result.
        mean_dtype: the dtype of the mean, complex if `x` is.
        transform_dtype: the dtype of the mean, scale and bias together, complex if one of them is.
    """

    domains: ClassVar[None] = None
    params: Params
    x: jax.Array
    mask: jax.Array | None
    epsilon: float | jax.Array
    feature_axes: tuple[int, ...]
    y_dtype: jnp.dtype
    mean_dtype: jnp.dtype
    transform_dtype: jnp.dtype


def make_row_inputs(
    options: Options,
    params: Params,
    x: jax.Array,
    mask: jax.Array | None,
    feature_axes: tuple[int, ...],
) -> RowInputs:
    """Returns arguments whose axes and shapes have been checked, with their dtypes."""
    y_dtype = output_dtype(options.dtype, x, params)
    real = statistics_dtype(x.dtype, y_dtype)
    return RowInputs(
        params=params,
        x=x,
        mask=mask,
        epsilon=options.epsilon,
        feature_axes=feature_axes,
        y_dtype=y_dtype,
        mean_dtype=mean_dtype(real, x.dtype),
        transform_dtype=mean_dtype(real, x.dtype, *_dtypes_of(params)),
    )


def as_shape(features: Axes) -> tuple[int, ...]:
    """Returns the shape of the features, or raises the error that says what they must be."""
    several = isinstance(features, Sequence) and not isinstance(features, str)
    shape: tuple[int, ...] = tuple(cast(Any, features)) if several else (cast(int, features),)
    for size in shape:
        # JAX itself knows the bounds of these.
        if export.is_symbolic_dim(size):
            continue
        if (
            isinstance(size, bool)
            or not hasattr(size, "__index__")
            or getattr(size, "ndim", 0) != 0
        ):
            raise TypeError(
                f"features={features!r} must be an integer, for example 64, or a tuple of integers "
                "where there are several feature axes."
            )
        if size < 0:
            raise ValueError(f"features={features!r} must not be negative: it is a size.")
    return shape


def check_tree(name: str, tree: Any, example: str, others: set[str]) -> None:
    """Raises the TypeError for an argument in the wrong place: no mapping, or with others' entries.

    Args:
        name: the argument.
        tree: what was passed.
        example: a call that makes the argument.
        others: entries that only the other tree of a call has.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"{name} is of type {type(tree).__name__}; expected a mapping of arrays, {example} for "
            "example. The order is (params, batch_stats, x), without batch_stats for norms that "
            "keep none."
        )
    if others & set(tree):
        raise TypeError(
            f"{name} has {sorted(tree)}, entries of another tree; expected what {example} makes. "
            "The order is (params, batch_stats, x)."
        )


def as_floating(name: str, x: jax.Array) -> jax.Array:
    """Returns `x` as a JAX array, or raises the TypeError that says what to cast."""
    if x is None or isinstance(x, Mapping | str):
        raise TypeError(
            f"{name} is of type {type(x).__name__}; expected a floating-point array. Arrays come "
            "after the trees: (params, batch_stats, x), or (params, x) for norms without state."
        )
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected a floating-point dtype. Cast it yourself, "
            f"for example {name}.astype(jnp.float32): which dtype is your choice."
        )
    return x


def statistics_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """Returns the real dtype for statistics of arrays of these dtypes: at least float32."""
    widest = jnp.dtype(jnp.float32)
    for dtype in dtypes:
        real = jnp.finfo(dtype).dtype
        if real.itemsize > widest.itemsize:
            widest = real
    return widest


def mean_dtype(real: jnp.dtype, *dtypes: DTypeLike) -> jnp.dtype:
    """Returns the real dtype of the statistics, or its complex one if another dtype is complex."""
    for dtype in dtypes:
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return jnp.dtype(jnp.complex128 if real.itemsize == 8 else jnp.complex64)
    return real


def features_of(name: str, axes: Axes, x: jax.Array) -> tuple[int, ...]:
    """Returns the sizes of the feature axes of `x`."""
    features = []
    for axis in canonical_axes(name, axes, jnp.ndim(x)):
        features.append(x.shape[axis])
    return tuple(features)


def canonical_axes(name: str, axes: Axes, rank: int) -> tuple[int, ...]:
    """Returns sorted non-negative axes, or raises the ValueError that names the rank."""
    canonical = []
    for axis in (axes,) if isinstance(axes, int) else axes:
        if not -rank <= axis < rank:
            raise ValueError(
                f"{name}={axes} is out of range for x of rank {rank}: expected values from "
                f"{-rank} to {rank - 1}."
            )
        canonical.append(axis + rank if axis < 0 else axis)
    if len(set(canonical)) != len(canonical):
        raise ValueError(
            f"{name}={axes} names an axis of x (rank {rank}) more than once: list each axis once."
        )
    return tuple(sorted(canonical))


def as_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the mask with the rank of x, booleans or weights that are finite and not negative.

    Raises:
        TypeError: the mask is complex.
        ValueError: its shape does not fit x, or fits it in two ways; or a weight is known that is
            negative or not finite.
    """
    mask = _as_weights(mask)
    rank_difference = len(shape) - mask.ndim
    padded = (1,) * rank_difference + mask.shape
    if rank_difference < 0 or any(
        length not in (1, size) for length, size in zip(padded, shape, strict=True)
    ):
        raise ValueError(
            f"mask of shape {mask.shape} does not broadcast to x of shape {shape}: give it "
            "trailing axes of size 1, for example mask[:, None] for one value per example."
        )
    # Which axes are meant must not depend on whether two sizes happen to be equal.
    if mask.shape == shape[: mask.ndim] and padded != mask.shape + (1,) * rank_difference:
        leading, trailing = (":, " * mask.ndim)[:-2], "None, " * rank_difference
        raise ValueError(
            f"mask of shape {mask.shape} fits the first and the last axes of x of shape {shape}: "
            f"write mask[{leading}{', None' * rank_difference}] for the first, the examples, or "
            f"mask[{trailing}{leading}] for the last, the features."
        )
    return mask.reshape(padded)


def _as_weights(mask: Any) -> jax.Array:
    """Returns the mask as an array; a traced weight below 0, NaN or infinite becomes 0."""
    weights = jnp.asarray(mask)
    if weights.dtype == jnp.bool_:
        return weights
    if jnp.iscomplexobj(weights):
        raise TypeError(f"mask has dtype {weights.dtype}; expected booleans or real weights.")
    # Under jit, what jnp makes of a NumPy array is traced; the array itself is known.
    known = mask if hasattr(mask, "__array__") else weights
    if isinstance(known, jax.core.Tracer) or not getattr(known, "is_fully_addressable", True):
        return jnp.where((weights >= 0) & jnp.isfinite(weights), weights, 0)
    known = jax.device_get(known)
    wrong = known[~((known >= 0) & (known < jnp.inf))]
    if wrong.size:
        raise ValueError(
            f"mask has {wrong.size} weights that are negative or not finite, {wrong[0]} for "
            "example; expected booleans, or finite weights of at least 0. Write mask == 0 for an "
            "additive attention mask, in which 0 keeps and -1e9 drops."
        )
    return weights


def as_params(params: Mapping[str, Any]) -> Params:
    """Returns scale and bias as arrays, or raises the ValueError that says what else is there."""
    check_tree("params", params, "bn_jax.init_params(features)", {"mean", "var", "cov"})
    unknown = set(params) - {"scale", "bias"}
    if unknown:
        raise ValueError(
            f"params has the unknown entries {sorted(unknown)}; expected 'scale' and 'bias' or "
            "either: pass the parameters of this norm alone."
        )
    return cast(Params, {name: jnp.asarray(values) for name, values in params.items()})


def statistics_of(batch_stats: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the arrays of `batch_stats` by name; raises the error that names missing entries."""
    check_tree("batch_stats", batch_stats, "bn_jax.init_batch_stats(features)", {"scale", "bias"})
    if "mean" not in batch_stats or "var" not in batch_stats:
        raise ValueError(
            f"batch_stats lacks {sorted({'mean', 'var'} - set(batch_stats))}; it has "
            f"{sorted(batch_stats)}. Make a new one with bn_jax.init_batch_stats(features)."
        )
    known = {name: batch_stats[name] for name in ("mean", "var", "count") if name in batch_stats}
    if "measured" not in batch_stats:
        return known
    measured = batch_stats["measured"]._asdict()
    return known | {f"measured.{name}": values for name, values in measured.items()}


def check_features(
    name: str,
    axis: Axes,
    feature_axes: tuple[int, ...],
    shape: tuple[int, ...],
    **trees: Mapping[str, Any],
) -> tuple[int, ...]:
    """Returns the shape of the features, or raises the ValueError that shows all shapes."""
    features = tuple([shape[feature_axis] for feature_axis in feature_axes])
    fit = True
    for tree in trees.values():
        for leaf in tree.values():
            fit = fit and jax.typeof(leaf).shape == features
    if not fit:
        shapes = [f"{name} has {shapes_of(tree)}" for name, tree in trees.items()]
        raise ValueError(
            f"x of shape {shape} has features of shape {features} on {name}={axis}, but "
            f"{' and '.join(shapes)}. Pass the axis that holds the features, or make new trees "
            f"with {' and '.join(f'bn_jax.init_{tree}({features})' for tree in trees)}."
        )
    return features


def shapes_of(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the leaves of `params` or `batch_stats`, in their order."""
    return {name: jnp.shape(leaf) for name, leaf in tree.items()}


def _as_residual(residual: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    residual = as_floating("residual", residual)
    if residual.shape != shape:
        raise ValueError(
            f"residual of shape {residual.shape} cannot be added to x of shape {shape}: expected "
            "the same shape. Broadcast it yourself."
        )
    return residual


def _dtypes_of(tree: Any) -> list[jnp.dtype]:
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def output_dtype(
    dtype: DTypeLike | None, x: jax.Array, params: Params, residual: jax.Array | None = None
) -> jnp.dtype:
    """Returns the dtype of y, or raises the TypeError that says why it cannot be that."""
    received = _dtypes_of((x, params, residual))
    wanted = jnp.dtype(reduce(jnp.promote_types, received) if dtype is None else dtype)
    if not jnp.issubdtype(wanted, jnp.inexact):
        raise TypeError(
            f"dtype={wanted.name} is not a floating-point dtype: pass for example "
            "dtype=jnp.float32, or None for the promoted dtype of x and params."
        )
    if mean_dtype(wanted, *received) != wanted and not jnp.issubdtype(wanted, jnp.complexfloating):
        raise TypeError(
            f"dtype={wanted.name} would discard the imaginary part: x, params and residual have "
            f"the dtypes {[leaf.name for leaf in received]}. Pass dtype=jnp.complex64 or None."
        )
    return wanted


def check_count_kept(batch_stats: Mapping[str, Any], init: str) -> None:
    """Raises the ValueError for a cumulative average without a count; `init` makes one."""
    if not {"count", "measured"} & set(batch_stats):
        raise ValueError(
            f"momentum=None averages over all batches and needs their count, but batch_stats has "
            f"{sorted(batch_stats)}. Make it with bn_jax.{init}(features, use_count=True), or pass "
            "a momentum."
        )


def warn_of_single_value(options: Options, shape: tuple[int, ...], *, in_groups: bool) -> None:
    """Warns of training on one value per feature, of which nothing can be learned.

    It is no error: `tabulate`, `eval_shape` and initializations make such calls, and while tracing
    nothing tells them from a training step. Python's filter shows a text once for every line of a
    program. So the text of a layer names the layer and nothing that changes from call to call, and
    the line is the user's, whichever transforms are between.
    """
    if options.describe_layer is None:
        where = f"x of shape {shape} with axis={options.axis}"
    else:
        where = options.describe_layer()
    y = "y is `bias` whatever x is" if options.correction is None else "y depends on x by d alone"
    effect, remedy = "", "a larger batch"
    if in_groups:
        remedy = "larger groups of examples (virtual_batch_size, axis_index_groups)"
    elif options.running_var_ddof == 0:
        effect = " An update moves the running variance towards 0."
    warnings.warn(
        f"{where} has one value per feature to train on. Normalized by its own mean, {y}, and no "
        f"gradient reaches x.{effect} Use {remedy}, synchronize over devices with axis_name, or "
        "evaluate with use_running_average=True (and no update_running_average=True). Where the "
        "call shows shapes only, as in tabulate and eval_shape, evaluate too.",
        UserWarning,
        _stacklevel_of_user(),
    )


def _stacklevel_of_user() -> int:
    """Returns the `stacklevel`, for the caller, of the first line outside of this and Flax."""
    level, frame = 0, inspect.currentframe()
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package not in ("bn_jax", "flax", "jax", "contextlib"):
            break
        level, frame = level + 1, frame.f_back
    return level


def check_virtual_batch_size(
    options: Options, shape: tuple[int, ...], batch_axis: int | None
) -> None:
    """Raises the ValueError for a virtual batch size that cannot divide the examples of x."""
    size = options.virtual_batch_size
    if options.axis_name is not None:
        raise ValueError(
            f"virtual_batch_size={size} and axis_name={options.axis_name!r} contradict each "
            "other: statistics are either per group or synchronized. Leave one out."
        )
    if batch_axis is None:
        raise ValueError(
            f"virtual_batch_size={size} needs an axis of examples: x of shape {shape} has feature "
            "axes only."
        )
    batch_size = shape[batch_axis]
    if size is None or (size >= 1 and batch_size % size == 0):
        return
    if size >= 1 and not isinstance(batch_size, int):
        _refuse_symbolic(f"virtual_batch_size={size}", "examples", batch_size, size)
    # 1 divides a symbolic batch too, and is the nearest divisor of any batch to a size under 1.
    last = batch_size if size >= 1 else 1
    divisors = [divisor for divisor in range(1, last + 1) if batch_size % divisor == 0]
    below = [divisor for divisor in divisors if divisor < size][-1:]
    above = [divisor for divisor in divisors if divisor > size][:1]
    raise ValueError(
        f"virtual_batch_size={size} does not divide the batch of {batch_size} examples. The "
        f"nearest divisors are {below + above}."
    )


def examples_of_a_group(options: Options, batch_size: int) -> int:
    """Returns how many consecutive examples stand for a group of devices that nothing binds.

    Raises:
        ValueError: the groups are not consecutive, or do not divide the examples.
    """
    groups = canonical_groups(options.axis_name, options.axis_index_groups or ())
    consecutive = [index for group in groups for index in sorted(group)]
    devices = len(consecutive)
    are_consecutive, divides = consecutive == list(range(devices)), batch_size % devices == 0
    if are_consecutive and not divides and not isinstance(batch_size, int):
        _refuse_symbolic(f"axis_index_groups={groups}", "examples", batch_size, devices)
    if not are_consecutive or not divides:
        raise ValueError(
            f"axis_index_groups={groups} cannot divide the {batch_size} examples of x, since "
            f"nothing binds axis_name={options.axis_name!r} here: expected groups of consecutive "
            f"indices, and examples for {devices} devices of as many each. Mend these, or "
            "call inside of shard_map, pmap or vmap."
        )
    return batch_size // len(groups)


def size_of_groups(features: int, num_groups: int | None, group_size: int | None) -> int:
    """Returns how many features make up a group, or raises the ValueError that says which can."""
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            f"num_groups={num_groups} and group_size={group_size}: give one of them, and None for "
            "the other (num_groups=None where group_size is given, because it is 32 otherwise)."
        )
    name, number = ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
    if number and number > 0 and features % number != 0 and not isinstance(features, int):
        _refuse_symbolic(f"{name}={number}", "features", features, number)
    if number is None or number < 1 or features % number:
        raise ValueError(
            f"{name}={number} does not divide the {features} features of x: pass one of "
            f"{[divisor for divisor in range(1, features + 1) if features % divisor == 0]}."
        )
    if features == 0:
        return 1
    return features // number if group_size is None else number


def _refuse_symbolic(argument: str, kind: str, size: int, factor: int) -> NoReturn:
    """Raises the ValueError for a symbolic size of x that may not be a multiple of `factor`."""
    raise ValueError(
        f"{argument} needs a multiple of {factor} {kind}, but the number of {kind} of x is "
        f"symbolic, {size}, and may be another: export with {factor * size} {kind}."
    )
