"""Auditing the batch norms of a model."""

from bn_jax._audit.findings import Audit, Finding, Layer, audit

__all__ = ["Audit", "Finding", "Layer", "audit"]
