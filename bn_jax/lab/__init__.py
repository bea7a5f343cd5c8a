"""The `bn-jax` command and what it needs: data, models, the training loop, runs, experiments."""
