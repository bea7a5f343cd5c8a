"""`bn-jax convert`: a file of another library's weights becomes a file of variables of Flax."""

import json
import os
import pickle
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from golden.convert_cases import arrays_of, assert_same
from golden.make_convert import drawn
from support import files

import bn_jax as bn
from bn_jax.lab import models

save, load = bn.convert.save_safetensors, bn.convert.load_safetensors


class Net(nn.Module):
    """A convolution, a transposed one, and a norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,), name="conv")(x)
        x = nn.ConvTranspose(4, (3,), name="up")(x)
        return bn.linen.BatchNorm(use_running_average=True, name="norm")(x)


NAMES = {"conv": "features.0", "norm": "features.2"}
SHAPES = {
    "features.0.weight": (4, 3, 3),
    "features.0.bias": (4,),
    "up.weight": (4, 4, 3),
    "up.bias": (4,),
    **{f"features.2.{key}": (4,) for key in ("weight", "bias", "running_mean", "running_var")},
}
ARRAYS = {key: drawn(key, shape, "float32") for key, shape in SHAPES.items()}
OPTIONS = ("--like", "like.safetensors", "--names", "names.json")
CONVERT = ("convert", "model.safetensors", *OPTIONS, "--transposed", "up")


@pytest.fixture
def folder(tmp_path):
    """A folder with the files of the net."""
    like = jax.eval_shape(lambda: Net().init(jax.random.key(0), jnp.ones((1, 5, 3))))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)
    save(tmp_path / "like.safetensors", traverse_util.flatten_dict(zeros, sep="/"))
    save(tmp_path / "model.safetensors", ARRAYS)
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    return tmp_path


def test_the_variables_are_those_of_from_library(folder, command):
    code, out, err = command(*CONVERT)
    assert (code, err) == (0, "")
    variables = load(folder / "model-flax.safetensors")
    tree = traverse_util.unflatten_dict(variables, sep="/")
    expected = bn.convert.from_library(ARRAYS, "pytorch", like=tree, names=NAMES, transposed=["up"])
    assert_same(tree, expected)
    assert Net().apply(tree, jnp.ones((1, 5, 3))).shape == (1, 5, 4)
    first, second = out.splitlines()
    assert first == "The variables of like.safetensors: 8 arrays, 108 numbers"
    assert "Saved in model-flax.safetensors; read it with flax.traverse_util.unfl" in second
    advice = second.partition("read it with ")[2]
    os.chdir(folder)
    assert_same(eval(advice, {"flax": __import__("flax.traverse_util"), "bn_jax": bn}), tree)


@pytest.mark.parametrize("name", ["ResNet18"])
def test_a_resnet_of_torchvision_needs_no_options(tmp_path, command, name):
    arrays = arrays_of(name)
    save(tmp_path / "resnet.safetensors", arrays)
    code, out, err = command("convert", tmp_path / "resnet.safetensors", "--out", "flax.st")
    assert (code, err) == (0, "")
    assert out.startswith(f"bn_jax.lab.models.{name}(10, padding='symmetric'): 102 arrays, 11,191,")
    tree = traverse_util.unflatten_dict(load(tmp_path / "flax.st"), sep="/")
    model = getattr(models, name)(10, padding="symmetric")
    like = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    assert jax.tree.structure(tree) == jax.tree.structure(like)
    back = bn.convert.to_library(tree, "pytorch", names=bn.convert.resnet_names, like=arrays)
    assert_same(back, arrays)


def test_a_warning_is_one_line(folder, command):
    zeros = {key: 0 * array if "running" in key else array for key, array in ARRAYS.items()}
    save(folder / "model.safetensors", zeros)
    code, out, err = command(*CONVERT)
    assert code == 0 and out.count("\n") == 2
    assert err.startswith(
        "bn-jax: warning: no training step has updated the running statistics of norm"
    )
    assert err.count("\n") == 1


def without(*keys, **more):
    return {key: array for key, array in ARRAYS.items() if key not in keys} | more


def file_of(arrays):
    return lambda path: save(path, arrays)


def text(content):
    return lambda path: path.write_bytes(content)


BAD = {
    "missing": ("model.safetensors", Path.unlink, "FILE: model.safetensors is missing, expected a"),
    "a folder": (
        "model.safetensors",
        lambda path: (path.unlink(), path.mkdir()),
        "FILE: model.safetensors is no file",
    ),
    "damaged": ("model.safetensors", text(b"{}"), "FILE: model.safetensors is damaged"),
    "a pickle": (
        "model.safetensors",
        text(pickle.dumps(ARRAYS)),
        "['state_dict']: import torch, safetensors.torch; arrays = torch.load('model.saf",
    ),
    "a key is missing": (
        "model.safetensors",
        file_of(without("up.bias")),
        "FILE: model.safetensors cannot be converted: arrays does not fit the variables of Flax. "
        "missing from arrays, 1 in all: up.bias (4,) for params/up/bias. Pass names=",
    ),
    "many keys are missing": (
        "model.safetensors",
        file_of({"x": np.ones(1, np.float32)}),
        "features.2.running_var (4,) for batch_stats/norm/var, features.0.bias (4,) for params/conv"
        "/bias, features.0.weight (4, 3, 3) for params/conv/kernel, ... unknown in arrays, 1 in "
        "all: x (1,). Pass names=",
    ),
    "another like": (
        "like.safetensors",
        file_of({"params/dense/kernel": np.ones((2, 2))}),
        "names has ['conv', 'norm'], expected paths of layers in Flax",
    ),
    "like is damaged": ("like.safetensors", text(b""), "--like: like.safetensors is damaged"),
    "collections": (
        "like.safetensors",
        file_of({"params/a": np.ones(2), "cache/a": np.ones(2)}),
        "the variables have the collections ['cache', 'params']",
    ),
    "a name inside another": (
        "like.safetensors",
        file_of({"params/a": np.ones(2), "params/a/b": np.ones(2)}),
        "--like: like.safetensors has params/a/b inside of an array, expected",
    ),
    "names": ("names.json", text(b"{"), "--names: names.json cannot be read as JSON (JSONDecode"),
    "names of bytes": ("names.json", text(b"\xff"), "--names: names.json cannot be read as JSON"),
    "names is a list": ("names.json", text(b"[]"), "--names: names.json holds no mapping of str"),
    "names of numbers": ("names.json", text(b'{"a": 1}'), '{"path in Flax": "path in the lib'),
    "no names": ("names.json", Path.unlink, "--names: names.json cannot be read as JSON (FileNot"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line(folder, command, name):
    path, change, message = BAD[name]
    change(folder / path)
    assert_refused(folder, command, CONVERT, message)


def assert_refused(folder, command, arguments, message):
    before = files(folder)
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("bn-jax: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert message in err
    assert files(folder) == before


OPTIONS_REFUSED = {
    "library": ((*CONVERT, "--library", "torch"), "--library: received torch, expected one of pyt"),
    "no file": (("convert",), "Missing argument 'FILE'"),
    "no like": (
        ("convert", "model.safetensors"),
        "FILE: the arrays of model.safetensors are not those of a ResNet-18, 34, 50, 101 or 152",
    ),
    "out exists": ((*CONVERT, "--out", "names.json"), "--out: names.json exists; choose another"),
    "no folder": ((*CONVERT, "--out", "a/b.st"), "--out: a/b.st cannot be made (No such file"),
    "not told": (
        ("convert", "model.safetensors", *OPTIONS),
        "no shape or name tells whether up are Conv or ConvTranspose, whose kernels are laid out "
        "differently: pass transposed=() if none is a ConvTranspose, or the paths of all that are, "
        "for example transposed=['up']. Here, names= is --names FILE.json, and transposed= is "
        "--transposed PATH, or --transposed '' for ()",
    ),
    "told wrongly": (
        ("convert", "model.safetensors", *OPTIONS, "--transposed", "norm"),
        "transposed has 'norm', expected globs of ConvTranspose layers",
    ),
}


@pytest.mark.parametrize("name", OPTIONS_REFUSED)
def test_bad_options_are_one_line(folder, command, name):
    arguments, message = OPTIONS_REFUSED[name]
    assert_refused(folder, command, arguments, message)


def test_an_empty_pattern_says_that_nothing_is_transposed(folder, command):
    code, _, err = command("convert", "model.safetensors", *OPTIONS, "--transposed", "")
    assert (code, err) == (0, "")
    kernel = load(folder / "model-flax.safetensors")["params/up/kernel"]
    assert_same(kernel, np.ascontiguousarray(ARRAYS["up.weight"].transpose(2, 1, 0)))


def test_a_failed_write_leaves_nothing(folder, command, monkeypatch):
    before = files(folder)
    real = bn.convert.save_safetensors

    def fail(path, arrays):
        real(path, arrays)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bn_jax.convert.save_safetensors", fail)
    code, out, err = command(*CONVERT)
    assert (code, out) == (1, "")
    assert err == "bn-jax: error: [Errno 28] No space left on device; nothing was saved\n"
    assert files(folder) == before


def test_the_help_says_what_it_reads_and_writes(command):
    code, out, _ = command("convert", "--help")
    assert code == 0
    assert "Reads a safetensors file of a library's weights, and writes the variables" in " ".join(
        out.split()
    )
