import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import jax_resnet
import numpy as np
import optax
import pytest
from support import assert_close, far_from_initial, standard_normal

from bn_jax import linen
from bn_jax.lab import models

pytestmark = pytest.mark.usefixtures("compile_quickly")

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


@pytest.mark.parametrize("block", [models.BasicBlock(4), models.Bottleneck(1)])
def test_blocks_start_as_their_shortcut(block):
    block = block.clone(norm=BATCH_NORM)
    x = jnp.concatenate([images(), images(seed=1)], axis=-1)
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


def test_the_stem_is_one_of_two():
    with pytest.raises(ValueError, match="stem='imagenet', expected '3x3' or '7x7'"):
        init(make_model(None, stem="imagenet"))


# --- for ImageNet -----------------------------------------------------------------------------

# As torchvision publishes them for 1000 classes: of its networks, batch norm included.
PUBLISHED_PARAMETERS = {
    models.ResNet18: 11_689_512,
    models.ResNet34: 21_797_672,
    models.ResNet50: 25_557_032,
    models.ResNet101: 44_549_160,
    models.ResNet152: 60_192_808,
}
STATELESS = {
    "layer norm": nn.LayerNorm,
    "RMS norm": linen.RMSNorm,
    "group norm": functools.partial(nn.GroupNorm, num_groups=2),
    "instance norm": linen.InstanceNorm,
}


def shapes(model, size, **options):
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False, **options), x
    )


@pytest.mark.parametrize("network", PUBLISHED_PARAMETERS)
def test_parameter_counts_are_the_published_ones(network):
    _, variables = shapes(network(1000), 32)
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in leaves) == PUBLISHED_PARAMETERS[network]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    assert "batch_stats" in variables


@pytest.mark.parametrize("network,expansion", [(models.ResNet18, 1), (models.ResNet50, 4)])
def test_each_stage_halves_the_image(network, expansion):
    logits, variables = shapes(network(1000, dtype=jnp.bfloat16), 224, capture_intermediates=True)
    assert logits == jax.ShapeDtypeStruct((2, 1000), jnp.float32)
    found = variables["intermediates"]
    conv, norm = (found["stem"][name]["__call__"][0] for name in ("conv", "norm"))
    assert conv == norm == jax.ShapeDtypeStruct((2, 112, 112, 64), jnp.bfloat16)
    for stage, (size, width) in enumerate([(56, 64), (28, 128), (14, 256), (7, 512)]):
        expected = jax.ShapeDtypeStruct((2, size, size, width * expansion), jnp.bfloat16)
        blocks = [name for name in found if name.startswith(f"stage{stage}_")]
        assert len(blocks) == network.keywords["stage_sizes"][stage]
        for block in blocks:
            assert found[block]["__call__"] == (expected,)


def test_logits_are_computed_in_float32():
    model = make_model(None, dtype=jnp.bfloat16)
    captured = dict(capture_intermediates=True, mutable=["intermediates"])
    apply = jax.jit(functools.partial(model.apply, train=False, **captured))
    logits, found = apply(init(model), images())
    (last,) = found["intermediates"]["stage1_block0"]["__call__"]
    assert last.dtype == jnp.bfloat16
    classifier = init(model)["params"]["classifier"]
    expected = np.float64(last).mean((1, 2)) @ np.float64(classifier["kernel"])
    assert_close(logits, expected, dtype=jnp.float32)


def small_imagenet(norm, **options):
    attributes = dict(stage_sizes=(1, 1), widths=(4, 6), block=models.Bottleneck, stem="7x7")
    return make_model(norm, **attributes, **options)


def define_norm(params, stats, x):
    x, scale, bias, mean, var = (
        np.float64(one) for one in (x, params["scale"], params["bias"], stats["mean"], stats["var"])
    )
    return jnp.float32((x - mean) / np.sqrt(var + 1e-5) * scale + bias)


