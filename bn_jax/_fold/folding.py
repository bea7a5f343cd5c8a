"""Batch norms folded into the linear layers beside them, for a model that is done with training.

`fold` reads the traced program (`bn_jax.programs`), decides by shapes and equations alone what goes
where, and then computes the new parameters once, in float64. `as_affine` and `absorb_scale` are the
same arithmetic by hand.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from bn_jax import _compat
from bn_jax._core.types import BatchStats
from bn_jax._core.checks import statistics_dtype
from bn_jax._core.types import Activation, Params
from bn_jax._core.checks import as_params
from bn_jax._core.standardize import check_epsilon
from bn_jax._paths import format_path
from bn_jax._program import (
    Affine,
    Equation,
    Linear,
    Norm,
    Program,
    as_affine_step,
    as_linear,
    as_pure,
    find_norms,
    in_double,
    inputs_of,
    parent_of,
    recipe_of,
    run_steps,
    steps_to,
    trace,
)
from bn_jax._program.primitives import KEEPS_REALS, LAYOUT, MARKS, SHAPES

Array: TypeAlias = np.ndarray[Any, Any]

_ADDING = {"add", "sub", "from"}


class FoldedNorm(NamedTuple):
    """What became of a norm.

    Attributes:
        path: of its variables; "" for the top-level norm.
        into: the paths of the kernels that it went into, or None.
        reason: why it was left, a whole sentence; None where it was not.
    """

    path: str
    into: str | None
    reason: str | None


class FoldReport(tuple[FoldedNorm, ...]):
    """What became of each norm, in the order of the program. `print` shows it as a table."""

    __slots__ = ()

    def table(self) -> str:
        """Returns a line for each norm: its path, and what it went into or why it was left."""
        if not self:
            return "There is no norm."
        names = [norm.path or "the top-level norm" for norm in self]
        width = max(map(len, names))
        return "\n".join(
            f"{name:<{width}}  {f'into {norm.into}' if norm.into else f'left: {norm.reason}'}"
            for name, norm in zip(names, self, strict=True)
        )

    def __str__(self) -> str:
        return self.table()


class Folded(NamedTuple):
    """A model without its norms.

    Attributes:
        apply: ``apply(params, *args)`` computes what ``forward(variables, *args)`` did.
        params: nested dictionaries by the paths of the variables: kernels with the norms in them,
            a bias beside each, and whatever else is needed.
        report: what became of each norm.
    """

    apply: Callable[..., Any]
    params: dict[str, Any]
    report: FoldReport


def fold(forward: Callable[..., Any], variables: Any, *args: Any) -> Folded:
    """Folds the batch norms of a model into its convolutions and dense layers.

    A norm by running statistics is ``y = a x + b``, with ``a = scale * rsqrt(var + epsilon)`` and
    ``b = bias - a * mean``. After a linear layer, `a` multiplies its kernel along the output
    dimension and `b` becomes its bias; before linear layers, `a` multiplies along their input
    dimension and `b` times the kernel goes to their biases, where no padding is in the way. What
    can be folded is found in the traced program, so that norms of ours, of Flax's and written by
    hand are alike, after and before convolutions (strided, dilated, transposed, grouped, depthwise)
    and products of any layout. A norm with no place to go becomes one multiplication and one
    addition.

    Args:
        forward: ``forward(variables, *args)`` evaluates the model, for example
            ``lambda variables, x: model.apply(variables, x, train=False)``. Of an NNX model,
            ``forward(model, *args)``.
        variables: ``{"params": ..., "batch_stats": ...}`` or any other tree of arrays; or an
            `nnx.Module`, a copy of which is folded in evaluation.
        *args: trees of arrays, or of `jax.ShapeDtypeStruct`: examples of shape and dtype.

    Returns:
        `Folded`. Its `apply` is a pure function, compiled by `jax.jit`, that `jax.vmap`,
        `jax.grad`, `jax.shard_map` and `jax.export` take, on other batch sizes too (and image
        sizes, where the model takes them); it holds none of the arrays of `variables`. Kernels keep
        their dtypes: in half precision they are rounded anew, and the result differs by that.
        What is folded takes the mean off last, so that the error grows with
        ``|mean| / deviation`` of the features: by about 6e-8 times that in float32. Before a
        layer that computes in half precision a norm is therefore left.

    Raises:
        TypeError: a variable is traced: fold outside of `jax.jit`; or an argument is a bool.
        ValueError: a new kernel is too large for its dtype; or, from `apply`, `params` are not
            those of this model, or the model is another program for these arguments than for the
            examples.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, bn_jax as bn
        >>> model = nn.Sequential([nn.Dense(3), bn.linen.BatchNorm(use_running_average=True)])
        >>> x = jnp.ones((2, 4))
        >>> variables = model.init(jax.random.key(0), x)
        >>> folded = bn.fold(model.apply, variables, x)
        >>> print(folded.report)
        layers_1  into layers_0/kernel
        >>> jax.tree.map(jnp.shape, folded.params)
        {'layers_0': {'bias': (3,), 'kernel': (4, 3)}}
        >>> bool(jnp.allclose(folded.apply(folded.params, x), model.apply(variables, x)))
        True

    Reference: Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3.2.
    """
    pure, variables = as_pure(forward, variables)
    pure = pure.in_mode(variables, train=False)
    leaves = jax.tree.leaves(variables)
    _check_concrete(leaves)
    _check_no_switch(args)
    shapes = jax.tree.map(_abstract, variables)
    plan = _make_plan(trace(pure, shapes, *jax.tree.map(_abstract, args)))
    params = _compute_params(plan, leaves)
    return Folded(_make_apply(pure, shapes, plan), params, plan.report)


def as_affine(
    params: Params, batch_stats: BatchStats, *, epsilon: float | jax.Array = 1e-5
) -> tuple[jax.Array, jax.Array]:
    """Returns a batch norm by running statistics as ``y = a x + b``.

    ``a = scale / sqrt(var + epsilon)`` and ``b = bias - a * mean``.

    Args:
        params: ``{"scale": [*F], "bias": [*F]}``, either may be absent.
        batch_stats: ``{"mean": [*F], "var": [*F]}``.
        epsilon: added to the variance.

    Returns:
        `a` and `b`, each ``[*F]``, in float32, or wider where the arguments are. `b` is as exact as
        that dtype allows for the `a` that is returned, however far the mean is from zero.

    Raises:
        ValueError: something is missing, or shapes or `epsilon` do not fit.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> batch_stats = {"mean": jnp.array([3.0]), "var": jnp.array([4.0])}
        >>> a, b = bn.as_affine({"scale": jnp.array([2.0])}, batch_stats, epsilon=1e-9)
        >>> a.tolist(), b.tolist()
        ([1.0], [-3.0])

    Reference: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, Algorithm 2.
    """
    params = as_params(params)
    check_epsilon(epsilon)
    missing = {"mean", "var"} - set(batch_stats)
    if missing:
        raise ValueError(
            f"batch_stats lacks {sorted(missing)}; it has {sorted(batch_stats)}. Pass those of one "
            "norm: variables['batch_stats'][name]."
        )
    mean, var = (jnp.asarray(one) for one in (batch_stats["mean"], batch_stats["var"]))
    _check_same_shape(params=params, batch_stats={"mean": mean, "var": var})
    given = [leaf.dtype for leaf in (mean, var, *jax.tree.leaves(params))]
    dtype = reduce(jnp.promote_types, given, jnp.dtype(jnp.float32))
    real = statistics_dtype(dtype)
    # A root and a quotient are rounded correctly; a reciprocal root need not be.
    deviation = jnp.sqrt(var.astype(real) + jnp.asarray(epsilon, real))
    a = params.get("scale", jnp.ones_like(mean)).astype(dtype) / deviation.astype(dtype)
    b = params.get("bias", jnp.zeros_like(mean)).astype(dtype)
    return a, _minus_product(b, a, mean.astype(dtype))


def absorb_scale(
    params: Params,
    kernel: jax.Array,
    *,
    axis: int = -2,
    activation: Activation | None = jax.nn.relu,
) -> tuple[Params, jax.Array]:
    """Moves the scale of a norm across an activation into the next linear layer's kernel.

    ``activation(c z) = c activation(z)`` for ``c > 0``, so that with ``c = |scale|`` the norm keeps
    the sign of its scale, its bias becomes ``bias / c``, and the kernel is multiplied by `c` along
    its input dimension. Without an activation the sign moves too. A scale of 0 stays where it is.

    Args:
        params: ``{"scale": [F], "bias": [F]}`` of the norm; the bias may be absent.
        kernel: of the layer that the activation feeds, with F values on `axis`; or a multiple of F
            on an `axis` of flattened positions and features, features last. The kernel of a
            depthwise convolution ``[..., 1, F * multiplier]`` is meant by ``axis=-1``.
        axis: the input dimension of the kernel: -2 for Flax's dense layers and convolutions.
        activation: between norm and layer, or None.

    Returns:
        The new `params` and `kernel`, in the dtypes of the old.

    Raises:
        ValueError: `params` has no scale, a complex one for a real kernel, `axis` does not fit (of
            a grouped convolution that is not depthwise none does), or `activation` does not scale.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> params = {"scale": jnp.array([-2.0, 0.5]), "bias": jnp.array([4.0, 1.0])}
        >>> params, kernel = bn.absorb_scale(params, jnp.ones((2, 1)))
        >>> params["scale"].tolist(), params["bias"].tolist(), kernel.tolist()
        ([-1.0, 1.0], [2.0, 2.0], [[2.0], [0.5]])

    Reference: Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.1.
    """
    params = as_params(params)
    if "scale" not in params:
        raise ValueError(
            "params has no 'scale', so that there is nothing to absorb: leave the kernel as it is."
        )
    if jnp.iscomplexobj(params["scale"]) and not jnp.iscomplexobj(kernel):
        raise ValueError(
            f"scale is {params['scale'].dtype.name}, which a kernel in {kernel.dtype.name} cannot "
            "absorb: expected a complex kernel. Pass kernel.astype(jnp.complex64)."
        )
    if activation is not None:
        _check_homogeneous(activation)
    scale, bias = params["scale"], params.get("bias", jnp.zeros_like(params["scale"]))
    magnitude = scale if activation is None else jnp.abs(scale)
    # The bias over a scale that is next to nothing may overflow: such a scale stays where it is.
    moves = (scale != 0) & jnp.isfinite(bias / jnp.where(scale == 0, 1, magnitude))
    factor = jnp.where(moves, magnitude, 1).astype(scale.dtype)
    new: Params = {"scale": scale / factor}
    if "bias" in params:
        new["bias"] = (bias / factor.astype(bias.dtype)).astype(bias.dtype)
    return new, kernel * _along(kernel, axis, factor).astype(kernel.dtype)


class _Step(NamedTuple):
    """An affine step: `features` tells that of each position, of size 1 along free axes."""

    kind: str
    operand: int | None
    features: Array


class _Chain(NamedTuple):
    """Affine steps and changes of shape that follow a value, each its only consumer's."""

    steps: tuple[_Step, ...]
    passed: tuple[int, ...]
    output: int


