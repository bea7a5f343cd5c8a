import gc
import sys
import weakref
from functools import cache, partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze, meta
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import assert_close, define_affine, define_moments, exact, standard_normal

import bn_jax as bn
from bn_jax._recalibrate import LayerChange, Recalibration, passes, recalibrate
from bn_jax._recalibrate.measuring import _steps
from bn_jax._recalibrate.pooling import pooled

pytestmark = pytest.mark.usefixtures("compile_quickly")
X = standard_normal(0, (13, 6, 6, 2)) * 3 + 1
NORMS = ("norm_0", "norm_1", "norm_2", "norm_3")


class Net(nn.Module):
    """Convolutions and a dense layer with norms between them, one after a shortcut."""

    norm: type = bn.linen.BatchNorm
    options: tuple = ()
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train, mask=None):
        number = iter(range(4))

        def norm(x):
            options = {} if mask is None else {"mask": mask.reshape(-1, *[1] * (x.ndim - 1))}
            layer = self.norm(
                use_running_average=not train, name=f"norm_{next(number)}", **dict(self.options)
            )
            return layer(x, **options)

        x = nn.relu(norm(nn.Conv(4, (3, 3), name="conv_0")(x)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        y = nn.relu(norm(nn.Conv(4, (3, 3), name="conv_1")(x)))
        x = nn.relu(x + norm(nn.Conv(4, (3, 3), name="conv_2")(y)))
        return norm(nn.Dense(3, name="dense")(x.mean((1, 2))))


def make(model):
    """Variables with scales other than 1, and statistics far from those of `X`."""
    return dict(made(model))


@cache
def made(model):
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), X[:1])
    params = jax.tree.map(lambda leaf: leaf + 0.3 * np.sin(leaf + 1), variables["params"])
    return {"params": jax.tree.map(jnp.asarray, params), "batch_stats": variables["batch_stats"]}


@cache
def evaluate(model):
    def forward(variables, x):
        return model.apply(variables, x, train=False, mutable=["batch_stats"])

    return forward


def convolve(x, kernel, bias):
    """A 3x3 convolution in float64, padded to the size of `x`."""
    x, kernel = exact(x), exact(kernel)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return exact(bias) + sum(
        padded[:, row : row + height, column : column + width] @ kernel[row, column]
        for row in range(3)
        for column in range(3)
    )


def define(params, x, mask=None, ddof=0, old=None, prior=0):
    """The population statistics of every norm of `Net` in float64, mixed with old ones."""
    stats = {}

    def norm(name, x):
        valid = None if mask is None else mask.reshape(-1, *[1] * (x.ndim - 1))
        count, mean, var = define_moments(x, -1, valid)
        stats[name] = {"mean": mean, "var": var * count / (count - ddof)}
        if old is not None:
            stats[name] = mix(old[name], stats[name], prior)
        return define_affine(x, **stats[name], **params[name])

    def conv(name, x):
        return convolve(x, params[name]["kernel"], params[name]["bias"])

    x = np.maximum(norm("norm_0", conv("conv_0", x)), 0)
    y = np.maximum(norm("norm_1", conv("conv_1", x)), 0)
    x = np.maximum(x + norm("norm_2", conv("conv_2", y)), 0)
    dense = params["dense"]
    norm("norm_3", x.mean((1, 2)) @ exact(dense["kernel"]) + exact(dense["bias"]))
    return stats


def mix(old, new, prior):
    return {name: prior * exact(old[name]) + (1 - prior) * new[name] for name in new}


# --- the statistics of the whole data set -------------------------------------------------------


SPLITS = {
    "uneven": [4, 1, 8],
    "one at a time": [1] * 13,
    "two": [6, 7],
}


def split(x, sizes):
    return np.split(x, np.cumsum(sizes)[:-1])


@pytest.mark.parametrize(
    "sizes,norm",
    [("uneven", bn.linen.BatchNorm), ("one at a time", bn.linen.BatchNorm), ("two", nn.BatchNorm)],
)
def test_the_statistics_of_the_whole_data_set_for_any_split(sizes, norm):
    model = Net(norm)
    variables = make(model)
    found = recalibrate(evaluate(model), variables, split(X, SPLITS[sizes]))
    expected = define(variables["params"], X)
    assert_close(found.batch_stats, expected, dtype=jnp.float32)
    assert found.passes == 4
    assert found.settled
    assert [one.path for one in found.layers] == sorted(NORMS)
    assert [one.values for one in found.layers] == [13 * 36] * 3 + [13]
    assert found.layers[0].mean == pytest.approx(np.abs(expected["norm_0"]["mean"]).max(), 1e-5)


