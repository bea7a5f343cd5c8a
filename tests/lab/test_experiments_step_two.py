"""Scale and bias: what they can do, what they learn, and where they can be absorbed."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from bn_jax.lab.experiments import (
    absorption_with_padding,
    expressive_power,
    scale_and_bias_alone,
    step_two,
    undoing_the_norm,
)
from bn_jax.lab.experiments.selection import Outcome
from bn_jax.lab.experiments.statistics import relative_error
from bn_jax.lab.experiments.sweeps import Part
from bn_jax.lab.experiments.verdicts import Setting


def largest(errors):
    return np.max(np.stack(jax.tree.leaves(errors)))


def test_what_scale_and_bias_can_do():
    errors = step_two.identities(Setting(seeds=2))
    other = errors.pop("18n")
    assert min(other[""]) > 0.01
    assert sorted(errors) == [f"18{letter}" for letter in "abcdefg"]
    assert all(leaf.shape == (2,) for leaf in jax.tree.leaves(errors))
    assert largest(errors) <= step_two.TOLERANCE


def test_the_sides_of_the_identities_are_not_the_same_by_construction():
    drawn = step_two.draw_values(0)
    with jax.enable_x64(True):
        y = step_two.normalize(drawn.params, drawn.inputs)
        centred = drawn.inputs - drawn.inputs.mean(0)
        expected = centred / np.sqrt((centred**2).mean(0))
        expected = expected * drawn.params["scale"] + drawn.params["bias"]
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
        flipped, kernel = step_two.flip_signs(drawn.params, drawn.above)
    assert (np.asarray(flipped["scale"]) > 0).all()
    assert (np.asarray(kernel) != drawn.above).any()


def test_saturated_values_and_dead_units():
    inputs = jnp.array([[[3.0, -1.0], [-3.0, -2.0]], [[0.0, 1.0], [0.5, 0.0]]])
    assert step_two.useless_share("tanh", inputs) == pytest.approx(3 / 8)
    assert step_two.useless_share("ReLU", inputs) == pytest.approx(1 / 4)


def test_two_values_reach_the_bound_on_saturated_ones():
    threshold = np.arctanh(step_two.SATURATED)
    share = step_two.MOST_SATURATED
    deviation = np.sqrt(share * threshold**2)
    assert deviation == pytest.approx(1)
    assert 0.29 < share < 0.3


def test_shares_are_compared_with_their_own_arm():
    tanh = {
        "no norm": 30.0,
        "norm before activation": 5.0,
        f"norm before activation, {step_two.TRAINED}": 8.0,
        "norm after activation": 20.0,
        f"norm after activation, {step_two.TRAINED}": 26.0,
    }
    shares = {"tanh": tanh, "ReLU": {"norm before activation": 1.0}}
    assert step_two._compare_shares(shares) == {
        "18h": {"scale and bias fixed": -25, step_two.TRAINED: -22},
        "18j": {"scale and bias fixed": 15, step_two.TRAINED: 18},
        "18k": 3,
        "18l": 5,
        "18m": 1,
    }


def test_no_layer_of_normalized_units_explains_more_than_the_floor():
    generator = np.random.default_rng(0)
    x = generator.uniform(-2, 2, 200)
    units = x[:, None] * generator.normal(size=30)
    units = np.maximum((units - units.mean(0)) / units.std(0), 0)
    basis = np.concatenate([units, np.ones((200, 1))], 1)
    y = np.sin(2 * x)
    residual = y - basis @ np.linalg.pinv(basis) @ y
    expected = residual.var() / y.var()
    assert expressive_power.least_unexplained(x) == pytest.approx(expected, rel=1e-9)
    assert expected > 0.5


def test_as_many_weights_are_drawn_as_norms_have():
    params = {
        "dense0": {"kernel": jnp.zeros((5, 4))},
        "norm0": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "classifier": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)},
    }
    found = scale_and_bias_alone.masks(params, jax.random.key(0))
    counts = jax.tree.map(lambda leaf: leaf.sum(range(1, leaf.ndim)).tolist(), found)
    assert counts["norm0"] == {"scale": [4, 0, 4, 0], "bias": [4, 0, 4, 0]}
    assert counts["dense0"]["kernel"] == [0, 8, 0, 8]
    assert counts["classifier"] == {"kernel": [0, 0, 12, 12], "bias": [0, 0, 3, 3]}
    other = scale_and_bias_alone.masks(params, jax.random.key(1))
    assert (other["dense0"]["kernel"] != found["dense0"]["kernel"]).any()


def test_the_first_seeds_choose_the_rate_of_each_arm(monkeypatch):
    net: Any = SimpleNamespace(arms=2, rates=(0.1, 0.2, 0.4), side_by_side=False)
    best = np.array([2, 1])

    def train_each(net, trials, grid):
        arm, rate, seed = np.asarray(grid).T
        return Outcome(1.0 * (rate == best[arm]), {"place": 100 * arm + 10 * rate + seed})

    monkeypatch.setattr(scale_and_bias_alone, "_train_each", train_each)
    trials: Any = SimpleNamespace(seed=np.arange(4))
    swept: Any = scale_and_bias_alone.train_grid(net, trials, range(3), 2)
    assert swept.measured["place"][1, 0].tolist() == [10, 110]
    assert swept.measured["place"][2, 1].tolist() == [21, 121]
    assert swept.validation.mean(1).argmax(0).tolist() == [2, 1]
    chosen: Any = scale_and_bias_alone.at_rates(net, trials, best)
    assert chosen.measured["place"].tolist() == [[20 + s, 110 + s] for s in range(4)]
    assert chosen.rate.value.tolist() == [[0.4, 0.2]] * 4
    assert chosen.rate.at_edge.tolist() == [[True, False]] * 4


def test_the_distance_from_the_identity_is_what_the_norm_changes():
    generator = np.random.default_rng(1)
    x = 3 + generator.normal(size=(500, 4)) * [1, 2, 3, 4]
    scale, bias = generator.normal(size=(2, 4))
    y = (x - x.mean(0)) / x.std(0) * scale + bias
    expected = np.sqrt(np.mean((y - x) ** 2 / x.var(0)))
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    found = undoing_the_norm.measure(params, jnp.asarray(x))
    assert found.distance == pytest.approx(expected, rel=1e-5)
    assert found.scales == pytest.approx(np.corrcoef(scale, x.std(0))[0, 1], rel=1e-4)
    assert found.biases == pytest.approx(np.corrcoef(bias, x.mean(0))[0, 1], rel=1e-3)


def test_a_norm_that_is_trained_to_be_the_identity_becomes_it():
    assert (undoing_the_norm.train_to_undo(Setting(seeds=2)) < 1e-3).all()


def test_convolutions_pad_with_zeros():
    generator = np.random.default_rng(2)
    x, kernel = generator.normal(size=(1, 5, 6, 2)), generator.normal(size=(3, 3, 2, 1))
    modes: dict[absorption_with_padding.Padding, Any] = {"SAME": "same", "VALID": "valid"}
    for padding, mode in modes.items():
        expected = sum(
            signal.correlate2d(x[0, :, :, i], kernel[:, :, i, 0], mode=mode) for i in range(2)
        )
        found = absorption_with_padding.convolve(jnp.asarray(x), jnp.asarray(kernel), padding)
        np.testing.assert_allclose(found[0, :, :, 0], expected, rtol=1e-4, atol=1e-5)


def test_what_can_be_absorbed_into_a_convolution():
    errors = absorption_with_padding.identities(Setting(seeds=2))
    assert sorted(errors) == [f"26{letter}" for letter in "abcdef"]
    assert all(leaf.shape == (2,) for leaf in jax.tree.leaves(errors))
    assert largest(errors) <= absorption_with_padding.TOLERANCE


def test_an_absorbed_norm_is_wrong_at_the_border_alone():
    model = absorption_with_padding.Net()
    generator = np.random.default_rng(3)
    x = jnp.asarray(generator.normal(size=(20, 8, 8, 1)), jnp.float32)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(generator.uniform(0.2, 1, leaf.shape), jnp.float32),
        jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False)),
    )
    logits: Any = model.apply(variables, x, train=False)
    found = absorption_with_padding.evaluate(variables, Part(x, logits.argmax(-1)))
    assert found.accuracy == 100
    np.testing.assert_allclose(found.error[1:-1, 1:-1], 0, atol=1e-5)
    assert (np.delete(found.error.ravel(), np.arange(64).reshape(8, 8)[1:-1, 1:-1]) > 1e-3).all()


def test_the_border_of_an_error():
    error = np.zeros((2, 4, 4))
    error[:, 1:-1, 1:-1] = 9
    error[1, 0] = 2
    expected = [0, np.sqrt(4 * 4 / 12)]
    np.testing.assert_allclose(absorption_with_padding.at_border(error), expected)


def test_relative_errors_tell_a_wrong_kernel():
    drawn = absorption_with_padding.draw_values(0)
    a, b = jnp.ones(4), jnp.zeros(4)
    absorbed = absorption_with_padding.absorb(a, b, drawn.kernel)
    assert relative_error(absorbed.kernel, drawn.kernel) == 0 and not absorbed.bias.any()
    absorbed = absorption_with_padding.absorb(a, b.at[0].set(2.0), drawn.kernel)
    expected = 2 * drawn.kernel[:, :, 0].sum((0, 1))
    np.testing.assert_allclose(absorbed.bias, expected, rtol=1e-5)
