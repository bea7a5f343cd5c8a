"""Training one network at many learning rates and seeds."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from bn_jax.lab import data
from bn_jax.lab.experiments.labelled import Labelled, Split, digits
from bn_jax.lab.experiments.parallel import run_each
from bn_jax.lab.experiments.verdicts import Setting

Observe = Callable[[Any], Any]
MakeOptimizer = Callable[[Any], optax.GradientTransformation]


class Part(NamedTuple):
    """Examples: standardized pixels [..., n, features] float32 and labels [..., n] int32."""

    x: Any
    y: Any


class Digits(NamedTuple):
    """The digits, or a user's data, split differently for every seed: parts [seeds, n, ...]."""

    train: Part
    validation: Part
    test: Part

    @property
    def split(self) -> Split:
        """The sizes of the training part and of the test part."""
        return Split(self.train.y.shape[-1], self.test.y.shape[-1])

    def few(self, number: int, tests_rest: bool = False) -> "Digits":
        """Returns the first examples of the training part.

        Args:
            number: how many.
            tests_rest: whether the others are added to the test part; else they are left out.
        """
        first = Part(self.train.x[..., :number, :], self.train.y[..., :number])
        test = self.test
        if tests_rest:
            rest = Part(self.train.x[..., number:, :], self.train.y[..., number:])
            test = Part(np.concatenate([test.x, rest.x], -2), np.concatenate([test.y, rest.y], -1))
        return self._replace(train=first, test=test)


class Trial(NamedTuple):
    """What all trainings of a seed share. With a leading axis [seeds]: the trials of many seeds.

    Attributes:
        seed: the seed of the initial parameters.
        digits: the examples.
        batches: which training examples enter each step, [steps, n].
    """

    seed: Any
    digits: Digits
    batches: Any

    @property
    def split(self) -> Split:
        """How many examples it trains on and is tested on, which its record says."""
        return self.digits.split


class State(NamedTuple):
    """The state of a training between two steps.

    Attributes:
        variables: params and batch_stats.
        optimizer: the optimizer's state.
    """

    variables: Any
    optimizer: Any


class Trained(NamedTuple):
    """The result of a training.

    Attributes:
        variables: the variables after the last step.
        losses: the loss of each step's batch, [steps].
        observed: what `observe` returned at each point, stacked, [points, ...]; or None.
    """

    variables: Any
    losses: jax.Array
    observed: Any


def load_digits(seeds: npt.NDArray[np.int32]) -> Digits:
    """Loads scikit-learn's digits, split and standardized by the training part for each seed.

    Args:
        seeds: the seeds of the splits, [seeds].

    Returns:
        1259 training, 179 validation and 359 test examples, the images as rows of 64 pixels.
    """
    return split_each(digits(), seeds)


def load_parts(setting: Setting) -> Digits:
    """Loads the data of a setting, split and standardized as `load_digits` does.

    Args:
        setting: the seeds of the splits, and the data.

    Returns:
        70 % training, 10 % validation and 20 % test examples, the images as rows of pixels.
    """
    return split_each(setting.labelled, setting.chosen)


def split_each(labelled: Labelled, seeds: npt.NDArray[np.int32]) -> Digits:
    """Splits and standardizes data for each seed.

    Args:
        labelled: the data.
        seeds: [seeds].
    """
    splits = [data.split(labelled.dataset, int(seed)) for seed in seeds]

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
    """Draws the examples of each step, without repetition within an epoch.

    Args:
        seeds: the seeds of the order, [seeds].
        examples: the number of examples.
        steps: the number of batches.
        batch_size: at most `examples`. The last, incomplete batch of an epoch is left out.

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


def draw_trials(setting: Setting, steps: int, batch_size: int) -> Trial:
    """Loads the data and draws the batches of every seed.

    Args:
        setting: the seeds, and the data.
        steps: the number of steps of each training.
        batch_size: the number of examples in each step.

    Returns:
        The trials, with a leading axis [seeds].
    """
    return with_batches(setting, load_parts(setting), steps, batch_size)


def with_batches(setting: Setting, digits: Digits, steps: int, batch_size: int) -> Trial:
    """Draws the batches of every seed from the training part.

    Args:
        setting: the seeds.
        digits: the parts of every seed.
        steps: the number of steps of each training.
        batch_size: the number of examples in each step.
    """
    seeds = setting.chosen
    return Trial(seeds, digits, draw_batches(seeds, digits.split.trained, steps, batch_size))


def take(tree: Any, *place: Any) -> Any:
    """Returns every leaf of a tree at some indices of its leading axes.

    Example:
        >>> import numpy as np
        >>> from bn_jax.lab.experiments.sweeps import take
        >>> take({"of seeds": np.array([[1, 2], [3, 4]])}, 1, 0)
        {'of seeds': np.int64(3)}
    """
    return jax.tree.map(lambda leaf: leaf[place], tree)


def cross_entropy(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns the mean over the examples, or over those where a mask [n] is True."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses, where=mask)


def loss_of(
    model: nn.Module, variables: Any, x: jax.Array, y: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, dict[str, Any]]:
    """Computes the loss of a batch in training.

    Args:
        model: the network, called with `x` and `train`.
        variables: its params and batch_stats.
        x: [n, ...].
        y: labels [n].
        mask: booleans [n], False for padding. None: there is no padding.

    Returns:
        The loss, and the variables with the new batch_stats.
    """
    apply = partial(model.apply, variables, x, train=True, mutable=["batch_stats"])
    # Some of the models take no mask.
    logits, updated = apply() if mask is None else apply(mask=mask)
    return cross_entropy(logits, y, mask), {**variables, **updated}


def accuracy(model: nn.Module, variables: Any, part: Part, train: bool = False) -> jax.Array:
    """Computes the share of correct answers.

    Args:
        model: the network, called with `x` and `train`.
        variables: its params and batch_stats.
        part: examples.
        train: whether norms use the statistics of these examples or the running statistics.

    Returns:
        A scalar.
    """
    logits, _ = model.apply(variables, part.x, train=train, mutable=["batch_stats"])
    return share_correct(logits, part.y)


def share_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of correct answers; logits that are not finite are wrong answers."""
    correct = (jnp.argmax(logits, -1) == labels) & jnp.isfinite(logits).all(-1)
    return jnp.mean(correct.astype(jnp.float32))


