"""Claim 16: batch norm removes the outliers from the Hessian's spectrum."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM, MLP
from bn_jax.lab.experiments.selection import Chosen, Outcome, sweep_rates
from bn_jax.lab.experiments.statistics import Interval, ratio_interval
from bn_jax.lab.experiments.sweeps import (
    Part,
    Trial,
    accuracy,
    draw_trials,
    init_model,
    loss_of,
    take,
    train,
)
from bn_jax.lab.experiments.verdicts import (
    Above,
    Below,
    ChosenRate,
    Experiment,
    Published,
    Result,
    Series,
    Setting,
    SubClaim,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = 24, 24, 24
ARMS: dict[str, MLP] = {
    "batch norm": MLP(WIDTHS, norm=BATCH_NORM),
    "no norm": MLP(WIDTHS),
}
BATCH_SIZE = 64
# The Hessian is that of the mean loss over so many batches.
BATCHES = 6
STEPS = 300
EVERY = 150
OUTLIERS = 10
DRAWN = 16
# What counts as almost no outlier: the largest eigenvalue over the first that is none.
ABSENT = 2.0
ONE_BATCH = "batch norm, one batch"
TOLERANCE = 1e-2


class Spectrum(NamedTuple):
    """The upper end of a Hessian's spectrum.

    Attributes:
        eigenvalues: the largest `DRAWN`, descending.
        share: the share of the gradient's squared norm in the space of the first `OUTLIERS`
            eigenvectors.
    """

    eigenvalues: Any
    share: float


def largest_eigenvalues(
    multiply: Callable[[Any], Any], size: int, count: int, seed: int
) -> tuple[Any, Any]:
    """Finds the largest eigenvalues of a symmetric matrix by the restarted Lanczos method.

    Args:
        multiply: multiplies the matrix by a vector [size].
        size: the number of rows of the matrix.
        count: the number of eigenvalues.
        seed: the seed of the initial vector.

    Returns:
        The eigenvalues, descending, [count], and their vectors, [size, count].
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    first = np.random.default_rng(seed).standard_normal(size)
    values, vectors = eigsh(operator, count, which="LA", v0=first, tol=TOLERANCE, ncv=3 * count)
    return values[::-1], vectors[:, ::-1]


def make_products(model: nn.Module, params: Any) -> tuple[Any, Any]:
    """Makes programs for derivatives of the training loss, each batch with its own statistics.

    Args:
        model: the network.
        params: a tree like that of its parameters.

    Returns:
        Two functions of the parameters as one vector and of batches x [batches, n, 64] and
        y [batches, n]: the gradient, and the Hessian's product with a vector, the last argument.
    """
    _, unravel = ravel_pytree(params)

    def loss(flat: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        # Training does not read the running statistics, so their values do not matter.
        of_batch = partial(loss_of, model, _variables(model, unravel(flat)))
        return jnp.mean(jax.vmap(lambda x, y: of_batch(x, y)[0])(x, y))

    def product(flat: jax.Array, x: jax.Array, y: jax.Array, vector: jax.Array) -> jax.Array:
        return jax.jvp(lambda flat: jax.grad(loss)(flat, x, y), (flat,), (vector,))[1]

    return jax.jit(jax.grad(loss)), jax.jit(product)


def _variables(model: nn.Module, params: Any) -> Any:
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64)), train=False))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return {**zeros, "params": params}


def make_measure(model: nn.Module, params: Any) -> Callable[[Any, Any, Any, int], Spectrum]:
    """Makes the function that measures spectra of one network.

    Args:
        model: the network.
        params: a tree like that of its parameters.

    Returns:
        A function of parameters, batches x and y as in `make_products`, and a seed.
    """
    gradient, product = make_products(model, params)

    def measure(params: Any, x: Any, y: Any, seed: int) -> Spectrum:
        flat, x, y = jax.device_put((ravel_pytree(params)[0], x, y))
        values, vectors = largest_eigenvalues(
            lambda vector: np.asarray(product(flat, x, y, vector.astype(np.float32).ravel())),
            flat.size,
            DRAWN,
            seed,
        )
        steepest = np.asarray(gradient(flat, x, y), np.float64)
        along = vectors[:, :OUTLIERS].T @ steepest
        return Spectrum(values, float(along @ along / (steepest @ steepest)))

    return measure


