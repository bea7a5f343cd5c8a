"""Claim 25: which part of batch norm does it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax._paths import format_path
from bn_jax.lab.experiments.figures import PERCENT, band, points
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import ScannedMLP
from bn_jax.lab.experiments.selection import RateSweep, choose, largest_rate
from bn_jax.lab.experiments.sweeps import (
    Trial,
    accuracy,
    draw_trials,
    init_model,
    sweep,
    train,
)
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    ChosenRate,
    Experiment,
    Identity,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
    Within,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTH, WIDTH, BATCH_SIZE = 8, 32, 64
EPSILON, MOMENTUM = 1e-5, 0.9
RATES = tuple(float(rate) for rate in np.geomspace(10**-1.5, 10, 11))
# A rate is stable if its training ends with a validation accuracy of at least a half.
STABLE, GOAL, EVERY = 0.5, 0.9, 10
# A step of the grid, either way.
NEAR = 10**-0.25, 10**0.25
TOLERANCE = 1e-9


class Part(NamedTuple):
    """What is there of a norm, as numbers, so that all parts are one program.

    Attributes:
        mean: whether the mean is subtracted.
        variance: whether its result, or else the input, is divided by the deviation.
        detached: whether gradients take mean and deviation as constants.
        scale: whether the scale is trained; the bias always is.
    """

    mean: Any
    variance: Any
    detached: Any
    scale: Any


PARTS: Mapping[str, Part] = {
    "no norm": Part(0, 0, 0, 0),
    "affine only": Part(0, 0, 0, 1),
    "mean only": Part(1, 0, 0, 1),
    "variance only": Part(0, 1, 0, 1),
    "detached": Part(1, 1, 1, 1),
    "batch norm": Part(1, 1, 0, 1),
}
ALONE = "mean only", "variance only"


def normalize(x: jax.Array, part: Part, mean: jax.Array, var: jax.Array) -> jax.Array:
    """Applies the chosen part of a norm, without scale and bias.

    Args:
        x: [n, features].
        part: what is there.
        mean: [features].
        var: [features].
    """
    mean, var = (
        jnp.where(part.detached, jax.lax.stop_gradient(moment), moment) for moment in (mean, var)
    )
    deviation = jnp.sqrt(jnp.where(part.variance, var + EPSILON, jnp.ones_like(var)))
    return (x - jnp.where(part.mean, mean, 0)[None]) / deviation[None]


class PartialNorm(nn.Module):
    """A part of batch norm, then scale and bias.

    Attributes:
        part: what is there.
        use_running_average: None: given in the call.
    """

    part: Part
    use_running_average: bool | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Normalizes [n, features]; `mask` must be None."""
        features = x.shape[-1:]
        averages = [
            self.variable("batch_stats", name, lambda value=value: jnp.full(features, value))
            for name, value in (("mean", 0.0), ("var", 1.0))
        ]
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        moments = [average.value for average in averages]
        if not use_running_average:
            moments = [x.mean(0), x.var(0)]
            if not self.is_initializing():
                for average, moment in zip(averages, moments, strict=True):
                    average.value = MOMENTUM * average.value + (1 - MOMENTUM) * moment
        return normalize(x, self.part, *moments) * scale[None] + bias[None]


def make_model(part: Part, num_classes: int) -> ScannedMLP:
    """Returns a deep network with a part of a norm in every layer."""

    def make_norm(**attributes: Any) -> PartialNorm:
        return PartialNorm(part, **attributes)

    return ScannedMLP(DEPTH, WIDTH, num_classes, make_norm)


def _scale_if(trained: Any) -> optax.GradientTransformation:
    """Sets the updates of scales to zero unless `trained` is true."""

    def update(path: Any, leaf: jax.Array) -> jax.Array:
        return jnp.where(trained, leaf, 0) if format_path(path).endswith("scale") else leaf

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(update, updates))


class Measured(NamedTuple):
    """What was measured of each training.

    Attributes:
        test: the accuracy on the test part.
        validation: that on the validation part at the start and after every `EVERY` steps.
    """

    test: Any
    validation: Any


