"""The report of a fold names each norm: by where its scale is, or by what it is."""

from typing import Any

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import assert_close, standard_normal

import bn_jax as bn

pytestmark = pytest.mark.usefixtures("compile_quickly")


def names_of(forward, variables, *args):
    """The name of each norm in the report; the folded model computes the same."""
    folded = bn.fold(forward, variables, *args)
    assert_close(folded.apply(folded.params, *args), forward(variables, *args), tolerance=1e-5)
    return [norm.name for norm in folded.report], folded


@pytest.mark.parametrize("options", [(True, True), (False, True), (False, False)])
def test_haiku_keeps_statistics_in_another_tree(options):
    def network(x, train):
        for number in range(3):
            x = hk.Linear(4, name=f"fc_{number}")(jnp.sin(x))
            x = hk.BatchNorm(options[0], options[1], 0.9, name=f"norm_{number}")(x, train)
        return x

    model: Any = hk.without_apply_rng(hk.transform_with_state(network))
    x = standard_normal(1, (2, 4))
    params, state = model.init(jax.random.key(0), x, True)
    state = jax.tree.map(lambda leaf: jnp.abs(jnp.cos(leaf)) + 0.5, state)

    def forward(variables, x):
        return model.apply(variables["params"], variables["state"], x, False)[0]

    names, folded = names_of(forward, {"params": params, "state": state}, x)
    home = "norm_{}" if options[0] else "state/norm_{}/~"
    assert names == [home.format(number) for number in range(3)]
    assert [norm.into for norm in folded.report] == [f"fc_{number}/w" for number in range(3)]

    def as_pair(variables, x):
        return model.apply(*variables, x, False)[0]

    names, _ = names_of(as_pair, (params, state), x)
    home = "0/norm_{}" if options[0] else "1/norm_{}/~"
    assert names == [home.format(number) for number in range(3)]

    def as_part(variables, x):
        return forward(variables["model"], x)

    names, _ = names_of(as_part, {"model": {"params": params, "state": state}}, x)
    home = "model/params/norm_{}" if options[0] else "model/state/norm_{}/~"
    assert names == [home.format(number) for number in range(3)]


def by_lists(variables, x):
    """A model as Keras calls it: lists of trainable and of other variables."""
    (kernel, bias, gamma, beta, after, offset, gamma_2, beta_2), (mean, var, mean_2, var_2) = (
        variables
    )

    def normalize(x, mean, var, gamma, beta):
        scale = lax.rsqrt(var + 1e-3) * gamma
        return x * scale[None] + (beta - mean * scale)[None]

    y = normalize(x @ kernel + bias[None], mean, var, gamma, beta)
    return normalize(jnp.tanh(y) @ after + offset[None], mean_2, var_2, gamma_2, beta_2)


def list_variables():
    shapes = [(3, 4), (4,), (4,), (4,), (4, 4), (4,), (4,), (4,)]
    trainable = [standard_normal(seed, shape) for seed, shape in enumerate(shapes)]
    others = [jnp.abs(standard_normal(seed, 4)) + 0.1 for seed in range(20, 24)]
    return trainable, others


def test_keras_keeps_variables_in_lists():
    x = standard_normal(30, (2, 3))
    names, folded = names_of(by_lists, list_variables(), x)
    assert names == ["0/2", "0/6"]
    assert [norm.into for norm in folded.report] == ["0/0", "0/4"]


@pytest.mark.parametrize(
    ("has_scale", "has_bias", "name"),
    [(True, True, "0/0"), (False, True, "0/1"), (False, False, "1/0")],
)
def test_a_norm_of_lists_before_a_layer_is_taken_whole(has_scale, has_bias, name):
    def forward(variables, x):
        (gamma, beta, kernel), (mean, var) = variables
        y = (jnp.tanh(x) - mean[None]) * lax.rsqrt(var + 1e-3)[None]
        y = y * gamma[None] if has_scale else y
        return (y + beta[None] if has_bias else y) @ kernel

    trainable, (mean, var, *_) = list_variables()
    variables = ([*trainable[2:4], trainable[4]], [mean, var])
    names, folded = names_of(forward, variables, standard_normal(1, (2, 4)))
    assert names == [name]
    assert [norm.into for norm in folded.report] == ["0/2"]


