"""The compatibility contract: what of Flax we deliberately do not have, and why."""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import MASK, NORMS, SHAPE, Norm, X
from flax.errors import ModifyScopeVariableError, ScopeCollectionNotFound
from flax_suite import DELIBERATE
from support import assert_close, exact, standard_normal

pytestmark = pytest.mark.usefixtures("compile_quickly")


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
    "Flax subtracts two large numbers, E[x²] - E[x]², and far from zero no correct digit is left. "
    "bfloat16 input needs `use_fast_variance=False` for that.",
    CANCELLING,
)
def variance_far_from_zero(norm):
    x = X + 1000
    expected = norm.define(x)
    (ours, _), (flax, _) = (trained(norm, kind, x) for kind in norm.kinds)
    assert_close(ours, expected)
    assert error_of(flax, expected) > 1e-3
    half = x.astype(jnp.bfloat16)
    guarded, _ = trained(norm, norm.ours, half, use_fast_variance=False)
    assert_close(guarded, norm.define(half))


@changed(
    "`use_fast_variance` and `force_float32_reductions` mean less",
    "False guards the variance of bfloat16 input; other input is always guarded. Rounding to "
    "bfloat16 has moved the variance by more than E[x²] - E[x]² loses. Statistics are always taken "
    "and stored in at least float32.",
    [name for name in LINEN if name in CANCELLING],
)
def attributes_that_mean_less(norm):
    x = (X + 30).astype(jnp.bfloat16)
    expected = norm.define(x)
    options = dict(force_float32_reductions=False)
    (ours, _), (flax, _) = (trained(norm, kind, x, **options) for kind in norm.kinds)
    assert_close(ours, expected, tolerance=1.6e-2)
    assert error_of(flax, expected) > 0.1
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        x = (X + 300).astype(dtype)
        (fast, _), (safe, _) = (
            trained(norm, norm.ours, x, use_fast_variance=fast) for fast in (True, False)
        )
        assert_close(safe, norm.define(x))
        assert (error_of(fast, safe) > 1e-5) == (dtype == jnp.bfloat16)


@changed(
    "The mean is not rounded",
    "Flax's mean is a single float32, even with `use_fast_variance=False`. A million standard "
    "deviations from zero, float32 has steps of 0.06 of them.",
    CANCELLING,
)
def mean_far_from_zero(norm):
    x = X + 1_000_000
    expected = norm.define(x)
    options = dict(use_fast_variance=False)
    (ours, _), (flax, _) = (trained(norm, kind, x, **options) for kind in norm.kinds)
    assert_close(ours, expected)
    assert error_of(flax, expected) > 1e-3


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
    "A batch without valid values is safe",
    "Flax divides zero by zero, and a single NaN ends a training.",
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
    "Masked values reach no gradient",
    "Flax multiplies them by zero, and NaN times zero is NaN.",
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
    "Flax's stay NaN, even if every later batch is sound.",
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
    "`dtype` is the dtype of the result",
    "NNX first rounds input and statistics to it; near 300, bfloat16 has steps of 2.",
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
    "Linen treats every nonzero number as 1, and NNX accepts no numbers.",
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
    "GroupNorm accepts any `reduction_axes`",
    "NNX repeats the groups' statistics along axis 1, which is right for the default alone.",
    [name for name in NORMS if name == "nnx.GroupNorm"],
)
def reduction_axes_of_group_norm(norm):
    twin = NORMS["linen.GroupNorm"]
    options = dict(reduction_axes=(2, 3))
    expected, _ = trained(twin, twin.flax, **options)
    assert_close(trained(norm, norm.ours, **options)[0], expected)
    assert error_of(trained(norm, norm.flax, **options)[0], exact(expected)) > 0.1


