"""Claim 31: domains of one task need batch norms with statistics of their own."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from bn_jax.lab.experiments.domain_nets import (
    FIRST,
    SECOND,
    Batch,
    DomainMLP,
    accuracy_of,
    logits_of,
    of_each,
    train_by_domain,
)
from bn_jax.lab.experiments.figures import points
from bn_jax.lab.experiments.labelled import Needs
from bn_jax.lab.experiments.nets import BATCH_NORM, NO_EPSILON
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.selection import Chosen, Outcome, sweep_rates
from bn_jax.lab.experiments.statistics import relative_error
from bn_jax.lab.experiments.sweeps import Part, load_parts
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
from bn_jax.lab.models import Norm
from bn_jax.linen import DomainBatchNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH_SIZE = 64
RATES = 0.01, 0.03, 0.1, 0.3, 1.0
BY_DOMAIN = partial(DomainBatchNorm, num_domains=2, momentum=0.9)
# What the second domain does to an image; the last one, nothing, is the control.
INVERTED, BACKGROUND, SAME = SHIFTS = "inverted", "background", "unchanged"
SHIFTED = INVERTED, BACKGROUND
# Of the background, in deviations of all pixels: the contrast of the image, and the noise.
CONTRAST, NOISE = 0.5, 0.5
# Of the images, in the functions that own statistics undo.
FACTORS = CONTRAST, -1.0
# Which domains a batch holds.
MIXED, BY_TURNS, SOURCE = ORDERS = "mixed", "one domain at a time", "first domain alone"


class Arm(NamedTuple):
    """Norms, and the orders of batches that they are trained with."""

    norm: Norm
    orders: tuple[str, ...]


SHARED, STATISTICS, BOTH = "shared", "own statistics", "own statistics and parameters"
ARMS = {
    SHARED: Arm(BATCH_NORM, (MIXED, BY_TURNS)),
    STATISTICS: Arm(partial(BY_DOMAIN, share_params=True), ORDERS),
    BOTH: Arm(BY_DOMAIN, (MIXED,)),
}
# In points: a difference between arms that are to be equal.
EQUAL = 1.0
TOLERANCE = 1e-9


class Task(NamedTuple):
    """Two domains of one task. With a leading axis [seeds]: those of many seeds.

    Attributes:
        seed: of the initial parameters.
        train: images by shift [shifts, n, features] and labels [n]; the first half is of the first
            domain.
        validation: images by shift, once in each domain, [shifts, 2, n, features], and labels [n].
        test: the same.
        rows: which training images enter each step, by order, [orders, steps, BATCH_SIZE].
    """

    seed: Any
    train: Part
    validation: Part
    test: Part
    rows: Any


def shift_images(x: Any, seed: int, purpose: int) -> npt.NDArray[np.float32]:
    """Returns images of the first domain as the second domain has them.

    Args:
        x: standardized pixels, [n, features].
        seed: of the background, which all parts share, and of the noise.
        purpose: a number, for other noise than that of other parts.

    Returns:
        By shift, [shifts, n, features].
    """
    background = np.random.default_rng([31, seed]).normal(size=x.shape[-1])
    noise = np.random.default_rng([32, purpose, seed]).normal(size=x.shape)
    on_background = CONTRAST * x + background + NOISE * noise
    return np.stack([-x, on_background, x]).astype(np.float32)


def draw_rows(seed: int, examples: int, steps: int) -> npt.NDArray[np.int32]:
    """Draws the batches of every order, without repetition in a batch.

    Args:
        seed: of the order.
        examples: the number of training images, of which the first half is of the first domain.
        steps: the number of batches.

    Returns:
        Indices [orders, steps, BATCH_SIZE].
    """
    generator = np.random.default_rng([33, seed])
    half = examples // 2

    def draw(domain: int, number: int) -> Any:
        low, high = ((0, half), (half, examples))[domain]
        return low + generator.choice(high - low, number, replace=False)

    def batch(order: str, step: int) -> Any:
        if order == MIXED:
            return np.concatenate([draw(domain, BATCH_SIZE // 2) for domain in (FIRST, SECOND)])
        return draw(FIRST if order == SOURCE else step % 2, BATCH_SIZE)

    rows = [[batch(order, step) for step in range(steps)] for order in ORDERS]
    return np.asarray(rows, np.int32)


def make_tasks(setting: Setting, steps: int) -> Task:
    """Makes the task of every seed.

    Args:
        setting: the seeds, and the data.
        steps: the number of steps of each training.

    Returns:
        The tasks, with a leading axis [seeds].
    """
    digits, seeds = load_parts(setting), setting.chosen.tolist()
    examples = digits.split.trained
    half = examples // 2

    def shifted(part: Part, purpose: int) -> Any:
        each = zip(part.x, seeds, strict=True)
        return np.stack([shift_images(x, seed, purpose) for x, seed in each])

    def in_both(part: Part, purpose: int) -> Part:
        second = shifted(part, purpose)
        first = np.broadcast_to(part.x[:, None], second.shape)
        return Part(np.stack([first, second], 2), part.y)

    second = shifted(digits.train, 0)
    first = np.broadcast_to(digits.train.x[:, None], second.shape)
    return Task(
        setting.chosen,
        Part(np.concatenate([first[:, :, :half], second[:, :, half:]], 2), digits.train.y),
        in_both(digits.validation, 1),
        in_both(digits.test, 2),
        np.stack([draw_rows(seed, examples, steps) for seed in seeds]),
    )


def adapt(model: DomainMLP, variables: Any, x: Any, domain: int = SECOND) -> Any:
    """Takes the statistics of a domain from its images, without labels, as AdaBN does.

    Args:
        model: the network, with norms by domain.
        variables: its params and batch_stats.
        x: images, [n, features].
        domain: the domain, whose statistics become those of these images.

    Returns:
        The variables with new statistics of this domain.
    """
    at_once = model.clone(norm=partial(model.norm, momentum=0.0))
    _, updated = at_once.apply(variables, x, domain, True, mutable=["batch_stats"])
    return {**variables, **updated}


def accuracies_by_domain(model: DomainMLP, variables: Any, images: Any, y: Any) -> jax.Array:
    """Returns the accuracy in each domain by its own statistics, in percent, [2]."""
    found = [
        accuracy_of(model, variables, Batch(images[domain], y, domain))
        for domain in (FIRST, SECOND)
    ]
    return jnp.stack(found)


def train_arm(
    setting: Setting, tasks: Task, arm: str
) -> dict[tuple[str, str], Chosen[dict[str, Any]]]:
    """Trains an arm at every rate, with every shift and order of its batches.

    Args:
        setting: the size of the run.
        tasks: the tasks of all seeds.
        arm: a name in `ARMS`.

    Returns:
        By shift and order, accuracies on the test part in percent, at the rate that is best for all
        seeds on the validation part of the domains that are trained on. They are "by domain",
        [seeds, 2], each by its own statistics if there are any. With `SOURCE`, "by first" is the
        accuracy in the second domain by the statistics of the first, and "adapted" that by new
        statistics of the unlabelled training images of the second domain, [seeds].
    """
    norm, orders = ARMS[arm]
    model = DomainMLP(norm, setting.num_classes)
    examples = tasks.train.y.shape[-1]
    places = [(shift, order) for shift in range(len(SHIFTS)) for order in map(ORDERS.index, orders)]

    def run(rate: jax.Array, task: Task) -> Outcome[dict[str, jax.Array]]:
        def train_with(place: jax.Array) -> Outcome[dict[str, jax.Array]]:
            shift, order = place
            x, y = jnp.asarray(task.train.x)[shift], jnp.asarray(task.train.y)

            def make_batch(_: Any, rows: jax.Array) -> Batch:
                domain = jnp.where(rows < examples // 2, FIRST, SECOND)
                return Batch(x[rows], y[rows], domain)

            optimizer = optax.sgd(rate, momentum=0.9)
            rows = jnp.asarray(task.rows)[order]
            variables = train_by_domain(model, optimizer, task.seed, x.shape[-1], make_batch, rows)
            validation, test = (
                (jnp.asarray(part.x)[shift], part.y) for part in (task.validation, task.test)
            )
            found = {"by domain": accuracies_by_domain(model, variables, *test)}
            chosen_by = jnp.mean(accuracies_by_domain(model, variables, *validation))
            if SOURCE in orders:
                images, labels = test
                adapted = adapt(model, variables, x[examples // 2 :])
                found["by first"] = accuracy_of(
                    model, variables, Batch(images[SECOND], labels, FIRST)
                )
                found["adapted"] = accuracy_of(
                    model, adapted, Batch(images[SECOND], labels, SECOND)
                )
                of_source = accuracies_by_domain(model, variables, *validation)[FIRST]
                chosen_by = jnp.where(order == ORDERS.index(SOURCE), of_source, chosen_by)
            return Outcome(chosen_by, found)

        return map_runs(train_with, jnp.asarray(places))

    rates = RATES[2:4] if setting.quick else RATES
    names = [(SHIFTS[shift], ORDERS[order]) for shift, order in places]
    return of_each(sweep_rates(run, rates, tasks), names)


def affine_errors(
    setting: Setting, factors: Sequence[float], signs: Sequence[float] | None = None
) -> npt.NDArray[np.float64]:
    """Compares the logits of images and of affine functions of them, without training.

    The norms are random. The second domain is ``factor * x + background``, with its own statistics
    in every norm. In the first norm its scale is multiplied by the sign of the factor.

    Args:
        setting: the seeds, and the data.
        factors: of the images, [factors].
        signs: by which to multiply the scale instead, [factors].

    Returns:
        The largest differences of a logit, relative to the largest logit, in float64, [factors,
        seeds].
    """
    of_scales = np.sign(factors) if signs is None else np.asarray(signs)
    norm = partial(BY_DOMAIN, epsilon=NO_EPSILON)
    model = DomainMLP(norm, setting.num_classes, dtype=jnp.float64)

    def of_seed(seed: jax.Array, x: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(seed), 2 * len(model.widths) + 2)
        variables = model.init(keys[0], x[:1], FIRST, False)
        norms = {}
        for index, width in enumerate(model.widths):
            scale = jax.random.uniform(keys[2 * index + 1], (width,), jnp.float64, 0.5, 2.0)
            bias = jax.random.normal(keys[2 * index + 2], (width,), jnp.float64)
            norms[f"norm{index}"] = {"scale": jnp.stack([scale] * 2), "bias": jnp.stack([bias] * 2)}
        background = jax.random.normal(keys[-1], (1, x.shape[-1]), jnp.float64)
        variables = {**variables, "params": {**variables["params"], **norms}}
        variables = adapt(model, variables, x, FIRST)

        def of_factor(given: tuple[jax.Array, jax.Array]) -> Any:
            factor, sign = given
            changed = factor * x + background
            first = norms["norm0"]["scale"].at[SECOND].multiply(sign)
            params = {**variables["params"], "norm0": {**norms["norm0"], "scale": first}}
            adapted = adapt(model, {**variables, "params": params}, changed)
            return logits_of(model, adapted, changed, SECOND)

        given = jnp.asarray(factors, jnp.float64), jnp.asarray(of_scales, jnp.float64)
        return logits_of(model, variables, x, FIRST), jax.lax.map(of_factor, given)

    with jax.enable_x64(True):
        x = np.asarray(load_parts(setting).test.x, np.float64)
        of_seeds = zip(*map(np.asarray, map_runs(of_seed, setting.chosen, x)), strict=True)
        errors = [[relative_error(one, clean) for one in changed] for clean, changed in of_seeds]
    return np.array(errors).T


Measured: TypeAlias = Mapping[str, Mapping[tuple[str, str], Mapping[str, Any]]]


def compare(measured: Measured) -> dict[str, Any]:
    """Returns the quantities of the sub-claims on trained networks, [seeds].

    Args:
        measured: by arm, and by shift and order, what `train_arm` finds.
    """

    def mean(arm: str, shift: str, order: str = MIXED) -> Any:
        return measured[arm][shift, order]["by domain"].mean(-1)

    def of_source(shift: str, name: str) -> Any:
        return measured[STATISTICS][shift, SOURCE][name]

    own = of_source(INVERTED, "by domain")[:, FIRST]
    lost = own - of_source(INVERTED, "by first")
    restored = of_source(INVERTED, "adapted") - of_source(INVERTED, "by first")
    return {
        "31a": {shift: mean(BOTH, shift) - mean(SHARED, shift) for shift in SHIFTED},
        "31b": {shift: mean(STATISTICS, shift) - mean(SHARED, shift) for shift in SHIFTED},
        "31c": mean(BOTH, INVERTED) - mean(STATISTICS, INVERTED),
        "31d": {
            shift: mean(SHARED, shift, BY_TURNS) - mean(STATISTICS, shift, BY_TURNS)
            for shift in SHIFTED
        },
        "31e": {
            shift: mean(STATISTICS, shift, BY_TURNS) - mean(STATISTICS, shift) for shift in SHIFTED
        },
        "31f": of_source(BACKGROUND, "adapted") - of_source(BACKGROUND, "by first"),
        "31g": restored / lost,
        "31i": {
            f"{MIXED}, {STATISTICS}": mean(STATISTICS, SAME) - mean(SHARED, SAME),
            f"{MIXED}, {BOTH}": mean(BOTH, SAME) - mean(SHARED, SAME),
            BY_TURNS: mean(STATISTICS, SAME, BY_TURNS) - mean(SHARED, SAME, BY_TURNS),
            "adapted": of_source(SAME, "adapted") - of_source(SAME, "by first"),
        },
    }


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    tasks = make_tasks(setting, 60 if setting.quick else 300)
    chosen = {}
    for arm in ARMS:
        chosen[arm] = train_arm(setting, tasks, arm)
        setting.advance(0.3)
    measured = {
        arm: {place: of_place.measured for place, of_place in of_arm.items()}
        for arm, of_arm in chosen.items()
    }
    exact = zip(FACTORS, affine_errors(setting, FACTORS), strict=True)
    whole = setting.labelled.split
    of_source = whole._replace(trained=whole.trained // 2)
    return Result(
        values={
            **compare(measured),
            "31h": {f"factor {factor:g}": errors for factor, errors in exact},
        },
        curves=_curves(measured),
        series=list(_series(measured)),
        rates={
            f"{arm}, {order}, {shift}": of_place.rate
            for arm, of_arm in chosen.items()
            for (shift, order), of_place in of_arm.items()
        },
        splits={"31f": of_source, "31g": of_source},
    )


def _series(measured: Measured) -> list[Series]:
    keys = {MIXED: "31a", BY_TURNS: "31d", SOURCE: "31f"}
    found = []
    for arm, of_arm in measured.items():
        for (shift, order), values in of_arm.items():
            name = f"{shift}, {order}"
            first, second = values["by domain"].T
            parts: dict[str, Any] = {"first domain": first}
            if order == SOURCE:
                parts["second domain, first statistics"] = values["by first"]
                parts["second domain, adapted"] = values["adapted"]
            else:
                parts["second domain"] = second
            found += [
                Series(keys[order], arm, f"{name}, {part} (%)", of_part)
                for part, of_part in parts.items()
            ]
    return found


def _curves(measured: Measured) -> dict[str, Any]:
    """Returns accuracies [shifts, seeds] by arm and order, and with new and old statistics."""
    old, new = "statistics of the first domain", "statistics of the second domain"
    of_source = [measured[STATISTICS][shift, SOURCE] for shift in SHIFTS]
    return {
        "both": {
            f"{arm}, {order}": [
                measured[arm][shift, order]["by domain"].mean(-1) for shift in SHIFTS
            ]
            for arm, (_, orders) in ARMS.items()
            for order in orders
            if order != SOURCE
        },
        "second": {
            old: [of_shift["by first"] for of_shift in of_source],
            new: [of_shift["adapted"] for of_shift in of_source],
        },
    }


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws the accuracies of all arms: with both domains, and with the first one alone."""
    both, second = figure.subplots(1, 2, width_ratios=(1.6, 1))
    at = np.arange(len(SHIFTS))
    for axes, lines, width in ((both, curves["both"], 0.25), (second, curves["second"], 0.1)):
        shifts = np.linspace(-width, width, len(lines))
        for shift, (label, values) in zip(shifts, lines.items(), strict=True):
            points(axes, at + shift, values, label, capsize=2)
        axes.set_xticks(at, SHIFTS)
        axes.set_xlabel("what the second domain does to an image")
    both.set_ylabel("test accuracy, mean of both domains (%)")
    both.set_ylim(both.get_ylim()[0], 100)
    second.set_ylabel("test accuracy, second domain, trained on the first domain alone (%)")
    second.set(ylim=(-3, 130), yticks=range(0, 101, 20))
    both.legend(loc="lower right", fontsize="small")
    second.legend(loc="upper left", fontsize="small")


