"""Auditing a trained model: faults of its batch norms, found by running it on one batch."""

from bn_jax._audit.auditing import audit
from bn_jax._audit.evidence import is_initial
from bn_jax._audit.report import Audit, Finding, Layer

__all__ = ["Audit", "Finding", "Layer", "audit", "is_initial"]