def train_parts(setting: Setting) -> dict[str, RateSweep[Measured]]:
    """Trains a network with each part of a norm at every rate, in one compiled program.

    Args:
        setting: the seeds, and the size of the run.

    Returns:
        By the names of `PARTS`.
    """
    rates = RATES[::2] if setting.quick else RATES
    trials = draw_trials(setting, 50 if setting.quick else 200, BATCH_SIZE)

    def run(place: jax.Array, trial: Trial) -> Measured:
        rate, *flags = place
        part = Part(*(flag > 0 for flag in flags))
        model, digits = make_model(part, setting.num_classes), trial.digits
        trained = train(
            model,
            optax.chain(optax.sgd(rate), _scale_if(part.scale)),
            init_model(model, trial),
            digits.train,
            trial.batches,
            observe=lambda variables: accuracy(model, variables, digits.validation),
            every=EVERY,
        )
        return Measured(accuracy(model, trained.variables, digits.test), trained.observed)

    places = np.array([(rate, *part) for part in PARTS.values() for rate in rates])
    measured = jax.tree.map(
        lambda leaf: np.split(np.asarray(leaf, np.float64), len(PARTS)), sweep(run, places, trials)
    )
    return {
        name: RateSweep(np.asarray(rates), validation[..., -1], Measured(test, validation))
        for name, test, validation in zip(PARTS, *measured, strict=True)
    }


def largest_stable(swept: RateSweep[Any], stable: float = STABLE) -> Any:
    """Returns the largest rate that is stable, [seeds]; not-a-number where none is."""
    return largest_rate(swept.rates, swept.validation >= stable)


def steps_to_goal(validation: Any) -> Any:
    """Returns the steps until the goal is first reached, [...]; if it is not, all steps.

    Args:
        validation: accuracies at the start and after every `EVERY` steps, [..., points].
    """
    reached = np.asarray(validation) >= GOAL
    last = reached.shape[-1] - 1
    return EVERY * np.where(reached.any(-1), np.maximum(reached.argmax(-1), 1), last)


def fewest_steps(swept: RateSweep[Measured]) -> tuple[Any, ChosenRate]:
    """Returns the steps to the goal at the rate with the fewest, [seeds], and that rate.

    Between rates with as many steps, the one with the largest mean accuracy over training counts.
    """
    steps = steps_to_goal(swept.measured.validation)
    accuracies = np.asarray(swept.measured.validation).mean((1, 2))
    best = np.lexsort((-accuracies, np.log(steps).mean(1)))[0]
    chosen = choose(swept.rates, best, steps)
    return chosen.measured, chosen.rate


