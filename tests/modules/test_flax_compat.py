"""The compatibility contract: what is as in Flax for our ten modules."""

import dataclasses
import doctest
import functools
import inspect
import itertools
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from contract import FLAX, MASK, NORMS, SHAPE, X, every_norm, written
from flax import nnx, serialization
from support import assert_close, far_from_initial, quick

pytestmark = pytest.mark.usefixtures("compile_quickly")


def constructor_of(norm, kind):
    """Every argument of the constructor with its default, in the order of Flax."""
    if norm.api == "linen":
        return {field.name: (field.default, field.kw_only) for field in dataclasses.fields(kind)}
    parameters = dict(inspect.signature(kind.__init__).parameters)
    del parameters["self"]
    return {name: (one.default, one.kind) for name, one in parameters.items()}


@every_norm
def test_attributes_and_defaults(norm):
    ours, flax = (constructor_of(norm, kind) for kind in norm.kinds)
    assert set(flax) == norm.attributes
    assert set(ours) == norm.attributes | norm.added
    assert [item for item in ours.items() if item[0] in flax] == list(flax.items())
    assert issubclass(norm.ours, norm.flax)
    assert norm.ours.__name__ == norm.flax.__name__


@every_norm
def test_the_call_takes_what_flax_takes(norm):
    ours, flax = (dict(inspect.signature(kind.__call__).parameters) for kind in norm.kinds)
    assert set(ours) - set(flax) == (
        {"residual", "update_running_average"} if norm.name == "BatchNorm" else set()
    )
    for name, one in flax.items():
        assert (ours[name].default, ours[name].kind) == (one.default, one.kind), name
    if norm.api == "nnx":
        made, theirs = (vars(norm.make(kind)) for kind in norm.kinds)
        assert set(made) == set(theirs) | norm.added


@every_norm
def test_variables(norm):
    ours, flax = (norm.init(kind) for kind in norm.kinds)
    chex.assert_trees_all_equal(ours, flax, strict=True)
    assert jax.tree.map(jnp.shape, ours) == norm.variables
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {jnp.dtype(jnp.float32)}
    assert [value.tolist() for value in jax.tree.leaves(ours)] == [
        [value] * 6
        for path, _ in jax.tree.leaves_with_path(ours)
        for value in [INITIAL[path[-1].key]]
    ]


INITIAL = {"scale": 1, "bias": 0, "mean": 0, "var": 1}


OF_VECTORS = {
    "linen.LayerNorm", "linen.RMSNorm", "linen.GroupNorm", "nnx.LayerNorm", "nnx.RMSNorm",
}  # fmt: skip
OTHERS = {
    "bfloat16": X.astype(jnp.bfloat16),
    "rank 2": X[0, 0],
    "rank 1": X[0, 0, 0],
    "complex": X + 1j * X[::-1],
}


def cases_of(norm):
    """Attributes of a norm, and how it is called."""
    return [
        *((options, "alone") for options in norm.variants),
        *((options, "differentiated") for options in norm.axes),
        *((options, "masked") for options in norm.axes[:2]),
        ({}, "bfloat16"),
        ({"dtype": jnp.bfloat16}, "bfloat16"),
        ({}, "rank 2"),
        *([({}, "rank 1")] if f"{norm.api}.{norm.name}" in OF_VECTORS else []),
        # The running mean of complex input is among the changes, below.
        *([({}, "complex")] if norm.name != "BatchNorm" else []),
        ({"axis_name": "data"}, "synchronized"),
    ]


def tier_of(norm, number):
    """The cases that share a program with one: the first of each way to call, or the others."""
    ways = [how for _, how in cases_of(norm)]
    first = [number for number, how in enumerate(ways) if ways.index(how) == number]
    return tuple(first if number in first else sorted(set(range(len(ways))) - set(first)))


