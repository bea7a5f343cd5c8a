"""What the experiments on batches, corruptions and attacks make of their inputs."""

import jax
import numpy as np
import pytest
from support import assert_close, exact

from bn_jax.lab.experiments import adversarial_examples, corruptions, small_batches
from bn_jax.lab.experiments.digit_corruptions import (
    AFFINE,
    CORRUPTIONS,
    KINDS,
    NOT_AFFINE,
    SEVERITIES,
    corrupt,
)
from bn_jax.lab.experiments.sweeps import Part


def test_batches_are_compared_with_large_ones_and_arms_with_each_other():
    names = [*small_batches.BREAKING, small_batches.LARGE]
    base = {"batch norm": 0.0, "renorm": 10.0, "group norm": 20.0}
    accuracies = {
        arm: {name: np.array([value + 3 * index, 50.0]) for index, name in enumerate(names)}
        for arm, value in base.items()
    }
    accuracies["group norm"][names[0]] += 5
    found = small_batches.compare(accuracies)
    assert list(found["3a"]) == list(found["3b"]) == list(found["3d"]) == names[:-1]
    np.testing.assert_array_equal(found["3a"][names[1]], [3 - 12, 0])
    np.testing.assert_array_equal(found["3b"][names[1]], [10, 0])
    np.testing.assert_array_equal(found["3c"], [10, 0])
    np.testing.assert_array_equal(found["3d"][names[0]], [-5, -5])
    np.testing.assert_array_equal(found["3d"][names[1]], [0, 0])


def test_what_is_cut_from_small_batches_is_padding():
    labels = np.arange(500)[None] % 10
    rows = small_batches.draw(np.array([0]), labels, 3)
    width = small_batches.SETTINGS[small_batches.SMALL - 1].size
    assert (rows[:, : small_batches.SMALL, :, width:] == -1).all()
    assert (rows[:, small_batches.SMALL :] >= 0).all()


def test_two_examples_have_no_gradient():
    assert 0 < max(map(small_batches.input_gradient_of_two, range(3))) < 1e-12


def test_corruptions_grow_with_their_severity():
    seeds = np.array([0, 1])
    severities = [corrupt(seeds, index, dtype=np.float64) for index in range(len(SEVERITIES))]
    clean = severities[0].x[:, 0]
    distances = [((one.x - clean[:, None]) ** 2).mean((0, 2, 3)) for one in severities]
    assert (np.diff(distances, axis=0)[:, 1:] > 0).all()
    for one in severities:
        assert one.x.shape[:2] == (2, len(KINDS)) and one.x.dtype == np.float64
        np.testing.assert_array_equal(one.x[:, 0], clean)
        for index, kind in enumerate(KINDS[1:], 1):
            fitted = np.polyfit(clean[0].ravel(), one.x[0, index].ravel(), 1)
            is_affine = np.allclose(np.polyval(fitted, clean[0]), one.x[0, index], atol=1e-9)
            assert is_affine == (kind in AFFINE) == (index not in NOT_AFFINE)
    assert corrupt(seeds).x.dtype == np.float32
    other = corrupt(seeds, part="validation")
    assert other.x.shape[2] == other.y.shape[1] == 179


def test_holes_are_as_large_as_they_should_be():
    images = np.ones((5, 8, 8))
    apply, strengths = CORRUPTIONS["holes"]
    for side in strengths:
        holes = apply(images, np.random.default_rng(0), side) == 0
        assert (holes.sum((1, 2)) == side**2).all()
        assert (holes.any(1).sum(-1) == side).all() and (holes.any(2).sum(-1) == side).all()
    assert (images == 1).all()


@pytest.fixture(scope="module")
def mlp():
    """The variables of two networks, [seeds, ...], of positive random numbers."""
    model = corruptions.MODELS["MLP"]
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 64), np.float32), False)
    )
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: generator.uniform(0.1, 1.0, (2, *leaf.shape)).astype(np.float32), shapes
    )


def forward(params, x):
    """The logits of an MLP with the statistics of `x`, in NumPy."""
    for layer in range(2):
        x = x @ exact(params[f"dense{layer}"]["kernel"])
        x = (x - x.mean(0)) / x.std(0)
        norm = params[f"norm{layer}"]
        x = np.maximum(x * exact(norm["scale"]) + exact(norm["bias"]), 0)
    return x @ exact(params["classifier"]["kernel"]) + exact(params["classifier"]["bias"])


