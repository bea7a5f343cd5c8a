"""Exported models: folders that compute the same in a process without this library."""

import hashlib
import json
import re
import subprocess
import sys

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import assert_close, exact, far_from_initial, standard_normal

import bn_jax as bn

pytestmark = pytest.mark.usefixtures("compile_quickly")

MEAN, STD = np.array([100.0, 20.0, 7.0]), np.array([9.0, 3.0, 0.5])
FILES = ["README.md", "model.json", "model.stablehlo", "params.npz"]
NAMES = ["cat", "dog", "ox", "Übergröße"]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = bn.linen.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(4)(nn.relu(x).mean((1, 2)))


def pixels(examples, seed=0):
    x = np.random.default_rng(seed).standard_normal((examples, 6, 5, 3))
    return (MEAN + STD * x).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    return far_from_initial(Net().init(jax.random.key(0), jnp.ones((1, 6, 5, 3))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, variables):
    """A model with everything that a folder can hold."""
    folder = tmp_path_factory.mktemp("exported") / "a/b"
    options = {"mean": MEAN, "std": STD, "class_names": NAMES}
    bn.export_model(folder, Net().apply, variables, jnp.zeros((2, 6, 5, 3)), **options)
    return folder


def expected_of(variables, x):
    """The model on input that NumPy has standardized in float64."""
    return Net().apply(variables, ((exact(x) - MEAN) / STD).astype(np.float32))


# --- without this library -----------------------------------------------------------------------

# The lines of the README, in a process in which nothing that is installed can be imported but JAX,
# NumPy, flatbuffers, and what JAX itself needs.
ALONE = """
import importlib, importlib.metadata, re, sys
ALLOWED = {"jax", "jaxlib", "numpy", "flatbuffers", "ml_dtypes", "opt_einsum", "scipy"}
installed = {"bn_jax", *importlib.metadata.packages_distributions()} - ALLOWED
sys.modules.update(dict.fromkeys(installed - sys.modules.keys()))
for refused in ("bn_jax", "flax", "safetensors"):
    try:
        importlib.import_module(refused)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{refused} can be imported")
readme = open("README.md", encoding="utf-8").read()
(lines,) = re.findall("```python\\n(.*?)```", readme, re.DOTALL)
exec(lines)
assert y.shape == (2, 4), y.shape
import numpy as np
np.save(sys.argv[2], program.call(params, np.load(sys.argv[1])))
print(len(lines.splitlines()))
"""


def run_alone(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", ALONE, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_lines_of_the_readme_run_without_this_library(folder, variables, tmp_path):
    x = pixels(7)
    np.save(tmp_path / "x.npy", x)
    assert run_alone(folder, tmp_path / "x.npy", tmp_path / "y.npy") == "5\n"
    y, expected = np.load(tmp_path / "y.npy"), expected_of(variables, x)
    assert_close(y, expected, dtype=np.float32, tolerance=1e-5)
    # Without the standardization it would be another function.
    assert np.abs(Net().apply(variables, x) - expected).max() > 1


# --- what is in the folder ----------------------------------------------------------------------


def test_a_folder(folder, variables):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["b"]
    exported = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    arrays = dict(np.load(folder / "params.npz", allow_pickle=False))
    own = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
           for keys, leaf in jax.tree.leaves_with_path(variables)}  # fmt: skip
    assert {name for name in arrays if not name.startswith("standardize/")} == set(own)
    for name, leaf in own.items():
        np.testing.assert_array_equal(arrays[name], leaf)
        assert arrays[name].dtype == leaf.dtype
    # Nothing of the size of a parameter is a constant of the program.
    assert not re.search(r"dense<\"", exported.mlir_module())
    facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    assert facts["class_names"] == NAMES
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for said in ("# b\n", "CPU, CUDA, TPU", "`float32[batch, 6, 5, 3]`", "subtracts the mean"):
        assert said in readme


def test_loaded_as_it_was_exported(folder, variables):
    model = bn.load_exported(str(folder))
    assert model.class_names == tuple(NAMES)
    assert repr(model) == "ExportedModel(float32[batch, 6, 5, 3], 4 classes, for cpu, cuda, tpu)"
    for examples in (1, 7):
        x = pixels(examples, seed=examples)
        y = model(x)
        assert_close(y, expected_of(variables, x), tolerance=1e-5)
        assert_close(jax.jit(model)(x), y, tolerance=1e-6)
    assert model(exact(x)).dtype == np.float32  # JAX takes float64 as float32.


def test_a_mean_of_a_million_deviations(tmp_path):
    mean, std = 1e6 + 1 / 3, 0.7
    x = (mean + std * np.random.default_rng(0).standard_normal((64, 3))).astype(np.float32)
    model = bn.export_model(tmp_path / "m", lambda _, x: x, {}, x, mean=mean, std=std)
    assert_close(model(x), ((exact(x) - mean) / std).astype(np.float32), tolerance=1e-6)
    # A single float32 cannot hold the mean.
    assert abs(float(np.float32(mean)) - mean) / std > 1e-2


def test_standardized_integers_and_half_precision(tmp_path):
    for dtype, result in {"uint8": "float32", "bfloat16": "bfloat16", "float16": "float16"}.items():
        x = jnp.asarray(np.arange(12).reshape(4, 3), dtype)
        model = bn.export_model(tmp_path / dtype, lambda _, x: x, {}, x, mean=[3.0], std=2)
        assert_close(model(x), ((exact(x) - 3) / 2).astype(result), dtype=result)
    # One of both is enough; with neither, tokens stay tokens.
    x = jnp.arange(3.0)
    assert_close(bn.export_model(tmp_path / "mean", lambda _, x: x, {}, x, mean=1)(x), x - 1)
    assert_close(bn.export_model(tmp_path / "std", lambda _, x: x, {}, x, std=2)(x), x / 2)
    tokens = jnp.arange(6).reshape(2, 3)
    embed = bn.export_model(tmp_path / "t", lambda w, x: w[x], jnp.arange(12.0), tokens)
    assert_close(embed(tokens), tokens.astype(np.float32))


# --- models of every kind -----------------------------------------------------------------------


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, param_dtype=jnp.bfloat16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = bn.nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dropout(self.linear(x)))


