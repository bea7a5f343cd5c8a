"""Claim 10: batch norm smooths the loss, and does not reduce the internal covariate shift."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax._core.batch_norm import batch_norm
from bn_jax._core.running import init_batch_stats
from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.nets import ScannedMLP
from bn_jax.lab.experiments.sweeps import (
    Part,
    accuracy,
    cross_entropy,
    draw_batches,
    load_digits,
    sweep,
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
from bn_jax.lab.models import Norm
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTH, WIDTH, BATCH_SIZE = 8, 32, 64
RATES = 0.01, 0.03, 0.1, 0.3, 1.0
# As good as none: added to a variance, it changes none of its digits.
NO_EPSILON = 1e-300
# Of the noise: the bounds of the means and deviations, drawn for each feature at every step, and
# half the width of what each example adds to them.
LARGEST_MEAN, LARGEST_DEVIATION, SPREAD = 0.5, 1.5, 0.5
# How far a step looks ahead along the gradient, in steps of the rate.
AHEAD = 0.5, 1.0, 2.0, 4.0


class NoisyBatchNorm(BatchNorm):
    """A batch norm after which every step shifts and stretches each feature anew.

    As in Santurkar et al. 2018, appendix A: feature by feature, a mean and a deviation are drawn at
    every step, and around them one of each for every example.
    """

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """Normalizes `x`; where there is a stream "noise", adds it."""
        y = super().__call__(x, *args, **options)
        if not self.has_rng("noise"):
            return y
        keys = jax.random.split(self.make_rng("noise"), 4)
        mean, deviation, of_mean, of_deviation = (
            jax.random.uniform(key, shape, y.dtype, -1, 1)
            for key, shape in zip(keys, 2 * [(1, y.shape[-1])] + 2 * [y.shape], strict=True)
        )
        factor = 1 + (LARGEST_DEVIATION - 1) * (1 + deviation) / 2 + SPREAD * of_deviation
        return y * factor + LARGEST_MEAN * mean + SPREAD * of_mean


NORMS: Mapping[str, Norm | None] = {
    "batch norm": partial(BatchNorm, momentum=0.9),
    "no norm": None,
    "batch norm and noise": partial(NoisyBatchNorm, momentum=0.9),
}


def squared_gradients(seed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compares the gradients below and above a batch norm with random values.

    Args:
        seed: of the values.

    Returns:
        For each feature, ``|grad_x|^2``; the formula
        ``scale^2 / s^2 (|g|^2 - <1, g>^2 / m - <g, x^>^2 / m)``; and its first term,
        ``scale^2 / s^2 |g|^2``.
    """
    keys = jax.random.split(jax.random.key(seed), 5)
    normal = partial(jax.random.normal, dtype=float)
    x = 3 * normal(keys[0], (BATCH_SIZE, WIDTH)) * jnp.exp(normal(keys[1], (1, WIDTH))) + 5
    params = {"scale": normal(keys[2], (WIDTH,)), "bias": normal(keys[3], (WIDTH,))}
    pull = normal(keys[4], (WIDTH,))
    stats = init_batch_stats(WIDTH, dtype=x.dtype)

    def normalize(params: Any, x: jax.Array) -> jax.Array:
        return batch_norm(params, stats, x, use_running_average=False, epsilon=NO_EPSILON)[0]

    def loss(y: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(y @ pull) ** 2 + jnp.sum(jnp.cos(y) + y, -1))

    normalized = normalize({}, x)
    of_y = jax.grad(loss)(normalize(params, x))
    of_x = jax.grad(lambda x: loss(normalize(params, x)))(x)
    factor = params["scale"] ** 2 / x.var(0)
    bracket = (
        (of_y**2).sum(0)
        - of_y.sum(0) ** 2 / BATCH_SIZE
        - (of_y * normalized).sum(0) ** 2 / BATCH_SIZE
    )
    return (of_x**2).sum(0), factor * bracket, factor * (of_y**2).sum(0)


def identity(setting: Setting) -> tuple[float, Any]:
    """Tests the formula in float64.

    Args:
        setting: the seeds.

    Returns:
        The largest relative error of `squared_gradients`, and what share of the first term the
        other two leave, the mean over the features, [seeds].
    """
    with jax.enable_x64(True):
        found, formula, first = map(
            np.asarray, jax.jit(jax.vmap(squared_gradients))(setting.chosen)
        )
    return float(np.max(np.abs(found - formula) / formula)), (found / first).mean(1)


