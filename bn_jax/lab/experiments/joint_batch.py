"""Claim 33: Q-learning with batch norm needs one batch of current and next state-action pairs."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_jax.lab.experiments.figures import quantile_band
from bn_jax.lab.experiments.nets import MLP, normalize_batch
from bn_jax.lab.experiments.parallel import map_runs
from bn_jax.lab.experiments.selection import Chosen, Outcome, sweep_rates
from bn_jax.lab.experiments.statistics import mean_interval, relative_error
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

STATES, ACTIONS = 3, 2
DISCOUNT = 0.9
# The norm of A's largest eigenvalue, the noise of a step, and the price of actions.
RADIUS, DRIFT, PRICE = 0.8, 0.5, 0.1
# The deviation of actions by the first policy, and by the last.
FIRST, LAST = 1.0, 0.1
# How far the evaluated policy is on the way from that of the data to the best one.
SHIFTS = 0.0, 0.1, 0.3, 1.0
DECIDING = SHIFTS[2:]
WIDTHS = 32, 32
BATCH, STEPS, POINTS = 64, 1500, 10
RATES = 0.001, 0.003, 0.01, 0.03, 0.1
MOMENTUM = 0.95
# The share of the network that enters the target network in a step.
AVERAGE = 0.02
TESTED = 1024
# The point, of `POINTS`, at a fifth of the steps.
EARLY = 1
# An error, in deviations of Q, that is as bad as any larger one.
WORST = 100.0
# By so much the error of a target network without a norm may be smaller, as a ratio.
NO_WORSE = 1.25
TOLERANCE = 1e-11
JOINT, TWO, RUNNING, TARGET, PLAIN_TARGET, PLAIN = ARMS = (
    "joint batch",
    "two calls",
    "running statistics for the next pair",
    "batch norm and target network",
    "no norm and target network",
    "no norm",
)


class System(NamedTuple):
    """A linear system with quadratic costs, the data, the evaluated policy and its Q.

    Attributes:
        dynamics: of (state, action, 1), gives the mean of the next state, [states, all].
        policy: of (state, 1), gives the mean of the action, [actions, states + 1].
        spread: the deviation of the policy's actions.
        state_root: a root of the covariance of the data's states, which is that of the next states.
        reward: the quadratic form of (state, action, 1), [all, all].
        value: the quadratic form of Q.
    """

    dynamics: Any
    policy: Any
    spread: Any
    state_root: Any
    reward: Any
    value: Any


def quadratic(form: Any, pairs: Any) -> Any:
    """Returns the values of a quadratic form at (state, action, 1), [n] of [n, all]."""
    return ((pairs @ form) * pairs).sum(-1)


def evaluate_policy(dynamics: Any, reward: Any, policy: Any, spread: float) -> Any:
    """Returns Q of a policy, the quadratic form that solves the Bellman equation.

    With ``z' = M z + noise`` and covariance ``S`` of the noise, ``P = R + g M^T P M``, and the
    constant is ``g tr(P S) / (1 - g)``. The arguments are those of `System`.
    """
    every, one = len(reward), np.eye(1, len(reward), len(reward) - 1)
    of_state = np.concatenate([dynamics, one])
    step = np.concatenate([dynamics, policy @ of_state, one])
    gain = np.concatenate([np.eye(STATES), policy[:, :STATES]])
    noise = np.zeros((every, every))
    noise[:-1, :-1] = DRIFT**2 * gain @ gain.T
    noise[STATES:-1, STATES:-1] += spread**2 * np.eye(ACTIONS)
    system = np.eye(every**2) - DISCOUNT * np.kron(step.T, step.T)
    form = np.linalg.solve(system, reward.ravel()).reshape(every, every)
    form[-1, -1] += DISCOUNT * np.trace(form @ noise) / (1 - DISCOUNT)
    return form


def improve(form: Any) -> Any:
    """Returns the policy whose actions are the best by a quadratic form Q."""
    actions = slice(STATES, -1)
    others = np.r_[:STATES, len(form) - 1]
    return -np.linalg.solve(form[actions, actions], form[actions][:, others])


def make_system(seed: int, shift: float) -> System:
    """Draws a system, and evaluates a policy on it.

    The data have independent actions and their stationary states. So next states are distributed
    as states, and with a shift of 0, next actions as actions.

    Args:
        seed: of the system.
        shift: see `SHIFTS`.

    Returns:
        The system. Rewards are shifted and scaled so that Q has mean 0 and deviation 1 on the data.
    """
    generator = np.random.default_rng([33, seed])
    matrix = generator.standard_normal((STATES, STATES))
    matrix *= RADIUS / abs(np.linalg.eigvals(matrix)).max()
    inputs = generator.standard_normal((STATES, ACTIONS)) / np.sqrt(STATES)
    goal = generator.standard_normal(STATES)
    dynamics = np.concatenate([matrix, inputs, np.zeros((STATES, 1))], 1)
    noise = DRIFT**2 * np.eye(STATES) + FIRST**2 * inputs @ inputs.T
    covariance = np.linalg.solve(
        np.eye(STATES**2) - np.kron(matrix, matrix), noise.ravel()
    ).reshape(STATES, STATES)
    cost = np.diag([1.0] * STATES + [PRICE] * ACTIONS + [goal @ goal])
    cost[:STATES, -1] = cost[-1, :STATES] = -goal
    best = np.zeros((ACTIONS, STATES + 1))
    for _ in range(20):
        best = improve(evaluate_policy(dynamics, -cost, best, LAST))
    policy, spread = shift * best, FIRST + shift * (LAST - FIRST)
    value = evaluate_policy(dynamics, -cost, policy, spread)
    # Mean and variance of a quadratic form of centred Gaussian pairs.
    pairs = np.zeros_like(cost)
    pairs[:STATES, :STATES] = covariance
    pairs[STATES:-1, STATES:-1] = FIRST**2 * np.eye(ACTIONS)
    mean = np.trace(value @ pairs) + value[-1, -1]
    linear = 2 * value[-1] * (np.arange(len(cost)) < len(cost) - 1)
    deviation = np.sqrt(2 * np.trace(value @ pairs @ value @ pairs) + linear @ pairs @ linear)
    reward = -cost
    reward[-1, -1] -= (1 - DISCOUNT) * mean
    value[-1, -1] -= mean
    root = np.linalg.cholesky(covariance)
    return System(dynamics, policy, spread, root, reward / deviation, value / deviation)


class Transitions(NamedTuple):
    """Pairs of state and action [n, states + actions], rewards [n], and the next pairs."""

    pairs: jax.Array
    rewards: jax.Array
    next_pairs: jax.Array


def with_one(x: jax.Array) -> jax.Array:
    """Appends a feature that is 1."""
    return jnp.concatenate([x, jnp.ones_like(x[:, :1])], -1)


def draw_transitions(system: System, key: jax.Array, number: int) -> Transitions:
    """Draws transitions of the data, with next actions by the evaluated policy."""
    keys = jax.random.split(key, 4)
    dtype = jnp.asarray(system.reward).dtype
    normal = partial(jax.random.normal, dtype=dtype)
    states = normal(keys[0], (number, STATES)) @ system.state_root.T
    pairs = jnp.concatenate([states, FIRST * normal(keys[1], (number, ACTIONS))], -1)
    states = with_one(pairs) @ system.dynamics.T + DRIFT * normal(keys[2], (number, STATES))
    actions = with_one(states) @ system.policy.T
    actions = actions + system.spread * normal(keys[3], (number, ACTIONS))
    rewards = quadratic(system.reward, with_one(pairs))
    return Transitions(pairs, rewards, jnp.concatenate([states, actions], -1))


def values(
    arm: str, model: nn.Module, variables: Any, target: Any, batch: Transitions
) -> tuple[jax.Array, jax.Array, Any]:
    """Computes Q of the pairs and of the next pairs of a batch, as an arm does.

    Args:
        arm: a name in `ARMS`.
        model: the network, called with pairs and `train`.
        variables: its params and batch_stats.
        target: the variables of the target network.
        batch: the transitions.

    Returns:
        Q of the pairs [n], Q of the next pairs [n], and the new batch_stats.
    """
    apply = partial(model.apply, mutable=["batch_stats"])
    if arm == JOINT:
        both = jnp.concatenate([batch.pairs, batch.next_pairs])
        found, updated = apply(variables, both, train=True)
        now, later = jnp.split(found[:, 0], 2)
        return now, later, updated
    now, updated = apply(variables, batch.pairs, train=True)
    of_next = target if arm in (TARGET, PLAIN_TARGET) else variables
    later, _ = apply(of_next, batch.next_pairs, train=arm == TWO)
    return now[:, 0], later[:, 0], updated


def error(difference: jax.Array) -> jax.Array:
    """Returns the root mean square, at most `WORST`."""
    root = jnp.sqrt(jnp.mean(difference**2))
    return jnp.nan_to_num(jnp.minimum(root, WORST), nan=WORST)


def learn(
    arm: str, rate: Any, seed: jax.Array, system: System, steps: int
) -> Outcome[dict[str, jax.Array]]:
    """Learns Q from transitions.

    Args:
        arm: a name in `ARMS`.
        rate: the first rate of Adam, which falls to zero linearly.
        seed: of the network and of the transitions.
        system: the system.
        steps: the number of steps.

    Returns:
        The "error" in evaluation mode after every tenth of the steps, [POINTS], and the "bias", the
        mean difference from Q at the end. The validation is by the error on other pairs.
    """
    norm = None if arm in (PLAIN_TARGET, PLAIN) else partial(BatchNorm, momentum=MOMENTUM)
    model = MLP(WIDTHS, 1, norm=norm)
    optimizer = optax.adam(optax.linear_schedule(rate, 0.0, steps))
    keys = jax.random.split(jax.random.key(seed), 4)
    validation, tested = (draw_transitions(system, key, TESTED).pairs for key in keys[:2])
    variables = model.init(keys[2], tested[:1], train=False)

    def difference(variables: Any, pairs: jax.Array) -> jax.Array:
        found: Any = model.apply(variables, pairs, train=False)
        return found[:, 0] - quadratic(system.value, with_one(pairs))

    def step(carry: Any, number: jax.Array) -> tuple[Any, None]:
        variables, target, state = carry
        batch = draw_transitions(system, jax.random.fold_in(keys[3], number), BATCH)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            given = {**variables, "params": params}
            now, later, updated = values(arm, model, given, target, batch)
            wanted = batch.rewards + DISCOUNT * jax.lax.stop_gradient(later)
            return jnp.mean((now - wanted) ** 2), updated

        gradients, updated = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state)
        params = optax.apply_updates(variables["params"], updates)
        variables = {**variables, **updated, "params": params}
        target = optax.incremental_update(variables, target, AVERAGE)
        return (variables, target, state), None

    def stretch(carry: Any, numbers: jax.Array) -> tuple[Any, jax.Array]:
        carry, _ = jax.lax.scan(step, carry, numbers)
        return carry, error(difference(carry[0], tested))

    start: Any = variables, variables, optimizer.init(variables["params"])
    numbers = jnp.arange(steps).reshape(POINTS, -1)
    (variables, *_), errors = jax.lax.scan(stretch, start, numbers)
    bias = jnp.mean(difference(variables, tested))
    return Outcome(-error(difference(variables, validation)), {"error": errors, "bias": bias})


def train_arm(setting: Setting, arm: str, systems: System) -> Chosen[dict[str, Any]]:
    """Learns Q of every system [seeds, shifts] at every rate, and chooses the best for each."""
    steps = STEPS // 15 if setting.quick else STEPS

    def run(rate: jax.Array, seed: jax.Array, of_seed: System) -> Outcome[dict[str, jax.Array]]:
        return map_runs(lambda system: learn(arm, rate, seed, system, steps), of_seed)

    rates = RATES[2:4] if setting.quick else RATES
    return sweep_rates(run, rates, setting.chosen, systems).best_for_each_seed()


def make_systems(setting: Setting) -> System:
    """Makes the systems of all seeds and shifts, [seeds, shifts, ...], in float32."""
    systems = [[make_system(seed, shift) for shift in SHIFTS] for seed in setting.chosen.tolist()]
    of_seeds = [jax.tree.map(lambda *leaves: np.stack(leaves), *one) for one in systems]
    return jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *of_seeds)


class Apart(NamedTuple):
    """The 2-Wasserstein distance of next pairs from pairs, and by how much their Q is larger."""

    distance: float
    value: float


def apart(system: System) -> Apart:
    """Computes how the next pairs differ from the pairs of the data; both are Gaussian."""
    system = System(*(np.asarray(leaf, np.float64) for leaf in system))
    states = system.state_root @ system.state_root.T
    gain = np.concatenate([np.eye(STATES), system.policy[:, :STATES]])
    after = gain @ states @ gain.T
    after[STATES:, STATES:] += system.spread**2 * np.eye(ACTIONS)
    before = np.zeros_like(after)
    before[:STATES, :STATES], before[STATES:, STATES:] = states, FIRST**2 * np.eye(ACTIONS)
    shift = np.concatenate([np.zeros(STATES), system.policy[:, -1]])
    # The eigenvalues of the product are those of root(before) after root(before).
    products = np.linalg.eigvals(before @ after).real
    cross = np.sqrt(np.maximum(products, 0)).sum()
    squared = shift @ shift + np.trace(before) + np.trace(after) - 2 * cross
    form, linear = system.value[:-1, :-1], 2 * system.value[-1, :-1]
    value = shift @ form @ shift + linear @ shift + np.trace(form @ (after - before))
    return Apart(float(np.sqrt(max(squared, 0))), float(value))


class ByDomain(nn.Module):
    """An `MLP` that makes both calls in one: the pairs are domain 0, and the next pairs 1."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, domain: jax.Array) -> jax.Array:
        """Computes Q, [n, 1], in training mode."""
        dtype = x.dtype
        for index, width in enumerate(self.widths):
            x = nn.Dense(width, False, param_dtype=dtype, name=f"dense{index}")(x)
            norm = DomainBatchNorm(share_params=True, momentum=MOMENTUM, name=f"norm{index}")
            x = nn.relu(norm(x, domain, use_running_average=False))
        return nn.Dense(1, param_dtype=dtype, name="classifier")(x)


