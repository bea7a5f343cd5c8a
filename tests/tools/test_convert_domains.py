"""Norms by domain of PyTorch and timm: what they compute, train and learn, in both directions."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.convert_cases import abstract, assert_same
from golden.make_convert import drawn
from golden.make_domains import DOMAINS, FEATURES, batches
from support import assert_close

import bn_jax as bn

GOLDEN = Path(__file__).parents[1] / "golden" / "domains.json"
CASES: dict[str, Any] = json.loads(GOLDEN.read_text())
DOMAIN = jnp.arange(6) // 2
NAMES = {"list": {"bn": "bn.bns"}, "timm": None}


def case(name):
    """A case of the file: its arrays in PyTorch, its momentum, the names of its layers."""
    kind, _, momentum = name.partition(" ")
    arrays = {one[0]: drawn(*one) for one in CASES[name]["arrays"]}
    return arrays, None if momentum == "None" else float(momentum), NAMES[kind]


def attributes(momentum):
    return bn.convert.attributes_from_library("pytorch", momentum=momentum)


class Net(nn.Module):
    """The same as in `make_domains.py`."""

    momentum: float | None = 0.1
    number: int = DOMAINS

    @nn.compact
    def __call__(self, x, domain, train=False):
        x = nn.Conv(FEATURES, (1, 1), name="conv")(x)
        norm = bn.linen.DomainBatchNorm(
            num_domains=self.number, name="bn", **attributes(self.momentum)
        )
        x = nn.relu(norm(x, domain, use_running_average=not train))
        return nn.Conv(2, (1, 1), name="head")(x)


class Module(nnx.Module):
    """The same in NNX."""

    def __init__(self, momentum):
        self.conv = nnx.Conv(FEATURES, FEATURES, (1, 1), rngs=nnx.Rngs(0))
        options = {**attributes(momentum), "use_running_average": False}
        self.bn = bn.nnx.DomainBatchNorm(FEATURES, DOMAINS, rngs=nnx.Rngs(0), **options)
        self.head = nnx.Conv(FEATURES, 2, (1, 1), rngs=nnx.Rngs(0))

    def __call__(self, x, domain):
        return self.head(nnx.relu(self.bn(self.conv(x), domain)))


def like(momentum=0.1, number=DOMAINS):
    return abstract(Net(momentum, number), jnp.ones((6, 2, 2, FEATURES)), DOMAIN % number)


def converted(name):
    arrays, momentum, names = case(name)
    options: Any = {"like": like(momentum), "names": names, "transposed": ()}
    return bn.convert.from_library(arrays, "pytorch", **options)


def channels_last(y):
    return np.moveaxis(np.asarray(y, np.float32), 1, -1)


def assert_learned(arrays, name):
    """Asserts that arrays are those that PyTorch's model has after both batches."""
    assert list(arrays) == [key for key, *_ in CASES[name]["arrays"]]
    for key, array in CASES[name]["after"].items():
        if not key.endswith("num_batches_tracked"):
            assert_close(arrays[key], np.asarray(array, np.float32))
        else:
            # Only a cumulative average counts in Flax.
            assert arrays[key] == (array if name.endswith("None") else 0), key
            assert (arrays[key].shape, arrays[key].dtype) == ((), np.int64)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_statistics_are_those_of_pytorch(name):
    arrays, momentum, names = case(name)
    model, variables = Net(momentum), converted(name)
    step = jax.jit(lambda v, x: model.apply(v, x, DOMAIN, train=True, mutable=["batch_stats"]))
    for x, expected in zip(batches(), CASES[name]["trained"], strict=True):
        y, updates = step(variables, x)
        assert_close(y, channels_last(expected))
        variables = {**variables, **updates}
    # The norm of timm evaluates by the statistics of its first part.
    for domain, expected in enumerate(CASES[name]["evaluated"]):
        assert_close(model.apply(variables, batches()[0], domain), channels_last(expected))
    options: Any = {"names": names, "transposed": (), "like": arrays}
    assert_learned(bn.convert.to_library(variables, "pytorch", **options), name)


