"""The compatibility contract: what is as in Flax for our ten modules, and what is not and why."""

import dataclasses
import doctest
import functools
import inspect
import itertools
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from flax.errors import ModifyScopeVariableError, ScopeCollectionNotFound
from support import assert_close, define_standardized, exact, far_from_initial, standard_normal

import bn_jax as bn

SHAPE = (4, 3, 5, 6)
X = standard_normal(0, SHAPE)
MASK = standard_normal(1, SHAPE) > -1
FLAX = {"linen": nn, "nnx": nnx}
OURS = {"linen": bn.linen, "nnx": bn.nnx}


pytestmark = pytest.mark.usefixtures("compile_quickly")


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """A row of the contract: one of Flax's modules, and ours of the same name.

    Attributes:
        required: what the tests construct it with.
        attributes: all of Flax's, so that a new one is looked at before it is inherited.
        added: our attributes beyond Flax's.
        variables: the shape of every variable.
        axes: attributes that choose axes and groups; the first two are tested with a mask as well.
        variants: other attributes.
        reduced: the axes that the statistics are over, of `X` with its groups on an axis.
    """

    api: str
    name: str
    required: dict[str, Any]
    attributes: set[str]
    variables: dict[str, Any]
    axes: list[dict[str, Any]]
    variants: list[dict[str, Any]]
    reduced: tuple[int, ...]
    added: set[str] = dataclasses.field(default_factory=set)

    @property
    def ours(self) -> Any:
        return getattr(OURS[self.api], self.name)

    @property
    def flax(self) -> Any:
        return getattr(FLAX[self.api], self.name)

    @property
    def kinds(self) -> tuple[Any, Any]:
        return self.ours, self.flax

    def make(self, kind, **options):
        how = {"rngs": nnx.Rngs(0)} if self.api == "nnx" else {}
        return kind(**{**self.required, **options, **how})

    def init(self, kind, x=X, **options):
        """The initial variables as plain nested dictionaries."""
        layer = self.make(kind, **options)
        if self.api == "linen":
            return layer.init(jax.random.key(0), x)
        return nnx.to_pure_dict(nnx.state(layer))

    def call(self, kind, variables, x, mask=None, **options):
        """The output and the new variables, as a function of the old."""
        layer = self.make(kind, **options)
        if self.api == "linen":
            y, updates = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
            return y, {**variables, **updates}
        state = nnx.state(layer)
        nnx.replace_by_pure_dict(state, variables)
        nnx.update(layer, state)
        y = layer(x, mask=mask)
        return y, nnx.to_pure_dict(nnx.state(layer))

    def outcome(self, kind, variables, x, mask=None, **options):
        """The gradients in variables and x, the output, and the new variables."""

        def loss(variables, x):
            y, updated = self.call(kind, variables, x, mask, **options)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, updated)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, x)

    def define(self, x, mask=None):
        """The output of the initial layer in float64, from the definition."""
        shape = x.shape
        weight = np.broadcast_to(1.0 if mask is None else mask, shape)
        if self.name == "GroupNorm":
            x, weight = (values.reshape(*shape[:-1], 2, 3) for values in (x, weight))
        epsilon = 1e-5 if self.name == "BatchNorm" else 1e-6
        return define_standardized(
            x, self.reduced, weight, epsilon, about_zero=self.name == "RMSNorm"
        ).reshape(shape)


SCALE = {
    "epsilon", "dtype", "param_dtype", "use_scale", "scale_init", "axis_name", "axis_index_groups",
    "use_fast_variance",
}  # fmt: skip
BIAS = {"use_bias", "bias_init"}
OF_API = {
    "linen": {"force_float32_reductions", "parent", "name"},
    "nnx": {"num_features", "promote_dtype", "rngs", "scale_metadata"},
}
NORMAL, UNIFORM = nn.initializers.normal(), nn.initializers.uniform()


def promote_and_double(values, *, dtype):
    """In place of a promotion, what shows whether and on what it was called."""
    return tuple(None if one is None else 2 * one for one in values)