@functools.cache
def initial(norm, kind):
    """The initial variables of every case; Flax's stateless norms have none without the axis."""

    def init(options, how):
        return norm.init(kind, **({} if how == "synchronized" else options))

    return jax.jit(lambda: [init(*case) for case in cases_of(norm)])()


@functools.cache
def outcomes(norm, kind, numbers):
    """What comes of several cases, by one program."""

    def run(variables, options, how):
        differentiate = partial(norm.outcome, kind, variables, **options)
        if how == "alone" or how in OTHERS:
            return norm.call(kind, variables, OTHERS.get(how, X), **options)
        if how == "synchronized":
            return jax.vmap(differentiate, axis_name="data")(X.reshape(2, 2, *SHAPE[1:]))
        return differentiate(X, MASK if how == "masked" else None)

    def run_all(variables):
        return {number: run(variables[number], *cases_of(norm)[number]) for number in numbers}

    return jax.jit(run_all)(far_from_initial(initial(norm, norm.flax)))


@pytest.mark.parametrize(
    "norm,number",
    [
        pytest.param(
            norm,
            number,
            id=f"{name} {how} {written(options)}",
            marks=() if 0 in tier_of(norm, number) else pytest.mark.exhaustive,
        )
        for name, norm in NORMS.items()
        for number, (options, how) in enumerate(cases_of(norm))
    ],
)
def test_agrees_with_flax(norm, number):
    chex.assert_trees_all_equal(*(initial(norm, kind)[number] for kind in norm.kinds), strict=True)
    numbers = tier_of(norm, number)
    found, expected = (outcomes(norm, kind, numbers)[number] for kind in norm.kinds)
    chex.assert_trees_all_equal_dtypes(found, expected)
    _, how = cases_of(norm)[number]
    assert_close(found, expected, tolerance=TOLERANCE.get((norm.api, how), 3e-5))


# NNX rounds x and the statistics to bfloat16 before it normalizes.
TOLERANCE = {("linen", "bfloat16"): 1.6e-2, ("nnx", "bfloat16"): 0.05}


SINGLE = (jnp.float32, jnp.bfloat16, jnp.float16)
DOUBLE = (jnp.float32, jnp.float64)


@every_norm
def test_dtypes(norm):
    """Of variables, output and new variables, for any input and attributes."""

    def types(kind, x_dtype, dtype, param_dtype, **options):
        options |= dict(dtype=dtype, param_dtype=param_dtype)

        def run(x):
            variables = norm.init(norm.flax if double else kind, x, **options)
            return variables, norm.call(kind, variables, x, **options)

        return jax.eval_shape(run, jax.ShapeDtypeStruct(SHAPE, x_dtype))

    double = False
    for chosen in itertools.product(SINGLE, (None, *SINGLE), (jnp.float32, jnp.bfloat16)):
        assert types(norm.ours, *chosen) == types(norm.flax, *chosen), chosen
    # Statistics in double precision are among the changes, below.
    double, evaluate = True, {"use_running_average": True} if norm.name == "BatchNorm" else {}
    with jax.enable_x64(True):
        for chosen in itertools.product(DOUBLE, (None, *DOUBLE), DOUBLE):
            found, expected = (types(kind, *chosen, **evaluate) for kind in norm.kinds)
            assert found == expected, chosen


ERRORS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "BatchNorm": [({"use_running_average": None}, "use_running_average")],
    "GroupNorm": [
        ({"group_size": 3}, "num_groups.*group_size"),
        ({"num_groups": None}, "num_groups.*group_size"),
        ({"num_groups": 4}, "4.*6|6.*4"),
        ({"num_groups": 0}, "0.*6|6.*0"),
        ({"num_groups": None, "group_size": 4}, "4.*6|6.*4"),
    ],
    "InstanceNorm": [({"feature_axes": 0}, "axis|axes"), ({"feature_axes": (0, -1)}, "axis|axes")],
}