def test_every_norm_then_gives_mean_zero_and_variance_one():
    model = Net()
    variables = make(model)
    found = recalibrate(evaluate(model), variables, split(X, [6, 7]))
    recalibrated = {**variables, "batch_stats": found.batch_stats}
    _, captured = model.apply(
        recalibrated, X, train=False, capture_intermediates=True, mutable=["intermediates"]
    )
    for name in NORMS:
        (y,) = captured["intermediates"][name]["__call__"]
        params = variables["params"][name]
        standard = (exact(y) - exact(params["bias"])) / exact(params["scale"])
        axes = tuple(range(y.ndim - 1))
        assert_close(standard.mean(axes), np.zeros(y.shape[-1]), tolerance=1e-5)
        assert_close(standard.var(axes), np.ones(y.shape[-1]), tolerance=1e-4)


def test_masked_padding_does_not_enter():
    model = Net()
    variables = make(model)
    padded = np.full((16, *X.shape[1:]), np.nan, np.float32)
    valid = np.arange(16) % 6 != 3
    padded[valid] = X
    batches = [(padded[at : at + 4], valid[at : at + 4]) for at in range(0, 16, 4)]

    def forward(variables, batch):
        x, mask = batch
        return model.apply(variables, x, train=False, mask=mask, mutable=["batch_stats"])

    found = recalibrate(forward, variables, batches)
    assert_close(found.batch_stats, define(variables["params"], X))


def test_unbiased_variances_and_counts_of_batches():
    model = Net(options=(("running_var_ddof", 1), ("momentum", None)))
    variables = make(model)
    found = recalibrate(evaluate(model), variables, split(X, [6, 7]))
    expected = define(variables["params"], X, ddof=1)
    for statistics in expected.values():
        statistics["count"] = np.full(statistics["mean"].shape, 2)
    assert_close(found.batch_stats, expected, dtype=jnp.float32)


@pytest.mark.parametrize("kind", ["SWA", "EMA"])
def test_averaged_weights(kind):
    """Their statistics are not the average of the statistics in training."""
    model = Net()
    steps = [make(model) for _ in range(3)]
    steps = [
        jax.tree.map(lambda leaf, step=step: leaf * (1 + 0.4 * jnp.cos(leaf + step)), one["params"])
        for step, one in enumerate(steps)
    ]
    weights = [1 / 3, 1 / 3, 1 / 3] if kind == "SWA" else [0.25, 0.25, 0.5]
    if kind == "EMA":
        average = optax.incremental_update(steps[1], steps[0], 0.5)
        average = optax.incremental_update(steps[2], average, 0.5)
    else:
        average = jax.tree.map(lambda *leaves: sum(leaves) / 3, *steps)
    own = [define(params, X) for params in steps]
    averaged = jax.tree.map(lambda *leaves: np.average(leaves, axis=0, weights=weights), *own)
    variables = {"params": average, "batch_stats": jax.tree.map(jnp.float32, averaged)}
    found = recalibrate(evaluate(model), variables, split(X, [6, 7]))
    expected = define(average, X)
    assert_close(found.batch_stats, expected)
    assert np.abs(averaged["norm_3"]["mean"] - expected["norm_3"]["mean"]).max() > 0.05


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_batches_far_from_zero(offset):
    x = standard_normal(0, (96, 3)) + offset
    model = nn.BatchNorm(use_running_average=True)
    found = recalibrate(
        lambda variables, x: model.apply(variables, x, mutable=["batch_stats"]),
        jax.jit(model.init)(jax.random.key(0), x),
        split(x, [32, 32, 32]),
    )
    _, mean, var = define_moments(x)
    assert_close(found.batch_stats, {"mean": mean, "var": var}, tolerance=1e-6)


# --- batches normalized by their own statistics -------------------------------------------------


def two_norms(variables, x, train=True):
    params, stats = variables["params"], variables["batch_stats"]
    norm = partial(bn.batch_norm, use_running_average=not train)
    y, first = norm(params["first"], stats["first"], x)
    y, second = norm(params["second"], stats["second"], jax.nn.relu(y) + 0.3 * x)
    return y, {"batch_stats": {"first": first, "second": second}}


def test_batches_normalized_by_themselves_are_pooled_in_one_pass():
    batches = [
        standard_normal(seed, (size, 3)) * (1 + seed) + 4 * seed for seed, size in enumerate((5, 9))
    ]
    params = {"first": bn.identity_params(batches[1]), "second": {}}
    stats = {name: bn.init_batch_stats(3) for name in params}
    found = recalibrate(two_norms, {"params": params, "batch_stats": stats}, iter(batches))
    assert (found.passes, found.settled) == (1, True)

    def behind(x):
        _, mean, var = define_moments(x)
        y = define_affine(x, mean, var, params["first"]["scale"], params["first"]["bias"])
        return np.maximum(y, 0) + 0.3 * exact(x)

    expected = {
        name: dict(zip(("mean", "var"), define_moments(np.concatenate(values))[1:], strict=True))
        for name, values in (("first", batches), ("second", list(map(behind, batches))))
    }
    assert_close(found.batch_stats, expected)


