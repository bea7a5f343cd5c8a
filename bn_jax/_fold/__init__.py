"""Folding norms into the linear layers beside them."""

from bn_jax._fold.folding import Folded, FoldedNorm, FoldReport, absorb_scale, as_affine, fold

__all__ = ["FoldReport", "Folded", "FoldedNorm", "absorb_scale", "as_affine", "fold"]
