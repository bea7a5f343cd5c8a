"""What `recalibrate` takes as batches, how it moves them, and what it says it left out."""

import itertools
import json
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from support import assert_close, define_affine, define_moments, exact, quick, standard_normal

import bn_jax as bn
from bn_jax._recalibrate import LayerChange, Recalibration, processes

pytestmark = pytest.mark.usefixtures("compile_quickly")
X = np.asarray(standard_normal(0, (13, 4)) * 3 + 1)
SPLIT = np.split(X, [4, 5])


def one_norm(variables, x):
    y, stats = bn.batch_norm({}, variables["batch_stats"], x, use_running_average=True)
    return y, {"batch_stats": stats}


def two_norms(variables, x):
    stats = variables["batch_stats"]
    y, first = bn.batch_norm({}, stats["first"], x, use_running_average=True)
    _, second = bn.batch_norm({}, stats["second"], jax.nn.relu(y), use_running_average=True)
    return y, {"batch_stats": {"first": first, "second": second}}


def initial(*names):
    stats = bn.init_batch_stats(4)
    return {"batch_stats": dict.fromkeys(names, stats) if names else stats}


def define(x):
    _, mean, var = define_moments(x)
    return {"mean": mean, "var": var}


def define_two(x):
    first = define(x)
    return {"first": first, "second": define(np.maximum(define_affine(x, **first), 0))}


# --- what loaders yield -------------------------------------------------------------------------


class Pair(NamedTuple):
    x: object
    y: object


class OfAnotherLibrary:
    """An array as PyTorch's and TensorFlow's tensors are: it converts to one of NumPy."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __array__(self, dtype=None, copy=None):
        return self.values


class Loader:
    """Yields its batches again in every pass, as a data loader of PyTorch does."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


