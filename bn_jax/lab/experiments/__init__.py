"""Published claims about batch normalization, each with a program that tests it."""

from bn_jax.lab.experiments import (
    absorption_with_padding,
    decoupling,
    hessian,
    not_gaussian,
    scale_and_bias_alone,
    scale_invariance,
    sigmoid_training,
    smoothness,
    step_two,
    unbiased_variance,
    undoing_the_norm,
    unlike_scales,
    which_part,
    whitening,
)
from bn_jax.lab.experiments.verdicts import Experiment

__all__ = ["EXPERIMENTS", "Experiment"]

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        scale_invariance,
        unbiased_variance,
        sigmoid_training,
        smoothness,
        whitening,
        scale_and_bias_alone,
        hessian,
        decoupling,
        step_two,
        undoing_the_norm,
        not_gaussian,
        unlike_scales,
        which_part,
        absorption_with_padding,
    )
}