def identity_errors(seeds: Any) -> dict[str, Any]:
    """Returns the largest relative errors of two identities, in float64, [seeds].

    "two calls": a network with statistics by domain against two calls of a plain one, in training
    mode: Q, new running statistics and gradients. "joint batch": a batch norm of both batches
    against their moments, merged by hand.
    """
    widths, size, features = (7, 6), 12, STATES + ACTIONS
    plain = MLP(widths, 1, norm=partial(BatchNorm, momentum=MOMENTUM), dtype=jnp.float64)

    def of_seed(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 4)
        pairs = jax.random.normal(keys[0], (size, features), jnp.float64)
        next_pairs = 2 + 3 * jax.random.normal(keys[1], (size, features), jnp.float64)
        both = jnp.concatenate([pairs, next_pairs])
        weights = jax.random.normal(keys[2], (2 * size,), jnp.float64)
        variables = plain.init(keys[3], pairs, train=True)

        def two_calls(params: Any) -> Any:
            given = {**variables, "params": params}
            apply = partial(plain.apply, given, train=True, mutable=["batch_stats"])
            (now, first), (later, second) = apply(pairs), apply(next_pairs)
            stats = jax.tree.map(lambda *rows: jnp.stack(rows), first, second)
            found = jnp.concatenate([now, later])[:, 0]
            return found @ weights, (found, stats)

        split = split_batch_norms(variables, 2, share_params=True)
        domain = jnp.repeat(jnp.arange(2), size, total_repeat_length=2 * size)

        def one_call(params: Any) -> Any:
            given = {**split, "params": params}
            found, stats = ByDomain(widths).apply(given, both, domain, mutable=["batch_stats"])
            return found[:, 0] @ weights, (found[:, 0], stats)

        expected, found = (
            jax.grad(of_params, has_aux=True)(variables["params"])
            for of_params in (two_calls, one_call)
        )
        errors = jax.tree.map(relative_error, found, expected)
        batches = both.reshape(2, size, features)
        means = batches.mean(1, keepdims=True)
        variance = batches.var(1, keepdims=True).mean(0) + (means[0] - means[1]) ** 2 / 4
        by_hand = (both - means.mean(0)) / jnp.sqrt(variance)
        return {
            TWO: jnp.max(jnp.stack(jax.tree.leaves(errors))),
            JOINT: relative_error(normalize_batch(both), by_hand),
        }

    with jax.enable_x64(True):
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(of_seed))(keys))


