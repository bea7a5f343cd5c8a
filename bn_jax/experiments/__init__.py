"""What is said about batch normalization, as programs that test it."""

from bn_jax.experiments import scale_invariance
from bn_jax.experiments.verdicts import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT for module in (scale_invariance,)
}
