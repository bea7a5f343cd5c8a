"""Claim 23: features on unlike scales train slowly, and batch norm mends it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import numpy as np
import numpy.typing as npt
import optax

from bn_jax.lab.experiments.figures import PERCENT, band
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM, MLP, normalize_batch
from bn_jax.lab.experiments.not_gaussian import used_pixels
from bn_jax.lab.experiments.selection import Chosen, RateSweep, accuracies, sweep_rates
from bn_jax.lab.experiments.statistics import relative_error
from bn_jax.lab.experiments.sweeps import (
    Digits,
    Part,
    Trial,
    draw_trials,
    load_parts,
    train_trial,
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
from bn_jax.lab.models import Norm, apply_norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEATURES, WIDTH, BATCH_SIZE = 32, 32, 64
# The largest scale over the smallest is 10 to these powers.
POWERS = 0, 1, 2, 3
RATES = tuple(float(rate) for rate in np.geomspace(1e-3, 10, 9))
ARMS = "no norm", "norm of the inputs", "norm of the hidden layer"
TOLERANCE = 1e-9
# A difference of accuracies that would matter, in points.
POINT = 1.0


class Net(nn.Module):
    """A hidden layer of ReLU units, with a norm of the inputs, of the hidden layer, or none.

    Attributes:
        inputs: the norm of the inputs.
        hidden: the norm of the hidden layer.
        num_classes: the number of logits.
    """

    inputs: Norm | None = None
    hidden: Norm | None = None
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits [n, num_classes] of [n, features]."""
        x = apply_norm(self.inputs, x, train, None, None, "of_inputs")
        return MLP((WIDTH,), self.num_classes, self.hidden, name="mlp")(x, train)


NETS: Mapping[str, Net] = dict(
    zip(ARMS, (Net(), Net(inputs=BATCH_NORM), Net(hidden=BATCH_NORM)), strict=True)
)


def choose_features(digits: Digits) -> Digits:
    """Returns the standardized pixels that are most often not empty."""
    pixels = used_pixels(digits.train.x, FEATURES)
    return Digits(*(Part(part.x[..., pixels], part.y) for part in digits))


def draw_exponents(seeds: Any) -> npt.NDArray[np.float32]:
    """Draws an exponent of each feature: -1/2 to 1/2, in random order, [seeds, features]."""
    exponents = np.linspace(-0.5, 0.5, FEATURES)
    orders = [np.random.default_rng([8, int(seed)]).permutation(FEATURES) for seed in seeds]
    return np.stack([exponents[order] for order in orders]).astype(np.float32)


def rescale(x: Any, exponents: Any, power: Any) -> Any:
    """Multiplies each feature of [n, features] by 10 to the power times its exponent."""
    return x * (10 ** (power * exponents))[None]


def train_arm(setting: Setting, arm: str, powers: tuple[int, ...]) -> dict[int, Chosen[Any]]:
    """Trains a network with every rate, on features of every range of scales.

    Args:
        setting: the seeds, and the size of the run.
        arm: a name in `ARMS`.
        powers: the ranges.

    Returns:
        By power, the test accuracies at the best rate of each seed, in percent, [seeds].
    """
    trials = draw_trials(setting, 40 if setting.quick else 200, BATCH_SIZE)
    trials = trials._replace(digits=choose_features(trials.digits))
    rates = RATES[::2] if setting.quick else RATES
    model = NETS[arm].clone(num_classes=setting.num_classes)

    def run(place: jax.Array, trial: Trial, exponents: jax.Array) -> Any:
        rate, power = place
        scaled = (Part(rescale(part.x, exponents, power), part.y) for part in trial.digits)
        trial = trial._replace(digits=Digits(*scaled))
        trained = train_trial(model, optax.sgd(rate), trial)
        return accuracies(model, trained, trial.digits)

    places = np.array([(rate, power) for power in powers for rate in rates])
    swept = sweep_rates(run, places, trials, draw_exponents(setting.chosen))
    of_powers = zip(
        powers,
        np.split(swept.validation, len(powers)),
        np.split(100 * swept.measured, len(powers)),
        strict=True,
    )
    return {
        power: RateSweep(np.asarray(rates), validation, measured).best_for_each_seed()
        for power, validation, measured in of_powers
    }