def define_conv_norm(variables, x, strides=1, padding=(0, 0), groups=1):
    """A convolution by JAX's own, and batch norm of running statistics from its formula."""
    params, stats = variables["params"], variables.get("batch_stats", {})
    x = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (strides, strides), (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip
    return define_norm(params["norm"], stats["norm"], x) if "norm" in params else x


def part_of(variables, name):
    return {kind: tree[name] for kind, tree in variables.items() if name in tree}


def define_plain(layer, x, strides, padding):
    y = nn.relu(layer("ConvNorm_0", x, strides, padding))
    return nn.relu(layer("ConvNorm_1", y, 1, (1, 1)))


def define_depthwise(layer, x, strides, padding):
    y = nn.relu(layer("ConvNorm_0", x, strides, padding, x.shape[-1]))
    return nn.relu(layer("ConvNorm_1", y))


def define_basic(layer, x, strides, padding):
    y = nn.relu(layer("ConvNorm_0", x, strides, padding))
    return nn.relu(layer("ConvNorm_1", y, 1, (1, 1)) + layer("shortcut", x, strides))


def define_bottleneck(layer, x, strides, padding):
    y = nn.relu(layer("ConvNorm_0", x))
    y = nn.relu(layer("ConvNorm_1", y, strides, padding))
    return nn.relu(layer("ConvNorm_2", y) + layer("shortcut", x, strides))


def define_pre_activation(layer, x, strides, padding):
    activated = nn.relu(layer("norm", x))
    y = nn.relu(layer("ConvNorm_0", activated, strides, padding))
    return layer("ConvNorm_1", y, 1, (1, 1)) + layer("shortcut", activated, strides)


def define_fixup(block, params, x, strides, padding):
    """Fixup's blocks in float64: scalars in the order of their use."""
    scalars = iter(params[f"Scalar_{number}"] for number in range(len(params)))

    def add(x):
        return np.float64(x) + np.float64(next(scalars)["bias"])

    def conv(name, x, *how):
        assert set(params[name]["conv"]) == {"kernel"}
        return define_conv_norm({"params": params[name]}, x, *how)

    if block is models.PreActivationBlock:
        taken = activated = np.maximum(add(x), 0)
    else:
        taken, activated = x, x
    y = activated
    places = {
        3: [(1, (0, 0)), (strides, padding), (1, (0, 0))],
        2: [(strides, padding), (1, (1, 1))],
    }
    for number, how in enumerate(places[3 if block is models.Bottleneck else 2]):
        y = conv(f"ConvNorm_{number}", add(np.maximum(add(y), 0) if number else y), *how)
    y = np.float64(y) * np.float64(next(scalars)["scale"])
    y = y + conv("shortcut", add(taken), strides)
    return y if block is models.PreActivationBlock else np.maximum(add(y), 0)


BLOCKS = {
    models.PlainBlock: define_plain,
    models.DepthwiseBlock: define_depthwise,
    models.BasicBlock: define_basic,
    models.Bottleneck: define_bottleneck,
    models.PreActivationBlock: define_pre_activation,
}


def define_block(block, variables, x, strides, padding):
    def layer(name, x, *how):
        part = part_of(variables, name)
        if name == "norm":
            return define_norm(part["params"], part["batch_stats"], x)
        return define_conv_norm(part, x, *how)

    return BLOCKS[block](layer, x, strides, padding)


@pytest.mark.parametrize("padding,left", [("SAME", 0), ("symmetric", 1)])
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_as_defined(block, padding, left):
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 8, 8, 3)), jnp.float32)
    layer = block(5, (2, 2), norm=BATCH_NORM, padding=padding)
    variables = far_from_initial(layer.init(jax.random.key(0), x, train=False))
    found = layer.apply(variables, x, train=False)
    assert_close(found, define_block(block, variables, x, 2, (left, 1)), tolerance=2e-5)
    biases = {path[-2] for path in names(variables["params"]) if path[-1] == "bias"}
    assert biases == {"norm"}


