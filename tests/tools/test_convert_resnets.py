"""A state dict with the names of torchvision, loaded in one call."""

import functools

import jax
import jax.numpy as jnp
import jax_resnet
import numpy as np
import pytest
from golden.convert_cases import CASES, abstract, arrays_of, assert_same
from golden.make_convert import images
from support import assert_close, quick

import bn_jax as bn
from bn_jax.lab import models

DEPTHS = (18, 34, 50, 101, 152)
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STAGES[152] = (3, 8, 36, 3)


def state_dict(depth, *, width=1, groups=1, classes=1000):
    """The shapes of a state dict of torchvision, in its order; wide networks have more inside."""
    shapes = {}

    def add(conv, norm, shape):
        shapes[f"{conv}.weight"] = shape
        kinds = ("weight", "bias", "running_mean", "running_var")
        shapes.update({f"{norm}.{kind}": shape[:1] for kind in kinds})
        shapes[f"{norm}.num_batches_tracked"] = ()

    add("conv1", "bn1", (64, 3, 7, 7))
    inputs = 64
    for stage, blocks in enumerate(STAGES[depth]):
        planes = 64 * 2**stage
        for block in range(blocks):
            start = f"layer{stage + 1}.{block}"
            inside, outputs = planes * width, planes * (4 if depth >= 50 else 1)
            if depth >= 50:
                convs = [(inside, inputs, 1, 1), (inside, inside // groups, 3, 3)]
                convs.append((outputs, inside, 1, 1))
            else:
                convs = [(outputs, inputs, 3, 3), (outputs, outputs, 3, 3)]
            for index, shape in enumerate(convs, 1):
                add(f"{start}.conv{index}", f"{start}.bn{index}", shape)
            if block == 0 and (stage > 0 or inputs != outputs):
                add(f"{start}.downsample.0", f"{start}.downsample.1", (outputs, inputs, 1, 1))
            inputs = outputs
    return shapes | {"fc.weight": (classes, inputs), "fc.bias": (classes,)}


def filled(shapes):
    """Arrays of these shapes, each of one number; they take no memory."""
    return {
        key: np.broadcast_to(np.array(index, np.int64 if "batches" in key else np.float32), shape)
        for index, (key, shape) in enumerate(shapes.items(), 1)
    }


def ours(depth):
    return getattr(models, f"ResNet{depth}")(1000), bn.convert.resnet_names, {"train": False}


def theirs(depth):
    model = getattr(jax_resnet, f"ResNet{depth}")(n_classes=1000)
    return model, bn.convert.jax_resnet_names(jax_resnet.STAGE_SIZES[depth]), {}


def assert_every_key_is_converted(shapes, model, names, options):
    """Each array of the library is read by one leaf, and comes back."""
    like = abstract(model, jnp.zeros((1, 32, 32, 3)), **options)
    arrays = filled(shapes)
    variables = bn.convert.from_library(arrays, "pytorch", like=like, names=names)
    found = sorted(float(leaf.flat[0]) for leaf in jax.tree.leaves(variables))
    counts = {index for index, key in enumerate(shapes, 1) if "batches" in key}
    assert found == sorted(set(range(1, len(shapes) + 1)) - counts)
    del variables
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(1), leaf.shape), like)
    back = bn.convert.to_library(zeros, "pytorch", names=names, like=arrays)
    assert list(back) == list(shapes)
    assert all(back[key].shape == shape for key, shape in shapes.items())


@pytest.mark.parametrize("make", [ours, theirs])
@pytest.mark.parametrize("depth", quick(DEPTHS, (18, 50)))
def test_every_array_of_torchvision_is_converted_in_one_call(make, depth):
    assert_every_key_is_converted(state_dict(depth), *make(depth))


WIDE = {
    "ResNeXt50": dict(depth=50, width=2, groups=32),
    "WideResNet50": dict(depth=50, width=2),
    "WideResNet101": dict(depth=101, width=2),
}


@pytest.mark.parametrize("name", quick(WIDE, ("ResNeXt50",)))
def test_wide_networks_of_jax_resnet(name):
    model = getattr(jax_resnet, name)(n_classes=1000)
    names = bn.convert.jax_resnet_names(jax_resnet.STAGE_SIZES[WIDE[name]["depth"]])
    assert_every_key_is_converted(state_dict(**WIDE[name]), model, names, {})


def test_the_generated_shapes_are_those_of_the_golden_file():
    for name, depth in (("ResNet18", 18), ("ResNet50", 50)):
        shapes = {key: tuple(shape) for key, shape, _ in CASES[name]["arrays"]}
        assert state_dict(depth, classes=10) == shapes
        assert list(state_dict(depth)) == list(shapes)


@pytest.mark.parametrize("name", quick(["ResNet18", "ResNet50"], ["ResNet18"]))
def test_jax_resnet_computes_what_torchvision_does(name):
    arrays, x = arrays_of(name), images(2, 64)
    depth = int(name.removeprefix("ResNet"))
    # With our norms in it the layers have the same names.
    norm = functools.partial(bn.linen.BatchNorm, momentum=0.9)
    model = getattr(jax_resnet, name)(n_classes=10, norm_cls=norm)
    names = bn.convert.jax_resnet_names(STAGES[depth])
    variables = bn.convert.from_library(arrays, "pytorch", like=abstract(model, x), names=names)
    logits = np.array(CASES[name]["y"])
    y = jax.jit(functools.partial(model.apply, mutable=False))(variables, x)
    assert_close(y / abs(logits).max(), logits / abs(logits).max())
    assert_same(bn.convert.to_library(variables, "pytorch", names=names, like=arrays), arrays)


def test_other_layers_keep_their_path():
    names = bn.convert.jax_resnet_names((1, 1))
    for layer in ("layers_1/ConvBlock_0/Conv_0", "layers_4/ConvBlock_0/Conv_0", "head/Dense_0"):
        assert names(layer) == layer.replace("/", ".")
    assert names("layers_3/ConvBlock_0/Conv_0") == "layer2.0.conv1"
