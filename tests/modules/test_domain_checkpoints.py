"""Models with norms by domain, made of plain models, and plain models made of them."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import assert_close, standard_normal

import bn_jax as bn

DOMAIN = jnp.asarray([0, 1, 0, 0, 1, 1, 0, 1])
OPTIONS: Any = {"use_running_average": True}


def random_like(tree, seed=0):
    """Other positive numbers in a tree, a different one in each place."""
    leaves, structure = jax.tree.flatten(tree)
    values = [
        jnp.abs(jnp.asarray(standard_normal(seed + i, np.shape(leaf)))) + 0.5
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, values)


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


# --- Linen --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.BatchNorm, bn.linen.BatchNorm])
@pytest.mark.parametrize("axis, size", [(-1, 1), ((1, 2), 2)])
def test_norms_over_one_or_two_axes_get_domains_and_give_them_back(kind, axis, size):
    x = standard_normal(0, (8, 3, 4))
    plain: Any = kind(axis=axis, **OPTIONS)
    variables = random_like(plain.init(jax.random.key(0), x))
    split = bn.linen.split_batch_norms(variables, 2, num_feature_axes=size)
    layer = bn.linen.DomainBatchNorm(num_domains=2, axis=axis, **OPTIONS)
    assert shapes(split) == shapes(layer.init(jax.random.key(0), x, DOMAIN))
    assert_close(layer.apply(split, x, DOMAIN), plain.apply(variables, x))
    split = random_like(split, 9)
    y = layer.apply(split, x, DOMAIN)
    for d in range(2):
        one = bn.linen.select_domain(split, d, num_feature_axes=size)
        assert_close(plain.apply(one, x[d == DOMAIN]), y[d == DOMAIN])


class Plain(nn.Module):
    """One norm, to be stacked."""

    @nn.compact
    def __call__(self, x):
        return bn.linen.BatchNorm(name="norm", **OPTIONS)(x)


class ByDomain(nn.Module):
    """One norm by domain, to be stacked."""

    @nn.compact
    def __call__(self, x, domain):
        return bn.linen.DomainBatchNorm(num_domains=2, name="norm", **OPTIONS)(x, domain)


AXES = [{"params": 0, "batch_stats": 0}, {"params": None, "batch_stats": 0}]


@pytest.mark.parametrize("axes", AXES)
def test_stacked_norms_have_the_axis_of_domains_before_their_features(axes):
    x = standard_normal(0, (3, 8, 4))
    lifted = {"variable_axes": axes, "split_rngs": {"params": axes["params"] == 0}}
    plain: Any = nn.vmap(Plain, in_axes=0, **lifted)()
    layer: Any = nn.vmap(ByDomain, in_axes=(0, None), **lifted)()
    variables = random_like(plain.init(jax.random.key(0), x))
    split = bn.linen.split_batch_norms(variables, 2, num_feature_axes=1)
    assert shapes(split) == shapes(layer.init(jax.random.key(0), x, DOMAIN))
    assert_close(layer.apply(split, x, DOMAIN), plain.apply(variables, x))
    split = random_like(split, 9)
    y = layer.apply(split, x, DOMAIN)
    for d in range(2):
        one = bn.linen.select_domain(split, d, num_feature_axes=1)
        assert_close(plain.apply(one, x[:, d == DOMAIN]), y[:, d == DOMAIN])


def test_what_stacked_norms_share_is_told_by_the_number_of_domains():
    stats: Any = random_like(bn.init_batch_stats((3, 4)))
    variables = {"params": random_like(bn.init_params((3, 4)), 5), "batch_stats": stats}
    for kind, domains in (
        ({"share_params": True}, "batch_stats"),
        ({"share_stats": True}, "params"),
    ):
        split = bn.linen.split_batch_norms(variables, 2, num_feature_axes=1, **kind)
        found = {name: jax.tree.leaves(split[name])[0].shape for name in split}
        assert found[domains] == (3, 2, 4)
        assert set(found.values()) == {(3, 2, 4), (3, 4)}
        one = bn.linen.select_domain(split, 1, num_feature_axes=1)
        chex.assert_trees_all_equal(one, variables)


def test_more_axes_than_one_are_an_error_that_says_what_to_pass():
    stats: Any = bn.init_batch_stats((3, 4))
    variables = {"batch_stats": {"norm": stats}}
    message = r"num_feature_axes=None, but mean of the batch norm 'norm' has shape \(3, 4\)\. Pass "
    with pytest.raises(ValueError, match=message):
        bn.linen.split_batch_norms(variables, 2)
    for size, shape in ((1, (3, 2, 4)), (2, (2, 3, 4))):
        split = bn.linen.split_batch_norms(variables, 2, num_feature_axes=size)
        assert split["batch_stats"]["norm"]["mean"].shape == shape
        with pytest.raises(ValueError, match=r"num_feature_axes=None, but mean .* \(., ., 4\)"):
            bn.linen.select_domain(split, 0)
        back = bn.linen.select_domain(split, 0, num_feature_axes=size)
        chex.assert_trees_all_equal(back, variables)
    with pytest.raises(ValueError, match="num_feature_axes=3, but mean"):
        bn.linen.split_batch_norms(variables, 2, num_feature_axes=3)
    with pytest.raises(ValueError, match="num_domains=0; expected an integer of at least 1"):
        bn.linen.split_batch_norms(variables, 0)


@pytest.mark.parametrize("kind", [{}, {"share_params": True}, {"share_stats": True}])
def test_counts_and_what_is_measured_are_by_domain_where_statistics_are(kind):
    stats: Any = bn.start_measuring(bn.init_batch_stats(4, use_count=True))
    variables = random_like({"params": bn.init_params(4), "batch_stats": stats})
    split = bn.linen.split_batch_norms(variables, 2, **kind)
    of_params = (4,) if "share_params" in kind else (2, 4)
    of_stats = (4,) if "share_stats" in kind else (2, 4)
    assert set(jax.tree.leaves(shapes(split["params"]), is_leaf=is_shape)) == {of_params}
    found = jax.tree.leaves(shapes(split["batch_stats"]), is_leaf=is_shape)
    assert (set(found), len(found)) == ({of_stats}, 3 + len(stats["measured"]))
    chex.assert_trees_all_equal(bn.linen.select_domain(split, 1), variables)


def is_shape(node):
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def test_only_norms_change_however_deep_they_are_and_whatever_they_lack():
    norm = {"mean": jnp.ones(3), "var": jnp.ones(3)}
    variables = {
        "batch_stats": {"stage": [{"norm": norm}, {"inner": {"bare": norm}}], "top": norm},
        "params": {"stage": [{"norm": {"bias": jnp.ones(3)}}, {"scale": jnp.ones(3)}],
                   "layer_norm": {"scale": jnp.ones(3)}, "scale": jnp.ones(3)},
        "cache": {"norm": {"mean": jnp.ones(3)}},
    }  # fmt: skip
    split = bn.linen.split_batch_norms(variables, 2)
    params, stats = split["params"], split["batch_stats"]
    by_domain = {"mean": (2, 3), "var": (2, 3)}
    assert shapes(stats["stage"]) == [{"norm": by_domain}, {"inner": {"bare": by_domain}}]
    assert shapes(stats["top"]) == by_domain
    assert shapes(params["stage"]) == [{"norm": {"bias": (2, 3)}}, {"scale": (3,)}]
    assert shapes((params["layer_norm"], params["scale"])) == ({"scale": (3,)}, (3,))
    assert split["cache"] is variables["cache"]
    # What a user's norm holds beside the arrays of a batch norm stays, too.
    own = {"mean": jnp.ones(3), "var": jnp.ones(3), "other": jnp.ones(3)}
    given = {"scale": jnp.ones(3), "other": jnp.ones(3), "dense": {"scale": jnp.ones(3)}}
    of_user = bn.linen.split_batch_norms({"batch_stats": own, "params": given}, 2)
    assert shapes(of_user["batch_stats"]) == {**by_domain, "other": (3,)}
    assert shapes(of_user["params"]) == {"scale": (2, 3), "other": (3,), "dense": {"scale": (3,)}}
    without = {"batch_stats": {"norm": norm}}
    assert set(bn.linen.split_batch_norms(without, 2)) == {"batch_stats"}


def test_paths_choose_the_norms():
    x = standard_normal(0, (8, 4))
    model = nn.Sequential([bn.linen.BatchNorm(**OPTIONS), bn.linen.BatchNorm(**OPTIONS)])
    variables = random_like(model.init(jax.random.key(0), x))
    split = bn.linen.split_batch_norms(variables, 3, "*_1")
    stats = split["batch_stats"]
    assert (stats["layers_0"]["mean"].shape, stats["layers_1"]["mean"].shape) == ((4,), (3, 4))
    for patterns in ((), ("layers_1",)):
        chex.assert_trees_all_equal(bn.linen.select_domain(split, 2, *patterns), variables)
    with pytest.raises(ValueError, match=r"matches 'stem'; .* paths \['layers_0', 'layers_1'\]"):
        bn.linen.split_batch_norms(variables, 2, "stem")
    with pytest.raises(ValueError, match=r"batch norms without domains, \['layers_0'\]; expected"):
        bn.linen.select_domain(split, 0, "*")


def test_norms_of_different_numbers_of_domains_have_the_domains_of_all():
    variables = {
        "batch_stats": {"a": bn.init_batch_stats((2, 4)), "b": bn.init_batch_stats((3, 4))}
    }
    assert bn.linen.select_domain(variables, 1)["batch_stats"]["b"]["mean"].shape == (4,)
    with pytest.raises(ValueError, match=r"batch norms of \[2, 3\] domains, and domain=2 was"):
        bn.linen.select_domain(variables, 2)


def test_the_boxes_of_sharded_arrays_get_a_name_for_the_axis():
    init = nn.with_partitioning(nn.initializers.ones, ("model",))
    layer = bn.linen.BatchNorm(scale_init=init, **OPTIONS)
    variables = layer.init(jax.random.key(0), jnp.ones((8, 4)))
    split = bn.linen.split_batch_norms(variables, 2)
    scale = split["params"]["scale"]
    assert (scale.names, scale.value.shape) == ((None, "model"), (2, 4))
    one = bn.linen.select_domain(split, 0)
    assert one["params"]["scale"].names == ("model",)
    chex.assert_trees_all_equal(one, variables)
    named = {**split, "params": {**split["params"], "scale": scale.replace(names=("d", "model"))}}
    assert bn.linen.select_domain(named, 0)["params"]["scale"].names == ("model",)


def test_splitting_is_traced_and_has_shapes():
    variables = {"params": bn.init_params(4), "batch_stats": bn.init_batch_stats(4)}
    split = jax.eval_shape(lambda tree: bn.linen.split_batch_norms(tree, 2), variables)
    assert split["params"]["scale"].shape == (2, 4)
    one = jax.jit(lambda tree: bn.linen.select_domain(tree, 1))(
        bn.linen.split_batch_norms(variables, 2)
    )
    chex.assert_trees_all_equal(one, variables)


# --- NNX ----------------------------------------------------------------------------------------


class Net(nnx.Module):
    """Two norms, the second one called twice, and nothing about domains."""

    def __init__(self, kind):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(5, 4, rngs=rngs)
        self.norm = kind(4, rngs=rngs, momentum=0.5)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs), kind(4, rngs=rngs, momentum=0.5)])
        self.again = self.blocks[1]

    def __call__(self, x):
        x = nnx.relu(self.norm(self.linear(x)))
        return self.again(nnx.relu(self.blocks[1](self.blocks[0](x))))


def random_model(kind):
    model = Net(kind)
    randomize(model, 0)
    return model


def randomize(model, seed):
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    nnx.update(model, random_like(state, seed))


KINDS = [nnx.BatchNorm, bn.nnx.BatchNorm]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gets_domains_and_gives_them_back(kind):
    plain, x = random_model(kind), standard_normal(1, (8, 5))
    before = nnx.state(plain)
    model = bn.nnx.split_batch_norms(plain, 2)
    assert type(model.norm) is type(model.again) is bn.nnx.DomainBatchNorm
    assert model.again is model.blocks[1]
    assert type(plain.norm) is kind
    chex.assert_trees_all_equal(nnx.state(plain), before)
    plain.eval()
    model.eval()
    assert_close(nnx.view(model, domain=DOMAIN)(x), plain(x))
    randomize(model, 7)
    y = nnx.view(model, domain=DOMAIN)(x)
    for d in range(2):
        one = bn.nnx.select_domain(model, d)
        assert type(one.norm) is bn.nnx.BatchNorm
        assert one.again is one.blocks[1]
        assert_close(one(x[d == DOMAIN]), y[d == DOMAIN])
        assert_close(nnx.view(model, domain=d)(x[d == DOMAIN]), y[d == DOMAIN])
    assert jnp.abs(y - plain(x)).max() > 1e-2
    chex.assert_trees_all_equal_structs(nnx.state(bn.nnx.select_domain(model, 0)), before)
    assert model.norm.mean.shape == (2, 4)


def test_training_a_view_trains_the_rows_as_plain_models_on_the_parts():
    plain, x = random_model(bn.nnx.BatchNorm), standard_normal(1, (8, 5))
    model = bn.nnx.split_batch_norms(plain, 3)

    @nnx.jit
    def train(model, x, domain):
        def loss(model):
            return jnp.sum(jnp.sin(nnx.view(model, domain=domain)(x)))

        return nnx.grad(loss)(model)

    gradients = train(model, x, DOMAIN)
    total: Any = []
    for d in range(2):
        one = nnx.clone(plain)
        total.append(nnx.grad(lambda m, x: jnp.sum(jnp.sin(m(x))))(one, x[d == DOMAIN]))
        trained = bn.nnx.select_domain(model, d)
        assert_close(nnx.state(trained, nnx.BatchStat), nnx.state(one, nnx.BatchStat))
        assert_close(gradients.norm.scale[d], total[d].norm.scale[...], tolerance=1e-4)
    kernel = total[0].linear.kernel[...] + total[1].linear.kernel[...]
    assert_close(gradients.linear.kernel[...], kernel, tolerance=1e-4)
    # Without examples: the statistics that it started from, and no derivative.
    chex.assert_trees_all_equal(
        nnx.state(bn.nnx.select_domain(model, 2), nnx.BatchStat), nnx.state(plain, nnx.BatchStat)
    )
    assert not gradients.norm.scale[2].any()


def test_a_model_that_hands_on_no_domain_says_what_to_do():
    x = standard_normal(1, (8, 5))
    model = bn.nnx.split_batch_norms(random_model(bn.nnx.BatchNorm), 2)
    message = r"domain is None .* of 4 features\. .* nnx\.view\(model, domain=domain\)\(x\)"
    with pytest.raises(ValueError, match=message):
        model(x)
    model.eval()
    expected = nnx.view(model, domain=1)(x)
    preset = bn.nnx.split_batch_norms(random_model(bn.nnx.BatchNorm), 2, domain=1)
    preset.eval()
    assert_close(preset(x), expected)
    preset.set_attributes(bn.nnx.DomainBatchNorm, domain=0)
    assert_close(preset(x), nnx.view(model, domain=0)(x))
    # A view keeps its domain, and takes another one.
    view = nnx.view(nnx.view(model, domain=DOMAIN), use_running_average=True)
    assert_close(view(x), nnx.view(model, domain=DOMAIN)(x))
    assert_close(nnx.view(view, domain=1)(x), expected)
    assert model.norm.domain is None


def test_what_is_passed_by_position_to_the_wrong_class_is_an_error():
    layer: Any = bn.nnx.DomainBatchNorm(4, 2, rngs=nnx.Rngs(0))
    x = standard_normal(0, (8, 4))
    with pytest.raises(TypeError, match=r"domain is True, a boolean, .* pass it by keyword"):
        layer(x, True)
    plain = bn.nnx.select_domain(layer, 1)
    wrong: Any = (1, DOMAIN, np.int32(0))
    for domain in wrong:
        with pytest.raises(TypeError, match=r"expected True, False or None\. Domains are for"):
            plain(x, domain)
    for use in (True, np.True_):
        assert_close(plain(x, use), plain(x, use_running_average=True))


@pytest.mark.parametrize("kind", [{}, {"share_params": True}, {"share_stats": True}])
def test_modules_share_what_they_are_told_to(kind):
    plain = bn.nnx.BatchNorm(4, momentum=None, rngs=nnx.Rngs(0))
    model = bn.nnx.split_batch_norms(plain, 2, **kind)
    made = bn.nnx.DomainBatchNorm(4, 2, momentum=None, rngs=nnx.Rngs(0), **kind)
    assert shapes(nnx.to_pure_dict(nnx.state(model))) == shapes(nnx.to_pure_dict(nnx.state(made)))
    assert nnx.graphdef(model) == nnx.graphdef(made)
    back = bn.nnx.select_domain(model, 1)
    assert nnx.graphdef(back) == nnx.graphdef(plain)
    chex.assert_trees_all_equal(nnx.state(back), nnx.state(plain))


def test_paths_choose_the_modules_and_subclasses_are_left_alone():
    model = nnx.Sequential(
        bn.nnx.BatchNorm(4, rngs=nnx.Rngs(0)), bn.nnx.BatchRenorm(4, rngs=nnx.Rngs(0))
    )
    split = bn.nnx.split_batch_norms(model, 2)
    names = [type(layer).__name__ for layer in split.layers]
    assert names == ["DomainBatchNorm", "BatchRenorm"]
    with pytest.raises(TypeError, match=r"{'layers/1': 'BatchRenorm'} cannot get domains"):
        bn.nnx.split_batch_norms(model, 2, "layers/1")
    with pytest.raises(ValueError, match="matches 'stem'; the batch norms have the paths"):
        bn.nnx.split_batch_norms(model, 2, "stem")
    with pytest.raises(ValueError, match="model has no batch norm: expected a flax"):
        bn.nnx.split_batch_norms(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), 2)
    with pytest.raises(ValueError, match="model has no batch norm: expected a DomainBatchNorm in"):
        bn.nnx.select_domain(model, 0)
    with pytest.raises(ValueError, match=r"batch norms of \[2\] domains, and domain=-1 was asked"):
        bn.nnx.select_domain(split, -1)
    with pytest.raises(ValueError, match="num_domains=0"):
        bn.nnx.split_batch_norms(model, 0)


def test_stacked_modules_have_the_axis_of_domains_before_their_features():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0)
    def make(rngs):
        return bn.nnx.BatchNorm(4, rngs=rngs)

    plain = make(nnx.Rngs(0))
    randomize(plain, 0)
    model = bn.nnx.split_batch_norms(plain, 2)
    assert model.mean.shape == model.scale.shape == (3, 2, 4)
    x = standard_normal(0, (3, 8, 4))

    def call(layer, x):
        return layer(x, use_running_average=True)

    view = nnx.view(model, domain=1)
    assert_close(nnx.vmap(call)(view, x), nnx.vmap(call)(plain, x))
    chex.assert_trees_all_equal(nnx.state(bn.nnx.select_domain(model, 1)), nnx.state(plain))
