"""Published claims about batch normalization, each with a program that tests it."""

from bn_jax.lab.experiments import (
    absorption_with_padding,
    adversarial_examples,
    affine_only,
    batch_leakage,
    batch_noise,
    conditional_norm,
    corruptions,
    decoupling,
    ghost_batches,
    gradient_explosion,
    hessian,
    high_order_effects,
    large_rates,
    normalizer_free,
    not_gaussian,
    orthogonal_representations,
    precise_statistics,
    residual_identity,
    scale_and_bias_alone,
    scale_invariance,
    sigmoid_training,
    small_batches,
    smoothness,
    step_two,
    unbiased_variance,
    undoing_the_norm,
    unlike_scales,
    vanishing_gradients,
    which_part,
    whitening,
)
from bn_jax.lab.experiments.verdicts import Experiment

__all__ = ["EXPERIMENTS", "Experiment"]

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        scale_invariance,
        gradient_explosion,
        small_batches,
        corruptions,
        precise_statistics,
        unbiased_variance,
        sigmoid_training,
        large_rates,
        residual_identity,
        smoothness,
        whitening,
        batch_noise,
        ghost_batches,
        batch_leakage,
        scale_and_bias_alone,
        hessian,
        decoupling,
        step_two,
        high_order_effects,
        affine_only,
        undoing_the_norm,
        not_gaussian,
        unlike_scales,
        vanishing_gradients,
        which_part,
        absorption_with_padding,
        orthogonal_representations,
        adversarial_examples,
        normalizer_free,
        conditional_norm,
    )
}
"""All experiments by name, in the order of their claims."""
