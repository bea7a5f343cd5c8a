"""Training: steps that keep the statistics; over a mesh, exact whatever the padding and devices."""

from bn_jax.training.steps import *  # noqa: F403
