"""Claim 26: scale and bias of a norm can be absorbed into a convolution after it, or not."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax._fold import absorb_scale, as_affine, fold
from bn_jax.lab.experiments.figures import PERCENT, points
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM
from bn_jax.lab.experiments.statistics import relative_error
from bn_jax.lab.experiments.sweeps import (
    Part,
    State,
    Trial,
    draw_trials,
    make_step,
    share_correct,
    start,
    take,
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
)
from bn_jax.lab.models import apply_norm
from bn_jax.linen import BatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Padding = Literal["SAME", "VALID"]

EXAMPLES, SIZE, FEATURES, OUTPUTS, KERNEL = 8, 6, 4, 5, 3
TOLERANCE = 1e-9
# The trained network.
CHANNELS, BATCH_SIZE, RATE = 8, 64, 0.1
# The smallest error at the border that matters, over the deviation of the convolution's output.
MATTERS = 0.1


def convolve(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """Convolves [n, height, width, features], padding with zeros if `padding` is "SAME"."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Absorbed(NamedTuple):
    """A norm in the convolution after it.

    Attributes:
        kernel: the kernel, each input times `a`.
        bias: `b` times the kernel, [outputs].
    """

    kernel: jax.Array
    bias: jax.Array


def absorb(a: jax.Array, b: jax.Array, kernel: jax.Array) -> Absorbed:
    """Puts ``a x + b`` into a convolution's kernel [height, width, features, outputs]."""
    scaled = kernel * a[None, None, :, None]
    return Absorbed(scaled, jnp.einsum("hwio,i->o", kernel, b))