LABELS = [f"label {number}" for number in range(13)]
BATCHES: dict[str, tuple[Any, Any]] = {
    "a tuple": (lambda x: (x, LABELS[: len(x)]), 0),
    "a list": (lambda x: [LABELS[: len(x)], OfAnotherLibrary(x)], -1),
    "a dictionary": (lambda x: {"image": x, "label": LABELS}, "image"),
    "numbered": (lambda x: {0: LABELS, 1: x}, 1),
    "a field": (lambda x: Pair(x, LABELS), "x"),
    "a function": (lambda x: (2 * x, LABELS), lambda batch: batch[0] / 2),
    "an array": (OfAnotherLibrary, None),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_as_loaders_yield_them(kind):
    wrap, inputs = BATCHES[kind]
    batches = Loader([wrap(x) for x in SPLIT])
    found = bn.recalibrate(two_norms, initial("first", "second"), batches, inputs=inputs)
    assert_close(found.batch_stats, define_two(X), dtype=jnp.float32)
    assert (found.passes, found.batches) == (2, 3)


def test_a_forward_function_that_chooses():
    def forward(variables, batch):
        return one_norm(variables, batch["image"])

    batches = [{"image": x, "label": np.arange(len(x))} for x in SPLIT]
    assert_close(bn.recalibrate(forward, initial(), batches).batch_stats, define(X))


def test_an_iterator_of_tuples():
    batches = ((x, LABELS) for x in SPLIT)
    assert_close(bn.recalibrate(one_norm, initial(), batches, inputs=0).batch_stats, define(X))


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "an array of JAX": (jnp.asarray(X), {}, r"an array of shape \(13, 4\) .*\[x\]"),
    "an array of NumPy": (X, {}, r"array of shape \(13, 4\) \(ndarray\), which iterates over"),
    "an array of another library": (OfAnotherLibrary(X), {}, r"of shape .* \(OfAnotherLibrary\)"),
    "a function that returns an array": (lambda: X, {}, "is an array of shape"),
    "a number": (3, {}, "batches is a int; expected an iterable of batches"),
    "one batch": ((X, np.arange(13)), {}, r"shapes \[\(13, 4\), \(13,\)\].*\[batch\], with inputs"),
    "no such key": ([{"x": X}], {"inputs": "y"}, r"inputs='y' is not in .* keys \['x'\]; expected"),
    "no such index": ([(X,)], {"inputs": 1}, "inputs=1 is not in the batch, a tuple of 1"),
    "an index of an array": ([X], {"inputs": 0}, "inputs=0 is not in the batch, a ndarray"),
    "labels": ([(X, LABELS)], {}, "the batch holds a str at '1/0'; expected .* with inputs="),
    "an array of labels": ([(X, np.array(LABELS))], {}, "holds a ndarray of <U8 at '1'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_batch_is_an_error(case):
    batches, options, message = REFUSED[case]
    with pytest.raises(TypeError, match=f"(?s){message}"):
        bn.recalibrate(one_norm, initial(), batches, **options)


def test_the_advice_of_these_errors_works():
    for batches, options in (
        ([X], {}),
        (list(X.reshape(13, 1, 4)), {}),
        ([(X, np.arange(13))], {"inputs": 0}),
        ([(X, LABELS)], {"inputs": lambda batch: batch[0]}),
    ):
        found = bn.recalibrate(one_norm, initial(), batches, **options)
        assert_close(found.batch_stats, define(X))


@pytest.mark.parametrize(
    ("batch", "note"),
    [
        ((X, np.arange(13)), r"a tuple of 2\. .* write inputs=0, or let forward .* batch\[0\]"),
        ({"x": X, "y": X}, r"a dict with the keys \['x', 'y'\]\. .*inputs='x'"),
    ],
)
def test_an_error_of_a_model_that_was_called_with_a_whole_batch(batch, note):
    with pytest.raises(Exception) as caught:
        bn.recalibrate(one_norm, initial(), [batch])
    assert re.search(note, " ".join(caught.value.__notes__))
    with pytest.raises(Exception) as caught:
        bn.recalibrate(one_norm, initial(), [(X[:, :2], 0)], inputs=0)
    assert "bn_jax.recalibrate called" not in " ".join(getattr(caught.value, "__notes__", ()))


# --- dtypes -------------------------------------------------------------------------------------


class OfFlax(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


def half(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float16), tree)


def linen_model():
    model = OfFlax()
    variables = half(jax.jit(model.init)(jax.random.key(0), X))
    return lambda v, x: model.apply(v, x, mutable=["batch_stats"]), variables


def nnx_model(norm):
    model = norm(4, use_running_average=True, rngs=nnx.Rngs(0))
    nnx.update(model, half(nnx.state(model)))
    return lambda model, x: model(x), model


def keyed_by_paths():
    """A tree as Haiku keeps one: the paths of modules are the keys."""

    def forward(variables, x):
        (path,) = variables["batch_stats"]
        stats = variables["batch_stats"][path]
        y, stats = bn.batch_norm({}, stats, x, use_running_average=True)
        return y, {"batch_stats": {path: stats}}

    return forward, half({"batch_stats": {"net/~/batch_norm": bn.init_batch_stats(4)}})


MODELS: dict[str, Any] = {
    "Linen, of Flax": linen_model,
    "NNX, of Flax": partial(nnx_model, nnx.BatchNorm),
    "NNX": partial(nnx_model, bn.nnx.BatchNorm),
    "keyed by paths": keyed_by_paths,
}


HALF = list(itertools.product(MODELS, [0, 0.25]))


@pytest.mark.parametrize(
    ("kind", "prior"), quick(HALF, [("Linen, of Flax", 0.25), ("NNX, of Flax", 0), ("NNX", 0.25)])
)
def test_statistics_in_half_precision_do_not_overflow(kind, prior):
    forward, variables = MODELS[kind]()
    x = np.asarray(1000 * standard_normal(0, (256, 4)))
    found = bn.recalibrate(forward, variables, [x], prior=prior)
    expected = define(x)
    assert expected["var"].min() > np.finfo(np.float16).max
    (new,) = (
        node
        for node in jax.tree.leaves(
            nnx.to_pure_dict(found.batch_stats) if "NNX" in kind else found.batch_stats,
            is_leaf=lambda node: isinstance(node, dict) and "var" in node,
        )
    )
    old = {"mean": 0, "var": 1}
    mixed = {name: prior * old[name] + (1 - prior) * expected[name] for name in old}
    assert_close(new, mixed, dtype=jnp.float32)
    if "NNX" in kind:
        nnx.update(variables, found.batch_stats)
        y = variables(x)
    else:
        y, _ = forward({**variables, "batch_stats": found.batch_stats}, x)
    assert 0.9 < exact(y).std() < 2.1


def test_variances_that_float32_cannot_hold_are_refused():
    batches = [np.full((2, 4), value, np.float32) for value in (3e19, -3e19)]
    message = r"batch_stats/norm/var would be as large as 9e\+38, which float32 cannot hold"

    def forward(variables, x):
        y, stats = bn.batch_norm({}, variables["batch_stats"]["norm"], x, use_running_average=True)
        return y, {"batch_stats": {"norm": stats}}

    with pytest.raises(ValueError, match=message):
        bn.recalibrate(forward, initial("norm"), batches)
    small = bn.recalibrate(forward, initial("norm"), [x / 1e19 for x in batches])
    assert_close(small.batch_stats["norm"]["var"], np.full(4, 9.0))


# --- what was left out --------------------------------------------------------------------------


def test_batches_that_were_left_out_are_said():
    x = np.array(standard_normal(0, (101, 4)))
    x[3, 1] = np.nan
    found = bn.recalibrate(one_norm, initial(), [x[:50], x[50:]])
    assert_close(found.batch_stats["mean"], np.where([0, 1, 0, 0], x[50:].mean(0), x.mean(0)))
    (layer,) = found.layers
    assert (layer.values, layer.kept) == (51, 0)
    assert (layer.left_out, layer.batches_left_out) == (50, 1)
    text = str(found)
    assert "1 of 2 batches was left out of the top-level norm (50 values of a feature)." in text
    assert "<p>1 of 2 batches was left out of the top-level norm" in found._repr_html_()


def test_the_advice_about_what_was_left_out_works():
    x = np.array(standard_normal(0, (101, 4)))
    x[3, 1] = np.nan

    def forward(variables, batch):
        mask = jnp.isfinite(batch).all(-1, keepdims=True)
        y, stats = bn.batch_norm(
            {}, variables["batch_stats"], batch, use_running_average=True, mask=mask
        )
        return y, {"batch_stats": stats}

    for found in (
        bn.recalibrate(forward, initial(), [x[:50], x[50:]]),
        bn.recalibrate(one_norm, initial(), [np.delete(x, 3, 0)]),
    ):
        assert_close(found.batch_stats, define(np.delete(x, 3, 0)))
        assert found.layers[0].left_out == found.layers[0].batches_left_out == 0
        assert "left out" not in str(found)


def test_what_is_masked_is_not_left_out():
    def forward(variables, batch):
        x, mask = batch
        y, stats = bn.batch_norm(
            {}, variables["batch_stats"], x, use_running_average=True, mask=mask
        )
        return y, {"batch_stats": stats}

    mask = np.arange(13)[:, None] < 9
    x = np.where(mask, X, np.nan)
    batches = [(x[:5], mask[:5]), (x[5:9], mask[5:9]), (x[9:], mask[9:])]
    found = bn.recalibrate(forward, initial(), batches)
    assert_close(found.batch_stats, define(X[:9]))
    assert (found.layers[0].left_out, found.layers[0].batches_left_out) == (0, 0)


def test_many_norms_that_left_out_a_batch_are_one_sentence():
    changed = partial(LayerChange, mean=0.0, var=1.0, values=9.0, kept=0)
    layers = [changed(f"norm_{n}", left_out=4.0, batches_left_out=1) for n in range(6)]
    layers.append(changed("last", left_out=8.0, batches_left_out=2))
    layers.append(changed("sound", left_out=0.0, batches_left_out=0))
    _, text = str(Recalibration({}, tuple(layers), 1, True, 3)).split("9\n1 of 3", 1)
    first, second, advice = text.splitlines()
    listed = ", ".join(f"norm_{n} (4 values of a feature)" for n in range(4))
    assert first == f" batches was left out of {listed}, 2 more norms."
    assert second == "2 of 3 batches were left out of last (8 values of a feature)."
    assert advice.endswith("Remove these examples from the data, or mask them.")


# --- transfers ----------------------------------------------------------------------------------


def placements():
    devices = jax.devices()
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    split = NamedSharding(mesh, PartitionSpec("data"))
    return {
        "nowhere": (lambda tree: tree, lambda x: x),
        "on the host": (partial(jax.tree.map, np.asarray), lambda x: x),
        "on another device": (lambda tree: jax.device_put(tree, devices[1]), lambda x: x),
        "on a mesh": (
            lambda tree: jax.device_put(tree, NamedSharding(mesh, PartitionSpec())),
            lambda x: x,
        ),
        "batches of JAX": (lambda tree: jax.device_put(tree, devices[1]), jax.device_put),
        "batches on a mesh": (
            lambda tree: jax.device_put(tree, NamedSharding(mesh, PartitionSpec())),
            lambda x: jax.device_put(x, split),
        ),
    }


@pytest.mark.parametrize(
    "kind", quick(list(placements()), ["on the host", "on a mesh", "batches of JAX"])
)
def test_no_implicit_transfer(kind):
    place, place_batch = placements()[kind]
    variables = place({"params": {"w": jnp.eye(4)}, **initial("first", "second")})

    def forward(variables, x):
        return two_norms(variables, x @ variables["params"]["w"])

    batches = [place_batch(x) for x in (X[:8], X[8:12])]
    with jax.transfer_guard("disallow"):
        found = bn.recalibrate(forward, variables, batches, prior=0.0)
        str(found)
    assert_close(found.batch_stats, define_two(X[:12]))
    for old, new in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(found.batch_stats), strict=True
    ):
        assert not isinstance(old, jax.Array) or new.sharding == old.sharding


def test_no_implicit_transfer_for_a_module():
    linear, norm = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), bn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    model = nnx.Sequential(dropout, linear, norm)
    model.eval()
    with jax.transfer_guard("disallow"):
        found = bn.recalibrate(lambda model, x: model(x), model, SPLIT)
        nnx.update(model, found.batch_stats)
        # What is dropped depends on the number of the batch.
        model.train()
        assert bn.recalibrate(lambda model, x: model(x), model, SPLIT[:1]).settled
    assert_close(norm.mean[...], define(np.asarray(linear(jnp.asarray(X))))["mean"])