def test_an_nnx_model_is_exported_in_evaluation(tmp_path):
    model, x = NNXNet(nnx.Rngs(0)), standard_normal(0, (5, 3))
    nnx.update(model, far_from_initial(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    before = jax.tree.map(np.asarray, nnx.state(model, (nnx.Param, nnx.BatchStat)))
    exported = bn.export_model(tmp_path / "m", lambda model, x: model(x), model, x)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(model, (nnx.Param, nnx.BatchStat)), before
    )
    assert not model.norm.use_running_average
    model.eval()
    assert_close(exported(x), model(x))
    arrays = np.load(tmp_path / "m/params.npz")
    assert {"linear/kernel", "norm/mean", "dropout/rngs/count"} <= set(arrays)
    assert arrays["linear/kernel"].dtype == np.uint16


def test_a_haiku_model(tmp_path):
    def net(x, is_training):
        return hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training)

    model, x = hk.without_apply_rng(hk.transform_with_state(net)), standard_normal(0, (5, 3))
    params, state = far_from_initial(model.init(jax.random.key(0), x, True))
    variables = {"params": params, "state": state}

    def forward(variables, x):
        return model.apply(variables["params"], variables["state"], x, False)[0]

    exported = bn.export_model(tmp_path / "m", forward, variables, x, mean=MEAN)
    assert_close(exported(x), forward(variables, x - MEAN[None].astype(np.float32)), tolerance=1e-4)
    assert "state/batch_norm/~/mean_ema/average" in exported.params