def test_a_position_in_a_list_is_no_part_of_the_norm():
    """What varies along more axes than the norm is not taken for a part of it."""

    def forward(variables, x):
        kernel, mean, var, positions = variables
        y = (x @ kernel - mean) * lax.rsqrt(var + 1e-3)
        return jnp.tanh(y + positions)

    mean, var = standard_normal(1, (1, 1, 4)), jnp.abs(standard_normal(2, (1, 1, 4))) + 0.1
    variables = [standard_normal(0, (3, 4)), mean, var, standard_normal(3, (1, 5, 4))]
    names, folded = names_of(forward, variables, standard_normal(4, (2, 5, 3)))
    assert names == ["1"]
    assert folded.report[0].into == "0"


def test_a_scale_in_another_branch_than_the_statistics():
    def forward(variables, x):
        scale, state = variables["model"]["norm"], variables["state"]
        y = (jnp.tanh(x) - state[1][0][None]) / jnp.sqrt(state[1][1] + 1e-3)[None]
        y = y * scale["weight"][None] + scale["bias"][None]
        return y @ variables["model"]["kernel"]

    vectors = [standard_normal(seed, 4) for seed in range(4)]
    norm = {"weight": vectors[0], "bias": vectors[1]}
    model = {"norm": norm, "kernel": standard_normal(5, (4, 3))}
    state = [vectors[2], [vectors[2], jnp.abs(vectors[3]) + 0.1]]
    variables = {"model": model, "state": state}
    names, folded = names_of(forward, variables, standard_normal(6, (2, 4)))
    assert names == ["model/norm"]
    assert folded.report[0].into == "model/kernel"


def test_all_variables_of_a_norm_and_no_others_are_below_its_path():
    def forward(variables, x):
        norm = variables["norm"]
        y = x @ variables["kernel"] - norm["of"]["mean"][None]
        return y * (norm["affine"]["scale"] * lax.rsqrt(norm["of"]["var"]))[None]

    ones = jnp.ones(4)
    norm = {"of": {"mean": ones, "var": ones}, "affine": {"scale": ones}}
    variables = {"norm": norm, "kernel": standard_normal(0, (3, 4))}
    assert names_of(forward, variables, standard_normal(1, (2, 3)))[0] == ["norm"]


def test_a_scale_that_two_modules_have_a_part_in():
    def forward(variables, x):
        scale = variables["a"]["b"]["scale"] * variables["c"]["gain"]
        stats = variables["stats"]["norm"]
        y = x @ variables["kernel"] - stats["mean"][None]
        return y * (scale * lax.rsqrt(stats["var"]))[None]

    stats = {"norm": {"mean": jnp.ones(4), "var": jnp.full(4, 2.0)}}
    variables = {"a": {"b": {"scale": jnp.ones(4)}}, "c": {"gain": jnp.ones(4)}, "stats": stats}
    variables["kernel"] = standard_normal(0, (3, 4))
    assert names_of(forward, variables, standard_normal(1, (2, 3)))[0] == ["a/b"]


def flat(forward):
    """Names of norms whose variables are all at the top."""
    names = ("mean", "var", "scale", "bias", "mean2", "var2")
    variables = {name: jnp.abs(standard_normal(seed, 4)) + 0.1 for seed, name in enumerate(names)}
    variables["kernel"] = standard_normal(9, (4, 4))
    return names_of(forward, variables, standard_normal(10, (2, 4)))[0]


def test_norms_at_the_top_are_named_by_their_formulas():
    def rows(variables):
        return {name: leaf[None] if leaf.ndim == 1 else leaf for name, leaf in variables.items()}

    def one(variables, x):
        v = rows(variables)
        return jnp.tanh((x @ v["kernel"] - v["mean"]) * lax.rsqrt(v["var"] + 0.001))

    def divided(variables, x):
        v = rows(variables)
        return v["bias"] - v["scale"] * (-(v["mean"] - x) / jnp.sqrt(v["var"] + 1e-5))

    def two(variables, x):
        v = rows(variables)
        y = (x - v["mean"]) * (v["scale"] * lax.rsqrt(v["var"])) + v["bias"]
        return (y - v["mean2"]) * v["var2"] ** -0.5

    assert flat(one) == ["a hand-written norm (x - mean) * rsqrt(var + 0.001)"]
    assert flat(divided) == ["a hand-written norm bias - -(mean - x) / sqrt(var + 1e-05) * scale"]
    assert flat(two) == [
        "a hand-written norm (x - mean) * (scale * rsqrt(var)) + bias",
        "a hand-written norm (x - mean2) * (var2 ** -0.5)",
    ]