class _Before(NamedTuple):
    """A norm before a linear layer, and the changes of shape between them."""

    norm: Norm
    features: Array
    passed: tuple[int, ...]


class _Known:
    """The values known before any argument, each computed when it is first asked for."""

    def __init__(self, program: Program, leaves: Sequence[Any]) -> None:
        self.program = program
        self.folded: dict[int, tuple[Array, Array]] = {}
        arrays = [jnp.asarray(leaf) for leaf in leaves]
        self.values = inputs_of(program, arrays)

    def __getitem__(self, value: int) -> Any:
        run_steps(steps_to(self.program, [value], self.values), self.values)
        return self.values[value]

    def in_double(self, value: int) -> Array:
        """Returns a value on the host, in double precision."""
        return in_double(self[value])


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    aval = jax.typeof(leaf)
    weak_type = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak_type)


class _Entry(NamedTuple):
    """A parameter of the folded program, and how it is computed."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    compute: "_Stored | _Collapsed | _Multiplied"


class _Action(NamedTuple):
    """A part of the folded program: from the values of `inputs`, and parameters, to outputs."""

    keys: tuple[Hashable, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    run: Callable[[Sequence[Any], Mapping[Hashable, Any]], Sequence[Any]]


class _Decisions(NamedTuple):
    """Where the norms of a program go, by shapes and equations alone.

    Attributes:
        norms: those found.
        linears: the linear layers, by the index of their equation.
        chains: what follows a linear layer and goes into it.
        before: the norm that goes into the linear layers after it.
        homes: for each folded norm, the linear layers that it goes into.
        features: for a norm that becomes a multiplication and an addition, or goes into the layers
            after it, the feature of each position of its input.
        reasons: for each norm that is left, why.
    """

    norms: tuple[Norm, ...]
    linears: Mapping[int, Linear]
    chains: dict[int, _Chain]
    before: dict[int, _Before]
    homes: dict[int, list[int]]
    features: dict[int, Array]
    reasons: dict[int, str]


class _Plan(NamedTuple):
    """The folded program: actions in order, and the parameters that they use, by key."""

    program: Program
    actions: tuple[_Action, ...]
    entries: Mapping[Hashable, _Entry]
    report: FoldReport

    def signature(self) -> Any:
        """Returns what must be the same for all arguments that `apply` takes."""
        seen: dict[int, str] = {}
        own = [(*one[:3], one.compute.recipe(self.program, seen)) for one in self.entries.values()]
        return own, self.report


def _make_plan(program: Program) -> _Plan:
    decisions = _decide(program)
    actions = _live_actions(program, decisions)
    entries = _name_entries(program, decisions, actions)
    return _Plan(program, actions, entries, _report(decisions, entries))


def _decide(program: Program) -> _Decisions:
    """Folds each norm into the layer before it, or else into those after it."""
    found = (as_linear(program, index) for index in range(len(program.equations)))
    linears = {one.equation: one for one in found if one is not None}
    decided = _Decisions(find_norms(program), linears, {}, {}, {}, {}, {})
    norms = {number: norm for number, norm in enumerate(decided.norms) if norm.obstacle is None}
    for linear in linears.values():
        chain = _follow(program, linear, norms.values())
        inside = [number for number, norm in norms.items() if {*norm.steps} <= {*chain.passed}]
        if inside:
            decided.chains[linear.equation] = chain
            decided.homes.update((number, [linear.equation]) for number in inside)
    for number, norm in enumerate(decided.norms):
        if number not in norms:
            decided.reasons[number] = _obstacle_of(norm)
        elif number not in decided.homes:
            _decide_backward(program, decided, number)
    return decided


def _decide_backward(program: Program, decided: _Decisions, number: int) -> None:
    """Folds a norm into the linear layers that it feeds, or says why it is left."""
    norm = decided.norms[number]
    features = _span(program, norm)
    if features is None:
        decided.reasons[number] = "It changes the shape of its input."
        return
    decided.features[number] = features
    targets, obstacle = _targets(program, decided.linears, norm.output, features, ())
    for one, passed in targets:
        obstacle = obstacle or _why_not_across(program, norm, decided.linears[one], passed)
    if obstacle is not None:
        before = _why_not_before(program, decided.linears, norm)
        decided.reasons[number] = f"{before}, and {obstacle}."
        return
    decided.homes[number] = [one for one, _ in targets]
    others = [norm for one, norm in enumerate(decided.norms) if one != number]
    for one, passed in targets:
        decided.before[one] = _Before(norm, features, passed)
        if one not in decided.chains:
            decided.chains[one] = _follow(program, decided.linears[one], others)


def _obstacle_of(norm: Norm) -> str:
    if norm.obstacle == "input":
        return (
            "It normalizes by its input: evaluate with use_running_average=True, or it is a norm "
            "without running statistics."
        )
    return f"It is inside of a {norm.obstacle}, which is left as it is."


def _follow(program: Program, linear: Linear, norms: Iterable[Norm]) -> _Chain:
    """Returns the longest chain after a linear layer that cuts no norm in two.

    Behind its last norm it takes in steps by variables only.
    """
    value = program.equations[linear.equation].outputs[0]
    kernel_shape = program.avals[linear.kernel].shape
    sizes = [kernel_shape[dimension] for dimension in linear.kernel_outputs]
    rank = len(program.avals[value].shape)
    features = _placed(np.arange(prod(sizes)).reshape(sizes), linear.outputs, rank)
    chain = best = _Chain((), (), value)
    norms = tuple(norms)
    comes_from_variables, is_real = True, _is_stored_real(program, linear.kernel)
    while (following := program.only_consumer(chain.output)) is not None:
        extended = _extended(program, chain, features, following)
        if extended is None:
            break
        if is_real and _multiplies_by_complex(program, program.equations[following]):
            break
        chain, features = extended
        step = as_affine_step(program, program.equations[following])
        if step is None or step.kind == "same":
            continue
        # Past the last norm a constant stays in the program, for it may be one of the batch size.
        is_constant = step.operand is not None and not program.origins[step.operand]
        ends_norm = any(following == norm.steps[-1] for norm in norms if norm.steps)
        comes_from_variables = ends_norm or (comes_from_variables and not is_constant)
        cuts = (0 < len({*norm.steps} - {*chain.passed}) < len(norm.steps) for norm in norms)
        if comes_from_variables and not any(cuts):
            best = chain
    return best


def _extended(
    program: Program, chain: _Chain, features: Array, following: int
) -> tuple[_Chain, Array] | None:
    """Returns a chain with one more equation, and the features of the positions after it."""
    equation = program.equations[following]
    step = as_affine_step(program, equation)
    steps = chain.steps
    if step is None:
        moved = _moved(program, equation, features)
        if moved is None:
            return None
        features = moved
    elif not _fits(program, equation, step, features):
        return None
    else:
        steps = (*steps, _Step(step.kind, step.operand, features))
    return _Chain(steps, (*chain.passed, following), equation.outputs[0]), features


def _fits(program: Program, equation: Equation, step: Affine, features: Array) -> bool:
    """Says whether the known operand varies along the axes of the features only."""
    if program.avals[equation.outputs[0]].shape != program.avals[step.input].shape:
        return False
    if step.operand is None:
        return True
    _, shape = _spread(program, step.operand)
    if not shape:
        return True
    return len(shape) == features.ndim and all(
        size in (1, known) for size, known in zip(shape, features.shape, strict=True)
    )


def _is_stored_real(program: Program, kernel: int) -> bool:
    """Says whether an imaginary part of a kernel would be lost where it is stored or rearranged."""
    root, layout = _root_of(program, kernel)
    values = [root, *(equation.outputs[0] for equation in layout)]
    return any(not _is_complex(program, value) for value in values)


def _is_complex(program: Program, value: int) -> bool:
    return bool(jnp.issubdtype(program.avals[value].dtype, jnp.complexfloating))


def _multiplies_by_complex(program: Program, equation: Equation) -> bool:
    step = as_affine_step(program, equation)
    if step is None or step.operand is None or step.kind not in ("mul", "div"):
        return False
    return _may_be_complex(program, step.operand)


def _may_be_complex(program: Program, value: int) -> bool:
    """Says whether a known value is complex, and not merely computed from reals as if it were."""
    equation = program.producer(value)
    if not _is_complex(program, value):
        return False
    if value in program.constants:
        return bool(np.any(np.imag(program.constants[value])))
    if equation is None or equation.name not in LAYOUT | KEEPS_REALS:
        return True
    return any(_may_be_complex(program, one) for one in equation.inputs)


def _spread(program: Program, value: int) -> tuple[int, tuple[int, ...]]:
    """Returns what a known value is a broadcast of, and that one's shape at the rank of it."""
    shape = program.avals[value].shape
    equation = program.producer(value)
    if equation is not None and equation.name in MARKS:
        return _spread(program, equation.inputs[0])
    if equation is None or equation.name != "broadcast_in_dim":
        return value, shape
    root, inner = _spread(program, equation.inputs[0])
    own = [1] * len(shape)
    for size, dimension in zip(inner, equation.options["broadcast_dimensions"], strict=True):
        own[dimension] = size
    return root, tuple(own)


