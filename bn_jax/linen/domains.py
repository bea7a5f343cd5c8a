"""The Linen batch norm by domain, and checkpoints between it and plain batch norms."""

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from bn_jax._modules import number_of_domains
from bn_jax._paths import batch_stats_by_path, format_path, matches
from bn_jax.linen.running import BatchNorm, call_batch_norm

# What becomes of an array: a function of the path of its norm, its name there, and the array.
Change: TypeAlias = Callable[[str, str, Any], Any]
# The arrays of a norm in each collection; `measured` has several.
_ARRAYS = {"params": ("scale", "bias"), "batch_stats": ("mean", "var", "count", "measured")}


class DomainBatchNorm(BatchNorm):
    """Batch normalization with statistics, parameters or both by domain.

    Every example is normalized as by a `BatchNorm` of its domain alone, as
    `bn_jax.domain_batch_norm` computes it. ``scale`` and ``bias``, and ``mean`` and ``var``, have a
    leading axis of `num_domains`. It has all attributes of `BatchNorm`, with their defaults.
    `split_batch_norms` makes its variables from those of a `BatchNorm`, and `select_domain` goes
    back.

    Attributes beyond those of BatchNorm:
        num_domains: how many domains there are.
        share_params: True for one ``scale`` and ``bias`` for all domains.
        share_stats: True for one ``mean`` and ``var``, of all examples together, as in conditional
            batch norm.

    Raises:
        ValueError: as in `BatchNorm`, or as in `bn_jax.domain_batch_norm`.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> layer = bn.linen.DomainBatchNorm(
        ...     num_domains=2, use_running_average=False, momentum=0.5
        ... )
        >>> x, domain = jnp.array([[1.0], [3.0], [10.0], [30.0]]), jnp.array([0, 0, 1, 1])
        >>> variables = layer.init(jax.random.key(0), x, domain)
        >>> y, updates = layer.apply(variables, x, domain, mutable=["batch_stats"])
        >>> y.round(3).tolist(), updates["batch_stats"]["mean"].tolist()
        ([[-1.0], [1.0], [-1.0], [1.0]], [[1.0], [10.0]])

    Reference: Chang et al. 2019, https://arxiv.org/abs/1906.03950.
    """

    num_domains: int = 2
    share_params: bool = False
    share_stats: bool = False

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        x: jax.Array,
        domain: jax.Array | int,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_running_average: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array that holds the features on `axis`.
            domain: integers of shape ``[N]``, an integer for the whole batch, or weights of shape
                ``[N, num_domains]``.
            use_running_average: True for evaluation, False for training; overrides None in the
                attribute of that name.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.
            residual: an array of the shape of `x`, added before the activation.
            update_running_average: overrides None in the attribute of that name.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return call_batch_norm(
            self,
            x,
            use_running_average,
            mask=mask,
            residual=residual,
            update_running_average=update_running_average,
            domain=domain,
        )


def split_batch_norms(
    variables: Mapping[str, Any],
    num_domains: int,
    *paths: str,
    share_params: bool = False,
    share_stats: bool = False,
    num_feature_axes: int | None = None,
) -> dict[str, Any]:
    """Returns the variables of a model with batch norms by domain from those of a plain model.

    Every domain starts from the statistics and parameters of the plain norm, so that the model
    computes the same for all domains.

    Args:
        variables: ``{"params": ..., "batch_stats": ...}`` of a model with `BatchNorm` layers, ours
            or Flax's.
        num_domains: how many domains the layers have.
        *paths: glob patterns of the norms that get domains, as for `freeze`. Without any: every
            batch norm.
        share_params: as the `DomainBatchNorm` layers have it.
        share_stats: as the `DomainBatchNorm` layers have it.
        num_feature_axes: how many feature axes the norms have; their arrays may have more axes in
            front, under `nn.vmap` or `nn.scan`. None: one, and an error where an array has more.

    Returns:
        New variables; what belongs to no batch norm is as it was. Arrays by domain have the axis of
        domains in front of those of the features.

    Raises:
        ValueError: `variables` have no batch norm, or none that a pattern matches; `num_domains` is
            less than 1; or `num_feature_axes` is None and does not follow from the shapes, or is
            larger than an array has axes.
        TypeError: `num_domains` is no integer.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> plain = bn.linen.BatchNorm(use_running_average=True)
        >>> variables = plain.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> split = bn.linen.split_batch_norms(variables, 2)
        >>> split["batch_stats"]["var"].shape, split["params"]["scale"].shape
        ((2, 3), (2, 3))
    """
    number = number_of_domains(num_domains)
    arrays = _norm_arrays(variables, paths)
    features = _count_feature_axes(arrays, num_feature_axes, others=0)

    def split(path: str, name: str, leaf: Any) -> Any:
        if share_params if name in _ARRAYS["params"] else share_stats:
            return leaf
        axis = jnp.ndim(_value_of(leaf)) - features
        repeated = jnp.repeat(jnp.expand_dims(_value_of(leaf), axis), number, axis)
        return _with_axes(leaf, repeated, axis, is_added=True)

    return _change_norms(split, variables, set(arrays))


