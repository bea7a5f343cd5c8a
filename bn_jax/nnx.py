"""Flax NNX modules: variables and attributes; the arithmetic is in the pure functions."""

import inspect
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache, reduce
from types import MappingProxyType
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PromoteDtypeFn

from bn_jax.batch_norm import Activation, BatchStats, Params, batch_norm

M = TypeVar("M")


class BatchNorm(nnx.BatchNorm):
    """Batch normalization with every argument, default and variable of `flax.nnx.BatchNorm`.

    ``y = (x - mean) * rsqrt(var + epsilon) * scale + bias``, as `bn_jax.batch_norm` computes it.
    ``scale`` and ``bias`` are `nnx.Param` of shape ``[num_features]`` in `param_dtype`, ``mean``
    and ``var`` are `nnx.BatchStat` in float32. No derivative flows into the updated statistics.

    Args:
        num_features: the size of `axis`.
        use_running_average: True for evaluation, False for training; `train()` and `eval()` of any
            enclosing module set it.
        axis: the feature axis of the input.
        momentum: the weight of the old value in the running statistics; None for the cumulative
            average over all batches, whose ``count`` is then kept beside them.
        epsilon: added to the variance.
        dtype: the dtype of the result; by default that of input, statistics and parameters
            promoted, as in Flax. Statistics are always computed, kept and used in at least
            float32, where Flax casts them to `dtype`.
        param_dtype: the dtype of ``scale`` and ``bias``.
        use_bias: whether to add ``bias``.
        use_scale: whether to multiply by ``scale``.
        bias_init: initializer of ``bias``.
        scale_init: initializer of ``scale``.
        axis_name: the named axis to synchronize over; under `jit`, plain or sharded, where
            statistics are global, it changes nothing.
        axis_index_groups: groups of indices of `axis_name` with statistics of their own.
        use_fast_variance: accepted for compatibility; the one variance here is fast and safe.
        promote_dtype: as in Flax, called on ``(x, mean, var, scale, bias)``; of what another
            function than the default returns, the statistics are not used.
        rngs: the random streams for the initializers.
        bias_metadata: metadata of the ``bias`` variable.
        scale_metadata: metadata of the ``scale`` variable.
        activation: a function applied to the result.
        virtual_batch_size: statistics of their own for every that many consecutive examples.
        running_var_ddof: 1 for the unbiased running variance, as the paper and PyTorch have it.
        update_running_average: whether the running statistics update, after `eval()` too; None: if
            and only if the batch normalizes.
        train_params: False for ``scale`` and ``bias`` without a derivative. What an optimizer does
            without one, as weight decay, is not its business.
        frozen: True for running statistics that normalize and do not update, whatever the call,
            the other arguments or `train()` say. `freeze` sets it by path.

    Raises:
        ValueError: `use_running_average` is given nowhere, or `bn_jax.batch_norm` objects
            to the input.
        TraceContextError: in training, a transform that the layer is no argument of encloses the
            call: the update would be lost.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
        >>> layer(jnp.array([[1.0], [3.0]])).round(3).tolist()
        [[-1.0], [1.0]]
        >>> layer.mean[...].tolist()
        [1.0]

    Reference: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = jax.nn.initializers.zeros,
        scale_init: Initializer = jax.nn.initializers.ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        activation: Activation | None = None,
        virtual_batch_size: int | None = None,
        running_var_ddof: int = 0,
        update_running_average: bool | None = None,
        train_params: bool = True,
        frozen: bool = False,
    ) -> None:
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,  # type: ignore[arg-type]
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        if momentum is None:
            self.count = nnx.BatchStat(jnp.zeros(num_features, jnp.float32))
        self.activation = activation
        self.virtual_batch_size = virtual_batch_size
        self.running_var_ddof = running_var_ddof
        self.update_running_average = update_running_average
        self.train_params = train_params
        self.frozen = frozen

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_running_average: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array that holds `num_features` features on `axis`.
            use_running_average: True for evaluation, False for training; overrides the attribute.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.
            residual: an array of the shape of `x`, added before the activation.
            update_running_average: overrides the attribute.

        Returns:
            The normalized array, of the shape of `x`.
        """
        use_running_average, update = self._modes(use_running_average, update_running_average)
        variables = {"mean": self.mean, "var": self.var}
        if hasattr(self, "count"):
            variables["count"] = self.count
        batch_stats = cast(BatchStats, {name: one[...] for name, one in variables.items()})
        x, params, dtype = self._promoted(x, residual, batch_stats)
        y, updated = batch_norm(
            params,
            batch_stats,
            x,
            use_running_average=use_running_average,
            update_running_average=update,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            mask=mask,
            activation=self.activation,
            residual=residual,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            virtual_batch_size=self.virtual_batch_size,
            running_var_ddof=self.running_var_ddof,
            dtype=dtype,
        )
        if update:
            self._store(variables, updated)
        return y

    def _modes(
        self, use_running_average: bool | None, update_running_average: bool | None
    ) -> tuple[bool, bool]:
        """Returns whether the running statistics normalize, and whether they update."""
        if self.frozen:
            return True, False
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "use_running_average is None in the constructor and in the call of the "
                f"BatchNorm of {self.num_features} features. "
                "Pass nnx.BatchNorm(..., use_running_average=False), or layer(x, "
                "use_running_average=False), or call model.train() or model.eval()."
            )
        if update_running_average is None:
            update_running_average = self.update_running_average
        if update_running_average is None:
            update_running_average = not use_running_average
        return use_running_average, update_running_average

    def _store(self, variables: dict[str, nnx.BatchStat[Any]], batch_stats: BatchStats) -> None:
        new = cast(dict[str, jax.Array], batch_stats)
        try:
            for name, variable in variables.items():
                # Assigning to an item would cast the mean of complex input to the old real dtype.
                variable.set_value(jax.lax.stop_gradient(new[name]))
        except TraceContextError as error:
            raise TraceContextError(
                "BatchNorm updates its running statistics inside of a transform (nnx.jit, "
                "nnx.vmap, nnx.eval_shape, jax.grad, ...) that it was made outside of, and did not "
                "come in as an argument. Pass the model: nnx.eval_shape(lambda model, x: model(x), "
                "model, x); or leave the statistics alone: "
                "nnx.eval_shape(nnx.view(model, use_running_average=True), x)."
            ) from error

    def _promoted(
        self, x: jax.Array, residual: jax.Array | None, batch_stats: BatchStats
    ) -> tuple[jax.Array, Params, Dtype]:
        """Returns input and parameters, promoted on demand only, and the dtype of the result."""
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        mean, var = batch_stats["mean"], batch_stats["var"]
        if self.promote_dtype is not dtypes.promote_dtype:
            x, mean, var, scale, bias = self.promote_dtype(
                (x, mean, var, scale, bias), dtype=self.dtype
            )
        params: Params = {}
        if scale is not None:
            params["scale"] = scale
        if bias is not None:
            params["bias"] = bias
        if not self.train_params:
            params = jax.lax.stop_gradient(params)
        if self.dtype is not None:
            return x, params, self.dtype
        given = jax.tree.leaves((x, mean, var, params, residual))
        return x, params, reduce(jnp.promote_types, (jnp.asarray(one).dtype for one in given))


