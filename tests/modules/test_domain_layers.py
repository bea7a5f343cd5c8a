"""The modules with domains: plain batch norms on the parts of a batch, and their checkpoints."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import assert_close, standard_normal

import bn_jax as bn

DOMAIN = jnp.asarray([0, 2, 0, 0, 2, 2, 0, 2])
KINDS: list[Any] = [{}, {"share_params": True}, {"share_stats": True}]


def parts_of(x, domain, number=3):
    return [x[np.flatnonzero(np.asarray(domain) == d)] for d in range(number)]


@pytest.mark.parametrize("kind", KINDS)
def test_linen_and_nnx_are_the_function(kind):
    x = standard_normal(0, (8, 5))
    layer = bn.linen.DomainBatchNorm(num_domains=3, momentum=None, **kind)
    variables = layer.init(jax.random.key(0), x, DOMAIN, use_running_average=False)
    scale = variables["params"]["scale"]
    variables["params"]["scale"] = standard_normal(1, scale.shape)
    params, stats = variables["params"], variables["batch_stats"]
    assert params["bias"].shape == ((5,) if "share_params" in kind else (3, 5))
    assert stats["count"].shape == ((5,) if "share_stats" in kind else (3, 5))
    options: Any = {"use_running_average": False, "momentum": None}
    expected = bn.domain_batch_norm(params, stats, x, DOMAIN, **options)
    y, updates = layer.apply(
        variables, x, DOMAIN, use_running_average=False, mutable=["batch_stats"]
    )
    assert_close((y, updates["batch_stats"]), expected)
    model = bn.nnx.DomainBatchNorm(5, 3, momentum=None, rngs=nnx.Rngs(0), **kind)
    nnx.update(model, {**params, **stats})
    y = nnx.jit(lambda model, x, domain: model(x, domain))(model, x, DOMAIN)
    found = {name: getattr(model, name)[...] for name in stats}
    assert_close((y, found), expected)
    model.eval()
    y = model(x, DOMAIN)
    evaluated = layer.apply(
        {"params": params, "batch_stats": expected[1]}, x, DOMAIN, use_running_average=True
    )
    assert_close(y, evaluated)


def test_weights_are_taken_by_both():
    x, weights = standard_normal(0, (8, 5)), jax.nn.one_hot(DOMAIN, 3)
    layer = bn.linen.DomainBatchNorm(num_domains=3, use_running_average=False)
    variables = layer.init(jax.random.key(0), x, DOMAIN)
    expected = layer.apply(variables, x, DOMAIN, mutable=["batch_stats"])
    assert_close(layer.apply(variables, x, weights, mutable=["batch_stats"]), expected)
    model = bn.nnx.DomainBatchNorm(5, 3, rngs=nnx.Rngs(0))
    assert_close(model(x, weights), expected[0])
    with pytest.raises(ValueError, match="weights of domains, whose moments cannot be merged"):
        layer.apply(variables, x, weights, mutable=["batch_stats", "batch_moments"])


class Net(nn.Module):
    """A network whose norms have domains where it is told their number."""

    num_domains: int | None = None

    @nn.compact
    def __call__(self, x, domain=None, train=False):
        for features in (4, 3):
            x = nn.Dense(features)(x)
            options: Any = {"use_running_average": not train, "name": f"norm{features}"}
            if self.num_domains is None:
                x = bn.linen.BatchNorm(**options)(x)
            else:
                x = bn.linen.DomainBatchNorm(num_domains=self.num_domains, **options)(x, domain)
            x = nn.relu(x)
        return x


def trained():
    x = standard_normal(0, (8, 5))
    plain = Net()
    variables = plain.init(jax.random.key(0), x)
    _, updates = plain.apply(variables, x, train=True, mutable=["batch_stats"])
    return plain, {**variables, **updates}, x


def test_all_domains_start_as_the_plain_model_and_one_of_them_becomes_it():
    plain, variables, x = trained()
    split = bn.linen.split_batch_norms(variables, 3)
    model = Net(num_domains=3)
    expected = plain.apply(variables, x)
    assert_close(model.apply(split, x, DOMAIN), expected)
    _, updates = model.apply(split, x, DOMAIN, train=True, mutable=["batch_stats"])
    split |= updates
    y = model.apply(split, x, DOMAIN)
    for d in (0, 2):
        one = bn.linen.select_domain(split, d)
        assert_close(plain.apply(one, x[d == DOMAIN]), y[d == DOMAIN])
    # Without examples, the statistics are those that it started from.
    assert_close(bn.linen.select_domain(split, 1), variables, tolerance=1e-30)
    assert jnp.abs(y - expected).max() > 1e-3


def test_one_domain_is_folded():
    plain, variables, x = trained()
    split = bn.linen.split_batch_norms(variables, 2)
    one = bn.linen.select_domain(split, 1)
    folded = bn.fold(plain.apply, one, x)
    assert_close(folded.apply(folded.params, x), plain.apply(one, x))


def test_splitting_and_selecting_need_norms():
    _, variables, _ = trained()
    with pytest.raises(ValueError, match="variables have no batch norm, with mean and var"):
        bn.linen.split_batch_norms({"params": variables["params"]}, 2)
    with pytest.raises(ValueError, match="variables have batch norms of no domains"):
        bn.linen.select_domain(variables, 0)
    with pytest.raises(ValueError, match=r"batch norms of \[2\] domains, and domain=2"):
        bn.linen.select_domain(bn.linen.split_batch_norms(variables, 2), 2)


def test_recalibrating_is_by_domain():
    _, variables, _ = trained()
    model, x = Net(num_domains=3), standard_normal(3, (24, 5)) * 3 + 1
    split = bn.linen.split_batch_norms(variables, 3)
    domain = jnp.arange(24) % 2
    batches = [(x[start : start + 8], domain[start : start + 8]) for start in (0, 8, 16)]

    def forward(variables, batch):
        return model.apply(variables, *batch, mutable=["batch_stats"])

    stats = bn.recalibrate(forward, split, batches).batch_stats
    first = x @ split["params"]["Dense_0"]["kernel"]
    for d in range(2):
        part = first[domain == d]
        assert_close(stats["norm4"]["mean"][d], part.mean(0))
        assert_close(stats["norm4"]["var"][d], part.var(0))


def test_micro_batches_of_domains_make_one_update():
    x = standard_normal(0, (8, 5))
    layer = bn.linen.DomainBatchNorm(num_domains=3, use_running_average=False)
    variables = layer.init(jax.random.key(0), x, DOMAIN)
    collections = ["batch_stats", "batch_moments"]
    collected: Any = {}
    for rows in (slice(0, 3), slice(3, 8)):
        _, collected = layer.apply(
            {**variables, **{"batch_moments": collected.get("batch_moments", {})}},
            x[rows], DOMAIN[rows], mutable=collections,
        )  # fmt: skip
    _, expected = layer.apply(variables, x, DOMAIN, mutable=["batch_stats"])
    assert_close(collected["batch_stats"], expected["batch_stats"])


def test_an_audit_says_which_domains_have_no_example():
    _, variables, x = trained()
    model, split = Net(num_domains=3), bn.linen.split_batch_norms(variables, 3)

    def forward(variables, batch, train):
        return model.apply(variables, *batch, train=train, mutable=["batch_stats"])

    report = bn.audit(forward, split, (x, DOMAIN))
    found = [(one.path, one.message) for one in report.findings if one.kind.startswith("domain")]
    message = "The batch has no example of domain 1, whose statistics were not examined."
    assert found == [("norm3", message), ("norm4", message)]
    assert "not finite" not in [one.kind for one in report.findings]
    whole = bn.audit(forward, split, (x, jnp.arange(8) % 3))
    assert not [one for one in whole.findings if one.kind.startswith("domain")]


def test_norms_by_domain_are_norms_to_masks_and_freezing():
    _, variables, x = trained()
    model, split = Net(num_domains=3), bn.linen.split_batch_norms(variables, 3)
    mask = bn.optim.norm_params_mask(split["params"])
    assert mask["norm4"] == {"scale": True, "bias": True}
    assert not any(jax.tree.leaves(mask["Dense_0"]))
    frozen = bn.linen.freeze(model.apply)
    y, updates = frozen(split, x, DOMAIN, train=True, mutable=["batch_stats"])
    assert_close(y, model.apply(split, x, DOMAIN))
    assert_close(updates["batch_stats"], split["batch_stats"], tolerance=1e-30)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_wrong_domain_is_an_error_that_names_it(library):
    x, wrong = standard_normal(0, (8, 5)), DOMAIN + 1
    message = r"domain has 4 values outside of 0 to 2, 3 for example"
    with pytest.raises(ValueError, match=message):
        if library == "linen":
            layer = bn.linen.DomainBatchNorm(num_domains=3, use_running_average=False)
            layer.init(jax.random.key(0), x, wrong)
        else:
            bn.nnx.DomainBatchNorm(5, 3, rngs=nnx.Rngs(0))(x, wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("evaluates", [True, False])
def test_one_domain_of_a_batch_is_that_of_every_example(kind, evaluates):
    x = standard_normal(0, (8, 5))
    layer = bn.linen.DomainBatchNorm(num_domains=3, use_running_average=evaluates, **kind)
    variables = layer.init(jax.random.key(0), x, DOMAIN)
    variables = jax.tree.map(lambda leaf: leaf + standard_normal(1, leaf.shape) ** 2, variables)
    moments = {**variables, "given_moments": variables["batch_stats"]}
    for given in (variables,) if evaluates else (variables, moments):

        def loss(variables, domain):
            y: Any = layer.apply(variables, x, domain, update_running_average=False)
            return jnp.sum(jnp.sin(y))

        expected = jax.value_and_grad(loss)(given, jnp.full(8, 2))
        for domain in (2, np.int64(2), jnp.asarray(2)):
            assert_close(jax.value_and_grad(loss)(given, domain), expected)
        traced = jax.jit(jax.value_and_grad(loss))
        assert_close(traced(given, 2), expected)
        assert_close(jax.jit(lambda given: jax.value_and_grad(loss)(given, 2))(given), expected)