def test_a_folded_model(variables, tmp_path):
    x = pixels(3)
    folded = bn.fold(Net().apply, variables, x)
    exported = bn.export_model(tmp_path / "m", folded.apply, folded.params, x, mean=MEAN, std=STD)
    assert_close(exported(x), expected_of(variables, x), tolerance=1e-5)
    assert "rsqrt" not in exported.program.mlir_module()


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint32", "float16", "bfloat16", "float8_e4m3fn",
                                   "complex64"])  # fmt: skip
def test_parameters_of_every_dtype(tmp_path, dtype):
    value = jnp.asarray(np.arange(6).reshape(2, 3) % 4, dtype)
    tree = {"file": [value], "allow_pickle": (value.T, 1.5)}

    def forward(tree, x):
        assert tree["file"][0].dtype == dtype
        return {"y": (tree["file"][0] + tree["allow_pickle"][0].T, x * tree["allow_pickle"][1])}

    exported = bn.export_model(tmp_path / "m", forward, tree, jnp.ones(2))
    actual = bn.load_exported(tmp_path / "m")(jnp.ones(2))
    assert actual["y"][0].dtype == dtype
    np.testing.assert_array_equal(exact(actual["y"][0]), exact(value + value))
    assert_close(actual["y"][1], jnp.full(2, 1.5))
    assert set(exported.params) == {"file/0", "allow_pickle/0", "allow_pickle/1"}


def test_keys_of_random_numbers(tmp_path):
    def forward(key, x):
        return x + jax.random.normal(key, (3,)).reshape(1, 3)

    x, key = jnp.ones((2, 3)), jax.random.key(5, impl="rbg")
    exported = bn.export_model(tmp_path / "m", forward, key, x)
    assert_close(exported(x), forward(key, x))
    assert list(exported.params) == ["variables"]


def test_double_precision(tmp_path):
    with jax.enable_x64(True):
        w, x = jnp.asarray([[1 / 3]]), jnp.ones((2, 1))
        exported = bn.export_model(tmp_path / "m", lambda w, x: x @ w, w, x, mean=1 / 7)
        assert_close(exported(x), np.full((2, 1), 2 / 7), dtype="float64", tolerance=1e-15)
    assert 'jax.config.update("jax_enable_x64", True)' in (tmp_path / "m/README.md").read_text()
    message = r"computes in double precision: first call jax.config.update\(\"jax_enable_x64\", T"
    with pytest.raises(ValueError, match=message):
        bn.load_exported(tmp_path / "m")


def test_several_inputs_and_symbolic_sizes(tmp_path):
    def forward(w, x, given):
        return (x @ w + given["shift"]).sum(1), given["shift"].mean()

    b, h = jax.export.symbolic_shape("2*b, h")
    x = jax.ShapeDtypeStruct((b, h, 3), jnp.float32)
    shift = jax.ShapeDtypeStruct((), jnp.float32)
    exported = bn.export_model(
        tmp_path / "m", forward, jnp.ones((3, 2)), x, {"shift": shift}, mean=MEAN
    )
    assert repr(exported).startswith("ExportedModel(float32[2*b, h, 3], float32[], for")
    for shape in ((2, 5, 3), (4, 1, 3)):
        x = standard_normal(1, shape)
        y, mean = exported(x, {"shift": jnp.float32(2)})
        sums = (exact(x) - MEAN).sum((1, 2)) + 2 * shape[1]
        assert_close(y, np.stack([sums, sums], axis=1), tolerance=1e-4)
        assert mean == 2
    (lines,) = re.findall("```python\n(.*?)```", (tmp_path / "m/README.md").read_text(), re.DOTALL)
    scope = {}
    exec(lines.replace('"m', f'"{tmp_path}/m/m').replace('"p', f'"{tmp_path}/m/p'), scope)
    assert scope["y"][0].shape == (4, 2)