def condition_number(features: Any) -> float:
    """Returns the largest over the smallest eigenvalue of the Gram matrix of features and a 1.

    At zero weights, the Fisher matrix of softmax regression on these features is this matrix times
    a constant one, so that their condition numbers are proportional.

    Args:
        features: [n, features].
    """
    features = np.asarray(features, np.float64)
    extended = np.concatenate([features, np.ones((len(features), 1))], 1)
    eigenvalues = np.linalg.eigvalsh(extended.T @ extended / len(features))
    return float(eigenvalues[-1] / eigenvalues[0])


def conditioning(setting: Setting, powers: tuple[int, ...]) -> dict[str, dict[int, Any]]:
    """Measures the conditioning of the inputs and of the hidden layer before any training.

    Args:
        setting: the seeds, and the size of the run.
        powers: the ranges of scales.

    Returns:
        Condition numbers by place, "inputs" or "hidden layer", with or without a norm, and by
        power, [seeds].
    """
    digits = choose_features(load_parts(setting))
    exponents = draw_exponents(setting.chosen)
    found: dict[str, dict[int, Any]] = {
        name: {power: np.empty(setting.seeds) for power in powers}
        for name in (
            "inputs, no norm",
            "inputs, norm",
            "hidden layer, no norm",
            "hidden layer, norm",
        )
    }
    for place, (x, of_seed) in enumerate(zip(digits.train.x, exponents, strict=True)):
        generator = np.random.default_rng([9, int(setting.chosen[place])])
        kernel = generator.normal(size=(FEATURES, WIDTH)) * np.sqrt(2 / FEATURES)
        for power in powers:
            raw = rescale(x.astype(np.float64), of_seed.astype(np.float64), power)
            hidden = raw @ kernel
            for name, features in (
                ("inputs, no norm", raw),
                ("inputs, norm", _normalize(raw)),
                ("hidden layer, no norm", np.maximum(hidden, 0)),
                ("hidden layer, norm", np.maximum(_normalize(hidden), 0)),
            ):
                found[name][power][place] = condition_number(features)
    return found


