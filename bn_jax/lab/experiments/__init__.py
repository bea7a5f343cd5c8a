"""Published claims about batch normalization, each with a program that tests it."""

from bn_jax.lab.experiments import (
    absorption_with_padding,
    not_gaussian,
    scale_and_bias_alone,
    scale_invariance,
    sigmoid_training,
    step_two,
    unbiased_variance,
    undoing_the_norm,
    unlike_scales,
    which_part,
)
from bn_jax.lab.experiments.verdicts import Experiment

__all__ = ["EXPERIMENTS", "Experiment"]

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        scale_invariance,
        unbiased_variance,
        sigmoid_training,
        scale_and_bias_alone,
        step_two,
        undoing_the_norm,
        not_gaussian,
        unlike_scales,
        which_part,
        absorption_with_padding,
    )
}
