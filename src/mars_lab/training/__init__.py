"""The training loop and what it needs: configuration, optimizers, checkpoints, metrics, progress."""