def train_arm(model: nn.Module, trials: Trial, rates: Any) -> Chosen[Any]:
    """Trains a network at every rate, and keeps its parameters along the way.

    Args:
        model: the network.
        trials: the trials of all seeds.
        rates: the learning rates of SGD.

    Returns:
        At the rate that is best for all seeds, the parameters at the start and after every `EVERY`
        steps, [seeds, points, ...].
    """

    def run(rate: jax.Array, trial: Trial) -> Outcome[Any]:
        trained = train(
            model,
            optax.sgd(rate),
            init_model(model, trial),
            trial.digits.train,
            trial.batches,
            observe=lambda variables: variables["params"],
            every=EVERY,
        )
        validation = accuracy(model, trained.variables, trial.digits.validation)
        return Outcome(validation, trained.observed)

    return sweep_rates(run, rates, trials).best_for_all_seeds()


class ArmSpectra(NamedTuple):
    """Spectra of an arm, over training.

    Attributes:
        eigenvalues: [seeds, points, DRAWN].
        share: the share of the gradient in the space of the outliers, [seeds, points].
    """

    eigenvalues: Any
    share: Any

    @property
    def ratio(self) -> Any:
        """The largest eigenvalue over the first that is no outlier, [seeds, points]."""
        return self.eigenvalues[..., 0] / self.eigenvalues[..., OUTLIERS]


def _stack(of_seeds: Sequence[Sequence[Spectrum]]) -> ArmSpectra:
    """Stacks spectra [seeds][points]."""
    return ArmSpectra(
        np.array([[spectrum.eigenvalues for spectrum in points] for points in of_seeds]),
        np.array([[spectrum.share for spectrum in points] for points in of_seeds]),
    )


def measure_spectra(
    model: nn.Module, params: Any, train: Part, setting: Setting, *, whole: bool
) -> ArmSpectra:
    """Measures the spectra of a network for every seed.

    Args:
        model: the network.
        params: the params along training, [seeds, points, ...].
        train: the training part, whose first examples make the batches, [seeds, n, 64].
        setting: the seeds, and the size of the run.
        whole: whether to measure at the last point only, with all examples in one batch.
    """
    measure = make_measure(model, take(params, 0, 0))
    batches = (1, BATCHES * BATCH_SIZE) if whole else (BATCHES, BATCH_SIZE)
    last = STEPS // EVERY
    spectra = []
    for index, seed in enumerate(setting.chosen):
        x = train.x[index, : BATCHES * BATCH_SIZE].reshape(*batches, -1)
        y = train.y[index, : BATCHES * BATCH_SIZE].reshape(batches)
        along = [take(params, index, point) for point in ([last] if whole else range(1, last + 1))]
        spectra.append([measure(at_point, x, y, seed) for at_point in along])
        if not whole:
            setting.advance(0.4 / len(setting.chosen))
    return _stack(spectra)


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    trials = draw_trials(setting, STEPS, BATCH_SIZE)
    train = trials.digits.train
    rates = np.geomspace(0.03, 3, 3 if setting.quick else 5)
    spectra: dict[str, ArmSpectra] = {}
    chosen: dict[str, ChosenRate] = {}
    for arm, of_digits in ARMS.items():
        model = of_digits.clone(num_classes=setting.num_classes)
        trained = train_arm(model, trials, rates)
        chosen[arm] = trained.rate
        setting.advance(0.1)
        spectra[arm] = measure_spectra(model, trained.measured, train, setting, whole=False)
        if arm == "batch norm":
            spectra[ONE_BATCH] = measure_spectra(
                model, trained.measured, train, setting, whole=True
            )
    ratios = {arm: of_arm.ratio[:, -1] for arm, of_arm in spectra.items()}
    shares = {arm: spectra[arm].share[:, -1] for arm in ARMS}
    return Result(
        values={
            "16a": ratios["batch norm"] / ratios["no norm"],
            "16b": ratios["batch norm"],
            "16c": shares["batch norm"] - shares["no norm"],
            "16d": ratios[ONE_BATCH] / ratios["batch norm"],
        },
        curves={
            "eigenvalues": {arm: of_arm.eigenvalues[:, -1].T for arm, of_arm in spectra.items()},
            "share": {arm: spectra[arm].share.T for arm in ARMS},
            "steps": np.arange(EVERY, STEPS + 1, EVERY),
        },
        series=[
            *(Series("16a", arm, "", values) for arm, values in ratios.items()),
            *(Series("16c", arm, "", values) for arm, values in shares.items()),
        ],
        reported=_reported(spectra),
        rates=chosen,
    )