def test_a_pre_activation_network_normalizes_after_its_last_block():
    attributes = dict(block=models.PreActivationBlock, pre_activation=True)
    model, x = make_model(BATCH_NORM, **attributes), images()
    variables = far_from_initial(init(model))
    assert set(variables["params"]["stem"]) == {"conv"}
    y = define_conv_norm(part_of(variables, "stem"), x, 1, (1, 1))
    for name, strides in (("stage0_block0", 1), ("stage1_block0", 2)):
        block = models.PreActivationBlock(4 * strides, (strides, strides), BATCH_NORM)
        y = block.apply(part_of(variables, name), y, train=False)
    y = nn.relu(define_norm(variables["params"]["norm"], variables["batch_stats"]["norm"], y))
    classifier = variables["params"]["classifier"]
    expected = np.asarray(y).mean((1, 2)) @ classifier["kernel"] + classifier["bias"][None]
    assert_close(apply_eval(model, variables, x), expected, tolerance=2e-5)
    biases = {path[-2] for path in names(variables["params"]) if path[-1] == "bias"}
    assert biases == {"norm", "classifier"}


@pytest.mark.parametrize("block", [models.BasicBlock, models.PreActivationBlock])
def test_the_image_does_not_decide_about_shortcuts(block):
    model = make_model(BATCH_NORM, widths=(4, 4), block=block)
    small, large = (
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
        for x in (images()[:, :1, :1], images())
    )
    assert small == large and "shortcut" in large["params"]["stage1_block0"]


def test_norms_keep_the_initial_scale_that_they_are_given():
    norm = functools.partial(BATCH_NORM, scale_init=nn.initializers.constant(0.5))
    params = init(make_model(norm))["params"]
    assert_close(params["stem"]["norm"]["scale"], np.full(4, 0.5))
    last = params["stage0_block0"]["ConvNorm_1"]["norm"]["scale"]
    np.testing.assert_array_equal(last, np.zeros(4))


def test_padding_is_one_of_two():
    with pytest.raises(ValueError, match="padding='VALID', expected 'SAME' or 'symmetric'"):
        init(make_model(None, padding="VALID"))


@pytest.mark.parametrize("padding,left", [("SAME", 0), ("symmetric", 1)])
def test_an_imagenet_network_is_version_one_and_a_half(padding, left):
    model = small_imagenet(BATCH_NORM, padding=padding)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 28, 28, 2)), jnp.float32)
    variables = far_from_initial(init(model))
    y = nn.relu(define_conv_norm(part_of(variables, "stem"), x, 2, (3, 3)))
    assert y.shape == (2, 14, 14, 4)
    padded = jnp.pad(y, ((0, 0), (left, 1), (left, 1), (0, 0)))
    windows = [padded[:, i : i + 13 : 2, j : j + 13 : 2] for i in range(3) for j in range(3)]
    y = functools.reduce(jnp.maximum, windows)
    block = functools.partial(define_block, models.Bottleneck)
    y = block(part_of(variables, "stage0_block0"), y, 1, (1, 1))
    assert y.shape[1] == 7
    y = block(part_of(variables, "stage1_block0"), y, 2, (1, 1))
    classifier = variables["params"]["classifier"]
    kernel, bias = (np.float64(classifier[name]) for name in ("kernel", "bias"))
    expected = np.float64(y).mean((1, 2)) @ kernel + bias
    assert_close(apply_eval(model, variables, x), expected, dtype=jnp.float32)


def test_flax_batch_norm_makes_the_same_network():
    ours = small_imagenet(BATCH_NORM)
    flax = small_imagenet(functools.partial(nn.BatchNorm, momentum=0.9))
    chex.assert_trees_all_equal(init(ours), init(flax))
    variables = far_from_initial(init(ours))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 16, 16, 2)), jnp.float32)
    found, expected = (apply_train(model, variables, x) for model in (ours, flax))
    assert_close(found, expected, tolerance=5e-5)


@pytest.mark.parametrize("norm", STATELESS.values(), ids=STATELESS)
def test_a_norm_without_state_takes_neither_mode_nor_mask(norm):
    model = make_model(norm, stage_sizes=(1,), widths=(4,))
    variables = init(model)
    assert set(variables) == {"params"}
    expected = apply_eval(model, variables, images())
    found, updates = apply_train(model, variables, images(), jnp.arange(8) < 5)
    assert updates == {}
    assert_close(found, expected)


def test_a_norm_that_is_set_to_its_running_statistics_stays_so():
    frozen = functools.partial(BATCH_NORM, use_running_average=True)
    model = make_model(frozen, stage_sizes=(1,), widths=(4,))
    variables = far_from_initial(init(model))
    found, updates = apply_train(model, variables, images())
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])
    assert_close(found, apply_eval(model, variables, images()))


