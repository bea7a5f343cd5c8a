"""Published claims about batch normalization, each with a program that tests it."""

from bn_jax.lab.experiments import (
    adversarial_examples,
    batch_leakage,
    batch_noise,
    corruptions,
    ghost_batches,
    precise_statistics,
    scale_invariance,
    small_batches,
    unbiased_variance,
)
from bn_jax.lab.experiments.verdicts import Experiment

__all__ = ["EXPERIMENTS", "Experiment"]

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        scale_invariance,
        small_batches,
        corruptions,
        precise_statistics,
        unbiased_variance,
        batch_noise,
        ghost_batches,
        batch_leakage,
        adversarial_examples,
    )
}
