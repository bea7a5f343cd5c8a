"""Auditing the batch norms of a model."""