@pytest.mark.parametrize(
    "norm,options,message",
    [
        pytest.param(norm, options, message, id=f"{name} {written(options)}")
        for name, norm in NORMS.items()
        for options, message in [
            *ERRORS.get(norm.name, []),
            *(
                [({"reduction_axes": (1, 2)}, "reduction.axes")]
                if name == "linen.GroupNorm"
                else []
            ),
        ]
    ],
)
def test_errors_of_flax(norm, options, message):
    for kind in norm.kinds:
        with pytest.raises(ValueError, match=message):
            norm.call(kind, norm.init(kind, **options), X, **options)


class LinenModel(nn.Module):
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = self.norm()(nn.Dense(6)(x))
        return x


class NNXModel(nnx.Module):
    def __init__(self, norm):
        rngs = nnx.Rngs(0)
        self.dense, self.norm = nnx.Linear(6, 6, rngs=rngs), norm(rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


def model_of(norm, kind):
    model = LinenModel if norm.api == "linen" else NNXModel
    return model(partial(kind, **norm.required))


@every_norm
def test_a_model_has_the_same_names_and_summary(norm):
    ours, flax = (model_of(norm, kind) for kind in norm.kinds)
    if norm.api == "linen":
        variables = [model.init(jax.random.key(0), X) for model in (ours, flax)]
        tables = [nn.summary.tabulate(model, jax.random.key(0))(X) for model in (ours, flax)]
        assert f"{norm.name}_1" in variables[0]["params"]
    else:
        variables = [nnx.to_pure_dict(nnx.state(model)) for model in (ours, flax)]
        tables = [nnx.tabulate(model, X) for model in (ours, flax)]
    chex.assert_trees_all_equal(*variables, strict=True)
    assert tables[0] == tables[1]
    assert norm.name in tables[0]


@every_norm
def test_checkpoints_move_either_way(norm):
    """Orbax's are in tests/test_checkpoints.py."""
    blank, variables = norm.init(norm.ours), far_from_initial(norm.init(norm.flax))
    stored = serialization.to_bytes(variables)
    assert serialization.to_bytes(far_from_initial(blank)) == stored
    assert serialization.to_state_dict(far_from_initial(blank)).keys() == variables.keys()
    for target in norm.kinds:
        loaded = serialization.from_bytes(norm.init(target), stored)
        chex.assert_trees_all_equal(loaded, variables, strict=True)
        state = serialization.to_state_dict(variables)
        chex.assert_trees_all_equal(
            serialization.from_state_dict(norm.init(target), state), variables
        )


NAMES = sorted({norm.name for norm in NORMS.values()})


def documented_examples():
    """Every docstring of the installed Flax that makes one of the ten modules in an example."""
    used = re.compile(rf"\b(nn|nnx)\.({'|'.join(NAMES)})\b")
    found = {}
    for name in sorted(name for name in sys.modules if re.match(r"flax\.(linen|nnx)\b", name)):
        for test in doctest.DocTestFinder().find(sys.modules[name], name):
            if any(used.search(example.source) for example in test.examples):
                found[test.name] = test
    return found


EXAMPLES = documented_examples()
DOCUMENTED = {f"{norm.flax.__module__}.{norm.name}": norm for norm in NORMS.values()}


def test_all_documentation_of_the_norms_is_among_the_examples():
    assert set(DOCUMENTED) <= set(EXAMPLES)
    assert len(EXAMPLES) >= 20


@pytest.mark.parametrize("name", quick(EXAMPLES, DOCUMENTED))
def test_documentation_of_flax_holds_for_ours(name, monkeypatch):
    for norm in NORMS.values():
        monkeypatch.setattr(FLAX[norm.api], norm.name, norm.ours)
    test = EXAMPLES[name]
    printed: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    with jax.numpy_rank_promotion("allow"):
        done = runner.run(test, out=printed.append, clear_globs=False)
    assert done.failed == 0, "".join(printed)
    assert done.attempted == len(test.examples)
    if name in DOCUMENTED:
        assert any(type(made) is DOCUMENTED[name].ours for made in test.globs.values())
