"""Units and features: steps and steadiness, shapes of distributions, scales, parts of a norm."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bn_jax.lab.experiments import not_gaussian, sigmoid_training, unlike_scales, which_part
from bn_jax.lab.experiments.nets import MLP
from bn_jax.lab.experiments.selection import Chosen, RateSweep
from bn_jax.lab.experiments.verdicts import ChosenRate, Setting
from bn_jax.linen import BatchNorm


def test_steps_until_the_goal_is_first_reached():
    accuracies = [[0.1, 0.96, 0.94, 0.99], [0.1, 0.2, 0.3, 0.949], [0.95, 0.1, 0.1, 0.1]]
    every = sigmoid_training.EVERY
    np.testing.assert_array_equal(sigmoid_training.steps_to_goal(accuracies), [every, np.inf, 1])


def test_an_arm_that_does_not_arrive_counts_with_all_its_steps():
    def reaching(*points):
        accuracies = np.tile(np.linspace(0, 0.5, 11), (len(points), 2, 1))
        for rate, seeds in enumerate(points):
            for seed, point in enumerate(seeds):
                accuracies[rate, seed, point:] = 0.99
        return accuracies

    every, never = sigmoid_training.EVERY, 99
    accuracies = {
        "batch norm": reaching((5, 10), (2, 3)),
        "no norm": reaching((8, never), (never, never)),
    }
    horizon = 10 * every
    comparison = sigmoid_training.compare(accuracies, horizon)
    assert comparison.best == {"batch norm": 1, "no norm": 0}
    np.testing.assert_allclose(comparison.at_best, [8 / 2, 10 / 3])
    np.testing.assert_allclose(comparison.at_same, [8 / 5, 10 / 10])
    accuracies["no norm"] = reaching((never, never), (never, never))
    accuracies["no norm"][1] += 0.1
    assert sigmoid_training.compare(accuracies, horizon).best["no norm"] == 1
    accuracies["batch norm"] = reaching((never, 10), (never, 3))
    assert np.isnan(sigmoid_training.compare(accuracies, horizon).at_best).any()


def test_wandering_is_in_final_widths():
    quantiles = np.array([[[0, 1.0, 2], [0, 3, 4], [1, 2, 5]]])
    np.testing.assert_allclose(sigmoid_training.wandering(quantiles), [2 / 4])


def test_steadiness_is_a_ratio_over_units():
    def arm(*medians):
        # [seeds, points, quantiles, units]; each final width is 2.
        median = np.array(medians, float)[None]
        units = np.stack([median - 1, median, median + 1], 2)
        return Chosen(ChosenRate(0.1, False), {"units": units})

    chosen = {"no norm": arm([0, 0], [4, 2])}
    found = sigmoid_training.steadiness(arm([0, 0], [1, 2]), chosen)
    np.testing.assert_allclose(found, [np.sqrt(1 / 4 * 2 / 2)])


@pytest.mark.parametrize("name", sigmoid_training.ACTIVATIONS)
def test_activations_and_initializers_are_data(name):
    place = list(sigmoid_training.ACTIVATIONS).index(name)
    activation = sigmoid_training.ACTIVATIONS[name]
    x = jax.random.normal(jax.random.key(1), (5, 64))
    for initial, deviation in ((0, np.sqrt(2 / 128)), (1, 0.01)):
        model = sigmoid_training.make_model((64,), None, jnp.array(place), jnp.array(initial))
        variables = model.init(jax.random.key(0), x, train=False)
        assert np.std(variables["params"]["dense0"]["kernel"]) == pytest.approx(deviation, rel=0.1)
        expected: Any = MLP((64,), activation=activation).apply(variables, x, train=False)
        found: Any = model.apply(variables, x, train=False)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_kurtosis_and_correlations():
    x = np.random.default_rng(0).exponential(size=(300, 4)) ** [0.5, 1, 1, 2]
    x[:, 2] += 2 * x[:, 1]
    np.testing.assert_allclose(not_gaussian.excess_kurtosis(x), stats.kurtosis(x), rtol=1e-9)
    expected = np.abs(np.corrcoef(x.T))[np.triu_indices(4, 1)]
    np.testing.assert_allclose(not_gaussian.correlations(jnp.asarray(x)), expected, rtol=1e-4)


def test_the_bound_on_correlations_is_an_ellipse_whose_axes_differ_by_a_tenth():
    bound = not_gaussian.CORRELATION
    eigenvalues = np.linalg.eigvalsh([[1, bound], [bound, 1]])
    assert np.sqrt(eigenvalues[1] / eigenvalues[0]) == pytest.approx(1.1)


def test_a_norm_keeps_kurtosis_and_correlations():
    changes = not_gaussian.identities(Setting(seeds=2))
    assert sorted(changes) == ["22a", "22b", "22c"]
    assert np.max(list(changes.values())) <= not_gaussian.TOLERANCE


def test_whitened_values_are_uncorrelated():
    generator = np.random.default_rng(4)
    x = generator.normal(size=(400, 8)) @ generator.normal(size=(8, 8))
    white = np.asarray(not_gaussian.whiten(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(np.cov(white.T, ddof=0), np.eye(8), atol=1e-2)


def test_pixels_are_chosen_by_how_often_they_are_not_empty():
    x = np.full((2, 4, 5), -1.0)
    x[:, :, 1] = [-1, 2, 2, 20]
    x[:, :2, 3] = 7
    x[0, :2, 4] = 1
    assert not_gaussian.used_pixels(x, 1).tolist() == [1]
    assert not_gaussian.used_pixels(x, 2).tolist() == [1, 3]
    assert not_gaussian.used_pixels(x, 3).tolist() == [1, 3, 4]


def test_the_condition_number_is_of_the_gram_matrix_with_a_constant():
    x = np.random.default_rng(5).normal(size=(50, 3)) + 2
    extended = np.concatenate([x, np.ones((50, 1))], 1)
    expected = np.linalg.cond(extended) ** 2
    assert unlike_scales.condition_number(x) == pytest.approx(expected, rel=1e-8)


def test_at_zero_weights_the_fisher_matrix_is_the_gram_matrix_times_a_constant_one():
    x = np.random.default_rng(6).normal(size=(20, 2))
    extended = np.concatenate([x, np.ones((20, 1))], 1)
    classes = 3

    def log_likelihood(weights, row, label):
        return jax.nn.log_softmax(row @ weights)[label]

    fisher = np.zeros((9, 9))
    for row in extended:
        for label in range(classes):
            gradient = jax.grad(log_likelihood)(jnp.zeros((3, classes)), row, label)
            gradient = np.asarray(gradient, np.float64).ravel()
            fisher += np.outer(gradient, gradient) / classes / len(x)
    eigenvalues = np.linalg.eigvalsh(fisher)[3:]
    expected = unlike_scales.condition_number(x)
    assert eigenvalues[-1] / eigenvalues[0] == pytest.approx(expected, rel=1e-3)


def test_scales_have_their_range_and_normalizing_removes_them():
    exponents = unlike_scales.draw_exponents(range(3))
    assert (exponents[0] != exponents[1]).any()
    scales = np.stack([unlike_scales.rescale(np.ones((1, 32)), one, 2)[0] for one in exponents])
    np.testing.assert_allclose(scales.max(1) / scales.min(1), 100, rtol=1e-5)
    numbers = unlike_scales.conditioning(Setting(seeds=2), (0, 3))
    like, unlike = numbers["inputs, norm"].values()
    np.testing.assert_allclose(unlike, like, rtol=1e-6)
    raw = numbers["inputs, no norm"]
    assert (raw[3] > 100 * raw[0]).all()
    assert (unlike_scales.invariance(Setting(seeds=2)) <= unlike_scales.TOLERANCE).all()


@pytest.mark.parametrize("name", which_part.PARTS)
def test_a_part_of_a_norm(name):
    part = which_part.PARTS[name]
    x = np.random.default_rng(7).normal(0.1, 0.01, (40, 2))
    expected = x - (x.mean(0) if part.mean else 0)
    expected = expected / (np.sqrt(x.var(0) + which_part.EPSILON) if part.variance else 1)
    found = which_part.normalize(jnp.asarray(x), part, x.mean(0), x.var(0))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_gradients_pass_the_statistics_unless_they_are_detached():
    x = jnp.asarray(np.random.default_rng(8).normal(size=(10, 1)), jnp.float32)

    def output(x, name):
        return which_part.normalize(x, which_part.PARTS[name], x.mean(0), x.var(0))

    def jacobian(name):
        return np.asarray(jax.jacobian(lambda x: output(x, name))(x))[:, 0, :, 0]

    y, deviation = np.asarray(output(x, "batch norm")), np.std(x)
    expected = (np.eye(10) - 1 / 10 - y @ y.T / 10) / deviation
    np.testing.assert_allclose(jacobian("batch norm"), expected, atol=1e-4)
    np.testing.assert_allclose(jacobian("detached"), np.eye(10) / deviation, atol=1e-4)
    np.testing.assert_allclose(jacobian("mean only"), np.eye(10) - 1 / 10, atol=1e-6)


def test_the_whole_norm_is_batch_norm():
    x = jax.random.normal(jax.random.key(2), (30, 4)) * 3 + 1
    ours = which_part.PartialNorm(which_part.PARTS["batch norm"])
    whole = BatchNorm(momentum=which_part.MOMENTUM, epsilon=which_part.EPSILON)
    variables = whole.init(jax.random.key(0), x, use_running_average=False)
    for running in (False, True):
        calls = [
            layer.apply(variables, x, use_running_average=running, mutable=["batch_stats"])
            for layer in (ours, whole)
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *calls)


def test_a_bias_below_a_detached_mean_grows_for_ever():
    errors = which_part.bias_below(Setting(seeds=2))
    assert np.max(np.stack(jax.tree.leaves(errors))) <= which_part.TOLERANCE


def test_only_the_scale_can_be_left_untrained():
    updates = {
        "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
        "dense": {"kernel": jnp.ones(3)},
    }
    for trained in (False, True):
        optimizer = which_part._scale_if(trained)
        found, _ = optimizer.update(updates, optimizer.init(updates))
        sums = jax.tree.map(lambda leaf: float(leaf.sum()), found)
        assert sums == {"norm": {"scale": 2.0 * trained, "bias": 2.0}, "dense": {"kernel": 3.0}}


def test_the_largest_stable_rate_and_the_fewest_steps():
    validation = np.array([[0.9, 0.1], [0.2, 0.2], [0.5, 0.3]])
    points = np.zeros((3, 2, 6))
    points[0, :, 3:], points[1, 0, 1:], points[2, 0, 0] = 0.95, 0.95, 0.95
    measured = which_part.Measured(test=None, validation=points)
    swept = RateSweep(np.array([0.1, 1.0, 10.0]), validation, measured)
    np.testing.assert_array_equal(which_part.largest_stable(swept), [10, np.nan])
    every = which_part.EVERY
    steps = which_part.steps_to_goal(points)
    np.testing.assert_array_equal(steps, every * np.array([[3, 3], [1, 5], [1, 5]]))
    fewest, rate = which_part.fewest_steps(swept)
    np.testing.assert_array_equal(fewest, [every, 5 * every])
    assert rate.value == 1.0 and not rate.at_edge