def _more_accurate(key: str, label: str, statement: str, arms: Sequence[str]) -> SubClaim:
    more, less = arms
    return SubClaim(
        key,
        label,
        statement,
        f"test accuracy, mean of both domains, {more} minus {less} (points)",
        Above(0.0),
        is_resplit=True,
    )


EXPERIMENT = Experiment(
    number=31,
    name="norms_by_domain",
    claim="Domains of one task need batch norms with statistics of their own",
    source="Chang et al. 2019; Li et al. 2016 (AdaBN)",
    sub_claims=(
        _more_accurate(
            "31a",
            "own norms",
            "in mixed batches, norms of each domain are more accurate than shared norms",
            (BOTH, SHARED),
        ),
        _more_accurate(
            "31b",
            "own statistics",
            "in mixed batches, own statistics alone are more accurate than shared norms",
            (STATISTICS, SHARED),
        ),
        _more_accurate(
            "31c",
            "parameters add",
            "for inverted images, own scale and bias add to own statistics",
            (BOTH, STATISTICS),
        ),
        SubClaim(
            "31d",
            "one running average",
            "with batches of one domain at a time, one running average breaks evaluation",
            "test accuracy, mean of both domains, one running average minus one for each domain "
            "(points)",
            Below(0.0),
            is_resplit=True,
        ),
        SubClaim(
            "31e",
            "batches by turns",
            "with running averages by domain, batches of one domain at a time train as well as "
            "mixed ones",
            "test accuracy, mean of both domains, own statistics, one domain at a time minus mixed "
            "(points)",
            Within(-EQUAL, EQUAL),
            reason=f"ours: {EQUAL:g} point",
            is_resplit=True,
        ),
        SubClaim(
            "31f",
            "adaptation (AdaBN)",
            "new statistics adapt a network to another domain without labels",
            "test accuracy on the noisy background, by new statistics minus by those of the first "
            "domain (points)",
            Above(0.0),
            is_resplit=True,
        ),
        SubClaim(
            "31g",
            "not to inversion",
            "new statistics do not adapt a network to inverted images",
            "share of the lost accuracy that new statistics restore",
            Below(0.5),
            Published("0: the sign of every normalized feature of the first norm stays", "D"),
            "ours: half of it",
            is_resplit=True,
        ),
        SubClaim(
            "31h",
            "affine domains",
            "with own statistics, an affine function of the images changes nothing, if the first "
            "scale has the sign of its factor",
            "relative error of the logits, in float64",
            Identity(TOLERANCE),
            Published("BN(a x + b) = sign(a) BN(x)", "D"),
        ),
        SubClaim(
            "31i",
            "control: one domain",
            "two domains with one distribution make no difference",
            "test accuracy, with own minus with shared or old statistics (points)",
            Within(-EQUAL, EQUAL),
            reason=f"ours: {EQUAL:g} point",
            is_resplit=True,
        ),
    ),
    protocol=(
        "half of the training images are the first domain, the others the second one: inverted "
        f"(-x), or on a noisy background ({CONTRAST:g} x, plus a fixed pattern of deviation 1, "
        f"plus noise of {NOISE:g}, where x has deviation 1), or unchanged; MLP 64-64-64-10, 300 "
        "steps with momentum 0.9 and batches of 64, half and half or one domain at a time by "
        "turns; norms shared, with own statistics, or with own statistics, scale and bias; "
        "training on the first domain alone, then statistics of the unlabelled training images of "
        "the second; all test images in both domains; rates chosen on validation for every arm, "
        "order and shift"
    ),
    limits=(
        "Shifts of digits that are affine but for noise, in a small network. The published domains "
        "are photographs and drawings of objects, and the second one has no labels or guessed ones "
        "there, where mixed batches have true labels here."
    ),
    run=run,
    draw=draw,
    easy=(
        "The accuracy that one running average loses where batches hold one domain at a time, and "
        "that running averages by domain keep. Adaptation to another background without labels."
    ),
    hard=(
        "In mixed batches, shared norms lose about a point. Own statistics alone show no gain with "
        "inverted images, whose features have opposite signs; scale and bias by domain mend that. "
        "Adaptation without labels fails there for the same reason. On the background, batches of "
        "one domain at a time train slightly better than mixed ones, so that the equivalence is "
        "open."
    ),
    data=Needs(trained=2 * BATCH_SIZE),
)
