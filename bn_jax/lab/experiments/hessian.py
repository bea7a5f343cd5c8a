"""Claim 16: batch norm removes the outliers from the Hessian's spectrum."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import MLP
from bn_jax.lab.experiments.sweeps import (
    accuracy,
    draw_batches,
    load_digits,
    loss_of,
    sweep,
    train,
)
from bn_jax.lab.experiments.verdicts import (
    Criterion,
    Experiment,
    Result,
    Setting,
    mean_interval,
    ratio_interval,
)
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = 24, 24, 24
ARMS: dict[str, nn.Module] = {
    "batch norm": MLP(WIDTHS, norm=partial(BatchNorm, momentum=0.9)),
    "no norm": MLP(WIDTHS),
}
BATCH_SIZE = 64
# Whose losses are averaged to the one that the Hessian is of.
BATCHES = 6
STEPS = 300
EVERY = 150
OUTLIERS = 10
DRAWN = 16
HALVED = 0.5
TOLERANCE = 1e-2


class Spectrum(NamedTuple):
    """The upper end of a Hessian's spectrum.

    Attributes:
        eigenvalues: the largest ones, descending.
        share: of the gradient's squared norm in the space of the first `OUTLIERS` eigenvectors.
    """

    eigenvalues: Any
    share: float


def largest_eigenvalues(
    multiply: Callable[[Any], Any], size: int, count: int, seed: int
) -> tuple[Any, Any]:
    """Finds the largest eigenvalues of a symmetric matrix by Lanczos' method, restarted.

    Args:
        multiply: the matrix times a vector [size].
        size: of the matrix.
        count: how many eigenvalues.
        seed: of the vector to start from.

    Returns:
        The eigenvalues, descending, [count], and their vectors, [size, count].
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    first = np.random.default_rng(seed).standard_normal(size)
    values, vectors = eigsh(operator, count, which="LA", v0=first, tol=TOLERANCE, ncv=3 * count)
    return values[::-1], vectors[:, ::-1]


