"""The NNX batch norm by domain, and models between it and plain batch norms."""

import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bn_jax._compat import as_set_view
from bn_jax._modules import number_of_domains
from bn_jax.nnx.patching import become, find_norms
from bn_jax.nnx.running import BatchNorm, call_batch_norm

M = TypeVar("M")


def _set_view(
    layer: Any, use_running_average: bool | None = None, domain: jax.Array | int | None = None
) -> None:
    """Sets the mode of a view and the domains of its calls; `nnx.view` calls it."""
    if use_running_average is not None:
        layer.use_running_average = use_running_average
    if domain is not None:
        is_array = isinstance(domain, jax.Array | np.ndarray)
        layer.domain = nnx.data(domain) if is_array else nnx.static(domain)


class DomainBatchNorm(BatchNorm):
    """Batch normalization with statistics, parameters or both by domain.

    Every example is normalized as by a `BatchNorm` of its domain alone, as
    `bn_jax.domain_batch_norm` computes it. ``scale`` and ``bias``, and ``mean`` and ``var``, have
    the shape ``[num_domains, num_features]``. It has all arguments of `BatchNorm`, with their
    defaults. `split_batch_norms` makes it of the batch norms of a model, and `select_domain` goes
    back.

    In a model that does not hand on the domain, the attribute `domain` has it.
    ``nnx.view(model, domain=domain)`` is the model with another domain and with the same variables;
    there, `domain` may be an array or traced.

    Args:
        num_features: the size of `axis`.
        num_domains: how many domains there are.
        share_params: True for one ``scale`` and ``bias`` for all domains.
        share_stats: True for one ``mean`` and ``var``, of all examples together, as in conditional
            batch norm.
        domain: the domain of a whole batch, where the call gives none.
        **options: the other arguments of `BatchNorm`; `rngs` is required.

    Raises:
        ValueError, TraceContextError: as in `BatchNorm`, or as in `bn_jax.domain_batch_norm`; or
            `domain` is given nowhere.
        TypeError: as in `bn_jax.domain_batch_norm`.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> layer = bn.nnx.DomainBatchNorm(1, 2, momentum=0.5, rngs=nnx.Rngs(0))
        >>> x, domain = jnp.array([[1.0], [3.0], [10.0], [30.0]]), jnp.array([0, 0, 1, 1])
        >>> layer(x, domain).round(3).tolist()
        [[-1.0], [1.0], [-1.0], [1.0]]
        >>> layer.mean[...].tolist()
        [[1.0], [10.0]]

    Reference: Chang et al. 2019, https://arxiv.org/abs/1906.03950.
    """

    def __init__(
        self,
        num_features: int,
        num_domains: int,
        *,
        share_params: bool = False,
        share_stats: bool = False,
        domain: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(num_features, rngs=rngs, **options)
        self.num_domains = num_domains
        self.share_params = share_params
        self.share_stats = share_stats
        self.domain: Any = domain
        shape = (num_domains, num_features)
        if not share_params:
            dtype = self.param_dtype
            ones = options.get("scale_init", jax.nn.initializers.ones)
            zeros = options.get("bias_init", jax.nn.initializers.zeros)
            for variable, init in (self.scale, ones), (self.bias, zeros):
                if variable is not None:
                    variable.set_value(init(rngs.params(), shape, dtype))
        if not share_stats:
            for name in {"mean", "var", "count"} & set(vars(self)):
                variable = getattr(self, name)
                variable.set_value(jnp.broadcast_to(variable.get_value(), shape))

    def __call__(  # type: ignore[override]
        self,
        x: jax.Array,
        domain: jax.Array | int | None = None,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_running_average: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: floating-point or complex array that holds `num_features` features on `axis`.
            domain: integers of shape ``[N]``, an integer for the whole batch, or weights of shape
                ``[N, num_domains]``; None for that of the attribute.
            use_running_average: True for evaluation, False for training; overrides the attribute.
            mask: boolean or weights, broadcastable to `x`: what enters the statistics.
            residual: an array of the shape of `x`, added before the activation.
            update_running_average: overrides the attribute.

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
            domain=_choose_domain(self, domain),
        )

    set_view = as_set_view(_set_view, nnx.BatchNorm.set_view)


def split_batch_norms(
    model: M,
    num_domains: int,
    *paths: str,
    share_params: bool = False,
    share_stats: bool = False,
    domain: int | None = None,
) -> M:
    """Returns a copy of a model whose batch norms have statistics and parameters by domain.

    Every domain starts from the statistics and parameters of the plain norm, so that the model
    computes the same for all domains. Each `flax.nnx.BatchNorm` and `bn_jax.nnx.BatchNorm` becomes
    a `DomainBatchNorm`. Subclasses, such as `BatchRenorm`, stay as they are.

    The model's own code calls its norms. Where it does not hand on a domain, say which one the
    batch has with a view, which shares the variables of the model: ``nnx.view(model,
    domain=domain)(x)``. `domain` is an integer, an array ``[N]`` or weights, and may be traced. The
    argument `domain` here is that of calls without a view.

    Args:
        model: a module, or a tree of them. It is not changed. The copy has variables of its own, so
            make an `nnx.Optimizer` for it.
        num_domains: how many domains the layers get.
        *paths: glob patterns of the layers' paths, as for `freeze`. Without any: every batch norm.
        share_params: True for one ``scale`` and ``bias`` for all domains.
        share_stats: True for one ``mean`` and ``var`` for all domains.
        domain: the domain of a whole batch, where a call gives none.

    Returns:
        The new model.

    Raises:
        ValueError: the model has no batch norm that can be split, a pattern matches none, or
            `num_domains` is less than 1.
        TypeError: `num_domains` is no integer, `model` holds no NNX module, or a pattern matches a
            subclass of a batch norm.

    Example:
        >>> import jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> plain = nnx.Sequential(nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0)))
        >>> model = bn.nnx.split_batch_norms(plain, 2)
        >>> y = nnx.view(model, domain=1)(jnp.array([[1.0], [3.0]]))
        >>> model.layers[0].mean[...].tolist()
        [[0.0], [1.0]]
    """
    number = number_of_domains(num_domains)
    copy = nnx.clone(model)
    norms = _splittable(copy, paths)

    def repeat(array: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.expand_dims(array, -2), number, -2)

    def split(layer: Any) -> Iterator[str]:
        become(layer, BatchNorm)
        object.__setattr__(layer, "__class__", DomainBatchNorm)
        layer.num_domains, layer.domain = number, domain
        layer.share_params, layer.share_stats = share_params, share_stats
        return _names_by_domain(layer)

    _change_norms(norms, split, repeat, is_added=True)
    return copy


def select_domain(model: M, domain: int, *paths: str) -> M:
    """Returns a copy of a model whose norms by domain are plain norms, those of one domain.

    Each `DomainBatchNorm` becomes a `BatchNorm`. Other layers stay as they are. So it is the
    inverse of `split_batch_norms`. The code of the model must call its norms without a domain: a
    `BatchNorm` that gets one raises an error. A model that hands on its domain evaluates, folds and
    exports by one domain without this function, as ``lambda model, x: model(x, 1)``.

    Args:
        model: a module, or a tree of them. It is not changed.
        domain: the domain.
        *paths: glob patterns of the layers' paths, as for `freeze`. Without any: every norm by
            domain.

    Returns:
        The new model.

    Raises:
        ValueError: the model has no norm by domain, or not this domain, or a pattern matches none.
        TypeError: `domain` is no integer, or `model` holds no NNX module.

    Example:
        >>> import bn_jax as bn
        >>> from flax import nnx
        >>> model = nnx.Sequential(bn.nnx.DomainBatchNorm(3, 2, rngs=nnx.Rngs(0)))
        >>> bn.nnx.select_domain(model, 1).layers[0].mean.shape
        (3,)
    """
    index = operator.index(domain)
    copy = nnx.clone(model)
    about_none = (
        "expected a DomainBatchNorm in it. Pass the model that split_batch_norms returned, or that "
        "has such layers."
    )
    norms = [layer for _, layer in find_norms(copy, paths, (DomainBatchNorm,), about_none)]
    numbers = sorted({layer.num_domains for layer in norms})
    if not 0 <= index < numbers[0]:
        raise ValueError(
            f"model has batch norms of {numbers} domains, and domain={domain} was asked for; "
            "expected a domain from 0 to D - 1."
        )

    def select(layer: Any) -> Iterator[str]:
        names = list(_names_by_domain(layer))
        for name in ("num_domains", "share_params", "share_stats", "domain"):
            delattr(layer, name)
        object.__setattr__(layer, "__class__", BatchNorm)
        return iter(names)

    def take(array: jax.Array) -> jax.Array:
        return jnp.take(array, index, -2)

    _change_norms(norms, select, take, is_added=False)
    return copy


def _splittable(model: Any, paths: tuple[str, ...]) -> list[Any]:
    """Returns the batch norms at some paths that can have domains."""
    about_none = (
        "expected a flax.nnx.BatchNorm or a bn_jax.nnx.BatchNorm in it. Pass the model that holds "
        "the norms."
    )
    norms = find_norms(model, paths, (nnx.BatchNorm,), about_none)
    plain = [layer for _, layer in norms if type(layer) in (nnx.BatchNorm, BatchNorm)]
    others = {path: type(layer).__name__ for path, layer in norms if layer not in plain}
    if others and (paths or not plain):
        raise TypeError(
            f"{others} cannot get domains, expected flax.nnx.BatchNorm or bn_jax.nnx.BatchNorm and "
            "no subclass. Pass paths of other batch norms."
        )
    return plain


def _names_by_domain(layer: DomainBatchNorm) -> Iterator[str]:
    """Yields the names of the variables that a layer has by domain."""
    if not layer.share_params:
        yield from ("scale", "bias")
    if not layer.share_stats:
        yield from ("mean", "var", "count", "measured")


def _change_norms(
    norms: list[Any],
    change_layer: Callable[[Any], Iterator[str]],
    change_array: Callable[[jax.Array], jax.Array],
    *,
    is_added: bool,
) -> None:
    """Changes norms, and those of their variables that the change of a layer names.

    Every layer, and every variable that layers share, is changed once.
    """
    done: list[Any] = []
    for layer in norms:
        if any(layer is other for other in done):
            continue
        done.append(layer)
        for name in change_layer(layer):
            variable = getattr(layer, name, None)
            if variable is None or any(variable is other for other in done):
                continue
            done.append(variable)
            value = variable.get_value()
            axis = jnp.ndim(jax.tree.leaves(value)[0]) - (1 if is_added else 2)
            variable.set_value(jax.tree.map(change_array, value))
            if is_added:
                nnx.spmd.add_axis(variable, axis, {nnx.PARTITION_NAME: None})
            else:
                names = variable.get_metadata().get("out_sharding") or (None,) * (axis + 1)
                nnx.spmd.remove_axis(variable, axis, {nnx.PARTITION_NAME: names[axis]})


def _choose_domain(layer: DomainBatchNorm, domain: Any) -> Any:
    """Returns the domain of a call, by its argument or else the attribute of the layer."""
    if isinstance(domain, bool | np.bool_):
        raise TypeError(
            f"domain is {domain}, a boolean, in the call of a DomainBatchNorm of "
            f"{layer.num_features} features; expected domains. If it is use_running_average, pass "
            "it by keyword: norm(x, use_running_average=True)."
        )
    domain = layer.domain if domain is None else domain
    if domain is None:
        raise ValueError(
            "domain is None in the attribute and in the call of a DomainBatchNorm of "
            f"{layer.num_features} features. Pass it in the model's call, norm(x, domain), or, "
            "where the model does not hand it on, call a view: nnx.view(model, domain=domain)(x)."
        )
    return domain
