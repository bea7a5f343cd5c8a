"""Claim 32: scale and bias by class tell a generator which class to draw."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import points
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM, MLP
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.selection import Chosen, Outcome, accuracies, sweep_rates
from bn_jax.lab.experiments.statistics import relative_error
from bn_jax.lab.experiments.sweeps import (
    Digits,
    Part,
    Trial,
    draw_trials,
    load_parts,
    share_correct,
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
from bn_jax.linen import BatchNorm, DomainBatchNorm, split_batch_norms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOISE = 16
WIDTHS = 64, 64
# Images of each class in a batch, and those of each class to measure with.
IN_BATCH, DRAWN = 16, 64
STEPS, STEPS_OF_ROW = 600, 300
# A quick run makes fewer steps.
QUICK = 20
MOMENTUM = 0.9
RATES = 0.001, 0.003, 0.01
RATES_OF_ROW = 0.003, 0.01, 0.03
CLASSIFIER_RATES = 0.1, 0.3, 1.0, 3.0
ARMS = CONDITIONAL, CONCATENATED, NOWHERE, SHUFFLED, STATISTICS = (
    "scale and bias by class",
    "class at the input",
    "no class",
    "shuffled classes",
    "statistics by class",
)
# Two generators that were trained without the new class.
OF_NEW = LEARNED, AVERAGE = "row of a new class", "average of the other rows"
REAL = "real images"
# All in points: half of the way from chance to certainty, and margins.
ARRIVES, NO_WORSE, AS_TOGETHER, NOTHING = 45.0, 2.0, 10.0, 3.0
TOLERANCE = 1e-11


class Generator(nn.Module):
    """Dense layers with norms that draw images from noise.

    Attributes:
        features: pixels of an image.
        num_classes: the number of classes.
        arm: a name in `ARMS`, which says how the class enters.
        widths: features of the hidden layers.
    """

    features: int
    num_classes: int
    arm: str = CONDITIONAL
    widths: tuple[int, ...] = WIDTHS

    @nn.compact
    def __call__(self, noise: jax.Array, classes: jax.Array, train: bool) -> jax.Array:
        """Draws images [n, features] of classes [n] from noise [n, NOISE]."""
        x = noise
        if self.arm == CONCATENATED:
            x = jnp.concatenate([x, jax.nn.one_hot(classes, self.num_classes, dtype=x.dtype)], -1)
        for index, width in enumerate(self.widths):
            x = nn.Dense(width, False, kernel_init=nn.initializers.he_normal())(x)
            x = nn.relu(self._normalized(x, classes, train, f"norm{index}"))
        return nn.Dense(self.features)(x)

    def _normalized(self, x: jax.Array, classes: jax.Array, train: bool, name: str) -> jax.Array:
        if self.arm in (CONCATENATED, NOWHERE):
            return BatchNorm(momentum=MOMENTUM, name=name)(x, use_running_average=not train)
        by_class = DomainBatchNorm(
            num_domains=self.num_classes,
            share_params=self.arm == STATISTICS,
            share_stats=self.arm != STATISTICS,
            momentum=MOMENTUM,
            name=name,
        )
        return by_class(x, classes, use_running_average=not train)


def pairwise(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the distances of rows, [..., n, m], of [..., n, features] and [..., m, features]."""
    squares = jnp.sum(x**2, -1)[..., :, None] + jnp.sum(y**2, -1)[..., None, :]
    squares = squares - 2 * x @ jnp.swapaxes(y, -1, -2)
    # The root has no derivative at zero, the distance of an image from itself.
    return jnp.sqrt(jnp.maximum(squares, 0) + 1e-6)


def _mean_of_pairs(distances: jax.Array) -> jax.Array:
    """Returns the mean of distances [..., n, n] without the diagonal."""
    n = distances.shape[-1]
    inner = jnp.sum(distances, (-2, -1)) - jnp.trace(distances, axis1=-2, axis2=-1)
    return inner / (n * (n - 1))


