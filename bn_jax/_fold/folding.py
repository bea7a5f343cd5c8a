"""Batch norms folded into the linear layers beside them, for a model whose training is over.

`fold` traces the forward function, decides by shapes and equations alone where each norm goes
(`decisions`), makes the folded program (`plan`), and computes its parameters once, in float64
(`parameters`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from bn_jax._fold.features import Array
from bn_jax._fold.parameters import Known
from bn_jax._fold.plan import Entry, Plan, Signature, make_plan
from bn_jax._fold.report import FoldReport
from bn_jax._paths import format_path
from bn_jax._program import PureForward, as_pure, in_double, inputs_of, run_steps, trace


class Folded(NamedTuple):
    """A model without its norms. In a notebook it shows what became of each norm.

    Attributes:
        apply: ``apply(params, *args)`` computes what ``forward(variables, *args)`` did. It is
            compiled by `jax.jit`.
        params: nested dictionaries by the paths of the variables: kernels with the norms in them,
            a bias beside each, and all other variables that are needed.
        report: what became of each norm.
    """

    apply: jax.stages.Wrapped
    params: dict[str, Any]
    report: FoldReport

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        values = sum(leaf.size for leaf in leaves)
        return f"Folded({self.report.summary()}, {values:,} parameters in {len(leaves)} arrays)"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def fold(forward: Callable[..., Any], variables: Any, *args: Any) -> Folded:
    """Folds the batch norms of a model into its convolutions and dense layers.

    A norm by running statistics is ``y = a x + b``, with ``a = scale * rsqrt(var + epsilon)`` and
    ``b = bias - a * mean``. After a linear layer, `a` multiplies its kernel along the output
    dimension and `b` becomes its bias. Before linear layers, `a` multiplies their kernels along the
    input dimension, and `b` times the kernel goes to their biases, unless padding is in the way.
    The norms are found in the traced program, so that norms of this library, of Flax and written by
    hand are alike, after and before convolutions (strided, dilated, transposed, grouped, depthwise)
    and products of any layout. A norm with no place to go becomes one multiplication and one
    addition.

    Args:
        forward: ``forward(variables, *args)`` evaluates the model, for example
            ``lambda variables, x: model.apply(variables, x, train=False)``. For an NNX model,
            ``forward(model, *args)``.
        variables: ``{"params": ..., "batch_stats": ...}`` or any other tree of arrays; or an
            `nnx.Module`. The module stays as it is; a copy of it in evaluation is folded.
        *args: trees of arrays, or of `jax.ShapeDtypeStruct`: examples of shape and dtype.

    Returns:
        `Folded`. Its `apply` is a pure function, compiled by `jax.jit`. It works under `jax.vmap`,
        `jax.grad`, `jax.shard_map` and `jax.export`, on other batch sizes too (and image sizes,
        where the model takes them), and holds none of the arrays of `variables`. Kernels keep
        their dtypes: in half precision they are rounded again, each weight by up to 2**-9 of it in
        bfloat16, 2**-12 in float16, and the result differs by that. A kernel in integers or in
        floating point of 8 bits is not multiplied: where the program casts it, the folded kernel
        is stored as cast, and where a layer takes it as it is, the norm is left. So is a norm
        beside a kernel that is a constant of the program, since folding adds no parameters.
        A folded norm subtracts the mean last, so that the error grows with ``|mean| / deviation``
        of the features: by about 6e-8 times that in float32. A norm before a layer that computes in
        half precision is therefore left.

    Raises:
        TypeError: a variable is traced: fold outside of `jax.jit`; or an argument is a bool.
        ValueError: a new kernel is too large for its dtype, or loses a feature in float16; or, from
            `apply`, `params` are not those of this model, or the model is another program for these
            arguments than for the examples.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, bn_jax as bn
        >>> model = nn.Sequential([nn.Dense(3), bn.linen.BatchNorm(use_running_average=True)])
        >>> x = jnp.ones((2, 4))
        >>> variables = model.init(jax.random.key(0), x)
        >>> folded = bn.fold(model.apply, variables, x)
        >>> print(folded.report)
        layers_1  into layers_0/kernel
        >>> folded
        Folded(1 of 1 norms folded, 15 parameters in 2 arrays)
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
    plan = make_plan(trace(pure, shapes, *jax.tree.map(_abstract, args)))
    params = _compute_params(plan, leaves)
    return Folded(_make_apply(pure, shapes, plan.signature()), params, plan.report)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    aval = jax.typeof(leaf)
    weak_type = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak_type)


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
                f"args{jax.tree_util.keystr(keys)} is {leaf}; expected arrays, of which the "
                "program depends on shape and dtype only. Set a switch inside: forward = lambda "
                "variables, x: model.apply(variables, x, train=False)."
            )


