"""What the tests share: the definition in double precision, tolerances, and readings of HLO."""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.hlo import collectives

TOLERANCE = {
    "float64": 1e-10,
    "float32": 1e-5,
    "float16": 2e-3,
    "bfloat16": 1.6e-2,
    "complex128": 1e-10,
    "complex64": 1e-5,
}


def exact(values, xp=np):
    """The same values in double precision, complex where they are."""
    values = xp.asarray(values)
    return values.astype(xp.complex128 if xp.iscomplexobj(values) else xp.float64)


def assert_close(actual, expected, *, dtype=None, tolerance=None):
    """Compares trees: dtype (where given), finiteness, and value to the tolerance of the dtype."""
    chex.assert_trees_all_equal_structs(actual, expected)
    actual_leaves, expected_leaves = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert actual_leaves
    for one, other in zip(actual_leaves, expected_leaves, strict=True):
        if dtype is not None:
            assert one.dtype == dtype, f"dtype {one.dtype}, expected {dtype}"
        bound = tolerance or TOLERANCE[str(one.dtype)]
        one, other = exact(one), exact(other)
        assert one.shape == other.shape
        assert np.isfinite(one).all(), "the actual value is not finite"
        assert np.isfinite(other).all(), "the expected value is not finite"
        error = np.abs(one - other) / np.maximum(1, np.abs(other))
        assert error.max(initial=0) <= bound, f"error {error.max()} above {bound}"


# --- the definition -----------------------------------------------------------------------------

# Everything here is the definition in double precision, from the two passes that it has. `xp` is
# NumPy, or jax.numpy where JAX is to differentiate it.


def _axes(axis, rank):
    features = tuple(sorted(a % rank for a in np.atleast_1d(axis)))
    return features, tuple(a for a in range(rank) if a not in features)


def define_moments(x, axis=-1, mask=None, *, xp=np):
    """Count, mean and variance, feature by feature."""
    x = exact(x, xp)
    weights = xp.broadcast_to(1.0 if mask is None else xp.asarray(mask, xp.float64), x.shape)
    features, reduced = _axes(axis, x.ndim)
    values = xp.transpose(x, features + reduced).reshape(*(x.shape[a] for a in features), -1)
    weights = xp.transpose(weights, features + reduced).reshape(values.shape)
    count = weights.sum(-1)
    values = xp.where(weights > 0, values, 0)
    divisor = xp.where(count > 0, count, 1)
    mean = (weights * values).sum(-1) / divisor
    var = (weights * xp.abs(values - mean[..., None]) ** 2).sum(-1) / divisor
    return count, mean, var


def expand(values, axis, shape, *, xp=np):
    """Gives values of the features' shape the rank of an array of `shape`."""
    features, _ = _axes(axis, len(shape))
    return exact(values, xp).reshape(
        [size if position in features else 1 for position, size in enumerate(shape)]
    )


def define_affine(x, mean, var, scale=None, bias=None, axis=-1, epsilon=1e-5, *, xp=np):
    """``(x - mean) / sqrt(var + epsilon) * scale + bias``."""
    x = exact(x, xp)
    mean, var = (expand(values, axis, x.shape, xp=xp) for values in (mean, var))
    y = (x - mean) / xp.sqrt(var + epsilon)
    y = y if scale is None else y * expand(scale, axis, x.shape, xp=xp)
    return y if bias is None else y + expand(bias, axis, x.shape, xp=xp)


def define_evaluation(params, batch_stats, x, axis=-1, epsilon=1e-5, *, xp=np):
    """Batch norm in evaluation: the output."""
    moments, present = (
        (batch_stats["mean"], batch_stats["var"]),
        (params.get("scale"), params.get("bias")),
    )
    return define_affine(x, *moments, *present, axis=axis, epsilon=epsilon, xp=xp)


def define_standardized(x, axes, mask=None, epsilon=1e-6, *, about_zero=False, xp=np):
    """`x` with the mean 0 and the variance 1 over `axes`; `about_zero` leaves the mean, as RMS."""
    kept = tuple(
        a for a in range(x.ndim) if a not in [axis % x.ndim for axis in np.atleast_1d(axes)]
    )
    _, mean, var = define_moments(x, kept, mask, xp=xp)
    if about_zero:
        mean, var = xp.zeros_like(mean), var + xp.abs(mean) ** 2
    return define_affine(x, mean, var, axis=kept, epsilon=epsilon, xp=xp)