def test_averages_of_variances_are_not_the_variance():
    """What PyTorch's update_bn computes: cumulative averages with equal weight for each batch."""
    batches = [standard_normal(seed, (8, 3)) + 3 * seed for seed in range(3)]
    _, mean, var = define_moments(np.concatenate(batches))
    stats = bn.init_batch_stats(3, use_count=True)
    for x in batches:
        _, stats = bn.batch_norm({}, stats, x, use_running_average=False, momentum=None)
    assert np.all(exact(stats["var"]) < 0.6 * var)

    def forward(variables, x):
        y, updated = bn.batch_norm({}, variables["batch_stats"], x, use_running_average=False)
        return y, {"batch_stats": updated}

    old = bn.init_batch_stats(3)
    found = recalibrate(forward, {"batch_stats": old}, batches)
    assert_close(found.batch_stats, {"mean": mean, "var": var})


# --- adaptation: mixed with the old statistics --------------------------------------------------


def adapting(model):
    """Variables trained on other data, in float32."""
    variables = make(model)
    old = define(variables["params"], 2 - X[::-1] ** 2)
    return {**variables, "batch_stats": jax.tree.map(jnp.float32, old)}


@pytest.mark.parametrize("prior", [0.0, 0.3, 15 / 16])
def test_every_norm_mixes_its_input_after_norms_that_mix(prior):
    model = Net()
    variables = adapting(model)
    old = variables["batch_stats"]
    found = recalibrate(evaluate(model), variables, split(X, [6, 7]), prior=prior)
    expected = define(variables["params"], X, old=old, prior=prior)
    assert_close(found.batch_stats, expected, dtype=jnp.float32)
    assert (found.passes, found.settled) == (4, True)
    for one in found.layers:
        before, after = old[one.path], expected[one.path]
        moved = np.abs(after["mean"] - before["mean"]) / np.sqrt(before["var"])
        factor = after["var"] / exact(before["var"])
        assert one.mean == pytest.approx(moved.max(), 1e-4)
        assert one.var == pytest.approx(np.maximum(factor, 1 / factor).max(), 1e-4)
        assert (one.values, one.kept) == (13 if one.path == "norm_3" else 13 * 36, 0)


def test_without_a_prior_the_old_statistics_have_no_part():
    model = Net()
    variables = adapting(model)
    found, same = (
        recalibrate(evaluate(model), variables, split(X, [6, 7]), **options)
        for options in ({}, {"prior": 0})
    )
    chex.assert_trees_all_equal(found.batch_stats, same.batch_stats)
    assert found.layers == same.layers


def test_a_mixture_with_the_pooled_statistics_of_batches_that_normalize_themselves():
    batches = [standard_normal(seed, (8, 3)) + 3 * seed for seed in range(3)]
    old = {"mean": jnp.array([1.0, -2, 3]), "var": jnp.array([4.0, 0.5, 1])}

    def forward(variables, x):
        y, updated = bn.batch_norm({}, variables["batch_stats"], x, use_running_average=False)
        return y, {"batch_stats": updated}

    found = recalibrate(forward, {"batch_stats": old}, iter(batches), prior=0.75)
    _, mean, var = define_moments(np.concatenate(batches))
    assert found.passes == 1
    assert_close(found.batch_stats, mix(old, {"mean": mean, "var": var}, 0.75))


def test_old_statistics_that_are_not_finite_have_no_share():
    """And batches keep equal weights: the kept share counts as three times as many batches."""
    x = standard_normal(5, (8, 3)) + 1
    old = {
        "mean": jnp.array([np.nan, 2, 3]), "var": jnp.array([1, np.inf, 2.0]), "count": jnp.ones(3)
    }  # fmt: skip

    def forward(variables, x):
        y, updated = bn.batch_norm(
            {}, variables["batch_stats"], x, use_running_average=True, momentum=None
        )
        return y, {"batch_stats": updated}

    found = recalibrate(forward, {"batch_stats": old}, split(x, [3, 5]), prior=0.75)
    _, mean, var = define_moments(x)
    mean[2], var[2] = 0.75 * 3 + 0.25 * mean[2], 0.75 * 2 + 0.25 * var[2]
    assert_close(found.batch_stats, {"mean": mean, "var": var, "count": np.array([2, 2, 8])})


# --- passes -------------------------------------------------------------------------------------