def compare(
    errors: Mapping[str, Any], biases: Mapping[str, Any], improvement: Any
) -> dict[str, Any]:
    """Returns the quantities of the sub-claims on learning.

    Args:
        errors: by arm, [seeds, shifts, points].
        biases: by arm, [seeds, shifts].
        improvement: `Apart.value`, [seeds, shifts].
    """
    last = {arm: of_arm[..., -1] for arm, of_arm in errors.items()}
    places = {_name(shift): SHIFTS.index(shift) for shift in DECIDING}

    def ratios(arm: str, to: str, of: Mapping[str, Any] = last) -> dict[str, Any]:
        return {name: of[arm][:, place] / of[to][:, place] for name, place in places.items()}

    early = {arm: of_arm[..., EARLY] for arm, of_arm in errors.items()}
    expected = -DISCOUNT / (1 - DISCOUNT) * improvement
    excess = last[TWO] - last[JOINT]
    return {
        "33a": ratios(TWO, JOINT),
        "33b": {name: biases[TWO][:, place] / expected[:, place] for name, place in places.items()},
        "33c": {
            f"{SHIFTS[place]:g} to {SHIFTS[place + 1]:g}": excess[:, place + 1] - excess[:, place]
            for place in range(len(SHIFTS) - 1)
        },
        "33d": ratios(RUNNING, JOINT),
        "33e": ratios(TARGET, JOINT),
        "33f": ratios(JOINT, PLAIN_TARGET),
        "33g": ratios(JOINT, PLAIN_TARGET, early),
        "33h": ratios(PLAIN, PLAIN_TARGET),
        "33i": last[TWO][:, 0] / last[JOINT][:, 0],
    }