def loss(real: jax.Array, drawn: jax.Array) -> jax.Array:
    """Returns the mean energy distance of the classes, up to a constant.

    It is least where drawn and real images, [classes, n, features], have the same distribution.

    Reference: Székely & Rizzo 2013, "Energy statistics: A class of statistics based on distances".
    """
    across = jnp.mean(pairwise(real, drawn), (-2, -1))
    return jnp.mean(2 * across - _mean_of_pairs(pairwise(drawn, drawn)))


def energy_distances(part: Part, drawn: jax.Array) -> jax.Array:
    """Returns the energy distance of drawn images from the real ones of every class.

    Args:
        part: real images, x [n, features] and labels y [n].
        drawn: [classes, m, features].

    Returns:
        Distances [classes], without bias, so that they may be negative.
    """
    classes, number, features = drawn.shape
    is_of = jax.nn.one_hot(part.y, classes)
    counts = jnp.sum(is_of, 0)
    across = pairwise(jnp.asarray(part.x), drawn.reshape(-1, features))
    across = jnp.einsum("nc,ncm->c", is_of, across.reshape(-1, classes, number))
    real = pairwise(jnp.asarray(part.x), jnp.asarray(part.x))
    real = real - jnp.diag(jnp.diag(real))
    inner = jnp.einsum("nc,nm,mc->c", is_of, real, is_of) / (counts * (counts - 1))
    return 2 * across / (counts * number) - inner - _mean_of_pairs(pairwise(drawn, drawn))


def draw_rows(setting: Setting, labels: Any, classes: Any, steps: int, purpose: int) -> Any:
    """Draws batches with `IN_BATCH` examples of each of some classes, none twice in a batch.

    Args:
        setting: the seeds, and the size of the run.
        labels: of all examples, [seeds, n].
        classes: [seeds, classes].
        steps: the number of batches, [seeds, steps, classes, IN_BATCH]; fewer in a quick run.
        purpose: a number, for other batches than those of another purpose.
    """
    steps = steps // QUICK if setting.quick else steps

    def of_class(generator: np.random.Generator, examples: Any) -> Any:
        order = generator.random((steps, len(examples))).argsort(-1)
        return examples[order[:, :IN_BATCH]]

    of_seeds = []
    for seed, y, ones in zip(setting.chosen.tolist(), labels, classes, strict=True):
        generator = np.random.default_rng([purpose, seed])
        of_seeds.append(
            np.stack([of_class(generator, np.flatnonzero(y == one)) for one in ones], 1)
        )
    return np.stack(of_seeds).astype(np.int32)


def shuffle(setting: Setting, labels: Any) -> Any:
    """Shuffles the labels [seeds, n] of every seed."""
    each = zip(setting.chosen.tolist(), labels, strict=True)
    return np.stack([np.random.default_rng([31, seed]).permutation(y) for seed, y in each])


def draw_images(
    generator: Generator, variables: Any, key: jax.Array, classes: Any, number: int
) -> jax.Array:
    """Draws images in evaluation mode, [classes, number, features]."""
    noise = jax.random.normal(key, (len(classes) * number, NOISE))
    images: Any = generator.apply(variables, noise, jnp.repeat(classes, number), train=False)
    return images.reshape(len(classes), number, -1)


