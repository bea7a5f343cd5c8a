"""Claim 19: batch norm removes what an update does beyond its first order."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bn_jax.lab.experiments.figures import band
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import normalize_batch
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.statistics import relative_error
from bn_jax.lab.experiments.sweeps import cross_entropy, load_parts
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
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTHS = 2, 4, 8, 16
SHALLOW, DEEP = DEPTHS[0], DEPTHS[-1]
# The chain y = x w1 ... wl: its examples, the deviation of its weights from 1, and the steps.
EXAMPLES, SPREAD = 256, 0.1
STEPS = 0.001, 0.01, 0.1
TOLERANCE = 1e-10
# The MLP on digits: its width, and the examples of the loss.
WIDTH, BATCH_SIZE = 32, 256
GRID = np.geomspace(1e-4, 100, 61)
EPSILON = 1e-5
FAILS = 0.5


class Change(NamedTuple):
    """The change of a function by an update of its parameters.

    Attributes:
        total: the change.
        first: the part that is linear in the update.
    """

    total: Any
    first: Any

    @property
    def beyond(self) -> Any:
        """The norm of the change beyond the first order, over that of the first order."""
        return jnp.linalg.norm(self.total - self.first) / jnp.linalg.norm(self.first)


def change(function: Callable[[Any], jax.Array], params: Any, update: Any) -> Change:
    """Compares the change of a function with its first order.

    Args:
        function: of the parameters.
        params: where it starts, a tree.
        update: what is added, a tree like `params`.

    Returns:
        The change, and its first order, shaped as the function's result.

    Example:
        >>> import jax.numpy as jnp
        >>> from bn_jax.lab.experiments.high_order_effects import change
        >>> product = change(lambda w: w[0] * w[1], jnp.ones(2), jnp.array([-0.1, -0.1]))
        >>> round(float(product.first), 2), round(float(product.total), 2)
        (-0.2, -0.19)
    """
    before, first = jax.jvp(function, (params,), (update,))
    return Change(function(jax.tree.map(jnp.add, params, update)) - before, first)


def chain(weights: jax.Array, x: jax.Array, depth: Any, *, normalize: bool) -> jax.Array:
    """Computes ``y = x w1 ... wl``, a network of one unit per layer.

    Args:
        weights: [layers].
        x: [n].
        depth: the number l of weights that are used, an integer.
        normalize: whether to normalize the input of every weight.

    Returns:
        [n].
    """

    def apply(x: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        index, weight = given
        normalized = normalize_batch(x[:, None])[:, 0] if normalize else x
        return jnp.where(index < depth, normalized * weight, x), None

    return jax.lax.scan(apply, x, (jnp.arange(len(weights)), weights))[0]


class ChainErrors(NamedTuple):
    """The chain of one depth after one gradient step.

    Attributes:
        second: the error of the second order, relative to the textbook's formula.
        without: `Change.beyond` without norm at each of `STEPS`, [steps].
        with_norm: the same with batch norm.
    """

    second: Any
    without: Any
    with_norm: Any


def measure_chain(seed: jax.Array, depth: jax.Array) -> ChainErrors:
    """Measures a chain whose outputs are to shrink: the loss is the mean of ``y^2 / 2``.

    Args:
        seed: the seed of weights, near 1, and of the white input.
        depth: the number of weights, an integer of at most `DEEP`.
    """
    for_weights, for_input = jax.random.split(jax.random.key(seed))
    weights = 1 + SPREAD * jax.random.normal(for_weights, (DEEP,), jnp.float64)
    x = jax.random.normal(for_input, (EXAMPLES,), jnp.float64)

    def beyond(function: Callable[[jax.Array], jax.Array], gradient: jax.Array) -> jax.Array:
        return jax.vmap(lambda step: change(function, weights, -step * gradient).beyond)(
            jnp.asarray(STEPS)
        )

    def gradient_of(function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jax.grad(lambda weights: jnp.mean(function(weights) ** 2) / 2)(weights)

    plain = partial(chain, x=x, depth=depth, normalize=False)
    normalized = partial(chain, x=x, depth=depth, normalize=True)
    gradient = gradient_of(plain)
    used = jnp.arange(DEEP) < depth
    formula = second_order_formula(jnp.where(used, weights, 1), gradient) * x
    return ChainErrors(
        relative_error(_second_order(plain, weights, gradient) / 2, formula),
        beyond(plain, gradient),
        beyond(normalized, gradient_of(normalized)),
    )


def _second_order(
    function: Callable[[jax.Array], jax.Array], at: jax.Array, along: jax.Array
) -> jax.Array:
    """Returns the second derivative along a vector."""

    def first(at: jax.Array) -> jax.Array:
        return jax.jvp(function, (at,), (along,))[1]

    return jax.jvp(first, (at,), (along,))[1]


def second_order_formula(weights: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns the sum over all pairs of weights of ``g_i g_j`` times the product of the others.

    Times ``x lr^2``, it is the second-order part of the change of `chain` by a step at rate lr.

    Args:
        weights: [layers].
        gradient: [layers].

    Returns:
        A scalar.
    """
    ratios = gradient / weights
    pairs = (jnp.sum(ratios) ** 2 - jnp.sum(ratios**2)) / 2
    return pairs * jnp.prod(weights)