def test_a_model_of_another_package_with_our_norms():
    model = jax_resnet.ResNet(
        jax_resnet.ResNetBlock, stage_sizes=[1], n_classes=3, hidden_sizes=(4,),
        stem_cls=lambda conv_block_cls: conv_block_cls(4),
        conv_block_cls=functools.partial(jax_resnet.ConvBlock, force_conv_bias=True),
    )  # fmt: skip
    x, key = standard_normal(86, (4, 8, 8, 3)), jax.random.key(0)
    init = jax.jit(model.init)
    train = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]))
    variables = init(key, x)
    # What a convolution adds, the norm after it takes away.
    shifted = jax.tree.map_with_path(
        lambda path, leaf: leaf + 1e4 * ("Conv_0" in str(path) and leaf.ndim == 1), variables
    )
    near, far = train(variables, x), train(shifted, x)
    chex.assert_trees_all_equal(linen.replace_norms(init)(key, x), variables)
    train_ours = linen.replace_norms(train)
    ours_near, ours_far = train_ours(variables, x), train_ours(shifted, x)
    assert_close(ours_near, near)
    assert_close(ours_far[0], near[0], tolerance=1e-2)
    assert not np.abs(far[0] - near[0]).max() < 0.1


# --- residual branches without norm -----------------------------------------------------------


RESIDUAL = (models.BasicBlock, models.Bottleneck, models.PreActivationBlock)


@pytest.mark.parametrize("depth,layers", [(1, 2), (16, 2), (16, 3), (54, 4)])
def test_fixup_scales_by_depth_and_layers(depth, layers):
    initial = models.fixup_normal(depth, layers)(jax.random.key(0), (3, 3, 50, 400))
    expected = np.sqrt(2 / (9 * 50)) * depth ** (-1 / (2 * layers - 2))
    assert float(jnp.std(initial)) == pytest.approx(expected, rel=5 / np.sqrt(initial.size))


@pytest.mark.parametrize("depth,layers", [(0, 2), (5, 1)])
def test_fixup_needs_blocks_of_two_layers(depth, layers):
    with pytest.raises(ValueError, match=f"depth={depth} and layers={layers}, expected depth of"):
        models.fixup_normal(depth, layers)


@pytest.mark.parametrize("branch_init", ["skipinit", "fixup"])
@pytest.mark.parametrize("block", RESIDUAL)
def test_blocks_without_norm_start_as_their_shortcut(block, branch_init):
    block = block(1 if block is models.Bottleneck else 4, branch_init=branch_init, depth=3)
    x = jnp.concatenate([images(), images(seed=1)], axis=-1)
    variables = block.init(jax.random.key(0), x, train=False)
    y = block.apply(variables, x, train=True)
    np.testing.assert_array_equal(
        y, x if isinstance(block, models.PreActivationBlock) else nn.relu(x)
    )


@pytest.mark.parametrize("block", RESIDUAL)
def test_fixup_blocks_are_as_defined(block):
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 8, 8, 3)), jnp.float32)
    layer = block(5, (2, 2), branch_init="fixup", depth=16, padding="symmetric")
    params = layer.init(jax.random.key(0), x, train=False)["params"]
    kernels = [np.asarray(params[name]["conv"]["kernel"]) for name in sorted(params) if "C" in name]
    convs = 3 if block is models.Bottleneck else 2
    for kernel in kernels[: convs - 1]:
        he = np.sqrt(2 / np.prod(kernel.shape[:-1]))
        exponent = -1 / (2 * convs - 2)
        few = 4 / np.sqrt(2 * kernel.size)
        assert kernel.std() == pytest.approx(he * 16**exponent, rel=few)
    assert not kernels[convs - 1].any() and params["shortcut"]["conv"]["kernel"].any()
    params = far_from_initial(params)
    expected = define_fixup(block, params, x, 2, (1, 1))
    assert_close(layer.apply({"params": params}, x, train=False), expected, tolerance=2e-5)


