"""A small network whose norms may be by domain, and its training."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bn_jax.lab.experiments.selection import Chosen, RateSweep
from bn_jax.lab.experiments.sweeps import State, cross_entropy, share_correct, start
from bn_jax.lab.models import Norm
from bn_jax.linen import DomainBatchNorm

FIRST, SECOND = 0, 1


class Batch(NamedTuple):
    """Examples and their domains.

    Attributes:
        x: [n, features].
        y: labels [n].
        domain: the domain of each example [n], or one for all.
    """

    x: Any
    y: Any
    domain: Any


# From the variables before a step, and what there is for this step, to its batch.
MakeBatch: TypeAlias = Callable[[Any, Any], Batch]


class DomainMLP(nn.Module):
    """Dense layers, each with a norm and ReLU, and a linear classifier.

    Attributes:
        norm: constructor of the norms, `BatchNorm` or `DomainBatchNorm`.
        num_classes: number of logits.
        widths: features of the hidden layers.
        dtype: the dtype of the parameters and of the computation.
    """

    norm: Norm
    num_classes: int = 10
    widths: Sequence[int] = (64, 64)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, domain: Any, train: bool) -> jax.Array:
        """Computes the logits.

        Args:
            x: [n, features].
            domain: the domain of each example [n], or one for all. A `BatchNorm` ignores it.
            train: whether to use the batch's statistics, and update the running statistics.

        Returns:
            Logits [n, num_classes].
        """
        types = {"dtype": self.dtype, "param_dtype": self.dtype}
        for index, width in enumerate(self.widths):
            # A norm right after the layer subtracts its bias again.
            kernel_init = nn.initializers.he_normal()
            x = nn.Dense(width, False, kernel_init=kernel_init, name=f"dense{index}", **types)(x)
            norm: Any = self.norm(use_running_average=not train, name=f"norm{index}", **types)
            x = norm(x, domain) if isinstance(norm, DomainBatchNorm) else norm(x)
            x = nn.relu(x)
        return nn.Dense(self.num_classes, name="classifier", **types)(x)


def logits_of(model: DomainMLP, variables: Any, x: Any, domain: Any, train: bool = False) -> Any:
    """Computes the logits; the statistics stay as they are."""
    return model.apply(variables, x, domain, train, mutable=["batch_stats"])[0]


def accuracy_of(model: DomainMLP, variables: Any, batch: Batch) -> jax.Array:
    """Returns the share of correct answers in evaluation mode, in percent."""
    return 100 * share_correct(logits_of(model, variables, batch.x, batch.domain), batch.y)


def of_each(swept: RateSweep[Any], names: Sequence[Any]) -> dict[Any, Chosen[Any]]:
    """Chooses a rate for each of several trainings that were made in one program.

    Args:
        swept: validation and measurements [rates, seeds, trainings, ...].
        names: of the trainings.

    Returns:
        By name, what was measured at the rate that is best for all seeds, [seeds, ...].
    """

    def choose(place: int) -> Chosen[Any]:
        validation, measured = jax.tree.map(lambda leaf: leaf[:, :, place], tuple(swept[1:]))
        return RateSweep(swept.rates, validation, measured).best_for_all_seeds()

    return {name: choose(place) for place, name in enumerate(names)}


def train_by_domain(
    model: DomainMLP,
    optimizer: optax.GradientTransformation,
    seed: Any,
    features: int,
    make_batch: MakeBatch,
    steps: Any,
) -> Any:
    """Trains once from the initial variables of a seed; under `vmap`, many times at once.

    Args:
        model: the network.
        optimizer: the optimizer of the params.
        seed: of the initial parameters.
        features: of an example.
        make_batch: makes the batch of a step, from the variables before it and from a place of
            `steps`.
        steps: a tree of arrays with a leading axis [steps].

    Returns:
        The variables after the last step.
    """
    example = jnp.zeros((1, features), model.dtype)
    variables = model.init(jax.random.key(seed), example, FIRST, False)

    def step(state: State, of_step: Any) -> tuple[State, None]:
        variables = state.variables
        x, y, domain = make_batch(variables, of_step)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            trained = {**variables, "params": params}
            logits, updated = model.apply(trained, x, domain, True, mutable=["batch_stats"])
            return cross_entropy(logits, y), updated

        gradients, updated = jax.grad(loss, has_aux=True)(variables["params"])
        updates, of_optimizer = optimizer.update(gradients, state.optimizer, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return State({"params": params, **updated}, of_optimizer), None

    return jax.lax.scan(step, start(optimizer, variables), steps)[0].variables
