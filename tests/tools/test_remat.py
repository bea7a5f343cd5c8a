"""A policy changes what is kept and what is computed twice, and no number."""

import importlib
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import Mesh, PartitionSpec
from support import all_reduces, assert_close, conditionals, far_from_initial, standard_normal

import bn_jax as bn

POLICIES = ["inputs", "narrow", "moments"]
DEPTH, EXAMPLES, FEATURES = 2, 8, 4
MASK = jnp.arange(EXAMPLES)[:, None] < 6


def batch_normed(params, stats, x, **options):
    return bn.batch_norm(params, stats, x, use_running_average=False, momentum=0.9, **options)


def stateless(norm):
    return lambda params, stats, x: (norm(params, x), stats)


def with_residual(params, stats, x):
    return batch_normed(params, stats, x, residual=x, activation=jax.nn.relu)


NORMS = {
    "batch_norm": batch_normed,
    "masked": partial(batch_normed, mask=MASK),
    "weighted": partial(batch_normed, mask=MASK + 0.5),
    "ghost": partial(batch_normed, virtual_batch_size=4),
    "activation": partial(batch_normed, activation=jax.nn.silu),
    "residual": with_residual,
    "renorm": partial(bn.batch_renorm, use_running_average=False, momentum=0.9),
    "layer_norm": stateless(bn.layer_norm),
    "rms_norm": stateless(bn.rms_norm),
    "group_norm": stateless(partial(bn.group_norm, num_groups=2)),
}


def make_variables():
    norm = far_from_initial(bn.init_params(FEATURES))
    weights = standard_normal(0, (DEPTH, FEATURES, FEATURES))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * DEPTH), (norm, bn.init_batch_stats(4)))
    return {"weight": weights, "norm": stacked[0]}, stacked[1]


PARAMS, STATS = make_variables()
X = standard_normal(1, (EXAMPLES, FEATURES))


def layer(norm, x, of_layer):
    params, stats = of_layer
    y, stats = norm(params["norm"], stats, x @ params["weight"])
    return jnp.sin(y), stats


def chain(norm, params, stats, x):
    """Layers one after another; the loss and their new statistics."""
    found = []
    for index in range(DEPTH):
        x, new = layer(norm, x, jax.tree.map(lambda leaf, at=index: leaf[at], (params, stats)))
        found.append(new)
    return jnp.sum(x**2), jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def scanned(norm, params, stats, x, wrap=lambda f: f):
    """The same in a scan, in which every layer is rematerialized by itself."""
    y, found = jax.lax.scan(wrap(partial(layer, norm)), x, (params, stats))
    return jnp.sum(y**2), found


def gradients_of(loss):
    return jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)


def at_once(loss):
    """Runs operation by operation, for which little needs to be compiled."""
    with jax.disable_jit():
        return gradients_of(loss)(PARAMS, STATS, X)


@pytest.mark.parametrize(
    "name", ["weighted", "activation", "residual", "renorm", "layer_norm", "rms_norm"]
)
def test_no_number_changes(name):
    loss = partial(chain, NORMS[name])
    expected = at_once(loss)
    assert_close(at_once(jax.checkpoint(loss, policy=bn.remat_policy())), expected)


@pytest.mark.parametrize("keep", POLICIES)
def test_no_number_changes_whatever_is_kept(keep):
    policy = bn.remat_policy(keep)
    (loss, stats), gradients = at_once(partial(chain, batch_normed))
    assert_close(stats["mean"][0], 0.1 * jnp.mean(X @ PARAMS["weight"][0], 0))
    for kept in (
        jax.checkpoint(partial(chain, batch_normed), policy=policy),
        partial(scanned, batch_normed, wrap=partial(jax.checkpoint, policy=policy)),
    ):
        assert_close(at_once(kept), ((loss, stats), gradients))


def residuals(capsys, loss, *args):
    """What is kept between forward and backward from within norms, as 'dtype[shape]'.

    A norm is one compiled function; what a policy keeps of its named arrays are outputs of it.
    """
    print_saved_residuals(loss, *args)
    lines = capsys.readouterr().out.splitlines()
    found = [re.match(r"(\S+) output of jitted function '_run'", line) for line in lines]
    return [one[1] for one in found if one], len(lines)