def test_a_batch_of_one_size(tmp_path):
    def forward(_, x):
        return jnp.ones(int(x.shape[0])) * x

    with pytest.raises(jax.errors.InconclusiveDimensionOperation) as raised:
        bn.export_model(tmp_path / "m", forward, {}, jnp.ones(3))
    assert "symbolic_batch=False" in "".join(raised.value.__notes__)
    assert list(tmp_path.iterdir()) == []
    exported = bn.export_model(tmp_path / "m", forward, {}, jnp.ones(3), symbolic_batch=False)
    assert_close(exported(jnp.full(3, 2.0)), jnp.full(3, 2.0))
    with pytest.raises(ValueError, match=r"args\[0\] has shape \(2,\), expected float32\[3\]"):
        exported(jnp.ones(2))


def test_one_platform(tmp_path):
    exported = bn.export_model(tmp_path / "m", lambda _, x: x, {}, jnp.ones(3), platforms=["tpu"])
    assert exported.program.platforms == ("tpu",)
    assert "runs on TPU." in (tmp_path / "m/README.md").read_text()


# --- what bad input gets ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((pixels(2)[0],), ValueError, r"args\[0\] has shape \(6, 5, 3\), expected float32\[bat"),
        ((pixels(2)[:, :5],), ValueError, r"shape \(2, 5, 5, 3\), expected float32\[batch, 6, "),
        ((pixels(2)[:0],), ValueError, r"shape \(0, 6, 5, 3\), expected"),
        ((pixels(2).astype("uint8"),), TypeError, r"has dtype uint8, .*: cast it.*astype\('float3"),
        ((), TypeError, r"structure PyTreeDef\(\(\)\), expected PyTreeDef\(\(\*,\)\)"),
        ((pixels(2), 1.0), TypeError, "args have the structure"),
        ((pixels(1).tolist(),), TypeError, "args have the structure"),
    ],
)  # fmt: skip
def test_calls_with_other_input(folder, args, error, message):
    with pytest.raises(error, match=message) as raised:
        bn.load_exported(folder)(*args)
    assert "\n" not in str(raised.value)


def test_batches_of_different_sizes(tmp_path):
    x = jnp.ones((2, 3))
    exported = bn.export_model(tmp_path / "m", lambda _, x, z: x + z, {}, x, x)
    with pytest.raises(
        ValueError, match=r"args\[1\] has shape \(3, 3\), in which batch is 3, exp.* 2"
    ):
        exported(x, jnp.ones((3, 3)))


def copy_of(folder, copy):
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write(name, content):
    return lambda model: (model / name).write_bytes(content)


def age(model):
    facts = model / "model.json"
    facts.write_text(facts.read_text().replace('"format": 1', '"format": 2'))


DAMAGES = {
    r"is not an exported model \(model.json: No such file": lambda m: (m / "model.json").unlink(),
    r"is not an exported model \(model.json: Expecting": write("model.json", b"{"),
    r"is not an exported model \(model.json: it lacks": write("model.json", b"{}"),
    r"is not an exported model \(model.json: .*codec": write("model.json", b"\xff"),
    r"m has format 2, expected 1": age,
    r"params.npz cannot be read \(No such file.*\): copy or": lambda m: (m / "params.npz").unlink(),
    r"params.npz is damaged \(its SHA-256 is not": lambda m: flip(m / "params.npz"),
    r"model.stablehlo is damaged \(its": lambda m: flip(m / "model.stablehlo"),
    r"model.stablehlo is damaged": write("model.stablehlo", b""),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_folders(folder, tmp_path, message):
    model = copy_of(folder, tmp_path / "m")
    bn.load_exported(model)
    DAMAGES[message](model)
    with pytest.raises(ValueError, match=message) as raised:
        bn.load_exported(model)
    assert "\n" not in str(raised.value)


def test_missing_folders(tmp_path):
    for missing in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            ValueError, match=r"is not an exported model \(model.json: No such file"
        ):
            bn.load_exported(missing)