def measure(setting: Setting, norm: Norm | None, steps: int, every: int) -> dict[str, Any]:
    """Trains with every rate and measures along the way.

    Args:
        setting: the seeds.
        norm: of the network.
        steps: of each training.
        every: how many steps lie between two measurements; divides `steps`.

    Returns:
        At the rate that is best on the validation part, the test accuracies, [seeds]; what
        `covariate_shift` and `smoothness` return, [seeds, measurements, layers or 2]; the rates.
    """
    digits = load_digits(setting.chosen)
    rows = draw_batches(setting.chosen, digits.train.x.shape[1], steps, BATCH_SIZE)
    model = ScannedMLP(DEPTH, WIDTH, norm=norm)

    def run(rate: Any, seed: Any, parts: Any, rows: Any) -> Any:
        variables = model.init(jax.random.key(seed), parts.train.x[:1], train=False)
        follow = partial(_follow, model, rate, jax.random.key(seed), parts.train)
        # The last batch of every stretch is measured.
        stretches = jnp.asarray(rows).reshape(-1, every, BATCH_SIZE)
        numbers = jnp.arange(steps).reshape(-1, every)
        trained, measured = jax.lax.scan(follow, variables, (numbers, stretches))
        return [accuracy(model, trained, p) for p in (parts.validation, parts.test)], measured

    (validation, test), measured = sweep(run, RATES, setting.chosen, digits, rows)
    best = np.asarray(validation).argmax(0)
    chosen = jax.tree.map(
        lambda leaf: np.asarray(leaf)[best, np.arange(setting.seeds)], (test, measured)
    )
    return {"accuracy": chosen[0], **chosen[1], "rate": np.asarray(RATES)[best]}


def _follow(
    model: ScannedMLP, rate: Any, key: jax.Array, part: Part, variables: Any, stretch: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """Takes the steps of a stretch and measures at the last of them."""
    x, y = map(jnp.asarray, part)

    def gradient_of(number: jax.Array, batch: jax.Array, stats: Any) -> Callable[[Any], Any]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, **stats}
            rngs = {"noise": jax.random.fold_in(key, number)}
            logits, updated = model.apply(
                variables, x[batch], train=True, mutable=["batch_stats"], rngs=rngs
            )
            return cross_entropy(logits, y[batch]), dict(updated)

        return jax.grad(loss, has_aux=True)

    def step(carry: Any, given: Any) -> tuple[Any, None]:
        variables, _ = carry
        number, batch = given
        stats = {name: value for name, value in variables.items() if name != "params"}
        gradients, updated = gradient_of(number, batch, stats)(variables["params"])
        params = jax.tree.map(lambda w, g: w - rate * g, variables["params"], gradients)
        return ({"params": params, **updated}, variables), None

    numbers, batches = stretch
    (after, before), _ = jax.lax.scan(step, (variables, variables), stretch)
    stats = {name: value for name, value in before.items() if name != "params"}
    gradient = gradient_of(numbers[-1], batches[-1], stats)
    points = (
        mix_layers(before["params"], after["params"]),
        go_ahead(before["params"], after["params"]),
    )
    # All points are one call, for one gradient to compile.
    every = jax.tree.map(lambda *parts: jnp.concatenate(parts), *points)
    gradients, _ = jax.vmap(gradient)(every)
    mixed, ahead = (
        jax.tree.map(lambda leaf, part=part: leaf[part], gradients)
        for part in (slice(0, DEPTH - 1), slice(DEPTH - 1, None))
    )
    shift = covariate_shift(_kernels(jax.tree.map(lambda leaf: leaf[0], ahead)), _kernels(mixed))
    return after, shift | {"smoothness": smoothness(ahead, rate)}


