"""What a hidden layer can fit with and without the second step of batch norm, on one input."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from bn_jax.lab.experiments.nets import MLP
from bn_jax.lab.experiments.selection import choose
from bn_jax.lab.experiments.sweeps import sweep
from bn_jax.lab.experiments.verdicts import ChosenRate, Setting
from bn_jax.lab.models import Norm
from bn_jax.linen import BatchNorm

POINTS, WIDTH = 256, 64
FIT_RATES = 3e-3, 1e-2, 3e-2, 1e-1, 3e-1
FITS: Mapping[str, Norm | None] = {
    "no norm": None,
    "normalized only": partial(BatchNorm, use_scale=False, use_bias=False),
    "with scale and bias": partial(BatchNorm),
}


class Fit(NamedTuple):
    """How well a hidden layer fits a function of one input.

    Attributes:
        unexplained: the share of the function's variance that is left, [seeds].
        rate: the rates.
        predicted: what the first seed's network predicts, [points].
    """

    unexplained: Any
    rate: ChosenRate
    predicted: Any


def target(x: Any) -> Any:
    """The function that is fitted: it turns at other places than the mean of its input."""
    return np.sin(2 * x)


def draw_inputs(setting: Setting) -> npt.NDArray[np.float32]:
    """Draws the inputs of `target`, uniform from -2 to 2 and sorted, [seeds, points, 1]."""
    generators = [np.random.default_rng([3, int(seed)]) for seed in setting.chosen]
    drawn = [np.sort(generator.uniform(-2, 2, (POINTS, 1)), 0) for generator in generators]
    return np.stack(drawn).astype(np.float32)


def least_unexplained(x: Any) -> float:
    """Returns what no layer of normalized ReLU units without scale and bias can explain.

    Whatever its weight, a normalized unit of one input `x` is `z` or `-z`, with `z` the normalized
    input. A layer of any width is then `a relu(z) + b relu(-z) + c`, which least squares fits.

    Args:
        x: [points].

    Returns:
        The share of the variance of `target`.
    """
    x = np.asarray(x, np.float64)
    z = (x - x.mean()) / x.std()
    basis = np.stack([np.maximum(z, 0), np.maximum(-z, 0), np.ones_like(z)], 1)
    y = target(x)
    left = y - basis @ np.linalg.lstsq(basis, y, rcond=None)[0]
    return float(np.mean(left**2) / y.var())


def fit(setting: Setting, arm: str) -> Fit:
    """Fits `target` by one hidden layer, at the rate of each seed that fits best.

    Args:
        setting: the seeds, and the size of the run.
        arm: a name in `FITS`.
    """
    model = MLP((WIDTH,), num_classes=1, norm=FITS[arm])
    inputs = draw_inputs(setting)
    steps = 300 if setting.quick else 2000

    def run(rate: jax.Array, seed: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        variables = model.init(jax.random.key(seed), x, train=False)
        fixed = {name: value for name, value in variables.items() if name != "params"}
        optimizer = optax.adam(optax.cosine_decay_schedule(1.0, steps))

        def predict(params: Any) -> jax.Array:
            return model.apply({**fixed, "params": params}, x, True, mutable=["batch_stats"])[0]

        def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
            params, moments = state
            gradients = jax.grad(lambda params: jnp.mean((predict(params) - y) ** 2))(params)
            updates, moments = optimizer.update(gradients, moments)
            updates = jax.tree.map(lambda update: rate * update, updates)
            return (optax.apply_updates(params, updates), moments), None

        params = variables["params"]
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        predicted = predict(params)
        return {"unexplained": jnp.mean((predicted - y) ** 2) / y.var(), "predicted": predicted}

    fitted = sweep(run, FIT_RATES, setting.chosen, inputs, target(inputs))
    fitted = jax.tree.map(np.asarray, fitted)
    best = choose(FIT_RATES, fitted["unexplained"].argmin(0), fitted)
    return Fit(best.measured["unexplained"], best.rate, best.measured["predicted"][0, :, 0])