OFTEN = [
    {"epsilon": 1e-2, "use_fast_variance": False},
    {"use_scale": False},
]
WITH_BIAS = [{"use_bias": False, "scale_init": NORMAL}, {"use_scale": False, "use_bias": False}]
OFTEN_OF_API = {
    "linen": [
        {"force_float32_reductions": False},
        {"scale_init": nn.with_partitioning(NORMAL, ("model",)), "param_dtype": jnp.bfloat16},
    ],
    "nnx": [{"promote_dtype": promote_and_double}, {"scale_metadata": {"note": "kept"}}],
}
BATCH = [{}, {"use_running_average": True}, {"momentum": 0.5}]
BATCH_OF_API = {
    "linen": [{"axis": 1}, {"axis": 0}, {"axis": (1, 2)}, {"axis": (-1, 1)}],
    "nnx": [{"axis": 1, "num_features": 3}, {"axis": 0, "num_features": 4}],
}
LAYER = [
    {}, {"reduction_axes": [1, 2]}, {"reduction_axes": (1, 2, 3)}, {"reduction_axes": (-1, 0)},
    {"reduction_axes": 1, "use_fast_variance": False},
]  # fmt: skip
LAYER_OF_API = {
    "linen": [
        {"feature_axes": 1}, {"reduction_axes": (2, 3), "feature_axes": (2, 3)},
        {"feature_axes": (-1, 1)},
    ],
    "nnx": [
        {"feature_axes": 1, "num_features": 3},
        {"reduction_axes": (2, 3), "feature_axes": (2, 3), "num_features": 30},
    ],
}  # fmt: skip
GROUP = [
    {}, {"num_groups": None, "group_size": 2}, {"num_groups": 1}, {"num_groups": 6},
    {"reduction_axes": (1, 2, 3)},
]  # fmt: skip
GROUP_OF_API = {
    "linen": [
        {"reduction_axes": (2, 3)},
        {"reduction_axes": (-1,), "use_fast_variance": False},
        {"reduction_axes": (0, 3)},
    ],
    "nnx": [],
}
INSTANCE_OF_API = {
    "linen": [{}, {"feature_axes": 1}, {"feature_axes": (1, -1)}],
    "nnx": [{}, {"feature_axes": 1, "num_features": 3}],
}


def rows(api):
    """The five norms of one of Flax's two interfaces."""
    features = {"num_features": 6} if api == "nnx" else {}
    with_bias = {"bias_metadata"} | BIAS if api == "nnx" else BIAS
    shared, scale, bias = SCALE | OF_API[api], {"scale": (6,)}, {"bias": (6,)}
    stats = {"mean": (6,), "var": (6,)}

    def variables(params, stats=None):
        if api == "nnx":
            return {**params, **(stats or {})}
        return {"params": params, **({} if stats is None else {"batch_stats": stats})}

    often = OFTEN + OFTEN_OF_API[api]
    bias_of_api = {"bias_metadata": {"note": "kept"}} if api == "nnx" else {}
    variants = [*often, *WITH_BIAS, {"bias_init": UNIFORM, **bias_of_api}]
    return [
        Norm(
            api, "BatchNorm", {"use_running_average": False, **features},
            shared | with_bias | {"use_running_average", "axis", "momentum"},
            variables({**scale, **bias}, stats), BATCH + BATCH_OF_API[api], variants,
            reduced=(0, 1, 2),
            added={
                "activation", "virtual_batch_size", "running_var_ddof", "update_running_average",
                "train_params", "frozen",
            },
        ),
        Norm(
            api, "LayerNorm", features, shared | with_bias | {"reduction_axes", "feature_axes"},
            variables({**scale, **bias}), LAYER + LAYER_OF_API[api], variants, reduced=(3,),
        ),
        Norm(
            api, "RMSNorm", features, shared | {"reduction_axes", "feature_axes"},
            variables(scale), LAYER + LAYER_OF_API[api], often, reduced=(3,),
        ),
        Norm(
            api, "GroupNorm", {"num_groups": 2, **features},
            shared | with_bias | {"num_groups", "group_size", "reduction_axes"},
            variables({**scale, **bias}), GROUP + GROUP_OF_API[api], variants,
            reduced=(1, 2, 4),
        ),
        Norm(
            api, "InstanceNorm", features, shared | with_bias | {"feature_axes"},
            variables({**scale, **bias}), INSTANCE_OF_API[api], variants, reduced=(1, 2),
        ),
    ]  # fmt: skip


