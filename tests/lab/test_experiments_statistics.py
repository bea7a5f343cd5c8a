"""The formulas of the experiments about statistics, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support import assert_close, exact

import bn_jax as bn
from bn_jax.lab.experiments import (
    batch_leakage,
    batch_noise,
    ghost_batches,
    precise_statistics,
    sweeps,
    unbiased_variance,
)
from bn_jax.lab.experiments.labelled import Split
from bn_jax.lab.experiments.selection import RateSweep
from bn_jax.lab.experiments.sweeps import Part
from bn_jax.lab.experiments.verdicts import Setting


def test_running_variances_of_many_batches():
    ratios = unbiased_variance.running_variances(Setting(3, quick=True))
    sizes = np.asarray(unbiased_variance.SIZES[::2])

    def standard_errors_off(arm, expected):
        values = ratios[arm].reshape(len(sizes), -1)
        return abs(values.mean(-1) - expected) / stats.sem(values, -1)

    for arm, expected in (("unbiased", np.ones(3)), ("biased", (sizes - 1) / sizes)):
        assert ratios[arm].shape == (3, 3, unbiased_variance.FEATURES)
        assert standard_errors_off(arm, expected).max() <= 3
        # So precise that the other arm's expectation is far off.
        other = (sizes - 1) / sizes if arm == "unbiased" else np.ones(3)
        assert standard_errors_off(arm, other).min() > 3


def test_the_factor_is_that_of_batches_of_a_size():
    norms = {"norm0": {"mean": np.ones(2), "var": np.array([1.0, 3.0])}}
    found = unbiased_variance.with_factor({"params": {}, "batch_stats": norms}, 4)
    np.testing.assert_array_equal(found["batch_stats"]["norm0"]["mean"], 1)
    np.testing.assert_allclose(found["batch_stats"]["norm0"]["var"], [4 / 3, 4])
    assert norms["norm0"]["var"][0] == 1 and found["params"] == {}


def test_expected_variances():
    population = np.random.default_rng(0).gamma(2.0, size=(500, 3)) + 5
    of_mean, of_deviation = batch_noise.expected_variances(jnp.asarray(population), 8)
    var, kurtosis = population.var(0), stats.kurtosis(population)
    assert_close(exact(of_mean), var / 8, tolerance=1e-5)
    assert_close(exact(of_deviation), (kurtosis + 2) * var / 32, tolerance=1e-5)


def test_slope_of_a_power_law():
    sizes = np.array([4, 8, 16])
    gaps = np.stack([3 / sizes, 2 / sizes**1.5], -1)
    assert batch_noise.slope(sizes, gaps) == pytest.approx([-1, -1.5])
    gaps[1, 0] = -0.1
    assert np.isnan(batch_noise.slope(sizes, gaps)).tolist() == [True, False]


def test_one_rate_is_the_best_for_all_sizes_together():
    def of_size(*accuracies):
        validation = np.array(accuracies)[:, None] + [0.0, 0.0]
        losses = batch_noise.Losses(validation, 10 * validation)
        return RateSweep((0.1, 1.0, 3.0), validation, losses)

    # The best of either size alone is not the best of both.
    swept = {8: of_size(0.9, 0.8, 0.1), batch_noise.BATCH_SIZE: of_size(0.1, 0.8, 0.85)}
    found = batch_noise.choose_together(swept, Split(256, 359))
    assert found.rate == (1.0, False)
    for losses in found.losses.values():
        np.testing.assert_allclose(losses, np.array([[0.8, 0.8], [8.0, 8.0]]))


def test_losses_are_compared_with_those_of_whole_batches():
    losses = {
        16: batch_noise.Losses(np.array([0.1, 0.0]), np.array([0.5, 0.3])),
        batch_noise.BATCH_SIZE: batch_noise.Losses(np.array([0.2, 0.1]), np.array([1.0, 0.6])),
    }
    found = batch_noise.compare(losses)
    np.testing.assert_allclose(found["12d"]["M = 16"], [0.5, 0.6])
    np.testing.assert_allclose(found["12e"]["M = 16"], [0.5, 0.5])
    assert list(found["12d"]) == list(found["12e"]) == ["M = 16"]


def test_precise_statistics():
    model = precise_statistics.MODELS[0.9]
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (4, 16, 64)), jnp.float32)
    variables = model.init(jax.random.key(0), x[0], train=False)
    found = jax.jit(precise_statistics.measure_precisely, static_argnums=0)(model, variables, x)
    inputs = exact(x) @ exact(variables["params"]["dense0"]["kernel"])
    means, variances = inputs.mean(1), inputs.var(1)
    mean = means.mean(0)
    var = (means**2 + variances).mean(0) - mean**2
    assert_close(found["norm0"], {"mean": mean, "var": var}, tolerance=1e-4)

    def forward(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    assert_close(found, bn.recalibrate(forward, variables, list(x)).batch_stats, tolerance=1e-5)


def test_averages_are_compared_at_both_ends_of_a_training():
    precise = np.tile(np.linspace(0.9, 0, 20)[:, None], 2)
    wrong = {precise_statistics.PRECISE: precise}
    for number, average in enumerate(precise_statistics.AVERAGES, 1):
        wrong[str(average)] = precise.copy()
        wrong[str(average)][:2] += [0.01 * number, 0.02 * number]
        wrong[str(average)][-1] += 0.1
    found = precise_statistics.compare(wrong)
    for number, average in enumerate(precise_statistics.AVERAGES, 1):
        np.testing.assert_allclose(found[average].early, [number, 2 * number])
        np.testing.assert_allclose(found[average].late, [5, 5])


def test_groups_are_pairs_of_digits_and_blanks_of_one_class(monkeypatch):
    monkeypatch.setattr(batch_leakage, "BLANKS", 20)
    labels = np.random.default_rng(0).integers(0, 10, (2, 500))
    digits = Part(np.full((2, 500, 64), 9, np.float32), labels)
    x, y = batch_leakage.with_blanks(digits, 0, np.array([3, 4]))
    assert x.shape == (2, 700, 64) and y.shape == (2, 700) and x.dtype == np.float32
    assert (x[:, :500] == 9).all() and (y[:, :500] == labels).all()
    assert (np.bincount(y[0, 500:]) == 20).all()
    assert abs(x[:, 500:].mean()) < 0.02 and abs(x[:, 500:].std() - 1) < 0.02
    assert (x[0, 500:] != x[1, 500:]).all()
    rows = batch_leakage.draw_groups(y[0], 4, np.random.default_rng(1))
    for batch in rows:
        assert len(np.unique(batch)) == len(batch) == 10 * batch_leakage.GROUP
        groups = batch.reshape(-1, batch_leakage.GROUP)
        assert sorted(y[0, groups[:, 0]]) == list(range(10))
        for group in groups:
            assert len(np.unique(y[0, group])) == 1
            assert (group >= 500).sum() == batch_leakage.PAIRS
    shuffled = batch_leakage.arrange(batch_leakage.SHUFFLED, rows, np.random.default_rng(2))
    assert (np.sort(shuffled) == np.sort(rows)).all()
    for group in y[0, shuffled].reshape(-1, batch_leakage.GROUP):
        assert len(np.unique(group)) > 1
    for arm in (batch_leakage.SORTED, batch_leakage.SYNCHRONIZED):
        assert (batch_leakage.arrange(arm, rows, np.random.default_rng(2)) == rows).all()


def test_each_mode_has_its_best_rate():
    by_rate = {
        "validation, training mode": np.array([[20.0], [80.0], [70.0]]),
        "validation, evaluation mode": np.array([[50.0], [20.0], [10.0]]),
        "test, evaluation mode": np.array([[51.0], [21.0], [11.0]]),
    }
    swept = RateSweep((0.1, 1.0, 3.0), by_rate["validation, training mode"], by_rate)
    for mode, rate, accuracy in (("training mode", 1.0, 21), ("evaluation mode", 0.1, 51)):
        chosen = batch_leakage.choose_in(mode, swept)
        assert chosen.rate.value == rate
        np.testing.assert_array_equal(chosen.measured["test, evaluation mode"], [accuracy])


def test_ghosts_are_chosen_on_the_validation_part():
    def measured(validation, test):
        return ghost_batches.Measured(np.full(2, validation), np.array(test), np.zeros(2))

    large, small = ghost_batches.LARGE, ghost_batches.SMALL
    arms = {
        ghost_batches.Arm(large, 4): measured(96.0, [99.0, 99.0]),
        ghost_batches.Arm(large, 32): measured(97.0, [95.0, 96.0]),
        ghost_batches.Arm(large, large): measured(98.0, [94.0, 94.0]),
        ghost_batches.Arm(small, small): measured(99.0, [97.0, 98.0]),
    }
    found = ghost_batches.compare(arms)
    assert list(found["13a"]) == ["ghosts of 32"]
    np.testing.assert_array_equal(found["13a"]["ghosts of 32"], [1, 2])
    np.testing.assert_array_equal(found["13b"], [3, 4])


def test_unseen_digits_are_all_that_nobody_trains_on_or_chooses_by():
    digits = sweeps.load_digits(np.array([3]))
    few = ghost_batches.draw_few(Setting(1, 3))
    assert few.split == (ghost_batches.FEW, 1797 - ghost_batches.FEW - 179)
    np.testing.assert_array_equal(few.validation.x, digits.validation.x)
    np.testing.assert_array_equal(few.train.x, digits.train.x[:, : ghost_batches.FEW])
    rest = digits.train.x[:, ghost_batches.FEW :]
    np.testing.assert_array_equal(few.test.x, np.concatenate([digits.test.x, rest], 1))


def test_a_moving_average_is_a_weighted_sum(monkeypatch):
    for momentum in precise_statistics.MOMENTA:
        found = precise_statistics.distance_from_weighted_sum(Setting(2), momentum)
        assert found.shape == (2,) and (found <= precise_statistics.TOLERANCE).all()

    def swapped(*arguments, momentum, **options):
        return bn.batch_norm(*arguments, momentum=1 - momentum, **options)

    monkeypatch.setattr(precise_statistics, "batch_norm", swapped)
    assert (precise_statistics.distance_from_weighted_sum(Setting(2), 0.9) > 0.1).all()