def test_skipinit_multiplies_the_branch():
    x = images()
    layer = models.BasicBlock(5, (2, 2), branch_init="skipinit")
    params = far_from_initial(layer.init(jax.random.key(0), x, train=False)["params"])
    params["Scalar_0"]["scale"] = jnp.float32(0.37)

    def conv(name, x, *how):
        y = define_conv_norm({"params": params[name]}, x, *how)
        return y + params[name]["conv"]["bias"].reshape(1, 1, 1, -1)

    y = conv("ConvNorm_1", nn.relu(conv("ConvNorm_0", x, 2, (0, 1))), 1, (1, 1))
    expected = np.maximum(conv("shortcut", x, 2) + 0.37 * y, 0)
    assert_close(layer.apply({"params": params}, x, train=False), expected, tolerance=2e-5)


def test_a_network_tells_its_blocks_how_many_they_are():
    plain, fixup = (
        init(make_model(None, **options))["params"] for options in ({}, {"branch_init": "fixup"})
    )
    for stage in ("stage0_block0", "stage1_block0"):
        kernels = [params[stage]["ConvNorm_0"]["conv"]["kernel"] for params in (plain, fixup)]
        assert_close(kernels[1], np.float64(kernels[0]) / np.sqrt(2))
    assert not fixup["classifier"]["kernel"].any()
    assert_close(fixup["stem"], plain["stem"])


@pytest.mark.parametrize("make", [make_model, models.ResidualMLP])
def test_branches_start_in_one_of_three_ways(make):
    def start(norm, branch_init):
        options = {"norm": norm, "branch_init": branch_init}
        model = make(**options) if make is make_model else make(2, 3, 5, **options)
        x = images(4) if make is make_model else images(4)[:, 0, 0]
        jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))

    with pytest.raises(ValueError, match="branch_init='zero', expected 'plain', 'skipinit' or 'f"):
        start(None, "zero")
    with pytest.raises(ValueError, match=r"(?s)branch_init='skipinit' is there instead.*norm=None"):
        start(BATCH_NORM, "skipinit")


def test_blocks_without_shortcut_have_no_branches_to_start():
    model = make_model(norm=None, branch_init="fixup", block=models.PlainBlock)
    with pytest.raises(
        ValueError, match=r"branch_init='fixup' starts.*PlainBlock'> has none: pass"
    ):
        jax.eval_shape(lambda: model.init(jax.random.key(0), images(4), train=False))


# --- fully connected ----------------------------------------------------------------------------


MLPS = {
    "batch norm": {"norm": BATCH_NORM},
    "plain": {},
    "skipinit": {"branch_init": "skipinit"},
    "fixup": {"branch_init": "fixup"},
}


def rows(examples=9, seed=0):
    return standard_normal(seed, (examples, 4)) + 0.5


def make_mlp(name, **options):
    return models.ResidualMLP(3, 6, 5, **MLPS[name], **options)


@functools.cache
def init_mlp(model):
    return jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), rows(2))


@functools.partial(jax.jit, static_argnums=0)
def apply_mlp(model, variables, x, mask=None):
    mutable = ["batch_stats", "intermediates"]
    return model.apply(variables, x, train=True, mask=mask, mutable=mutable)


def define_mlp(variables, x):
    """The stream and the logits in float64, batch norm by the statistics of the batch."""
    params = jax.tree.map(np.float64, variables["params"])

    def norm(own, name, x):
        if name not in own:
            return x
        scale, bias = own[name]["scale"], own[name]["bias"]
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * scale + bias

    def dense(own, name, x):
        return x @ own[name]["kernel"] + own[name].get("bias", 0)

    def add(own, number, x):
        return x + own.get(f"Scalar_{number}", {}).get("bias", 0)

    stream = [dense(params, "stem", np.float64(x))]
    for block in range(3):
        own = jax.tree.map(lambda leaf, block=block: leaf[block], params["block"])
        y = stream[-1]
        for layer in range(2):
            y = np.maximum(add(own, 2 * layer, norm(own, f"norm_{layer}", y)), 0)
            y = dense(own, f"dense_{layer}", add(own, 2 * layer + 1, y))
        last = own.get("Scalar_4", own.get("Scalar_0", {}))
        stream.append(stream[-1] + last.get("scale", 1) * y)
    x = np.maximum(add(params, 0, norm(params, "norm", stream[-1])), 0)
    return np.stack(stream), dense(params, "classifier", add(params, 1, x))


