"""Makes ``convert.json``: what models of other libraries compute, from weights drawn by NumPy.

The weights are drawn by key, shape and dtype (`drawn`), so that they need not be stored.

``pip install torch==2.13.0 keras==3.15.1 equinox==0.13.8 jax numpy``, then
``KERAS_BACKEND=jax python tests/golden/make_convert.py``
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

# Sizes of kernels; a model of rank n takes the first n.
CONV, GROUPED, UP = (3, 2, 4), (2, 3, 1), (3, 2, 4)
STAGES = {"ResNet18": (2, 2, 2, 2), "ResNet50": (3, 4, 6, 3)}


def drawn(key, shape, dtype):
    """An array of a model: a kernel as He et al. initialize it, or else numbers around 1."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if dtype in ("bool", "int32", "int64"):
        return rng.integers(1, 100, shape).astype(dtype)
    if sum(size > 1 for size in shape) > 1:
        inputs = shape[1:] if key.endswith("weight") else shape[:-1]
        return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(inputs))).astype(dtype)
    return rng.uniform(0.5, 1.5, shape).astype(dtype)


def images(rank, size):
    """Two images [2, *spatial, 3]."""
    return np.random.default_rng(rank).standard_normal((2, *(size,) * rank, 3)).astype(np.float32)


def sequences(sizes):
    """Query, key and value [2, time, size]."""
    rng = np.random.default_rng(sum(sizes))
    shapes = [(2, time, size) for time, size in zip((3, 4, 4), sizes, strict=True)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def described(arrays):
    """Key, shape and dtype of every array."""
    return [[key, list(array.shape), str(array.dtype)] for key, array in arrays.items()]


def torch_case(model, x):
    """Loads the drawn weights and evaluates in double precision."""
    import torch

    arrays = described({key: value.numpy() for key, value in model.state_dict().items()})
    model.load_state_dict({one[0]: torch.tensor(drawn(*one)) for one in arrays})
    with torch.no_grad():
        y = model.double().eval()(torch.tensor(np.moveaxis(x, -1, 1), dtype=torch.float64))
    return {"arrays": arrays, "y": y.tolist()}


def torch_net(rank):
    """A model with every kind of layer, the same as in the other libraries below."""
    from torch import nn

    conv, up = (getattr(nn, f"{kind}{rank}d") for kind in ("Conv", "ConvTranspose"))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(3, 4, CONV[:rank])
            self.norm = getattr(nn, f"BatchNorm{rank}d")(4)
            self.grouped = conv(4, 8, GROUPED[:rank], groups=4)
            self.up = up(8, 5, UP[:rank], stride=2)
            self.dense = nn.Linear(5, 2)

        def forward(self, x):
            x = self.grouped(self.norm(self.conv(x)).relu())
            return self.dense(self.up(x).relu().flatten(2).mean(2))

    return Net()


def torch_resnet(stages, expansion):
    """A residual network for ImageNet with the names of torchvision."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            outputs = width * expansion
            if expansion == 1:
                shapes = [(inputs, width, 3, stride), (width, width, 3, 1)]
            else:
                shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
            self.depth = len(shapes)
            for index, (ins, outs, size, strides) in enumerate(shapes, 1):
                conv = nn.Conv2d(ins, outs, size, strides, size // 2, bias=False)
                self.add_module(f"conv{index}", conv)
                self.add_module(f"bn{index}", nn.BatchNorm2d(outs))
            self.downsample = nn.Sequential()
            if stride > 1 or inputs != outputs:
                shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

        def forward(self, x):
            y = x
            for index in range(1, self.depth + 1):
                y = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(y))
                y = y if index == self.depth else y.relu()
            return (y + self.downsample(x)).relu()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            self.pool = nn.MaxPool2d(3, 2, 1)
            inputs = 64
            for stage, blocks in enumerate(stages):
                width, layers = 64 * 2**stage, []
                for index in range(blocks):
                    stride = 2 if stage > 0 and index == 0 else 1
                    layers.append(Block(inputs, width, stride))
                    inputs = width * expansion
                self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            self.fc = nn.Linear(inputs, 10)

        def forward(self, x):
            x = self.pool(self.bn1(self.conv1(x)).relu())
            for stage in range(len(stages)):
                x = getattr(self, f"layer{stage + 1}")(x)
            return self.fc(x.mean((2, 3)))

    return Net()


def attention_case(sizes, **options):
    """`torch.nn.MultiheadAttention` of 8 features and 2 heads in double precision.

    The inputs [2, time, size] have the given sizes for query, key and value.
    """
    import torch

    model = torch.nn.MultiheadAttention(
        8, 2, kdim=sizes[1], vdim=sizes[2], batch_first=True, **options
    )
    arrays = described({key: value.numpy() for key, value in model.state_dict().items()})
    model.load_state_dict({one[0]: torch.tensor(drawn(*one)) for one in arrays})
    inputs = (torch.tensor(x, dtype=torch.float64) for x in sequences(sizes))
    with torch.no_grad():
        y, _ = model.double().eval()(*inputs)
    return {"sizes": list(sizes), "arrays": arrays, "y": y.tolist()}


def keras_layers_case(x):
    """Keras: layers whose weights have other names than those of `keras_case`."""
    import keras
    from keras import layers

    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            layers.SeparableConv2D(6, (3, 2), depth_multiplier=2, name="separable"),
            layers.PReLU(shared_axes=[1, 2, 3], name="prelu"),
            layers.RMSNormalization(epsilon=1e-3, name="root_mean_square"),
            layers.LayerNormalization(center=False, name="norm"),
        ],
        name="net",
    )
    arrays = described({weight.path: weight.numpy() for weight in model.weights})
    for weight, one in zip(model.weights, arrays, strict=True):
        weight.assign(drawn(*one))
    return {"arrays": arrays, "y": np.asarray(model(x, training=False)).tolist()}


def keras_case(rank, x):
    """Keras: the model of `torch_net` in single precision, with depthwise convolutions."""
    import keras
    from keras import layers

    name = f"Conv{rank}D"
    if rank < 3:
        depthwise = getattr(layers, f"Depthwise{name}")
        grouped = depthwise(GROUPED[:rank], depth_multiplier=2, name="grouped")
    else:
        grouped = layers.Conv3D(8, GROUPED, groups=4, name="grouped")
    up = getattr(layers, f"{name}Transpose")
    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            getattr(layers, name)(4, CONV[:rank], name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            grouped,
            up(5, UP[:rank], 2, activation="relu", name="up"),
            getattr(layers, f"GlobalAveragePooling{rank}D")(),
            layers.Dense(2, name="dense"),
        ],
        name="net",
    )
    arrays = described({weight.path: weight.numpy() for weight in model.weights})
    for weight, one in zip(model.weights, arrays, strict=True):
        weight.assign(drawn(*one))
    return {"arrays": arrays, "y": np.asarray(model(x, training=False)).tolist()}


def equinox_case(rank, x, mode):
    """Equinox: the model of `torch_net` in single precision, with the statistics in the model."""
    import equinox as eqx
    import jax

    class Net(eqx.Module):
        conv: eqx.nn.Conv
        norm: eqx.nn.BatchNorm
        grouped: eqx.nn.Conv
        up: eqx.nn.ConvTranspose
        dense: eqx.nn.Linear

        def __init__(self):
            key = jax.random.key(0)
            self.conv = eqx.nn.Conv(rank, 3, 4, CONV[:rank], key=key)
            self.norm = eqx.nn.BatchNorm(4, "batch", mode=mode)
            self.grouped = eqx.nn.Conv(rank, 4, 8, GROUPED[:rank], groups=4, key=key)
            self.up = eqx.nn.ConvTranspose(rank, 8, 5, UP[:rank], 2, key=key)
            self.dense = eqx.nn.Linear(5, 2, key=key)

        def __call__(self, x, state):
            x, _ = self.norm(self.conv(x), state)
            x = jax.nn.relu(self.up(self.grouped(jax.nn.relu(x))))
            return self.dense(x.reshape(5, -1).mean(1))

    def is_index(node):
        return isinstance(node, eqx.nn.StateIndex)

    model, state = eqx.nn.make_with_state(Net)()
    whole = jax.tree.map(lambda n: state.get(n) if is_index(n) else n, model, is_leaf=is_index)
    leaves = jax.tree.leaves_with_path(eqx.filter(whole, eqx.is_array))
    separated: Any = {"simple": True, "separator": "."}
    arrays = described({jax.tree_util.keystr(path, **separated): leaf for path, leaf in leaves})
    values = {one[0]: jax.numpy.asarray(drawn(*one)) for one in arrays}

    def given(path, node):
        key = jax.tree_util.keystr(path, **separated)
        return values.get(key, node)

    model = jax.tree_util.tree_map_with_path(given, model)
    norm = model.norm
    if mode == "batch":
        pair = tuple(values[f"norm.batch_state_index.{index}"] for index in range(2))
        state = state.set(norm.batch_state_index, pair)
        state = state.set(norm.batch_counter, int(values["norm.batch_counter"]))
    else:
        pair = tuple(values[f"norm.ema_state_index.{index}"] for index in range(2))
        state = state.set(norm.ema_state_index, pair)
    model = eqx.nn.inference_mode(model)
    y = jax.vmap(lambda one: model(one, state), axis_name="batch")(np.moveaxis(x, -1, 1))
    return {"arrays": arrays, "y": y.tolist()}


def main():
    """Writes the file."""
    cases = {
        name: torch_case(torch_resnet(stages, 1 if name == "ResNet18" else 4), images(2, 64))
        for name, stages in STAGES.items()
    }
    for rank in (1, 2, 3):
        x = images(rank, 6)
        cases[f"pytorch {rank}"] = torch_case(torch_net(rank), x)
        cases[f"keras {rank}"] = keras_case(rank, x)
        cases[f"equinox {rank}"] = equinox_case(rank, x, "batch")
        cases[f"equinox-ema {rank}"] = equinox_case(rank, x, "ema")
    cases["attention packed"] = attention_case((8, 8, 8))
    cases["attention packed, no bias"] = attention_case((8, 8, 8), bias=False)
    cases["attention of three sizes"] = attention_case((8, 6, 5))
    cases["keras layers"] = keras_layers_case(images(2, 5))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    Path(__file__).with_name("convert.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
