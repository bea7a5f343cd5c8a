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
from bn_jax.lab.experiments.figures import points
from bn_jax.lab.experiments.nets import BATCH_NORM, MLP, NO_EPSILON, Position
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.selection import Chosen, Outcome, accuracies, sweep_rates
from bn_jax.lab.experiments.sweeps import Trial, draw_trials, take, train_trial
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Interval,
    Result,
    Setting,
    exact,
    mean_interval,
    relative_error,
)
from bn_jax.lab.models import Norm
from bn_jax.linen import BatchNorm
from bn_jax.optim import norm_params_mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES, FEATURES, OUTPUTS = 64, 16, 8
TOLERANCE = 1e-6
# This is no identity, for ReLU is not odd; its error is reported.
NOT_EQUAL = "negative scale, ReLU after it"
# A value of tanh is saturated where its derivative is below a tenth.
SATURATED = 0.95
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {"tanh": nn.tanh, "ReLU": nn.relu}
NETS: Mapping[str, tuple[Norm | None, Position]] = {
    "no norm": (None, "before"),
    "norm before activation": (BATCH_NORM, "before"),
    "norm after activation": (BATCH_NORM, "after"),
}
WIDTHS = 64, 64, 64
RATES = 0.1, 0.3, 1.0
BATCH_SIZE = 64


def normalize(params: Any, x: jax.Array, *, use_running_average: bool = False) -> jax.Array:
    """Normalizes with the batch's statistics, or with mean 0 and variance 1.

    Args:
        params: scale and bias, either may be absent.
        x: [n, features] in float64.
        use_running_average: whether to take mean 0 and variance 1.

    Returns:
        [n, features].
    """
    stats = init_batch_stats(x.shape[-1], dtype=x.dtype)
    return batch_norm(
        params, stats, x, use_running_average=use_running_average, epsilon=NO_EPSILON
    )[0]


def worked_example() -> tuple[jax.Array, jax.Array]:
    """Returns [-1.5, -0.5, 0.5, 1.5], and the same with scale 2 and bias 3, both [4, 1]."""
    x = jnp.array([[-1.5], [-0.5], [0.5], [1.5]])
    params = {"scale": jnp.array([2.0]), "bias": jnp.array([3.0])}
    return x, normalize(params, x, use_running_average=True)


def algebra(seed: jax.Array) -> dict[str, jax.Array]:
    """Measures how much both sides of each identity differ for random values.

    Args:
        seed: the seed of the values.

    Returns:
        The largest gradient, and for all others the largest difference over the largest value.
    """
    normal = partial(jax.random.normal, dtype=float)
    keys = jax.random.split(jax.random.key(seed), 5)
    inputs = 1 + normal(keys[0], (EXAMPLES, FEATURES))
    below = normal(keys[1], (FEATURES, FEATURES))
    above = normal(keys[2], (FEATURES, OUTPUTS))
    params: Params = {"scale": normal(keys[3], (FEATURES,)), "bias": normal(keys[4], (FEATURES,))}
    weights = jnp.arange(1.0, FEATURES + 1)
    of_mean = jax.grad(lambda kernel: normalize(params, inputs @ kernel).mean(0) @ weights)(below)
    return {
        "gradient of the mean by the weights below": jnp.abs(of_mean).max(),
        **{
            name: relative_error(*sides)
            for name, sides in _identity_sides(params, inputs @ below, above).items()
        },
    }