def mix_layers(before: Any, after: Any) -> Any:
    """Updates the layers before each layer, and no other.

    Args:
        before: the parameters before an update.
        after: those after it.

    Returns:
        The parameters with the layers before the second, third ... hidden layer from `after`,
        [layers - 1, ...].
    """

    def moved(layer: jax.Array) -> Any:
        def mix(old: jax.Array, new: jax.Array) -> jax.Array:
            earlier = jnp.arange(DEPTH - 1) < layer
            return jnp.where(earlier.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        hidden = jax.tree.map(mix, before["hidden"], after["hidden"])
        return {**before, "first": after["first"], "hidden": hidden}

    return jax.vmap(moved)(jnp.arange(DEPTH - 1))


def go_ahead(before: Any, after: Any) -> Any:
    """Goes from `before` towards `after` by 0, and by the multiples of `AHEAD`, [..., of leaf]."""
    multiples = jnp.array((0.0, *AHEAD))
    return jax.vmap(
        lambda far: jax.tree.map(lambda old, new: old + far * (new - old), before, after)
    )(multiples)


def covariate_shift(before: jax.Array, after: jax.Array) -> dict[str, jax.Array]:
    """Measures how far each layer's gradient moves when the layers before it have been updated.

    Args:
        before: the gradients of the hidden layers' kernels but the first, [layers - 1, ...].
        after: for each of these layers, those of all where the ones before it have been updated,
            [layers - 1, layers - 1, ...].

    Returns:
        For each of the layers, of its gradients before and after: "distance", relative to the
        length of the first, and "cosine" of their angle, [layers - 1].
    """
    places = jnp.arange(len(before))
    second = after[places, places]
    length, other = (jnp.sqrt(jnp.sum(g**2, (1, 2))) for g in (before, second))
    distance = jnp.sqrt(jnp.sum((before - second) ** 2, (1, 2)))
    product = jnp.sum(before * second, (1, 2))
    return {"distance": distance / length, "cosine": product / (length * other)}


def _kernels(gradients: Any) -> jax.Array:
    """Returns those of the hidden layers but the first, [..., layers - 1, width, width]."""
    kernels: jax.Array = gradients["hidden"]["dense"]["kernel"]
    return kernels


def smoothness(gradients: Any, rate: Any) -> jax.Array:
    """Measures how much the gradient changes along itself.

    Args:
        gradients: here, and at `AHEAD` times the rate against the gradient, [1 + points, ...].
        rate: of the learning.

    Returns:
        ``max |g(w - d g) - g(w)| / |g(w)|`` over the distances d, and
        ``max |g(w - d g) - g(w)| / (d |g(w)|)``, which bounds the curvature from below, [2].
    """
    here = jax.tree.map(lambda leaf: leaf[0], gradients)
    there = jax.tree.map(lambda leaf: leaf[1:], gradients)
    differences = jax.vmap(lambda one: _length(jax.tree.map(jnp.subtract, one, here)))(there)
    changes = differences / _length(here)
    return jnp.stack([changes.max(), (changes / (rate * jnp.array(AHEAD))).max()])


def _length(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    error, left = identity(setting)
    setting.advance(0.1)
    steps, every = (60, 20) if setting.quick else (400, 20)
    found = {}
    for arm, norm in NORMS.items():
        found[arm] = measure(setting, norm, steps, every)
        setting.advance(0.3)
    return Result(
        criteria=(
            Criterion(
                "|grad_x|^2 against scale^2/s^2 (|g|^2 - <1,g>^2/m - <g,x^>^2/m)",
                "at most; in fact equal",
                exact(error),
                at_most=1e-10,
            ),
        ),
        curves={
            "steps": np.arange(every, steps + 1, every),
            "cosine": {arm: values["cosine"].mean(-1).T for arm, values in found.items()},
            "distance": {arm: values["distance"].mean(-1).T for arm, values in found.items()},
            "curvature": {arm: values["smoothness"][..., 1].T for arm, values in found.items()},
        },
        reported={
            "share of the squared gradient that passes, random values": mean_interval(left),
            **_reported(found),
        },
    )


def _reported(found: Mapping[str, Any]) -> dict[str, Interval]:
    reported: dict[str, Interval] = {}
    for arm, values in found.items():
        reported |= {
            f"{arm}: test accuracy (%)": mean_interval(100 * values["accuracy"]),
            f"{arm}: best learning rate": ratio_interval(values["rate"]),
            f"{arm}: cosine of gradients before and after": mean_interval(
                values["cosine"].mean((1, 2))
            ),
        }
        if arm == "no norm":
            continue
        plain = found["no norm"]
        reported |= {
            f"covariate shift, cosine, {arm} minus no norm": mean_interval(
                (values["cosine"] - plain["cosine"]).mean((1, 2))
            ),
            f"covariate shift, relative distance, {arm} over no norm": ratio_interval(
                values["distance"].mean((1, 2)) / plain["distance"].mean((1, 2))
            ),
            f"change of the gradient within {max(AHEAD):g} steps, {arm} over no norm": (
                ratio_interval(_median(values, 0) / _median(plain, 0))
            ),
            f"curvature along the gradient, {arm} over no norm": ratio_interval(
                _median(values, 1) / _median(plain, 1)
            ),
        }
    return reported


def _median(values: Mapping[str, Any], which: int) -> Any:
    return np.median(values["smoothness"][..., which], axis=1)


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws covariate shift, in both its measures, and curvature over training."""
    labels = {
        "cosine": "cosine of a layer's gradients before\nand after the earlier layers' update",
        "distance": "their distance over the first's length",
        "curvature": "curvature along the gradient",
    }
    for axes, (key, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for arm, values in curves[key].items():
            band(axes, curves["steps"], values, arm)
        axes.set(xlabel="step", ylabel=label, yscale="linear" if key == "cosine" else "log")
    figure.axes[0].legend(frameon=False, fontsize="small")


EXPERIMENT = Experiment(
    number=10,
    name="smoothness",
    claim="Batch norm takes the mean and its own direction out of the gradient: a smoother loss",
    source="Santurkar et al. 2018",
    published="|grad_y|^2 <= scale^2/s^2 (|g|^2 - <1,g>^2/m - <g,y^>^2/m); no less covariate shift",
    protocol=(
        "formula on random values in float64 without epsilon; MLP of 8 layers of 32 ReLU units on "
        "digits, with batch norm, without, and with noise after it, each at its best of 5 rates; "
        "covariate shift: a layer's gradient before and after the earlier layers' update"
    ),
    limits=(
        "The formula is about one batch norm and the gradient that comes to it, not about the same "
        "network without one. Covariate shift and curvature are measured at other points and rates "
        "in each arm and set no verdict."
    ),
    run=run,
    draw=draw,
)
