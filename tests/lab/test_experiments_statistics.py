"""The formulas of the experiments about statistics, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support import assert_close, exact

from bn_jax.lab.experiments import (
    batch_leakage,
    batch_noise,
    ghost_batches,
    precise_statistics,
    unbiased_variance,
)
from bn_jax.lab.experiments.verdicts import Setting


def test_running_variances_of_many_batches():
    ratios = unbiased_variance.running_variances(Setting(3, quick=True))
    sizes = np.asarray(unbiased_variance.SIZES[::2])
    for arm, expected in (("unbiased", np.ones(3)), ("biased", (sizes - 1) / sizes)):
        assert ratios[arm].shape == (3, 3, unbiased_variance.FEATURES)
        assert unbiased_variance.standard_errors_off(ratios[arm], expected).max() <= 3
        # So precise that the other arm's expectation is far off.
        other = (sizes - 1) / sizes if arm == "unbiased" else np.ones(3)
        assert unbiased_variance.standard_errors_off(ratios[arm], other).min() > 3


def test_standard_errors_off():
    ratios = np.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 5.0], [5.0, 7.0]]])
    error = [stats.sem(one.reshape(-1)) for one in ratios]
    expected = [(2.5 - 1) / error[0], (6 - 5.5) / error[1]]
    found = unbiased_variance.standard_errors_off(ratios, np.array([1.0, 6.0]))
    assert found == pytest.approx(expected)


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


def test_first_no_worse():
    above, open_ = [1.0, 1.1, 0.9], [1.0, -1.0, 0.5]
    assert precise_statistics.first_no_worse([above, above, open_, above, open_]) == 2
    assert precise_statistics.first_no_worse([open_, above]) == 0
    assert precise_statistics.first_no_worse([above, above]) == 2


def test_groups_share_classes():
    labels = np.random.default_rng(0).integers(0, 10, 500)
    rows = batch_leakage.draw_groups(labels, 4, np.random.default_rng(1))
    for batch in rows:
        assert len(np.unique(batch)) == len(batch)
        assert (np.bincount(labels[batch]) == batch_leakage.EACH).all()
        for group in labels[batch].reshape(-1, batch_leakage.GROUP):
            assert len(np.unique(group)) == batch_leakage.CLASSES_PER_GROUP
    shuffled = batch_leakage.arrange("per group, shuffled", rows, np.random.default_rng(2))
    assert (np.sort(shuffled) == np.sort(rows)).all()
    for group in labels[shuffled].reshape(-1, batch_leakage.GROUP):
        assert len(np.unique(group)) > batch_leakage.CLASSES_PER_GROUP
    for arm in batch_leakage.ARMS[::2]:
        assert (batch_leakage.arrange(arm, rows, np.random.default_rng(2)) == rows).all()


def test_misfits():
    steps = np.arange(1, 51)
    distances = np.stack([2 + 3 * np.log(steps), 1 + 0.5 * np.sqrt(steps)])
    found = ghost_batches.misfits(distances)
    assert found["log t"][0] < 1e-20 < found["sqrt t"][0]
    assert found["sqrt t"][1] < 1e-20 < found["log t"][1]
