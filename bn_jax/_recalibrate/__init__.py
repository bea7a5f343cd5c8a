"""Recalibration: the exact population statistics of a trained model, measured over a data set."""

from bn_jax._recalibrate.passes import recalibrate
from bn_jax._recalibrate.report import LayerChange, Recalibration

__all__ = ["LayerChange", "Recalibration", "recalibrate"]
