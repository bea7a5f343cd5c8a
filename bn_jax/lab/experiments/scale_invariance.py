"""Claim 1: the scale of weights before a norm only sets the effective learning rate."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax._paths import format_path
from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import MLP
from bn_jax.lab.experiments.sweeps import (
    accuracy,
    draw_batches,
    load_digits,
    loss_of,
    make_step,
    start,
    sweep,
    train,
)
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Result,
    Setting,
    exact,
    mean_interval,
)
from bn_jax.lab.models import Norm
from bn_jax.linen import BatchNorm
from bn_jax.optim import no_weight_decay_mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = 64, 64
NORMS = {"batch norm": partial(BatchNorm, momentum=0.9), "no norm": None}
SCALES = 1e-2, 0.3, 3.0, 1e2
BATCH_SIZE = 64
# As good as none: added to a variance, it changes none of its digits.
NO_EPSILON = {jnp.float64: 1e-300, jnp.float32: 1e-30}
WITHIN = 0.01
# Which parameters have the rates of the sweep, and the rate of the others.
SWEPT = {"all parameters": None, "kernels before a norm": 0.1}
DECAY = 0.05
DECAY_RATE = 0.1
# In units of 1 / (learning rate * weight decay): the equilibrium is measured between them.
EQUILIBRIUM = 12, 16


def identities(setting: Setting) -> dict[str, float]:
    """Compares output and gradient at weights `a w` with those at `w`, in float64.

    Args:
        setting: the seeds.

    Returns:
        The largest relative errors of the output and of the gradient.
    """
    with jax.enable_x64(True):
        digits = load_digits(setting.chosen)
        model = MLP(WIDTHS, norm=_without_epsilon(jnp.float64), dtype=jnp.float64)

        def errors(seed: jax.Array, x: jax.Array, y: jax.Array) -> Any:
            variables = model.init(jax.random.key(seed), x, train=False)

            def at(scale: Any) -> tuple[jax.Array, Any]:
                scaled = jax.tree.map_with_path(partial(_scaled, scale), variables["params"])
                logits, _ = model.apply(
                    {**variables, "params": scaled}, x, train=True, mutable=["batch_stats"]
                )
                gradients = jax.grad(
                    lambda params: loss_of(model, {**variables, "params": params}, x, y)[0]
                )(scaled)
                return logits, jax.tree.map_with_path(partial(_scaled, scale), gradients)

            expected = at(1.0)
            return jax.vmap(lambda scale: jax.tree.map(_relative_error, at(scale), expected))(
                jnp.asarray(SCALES)
            )

        x, y = digits.train.x[:, :BATCH_SIZE].astype(np.float64), digits.train.y[:, :BATCH_SIZE]
        outputs, gradients = jax.jit(jax.vmap(errors))(setting.chosen, x, y)
        return {"output": _largest(outputs), "gradient": _largest(gradients)}


def _without_epsilon(dtype: Any) -> Norm:
    return partial(BatchNorm, epsilon=NO_EPSILON[dtype])


def _scaled(scale: Any, path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    return leaf * scale if _is_scale_invariant(path) else leaf


def _is_scale_invariant(path: tuple[Any, ...]) -> bool:
    """Says whether a parameter is a kernel before a norm."""
    return "dense" in format_path(path)


def _relative_error(found: jax.Array, expected: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected))


def _largest(tree: Any) -> float:
    return max(float(jnp.max(leaf)) for leaf in jax.tree.leaves(tree))


def equilibrium(setting: Setting) -> Any:
    """Trains with weight decay until the weights' norm has come to rest.

    Args:
        setting: the seeds.

    Returns:
        `|w|^4` and `learning rate |w|^2 |g|^2 / (2 weight decay)` of the kernels before a norm, at
        every step, [2, seeds, steps, layers].
    """
    steps = round(EQUILIBRIUM[1] / (DECAY_RATE * DECAY))
    digits = load_digits(setting.chosen)
    rows = draw_batches(setting.chosen, digits.train.x.shape[1], steps, BATCH_SIZE)
    model = MLP(WIDTHS, norm=_without_epsilon(jnp.float32))
    decay = optax.add_decayed_weights(DECAY, no_weight_decay_mask)
    optimizer = optax.chain(decay, optax.sgd(DECAY_RATE))

    def run(seed: jax.Array, part: Any, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        step = make_step(model, optimizer, part)
        variables = model.init(jax.random.key(seed), part.x[:1], train=False)

        def follow(carry: Any, batch: jax.Array) -> Any:
            weights = _squared_norms(carry[0]["params"])
            carry, (_, gradients) = step(carry, batch)
            expected = DECAY_RATE * weights * _squared_norms(gradients) / (2 * DECAY)
            return carry, (weights**2, expected)

        return jax.lax.scan(follow, start(optimizer, variables), rows)[1]

    return np.asarray(jax.jit(jax.vmap(run))(setting.chosen, digits.train, rows))


def _squared_norms(params: Any) -> jax.Array:
    return jnp.stack([jnp.sum(params[f"dense{i}"]["kernel"] ** 2) for i in range(len(WIDTHS))])


def accuracies(
    setting: Setting, rates: Any, steps: int, norm: Norm | None, others: float | None
) -> Any:
    """Trains with every rate.

    Args:
        setting: the seeds.
        rates: of the kernels of the hidden layers, [rates].
        steps: of each training.
        norm: of the network.
        others: the learning rate of all other parameters; None: the same.

    Returns:
        The accuracies on the validation and the test part, [2, rates, seeds].
    """
    digits = load_digits(setting.chosen)
    rows = draw_batches(setting.chosen, digits.train.x.shape[1], steps, BATCH_SIZE)
    model = MLP(WIDTHS, norm=norm)

    def run(rate: Any, seed: Any, parts: Any, rows: Any) -> Any:
        optimizer = optax.partition(
            {True: optax.sgd(rate), False: optax.sgd(rate if others is None else others)},
            partial(jax.tree.map_with_path, lambda path, _: _is_scale_invariant(path)),
        )
        variables = model.init(jax.random.key(seed), parts.train.x[:1], train=False)
        trained = train(model, optimizer, variables, parts.train, rows).variables
        return [accuracy(model, trained, part) for part in (parts.validation, parts.test)]

    found = np.asarray(sweep(run, rates, setting.chosen, digits, rows))
    setting.advance(0.2)
    return found


def decades_within(accuracies: Any, rates: Any) -> Any:
    """Measures the range of rates that train as well as the best one.

    Args:
        accuracies: on validation and test part, [2, rates, seeds].
        rates: in equal ratios, [rates].

    Returns:
        For each seed, decades of rates whose test accuracy is within a point of that of the rate
        that is best on the validation part.
    """
    validation, test = accuracies
    best = np.take_along_axis(test, validation.argmax(0)[None], 0)
    return (test >= best - WITHIN).sum(0) * np.log10(rates[1] / rates[0])


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    error = identities(setting)
    setting.advance(0.05)
    norms, expected = equilibrium(setting)
    setting.advance(0.15)
    settled = round(EQUILIBRIUM[0] / (DECAY_RATE * DECAY))
    ratio = norms[:, settled:].mean((1, 2)) / expected[:, settled:].mean((1, 2))
    rates = np.geomspace(1e-4, 1e4, 9 if setting.quick else 17)
    steps = 60 if setting.quick else 400
    found = {
        f"{arm}, {which}": accuracies(setting, rates, steps, norm, others)
        for which, others in SWEPT.items()
        for arm, norm in NORMS.items()
    }
    decades = {arm: decades_within(values, rates) for arm, values in found.items()}
    return Result(
        criteria=(
            Criterion("BN(aWu) against BN(Wu)", "equal", exact(error["output"]), at_most=1e-10),
            Criterion(
                "gradient at aw, times a, against that at w",
                "equal",
                exact(error["gradient"]),
                at_most=1e-10,
            ),
            Criterion(
                "|w|^4 over lr E|g~|^2 / (2 wd) in equilibrium",
                "1",
                mean_interval(ratio),
                0.95,
                1.05,
            ),
            *(
                Criterion(
                    f"decades of rates within a point of the best, {which}, with minus without",
                    "any fixed rate trains",
                    mean_interval(np.subtract(*(decades[f"{arm}, {which}"] for arm in NORMS))),
                    at_least=2.0,
                )
                for which in SWEPT
            ),
        ),
        curves={
            "rates": rates,
            "accuracy": {arm: values[1] for arm, values in found.items()},
            "time": np.arange(norms.shape[1])[::20] * DECAY_RATE * DECAY,
            "ratio": (norms / expected[:, settled:].mean((0, 1))).mean(-1).T[::20],
        },
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws accuracy by learning rate, and the way to the equilibrium."""
    by_rate, by_time = figure.subplots(1, 2)
    for arm, values in curves["accuracy"].items():
        band(by_rate, curves["rates"], 100 * np.asarray(values), arm)
    by_rate.set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)")
    by_rate.legend(frameon=False)
    band(by_time, curves["time"], curves["ratio"], "measured")
    by_time.axhline(1, color="gray", linestyle=":")
    by_time.set(
        yscale="log",
        xlabel="steps x learning rate x weight decay",
        ylabel=r"$|w|^4$ over its value in equilibrium",
    )


EXPERIMENT = Experiment(
    number=1,
    name="scale_invariance",
    claim="The scale of weights before a norm changes nothing but the effective learning rate",
    source="van Laarhoven 2017; Hoffer et al. 2018; Arora et al. 2018",
    published="BN(aWu) = BN(Wu); |w|^4 -> lr E|g~|^2 / (2 wd); any fixed rate trains",
    protocol=(
        "MLP 64-64-64-10 on digits; identities in float64 without epsilon; equilibrium with weight "
        "decay; rates 1e-4 to 1e4 with and without batch norm"
    ),
    limits="A classifier without norm follows the scale-invariant layers and is not invariant.",
    run=run,
    draw=draw,
)
