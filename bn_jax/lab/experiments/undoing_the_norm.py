"""Claim 21: scale and bias can learn to undo the norm, and do not."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bn_jax as bn
from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM, MLP
from bn_jax.lab.experiments.selection import Chosen, Outcome, accuracies, sweep_rates
from bn_jax.lab.experiments.sweeps import (
    MakeOptimizer,
    Part,
    Trial,
    draw_trials,
    init_model,
    train,
)
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    Experiment,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS, BATCH_SIZE = (64, 64, 64), 64
EVERY = 20
# The optimizers, and their rates.
OPTIMIZERS: Mapping[str, tuple[MakeOptimizer, tuple[float, ...]]] = {
    "SGD": (optax.sgd, (0.1, 0.3, 1.0, 3.0, 10.0)),
    "Adam": (optax.adam, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
}
# A norm whose scale and bias are trained to give the input back.
EXAMPLES, FEATURES, FIT_STEPS, FIT_RATE = 256, 32, 200, 0.1
# Undone: the norm changes its input by less than this share of the input's deviation.
UNDONE = 0.05
# What is left of the distance where most of it is gone, and a correlation of some size.
HALF = 0.5


class Undoing(NamedTuple):
    """How far scale and bias are from undoing their norm.

    Attributes:
        distance: see `distance`.
        scales: the correlation of the scale with the deviation of the norm's input, over features.
        biases: the correlation of the bias with the mean of the norm's input, over features.
    """

    distance: Any
    scales: Any
    biases: Any


def distance(params: Any, x: jax.Array) -> jax.Array:
    """Returns how far a norm is from the identity.

    That is the root mean square over features of ``y - x``, in deviations of `x`. For one feature
    its square is ``(scale / s - 1)^2 + ((bias - m) / s)^2``, with mean `m` and deviation `s`.

    Args:
        params: scale and bias, [features].
        x: the input of the norm, [n, features].
    """
    mean, deviation = x.mean(0), x.std(0)
    of_scale = params["scale"] / deviation - 1
    of_bias = (params["bias"] - mean) / deviation
    return jnp.sqrt(jnp.mean(of_scale**2 + of_bias**2))


def measure(params: Any, x: jax.Array) -> Undoing:
    """Measures how far the parameters of a norm are from undoing it."""
    return Undoing(
        distance(params, x),
        correlation(params["scale"], x.std(0)),
        correlation(params["bias"], x.mean(0)),
    )


def correlation(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the correlation of two vectors; not-a-number if one is constant."""
    a, b = a - a.mean(), b - b.mean()
    return jnp.sum(a * b) / jnp.sqrt(jnp.sum(a**2) * jnp.sum(b**2))


def train_to_undo(setting: Setting) -> Any:
    """Trains scale and bias of one norm to give its input back, by gradient descent.

    Args:
        setting: the seeds, and the size of the run.

    Returns:
        The `distance` at the end, [seeds].
    """
    generators = [np.random.default_rng([10, int(seed)]) for seed in setting.chosen]
    inputs = np.stack(
        [
            generator.uniform(-2, 2, FEATURES)
            + generator.uniform(0.5, 3, FEATURES) * generator.normal(size=(EXAMPLES, FEATURES))
            for generator in generators
        ]
    ).astype(np.float32)

    def of_seed(x: jax.Array) -> jax.Array:
        batch_stats = bn.init_batch_stats(FEATURES)

        def loss(params: Any) -> jax.Array:
            y, _ = bn.batch_norm(params, batch_stats, x, use_running_average=False)
            return jnp.mean(jnp.sum((y - x) ** 2, -1))

        def step(params: Any, _: None) -> tuple[Any, None]:
            gradients = jax.grad(loss)(params)
            return jax.tree.map(lambda p, g: p - FIT_RATE * g, params, gradients), None

        params, _ = jax.lax.scan(step, bn.init_params(FEATURES), length=FIT_STEPS)
        return distance(params, x)

    return np.asarray(jax.jit(jax.vmap(of_seed))(inputs))


