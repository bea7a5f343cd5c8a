"""Programs are read as they run, and norms are found by what they do."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from support import assert_close, standard_normal

import bn_jax as bn
from bn_jax._program import (
    as_affine_step,
    as_linear,
    as_pure,
    evaluate,
    find_norms,
    inputs_of,
    parent_of,
    run_steps,
    steps_to,
    trace,
)
from bn_jax.lab.models import ResNet


def run(program, variables, *args):
    """Evaluates a whole program."""
    values = inputs_of(program, jax.tree.leaves(variables), jax.tree.leaves(args))
    values = evaluate(program, values, program.outputs)
    return jax.tree.unflatten(program.tree, [values[output] for output in program.outputs])


def busy(variables, x):
    """Calls of every kind around and in a loop, a branch and functions with their own rules."""
    weight = variables["weight"]

    @jax.custom_vjp
    def doubled(x):
        return 2 * x

    doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (3 * g,))
    y = jax.checkpoint(lambda x: jax.nn.relu(x @ weight))(x)
    y, last = lax.scan(lambda carry, row: (carry * row[None], carry[0]), y, weight)
    y = lax.cond(x[0, 0] > 0, lambda y: y, lambda y: -y, y)
    y = lax.while_loop(lambda state: state[0] < 2, lambda s: (s[0] + 1, s[1] * weight[:1]), (0, y))[
        1
    ]
    inner = jax.jit(jax.nn.gelu)
    return {"y": doubled(inner(y) + inner(x)) + jnp.asarray(np.arange(3.0))[None], "last": last}


def test_a_program_is_the_function():
    variables = {"weight": standard_normal(0, (3, 3))}
    x = standard_normal(1, (2, 3))
    program = trace(busy, jax.eval_shape(lambda: variables), jax.ShapeDtypeStruct((2, 3), x.dtype))
    assert_close(run(program, variables, x), busy(variables, x))
    names = {equation.name for equation in program.equations}
    assert {"scan", "while", "cond", "custom_vjp_call", "custom_jvp_call"} <= names
    assert not names & {"jit", "pjit", "remat", "remat2", "checkpoint", "closed_call"}


def test_a_program_keeps_derivatives():
    def forward(variables, x):
        return jnp.sum(jax.nn.relu(variables * x))

    program = trace(forward, jnp.zeros(2), jnp.ones(2))
    gradient = jax.grad(lambda x: run(program, jnp.zeros(2), x))(jnp.ones(2))
    assert gradient.tolist() == [0.0, 0.0]
    (relu,) = (one for one in program.equations if one.function == "relu")
    assert relu.name == "custom_jvp_call"


def test_what_is_known_and_where_it_comes_from():
    def forward(variables, x):
        a = variables["params"]["norm"]["scale"] * lax.rsqrt(
            variables["batch_stats"]["norm"]["var"]
        )
        return x * a, a, jnp.arange(2.0)

    leaf = jnp.ones(2)
    variables = {"params": {"norm": {"scale": leaf}}, "batch_stats": {"norm": {"var": leaf}}}
    program = trace(forward, variables, leaf)
    y, a, constant = program.outputs
    assert [program.is_known(one) for one in (y, a, constant)] == [False, True, True]
    assert program.leaf_paths(a) == ("norm/var", "norm/scale")
    assert program.leaf_paths(constant) == ()
    assert program.uses[a] == 2 and program.only_consumer(a) is None
    producer = program.producer(y)
    assert producer is not None and producer.name == "mul"
    assert as_affine_step(program, producer) == ("mul", program.arguments[0], a)


@pytest.mark.parametrize(
    ("paths", "parent"),
    [
        (["a/b/scale", "a/b/var"], "a/b"),
        (["a/b/scale", "a/c/var"], "a"),
        (["scale"], ""),
        (["a/b/d/scale", "a/c/d/var"], "a"),
        (["a/scale", "b"], ""),
        ([], ""),
    ],
)
def test_parents(paths, parent):
    assert parent_of(paths) == parent


@pytest.mark.parametrize(
    ("function", "is_affine"),
    [
        (lambda k, x: x + k, True),
        (lambda k, x: k + x, True),
        (lambda k, x: x - k, True),
        (lambda k, x: k - x, True),
        (lambda k, x: x * k, True),
        (lambda k, x: x / k, True),
        (lambda k, x: -x, True),
        (lambda k, x: x.astype(jnp.bfloat16), True),
        (lambda k, x: k / x, False),
        (lambda k, x: x * x, False),
        (lambda k, x: x**2, False),
        (lambda k, x: jnp.maximum(x, k), False),
        (lambda k, x: x.astype(jnp.int32), False),
    ],
)
def test_affine_steps_are_affine(function, is_affine):
    k, x = jnp.array([0.5, 2.0, -4.0]), jnp.array([1.0, -3.0, 0.25])
    program = trace(function, k, x)
    step = as_affine_step(program, program.equations[-1])
    assert (step is not None) == is_affine
    if step is None:
        return
    meaning = {
        "add": lambda: x + k,
        "sub": lambda: x - k,
        "from": lambda: k - x,
        "mul": lambda: x * k,
        "div": lambda: x / k,
        "neg": lambda: -x,
        "same": lambda: x,
    }
    assert jnp.allclose(meaning[step.kind](), function(k, x))


def test_linear_layers_need_one_known_side():
    kernel = jnp.ones((3, 3))
    for function, found in (
        (lambda k, x: x @ k, True),
        (lambda k, x: k @ x, True),
        (lambda k, x: x @ x, False),
        (lambda k, x: k @ k + x, False),
    ):
        program = trace(function, kernel, kernel)
        (product,) = (n for n, one in enumerate(program.equations) if one.name == "dot_general")
        assert (as_linear(program, product) is not None) == found


def of_model(model, *args, **options):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, train=False))
    return trace(lambda variables, *args: model.apply(variables, *args, **options), shapes, *args)


@pytest.mark.parametrize("norm", [bn.linen.BatchNorm, nn.BatchNorm])
def test_norms_are_found_where_they_are(norm):
    x = jnp.ones((2, 8, 8, 3))
    model = ResNet(10, stage_sizes=(1, 1), widths=(4, 8), norm=norm)
    program = of_model(model, x, train=False)
    norms = find_norms(program)
    expected = [
        "stem/norm",
        *(f"stage{stage}_block0/ConvNorm_{conv}/norm" for stage in (0, 1) for conv in (0, 1)),
        "stage1_block0/shortcut/norm",
    ]
    assert [one.path for one in norms] == expected
    for one in norms:
        convolution = program.producer(one.input)
        assert convolution is not None and convolution.name == "conv_general_dilated"
        assert program.avals[one.input].shape == program.avals[one.output].shape
        assert one.obstacle is None
    ends = [{program.equations[n].function for n in program.consumers[one.output]} for one in norms]
    assert ends == [{"relu"}, {"relu"}, {"add"}, {"relu"}, {"add"}, {"add"}]


def test_a_bias_before_a_norm_is_not_the_norms():
    model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    x = jnp.ones((2, 3))
    program = trace(model.apply, model.init(jax.random.key(0), x), x)
    (norm,) = find_norms(program)
    assert norm.path == "layers_1" and program.equations[norm.steps[0]].name == "sub"
    bias = program.producer(norm.input)
    assert bias is not None and bias.name == "add"
    step = as_affine_step(program, bias)
    assert step is not None and step.operand is not None
    assert program.leaf_paths(step.operand) == ("layers_0/bias",)


def test_norms_that_stand_in_the_way():
    x = jnp.ones((4, 8, 8, 3))
    model = ResNet(10, stage_sizes=(1, 1), widths=(4, 8), norm=bn.linen.BatchNorm)
    program = of_model(model, x, train=True, mutable=["batch_stats"])
    assert [one.path for one in find_norms(program)][:2] == [
        "stem/norm",
        "stage0_block0/ConvNorm_0/norm",
    ]
    assert {one.obstacle for one in find_norms(program)} == {"input"}

    def looped(variables, x):
        def body(carry, layer):
            y = bn.batch_norm(
                layer["params"], layer["batch_stats"], carry, use_running_average=True
            )
            return y[0], None

        return lax.scan(body, x, variables["norms"])[0]

    layer = {"params": bn.init_params((2, 3)), "batch_stats": bn.init_batch_stats((2, 3))}
    (norm,) = find_norms(trace(looped, {"norms": layer}, jnp.ones((4, 3))))
    assert (norm.path, norm.obstacle) == ("norms", "scan")

    def carried(variables, x):
        return lax.scan(lambda c, row: (c + row, row * lax.rsqrt(c)), variables["start"], x)[1]

    (norm,) = find_norms(trace(carried, {"start": jnp.ones(3)}, jnp.ones((4, 3))))
    assert norm.obstacle == "input"
    divided = trace(lambda scale, x: scale * (x / jnp.sqrt(x.var() + 1)), jnp.ones(3), jnp.ones(3))
    assert [one.obstacle for one in find_norms(divided)] == ["input"]
    assert find_norms(trace(lambda k, x: jnp.sqrt(x) @ k, jnp.ones((3, 3)), jnp.ones((3, 3)))) == ()


def test_an_evaluation_computes_what_is_wanted_alone():
    def forward(variables, x):
        hidden = jnp.sin(variables["weight"] * x)
        return jnp.exp(hidden), jnp.cos(variables["weight"])

    weight, x = jnp.float32(2.0), jnp.float32(3.0)
    program = trace(forward, {"weight": weight}, x)
    hidden, of_weight = program.equations[1].outputs[0], program.outputs[1]
    values = inputs_of(program, [weight])
    assert set(evaluate(program, values, [of_weight])) - set(values) == {of_weight}
    with pytest.raises(KeyError):
        evaluate(program, values, [hidden])
    # A value that is given is not computed again, nor what only it needs.
    values = evaluate(program, {hidden: jnp.zeros(())}, program.outputs[:1])
    assert values[program.outputs[0]] == 1 and len(values) == 2

    def after_hidden(value):
        return evaluate(program, {hidden: value}, program.outputs[:1])[program.outputs[0]]

    assert jax.grad(after_hidden)(1.0) == pytest.approx(np.e)


class Doubling(NamedTuple):
    """A step that takes the place of others."""

    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]

    def run(self, values):
        return [2 * values[0] + values[1]]


def test_steps_take_the_place_of_equations():
    def forward(weight, x):
        jax.debug.callback(lambda: None)
        return jnp.exp(jnp.cos(jnp.sin(x)) * weight)

    program = trace(forward, jnp.ones(()), jnp.ones(()))
    names = [equation.name for equation in program.equations]
    sine, printing = names.index("sin"), names.index("debug_callback")
    product = program.equations[names.index("mul")].outputs
    step = Doubling((*program.arguments, "offset"), product)
    given = {*program.arguments, "offset"}
    steps = steps_to(program, program.outputs, given, replaced={sine: step}, always=[printing])
    assert steps == (program.equations[printing], step, program.equations[-1])
    values = {program.arguments[0]: jnp.float32(1.0), "offset": jnp.float32(-2.0)}
    run_steps(steps, values)
    assert values[program.outputs[0]] == 1


def linen_model():
    model = nn.Sequential([nn.Dense(2), bn.linen.BatchNorm(use_running_average=True)])
    return model.apply, model.init(jax.random.key(0), jnp.ones((4, 3)))


def nnx_model():
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    model.eval()
    return lambda model, x: model(x), model


def plain_model():
    norm = {"layers_1": bn.init_params(2)}
    variables = {
        "params": {"kernel": standard_normal(0, (3, 2)), **norm},
        "batch_stats": {"layers_1": bn.init_batch_stats(2)},
    }

    def forward(variables, x):
        params, batch_stats = (variables[name]["layers_1"] for name in ("params", "batch_stats"))
        x = x @ variables["params"]["kernel"]
        return bn.batch_norm(params, batch_stats, x, use_running_average=True)[0]

    return forward, variables


@pytest.mark.parametrize("make", [linen_model, nnx_model, plain_model])
def test_every_model_is_a_pure_function_of_arrays(make):
    forward, model = make()
    x = standard_normal(1, (4, 3))
    pure, variables = as_pure(forward, model)
    assert_close(jax.jit(pure)(variables, x), forward(model, x))
    doubled = pure(jax.tree.map(lambda leaf: 2 * leaf, variables), x)
    assert jnp.abs(doubled - forward(model, x)).max() > 0.1
    params = jax.tree.leaves(pure.params(variables))
    batch_stats, others = pure.batch_stats(variables), pure.others(variables)
    leaves = jax.tree.leaves(variables)
    assert len(params) == len(jax.tree.leaves(others)) == len(leaves) - 2
    joined = pure.join(batch_stats, others)
    assert_close(joined, variables)
    statistics = pure.statistics(variables)
    assert {path.replace("/", "_") for path in statistics.values()} == {"layers_1"}
    assert [leaves[index].tolist() for index in statistics] == [[0, 0], [1, 1]]
    assert [one.path.replace("/", "_") for one in find_norms(trace(pure, variables, x))] == [
        "layers_1"
    ]


def test_a_pure_nnx_model_has_its_mode_and_changes_nothing():
    forward, model = nnx_model()
    x = standard_normal(1, (4, 3)) + 5
    pure, variables = as_pure(forward, model)
    training = pure.in_mode(variables, train=True)
    y = training(variables, x)
    assert_close(y.mean(0), jnp.zeros(2), tolerance=1e-5)
    assert model.layers[1].mean[...].tolist() == [0, 0]
    assert model.layers[1].use_running_average is True
    assert_close(training.in_mode(variables, train=False)(variables, x), forward(model, x))
    assert training.in_mode(variables, train=False) == pure != training
    compiled = jax.jit(lambda pure, variables, x: pure(variables, x), static_argnums=0)
    assert_close(compiled(training, variables, x), y)


def whitened_in_linen():
    model = bn.linen.WhiteningNorm(use_running_average=True)
    return model.apply, model.init(jax.random.key(0), jnp.ones((4, 2)))


def whitened_in_nnx():
    return lambda model, x: model(x), bn.nnx.WhiteningNorm(2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("make", [whitened_in_linen, whitened_in_nnx])
def test_the_mean_of_a_whitening_norm_is_of_no_batch_norm(make):
    pure, variables = as_pure(*make())
    assert len(jax.tree.leaves(pure.batch_stats(variables))) >= 2
    assert pure.statistics(variables) == {}


def test_collections_are_needed_where_they_are_asked_for():
    pure, variables = as_pure(lambda weights, x: x * weights[0], [jnp.ones(2)])
    assert pure.in_mode(variables, train=True) == pure
    with pytest.raises(TypeError, match=r"variables is a list; expected an nnx.Module or a map"):
        pure.batch_stats(variables)


def test_equations_keep_the_scopes_and_the_modes_of_their_trace():
    def forward(key, x):
        with jax.named_scope("noise"):
            return x + jax.random.normal(key, x.shape)

    key, x = jax.random.key(0), jnp.zeros(4)
    with jax.threefry_partitionable(False):
        program = trace(forward, key, x)
        expected = forward(key, x)
    assert jnp.abs(expected - forward(key, x)).max() > 0.1
    assert_close(run(program, key, x), expected)
    lowered = jax.jit(lambda key, x: run(program, key, x)).lower(key, x)
    assert "noise" in lowered.as_text(debug_info=True)