def test_a_program_of_another_jax(folder, tmp_path):
    """The file is what was written, and yet JAX does not read it."""
    model = copy_of(folder, tmp_path / "m")
    (model / "model.stablehlo").write_bytes(b"another format")
    facts = json.loads((model / "model.json").read_text())
    facts["sha256"]["model.stablehlo"] = hashlib.sha256(b"another format").hexdigest()
    (model / "model.json").write_text(json.dumps(facts))
    with pytest.raises(
        ValueError, match=r"model.stablehlo cannot be read by JAX \d.*: use a JAX not"
    ):
        bn.load_exported(model)


def test_folders_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert bn.export_model(tmp_path / "empty", lambda _, x: x, {}, jnp.ones(2))(jnp.ones(1)) == 1
    (tmp_path / "other").mkdir()
    assert (tmp_path / "empty").stat().st_mode == (tmp_path / "other").stat().st_mode
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for path, message in {
        folder: "b exists and is not empty: choose another or remove it",
        tmp_path / "file": "file is a file, expected a new folder",
        tmp_path / "file/m": r"m cannot be written \(File exists\): choose another folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            bn.export_model(path, lambda _, x: x, {}, jnp.ones(2))
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(ValueError, match=r"m cannot be written \(No space left on device\)"):
        bn.export_model(tmp_path / "m", lambda _, x: x, {}, jnp.ones(2))
    assert list(tmp_path.iterdir()) == []


BAD = {
    "std": (dict(std=[1, 1, 0.0]), ValueError, r"std is 0.0.*, expected positive numbers"),
    "NaN": (dict(mean=np.nan), ValueError, "mean is not finite, expected finite numbers"),
    "shape": (dict(mean=[1.0, 2]), ValueError, r"mean has shape \(2,\), .* example, \(3,\): pa"),
    "batch": (dict(std=np.ones((2, 3))), ValueError, r"std has shape \(2, 3\), .* example, \(3,\)"),
    "names": (dict(class_names=["a"]), ValueError, "class_names has 1 names, expected 3, one for"),
    "string": (dict(class_names="abc"), TypeError, "class_names is 'abc', expected a list of str"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_options_that_are_refused(tmp_path, case):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        bn.export_model(tmp_path / "m", lambda _, x: x, {}, jnp.ones((2, 3)), **options)
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_refused(tmp_path):
    def export(variables, *args, forward=lambda _, x: x, **options):
        return bn.export_model(tmp_path / "m", forward, variables, *args, **options)

    x = jnp.ones(2)
    with pytest.raises(TypeError, match="args are missing: pass an example"):
        export({})
    with pytest.raises(TypeError, match="hold a function at 'f', expected arrays: take it out"):
        export({"f": lambda: 0}, x)
    with pytest.raises(TypeError, match="dtype int4 at 'w', which has less than 8 bits: cast it"):
        export({"w": jnp.ones(2, jnp.int4)}, x)
    with pytest.raises(ValueError, match="two arrays at 'a/b': rename one"):
        export({"a/b": x, "a": {"b": x}}, x)
    with pytest.raises(TypeError, match=r"call export_model outside of jax.jit"):
        jax.jit(lambda w: export(w, x)(x))(x)
    with pytest.raises(TypeError, match="first of args, which is a tuple, expected one array"):
        export({}, (x, x), mean=1)
    with pytest.raises(TypeError, match="first of args, which is bool, expected one array"):
        export({}, x > 0, mean=1)
    with pytest.raises(ValueError, match=r"cannot write .*: let it take and return arrays, in tup"):
        export({}, x, forward=lambda _, x: nnx.State({"y": x}))
    assert list(tmp_path.iterdir()) == []


def test_flatbuffers_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for name in [name for name in sys.modules if name.endswith("export.serialization")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"Install it: pip install 'bn-jax\[export\]'"):
        bn.export_model(tmp_path / "m", lambda _, x: x, {}, jnp.ones(2))
    with pytest.raises(ImportError, match=r"Install it: pip install 'bn-jax\[export\]'"):
        bn.load_exported(folder)
