"""Claim 18: what scale and bias, the second step of batch norm, are for."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax._core.batch_norm import batch_norm, identity_params
from bn_jax._core.running import init_batch_stats
from bn_jax._core.types import Params
from bn_jax._fold import absorb_scale, fold
from bn_jax.lab.experiments.expressive_power import (
    FITS,
    draw_inputs,
    fit,
    least_unexplained,
    target,
)
from bn_jax.lab.experiments.figures import PERCENT, points
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM, MLP, NO_EPSILON, Position
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.selection import Chosen, Outcome, accuracies, sweep_rates
from bn_jax.lab.experiments.statistics import relative_error
from bn_jax.lab.experiments.sweeps import Trial, draw_trials, take, train_trial
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    Experiment,
    Identity,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
)
from bn_jax.lab.models import Norm
from bn_jax.linen import BatchNorm
from bn_jax.optim import norm_params_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXAMPLES, FEATURES, OUTPUTS = 64, 16, 8
TOLERANCE = 1e-9
# A value of tanh is saturated where its derivative is below a tenth.
SATURATED = 0.95
# Chebyshev: the share of values of mean 0 and variance 1 whose tanh is beyond `SATURATED`.
MOST_SATURATED = 1 / math.atanh(SATURATED) ** 2
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {"tanh": nn.tanh, "ReLU": nn.relu}
NETS: Mapping[str, tuple[Norm | None, Position]] = {
    "no norm": (None, "before"),
    "norm before activation": (BATCH_NORM, "before"),
    "norm after activation": (BATCH_NORM, "after"),
}
TRAINED = "scale and bias trained"
WIDTHS = 64, 64, 64
RATES = 0.03, 0.1, 0.3, 1.0, 3.0
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


class Drawn(NamedTuple):
    """Random values in float64: a norm between two linear layers.

    Attributes:
        inputs: of the layer below, [examples, features].
        below: its kernel, [features, features].
        params: scale and bias, [features].
        above: the kernel of the layer above, [features, outputs].
    """

    inputs: Any
    below: Any
    params: Any
    above: Any


def draw_values(seed: int) -> Drawn:
    """Draws the values of the identities."""
    normal = np.random.default_rng([2, seed]).normal
    return Drawn(
        normal(1, 1, (EXAMPLES, FEATURES)),
        normal(size=(FEATURES, FEATURES)),
        {"scale": normal(size=FEATURES), "bias": normal(size=FEATURES)},
        normal(size=(FEATURES, OUTPUTS)),
    )


def algebra(drawn: Drawn) -> dict[str, dict[str, jax.Array]]:
    """Measures how much both sides of each identity differ.

    Args:
        drawn: the values.

    Returns:
        By the key of a sub-claim and by setting, the largest difference over the largest value; of
        the gradient, the largest size.
    """
    inputs, below, params, above = drawn
    weights = jnp.arange(1.0, FEATURES + 1)
    of_mean = jax.grad(lambda kernel: normalize(params, inputs @ kernel).mean(0) @ weights)(below)
    x, y = inputs @ below, normalize(params, inputs @ below)
    flipped, flipped_above = flip_signs(params, above)
    bare, absorbed_above = absorb_scale(params, above, activation=None)
    positive, scaled_above = absorb_scale(params, above, activation=nn.relu)

    def flipping(activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return relative_error(
            activation(normalize(flipped, x)) @ flipped_above, activation(y) @ above
        )

    return {
        "18b": {"": relative_error(normalize(identity_params(x, epsilon=NO_EPSILON), x), x)},
        "18c": {
            "mean of the output": relative_error(y.mean(0), params["bias"]),
            "gradient by the weights below": jnp.abs(of_mean).max(),
        },
        "18d": {"nothing after it": flipping(lambda z: z), "tanh after it": flipping(jnp.tanh)},
        "18e": {
            "": relative_error(
                normalize({}, x) @ absorbed_above + bare["bias"][None] @ absorbed_above, y @ above
            )
        },
        "18f": {
            "": relative_error(nn.relu(normalize(positive, x)) @ scaled_above, nn.relu(y) @ above)
        },
        "18n": {"": flipping(nn.relu)},
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


def folding_errors(setting: Setting) -> Any:
    """Folds a norm with random parameters and statistics into the dense layer after it.

    Args:
        setting: the seeds: of the inputs, and the first also of the variables.

    Returns:
        The largest difference of the outputs over the largest output, [seeds]; not-a-number if the
        norm is left.
    """
    norm = BatchNorm(use_running_average=True, dtype=jnp.float64, param_dtype=jnp.float64)
    dense = nn.Dense(OUTPUTS, dtype=jnp.float64, param_dtype=jnp.float64)
    model = nn.Sequential([norm, dense])
    generator = np.random.default_rng([6, setting.first_seed])
    inputs = [draw_values(int(seed)).inputs for seed in setting.chosen]
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(generator.uniform(0.5, 2, leaf.shape)),
        jax.eval_shape(model.init, jax.random.key(0), inputs[0]),
    )
    folded = fold(model.apply, variables, inputs[0])
    if any(norm.into is None for norm in folded.report):
        return np.full(setting.seeds, np.nan)
    outputs = [(folded.apply(folded.params, x), model.apply(variables, x)) for x in inputs]
    return np.array([relative_error(*map(np.asarray, of_both)) for of_both in outputs])


def example_error() -> float:
    """Returns the largest error of the worked example: its deviations, its mean and its values."""
    x, y = worked_example()
    differences = [
        x.std() - 1.25**0.5,
        y.mean() - 3.0,
        y.std() - 5**0.5,
        y - jnp.array([[0.0], [2.0], [4.0], [6.0]]),
    ]
    return max(float(jnp.abs(difference).max()) for difference in differences)


def identities(setting: Setting) -> dict[str, Any]:
    """Measures the errors of all identities, in float64.

    Args:
        setting: the seeds, and the size of the run.

    Returns:
        By the key of a sub-claim and by setting, the errors, [seeds].
    """
    with jax.enable_x64(True):
        drawn = [draw_values(int(seed)) for seed in setting.chosen]
        drawn = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
        errors = jax.tree.map(np.asarray, jax.jit(jax.vmap(algebra))(drawn))
        return {
            **errors,
            "18a": np.full(setting.seeds, example_error()),
            "18g": folding_errors(setting),
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
    arms = [net] if norm is None else [net, f"{net}, {TRAINED}"]
    shape = len(ACTIVATIONS), len(arms)

    def run(rate: jax.Array, trial: Trial) -> Outcome[dict[str, jax.Array]]:
        def of_arm(place: jax.Array) -> Outcome[dict[str, jax.Array]]:
            # The activation is chosen by data, so that both are one program.
            activation, step_two = place
            activate = partial(_activate, activation)
            model = MLP(WIDTHS, setting.num_classes, norm, activate, position)
            optimizer = optax.sgd(rate)
            if norm is not None:
                optimizer = optax.chain(optimizer, norms_if(step_two))
            trained = train_trial(model, optimizer, trial)
            outcome = accuracies(model, trained, trial.digits)
            # Normalized by the statistics of these examples, the bounds of theory are exact.
            mutable = ["intermediates", "batch_stats"]
            _, sown = model.apply(trained, trial.digits.train.x, train=True, mutable=mutable)
            inputs = jnp.stack(sown["intermediates"]["preactivation"])
            shares = jnp.stack([useless_share(name, inputs) for name in ACTIVATIONS])
            measured = {"accuracy": outcome.measured, "share": shares[activation]}
            return Outcome(outcome.validation, measured)

        outcomes = map_runs(of_arm, np.indices(shape, np.int32).reshape(2, -1).T)
        return jax.tree.map(lambda leaf: leaf.reshape(shape), outcomes)

    trials = draw_trials(setting, steps, BATCH_SIZE)
    chosen = sweep_rates(run, RATES, trials).best_for_each_seed()
    return {
        activation: {arm: take(chosen, slice(None), row, column) for column, arm in enumerate(arms)}
        for row, activation in enumerate(ACTIVATIONS)
    }


def _activate(which: jax.Array, x: jax.Array) -> jax.Array:
    """Applies the activation whose place in `ACTIVATIONS` is `which`."""
    tanh, relu = (activate(x) for activate in ACTIVATIONS.values())
    return jnp.where(which == 0, tanh, relu)


def norms_if(step_two: jax.Array) -> optax.GradientTransformation:
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
    fits = {arm: fit(setting, arm) for arm in FITS}
    floor = np.array([least_unexplained(x[:, 0]) for x in draw_inputs(setting)])
    setting.advance(0.2)
    steps = 50 if setting.quick else 300
    chosen: dict[str, dict[str, Chosen[Any]]] = {activation: {} for activation in ACTIVATIONS}
    for net in NETS:
        for activation, arms in train_net(setting, net, steps).items():
            chosen[activation] |= arms
        setting.advance(0.7 / len(NETS))
    shares = {
        activation: {arm: 100 * of_arm.measured["share"] for arm, of_arm in arms.items()}
        for activation, arms in chosen.items()
    }
    return Result(
        values={
            **errors,
            **_compare_shares(shares),
            "18i": 100 * (fits["with scale and bias"].unexplained - floor),
        },
        curves={
            "share": shares,
            "accuracy": {
                activation: {arm: 100 * of_arm.measured["accuracy"] for arm, of_arm in arms.items()}
                for activation, arms in chosen.items()
            },
            "x": draw_inputs(setting)[0, :, 0],
            "predicted": {arm: of_arm.predicted for arm, of_arm in fits.items()},
        },
        series=[
            *(
                Series("18h" if activation == "tanh" else "18m", arm, activation, values)
                for activation, arms in shares.items()
                for arm, values in arms.items()
            ),
            *(Series("18i", arm, "", 100 * of_arm.unexplained) for arm, of_arm in fits.items()),
            Series("18i", "least possible, normalized only", "", 100 * floor),
        ],
        rates={
            f"{activation}, {arm}": of_arm.rate
            for activation, arms in chosen.items()
            for arm, of_arm in arms.items()
        }
        | {f"one input, {arm}": of_arm.rate for arm, of_arm in fits.items()},
    )


def _compare_shares(shares: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compares the shares of saturated values and dead units, in percent."""
    tanh, fixed = shares["tanh"], "scale and bias fixed"
    before = {fixed: tanh["norm before activation"]}
    before[TRAINED] = tanh[f"norm before activation, {TRAINED}"]
    after = {fixed: tanh["norm after activation"]}
    after[TRAINED] = tanh[f"norm after activation, {TRAINED}"]
    return {
        "18h": {step_two: values - tanh["no norm"] for step_two, values in before.items()},
        "18j": {step_two: after[step_two] - before[step_two] for step_two in before},
        "18k": before[TRAINED] - before[fixed],
        "18l": before[fixed],
        "18m": shares["ReLU"]["norm before activation"],
    }


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the shares of saturated and dead units, accuracies, and the fitted function."""
    arms = sorted(curves["share"]["ReLU"], reverse=True)
    labels = {"tanh": f"|tanh| > {SATURATED} (%)", "ReLU": "dead ReLUs (%)"}
    saturated, dead, accurate, fitted = figure.subplots(1, 4, width_ratios=(3, 3, 3, 4))
    for axes, activation in ((saturated, "tanh"), (dead, "ReLU")):
        _draw_arms(axes, arms, curves["share"][activation], activation)
        axes.set(xlabel=labels[activation], xlim=(-1, None))
    saturated.axvline(100 * MOST_SATURATED, color="gray", linestyle=":", zorder=5)
    for activation in ACTIVATIONS:
        _draw_arms(accurate, arms, curves["accuracy"][activation], activation)
    accurate.set(xlabel="test accuracy (%)", xlim=(None, PERCENT[1]))
    accurate.legend(fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    saturated.set_yticks(range(len(arms)), [arm.replace(", ", ",\n") for arm in arms])
    for axes in (dead, accurate):
        axes.set_yticks(range(len(arms)), [""] * len(arms))
    x = np.asarray(curves["x"], float)
    for arm, predicted in curves["predicted"].items():
        fitted.plot(x, predicted, label=arm)
    fitted.plot(x, target(x), color="black", linestyle=":", label="target", zorder=5)
    fitted.set(xlabel="input", ylabel="output")
    fitted.legend(fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def _draw_arms(axes: "Axes", arms: Any, values: Mapping[str, Any], activation: str) -> None:
    runs = [np.asarray(values[arm], float) for arm in arms]
    color = f"C{list(ACTIVATIONS).index(activation)}"
    points(axes, range(len(arms)), runs, activation, horizontal=True, color=color)


EXPERIMENT = Experiment(
    number=18,
    name="step_two",
    claim="Scale and bias give back every function, and set mean and deviation by themselves",
    source=(
        "Goodfellow, Bengio & Courville 2016, section 8.7.1; Ioffe & Szegedy 2015; Batch "
        "Normalization and Bounded Activation Functions, 2023"
    ),
    sub_claims=(
        SubClaim(
            "18a",
            "the worked example",
            "with scale 2 and bias 3, [-1.5, -0.5, 0.5, 1.5], whose deviation is 1.118, becomes "
            "[0, 2, 4, 6], of mean 3 and deviation 2.236",
            "largest error of these figures",
            Identity(TOLERANCE),
            Published("mean 3, deviation 2.236", "D"),
        ),
        SubClaim(
            "18b",
            "the identity",
            "scale = sqrt(var + epsilon) and bias = mean give the input back",
            "relative error of the output",
            Identity(TOLERANCE),
            Published("scale = sqrt(var), bias = mean", "V"),
        ),
        SubClaim(
            "18c",
            "the bias sets the mean",
            "the mean of the output is the bias, whatever the layers below do",
            "relative error of the mean, and its gradient by the weights below",
            Identity(TOLERANCE),
            Published("the mean is beta alone", "R"),
        ),
        SubClaim(
            "18d",
            "sign of the scale, odd",
            "before an odd activation, a negative scale is a sign of the next layer's weights",
            "relative error of the next layer's output",
            Identity(TOLERANCE),
            Published("f(-z) = -f(z)", "D"),
        ),
        SubClaim(
            "18e",
            "before a linear layer",
            "without an activation, scale and bias are redundant before a linear layer",
            "relative error of the linear layer's output",
            Identity(TOLERANCE),
            Published("(g z + b) W = z (g W) + b W", "D"),
        ),
        SubClaim(
            "18f",
            "size of the scale, ReLU",
            "before ReLU, the size of the scale is redundant",
            "relative error of the next layer's output",
            Identity(TOLERANCE),
            Published("relu(g z) = g relu(z), g > 0", "D"),
        ),
        SubClaim(
            "18g",
            "folding",
            "in evaluation, a norm goes into the linear layer after it",
            "relative error of the folded layer's output",
            Identity(TOLERANCE),
            Published("y = a x + b", "D"),
        ),
        SubClaim(
            "18h",
            "saturation, norm before",
            "a norm before tanh keeps values out of saturation",
            f"share of values beyond {SATURATED}, norm before the activation minus no norm "
            "(points)",
            Below(0.0),
            is_resplit=True,
        ),
        SubClaim(
            "18i",
            "expressive power",
            "with scale and bias, a normalized layer fits a function that it cannot fit without",
            "share of the variance of sin(2 x) that is left, with scale and bias minus the least "
            "possible without (points)",
            Below(0.0),
            Published("without: a relu(z) + b relu(-z) + c", "D"),
        ),
        SubClaim(
            "18j",
            "saturation, norm after",
            "after the activation, a norm does not do so: more values are saturated",
            f"share of values beyond {SATURATED}, norm after minus before (points)",
            Above(0.0),
            Published("extreme saturation before a norm", "V"),
            is_resplit=True,
        ),
        SubClaim(
            "18k",
            "out of the linear regime",
            "trained scale and bias take values back into saturation",
            f"share of values beyond {SATURATED}, scale and bias trained minus fixed (points)",
            Above(0.0),
            is_resplit=True,
        ),
        SubClaim(
            "18l",
            "at most 1/z^2 saturated",
            "without step two, Chebyshev's inequality bounds the share of saturated values",
            f"share of values beyond {SATURATED}, scale and bias fixed (%)",
            Below(100 * MOST_SATURATED),
            Published(f"{100 * MOST_SATURATED:.1f} %", "D"),
            is_resplit=True,
        ),
        SubClaim(
            "18m",
            "no dead ReLU",
            "without step two, no ReLU after a norm is off for all examples",
            "share of units that no example activates (%)",
            Identity(TOLERANCE),
            Published("0", "D"),
        ),
        SubClaim(
            "18n",
            "sign of the scale, ReLU",
            "before ReLU, which is not odd, a negative scale is another function",
            "relative difference of the next layer's output",
            Above(0.01),
            reason="ours: more than rounding, in every precision",
        ),
    ),
    protocol=(
        "identities for random values in float64; one hidden layer of 64 ReLUs on one input fits "
        "sin(2 x), by Adam; MLP 64-64-64-64-10 of tanh or ReLU on digits, without a norm, with a "
        "norm before or after the activation, with scale and bias fixed or trained, each at its "
        "best of 5 rates, that of the fit by its own error"
    ),
    limits=(
        "Three layers on digits saturate little and train without step two too. With several "
        "inputs a normalized layer has more functions than with one, and no closed form."
    ),
    run=run,
    draw=draw,
    easy="The algebra, and the function of one input that only step two can fit.",
    hard="Saturation is a matter of rates and depth: the shares are those of one small network.",
    data=Needs(trained=BATCH_SIZE),
)