def _span(program: Program, norm: Norm) -> Array | None:
    """Returns the features of the positions of a norm's input, all that its operands vary along."""
    given = program.avals[norm.input].shape
    shape = (1,) * len(given)
    for number in norm.steps:
        equation = program.equations[number]
        step = as_affine_step(program, equation)
        if step is None or program.avals[equation.outputs[0]].shape != given:
            return None
        if step.operand is not None:
            _, own = _spread(program, step.operand)
            shape = np.broadcast_shapes(shape, own)
    return np.arange(prod(shape)).reshape(shape)


def _moved(
    program: Program, equation: Equation, values: Array, *, spreads: bool = False
) -> Array | None:
    """Takes values by position, of size 1 along free axes, through a change of shape.

    Returns None for another equation, or where an axis would be free in part; `spreads` repeats
    the values along it instead.
    """
    if equation.name not in SHAPES:
        return None
    before, after = (program.avals[one[0]].shape for one in (equation.inputs, equation.outputs))
    if equation.name == "transpose":
        return values.transpose(equation.options["permutation"])
    if equation.name == "squeeze":
        return values.squeeze(equation.options["dimensions"])
    if equation.name == "broadcast_in_dim":
        return _placed(values, equation.options["broadcast_dimensions"], len(after))
    groups = _common_factors(before, after)
    if groups is None or equation.options["dimensions"] is not None:
        return None
    shape: list[int] = []
    for old, new in groups:
        free = [one for one in old if values.shape[one] == 1 and before[one] != 1]
        if len(free) == len([one for one in old if before[one] != 1]):
            shape += [1] * len(new)
            continue
        if free and not spreads:
            return None
        for one in free:
            values = np.repeat(values, before[one], axis=one)
        shape += [after[one] for one in new]
    return values.reshape(shape)


