"""Arguments that are none: one clear error each, for every pure function and module."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from support import assert_close

import bn_jax as bn

X, PARAMS, STATS = jnp.ones((4, 6)), bn.init_params(6), bn.init_batch_stats(6)
WHITENING = bn.init_whitening_stats(6)
RUNNING: dict[str, Any] = {
    "batch_norm": lambda *given: bn.batch_norm(*given, use_running_average=False),
    "batch_renorm": lambda *given: bn.batch_renorm(*given, use_running_average=True),
    "normalize_by_batch": lambda *given: bn.normalize_by_batch(*given),
    "whitening_norm": lambda *given: bn.whitening_norm(*given, use_running_average=False),
}
STATELESS: dict[str, Any] = {
    "layer_norm": bn.layer_norm,
    "rms_norm": bn.rms_norm,
    "group_norm": lambda *given: bn.group_norm(*given, num_groups=2),
    "instance_norm": bn.instance_norm,
}


def told(function, *given, match):
    """The TypeError in a call and while tracing, where what is given can be traced."""
    with pytest.raises(TypeError, match=match):
        function(*given)
    with pytest.raises(TypeError, match=match):
        jax.eval_shape(function, *given)


@pytest.mark.parametrize("name", RUNNING)
def test_trees_and_arrays_in_the_wrong_place(name):
    call, stats = RUNNING[name], WHITENING if name == "whitening_norm" else STATS
    told(call, stats, PARAMS, X, match="params has .*, entries of another tree; .*The order is")
    told(call, PARAMS, PARAMS, X, match="batch_stats has .*, entries of another tree; .*init_")
    told(call, X, PARAMS, stats, match="x is of type dict; expected a floating-point array")
    told(call, X, stats, X, match="params is of type .*; expected a mapping of arrays, bn_jax.init")
    for wrong in (None, 1.0, X):
        told(call, wrong, stats, X, match="params is of type .*init_params")
        told(call, PARAMS, wrong, X, match="batch_stats is of type .*_stats.features")
    told(call, PARAMS, stats, None, match="x is of type NoneType; expected a floating-point array")


@pytest.mark.parametrize("name", STATELESS)
def test_trees_and_arrays_in_the_wrong_place_without_state(name):
    call = STATELESS[name]
    told(call, X, PARAMS, match="x is of type dict; .*params, x. for norms without state")
    told(call, PARAMS, None, match="x is of type NoneType")
    for wrong in (None, 1.0):
        told(call, wrong, X, match="params is of type")


@pytest.mark.parametrize("kind", ["BatchNorm", "BatchRenorm", "WhiteningNorm", "LayerNorm"])
def test_modules_need_an_array(kind):
    linen = getattr(bn.linen, kind)(
        **({} if kind == "LayerNorm" else {"use_running_average": True})
    )
    layer = getattr(bn.nnx, kind)(6, rngs=nnx.Rngs(0))
    for call in (lambda x: linen.init(jax.random.key(0), x), layer):
        with pytest.raises(TypeError, match="x is of type NoneType; expected a floating-point"):
            call(None)
        with pytest.raises(TypeError, match="x is of type dict; expected a floating-point"):
            call({"x": X})
    rows = np.arange(24.0, dtype=np.float32).reshape(4, 6)
    assert_close(layer(rows.tolist()), layer(jnp.asarray(rows)))


INITS = [bn.init_params, bn.init_batch_stats, bn.init_whitening_stats]


@pytest.mark.parametrize("init", INITS)
def test_sizes_are_integers(init):
    for size in (np.int64(4), np.uint8(4), np.array(4)):
        assert jax.tree.map(jnp.shape, init(size)) == jax.tree.map(jnp.shape, init(4))
    wrong: list[Any] = [2.5, "4", True, None, np.array([4, 5])]
    for size in wrong:
        with pytest.raises(TypeError, match=rf"features=.*{size}.* must be an integer"):
            init(size)
    with pytest.raises(ValueError, match=r"features=.*-1.* must not be negative"):
        init(-1)
    if init is not bn.init_whitening_stats:
        assert init((np.int64(2), 3))["mean" if init is bn.init_batch_stats else "scale"].shape == (
            2,
            3,
        )


@pytest.mark.parametrize("init", INITS)
def test_sizes_may_be_symbolic(init):
    batch, size = export.symbolic_shape("b, c")
    for features in (size, 2 * size, size - 1):
        x = jax.ShapeDtypeStruct((batch, features), jnp.float32)
        exported = export.export(jax.jit(lambda x: init(x.shape[-1])))(x)
        assert_close(exported.call(jnp.ones((2, 6))), init(6))


def test_no_features_give_an_empty_result():
    x = jnp.ones((3, 4, 0))
    for call in STATELESS.values():
        assert call(bn.init_params(0), x).shape == x.shape
    sized = bn.group_norm({}, x, num_groups=None, group_size=3)
    assert sized.shape == x.shape
    assert RUNNING["batch_norm"](bn.init_params(0), bn.init_batch_stats(0), x)[0].shape == x.shape
    y, stats = RUNNING["whitening_norm"](bn.init_params(0), bn.init_whitening_stats(0), x)
    assert y.shape == x.shape and stats["cov"].shape == bn.init_whitening_stats(0)["cov"].shape


def test_moments_that_only_broadcast_are_not_merged():
    row, column = bn.moments(jnp.ones((4, 6)), 0), bn.moments(jnp.ones((4, 6, 6)), (0, 1))
    assert bn.merge_moments(row, column).mean.shape == (6,)
    for other in (
        bn.moments(X),
        bn.moments(jnp.ones((4, 1)), 0),
        bn.moments(jnp.ones((2, 5, 6)), 0),
    ):
        with pytest.raises(
            ValueError, match=re.escape(str(other.mean.shape)) + ".*cannot be merged"
        ):
            bn.merge_moments(row, other)
        with pytest.raises(ValueError, match=r"do not fit batch_stats of the shapes .*'mean'"):
            bn.update_batch_stats(STATS, other)
    with pytest.raises(ValueError, match=r"do not fit batch_stats of the shapes .*'var': \(1,\)"):
        bn.update_batch_stats({**STATS, "var": jnp.ones(1)}, row)
    wrong: list[Any] = [None, 1.0, X]
    for tree in wrong:
        with pytest.raises(TypeError, match="batch_stats is of type"):
            bn.update_batch_stats(tree, row)
