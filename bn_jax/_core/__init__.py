"""The arithmetic, on arrays: it imports JAX and nothing else."""