def test_statistics_that_are_right_settle_in_one_pass():
    model = Net()
    variables = make(model)
    found = recalibrate(evaluate(model), variables, split(X, [6, 7]))
    recalibrated = {**variables, "batch_stats": found.batch_stats}
    again = recalibrate(evaluate(model), recalibrated, split(X, [6, 7]))
    assert (again.passes, again.settled) == (1, True)
    assert_close(again.batch_stats, found.batch_stats, tolerance=2e-6)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_bound_on_the_passes(passes):
    model = Net()
    variables = make(model)
    batches = split(X, [6, 7])
    given = iter(batches) if passes == 1 else batches
    found = recalibrate(evaluate(model), variables, given, passes=passes)
    assert (found.passes, found.settled) == (passes, False)
    assert f"had not settled after passes={passes}" in str(found)
    expected = define(variables["params"], X)
    exactly = [
        np.allclose(exact(found.batch_stats[name]["mean"]), expected[name]["mean"], 1e-4, 1e-5)
        for name in NORMS
    ]
    assert exactly == [number < passes for number in range(4)]


def test_a_function_that_returns_a_new_iterator():
    model = Net()
    variables = make(model)
    found = recalibrate(evaluate(model), variables, lambda: iter(split(X, [6, 7])))
    assert_close(found.batch_stats, define(variables["params"], X))


def test_an_iterator_is_refused_after_the_first_batch():
    taken = []

    def watched():
        for x in split(X, [6, 7]):
            taken.append(x)
            yield x

    model = Net()
    message = (
        "(?s)iterated once only, but up to 4 norms.*may still change.*lambda: iter.loader.*passes=1"
    )
    with pytest.raises(ValueError, match=message):
        recalibrate(evaluate(model), make(model), watched())
    assert len(taken) == 1


def test_an_iterator_is_enough_if_one_norm_evaluates():
    model = nn.BatchNorm(use_running_average=True)
    x = X.reshape(-1, 2)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    found = recalibrate(
        lambda variables, x: model.apply(variables, x, mutable=["batch_stats"]),
        variables,
        iter([x[:50], x[50:]]),
    )
    _, mean, var = define_moments(x)
    assert_close(found.batch_stats, {"mean": mean, "var": var})


@pytest.mark.parametrize("kind", ["two feature axes", "members"])
def test_an_iterator_is_enough_if_no_norm_is_after_another(kind):
    x = np.array(standard_normal(3, (9, 4, 3)) + 2)
    shape = (4, 3)

    def evaluate_once(stats, x):
        axis = (1, 2) if kind == "two feature axes" else -1
        return bn.batch_norm({}, stats, x, use_running_average=True, axis=axis)

    def forward(variables, x):
        call = evaluate_once
        if kind == "members":
            call = jax.vmap(call, in_axes=(0, 1), out_axes=(1, 0))
        y, stats = call(variables["batch_stats"], x)
        return y, {"batch_stats": stats}

    stats = {"mean": jnp.zeros(shape), "var": jnp.ones(shape)}
    found = recalibrate(forward, {"batch_stats": stats}, iter([x[:4], x[4:]]))
    assert found.passes == 1 and found.settled
    assert_close(found.batch_stats, {"mean": np.mean(x, 0, float), "var": np.var(np.float64(x), 0)})


def test_an_iterator_is_refused_for_layers_of_a_scan():
    model, x = Deep(), standard_normal(0, (9, 4)) + 1
    variables = jax.jit(model.init)(jax.random.key(0), x)
    with pytest.raises(ValueError, match="once only, but up to 3 norms"):
        recalibrate(
            lambda variables, x: model.apply(variables, x, mutable=["batch_stats"]),
            variables,
            iter(split(x, [2, 7])),
        )


class Twice(nn.Module):
    """One norm, before and after a dense layer."""

    @nn.compact
    def __call__(self, x, train):
        norm = bn.linen.BatchNorm(use_running_average=not train, name="norm")
        return norm(nn.relu(nn.Dense(3, name="dense")(norm(x))))


def test_a_norm_that_is_called_twice_is_measured_by_both_calls():
    model, x = Twice(), 2 + standard_normal(7, (40, 3))
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), x)
    kernel, bias = (np.float64(variables["params"]["dense"][name]) for name in ("kernel", "bias"))
    mean, var = np.zeros(3), np.ones(3)
    for _ in range(60):
        hidden = np.maximum((np.float64(x) - mean) / np.sqrt(var + 1e-5) @ kernel + bias, 0)
        _, mean, var = define_moments(np.concatenate([x, hidden]))
    found = recalibrate(evaluate(model), variables, split(x, [25, 15]))
    assert found.settled and 2 < found.passes < 60
    assert_close(found.batch_stats["norm"], {"mean": mean, "var": var}, dtype=jnp.float32)
    assert [one.values for one in found.layers] == [80]
    with pytest.raises(
        ValueError, match="a norm is called several times and normalizes by running"
    ):
        recalibrate(evaluate(model), variables, iter(split(x, [25, 15])))
    once = recalibrate(evaluate(model), variables, iter(split(x, [25, 15])), passes=1)
    assert not once.settled


