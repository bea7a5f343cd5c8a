"""Folding norms into the linear layers beside them."""