def _common_factors(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]] | None:
    """Returns the smallest runs of axes of two shapes that have the same number of positions."""
    groups: list[tuple[list[int], list[int]]] = []
    old, new = 0, 0
    while old < len(before) or new < len(after):
        ends = [min(old + 1, len(before)), min(new + 1, len(after))]
        while prod(before[old : ends[0]]) != prod(after[new : ends[1]]):
            try:
                side = int(prod(before[old : ends[0]]) > prod(after[new : ends[1]]))
            except _compat.InconclusiveDimensionOperation:
                return None
            if ends[side] == len((before, after)[side]):
                return None
            ends[side] += 1
        groups.append((list(range(old, ends[0])), list(range(new, ends[1]))))
        old, new = ends
    return groups


def _placed(values: Array, dimensions: Sequence[int], rank: int) -> Array:
    """Returns values whose axes are the given dimensions of an array of that rank."""
    order = np.argsort(np.asarray(dimensions, int))
    shape = [1] * rank
    for axis, dimension in enumerate(dimensions):
        shape[dimension] = values.shape[axis]
    return values.transpose(order).reshape(shape)


def _targets(
    program: Program,
    linears: Mapping[int, Linear],
    value: int,
    values: Array,
    passed: tuple[int, ...],
) -> tuple[list[tuple[int, tuple[int, ...]]], str | None]:
    """Returns the linear layers that a value goes to, or why it cannot go into all of them."""
    if program.uses[value] > len(program.consumers[value]):
        return [], "its output is returned"
    found: list[tuple[int, tuple[int, ...]]] = []
    for number in program.consumers[value]:
        equation = program.equations[number]
        moved = _moved(program, equation, values, spreads=True)
        step = as_affine_step(program, equation)
        if step is not None and step.kind == "same":
            moved = values
        if number in linears:
            obstacle = _why_not_into(linears[number], values)
            inner = [(number, passed)]
        elif moved is not None:
            output = equation.outputs[0]
            inner, obstacle = _targets(program, linears, output, moved, (*passed, number))
        else:
            inner, obstacle = [], f"its output goes to `{equation.function}`"
        if obstacle is not None:
            return [], obstacle
        found += inner
    return found, None


def _why_not_into(linear: Linear, values: Array) -> str | None:
    if linear.is_padded:
        return (
            "its output goes to a convolution with padding, where a bias would be missing at the "
            "border"
        )
    if any(size != 1 for axis, size in enumerate(values.shape) if axis not in linear.inputs):
        return "the linear layer after it shares its kernel between what the norm tells apart"
    return None


def _why_not_across(
    program: Program, norm: Norm, linear: Linear, passed: Sequence[int]
) -> str | None:
    """Says why what a norm does cannot be left to the kernel of the layer after it."""
    if _is_stored_real(program, linear.kernel) and any(
        _multiplies_by_complex(program, program.equations[number]) for number in norm.steps
    ):
        return "the kernel after it is stored as real numbers, but its scale is complex"
    changed = [program.equations[number].outputs[0] for number in passed]
    after = [program.avals[value].dtype for value in (norm.output, *changed, linear.data)]
    digits = [jnp.finfo(dtype).nmant for dtype in after]
    narrow = min(range(len(after)), key=digits.__getitem__)
    widest = max(digits[0], jnp.finfo(program.avals[norm.input].dtype).nmant)
    is_half = digits[-1] < jnp.finfo(jnp.float32).nmant
    if digits[narrow] < widest or is_half:
        return (
            f"the linear layer after it computes in {after[narrow].name}, where its input would be "
            "rounded before its mean is taken off"
        )
    return None


