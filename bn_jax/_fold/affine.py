"""A batch norm by running statistics as ``y = a x + b``, and its scale moved into a kernel."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax._core.checks import as_params, statistics_dtype
from bn_jax._core.types import Activation, BatchStats, Params, check_epsilon


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
            f"batch_stats lacks {sorted(missing)}; it has {sorted(batch_stats)}. Pass the "
            "statistics of one norm: variables['batch_stats'][name]."
        )
    mean, var = jnp.asarray(batch_stats["mean"]), jnp.asarray(batch_stats["var"])
    _check_same_shape(params, {"mean": mean, "var": var})
    dtypes = [leaf.dtype for leaf in (mean, var, *jax.tree.leaves(params))]
    dtype = reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))
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
        kernel: of the layer that takes the output of the activation. Its size on `axis` is F, or a
            multiple of F where positions and features were flattened, features last.
        axis: the input dimension of the kernel: -2 for Flax's dense layers and convolutions, -1
            for the kernel of a depthwise convolution, ``[..., 1, F * multiplier]``.
        activation: between norm and layer, or None.

    Returns:
        The new `params` and `kernel`, in the same dtypes.

    Raises:
        ValueError: `params` has no scale, or a complex one for a real kernel; `axis` does not fit,
            which is so for every axis of a grouped convolution that is not depthwise; or
            `activation` does not scale with its input.

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
            "params has no 'scale', so there is nothing to absorb: leave the kernel as it is."
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
    # Where the bias divided by a tiny scale would overflow, the scale stays where it is.
    moves = (scale != 0) & jnp.isfinite(bias / jnp.where(scale == 0, 1, magnitude))
    factor = jnp.where(moves, magnitude, 1).astype(scale.dtype)
    new: Params = {"scale": scale / factor}
    if "bias" in params:
        new["bias"] = (bias / factor.astype(bias.dtype)).astype(bias.dtype)
    return new, kernel * _along(kernel, axis, factor).astype(kernel.dtype)


def _check_same_shape(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> None:
    of_params = {name: leaf.shape for name, leaf in params.items()}
    of_batch_stats = {name: leaf.shape for name, leaf in batch_stats.items()}
    if len({*of_params.values(), *of_batch_stats.values()}) > 1:
        raise ValueError(
            f"params has {of_params}, but batch_stats has {of_batch_stats}: expected one shape. "
            "Pass both of the same norm."
        )


def _minus_product(b: jax.Array, a: jax.Array, mean: jax.Array) -> jax.Array:
    """Returns ``b - a * mean``, corrected for the rounding of product and difference.

    Without it the error would grow with the product, however small the difference.
    """
    product = a * mean
    if jnp.iscomplexobj(product):
        return b - product
    # Dekker 1971: `a * mean - product`, which no single product holds, from exact partial products.
    (a_high, a_low), (mean_high, mean_low) = _halves(a), _halves(mean)
    rest = a_high * mean_high - product
    rest = ((rest + a_high * mean_low) + a_low * mean_high) + a_low * mean_low
    # Knuth's two-sum: the rounding of the difference.
    difference = b - product
    subtracted = difference - b
    rounding = (b - (difference - subtracted)) - (product + subtracted)
    corrected = difference + (rounding - rest)
    # Halves of very large numbers overflow.
    return jnp.where(jnp.isfinite(corrected), corrected, difference)


def _halves(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits numbers into two of half as many digits each, whose products are exact."""
    digits = jnp.finfo(values.dtype).nmant + 1
    scaled = values * (2.0 ** ((digits + 1) // 2) + 1)
    high = scaled - (scaled - values)
    return high, values - high


def _check_homogeneous(activation: Activation) -> None:
    """Raises the ValueError that shows where an activation does not scale with its input."""
    # Inside of `vmap` a `custom_jvp` would be batched although its argument is a constant. A
    # compiled function is not.
    compiled = jax.jit(activation)
    with jax.ensure_compile_time_eval():
        z = jnp.array([-8.0, -1.5, -0.25, 0.0, 0.25, 1.5, 8.0])
        for c in (0.25, 2.0, 8.0, 2.0**-30, 2.0**30):
            scaled, expected = map(np.asarray, (compiled(c * z), c * compiled(z)))
            wrong = ~(np.abs(scaled - expected) <= 1e-5 * np.abs(c * np.asarray(z)))
            if wrong.any():
                at = int(np.argmax(wrong))
                raise ValueError(
                    f"activation={getattr(activation, '__name__', activation)} does not scale with "
                    f"its input: activation({c} * {z[at]}) is {scaled[at]}, but {c} * "
                    f"activation({z[at]}) is {expected[at]}: the scale cannot move across it. "
                    "jax.nn.relu, jax.nn.leaky_relu and None do; with others, leave the scale in "
                    "the norm."
                )


def _along(kernel: jax.Array, axis: int, factor: jax.Array) -> jax.Array:
    """Returns a factor for each input of a kernel, at the rank of the kernel."""
    shape = jnp.shape(kernel)
    _check_axis(shape, axis, factor.shape)
    axis %= len(shape)
    times = shape[axis] // factor.size
    # A depthwise convolution has its inputs on its last axis, each repeated for its outputs.
    # Any other kernel has positions there, with the features last.
    is_depthwise = len(shape) > 2 and axis == len(shape) - 1
    repeated = jnp.repeat(factor, times) if is_depthwise else jnp.tile(factor, times)
    return repeated.reshape([-1 if dimension == axis else 1 for dimension in range(len(shape))])


def _check_axis(shape: tuple[int, ...], axis: int, scale_shape: tuple[int, ...]) -> None:
    if len(scale_shape) != 1 or not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"axis={axis} of a kernel of shape {shape} cannot take a scale of shape "
            f"{scale_shape}: expected a scale [F], and the kernel's input dimension as axis."
        )
    (features,) = scale_shape
    from_last = axis % len(shape) - len(shape)
    if shape[axis] % features:
        raise ValueError(
            f"kernel of shape {shape} has {shape[axis]} inputs on axis={from_last}, no multiple of "
            f"the {features} features of scale. Pass the axis of its input dimension: -2 for "
            "Flax's layers, -1 for a depthwise convolution."
        )
    if len(shape) > 2 and from_last == -1 and shape[-2] != 1:
        raise ValueError(
            f"axis=-1 of a kernel of shape {shape} holds its outputs, but scale is of inputs: "
            "expected axis=-2, or the kernel of a depthwise convolution [..., 1, F * multiplier]. "
            "The inputs of other grouped convolutions are on no axis: leave the scale in the norm."
        )