def test_affine_corruptions_change_nothing(mlp):
    x = np.random.default_rng(0).normal(size=(2, len(KINDS), 30, 64))
    places = [KINDS.index(kind) for kind in AFFINE]
    x[:, places[0]], x[:, places[1]] = 0.3 * x[:, 0] - 2, x[:, 0] + 5
    assert corruptions.affine_errors(mlp, x).max() < 1e-12
    x[1, places[1]] = x[1, 0] ** 3
    found = corruptions.affine_errors(mlp, x)
    logits = [
        forward(jax.tree.map(lambda leaf: leaf[1], mlp["params"]), x[1, place])
        for place in (0, places[1])
    ]
    expected = abs(logits[1] - logits[0]).max() / abs(logits[0]).max()
    np.testing.assert_allclose(found, [0, expected], rtol=1e-6, atol=1e-12)


def test_entropy_is_lowered_from_where_adaptation_ends(mlp):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 3, 40, 64)).astype(np.float32)
    y = generator.integers(0, 10, (2, 3, 40))
    adapted = corruptions.adapted_errors("MLP", mlp, x, y, prior=0.0)
    rates = [[0.0] * 3, [3.0, 0.0, 3.0]]
    still, moved = corruptions.entropy_errors(corruptions.MODELS["MLP"], mlp, x, y, rates)
    assert_close(still, adapted, tolerance=1e-6)
    assert_close(moved[:, 1], adapted[:, 1], tolerance=1e-6)
    assert (moved != adapted).any()


def test_errors_are_compared_where_corruptions_are_not_affine():
    kinds = len(KINDS)

    def errors(value):
        found = np.full((2, kinds), 9.0)
        found[:, NOT_AFFINE] = [[value], [2 * value]]
        return found

    measured = corruptions.Measured(
        as_trained={"MLP": errors(0.4), "CNN": errors(0.5)},
        adapted={"MLP": errors(0.3), "CNN": errors(0.1)},
        few=errors(0.35),
        mixed=errors(0.25),
        shuffled=errors(0.2),
        by_class=errors(0.45),
        entropy=errors(0.28),
    )
    found = corruptions.compare({"mild": measured})
    expected = {"4c": -10, "4d": -2, "4e": 25, "4f": 5}
    for key, value in expected.items():
        np.testing.assert_allclose(found[key]["mild"], [value, 2 * value])
    np.testing.assert_allclose(found["4a"]["MLP, mild"], [0.25, 0.25])
    np.testing.assert_allclose(found["4a"]["CNN, mild"], [0.8, 0.8])


@pytest.mark.parametrize("kind", adversarial_examples.ATTACKS)
def test_attacks_on_a_linear_network_find_the_worst_image(kind):
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(6, 2)).astype(np.float32)
    x, y = generator.uniform(0, 1, (20, 6)).astype(np.float32), generator.integers(0, 2, 20)
    steps, step = adversarial_examples.ATTACKS[kind]
    found = adversarial_examples.attack(
        lambda x: x @ weights, Part(x, y), 0.2, (0.0, 1.0), steps, step
    )
    # The margin falls fastest along the difference of the weights.
    away = np.sign(weights[:, 1] - weights[:, 0]) * np.where(y == 0, 1, -1)[:, None]
    assert_close(found, np.clip(x + 0.2 * away, 0, 1), tolerance=1e-6)


def test_attacks_stay_near_the_image():
    x = np.zeros((1, 1), np.float32)

    def logits(x):
        # Past 1, the loss falls again: single steps overshoot, many small ones do not.
        return jax.numpy.stack([-(1 - (x[:, 0] - 1) ** 2), 1 - (x[:, 0] - 1) ** 2], -1)

    for steps, step, expected in ((1, 1.0, 3.0), (60, 0.05, 1.0)):
        part = Part(x + 0.01, np.zeros(1, np.int32))
        found = adversarial_examples.attack(logits, part, 3.0, (-9.0, 9.0), steps, step)
        assert abs(float(found[0, 0]) - expected) < 0.2


def test_norm_is_compared_with_none_at_the_deciding_sizes():
    sizes = adversarial_examples.SIZES
    accuracies = {
        arm: {
            "FGSM": value - 10 * np.arange(len(sizes))[None] * factor,
            "PGD": value - 20 * np.arange(len(sizes))[None] * factor,
            "noise": np.array([value - 5 * factor]),
        }
        for arm, value, factor in (("batch norm", 98.0, 1.5), ("no norm", 96.0, 1.0))
    }
    found = adversarial_examples.compare(accuracies)
    names = [f"size {size:g}" for size in adversarial_examples.DECIDING]
    assert names == ["size 0.06", "size 0.12"]
    np.testing.assert_allclose([found["28a"][name][0] for name in names], [2 - 10, 2 - 15])
    np.testing.assert_allclose([found["28b"][name][0] for name in names], [2 - 20, 2 - 30])
    np.testing.assert_allclose(found["28c"], [2 - 2.5])
    np.testing.assert_allclose(found["28d"], [2.0])