def _name(shift: float) -> str:
    return f"shift {shift:g}"


def run(setting: Setting) -> Result:
    """Makes all runs of this claim."""
    systems = make_systems(setting)
    chosen = {}
    for arm in ARMS:
        chosen[arm] = train_arm(setting, arm, systems)
        setting.advance(1 / len(ARMS))
    errors = {arm: of_arm.measured["error"] for arm, of_arm in chosen.items()}
    biases = {arm: of_arm.measured["bias"] for arm, of_arm in chosen.items()}
    differences = [
        [apart(make_system(seed, shift)) for shift in SHIFTS] for seed in setting.chosen.tolist()
    ]
    distances, improvement = np.moveaxis(np.asarray(differences), -1, 0)
    steps = STEPS // 15 if setting.quick else STEPS
    return Result(
        values=compare(errors, biases, improvement) | {"33j": identity_errors(setting.chosen)},
        curves={
            "distance": distances.T,
            "error": {arm: of_arm[..., -1].T for arm, of_arm in errors.items()},
            "steps": np.arange(1, POINTS + 1) * steps // POINTS,
            "over steps": {arm: of_arm[:, -1].T for arm, of_arm in errors.items()},
        },
        series=[
            Series("33a", arm, _name(shift), of_arm[:, place, -1])
            for arm, of_arm in errors.items()
            for place, shift in enumerate(SHIFTS)
        ],
        reported={
            f"distance of next pairs from pairs, {_name(shift)}": mean_interval(of_shift)
            for shift, of_shift in zip(SHIFTS, distances.T, strict=True)
        },
        rates={arm: of_arm.rate for arm, of_arm in chosen.items()},
    )