# --- several processes --------------------------------------------------------------------------

# Run by each of two processes: the number of this one, and the port of the first.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
process, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import bn_jax as bn
from test_recalibrate_batches import X, initial, two_norms

def on_host(leaf):
    if not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf).tolist()

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
own = [[X[:2], X[2:7], X[7:8]], [X[8:]]][process]
variables = initial("first", "second")
together = jax.device_put(variables, whole)
x = jax.make_array_from_process_local_data(split, X[[slice(0, 6), slice(6, 12)][process]])
cases = {
    "own": (variables, own),
    "replicated": (together, own),
    "none": (variables, own if process else []),
    "once": (variables, iter(own)),
    "global": (together, [x, x]),
    "statistics split": (jax.device_put(variables, split), [x, x]),
}
stats, results = None, {}
for name, (given, batches) in cases.items():
    options = {"passes": 1} if name == "once" else {}
    with jax.transfer_guard("disallow"):
        found = bn.recalibrate(two_norms, given, batches, **options)
    results[name] = {
        "stats": jax.tree.map(on_host, found.batch_stats),
        "facts": [found.passes, found.batches, found.settled, found.layers[0].values],
        "placed": [leaf.sharding == old.sharding for leaf, old in zip(
            jax.tree.leaves(found.batch_stats), jax.tree.leaves(given["batch_stats"]))],
    }
