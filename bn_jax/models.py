"""Moved to `bn_jax.lab.models`."""

from bn_jax._moved import stand_in

stand_in(__name__, "bn_jax.lab.models")