def train_net(setting: Setting, optimizer: str) -> Chosen[Undoing]:
    """Trains a classifier with norms, and follows their scale and bias.

    Args:
        setting: the seeds, and the size of the run.
        optimizer: a name in `OPTIMIZERS`.

    Returns:
        At the best rate of each seed, at the start and after every `EVERY` steps, [seeds, points,
        layers].
    """
    make_optimizer, rates = OPTIMIZERS[optimizer]
    model = MLP(WIDTHS, setting.num_classes, norm=BATCH_NORM)

    def observe(part: Part, variables: Any) -> Undoing:
        _, sown = model.apply(
            variables,
            part.x,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, nn.Dense),
        )
        of_layers = [
            measure(
                variables["params"][f"norm{layer}"],
                sown["intermediates"][f"dense{layer}"]["__call__"][0],
            )
            for layer in range(len(WIDTHS))
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_layers)

    def run(rate: jax.Array, trial: Trial) -> Outcome[Undoing]:
        digits = trial.digits
        trained = train(
            model,
            make_optimizer(rate),
            init_model(model, trial),
            digits.train,
            trial.batches,
            observe=partial(observe, digits.train),
            every=EVERY,
        )
        return Outcome(accuracies(model, trained.variables, digits).validation, trained.observed)

    trials = draw_trials(setting, 60 if setting.quick else 400, BATCH_SIZE)
    return sweep_rates(run, rates[::2] if setting.quick else rates, trials).best_for_each_seed()


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    undone = train_to_undo(setting)
    setting.advance(0.1)
    chosen: dict[str, Chosen[Undoing]] = {}
    for optimizer in OPTIMIZERS:
        chosen[optimizer] = train_net(setting, optimizer)
        setting.advance(0.45)
    followed = {optimizer: of_one.measured for optimizer, of_one in chosen.items()}
    return Result(
        values={
            "21a": undone,
            "21b": {
                optimizer: np.exp(
                    np.mean(np.log(of_one.distance[:, -1] / of_one.distance[:, 0]), -1)
                )
                for optimizer, of_one in followed.items()
            },
            "21c": {name: of_one.scales[:, -1].mean(-1) for name, of_one in followed.items()},
            "21d": {name: of_one.biases[:, -1].mean(-1) for name, of_one in followed.items()},
        },
        curves={
            name: {
                "distance": of_one.distance.mean(-1).T,
                "scales": of_one.scales.mean(-1).T[1:],
                "biases": of_one.biases.mean(-1).T[1:],
            }
            for name, of_one in followed.items()
        },
        series=[
            Series("21b", name, f"layer {layer + 1}, {when}", of_one.distance[:, place, layer])
            for name, of_one in followed.items()
            for layer in range(len(WIDTHS))
            for when, place in (("start", 0), ("end", -1))
        ],
        rates={name: of_one.rate for name, of_one in chosen.items()},
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the distance from the identity and the correlations over training."""
    apart, alike = figure.subplots(1, 2)
    for place, (name, of_one) in enumerate(curves.items()):
        steps = EVERY * np.arange(len(of_one["distance"]))
        band(apart, steps, of_one["distance"], name, color=f"C{place}")
        for key, style, which in (
            ("scales", "-", "scale and deviation"),
            ("biases", "--", "bias and mean"),
        ):
            options: dict[str, Any] = {"color": f"C{place}", "linestyle": style}
            label = f"{name}: {which}"
            band(alike, steps[1:], of_one[key], label, within=(-1, 1), **options)
    apart.axhline(UNDONE, color="gray", linestyle=":", zorder=5)
    apart.set(
        ylabel="distance of the norm from the identity\n(deviations of its input)", ylim=(0, None)
    )
    alike.axhline(HALF, color="gray", linestyle=":", zorder=5)
    alike.set(ylabel="correlation over features", ylim=(-1.02, 1.02))
    for axes in (apart, alike):
        axes.set(xlabel="step")
        axes.legend(fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


EXPERIMENT = Experiment(
    number=21,
    name="undoing_the_norm",
    claim="Scale and bias can learn to undo the norm, and do not",
    source="Ioffe & Szegedy 2015, section 3; lectures that say one or the other",
    sub_claims=(
        SubClaim(
            "21a",
            "they can",
            "trained to give the input of the norm back, scale and bias undo the norm",
            "distance from the identity after 200 steps (deviations of the input)",
            Below(UNDONE),
            Published("scale = sqrt(var), bias = mean", "V"),
            f"ours: {UNDONE:g} of a deviation",
        ),
        SubClaim(
            "21b",
            "they do not",
            "trained in a classifier, they stay away from undoing the norm",
            "distance from the identity, end of training over start, mean over layers",
            Above(HALF),
            reason="ours: half of the distance is left",
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "21c",
            "scale and deviation",
            "the learned scales do not follow the deviations that they would have to restore",
            "correlation of scale and deviation over features, mean over layers",
            Below(HALF),
            reason="ours: a quarter of the variance",
            is_resplit=True,
        ),
        SubClaim(
            "21d",
            "bias and mean",
            "the learned biases do not follow the means that they would have to restore",
            "correlation of bias and mean over features, mean over layers",
            Below(HALF),
            reason="ours: a quarter of the variance",
            is_resplit=True,
        ),
    ),
    protocol=(
        "one norm of 32 features, its scale and bias trained by gradient descent to give its input "
        "back; MLP 64-64-64-64-10 with batch norm on digits, SGD or Adam for 400 steps, each at "
        "its best of 5 rates, means and deviations over the training part"
    ),
    limits=(
        "400 steps on digits. The distance depends on how weights are initialized, which sets the "
        "deviations at the start, and on how they grow."
    ),
    run=run,
    draw=draw,
    easy="That they can: it is a least squares problem in two numbers for each feature.",
    hard="To see them try: in a classifier, the distance from the identity hardly shrinks.",
    data=Needs(trained=BATCH_SIZE),
)
