"""Training: the cached step, the loop, checkpoints, metrics."""