def test_a_norm_that_never_settles_is_reported(monkeypatch):
    monkeypatch.setattr(passes, "PASSES_OF_A_LOOP", 5)
    model, other = Twice(), iter([standard_normal(seed, (9, 3)) for seed in range(9)])
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), np.ones((9, 3)))
    found = recalibrate(evaluate(model), variables, lambda: [next(other)])
    assert (found.passes, found.settled) == (5, False)
    assert "had not settled after passes=5" in str(found)


def test_each_shape_is_traced_once_in_all_passes_and_calls():
    shapes, x = [], standard_normal(0, (13, 3)) + 1
    variables = {"params": {"first": {}, "second": {}}}
    variables["batch_stats"] = {name: bn.init_batch_stats(3) for name in variables["params"]}

    def forward(variables, x):
        shapes.append(x.shape)
        return two_norms(variables, x, train=False)

    for variant in (variables, jax.tree.map(np.asarray, variables)):
        assert recalibrate(forward, variant, split(x, [4, 1, 8])).passes == 2
    assert shapes == [(4, 3), (1, 3), (8, 3)]


def test_a_step_is_freed_with_its_forward_function():
    x = standard_normal(0, (4, 3))
    variables = {"params": {"first": {}, "second": {}}}
    variables["batch_stats"] = {name: bn.init_batch_stats(3) for name in variables["params"]}
    forward = lambda variables, x: two_norms(variables, x)  # noqa: E731
    recalibrate(forward, variables, [x])
    assert forward in _steps
    reference = weakref.ref(forward)
    del forward
    gc.collect()
    assert reference() is None


def test_counts_beyond_those_of_float32():
    ones = np.ones(1, np.float32)
    large = bn.Measured(2.0**24 * ones, 0 * ones, ones, *5 * [0 * ones])
    pools = {}
    for count in (2.0**24, 1.0, 1.0):
        pools = pooled(pools, {"norm": large._replace(count=count * ones)})
    assert pools["norm"].count == 2**24 + 2


# --- what is kept -------------------------------------------------------------------------------


class OfTheUser(nn.BatchNorm):
    """A subclass, whose statistics are not touched."""


class Kept(nn.Module):
    """Norms that measure, and norms that do not."""

    @nn.compact
    def __call__(self, x, train=False, reach=True):
        x = bn.linen.BatchNorm(use_running_average=not train, name="measured")(x)
        x = bn.linen.BatchNorm(use_running_average=not train, frozen=True, name="frozen")(x)
        x = OfTheUser(use_running_average=not train, name="of_the_user")(x)
        if reach:
            x = bn.linen.BatchNorm(use_running_average=not train, name="unreached")(x)
        return x


def test_norms_that_measure_nothing_keep_their_statistics_and_are_reported():
    model, x = Kept(), np.array(standard_normal(0, (8, 3)))
    x[:4, 1], x[4:, 1] = np.nan, np.inf
    variables = jax.jit(model.init)(jax.random.key(0), x)
    variables["batch_stats"]["extra"] = {"u": jnp.ones(2)}

    def forward(variables, x):
        return model.apply(variables, x, reach=False, mutable=["batch_stats"])

    found = recalibrate(forward, variables, [x[:4], x[4:]])
    kept = dict(found.batch_stats)
    measured = kept.pop("measured")
    initial = dict(variables["batch_stats"])
    del initial["measured"]
    chex.assert_trees_all_equal(kept, initial)
    _, mean, var = define_moments(np.delete(x, 1, 1))
    expected = {"mean": np.insert(mean, 1, 0), "var": np.insert(var, 1, 1)}
    assert_close(measured, expected)
    by_path = {one.path: one for one in found.layers}
    assert by_path["measured"].values == 8
    assert {path: one.kept for path, one in by_path.items()} == {
        "measured": 1, "frozen": 3, "of_the_user": 3, "unreached": 3,
    }  # fmt: skip
    for path in ("frozen", "of_the_user", "unreached"):
        assert by_path[path][1:] == (0, 1, 0, 3, 0, 0)
        assert f"{path} has measured nothing and keeps its statistics" in str(found)
    assert "measured keeps the statistics of 1 feature, which no batch entered" in str(found)


def test_a_batch_with_a_value_that_is_not_finite_is_left_out_and_reported():
    model = nn.BatchNorm(use_running_average=True)
    x = np.array(standard_normal(0, (8, 2)))
    x[0, 1] = np.inf
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def forward(variables, x):
        return model.apply(variables, x, mutable=["batch_stats"])

    text = str(recalibrate(forward, variables, [x]))
    assert "keeps the statistics of 1 feature, which no batch entered: a batch with" in text
    assert "a single value that is not finite, does not enter" in text
    text = str(recalibrate(forward, variables, [x[:, 1:].repeat(2, 1)]))
    assert "every batch had a value that was not finite, or no valid value" in text


