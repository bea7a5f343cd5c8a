"""Training a layer on one value per feature: the warning names it, once."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bn_jax as bn

ONE = jnp.ones((1, 3))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        for kind in (bn.linen.BatchNorm, bn.linen.BatchRenorm, bn.linen.WhiteningNorm):
            x = kind(use_running_average=not train)(x)
        return nn.Dense(2)(x)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm, self.other = bn.nnx.BatchNorm(3, rngs=rngs), bn.nnx.BatchRenorm(3, rngs=rngs)
        self.whitening = bn.nnx.WhiteningNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.whitening(self.other(self.norm(x)))


def warned(call):
    """Returns the layers that a user sees warnings of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        call()
    assert {warning.filename for warning in caught} <= {__file__}
    return [str(warning.message).split(" has one value")[0] for warning in caught]


def test_every_linen_layer_is_named_once():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(name="second")(nn.Dense(3)(Block(name="first")(x)))

    variables = Model().init(jax.random.key(0), ONE)

    def train():
        for _ in range(3):
            step = jax.jit(lambda x: Model().apply(variables, x, mutable=["batch_stats"]))
            step.trace(ONE)

    names = ["BatchNorm 'first/BatchNorm_0'", "BatchRenorm 'first/BatchRenorm_0'",
             "WhiteningNorm 'first/WhiteningNorm_0'"]  # fmt: skip
    second = [name.replace("first", "second") for name in names]
    assert warned(train) == names + second


def test_every_nnx_layer_is_named_once():
    net = Net()

    def train():
        for _ in range(3):
            nnx.eval_shape(lambda net, x: net(x), net, ONE)
            net(ONE)

    names = ["the BatchNorm of 3 features", "the BatchRenorm of 3 features",
             "the WhiteningNorm of 3 features"]  # fmt: skip
    assert warned(train) == names


def test_the_layers_of_flax_that_ours_run_are_named_too():
    model = nn.Sequential([nn.BatchNorm(use_running_average=False)])
    variables = model.init(jax.random.key(0), ONE)
    apply = bn.linen.replace_norms(model.apply)
    assert warned(lambda: apply(variables, ONE, mutable=["batch_stats"])) == [
        "BatchNorm 'layers_0'"
    ]


@pytest.mark.parametrize(
    "call",
    [
        lambda: Block().init(jax.random.key(0), ONE),
        lambda: Block().lazy_init(jax.random.key(0), jax.ShapeDtypeStruct((1, 3), jnp.float32)),
        lambda: jax.eval_shape(Block().init, jax.random.key(0), ONE),
        lambda: Block().tabulate(jax.random.key(0), ONE),
        lambda: Block().apply(Block().init(jax.random.key(0), ONE), ONE, train=False),
        lambda: nnx.bridge.lazy_init(nnx.bridge.ToNNX(Block(), rngs=nnx.Rngs(0)), ONE),
        lambda: nnx.tabulate(nnx.view(Net(), use_running_average=True), ONE),
    ],
    ids=["init", "lazy_init", "eval_shape of init", "Linen's tabulate", "evaluation",
         "bridge.lazy_init", "NNX's tabulate in evaluation"],
)  # fmt: skip
def test_what_is_known_to_be_no_training_step_does_not_warn(call):
    call()


def test_a_table_of_an_nnx_model_in_training():
    """Nothing tells NNX's tabulate from a training step."""
    tables = []
    assert len(warned(lambda: tables.append(nnx.tabulate(Net(), ONE)))) == 3
    assert "whitening" in tables[0]
    assert nnx.Linear(3, 2, rngs=nnx.Rngs(0))(ONE).shape == (1, 2)


def test_a_table_of_one_example_is_that_of_flax():
    """Of a model in training, as in the docstring of `nnx.tabulate`."""

    def table(norm):
        rngs = nnx.Rngs(0)
        parts = nnx.Linear(3, 4, rngs=rngs), norm(4, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)
        return nnx.tabulate(nnx.Sequential(*parts), ONE)

    tables = []
    assert len(warned(lambda: tables.append(table(bn.nnx.BatchNorm)))) == 1
    assert tables == [table(nnx.BatchNorm)]