def test_a_layer_by_itself_is_the_top_level_norm():
    x = standard_normal(0, (2, 4))
    for layer in (bn.linen.BatchNorm(use_running_average=True), nn.LayerNorm()):
        variables = layer.init(jax.random.key(0), x)
        assert names_of(layer.apply, variables, x)[0] == ["the top-level norm"]


@pytest.mark.parametrize("group_size", [None, 2])
def test_a_whitening_norm(group_size):
    norm = bn.linen.WhiteningNorm(use_running_average=True, group_size=group_size)
    model = nn.Sequential([nn.Dense(4), norm, nn.relu, nn.Dense(3)])
    x = standard_normal(0, (5, 4))
    names, folded = names_of(model.apply, model.init(jax.random.key(0), x), x)
    assert names == ["layers_1, a whitening norm"]
    assert folded.report[0].path == "layers_1"
    assert str(folded.report).startswith("layers_1, a whitening norm  left: It mixes its features")


def test_whitening_by_hand():
    variables = {"norm": {"mean": standard_normal(0, (1, 4)), "cov": jnp.diag(jnp.arange(1.0, 5))}}

    def by_cholesky(variables, x):
        norm = variables["norm"]
        root = jnp.linalg.inv(jnp.linalg.cholesky(norm["cov"]))
        return (x - norm["mean"]) @ root.T

    def by_eigenvectors(variables, x):
        norm = variables["norm"]
        values, vectors = jnp.linalg.eigh(norm["cov"])
        return (x - norm["mean"]) @ (vectors * lax.rsqrt(values)[None] @ vectors.T)

    x = standard_normal(1, (5, 4))
    for forward in (by_cholesky, by_eigenvectors):
        assert names_of(forward, variables, x)[0] == ["norm, a whitening norm"]


def test_a_normalized_kernel_is_no_whitening():
    def forward(variables, x):
        kernel = variables["dense"]["v"]
        length = jnp.sqrt(jnp.sum(kernel**2, 0, keepdims=True))
        return (x - variables["mean"][None]) @ (kernel / length)

    variables = {"dense": {"v": standard_normal(0, (4, 4))}, "mean": standard_normal(1, 4)}
    assert names_of(forward, variables, standard_normal(2, (5, 4)))[0] == []


def by_index(norm, domain, name):
    return norm[name][domain]


def by_code(norm, domain, name):
    return jax.nn.one_hot(domain, 3) @ norm[name]


def by_choice(norm, domain, name):
    return jnp.where(domain[:, None] == 0, norm[name][:1], norm[name][1:2])


@pytest.mark.parametrize("select", [by_index, by_code, by_choice])
def test_a_domain_norm(select):
    def forward(variables, x, domain):
        norm = variables["norm"]
        y = x @ variables["kernel"] - select(norm, domain, "mean")
        return y * lax.rsqrt(select(norm, domain, "var") + 1e-3) * variables["scale"][None]

    norm = {"mean": standard_normal(0, (3, 4)), "var": jnp.exp(standard_normal(1, (3, 4)))}
    variables = {"norm": norm, "kernel": standard_normal(2, (4, 4)), "scale": jnp.ones(4)}
    x, domain = standard_normal(3, (2, 4)), jnp.array([0, 1])
    names, folded = names_of(forward, variables, x, domain)
    assert names == ["norm, a domain norm"]
    assert "An argument of the model selects its statistics" in str(folded.report[0].reason)

    # What the reason advises works.
    def fixed(variables, x):
        return forward(variables, x, np.zeros(1, int))

    assert bn.fold(fixed, variables, x).report[0].into == "kernel"


def test_embedded_tokens_are_normalized_by_the_input():
    model = nn.Sequential([nn.Embed(5, 4), nn.LayerNorm()])
    x = jnp.array([0, 3])
    names, folded = names_of(model.apply, model.init(jax.random.key(0), x), x)
    assert names == ["layers_1"] and "by its input" in str(folded.report[0].reason)


def test_a_norm_without_variables_is_not_named_by_the_next_layer():
    model = nn.Sequential([bn.linen.RMSNorm(use_scale=False), nn.Dense(3)])
    x = standard_normal(0, (5, 4))
    names, _ = names_of(model.apply, model.init(jax.random.key(0), x), x)
    assert names == ["a norm without scale and bias"]