def test_poisoned_statistics_heal():
    """Nothing after poisoned statistics is finite before they are."""
    model = Net()
    variables = make(model)
    expected = define(variables["params"], X)
    poisoned = jax.tree.map(lambda leaf: jnp.float32(leaf).at[0].set(np.nan), expected)
    found = recalibrate(evaluate(model), {**variables, "batch_stats": poisoned}, split(X, [6, 7]))
    assert_close(found.batch_stats, expected)
    assert all(np.isinf(one.mean) and np.isinf(one.var) for one in found.layers)


def some_changes():
    layers = (
        LayerChange("small", 0.1, 1.01, 10.0, 0, 0.0, 0),
        LayerChange("", 0.2, 30.0, 5.0, 0, 0.0, 0),
        LayerChange("moved", 2.0, 1.0, 12345678.0, 0, 0.0, 0),
    )
    return Recalibration({}, layers, 1, True, 3)


def test_the_table_begins_with_the_largest_change():
    assert str(some_changes()).splitlines() == [
        "norm                mean moved by  variance changed  values",
        "the top-level norm  0.2 std        30 times          5",
        "moved               2 std          1 times           12345678",
        "small               0.1 std        1.01 times        10",
    ]


def test_notebooks_show_a_short_line_and_a_table():
    result = some_changes()
    assert repr(result) == "Recalibration(3 norms, passes=1, settled=True)"
    html = result._repr_html_()
    assert html.startswith("<table><thead><tr><th>norm</th><th>mean moved by</th>")
    assert "<tr><td>moved</td><td>2 std</td><td>1 times</td><td>12345678</td></tr>" in html
    assert html.endswith("</table>")
    unsettled = result._replace(settled=False)
    assert repr(unsettled) == "Recalibration(3 norms, passes=1, settled=False)"
    assert "</table><p>The statistics had not settled after passes=1" in unsettled._repr_html_()


# --- the state keeps its type -------------------------------------------------------------------


def boxed(tree):
    return jax.tree.map(lambda leaf: meta.Partitioned(leaf, (None,)), tree)


def halved(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)


def elsewhere(tree):
    return jax.device_put(tree, jax.devices()[1])


@pytest.mark.parametrize("wrap", [freeze, boxed, halved, elsewhere, dict])
def test_structure_dtype_and_placement_are_kept(wrap):
    first, second = (nn.BatchNorm(use_running_average=True) for _ in range(2))
    model, x = nn.Sequential([first, nn.relu, second]), standard_normal(0, (9, 3)) + 1
    variables = jax.jit(model.init)(jax.random.key(0), x)
    old = wrap(variables["batch_stats"])

    def forward(variables, x):
        return model.apply(variables, x, mutable=["batch_stats"])

    given = {**variables, "batch_stats": old}
    for prior in (0, 0.25):
        new = recalibrate(forward, given, [x[:4], x[4:]], prior=prior).batch_stats
        chex.assert_trees_all_equal_shapes_and_dtypes(new, bn.promote_batch_stats(old))
        assert jax.tree.structure(new) == jax.tree.structure(old)
        for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert (after.committed, after.sharding) == (before.committed, before.sharding)
        initial = {"mean": np.zeros(3), "var": np.ones(3)}
        y, expected = x, []
        for _ in range(2):
            _, mean, var = define_moments(y)
            statistics = mix(initial, {"mean": mean, "var": var}, prior)
            y = np.maximum(define_affine(y, **statistics, scale=np.ones(3), bias=np.zeros(3)), 0)
            expected += statistics.values()
        found = [exact(leaf) for leaf in jax.tree.leaves(new)]
        assert_close(found, expected, tolerance=1e-5)


def test_complex_input_makes_the_mean_complex():
    x = standard_normal(0, (7, 3), jnp.complex64) + 1j
    variables = {"batch_stats": bn.init_batch_stats(3)}

    def forward(variables, x):
        y, updated = bn.batch_norm({}, variables["batch_stats"], x, use_running_average=True)
        return y, {"batch_stats": updated}

    found = recalibrate(forward, variables, [x[:3], x[3:]])
    _, mean, var = define_moments(x)
    assert_close(found.batch_stats, {"mean": mean, "var": var})