def apply_affine(a: jax.Array, x: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ``a x + b`` of [n, height, width, features]."""
    return _of_images(a) * x + _of_images(b)


def _of_images(values: jax.Array) -> jax.Array:
    return values[None, None, None]


class Drawn(NamedTuple):
    """Random values in float64: a norm, the convolution after it, and its input.

    Attributes:
        params: of the norm.
        stats: its running statistics.
        kernel: of the convolution.
        x: [n, height, width, features].
    """

    params: Any
    stats: Any
    kernel: Any
    x: Any


def draw_values(seed: int) -> Drawn:
    """Draws the values of the identities."""
    generator = np.random.default_rng([4, seed])
    normal = generator.normal
    return Drawn(
        {"scale": normal(size=FEATURES), "bias": normal(size=FEATURES)},
        {"mean": normal(size=FEATURES), "var": generator.uniform(0.5, 2, FEATURES)},
        normal(size=(KERNEL, KERNEL, FEATURES, OUTPUTS)),
        normal(size=(EXAMPLES, SIZE, SIZE, FEATURES)),
    )


def algebra(drawn: Drawn) -> dict[str, Any]:
    """Compares what absorbing gives with norm and padded convolution.

    Args:
        drawn: the values.

    Returns:
        By the key of a sub-claim and by setting, the largest difference over the largest value.
    """
    params, stats, kernel, x = drawn
    a, b = as_affine(params, stats)
    expected = convolve(apply_affine(a, x, b), kernel, "SAME")
    absorbed = absorb(a, b, kernel)
    bias = _of_images(absorbed.bias)
    naive = convolve(x, absorbed.kernel, "SAME") + bias
    # What the padding has too much: the bias of the taps that are outside of the image.
    of_position = convolve(jnp.broadcast_to(_of_images(b), x.shape), kernel, "SAME")
    zero = _of_images(-b / a)
    filled = jnp.pad(x - zero, [(0, 0), (1, 1), (1, 1), (0, 0)]) + zero
    inside = slice(None), slice(1, -1), slice(1, -1)

    def absorbed_scale(activation: Any) -> jax.Array:
        after = activation or (lambda z: z)
        moved, scaled = absorb_scale(params, kernel, activation=activation)
        new_a, new_b = as_affine(moved, stats)
        return relative_error(
            convolve(after(apply_affine(new_a, x, new_b)), scaled, "SAME"),
            convolve(after(apply_affine(a, x, b)), kernel, "SAME"),
        )

    return {
        "26b": relative_error(naive[inside], expected[inside]),
        "26c": relative_error(naive - expected, bias - of_position),
        "26d": {
            "padding with -b / a": relative_error(
                convolve(filled, absorbed.kernel, "VALID") + bias, expected
            ),
            "a bias for each position": relative_error(
                convolve(x, absorbed.kernel, "SAME") + of_position, expected
            ),
        },
        "26e": {
            "no activation": absorbed_scale(None),
            "ReLU between": absorbed_scale(nn.relu),
        },
    }


def folding_errors(setting: Setting, *, norm_first: bool, padding: Padding) -> Any:
    """Folds a norm with random parameters and statistics into the convolution beside it.

    Args:
        setting: the seeds: of the inputs, and the first also of the variables.
        norm_first: whether the norm is before the convolution.
        padding: of the convolution.

    Returns:
        The largest difference of the outputs over the largest output, [seeds]; not-a-number if the
        norm went where `bn_jax.fold` says that it cannot go, or did not go where it can.
    """
    norm = BatchNorm(use_running_average=True, dtype=jnp.float64, param_dtype=jnp.float64)
    convolution = nn.Conv(
        FEATURES, (KERNEL, KERNEL), padding=padding, dtype=jnp.float64, param_dtype=jnp.float64
    )
    layers = [norm, convolution] if norm_first else [convolution, norm]
    model = nn.Sequential(layers)
    inputs = [draw_values(int(seed)).x for seed in setting.chosen]
    generator = np.random.default_rng([5, setting.first_seed])
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(generator.uniform(0.5, 2, leaf.shape)),
        jax.eval_shape(model.init, jax.random.key(0), inputs[0]),
    )
    folded = fold(model.apply, variables, inputs[0])
    is_inside = all(one.into is not None for one in folded.report)
    if is_inside == (norm_first and padding == "SAME"):
        return np.full(setting.seeds, np.nan)
    outputs = [(folded.apply(folded.params, x), model.apply(variables, x)) for x in inputs]
    return np.array([relative_error(*map(np.asarray, of_both)) for of_both in outputs])


def identities(setting: Setting) -> dict[str, Any]:
    """Measures all errors, in float64.

    Args:
        setting: the seeds, and the size of the run.

    Returns:
        By the key of a sub-claim and by setting, [seeds].
    """
    with jax.enable_x64(True):
        drawn = [draw_values(int(seed)) for seed in setting.chosen]
        drawn = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
        errors = jax.tree.map(np.asarray, jax.jit(jax.vmap(algebra))(drawn))
        folding = partial(folding_errors, setting)
        return {
            **errors,
            "26a": folding(norm_first=True, padding="VALID"),
            "26f": {
                "norm after the convolution": folding(norm_first=False, padding="SAME"),
                "norm before it, left": folding(norm_first=True, padding="SAME"),
            },
        }


class Net(nn.Module):
    """A convolution, ReLU, a norm, a padded convolution, ReLU, means and a classifier.

    Attributes:
        num_classes: the number of logits.
    """

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits [n, num_classes] of [n, height, width, channels]."""
        x = nn.relu(nn.Conv(CHANNELS, (KERNEL, KERNEL), name="below")(x))
        x = apply_norm(BATCH_NORM, x, train, None, None)
        x = nn.relu(nn.Conv(CHANNELS, (KERNEL, KERNEL), name="above")(x))
        return nn.Dense(self.num_classes, name="classifier")(x.reshape(len(x), -1))


def train_net(model: Net, trial: Trial) -> Any:
    """Trains a network, with a call for every step: on a CPU, convolutions in a loop are slow.

    Args:
        model: the network.
        trial: of one seed, with images.

    Returns:
        The variables.
    """
    optimizer = optax.sgd(RATE, momentum=0.9)
    variables = model.init(jax.random.key(trial.seed), trial.digits.train.x[:1], train=False)
    state = start(optimizer, variables)
    for batch in trial.batches:
        state = _step(model, state, trial.digits.train, batch)
    return state.variables


@partial(jax.jit, static_argnums=0)
def _step(model: Net, state: State, part: Part, batch: jax.Array) -> State:
    return make_step(model, optax.sgd(RATE, momentum=0.9), part)(state, batch)[0]


class Evaluated(NamedTuple):
    """A trained network with its norm, and with the norm absorbed although there is padding.

    Attributes:
        accuracy: with the norm, in percent.
        absorbed: with the norm absorbed.
        error: the root mean square error of the convolution by position, over the deviation of its
            output, [height, width].
    """

    accuracy: Any
    absorbed: Any
    error: Any


@jax.jit
def evaluate(variables: Any, part: Part) -> Evaluated:
    """Compares a trained `Net` with itself after absorbing its norm.

    Args:
        variables: of the network.
        part: the examples.
    """
    params = variables["params"]
    kernel, bias = params["above"]["kernel"], _of_images(params["above"]["bias"])
    below = params["below"]
    x = nn.relu(convolve(part.x, below["kernel"], "SAME") + _of_images(below["bias"]))
    a, b = as_affine(params["norm"], variables["batch_stats"]["norm"])
    expected = convolve(apply_affine(a, x, b), kernel, "SAME") + bias
    absorbed = absorb(a, b, kernel)
    naive = convolve(x, absorbed.kernel, "SAME") + _of_images(absorbed.bias) + bias

    def correct(outputs: jax.Array) -> jax.Array:
        features = nn.relu(outputs).reshape(len(outputs), -1)
        classifier = params["classifier"]
        logits = features @ classifier["kernel"] + classifier["bias"][None]
        return 100 * share_correct(logits, part.y)

    error = jnp.sqrt(jnp.mean((naive - expected) ** 2, (0, 3))) / expected.std()
    return Evaluated(correct(expected), correct(naive), error)


def train_each(setting: Setting) -> Evaluated:
    """Trains and compares the network of every seed; leading axes [seeds]."""
    trials = draw_trials(setting, 20 if setting.quick else 100, BATCH_SIZE)

    model, shape = Net(setting.num_classes), setting.labelled.image_shape

    def of_seed(seed: int) -> Evaluated:
        trial = take(trials, seed)
        parts = (Part(part.x.reshape(-1, *shape), part.y) for part in trial.digits)
        trial = jax.device_put(trial._replace(digits=type(trial.digits)(*parts)))
        return jax.device_get(evaluate(train_net(model, trial), trial.digits.test))

    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(of_seed, range(setting.seeds)))