def failure(*arguments):
    try:
        bn.recalibrate(*arguments)
    except ValueError as error:
        return str(error)
scattered = jax.device_put({"w": jnp.ones((4, 4))}, split)
results["errors"] = [
    failure(two_norms, variables, []),
    failure(two_norms, {**variables, "params": scattered}, own),
]
print(json.dumps(results))
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def two_processes():
    port, here = str(free_port()), Path(__file__).parent
    paths = [here, here.parent, here.parent.parent, Path(bn.__file__).parent.parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM, str(process), port],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        finished = [process.communicate(timeout=150) for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    assert codes == [0, 0], "\n".join(err[-2000:] for _, err in finished)
    # Gloo prints lines of its own before.
    return [json.loads(out[out.index('{"') :]) for out, _ in finished]


@pytest.mark.exhaustive
def test_two_processes_merge_what_their_batches_measure(two_processes):
    first, second = two_processes
    assert first == second
    expected = {
        "own": (X, [2, 4, True]),
        "replicated": (X, [2, 4, True]),
        "none": (X[8:], [2, 1, True]),
        "global": (X[:12], [2, 2, True]),
        "statistics split": (X[:12], [2, 2, True]),
    }
    for name, (x, facts) in expected.items():
        found = first[name]
        stats = jax.tree.map(
            np.float32, found["stats"], is_leaf=lambda node: isinstance(node, list)
        )
        assert_close(stats, define_two(x))
        values = 2 * len(x) if name in ("global", "statistics split") else len(x)
        assert found["facts"] == [*facts, values]
        assert all(found["placed"])
    assert first["once"]["facts"] == [1, 4, False, len(X)]
    stats = first["once"]["stats"]["first"]
    assert_close({key: np.float32(stats[key]) for key in stats}, define(X))
    empty, split = first["errors"]
    assert empty.startswith("batches is empty: expected at least one batch")
    assert "params/w split over several processes" in split


def test_one_process_gathers_its_own_and_copies_nothing():
    variables = initial()
    assert processes.gather(3) == [3]
    chex.assert_trees_all_equal(processes.as_local(variables), variables)
    assert not processes.is_global(variables)
