"""Published claims about batch normalization, each with a program that tests it."""

from bn_jax.lab.experiments import (
    affine_only,
    gradient_explosion,
    high_order_effects,
    large_rates,
    normalizer_free,
    orthogonal_representations,
    residual_identity,
    scale_invariance,
    unbiased_variance,
    vanishing_gradients,
)
from bn_jax.lab.experiments.verdicts import Experiment

__all__ = ["EXPERIMENTS", "Experiment"]

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        scale_invariance,
        gradient_explosion,
        unbiased_variance,
        large_rates,
        residual_identity,
        high_order_effects,
        affine_only,
        vanishing_gradients,
        orthogonal_representations,
        normalizer_free,
    )
}