# --- several devices ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches_and_statistics(kind):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    batches = [np.asarray(standard_normal(seed, (8, 4)) + seed) for seed in range(3)]
    of_features = NamedSharding(mesh, PartitionSpec("model"))
    stats = jax.device_put(bn.init_batch_stats(4), of_features)
    variables = {"params": {"first": {}, "second": {}}}
    variables["batch_stats"] = {"first": stats, "second": stats}
    of_batches = NamedSharding(mesh, PartitionSpec("data", "model"))
    with jax.set_mesh(mesh):
        given = jax.device_put(batches, of_batches)
        found = recalibrate(partial(two_norms, train=False), variables, given).batch_stats
    assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {of_features}
    x = np.concatenate(batches)
    _, *of_first = define_moments(x)
    y = np.maximum(define_affine(x, *of_first, np.ones(4), np.zeros(4)), 0) + 0.3 * exact(x)
    expected = [*of_first, *define_moments(y)[1:]]
    assert_close([np.asarray(leaf) for leaf in jax.tree.leaves(found)], expected)


def test_shard_map_inside_of_the_forward_function():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    model = Net(options=(("axis_name", "data"),))
    variables = make(model)
    x = jnp.concatenate([X, X[:3]])

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=(PartitionSpec("data"), PartitionSpec()),
    )
    def forward(variables, x):
        return model.apply(variables, x, train=False, mutable=["batch_stats"])

    found = recalibrate(forward, variables, [x[:8], x[8:]])
    assert_close(found.batch_stats, define(variables["params"], x))


# --- stacked norms ------------------------------------------------------------------------------


def test_a_vmapped_ensemble():
    model = Net()
    members = [make(model), jax.tree.map(lambda leaf: 1.2 * leaf, make(model))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    forward = jax.vmap(evaluate(model), in_axes=(0, None))
    found = recalibrate(forward, stacked, split(X, [6, 7]))
    for number, member in enumerate(members):
        own = jax.tree.map(lambda leaf, number=number: leaf[number], found.batch_stats)
        assert_close(own, define(member["params"], X))


class Deep(nn.Module):
    """A scan over three layers, each a norm and a ReLU beside a shortcut."""

    @nn.compact
    def __call__(self, x):
        def body(module, x, _):
            layer = nn.BatchNorm(use_running_average=True, name="norm", parent=module)
            return nn.relu(layer(x)) + 0.5 * x, None

        lifted = dict(variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
        return nn.scan(body, length=3, **lifted)(self, x, None)[0]


def test_norms_under_a_lifted_scan_need_a_pass_each():
    model, x = Deep(), standard_normal(0, (9, 4)) + 1
    variables = jax.jit(model.init)(jax.random.key(0), x)
    found = recalibrate(
        lambda variables, x: model.apply(variables, x, mutable=["batch_stats"]),
        variables,
        split(x, [2, 7]),
    )
    assert found.passes == 3
    y = exact(x)
    for number in range(3):
        _, mean, var = define_moments(y)
        own = jax.tree.map(lambda leaf, number=number: leaf[number], found.batch_stats["norm"])
        assert_close(own, {"mean": mean, "var": var})
        y = np.maximum(define_affine(y, mean, var, np.ones(4), np.zeros(4)), 0) + 0.5 * y


# --- NNX ----------------------------------------------------------------------------------------


def make_module(norm=bn.nnx.BatchNorm, dropout=0.0, key=0):
    rngs = nnx.Rngs(key)
    return nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs),
        norm(4, rngs=rngs),
        nnx.relu,
        nnx.Dropout(dropout, rngs=rngs),
        nnx.Linear(4, 4, rngs=rngs),
        norm(4, rngs=rngs),
    )


def define_module(model, x, prior=0):
    stats, x = {}, exact(x)
    for number, layer in enumerate(model.layers):
        if isinstance(layer, nnx.Linear):
            x = x @ exact(layer.kernel[...]) + exact(layer.bias[...])
        elif isinstance(layer, nnx.BatchNorm):
            _, mean, var = define_moments(x)
            old = {"mean": layer.mean[...], "var": layer.var[...]}
            stats[number] = mix(old, {"mean": mean, "var": var}, prior)
            affine = {"scale": layer.scale[...], "bias": layer.bias[...]}
            x = np.maximum(define_affine(x, **stats[number], **affine), 0)
    return {"layers": stats}


def call(model, x):
    return model(x)


@pytest.mark.parametrize("norm", [bn.nnx.BatchNorm, nnx.BatchNorm])
def test_a_module_of_nnx(norm):
    model, x = make_module(norm, dropout=0.5), standard_normal(0, (9, 3)) + 1
    model.eval()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    adapted = recalibrate(call, model, split(x, [1, 6, 2]), prior=0.6).batch_stats
    assert_close(nnx.to_pure_dict(adapted), define_module(model, x, prior=0.6))
    found = recalibrate(call, model, split(x, [1, 6, 2]))
    assert found.passes == 2
    assert [one.path for one in found.layers] == ["layers/1", "layers/5"]
    assert type(model.layers[1]) is norm
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), before)
    nnx.update(model, found.batch_stats)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), define_module(model, x))
    assert not hasattr(model.layers[1], "measured")