@pytest.mark.parametrize("name", ["list None", "timm 0.1"])
def test_nnx_models_compute_the_same(name):
    arrays, momentum, names = case(name)
    model = Module(momentum)
    options: Any = {"names": names, "transposed": ()}
    nnx.update(model, bn.convert.from_library(arrays, "pytorch", like=model, **options))
    for x, expected in zip(batches(), CASES[name]["trained"], strict=True):
        assert_close(model(x, DOMAIN), channels_last(expected))
    model.eval()
    evaluated = channels_last(CASES[name]["evaluated"][0])
    assert_close(model(batches()[0], 0), evaluated)
    back = bn.convert.to_library(model, "pytorch", like=arrays, **options)
    assert_learned(back, name)


@pytest.mark.parametrize("name", CASES)
def test_what_has_not_changed_comes_back_bit_for_bit(name):
    arrays, _, names = case(name)
    options: Any = {"names": names, "transposed": (), "like": arrays}
    back = bn.convert.to_library(converted(name), "pytorch", **options)
    assert list(back) == list(arrays)
    assert_same(back, arrays)


def test_rows_are_the_norms_in_their_order():
    arrays, _, _ = case("timm 0.1")
    scale = converted("timm 0.1")["params"]["bn"]["scale"]
    keys = ("bn.weight", "bn.aux_bn.0.weight", "bn.aux_bn.1.weight")
    assert_same(scale, np.stack([arrays[key] for key in keys]))


def test_another_number_of_domains_is_an_error_that_tells_both():
    arrays, _, names = case("list 0.1")
    with pytest.raises(ValueError, match=r"bn\.bns\.weight \(3, 4\), expected \(2, 4\) for par"):
        bn.convert.from_library(arrays, "pytorch", like=like(number=2), names=names)


def test_a_norm_that_lacks_an_array_is_an_error_that_names_it():
    arrays, _, names = case("list 0.1")
    del arrays["bn.bns.1.bias"]
    with pytest.raises(ValueError, match=r"missing from arrays, 1 in all:\n  bn\.bns\.bias \(3, 4"):
        bn.convert.from_library(arrays, "pytorch", like=like(), names=names)


def test_a_plain_norm_is_no_norm_by_domain_but_its_start():
    arrays, _, _ = case("timm 0.1")
    plain = {key: array for key, array in arrays.items() if "aux_bn" not in key}
    message = "into variables of the model without domains, and split them by split_batch_norms"
    with pytest.raises(ValueError, match=message):
        bn.convert.from_library(plain, "pytorch", like=like())
    # What the error says to do.
    shapes = jax.eval_shape(lambda tree: bn.linen.select_domain(tree, 0), like())
    variables = bn.convert.from_library(plain, "pytorch", like=shapes, transposed=())
    split = bn.linen.split_batch_norms(variables, DOMAINS)
    assert jax.tree.map(jnp.shape, split) == jax.tree.map(jnp.shape, like())


def test_writing_norms_by_domain_needs_to_know_their_form():
    with pytest.raises(ValueError, match=r"like is missing.*norms of the domains of bn, with a me"):
        bn.convert.to_library(converted("timm 0.1"), "pytorch", transposed=())


def test_domains_that_counted_different_batches_are_written():
    arrays, momentum, names = case("list None")
    variables = converted("list None")
    counts = jnp.repeat(jnp.array([[5.0], [0.0], [7.0]]), FEATURES, 1)
    variables["batch_stats"]["bn"]["count"] = counts
    options: Any = {"names": names, "transposed": (), "like": arrays}
    back = bn.convert.to_library(variables, "pytorch", **options)
    written = [int(back[f"bn.bns.{d}.num_batches_tracked"]) for d in range(DOMAINS)]
    assert (momentum, written) == (None, [5, 0, 7])
    variables["batch_stats"]["bn"]["count"] = counts.at[2, 0].set(6.0)
    with pytest.raises(ValueError, match=r"has the counts \[6\.0, 7\.0\], expected the same"):
        bn.convert.to_library(variables, "pytorch", **options)


def test_the_layers_of_a_sequential_are_no_domains():
    # A plain norm at the top has the keys of a list of one array each.
    stats = {"running_mean": np.zeros(3), "running_var": np.ones(3)}
    with pytest.raises(ValueError, match=r"unknown in arrays, 2 in all:\n  0.running_mean"):
        bn.convert.from_library(
            {f"0.{key}": array for key, array in stats.items()},
            "pytorch",
            like={"batch_stats": bn.init_batch_stats(3)},
        )