class Layer(NamedTuple):
    """The layer of an arm: ``scale * normalized + bias``, either of which may be left out."""

    normalize: bool
    scale: bool


ARMS = {
    "batch norm": Layer(normalize=True, scale=True),
    "no norm": Layer(normalize=False, scale=False),
    "affine only": Layer(normalize=False, scale=True),
}


def init_network(key: jax.Array, features: int, num_classes: int = 10) -> dict[str, jax.Array]:
    """Draws the weights of `network` for the largest depth, by He's normal distribution.

    Args:
        key: a PRNG key.
        features: of the input, at least `WIDTH`.
        num_classes: the number of logits.

    Returns:
        Kernels, scales and biases of all layers, and a classifier.
    """
    for_first, for_others, for_classifier = jax.random.split(key, 3)
    normal = jax.random.normal
    return {
        "first": normal(for_first, (features, WIDTH)) * np.sqrt(2 / features),
        "kernel": normal(for_others, (DEEP - 1, WIDTH, WIDTH)) * np.sqrt(2 / WIDTH),
        "scale": jnp.ones((DEEP, WIDTH)),
        "bias": jnp.zeros((DEEP, WIDTH)),
        "classifier": normal(for_classifier, (WIDTH, num_classes)) / np.sqrt(WIDTH),
    }


