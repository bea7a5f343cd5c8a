"""Claim 1: the scale of weights before a norm only sets the effective learning rate."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax._paths import format_path
from bn_jax.lab.experiments.figures import PERCENT, band
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import (
    MLP,
    NO_EPSILON,
    NO_EPSILON_FLOAT32,
    WITH_AND_WITHOUT,
    normalize_batch,
)
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.selection import RateSweep, sweep_accuracies
from bn_jax.lab.experiments.statistics import relative_error
from bn_jax.lab.experiments.sweeps import (
    MakeOptimizer,
    State,
    Trial,
    draw_trials,
    init_model,
    load_parts,
    loss_of,
    make_step,
    start,
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
from bn_jax.linen import BatchNorm
from bn_jax.optim import no_weight_decay_mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = 64, 64
SCALES = 1e-2, 0.3, 3.0, 1e2
TOLERANCE = 1e-10
BATCH_SIZE = 64
# The parameters that are trained at the rates of the sweep, and the rate of all others.
SWEPT: dict[str, float | None] = {"all parameters": None, "kernels before a norm": 0.1}
LARGE_RATES = 10.0, 1000.0
# How far below the best rate a rate still trains, and what is no more than chance, which is 0.1.
WITHIN, CHANCE = 0.05, 0.2
DECAY = 0.05
DECAY_RATE = 0.1
# The equilibrium is measured between these times, in units of 1 / (learning rate * weight decay).
SETTLED, END = 12, 16


class Errors(NamedTuple):
    """The largest relative errors over the scales.

    Attributes:
        output: of the network.
        flipped: of one layer and its norm, at scales of both signs.
        gradient: of the network.
    """

    output: Any
    flipped: Any
    gradient: Any


def identities(setting: Setting) -> Errors:
    """Compares output and gradient at weights `a w` with those at `w`, in float64.

    Args:
        setting: the seeds, and the size of the run.

    Returns:
        The largest errors over the scales, [seeds].
    """
    with jax.enable_x64(True):
        train = load_parts(setting).train
        x, y = train.x[:, :BATCH_SIZE].astype(np.float64), train.y[:, :BATCH_SIZE]
        errors = partial(_scaling_errors, setting.num_classes)
        of_scales = jax.jit(jax.vmap(errors))(setting.chosen, x, y)
        return Errors(*(np.asarray(errors).max(1) for errors in of_scales))


def _scaling_errors(num_classes: int, seed: jax.Array, x: jax.Array, y: jax.Array) -> Errors:
    """Returns the errors of one network at each of `SCALES`, [scales]."""
    kernel = jax.random.normal(jax.random.key(seed), (x.shape[-1], WIDTHS[0]))

    def normalized(scale: Any) -> jax.Array:
        return normalize_batch(x @ (scale * kernel))

    norm = partial(BatchNorm, epsilon=NO_EPSILON)
    model = MLP(WIDTHS, num_classes, norm=norm, dtype=jnp.float64)
    variables = model.init(jax.random.key(seed), x, train=False)

    def at(scale: Any) -> tuple[jax.Array, Any]:
        scaled = jax.tree.map_with_path(partial(_scaled, scale), variables["params"])
        logits, _ = model.apply(
            {**variables, "params": scaled}, x, train=True, mutable=["batch_stats"]
        )
        gradients = jax.grad(
            lambda params: loss_of(model, {**variables, "params": params}, x, y)[0]
        )(scaled)
        # The gradient at `a w` is that at `w` over `a`.
        return logits, jax.tree.map_with_path(partial(_scaled, scale), gradients)

    expected_logits, expected_gradients = at(1.0)

    def errors(scale: jax.Array) -> Errors:
        logits, gradients = at(scale)
        of_leaves = jax.tree.map(relative_error, gradients, expected_gradients)
        worst = jnp.max(jnp.stack(jax.tree.leaves(of_leaves)))
        flipped = relative_error(normalized(-scale), -normalized(1.0))
        return Errors(relative_error(logits, expected_logits), flipped, worst)

    return jax.vmap(errors)(jnp.asarray(SCALES))


def _scaled(scale: Any, path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    return leaf * scale if _is_scale_invariant(path) else leaf


def _is_scale_invariant(path: tuple[Any, ...]) -> bool:
    """Returns whether a parameter is a kernel before a norm."""
    return "dense" in format_path(path)


def equilibrium(setting: Setting) -> Any:
    """Trains with weight decay until the norm of the weights has settled.

    Args:
        setting: the seeds, and the size of the run.

    Returns:
        For the kernels before a norm, at every step, [2, seeds, steps, layers]: `|w|^4`, and its
        value in equilibrium, `learning rate |w|^2 |g|^2 / (2 weight decay)`.
    """
    trials = draw_trials(setting, round(END / (DECAY_RATE * DECAY)), BATCH_SIZE)
    norm = partial(BatchNorm, epsilon=NO_EPSILON_FLOAT32)
    model = MLP(WIDTHS, setting.num_classes, norm=norm)
    decay = optax.add_decayed_weights(DECAY, no_weight_decay_mask)
    optimizer = optax.chain(decay, optax.sgd(DECAY_RATE))

    def run(trial: Trial) -> tuple[jax.Array, jax.Array]:
        step = make_step(model, optimizer, trial.digits.train)

        def follow(state: State, batch: jax.Array) -> Any:
            weights = _squared_norms(state.variables["params"])
            state, (_, gradients) = step(state, batch)
            expected = DECAY_RATE * weights * _squared_norms(gradients) / (2 * DECAY)
            return state, (weights**2, expected)

        return jax.lax.scan(follow, start(optimizer, init_model(model, trial)), trial.batches)[1]

    return np.asarray(map_runs(run, trials))


def _squared_norms(params: Any) -> jax.Array:
    return jnp.stack([jnp.sum(params[f"dense{i}"]["kernel"] ** 2) for i in range(len(WIDTHS))])


def make_optimizer(others: float | None) -> MakeOptimizer:
    """Returns an optimizer whose rate is that of the kernels before a norm.

    Args:
        others: the learning rate of all other parameters; None: the same.
    """

    def make(rate: Any) -> optax.GradientTransformation:
        return optax.partition(
            {True: optax.sgd(rate), False: optax.sgd(rate if others is None else others)},
            partial(jax.tree.map_with_path, lambda path, _: _is_scale_invariant(path)),
        )

    return make


def at_large_rates(swept: RateSweep[Any]) -> Any:
    """Returns the accuracies on the test part at the rates among `LARGE_RATES`, [rates, seeds]."""
    low, high = LARGE_RATES
    return swept.measured[(low <= swept.rates) & (swept.rates <= high)]


def train_each(setting: Setting) -> dict[str, RateSweep[Any]]:
    """Trains with and without norm, at every rate of all parameters or of the kernels only."""
    rates = np.geomspace(1e-4, 1e4, 9 if setting.quick else 17)
    trials = draw_trials(setting, 60 if setting.quick else 400, BATCH_SIZE)
    swept = {}
    for which, others in SWEPT.items():
        for arm, norm in WITH_AND_WITHOUT.items():
            model = MLP(WIDTHS, setting.num_classes, norm=norm)
            swept[f"{arm}, {which}"] = sweep_accuracies(
                model, make_optimizer(others), rates, trials
            )
            setting.advance(0.2)
    return swept


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    errors = identities(setting)
    setting.advance(0.05)
    norms, expected = equilibrium(setting)
    setting.advance(0.15)
    settled = round(SETTLED / (DECAY_RATE * DECAY))
    ratio = norms[:, settled:].mean((1, 2)) / expected[:, settled:].mean((1, 2))
    swept = train_each(setting)
    invariant = swept["batch norm, kernels before a norm"]
    best = invariant.best_for_each_seed().measured
    without = swept["no norm, kernels before a norm"]
    return Result(
        values={
            "1a": {"network, a > 0": errors.output, "layer, a < 0": errors.flipped},
            "1b": errors.gradient,
            "1c": ratio,
            "1d": at_large_rates(invariant).min(0) - best,
            "1e": at_large_rates(without).max(0),
        },
        curves={
            "rates": swept["batch norm, all parameters"].rates,
            "accuracy": {arm: of_arm.measured for arm, of_arm in swept.items()},
            "time": np.arange(norms.shape[1])[::20] * DECAY_RATE * DECAY,
            "ratio": (norms / expected[:, settled:].mean((0, 1))).mean(-1).T[::20],
        },
        series=[
            Series("1d", arm, f"rate {rate:g}", accuracies)
            for arm, of_arm in swept.items()
            for rate, accuracies in zip(of_arm.rates, of_arm.measured, strict=True)
        ],
        rates={arm: of_arm.best_for_each_seed().rate for arm, of_arm in swept.items()},
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws accuracy by learning rate, and the approach to the equilibrium."""
    by_rate, by_time = figure.subplots(1, 2)
    for arm, values in curves["accuracy"].items():
        band(by_rate, curves["rates"], 100 * np.asarray(values), arm, within=PERCENT)
    by_rate.set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)", ylim=(-2, 102))
    by_rate.legend(loc="center left", bbox_to_anchor=(0, 0.62), fontsize="x-small")
    band(by_time, curves["time"], curves["ratio"], "measured")
    by_time.axhline(1, color="gray", linestyle=":")
    by_time.set(
        yscale="log",
        xlabel="steps x learning rate x weight decay",
        ylabel=r"$|w|^4$ over its value in equilibrium",
    )


