"""Published claims about batch normalization, each with a program that tests it."""

from bn_jax.lab.experiments import (
    decoupling,
    hessian,
    scale_invariance,
    smoothness,
    unbiased_variance,
    whitening,
)
from bn_jax.lab.experiments.verdicts import Experiment

__all__ = ["EXPERIMENTS", "Experiment"]

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        scale_invariance,
        unbiased_variance,
        smoothness,
        whitening,
        hessian,
        decoupling,
    )
}
