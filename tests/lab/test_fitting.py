import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_jax import linen, training
from bn_jax.lab import data, models
from bn_jax.lab.fitting import fit, make_optimizer

pytestmark = pytest.mark.usefixtures("compile_quickly")

SIZE = 8
MESH = training.make_mesh(jax.devices()[:2])
NORM = functools.partial(linen.BatchNorm, momentum=0.9)


def dataset(examples, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, examples).astype(np.int32)
    x = rng.standard_normal((examples, 4, 4, 1)) + y[:, None, None, None]
    return data.Dataset(x.astype(np.float32), y)


@functools.cache
def initial_state():
    model = models.ResNet(3, stage_sizes=(1,), widths=(4,), norm=NORM)
    return training.create_state(model, optax.sgd(0.1, momentum=0.9), (4, 4, 1), 0, MESH)


def variables(state):
    return {"params": state.params, "batch_stats": state.batch_stats}


def run(seed=0, state=None, after=None):
    return list(
        fit(
            initial_state() if state is None else state,
            dataset(35),
            dataset(7, 1),
            MESH,
            batch_size=SIZE,
            epochs=3,
            seed=seed,
            report_every=2,
            after=after,
        )
    )


def test_fit_reports():
    reports = [report for _, report in run()]
    # 35 examples are five batches of 8: reports after 2, 4 and 5 steps.
    assert [report.step for report in reports] == [2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert [report.epoch for report in reports] == [1] * 3 + [2] * 3 + [3] * 3
    assert [report.training.examples for report in reports] == [16, 16, 3] * 3
    assert [report.examples for report in reports] == np.cumsum([16, 16, 3] * 3).tolist()
    assert all(report.validation.examples == 7 for report in reports)
    seconds = [report.seconds for report in reports]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_fit_is_reproducible_and_shuffles():
    (*_, (state, _)), (*_, (again, _)), (*_, (other, _)) = run(), run(), run(seed=1)
    jax.tree.map(np.testing.assert_array_equal, variables(state), variables(again))
    kernel, other_kernel = (s.params["classifier"]["kernel"] for s in (state, other))
    assert not np.allclose(kernel, other_kernel, atol=1e-5)
    assert state.step == 15


def test_fit_continues_after_an_epoch():
    whole = run()
    rng = np.random.default_rng(0)
    rng.permutation(35)
    state, last = whole[2]
    rest = run(rng, state, last)
    untimed = [report._replace(seconds=0) for _, report in rest]
    assert untimed == [report._replace(seconds=0) for _, report in whole[3:]]
    assert rest[0][1].seconds > last.seconds
    jax.tree.map(np.testing.assert_array_equal, variables(rest[-1][0]), variables(whole[-1][0]))
    assert run(rng, *whole[-1]) == []


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_optimizer_reaches_the_learning_rate_and_returns_to_zero(steps):
    optimizer = make_optimizer(0.5, steps)
    params = jnp.zeros(())
    opt_state = optimizer.init(params)
    gradients = iter([1.0] + [0.0] * steps)
    moved = []
    for gradient in gradients:
        update, opt_state = optimizer.update(jnp.float32(gradient), opt_state, params)
        moved.append(float(update))
    # A gradient of one at the first step, then nothing but momentum: rate = -update / momentum.
    momentum = np.concatenate([[1.9], 0.9 ** np.arange(2, steps + 2)])
    rates = -np.array(moved) / momentum
    np.testing.assert_allclose(rates.max(), 0.5, rtol=1e-5)
    assert rates.argmax() == steps // 10
    np.testing.assert_allclose(rates[-1], 0, atol=1e-6)


def test_it_learns_digits():
    splits = data.split(data.load_digits(), seed=0)
    train, validation, _ = (
        data.standardize(part, *data.mean_and_std(splits.train)) for part in splits
    )
    model = models.ResNet(10, stage_sizes=(1, 1), widths=(8, 16), norm=NORM)
    state = training.create_state(model, make_optimizer(0.2, 160), (8, 8, 1), 0, MESH)
    *_, (_, report) = fit(
        state, train, validation, MESH, batch_size=64, epochs=8, seed=0, report_every=20
    )
    assert report.validation.accuracy > 0.9
