"""A claim of your own: in a batch of n, no normalized value is larger than sqrt(n - 1)."""

import jax
import numpy as np

import bn_jax as bn
from bn_jax.lab.experiments.verdicts import Below, Experiment, Identity, Published, Result, SubClaim


def largest(seed, n):
    """Returns the largest normalized value of 10 features, over sqrt(n - 1)."""
    x = jax.random.normal(jax.random.key(seed), (n, 10))
    y, _ = bn.batch_norm({}, bn.init_batch_stats(10), x, use_running_average=False, epsilon=1e-12)
    return abs(np.asarray(y)).max() / np.sqrt(n - 1)


def run(setting):
    """Returns a value of each sub-claim for each seed; several settings are a mapping."""
    found = {n: np.array([largest(seed, n) for seed in setting.chosen]) for n in (2, 4, 8, 16)}
    setting.advance(1.0)
    more = {f"n = {n}": found[n] for n in (4, 8, 16)}
    return Result(values={"m1a": found[2] - 1, "m1b": more}, curves={"largest": more})


def draw(figure, curves):
    """Draws the largest value for each batch size."""
    axes = figure.subplots()
    axes.boxplot(list(curves["largest"].values()), tick_labels=list(curves["largest"]))
    axes.set_ylabel("largest value / sqrt(n - 1)")


pairs = "of two values, one becomes 1 and the other -1"
more = "of more values, none reaches sqrt(n - 1)"
quantity = "largest of 10 features, over sqrt(n - 1)"
EXPERIMENT = Experiment(
    number=101,
    name="largest_value",
    claim="In a batch of n, no normalized value is larger than sqrt(n - 1)",
    source="any textbook",
    sub_claims=(
        SubClaim("m1a", "pairs", pairs, f"{quantity}, minus 1", Identity(1e-3)),
        SubClaim("m1b", "more", more, quantity, Below(1.0), Published("sqrt(n - 1)", "D")),
    ),
    protocol="normal values, 10 features for each seed",
    limits="Random values come near the bound only in small batches.",
    run=run,
    draw=draw,
)
