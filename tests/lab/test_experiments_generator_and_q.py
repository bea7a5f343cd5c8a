"""What the claims on conditional norms and on the joint batch make of their inputs."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import exact

from bn_jax.lab.experiments import conditional_norm, joint_batch
from bn_jax.lab.experiments.conditional_norm import Generator
from bn_jax.lab.experiments.nets import BATCH_NORM, MLP
from bn_jax.lab.experiments.sweeps import Digits, Part, Trial
from bn_jax.lab.experiments.verdicts import Setting

pytestmark = pytest.mark.usefixtures("compile_quickly")

# --- a generator by class -------------------------------------------------------------------------


def distance(a, b):
    return np.sqrt(((a - b) ** 2).sum())


def test_energy_distances_are_those_of_all_pairs():
    generator = np.random.default_rng(0)
    y = np.array([0, 1, 0, 1, 1])
    x, drawn = generator.normal(size=(5, 3)), generator.normal(size=(2, 4, 3))
    found = conditional_norm.energy_distances(Part(x, y), jnp.asarray(drawn))
    for label in (0, 1):
        real = x[y == label]
        across = np.mean([distance(a, b) for a in real for b in drawn[label]])
        inner = np.mean([distance(a, b) for a, b in itertools.permutations(real, 2)])
        of_drawn = np.mean([distance(a, b) for a, b in itertools.permutations(drawn[label], 2)])
        assert found[label] == pytest.approx(2 * across - inner - of_drawn, abs=1e-3)
    real = x[[0, 2, 0, 2, 1, 3, 4, 1]].reshape(2, 4, 3)
    parts = [
        np.mean([distance(a, b) for a in r for b in d]) for r, d in zip(real, drawn, strict=True)
    ]
    of_drawn = [np.mean([distance(a, b) for a, b in itertools.permutations(d, 2)]) for d in drawn]
    expected = np.mean(2 * np.array(parts) - of_drawn)
    loss = conditional_norm.loss(jnp.asarray(real), jnp.asarray(drawn))
    assert loss == pytest.approx(expected, abs=1e-3)


def test_batches_hold_each_class_without_repetition():
    setting = Setting(seeds=2, quick=True)
    labels = np.stack([np.arange(120) % 4, np.arange(120) // 30])
    classes = np.array([[0, 3], [2, 1]])
    rows = conditional_norm.draw_rows(setting, labels, classes, 100, 1)
    assert rows.shape == (2, 100 // conditional_norm.QUICK, 2, conditional_norm.IN_BATCH)
    for seed in range(2):
        found = labels[seed][rows[seed]]
        assert (found == classes[seed][None, :, None]).all()
        assert all(len(set(row.ravel())) == row.size for row in rows[seed])
    assert (rows[0][0] != rows[0][1]).any()
    other = conditional_norm.draw_rows(setting, labels, classes, 100, 2)
    assert (rows != other).any()
    shuffled = conditional_norm.shuffle(setting, labels)
    assert (np.sort(shuffled) == np.sort(labels)).all() and (shuffled != labels).mean() > 0.5


@pytest.fixture(scope="module")
def two_classes():
    """A trial of two classes of points, around -2 and 2."""
    generator = np.random.default_rng(0)
    y = np.arange(80) % 2
    x = (4 * y[:, None] - 2 + 0.3 * generator.normal(size=(80, 3))).astype(np.float32)
    part = Part(x, y)
    setting = Setting(seeds=1)
    rows = conditional_norm.draw_rows(setting, y[None], np.array([[0, 1]]), 150, 1)[0]
    return Trial(np.int32(0), Digits(part, part, part), rows)


ARMS = {
    conditional_norm.CONDITIONAL: True,
    conditional_norm.CONCATENATED: True,
    conditional_norm.NOWHERE: False,
    conditional_norm.STATISTICS: False,
}


@pytest.mark.parametrize("arm", ARMS)
def test_a_generator_knows_its_class_by_scale_and_bias_or_by_its_input(two_classes, arm):
    generator, classes = Generator(3, 2, arm, (16, 16)), jnp.arange(2)

    @jax.jit
    def means(trial):
        variables = conditional_norm.train(generator, optax.adam(0.03), trial, classes)
        key = jax.random.key(1)
        return conditional_norm.draw_images(generator, variables, key, classes, 64).mean((1, 2))

    found = means(two_classes)
    if ARMS[arm]:
        np.testing.assert_allclose(found, [-2, 2], atol=0.4)
    else:
        assert abs(found[1] - found[0]) < 1.5


@pytest.mark.parametrize("arm", conditional_norm.ARMS)
def test_arms_have_rows_for_classes_where_they_say(arm):
    generator = Generator(3, 7, arm, (5,))
    noise, classes = jnp.zeros((2, conditional_norm.NOISE)), jnp.zeros(2, int)
    shapes = jax.eval_shape(lambda: generator.init(jax.random.key(0), noise, classes, True))
    has_rows = {
        "params": arm in (conditional_norm.CONDITIONAL, conditional_norm.SHUFFLED),
        "batch_stats": arm == conditional_norm.STATISTICS,
    }
    for collection, by_class in has_rows.items():
        for leaf in jax.tree.leaves(shapes[collection]["norm0"]):
            assert leaf.shape == ((7, 5) if by_class else (5,))
    inputs = conditional_norm.NOISE + 7 * (arm == conditional_norm.CONCATENATED)
    assert shapes["params"]["Dense_0"]["kernel"].shape == (inputs, 5)


def test_a_new_class_changes_its_row_alone(two_classes):
    generator, new = Generator(3, 3, conditional_norm.CONDITIONAL, (5,)), jnp.array([1])
    key = jax.random.key(0)
    noise = jnp.zeros((1, conditional_norm.NOISE))
    start = jax.jit(lambda: generator.init(key, noise, jnp.zeros(1, int), True))()
    scale = jnp.arange(15.0).reshape(3, 5) ** 2
    start["params"]["norm0"]["scale"] = scale
    averaged = conditional_norm.with_average_row(start, jnp.array([0, 2]), 1)
    expected = np.stack([scale[0], (scale[0] + scale[2]) / 2, scale[2]])
    np.testing.assert_array_equal(averaged["params"]["norm0"]["scale"], expected)
    trial = two_classes._replace(batches=two_classes.batches[:3, :1])
    found = jax.jit(
        lambda trial: conditional_norm.train(generator, optax.adam(0.1), trial, new, averaged)
    )(trial)
    changed = jax.tree.map(lambda a, b: np.asarray(a != b), averaged, found)
    norm = changed["params"].pop("norm0")
    assert not any(leaf.any() for leaf in jax.tree.leaves(changed))
    for leaf in norm.values():
        assert leaf[1].all() and not leaf[[0, 2]].any()


def test_images_are_recognized_by_the_classifier():
    model = MLP(num_classes=3, norm=BATCH_NORM)
    drawn = jax.random.normal(jax.random.key(0), (3, 40, 4))
    classifier = jax.jit(lambda x: model.init(jax.random.key(1), x, train=False))(drawn[0])
    found = jax.jit(lambda drawn: conditional_norm.recognized(3, classifier, drawn))(drawn)
    logits: Any = [model.apply(classifier, images, train=False) for images in drawn]
    answers = [np.argmax(of_class, -1) for of_class in logits]
    expected = [100 * np.mean(answer == label) for label, answer in enumerate(answers)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.ptp(expected) > 1


def test_generators_are_compared_with_each_other():
    names = conditional_norm.ARMS
    arms = {
        arm: {
            "recognized": np.array([[10.0, 20.0], [30.0, 40.0]]) + 5 * index,
            "distance": np.array([[1.0, 3.0], [2.0, 6.0]]) * (index + 1),
        }
        for index, arm in enumerate(names)
    }
    found = conditional_norm.compare(arms, np.array([50.0, 60.0]), np.array([1, 0]))
    for key, value in {"32a": -10, "32b": -5, "32e": 5, "32f": 10}.items():
        np.testing.assert_array_equal(found[key], [value, value])
    np.testing.assert_allclose(found["32c"], [-100 / 3, -100 / 3])
    np.testing.assert_array_equal(found["32d"], [30, 30])


def test_equal_rows_are_a_plain_norm():
    errors = conditional_norm.identity_errors(np.arange(2))
    assert errors.shape == (2,) and 0 < errors.max() < conditional_norm.TOLERANCE


# --- the joint batch ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def systems():
    return {shift: joint_batch.make_system(3, shift) for shift in joint_batch.SHIFTS}


def expected_later(system, pairs):
    """The mean of Q of the next pairs, by points with the moments of the noise."""
    number = joint_batch.STATES + joint_batch.ACTIONS
    points = np.sqrt(number) * np.concatenate([np.eye(number), -np.eye(number)])
    later = 0
    for point in points:
        noise = joint_batch.DRIFT * point[: joint_batch.STATES]
        states = np.c_[pairs, np.ones(len(pairs))] @ system.dynamics.T + noise
        actions = np.c_[states, np.ones(len(pairs))] @ system.policy.T
        actions = actions + system.spread * point[joint_batch.STATES :]
        full = np.c_[states, actions, np.ones(len(pairs))]
        later = later + joint_batch.quadratic(system.value, full) / len(points)
    return later


@pytest.mark.parametrize("shift", joint_batch.SHIFTS)
def test_q_solves_the_bellman_equation(systems, shift):
    system = systems[shift]
    pairs = np.random.default_rng(0).normal(size=(7, joint_batch.STATES + joint_batch.ACTIONS))
    full = np.c_[pairs, np.ones(7)]
    wanted = joint_batch.quadratic(system.reward, full)
    wanted = wanted + joint_batch.DISCOUNT * expected_later(system, pairs)
    np.testing.assert_allclose(joint_batch.quadratic(system.value, full), wanted, rtol=1e-9)


def test_data_are_stationary_and_q_is_scaled(systems):
    for shift, system in systems.items():
        batch = joint_batch.draw_transitions(system, jax.random.key(0), 20_000)
        pairs, later = exact(batch.pairs), exact(batch.next_pairs)
        values, of_next = (
            joint_batch.quadratic(system.value, np.c_[one, np.ones(len(one))])
            for one in (pairs, later)
        )
        assert abs(values.mean()) < 0.05 and values.std() == pytest.approx(1, abs=0.05)
        states = slice(joint_batch.STATES)
        np.testing.assert_allclose(np.cov(later.T)[states, states], np.cov(pairs.T)[states, states],
                                   atol=0.15)  # fmt: skip
        different = joint_batch.apart(system)
        assert different.value == pytest.approx(of_next.mean(), abs=0.05)
        # 2-Wasserstein distance of Gaussians with the moments of the samples.
        before, after = np.cov(pairs.T), np.cov(later.T)
        values, vectors = np.linalg.eigh(before)
        root = vectors * np.sqrt(values) @ vectors.T
        cross = np.sqrt(np.linalg.eigvalsh(root @ after @ root)).sum()
        squared = ((pairs.mean(0) - later.mean(0)) ** 2).sum() + np.trace(before + after)
        assert different.distance == pytest.approx(np.sqrt(squared - 2 * cross), abs=0.06)
        assert (different.distance < 1e-6) == (shift == 0)


def test_the_last_policy_is_the_best_one(systems):
    last = systems[1.0]
    np.testing.assert_allclose(joint_batch.improve(last.value), last.policy, rtol=1e-6)
    improvements = [joint_batch.apart(system).value for system in systems.values()]
    assert improvements[0] == pytest.approx(0, abs=1e-9) and np.all(np.diff(improvements) > 0)


def forward(variables, x, mean, variance):
    """Q of an MLP with one norm, in NumPy, with given moments of the first layer."""
    params = jax.tree.map(exact, variables["params"])
    x = (x @ params["dense0"]["kernel"] - mean) / np.sqrt(variance + 1e-5)
    x = np.maximum(x * params["norm0"]["scale"] + params["norm0"]["bias"], 0)
    return (x @ params["classifier"]["kernel"] + params["classifier"]["bias"])[:, 0]


@pytest.mark.parametrize("arm", joint_batch.ARMS[:4])
def test_arms_differ_by_the_statistics_of_the_next_pairs(systems, arm):
    model = MLP((6,), 1, norm=BATCH_NORM)
    batch = joint_batch.draw_transitions(systems[1.0], jax.random.key(0), 30)
    init = jax.jit(lambda seed: model.init(jax.random.key(seed), batch.pairs, train=False))
    variables, target = init(1), init(2)
    compute = jax.jit(lambda given, target: joint_batch.values(arm, model, given, target, batch))
    now, later, updated = compute(variables, target)
    x, of_next = exact(batch.pairs), exact(batch.next_pairs)
    kernel = exact(variables["params"]["dense0"]["kernel"])
    both = np.concatenate([x, of_next]) @ kernel
    own = both[:30].mean(0), both[:30].var(0)
    if arm == joint_batch.JOINT:
        own = both.mean(0), both.var(0)
    moments = {
        joint_batch.JOINT: own,
        joint_batch.TWO: (both[30:].mean(0), both[30:].var(0)),
        joint_batch.RUNNING: (0, 1),
        joint_batch.TARGET: (0, 1),
    }[arm]
    of_network = target if arm == joint_batch.TARGET else variables
    np.testing.assert_allclose(now, forward(variables, x, *own), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(later, forward(of_network, of_next, *moments), rtol=1e-4, atol=1e-5)
    mean = updated["batch_stats"]["norm0"]["mean"]
    np.testing.assert_allclose(mean, 0.1 * own[0], rtol=1e-4, atol=1e-6)


def test_two_calls_hide_the_improvement():
    shift = joint_batch.SHIFTS[-1]
    system = joint_batch.make_system(1000, shift)
    given = jax.tree.map(np.float32, system)
    two, joint = (
        jax.jit(lambda given, arm=arm: joint_batch.learn(arm, 0.01, jnp.int32(0), given, 300))(
            given
        )
        for arm in (joint_batch.TWO, joint_batch.JOINT)
    )
    expected = -joint_batch.DISCOUNT / (1 - joint_batch.DISCOUNT) * joint_batch.apart(system).value
    assert float(two.measured["bias"]) == pytest.approx(expected, rel=0.3)
    assert abs(float(joint.measured["bias"])) < 0.15 * abs(expected)
    for found in (two, joint):
        errors = exact(found.measured["error"])
        assert errors.shape == (joint_batch.POINTS,)
        assert -float(found.validation) == pytest.approx(errors[-1], rel=0.3)
        assert errors[-1] >= 0.9 * abs(float(found.measured["bias"]))


def test_errors_are_not_larger_than_the_worst():
    found = [joint_batch.error(jnp.array(values)) for values in ([3.0, 4.0], [np.nan], [1e9, 0])]
    np.testing.assert_allclose(found, [np.sqrt(12.5), joint_batch.WORST, joint_batch.WORST])


def test_arms_are_compared_with_each_other():
    shape = 2, len(joint_batch.SHIFTS), joint_batch.POINTS
    errors = {arm: np.full(shape, 2.0**index) for index, arm in enumerate(joint_batch.ARMS)}
    errors[joint_batch.TWO][:, 3, -1] = 7
    errors[joint_batch.JOINT][:, :, joint_batch.EARLY] = 24
    biases = {arm: np.full(shape[:2], -18.0) for arm in joint_batch.ARMS}
    found = joint_batch.compare(errors, biases, np.array([[0.0, 0, 1, 2]] * 2))
    assert list(found) == [f"33{letter}" for letter in "abcdefghi"]
    ratios = {"33a": (2, 7), "33b": (2, 1), "33d": (4, 4), "33e": (8, 8), "33f": (1 / 16, 1 / 16)}
    ratios |= {"33g": (1.5, 1.5), "33h": (2, 2)}
    for key, of_key in ratios.items():
        for (_, values), ratio in zip(found[key].items(), of_key, strict=True):
            np.testing.assert_allclose(values, [ratio, ratio])
    assert list(found["33a"]) == ["shift 0.3", "shift 1"]
    assert {name: values[0] for name, values in found["33c"].items()} == {
        "0 to 0.1": 0, "0.1 to 0.3": 0, "0.3 to 1": 5
    }  # fmt: skip
    np.testing.assert_array_equal(found["33i"], [2, 2])


def test_two_calls_are_one_by_domain():
    errors = joint_batch.identity_errors(np.arange(2))
    assert set(errors) == {joint_batch.TWO, joint_batch.JOINT}
    for of_one in errors.values():
        assert of_one.shape == (2,) and 0 < of_one.max() < joint_batch.TOLERANCE