def init_model(model: nn.Module, trial: Trial) -> Any:
    """Returns the initial variables of a model, drawn with the trial's seed."""
    return model.init(jax.random.key(trial.seed), trial.digits.train.x[:1], train=False)


def start(optimizer: optax.GradientTransformation, variables: Any) -> State:
    """Returns the state before the first step."""
    return State(variables, optimizer.init(variables["params"]))


def make_step(
    model: nn.Module, optimizer: optax.GradientTransformation, part: Part, padded: bool = False
) -> Callable[[State, jax.Array], tuple[State, tuple[jax.Array, Any]]]:
    """Returns a training step for `jax.lax.scan`.

    Args:
        model: the network, called with `x` and `train`.
        optimizer: the optimizer of the params.
        part: the examples.
        padded: whether batches may be padded with the index -1.

    Returns:
        A function of the state and of the indices of a batch. It returns the next state, and the
        loss and the gradients of that batch.
    """
    x, y = jnp.asarray(part.x), jnp.asarray(part.y)

    def step(state: State, batch: jax.Array) -> tuple[State, tuple[jax.Array, Any]]:
        variables = state.variables
        mask = batch >= 0 if padded else None

        def loss(params: Any) -> tuple[jax.Array, dict[str, Any]]:
            return loss_of(model, {**variables, "params": params}, x[batch], y[batch], mask)

        differentiate = jax.value_and_grad(loss, has_aux=True)
        (value, updated), gradients = differentiate(variables["params"])
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return State({**updated, "params": params}, optimizer_state), (value, gradients)

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
    """Trains once; under `jit` and `vmap`, many times at once.

    Args:
        model: the network, called with `x` and `train`.
        optimizer: the optimizer of the params.
        variables: the initial params and batch_stats.
        part: the examples.
        rows: the examples of each step, [steps, n].
        observe: called with the variables before the first step and after every `every` steps.
        every: divides the number of steps.
        padded: whether `rows` may be padded with the index -1.

    Returns:
        The variables after the last step, the losses, and what was observed.
    """
    step = make_step(model, optimizer, part, padded)

    def stretch(state: State, batches: jax.Array) -> tuple[State, Any]:
        state, (losses, _) = jax.lax.scan(step, state, batches)
        return state, (losses, None if observe is None else observe(state.variables))

    rows = jnp.asarray(rows)
    first = None if observe is None else observe(variables)
    stretches = rows.reshape(-1, every if observe else len(rows), rows.shape[-1])
    state, (losses, rest) = jax.lax.scan(stretch, start(optimizer, variables), stretches)
    observed = jax.tree.map(
        lambda before, after: jnp.concatenate([before[None], after]), first, rest
    )
    return Trained(state.variables, losses.reshape(-1), observed)


def train_trial(model: nn.Module, optimizer: optax.GradientTransformation, trial: Trial) -> Any:
    """Initializes and trains a model; returns the variables after the last step."""
    variables = init_model(model, trial)
    return train(model, optimizer, variables, trial.digits.train, trial.batches).variables


def sweep(run: Callable[..., Any], rates: Any, *of_seeds: Any) -> Any:
    """Calls `run` for every learning rate and seed, on all devices.

    Args:
        run: called with a rate, and with each of `of_seeds` at one seed.
        rates: [rates].
        *of_seeds: arrays, or trees of arrays, with a leading axis [seeds, ...].

    Returns:
        What `run` returns, with leading axes [rates, seeds].
    """
    rates = jnp.asarray(rates)
    shape = len(rates), jax.tree.leaves(of_seeds)[0].shape[0]
    runs = run_each(at_place(run, shape[1]), math.prod(shape), rates, *of_seeds)
    return jax.block_until_ready(
        jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), runs)
    )


def at_place(run: Callable[..., Any], seeds: int) -> Callable[..., Any]:
    """Returns the run of `sweep` for `run_each`: rate after rate, each with all seeds."""

    def run_at(place: jax.Array, rates: jax.Array, *of_seeds: Any) -> Any:
        return run(rates[place // seeds], *take(of_seeds, place % seeds))

    return run_at
