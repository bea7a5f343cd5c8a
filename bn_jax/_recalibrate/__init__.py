"""Recalibration: the exact population statistics of a trained model, measured over a data set."""

from bn_jax._recalibrate.passes import LayerChange, Recalibration, measure, recalibrate, updated

__all__ = ["LayerChange", "Recalibration", "measure", "recalibrate", "updated"]