def define_batch_norm(
    params, batch_stats, x, *, axis=-1, momentum=0.99, epsilon=1e-5, mask=None, running_var_ddof=0,
    xp=np,
):  # fmt: skip
    """Batch norm in training: output and new running statistics."""
    count, mean, var = define_moments(x, axis, mask, xp=xp)
    y = define_affine(x, mean, var, params.get("scale"), params.get("bias"), axis, epsilon, xp=xp)
    old = {name: exact(value, xp) for name, value in batch_stats.items()}
    unbiased = var * count / (count - running_var_ddof)
    updated = {}
    if "count" in old:
        updated["count"] = old["count"] + 1
    if momentum is None:
        momentum = old["count"] / (old["count"] + 1)
    updated["mean"] = momentum * old["mean"] + (1 - momentum) * mean
    updated["var"] = momentum * old["var"] + (1 - momentum) * unbiased
    return y, updated


def define_gradients(params, x, mask, pull, *, epsilon=1e-5):
    """What batch norm over the last axis makes of the cotangent of its output.

    `pull` takes the output to that cotangent; where the mask is zero it is taken to be zero.
    """
    count, mean, var = define_moments(x, -1, mask)
    weight = np.broadcast_to(1.0 if mask is None else np.asarray(mask, np.float64), x.shape)
    x = np.where(weight > 0, exact(x), mean)
    normalized = define_affine(x, mean, var, epsilon=epsilon)
    y = normalized * exact(params["scale"]) + exact(params["bias"])
    cotangent = np.where(weight > 0, pull(y), 0)
    axes = tuple(range(x.ndim - 1))
    of_bias, of_scale = cotangent.sum(axes), (cotangent * normalized).sum(axes)
    share = weight / np.where(count > 0, count, 1)
    of_x = cotangent - share * of_bias - share * normalized * of_scale
    of_x *= exact(params["scale"]) / np.sqrt(var + epsilon)
    return {"scale": of_scale, "bias": of_bias}, of_x


def define_steps(params, batch_stats, batches, **options):
    """`define_batch_norm` batch after batch: all outputs and the last running statistics."""
    outputs = []
    for x in batches:
        y, batch_stats = define_batch_norm(params, batch_stats, x, **options)
        outputs.append(y)
    return np.stack(outputs), batch_stats


def differentiate(function, x, step=1e-5):
    """The gradient of a scalar float64 NumPy function by central differences."""
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shifted = np.zeros_like(x)
        shifted[index] = step
        gradient[index] = (function(x + shifted) - function(x - shifted)) / (2 * step)
    return gradient


# --- compiled programs --------------------------------------------------------------------------


def all_reduces(compiled_text):
    """The operand sizes of the all-reduces of compiled HLO, outside any conditional's branch."""
    return [
        one.elements
        for one in collectives(compiled_text)
        if one.kind == "all-reduce" and not one.guarded
    ]


def conditionals(compiled_text):
    """How many conditionals compiled HLO holds."""
    return len(re.findall(r" conditional\(", compiled_text))


# Before, XLA had no library for the reductions of a CPU.
fuses_reductions = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="XLA fuses other operations"
)


def written_out(compiled_text, shape):
    """The dtypes of the arrays of a shape that compiled HLO makes outside of kernels, sorted."""
    sizes = ",".join(map(str, shape))
    main = compiled_text.split("\nENTRY ")[1]
    made = re.findall(rf" = (\w+)\[{sizes}\]\S* (\w+)\(", main)
    return sorted(dtype for dtype, kind in made if kind != "parameter")


# --- values -------------------------------------------------------------------------------------


def far_from_initial(tree):
    """Gives ones and zeros, the initial values of a norm, values that differ and are positive."""
    return jax.tree.map(lambda leaf: jnp.abs(jnp.sin(3.0 * leaf + 1)) + leaf, tree)


