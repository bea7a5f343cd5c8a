"""Conversion of weights from and to PyTorch, Keras, Haiku and Equinox, as mappings of arrays.

None of these libraries is imported. Their arrays have these forms:

================  ==================================================================================
``pytorch``       ``model.state_dict()``, or `load_safetensors` of a file of it
``keras``         ``{weight.path: weight.numpy() for weight in model.weights}``
``haiku``         ``{"params": params, "state": state}`` of `haiku.transform_with_state`
``equinox``       the model's leaves by their path, see below; norms in mode "batch"
``equinox-ema``   the same with norms in mode "ema"
================  ==================================================================================

Equinox keeps running statistics beside the model. Put in place of their indices, they have a path::

    is_index = lambda node: isinstance(node, eqx.nn.StateIndex)
    whole = jax.tree.map(lambda n: state.get(n) if is_index(n) else n, model, is_leaf=is_index)
    leaves = jax.tree.leaves_with_path(eqx.filter(whole, eqx.is_array))
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): a for path, a in leaves}

In the other direction, set the weights by `equinox.tree_at` and the running statistics as below.
The counter must be set too, or Equinox would divide by ``1 - momentum**counter`` a second time. It
must come from a plain int, because the counter in the state is weakly typed::

    state = state.set(norm.batch_state_index, (mean, var))
    state = state.set(norm.batch_counter, jnp.asarray(int(counter)))  # in mode "batch"

or, in mode "ema"::

    state = state.set(norm.ema_state_index, (mean, var))
    state = state.set(norm.ema_first_time_index, jnp.asarray(False))

Example:
    >>> import jax.numpy as jnp, numpy as np, bn_jax as bn
    >>> state_dict = {
    ...     "fc.weight": np.ones((3, 2)), "bn.weight": np.ones(3), "bn.bias": np.zeros(3),
    ...     "bn.running_mean": np.zeros(3), "bn.running_var": np.ones(3),
    ...     "bn.num_batches_tracked": np.array(7),
    ... }
    >>> like = {
    ...     "params": {"Dense_0": {"kernel": jnp.ones((2, 3))}, "norm": bn.init_params(3)},
    ...     "batch_stats": {"norm": bn.init_batch_stats(3)},
    ... }
    >>> names = {"Dense_0": "fc", "norm": "bn"}
    >>> variables = bn.convert.from_library(state_dict, "pytorch", like=like, names=names)
    >>> variables["params"]["Dense_0"]["kernel"].shape
    (2, 3)
    >>> back = bn.convert.to_library(variables, "pytorch", names=names, like=state_dict)
    >>> back["fc.weight"].shape, back["bn.num_batches_tracked"].item()
    ((3, 2), 7)
"""

from bn_jax.convert.attributes import attributes_from_library, attributes_to_library
from bn_jax.convert.files import load_safetensors, save_safetensors
from bn_jax.convert.models import from_library, to_library
from bn_jax.convert.torchvision import jax_resnet_names, resnet_names

__all__ = [
    "attributes_from_library",
    "attributes_to_library",
    "from_library",
    "jax_resnet_names",
    "load_safetensors",
    "resnet_names",
    "save_safetensors",
    "to_library",
]