# --- parameters ---------------------------------------------------------------------------------


def _compute_params(plan: Plan, leaves: Sequence[Any]) -> dict[str, Any]:
    """Returns the parameters of the folded program as nested dictionaries."""
    known = Known(plan.program, leaves)
    params = {}
    for group in plan.groups:
        values = group.source.compute(known)
        for entry, value in zip(group.entries.values(), values, strict=True):
            if isinstance(value, np.ndarray):
                value = _rounded(entry, value)
            params[entry.path] = jnp.asarray(value)
    return unflatten_dict(params, sep="/")


def _rounded(entry: Entry, value: Array) -> Array:
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


# --- the folded function ------------------------------------------------------------------------


def _make_apply(pure: PureForward, shapes: Any, signature: Signature) -> jax.stages.Wrapped:
    """Returns the folded program as a function for arguments of any shape that it is right for.

    For each shape the forward function is traced and planned again, since a program depends on the
    shapes of its arguments; the parameters must come out the same.
    """

    def apply(params: Any, *args: Any) -> Any:
        plan = make_plan(trace(pure, shapes, *args))
        if plan.signature() != signature:
            raise ValueError(_describe_difference(signature, plan.signature(), args))
        return _run(plan, params, args)

    return jax.jit(apply)


def _run(plan: Plan, params: Any, args: Any) -> Any:
    by_path = {format_path(keys): leaf for keys, leaf in jax.tree.leaves_with_path(params)}
    _check_params(plan, by_path)
    values = inputs_of(plan.program, arguments=jax.tree.leaves(args))
    values.update((key, by_path[entry.path]) for key, entry in plan.entries.items())
    run_steps(plan.steps, values)
    outputs = [values[value] for value in plan.program.outputs]
    return jax.tree.unflatten(plan.program.tree, outputs)


def _describe_difference(expected: Signature, received: Signature, args: Any) -> str:
    parameters = {path for path, _ in {*expected.parameters} ^ {*received.parameters}}
    norms = {norm.name for norm in {*expected.report} ^ {*received.report}}
    differences = []
    if parameters:
        differences.append(f"computes the parameters {sorted(parameters)} otherwise")
    if norms:
        differences.append(f"folds the norms {sorted(norms)} elsewhere")
    return (
        f"The model is another program for arguments of the shapes "
        f"{[jnp.shape(leaf) for leaf in jax.tree.leaves(args)]} than for those it was folded with: "
        f"it {' and '.join(differences)}. Expected the same program. Fold it with arguments of "
        "these shapes: bn_jax.fold(forward, variables, *args)."
    )


def _check_params(plan: Plan, by_path: Mapping[str, Any]) -> None:
    expected = {entry.path: entry.shape for entry in plan.entries.values()}
    received = {path: jnp.shape(leaf) for path, leaf in by_path.items()}
    if expected != received:
        missing = {path: shape for path, shape in expected.items() if received.get(path) != shape}
        unknown = {path: shape for path, shape in received.items() if expected.get(path) != shape}
        raise ValueError(
            f"params has {unknown} where {missing} is expected: pass the params of the same fold, "
            "folded.apply(folded.params, *args)."
        )