NORMS = {f"{norm.api}.{norm.name}": norm for norm in rows("linen") + rows("nnx")}


def written(options):
    return ", ".join(f"{name}={getattr(v, '__name__', v)}" for name, v in options.items())


every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


# --- what stays -------------------------------------------------------------------------------


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


@functools.cache
def initial(norm, kind):
    """The initial variables of every case; Flax's stateless norms have none without the axis."""

    def init(options, how):
        return norm.init(kind, **({} if how == "synchronized" else options))

    return jax.jit(lambda: [init(*case) for case in cases_of(norm)])()


@functools.cache
def outcomes(norm, kind):
    """What comes of every case, by one program."""

    def run(variables, options, how):
        differentiate = partial(norm.outcome, kind, variables, **options)
        if how == "alone" or how in OTHERS:
            return norm.call(kind, variables, OTHERS.get(how, X), **options)
        if how == "synchronized":
            return jax.vmap(differentiate, axis_name="data")(X.reshape(2, 2, *SHAPE[1:]))
        return differentiate(X, MASK if how == "masked" else None)

    def run_all(variables):
        return [run(own, *case) for own, case in zip(variables, cases_of(norm), strict=True)]

    return jax.jit(run_all)(far_from_initial(initial(norm, norm.flax)))


@pytest.mark.parametrize(
    "norm,number",
    [
        pytest.param(norm, number, id=f"{name} {how} {written(options)}")
        for name, norm in NORMS.items()
        for number, (options, how) in enumerate(cases_of(norm))
    ],
)
def test_agrees_with_flax(norm, number):
    chex.assert_trees_all_equal(*(initial(norm, kind)[number] for kind in norm.kinds), strict=True)
    found, expected = (outcomes(norm, kind)[number] for kind in norm.kinds)
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