def select_domain(
    variables: Mapping[str, Any], domain: int, *paths: str, num_feature_axes: int | None = None
) -> dict[str, Any]:
    """Returns the variables of a plain model from those of one with batch norms by domain.

    The plain model computes what the other does for examples of this domain. So every tool for
    plain models, `bn_jax.fold` for example, works on one domain.

    An array of a norm is by domain if it has an axis in front of those of the features, and this
    axis has the same size in all of its norm's arrays that are by domain. Layers without domains
    stay as they are. Where such layers are stacked by `nn.vmap` or `nn.scan`, their arrays look the
    same, so name the layers that have domains by `paths`.

    Args:
        variables: ``{"params": ..., "batch_stats": ...}`` of a model with `DomainBatchNorm` layers.
        domain: the domain.
        *paths: glob patterns of the norms that have domains, as for `freeze`. Without any: every
            batch norm whose arrays have the axis.
        num_feature_axes: as for `split_batch_norms`.

    Returns:
        New variables.

    Raises:
        ValueError: `variables` have no batch norm by domain, or not this domain; no norm matches a
            pattern; or as in `split_batch_norms`.
        TypeError: `domain` is no integer.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> layer = bn.linen.DomainBatchNorm(num_domains=2, use_running_average=True)
        >>> x = jnp.ones((4, 3))
        >>> variables = layer.init(jax.random.key(0), x, 1)
        >>> plain = bn.linen.BatchNorm(use_running_average=True)
        >>> y = plain.apply(bn.linen.select_domain(variables, 1), x)
        >>> jnp.allclose(y, layer.apply(variables, x, 1))
        Array(True, dtype=bool)
    """
    arrays = _norm_arrays(variables, paths)
    features = _count_feature_axes(arrays, num_feature_axes, others=1)
    numbers = {path: _count_domains(norm, features) for path, norm in arrays.items()}
    counts = sorted({number for number in numbers.values() if number is not None})
    index = operator.index(domain)
    if not counts or not 0 <= index < counts[0]:
        raise ValueError(
            f"variables have batch norms of {counts or 'no'} domains, and domain={domain} "
            "was asked for; expected arrays of shape (D, features) in a batch norm, and a domain "
            "from 0 to D - 1."
        )
    if paths and (plain := [path for path, number in numbers.items() if number is None]):
        raise ValueError(
            f"paths match batch norms without domains, {plain}; expected arrays of shape "
            "(D, features). Pass patterns of the norms that have domains."
        )

    def select(path: str, name: str, leaf: Any) -> Any:
        number, axis = numbers[path], jnp.ndim(_value_of(leaf)) - features - 1
        if number is None or axis < 0 or jnp.shape(_value_of(leaf))[axis] != number:
            return leaf
        return _with_axes(leaf, jnp.take(_value_of(leaf), index, axis), axis, is_added=False)

    return _change_norms(select, variables, set(arrays))