def _normalize(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return (x - x.mean(0)) / x.std(0)


def invariance(setting: Setting) -> Any:
    """Compares a norm of scaled inputs with a norm of the inputs, in float64, [seeds]."""
    with jax.enable_x64(True):
        digits = choose_features(load_parts(setting))
        x = digits.train.x.astype(np.float64)

        def error(x: jax.Array, exponents: jax.Array) -> jax.Array:
            scaled = rescale(x, exponents, POWERS[-1])
            return relative_error(normalize_batch(scaled), normalize_batch(x))

        return np.asarray(jax.jit(jax.vmap(error))(x, draw_exponents(setting.chosen)))


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    powers = POWERS[::3] if setting.quick else POWERS
    unlike = powers[1:]
    errors = invariance(setting)
    numbers = conditioning(setting, powers)
    setting.advance(0.1)
    chosen = {}
    for arm in ARMS:
        chosen[arm] = train_arm(setting, arm, powers)
        setting.advance(0.3)
    found = {
        arm: {power: of_one.measured for power, of_one in of_arm.items()}
        for arm, of_arm in chosen.items()
    }
    without, of_inputs, of_hidden = (found[arm] for arm in ARMS)

    def settings(values: Any) -> dict[str, Any]:
        return {f"scales 1 to 10^{power}": values(power) for power in unlike}

    def ratios(place: str) -> Any:
        return lambda power: numbers[f"{place}, norm"][power] / numbers[f"{place}, no norm"][power]

    return Result(
        values={
            "23a": settings(lambda power: without[power] - without[0]),
            "23b": settings(lambda power: of_inputs[power] - of_inputs[0]),
            "23c": errors,
            "23d": settings(lambda power: of_hidden[power] - without[power]),
            "23e": settings(lambda power: of_hidden[power] - of_hidden[0]),
            "23f": settings(ratios("inputs")),
            "23g": {"like scales": ratios("hidden layer")(0), **settings(ratios("hidden layer"))},
        },
        curves={
            "powers": powers,
            "accuracy": {arm: list(of_arm.values()) for arm, of_arm in found.items()},
            "number": {name: list(of_name.values()) for name, of_name in numbers.items()},
        },
        series=[
            *(
                Series("23a", arm, f"10^{power}", values)
                for arm, of_arm in found.items()
                for power, values in of_arm.items()
            ),
            *(
                Series("23f", name, f"10^{power}", values)
                for name, of_name in numbers.items()
                for power, values in of_name.items()
            ),
        ],
        rates={
            f"{arm}, 10^{power}": of_one.rate
            for arm, of_arm in chosen.items()
            for power, of_one in of_arm.items()
        },
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws accuracies and condition numbers by the range of scales."""
    by_power, numbers = figure.subplots(1, 2)
    powers = 10.0 ** np.asarray(curves["powers"])
    for arm, values in curves["accuracy"].items():
        band(by_power, powers, values, arm, within=PERCENT, marker="o")
    styles = {"inputs": "-", "hidden layer": "--"}
    for name, values in curves["number"].items():
        place, which = name.split(", ")
        color = "C0" if which == "norm" else "C1"
        options: dict[str, Any] = {"linestyle": styles[place], "color": color, "marker": "o"}
        band(numbers, powers, np.log10(np.asarray(values, float)), name, **options)
    numbers.set(ylabel="Gram matrix: log10 of the condition number")
    by_power.set(ylabel="test accuracy (%)")
    for axes in (by_power, numbers):
        axes.set(xscale="log", xlabel="largest scale of a feature over the smallest")
        axes.legend(fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


EXPERIMENT = Experiment(
    number=23,
    name="unlike_scales",
    claim="Features on unlike scales train slowly, and batch norm mends it",
    source="LeCun et al. 1998, section 4.3; lectures on batch norm",
    sub_claims=(
        SubClaim(
            "23a",
            "unlike scales are slow",
            "without a norm, features on unlike scales train more slowly",
            "test accuracy after the same steps, unlike minus like scales (points)",
            Below(0.0),
            is_resplit=True,
        ),
        SubClaim(
            "23b",
            "norm of the inputs",
            "with a norm of the inputs, unlike scales train as like ones do",
            "test accuracy after the same steps, unlike minus like scales (points)",
            Within(-POINT, POINT),
            Published("BN(D x) = BN(x)", "D"),
            f"ours: {POINT:g} point",
            is_resplit=True,
        ),
        SubClaim(
            "23c",
            "the identity behind it",
            "without epsilon, a norm of scaled inputs is the norm of the inputs",
            "relative error of the output",
            Identity(TOLERANCE),
            Published("BN(D x) = BN(x)", "D"),
        ),
        SubClaim(
            "23d",
            "norm of the hidden layer",
            "a norm after the first layer trains unlike scales better than no norm does",
            "test accuracy with the norm minus without (points)",
            Above(0.0),
            is_resplit=True,
        ),
        SubClaim(
            "23e",
            "it mends it whole",
            "with a norm after the first layer, unlike scales train as like ones do",
            "test accuracy after the same steps, unlike minus like scales (points)",
            Within(-POINT, POINT),
            reason=f"ours: {POINT:g} point",
            is_resplit=True,
        ),
        SubClaim(
            "23f",
            "conditioning, inputs",
            "a norm of the inputs makes their Gram matrix better conditioned",
            "condition number with the norm over without",
            Below(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "23g",
            "conditioning, hidden",
            "a norm before ReLU makes the Gram matrix of its outputs better conditioned",
            "condition number with the norm over without",
            Below(1.0),
            scale="ratio",
            is_resplit=True,
        ),
    ),
    protocol=(
        "the 32 pixels of digits that are most often not empty, standardized, times scales whose "
        "range is 1 to 10^3; MLP 32-32-10 of ReLU with a norm of the inputs, of the hidden layer "
        "or none, 200 steps, each at its best of 9 rates; Gram matrices of the inputs and of the "
        "hidden layer of a random network, each with a constant feature, in float64"
    ),
    limits=(
        "SGD without momentum; optimizers that scale each gradient mend unlike scales by "
        "themselves. The Gram matrix is, up to a constant factor, the Fisher matrix of softmax "
        "regression at zero weights, and not that of the whole network."
    ),
    run=run,
    draw=draw,
    easy="A norm of the inputs: it removes their scales exactly, down to its epsilon.",
    hard="The usual place of the norm, after the first layer, does not see the inputs' scales.",
    data=Needs(trained=BATCH_SIZE, features=FEATURES),
)