ERRORS = {
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
        tables = [nn.tabulate(model, jax.random.key(0))(X) for model in (ours, flax)]
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


@pytest.mark.parametrize("name", EXAMPLES)
def test_documentation_of_flax_holds_for_ours(name, monkeypatch):
    for norm in NORMS.values():
        monkeypatch.setattr(FLAX[norm.api], norm.name, norm.ours)
    test, printed = EXAMPLES[name], []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    with jax.numpy_rank_promotion("allow"):
        done = runner.run(test, out=printed.append, clear_globs=False)
    assert done.failed == 0, "".join(printed)
    assert done.attempted == len(test.examples)
    if name in DOCUMENTED:
        assert any(type(made) is DOCUMENTED[name].ours for made in test.globs.values())


# --- what changes, and why --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
    """A behaviour of Flax that we deliberately do not have.

    Attributes:
        reason: why not.
        norms: the rows that it is about.
        show: asserts of a row what Flax gives and what ours gives instead.
    """

    reason: str
    norms: list[str]
    show: Callable[[Norm], None]


CHANGES: dict[str, Change] = {}
BATCH_NORMS = ["linen.BatchNorm", "nnx.BatchNorm"]
CANCELLING = [name for name in NORMS if not name.endswith("RMSNorm")]
LINEN, NNX = ([name for name in NORMS if name.startswith(api)] for api in ("linen", "nnx"))


def changed(title, reason, norms):
    def register(show):
        CHANGES[title] = Change(reason, norms, show)
        return show

    return register


def trained(norm, kind, x=X, mask=None, **options):
    """Output and new variables of the initial layer."""

    @jax.jit
    def run(x, mask):
        return norm.call(kind, norm.init(norm.flax, **options), x, mask, **options)

    return run(x, mask)


def error_of(y, expected):
    return np.abs(exact(y) - expected).max()


def stats_of(norm, variables):
    return variables["batch_stats"] if norm.api == "linen" else variables


@changed(
    "The variance does not cancel",
    "Flax subtracts two large numbers, E[x²] - E[x]², and far from zero nothing is left.",
    CANCELLING,
)
def variance_far_from_zero(norm):
    x = X + 1000
    expected = norm.define(x)
    (ours, _), (flax, _) = (trained(norm, kind, x) for kind in norm.kinds)
    assert_close(ours, expected)
    assert error_of(flax, expected) > 1e-3


@changed(
    "`use_fast_variance` and `force_float32_reductions` mean less",
    "One variance is both fast and safe, and statistics are always taken in at least float32.",
    [name for name in LINEN if name in CANCELLING],
)
def attributes_that_mean_less(norm):
    x = (X + 30).astype(jnp.bfloat16)
    expected = norm.define(x)
    options = dict(force_float32_reductions=False)
    (ours, _), (flax, _) = (trained(norm, kind, x, **options) for kind in norm.kinds)
    assert_close(ours, expected, tolerance=1.6e-2)
    assert error_of(flax, expected) > 0.1
    (ours, _), (safe, _) = (
        trained(norm, norm.ours, use_fast_variance=fast) for fast in (True, False)
    )
    chex.assert_trees_all_equal(ours, safe)


@changed(
    "Devices are merged by their counts",
    "Flax averages the devices' averages, so that a device with fewer valid values weighs more.",
    list(NORMS),
)
def uneven_masks(norm):
    x = (X + jnp.arange(2)[:, None, None, None].repeat(2, 0) * 3).reshape(2, 2, *SHAPE[1:])
    # A norm of each example has its own axes divided over the devices.
    mask = jnp.stack([jnp.ones_like(MASK[:2]), MASK[2:] & MASK[:2]])
    variables = norm.init(norm.flax)

    def run(kind):
        call = partial(norm.call, kind, axis_name="data")
        mapped = jax.vmap(lambda x, mask: call(variables, x, mask)[0], axis_name="data")
        return jax.jit(mapped)(x, mask)

    expected = define_across(norm, x, mask)
    assert_close(run(norm.ours), expected)
    assert error_of(run(norm.flax), expected) > 1e-2


def define_across(norm, x, mask):
    """`Norm.define`, with the statistics over the leading axis as well."""
    if norm.name == "BatchNorm":
        return norm.define(x.reshape(SHAPE), mask.reshape(SHAPE)).reshape(x.shape)
    # The devices' values beside each other, along an axis that the statistics are over.
    axis = {(3,): 2, (1, 2, 4): 1, (1, 2): 1}[norm.reduced]
    if norm.reduced == (3,):
        joined = [np.concatenate(np.asarray(one), axis=-1) for one in (x, mask)]
        return np.stack(np.split(norm.define(*joined), 2, axis=-1))
    joined = [np.concatenate(np.asarray(one), axis=axis) for one in (x, mask)]
    return np.stack(np.split(norm.define(*joined), 2, axis=axis))


@changed(
    "Nothing valid under the mask is no special case",
    "Flax divides zero by zero, and one NaN ends a training.",
    list(NORMS),
)
def nothing_valid(norm):
    mask = jnp.zeros_like(MASK)
    (ours, updated), (flax, _) = (trained(norm, kind, mask=mask) for kind in norm.kinds)
    assert jnp.isfinite(ours).all()
    assert jnp.isnan(flax).all()
    if norm.name == "BatchNorm":
        chex.assert_trees_all_equal(updated, norm.init(norm.ours))


@changed(
    "What is behind the mask reaches no gradient",
    "Flax multiplies it by zero, and NaN times zero is NaN.",
    list(NORMS),
)
def poison_behind_the_mask(norm):
    variables, x = norm.init(norm.flax), jnp.where(MASK, X, jnp.nan)

    def gradient(kind, x):
        def loss(variables):
            y, _ = norm.call(kind, variables, x, MASK)
            return jnp.sum(jnp.sin(jnp.where(MASK, y, 0)))

        return jax.tree.leaves(jax.jit(jax.grad(loss))(variables))

    assert_close(gradient(norm.ours, x), gradient(norm.flax, X))
    assert any(jnp.isnan(leaf).any() for leaf in gradient(norm.flax, x))


@changed(
    "A batch that is not finite leaves the running statistics alone",
    "Flax's are NaN ever after, though the next batch may be sound.",
    BATCH_NORMS,
)
def poisoned_batch(norm):
    x = X.at[0, 0, 0, 1].set(jnp.inf)
    (_, ours), (_, flax) = (trained(norm, kind, x) for kind in norm.kinds)
    _, expected = trained(norm, norm.ours)
    for name, initial in (("mean", 0), ("var", 1)):
        found = stats_of(norm, ours)[name]
        assert_close(found, stats_of(norm, expected)[name].at[1].set(initial))
        assert not jnp.isfinite(stats_of(norm, flax)[name][1])


@changed(
    "`dtype` is that of the result",
    "NNX rounds input and statistics to it first; near 300, bfloat16 goes in steps of 2.",
    NNX,
)
def rounded_to_dtype(norm):
    x = X + 300
    expected = norm.define(x)
    (ours, _), (flax, _) = (trained(norm, kind, x, dtype=jnp.bfloat16) for kind in norm.kinds)
    assert_close(ours, expected, dtype=jnp.bfloat16)
    assert error_of(flax, expected) > (1e-3 if norm.name == "RMSNorm" else 0.1)


@changed(
    "`axis_name` needs no axis where one device has the whole batch",
    "One configuration then serves `jit`, `pmap`, `shard_map` and one device.",
    list(NORMS),
)
def unbound_axis(norm):
    variables = norm.init(norm.flax)
    run = [jax.jit(partial(norm.call, kind, axis_name="data")) for kind in norm.kinds]
    assert_close(run[0](variables, X), trained(norm, norm.flax))
    with pytest.raises(NameError, match="unbound axis name"):
        run[1](variables, X)
    with pytest.raises(NameError, match="axis_name='data' is not bound"):
        jax.vmap(partial(norm.call, norm.ours, variables, axis_name="data"), axis_name="bacht")(
            X[:, None]
        )


@changed(
    "Numbers in a mask are weights",
    "Linen takes every number but zero for a one, and NNX takes no numbers.",
    list(NORMS),
)
def weights(norm):
    weight = jnp.abs(standard_normal(2, SHAPE)) + 0.1
    expected = norm.define(X, weight)
    assert_close(trained(norm, norm.ours, mask=weight)[0], expected)
    if norm.api == "linen":
        flax, _ = trained(norm, norm.flax, mask=weight)
        if norm.name != "GroupNorm":
            assert_close(flax, norm.define(X))
        assert error_of(flax, expected) > 1e-2
    else:
        with pytest.raises(Exception, match=r"where|bool"):
            trained(norm, norm.flax, mask=weight)


@changed(
    "Any `reduction_axes` of GroupNorm",
    "NNX repeats the groups' statistics along axis 1, where they lie by default alone.",
    [name for name in NORMS if name == "nnx.GroupNorm"],
)
def reduction_axes_of_group_norm(norm):
    twin = NORMS["linen.GroupNorm"]
    options = dict(reduction_axes=(2, 3))
    expected, _ = trained(twin, twin.flax, **options)
    assert_close(trained(norm, norm.ours, **options)[0], expected)
    assert error_of(trained(norm, norm.flax, **options)[0], exact(expected)) > 0.1


@changed(
    "Training on one value per feature is an error",
    "The output would be the bias whatever the input, and PyTorch refuses it too; Flax's guide to "
    "batch norm makes such a call, on `jnp.ones((1, 3))`.",
    BATCH_NORMS,
)
def one_value(norm):
    x = X[:1, :1, :1]
    assert_close(trained(norm, norm.flax, x)[0], np.zeros(x.shape))
    with pytest.raises(ValueError, match="one value per feature"):
        trained(norm, norm.ours, x)


@changed(
    "Integers and booleans are errors",
    "Which floating-point dtype they become is a choice, which Flax makes silently.",
    list(NORMS),
)
def integers(norm):
    x = jnp.arange(360).reshape(SHAPE)
    assert trained(norm, norm.flax, x)[0].dtype == jnp.float32
    with pytest.raises(TypeError, match="int32"):
        trained(norm, norm.ours, x)


@changed(
    "An axis named twice is an error",
    "It tells that the input has another rank than was thought; Flax drops the second.",
    ["linen.BatchNorm", *(name for name in NORMS if re.search(r"LayerNorm|RMSNorm", name))],
)
def axis_named_twice(norm):
    name = "axis" if norm.name == "BatchNorm" else "reduction_axes"
    assert_close(trained(norm, norm.flax, **{name: (-1, 3)}), trained(norm, norm.flax))
    with pytest.raises(ValueError, match=rf"{name}=\(-1, 3\) names an axis .* more than once"):
        trained(norm, norm.ours, **{name: (-1, 3)})


@changed(
    "`epsilon` must be positive",
    "Without it what is constant becomes NaN.",
    list(NORMS),
)
def epsilon(norm):
    x = jnp.zeros(SHAPE)
    assert jnp.isnan(trained(norm, norm.flax, x, epsilon=0.0)[0]).all()
    with pytest.raises(ValueError, match="epsilon"):
        trained(norm, norm.ours, x, epsilon=0.0)


@changed(
    "Missing or immutable `batch_stats` are a `ValueError`",
    "It names the layer and the line to write; Flax's name the scope and the variable.",
    ["linen.BatchNorm"],
)
def missing_or_immutable(norm):
    variables = norm.init(norm.flax)
    for given, theirs in (
        (variables, ModifyScopeVariableError),
        ({"params": variables["params"]}, ScopeCollectionNotFound),
    ):
        for kind, error in ((norm.flax, theirs), (norm.ours, ValueError)):
            with pytest.raises(error, match="batch_stats"):
                norm.make(kind).apply(given, X)


@changed(
    "Running statistics keep their dtype",
    "Linen's take that of the batch at the first update, and the next step compiles anew.",
    ["linen.BatchNorm"],
)
def dtype_of_statistics(norm):
    def types(kind):
        initial = norm.init(kind, jnp.zeros(SHAPE))
        _, updated = norm.call(kind, initial, jnp.zeros(SHAPE))
        return [tree["batch_stats"]["mean"] for tree in (initial, updated)]

    with jax.enable_x64(True):
        types = [
            [mean.dtype for mean in jax.eval_shape(partial(types, kind))] for kind in norm.kinds
        ]
    assert types == [[jnp.float64, jnp.float64], [jnp.float32, jnp.float64]]


@pytest.mark.parametrize(
    "title,name",
    [
        pytest.param(title, name, marks=() if name in first else pytest.mark.exhaustive)
        for title, change in CHANGES.items()
        for first in [{name.split(".")[0]: name for name in reversed(change.norms)}.values()]
        for name in change.norms
    ],
)
def test_a_deliberate_change(title, name):
    CHANGES[title].show(NORMS[name])


def test_readme_lists_the_changes():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.split("## Coming from Flax")[1].split("\n## ")[0]
    items = re.findall(r"^- (\*\*.+?)(?=^- |^$|\Z)", section, re.MULTILINE | re.DOTALL)
    listed = [" ".join(item.split()) for item in items]
    assert listed == [f"**{title}.** {change.reason}" for title, change in CHANGES.items()]