# --- the arrays of norms ------------------------------------------------------------------------


def _norm_arrays(
    variables: Mapping[str, Any], patterns: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Returns the arrays of the batch norms that patterns match, by path and by name."""
    norms = list(batch_stats_by_path(variables.get("batch_stats", {})))
    if not norms:
        raise ValueError(
            "variables have no batch norm, with mean and var in 'batch_stats'; expected "
            "{'params': ..., 'batch_stats': ...}, as init returns them."
        )
    chosen: set[str] = set()
    for pattern in patterns or ("*",):
        matching = {path for path in norms if matches(pattern, path)}
        if not matching:
            raise ValueError(
                f"No batch norm has a path that matches {pattern!r}; the batch norms have the "
                f"paths {sorted(norms)}. Pass patterns of these, or of modules around them."
            )
        chosen |= matching
    arrays: dict[str, dict[str, Any]] = {path: {} for path in norms if path in chosen}

    def note(path: str, name: str, leaf: Any) -> Any:
        arrays[path][name] = _value_of(leaf)
        return leaf

    _change_norms(note, variables, chosen)
    return arrays


def _count_feature_axes(
    arrays: Mapping[str, Mapping[str, Any]], given: int | None, *, others: int
) -> int:
    """Returns how many of the last axes of arrays are those of features.

    Args:
        arrays: of the batch norms.
        given: the argument `num_feature_axes`.
        others: how many axes there may be before them, where `given` is None.
    """
    number = 1 if given is None else operator.index(given)
    for path, norm in arrays.items():
        for name, array in norm.items():
            shape = jnp.shape(array)
            is_clear = given is not None or len(shape) <= 1 + others
            if is_clear and 1 <= number <= len(shape):
                continue
            raise ValueError(
                f"num_feature_axes={given}, but {name} of the batch norm {path!r} has shape "
                f"{shape}. Pass num_feature_axes=1 for norms over one axis that are stacked by "
                "nn.vmap or nn.scan along their first axes, or the number of axes in the "
                "attribute axis of the norms. Where norms differ, call this for each kind with "
                "their paths. Norms that have domains already cannot be split."
            )
    return number


def _count_domains(norm: Mapping[str, Any], features: int) -> int | None:
    """Returns the number of domains of a norm with these arrays; None without domains."""
    shapes = [jnp.shape(array) for array in norm.values()]
    longest = max(shapes, key=len)
    return longest[-features - 1] if len(longest) > features else None


def _change_norms(change: Change, variables: Mapping[str, Any], norms: set[str]) -> dict[str, Any]:
    """Applies a function to the arrays of the batch norms at some paths, boxed or not."""

    def visit(names: tuple[str, ...], keys: tuple[Any, ...], leaf: Any) -> Any:
        parts = [format_path((key,)) for key in keys]
        for end, name in enumerate(parts):
            path = "/".join(parts[:end])
            if path in norms and name in names:
                return change(path, name, leaf)
        return leaf

    changed = {
        collection: jax.tree.map_with_path(
            partial(visit, names), variables[collection], is_leaf=_is_box
        )
        for collection, names in _ARRAYS.items()
        if collection in variables
    }
    return {**variables, **changed}


def _is_box(node: Any) -> bool:
    return isinstance(node, meta.AxisMetadata)


def _value_of(leaf: Any) -> Any:
    # `unbox` would also constrain the sharding, where a mesh is set.
    return jax.tree.leaves(leaf)[0] if _is_box(leaf) else leaf


def _with_axes(leaf: Any, value: jax.Array, axis: int, *, is_added: bool) -> Any:
    """Returns a value in the box of a leaf, if it has one, with one axis more or less."""
    if not _is_box(leaf):
        return value
    names = getattr(leaf, "names", ())
    if is_added:
        leaf = leaf.add_axis(axis, {meta.PARTITION_NAME: None})
    else:
        name = names[axis] if axis < len(names) else None
        leaf = leaf.remove_axis(axis, {meta.PARTITION_NAME: name})
    return leaf.replace_boxed(value)
