"""A trained model as a folder that runs without this library: program, parameters, README."""

from bn_jax._export.exporting import export_model
from bn_jax._export.loading import ExportedModel, load_exported

__all__ = ["ExportedModel", "export_model", "load_exported"]
