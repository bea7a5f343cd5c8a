"""Claim 18: what scale and bias, the second step of batch norm, are for."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax._core.batch_norm import batch_norm, identity_params
from bn_jax._core.running import init_batch_stats
from bn_jax._core.types import Params
from bn_jax._fold import absorb_scale, fold
from bn_jax.lab.experiments.nets import MLP, Position
from bn_jax.lab.experiments.sweeps import accuracy, draw_batches, load_digits, sweep, train
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Interval,
    Result,
    Setting,
    exact,
    mean_interval,
)
from bn_jax.lab.models import Norm
from bn_jax.linen import BatchNorm
from bn_jax.optim import norm_params_mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES, FEATURES, OUTPUTS = 64, 16, 8
# As good as none: added to a variance, it changes none of its digits.
NO_EPSILON = 1e-300
TOLERANCE = 1e-6
# A unit of tanh is saturated where its derivative is below a tenth.
SATURATED = 0.95
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {"tanh": nn.tanh, "ReLU": nn.relu}
NORM = partial(BatchNorm, momentum=0.9)
NETS: Mapping[str, tuple[Norm | None, Position]] = {
    "no norm": (None, "before"),
    "norm before activation": (NORM, "before"),
    "norm after activation": (NORM, "after"),
}
WIDTHS = 64, 64, 64
RATES = 0.1, 0.3, 1.0
BATCH_SIZE = 64


def normalize(params: Any, x: jax.Array, **options: Any) -> jax.Array:
    """Normalizes by the batch, or with `use_running_average` by mean 0 and variance 1.

    Args:
        params: scale and bias, either may be absent.
        x: [n, features] in float64.
        **options: of `bn_jax.batch_norm`.

    Returns:
        [n, features].
    """
    stats = init_batch_stats(x.shape[-1], dtype=x.dtype)
    options = {"use_running_average": False, "epsilon": NO_EPSILON, **options}
    return batch_norm(params, stats, x, **options)[0]


def worked_example() -> tuple[jax.Array, jax.Array]:
    """Returns [-1.5, -0.5, 0.5, 1.5] and what scale 2 and bias 3 make of it, both [4, 1]."""
    x = jnp.array([[-1.5], [-0.5], [0.5], [1.5]])
    params = {"scale": jnp.array([2.0]), "bias": jnp.array([3.0])}
    return x, normalize(params, x, use_running_average=True)


def algebra(seed: jax.Array) -> dict[str, jax.Array]:
    """Measures by how much both sides of each identity differ on random values.

    Args:
        seed: of the values.

    Returns:
        The largest differences, over the largest value where it is not named a gradient.
    """
    normal = partial(jax.random.normal, dtype=float)
    keys = jax.random.split(jax.random.key(seed), 5)
    inputs = 1 + normal(keys[0], (EXAMPLES, FEATURES))
    below = normal(keys[1], (FEATURES, FEATURES))
    x, above = inputs @ below, normal(keys[2], (FEATURES, OUTPUTS))
    params: Params = {"scale": normal(keys[3], (FEATURES,)), "bias": normal(keys[4], (FEATURES,))}
    y = normalize(params, x)
    flipped, flipped_above = flip_signs(params, above)
    bare, absorbed_above = absorb_scale(params, above, activation=None)
    positive, scaled_above = absorb_scale(params, above, activation=nn.relu)
    differences = {
        "identity recovered": (normalize(identity_params(x, epsilon=NO_EPSILON), x), x),
        "mean of the output is the bias": (y.mean(0), params["bias"]),
        "negative scale, nothing after it": (normalize(flipped, x) @ flipped_above, y @ above),
        "negative scale, tanh after it": (
            jnp.tanh(normalize(flipped, x)) @ flipped_above,
            jnp.tanh(y) @ above,
        ),
        "both are redundant before a linear layer": (
            normalize({}, x) @ absorbed_above + bare["bias"][None] @ absorbed_above,
            y @ above,
        ),
        "the size of the scale is redundant before ReLU": (
            nn.relu(normalize(positive, x)) @ scaled_above,
            nn.relu(y) @ above,
        ),
        "negative scale, ReLU after it": (
            nn.relu(normalize(flipped, x)) @ flipped_above,
            nn.relu(y) @ above,
        ),
    }
    weights = jnp.arange(1.0, FEATURES + 1)
    of_mean = jax.grad(lambda kernel: normalize(params, inputs @ kernel).mean(0) @ weights)(below)
    return {
        "gradient of the mean by the weights below": jnp.abs(of_mean).max(),
        **{name: _relative_error(*sides) for name, sides in differences.items()},
    }


def flip_signs(params: Params, kernel: jax.Array) -> tuple[Params, jax.Array]:
    """Moves the signs of the scale into the rows of the next layer's kernel.

    Args:
        params: scale and bias, [features].
        kernel: [features, outputs].

    Returns:
        Params with a positive scale, and the kernel: the same function before any odd activation.
    """
    sign = jnp.sign(params["scale"])
    return {"scale": sign * params["scale"], "bias": sign * params["bias"]}, sign[:, None] * kernel


def _relative_error(found: Any, expected: Any) -> jax.Array:
    return jnp.abs(found - expected).max() / jnp.abs(expected).max()


def folding_error(seed: int) -> float:
    """Folds a norm with random parameters and statistics into the dense layer after it.

    Args:
        seed: of all values.

    Returns:
        The largest difference of the outputs, over the largest output.
    """
    generator = np.random.default_rng([2, seed])
    options = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    norm = BatchNorm(use_running_average=True, **options)
    model = nn.Sequential([norm, nn.Dense(OUTPUTS, **options)])
    x = jnp.asarray(generator.normal(size=(EXAMPLES, FEATURES)))
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(generator.uniform(0.5, 2, leaf.shape)),
        jax.eval_shape(model.init, jax.random.key(0), x),
    )
    folded = fold(model.apply, variables, x)
    if any(norm.into is None for norm in folded.report):
        return float("nan")
    return float(_relative_error(folded.apply(folded.params, x), model.apply(variables, x)))


def identities(setting: Setting) -> dict[str, float]:
    """Measures all identities in float64.

    Args:
        setting: the seeds.

    Returns:
        The largest error of each over the seeds.
    """
    with jax.enable_x64(True):
        x, y = worked_example()
        statistics = {"standard deviation of x^": (x.std(), 1.25**0.5)} | {
            "mean of y": (y.mean(), 3.0),
            "standard deviation of y": (y.std(), 5**0.5),
            "y": (y, jnp.array([[0.0], [2.0], [4.0], [6.0]])),
        }
        example = max(float(jnp.abs(a - b).max()) for a, b in statistics.values())
        found = jax.jit(jax.vmap(algebra))(setting.chosen)
        return {
            "worked example": example,
            "folded into a linear layer": folding_error(setting.first_seed),
            **{name: float(errors.max()) for name, errors in found.items()},
        }


def train_net(setting: Setting, net: str, steps: int) -> dict[str, dict[str, Any]]:
    """Trains a network with every activation and rate, without scale and bias trained and with.

    Args:
        setting: the seeds.
        net: of `NETS`.
        steps: of each training.

    Returns:
        For each activation and arm, at the rate that is best on the validation part: "accuracy" on
        the test part, and "share" of saturated or dead units, [seeds].
    """
    digits = load_digits(setting.chosen)
    rows = draw_batches(setting.chosen, digits.train.x.shape[1], steps, BATCH_SIZE)
    norm, position = NETS[net]
    arms = [net] if norm is None else [net, f"{net}, scale and bias trained"]

    def run(rate: Any, seed: Any, parts: Any, rows: Any) -> Any:
        def of_arm(activation: jax.Array, step_two: jax.Array) -> Any:
            # Both activations are one program: which it is, is data.
            model = MLP(
                WIDTHS, norm=norm, activation=partial(_activate, activation), position=position
            )
            variables = model.init(jax.random.key(seed), parts.train.x[:1], train=False)
            optimizer = optax.chain(optax.sgd(rate), _norms_if(step_two))
            trained = train(model, optimizer, variables, parts.train, rows).variables
            validation, test = (accuracy(model, trained, p) for p in (parts.validation, parts.test))
            _, sown = model.apply(trained, parts.train.x, train=False, mutable=["intermediates"])
            inputs = jnp.stack(sown["intermediates"]["preactivation"])
            shares = jnp.stack([useless_share(name, inputs) for name in ACTIVATIONS])
            return validation, test, shares[activation]

        of_arms = jax.vmap(of_arm, (None, 0))
        return jax.vmap(of_arms, (0, None))(jnp.arange(len(ACTIVATIONS)), jnp.arange(len(arms)))

    validation, *rest = map(np.asarray, sweep(run, RATES, setting.chosen, digits, rows))
    best = validation.argmax(0)[None]
    test, share = (np.take_along_axis(values, best, 0)[0] for values in rest)
    return {
        activation: {
            arm: {"accuracy": test[:, row, place], "share": share[:, row, place]}
            for place, arm in enumerate(arms)
        }
        for row, activation in enumerate(ACTIVATIONS)
    }


def _activate(which: jax.Array, x: jax.Array) -> jax.Array:
    tanh, relu = (activate(x) for activate in ACTIVATIONS.values())
    return jnp.where(which == 0, tanh, relu)


def _norms_if(step_two: jax.Array) -> optax.GradientTransformation:
    """Leaves the updates of scale and bias, or makes them zero."""

    def update(updates: Any, _: Any) -> Any:
        return jax.tree.map(
            lambda one, is_norm: jnp.where(step_two, one, 0) if is_norm else one,
            updates,
            norm_params_mask(updates),
        )

    return optax.stateless(update)


def useless_share(activation: str, inputs: jax.Array) -> jax.Array:
    """Measures how many units learn little or nothing.

    Args:
        activation: of `ACTIVATIONS`.
        inputs: of the activations, [layers, examples, units].

    Returns:
        The share of values of tanh beyond 0.95, or of units of ReLU that no example activates.
    """
    if activation == "tanh":
        return jnp.mean(jnp.abs(jnp.tanh(inputs)) > SATURATED)
    return jnp.mean((inputs <= 0).all(1))


# What is no identity, and is reported: ReLU is not odd.
NOT_EQUAL = "negative scale, ReLU after it"


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    errors = identities(setting)
    setting.advance(0.1)
    steps = 50 if setting.quick else 300
    found: dict[str, dict[str, Any]] = {activation: {} for activation in ACTIVATIONS}
    for net in NETS:
        for activation, arms in train_net(setting, net, steps).items():
            found[activation] |= arms
        setting.advance(0.9 / len(NETS))
    return Result(
        criteria=tuple(
            Criterion(name, "equal", exact(error), at_most=TOLERANCE)
            for name, error in errors.items()
            if name != NOT_EQUAL
        ),
        curves={"found": found},
        reported={f"{NOT_EQUAL}, difference": exact(errors[NOT_EQUAL]), **_shares(found)},
    )


def _shares(found: Any) -> dict[str, Interval]:
    names = {"tanh": f"share beyond {SATURATED}", "ReLU": "share of dead units"}
    return {
        f"{activation}, {arm}: {what}": mean_interval(100 * values[key])
        for activation, arms in found.items()
        for arm, values in arms.items()
        for key, what in {
            "share": f"{names[activation]} (%)",
            "accuracy": "test accuracy (%)",
        }.items()
    }


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the shares of saturated and dead units, and accuracies, of each arm."""
    labels = {
        "share": {"tanh": f"values with |tanh| > {SATURATED} (%)", "ReLU": "dead ReLUs (%)"},
        "accuracy": dict.fromkeys(ACTIVATIONS, "test accuracy (%)"),
    }
    panels = figure.subplots(1, 4, sharey=True)
    for axes, (activation, key) in zip(
        panels, ((a, k) for k in labels for a in ACTIVATIONS), strict=True
    ):
        arms = curves["found"][activation]
        for place, arm in enumerate(sorted(arms)):
            estimate, low, high = mean_interval(100 * np.asarray(arms[arm][key], float))
            error = [[estimate - low], [high - estimate]]
            axes.errorbar(estimate, place, xerr=error, fmt="o", capsize=3)
        axes.set(xlabel=labels[key][activation], title=activation)
        axes.set_yticks(range(len(arms)), [arm.replace(", ", ",\n") for arm in sorted(arms)])


EXPERIMENT = Experiment(
    number=18,
    name="step_two",
    claim="Scale and bias give back every function, and set mean and deviation by themselves",
    source="Goodfellow, Bengio & Courville 2016, section 8.7.1; Ioffe & Szegedy 2015",
    published=(
        "same functions, other dynamics; identity at scale = sqrt(var + epsilon), bias = mean"
    ),
    protocol=(
        "identities on random values in float64; MLP 64-64-64-64-10 of tanh or ReLU on digits, "
        "without a norm, with one before or after the activation, with and without scale and bias, "
        "each at its best of 3 rates"
    ),
    limits=(
        "A negative scale is a sign flip of the next layer only before an odd activation: before "
        "ReLU it is another function. Three layers on digits saturate little and train without "
        "step two too."
    ),
    run=run,
    draw=draw,
)
