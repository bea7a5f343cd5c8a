"""Claim 22: what is normalized is neither Gaussian nor uncorrelated."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bn_jax as bn
from bn_jax.lab.experiments.figures import points
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM, MLP, normalize_batch
from bn_jax.lab.experiments.selection import Chosen, Outcome, accuracies, sweep_rates
from bn_jax.lab.experiments.sweeps import Trial, draw_trials, load_parts, train_trial
from bn_jax.lab.experiments.verdicts import (
    Below,
    Experiment,
    Identity,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES, FEATURES = 256, 8
TOLERANCE = 1e-9
PIXELS = 32
WIDTHS = 32, 32, 32
RATES = 0.1, 0.3, 1.0, 3.0, 10.0
BATCH_SIZE = 64
ITERATIONS, EPSILON = 24, 1e-6
# Half the excess kurtosis of a uniform distribution, or of a logistic one.
KURTOSIS = 0.6
# With this correlation, the axes of an ellipse differ by 10 %: (1 + r) / (1 - r) = 1.1^2.
CORRELATION = (1.1**2 - 1) / (1.1**2 + 1)
# How many values of the first seed are drawn.
DRAWN = 300


def excess_kurtosis(x: Any) -> Any:
    """Returns the fourth standardized moment of each feature less that of a normal one, [features].

    Args:
        x: [n, features]. A constant feature gives not-a-number.
    """
    centred = x - x.mean(0, keepdims=True)
    return (centred**4).mean(0) / (centred**2).mean(0) ** 2 - 3


def correlations(x: Any) -> Any:
    """Returns the sizes of the correlations of all pairs of features, [pairs].

    Args:
        x: [n, features]. A constant feature gives not-a-number.
    """
    centred = x - x.mean(0, keepdims=True)
    covariance = centred.T @ centred / len(x)
    deviation = jnp.sqrt(jnp.diagonal(covariance))
    first, second = np.triu_indices(x.shape[-1], 1)
    return jnp.abs(covariance / jnp.outer(deviation, deviation))[first, second]


def invariances(x: jax.Array, scale: jax.Array, bias: jax.Array) -> dict[str, jax.Array]:
    """Measures what a norm changes of the distribution of its input.

    Args:
        x: [n, features].
        scale: of the norm, [features].
        bias: of the norm, [features].

    Returns:
        By the key of a sub-claim, the largest error or change.
    """
    normalized, y = normalize_batch(x), normalize_batch(x, {"scale": scale, "bias": bias})
    errors = jnp.abs(jnp.stack([normalized.mean(0), normalized.var(0) - 1]))
    return {
        "22a": errors.max(),
        "22b": jnp.abs(excess_kurtosis(y) - excess_kurtosis(x)).max(),
        "22c": jnp.abs(correlations(y) - correlations(x)).max(),
    }


def identities(setting: Setting) -> dict[str, Any]:
    """Measures the changes for correlated exponential values, in float64.

    Args:
        setting: the seeds, and the size of the run.

    Returns:
        By the key of a sub-claim, [seeds].
    """
    generators = [np.random.default_rng([7, int(seed)]) for seed in setting.chosen]
    x = [
        generator.exponential(size=(EXAMPLES, FEATURES)) @ generator.normal(size=(FEATURES,) * 2)
        for generator in generators
    ]
    params = [generator.normal(size=(2, FEATURES)) for generator in generators]
    with jax.enable_x64(True):
        scale, bias = np.moveaxis(np.stack(params), 1, 0)
        changes = jax.jit(jax.vmap(invariances))(np.stack(x), scale, bias)
        return jax.tree.map(np.asarray, changes)


class Shape(NamedTuple):
    """The shape of the distribution at some places, each [places].

    Attributes:
        kurtosis: the median size of the excess kurtosis of a feature.
        correlation: the mean size of the correlation of two features.
        whitened: the same after whitening.
    """

    kurtosis: Any
    correlation: Any
    whitened: Any


PLACES = "pixels", *(f"layer {number}" for number in range(1, len(WIDTHS) + 1))


def whiten(x: jax.Array) -> jax.Array:
    """Whitens [n, features]."""
    batch_stats = bn.init_whitening_stats(x.shape[-1])
    return bn.whitening_norm(
        bn.init_params(x.shape[-1]),
        batch_stats,
        x,
        use_running_average=False,
        epsilon=EPSILON,
        iterations=ITERATIONS,
    )[0]


def used_pixels(x: Any, number: int) -> Any:
    """Returns the places of the pixels that are most often not empty, [number].

    Args:
        x: standardized images [..., n, features], where an empty pixel has its smallest value.
        number: how many.
    """
    used = (x > x.min(-2, keepdims=True)).mean(tuple(range(x.ndim - 1)))
    return np.sort(np.argsort(used)[-number:])


def train_net(setting: Setting) -> tuple[Chosen[dict[str, Any]], Any]:
    """Trains a network with norms, and measures the shapes of what they put out.

    Args:
        setting: the seeds, and the size of the run.

    Returns:
        At the best rate of each seed, the `Shape` at each of `PLACES` under "shape", [seeds,
        places], and the median excess kurtosis of the outputs of ReLU under "activated", [seeds];
        and the numbers of the pixels.
    """
    trials = draw_trials(setting, 60 if setting.quick else 300, BATCH_SIZE)
    pixels = used_pixels(trials.digits.train.x, PIXELS)
    model = MLP(WIDTHS, setting.num_classes, norm=BATCH_NORM)

    def run(rate: jax.Array, trial: Trial) -> Outcome[dict[str, Any]]:
        trained = train_trial(model, optax.sgd(rate), trial)
        x = trial.digits.train.x
        mutable = ["intermediates", "batch_stats"]
        _, sown = model.apply(trained, x, train=True, mutable=mutable)
        layers = sown["intermediates"]["preactivation"]
        values = jnp.stack([x[:, pixels], *layers])
        shape = Shape(
            jax.vmap(lambda of_place: _median(excess_kurtosis(of_place)))(values),
            jax.vmap(lambda of_place: jnp.nanmean(correlations(of_place)))(values),
            jax.vmap(lambda of_place: jnp.nanmean(correlations(whiten(of_place))))(values),
        )
        activated = jnp.concatenate([excess_kurtosis(nn.relu(layer)) for layer in layers[:-1]])
        before = jnp.concatenate([excess_kurtosis(layer) for layer in layers[1:]])
        measured = {
            "shape": shape,
            "activated": _median(activated),
            "before": _median(before),
            "drawn": layers[1][:DRAWN],
        }
        return Outcome(accuracies(model, trained, trial.digits).validation, measured)

    return sweep_rates(run, RATES, trials).best_for_each_seed(), pixels


def _median(kurtosis: jax.Array) -> jax.Array:
    return jnp.nanmedian(jnp.abs(kurtosis))


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    errors = identities(setting)
    setting.advance(0.2)
    chosen, pixels = train_net(setting)
    setting.advance(0.8)
    shape: Shape = chosen.measured["shape"]
    by_place = {
        name: dict(zip(PLACES, np.asarray(values).T, strict=True))
        for name, values in shape._asdict().items()
    }
    digits = load_parts(setting._replace(seeds=1)).train.x[0]
    return Result(
        values={
            **errors,
            "22d": by_place["kurtosis"],
            "22e": by_place["correlation"],
            "22f": by_place["whitened"],
            "22g": chosen.measured["before"] - chosen.measured["activated"],
        },
        curves={
            **by_place,
            "unit": _most_typical(chosen.measured["drawn"][0]),
            "pair": _most_correlated(digits[:, pixels]),
        },
        series=[
            Series("22g", "input of the norm", "", chosen.measured["before"]),
            Series("22g", "output of ReLU", "", chosen.measured["activated"]),
        ],
        rates={"batch norm": chosen.rate},
    )


def _most_typical(values: Any) -> Any:
    """Returns the feature with the median size of the excess kurtosis, normalized, [n]."""
    sizes = np.abs(excess_kurtosis(values))
    feature = values[:, np.argsort(sizes)[len(sizes) // 2]]
    return (feature - feature.mean()) / feature.std()


def _most_correlated(x: Any) -> Any:
    """Returns the two features with the largest correlation, normalized, [n, 2]."""
    first, second = np.triu_indices(x.shape[-1], 1)
    place = int(np.asarray(correlations(x)).argmax())
    pair = x[:, [first[place], second[place]]]
    return ((pair - pair.mean(0)) / pair.std(0))[:DRAWN]


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws a unit, a pair of pixels, and kurtosis and correlations at all places."""
    unit, pair, kurtosis, correlation = figure.subplots(1, 4)
    unit.hist(np.asarray(curves["unit"], float), 30, density=True, color="C0", alpha=0.6)
    grid = np.linspace(-4, 4, 200)
    unit.plot(grid, np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi), color="black", zorder=5)
    unit.set(xlabel="normalized input of a ReLU;\nline: standard normal", ylabel="density")
    x, y = np.asarray(curves["pair"], float).T
    pair.plot(x, y, ".", alpha=0.4)
    pair.set(xlabel="two normalized pixels", aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    places = range(len(PLACES))
    points(kurtosis, places, [np.asarray(curves["kurtosis"][place], float) for place in PLACES])
    kurtosis.axhspan(0, KURTOSIS, color="gray", alpha=0.2, linewidth=0)
    kurtosis.set(ylabel="median |excess kurtosis|", ylim=(0, None))
    for name, label in (("correlation", "normalized"), ("whitened", "whitened")):
        runs = [np.asarray(curves[name][place], float) for place in PLACES]
        points(correlation, places, runs, label)
    correlation.axhspan(0, CORRELATION, color="gray", alpha=0.2, linewidth=0)
    correlation.set(ylabel="mean |correlation|", ylim=(0, None))
    correlation.legend(fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    for axes in (kurtosis, correlation):
        axes.set_xticks(places, [place.replace(" ", "\n") for place in PLACES], fontsize="small")


EXPERIMENT = Experiment(
    number=22,
    name="not_gaussian",
    claim="What a norm puts out is standard normal, and an ellipse becomes a circle",
    source="Lectures and tutorials; Ioffe & Szegedy 2015, section 3.2",
    sub_claims=(
        SubClaim(
            "22a",
            "mean 0, variance 1",
            "normalized values have mean 0 and variance 1",
            "largest error of mean and variance",
            Identity(TOLERANCE),
            Published("0 and 1", "V"),
        ),
        SubClaim(
            "22b",
            "kurtosis stays",
            "a norm leaves the kurtosis of a feature as it is",
            "largest change of the excess kurtosis",
            Identity(TOLERANCE),
            Published("the same for a x + b", "D"),
        ),
        SubClaim(
            "22c",
            "correlations stay",
            "a norm leaves the sizes of all correlations as they are",
            "largest change of a correlation's size",
            Identity(TOLERANCE),
            Published("the same for a x + b", "D"),
        ),
        SubClaim(
            "22d",
            "standard normal",
            "what a norm puts out is normally distributed",
            "median size of the excess kurtosis of a feature",
            Below(KURTOSIS),
            Published("0", "R"),
            f"ours: {KURTOSIS:g}, half that of a uniform or of a logistic distribution",
            is_resplit=True,
        ),
        SubClaim(
            "22e",
            "circular",
            "what a norm puts out has the same deviation in every direction",
            "mean size of the correlation of two features",
            Below(CORRELATION),
            Published("0", "R"),
            f"ours: {CORRELATION:.3f}, where the axes of an ellipse differ by 10 %",
            is_resplit=True,
        ),
        SubClaim(
            "22f",
            "whitening is circular",
            "whitening, not batch norm, makes the deviation the same in every direction",
            "mean size of the correlation of two features after whitening",
            Below(CORRELATION),
            Published("0", "D"),
            f"ours: {CORRELATION:.3f}, as for 22e",
            is_resplit=True,
        ),
        SubClaim(
            "22g",
            "more Gaussian before",
            "the input of an activation is closer to normal than its output",
            "median size of the excess kurtosis, input of a norm minus output of ReLU before it",
            Below(0.0),
            Published("more Gaussian", "V"),
            is_resplit=True,
        ),
    ),
    protocol=(
        "correlated exponential values in float64; the 32 pixels of digits that are most often "
        "not empty, and the normalized inputs of ReLU in an MLP 64-32-32-32-10 with batch norm, "
        "300 steps at its best of 5 rates, over the training part; whitening by 24 iterations of "
        "Newton's method"
    ),
    limits=(
        "Layers of 32 units: in wide layers with random weights, sums of many terms are closer to "
        "normal. Zero correlation and zero excess kurtosis are necessary, not sufficient."
    ),
    run=run,
    draw=draw,
    easy="What stays: a norm is an affine map of each feature, and changes no shape.",
    hard="In hidden layers the kurtosis of a typical unit is nearly normal, unlike correlations.",
    data=Needs(trained=BATCH_SIZE, features=PIXELS),
)
