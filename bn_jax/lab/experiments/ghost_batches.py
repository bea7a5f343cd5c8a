"""Claim 13: a large batch generalizes better by the statistics of small parts of it."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import MLP
from bn_jax.lab.experiments.sweeps import (
    Digits,
    accuracy,
    cross_entropy,
    draw_batches,
    load_digits,
    sweep,
    train,
)
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
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


def trainings(setting: Setting, ghost: int, steps: int) -> dict[str, Any]:
    """Trains with every rate.

    Args:
        setting: the seeds.
        ghost: how many examples have statistics of their own.
        steps: of each training.

    Returns:
        Shares of right answers on the validation and the test part and the loss on the test part,
        [rates, seeds], and the distance of all parameters from the start after every step,
        [rates, seeds, steps].
    """
    digits = load_digits(setting.chosen)
    rows = draw_batches(setting.chosen, digits.train.x.shape[1], steps, BATCH_SIZE)
    model = MLP(WIDTHS, norm=partial(BatchNorm, momentum=MOMENTUM, virtual_batch_size=ghost))

    def run(rate: Any, seed: Any, parts: Digits, rows: Any) -> dict[str, Any]:
        variables = model.init(jax.random.key(seed), parts.train.x[:1], train=False)

        def distance(now: Any) -> jax.Array:
            moved = jax.tree.map(jnp.subtract, now["params"], variables["params"])
            return optax.tree.norm(moved)

        found = train(model, optax.sgd(rate), variables, parts.train, rows, distance)
        logits: Any = model.apply(found.variables, parts.test.x, train=False)
        return {
            "validation": accuracy(model, found.variables, parts.validation),
            "test": accuracy(model, found.variables, parts.test),
            "loss": cross_entropy(logits, parts.test.y),
            "distance": found.observed[1:],
        }

    found = sweep(run, RATES, setting.chosen, digits, rows)
    return {name: np.asarray(one, np.float64) for name, one in found.items()}


def misfits(distances: Any) -> dict[str, npt.NDArray[np.float64]]:
    """Fits ``a + b log t`` and ``a + b sqrt t`` to the distance after every step.

    Args:
        distances: after steps 1, 2, ..., [seeds, steps].

    Returns:
        Of each law, the sums of the squared residuals, [seeds].
    """
    distances = np.asarray(distances)
    steps = np.arange(1, distances.shape[-1] + 1)
    found = {}
    for name, law in LAWS.items():
        design = np.stack([np.ones(len(steps)), law(steps)], -1)
        fitted = design @ np.linalg.lstsq(design, distances.T)[0]
        found[name] = ((distances.T - fitted) ** 2).sum(0)
    return found


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    steps = 60 if setting.quick else 200
    sizes = GHOSTS[1::2] if setting.quick else GHOSTS
    best, rates = {}, {}
    for ghost in sizes:
        found = trainings(setting, ghost, steps)
        setting.advance(1 / len(sizes))
        at = int(found["validation"].mean(1).argmax())
        rates[ghost] = RATES[at]
        best[ghost] = {name: one[at] for name, one in found.items()}
    whole, ghosts = best[BATCH_SIZE], sizes[:-1]
    chosen = max(ghosts, key=lambda ghost: float(best[ghost]["validation"].mean()))
    gaps = {ghost: 100 * (best[ghost]["test"] - whole["test"]) for ghost in ghosts}
    misfit = {ghost: misfits(best[ghost]["distance"]) for ghost in sizes}
    return Result(
        criteria=(
            Criterion(
                "test accuracy, the ghost size best on the validation part minus 512 (points)",
                "> 0",
                mean_interval(gaps[chosen]),
                at_least=0,
            ),
            Criterion(
                "squared misfit of the distance from the start, log t over sqrt t, ghost 512",
                "< 1",
                ratio_interval(np.divide(*(misfit[BATCH_SIZE][law] for law in LAWS))),
                at_most=1,
            ),
        ),
        curves={
            "ghosts": sizes,
            "test": np.stack([one["test"] for one in best.values()]),
            "loss": np.stack([one["loss"] for one in best.values()]),
            "step": np.arange(1, steps + 1)[_shown(steps)],
            "distance": {
                str(ghost): one["distance"].T[_shown(steps)] for ghost, one in best.items()
            },
        },
        reported={
            "ghost size, best on the validation part": exact(chosen),
            **{f"learning rate, ghost {ghost}": exact(rate) for ghost, rate in rates.items()},
            **{
                f"test accuracy, ghost {ghost} minus 512 (points)": mean_interval(gap)
                for ghost, gap in gaps.items()
            },
            **{
                f"test loss, ghost {ghost} minus 512 (nats)": mean_interval(
                    best[ghost]["loss"] - whole["loss"]
                )
                for ghost in ghosts
            },
            **{
                f"squared misfit, log t over sqrt t, ghost {ghost}": ratio_interval(
                    np.divide(*(misfit[ghost][law] for law in LAWS))
                )
                for ghost in ghosts
            },
        },
    )


def _shown(steps: int) -> npt.NDArray[np.int64]:
    """Returns indices of steps that are about equally far apart on a logarithmic axis."""
    return np.unique(np.geomspace(1, steps, 40).round().astype(np.int64)) - 1


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the accuracy by ghost size, and the distance from the start by step."""
    by_ghost, by_step = figure.subplots(1, 2)
    differences = 100 * (np.asarray(curves["test"]) - np.asarray(curves["test"][-1]))
    band(by_ghost, curves["ghosts"], differences, "ghost size minus 512", marker="o")
    by_ghost.axhline(0, color="gray", linestyle=":")
    by_ghost.set_xscale("log", base=2)
    by_ghost.set(xlabel="examples with statistics of their own", ylabel="test accuracy (points)")
    steps = np.asarray(curves["step"])
    for ghost in curves["ghosts"]:
        band(by_step, steps, curves["distance"][str(ghost)], f"ghost size {ghost}")
    mean = np.asarray(curves["distance"][str(BATCH_SIZE)]).mean(-1)
    for (name, law), line in zip(LAWS.items(), ("--", ":"), strict=True):
        fitted = np.polyval(np.polyfit(law(steps), mean, 1), law(steps))
        by_step.plot(steps, fitted, color="black", linestyle=line, label=f"a + b {name}, to 512")
    by_step.set(xscale="log", xlabel="step", ylabel="distance from the start")
    for axes in (by_ghost, by_step):
        axes.legend(frameon=False)


EXPERIMENT = Experiment(
    number=13,
    name="ghost_batches",
    claim="A large batch generalizes better with the statistics of ghost batches",
    source="Hoffer et al. 2017; Summers & Dinneen 2020",
    published="a smaller gap to small batches; distance from the start grows like log t",
    protocol=(
        "MLP 64-64-64-10 on digits, batches of 512, ghost batches of 8 to 512, constant learning "
        "rates 0.3 to 3 chosen for each size on the validation part; fits of the distance of all "
        "parameters to every step"
    ),
    limits=(
        "Two batches are an epoch, and the network soon knows them by heart: then the gradient "
        "vanishes, and that the distance grows slowly says little about random walks. 359 test "
        "digits resolve 0.3 points a seed."
    ),
    run=run,
    draw=draw,
)
