"""Claim 13: a large batch generalizes better with the statistics of small parts of it."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import MLP
from bn_jax.lab.experiments.selection import Chosen, Outcome, sweep_rates
from bn_jax.lab.experiments.sweeps import (
    Trial,
    accuracy,
    cross_entropy,
    draw_trials,
    init_model,
    train,
)
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Interval,
    Result,
    Setting,
    exact,
    mean_interval,
    ratio_interval,
)
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH_SIZE = 512
GHOSTS = 8, 32, 128, 512
WIDTHS = 64, 64
RATES = 0.3, 1.0, 3.0
MOMENTUM = 0.9
LAWS = {"log t": np.log, "sqrt t": np.sqrt}


class Measured(NamedTuple):
    """What was measured of the trainings with one ghost size, for every seed.

    Attributes:
        validation: accuracies on the validation part, [seeds].
        test: accuracies on the test part, [seeds].
        loss: the loss on the test part, [seeds].
        distance: the distance of all parameters from the start after every step, [seeds, steps].
    """

    validation: Any
    test: Any
    loss: Any
    distance: Any


def train_with(setting: Setting, ghost: int, steps: int) -> Chosen[Measured]:
    """Trains with one ghost size at every rate.

    Args:
        setting: the seeds, and the size of the run.
        ghost: the number of examples that share statistics.
        steps: the number of steps of each training.

    Returns:
        The measurements at the rate that is best for all seeds.
    """
    model = MLP(WIDTHS, norm=partial(BatchNorm, momentum=MOMENTUM, virtual_batch_size=ghost))

    def run(rate: jax.Array, trial: Trial) -> Outcome[Measured]:
        digits = trial.digits
        variables = init_model(model, trial)

        def distance(now: Any) -> jax.Array:
            moved = jax.tree.map(jnp.subtract, now["params"], variables["params"])
            return optax.tree.norm(moved)

        trained = train(
            model, optax.sgd(rate), variables, digits.train, trial.batches, observe=distance
        )
        logits: Any = model.apply(trained.variables, digits.test.x, train=False)
        measured = Measured(
            validation=accuracy(model, trained.variables, digits.validation),
            test=accuracy(model, trained.variables, digits.test),
            loss=cross_entropy(logits, digits.test.y),
            distance=trained.observed[1:],
        )
        return Outcome(measured.validation, measured)

    trials = draw_trials(setting.chosen, steps, BATCH_SIZE)
    return sweep_rates(run, RATES, trials).best_for_all_seeds()


def misfits(distances: Any) -> dict[str, npt.NDArray[np.float64]]:
    """Fits ``a + b log t`` and ``a + b sqrt t`` to the distance after every step.

    Args:
        distances: the distances after steps 1, 2, ..., [seeds, steps].

    Returns:
        For each law, the sums of the squared residuals, [seeds].
    """
    distances = np.asarray(distances)
    steps = np.arange(1, distances.shape[-1] + 1)
    residuals = {}
    for name, law in LAWS.items():
        design = np.stack([np.ones(len(steps)), law(steps)], -1)
        fitted = design @ np.linalg.lstsq(design, distances.T)[0]
        residuals[name] = ((distances.T - fitted) ** 2).sum(0)
    return residuals


def _misfit_ratio(distances: Any) -> Interval:
    """Returns the squared misfit of the law in log t over that of the law in sqrt t."""
    residuals = misfits(distances)
    return ratio_interval(residuals["log t"] / residuals["sqrt t"])


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    steps = 60 if setting.quick else 200
    chosen = {}
    sizes = GHOSTS[1::2] if setting.quick else GHOSTS
    for ghost in sizes:
        chosen[ghost] = train_with(setting, ghost, steps)
        setting.advance(1 / len(sizes))
    measured = {ghost: of_ghost.measured for ghost, of_ghost in chosen.items()}
    whole = measured[BATCH_SIZE]
    best_ghost = max(sizes[:-1], key=lambda ghost: float(measured[ghost].validation.mean()))
    shown = _log_spaced(steps)
    return Result(
        criteria=(
            Criterion(
                "test accuracy, the ghost size best on the validation part minus 512 (points)",
                "> 0",
                mean_interval(100 * (measured[best_ghost].test - whole.test)),
                at_least=0,
            ),
            Criterion(
                "squared misfit of the distance from the start, log t over sqrt t, ghost 512",
                "< 1",
                _misfit_ratio(whole.distance),
                at_most=1,
            ),
        ),
        curves={
            "ghosts": sizes,
            "test": np.stack([of_ghost.test for of_ghost in measured.values()]),
            "loss": np.stack([of_ghost.loss for of_ghost in measured.values()]),
            "step": shown + 1,
            "distance": {
                str(ghost): of_ghost.distance.T[shown] for ghost, of_ghost in measured.items()
            },
        },
        reported={
            "ghost size, best on the validation part": exact(best_ghost),
            **_reported(chosen),
        },
        rates={f"ghost {ghost}": of_ghost.rate for ghost, of_ghost in chosen.items()},
    )


def _reported(chosen: Mapping[int, Chosen[Measured]]) -> dict[str, Interval]:
    whole = chosen[BATCH_SIZE].measured
    smaller = {
        ghost: of_ghost.measured for ghost, of_ghost in chosen.items() if ghost != BATCH_SIZE
    }
    return {
        **{
            f"learning rate, ghost {ghost}": exact(of_ghost.rate.value)
            for ghost, of_ghost in chosen.items()
        },
        **{
            f"test accuracy, ghost {ghost} minus 512 (points)": (
                mean_interval(100 * (measured.test - whole.test))
            )
            for ghost, measured in smaller.items()
        },
        **{
            f"test loss, ghost {ghost} minus 512 (nats)": mean_interval(measured.loss - whole.loss)
            for ghost, measured in smaller.items()
        },
        **{
            f"squared misfit, log t over sqrt t, ghost {ghost}": _misfit_ratio(measured.distance)
            for ghost, measured in smaller.items()
        },
    }


def _log_spaced(steps: int) -> npt.NDArray[np.int64]:
    """Returns indices of steps that are about equally far apart on a logarithmic axis."""
    return np.unique(np.geomspace(1, steps, 40).round().astype(np.int64)) - 1


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the accuracy by ghost size, and the distance from the start by step."""
    by_ghost, by_step = figure.subplots(1, 2)
    differences = 100 * (np.asarray(curves["test"]) - np.asarray(curves["test"][-1]))
    band(by_ghost, curves["ghosts"], differences, "ghost size minus 512", marker="o")
    by_ghost.axhline(0, color="gray", linestyle=":")
    by_ghost.set_xscale("log", base=2)
    by_ghost.set(xlabel="examples that share statistics", ylabel="test accuracy (points)")
    steps = np.asarray(curves["step"])
    for ghost in curves["ghosts"]:
        band(by_step, steps, curves["distance"][str(ghost)], f"ghost size {ghost}")
    mean = np.asarray(curves["distance"][str(BATCH_SIZE)]).mean(-1)
    for (name, law), line in zip(LAWS.items(), ("--", ":"), strict=True):
        fitted = np.polyval(np.polyfit(law(steps), mean, 1), law(steps))
        by_step.plot(steps, fitted, color="black", linestyle=line, label=f"a + b {name}, to 512")
    by_step.set(xscale="log", xlabel="step", ylabel="distance from the start")
    for axes in (by_ghost, by_step):
        axes.legend()


EXPERIMENT = Experiment(
    number=13,
    name="ghost_batches",
    claim="A large batch generalizes better with the statistics of ghost batches",
    source="Hoffer et al. 2017; Summers & Dinneen 2020",
    published="a smaller gap to small batches; distance from the start grows like log t",
    protocol=(
        "MLP 64-64-64-10 on digits, batches of 512, ghost batches of 8 to 512, constant learning "
        "rates 0.3 to 3, chosen for each size on the validation part; fits to the distance of all "
        "parameters from the start after every step"
    ),
    limits=(
        "Two batches are an epoch, and the network soon knows them by heart: then the gradient "
        "vanishes, and that the distance grows slowly says little about random walks. 359 test "
        "digits resolve 0.3 points a seed."
    ),
    run=run,
    draw=draw,
)
