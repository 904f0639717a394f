"""Training: the loop, its steps, checkpoints, and what it tells."""
