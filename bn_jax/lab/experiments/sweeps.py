"""Trainings of one network for many learning rates and seeds, as one compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from bn_jax.lab import data

Observe = Callable[[Any], Any]
MakeOptimizer = Callable[[Any], optax.GradientTransformation]


class Part(NamedTuple):
    """Examples: standardized pixels [..., n, 64] float32 and labels [..., n] int32."""

    x: Any
    y: Any


class Digits(NamedTuple):
    """Handwritten digits in parts that cover them, split anew for every seed: [seeds, n, 64]."""

    train: Part
    validation: Part
    test: Part


class Trained(NamedTuple):
    """A training's end.

    Attributes:
        variables: after the last step.
        losses: of each step's batch, [steps].
        observed: what `observe` returned at each point, stacked, [points, ...]; or None.
    """

    variables: Any
    losses: jax.Array
    observed: Any


def load_digits(seeds: npt.NDArray[np.int32]) -> Digits:
    """Loads scikit-learn's digits, split and standardized by the training part for each seed.

    Args:
        seeds: of the splits, [seeds].

    Returns:
        1259 examples to train, 179 to validate, 359 to test, the images as rows of 64.
    """
    dataset = data.load_digits()
    splits = [data.split(dataset, int(seed)) for seed in seeds]

    def stacked(name: str) -> Part:
        parts = [
            data.standardize(getattr(split, name), *data.mean_and_std(split.train))
            for split in splits
        ]
        x = np.stack([part.x.reshape(len(part.x), -1) for part in parts])
        return Part(x, np.stack([part.y for part in parts]))

    return Digits(*(stacked(name) for name in Digits._fields))


def draw_batches(
    seeds: npt.NDArray[np.int32], examples: int, steps: int, batch_size: int
) -> npt.NDArray[np.int32]:
    """Draws which examples enter each step, epoch after epoch without repetition.

    Args:
        seeds: of the order, [seeds].
        examples: how many there are.
        steps: how many batches.
        batch_size: at most `examples`; what is left over at the end of an epoch is left out.

    Returns:
        Indices [seeds, steps, batch_size].
    """
    per_epoch = examples // batch_size

    def of_seed(seed: int) -> Any:
        generator = np.random.default_rng([1, seed])
        epochs = [
            generator.permutation(examples)[: per_epoch * batch_size].reshape(-1, batch_size)
            for _ in range(-(-steps // per_epoch))
        ]
        return np.concatenate(epochs)[:steps]

    return np.stack([of_seed(int(seed)) for seed in seeds]).astype(np.int32)


def cross_entropy(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns the mean over the examples, those of the mask [n] if there is one."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses, where=mask)


def loss_of(
    model: nn.Module, variables: Any, x: jax.Array, y: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, dict[str, Any]]:
    """Computes the loss of a batch in training.

    Args:
        model: called with `x` and `train`.
        variables: its params and batch_stats.
        x: [n, ...].
        y: labels [n].
        mask: booleans [n]: which examples there are. None: all.

    Returns:
        The loss, and the variables with new batch_stats.
    """
    masked: dict[str, Any] = {} if mask is None else {"mask": mask}
    logits, updated = model.apply(variables, x, train=True, mutable=["batch_stats"], **masked)
    return cross_entropy(logits, y, mask), {**variables, **updated}


def accuracy(model: nn.Module, variables: Any, part: Part, train: bool = False) -> jax.Array:
    """Computes the share of right answers.

    Args:
        model: called with `x` and `train`.
        variables: its params and batch_stats.
        part: examples.
        train: whether norms use the statistics of these examples instead of the running ones.

    Returns:
        A scalar; logits that are not finite are wrong answers.
    """
    logits, _ = model.apply(variables, part.x, train=train, mutable=["batch_stats"])
    right = (jnp.argmax(logits, -1) == part.y) & jnp.isfinite(logits).all(-1)
    return jnp.mean(right.astype(jnp.float32))


def start(optimizer: optax.GradientTransformation, variables: Any) -> Any:
    """Returns what a training carries on: the variables and the state of the optimizer."""
    return variables, optimizer.init(variables["params"])


def make_step(
    model: nn.Module, optimizer: optax.GradientTransformation, part: Part, padded: bool = False
) -> Callable[[Any, jax.Array], tuple[Any, tuple[jax.Array, Any]]]:
    """Returns a training step for `jax.lax.scan`.

    Args:
        model: called with `x` and `train`.
        optimizer: of the params.
        part: the examples.
        padded: whether indices may be -1, for no example.

    Returns:
        A function of what `start` returns and the indices of a batch, which gives the same after
        the step, with the loss and the gradients of that batch.
    """
    x, y = map(jnp.asarray, part)

    def step(carry: Any, batch: jax.Array) -> tuple[Any, tuple[jax.Array, Any]]:
        variables, state = carry
        mask = batch >= 0 if padded else None

        def loss(params: Any) -> tuple[jax.Array, dict[str, Any]]:
            return loss_of(model, {**variables, "params": params}, x[batch], y[batch], mask)

        (found, updated), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({**updated, "params": params}, state), (found, gradients)

    return step


def train(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    variables: Any,
    part: Part,
    rows: Any,
    observe: Observe | None = None,
    every: int = 1,
    padded: bool = False,
) -> Trained:
    """Trains once; under `jit` and `vmap` many times at once.

    Args:
        model: called with `x` and `train`.
        optimizer: of the params.
        variables: the initial params and batch_stats.
        part: the examples.
        rows: which of them enter each step, [steps, n].
        observe: called with the variables before the first step and after every `every` steps.
        every: divides steps.
        padded: whether indices may be -1, for no example.

    Returns:
        The variables after the last step, the losses, and what was observed.
    """
    step = make_step(model, optimizer, part, padded)

    def stretch(carry: Any, batches: jax.Array) -> tuple[Any, Any]:
        carry, (losses, _) = jax.lax.scan(step, carry, batches)
        return carry, (losses, None if observe is None else observe(carry[0]))

    rows = jnp.asarray(rows)
    first = None if observe is None else observe(variables)
    batches = rows.reshape(-1, every if observe else len(rows), rows.shape[-1])
    (variables, _), (losses, rest) = jax.lax.scan(stretch, start(optimizer, variables), batches)
    observed = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, rest)
    return Trained(variables, losses.reshape(-1), observed)


def sweep(run: Callable[..., Any], rates: Any, *of_seeds: Any) -> Any:
    """Makes a run for every learning rate and seed as one compiled program.

    Args:
        run: called with a rate, and with each of `of_seeds` at one seed.
        rates: [rates].
        *of_seeds: arrays, or trees of arrays, with a leading axis [seeds, ...].

    Returns:
        What `run` returns, with leading axes [rates, seeds].
    """
    seeds = jax.vmap(run, (None, *(0 for _ in of_seeds)))
    program = jax.jit(jax.vmap(seeds, (0, *(None for _ in of_seeds))))
    return jax.block_until_ready(program(jnp.asarray(rates), *of_seeds))