RATES_TEXT = f"{LARGE_RATES[0]:g} to {LARGE_RATES[1]:g}"
EXPERIMENT = Experiment(
    number=1,
    name="scale_invariance",
    claim="The scale of weights before a norm changes nothing but the effective learning rate",
    source="van Laarhoven 2017; Hoffer et al. 2018; Arora et al. 2018",
    sub_claims=(
        SubClaim(
            "1a",
            "output at weights a W",
            "BN(a W u) = BN(W u) for a > 0, and -BN(W u) for a < 0",
            "relative error of the output",
            Identity(TOLERANCE),
            Published("BN(aWu) = BN(Wu)", "V"),
        ),
        SubClaim(
            "1b",
            "gradient at weights a w",
            "the gradient at a w is that at w over a",
            "relative error of the gradient times a",
            Identity(TOLERANCE),
            Published("1 / a", "V"),
        ),
        SubClaim(
            "1c",
            "|w|^4 in equilibrium",
            "with weight decay, |w|^4 settles at lr E|g~|^2 / (2 wd)",
            "|w|^4 over that value",
            Within(0.95, 1.05),
            Published("lr E|g~|^2 / (2 wd)", "R"),
            "ours: 5 %, for the mean over a finite time",
        ),
        SubClaim(
            "1d",
            "any rate trains",
            "with a norm behind them, weights train at any fixed rate",
            f"test accuracy at the worst of the rates {RATES_TEXT} of the kernels before a norm, "
            "less that at the best rate",
            Above(-WITHIN),
            Published("any fixed rate trains", "V"),
            f"ours: {100 * WITHIN:g} points",
            is_resplit=True,
        ),
        SubClaim(
            "1e",
            "not so without a norm",
            "without a norm, the same rates of the same weights do not train",
            f"test accuracy at the best of the rates {RATES_TEXT}",
            Below(CHANCE),
            reason=f"ours: {100 * CHANCE:g} %, twice chance",
            is_resplit=True,
            is_of_digits=True,
        ),
    ),
    protocol=(
        "MLP 64-64-64-10 on digits; identities in float64 without epsilon; equilibrium with weight "
        "decay; rates 1e-4 to 1e4 of all parameters, and of the kernels before a norm with all "
        "others at 0.1, with and without batch norm"
    ),
    limits=(
        "A classifier without norm follows the scale-invariant layers and is not invariant: the "
        "sweep of all parameters is reported, and nobody claims that any rate trains it."
    ),
    run=run,
    draw=draw,
    easy="The identities, and the equilibrium: they hold to the digits that the run can show.",
    hard="That any rate trains is a theorem about the scale-invariant weights alone.",
    data=Needs(trained=BATCH_SIZE),
)