def _why_not_before(program: Program, linears: Mapping[int, Linear], norm: Norm) -> str:
    """Says why a norm is not folded into what is before it."""
    value, is_shared = norm.input, False
    while value in program.producers:
        is_shared = is_shared or program.uses[value] > 1
        number = program.producers[value]
        equation = program.equations[number]
        step = as_affine_step(program, equation)
        if number in linears:
            kernel = _path_of(program, linears[number].kernel, "kernel")
            is_real = _is_stored_real(program, linears[number].kernel)
            if is_shared:
                return f"What {kernel} gives is used elsewhere too"
            steps = [program.equations[one] for one in norm.steps]
            if is_real and any(_multiplies_by_complex(program, one) for one in steps):
                return f"Its scale is complex, but {kernel} is stored as real numbers"
            return f"It, or what is before it, varies along more than the features of {kernel}"
        if step is None and equation.name not in SHAPES:
            return f"Its input comes from `{equation.function}`, no linear layer with known weights"
        value = equation.inputs[0] if step is None else step.input
    return "Its input is an argument of the model"


def _live_actions(program: Program, decided: _Decisions) -> tuple[_Action, ...]:
    """Returns the actions that outputs depend on; known values are computed when folding."""
    replaced = _replacements(program, decided)
    needed = set(program.outputs)
    live: list[_Action] = []
    for number in reversed(range(len(program.equations))):
        equation = program.equations[number]
        if number in replaced:
            action = replaced[number]
        elif all(program.is_known(one) for one in equation.outputs) and not _stays(
            program, equation
        ):
            continue
        else:
            action = _as_action(equation)
        if action is not None and (needed.intersection(action.outputs) or equation.has_effects):
            live.append(action)
            needed.update(action.inputs)
    return tuple(reversed(live))


def _stays(program: Program, equation: Equation) -> bool:
    """Says whether a known equation is computed in the folded program all the same.

    Constants are, since they may depend on the batch size; so are changes of layout.
    """
    is_constant = not equation.outputs or not program.origins[equation.outputs[0]]
    return equation.name in LAYOUT or is_constant


def _replacements(program: Program, decided: _Decisions) -> dict[int, _Action | None]:
    """Returns what stands for an equation instead of itself; None for nothing."""
    replaced: dict[int, _Action | None] = {}
    for number, chain in decided.chains.items():
        replaced.update(dict.fromkeys(chain.passed))
        replaced[number] = _fold_action(program, decided, number)
    for number, features in decided.features.items():
        norm = decided.norms[number]
        replaced.update(dict.fromkeys(norm.steps))
        is_folded = number in decided.homes
        replaced[norm.steps[0]] = _norm_action(
            program, norm, None if is_folded else number, features
        )
    return replaced


def _as_action(equation: Equation) -> _Action:
    def run(values: Sequence[Any], _: Mapping[Hashable, Any]) -> Sequence[Any]:
        return equation.run(values)

    return _Action((), equation.inputs, equation.outputs, run)


def _norm_action(program: Program, norm: Norm, number: int | None, features: Array) -> _Action:
    """Multiplies and adds in a norm's place; without a number, passes its input on."""
    dtype = program.avals[norm.output].dtype
    wide = _widest(program, norm.steps)
    keys = () if number is None else ((number, "scale"), (number, "offset"))

    def run(values: Sequence[Any], params: Mapping[Hashable, Any]) -> Sequence[Any]:
        (x,) = values
        if not keys:
            return [x.astype(dtype)]
        a, b = (params[key].astype(wide).reshape(features.shape) for key in keys)
        return [(x.astype(wide) * a + b).astype(dtype)]

    return _Action(keys, (norm.input,), (norm.output,), run)


def _fold_action(program: Program, decided: _Decisions, number: int) -> _Action:
    """Applies the linear layer that norms went into, its bias and what changes its shape after."""
    linear, chain = decided.linears[number], decided.chains[number]
    equation = program.equations[number]
    _, layout = _root_of(program, linear.kernel)
    passed = [program.equations[one] for one in chain.passed]
    wide = _widest(program, (number, *chain.passed))
    dtype = program.avals[chain.output].dtype
    adds = number in decided.before or any(step.kind in _ADDING for step in chain.steps)
    keys = ((number, "kernel"), (number, "bias"))[: 1 + adds]

    def run(values: Sequence[Any], params: Mapping[Hashable, Any]) -> Sequence[Any]:
        operands = {linear.data: values[0], linear.kernel: params[number, "kernel"]}
        for one in layout:
            (operands[linear.kernel],) = one.run([operands[linear.kernel]])
        (y,) = equation.run([operands[one] for one in equation.inputs])
        if adds:
            shape = [1] * y.ndim
            for dimension in linear.outputs:
                shape[dimension] = y.shape[dimension]
            y = y.astype(wide) + params[number, "bias"].astype(wide).reshape(shape)
        y = y.astype(dtype)
        for one in passed:
            if one.name in SHAPES:
                (y,) = one.run([y])
        return [y]

    return _Action(keys, (linear.data,), (chain.output,), run)


def _widest(program: Program, numbers: Iterable[int]) -> Any:
    """Returns the dtype that holds what each of these equations gives."""
    dtypes = [program.avals[program.equations[number].outputs[0]].dtype for number in numbers]
    return reduce(jnp.promote_types, dtypes)


def _root_of(program: Program, value: int) -> tuple[int, tuple[Equation, ...]]:
    """Returns what a kernel is a rearrangement of, and the equations that rearrange it."""
    layout: list[Equation] = []
    while (equation := program.producer(value)) is not None and equation.name in LAYOUT:
        before, after = (program.avals[one[0]] for one in (equation.inputs, equation.outputs))
        if prod(before.shape) != prod(after.shape) or not jnp.issubdtype(before.dtype, jnp.inexact):
            break
        layout.append(equation)
        value = equation.inputs[0]
    return value, tuple(reversed(layout))


def _name_entries(
    program: Program, decided: _Decisions, actions: Sequence[_Action]
) -> dict[Hashable, _Entry]:
    """Names the parameters that the actions use; variables that are left alone choose first."""
    given = {value for action in actions for value in action.outputs}
    given.update(program.constants, program.arguments)
    used = [value for action in actions for value in action.inputs] + list(program.outputs)
    stored = sorted({*used} - given, key=lambda value: (value not in program.leaves, value))
    entries: dict[Hashable, _Entry] = {}
    for value in stored:
        aval = program.avals[value]
        path = _path_of(program, value, None)
        _add_entries(entries, {value: _Entry(path, aval.shape, aval.dtype, _Stored(value))})
    for action in actions:
        if action.keys:
            _add_entries(entries, _entries_of(program, decided, action))
    return entries