def _identity_sides(
    params: Params, x: jax.Array, above: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns both sides of each identity.

    Args:
        params: the params of the norm.
        x: its input, [n, features].
        above: the kernel of the layer after it, [features, outputs].
    """
    y = normalize(params, x)
    flipped, flipped_above = flip_signs(params, above)
    bare, absorbed_above = absorb_scale(params, above, activation=None)
    positive, scaled_above = absorb_scale(params, above, activation=nn.relu)
    return {
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
        NOT_EQUAL: (nn.relu(normalize(flipped, x)) @ flipped_above, nn.relu(y) @ above),
    }


def flip_signs(params: Params, kernel: jax.Array) -> tuple[Params, jax.Array]:
    """Moves the signs of the scale into the rows of the next layer's kernel.

    Args:
        params: scale and bias, [features].
        kernel: [features, outputs].

    Returns:
        Params with a positive scale, and a kernel. With an odd activation between them they are
        the same function as before.
    """
    sign = jnp.sign(params["scale"])
    return {"scale": sign * params["scale"], "bias": sign * params["bias"]}, sign[:, None] * kernel


def folding_error(seed: int) -> float:
    """Folds a norm with random parameters and statistics into the dense layer after it.

    Args:
        seed: the seed of all values.

    Returns:
        The largest difference of the outputs, over the largest output.
    """
    generator = np.random.default_rng([2, seed])
    norm = BatchNorm(use_running_average=True, dtype=jnp.float64, param_dtype=jnp.float64)
    dense = nn.Dense(OUTPUTS, dtype=jnp.float64, param_dtype=jnp.float64)
    model = nn.Sequential([norm, dense])
    x = jnp.asarray(generator.normal(size=(EXAMPLES, FEATURES)))
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(generator.uniform(0.5, 2, leaf.shape)),
        jax.eval_shape(model.init, jax.random.key(0), x),
    )
    folded = fold(model.apply, variables, x)
    if any(norm.into is None for norm in folded.report):
        return float("nan")
    return float(relative_error(folded.apply(folded.params, x), model.apply(variables, x)))


def identities(setting: Setting) -> dict[str, float]:
    """Measures the errors of all identities, in float64.

    Args:
        setting: the seeds, and the size of the run.

    Returns:
        The largest error of each over the seeds.
    """
    with jax.enable_x64(True):
        x, y = worked_example()
        example = [
            x.std() - 1.25**0.5,
            y.mean() - 3.0,
            y.std() - 5**0.5,
            y - jnp.array([[0.0], [2.0], [4.0], [6.0]]),
        ]
        errors = jax.jit(jax.vmap(algebra))(setting.chosen)
        return {
            "worked example": max(float(jnp.abs(difference).max()) for difference in example),
            "folded into a linear layer": folding_error(setting.first_seed),
            **{name: float(of_seeds.max()) for name, of_seeds in errors.items()},
        }


def train_net(setting: Setting, net: str, steps: int) -> dict[str, dict[str, Chosen[Any]]]:
    """Trains a network with every activation and rate, with scale and bias fixed and trained.

    Args:
        setting: the seeds, and the size of the run.
        net: a name in `NETS`.
        steps: the number of steps of each training.

    Returns:
        For each activation and arm, at the best rate of each seed: "accuracy" on the test part, and
        "share" of saturated values or dead units, [seeds].
    """
    norm, position = NETS[net]
    arms = [net] if norm is None else [net, f"{net}, scale and bias trained"]
    shape = len(ACTIVATIONS), len(arms)

    def run(rate: jax.Array, trial: Trial) -> Outcome[dict[str, jax.Array]]:
        def of_arm(place: jax.Array) -> Outcome[dict[str, jax.Array]]:
            # The activation is chosen by data, so that both are one program.
            activation, step_two = place
            model = MLP(
                WIDTHS, norm=norm, activation=partial(_activate, activation), position=position
            )
            optimizer = optax.sgd(rate)
            if norm is not None:
                optimizer = optax.chain(optimizer, _norms_if(step_two))
            trained = train_trial(model, optimizer, trial)
            outcome = accuracies(model, trained, trial.digits)
            x = trial.digits.train.x
            _, sown = model.apply(trained, x, train=False, mutable=["intermediates"])
            inputs = jnp.stack(sown["intermediates"]["preactivation"])
            shares = jnp.stack([useless_share(name, inputs) for name in ACTIVATIONS])
            measured = {"accuracy": outcome.measured, "share": shares[activation]}
            return Outcome(outcome.validation, measured)

        outcomes = map_runs(of_arm, np.indices(shape, np.int32).reshape(2, -1).T)
        return jax.tree.map(lambda leaf: leaf.reshape(shape), outcomes)

    trials = draw_trials(setting.chosen, steps, BATCH_SIZE)
    chosen = sweep_rates(run, RATES, trials).best_for_each_seed()
    return {
        activation: {arm: take(chosen, slice(None), row, column) for column, arm in enumerate(arms)}
        for row, activation in enumerate(ACTIVATIONS)
    }


def _activate(which: jax.Array, x: jax.Array) -> jax.Array:
    """Applies the activation whose place in `ACTIVATIONS` is `which`."""
    tanh, relu = (activate(x) for activate in ACTIVATIONS.values())
    return jnp.where(which == 0, tanh, relu)


def _norms_if(step_two: jax.Array) -> optax.GradientTransformation:
    """Sets the updates of scale and bias to zero unless `step_two` is true."""

    def update(updates: Any, _: Any) -> Any:
        return jax.tree.map(
            lambda leaf, is_norm: jnp.where(step_two, leaf, 0) if is_norm else leaf,
            updates,
            norm_params_mask(updates),
        )

    return optax.stateless(update)


def useless_share(activation: str, inputs: jax.Array) -> jax.Array:
    """Measures how many values or units learn little or nothing.

    Args:
        activation: a name in `ACTIVATIONS`.
        inputs: the inputs of the activations, [layers, examples, units].

    Returns:
        The share of values of tanh beyond 0.95, or of ReLU units that no example activates.
    """
    if activation == "tanh":
        return jnp.mean(jnp.abs(jnp.tanh(inputs)) > SATURATED)
    return jnp.mean((inputs <= 0).all(1))


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    errors = identities(setting)
    setting.advance(0.1)
    steps = 50 if setting.quick else 300
    chosen: dict[str, dict[str, Chosen[Any]]] = {activation: {} for activation in ACTIVATIONS}
    for net in NETS:
        for activation, arms in train_net(setting, net, steps).items():
            chosen[activation] |= arms
        setting.advance(0.9 / len(NETS))
    measured = {
        activation: {arm: of_arm.measured for arm, of_arm in arms.items()}
        for activation, arms in chosen.items()
    }
    return Result(
        criteria=tuple(
            Criterion(name, "equal", exact(error), at_most=TOLERANCE)
            for name, error in errors.items()
            if name != NOT_EQUAL
        ),
        curves={"activations": measured},
        reported={f"{NOT_EQUAL}, difference": exact(errors[NOT_EQUAL]), **_reported(measured)},
        rates={
            f"{activation}, {arm}": of_arm.rate
            for activation, arms in chosen.items()
            for arm, of_arm in arms.items()
        },
    )


def _reported(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Interval]:
    shares = {"tanh": f"share beyond {SATURATED} (%)", "ReLU": "share of dead units (%)"}
    reported = {}
    for activation, arms in measured.items():
        for arm, values in arms.items():
            where = f"{activation}, {arm}"
            reported[f"{where}: {shares[activation]}"] = mean_interval(100 * values["share"])
            reported[f"{where}: test accuracy (%)"] = mean_interval(100 * values["accuracy"])
    return reported


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the shares of saturated and dead units, and accuracies, of each arm."""
    labels = {
        "share": {"tanh": f"values with |tanh| > {SATURATED} (%)", "ReLU": "dead ReLUs (%)"},
        "accuracy": dict.fromkeys(ACTIVATIONS, "test accuracy (%)"),
    }
    panels = iter(figure.subplots(1, 4, sharey=True))
    for key, of_activations in labels.items():
        for activation, label in of_activations.items():
            axes, arms = next(panels), curves["activations"][activation]
            for place, arm in enumerate(sorted(arms)):
                runs = 100 * np.asarray(arms[arm][key], float)
                points(axes, [place], [runs], horizontal=True)
            axes.set(xlabel=label, title=activation)
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
        "identities for random values in float64; MLP 64-64-64-64-10 of tanh or ReLU on digits, "
        "without a norm, with a norm before or after the activation, with scale and bias fixed or "
        "trained, each at its best of 3 rates"
    ),
    limits=(
        "A negative scale is a sign flip of the next layer only before an odd activation: before "
        "ReLU it is another function. Three layers on digits saturate little and train without "
        "step two too."
    ),
    run=run,
    draw=draw,
)