def standard_normal(seed, shape, dtype=np.float32):
    """Reproducible values; of a complex dtype the real and the imaginary part are normal."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = values + 1j * rng.standard_normal(shape)
    return jnp.asarray(values, dtype)


def correlated(seed, shape, offset=0.0):
    """Values whose covariance has a condition number of some ten."""
    features = shape[-1]
    mixing = np.random.default_rng(features).standard_normal((features, features))
    mixing = np.eye(features) + 0.5 / np.sqrt(features) * mixing
    return jnp.asarray(exact(standard_normal(seed, shape)) @ mixing + offset, jnp.float32)


def make_state(features, present=("scale", "bias"), seed=100):
    params = {name: standard_normal(seed + number, features) for number, name in enumerate(present)}
    mean, var = standard_normal(seed + 8, features), standard_normal(seed + 9, features)
    return params, {"mean": mean, "var": jnp.abs(var) + 0.1}


def features_of(shape, axis):
    return tuple(shape[a] for a in sorted(a % len(shape) for a in np.atleast_1d(axis)))


def bars(examples=60, seed=0):
    """Images of a horizontal, a vertical and no bar, in noise, that need to be standardized."""
    rng = np.random.default_rng(seed)
    y = np.arange(examples) % 3
    x = rng.normal(0, 0.1, (examples, 4, 4))
    x[y == 0, 1] += 1
    x[y == 1, :, 1] += 1
    return {"x": 100 - 20 * x, "y": y}


# --- files --------------------------------------------------------------------------------------


def files(folder):
    return sorted(
        (str(path.relative_to(folder)), path.stat().st_mtime_ns) for path in folder.rglob("*")
    )


def copy_of(run, folder):
    shutil.copytree(run, folder)
    return folder


# --- the command --------------------------------------------------------------------------------

COMMAND = (sys.executable, "-W", "error", "-m", "bn_jax.lab")
TRAIN = ("train", "--epochs", "2", "--batch-size", "8", "--learning-rate", "0.05")


def environment(**variables):
    """Variables for a process of the command; those that are None are unset."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Compiling is most of the time that these small runs take.
    quickly = {"PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    merged = os.environ | quickly | variables
    return {name: value for name, value in merged.items() if value is not None}


def run_process(arguments, folder, **variables):
    """Runs the command in a process of its own, in a folder."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_command(*arguments):
    """The command `bn-jax` in this process, which must end within two minutes: code and streams."""
    from bn_jax.lab.command import main

    # With devices in place, the command cannot change the number that all tests share.
    assert len(jax.devices()) == 4
    out, err = io.StringIO(), io.StringIO()
    signal.alarm(120)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as caught,
    ):
        patch.setattr(sys, "argv", ["bn-jax", *map(str, arguments)])
        main()
    signal.alarm(0)
    return caught.value.code or 0, out.getvalue(), err.getvalue()


def make_small_resnet(arm, num_classes, *_, width=4):
    """Stands in for `runs.make_model` where training takes the time."""
    from bn_jax import linen
    from bn_jax.lab import models, runs

    norm = None if arm == runs.NO_NORM else functools.partial(linen.BatchNorm, momentum=0.9)
    return models.ResNet(num_classes, stage_sizes=(1,), widths=(width,), norm=norm)


def numbers_of(run):
    """The metrics of a run but for what depends on the clock, which Orbax also writes."""
    metrics = json.loads((run / "metrics.json").read_text())
    for arm in metrics["arms"].values():
        assert arm.pop("examples_per_second") > 0
    del metrics["checkpoint_sha256"], metrics["sha256"]
    return metrics


def flip(path, bit):
    """Flips a bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@contextlib.contextmanager
def small_disk(folder, size):
    """A real disk of a few bytes, which is a tmpfs; skips where none can be mounted.

    Yields a function that gives it another size, or other options of `mount`.
    """

    def mount(*options):
        return subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)

    folder.mkdir()
    if (
        shutil.which("mount") is None
        or (failed := mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")).returncode
    ):
        reason = "mount is missing" if shutil.which("mount") is None else failed.stderr.strip()
        pytest.skip(f"NOT TESTED, for no small disk can be mounted here: {reason}")
    try:
        yield lambda options: mount("-o", f"remount,{options}").check_returncode()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def only_claims(monkeypatch, *claims):
    """Makes these the claims that there are, until the test ends."""
    from bn_jax.lab.experiments import EXPERIMENTS

    # What is deleted is put back in reverse order.
    for name in reversed(list(EXPERIMENTS)):
        monkeypatch.delitem(EXPERIMENTS, name)
    for claim in claims:
        monkeypatch.setitem(EXPERIMENTS, claim.name, claim)


def reproduce(monkeypatch, *arguments):
    """Runs `bn-jax reproduce` in this process, and returns its code."""
    from bn_jax.lab import command

    monkeypatch.setattr("sys.argv", ["bn-jax", "reproduce", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    return stopped.value.code or 0


# --- the package itself -------------------------------------------------------------------------

PACKAGE = Path(__file__).parent.parent / "bn_jax"
# Old paths that work for one release, with a warning.
SHIMS = ("models", "data", "experiments")


def modules_of_the_package():
    """The file of every module by its name, from the folders and not from what imports."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def is_public(name):
    """Whether a module and all packages around it have names without an underscore."""
    return not any(part.startswith("_") for part in name.split("."))


def load_module(name):
    with warnings.catch_warnings():
        if name.split(".")[1:2] and name.split(".")[1] in SHIMS:
            warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(name)


def marked(values, chosen, mark):
    """The parameters of a test, with a mark on those that are chosen."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=mark if value in chosen else (),
        )
        for value in values
    ]


def quick(values, chosen):
    """The parameters of a test; those that are not chosen are left to the exhaustive tier."""
    assert set(chosen) <= set(values), set(chosen) - set(values)
    return marked(values, set(values) - set(chosen), pytest.mark.exhaustive)
