"""Models of the zoo in Haiku, Keras and Equinox."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.zoo.imports import load
from benchmarks.zoo.specimens import (
    CHANNELS,
    CLASSES,
    SIZE,
    Entry,
    Functional,
    Specimen,
    filled,
    images,
    in_double,
    perturbed,
    population_statistics,
)

# --- Haiku --------------------------------------------------------------------------------------


def _haiku(name: str, make: Callable[[Any], Any]) -> Specimen:
    """Returns a specimen of a network that ``make(haiku)`` builds."""
    hk = load("haiku")
    transformed = hk.without_apply_rng(
        hk.transform_with_state(lambda x, is_training: make(hk)(x, is_training))
    )
    data = images()
    norms = set()

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, hk.BatchNorm) and context.method_name == "__call__":
            norms.add(context.module.module_name)
        return call(*args, **kwargs)

    with hk.intercept_methods(note):
        jax.eval_shape(lambda: transformed.init(jax.random.key(0), *data, True))
    params, state = jax.jit(lambda: transformed.init(jax.random.key(0), *data, True))()

    def train(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        return transformed.apply(params, state, *batch, True)

    def evaluate(params: Any, state: Any, batch: Any) -> Any:
        return transformed.apply(params, state, *batch, False)[0]

    model = _with_statistics(Functional(perturbed(params), state, train, evaluate), data)
    return Specimen(
        name=name,
        package="dm-haiku",
        library="Haiku",
        model=model,
        forward=lambda variables, batch: evaluate(variables["params"], variables["state"], batch),
        variables={"params": model.params, "state": model.statistics},
        double=model,
        norms=frozenset(norms),
        other_norms=frozenset(),
        data=data,
    )


def _with_statistics(model: Functional, data: Any) -> Functional:
    """Returns a model after one step of averages that are divided by ``1 - momentum**steps``."""
    # Equinox begins with the variance 1, which the division takes for a 0.
    zeros = jax.tree.map(lambda leaf: filled(leaf, 0), model.statistics)
    return model._replace(statistics=jax.jit(model.train)(model.params, zeros, data)[1])


def _haiku_resnet(version: int, hk: Any) -> Any:
    return hk.nets.ResNet(
        blocks_per_group=(1, 1, 1, 1),
        num_classes=CLASSES,
        resnet_v2=version == 2,
        bottleneck=version == 2,
        channels_per_group=(16, 16, 24, 24),
        use_projection=(True, False, True, False),
        strides=(1, 1, 2, 1),
        logits_config={"w_init": hk.initializers.VarianceScaling()},
        initial_conv_config={"output_channels": 16, "kernel_shape": 3},
    )


def _haiku_mobilenet(hk: Any) -> Any:
    return hk.nets.MobileNetV1(strides=(1, 2, 1), channels=(16, 24, 24), num_classes=CLASSES)


# --- Keras --------------------------------------------------------------------------------------


def _keras(name: str, make: Callable[[Any], Any]) -> Specimen:
    """Returns a specimen of a model that ``make(keras)`` builds."""
    keras = load("keras")
    assert keras.backend.backend() == "jax", "Keras needs KERAS_BACKEND=jax"
    keras.utils.set_random_seed(0)
    network = make(keras)
    trainable = {weight.path: weight.value for weight in network.trainable_variables}
    others = {weight.path: weight.value for weight in network.non_trainable_variables}
    data = images()
    model = _functional(network)._replace(params=perturbed(trainable), statistics=others)
    with jax.enable_x64(True), _float64(keras):
        double = _functional(make(keras))
        params, statistics, batch = in_double((model.params, others, data))
        found = jax.device_get(
            population_statistics(double._replace(params=params, statistics=statistics), batch)
        )
    statistics = {
        path: jnp.asarray(found[path], value.dtype) if "moving_" in path else value
        for path, value in others.items()
    }
    norms = {
        layer.path for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)
    }
    return Specimen(
        name=name,
        package="keras",
        library="Keras",
        model=model._replace(statistics=statistics),
        forward=lambda variables, batch: model.evaluate(variables, variables, batch),
        variables={**model.params, **statistics},
        double=double,
        norms=frozenset(norms),
        other_norms=frozenset(),
        data=data,
    )


@contextmanager
def _float64(keras: Any) -> Iterator[None]:
    """Gives new layers the dtype float64, and the names that they had before."""
    keras.utils.clear_session()
    _compute_in(keras, "float64")
    try:
        yield
    finally:
        _compute_in(keras, "float32")


def _compute_in(keras: Any, dtype: str) -> None:
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)


def _functional(network: Any) -> Functional:
    """Returns a model of Keras as functions of its weights by their paths."""
    trainable = [weight.path for weight in network.trainable_variables]
    others = [weight.path for weight in network.non_trainable_variables]

    def call(is_training: bool, params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        ordered = [params[path] for path in trainable], [state[path] for path in others]
        y, updated = network.stateless_call(*ordered, *batch, training=is_training)
        return y, dict(zip(others, updated, strict=True))

    def evaluate(params: Any, state: Any, batch: Any) -> Any:
        return call(False, params, state, batch)[0]

    return Functional(None, None, partial(call, True), evaluate)


_WITHOUT_WEIGHTS = {
    "weights": None,
    "input_shape": (SIZE, SIZE, CHANNELS),
    "classes": CLASSES,
    "classifier_activation": None,
}


def _keras_mobilenet(keras: Any) -> Any:
    return keras.applications.MobileNetV2(alpha=0.1, **_WITHOUT_WEIGHTS)


def _keras_efficientnet(keras: Any) -> Any:
    module = load("keras.src.applications.efficientnet")
    blocks = [{**block, "repeats": 1} for block in module.DEFAULT_BLOCKS_ARGS[:3]]
    return module.EfficientNet(
        0.25,
        1.0,
        SIZE,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        blocks_args=blocks,
        **_WITHOUT_WEIGHTS,
    )


def _keras_densenet(keras: Any) -> Any:
    module = load("keras.src.applications.densenet")
    return module.DenseNet([2, 1, 1, 1], **_WITHOUT_WEIGHTS)


# --- Equinox ------------------------------------------------------------------------------------


def equinox_network() -> Specimen:
    """A residual network of Equinox's own layers, which come with no model that has batch norms."""
    import equinox as eqx

    class Network(eqx.Module):
        layers: list[Any]
        shortcut: Any
        logits: Any

        def __init__(self, key: jax.Array) -> None:
            keys = iter(jax.random.split(key, 8))

            def convolution(inputs: int, outputs: int, size: int, **options: Any) -> Any:
                return eqx.nn.Conv2d(inputs, outputs, size, key=next(keys), **options)

            def norm(features: int) -> Any:
                return eqx.nn.BatchNorm(features, axis_name="batch", mode="batch")

            self.layers = [
                [convolution(CHANNELS, 16, 3, stride=2, padding=1, use_bias=False), norm(16)],
                [convolution(16, 16, 3, padding=1, groups=16, use_bias=False), norm(16)],
                [convolution(16, 24, 1, stride=2), norm(24)],
            ]
            self.shortcut = [convolution(16, 24, 1, stride=2, use_bias=False), norm(24)]
            self.logits = eqx.nn.Linear(24, CLASSES, key=next(keys))

        def __call__(self, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
            x = jnp.moveaxis(x, -1, 0)
            between = []
            for number, (convolution, norm) in enumerate(self.layers):
                between.append(x)
                x, state = norm(convolution(x), state)
                x = jax.nn.relu(x) if number < 2 else x
            shortcut, state = self.shortcut[1](self.shortcut[0](between[1]), state)
            x = jax.nn.relu(x + shortcut)
            return self.logits(jnp.mean(x, axis=(1, 2))), state

    network, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    data = images()

    def call(is_training: bool, params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        model = eqx.nn.inference_mode(eqx.combine(params, static), not is_training)
        return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            *batch, state
        )

    def evaluate(params: Any, state: Any, batch: Any) -> Any:
        return call(False, params, state, batch)[0]

    model = _with_statistics(
        Functional(perturbed(params), state, partial(call, True), evaluate), data
    )
    nodes = jax.tree.leaves_with_path(
        network, is_leaf=lambda node: isinstance(node, eqx.nn.BatchNorm)
    )
    norms = {
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, node in nodes
        if isinstance(node, eqx.nn.BatchNorm)
    }
    return Specimen(
        name="Equinox residual network",
        package="equinox",
        library="Equinox",
        model=model,
        forward=lambda variables, batch: evaluate(variables["params"], variables["state"], batch),
        variables={"params": model.params, "state": model.statistics},
        norms=frozenset(norms),
        other_norms=frozenset(),
        data=data,
    )


def haiku_resnet(version: int) -> Specimen:
    """ResNet of Haiku: v1 with basic blocks, or v2 with bottlenecks and norms before them."""
    return _haiku(f"Haiku ResNet v{version}", partial(_haiku_resnet, version))


def haiku_mobilenet() -> Specimen:
    """MobileNet of Haiku: depthwise convolutions."""
    return _haiku("Haiku MobileNet", _haiku_mobilenet)


def keras_mobilenet() -> Specimen:
    """MobileNetV2 of Keras, in its whole depth."""
    return _keras("Keras MobileNetV2", _keras_mobilenet)


def keras_efficientnet() -> Specimen:
    """EfficientNet of Keras, its first three stages."""
    return _keras("Keras EfficientNet", _keras_efficientnet)


def keras_densenet() -> Specimen:
    """DenseNet of Keras: norms before the activation, of concatenated features."""
    return _keras("Keras DenseNet", _keras_densenet)


OTHER_MODELS: Mapping[str, Entry] = {
    "Haiku ResNet v1": Entry("Haiku", partial(haiku_resnet, 1)),
    "Haiku ResNet v2": Entry("Haiku", partial(haiku_resnet, 2)),
    "Haiku MobileNet": Entry("Haiku", haiku_mobilenet),
    "Keras MobileNetV2": Entry("Keras", keras_mobilenet),
    "Keras EfficientNet": Entry("Keras", keras_efficientnet),
    "Keras DenseNet": Entry("Keras", keras_densenet),
    "Equinox residual network": Entry("Equinox", equinox_network),
}