def freeze(model: M, *paths: str, train_params: bool = False) -> M:
    """Freezes batch norms in place: running statistics that normalize and do not update.

    Unlike `eval()`, it survives ``model.train()``. To leave the model as it is, freeze a view:
    ``bn_jax.nnx.freeze(nnx.view(model))`` has switches of its own and the same variables.

    Args:
        model: a module, or a tree of them.
        *paths: glob patterns (`fnmatch`; ``*`` also matches ``/``) of the layers' paths in the
            model, or of modules around them, joined by ``/``: ``"stage0/*"``, ``"layers/1"``. Of a
            layer that is in several places, any path counts. None given: every batch norm.
        train_params: whether ``scale`` and ``bias`` have a derivative all the same.

    Returns:
        The model.

    Raises:
        ValueError: a pattern matches no batch norm; the message lists those there are.
        TypeError: a pattern matches a batch norm of Flax's: call `replace_norms` first.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> bn.nnx.freeze(layer).train()
        >>> layer(jnp.array([[0.0], [1.0]])).round(3).tolist(), layer.mean[...].tolist()
        ([[0.0], [1.0]], [0.0])
    """
    for layer in _batch_norms(model, paths):
        layer.frozen, layer.train_params = True, train_params
    return model


def unfreeze(model: M, *paths: str) -> M:
    """Takes back in place what `freeze` did: ``frozen=False`` and ``train_params=True``.

    Args:
        model: a module, or a tree of them.
        *paths: as for `freeze`.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: as `freeze` does.

    Example:
        >>> import bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.BatchNorm(1, frozen=True, rngs=nnx.Rngs(0))
        >>> bn.nnx.unfreeze(layer).frozen
        False
    """
    for layer in _batch_norms(model, paths):
        layer.frozen, layer.train_params = False, True
    return model