def _add_entries(entries: dict[Hashable, _Entry], new: Mapping[Hashable, _Entry]) -> None:
    """Adds entries; where a path is taken, or around a taken one, all get the same number behind.

    Where a path is inside of a taken one, its first name gets the number.
    """
    taken = [f"{entry.path}/" for entry in entries.values()]
    paths = [entry.path for entry in new.values()]
    is_inside = any(path.startswith(one) for path in paths for one in taken)
    renamed, number = paths, 0
    while any(
        f"{path}/".startswith(one) or one.startswith(f"{path}/")
        for path in renamed
        for one in taken
    ):
        number += 1
        renamed = [_numbered(path, number, first=is_inside) for path in paths]
    for (key, entry), path in zip(new.items(), renamed, strict=True):
        entries[key] = entry._replace(path=path)


def _numbered(path: str, number: int, *, first: bool) -> str:
    if not first:
        return f"{path}_{number}"
    name, *rest = path.split("/")
    return "/".join([f"{name}_{number}", *rest])


def _entries_of(program: Program, decided: _Decisions, action: _Action) -> dict[Hashable, _Entry]:
    """Returns the parameters of a linear layer with norms in it, or of a norm that is left."""
    number, name = cast(tuple[int, str], action.keys[0])
    if name == "kernel":
        return _entries_of_linear(program, decided, number, len(action.keys) > 1)
    norm, features = decided.norms[number], decided.features[number]
    wide = _widest(program, norm.steps)
    shape = tuple(size for size in features.shape if size != 1) or (1,)
    prefix = f"{norm.path}/" if norm.path else ""
    return {
        key: _Entry(f"{prefix}{leaf}", shape, wide, _Collapsed(norm, features, position))
        for position, (key, leaf) in enumerate(zip(action.keys, ("scale", "bias"), strict=True))
    }


def _entries_of_linear(
    program: Program, decided: _Decisions, number: int, adds: bool
) -> dict[Hashable, _Entry]:
    linear, chain = decided.linears[number], decided.chains[number]
    root, _ = _root_of(program, linear.kernel)
    path = _path_of(program, root, "kernel")
    *parents, name = path.split("/")
    bias = "/".join([*parents, "bias" if name == "kernel" else f"{name}_bias"])
    shape = program.avals[linear.kernel].shape
    features = tuple(shape[dimension] for dimension in linear.kernel_outputs)
    before = decided.before.get(number)
    aval = program.avals[root]
    wide = _widest(program, (number, *chain.passed))
    kernel = _Entry(path, aval.shape, aval.dtype, _Multiplied(linear, chain, before, 0))
    added = _Entry(bias, features, wide, _Multiplied(linear, chain, before, 1))
    return {(number, "kernel"): kernel, **({(number, "bias"): added} if adds else {})}


def _path_of(program: Program, value: int, otherwise: str | None) -> str:
    """Returns the path of a leaf; of a computed value one that tells what it was computed from."""
    if value in program.leaves:
        return program.paths[program.leaves.index(value)] or "variables"
    paths = program.leaf_paths(value)
    if otherwise is None:
        names = dict.fromkeys(path.split("/")[-1] for path in paths)
        equation = program.producer(value)
        otherwise = "_".join([*names, *([equation.name] if equation else [])])
    parent = parent_of(paths)
    return f"{parent}/{otherwise}" if parent else otherwise


class _Stored(NamedTuple):
    """Computes a value as the program has it."""

    value: int

    def __call__(self, known: _Known) -> Any:
        return known[self.value]

    def recipe(self, program: Program, seen: dict[int, str]) -> Hashable:
        return recipe_of(program, self.value, seen)


class _Collapsed(NamedTuple):
    """Computes `a` (at position 0) or `b` of a norm that is left."""

    norm: Norm
    features: Array
    position: int

    def __call__(self, known: _Known) -> Array:
        steps = _steps_of(known.program, self.norm, self.features)
        a, b = _compose(known, steps)
        if self.position == 0:
            return a
        # What the rounding of `a` changes at the mean is put right in `b`.
        first = next(at for at, step in enumerate(steps) if step.kind in ("mul", "div"))
        sign, shift = _compose(known, steps[:first], a.size)
        wide = _widest(known.program, self.norm.steps)
        with np.errstate(over="ignore"):
            rest = a - in_double(a.astype(wide))
        return np.where(np.isfinite(rest), b - rest * shift / sign, b)

    def recipe(self, program: Program, seen: dict[int, str]) -> Hashable:
        return _recipe_of_steps(program, _steps_of(program, self.norm, self.features), seen)


class _Multiplied(NamedTuple):
    """Computes the kernel (at position 0) or the bias of a linear layer with norms in it."""

    linear: Linear
    chain: _Chain
    before: _Before | None
    position: int

    def __call__(self, known: _Known) -> Array:
        if self.linear.equation not in known.folded:
            known.folded[self.linear.equation] = self._multiplied(known)
        return known.folded[self.linear.equation][self.position]

    def recipe(self, program: Program, seen: dict[int, str]) -> Hashable:
        before: Hashable = None
        if self.before is not None:
            steps = _steps_of(program, self.before.norm, self.before.features)
            before = _recipe_of_steps(program, steps, seen)
        after = _recipe_of_steps(program, self.chain.steps, seen)
        kernel = recipe_of(program, self.linear.kernel, seen)
        return kernel, self.linear.kernel_outputs, before, after

    def _multiplied(self, known: _Known) -> tuple[Array, Array]:
        linear = self.linear
        root, layout = _root_of(known.program, linear.kernel)
        values = known.in_double(root)
        positions = _rearranged(np.arange(values.size).reshape(values.shape), layout)
        kernel = values.reshape(-1)[positions]
        sizes = [kernel.shape[one] for one in linear.kernel_outputs]
        bias: Any = 0
        if self.before is not None:
            kernel, bias = _multiply_inputs(known, linear, self.before, kernel)
        a, b = _compose(known, self.chain.steps, prod(sizes))
        kernel = kernel * _placed(a.reshape(sizes), linear.kernel_outputs, kernel.ndim)
        stored = np.empty(values.size, kernel.dtype)
        stored[positions.reshape(-1)] = kernel.reshape(-1)
        return stored.reshape(values.shape), (a * bias + b).reshape(sizes)


def _recipe_of_steps(program: Program, steps: Iterable[_Step], seen: dict[int, str]) -> Hashable:
    def operand(step: _Step) -> Hashable:
        if step.operand is None:
            return None
        root, shape = _spread(program, step.operand)
        return recipe_of(program, root, seen), shape

    return tuple((one.kind, operand(one), one.features.tobytes()) for one in steps)