def make_products(model: nn.Module, params: Any) -> tuple[Any, Any]:
    """Makes programs for the loss in training, each batch normalized by its own statistics.

    Args:
        model: the network.
        params: a tree like that of its parameters.

    Returns:
        The gradient, a function of parameters as one vector and of batches x [batches, n, 64] and
        y [batches, n], and the Hessian's product with a vector, which comes last.
    """
    _, unravel = ravel_pytree(params)

    def loss(flat: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        # Of the running statistics, training reads nothing.
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
        A function of parameters, batches x and y as of `make_products`, and a seed.
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
        of_loss = np.asarray(gradient(flat, x, y), np.float64)
        along = vectors[:, :OUTLIERS].T @ of_loss
        return Spectrum(values, float(along @ along / (of_loss @ of_loss)))

    return measure


def train_arm(model: nn.Module, digits: Any, rows: Any, rates: Any, setting: Setting) -> Any:
    """Trains with every rate and keeps the best one's way.

    Args:
        model: the network.
        digits: the data.
        rows: of the batches.
        rates: of SGD.
        setting: the seeds.

    Returns:
        The rate, and the parameters after every `EVERY` steps, [seeds, points, ...].
    """

    def run(rate: Any, seed: Any, parts: Any, rows: Any) -> Any:
        variables = model.init(jax.random.key(seed), parts.train.x[:1], train=False)
        trained = train(
            model,
            optax.sgd(rate),
            variables,
            parts.train,
            rows,
            lambda variables: variables["params"],
            EVERY,
        )
        return accuracy(model, trained.variables, parts.validation), trained.observed

    accuracies, params = sweep(run, rates, setting.chosen, digits, rows)
    best = int(accuracies.mean(-1).argmax())
    return rates[best], jax.tree.map(lambda leaf: np.asarray(leaf[best]), params)


def spectra(setting: Setting) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measures the spectra of both arms over training.

    Args:
        setting: the seeds.

    Returns:
        For every arm and for batch norm over all examples at once, spectra [seeds][points]; and
        the rates.
    """
    digits = load_digits(setting.chosen)
    rows = draw_batches(setting.chosen, digits.train.x.shape[1], STEPS, BATCH_SIZE)
    rates = np.geomspace(0.03, 3, 3 if setting.quick else 5)
    found: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    for arm, model in ARMS.items():
        chosen[arm], params = train_arm(model, digits, rows, rates, setting)
        setting.advance(0.1)
        measure = make_measure(model, _at(params, 0, 0))
        whole = f"{arm}, one batch"
        found[arm] = []
        found[whole] = []
        for index, seed in enumerate(setting.chosen):
            x, y = (part[index, : BATCHES * BATCH_SIZE] for part in digits.train)
            points = [_at(params, index, point) for point in range(1, STEPS // EVERY + 1)]
            batches = x.reshape(BATCHES, BATCH_SIZE, -1), y.reshape(BATCHES, BATCH_SIZE)
            found[arm].append([measure(point, *batches, seed) for point in points])
            if model.norm is not None and not setting.quick:
                found[whole].append([measure(points[-1], x[None], y[None], seed)])
            setting.advance(0.4 / len(setting.chosen))
    return {arm: of_seeds for arm, of_seeds in found.items() if of_seeds}, chosen


def _at(params: Any, seed: int, point: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[seed, point], params)


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    found, rates = spectra(setting)
    values = {
        arm: np.array([[one.eigenvalues for one in points] for points in of_seeds])
        for arm, of_seeds in found.items()
    }
    shares = {
        arm: np.array([[one.share for one in points] for points in of_seeds])
        for arm, of_seeds in found.items()
    }
    # [seeds, points]
    ratios = {arm: one[:, :, 0] / one[:, :, OUTLIERS] for arm, one in values.items()}
    return Result(
        criteria=(
            Criterion(
                f"eigenvalue 1 over eigenvalue {OUTLIERS + 1}, with over without batch norm",
                "outliers almost absent",
                ratio_interval(ratios["batch norm"][:, -1] / ratios["no norm"][:, -1]),
                at_most=HALVED,
            ),
        ),
        curves={
            "eigenvalues": {arm: one[:, -1].T for arm, one in values.items()},
            "share": {arm: shares[arm].T for arm in ARMS},
            "steps": np.arange(EVERY, STEPS + 1, EVERY),
            "rates": rates,
        },
        reported={
            **{
                f"eigenvalue 1 over eigenvalue {OUTLIERS + 1}, {arm}": ratio_interval(one[:, -1])
                for arm, one in ratios.items()
            },
            **{
                f"share of the gradient in the top {OUTLIERS}, {arm}": mean_interval(one[:, -1])
                for arm, one in shares.items()
            },
            **{
                f"largest eigenvalue, {arm}": ratio_interval(one[:, -1, 0])
                for arm, one in values.items()
            },
            **{
                f"ratio with over without batch norm after {(index + 1) * EVERY} steps": (
                    ratio_interval(ratios["batch norm"][:, index] / ratios["no norm"][:, index])
                )
                for index in range(STEPS // EVERY - 1)
            },
        },
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the largest eigenvalues, and the gradient's share in the first of them."""
    by_rank, by_step = figure.subplots(1, 2)
    for arm, values in curves["eigenvalues"].items():
        band(by_rank, np.arange(1, DRAWN + 1), np.log10(np.asarray(values)), arm, marker=".")
    by_rank.set_xticks(range(1, DRAWN + 1, 2))
    by_rank.axvline(OUTLIERS + 0.5, color="gray", linestyle=":")
    by_rank.set(xlabel="rank", ylabel=r"$\log_{10}$ of the Hessian's eigenvalue")
    by_rank.legend(frameon=False)
    for arm, shares in curves["share"].items():
        band(by_step, curves["steps"], shares, arm, marker=".")
    by_step.set(xlabel="steps", ylabel=f"share of the gradient in the top {OUTLIERS}", ylim=(0, 1))


EXPERIMENT = Experiment(
    number=16,
    name="hessian",
    claim="Batch norm removes the outliers from the Hessian's spectrum",
    source="Ghorbani et al. 2019",
    published="outliers almost absent where batches have their own statistics",
    protocol=(
        f"MLP 64-24-24-24-10 on digits, {STEPS} steps of SGD at each arm's best rate; Hessian of "
        f"the loss in training, the mean over {BATCHES} batches of {BATCH_SIZE}"
    ),
    limits=(
        "Three thousand parameters at one point of a short training of ten easy classes; the "
        "source has residual networks on ImageNet. Statistics of one large batch are reported "
        "apart, for the source has outliers come back with them."
    ),
    run=run,
    draw=draw,
)
