"""Batch norm with statistics, parameters or both by domain.

The norm is that of `batch_norm`, with the domains of the examples among its inputs: `domains.py`
says what they do there. Weights, by which several domains have a share in an example, make a norm
for each domain instead, with the weights in the place of a mask.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bn_jax._core.axes import is_explicit
from bn_jax._core.batch_norm import choose_mode, run_norm
from bn_jax._core.checks import (
    Inputs,
    as_floating,
    as_params,
    canonical_axes,
    check_inputs,
    shapes_of,
    statistics_of,
)
from bn_jax._core.domains import Domains
from bn_jax._core.standardize import finish
from bn_jax._core.sums import restrict
from bn_jax._core.types import (
    Activation,
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    Mode,
    Options,
    Params,
)

# From how many positions of an example for each domain on rows are selected.
POSITIONS_PER_DOMAIN = 16
WEIGHTS_IN_PARTS = (
    "{} got weights of domains, whose moments cannot be merged over micro-batches: pass integers, "
    "or train on the whole batch."
)


def domain_batch_norm(
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    domain: jax.Array | int,
    *,
    use_running_average: bool,
    update_running_average: bool | None = None,
    axis: Axes = -1,
    momentum: float | jax.Array | None = 0.99,
    epsilon: float | jax.Array = 1e-5,
    mask: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    virtual_batch_size: int | None = None,
    running_var_ddof: int = 0,
    use_fast_variance: bool = True,
    dtype: DTypeLike | None = None,
    initializing: bool = False,
) -> tuple[jax.Array, BatchStats]:
    """Normalizes every example by the statistics and the parameters of its domain.

    With `D` domains, each array of `params` and `batch_stats` has a leading axis of `D`. For every
    domain, outputs, derivatives and new statistics are those of `batch_norm` on its examples alone,
    in one program and without a copy of `x` for each domain. In training, a domain without examples
    keeps its statistics. Evaluation takes the running statistics of each example's domain.

    What has no leading axis is shared. Shared parameters make domain-specific statistics alone, as
    in split batch norm. Shared statistics, of all examples together, make conditional batch norm.

    Args:
        params: ``{"scale": [D, *F], "bias": [D, *F]}``; either may be absent, or of shape ``[*F]``
            and shared. ``init_params((D, *F))`` makes them.
        batch_stats: ``{"mean": [D, *F], "var": [D, *F]}``, and optionally ``"count"`` and
            ``"measured"``, as `batch_norm` has them; or all of shape ``[*F]`` and shared. The count
            of ``momentum=None`` is by domain: of the batches in which it had examples.
        x: floating-point or complex array of any rank. Examples lie along the first axis that is
            not a feature axis.
        domain: the domain of each example, integers from 0 to ``D - 1``, of shape ``[N]``, or one
            for the whole batch. Or weights, ``[N, D]``, of any floating-point dtype, or booleans.
            Then an example enters the moments of each domain with its weight, and
            ``y = sum_d weight_d * y_d``, where ``y_d`` is normalized by domain `d`. Weights are
            used as they are: normalize them yourself.
        use_running_average: True to normalize by the running statistics, False by the batch's.
        update_running_average: whether the batch updates the running statistics.
        axis: the feature axis or axes of `x`.
        momentum: the weight of the old value in the running statistics; None for the cumulative
            average.
        epsilon: added to the variance.
        mask: boolean or weights, broadcastable to `x`: what enters the statistics.
        activation: an elementwise function applied to the result.
        residual: an array of the shape of `x`, added before the activation.
        axis_name: the named axis or axes to synchronize over. Devices may hold any examples of any
            domain; all sums of a call are one collective.
        axis_index_groups: groups of indices of `axis_name`, each with its own statistics.
        virtual_batch_size: how many consecutive examples share statistics, of each domain apart.
        running_var_ddof: 1 for the unbiased running variance.
        use_fast_variance: False to guard the variance of bfloat16 input against cancellation.
        dtype: the dtype of `y`.
        initializing: True while a model is initialized.

    Returns:
        `y`, of the shape of `x`, and the new `batch_stats`, as `batch_norm` returns them.

    Raises:
        TypeError: `domain` is neither of integers nor of weights, or as in `batch_norm`.
        ValueError: a domain is known and is not one of ``0`` to ``D - 1``; nothing has a leading
            axis of domains, or the axes differ; or as in `batch_norm`.
        NameError: `axis_name` is not bound, but other axes are.

    Where `domain` is traced, an index outside of ``0`` to ``D - 1`` means no domain, for example
    -1 for padding: the example enters no statistics, and is normalized to 0, before the residual
    and the activation. The same holds for an example whose weights are all 0.

    Weights cost one pass over `x` for each domain; integers do not. Integers cost the least where
    an example has many positions, as in images: sums over positions come first. For rows, XLA for
    CPUs and GPUs reads and writes arrays as large as `x` more often than for a batch norm. An
    index for the whole batch, or one domain that is known to be the only one, costs nothing more.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> params, batch_stats = bn.init_params((2, 1)), bn.init_batch_stats((2, 1))
        >>> x, domain = jnp.array([[1.0], [3.0], [10.0], [30.0]]), jnp.array([0, 0, 1, 1])
        >>> y, batch_stats = bn.domain_batch_norm(
        ...     params, batch_stats, x, domain, use_running_average=False, momentum=0.5
        ... )
        >>> y.round(3).tolist(), batch_stats["mean"].tolist()
        ([[-1.0], [1.0], [-1.0], [1.0]], [[1.0], [10.0]])

    References: Chang et al. 2019, "Domain-Specific Batch Normalization for Unsupervised Domain
    Adaptation", https://arxiv.org/abs/1906.03950; Xie et al. 2020, "Adversarial Examples Improve
    Image Recognition", https://arxiv.org/abs/1911.09665; de Vries et al. 2017, "Modulating Early
    Visual Processing by Language", https://arxiv.org/abs/1707.00683.
    """
    options = Options(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        activation=activation,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        running_var_ddof=running_var_ddof,
        use_fast_variance=use_fast_variance,
        dtype=dtype,
    )
    mode = choose_mode(batch_stats, use_running_average, update_running_average, initializing)
    x = as_floating("x", x)
    given = (options, params, batch_stats, x)
    inputs, mixture = check_domain_inputs(mode, *given, domain, mask, residual)
    return run_domain_norm(options, mode, inputs, mixture)


def check_domain_inputs(
    mode: Mode,
    options: Options,
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    domain: jax.Array | int | None,
    mask: jax.Array | None,
    residual: jax.Array | None,
) -> "tuple[Inputs, Mixture | None]":
    """Checks the arguments of a call; `domain_batch_norm` says what they must be.

    Returns:
        The inputs, and the weights of the domains where these are weights. Without a domain, the
        inputs of a plain batch norm. So it is where a whole batch is evaluated by a known domain,
        with the rows of this domain: nothing is spread over examples, and `fold` finds an affine
        function of each feature.
    """
    if domain is None:
        return check_inputs(options, params, batch_stats, x, mask, residual), None
    params = as_params(params)
    leading = _leading_axes(options, params, batch_stats, x.shape)

    def check(number: int) -> Inputs:
        row = partial(jax.tree.map, lambda leaf, has: leaf[number] if has else leaf)
        one_domain = row(params, leading.params), row(batch_stats, leading.batch_stats)
        return check_inputs(options, *one_domain, x, mask, residual)

    inputs = check(0)
    examples = _axis_of_examples(inputs)
    kind = _check_domain(domain, x.shape[examples], leading.number)
    if kind.is_known and jnp.ndim(domain) == 0 and mode.use_running_average and not mode.update:
        return check(int(domain)), None
    inputs = replace(inputs, params=params, batch_stats=batch_stats)
    if kind.is_weights:
        return inputs, Mixture(kind.values, leading, examples)
    shares = not leading.batch_stats["mean"]
    index = kind.values
    if leading.number == 1 and kind.is_known:
        index = jnp.zeros((), index.dtype)
    domains = Domains(
        index=_along(examples, x.ndim, index.reshape(-1)),
        number=leading.number,
        axis=examples,
        shares_statistics=shares,
        selects=index.ndim == 0 or _selects(inputs, examples, leading.number),
    )
    if shares and not kind.is_known:
        inputs = replace(inputs, mask=restrict(inputs.mask, domains.known()))
    return replace(inputs, domains=domains), None


class _Leading(NamedTuple):
    """Which leaves have a leading axis of domains, in trees of booleans, and how many these are."""

    params: dict[str, bool]
    batch_stats: Any
    number: int


def _leading_axes(
    options: Options, params: Params, batch_stats: BatchStats, shape: tuple[int, ...]
) -> _Leading:
    feature_axes = canonical_axes("axis", options.axis, len(shape))
    features = tuple([shape[axis] for axis in feature_axes])
    known = statistics_of(batch_stats)
    shapes = {**shapes_of(cast(Mapping[str, Any], params)), **shapes_of(known)}
    has = {
        name: of_leaf[1:] == features and of_leaf != features for name, of_leaf in shapes.items()
    }
    fit = all(has[name] or of_leaf == features for name, of_leaf in shapes.items())
    # All statistics are by domain, or none.
    fit = fit and len({has[name] for name in known}) == 1
    numbers = {shapes[name][0] for name in shapes if has[name]}
    if not fit or len(numbers) > 1 or 0 in numbers:
        raise ValueError(
            f"x of shape {shape} has features of shape {features} on axis={options.axis}, but "
            f"params and batch_stats have {shapes}; expected (D, {str(features)[1:]} by domain or "
            f"{features} shared, with one D, and all of batch_stats alike. Make them with "
            f"bn_jax.init_params((D, *{features})) and bn_jax.init_batch_stats((D, *{features}))."
        )
    if not numbers:
        raise ValueError(
            f"params and batch_stats have {shapes} for features of shape {features}: nothing has a "
            "leading axis of domains. Make one of them by domain, for example with "
            f"bn_jax.init_batch_stats((D, *{features})), or call bn_jax.batch_norm."
        )
    by_name = {name: has[name] for name in batch_stats if name != "measured"}
    trees: Any = by_name
    if "measured" in batch_stats:
        trees = {
            **by_name,
            "measured": jax.tree.map(lambda _: has["mean"], batch_stats["measured"]),
        }
    return _Leading({name: has[name] for name in params}, trees, numbers.pop())


def _axis_of_examples(inputs: Inputs) -> int:
    for axis in range(inputs.x.ndim):
        if axis not in inputs.feature_axes:
            return axis
    raise ValueError(
        f"domains need an axis of examples: x of shape {inputs.x.shape} has feature axes only."
    )


class _Domain(NamedTuple):
    """A checked domain: integers of shape [] or [N], or weights of shape [N, D].

    `is_known` says that no example can be of no domain.
    """

    values: jax.Array
    is_weights: bool
    is_known: bool


def _check_domain(domain: Any, examples: int, number: int) -> _Domain:
    values = jnp.asarray(domain)
    # Under jit, what jnp makes of a number or a NumPy array is traced; these themselves are known.
    held = domain if isinstance(domain, int) or hasattr(domain, "__array__") else values
    is_traced = isinstance(held, jax.core.Tracer) or not getattr(held, "is_fully_addressable", True)
    is_weights = values.ndim == 2 and (
        values.dtype == jnp.bool_ or jnp.issubdtype(values.dtype, jnp.floating)
    )
    if not is_weights and not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(
            f"domain has dtype {values.dtype} and shape {values.shape}; expected integers of shape "
            f"({examples},), an integer for the whole batch, or floating-point weights of shape "
            f"({examples}, {number})."
        )
    expected = ((examples, number),) if is_weights else ((), (examples,))
    if values.shape not in expected:
        raise ValueError(
            f"domain of shape {values.shape} and dtype {values.dtype} does not fit x with "
            f"{examples} examples and {number} domains: expected integers of shape ({examples},), "
            f"an integer, or floating-point weights of shape ({examples}, {number}), for example "
            f"jax.nn.one_hot(domain, {number})."
        )
    if is_weights:
        if values.dtype == jnp.bool_:
            values = values.astype(jnp.float32)
        usable = (values >= 0) & jnp.isfinite(values)
        if is_traced:
            values = jnp.where(usable, values, 0)
        elif not jax.device_get(usable).all():
            raise ValueError(
                "domain has weights that are negative or not finite; expected finite weights of at "
                "least 0."
            )
        return _Domain(values, is_weights=True, is_known=False)
    if not is_traced:
        known = [held] if isinstance(held, int) else jax.device_get(held).reshape(-1).tolist()
        unknown = [value for value in known if not 0 <= value < number]
        if unknown:
            raise ValueError(
                f"domain has {len(unknown)} values outside of 0 to {number - 1}, {unknown[0]} for "
                f"example; expected the domains of params and batch_stats, which have {number}. "
                "For examples of no domain, pass weights, jax.nn.one_hot(domain, "
                f"{number}), or a mask."
            )
    return _Domain(values.astype(jnp.int32), is_weights=False, is_known=not is_traced)


def _selects(inputs: Inputs, examples: int, number: int) -> bool:
    """Tells whether rows are selected by domain; `domains.py` says when that is cheap."""
    if number == 1 or is_explicit(inputs.x):
        return True
    positions: Any = 1
    for axis in range(inputs.x.ndim):
        if axis != examples and axis not in inputs.feature_axes:
            positions *= inputs.x.shape[axis]
    return isinstance(positions, int) and positions >= POSITIONS_PER_DOMAIN * number


def _along(axis: int, rank: int, values: jax.Array) -> jax.Array:
    """Gives an array [N] the rank of x."""
    return jnp.expand_dims(values, [other for other in range(rank) if other != axis])


class Mixture(NamedTuple):
    """The weights of the domains, [N, D], which arrays are by domain, and the axis of examples."""

    weights: jax.Array
    leading: _Leading
    examples: int


def run_domain_norm(
    options: Options, mode: Mode, inputs: Inputs, mixture: Mixture | None
) -> tuple[jax.Array, BatchStats]:
    """Runs the norm of what `check_domain_inputs` returned."""
    if mixture is None:
        return run_norm(options, inputs, mode)
    return run_mixture(mixture, options, inputs, mode)


def run_mixture(
    mixture: Mixture, options: Options, inputs: Inputs, mode: Mode
) -> tuple[jax.Array, BatchStats]:
    """Runs a norm for each domain, and sums what they give by the weights."""
    weights, leading, examples = mixture
    shares = not leading.batch_stats["mean"]
    x, mask = inputs.x, inputs.mask
    # Activation and residual come after the sum, and so does the rounding to the dtype of y.
    alone = replace(inputs, activation=None, residual=None, y_dtype=inputs.transform_dtype)
    of_all = jnp.sum(weights, 1)

    def run(params: Params, batch_stats: BatchStats, of_domain: jax.Array) -> Any:
        weight = _along(examples, x.ndim, of_all if shares else of_domain)
        one = replace(alone, params=params, batch_stats=batch_stats, mask=restrict(mask, weight))
        y, updated = run_norm(options, one, mode)
        share = _along(examples, x.ndim, of_domain).astype(inputs.var_dtype)
        return jnp.where(share > 0, share.astype(y.dtype) * y, 0), updated

    axes = partial(jax.tree.map, lambda has: 0 if has else None)
    of_stats = axes(leading.batch_stats)
    parts, updated = jax.vmap(
        run, (axes(leading.params), of_stats, 1), (0, of_stats if not shares else None)
    )(inputs.params, inputs.batch_stats, weights)
    y = jnp.sum(parts, 0).astype(inputs.y_dtype)
    return finish(y, mask, inputs.activation, inputs.residual), updated
