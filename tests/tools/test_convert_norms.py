"""Norms that no step has trained, and norms without running statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden.convert_cases import abstract, assert_same
from support import assert_close, define_affine, define_batch_norm, standard_normal

import bn_jax as bn
from bn_jax import training

LIKE = {"params": {"bn": bn.init_params(3)}, "batch_stats": {"bn": bn.init_batch_stats(3)}}
UNTRAINED = "no training step has updated the running statistics of bn in arrays"
ZERO = r"batch_stats of bn are still the initial ones \(mean 0, var 0\): .* 1 / sqrt\(epsilon\)"


class Net(nn.Module):
    """One norm."""

    @nn.compact
    def __call__(self, x, train=False):
        return bn.linen.BatchNorm(use_running_average=not train, name="bn")(x)


# --- never trained ------------------------------------------------------------------------------


def of_equinox(mode, mean=0.0, var=0.0, counter=None):
    """The arrays of a norm of Equinox, as `eqx.nn.make_with_state` makes them."""
    arrays = {"bn.weight": np.ones(3, np.float32), "bn.bias": np.zeros(3, np.float32)}
    for index, value in enumerate((mean, var)):
        arrays[f"bn.{mode}_state_index.{index}"] = np.full(3, value, np.float32)
    if mode == "batch":
        arrays["bn.batch_counter"] = np.array(counter or 0, np.int32)
    else:
        arrays["bn.ema_first_time_index"] = np.array(counter is None)
    return arrays


@pytest.mark.parametrize("library, mode", [("equinox", "batch"), ("equinox-ema", "ema")])
def test_a_norm_of_equinox_that_was_not_trained_is_told(library, mode):
    arrays = of_equinox(mode)
    with pytest.warns(UserWarning, match=UNTRAINED) as caught:
        variables = bn.convert.from_library(arrays, library, like=LIKE)
    assert caught[0].filename == __file__
    assert not variables["batch_stats"]["bn"]["var"].any()
    assert_same(bn.convert.to_library(variables, library, like=arrays), arrays)
    trained = of_equinox(mode, 0.5, 2.0, counter=3)
    bn.convert.from_library(trained, library, like=LIKE)
    with pytest.warns(UserWarning, match=ZERO):
        training.warn_if_never_updated(variables["batch_stats"])


def haiku_norm(x, train):
    hk = pytest.importorskip("haiku")
    return hk.BatchNorm(True, True, 0.9, name="bn")(x, train)


@pytest.mark.parametrize("kind", ["zeros", "random"])
def test_a_norm_of_haiku_that_was_only_initialized_is_told(kind):
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform_with_state(haiku_norm))
    x = jnp.zeros((4, 3)) if kind == "zeros" else jnp.asarray(standard_normal(0, (4, 3)))
    params, state = jax.jit(model.init, static_argnums=2)(None, x, True)
    arrays = {"params": params, "state": state}
    with pytest.warns(UserWarning, match=UNTRAINED):
        variables = bn.convert.from_library(arrays, "haiku", like=LIKE)
    # Only the counter tells that these statistics are not those of a training step.
    assert variables["batch_stats"]["bn"]["var"].any() == (kind == "random")
    _, state = jax.jit(model.apply, static_argnums=3)(
        params, state, standard_normal(1, (4, 3)), True
    )
    bn.convert.from_library({"params": params, "state": state}, "haiku", like=LIKE)


def test_statistics_of_zero_are_told_by_evaluation_and_audit():
    x = jnp.asarray(standard_normal(0, (16, 3)))
    model = Net()
    variables = model.init(jax.random.key(0), x)
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    state = training.TrainState.create(
        apply_fn=model.apply, params=variables["params"], batch_stats=zeros, tx=optax.identity()
    )
    batch = training.Batch(x, jnp.zeros(16, jnp.int32), jnp.ones(16, bool))
    with pytest.warns(UserWarning, match=ZERO):
        training.evaluate(state, [batch])

    def forward(variables, x, train):
        return model.apply(variables, x, train, mutable=["batch_stats"])

    def found(zeros, x):
        return bn.audit(forward, {**variables, "batch_stats": zeros}, x).findings

    (finding,) = found(zeros, x)
    assert (finding.kind, finding.path) == ("never updated", "bn")
    assert "mean 0 and variance 0, as of a model of Equinox or Haiku" in finding.message
    assert "evaluation multiplies by 316" in finding.message
    # The statistics of an input of zeros are no initial ones.
    assert "never updated" not in {finding.kind for finding in found(zeros, 0 * x)}


def test_initial_statistics_of_both_kinds_are_two_warnings():
    fresh = jax.tree.map(np.asarray, bn.init_batch_stats(3))
    zero = jax.tree.map(np.zeros_like, fresh)
    with pytest.warns(UserWarning) as caught:
        training.warn_if_never_updated(
            {"a": fresh, "b": zero, "c": {**zero, "var": np.ones(3) * 2}}
        )
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert texts[0].startswith("batch_stats of a are still the initial ones (mean 0, var 1): no ")
    assert "evaluation does not normalize" in texts[0]
    assert texts[1].startswith("batch_stats of b are still the initial ones (mean 0, var 0): no ")
    some = {**zero, "var": np.array([0.0, 0.0, 1.0])}
    training.warn_if_never_updated({"bn": some})


# --- norms without running statistics -----------------------------------------------------------

UNTRACKED = bn.convert.attributes_from_library("pytorch", track_running_stats=False)


class Untracked(nn.Module):
    """A norm without running statistics, and one with them."""

    @nn.compact
    def __call__(self, x):
        x = bn.linen.BatchNorm(**UNTRACKED, name="norm")(x)
        return bn.linen.BatchNorm(use_running_average=True, name="tracked")(x)


def test_a_model_without_running_statistics_runs():
    x = standard_normal(0, (8, 5))
    model = Untracked()
    like = abstract(model, x)
    assert set(like["batch_stats"]) == {"tracked"}
    arrays = {
        f"{layer}.{key}": standard_normal(index, (5,)) + 2
        for layer in ("norm", "tracked")
        for index, key in enumerate(("weight", "bias"))
    } | {"tracked.running_mean": np.ones(5, np.float32), "tracked.running_var": np.full(5, 3.0)}
    variables = bn.convert.from_library(arrays, "pytorch", like=like)
    params = variables["params"]["norm"]
    y, _ = define_batch_norm(params, bn.init_batch_stats(5), x)
    affine = variables["params"]["tracked"]
    expected = define_affine(y, np.ones(5), np.full(5, 3.0), affine["scale"], affine["bias"])
    assert_close(jax.jit(model.apply)(variables, x), expected)
    found, updates = model.apply(variables, x, mutable=["batch_stats"])
    assert_close(found, expected)
    assert set(updates["batch_stats"]) == {"tracked"}
    assert_same(bn.convert.to_library(variables, "pytorch", like=arrays), arrays)
    gradients = jax.grad(lambda variables: model.apply(variables, x).sum())(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_an_error_says_how_norms_have_no_running_statistics():
    layer = nn.Sequential([bn.linen.BatchNorm(use_running_average=True)])
    like = abstract(layer, jnp.ones((4, 3)))
    arrays = {"0.weight": np.ones(3), "0.bias": np.zeros(3)}
    names = {"layers_0": "0"}
    advice = r"made with attributes_from_library\('pytorch', track_running_stats=False\)"
    with pytest.raises(ValueError, match=advice):
        bn.convert.from_library(arrays, "pytorch", like=like, names=names)
    layer = nn.Sequential([bn.linen.BatchNorm(**UNTRACKED)])
    like = abstract(layer, jnp.ones((4, 3)))
    variables = bn.convert.from_library(arrays, "pytorch", like=like, names=names)
    assert set(variables) == {"params"}
    assert layer.apply(variables, standard_normal(0, (4, 3))).shape == (4, 3)
    with pytest.raises(ValueError) as raised:
        bn.convert.from_library({}, "pytorch", like=like, names=names)
    assert "track_running_stats" not in str(raised.value)


def test_norms_that_need_statistics_ask_for_them():
    x = standard_normal(0, (4, 3))
    params = {"params": bn.init_params(3)}
    layer = bn.linen.BatchNorm(**UNTRACKED)
    assert layer.apply(params, x).shape == x.shape
    message = r"batch_stats has nothing for the top-level BatchNorm"
    with pytest.raises(ValueError, match=message):
        bn.linen.freeze(layer.apply)(params, x)
    with pytest.raises(ValueError, match="batch_stats has nothing for the top-level BatchRenorm"):
        bn.linen.BatchRenorm(use_running_average=False, update_running_average=False).apply(
            params, x
        )
    # A call says less than an attribute: the same layer may evaluate later.
    switched = bn.linen.BatchNorm()
    options = {"use_running_average": False, "update_running_average": False}
    assert "batch_stats" in abstract(switched, x, **options)
    assert_close(switched.apply(params, x, **options), layer.apply(params, x))
    # What is stored stays, whatever a checkpoint of an older version holds.
    stored = {**params, "batch_stats": bn.init_batch_stats(3)}
    _, updates = layer.apply(stored, x, mutable=["batch_stats"])
    assert_same(updates["batch_stats"], stored["batch_stats"])


def test_a_module_of_nnx_without_running_statistics_takes_parameters():
    model = nnx.Sequential(bn.nnx.BatchNorm(3, **UNTRACKED, rngs=nnx.Rngs(0)))
    arrays = {"0.weight": np.full(3, 2.0, np.float32), "0.bias": np.ones(3, np.float32)}
    like = nnx.state(model, nnx.Param)
    nnx.update(model, bn.convert.from_library(arrays, "pytorch", like=like, names={"layers": ""}))
    x = standard_normal(0, (4, 3))
    params = {"scale": arrays["0.weight"], "bias": arrays["0.bias"]}
    expected, _ = define_batch_norm(params, bn.init_batch_stats(3), x)
    assert_close(model(x), expected)


# --- advice -------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["equinox", "equinox-ema"])
def test_the_mode_that_an_error_advises_is_taken(library):
    with pytest.raises(ValueError, match=r"If the model is only evaluated here, pass mode='batch'"):
        bn.convert.attributes_from_library(library, momentum=0.9)
    attributes = bn.convert.attributes_from_library(library, momentum=0.9, mode="batch")
    assert attributes["momentum"] == 0.9
    # As a norm of that library evaluates.
    arrays = of_equinox("ema" if library == "equinox-ema" else "batch", 0.5, 2.0, counter=10**9)
    variables = bn.convert.from_library(arrays, library, like=LIKE)
    x = standard_normal(0, (4, 3))
    layer = bn.linen.BatchNorm(**attributes, use_running_average=True)
    y = layer.apply({name: tree["bn"] for name, tree in variables.items()}, x)
    assert_close(y, (x - 0.5) / np.sqrt(2 + 1e-5))
