"""Training on one value per feature: what it computes, and the warning."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, define_batch_norm, make_state, standard_normal

import bn_jax as bn

pytestmark = pytest.mark.usefixtures("strict_promotion")

TRAIN: Any = partial(bn.batch_norm, use_running_average=False)
RENORM: Any = partial(bn.batch_renorm, use_running_average=False)
WHITEN: Any = partial(bn.whitening_norm, use_running_average=False)
IGNORED = pytest.mark.filterwarnings("ignore:.* has one value per feature to train on:UserWarning")


@IGNORED
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_y_is_the_bias_and_nothing_flows_back(offset, dtype):
    x = (standard_normal(0, (1, 3)) + offset).astype(dtype)
    params, stats = make_state((3,))
    whitening = bn.init_whitening_stats(3)
    bias = jnp.broadcast_to(params["bias"], (1, 3))

    @jax.jit
    def run(x):
        def train(x):
            y, updated = TRAIN(params, stats, x, dtype=jnp.float32)
            whitened, covariances = WHITEN(params, whitening, x, dtype=jnp.float32)
            renormed, _ = RENORM(params, stats, x, dtype=jnp.float32)
            loss = sum(jnp.sum(jnp.sin(out)) for out in (y, whitened, renormed))
            return loss, ((y, whitened), updated, covariances)

        return jax.grad(train, has_aux=True)(x)

    gradient, (outputs, updated, covariances) = run(x)
    assert_close(outputs, (bias, bias), tolerance=0)
    assert_close(gradient, np.zeros((1, 3)), dtype=dtype, tolerance=0)
    expected = define_batch_norm(params, stats, x)[1]
    assert_close(updated, expected)
    assert_close(updated["var"], 0.99 * np.asarray(stats["var"]))
    assert_close(covariances, {"mean": np.float32(x[0]) * 0.01, "cov": 0.99 * np.eye(3)[None]})


@IGNORED
def test_the_unbiased_variance_of_one_value_enters_nothing():
    params, stats = make_state((3,))
    x = standard_normal(1, (1, 3))
    assert_close(TRAIN(params, stats, x, running_var_ddof=1)[1], stats, tolerance=0)
    # Of ghost batches of one, what enters is the variance between the examples.
    x = standard_normal(2, (6, 3))
    y, updated = TRAIN(params, stats, x, virtual_batch_size=1)
    assert_close(y, np.broadcast_to(params["bias"], x.shape), tolerance=0)
    assert_close(updated, define_batch_norm(params, stats, x)[1])


STATS, WHITENING = bn.init_batch_stats(3), bn.init_whitening_stats(3)
ONE, FOUR = jnp.ones((1, 3)), jnp.ones((4, 3))
GROUPS: dict[str, Any] = dict(axis_name="data", axis_index_groups=[[0], [1], [2], [3]])
UPDATE = dict(use_running_average=True, update_running_average=True)
WARNED: dict[str, tuple[Any, str]] = {
    "batch_norm": (lambda: TRAIN({}, STATS, ONE), r"^x of shape \(1, 3\) with axis=-1 has one"),
    "effect": (lambda: TRAIN({}, STATS, ONE), "y is `bias` whatever x is.*variance towards 0"),
    "unbiased": (lambda: TRAIN({}, STATS, ONE, running_var_ddof=1), "reaches x. Use a larger"),
    "all axes": (lambda: TRAIN({}, STATS, ONE[0], axis=0), r"x of shape \(3,\) with axis=0"),
    "half": (lambda: bn.normalize_by_batch({}, STATS, ONE), "Use a larger batch"),
    "no update": (
        lambda: TRAIN({}, STATS, ONE, update_running_average=False), "Use a larger batch",
    ),
    "update": (lambda: TRAIN({}, STATS, ONE, **UPDATE), r"\(and no update_running_average=True\)"),
    "renorm": (lambda: RENORM({}, STATS, ONE), "y depends on x by d alone, and no gradient"),
    "whitening": (lambda: WHITEN({}, WHITENING, ONE), "one value per feature"),
    "ghosts": (
        lambda: TRAIN({}, STATS, FOUR, virtual_batch_size=1),
        r"x of shape \(4, 3\).*reaches x. Use larger groups of examples \(virtual_batch_size",
    ),
    "groups": (lambda: TRAIN({}, STATS, FOUR, **GROUPS), "Use larger groups of examples"),
    "a mask": (lambda: TRAIN({}, STATS, ONE, mask=jnp.zeros((1, 1), bool)), "one value"),
    "abstract": (lambda: jax.eval_shape(partial(TRAIN, {}, STATS), ONE), "tabulate and eval_shape"),
    "vmap": (lambda: jax.vmap(partial(TRAIN, {}, STATS))(FOUR[:, None]), r"x of shape \(1, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNED)
def test_it_is_warned_of(case):
    call, text = WARNED[case]
    with pytest.warns(UserWarning, match=text) as caught:
        call()
    assert [warning.filename for warning in caught] == [__file__]


SILENT: dict[str, Any] = {
    "initializing": lambda: TRAIN({}, STATS, ONE, initializing=True),
    "whitening, initializing": lambda: WHITEN({}, WHITENING, ONE, initializing=True),
    "evaluation": lambda: TRAIN({}, STATS, ONE, use_running_average=True),
    "whitening, evaluation": lambda: WHITEN({}, WHITENING, ONE, use_running_average=True),
    "measuring": lambda: TRAIN({}, bn.start_measuring(STATS), ONE, use_running_average=True),
    "no examples": lambda: TRAIN({}, STATS, ONE[:0]),
    "one of many": lambda: TRAIN({}, STATS, FOUR, mask=jnp.arange(4)[:, None] == 0),
    "synchronized": lambda: jax.vmap(
        partial(TRAIN, {}, STATS, axis_name="data"), axis_name="data"
    )(FOUR[:, None]),
}  # fmt: skip


@pytest.mark.parametrize("case", SILENT)
def test_it_is_not_warned_of(case):
    SILENT[case]()


def test_it_is_warned_of_once_for_every_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(20):
            jax.jit(lambda x: TRAIN({}, STATS, x)).trace(ONE)
            jax.grad(lambda x: TRAIN({}, STATS, x)[0].sum())(ONE)
    assert [warning.filename for warning in caught] == [__file__] * 2
    assert caught[1].lineno - caught[0].lineno == 1