def bias_below(setting: Setting) -> dict[str, dict[str, Any]]:
    """Trains a bias below a subtraction of the mean, in float64.

    Args:
        setting: the seeds, and the size of the run.

    Returns:
        By the key of a sub-claim and by setting, errors, [seeds]: the change of the output by the
        bias, the gradient of the bias where it passes the mean, and where it does not, how far the
        bias after twice as many steps is from twice the bias.
    """
    steps, rate = 50, 0.1
    whole, detached = Part(1, 0, 0, 1), Part(1, 0, 1, 1)

    def of_seed(x: jax.Array, direction: jax.Array) -> Any:
        def output(bias: jax.Array, part: Part) -> jax.Array:
            inputs = x + bias[None]
            return normalize(inputs, part, inputs.mean(0), inputs.var(0))

        def gradient(bias: jax.Array, part: Part) -> jax.Array:
            return jax.grad(lambda bias: jnp.mean(output(bias, part) @ direction))(bias)

        def descend(bias: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            bias = bias - rate * gradient(bias, detached)
            return bias, bias

        start = jnp.zeros_like(direction)
        biases = jax.lax.scan(descend, start, length=2 * steps)[1]
        half, end = biases[steps - 1], biases[-1]
        return {
            "25a": {
                "output by the bias": jnp.abs(
                    output(end, detached) - output(start, detached)
                ).max(),
                "gradient of the bias": jnp.abs(gradient(end, whole)).max(),
            },
            "25b": jnp.abs(end - 2 * half).max() / jnp.abs(half).max(),
        }

    normal = [np.random.default_rng([11, int(seed)]).normal for seed in setting.chosen]
    with jax.enable_x64(True):
        x = np.stack([draw(size=(BATCH_SIZE, WIDTH)) for draw in normal])
        directions = np.stack([draw(size=WIDTH) for draw in normal])
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(of_seed))(x, directions))


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    errors = bias_below(setting)
    swept = train_parts(setting)
    setting.advance(1.0)
    level = setting.level(STABLE)
    largest = {name: largest_stable(of_part, level) for name, of_part in swept.items()}
    fewest = {name: fewest_steps(of_part) for name, of_part in swept.items()}
    none, whole = largest["no norm"], largest["batch norm"]
    # Below every rate of the grid is below the whole norm's, so that the smallest can stand for it.
    at_most = {
        name: np.where(np.isnan(rates), swept[name].rates[0], rates)
        for name, rates in largest.items()
    }
    of_whole = fewest["batch norm"][0]
    best = {name: of_part.best_for_each_seed() for name, of_part in swept.items()}
    return Result(
        values={
            **errors,
            "25c": largest["mean only"] / none,
            "25d": largest["variance only"] / none,
            "25e": largest["affine only"] / none,
            "25f": at_most["detached"] / whole,
            "25g": {name: at_most[name] / whole for name in ALONE},
            "25h": {
                name: fewest[name][0] / of_whole
                for name in PARTS
                if name not in ("no norm", "batch norm")
            },
        },
        curves={
            "rates": swept["batch norm"].rates,
            "accuracy": {name: 100 * of_part.measured.test for name, of_part in swept.items()},
            "largest": largest,
            "steps": {name: steps for name, (steps, _) in fewest.items()},
        },
        series=[
            *(Series("25c", name, "largest stable rate", rates) for name, rates in largest.items()),
            *(Series("25h", name, "steps", steps) for name, (steps, _) in fewest.items()),
            *(
                Series("25h", name, "test accuracy (%)", 100 * of_one.measured.test)
                for name, of_one in best.items()
            ),
        ],
        rates={name: rate for name, (_, rate) in fewest.items()},
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws accuracies by rate, and the largest stable rates and steps of each part."""
    by_rate, largest, steps = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    names = list(PARTS)
    for place, name in enumerate(names):
        color, values = f"C{place}", np.asarray(curves["accuracy"][name], float)
        band(by_rate, curves["rates"], values, name, within=PERCENT, color=color)
        for axes, key in ((largest, "largest"), (steps, "steps")):
            runs = [np.log10(np.asarray(curves[key][name], float))]
            points(axes, [place], runs, horizontal=True, color=color)
    by_rate.set(xscale="log", ylim=(-2, 102), xlabel="learning rate", ylabel="test accuracy (%)")
    by_rate.legend(fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    largest.set_yticks(range(len(names)), names)
    steps.set_yticks(range(len(names)), [""] * len(names))
    largest.set(xlabel="log10 of the largest stable rate")
    steps.set(xlabel=f"log10 of the steps to {100 * GOAL:g} %")
    for axes in (largest, steps):
        axes.invert_yaxis()


RATIO = "largest stable rate over that without a norm"
EXPERIMENT = Experiment(
    number=25,
    name="which_part",
    claim="Mean, variance and their gradients are all needed",
    source="Ioffe & Szegedy 2015, section 2; Salimans & Kingma 2016, section 3.2",
    sub_claims=(
        SubClaim(
            "25a",
            "the bias below",
            "a bias below a norm changes nothing, and has no gradient if it passes the mean",
            "change of the output by the bias, and gradient of the bias",
            Identity(TOLERANCE),
            Published("0", "V"),
        ),
        SubClaim(
            "25b",
            "detached, the bias grows",
            "if the mean is a constant to the gradient, that bias grows without bound, by as much "
            "in every step of the same loss",
            "relative distance of the bias after 100 steps from twice that after 50",
            Identity(TOLERANCE),
            Published("grows indefinitely, the loss remains fixed", "V"),
        ),
        SubClaim(
            "25c",
            "mean only",
            "subtracting the mean alone allows larger rates",
            RATIO,
            Above(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "25d",
            "variance only",
            "dividing by the deviation alone allows larger rates",
            RATIO,
            Above(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "25e",
            "affine only",
            "scale and bias alone change nothing about the largest stable rate",
            RATIO,
            Within(*NEAR),
            reason="ours: a step of the grid",
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "25f",
            "detached statistics",
            "with statistics that are constants to the gradient, the largest stable rate is "
            "smaller than with the whole norm",
            "largest stable rate over that of the whole norm",
            Below(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "25g",
            "no part alone",
            "neither mean nor variance alone allows rates as large as the whole norm does",
            "largest stable rate over that of the whole norm",
            Below(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "25h",
            "steps",
            "each at its best rate, every part needs more steps than the whole norm",
            f"steps to {100 * GOAL:g} % validation accuracy over those of the whole norm",
            Above(1.0),
            scale="ratio",
            is_resplit=True,
        ),
    ),
    protocol=(
        "MLP of 8 layers of 32 ReLU units on digits, in every layer mean, variance, both, both as "
        "constants to the gradient, or neither, then scale and bias; SGD for 200 steps at 11 rates "
        "from 0.03 to 10; a rate is stable if it ends with a validation accuracy of a half"
    ),
    limits=(
        "One depth, and rates a quarter of a decade apart: ratios are powers of 1.8. A part that "
        "does not arrive counts with all of its steps, and where no rate is stable, the smallest "
        "one stands for it in 25f and 25g: both can only hide a difference."
    ),
    run=run,
    draw=draw,
    easy="What gradients do below a mean that is a constant to them: it is algebra.",
    hard="What scale and bias alone do: their equivalence needs a fine grid of rates.",
    data=Needs(trained=BATCH_SIZE),
)