def train(
    generator: Generator,
    optimizer: optax.GradientTransformation,
    trial: Trial,
    classes: jax.Array,
    variables: Any = None,
) -> Any:
    """Trains a generator.

    Args:
        generator: the network.
        optimizer: of its parameters.
        trial: the seed, the real images, and the batches [steps, classes, IN_BATCH].
        classes: of the batches, [classes].
        variables: None: all parameters are trained, in training mode. Else those to begin from, in
            which nothing but scale and bias of these classes is trained, in evaluation mode.
    """
    x = jnp.asarray(trial.digits.train.x)
    labels = jnp.repeat(classes, IN_BATCH)
    key = jax.random.key(trial.seed)
    only = None if variables is None else _rows_of(variables["params"], classes)
    if variables is None:
        variables = generator.init(key, jnp.zeros((1, NOISE)), labels[:1], train=False)

    def step(carry: Any, given: Any) -> tuple[Any, None]:
        variables, state = carry
        number, rows = given
        noise = jax.random.normal(jax.random.fold_in(key, number), (len(labels), NOISE))

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            drawn, updated = generator.apply(
                {**variables, "params": params},
                noise,
                labels,
                train=only is None,
                mutable=["batch_stats"],
            )
            real = x[rows]
            return loss(real, drawn.reshape(real.shape)), updated

        gradients, updated = jax.grad(loss_of, has_aux=True)(variables["params"])
        if only is not None:
            gradients = jax.tree.map(jnp.multiply, gradients, only)
        updates, state = optimizer.update(gradients, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **updated, "params": params}, state), None

    batches = jnp.asarray(trial.batches)
    start = variables, optimizer.init(variables["params"])
    return jax.lax.scan(step, start, (jnp.arange(len(batches)), batches))[0][0]


