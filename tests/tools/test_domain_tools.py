"""Tools on models with norms by domain. The oracle is a plain model for each domain."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import assert_close, standard_normal

import bn_jax as bn

SIZE = 4
DOMAIN = np.arange(24) % 2


def images():
    """24 images, whose scale and offset depend on the domain."""
    x = standard_normal(5, (24, 3, 3, 2))
    return jnp.asarray(x * (1 + DOMAIN[:, None, None, None]) + 3 * DOMAIN[:, None, None, None])


class Net(nn.Module):
    """Two convolutions with norms, by domain where it is told their number."""

    num_domains: int | None = None
    momentum: float | None = 0.5

    @nn.compact
    def __call__(self, x, domain=None, train=False):
        for index in range(2):
            x = nn.Conv(SIZE, (2, 2), use_bias=False, name=f"conv{index}")(x)
            options: Any = {"use_running_average": not train, "name": f"norm{index}"}
            options["momentum"] = self.momentum
            if self.num_domains is None:
                x = bn.linen.BatchNorm(**options)(x)
            else:
                x = bn.linen.DomainBatchNorm(num_domains=self.num_domains, **options)(x, domain)
            x = nn.relu(x)
        return nn.Dense(2, name="head")(x)


class Module(nnx.Module):
    """The same in NNX."""

    def __init__(self, momentum: float | None = 0.5):
        rngs = nnx.Rngs(0)
        self.convs = nnx.List([nnx.Conv(n, SIZE, (2, 2), rngs=rngs) for n in (2, SIZE)])
        norms = (bn.nnx.BatchNorm(SIZE, momentum=momentum, rngs=rngs) for _ in range(2))
        self.norms = nnx.List(norms)
        self.head = nnx.Linear(SIZE, 2, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x)


def linen_variables(momentum=0.5):
    """Variables of the model by domain, whose domains differ."""
    variables = Net(momentum=momentum).init(jax.random.key(0), images())
    split = bn.linen.split_batch_norms(variables, 2)
    return jax.tree.map(lambda leaf: leaf + 0.1 * jnp.abs(standard_normal(1, leaf.shape)), split)


def nnx_model(momentum=0.5):
    """A model by domain, whose domains differ."""
    model = bn.nnx.split_batch_norms(Module(momentum), 2)
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    nnx.update(
        model,
        jax.tree.map(lambda leaf: leaf + 0.1 * jnp.abs(standard_normal(1, leaf.shape)), state),
    )
    return model


# --- recalibrating --------------------------------------------------------------------------------

# One batch has no example of domain 1.
BATCHES = [np.arange(0, 7), np.arange(8, 24, 2), np.array([7, *range(9, 24, 2)])]


def forward(variables, batch):
    """Evaluates the Linen model by domain, with updates."""
    return Net(2).apply(variables, *batch, mutable=["batch_stats"])


def evaluate_plain(variables, x):
    """Evaluates the plain Linen model, with updates."""
    return Net().apply(variables, x, mutable=["batch_stats"])


@pytest.mark.parametrize("prior", [0.0, 0.25])
@pytest.mark.parametrize("momentum", [0.5, None])
def test_recalibrated_linen_models_are_plain_models_on_the_parts(momentum, prior):
    x, variables = images(), linen_variables(momentum)
    batches = [(x[rows], DOMAIN[rows]) for rows in BATCHES]
    result = bn.recalibrate(forward, variables, batches, prior=prior)
    assert result.settled
    new = {**variables, "batch_stats": result.batch_stats}
    for d in range(2):
        part = [x[rows[DOMAIN[rows] == d]] for rows in BATCHES if np.any(DOMAIN[rows] == d)]
        one = bn.linen.select_domain(variables, d)
        expected = bn.recalibrate(evaluate_plain, one, part, prior=prior).batch_stats
        assert_close(bn.linen.select_domain(new, d)["batch_stats"], expected)


def test_recalibrated_counts_are_of_the_batches_that_had_the_domain():
    x, variables = images(), linen_variables(None)
    batches = [(x[rows], DOMAIN[rows]) for rows in BATCHES]
    stats = bn.recalibrate(forward, variables, batches).batch_stats
    expected = [[2.0] * SIZE, [2.0] * SIZE]
    assert stats["norm0"]["count"].tolist() == stats["norm1"]["count"].tolist() == expected
    stats = bn.recalibrate(forward, variables, batches[1:2], prior=0.5).batch_stats
    old = variables["batch_stats"]["norm0"]
    assert stats["norm0"]["count"].tolist() == [[2.0] * SIZE, old["count"][1].tolist()]
    chex.assert_trees_all_equal(stats["norm0"]["mean"][1], old["mean"][1])


@pytest.mark.parametrize("by_call", [False, True])
def test_recalibrated_nnx_models_are_plain_models_on_the_parts(by_call):
    x, model = images(), nnx_model()
    model.eval()

    def of_views(model, batch):
        x, domain = batch
        if not by_call:
            return nnx.view(model, domain=domain)(x)
        # Each domain in a call of its own, as where a batch is one of clean and adversarial parts.
        return [nnx.view(model, domain=d)(x[d::2]) for d in range(2)]

    batches = [(x[start : start + 8], DOMAIN[start : start + 8]) for start in (0, 8, 16)]
    result = bn.recalibrate(of_views, model, batches)
    assert result.settled
    new = nnx.clone(model)
    nnx.update(new, result.batch_stats)
    for d in range(2):
        one = bn.nnx.select_domain(model, d)
        expected = bn.recalibrate(lambda model, x: model(x), one, [x[d::2]]).batch_stats
        assert_close(nnx.state(bn.nnx.select_domain(new, d), nnx.BatchStat), expected)


def test_training_batches_are_pooled_by_domain():
    x, variables = images(), linen_variables()

    def train(variables, batch):
        return Net(2).apply(variables, *batch, train=True, mutable=["batch_stats"])

    def train_plain(variables, x):
        return Net().apply(variables, x, train=True, mutable=["batch_stats"])

    batches = [(x[rows], DOMAIN[rows]) for rows in BATCHES]
    new = {**variables, "batch_stats": bn.recalibrate(train, variables, batches).batch_stats}
    part = [x[rows[DOMAIN[rows] == 1]] for rows in (BATCHES[0], BATCHES[2])]
    one = bn.linen.select_domain(variables, 1)
    expected = bn.recalibrate(train_plain, one, part).batch_stats
    assert_close(bn.linen.select_domain(new, 1)["batch_stats"], expected)


def test_an_iterator_suffices_for_one_norm_by_domain():
    layer = bn.linen.DomainBatchNorm(num_domains=2, use_running_average=True)
    x = images()
    variables = layer.init(jax.random.key(0), x, DOMAIN)
    stats = bn.recalibrate(
        lambda variables, batch: layer.apply(variables, *batch, mutable=["batch_stats"]),
        variables,
        iter([(x[rows], DOMAIN[rows]) for rows in BATCHES]),
    ).batch_stats
    for d in range(2):
        rows = np.concatenate([rows[DOMAIN[rows] == d] for rows in BATCHES])
        assert_close(stats["mean"][d], np.asarray(x)[rows].mean((0, 1, 2)))
        assert_close(stats["var"][d], np.asarray(x)[rows].var((0, 1, 2)))


# --- folding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", [0, 1, np.int32(1), jnp.asarray(1)])
def test_a_model_with_a_constant_domain_is_folded(domain):
    x, variables, model = images(), linen_variables(), Net(2)
    folded = bn.fold(lambda variables, x: model.apply(variables, x, domain), variables, x)
    assert "2 of 2 norms folded" in str(folded)
    expected = Net().apply(bn.linen.select_domain(variables, int(domain)), x)
    assert_close(folded.apply(folded.params, x), expected)
    assert_close(model.apply(variables, x, domain), expected)


def test_views_and_selected_models_of_nnx_are_folded():
    x, model = images(), nnx_model()
    model.eval()
    for d in range(2):
        one = bn.nnx.select_domain(model, d)
        folded = bn.fold(lambda model, x: model(x), one, x)
        of_view = bn.fold(lambda model, x, d=d: nnx.view(model, domain=d)(x), model, x)
        assert "2 of 2 norms folded" in str(folded)
        assert "2 of 2 norms folded" in str(of_view)
        expected = one(x)
        assert_close(folded.apply(folded.params, x), expected)
        assert_close(of_view.apply(of_view.params, x), expected)


@pytest.mark.parametrize("shape", [(6, SIZE), (6, 8, 8, SIZE)])
def test_a_domain_among_the_inputs_is_an_obstacle_that_is_named(shape):
    # Rows are gathered for few positions, and selected for many.
    layer = bn.linen.DomainBatchNorm(num_domains=2, use_running_average=True)
    x, domain = standard_normal(0, shape), np.arange(6) % 2
    variables = layer.init(jax.random.key(0), x, domain)
    folded = bn.fold(layer.apply, variables, x, domain)
    assert_close(folded.apply(folded.params, x, domain), layer.apply(variables, x, domain))
    assert "0 of 1 norms folded" in str(folded)
    assert "An argument of the model selects its statistics." in str(folded.report)


def test_the_norm_of_an_embedding_is_no_norm_by_domain():
    # Its variance is a sum over selected features, and not one of the values selected.
    def model(variables, x, index):
        row = variables["table"][index]
        scaled = (row - row.mean()) * jax.lax.rsqrt(jnp.sum(row**2) + 1e-5)
        return x + scaled * variables["scale"]

    variables = {"table": standard_normal(0, (5, SIZE)), "scale": jnp.ones(SIZE)}
    folded = bn.fold(model, variables, jnp.ones(SIZE), jnp.asarray(2))
    assert "selects its statistics" not in str(folded.report)
    assert "It normalizes by its input" in str(folded.report)


@pytest.mark.parametrize("selects", [True, False])
def test_a_choice_of_the_platform_selects_if_each_branch_does(selects):
    def gather(table, index):
        return table[index]

    def other(table, index):
        return table[index] if selects else table[0] * jnp.cos(index)

    def model(variables, x, index):
        def row(name):
            return jax.lax.platform_dependent(variables[name], index, tpu=other, default=gather)

        return (x - row("mean")) * row("root") * variables["scale"]

    def norm(variables, x, index):
        root = jax.lax.rsqrt(variables["var"] + 1e-5)
        return model({**variables, "root": root}, x, index)

    table = standard_normal(0, (5, SIZE))
    variables = {"mean": table, "var": jnp.abs(table), "scale": jnp.ones(SIZE)}
    folded = bn.fold(norm, variables, jnp.ones(SIZE), jnp.asarray(2))
    assert ("selects its statistics" in str(folded.report)) == selects


# --- freezing -------------------------------------------------------------------------------------


def loss(y):
    return jnp.sum(jnp.sin(y))


def optimizer():
    mask = bn.optim.no_weight_decay_mask
    return optax.adamw(0.1, weight_decay=0.1, mask=mask)


def test_examples_of_one_domain_train_its_rows_alone_as_those_of_a_plain_model():
    x, variables = images()[1::2], linen_variables()
    one = bn.linen.select_domain(variables, 1)

    def trained(apply, variables):
        params, stats, rule = variables["params"], variables["batch_stats"], optimizer()
        state = rule.init(params)

        def of_params(params, stats):
            y, updates = apply({"params": params, "batch_stats": stats}, x)
            return loss(y), updates["batch_stats"]

        for _ in range(3):
            gradients, stats = jax.grad(of_params, has_aux=True)(params, stats)
            updates, state = rule.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return {"params": params, "batch_stats": stats}

    def apply(variables, x):
        return Net(2).apply(variables, x, 1, train=True, mutable=["batch_stats"])

    def apply_plain(variables, x):
        return Net().apply(variables, x, train=True, mutable=["batch_stats"])

    new, expected = trained(apply, variables), trained(apply_plain, one)
    assert_close(bn.linen.select_domain(new, 1), expected, tolerance=1e-3)
    before = bn.linen.select_domain(variables, 0)
    after = bn.linen.select_domain(new, 0)
    for name in ("norm0", "norm1"):
        chex.assert_trees_all_equal(after["params"][name], before["params"][name])
        chex.assert_trees_all_equal(after["batch_stats"][name], before["batch_stats"][name])


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_domain_is_frozen_while_others_train_beside_it(library):
    x = images()
    old, young = x[0::2], x[1::2]
    if library == "linen":
        variables, model = linen_variables(), Net(2)
        frozen = bn.linen.freeze(model.apply)

        def of_params(params):
            given = {**variables, "params": params}
            y = frozen(given, old, 0, train=True, mutable=["batch_stats"])[0]
            z, updates = model.apply(given, young, 1, train=True, mutable=["batch_stats"])
            return loss(y) + loss(z), (y, updates["batch_stats"])

        grads, (y, stats) = jax.grad(of_params, has_aux=True)(variables["params"])
        scale, norm = grads["norm0"]["scale"], stats["norm0"]
        before = variables["batch_stats"]["norm0"]
        plain = bn.linen.select_domain(variables, 0)
        assert_close(y, Net().apply(plain, old))
        trained = Net().apply(
            bn.linen.select_domain(variables, 1), young, train=True, mutable=["batch_stats"]
        )[1]["batch_stats"]["norm0"]
    else:
        module = nnx_model()
        before = {name: getattr(module.norms[0], name)[...] for name in ("mean", "var")}
        one = bn.nnx.select_domain(module, 1)

        def of_model(model):
            of_old = bn.nnx.freeze(nnx.view(model, domain=0))
            return loss(of_old(old)) + loss(nnx.view(model, domain=1)(young))

        scale = nnx.grad(of_model)(module).norms[0].scale[...]
        norm = {name: getattr(module.norms[0], name)[...] for name in ("mean", "var")}
        one(young)
        trained = {name: getattr(one.norms[0], name)[...] for name in ("mean", "var")}
    assert not scale[0].any()
    assert scale[1].all()
    for name in ("mean", "var"):
        chex.assert_trees_all_equal(norm[name][0], before[name][0])
        assert_close(norm[name][1], trained[name])


def test_norms_by_domain_are_frozen_by_path():
    x, variables = images(), linen_variables()
    frozen = bn.linen.freeze(Net(2).apply, "norm0")
    _, updates = frozen(variables, x, DOMAIN, train=True, mutable=["batch_stats"])
    before, after = variables["batch_stats"], updates["batch_stats"]
    chex.assert_trees_all_equal(after["norm0"], before["norm0"])
    assert jnp.abs(after["norm1"]["mean"] - before["norm1"]["mean"]).min() > 0
    model = bn.nnx.freeze(nnx_model(), "norms/0")
    copy = nnx.clone(model)
    nnx.view(model, domain=DOMAIN)(x)
    chex.assert_trees_all_equal(model.norms[0].mean[...], copy.norms[0].mean[...])
    assert jnp.abs(model.norms[1].mean[...] - copy.norms[1].mean[...]).min() > 0


# --- masks ----------------------------------------------------------------------------------------


def test_masks_find_scale_and_bias_by_domain():
    params = linen_variables()["params"]
    is_norm = {name: name.startswith("norm") for name in params}
    expected = {name: jax.tree.map(lambda _, n=name: is_norm[n], params[name]) for name in params}
    assert bn.optim.norm_params_mask(params) == expected
    decays = {name: {leaf: leaf == "kernel" for leaf in params[name]} for name in params}
    assert bn.optim.no_weight_decay_mask(params) == decays
    state = nnx.state(nnx_model(), nnx.Param)
    mask = bn.optim.norm_params_mask(state)
    assert (mask["norms"][0]["scale"], mask["norms"][1]["bias"]) == (True, True)
    assert not mask["head"]["bias"]
    decay = bn.optim.no_weight_decay_mask(state)
    assert (decay["norms"][0]["scale"], decay["convs"][0]["kernel"]) == (False, True)
    # A bias alone is that of a norm only if there are statistics at its path.
    alone = bn.nnx.DomainBatchNorm(SIZE, 2, use_scale=False, rngs=nnx.Rngs(0))
    params, stats = nnx.state(alone, nnx.Param), nnx.state(alone, nnx.BatchStat)
    assert bn.optim.norm_params_mask({"d": params}, {"d": stats})["d"]["bias"]
