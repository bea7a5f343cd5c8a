import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close

from bn_jax import linen, models

BATCH_NORM = functools.partial(linen.BatchNorm, momentum=0.9)
GHOST_NORM = functools.partial(linen.BatchNorm, momentum=0.9, virtual_batch_size=4)
NORMS = {"none": None, "batch norm": BATCH_NORM, "ghost batch norm": GHOST_NORM}


def make_model(norm, **attributes):
    return models.ResNet(5, **({"stage_sizes": (1, 1), "widths": (4, 8)} | attributes), norm=norm)


def images(examples=8, seed=0):
    x = np.random.default_rng(seed).standard_normal((examples, 6, 6, 2))
    return jnp.asarray(x, jnp.float32)


@functools.cache
def init(model):
    return jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images(1))


@functools.partial(jax.jit, static_argnums=0)
def apply_train(model, variables, x, mask=None):
    return model.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])


@functools.partial(jax.jit, static_argnums=0)
def apply_eval(model, variables, x):
    return model.apply(variables, x, train=False)


def names(tree):
    return {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_logits_and_collections(norm):
    model = make_model(norm)
    variables = init(model)
    for x in (images(), images()[:, :1, :1]):
        logits, updates = apply_train(model, variables, x)
        assert logits.shape == (8, 5) and logits.dtype == jnp.float32
        assert jnp.isfinite(logits).all()
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(
            jnp.shape, {key: value for key, value in variables.items() if key == "batch_stats"}
        )
    assert ("batch_stats" in variables) == (norm is not None)
    biases = {path[-2] for path in names(variables["params"]) if path[-1] == "bias"}
    assert biases == ({"conv", "classifier"} if norm is None else {"norm", "classifier"})


def test_arms_start_from_the_same_kernels():
    plain, normed = (init(make_model(norm))["params"] for norm in (None, BATCH_NORM))
    kernels = {path for path in names(plain) if path[-1] == "kernel"}
    assert kernels == {path for path in names(normed) if path[-1] == "kernel"}
    # Stem, two blocks of two convolutions, one shortcut, the classifier.
    assert len(kernels) == 1 + 2 * 2 + 1 + 1
    for path in kernels:
        one, other = (
            functools.reduce(lambda tree, key: tree[key], path, p) for p in (plain, normed)
        )
        np.testing.assert_array_equal(one, other)


def test_stages_set_the_sizes():
    variables = init(make_model(BATCH_NORM, stage_sizes=(1, 1, 2), widths=(3, 4, 5)))
    widths = {
        stage: stats["ConvNorm_0"]["norm"]["mean"].shape
        for stage, stats in variables["batch_stats"].items()
        if stage != "stem"
    }
    assert widths == {
        "stage0_block0": (3,),
        "stage1_block0": (4,),
        "stage2_block0": (5,),
        "stage2_block1": (5,),
    }


def test_blocks_start_as_their_shortcut():
    block = models.BasicBlock(2, norm=BATCH_NORM)
    x = images()
    variables = block.init(jax.random.key(0), x, train=False)
    y, _ = block.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, nn.relu(x))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_masked_examples_change_nothing_for_the_others(norm):
    model = make_model(norm)
    variables = init(model)
    # The second group of four has one valid example.
    mask = jnp.array([True, True, False, True, False, False, True, False])
    x = images()
    other = jnp.where(mask[:, None, None, None], x, 100 * images(seed=1))
    logits, updates = apply_train(model, variables, x, mask)
    other_logits, other_updates = apply_train(model, variables, other, mask)
    assert_close(other_logits[mask], logits[mask])
    if norm is not None:
        assert_close(other_updates, updates)
        _, unmasked = apply_train(model, variables, x)
        assert not np.allclose(
            unmasked["batch_stats"]["stem"]["norm"]["mean"],
            updates["batch_stats"]["stem"]["norm"]["mean"],
            atol=1e-4,
        )


def test_masked_equals_the_subset():
    model = make_model(BATCH_NORM)
    variables = init(model)
    mask = jnp.arange(8) < 5
    logits, updates = apply_train(model, variables, images(), mask)
    subset_logits, subset_updates = apply_train(model, variables, images()[:5])
    assert_close(logits[:5], subset_logits)
    assert_close(updates, subset_updates)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_evaluation_treats_each_example_alone(norm):
    model = make_model(norm)
    updates = apply_train(model, init(model), images())[1]
    variables = init(model) | updates
    together = apply_eval(model, variables, images())
    assert_close(together[:3], apply_eval(model, variables, images()[:3]))


def test_widths_must_match_stage_sizes():
    with pytest.raises(
        ValueError, match=r"widths has 2 entries, expected 3, one for each of stage"
    ):
        init(make_model(None, stage_sizes=(1, 1, 1)))