def replace_norms(model: M) -> M:
    """Makes the norms of a model ours, in place.

    Every layer in it that is of one of Flax's classes with a namesake here becomes of ours: the
    same object, wherever it stands and however often, with the same variables, so that an
    `nnx.Optimizer` made before goes on. Subclasses are left alone: what they do is theirs.

    Args:
        model: a module, or a tree of them.

    Returns:
        The model.

    Example:
        >>> import bn_jax as bn
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> isinstance(bn.nnx.replace_norms(model).layers[0], bn.nnx.BatchNorm)
        True
    """
    replacements = _replacements()
    for _, layer in nnx.iter_graph(model):
        ours = replacements.get(type(layer))
        if ours is None:
            continue
        known = inspect.signature(type(layer).__init__).parameters
        object.__setattr__(layer, "__class__", ours)
        for name, parameter in inspect.signature(ours.__init__).parameters.items():
            if name not in known:
                setattr(layer, name, parameter.default)
    return model


@cache
def _replacements() -> dict[type[nnx.Module], type[nnx.Module]]:
    """Returns the classes of this module by those of Flax that have the same name."""
    named = {name: one for name, one in globals().items() if isinstance(one, type)}
    return {
        getattr(nnx, name): cast(type[nnx.Module], ours)
        for name, ours in named.items()
        if issubclass(ours, getattr(nnx, name, ()))
    }


def _batch_norms(model: Any, patterns: tuple[str, ...]) -> list[BatchNorm]:
    """Returns the batch norms of which a path, or one around it, matches one of the patterns."""
    layers = [(path, layer) for path, layer in _nodes(model) if isinstance(layer, nnx.BatchNorm)]
    found: list[BatchNorm] = []
    for pattern in patterns or ("*",):
        matching = [
            (path, layer)
            for path, layer in layers
            if any(fnmatchcase("/".join(path[:end]), pattern) for end in range(len(path) + 1))
        ]
        if not matching:
            raise ValueError(
                f"No batch norm has a path that matches {pattern!r}; those there are have the "
                f"paths {sorted({'/'.join(path) for path, _ in layers})}. Pass patterns of these, "
                "or of modules around them."
            )
        for path, layer in matching:
            if not isinstance(layer, BatchNorm):
                raise TypeError(
                    f"{'/'.join(path)!r} is a {type(layer).__module__}.{type(layer).__name__}, "
                    "which cannot be frozen: call bn_jax.nnx.replace_norms(model) first; derive a "
                    "class of your own from bn_jax.nnx.BatchNorm."
                )
            found.append(layer)
    return found


def _nodes(
    node: Any, path: tuple[str, ...] = (), around: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields what a model is made of, once for each of its paths; a cycle once around."""
    if isinstance(node, nnx.Variable) or any(node is one for one in around):
        return
    yield path, node
    children = jax.tree.leaves_with_path(
        node, is_leaf=lambda keys, _: bool(keys), is_leaf_takes_path=True
    )
    for keys, child in children:
        if keys:
            name = jax.tree_util.keystr(keys, simple=True)
            yield from _nodes(child, (*path, name), (*around, node))