def _rows_of(params: Any, classes: jax.Array) -> Any:
    """Returns a tree like params: 1 in the rows of some classes in scale and bias, 0 elsewhere."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return _of_norms(lambda leaf: leaf.at[classes].set(1.0), zeros)


def with_average_row(variables: Any, classes: jax.Array, new: Any) -> Any:
    """Gives a class the average of the scales and biases of other classes."""
    params = _of_norms(lambda leaf: leaf.at[new].set(leaf[classes].mean(0)), variables["params"])
    return {**variables, "params": params}


def _of_norms(change: Callable[[jax.Array], jax.Array], params: Any) -> Any:
    """Changes scale and bias of every norm, and returns all parameters."""
    return {
        layer: jax.tree.map(change, leaves) if layer.startswith("norm") else leaves
        for layer, leaves in params.items()
    }


def train_classifiers(setting: Setting) -> Chosen[Any]:
    """Trains a classifier for each seed; returns its variables, and test accuracies in percent."""
    model = MLP(num_classes=setting.num_classes, norm=BATCH_NORM)

    def run(rate: jax.Array, trial: Trial) -> Outcome[Any]:
        variables = train_trial(model, optax.sgd(rate), trial)
        found = accuracies(model, variables, trial.digits)
        return Outcome(found.validation, (variables, 100 * found.measured))

    trials = draw_trials(setting, 60 if setting.quick else 400, 64)
    return sweep_rates(run, CLASSIFIER_RATES, trials).best_for_each_seed()


def recognized(num_classes: int, classifier: Any, drawn: jax.Array) -> jax.Array:
    """Returns what share of images [classes, n, features] are recognized, in percent, [classes]."""
    model = MLP(num_classes=num_classes, norm=BATCH_NORM)

    def of_class(images: jax.Array, label: jax.Array) -> jax.Array:
        logits: Any = model.apply(classifier, images, train=False)
        return 100 * share_correct(logits, jnp.full(len(images), label))

    return jax.vmap(of_class)(drawn, jnp.arange(num_classes))


def _score(distances: jax.Array) -> jax.Array:
    """Returns what is largest where the mean distance is smallest, and finite."""
    return jnp.nan_to_num(-jnp.mean(distances), nan=-jnp.inf)


def train_arm(
    setting: Setting, digits: Digits, arm: str, classifiers: Any
) -> Chosen[dict[str, Any]]:
    """Trains the generators of an arm at every rate.

    Returns:
        At the rate that is best for all seeds: percentages "recognized" and the "distance" from
        the test part, [seeds, classes] each, and an image of each class.
    """
    classes = setting.num_classes
    generator = Generator(digits.train.x.shape[-1], classes, arm)
    every = jnp.arange(classes)
    labels = digits.train.y
    labels = shuffle(setting, labels) if arm == SHUFFLED else labels
    of_seeds = np.tile(every, (setting.seeds, 1))
    trials = Trial(setting.chosen, digits, draw_rows(setting, labels, of_seeds, STEPS, 32))

    def run(rate: jax.Array, trial: Trial, classifier: Any) -> Outcome[dict[str, jax.Array]]:
        variables = train(generator, optax.adam(rate), trial, every)
        key = jax.random.fold_in(jax.random.key(trial.seed), STEPS)
        drawn = draw_images(generator, variables, key, every, DRAWN)
        measured = {
            "recognized": recognized(classes, classifier, drawn),
            "distance": energy_distances(trial.digits.test, drawn),
            "images": drawn[:, 0],
        }
        return Outcome(_score(energy_distances(trial.digits.validation, drawn)), measured)

    rates = RATES[1:] if setting.quick else RATES
    return sweep_rates(run, rates, trials, classifiers).best_for_all_seeds()


class _New(NamedTuple):
    """The classes of a seed, one and the others, and batches of the one."""

    one: Any
    others: Any
    batches: Any


def train_new_class(
    setting: Setting, digits: Digits, classifiers: Any, rate: float
) -> Chosen[dict[str, Any]]:
    """Trains without one class, another for every seed, and then its scale and bias alone.

    Returns:
        At the rate that is best for all seeds, by `OF_NEW`, how often images of the new class are
        recognized, [seeds], in percent.
    """
    classes = setting.num_classes
    generator = Generator(digits.train.x.shape[-1], classes, CONDITIONAL)
    ones = (setting.chosen % classes)[:, None]
    others = np.stack([np.delete(np.arange(classes, dtype=np.int32), one) for one in ones])
    labels = digits.train.y
    trials = Trial(setting.chosen, digits, draw_rows(setting, labels, others, STEPS, 33))
    new = _New(ones, others, draw_rows(setting, labels, ones, STEPS_OF_ROW, 34))

    def train_others(trial: Trial, new: _New) -> Any:
        variables = train(generator, optax.adam(rate), trial, new.others)
        return with_average_row(variables, new.others, new.one[0])

    def run(
        rate: jax.Array, trial: Trial, new: _New, averaged: Any, classifier: Any
    ) -> Outcome[dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(trial.seed), STEPS)
        trial = trial._replace(batches=new.batches)
        learned = train(generator, optax.adam(rate), trial, new.one, averaged)
        drawn = {
            name: draw_images(generator, variables, key, jnp.arange(classes), DRAWN)
            for name, variables in zip(OF_NEW, (learned, averaged), strict=True)
        }
        one = new.one[0]
        measured = {name: recognized(classes, classifier, x)[one] for name, x in drawn.items()}
        distances = energy_distances(trial.digits.validation, drawn[LEARNED])
        return Outcome(_score(distances[one]), measured)

    averaged = map_runs(train_others, trials, new)
    rates = RATES_OF_ROW[1:] if setting.quick else RATES_OF_ROW
    return sweep_rates(run, rates, trials, new, averaged, classifiers).best_for_all_seeds()


def identity_errors(seeds: Any) -> Any:
    """Returns the largest relative difference between equal rows and a plain batch norm.

    Compares images in training mode, new running statistics, and the gradients of a loss, in which
    the rows of all classes add up to the gradient of the plain norm. In float64, [seeds].
    """
    classes, examples = 4, 20
    plain = Generator(5, classes, NOWHERE, (7, 6))

    def evaluate(generator: Generator, variables: Any, *inputs: Any) -> tuple[Any, Any]:
        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            given = {**variables, "params": params}
            drawn, updated = generator.apply(given, *inputs, True, mutable=["batch_stats"])
            return jnp.mean(jnp.sin(drawn)), (drawn, updated)

        gradients, outputs = jax.grad(loss_of, has_aux=True)(variables["params"])
        return gradients, outputs

    def of_seed(key: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, (examples, NOISE), jnp.float64)
        labels = jax.random.randint(key, (examples,), 0, classes)
        variables = plain.init(key, noise, labels, True)
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
        rows = split_batch_norms(variables, classes, share_stats=True)
        gradients, outputs = evaluate(plain.clone(arm=CONDITIONAL), rows, noise, labels)
        found = _of_norms(lambda leaf: leaf.sum(0), gradients), outputs
        errors = jax.tree.map(relative_error, found, evaluate(plain, variables, noise, labels))
        return jnp.max(jnp.stack(jax.tree.leaves(errors)))

    with jax.enable_x64(True):
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        return np.asarray(jax.jit(jax.vmap(of_seed))(keys))


def compare(arms: Mapping[str, Mapping[str, Any]], learned: Any, new: Any) -> dict[str, Any]:
    """Returns the quantities of the sub-claims on training, in points.

    Args:
        arms: by arm, "recognized" and "distance", [seeds, classes] each.
        learned: how often images of the new class are recognized, [seeds].
        new: the new class of every seed, [seeds].
    """
    shares = {arm: of_arm["recognized"].mean(-1) for arm, of_arm in arms.items()}
    distances = {arm: of_arm["distance"].mean(-1) for arm, of_arm in arms.items()}
    together = np.take_along_axis(arms[CONDITIONAL]["recognized"], np.asarray(new)[:, None], 1)
    farther = 100 * (distances[CONDITIONAL] - distances[CONCATENATED]) / distances[NOWHERE]
    return {
        "32a": shares[CONDITIONAL] - shares[NOWHERE],
        "32b": shares[CONDITIONAL] - shares[CONCATENATED],
        "32c": farther,
        "32d": learned - together[:, 0],
        "32e": shares[SHUFFLED] - shares[NOWHERE],
        "32f": shares[STATISTICS] - shares[NOWHERE],
    }


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    share = 1 / (len(ARMS) + 2)
    digits = load_parts(setting)
    classifiers = train_classifiers(setting)
    variables, test = classifiers.measured
    setting.advance(share)
    chosen = {}
    for arm in ARMS:
        chosen[arm] = train_arm(setting, digits, arm, variables)
        setting.advance(share)
    rate = float(chosen[CONDITIONAL].rate.value)
    of_new = train_new_class(setting, digits, variables, rate)
    setting.advance(share)
    arms = {arm: of_arm.measured for arm, of_arm in chosen.items()}
    new = setting.chosen % setting.num_classes
    shares = {arm: of_arm["recognized"].mean(-1) for arm, of_arm in arms.items()}
    return Result(
        values={
            **compare(arms, of_new.measured[LEARNED], new),
            "32g": identity_errors(setting.chosen),
        },
        curves={
            "recognized": {**shares, **of_new.measured, REAL: test},
            "images": _side_by_side(setting, [arms[arm]["images"][0] for arm in ARMS[:3]]),
        },
        series=[
            *(Series("32a", arm, "recognized (%)", values) for arm, values in shares.items()),
            *(Series("32c", arm, "distance", x["distance"].mean(-1)) for arm, x in arms.items()),
            *(Series("32d", arm, "recognized (%)", x) for arm, x in of_new.measured.items()),
            Series("32a", REAL, "recognized (%)", test),
        ],
        rates={
            "classifier": classifiers.rate,
            LEARNED: of_new.rate,
            **{arm: of_arm.rate for arm, of_arm in chosen.items()},
        },
    )


def _side_by_side(setting: Setting, images: Any) -> Any:
    """Returns an image of each class side by side, for each arm, [arms, height, all widths]."""
    shape = setting.labelled.image_shape
    of_arms = np.asarray(images).reshape(len(images), -1, *shape).mean(-1)
    return np.concatenate(list(np.moveaxis(of_arms, 1, 0)), -1)


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws an image of each class by three arms, and the shares that are recognized."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rows = np.asarray(curves["images"], np.float64)
    rows = np.pad(rows, ((0, 0), (1, 1), (0, 0)), constant_values=np.nan)
    left.imshow(rows.reshape(-1, rows.shape[-1]), cmap="gray_r")
    left.set_yticks([rows.shape[1] * (0.5 + row) for row in range(len(rows))], ARMS[: len(rows)])
    left.set(xticks=[], xlabel="an image of each class, first seed")
    names = [*ARMS, *OF_NEW, REAL]
    shares = [curves["recognized"][name] for name in names]
    points(right, range(len(names)), shares, horizontal=True)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(xlabel="recognized as the class asked for (%)", xlim=(0, 102))


def _in_points(
    key: str, label: str, statement: str, quantity: str, bound: Any, published: str = ""
) -> SubClaim:
    theory = Published(published, "D") if published else Published()
    reason = f"ours: {abs(bound[0]):g} points"
    return SubClaim(key, label, statement, quantity, bound, theory, reason, is_resplit=True)


EXPERIMENT = Experiment(
    number=32,
    name="conditional_norm",
    claim="Scale and bias by class are enough to tell a generator which class to draw",
    source="Dumoulin et al. 2017; de Vries et al. 2017",
    sub_claims=(
        SubClaim(
            "32a",
            "the class arrives",
            "a generator to which classes differ by scale and bias alone draws the class that it "
            "is asked for",
            "images that are recognized as their class, scale and bias by class minus no class "
            "(points)",
            Above(ARRIVES),
            reason="ours: half of the 90 points between chance and certainty",
            is_resplit=True,
            is_of_digits=True,
        ),
        _in_points(
            "32b",
            "recognized as often",
            "its images are recognized no less often than those of a generator that has the class "
            "among its inputs",
            "images that are recognized, scale and bias by class minus class at the input (points)",
            Above(-NO_WORSE),
        ),
        _in_points(
            "32c",
            "as close to real images",
            "its images are no farther from real ones than those of a generator that has the class "
            "among its inputs",
            "energy distance from the test images of each class, scale and bias by class minus "
            "class at the input, in percent of the distance without a class (points)",
            Below(NO_WORSE),
        ),
        _in_points(
            "32d",
            "a new class",
            "a trained generator learns a new class by a row of scale and bias alone",
            "images of the new class that are recognized, learned by its row minus trained with "
            "the others (points)",
            Above(-AS_TOGETHER),
        ),
        _in_points(
            "32e",
            "control: shuffled",
            "with shuffled classes, scale and bias by class tell a generator nothing",
            "images that are recognized, shuffled classes minus no class (points)",
            Within(-NOTHING, NOTHING),
        ),
        _in_points(
            "32f",
            "statistics tell nothing",
            "statistics by class, with scale and bias shared, tell a generator nothing: the noise "
            "that they normalize has the same distribution for every class",
            "images that are recognized, statistics by class minus no class (points)",
            Within(-NOTHING, NOTHING),
            "0",
        ),
        SubClaim(
            "32g",
            "equal rows",
            "with equal rows, scale and bias by class are those of a plain batch norm: outputs, "
            "statistics and gradients",
            "largest relative difference",
            Identity(TOLERANCE),
            Published("0", "D"),
        ),
    ),
    protocol=(
        f"a generator of {NOISE} noises, 16-64-64-64 with batch norm, trained by the energy "
        f"distance of each class from digits, {STEPS} steps of Adam with {IN_BATCH} images of each "
        f"class; the statistics are those of all classes together, except where they are by "
        "class; a new class, another for each seed, has "
        f"{STEPS_OF_ROW} steps in evaluation mode; images in evaluation mode, recognized by an MLP "
        "that was trained on real digits; rates chosen by the energy distance from the validation "
        "part"
    ),
    limits=(
        "A class of digits is easier than a painting's style or a question about an image. The "
        "classifier and the generators see the same training images. A generator that draws one "
        "image for each class would be recognized, too; the energy distance is what it would fail."
    ),
    run=run,
    draw=draw,
    easy=(
        "That scale and bias carry the class as well as an input does, and that statistics carry "
        "none."
    ),
    hard=(
        "A new class: its row makes most of its images recognizable, but fewer than training with "
        "the other classes does. The weights have seen nine classes, which is little to learn from "
        "what a row can say."
    ),
    data=Needs(per_class=IN_BATCH, per_class_tested=2),
)
