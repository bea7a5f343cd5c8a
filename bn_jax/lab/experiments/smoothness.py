"""Claim 10: batch norm smooths the loss, and does not reduce the internal covariate shift."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax._core.types import Params
from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import WITH_AND_WITHOUT, ScannedMLP, normalize_batch
from bn_jax.lab.experiments.selection import Chosen, Outcome, accuracies, sweep_rates
from bn_jax.lab.experiments.statistics import mean_interval, ratio_interval
from bn_jax.lab.experiments.sweeps import (
    Part,
    Trial,
    cross_entropy,
    draw_trials,
    init_model,
    take,
)
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
    Within,
)
from bn_jax.lab.models import Norm
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTH, WIDTH, BATCH_SIZE = 8, 32, 64
RATES = 0.01, 0.03, 0.1, 0.3, 1.0, 3.0
# The noise: the bounds of the means and deviations, drawn for each feature at every step, and half
# the width of what is drawn for each example and added to them.
LARGEST_MEAN, LARGEST_DEVIATION, SPREAD = 0.5, 1.5, 0.5
# How far to look ahead along the gradient, in steps of the learning rate.
AHEAD = 0.5, 1.0, 2.0, 4.0
TOLERANCE = 1e-10
SAME_COSINE = 0.1
NOISY = "batch norm and noise"


class NoisyBatchNorm(BatchNorm):
    """A batch norm followed by noise that shifts and stretches each feature.

    As in Santurkar et al. 2018, appendix A: every step draws a mean and a deviation for each
    feature, and around them a mean and a deviation for every example.
    """

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """Normalizes `x`, and adds noise where there is a random stream "noise"."""
        y = super().__call__(x, *args, **options)
        if not self.has_rng("noise"):
            return y
        keys = jax.random.split(self.make_rng("noise"), 4)
        draw = partial(jax.random.uniform, dtype=y.dtype, minval=-1, maxval=1)
        of_step = 1, y.shape[-1]
        mean, deviation = draw(keys[0], of_step), draw(keys[1], of_step)
        each_mean, each_deviation = draw(keys[2], y.shape), draw(keys[3], y.shape)
        factor = 1 + (LARGEST_DEVIATION - 1) * (1 + deviation) / 2 + SPREAD * each_deviation
        return y * factor + LARGEST_MEAN * mean + SPREAD * each_mean


NORMS: Mapping[str, Norm | None] = {
    **WITH_AND_WITHOUT,
    NOISY: partial(NoisyBatchNorm, momentum=0.9),
}


class SquaredGradients(NamedTuple):
    """Squared gradients before a batch norm, for each feature; `g` is the gradient after it.

    Attributes:
        measured: ``|grad_x|^2``.
        formula: ``scale^2 / s^2 (|g|^2 - <1, g>^2 / m - <g, x^>^2 / m)``.
        first_term: of the formula, ``scale^2 / s^2 |g|^2``.
    """

    measured: Any
    formula: Any
    first_term: Any


def squared_gradients(seed: jax.Array) -> SquaredGradients:
    """Compares the gradients before and after a batch norm, for random values.

    Args:
        seed: the seed of the values.
    """
    keys = jax.random.split(jax.random.key(seed), 5)
    normal = partial(jax.random.normal, dtype=float)
    x = 3 * normal(keys[0], (BATCH_SIZE, WIDTH)) * jnp.exp(normal(keys[1], (1, WIDTH))) + 5
    params: Params = {"scale": normal(keys[2], (WIDTH,)), "bias": normal(keys[3], (WIDTH,))}
    pull = normal(keys[4], (WIDTH,))

    def loss(y: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(y @ pull) ** 2 + jnp.sum(jnp.cos(y) + y, -1))

    normalized = normalize_batch(x)
    of_y = jax.grad(loss)(normalize_batch(x, params))
    of_x = jax.grad(lambda x: loss(normalize_batch(x, params)))(x)
    factor = params["scale"] ** 2 / x.var(0)
    bracket = (
        (of_y**2).sum(0)
        - of_y.sum(0) ** 2 / BATCH_SIZE
        - (of_y * normalized).sum(0) ** 2 / BATCH_SIZE
    )
    return SquaredGradients((of_x**2).sum(0), factor * bracket, factor * (of_y**2).sum(0))


class FormulaCheck(NamedTuple):
    """A check of the formula for the squared gradient.

    Attributes:
        error: the largest relative error of the formula over features, [seeds].
        share: the share of the formula's first term that its other two terms leave, the mean over
            features, [seeds].
    """

    error: Any
    share: Any


def check_formula(setting: Setting) -> FormulaCheck:
    """Checks the formula for the squared gradient in float64.

    Args:
        setting: the seeds, and the size of the run.
    """
    with jax.enable_x64(True):
        values = jax.tree.map(np.asarray, jax.jit(jax.vmap(squared_gradients))(setting.chosen))
    errors = np.abs(values.measured - values.formula) / values.formula
    return FormulaCheck(errors.max(1), (values.measured / values.first_term).mean(1))


class Measured(NamedTuple):
    """What was measured of a training.

    Attributes:
        accuracy: the accuracy on the test part.
        shift: the covariate shift at each measurement.
        smoothness: the smoothness at each measurement.
    """

    accuracy: Any
    shift: "Shift"
    smoothness: "Smoothness"


def measure(setting: Setting, norm: Norm | None, steps: int, every: int) -> Chosen[Measured]:
    """Trains at every rate and measures along the way.

    Args:
        setting: the seeds, and the size of the run.
        norm: the norm of the network.
        steps: the number of steps of each training.
        every: the number of steps between two measurements; divides `steps`.

    Returns:
        The measurements at the best rate of each seed, [seeds, ...].
    """
    model = ScannedMLP(DEPTH, WIDTH, setting.num_classes, norm)

    def run(rate: jax.Array, trial: Trial) -> Outcome[Measured]:
        follow = Follow(model, rate, jax.random.key(trial.seed), trial.digits.train)
        # The last batch of every stretch is measured.
        stretches = Stretch(
            jnp.arange(steps).reshape(-1, every),
            jnp.asarray(trial.batches).reshape(-1, every, BATCH_SIZE),
        )
        variables = init_model(model, trial)
        trained, (shift, smooth) = jax.lax.scan(follow.take_stretch, variables, stretches)
        outcome = accuracies(model, trained, trial.digits)
        return Outcome(outcome.validation, Measured(outcome.measured, shift, smooth))

    trials = draw_trials(setting, steps, BATCH_SIZE)
    return sweep_rates(run, RATES, trials).best_for_each_seed()


class Stretch(NamedTuple):
    """Steps: their numbers [steps], and the indices of their batches [steps, n]."""

    numbers: jax.Array
    batches: jax.Array


class Follow(NamedTuple):
    """A training by gradient descent that is measured along the way.

    Attributes:
        model: the network.
        rate: the learning rate.
        key: the key of the noise.
        part: the examples.
    """

    model: ScannedMLP
    rate: jax.Array
    key: jax.Array
    part: Part

    def gradient_at(self, number: jax.Array, batch: jax.Array, stats: Any) -> Callable[[Any], Any]:
        """Returns the gradient of a step's loss, with the new batch_stats beside it.

        Args:
            number: the number of the step, which sets the noise.
            batch: indices of examples.
            stats: all variables but the parameters.
        """
        x, y = jnp.asarray(self.part.x)[batch], jnp.asarray(self.part.y)[batch]
        rngs = {"noise": jax.random.fold_in(self.key, number)}

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, **stats}
            logits, updated = self.model.apply(
                variables, x, train=True, mutable=["batch_stats"], rngs=rngs
            )
            return cross_entropy(logits, y), dict(updated)

        return jax.grad(loss, has_aux=True)

    def take_stretch(self, variables: Any, stretch: Stretch) -> tuple[Any, Any]:
        """Takes the steps of a stretch, and measures at the last of them."""

        def step(carry: Any, at: Stretch) -> tuple[Any, None]:
            variables, _ = carry
            gradient = self.gradient_at(at.numbers, at.batches, _without_params(variables))
            gradients, updated = gradient(variables["params"])
            params = jax.tree.map(lambda w, g: w - self.rate * g, variables["params"], gradients)
            return ({"params": params, **updated}, variables), None

        (after, before), _ = jax.lax.scan(step, (variables, variables), stretch)
        gradient = self.gradient_at(
            stretch.numbers[-1], stretch.batches[-1], _without_params(before)
        )
        mixed = mix_layers(before["params"], after["params"])
        ahead = go_ahead(before["params"], after["params"])
        # All points are one call, so that there is one gradient to compile.
        points = jax.tree.map(lambda *parts: jnp.concatenate(parts), mixed, ahead)
        gradients, _ = jax.vmap(gradient)(points)
        of_mixed = take(gradients, slice(DEPTH - 1))
        of_ahead = take(gradients, slice(DEPTH - 1, None))
        here = take(of_ahead, 0)
        shift = covariate_shift(_kernels(here), _kernels(of_mixed))
        return after, (shift, smoothness(of_ahead, self.rate))


def _without_params(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in variables.items() if name != "params"}


def mix_layers(before: Any, after: Any) -> Any:
    """Updates only the layers before each layer.

    Args:
        before: the parameters before an update.
        after: the parameters after it.

    Returns:
        For the second, third ... hidden layer, the parameters with the layers before it from
        `after`, [layers - 1, ...].
    """

    def moved(layer: jax.Array) -> Any:
        def mix(old: jax.Array, new: jax.Array) -> jax.Array:
            earlier = jnp.arange(DEPTH - 1) < layer
            return jnp.where(earlier.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        hidden = jax.tree.map(mix, before["hidden"], after["hidden"])
        return {**before, "first": after["first"], "hidden": hidden}

    return jax.vmap(moved)(jnp.arange(DEPTH - 1))


def go_ahead(before: Any, after: Any) -> Any:
    """Moves from `before` towards `after` by 0 and by each of `AHEAD`, [1 + points, ...]."""
    multiples = jnp.array((0.0, *AHEAD))
    return jax.vmap(
        lambda far: jax.tree.map(lambda old, new: old + far * (new - old), before, after)
    )(multiples)


class Shift(NamedTuple):
    """How a layer's gradients before and after the earlier layers' update differ, [layers - 1].

    Attributes:
        distance: the distance of the two gradients, over the length of the first.
        cosine: the cosine of the angle between them.
    """

    distance: jax.Array
    cosine: jax.Array


def covariate_shift(before: jax.Array, after: jax.Array) -> Shift:
    """Measures how far each layer's gradient moves when the layers before it have been updated.

    Args:
        before: the gradients of the hidden layers' kernels but the first, [layers - 1, ...].
        after: for each of these layers, the gradients of all of them where the layers before it
            have been updated, [layers - 1, layers - 1, ...].

    Returns:
        The differences of the gradients before and after.
    """
    places = jnp.arange(len(before))
    after = after[places, places]
    length, length_after = (jnp.sqrt(jnp.sum(g**2, (1, 2))) for g in (before, after))
    distance = jnp.sqrt(jnp.sum((before - after) ** 2, (1, 2)))
    product = jnp.sum(before * after, (1, 2))
    return Shift(distance / length, product / (length * length_after))


def _kernels(gradients: Any) -> jax.Array:
    """Returns the kernels of the hidden layers but the first, [..., layers - 1, width, width]."""
    kernels: jax.Array = gradients["hidden"]["dense"]["kernel"]
    return kernels


class Smoothness(NamedTuple):
    """How much the gradient changes along itself, at distances ``d`` in `AHEAD` steps of the rate.

    Attributes:
        change: ``max |g(w - d g) - g(w)| / |g(w)|``.
        curvature: ``max |g(w - d g) - g(w)| / (d |g(w)|)``, a lower bound of the curvature.
    """

    change: Any
    curvature: Any


def smoothness(gradients: Any, rate: Any) -> Smoothness:
    """Measures how much the gradient changes along itself.

    Args:
        gradients: here, and at `AHEAD` steps of the rate against the gradient, [1 + points, ...].
        rate: the learning rate.
    """
    here = take(gradients, 0)
    there = take(gradients, slice(1, None))
    differences = jax.vmap(lambda far: _length(jax.tree.map(jnp.subtract, far, here)))(there)
    changes = differences / _length(here)
    return Smoothness(changes.max(), (changes / (rate * jnp.array(AHEAD))).max())


def _length(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    identity = check_formula(setting)
    setting.advance(0.1)
    steps, every = (60, 20) if setting.quick else (400, 20)
    chosen = {}
    for arm, norm in NORMS.items():
        chosen[arm] = measure(setting, norm, steps, every)
        setting.advance(0.3)
    measured = {arm: of_arm.measured for arm, of_arm in chosen.items()}
    # Over training, in [seeds].
    medians = {
        arm: jax.tree.map(lambda runs: np.median(runs, 1), values.smoothness)
        for arm, values in measured.items()
    }
    cosines = {arm: values.shift.cosine.mean((1, 2)) for arm, values in measured.items()}
    tested = {arm: values.accuracy for arm, values in measured.items()}
    plain = medians["no norm"]
    return Result(
        values={
            "10a": identity.error,
            "10b": {
                "curvature": medians["batch norm"].curvature / plain.curvature,
                "change of the gradient": medians["batch norm"].change / plain.change,
            },
            "10c": cosines["batch norm"] - cosines["no norm"],
            "10d": 100 * (tested[NOISY] - tested["no norm"]),
        },
        curves={
            "steps": np.arange(every, steps + 1, every),
            "cosine": {arm: values.shift.cosine.mean(-1).T for arm, values in measured.items()},
            "distance": {arm: values.shift.distance.mean(-1).T for arm, values in measured.items()},
            "curvature": {arm: values.smoothness.curvature.T for arm, values in measured.items()},
        },
        series=[
            Series(key, arm, name, values)
            for key, name, of_arms in (
                ("10b", "curvature", {arm: of_arm.curvature for arm, of_arm in medians.items()}),
                ("10c", "cosine", cosines),
                ("10d", "test accuracy", tested),
            )
            for arm, values in of_arms.items()
        ],
        reported={
            "share of the squared gradient that passes, random values": mean_interval(
                identity.share
            ),
            "curvature along the gradient, with noise, over no norm": ratio_interval(
                medians[NOISY].curvature / plain.curvature
            ),
        },
        rates={arm: of_arm.rate for arm, of_arm in chosen.items()},
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws both measures of covariate shift, and curvature, over training."""
    labels = {
        "cosine": "cosine of a layer's gradients before\nand after the earlier layers' update",
        "distance": "their distance over the first's length",
        "curvature": "curvature along the gradient",
    }
    for axes, (key, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for arm, values in curves[key].items():
            band(axes, curves["steps"], values, arm)
        axes.set(xlabel="step", ylabel=label, yscale="linear" if key == "cosine" else "log")
    figure.axes[0].legend(fontsize="small")


EXPERIMENT = Experiment(
    number=10,
    name="smoothness",
    claim="Batch norm smooths the loss, and does not reduce the internal covariate shift",
    source="Santurkar et al. 2018",
    sub_claims=(
        SubClaim(
            "10a",
            "gradient before a norm",
            "batch norm takes the mean and its output's direction out of the gradient, and "
            "multiplies it by scale over deviation",
            "|grad_x|^2 against scale^2/s^2 (|g|^2 - <1,g>^2/m - <g,x^>^2/m), relative error",
            Identity(TOLERANCE),
            Published("at most that", "V"),
        ),
        SubClaim(
            "10b",
            "smoother loss",
            "along the gradient, the gradient changes less with batch norm",
            "curvature along the gradient, and the gradient's relative change within "
            f"{max(AHEAD):g} steps, with over without batch norm, medians over training",
            Below(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "10c",
            "covariate shift the same",
            "batch norm does not reduce how much the update of earlier layers turns a gradient",
            "cosine of a layer's gradients before and after that update, with minus without",
            Within(-SAME_COSINE, SAME_COSINE),
            Published("no less covariate shift", "V"),
            f"ours: a cosine of {SAME_COSINE:g}",
            is_resplit=True,
        ),
        SubClaim(
            "10d",
            "noisy norm beats no norm",
            "with noise after it that shifts features, batch norm still trains better than none",
            "test accuracy, with noisy batch norm minus without a norm (points)",
            Above(0.0),
            Published("noisy batch norm trains about as well as batch norm", "V"),
            is_resplit=True,
        ),
    ),
    protocol=(
        "formula on random values in float64 without epsilon; MLP of 8 layers of 32 ReLU units on "
        "digits, with batch norm, without, and with noise after it, each at its best of 6 rates; "
        "covariate shift: a layer's gradient before and after the earlier layers' update"
    ),
    limits=(
        "The formula is about one batch norm and the gradient that comes to it, not about the same "
        "network without one. Covariate shift and curvature are measured along each arm's own "
        "training at its own rate, as in the source. Eight layers train without a norm too."
    ),
    run=run,
    draw=draw,
    easy="The formula, and that the gradient changes several times less.",
    hard="Covariate shift differs much between seeds; noise costs more here than batch norm gains.",
    data=Needs(trained=BATCH_SIZE),
)