@pytest.mark.parametrize("name", MLPS)
def test_a_residual_mlp_is_as_defined(name, compile_quickly):
    model = make_mlp(name)
    variables = init_mlp(model)
    _, found = apply_mlp(model, variables, rows())
    stream = np.asarray(found["intermediates"]["stream"][0])
    if model.branch_init != "plain":
        np.testing.assert_array_equal(stream, np.broadcast_to(stream[0], stream.shape))
    variables = variables | {"params": far_from_initial(variables["params"])}
    logits, found = apply_mlp(model, variables, rows())
    expected_stream, expected = define_mlp(variables, rows())
    (stream,) = found["intermediates"]["stream"]
    assert_close((stream, logits), (expected_stream, expected), dtype=jnp.float32, tolerance=2e-5)


@pytest.mark.parametrize("name", ["batch norm", "fixup"])
def test_a_residual_mlp_leaves_masked_rows_out(name, compile_quickly):
    model = make_mlp(name)
    variables = init_mlp(model)
    mask = jnp.arange(9) < 5
    other = jnp.where(mask[:, None], rows(), 100.0)
    logits, updates = apply_mlp(model, variables, other, mask)
    expected, expected_updates = apply_mlp(model, variables, rows()[:5])
    assert_close(logits[:5], expected)
    if name == "batch norm":
        assert_close(updates["batch_stats"], expected_updates["batch_stats"])


@pytest.mark.parametrize("name", ["batch norm", "skipinit", "fixup"])
def test_a_residual_mlp_computes_in_its_dtype(name):
    model, reference = make_mlp(name, dtype=jnp.bfloat16), make_mlp(name)
    variables = init_mlp(reference)
    logits, found = jax.eval_shape(functools.partial(apply_mlp, model), variables, rows())
    assert logits.dtype == jnp.float32
    assert found["intermediates"]["stream"][0].dtype == jnp.bfloat16
    init = jax.eval_shape(lambda: model.init(jax.random.key(0), rows(2), train=False))
    assert {leaf.dtype for leaf in jax.tree.leaves(init)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", ["skipinit", "fixup"])
def test_training_moves_the_scalars(name, compile_quickly):
    """Fixup's after the classifier, which moves in the first step, and the last kernels."""
    model, labels = make_mlp(name), jnp.arange(9) % 5

    @jax.jit
    def step(params):
        def loss(params):
            logits = model.apply({"params": params}, rows(), train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda leaf, own: leaf - 0.1 * own, params, gradient)

    params, losses, moved = init_mlp(model)["params"], [], []
    last = params["block"].keys() & {"Scalar_4"} or {"Scalar_0"}
    for _ in range(4):
        value, params = step(params)
        losses.append(value)
        scale = params["block"][min(last)]["scale"]
        moved.append(bool((scale != (0 if name == "skipinit" else 1)).all()))
    assert losses == sorted(losses, reverse=True)
    assert moved[:2] == [name == "skipinit"] * 2 and moved[3]


@pytest.mark.parametrize(
    "name,growth", [("plain", lambda block: 2**block), ("batch norm", lambda block: block + 1)]
)
def test_second_moments_grow_with_depth(name, growth):
    depth, seeds = 3, 8
    model = models.ResidualMLP(depth, 512, 5, **MLPS[name])
    x = standard_normal(0, (128, 64))
    x = x / jnp.sqrt(jnp.mean(x**2))

    @jax.jit
    @jax.vmap
    def measure(key):
        mutable = ["params", "batch_stats", "intermediates"]
        _, found = model.init_with_output(key, x, train=True, mutable=mutable)
        return jnp.mean(found["intermediates"]["stream"][0] ** 2, axis=(1, 2))

    found = np.float64(measure(jax.random.split(jax.random.key(1), seeds)))
    error = found.std(0, ddof=1) / np.sqrt(seeds)
    expected = growth(np.arange(depth + 1))
    assert (np.abs(found.mean(0) - expected) < 4 * error).all()
    assert (error < 0.03 * expected).all()