def _reported(spectra: Mapping[str, ArmSpectra]) -> dict[str, Interval]:
    largest = {
        f"largest eigenvalue, {arm}": ratio_interval(of_arm.eigenvalues[:, -1, 0])
        for arm, of_arm in spectra.items()
    }
    halfway = spectra["batch norm"].ratio[:, 0] / spectra["no norm"].ratio[:, 0]
    name = f"ratio with over without batch norm after {EVERY} steps"
    return largest | {name: ratio_interval(halfway)}


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the largest eigenvalues, and the gradient's share in the first of them."""
    by_rank, by_step = figure.subplots(1, 2)
    for arm, values in curves["eigenvalues"].items():
        band(by_rank, np.arange(1, DRAWN + 1), np.log10(np.asarray(values)), arm, marker=".")
    by_rank.set_xticks(range(1, DRAWN + 1, 2))
    by_rank.axvline(OUTLIERS + 0.5, color="gray", linestyle=":")
    by_rank.set(xlabel="rank", ylabel=r"$\log_{10}$ of the Hessian's eigenvalue")
    by_rank.legend()
    for arm, shares in curves["share"].items():
        band(by_step, curves["steps"], shares, arm, marker=".")
    by_step.set(xlabel="steps", ylabel=f"share of the gradient in the top {OUTLIERS}", ylim=(0, 1))


EXPERIMENT = Experiment(
    number=16,
    name="hessian",
    claim="Batch norm removes the outliers from the Hessian's spectrum",
    source="Ghorbani et al. 2019",
    sub_claims=(
        SubClaim(
            "16a",
            "outliers shrink",
            "with batch norm, the outliers of the Hessian are nearer to the bulk",
            f"eigenvalue 1 over eigenvalue {OUTLIERS + 1}, with over without batch norm",
            Below(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "16b",
            "outliers almost absent",
            "with batch norm, hardly any outlier is left",
            f"eigenvalue 1 over eigenvalue {OUTLIERS + 1}, with batch norm",
            Below(ABSENT),
            Published("almost absent", "V"),
            f"ours: no more than {ABSENT:g} times the first that is no outlier",
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "16c",
            "gradient leaves them",
            "with batch norm, less of the gradient lies in the space of the outliers",
            f"share of the squared gradient in the top {OUTLIERS}, with minus without batch norm",
            Below(0.0),
            is_resplit=True,
        ),
        SubClaim(
            "16d",
            "back with a large batch",
            "the outliers come back where all examples share their statistics",
            f"eigenvalue 1 over eigenvalue {OUTLIERS + 1}, one batch of all over small batches",
            Above(1.0),
            scale="ratio",
            is_resplit=True,
        ),
    ),
    protocol=(
        f"MLP 64-24-24-24-10 on digits, {STEPS} steps of SGD at each arm's best rate; Hessian of "
        f"the loss in training, the mean over {BATCHES} batches of {BATCH_SIZE}"
    ),
    limits=(
        "Three thousand parameters at one point of a short training of ten easy classes; the "
        "source has residual networks on ImageNet. Ten classes make ten outliers; the largest "
        "sixteen eigenvalues are found, not the density of all."
    ),
    run=run,
    draw=draw,
    easy="That the largest eigenvalues are nearer to the others with batch norm.",
    hard="They stay well apart from the bulk: on data as easy as this, nothing is almost absent.",
    data=Needs(trained=BATCHES * BATCH_SIZE),
)
