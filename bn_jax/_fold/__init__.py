"""Batch norms folded into the linear layers beside them, for a model whose training is over."""

from bn_jax._fold.affine import absorb_scale, as_affine
from bn_jax._fold.folding import Folded, fold
from bn_jax._fold.report import FoldedNorm, FoldReport

__all__ = ["FoldReport", "Folded", "FoldedNorm", "absorb_scale", "as_affine", "fold"]