@pytest.mark.parametrize("name", ["batch_norm", "masked", "activation", "ghost", "renorm"])
def test_the_input_is_kept_once_in_its_own_dtype_and_nothing_else_of_its_size(capsys, name):
    norm = partial(NORMS[name], dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    loss = jax.checkpoint(
        lambda params, x: chain(norm, params, STATS, x)[0], policy=bn.remat_policy()
    )
    of_norms, kept = residuals(capsys, loss, params, X.astype(jnp.bfloat16))
    of_input = f"bf16[{EXAMPLES},{FEATURES}]"
    assert of_norms.count(of_input) == DEPTH
    others = [one for one in of_norms if one != of_input]
    assert others
    features = r"f32\[(1|2,1|1,1),(1|4)\]"
    assert all(re.fullmatch(features, one) for one in others), others
    arguments = len(jax.tree.leaves((params, X, STATS)))
    assert kept - len(of_norms) <= DEPTH * arguments


def test_the_moments_alone_are_kept(capsys):
    loss = jax.checkpoint(
        lambda params: chain(batch_normed, params, STATS, X)[0], policy=bn.remat_policy("moments")
    )
    of_norms, _ = residuals(capsys, loss, PARAMS)
    assert of_norms
    assert set(of_norms) == {f"f32[1,{FEATURES}]"}


@pytest.mark.parametrize(("width", "is_kept"), [(2, True), (FEATURES, True), (6, False)])
@pytest.mark.parametrize("convolved", [True, False])
def test_narrow_keeps_what_is_no_larger_than_its_input(width, is_kept, convolved):
    x = standard_normal(2, (2, 8, 8, FEATURES))
    linear = nn.Conv(width, (3, 3)) if convolved else nn.Dense(width)
    variables = linear.init(jax.random.key(0), x)

    def loss(variables):
        y = linear.apply(variables, jnp.sin(x))
        return jnp.sum(batch_normed({}, bn.init_batch_stats(width), y)[0] ** 3)

    kept = jax.checkpoint(loss, policy=bn.remat_policy("narrow"))
    primitive = "conv_general_dilated" if convolved else "dot_general"
    once, policed = (str(jax.make_jaxpr(jax.grad(f))(variables)) for f in (loss, kept))
    assert policed.count(primitive) - once.count(primitive) == (0 if is_kept else 1)


def repeatable(compiled):
    """How many reductions and guards a compiled program holds."""
    text = compiled.as_text()
    return len(re.findall(r" reduce\(", text)), conditionals(text)


@pytest.mark.parametrize("name", ["masked", "ghost"])
def test_no_reduction_and_no_guard_is_repeated(name):
    loss = partial(chain, NORMS[name])

    def lowered(loss):
        return jax.jit(gradients_of(loss)).lower(PARAMS, STATS, X)

    def reductions(lowered):
        return lowered.as_text().count("stablehlo.reduce(")

    plain, bare, *kept = map(
        lowered,
        (
            loss,
            jax.checkpoint(loss),
            *(jax.checkpoint(loss, policy=bn.remat_policy(keep)) for keep in ("inputs", "moments")),
        ),
    )
    assert reductions(bare) > reductions(plain)
    compiled = plain.compile()
    # Of the ghost norms XLA merges on a CPU what is repeated.
    assert name == "ghost" or repeatable(bare.compile()) > repeatable(compiled)
    assert repeatable(compiled)[1] == (0 if name == "ghost" else DEPTH)
    for one in kept:
        assert reductions(one) == reductions(plain)
        policed = one.compile()
        assert repeatable(policed) == repeatable(compiled)
        assert_close(policed(PARAMS, STATS, X), compiled(PARAMS, STATS, X))


def test_what_has_no_derivative_is_measured_once():
    loss = jax.checkpoint(
        lambda params: jnp.sum(jnp.sin(batch_normed(params, bn.init_batch_stats(4), X)[0])),
        policy=bn.remat_policy("moments"),
    )
    text = str(jax.make_jaxpr(jax.grad(loss))(bn.init_params(FEATURES)))
    assert text.count(" reduce_or[") == 1


@pytest.mark.parametrize("keep", ["inputs", "moments"])
def test_no_collective_is_repeated_and_every_device_has_the_same_numbers(keep):
    mesh = Mesh(jax.devices(), ("data",))

    def step(wrap, params, stats, x, mask):
        norm = partial(batch_normed, axis_name="data", mask=mask)

        def loss(params, stats, x):
            value, stats = chain(norm, params, stats, x)
            return jax.lax.psum(value, "data"), stats

        return jax.value_and_grad(wrap(loss), argnums=(0, 2), has_aux=True)(params, stats, x)

    everywhere, split = PartitionSpec(), PartitionSpec("data")

    def compiled(wrap):
        mapped = jax.shard_map(
            partial(step, wrap),
            mesh=mesh,
            in_specs=(everywhere, everywhere, split, split),
            out_specs=((everywhere, everywhere), (everywhere, split)),
        )
        return jax.jit(mapped).lower(PARAMS, STATS, X, MASK).compile()

    plain, kept = map(
        compiled, (lambda f: f, partial(jax.checkpoint, policy=bn.remat_policy(keep)))
    )
    assert sorted(all_reduces(kept.as_text())) == sorted(all_reduces(plain.as_text()))
    assert conditionals(kept.as_text()) == conditionals(plain.as_text()) == DEPTH
    whole = gradients_of(partial(chain, partial(batch_normed, mask=MASK)))(PARAMS, STATS, X)
    assert_close(kept(PARAMS, STATS, X, MASK), whole, tolerance=1e-4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, kernel_init=nn.initializers.ones)
        return x + bn.linen.BatchNorm(use_running_average=False)(jnp.sin(dense(x)))


def test_linen_blocks():
    def gradients(block):
        model = nn.Sequential([block(name=f"block{index}") for index in range(2)])
        variables = model.init(jax.random.key(0), X)

        def loss(params):
            y, new = model.apply({**variables, "params": params}, X, mutable="batch_stats")
            return jnp.sum(y**2), new

        with jax.disable_jit():
            return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    plain = gradients(Block)
    for keep in ("moments", "narrow"):
        assert_close(
            gradients(nn.remat(Block, policy=bn.remat_policy(keep))), plain, tolerance=2e-5
        )


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = bn.nnx.BatchNorm(4, rngs=rngs, use_running_average=False)

    def __call__(self, x):
        return x + jnp.sin(self.norm(self.dense(x)))


def test_nnx_blocks():
    def gradients(wrap):
        block = NnxBlock(nnx.Rngs(0))

        def loss(block):
            return jnp.sum(wrap(lambda block, x: block(x))(block, X) ** 2)

        with jax.disable_jit():
            of_loss = nnx.grad(loss)(block)
        return nnx.state(of_loss), nnx.state(block, nnx.BatchStat)

    plain = gradients(lambda f: f)
    for keep in ("inputs", "narrow"):
        assert_close(gradients(partial(nnx.remat, policy=bn.remat_policy(keep))), plain)


@pytest.mark.parametrize("name", ["masked", "ghost", "activation", "layer_norm"])
def test_names_are_free(name, monkeypatch):
    norm = NORMS[name]

    def operations():
        # A new function, or JAX would take the trace of the call before from its cache.
        lowered = jax.jit(gradients_of(lambda *args: chain(norm, *args))).lower(PARAMS, STATS, X)
        # A named input is also an output of the function of a norm, which XLA inlines.
        return re.findall(r"stablehlo\.\w+", lowered.as_text())

    with_names = operations()
    for name in ("moments", "batch_norm", "feature_norms"):
        module = importlib.import_module(f"bn_jax._core.{name}")
        monkeypatch.setattr(module, "named", lambda name, values: values)
    jax.clear_caches()
    assert operations() == with_names


def test_an_unknown_policy_is_an_error():
    with pytest.raises(ValueError, match=r"keep='input' is no policy, expected .*'inputs', "):
        bn.remat_policy("input")  # type: ignore[arg-type]
