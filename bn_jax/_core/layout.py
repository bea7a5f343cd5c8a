"""How the moments of a batch are taken: over which axes and devices, in which groups, and how.

All that depends on where a call is made is decided here, before anything is compiled.
"""

from functools import partial
from typing import NamedTuple

import jax

from bn_jax._core.axes import Reduction, bound_axes, make_reduction, split_axis, static_count
from bn_jax._core.checks import (
    Inputs,
    check_virtual_batch_size,
    examples_of_a_group,
    warn_of_single_value,
)
from bn_jax._core.domains import Domains, own_moments
from bn_jax._core.moments import choose_method
from bn_jax._core.types import Options


class Layout(NamedTuple):
    """How the moments of a batch are taken. It is hashable.

    Attributes:
        reduction: what they are taken over, by the axes of the examples in their groups.
        group_axis: the axis of the groups, None where all examples are together.
        group_size: how many consecutive examples make up a group.
        number: how many groups there are, where that is known besides.
    """

    reduction: Reduction
    group_axis: int | None = None
    group_size: int = 1
    number: int | None = None


def lay_out(
    options: Options,
    inputs: Inputs,
    initializing: bool = False,
    *,
    for_averages_only: bool = False,
) -> Layout:
    """Decides how the moments of a batch are taken.

    Args:
        options: the configuration of the norm.
        inputs: the checked arguments of the call.
        initializing: True for no synchronization, no groups, and no warning.
        for_averages_only: True where nothing is normalized by the moments. Groups of examples would
            be merged afterwards, so that there are none then.

    Raises:
        ValueError: the groups do not divide the batch.
    """
    x, reduced = inputs.x, _reduced_axes(inputs)
    if initializing:
        layout = Layout(Reduction(reduced))
    elif for_averages_only:
        # Groups of devices under a named axis measure apart all the same.
        groups = options.axis_index_groups if bound_axes(x, options.axis_name) else None
        layout = Layout(make_reduction(x, reduced, options.axis_name, groups))
    else:
        layout = _lay_out_groups(options, inputs, reduced)
    method = choose_method(
        x.dtype, options.use_fast_variance, lie_apart=layout.group_axis is not None
    )
    domains = None if inputs.domains is None else own_moments(inputs.domains)
    if method == "once" and domains is not None and not domains.selects:
        # Sums by products need the guard for what is not finite.
        method = "guarded"
    return layout._replace(reduction=layout.reduction._replace(method=method))


def _lay_out_groups(options: Options, inputs: Inputs, reduced: tuple[int, ...]) -> Layout:
    """Returns the layout with those examples in a group that share statistics."""
    x, size, number = inputs.x, options.virtual_batch_size, None
    if size is not None:
        check_virtual_batch_size(options, x.shape, reduced[0] if reduced else None)
    elif options.axis_index_groups is not None and not bound_axes(x, options.axis_name):
        size = examples_of_a_group(options, x.shape[reduced[0]] if reduced else 1)
        number = len(options.axis_index_groups)
    if size is None:
        layout = Layout(make_reduction(x, reduced, options.axis_name, options.axis_index_groups))
        values = static_count(layout.reduction, x.shape)
    else:
        # The groups take the place of the batch axis, and their examples lie along the next axis.
        # No other reduced axis comes before.
        in_groups = Reduction(tuple([axis + 1 for axis in reduced]))
        layout = Layout(in_groups, reduced[0], size, number)
        values = size
        for axis in reduced[1:]:
            values *= x.shape[axis]
    if values == 1:
        warn_of_single_value(options, x.shape, in_groups=size is not None)
    return layout


class Examples(NamedTuple):
    """The examples of a batch in their groups, the mask in theirs, and the shape of features there.

    Attributes:
        x: the input; where there are groups, with the batch axis split into two.
        mask: None, or of the rank of `x`.
        feature_shape: the shape in which per-feature arrays broadcast to `x`.
        domains: the domains of the examples, where there are any.
        domains_of_moments: the domains, if each has its own moments.
    """

    x: jax.Array
    mask: jax.Array | None
    feature_shape: tuple[int, ...]
    domains: Domains | None = None
    domains_of_moments: Domains | None = None


def arrange(layout: Layout, inputs: Inputs) -> Examples:
    x, mask, shape, axis = inputs.x, inputs.mask, feature_shape_of(inputs), layout.group_axis
    domains = inputs.domains
    if domains is not None and layout.reduction.is_mapped:
        # JAX differentiates the definition there.
        domains = domains.selecting()
    if axis is None:
        of_moments = None if domains is None else own_moments(domains)
        return Examples(x, mask, shape, domains, of_moments)
    split = partial(split_axis, axis, layout.group_size, number=layout.number)
    in_groups = (*shape[:axis], 1, *shape[axis:])
    if domains is not None:
        domains = domains.split(axis, layout.group_size, layout.number)
    of_moments = None if domains is None else own_moments(domains)
    mask = None if mask is None else split(mask)
    return Examples(split(x), mask, in_groups, domains, of_moments)


def _reduced_axes(inputs: Inputs) -> tuple[int, ...]:
    return tuple([axis for axis in range(inputs.x.ndim) if axis not in inputs.feature_axes])


def feature_shape_of(inputs: Inputs) -> tuple[int, ...]:
    """Returns the shape in which per-feature arrays broadcast to `x`."""
    axes = inputs.feature_axes
    return tuple([size if axis in axes else 1 for axis, size in enumerate(inputs.x.shape)])