def _rearranged(positions: Array, layout: Sequence[Equation]) -> Array:
    """Returns where each number of a rearranged kernel was before."""
    for equation in layout:
        if equation.name != "convert_element_type":
            (moved,) = equation.run([jnp.asarray(positions)])
            positions = np.asarray(moved)
    return positions


def _multiply_inputs(
    known: _Known, linear: Linear, before: _Before, kernel: Array
) -> tuple[Array, Array]:
    """Returns the kernel after a norm of its input, and what that norm adds to each output."""
    program = known.program
    affine = []
    for values in _compose(known, _steps_of(program, before.norm, before.features)):
        moved = values.reshape(before.features.shape)
        for number in before.passed:
            changed = _moved(program, program.equations[number], moved, spreads=True)
            moved = moved if changed is None else changed
        affine.append(_onto_kernel(linear, program.avals[linear.data].shape, kernel, moved))
    a, b = affine
    summed = tuple(axis for axis in range(kernel.ndim) if axis not in linear.kernel_outputs)
    added = (kernel * b).sum(summed)
    order = np.argsort(np.argsort(np.asarray(linear.kernel_outputs)))
    return kernel * a, added.transpose(order).reshape(-1)


def _onto_kernel(linear: Linear, shape: Sequence[int], kernel: Array, values: Array) -> Array:
    """Returns values by position of the data as factors of the kernel that it meets."""
    sizes = [shape[axis] for axis in linear.inputs]
    free = [axis for axis in range(len(shape)) if axis not in linear.inputs]
    own = [shape[axis] if axis in linear.inputs else 1 for axis in range(len(shape))]
    values = np.broadcast_to(values, own).transpose((*linear.inputs, *free)).reshape(sizes)
    if linear.groups == 1:
        return _placed(values, linear.kernel_inputs, kernel.ndim)
    features = kernel.shape[linear.kernel_outputs[0]]
    rows = np.repeat(values.reshape(linear.groups, -1), features // linear.groups, axis=0)
    return _placed(rows, (*linear.kernel_outputs, *linear.kernel_inputs), kernel.ndim)


def _steps_of(program: Program, norm: Norm, features: Array) -> list[_Step]:
    steps = (as_affine_step(program, program.equations[number]) for number in norm.steps)
    return [_Step(step.kind, step.operand, features) for step in steps if step is not None]


def _compose(
    known: _Known, steps: Sequence[_Step], features: int | None = None
) -> tuple[Array, Array]:
    """Returns `a` and `b` of ``y = a x + b`` for each feature, in double precision."""
    size = steps[0].features.size if features is None else features
    a, b = np.ones(size), np.zeros(size)
    for step in steps:
        value = np.zeros(size) if step.operand is None else _by_feature(known, step)
        if step.kind == "add":
            b = b + value
        elif step.kind == "sub":
            b = b - value
        elif step.kind == "from":
            a, b = -a, value - b
        elif step.kind == "mul":
            a, b = a * value, b * value
        elif step.kind == "div":
            a, b = a / value, b / value
        elif step.kind == "neg":
            a, b = -a, -b
    return a, b


def _by_feature(known: _Known, step: _Step) -> Array:
    """Returns the operand of a step for each feature."""
    assert step.operand is not None
    root, shape = _spread(known.program, step.operand)
    operand = known.in_double(root).reshape(shape)
    values = np.empty(step.features.size, operand.dtype)
    values[step.features.reshape(-1)] = np.broadcast_to(operand, step.features.shape).reshape(-1)
    return values


def _report(decided: _Decisions, entries: Mapping[Hashable, _Entry]) -> FoldReport:
    def row(number: int, norm: Norm) -> FoldedNorm:
        if number in decided.reasons:
            return FoldedNorm(norm.path, None, decided.reasons[number])
        keys = [(home, "kernel") for home in decided.homes[number]]
        kernels = [entries[key].path for key in keys if key in entries]
        if not kernels:
            return FoldedNorm(norm.path, None, "No output depends on it.")
        return FoldedNorm(norm.path, ", ".join(kernels), None)

    return FoldReport(row(number, norm) for number, norm in enumerate(decided.norms))


def _compute_params(plan: _Plan, leaves: Sequence[Any]) -> dict[str, Any]:
    known = _Known(plan.program, leaves)
    params = {}
    for entry in plan.entries.values():
        value = entry.compute(known)
        if isinstance(value, np.ndarray):
            value = _rounded(entry, value)
        params[entry.path] = jnp.asarray(value)
    return unflatten_dict(params, sep="/")


def _rounded(entry: _Entry, value: Array) -> Array:
    """Returns a computed parameter in its dtype, or raises where that cannot hold it."""
    if np.iscomplexobj(value) and not jnp.issubdtype(entry.dtype, jnp.complexfloating):
        if np.any(value.imag != 0):
            raise ValueError(
                f"{entry.path!r} with its norm is complex, which {jnp.dtype(entry.dtype).name} "
                "cannot hold: fold the variables with a complex kernel, "
                "kernel.astype(jnp.complex64)."
            )
        value = value.real
    with np.errstate(over="ignore"):
        rounded = value.astype(entry.dtype).reshape(entry.shape)
    overflows = np.isfinite(value) & ~np.isfinite(in_double(rounded)).reshape(value.shape)
    if overflows.any():
        raise ValueError(
            f"{entry.path!r} with its norm is as large as {np.abs(value[overflows]).max():.3g}, "
            f"which {jnp.dtype(entry.dtype).name} cannot hold: fold the variables in float32, "
            "jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)."
        )
    return rounded


def _make_apply(call: Callable[..., Any], shapes: Any, plan: _Plan) -> Callable[..., Any]:
    """Returns the folded program as a function for arguments of any shape that it is right for."""
    signature = plan.signature()

    def apply(params: Any, *args: Any) -> Any:
        own = _make_plan(trace(call, shapes, *args))
        if own.signature() != signature:
            raise ValueError(_describe_difference(signature, own.signature(), args))
        return _run(own, params, jax.tree.leaves(args))

    return jax.jit(apply)


def _describe_difference(expected: Any, found: Any, args: Any) -> str:
    entries = {one[0] for one in {*expected[0]} ^ {*found[0]}}
    norms = {one.path or "the top-level norm" for one in {*expected[1]} ^ {*found[1]}}
    parameters = f"computes the parameters {sorted(entries)} otherwise"
    elsewhere = f"folds the norms {sorted(norms)} elsewhere"
    return (
        f"The model is another program for arguments of the shapes "
        f"{[jnp.shape(leaf) for leaf in jax.tree.leaves(args)]} than for those it was folded with: "
        f"it {' and '.join([parameters] * bool(entries) + [elsewhere] * bool(norms))}. Expected "
        "the same program. Fold it with arguments of these shapes: "
        "bn_jax.fold(forward, variables, *args)."
    )


def _run(plan: _Plan, params: Any, arguments: Sequence[Any]) -> Any:
    given = {format_path(keys): leaf for keys, leaf in jax.tree.leaves_with_path(params)}
    _check_given(plan, given)
    by_key = {key: given[entry.path] for key, entry in plan.entries.items()}
    program = plan.program
    values = inputs_of(program, arguments=arguments)
    values.update((key, by_key[key]) for key in plan.entries if isinstance(key, int))
    for action in plan.actions:
        outputs = action.run([values[one] for one in action.inputs], by_key)
        values.update(zip(action.outputs, outputs, strict=True))
    return jax.tree.unflatten(program.tree, [values[one] for one in program.outputs])


def _check_given(plan: _Plan, given: Mapping[str, Any]) -> None:
    expected = {entry.path: entry.shape for entry in plan.entries.values()}
    found = {path: jnp.shape(leaf) for path, leaf in given.items()}
    if expected != found:
        missing = {path: expected[path] for path in expected if found.get(path) != expected[path]}
        unknown = {path: found[path] for path in found if expected.get(path) != found[path]}
        raise ValueError(
            f"params has {unknown} where {missing} is expected: pass the params of the same fold, "
            "folded.apply(folded.params, *args)."
        )


def _check_concrete(leaves: Sequence[Any]) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise TypeError(
            "variables are traced, but folding computes with their values: call bn_jax.fold "
            "outside of jax.jit and other transforms, and use folded.apply inside."
        )


def _check_no_switch(args: Any) -> None:
    for keys, leaf in jax.tree.leaves_with_path(args):
        if isinstance(leaf, bool):
            raise TypeError(
                f"args{jax.tree_util.keystr(keys)} is {leaf}, but expected "
                "are arrays, which the program depends on by shape and dtype only. Pass a switch "
                "inside: forward = lambda variables, x: model.apply(variables, x, train=False)."
            )


def _check_same_shape(**trees: Mapping[str, Any]) -> None:
    shapes = {tree: {name: leaf.shape for name, leaf in one.items()} for tree, one in trees.items()}
    if len({shape for leaves in shapes.values() for shape in leaves.values()}) > 1:
        raise ValueError(
            f"params has {shapes['params']}, but batch_stats has {shapes['batch_stats']}: expected "
            "one shape. Pass both of the same norm."
        )


def _minus_product(b: jax.Array, a: jax.Array, mean: jax.Array) -> jax.Array:
    """Returns ``b - a * mean`` with the rounding of the product put back (Dekker 1971)."""
    product = a * mean
    if jnp.iscomplexobj(product):
        return b - product
    (a_high, a_low), (mean_high, mean_low) = _halves(a), _halves(mean)
    rest = a_high * mean_high - product
    rest = ((rest + a_high * mean_low) + a_low * mean_high) + a_low * mean_low
    difference = b - product
    # The sum of the two roundings, of the difference (Knuth's two-sum) and of the product.
    other = difference - b
    rounding = (b - (difference - other)) - (product + other)
    corrected = difference + (rounding - rest)
    return jnp.where(jnp.isfinite(corrected), corrected, difference)


def _halves(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits numbers into two of half as many digits each."""
    digits = jnp.finfo(values.dtype).nmant + 1
    scaled = values * (2.0 ** ((digits + 1) // 2) + 1)
    high = scaled - (scaled - values)
    return high, values - high


def _check_homogeneous(activation: Activation) -> None:
    """Raises the ValueError that shows where an activation does not scale with its input."""
    # Compiled, for under vmap a custom_jvp would be batched whatever its argument.
    compiled = jax.jit(activation)
    with jax.ensure_compile_time_eval():
        z = jnp.array([-8.0, -1.5, -0.25, 0.0, 0.25, 1.5, 8.0])
        for c in (0.25, 2.0, 8.0, 2.0**-30, 2.0**30):
            scaled, expected = (np.asarray(one) for one in (compiled(c * z), c * compiled(z)))
            wrong = ~(np.abs(scaled - expected) <= 1e-5 * np.abs(c * np.asarray(z)))
            if wrong.any():
                at = int(np.argmax(wrong))
                raise ValueError(
                    f"activation={getattr(activation, '__name__', activation)} does not scale with "
                    f"its input: activation({c} * {z[at]}) is {scaled[at]}, but {c} * "
                    f"activation({z[at]}) is {expected[at]}, so that scale cannot move across it. "
                    "jax.nn.relu, jax.nn.leaky_relu and None do; with others, leave the scale in "
                    "the norm."
                )


def _along(kernel: jax.Array, axis: int, factor: jax.Array) -> jax.Array:
    """Returns the factors of a kernel's input dimension, at the rank of the kernel."""
    shape, features = jnp.shape(kernel), factor.size
    if factor.ndim != 1 or not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"axis={axis} of a kernel of shape {shape} cannot take a scale of shape "
            f"{factor.shape}: expected a scale [F], and the kernel's input dimension as axis."
        )
    axis %= len(shape)
    if shape[axis] % features:
        raise ValueError(
            f"kernel of shape {shape} has {shape[axis]} inputs on axis={axis - len(shape)}, no "
            f"multiple of the {features} features of scale. Pass the axis of its input dimension: "
            "-2 for Flax's layers, -1 for a depthwise convolution."
        )
    if len(shape) > 2 and axis == len(shape) - 1 and shape[-2] != 1:
        raise ValueError(
            f"axis=-1 of a kernel of shape {shape} holds its outputs, but scale is of inputs: "
            "expected axis=-2, or the kernel of a depthwise convolution [..., 1, F * multiplier]. "
            "The inputs of other grouped convolutions are on no axis: leave the scale in the norm."
        )
    times = shape[axis] // features
    is_depthwise = len(shape) > 2 and axis == len(shape) - 1 and shape[-2] == 1
    repeated = jnp.repeat(factor, times) if is_depthwise else jnp.tile(factor, times)
    return repeated.reshape([-1 if one == axis else 1 for one in range(len(shape))])