@changed(
    "Training on one value per feature warns",
    "The output is the bias whatever the input, and no gradient reaches the input. PyTorch refuses "
    "such a batch; Flax says nothing.",
    BATCH_NORMS,
)
def one_value(norm):
    x = X[:1, :1, :1]
    flax, _ = trained(norm, norm.flax, x)
    with pytest.warns(UserWarning, match="BatchNorm.* has one value per feature to train on"):
        ours, _ = trained(norm, norm.ours, x)
    assert_close((ours, flax), (np.zeros(x.shape), np.zeros(x.shape)))


@changed(
    "Integers and booleans are errors",
    "Flax silently chooses the floating-point dtype that they become.",
    list(NORMS),
)
def integers(norm):
    x = jnp.arange(360).reshape(SHAPE)
    assert trained(norm, norm.flax, x)[0].dtype == jnp.float32
    with pytest.raises(TypeError, match="int32"):
        trained(norm, norm.ours, x)


@changed(
    "An axis named twice is an error",
    "It shows that the input has another rank than expected; Flax drops the second.",
    ["linen.BatchNorm", *(name for name in NORMS if re.search(r"LayerNorm|RMSNorm", name))],
)
def axis_named_twice(norm):
    name = "axis" if norm.name == "BatchNorm" else "reduction_axes"
    assert_close(trained(norm, norm.flax, **{name: (-1, 3)}), trained(norm, norm.flax))
    with pytest.raises(ValueError, match=rf"{name}=\(-1, 3\) names an axis .* more than once"):
        trained(norm, norm.ours, **{name: (-1, 3)})


@changed(
    "`epsilon` must be positive",
    "Without it, constant features become NaN.",
    list(NORMS),
)
def epsilon(norm):
    x = jnp.zeros(SHAPE)
    assert jnp.isnan(trained(norm, norm.flax, x, epsilon=0.0)[0]).all()
    with pytest.raises(ValueError, match="epsilon"):
        trained(norm, norm.ours, x, epsilon=0.0)


@changed(
    "Missing or immutable `batch_stats` are a `ValueError`",
    "It names the layer and the line to write; Flax's error names the scope and the variable.",
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
    "Errors have other texts",
    "They name the argument, what was received, what was expected, and the fix.",
    ["linen.InstanceNorm", "nnx.InstanceNorm"],
)
def texts_of_errors(norm):
    for kind, text in (
        (norm.flax, "cannot include the leading dimension"),
        (
            norm.ours,
            r"feature_axes=0 has the first axis of x of shape \(4, 3, 5, 6\).*leave it out",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            norm.call(kind, norm.init(kind, feature_axes=0), X, feature_axes=0)


@changed(
    "Running statistics keep their dtype",
    "Linen's take the dtype of the batch at the first update, and the next step compiles again.",
    ["linen.BatchNorm"],
)
def dtype_of_statistics(norm):
    def types(kind):
        initial = norm.init(kind, jnp.zeros(SHAPE))
        _, updated = norm.call(kind, initial, jnp.zeros(SHAPE))
        return [tree["batch_stats"]["mean"] for tree in (initial, updated)]

    with jax.enable_x64(True):
        found = [
            [mean.dtype for mean in jax.eval_shape(partial(types, kind))] for kind in norm.kinds
        ]
    assert found == [[jnp.float64, jnp.float64], [jnp.float32, jnp.float64]]


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


def test_tests_of_flax_fail_for_these_changes_alone():
    """`make flax-tests` runs them."""
    assert set(DELIBERATE) <= set(CHANGES)


def test_the_guide_lists_the_changes():
    page = (Path(__file__).parents[2] / "docs/guides/from_flax.md").read_text()
    section = page.split("## What is deliberately different\n")[1].split("\n## ")[0]
    items = re.findall(r"^- (\*\*.+?)(?=^- |^$|\Z)", section, re.MULTILINE | re.DOTALL)
    listed = [" ".join(item.split()) for item in items]
    expected = [f"**{title}.** {change.reason}" for title, change in CHANGES.items()]
    assert sorted(listed) == sorted(expected)  # the guide groups them