def network(params: Mapping[str, jax.Array], x: jax.Array, depth: Any, layer: Layer) -> jax.Array:
    """Computes the logits of an MLP whose depth can be traced, so that all depths are one program.

    Args:
        params: as of `init_network`.
        x: [n, features].
        depth: the number of hidden layers, an integer from 1 to `DEEP`.
        layer: what follows each hidden kernel, before the ReLU.

    Returns:
        [n, num_classes].
    """

    def apply(x: jax.Array, kernel: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        x, scale, bias = x @ kernel, scale[None], bias[None]
        x = normalize_batch(x, epsilon=EPSILON) if layer.normalize else x
        return jax.nn.relu(x * scale + bias if layer.scale else x + bias)

    def apply_if_used(x: jax.Array, given: Any) -> tuple[jax.Array, None]:
        index, *of_layer = given
        return jnp.where(index < depth, apply(x, *of_layer), x), None

    x = apply(x, params["first"], params["scale"][0], params["bias"][0])
    others = (params["kernel"], params["scale"][1:], params["bias"][1:])
    x, _ = jax.lax.scan(apply_if_used, x, (jnp.arange(1, DEEP), *others))
    return x @ params["classifier"]


class Step(NamedTuple):
    """A gradient step of the MLP.

    Attributes:
        beyond: `Change.beyond` of the logits at the rates of `GRID`, [rates].
        decrease: of the loss, over that predicted to first order, [rates].
        loss: before the step.
        slope: the squared norm of the gradient, the decrease of the loss per rate.
    """

    beyond: Any
    decrease: Any
    loss: Any
    slope: Any


def measure_step(
    seed: jax.Array,
    depth: jax.Array,
    x: jax.Array,
    y: jax.Array,
    layer: Layer,
    num_classes: int = 10,
) -> Step:
    """Follows the loss along the gradient of a network at its start.

    Args:
        seed: of its weights.
        depth: its hidden layers.
        x: the examples, [n, features].
        y: their labels, [n].
        layer: of `network`.
        num_classes: the number of logits.
    """
    params = init_network(jax.random.key(seed), x.shape[-1], num_classes)
    logits_of = partial(network, x=x, depth=depth, layer=layer)
    loss, gradient = jax.value_and_grad(lambda params: cross_entropy(logits_of(params), y))(params)
    slope = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient))
    logits, first = jax.jvp(logits_of, (params,), (gradient,))

    def at_rate(rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        moved = logits_of(jax.tree.map(lambda leaf, slope: leaf - rate * slope, params, gradient))
        of_logits = Change(moved - logits, -rate * first)
        return of_logits.beyond, (loss - cross_entropy(moved, y)) / (rate * slope)

    beyond, decrease = jax.lax.map(at_rate, jnp.asarray(GRID))
    return Step(beyond, decrease, loss, slope)


def failing_rate(decrease: Any) -> Any:
    """Finds the rate from which on the first-order prediction of the loss is off by half.

    Args:
        decrease: the decrease of the loss over its prediction at the rates of `GRID`, [..., rates].

    Returns:
        The first rate at which it is below one half, interpolated between logarithms, [...]; NaN
        where there is none, or where it is the first of the grid, whose differences are rounding.
    """
    decrease = np.nan_to_num(np.asarray(decrease, np.float64), nan=-np.inf)
    fails = decrease < FAILS
    place = fails.argmax(-1)
    before = np.maximum(place - 1, 0)
    high = np.take_along_axis(decrease, before[..., None], -1)[..., 0]
    low = np.maximum(np.take_along_axis(decrease, place[..., None], -1)[..., 0], -1e3)
    share = np.where(place > 0, (high - FAILS) / np.maximum(high - low, 1e-12), np.nan)
    rate = GRID[before] * (GRID[1] / GRID[0]) ** share
    return np.where(fails.any(-1), rate, np.nan)


def measure_networks(setting: Setting, arms: Iterable[str] = tuple(ARMS)) -> dict[str, Step]:
    """Measures a step of some arms at every depth, each array [depths, seeds, ...]."""
    train = load_parts(setting).train
    x, y = train.x[:, :BATCH_SIZE], train.y[:, :BATCH_SIZE]
    depths = np.repeat(np.asarray(DEPTHS, np.int32), setting.seeds)
    places = np.tile(np.arange(setting.seeds), len(DEPTHS))
    steps = {}
    for arm in arms:
        run = partial(measure_step, layer=ARMS[arm], num_classes=setting.num_classes)
        found = map_runs(run, setting.chosen[places], depths, x[places], y[places])
        steps[arm] = Step(
            *(
                np.asarray(leaf, np.float64).reshape(len(DEPTHS), setting.seeds, *leaf.shape[1:])
                for leaf in found
            )
        )
        setting.advance(0.1)
    return steps


def measure_chains(setting: Setting) -> dict[int, ChainErrors]:
    """Measures the chain of every depth, each array [seeds, ...]."""
    with jax.enable_x64(True):
        of_seeds = jax.vmap(measure_chain, (0, None))
        found = jax.jit(jax.vmap(of_seeds, (None, 0)))(setting.chosen, np.asarray(DEPTHS))
        return {
            depth: ChainErrors(*(np.asarray(leaf[index]) for leaf in found))
            for index, depth in enumerate(DEPTHS)
        }


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    chains = measure_chains(setting)
    setting.advance(0.1)
    steps = measure_networks(setting)
    rates = {arm: failing_rate(step.decrease) for arm, step in steps.items()}
    predicted = {arm: rates[arm] * step.slope / step.loss for arm, step in steps.items()}
    at_steps = {step: int(np.abs(np.log(GRID / step)).argmin()) for step in STEPS}
    beyond = {arm: step.beyond for arm, step in steps.items()}

    def with_over_without(values: Mapping[str, Any]) -> dict[str, Any]:
        of_depth = values["batch norm"] / values["no norm"]
        return {f"depth {depth}": of_depth[index] for index, depth in enumerate(DEPTHS)}

    return Result(
        values={
            "19a": {f"depth {depth}": of_depth.second for depth, of_depth in chains.items()},
            "19b": {
                f"step {step:g}": chains[DEEP].without[:, index] / chains[SHALLOW].without[:, index]
                for index, step in enumerate(STEPS)
            },
            "19c": {
                f"depth {depth}": of_depth.with_norm.max(-1) for depth, of_depth in chains.items()
            },
            "19d": {
                f"step {step:g}": beyond["no norm"][-1, :, at] / beyond["no norm"][0, :, at]
                for step, at in at_steps.items()
            },
            "19e": with_over_without(
                {arm: of_arm[..., at_steps[STEPS[-1]]] for arm, of_arm in beyond.items()}
            ),
            "19f": with_over_without(rates),
            "19g": with_over_without(predicted),
        },
        curves={
            "chain": {
                arm: [getattr(chains[depth], field)[:, -1] for depth in DEPTHS]
                for arm, field in (("no norm", "without"), ("batch norm", "with_norm"))
            },
            "decrease": {
                f"{arm}, depth {depth}": of_arm.decrease[index].T
                for arm, of_arm in steps.items()
                for index, depth in ((0, SHALLOW), (-1, DEEP))
            },
            "rate": rates,
        },
        series=[
            Series(key, arm, f"depth {depth}", of_arm[index])
            for key, values in (("19f", rates), ("19g", predicted))
            for arm, of_arm in values.items()
            for index, depth in enumerate(DEPTHS)
        ],
        splits=dict.fromkeys(("19d", "19e", "19f", "19g"), setting.labelled.sample(BATCH_SIZE)),
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the chain by depth, the loss along the gradient, and where its prediction fails."""
    by_depth, by_rate, failing = figure.subplots(1, 3)
    colors = {arm: f"C{index}" for index, arm in enumerate(ARMS)}
    for arm, values in curves["chain"].items():
        band(by_depth, DEPTHS, values, arm, marker="o", color=colors[arm])
    by_depth.plot(
        DEPTHS,
        beyond_at_unit_weights(DEPTHS),
        color="gray",
        linestyle=":",
        zorder=3,
        label="all weights 1",
    )
    by_depth.set(
        xlabel="weights in y = x w1 ... wl",
        ylabel=f"change beyond first order, step {STEPS[-1]:g}",
    )
    by_depth.legend(fontsize="small")
    for arm, depth in itertools.product(ARMS, (SHALLOW, DEEP)):
        values = np.asarray(curves["decrease"][f"{arm}, depth {depth}"], np.float64)
        line = "-" if depth == DEEP else "--"
        name = f"{arm}, {depth} layers"
        by_rate.plot(GRID, np.nanmedian(values, 1), line, color=colors[arm], label=name)
    by_rate.axhline(FAILS, color="gray", linewidth=0.8)
    by_rate.set(
        xscale="log",
        ylim=(-0.25, 1.9),
        xlabel="learning rate of a step",
        ylabel="decrease of the loss over its prediction\n(median)",
    )
    by_rate.set_yticks([0, 0.5, 1])
    by_rate.legend(fontsize="x-small", loc="upper right")
    for arm in ARMS:
        values = np.log10(np.asarray(curves["rate"][arm], np.float64))
        band(failing, DEPTHS, values, arm, marker="o", color=colors[arm])
    failing.set(xlabel="hidden layers", ylabel=r"$\log_{10}$ of the rate where it fails by half")
    failing.legend(fontsize="small")
    for axes in (by_depth, failing):
        axes.set_xscale("log", base=2)
        axes.set_xticks(DEPTHS, list(map(str, DEPTHS)))


def beyond_at_unit_weights(depths: Any, step: float = STEPS[-1]) -> Any:
    """Returns the change of `chain` beyond its first order, over it, if all weights are 1.

    Then the gradient of each is the second moment of `x`, here 1, and the change is
    ``(1 - step)^l - 1``.

    Args:
        depths: the numbers l of weights.
        step: the learning rate.
    """
    first = -step * np.asarray(depths, np.float64)
    return np.abs((1 - step) ** np.asarray(depths) - 1 - first) / np.abs(first)


STEPS_TEXT = ", ".join(f"{step:g}" for step in STEPS)
EXPERIMENT = Experiment(
    number=19,
    name="high_order_effects",
    claim="An update changes a deep network beyond its first order, and batch norm removes that",
    source="Goodfellow et al. 2016, section 8.7.1",
    sub_claims=(
        SubClaim(
            "19a",
            "second-order term",
            "the second order of the change of y = x w1 ... wl is lr^2 x times the sum over all "
            "pairs of g_i g_j and the product of the other weights",
            "relative error",
            Identity(TOLERANCE),
            Published("lr^2 g_1 g_2 w_3 ... w_l", "V"),
        ),
        SubClaim(
            "19b",
            "it grows with depth",
            "the change of y = x w1 ... wl beyond its first order grows with depth",
            f"that change over the first order, {DEEP} over {SHALLOW} weights",
            Above(1.0),
            scale="ratio",
        ),
        SubClaim(
            "19c",
            "a norm removes it",
            "with a norm before each weight, y = x w1 ... wl changes by its first order alone",
            "change beyond the first order over the first order, at the worst step",
            Identity(TOLERANCE),
            Published("lower layers have no effect", "V"),
        ),
        SubClaim(
            "19d",
            "MLP: grows with depth",
            "the change of an MLP's logits beyond their first order grows with depth",
            f"that change over the first order, without norm, {DEEP} over {SHALLOW} layers",
            Above(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "19e",
            "MLP: a norm reduces it",
            "at the same rate, it is smaller with batch norm",
            f"that change over the first order at rate {STEPS[-1]:g}, with over without",
            Below(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "19f",
            "MLP: larger steps",
            "the first-order prediction of the loss fails by half at a larger rate with batch norm",
            "rate at which the loss falls by half of its prediction, with over without",
            Above(1.0),
            scale="ratio",
            is_resplit=True,
        ),
        SubClaim(
            "19g",
            "MLP: longer predictions",
            "with batch norm, a larger part of the loss is gone where the prediction fails by half",
            "predicted decrease at that rate over the loss, with over without",
            Above(1.0),
            scale="ratio",
            is_resplit=True,
        ),
    ),
    protocol=(
        "y = x w1 ... wl in float64, l = 2 to 16, weights near 1, one gradient step that shrinks y "
        f"at {STEPS_TEXT}; MLP of 2 to 16 layers of {WIDTH} ReLU units on {BATCH_SIZE} digits at "
        "its start, with batch norm, with scale and bias alone, and without; the loss along its "
        "gradient at 61 rates"
    ),
    limits=(
        "One step from the initial weights, plain gradient descent, and one batch. In a chain of "
        "one unit per layer a norm leaves nothing to the lower weights; in wider networks it "
        "leaves the directions of the features."
    ),
    run=run,
    draw=draw,
    easy="The textbook's example: its second-order term, and that a norm removes all high orders.",
    hard=(
        "In an MLP, batch norm removes high orders only where it is shallow: at 16 layers, where "
        "gradients explode behind norms, the first-order prediction fails at a smaller rate."
    ),
    data=Needs(trained=BATCH_SIZE),
)
