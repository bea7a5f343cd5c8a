"""Checks exported models in TensorFlow, TensorFlow Lite and ONNX Runtime. Not a part of the tests.

Where these are installed, beside what bn_jax needs (`pip install ".[lab]" tensorflow jax2onnx
onnxruntime`):

    python tests/tools/exported_elsewhere.py

With JAX 0.10.2, TensorFlow 2.21.0, jax2onnx 0.17.1, onnx 1.23.2 and onnxruntime 1.32.0 on a CPU,
all of it passes: the largest difference is 3e-7 of the largest output.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import onnxruntime
import tensorflow as tf
from jax.experimental import jax2tf
from jax2onnx import to_onnx

import bn_jax as bn
from bn_jax.lab.models import ResNet

MEAN, STD = 4.8, 6.0
MODEL = ResNet(10, stage_sizes=(1, 1, 1), norm=functools.partial(bn.linen.BatchNorm, momentum=0.9))


def evaluate(variables: Any, x: Any) -> Any:
    return MODEL.apply(variables, x, train=False)


def trained(images: np.ndarray) -> Any:
    """Variables whose norms do something."""
    variables = MODEL.init(jax.random.key(0), images, train=False)
    return jax.tree.map(lambda leaf: leaf + 0.1 * abs(np.sin(3 * np.asarray(leaf) + 1)), variables)


def as_saved_model(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """From the folder alone, as the README says."""
    program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    params = dict(np.load(folder / "params.npz"))
    function = jax2tf.convert(
        lambda x: program.call(params, x),
        polymorphic_shapes=["(batch, 8, 8, 1)"],
        with_gradient=False,
    )
    module = tf.Module()
    signature = [tf.TensorSpec([None, 8, 8, 1], tf.float32)]
    module.call = tf.function(function, input_signature=signature, autograph=False)
    tf.saved_model.save(module, str(folder / "tensorflow"))
    loaded = tf.saved_model.load(str(folder / "tensorflow"))
    return lambda x: loaded.call(x).numpy()


def as_lite(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """From the SavedModel."""
    module = tf.saved_model.load(str(folder / "tensorflow"))
    concrete = module.call.get_concrete_function(tf.TensorSpec([None, 8, 8, 1], tf.float32))
    lite = tf.lite.TFLiteConverter.from_concrete_functions([concrete], module).convert()
    interpreter = tf.lite.Interpreter(model_content=lite)
    (given,), (returned,) = interpreter.get_input_details(), interpreter.get_output_details()

    def call(x: np.ndarray) -> np.ndarray:
        interpreter.resize_tensor_input(given["index"], x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(returned["index"])

    return call


def as_onnx(variables: Any) -> Callable[[np.ndarray], np.ndarray]:
    """From the function: jax2onnx does not convert programs of jax.export."""
    model = to_onnx(lambda x: evaluate(variables, (x - MEAN) / STD), inputs=[("batch", 8, 8, 1)])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]


def main() -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 16, (5, 8, 8, 1)).astype(np.float32)
    variables = trained(images)
    folded = bn.fold(evaluate, variables, images)
    models: dict[str, tuple[Callable[..., Any], Any]] = {
        "norms": (evaluate, variables),
        "folded": (folded.apply, folded.params),
    }
    expected = evaluate(variables, (images - MEAN) / STD)
    scale = np.abs(expected).max()
    calls = {"ONNX, norms": as_onnx(variables)}
    for name, (forward, arrays) in models.items():
        folder = Path(tempfile.mkdtemp(), name)
        bn.export_model(folder, forward, arrays, images, mean=MEAN, std=STD)
        calls[f"TensorFlow, {name}"] = as_saved_model(folder)
        calls[f"TensorFlow Lite, {name}"] = as_lite(folder)
    for name, call in calls.items():
        for examples in (5, 1):
            error = np.abs(call(images[:examples]) - expected[:examples]).max() / scale
            print(f"{name}, {examples} images: {error:.1e}")
            assert error < 1e-5


if __name__ == "__main__":
    main()