def at_border(error: Any) -> Any:
    """Returns the root mean square over the border of errors by position, [..., height, width]."""
    is_border = np.ones(np.shape(error)[-2:], bool)
    is_border[1:-1, 1:-1] = False
    return np.sqrt(np.mean(np.asarray(error)[..., is_border] ** 2, -1))


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    errors = identities(setting)
    setting.advance(0.4)
    trained = train_each(setting)
    setting.advance(0.6)
    accuracies = {"norm": trained.accuracy, "absorbed": trained.absorbed}
    return Result(
        values={
            **errors,
            "26g": at_border(trained.error),
            "26h": trained.absorbed.astype(np.float64) - trained.accuracy,
        },
        curves={"error": trained.error.mean(0), "accuracy": accuracies, "identities": errors},
        series=[Series("26h", arm, "", values) for arm, values in accuracies.items()],
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the error by position, the accuracies, and the errors of what is exact."""
    by_position, by_arm, exact = figure.subplots(1, 3, width_ratios=(4, 2, 5))
    shown = by_position.imshow(100 * np.asarray(curves["error"], float), cmap="magma_r", vmin=0)
    by_position.set(xticks=(), yticks=(), xlabel="position in the image")
    figure.colorbar(shown, ax=by_position, label="error of absorbing (% of the deviation)")
    arms = curves["accuracy"]
    points(by_arm, range(len(arms)), np.asarray(list(arms.values()), float))
    by_arm.set_xticks(range(len(arms)), arms)
    by_arm.set(ylabel="test accuracy (%)", ylim=(None, PERCENT[1]), xlim=(-0.5, len(arms) - 0.5))
    labels = {one.key: one.label for one in EXPERIMENT.sub_claims}
    names, values = [], []
    for key, of_key in sorted(curves["identities"].items()):
        for setting, errors in (of_key if isinstance(of_key, Mapping) else {"": of_key}).items():
            names.append(f"{key} {setting or labels[key]}")
            values.append(max(np.max(np.asarray(errors, float)), 1e-17))
    exact.plot(values, range(len(names)), "o")
    exact.set_yticks(range(len(names)), names, fontsize="x-small")
    exact.axvline(TOLERANCE, color="gray", linestyle=":", zorder=5)
    exact.set(xscale="log", xlim=(1e-18, 1e-6), xlabel="largest relative error")
    exact.invert_yaxis()


EXPERIMENT = Experiment(
    number=26,
    name="absorption_with_padding",
    claim="A norm can be absorbed into the convolution after it, if there is no padding",
    source="Jacob et al. 2018; Nagel et al. 2019",
    sub_claims=(
        SubClaim(
            "26a",
            "no padding",
            "without padding, a norm goes into the convolution after it",
            "relative error of the folded output",
            Identity(TOLERANCE),
            Published("(a x + b) W = x (a W) + b W", "D"),
        ),
        SubClaim(
            "26b",
            "padding, inside",
            "with padding, absorbing is exact where the kernel does not reach the border",
            "relative error of the output inside",
            Identity(TOLERANCE),
            Published("(a x + b) W = x (a W) + b W", "D"),
        ),
        SubClaim(
            "26c",
            "padding, at the border",
            "at the border, the error is b times the weights outside of the image",
            "relative error of that formula",
            Identity(TOLERANCE),
            Published("sum of b W over the padding", "D"),
        ),
        SubClaim(
            "26d",
            "two exact ways",
            "with -b / a as padding, or a bias for each position, absorbing is exact at the border",
            "relative error of the output",
            Identity(TOLERANCE),
            Published("a (-b / a) + b = 0", "D"),
        ),
        SubClaim(
            "26e",
            "the scale goes anyway",
            "with padding too, the size of the scale goes into the convolution after the norm",
            "relative error of the output",
            Identity(TOLERANCE),
            Published("relu(g z) = g relu(z), and g 0 = 0", "D"),
        ),
        SubClaim(
            "26f",
            "bn_jax.fold, padding",
            "with padding, a norm after a convolution is folded, and one before it stays, exactly",
            "relative error of the folded output",
            Identity(TOLERANCE),
            Published("y = a (x W) + b", "D"),
        ),
        SubClaim(
            "26g",
            "the border's error",
            "in a trained network, the error of absorbing at the border is not small",
            "error at the border over the deviation of the convolution's output",
            Above(MATTERS),
            reason="ours: a tenth of the deviation",
            is_resplit=True,
        ),
        SubClaim(
            "26h",
            "what it costs",
            "absorbing a norm before a padded convolution costs accuracy",
            "test accuracy, absorbed minus with the norm (points)",
            Below(0.0),
            is_resplit=True,
        ),
    ),
    protocol=(
        "random norms and 3x3 convolutions in float64, by absorb_scale, as_affine and fold; a "
        "network of two 3x3 convolutions with a norm between ReLU and the second, trained on "
        "digits for 100 steps, tested with the norm absorbed as if there were no padding"
    ),
    limits=(
        "On images of 8x8, 44 % of the positions are at the border of a 3x3 convolution; on larger "
        "images their share, and with it the cost, is smaller."
    ),
    run=run,
    draw=draw,
    easy="The algebra: it says exactly what the padding lacks.",
    hard="The cost: an error of a third of a deviation at the border changes few answers.",
    data=Needs(trained=BATCH_SIZE, side=KERNEL),
)
