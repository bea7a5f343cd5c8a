"""What the tests of conversion share: the cases of ``convert.json``."""

import json
from pathlib import Path

import jax
import numpy as np
from golden.make_convert import drawn

CASES = json.loads(Path(__file__).with_name("convert.json").read_text())


def arrays_of(name):
    """The arrays of the model of a case."""
    return {one[0]: drawn(*one) for one in CASES[name]["arrays"]}


def abstract(model, *inputs, **options):
    """The shapes of the variables of a Linen model."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **options))


def assert_same(actual, expected):
    """Bit for bit: structure, dtypes, shapes, values."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = jax.tree.leaves(expected)
    assert leaves
    for one, other in zip(jax.tree.leaves(actual), leaves, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