def test_a_module_that_trains_drops_other_values_in_every_batch():
    model, x = make_module(dropout=0.5), standard_normal(0, (2, 3))
    shapes, dropped = [], []

    def forward(model, x):
        shapes.append(x.shape)
        y = model.layers[3](jnp.ones((64, 4)))
        jax.debug.callback(lambda y: dropped.append(np.asarray(y)), y)
        model(x)

    model.train()
    before = int(model.layers[3].rngs.count[...])
    found = recalibrate(forward, model, [x, x, x])
    assert (found.passes, len(shapes), len(dropped)) == (1, 1, 3)
    assert not any(np.array_equal(dropped[0], other) for other in dropped[1:])
    assert int(model.layers[3].rngs.count[...]) == before


def test_a_module_whose_configuration_cannot_be_hashed():
    class Configured(nnx.Module):
        def __init__(self):
            self.options = {"widths": [3]}
            self.norm = bn.nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x)

    x = standard_normal(0, (9, 3)) + 1
    found = recalibrate(call, Configured(), split(x, [4, 5]))
    _, mean, var = define_moments(x)
    assert_close(nnx.to_pure_dict(found.batch_stats), {"norm": {"mean": mean, "var": var}})


def test_an_ensemble_of_modules():
    x = standard_normal(0, (9, 3)) + 1
    models = nnx.vmap(make_module_of)(jnp.arange(2))
    models.eval()
    forward = nnx.jit(nnx.vmap(call, in_axes=(0, None)))
    nnx.update(models, recalibrate(forward, models, split(x, [4, 5])).batch_stats)
    graph, state = nnx.split(models)
    for number in range(2):
        own = nnx.merge(graph, jax.tree.map(lambda leaf, number=number: leaf[number], state))
        assert_close(nnx.to_pure_dict(nnx.state(own, nnx.BatchStat)), define_module(own, x))


def make_module_of(key):
    return make_module(key=jax.random.key(key))


# --- progress and errors ------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_the_progress_bar_counts_batches(known, capsys):
    pytest.importorskip("rich")
    model = Net()
    batches = split(X, [6, 7])
    given = batches if known else lambda: iter(batches)
    recalibrate(evaluate(model), make(model), given, progress=True)
    shown = capsys.readouterr().err
    for number in (1, 2, 3, 4):
        assert f"pass {number}" in shown
    assert "2/2" in shown


def test_the_progress_bar_needs_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    model = Net()
    with pytest.raises(ModuleNotFoundError, match="pip install rich, or leave progress out"):
        recalibrate(evaluate(model), make(model), [X], progress=True)


STATS = {"batch_stats": bn.init_batch_stats(2)}
ERRORS = {
    "no batch norm": (
        call, {"params": {}}, [X], {}, ValueError, "variables holds no batch norm.*model.init"
    ),
    "no batch norm in a module": (
        call, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [X], {}, ValueError, "nnx.BatchStat variables"
    ),
    "neither mapping nor module": (
        call, [STATS], [X], {}, TypeError, "is a list; expected an nnx.Module or"
    ),
    "only the output": (
        lambda variables, x: x, STATS, [X], {}, ValueError,
        r"forward returned an array, expected \(y, updates\).*mutable=\['batch_stats'\]",
    ),
    "no statistics among the updates": (
        lambda variables, x: (x, {}), STATS, [X], {}, ValueError,
        r"returned \(y, updates\) with the collections \[\] in updates, expected",
    ),
    "no batches": (call, STATS, [], {}, ValueError, "batches is empty.*from the list"),
    "one batch": (call, STATS, {"x": X}, {}, TypeError, r"one batch; .* write \[batch\]"),
    "nothing new": (
        call, STATS, [X], {"prior": 1.0}, ValueError,
        r"prior=1.0 must be in \[0, 1\): .* old statistics.*write prior=N / \(N \+ n\)",
    ),
    "a negative share": (call, STATS, [X], {"prior": -0.1}, ValueError, "prior=-0.1 must be in"),
    "no pass": (call, STATS, [X], {"passes": 0}, ValueError, "passes=0 must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_write(case):
    forward, variables, batches, options, kind, message = ERRORS[case]
    with pytest.raises(kind, match=f"(?s){message}"):
        recalibrate(forward, variables, batches, **options)


def test_a_function_that_returns_the_same_iterator_again():
    model, batches = Net(), iter(split(X, [6, 7]))
    with pytest.raises(ValueError, match=r"gave nothing in pass 2.*lambda: iter"):
        recalibrate(evaluate(model), make(model), lambda: batches)
