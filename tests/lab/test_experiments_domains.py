"""What the experiments on domains make of their inputs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, exact

import bn_jax as bn
from bn_jax.lab.experiments import auxiliary_batch_norms, domain_nets, norms_by_domain
from bn_jax.lab.experiments.adversarial_examples import attack
from bn_jax.lab.experiments.auxiliary_batch_norms import ALONE, AUXILIARY, ONE, STRONG, WEAK
from bn_jax.lab.experiments.domain_nets import FIRST, SECOND, Batch, DomainMLP
from bn_jax.lab.experiments.norms_by_domain import (
    BACKGROUND,
    BOTH,
    BY_TURNS,
    INVERTED,
    MIXED,
    ORDERS,
    SAME,
    SHARED,
    SHIFTS,
    SOURCE,
    STATISTICS,
)
from bn_jax.lab.experiments.selection import RateSweep
from bn_jax.lab.experiments.sweeps import (
    Digits,
    Part,
    cross_entropy,
    draw_trials,
    load_parts,
    take,
)
from bn_jax.lab.experiments.verdicts import Setting

NORM = partial(bn.linen.DomainBatchNorm, num_domains=2, momentum=0.5)
PLAIN = DomainMLP(partial(bn.linen.BatchNorm, momentum=0.5), 3, (5, 4))
BY_DOMAIN = DomainMLP(NORM, 3, (5, 4))


@pytest.fixture(scope="module")
def variables():
    """Variables of `BY_DOMAIN` for six features, all of them random."""
    shapes = jax.eval_shape(
        lambda: BY_DOMAIN.init(jax.random.key(0), jnp.zeros((1, 6)), FIRST, False)
    )
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: generator.uniform(0.5, 2.0, leaf.shape).astype(leaf.dtype), shapes
    )


@pytest.fixture(scope="module")
def part():
    generator = np.random.default_rng(1)
    x = generator.normal(size=(40, 6)).astype(np.float32)
    return Part(x, generator.integers(0, 3, 40).astype(np.int32))


@pytest.mark.parametrize("train", [True, False])
def test_a_network_by_domain_is_a_plain_network_for_each(variables, part, train):
    domain = np.arange(40) % 2
    found = domain_nets.logits_of(BY_DOMAIN, variables, part.x, domain, train)
    for one in (FIRST, SECOND):
        of_one = bn.linen.select_domain(variables, one)
        expected = domain_nets.logits_of(PLAIN, of_one, part.x[domain == one], one, train)
        assert_close(found[domain == one], expected, tolerance=1e-5)


def test_a_step_descends_the_mean_loss_of_the_batch(part):
    batch = Batch(part.x[:12], part.y[:12], np.arange(12) % 2)
    optimizer, seen = optax.sgd(0.5), []

    def make_batch(variables, scale):
        seen.append(variables)
        return batch._replace(x=batch.x * scale)

    found = domain_nets.train_by_domain(
        BY_DOMAIN, optimizer, 3, 6, make_batch, jnp.array([1.0, 2.0])
    )
    params, state = BY_DOMAIN.init(jax.random.key(3), part.x[:1], FIRST, False).values()
    for scale in (1.0, 2.0):

        def loss(params, state, scale=scale):
            variables = {"params": params, "batch_stats": state}
            x = scale * batch.x
            logits, updated = BY_DOMAIN.apply(
                variables, x, batch.domain, True, mutable="batch_stats"
            )
            return cross_entropy(logits, batch.y), updated["batch_stats"]

        gradients, state = jax.jit(jax.grad(loss, has_aux=True))(params, state)
        params = jax.tree.map(lambda leaf, slope: leaf - 0.5 * slope, params, gradients)
    jax.tree.map(
        partial(assert_close, tolerance=1e-5), found, {"params": params, "batch_stats": state}
    )
    assert seen[0].keys() == found.keys()


def test_every_training_of_a_program_has_its_rate():
    validation = np.array([[[0.9, 0.1], [0.9, 0.3]], [[0.5, 0.2], [0.6, 0.4]]])
    measured = {"it": np.arange(8.0).reshape(2, 2, 2)}
    found = domain_nets.of_each(RateSweep((0.1, 1.0), validation, measured), ["a", "b"])
    assert {name: float(one.rate.value) for name, one in found.items()} == {"a": 0.1, "b": 1.0}
    np.testing.assert_array_equal(found["a"].measured["it"], [0, 2])
    np.testing.assert_array_equal(found["b"].measured["it"], [5, 7])


def test_adversarial_examples_are_made_through_the_auxiliary_norm(variables, part):
    rows = np.arange(3, 19)
    make_batch, pixels = auxiliary_batch_norms.make_batches(BY_DOMAIN, part, 0.1, alone=False)
    x, y, domain = make_batch(variables, rows)
    least, greatest = part.x.min(), part.x.max()
    assert (float(pixels[0]), float(pixels[1])) == (least, greatest)
    np.testing.assert_array_equal(domain, np.repeat([FIRST, SECOND], 16))
    np.testing.assert_array_equal(x[:16], part.x[rows])
    np.testing.assert_array_equal(y, np.tile(part.y[rows], 2))

    def expected(one):
        of_one = bn.linen.select_domain(variables, one)

        def loss(x):
            return cross_entropy(
                domain_nets.logits_of(PLAIN, of_one, x, one, train=True), part.y[rows]
            )

        sign = np.sign(jax.grad(loss)(part.x[rows]))
        return np.clip(part.x[rows] + 0.1 * (greatest - least) * sign, least, greatest)

    assert_close(x[16:], expected(SECOND), tolerance=1e-6)
    assert abs(expected(SECOND) - expected(FIRST)).max() > 0.1
    alone, _ = auxiliary_batch_norms.make_batches(BY_DOMAIN, part, 0.1, alone=True)
    found = alone(variables, rows)
    np.testing.assert_array_equal(found.x, part.x[rows])
    assert found.domain == FIRST


def test_the_distance_of_running_means_is_in_deviations_of_the_clean_ones():
    stats = {
        "norm0": {
            "mean": jnp.array([[1.0, 2.0], [4.0, 2.0]]),
            "var": jnp.array([[9.0, 1], [1, 1]]),
        },
        "norm1": {"mean": jnp.array([[0.0], [8.0]]), "var": jnp.array([[4.0], [16.0]])},
    }
    found = float(auxiliary_batch_norms.distance(stats))
    assert found == pytest.approx(np.sqrt((1 + 0 + 16) / 3))


def test_both_statistics_are_tested_with_attacks_that_know_them(variables, part):
    digits = Digits(part, part, part)
    pixels = part.x.min(), part.x.max()
    found = auxiliary_batch_norms.measure(BY_DOMAIN, variables, digits, 0.2, pixels)
    assert len(found) == 5
    for name, domain in (("clean", FIRST), ("adversarial", SECOND)):
        logits = partial(domain_nets.logits_of, BY_DOMAIN, variables, domain=domain)
        attacked = attack(
            logits, part, 0.2 * (pixels[1] - pixels[0]), pixels, *auxiliary_batch_norms.IN_TESTS
        )
        for kind, x in (("clean images", part.x), ("attacked images", attacked)):
            expected = 100 * np.mean(np.argmax(logits(x), -1) == part.y)
            assert_close(found[f"{kind}, {name} statistics"], expected, tolerance=1e-6)
    loss = cross_entropy(domain_nets.logits_of(BY_DOMAIN, variables, part.x, FIRST), part.y)
    assert_close(found["loss"], loss, tolerance=1e-6)


def test_examples_of_size_zero_make_no_difference_and_others_do():
    setting = Setting(2)
    trials = draw_trials(setting, 3, 16)
    none, some = auxiliary_batch_norms.control_errors(setting, trials, np.array([0.0, WEAK]), 3)
    assert none < 1e-12 and some > 1e-4


def test_arms_are_compared_at_every_size():
    def of(clean, loss=1.0, **more):
        return {"clean images, clean statistics": np.array([clean]), "loss": np.array([loss])} | {
            name: np.array([value]) for name, value in more.items()
        }

    names = ("clean images, adversarial", "attacked images, adversarial", "attacked images, clean")
    extra = {
        size: {f"{name} statistics": value for name, value in zip(names, values, strict=True)}
        for size, values in ((WEAK, (90.0, 70.0, 64.0)), (STRONG, (80.0, 2.0, 1.0)))
    }
    found = auxiliary_batch_norms.compare(
        {
            ALONE: {0.0: of(96.0)},
            ONE: {0.0: of(96.5), WEAK: of(95.0, 2.0), STRONG: of(93.0, 4.0)},
            AUXILIARY: {
                0.0: of(96.25),
                WEAK: of(97.0, 1.0, distance=0.1, **extra[WEAK]),
                STRONG: of(96.0, 3.0, distance=0.3, **extra[STRONG]),
            },
        }
    )
    expected = {"30a": (-1, -3), "30b": (2, 3), "30c": (0.5, 0.75), "30d": (1, 0)}
    expected |= {"30e": (0.1, 0.3), "30f": (-7, -16)}
    for key, values in expected.items():
        assert [float(one[0]) for one in found[key].values()] == pytest.approx(values), key
    assert float(found["30g"][0]) == 6.0 and float(found["30i"][0]) == -0.25
    assert list(found["30a"]) == ["size 0.1", "size 0.3"]


def test_the_second_domain_is_what_its_shift_says():
    x = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
    inverted, background, same = norms_by_domain.shift_images(x, 5, 0)
    np.testing.assert_array_equal(inverted, -x)
    np.testing.assert_array_equal(same, x)
    other = norms_by_domain.shift_images(x, 5, 1)[1]
    patterns = [(one - norms_by_domain.CONTRAST * x).mean(0) for one in (background, other)]
    assert_close(patterns[0], patterns[1], tolerance=0.15)
    assert patterns[0].std() > 0.3
    noise = background - norms_by_domain.CONTRAST * x - patterns[0]
    assert noise.std() == pytest.approx(norms_by_domain.NOISE, rel=0.05)
    assert abs(background - other).max() > 0.5


def test_batches_hold_the_domains_of_their_order():
    rows = norms_by_domain.draw_rows(0, 301, 40)
    mixed, by_turns, source = rows
    assert rows.shape == (3, 40, 64) and rows.min() == 0 and rows.max() == 300
    assert ((mixed < 150).sum(-1) == 32).all()
    assert ((by_turns < 150).mean(-1) == [1, 0] * 20).all()
    assert (source < 150).all()
    assert all(len(set(row)) == 64 for row in rows.reshape(-1, 64))


def test_a_task_has_either_domain_in_half_of_its_training_images():
    setting = Setting(2)
    tasks, digits = norms_by_domain.make_tasks(setting, 2), load_parts(setting)
    half = digits.train.y.shape[1] // 2
    for seed in range(2):
        task, x = take(tasks, seed), digits.train.x[seed]
        for shift, sign in ((SHIFTS.index(INVERTED), -1), (SHIFTS.index(SAME), 1)):
            np.testing.assert_array_equal(task.train.x[shift, :half], x[:half])
            np.testing.assert_array_equal(task.train.x[shift, half:], sign * x[half:])
            for name in ("validation", "test"):
                of_part, images = getattr(task, name), getattr(digits, name).x[seed]
                np.testing.assert_array_equal(of_part.x[shift, FIRST], images)
                np.testing.assert_array_equal(of_part.x[shift, SECOND], sign * images)
                np.testing.assert_array_equal(of_part.y, getattr(digits, name).y[seed])
        assert task.rows.shape == (len(ORDERS), 2, 64)


def test_adaptation_replaces_the_statistics_of_one_domain(variables, part):
    adapted = norms_by_domain.adapt(BY_DOMAIN, variables, part.x)
    assert adapted["params"] is variables["params"]
    before, after = (one["batch_stats"]["norm0"] for one in (variables, adapted))
    hidden = exact(part.x) @ exact(variables["params"]["dense0"]["kernel"])
    for name, expected in (("mean", hidden.mean(0)), ("var", hidden.var(0))):
        np.testing.assert_array_equal(after[name][FIRST], before[name][FIRST])
        assert_close(after[name][SECOND], expected, tolerance=1e-5)
    as_batch = domain_nets.logits_of(BY_DOMAIN, variables, part.x, SECOND, train=True)
    assert_close(
        domain_nets.logits_of(BY_DOMAIN, adapted, part.x, SECOND), as_batch, tolerance=1e-5
    )


def test_own_statistics_undo_an_affine_function_up_to_its_sign():
    factors, signs = (norms_by_domain.CONTRAST, -1.0, -1.0), (1.0, -1.0, 1.0)
    found = norms_by_domain.affine_errors(Setting(2), factors, signs)
    assert found.shape == (3, 2)
    assert found[:2].max() < 1e-12 and found[2].min() > 0.1


def test_arms_are_compared_in_both_domains():
    def of(mean, **more):
        return {"by domain": np.array([[mean - 1, mean + 1]])} | {
            name.replace("_", " "): np.array([value]) for name, value in more.items()
        }

    base = {INVERTED: 90.0, BACKGROUND: 80.0, SAME: 95.0}
    measured: dict[str, Any] = {arm: {} for arm in norms_by_domain.ARMS}
    for shift, value in base.items():
        measured[SHARED][shift, MIXED] = of(value)
        measured[SHARED][shift, BY_TURNS] = of(value - 20)
        measured[STATISTICS][shift, MIXED] = of(value + 1)
        measured[STATISTICS][shift, BY_TURNS] = of(value + 0.5)
        measured[STATISTICS][shift, SOURCE] = of(91.0, by_first=10.0, adapted=value - 60)
        measured[BOTH][shift, MIXED] = of(value + 3)
    found = norms_by_domain.compare(measured)

    def values(key):
        one = found[key]
        return (
            {name: float(value[0]) for name, value in one.items()}
            if isinstance(one, dict)
            else float(one[0])
        )

    each = {"31a": 3.0, "31b": 1.0, "31d": -20.5, "31e": -0.5}
    for key, expected in each.items():
        assert values(key) == {INVERTED: expected, BACKGROUND: expected}
    assert values("31c") == 2.0
    assert values("31f") == 10.0
    # Of the accuracy in the first domain alone, 90 %.
    assert values("31g") == 20 / 80
    control = {f"{MIXED}, {STATISTICS}": 1.0, f"{MIXED}, {BOTH}": 3.0}
    assert values("31i") == {**control, BY_TURNS: 20.5, "adapted": 25.0}


def test_training_by_domain_adapts_to_a_background_and_not_to_an_inversion():
    setting = Setting(2, quick=True)
    tasks = norms_by_domain.make_tasks(setting, 40)
    found = norms_by_domain.train_arm(setting, tasks, STATISTICS)
    assert list(found) == [(shift, order) for shift in SHIFTS for order in ORDERS]
    measured = {place: one.measured for place, one in found.items()}
    for shift in SHIFTS:
        of_source = measured[shift, SOURCE]
        assert of_source["by domain"].shape == (2, 2)
        assert (of_source["by domain"][:, FIRST] > 85).all()
        # The second domain keeps its initial statistics until it is adapted to.
        assert (of_source["by domain"][:, SECOND] < of_source["by domain"][:, FIRST]).all()
        for order in (MIXED, BY_TURNS):
            assert (measured[shift, order]["by domain"] > 60).all()
    gains = {
        shift: measured[shift, SOURCE]["adapted"] - measured[shift, SOURCE]["by first"]
        for shift in SHIFTS
    }
    assert (gains[BACKGROUND] > 15).all()
    assert (abs(gains[INVERTED]) < 10).all() and (abs(gains[SAME]) < 3).all()


@pytest.mark.exhaustive
def test_auxiliary_statistics_are_the_better_ones_for_clean_images():
    setting = Setting(2, quick=True)
    trials = draw_trials(setting, 60, 64)
    found = auxiliary_batch_norms.train_arm(setting, trials, AUXILIARY)
    zero, _, strong = (one.measured for one in found.values())
    clean, adversarial = (f"clean images, {name} statistics" for name in ("clean", "adversarial"))
    assert (zero["distance"] < 1e-5).all() and (strong["distance"] > 0.05).all()
    np.testing.assert_allclose(zero[clean], zero[adversarial], atol=1.0)
    assert (strong[clean] > strong[adversarial]).all() and (strong[clean] > 90).all()
    alone = auxiliary_batch_norms.train_arm(setting, trials, ALONE)
    assert list(alone) == [0.0] and "distance" not in alone[0.0].measured
