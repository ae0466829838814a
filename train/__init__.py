"""Training: data, losses, optimizer, loop, checkpoints, metrics."""