def draw(figure: "Figure", curves: Mapping[str, Any]) -> None:
    """Draws medians of the errors by the distance of both distributions, and over the steps."""
    left, right = figure.subplots(1, 2, sharey=True)
    distances = np.asarray(curves["distance"], np.float64).mean(-1)
    for arm in ARMS:
        quantile_band(left, distances, curves["error"][arm], arm, share=0.5, marker=".")
        quantile_band(right, curves["steps"], curves["over steps"][arm], arm, share=0.5, marker=".")
    left.set(
        xlabel="distance of next pairs from pairs", ylabel="error of Q (deviations)", yscale="log"
    )
    right.set(xlabel="steps, best policy")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))


EXPERIMENT = Experiment(
    number=33,
    name="joint_batch",
    claim="Q-learning with batch norm needs a joint batch, and then no target network",
    source="Bhatt et al. 2024",
    sub_claims=(
        SubClaim(
            "33a",
            "two calls",
            "if pairs and next pairs are normalized in two calls, each by its own statistics, Q is "
            "less exact than with a joint batch",
            "error of Q, two calls over joint batch",
            Above(1.0),
            scale="ratio",
        ),
        SubClaim(
            "33b",
            "the reason",
            "two calls hide from Q by how much the evaluated policy is better than that of the "
            "data: both calls give the same mean, and Q is too small by g / (1 - g) times this, "
            "with discount g",
            "mean error of Q with two calls, over that of a network with equal means",
            Within(0.5, 1.5),
            Published("1 for a norm right before the output", "D"),
            "ours: half of it; after a norm, an activation gives means that differ a little",
        ),
        SubClaim(
            "33c",
            "the farther, the worse",
            "the farther the next pairs are from the pairs, the larger is the error of two calls",
            "growth of the error of two calls minus that of the joint batch (deviations of Q)",
            Above(0.0),
        ),
        SubClaim(
            "33d",
            "running statistics",
            "if next pairs are normalized by running statistics of the pairs, Q is less exact than "
            "with a joint batch",
            "error of Q, running statistics over joint batch",
            Above(1.0),
            scale="ratio",
        ),
        SubClaim(
            "33e",
            "with a target network",
            "with batch norm and a target network in evaluation mode, Q is less exact than with a "
            "joint batch and no target network",
            "error of Q, target network over joint batch",
            Above(1.0),
            scale="ratio",
        ),
        SubClaim(
            "33f",
            "no target network",
            "with a joint batch and no target network, Q is as exact as without norm and with a "
            "target network",
            "error of Q, joint batch over no norm and target network",
            Below(NO_WORSE),
            reason="ours: a quarter",
            scale="ratio",
        ),
        SubClaim(
            "33g",
            "sample efficiency",
            "with a joint batch, Q is learned from fewer samples than without norm and with a "
            "target network",
            "error of Q after a fifth of the steps, joint batch over no norm and target network",
            Below(1.0),
            scale="ratio",
        ),
        SubClaim(
            "33h",
            "the premise",
            "without a norm, Q is less exact without a target network",
            "error of Q without norm, without over with a target network",
            Above(1.0),
            scale="ratio",
        ),
        SubClaim(
            "33i",
            "control: the same policy",
            "where next pairs are distributed as pairs, two calls are as exact as a joint batch",
            "error of Q, two calls over joint batch",
            Within(1 / NO_WORSE, NO_WORSE),
            reason="ours: a quarter",
            scale="ratio",
        ),
        SubClaim(
            "33j",
            "the same, by domain",
            "statistics by domain with shared scale and bias are two calls, and one batch norm of "
            "both batches is the joint batch",
            "largest relative difference of Q, statistics and gradients, in float64",
            Identity(TOLERANCE),
            Published("0", "D"),
        ),
    ),
    protocol=(
        f"Q of a given policy on random linear systems ({STATES} states, {ACTIONS} actions, noise) "
        "with quadratic costs, known in closed form; pairs by independent actions and their "
        "stationary states, next actions by a policy from that of the data (shift 0) to the best "
        f"one (1); MLP {STATES + ACTIONS}-32-32-1, {STEPS} steps of Adam on {BATCH} fresh "
        f"transitions, discount {DISCOUNT:g}, targets without gradient, target networks that take "
        f"{AVERAGE:.0%} of the network in a step; root mean square error in evaluation mode in "
        "deviations of Q, at most 100; rates chosen for each seed and policy by this error on "
        "other pairs"
    ),
    limits=(
        "The policy is given, not learned, so that errors of Q do not feed back into it, and "
        "samples are fresh. The rates are chosen by the true Q, which nobody knows in practice. "
        "The norms are batch norms, where the published networks have batch renorm."
    ),
    run=run,
    draw=draw,
    easy="The harm of two calls, and its size, which is what equal means predict.",
    hard=(
        "The premise: on these systems, a network without a norm needs no target network. Running "
        "statistics for the next pairs are nearly as good as a joint batch if the policy is far "
        "from that of the data."
    ),
)
